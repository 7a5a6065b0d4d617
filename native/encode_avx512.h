// encode for avx512.
#pragma once
#include "encode_portable.h"
namespace bellbox {
namespace {
namespace avx512 {
using portable::encode;
using portable::row_norms;
using portable::forward;
using portable::backward;
}
}
}
