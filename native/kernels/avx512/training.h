// Fake quantization for training with AVX-512, forward and backward.
//
// Floor: copying their tensors, a third and a quarter of the time that is taken; the rest is arithmetic.
#pragma once

#include <immintrin.h>

#include "kernels/avx512/codes.h"
#include "kernels/bell.h"

namespace bellbox {
namespace {
namespace avx512 {
namespace rows {

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
        const auto load = BELLBOX_STEP(int64_t c, __m512 (&v)[kRegisters]) { load_chunk<IN>(x, c, k, v); };
        const auto use = BELLBOX_STEP(int64_t c, const __m512 (&v)[kRegisters], int half) {
            BELLBOX_UNROLL
            for (int j = 4 * half; j < 4 * half + 4; j += 2) {
                const __m512 u = _mm512_mul_ps(v[j], factor), w = _mm512_mul_ps(v[j + 1], factor);
                if (IN != Type::kept) store_pair<OUT, IN>(kept, c + 16 * j, k, u, w);
                store_pair<OUT, IN, true>(x_hat, c + 16 * j, k, _mm512_permutexvar_ps(coder.index(u), values),
                                          _mm512_permutexvar_ps(coder.index(w), values));
            }
        };
        rotate_row<IN>(k, block, scratch, signs, load, use);
    }
}

// Steps of 64 values: rounded, then moved into the range of steps that their codes have.
template <Type IN, typename Coder>
inline void keep_rows(const KeepArgs& a, const Coder shared, float* scratch, int64_t begin, int64_t end) {
    const Coder coder = shared;
    const Signs signs;
    alignas(16) int8_t least[16] = {}, most[16] = {};
    for (int code = 0; code < a.n; ++code) least[code] = a.lowest[code], most[code] = portable::highest_step(a, code);
    const __m512i lowest = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(least)));
    const __m512i highest = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(most)));
    const __m512 steps = _mm512_set1_ps(kKeptSteps), end_of_steps = _mm512_set1_ps(kKeptMost);
    const __m512 first_step = _mm512_set1_ps(-kKeptMost);
    const int64_t k = a.k;
    for (int64_t i = begin; i < end; ++i) {
        const void* x = element<IN>(a.x, i * k);
        int8_t* kept = a.kept + i * k;
        const __m512 factor = _mm512_set1_ps(a.r[i * a.r_stride]);
        const auto load = BELLBOX_STEP(int64_t c, __m512 (&v)[kRegisters]) { load_chunk<IN>(x, c, k, v); };
        const auto use = BELLBOX_STEP(int64_t c, const __m512 (&v)[kRegisters], int half) {
            __m512i step[4], code[4];
            BELLBOX_UNROLL
            for (int j = 0; j < 4; ++j) {
                const __m512 u = _mm512_mul_ps(v[4 * half + j], factor);
                code[j] = coder.index(u);
                // max gives its second operand for NaN
                const __m512 inside = _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(u, steps), first_step), end_of_steps);
                step[j] = _mm512_cvtps_epi32(inside);
            }
            const __m512i codes = low_bytes<IN>(code[0], code[1], code[2], code[3]);
            __m512i out = low_bytes<IN>(step[0], step[1], step[2], step[3]);
            out = _mm512_min_epi8(_mm512_max_epi8(out, _mm512_shuffle_epi8(lowest, codes)), _mm512_shuffle_epi8(highest, codes));
            const int64_t at = c + 64 * half, left = k - at;
            if (left >= 64)
                _mm512_storeu_si512(kept + at, out);
            else if (left > 0)
                _mm512_mask_storeu_epi8(kept + at, low_bits(left), out);
        };
        rotate_row<IN>(k, a.block, scratch, signs, load, use);
    }
}

// In place of a coder where none is needed.
struct None {
    BELLBOX_INLINE __m512i index(__m512) const { return _mm512_setzero_si512(); }
};

// What kernels/bell.h asks of a vector.
struct Bell {
    using Floats = __m512;
    static BELLBOX_INLINE Floats all(float x) { return _mm512_set1_ps(x); }
    static BELLBOX_INLINE Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static BELLBOX_INLINE Floats fmsub(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
    static BELLBOX_INLINE Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }  // NaN: b
    static BELLBOX_INLINE Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
    static BELLBOX_INLINE Floats to_exponent(Floats x) {  // the lowest bits
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23));
    }
};

// Sums of fp32 lanes are handed on to fp64 after each chunk, so their error does not grow with k.
BELLBOX_INLINE __m512d add_wide(__m512d sum, __m512 v) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    return _mm512_add_pd(sum, _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))));
}

// Values that were kept, in the order of the gradient.
template <Type T, Type V>
BELLBOX_INLINE void load_values(const void* row, int64_t i, int64_t k, __m512 (&v)[kRegisters]) {
    if (V == Type::kept)
        load_kept<T>(row, i, k, v);
    else
        load_chunk<T>(row, i, k, v);
}

template <Type T, Type V, Type OUT, typename Coder>
inline void backward_rows(const BackwardArgs& a, const Coder shared, float* scratch, int64_t begin, int64_t end) {
    const Coder coder = shared;
    const __m512 offset = _mm512_set1_ps(a.offset);
    const Signs signs;
    const int64_t k = a.k, block = a.block;
    for (int64_t i = begin; i < end; ++i) {
        const void *grad = element<T>(a.grad, i * k), *kept = element<V>(a.v, i * k);
        const void* x_hat = V != Type::kept && a.row_dot != nullptr ? element<T>(a.x_hat, i * k) : nullptr;
        void* grad_x = element<OUT>(a.grad_x, i * k);
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
            load_values<T, V>(kept, j, k, v);
            if (V == Type::kept) {
                __m512 levels[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
                BELLBOX_UNROLL
                for (int l = 0; l < kRegisters; ++l)
                    levels[l & 1] = _mm512_fmadd_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(coder.index(v[l])), offset), g[l], levels[l & 1]);
                out_dot = add_wide(out_dot, _mm512_add_ps(levels[0], levels[1]));
            }
            __m512 part[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
            BELLBOX_UNROLL
            for (int l = 0; l < kRegisters; ++l) {
                g[l] = _mm512_mul_ps(bell<Bell>(v[l]), g[l]);
                part[l & 1] = _mm512_fmadd_ps(g[l], v[l], part[l & 1]);
            }
            dot = add_wide(dot, _mm512_add_ps(part[0], part[1]));
            store_registers(scratch + j, g);
        }
        if (a.row_dot != nullptr) a.row_dot[i] = static_cast<float>(_mm512_reduce_add_pd(out_dot));
        const double sum = static_cast<double>(factor) * _mm512_reduce_add_pd(dot);
        const float own_mean = static_cast<float>(sum / static_cast<double>(k)) * a.free[i * a.free_stride];
        const float mean = a.mean != nullptr ? *a.mean : own_mean;
        const __m512 centre = _mm512_set1_ps(mean), all = _mm512_set1_ps(r), own = _mm512_set1_ps(factor);
        // The gradient of v to that of x.
        const auto load = BELLBOX_STEP(int64_t c, __m512 (&u)[kRegisters]) {
            __m512 v[kRegisters];
            load_registers(scratch + c, u);
            load_values<T, V>(kept, c, k, v);
            BELLBOX_UNROLL
            for (int j = 0; j < kRegisters; ++j)
                u[j] = _mm512_mul_ps(_mm512_fmsub_ps(u[j], own, _mm512_mul_ps(v[j], centre)), all);
        };
        const auto use = BELLBOX_STEP(int64_t c, const __m512 (&u)[kRegisters], int half) {
            BELLBOX_UNROLL
            for (int j = 4 * half; j < 4 * half + 4; j += 2) store_pair<OUT, T>(grad_x, c + 16 * j, k, u[j], u[j + 1]);
        };
        rotate_row<T>(k, block, scratch, signs, load, use);
    }
}

}  // namespace rows

inline void forward(const ForwardArgs& a, int64_t begin, int64_t end) {
    const Scratch scratch(a.block > rows::kChunk ? a.k : 0);
    rows::with_coder(a.thresholds, a.n, rows::Values{1, 0}, [&](const auto& coder) {
        with_types(a.x_type, a.out_type, [&](auto in, auto out) {
            rows::forward_rows<decltype(in)::type, decltype(out)::type>(a, coder, scratch.data, begin, end);
        });
    });
}

inline void backward(const BackwardArgs& a, int64_t begin, int64_t end) {
    const Scratch scratch(a.k + rows::kChunk);  // whole chunks
    if (a.v_type != Type::kept) {
        const rows::None none;
        if (a.type == Type::f32) return rows::backward_rows<Type::f32, Type::f32, Type::f32>(a, none, scratch.data, begin, end);
        return rows::backward_rows<Type::bf16, Type::bf16, Type::bf16>(a, none, scratch.data, begin, end);
    }
    rows::with_coder(a.thresholds, a.n, rows::Values{1, 0}, [&](const auto& coder) {
        with_types(a.type, a.out_type, [&](auto in, auto out) {
            if constexpr (decltype(in)::type != Type::kept)
                rows::backward_rows<decltype(in)::type, Type::kept, decltype(out)::type>(a, coder, scratch.data, begin, end);
        });
    });
}

inline void keep(const KeepArgs& a, int64_t begin, int64_t end) {
    const Scratch scratch(a.block > rows::kChunk ? a.k : 0);
    rows::with_coder(a.thresholds, a.n, rows::Values{1, 0}, [&](const auto& coder) {
        if (a.x_type == Type::f32) return rows::keep_rows<Type::f32>(a, coder, scratch.data, begin, end);
        rows::keep_rows<Type::bf16>(a, coder, scratch.data, begin, end);
    });
}

}  // namespace avx512
}  // namespace
}  // namespace bellbox
