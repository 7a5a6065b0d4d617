// The kernels for one instruction set: avx512.
#include "kernels.h"

#define BELLBOX_NAMESPACE avx512
#include "binarized_avx512.h"
#include "choice_avx512.h"
#include "decoder.h"
#include "encode_avx512.h"
#include "peak.h"
#include "pixels_avx512.h"
#include "training_avx512.h"

namespace bellbox {
constexpr Kernels avx512_kernels = {
    "avx512",       avx512::encode,   avx512::rotate, avx512::forward,    avx512::backward,
    avx512::linear, avx512::rms_norm, avx512::attend, avx512::int8_linear, avx512::integer_peak,
    avx512::binarized_input, avx512::binarized, avx512::counts, avx512::pixels::make_planes, avx512::pixels::convolve};
}  // namespace bellbox
