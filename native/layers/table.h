// Rows of a rounded embedding as numbers, see src/bellbox/core/table.py.
#pragma once

#include <cstdint>

namespace bellbox {

struct TableRowsArgs {
    const int8_t* bytes;         // [rows, columns], or null
    const uint8_t* halves;       // [rows, columns / 2]: integer + 8, the even column in the low half
    const uint8_t* multipliers;  // [rows, groups], beside halves
    const float* scale;          // [rows]
    int64_t columns, groups;
};

// out [columns]: the integer times its multiplier is exact, times the scale is the one rounding.
inline void table_row(const TableRowsArgs& a, int64_t row, float* out) {
    const float scale = a.scale[row];
    if (a.bytes != nullptr) {
        const int8_t* const from = a.bytes + row * a.columns;
        for (int64_t i = 0; i < a.columns; ++i) out[i] = static_cast<float>(from[i]) * scale;
        return;
    }
    const uint8_t* const from = a.halves + row * (a.columns / 2);
    const int64_t group = a.columns / a.groups;
    for (int64_t g = 0; g < a.groups; ++g) {
        const float multiplier = a.multipliers[row * a.groups + g];
        for (int64_t i = g * group; i < (g + 1) * group; i += 2) {
            const int both = from[i / 2];
            out[i] = static_cast<float>((both & 15) - 8) * multiplier * scale;
            out[i + 1] = static_cast<float>((both >> 4) - 8) * multiplier * scale;
        }
    }
}

}  // namespace bellbox
