// The tile instructions that the product needs, written as assembly: the intrinsics of g++ 12 declare too small an
// operand for the configuration and no memory for loads and stores, so that the compiler drops stores before them.
//
// With BELLBOX_AMX_EMULATED the same functions are plain C++ on tiles in memory, bit for bit what the manual defines:
// the logic around them can then be tested on a processor without AMX. That build is for tests alone.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace bellbox {
namespace {
namespace amx {

struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t columns[16] = {};  // bytes of a row of each tile
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "the instruction reads 64 bytes");

#ifndef BELLBOX_AMX_EMULATED

inline void load_config(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory"); }
inline void release() { __asm__ volatile("tilerelease" : : : "memory"); }

template <int T>
inline void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(T) : "memory");
}
template <int T>
inline void load(const void* p, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void store(void* p, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
// C += A (signed bytes) times B (unsigned bytes).
template <int C, int A, int B>
inline void multiply() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B) : "memory");
}

#else

struct Tiles {
    TileConfig config;
    bool configured = false;
    uint8_t bytes[8][16][64];
};
inline thread_local Tiles tiles;

inline void require(bool condition) {
    if (!condition) abort();  // the processor would raise an exception
}
inline void load_config(const TileConfig& config) {
    require(config.palette == 1 && config.start_row == 0);
    for (int t = 0; t < 8; ++t) require(config.rows[t] <= 16 && config.columns[t] <= 64);
    tiles.config = config;
    tiles.configured = true;
    memset(tiles.bytes, 0, sizeof(tiles.bytes));
}
inline void release() { tiles.configured = false; }
inline void require_tile(int t) { require(tiles.configured && tiles.config.rows[t] > 0 && tiles.config.columns[t] > 0); }

template <int T>
inline void zero() {
    require_tile(T);
    memset(tiles.bytes[T], 0, sizeof(tiles.bytes[T]));
}
template <int T>
inline void load(const void* p, int64_t stride) {
    require_tile(T);
    memset(tiles.bytes[T], 0, sizeof(tiles.bytes[T]));
    for (int r = 0; r < tiles.config.rows[T]; ++r)
        memcpy(tiles.bytes[T][r], static_cast<const char*>(p) + r * stride, tiles.config.columns[T]);
}
template <int T>
inline void store(void* p, int64_t stride) {
    require_tile(T);
    for (int r = 0; r < tiles.config.rows[T]; ++r)
        memcpy(static_cast<char*>(p) + r * stride, tiles.bytes[T][r], tiles.config.columns[T]);
}
template <int C, int A, int B>
inline void multiply() {
    require_tile(C), require_tile(A), require_tile(B);
    const TileConfig& config = tiles.config;
    require(config.rows[A] == config.rows[C] && config.columns[B] == config.columns[C]);
    require(config.columns[A] == 4 * config.rows[B]);
    for (int m = 0; m < config.rows[C]; ++m)
        for (int n = 0; n < config.columns[C] / 4; ++n) {
            int32_t sum;
            memcpy(&sum, &tiles.bytes[C][m][4 * n], 4);
            for (int k = 0; k < config.columns[A]; ++k)
                sum += static_cast<int8_t>(tiles.bytes[A][m][k]) * tiles.bytes[B][k / 4][4 * n + k % 4];
            memcpy(&tiles.bytes[C][m][4 * n], &sum, 4);
        }
}

#endif

}  // namespace amx
}  // namespace
}  // namespace bellbox
