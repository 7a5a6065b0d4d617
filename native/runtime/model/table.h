// An embedding or a head, in every precision that a folder holds.
#pragma once

#include <algorithm>
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

  private:
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
