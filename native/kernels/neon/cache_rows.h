// Rows of a KV cache, sixteen numbers in four registers at a time: the lanes of kernels/cache_rows.h.
#pragma once

#include <arm_neon.h>

#include "kernels/cache_rows.h"
#include "kernels/neon/rows.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {

using rows::Quad;

// Sixteen numbers of a row: as they lie; int8; of 4 bits the low or the high halves of sixteen bytes.
enum class Part { number, whole, low, high };

template <Part part>
BELLBOX_INLINE Quad values_of(const char* from) {
    if constexpr (part == Part::number) {
        return rows::load16<Type::f32>(from);
    } else {
        int8x16_t codes = vld1q_s8(reinterpret_cast<const int8_t*>(from));
        if (part != Part::whole) {
            const uint8x16_t bytes = vreinterpretq_u8_s8(codes);
            const uint8x16_t nibbles = part == Part::high ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15));
            codes = vsubq_s8(vreinterpretq_s8_u8(nibbles), vdupq_n_s8(8));
        }
        const int16x8_t low = vmovl_s8(vget_low_s8(codes)), high = vmovl_high_s8(codes);
        return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
                 vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))}};
    }
}

// Bytes of sixteen numbers.
template <Part part>
constexpr int64_t kStep = part == Part::number ? 64 : 16;

BELLBOX_INLINE Quad zeros() { return {{vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)}}; }

BELLBOX_INLINE Quad plus(Quad a, Quad b) {
    BELLBOX_UNROLL
    for (int i = 0; i < 4; ++i) a.of[i] = vaddq_f32(a.of[i], b.of[i]);
    return a;
}

BELLBOX_INLINE Quad times(Quad a, Quad b) {
    BELLBOX_UNROLL
    for (int i = 0; i < 4; ++i) a.of[i] = vmulq_f32(a.of[i], b.of[i]);
    return a;
}

BELLBOX_INLINE Quad weighted(float weight, Quad v) {
    BELLBOX_UNROLL
    for (int i = 0; i < 4; ++i) v.of[i] = vmulq_n_f32(v.of[i], weight);
    return v;
}

// Sums of each of four vectors in the order of sum_lanes: halves, quarters, pairs.
BELLBOX_INLINE float32x4_t sums_of(const Quad (&lanes)[4]) {
    float32x4_t four[4];
    BELLBOX_UNROLL
    for (int r = 0; r < 4; ++r) {
        const float32x4_t* const x = lanes[r].of;
        four[r] = vaddq_f32(vaddq_f32(x[0], x[2]), vaddq_f32(x[1], x[3]));
    }
    const auto pairs = BELLBOX_STEP(float32x4_t a, float32x4_t b) {
        return vaddq_f32(rows::joined(a, b, false), rows::joined(a, b, true));
    };
    return vpaddq_f32(pairs(four[0], four[1]), pairs(four[2], four[3]));
}

// lanes[r] += query * row r, of numbers [0, n) of `count` rows that are `row` bytes apart.
template <Part part, int count>
BELLBOX_INLINE void add_products(Quad (&lanes)[4], const float* query, const char* codes, int64_t row, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes, codes += kStep<part>) {
        const Quad q = rows::load16<Type::f32>(query + i);
        BELLBOX_UNROLL
        for (int r = 0; r < count; ++r) lanes[r] = plus(lanes[r], times(q, values_of<part>(codes + r * row)));
    }
}

// Scores of `rows` rows with the query; first all low halves, so that lanes add in the order of the head.
template <Part part, int count>
BELLBOX_INLINE float32x4_t score(const float* query, const char* codes, int64_t row, int64_t d) {
    Quad lanes[4] = {zeros(), zeros(), zeros(), zeros()};
    if constexpr (part == Part::low) {
        add_products<Part::low, count>(lanes, query, codes, row, d / 2);
        add_products<Part::high, count>(lanes, query + d / 2, codes, row, d / 2);
    } else {
        add_products<part, count>(lanes, query, codes, row, d);
    }
    return sums_of(lanes);
}

template <Part part>
inline void score_codes(const float* query, const void* codes, int64_t count, int64_t row, int64_t d, float scale, float* out) {
    const char* from = static_cast<const char*>(codes);
    int64_t s = 0;
    for (; s + 4 <= count; s += 4, from += 4 * row) vst1q_f32(out + s, vmulq_n_f32(score<part, 4>(query, from, row, d), scale));
    for (; s < count; ++s, from += row) {
        const float32x4_t sum = score<part, 1>(query, from, row, d);
        out[s] = vgetq_lane_f32(sum, 0) * scale;
    }
}

inline void score_rows(const float* query, const float* codes, int64_t count, int64_t d, float scale, float* decoded, float* out) {
    if (d % kLanes != 0) return score_rows<float>(query, codes, count, d, scale, decoded, out);
    score_codes<Part::number>(query, codes, count, 4 * d, d, scale, out);
}

inline void score_rows(const float* query, const int8_t* codes, int64_t count, int64_t d, float scale, float* decoded, float* out) {
    if (d % kLanes != 0) return score_rows<int8_t>(query, codes, count, d, scale, decoded, out);
    score_codes<Part::whole>(query, codes, count, d, d, scale, out);
}

inline void score_rows(const float* query, const uint8_t* codes, int64_t count, int64_t d, float scale, float* decoded, float* out) {
    if (d % (2 * kLanes) != 0) return score_rows<uint8_t>(query, codes, count, d, scale, decoded, out);
    score_codes<Part::low>(query, codes, count, d / 2, d, scale, out);
}

// out [n] += the sum of weights[s] * row s, four rows at a time; rows are `row` bytes apart.
template <Part part>
inline void add_codes(const float* weights, const void* codes, int64_t count, int64_t row, int64_t n, float* out) {
    const char* column = static_cast<const char*>(codes);
    for (int64_t i = 0; i < n; i += kLanes, column += kStep<part>) {
        Quad total = rows::load16<Type::f32>(out + i);
        const char* from = column;
        const auto own = BELLBOX_STEP(int64_t s, int64_t r) { return weighted(weights[s + r], values_of<part>(from + r * row)); };
        int64_t s = 0;
        for (; s + 4 <= count; s += 4, from += 4 * row)
            total = plus(total, plus(plus(own(s, 0), own(s, 1)), plus(own(s, 2), own(s, 3))));
        for (; s < count; ++s, from += row) total = plus(total, own(s, 0));
        BELLBOX_UNROLL
        for (int q = 0; q < 4; ++q) vst1q_f32(out + i + 4 * q, total.of[q]);
    }
}

inline void add_rows(const float* weights, const int8_t* codes, int64_t count, int64_t d, float* decoded, float* out) {
    if (d % kLanes != 0) return add_rows<int8_t>(weights, codes, count, d, decoded, out);
    add_codes<Part::whole>(weights, codes, count, d, d, out);
}

inline void add_rows(const float* weights, const uint8_t* codes, int64_t count, int64_t d, float* decoded, float* out) {
    if (d % (2 * kLanes) != 0) return add_rows<uint8_t>(weights, codes, count, d, decoded, out);
    add_codes<Part::low>(weights, codes, count, d / 2, d / 2, out);
    add_codes<Part::high>(weights, codes, count, d / 2, d / 2, out + d / 2);
}

}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
