// What a decoder does between its packed layers, one token at a time: RMS norm, attention over the cache, int8 head.
//
// Plain loops, compiled once for each instruction set. Sums run in sixteen lanes that are added in a fixed order, with
// no fused multiply-add, so every instruction set gives the same bits; sums of squares are fp64. Speed is the memory's:
// a decode step reads the cache and the head once.
#pragma once

#include <cstring>

#include "kernels/kernels.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {

constexpr int kLanes = 16;

inline float sum_lanes(float* lanes) {
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
    return lanes[0];
}

// rows [begin, end): out = (x / rms(x)) * weight, the sum of squares in fp64, its inverse root rounded once.
inline void rms_norm(const RmsNormArgs& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const float* x = a.x + row * a.k;
        float* out = a.out + row * a.k;
        double lanes[kLanes] = {};
        int64_t i = 0;
        for (; i + kLanes <= a.k; i += kLanes)
            for (int l = 0; l < kLanes; ++l) lanes[l] += static_cast<double>(x[i + l]) * static_cast<double>(x[i + l]);
        for (int l = 0; i + l < a.k; ++l) lanes[l] += static_cast<double>(x[i + l]) * static_cast<double>(x[i + l]);
        for (int width = kLanes / 2; width > 0; width /= 2)
            for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
        const float scale = static_cast<float>(1.0 / __builtin_sqrt(lanes[0] / static_cast<double>(a.k) + a.eps));
        for (int64_t j = 0; j < a.k; ++j) out[j] = x[j] * scale * a.weight[j];
    }
}

inline float dot(const float* a, const float* b, int64_t n) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int l = 0; l < kLanes; ++l) lanes[l] += a[i + l] * b[i + l];
    for (int l = 0; i + l < n; ++l) lanes[l] += a[i + l] * b[i + l];
    return sum_lanes(lanes);
}

// e^x for x <= 0, to about one unit in the last place: 2^n times the Taylor polynomial of the rest.
inline float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const float n = (x * 1.44269504f + magic) - magic;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return p * power;
}

// Rotary positions: channel i is paired with i + d/2; the same products and sums as RotaryEmbedding's.
inline void turn(const float* x, const float* cosine, const float* sine, int64_t d, float* out) {
    const int64_t half = d / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float first = x[i], second = x[i + half];
        out[i] = first * cosine[i] - second * sine[i];
        out[i + half] = second * cosine[i] + first * sine[i];
    }
}

// Softmax attention of one query over `length` keys and values. `weights` has room for `length` floats.
inline void attend_one(const float* query, const float* keys, const float* values, int64_t length, int64_t d, float scale,
                       float* weights, float* out) {
    float largest = -3.4e38f;
    for (int64_t s = 0; s < length; ++s) {
        weights[s] = dot(query, keys + s * d, d) * scale;
        largest = weights[s] > largest ? weights[s] : largest;
    }
    float lanes[kLanes] = {};
    for (int64_t s = 0; s < length; ++s) weights[s] = exp_of(weights[s] - largest);
    int64_t s = 0;
    for (; s + kLanes <= length; s += kLanes)
        for (int l = 0; l < kLanes; ++l) lanes[l] += weights[s + l];
    for (int l = 0; s + l < length; ++l) lanes[l] += weights[s + l];
    const float total = sum_lanes(lanes);
    for (int64_t i = 0; i < d; ++i) out[i] = 0.0f;
    for (s = 0; s + 4 <= length; s += 4) {
        const float w0 = weights[s], w1 = weights[s + 1], w2 = weights[s + 2], w3 = weights[s + 3];
        const float* v = values + s * d;
        for (int64_t i = 0; i < d; ++i) out[i] += (w0 * v[i] + w1 * v[d + i]) + (w2 * v[2 * d + i] + w3 * v[3 * d + i]);
    }
    for (; s < length; ++s)
        for (int64_t i = 0; i < d; ++i) out[i] += weights[s] * values[s * d + i];
    const float inverse = 1.0f / total;
    for (int64_t i = 0; i < d; ++i) out[i] *= inverse;
}

// Pairs (sequence, key-value head) [begin, end): puts the new key and value into the cache, then attends.
inline void attend(const AttendArgs& a, int64_t begin, int64_t end, float* scratch) {
    const int64_t d = a.head_dim, groups = a.heads / a.kv_heads;
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(d));
    float* const turned = scratch;
    float* const weights = scratch + d;
    for (int64_t pair = begin; pair < end; ++pair) {
        const int64_t sequence = pair / a.kv_heads, kv = pair % a.kv_heads;
        float* keys = a.keys + pair * a.room * d;
        float* values = a.values + pair * a.room * d;
        const float* key = a.key + pair * d;
        float* const new_key = keys + a.start * d;
        if (a.cosine != nullptr)
            turn(key, a.cosine, a.sine, d, new_key);
        else
            std::memcpy(new_key, key, static_cast<size_t>(d) * sizeof(float));
        std::memcpy(values + a.start * d, a.value + pair * d, static_cast<size_t>(d) * sizeof(float));
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t head = sequence * a.heads + kv * groups + g;
            const float* query = a.query + head * d;
            if (a.cosine != nullptr) {
                turn(query, a.cosine, a.sine, d, turned);
                query = turned;
            }
            attend_one(query, keys, values, a.start + 1, d, scale, weights, a.out + head * d);
        }
    }
}

// Weight rows [begin, end) of out[m, n] = float(sum_k x * weight) * (scale[n] * x_scale[m]); the sum is exact.
inline void int8_linear(const Int8LinearArgs& a, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
        const int8_t* weight = a.weight + n * a.k;
        int64_t m = 0;
        for (; m + 4 <= a.m; m += 4) {
            const int16_t *x0 = a.x + m * a.k, *x1 = x0 + a.k, *x2 = x1 + a.k, *x3 = x2 + a.k;
            int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
            for (int64_t i = 0; i < a.k; ++i) {
                const int16_t w = weight[i];
                s0 += w * x0[i], s1 += w * x1[i], s2 += w * x2[i], s3 += w * x3[i];
            }
            const int32_t sums[4] = {s0, s1, s2, s3};
            for (int j = 0; j < 4; ++j)
                a.out[(m + j) * a.n + n] = static_cast<float>(sums[j]) * (a.scale[n] * a.x_scale[m + j]);
        }
        for (; m < a.m; ++m) {
            const int16_t* x = a.x + m * a.k;
            int32_t sum = 0;
            for (int64_t i = 0; i < a.k; ++i) sum += static_cast<int16_t>(weight[i]) * x[i];
            a.out[m * a.n + n] = static_cast<float>(sum) * (a.scale[n] * a.x_scale[m]);
        }
    }
}

}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
