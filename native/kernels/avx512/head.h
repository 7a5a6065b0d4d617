// Heads of 4 bits by groups of columns, with AVX-512: 128 columns are 64 bytes, whose halves are multiplied unsigned.
//
// A 16-bit lane holds the sum of four neighbouring columns (15 * 127 * 4 at most), so of one group: after 8 times the
// sum of the inputs is taken off, `vpdpwssd` multiplies it by the group's multiplier and adds it up. One row of the input
// serves four rows of the weight, so that it is loaded a quarter as often; four rows serve two.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "kernels/inline.h"
#include "kernels/kernels.h"

namespace bellbox {
namespace {
namespace avx512 {
namespace head {

constexpr int64_t kAhead = 4096;  // bytes

// The multipliers of a chunk's groups, each in the lanes of its columns; those that are not there are zero.
template <int kGroup>
BELLBOX_INLINE __m512i spread(const uint8_t* multipliers, int64_t count, __m512i pattern) {
    if (kGroup == 64) {
        uint16_t word = multipliers[0];
        if (count == 2) std::memcpy(&word, multipliers, 2);
        return _mm512_shuffle_epi8(_mm512_set1_epi16(static_cast<int16_t>(word)), pattern);
    }
    uint32_t word = 0;
    if (count == 4)
        std::memcpy(&word, multipliers, 4);
    else
        for (int64_t i = 0; i < count; ++i) word |= static_cast<uint32_t>(multipliers[i]) << (8 * i);
    return _mm512_shuffle_epi8(_mm512_set1_epi32(static_cast<int>(word)), pattern);
}

// Rows n to n + kWeights - 1 of the weight times rows m to m + kRows - 1 of the input.
template <int kGroup, int kWeights, int kRows>
BELLBOX_INLINE void rows(const Int4LinearArgs& a, int64_t n, int64_t m, __m512i pattern) {
    constexpr int64_t kGroups = 128 / kGroup;
    const int64_t bytes = a.k / 2, chunks = (bytes + 63) / 64, groups = a.k / kGroup;
    const uint8_t *weight = a.weight + n * bytes, *multipliers = a.multipliers + n * groups;
    const __m512i low = _mm512_set1_epi8(15);
    __m512i total[kWeights][kRows];
    BELLBOX_UNROLL
    for (int i = 0; i < kWeights; ++i) {
        BELLBOX_UNROLL
        for (int j = 0; j < kRows; ++j) total[i][j] = _mm512_setzero_si512();
    }
    const auto chunk = BELLBOX_STEP(int64_t c, uint64_t mask, int64_t count) {
        BELLBOX_UNROLL
        for (int i = 0; i < kWeights; ++i) {
            const uint8_t* from = weight + i * bytes + 64 * c;
            // What is multiplied soon: reading several rows in turn is no pattern that processors fetch ahead.
            _mm_prefetch(reinterpret_cast<const char*>(from) + kAhead, _MM_HINT_T0);
            const __m512i codes = mask == ~uint64_t{0} ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(mask, from);
            const __m512i even = _mm512_and_si512(codes, low), odd = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
            const __m512i many = spread<kGroup>(multipliers + i * groups + kGroups * c, count, pattern);
            BELLBOX_UNROLL
            for (int j = 0; j < kRows; ++j) {
                const int8_t* x = a.x + ((m + j) * chunks + c) * 128;
                const __m512i less = _mm512_loadu_si512(a.less + ((m + j) * chunks + c) * 32);
                const __m512i sums = _mm512_add_epi16(_mm512_maddubs_epi16(even, _mm512_loadu_si512(x)),
                                                      _mm512_maddubs_epi16(odd, _mm512_loadu_si512(x + 64)));
                total[i][j] = _mm512_dpwssd_epi32(total[i][j], _mm512_sub_epi16(sums, less), many);
            }
        }
    };
    const int64_t whole = bytes / 64, left = bytes % 64;
    for (int64_t c = 0; c < whole; ++c) chunk(c, ~uint64_t{0}, kGroups);
    if (left > 0) chunk(whole, (uint64_t{1} << left) - 1, 2 * left / kGroup);
    for (int i = 0; i < kWeights; ++i)
        for (int j = 0; j < kRows; ++j)
            a.out[(m + j) * a.n + n + i] =
                static_cast<float>(_mm512_reduce_add_epi32(total[i][j])) * (a.scale[n + i] * a.x_scale[m + j]);
}

template <int kGroup>
BELLBOX_INLINE void product(const Int4LinearArgs& a, int64_t begin, int64_t end) {
    alignas(64) uint8_t places[64];  // of 16-bit lane i: the multiplier of columns 4 i to 4 i + 3, below a zero
    for (int i = 0; i < 32; ++i) places[2 * i] = static_cast<uint8_t>(4 * i / kGroup), places[2 * i + 1] = 0x80;
    const __m512i pattern = _mm512_load_si512(places);
    // Some rows of the weight at a time, so that some of the input are used again while they are near.
    for (int64_t first = begin; first < end; first += 16) {
        const int64_t last = first + 16 < end ? first + 16 : end;
        int64_t m = 0;
        for (; m + 4 <= a.m; m += 4) {
            int64_t n = first;
            for (; n + 2 <= last; n += 2) rows<kGroup, 2, 4>(a, n, m, pattern);
            for (; n < last; ++n) rows<kGroup, 1, 4>(a, n, m, pattern);
        }
        for (; m < a.m; ++m) {
            int64_t n = first;
            for (; n + 4 <= last; n += 4) rows<kGroup, 4, 1>(a, n, m, pattern);
            for (; n < last; ++n) rows<kGroup, 1, 1>(a, n, m, pattern);
        }
    }
}

}  // namespace head

inline void int4_linear(const Int4LinearArgs& a, int64_t begin, int64_t end) {
    a.group == 64 ? head::product<64>(a, begin, end) : head::product<32>(a, begin, end);
}

}  // namespace avx512
}  // namespace
}  // namespace bellbox
