// Heads with NEON: 4 bits by groups of columns, and int8 times 12-bit integers.
//
// Codes of 4 bits stay unsigned; 8 times the sums of the input are taken off at the end. With SDOT a 12-bit input is
// 128 * high + low, both int8, so that a product is two of SDOT.
// Floor: decode reads the weights once, about one operation for two bytes of 4 bits.
#pragma once

#include <arm_neon.h>

#include "kernels/inline.h"
#include "kernels/portable/encode.h"
#ifndef __ARM_FEATURE_DOTPROD
#include "kernels/int8_linear.h"
#endif

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {
namespace head {

constexpr int64_t kAhead = 1024;  // bytes of each row of the weight that are fetched ahead of use

// What the lanes of sixteen (32 for `add_group`) products are worth together.
#ifdef __ARM_FEATURE_DOTPROD
struct Group {
    int32x4_t of = vdupq_n_s32(0);
    BELLBOX_INLINE void add(int8x16_t even, int8x16_t odd, int8x16_t x, int8x16_t y) {
        of = vdotq_s32(vdotq_s32(of, even, x), odd, y);
    }
    BELLBOX_INLINE int32x4_t total() const { return of; }
};
#else
struct Group {
    int16x8_t of[2] = {vdupq_n_s16(0), vdupq_n_s16(0)};  // of 64 columns at most 4 * 15 * 127
    BELLBOX_INLINE void add(int8x16_t even, int8x16_t odd, int8x16_t x, int8x16_t y) {
        of[0] = vmlal_s8(vmlal_s8(of[0], vget_low_s8(even), vget_low_s8(x)), vget_low_s8(odd), vget_low_s8(y));
        of[1] = vmlal_high_s8(vmlal_high_s8(of[1], even, x), odd, y);
    }
    BELLBOX_INLINE int32x4_t total() const { return vpadalq_s16(vpaddlq_s16(of[0]), of[1]); }
};
#endif

// The sum over groups of multiplier * sum of the input, modulo 2^32 like all sums here.
inline int32_t less_of(const uint8_t* multipliers, const int16_t* sums, int64_t groups) {
    int32x4_t total = vdupq_n_s32(0);
    int64_t g = 0;
    for (; g + 8 <= groups; g += 8) {
        const int16x8_t many = vreinterpretq_s16_u16(vmovl_u8(vld1_u8(multipliers + g))), sum = vld1q_s16(sums + g);
        total = vmlal_high_s16(vmlal_s16(total, vget_low_s16(many), vget_low_s16(sum)), many, sum);
    }
    int32_t less = vaddvq_s32(total);
    for (; g < groups; ++g) less += multipliers[g] * sums[g];
    return less;
}

// Rows n to n + kWeights - 1 of the weight times rows m to m + kRows - 1 of the input.
template <int kGroup, int kWeights, int kRows>
inline void rows(const Int4LinearArgs& a, int64_t n, int64_t m) {
    const int64_t bytes = a.k / 2, groups = a.k / kGroup, x_row = (bytes + 63) / 64 * 128, sums_row = (groups + 15) / 16 * 16;
    const uint8_t *const weight = a.weight + n * bytes, *const multipliers = a.multipliers + n * groups;
    const int8_t* const x = a.x + m * x_row;
    int32x4_t total[kWeights][kRows];
    BELLBOX_UNROLL
    for (int i = 0; i < kWeights; ++i) {
        BELLBOX_UNROLL
        for (int j = 0; j < kRows; ++j) total[i][j] = vdupq_n_s32(0);
    }
    for (int64_t g = 0; g < groups; ++g) {
        Group sum[kWeights][kRows];
        BELLBOX_UNROLL
        for (int part = 0; part < kGroup / 32; ++part) {
            const int64_t at = g * (kGroup / 2) + 16 * part;
            const int8_t* const first = x + at / 64 * 128 + at % 64;
            BELLBOX_UNROLL
            for (int i = 0; i < kWeights; ++i) {
                if (kWeights > 1) __builtin_prefetch(weight + i * bytes + at + kAhead);
                const uint8x16_t codes = vld1q_u8(weight + i * bytes + at);
                const int8x16_t even = vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8(15)));
                const int8x16_t odd = vreinterpretq_s8_u8(vshrq_n_u8(codes, 4));
                BELLBOX_UNROLL
                for (int j = 0; j < kRows; ++j)
                    sum[i][j].add(even, odd, vld1q_s8(first + j * x_row), vld1q_s8(first + j * x_row + 64));
            }
        }
        BELLBOX_UNROLL
        for (int i = 0; i < kWeights; ++i) {
            BELLBOX_UNROLL
            for (int j = 0; j < kRows; ++j) total[i][j] = vmlaq_n_s32(total[i][j], sum[i][j].total(), multipliers[i * groups + g]);
        }
    }
    BELLBOX_UNROLL
    for (int i = 0; i < kWeights; ++i) {
        BELLBOX_UNROLL
        for (int j = 0; j < kRows; ++j) {
            const uint32_t less = 8u * static_cast<uint32_t>(less_of(multipliers + i * groups, a.sums + (m + j) * sums_row, groups));
            const int32_t exact = static_cast<int32_t>(static_cast<uint32_t>(vaddvq_s32(total[i][j])) - less);
            a.out[(m + j) * a.n + n + i] = static_cast<float>(exact) * (a.scale[n + i] * a.x_scale[m + j]);
        }
    }
}

// Sixteen rows of the weight at a time, so that some of the input are used again while they are near.
template <int kGroup>
inline void product(const Int4LinearArgs& a, int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += 16) {
        const int64_t last = first + 16 < end ? first + 16 : end;
        int64_t m = 0;
        for (; m + 4 <= a.m; m += 4) {
            int64_t n = first;
            for (; n + 2 <= last; n += 2) rows<kGroup, 2, 4>(a, n, m);
            for (; n < last; ++n) rows<kGroup, 1, 4>(a, n, m);
        }
        for (; m < a.m; ++m) {
            int64_t n = first;
            for (; n + 4 <= last; n += 4) rows<kGroup, 4, 1>(a, n, m);
            for (; n < last; ++n) rows<kGroup, 1, 1>(a, n, m);
        }
    }
}

#ifdef __ARM_FEATURE_DOTPROD
// A row of 12-bit integers as 128 * high + low, 16 bytes of one, then of the other.
inline void split(const int16_t* x, int64_t k, int8_t* out) {
    for (int64_t i = 0; i < k; ++i) {
        const int high = (x[i] + 64) >> 7;
        out[i / 16 * 32 + i % 16] = static_cast<int8_t>(x[i] - 128 * high);
        out[i / 16 * 32 + 16 + i % 16] = static_cast<int8_t>(high);
    }
}

template <int kWeights, int kRows>
inline void rows_of_bytes(const Int8LinearArgs& a, const int8_t* parts, int64_t n, int64_t m) {
    const int64_t whole = a.k / 16 * 16, row = (a.k + 15) / 16 * 32;
    const int8_t* const weight = a.weight + n * a.k;
    int32x4_t low[kWeights][kRows], high[kWeights][kRows];
    BELLBOX_UNROLL
    for (int i = 0; i < kWeights; ++i) {
        BELLBOX_UNROLL
        for (int j = 0; j < kRows; ++j) low[i][j] = high[i][j] = vdupq_n_s32(0);
    }
    for (int64_t at = 0; at < whole; at += 16) {
        BELLBOX_UNROLL
        for (int i = 0; i < kWeights; ++i) {
            __builtin_prefetch(weight + i * a.k + at + kAhead);
            const int8x16_t w = vld1q_s8(weight + i * a.k + at);
            BELLBOX_UNROLL
            for (int j = 0; j < kRows; ++j) {
                const int8_t* const own = parts + (m + j) * row + 2 * at;
                low[i][j] = vdotq_s32(low[i][j], w, vld1q_s8(own)), high[i][j] = vdotq_s32(high[i][j], w, vld1q_s8(own + 16));
            }
        }
    }
    BELLBOX_UNROLL
    for (int i = 0; i < kWeights; ++i) {
        BELLBOX_UNROLL
        for (int j = 0; j < kRows; ++j) {
            int32_t sum = vaddvq_s32(vaddq_s32(vshlq_n_s32(high[i][j], 7), low[i][j]));
            for (int64_t c = whole; c < a.k; ++c) sum += weight[i * a.k + c] * a.x[(m + j) * a.k + c];
            a.out[(m + j) * a.n + n + i] = static_cast<float>(sum) * (a.scale[n + i] * a.x_scale[m + j]);
        }
    }
}
#endif

}  // namespace head

inline void int4_linear(const Int4LinearArgs& a, int64_t begin, int64_t end) {
    a.group == 64 ? head::product<64>(a, begin, end) : head::product<32>(a, begin, end);
}

#ifdef __ARM_FEATURE_DOTPROD
inline void int8_linear(const Int8LinearArgs& a, int64_t begin, int64_t end) {
    const int64_t row = (a.k + 15) / 16 * 32;
    const Scratch scratch((a.m * row + 3) / 4);
    int8_t* const parts = reinterpret_cast<int8_t*>(scratch.data);
    for (int64_t m = 0; m < a.m; ++m) head::split(a.x + m * a.k, a.k, parts + m * row);
    int64_t n = begin;
    for (; n + 4 <= end; n += 4) {
        int64_t m = 0;
        for (; m + 2 <= a.m; m += 2) head::rows_of_bytes<4, 2>(a, parts, n, m);
        for (; m < a.m; ++m) head::rows_of_bytes<4, 1>(a, parts, n, m);
    }
    for (; n < end; ++n)
        for (int64_t m = 0; m < a.m; ++m) head::rows_of_bytes<1, 1>(a, parts, n, m);
}
#endif

}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
