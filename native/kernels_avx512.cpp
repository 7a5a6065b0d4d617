// The kernels for one instruction set: avx512.
#include "kernels.h"

#define BELLBOX_NAMESPACE avx512
#include "binary_avx512.h"
#include "decoder.h"
#include "encode_avx512.h"
#include "linear_avx512.h"
#include "training_avx512.h"

namespace bellbox {
namespace {
namespace avx512 {

void linear(const LinearArgs& a, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end) {
    if (binary::serves(a)) return binary::linear(a, m_begin, m_end, tile_begin, tile_end);
    switch (a.weights->bits) {
        case 1: return product::linear<1>(a, m_begin, m_end, tile_begin, tile_end);
        case 2: return product::linear<2>(a, m_begin, m_end, tile_begin, tile_end);
        case 3: return product::linear<3>(a, m_begin, m_end, tile_begin, tile_end);
        default: return product::linear<4>(a, m_begin, m_end, tile_begin, tile_end);
    }
}

}  // namespace avx512
}  // namespace

const Kernels avx512_kernels = {
    "avx512",       avx512::encode,   avx512::rotate, avx512::forward,    avx512::backward,
    avx512::linear, avx512::rms_norm, avx512::attend, avx512::int8_linear};
}  // namespace bellbox
