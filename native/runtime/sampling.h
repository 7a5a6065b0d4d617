// The next token from logits, as src/bellbox/inference/sampling.py takes it: the same one for the same seed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <optional>
#include <random>
#include <vector>

#include "runtime/error.h"

namespace bellbox {

struct Sampling {
    double temperature = 1.0;
    std::optional<int64_t> top_k;
    std::optional<double> top_p;

    void check() const {
        if (!(temperature >= 0) || std::isinf(temperature)) throw Error("temperature must be finite and at least 0 (0 is greedy)");
        if (top_k && *top_k < 1) throw Error("top_k is " + std::to_string(*top_k) + "; it must be at least 1");
        if (top_p && !(*top_p > 0 && *top_p <= 1)) throw Error("top_p must be above 0 and at most 1");
    }
};

// torch's generator of a CPU: the Mersenne twister, of which a double takes two numbers.
class Random {
  public:
    explicit Random(uint64_t seed) : twister_(static_cast<uint32_t>(seed)) {}
    double uniform() {
        const uint64_t high = twister_(), low = twister_();
        return static_cast<double>((high << 32 | low) & ((uint64_t{1} << 53) - 1)) * 0x1p-53;
    }

  private:
    std::mt19937 twister_;
};

inline void require_finite(const float* logits, int64_t count, int64_t number) {
    for (int64_t i = 0; i < count; ++i)
        if (!std::isfinite(logits[i]))
            throw Error("the model's logits for new token " + std::to_string(number) + " are not finite; is it trained?");
}

class Sampler {
  public:
    Sampler(const Sampling& how, uint64_t seed) : how_(how), random_(seed) { how.check(); }

    uint32_t draw(const float* logits, int64_t count) {
        const float* const most = std::max_element(logits, logits + count);
        if (how_.temperature == 0) return static_cast<uint32_t>(most - logits);
        weights_.resize(static_cast<size_t>(count));
        for (int64_t i = 0; i < count; ++i) {
            const double scaled = static_cast<double>(logits[i]) - static_cast<double>(*most);
            weights_[static_cast<size_t>(i)] = how_.temperature == 1 ? scaled : scaled / how_.temperature;
        }
        const bool ordered = how_.top_k || how_.top_p;
        if (ordered) choose(how_.top_k ? std::min(*how_.top_k, count) : count);
        for (double& each : weights_) each = std::exp(each);
        if (how_.top_p) cut();
        double sum = 0;
        for (double& each : weights_) each = sum += each;
        const double drawn = std::min(random_.uniform() * sum, std::nextafter(sum, 0.0));
        const auto place = std::upper_bound(weights_.begin(), weights_.end(), drawn) - weights_.begin();
        return ordered ? tokens_[static_cast<size_t>(place)] : static_cast<uint32_t>(place);
    }

  private:
    // The likeliest in falling order, the first of equals first.
    void choose(int64_t count) {
        tokens_.resize(weights_.size());
        std::iota(tokens_.begin(), tokens_.end(), 0u);
        const auto before = [&](uint32_t a, uint32_t b) { return weights_[a] != weights_[b] ? weights_[a] > weights_[b] : a < b; };
        std::partial_sort(tokens_.begin(), tokens_.begin() + count, tokens_.end(), before);
        tokens_.resize(static_cast<size_t>(count));
        std::vector<double> chosen;
        for (const uint32_t token : tokens_) chosen.push_back(weights_[token]);
        weights_ = std::move(chosen);
    }
    // Zero behind the fewest that together have top_p.
    void cut() {
        double all = 0, sum = 0;
        for (const double each : weights_) all += each;
        for (double& each : weights_) {
            sum += each;
            if (sum - each >= *how_.top_p * all) each = 0;
        }
    }

    Sampling how_;
    Random random_;
    std::vector<double> weights_;
    std::vector<uint32_t> tokens_;
};

}  // namespace bellbox
