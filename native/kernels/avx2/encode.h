// Quantizing rows with AVX2 and FMA. Floor: about 32 operations for 8 columns at 16 levels, 10 cycles at three a cycle.
#pragma once

#include <immintrin.h>

#include "kernels/avx2/codes.h"

namespace bellbox {
namespace {
namespace avx2 {
namespace rows {

template <Type T, bool FIXED, typename Coder>
inline void encode_rows(const EncodeArgs& a, const Coder shared, const Rotation& rotation, int64_t begin, int64_t end) {
    const Coder coder = shared;  // a copy of its own: stores of bytes could change one that others see
    const int64_t k = a.k, written = (k + 63) / 64 * 64;
    for (int64_t i = begin; i < end; ++i) {
        const void* x = element<T>(a.x, i * a.ldx);
        int8_t* levels = a.levels + i * a.ldl;
        const double sigma = FIXED || a.r != nullptr              ? 0
                             : a.normalise == Normalise::absmax ? row_absmax<T>(x, k)
                                                                : rms(row_norm<T>(x, k), k);
        const RowScale scale = row_scale(sigma, a, i);
        a.row_scales[i] = scale.row_scale;
        const __m256 factor = _mm256_set1_ps(scale.r);
        __m256 squares = _mm256_setzero_ps();
        __m256i sums = _mm256_setzero_si256();
        rotation.begin<T, FIXED>(x, squares);
        for (int64_t j = 0; j < k; j += kChunk) {
            const float* p = rotation.chunk<T, FIXED>(x, j, squares);
            alignas(32) int8_t copy[kChunk];
            int8_t* out = k - j >= kChunk ? levels + j : copy;
            for (int l = 0; l < kChunk; l += 32) {
                __m256 v[4];
                BELLBOX_UNROLL
                for (int h = 0; h < 4; ++h) v[h] = _mm256_mul_ps(_mm256_load_ps(p + l + 8 * h), factor);
                __m256i bytes = coder.levels(v[0], v[1], v[2], v[3]);
                if (k - j - l < 32) {  // what is beyond the end is 0
                    alignas(32) int8_t cut[32] = {};
                    alignas(32) int8_t all[32];
                    _mm256_store_si256(reinterpret_cast<__m256i*>(all), bytes);
                    for (int64_t c = 0; c < k - j - l; ++c) cut[c] = all[c];
                    bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(cut));
                }
                const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
                sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + l), bytes);
            }
            if (out == copy) memcpy(levels + j, copy, static_cast<size_t>(written - j));
        }
        alignas(32) int32_t lanes[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums);
        a.sums[i] = 0;
        for (int l = 0; l < 8; ++l) a.sums[i] += lanes[l];
        if (FIXED) {
            // A sum of squares that fits fp32 is far below the ceiling; others need it for their inverse scale.
            alignas(32) float flags[8];
            _mm256_store_ps(flags, squares);
            bool fine = true;
            for (int l = 0; l < 8; ++l) fine = fine && flags[l] < 3e38f;
            if (!fine) a.row_scales[i] = row_scale(rms(row_norm<T>(x, k), k), a, i).row_scale;
        }
        if (written < a.ldl) memset(levels + written, 0, static_cast<size_t>(a.ldl - written));
    }
}

}  // namespace rows

inline void encode(const EncodeArgs& a, int64_t begin, int64_t end) {
    const bool whole = a.block > rows::kChunk;
    const Scratch scratch(whole ? a.k : rows::kChunk);
    const rows::Rotation rotation{a.k, a.block, whole, scratch.data};
    rows::with_coder(a.thresholds, a.n, a.multiplier, a.shift, [&](const auto& coder) {
        const bool fixed = a.normalise == Normalise::fixed && a.r == nullptr;
        if (kAllTypes && a.x_type == Type::kept)  // which comes with r
            rows::encode_rows<Type::kept, false>(a, coder, rotation, begin, end);
        else if ((!kAllTypes || a.x_type == Type::f32) && fixed)
            rows::encode_rows<Type::f32, true>(a, coder, rotation, begin, end);
        else if (!kAllTypes || a.x_type == Type::f32)
            rows::encode_rows<Type::f32, false>(a, coder, rotation, begin, end);
        else if (fixed)
            rows::encode_rows<Type::bf16, true>(a, coder, rotation, begin, end);
        else
            rows::encode_rows<Type::bf16, false>(a, coder, rotation, begin, end);
    });
}

}  // namespace avx2
}  // namespace
}  // namespace bellbox
