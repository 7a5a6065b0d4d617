// The kernels for one instruction set: amx, which is avx512 with another product for many rows.
#include "kernels.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "linear_amx.h"

namespace bellbox {

void amx_linear(const LinearArgs& a, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end) {
    if (m_end - m_begin <= amx::kFewRows || tile_begin >= tile_end)
        return avx512_kernels.linear(a, m_begin, m_end, tile_begin, tile_end);
    switch (a.weights->bits) {
        case 1: return amx::linear<1>(a, m_begin, m_end, tile_begin, tile_end);
        case 2: return amx::linear<2>(a, m_begin, m_end, tile_begin, tile_end);
        case 3: return amx::linear<3>(a, m_begin, m_end, tile_begin, tile_end);
        default: return amx::linear<4>(a, m_begin, m_end, tile_begin, tile_end);
    }
}

// Linux gives the state of tiles to a process that asks; all threads of it, those that run too, then have it.
bool amx_permitted() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return granted;
#else
    return false;
#endif
}
}  // namespace bellbox
