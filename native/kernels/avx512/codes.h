// Values to codes with AVX-512.
//
// Few levels are compared with their thresholds (Two, Four). More need no search either: the range of the thresholds is
// cut into 31 cells so narrow that each holds one threshold at most; a permute by the cell gives that threshold, one
// comparison decides, and a table of bytes turns cell and decision into the level. See Cells for why that is exact, ties
// included.
#pragma once

#include <immintrin.h>

#include "kernels/avx512/rows.h"

namespace bellbox {
namespace {
namespace avx512 {
namespace rows {

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
    if (ORDER != Type::bf16) return bytes;
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

// 3 or 4 levels: the middle threshold decides which of the others is the second to compare with.
struct Four {
    __m512 first, middle, last;  // the last of 3 levels is NaN, which no value reaches
    __m512i low, high, two;
    Four(const float* t, int n, Values values)
        : first(_mm512_set1_ps(t[0])), middle(_mm512_set1_ps(t[1])),
          last(_mm512_set1_ps(n > 3 ? t[2] : __builtin_nanf(""))), low(_mm512_set1_epi8(values.of(0))),
          high(_mm512_set1_epi8(values.of(1))), two(_mm512_set1_epi8(static_cast<char>(2 * values.multiplier))) {}
    BELLBOX_INLINE __mmask16 upper(__m512 v) const { return _mm512_cmp_ps_mask(v, middle, _CMP_GE_OQ); }
    BELLBOX_INLINE __mmask16 odd(__m512 v, __mmask16 upper) const {
        return _mm512_cmp_ps_mask(v, _mm512_mask_blend_ps(upper, first, last), _CMP_GE_OQ);
    }
    BELLBOX_INLINE __m512i index(__m512 v) const {
        const __mmask16 u = upper(v);
        const __m512i code = _mm512_maskz_set1_epi32(u, 2);
        return _mm512_mask_add_epi32(code, odd(v, u), code, _mm512_set1_epi32(1));
    }
    template <Type ORDER>
    BELLBOX_INLINE __m512i levels(__m512 a, __m512 b, __m512 c, __m512 d) const {
        const __mmask16 u[4] = {upper(a), upper(b), upper(c), upper(d)};
        const __mmask64 odds = join(odd(a, u[0]), odd(b, u[1]), odd(c, u[2]), odd(d, u[3]));
        const __m512i level = _mm512_mask_blend_epi8(odds, low, high);
        return in_columns<ORDER>(_mm512_mask_add_epi8(level, join(u[0], u[1], u[2], u[3]), level, two));
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
    if (n <= 4) return f(Four(thresholds, n, values));
    const Cells cells(thresholds, n, values);
    if (cells.exact) return f(cells);
    f(Search(thresholds, n, values));
}

}  // namespace rows

}  // namespace avx512
}  // namespace
}  // namespace bellbox
