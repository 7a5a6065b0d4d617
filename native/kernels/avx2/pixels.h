// Convolutions of 2-bit weights and activations of at most 4 levels with AVX2: what kernels/pixels.h leaves open.
//
// A byte is two channels of a pixel, a number below 16, and so are two codes of the weights: a row of a table of 16 x 16
// bytes holds the sums of two products for all such numbers of the activation. One VPSHUFB looks them up for 32 pixels: 64
// products where vpmaddubsw makes 32. Sums of 14 lookups (14 * 18 < 256) are bytes; they are added to 16 bits.
//
// Floor of a lookup for 32 pixels: VPSHUFB and an addition; loads of its operands, shared by four outputs or by 64 pixels.
#pragma once

#include <immintrin.h>

#include "kernels/avx2/linear.h"
#include "kernels/pixels.h"

namespace bellbox {
namespace {
namespace avx2 {
namespace pixels {

using product::load32;
using product::store32;

constexpr int kRows = 4;                     // outputs at a time; registers: 8 sums, 2 operands, 1 of the table, 1 looked up
constexpr int64_t kRun = 14;                 // lookups that are added up in bytes
constexpr int64_t kPieceLookups = 3640;      // 16 bits hold their sum: 3640 * 18 < 2^16

struct Table {
    uint8_t row[16][16];                     // [codes of the weights][codes of the activation]
};
constexpr Table make_table() {
    Table t{};
    for (int w = 0; w < 16; ++w)
        for (int x = 0; x < 16; ++x) t.row[w][x] = static_cast<uint8_t>((x & 3) * (w & 3) + (x >> 2) * (w >> 2));
    return t;
}
alignas(64) constexpr Table kTable = make_table();

BELLBOX_INLINE __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
BELLBOX_INLINE __m256i twice(const void* p) { return _mm256_broadcastsi128_si256(load16(p)); }
BELLBOX_INLINE __m128i half_of(__m256i v, int half) {
    return half == 0 ? _mm256_castsi256_si128(v) : _mm256_extracti128_si256(v, 1);
}

// ---- planes and operands ----

template <int U>
BELLBOX_INLINE void copy_even(const uint8_t* from, uint8_t* to) {
    const __m128i low = _mm_set1_epi16(0x00ff);
    if (U == 4) {
        const __m128i words = _mm_and_si128(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)), low);
        const int word = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
        memcpy(to, &word, 4);
    } else if (U == 8) {
        const __m128i words = _mm_and_si128(load16(from), low);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
    } else {
        BELLBOX_UNROLL
        for (int i = 0; i < U; i += 16) {
            const __m128i a = _mm_and_si128(load16(from + 2 * i), low), b = _mm_and_si128(load16(from + 2 * i + 16), low);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm_packus_epi16(a, b));
        }
    }
}

// In each 128-bit lane 16 vectors of 16 bytes: byte j of vector i to byte i of vector j.
BELLBOX_INLINE void transpose_bytes(__m256i (&v)[16]) {
    BELLBOX_UNROLL
    for (int round = 0; round < 4; ++round) {
        __m256i u[16];
        BELLBOX_UNROLL
        for (int i = 0; i < 8; ++i) {
            u[2 * i] = _mm256_unpacklo_epi8(v[i], v[i + 8]);
            u[2 * i + 1] = _mm256_unpackhi_epi8(v[i], v[i + 8]);
        }
        BELLBOX_UNROLL
        for (int i = 0; i < 16; ++i) v[i] = u[i];
    }
}

// Ones in the first 16 bytes, zeros in the others: 16 bytes from 16 - count on keep `count`.
struct Kept {
    uint8_t bytes[32];
};
constexpr Kept make_kept() {
    Kept k{};
    for (int i = 0; i < 16; ++i) k.bytes[i] = 255;
    return k;
}
constexpr Kept kKept = make_kept();

inline void pack_pixels(const PixelArgs& a, const int8_t* codes, int64_t count, uint8_t* packed, uint8_t* vectors) {
    const int64_t pairs = a.tuples;
    for (int64_t q = 0; q < pairs; q += 16) {  // pair q: channels q and Q + q, which the last may lack
        const int64_t second = a.channels - pairs - q;
        const __m128i kept = load16(kKept.bytes + (second >= 16 ? 0 : 16 - second));
        const int8_t* from = codes + q;
        for (int64_t i = 0; i < count; ++i, from += a.channels) {  // pixel 32 h + 16 l + i to lane l of vector i of half h
            const __m128i other = second <= 0 ? _mm_setzero_si128() : _mm_and_si128(load16(from + pairs), kept);
            uint8_t* to = packed + 512 * (i / 32) + 32 * (i % 16) + 16 * (i / 16 % 2);
            _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm_or_si128(load16(from), _mm_slli_epi16(other, 2)));
        }
        for (int half = 0; half < 2; ++half) {
            __m256i v[16];
            BELLBOX_UNROLL
            for (int i = 0; i < 16; ++i) v[i] = load32(packed + 512 * half + 32 * i);
            transpose_bytes(v);
            BELLBOX_UNROLL
            for (int i = 0; i < 16; ++i) store32(vectors + 64 * (q + i) + 32 * half, v[i]);
        }
    }
    const __m256i digit_sums = twice(kTable.row[1 + 4]);
    for (int64_t s = 0; s < a.sum_planes; ++s) {  // behind the pairs: what lay there is of no use
        __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        for (int64_t q = kSumTuples * s; q < smaller(kSumTuples * (s + 1), pairs); ++q) {
            BELLBOX_UNROLL
            for (int half = 0; half < 2; ++half)
                sum[half] = _mm256_add_epi8(sum[half], _mm256_shuffle_epi8(digit_sums, load32(vectors + 64 * q + 32 * half)));
        }
        store32(vectors + 64 * (pairs + s), sum[0]), store32(vectors + 64 * (pairs + s) + 32, sum[1]);
    }
}

inline void sum_codes(const PixelArgs& a, const uint8_t* parts, Tile& tile) {
    const __m256i multiplier = _mm256_set1_epi32(a.product.act_multiplier);
    const __m256i weights = _mm256_set1_epi32(a.product.weights->shift);
    for (int half = 0; half < 2; ++half) {
        __m256i even = _mm256_setzero_si256(), odd = even;
        for (int64_t i = 0; i < a.places * a.sum_planes; ++i) {
            const __m256i bytes = load32(parts + kLanes * i + 32 * half);
            even = _mm256_add_epi16(even, _mm256_and_si256(bytes, _mm256_set1_epi16(0x00ff)));
            odd = _mm256_add_epi16(odd, _mm256_srli_epi16(bytes, 8));
        }
        // Of lane l: pixels 16 l + 0..7, and 16 l + 8..15.
        const __m256i low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);
        BELLBOX_UNROLL
        for (int i = 0; i < 4; ++i) {             // of levels, at the places inside
            int32_t* less = tile.less + 32 * half + 8 * i;
            const __m256i codes = _mm256_cvtepu16_epi32(half_of(i % 2 == 0 ? low : high, i / 2));
            const __m256i levels = _mm256_sub_epi32(_mm256_mullo_epi32(codes, multiplier), load32(less));
            store32(less, _mm256_mullo_epi32(levels, weights));
        }
    }
}

// ---- product ----

// Sums of lookups of kRows outputs in 16 bits. Of the bytes at even and odd places: odd, and even + 256 odd modulo 2^16,
// which costs an operation less than even.
struct Words {
    __m256i both[kRows][2], odd[kRows][2];
};

// Adds a run of lookups, an even number up to kRun. A function of its own, else the compiler keeps what is longer under way in
// registers, and the sums of bytes in memory. addresses: [lookups][8].
__attribute__((noinline)) void add_run(const uint8_t* operands, const uint16_t* addresses, int64_t lookups, Words& words) {
    const uint8_t* table = &kTable.row[0][0];
    __m256i bytes[kRows][2];
    BELLBOX_UNROLL
    for (int r = 0; r < kRows; ++r) bytes[r][0] = bytes[r][1] = _mm256_setzero_si256();
    const uint8_t* const end = operands + kLanes * lookups;
    for (; operands < end; operands += 2 * kLanes, addresses += 16) {
        BELLBOX_UNROLL
        for (int i = 0; i < 2; ++i) {
            const __m256i first = load32(operands + kLanes * i), second = load32(operands + kLanes * i + 32);
            BELLBOX_UNROLL
            for (int r = 0; r < kRows; ++r) {
                const __m256i row = twice(table + addresses[8 * i + r]);
                bytes[r][0] = _mm256_add_epi8(bytes[r][0], _mm256_shuffle_epi8(row, first));
                bytes[r][1] = _mm256_add_epi8(bytes[r][1], _mm256_shuffle_epi8(row, second));
                // One after the other: the compiler would look several up first, and spill them.
                __asm__("" : "+x"(bytes[r][0]), "+x"(bytes[r][1]));
            }
        }
    }
    BELLBOX_UNROLL
    for (int r = 0; r < kRows; ++r) {
        BELLBOX_UNROLL
        for (int half = 0; half < 2; ++half) {
            words.both[r][half] = _mm256_add_epi16(words.both[r][half], bytes[r][half]);
            words.odd[r][half] = _mm256_add_epi16(words.odd[r][half], _mm256_srli_epi16(bytes[r][half], 8));
        }
    }
}

// Lookups of kRows outputs: words [outputs][halves][2], of pixels 0..7 and 16..23 of a half, and of the others.
inline void look_up(const uint8_t* operands, const uint16_t* addresses, int64_t lookups, __m256i (*words)[2][2]) {
    Words sums;
    memset(&sums, 0, sizeof(sums));
    for (int64_t done = 0; done < lookups; done += kRun)
        add_run(operands + kLanes * done, addresses + 8 * done, smaller(kRun, lookups - done), sums);
    for (int r = 0; r < kRows; ++r)
        for (int half = 0; half < 2; ++half) {
            const __m256i odd = sums.odd[r][half], even = _mm256_sub_epi16(sums.both[r][half], _mm256_slli_epi16(odd, 8));
            words[r][half][0] = _mm256_unpacklo_epi16(even, odd);
            words[r][half][1] = _mm256_unpackhi_epi16(even, odd);
        }
}

// In each 128-bit lane 8 vectors of 8 words: word j of vector i to word i of vector j.
BELLBOX_INLINE void transpose_words(__m256i (&v)[8]) {
    BELLBOX_UNROLL
    for (int round = 0; round < 3; ++round) {
        __m256i u[8];
        BELLBOX_UNROLL
        for (int i = 0; i < 4; ++i) {
            u[2 * i] = _mm256_unpacklo_epi16(v[i], v[i + 4]);
            u[2 * i + 1] = _mm256_unpackhi_epi16(v[i], v[i + 4]);
        }
        BELLBOX_UNROLL
        for (int i = 0; i < 8; ++i) v[i] = u[i];
    }
}

// Sums of a piece of lookups of `outputs` outputs: 16-bit words [64 pixels][16], of which those outputs matter.
inline void look_up_block(const uint8_t* operands, const uint16_t* addresses, int64_t stride, int64_t lookups, int64_t outputs,
                          uint16_t* sums) {
    __m256i words[kOutputs][2][2];
    for (int64_t i = 0; i < kOutputs; i += kRows) {
        if (i < outputs)
            look_up(operands, addresses + i / 8 * 8 * stride + i % 8, lookups, words + i);
        else
            memset(words + i, 0, kRows * sizeof(words[0]));
    }
    for (int half = 0; half < 2; ++half)
        for (int part = 0; part < 2; ++part)
            for (int eight = 0; eight < kOutputs; eight += 8) {
                __m256i v[8];
                BELLBOX_UNROLL
                for (int i = 0; i < 8; ++i) v[i] = words[eight + i][half][part];
                transpose_words(v);
                uint16_t* to = sums + (32 * half + 8 * part) * kOutputs + eight;
                BELLBOX_UNROLL
                for (int i = 0; i < 8; ++i) {
                    _mm_store_si128(reinterpret_cast<__m128i*>(to + i * kOutputs), _mm256_castsi256_si128(v[i]));
                    _mm_store_si128(reinterpret_cast<__m128i*>(to + (16 + i) * kOutputs), _mm256_extracti128_si256(v[i], 1));
                }
            }
}

// Eight floats of which only `count` may be read.
BELLBOX_INLINE __m256 load_some(const float* from, int64_t count) {
    if (count >= 8) return _mm256_loadu_ps(from);
    alignas(32) float some[8] = {};
    for (int64_t i = 0; i < count; ++i) some[i] = from[i];
    return _mm256_load_ps(some);
}

inline void multiply(const PixelArgs& a, const Tile& tile, const uint8_t* operands, int64_t first, int64_t block) {
    alignas(64) uint16_t sums[kLanes * kOutputs];
    alignas(64) int32_t wide[kLanes * kOutputs];  // where the lookups are more than a piece
    const bool whole = a.lookups <= kPieceLookups;
    const uint16_t* addresses = a.addresses + 2 * block * 8 * a.lookups;
    const int64_t outputs = a.product.weights->n - kOutputs * block;
    for (int64_t done = 0; done < a.lookups; done += kPieceLookups) {
        look_up_block(operands + done * kLanes, addresses + 8 * done, a.lookups, smaller(kPieceLookups, a.lookups - done),
                      outputs, sums);
        for (int i = 0; !whole && i < kLanes * kOutputs; ++i) wide[i] = done == 0 ? sums[i] : wide[i] + sums[i];
    }
    LinearArgs p = a.product;
    p.row_scales = tile.row_scales;
    p.out = static_cast<char*>(p.out) + first * p.ldo * (p.out_type == Type::f32 ? 4 : 2);
    const product::Epilogue epilogue(p, block);
    const __m256i multiplier = _mm256_set1_epi32(p.act_multiplier * p.weights->multiplier);
    const int32_t* less = a.less + kOutputs * block;
    const float* add = a.add == nullptr ? nullptr : a.add + first * p.ldo + epilogue.column;
    for (int64_t pixel = 0; pixel < tile.count; ++pixel) {
        __m256 y[2];
        BELLBOX_UNROLL
        for (int h = 0; h < 2; ++h) {
            const int64_t at = pixel * kOutputs + 8 * h;
            const __m256i found = whole ? _mm256_cvtepu16_epi32(load16(sums + at)) : load32(wide + at);
            const __m256i sum = _mm256_mullo_epi32(found, multiplier);
            const __m256i inside = _mm256_sub_epi32(sum, load32(less + tile.border[pixel] * a.less_stride + 8 * h));
            y[h] = epilogue.rounded(p, pixel, _mm256_sub_epi32(inside, _mm256_set1_epi32(tile.less[pixel])), h);
            if (add != nullptr) y[h] = _mm256_add_ps(y[h], load_some(add + pixel * p.ldo + 8 * h, epilogue.width - 8 * h));
            if (a.relu) y[h] = _mm256_max_ps(_mm256_setzero_ps(), y[h]);  // in this order NaN stays
        }
        epilogue.store(p, pixel, y[0], y[1]);
    }
}

}  // namespace pixels
}  // namespace avx2
}  // namespace
}  // namespace bellbox
