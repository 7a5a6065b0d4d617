// The kernels for one instruction set: avx512.
#include "kernels/kernels.h"

#define BELLBOX_NAMESPACE avx512
#include "kernels/avx512/binarized.h"
#include "kernels/avx512/choice.h"
#include "kernels/avx512/encode.h"
#include "kernels/avx512/pixels.h"
#include "kernels/avx512/training.h"
#include "kernels/decoder.h"
#include "kernels/peak.h"

namespace bellbox {
constexpr Kernels avx512_kernels = {
    "avx512",       avx512::encode,   avx512::rotate, avx512::forward,    avx512::backward,
    avx512::linear, avx512::rms_norm, avx512::attend, avx512::int8_linear, avx512::integer_peak,
    avx512::binarized_input, avx512::binarized, avx512::counts, avx512::pixels::make_planes, avx512::pixels::convolve};
}  // namespace bellbox
