// A packed LLaMA or GPT: its folder checked, its weights laid out for the kernels, tokens in and logits out.
//
// Packed layers, norms, attention over the cache and heads are the kernels of the Python package, hence its bits. A prompt
// goes through in pieces, whose packed products take all rows at once; attention takes token after token.
#pragma once

#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "layers/block.h"
#include "layers/head.h"
#include "layers/table.h"
#include "runtime/folder/description.h"
#include "runtime/folder/mapped.h"
#include "runtime/folder/tensors.h"
#include "runtime/folder/unpack.h"

namespace bellbox {

using Floats = std::vector<float>;

inline float float_of_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float size = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                       : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                        : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
    return bits >> 15 ? -size : size;
}
inline float float_of_bf16(uint16_t bits) {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
}
inline float rounded_to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (!std::isfinite(value)) return value;
    return float_of_bf16(static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
}

// What a folder's file of tensors holds, each taken once and by shape.
class Store {
  public:
    Store(std::string_view file, const std::string& path) : path_(path), tensors_(read_tensors(file, path)) {}

    bool has(const std::string& name) const { return tensors_.count(name) != 0; }
    std::string_view bytes(const std::string& name, Number number, const std::vector<int64_t>& shape) { return take(name, shape, number, true).bytes; }
    // Of any floating type, as fp32.
    Floats floats(const std::string& name, const std::vector<int64_t>& shape, bool finite = false) {
        const StoredTensor tensor = take(name, shape, Number::f32, false);
        const size_t count = static_cast<size_t>(tensor.count());
        Floats out(count);
        const auto read = [&](size_t i, auto value) {
            std::memcpy(&value, tensor.bytes.data() + i * sizeof(value), sizeof(value));
            return value;
        };
        for (size_t i = 0; i < count; ++i) {
            switch (tensor.number) {
                case Number::f32: out[i] = read(i, 0.0f); break;
                case Number::f64: out[i] = static_cast<float>(read(i, 0.0)); break;
                case Number::bf16: out[i] = float_of_bf16(read(i, uint16_t{0})); break;
                case Number::f16: out[i] = float_of_half(read(i, uint16_t{0})); break;
                default: refuse(name, "is of no floating type");
            }
            if (finite && !std::isfinite(out[i])) refuse(name, "holds NaN or infinity");
        }
        return out;
    }
    Floats scales(const std::string& name, int64_t count) {
        bytes(name, Number::f32, {count});
        return floats(name, {count}, true);
    }
    // The tensor that keeps others from loading codes as a plain model (docs/format.md).
    void pass_guard(const std::string& layer) {
        const auto found = tensors_.find(layer + ".weight");
        if (found != tensors_.end() && found->second.number == Number::u8 && found->second.shape == std::vector<int64_t>{0}) taken_.insert(found->first);
    }
    void done() const {
        for (const auto& [name, tensor] : tensors_)
            if (taken_.count(name) == 0) refuse(name, "is of nothing in the model");
    }
    [[noreturn]] void refuse(const std::string& name, const std::string& why) const { throw Error(path_ + ": tensor " + shown(name) + " " + why); }

  private:
    const StoredTensor& take(const std::string& name, const std::vector<int64_t>& shape, Number number, bool exactly) {
        const auto found = tensors_.find(name);
        if (found == tensors_.end()) refuse(name, "is missing");
        if (found->second.shape != shape || (exactly && found->second.number != number)) refuse(name, "has another shape or type than the model");
        taken_.insert(name);
        return found->second;
    }
    std::string path_;
    std::map<std::string, StoredTensor> tensors_;
    std::set<std::string> taken_;
};

// A packed layer: its memory, and what a call needs of it.
struct PackedLayer {
    Aligned<uint8_t> memory;
    Floats scale, bias, thresholds;
    float act_scale = 1;
    Coding coding{};
    std::unique_ptr<PackedWeights> weights;
};

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

struct Norm {
    Floats weight, bias;
};

struct DecoderBlock {
    Norm first, second;
    std::vector<PackedLayer> layers;  // q, k, v, output, then gate, up, down, or wide, down
    Group qkv, output, wide, down;
};

// Keys and values of one sequence, fp32.
struct Cache {
    int64_t room, length = 0;
    std::vector<Floats> keys, values;
};

class Model {
  public:
    explicit Model(const std::string& folder) {
        const std::string config_path = folder + "/config.json", path = folder + "/model.safetensors";
        const Mapped config(config_path);
        const Description described = read_description(config.bytes(), config_path);
        for (const auto& [name, file] : described.files) {
            const Mapped content(folder + "/" + name);
            if (content.bytes().size() != file.bytes || sha256(content.bytes()) != file.sha256)
                throw Error(folder + "/" + name + ": damaged, its size or checksum does not match; save the model again");
        }
        const Mapped content(path);
        Store store(content.bytes(), path);
        shape_ = described.shape;
        build(described, store, config_path);
        store.done();
    }

    const LanguageShape& shape() const { return shape_; }

    Cache new_cache(int64_t tokens) const {
        if (tokens > shape_.positions)
            throw Error(std::to_string(tokens) + " tokens exceed the model's context of " + std::to_string(shape_.positions) + "; shorten the text");
        Cache cache{tokens, 0, {}, {}};
        const size_t numbers = room_for(tokens * shape_.key_heads * shape_.head);
        room_for((tokens + shape_.head + 2) * shape_.heads);  // what attention works in (layers/block.h)
        cache.keys.assign(static_cast<size_t>(shape_.blocks), Floats(numbers));
        cache.values = cache.keys;
        return cache;
    }

    // Logits [vocabulary] after these tokens, which go into the cache.
    void forward(const uint32_t* tokens, int64_t count, Cache& cache, float* logits, int threads) const {
        if (count < 1 || cache.length + count > cache.room) throw Error("the cache has no room for " + std::to_string(count) + " more tokens");
        for (int64_t i = 0; i < count; ++i)
            if (tokens[i] >= shape_.vocabulary)
                throw Error("the prompt holds token " + std::to_string(tokens[i]) + ", but the model's vocabulary is 0.." + std::to_string(shape_.vocabulary - 1));
        constexpr int64_t kPiece = 256;  // tokens whose rows go through a layer at once
        Floats x;
        for (int64_t begin = 0; begin < count; begin += kPiece) {
            const int64_t rows = std::min(kPiece, count - begin);
            x.resize(room_for(rows * shape_.hidden));
            embed(tokens + begin, rows, cache.length, x.data());
            for (size_t i = 0; i < blocks_.size(); ++i) run_block(blocks_[i], x.data(), rows, cache, i, threads);
            cache.length += rows;
        }
        Floats last(static_cast<size_t>(shape_.hidden));
        normalise(norm_, x.data() + x.size() - last.size(), 1, last.data());
        head().product(last.data(), logits, threads);
    }

  private:
    const Table& head() const { return shape_.tied ? words_ : head_; }

    void embed(const uint32_t* tokens, int64_t rows, int64_t start, float* x) const {
        Floats position(static_cast<size_t>(shape_.hidden));
        for (int64_t i = 0; i < rows; ++i) {
            float* const row = x + i * shape_.hidden;
            words_.row(tokens[i], row);
            if (shape_.llama) continue;
            places_.row(start + i, position.data());
            for (int64_t j = 0; j < shape_.hidden; ++j) row[j] += position[static_cast<size_t>(j)];
        }
    }

    void normalise(const Norm& norm, const float* x, int64_t rows, float* out) const {
        const int64_t width = shape_.hidden;
        if (shape_.llama) return kernels().rms_norm(RmsNormArgs{x, norm.weight.data(), rows, width, shape_.eps, out}, 0, rows);
        for (int64_t row = 0; row < rows; ++row) {
            const float* const from = x + row * width;
            double sum = 0, squares = 0;
            for (int64_t i = 0; i < width; ++i) sum += from[i];
            const double mean = sum / static_cast<double>(width);
            for (int64_t i = 0; i < width; ++i) squares += (from[i] - mean) * (from[i] - mean);
            const double factor = 1 / std::sqrt(squares / static_cast<double>(width) + shape_.eps);
            for (int64_t i = 0; i < width; ++i) {
                const size_t at = static_cast<size_t>(i);
                const double value = (from[i] - mean) * factor * norm.weight[at] + (norm.bias.empty() ? 0.0 : norm.bias[at]);
                out[row * width + i] = static_cast<float>(value);
            }
        }
    }

    void run_block(const DecoderBlock& block, float* x, int64_t rows, Cache& cache, size_t number, int threads) const {
        const int64_t hidden = shape_.hidden, queries = shape_.heads * shape_.head, keys = shape_.key_heads * shape_.head, inner = shape_.inner;
        Floats normed(room_for(rows * hidden)), query(room_for(rows * queries)), mixed(query.size());
        Floats key(room_for(rows * keys)), value(key.size()), wide(room_for(rows * inner)), up;
        normalise(block.first, x, rows, normed.data());
        block.qkv.run(normed.data(), Type::f32, rows, {query.data(), key.data(), value.data()}, Type::f32, threads);
        const CacheView view{CacheType::f32, cache.keys[number].data(), cache.values[number].data(), nullptr, nullptr, cache.room, 0, 1};
        for (int64_t i = 0; i < rows; ++i) {
            CacheView now = view;
            now.start = cache.length + i;
            run_attend(AttendArgs{query.data() + i * queries, key.data() + i * keys, value.data() + i * keys, cosine_.empty() ? nullptr : cosine_.data(),
                                  sine_.empty() ? nullptr : sine_.data(), 1, shape_.heads, shape_.key_heads, shape_.head, now, mixed.data() + i * queries},
                       threads);
        }
        add(block.output, mixed.data(), rows, x, normed, threads);
        normalise(block.second, x, rows, normed.data());
        if (shape_.llama) {
            up.resize(wide.size());
            block.wide.run(normed.data(), Type::f32, rows, {wide.data(), up.data()}, Type::f32, threads);
            for (size_t i = 0; i < wide.size(); ++i) wide[i] = wide[i] / (1.0f + std::exp(-wide[i])) * up[i];
        } else {
            block.wide.run(normed.data(), Type::f32, rows, {wide.data()}, Type::f32, threads);
            for (float& each : wide) each = activated(each);
        }
        add(block.down, wide.data(), rows, x, normed, threads);
    }

    float activated(float x) const {
        if (shape_.activation == "relu") return x > 0 ? x : 0.0f;
        if (shape_.activation == "gelu_erf") return 0.5f * x * std::erfc(-x * 0.70710678f);
        const float inner = 0.79788456f * (x + 0.044715f * x * x * x);
        return 0.5f * x * (1.0f + std::tanh(inner));
    }

    // x [rows, hidden] += the layers' product of `from`.
    void add(const Group& layers, const float* from, int64_t rows, float* x, Floats& room, int threads) const {
        layers.run(from, Type::f32, rows, {room.data()}, Type::f32, threads);
        for (int64_t i = 0; i < rows * shape_.hidden; ++i) x[i] += room[static_cast<size_t>(i)];
    }

    // --- building ---

    void build(const Description& described, Store& store, const std::string& path) {
        const bool llama = shape_.llama;
        const std::string body = llama ? "model." : "transformer.", words = llama ? "model.embed_tokens" : "transformer.wte";
        if (llama) fill_rotary();
        std::set<std::string> known = {words, "lm_head"};
        words_ = read_table(described, store, words, shape_.vocabulary, shape_.hidden);
        if (shape_.tied) check_tie(described, words, path);
        else head_ = read_table(described, store, "lm_head", shape_.vocabulary, shape_.hidden);
        if (!llama) places_ = read_table(described, store, "transformer.wpe", shape_.positions, shape_.hidden), known.insert("transformer.wpe");
        for (const auto& [name, table] : described.tables)
            if (known.count(name) == 0) throw Error(path + ": " + shown(name) + " is no embedding of the model, nor its head");
        norm_ = read_norm(store, llama ? "model.norm" : "transformer.ln_f");
        const int64_t queries = shape_.heads * shape_.head, keys = shape_.key_heads * shape_.head, hidden = shape_.hidden, inner = shape_.inner;
        size_t used = 0;
        for (int64_t i = 0; i < shape_.blocks; ++i) {
            const std::string block = body + (llama ? "layers." : "h.") + std::to_string(i) + ".";
            DecoderBlock made;
            made.first = read_norm(store, block + (llama ? "input_layernorm" : "ln_1"));
            made.second = read_norm(store, block + (llama ? "post_attention_layernorm" : "ln_2"));
            struct Place {
                const char* name;
                int64_t inputs, outputs;
            };
            const std::vector<Place> places =
                llama ? std::vector<Place>{{"self_attn.q_proj", hidden, queries}, {"self_attn.k_proj", hidden, keys}, {"self_attn.v_proj", hidden, keys},
                                           {"self_attn.o_proj", queries, hidden}, {"mlp.gate_proj", hidden, inner}, {"mlp.up_proj", hidden, inner}, {"mlp.down_proj", inner, hidden}}
                      : std::vector<Place>{{"attn.q_proj", hidden, hidden}, {"attn.k_proj", hidden, hidden}, {"attn.v_proj", hidden, hidden},
                                           {"attn.c_proj", hidden, hidden}, {"mlp.c_fc", hidden, inner}, {"mlp.c_proj", inner, hidden}};
            for (const Place& place : places) {
                made.layers.push_back(read_packed(described, store, block + place.name, place.inputs, place.outputs, path));
                ++used;
            }
            made.qkv = group_of(made, 0, 3, block), made.output = group_of(made, 3, 1, block);
            made.wide = group_of(made, 4, llama ? 2 : 1, block), made.down = group_of(made, llama ? 6 : 5, 1, block);
            blocks_.push_back(std::move(made));
        }
        if (used != described.layers.size()) throw Error(path + ": describes layers that the model has not, or packs more than its blocks, which this program does not run");
    }

    void fill_rotary() {
        const int64_t half = shape_.head / 2;
        cosine_.resize(room_for(shape_.positions * half)), sine_.resize(cosine_.size());
        for (int64_t i = 0; i < half; ++i) {
            const float power = std::pow(static_cast<float>(shape_.theta), static_cast<float>(2 * i) / static_cast<float>(shape_.head));
            const float frequency = 1.0f / power;
            for (int64_t p = 0; p < shape_.positions; ++p) {
                const float angle = static_cast<float>(p) * frequency;
                cosine_[static_cast<size_t>(p * half + i)] = std::cos(angle), sine_[static_cast<size_t>(p * half + i)] = std::sin(angle);
            }
        }
    }

    static void check_tie(const Description& described, const std::string& words, const std::string& path) {
        const auto first = described.tables.find(words), second = described.tables.find("lm_head");
        const bool both = first != described.tables.end() && second != described.tables.end();
        const bool none = first == described.tables.end() && second == described.tables.end();
        if (!none && !(both && first->second.bits == second->second.bits && first->second.group == second->second.group))
            throw Error(path + ": the head is tied to an embedding that is rounded in another way");
    }

    Norm read_norm(Store& store, const std::string& name) {
        Norm norm{store.floats(name + ".weight", {shape_.hidden}), {}};
        if (!shape_.llama && shape_.bias) norm.bias = store.floats(name + ".bias", {shape_.hidden});
        return norm;
    }

    static Table read_table(const Description& described, Store& store, const std::string& name, int64_t rows, int64_t columns) {
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

    static PackedLayer read_packed(const Description& described, Store& store, const std::string& name, int64_t inputs, int64_t outputs, const std::string& path) {
        const auto found = described.layers.find(name);
        if (found == described.layers.end()) throw Error(path + ": layer " + shown(name) + " is in full precision, which this program does not run");
        const StoredLayer& stored = found->second;
        if (stored.inputs != inputs || stored.outputs != outputs) throw Error(path + ": layer " + shown(name) + " has other sizes than the model");
        const auto owner = described.layers.find(stored.input);
        if (owner == described.layers.end() || owner->second.input != stored.input || owner->second.inputs != inputs)
            throw Error(path + ": layer " + shown(name) + ": its input is that of " + shown(stored.input) + ", which does not fit");
        PackedLayer layer;
        const int32_t levels = stored.weight.levels, bits = stored.weight.bits();
        const int64_t row = stored_bytes(inputs, levels);
        const auto* const bytes = reinterpret_cast<const uint8_t*>(store.bytes(name + ".weight_packed", Number::u8, {outputs, row}).data());
        store.pass_guard(name);
        layer.scale = store.scales(name + ".weight_scale", outputs);
        layer.act_scale = store.scales(name + ".act_scale", 1)[0];
        if (stored.bias) layer.bias = store.scales(name + ".bias", outputs);
        layer.thresholds = stored.thresholds;
        layer.coding = Coding{stored.block, nullptr, stored.activation.levels, Normalise::rms, 0, stored.rescale, stored.activation.multiplier, stored.activation.shift};
        if (stored.normalise == "absmax") layer.coding.normalise = Normalise::absmax;
        if (stored.normalise == "static") layer.coding.normalise = Normalise::fixed, layer.coding.rstd = static_cast<double>(store.scales(name + ".act_rstd", 1)[0]);
        // Some rows at a time: all codes at once would be more than the packed weights.
        layer.memory = aligned<uint8_t>(PackedWeights::bytes(bits, outputs, inputs, 1));
        std::vector<uint8_t> codes(static_cast<size_t>(16 * inputs));
        auto* const sums = reinterpret_cast<int32_t*>(layer.memory.get() + packed_size(bits, outputs, inputs));
        for (int64_t begin = 0; begin < outputs; begin += 16) {
            const int64_t end = std::min(begin + 16, outputs);
            for (int64_t i = begin; i < end; ++i) {
                uint8_t* const to = codes.data() + (i - begin) * inputs;
                if (!unpack_row(bytes + i * row, inputs, levels, to)) store.refuse(name + ".weight_packed", "has codes above " + std::to_string(levels - 1));
                if (bits <= 2) sums[i] = std::accumulate(to, to + inputs, int32_t{0});
            }
            // A tile of 16 rows by itself.
            pack(codes.data(), inputs, bits, end - begin, inputs, 0, end - begin, layer.memory.get() + static_cast<size_t>(begin / 16) * packed_size(bits, 16, inputs));
        }
        layer.weights = std::make_unique<PackedWeights>(layer.memory.get(), bits, outputs, inputs, 1, stored.weight.multiplier, stored.weight.shift, layer.scale.data(),
                                                        layer.bias.empty() ? nullptr : layer.bias.data());
        return layer;
    }

    // Layers that read the same tensor; they must code it alike.
    static Group group_of(const DecoderBlock& block, size_t first, size_t count, const std::string& where) {
        Group group{block.layers[first].coding, {}, {}};
        group.coding.thresholds = block.layers[first].thresholds.data();
        for (size_t i = first; i < first + count; ++i) {
            const PackedLayer &layer = block.layers[i], &one = block.layers[first];
            const Coding &a = layer.coding, &b = one.coding;
            if (a.block != b.block || a.n != b.n || a.normalise != b.normalise || a.rstd != b.rstd || a.rescale != b.rescale || a.shift != b.shift || layer.thresholds != one.thresholds)
                throw Error(where + ": layers that read the same tensor code it differently, which this program does not run");
            group.weights.push_back(layer.weights.get());
            group.act_scales.push_back(layer.act_scale * (1.0f / static_cast<float>(layer.weights->view().multiplier * a.multiplier)));
        }
        return group;
    }

    LanguageShape shape_;
    Table words_, places_, head_;
    Norm norm_;
    std::vector<DecoderBlock> blocks_;
    Floats cosine_, sine_;
};

}  // namespace bellbox
