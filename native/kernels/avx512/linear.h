// The integer product with AVX-512 VNNI.
//
// One vpdpbusd multiplies a vector of weight codes (16 outputs x 4 inputs, unsigned) by four activation levels that
// are broadcast to all outputs, so there are no horizontal sums. Three loops over the same layout:
//
//   few     one or two rows: weights are read once and stay packed. A bit field is masked where it stands, not shifted: field
//           f then counts 2^(width f) times, in an accumulator of its own, and the exact multiple is shifted out once
//           at the end. Two operations for 64 products. Tile by tile the weights come as one stream, which the
//           hardware fetches ahead by itself: on huge pages that reaches the read bandwidth, and fetching by
//           instruction, or two tiles at a time, costs a fifth and more (Zen 4). Floor: reading the weights.
//   some    up to 64 rows: fields are shifted down in registers and multiplied with up to 8 rows at once; chunks of
//           rows take turns over packed weights that stay in the cache. Floor: vpdpbusd.
//   many    codes of 64 outputs x 512 inputs are unpacked once to 32 KB and serve all rows, 6 rows x 64 outputs = 24
//           accumulators at a time. Floor: vpdpbusd, two a cycle on most processors. (On Zen 5 `some` is as fast for
//           any number of rows: unpacking runs beside the products. Where both share two ports it is not.)
//
// Sums: |level| <= 127 and code <= 15 stay within 2^31 up to k = 2^20; `few` holds multiples up to 255 and is left to
// k <= 2^16 (2^16 * 127 * 255 < 2^31).
#pragma once

#include <immintrin.h>

#include "kernels/inline.h"
#include "kernels/layout.h"
#include "kernels/portable/linear.h"

namespace bellbox {
namespace {
namespace avx512 {
namespace product {

constexpr int64_t kFewColumns = 1 << 16;  // k up to which `few` cannot overflow
constexpr int64_t kFewRows = 2;           // more need more registers than there are: fields * rows sums
constexpr int64_t kSomeRows = 64;
constexpr int kPlainRows = 4;              // rows up to which the hardware fetches better alone (measured)


// Bytes of packed weights that `some` fetches ahead of use: measured from DRAM and from L3. The fewer the bits, the
// more products to a byte.
template <int BITS>
constexpr int kAhead = BITS == 1 ? 8192 : BITS == 3 ? 4096 : 2048;

// An address alone: it may lie past the end.
BELLBOX_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// The vector(s) that hold groups j, j + vectors, j + 2 vectors, ... of a block.
struct Packed {
    __m512i low, high;                // high: only for 3 bits
};

template <int BITS>
BELLBOX_INLINE Packed load_packed(const uint8_t* block, int j) {
    Packed p;
    p.low = _mm512_loadu_si512(block + 64 * j);
    p.high = BITS == 3 ? _mm512_loadu_si512(block + 256 + 64 * (j & 1)) : p.low;
    return p;
}

BELLBOX_INLINE __m512i shift_right(__m512i x, int count) {  // negative: left; bits that cross bytes are masked away
    return count > 0   ? _mm512_srli_epi16(x, static_cast<unsigned>(count))
           : count < 0 ? _mm512_slli_epi16(x, static_cast<unsigned>(-count))
                       : x;
}

constexpr int kOr = 0xf8;             // a | (b & c) for vpternlog

// The codes of group f * vectors + j.
template <int BITS>
BELLBOX_INLINE __m512i codes(Packed p, int f, int j) {
    using L = Layout<BITS>;
    const __m512i low = _mm512_and_si512(shift_right(p.low, f * L::width),
                                         _mm512_set1_epi8(static_cast<char>((1 << L::width) - 1)));
    if (BITS != 3) return low;
    // Group 4f + j is group 2 (2f + j/2) + j%2 of the high plane: bit 2f + j/2, wanted at bit 2.
    return _mm512_ternarylogic_epi64(low, shift_right(p.high, 2 * f + j / 2 - 2), _mm512_set1_epi8(4), kOr);
}

// The codes of group f * vectors + j, times 2^place<BITS>(f).
template <int BITS>
constexpr int place(int f) {
    return BITS == 3 && f == 3 ? 4 : f * Layout<BITS>::width;
}

template <int BITS>
BELLBOX_INLINE __m512i codes_in_place(Packed p, int f, int j) {
    using L = Layout<BITS>;
    const int at = place<BITS>(f);
    const __m512i low = _mm512_and_si512(shift_right(p.low, f * L::width - at),
                                         _mm512_set1_epi8(static_cast<char>(((1 << L::width) - 1) << at)));
    if (BITS != 3) return low;
    return _mm512_ternarylogic_epi64(low, shift_right(p.high, 2 * f + j / 2 - 2 - at),
                                     _mm512_set1_epi8(static_cast<char>(4 << at)), kOr);
}

BELLBOX_INLINE __m512i broadcast4(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
}

// The way of sixteen sums to the output: exact integer, then three roundings. What belongs to the columns is held.
struct Epilogue {
    __m512 scale, bias;
    __m512i multiplier;
    int64_t column;
    __mmask16 mask;

    BELLBOX_INLINE Epilogue(const LinearArgs& a, int64_t tile) : column(16 * tile) {
        const Weights& w = *a.weights;
        const int64_t left = w.n - column;
        mask = left >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << left) - 1);
        scale = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, w.scale + column), _mm512_set1_ps(a.act_scale));
        bias = w.bias != nullptr ? _mm512_maskz_loadu_ps(mask, w.bias + column) : _mm512_setzero_ps();
        multiplier = _mm512_set1_epi32(w.multiplier);
    }

    BELLBOX_INLINE void operator()(const LinearArgs& a, int64_t row, __m512i acc) const {
        store(a, row, value(a, row, acc));
    }

    BELLBOX_INLINE __m512 value(const LinearArgs& a, int64_t row, __m512i acc) const {
        const __m512i exact = _mm512_sub_epi32(_mm512_mullo_epi32(acc, multiplier),
                                               _mm512_set1_epi32(a.weights->shift * a.sums[row]));
        return rounded(a, row, exact);
    }

    BELLBOX_INLINE __m512 rounded(const LinearArgs& a, int64_t row, __m512i exact) const {
        const __m512 y = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(exact), scale), _mm512_set1_ps(a.row_scales[row]));
        return a.weights->bias != nullptr ? _mm512_add_ps(y, bias) : y;  // not always: -0 + 0 is another zero
    }

    BELLBOX_INLINE void store(const LinearArgs& a, int64_t row, __m512 y) const {
        const int64_t at = row * a.ldo + column;
        if (!kAllTypes || a.out_type == Type::f32) {
            _mm512_mask_storeu_ps(static_cast<float*>(a.out) + at, mask, y);
            return;
        }
        const __m512i bits = _mm512_castps_si512(y), high = _mm512_srli_epi32(bits, 16);
        const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
        const __m512i half_up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
        const __m512i even = _mm512_srli_epi32(_mm512_add_epi32(bits, half_up), 16);
        const __mmask16 nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
        const __m512i half = _mm512_mask_or_epi32(even, nan, high, _mm512_set1_epi32(0x40));
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(a.out) + at, mask, _mm512_cvtepi32_epi16(half));
    }
};

// ----------------------------------------------------------------------------------------------------------- few rows

template <int BITS, int ROWS>
void few(const LinearArgs& a, int64_t row, int64_t tile) {
    using L = Layout<BITS>;
    constexpr int places = BITS == 3 ? 3 : L::fields;
    constexpr int split = ROWS * places > 4 ? 1 : 8 / (ROWS * places);  // chains to cover the latency of vpdpbusd
    const int64_t blocks = (a.weights->k + 63) / 64;
    const int8_t* levels = a.levels + row * a.ldl;
    const uint8_t* block = a.weights->data + tile * blocks * L::bytes;
    __m512i acc[ROWS][places][split];
    for (auto& r : acc)
        for (auto& f : r)
            for (auto& s : f) s = _mm512_setzero_si512();
    for (int64_t b = 0; b < blocks; ++b, block += L::bytes, levels += 64) {
        BELLBOX_UNROLL
        for (int j = 0; j < L::vectors; ++j) {
            const Packed p = load_packed<BITS>(block, j);
            BELLBOX_UNROLL
            for (int f = 0; f < L::fields; ++f) {
                const __m512i code = codes_in_place<BITS>(p, f, j);
                BELLBOX_UNROLL
                for (int r = 0; r < ROWS; ++r) {
                    __m512i& sum = acc[r][BITS == 3 && f == 3 ? 2 : f][j % split];
                    sum = _mm512_dpbusd_epi32(sum, code, broadcast4(levels + r * a.ldl + 4 * (f * L::vectors + j)));
                }
            }
        }
    }
    const Epilogue epilogue(a, tile);
    BELLBOX_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        __m512i total = _mm512_setzero_si512();
        BELLBOX_UNROLL
        for (int f = 0; f < places; ++f) {
            __m512i sum = acc[r][f][0];
            BELLBOX_UNROLL
            for (int s = 1; s < split; ++s) sum = _mm512_add_epi32(sum, acc[r][f][s]);
            total = _mm512_add_epi32(total, _mm512_srai_epi32(sum, static_cast<unsigned>(place<BITS>(f))));
        }
        epilogue(a, row + r, total);
    }
}

// --------------------------------------------------------------------------------------------------------- some rows

template <int BITS, int ROWS, int TILES>
void some(const LinearArgs& a, int64_t row, int64_t first) {
    using L = Layout<BITS>;
    const Weights& w = *a.weights;
    const int64_t blocks = (w.k + 63) / 64, tile_bytes = blocks * L::bytes;
    const int8_t* levels = a.levels + row * a.ldl;
    const uint8_t* data = w.data + first * tile_bytes;
    __m512i acc[ROWS][TILES];
    for (auto& r : acc)
        for (auto& t : r) t = _mm512_setzero_si512();
    for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t* block = data + b * L::bytes;
        const int64_t past = b * L::bytes + kAhead<BITS> < tile_bytes ? 0 : (TILES - 1) * tile_bytes;
        BELLBOX_UNROLL
        for (int t = 0; ROWS > kPlainRows && t < TILES; ++t) {
            BELLBOX_UNROLL
            for (int line = 0; line < L::bytes; line += 64)
                prefetch(block + t * tile_bytes + kAhead<BITS> + past + line);
        }
        BELLBOX_UNROLL
        for (int j = 0; j < L::vectors; ++j) {
            Packed p[TILES];
            BELLBOX_UNROLL
            for (int t = 0; t < TILES; ++t) p[t] = load_packed<BITS>(block + t * tile_bytes, j);
            BELLBOX_UNROLL
            for (int f = 0; f < L::fields; ++f) {
                __m512i code[TILES];
                BELLBOX_UNROLL
                for (int t = 0; t < TILES; ++t) code[t] = codes<BITS>(p[t], f, j);
                BELLBOX_UNROLL
                for (int r = 0; r < ROWS; ++r) {
                    const __m512i x = broadcast4(levels + r * a.ldl + 64 * b + 4 * (f * L::vectors + j));
                    BELLBOX_UNROLL
                    for (int t = 0; t < TILES; ++t) acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], code[t], x);
                }
            }
        }
    }
    BELLBOX_UNROLL
    for (int t = 0; t < TILES; ++t) {
        const Epilogue epilogue(a, first + t);
        BELLBOX_UNROLL
        for (int r = 0; r < ROWS; ++r) epilogue(a, row + r, acc[r][t]);
    }
}

// --------------------------------------------------------------------------------------------------------- many rows

constexpr int kRows = 6, kTiles = 4;       // registers: 24 sums, 4 weights, 1 activation
constexpr int64_t kDepth = 8;              // blocks of 64 inputs in the unpacked tile: 32 KB
constexpr int64_t kFetch = 256;            // bytes of each tile fetched for the next piece while kRows rows are done
constexpr int64_t kRowBlock = 384;         // rows that share an unpacked tile; their sums take 96 KB of L2

template <int BITS>
void unpack(const uint8_t* data, int64_t tile_bytes, int tiles, int64_t blocks, uint8_t* out) {
    using L = Layout<BITS>;
    for (int64_t b = 0; b < blocks; ++b)
        for (int t = 0; t < tiles; ++t) {
            const uint8_t* block = data + t * tile_bytes + b * L::bytes;
            uint8_t* to = out + (b * 16 * tiles + t) * 64;
            BELLBOX_UNROLL
            for (int j = 0; j < L::vectors; ++j) {
                const Packed p = load_packed<BITS>(block, j);
                BELLBOX_UNROLL
                for (int f = 0; f < L::fields; ++f)
                    _mm512_store_si512(to + (f * L::vectors + j) * tiles * 64, codes<BITS>(p, f, j));
            }
        }
}

struct Piece {                             // an unpacked tile at work
    const uint8_t* codes;                  // [16 blocks][tiles][64]
    int64_t blocks, column;                // inputs [64 column, 64 (column + blocks))
    bool first;                            // of the pieces along k
    const uint8_t* next;                   // packed weights of the next piece, as long for each tile, to be fetched
    int64_t stride, bytes;                 // of the tiles there
};

template <int ROWS, int TILES>
void multiply(const LinearArgs& a, const Piece& piece, int64_t row, int32_t* sums) {
    const int8_t* levels = a.levels + row * a.ldl + 64 * piece.column;
    const uint8_t* codes = piece.codes;
    const int8_t* end = levels + 64 * piece.blocks;
    __m512i acc[ROWS][TILES];  // every loop over it is unrolled: it has to stay in registers
    BELLBOX_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        BELLBOX_UNROLL
        for (int t = 0; t < TILES; ++t)
            acc[r][t] = piece.first ? _mm512_setzero_si512() : _mm512_load_si512(sums + (r * TILES + t) * 16);
    }
    for (; levels < end; levels += 64) {
        BELLBOX_UNROLL  // short pieces of rows: the hardware sees no pattern
        for (int r = 0; r < ROWS; ++r) prefetch(levels + (ROWS + r) * a.ldl);
#pragma GCC unroll 2
        for (int g = 0; g < 16; ++g, codes += 64 * TILES) {
            __m512i code[TILES];
            BELLBOX_UNROLL
            for (int t = 0; t < TILES; ++t) code[t] = _mm512_load_si512(codes + 64 * t);
            BELLBOX_UNROLL
            for (int r = 0; r < ROWS; ++r) {
                const __m512i x = broadcast4(levels + r * a.ldl + 4 * g);
                BELLBOX_UNROLL
                for (int t = 0; t < TILES; ++t) acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], code[t], x);
            }
        }
    }
    BELLBOX_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        BELLBOX_UNROLL
        for (int t = 0; t < TILES; ++t) _mm512_store_si512(sums + (r * TILES + t) * 16, acc[r][t]);
    }
}

template <int TILES>
void multiply_rows(const LinearArgs& a, const Piece& piece, int64_t begin, int64_t end, int32_t* sums) {
    int64_t fetched = 0;
    for (; begin + kRows <= end; begin += kRows, sums += kRows * TILES * 16) {
        for (const int64_t until = smaller(fetched + kFetch, piece.bytes); fetched < until; fetched += 64) {
            BELLBOX_UNROLL
            for (int t = 0; t < TILES; ++t)
                _mm_prefetch(reinterpret_cast<const char*>(piece.next + t * piece.stride + fetched), _MM_HINT_T1);
        }
        multiply<kRows, TILES>(a, piece, begin, sums);
    }
    switch (end - begin) {
        case 1: return multiply<1, TILES>(a, piece, begin, sums);
        case 2: return multiply<2, TILES>(a, piece, begin, sums);
        case 3: return multiply<3, TILES>(a, piece, begin, sums);
        case 4: return multiply<4, TILES>(a, piece, begin, sums);
        case 5: return multiply<5, TILES>(a, piece, begin, sums);
        default: return;
    }
}

template <int BITS>
void many(const LinearArgs& a, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end) {
    using L = Layout<BITS>;
    const Weights& w = *a.weights;
    const int64_t blocks = (w.k + 63) / 64, tile_bytes = blocks * L::bytes;
    const int64_t pieces = (blocks + kDepth - 1) / kDepth, rounds = (m_end - m_begin + kRowBlock - 1) / kRowBlock;
    alignas(64) uint8_t codes[kDepth * 16 * kTiles * 64];
    alignas(64) int32_t sums[kRowBlock * kTiles * 16];
    for (int64_t round = 0; round < rounds; ++round) {
        const int64_t begin = m_begin + (m_end - m_begin) * round / rounds;
        const int64_t end = m_begin + (m_end - m_begin) * (round + 1) / rounds;
        for (int64_t tile = tile_begin; tile < tile_end; tile += kTiles) {
            const int tiles = static_cast<int>(smaller(kTiles, tile_end - tile));
            const uint8_t* data = w.data + tile * tile_bytes;
            for (int64_t i = 0; i < pieces; ++i) {
                const int64_t from = blocks * i / pieces, to = blocks * (i + 1) / pieces;
                unpack<BITS>(data + from * L::bytes, tile_bytes, tiles, to - from, codes);
                const uint8_t* next = i + 1 < pieces ? data + to * L::bytes : data + tiles * tile_bytes;
                const Piece piece = {codes, to - from, from, i == 0, next, tile_bytes, (to - from) * L::bytes};
                switch (tiles) {
                    case 1: multiply_rows<1>(a, piece, begin, end, sums); break;
                    case 2: multiply_rows<2>(a, piece, begin, end, sums); break;
                    case 3: multiply_rows<3>(a, piece, begin, end, sums); break;
                    default: multiply_rows<4>(a, piece, begin, end, sums); break;
                }
            }
            for (int t = 0; t < tiles; ++t) {
                const Epilogue epilogue(a, tile + t);
                for (int64_t r = 0; r < end - begin; ++r)
                    epilogue(a, begin + r, _mm512_load_si512(sums + (r * tiles + t) * 16));
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ choice

// Few rows go with more tiles, to have enough chains of additions.
template <int BITS, int ROWS>
void some_tiles(const LinearArgs& a, int64_t row, int64_t tile_begin, int64_t tile_end) {
    constexpr int tiles = ROWS <= kPlainRows ? 4 : 2;
    int64_t tile = tile_begin;
    for (; tile + tiles <= tile_end; tile += tiles) some<BITS, ROWS, tiles>(a, row, tile);
    for (; tile < tile_end; ++tile) some<BITS, ROWS, 1>(a, row, tile);
}

template <int BITS>
void some_rows(const LinearArgs& a, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end) {
    const int64_t rows = m_end - m_begin, chunks = (rows + 7) / 8, step = chunks > 1 ? 4 : tile_end - tile_begin;
    for (int64_t tile = tile_begin; tile < tile_end; tile += step)  // the packed weights of a step stay in the cache
        for (int64_t i = 0; i < chunks; ++i) {
            const int64_t row = m_begin + rows * i / chunks, end = smaller(tile + step, tile_end);
            switch (m_begin + rows * (i + 1) / chunks - row) {
                case 1: some_tiles<BITS, 1>(a, row, tile, end); break;
                case 2: some_tiles<BITS, 2>(a, row, tile, end); break;
                case 3: some_tiles<BITS, 3>(a, row, tile, end); break;
                case 4: some_tiles<BITS, 4>(a, row, tile, end); break;
                case 5: some_tiles<BITS, 5>(a, row, tile, end); break;
                case 6: some_tiles<BITS, 6>(a, row, tile, end); break;
                case 7: some_tiles<BITS, 7>(a, row, tile, end); break;
                default: some_tiles<BITS, 8>(a, row, tile, end); break;
            }
        }
}

template <int BITS>
void linear(const LinearArgs& a, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end) {
    const int64_t rows = m_end - m_begin;
    if (rows <= 0 || tile_begin >= tile_end) return;
    if (rows > kSomeRows) return many<BITS>(a, m_begin, m_end, tile_begin, tile_end);
    if (rows > kFewRows || a.weights->k > kFewColumns)
        return some_rows<BITS>(a, m_begin, m_end, tile_begin, tile_end);
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
        if (rows == 1)
            few<BITS, 1>(a, m_begin, tile);
        else
            few<BITS, 2>(a, m_begin, tile);
    }
}

}  // namespace product
}  // namespace avx512
}  // namespace
}  // namespace bellbox
