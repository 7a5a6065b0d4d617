// Rows of a coded KV cache, sixteen codes in two registers at a time: the lanes of kernels/cache_rows.h.
#pragma once

#include <immintrin.h>

#include "kernels/cache_rows.h"
#include "kernels/inline.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {

// Sixteen codes as bytes: int8 as they lie; of 4 bits the low or the high halves of sixteen bytes.
enum class Part { whole, low, high };

template <Part part>
BELLBOX_INLINE __m128i sixteen(const void* from) {
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(from));
    if (part == Part::whole) return bytes;
    const __m128i nibbles = _mm_and_si128(part == Part::high ? _mm_srli_epi16(bytes, 4) : bytes, _mm_set1_epi8(15));
    return _mm_sub_epi8(nibbles, _mm_set1_epi8(8));
}

struct Pair {
    __m256 first, second;
};

BELLBOX_INLINE Pair values_of(__m128i bytes) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}

BELLBOX_INLINE Pair load_pair(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }

BELLBOX_INLINE Pair add_product(Pair sum, Pair a, Pair b) {
    return {_mm256_add_ps(sum.first, _mm256_mul_ps(a.first, b.first)), _mm256_add_ps(sum.second, _mm256_mul_ps(a.second, b.second))};
}

// Sums of each of four vectors in the order of sum_lanes: halves, quarters, pairs.
BELLBOX_INLINE __m128 sums_of(const Pair (&lanes)[4]) {
    __m256 halves[4];
    BELLBOX_UNROLL
    for (int r = 0; r < 4; ++r) halves[r] = _mm256_add_ps(lanes[r].first, lanes[r].second);
    const auto quarters = BELLBOX_STEP(__m256 a, __m256 b) {
        return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    };
    const __m256 ac = quarters(halves[0], halves[2]), bd = quarters(halves[1], halves[3]);
    const __m256 pairs = _mm256_add_ps(_mm256_shuffle_ps(ac, bd, 0x44), _mm256_shuffle_ps(ac, bd, 0xee));  // a, b; c, d
    const __m256 sums = _mm256_add_ps(pairs, _mm256_permute_ps(pairs, 0xb1));
    return _mm_shuffle_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1), 0x88);
}

// lanes[r] += query * row r, of numbers [0, n) of `rows` rows that are `row` bytes apart.
template <Part part, int rows>
BELLBOX_INLINE void add_products(Pair (&lanes)[4], const float* query, const void* codes, int64_t row, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const Pair q = load_pair(query + i);
        BELLBOX_UNROLL
        for (int r = 0; r < rows; ++r)
            lanes[r] = add_product(lanes[r], q, values_of(sixteen<part>(static_cast<const char*>(codes) + r * row + i)));
    }
}

template <int rows, typename Code>
BELLBOX_INLINE __m128 score(const float* query, const Code* codes, int64_t d) {
    Pair lanes[4];
    BELLBOX_UNROLL
    for (int r = 0; r < 4; ++r) lanes[r] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    if (sizeof(Code) == 1 && static_cast<Code>(-1) < 0) {
        add_products<Part::whole, rows>(lanes, query, codes, d, d);
    } else {  // first all low halves, so that lanes add in the order of the head
        add_products<Part::low, rows>(lanes, query, codes, d / 2, d / 2);
        add_products<Part::high, rows>(lanes, query + d / 2, codes, d / 2, d / 2);
    }
    return sums_of(lanes);
}

template <typename Code>
inline void score_codes(const float* query, const Code* codes, int64_t count, int64_t d, float scale, float* out) {
    const int64_t row = row_length(codes, d);
    int64_t s = 0;
    for (; s + 4 <= count; s += 4) _mm_storeu_ps(out + s, _mm_mul_ps(score<4>(query, codes + s * row, d), _mm_set1_ps(scale)));
    for (; s < count; ++s) out[s] = _mm_cvtss_f32(score<1>(query, codes + s * row, d)) * scale;
}

inline void score_rows(const float* query, const int8_t* codes, int64_t count, int64_t d, float scale, float* decoded, float* out) {
    if (d % kLanes != 0) return score_rows<int8_t>(query, codes, count, d, scale, decoded, out);
    score_codes(query, codes, count, d, scale, out);
}

inline void score_rows(const float* query, const uint8_t* codes, int64_t count, int64_t d, float scale, float* decoded, float* out) {
    if (d % (2 * kLanes) != 0) return score_rows<uint8_t>(query, codes, count, d, scale, decoded, out);
    score_codes(query, codes, count, d, scale, out);
}

BELLBOX_INLINE Pair weighted(float weight, Pair v) {
    const __m256 w = _mm256_set1_ps(weight);
    return {_mm256_mul_ps(w, v.first), _mm256_mul_ps(w, v.second)};
}

BELLBOX_INLINE Pair plus(Pair a, Pair b) { return {_mm256_add_ps(a.first, b.first), _mm256_add_ps(a.second, b.second)}; }

// out [n] += the sum of weights[s] * row s, four rows at a time; rows are `row` bytes apart.
template <Part part>
inline void add_codes(const float* weights, const void* codes, int64_t count, int64_t row, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += kLanes) {
        Pair total = load_pair(out + i);
        const char* from = static_cast<const char*>(codes) + i;
        const auto values = BELLBOX_STEP(int64_t r) { return values_of(sixteen<part>(from + r * row)); };
        int64_t s = 0;
        for (; s + 4 <= count; s += 4, from += 4 * row) {
            const Pair first = plus(weighted(weights[s], values(0)), weighted(weights[s + 1], values(1)));
            const Pair second = plus(weighted(weights[s + 2], values(2)), weighted(weights[s + 3], values(3)));
            total = plus(total, plus(first, second));
        }
        for (; s < count; ++s, from += row) total = plus(total, weighted(weights[s], values(0)));
        _mm256_storeu_ps(out + i, total.first), _mm256_storeu_ps(out + i + 8, total.second);
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
