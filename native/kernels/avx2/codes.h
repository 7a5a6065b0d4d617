// Values to codes with AVX2.
//
// Binary search: one comparison a bit, with the threshold to compare with chosen by a permute; 13 operations for 16
// levels instead of 30 by counting, and exact for any sorted thresholds.
#pragma once

#include <immintrin.h>

#include "kernels/avx2/rows.h"

namespace bellbox {
namespace {
namespace avx2 {
namespace rows {

// 32 integers as bytes, those out of range at the nearest that a byte holds.
BELLBOX_INLINE __m256i joined_bytes(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    // Packing works within 128 bits: 32-bit word 4 * half + source holds that half of the source.
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// Binary search of BITS comparisons. A comparison gives 0 or -1, so what is kept is minus the code so far, and the
// tables are laid out for its lowest bits. Thresholds that are missing are NaN, which no value reaches.
template <int BITS>
struct Search {
    __m256 first, lower, upper, third, fourth;
    __m256i level;  // int8, by the lowest four bits of minus the code

    Search(const float* thresholds, int n, int multiplier, int shift) {
        float t[16];
        for (int j = 0; j < 16; ++j) t[j] = j < n - 1 ? thresholds[j] : __builtin_nanf("");
        // After b bits with the value c, the next comparison is with the middle of what is left.
        const auto middle = [&](int b, int c) { return t[(2 * c + 1) * (1 << BITS) / (2 << b) - 1]; };
        first = _mm256_set1_ps(middle(0, 0));
        alignas(32) float table[8] = {};
        if (BITS > 1) lower = _mm256_set1_ps(middle(1, 0)), upper = _mm256_set1_ps(middle(1, 1));
        if (BITS > 2) {
            for (int c = 0; c < 8; ++c) table[-c & 7] = middle(2, c & 3);
            third = _mm256_load_ps(table);
        }
        if (BITS > 3) {
            for (int c = 0; c < 8; ++c) table[-c & 7] = middle(3, c);
            fourth = _mm256_load_ps(table);
        }
        alignas(32) int8_t bytes[32];
        for (int c = 0; c < 32; ++c) bytes[(c & 16) + (-c & 15)] = static_cast<int8_t>(multiplier * (c & 15) - shift);
        level = _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
    }

    BELLBOX_INLINE static __m256 reached(__m256 v, __m256 t) { return _mm256_cmp_ps(v, t, _CMP_GE_OQ); }
    BELLBOX_INLINE static __m256i append(__m256i bits, __m256 next) {
        return _mm256_add_epi32(_mm256_add_epi32(bits, bits), _mm256_castps_si256(next));
    }

    BELLBOX_INLINE __m256i minus_code(__m256 v) const {
        const __m256 half = reached(v, first);
        __m256i bits = _mm256_castps_si256(half);
        if (BITS > 1) bits = append(bits, reached(v, _mm256_blendv_ps(lower, upper, half)));
        if (BITS > 2) bits = append(bits, reached(v, _mm256_permutevar_ps(third, bits)));
        if (BITS > 3) bits = append(bits, reached(v, _mm256_permutevar8x32_ps(fourth, bits)));
        return bits;
    }

    // The lowest four bits of minus the codes of 32 values, as bytes.
    BELLBOX_INLINE __m256i index(__m256 a, __m256 b, __m256 c, __m256 d) const {
        return _mm256_and_si256(joined_bytes(minus_code(a), minus_code(b), minus_code(c), minus_code(d)), _mm256_set1_epi8(15));
    }

    BELLBOX_INLINE __m256i levels(__m256 a, __m256 b, __m256 c, __m256 d) const {
        return _mm256_shuffle_epi8(level, index(a, b, c, d));
    }
};

// What each code is worth in bf16, its two bytes apart, by the lowest four bits of minus the code.
struct Worth {
    __m256i low, high;
    Worth(float offset, float scale) {
        alignas(16) uint8_t bytes[2][16];
        for (int c = 0; c < 16; ++c) {
            const uint16_t value = float_to_bf16((static_cast<float>(c) - offset) * scale);
            bytes[0][-c & 15] = static_cast<uint8_t>(value & 255);
            bytes[1][-c & 15] = static_cast<uint8_t>(value >> 8);
        }
        low = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[0])));
        high = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[1])));
    }
    // 32 bf16 numbers to p.
    BELLBOX_INLINE void store32(void* p, __m256i index) const {
        index = _mm256_permute4x64_epi64(index, 0xd8);  // interleaving works within 128 bits
        const __m256i l = _mm256_shuffle_epi8(low, index), h = _mm256_shuffle_epi8(high, index);
        _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_unpacklo_epi8(l, h));
        _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, _mm256_unpackhi_epi8(l, h));
    }
};

template <typename F>
BELLBOX_INLINE void with_coder(const float* thresholds, int n, int multiplier, int shift, const F& f) {
    if (n <= 2) return f(Search<1>(thresholds, n, multiplier, shift));
    if (n <= 4) return f(Search<2>(thresholds, n, multiplier, shift));
    if (n <= 8) return f(Search<3>(thresholds, n, multiplier, shift));
    f(Search<4>(thresholds, n, multiplier, shift));
}

}  // namespace rows

}  // namespace avx2
}  // namespace
}  // namespace bellbox
