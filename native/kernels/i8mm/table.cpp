// The kernels for one instruction set: i8mm.
#define BELLBOX_NAMESPACE i8mm
#include "kernels/neon/kernels.h"

namespace bellbox {
constexpr Kernels i8mm_kernels = i8mm::table("i8mm");
}  // namespace bellbox
