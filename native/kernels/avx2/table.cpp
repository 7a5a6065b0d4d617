// The kernels for one instruction set: avx2.
#include "kernels/kernels.h"

#define BELLBOX_NAMESPACE avx2
#include "kernels/avx2/binarized.h"
#include "kernels/avx2/cache_rows.h"
#include "kernels/avx2/choice.h"
#include "kernels/avx2/encode.h"
#include "kernels/avx2/head.h"
#include "kernels/avx2/pixels.h"
#include "kernels/avx2/training.h"
#include "kernels/activations.h"
#include "kernels/cross_entropy.h"
#include "kernels/decoder.h"
#include "kernels/draw.h"
#include "kernels/peak.h"
#include "kernels/prompt.h"

namespace bellbox {
constexpr Kernels avx2_kernels = {
    .name = "avx2",
    .encode = avx2::encode,
#ifndef BELLBOX_RUNTIME_ONLY
    .rotate = avx2::rotate,
    .forward = avx2::forward,
    .backward = avx2::backward,
    .keep = avx2::keep,
    .row_rms = avx2::row_rms,
    .cross_entropy = avx2::cross_entropy,
    .cross_entropy_backward = avx2::cross_entropy_backward,
#endif
    .linear = avx2::linear,
    .rms_norm = avx2::rms_norm,
    .layer_norm = avx2::layer_norm,
    .activate = avx2::activate,
    .attend = avx2::attend,
    .store_prompt = avx2::store_prompt,
    .attend_prompt = avx2::attend_prompt,
    .float_linear = avx2::float_linear,
    .int8_linear = avx2::int8_linear,
    .int4_linear = avx2::int4_linear,
    .draw = avx2::draw,
#ifndef BELLBOX_RUNTIME_ONLY
    .integer_peak = avx2::integer_peak,
    .binarized_input = avx2::binarized_input,
    .binarized = avx2::binarized,
#endif
    .counts = avx2::counts,
    .make_planes = avx2::pixels::make_planes,
    .convolve = avx2::pixels::convolve,
    .joined = 2,
};
}  // namespace bellbox
