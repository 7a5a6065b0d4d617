// The kernels for one instruction set: portable.
#include "kernels.h"

#define BELLBOX_NAMESPACE portable
#include "binarized_portable.h"
#include "decoder.h"
#include "encode_portable.h"
#include "linear_portable.h"
#include "peak.h"

namespace bellbox {
constexpr Kernels portable_kernels = {
    "portable",       portable::encode,   portable::rotate, portable::forward,    portable::backward,
    portable::linear, portable::rms_norm, portable::attend, portable::int8_linear, portable::integer_peak,
    portable::binarized_input, portable::binarized};
}  // namespace bellbox
