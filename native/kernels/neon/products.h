// What an instruction set of ARM beyond NEON does otherwise: products. Compiled for each; what it lacks, the compiler says.
#pragma once

#include "kernels/kernels.h"

#include "kernels/neon/binary.h"
#include "kernels/neon/head.h"
#include "kernels/peak.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {

constexpr Products products() {
    return {
        .linear = linear,
        .int8_linear = int8_linear,
        .int4_linear = int4_linear,
        .integer_peak = integer_peak,
    };
}

}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
