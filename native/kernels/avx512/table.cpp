// The kernels for one instruction set: avx512.
#include "kernels/kernels.h"

#define BELLBOX_NAMESPACE avx512
#include "kernels/avx512/binarized.h"
#include "kernels/avx512/cache_rows.h"
#include "kernels/avx512/choice.h"
#include "kernels/avx512/encode.h"
#include "kernels/avx512/head.h"
#include "kernels/avx512/pixels.h"
#include "kernels/avx512/training.h"
#include "kernels/activations.h"
#include "kernels/cross_entropy.h"
#include "kernels/decoder.h"
#include "kernels/draw.h"
#include "kernels/int8_linear.h"
#include "kernels/peak.h"
#include "kernels/prompt.h"

namespace bellbox {
constexpr Kernels avx512_kernels = {
    .name = "avx512",
    .encode = avx512::encode,
#ifndef BELLBOX_RUNTIME_ONLY
    .rotate = avx512::rotate,
    .forward = avx512::forward,
    .backward = avx512::backward,
    .keep = avx512::keep,
    .row_rms = avx512::row_rms,
    .cross_entropy = avx512::cross_entropy,
    .cross_entropy_backward = avx512::cross_entropy_backward,
#endif
    .linear = avx512::linear,
    .rms_norm = avx512::rms_norm,
    .layer_norm = avx512::layer_norm,
    .activate = avx512::activate,
    .attend = avx512::attend,
    .store_prompt = avx512::store_prompt,
    .attend_prompt = avx512::attend_prompt,
    .float_linear = avx512::float_linear,
    .int8_linear = avx512::int8_linear,
    .int4_linear = avx512::int4_linear,
    .draw = avx512::draw,
#ifndef BELLBOX_RUNTIME_ONLY
    .integer_peak = avx512::integer_peak,
    .binarized_input = avx512::binarized_input,
    .binarized = avx512::binarized,
#endif
    .counts = avx512::counts,
    .make_planes = avx512::pixels::make_planes,
    .convolve = avx512::pixels::convolve,
    .joined = 3,
};
}  // namespace bellbox
