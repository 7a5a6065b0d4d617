// Which of the products with AVX2 serves.
#pragma once

#include "kernels/avx2/binary.h"
#include "kernels/avx2/linear.h"
#include "kernels/avx2/lookup.h"

namespace bellbox {
namespace {
namespace avx2 {

constexpr int64_t kFewCodes = 4;        // rows of 2-bit weights that are left to vpmaddubsw (measured)

inline bool looks_up_codes(const LinearArgs& a, int64_t rows) {
    return a.weights->bits == 2 && a.act_n <= 4 && rows > kFewCodes;
}

inline bool counts(const LinearArgs& a, int64_t rows) { return binary::serves(a) || looks_up_codes(a, rows); }

inline void linear(const LinearArgs& a, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end) {
    const int64_t rows = m_end - m_begin;
    if (rows <= 0) return;
    if (binary::serves(a) && rows <= binary::kRows) return binary::linear(a, m_begin, rows, tile_begin, tile_end);
    if (binary::serves(a)) return lookup::linear<lookup::OneBit>(a, m_begin, m_end, tile_begin, tile_end);
    if (looks_up_codes(a, rows)) return lookup::linear<lookup::TwoBits>(a, m_begin, m_end, tile_begin, tile_end);
    switch (a.weights->bits) {
        case 1: return product::linear<1>(a, m_begin, m_end, tile_begin, tile_end);
        case 2: return product::linear<2>(a, m_begin, m_end, tile_begin, tile_end);
        case 3: return product::linear<3>(a, m_begin, m_end, tile_begin, tile_end);
        default: return product::linear<4>(a, m_begin, m_end, tile_begin, tile_end);
    }
}

}  // namespace avx2
}  // namespace
}  // namespace bellbox
