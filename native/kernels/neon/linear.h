// The integer product with NEON.
//
// A vector of weights is four outputs x four inputs, so SDOT with four levels out of a lane is sixteen products of four
// outputs: no broadcast, no horizontal sums. Without SDOT, SMLAL adds products to 16 bits, and pairs are added up later: exact
// while kRun<bits> blocks of 16 groups hold, 32768 > kRun * 16 * (2^bits - 1) * |level|. With kRun = 64 >> bits it does for
// |level| <= 34 (4 bits), 36, 42, 64 (1 bit); EncodeArgs has at most 16 levels, within +-15 (30 where somebody doubled them
// without a shift).
//
//   some    up to kSome rows: weights stay packed, fields are shifted down in registers. One row with SDOT: fields are left
//           where they are, and what differs in worth has sums of its own, shifted at the end.
//   many    codes of 16 outputs x 1024 inputs are unpacked once to 16 KB and serve all rows, kRows at a time. With SMMLA
//           (i8mm) two groups of four inputs lie side by side, and an instruction is two rows x two outputs x eight inputs.
// Floor: one instruction for 8 products (SMLAL), 16 (SDOT) or 32 (SMMLA).
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "kernels/inline.h"
#include "kernels/layout.h"
#include "kernels/neon/rows.h"
#include "kernels/portable/linear.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {
namespace product {

#ifdef __ARM_FEATURE_DOTPROD
constexpr bool kDots = true;
constexpr int kSome = 4, kRows = 4;     // registers: 4 sums a row, 4 of levels, 8 of weights
#else
constexpr bool kDots = false;
constexpr int kSome = 2, kRows = 2;     // registers: 8 sums a row, 4 of levels, 4 of weights
#endif
constexpr int64_t kAhead = 2048;        // bytes of packed weights fetched ahead of use
constexpr int64_t kDepth = 16;          // blocks of 64 inputs in the unpacked tile: 16 KB
constexpr int64_t kRowBlock = 512;      // rows that share an unpacked tile; their sums take 32 KB

// Blocks that are added up before sums go to 32 bits, or to memory.
template <int BITS>
constexpr int64_t kRun = kDots ? INT64_MAX / 2 : 64 >> BITS;

BELLBOX_INLINE int32x4_t turned(int8x16_t levels, int lane) {  // four levels to all lanes
    const int32x4_t words = vreinterpretq_s32_s8(levels);
    switch (lane) {
        case 0: return vdupq_laneq_s32(words, 0);
        case 1: return vdupq_laneq_s32(words, 1);
        case 2: return vdupq_laneq_s32(words, 2);
        default: return vdupq_laneq_s32(words, 3);
    }
}

// Sums of four outputs.
#ifdef __ARM_FEATURE_DOTPROD
struct Four {
    int32x4_t of = vdupq_n_s32(0);
    BELLBOX_INLINE void add(int8x16_t codes, int8x16_t levels, int lane) {
        switch (lane) {  // a constant once loops are unrolled
            case 0: of = vdotq_laneq_s32(of, codes, levels, 0); break;
            case 1: of = vdotq_laneq_s32(of, codes, levels, 1); break;
            case 2: of = vdotq_laneq_s32(of, codes, levels, 2); break;
            default: of = vdotq_laneq_s32(of, codes, levels, 3); break;
        }
    }
    BELLBOX_INLINE int32x4_t total() const { return of; }
};
#else
struct Four {
    int16x8_t of[2] = {vdupq_n_s16(0), vdupq_n_s16(0)};
    BELLBOX_INLINE void add(int8x16_t codes, int8x16_t levels, int lane) {
        const int8x16_t x = vreinterpretq_s8_s32(turned(levels, lane));
        of[0] = vmlal_s8(of[0], vget_low_s8(codes), vget_low_s8(x));
        of[1] = vmlal_high_s8(of[1], codes, x);
    }
    BELLBOX_INLINE int32x4_t total() const { return vpaddq_s32(vpaddlq_s16(of[0]), vpaddlq_s16(of[1])); }
};
#endif

BELLBOX_INLINE void add_to(int32_t* sums, int32x4_t more) { vst1q_s32(sums, vaddq_s32(vld1q_s32(sums), more)); }

// ---- codes ----

// Outputs 4 * quarter and on of the vector(s) that hold groups j, j + vectors, j + 2 vectors, ... of a block.
struct Packed {
    uint8x16_t low, high;               // high: only for 3 bits
};

template <int BITS>
BELLBOX_INLINE Packed load_packed(const uint8_t* block, int j, int quarter) {
    Packed p;
    p.low = vld1q_u8(block + 64 * j + 16 * quarter);
    p.high = BITS == 3 ? vld1q_u8(block + 256 + 64 * (j & 1) + 16 * quarter) : p.low;
    return p;
}

// Right, or left where the count is negative. Instructions hold the count, which compilers want to be a number.
BELLBOX_INLINE uint8x16_t shifted(uint8x16_t x, int count) {
    switch (count) {
        case -2: return vshlq_n_u8(x, 2);
        case -1: return vshlq_n_u8(x, 1);
        case 0: return x;
        case 1: return vshrq_n_u8(x, 1);
        case 2: return vshrq_n_u8(x, 2);
        case 3: return vshrq_n_u8(x, 3);
        case 4: return vshrq_n_u8(x, 4);
        case 5: return vshrq_n_u8(x, 5);
        case 6: return vshrq_n_u8(x, 6);
        default: return vshrq_n_u8(x, 7);
    }
}

// The codes of group f * vectors + j.
template <int BITS>
BELLBOX_INLINE int8x16_t codes(Packed p, int f, int j) {
    using L = Layout<BITS>;
    const uint8x16_t down = shifted(p.low, f * L::width);
    const uint8x16_t low = f + 1 == L::fields ? down : vandq_u8(down, vdupq_n_u8((1 << L::width) - 1));
    if (BITS != 3) return vreinterpretq_s8_u8(low);
    // Group 4f + j is group 2 (2f + j/2) + j%2 of the high plane: bit 2f + j/2, wanted at bit 2.
    return vreinterpretq_s8_u8(vbslq_u8(vdupq_n_u8(4), shifted(p.high, 2 * f + j / 2 - 2), low));
}

// One row with SDOT: which field is left at which place, worth 2^shift, so that a field costs one operation (3 bits: two).
template <int BITS>
struct Places {
    using L = Layout<BITS>;
    static constexpr int worths = BITS == 1 ? 4 : BITS == 4 ? 1 : 3;
    static constexpr int shift(int worth) { return L::width * worth; }
    static constexpr int worth(int f) { return f % worths; }

    uint8x16_t low, right, high, high_right;  // the last two for 3 bits
    BELLBOX_INLINE Places(Packed p, int j)
        : low(p.low), right(vshrq_n_u8(p.low, BITS == 1 || BITS == 4 ? 4 : 6)), high(shifted(p.high, j / 2 - 2)),
          high_right(shifted(p.high, 4 + j / 2)) {}
    BELLBOX_INLINE int8x16_t codes(int f) const {
        constexpr uint8_t ones = (1 << L::width) - 1;
        const int place = L::width * worth(f);
        const uint8x16_t mask = vdupq_n_u8(static_cast<uint8_t>(ones << place));
        const bool last = f >= worths;      // of two bits the last alone, of one bit half of them
        uint8x16_t code = last ? right : low;
        if (!(last && L::width > 1)) code = vandq_u8(code, mask);
        // Of the high plane bit 2 f + j / 2 is wanted above the two others.
        if (BITS == 3) code = vbslq_u8(vdupq_n_u8(static_cast<uint8_t>(4 << place)), last ? high_right : high, code);
        return vreinterpretq_s8_u8(code);
    }
};

// ---- epilogue ----

// The way of sixteen sums to the output: exact integer, then three roundings. What belongs to the columns is held.
struct Epilogue {
    float32x4_t scale[4], bias[4];
    int64_t column, width;

    BELLBOX_INLINE Epilogue(const LinearArgs& a, int64_t tile) : column(16 * tile) {
        const Weights& w = *a.weights;
        width = smaller(16, w.n - column);
        float scales[16] = {}, biases[16] = {};
        std::memcpy(scales, w.scale + column, static_cast<size_t>(width) * 4);
        if (w.bias != nullptr) std::memcpy(biases, w.bias + column, static_cast<size_t>(width) * 4);
        BELLBOX_UNROLL
        for (int q = 0; q < 4; ++q)
            scale[q] = vmulq_n_f32(vld1q_f32(scales + 4 * q), a.act_scale), bias[q] = vld1q_f32(biases + 4 * q);
    }

    BELLBOX_INLINE void operator()(const LinearArgs& a, int64_t row, const int32_t* sums) const {
        const Weights& w = *a.weights;
        const int32x4_t less = vdupq_n_s32(w.shift * a.sums[row]);
        const size_t size = a.out_type == Type::f32 ? 4 : 2;
        char* const out = static_cast<char*>(a.out) + static_cast<size_t>(row * a.ldo + column) * size;
        char some[64];
        char* const to = width == 16 ? out : some;
        BELLBOX_UNROLL
        for (int q = 0; q < 4; ++q) {
            const int32x4_t exact = vsubq_s32(vmulq_n_s32(vld1q_s32(sums + 4 * q), w.multiplier), less);
            float32x4_t y = vmulq_n_f32(vmulq_f32(vcvtq_f32_s32(exact), scale[q]), a.row_scales[row]);
            if (w.bias != nullptr) y = vaddq_f32(y, bias[q]);  // not always: -0 + 0 is another zero
            if (a.out_type == Type::f32)
                rows::store4<Type::f32>(to + 16 * q, y);
            else
                rows::store4<Type::bf16>(to + 8 * q, y);
        }
        if (width < 16) std::memcpy(out, some, static_cast<size_t>(width) * size);
    }
};

// ---- some rows ----

struct Levels {
    int8x16_t of[4];
    BELLBOX_INLINE explicit Levels(const int8_t* from) {
        BELLBOX_UNROLL
        for (int i = 0; i < 4; ++i) of[i] = vld1q_s8(from + 16 * i);
    }
};

BELLBOX_INLINE void prefetch(const uint8_t* block, int bytes) {  // addresses alone: they may lie past the end
    for (int line = 0; line < bytes; line += 64) __builtin_prefetch(block + kAhead + line);
}

template <int BITS, int ROWS>
__attribute__((noinline)) void some(const LinearArgs& a, int64_t row, int64_t tile) {
    using L = Layout<BITS>;
    const int64_t blocks = (a.weights->k + 63) / 64;
    const int8_t* levels = a.levels + row * a.ldl;
    const uint8_t* block = a.weights->data + tile * blocks * L::bytes;
    int32_t sums[ROWS][16] = {};
    for (int64_t begin = 0; begin < blocks; begin += kRun<BITS>) {
        const int64_t end = blocks - begin < kRun<BITS> ? blocks : begin + kRun<BITS>;
        Four acc[ROWS][4];
        for (int64_t b = begin; b < end; ++b, block += L::bytes) {
            prefetch(block, L::bytes);
            BELLBOX_UNROLL
            for (int part = 0; part < 4; ++part) {  // sixteen inputs, so that registers hold their levels for all rows
                const uint8_t* own = block;
                __asm__("" : "+r"(own));            // read anew: what is kept from part to part would be kept in memory
                int8x16_t x[ROWS];
                BELLBOX_UNROLL
                for (int r = 0; r < ROWS; ++r) x[r] = vld1q_s8(levels + r * a.ldl + 64 * b + 16 * part);
                BELLBOX_UNROLL
                for (int g = 0; g < 4; ++g) {
                    const int group = 4 * part + g, f = group / L::vectors, j = group % L::vectors;
                    BELLBOX_UNROLL
                    for (int q = 0; q < 4; ++q) {
                        const int8x16_t code = codes<BITS>(load_packed<BITS>(own, j, q), f, j);
                        BELLBOX_UNROLL
                        for (int r = 0; r < ROWS; ++r) acc[r][q].add(code, x[r], g);
                    }
                }
            }
        }
        BELLBOX_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            BELLBOX_UNROLL
            for (int q = 0; q < 4; ++q) add_to(sums[r] + 4 * q, acc[r][q].total());
        }
    }
    const Epilogue epilogue(a, tile);
    for (int r = 0; r < ROWS; ++r) epilogue(a, row + r, sums[r]);
}

// One row with SDOT, fields at their places.
template <int BITS>
__attribute__((noinline)) void one(const LinearArgs& a, int64_t row, int64_t tile) {
    using L = Layout<BITS>;
    using P = Places<BITS>;
    const int64_t blocks = (a.weights->k + 63) / 64;
    const int8_t* levels = a.levels + row * a.ldl;
    const uint8_t* block = a.weights->data + tile * blocks * L::bytes;
    Four acc[P::worths][4];
    for (int64_t b = 0; b < blocks; ++b, block += L::bytes, levels += 64) {
        prefetch(block, L::bytes);
        const Levels x(levels);
        BELLBOX_UNROLL
        for (int j = 0; j < L::vectors; ++j) {
            BELLBOX_UNROLL
            for (int q = 0; q < 4; ++q) {
                const P places(load_packed<BITS>(block, j, q), j);
                BELLBOX_UNROLL
                for (int f = 0; f < L::fields; ++f) {
                    const int group = f * L::vectors + j;
                    acc[P::worth(f)][q].add(places.codes(f), x.of[group / 4], group % 4);
                }
            }
        }
    }
    int32_t sums[16] = {};
    BELLBOX_UNROLL
    for (int i = 0; i < P::worths; ++i) {
        const int32x4_t down = vdupq_n_s32(-P::shift(i));  // exact: all products are multiples of it
        BELLBOX_UNROLL
        for (int q = 0; q < 4; ++q) add_to(sums + 4 * q, vshlq_s32(acc[i][q].total(), down));
    }
    Epilogue(a, tile)(a, row, sums);
}

// ---- many rows ----

#ifdef __ARM_FEATURE_MATMUL_INT8
// Codes of two groups of four inputs side by side: 16 bytes are two outputs x eight inputs.
template <int BITS>
void unpack(const uint8_t* block, int64_t blocks, int8_t* out) {
    using L = Layout<BITS>;
    for (int64_t b = 0; b < blocks; ++b, block += L::bytes, out += 1024) {
        BELLBOX_UNROLL
        for (int j = 0; j < L::vectors; j += 2) {
            BELLBOX_UNROLL
            for (int q = 0; q < 4; ++q) {
                const Packed p = load_packed<BITS>(block, j, q), next = load_packed<BITS>(block, j + 1, q);
                BELLBOX_UNROLL
                for (int f = 0; f < L::fields; ++f) {
                    const int32x4_t x = vreinterpretq_s32_s8(codes<BITS>(p, f, j));
                    const int32x4_t y = vreinterpretq_s32_s8(codes<BITS>(next, f, j + 1));
                    int8_t* const to = out + 64 * (f * L::vectors + j) + 32 * q;
                    vst1q_s8(to, vreinterpretq_s8_s32(vzip1q_s32(x, y)));
                    vst1q_s8(to + 16, vreinterpretq_s8_s32(vzip2q_s32(x, y)));
                }
            }
        }
    }
}

BELLBOX_INLINE int8x16_t halves(int8x16_t a, int8x16_t b, bool high) {
    const int64x2_t x = vreinterpretq_s64_s8(a), y = vreinterpretq_s64_s8(b);
    return vreinterpretq_s8_s64(high ? vzip2q_s64(x, y) : vzip1q_s64(x, y));
}

BELLBOX_INLINE int32x4_t halves(int32x4_t a, int32x4_t b, bool high) {
    const int64x2_t x = vreinterpretq_s64_s32(a), y = vreinterpretq_s64_s32(b);
    return vreinterpretq_s32_s64(high ? vzip2q_s64(x, y) : vzip1q_s64(x, y));
}

// Sums of ROWS rows and 16 outputs over `blocks` unpacked blocks. A row without another is taken twice.
template <int ROWS>
__attribute__((noinline)) void multiply(const int8_t* levels, int64_t ldl, const int8_t* codes, int64_t blocks, int64_t,
                                        int32_t* sums) {
    constexpr int kPairs = (ROWS + 1) / 2;
    const int8_t* const end = levels + 64 * blocks;
    int32x4_t acc[kPairs][8];
    BELLBOX_UNROLL
    for (int i = 0; i < kPairs; ++i) {
        BELLBOX_UNROLL
        for (int p = 0; p < 8; ++p) acc[i][p] = vdupq_n_s32(0);
    }
    for (; levels < end; levels += 16, codes += 256) {
        int8x16_t x[kPairs][2];
        BELLBOX_UNROLL
        for (int i = 0; i < kPairs; ++i) {
            const int8x16_t first = vld1q_s8(levels + 2 * i * ldl);
            const int8x16_t second = 2 * i + 1 < ROWS ? vld1q_s8(levels + (2 * i + 1) * ldl) : first;
            x[i][0] = halves(first, second, false), x[i][1] = halves(first, second, true);
        }
        BELLBOX_UNROLL
        for (int g = 0; g < 2; ++g) {
            BELLBOX_UNROLL
            for (int p = 0; p < 8; ++p) {
                const int8x16_t code = vld1q_s8(codes + 128 * g + 16 * p);
                BELLBOX_UNROLL
                for (int i = 0; i < kPairs; ++i) acc[i][p] = vmmlaq_s32(acc[i][p], x[i][g], code);
            }
        }
    }
    BELLBOX_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        BELLBOX_UNROLL
        for (int q = 0; q < 4; ++q)
            add_to(sums + 16 * r + 4 * q, halves(acc[r / 2][2 * q], acc[r / 2][2 * q + 1], r % 2 == 1));
    }
}
#else
template <int BITS>
void unpack(const uint8_t* block, int64_t blocks, int8_t* out) {
    using L = Layout<BITS>;
    for (int64_t b = 0; b < blocks; ++b, block += L::bytes, out += 1024) {
        BELLBOX_UNROLL
        for (int j = 0; j < L::vectors; ++j) {
            BELLBOX_UNROLL
            for (int q = 0; q < 4; ++q) {
                const Packed p = load_packed<BITS>(block, j, q);
                BELLBOX_UNROLL
                for (int f = 0; f < L::fields; ++f) vst1q_s8(out + 64 * (f * L::vectors + j) + 16 * q, codes<BITS>(p, f, j));
            }
        }
    }
}

// Sums of ROWS rows and 16 outputs over `blocks` unpacked blocks, `run` of them at a time in 16 bits.
template <int ROWS>
__attribute__((noinline)) void multiply(const int8_t* levels, int64_t ldl, const int8_t* codes, int64_t blocks, int64_t run,
                                        int32_t* sums) {
    for (int64_t begin = 0; begin < blocks; begin += run) {
        const int8_t* const end = levels + 64 * smaller(run, blocks - begin);
        Four acc[ROWS][4];
        for (; levels < end; levels += 16, codes += 256) {
            int8x16_t x[ROWS];
            BELLBOX_UNROLL
            for (int r = 0; r < ROWS; ++r) x[r] = vld1q_s8(levels + r * ldl);
            BELLBOX_UNROLL
            for (int g = 0; g < 4; ++g) {
                BELLBOX_UNROLL
                for (int q = 0; q < 4; ++q) {
                    const int8x16_t code = vld1q_s8(codes + 64 * g + 16 * q);
                    BELLBOX_UNROLL
                    for (int r = 0; r < ROWS; ++r) acc[r][q].add(code, x[r], g);
                }
            }
        }
        BELLBOX_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            BELLBOX_UNROLL
            for (int q = 0; q < 4; ++q) add_to(sums + 16 * r + 4 * q, acc[r][q].total());
        }
    }
}
#endif

template <int BITS>
void many(const LinearArgs& a, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end) {
    using L = Layout<BITS>;
    const int64_t blocks = (a.weights->k + 63) / 64, pieces = (blocks + kDepth - 1) / kDepth;
    const int64_t rounds = (m_end - m_begin + kRowBlock - 1) / kRowBlock;
    alignas(64) int8_t codes[kDepth * 1024];
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
    if (rows > kSome) return many<BITS>(a, m_begin, m_end, tile_begin, tile_end);
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) switch (rows) {
            case 1: kDots ? one<BITS>(a, m_begin, tile) : some<BITS, 1>(a, m_begin, tile); break;
            case 2: some<BITS, 2>(a, m_begin, tile); break;
            case 3: some<BITS, kSome < 3 ? kSome : 3>(a, m_begin, tile); break;
            default: some<BITS, kSome>(a, m_begin, tile); break;
        }
}

}  // namespace product
}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
