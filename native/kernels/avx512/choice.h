// Which of the products with AVX-512 serves.
#pragma once

#include "kernels/avx512/binary.h"
#include "kernels/avx512/linear.h"
#include "kernels/avx512/lookup.h"

namespace bellbox {
namespace {
namespace avx512 {

inline bool counts(const LinearArgs& a, int64_t rows) { return binary::serves(a) || lookup::serves(a, rows); }

inline void linear(const LinearArgs& a, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end) {
    if (binary::serves(a)) return binary::linear(a, m_begin, m_end, tile_begin, tile_end);
    if (lookup::serves(a, m_end - m_begin)) return lookup::linear(a, m_begin, m_end, tile_begin, tile_end);
    switch (a.weights->bits) {
        case 1: return product::linear<1>(a, m_begin, m_end, tile_begin, tile_end);
        case 2: return product::linear<2>(a, m_begin, m_end, tile_begin, tile_end);
        case 3: return product::linear<3>(a, m_begin, m_end, tile_begin, tile_end);
        default: return product::linear<4>(a, m_begin, m_end, tile_begin, tile_end);
    }
}

}  // namespace avx512
}  // namespace
}  // namespace bellbox
