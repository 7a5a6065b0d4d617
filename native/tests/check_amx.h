// AMX for a processor without it: the invalid-instruction signal of each tile instruction is caught, the instruction is
// decoded from its bytes and carried out in memory as the manual defines it (Intel 64 and IA-32 Software Developer's
// Manual, volume 2, "Intel AMX Instructions"). So the tests run the very code that a processor with AMX runs. For
// tests/check.cpp alone.
#pragma once

#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace bellbox {
namespace trap {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct State {
    bool configured = false;
    uint8_t rows[kTiles];
    uint16_t columns[kTiles];  // bytes of a row
    uint8_t bytes[kTiles][kRows][kRowBytes];
};
inline thread_local State state;
inline std::atomic<long> executed{0};  // tile instructions

inline void require(bool condition, const char* rule) {
    if (condition) return;
    std::fprintf(stderr, "amx: %s\n", rule);  // where the processor would raise an exception
    std::abort();
}

// One instruction: VEX.128.<prefix>.0F38.W0 <opcode> with its operands.
struct Instruction {
    int prefix, opcode, reg, rm, vvvv, mod;
    const uint8_t* end;
    char* address = nullptr;  // of the operand in memory
    int64_t stride = 0;       // from row to row of it
};

inline int64_t register_of(const ucontext_t& context, int number) {
    static const int names[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return context.uc_mcontext.gregs[names[number]];
}

inline bool decode(const ucontext_t& context, Instruction& i) {
    const uint8_t* p = reinterpret_cast<const uint8_t*>(context.uc_mcontext.gregs[REG_RIP]);
    if (p[0] != 0xC4 || (p[1] & 31) != 2 || (p[2] & 0x84) != 0) return false;  // VEX with three bytes, map 0F38, W0, 128
    const int r = p[1] & 0x80 ? 0 : 8, x = p[1] & 0x40 ? 0 : 8, b = p[1] & 0x20 ? 0 : 8;
    i.vvvv = ~(p[2] >> 3) & 15, i.prefix = p[2] & 3, i.opcode = p[3];
    if (i.opcode != 0x49 && i.opcode != 0x4B && i.opcode != 0x5E) return false;
    i.mod = p[4] >> 6, i.reg = (p[4] >> 3 & 7) + r, i.rm = (p[4] & 7) + b;
    p += 5;
    if (i.mod != 3) {
        int64_t base = 0, displacement = 0;
        bool relative = false, without_base = false;
        if ((i.rm & 7) == 4) {
            const int index = (*p >> 3 & 7) + x, low = *p & 7;
            if (index != 4) i.stride = register_of(context, index) << (*p >> 6);
            without_base = low == 5 && i.mod == 0;
            if (!without_base) base = register_of(context, low + b);
            ++p;
        } else {
            relative = without_base = (i.rm & 7) == 5 && i.mod == 0;
            if (!relative) base = register_of(context, i.rm);
        }
        if (i.mod == 1) displacement = static_cast<int8_t>(*p++);
        if (i.mod == 2 || without_base) {
            int32_t wide;
            memcpy(&wide, p, 4);
            displacement = wide, p += 4;
        }
        if (relative) base = reinterpret_cast<int64_t>(p);
        i.address = reinterpret_cast<char*>(base + displacement);
    }
    i.end = p;
    return true;
}

inline void require_tile(int t) {
    require(t < kTiles, "there are eight tiles");
    require(state.configured && state.rows[t] > 0 && state.columns[t] > 0, "a tile that is not configured");
}

inline void configure(const char* address) {
    uint8_t config[64];
    memcpy(config, address, 64);
    require(config[0] == 1 && config[1] == 0, "palette 1 from row 0");
    for (int i = 2; i < 16; ++i) require(config[i] == 0, "reserved bytes of the configuration are 0");
    for (int t = 0; t < 16; ++t) {
        uint16_t columns;
        memcpy(&columns, config + 16 + 2 * t, 2);
        const uint8_t rows = config[48 + t];
        require(rows <= kRows && columns <= kRowBytes && (rows == 0) == (columns == 0), "a tile of at most 16 rows of 64 bytes");
        require(t < kTiles || rows == 0, "there are eight tiles");
        if (t < kTiles) state.rows[t] = rows, state.columns[t] = columns;
    }
    memset(state.bytes, 0, sizeof(state.bytes));
    state.configured = true;
}

template <typename Left, typename Right>
void multiply(int c, int a, int b) {
    for (int m = 0; m < state.rows[c]; ++m)
        for (int n = 0; n < state.columns[c] / 4; ++n) {
            int32_t sum;
            memcpy(&sum, &state.bytes[c][m][4 * n], 4);
            for (int k = 0; k < state.columns[a]; ++k)
                sum += static_cast<Left>(state.bytes[a][m][k]) * static_cast<Right>(state.bytes[b][k / 4][4 * n + k % 4]);
            memcpy(&state.bytes[c][m][4 * n], &sum, 4);
        }
}

inline void multiply(const Instruction& i) {
    const int c = i.reg, a = i.rm, b = i.vvvv;
    require_tile(c), require_tile(a), require_tile(b);
    require(c != a && c != b && a != b, "three different tiles");
    require(state.rows[a] == state.rows[c] && state.columns[b] == state.columns[c] && state.columns[a] == 4 * state.rows[b],
            "tiles that fit each other");
    switch (i.prefix) {
        case 0: return multiply<uint8_t, uint8_t>(c, a, b);  // tdpbuud
        case 1: return multiply<uint8_t, int8_t>(c, a, b);   // tdpbusd
        case 2: return multiply<int8_t, uint8_t>(c, a, b);   // tdpbsud
        default: return multiply<int8_t, int8_t>(c, a, b);   // tdpbssd
    }
}

inline bool execute(const Instruction& i) {
    if (i.opcode == 0x5E && i.mod == 3) {
        multiply(i);
    } else if (i.opcode == 0x4B && i.mod != 3 && (i.rm & 7) == 4) {  // tileloadd, tileloaddt1, tilestored
        require_tile(i.reg);
        if (i.prefix == 0) return false;
        if (i.prefix != 2) memset(state.bytes[i.reg], 0, sizeof(state.bytes[i.reg]));
        for (int r = 0; r < state.rows[i.reg]; ++r) {
            char* const memory = i.address + r * i.stride;
            uint8_t* const tile = state.bytes[i.reg][r];
            if (i.prefix == 2)
                memcpy(memory, tile, state.columns[i.reg]);
            else
                memcpy(tile, memory, state.columns[i.reg]);
        }
    } else if (i.opcode == 0x49 && i.prefix == 0 && i.mod != 3 && i.reg == 0) {  // ldtilecfg
        configure(i.address);
    } else if (i.opcode == 0x49 && i.prefix == 0 && i.mod == 3 && i.reg == 0 && i.rm == 0) {  // tilerelease
        state.configured = false;
    } else if (i.opcode == 0x49 && i.prefix == 3 && i.mod == 3 && i.rm == 0) {  // tilezero
        require_tile(i.reg);
        memset(state.bytes[i.reg], 0, sizeof(state.bytes[i.reg]));
    } else {
        return false;
    }
    return true;
}

inline void handle(int, siginfo_t*, void* opaque) {
    ucontext_t& context = *static_cast<ucontext_t*>(opaque);
    Instruction instruction;
    require(decode(context, instruction) && execute(instruction), "not a tile instruction");
    ++executed;
    context.uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(instruction.end);
}

inline void install() {
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO;
    require(sigaction(SIGILL, &action, nullptr) == 0, "the signal cannot be caught");
}

}  // namespace trap
}  // namespace bellbox
