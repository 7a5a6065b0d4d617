// Norms and activations between packed layers, on threads.
#pragma once

#include "layers/layer.h"

namespace bellbox {

inline void run_activate(const ActivateArgs& a, int64_t count, int threads) {
    share(count, useful_threads(count, kEncodeGrain, threads), [&](int64_t begin, int64_t end) { kernels().activate(a, begin, end); });
}

inline void run_rms_norm(const RmsNormArgs& a, int threads) {
    share(a.rows, useful_threads(a.rows * a.k, kEncodeGrain, threads), [&](int64_t begin, int64_t end) { kernels().rms_norm(a, begin, end); });
}

inline void run_layer_norm(const LayerNormArgs& a, int threads) {
    share(a.rows, useful_threads(a.rows * a.k, kEncodeGrain, threads), [&](int64_t begin, int64_t end) { kernels().layer_norm(a, begin, end); });
}

}  // namespace bellbox
