// The kernels for one instruction set: portable.
#include "kernels/kernels.h"

#define BELLBOX_NAMESPACE portable
#include "kernels/decoder.h"
#include "kernels/peak.h"
#include "kernels/portable/binarized.h"
#include "kernels/portable/encode.h"
#include "kernels/portable/linear.h"

namespace bellbox {
constexpr Kernels portable_kernels = {
    "portable",       portable::encode,   portable::rotate, portable::forward,    portable::backward,
    portable::linear, portable::rms_norm, portable::attend, portable::int8_linear, portable::integer_peak,
    portable::binarized_input, portable::binarized};
}  // namespace bellbox
