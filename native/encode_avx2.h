// encode for avx2.
#pragma once
#include "encode_portable.h"
namespace bellbox {
namespace {
namespace avx2 {
using portable::encode;
using portable::row_norms;
using portable::forward;
using portable::backward;
}
}
}
