// The integer product with WebAssembly's 128-bit vectors, in two ways that give the same integers.
//
// `pairs`: codes are cut out of two bytes at a time, so that a vector holds columns 0 and 2 (or 1 and 3) of four outputs as
// 16-bit numbers; i32x4.dot_i16x8 multiplies them with the same columns of the input. Any levels; 8 instructions for 16
// products.
//
// `lookup`: half a byte is the codes of 4 / bits columns, and a table of 16 bytes their product with the input, which
// i8x16.swizzle reads for 16 outputs at once. Of 1 and 2 bits with few levels, whose codes (not levels) are multiplied:
// what the zero point adds follows from the sum of the weights' codes.
#pragma once

#include <wasm_simd128.h>

#include <vector>

#include "kernels/inline.h"
#include "kernels/layout.h"
#include "kernels/portable/linear.h"

namespace bellbox {
namespace {
namespace wasm {

// Sixteen sums of a tile, in the order of its outputs, to what is stored.
struct Sums {
    v128_t parts[4];
};

inline void put(const Sums& sums, const LinearArgs& a, int64_t row, int64_t tile) {
    const Weights& w = *a.weights;
    const int64_t first = 16 * tile, width = smaller(16, w.n - first);
    if (width < 16 || a.out_type != Type::f32) {
        int32_t each[16];
        for (int p = 0; p < 4; ++p) wasm_v128_store(each + 4 * p, sums.parts[p]);
        for (int64_t i = 0; i < width; ++i) store(a.out, a.out_type, row * a.ldo + first + i, epilogue(each[i], a, row, first + i));
        return;
    }
    // As `epilogue` says.
    const v128_t multiplier = wasm_i32x4_splat(w.multiplier), less = wasm_i32x4_splat(w.shift * a.sums[row]);
    const v128_t act_scale = wasm_f32x4_splat(a.act_scale), row_scale = wasm_f32x4_splat(a.row_scales[row]);
    float* const out = static_cast<float*>(a.out) + row * a.ldo + first;
    for (int p = 0; p < 4; ++p) {
        const v128_t exact = wasm_i32x4_sub(wasm_i32x4_mul(sums.parts[p], multiplier), less);
        const v128_t scale = wasm_f32x4_mul(wasm_v128_load(w.scale + first + 4 * p), act_scale);
        v128_t y = wasm_f32x4_mul(wasm_f32x4_mul(wasm_f32x4_convert_i32x4(exact), scale), row_scale);
        if (w.bias != nullptr) y = wasm_f32x4_add(y, wasm_v128_load(w.bias + first + 4 * p));
        wasm_v128_store(out + 4 * p, y);
    }
}

namespace pairs {

// Of each four levels of a row, columns 0 and 2, then 1 and 3, as int16.
inline void prepare(const int8_t* levels, int64_t columns, int32_t* out) {
    for (int64_t i = 0; i < columns; i += 16, out += 8) {
        const v128_t all = wasm_v128_load(levels + i);
        const v128_t even = wasm_i16x8_shr(wasm_i16x8_shl(all, 8), 8), odd = wasm_i16x8_shr(all, 8);
        wasm_v128_store(out, wasm_i32x4_shuffle(even, odd, 0, 4, 1, 5));
        wasm_v128_store(out + 4, wasm_i32x4_shuffle(even, odd, 2, 6, 3, 7));
    }
}

// sums[row][part] += of `blocks` blocks, `stride` bytes each, whose codes have WIDTH bits here; PARTS vectors of 4 outputs.
template <int WIDTH, int ROWS, int PARTS>
inline void add(const uint8_t* tile, int64_t stride, int64_t blocks, const int32_t* levels, int64_t ldl, v128_t (*sums)[PARTS]) {
    constexpr int vectors = 2 * WIDTH, fields = 8 / WIDTH;
    const v128_t mask = wasm_i16x8_splat((1 << WIDTH) - 1);
    v128_t local[ROWS][PARTS];
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PARTS; ++p) local[r][p] = sums[r][p];
    for (int64_t b = 0; b < blocks; ++b, tile += stride, levels += 32)
#pragma clang loop unroll(disable)
        for (int j = 0; j < vectors; ++j) {
            v128_t bytes[PARTS];
            for (int p = 0; p < PARTS; ++p) bytes[p] = wasm_v128_load(tile + 64 * j + 16 * p);
            const int32_t* const group = levels + 2 * j;
#pragma clang loop unroll(full)
            for (int f = 0; f < fields; ++f) {
                v128_t even[PARTS], odd[PARTS];
                for (int p = 0; p < PARTS; ++p) {
                    even[p] = wasm_v128_and(wasm_u16x8_shr(bytes[p], f * WIDTH), mask);
                    odd[p] = wasm_v128_and(wasm_u16x8_shr(bytes[p], 8 + f * WIDTH), mask);
                }
                for (int r = 0; r < ROWS; ++r) {
                    const int32_t* const pair = group + r * ldl + 2 * vectors * f;
                    const v128_t first = wasm_v128_load32_splat(pair), second = wasm_v128_load32_splat(pair + 1);
                    for (int p = 0; p < PARTS; ++p) {
                        local[r][p] = wasm_i32x4_add(local[r][p], wasm_i32x4_dot_i16x8(even[p], first));
                        local[r][p] = wasm_i32x4_add(local[r][p], wasm_i32x4_dot_i16x8(odd[p], second));
                    }
                }
            }
        }
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PARTS; ++p) sums[r][p] = local[r][p];
}

template <int BITS, int ROWS, int PARTS>
inline void sum(const uint8_t* tile, int64_t blocks, const int32_t* levels, int64_t ldl, Sums* out, int part) {
    constexpr int64_t stride = Layout<BITS>::bytes;
    v128_t low[ROWS][PARTS] = {}, high[ROWS][PARTS] = {};
    add<Layout<BITS>::width, ROWS, PARTS>(tile + 16 * part, stride, blocks, levels, ldl, low);
    if constexpr (BITS == 3) add<1, ROWS, PARTS>(tile + 256 + 16 * part, stride, blocks, levels, ldl, high);
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < PARTS; ++p) out[r].parts[part + p] = BITS == 3 ? wasm_i32x4_add(low[r][p], wasm_i32x4_shl(high[r][p], 2)) : low[r][p];
}

template <int BITS>
inline void linear(const LinearArgs& a, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end) {
    const Weights& w = *a.weights;
    const int64_t blocks = (w.k + 63) / 64, ldl = 32 * blocks;
    std::vector<int32_t> levels(static_cast<size_t>((m_end - m_begin) * ldl));
    for (int64_t i = m_begin; i < m_end; ++i) prepare(a.levels + i * a.ldl, 64 * blocks, levels.data() + (i - m_begin) * ldl);
    for (int64_t t = tile_begin; t < tile_end; ++t) {
        const uint8_t* const tile = w.data + t * blocks * Layout<BITS>::bytes;
        const int32_t* from = levels.data();
        int64_t i = m_begin;
        for (; i + 4 <= m_end; i += 4, from += 4 * ldl) {
            Sums sums[4];
            sum<BITS, 4, 2>(tile, blocks, from, ldl, sums, 0);
            sum<BITS, 4, 2>(tile, blocks, from, ldl, sums, 2);
            for (int r = 0; r < 4; ++r) put(sums[r], a, i + r, t);
        }
        for (; i < m_end; ++i, from += ldl) {
            Sums sums;
            sum<BITS, 1, 4>(tile, blocks, from, ldl, &sums, 0);
            put(sums, a, i, t);
        }
    }
}

}  // namespace pairs

namespace lookup {

// Eight lookups are added up in bytes.
template <int BITS>
constexpr int kMostLevels = 1 + 255 / (8 * 4 / BITS * ((1 << BITS) - 1));

inline bool serves(const LinearArgs& a) {
    return (a.weights->bits == 1 && a.act_n <= kMostLevels<1>) || (a.weights->bits == 2 && a.act_n <= kMostLevels<2>);
}

// For each column of half a byte, the products of an input's code with what the half says of it.
template <int BITS>
struct Products {
    static constexpr int columns = 4 / BITS;
    alignas(16) uint8_t of[columns][16][16];
    Products() {
        for (int column = 0; column < columns; ++column)
            for (int code = 0; code < 16; ++code)
                for (int half = 0; half < 16; ++half)
                    of[column][code][half] = static_cast<uint8_t>(code * ((half >> (BITS * column)) & ((1 << BITS) - 1)));
    }
};

// Of a row, in the order in which `add` reads them: for each block, vector, column of a group and half a table of 16 bytes.
template <int BITS>
inline void prepare(const LinearArgs& a, int64_t row, const Products<BITS>& products, uint8_t* codes, uint8_t* out) {
    constexpr int vectors = 2 * BITS, columns = 4 / BITS;
    const int64_t k = a.weights->k, blocks = (k + 63) / 64;
    const int8_t* const levels = a.levels + row * a.ldl;
    // Behind the last column weights are 0, whatever the code.
    for (int64_t i = 0; i < 64 * blocks; ++i) codes[i] = i < k ? static_cast<uint8_t>((levels[i] + a.act_shift) / a.act_multiplier) & 15 : uint8_t{0};
    for (int64_t b = 0; b < blocks; ++b, codes += 64)
        for (int j = 0; j < vectors; ++j)
            for (int c = 0; c < 4; ++c)
                for (int half = 0; half < 2; ++half, out += 16) {
                    v128_t table = wasm_i8x16_splat(0);
                    for (int i = 0; i < columns; ++i) {
                        const int group = (half * columns + i) * vectors + j;
                        table = wasm_i8x16_add(table, wasm_v128_load(products.of[i][codes[4 * group + c]]));
                    }
                    wasm_v128_store(out, table);
                }
}

// bytes[c] becomes column c of each group, of 16 outputs.
BELLBOX_INLINE void transpose(v128_t* bytes) {
    v128_t by_column[4];
    for (int p = 0; p < 4; ++p) by_column[p] = wasm_i8x16_shuffle(bytes[p], bytes[p], 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const v128_t low = wasm_i32x4_shuffle(by_column[0], by_column[1], 0, 4, 1, 5), high = wasm_i32x4_shuffle(by_column[0], by_column[1], 2, 6, 3, 7);
    const v128_t more_low = wasm_i32x4_shuffle(by_column[2], by_column[3], 0, 4, 1, 5), more_high = wasm_i32x4_shuffle(by_column[2], by_column[3], 2, 6, 3, 7);
    bytes[0] = wasm_i64x2_shuffle(low, more_low, 0, 2), bytes[1] = wasm_i64x2_shuffle(low, more_low, 1, 3);
    bytes[2] = wasm_i64x2_shuffle(high, more_high, 0, 2), bytes[3] = wasm_i64x2_shuffle(high, more_high, 1, 3);
}

// The sums of codes times codes of ROWS rows with a tile.
template <int BITS, int ROWS>
inline void sum(const uint8_t* tile, int64_t blocks, const uint8_t* tables, int64_t row_bytes, Sums* out) {
    constexpr int vectors = 2 * BITS;
    constexpr int64_t kRun = 64;  // blocks whose sums, at most 960, fit 16 bits
    for (int r = 0; r < ROWS; ++r)
        for (v128_t& part : out[r].parts) part = wasm_i32x4_splat(0);
    for (int64_t begin = 0; begin < blocks; begin += kRun) {
        v128_t low[ROWS] = {}, high[ROWS] = {};
        for (int64_t left = smaller(kRun, blocks - begin) * vectors; left > 0; --left, tile += 64, tables += 128) {
            v128_t bytes[4];
            for (int p = 0; p < 4; ++p) bytes[p] = wasm_v128_load(tile + 16 * p);
            transpose(bytes);
            v128_t sums[ROWS] = {};
            for (int c = 0; c < 4; ++c) {
                const v128_t first = wasm_v128_and(bytes[c], wasm_i8x16_splat(15)), second = wasm_u8x16_shr(bytes[c], 4);
                for (int r = 0; r < ROWS; ++r) {
                    const uint8_t* const table = tables + r * row_bytes + 32 * c;
                    sums[r] = wasm_i8x16_add(sums[r], wasm_i8x16_swizzle(wasm_v128_load(table), first));
                    sums[r] = wasm_i8x16_add(sums[r], wasm_i8x16_swizzle(wasm_v128_load(table + 16), second));
                }
            }
            for (int r = 0; r < ROWS; ++r) {
                low[r] = wasm_i16x8_add(low[r], wasm_u16x8_extend_low_u8x16(sums[r]));
                high[r] = wasm_i16x8_add(high[r], wasm_u16x8_extend_high_u8x16(sums[r]));
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            v128_t* const parts = out[r].parts;
            parts[0] = wasm_i32x4_add(parts[0], wasm_u32x4_extend_low_u16x8(low[r])), parts[1] = wasm_i32x4_add(parts[1], wasm_u32x4_extend_high_u16x8(low[r]));
            parts[2] = wasm_i32x4_add(parts[2], wasm_u32x4_extend_low_u16x8(high[r])), parts[3] = wasm_i32x4_add(parts[3], wasm_u32x4_extend_high_u16x8(high[r]));
        }
    }
}

// Sums of codes times codes to those of levels times codes.
inline void put_levels(Sums& sums, const LinearArgs& a, int64_t row, int64_t tile) {
    int32_t of_codes[16] = {};
    const int64_t width = smaller(16, a.weights->n - 16 * tile);
    for (int64_t i = 0; i < width; ++i) of_codes[i] = a.weights->code_sums[16 * tile + i];
    for (int p = 0; p < 4; ++p) {
        const v128_t shifted = wasm_i32x4_mul(wasm_v128_load(of_codes + 4 * p), wasm_i32x4_splat(a.act_shift));
        sums.parts[p] = wasm_i32x4_sub(wasm_i32x4_mul(sums.parts[p], wasm_i32x4_splat(a.act_multiplier)), shifted);
    }
    put(sums, a, row, tile);
}

template <int BITS>
inline void linear(const LinearArgs& a, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end) {
    static const Products<BITS> products;
    constexpr int kRows = 4;  // whose tables are made at once, and stay near
    const Weights& w = *a.weights;
    const int64_t blocks = (w.k + 63) / 64, row_bytes = blocks * 2 * BITS * 128;
    std::vector<uint8_t> codes(static_cast<size_t>(64 * blocks)), tables(static_cast<size_t>(kRows * row_bytes + 16));
    uint8_t* const aligned = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(tables.data()) + 15) / 16 * 16);
    for (int64_t i = m_begin; i < m_end; i += kRows) {
        const int64_t rows = smaller(kRows, m_end - i);
        for (int64_t r = 0; r < rows; ++r) prepare(a, i + r, products, codes.data(), aligned + r * row_bytes);
        for (int64_t t = tile_begin; t < tile_end; ++t) {
            const uint8_t* const tile = w.data + t * blocks * Layout<BITS>::bytes;
            Sums sums[kRows];
            if (rows == kRows) sum<BITS, kRows>(tile, blocks, aligned, row_bytes, sums);
            else
                for (int64_t r = 0; r < rows; ++r) sum<BITS, 1>(tile, blocks, aligned + r * row_bytes, row_bytes, sums + r);
            for (int64_t r = 0; r < rows; ++r) put_levels(sums[r], a, i + r, t);
        }
    }
}

}  // namespace lookup

inline bool counts(const LinearArgs& a, int64_t) { return lookup::serves(a); }

inline void linear(const LinearArgs& a, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end) {
    if (lookup::serves(a) && a.weights->bits == 1) return lookup::linear<1>(a, m_begin, m_end, tile_begin, tile_end);
    if (lookup::serves(a)) return lookup::linear<2>(a, m_begin, m_end, tile_begin, tile_end);
    switch (a.weights->bits) {
        case 1: return pairs::linear<1>(a, m_begin, m_end, tile_begin, tile_end);
        case 2: return pairs::linear<2>(a, m_begin, m_end, tile_begin, tile_end);
        case 3: return pairs::linear<3>(a, m_begin, m_end, tile_begin, tile_end);
        default: return pairs::linear<4>(a, m_begin, m_end, tile_begin, tile_end);
    }
}

}  // namespace wasm
}  // namespace
}  // namespace bellbox
