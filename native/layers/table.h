// Rows of codes as numbers: of a rounded embedding (src/bellbox/core/table.py), and of packed bytes (ops/decode_bytes.py).
#pragma once

#include <algorithm>
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

struct DecodeBytesArgs {
    const uint8_t* packed;       // [rows, ceil(columns / codes)]
    const float* values;         // [256, codes]
    const float* scale;          // [rows, groups]
    int64_t columns, codes, groups;
};

// The values of so many bytes, each of kCodes; the number is fixed so that compilers copy by vectors.
template <int kCodes>
void copy_values(const uint8_t* bytes, int64_t count, const float* values, float* out) {
    for (int64_t i = 0; i < count; ++i) std::copy_n(values + kCodes * bytes[i], kCodes, out + kCodes * i);
}

// out [columns]: the value times its scale is the one rounding.
inline void decoded_row(const DecodeBytesArgs& a, int64_t row, float* out) {
    const int64_t whole = a.columns / a.codes, left = a.columns % a.codes, group = a.columns / a.groups;
    const uint8_t* const bytes = a.packed + row * (whole + (left > 0));
    switch (a.codes) {
        case 2: copy_values<2>(bytes, whole, a.values, out); break;
        case 4: copy_values<4>(bytes, whole, a.values, out); break;
        case 5: copy_values<5>(bytes, whole, a.values, out); break;
        case 8: copy_values<8>(bytes, whole, a.values, out); break;
        default:
            for (int64_t i = 0; i < whole; ++i) std::copy_n(a.values + a.codes * bytes[i], a.codes, out + a.codes * i);
    }
    if (left > 0) std::copy_n(a.values + a.codes * bytes[whole], left, out + a.codes * whole);
    for (int64_t g = 0; g < a.groups; ++g) {
        const float scale = a.scale[row * a.groups + g];
        for (int64_t i = g * group; i < (g + 1) * group; ++i) out[i] *= scale;
    }
}

}  // namespace bellbox
