// The kernels for ARM, compiled once for each of neon, dotprod and i8mm: what an instruction set lacks, the compiler says.
#pragma once

#include "kernels/kernels.h"

#include "kernels/neon/binary.h"
#include "kernels/neon/cache_rows.h"
#include "kernels/neon/encode.h"
#include "kernels/neon/head.h"
#include "kernels/neon/training.h"

#include "kernels/decoder.h"
#include "kernels/draw.h"
#include "kernels/peak.h"
#include "kernels/portable/binarized.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {

constexpr Kernels table(const char* name) {
    return {
        .name = name,
        .encode = encode,
        .rotate = rotate,
        .forward = forward,
        .backward = portable::backward,
        .keep = keep,
        .row_rms = row_rms,
        .linear = linear,
        .rms_norm = rms_norm,
        .attend = attend,
        .float_linear = float_linear,
#ifdef __ARM_FEATURE_DOTPROD
        .int8_linear = int8_by_parts,
#else
        .int8_linear = int8_linear,
#endif
        .int4_linear = int4_linear,
        .draw = draw,
        .integer_peak = integer_peak,
        .binarized_input = binarized_input,
        .binarized = portable::binarized,
        .counts = counts,
    };
}

}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
