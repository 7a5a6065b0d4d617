// A tokenizer.json, as the `tokenizers` library reads it: byte-level BPE, and the kind of sentencepiece with bytes to fall
// back on. What it cannot do is refused by name when it is opened, never done otherwise.
#pragma once

#include <array>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "runtime/error.h"
#include "runtime/text/bpe.h"
#include "runtime/text/json.h"
#include "runtime/text/split.h"
#include "runtime/text/utf8.h"

namespace bellbox {

// The characters that stand for bytes: a byte with a visible Latin-1 character is that, the others are U+0100 and on.
struct ByteAlphabet {
    std::array<std::string, 256> of_byte;
    std::unordered_map<uint32_t, char> byte_of;
    ByteAlphabet() {
        uint32_t next = 0x100;
        for (uint32_t byte = 0; byte < 256; ++byte) {
            const bool visible = (byte >= 0x21 && byte < 0x7f) || (byte >= 0xa1 && byte < 0xad) || byte >= 0xae;
            const uint32_t code = visible ? byte : next++;
            append_utf8(of_byte[byte], code);
            byte_of[code] = static_cast<char>(byte);
        }
    }
};

class Tokenizer {
  public:
    explicit Tokenizer(std::string_view json) {
        const Json spec = parse_json(json, "tokenizer.json");
        read_model(member(spec, "model"));
        read_added(member(spec, "added_tokens"));
        read_normalizer(member(spec, "normalizer"));
        read_splitter(member(spec, "pre_tokenizer"));
        read_decoder(member(spec, "decoder"));
        for (const char* name : {"<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]"})
            if (!end_of_text_) end_of_text_ = token_of(name);
    }

    size_t size() const { return names_.size(); }
    std::optional<uint32_t> end_of_text() const { return end_of_text_; }
    std::optional<uint32_t> token_of(const std::string& name) const {
        if (const auto found = added_.find(name); found != added_.end()) return found->second;
        const auto found = bpe_.vocab.find(name);
        return found == bpe_.vocab.end() ? std::nullopt : std::optional<uint32_t>(found->second);
    }

    // Tokens of a text, as data preparation makes them: nothing is added, and a special token's name is a text like any other.
    std::vector<uint32_t> encode(std::string_view text) const {
        if (!is_utf8(text)) throw Error("the text is no UTF-8");
        std::vector<uint32_t> out;
        bool first = true;
        for (size_t begin = 0; begin < text.size();) {
            size_t at = begin, length = 0;
            uint32_t token = 0;
            for (; at < text.size() && length == 0; at += length == 0 ? 1 : 0)
                for (const auto& [name, number] : plain_added_)
                    if (name.size() > length && text.substr(at, name.size()) == name) length = name.size(), token = number;
            if (at > begin) encode_part(text.substr(begin, at - begin), first, out), first = false;
            if (length > 0) out.push_back(token), first = false;
            begin = at + length;
        }
        return out;
    }

    // The text of tokens without the special ones; bytes that are no UTF-8 by themselves are U+FFFD.
    std::string decode(const uint32_t* tokens, size_t count) const {
        std::vector<std::string> parts;
        for (size_t i = 0; i < count; ++i)
            if (tokens[i] < names_.size() && names_[tokens[i]] && !special_[tokens[i]]) parts.push_back(*names_[tokens[i]]);
        for (const Decoder& each : decoders_) each(parts);
        std::string out;
        for (const std::string& part : parts) out += part;
        return out;
    }

  private:
    using Decoder = std::function<void(std::vector<std::string>&)>;
    using Normalizer = std::function<void(std::string&)>;

    [[noreturn]] static void refuse(const std::string& what) {
        throw Error("tokenizer.json: " + what + " is not what this program can do; bellbox generate runs such a model");
    }

    static uint32_t number_of(const Json& value) {
        if (!value.is_number_unsigned() || value.get<uint64_t>() >= (1u << 24))
            throw Error("tokenizer.json: a token's id is no whole number below 16,777,216");
        return value.get<uint32_t>();
    }

    void name(uint32_t token, const std::string& text) {
        if (token >= names_.size()) names_.resize(token + 1), special_.resize(token + 1);
        names_[token] = text;
    }

    void read_model(const Json& model) {
        const Json& vocab = member(model, "vocab");
        if (text_or(model, "type", "BPE") != "BPE" || !vocab.is_object())
            refuse("a model of type " + shown(text_or(model, "type", "?")));
        for (const char* part : {"continuing_subword_prefix", "end_of_word_suffix"})
            if (!text_or(model, part, "").empty()) refuse(part);
        if (!member(model, "dropout").is_null() && member(model, "dropout") != 0.0) refuse("dropout");
        for (const auto& [text, token] : vocab.items()) {
            const uint32_t number = number_of(token);
            if (number >= vocab.size() + (1u << 17)) throw Error("tokenizer.json: ids are far beyond the number of tokens");
            bpe_.vocab[text] = number, name(number, text);
        }
        bpe_.byte_fallback = flag_or(model, "byte_fallback", false);
        bpe_.fuse_unknown = flag_or(model, "fuse_unk", false);
        bpe_.ignore_merges = flag_or(model, "ignore_merges", false);
        const Json& unknown = member(model, "unk_token");
        if (unknown.is_string()) bpe_.has_unknown = true, bpe_.unknown = known(unknown.get<std::string>());
        const Json& merges = member(model, "merges");
        if (!merges.is_array()) throw Error("tokenizer.json: has no list of merges");
        uint32_t rank = 0;
        for (const Json& each : merges) {
            std::string left, right;
            if (each.is_string()) {
                const std::string both = each.get<std::string>();
                const size_t blank = both.find(' ');
                if (blank == std::string::npos) throw Error("tokenizer.json: the merge " + shown(both) + " is no pair");
                left = both.substr(0, blank), right = both.substr(blank + 1);
            } else if (each.is_array() && each.size() == 2 && each[0].is_string() && each[1].is_string()) {
                left = each[0].get<std::string>(), right = each[1].get<std::string>();
            } else {
                throw Error("tokenizer.json: a merge is no pair");
            }
            bpe_.merges[Bpe::pair(known(left), known(right))] = {rank++, known(left + right)};
        }
    }

    uint32_t known(const std::string& text) const {
        const auto found = bpe_.vocab.find(text);
        if (found == bpe_.vocab.end()) throw Error("tokenizer.json: " + shown(text) + " is not in its vocabulary");
        return found->second;
    }

    void read_added(const Json& added) {
        if (added.is_null()) return;
        if (!added.is_array()) throw Error("tokenizer.json: its added tokens are no list");
        for (const Json& each : added) {
            const std::string text = text_or(each, "content", "");
            if (text.empty()) throw Error("tokenizer.json: an added token has no content");
            // The library gives a token that the vocabulary has not the next number, whatever the file says.
            const auto size = static_cast<uint32_t>(bpe_.vocab.size());
            const uint32_t token = token_of(text).value_or(next_added_ >= size ? next_added_ : size);
            next_added_ = std::max(next_added_, token + 1);
            added_[text] = token, name(token, text);
            if (flag_or(each, "special", false)) {
                special_[token] = true;
                continue;
            }
            for (const char* option : {"single_word", "lstrip", "rstrip", "normalized"})
                if (flag_or(each, option, false)) refuse("the added token " + shown(text) + " with " + option);
            plain_added_.emplace_back(text, token);
        }
    }

    void read_normalizer(const Json& node) {
        if (node.is_null()) return;
        const std::string type = text_or(node, "type", "?");
        if (type == "Sequence") {
            for (const Json& each : member(node, "normalizers")) read_normalizer(each);
        } else if (type == "Prepend") {
            normalizers_.push_back([more = text_or(node, "prepend", "")](std::string& text) {
                if (!text.empty()) text = more + text;
            });
        } else if (type == "Replace") {
            const std::string from = text_or(member(node, "pattern"), "String", "");
            if (from.empty()) refuse("a normalizer that replaces by a pattern");
            normalizers_.push_back([from, to = text_or(node, "content", "")](std::string& text) { replace(text, from, to); });
        } else if (type == "NFC") {
            // Below U+0300 nothing is composed of parts.
            normalizers_.push_back([](std::string& text) {
                for (size_t at = 0; at < text.size();) {
                    const Character c = character_at(text, at);
                    if (c.code >= 0x300)
                        throw Error("the tokenizer composes characters (NFC), which this program does below U+0300 only");
                    at += c.length;
                }
            });
        } else {
            refuse("a normalizer of type " + shown(type));
        }
    }

    static void replace(std::string& text, const std::string& from, const std::string& to) {
        std::string out;
        size_t begin = 0;
        for (size_t at; (at = text.find(from, begin)) != std::string::npos; begin = at + from.size())
            out.append(text, begin, at - begin), out += to;
        text = out.append(text, begin, std::string::npos);
    }

    void read_splitter(const Json& node) {
        if (node.is_null()) return;
        const std::string type = text_or(node, "type", "?");
        if (type == "Sequence") {
            for (const Json& each : member(node, "pretokenizers")) read_splitter(each);
        } else if (type == "Split") {
            if (text_or(node, "behavior", "") != "Isolated" || flag_or(node, "invert", false) || pattern_ || bytes_)
                refuse("this way of splitting");
            pattern_ = &pattern_of(text_or(member(node, "pattern"), "Regex", ""));
        } else if (type == "ByteLevel") {
            if (bytes_) refuse("this way of splitting");
            bytes_ = true, blank_first_ = flag_or(node, "add_prefix_space", true);
            if (flag_or(node, "use_regex", true)) {
                if (pattern_) refuse("this way of splitting");
                pattern_ = &kGpt2;
            }
        } else if (type == "Metaspace" && !flag_or(node, "split", true)) {
            meta_ = text_or(node, "replacement", "\u2581"), meta_first_ = text_or(node, "prepend_scheme", "always");
        } else {
            refuse("a pre-tokenizer of type " + shown(type));
        }
    }

    void read_decoder(const Json& node) {
        if (node.is_null()) return;
        const std::string type = text_or(node, "type", "?");
        if (type == "Sequence") {
            for (const Json& each : member(node, "decoders")) read_decoder(each);
        } else if (type == "ByteLevel") {
            decoders_.push_back([](std::vector<std::string>& parts) { parts = {of_bytes(parts)}; });
        } else if (type == "Replace") {
            const std::string from = text_or(member(node, "pattern"), "String", "");
            if (from.empty()) refuse("a decoder that replaces by a pattern");
            decoders_.push_back([from, to = text_or(node, "content", "")](std::vector<std::string>& parts) {
                for (std::string& part : parts) replace(part, from, to);
            });
        } else if (type == "ByteFallback") {
            decoders_.push_back([](std::vector<std::string>& parts) { parts = with_bytes(parts); });
        } else if (type == "Fuse") {
            decoders_.push_back([](std::vector<std::string>& parts) {
                std::string all;
                for (const std::string& part : parts) all += part;
                parts = {all};
            });
        } else if (type == "Strip") {
            const Json &start = member(node, "start"), &stop = member(node, "stop");
            if (!start.is_number_unsigned() || stop != 0) refuse("a decoder that strips the end");
            decoders_.push_back([what = text_or(node, "content", " "), most = start.get<size_t>()](std::vector<std::string>& parts) {
                for (std::string& part : parts)
                    for (size_t i = 0; i < most && part.compare(0, what.size(), what) == 0; ++i) part.erase(0, what.size());
            });
        } else if (type == "Metaspace") {
            const bool first = text_or(node, "prepend_scheme", "always") != "never";
            decoders_.push_back([from = text_or(node, "replacement", "\u2581"), first](std::vector<std::string>& parts) {
                for (size_t i = 0; i < parts.size(); ++i) {
                    if (first && i == 0 && parts[i].compare(0, from.size(), from) == 0) parts[i].erase(0, from.size());
                    replace(parts[i], from, " ");
                }
            });
        } else {
            refuse("a decoder of type " + shown(type));
        }
    }

    static const ByteAlphabet& alphabet() {
        static const ByteAlphabet made;
        return made;
    }

    // A token that has a character which stands for no byte is its own text.
    static std::string of_bytes(const std::vector<std::string>& parts) {
        std::string bytes;
        for (const std::string& part : parts) {
            std::string some;
            bool all = true;
            for (size_t at = 0; at < part.size() && all;) {
                const Character c = character_at(part, at);
                const auto found = alphabet().byte_of.find(c.code);
                if ((all = found != alphabet().byte_of.end())) some += found->second;
                at += c.length;
            }
            bytes += all ? some : part;
        }
        return lossy(bytes);
    }

    // Tokens such as <0x0A>, of which those that follow one another are a text, or a U+FFFD each.
    static std::vector<std::string> with_bytes(const std::vector<std::string>& parts) {
        std::vector<std::string> out;
        std::string bytes;
        const auto finish = [&] {
            if (bytes.empty()) return;
            if (is_utf8(bytes)) out.push_back(bytes);
            else for (size_t i = 0; i < bytes.size(); ++i) out.emplace_back(kReplacement);
            bytes.clear();
        };
        const auto digit = [](char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1; };
        for (const std::string& part : parts) {
            const bool is_byte = part.size() == 6 && part.compare(0, 3, "<0x") == 0 && part[5] == '>' && digit(part[3]) >= 0 && digit(part[4]) >= 0;
            if (is_byte) {
                bytes += static_cast<char>(16 * digit(part[3]) + digit(part[4]));
                continue;
            }
            finish();
            out.push_back(part);
        }
        finish();
        return out;
    }

    void encode_part(std::string_view part, bool first, std::vector<uint32_t>& out) const {
        std::string text(part);
        for (const Normalizer& each : normalizers_) each(text);
        if (!meta_.empty()) {
            replace(text, " ", meta_);
            if ((meta_first_ == "always" || (meta_first_ == "first" && first)) && text.compare(0, meta_.size(), meta_) != 0) text = meta_ + text;
        }
        if (bytes_ && blank_first_ && pattern_ == &kGpt2 && !text.empty() && text[0] != ' ') text = " " + text;
        if (pattern_ == nullptr) return encode_piece(text, out);
        split_by(*pattern_, text, [&](std::string_view piece) { encode_piece(piece, out); });
    }

    void encode_piece(std::string_view piece, std::vector<uint32_t>& out) const {
        if (!bytes_) return bpe_.encode(std::string(piece), out);
        std::string spelled;
        for (const char byte : piece) spelled += alphabet().of_byte[static_cast<unsigned char>(byte)];
        bpe_.encode(spelled, out);
    }

    Bpe bpe_;
    std::vector<std::optional<std::string>> names_;
    std::vector<bool> special_;
    std::unordered_map<std::string, uint32_t> added_;
    std::vector<std::pair<std::string, uint32_t>> plain_added_;
    uint32_t next_added_ = 0;
    std::vector<Normalizer> normalizers_;
    std::vector<Decoder> decoders_;
    const Pattern* pattern_ = nullptr;
    bool bytes_ = false, blank_first_ = false;
    std::string meta_, meta_first_;
    std::optional<uint32_t> end_of_text_;
};

}  // namespace bellbox
