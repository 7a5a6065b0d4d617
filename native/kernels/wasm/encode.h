// Rows of fp32 to integer levels with WebAssembly's 128-bit vectors.
#pragma once

#include <wasm_simd128.h>

#include "kernels/portable/encode.h"

namespace bellbox {
namespace {
namespace wasm {

// a + b and a - b of neighbours, h apart, within a vector: a - b is a + -b, bit for bit.
inline v128_t neighbours(v128_t x) {
    const v128_t signs = wasm_i32x4_const(0, INT32_MIN, 0, INT32_MIN);
    return wasm_f32x4_add(wasm_i32x4_shuffle(x, x, 0, 0, 2, 2), wasm_v128_xor(wasm_i32x4_shuffle(x, x, 1, 1, 3, 3), signs));
}
inline v128_t halves(v128_t x) {
    const v128_t signs = wasm_i32x4_const(0, 0, INT32_MIN, INT32_MIN);
    return wasm_f32x4_add(wasm_i32x4_shuffle(x, x, 0, 1, 0, 1), wasm_v128_xor(wasm_i32x4_shuffle(x, x, 2, 3, 2, 3), signs));
}

// The stages of portable::butterfly, of whole vectors: block is at least 4.
inline void butterfly(float* x, int64_t k, int64_t block) {
    for (int64_t i = 0; i < k; i += 4) wasm_v128_store(x + i, halves(neighbours(wasm_v128_load(x + i))));
    for (int64_t h = 4; h < block; h *= 2)
        for (int64_t begin = 0; begin < k; begin += 2 * h)
            for (int64_t i = begin; i < begin + h; i += 4) {
                const v128_t a = wasm_v128_load(x + i), b = wasm_v128_load(x + i + h);
                wasm_v128_store(x + i, wasm_f32x4_add(a, b)), wasm_v128_store(x + i + h, wasm_f32x4_sub(a, b));
            }
}

inline double row_norm(const float* x, int64_t k) {
    v128_t low = wasm_f64x2_splat(0), high = low;
    int64_t i = 0;
    for (; i + 4 <= k; i += 4) {
        const v128_t four = wasm_v128_load(x + i);
        const v128_t first = wasm_f64x2_promote_low_f32x4(four), second = wasm_f64x2_promote_low_f32x4(wasm_i64x2_shuffle(four, four, 1, 0));
        low = wasm_f64x2_add(low, wasm_f64x2_mul(first, first)), high = wasm_f64x2_add(high, wasm_f64x2_mul(second, second));
    }
    const v128_t both = wasm_f64x2_add(low, high);
    double sum = wasm_f64x2_extract_lane(both, 0) + wasm_f64x2_extract_lane(both, 1);
    for (; i < k; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    return __builtin_sqrt(sum);
}

// Levels of 16 numbers times r; their sums are added to `sum`, four of them.
inline v128_t levels_of(const float* x, v128_t r, const EncodeArgs& a, v128_t& sum) {
    v128_t numbers[4], codes[4] = {};
    for (int p = 0; p < 4; ++p) numbers[p] = wasm_f32x4_mul(wasm_v128_load(x + 4 * p), r);
    for (int t = 0; t < a.n - 1; ++t) {
        const v128_t threshold = wasm_v128_load32_splat(a.thresholds + t);
        for (int p = 0; p < 4; ++p) codes[p] = wasm_i32x4_sub(codes[p], wasm_f32x4_ge(numbers[p], threshold));
    }
    const v128_t multiplier = wasm_i32x4_splat(a.multiplier), shift = wasm_i32x4_splat(a.shift);
    for (int p = 0; p < 4; ++p) {
        codes[p] = wasm_i32x4_sub(wasm_i32x4_mul(codes[p], multiplier), shift);
        sum = wasm_i32x4_add(sum, codes[p]);
    }
    return wasm_i8x16_narrow_i16x8(wasm_i16x8_narrow_i32x4(codes[0], codes[1]), wasm_i16x8_narrow_i32x4(codes[2], codes[3]));
}

inline void encode(const EncodeArgs& a, int64_t begin, int64_t end) {
    if (a.x_type != Type::f32 || a.block == 2) return portable::encode(a, begin, end);
    const Scratch scratch(a.k);
    for (int64_t i = begin; i < end; ++i) {
        const float* x = static_cast<const float*>(a.x) + i * a.ldx;
        const double sigma = a.r != nullptr                       ? 0
                             : a.normalise == Normalise::absmax ? portable::row_absmax(x, Type::f32, 0, a.k)
                                                                : rms(row_norm(x, a.k), a.k);
        const RowScale scale = row_scale(sigma, a, i);
        a.row_scales[i] = scale.row_scale;
        if (a.block > 1) {
            memcpy(scratch.data, x, static_cast<size_t>(a.k) * sizeof(float));
            butterfly(scratch.data, a.k, a.block);
            x = scratch.data;
        }
        int8_t* const levels = a.levels + i * a.ldl;
        const v128_t r = wasm_f32x4_splat(scale.r);
        v128_t sums = wasm_i32x4_splat(0);
        int64_t j = 0;
        for (; j + 16 <= a.k; j += 16) wasm_v128_store(levels + j, levels_of(x + j, r, a, sums));
        int32_t each[4], sum = 0;
        wasm_v128_store(each, sums);
        for (const int32_t part : each) sum += part;
        for (; j < a.k; ++j) {
            levels[j] = static_cast<int8_t>(a.multiplier * portable::code_of(x[j] * scale.r, a.thresholds, a.n) - a.shift);
            sum += levels[j];
        }
        memset(levels + a.k, 0, static_cast<size_t>(a.ldl - a.k));
        a.sums[i] = sum;
    }
}

}  // namespace wasm
}  // namespace
}  // namespace bellbox
