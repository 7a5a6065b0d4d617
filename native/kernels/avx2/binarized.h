// The product of binarized weights with AVX2.
//
// A step's 16 outputs x 4 inputs are 16 numbers below 16: indices into the sums of any of the four inputs. One VPSHUFB looks
// them up for both planes of a step, or for what both have in common of two steps. A sum less the smallest, the sum of the
// negative inputs, is a number below 2^9; its lowest four bits and the others are two tables of bytes, whose entries of 8
// steps add up in bytes (8 * 31 < 256), then in 16 bits. What the smallest sums are worth is one number for all outputs.
//
// Floor: for 8 inputs 11 operations for the indices, shared by the rows, and 12 lookups and additions for each row.
#pragma once

#include <immintrin.h>

#include "kernels/inline.h"
#include "kernels/portable/binarized.h"
#include "kernels/portable/encode.h"

namespace bellbox {
namespace {
namespace avx2 {
namespace planes {

constexpr int32_t kRun = 8;            // steps that are added up in bytes
constexpr int32_t kPiece = 64;         // in 16 bits: 64 * 508 < 2^15
constexpr int64_t kRoom = 1 << 18;     // bytes of tables that stay in the second-level cache

BELLBOX_INLINE __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
BELLBOX_INLINE void store32(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
BELLBOX_INLINE __m256i twice(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// ---- tables ----

// Of a step's four inputs: the sums of any of them less the smallest, their lowest four bits to `low`, the others to `high`.
// Returns the smallest.
inline int32_t make_sums(const int8_t* x, uint8_t* low, uint8_t* high) {
    const __m256i number = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int16_t smallest = 0;
    __m256i sums = _mm256_setzero_si256();
    BELLBOX_UNROLL
    for (int c = 0; c < 4; ++c) {
        const __m256i bit = _mm256_set1_epi16(static_cast<int16_t>(1 << c));
        const __m256i taken = _mm256_cmpeq_epi16(_mm256_and_si256(number, bit), bit);
        sums = _mm256_add_epi16(sums, _mm256_and_si256(taken, _mm256_set1_epi16(x[c])));
        smallest = static_cast<int16_t>(smallest + (x[c] < 0 ? x[c] : 0));
    }
    sums = _mm256_sub_epi16(sums, _mm256_set1_epi16(smallest));
    const __m256i bytes = _mm256_packus_epi16(_mm256_and_si256(sums, _mm256_set1_epi16(15)), _mm256_srli_epi16(sums, 4));
    const __m256i ordered = _mm256_permute4x64_epi64(bytes, 0xd8);  // packing works within 128 bits
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm256_castsi256_si128(ordered));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm256_extracti128_si256(ordered, 1));
    return smallest;
}

inline int64_t pairs_of(int32_t steps) { return (steps + 1) / 2; }

// The tables of a row, 64 bytes for two steps: low of both, high of both; zeros where there is one. smallest [blocks, 2]:
// the sums of the smallest.
inline void make_tables(const Binarized& w, const int8_t* x, uint8_t* tables, int32_t* smallest) {
    for (int64_t part = 0; part < 2 * w.blocks; ++part) {
        const int32_t steps = w.steps[part];
        smallest[part] = 0;
        for (int32_t i = 0; i < steps; ++i, x += 4) {
            uint8_t* to = tables + 64 * (i / 2) + 16 * (i % 2);
            smallest[part] += make_sums(x, to, to + 32);
        }
        tables += 64 * pairs_of(steps);
        if (steps % 2 != 0) memset(tables - 48, 0, 16), memset(tables - 16, 0, 16);
    }
}

// ---- indices ----

// Of a step: bytes r of the first plane, then of the second.
BELLBOX_INLINE __m256i indices(const uint64_t* bits) {
    const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bits)));
    return _mm256_and_si256(_mm256_or_si256(words, _mm256_slli_epi16(words, 4)), _mm256_set1_epi8(15));
}

// Of two steps: the first's, the second's (zeros where there is none), and what both planes have in common of either.
struct Pair {
    __m256i first, second, common;
    static constexpr int64_t bytes = 96;   // as it is kept for many rows

    template <bool COMMON>
    static BELLBOX_INLINE Pair make(const uint64_t* bits, bool two) {
        Pair p;
        p.first = indices(bits), p.second = two ? indices(bits + 2) : _mm256_setzero_si256();
        p.common = COMMON ? _mm256_and_si256(_mm256_permute2x128_si256(p.first, p.second, 0x20),
                                             _mm256_permute2x128_si256(p.first, p.second, 0x31))
                          : p.first;
        return p;
    }
    static BELLBOX_INLINE Pair kept(const uint8_t* from) { return {load32(from), load32(from + 32), load32(from + 64)}; }
    BELLBOX_INLINE void keep(uint8_t* to) const { store32(to, first), store32(to + 32, second), store32(to + 64, common); }
};

// ---- product ----

BELLBOX_INLINE void add(__m256i& sums, __m256i table, __m256i index) {
    sums = _mm256_add_epi8(sums, _mm256_shuffle_epi8(table, index));
    __asm__("" : "+x"(sums));          // one after the other: several at a time need more registers than there are
}

// Of a row, 16 bits: in the first the lower eight outputs, first plane and second; in the second the upper eight; then, of
// even steps and of odd ones, what both planes have in common.
struct Words {
    __m256i of[4];

    BELLBOX_INLINE void widen(int at, __m256i low, __m256i high) {
        const __m256i worth = _mm256_set1_epi16(0x1001);  // bytes 1, 16
        of[at] = _mm256_add_epi16(of[at], _mm256_maddubs_epi16(_mm256_unpacklo_epi8(low, high), worth));
        of[at + 1] = _mm256_add_epi16(of[at + 1], _mm256_maddubs_epi16(_mm256_unpackhi_epi8(low, high), worth));
    }
};

// Adds a run of steps for ROWS rows, whose tables are `stride` bytes apart. KEPT: pairs are read from there, else made of the
// bits. A function of its own, else the compiler keeps what is longer under way in registers, and the sums of bytes in memory.
template <int ROWS, bool COMMON, bool KEPT>
__attribute__((noinline)) void add_run(const uint64_t* bits, const uint8_t* kept, int32_t steps, const uint8_t* tables,
                                       int64_t stride, Words* words) {
    __m256i low[ROWS], high[ROWS], common_low[ROWS], common_high[ROWS];
    BELLBOX_UNROLL
    for (int r = 0; r < ROWS; ++r) low[r] = high[r] = common_low[r] = common_high[r] = _mm256_setzero_si256();
    for (int32_t i = 0; i < steps; i += 2, bits += 4, kept += Pair::bytes, tables += 64) {
        const Pair pair = KEPT ? Pair::kept(kept) : Pair::make<COMMON>(bits, i + 1 < steps);
        BELLBOX_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            const uint8_t* table = tables + r * stride;
            add(low[r], twice(table), pair.first), add(high[r], twice(table + 32), pair.first);
            add(low[r], twice(table + 16), pair.second), add(high[r], twice(table + 48), pair.second);
            if (COMMON) add(common_low[r], load32(table), pair.common), add(common_high[r], load32(table + 32), pair.common);
        }
    }
    BELLBOX_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        words[r].widen(0, low[r], high[r]);
        if (COMMON) words[r].widen(2, common_low[r], common_high[r]);
    }
}

struct Sums {
    alignas(32) int32_t first[16], second[16], common[16];  // of the planes, and of what both have in common
};

BELLBOX_INLINE void add_words(__m128i words, int32_t* sums) {
    store32(sums, _mm256_add_epi32(load32(sums), _mm256_cvtepi16_epi32(words)));
}

// A part of a block: its steps, and what belongs to them.
struct Part {
    const uint64_t* bits;
    const uint8_t* kept;
    int32_t steps;
    const uint8_t* tables;

    // The sums of ROWS rows less the part's `smallest`, which is where `sums` begin.
    template <int ROWS, bool COMMON, bool KEPT>
    BELLBOX_INLINE void add_up(int64_t stride, Sums* sums) const {
        for (int32_t piece = 0; piece < steps; piece += kPiece) {
            const int32_t end = piece + kPiece < steps ? piece + kPiece : steps;
            Words words[ROWS];
            memset(words, 0, sizeof(words));
            for (int32_t i = piece; i < end; i += kRun)
                add_run<ROWS, COMMON, KEPT>(bits + 2 * i, kept + Pair::bytes / 2 * i, end - i < kRun ? end - i : kRun,
                                            tables + 32 * i, stride, words);
            for (int r = 0; r < ROWS; ++r)
                for (int half = 0; half < 2; ++half) {
                    const __m256i planes = words[r].of[half], common = words[r].of[2 + half];
                    add_words(_mm256_castsi256_si128(planes), sums[r].first + 8 * half);
                    add_words(_mm256_extracti128_si256(planes, 1), sums[r].second + 8 * half);
                    if (!COMMON) continue;
                    const __m128i both = _mm_add_epi16(_mm256_castsi256_si128(common), _mm256_extracti128_si256(common, 1));
                    add_words(both, sums[r].common + 8 * half);
                }
        }
    }
    template <bool COMMON>
    BELLBOX_INLINE void keep(uint8_t* to) const {
        for (int32_t i = 0; i < steps; i += 2) Pair::make<COMMON>(bits + 2 * i, i + 1 < steps).keep(to + Pair::bytes / 2 * i);
    }
};

BELLBOX_INLINE void begin_at(int32_t value, int32_t* sums) {
    const __m256i all = _mm256_set1_epi32(value);
    store32(sums, all), store32(sums + 8, all);
}

BELLBOX_INLINE __m256i twice_less(__m256i x, __m256i y) { return _mm256_sub_epi32(_mm256_add_epi32(x, x), y); }

// The two parts of a block, salient columns and others, and the scales of its outputs.
struct Block {
    Part salient, plain;
    const float* scales;               // [7][16]

    // Adds the block to the outputs of ROWS rows, acc [ROWS][16]. smallest and sums: [ROWS][blocks][2], of this block on.
    template <int ROWS, bool KEPT>
    BELLBOX_INLINE void multiply(int64_t stride, const int32_t* smallest, const int32_t* sums, int64_t blocks,
                                 float* acc) const {
        Sums of_salient[ROWS], of_plain[ROWS];
        for (int r = 0; r < ROWS; ++r) {
            const int32_t* begin = smallest + 2 * r * blocks;
            begin_at(begin[0], of_salient[r].first), begin_at(begin[0], of_salient[r].second);
            begin_at(begin[1], of_plain[r].first), begin_at(begin[1], of_plain[r].second);
            begin_at(begin[1], of_plain[r].common);
        }
        salient.add_up<ROWS, false, KEPT>(stride, of_salient);
        plain.add_up<ROWS, true, KEPT>(stride, of_plain);
        for (int r = 0; r < ROWS; ++r)
            for (int half = 0; half < 2; ++half) {
                const Sums &twice_coded = of_salient[r], &once = of_plain[r];
                const __m256i all_salient = _mm256_set1_epi32(sums[2 * r * blocks]);
                const __m256i all_plain = _mm256_set1_epi32(sums[2 * r * blocks + 1]);
                const __m256i large = load32(once.second + 8 * half);
                const __m256i in_large = twice_less(load32(once.common + 8 * half), large);
                const __m256i counts[7] = {_mm256_sub_epi32(all_plain, large),
                                           _mm256_sub_epi32(twice_less(load32(once.first + 8 * half), all_plain), in_large),
                                           large,
                                           in_large,
                                           all_salient,
                                           twice_less(load32(twice_coded.first + 8 * half), all_salient),
                                           twice_less(load32(twice_coded.second + 8 * half), all_salient)};
                __m256 total = _mm256_loadu_ps(acc + 16 * r + 8 * half);
                BELLBOX_UNROLL
                for (int i = 0; i < 7; ++i) {
                    const __m256 scale = _mm256_loadu_ps(scales + 16 * i + 8 * half);
                    total = _mm256_add_ps(total, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(counts[i])));
                }
                _mm256_storeu_ps(acc + 16 * r + 8 * half, total);
            }
    }
};

// Memory for rows that share a pass over the weights, and for what a block becomes for them.
struct Rows {
    int64_t stride;                    // bytes of the tables of a row
    int64_t together;
    Scratch tables, smallest, acc, kept;

    explicit Rows(const BinarizedArgs& a)
        : stride(64 * pairs(a.weights).all), together(at_once(stride, a.m)), tables(together * stride / 4),
          smallest(together * 2 * a.weights.blocks), acc(together * 16), kept(pairs(a.weights).longest * Pair::bytes / 4) {}

    struct Pairs {
        int64_t all, longest;          // of all blocks, and of the longest
    };
    static Pairs pairs(const Binarized& w) {
        Pairs p{0, 0};
        for (int64_t b = 0; b < w.blocks; ++b) {
            const int64_t here = pairs_of(w.steps[2 * b]) + pairs_of(w.steps[2 * b + 1]);
            p.all += here, p.longest = here > p.longest ? here : p.longest;
        }
        return p;
    }
    static int64_t at_once(int64_t stride, int64_t rows) {
        const int64_t fit = stride > 0 ? kRoom / stride / 2 * 2 : rows;
        return fit < 2 ? (rows < 2 ? rows : 2) : fit < rows ? fit : rows;
    }
};

// Rows [first, first + rows) of a tile of 16 outputs.
inline void multiply(const BinarizedArgs& a, const Rows& memory, int64_t first, int64_t rows, int64_t tile) {
    const Binarized& w = a.weights;
    const int32_t* const smallest = reinterpret_cast<const int32_t*>(memory.smallest.data);
    uint8_t* const kept = reinterpret_cast<uint8_t*>(memory.kept.data);
    const uint8_t* tables = reinterpret_cast<const uint8_t*>(memory.tables.data);
    const uint64_t* bits = w.bits + 2 * tile * w.total;
    const uint16_t* halves = w.scales + 112 * tile * w.blocks;
    float* const acc = memory.acc.data;
    memset(acc, 0, static_cast<size_t>(rows) * 64);
    for (int64_t b = 0; b < w.blocks; ++b, halves += 112) {
        alignas(32) float scales[7 * 16];
        for (int i = 0; i < 112; i += 8)
            _mm256_store_ps(scales + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i))));
        const int32_t salient = w.steps[2 * b], plain = w.steps[2 * b + 1];
        const int64_t before = pairs_of(salient);
        Block block{{bits, kept, salient, tables},
                    {bits + 2 * salient, kept + Pair::bytes * before, plain, tables + 64 * before},
                    scales};
        const int32_t *less = smallest + 2 * b, *sums = a.sums + 2 * (first * w.blocks + b);
        if (rows == 1) {
            block.multiply<1, false>(memory.stride, less, sums, w.blocks, acc);
        } else {
            block.salient.keep<false>(kept), block.plain.keep<true>(kept + Pair::bytes * before);
            for (int64_t r = 0; r < rows; r += 2, less += 4 * w.blocks, sums += 4 * w.blocks) {
                if (r + 1 < rows)
                    block.multiply<2, true>(memory.stride, less, sums, w.blocks, acc + 16 * r);
                else
                    block.multiply<1, true>(memory.stride, less, sums, w.blocks, acc + 16 * r);
                block.salient.tables += 2 * memory.stride, block.plain.tables += 2 * memory.stride;
            }
        }
        bits += 2 * (salient + plain), tables += 64 * (before + pairs_of(plain));
    }
    const int64_t left = w.n - 16 * tile, width = left < 16 ? left : 16;
    for (int64_t r = 0; r < rows; ++r) {
        float* out = a.out + (first + r) * w.n + 16 * tile;
        for (int64_t i = 0; i < width; ++i) {
            const float y = acc[16 * r + i] * a.x_scale[first + r];
            out[i] = w.bias != nullptr ? y + w.bias[16 * tile + i] : y;
        }
    }
}

}  // namespace planes

inline void binarized(const BinarizedArgs& a, int64_t begin, int64_t end) {
    const Binarized& w = a.weights;
    const planes::Rows memory(a);
    uint8_t* const tables = reinterpret_cast<uint8_t*>(memory.tables.data);
    int32_t* const smallest = reinterpret_cast<int32_t*>(memory.smallest.data);
    for (int64_t first = 0; first < a.m; first += memory.together) {
        const int64_t rows = a.m - first < memory.together ? a.m - first : memory.together;
        for (int64_t r = 0; r < rows; ++r)
            planes::make_tables(w, a.x + 4 * (first + r) * w.total, tables + r * memory.stride, smallest + 2 * r * w.blocks);
        for (int64_t tile = begin; tile < end; ++tile) planes::multiply(a, memory, first, rows, tile);
    }
}

}  // namespace avx2
}  // namespace
}  // namespace bellbox
