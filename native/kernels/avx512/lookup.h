// The product of 2-bit weights with activations of at most 4 levels with AVX-512: products looked up, three at a time.
//
// Three codes of two bits are a number below 64, and so are three of the activation: a table of 64 x 64 bytes, 4 KB,
// holds every sum of three products. Its row for three codes of the activation is the operand of one VPERMB, which
// looks it up for three inputs and 64 outputs at once: 192 products where vpdpbusd makes 64. Sums of eight lookups
// (8 * 27 < 256) are bytes; they are added to 16 bits, and after a piece of inputs to 32.
//
// A block of 64 inputs takes 22 lookups: input i < 16 goes with 16 + i and 32 + i, which lie in one byte of the packed
// weights already (VPERMB ignores the upper two bits); 48..62 go by threes; 63 alone. Codes of the activation become
// such numbers the same way, times 64: addresses of table rows.
//
// With codes on both sides, sum(level * code) = multiplier * lookups - shift * sum(code): see kernels/avx512/binary.h.
//
// Floor: VPERMB, one a cycle, three times the rate of vpdpbusd; with the two additions about twice.
#pragma once

#include "kernels/avx512/binary.h"

namespace bellbox {
namespace {
namespace avx512 {
namespace lookup {

constexpr int64_t kFewRows = 7;      // left to vpdpbusd, which is as fast (measured)
constexpr int64_t kRowBlock = 256;   // rows that share unpacked weights
constexpr int64_t kLookups = 22;     // of a block of 64 inputs
constexpr int64_t kDepth = 8;        // blocks that are unpacked at a time: 11 KB
constexpr int kRun = 8;              // lookups that are added up in bytes
constexpr int kRows = 8, kTiles = 4; // registers: 3 sums a row
constexpr int64_t kPiece = (kDepth * kLookups + kRun - 1) / kRun * kRun;

inline bool serves(const LinearArgs& a, int64_t rows) { return a.weights->bits == 2 && a.act_n <= 4 && rows > kFewRows; }

struct Table {
    uint8_t row[64][64];             // [codes of the activation][codes of the weights]
};
constexpr Table make_table() {
    Table t{};
    for (int x = 0; x < 64; ++x)
        for (int w = 0; w < 64; ++w)
            t.row[x][w] = static_cast<uint8_t>((x & 3) * (w & 3) + (x >> 2 & 3) * (w >> 2 & 3) + (x >> 4) * (w >> 4));
    return t;
}
alignas(64) constexpr Table kTable = make_table();

// ---- weights ----

// Four vectors of [16 outputs][4 inputs], of four tiles, to four of [16 outputs][4 tiles], one an input.
BELLBOX_INLINE void transpose(__m512i (&v)[4]) {
    const __m512i low_bytes = _mm512_set1_epi16(0x00ff), low_words = _mm512_set1_epi32(0x0000ffff);
    // Bytes of even and odd inputs, two tiles beside each other; then words of the two pairs of tiles.
    const auto even = [](__m512i a, __m512i b, __m512i mask, int shift) {
        return _mm512_ternarylogic_epi64(mask, a, _mm512_slli_epi32(b, static_cast<unsigned>(shift)), 0xca);
    };
    const auto odd = [](__m512i a, __m512i b, __m512i mask, int shift) {
        return _mm512_ternarylogic_epi64(mask, _mm512_srli_epi32(a, static_cast<unsigned>(shift)), b, 0xca);
    };
    const __m512i e01 = even(v[0], v[1], low_bytes, 8), o01 = odd(v[0], v[1], low_bytes, 8);
    const __m512i e23 = even(v[2], v[3], low_bytes, 8), o23 = odd(v[2], v[3], low_bytes, 8);
    v[0] = even(e01, e23, low_words, 16), v[2] = odd(e01, e23, low_words, 16);
    v[1] = even(o01, o23, low_words, 16), v[3] = odd(o01, o23, low_words, 16);
}

// One block of `tiles` tiles (the others are taken as 0) to 22 vectors of numbers below 64 (in six bits).
inline void unpack(const uint8_t* block, int64_t tile_bytes, int tiles, uint8_t* out) {
    const __m512i two_bits = _mm512_set1_epi8(3);
    __m512i last[16];                // codes of inputs 48..63
    BELLBOX_UNROLL
    for (int j = 0; j < 4; ++j) {
        __m512i v[4];
        BELLBOX_UNROLL
        for (int t = 0; t < 4; ++t)
            v[t] = t < tiles ? _mm512_loadu_si512(block + t * tile_bytes + 64 * j) : _mm512_setzero_si512();
        transpose(v);
        BELLBOX_UNROLL
        for (int c = 0; c < 4; ++c) {
            _mm512_store_si512(out + 64 * (4 * j + c), v[c]);
            last[4 * j + c] = _mm512_and_si512(_mm512_srli_epi16(v[c], 6), two_bits);
        }
    }
    BELLBOX_UNROLL
    for (int q = 0; q < 5; ++q) {
        const __m512i upper = _mm512_or_si512(_mm512_slli_epi16(last[3 * q + 1], 2), _mm512_slli_epi16(last[3 * q + 2], 4));
        _mm512_store_si512(out + 64 * (16 + q), _mm512_or_si512(last[3 * q], upper));
    }
    _mm512_store_si512(out + 64 * 21, last[15]);
}

// ---- activations ----

// Levels of one block to 22 addresses of rows, relative to the table, kRows apart: rows that are worked on together lie
// beside each other.
inline void make_addresses(const int8_t* levels, __m512i shift, bool halve, uint16_t* out) {
    __m512i codes = _mm512_add_epi8(_mm512_loadu_si512(levels), shift);
    if (halve) codes = _mm512_srli_epi16(codes, 1);  // even numbers: no bit crosses a byte
    codes = _mm512_and_si512(codes, _mm512_set1_epi8(3));  // padding could be anything
    const auto part = [&](int i) { return _mm256_cvtepu8_epi16(i == 0   ? _mm512_castsi512_si128(codes)
                                                               : i == 1 ? _mm512_extracti32x4_epi32(codes, 1)
                                                               : i == 2 ? _mm512_extracti32x4_epi32(codes, 2)
                                                                        : _mm512_extracti32x4_epi32(codes, 3)); };
    const __m256i first = _mm256_or_si256(_mm256_slli_epi16(part(0), 6),
                                          _mm256_or_si256(_mm256_slli_epi16(part(1), 8), _mm256_slli_epi16(part(2), 10)));
    alignas(32) uint16_t early[16], last[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(early), first);
    _mm256_store_si256(reinterpret_cast<__m256i*>(last), part(3));
    BELLBOX_UNROLL
    for (int i = 0; i < 16; ++i) out[kRows * i] = early[i];
    BELLBOX_UNROLL
    for (int q = 0; q < 5; ++q)
        out[kRows * (16 + q)] = static_cast<uint16_t>(last[3 * q] << 6 | last[3 * q + 1] << 8 | last[3 * q + 2] << 10);
    out[kRows * 21] = static_cast<uint16_t>(last[15] << 6);
}

// ---- product ----

// Adds the lookups of ROWS rows and 64 outputs to sums [ROWS][4 tiles][16]. addresses: [lookups][kRows].
template <int ROWS>
void multiply(const uint8_t* codes, const uint16_t* addresses, int64_t lookups, bool first, int32_t* sums) {
    const uint8_t* table = &kTable.row[0][0];
    // Of the bytes at even and odd places: odd, and even + 256 odd modulo 2^16, which costs an operation less.
    __m512i both[ROWS], odd[ROWS];
    BELLBOX_UNROLL
    for (int r = 0; r < ROWS; ++r) both[r] = odd[r] = _mm512_setzero_si512();
    for (int64_t begin = 0; begin < lookups; begin += kRun, codes += 64 * kRun, addresses += kRows * kRun) {
        __m512i bytes[ROWS];
        BELLBOX_UNROLL
        for (int i = 0; i < kRun; ++i) {
            const __m512i index = _mm512_load_si512(codes + 64 * i);
            uint64_t some = 0;
            BELLBOX_UNROLL
            for (int r = 0; r < ROWS; ++r) {
                if (r % 4 == 0) memcpy(&some, addresses + kRows * i + r, 8);  // the tables keep loads busy enough
                const uint64_t address = r % 4 == 3 ? some >> 48 : some >> 16 * (r % 4) & 0xffff;
                const __m512i found = _mm512_permutexvar_epi8(index, _mm512_load_si512(table + address));
                bytes[r] = i == 0 ? found : _mm512_add_epi8(bytes[r], found);
                // One after the other: the compiler would look all of a run up first, and spill them.
                __asm__("" : "+v"(bytes[r]));
            }
        }
        BELLBOX_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            both[r] = _mm512_add_epi16(both[r], bytes[r]);
            odd[r] = _mm512_add_epi16(odd[r], _mm512_srli_epi16(bytes[r], 8));
        }
    }
    const __m512i low_words = _mm512_set1_epi32(0x0000ffff);
    BELLBOX_UNROLL
    for (int r = 0; r < ROWS; ++r) {  // byte 4 d + t belongs to output d of tile t
        const __m512i even = _mm512_sub_epi16(both[r], _mm512_slli_epi16(odd[r], 8));
        const __m512i tiles[4] = {_mm512_and_si512(even, low_words), _mm512_and_si512(odd[r], low_words),
                                  _mm512_srli_epi32(even, 16), _mm512_srli_epi32(odd[r], 16)};
        BELLBOX_UNROLL
        for (int t = 0; t < 4; ++t) {
            int32_t* to = sums + (4 * r + t) * 16;
            _mm512_store_si512(to, first ? tiles[t] : _mm512_add_epi32(tiles[t], _mm512_load_si512(to)));
        }
    }
}

// Any number of rows, kRows at a time; addresses: [groups of kRows][stride][kRows].
inline void multiply_rows(const uint8_t* codes, const uint16_t* addresses, int64_t stride, int64_t lookups, bool first,
                          int64_t rows, int32_t* sums) {
    for (; rows > 0; rows -= kRows, addresses += kRows * stride, sums += kRows * 64) {
        if (rows > 4)
            multiply<kRows>(codes, addresses, lookups, first, sums);
        else if (rows > 2)
            multiply<4>(codes, addresses, lookups, first, sums);
        else
            multiply<2>(codes, addresses, lookups, first, sums);
    }
}

inline void linear(const LinearArgs& a, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end) {
    using L = Layout<2>;
    const int64_t blocks = (a.weights->k + 63) / 64, tile_bytes = blocks * L::bytes;
    const int64_t pieces = (blocks + kDepth - 1) / kDepth, stride = pieces * kPiece;
    alignas(64) uint8_t codes[kPiece * 64] = {};  // those past the last lookup meet rows of zeros
    alignas(64) int32_t sums[kRowBlock * kTiles * 16];
    const Scratch scratch((smaller(m_end - m_begin, kRowBlock) + kRows - 1) / kRows * kRows * stride / 2);
    uint16_t* const addresses = reinterpret_cast<uint16_t*>(scratch.data);
    const __m512i shift = _mm512_set1_epi8(static_cast<char>(a.act_shift));
    for (int64_t begin = m_begin; begin < m_end; begin += kRowBlock) {
        const int64_t end = smaller(begin + kRowBlock, m_end);
        memset(addresses, 0, static_cast<size_t>((end - begin + kRows - 1) / kRows * kRows * stride) * 2);
        for (int64_t row = begin; row < end; ++row)
            for (int64_t b = 0; b < blocks; ++b)
                make_addresses(a.levels + row * a.ldl + 64 * b, shift, a.act_multiplier == 2,
                               addresses + (row - begin) / kRows * kRows * stride + (row - begin) % kRows +
                                   kRows * (b / kDepth * kPiece + b % kDepth * kLookups));
        for (int64_t tile = tile_begin; tile < tile_end; tile += kTiles) {
            const int tiles = static_cast<int>(smaller(kTiles, tile_end - tile));
            for (int64_t i = 0; i < pieces; ++i) {
                const int64_t from = i * kDepth, size = smaller(kDepth, blocks - from);
                for (int64_t b = 0; b < size; ++b)
                    unpack(a.weights->data + tile * tile_bytes + (from + b) * L::bytes, tile_bytes, tiles,
                           codes + b * kLookups * 64);
                const int64_t lookups = (size * kLookups + kRun - 1) / kRun * kRun;
                multiply_rows(codes, addresses + kRows * i * kPiece, stride, lookups, i == 0, end - begin, sums);
            }
            for (int t = 0; t < tiles; ++t) {
                const binary::Counts counts(a, tile + t);
                for (int64_t r = 0; r < end - begin; ++r)
                    counts(a, begin + r, _mm512_load_si512(sums + (4 * r + t) * 16));
            }
        }
    }
}

}  // namespace lookup
}  // namespace avx512
}  // namespace
}  // namespace bellbox
