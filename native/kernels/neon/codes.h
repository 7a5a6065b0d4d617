// Values to codes with NEON.
//
// Binary search: one comparison a bit. From the third bit on, the threshold to compare with is looked up by its bytes; 15
// operations for 16 levels instead of 30 by counting, and exact for any sorted thresholds.
#pragma once

#include <arm_neon.h>

#include "kernels/neon/rows.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {
namespace rows {

// Sixteen integers, of which the lowest byte.
BELLBOX_INLINE int8x16_t joined_bytes(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d) {
    const int16x8_t low = vuzp1q_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b));
    const int16x8_t high = vuzp1q_s16(vreinterpretq_s16_s32(c), vreinterpretq_s16_s32(d));
    return vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high));
}

// Binary search of BITS comparisons. A comparison gives 0 or -1, so what is kept is minus the code so far. Thresholds that
// are missing are NaN, which no value reaches.
template <int BITS>
struct Search {
    float32x4_t first, lower, upper, third, fourth[2];
    int8x16_t level;  // by the code

    Search(const float* thresholds, int n, int multiplier, int shift) {
        float t[16], table[8];
        for (int j = 0; j < 16; ++j) t[j] = j < n - 1 ? thresholds[j] : __builtin_nanf("");
        // After b bits with the value c, the next comparison is with the middle of what is left.
        const auto middle = [&](int b, int c) { return t[(2 * c + 1) * (1 << BITS) / (2 << b) - 1]; };
        first = vdupq_n_f32(middle(0, 0));
        lower = upper = third = fourth[0] = fourth[1] = first;
        if constexpr (BITS > 1) lower = vdupq_n_f32(middle(1, 0)), upper = vdupq_n_f32(middle(1, 1));
        if constexpr (BITS > 2) {
            for (int c = 0; c < 4; ++c) table[c] = middle(2, c);
            third = vld1q_f32(table);
        }
        if constexpr (BITS > 3) {
            for (int c = 0; c < 8; ++c) table[c] = middle(3, c);
            fourth[0] = vld1q_f32(table), fourth[1] = vld1q_f32(table + 4);
        }
        int8_t bytes[16];
        for (int c = 0; c < 16; ++c) bytes[c] = static_cast<int8_t>(multiplier * c - shift);
        level = vld1q_s8(bytes);
    }

    BELLBOX_INLINE static int32x4_t reached(float32x4_t v, float32x4_t t) { return vreinterpretq_s32_u32(vcgeq_f32(v, t)); }
    BELLBOX_INLINE static int32x4_t append(int32x4_t bits, int32x4_t next) { return vaddq_s32(vaddq_s32(bits, bits), next); }
    // Which bytes hold number -bits of a table of fp32.
    BELLBOX_INLINE static uint8x16_t place(int32x4_t bits) {
        return vreinterpretq_u8_s32(vmlsq_s32(vdupq_n_s32(0x03020100), bits, vdupq_n_s32(0x04040404)));
    }

    BELLBOX_INLINE int32x4_t minus_code(float32x4_t v) const {
        int32x4_t bits = reached(v, first);
        if constexpr (BITS > 1) bits = append(bits, reached(v, vbslq_f32(vreinterpretq_u32_s32(bits), upper, lower)));
        if constexpr (BITS > 2)
            bits = append(bits, reached(v, vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(third), place(bits)))));
        if constexpr (BITS > 3) {
            const uint8x16x2_t table = {{vreinterpretq_u8_f32(fourth[0]), vreinterpretq_u8_f32(fourth[1])}};
            bits = append(bits, reached(v, vreinterpretq_f32_u8(vqtbl2q_u8(table, place(bits)))));
        }
        return bits;
    }

    // The codes of 16 values, as bytes.
    BELLBOX_INLINE uint8x16_t codes(const float32x4_t (&v)[4]) const {
        const int8x16_t bytes = joined_bytes(minus_code(v[0]), minus_code(v[1]), minus_code(v[2]), minus_code(v[3]));
        return vreinterpretq_u8_s8(vnegq_s8(bytes));
    }
    BELLBOX_INLINE int8x16_t levels(const float32x4_t (&v)[4]) const { return vqtbl1q_s8(level, codes(v)); }
};

template <typename F>
BELLBOX_INLINE void with_coder(const float* thresholds, int n, int multiplier, int shift, const F& f) {
    if (n <= 2) return f(Search<1>(thresholds, n, multiplier, shift));
    if (n <= 4) return f(Search<2>(thresholds, n, multiplier, shift));
    if (n <= 8) return f(Search<3>(thresholds, n, multiplier, shift));
    f(Search<4>(thresholds, n, multiplier, shift));
}

}  // namespace rows
}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
