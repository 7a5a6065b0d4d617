// The kernels for one instruction set: neon.
#define BELLBOX_NAMESPACE neon
#include "kernels/neon/kernels.h"

namespace bellbox {
constexpr Kernels neon_kernels = neon::table("neon");
}  // namespace bellbox
