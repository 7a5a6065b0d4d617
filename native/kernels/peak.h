// The most multiply-adds of small integers that this instruction set does, operands in registers: a floor for benchmarks.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef __ARM_FEATURE_DOTPROD
#include <arm_neon.h>
#endif

#include "kernels/kernels.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {

#if defined(__AVX512VNNI__)
using Vector = __m512i;
inline Vector ones() { return _mm512_set1_epi8(1); }
inline Vector step(Vector sum, Vector a, Vector b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVX2__)
using Vector = __m256i;
inline Vector ones() { return _mm256_set1_epi8(1); }
inline Vector step(Vector sum, Vector a, Vector b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
#elif defined(__ARM_FEATURE_MATMUL_INT8)
using Vector = int32x4_t;
inline Vector ones() { return vreinterpretq_s32_s8(vdupq_n_s8(1)); }
inline Vector step(Vector sum, Vector a, Vector b) { return vmmlaq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)); }
#elif defined(__ARM_FEATURE_DOTPROD)
using Vector = int32x4_t;
inline Vector ones() { return vreinterpretq_s32_s8(vdupq_n_s8(1)); }
inline Vector step(Vector sum, Vector a, Vector b) { return vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)); }
#else
using Vector = int32_t __attribute__((vector_size(16)));
inline Vector ones() { return Vector{1, 1, 1, 1}; }
inline Vector step(Vector sum, Vector a, Vector b) { return sum + a * b; }
#endif

#if defined(__AVX512F__)
#define BELLBOX_ANY_REGISTER(x) "+v"(x)
#elif defined(__SSE2__)
#define BELLBOX_ANY_REGISTER(x) "+x"(x)
#elif defined(__aarch64__)
#define BELLBOX_ANY_REGISTER(x) "+w"(x)
#else
#define BELLBOX_ANY_REGISTER(x) "+m"(x)
#endif

// Twelve chains of `rounds` steps each. Returns how many multiply-adds that was.
inline int64_t integer_peak(int64_t rounds) {
    constexpr int kChains = 12;
    Vector sums[kChains] = {};
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) asm volatile("" : BELLBOX_ANY_REGISTER(sums[c]));  // chains of their own, not one
    Vector a = ones(), b = ones();
    for (int64_t i = 0; i < rounds; ++i) {
        asm volatile("" : BELLBOX_ANY_REGISTER(a), BELLBOX_ANY_REGISTER(b));  // as if changed: nothing leaves the loop
#pragma GCC unroll 12
        for (int c = 0; c < kChains; ++c) sums[c] = step(sums[c], a, b);
    }
    Vector total = sums[0];
    for (int c = 1; c < kChains; ++c) total += sums[c];
    asm volatile("" : : "m"(total));
#if defined(__ARM_FEATURE_MATMUL_INT8)
    constexpr int64_t products = 2 * sizeof(Vector);
#elif defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
    constexpr int64_t products = sizeof(Vector);
#else
    constexpr int64_t products = sizeof(Vector) / 4;
#endif
    return rounds * kChains * products;
}

}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
