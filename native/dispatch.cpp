// Which instruction set to use, and the one weight layout that all of them read.
#ifdef BELLBOX_X86
#include <cpuid.h>
#endif
#ifdef BELLBOX_ARM
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels/kernels.h"
#include "self_check.h"

namespace bellbox {
namespace {

struct Candidate {
    const Kernels* kernels;
    bool (*runs)();
};

bool always() { return true; }

#ifdef BELLBOX_X86
bool has_f16c() {  // of which not every compiler's __builtin_cpu_supports knows
    unsigned int a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && has_f16c();
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512bitalg");
}
#ifndef BELLBOX_ONLY
bool amx_agrees() {
    static const bool agrees = [] {
        if (same_products(amx_kernels, avx512_kernels)) return true;
        std::fprintf(stderr,
                     "bellbox: AMX gives other sums than AVX-512 on this processor, so AVX-512 is used: please report it\n");
        return false;
    }();
    return agrees;
}
bool has_amx() {
#ifdef BELLBOX_AMX_TRAPPED  // native/tests/check_amx.h
    return has_avx512() && amx_agrees();
#else
    return has_avx512() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") && amx_permitted() &&
           amx_agrees();
#endif
}
#endif
#endif

#ifdef BELLBOX_ARM
#if defined(__linux__)
// Bits of the kernel's interface (arch/arm64/include/uapi/asm/hwcap.h), which headers of old systems do not name.
constexpr unsigned long kDotProducts = 1ul << 20, kMatrixProducts = 1ul << 13;  // of AT_HWCAP, of AT_HWCAP2
bool has_dotprod() { return (getauxval(AT_HWCAP) & kDotProducts) != 0; }
bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) & kMatrixProducts) != 0; }
#elif defined(__APPLE__)
bool says_yes(const char* name) {
    int value = 0;
    size_t size = sizeof(value);
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dotprod() { return says_yes("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_dotprod() && says_yes("hw.optional.arm.FEAT_I8MM"); }
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif
#endif

#ifdef BELLBOX_ONLY  // one instruction set, by its name (CMake's BELLBOX_ISA)
[[maybe_unused]] constexpr auto has_portable = always, has_neon = always;
#define BELLBOX_JOIN(a, b) a##b
#define BELLBOX_JOINED(a, b) BELLBOX_JOIN(a, b)
const Candidate kCandidates[] = {{&BELLBOX_JOINED(BELLBOX_ONLY, _kernels), BELLBOX_JOINED(has_, BELLBOX_ONLY)}};
#else
const Candidate kCandidates[] = {
#ifdef BELLBOX_ARM
    {&i8mm_kernels, has_i8mm},
    {&dotprod_kernels, has_dotprod},
    {&neon_kernels, always},  // part of every processor of 64 bits
#endif
#ifdef BELLBOX_X86
    {&amx_kernels, has_amx},
    {&avx512_kernels, has_avx512},
    {&avx2_kernels, has_avx2},
#endif
#ifdef __wasm_simd128__
    {&wasm_kernels, always},
#endif
    {&portable_kernels, always},
};
#endif

const Kernels* choose(const char* wanted) {
    const bool any = wanted == nullptr || *wanted == '\0';
    for (const Candidate& each : kCandidates) {
        if (any ? each.runs() : std::strcmp(each.kernels->name, wanted) == 0) {
            if (each.runs()) return each.kernels;
            throw std::runtime_error(std::string("BELLBOX_ISA=") + wanted + ": this processor cannot run it; it runs: " +
                                     available());
        }
    }
    if (any) throw std::runtime_error(std::string("this processor cannot run ") + kCandidates[0].kernels->name + ", which this program was built for alone");
    throw std::runtime_error(std::string("BELLBOX_ISA=") + wanted + ": unknown; this processor runs: " + available());
}

std::atomic<const Kernels*> current{nullptr};

uint8_t code_at(const uint8_t* codes, int64_t ldc, int64_t n, int64_t k, int64_t row, int64_t column) {
    return row < n && column < k ? codes[row * ldc + column] : 0;
}

// `width` bits of each code, from bit `low` on, as 2*width vectors of one block of 16 rows and 64 columns.
void pack_field(const uint8_t* codes, int64_t ldc, int64_t n, int64_t k, int64_t row0, int64_t column0, int low, int width,
                uint8_t* out) {
    const int vectors = 2 * width, fields = 8 / width;
    const uint8_t mask = static_cast<uint8_t>((1u << width) - 1);
    if (row0 + 16 <= n && column0 + 64 <= k) {  // four columns at a time
        const uint32_t masks = 0x01010101u * mask;
        for (int r = 0; r < 16; ++r) {
            uint32_t groups[16];
            std::memcpy(groups, codes + (row0 + r) * ldc + column0, sizeof(groups));
            for (int j = 0; j < vectors; ++j) {
                uint32_t word = 0;
                for (int f = 0; f < fields; ++f) word |= ((groups[f * vectors + j] >> low) & masks) << (f * width);
                std::memcpy(out + 64 * j + 4 * r, &word, sizeof(word));
            }
        }
        return;
    }
    for (int j = 0; j < vectors; ++j)
        for (int r = 0; r < 16; ++r)
            for (int c = 0; c < 4; ++c) {
                uint8_t byte = 0;
                for (int f = 0; f < fields; ++f) {
                    const int group = f * vectors + j;
                    const uint8_t code = code_at(codes, ldc, n, k, row0 + r, column0 + 4 * group + c);
                    byte = static_cast<uint8_t>(byte | (((code >> low) & mask) << (f * width)));
                }
                out[64 * j + 4 * r + c] = byte;
            }
}

}  // namespace

#if defined(BELLBOX_ARM) && !defined(BELLBOX_ONLY)
// Copies are made at run time: here, where every processor has the instructions for it.
namespace {
Kernels neon_with(const char* name, const Products& products) {
    Kernels kernels = neon_kernels;
    kernels.name = name;
    kernels.linear = products.linear, kernels.int8_linear = products.int8_linear, kernels.int4_linear = products.int4_linear;
    kernels.integer_peak = products.integer_peak;
    return kernels;
}
}  // namespace
const Kernels dotprod_kernels = neon_with("dotprod", dotprod_products);
const Kernels i8mm_kernels = neon_with("i8mm", i8mm_products);
#endif

#if defined(BELLBOX_X86) && !defined(BELLBOX_ONLY)
// A copy is made at run time: here, where every processor has the instructions for it.
const Kernels amx_kernels = [] {
    Kernels kernels = avx512_kernels;
    kernels.name = "amx";
    kernels.linear = amx_linear;
    kernels.integer_peak = amx_integer_peak;
    kernels.counts = nullptr;
    kernels.make_planes = nullptr, kernels.convolve = nullptr, kernels.joined = 0;
    return kernels;
}();
#endif

const Kernels& kernels() {
    const Kernels* chosen = current.load(std::memory_order_relaxed);
    if (chosen == nullptr) {
        chosen = choose(std::getenv("BELLBOX_ISA"));
        current.store(chosen, std::memory_order_relaxed);
    }
    return *chosen;
}

void use(const char* name) { current.store(choose(name), std::memory_order_relaxed); }

const char* available() {
    static const std::string names = [] {
        std::string text;
        for (const Candidate& each : kCandidates)
            if (each.runs()) text += (text.empty() ? "" : ", ") + std::string(each.kernels->name);
        return text;
    }();
    return names.c_str();
}

size_t packed_size(int32_t bits, int64_t n, int64_t k) {
    return static_cast<size_t>((n + 15) / 16) * static_cast<size_t>((k + 63) / 64) * 128u * static_cast<size_t>(bits);
}

void pack(const uint8_t* codes, int64_t ldc, int32_t bits, int64_t n, int64_t k, int64_t row_begin, int64_t row_end, uint8_t* out) {
    out += row_begin / 16 * ((k + 63) / 64) * 128 * bits;
    for (int64_t row = row_begin; row < row_end; row += 16)
        for (int64_t column = 0; column < k; column += 64, out += 128 * bits) {
            if (bits == 3) {
                pack_field(codes, ldc, n, k, row, column, 0, 2, out);
                pack_field(codes, ldc, n, k, row, column, 2, 1, out + 256);
            } else {
                pack_field(codes, ldc, n, k, row, column, 0, bits, out);
            }
        }
}

void unpack(const uint8_t* data, int32_t bits, int64_t n, int64_t k, uint8_t* codes) {
    const int64_t blocks = (k + 63) / 64;
    const auto field = [&](const uint8_t* vectors, int width, int64_t row, int64_t column) {
        const int64_t group = column / 4, count = 2 * width, f = group / count;
        return static_cast<uint8_t>((vectors[64 * (group % count) + 4 * row + column % 4] >> (f * width)) & ((1 << width) - 1));
    };
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < k; ++j) {
            const uint8_t* block = data + (i / 16 * blocks + j / 64) * 128 * bits;
            codes[i * k + j] = bits != 3 ? field(block, bits, i % 16, j % 64)
                                         : static_cast<uint8_t>(field(block, 2, i % 16, j % 64) |
                                                                field(block + 256, 1, i % 16, j % 64) << 2);
        }
}

#if defined(BELLBOX_X86) && defined(__linux__)
__attribute__((target_clones("avx2", "default")))
#endif
uint64_t fingerprint(const void* data, size_t bytes) {
    // 64 lanes, each a one-to-one function of its last word: a change of one word always shows.
    constexpr size_t kLanes = 64;
    uint32_t lanes[kLanes];
    for (size_t l = 0; l < kLanes; ++l) lanes[l] = static_cast<uint32_t>(0x9e3779b9u * (l + 1));
    const uint8_t* p = static_cast<const uint8_t*>(data);
    size_t i = 0;
    for (; i + 4 * kLanes <= bytes; i += 4 * kLanes) {
        uint32_t words[kLanes];
        std::memcpy(words, p + i, sizeof(words));
        for (size_t l = 0; l < kLanes; ++l) lanes[l] = (lanes[l] ^ words[l]) * 0x85ebca6bu;
    }
    uint64_t all = 0xcbf29ce484222325ull ^ bytes;
    const auto mix = [&all](uint64_t value) {
        all = (all ^ value) * 0x9e3779b97f4a7c15ull;
        all ^= all >> 29;
    };
    for (; i < bytes; ++i) mix(p[i]);
    for (size_t l = 0; l < kLanes; ++l) mix(lanes[l]);
    return all;
}

}  // namespace bellbox
