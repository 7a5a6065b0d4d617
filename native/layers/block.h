// One block of a decoder for one new token of each sequence, in two or three calls.
//
// The same kernels in the same order as the layers called one by one, hence the same bits. Where a model is not ours, its
// activation and its layer norms stay with the caller.
#pragma once

#include <vector>

#include "layers/layer.h"
#include "layers/pointwise.h"

namespace bellbox {

inline void run_attend(const AttendArgs& a, int threads) {
    const int64_t useful = std::max<int64_t>(1, a.batch * a.heads * a.head_dim * a.cache.start / kAttendGrain);
    share(a.batch * a.kv_heads, static_cast<int>(std::min<int64_t>(threads, useful)), [&](int64_t begin, int64_t end) {
        thread_local std::vector<float> scratch;
        const int64_t queries = a.heads / a.kv_heads;
        const size_t size = static_cast<size_t>((queries + kCacheRows + 1) * a.head_dim + queries * (a.cache.start + 2));
        if (scratch.size() < size) scratch.resize(2 * size);
        kernels().attend(a, begin, end, scratch.data());
    });
}

// Many new tokens of each sequence, or all tokens of one without a cache of its own.
inline void run_prompt(const PromptArgs& a, int threads) {
    const int64_t seen = a.cache.start + a.tokens;
    const int team = useful_threads(a.batch * a.heads * a.head_dim * a.tokens * seen, 8 * kAttendGrain, threads);
    const auto with_scratch = [&a](const auto& run) {
        return [&a, &run](int64_t begin, int64_t end) {
            const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(a.scratch())]);
            run(a, begin, end, scratch.get());
        };
    };
    share(a.batch * a.kv_heads, team, with_scratch(kernels().store_prompt));
    share(a.items(), team, with_scratch(kernels().attend_prompt));
}

// The packed layers of a block; what is between them (norms, the activation of the MLP) stays with the caller.
class Block {
  public:
    Block(Group qkv, Group output, Group wide, Group down, int64_t head_dim)
        : qkv_(std::move(qkv)), output_(std::move(output)), wide_(std::move(wide)), down_(std::move(down)),
          head_dim_(head_dim) {}

    // x [batch, hidden] += attention of normed [batch, hidden]. The cache gets one more position.
    void attention(float* x, const float* normed, int64_t batch, const float* cosine, const float* sine,
                   const CacheView& cache, int threads) {
        const int64_t queries = qkv_.weights[0]->n(), keys_n = qkv_.weights[1]->n();
        const int64_t hidden = output_.weights[0]->n();
        float* const query = scratch(batch * (2 * queries + 2 * keys_n + hidden));
        float* const mixed = query + batch * queries;
        float* const key = mixed + batch * queries;
        float* const value = key + batch * keys_n;
        float* const out = value + batch * keys_n;
        run(qkv_, normed, batch, {query, key, value}, threads);
        run_attend(AttendArgs{query, key, value, cosine, sine, batch, queries / head_dim_, keys_n / head_dim_, head_dim_,
                              cache, mixed},
                   threads);
        run(output_, mixed, batch, {out}, threads);
        for (int64_t i = 0; i < batch * hidden; ++i) x[i] += out[i];
    }

    // outs: [batch, inner] each, the first layers of the MLP.
    void widen(const float* normed, int64_t batch, const std::vector<void*>& outs, int threads) {
        run(wide_, normed, batch, outs, threads);
    }

    // x [batch, hidden] += the last layer of the MLP on active [batch, inner].
    void narrow(float* x, const float* active, int64_t batch, int threads) {
        const int64_t count = batch * down_.weights[0]->n();
        float* const out = scratch(count);
        run(down_, active, batch, {out}, threads);
        for (int64_t i = 0; i < count; ++i) x[i] += out[i];
    }

  private:
    static void run(const Group& layers, const float* x, int64_t rows, const std::vector<void*>& outs, int threads) {
        layers.run(x, Type::f32, rows, outs, Type::f32, threads);
    }
    float* scratch(int64_t count) {
        if (scratch_.size() < static_cast<size_t>(count)) scratch_.resize(static_cast<size_t>(count));
        return scratch_.data();
    }

    Group qkv_, output_, wide_, down_;
    int64_t head_dim_;
    std::vector<float> scratch_;
};

// A block of a LLaMA: with its norms it takes two calls.
class LlamaBlock : public Block {
  public:
    LlamaBlock(Group qkv, Group output, Group gate_up, Group down, int64_t head_dim, const float* first_norm,
               const float* second_norm, double eps)
        : Block(std::move(qkv), std::move(output), std::move(gate_up), std::move(down), head_dim),
          first_norm_(first_norm), second_norm_(second_norm), eps_(eps) {}

    // x [batch, hidden] += attention of its norm; gate and up [batch, inner] of the norm of that.
    void attend_and_widen(float* x, int64_t batch, int64_t hidden, const float* cosine, const float* sine,
                          const CacheView& cache, float* gate, float* up, int threads) {
        normed_.resize(static_cast<size_t>(batch * hidden));
        float* const normed = normed_.data();
        kernels().rms_norm(RmsNormArgs{x, first_norm_, batch, hidden, eps_, normed}, 0, batch);
        attention(x, normed, batch, cosine, sine, cache, threads);
        kernels().rms_norm(RmsNormArgs{x, second_norm_, batch, hidden, eps_, normed}, 0, batch);
        widen(normed, batch, {gate, up}, threads);
    }

    // x [batch, hidden] += the MLP's last layer on gate * up, of so many numbers; gate becomes the product.
    void narrow_product(float* x, float* gate, const float* up, int64_t count, int64_t batch, int threads) {
        for (int64_t i = 0; i < count; ++i) gate[i] *= up[i];
        narrow(x, gate, batch, threads);
    }
    // Likewise on silu(gate) * up.
    void narrow_gated(float* x, float* gate, const float* up, int64_t count, int64_t batch, int threads) {
        run_activate(ActivateArgs{gate, up, Activation::silu, gate}, count, threads);
        narrow(x, gate, batch, threads);
    }

  private:
    const float *first_norm_, *second_norm_;
    double eps_;
    std::vector<float> normed_;
};

}  // namespace bellbox
