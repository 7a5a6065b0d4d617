// Quantizing rows with AVX2 and FMA.
//
// Sixteen registers do not hold a block of 128, so a chunk of 128 columns goes through a buffer in L1: 32 columns at a
// time for the stages up to 16 (those within a register are a shuffle and an fma with +-1, which is a + b or a - b
// rounded once), then registers 32 columns apart for the last two. Codes are found by binary search: one comparison a
// bit, with the threshold to compare with chosen by a permute; 13 operations for 16 levels instead of 30 by counting,
// and exact for any sorted thresholds. The end of a row goes through zero-filled copies.
//
// Floors. encode: about 32 operations for 8 columns at 16 levels, 10 cycles at three a cycle. forward and backward are
// as much bound by arithmetic as by memory.
#pragma once

#include <immintrin.h>

#include "encode_portable.h"

#ifndef BELLBOX_INLINE
#define BELLBOX_INLINE inline __attribute__((always_inline))
#define BELLBOX_UNROLL _Pragma("GCC unroll 16")
#endif

namespace bellbox {
namespace {
namespace avx2 {
namespace rows {

constexpr int64_t kChunk = 128;

inline size_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

template <Type T>
BELLBOX_INLINE const void* element(const void* p, int64_t i) {
    return static_cast<const char*>(p) + i * (T == Type::f32 ? 4 : 2);
}

template <Type T>
BELLBOX_INLINE void* element(void* p, int64_t i) {
    return static_cast<char*>(p) + i * (T == Type::f32 ? 4 : 2);
}

// ---- loading and storing ----

template <Type T>
BELLBOX_INLINE __m256 load8(const void* p) {
    if (T == Type::f32) return _mm256_loadu_ps(static_cast<const float*>(p));
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

// bf16, round to nearest even, in the lower half of each lane. A NaN that comes out of arithmetic is quiet, so its
// upper half is a NaN as it stands.
BELLBOX_INLINE __m256i round_bf16(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i ordered = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_ORD_Q));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_and_si256(up, ordered)), 16);
}

template <Type T>
BELLBOX_INLINE void store16(void* p, __m256 a, __m256 b) {
    if (T == Type::f32) {
        _mm256_storeu_ps(static_cast<float*>(p), a);
        _mm256_storeu_ps(static_cast<float*>(p) + 8, b);
    } else {
        const __m256i both = _mm256_packus_epi32(round_bf16(a), round_bf16(b));
        _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_permute4x64_epi64(both, 0xd8));
    }
}

// Columns [i, i + 128) of a row: where they lie, or a copy filled up with zeros where the row ends before.
struct Window {
    alignas(32) char copy[kChunk * 4];
    template <Type T>
    BELLBOX_INLINE const void* read(const void* row, int64_t i, int64_t k) {
        if (k - i >= kChunk) return element<T>(row, i);
        memset(copy, 0, sizeof(copy));
        memcpy(copy, element<T>(row, i), static_cast<size_t>(k - i) * size_of(T));
        return copy;
    }
    // Where to write them; done() copies what belongs to the row.
    template <Type T>
    BELLBOX_INLINE void* write(void* row, int64_t i, int64_t k) {
        return k - i >= kChunk ? element<T>(row, i) : copy;
    }
    template <Type T>
    BELLBOX_INLINE void done(void* row, int64_t i, int64_t k) const {
        if (k - i < kChunk) memcpy(element<T>(row, i), copy, static_cast<size_t>(k - i) * size_of(T));
    }
};

// ---- rotation ----

// Distance H < 8 within a register: lane i becomes x[i] + x[i + H] or x[i - H] - x[i].
template <int H>
BELLBOX_INLINE __m256 stage(__m256 v) {
    const __m256 sign = H == 1   ? _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1)
                        : H == 2 ? _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1)
                                 : _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
    const __m256 other = H == 1   ? _mm256_permute_ps(v, 0xb1)
                         : H == 2 ? _mm256_permute_ps(v, 0x4e)
                                  : _mm256_permute2f128_ps(v, v, 1);
    return _mm256_fmadd_ps(v, sign, other);
}

// Two registers: a + b, a - b.
BELLBOX_INLINE void add_sub(__m256& a, __m256& b) {
    const __m256 sum = _mm256_add_ps(a, b);
    b = _mm256_sub_ps(a, b);
    a = sum;
}

// The stages of blocks up to 128 on one chunk, given as load(column), to p.
template <typename Load>
BELLBOX_INLINE void butterfly(float* p, int64_t block, const Load& load) {
    for (int i = 0; i < kChunk; i += 32) {
        __m256 v[4];
        BELLBOX_UNROLL
        for (int j = 0; j < 4; ++j) {
            v[j] = load(i + 8 * j);
            if (block > 1) v[j] = stage<1>(v[j]);
            if (block > 2) v[j] = stage<2>(v[j]);
            if (block > 4) v[j] = stage<4>(v[j]);
        }
        if (block > 8) add_sub(v[0], v[1]), add_sub(v[2], v[3]);
        if (block > 16) add_sub(v[0], v[2]), add_sub(v[1], v[3]);
        BELLBOX_UNROLL
        for (int j = 0; j < 4; ++j) _mm256_store_ps(p + i + 8 * j, v[j]);
    }
    if (block <= 32) return;
    BELLBOX_UNROLL
    for (int i = 0; i < 32; i += 8) {
        __m256 v[4];
        BELLBOX_UNROLL
        for (int j = 0; j < 4; ++j) v[j] = _mm256_load_ps(p + i + 32 * j);
        add_sub(v[0], v[1]), add_sub(v[2], v[3]);
        if (block > 64) add_sub(v[0], v[2]), add_sub(v[1], v[3]);
        BELLBOX_UNROLL
        for (int j = 0; j < 4; ++j) _mm256_store_ps(p + i + 32 * j, v[j]);
    }
}

// What is left of blocks above 128 once each chunk has been rotated.
inline void butterfly_rest(float* row, int64_t k, int64_t block) {
    for (int64_t h = kChunk; h < block; h *= 2)
        for (int64_t start = 0; start < k; start += 2 * h)
            for (int64_t i = start; i < start + h; i += 8) {
                __m256 a = _mm256_load_ps(row + i), b = _mm256_load_ps(row + i + h);
                add_sub(a, b);
                _mm256_store_ps(row + i, a);
                _mm256_store_ps(row + i + h, b);
            }
}

// One chunk of x as fp32 at p, rotated. CHECK: its squares are added to `squares`.
template <Type T, bool CHECK>
BELLBOX_INLINE void rotate_chunk(const void* x, int64_t i, int64_t k, int64_t block, float* p, __m256& squares) {
    Window window;
    const void* from = window.read<T>(x, i, k);
    __m256 sum = squares;
    butterfly(p, block, [&](int j) {
        const __m256 v = load8<T>(element<T>(from, j));
        if (CHECK) sum = _mm256_fmadd_ps(v, v, sum);
        return v;
    });
    squares = sum;
}

// The scratch memory of rows: a chunk, or the whole row where blocks are longer than a chunk.
struct Rotation {
    int64_t k, block;
    bool whole;
    float* scratch;
    template <Type T, bool CHECK>
    BELLBOX_INLINE void begin(const void* x, __m256& squares) const {  // of a row
        if (!whole) return;
        for (int64_t i = 0; i < k; i += kChunk) rotate_chunk<T, CHECK>(x, i, k, block, scratch + i, squares);
        butterfly_rest(scratch, k, block);
    }
    template <Type T, bool CHECK>
    BELLBOX_INLINE const float* chunk(const void* x, int64_t i, __m256& squares) const {
        if (whole) return scratch + i;
        rotate_chunk<T, CHECK>(x, i, k, block, scratch, squares);
        return scratch;
    }
};

// ---- sums ----

BELLBOX_INLINE double sum_of(__m256d v) {
    alignas(32) double lanes[4];
    _mm256_store_pd(lanes, v);
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

BELLBOX_INLINE __m256d low_half(__m256 v) { return _mm256_cvtps_pd(_mm256_castps256_ps128(v)); }
BELLBOX_INLINE __m256d high_half(__m256 v) { return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)); }

template <Type T>
inline double row_norm(const void* x, int64_t k) {
    __m256d sum[4];
    BELLBOX_UNROLL
    for (int j = 0; j < 4; ++j) sum[j] = _mm256_setzero_pd();
    Window window;
    for (int64_t i = 0; i < k; i += kChunk) {
        const void* from = window.read<T>(x, i, k);
        BELLBOX_UNROLL
        for (int j = 0; j < kChunk / 8; ++j) {
            const __m256 v = load8<T>(element<T>(from, 8 * j));
            const __m256d low = low_half(v), high = high_half(v);
            sum[2 * (j & 1)] = _mm256_fmadd_pd(low, low, sum[2 * (j & 1)]);
            sum[2 * (j & 1) + 1] = _mm256_fmadd_pd(high, high, sum[2 * (j & 1) + 1]);
        }
    }
    return __builtin_sqrt(sum_of(_mm256_add_pd(_mm256_add_pd(sum[0], sum[1]), _mm256_add_pd(sum[2], sum[3]))));
}

// ---- codes ----

// Binary search of BITS comparisons. A comparison gives 0 or -1, so what is kept is minus the code so far, and the
// tables are laid out for its lowest bits. Thresholds that are missing are NaN, which no value reaches.
template <int BITS>
struct Search {
    __m256 first, lower, upper, third, fourth;
    __m256i level;  // int8, by the lowest four bits of minus the code

    Search(const float* thresholds, int n, int multiplier, int shift) {
        float t[16];
        for (int j = 0; j < 16; ++j) t[j] = j < n - 1 ? thresholds[j] : __builtin_nanf("");
        // After b bits with the value c, the next comparison is with the middle of what is left.
        const auto middle = [&](int b, int c) { return t[(2 * c + 1) * (1 << BITS) / (2 << b) - 1]; };
        first = _mm256_set1_ps(middle(0, 0));
        alignas(32) float table[8] = {};
        if (BITS > 1) lower = _mm256_set1_ps(middle(1, 0)), upper = _mm256_set1_ps(middle(1, 1));
        if (BITS > 2) {
            for (int c = 0; c < 8; ++c) table[-c & 7] = middle(2, c & 3);
            third = _mm256_load_ps(table);
        }
        if (BITS > 3) {
            for (int c = 0; c < 8; ++c) table[-c & 7] = middle(3, c);
            fourth = _mm256_load_ps(table);
        }
        alignas(32) int8_t bytes[32];
        for (int c = 0; c < 32; ++c) bytes[(c & 16) + (-c & 15)] = static_cast<int8_t>(multiplier * (c & 15) - shift);
        level = _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
    }

    BELLBOX_INLINE static __m256 reached(__m256 v, __m256 t) { return _mm256_cmp_ps(v, t, _CMP_GE_OQ); }
    BELLBOX_INLINE static __m256i append(__m256i bits, __m256 next) {
        return _mm256_add_epi32(_mm256_add_epi32(bits, bits), _mm256_castps_si256(next));
    }

    BELLBOX_INLINE __m256i minus_code(__m256 v) const {
        const __m256 half = reached(v, first);
        __m256i bits = _mm256_castps_si256(half);
        if (BITS > 1) bits = append(bits, reached(v, _mm256_blendv_ps(lower, upper, half)));
        if (BITS > 2) bits = append(bits, reached(v, _mm256_permutevar_ps(third, bits)));
        if (BITS > 3) bits = append(bits, reached(v, _mm256_permutevar8x32_ps(fourth, bits)));
        return bits;
    }

    // The lowest four bits of minus the codes of 32 values, as bytes.
    BELLBOX_INLINE __m256i index(__m256 a, __m256 b, __m256 c, __m256 d) const {
        const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(minus_code(a), minus_code(b)),
                                                 _mm256_packs_epi32(minus_code(c), minus_code(d)));
        // Packing works within 128 bits: 32-bit word 4 * half + source holds that half of the source.
        const __m256i ordered = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        return _mm256_and_si256(ordered, _mm256_set1_epi8(15));
    }

    BELLBOX_INLINE __m256i levels(__m256 a, __m256 b, __m256 c, __m256 d) const {
        return _mm256_shuffle_epi8(level, index(a, b, c, d));
    }
};

// What each code is worth in bf16, its two bytes apart, by the lowest four bits of minus the code.
struct Worth {
    __m256i low, high;
    Worth(float offset, float scale) {
        alignas(16) uint8_t bytes[2][16];
        for (int c = 0; c < 16; ++c) {
            const uint16_t value = float_to_bf16((static_cast<float>(c) - offset) * scale);
            bytes[0][-c & 15] = static_cast<uint8_t>(value & 255);
            bytes[1][-c & 15] = static_cast<uint8_t>(value >> 8);
        }
        low = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[0])));
        high = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[1])));
    }
    // 32 bf16 numbers to p.
    BELLBOX_INLINE void store32(void* p, __m256i index) const {
        index = _mm256_permute4x64_epi64(index, 0xd8);  // interleaving works within 128 bits
        const __m256i l = _mm256_shuffle_epi8(low, index), h = _mm256_shuffle_epi8(high, index);
        _mm256_storeu_si256(static_cast<__m256i*>(p), _mm256_unpacklo_epi8(l, h));
        _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, _mm256_unpackhi_epi8(l, h));
    }
};

template <typename F>
BELLBOX_INLINE void with_coder(const float* thresholds, int n, int multiplier, int shift, const F& f) {
    if (n <= 2) return f(Search<1>(thresholds, n, multiplier, shift));
    if (n <= 4) return f(Search<2>(thresholds, n, multiplier, shift));
    if (n <= 8) return f(Search<3>(thresholds, n, multiplier, shift));
    f(Search<4>(thresholds, n, multiplier, shift));
}

// ---- encode ----

template <Type T, bool FIXED, typename Coder>
inline void encode_rows(const EncodeArgs& a, const Coder shared, const Rotation& rotation, int64_t begin, int64_t end) {
    const Coder coder = shared;  // a copy of its own: stores of bytes could change one that others see
    const float fixed_r = static_cast<float>(a.inverse_sigma / __builtin_sqrt(static_cast<double>(a.block)));
    const int64_t k = a.k, written = (k + 63) / 64 * 64;
    for (int64_t i = begin; i < end; ++i) {
        const void* x = element<T>(a.x, i * a.ldx);
        int8_t* levels = a.levels + i * a.ldl;
        float r = fixed_r;
        if (!FIXED) {
            r = normaliser(row_norm<T>(x, k), k, a.block);
            a.marks[i] = r - r + 1;
        }
        const __m256 factor = _mm256_set1_ps(r);
        __m256 squares = _mm256_setzero_ps();
        __m256i sums = _mm256_setzero_si256();
        rotation.begin<T, FIXED>(x, squares);
        for (int64_t j = 0; j < k; j += kChunk) {
            const float* p = rotation.chunk<T, FIXED>(x, j, squares);
            alignas(32) int8_t copy[kChunk];
            int8_t* out = k - j >= kChunk ? levels + j : copy;
            for (int l = 0; l < kChunk; l += 32) {
                __m256 v[4];
                BELLBOX_UNROLL
                for (int h = 0; h < 4; ++h) v[h] = _mm256_mul_ps(_mm256_load_ps(p + l + 8 * h), factor);
                __m256i bytes = coder.levels(v[0], v[1], v[2], v[3]);
                if (k - j - l < 32) {  // what is beyond the end is 0
                    alignas(32) int8_t cut[32] = {};
                    alignas(32) int8_t all[32];
                    _mm256_store_si256(reinterpret_cast<__m256i*>(all), bytes);
                    for (int64_t c = 0; c < k - j - l; ++c) cut[c] = all[c];
                    bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(cut));
                }
                const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
                sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + l), bytes);
            }
            if (out == copy) memcpy(levels + j, copy, static_cast<size_t>(written - j));
        }
        alignas(32) int32_t lanes[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums);
        a.sums[i] = 0;
        for (int l = 0; l < 8; ++l) a.sums[i] += lanes[l];
        if (FIXED) {
            // A sum of squares that fits fp32 is far below the ceiling; others need the statistic for their mark.
            alignas(32) float flags[8];
            _mm256_store_ps(flags, squares);
            bool fine = true;
            for (int l = 0; l < 8; ++l) fine = fine && flags[l] < 3e38f;
            const float statistic = fine ? 0 : normaliser(row_norm<T>(x, k), k, a.block);
            a.marks[i] = statistic - statistic + 1;
        }
        if (written < a.ldl) memset(levels + written, 0, static_cast<size_t>(a.ldl - written));
    }
}

// ---- training ----

template <Type IN, Type OUT, typename Coder>
inline void forward_rows(const ForwardArgs& a, const Coder shared, const Rotation& rotation, int64_t begin,
                         int64_t end) {
    const Coder coder = shared;
    const int64_t k = a.k;
    const __m256 offset = _mm256_set1_ps(a.offset);
    for (int64_t i = begin; i < end; ++i) {
        const void* x = element<IN>(a.x, i * k);
        void *x_hat = element<OUT>(a.x_hat, i * k), *kept = element<OUT>(a.v, i * k);
        const float r = a.r[i * a.r_stride], scale = a.scale[i * a.scale_stride] * (r - r + 1);
        const __m256 factor = _mm256_set1_ps(r), factor_out = _mm256_set1_ps(scale);
        const Worth worth(OUT == Type::bf16 ? a.offset : 0, scale);
        __m256 unused = _mm256_setzero_ps();
        rotation.begin<IN, false>(x, unused);
        for (int64_t j = 0; j < k; j += kChunk) {
            const float* p = rotation.chunk<IN, false>(x, j, unused);
            Window v_window, x_window;
            void *v_out = v_window.write<OUT>(kept, j, k), *x_out = x_window.write<OUT>(x_hat, j, k);
            for (int l = 0; l < kChunk; l += 32) {
                __m256 v[4];
                BELLBOX_UNROLL
                for (int h = 0; h < 4; ++h) v[h] = _mm256_mul_ps(_mm256_load_ps(p + l + 8 * h), factor);
                store16<OUT>(element<OUT>(v_out, l), v[0], v[1]);
                store16<OUT>(element<OUT>(v_out, l + 16), v[2], v[3]);
                if (OUT == Type::bf16) {
                    worth.store32(element<OUT>(x_out, l), coder.index(v[0], v[1], v[2], v[3]));
                } else {
                    BELLBOX_UNROLL
                    for (int h = 0; h < 4; ++h) {
                        const __m256 code = _mm256_cvtepi32_ps(_mm256_abs_epi32(coder.minus_code(v[h])));
                        const __m256 out = _mm256_mul_ps(_mm256_sub_ps(code, offset), factor_out);
                        _mm256_storeu_ps(static_cast<float*>(x_out) + l + 8 * h, out);
                    }
                }
            }
            v_window.done<OUT>(kept, j, k);
            x_window.done<OUT>(x_hat, j, k);
        }
    }
}

// e^(-v^2/2), relative error below 2e-7 down to 2^-126, then 0; NaN stays NaN. y = v^2 is held as square + rest, exact
// (rounding it alone would cost 5e-6 at large v), and -y/2 = n ln 2 - z/2 with |z| <= ln 2. The polynomial for
// e^(-z/2) is a minimax fit made for this (reweighted least squares, error 4e-9).
BELLBOX_INLINE __m256 bell(__m256 v) {
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
    v = _mm256_min_ps(_mm256_set1_ps(13.27f), magnitude);  // there n is -127, and 2^n comes out as 0
    const __m256 square = _mm256_mul_ps(v, v), rest = _mm256_fmsub_ps(v, v, square);
    // n + 127 in the lowest bits of `shifted`, from where it moves into the exponent.
    const __m256 magic = _mm256_set1_ps(12582912.0f + 127);
    const __m256 shifted = _mm256_fmadd_ps(square, _mm256_set1_ps(-0.72134752f), magic);
    const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
    const __m256 n = _mm256_sub_ps(shifted, magic);
    // 2 ln 2 in two parts, the first of 12 bits: n times it is exact.
    const __m256 high = _mm256_fmadd_ps(n, _mm256_set1_ps(1.38623046875f), square);
    const __m256 z = _mm256_add_ps(high, _mm256_fmadd_ps(n, _mm256_set1_ps(6.389237e-05f), rest));
    const __m256 z2 = _mm256_mul_ps(z, z);  // Estrin's order: the chain of additions is what takes time here
    const __m256 a = _mm256_fmadd_ps(z, _mm256_set1_ps(-0.5f), _mm256_set1_ps(1));
    const __m256 b = _mm256_fmadd_ps(z, _mm256_set1_ps(-0.020833148f), _mm256_set1_ps(0.124999985f));
    const __m256 c = _mm256_fmadd_ps(z, _mm256_set1_ps(-0.00026153325f), _mm256_set1_ps(0.0026042764f));
    const __m256 tail = _mm256_fmadd_ps(z2, _mm256_set1_ps(2.1584188e-05f), c);
    const __m256 p = _mm256_fmadd_ps(z2, _mm256_fmadd_ps(z2, tail, b), a);
    return _mm256_mul_ps(p, power);
}

// Sums of fp32 lanes are handed on to fp64 after each chunk, so their error does not grow with k.
BELLBOX_INLINE __m256d add_wide(__m256d sum, __m256 v) {
    return _mm256_add_pd(sum, _mm256_add_pd(low_half(v), high_half(v)));
}

template <Type T>
inline void backward_rows(const BackwardArgs& a, float* scratch, int64_t begin, int64_t end) {
    const int64_t k = a.k, block = a.block;
    Window window, other;
    for (int64_t i = begin; i < end; ++i) {
        const void *grad = element<T>(a.grad, i * k), *kept = element<T>(a.v, i * k);
        const void* x_hat = a.row_dot != nullptr ? element<T>(a.x_hat, i * k) : nullptr;
        void* grad_x = element<T>(a.grad_x, i * k);
        const float r = a.r[i * a.r_stride], factor = 2 * 0.3989422804014327f * a.gamma[i * a.gamma_stride];
        // g_v / factor to scratch, and the sums over the row.
        __m256d dot = _mm256_setzero_pd(), out_dot = _mm256_setzero_pd();
        for (int64_t j = 0; j < k; j += kChunk) {
            const void* g_in = window.read<T>(grad, j, k);
            if (x_hat != nullptr) {
                const void* x_in = other.read<T>(x_hat, j, k);
                __m256 part = _mm256_setzero_ps();
                for (int l = 0; l < kChunk; l += 8)
                    part = _mm256_fmadd_ps(load8<T>(element<T>(g_in, l)), load8<T>(element<T>(x_in, l)), part);
                out_dot = add_wide(out_dot, part);
            }
            const void* v_in = other.read<T>(kept, j, k);
            __m256 part[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
            for (int l = 0; l < kChunk; l += 16) {
                BELLBOX_UNROLL
                for (int h = 0; h < 2; ++h) {
                    const __m256 v = load8<T>(element<T>(v_in, l + 8 * h));
                    const __m256 g = _mm256_mul_ps(bell(v), load8<T>(element<T>(g_in, l + 8 * h)));
                    part[h] = _mm256_fmadd_ps(g, v, part[h]);
                    _mm256_store_ps(scratch + j + l + 8 * h, g);
                }
            }
            dot = add_wide(dot, _mm256_add_ps(part[0], part[1]));
        }
        if (x_hat != nullptr) a.row_dot[i] = static_cast<float>(sum_of(out_dot));
        const double sum = static_cast<double>(factor) * sum_of(dot);
        const float own_mean = static_cast<float>(sum / static_cast<double>(k)) * a.free[i * a.free_stride];
        const float mean = a.mean != nullptr ? *a.mean : own_mean;
        const __m256 centre = _mm256_set1_ps(mean), all = _mm256_set1_ps(r), own = _mm256_set1_ps(factor);
        for (int64_t j = 0; j < k; j += kChunk) {
            const void* v_in = window.read<T>(kept, j, k);
            butterfly(scratch + j, block, [&](int l) {
                const __m256 g = _mm256_load_ps(scratch + j + l), v = load8<T>(element<T>(v_in, l));
                return _mm256_mul_ps(_mm256_fmsub_ps(g, own, _mm256_mul_ps(v, centre)), all);
            });
        }
        if (block > kChunk) butterfly_rest(scratch, k, block);
        for (int64_t j = 0; j < k; j += kChunk) {
            void* out = window.write<T>(grad_x, j, k);
            BELLBOX_UNROLL
            for (int l = 0; l < kChunk; l += 16)
                store16<T>(element<T>(out, l), _mm256_load_ps(scratch + j + l), _mm256_load_ps(scratch + j + l + 8));
            window.done<T>(grad_x, j, k);
        }
    }
}

}  // namespace rows

inline void encode(const EncodeArgs& a, int64_t begin, int64_t end) {
    const bool whole = a.block > rows::kChunk;
    const Scratch scratch(whole ? a.k : rows::kChunk);
    const rows::Rotation rotation{a.k, a.block, whole, scratch.data};
    rows::with_coder(a.thresholds, a.n, a.multiplier, a.shift, [&](const auto& coder) {
        const bool fixed = a.inverse_sigma > 0;
        if (a.x_type == Type::f32 && fixed)
            rows::encode_rows<Type::f32, true>(a, coder, rotation, begin, end);
        else if (a.x_type == Type::f32)
            rows::encode_rows<Type::f32, false>(a, coder, rotation, begin, end);
        else if (fixed)
            rows::encode_rows<Type::bf16, true>(a, coder, rotation, begin, end);
        else
            rows::encode_rows<Type::bf16, false>(a, coder, rotation, begin, end);
    });
}

inline void forward(const ForwardArgs& a, int64_t begin, int64_t end) {
    const bool whole = a.block > rows::kChunk;
    const Scratch scratch(whole ? a.k : rows::kChunk);
    const rows::Rotation rotation{a.k, a.block, whole, scratch.data};
    rows::with_coder(a.thresholds, a.n, 1, 0, [&](const auto& coder) {
        if (a.x_type == Type::f32 && a.out_type == Type::f32)
            rows::forward_rows<Type::f32, Type::f32>(a, coder, rotation, begin, end);
        else if (a.x_type == Type::f32)
            rows::forward_rows<Type::f32, Type::bf16>(a, coder, rotation, begin, end);
        else if (a.out_type == Type::f32)
            rows::forward_rows<Type::bf16, Type::f32>(a, coder, rotation, begin, end);
        else
            rows::forward_rows<Type::bf16, Type::bf16>(a, coder, rotation, begin, end);
    });
}

inline void backward(const BackwardArgs& a, int64_t begin, int64_t end) {
    const Scratch scratch(a.k + rows::kChunk);  // whole chunks
    if (a.type == Type::f32)
        rows::backward_rows<Type::f32>(a, scratch.data, begin, end);
    else
        rows::backward_rows<Type::bf16>(a, scratch.data, begin, end);
}

}  // namespace avx2
}  // namespace
}  // namespace bellbox
