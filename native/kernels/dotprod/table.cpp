// The kernels for one instruction set: dotprod.
#define BELLBOX_NAMESPACE dotprod
#include "kernels/neon/kernels.h"

namespace bellbox {
constexpr Kernels dotprod_kernels = dotprod::table("dotprod");
}  // namespace bellbox
