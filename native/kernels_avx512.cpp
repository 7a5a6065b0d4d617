// The kernels for one instruction set: avx512.
#include "kernels.h"

#include "encode_avx512.h"
#include "linear_avx512.h"
#include "training_avx512.h"

namespace bellbox {
const Kernels avx512_kernels = {
    "avx512", avx512::encode, avx512::rotate, avx512::forward, avx512::backward, avx512::linear};
}  // namespace bellbox
