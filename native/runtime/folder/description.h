// The config.json of a packed folder (docs/format.md), versions 4 and 6, for language models: every field known, every
// number in its range.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "runtime/folder/canonical.h"
#include "runtime/folder/fields.h"
#include "runtime/folder/unpack.h"
#include "runtime/sha256.h"

namespace bellbox {

// code - n/2 - zero_point as multiplier * code - shift over multiplier.
struct StoredGrid {
    int32_t levels = 0, multiplier = 0, shift = 0;
    int32_t bits() const { return width_of(levels); }
    int32_t largest() const { return std::max(std::abs(shift), std::abs(multiplier * (levels - 1) - shift)); }
};

struct StoredLayer {
    int64_t inputs = 0, outputs = 0;
    bool bias = false, rescale = false;
    int32_t block = 1;
    std::string normalise, input;
    StoredGrid weight, activation;
    std::vector<float> thresholds;
};

struct StoredTable {
    int bits = 0;       // 16 (bf16), 8 or 4
    int64_t group = 0;  // of 4 bits
};

struct LanguageShape {
    bool llama = false;
    int64_t vocabulary = 0, hidden = 0, inner = 0, blocks = 0, heads = 0, key_heads = 0, head = 0, positions = 0;
    double eps = 0, theta = 0;
    bool tied = false, bias = false;
    std::string activation;
};

struct Description {
    LanguageShape shape;
    std::map<std::string, StoredLayer> layers;
    std::map<std::string, StoredTable> tables;
    struct File {
        uint64_t bytes;
        std::string sha256;
    };
    std::map<std::string, File> files;
};

// Normal quantiles, of which the others mirror these (docs/format.md).
inline std::vector<float> gaussian_thresholds(int32_t levels, const Fields& where) {
    static const std::map<int32_t, std::vector<float>> kUpper = {
        {2, {0.0f}},
        {3, {0.4307273030281067f}},
        {4, {0.0f, 0.6744897365570068f}},
        {8, {0.0f, 0.3186393678188324f, 0.6744897365570068f, 1.1503493785858154f}},
        {16, {0.0f, 0.15731067955493927f, 0.3186393678188324f, 0.48877641558647156f, 0.6744897365570068f, 0.887146532535553f, 1.1503493785858154f, 1.5341205596923828f}}};
    const auto found = kUpper.find(levels);
    if (found == kUpper.end()) where.refuse("thresholds", "are gaussian of a number of levels that this program does not know");
    std::vector<float> all;
    for (auto each = found->second.rbegin(); each != found->second.rend(); ++each)
        if (*each != 0.0f) all.push_back(-*each);
    all.insert(all.end(), found->second.begin(), found->second.end());
    return all;
}

inline StoredGrid read_grid(Fields& fields) {
    StoredGrid grid;
    grid.levels = static_cast<int32_t>(fields.integer("levels", 2, 16));
    const double twice = grid.levels + 2 * fields.number("zero_point");
    if (twice != static_cast<double>(static_cast<int32_t>(twice)) || std::abs(twice) > 512) fields.refuse("zero_point", "is no multiple of 1/2");
    grid.multiplier = static_cast<int32_t>(twice) % 2 == 0 ? 1 : 2;
    grid.shift = static_cast<int32_t>(twice) * grid.multiplier / 2;
    return grid;
}

inline StoredLayer read_layer(Fields fields) {
    StoredLayer layer;
    if (fields.text("function") != "packed_linear") fields.refuse("function", "is " + shown(fields.text("function")) + ", which this program does not run");
    fields.text("method");
    layer.inputs = fields.integer("in_features", 1, 1 << 24), layer.outputs = fields.integer("out_features", 1, 1 << 24);
    layer.bias = fields.flag("bias"), layer.rescale = fields.flag("rescale");
    if (fields.flag("signs")) fields.refuse("signs", "is true, which this program does not run");
    layer.block = static_cast<int32_t>(fields.integer("hadamard_block", 1, 1 << 16));
    if ((layer.block & (layer.block - 1)) != 0 || layer.inputs % layer.block != 0) fields.refuse("hadamard_block", "must be a power of two that divides in_features");
    layer.normalise = fields.one_of("normalise", {"rms", "absmax", "norm", "static"});
    if (layer.normalise == "norm") fields.refuse("normalise", "is 'norm', which this program does not run");
    if (layer.normalise == "absmax" && layer.block != 1) fields.refuse("normalise", "'absmax' goes with hadamard_block 1");
    if (layer.normalise == "static" && layer.rescale) fields.refuse("rescale", "needs a sigma that follows the input, not normalise 'static'");
    Fields weight = fields.object("weight"), activation = fields.object("activation");
    layer.weight = read_grid(weight), layer.activation = read_grid(activation);
    weight.done();
    if (layer.weight.largest() > 127 || layer.activation.largest() > 34) fields.refuse("weight", "has levels that do not fit the kernels");
    const Json& thresholds = activation.any("thresholds");
    if (thresholds == "gaussian") {
        layer.thresholds = gaussian_thresholds(layer.activation.levels, activation);
    } else {
        if (!thresholds.is_array() || thresholds.size() != static_cast<size_t>(layer.activation.levels - 1)) activation.refuse("thresholds", "are not one fewer than levels");
        for (const Json& each : thresholds) {
            const float value = each.is_number() ? each.get<float>() : NAN;
            if (!std::isfinite(value) || (!layer.thresholds.empty() && value <= layer.thresholds.back())) activation.refuse("thresholds", "do not rise");
            layer.thresholds.push_back(value);
        }
    }
    activation.done();
    layer.input = fields.text("input");
    fields.done();
    return layer;
}

inline double positive(Fields& fields, const char* name) {
    const double value = fields.number(name);
    if (value <= 0) fields.refuse(name, "must be above 0");
    return value;
}

inline LanguageShape read_shape(const Json& model, const std::string& path) {
    if (model.is_null()) throw Error(path + ": is a module of its owner's own, which only its Python code can build");
    Fields fields(model, path + ": model");
    LanguageShape shape;
    shape.llama = fields.one_of("architecture", {"llama", "gpt"}) == "llama";
    const auto size = [&](const char* name) { return fields.integer(name, 1, 1 << 24); };
    shape.vocabulary = size("vocab_size"), shape.hidden = size("hidden_size"), shape.inner = size("intermediate_size");
    shape.blocks = fields.integer("num_hidden_layers", 1, 1024), shape.heads = size("num_attention_heads"), shape.key_heads = shape.heads;
    shape.positions = fields.integer("max_position_embeddings", 1, 1 << 20), shape.tied = fields.flag("tie_word_embeddings");
    positive(fields, "initializer_range");
    if (fields.has("fused_qkv") && fields.flag("fused_qkv")) fields.refuse("fused_qkv", "is true, which this program does not run");
    if (shape.llama) {
        shape.eps = positive(fields, "rms_norm_eps"), shape.theta = positive(fields, "rope_theta");
        if (!fields.any("num_key_value_heads").is_null()) shape.key_heads = size("num_key_value_heads");
        if (!fields.any("head_dim").is_null()) shape.head = size("head_dim");
    } else {
        shape.eps = positive(fields, "layer_norm_epsilon"), shape.bias = !fields.has("bias") || fields.flag("bias");
        shape.activation = fields.has("activation") ? fields.one_of("activation", {"gelu", "gelu_erf", "relu"}) : "gelu";
    }
    fields.done();
    if (shape.head == 0) {
        if (shape.hidden % shape.heads != 0) fields.refuse("num_attention_heads", "does not divide hidden_size");
        shape.head = shape.hidden / shape.heads;
    }
    if (shape.heads % shape.key_heads != 0) fields.refuse("num_key_value_heads", "does not divide num_attention_heads");
    if (shape.llama && (shape.head % 2 != 0 || shape.positions * shape.head > int64_t{1} << 27)) fields.refuse("head_dim", "is odd, or too large for so many positions");
    return shape;
}

inline Description read_description(std::string_view file, const std::string& path) {
    Json config = parse_json(file, path);
    const Json& found = member(config, "quantization_config");
    if (text_or(found, "quant_method", "") != "bellbox") throw Error(path + ": not a packed Bellbox model of version 4 or later; save it again with bellbox");
    if (found.contains("prepared")) throw Error(path + ": is of a model in training form; convert and save it");
    const Json& number = member(found, "version");
    const int64_t version = number.is_number_integer() ? number.get<int64_t>() : -1;
    if (version == 5 || (version == 6 && !member(found, "experts").empty())) throw Error(path + ": has fused experts, which this program does not run");
    if (version != 4 && version != 6) throw Error(path + ": format version " + number.dump() + "; this program reads 4 and 6");
    const std::string sum = text_or(found, "sha256", "");
    config["quantization_config"].erase("sha256");
    if (sha256(canonical(config)) != sum) throw Error(path + ": damaged, its checksum does not match; save the model again");

    Fields section(config["quantization_config"], path);
    section.any("quant_method"), section.any("version");
    if (version == 6) section.any("experts");
    Description described;
    described.shape = read_shape(section.any("model"), path);
    const Json &layers = section.any("layers"), &tables = section.any("embeddings"), &files = section.any("files");
    if (!layers.is_object() || layers.empty() || !tables.is_object() || !files.is_object()) section.refuse("layers", "is no object");
    section.done();
    for (const auto& [name, entry] : layers.items()) described.layers[name] = read_layer(Fields(entry, path + ": layer " + shown(name)));
    for (const auto& [name, entry] : tables.items()) {
        StoredTable table;
        if (entry == "bf16" || entry == "int8") {
            table.bits = entry == "bf16" ? 16 : 8;
        } else {
            Fields fields(entry, path + ": embedding " + shown(name));
            if (version != 6) fields.refuse("bits", "is of version 6");
            table.bits = static_cast<int>(fields.integer("bits", 4, 4)), table.group = fields.integer("group", 32, 64);
            if (table.group != 32 && table.group != 64) fields.refuse("group", "must be 32 or 64");
            fields.done();
        }
        described.tables[name] = table;
    }
    for (const auto& [name, entry] : files.items()) {
        if (name != "model.safetensors" && name != "tokenizer.json") section.refuse("files", "names " + shown(name));
        Fields fields(entry, path + ": file " + shown(name));
        described.files[name] = {static_cast<uint64_t>(fields.integer("bytes", 0, INT64_MAX)), fields.text("sha256")};
        fields.done();
    }
    if (described.files.count("model.safetensors") == 0) section.refuse("files", "names no model.safetensors");
    return described;
}

}  // namespace bellbox
