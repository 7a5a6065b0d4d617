// The text that follows a prompt, one token a call: src/bellbox/inference/generation.py in C++.
#pragma once

#include <algorithm>
#include <chrono>
#include <string>
#include <vector>

#include "bellbox.h"
#include "runtime/model/language.h"
#include "runtime/sampling.h"
#include "runtime/text/stream.h"
#include "runtime/text/tokenizer.h"

namespace bellbox {

class Continuation {
  public:
    // Model and tokenizer must outlive it.
    Continuation(const Language& model, const Tokenizer& words, const char* prompt, const bellbox_options& options)
        : model_(model), prompt_(words.encode(prompt)), most_(most_tokens(options)), sampler_(sampling(options), options.seed),
          stop_(stop_of(words, options.stop)), threads_(std::max(1, options.threads)), cache_(model.new_cache(times_.prompt_tokens + most_, cache_type(options.cache_bits))),
          logits_(static_cast<size_t>(model.shape().vocabulary)), stream_(words, prompt_) {}
    Continuation(const Continuation&) = delete;
    Continuation& operator=(const Continuation&) = delete;

    // One more token, and the text that it completes; false at the end, also where `piece` asks for it.
    bool next(bellbox_piece piece, void* user) {
        if (ended_) return false;
        ended_ = true;  // also by an error
        const auto give = [&](const std::string& text) { return text.empty() || piece == nullptr || piece(user, text.c_str(), text.size()) == 0; };
        const double begun = seconds();
        const bool first = made_ == 0;
        model_.forward(first ? prompt_.data() : &token_, first ? times_.prompt_tokens : 1, cache_, logits_.data(), threads_);
        require_finite(logits_.data(), model_.shape().vocabulary, made_ + 1);
        token_ = sampler_.draw(logits_.data(), model_.shape().vocabulary);
        (first ? times_.prefill_seconds : times_.decode_seconds) += seconds() - begun;
        ++made_;
        if (token_ != stop_) {
            ++times_.new_tokens;
            if (!give(stream_.push(token_))) return false;
            if (made_ < most_) return !(ended_ = false);
        }
        give(stream_.flush());
        return false;
    }

    const bellbox_times& times() const { return times_; }

  private:
    static double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

    static Sampling sampling(const bellbox_options& options) {
        Sampling how;
        how.temperature = options.temperature;
        if (options.top_k != 0) how.top_k = options.top_k;
        if (options.top_p != 0) how.top_p = options.top_p;
        return how;
    }

    static uint32_t stop_of(const Tokenizer& words, const char* stop) {
        if (stop == nullptr) {
            if (!words.end_of_text()) throw Error("no token of the tokenizer closes a document; name one with stop");
            return *words.end_of_text();
        }
        if (const auto token = words.token_of(stop)) return *token;
        const std::vector<uint32_t> ids = words.encode(stop);
        if (ids.size() != 1) throw Error("stop " + shown(stop) + " is " + std::to_string(ids.size()) + " tokens of this tokenizer; it must be exactly one");
        return ids[0];
    }

    // New tokens at most, of which the context has room for.
    int64_t most_tokens(const bellbox_options& options) {
        const int64_t count = static_cast<int64_t>(prompt_.size()), longest = model_.shape().positions;
        times_.prompt_tokens = count;
        if (count == 0) throw Error("the prompt is empty; give at least one token");
        if (options.max_new_tokens < 0) throw Error("max_new_tokens is " + std::to_string(options.max_new_tokens) + "; it must be at least 1");
        if (options.max_new_tokens == 0 && count >= longest)
            throw Error("the prompt has " + std::to_string(count) + " tokens and the model takes " + std::to_string(longest) + ", new ones included; shorten it");
        const int64_t most = options.max_new_tokens > 0 ? options.max_new_tokens : std::min<int64_t>(200, longest - count);
        if (most > longest - count)
            throw Error("a prompt of " + std::to_string(count) + " and " + std::to_string(most) + " new tokens exceed the model's context of " + std::to_string(longest));
        return most;
    }

    const Language& model_;
    std::vector<uint32_t> prompt_;
    bellbox_times times_{};
    int64_t most_;
    Sampler sampler_;
    uint32_t stop_, token_ = 0;
    int threads_;
    Cache cache_;
    Floats logits_;
    TextStream stream_;
    int64_t made_ = 0;
    bool ended_ = false;
};

}  // namespace bellbox
