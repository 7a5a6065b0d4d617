// A packed LLaMA or GPT: tokens in and logits out.
//
// Every kernel is one of the Python package, and everything between them is pinned (docs/design.md), hence its bits. A prompt
// goes through in pieces, whose rows go through a layer at once.
#pragma once

#include <string>
#include <vector>

#include "layers/block.h"
#include "layers/rotary.h"
#include "runtime/model/packed.h"
#include "runtime/model/table.h"

namespace bellbox {

struct Norm {
    Floats weight, bias;
};

struct DecoderBlock {
    Norm first, second;
    std::vector<PackedLayer> layers;  // q, k, v, output, then gate, up, down, or wide, down
    Group qkv, output, wide, down;
};

// Keys and values of one sequence, in fp32 or codes, and of a LLaMA the cosines and sines of its positions.
struct Cache {
    CacheType type;
    int64_t room, block, length = 0;
    std::vector<std::vector<uint8_t>> keys, values;
    std::vector<Floats> key_scales, value_scales;
    Floats cosine, sine;

    CacheView view(size_t number) {
        const bool coded = type != CacheType::f32;
        return {type, keys[number].data(), values[number].data(), coded ? key_scales[number].data() : nullptr,
                coded ? value_scales[number].data() : nullptr, room, length, block};
    }
};

inline CacheType cache_type(int bits) {
    if (bits != 0 && bits != 4 && bits != 8 && bits != 32) throw Error("a KV cache of " + std::to_string(bits) + " bits; it can have 32, 8 or 4");
    return bits == 8 ? CacheType::i8 : bits == 4 ? CacheType::i4 : CacheType::f32;
}

class Language {
  public:
    // path: of the configuration, for messages. embedding_bits: what fp32 tables are rounded to; 0: they stay.
    Language(const Description& described, Store& store, const std::string& path, int embedding_bits) : shape_(*described.language) {
        build(described, store, path);
        if (embedding_bits != 0) round_tables(embedding_bits);
    }

    const LanguageShape& shape() const { return shape_; }

    Cache new_cache(int64_t tokens, CacheType type) const {
        if (tokens > shape_.positions)
            throw Error(std::to_string(tokens) + " tokens exceed the model's context of " + std::to_string(shape_.positions) + "; shorten the text");
        const int64_t rows = tokens * shape_.key_heads, head = shape_.head;
        Cache cache{type, tokens, type == CacheType::f32 ? 1 : head & -head, 0, {}, {}, {}, {}, {}, {}};
        const size_t bytes = room_for(rows * (type == CacheType::f32 ? 4 * head : type == CacheType::i8 ? head : (head + 1) / 2));
        room_for((tokens + shape_.head + 2) * shape_.heads);  // what attention works in (layers/block.h)
        cache.keys.assign(static_cast<size_t>(shape_.blocks), std::vector<uint8_t>(bytes));
        cache.values = cache.keys;
        if (type != CacheType::f32) cache.key_scales.assign(cache.keys.size(), Floats(static_cast<size_t>(rows))), cache.value_scales = cache.key_scales;
        if (shape_.llama) {
            cache.cosine.resize(room_for(tokens * shape_.head / 2)), cache.sine.resize(cache.cosine.size());
            fill_rotary(shape_.theta, shape_.head, tokens, cache.cosine.data(), cache.sine.data());
        }
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
        normalise(norm_, x.data() + x.size() - last.size(), 1, last.data(), threads);
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

    void normalise(const Norm& norm, const float* x, int64_t rows, float* out, int threads) const {
        const float* const bias = norm.bias.empty() ? nullptr : norm.bias.data();
        if (shape_.llama) return run_rms_norm(RmsNormArgs{x, norm.weight.data(), rows, shape_.hidden, shape_.eps, out}, threads);
        run_layer_norm(LayerNormArgs{x, norm.weight.data(), bias, rows, shape_.hidden, shape_.eps, out}, threads);
    }

    void run_block(const DecoderBlock& block, float* x, int64_t rows, Cache& cache, size_t number, int threads) const {
        const int64_t hidden = shape_.hidden, queries = shape_.heads * shape_.head, keys = shape_.key_heads * shape_.head, inner = shape_.inner;
        Floats normed(room_for(rows * hidden)), query(room_for(rows * queries)), mixed(query.size());
        Floats key(room_for(rows * keys)), value(key.size()), wide(room_for(rows * inner)), up;
        normalise(block.first, x, rows, normed.data(), threads);
        block.qkv.run(normed.data(), Type::f32, rows, {query.data(), key.data(), value.data()}, Type::f32, threads);
        attend(query.data(), key.data(), value.data(), rows, cache, number, mixed.data(), threads);
        add(block.output, mixed.data(), rows, x, normed, threads);
        normalise(block.second, x, rows, normed.data(), threads);
        std::vector<void*> outs = {wide.data()};
        if (shape_.llama) up.resize(wide.size()), outs.push_back(up.data());
        block.wide.run(normed.data(), Type::f32, rows, outs, Type::f32, threads);
        run_activate(ActivateArgs{wide.data(), shape_.llama ? up.data() : nullptr, shape_.activation, wide.data()}, rows * inner, threads);
        add(block.down, wide.data(), rows, x, normed, threads);
    }

    // New tokens into the cache of block `number`, and what they attend to; a token alone has a kernel of its own.
    void attend(const float* query, const float* key, const float* value, int64_t rows, Cache& cache, size_t number, float* mixed, int threads) const {
        const CacheView view = cache.view(number);
        const float *const cosine = shape_.llama ? cache.cosine.data() : nullptr, *const sine = shape_.llama ? cache.sine.data() : nullptr;
        if (rows == 1) return run_attend(AttendArgs{query, key, value, cosine, sine, 1, shape_.heads, shape_.key_heads, shape_.head, view, mixed}, threads);
        run_prompt(PromptArgs{query, key, value, cosine, sine, 1, rows, shape_.heads, shape_.key_heads, shape_.head, true, view, mixed}, threads);
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
            made.qkv = group_of(made.layers, 0, 3, block), made.output = group_of(made.layers, 3, 1, block);
            made.wide = group_of(made.layers, 4, llama ? 2 : 1, block), made.down = group_of(made.layers, llama ? 6 : 5, 1, block);
            blocks_.push_back(std::move(made));
        }
        if (used != described.layers.size()) throw Error(path + ": describes layers that the model has not, or packs more than its blocks, which this program does not run");
    }

    // Which ones is said in src/bellbox/nn/compact.py; a tied head is the embedding.
    void round_tables(int bits) {
        const bool narrow = bits == 4 && shape_.hidden < 32, places = !shape_.llama && places_.bits == 32;
        const bool head = !shape_.tied && head_.bits == 32 && (words_.bits == 32 || (places && shape_.positions == shape_.vocabulary));
        if (narrow || (words_.bits != 32 && !places)) throw Error("the model has no fp32 embedding that could be rounded; leave them as they are");
        if (head) head_.round(bits, "the head");
        if (words_.bits == 32) words_.round(bits, "the embedding of tokens");
        if (places) places_.round(bits, "the embedding of positions");
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

    LanguageShape shape_;
    Table words_, places_, head_;
    Norm norm_;
    std::vector<DecoderBlock> blocks_;
};

}  // namespace bellbox
