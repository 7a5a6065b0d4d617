// How kernels are written: what is part of its caller's loop, and which loops go.
#pragma once

#define BELLBOX_INLINE inline __attribute__((always_inline))
#define BELLBOX_UNROLL _Pragma("GCC unroll 16")
#define BELLBOX_STEP(...) [&](__VA_ARGS__) __attribute__((always_inline))  // a lambda that is part of its caller's loop
