// Quantizing rows in plain C++: the floor that runs everywhere, and the text that the fast versions are held against.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "kernels/kernels.h"

namespace bellbox {
namespace {  // each instruction set keeps its own copy: a shared inline function could be any of them

// For the same reason nothing from std:: is used here: its templates and inline functions are weak symbols, and the
// linker keeps one copy for all, perhaps the one compiled for AVX-512.

// fp32 numbers to work in, aligned for every vector width.
struct Scratch {
    float* data;
    explicit Scratch(int64_t count)
        : data(static_cast<float*>(aligned_alloc(64, (static_cast<size_t>(count) * sizeof(float) / 64 + 1) * 64))) {
        if (data == nullptr) abort();
    }
    ~Scratch() { free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

inline float bf16_to_float(uint16_t h) {
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

inline uint16_t float_to_bf16(float f) {  // round to nearest even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float load(const void* p, Type type, int64_t i) {
    if (type == Type::f32) return static_cast<const float*>(p)[i];
    if (type == Type::kept) return static_cast<const int8_t*>(p)[i] / kKeptSteps;
    return bf16_to_float(static_cast<const uint16_t*>(p)[i]);
}

inline void store(void* p, Type type, int64_t i, float value) {
    if (type == Type::f32)
        static_cast<float*>(p)[i] = value;
    else
        static_cast<uint16_t*>(p)[i] = float_to_bf16(value);
}

// Two types as template arguments: calls f with a Tag for each.
template <Type T>
struct Tag {
    static constexpr Type type = T;
};

template <typename F>
inline void with_types(Type in, Type out, const F& f) {
    if (in == Type::kept && out == Type::f32) return f(Tag<Type::kept>(), Tag<Type::f32>());
    if (in == Type::kept) return f(Tag<Type::kept>(), Tag<Type::bf16>());
    if (in == Type::f32 && out == Type::f32) return f(Tag<Type::f32>(), Tag<Type::f32>());
    if (in == Type::f32) return f(Tag<Type::f32>(), Tag<Type::bf16>());
    if (out == Type::f32) return f(Tag<Type::bf16>(), Tag<Type::f32>());
    f(Tag<Type::bf16>(), Tag<Type::bf16>());
}

constexpr double kSigmaFloor = 1e-8;
constexpr double kSigmaCeiling = 1e30;  // above it the fp32 butterfly could overflow

// What a row is multiplied with before it is coded, and its row_scale; with the roundings of
// src/bellbox/ops/encode.py. Both are NaN for a row that is not finite or too large.
struct RowScale {
    float r, row_scale;
};

inline double rms(double norm, int64_t k) { return norm / __builtin_sqrt(static_cast<double>(k > 0 ? k : 1)); }

inline float fixed_scale(const EncodeArgs& a) {
    return static_cast<float>(a.rstd / __builtin_sqrt(static_cast<double>(a.block)));
}

// sigma: the statistic of the row, or its RMS where sigma is fixed (only its size matters then).
inline RowScale row_scale(double sigma, const EncodeArgs& a, int64_t row) {
    if (a.x_type == Type::kept) return {1, a.r[row]};
    if (a.r != nullptr) return {a.r[row], a.r[row] - a.r[row] + 1};
    if (!(sigma <= kSigmaCeiling)) return {__builtin_nanf(""), __builtin_nanf("")};
    if (a.normalise == Normalise::fixed) return {fixed_scale(a), 1};
    const double floored = sigma > kSigmaFloor ? sigma : kSigmaFloor;
    const double r = 1.0 / floored / __builtin_sqrt(static_cast<double>(a.block));
    return {static_cast<float>(r), a.rescale ? static_cast<float>(floored) : 1.0f};
}

namespace portable {

inline void butterfly(float* x, int64_t k, int block) {
    for (int64_t start = 0; start < k; start += block)
        for (int h = 1; h < block; h *= 2)
            for (int i = 0; i < block; i += 2 * h)
                for (int j = i; j < i + h; ++j) {
                    const float a = x[start + j], b = x[start + j + h];
                    x[start + j] = a + b;
                    x[start + j + h] = a - b;
                }
}

inline double row_norm(const void* x, Type type, int64_t begin, int64_t k) {
    double sum = 0;
    for (int64_t j = 0; j < k; ++j) {
        const double value = load(x, type, begin + j);
        sum += value * value;
    }
    return __builtin_sqrt(sum);
}

// The largest magnitude; NaN if there is one.
inline double row_absmax(const void* x, Type type, int64_t begin, int64_t k) {
    float largest = 0;
    for (int64_t j = 0; j < k; ++j) {
        const float value = __builtin_fabsf(load(x, type, begin + j));
        if (!(value <= largest)) largest = value;
        if (value != value) break;
    }
    return largest;
}

inline int code_of(float v, const float* thresholds, int n) {
    int code = 0;
    for (int t = 0; t < n - 1; ++t) code += v >= thresholds[t];
    return code;
}

inline void encode(const EncodeArgs& a, int64_t begin, int64_t end) {
    const Scratch scratch(a.k);
    float* row = scratch.data;
    for (int64_t i = begin; i < end; ++i) {
        const double sigma = a.r != nullptr                       ? 0
                             : a.normalise == Normalise::absmax ? row_absmax(a.x, a.x_type, i * a.ldx, a.k)
                                                                : rms(row_norm(a.x, a.x_type, i * a.ldx, a.k), a.k);
        const RowScale scale = row_scale(sigma, a, i);
        a.row_scales[i] = scale.row_scale;
        for (int64_t j = 0; j < a.k; ++j) row[j] = load(a.x, a.x_type, i * a.ldx + j);
        butterfly(row, a.k, a.block);
        int8_t* levels = a.levels + i * a.ldl;
        int32_t sum = 0;
        for (int64_t j = 0; j < a.k; ++j) {
            const int level = a.multiplier * code_of(row[j] * scale.r, a.thresholds, a.n) - a.shift;
            levels[j] = static_cast<int8_t>(level);
            sum += level;
        }
        memset(levels + a.k, 0, static_cast<size_t>(a.ldl - a.k));
        a.sums[i] = sum;
    }
}

inline void row_rms(const RmsArgs& a, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) a.out[i] = rms(row_norm(a.x, a.x_type, i * a.k, a.k), a.k);
}

inline void rotate(const RotateArgs& a, int64_t begin, int64_t end) {
    const Scratch scratch(a.k);
    float* row = scratch.data;
    for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = 0; j < a.k; ++j) row[j] = load(a.x, a.x_type, i * a.k + j);
        butterfly(row, a.k, a.block);
        for (int64_t j = 0; j < a.k; ++j) store(a.out, a.out_type, i * a.k + j, row[j] * a.factor);
    }
}

inline void forward(const ForwardArgs& a, int64_t begin, int64_t end) {
    const Scratch scratch(a.k);
    float* row = scratch.data;
    for (int64_t i = begin; i < end; ++i) {
        const float r = a.r[i * a.r_stride], scale = a.scale[i * a.scale_stride] * (r - r + 1);
        for (int64_t j = 0; j < a.k; ++j) row[j] = load(a.x, a.x_type, i * a.k + j);
        butterfly(row, a.k, a.block);
        for (int64_t j = 0; j < a.k; ++j) {
            const float v = row[j] * r;
            if (a.v != nullptr) store(a.v, a.out_type, i * a.k + j, v);
            const float code = static_cast<float>(code_of(v, a.thresholds, a.n));
            store(a.x_hat, a.out_type, i * a.k + j, (code - a.offset) * scale);
        }
    }
}

// The greatest step of a code.
inline int8_t highest_step(const KeepArgs& a, int code) {
    return code + 1 < a.n ? static_cast<int8_t>(a.lowest[code + 1] - 1) : static_cast<int8_t>(kKeptMost);
}

inline void keep(const KeepArgs& a, int64_t begin, int64_t end) {
    const Scratch scratch(a.k);
    float* row = scratch.data;
    for (int64_t i = begin; i < end; ++i) {
        const float r = a.r[i * a.r_stride];
        for (int64_t j = 0; j < a.k; ++j) row[j] = load(a.x, a.x_type, i * a.k + j);
        butterfly(row, a.k, a.block);
        for (int64_t j = 0; j < a.k; ++j) {
            const float v = row[j] * r, steps = v * kKeptSteps;
            const int code = code_of(v, a.thresholds, a.n), least = a.lowest[code], most = highest_step(a, code);
            const int step = steps > -kKeptMost ? (steps < kKeptMost ? static_cast<int>(nearbyintf(steps)) : kKeptMost) : -kKeptMost;
            a.kept[i * a.k + j] = static_cast<int8_t>(step < least ? least : step > most ? most : step);
        }
    }
}

inline void backward(const BackwardArgs& a, int64_t begin, int64_t end) {
    constexpr float inv_sqrt_2pi = 0.3989422804014327f;
    const Scratch scratch(a.k);
    float* row = scratch.data;
    for (int64_t i = begin; i < end; ++i) {
        const float r = a.r[i * a.r_stride], factor = 2 * inv_sqrt_2pi * a.gamma[i * a.gamma_stride];
        double dot = 0, out_dot = 0;
        for (int64_t j = 0; j < a.k; ++j) {
            const float v = load(a.v, a.v_type, i * a.k + j), g = load(a.grad, a.type, i * a.k + j);
            const float g_v = expf(-0.5f * v * v) * factor * g;
            row[j] = g_v;
            dot += static_cast<double>(g_v) * v;
            if (a.row_dot == nullptr) continue;
            const bool kept = a.v_type == Type::kept;
            const float out = kept ? static_cast<float>(code_of(v, a.thresholds, a.n)) - a.offset : load(a.x_hat, a.type, i * a.k + j);
            out_dot += static_cast<double>(g) * out;
        }
        if (a.row_dot != nullptr) a.row_dot[i] = static_cast<float>(out_dot);
        const float own_mean = static_cast<float>(dot / static_cast<double>(a.k)) * a.free[i * a.free_stride];
        const float mean = a.mean != nullptr ? *a.mean : own_mean;
        for (int64_t j = 0; j < a.k; ++j)
            row[j] = (row[j] - load(a.v, a.v_type, i * a.k + j) * mean) * r;
        butterfly(row, a.k, a.block);
        for (int64_t j = 0; j < a.k; ++j) store(a.grad_x, a.out_type, i * a.k + j, row[j]);
    }
}

}  // namespace portable
}  // namespace
}  // namespace bellbox
