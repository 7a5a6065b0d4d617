// linear for avx512.
#pragma once
#include "linear_portable.h"
namespace bellbox {
namespace {
namespace avx512 {
using portable::linear;
}
}
}
