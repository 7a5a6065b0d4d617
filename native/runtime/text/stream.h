// Tokens to text, piece by piece, such that the pieces joined are what decoding all at once would give
// (src/bellbox/inference/generation.py, TextStream).
#pragma once

#include <string>
#include <vector>

#include "runtime/text/tokenizer.h"

namespace bellbox {

class TextStream {
  public:
    TextStream(const Tokenizer& tokenizer, const std::vector<uint32_t>& prompt)
        : tokenizer_(tokenizer), ids_(prompt.end() - static_cast<int64_t>(std::min<size_t>(prompt.size(), 8)), prompt.end()), given_(ids_.size()) {}

    // The text that this token completes: often a word, sometimes nothing yet.
    std::string push(uint32_t token) {
        ids_.push_back(token);
        const std::string before = decode(given_), now = decode(ids_.size());
        const bool open = now.size() >= kReplacement.size() && now.compare(now.size() - kReplacement.size(), std::string::npos, kReplacement) == 0;
        if (characters(now) <= characters(before) || open) return "";
        start_ = given_, given_ = ids_.size();
        return rest(now, before);
    }
    // What is still held back, with U+FFFD for an unfinished character.
    std::string flush() {
        const std::string before = decode(given_), now = decode(ids_.size());
        start_ = given_ = ids_.size();
        return rest(now, before);
    }

  private:
    std::string decode(size_t end) const { return tokenizer_.decode(ids_.data() + start_, end - start_); }
    static size_t characters(const std::string& text) {
        size_t count = 0;
        for (const char c : text) count += (static_cast<unsigned char>(c) & 0xc0) != 0x80;
        return count;
    }
    // `now` behind as many characters as `before` has.
    static std::string rest(const std::string& now, const std::string& before) {
        size_t skip = characters(before), at = 0;
        for (; at < now.size(); ++at)
            if ((static_cast<unsigned char>(now[at]) & 0xc0) != 0x80 && skip-- == 0) break;
        return now.substr(at);
    }

    const Tokenizer& tokenizer_;
    std::vector<uint32_t> ids_;
    size_t start_ = 0, given_;
};

}  // namespace bellbox
