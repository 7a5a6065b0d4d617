// The products of one instruction set: i8mm, of processors with int8 matrix products.
#define BELLBOX_NAMESPACE i8mm
#include "kernels/neon/products.h"

namespace bellbox {
constexpr Products i8mm_products = i8mm::products();
}  // namespace bellbox
