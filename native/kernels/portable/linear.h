// The integer product in plain C++.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/portable/encode.h"

namespace bellbox {
namespace {  // each instruction set keeps its own copy: a shared inline function could be any of them

// acc is the sum over k of levels * unsigned code; what the zero point adds follows from the sum of the levels.
inline float epilogue(int32_t acc, const LinearArgs& a, int64_t row, int64_t column) {
    const Weights& w = *a.weights;
    const int32_t exact = w.multiplier * acc - w.shift * a.sums[row];
    const float y = static_cast<float>(exact) * (w.scale[column] * a.act_scale) * a.row_scales[row];
    return w.bias != nullptr ? y + w.bias[column] : y;
}

namespace portable {

// One block of 16 rows and 64 columns to bytes: group g of 4 columns at out + 64 * g.
inline void unpack_block(const uint8_t* block, int bits, uint8_t* out) {
    const int low = bits == 3 ? 2 : bits, vectors = 2 * low, fields = 8 / low;
    const uint8_t mask = static_cast<uint8_t>((1u << low) - 1);
    for (int f = 0; f < fields; ++f)
        for (int i = 0; i < 64 * vectors; ++i)
            out[64 * vectors * f + i] = static_cast<uint8_t>((block[i] >> (f * low)) & mask);
    if (bits == 3)
        for (int f = 0; f < 8; ++f)
            for (int i = 0; i < 128; ++i)
                out[128 * f + i] = static_cast<uint8_t>(out[128 * f + i] | (((block[256 + i] >> f) & 1) << 2));
}

inline void linear(const LinearArgs& a, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end) {
    const Weights& w = *a.weights;
    const int64_t blocks = (w.k + 63) / 64, columns = blocks * 64;
    std::vector<uint8_t> tile(static_cast<size_t>(16 * columns));
    for (int64_t t = tile_begin; t < tile_end; ++t) {
        for (int64_t b = 0; b < blocks; ++b)
            unpack_block(w.data + (t * blocks + b) * 128 * w.bits, w.bits, tile.data() + 1024 * b);
        const int64_t width = std::min<int64_t>(16, w.n - 16 * t);
        for (int64_t i = m_begin; i < m_end; ++i) {
            int32_t acc[16] = {};
            const int8_t* levels = a.levels + i * a.ldl;
            for (int64_t g = 0; g < columns / 4; ++g)
                for (int r = 0; r < 16; ++r)
                    for (int c = 0; c < 4; ++c) acc[r] += levels[4 * g + c] * tile[static_cast<size_t>(64 * g + 4 * r + c)];
            for (int64_t r = 0; r < width; ++r)
                store(a.out, a.out_type, i * a.ldo + 16 * t + r, epilogue(acc[r], a, i, 16 * t + r));
        }
    }
}

}  // namespace portable
}  // namespace
}  // namespace bellbox
