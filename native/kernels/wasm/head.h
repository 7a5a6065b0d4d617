// Heads of int8 and of 4 bits with WebAssembly's 128-bit vectors; sums are exact, in any order.
#pragma once

#include <wasm_simd128.h>

#include "kernels/inline.h"
#include "kernels/kernels.h"

namespace bellbox {
namespace {
namespace wasm {

inline int32_t total(v128_t sums) {
    const v128_t two = wasm_i32x4_add(sums, wasm_i64x2_shuffle(sums, sums, 1, 0));
    return wasm_i32x4_extract_lane(two, 0) + wasm_i32x4_extract_lane(two, 1);
}

// Of one row with COUNT weights, which lie one after the other.
template <int COUNT>
inline void int8_sums(const int16_t* x, const int8_t* w, int64_t k, int32_t* out) {
    v128_t sums[COUNT] = {};
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) {
        const v128_t first = wasm_v128_load(x + i), second = wasm_v128_load(x + i + 8);
        for (int n = 0; n < COUNT; ++n) {
            const v128_t bytes = wasm_v128_load(w + n * k + i);
            sums[n] = wasm_i32x4_add(sums[n], wasm_i32x4_dot_i16x8(wasm_i16x8_extend_low_i8x16(bytes), first));
            sums[n] = wasm_i32x4_add(sums[n], wasm_i32x4_dot_i16x8(wasm_i16x8_extend_high_i8x16(bytes), second));
        }
    }
    for (int n = 0; n < COUNT; ++n) {
        out[n] = total(sums[n]);
        for (int64_t j = i; j < k; ++j) out[n] += w[n * k + j] * x[j];
    }
}

// As native/kernels/int8_linear.h says.
inline void int8_linear(const Int8LinearArgs& a, int64_t begin, int64_t end) {
    for (int64_t m = 0; m < a.m; ++m) {
        const int16_t* const x = a.x + m * a.k;
        int32_t sums[4];
        const auto put = [&](int64_t n, int count) {
            for (int i = 0; i < count; ++i) a.out[m * a.n + n + i] = static_cast<float>(sums[i]) * (a.scale[n + i] * a.x_scale[m]);
        };
        int64_t n = begin;
        for (; n + 4 <= end; n += 4) int8_sums<4>(x, a.weight + n * a.k, a.k, sums), put(n, 4);
        for (; n < end; ++n) int8_sums<1>(x, a.weight + n * a.k, a.k, sums), put(n, 1);
    }
}

// Sums of 16 bytes of weights with the even and the odd columns' inputs, 8 of 16 bits: at most 4 x 8 x 127.
BELLBOX_INLINE v128_t int4_products(const uint8_t* weight, const int8_t* even, const int8_t* odd) {
    const v128_t bytes = wasm_v128_load(weight), eight = wasm_i8x16_splat(8);
    const v128_t low = wasm_i8x16_sub(wasm_v128_and(bytes, wasm_i8x16_splat(15)), eight), high = wasm_i8x16_sub(wasm_u8x16_shr(bytes, 4), eight);
    const v128_t first = wasm_v128_load(even), second = wasm_v128_load(odd);
    const v128_t some = wasm_i16x8_add(wasm_i16x8_extmul_low_i8x16(low, first), wasm_i16x8_extmul_high_i8x16(low, first));
    const v128_t others = wasm_i16x8_add(wasm_i16x8_extmul_low_i8x16(high, second), wasm_i16x8_extmul_high_i8x16(high, second));
    return wasm_i16x8_add(some, others);
}

// As native/kernels/portable/head.h says.
inline void int4_linear(const Int4LinearArgs& a, int64_t begin, int64_t end) {
    const int64_t chunks = (a.k + 127) / 128;
    for (int64_t n = begin; n < end; ++n) {
        const uint8_t* const weight = a.weight + n * (a.k / 2);
        const uint8_t* const multipliers = a.multipliers + n * (a.k / a.group);
        for (int64_t m = 0; m < a.m; ++m) {
            const int8_t* const x = a.x + m * chunks * 128;
            v128_t sums = wasm_i32x4_splat(0);
            for (int64_t column = 0; column < a.k; column += a.group) {
                const int8_t* const even = x + column / 128 * 128 + column / 2 % 64;  // bytes of a group lie in one chunk
                v128_t group = int4_products(weight + column / 2, even, even + 64);
                if (a.group == 64) group = wasm_i16x8_add(group, int4_products(weight + column / 2 + 16, even + 16, even + 80));
                sums = wasm_i32x4_add(sums, wasm_i32x4_dot_i16x8(group, wasm_i16x8_splat(multipliers[column / a.group])));
            }
            a.out[m * a.n + n] = static_cast<float>(total(sums)) * (a.scale[n] * a.x_scale[m]);
        }
    }
}

}  // namespace wasm
}  // namespace
}  // namespace bellbox
