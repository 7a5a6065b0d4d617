// The kernels for one instruction set: avx2.
#include "kernels.h"

#define BELLBOX_NAMESPACE avx2
#include "binarized_portable.h"
#include "decoder.h"
#include "encode_avx2.h"
#include "linear_avx2.h"
#include "peak.h"
#include "training_avx2.h"

namespace bellbox {
constexpr Kernels avx2_kernels = {
    "avx2",       avx2::encode,   avx2::rotate, avx2::forward,    avx2::backward,
    avx2::linear, avx2::rms_norm, avx2::attend, avx2::int8_linear, avx2::integer_peak,
    avx2::binarized_input, portable::binarized};
}  // namespace bellbox
