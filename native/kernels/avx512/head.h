// Heads of 4 bits by groups of columns, with AVX-512: 128 columns are 64 bytes, whose halves are multiplied unsigned.
//
// A 16-bit lane holds the sum of four neighbouring columns (15 * 127 * 4 at most), so of one group: after 8 times the
// sum of the inputs is taken off, `vpdpwssd` multiplies it by the group's multiplier and adds it up.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernels/inline.h"
#include "kernels/kernels.h"

namespace bellbox {
namespace {
namespace avx512 {
namespace head {

// The multipliers of a chunk's groups, each in the lanes of its columns.
BELLBOX_INLINE __m512i spread(const uint8_t* multipliers, int64_t count, __m512i pattern) {
    uint32_t word = 0;
    if (count == 4)
        std::memcpy(&word, multipliers, 4);
    else
        for (int64_t i = 0; i < count; ++i) word |= static_cast<uint32_t>(multipliers[i]) << (8 * i);
    return _mm512_shuffle_epi8(_mm512_set1_epi32(static_cast<int>(word)), pattern);
}

// Row n of the weight times rows m to m + kRows - 1 of the input.
template <int kRows>
BELLBOX_INLINE void rows(const Int4LinearArgs& a, int64_t n, int64_t m, __m512i pattern) {
    const int64_t bytes = a.k / 2, chunks = (bytes + 63) / 64, groups = 128 / a.group;
    const uint8_t* weight = a.weight + n * bytes;
    const uint8_t* multipliers = a.multipliers + n * (a.k / a.group);
    const __m512i low = _mm512_set1_epi8(15);
    __m512i total[kRows];
    for (int j = 0; j < kRows; ++j) total[j] = _mm512_setzero_si512();
    for (int64_t c = 0; c < chunks; ++c) {
        const int64_t left = bytes - 64 * c;
        const bool whole = left >= 64;
        const __m512i codes = whole ? _mm512_loadu_si512(weight + 64 * c)
                                    : _mm512_maskz_loadu_epi8((uint64_t{1} << left) - 1, weight + 64 * c);
        const __m512i even = _mm512_and_si512(codes, low), odd = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
        const __m512i many = spread(multipliers + groups * c, whole ? groups : 2 * left / a.group, pattern);
        BELLBOX_UNROLL
        for (int j = 0; j < kRows; ++j) {
            const int8_t* x = a.x + ((m + j) * chunks + c) * 128;
            const __m512i less = _mm512_loadu_si512(a.less + ((m + j) * chunks + c) * 32);
            const __m512i sums = _mm512_add_epi16(_mm512_maddubs_epi16(even, _mm512_loadu_si512(x)),
                                                  _mm512_maddubs_epi16(odd, _mm512_loadu_si512(x + 64)));
            total[j] = _mm512_dpwssd_epi32(total[j], _mm512_sub_epi16(sums, less), many);
        }
    }
    for (int j = 0; j < kRows; ++j)
        a.out[(m + j) * a.n + n] =
            static_cast<float>(_mm512_reduce_add_epi32(total[j])) * (a.scale[n] * a.x_scale[m + j]);
}

}  // namespace head

inline void int4_linear(const Int4LinearArgs& a, int64_t begin, int64_t end) {
    alignas(64) uint8_t places[64];  // of 16-bit lane i: the multiplier of columns 4 i to 4 i + 3, below a zero
    for (int64_t i = 0; i < 32; ++i) places[2 * i] = static_cast<uint8_t>(4 * i / a.group), places[2 * i + 1] = 0x80;
    const __m512i pattern = _mm512_load_si512(places);
    // Some rows of the weight at a time, so that some of the input are used again while they are near.
    for (int64_t first = begin; first < end; first += 16) {
        const int64_t last = first + 16 < end ? first + 16 : end;
        int64_t m = 0;
        for (; m + 8 <= a.m; m += 8)
            for (int64_t n = first; n < last; ++n) head::rows<8>(a, n, m, pattern);
        for (; m + 2 <= a.m; m += 2)
            for (int64_t n = first; n < last; ++n) head::rows<2>(a, n, m, pattern);
        for (; m < a.m; ++m)
            for (int64_t n = first; n < last; ++n) head::rows<1>(a, n, m, pattern);
    }
}

}  // namespace avx512
}  // namespace
}  // namespace bellbox
