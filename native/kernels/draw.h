// The next token of each sequence: one of the likeliest, drawn in proportion to e^(logit / temperature).
//
// A weight is a whole number, so that sums are exact in any order; the exponential is a polynomial in fp64, each operation
// rounded by itself. So every instruction set and the reference (src/bellbox/ops/draw.py) draw the same token.
#pragma once

#include <cstring>

#include "kernels/float_linear.h"
#include "kernels/kernels.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {

// Larger for a larger number; both zeros are one.
inline uint32_t key_of(float x) {
    x += 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// Numbers as wide as a register (kPart is of float_linear.h).
constexpr int kDoubles = kPart / 2;
typedef double Doubles __attribute__((vector_size(kDoubles * sizeof(double))));
typedef uint64_t Words __attribute__((vector_size(kDoubles * sizeof(uint64_t))));
typedef float Halves __attribute__((vector_size(kDoubles * sizeof(float))));

inline Doubles doubles_of(const float* from) {
    Halves some;
    std::memcpy(&some, from, sizeof(some));
    return __builtin_convertvector(some, Doubles);
}

// e^x for x <= 0 in units of 2^-unit, to the nearest whole number: 2^n times the Taylor polynomial of the rest.
inline Words weights_of(Doubles x, int unit) {
    const Doubles whole = Doubles{} + 6755399441055744.0, half = Doubles{} + 4503599627370496.0;  // 1.5 * 2^52, 2^52: adding rounds
    const Doubles least = Doubles{} - 700.0;
    x = x < least ? least : x;
    const Doubles shifted = x * 1.4426950408889634 + whole, power = shifted - whole;
    const Doubles r = (x - power * 6.93147180369123816490e-01) - power * 1.90821492927058770002e-10;
    Doubles p = Doubles{} + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    // The low bits of `shifted` are those of the power of two.
    p = (Doubles)((Words)p + (((Words)shifted + static_cast<uint64_t>(unit)) << 52));
    return (Words)(p + half) - (Words)half;
}

// Of e^((logit - top) / temperature); kChosen: of those whose weight is not zero already.
template <bool kChosen>
inline void weigh(const float* logits, int64_t n, float top, double temperature, int unit, uint64_t* out) {
    const auto some = [&](const float* from, uint64_t* to) {
        Words chosen{};
        if (kChosen) {
            uint64_t any = 0;
            for (int l = 0; l < kDoubles; ++l) any |= to[l];
            if (any == 0) return;
            std::memcpy(&chosen, to, sizeof(chosen));
        }
        Words weights = weights_of((doubles_of(from) - static_cast<double>(top)) / temperature, unit);
        if (kChosen) weights = chosen != Words{} ? weights : Words{};
        std::memcpy(to, &weights, sizeof(weights));
    };
    int64_t i = 0;
    for (; i + kDoubles <= n; i += kDoubles) some(logits + i, out + i);
    if (i == n) return;
    float rest[kDoubles] = {};
    uint64_t weights[kDoubles] = {};
    std::memcpy(rest, logits + i, static_cast<size_t>(n - i) * sizeof(float));
    std::memcpy(weights, out + i, static_cast<size_t>(n - i) * sizeof(uint64_t));
    some(rest, weights);
    std::memcpy(out + i, weights, static_cast<size_t>(n - i) * sizeof(uint64_t));
}

// Keeps the weights of those that have less than `target` before them, in falling order of the keys and, among equal ones,
// in their own; the others become zero. What is before is weighed; or counted (kCount), and what is kept becomes one.
template <bool kCount>
inline void keep_likeliest(const uint32_t* keys, int64_t n, uint64_t target, uint64_t* weights) {
    constexpr int kShifts[] = {21, 10, 0}, kSizes[] = {2048, 2048, 1024};
    uint64_t before = 0, buckets[2048];
    uint32_t last = 0, known = 0;  // key of the last that is kept, and which of its bits are known
    for (int level = 0; level < 3; ++level) {
        std::memset(buckets, 0, sizeof(buckets));
        const uint32_t mask = static_cast<uint32_t>(kSizes[level] - 1);
        for (int64_t i = 0; i < n; ++i)
            if ((keys[i] & known) == last) buckets[keys[i] >> kShifts[level] & mask] += kCount ? 1 : weights[i];
        uint32_t bucket = mask;
        while (bucket > 0 && before + buckets[bucket] < target) before += buckets[bucket--];
        last |= bucket << kShifts[level], known |= mask << kShifts[level];
    }
    for (int64_t i = 0; i < n; ++i) {
        const uint64_t own = kCount ? 1 : weights[i];
        weights[i] = keys[i] > last ? own : 0;
        if (keys[i] == last && before < target) weights[i] = own, before += own;
    }
}

inline uint64_t sum_of(const uint64_t* weights, int64_t n) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += weights[i];
    return sum;
}

// The token of one row, or -1 where a number of it is NaN or infinity, or all are minus infinity.
inline int64_t draw_row(const DrawArgs& a, int64_t row, uint64_t* weights, uint32_t* keys) {
    const float* const logits = a.logits + row * a.n;
    uint32_t largest = 0, smallest = 0xffffffffu;
    for (int64_t i = 0; i < a.n; ++i) {
        const uint32_t key = key_of(logits[i]);
        keys[i] = key;
        largest = key > largest ? key : largest, smallest = key < smallest ? key : smallest;
    }
    const float most = 3.40282347e38f, infinity = __builtin_inff();
    if (largest > key_of(most) || largest < key_of(-most) || smallest < key_of(-infinity)) return -1;
    int64_t first = 0;
    while (keys[first] != largest) ++first;
    if (a.temperature[row] == 0.0) return first;
    int unit = 62;
    for (int64_t rest = a.n; rest > 0; rest /= 2) --unit;
    unit = unit < 51 ? unit : 51;
    if (a.top_k[row] > 0 && a.top_k[row] < a.n) {
        keep_likeliest<true>(keys, a.n, static_cast<uint64_t>(a.top_k[row]), weights);
        weigh<true>(logits, a.n, logits[first], a.temperature[row], unit, weights);
    } else {
        weigh<false>(logits, a.n, logits[first], a.temperature[row], unit, weights);
    }
    uint64_t sum = sum_of(weights, a.n);
    if (a.top_p[row] < 1.0) {
        // The first sum that is not below top_p times all.
        const double least = a.top_p[row] * static_cast<double>(static_cast<int64_t>(sum));
        const uint64_t down = static_cast<uint64_t>(static_cast<int64_t>(least));
        keep_likeliest<false>(keys, a.n, down + (static_cast<double>(static_cast<int64_t>(down)) < least ? 1 : 0), weights);
        sum = sum_of(weights, a.n);
    }
    uint64_t drawn = static_cast<uint64_t>(static_cast<int64_t>(a.drawn[row] * static_cast<double>(static_cast<int64_t>(sum))));
    drawn = drawn < sum ? drawn : sum - 1;
    int64_t i = 0;
    constexpr int64_t kSome = 256;
    for (; i + kSome < a.n; i += kSome) {
        const uint64_t some = sum_of(weights + i, kSome);
        if (drawn < some) break;
        drawn -= some;
    }
    for (; i + 1 < a.n && drawn >= weights[i]; ++i) drawn -= weights[i];
    return i;
}

// scratch: 3 n numbers of 4 bytes.
inline void draw(const DrawArgs& a, int64_t begin, int64_t end, uint64_t* scratch) {
    for (int64_t row = begin; row < end; ++row) a.out[row] = draw_row(a, row, scratch, reinterpret_cast<uint32_t*>(scratch + a.n));
}

}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
