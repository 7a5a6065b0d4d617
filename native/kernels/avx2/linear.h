// The integer product with AVX2.
//
// vpmaddubsw multiplies weight codes (8 outputs x 4 inputs, unsigned) by four broadcast activation levels and adds
// pairs to 16 bits; the 16-bit sums of many inputs are added up before vpmaddwd by ones widens them to 32 bits.
// That is exact while it cannot overflow: a pair is at most 2 (2^bits - 1) |level|, and kRun<bits> blocks of 16 groups
// are added up, so 32768 > kRun * 32 * (2^bits - 1) * |level| has to hold. With kRun = 32 >> bits it does for
// |level| <= 34 (4 bits), 36, 42, 64 (1 bit); EncodeArgs has at most 16 levels, which are within +-15 (30 where
// somebody doubled them without a shift). vpmaddubsw itself would saturate above 2 * 15 * |level| = 32767 only.
//
//   some    up to 4 rows: weights stay packed, fields are shifted down in registers.
//   many    codes of 16 outputs x 1024 inputs are unpacked once to 16 KB and serve all rows, 4 at a time.
// Floor of both: two vector operations for 32 products.
#pragma once

#include <immintrin.h>

#include "kernels/inline.h"
#include "kernels/layout.h"
#include "kernels/portable/linear.h"

namespace bellbox {
namespace {
namespace avx2 {
namespace product {

constexpr int64_t kAhead = 8192;        // bytes of packed weights fetched ahead of use (measured on Zen 3)
constexpr int kRows = 4;                // registers: 8 sums, 2 weights, 1 activation, 1 product
constexpr int64_t kDepth = 16;          // blocks of 64 inputs in the unpacked tile: 16 KB
constexpr int64_t kRowBlock = 512;      // rows that share an unpacked tile; their sums take 32 KB

template <int BITS>
constexpr int64_t kRun = 32 >> BITS;    // blocks added up in 16 bits

// Addresses alone: they may lie past the end.
BELLBOX_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

BELLBOX_INLINE __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
BELLBOX_INLINE void store32(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }

// Outputs 8 * half and on of the vector(s) that hold groups j, j + vectors, j + 2 vectors, ... of a block.
struct Packed {
    __m256i low, high;                  // high: only for 3 bits
};

template <int BITS>
BELLBOX_INLINE Packed load_packed(const uint8_t* block, int j, int half) {
    Packed p;
    p.low = load32(block + 64 * j + 32 * half);
    p.high = BITS == 3 ? load32(block + 256 + 64 * (j & 1) + 32 * half) : p.low;
    return p;
}

BELLBOX_INLINE __m256i shift_right(__m256i x, int count) {  // negative: left; bits that cross bytes are masked away
    return count > 0 ? _mm256_srli_epi16(x, count) : count < 0 ? _mm256_slli_epi16(x, -count) : x;
}

// The codes of group f * vectors + j.
template <int BITS>
BELLBOX_INLINE __m256i codes(Packed p, int f, int j) {
    using L = Layout<BITS>;
    const __m256i low = _mm256_and_si256(shift_right(p.low, f * L::width),
                                         _mm256_set1_epi8(static_cast<char>((1 << L::width) - 1)));
    if (BITS != 3) return low;
    // Group 4f + j is group 2 (2f + j/2) + j%2 of the high plane: bit 2f + j/2, wanted at bit 2.
    return _mm256_or_si256(low, _mm256_and_si256(shift_right(p.high, 2 * f + j / 2 - 2), _mm256_set1_epi8(4)));
}

BELLBOX_INLINE __m256i broadcast4(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return _mm256_set1_epi32(word);
}

// Adds products to 16-bit pairs. The empty statement keeps the compiler from regrouping the additions of several
// steps (a + b) + (c + d): that needs more registers than there are, and cost a third of the speed.
BELLBOX_INLINE void accumulate(__m256i& pairs, __m256i code, __m256i x) {
    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(code, x));
    __asm__("" : "+x"(pairs));
}

// Adds the 16-bit pairs to eight sums in memory.
BELLBOX_INLINE void widen(__m256i pairs, int32_t* sums) {
    const __m256i wide = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    store32(sums, _mm256_add_epi32(load32(sums), wide));
}

// The way of sixteen sums to the output: exact integer, then three roundings. What belongs to the columns is held.
struct Epilogue {
    __m256 scale[2], bias[2];
    int64_t column, width;

    BELLBOX_INLINE Epilogue(const LinearArgs& a, int64_t tile) : column(16 * tile) {
        const Weights& w = *a.weights;
        width = smaller(16, w.n - column);
        alignas(32) float scales[16] = {}, biases[16] = {};
        std::memcpy(scales, w.scale + column, static_cast<size_t>(width) * 4);
        if (w.bias != nullptr) std::memcpy(biases, w.bias + column, static_cast<size_t>(width) * 4);
        for (int h = 0; h < 2; ++h) {
            scale[h] = _mm256_mul_ps(_mm256_load_ps(scales + 8 * h), _mm256_set1_ps(a.act_scale));
            bias[h] = _mm256_load_ps(biases + 8 * h);
        }
    }

    BELLBOX_INLINE __m256 value(const LinearArgs& a, int64_t row, const int32_t* sums, int h) const {
        const Weights& w = *a.weights;
        const __m256i product = _mm256_mullo_epi32(load32(sums + 8 * h), _mm256_set1_epi32(w.multiplier));
        return rounded(a, row, _mm256_sub_epi32(product, _mm256_set1_epi32(w.shift * a.sums[row])), h);
    }

    BELLBOX_INLINE __m256 rounded(const LinearArgs& a, int64_t row, __m256i exact, int h) const {
        const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(exact), scale[h]);
        const __m256 y = _mm256_mul_ps(scaled, _mm256_set1_ps(a.row_scales[row]));
        return a.weights->bias != nullptr ? _mm256_add_ps(y, bias[h]) : y;  // not always: -0 + 0 is another zero
    }

    static BELLBOX_INLINE __m256i to_bf16(__m256 y) {              // to nearest even, NaN stays NaN; in 32 bits each
        const __m256i bits = _mm256_castps_si256(y), high = _mm256_srli_epi32(bits, 16);
        const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
        const __m256i half_up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        const __m256i even = _mm256_srli_epi32(_mm256_add_epi32(bits, half_up), 16);
        const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
        return _mm256_blendv_epi8(even, quiet, _mm256_castps_si256(_mm256_cmp_ps(y, y, _CMP_UNORD_Q)));
    }

    BELLBOX_INLINE void operator()(const LinearArgs& a, int64_t row, const int32_t* sums) const {
        store(a, row, value(a, row, sums, 0), value(a, row, sums, 1));
    }

    BELLBOX_INLINE void store(const LinearArgs& a, int64_t row, __m256 y0, __m256 y1) const {
        const bool f32 = a.out_type == Type::f32;
        const size_t size = f32 ? 4 : 2;
        char* const out = static_cast<char*>(a.out) + static_cast<size_t>(row * a.ldo + column) * size;
        alignas(32) char some[64];
        char* const to = width == 16 ? out : some;
        if (f32) {
            _mm256_storeu_ps(reinterpret_cast<float*>(to), y0);
            _mm256_storeu_ps(reinterpret_cast<float*>(to) + 8, y1);
        } else {
            store32(to, _mm256_permute4x64_epi64(_mm256_packus_epi32(to_bf16(y0), to_bf16(y1)), 0xd8));
        }
        if (width < 16) std::memcpy(out, some, static_cast<size_t>(width) * size);
    }
};

// --------------------------------------------------------------------------------------------------------- some rows

template <int BITS, int ROWS>
void some(const LinearArgs& a, int64_t row, int64_t tile) {
    using L = Layout<BITS>;
    const int64_t blocks = (a.weights->k + 63) / 64;
    const int8_t* levels = a.levels + row * a.ldl;
    const uint8_t* block = a.weights->data + tile * blocks * L::bytes;
    alignas(32) int32_t sums[ROWS][16] = {};
    for (int64_t begin = 0; begin < blocks; begin += kRun<BITS>) {
        const int64_t end = smaller(begin + kRun<BITS>, blocks);
        __m256i acc[ROWS][2];
        BELLBOX_UNROLL
        for (int r = 0; r < ROWS; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
        for (int64_t b = begin; b < end; ++b, block += L::bytes) {
            BELLBOX_UNROLL
            for (int line = 0; line < L::bytes; line += 64) prefetch(block + kAhead + line);
            BELLBOX_UNROLL
            for (int j = 0; j < L::vectors; ++j) {
                const Packed low = load_packed<BITS>(block, j, 0), high = load_packed<BITS>(block, j, 1);
                BELLBOX_UNROLL
                for (int f = 0; f < L::fields; ++f) {
                    const __m256i code0 = codes<BITS>(low, f, j), code1 = codes<BITS>(high, f, j);
                    BELLBOX_UNROLL
                    for (int r = 0; r < ROWS; ++r) {
                        const __m256i x = broadcast4(levels + r * a.ldl + 64 * b + 4 * (f * L::vectors + j));
                        accumulate(acc[r][0], code0, x);
                        accumulate(acc[r][1], code1, x);
                    }
                }
            }
        }
        BELLBOX_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            widen(acc[r][0], sums[r]);
            widen(acc[r][1], sums[r] + 8);
        }
    }
    const Epilogue epilogue(a, tile);
    for (int r = 0; r < ROWS; ++r) epilogue(a, row + r, sums[r]);
}

// --------------------------------------------------------------------------------------------------------- many rows

template <int BITS>
void unpack(const uint8_t* block, int64_t blocks, uint8_t* out) {
    using L = Layout<BITS>;
    for (int64_t b = 0; b < blocks; ++b, block += L::bytes, out += 1024) {
        BELLBOX_UNROLL
        for (int j = 0; j < L::vectors; ++j) {
            BELLBOX_UNROLL
            for (int half = 0; half < 2; ++half) {
                const Packed p = load_packed<BITS>(block, j, half);
                BELLBOX_UNROLL
                for (int f = 0; f < L::fields; ++f)
                    store32(out + 64 * (f * L::vectors + j) + 32 * half, codes<BITS>(p, f, j));
            }
        }
    }
}

// Sums of ROWS rows and 16 outputs over `blocks` unpacked blocks, `run` of them at a time in 16 bits.
template <int ROWS>
void multiply(const int8_t* levels, int64_t ldl, const uint8_t* codes, int64_t blocks, int64_t run, int32_t* sums) {
    for (int64_t begin = 0; begin < blocks; begin += run) {
        const int8_t* const end = levels + 64 * smaller(run, blocks - begin);
        __m256i acc[ROWS][2];
        BELLBOX_UNROLL
        for (int r = 0; r < ROWS; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
        for (; levels < end; levels += 16) {
            BELLBOX_UNROLL
            for (int g = 0; g < 4; ++g, codes += 64) {
                const __m256i code0 = load32(codes), code1 = load32(codes + 32);
                BELLBOX_UNROLL
                for (int r = 0; r < ROWS; ++r) {
                    const __m256i x = broadcast4(levels + r * ldl + 4 * g);
                    accumulate(acc[r][0], code0, x);
                    accumulate(acc[r][1], code1, x);
                }
            }
        }
        BELLBOX_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            widen(acc[r][0], sums + 16 * r);
            widen(acc[r][1], sums + 16 * r + 8);
        }
    }
}

template <int BITS>
void many(const LinearArgs& a, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end) {
    using L = Layout<BITS>;
    const int64_t blocks = (a.weights->k + 63) / 64, pieces = (blocks + kDepth - 1) / kDepth;
    const int64_t rounds = (m_end - m_begin + kRowBlock - 1) / kRowBlock;
    alignas(64) uint8_t codes[kDepth * 1024];
    alignas(64) int32_t sums[kRowBlock * 16];
    for (int64_t round = 0; round < rounds; ++round) {
        const int64_t begin = m_begin + (m_end - m_begin) * round / rounds;
        const int64_t end = m_begin + (m_end - m_begin) * (round + 1) / rounds;
        for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
            const uint8_t* data = a.weights->data + tile * blocks * L::bytes;
            std::memset(sums, 0, static_cast<size_t>(end - begin) * 64);
            for (int64_t i = 0; i < pieces; ++i) {
                const int64_t from = blocks * i / pieces, size = blocks * (i + 1) / pieces - from;
                unpack<BITS>(data + from * L::bytes, size, codes);
                const int8_t* levels = a.levels + begin * a.ldl + 64 * from;
                int64_t row = 0;
                for (; row + kRows <= end - begin; row += kRows)
                    multiply<kRows>(levels + row * a.ldl, a.ldl, codes, size, kRun<BITS>, sums + 16 * row);
                levels += row * a.ldl;
                switch (end - begin - row) {
                    case 1: multiply<1>(levels, a.ldl, codes, size, kRun<BITS>, sums + 16 * row); break;
                    case 2: multiply<2>(levels, a.ldl, codes, size, kRun<BITS>, sums + 16 * row); break;
                    case 3: multiply<3>(levels, a.ldl, codes, size, kRun<BITS>, sums + 16 * row); break;
                    default: break;
                }
            }
            const Epilogue epilogue(a, tile);
            for (int64_t r = 0; r < end - begin; ++r) epilogue(a, begin + r, sums + 16 * r);
        }
    }
}

template <int BITS>
void linear(const LinearArgs& a, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end) {
    const int64_t rows = m_end - m_begin;
    if (rows <= 0) return;
    if (rows > 4) return many<BITS>(a, m_begin, m_end, tile_begin, tile_end);
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) switch (rows) {
            case 1: some<BITS, 1>(a, m_begin, tile); break;
            case 2: some<BITS, 2>(a, m_begin, tile); break;
            case 3: some<BITS, 3>(a, m_begin, tile); break;
            default: some<BITS, 4>(a, m_begin, tile); break;
        }
}

}  // namespace product

}  // namespace avx2
}  // namespace
}  // namespace bellbox
