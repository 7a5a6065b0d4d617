// Stored rows of codes to one byte a code (docs/format.md, bytes of a row).
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "runtime/error.h"

namespace bellbox {

inline int digits_of_byte(int32_t levels) { return levels == 3 ? 5 : levels == 5 || levels == 6 ? 3 : 0; }
inline int width_of(int32_t levels) { return levels <= 2 ? 1 : levels <= 4 ? 2 : levels <= 8 ? 3 : 4; }

inline int64_t stored_bytes(int64_t columns, int32_t levels) {
    const int digits = digits_of_byte(levels);
    return digits > 0 ? (columns + digits - 1) / digits : (columns * width_of(levels) + 7) / 8;
}

// One row; false where a byte stands for no code.
inline bool unpack_row(const uint8_t* row, int64_t columns, int32_t levels, uint8_t* codes) {
    const int digits = digits_of_byte(levels), width = width_of(levels);
    bool all = true;
    if (digits > 0) {
        int32_t most = 1;
        for (int i = 0; i < digits; ++i) most *= levels;
        for (int64_t i = 0; i < columns; i += digits) {
            int32_t byte = row[i / digits];
            all &= byte < most;
            for (int64_t j = i; j < i + digits && j < columns; ++j) codes[j] = static_cast<uint8_t>(byte % levels), byte /= levels;
        }
        return all;
    }
    for (int64_t i = 0; i < columns; ++i) {
        const int64_t bit = i * width;
        const int low = row[bit / 8], high = bit % 8 + width > 8 ? row[bit / 8 + 1] : 0;
        codes[i] = static_cast<uint8_t>((low | high << 8) >> (bit % 8) & ((1 << width) - 1));
        all &= codes[i] < levels;
    }
    return all;
}

// One row of bit planes, the highest bits first; false where bits lie beyond its end.
inline bool unpack_planes(const std::vector<const uint8_t*>& planes, int64_t row, int64_t columns, uint8_t* codes) {
    const int64_t bytes = (columns + 7) / 8;
    const int unused = static_cast<int>(8 * bytes - columns);
    uint8_t last[8];
    bool all = true;
    for (int64_t i = 0; i < bytes; ++i) {
        uint8_t* const to = i + 1 < bytes ? codes + 8 * i : last;
        for (int j = 0; j < 8; ++j) to[j] = 0;
        for (const uint8_t* plane : planes) {
            const int byte = plane[row * bytes + i];
            for (int j = 0; j < 8; ++j) to[j] = static_cast<uint8_t>(to[j] << 1 | (byte >> j & 1));
            all &= i + 1 < bytes || byte >> (8 - unused) == 0;
        }
    }
    std::memcpy(codes + 8 * (bytes - 1), last, static_cast<size_t>(8 - unused));
    return all;
}

}  // namespace bellbox
