// The kernels for one instruction set: neon.
#define BELLBOX_NAMESPACE neon
#include "kernels/neon/cache_rows.h"
#include "kernels/neon/encode.h"
#include "kernels/neon/products.h"
#include "kernels/neon/training.h"

#include "kernels/activations.h"
#include "kernels/cross_entropy.h"
#include "kernels/decoder.h"
#include "kernels/draw.h"
#include "kernels/portable/binarized.h"
#include "kernels/prompt.h"

namespace bellbox {
constexpr Kernels neon_kernels = {
    .name = "neon",
    .encode = neon::encode,
#ifndef BELLBOX_RUNTIME_ONLY
    .rotate = neon::rotate,
    .forward = neon::forward,
    .backward = portable::backward,
    .keep = neon::keep,
    .row_rms = neon::row_rms,
    .cross_entropy = neon::cross_entropy,
    .cross_entropy_backward = neon::cross_entropy_backward,
#endif
    .linear = neon::linear,
    .rms_norm = neon::rms_norm,
    .layer_norm = neon::layer_norm,
    .activate = neon::activate,
    .attend = neon::attend,
    .store_prompt = neon::store_prompt,
    .attend_prompt = neon::attend_prompt,
    .float_linear = neon::float_linear,
    .int8_linear = neon::int8_linear,
    .int4_linear = neon::int4_linear,
    .draw = neon::draw,
#ifndef BELLBOX_RUNTIME_ONLY
    .integer_peak = neon::integer_peak,
    .binarized_input = neon::binarized_input,
    .binarized = portable::binarized,
#endif
    .counts = neon::counts,
};
}  // namespace bellbox
