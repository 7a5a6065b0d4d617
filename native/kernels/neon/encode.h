// Quantizing rows with NEON. Floor: about 20 operations for 4 columns at 16 levels.
#pragma once

#include <arm_neon.h>

#include "kernels/neon/codes.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {
namespace rows {

// The first `count` of sixteen bytes, zeros for the others.
BELLBOX_INLINE int8x16_t first_of(int8x16_t bytes, int64_t count) {
    alignas(16) static const int8_t number[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int8_t some = static_cast<int8_t>(count > 16 ? 16 : count < 0 ? 0 : count);
    return vandq_s8(bytes, vreinterpretq_s8_u8(vcltq_s8(vld1q_s8(number), vdupq_n_s8(some))));
}

template <Type T, bool FIXED, typename Coder>
inline void encode_rows(const EncodeArgs& a, const Coder shared, const Rotation& rotation, int64_t begin, int64_t end) {
    const Coder coder = shared;  // a copy of its own: stores of bytes could change one that others see
    const int64_t k = a.k, written = (k + 63) / 64 * 64;
    for (int64_t i = begin; i < end; ++i) {
        const void* x = element<T>(a.x, i * a.ldx);
        int8_t* levels = a.levels + i * a.ldl;
        const double sigma = FIXED || a.r != nullptr              ? 0
                             : a.normalise == Normalise::absmax ? row_absmax<T>(x, k)
                                                                : rms(row_norm<T>(x, k), k);
        const RowScale scale = row_scale(sigma, a, i);
        a.row_scales[i] = scale.row_scale;
        float32x4_t squares = vdupq_n_f32(0);
        int32x4_t sums = vdupq_n_s32(0);
        for (int64_t j = 0; j < k; j += rotation.span) {
            const float* p = rotation.columns<T, FIXED>(x, j, squares);
            for (int64_t l = 0; l < rotation.span; l += 16) {
                float32x4_t v[4];
                BELLBOX_UNROLL
                for (int c = 0; c < 4; ++c) v[c] = vmulq_n_f32(vld1q_f32(p + l + 4 * c), scale.r);
                int8x16_t bytes = coder.levels(v);
                if (k - j - l < 16) bytes = first_of(bytes, k - j - l);  // what is beyond the end is 0
                sums = vpadalq_s16(sums, vpaddlq_s8(bytes));
                vst1q_s8(levels + j + l, bytes);
            }
        }
        a.sums[i] = vaddvq_s32(sums);
        if (FIXED) {
            // A sum of squares that fits fp32 is far below the ceiling; others need it for their inverse scale.
            alignas(16) float flags[4];
            vst1q_f32(flags, squares);
            const bool fine = flags[0] < 3e38f && flags[1] < 3e38f && flags[2] < 3e38f && flags[3] < 3e38f;
            if (!fine) a.row_scales[i] = row_scale(rms(row_norm<T>(x, k), k), a, i).row_scale;
        }
        if (written < a.ldl) memset(levels + written, 0, static_cast<size_t>(a.ldl - written));
    }
}

}  // namespace rows

inline void encode(const EncodeArgs& a, int64_t begin, int64_t end) {
    const Scratch scratch(rows::Rotation::span_of(a.block));
    const rows::Rotation rotation{a.k, a.block, rows::Rotation::span_of(a.block), scratch.data};
    rows::with_coder(a.thresholds, a.n, a.multiplier, a.shift, [&](const auto& coder) {
        const bool fixed = a.normalise == Normalise::fixed && a.r == nullptr;
        if (a.x_type == Type::kept)  // which comes with r
            rows::encode_rows<Type::kept, false>(a, coder, rotation, begin, end);
        else if (a.x_type == Type::f32 && fixed)
            rows::encode_rows<Type::f32, true>(a, coder, rotation, begin, end);
        else if (a.x_type == Type::f32)
            rows::encode_rows<Type::f32, false>(a, coder, rotation, begin, end);
        else if (fixed)
            rows::encode_rows<Type::bf16, true>(a, coder, rotation, begin, end);
        else
            rows::encode_rows<Type::bf16, false>(a, coder, rotation, begin, end);
    });
}

}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
