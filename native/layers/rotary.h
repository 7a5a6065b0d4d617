// Cosines and sines of rotary positions, the same bits wherever they are made: products and sums of fp64 in a fixed order,
// rounded to fp32 once. src/bellbox/ops/rotary.py is the same in torch.
#pragma once

#include <cmath>
#include <cstdint>

namespace bellbox {

// Cosine and sine of an angle from 0 to 2^20: what is left of whole quarter turns, by Taylor's series.
inline void turn_of(double angle, float& cosine, float& sine) {
    constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to a whole number
    const double n = (angle * 0.63661977236758138 + kMagic) - kMagic;
    // pi/2 in two parts, the first with so few bits that its product with n is exact
    const double r = (angle - n * 1.5707963267341256) - n * 6.0771005065061922e-11, s = r * r;
    const double even =
        1.0 + s * (-1.0 / 2 + s * (1.0 / 24 + s * (-1.0 / 720 + s * (1.0 / 40320 + s * (-1.0 / 3628800 + s * (1.0 / 479001600 + s * (-1.0 / 87178291200.0)))))));
    const double odd =
        r + r * (s * (-1.0 / 6 + s * (1.0 / 120 + s * (-1.0 / 5040 + s * (1.0 / 362880 + s * (-1.0 / 39916800 + s * (1.0 / 6227020800.0)))))));
    const int quarter = static_cast<int>(static_cast<int64_t>(n) & 3);
    const double c = quarter % 2 == 0 ? even : odd, d = quarter % 2 == 0 ? odd : even;
    cosine = static_cast<float>(quarter == 1 || quarter == 2 ? -c : c);
    sine = static_cast<float>(quarter >= 2 ? -d : d);
}

// Both [positions, head / 2].
inline void fill_rotary(double theta, int64_t head, int64_t positions, float* cosine, float* sine) {
    const int64_t half = head / 2;
    for (int64_t i = 0; i < half; ++i) {
        // Every step is rounded to fp32, as it is in the models that weights come from.
        const float exponent = static_cast<float>(2 * i) / static_cast<float>(head);
        const float frequency = 1.0f / static_cast<float>(std::pow(theta, static_cast<double>(exponent)));
        for (int64_t p = 0; p < positions; ++p) {
            const float angle = static_cast<float>(p) * frequency;
            turn_of(static_cast<double>(angle), cosine[p * half + i], sine[p * half + i]);
        }
    }
}

}  // namespace bellbox
