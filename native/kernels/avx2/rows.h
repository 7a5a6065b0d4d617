// Rows with AVX2 and FMA: loading, storing, rotation, statistics.
//
// Sixteen registers do not hold a block of 128, so a chunk of 128 columns goes through a buffer in L1: 32 columns at a
// time for the stages up to 16 (those within a register are a shuffle and an fma with +-1, which is a + b or a - b
// rounded once), then registers 32 columns apart for the last two. The end of a row goes through zero-filled copies.
#pragma once

#include <immintrin.h>

#include "kernels/inline.h"
#include "kernels/portable/encode.h"

namespace bellbox {
namespace {
namespace avx2 {
namespace rows {

constexpr int64_t kChunk = 128;

template <Type T>
BELLBOX_INLINE const void* element(const void* p, int64_t i) {
    return static_cast<const char*>(p) + i * bytes_of(T);
}

template <Type T>
BELLBOX_INLINE void* element(void* p, int64_t i) {
    return static_cast<char*>(p) + i * bytes_of(T);
}

// ---- loading and storing ----

template <Type T>
BELLBOX_INLINE __m256 load8(const void* p) {
    if (T == Type::f32) return _mm256_loadu_ps(static_cast<const float*>(p));
    if (T == Type::kept) {
        const __m256i steps = _mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
        return _mm256_mul_ps(_mm256_cvtepi32_ps(steps), _mm256_set1_ps(1 / kKeptSteps));
    }
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
struct PaddedColumns {
    alignas(32) char copy[kChunk * 4];
    template <Type T>
    BELLBOX_INLINE const void* read(const void* row, int64_t i, int64_t k) {
        if (k - i >= kChunk) return element<T>(row, i);
        memset(copy, 0, sizeof(copy));
        memcpy(copy, element<T>(row, i), static_cast<size_t>(k - i) * static_cast<size_t>(bytes_of(T)));
        return copy;
    }
    // Where to write them; done() copies what belongs to the row.
    template <Type T>
    BELLBOX_INLINE void* write(void* row, int64_t i, int64_t k) {
        return k - i >= kChunk ? element<T>(row, i) : copy;
    }
    template <Type T>
    BELLBOX_INLINE void done(void* row, int64_t i, int64_t k) const {
        if (k - i < kChunk) memcpy(element<T>(row, i), copy, static_cast<size_t>(k - i) * static_cast<size_t>(bytes_of(T)));
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
    PaddedColumns columns;
    const void* from = columns.read<T>(x, i, k);
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

template <Type IN, Type OUT>
inline void rotate_rows(const RotateArgs& a, const Rotation& rotation, int64_t begin, int64_t end) {
    const int64_t k = a.k;
    const __m256 factor = _mm256_set1_ps(a.factor);
    PaddedColumns columns;
    for (int64_t i = begin; i < end; ++i) {
        const void* x = element<IN>(a.x, i * k);
        void* out = element<OUT>(a.out, i * k);
        __m256 unused = _mm256_setzero_ps();
        rotation.begin<IN, false>(x, unused);
        for (int64_t j = 0; j < k; j += kChunk) {
            const float* p = rotation.chunk<IN, false>(x, j, unused);
            void* to = columns.write<OUT>(out, j, k);
            BELLBOX_UNROLL
            for (int l = 0; l < kChunk; l += 16)
                store16<OUT>(element<OUT>(to, l), _mm256_mul_ps(_mm256_load_ps(p + l), factor),
                             _mm256_mul_ps(_mm256_load_ps(p + l + 8), factor));
            columns.done<OUT>(out, j, k);
        }
    }
}

// ---- statistics ----

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
    PaddedColumns columns;
    for (int64_t i = 0; i < k; i += kChunk) {
        const void* from = columns.read<T>(x, i, k);
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

// The largest magnitude, NaN if there is one: as integers, the bits of magnitudes are in order, and NaN above all.
template <Type T>
inline double row_absmax(const void* x, int64_t k) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256i largest[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    PaddedColumns columns;
    for (int64_t i = 0; i < k; i += kChunk) {
        const void* from = columns.read<T>(x, i, k);
        BELLBOX_UNROLL
        for (int j = 0; j < kChunk / 8; ++j) {
            const __m256 v = _mm256_andnot_ps(sign, load8<T>(element<T>(from, 8 * j)));
            largest[j & 1] = _mm256_max_epu32(largest[j & 1], _mm256_castps_si256(v));
        }
    }
    alignas(32) uint32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_max_epu32(largest[0], largest[1]));
    uint32_t bits = 0;
    for (int l = 0; l < 8; ++l) bits = lanes[l] > bits ? lanes[l] : bits;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

}  // namespace rows

inline void row_rms(const RmsArgs& a, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
        a.out[i] = rms(a.x_type == Type::f32 ? rows::row_norm<Type::f32>(rows::element<Type::f32>(a.x, i * a.k), a.k)
                                             : rows::row_norm<Type::bf16>(rows::element<Type::bf16>(a.x, i * a.k), a.k),
                       a.k);
}

inline void rotate(const RotateArgs& a, int64_t begin, int64_t end) {
    const bool whole = a.block > rows::kChunk;
    const Scratch scratch(whole ? a.k : rows::kChunk);
    const rows::Rotation rotation{a.k, a.block, whole, scratch.data};
    with_types(a.x_type, a.out_type, [&](auto in, auto out) {
        rows::rotate_rows<decltype(in)::type, decltype(out)::type>(a, rotation, begin, end);
    });
}

}  // namespace avx2
}  // namespace
}  // namespace bellbox
