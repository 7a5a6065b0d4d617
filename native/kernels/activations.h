// What stands between the packed layers of an MLP, and LayerNorm: plain loops, compiled once for each instruction set.
//
// Every product, sum and quotient is one rounding in fp32 (in fp64 inside LayerNorm) and none is fused, so that every
// instruction set, and every machine, gives the same bits.
#pragma once

#include "kernels/cache_rows.h"
#include "kernels/exponential.h"
#include "kernels/kernels.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {

// x / (1 + e^-z): x times the sigmoid of z, with an exponential that cannot overflow.
BELLBOX_INLINE Lanes gated(Lanes x, Lanes z) {
    const LaneBits below = z < Lanes{};
    const Lanes e = exp_of(where(below, z, -z));
    return where(below, x * e, x) / (all_lanes(1.0f) + e);
}

BELLBOX_INLINE Lanes silu(Lanes x) { return gated(x, x); }

// x (1 + tanh(u)) / 2 is x times the sigmoid of 2u, u = sqrt(2/pi) (x + 0.044715 x^3).
BELLBOX_INLINE Lanes gelu_tanh(Lanes x) { return gated(x, x * (all_lanes(1.59576912f) + all_lanes(0.0713548163f) * (x * x))); }

constexpr float kTail[10] = {0.119686641f,  0.119572721f, 0.110228412f,  0.0784200951f, 0.0960749015f,
                             -0.0792814046f, 0.191625372f, -0.228102282f, 0.112391412f,  -0.0206158627f};

// x Phi(x). Phi(-t) is e^(-t^2/2) y P(y) with y = 1 / (1 + 0.3 t), to 4e-9 of itself for t up to 14; P was fitted by
// iterated least squares to 0.5 erfcx(t / sqrt(2)) / y.
BELLBOX_INLINE Lanes gelu_erf(Lanes x) {
    const LaneBits below = x < Lanes{};
    const Lanes t = where(below, -x, x), y = all_lanes(1.0f) / (all_lanes(1.0f) + all_lanes(0.3f) * t);
    Lanes p = all_lanes(kTail[9]);
    BELLBOX_UNROLL
    for (int i = 8; i >= 0; --i) p = p * y + all_lanes(kTail[i]);
    const Lanes tail = exp_of(all_lanes(-0.5f) * t * t) * (y * p), product = x * tail;
    return where(below, product, x - product);
}

template <typename F>
inline void activate_with(const ActivateArgs& a, int64_t begin, int64_t end, const F& function) {
    map_lanes(a.x, a.out, begin, end, function);
    if (a.times != nullptr)
        for (int64_t i = begin; i < end; ++i) a.out[i] *= a.times[i];
}

// Some numbers at a time, so that they are multiplied while they are near.
inline void activate(const ActivateArgs& a, int64_t begin, int64_t end) {
    constexpr int64_t kSome = 1024;
    for (int64_t from = begin; from < end; from += kSome) {
        const int64_t to = from + kSome < end ? from + kSome : end;
        switch (a.kind) {
            case Activation::silu: activate_with(a, from, to, [](Lanes x) { return silu(x); }); break;
            case Activation::gelu_tanh: activate_with(a, from, to, [](Lanes x) { return gelu_tanh(x); }); break;
            case Activation::gelu_erf: activate_with(a, from, to, [](Lanes x) { return gelu_erf(x); }); break;
            case Activation::relu: activate_with(a, from, to, [](Lanes x) { return where(x < Lanes{}, Lanes{}, x); }); break;
        }
    }
}

// The sum over i of f(i), in lanes of fp64.
template <typename F>
inline double sum_wide(int64_t k, const F& f) {
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes)
        for (int l = 0; l < kLanes; ++l) lanes[l] += f(i + l);
    for (int l = 0; i + l < k; ++l) lanes[l] += f(i + l);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
    return lanes[0];
}

// rows [begin, end): out = (x - mean) / sqrt(variance + eps) * weight + bias, in fp64, rounded once.
inline void layer_norm(const LayerNormArgs& a, int64_t begin, int64_t end) {
    const double count = static_cast<double>(a.k);
    for (int64_t row = begin; row < end; ++row) {
        const float* const x = a.x + row * a.k;
        float* const out = a.out + row * a.k;
        const double mean = sum_wide(a.k, [&](int64_t i) { return static_cast<double>(x[i]); }) / count;
        const double squares = sum_wide(a.k, [&](int64_t i) {
            const double off = static_cast<double>(x[i]) - mean;
            return off * off;
        });
        const double factor = 1.0 / __builtin_sqrt(squares / count + a.eps);
        if (a.bias == nullptr)
            for (int64_t i = 0; i < a.k; ++i)
                out[i] = static_cast<float>((static_cast<double>(x[i]) - mean) * factor * static_cast<double>(a.weight[i]));
        else
            for (int64_t i = 0; i < a.k; ++i)
                out[i] = static_cast<float>((static_cast<double>(x[i]) - mean) * factor * static_cast<double>(a.weight[i]) +
                                            static_cast<double>(a.bias[i]));
    }
}

}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
