// One block of a LLaMA for one new token of each sequence, in two calls: what is before the SiLU of the MLP, and after it.
//
// The same kernels in the same order as the layers called one by one, hence the same bits. The SiLU stays with the caller:
// its exponential is torch's.
#pragma once

#include <vector>

#include "layer.h"

namespace bellbox {

// Layers that read the same input.
struct Siblings {
    const Coding* coding;
    std::vector<const PackedWeights*> weights;
    std::vector<float> act_scales;

    void run(const float* x, int64_t rows, const std::vector<void*>& outs, int threads) const {
        Job job{coding->of(x, Type::f32, rows, weights[0]->k(), weights[0]->k()), weights, act_scales, outs, Type::f32};
        linear(job, threads);
    }
};

inline void run_attend(const AttendArgs& a, int threads) {
    const int64_t useful = std::max<int64_t>(1, a.batch * a.heads * a.head_dim * a.start / kAttendGrain);
    share(a.batch * a.kv_heads, static_cast<int>(std::min<int64_t>(threads, useful)), [&](int64_t begin, int64_t end) {
        thread_local std::vector<float> scratch;
        const size_t size = static_cast<size_t>(a.head_dim + a.start + 1);
        if (scratch.size() < size) scratch.resize(2 * size);
        kernels().attend(a, begin, end, scratch.data());
    });
}

class LlamaBlock {
  public:
    LlamaBlock(Siblings qkv, Siblings output, Siblings gate_up, Siblings down, const float* first_norm,
               const float* second_norm, double eps, int64_t head_dim)
        : qkv_(std::move(qkv)), output_(std::move(output)), gate_up_(std::move(gate_up)), down_(std::move(down)),
          first_norm_(first_norm), second_norm_(second_norm), eps_(eps), head_dim_(head_dim) {}

    // x [batch, hidden] += attention; gate and up [batch, inner] of the norm of that. The cache gets position `start`.
    void attention(float* x, int64_t batch, const float* cosine, const float* sine, float* keys, float* values,
                   int64_t room, int64_t start, float* gate, float* up, int threads) {
        const int64_t queries = qkv_.weights[0]->n(), keys_n = qkv_.weights[1]->n(), hidden = qkv_.weights[0]->k();
        const int64_t width = std::max(hidden, queries);
        scratch_.resize(static_cast<size_t>(batch * (2 * width + queries + 2 * keys_n)));
        float* const normed = scratch_.data();
        float* const mixed = normed + batch * width;
        float* const query = mixed + batch * width;
        float* const key = query + batch * queries;
        float* const value = key + batch * keys_n;
        kernels().rms_norm(RmsNormArgs{x, first_norm_, batch, hidden, eps_, normed}, 0, batch);
        qkv_.run(normed, batch, {query, key, value}, threads);
        run_attend(AttendArgs{query, key, value, cosine, sine, keys, values, batch, queries / head_dim_,
                              keys_n / head_dim_, head_dim_, room, start, mixed},
                   threads);
        output_.run(mixed, batch, {normed}, threads);
        for (int64_t i = 0; i < batch * hidden; ++i) x[i] += normed[i];
        kernels().rms_norm(RmsNormArgs{x, second_norm_, batch, hidden, eps_, normed}, 0, batch);
        gate_up_.run(normed, batch, {gate, up}, threads);
    }

    // x [batch, hidden] += down projection of active [batch, inner].
    void mlp(float* x, const float* active, int64_t batch, int threads) {
        const int64_t count = batch * down_.weights[0]->n();
        scratch_.resize(static_cast<size_t>(count));
        down_.run(active, batch, {scratch_.data()}, threads);
        for (int64_t i = 0; i < count; ++i) x[i] += scratch_[static_cast<size_t>(i)];
    }

  private:
    Siblings qkv_, output_, gate_up_, down_;
    const float *first_norm_, *second_norm_;
    double eps_;
    int64_t head_dim_;
    std::vector<float> scratch_;
};

}  // namespace bellbox
