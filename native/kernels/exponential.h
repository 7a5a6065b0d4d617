// The exponential of registers of floats, and loops over them. Each lane is products and sums in a fixed order, none fused:
// one function on every instruction set, whichever lane a number lies in.
#pragma once

#include <cstring>

#include "kernels/float_linear.h"
#include "kernels/inline.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {

typedef int32_t LaneBits __attribute__((vector_size(kPart * sizeof(int32_t))));

BELLBOX_INLINE Lanes all_lanes(float value) { return value - Lanes{}; }  // a sum would lose the sign of zero
BELLBOX_INLINE Lanes where(LaneBits mask, Lanes yes, Lanes no) {
    return reinterpret_cast<Lanes>((reinterpret_cast<LaneBits>(yes) & mask) | (reinterpret_cast<LaneBits>(no) & ~mask));
}

// e^x for x <= 0, to about one unit in the last place: 2^n times the Taylor polynomial of the rest. NaN stays.
BELLBOX_INLINE Lanes exp_of(Lanes x) {
    x = where(x < all_lanes(-87.0f), all_lanes(-87.0f), x);
    const Lanes magic = all_lanes(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, in the low bits
    const Lanes shifted = x * all_lanes(1.44269504f) + magic, n = shifted - magic;
    const Lanes r = (x - n * all_lanes(0.693359375f)) + n * all_lanes(2.12194440e-4f);
    Lanes p = all_lanes(1.0f / 5040.0f);
    p = p * r + all_lanes(1.0f / 720.0f);
    p = p * r + all_lanes(1.0f / 120.0f);
    p = p * r + all_lanes(1.0f / 24.0f);
    p = p * r + all_lanes(1.0f / 6.0f);
    p = p * r + all_lanes(0.5f);
    p = p * r + all_lanes(1.0f);
    p = p * r + all_lanes(1.0f);
    const LaneBits power = (reinterpret_cast<LaneBits>(shifted) << 23) + (127 << 23);
    return p * reinterpret_cast<Lanes>(power);
}

// out[i] = f(x[i]) for i in [begin, end), a register at a time; the last few in a register with zeros.
template <typename F>
BELLBOX_INLINE void map_lanes(const float* x, float* out, int64_t begin, int64_t end, const F& f) {
    int64_t i = begin;
    for (; i + kPart <= end; i += kPart) {
        const Lanes y = f(load_lanes(x + i));
        std::memcpy(out + i, &y, sizeof(y));
    }
    if (i == end) return;
    const size_t left = static_cast<size_t>(end - i) * sizeof(float);
    float room[kPart] = {};
    std::memcpy(room, x + i, left);
    const Lanes y = f(load_lanes(room));
    std::memcpy(out + i, &y, left);
}

}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
