// Rows with NEON: loading, storing, rotation, statistics.
//
// Sixteen columns come as four registers with column 4 i + c in lane i of register c, so that the stages 1 and 2 are plain
// additions of registers; transposed, so are the stages 4 and 8. Sixteen registers of 64 columns take the stages 16 and 32
// before anything is stored. The end of a row goes through zero-filled copies.
#pragma once

#include <arm_neon.h>

#include "kernels/inline.h"
#include "kernels/portable/encode.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {
namespace rows {

constexpr int64_t kChunk = 64;

template <Type T>
BELLBOX_INLINE const void* element(const void* p, int64_t i) {
    return static_cast<const char*>(p) + i * bytes_of(T);
}

template <Type T>
BELLBOX_INLINE void* element(void* p, int64_t i) {
    return static_cast<char*>(p) + i * bytes_of(T);
}

// ---- loading and storing ----

struct Quad {
    float32x4_t of[4];
};

BELLBOX_INLINE float32x4_t from_bf16(uint16x4_t bits) { return vreinterpretq_f32_u32(vshll_n_u16(bits, 16)); }

// Columns 4 i and on in register i.
template <Type T>
BELLBOX_INLINE Quad load16(const void* p) {
    Quad q;
    if constexpr (T == Type::f32) {
        BELLBOX_UNROLL
        for (int i = 0; i < 4; ++i) q.of[i] = vld1q_f32(static_cast<const float*>(p) + 4 * i);
    } else if constexpr (T == Type::bf16) {
        BELLBOX_UNROLL
        for (int i = 0; i < 4; ++i) q.of[i] = from_bf16(vld1_u16(static_cast<const uint16_t*>(p) + 4 * i));
    } else {
        const int8x16_t steps = vld1q_s8(static_cast<const int8_t*>(p));
        const int16x8_t halves[2] = {vmovl_s8(vget_low_s8(steps)), vmovl_high_s8(steps)};
        BELLBOX_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int16x8_t half = halves[i / 2];
            const int32x4_t wide = i % 2 == 0 ? vmovl_s16(vget_low_s16(half)) : vmovl_high_s16(half);
            q.of[i] = vmulq_n_f32(vcvtq_f32_s32(wide), 1 / kKeptSteps);
        }
    }
    return q;
}

// Column 4 i + c in lane i of register c. Kept steps are never rotated.
template <Type T>
BELLBOX_INLINE Quad load_across(const void* p) {
    Quad q;
    if constexpr (T == Type::f32) {
        const float32x4x4_t all = vld4q_f32(static_cast<const float*>(p));
        BELLBOX_UNROLL
        for (int c = 0; c < 4; ++c) q.of[c] = all.val[c];
    } else {
        const uint16x4x4_t all = vld4_u16(static_cast<const uint16_t*>(p));
        BELLBOX_UNROLL
        for (int c = 0; c < 4; ++c) q.of[c] = from_bf16(all.val[c]);
    }
    return q;
}

BELLBOX_INLINE float32x4_t joined(float32x4_t a, float32x4_t b, bool high) {
    const float64x2_t x = vreinterpretq_f64_f32(a), y = vreinterpretq_f64_f32(b);
    return vreinterpretq_f32_f64(high ? vzip2q_f64(x, y) : vzip1q_f64(x, y));
}

BELLBOX_INLINE Quad transposed(Quad q) {
    const float32x4_t a = vtrn1q_f32(q.of[0], q.of[1]), b = vtrn2q_f32(q.of[0], q.of[1]);
    const float32x4_t c = vtrn1q_f32(q.of[2], q.of[3]), d = vtrn2q_f32(q.of[2], q.of[3]);
    return {{joined(a, c, false), joined(b, d, false), joined(a, c, true), joined(b, d, true)}};
}

// To nearest even; NaN stays NaN.
BELLBOX_INLINE uint16x4_t to_bf16(float32x4_t v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v), ordered = vceqq_f32(v, v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t up = vandq_u32(vaddq_u32(odd, vdupq_n_u32(0x7fff)), ordered);
    return vaddhn_u32(vorrq_u32(bits, vbicq_u32(vdupq_n_u32(0x400000), ordered)), up);
}

template <Type T>
BELLBOX_INLINE void store4(void* p, float32x4_t v) {
    if constexpr (T == Type::f32)
        vst1q_f32(static_cast<float*>(p), v);
    else
        vst1_u16(static_cast<uint16_t*>(p), to_bf16(v));
}

// Columns [i, i + 64) of a row: where they lie, or a copy filled up with zeros where the row ends before.
struct PaddedColumns {
    alignas(16) char copy[kChunk * 4];
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

// Two registers: a + b, a - b.
BELLBOX_INLINE void add_sub(float32x4_t& a, float32x4_t& b) {
    const float32x4_t sum = vaddq_f32(a, b);
    b = vsubq_f32(a, b);
    a = sum;
}

BELLBOX_INLINE void add_sub(Quad& a, Quad& b) {
    BELLBOX_UNROLL
    for (int i = 0; i < 4; ++i) add_sub(a.of[i], b.of[i]);
}

// The stages of blocks up to 16 on sixteen columns.
template <Type T>
BELLBOX_INLINE Quad butterfly16(const void* from, int64_t block) {
    if (T == Type::kept || block == 1) return load16<T>(from);
    Quad q = load_across<T == Type::kept ? Type::f32 : T>(from);
    add_sub(q.of[0], q.of[1]), add_sub(q.of[2], q.of[3]);
    if (block > 2) add_sub(q.of[0], q.of[2]), add_sub(q.of[1], q.of[3]);
    q = transposed(q);
    if (block > 4) add_sub(q.of[0], q.of[1]), add_sub(q.of[2], q.of[3]);
    if (block > 8) add_sub(q.of[0], q.of[2]), add_sub(q.of[1], q.of[3]);
    return q;
}

// What is left of blocks above 64 once each chunk has been rotated: two stages at a time while there are two.
BELLBOX_INLINE void butterfly_rest(float* row, int64_t span, int64_t block) {
    int64_t h = kChunk;
    for (; 2 * h < block; h *= 4)
        for (int64_t start = 0; start < span; start += 4 * h)
            for (int64_t i = start; i < start + h; i += 4) {
                float32x4_t v[4];
                BELLBOX_UNROLL
                for (int j = 0; j < 4; ++j) v[j] = vld1q_f32(row + i + j * h);
                add_sub(v[0], v[1]), add_sub(v[2], v[3]);
                add_sub(v[0], v[2]), add_sub(v[1], v[3]);
                BELLBOX_UNROLL
                for (int j = 0; j < 4; ++j) vst1q_f32(row + i + j * h, v[j]);
            }
    for (; h < block; h *= 2)
        for (int64_t start = 0; start < span; start += 2 * h)
            for (int64_t i = start; i < start + h; i += 4) {
                float32x4_t a = vld1q_f32(row + i), b = vld1q_f32(row + i + h);
                add_sub(a, b);
                vst1q_f32(row + i, a), vst1q_f32(row + i + h, b);
            }
}

// Rows are rotated by spans of a chunk, or of a block where that is longer; `scratch` has room for one.
struct Rotation {
    int64_t k, block, span;
    float* scratch;

    static int64_t span_of(int64_t block) { return block > kChunk ? block : kChunk; }

    // Columns [j, j + span) of x in fp32, rotated. CHECK: their squares are added to `squares`.
    template <Type T, bool CHECK>
    BELLBOX_INLINE const float* columns(const void* x, int64_t j, float32x4_t& squares) const {
        PaddedColumns padded;
        for (int64_t i = 0; i < span; i += kChunk) {
            const void* from = padded.read<T>(x, j + i, k);
            Quad q[4];
            BELLBOX_UNROLL
            for (int l = 0; l < 4; ++l) {
                q[l] = butterfly16<T>(element<T>(from, 16 * l), block);
                if (CHECK) {  // of what is rotated, as large as what comes in times the block
                    BELLBOX_UNROLL
                    for (int c = 0; c < 4; ++c) squares = vfmaq_f32(squares, q[l].of[c], q[l].of[c]);
                }
            }
            if (block > 16) add_sub(q[0], q[1]), add_sub(q[2], q[3]);
            if (block > 32) add_sub(q[0], q[2]), add_sub(q[1], q[3]);
            BELLBOX_UNROLL
            for (int l = 0; l < 16; ++l) vst1q_f32(scratch + i + 4 * l, q[l / 4].of[l % 4]);
        }
        if (block > kChunk) butterfly_rest(scratch, span, block);
        return scratch;
    }
};

template <Type IN, Type OUT>
inline void rotate_rows(const RotateArgs& a, const Rotation& rotation, int64_t begin, int64_t end) {
    const int64_t k = a.k;
    PaddedColumns padded;
    for (int64_t i = begin; i < end; ++i) {
        const void* x = element<IN>(a.x, i * k);
        void* out = element<OUT>(a.out, i * k);
        float32x4_t unused = vdupq_n_f32(0);
        for (int64_t j = 0; j < k; j += rotation.span) {
            const float* p = rotation.columns<IN, false>(x, j, unused);
            for (int64_t l = 0; l < rotation.span; l += kChunk, p += kChunk) {
                void* to = padded.write<OUT>(out, j + l, k);
                BELLBOX_UNROLL
                for (int c = 0; c < kChunk; c += 4) store4<OUT>(element<OUT>(to, c), vmulq_n_f32(vld1q_f32(p + c), a.factor));
                padded.done<OUT>(out, j + l, k);
            }
        }
    }
}

// ---- statistics ----

// A square of an fp32 number is exact in fp64, so a fused addition rounds as two operations do.
template <Type T>
inline double row_norm(const void* x, int64_t k) {
    float64x2_t sum[8];
    BELLBOX_UNROLL
    for (int j = 0; j < 8; ++j) sum[j] = vdupq_n_f64(0);
    PaddedColumns padded;
    for (int64_t i = 0; i < k; i += kChunk) {
        const void* from = padded.read<T>(x, i, k);
        for (int j = 0; j < kChunk; j += 16) {
            const Quad q = load16<T>(element<T>(from, j));
            BELLBOX_UNROLL
            for (int c = 0; c < 4; ++c) {
                const float64x2_t low = vcvt_f64_f32(vget_low_f32(q.of[c])), high = vcvt_high_f64_f32(q.of[c]);
                sum[2 * c] = vfmaq_f64(sum[2 * c], low, low);
                sum[2 * c + 1] = vfmaq_f64(sum[2 * c + 1], high, high);
            }
        }
    }
    for (int width = 4; width > 0; width /= 2)
        for (int j = 0; j < width; ++j) sum[j] = vaddq_f64(sum[j], sum[j + width]);
    return __builtin_sqrt(vaddvq_f64(sum[0]));
}

// The largest magnitude; NaN if there is one, which FMAX hands on.
template <Type T>
inline double row_absmax(const void* x, int64_t k) {
    float32x4_t largest[4];
    BELLBOX_UNROLL
    for (int c = 0; c < 4; ++c) largest[c] = vdupq_n_f32(0);
    PaddedColumns padded;
    for (int64_t i = 0; i < k; i += kChunk) {
        const void* from = padded.read<T>(x, i, k);
        for (int j = 0; j < kChunk; j += 16) {
            const Quad q = load16<T>(element<T>(from, j));
            BELLBOX_UNROLL
            for (int c = 0; c < 4; ++c) largest[c] = vmaxq_f32(largest[c], vabsq_f32(q.of[c]));
        }
    }
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(largest[0], largest[1]), vmaxq_f32(largest[2], largest[3])));
}

}  // namespace rows

inline void row_rms(const RmsArgs& a, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
        a.out[i] = rms(a.x_type == Type::f32 ? rows::row_norm<Type::f32>(rows::element<Type::f32>(a.x, i * a.k), a.k)
                                             : rows::row_norm<Type::bf16>(rows::element<Type::bf16>(a.x, i * a.k), a.k),
                       a.k);
}

inline void rotate(const RotateArgs& a, int64_t begin, int64_t end) {
    const Scratch scratch(rows::Rotation::span_of(a.block));
    const rows::Rotation rotation{a.k, a.block, rows::Rotation::span_of(a.block), scratch.data};
    with_types(a.x_type, a.out_type, [&](auto in, auto out) {
        rows::rotate_rows<decltype(in)::type, decltype(out)::type>(a, rotation, begin, end);
    });
}

}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
