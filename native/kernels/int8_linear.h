// Heads of int8 times 12-bit integers, in plain loops; avx2/head.h has its own.
#pragma once

#include <cstring>

#include "kernels/kernels.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {

// Sums of four rows of x with four weights, both one after the other; exact, in any order. Plain loops over plain names,
// which is what a compiler keeps in registers.
inline void int8_sums(const int16_t* x, const int8_t* w, int64_t k, int32_t (*sums)[4]) {
    const int16_t *x0 = x, *x1 = x0 + k, *x2 = x1 + k, *x3 = x2 + k;
    const int8_t *w0 = w, *w1 = w0 + k, *w2 = w1 + k, *w3 = w2 + k;
    int32_t a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
    int32_t c0 = 0, c1 = 0, c2 = 0, c3 = 0, d0 = 0, d1 = 0, d2 = 0, d3 = 0;
    for (int64_t i = 0; i < k; ++i) {
        const int16_t a = w0[i], b = w1[i], c = w2[i], d = w3[i];
        a0 += a * x0[i], a1 += a * x1[i], a2 += a * x2[i], a3 += a * x3[i];
        b0 += b * x0[i], b1 += b * x1[i], b2 += b * x2[i], b3 += b * x3[i];
        c0 += c * x0[i], c1 += c * x1[i], c2 += c * x2[i], c3 += c * x3[i];
        d0 += d * x0[i], d1 += d * x1[i], d2 += d * x2[i], d3 += d * x3[i];
    }
    const int32_t all[4][4] = {{a0, b0, c0, d0}, {a1, b1, c1, d1}, {a2, b2, c2, d2}, {a3, b3, c3, d3}};
    std::memcpy(sums, all, sizeof(all));
}

// Weight rows [begin, end) of out[m, n] = float(sum_k x * weight) * (scale[n] * x_scale[m]); the sum is exact.
inline void int8_linear(const Int8LinearArgs& a, int64_t begin, int64_t end) {
    const auto put = [&](int64_t m, int64_t n, int32_t sum) {
        a.out[m * a.n + n] = static_cast<float>(sum) * (a.scale[n] * a.x_scale[m]);
    };
    for (int64_t n = begin; n < end; n += 4) {
        const int64_t some = end - n < 4 ? end - n : 4;
        int64_t m = 0;
        for (; some == 4 && m + 4 <= a.m; m += 4) {
            int32_t sums[4][4];
            int8_sums(a.x + m * a.k, a.weight + n * a.k, a.k, sums);
            for (int row = 0; row < 4; ++row)
                for (int i = 0; i < 4; ++i) put(m + row, n + i, sums[row][i]);
        }
        for (; m < a.m; ++m)
            for (int64_t i = n; i < n + some; ++i) {
                const int16_t* const x = a.x + m * a.k;
                const int8_t* const weight = a.weight + i * a.k;
                int32_t sum = 0;
                for (int64_t j = 0; j < a.k; ++j) sum += static_cast<int16_t>(weight[j]) * x[j];
                put(m, i, sum);
            }
    }
}

}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
