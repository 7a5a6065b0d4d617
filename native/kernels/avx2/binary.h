// The product of 1-bit weights with 1-bit activations with AVX2, for few rows: and, then count bits by two look-ups a byte.
//
// The weights stay in the layout of all kernels: the 32 bits of a dword belong to one output and 32 inputs of its block,
// bit 8 c + f of vector j being input 4 (2 f + j) + c. The bits of an activation are put into the same order, one dword
// for all outputs; so there are no horizontal sums until the end. kernels/avx512/binary.h says why codes are enough.
//
// Floor: two and, two vpshufb, two additions and a shift that rows share, for 256 products; one row: reading the weights.
#pragma once

#include "kernels/avx2/linear.h"

namespace bellbox {
namespace {
namespace avx2 {
namespace binary {

constexpr int kRows = 4;                // more are looked up (kernels/avx2/lookup.h)
constexpr int64_t kRun = 31;            // vectors whose counts, at most 8 a byte, are added up in bytes

inline bool serves(const LinearArgs& a) { return a.weights->bits == 1 && a.act_n == 2; }

// Sixteen sums of code * code to the output: sum(level * code) = multiplier * count - shift * sum(code).
struct Counts {
    product::Epilogue epilogue;
    __m256i less[2];

    BELLBOX_INLINE Counts(const LinearArgs& a, int64_t tile) : epilogue(a, tile) {
        alignas(32) int32_t sums[16] = {};
        memcpy(sums, a.weights->code_sums + epilogue.column, static_cast<size_t>(epilogue.width) * 4);
        for (int h = 0; h < 2; ++h)
            less[h] = _mm256_mullo_epi32(product::load32(sums + 8 * h), _mm256_set1_epi32(a.act_shift));
    }
    BELLBOX_INLINE void operator()(const LinearArgs& a, int64_t row, const int32_t* counts) const {
        alignas(32) int32_t sums[16];
        for (int h = 0; h < 2; ++h) {
            const __m256i all = _mm256_mullo_epi32(product::load32(counts + 8 * h), _mm256_set1_epi32(a.act_multiplier));
            product::store32(sums + 8 * h, _mm256_sub_epi32(all, less[h]));
        }
        epilogue(a, row, sums);
    }
};

// Of 32 levels of inputs, those of a half of a block, to 32 bits, 1 where the level is that of code 1: bit 4 p + f is input
// 8 f + p. Padding columns may come out as either: weights are 0 there.
BELLBOX_INLINE uint32_t bits_of_half(const int8_t* levels, __m256i upper) {
    const __m256i halves = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    const __m256i by_four = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
                                             0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i turned = _mm256_permutevar8x32_epi32(product::load32(levels), halves);
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_shuffle_epi8(turned, by_four), upper)));
}

// Of a block's 64 levels, nibbles of its halves: first those of fields 0 to 3, then of fields 4 to 7. Nibble p = 4 j + c.
BELLBOX_INLINE uint64_t nibbles_of_block(const int8_t* levels, __m256i upper) {
    return bits_of_half(levels, upper) | static_cast<uint64_t>(bits_of_half(levels + 32, upper)) << 32;
}

// Of all blocks of a row.
inline void make_nibbles(const LinearArgs& a, int64_t row, int64_t blocks, uint64_t* nibbles) {
    const __m256i upper = _mm256_set1_epi8(static_cast<char>(a.act_multiplier - a.act_shift));
    const int8_t* levels = a.levels + row * a.ldl;
    for (int64_t b = 0; b < blocks; ++b, levels += 64) nibbles[b] = nibbles_of_block(levels, upper);
}

// Nibbles of 16 bits, in which the four of a vector j lie, to bytes: nibble c to byte c.
BELLBOX_INLINE uint32_t spread(uint32_t nibbles) {
    const uint32_t pairs = (nibbles | nibbles << 8) & 0x00ff00ffu;
    return (pairs | pairs << 4) & 0x0f0f0f0fu;
}

// What a row's bits are for vector j: masks of the lower nibbles of bytes, and of the upper ones.
struct Masks {
    uint32_t low, high;
};
BELLBOX_INLINE Masks masks_of(uint64_t nibbles, int j) {
    return {spread(static_cast<uint32_t>(nibbles >> 16 * j) & 0xffff), spread(static_cast<uint32_t>(nibbles >> (32 + 16 * j)) & 0xffff)};
}

BELLBOX_INLINE __m256i counts_of_nibbles() {
    return _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
}

// masks: [words][ROWS] of a row's words, 2 a block.
template <int ROWS>
void multiply(const LinearArgs& a, const Masks* masks, int64_t words, int64_t row, int64_t tile) {
    const __m256i table = counts_of_nibbles(), nibble = _mm256_set1_epi8(15);
    const uint8_t* data = a.weights->data + tile * words * 64;
    alignas(32) int32_t sums[ROWS][16] = {};
    for (int64_t begin = 0; begin < words; begin += kRun) {
        const int64_t end = smaller(begin + kRun, words);
        __m256i acc[ROWS][2];
        BELLBOX_UNROLL
        for (int r = 0; r < ROWS; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
        for (int64_t i = begin; i < end; ++i, data += 64) {
            product::prefetch(data + product::kAhead);
            BELLBOX_UNROLL
            for (int h = 0; h < 2; ++h) {
                const __m256i low = product::load32(data + 32 * h);
                const __m256i high = _mm256_and_si256(_mm256_srli_epi16(low, 4), nibble);
                BELLBOX_UNROLL
                for (int r = 0; r < ROWS; ++r) {
                    const Masks& m = masks[i * ROWS + r];
                    const __m256i one = _mm256_and_si256(low, _mm256_set1_epi32(static_cast<int>(m.low)));
                    const __m256i two = _mm256_and_si256(high, _mm256_set1_epi32(static_cast<int>(m.high)));
                    acc[r][h] = _mm256_add_epi8(acc[r][h], _mm256_add_epi8(_mm256_shuffle_epi8(table, one),
                                                                           _mm256_shuffle_epi8(table, two)));
                }
            }
        }
        BELLBOX_UNROLL
        for (int r = 0; r < ROWS; ++r)
            for (int h = 0; h < 2; ++h)
                product::widen(_mm256_maddubs_epi16(acc[r][h], _mm256_set1_epi8(1)), sums[r] + 8 * h);
    }
    const Counts counts(a, tile);
    for (int r = 0; r < ROWS; ++r) counts(a, row + r, sums[r]);
}

template <int ROWS>
void linear_of(const LinearArgs& a, int64_t row, int64_t tile_begin, int64_t tile_end) {
    const int64_t blocks = (a.weights->k + 63) / 64;
    const Scratch scratch(2 * blocks + 4 * blocks * ROWS);
    uint64_t* const nibbles = reinterpret_cast<uint64_t*>(scratch.data);
    Masks* const masks = reinterpret_cast<Masks*>(nibbles + blocks);
    for (int r = 0; r < ROWS; ++r) {
        make_nibbles(a, row + r, blocks, nibbles);
        for (int64_t i = 0; i < 2 * blocks; ++i) masks[i * ROWS + r] = masks_of(nibbles[i / 2], static_cast<int>(i % 2));
    }
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) multiply<ROWS>(a, masks, 2 * blocks, row, tile);
}

inline void linear(const LinearArgs& a, int64_t row, int64_t rows, int64_t tile_begin, int64_t tile_end) {
    switch (rows) {
        case 1: return linear_of<1>(a, row, tile_begin, tile_end);
        case 2: return linear_of<2>(a, row, tile_begin, tile_end);
        case 3: return linear_of<3>(a, row, tile_begin, tile_end);
        default: return linear_of<4>(a, row, tile_begin, tile_end);
    }
}

}  // namespace binary
}  // namespace avx2
}  // namespace
}  // namespace bellbox
