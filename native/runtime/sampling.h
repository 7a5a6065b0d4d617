// The next token from logits, as src/bellbox/inference/sampling.py takes it: the same one for the same seed.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <random>
#include <vector>

#include "kernels/kernels.h"
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
        scratch_.resize(static_cast<size_t>(2 * count));  // 3 numbers of 4 bytes a token, whole words
        const int64_t top_k = how_.top_k.value_or(0);
        const double top_p = how_.top_p.value_or(1.0), drawn = how_.temperature == 0 ? 0.0 : random_.uniform();
        int64_t token = 0;
        kernels().draw(DrawArgs{logits, count, &how_.temperature, &top_k, &top_p, &drawn, &token}, 0, 1, scratch_.data());
        return static_cast<uint32_t>(token);
    }

  private:
    Sampling how_;
    Random random_;
    std::vector<uint64_t> scratch_;
};

}  // namespace bellbox
