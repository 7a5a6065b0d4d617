// The loss of rows of logits, and its gradient: plain loops, compiled once for each instruction set.
//
// A row's exponentials are summed in sixteen lanes of fp32, kEntropyBlock numbers at most, and then in fp64; every step in a
// fixed order and none fused, so that every instruction set gives the bits of ops/cross_entropy.py. It takes two passes over a
// row for the loss and one for the gradient, with no fp32 copy of the logits.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels/cache_rows.h"
#include "kernels/exponential.h"
#include "kernels/kernels.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {

constexpr int64_t kEntropyBlock = 256;

typedef uint16_t LaneHalves __attribute__((vector_size(kPart * sizeof(uint16_t))));
typedef uint32_t LaneWords __attribute__((vector_size(kPart * sizeof(uint32_t))));

BELLBOX_INLINE Lanes load_wide(const float* from) { return load_lanes(from); }

BELLBOX_INLINE Lanes load_wide(const uint16_t* from) {
    LaneHalves halves;
    std::memcpy(&halves, from, sizeof(halves));
    return reinterpret_cast<Lanes>(__builtin_convertvector(halves, LaneWords) << 16);
}

BELLBOX_INLINE void store_narrow(Lanes x, float* to) { std::memcpy(to, &x, sizeof(x)); }

// To bf16: the nearest, ties to even; one NaN for all.
BELLBOX_INLINE void store_narrow(Lanes x, uint16_t* to) {
    const LaneWords bits = reinterpret_cast<LaneWords>(x);
    const LaneWords rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const LaneWords nan = reinterpret_cast<LaneWords>(x != x);
    const LaneHalves halves = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), LaneHalves);
    std::memcpy(to, &halves, sizeof(halves));
}

// f(i, x) for the registers of a row of n numbers; the last few are handed over with `rest` behind them, and how many they are.
template <typename T, typename F, typename G>
BELLBOX_INLINE void over_row(const T* row, int64_t n, const F& f, const G& last) {
    int64_t i = 0;
    for (; i + kPart <= n; i += kPart) f(i, load_wide(row + i));
    if (i == n) return;
    T room[kPart] = {};
    std::memcpy(room, row + i, static_cast<size_t>(n - i) * sizeof(T));
    last(i, load_wide(room), static_cast<int>(n - i));
}

template <typename T>
inline float largest_of(const T* row, int64_t n) {
    Lanes most = all_lanes(-3.4e38f);
    float largest = -3.4e38f;
    over_row(
        row, n, [&](int64_t, Lanes x) { most = where(x > most, x, most); },
        [&](int64_t, Lanes x, int left) {
            for (int l = 0; l < left; ++l) largest = x[l] > largest ? x[l] : largest;
        });
    for (int l = 0; l < kPart; ++l) largest = most[l] > largest ? most[l] : largest;
    return largest;
}

template <typename T>
inline double sum_of_exponentials(const T* row, int64_t n, float largest) {
    double wide[kLanes] = {};
    for (int64_t begin = 0; begin < n; begin += kEntropyBlock) {
        const int64_t some = n - begin < kEntropyBlock ? n - begin : kEntropyBlock;
        Lanes sums[kParts] = {};
        over_row(
            row + begin, some, [&](int64_t i, Lanes x) { sums[i / kPart % kParts] += exp_of(x - all_lanes(largest)); },
            [&](int64_t i, Lanes x, int left) {
                const Lanes e = exp_of(x - all_lanes(largest));
                for (int l = 0; l < left; ++l) sums[i / kPart % kParts][l] += e[l];
            });
        float lanes[kLanes];
        std::memcpy(lanes, sums, sizeof(lanes));
        for (int l = 0; l < kLanes; ++l) wide[l] += static_cast<double>(lanes[l]);
    }
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int l = 0; l < width; ++l) wide[l] += wide[l + width];
    return wide[0];
}

template <typename T>
inline void entropy_rows(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
        const T* const row = static_cast<const T*>(a.logits) + r * a.n;
        const double largest = static_cast<double>(largest_of(row, a.n));
        const double log_sum = std::log(sum_of_exponentials(row, a.n, static_cast<float>(largest))) + largest;
        T wanted[kPart] = {row[a.targets[r]]};
        a.log_sums[r] = static_cast<float>(log_sum);
        a.losses[r] = static_cast<float>(log_sum - static_cast<double>(load_wide(wanted)[0]));
    }
}

// rows [begin, end): losses = log(sum of e^x) - x[target], and the logarithms.
inline void cross_entropy(const CrossEntropyArgs& a, int64_t begin, int64_t end) {
    if (a.type == Type::bf16)
        entropy_rows<uint16_t>(a, begin, end);
    else
        entropy_rows<float>(a, begin, end);
}

template <typename T>
inline void entropy_gradients(const CrossEntropyBackwardArgs& a, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
        const T* const row = static_cast<const T*>(a.logits) + r * a.n;
        T* const out = static_cast<T*>(a.out) + r * a.n;
        const Lanes log_sum = all_lanes(a.log_sums[r]), factor = all_lanes(a.grads[r]);
        const int64_t target = a.targets[r];
        // The class itself once more by itself: the loop knows no exception.
        over_row(
            row, a.n, [&](int64_t i, Lanes x) { store_narrow(exp_of(x - log_sum) * factor, out + i); },
            [&](int64_t i, Lanes x, int left) {
                T room[kPart];
                store_narrow(exp_of(x - log_sum) * factor, room);
                std::memcpy(out + i, room, static_cast<size_t>(left) * sizeof(T));
            });
        T one[kPart] = {row[target]};
        store_narrow((exp_of(load_wide(one) - log_sum) - all_lanes(1.0f)) * factor, one);
        out[target] = one[0];
    }
}

// rows [begin, end): out = (e^(x - log_sum) - [it is the target]) * grad.
inline void cross_entropy_backward(const CrossEntropyBackwardArgs& a, int64_t begin, int64_t end) {
    if (a.type == Type::bf16)
        entropy_gradients<uint16_t>(a, begin, end);
    else
        entropy_gradients<float>(a, begin, end);
}

}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
