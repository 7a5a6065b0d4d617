// The product of a head on threads: fp32 row by row, or integers by integers, which each row of the input becomes first.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "layers/layer.h"

namespace bellbox {

// The nearest of -most..most (ties to even) with the largest magnitude at `most`; returns what one of them is worth.
template <class Integer>
float round_row(const float* x, int64_t k, float most, Integer* out) {
    float largest = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < k; ++i) {
        const float size = std::fabs(x[i]);
        largest = std::max(largest, size);
        finite &= size <= std::numeric_limits<float>::max();
    }
    const bool usable = finite && largest >= 1e-30f;
    const float factor = usable ? most / largest : 0.0f;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, as in exponential.h
    for (int64_t i = 0; i < k; ++i) out[i] = usable ? static_cast<Integer>((x[i] * factor + magic) - magic) : Integer{0};
    return finite ? (usable ? largest / most : 0.0f) : std::numeric_limits<float>::quiet_NaN();
}

inline void run_float_linear(const FloatLinearArgs& a, int threads) {
    share(a.n, useful_threads(a.m * a.n * a.k, kLinearGrain, threads), [&](int64_t begin, int64_t end) { kernels().float_linear(a, begin, end); });
}

// x [m, k]; of `a` all but x and x_scale.
inline void run_int8_linear(const float* x, Int8LinearArgs a, int threads) {
    std::vector<int16_t> integers(static_cast<size_t>(a.m * a.k));
    std::vector<float> x_scale(static_cast<size_t>(a.m));
    for (int64_t row = 0; row < a.m; ++row) x_scale[static_cast<size_t>(row)] = round_row(x + row * a.k, a.k, 2047.0f, integers.data() + row * a.k);
    a.x = integers.data(), a.x_scale = x_scale.data();
    share(a.n, useful_threads(a.m * a.n * a.k, kLinearGrain, threads), [&](int64_t begin, int64_t end) { kernels().int8_linear(a, begin, end); });
}

// Likewise; of `a` all but x, less, sums and x_scale.
inline void run_int4_linear(const float* x, Int4LinearArgs a, int threads) {
    const int64_t chunks = (a.k + 127) / 128, sums_row = (a.k / a.group + 15) / 16 * 16;
    std::vector<int8_t> integers(static_cast<size_t>(a.m * chunks * 128)), row(static_cast<size_t>(a.k));
    std::vector<int16_t> less(static_cast<size_t>(a.m * chunks * 32)), sums(static_cast<size_t>(a.m * sums_row));
    std::vector<float> x_scale(static_cast<size_t>(a.m));
    for (int64_t i = 0; i < a.m; ++i) {
        x_scale[static_cast<size_t>(i)] = round_row(x + i * a.k, a.k, 127.0f, row.data());
        for (int64_t c = 0; c < a.k; ++c) {
            const int64_t place = i * chunks * 128 + c / 128 * 128;
            integers[static_cast<size_t>(place + c % 2 * 64 + c % 128 / 2)] = row[static_cast<size_t>(c)];
            less[static_cast<size_t>((place + c % 128) / 4)] += static_cast<int16_t>(8 * row[static_cast<size_t>(c)]);
            sums[static_cast<size_t>(i * sums_row + c / a.group)] += row[static_cast<size_t>(c)];
        }
    }
    a.x = integers.data(), a.less = less.data(), a.sums = sums.data(), a.x_scale = x_scale.data();
    share(a.n, useful_threads(a.m * a.n * a.k, kLinearGrain, threads), [&](int64_t begin, int64_t end) { kernels().int4_linear(a, begin, end); });
}

}  // namespace bellbox
