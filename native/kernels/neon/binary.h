// The product of 1-bit weights with 1-bit activations with NEON: and, then CNT, which counts the bits of each byte.
//
// The weights stay in the layout of all kernels: the 32 bits of a dword belong to one output and 32 inputs of its block,
// bit 8 c + f of vector j being input 4 (2 f + j) + c. The bits of an activation are put into the same order, one dword
// for all outputs; so there are no horizontal sums until the end. kernels/avx512/binary.h says why codes are enough.
//
// Floor: and, CNT and an addition (UDOT by ones, where it is there) for 128 products; one row: reading the weights.
#pragma once

#include <arm_neon.h>

#include "kernels/neon/linear.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {
namespace binary {

constexpr int kRows = 4;                // registers: 16 sums, 4 of weights
constexpr int64_t kRowBlock = 64;       // rows whose bits are made before the weights are read

inline bool serves(const LinearArgs& a) { return a.weights->bits == 1 && a.act_n == 2; }

// Counts of four outputs.
#ifdef __ARM_FEATURE_DOTPROD
constexpr int64_t kRun = INT64_MAX / 2;
struct Four {
    uint32x4_t of = vdupq_n_u32(0);
    BELLBOX_INLINE void add(uint8x16_t counts) { of = vdotq_u32(of, counts, vdupq_n_u8(1)); }
    BELLBOX_INLINE int32x4_t total() const { return vreinterpretq_s32_u32(of); }
};
#else
constexpr int64_t kRun = 31;            // vectors whose counts, at most 8 a byte, are added up in bytes
struct Four {
    uint8x16_t of = vdupq_n_u8(0);
    BELLBOX_INLINE void add(uint8x16_t counts) { of = vaddq_u8(of, counts); }
    BELLBOX_INLINE int32x4_t total() const { return vreinterpretq_s32_u32(vpaddlq_u16(vpaddlq_u8(of))); }
};
#endif

// Of a block's 64 levels, 1 where the level is that of code 1: words of vectors 0 and 1. Bytes 8 f and on are field f, of
// which the first four belong to vector 0. Padding columns may come out as either: weights are 0 there.
BELLBOX_INLINE void masks_of_block(const int8_t* levels, int8x16_t upper, uint32_t* low, uint32_t* high) {
    uint8x16_t all = vdupq_n_u8(0);
    BELLBOX_UNROLL
    for (int i = 0; i < 4; ++i) {
        const uint8x16_t bit = vcombine_u8(vdup_n_u8(static_cast<uint8_t>(1 << 2 * i)), vdup_n_u8(static_cast<uint8_t>(2 << 2 * i)));
        all = vorrq_u8(all, vandq_u8(vceqq_s8(vld1q_s8(levels + 16 * i), upper), bit));
    }
    const uint32x2_t words = vreinterpret_u32_u8(vorr_u8(vget_low_u8(all), vget_high_u8(all)));
    *low = vget_lane_u32(words, 0), *high = vget_lane_u32(words, 1);
}

// masks: [words][ROWS] of a row's words, 2 a block.
template <int ROWS>
__attribute__((noinline)) void multiply(const LinearArgs& a, const uint32_t* masks, int64_t words, int64_t row, int64_t tile) {
    const uint8_t* data = a.weights->data + tile * words * 64;
    int32_t sums[ROWS][16] = {};
    for (int64_t begin = 0; begin < words; begin += kRun) {
        const int64_t end = words - begin < kRun ? words : begin + kRun;
        Four acc[ROWS][4];
        for (int64_t i = begin; i < end; ++i, data += 64) {
            __builtin_prefetch(data + product::kAhead);
            BELLBOX_UNROLL
            for (int q = 0; q < 4; ++q) {
                const uint8x16_t bits = vld1q_u8(data + 16 * q);
                BELLBOX_UNROLL
                for (int r = 0; r < ROWS; ++r)
                    acc[r][q].add(vcntq_u8(vandq_u8(bits, vreinterpretq_u8_u32(vdupq_n_u32(masks[i * ROWS + r])))));
            }
        }
        BELLBOX_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            BELLBOX_UNROLL
            for (int q = 0; q < 4; ++q) product::add_to(sums[r] + 4 * q, acc[r][q].total());
        }
    }
    // Sixteen sums of code * code to the output: sum(level * code) = multiplier * count - shift * sum(code).
    const product::Epilogue epilogue(a, tile);
    int32_t code_sums[16] = {};
    std::memcpy(code_sums, a.weights->code_sums + epilogue.column, static_cast<size_t>(epilogue.width) * 4);
    for (int r = 0; r < ROWS; ++r) {
        for (int i = 0; i < 16; ++i) sums[r][i] = a.act_multiplier * sums[r][i] - a.act_shift * code_sums[i];
        epilogue(a, row + r, sums[r]);
    }
}

// Rows [row, row + ROWS) of the masks of a group of kRows.
template <int ROWS>
void make_masks(const LinearArgs& a, int64_t row, int64_t blocks, uint32_t* masks) {
    const int8x16_t upper = vdupq_n_s8(static_cast<int8_t>(a.act_multiplier - a.act_shift));
    for (int r = 0; r < ROWS; ++r)
        for (int64_t b = 0; b < blocks; ++b)
            masks_of_block(a.levels + (row + r) * a.ldl + 64 * b, upper, masks + 2 * b * ROWS + r, masks + (2 * b + 1) * ROWS + r);
}

// Calls f, whose argument says so as a type, for the rows of a group: kRows of them, or what is left.
template <int ROWS>
struct Count {
    static constexpr int rows = ROWS;
};
template <typename F>
BELLBOX_INLINE void with_count(int64_t rows, const F& f) {
    switch (rows) {
        case 1: return f(Count<1>());
        case 2: return f(Count<2>());
        case 3: return f(Count<3>());
        default: return f(Count<kRows>());
    }
}

// Some rows share each tile of the weights while it is near.
inline void linear(const LinearArgs& a, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end) {
    const int64_t blocks = (a.weights->k + 63) / 64, words = 2 * blocks;
    const Scratch scratch(words * smaller(kRowBlock, m_end - m_begin));
    uint32_t* const masks = reinterpret_cast<uint32_t*>(scratch.data);
    for (int64_t begin = m_begin; begin < m_end; begin += kRowBlock) {
        const int64_t end = smaller(begin + kRowBlock, m_end);
        for (int64_t row = begin; row < end; row += kRows)
            with_count(end - row, [&](auto some) { make_masks<some.rows>(a, row, blocks, masks + (row - begin) * words); });
        for (int64_t tile = tile_begin; tile < tile_end; ++tile)
            for (int64_t row = begin; row < end; row += kRows)
                with_count(end - row, [&](auto some) { multiply<some.rows>(a, masks + (row - begin) * words, words, row, tile); });
    }
}

}  // namespace binary

// Which of the products serves.
inline bool counts(const LinearArgs& a, int64_t) { return binary::serves(a); }

inline void linear(const LinearArgs& a, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end) {
    if (m_begin >= m_end) return;
    if (binary::serves(a)) return binary::linear(a, m_begin, m_end, tile_begin, tile_end);
    switch (a.weights->bits) {
        case 1: return product::linear<1>(a, m_begin, m_end, tile_begin, tile_end);
        case 2: return product::linear<2>(a, m_begin, m_end, tile_begin, tile_end);
        case 3: return product::linear<3>(a, m_begin, m_end, tile_begin, tile_end);
        default: return product::linear<4>(a, m_begin, m_end, tile_begin, tile_end);
    }
}

}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
