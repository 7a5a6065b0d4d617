// linear for avx2.
#pragma once
#include "linear_portable.h"
namespace bellbox {
namespace {
namespace avx2 {
using portable::linear;
}
}
}
