// Quantizing rows with AVX-512.
//
// 128 columns are held in eight registers: the butterfly's stages within a register are one shuffle and one
// fma with +-1 (the product is exact, so this is a + b or a - b, rounded once), those between registers plain
// additions. Codes need no search: the range of the thresholds is cut into 31 cells so narrow that each holds one
// threshold at most; a permute by the cell gives that threshold, one comparison decides, and a table of bytes turns
// cell and decision into the level. See Cells for why that is exact, ties included.
//
// The butterfly and the codes of 256 columns (16 registers) are interleaved step by step where a row is long enough:
// with eight, the chains of dependent operations are longer than the processor looks ahead (a fifth slower).
//
// bf16 is read 32 columns at a time and parted into even and odd columns, which costs one operation for 16 columns
// instead of two and makes the first stage one between registers. A chunk thus lies in registers in one of two orders,
// named by the type it was read as; what is stored goes back to the order of columns.
//
// Floors. encode: about 20 vector operations for 16 columns at three to four a cycle (Zen 5: 7.5 cycles reached), and
// where each row has its own statistic 2 cycles more for sums of squares in fp64; the row is then read twice, the
// second time from L1. forward and backward: copying their tensors, a third and a quarter of the time that is taken;
// the rest is arithmetic.
#pragma once

#include <immintrin.h>

#include "encode_portable.h"

#ifndef BELLBOX_INLINE
#define BELLBOX_INLINE inline __attribute__((always_inline))
#define BELLBOX_UNROLL _Pragma("GCC unroll 16")
#endif

namespace bellbox {
namespace {
namespace avx512 {
namespace rows {

constexpr int kRegisters = 8;
constexpr int64_t kChunk = 16 * kRegisters;  // columns worked on together

BELLBOX_INLINE uint64_t low_bits(int64_t count) {  // the lowest `count` bits; any count
    return count <= 0 ? 0 : count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

template <Type T>
BELLBOX_INLINE const void* element(const void* p, int64_t i) {
    return static_cast<const char*>(p) + i * (T == Type::f32 ? 4 : 2);
}

template <Type T>
BELLBOX_INLINE void* element(void* p, int64_t i) {
    return static_cast<char*>(p) + i * (T == Type::f32 ? 4 : 2);
}

// ---- loading and storing ----

BELLBOX_INLINE __m512 even_columns(__m512i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(bf16, 16)); }
BELLBOX_INLINE __m512 odd_columns(__m512i bf16) {
    return _mm512_castsi512_ps(_mm512_and_si512(bf16, _mm512_set1_epi32(-65536)));
}

// Columns [i, i + 128) of a row of k; 0 beyond its end, where nothing is read.
template <Type T, int R>
BELLBOX_INLINE void load_chunk(const void* row, int64_t i, int64_t k, __m512 (&v)[R]) {
    const void* p = element<T>(row, i);
    const bool whole = k - i >= 16 * R;
    if (T == Type::f32) {
        BELLBOX_UNROLL
        for (int j = 0; j < R; ++j) {
            const void* at = element<T>(p, 16 * j);
            v[j] = whole ? _mm512_loadu_ps(at)
                         : _mm512_maskz_loadu_ps(static_cast<__mmask16>(low_bits(k - i - 16 * j)), at);
        }
    } else {
        BELLBOX_UNROLL
        for (int j = 0; j < R; j += 2) {
            const void* at = element<T>(p, 16 * j);
            const __m512i both = whole ? _mm512_loadu_si512(at)
                                       : _mm512_maskz_loadu_epi16(static_cast<__mmask32>(low_bits(k - i - 16 * j)), at);
            v[j] = even_columns(both);
            v[j + 1] = odd_columns(both);
        }
    }
}

// Registers as they are, to and from scratch memory (64-byte aligned, whole chunks).
template <int R>
BELLBOX_INLINE void load_registers(const float* p, __m512 (&v)[R]) {
    BELLBOX_UNROLL
    for (int j = 0; j < R; ++j) v[j] = _mm512_load_ps(p + 16 * j);
}

template <int R>
BELLBOX_INLINE void store_registers(float* p, const __m512 (&v)[R]) {
    BELLBOX_UNROLL
    for (int j = 0; j < R; ++j) _mm512_store_ps(p + 16 * j, v[j]);
}

// bf16, round to nearest even, in the upper half of each lane. A NaN that comes out of arithmetic is quiet, so its
// upper half is a NaN as it stands.
BELLBOX_INLINE __m512 round_bf16(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    return _mm512_castsi512_ps(_mm512_mask_add_epi32(bits, _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), bits, up));
}

// Where column j of 32 lies in two registers in ORDER: 0..15 in the first, 16..31 in the second.
template <Type ORDER>
constexpr int place(int j) {
    return ORDER == Type::f32 ? j : j / 2 + 16 * (j % 2);
}

struct Words {
    int16_t upper[32];   // upper half of the lane that holds column j
};
struct Lanes {
    int32_t first[16], second[16];
};
struct Bytes {
    int8_t low[64];      // low byte of the lane that holds column j, twice 32
};

template <Type ORDER>
constexpr Words make_words() {
    Words w{};
    for (int j = 0; j < 32; ++j) w.upper[j] = static_cast<int16_t>(2 * place<ORDER>(j) + 1);
    return w;
}
template <Type ORDER>
constexpr Lanes make_lanes() {
    Lanes l{};
    for (int j = 0; j < 16; ++j) l.first[j] = place<ORDER>(j), l.second[j] = place<ORDER>(16 + j);
    return l;
}
template <Type ORDER>
constexpr Bytes make_bytes() {
    Bytes b{};
    for (int j = 0; j < 64; ++j) b.low[j] = static_cast<int8_t>(4 * place<ORDER>(j % 32));
    return b;
}
template <Type ORDER>
alignas(64) constexpr Words kWords = make_words<ORDER>();
template <Type ORDER>
alignas(64) constexpr Lanes kLanes = make_lanes<ORDER>();
template <Type ORDER>
alignas(64) constexpr Bytes kBytes = make_bytes<ORDER>();

// Columns [i, i + 32) of a row of k, from two registers in ORDER; those beyond its end are not written. ROUNDED: they
// hold bf16 in upper halves already.
template <Type OUT, Type ORDER, bool ROUNDED = false>
BELLBOX_INLINE void store_pair(void* row, int64_t i, int64_t k, __m512 a, __m512 b) {
    void* at = element<OUT>(row, i);
    const bool whole = k - i >= 32;
    const uint32_t mask = static_cast<uint32_t>(low_bits(k - i));
    if (OUT == Type::f32) {
        void* next = element<OUT>(row, i + 16);
        if (ORDER == Type::bf16) {
            const __m512 even = a;
            a = _mm512_permutex2var_ps(even, _mm512_load_si512(kLanes<ORDER>.first), b);
            b = _mm512_permutex2var_ps(even, _mm512_load_si512(kLanes<ORDER>.second), b);
        }
        if (whole) {
            _mm512_storeu_ps(at, a);
            _mm512_storeu_ps(next, b);
        } else {
            _mm512_mask_storeu_ps(at, static_cast<__mmask16>(mask), a);
            _mm512_mask_storeu_ps(next, static_cast<__mmask16>(mask >> 16), b);
        }
    } else {
        const __m512i first = _mm512_castps_si512(ROUNDED ? a : round_bf16(a));
        const __m512i second = _mm512_castps_si512(ROUNDED ? b : round_bf16(b));
        const __m512i both = _mm512_permutex2var_epi16(first, _mm512_load_si512(kWords<ORDER>.upper), second);
        if (whole)
            _mm512_storeu_si512(at, both);
        else
            _mm512_mask_storeu_epi16(at, mask, both);
    }
}

// ---- rotation ----

// +1 in lanes whose bit H is clear (they are the a of a + b), -1 in the others (the b of a - b), H = 1, 2, 4, 8. Made
// once a call and hidden from the compiler, which would otherwise make them anew in every stage.
struct Signs {
    __m512 of[4];
    Signs() {
        const __mmask16 minus[4] = {0xaaaa, 0xcccc, 0xf0f0, 0xff00};
        BELLBOX_UNROLL
        for (int j = 0; j < 4; ++j) {
            of[j] = _mm512_mask_blend_ps(minus[j], _mm512_set1_ps(1), _mm512_set1_ps(-1));
            __asm__("" : "+v"(of[j]));
        }
    }
};

// Distance H < 16 within registers: lane i becomes x[i] + x[i + H] or x[i - H] - x[i].
template <int H, int R>
BELLBOX_INLINE void stage(__m512 (&v)[R], const Signs& signs) {
    const __m512 sign = signs.of[H == 1 ? 0 : H == 2 ? 1 : H == 4 ? 2 : 3];
    BELLBOX_UNROLL
    for (int j = 0; j < R; ++j) {
        const __m512 other = H == 1   ? _mm512_permute_ps(v[j], 0xb1)
                             : H == 2 ? _mm512_permute_ps(v[j], 0x4e)
                             : H == 4 ? _mm512_shuffle_f32x4(v[j], v[j], 0xb1)
                                      : _mm512_shuffle_f32x4(v[j], v[j], 0x4e);
        v[j] = _mm512_fmadd_ps(v[j], sign, other);
    }
}

// Registers H apart.
template <int H, int R>
BELLBOX_INLINE void stage_across(__m512 (&v)[R]) {
    BELLBOX_UNROLL
    for (int j = 0; j < R; ++j) {
        if (j & H) continue;
        const __m512 a = v[j], b = v[j + H];
        v[j] = _mm512_add_ps(a, b);
        v[j + H] = _mm512_sub_ps(a, b);
    }
}

// All stages of blocks up to 128. The branches go the same way for every chunk and cost nothing.
template <Type ORDER, int R>
BELLBOX_INLINE void butterfly(__m512 (&v)[R], int64_t block, const Signs& signs) {
    if (ORDER == Type::f32) {
        if (block > 1) stage<1>(v, signs);
        if (block > 2) stage<2>(v, signs);
        if (block > 4) stage<4>(v, signs);
        if (block > 8) stage<8>(v, signs);
        if (block > 16) stage_across<1>(v);
    } else {
        if (block > 1) stage_across<1>(v);
        if (block > 2) stage<1>(v, signs);
        if (block > 4) stage<2>(v, signs);
        if (block > 8) stage<4>(v, signs);
        if (block > 16) stage<8>(v, signs);
    }
    if (block > 32) stage_across<2>(v);
    if (block > 64) stage_across<4>(v);
}

// What is left of blocks above 128 once each chunk has been rotated: columns h apart, in either order.
inline void butterfly_rest(float* row, int64_t k, int64_t block) {
    for (int64_t h = kChunk; h < block; h *= 2)
        for (int64_t start = 0; start < k; start += 2 * h)
            for (int64_t i = start; i < start + h; i += 16) {
                const __m512 a = _mm512_load_ps(row + i), b = _mm512_load_ps(row + i + h);
                _mm512_store_ps(row + i, _mm512_add_ps(a, b));
                _mm512_store_ps(row + i + h, _mm512_sub_ps(a, b));
            }
}

// Rows whose block is above 128 (so that k is a multiple of 256) are rotated in memory first.
template <Type T>
inline void rotate_row(const void* x, int64_t k, int64_t block, const Signs& signs, float* row) {
    for (int64_t i = 0; i < k; i += kChunk) {
        __m512 v[kRegisters];
        load_chunk<T>(x, i, k, v);
        butterfly<T>(v, block, signs);
        store_registers(row + i, v);
    }
    butterfly_rest(row, k, block);
}

// A rotated chunk: from x, or from the row that rotate_row left in scratch.
template <Type T, int R>
BELLBOX_INLINE void rotated_chunk(const void* x, const float* scratch, int64_t i, int64_t k, int64_t block,
                                  const Signs& signs, __m512 (&v)[R]) {
    if (scratch != nullptr) {
        load_registers(scratch + i, v);
    } else {
        load_chunk<T>(x, i, k, v);
        butterfly<T>(v, block, signs);
    }
}

// ---- sums of squares ----

BELLBOX_INLINE void add_square(__m512d v, __m512d& sum) { sum = _mm512_fmadd_pd(v, v, sum); }

BELLBOX_INLINE void add_squares(__m512 v, __m512d (&sum)[2]) {
    add_square(_mm512_cvtps_pd(_mm512_castps512_ps256(v)), sum[0]);
    add_square(_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)), sum[1]);
}

template <Type T>
inline double row_norm(const void* x, int64_t k) {
    __m512d sums[4][2];  // in any order: even and odd columns of bf16 are apart
    BELLBOX_UNROLL
    for (int j = 0; j < 8; ++j) sums[j / 2][j % 2] = _mm512_setzero_pd();
    int64_t i = 0;
    for (; k - i >= 64; i += 64) {
        BELLBOX_UNROLL
        for (int j = 0; j < 4; ++j) {
            if (T == Type::f32) {  // converted as it is read
                const float* at = static_cast<const float*>(x) + i + 16 * j;
                add_square(_mm512_cvtps_pd(_mm256_loadu_ps(at)), sums[j][0]);
                add_square(_mm512_cvtps_pd(_mm256_loadu_ps(at + 8)), sums[j][1]);
            } else {
                const __m512i both = _mm512_loadu_si512(element<T>(x, i + 32 * (j / 2)));
                add_squares(j % 2 == 0 ? even_columns(both) : odd_columns(both), sums[j]);
            }
        }
    }
    if (i < k) {
        __m512 v[4];
        load_chunk<T>(x, i, k, v);
        BELLBOX_UNROLL
        for (int j = 0; j < 4; ++j) add_squares(v[j], sums[j]);
    }
    __m512d sum = _mm512_setzero_pd();
    BELLBOX_UNROLL
    for (int j = 0; j < 8; ++j) sum = _mm512_add_pd(sum, sums[j / 2][j % 2]);
    return __builtin_sqrt(_mm512_reduce_add_pd(sum));
}

// ---- codes ----

// 15 thresholds in a register; unused ones are NaN, which no value reaches.
inline __m512 padded_thresholds(const float* thresholds, int n) {
    const __mmask16 given = static_cast<__mmask16>(low_bits(n - 1));
    return _mm512_mask_loadu_ps(_mm512_set1_ps(__builtin_nanf("")), given, thresholds);
}

// The low bytes of the lanes of four registers, in the order of columns.
template <Type ORDER>
BELLBOX_INLINE __m512i low_bytes(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i index = _mm512_load_si512(kBytes<ORDER>.low);
    const __m512i ab = _mm512_permutex2var_epi8(a, index, b), cd = _mm512_permutex2var_epi8(c, index, d);
    return _mm512_mask_blend_epi32(0xff00, ab, cd);
}

// One bit for each lane of four registers as one mask.
BELLBOX_INLINE __mmask64 join(__mmask16 a, __mmask16 b, __mmask16 c, __mmask16 d) {
    return _mm512_kunpackd(_mm512_kunpackw(d, c), _mm512_kunpackw(b, a));
}

// 64 bytes in the order of the bits of join() to the order of columns.
template <Type ORDER>
BELLBOX_INLINE __m512i in_columns(__m512i bytes) {
    if (ORDER == Type::f32) return bytes;
    // Within each 32, columns 2i and 2i + 1 lie at i and 16 + i.
    const __m512i by_words = _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 6, 4, 3, 1, 2, 0), bytes);
    const __m512i halves = _mm512_shuffle_epi8(
        by_words, _mm512_broadcast_i32x4(_mm_set_epi8(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0)));
    return halves;
}

// What a code is worth: multiplier * code - shift, as int8.
struct Values {
    int multiplier, shift;
    int8_t of(int code) const { return static_cast<int8_t>(multiplier * code - shift); }
};

// The coders. index: codes of 16 values, NaN gets 0. levels: int8 levels of 64 values that are not NaN (Search: NaN
// too) in the order of columns.

struct Two {  // 2 levels
    __m512 t;
    __m512i low, high;
    Two(const float* thresholds, int, Values values)
        : t(_mm512_set1_ps(thresholds[0])), low(_mm512_set1_epi8(values.of(0))), high(_mm512_set1_epi8(values.of(1))) {}
    BELLBOX_INLINE __mmask16 reached(__m512 v) const { return _mm512_cmp_ps_mask(v, t, _CMP_GE_OQ); }
    BELLBOX_INLINE __m512i index(__m512 v) const { return _mm512_maskz_set1_epi32(reached(v), 1); }
    template <Type ORDER>
    BELLBOX_INLINE __m512i levels(__m512 a, __m512 b, __m512 c, __m512 d) const {
        const __mmask64 upper = join(reached(a), reached(b), reached(c), reached(d));
        return in_columns<ORDER>(_mm512_mask_blend_epi8(upper, low, high));
    }
};

struct Search {  // any sorted thresholds, equal ones too: binary search by permutes
    __m512 table;
    __m512i level;
    Search(const float* thresholds, int n, Values values) : table(padded_thresholds(thresholds, n)) {
        alignas(16) int8_t bytes[16];
        for (int code = 0; code < 16; ++code) bytes[code] = values.of(code);
        level = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
    }
    template <int STEP>
    BELLBOX_INLINE __m512i step(__m512 v, __m512i code) const {  // `code` thresholds are reached; are STEP more?
        const __m512i next = _mm512_add_epi32(code, _mm512_set1_epi32(STEP - 1));
        const __mmask16 reached = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(next, table), _CMP_GE_OQ);
        return _mm512_mask_add_epi32(code, reached, code, _mm512_set1_epi32(STEP));
    }
    BELLBOX_INLINE __m512i index(__m512 v) const {
        return step<1>(v, step<2>(v, step<4>(v, step<8>(v, _mm512_setzero_si512()))));
    }
    template <Type ORDER>
    BELLBOX_INLINE __m512i levels(__m512 a, __m512 b, __m512 c, __m512 d) const {
        return _mm512_shuffle_epi8(level, low_bytes<ORDER>(index(a), index(b), index(c), index(d)));
    }
};

// cell(v) = 16 + round(clamp(v) * slope), with the rounding of one fma. Each of its steps keeps order, so cell() does
// too: with c the cell of v, a threshold whose own cell is below c is reached by v, and one whose cell is above c is
// not. If no two thresholds share a cell, at most one is left, in c itself, and it is number below[c], the count of
// thresholds in lower cells; where c holds none, number below[c] is the next one above (or NaN), and the comparison
// says no. So code = below[c] + (v >= threshold[below[c]]), whatever cell() rounds to. `exact` says whether the
// condition holds, tried with the same instructions; if not, Search serves.
struct Cells {
    static constexpr int kCells = 32;
    __m512 limit, slope, offset;
    __m512 next[2];      // threshold[below[c]] of each cell
    __m512i below[2];
    __m512i level;       // by cell + 32 * reached
    bool exact;

    Cells(const float* thresholds, int n, Values values) {
        const float first = __builtin_fabsf(thresholds[0]), last = __builtin_fabsf(thresholds[n - 2]);
        const float largest = first > last ? first : last, factor = 15 / largest;
        exact = largest < 1e30f && factor < 1e30f;  // else the products below could overflow
        limit = _mm512_set1_ps(largest);
        slope = _mm512_set1_ps(factor);
        offset = _mm512_set1_ps(12582912.0f + 16);  // 1.5 * 2^23: the sum is an integer in the lowest bits
        const __m512 table = padded_thresholds(thresholds, n);
        const __m512i five_bits = _mm512_set1_epi32(kCells - 1), one = _mm512_set1_epi32(1);
        int32_t cells[16];
        _mm512_storeu_si512(cells, _mm512_and_si512(cell(table), five_bits));
        for (int j = 1; j < n - 1; ++j) exact = exact && cells[j - 1] < cells[j];
        __m512i number = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        for (int half = 0; half < 2; ++half) {
            below[half] = _mm512_setzero_si512();
            for (int j = 0; j < n - 1; ++j) {
                const __mmask16 passed = _mm512_cmpgt_epi32_mask(number, _mm512_set1_epi32(cells[j]));
                below[half] = _mm512_mask_add_epi32(below[half], passed, below[half], one);
            }
            next[half] = _mm512_permutexvar_ps(below[half], table);
            number = _mm512_add_epi32(number, _mm512_set1_epi32(16));
        }
        // Bytes: below and below + 1, to levels.
        const __m512i codes = low_bytes<Type::f32>(below[0], below[1], _mm512_add_epi32(below[0], one),
                                                   _mm512_add_epi32(below[1], one));
        level = _mm512_shuffle_epi8(Search(thresholds, n, values).level, codes);
    }
    // In the low five bits of each lane; permutes look at no others. NaN, by the order of the operands, gives the
    // lowest cell, in which the comparison then says no.
    BELLBOX_INLINE __m512i cell(__m512 v) const {
        const __m512 inside = _mm512_min_ps(_mm512_max_ps(v, _mm512_sub_ps(_mm512_setzero_ps(), limit)), limit);
        return _mm512_castps_si512(_mm512_fmadd_ps(inside, slope, offset));
    }
    BELLBOX_INLINE __m512i index(__m512 v) const {
        const __m512i c = cell(v), base = _mm512_permutex2var_epi32(below[0], c, below[1]);
        const __mmask16 reached = _mm512_cmp_ps_mask(v, _mm512_permutex2var_ps(next[0], c, next[1]), _CMP_GE_OQ);
        return _mm512_mask_add_epi32(base, reached, base, _mm512_set1_epi32(1));
    }
    // The cell, and 32 where its threshold is reached, in the lowest byte. The clamp is one operation (the smaller
    // magnitude, with the sign of v), the same cell as above for all but NaN.
    BELLBOX_INLINE __m512i decide(__m512 v) const {
        const __m512i c = _mm512_castps_si512(_mm512_fmadd_ps(_mm512_range_ps(v, limit, 2), slope, offset));
        const __mmask16 reached = _mm512_cmp_ps_mask(v, _mm512_permutex2var_ps(next[0], c, next[1]), _CMP_GE_OQ);
        return _mm512_mask_add_epi32(c, reached, c, _mm512_set1_epi32(kCells));
    }
    template <Type ORDER>
    BELLBOX_INLINE __m512i levels(__m512 a, __m512 b, __m512 c, __m512 d) const {
        return _mm512_permutexvar_epi8(low_bytes<ORDER>(decide(a), decide(b), decide(c), decide(d)), level);
    }
};

// Calls f(coder) with the cheapest coder that is exact for these thresholds.
template <typename F>
BELLBOX_INLINE void with_coder(const float* thresholds, int n, Values values, const F& f) {
    if (n == 2) return f(Two(thresholds, n, values));
    const Cells cells(thresholds, n, values);
    if (cells.exact) return f(cells);
    f(Search(thresholds, n, values));
}

// ---- encode ----

// Sums over a row while its levels are made.
struct Sums {
    __m512i levels[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
};

// The levels of 16 * R columns from i on.
template <Type T, bool CHECK, int R, typename Coder>
BELLBOX_INLINE void encode_chunk(const Coder& coder, const Signs& signs, const void* x, const float* scratch, int64_t i,
                                 int64_t k, int64_t block, __m512 factor, int8_t* levels, Sums& sums) {
    __m512 v[R];
    if (CHECK) {
        load_chunk<T>(x, i, k, v);
        BELLBOX_UNROLL
        for (int j = 0; j < R; ++j) sums.squares[j & 1] = _mm512_fmadd_ps(v[j], v[j], sums.squares[j & 1]);
        if (scratch == nullptr)
            butterfly<T>(v, block, signs);
        else
            load_registers(scratch + i, v);
    } else {
        rotated_chunk<T>(x, scratch, i, k, block, signs, v);
    }
    BELLBOX_UNROLL
    for (int j = 0; j < R; ++j) v[j] = _mm512_mul_ps(v[j], factor);
    const bool whole = k - i >= 16 * R;
    BELLBOX_UNROLL
    for (int j = 0; j < R; j += 4) {
        const int64_t at = i + 16 * j;
        __m512i out = coder.template levels<T>(v[j], v[j + 1], v[j + 2], v[j + 3]);
        if (!whole) out = _mm512_maskz_mov_epi8(low_bits(k - at), out);
        sums.levels[j / 4 & 1] = _mm512_dpbusd_epi32(sums.levels[j / 4 & 1], _mm512_set1_epi8(1), out);
        if (whole || k > at) _mm512_storeu_si512(levels + at, out);
    }
}

// The levels of one row up to the multiple of 64 that covers it; returns their sum. CHECK: `squares` becomes the fp32
// sum of squares of x, which is not a finite number where an entry is not.
template <Type T, bool CHECK, typename Coder>
BELLBOX_INLINE int32_t encode_row(const Coder& coder, const Signs& signs, const void* x, const float* scratch,
                                  int64_t k, int64_t block, float r, int8_t* levels, float& squares) {
    const __m512 factor = _mm512_set1_ps(r);
    Sums sums;
    int64_t i = 0;
    for (; k - i >= 2 * kChunk; i += 2 * kChunk)
        encode_chunk<T, CHECK, 2 * kRegisters>(coder, signs, x, scratch, i, k, block, factor, levels, sums);
    for (; i < k; i += kChunk)
        encode_chunk<T, CHECK, kRegisters>(coder, signs, x, scratch, i, k, block, factor, levels, sums);
    if (CHECK) squares = _mm512_reduce_add_ps(_mm512_add_ps(sums.squares[0], sums.squares[1]));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(sums.levels[0], sums.levels[1]));
}

template <Type T, typename Coder>
inline void encode_rows(const EncodeArgs& a, const Coder shared, float* scratch, int64_t begin, int64_t end) {
    const Coder coder = shared;  // a copy of its own: stores of bytes could change one that others see
    const Search careful(a.thresholds, a.n, Values{a.multiplier, a.shift});
    const Signs signs;
    const bool fixed = a.inverse_sigma > 0;
    const float fixed_r = static_cast<float>(a.inverse_sigma / __builtin_sqrt(static_cast<double>(a.block)));
    const int64_t written = (a.k + 63) / 64 * 64;
    for (int64_t i = begin; i < end; ++i) {
        const void* x = element<T>(a.x, i * a.ldx);
        int8_t* levels = a.levels + i * a.ldl;
        float squares = 0;
        if (scratch != nullptr) rotate_row<T>(x, a.k, a.block, signs, scratch);
        if (fixed) {
            a.marks[i] = 1;
            a.sums[i] = encode_row<T, true>(coder, signs, x, scratch, a.k, a.block, fixed_r, levels, squares);
            // A sum of squares that fits fp32 is far below the ceiling; the mark of others, and NaN among their
            // values, are looked at with care.
            if (!(squares < 3e38f) || !(fixed_r < 3e38f)) {
                const float r = normaliser(row_norm<T>(x, a.k), a.k, a.block);
                a.marks[i] = r - r + 1;
                a.sums[i] = encode_row<T, false>(careful, signs, x, scratch, a.k, a.block, fixed_r, levels, squares);
            }
        } else {
            const float r = normaliser(row_norm<T>(x, a.k), a.k, a.block);
            a.marks[i] = r - r + 1;
            if (r == r)  // below the ceiling no value is a NaN
                a.sums[i] = encode_row<T, false>(coder, signs, x, scratch, a.k, a.block, r, levels, squares);
            else
                a.sums[i] = encode_row<T, false>(careful, signs, x, scratch, a.k, a.block, r, levels, squares);
        }
        if (written < a.ldl) memset(levels + written, 0, static_cast<size_t>(a.ldl - written));
    }
}

// ---- training ----

template <Type IN, Type OUT, int R, typename Coder>
BELLBOX_INLINE void forward_chunk(const Coder& coder, const Signs& signs, const void* x, const float* scratch,
                                  int64_t i, int64_t k, int64_t block, __m512 factor, __m512 values, void* kept,
                                  void* x_hat) {
    __m512 v[R];
    rotated_chunk<IN>(x, scratch, i, k, block, signs, v);
    BELLBOX_UNROLL
    for (int j = 0; j < R; j += 2) {
        const __m512 a = _mm512_mul_ps(v[j], factor), b = _mm512_mul_ps(v[j + 1], factor);
        store_pair<OUT, IN>(kept, i + 16 * j, k, a, b);
        store_pair<OUT, IN, true>(x_hat, i + 16 * j, k, _mm512_permutexvar_ps(coder.index(a), values),
                                  _mm512_permutexvar_ps(coder.index(b), values));
    }
}

template <Type IN, Type OUT, typename Coder>
inline void forward_rows(const ForwardArgs& a, const Coder shared, float* scratch, int64_t begin, int64_t end) {
    const Coder coder = shared;
    const Signs signs;
    const __m512 codes = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 centred = _mm512_sub_ps(codes, _mm512_set1_ps(a.offset));
    const int64_t k = a.k, block = a.block;
    for (int64_t i = begin; i < end; ++i) {
        const void* x = element<IN>(a.x, i * k);
        void *x_hat = element<OUT>(a.x_hat, i * k), *kept = element<OUT>(a.v, i * k);
        const float r = a.r[i * a.r_stride], scale = a.scale[i * a.scale_stride] * (r - r + 1);
        const __m512 factor = _mm512_set1_ps(r);
        __m512 values = _mm512_mul_ps(centred, _mm512_set1_ps(scale));  // of each code, so rounded once a row
        if (OUT == Type::bf16) values = round_bf16(values);
        if (scratch != nullptr) rotate_row<IN>(x, k, block, signs, scratch);
        int64_t j = 0;
        for (; k - j >= 2 * kChunk; j += 2 * kChunk)
            forward_chunk<IN, OUT, 2 * kRegisters>(coder, signs, x, scratch, j, k, block, factor, values, kept, x_hat);
        for (; j < k; j += kChunk)
            forward_chunk<IN, OUT, kRegisters>(coder, signs, x, scratch, j, k, block, factor, values, kept, x_hat);
    }
}

// e^(-v^2/2), relative error below 2e-7 down to 2^-126, then 0; NaN stays NaN. y = v^2 is held as square + rest, exact
// (rounding it alone would cost 5e-6 at large v), and -y/2 = n ln 2 - z/2 with |z| <= ln 2. The polynomial for
// e^(-z/2) is a minimax fit made for this (reweighted least squares, error 4e-9).
BELLBOX_INLINE __m512 bell(__m512 v) {
    v = _mm512_min_ps(_mm512_set1_ps(13.27f), _mm512_abs_ps(v));  // there n is -127, and 2^n comes out as 0
    const __m512 square = _mm512_mul_ps(v, v), rest = _mm512_fmsub_ps(v, v, square);
    // n + 127 in the lowest bits of `shifted`, from where it moves into the exponent.
    const __m512 magic = _mm512_set1_ps(12582912.0f + 127);
    const __m512 shifted = _mm512_fmadd_ps(square, _mm512_set1_ps(-0.72134752f), magic);
    const __m512 power = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(shifted), 23));
    const __m512 n = _mm512_sub_ps(shifted, magic);
    // 2 ln 2 in two parts, the first of 12 bits: n times it is exact.
    const __m512 high = _mm512_fmadd_ps(n, _mm512_set1_ps(1.38623046875f), square);
    const __m512 z = _mm512_add_ps(high, _mm512_fmadd_ps(n, _mm512_set1_ps(6.389237e-05f), rest));
    const __m512 z2 = _mm512_mul_ps(z, z);  // Estrin's order: the chain of additions is what takes time here
    const __m512 a = _mm512_fmadd_ps(z, _mm512_set1_ps(-0.5f), _mm512_set1_ps(1));
    const __m512 b = _mm512_fmadd_ps(z, _mm512_set1_ps(-0.020833148f), _mm512_set1_ps(0.124999985f));
    const __m512 c = _mm512_fmadd_ps(z, _mm512_set1_ps(-0.00026153325f), _mm512_set1_ps(0.0026042764f));
    const __m512 tail = _mm512_fmadd_ps(z2, _mm512_set1_ps(2.1584188e-05f), c);
    const __m512 p = _mm512_fmadd_ps(z2, _mm512_fmadd_ps(z2, tail, b), a);
    return _mm512_mul_ps(p, power);
}

// Sums of fp32 lanes are handed on to fp64 after each chunk, so their error does not grow with k.
BELLBOX_INLINE __m512d add_wide(__m512d sum, __m512 v) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    return _mm512_add_pd(sum, _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))));
}

// The second half of backward: the gradient of v to that of x.
template <Type T, int R>
BELLBOX_INLINE void gradient_chunk(const Signs& signs, float* scratch, const void* kept, int64_t i, int64_t k,
                                   int64_t block, __m512 factor, __m512 mean, __m512 r, void* grad_x) {
    __m512 g[R], v[R];
    load_registers(scratch + i, g);
    load_chunk<T>(kept, i, k, v);
    BELLBOX_UNROLL
    for (int j = 0; j < R; ++j)
        g[j] = _mm512_mul_ps(_mm512_fmsub_ps(g[j], factor, _mm512_mul_ps(v[j], mean)), r);
    butterfly<T>(g, block, signs);
    if (block > kChunk) return store_registers(scratch + i, g);
    BELLBOX_UNROLL
    for (int j = 0; j < R; j += 2) store_pair<T, T>(grad_x, i + 16 * j, k, g[j], g[j + 1]);
}

template <Type T>
inline void backward_rows(const BackwardArgs& a, float* scratch, int64_t begin, int64_t end) {
    const Signs signs;
    const int64_t k = a.k, block = a.block;
    for (int64_t i = begin; i < end; ++i) {
        const void *grad = element<T>(a.grad, i * k), *kept = element<T>(a.v, i * k);
        const void* x_hat = a.row_dot != nullptr ? element<T>(a.x_hat, i * k) : nullptr;
        void* grad_x = element<T>(a.grad_x, i * k);
        const float r = a.r[i * a.r_stride], factor = 2 * 0.3989422804014327f * a.gamma[i * a.gamma_stride];
        // g_v / factor to scratch, and the sums over the row.
        __m512d dot = _mm512_setzero_pd(), out_dot = _mm512_setzero_pd();
        for (int64_t j = 0; j < k; j += kChunk) {
            __m512 g[kRegisters], v[kRegisters];
            load_chunk<T>(grad, j, k, g);
            if (x_hat != nullptr) {
                load_chunk<T>(x_hat, j, k, v);
                __m512 part = _mm512_mul_ps(g[0], v[0]), other = _mm512_mul_ps(g[1], v[1]);
                BELLBOX_UNROLL
                for (int l = 2; l < kRegisters; l += 2) {
                    part = _mm512_fmadd_ps(g[l], v[l], part);
                    other = _mm512_fmadd_ps(g[l + 1], v[l + 1], other);
                }
                out_dot = add_wide(out_dot, _mm512_add_ps(part, other));
            }
            load_chunk<T>(kept, j, k, v);
            __m512 part[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
            BELLBOX_UNROLL
            for (int l = 0; l < kRegisters; ++l) {
                g[l] = _mm512_mul_ps(bell(v[l]), g[l]);
                part[l & 1] = _mm512_fmadd_ps(g[l], v[l], part[l & 1]);
            }
            dot = add_wide(dot, _mm512_add_ps(part[0], part[1]));
            store_registers(scratch + j, g);
        }
        if (x_hat != nullptr) a.row_dot[i] = static_cast<float>(_mm512_reduce_add_pd(out_dot));
        const double sum = static_cast<double>(factor) * _mm512_reduce_add_pd(dot);
        const float own_mean = static_cast<float>(sum / static_cast<double>(k)) * a.free[i * a.free_stride];
        const float mean = a.mean != nullptr ? *a.mean : own_mean;
        const __m512 centre = _mm512_set1_ps(mean), all = _mm512_set1_ps(r), own = _mm512_set1_ps(factor);
        int64_t j = 0;
        for (; k - j >= 2 * kChunk; j += 2 * kChunk)
            gradient_chunk<T, 2 * kRegisters>(signs, scratch, kept, j, k, block, own, centre, all, grad_x);
        for (; j < k; j += kChunk)
            gradient_chunk<T, kRegisters>(signs, scratch, kept, j, k, block, own, centre, all, grad_x);
        if (block > kChunk) {
            butterfly_rest(scratch, k, block);
            for (j = 0; j < k; j += 32)
                store_pair<T, T>(grad_x, j, k, _mm512_load_ps(scratch + j), _mm512_load_ps(scratch + j + 16));
        }
    }
}

}  // namespace rows

inline void encode(const EncodeArgs& a, int64_t begin, int64_t end) {
    const bool in_memory = a.block > rows::kChunk;
    const Scratch scratch(in_memory ? a.k : 0);
    float* row = in_memory ? scratch.data : nullptr;
    rows::with_coder(a.thresholds, a.n, rows::Values{a.multiplier, a.shift}, [&](const auto& coder) {
        if (a.x_type == Type::f32)
            rows::encode_rows<Type::f32>(a, coder, row, begin, end);
        else
            rows::encode_rows<Type::bf16>(a, coder, row, begin, end);
    });
}

inline void forward(const ForwardArgs& a, int64_t begin, int64_t end) {
    const bool in_memory = a.block > rows::kChunk;
    const Scratch scratch(in_memory ? a.k : 0);
    float* row = in_memory ? scratch.data : nullptr;
    rows::with_coder(a.thresholds, a.n, rows::Values{1, 0}, [&](const auto& coder) {
        if (a.x_type == Type::f32 && a.out_type == Type::f32)
            rows::forward_rows<Type::f32, Type::f32>(a, coder, row, begin, end);
        else if (a.x_type == Type::f32)
            rows::forward_rows<Type::f32, Type::bf16>(a, coder, row, begin, end);
        else if (a.out_type == Type::f32)
            rows::forward_rows<Type::bf16, Type::f32>(a, coder, row, begin, end);
        else
            rows::forward_rows<Type::bf16, Type::bf16>(a, coder, row, begin, end);
    });
}

inline void backward(const BackwardArgs& a, int64_t begin, int64_t end) {
    const Scratch scratch(a.k + rows::kChunk);  // whole chunks
    if (a.type == Type::f32)
        rows::backward_rows<Type::f32>(a, scratch.data, begin, end);
    else
        rows::backward_rows<Type::bf16>(a, scratch.data, begin, end);
}

}  // namespace avx512
}  // namespace
}  // namespace bellbox
