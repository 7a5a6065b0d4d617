// Fake quantization for training with AVX2, forward and backward: as much bound by arithmetic as by memory.
#pragma once

#include <immintrin.h>

#include "kernels/avx2/codes.h"
#include "kernels/bell.h"

namespace bellbox {
namespace {
namespace avx2 {
namespace rows {

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
            PaddedColumns v_columns, x_columns;
            void *v_out = v_columns.write<OUT>(kept, j, k), *x_out = x_columns.write<OUT>(x_hat, j, k);
            for (int l = 0; l < kChunk; l += 32) {
                __m256 v[4];
                BELLBOX_UNROLL
                for (int h = 0; h < 4; ++h) v[h] = _mm256_mul_ps(_mm256_load_ps(p + l + 8 * h), factor);
                if (IN != Type::kept) {
                    store16<OUT>(element<OUT>(v_out, l), v[0], v[1]);
                    store16<OUT>(element<OUT>(v_out, l + 16), v[2], v[3]);
                }
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
            if (IN != Type::kept) v_columns.done<OUT>(kept, j, k);
            x_columns.done<OUT>(x_hat, j, k);
        }
    }
}

// What kernels/bell.h asks of a vector.
struct Bell {
    using Floats = __m256;
    static BELLBOX_INLINE Floats all(float x) { return _mm256_set1_ps(x); }
    static BELLBOX_INLINE Floats fmadd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static BELLBOX_INLINE Floats fmsub(Floats a, Floats b, Floats c) { return _mm256_fmsub_ps(a, b, c); }
    static BELLBOX_INLINE Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }  // NaN: b
    static BELLBOX_INLINE Floats magnitude(Floats x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
    static BELLBOX_INLINE Floats to_exponent(Floats x) {  // the lowest bits
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23));
    }
};

// Sums of fp32 lanes are handed on to fp64 after each chunk, so their error does not grow with k.
BELLBOX_INLINE __m256d add_wide(__m256d sum, __m256 v) {
    return _mm256_add_pd(sum, _mm256_add_pd(low_half(v), high_half(v)));
}

// Steps of 32 values at a time, see KeepArgs.
template <Type IN, typename Coder>
inline void keep_rows(const KeepArgs& a, const Coder shared, const Rotation& rotation, int64_t begin, int64_t end) {
    const Coder coder = shared;
    alignas(32) int8_t least[32] = {}, most[32] = {};  // by the lowest four bits of minus the code
    for (int code = 0; code < a.n; ++code)
        for (int half = 0; half < 32; half += 16) {
            least[half + (-code & 15)] = a.lowest[code];
            most[half + (-code & 15)] = portable::highest_step(a, code);
        }
    const __m256i lowest = _mm256_load_si256(reinterpret_cast<const __m256i*>(least));
    const __m256i highest = _mm256_load_si256(reinterpret_cast<const __m256i*>(most));
    const __m256 steps = _mm256_set1_ps(kKeptSteps), end_of_steps = _mm256_set1_ps(kKeptMost);
    const int64_t k = a.k;
    PaddedColumns columns;
    for (int64_t i = begin; i < end; ++i) {
        const void* x = element<IN>(a.x, i * k);
        void* kept = a.kept + i * k;
        const __m256 factor = _mm256_set1_ps(a.r[i * a.r_stride]);
        __m256 unused = _mm256_setzero_ps();
        rotation.begin<IN, false>(x, unused);
        for (int64_t j = 0; j < k; j += kChunk) {
            const float* p = rotation.chunk<IN, false>(x, j, unused);
            void* out = columns.write<Type::kept>(kept, j, k);
            for (int l = 0; l < kChunk; l += 32) {
                __m256 v[4];
                __m256i step[4];
                BELLBOX_UNROLL
                for (int h = 0; h < 4; ++h) {
                    v[h] = _mm256_mul_ps(_mm256_load_ps(p + l + 8 * h), factor);
                    // min gives its second operand for NaN, which the conversion makes the lowest integer
                    step[h] = _mm256_cvtps_epi32(_mm256_min_ps(end_of_steps, _mm256_mul_ps(v[h], steps)));
                }
                const __m256i index = coder.index(v[0], v[1], v[2], v[3]);
                __m256i bytes = joined_bytes(step[0], step[1], step[2], step[3]);
                bytes = _mm256_max_epi8(bytes, _mm256_shuffle_epi8(lowest, index));
                bytes = _mm256_min_epi8(bytes, _mm256_shuffle_epi8(highest, index));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<char*>(out) + l), bytes);
            }
            columns.done<Type::kept>(kept, j, k);
        }
    }
}

// In place of a coder where none is needed.
struct None {
    BELLBOX_INLINE __m256i minus_code(__m256) const { return _mm256_setzero_si256(); }
};

template <Type T, Type V, Type OUT, typename Coder>
inline void backward_rows(const BackwardArgs& a, const Coder shared, float* scratch, int64_t begin, int64_t end) {
    const Coder coder = shared;
    const __m256 offset = _mm256_set1_ps(a.offset);
    const int64_t k = a.k, block = a.block;
    PaddedColumns columns, other;
    for (int64_t i = begin; i < end; ++i) {
        const void *grad = element<T>(a.grad, i * k), *kept = element<V>(a.v, i * k);
        const void* x_hat = V != Type::kept && a.row_dot != nullptr ? element<T>(a.x_hat, i * k) : nullptr;
        void* grad_x = element<OUT>(a.grad_x, i * k);
        const float r = a.r[i * a.r_stride], factor = 2 * 0.3989422804014327f * a.gamma[i * a.gamma_stride];
        // g_v / factor to scratch, and the sums over the row.
        __m256d dot = _mm256_setzero_pd(), out_dot = _mm256_setzero_pd();
        for (int64_t j = 0; j < k; j += kChunk) {
            const void* g_in = columns.read<T>(grad, j, k);
            if (x_hat != nullptr) {
                const void* x_in = other.read<T>(x_hat, j, k);
                __m256 part = _mm256_setzero_ps();
                for (int l = 0; l < kChunk; l += 8)
                    part = _mm256_fmadd_ps(load8<T>(element<T>(g_in, l)), load8<T>(element<T>(x_in, l)), part);
                out_dot = add_wide(out_dot, part);
            }
            const void* v_in = other.read<V>(kept, j, k);
            __m256 part[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, levels = _mm256_setzero_ps();
            for (int l = 0; l < kChunk; l += 16) {
                BELLBOX_UNROLL
                for (int h = 0; h < 2; ++h) {
                    const __m256 v = load8<V>(element<V>(v_in, l + 8 * h)), given = load8<T>(element<T>(g_in, l + 8 * h));
                    if (V == Type::kept) {
                        const __m256 code = _mm256_cvtepi32_ps(_mm256_abs_epi32(coder.minus_code(v)));
                        levels = _mm256_fmadd_ps(_mm256_sub_ps(code, offset), given, levels);
                    }
                    const __m256 g = _mm256_mul_ps(bell<Bell>(v), given);
                    part[h] = _mm256_fmadd_ps(g, v, part[h]);
                    _mm256_store_ps(scratch + j + l + 8 * h, g);
                }
            }
            if (V == Type::kept) out_dot = add_wide(out_dot, levels);
            dot = add_wide(dot, _mm256_add_ps(part[0], part[1]));
        }
        if (a.row_dot != nullptr) a.row_dot[i] = static_cast<float>(sum_of(out_dot));
        const double sum = static_cast<double>(factor) * sum_of(dot);
        const float own_mean = static_cast<float>(sum / static_cast<double>(k)) * a.free[i * a.free_stride];
        const float mean = a.mean != nullptr ? *a.mean : own_mean;
        const __m256 centre = _mm256_set1_ps(mean), all = _mm256_set1_ps(r), own = _mm256_set1_ps(factor);
        for (int64_t j = 0; j < k; j += kChunk) {
            const void* v_in = columns.read<V>(kept, j, k);
            butterfly(scratch + j, block, [&](int l) {
                const __m256 g = _mm256_load_ps(scratch + j + l), v = load8<V>(element<V>(v_in, l));
                return _mm256_mul_ps(_mm256_fmsub_ps(g, own, _mm256_mul_ps(v, centre)), all);
            });
        }
        if (block > kChunk) butterfly_rest(scratch, k, block);
        for (int64_t j = 0; j < k; j += kChunk) {
            void* out = columns.write<OUT>(grad_x, j, k);
            BELLBOX_UNROLL
            for (int l = 0; l < kChunk; l += 16)
                store16<OUT>(element<OUT>(out, l), _mm256_load_ps(scratch + j + l), _mm256_load_ps(scratch + j + l + 8));
            columns.done<OUT>(grad_x, j, k);
        }
    }
}

}  // namespace rows

inline void forward(const ForwardArgs& a, int64_t begin, int64_t end) {
    const bool whole = a.block > rows::kChunk;
    const Scratch scratch(whole ? a.k : rows::kChunk);
    const rows::Rotation rotation{a.k, a.block, whole, scratch.data};
    rows::with_coder(a.thresholds, a.n, 1, 0, [&](const auto& coder) {
        with_types(a.x_type, a.out_type, [&](auto in, auto out) {
            rows::forward_rows<decltype(in)::type, decltype(out)::type>(a, coder, rotation, begin, end);
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
    rows::with_coder(a.thresholds, a.n, 1, 0, [&](const auto& coder) {
        with_types(a.type, a.out_type, [&](auto in, auto out) {
            if constexpr (decltype(in)::type != Type::kept)
                rows::backward_rows<decltype(in)::type, Type::kept, decltype(out)::type>(a, coder, scratch.data, begin, end);
        });
    });
}

inline void keep(const KeepArgs& a, int64_t begin, int64_t end) {
    const bool whole = a.block > rows::kChunk;
    const Scratch scratch(whole ? a.k : rows::kChunk);
    const rows::Rotation rotation{a.k, a.block, whole, scratch.data};
    rows::with_coder(a.thresholds, a.n, 1, 0, [&](const auto& coder) {
        if (a.x_type == Type::f32) return rows::keep_rows<Type::f32>(a, coder, rotation, begin, end);
        rows::keep_rows<Type::bf16>(a, coder, rotation, begin, end);
    });
}

}  // namespace avx2
}  // namespace
}  // namespace bellbox
