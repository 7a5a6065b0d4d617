// The kernels for one instruction set: avx2.
#include "kernels/kernels.h"

#define BELLBOX_NAMESPACE avx2
#include "kernels/avx2/encode.h"
#include "kernels/avx2/linear.h"
#include "kernels/avx2/training.h"
#include "kernels/decoder.h"
#include "kernels/peak.h"
#include "kernels/portable/binarized.h"

namespace bellbox {
constexpr Kernels avx2_kernels = {
    "avx2",       avx2::encode,   avx2::rotate, avx2::forward,    avx2::backward,
    avx2::linear, avx2::rms_norm, avx2::attend, avx2::int8_linear, avx2::integer_peak,
    avx2::binarized_input, portable::binarized};
}  // namespace bellbox
