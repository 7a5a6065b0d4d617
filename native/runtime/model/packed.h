// A packed layer of a folder: its codes laid out for the kernels, and what a call needs of it.
#pragma once

#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "layers/block.h"
#include "runtime/folder/description.h"
#include "runtime/folder/store.h"
#include "runtime/folder/unpack.h"

namespace bellbox {

struct PackedLayer {
    Aligned<uint8_t> memory;
    Floats scale, bias, thresholds;
    float act_scale = 1;
    Coding coding{};
    std::unique_ptr<PackedWeights> weights;
};

inline const uint8_t* stored_codes(Store& store, const std::string& name, int64_t rows, int64_t bytes) {
    return reinterpret_cast<const uint8_t*>(store.bytes(name, Number::u8, {rows, bytes}).data());
}

// Planes of a layer of several widths, the highest bits first. The scales of its widest are the layer's; all are checked.
inline std::vector<const uint8_t*> read_widths(const StoredLayer& stored, Store& store, const std::string& name, PackedLayer& layer) {
    std::vector<const uint8_t*> planes;
    for (auto each = stored.widths.rbegin(); each != stored.widths.rend(); ++each) {
        Store& file = store.width(*each);
        while (static_cast<int>(planes.size()) < *each)
            planes.push_back(stored_codes(file, name + ".weight_plane_" + std::to_string(planes.size() + 1), stored.outputs, (stored.inputs + 7) / 8));
        layer.scale = file.scales(name + ".weight_scale_" + std::to_string(*each), stored.outputs);
        if (stored.nested_inputs) layer.act_scale = file.scales(name + ".act_scale_" + std::to_string(*each), 1)[0];
    }
    return planes;
}

inline PackedLayer read_packed(const Description& described, Store& store, const std::string& name, int64_t inputs, int64_t outputs, const std::string& path, bool convolution = false) {
    const auto found = described.layers.find(name);
    if (found == described.layers.end()) throw Error(path + ": layer " + shown(name) + " is in full precision, which this program does not run");
    const StoredLayer& stored = found->second;
    const int64_t places = stored.places();
    if (stored.window.has_value() != convolution || stored.inputs != inputs || stored.outputs != outputs) throw Error(path + ": layer " + shown(name) + " has other sizes than the model");
    const auto owner = described.layers.find(convolution ? name : stored.input);
    if (convolution ? false : owner == described.layers.end() || owner->second.input != stored.input || owner->second.inputs != inputs)
        throw Error(path + ": layer " + shown(name) + ": its input is that of " + shown(stored.input) + ", which does not fit");
    PackedLayer layer;
    const int32_t levels = stored.weight.levels, bits = width_of(levels);
    const int64_t row = stored_bytes(inputs, levels);
    std::vector<const uint8_t*> planes;  // of several widths
    const uint8_t* bytes = nullptr;      // of one
    store.pass_guard(name);
    if (stored.widths.empty()) {
        bytes = stored_codes(store, name + ".weight_packed", outputs, row);
        layer.scale = store.scales(name + ".weight_scale", outputs);
    } else {
        planes = read_widths(stored, store, name, layer);
    }
    if (!stored.nested_inputs) layer.act_scale = store.scales(name + ".act_scale", 1)[0];
    if (stored.bias) layer.bias = store.scales(name + ".bias", outputs);
    layer.thresholds = stored.thresholds;
    layer.coding = Coding{stored.block, nullptr, stored.activation.levels, Normalise::rms, 0, stored.rescale, stored.activation.multiplier, stored.activation.shift};
    if (stored.normalise == "absmax") layer.coding.normalise = Normalise::absmax;
    if (stored.normalise == "static") layer.coding.normalise = Normalise::fixed, layer.coding.rstd = static_cast<double>(store.scales(name + ".act_rstd", 1)[0]);
    // Some rows at a time: all codes at once would be more than the packed weights.
    layer.memory = aligned<uint8_t>(PackedWeights::bytes(bits, outputs, inputs, places));
    std::vector<uint8_t> codes(static_cast<size_t>(16 * inputs));
    auto* const sums = reinterpret_cast<int32_t*>(layer.memory.get() + packed_size(bits, outputs, inputs));
    for (int64_t begin = 0; begin < outputs; begin += 16) {
        const int64_t end = std::min(begin + 16, outputs);
        for (int64_t i = begin; i < end; ++i) {
            uint8_t* const to = codes.data() + (i - begin) * inputs;
            if (bytes != nullptr && !unpack_row(bytes + i * row, inputs, levels, to)) store.refuse(name + ".weight_packed", "has codes above " + std::to_string(levels - 1));
            if (bytes == nullptr && !unpack_planes(planes, i, inputs, to)) store.refuse(name + ".weight_plane_*", "has bits beyond the ends of its rows");
            if (bits > 2) continue;
            sums[i] = std::accumulate(to, to + inputs, int32_t{0});
            const int64_t depth = inputs / places;  // sums place by place lie behind those of whole rows
            for (int64_t place = 0; places > 1 && place < places; ++place)
                sums[(1 + place) * outputs + i] = std::accumulate(to + place * depth, to + (place + 1) * depth, int32_t{0});
        }
        // A tile of 16 rows by itself.
        pack(codes.data(), inputs, bits, end - begin, inputs, 0, end - begin, layer.memory.get() + static_cast<size_t>(begin / 16) * packed_size(bits, 16, inputs));
    }
    layer.weights = std::make_unique<PackedWeights>(layer.memory.get(), bits, outputs, inputs, places, stored.weight.multiplier, stored.weight.shift, layer.scale.data(),
                                                    layer.bias.empty() ? nullptr : layer.bias.data());
    return layer;
}

// Layers that read the same tensor; they must code it alike.
inline Group group_of(const std::vector<PackedLayer>& layers, size_t first, size_t count, const std::string& where) {
    Group group{layers[first].coding, {}, {}};
    group.coding.thresholds = layers[first].thresholds.data();
    for (size_t i = first; i < first + count; ++i) {
        const PackedLayer &layer = layers[i], &one = layers[first];
        const Coding &a = layer.coding, &b = one.coding;
        if (a.block != b.block || a.n != b.n || a.normalise != b.normalise || a.rstd != b.rstd || a.rescale != b.rescale || a.multiplier != b.multiplier || a.shift != b.shift || layer.thresholds != one.thresholds)
            throw Error(where + ": layers that read the same tensor code it differently, which this program does not run");
        group.weights.push_back(layer.weights.get());
        group.act_scales.push_back(layer.act_scale * (1.0f / static_cast<float>(layer.weights->view().multiplier * a.multiplier)));
    }
    return group;
}

}  // namespace bellbox
