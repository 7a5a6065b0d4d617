// An embedding or a head, in every precision that a folder holds.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "layers/head.h"
#include "layers/table.h"
#include "runtime/folder/description.h"
#include "runtime/folder/store.h"

namespace bellbox {

struct Table {
    int64_t rows = 0, columns = 0;
    int bits = 32;
    int64_t group = 0;
    Floats floats;                            // of 32 and 16 bits
    std::vector<uint8_t> bytes, multipliers;  // of 8 and 4
    Floats scale, bias;

    void row(int64_t number, float* out) const {
        if (bits >= 16) return void(std::memcpy(out, floats.data() + number * columns, static_cast<size_t>(columns) * sizeof(float)));
        TableRowsArgs a{};
        if (bits == 8) a.bytes = reinterpret_cast<const int8_t*>(bytes.data());
        else a.halves = bytes.data(), a.multipliers = multipliers.data();
        a.scale = scale.data(), a.columns = columns, a.groups = bits == 4 ? columns / group : 1;
        table_row(a, number, out);
    }
    // Logits of x [columns].
    void product(const float* x, float* out, int threads) const {
        if (bits == 8)
            run_int8_linear(x, Int8LinearArgs{nullptr, nullptr, reinterpret_cast<const int8_t*>(bytes.data()), scale.data(), 1, rows, columns, out}, threads);
        else if (bits == 4)
            run_int4_linear(x, Int4LinearArgs{nullptr, nullptr, nullptr, nullptr, bytes.data(), multipliers.data(), scale.data(), 1, rows, columns, group, out}, threads);
        else if (bits == 32)
            run_float_linear(FloatLinearArgs{x, floats.data(), 1, rows, columns, out}, threads);
        else
            in_bf16(x, out, threads);
        for (size_t i = 0; i < bias.size(); ++i) out[i] += bias[i];
    }

    // fp32 numbers to bf16 (16), 8 or 4 bits, as src/bellbox/core/table.py rounds them.
    void round(int to, const char* what) {
        if (to != 16 && to != 8 && to != 4) throw Error("embeddings can have 16 (bf16), 8 or 4 bits, not " + std::to_string(to));
        if (to != 16 && columns > 8192) throw Error(std::string(what) + " has more than the 8192 columns that a head takes; use bf16");
        if (to == 4 && columns % 32 != 0) throw Error(std::string(what) + ": groups of 32 do not divide its " + std::to_string(columns) + " columns; use int8");
        bits = to;
        if (to == 16) {
            for (float& each : floats) each = rounded_to_bf16(each);
            return;
        }
        group = to == 8 ? columns : columns % 64 == 0 ? 64 : 32;
        scale.resize(static_cast<size_t>(rows)), bytes.resize(static_cast<size_t>(rows * columns * to / 8));
        if (to == 4) multipliers.resize(static_cast<size_t>(rows * (columns / group)));
        for (int64_t i = 0; i < rows; ++i)
            if (!round_row(i)) throw Error(std::string(what) + " holds NaN or infinity and cannot be rounded; look at the weights");
        Floats().swap(floats);
    }

  private:
    // False where it is not finite.
    bool round_row(int64_t row) {
        const float* const x = floats.data() + row * columns;
        const auto largest = [x](int64_t begin, int64_t end) {
            float most = 0;
            for (int64_t j = begin; j < end; ++j) most = std::max(most, std::isfinite(x[j]) ? std::abs(x[j]) : INFINITY);
            return most;
        };
        const float whole = largest(0, columns), most = bits == 8 ? 127.0f : 7.0f;
        const float worth = scale[static_cast<size_t>(row)] = bits == 8 ? whole / most : whole / (most * 255.0f);
        for (int64_t begin = 0; begin < columns; begin += group) {
            float unit = worth;
            if (bits == 4) {  // rounded up, so that the largest of the group stays within the integers
                const float share = whole > 0 ? std::min(std::ceil(largest(begin, begin + group) / whole * 255.0f), 255.0f) : 0.0f;
                multipliers[static_cast<size_t>((row * columns + begin) / group)] = static_cast<uint8_t>(std::isfinite(share) ? share : 0.0f);
                unit *= share;
            }
            for (int64_t j = begin; j < begin + group && std::isfinite(whole); ++j) {
                const int integer = static_cast<int>(std::clamp(std::nearbyint(x[j] / std::max(unit, 1e-30f)), -most, most));
                if (bits == 8) bytes[static_cast<size_t>(row * columns + j)] = static_cast<uint8_t>(static_cast<int8_t>(integer));
                else bytes[static_cast<size_t>((row * columns + j) / 2)] |= static_cast<uint8_t>((integer + 8) << 4 * (j % 2));
            }
        }
        return std::isfinite(worth);
    }

    void in_bf16(const float* x, float* out, int threads) const {
        Floats rounded(x, x + columns);
        for (float& each : rounded) each = rounded_to_bf16(each);
        run_float_linear(FloatLinearArgs{rounded.data(), floats.data(), 1, rows, columns, out}, threads);
        for (int64_t i = 0; i < rows; ++i) out[i] = rounded_to_bf16(out[i]);
    }
};

inline Table read_table(const Description& described, Store& store, const std::string& name, int64_t rows, int64_t columns) {
    Table table;
    table.rows = rows, table.columns = columns;
    const auto found = described.tables.find(name);
    if (found != described.tables.end()) table.bits = found->second.bits, table.group = found->second.group;
    const auto copied = [](std::string_view bytes) { return std::vector<uint8_t>(bytes.begin(), bytes.end()); };
    if (table.bits == 32) {
        table.floats = store.floats(name + ".weight", {rows, columns});
    } else if (table.bits == 16) {
        store.bytes(name + ".weight", Number::bf16, {rows, columns});
        table.floats = store.floats(name + ".weight", {rows, columns});
    } else {
        if (table.bits == 4 && columns % table.group != 0) store.refuse(name + ".weight", "has columns that its group does not divide");
        if (columns > 8192) store.refuse(name + ".weight", "has more than the 8192 columns that a head takes");
        if (table.bits == 4) table.multipliers = copied(store.bytes(name + ".multipliers", Number::u8, {rows, columns / table.group}));
        table.bytes = copied(store.bytes(name + ".weight", table.bits == 8 ? Number::i8 : Number::u8, {rows, table.bits == 8 ? columns : columns / 2}));
        table.scale = store.scales(name + ".scale", rows);
    }
    return table;
}

}  // namespace bellbox
