// Rows of a KV cache under attention: scores of a query, and their weighted sum.
//
// Here they are decoded to fp32 first. avx512/cache_rows.h and avx2/cache_rows.h have overloads for codes that stay in
// registers, with the same products and sums in the same order.
#pragma once

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

inline float dot(const float* a, const float* b, int64_t n) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int l = 0; l < kLanes; ++l) lanes[l] += a[i + l] * b[i + l];
    for (int l = 0; i + l < n; ++l) lanes[l] += a[i + l] * b[i + l];
    return sum_lanes(lanes);
}

// Rows of a cache by what they are made of: numbers, int8 codes, bytes of two codes.
inline int64_t row_length(const float*, int64_t d) { return d; }
inline int64_t row_length(const int8_t*, int64_t d) { return d; }
inline int64_t row_length(const uint8_t*, int64_t d) { return (d + 1) / 2; }

inline const float* decode_rows(const float* rows, int64_t, int64_t, float*) { return rows; }

inline const float* decode_rows(const int8_t* codes, int64_t count, int64_t d, float* __restrict out) {
    for (int64_t i = 0; i < count * d; ++i) out[i] = static_cast<float>(codes[i]);
    return out;
}

inline const float* decode_rows(const uint8_t* codes, int64_t count, int64_t d, float* __restrict out) {
    const int64_t half = (d + 1) / 2;
    for (int64_t row = 0; row < count; ++row, codes += half) {
        float* const low = out + row * d;
        float* const high = low + half;
        for (int64_t i = 0; i < half; ++i) low[i] = static_cast<float>((codes[i] & 15) - 8);
        for (int64_t i = 0; i < d - half; ++i) high[i] = static_cast<float>((codes[i] >> 4) - 8);
    }
    return out;
}

// The next rows, while those at hand are multiplied.
template <typename Code>
inline void prefetch_rows(const Code* rows, int64_t count) {
    for (int64_t byte = 0; byte < count * static_cast<int64_t>(sizeof(Code)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(rows) + byte);
}

// out[s] = scale * the product of the query and row s, without the row's own scale.
template <typename Code>
inline void score_rows(const float* query, const Code* codes, int64_t count, int64_t d, float scale, float* decoded, float* out) {
    const float* const rows = decode_rows(codes, count, d, decoded);
    for (int64_t s = 0; s < count; ++s) out[s] = dot(query, rows + s * d, d) * scale;
}

// out [d] += the sum of weights[s] * row s, four rows at a time.
template <typename Code>
inline void add_rows(const float* weights, const Code* codes, int64_t count, int64_t d, float* decoded, float* __restrict out) {
    const float* const rows = decode_rows(codes, count, d, decoded);
    int64_t s = 0;
    for (; s + 4 <= count; s += 4) {
        const float w0 = weights[s], w1 = weights[s + 1], w2 = weights[s + 2], w3 = weights[s + 3];
        const float* v = rows + s * d;
        for (int64_t i = 0; i < d; ++i) out[i] += (w0 * v[i] + w1 * v[d + i]) + (w2 * v[2 * d + i] + w3 * v[3 * d + i]);
    }
    for (; s < count; ++s)
        for (int64_t i = 0; i < d; ++i) out[i] += weights[s] * rows[s * d + i];
}

}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
