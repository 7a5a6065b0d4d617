// The product of binarized weights (src/bellbox/ptq) with inputs of up to 8 bits, in plain C++.
//
// A weight is mean + alpha * sign of its group, or mean + alpha * sign + alpha' * second sign in a salient column, with
// seven numbers for each row and block of columns (kernels/kernels.h). So a row's product with a block is these seven times
// seven exact integers, all from sums of the inputs over the columns where a bit is set. Sums of any of a step's four
// inputs are sixteen numbers: made once, looked up for sixteen rows.
//
// Floor: three lookups for four weights.
#pragma once

#include <cstring>

#include "kernels/kernels.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {

// Rounds a row to integers, its largest magnitude to `most`, and puts them into the order of the steps. Returns what one
// is worth; NaN where the row is not finite. `rounded` has room for k + 1.
inline float binarized_input(const Binarized& w, const float* x, float most, int8_t* rounded, int8_t* ordered,
                             int32_t* sums) {
    float largest = 0.0f;
    int32_t finite = 1;
    for (int64_t i = 0; i < w.k; ++i) {
        const float size = __builtin_fabsf(x[i]);
        largest = size > largest ? size : largest;
        finite &= size <= __FLT_MAX__;
    }
    const float scale = (largest < 1e-8f ? 1e-8f : largest) / most;
    for (int64_t i = 0; i < w.k; ++i)
        rounded[i] = finite ? static_cast<int8_t>(__builtin_nearbyintf(x[i] / scale)) : int8_t{0};
    rounded[w.k] = 0;  // what the padding of a block reads
    const int32_t* from = w.order;
    for (int64_t part = 0; part < 2 * w.blocks; ++part) {
        int32_t sum = 0;
        for (int32_t i = 0; i < 4 * w.steps[part]; ++i, ++from, ++ordered) {
            *ordered = rounded[*from];
            sum += *ordered;
        }
        sums[part] = sum;
    }
    return finite ? scale : __builtin_nanf("");
}

}  // namespace BELLBOX_NAMESPACE

namespace portable {

// Exact: a half's bits, moved into a float's place, are 2^-112 of it; that holds for denormals, too.
inline float from_half(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    return half & 0x8000 ? -value : value;
}

// The sum of any of four inputs: bit c of the index takes input c.
struct Subsets {
    int32_t sum[16];
    explicit Subsets(const int8_t* x) : sum{} {
        for (int c = 0; c < 4; ++c)
            for (int i = 0; i < 1 << c; ++i) sum[(1 << c) + i] = sum[i] + x[c];
    }
    void add(uint64_t bits, int32_t* sums) const {
        for (int r = 0; r < 16; ++r) sums[r] += sum[(bits >> (4 * r)) & 15];
    }
};

// Tiles of 16 outputs [begin, end), all rows.
inline void binarized(const BinarizedArgs& a, int64_t begin, int64_t end) {
    const Binarized& w = a.weights;
    for (int64_t tile = begin; tile < end; ++tile)
        for (int64_t row = 0; row < a.m; ++row) {
            const uint64_t* bits = w.bits + 2 * tile * w.total;
            const uint16_t* scales = w.scales + 112 * tile * w.blocks;
            const int8_t* x = a.x + 4 * row * w.total;
            const int32_t* sums = a.sums + 2 * row * w.blocks;
            float acc[16] = {};
            for (int64_t b = 0; b < w.blocks; ++b, sums += 2) {
                int32_t first[16] = {}, second[16] = {}, signs[16] = {}, large[16] = {}, both[16] = {};
                for (int32_t i = 0; i < w.steps[2 * b]; ++i, bits += 2, x += 4) {
                    const Subsets of(x);
                    of.add(bits[0], first), of.add(bits[1], second);
                }
                for (int32_t i = 0; i < w.steps[2 * b + 1]; ++i, bits += 2, x += 4) {
                    const Subsets of(x);
                    of.add(bits[0], signs), of.add(bits[1], large), of.add(bits[0] & bits[1], both);
                }
                for (int r = 0; r < 16; ++r) {
                    const int32_t in_large = 2 * both[r] - large[r];
                    const int32_t counts[7] = {sums[1] - large[r], 2 * signs[r] - sums[1] - in_large,
                                               large[r],           in_large,
                                               sums[0],            2 * first[r] - sums[0],
                                               2 * second[r] - sums[0]};
                    for (int i = 0; i < 7; ++i)
                        acc[r] += from_half(scales[16 * i + r]) * static_cast<float>(counts[i]);
                }
                scales += 112;
            }
            const int64_t left = w.n - 16 * tile, width = left < 16 ? left : 16;
            for (int64_t r = 0; r < width; ++r) {
                const float y = acc[r] * a.x_scale[row];
                a.out[row * w.n + 16 * tile + r] = w.bias != nullptr ? y + w.bias[16 * tile + r] : y;
            }
        }
}

}  // namespace portable
}  // namespace
}  // namespace bellbox
