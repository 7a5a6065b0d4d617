// Heads of 4 bits by groups of columns, with AVX2: 64 columns are 32 bytes, whose halves are multiplied unsigned.
//
// A 16-bit lane holds the sum of four neighbouring columns (15 * 127 * 4 at most), so of one group: after 8 times the
// sum of the inputs is taken off, `vpmaddwd` multiplies it by the group's multiplier.
#pragma once

#include <immintrin.h>

#include "kernels/inline.h"
#include "kernels/kernels.h"

namespace bellbox {
namespace {
namespace avx2 {
namespace head {

BELLBOX_INLINE int32_t sum(__m256i v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

BELLBOX_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// Row n of the weight times rows m to m + kRows - 1 of the input.
template <int kRows>
BELLBOX_INLINE void rows(const Int4LinearArgs& a, int64_t n, int64_t m) {
    const int64_t bytes = a.k / 2, chunks = (bytes + 63) / 64;
    const uint8_t* weight = a.weight + n * bytes;
    const uint8_t* multipliers = a.multipliers + n * (a.k / a.group);
    const __m256i low = _mm256_set1_epi8(15);
    __m256i total[kRows];
    for (int j = 0; j < kRows; ++j) total[j] = _mm256_setzero_si256();
    for (int64_t at = 0; at < bytes; at += 32) {
        const bool whole = bytes - at >= 32;  // else 16: one group of 32 columns
        const __m256i codes =
            whole ? load(weight + at)
                  : _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + at)));
        const __m256i even = _mm256_and_si256(codes, low), odd = _mm256_and_si256(_mm256_srli_epi16(codes, 4), low);
        const uint8_t* own = multipliers + 2 * at / a.group;
        const __m128i first = _mm_set1_epi16(own[0]);
        const __m256i many = _mm256_setr_m128i(first, a.group == 64 ? first : _mm_set1_epi16(whole ? own[1] : int16_t{0}));
        BELLBOX_UNROLL
        for (int j = 0; j < kRows; ++j) {
            const int64_t chunk = (m + j) * chunks + at / 64, half = at % 64;
            const int8_t* x = a.x + chunk * 128 + half;
            const __m256i sums = _mm256_add_epi16(_mm256_maddubs_epi16(even, load(x)), _mm256_maddubs_epi16(odd, load(x + 64)));
            const __m256i exact = _mm256_sub_epi16(sums, load(a.less + chunk * 32 + half / 2));
            total[j] = _mm256_add_epi32(total[j], _mm256_madd_epi16(exact, many));
        }
    }
    for (int j = 0; j < kRows; ++j)
        a.out[(m + j) * a.n + n] = static_cast<float>(sum(total[j])) * (a.scale[n] * a.x_scale[m + j]);
}

}  // namespace head

inline void int4_linear(const Int4LinearArgs& a, int64_t begin, int64_t end) {
    // Some rows of the weight at a time, so that some of the input are used again while they are near.
    for (int64_t first = begin; first < end; first += 16) {
        const int64_t last = first + 16 < end ? first + 16 : end;
        int64_t m = 0;
        for (; m + 4 <= a.m; m += 4)
            for (int64_t n = first; n < last; ++n) head::rows<4>(a, n, m);
        for (; m < a.m; ++m)
            for (int64_t n = first; n < last; ++n) head::rows<1>(a, n, m);
    }
}

}  // namespace avx2
}  // namespace
}  // namespace bellbox
