// Convolutions of 2-bit weights and activations of at most 4 levels with AVX-512: what kernels/pixels.h leaves open.
//
// The lookup of kernels/avx512/lookup.h with the sides changed: a byte is three channels of a pixel, and a VPERMB looks up
// three products for 64 pixels.
//
// Floor of a lookup for 64 pixels: VPERMB, its addition, and three operations for 8 of them, 1.2 cycles at four units of
// 256 bits; 1.35 reached on Zen 4. For each input: coding, 0.8, and planes, 0.2 to 0.3; for each output 0.5 and more.
#pragma once

#include "kernels/avx512/lookup.h"
#include "kernels/avx512/rows.h"
#include "kernels/pixels.h"

namespace bellbox {
namespace {
namespace avx512 {
namespace pixels {

constexpr int64_t kPieceLookups = 2400;      // 16 bits hold the sum of 300 runs: 300 * 8 * 27 < 2^16

// ---- planes and operands ----

template <int U>
BELLBOX_INLINE void copy_even(const uint8_t* from, uint8_t* to) {
    if (U == 4) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
        const int word = _mm_cvtsi128_si32(_mm_cvtepi16_epi8(bytes));
        memcpy(to, &word, 4);
    } else if (U == 8) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_cvtepi16_epi8(bytes));
    } else {
        BELLBOX_UNROLL
        for (int i = 0; i < U; i += 16) {
            const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 2 * i));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtepi16_epi8(bytes));
        }
    }
}

// In each 128-bit lane 16 vectors of 16 bytes: byte j of vector i to byte i of vector j.
BELLBOX_INLINE void transpose_bytes(__m512i (&v)[16]) {
    BELLBOX_UNROLL
    for (int round = 0; round < 4; ++round) {
        __m512i u[16];
        BELLBOX_UNROLL
        for (int i = 0; i < 8; ++i) {
            u[2 * i] = _mm512_unpacklo_epi8(v[i], v[i + 8]);
            u[2 * i + 1] = _mm512_unpackhi_epi8(v[i], v[i + 8]);
        }
        BELLBOX_UNROLL
        for (int i = 0; i < 16; ++i) v[i] = u[i];
    }
}

// Three channels of a pixel a byte: triple q holds channels q, Q + q and 2 Q + q.
BELLBOX_INLINE __m128i triples_of(const int8_t* codes, int64_t triples, __mmask16 second, __mmask16 third) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m128i b = _mm_maskz_loadu_epi8(second, codes + triples), c = _mm_maskz_loadu_epi8(third, codes + 2 * triples);
    return _mm_or_si128(a, _mm_or_si128(_mm_slli_epi16(b, 2), _mm_slli_epi16(c, 4)));
}

inline void pack_pixels(const PixelArgs& a, const int8_t* codes, int64_t count, uint8_t* packed, uint8_t* vectors) {
    const int64_t triples = a.tuples;
    const __m512i digit_sums = _mm512_load_si512(lookup::kTable.row[1 + 4 + 16]);
    for (int64_t q = 0; q < triples; q += 16) {
        const auto second = static_cast<__mmask16>(rows::low_bits(a.channels - triples - q));
        const auto third = static_cast<__mmask16>(rows::low_bits(a.channels - 2 * triples - q));
        const int8_t* from = codes + q;
        for (int64_t i = 0; i < count; ++i, from += a.channels)  // pixel 16 l + i to lane l of vector i
            _mm_store_si128(reinterpret_cast<__m128i*>(packed + 64 * (i % 16) + 16 * (i / 16)),
                            triples_of(from, triples, second, third));
        __m512i v[16];
        BELLBOX_UNROLL
        for (int i = 0; i < 16; ++i) v[i] = _mm512_load_si512(packed + 64 * i);
        transpose_bytes(v);
        BELLBOX_UNROLL
        for (int i = 0; i < 16; ++i) _mm512_store_si512(vectors + 64 * (q + i), v[i]);
    }
    for (int64_t s = 0; s < a.sum_planes; ++s) {  // behind the triples: what lay there is of no use
        __m512i sum = _mm512_setzero_si512();
        for (int64_t q = kSumTuples * s; q < smaller(kSumTuples * (s + 1), triples); ++q)
            sum = _mm512_add_epi8(sum, _mm512_permutexvar_epi8(_mm512_load_si512(vectors + 64 * q), digit_sums));
        _mm512_store_si512(vectors + 64 * (triples + s), sum);
    }
}

inline void sum_codes(const PixelArgs& a, const uint8_t* parts, Tile& tile) {
    __m512i even = _mm512_setzero_si512(), odd = even;
    for (int64_t i = 0; i < a.places * a.sum_planes; ++i) {
        const __m512i bytes = _mm512_load_si512(parts + kLanes * i);
        even = _mm512_add_epi16(even, _mm512_and_si512(bytes, _mm512_set1_epi16(0x00ff)));
        odd = _mm512_add_epi16(odd, _mm512_srli_epi16(bytes, 8));
    }
    // Of lane l: pixels 16 l + 0..7, and 16 l + 8..15; then those of 32 pixels in order.
    const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
    const __m512i halves[2] = {_mm512_permutex2var_epi64(low, _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), high),
                               _mm512_permutex2var_epi64(low, _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4), high)};
    const __m512i multiplier = _mm512_set1_epi32(a.product.act_multiplier);
    const __m512i weights = _mm512_set1_epi32(a.product.weights->shift);
    BELLBOX_UNROLL
    for (int i = 0; i < 4; ++i) {             // of levels, at the places inside
        const __m512i both = halves[i / 2];
        const __m256i half = i % 2 == 0 ? _mm512_castsi512_si256(both) : _mm512_extracti64x4_epi64(both, 1);
        const __m512i codes = _mm512_cvtepu16_epi32(half);
        const __m512i shifts = _mm512_load_si512(tile.less + 16 * i);
        const __m512i levels = _mm512_sub_epi32(_mm512_mullo_epi32(codes, multiplier), shifts);
        _mm512_store_si512(tile.less + 16 * i, _mm512_mullo_epi32(levels, weights));
    }
}

// ---- product ----

// Sixteen vectors of 16 words: word j of vector i to word i of vector j.
BELLBOX_INLINE void transpose_words(__m512i (&v)[16]) {
    __m512i u[16];
    BELLBOX_UNROLL
    for (int i = 0; i < 16; i += 2) {
        u[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        u[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    BELLBOX_UNROLL
    for (int i = 0; i < 16; i += 4) {
        BELLBOX_UNROLL
        for (int j = 0; j < 2; ++j) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(u[i + j], u[i + j + 2]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(u[i + j], u[i + j + 2]);
        }
    }
    // v[4 i + j]: in lane l, word 4 l + j of vectors 4 i .. 4 i + 3.
    BELLBOX_UNROLL
    for (int j = 0; j < 4; ++j) {
        const __m512i a = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88), b = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
        const __m512i c = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd), d = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
        u[j] = _mm512_shuffle_i32x4(a, b, 0x88), u[8 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
        u[4 + j] = _mm512_shuffle_i32x4(c, d, 0x88), u[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
    BELLBOX_UNROLL
    for (int i = 0; i < 16; ++i) v[i] = u[i];
}

inline void multiply(const PixelArgs& a, const Tile& tile, const uint8_t* operands, int64_t first, int64_t block) {
    alignas(64) int32_t sums[kOutputs * kLanes];   // [outputs][4][16]: of pixel 4 d + t at [t][d]
    for (int half = 0; half < 2; ++half) {
        const uint16_t* addresses = a.addresses + (2 * block + half) * lookup::kRows * a.lookups;
        for (int64_t done = 0; done < a.lookups; done += kPieceLookups)
            lookup::multiply<lookup::kRows>(operands + done * kLanes, addresses + done * lookup::kRows,
                                            smaller(kPieceLookups, a.lookups - done), done == 0,
                                            sums + half * lookup::kRows * kLanes);
    }
    LinearArgs p = a.product;
    p.row_scales = tile.row_scales;
    p.out = static_cast<char*>(p.out) + first * p.ldo * (p.out_type == Type::f32 ? 4 : 2);
    const product::Epilogue epilogue(p, block);
    const __m512i multiplier = _mm512_set1_epi32(p.act_multiplier * p.weights->multiplier);
    const int32_t* less = a.less + kOutputs * block;
    const float* add = a.add == nullptr ? nullptr : a.add + first * p.ldo + epilogue.column;
    for (int t = 0; t < 4; ++t) {
        __m512i v[16];
        BELLBOX_UNROLL
        for (int i = 0; i < 16; ++i) v[i] = _mm512_load_si512(sums + (4 * i + t) * 16);
        transpose_words(v);
        BELLBOX_UNROLL
        for (int i = 0; i < 16; ++i) {
            const int64_t pixel = 4 * i + t;
            if (pixel >= tile.count) continue;
            const __m512i sum = _mm512_mullo_epi32(v[i], multiplier);
            const __m512i inside = _mm512_sub_epi32(sum, _mm512_load_si512(less + tile.border[pixel] * a.less_stride));
            const __m512i exact = _mm512_sub_epi32(inside, _mm512_set1_epi32(tile.less[pixel]));
            __m512 y = epilogue.rounded(p, pixel, exact);
            if (add != nullptr) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(epilogue.mask, add + pixel * p.ldo));
            if (a.relu) y = _mm512_max_ps(_mm512_setzero_ps(), y);  // in this order NaN stays
            epilogue.store(p, pixel, y);
        }
    }
}

}  // namespace pixels
}  // namespace avx512
}  // namespace
}  // namespace bellbox
