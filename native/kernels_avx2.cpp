// The kernels for one instruction set: avx2.
#include "kernels.h"

#include "encode_avx2.h"
#include "linear_avx2.h"
#include "training_avx2.h"

namespace bellbox {
const Kernels avx2_kernels = {
    "avx2", avx2::encode, avx2::rotate, avx2::forward, avx2::backward, avx2::linear};
}  // namespace bellbox
