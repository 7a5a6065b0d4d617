// What a decoder does between its packed layers, one token at a time: RMS norm, attention over the cache, an fp32 head.
//
// Plain loops, compiled once for each instruction set. Sums run in sixteen lanes that are added in a fixed order, with
// no fused multiply-add, so every instruction set gives the same bits; sums of squares are fp64. Speed is the memory's:
// a decode step reads the cache and the head once.
#pragma once

#include <cstring>

#include "kernels/cache_rows.h"
#include "kernels/exponential.h"
#include "kernels/float_linear.h"
#include "kernels/kernels.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {

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

// Rotary positions: channel i is paired with i + d/2; the same products and sums as RotaryEmbedding's.
inline void turn(const float* x, const float* cosine, const float* sine, int64_t d, float* out) {
    const int64_t half = d / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float first = x[i], second = x[i + half];
        out[i] = first * cosine[i] - second * sine[i];
        out[i + half] = second * cosine[i] + first * sine[i];
    }
}

// The bell of a head, each run of `block` numbers: the stages and factor of core/hadamard.py, hence its bits.
inline void rotate_head(float* x, int64_t d, int64_t block) {
    if (block == 1) return;
    for (int64_t h = 1; h < block; h *= 2)
        for (int64_t begin = 0; begin < d; begin += 2 * h)
            for (int64_t i = begin; i < begin + h; ++i) {
                const float a = x[i], b = x[i + h];
                x[i] = a + b, x[i + h] = a - b;
            }
    const float factor = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(block)));
    for (int64_t i = 0; i < d; ++i) x[i] *= factor;
}

// x [d] to integers (ties to even), as ops/cache_codes.py says: the nearest of -127..127, or of -8..7 times a scale that may
// be negative. Returns what one of them is worth: NaN where x is not finite, and 0 where it is next to nothing.
inline float round_head(float* x, int64_t d, bool eight_bits) {
    float above = 0.0f, below = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < d; ++i) {
        above = x[i] > above ? x[i] : above;
        below = -x[i] > below ? -x[i] : below;
        finite &= __builtin_fabsf(x[i]) <= 3.40282347e38f;
    }
    const float larger = above > below ? above : below, smaller = above > below ? below : above;
    const bool usable = finite && larger >= 1e-30f;
    const float eighth = larger / 8.0f, other = smaller / 7.5f, step = other > eighth ? other : eighth;
    const float scale = eight_bits ? larger / 127.0f : above > below ? -step : step;
    const float factor = usable ? (eight_bits ? 127.0f / larger : 1.0f / scale) : 0.0f, magic = 12582912.0f;  // as in exponential.h
    const float most = eight_bits ? 127.0f : 7.0f;
    for (int64_t i = 0; i < d; ++i) {
        const float code = (x[i] * factor + magic) - magic;
        x[i] = usable ? (code > most ? most : code) : 0.0f;
    }
    return finite ? (usable ? scale : 0.0f) : __builtin_nanf("");
}

inline float code_row(float* x, int64_t d, float* row) {
    std::memcpy(row, x, static_cast<size_t>(d) * sizeof(float));
    return 1.0f;
}

inline float code_row(float* x, int64_t d, int8_t* row) {
    const float scale = round_head(x, d, true);
    for (int64_t i = 0; i < d; ++i) row[i] = static_cast<int8_t>(x[i]);
    return scale;
}

inline float code_row(float* x, int64_t d, uint8_t* row) {
    const float scale = round_head(x, d, false);
    const int64_t half = (d + 1) / 2;
    for (int64_t i = 0; i < half; ++i) {
        const int high = half + i < d ? static_cast<int>(x[half + i]) : -8;
        row[i] = static_cast<uint8_t>((static_cast<int>(x[i]) + 8) | (high + 8) << 4);
    }
    return scale;
}

// Softmax of `scores` [length] without the last division, in place; returns the sum, of kLanes lanes.
inline float exponentials(float* scores, int64_t length) {
    Lanes most[kParts], sums[kParts] = {};
    for (int part = 0; part < kParts; ++part) most[part] = all_lanes(-3.4e38f);
    int64_t s = 0;
    for (; s + kLanes <= length; s += kLanes)
        for (int part = 0; part < kParts; ++part) {
            const Lanes x = load_lanes(scores + s + part * kPart);
            most[part] = where(x > most[part], x, most[part]);
        }
    float lanes[kLanes];
    std::memcpy(lanes, most, sizeof(lanes));
    float largest = -3.4e38f;
    for (int l = 0; l < kLanes; ++l) largest = lanes[l] > largest ? lanes[l] : largest;
    for (; s < length; ++s) largest = scores[s] > largest ? scores[s] : largest;
    map_lanes(scores, scores, 0, length, [&](Lanes x) { return exp_of(x - all_lanes(largest)); });
    for (s = 0; s + kLanes <= length; s += kLanes)
        for (int part = 0; part < kParts; ++part) sums[part] += load_lanes(scores + s + part * kPart);
    std::memcpy(lanes, sums, sizeof(lanes));
    for (int l = 0; s + l < length; ++l) lanes[l] += scores[s + l];
    return sum_lanes(lanes);
}

// Softmax attention of the queries [count, d] of one key-value head over `length` keys and values. Some rows at a time, so
// that each is read once for all queries; `weights` has room for [count, length + 1], `decoded` for [kCacheRows, d].
template <typename Code>
inline void attend_head(const float* queries, int64_t count, const Code* keys, const Code* values, const float* key_scales,
                        const float* value_scales, int64_t length, int64_t d, float* decoded, float* weights, float* out) {
    const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(d));
    const int64_t row = row_length(keys, d), width = length + 1;
    for (int64_t begin = 0; begin < length; begin += kCacheRows) {
        const int64_t some = length - begin < kCacheRows ? length - begin : kCacheRows;
        const Code* const rows = keys + begin * row;
        if (begin + 2 * kCacheRows <= length) prefetch_rows(rows + kCacheRows * row, kCacheRows * row);
        for (int64_t q = 0; q < count; ++q) score_rows(queries + q * d, rows, some, d, scale, decoded, weights + q * width + begin);
    }
    for (int64_t q = 0; q < count; ++q) {
        float* const scores = weights + q * width;
        if (key_scales != nullptr)
            for (int64_t s = 0; s < length; ++s) scores[s] *= key_scales[s];
        scores[length] = exponentials(scores, length);
        if (value_scales != nullptr)
            for (int64_t s = 0; s < length; ++s) scores[s] *= value_scales[s];
        for (int64_t i = 0; i < d; ++i) out[q * d + i] = 0.0f;
    }
    for (int64_t begin = 0; begin < length; begin += kCacheRows) {
        const int64_t some = length - begin < kCacheRows ? length - begin : kCacheRows;
        const Code* const rows = values + begin * row;
        if (begin + 2 * kCacheRows <= length) prefetch_rows(rows + kCacheRows * row, kCacheRows * row);
        for (int64_t q = 0; q < count; ++q) add_rows(weights + q * width + begin, rows, some, d, decoded, out + q * d);
    }
    for (int64_t q = 0; q < count; ++q) {
        const float inverse = 1.0f / weights[q * width + length];
        for (int64_t i = 0; i < d; ++i) out[q * d + i] *= inverse;
    }
}

// Pairs (sequence, key-value head) [begin, end): puts the new key and value into the cache, then attends.
template <typename Code>
inline void attend_pairs(const AttendArgs& a, int64_t begin, int64_t end, float* scratch) {
    const CacheView& cache = a.cache;
    const int64_t d = a.head_dim, count = a.heads / a.kv_heads, row = row_length(static_cast<Code*>(nullptr), d);
    const size_t bytes = static_cast<size_t>(d) * sizeof(float);
    float *const queries = scratch, *const fresh = queries + count * d, *const decoded = fresh + d;
    float* const weights = decoded + kCacheRows * d;
    const auto place = [&](const float* x, int64_t position, float* to) {
        if (a.cosine != nullptr)
            turn(x, a.cosine + position * (d / 2), a.sine + position * (d / 2), d, to);
        else
            std::memcpy(to, x, bytes);
        rotate_head(to, d, cache.block);
    };
    for (int64_t pair = begin; pair < end; ++pair) {
        const int64_t sequence = pair / a.kv_heads, start = cache.start_of(sequence);
        const int64_t at = (cache.slot_of(sequence) * a.kv_heads + pair % a.kv_heads) * cache.room;
        Code* const keys = static_cast<Code*>(cache.keys) + at * row;
        Code* const values = static_cast<Code*>(cache.values) + at * row;
        float* const key_scales = cache.key_scales == nullptr ? nullptr : cache.key_scales + at;
        float* const value_scales = cache.key_scales == nullptr ? nullptr : cache.value_scales + at;
        place(a.key + pair * d, start, fresh);
        const float key_scale = code_row(fresh, d, keys + start * row);
        std::memcpy(fresh, a.value + pair * d, bytes);
        rotate_head(fresh, d, cache.block);
        const float value_scale = code_row(fresh, d, values + start * row);
        if (key_scales != nullptr) key_scales[start] = key_scale, value_scales[start] = value_scale;
        // Pairs are sequence by sequence, and of one the queries of a key-value head follow one another.
        for (int64_t q = 0; q < count; ++q) place(a.query + (pair * count + q) * d, start, queries + q * d);
        float* const out = a.out + pair * count * d;
        attend_head(queries, count, keys, values, key_scales, value_scales, start + 1, d, decoded, weights, out);
        for (int64_t q = 0; q < count; ++q) rotate_head(out + q * d, d, cache.block);
    }
}

inline void attend(const AttendArgs& a, int64_t begin, int64_t end, float* scratch) {
    switch (a.cache.type) {
        case CacheType::f32: return attend_pairs<float>(a, begin, end, scratch);
        case CacheType::i8: return attend_pairs<int8_t>(a, begin, end, scratch);
        case CacheType::i4: return attend_pairs<uint8_t>(a, begin, end, scratch);
    }
}

}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
