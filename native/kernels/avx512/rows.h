// Rows with AVX-512: loading, storing, rotation, statistics.
//
// 128 columns are held in eight registers: the butterfly's stages within a register are one shuffle and one fma with
// +-1 (the product is exact, so this is a + b or a - b, rounded once), those between registers plain additions. The
// first keep other units busy than the second: two chunks are under way at a time (rotate_chunks), one in each half.
//
// bf16 is read 32 columns at a time and parted into even and odd columns, which costs one operation for 16 columns
// instead of two and makes the first stage one between registers. A chunk thus lies in registers in one of two orders,
// named by the type it was read as; what is stored goes back to the order of columns.
#pragma once

#include <immintrin.h>

#include "kernels/inline.h"
#include "kernels/portable/encode.h"

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
    return static_cast<const char*>(p) + i * bytes_of(T);
}

template <Type T>
BELLBOX_INLINE void* element(void* p, int64_t i) {
    return static_cast<char*>(p) + i * bytes_of(T);
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
    } else if (T == Type::kept) {
        BELLBOX_UNROLL
        for (int j = 0; j < R; ++j) {
            const void* at = element<T>(p, 16 * j);
            const __m128i bytes = whole ? _mm_loadu_si128(static_cast<const __m128i*>(at))
                                        : _mm_maskz_loadu_epi8(static_cast<__mmask16>(low_bits(k - i - 16 * j)), at);
            v[j] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), _mm512_set1_ps(1 / kKeptSteps));
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

// Kept bytes in the order of another type.
template <Type ORDER, int R>
BELLBOX_INLINE void load_kept(const void* row, int64_t i, int64_t k, __m512 (&v)[R]) {
    if (ORDER != Type::bf16) return load_chunk<Type::kept>(row, i, k, v);
    const bool whole = k - i >= 16 * R;
    const __m512 step = _mm512_set1_ps(1 / kKeptSteps);
    BELLBOX_UNROLL
    for (int j = 0; j < R; j += 2) {
        const void* at = element<Type::kept>(row, i + 16 * j);
        const __m256i bytes = whole ? _mm256_loadu_si256(static_cast<const __m256i*>(at))
                                    : _mm256_maskz_loadu_epi8(static_cast<__mmask32>(low_bits(k - i - 16 * j)), at);
        const __m512i words = _mm512_cvtepi8_epi16(bytes);
        v[j] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 16), 16)), step);
        v[j + 1] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srai_epi32(words, 16)), step);
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
    return ORDER != Type::bf16 ? j : j / 2 + 16 * (j % 2);
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

// The stages of blocks up to 128 in steps. The early ones, S = 0..3, are within registers (in the order of bf16 the very
// first is between them), the late ones, S = 0..2, between. The branches go the same way for every chunk and cost nothing.
template <Type ORDER, int S>
BELLBOX_INLINE void early(__m512 (&v)[kRegisters], int64_t block, const Signs& signs) {
    if (ORDER == Type::bf16 && S == 0 && block > 1) stage_across<1>(v);
    if (block > (ORDER != Type::bf16 ? 1 : 2) << S) stage<1 << S>(v, signs);
}

template <Type ORDER, int S>
BELLBOX_INLINE void late(__m512 (&v)[kRegisters], int64_t block) {
    if (ORDER == Type::bf16 && S == 0) return;
    if (block > 16 << S) stage_across<1 << S>(v);
}

// All chunks of a row in turn: load(i, v) fills the registers of columns [i, i + 128), use(i, v, half) gets them
// rotated, to work on registers 4 half to 4 half + 3. Blocks up to 128.
template <Type ORDER, typename Load, typename Use>
BELLBOX_INLINE void rotate_chunks(int64_t k, int64_t block, const Signs& signs, const Load& load, const Use& use) {
    __m512 next[kRegisters];
    load(int64_t{0}, next);
    early<ORDER, 0>(next, block, signs);
    early<ORDER, 1>(next, block, signs);
    early<ORDER, 2>(next, block, signs);
    early<ORDER, 3>(next, block, signs);
    int64_t i = 0;
    for (; k - i > kChunk; i += kChunk) {
        __m512 v[kRegisters];
        BELLBOX_UNROLL
        for (int j = 0; j < kRegisters; ++j) v[j] = next[j];
        load(i + kChunk, next);
        late<ORDER, 0>(v, block);
        early<ORDER, 0>(next, block, signs);
        late<ORDER, 1>(v, block);
        early<ORDER, 1>(next, block, signs);
        late<ORDER, 2>(v, block);
        early<ORDER, 2>(next, block, signs);
        use(i, v, 0);
        early<ORDER, 3>(next, block, signs);
        use(i, v, 1);
    }
    late<ORDER, 0>(next, block);
    late<ORDER, 1>(next, block);
    late<ORDER, 2>(next, block);
    use(i, next, 0);
    use(i, next, 1);
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

// The same for blocks of any size: those above 128 (k is then a multiple of 256) go by way of scratch memory.
template <Type ORDER, typename Load, typename Use>
BELLBOX_INLINE void rotate_row(int64_t k, int64_t block, float* scratch, const Signs& signs, const Load& load,
                               const Use& use) {
    if (block <= kChunk) return rotate_chunks<ORDER>(k, block, signs, load, use);
    rotate_chunks<ORDER>(k, kChunk, signs, load, BELLBOX_STEP(int64_t i, const __m512 (&v)[kRegisters], int half) {
        BELLBOX_UNROLL
        for (int j = 4 * half; j < 4 * half + 4; ++j) _mm512_store_ps(scratch + i + 16 * j, v[j]);
    });
    butterfly_rest(scratch, k, block);
    for (int64_t i = 0; i < k; i += kChunk) {
        __m512 v[kRegisters];
        load_registers(scratch + i, v);
        use(i, v, 0);
        use(i, v, 1);
    }
}

template <Type IN, Type OUT>
inline void rotate_rows(const RotateArgs& a, float* scratch, int64_t begin, int64_t end) {
    const Signs signs;
    const __m512 factor = _mm512_set1_ps(a.factor);
    const int64_t k = a.k;
    for (int64_t row = begin; row < end; ++row) {
        const void* x = element<IN>(a.x, row * k);
        void* out = element<OUT>(a.out, row * k);
        const auto load = BELLBOX_STEP(int64_t i, __m512 (&v)[kRegisters]) { load_chunk<IN>(x, i, k, v); };
        const auto use = BELLBOX_STEP(int64_t i, const __m512 (&v)[kRegisters], int half) {
            BELLBOX_UNROLL
            for (int j = 4 * half; j < 4 * half + 4; j += 2)
                store_pair<OUT, IN>(out, i + 16 * j, k, _mm512_mul_ps(v[j], factor), _mm512_mul_ps(v[j + 1], factor));
        };
        rotate_row<IN>(k, a.block, scratch, signs, load, use);
    }
}

// ---- statistics ----

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

// The largest magnitude, NaN if there is one: as integers, the bits of magnitudes are in order, and NaN above all.
template <Type T>
inline double row_absmax(const void* x, int64_t k) {
    __m512i largest[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t i = 0; i < k; i += kChunk) {
        __m512 v[kRegisters];
        load_chunk<T>(x, i, k, v);
        BELLBOX_UNROLL
        for (int j = 0; j < kRegisters; ++j)
            largest[j & 1] = _mm512_max_epu32(largest[j & 1], _mm512_castps_si512(_mm512_abs_ps(v[j])));
    }
    const uint32_t bits = _mm512_reduce_max_epu32(_mm512_max_epu32(largest[0], largest[1]));
    return static_cast<double>(_mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(bits)))));
}

}  // namespace rows

inline void row_rms(const RmsArgs& a, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
        a.out[i] = rms(a.x_type == Type::f32 ? rows::row_norm<Type::f32>(rows::element<Type::f32>(a.x, i * a.k), a.k)
                                             : rows::row_norm<Type::bf16>(rows::element<Type::bf16>(a.x, i * a.k), a.k),
                       a.k);
}

inline void rotate(const RotateArgs& a, int64_t begin, int64_t end) {
    const Scratch scratch(a.block > rows::kChunk ? a.k : 0);
    with_types(a.x_type, a.out_type, [&](auto in, auto out) {
        rows::rotate_rows<decltype(in)::type, decltype(out)::type>(a, scratch.data, begin, end);
    });
}

}  // namespace avx512
}  // namespace
}  // namespace bellbox
