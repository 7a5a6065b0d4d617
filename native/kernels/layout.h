// How the codes of a block lie, for products with vectors.
#pragma once

#include "kernels/kernels.h"

namespace bellbox {
namespace {  // each instruction set keeps its own copy: a shared inline function could be any of them

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// How the fields of a block of 16 outputs x 64 inputs lie. 3 bits go by the vectors of their low plane.
template <int BITS>
struct Layout {
    static constexpr int width = BITS == 3 ? 2 : BITS;
    static constexpr int vectors = 2 * width;
    static constexpr int fields = 8 / width;
    static constexpr int bytes = 128 * BITS;
};

}  // namespace
}  // namespace bellbox
