// Whether two instruction sets multiply alike on this processor: a moment's work, for one that is newer than its tests.
#pragma once

#include <cstring>

#include "kernels/kernels.h"

namespace bellbox {

// A product of each width, with whole and partial tiles in every direction, bit by bit.
inline bool same_products(const Kernels& one, const Kernels& other) {
    constexpr int64_t m = 45, n = 41, k = 590, ldl = 640;  // of 32 rows, 32 outputs and 512 inputs at a time, and a rest
    alignas(64) uint8_t weights[3 * 10 * 128 * 4];
    alignas(64) int8_t levels[m * ldl] = {};
    int32_t sums[m] = {};
    float scale[n], row_scales[m], out[2][m * n];
    uint32_t state = 1;
    const auto random = [&state] { return (state = state * 1664525u + 1013904223u) >> 24; };
    for (uint8_t& byte : weights) byte = static_cast<uint8_t>(random());
    for (float& value : scale) value = static_cast<float>(random()) - 100.0f;
    for (int64_t row = 0; row < m; ++row) {
        row_scales[row] = static_cast<float>(random());
        for (int64_t i = 0; i < k; ++i) {
            levels[row * ldl + i] = static_cast<int8_t>(2 * (random() & 15) - 15);
            sums[row] += levels[row * ldl + i];
        }
    }
    for (int32_t bits = 1; bits <= 4; ++bits) {
        const Weights w{weights, bits, n, k, 2, (1 << bits) - 1, scale, nullptr, nullptr};
        for (float* to : out)
            (to == out[0] ? one : other)
                .linear(LinearArgs{&w, levels, ldl, 16, 2, 15, sums, row_scales, m, 0.37f, to, Type::f32, n}, 0, m, 0, (n + 15) / 16);
        if (memcmp(out[0], out[1], sizeof(out[0])) != 0) return false;
    }
    return true;
}

}  // namespace bellbox
