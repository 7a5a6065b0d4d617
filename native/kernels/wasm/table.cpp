// The kernels for one instruction set: wasm, which is WebAssembly with SIMD128. What no packed model runs is portable.
#include "kernels/kernels.h"

#define BELLBOX_NAMESPACE wasm
#include "kernels/activations.h"
#include "kernels/decoder.h"
#include "kernels/draw.h"
#include "kernels/peak.h"
#include "kernels/portable/binarized.h"
#include "kernels/prompt.h"
#include "kernels/wasm/encode.h"
#include "kernels/wasm/head.h"
#include "kernels/wasm/linear.h"

namespace bellbox {
constexpr Kernels wasm_kernels = {
    .name = "wasm",
    .encode = wasm::encode,
#ifndef BELLBOX_RUNTIME_ONLY
    .rotate = portable::rotate,
    .forward = portable::forward,
    .backward = portable::backward,
    .keep = portable::keep,
    .row_rms = portable::row_rms,
#endif
    .linear = wasm::linear,
    .rms_norm = wasm::rms_norm,
    .layer_norm = wasm::layer_norm,
    .activate = wasm::activate,
    .attend = wasm::attend,
    .store_prompt = wasm::store_prompt,
    .attend_prompt = wasm::attend_prompt,
    .float_linear = wasm::float_linear,
    .int8_linear = wasm::int8_linear,
    .int4_linear = wasm::int4_linear,
    .draw = wasm::draw,
#ifndef BELLBOX_RUNTIME_ONLY
    .integer_peak = wasm::integer_peak,
    .binarized_input = wasm::binarized_input,
    .binarized = portable::binarized,
#endif
    .counts = wasm::counts,
};
}  // namespace bellbox
