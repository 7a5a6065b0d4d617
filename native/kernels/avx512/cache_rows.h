// Rows of a coded KV cache, sixteen codes in a register at a time: the lanes of kernels/cache_rows.h.
#pragma once

#include <immintrin.h>

#include "kernels/cache_rows.h"
#include "kernels/inline.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {

BELLBOX_INLINE __m128i sixteen(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

BELLBOX_INLINE __m512 values_of(const int8_t* codes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen(codes))); }

// -8 to 7; a permutation looks at the low four bits of an index only.
BELLBOX_INLINE __m512 values_of_nibbles(__m512i codes) {
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_permutexvar_ps(codes, values);
}

// Sums of each of four vectors in the order of sum_lanes: halves, quarters, pairs.
BELLBOX_INLINE __m128 sums_of(const __m512 (&lanes)[4]) {
    const auto halves = BELLBOX_STEP(__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    const __m512 ab = halves(lanes[0], lanes[1]), cd = halves(lanes[2], lanes[3]);
    const __m512 quarters = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    const __m512 pairs = _mm512_add_ps(quarters, _mm512_permute_ps(quarters, 0x4e));
    const __m512 sums = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0xb1));
    return _mm512_castps512_ps128(_mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), sums));
}

// `add(lanes, row)` adds the products of up to four rows.
template <typename Add>
BELLBOX_INLINE void score_fours(int64_t count, float scale, float* out, const Add& add) {
    int64_t s = 0;
    for (; s + 4 <= count; s += 4) {
        __m512 lanes[4] = {};
        BELLBOX_UNROLL
        for (int r = 0; r < 4; ++r) lanes[r] = _mm512_setzero_ps();
        add(lanes, s, 4);
        _mm_storeu_ps(out + s, _mm_mul_ps(sums_of(lanes), _mm_set1_ps(scale)));
    }
    for (; s < count; ++s) {
        __m512 lanes[4] = {};
        add(lanes, s, 1);
        out[s] = _mm_cvtss_f32(sums_of(lanes)) * scale;
    }
}

inline void score_rows(const float* query, const int8_t* codes, int64_t count, int64_t d, float scale, float* decoded, float* out) {
    if (d % kLanes != 0) return score_rows<int8_t>(query, codes, count, d, scale, decoded, out);
    score_fours(count, scale, out, BELLBOX_STEP(__m512 (&lanes)[4], int64_t s, int rows) {
        for (int64_t i = 0; i < d; i += kLanes) {
            const __m512 q = _mm512_loadu_ps(query + i);
            BELLBOX_UNROLL
            for (int r = 0; r < rows; ++r)
                lanes[r] = _mm512_add_ps(lanes[r], _mm512_mul_ps(q, values_of(codes + (s + r) * d + i)));
        }
    });
}

inline void score_rows(const float* query, const uint8_t* codes, int64_t count, int64_t d, float scale, float* decoded, float* out) {
    if (d % (2 * kLanes) != 0) return score_rows<uint8_t>(query, codes, count, d, scale, decoded, out);
    const int64_t half = d / 2;
    score_fours(count, scale, out, BELLBOX_STEP(__m512 (&lanes)[4], int64_t s, int rows) {
        for (int64_t i = 0; i < half; i += kLanes) {  // first all low halves, so that lanes add in the order of the head
            const __m512 q = _mm512_loadu_ps(query + i);
            BELLBOX_UNROLL
            for (int r = 0; r < rows; ++r) {
                const __m512i bytes = _mm512_cvtepu8_epi32(sixteen(codes + (s + r) * half + i));
                lanes[r] = _mm512_add_ps(lanes[r], _mm512_mul_ps(q, values_of_nibbles(bytes)));
            }
        }
        for (int64_t i = 0; i < half; i += kLanes) {
            const __m512 q = _mm512_loadu_ps(query + half + i);
            BELLBOX_UNROLL
            for (int r = 0; r < rows; ++r) {
                const __m512i bytes = _mm512_cvtepu8_epi32(sixteen(codes + (s + r) * half + i));
                lanes[r] = _mm512_add_ps(lanes[r], _mm512_mul_ps(q, values_of_nibbles(_mm512_srli_epi32(bytes, 4))));
            }
        }
    });
}

// sum + (w0 v0 + w1 v1) + (w2 v2 + w3 v3)
BELLBOX_INLINE __m512 add_four(__m512 sum, const float* weights, __m512 v0, __m512 v1, __m512 v2, __m512 v3) {
    const __m512 first = _mm512_add_ps(_mm512_mul_ps(_mm512_set1_ps(weights[0]), v0), _mm512_mul_ps(_mm512_set1_ps(weights[1]), v1));
    const __m512 second = _mm512_add_ps(_mm512_mul_ps(_mm512_set1_ps(weights[2]), v2), _mm512_mul_ps(_mm512_set1_ps(weights[3]), v3));
    return _mm512_add_ps(sum, _mm512_add_ps(first, second));
}

inline void add_rows(const float* weights, const int8_t* codes, int64_t count, int64_t d, float* decoded, float* out) {
    if (d % kLanes != 0) return add_rows<int8_t>(weights, codes, count, d, decoded, out);
    for (int64_t i = 0; i < d; i += kLanes) {
        __m512 sum = _mm512_loadu_ps(out + i);
        const int8_t* row = codes + i;
        int64_t s = 0;
        for (; s + 4 <= count; s += 4, row += 4 * d)
            sum = add_four(sum, weights + s, values_of(row), values_of(row + d), values_of(row + 2 * d), values_of(row + 3 * d));
        for (; s < count; ++s, row += d) sum = _mm512_add_ps(sum, _mm512_mul_ps(_mm512_set1_ps(weights[s]), values_of(row)));
        _mm512_storeu_ps(out + i, sum);
    }
}

inline void add_rows(const float* weights, const uint8_t* codes, int64_t count, int64_t d, float* decoded, float* out) {
    if (d % (2 * kLanes) != 0) return add_rows<uint8_t>(weights, codes, count, d, decoded, out);
    const int64_t half = d / 2;
    for (int64_t i = 0; i < half; i += kLanes) {
        __m512 low = _mm512_loadu_ps(out + i), high = _mm512_loadu_ps(out + half + i);
        const uint8_t* row = codes + i;
        const auto bytes = BELLBOX_STEP(int64_t r) { return _mm512_cvtepu8_epi32(sixteen(row + r * half)); };
        const auto above = BELLBOX_STEP(__m512i x) { return values_of_nibbles(_mm512_srli_epi32(x, 4)); };
        int64_t s = 0;
        for (; s + 4 <= count; s += 4, row += 4 * half) {
            const __m512i a = bytes(0), b = bytes(1), c = bytes(2), e = bytes(3);
            low = add_four(low, weights + s, values_of_nibbles(a), values_of_nibbles(b), values_of_nibbles(c), values_of_nibbles(e));
            high = add_four(high, weights + s, above(a), above(b), above(c), above(e));
        }
        for (; s < count; ++s, row += half) {
            const __m512 weight = _mm512_set1_ps(weights[s]);
            low = _mm512_add_ps(low, _mm512_mul_ps(weight, values_of_nibbles(bytes(0))));
            high = _mm512_add_ps(high, _mm512_mul_ps(weight, above(bytes(0))));
        }
        _mm512_storeu_ps(out + i, low), _mm512_storeu_ps(out + half + i, high);
    }
}

}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
