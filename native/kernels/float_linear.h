// An fp32 product whose rows are each summed by itself: the lanes of `dot`, in registers for some rows and weights at once.
#pragma once

#include <cstring>

#include "kernels/cache_rows.h"
#include "kernels/kernels.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {

// Lanes as wide as a register, of which some make kLanes: a compiler keeps wider ones in memory.
#if defined(__AVX512F__)
constexpr int kPart = 16;
#elif defined(__AVX__)
constexpr int kPart = 8;
#else
constexpr int kPart = 4;
#endif
constexpr int kParts = kLanes / kPart;
typedef float Lanes __attribute__((vector_size(kPart * sizeof(float))));

inline Lanes load_lanes(const float* from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof(lanes));
    return lanes;
}

// Lane l is lane l + kBy of x, around.
template <int kBy>
inline Lanes rolled(Lanes x) {
#if defined(__clang__)
    float from[kPart], to[kPart];
    std::memcpy(from, &x, sizeof(x));
    for (int l = 0; l < kPart; ++l) to[l] = from[(l + kBy) % kPart];
    return load_lanes(to);
#else
    typedef int32_t Order __attribute__((vector_size(kPart * sizeof(int32_t))));
    Order order;
    for (int l = 0; l < kPart; ++l) order[l] = (l + kBy) % kPart;
    return __builtin_shuffle(x, order);
#endif
}

// The additions of sum_lanes, without leaving the registers.
inline float sum_parts(const Lanes* parts) {
    Lanes x = parts[0];
    if constexpr (kPart == 16) x += rolled<8 % kPart>(x);
    if constexpr (kPart == 8) x += parts[kParts - 1];
    if constexpr (kPart == 4) x = (x + parts[2 % kParts]) + (parts[1 % kParts] + parts[3 % kParts]);
    if constexpr (kPart > 4) x += rolled<4 % kPart>(x);
    x += rolled<2>(x);
    x += rolled<1>(x);
    return x[0];
}

// Products of kWeights weight rows with kRows rows of x, both one after the other. out[row, weight], `stride` a row.
template <int kRows, int kWeights>
inline void float_rows(const float* x, const float* weights, int64_t k, int64_t stride, float* out) {
    Lanes sums[kRows][kWeights][kParts] = {};
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes)
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            Lanes w[kWeights];
#pragma GCC unroll 4
            for (int n = 0; n < kWeights; ++n) w[n] = load_lanes(weights + n * k + i + part * kPart);
#pragma GCC unroll 4
            for (int row = 0; row < kRows; ++row) {
                const Lanes each = load_lanes(x + row * k + i + part * kPart);
#pragma GCC unroll 4
                for (int n = 0; n < kWeights; ++n) sums[row][n][part] += each * w[n];
            }
        }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
        for (int n = 0; n < kWeights; ++n) {
            if (i < k) {
                float lanes[kLanes];
                std::memcpy(lanes, sums[row][n], sizeof(lanes));
                for (int l = 0; i + l < k; ++l) lanes[l] += x[row * k + i + l] * weights[n * k + i + l];
                std::memcpy(sums[row][n], lanes, sizeof(lanes));
            }
            out[row * stride + n] = sum_parts(sums[row][n]);
        }
}

// Weight rows [begin, end) of out[m, n] = dot(x[m], weight[n]); four weights for all rows of x, in the first cache.
inline void float_linear(const FloatLinearArgs& a, int64_t begin, int64_t end) {
#if defined(__aarch64__)
    constexpr int kFour = 2;  // 16 sums, of 32 registers
#else
    constexpr int kFour = 4;
#endif
    int64_t n = begin;
    for (; n + kFour <= end; n += kFour) {
        const float* const weights = a.weight + n * a.k;
        int64_t m = 0;
        for (; m + kFour <= a.m; m += kFour) float_rows<kFour, kFour>(a.x + m * a.k, weights, a.k, a.n, a.out + m * a.n + n);
        for (; m < a.m; ++m) float_rows<1, kFour>(a.x + m * a.k, weights, a.k, a.n, a.out + m * a.n + n);
    }
    for (; n < end; ++n)
        for (int64_t m = 0; m < a.m; ++m) float_rows<1, 1>(a.x + m * a.k, a.weight + n * a.k, a.k, a.n, a.out + m * a.n + n);
}

}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
