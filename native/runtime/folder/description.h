// The config.json of a packed folder (docs/format.md), versions 4, 6 and 7: every field known, every number in its range.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "layers/grid.h"
#include "runtime/folder/canonical.h"
#include "runtime/folder/fields.h"
#include "runtime/folder/unpack.h"
#include "runtime/sha256.h"

namespace bellbox {

// A window over images.
struct StoredWindow {
    int64_t channels = 0;
    std::vector<int64_t> kernel, stride, padding, dilation;  // height, width; left, right, top, bottom
};

struct StoredLayer {
    int64_t inputs = 0, outputs = 0;
    bool bias = false, rescale = false;
    int32_t block = 1;
    std::string normalise, input;
    Grid weight, activation;
    std::vector<float> thresholds;
    std::optional<StoredWindow> window;  // of packed_conv2d
    std::vector<int> widths;             // bits of several, those that are read, the widest first; empty: one width
    bool nested_inputs = false;          // whether these are the input's too
    int64_t places() const { return window ? window->kernel[0] * window->kernel[1] : 1; }
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
    Activation activation = Activation::silu;
};

struct VisionShape {
    bool resnet = false;
    int64_t labels = 0, channels = 0, image = 0;  // image: height and width; 0: any
    int64_t width = 0, stages = 0, blocks = 0, stem_stride = 0, stem_kernel = 0;
    bool max_pool = false, class_token = false;
    int64_t patch = 0, hidden = 0, inner = 0, heads = 0;  // blocks as above
    double eps = 0;
};

struct Description {
    std::optional<LanguageShape> language;
    std::optional<VisionShape> vision;
    std::map<std::string, StoredLayer> layers;
    std::vector<int> choices;  // bits of the widths that the folder can be read at, the widest first; empty: it has one
    std::map<std::string, StoredTable> tables;
    struct File {
        uint64_t bytes;
        std::string sha256;
    };
    std::map<std::string, File> files;

    // Of the widths that are read, of all layers.
    std::set<int> widths() const {
        std::set<int> all;
        for (const auto& [name, layer] : layers) all.insert(layer.widths.begin(), layer.widths.end());
        return all;
    }
};

// What B bits need beyond the next narrower width.
inline std::string file_of_width(int bits) { return "bits-" + std::to_string(bits) + ".safetensors"; }
constexpr int kMostNested = 7;  // bits, of which the levels still fit int8
inline bool names_width(const std::string& file) {
    for (int bits = 1; bits <= kMostNested; ++bits)
        if (file == file_of_width(bits)) return true;
    return false;
}

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

// `widest`: bits of several widths, of which this one has `at`; 0: the grid has one.
inline Grid read_grid(Fields& fields, int widest = 0, int at = 0) {
    Grid grid;
    int32_t levels = static_cast<int32_t>(fields.integer("levels", 2, widest > 0 ? 1 << kMostNested : 16));
    const double zero = fields.number("zero_point");
    if (widest > 0) {
        if (levels != 1 << widest) fields.refuse("levels", "are " + std::to_string(levels) + ", not those of the widest width");
        if (zero == std::nearbyint(zero)) fields.refuse("zero_point", "of several widths must be a half-integer");
        if ((levels = 1 << at) > 16) fields.refuse("levels", "of " + std::to_string(at) + " bits are more than the 16 that this program runs; choose a narrower width");
    }
    // twice it by itself: beside the levels a tiny number is lost
    if (2 * zero != std::nearbyint(2 * zero) || !grid.set(levels, zero)) fields.refuse("zero_point", "is no multiple of 1/2");
    return grid;
}

inline std::vector<int64_t> read_sizes(Fields& fields, const char* name, size_t count, int64_t least) {
    const Json& list = fields.any(name);
    std::vector<int64_t> sizes;
    if (!list.is_array() || list.size() != count) fields.refuse(name, "must be " + std::to_string(count) + " numbers");
    for (const Json& each : list) {
        const bool whole = each.is_number_integer() && !(each.is_number_unsigned() && each.get<uint64_t>() > 1 << 16);
        if (!whole || each.get<int64_t>() < least || each.get<int64_t>() > 1 << 16) fields.refuse(name, "holds a number that is out of range");
        sizes.push_back(each.get<int64_t>());
    }
    return sizes;
}

inline StoredWindow read_window(Fields fields) {
    StoredWindow window;
    window.channels = fields.integer("channels", 1, 1 << 24);
    if (fields.integer("groups", 1, 1 << 24) != 1) fields.refuse("groups", "is above 1, which this program does not run");
    window.kernel = read_sizes(fields, "kernel", 2, 1), window.stride = read_sizes(fields, "stride", 2, 1);
    window.padding = read_sizes(fields, "padding", 4, 0), window.dilation = read_sizes(fields, "dilation", 2, 1);
    fields.done();
    return window;
}

// The widths of an entry, the widest first; empty where it has one.
inline std::vector<int> read_widths(const Json& nested, const std::string& where, bool& inputs) {
    std::vector<int> widths;
    if (nested.is_null()) return widths;
    Fields fields(nested, where + ": nested");
    const Json& list = fields.any("widths");
    if (!list.is_array() || list.size() < 2 || list.size() > kMostNested) fields.refuse("widths", "must be two to seven numbers of bits");
    for (const Json& each : list) {
        const bool fits = each.is_number_unsigned() && each.get<uint64_t>() >= 1 && each.get<uint64_t>() <= kMostNested;
        if (!fits || (!widths.empty() && each.get<int>() >= widths.back())) fields.refuse("widths", "must be numbers of bits from 1 to 7, the widest first");
        widths.push_back(each.get<int>());
    }
    inputs = fields.flag("inputs");
    fields.done();
    return widths;
}

// widths: of this layer, those that it is not read at included; bits: the width of the whole, 0 for the widest.
inline StoredLayer read_layer(Fields fields, std::vector<int> widths, bool nested_inputs, int bits) {
    StoredLayer layer;
    const int widest = widths.empty() ? 0 : widths[0];
    while (bits > 0 && !widths.empty() && widths[0] > bits) widths.erase(widths.begin());
    if (widest > 0 && widths.empty()) fields.refuse("nested", "has no width of " + std::to_string(bits) + " bits or fewer");
    const int at = widths.empty() ? 0 : widths[0];
    layer.widths = std::move(widths), layer.nested_inputs = nested_inputs;
    const std::string function = fields.text("function");
    const bool convolution = function == "packed_conv2d";
    if (!convolution && function != "packed_linear") fields.refuse("function", "is " + shown(function) + ", which this program does not run");
    const std::string method = fields.text("method");
    if (method.size() > 32 || std::any_of(method.begin(), method.end(), [](char c) { return c < 0x20 || c > 0x7e; }))
        fields.refuse("method", "must be at most 32 printable characters of ASCII");
    layer.inputs = fields.integer("in_features", 1, 1 << 24), layer.outputs = fields.integer("out_features", 1, 1 << 24);
    layer.bias = fields.flag("bias"), layer.rescale = fields.flag("rescale");
    if (fields.flag("signs")) fields.refuse("signs", "is true, which this program does not run");
    layer.block = static_cast<int32_t>(fields.integer("hadamard_block", 1, 1 << 16));
    if (convolution) {
        layer.window = read_window(fields.object("convolution"));
        if (layer.inputs != layer.places() * layer.window->channels) fields.refuse("in_features", "are not the places of the window times channels");
    }
    const int64_t rotated = convolution ? layer.window->channels : layer.inputs;
    if ((layer.block & (layer.block - 1)) != 0 || rotated % layer.block != 0) fields.refuse("hadamard_block", "must be a power of two that divides in_features, or the channels");
    layer.normalise = fields.one_of("normalise", {"rms", "absmax", "norm", "static"});
    if (layer.normalise == "norm") fields.refuse("normalise", "is 'norm', which this program does not run");
    if (layer.normalise == "absmax" && layer.block != 1) fields.refuse("normalise", "'absmax' goes with hadamard_block 1");
    if (layer.normalise == "static" && layer.rescale) fields.refuse("rescale", "needs a sigma that follows the input, not normalise 'static'");
    Fields weight = fields.object("weight"), activation = fields.object("activation");
    layer.weight = read_grid(weight, widest, at), layer.activation = read_grid(activation, nested_inputs ? widest : 0, at);
    weight.done();
    if (layer.weight.largest() > 127 || layer.activation.largest() > 34) fields.refuse("weight", "has levels that do not fit the kernels");
    const Json& thresholds = activation.any("thresholds");
    if (thresholds == "gaussian") {
        layer.thresholds = gaussian_thresholds(layer.activation.levels, activation);
    } else {
        if (nested_inputs) activation.refuse("thresholds", "of several widths must be gaussian, which nest");
        if (!thresholds.is_array() || thresholds.size() != static_cast<size_t>(layer.activation.levels - 1)) activation.refuse("thresholds", "are not one fewer than levels");
        for (const Json& each : thresholds) {
            const float value = each.is_number() ? each.get<float>() : NAN;
            if (!std::isfinite(value) || (!layer.thresholds.empty() && value <= layer.thresholds.back())) activation.refuse("thresholds", "do not rise");
            layer.thresholds.push_back(value);
        }
    }
    activation.done();
    if (!convolution) layer.input = fields.text("input");
    fields.done();
    return layer;
}

inline double positive(Fields& fields, const char* name) {
    const double value = fields.number(name);
    if (value <= 0) fields.refuse(name, "must be above 0");
    return value;
}

inline VisionShape read_vision(Fields fields, bool resnet) {
    VisionShape shape;
    shape.resnet = resnet;
    const auto size = [&](const char* name, int64_t most) { return fields.integer(name, 1, most); };
    const auto flag_later = [&](const char* name) { return fields.has(name) && fields.flag(name); };
    shape.labels = size("num_labels", 1 << 24), shape.channels = size("num_channels", 1 << 10);
    const double drop = fields.number("drop_path");
    if (!(drop >= 0 && drop < 1)) fields.refuse("drop_path", "must be at least 0 and below 1");
    if (resnet) {
        shape.width = size("width", 1 << 16), shape.stages = size("stages", 16), shape.blocks = size("blocks", 1024);
        shape.stem_stride = size("stem_stride", 64), shape.stem_kernel = fields.has("stem_kernel") ? size("stem_kernel", 63) : 3;
        if (shape.stem_kernel % 2 == 0) fields.refuse("stem_kernel", "must be odd");
        shape.max_pool = flag_later("max_pool");
        if (fields.has("image_size") && !fields.any("image_size").is_null()) shape.image = size("image_size", 1 << 14);
    } else {
        shape.image = size("image_size", 1 << 14), shape.patch = size("patch_size", 1 << 14), shape.hidden = size("hidden_size", 1 << 16);
        shape.inner = size("intermediate_size", 1 << 20), shape.blocks = size("num_hidden_layers", 1024), shape.heads = size("num_attention_heads", 1 << 12);
        shape.eps = positive(fields, "layer_norm_epsilon"), positive(fields, "initializer_range");
        shape.class_token = flag_later("class_token");
        if (flag_later("fused_qkv")) fields.refuse("fused_qkv", "is true, which this program does not run");
        if (shape.image % shape.patch != 0) fields.refuse("patch_size", "does not divide image_size");
        if (shape.hidden % shape.heads != 0) fields.refuse("num_attention_heads", "does not divide hidden_size");
    }
    fields.done();
    return shape;
}

inline LanguageShape read_language(Fields fields) {
    LanguageShape shape;
    shape.llama = fields.text("architecture") == "llama";
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
        const std::string named = fields.has("activation") ? fields.one_of("activation", {"gelu", "gelu_erf", "relu"}) : "gelu";
        shape.activation = named == "gelu" ? Activation::gelu_tanh : named == "gelu_erf" ? Activation::gelu_erf : Activation::relu;
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

inline void read_shape(const Json& model, const std::string& path, Description& described) {
    if (model.is_null()) throw Error(path + ": is a module of its owner's own, which only its Python code can build");
    Fields fields(model, path + ": model");
    const std::string kind = fields.one_of("architecture", {"llama", "gpt", "resnet", "vit"});
    if (kind == "resnet" || kind == "vit") described.vision = read_vision(fields, kind == "resnet");
    else described.language = read_language(fields);
}

// Bits of the widths that some layer has, the widest first.
inline std::vector<int> choices_of(const std::map<std::string, std::vector<int>>& layers) {
    std::set<int, std::greater<int>> all;
    for (const auto& [name, widths] : layers) all.insert(widths.begin(), widths.end());
    return {all.begin(), all.end()};
}

inline void check_choice(int bits, const std::vector<int>& choices, const std::string& path) {
    if (bits == 0 || std::find(choices.begin(), choices.end(), bits) != choices.end()) return;
    std::string there = choices.empty() ? "its layers have one width" : "it can be read at";
    for (const int each : choices) there += (each == choices[0] ? " " : ", ") + std::to_string(each);
    throw Error(path + ": no width of " + std::to_string(bits) + " bits in this folder; " + there + (choices.empty() ? "" : " bits"));
}

// bits: of a folder of several widths, the one to read it at; 0: its widest.
inline Description read_description(std::string_view file, const std::string& path, int bits = 0) {
    Json config = parse_json(file, path);
    const Json& found = member(config, "quantization_config");
    if (text_or(found, "quant_method", "") != "bellbox") throw Error(path + ": not a packed Bellbox model of version 4 or later; save it again with bellbox");
    if (found.contains("prepared")) throw Error(path + ": is of a model in training form; convert and save it");
    const Json& number = member(found, "version");
    const int64_t version = number.is_number_integer() ? number.get<int64_t>() : -1;
    if (version == 5 || (version >= 6 && version <= 7 && !member(found, "experts").empty())) throw Error(path + ": has fused experts, which this program does not run");
    if (version != 4 && version != 6 && version != 7) throw Error(path + ": format version " + number.dump() + "; this program reads 4, 6 and 7");
    const std::string sum = text_or(found, "sha256", "");
    config["quantization_config"].erase("sha256");
    if (sha256(canonical(config)) != sum) throw Error(path + ": damaged, its checksum does not match; save the model again");

    Fields section(config["quantization_config"], path);
    section.any("quant_method"), section.any("version");
    if (version >= 6 && !section.any("experts").is_object()) section.refuse("experts", "is no object");
    Description described;
    read_shape(section.any("model"), path, described);
    const Json &layers = section.any("layers"), &tables = section.any("embeddings"), &files = section.any("files");
    if (!layers.is_object() || layers.empty() || !tables.is_object() || !files.is_object()) section.refuse("layers", "is no object");
    section.done();
    std::map<std::string, bool> inputs;
    std::map<std::string, std::vector<int>> widths;
    for (const auto& [name, entry] : layers.items()) {
        const std::string where = path + ": layer " + shown(name);
        if (version == 7 && !entry.contains("nested")) throw Error(where + ": field 'nested': is missing");
        if (version == 7) widths[name] = read_widths(entry["nested"], where, inputs[name]);
    }
    described.choices = choices_of(widths);
    check_choice(bits, described.choices, path);
    for (const auto& [name, entry] : layers.items()) {
        Fields fields(entry, path + ": layer " + shown(name));
        if (version == 7) fields.any("nested");
        described.layers[name] = read_layer(fields, widths[name], inputs[name], bits);
    }
    for (const auto& [name, entry] : tables.items()) {
        StoredTable table;
        if (entry == "bf16" || entry == "int8") {
            table.bits = entry == "bf16" ? 16 : 8;
        } else {
            Fields fields(entry, path + ": embedding " + shown(name));
            if (version < 6) fields.refuse("bits", "is of version 6");
            table.bits = static_cast<int>(fields.integer("bits", 4, 4)), table.group = fields.integer("group", 32, 64);
            if (table.group != 32 && table.group != 64) fields.refuse("group", "must be 32 or 64");
            fields.done();
        }
        described.tables[name] = table;
    }
    for (const auto& [name, entry] : files.items()) {
        if (name != "model.safetensors" && name != "tokenizer.json" && !(version == 7 && names_width(name))) section.refuse("files", "names " + shown(name));
        Fields fields(entry, path + ": file " + shown(name));
        described.files[name] = {static_cast<uint64_t>(fields.integer("bytes", 0, INT64_MAX)), fields.text("sha256")};
        fields.done();
    }
    if (described.files.count("model.safetensors") == 0) section.refuse("files", "names no model.safetensors");
    for (const int width : described.widths())
        if (described.files.count(file_of_width(width)) == 0) section.refuse("files", "names no " + file_of_width(width));
    return described;
}

}  // namespace bellbox
