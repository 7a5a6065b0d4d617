// The integer product with AMX int8, for many rows; few rows are left to VNNI.
//
// One tile instruction multiplies 16 rows x 64 inputs of levels (signed) with 64 inputs x 16 outputs of codes
// (unsigned). A block of weights, unpacked as VNNI wants it, is such an operand as it lies. 32 rows x 32 outputs are
// worked on at a time: four tiles of sums, two of levels, two of codes. Tiles are read from the first-level cache as
// far as possible, since two operands from the second halve the rate: codes of 32 outputs x 512 inputs are unpacked to
// 16 KB and serve all rows of a round, whose levels take at most 128 KB for these inputs.
//
// NOT YET TIMED ON A PROCESSOR WITH AMX: the instructions are proved where a signal handler carries them out
// (tests/check_amx.h), and a processor that has them is first asked whether it comes to the same (self_check.h).
#pragma once

#include "kernels/amx/tiles.h"
#include "kernels/avx512/linear.h"

namespace bellbox {
namespace {
namespace amx {

using avx512::product::Epilogue;

constexpr int64_t kFewRows = 4;     // left to VNNI
constexpr int64_t kGroup = 32;      // rows of two tiles
constexpr int64_t kRowBlock = 256;  // rows that share unpacked codes
constexpr int64_t kDepth = 8;       // blocks of 64 inputs that are unpacked at a time

inline TileConfig whole_tiles() {
    TileConfig config;
    for (int t = 0; t < 8; ++t) config.columns[t] = 64, config.rows[t] = 16;
    return config;
}

// Sums of 32 rows and TILES x 16 outputs over `blocks` blocks. codes: [16 * blocks groups][TILES][64 bytes].
template <int TILES>
inline void multiply(const int8_t* levels, int64_t ldl, const uint8_t* codes, int64_t blocks, bool first, int32_t* sums) {
    constexpr int64_t stride = 64 * TILES;  // of sums, in bytes, and of the groups of codes
    char* const c = reinterpret_cast<char*>(sums);
    if (first) {
        zero<0>(), zero<2>();
        if (TILES == 2) zero<1>(), zero<3>();
    } else {
        load<0>(c, stride), load<2>(c + 16 * stride, stride);
        if (TILES == 2) load<1>(c + 64, stride), load<3>(c + 64 + 16 * stride, stride);
    }
    for (int64_t b = 0; b < blocks; ++b, levels += 64, codes += 16 * stride) {
        load<4>(levels, ldl);
        load<6>(codes, stride);
        multiply<0, 4, 6>();
        if (TILES == 2) {
            load<7>(codes + 64, stride);
            multiply<1, 4, 7>();
        }
        load<5>(levels + 16 * ldl, ldl);
        multiply<2, 5, 6>();
        if (TILES == 2) multiply<3, 5, 7>();
    }
    store<0>(c, stride), store<2>(c + 16 * stride, stride);
    if (TILES == 2) store<1>(c + 64, stride), store<3>(c + 64 + 16 * stride, stride);
}

template <int BITS, int TILES>
void outputs(const LinearArgs& a, int64_t begin, int64_t end, int64_t tile, uint8_t* codes, int8_t* padded,
             int32_t* sums) {
    using L = Layout<BITS>;
    const int64_t blocks = (a.weights->k + 63) / 64, tile_bytes = blocks * L::bytes;
    const uint8_t* data = a.weights->data + tile * tile_bytes;
    for (int64_t from = 0; from < blocks; from += kDepth) {
        const int64_t size = smaller(kDepth, blocks - from);
        avx512::product::unpack<BITS>(data + from * L::bytes, tile_bytes, TILES, size, codes);
        for (int64_t row = begin; row < end; row += kGroup) {
            const int8_t* levels = a.levels + row * a.ldl + 64 * from;
            int32_t* to = sums + (row - begin) * TILES * 16;
            const int64_t rows = smaller(kGroup, end - row);
            if (rows == kGroup) {
                multiply<TILES>(levels, a.ldl, codes, size, from == 0, to);
                continue;
            }
            for (int64_t r = 0; r < rows; ++r) memcpy(padded + 64 * kDepth * r, levels + r * a.ldl, static_cast<size_t>(64 * size));
            multiply<TILES>(padded, 64 * kDepth, codes, size, from == 0, to);
        }
    }
    for (int t = 0; t < TILES; ++t) {
        const Epilogue epilogue(a, tile + t);
        for (int64_t r = 0; r < end - begin; ++r)
            epilogue(a, begin + r, _mm512_load_si512(sums + (r * TILES + t) * 16));
    }
}

template <int BITS>
void linear(const LinearArgs& a, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end) {
    alignas(64) uint8_t codes[kDepth * 16 * 2 * 64];
    alignas(64) int8_t padded[kGroup * kDepth * 64] = {};  // levels of the last rows; what is past them is not used
    alignas(64) int32_t sums[kRowBlock * 2 * 16];
    load_config(whole_tiles());
    for (int64_t begin = m_begin; begin < m_end; begin += kRowBlock) {
        const int64_t end = smaller(begin + kRowBlock, m_end);
        int64_t tile = tile_begin;
        for (; tile + 2 <= tile_end; tile += 2) outputs<BITS, 2>(a, begin, end, tile, codes, padded, sums);
        if (tile < tile_end) outputs<BITS, 1>(a, begin, end, tile, codes, padded, sums);
    }
    release();
}

}  // namespace amx
}  // namespace
}  // namespace bellbox
