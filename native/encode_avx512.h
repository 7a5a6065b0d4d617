// Quantizing rows with AVX-512.
//
// 128 columns at a time are held in eight registers: the butterfly's stages of distance 1 to 8 are one shuffle and one
// fma with +-1 (the product is exact, so this is the addition a + b or a - b, rounded once), the further ones plain
// additions. Codes need no search: the range of the thresholds is cut into 15 or 31 cells so narrow that each holds
// one threshold at most; a permute by the cell gives the number of thresholds below it, a second one the next
// threshold, and one comparison decides. See Cells for why that is exact for ties too.
//
// Floors. encode with the statistic of each row reads it twice, the second time from L1, and spends about 25 vector
// operations on 16 columns: 6.5 cycles on four pipes. forward and backward are bound by reading and writing their
// tensors (L3 or memory) before arithmetic.
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

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Lowest `count` of 16, 32 or 64 bits; count may be negative or too large.
BELLBOX_INLINE uint64_t low_bits(int64_t count) {
    return count <= 0 ? 0 : count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

// ---- loading and storing ----

template <Type T>
BELLBOX_INLINE const void* element(const void* p, int64_t i) {
    return static_cast<const char*>(p) + i * (T == Type::f32 ? 4 : 2);
}

template <Type T>
BELLBOX_INLINE void* element(void* p, int64_t i) {
    return static_cast<char*>(p) + i * (T == Type::f32 ? 4 : 2);
}

BELLBOX_INLINE __m512 widen(__m256i bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

template <Type T>
BELLBOX_INLINE __m512 load16(const void* p) {
    if (T == Type::f32) return _mm512_loadu_ps(p);
    return widen(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}

template <Type T>
BELLBOX_INLINE __m512 load16(const void* p, __mmask16 mask) {  // 0 where the mask is clear, and not read
    if (T == Type::f32) return _mm512_maskz_loadu_ps(mask, p);
    return widen(_mm256_maskz_loadu_epi16(mask, p));
}

// Columns [i, i + 128) of a row of k; beyond its end 0.
template <Type T>
BELLBOX_INLINE void load_chunk(const void* row, int64_t i, int64_t k, __m512 (&v)[kRegisters]) {
    const void* p = element<T>(row, i);
    if (k - i >= kChunk) {
        BELLBOX_UNROLL
        for (int j = 0; j < kRegisters; ++j) v[j] = load16<T>(element<T>(p, 16 * j));
    } else {
        BELLBOX_UNROLL
        for (int j = 0; j < kRegisters; ++j) {
            const __mmask16 mask = static_cast<__mmask16>(low_bits(k - i - 16 * j));
            v[j] = load16<T>(element<T>(p, 16 * j), mask);
        }
    }
}

// bf16, round to nearest even, in the upper half of each lane. A NaN that comes out of arithmetic is quiet, so its
// upper half is a NaN as it stands.
BELLBOX_INLINE __m512i round_bf16(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(bits, _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), bits, up);
}

// The upper halves of 16 + 16 lanes.
BELLBOX_INLINE __m512i upper_halves(__m512i a, __m512i b) {
    const __m512i odd = _mm512_add_epi16(
        _mm512_slli_epi16(_mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13,
                                           12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                          1),
        _mm512_set1_epi16(1));
    return _mm512_permutex2var_epi16(a, odd, b);
}

// Columns [i, i + 128) of a row of k, as fp32 or rounded; `halves` holds bf16 in upper halves already.
template <Type T, bool ROUNDED = false>
BELLBOX_INLINE void store_chunk(void* row, int64_t i, int64_t k, const __m512 (&v)[kRegisters]) {
    void* p = element<T>(row, i);
    const bool whole = k - i >= kChunk;
    if (T == Type::f32) {
        BELLBOX_UNROLL
        for (int j = 0; j < kRegisters; ++j) {
            if (whole)
                _mm512_storeu_ps(element<T>(p, 16 * j), v[j]);
            else
                _mm512_mask_storeu_ps(element<T>(p, 16 * j), static_cast<__mmask16>(low_bits(k - i - 16 * j)), v[j]);
        }
    } else {
        BELLBOX_UNROLL
        for (int j = 0; j < kRegisters; j += 2) {
            const __m512i a = ROUNDED ? _mm512_castps_si512(v[j]) : round_bf16(v[j]);
            const __m512i b = ROUNDED ? _mm512_castps_si512(v[j + 1]) : round_bf16(v[j + 1]);
            const __m512i both = upper_halves(a, b);
            if (whole)
                _mm512_storeu_si512(element<T>(p, 16 * j), both);
            else
                _mm512_mask_storeu_epi16(element<T>(p, 16 * j), static_cast<__mmask32>(low_bits(k - i - 16 * j)), both);
        }
    }
}

// ---- rotation ----

// One stage of distance H < 16 within registers: lane i becomes x[i] + x[i + H] or x[i - H] - x[i].
template <int H>
BELLBOX_INLINE void stage(__m512 (&v)[kRegisters]) {
    // Lanes whose bit H is set are the b of a - b.
    constexpr int minus = H == 1 ? 0xaaaa : H == 2 ? 0xcccc : H == 4 ? 0xf0f0 : 0xff00;
    const __m512 sign = _mm512_mask_blend_ps(minus, _mm512_set1_ps(1), _mm512_set1_ps(-1));
    BELLBOX_UNROLL
    for (int j = 0; j < kRegisters; ++j) {
        const __m512 other = H == 1   ? _mm512_permute_ps(v[j], 0xb1)
                             : H == 2 ? _mm512_permute_ps(v[j], 0x4e)
                             : H == 4 ? _mm512_shuffle_f32x4(v[j], v[j], 0xb1)
                                      : _mm512_shuffle_f32x4(v[j], v[j], 0x4e);
        v[j] = _mm512_fmadd_ps(v[j], sign, other);
    }
}

// One stage of distance 16 * H between registers.
template <int H>
BELLBOX_INLINE void stage_across(__m512 (&v)[kRegisters]) {
    BELLBOX_UNROLL
    for (int j = 0; j < kRegisters; ++j) {
        if (j & H) continue;
        const __m512 a = v[j], b = v[j + H];
        v[j] = _mm512_add_ps(a, b);
        v[j + H] = _mm512_sub_ps(a, b);
    }
}

// Blocks up to 128; the branches are the same for every chunk and cost nothing.
BELLBOX_INLINE void butterfly(__m512 (&v)[kRegisters], int64_t block) {
    if (block > 1) stage<1>(v);
    if (block > 2) stage<2>(v);
    if (block > 4) stage<4>(v);
    if (block > 8) stage<8>(v);
    if (block > 16) stage_across<1>(v);
    if (block > 32) stage_across<2>(v);
    if (block > 64) stage_across<4>(v);
}

// What is left of blocks above 128 once each 128 of `row` have been rotated.
inline void butterfly_rest(float* row, int64_t k, int64_t block) {
    for (int64_t h = kChunk; h < block; h *= 2)
        for (int64_t start = 0; start < k; start += 2 * h)
            for (int64_t i = start; i < start + h; i += 16) {
                const __m512 a = _mm512_loadu_ps(row + i), b = _mm512_loadu_ps(row + i + h);
                _mm512_storeu_ps(row + i, _mm512_add_ps(a, b));
                _mm512_storeu_ps(row + i + h, _mm512_sub_ps(a, b));
            }
}

// Rows whose block is above 128 are rotated in memory first.
template <Type T>
inline void rotate_row(const void* x, int64_t k, int64_t block, float* row) {
    for (int64_t i = 0; i < k; i += kChunk) {
        __m512 v[kRegisters];
        load_chunk<T>(x, i, k, v);
        butterfly(v, block);
        store_chunk<Type::f32>(row, i, k, v);
    }
    butterfly_rest(row, k, block);
}

// ---- sums of squares ----

template <Type T>
BELLBOX_INLINE void add_squares(const void* p, __m512d& a, __m512d& b) {
    __m512d low, high;
    if (T == Type::f32) {
        low = _mm512_cvtps_pd(_mm256_loadu_ps(static_cast<const float*>(p)));
        high = _mm512_cvtps_pd(_mm256_loadu_ps(static_cast<const float*>(p) + 8));
    } else {  // even and odd entries: the order within a sum is free
        const __m256i bits = _mm256_loadu_si256(static_cast<const __m256i*>(p));
        low = _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
        high = _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-65536))));
    }
    a = _mm512_fmadd_pd(low, low, a);
    b = _mm512_fmadd_pd(high, high, b);
}

template <Type T>
inline double row_norm(const void* x, int64_t k) {
    __m512d sum[8];
    BELLBOX_UNROLL
    for (int j = 0; j < 8; ++j) sum[j] = _mm512_setzero_pd();
    int64_t i = 0;
    for (; i + 64 <= k; i += 64) {
        BELLBOX_UNROLL
        for (int j = 0; j < 4; ++j) add_squares<T>(element<T>(x, i + 16 * j), sum[2 * j], sum[2 * j + 1]);
    }
    for (; i < k; i += 16) {
        const __m512 v = load16<T>(element<T>(x, i), static_cast<__mmask16>(low_bits(k - i)));
        const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
        const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
        sum[0] = _mm512_fmadd_pd(low, low, sum[0]);
        sum[1] = _mm512_fmadd_pd(high, high, sum[1]);
    }
    BELLBOX_UNROLL
    for (int h = 4; h > 0; h /= 2) {
        BELLBOX_UNROLL
        for (int j = 0; j < h; ++j) sum[j] = _mm512_add_pd(sum[j], sum[j + h]);
    }
    return __builtin_sqrt(_mm512_reduce_add_pd(sum[0]));
}

// ---- codes ----

// 15 thresholds in a register; unused ones are NaN, which no value reaches.
inline __m512 padded_thresholds(const float* thresholds, int n) {
    return _mm512_mask_loadu_ps(_mm512_set1_ps(__builtin_nanf("")), static_cast<__mmask16>(low_bits(n - 1)), thresholds);
}

BELLBOX_INLINE __mmask64 join(__mmask16 a, __mmask16 b, __mmask16 c, __mmask16 d) {
    return _mm512_kunpackd(_mm512_kunpackw(d, c), _mm512_kunpackw(b, a));
}

// The low bytes of 4 x 16 lanes, each 0..255, in order.
BELLBOX_INLINE __m512i low_bytes(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    // Packing works within 128 bits: 32-bit word 4 * lane + source holds lane `lane` of that source.
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    return _mm512_permutexvar_epi32(order, bytes);
}

// The coders. index: codes of 16 values, exact for NaN (0) too. bytes: codes of 64 values.

struct Two {  // 2 levels
    __m512 t;
    explicit Two(const float* thresholds, int) : t(_mm512_set1_ps(thresholds[0])) {}
    BELLBOX_INLINE __mmask16 reached(__m512 v) const { return _mm512_cmp_ps_mask(v, t, _CMP_GE_OQ); }
    BELLBOX_INLINE __m512i index(__m512 v) const { return _mm512_maskz_set1_epi32(reached(v), 1); }
    BELLBOX_INLINE __m512i bytes(__m512 a, __m512 b, __m512 c, __m512 d) const {
        return _mm512_maskz_set1_epi8(join(reached(a), reached(b), reached(c), reached(d)), 1);
    }
};

struct Four {  // 3 or 4 levels: the middle threshold, then the lower or the upper one
    __m512 low, middle, high;
    explicit Four(const float* thresholds, int n)
        : low(_mm512_set1_ps(thresholds[0])),
          middle(_mm512_set1_ps(thresholds[1])),
          high(_mm512_set1_ps(n > 3 ? thresholds[2] : __builtin_nanf(""))) {}
    BELLBOX_INLINE __m512i index(__m512 v) const {
        const __mmask16 upper = _mm512_cmp_ps_mask(v, middle, _CMP_GE_OQ);
        const __mmask16 next = _mm512_cmp_ps_mask(v, _mm512_mask_blend_ps(upper, low, high), _CMP_GE_OQ);
        const __m512i code = _mm512_maskz_set1_epi32(upper, 2);
        return _mm512_mask_add_epi32(code, next, code, _mm512_set1_epi32(1));
    }
    BELLBOX_INLINE __m512i bytes(__m512 a, __m512 b, __m512 c, __m512 d) const {
        return low_bytes(index(a), index(b), index(c), index(d));
    }
};

struct Search {  // any sorted thresholds, equal ones too: binary search by permutes
    __m512 table;
    explicit Search(const float* thresholds, int n) : table(padded_thresholds(thresholds, n)) {}
    template <int STEP>
    BELLBOX_INLINE __m512i step(__m512 v, __m512i code) const {
        // `code` thresholds are reached; are STEP more?
        const __m512i next = _mm512_add_epi32(code, _mm512_set1_epi32(STEP - 1));
        const __mmask16 reached = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(next, table), _CMP_GE_OQ);
        return _mm512_mask_add_epi32(code, reached, code, _mm512_set1_epi32(STEP));
    }
    BELLBOX_INLINE __m512i index(__m512 v) const {
        return step<1>(v, step<2>(v, step<4>(v, step<8>(v, _mm512_setzero_si512()))));
    }
    BELLBOX_INLINE __m512i bytes(__m512 a, __m512 b, __m512 c, __m512 d) const {
        return low_bytes(index(a), index(b), index(c), index(d));
    }
};

// Cells: cell(v) = round(clamp(v) * slope) + N/2, with the rounding of one fma. Each of its steps keeps order, so
// cell() does too: with c the cell of v, a threshold whose own cell is below c is reached by v and one whose cell is
// above c is not. If no two thresholds share a cell, at most one is left, in c itself, and it is number below[c], the
// count of thresholds in lower cells; where c holds none, number below[c] is the next threshold above, and comparing
// with it says no. So code = below[c] + (v >= threshold[below[c]]), whatever cell() rounds to. `exact` says whether
// the condition holds, tried with the same instructions; if not, Search serves.
template <int N>
struct Cells {
    __m512 table, limit, slope, offset;
    __m512i below[2];
    bool exact;

    explicit Cells(const float* thresholds, int n) : table(padded_thresholds(thresholds, n)) {
        const float first = __builtin_fabsf(thresholds[0]), last = __builtin_fabsf(thresholds[n - 2]);
        const float largest = first > last ? first : last;
        const float factor = static_cast<float>(N / 2 - 1) / largest;
        exact = factor > 0 && factor < 1e30f && largest < 1e30f;
        limit = _mm512_set1_ps(largest);
        slope = _mm512_set1_ps(factor);
        offset = _mm512_set1_ps(12582912.0f + N / 2);  // 1.5 * 2^23: the sum has integer spacing, in its lowest bits
        int32_t cells[16];
        _mm512_storeu_si512(cells, _mm512_and_si512(cell(table), _mm512_set1_epi32(N - 1)));
        for (int j = 1; j < n - 1; ++j) exact = exact && cells[j - 1] < cells[j];
        __m512i number = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        for (int half = 0; half < N / 16; ++half) {
            below[half] = _mm512_setzero_si512();
            for (int j = 0; j < n - 1; ++j) {
                const __mmask16 passed = _mm512_cmpgt_epi32_mask(number, _mm512_set1_epi32(cells[j]));
                below[half] = _mm512_mask_add_epi32(below[half], passed, below[half], _mm512_set1_epi32(1));
            }
            number = _mm512_add_epi32(number, _mm512_set1_epi32(16));
        }
    }
    // Low bits of each lane; permutes look at no others. NaN, by the order of the operands, gives the lowest cell.
    BELLBOX_INLINE __m512i cell(__m512 v) const {
        const __m512 floor = _mm512_xor_ps(limit, _mm512_set1_ps(-0.0f));
        const __m512 inside = _mm512_min_ps(_mm512_max_ps(v, floor), limit);
        return _mm512_castps_si512(_mm512_fmadd_ps(inside, slope, offset));
    }
    BELLBOX_INLINE __m512i index(__m512 v) const {
        const __m512i c = cell(v);
        const __m512i base = N == 16 ? _mm512_permutexvar_epi32(c, below[0]) : _mm512_permutex2var_epi32(below[0], c, below[1]);
        const __mmask16 reached = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(base, table), _CMP_GE_OQ);
        return _mm512_mask_add_epi32(base, reached, base, _mm512_set1_epi32(1));
    }
    BELLBOX_INLINE __m512i bytes(__m512 a, __m512 b, __m512 c, __m512 d) const {
        return low_bytes(index(a), index(b), index(c), index(d));
    }
};

// Calls f(coder) with the cheapest coder that is exact for these thresholds.
template <typename F>
BELLBOX_INLINE void with_coder(const float* thresholds, int n, const F& f) {
    if (n == 2) return f(Two(thresholds, n));
    if (n <= 4) return f(Four(thresholds, n));
    if (n <= 8) {
        const Cells<16> cells(thresholds, n);
        if (cells.exact) return f(cells);
    }
    const Cells<32> cells(thresholds, n);
    if (cells.exact) return f(cells);
    f(Search(thresholds, n));
}

// ---- encode ----

// One row; `flag` becomes a NaN or infinity where the row is not finite or has entries above 1e19.
template <Type T, typename Coder>
inline int32_t encode_row(const Coder& coder, const void* x, int64_t k, int64_t block, float r, __m512i level_table,
                          int8_t* levels, int64_t ldl, float* flag) {
    const __m512 factor = _mm512_set1_ps(r);
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += kChunk) {
        __m512 v[kRegisters];
        load_chunk<T>(x, i, k, v);
        if (flag != nullptr) {
            BELLBOX_UNROLL
            for (int j = 0; j < kRegisters; ++j) squares = _mm512_fmadd_ps(v[j], v[j], squares);
        }
        butterfly(v, block);
        BELLBOX_UNROLL
        for (int j = 0; j < kRegisters; ++j) v[j] = _mm512_mul_ps(v[j], factor);
        BELLBOX_UNROLL
        for (int half = 0; half < 2; ++half) {
            const __m512* u = v + 4 * half;
            const int64_t at = i + 64 * half;
            __m512i out = _mm512_shuffle_epi8(level_table, coder.bytes(u[0], u[1], u[2], u[3]));
            if (k - i < kChunk) out = _mm512_maskz_mov_epi8(low_bits(k - at), out);
            sum[half] = _mm512_dpbusd_epi32(sum[half], ones, out);
            if (at < ldl) _mm512_storeu_si512(levels + at, out);
        }
    }
    if (flag != nullptr) *flag = _mm512_reduce_add_ps(squares);
    return _mm512_reduce_add_epi32(_mm512_add_epi32(sum[0], sum[1]));
}

template <Type T, typename Coder>
inline void encode_rows(const EncodeArgs& a, const Coder& coder, float* scratch, int64_t begin, int64_t end) {
    alignas(16) int8_t bytes[16];
    for (int code = 0; code < 16; ++code) bytes[code] = static_cast<int8_t>(a.multiplier * code - a.shift);
    const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
    const bool fixed = a.inverse_sigma > 0;
    const float fixed_r = static_cast<float>(a.inverse_sigma / __builtin_sqrt(static_cast<double>(a.block)));
    const int64_t written = (a.k + 63) / 64 * 64;
    for (int64_t i = begin; i < end; ++i) {
        const void* x = element<T>(a.x, i * a.ldx);
        int8_t* levels = a.levels + i * a.ldl;
        float r = fixed_r, flag = 0, *flagged = fixed ? &flag : nullptr;
        a.marks[i] = 1;
        if (!fixed) {
            r = normaliser(row_norm<T>(x, a.k), a.k, a.block);
            a.marks[i] = r - r + 1;
        }
        if (scratch == nullptr) {
            a.sums[i] = encode_row<T>(coder, x, a.k, a.block, r, table, levels, a.ldl, flagged);
        } else {
            rotate_row<T>(x, a.k, a.block, scratch);
            a.sums[i] = encode_row<Type::f32>(coder, scratch, a.k, 1, r, table, levels, a.ldl, flagged);
        }
        // A sum of squares that fits fp32 is far from the ceiling; only others need the statistic for their mark.
        if (fixed && !(flag < 3e38f)) {
            const float statistic = normaliser(row_norm<T>(x, a.k), a.k, a.block);
            a.marks[i] = statistic - statistic + 1;
        }
        if (written < a.ldl) memset(levels + written, 0, static_cast<size_t>(a.ldl - written));
    }
}

// ---- training ----

// e^(-v^2/2), relative error below 2e-7; NaN stays NaN. With v^2 = square + rest, exact:
// -v^2/2 = n ln 2 + r, |r| <= ln 2 / 2; the polynomial is a minimax fit of (e^r - 1 - r) / r^2 made for this
// (reweighted least squares, error 4e-9). Without `rest` the rounding of v^2 would cost up to 5e-6 at large v.
BELLBOX_INLINE __m512 bell(__m512 v) {
    v = _mm512_min_ps(_mm512_set1_ps(15), _mm512_abs_ps(v));  // e^(-15^2/2) rounds to 0
    const __m512 square = _mm512_mul_ps(v, v), rest = _mm512_fmsub_ps(v, v, square), half = _mm512_set1_ps(0.5f);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(square, _mm512_set1_ps(-0.72134752f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(0.693115234375f), _mm512_mul_ps(square, half));  // 12 bits: exact
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(3.194618329871446e-05f), r);
    r = _mm512_fnmsub_ps(rest, half, r);
    __m512 p = _mm512_set1_ps(0.0013813880505040288f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.008369063958525658f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.041668422520160675f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.166665181517601f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.4999999403953552f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r);
    return _mm512_scalef_ps(_mm512_add_ps(p, _mm512_set1_ps(1)), n);
}

template <Type IN, Type OUT, typename Coder>
inline void forward_rows(const ForwardArgs& a, const Coder& coder, float* scratch, int64_t begin, int64_t end) {
    const __m512 codes = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 centred = _mm512_sub_ps(codes, _mm512_set1_ps(a.offset));
    for (int64_t i = begin; i < end; ++i) {
        const void* x = element<IN>(a.x, i * a.k);
        void *x_hat = element<OUT>(a.x_hat, i * a.k), *kept = element<OUT>(a.v, i * a.k);
        const float r = a.r[i * a.r_stride], scale = a.scale[i * a.scale_stride] * (r - r + 1);
        const __m512 factor = _mm512_set1_ps(r);
        __m512 levels = _mm512_mul_ps(centred, _mm512_set1_ps(scale));  // what each code stands for, rounded once a row
        if (OUT == Type::bf16) levels = _mm512_castsi512_ps(round_bf16(levels));
        if (scratch != nullptr) rotate_row<IN>(x, a.k, a.block, scratch);
        for (int64_t j = 0; j < a.k; j += kChunk) {
            __m512 v[kRegisters], out[kRegisters];
            if (scratch != nullptr) {
                load_chunk<Type::f32>(scratch, j, a.k, v);
            } else {
                load_chunk<IN>(x, j, a.k, v);
                butterfly(v, a.block);
            }
            BELLBOX_UNROLL
            for (int l = 0; l < kRegisters; ++l) {
                v[l] = _mm512_mul_ps(v[l], factor);
                out[l] = _mm512_permutexvar_ps(coder.index(v[l]), levels);
            }
            store_chunk<OUT>(kept, j, a.k, v);
            store_chunk<OUT, true>(x_hat, j, a.k, out);
        }
    }
}

BELLBOX_INLINE double sum_of(__m512d v) { return _mm512_reduce_add_pd(v); }

// Sums of fp32 lanes are handed on to fp64 after each chunk, so their error does not grow with k.
BELLBOX_INLINE __m512d add_wide(__m512d sum, __m512 v) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    return _mm512_add_pd(sum, _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))));
}

template <Type T>
inline void backward_rows(const BackwardArgs& a, float* scratch, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const void *grad = element<T>(a.grad, i * a.k), *kept = element<T>(a.v, i * a.k);
        const void* x_hat = a.row_dot != nullptr ? element<T>(a.x_hat, i * a.k) : nullptr;
        void* grad_x = element<T>(a.grad_x, i * a.k);
        const float r = a.r[i * a.r_stride], factor = 2 * 0.3989422804014327f * a.gamma[i * a.gamma_stride];
        // g_v to scratch, and the sums over the row.
        __m512d dot = _mm512_setzero_pd(), out_dot = _mm512_setzero_pd();
        for (int64_t j = 0; j < a.k; j += kChunk) {
            __m512 g[kRegisters], v[kRegisters];
            load_chunk<T>(grad, j, a.k, g);
            if (x_hat != nullptr) {
                load_chunk<T>(x_hat, j, a.k, v);
                __m512 part = _mm512_setzero_ps();
                BELLBOX_UNROLL
                for (int l = 0; l < kRegisters; ++l) part = _mm512_fmadd_ps(g[l], v[l], part);
                out_dot = add_wide(out_dot, part);
            }
            load_chunk<T>(kept, j, a.k, v);
            __m512 part = _mm512_setzero_ps();
            BELLBOX_UNROLL
            for (int l = 0; l < kRegisters; ++l) {
                g[l] = _mm512_mul_ps(_mm512_mul_ps(bell(v[l]), _mm512_set1_ps(factor)), g[l]);
                part = _mm512_fmadd_ps(g[l], v[l], part);
            }
            dot = add_wide(dot, part);
            store_chunk<Type::f32>(scratch, j, a.k, g);
        }
        if (x_hat != nullptr) a.row_dot[i] = static_cast<float>(sum_of(out_dot));
        const float mean = a.mean != nullptr ? *a.mean
                                             : static_cast<float>(sum_of(dot) / static_cast<double>(a.k)) *
                                                   a.free[i * a.free_stride];
        const __m512 centre = _mm512_set1_ps(mean), r16 = _mm512_set1_ps(r);
        for (int64_t j = 0; j < a.k; j += kChunk) {
            __m512 g[kRegisters], v[kRegisters];
            load_chunk<Type::f32>(scratch, j, a.k, g);
            load_chunk<T>(kept, j, a.k, v);
            BELLBOX_UNROLL
            for (int l = 0; l < kRegisters; ++l) g[l] = _mm512_mul_ps(_mm512_fnmadd_ps(v[l], centre, g[l]), r16);
            butterfly(g, a.block);
            if (a.block <= kChunk)
                store_chunk<T>(grad_x, j, a.k, g);
            else
                store_chunk<Type::f32>(scratch, j, a.k, g);
        }
        if (a.block > kChunk) {
            butterfly_rest(scratch, a.k, a.block);
            for (int64_t j = 0; j < a.k; j += kChunk) {
                __m512 g[kRegisters];
                load_chunk<Type::f32>(scratch, j, a.k, g);
                store_chunk<T>(grad_x, j, a.k, g);
            }
        }
    }
}

}  // namespace rows

inline void encode(const EncodeArgs& a, int64_t begin, int64_t end) {
    const bool big = a.block > rows::kChunk;  // such rows are rotated in memory
    const Scratch scratch(big ? a.k : 0);
    rows::with_coder(a.thresholds, a.n, [&](const auto& coder) {
        if (a.x_type == Type::f32)
            rows::encode_rows<Type::f32>(a, coder, big ? scratch.data : nullptr, begin, end);
        else
            rows::encode_rows<Type::bf16>(a, coder, big ? scratch.data : nullptr, begin, end);
    });
}

inline void row_norms(const void* x, Type type, int64_t k, int64_t begin, int64_t end, double* norms) {
    for (int64_t i = begin; i < end; ++i)
        norms[i] = type == Type::f32 ? rows::row_norm<Type::f32>(rows::element<Type::f32>(x, i * k), k)
                                     : rows::row_norm<Type::bf16>(rows::element<Type::bf16>(x, i * k), k);
}

inline void forward(const ForwardArgs& a, int64_t begin, int64_t end) {
    const bool big = a.block > rows::kChunk;
    const Scratch scratch(big ? a.k : 0);
    float* row = big ? scratch.data : nullptr;
    rows::with_coder(a.thresholds, a.n, [&](const auto& coder) {
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
    const Scratch scratch(a.k);
    if (a.type == Type::f32)
        rows::backward_rows<Type::f32>(a, scratch.data, begin, end);
    else
        rows::backward_rows<Type::bf16>(a, scratch.data, begin, end);
}

}  // namespace avx512
}  // namespace
}  // namespace bellbox
