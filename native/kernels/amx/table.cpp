// The kernels for one instruction set: amx, which is avx512 with another product for many rows.
#include "kernels/kernels.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels/amx/linear.h"

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

// As native/kernels/peak.h: four sums from two tiles of levels and two of codes, all in registers.
int64_t amx_integer_peak(int64_t rounds) {
    alignas(64) const int8_t ones[64] = {1, 1, 1, 1};
    amx::load_config(amx::whole_tiles());
    amx::zero<0>(), amx::zero<1>(), amx::zero<2>(), amx::zero<3>();
    amx::load<4>(ones, 0), amx::load<5>(ones, 0), amx::load<6>(ones, 0), amx::load<7>(ones, 0);
    for (int64_t i = 0; i < rounds; ++i)
        amx::multiply<0, 4, 6>(), amx::multiply<1, 4, 7>(), amx::multiply<2, 5, 6>(), amx::multiply<3, 5, 7>();
    amx::release();
    return rounds * 4 * 16 * 16 * 64;
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
