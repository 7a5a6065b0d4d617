// The outline of a convolution whose output pixels lie side by side in vectors, for any instruction set.
//
// The lanes of a vector are pixels, not outputs, so that few outputs fill it as well as many; products of several codes
// at once are looked up, and the row of the table follows from the weights, whose addresses are made once for all
// images. What is left to do for each input pixel is done once, not once for every window that sees it: some channels,
// three with AVX-512 and two with AVX2, become a byte, and the bytes of one such tuple a plane of their own, with a
// border of zeros. Then the operands of a tile of 64 output pixels are copies of runs of those planes, one byte for all
// products of a tuple. Code 0 adds nothing; what it should have added, and what the zero points do, is one number for
// each border that a window may have, and the sum of the codes that it sees.
#pragma once

#include "kernels/inline.h"
#include "kernels/layout.h"
#include "kernels/portable/encode.h"

namespace bellbox {
namespace {
namespace BELLBOX_NAMESPACE {
namespace pixels {

constexpr int kLanes = 64;                   // pixels of a tile
constexpr int kOutputs = 16;                 // whose sums are turned from lanes of pixels to lanes of outputs together
constexpr int64_t kSumTuples = 28;           // whose digits' sum fits a byte: 28 * 9 < 256 for three
constexpr int64_t kSmallWeights = 1 << 18;   // bytes of addresses that stay in the second-level cache anyway
constexpr int64_t kNearRoom = 1 << 14, kFarRoom = 3 << 17;  // bytes of tiles that share a pass over the weights

struct Tile;

// ---- what an instruction set gives ----

// The even ones of 2 U bytes.
template <int U>
void copy_even(const uint8_t* from, uint8_t* to);
// The tuples of up to 64 pixels, then the sums of their digits: [tuples + sum_planes][64], with room for 16 more. `packed` is
// memory to work in, [up to a multiple of 16 tuples][64].
void pack_pixels(const PixelArgs& a, const int8_t* codes, int64_t count, uint8_t* packed, uint8_t* vectors);
// The sums of the codes that windows see, from their parts [places * sum_planes][64], to what leaves each output's sum.
void sum_codes(const PixelArgs& a, const uint8_t* parts, Tile& tile);
// Outputs [16 block, 16 block + 16) of a tile whose first pixel is number `first`.
void multiply(const PixelArgs& a, const Tile& tile, const uint8_t* operands, int64_t first, int64_t block);

// f(unit) with the size of pieces as a type.
template <int N>
struct Number {
    static constexpr int value = N;
};
template <typename F>
BELLBOX_INLINE void with_unit(int64_t unit, const F& f) {
    switch (unit) {
        case 64: return f(Number<64>());
        case 32: return f(Number<32>());
        case 16: return f(Number<16>());
        case 8: return f(Number<8>());
        case 4: return f(Number<4>());
        default: return f(Number<1>());
    }
}

// The largest of those that divides `columns`.
inline int64_t unit_of(int64_t columns) {
    int64_t unit = kLanes;
    while (unit > 1 && columns % unit != 0) unit /= 2;
    return unit >= 4 ? unit : 1;
}

// U bytes from `from`; STEP 2: the even ones of 2 U.
template <int U, int STEP>
BELLBOX_INLINE void copy(const uint8_t* from, uint8_t* to) {
    if (STEP == 1 || U == 1)
        memcpy(to, from, U);
    else
        copy_even<U>(from, to);
}

// ---- planes ----

// Planes of samples [begin, end) from their codes.
inline void make_planes(const PixelArgs& a, int64_t begin, int64_t end) {
    const int64_t pixels = a.height * a.width, unit = unit_of(a.width);
    const Scratch scratch((a.tuples + 15) / 16 * 16 * kLanes / 4), ready((a.tuples + 16 + a.sum_planes) * kLanes / 4);
    uint8_t* const packed = reinterpret_cast<uint8_t*>(scratch.data);
    uint8_t* const vectors = reinterpret_cast<uint8_t*>(ready.data);
    for (int64_t sample = begin; sample < end; ++sample) {
        const int8_t* codes = a.codes + sample * a.code_stride;
        uint8_t* planes = a.planes + sample * a.sample_bytes;
        memset(planes, 0, static_cast<size_t>(a.sample_bytes));
        for (int64_t first = 0; first < pixels; first += kLanes) {
            const int64_t count = smaller(kLanes, pixels - first);
            pack_pixels(a, codes + first * a.channels, count, packed, vectors);
            int64_t y = first / a.width, x = first % a.width;
            for (int64_t i = 0; i < count; i += unit) {
                uint8_t* to = planes + (y + a.top) * a.plane_width + x + a.left;
                with_unit(unit, [&](auto u) {
                    for (int64_t q = 0; q < a.tuples + a.sum_planes; ++q)
                        memcpy(to + q * a.plane, vectors + 64 * q + i, decltype(u)::value);
                });
                x += unit;
                if (x == a.width) x = 0, ++y;
            }
        }
    }
}

// ---- operands of a tile ----

struct Tile {
    const uint8_t* at[kLanes];       // where each piece of its first place of the window lies in the first plane
    int32_t border[kLanes];
    alignas(64) int32_t less[kLanes];  // the shifts, until the codes are summed up: what leaves each output's sum
    float row_scales[kLanes];
    int64_t count;

    Tile(const PixelArgs& a, int64_t tile, int64_t unit) : count(smaller(kLanes, a.pixels - tile * kLanes)) {
        const int64_t each = a.rows * a.columns;
        int64_t sample = tile * kLanes / each, pixel = tile * kLanes % each;
        for (int64_t i = 0, end; i < count; i = end, pixel = 0, ++sample) {
            end = smaller(count, i + each - pixel);  // of the part in this sample
            memcpy(border + i, a.border + pixel, static_cast<size_t>(end - i) * 4);
            memcpy(less + i, a.shifts + pixel, static_cast<size_t>(end - i) * 4);
            for (int64_t j = i; j < end; ++j) row_scales[j] = a.product.row_scales[sample];
            int64_t line = pixel / a.columns, column = pixel % a.columns;
            const uint8_t* planes = a.planes + sample * a.sample_bytes;
            for (int64_t j = i; j < end; j += unit) {
                at[j / unit] = planes + line * a.stride_y * a.plane_width + column * a.stride_x;
                column += unit;
                if (column == a.columns) column = 0, ++line;
            }
        }
        for (int64_t i = (count + unit - 1) / unit; i < kLanes / unit; ++i) at[i] = at[0];  // of no consequence
    }
};

// Operands [places][tuples][64], then as many zeros as fill a run of lookups, then what becomes the sums of codes.
template <int U, int STEP>
void collect(const PixelArgs& a, Tile& tile, uint8_t* out) {
    const auto plane = BELLBOX_STEP(int64_t offset, uint8_t* to) {
        BELLBOX_UNROLL
        for (int i = 0; i < kLanes / U; ++i) copy<U, STEP>(tile.at[i] + offset, to + U * i);
    };
    uint8_t* sums = out + a.lookups * kLanes;
    for (int64_t place = 0; place < a.places; ++place) {
        int64_t offset = a.offsets[place];
        for (int64_t q = 0; q < a.tuples; ++q, offset += a.plane, out += kLanes) plane(offset, out);
        for (int64_t s = 0; s < a.sum_planes; ++s, offset += a.plane, sums += kLanes) plane(offset, sums);
    }
    memset(out, 0, static_cast<size_t>((a.lookups - a.places * a.tuples) * kLanes));
}

inline void prepare(const PixelArgs& a, Tile& tile, int64_t unit, uint8_t* out) {
    with_unit(unit, [&](auto u) {
        constexpr int U = decltype(u)::value;
        if (a.stride_x == 2)
            collect<(U > 32 ? 32 : U), 2>(a, tile, out);
        else
            collect<U, 1>(a, tile, out);
    });
    sum_codes(a, out + a.lookups * kLanes, tile);
}

// Output pixels [64 begin, 64 end), numbered sample by sample.
inline void convolve(const PixelArgs& a, int64_t begin, int64_t end) {
    const int64_t blocks = (a.product.weights->n + kOutputs - 1) / kOutputs, unit = unit_of(a.columns);
    const int64_t pieces = a.stride_x == 1 ? unit : a.stride_x == 2 ? smaller(unit, 32) : 1;
    const int64_t bytes = (a.lookups + a.places * a.sum_planes) * kLanes;
    const int64_t room = blocks * kOutputs * a.lookups * 2 <= kSmallWeights ? kNearRoom : kFarRoom;
    const int64_t together = smaller(end - begin, room / bytes > 1 ? room / bytes : 1);
    const Scratch operands(together * bytes / 4), tiles(together * static_cast<int64_t>(sizeof(Tile)) / 4 + 1);
    uint8_t* const data = reinterpret_cast<uint8_t*>(operands.data);
    Tile* const all = reinterpret_cast<Tile*>(tiles.data);
    for (; begin < end; begin += together) {
        const int64_t count = smaller(together, end - begin);
        for (int64_t i = 0; i < count; ++i) {
            all[i] = Tile(a, begin + i, pieces);
            prepare(a, all[i], pieces, data + i * bytes);
        }
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t i = 0; i < count; ++i) multiply(a, all[i], data + i * bytes, (begin + i) * kLanes, block);
    }
}

}  // namespace pixels
}  // namespace BELLBOX_NAMESPACE
}  // namespace
}  // namespace bellbox
