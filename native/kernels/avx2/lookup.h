// The products of 1-bit weights with 1-bit activations, and of 2-bit weights with activations of at most 4 levels, with AVX2:
// sums of four products looked up for 32 outputs by one vpshufb. From some rows on; kernels/avx2/binary.h has the few.
//
// An index is four bits of the weights, one of each of four inputs; its table has 16 bytes. There are 256 tables in all, so
// none is made at run time: 4 KB of constants, from which the activation picks by an offset.
//   1 bit    a table serves two rows: popcount(index & row 0) + 16 popcount(index & row 1). Three look-ups stay below 16 a
//            nibble; then lower nibbles go to bytes, and upper ones, where they lie, to 16 bits.
//   2 bits   a table is of four codes, and both bit planes of the weights use it; plane 1 counts twice in the end.
// A group of look-ups is one byte of four fields in the packed weights: 16 groups a block of 64 inputs, whose four inputs
// lie 8 (1 bit) or 16 (2 bits) apart. The bytes of two tiles are transposed to vectors of 32 outputs once for all rows.
//
// With codes on both sides, sum(level * code) = multiplier * look-ups - shift * sum(code): see kernels/avx2/binary.h.
//
// Floor, with additions: 3.3 operations for 256 products at 1 bit, 2 for 64 at 2 bits; vpmaddubsw takes 2 for 32.
#pragma once

#include "kernels/avx2/binary.h"

namespace bellbox {
namespace {
namespace avx2 {
namespace lookup {

constexpr int64_t kRowBlock = 128;      // rows that share transposed weights, and whose offsets and sums stay near
constexpr int64_t kGroups = 16;         // look-ups of a block of 64 inputs
constexpr int64_t kIndexBytes = 128;    // of one group: 4 vectors of outputs, or 2 of them in 2 planes

struct Tables {
    uint8_t row[256][16];
};
constexpr int bits_in(int x) { return (x & 1) + (x >> 1 & 1) + (x >> 2 & 1) + (x >> 3 & 1); }
constexpr Tables make_pairs() {         // [bits of row 0, + 16 bits of row 1][bits of weights]
    Tables t{};
    for (int x = 0; x < 256; ++x)
        for (int w = 0; w < 16; ++w) t.row[x][w] = static_cast<uint8_t>(bits_in(x & w & 15) + 16 * bits_in(x >> 4 & w));
    return t;
}
constexpr Tables make_codes() {         // [four codes][one bit of each of four weights]
    Tables t{};
    for (int x = 0; x < 256; ++x)
        for (int w = 0; w < 16; ++w)
            t.row[x][w] = static_cast<uint8_t>((x & 3) * (w & 1) + (x >> 2 & 3) * (w >> 1 & 1) + (x >> 4 & 3) * (w >> 2 & 1) +
                                               (x >> 6) * (w >> 3));
    return t;
}

// How the two differ, but for their inner loops.
struct OneBit {
    static constexpr int bits = 1, vectors = 4;             // of 32 outputs
    static constexpr int64_t depth = 6;                     // blocks transposed at a time: 12 KB; two runs
    static constexpr int64_t longest = 1 << 15;             // inputs whose sums fit 16 bits, in whole pieces
    alignas(64) static constexpr Tables tables = make_pairs();
};
struct TwoBits {
    static constexpr int bits = 2, vectors = 2;
    static constexpr int64_t depth = 8;                     // 16 KB
    static constexpr int64_t longest = 7168;                // 9 a product: 64,512
    alignas(64) static constexpr Tables tables = make_codes();
};

BELLBOX_INLINE __m256i load_table(const uint8_t* table, uint16_t offset) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table + offset)));
}

// ---- weights ----

// 64 bytes of each of two tiles, byte 4 r + c being output r: to four vectors of 32 outputs, one a c. In a vector's lower
// half lie outputs 0-3 and 8-11 of the first tile, then of the second; in its upper half 4-7 and 12-15.
BELLBOX_INLINE void transpose(const uint8_t* first, const uint8_t* second, __m256i (&out)[4]) {
    const __m256i by_c = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
                                          0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const auto turned = [&](const uint8_t* from) { return _mm256_shuffle_epi8(product::load32(from), by_c); };
    const auto zero_or = [&](const uint8_t* tile, int half) {
        return tile == nullptr ? _mm256_setzero_si256() : turned(tile + 32 * half);
    };
    const __m256i a0 = zero_or(first, 0), a1 = zero_or(first, 1), b0 = zero_or(second, 0), b1 = zero_or(second, 1);
    const __m256i a_low = _mm256_unpacklo_epi32(a0, a1), a_high = _mm256_unpackhi_epi32(a0, a1);
    const __m256i b_low = _mm256_unpacklo_epi32(b0, b1), b_high = _mm256_unpackhi_epi32(b0, b1);
    out[0] = _mm256_unpacklo_epi64(a_low, b_low), out[1] = _mm256_unpackhi_epi64(a_low, b_low);
    out[2] = _mm256_unpacklo_epi64(a_high, b_high), out[3] = _mm256_unpackhi_epi64(a_high, b_high);
}

// One block of 2 * vectors tiles (those past `tiles` are zeros) to indices: [16 groups][vectors][planes] of 32 bytes. Groups
// of 1 bit: those of the lower nibbles (p = 4 j + c), then those of the upper ones; of 2 bits: p.
template <class Of>
void make_indices(const uint8_t* block, int64_t tile_bytes, int64_t tiles, uint8_t* out) {
    const __m256i nibble = _mm256_set1_epi8(15), even = _mm256_set1_epi8(5), odd = _mm256_set1_epi8(10);
    for (int v = 0; v < Of::vectors; ++v) {
        const uint8_t* first = 2 * v < tiles ? block + 2 * v * tile_bytes : nullptr;
        const uint8_t* second = 2 * v + 1 < tiles ? block + (2 * v + 1) * tile_bytes : nullptr;
        BELLBOX_UNROLL
        for (int j = 0; j < 2 * Of::bits; ++j) {
            __m256i byte[4];
            transpose(first == nullptr ? nullptr : first + 64 * j, second == nullptr ? nullptr : second + 64 * j, byte);
            BELLBOX_UNROLL
            for (int c = 0; c < 4; ++c) {
                uint8_t* to = out + (4 * j + c) * kIndexBytes + v * (kIndexBytes / Of::vectors);
                const auto shifted = [&](int count) { return _mm256_srli_epi16(byte[c], count); };
                if (Of::bits == 1) {
                    product::store32(to, _mm256_and_si256(byte[c], nibble));
                    product::store32(to + 8 * kIndexBytes, _mm256_and_si256(shifted(4), nibble));
                } else {                                    // bits of fields 0, 2, 1, 3, which costs least
                    product::store32(to, _mm256_or_si256(_mm256_and_si256(byte[c], even), _mm256_and_si256(shifted(3), odd)));
                    product::store32(to + 32, _mm256_or_si256(_mm256_and_si256(shifted(1), even),
                                                              _mm256_and_si256(shifted(4), odd)));
                }
            }
        }
    }
}

// ---- activations ----

// Offsets of 16 tables from what picks them, a byte each.
BELLBOX_INLINE void store_offsets(__m128i picked, uint16_t* out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_slli_epi16(_mm256_cvtepu8_epi16(picked), 4));
}

// Sixteen nibbles to bytes.
BELLBOX_INLINE __m128i nibbles_to_bytes(uint64_t nibbles) {
    const __m128i both = _mm_cvtsi64_si128(static_cast<int64_t>(nibbles)), mask = _mm_set1_epi8(15);
    return _mm_unpacklo_epi8(_mm_and_si128(both, mask), _mm_and_si128(_mm_srli_epi16(both, 4), mask));
}

// Of two rows (or one, and zeros): [blocks][16].
inline void pair_offsets(const LinearArgs& a, int64_t row, bool two, int64_t blocks, uint16_t* out) {
    const __m256i upper = _mm256_set1_epi8(static_cast<char>(a.act_multiplier - a.act_shift));
    const int8_t* levels = a.levels + row * a.ldl;
    const auto nibbles = [&](const int8_t* at) { return binary::nibbles_of_block(at, upper); };
    for (int64_t b = 0; b < blocks; ++b, levels += 64, out += kGroups) {
        const __m128i one = nibbles_to_bytes(nibbles(levels)), other = nibbles_to_bytes(two ? nibbles(levels + a.ldl) : 0);
        store_offsets(_mm_or_si128(one, _mm_slli_epi16(other, 4)), out);
    }
}

// Of one row: [blocks][16], `stride` numbers apart.
inline void code_offsets(const LinearArgs& a, int64_t row, int64_t blocks, uint16_t* out, int64_t stride) {
    const __m128i shift = _mm_set1_epi8(static_cast<char>(a.act_shift)), code = _mm_set1_epi8(3);
    const int8_t* levels = a.levels + row * a.ldl;
    const auto codes = [&](int f) {
        __m128i c = _mm_add_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels + 16 * f)), shift);
        if (a.act_multiplier == 2) c = _mm_srli_epi16(c, 1);  // even numbers: no bit crosses a byte
        return _mm_and_si128(c, code);                        // padding could be anything
    };
    for (int64_t b = 0; b < blocks; ++b, levels += 64, out += stride) {
        const __m128i low = _mm_or_si128(codes(0), _mm_slli_epi16(codes(2), 2));
        const __m128i high = _mm_or_si128(codes(1), _mm_slli_epi16(codes(3), 2));
        store_offsets(_mm_or_si128(low, _mm_slli_epi16(high, 4)), out);
    }
}

// ---- product ----

// Adds bytes of 32 outputs to sums of 16 bits, which lie by tiles, in each 0-3, 8-11, 4-7, 12-15.
BELLBOX_INLINE void add16(uint16_t* sums, __m256i first_tile, __m256i second_tile) {
    product::store32(sums, _mm256_add_epi16(product::load32(sums), first_tile));
    product::store32(sums + 16, _mm256_add_epi16(product::load32(sums + 16), second_tile));
}
BELLBOX_INLINE void add_bytes(uint16_t* sums, __m256i bytes) {
    const __m256i zero = _mm256_setzero_si256();
    add16(sums, _mm256_unpacklo_epi8(bytes, zero), _mm256_unpackhi_epi8(bytes, zero));
}

// Three look-ups of two rows and 128 outputs, added up in nibbles, then to bytes and to 16 bits.
BELLBOX_INLINE void add_triple(const uint8_t* indices, const uint16_t* offsets, __m256i (&low)[4], __m256i (&high)[4]) {
    const uint8_t* tables = &OneBit::tables.row[0][0];
    __m256i found[4];
    BELLBOX_UNROLL
    for (int i = 0; i < 3; ++i) {
        const __m256i table = load_table(tables, offsets[i]);
        BELLBOX_UNROLL
        for (int v = 0; v < 4; ++v) {
            const __m256i one = _mm256_shuffle_epi8(table, product::load32(indices + kIndexBytes * i + 32 * v));
            found[v] = i == 0 ? one : _mm256_add_epi8(found[v], one);
            __asm__("" : "+x"(found[v]));   // one after the other: looked up all at once they would not fit
        }
    }
    const __m256i nibble = _mm256_set1_epi8(15);
    BELLBOX_UNROLL
    for (int v = 0; v < 4; ++v) {
        low[v] = _mm256_add_epi8(low[v], _mm256_and_si256(found[v], nibble));
        high[v] = _mm256_add_epi16(high[v], _mm256_srli_epi16(found[v], 4));
        __asm__("" : "+x"(low[v]), "+x"(high[v]));
    }
}

// Adds three blocks (16 triples, at most 192 a nibble) of two rows and 128 outputs to sums [2][128].
inline void add_run(const uint8_t* indices, const uint16_t* offsets, uint16_t* sums) {
    __m256i low[4], high[4];
    BELLBOX_UNROLL
    for (int v = 0; v < 4; ++v) low[v] = high[v] = _mm256_setzero_si256();
    for (int i = 0; i < 16; ++i, indices += 3 * kIndexBytes, offsets += 3) add_triple(indices, offsets, low, high);
    BELLBOX_UNROLL
    for (int v = 0; v < 4; ++v) {
        // 16 bits of `high` are upper nibbles of both bytes, and the lower nibbles of the odd one, times 16.
        const __m256i between = _mm256_slli_epi16(_mm256_srli_epi16(low[v], 8), 4);
        add_bytes(sums + 32 * v, low[v]);
        add_bytes(sums + 128 + 32 * v, _mm256_sub_epi16(high[v], between));
    }
}

struct Sums {                           // of a block of rows, [rows][16 * tiles]
    uint16_t* some;                     // of inputs so far
    int32_t* all;
};

// One block, 16 look-ups in two planes, of ROWS rows and 64 outputs, added to sums [ROWS][64].
template <int ROWS>
BELLBOX_INLINE void add_block(const uint8_t* indices, const uint16_t* offsets, uint16_t* sums) {
    const uint8_t* tables = &TwoBits::tables.row[0][0];
    __m256i bytes[ROWS][2][2];
    BELLBOX_UNROLL
    for (int g = 0; g < kGroups; ++g, indices += kIndexBytes) {
        __m256i table[ROWS];
        BELLBOX_UNROLL
        for (int r = 0; r < ROWS; ++r) table[r] = load_table(tables, offsets[kGroups * r + g]);
        BELLBOX_UNROLL
        for (int v = 0; v < 2; ++v) {
            BELLBOX_UNROLL
            for (int plane = 0; plane < 2; ++plane) {
                __m256i index = product::load32(indices + 64 * v + 32 * plane);
                __asm__("" : "+x"(index));   // in a register for both rows: loads are two a cycle, as many as look-ups
                BELLBOX_UNROLL
                for (int r = 0; r < ROWS; ++r) {
                    const __m256i one = _mm256_shuffle_epi8(table[r], index);
                    __m256i& sum = bytes[r][v][plane];
                    sum = g == 0 ? one : _mm256_add_epi8(sum, one);
                    __asm__("" : "+x"(sum));
                }
            }
        }
    }
    const __m256i worth = _mm256_set1_epi16(0x0201);  // of the planes
    BELLBOX_UNROLL
    for (int r = 0; r < ROWS; ++r)
        BELLBOX_UNROLL
        for (int v = 0; v < 2; ++v) {
            const __m256i zero = bytes[r][v][0], one = bytes[r][v][1];
            add16(sums + 64 * r + 32 * v, _mm256_maddubs_epi16(_mm256_unpacklo_epi8(zero, one), worth),
                  _mm256_maddubs_epi16(_mm256_unpackhi_epi8(zero, one), worth));
        }
}

// A piece of at most `depth` blocks for all pairs of rows. offsets: [pairs][stride].
inline void multiply(OneBit, const uint8_t* indices, const uint16_t* offsets, int64_t stride, int64_t blocks, int64_t rows,
                     uint16_t* sums) {
    for (int64_t pair = 0; pair < (rows + 1) / 2; ++pair, offsets += stride, sums += 256)
        for (int64_t b = 0; b < blocks; b += 3)             // past the last: indices are zeros
            add_run(indices + b * kGroups * kIndexBytes, offsets + b * kGroups, sums);
}
inline void multiply(TwoBits, const uint8_t* indices, const uint16_t* offsets, int64_t stride, int64_t blocks, int64_t rows,
                     uint16_t* sums) {
    for (int64_t pair = 0; pair < (rows + 1) / 2; ++pair, offsets += stride, sums += 128)
        for (int64_t b = 0; b < blocks; ++b)
            add_block<2>(indices + b * kGroups * kIndexBytes, offsets + 2 * b * kGroups, sums);
}

inline void make_offsets(OneBit, const LinearArgs& a, int64_t row, bool two, int64_t blocks, uint16_t* out) {
    pair_offsets(a, row, two, blocks, out);
}
inline void make_offsets(TwoBits, const LinearArgs& a, int64_t row, bool two, int64_t blocks, uint16_t* out) {
    code_offsets(a, row, blocks, out, 2 * kGroups);
    if (two) code_offsets(a, row + 1, blocks, out + kGroups, 2 * kGroups);
}

// Sums of 16 bits to those of 32, in the order of outputs, and to zero.
inline void widen(uint16_t* some, int32_t* all, int64_t vectors) {
    for (int64_t i = 0; i < vectors; ++i, some += 16, all += 16) {
        const __m256i sums = _mm256_permute4x64_epi64(product::load32(some), 0xd8);
        product::store32(some, _mm256_setzero_si256());
        const __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(sums));
        const __m256i high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(sums, 1));
        product::store32(all, _mm256_add_epi32(product::load32(all), low));
        product::store32(all + 8, _mm256_add_epi32(product::load32(all + 8), high));
    }
}

// What a block of rows needs at hand: offsets of its pairs of rows, and sums.
template <class Of>
struct Memory {
    static constexpr int64_t outputs = 32 * Of::vectors;
    const int64_t blocks, padded, stride, pairs;            // padded: to whole runs; stride: offsets of a pair
    const Scratch room;

    Memory(const LinearArgs& a, int64_t rows)
        : blocks((a.weights->k + 63) / 64), padded((blocks + 2) / 3 * 3), stride(padded * kGroups * Of::bits),
          pairs((rows + 1) / 2), room(pairs * stride / 2 + 2 * pairs * outputs * 3 / 2 + 64) {}
    int32_t* all() const { return reinterpret_cast<int32_t*>(room.data); }
    uint16_t* some() const { return reinterpret_cast<uint16_t*>(all() + 2 * pairs * outputs); }
    uint16_t* offsets() const { return some() + 2 * pairs * outputs; }
};

template <class Of>
void multiply_tiles(const LinearArgs& a, const Memory<Of>& memory, int64_t begin, int64_t rows, int64_t tile, int64_t tiles) {
    using L = Layout<Of::bits>;
    const int64_t tile_bytes = memory.blocks * L::bytes, outputs = Memory<Of>::outputs, vectors = 2 * memory.pairs * outputs / 16;
    alignas(64) uint8_t indices[Of::depth * kGroups * kIndexBytes];
    int32_t* const all = memory.all();
    memset(all, 0, static_cast<size_t>(2 * memory.pairs * outputs) * 4);
    for (int64_t from = 0, held = 0; from < memory.blocks; from += Of::depth) {
        const int64_t size = smaller(Of::depth, memory.blocks - from);
        const uint8_t* block = a.weights->data + tile * tile_bytes + from * L::bytes;
        for (int64_t b = 0; b < size; ++b)
            make_indices<Of>(block + b * L::bytes, tile_bytes, tiles, indices + b * kGroups * kIndexBytes);
        memset(indices + size * kGroups * kIndexBytes, 0, static_cast<size_t>((Of::depth - size) * kGroups * kIndexBytes));
        multiply(Of{}, indices, memory.offsets() + from * kGroups * Of::bits, memory.stride, size, rows, memory.some());
        held += 64 * size;
        if (held + 64 * Of::depth <= Of::longest && from + size < memory.blocks) continue;
        widen(memory.some(), all, vectors), held = 0;
    }
    for (int64_t t = 0; t < tiles; ++t) {
        const binary::Counts counts(a, tile + t);
        for (int64_t r = 0; r < rows; ++r) counts(a, begin + r, all + r * outputs + 16 * t);
    }
}

template <class Of>
void linear(const LinearArgs& a, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end) {
    const int64_t rounds = (m_end - m_begin + kRowBlock - 1) / kRowBlock, each = ((m_end - m_begin) / rounds + 2) / 2 * 2;
    for (int64_t begin = m_begin; begin < m_end; begin += each) {
        const int64_t rows = smaller(each, m_end - begin);
        const Memory<Of> memory(a, rows);
        memset(memory.some(), 0, static_cast<size_t>(2 * memory.pairs * (memory.outputs + memory.stride / 2)) * 2);
        for (int64_t pair = 0; pair < memory.pairs; ++pair)
            make_offsets(Of{}, a, begin + 2 * pair, 2 * pair + 1 < rows, memory.blocks, memory.offsets() + pair * memory.stride);
        for (int64_t tile = tile_begin; tile < tile_end; tile += 2 * Of::vectors)
            multiply_tiles<Of>(a, memory, begin, rows, tile, smaller(2 * Of::vectors, tile_end - tile));
    }
}

}  // namespace lookup
}  // namespace avx2
}  // namespace
}  // namespace bellbox
