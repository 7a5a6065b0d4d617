// Fake quantization for training with NEON, forward, with one coder for any number of levels: few devices train. The
// backward is portable C++.
#pragma once

#include <arm_neon.h>

#include "kernels/neon/codes.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {
namespace rows {

template <Type IN, Type OUT>
inline void forward_rows(const ForwardArgs& a, const Search<4> shared, const Rotation& rotation, int64_t begin, int64_t end) {
    const Search<4> coder = shared;
    const int64_t k = a.k;
    const float32x4_t offset = vdupq_n_f32(a.offset);
    PaddedColumns v_columns, x_columns;
    for (int64_t i = begin; i < end; ++i) {
        const void* x = element<IN>(a.x, i * k);
        void *x_hat = element<OUT>(a.x_hat, i * k), *kept = a.v == nullptr ? nullptr : element<OUT>(a.v, i * k);
        const float r = a.r[i * a.r_stride], scale = a.scale[i * a.scale_stride] * (r - r + 1);
        float32x4_t unused = vdupq_n_f32(0);
        for (int64_t j = 0; j < k; j += rotation.span) {
            const float* p = rotation.columns<IN, false>(x, j, unused);
            for (int64_t l = 0; l < rotation.span; l += kChunk, p += kChunk) {
                void *v_out = v_columns.write<OUT>(kept, j + l, k), *x_out = x_columns.write<OUT>(x_hat, j + l, k);
                for (int c = 0; c < kChunk; c += 4) {
                    const float32x4_t v = vmulq_n_f32(vld1q_f32(p + c), r);
                    if (kept != nullptr) store4<OUT>(element<OUT>(v_out, c), v);
                    const float32x4_t code = vcvtq_f32_s32(vnegq_s32(coder.minus_code(v)));
                    store4<OUT>(element<OUT>(x_out, c), vmulq_n_f32(vsubq_f32(code, offset), scale));
                }
                if (kept != nullptr) v_columns.done<OUT>(kept, j + l, k);
                x_columns.done<OUT>(x_hat, j + l, k);
            }
        }
    }
}

// Steps of 16 values at a time, see KeepArgs.
template <Type IN>
inline void keep_rows(const KeepArgs& a, const Search<4> shared, const Rotation& rotation, int64_t begin, int64_t end) {
    const Search<4> coder = shared;
    int8_t least[16] = {}, most[16] = {};  // by the code
    for (int code = 0; code < a.n; ++code) least[code] = a.lowest[code], most[code] = portable::highest_step(a, code);
    const int8x16_t lowest = vld1q_s8(least), highest = vld1q_s8(most);
    const float32x4_t bound = vdupq_n_f32(kKeptMost);
    const int64_t k = a.k;
    PaddedColumns padded;
    for (int64_t i = begin; i < end; ++i) {
        const void* x = element<IN>(a.x, i * k);
        const float r = a.r[i * a.r_stride];
        float32x4_t unused = vdupq_n_f32(0);
        for (int64_t j = 0; j < k; j += rotation.span) {
            const float* p = rotation.columns<IN, false>(x, j, unused);
            for (int64_t l = 0; l < rotation.span; l += kChunk, p += kChunk) {
                int8_t* out = static_cast<int8_t*>(padded.write<Type::kept>(a.kept + i * k, j + l, k));
                for (int c = 0; c < kChunk; c += 16) {
                    float32x4_t v[4];
                    int32x4_t step[4];
                    BELLBOX_UNROLL
                    for (int h = 0; h < 4; ++h) {
                        v[h] = vmulq_n_f32(vld1q_f32(p + c + 4 * h), r);
                        // FMAXNM gives the number beside a NaN
                        const float32x4_t steps = vmaxnmq_f32(vmulq_n_f32(v[h], kKeptSteps), vnegq_f32(bound));
                        step[h] = vcvtnq_s32_f32(vminq_f32(steps, bound));
                    }
                    const uint8x16_t codes = coder.codes(v);
                    int8x16_t bytes = joined_bytes(step[0], step[1], step[2], step[3]);
                    bytes = vmaxq_s8(bytes, vqtbl1q_s8(lowest, codes));
                    vst1q_s8(out + c, vminq_s8(bytes, vqtbl1q_s8(highest, codes)));
                }
                padded.done<Type::kept>(a.kept + i * k, j + l, k);
            }
        }
    }
}

}  // namespace rows

inline void forward(const ForwardArgs& a, int64_t begin, int64_t end) {
    const Scratch scratch(rows::Rotation::span_of(a.block));
    const rows::Rotation rotation{a.k, a.block, rows::Rotation::span_of(a.block), scratch.data};
    const rows::Search<4> coder(a.thresholds, a.n, 1, 0);
    with_types(a.x_type, a.out_type, [&](auto in, auto out) {
        rows::forward_rows<decltype(in)::type, decltype(out)::type>(a, coder, rotation, begin, end);
    });
}

inline void keep(const KeepArgs& a, int64_t begin, int64_t end) {
    const Scratch scratch(rows::Rotation::span_of(a.block));
    const rows::Rotation rotation{a.k, a.block, rows::Rotation::span_of(a.block), scratch.data};
    const rows::Search<4> coder(a.thresholds, a.n, 1, 0);
    if (a.x_type == Type::f32)
        rows::keep_rows<Type::f32>(a, coder, rotation, begin, end);
    else
        rows::keep_rows<Type::bf16>(a, coder, rotation, begin, end);
}

}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
