// The derivative of the bell curve in fp32, for vectors of any width.
#pragma once

#include "kernels/inline.h"

namespace bellbox {
namespace {  // each instruction set keeps its own copy: a shared inline function could be any of them

// e^(-v^2/2), relative error below 2e-7 down to 2^-126, then 0; NaN stays NaN. y = v^2 is held as square + rest, exact
// (rounding it alone would cost 5e-6 at large v), and -y/2 = n ln 2 - z/2 with |z| <= ln 2. The polynomial for
// e^(-z/2) is a minimax fit made for this (reweighted least squares, error 4e-9).
//
// V: `Floats`, a vector that adds, subtracts and multiplies lane by lane, and what no operator does.
template <typename V, typename Floats = typename V::Floats>
BELLBOX_INLINE Floats bell(Floats v) {
    v = V::smaller(V::all(13.27f), V::magnitude(v));  // there n is -127, and 2^n comes out as 0
    const Floats square = v * v, rest = V::fmsub(v, v, square);
    // n + 127 in the lowest bits of `shifted`, from where it moves into the exponent.
    const Floats magic = V::all(12582912.0f + 127);
    const Floats shifted = V::fmadd(square, V::all(-0.72134752f), magic);
    const Floats power = V::to_exponent(shifted);
    const Floats n = shifted - magic;
    // 2 ln 2 in two parts, the first of 12 bits: n times it is exact.
    const Floats high = V::fmadd(n, V::all(1.38623046875f), square);
    const Floats z = high + V::fmadd(n, V::all(6.389237e-05f), rest);
    const Floats z2 = z * z;  // Estrin's order: the chain of additions is what takes time here
    const Floats a = V::fmadd(z, V::all(-0.5f), V::all(1));
    const Floats b = V::fmadd(z, V::all(-0.020833148f), V::all(0.124999985f));
    const Floats c = V::fmadd(z, V::all(-0.00026153325f), V::all(0.0026042764f));
    const Floats tail = V::fmadd(z2, V::all(2.1584188e-05f), c);
    return V::fmadd(z2, V::fmadd(z2, tail, b), a) * power;
}

}  // namespace
}  // namespace bellbox
