// Heads of int8 and of 4 bits by groups of columns, with AVX2. A vector of the weight is taken apart once for eight rows of
// the input.
//
// Of 4 bits, 64 columns are 32 bytes, whose halves are multiplied unsigned. A 16-bit lane holds the sum of four neighbouring columns (15 * 127 * 4 at most), so of one group, and `vpmaddwd`
// multiplies it by the group's multiplier. That the integers stand 8 above their values is taken off at the end, from the
// sums of the input over each group.
#pragma once

#include <immintrin.h>

#include "kernels/inline.h"
#include "kernels/kernels.h"

namespace bellbox {
namespace {
namespace avx2 {
namespace head {

// What is multiplied soon: reading several rows in turn is no pattern that processors fetch ahead.
template <int kWeights>
BELLBOX_INLINE void fetch(const void* p) {
    constexpr int64_t kAhead = 4096;
    if (kWeights > 1) _mm_prefetch(static_cast<const char*>(p) + kAhead, _MM_HINT_T0);
}

BELLBOX_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// The sums of the lanes of each of kCount vectors.
template <int kCount>
BELLBOX_INLINE void sums_of(const __m256i* v, int32_t* out) {
    static_assert(kCount == 1 || kCount == 4 || kCount == 8);
    if constexpr (kCount == 1) {
        const __m256i twice = _mm256_hadd_epi32(v[0], v[0]), all = _mm256_hadd_epi32(twice, twice);
        *out = _mm_cvtsi128_si32(_mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
    } else {
        for (int i = 0; i < kCount; i += 4) {
            const __m256i four = _mm256_hadd_epi32(_mm256_hadd_epi32(v[i], v[i + 1]), _mm256_hadd_epi32(v[i + 2], v[i + 3]));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                             _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1)));
        }
    }
}

// Sixteen multipliers from `from` on as 16-bit numbers; what lies behind `end` is zero.
BELLBOX_INLINE __m256i multipliers_of(const uint8_t* from, const uint8_t* end) {
    if (end - from >= 16) return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    alignas(16) uint8_t some[16] = {};
    for (int i = 0; from + i < end; ++i) some[i] = from[i];
    return _mm256_cvtepu8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(some)));
}

// Rows n to n + kWeights - 1 of the weight times rows m to m + kRows - 1 of the input.
template <int kGroup, int kWeights, int kRows>
BELLBOX_INLINE void rows(const Int4LinearArgs& a, int64_t n, int64_t m) {
    const int64_t bytes = a.k / 2, groups = a.k / kGroup, x_row = (bytes + 63) / 64 * 128, sums_row = (groups + 15) / 16 * 16;
    const uint8_t *const weight = a.weight + n * bytes, *const multipliers = a.multipliers + n * groups;
    const int8_t* const x = a.x + m * x_row;
    const __m256i low = _mm256_set1_epi8(15);
    __m256i total[kWeights * kRows];
    BELLBOX_UNROLL
    for (int i = 0; i < kWeights * kRows; ++i) total[i] = _mm256_setzero_si256();
    // First what is taken off, 8 times the sums of the input. Multipliers behind a row's last meet sums that are zero.
    for (int64_t g = 0; g < groups; g += 16) {
        BELLBOX_UNROLL
        for (int i = 0; i < kWeights; ++i) {
            const __m256i many = multipliers_of(multipliers + i * groups + g, a.multipliers + a.n * groups);
            BELLBOX_UNROLL
            for (int j = 0; j < kRows; ++j)
                total[i * kRows + j] = _mm256_sub_epi32(total[i * kRows + j], _mm256_madd_epi16(many, load(a.sums + (m + j) * sums_row + g)));
        }
    }
    BELLBOX_UNROLL
    for (int i = 0; i < kWeights * kRows; ++i) total[i] = _mm256_slli_epi32(total[i], 3);
    const auto step = BELLBOX_STEP(int i, __m256i codes, __m256i many, int64_t at) {
        const __m256i even = _mm256_and_si256(codes, low), odd = _mm256_and_si256(_mm256_srli_epi16(codes, 4), low);
        const int8_t* const first = x + at / 64 * 128 + at % 64;
        BELLBOX_UNROLL
        for (int j = 0; j < kRows; ++j) {
            const int8_t* const own = first + j * x_row;
            const __m256i sums = _mm256_add_epi16(_mm256_maddubs_epi16(even, load(own)), _mm256_maddubs_epi16(odd, load(own + 64)));
            total[i * kRows + j] = _mm256_add_epi32(total[i * kRows + j], _mm256_madd_epi16(sums, many));
        }
    };
    int64_t at = 0;
    for (; at + 32 <= bytes; at += 32) {
        BELLBOX_UNROLL
        for (int i = 0; i < kWeights; ++i) {
            const uint8_t* const own = multipliers + i * groups + 2 * at / kGroup;
            fetch<kWeights>(weight + i * bytes + at);
            const __m128i first = _mm_set1_epi16(own[0]);
            const __m256i many = _mm256_setr_m128i(first, kGroup == 64 ? first : _mm_set1_epi16(own[1]));
            step(i, load(weight + i * bytes + at), many, at);
        }
    }
    if (at < bytes) {  // one group of 32 columns
        BELLBOX_UNROLL
        for (int i = 0; i < kWeights; ++i) {
            const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + i * bytes + at));
            step(i, _mm256_zextsi128_si256(codes), _mm256_set1_epi16(multipliers[i * groups + 2 * at / kGroup]), at);
        }
    }
    int32_t sums[kWeights * kRows];
    sums_of<kWeights * kRows>(total, sums);
    for (int i = 0; i < kWeights; ++i)
        for (int j = 0; j < kRows; ++j)
            a.out[(m + j) * a.n + n + i] = static_cast<float>(sums[i * kRows + j]) * (a.scale[n + i] * a.x_scale[m + j]);
}

// All rows of the weight from `first` to `last`, some at a time.
template <int kGroup, int kWeights, int kRows>
BELLBOX_INLINE void columns(const Int4LinearArgs& a, int64_t first, int64_t last, int64_t m) {
    int64_t n = first;
    for (; n + kWeights <= last; n += kWeights) rows<kGroup, kWeights, kRows>(a, n, m);
    for (; n < last; ++n)
        for (int j = 0; j < kRows; ++j) rows<kGroup, 1, 1>(a, n, m + j);
}

// Of int8: rows n to n + kWeights - 1 of the weight times rows m to m + kRows - 1 of the input.
template <int kWeights, int kRows>
BELLBOX_INLINE void rows_of_bytes(const Int8LinearArgs& a, int64_t n, int64_t m) {
    const int8_t* const weight = a.weight + n * a.k;
    const int16_t* const x = a.x + m * a.k;
    __m256i total[kWeights * kRows];
    BELLBOX_UNROLL
    for (int i = 0; i < kWeights * kRows; ++i) total[i] = _mm256_setzero_si256();
    int64_t at = 0;
    for (; at + 16 <= a.k; at += 16) {
        __m256i wide[kWeights];
        BELLBOX_UNROLL
        for (int i = 0; i < kWeights; ++i) {
            fetch<kWeights>(weight + i * a.k + at);
            wide[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + i * a.k + at)));
        }
        BELLBOX_UNROLL
        for (int j = 0; j < kRows; ++j) {
            const __m256i own = load(x + j * a.k + at);
            BELLBOX_UNROLL
            for (int i = 0; i < kWeights; ++i)
                total[i * kRows + j] = _mm256_add_epi32(total[i * kRows + j], _mm256_madd_epi16(wide[i], own));
        }
    }
    int32_t sums[kWeights * kRows];
    sums_of<kWeights * kRows>(total, sums);
    for (int i = 0; i < kWeights; ++i)
        for (int j = 0; j < kRows; ++j) {
            int32_t sum = sums[i * kRows + j];
            for (int64_t c = at; c < a.k; ++c) sum += weight[i * a.k + c] * x[j * a.k + c];
            a.out[(m + j) * a.n + n + i] = static_cast<float>(sum) * (a.scale[n + i] * a.x_scale[m + j]);
        }
}

template <int kWeights, int kRows>
BELLBOX_INLINE void columns_of_bytes(const Int8LinearArgs& a, int64_t first, int64_t last, int64_t m) {
    int64_t n = first;
    for (; n + kWeights <= last; n += kWeights) rows_of_bytes<kWeights, kRows>(a, n, m);
    for (; n < last; ++n)
        for (int j = 0; j < kRows; ++j) rows_of_bytes<1, 1>(a, n, m + j);
}

// each(first, last) for some rows of the weight at a time, so that some of the input are used again while they are near.
template <typename Each>
BELLBOX_INLINE void by_sixteen(int64_t begin, int64_t end, const Each& each) {
    for (int64_t first = begin; first < end; first += 16) each(first, first + 16 < end ? first + 16 : end);
}

template <int kGroup>
BELLBOX_INLINE void product(const Int4LinearArgs& a, int64_t begin, int64_t end) {
    by_sixteen(begin, end, BELLBOX_STEP(int64_t first, int64_t last) {
        int64_t m = 0;
        for (; m + 8 <= a.m; m += 8) columns<kGroup, 1, 8>(a, first, last, m);
        for (; m + 4 <= a.m; m += 4) columns<kGroup, 1, 4>(a, first, last, m);
        for (; m + 2 <= a.m; m += 2) columns<kGroup, 2, 2>(a, first, last, m);
        for (; m < a.m; ++m) columns<kGroup, 4, 1>(a, first, last, m);
    });
}

}  // namespace head

inline void int8_linear(const Int8LinearArgs& a, int64_t begin, int64_t end) {
    head::by_sixteen(begin, end, BELLBOX_STEP(int64_t first, int64_t last) {
        int64_t m = 0;
        for (; m + 8 <= a.m; m += 8) head::columns_of_bytes<1, 8>(a, first, last, m);
        for (; m + 4 <= a.m; m += 4) head::columns_of_bytes<2, 4>(a, first, last, m);
        for (; m + 2 <= a.m; m += 2) head::columns_of_bytes<2, 2>(a, first, last, m);
        for (; m < a.m; ++m) head::columns_of_bytes<4, 1>(a, first, last, m);
    });
}

inline void int4_linear(const Int4LinearArgs& a, int64_t begin, int64_t end) {
    a.group == 64 ? head::product<64>(a, begin, end) : head::product<32>(a, begin, end);
}

}  // namespace avx2
}  // namespace
}  // namespace bellbox
