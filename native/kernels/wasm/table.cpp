// The kernels for one instruction set: wasm, which is WebAssembly with SIMD128. What no packed model runs is portable.
#include "kernels/kernels.h"

#define BELLBOX_NAMESPACE wasm
#include "kernels/decoder.h"
#include "kernels/draw.h"
#include "kernels/peak.h"
#include "kernels/portable/binarized.h"
#include "kernels/wasm/encode.h"
#include "kernels/wasm/head.h"
#include "kernels/wasm/linear.h"

namespace bellbox {
constexpr Kernels wasm_kernels = {
    .name = "wasm",
    .encode = wasm::encode,
    .rotate = portable::rotate,
    .forward = portable::forward,
    .backward = portable::backward,
    .keep = portable::keep,
    .row_rms = portable::row_rms,
    .linear = wasm::linear,
    .rms_norm = wasm::rms_norm,
    .attend = wasm::attend,
    .float_linear = wasm::float_linear,
    .int8_linear = wasm::int8_linear,
    .int4_linear = wasm::int4_linear,
    .draw = wasm::draw,
    .integer_peak = wasm::integer_peak,
    .binarized_input = wasm::binarized_input,
    .binarized = portable::binarized,
    .counts = wasm::counts,
};
}  // namespace bellbox
