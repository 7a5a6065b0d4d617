// Attention of many new tokens over a cache, written once, compiled for each instruction set.
//
// Each token gets the products and sums of attend_head (decoder.h) in their order, hence its bits: a prompt at once, in
// pieces or token by token is one function. What differs is which numbers lie side by side in a register: sixteen and more
// keys, whose lanes of a product are then added without leaving their places.
#pragma once

#include <cstring>

#include "kernels/decoder.h"
#include "kernels/inline.h"
#include "kernels/kernels.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {

constexpr int64_t kBeside = 2 * kPart;  // keys whose products with a query lie side by side
static_assert(kPromptKeys % kBeside == 0);

// Keys lie in blocks of kBeside, a block by its lanes, [kLanes][d / kLanes rounded up][kBeside], as they are read.
inline int64_t lane_length(int64_t d) { return (d + kLanes - 1) / kLanes; }
inline int64_t block_size(int64_t d) { return kLanes * lane_length(d) * kBeside; }

// Lanes kLane, kLane + kWidth, ... of the products of queries [kQueries, d] with a block of keys, in the order of sum_lanes.
// A lane begins with its first product, not with zero: the sign of a score that is zero changes no exponential.
template <int kQueries, int kLane, int kWidth>
BELLBOX_INLINE void product_lanes(const float* queries, const float* keys, int64_t d, Lanes (&out)[kQueries][2]) {
    if constexpr (kWidth < kLanes) {
        Lanes other[kQueries][2];
        product_lanes<kQueries, kLane, 2 * kWidth>(queries, keys, d, out);
        product_lanes<kQueries, kLane + kWidth, 2 * kWidth>(queries, keys, d, other);
        for (int q = 0; q < kQueries; ++q) out[q][0] += other[q][0], out[q][1] += other[q][1];
    } else {
        const float* at = keys + kLane * lane_length(d) * kBeside;
        const auto multiply = BELLBOX_STEP(int64_t i, const auto& take) {
            const Lanes first = load_lanes(at), second = load_lanes(at + kPart);
            for (int q = 0; q < kQueries; ++q) {
                const Lanes query = all_lanes(queries[q * d + i]);
                take(out[q][0], query * first), take(out[q][1], query * second);
            }
            at += kBeside;
        };
        if (kLane < d)
            multiply(kLane, BELLBOX_STEP(Lanes& to, Lanes product) { to = product; });
        else
            for (int q = 0; q < kQueries; ++q) out[q][0] = Lanes{}, out[q][1] = Lanes{};
        for (int64_t i = kLane + kLanes; i < d; i += kLanes)
            multiply(i, BELLBOX_STEP(Lanes& to, Lanes product) { to += product; });
    }
}

// Scores of kQueries queries for a block of keys; of a query into `scores`, `width` to the next.
template <int kQueries>
inline void score_block(const float* queries, const float* keys, int64_t d, float scale, float* scores, int64_t width) {
    Lanes sums[kQueries][2];
    product_lanes<kQueries, 0, 1>(queries, keys, d, sums);
    for (int q = 0; q < kQueries; ++q) {
        sums[q][0] *= all_lanes(scale), sums[q][1] *= all_lanes(scale);
        std::memcpy(scores + q * width, sums[q], sizeof(sums[q]));
    }
}

// out [kQueries, d] at columns [i, i + kVectors kPart) += the weighted rows of `groups` groups of four.
template <int kQueries, int kVectors>
BELLBOX_INLINE void add_groups(const float* weights, int64_t width, const float* rows, int64_t groups, int64_t d, float* out) {
    Lanes sums[kQueries][kVectors];
    for (int q = 0; q < kQueries; ++q)
        for (int v = 0; v < kVectors; ++v) sums[q][v] = load_lanes(out + q * d + v * kPart);
    for (int64_t g = 0; g < groups; ++g, rows += 4 * d)
        for (int v = 0; v < kVectors; ++v) {
            const float* const at = rows + v * kPart;
            const Lanes v0 = load_lanes(at), v1 = load_lanes(at + d), v2 = load_lanes(at + 2 * d), v3 = load_lanes(at + 3 * d);
            for (int q = 0; q < kQueries; ++q) {
                const float* const w = weights + q * width + 4 * g;
                sums[q][v] += (all_lanes(w[0]) * v0 + all_lanes(w[1]) * v1) + (all_lanes(w[2]) * v2 + all_lanes(w[3]) * v3);
            }
        }
    for (int q = 0; q < kQueries; ++q)
        for (int v = 0; v < kVectors; ++v) std::memcpy(out + q * d + v * kPart, &sums[q][v], sizeof(Lanes));
}

template <int kQueries>
inline void add_block(const float* weights, int64_t width, const float* rows, int64_t groups, int64_t d, float* out) {
    int64_t i = 0;
    for (; i + 2 * kPart <= d; i += 2 * kPart) add_groups<kQueries, 2>(weights, width, rows + i, groups, d, out + i);
    for (; i + kPart <= d; i += kPart) add_groups<kQueries, 1>(weights, width, rows + i, groups, d, out + i);
    for (; i < d; ++i)
        for (int q = 0; q < kQueries; ++q) {
            float sum = out[q * d + i];
            for (int64_t g = 0; g < groups; ++g) {
                const float *const w = weights + q * width + 4 * g, *const v = rows + 4 * g * d + i;
                sum += (w[0] * v[0] + w[1] * v[d]) + (w[2] * v[2 * d] + w[3] * v[3 * d]);
            }
            out[q * d + i] = sum;
        }
}

inline void place_head(const PromptArgs& a, const float* x, int64_t position, float* to) {
    const int64_t d = a.head_dim;
    if (a.cosine != nullptr)
        turn(x, a.cosine + position * (d / 2), a.sine + position * (d / 2), d, to);
    else
        std::memcpy(to, x, static_cast<size_t>(d) * sizeof(float));
    rotate_head(to, d, a.cache.block);
}

// Where a pair (sequence, key-value head) has its rows.
template <typename Code>
struct PairRows {
    Code *keys, *values;
    float *key_scales, *value_scales;

    PairRows(const PromptArgs& a, int64_t pair) {
        const int64_t at = pair * a.cache.room, row = row_length(static_cast<Code*>(nullptr), a.head_dim);
        keys = static_cast<Code*>(a.cache.keys) + at * row, values = static_cast<Code*>(a.cache.values) + at * row;
        key_scales = a.cache.key_scales == nullptr ? nullptr : a.cache.key_scales + at;
        value_scales = a.cache.key_scales == nullptr ? nullptr : a.cache.value_scales + at;
    }
};

template <typename Code>
inline void store_pairs(const PromptArgs& a, int64_t begin, int64_t end, float* fresh) {
    const int64_t d = a.head_dim, row = row_length(static_cast<Code*>(nullptr), d);
    for (int64_t pair = begin; pair < end; ++pair) {
        const PairRows<Code> to(a, pair);
        const int64_t sequence = pair / a.kv_heads, head = pair % a.kv_heads;
        for (int64_t t = 0; t < a.tokens; ++t) {
            const int64_t from = ((sequence * a.tokens + t) * a.kv_heads + head) * d, position = a.cache.start + t;
            place_head(a, a.key + from, position, fresh);
            const float key_scale = code_row(fresh, d, to.keys + position * row);
            std::memcpy(fresh, a.value + from, static_cast<size_t>(d) * sizeof(float));
            rotate_head(fresh, d, a.cache.block);
            const float value_scale = code_row(fresh, d, to.values + position * row);
            if (to.key_scales != nullptr) to.key_scales[position] = key_scale, to.value_scales[position] = value_scale;
        }
    }
}

// Keys [length, d] to blocks, zeros behind the last.
template <typename Code>
inline void turn_keys(const Code* keys, int64_t length, int64_t d, float* decoded, float* out) {
    static_assert(kCacheRows % kBeside == 0);
    const int64_t row = row_length(keys, d);
    for (int64_t begin = 0; begin < length; begin += kBeside) {
        const int64_t some = length - begin < kBeside ? length - begin : kBeside;
        const float* const rows = decode_rows(keys + begin * row, some, d, decoded);
        float* const block = out + begin / kBeside * block_size(d);
        for (int64_t i = 0; i < d; ++i) {
            float* const to = block + (i % kLanes * lane_length(d) + i / kLanes) * kBeside;
            for (int64_t s = 0; s < some; ++s) to[s] = rows[s * d + i];
            for (int64_t s = some; s < kBeside; ++s) to[s] = 0.0f;
        }
    }
}

// Queries [rows, d], of which some share a token, over the turned keys and the values; see PromptArgs for the scratch.
template <typename Code>
struct PromptBlock {
    const PromptArgs& a;
    const PairRows<Code>& cache;
    const float *queries, *keys;
    int64_t rows, first, width;  // `first`: the token of the first query; `width`: of a row of weights
    float *decoded, *weights, *out;

    // Keys that a query sees.
    int64_t length(int64_t r) const {
        return a.cache.start + (a.causal ? first + r / (a.heads / a.kv_heads) + 1 : a.tokens);
    }

    void run() const {
        score();
        for (int64_t r = 0; r < rows; ++r) soften(weights + r * width, length(r));
        std::memset(out, 0, static_cast<size_t>(rows * a.head_dim) * sizeof(float));
        add();
        for (int64_t r = 0; r < rows; ++r) {
            float* const to = out + r * a.head_dim;
            const float inverse = 1.0f / weights[r * width + width - 1];
            for (int64_t i = 0; i < a.head_dim; ++i) to[i] *= inverse;
            rotate_head(to, a.head_dim, a.cache.block);
        }
    }

  private:
    void score() const {
        const int64_t d = a.head_dim;
        const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(d));
        for (int64_t begin = 0; begin < length(rows - 1); begin += kBeside) {
            const float* const block = keys + begin / kBeside * block_size(d);
            int64_t r = 0;
            while (length(r) <= begin) ++r;
            for (; r + 2 <= rows; r += 2) score_block<2>(queries + r * d, block, d, scale, weights + r * width + begin, width);
            for (; r < rows; ++r) score_block<1>(queries + r * d, block, d, scale, weights + r * width + begin, width);
        }
    }
    // Softmax but for the division; the sum comes last in the row.
    void soften(float* scores, int64_t seen) const {
        if (cache.key_scales != nullptr)
            for (int64_t s = 0; s < seen; ++s) scores[s] *= cache.key_scales[s];
        scores[width - 1] = exponentials(scores, seen);
        if (cache.value_scales != nullptr)
            for (int64_t s = 0; s < seen; ++s) scores[s] *= cache.value_scales[s];
    }
    // Groups of four keys that all queries of a tile see go together, the rest of each by itself.
    void add() const {
        constexpr int kTile = 4;
        const int64_t d = a.head_dim, row = row_length(cache.values, d);
        const auto common = [&](int64_t tile) { return length(tile) / 4 * 4; };
        const int64_t whole = rows / kTile * kTile;
        for (int64_t begin = 0; whole > 0 && begin < common(whole - kTile); begin += kCacheRows) {
            const int64_t most = common(whole - kTile) - begin, some = most < kCacheRows ? most : kCacheRows;
            const float* const values = decode_rows(cache.values + begin * row, some, d, decoded);
            for (int64_t tile = 0; tile < whole; tile += kTile) {
                const int64_t left = common(tile) - begin, groups = (left < some ? left : some) / 4;
                if (groups > 0) add_block<kTile>(weights + tile * width + begin, width, values, groups, d, out + tile * d);
            }
        }
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t from = r < whole ? common(r / kTile * kTile) : 0; from < length(r);) {  // as attend_head, by kCacheRows
                const int64_t next = (from / kCacheRows + 1) * kCacheRows, to = next < length(r) ? next : length(r);
                add_rows(weights + r * width + from, cache.values + from * row, to - from, d, decoded, out + r * d);
                from = to;
            }
        }
    }
};

template <typename Code>
inline void attend_blocks(const PromptArgs& a, int64_t begin, int64_t end, float* scratch) {
    const int64_t d = a.head_dim, count = a.heads / a.kv_heads, blocks = a.blocks(), whole = a.cache.start + a.tokens;
    float* const queries = scratch;
    float* const out = queries + kPromptTokens * count * d;
    float* const decoded = out + kPromptTokens * count * d;
    float* const keys = decoded + kCacheRows * d;
    float* const weights = keys + a.padded() / kBeside * block_size(d);
    int64_t turned = -1;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t pair = item / blocks, nth = item % blocks, sequence = pair / a.kv_heads;
        const int64_t first = (nth % 2 == 0 ? nth / 2 : blocks - 1 - nth / 2) * kPromptTokens;  // short and long ones in turns
        const int64_t tokens = a.tokens - first < kPromptTokens ? a.tokens - first : kPromptTokens;
        const PairRows<Code> cache(a, pair);
        if (pair != turned) turn_keys(cache.keys, whole, d, decoded, keys);
        turned = pair;
        const auto place_of = [&](int64_t r) {
            return ((sequence * a.tokens + first + r / count) * a.heads + pair % a.kv_heads * count + r % count) * d;
        };
        for (int64_t r = 0; r < tokens * count; ++r)
            place_head(a, a.query + place_of(r), a.cache.start + first + r / count, queries + r * d);
        PromptBlock<Code>{a, cache, queries, keys, tokens * count, first, a.padded() + 1, decoded, weights, out}.run();
        for (int64_t r = 0; r < tokens * count; ++r) std::memcpy(a.out + place_of(r), out + r * d, static_cast<size_t>(d) * sizeof(float));
    }
}

inline void store_prompt(const PromptArgs& a, int64_t begin, int64_t end, float* scratch) {
    switch (a.cache.type) {
        case CacheType::f32: return store_pairs<float>(a, begin, end, scratch);
        case CacheType::i8: return store_pairs<int8_t>(a, begin, end, scratch);
        case CacheType::i4: return store_pairs<uint8_t>(a, begin, end, scratch);
    }
}

inline void attend_prompt(const PromptArgs& a, int64_t begin, int64_t end, float* scratch) {
    switch (a.cache.type) {
        case CacheType::f32: return attend_blocks<float>(a, begin, end, scratch);
        case CacheType::i8: return attend_blocks<int8_t>(a, begin, end, scratch);
        case CacheType::i4: return attend_blocks<uint8_t>(a, begin, end, scratch);
    }
}

}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
