// Heads of 4 bits by groups of columns, in plain C++: what the other instruction sets are held against.
#pragma once

#include "kernels/kernels.h"

namespace bellbox {
namespace {
namespace portable {

inline void int4_linear(const Int4LinearArgs& a, int64_t begin, int64_t end) {
    const int64_t chunks = (a.k + 127) / 128;
    for (int64_t n = begin; n < end; ++n) {
        const uint8_t* weight = a.weight + n * (a.k / 2);
        const uint8_t* multipliers = a.multipliers + n * (a.k / a.group);
        for (int64_t m = 0; m < a.m; ++m) {
            const int8_t* x = a.x + m * chunks * 128;
            int32_t total = 0;
            for (int64_t column = 0; column < a.k; column += a.group) {
                const int64_t first = column / 2 % 64;  // bytes of a group lie in one chunk
                const int8_t *even = x + column / 128 * 128 + first, *odd = even + 64;
                const uint8_t* bytes = weight + column / 2;
                int32_t sum = 0;
                for (int64_t i = 0; i < a.group / 2; i += 16)  // a fixed length, so that compilers take vectors
                    for (int64_t j = i; j < i + 16; ++j) {
                        const int16_t first = static_cast<int16_t>((bytes[j] & 15) - 8), second = static_cast<int16_t>((bytes[j] >> 4) - 8);
                        sum += first * static_cast<int16_t>(even[j]) + second * static_cast<int16_t>(odd[j]);
                    }
                total += multipliers[column / a.group] * sum;
            }
            a.out[m * a.n + n] = static_cast<float>(total) * (a.scale[n] * a.x_scale[m]);
        }
    }
}

}  // namespace portable
}  // namespace
}  // namespace bellbox
