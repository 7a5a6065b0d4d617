// The tile instructions that the product needs, written as assembly: the intrinsics of g++ 12 declare too small an
// operand for the configuration and no memory for loads and stores, so that the compiler drops stores before them.
#pragma once

#include <cstdint>

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

}  // namespace amx
}  // namespace
}  // namespace bellbox
