// The levels of a grid as the integers that kernels multiply (docs/format.md).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

namespace bellbox {

// code - n/2 - zero point, n levels, as multiplier * code - shift over multiplier.
struct Grid {
    int32_t levels = 0, multiplier = 0, shift = 0;

    // False where the zero point is no multiple of 1/2, or out of range.
    bool set(int32_t n, double zero_point) {
        const double twice = n + 2 * zero_point;
        if (!(twice >= -512 && twice <= 512) || twice != static_cast<double>(static_cast<int32_t>(twice))) return false;
        const int32_t whole = static_cast<int32_t>(twice);
        levels = n, multiplier = whole % 2 == 0 ? 1 : 2, shift = whole * multiplier / 2;
        return true;
    }
    int32_t largest() const { return std::max(std::abs(shift), std::abs(multiplier * (levels - 1) - shift)); }
};

}  // namespace bellbox
