// The kernels for one instruction set: portable.
#include "kernels.h"

#include "encode_portable.h"
#include "linear_portable.h"

namespace bellbox {
const Kernels portable_kernels = {
    "portable", portable::encode, portable::rotate, portable::forward, portable::backward, portable::linear};
}  // namespace bellbox
