// The product of 1-bit weights with 1-bit activations with AVX-512: and, then count bits (VPOPCNTD).
//
// The weights stay in the layout of all kernels: in the one bit field of 1-bit weights, the 32 bits of a lane belong
// to one output and 32 inputs of its block, bit 8 c + f of vector j being input 4 (2 f + j) + c. The bits of an
// activation are put into the same order, one 32-bit word for all 16 lanes; so again there are no horizontal sums.
//
// With codes in {0, 1} on both sides, sum(level * code) = multiplier * count - shift * sum(code), where the last sum
// belongs to the weights and was made when they were packed.
//
// Floor: three operations for 512 products, 1.5 cycles at two a cycle, five times the rate of vpdpbusd on Zen 4; one
// row: reading the weights.
#pragma once

#include "kernels/avx512/linear.h"

namespace bellbox {
namespace {
namespace avx512 {
namespace binary {

constexpr int64_t kRowBlock = 256;  // rows whose bits are made at a time: 128 KB at 4096 inputs
constexpr int kRows = 4, kTiles = 4;

inline bool serves(const LinearArgs& a) { return a.weights->bits == 1 && a.act_n == 2; }

// Where byte 32 j + 8 c + f of a block of 64 columns comes from.
struct Order {
    int8_t column[64];
};
constexpr Order make_order() {
    Order o{};
    for (int j = 0; j < 2; ++j)
        for (int c = 0; c < 4; ++c)
            for (int f = 0; f < 8; ++f) o.column[32 * j + 8 * c + f] = static_cast<int8_t>(4 * (2 * f + j) + c);
    return o;
}
alignas(64) constexpr Order kOrder = make_order();

// Levels to bits: 1 where the level is that of code 1. Padding columns may come out as either: weights are 0 there.
inline void make_bits(const LinearArgs& a, int64_t row, int64_t blocks, uint64_t* bits) {
    const __m512i order = _mm512_load_si512(kOrder.column);
    const __m512i upper = _mm512_set1_epi8(static_cast<char>(a.act_multiplier - a.act_shift));
    const int8_t* levels = a.levels + row * a.ldl;
    for (int64_t b = 0; b < blocks; ++b) {
        const __m512i ordered = _mm512_permutexvar_epi8(order, _mm512_loadu_si512(levels + 64 * b));
        bits[b] = _cvtmask64_u64(_mm512_cmpeq_epi8_mask(ordered, upper));
    }
}

// Sixteen sums of code * code to the output.
struct Counts {
    product::Epilogue epilogue;
    __m512i multiplier, less;

    BELLBOX_INLINE Counts(const LinearArgs& a, int64_t tile)
        : epilogue(a, tile), multiplier(_mm512_set1_epi32(a.act_multiplier)) {
        const __m512i sums = _mm512_maskz_loadu_epi32(epilogue.mask, a.weights->code_sums + epilogue.column);
        less = _mm512_mullo_epi32(sums, _mm512_set1_epi32(a.act_shift));
    }
    BELLBOX_INLINE void operator()(const LinearArgs& a, int64_t row, __m512i count) const {
        epilogue(a, row, _mm512_sub_epi32(_mm512_mullo_epi32(count, multiplier), less));
    }
};

template <int ROWS, int TILES>
void multiply(const LinearArgs& a, const uint64_t* bits, int64_t blocks, int64_t row, int64_t first) {
    const int64_t words = 2 * blocks, tile_bytes = 64 * words;
    const uint8_t* data = a.weights->data + first * tile_bytes;
    const char* x = reinterpret_cast<const char*>(bits);
    __m512i acc[ROWS][TILES];
    for (auto& r : acc)
        for (auto& t : r) t = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int64_t i = 0; i < words; ++i) {
        __m512i code[TILES];
        BELLBOX_UNROLL
        for (int t = 0; t < TILES; ++t) code[t] = _mm512_loadu_si512(data + t * tile_bytes + 64 * i);
        BELLBOX_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            const __m512i word = product::broadcast4(reinterpret_cast<const int8_t*>(x + 4 * (r * words + i)));
            BELLBOX_UNROLL
            for (int t = 0; t < TILES; ++t)
                acc[r][t] = _mm512_add_epi32(acc[r][t], _mm512_popcnt_epi32(_mm512_and_si512(code[t], word)));
        }
    }
    BELLBOX_UNROLL
    for (int t = 0; t < TILES; ++t) {
        const Counts counts(a, first + t);
        BELLBOX_UNROLL
        for (int r = 0; r < ROWS; ++r) counts(a, row + r, acc[r][t]);
    }
}

template <int TILES>
void multiply_rows(const LinearArgs& a, const uint64_t* bits, int64_t blocks, int64_t begin, int64_t end,
                   int64_t tile) {
    int64_t row = begin;
    for (; row + kRows <= end; row += kRows, bits += kRows * blocks)
        multiply<kRows, TILES>(a, bits, blocks, row, tile);
    switch (end - row) {
        case 1: return multiply<1, TILES>(a, bits, blocks, row, tile);
        case 2: return multiply<2, TILES>(a, bits, blocks, row, tile);
        case 3: return multiply<3, TILES>(a, bits, blocks, row, tile);
        default: return;
    }
}

inline void linear(const LinearArgs& a, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end) {
    const int64_t blocks = (a.weights->k + 63) / 64, rounds = (m_end - m_begin + kRowBlock - 1) / kRowBlock;
    const Scratch scratch(2 * blocks * smaller(m_end - m_begin, kRowBlock));
    uint64_t* bits = reinterpret_cast<uint64_t*>(scratch.data);
    for (int64_t round = 0; round < rounds; ++round) {
        const int64_t begin = m_begin + round * kRowBlock, end = smaller(begin + kRowBlock, m_end);
        for (int64_t row = begin; row < end; ++row) make_bits(a, row, blocks, bits + (row - begin) * blocks);
        int64_t tile = tile_begin;
        if (end - begin > kRows)  // fewer read their weights once: tile by tile they come as one stream
            for (; tile + kTiles <= tile_end; tile += kTiles)
                multiply_rows<kTiles>(a, bits, blocks, begin, end, tile);
        for (; tile < tile_end; ++tile) multiply_rows<1>(a, bits, blocks, begin, end, tile);
    }
}

}  // namespace binary
}  // namespace avx512
}  // namespace
}  // namespace bellbox
