// The kernels for one instruction set: portable.
#include "kernels/kernels.h"

#define BELLBOX_NAMESPACE portable
#include "kernels/activations.h"
#include "kernels/cross_entropy.h"
#include "kernels/decoder.h"
#include "kernels/draw.h"
#include "kernels/int8_linear.h"
#include "kernels/peak.h"
#include "kernels/portable/binarized.h"
#include "kernels/portable/encode.h"
#include "kernels/portable/head.h"
#include "kernels/portable/linear.h"
#include "kernels/prompt.h"

namespace bellbox {
constexpr Kernels portable_kernels = {
    .name = "portable",
    .encode = portable::encode,
#ifndef BELLBOX_RUNTIME_ONLY
    .rotate = portable::rotate,
    .forward = portable::forward,
    .backward = portable::backward,
    .keep = portable::keep,
    .row_rms = portable::row_rms,
    .cross_entropy = portable::cross_entropy,
    .cross_entropy_backward = portable::cross_entropy_backward,
#endif
    .linear = portable::linear,
    .rms_norm = portable::rms_norm,
    .layer_norm = portable::layer_norm,
    .activate = portable::activate,
    .attend = portable::attend,
    .store_prompt = portable::store_prompt,
    .attend_prompt = portable::attend_prompt,
    .float_linear = portable::float_linear,
    .int8_linear = portable::int8_linear,
    .int4_linear = portable::int4_linear,
    .draw = portable::draw,
#ifndef BELLBOX_RUNTIME_ONLY
    .integer_peak = portable::integer_peak,
    .binarized_input = portable::binarized_input,
    .binarized = portable::binarized,
#endif
};
}  // namespace bellbox
