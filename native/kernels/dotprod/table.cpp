// The products of one instruction set: dotprod, of processors with dot products.
#define BELLBOX_NAMESPACE dotprod
#include "kernels/neon/products.h"

namespace bellbox {
constexpr Products dotprod_products = dotprod::products();
}  // namespace bellbox
