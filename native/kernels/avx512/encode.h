// Quantizing rows with AVX-512.
//
// Floor: 15, 18 and 19 vector operations for 16 columns at 1, 2 and more bits (11 of the butterfly of 128, a product, a
// check, 2 to 6 of the coder), two a cycle on Zen 4: 7.6, 9.1 and 9.6 cycles; 8.9, 10.6 and 12.5 reached. Where each row
// has its own statistic, 3 cycles more for sums of squares in fp64; the row is then read twice, the second time from L1.
#pragma once

#include <immintrin.h>

#include "kernels/avx512/codes.h"

namespace bellbox {
namespace {
namespace avx512 {
namespace rows {

// Sums over a row while its levels are made.
struct Sums {
    __m512i levels[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
};

// The levels of one row up to the multiple of 64 that covers it; returns their sum. CHECK: `squares` becomes the fp32
// sum of squares of x, which is not a finite number where an entry is not.
template <Type T, bool CHECK, typename Coder>
BELLBOX_INLINE int32_t encode_row(const Coder& coder, const Signs& signs, const void* x, float* scratch, int64_t k,
                                  int64_t block, float r, int8_t* levels, float& squares) {
    const __m512 factor = _mm512_set1_ps(r);
    Sums sums;
    const auto load = BELLBOX_STEP(int64_t i, __m512 (&v)[kRegisters]) {
        load_chunk<T>(x, i, k, v);
        BELLBOX_UNROLL
        for (int j = 0; CHECK && j < kRegisters; ++j)
            sums.squares[j & 1] = _mm512_fmadd_ps(v[j], v[j], sums.squares[j & 1]);
    };
    const auto use = BELLBOX_STEP(int64_t i, const __m512 (&v)[kRegisters], int half) {
        __m512 u[4];
        BELLBOX_UNROLL
        for (int j = 0; j < 4; ++j) u[j] = _mm512_mul_ps(v[4 * half + j], factor);
        __m512i out = coder.template levels<T>(u[0], u[1], u[2], u[3]);
        const int64_t at = i + 64 * half, left = k - at;
        if (left < 64) out = _mm512_maskz_mov_epi8(low_bits(left), out);
        sums.levels[half] = _mm512_dpbusd_epi32(sums.levels[half], _mm512_set1_epi8(1), out);
        if (left > 0) _mm512_storeu_si512(levels + at, out);
    };
    rotate_row<T>(k, block, scratch, signs, load, use);
    if (CHECK) squares = _mm512_reduce_add_ps(_mm512_add_ps(sums.squares[0], sums.squares[1]));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(sums.levels[0], sums.levels[1]));
}

// The same by Search, for rows that may hold NaN.
template <Type T>
__attribute__((noinline)) int32_t encode_row_with_care(const EncodeArgs& a, const void* x, float* scratch, float r,
                                                       int8_t* levels) {
    const Search search(a.thresholds, a.n, Values{a.multiplier, a.shift});
    float unused = 0;
    return encode_row<T, false>(search, Signs(), x, scratch, a.k, a.block, r, levels, unused);
}

template <Type T, typename Coder>
inline void encode_rows(const EncodeArgs& a, const Coder shared, float* scratch, int64_t begin, int64_t end) {
    const Coder coder = shared;  // a copy of its own: stores of bytes could change one that others see
    const Signs signs;
    const bool fixed = a.normalise == Normalise::fixed && a.r == nullptr;
    const float fixed_r = fixed_scale(a);
    const int64_t written = (a.k + 63) / 64 * 64;
    for (int64_t i = begin; i < end; ++i) {
        const void* x = element<T>(a.x, i * a.ldx);
        int8_t* levels = a.levels + i * a.ldl;
        float squares = 0;
        if (fixed) {
            a.row_scales[i] = 1;
            a.sums[i] = encode_row<T, true>(coder, signs, x, scratch, a.k, a.block, fixed_r, levels, squares);
            // A sum of squares that fits fp32 is far below the ceiling; the row_scale of others, and NaN among their
            // values, are looked at with care.
            if (!(squares < 3e38f) || !(fixed_r < 3e38f)) {
                a.row_scales[i] = row_scale(rms(row_norm<T>(x, a.k), a.k), a, i).row_scale;
                a.sums[i] = encode_row_with_care<T>(a, x, scratch, fixed_r, levels);
            }
        } else {
            const double sigma = a.r != nullptr                       ? 0
                                 : a.normalise == Normalise::absmax ? row_absmax<T>(x, a.k)
                                                                    : rms(row_norm<T>(x, a.k), a.k);
            const RowScale scale = row_scale(sigma, a, i);
            a.row_scales[i] = scale.row_scale;
            if (scale.r == scale.r)  // below the ceiling no value is a NaN
                a.sums[i] = encode_row<T, false>(coder, signs, x, scratch, a.k, a.block, scale.r, levels, squares);
            else
                a.sums[i] = encode_row_with_care<T>(a, x, scratch, scale.r, levels);
        }
        if (written < a.ldl) memset(levels + written, 0, static_cast<size_t>(a.ldl - written));
    }
}

}  // namespace rows

inline void encode(const EncodeArgs& a, int64_t begin, int64_t end) {
    const Scratch scratch(a.block > rows::kChunk ? a.k : 0);
    rows::with_coder(a.thresholds, a.n, rows::Values{a.multiplier, a.shift}, [&](const auto& coder) {
        if (!kAllTypes || a.x_type == Type::f32)
            rows::encode_rows<Type::f32>(a, coder, scratch.data, begin, end);
        else if (a.x_type == Type::kept)
            rows::encode_rows<Type::kept>(a, coder, scratch.data, begin, end);
        else
            rows::encode_rows<Type::bf16>(a, coder, scratch.data, begin, end);
    });
}

}  // namespace avx512
}  // namespace
}  // namespace bellbox
