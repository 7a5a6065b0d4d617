// Python's view of the kernels: tensors and numbers in, which are checked here, whoever calls.
//
// src/bellbox/ops/backends/cpu is the caller. std::invalid_argument becomes ValueError there.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "layers/head.h"
#include "layers/rotary.h"
#include "layers/table.h"
#include "python/plan.h"

namespace nb = nanobind;
using namespace bellbox;

namespace {

const std::initializer_list<Kind> kFloats = {Kind::f32, Kind::bf16}, kInputs = {Kind::f32, Kind::bf16, Kind::i8};

// Rows of k numbers whose runs of `block` are rotated.
void require_rows(int64_t rows, int64_t k, int64_t block) {
    require_sizes({rows, k});
    require(power_of_two(block) && k % block == 0, "the block does not divide the features");
}

// As many levels as these thresholds tell apart.
int32_t levels_of(nb::handle thresholds) {
    const int64_t n = numel_of(thresholds) + 1;
    require(n >= 2 && n <= kMaxLevels, "the kernels code 2 to 16 levels");
    return static_cast<int32_t>(n);
}

// A number for each row, of a tensor that has one for each or one for all.
class EachRow {
  public:
    EachRow(nb::handle numbers, const char* what, int64_t rows) : data_(read<float>(numbers, what, {Kind::f32}, 1)) {
        require(numel_of(numbers) == 1 || numel_of(numbers) >= rows, std::string(what) + " has neither one number nor one for each row");
        if (numel_of(numbers) < rows) copies_.assign(static_cast<size_t>(rows), data_[0]), data_ = copies_.data();
    }
    const float* data() const { return data_; }

  private:
    std::vector<float> copies_;
    const float* data_;
};

// x [rows, k], r [rows] or [1], thresholds [n - 1], codes uint8 [rows, k]. Kept bytes are int8, their block 1.
void encode(nb::handle x, nb::handle r, nb::handle thresholds, int64_t rows, int64_t k, int32_t block, nb::handle codes,
            int threads) {
    require_rows(rows, k, block);
    const int32_t n = levels_of(thresholds);
    const int64_t padded = (k + 63) / 64 * 64;
    const EachRow each(r, "r", rows);
    EncodeArgs a{};
    a.x = read<void>(x, "x", kInputs, rows * k), a.x_type = type_of_input(x, block);
    a.rows = rows, a.k = a.ldx = k, a.block = block, a.n = n, a.r = each.data(), a.ldl = padded;
    a.thresholds = read<float>(thresholds, "thresholds", {Kind::f32}, n - 1);
    a.normalise = Normalise::rms, a.multiplier = 1, a.shift = 0;
    uint8_t* const out = read<uint8_t>(codes, "codes", {Kind::u8}, rows * k);
    nb::gil_scoped_release release;
    share(rows, useful_threads(rows * k, kEncodeGrain, threads), [&](int64_t begin, int64_t end) {
        // some rows at a time, so that they are copied from the cache
        const int64_t slab = std::max<int64_t>(1, (int64_t{1} << 16) / padded);
        for (int64_t row = begin; row < end; row += slab) {
            EncodeArgs some = a;
            some.rows = std::min(slab, end - row), some.r = a.r + row;
            some.x = static_cast<const char*>(a.x) + row * k * bytes_of(a.x_type);
            levels_of_thread.attach(some);
            kernels().encode(some, 0, some.rows);
            for (int64_t i = 0; i < some.rows; ++i)
                std::copy_n(reinterpret_cast<const uint8_t*>(some.levels) + i * padded, k, out + (row + i) * k);
        }
    });
}

// out fp64 [rows].
void row_rms(nb::handle x, int64_t rows, int64_t k, nb::handle out, int threads) {
    require_sizes({rows, k});
    const RmsArgs a{read<void>(x, "x", kFloats, rows * k), type_of_tensor(x, "x"), rows, k, read<double>(out, "out", {Kind::f64}, rows)};
    nb::gil_scoped_release release;
    share(rows, useful_threads(rows * k, kEncodeGrain, threads), [&](int64_t begin, int64_t end) { kernels().row_rms(a, begin, end); });
}

// Rows of x, as long as `weight`, of which `out` has as many.
struct NormRows {
    int64_t k, numel;
    const float *x, *weight;
    float* out;

    NormRows(nb::handle x_, nb::handle weight_, nb::handle out_) : k(numel_of(weight_)), numel(numel_of(x_)) {
        require(k >= 1 && numel % k == 0, "x does not consist of rows as long as the weight");
        x = read<float>(x_, "x", {Kind::f32}, numel), weight = read<float>(weight_, "weight", {Kind::f32}, k);
        out = read<float>(out_, "out", {Kind::f32}, numel);
    }
};

void rms_norm(nb::handle x, nb::handle weight, double eps, nb::handle out, int threads) {
    const NormRows rows(x, weight, out);
    const RmsNormArgs a{rows.x, rows.weight, rows.numel / rows.k, rows.k, eps, rows.out};
    nb::gil_scoped_release release;
    run_rms_norm(a, threads);
}

void layer_norm(nb::handle x, nb::handle weight, nb::handle bias, double eps, nb::handle out, int threads) {
    const NormRows rows(x, weight, out);
    const LayerNormArgs a{rows.x, rows.weight, read_or_null<float>(bias, "bias", {Kind::f32}, rows.k), rows.numel / rows.k, rows.k, eps, rows.out};
    nb::gil_scoped_release release;
    run_layer_norm(a, threads);
}

const int64_t* targets_of(nb::handle targets, int64_t rows, int64_t n) {
    const int64_t* const all = read<int64_t>(targets, "targets", {Kind::i64}, rows);
    for (int64_t r = 0; r < rows; ++r)
        require(all[r] >= 0 && all[r] < n, "a target is no class of the logits");
    return all;
}

// losses and log_sums [rows] of logits [rows, n] and targets [rows].
void cross_entropy(nb::handle logits, nb::handle targets, nb::handle losses, nb::handle log_sums, int threads) {
    const int64_t rows = numel_of(targets), numel = numel_of(logits);
    require(rows >= 1 && numel >= rows && numel % rows == 0, "logits do not consist of a row for each target");
    const int64_t n = numel / rows;
    const CrossEntropyArgs a{read<void>(logits, "logits", kFloats, numel), type_of_tensor(logits, "logits"), n,
                             targets_of(targets, rows, n), read<float>(losses, "losses", {Kind::f32}, rows),
                             read<float>(log_sums, "log_sums", {Kind::f32}, rows)};
    nb::gil_scoped_release release;
    share(rows, useful_threads(numel, kEncodeGrain, threads), [&](int64_t begin, int64_t end) { kernels().cross_entropy(a, begin, end); });
}

// out [rows, n]: the gradient of the logits.
void cross_entropy_backward(nb::handle logits, nb::handle targets, nb::handle log_sums, nb::handle grads, nb::handle out, int threads) {
    const int64_t rows = numel_of(targets), numel = numel_of(logits);
    require(rows >= 1 && numel >= rows && numel % rows == 0, "logits do not consist of a row for each target");
    const Type type = type_of_tensor(logits, "logits");
    require(type_of_tensor(out, "out") == type, "out is of another dtype than the logits");
    const int64_t n = numel / rows;
    const CrossEntropyBackwardArgs a{read<void>(logits, "logits", kFloats, numel), type, n, targets_of(targets, rows, n),
                                     read<float>(log_sums, "log_sums", {Kind::f32}, rows), read<float>(grads, "grads", {Kind::f32}, rows),
                                     read<void>(out, "out", kFloats, numel)};
    nb::gil_scoped_release release;
    share(rows, useful_threads(numel, kEncodeGrain, threads), [&](int64_t begin, int64_t end) { kernels().cross_entropy_backward(a, begin, end); });
}

// out = activation(x) [* times], all of one size; kind is an Activation's number.
void activate(nb::handle x, nb::handle times, int kind, nb::handle out, int threads) {
    const int64_t numel = numel_of(x);
    require(kind >= 0 && kind <= static_cast<int>(Activation::relu), "there is no such activation");
    const ActivateArgs a{read<float>(x, "x", {Kind::f32}, numel), read_or_null<float>(times, "times", {Kind::f32}, numel),
                         static_cast<Activation>(kind), read<float>(out, "out", {Kind::f32}, numel)};
    nb::gil_scoped_release release;
    run_activate(a, numel, threads);
}

// cosines and sines [positions, head / 2].
void rotary(double theta, int64_t head, int64_t positions, nb::handle cosines, nb::handle sines) {
    require(head >= 2 && head % 2 == 0 && positions >= 1 && positions <= int64_t{1} << 20, "positions or the head are out of range");
    require_sizes({positions, head});
    float *const cosine = read<float>(cosines, "cosines", {Kind::f32}, positions * head / 2),
          *const sine = read<float>(sines, "sines", {Kind::f32}, positions * head / 2);
    nb::gil_scoped_release release;
    fill_rotary(theta, head, positions, cosine, sine);
}

// A cache as Python hands it over: fp32, int8 or uint8 (two codes of 4 bits a byte), the latter two with scales.
// `start` is how many tokens each sequence holds; or int64 [batch, 2], the slot of each sequence and how many it holds.
struct GivenCache {
    std::vector<int64_t> places;  // a copy: nobody writes to it while the kernels read
    CacheView view;
};

GivenCache cache_of(nb::handle keys, nb::handle values, nb::handle key_scales, nb::handle value_scales, int64_t block, int64_t batch,
                    int64_t kv_heads, int64_t head_dim, int64_t room, nb::handle start) {
    require_sizes({batch, kv_heads, room, head_dim});
    std::vector<int64_t> places;
    int64_t most = 0, slots = batch;
    if (is_tensor(start)) {
        require(numel_of(start) == 2 * batch, "places of a cache are a slot and a number of tokens for each sequence");
        const int64_t* const given = read<int64_t>(start, "places", {Kind::i64}, 2 * batch);
        places.assign(given, given + 2 * batch);
        std::vector<int64_t> taken;
        slots = 0;
        for (int64_t i = 0; i < batch; ++i) {
            const int64_t slot = places[static_cast<size_t>(2 * i)], held = places[static_cast<size_t>(2 * i + 1)];
            require(slot >= 0 && slot < (int64_t{1} << 31), "there is no such slot in the cache");
            require(held >= 0 && held < room, "the cache has no room for another token");
            taken.push_back(slot), slots = std::max(slots, slot + 1), most = std::max(most, held);
        }
        std::sort(taken.begin(), taken.end());
        require(std::adjacent_find(taken.begin(), taken.end()) == taken.end(), "two sequences have the same slot");
        require_sizes({slots, kv_heads, room, head_dim});
    } else {
        require(nb::try_cast(start, most), "start is neither a number nor places");
        require(most >= 0 && most < room, "the cache has no room for another token");
    }
    require(power_of_two(block) && head_dim % block == 0, "the block does not divide the head");
    const Kind kind = kind_of(keys, "keys", {Kind::f32, Kind::i8, Kind::u8});
    const CacheType type = kind == Kind::f32 ? CacheType::f32 : kind == Kind::i8 ? CacheType::i8 : CacheType::i4;
    const bool coded = type != CacheType::f32;
    require(coded == !key_scales.is_none() && coded == !value_scales.is_none(), "scales go with codes");
    require(coded || block == 1, "numbers that are not coded are not rotated");
    const int64_t rows = slots * kv_heads * room, count = rows * (type == CacheType::i4 ? (head_dim + 1) / 2 : head_dim);
    const CacheView view{type,
                         read<void>(keys, "keys", {kind}, count),
                         read<void>(values, "values", {kind}, count),
                         read_or_null<float>(key_scales, "key scales", {Kind::f32}, rows),
                         read_or_null<float>(value_scales, "value scales", {Kind::f32}, rows),
                         room, most, block, places.empty() ? nullptr : places.data()};
    return {std::move(places), view};  // the numbers of a moved vector stay where they are
}

// keys and values [batch, kv_heads, room, head_dim]; cosines and sines [positions, head_dim / 2] or None.
void attend(nb::handle query, nb::handle key, nb::handle value, nb::handle cosines, nb::handle sines, nb::handle keys,
            nb::handle values, nb::handle key_scales, nb::handle value_scales, int64_t block, int64_t batch, int64_t heads,
            int64_t kv_heads, int64_t head_dim, int64_t room, nb::handle start, nb::handle out, int threads) {
    require_sizes({batch, heads, head_dim}), require_sizes({batch, kv_heads, room, head_dim});
    require(head_dim >= 1 && kv_heads >= 1 && heads % kv_heads == 0, "heads are no multiple of the key-value heads");
    const GivenCache cache = cache_of(keys, values, key_scales, value_scales, block, batch, kv_heads, head_dim, room, start);
    const int64_t half = head_dim / 2, turns = (cache.view.start + 1) * half;
    const float* const cosine = read_or_null<float>(cosines, "cosines", {Kind::f32}, turns);
    const float* const sine = read_or_null<float>(sines, "sines", {Kind::f32}, turns);
    require((cosine == nullptr) == (sine == nullptr) && (cosine == nullptr || head_dim % 2 == 0),
            "rotary positions need cosines and sines, and an even head");
    const auto numbers = [](nb::handle tensor, const char* what, int64_t count) {
        return read<float>(tensor, what, {Kind::f32}, count);
    };
    const AttendArgs a{numbers(query, "query", batch * heads * head_dim),
                       numbers(key, "key", batch * kv_heads * head_dim),
                       numbers(value, "value", batch * kv_heads * head_dim),
                       cosine, sine, batch, heads, kv_heads, head_dim, cache.view,
                       numbers(out, "out", batch * heads * head_dim)};
    nb::gil_scoped_release release;
    run_attend(a, threads);
}

// Many new tokens: query and out [batch, tokens, heads, head_dim], key and value [batch, tokens, kv_heads, head_dim].
void attend_prompt(nb::handle query, nb::handle key, nb::handle value, nb::handle cosines, nb::handle sines, nb::handle keys,
                   nb::handle values, nb::handle key_scales, nb::handle value_scales, int64_t block, int64_t batch, int64_t tokens,
                   int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t room, int64_t start, bool causal, nb::handle out, int threads) {
    require_sizes({batch, tokens, heads, head_dim}), require_sizes({batch, kv_heads, room, head_dim});
    require(head_dim >= 1 && kv_heads >= 1 && heads % kv_heads == 0, "heads are no multiple of the key-value heads");
    require(tokens >= 1 && start >= 0 && start <= room && tokens <= room - start, "the cache has no room for so many tokens");
    GivenCache cache = cache_of(keys, values, key_scales, value_scales, block, batch, kv_heads, head_dim, room, nb::int_(room - 1));
    cache.view.start = start;
    const int64_t turns = (start + tokens) * (head_dim / 2);
    const float* const cosine = read_or_null<float>(cosines, "cosines", {Kind::f32}, turns);
    const float* const sine = read_or_null<float>(sines, "sines", {Kind::f32}, turns);
    require((cosine == nullptr) == (sine == nullptr) && (cosine == nullptr || head_dim % 2 == 0),
            "rotary positions need cosines and sines, and an even head");
    const auto numbers = [&](nb::handle tensor, const char* what, int64_t each) {
        return read<float>(tensor, what, {Kind::f32}, batch * tokens * each * head_dim);
    };
    const PromptArgs a{numbers(query, "query", heads), numbers(key, "key", kv_heads), numbers(value, "value", kv_heads), cosine, sine, batch,
                       tokens, heads, kv_heads, head_dim, causal, cache.view, numbers(out, "out", heads)};
    nb::gil_scoped_release release;
    run_prompt(a, threads);
}

// x [m, columns] times the rows of weight [n, columns], fp32.
void float_linear(nb::handle x, nb::handle weight, int64_t columns, nb::handle out, int threads) {
    const int64_t numel = numel_of(x), numbers = numel_of(weight);
    require(columns >= 1 && numel % columns == 0 && numbers % columns == 0, "x and the weight do not consist of such rows");
    const int64_t m = numel / columns, n = numbers / columns;
    require_sizes({m, n}), require_sizes({n, columns});
    const FloatLinearArgs a{read<float>(x, "x", {Kind::f32}, numel), read<float>(weight, "weight", {Kind::f32}, numbers), m, n,
                            columns, read<float>(out, "out", {Kind::f32}, m * n)};
    nb::gil_scoped_release release;
    run_float_linear(a, threads);
}

// Each row of x becomes 12-bit integers by its largest magnitude first; a row with NaN or infinity gives NaN.
void int8_linear(nb::handle x, nb::handle weight, nb::handle scale, int64_t columns, nb::handle out, int threads) {
    const int64_t n = numel_of(scale), numel = numel_of(x);
    require(columns >= 1 && columns <= 8192, "the kernel takes rows of 1 to 8192 integers");
    require(numel % columns == 0, "x does not consist of such rows");
    const int64_t m = numel / columns;
    require_sizes({m, n}), require_sizes({n, columns});
    const float* const from = read<float>(x, "x", {Kind::f32}, numel);
    Int8LinearArgs a{};
    a.weight = read<int8_t>(weight, "weight", {Kind::i8}, n * columns), a.scale = read<float>(scale, "scale", {Kind::f32}, n);
    a.out = read<float>(out, "out", {Kind::f32}, m * n), a.m = m, a.n = n, a.k = columns;
    nb::gil_scoped_release release;
    run_int8_linear(from, a, threads);
}

// Likewise with 8-bit integers and a table of 4 bits by groups of columns.
void int4_linear(nb::handle x, nb::handle weight, nb::handle multipliers, nb::handle scale, int64_t columns, nb::handle out,
                 int threads) {
    require(columns >= 32 && columns <= 8192, "the kernel takes rows of 32 to 8192 integers");
    const int64_t n = numel_of(scale), numel = numel_of(x), groups = n == 0 ? columns / 32 : numel_of(multipliers) / n;
    require(groups >= 1 && columns % groups == 0 && (columns / groups == 32 || columns / groups == 64),
            "the kernel takes groups of 32 or 64 columns");
    require(numel % columns == 0, "x does not consist of such rows");
    const int64_t m = numel / columns, chunks = (columns + 127) / 128, group = columns / groups;
    require_sizes({m, n}), require_sizes({n, columns}), require_sizes({m, chunks, 128}), require_sizes({m, groups + 15});
    const float* const from = read<float>(x, "x", {Kind::f32}, numel);
    Int4LinearArgs a{};
    a.weight = read<uint8_t>(weight, "weight", {Kind::u8}, n * columns / 2);
    a.multipliers = read<uint8_t>(multipliers, "multipliers", {Kind::u8}, n * groups);
    a.scale = read<float>(scale, "scale", {Kind::f32}, n), a.out = read<float>(out, "out", {Kind::f32}, m * n);
    a.m = m, a.n = n, a.k = columns, a.group = group;
    nb::gil_scoped_release release;
    run_int4_linear(from, a, threads);
}

// The next token of each row of logits [rows, n]; -1 where they are no numbers. A setting has one number for each row.
void draw(nb::handle logits, int64_t n, nb::handle temperature, nb::handle top_k, nb::handle top_p, nb::handle drawn, nb::handle out,
          int threads) {
    const int64_t rows = numel_of(out);
    require_sizes({rows, n, 3});
    require(n >= 1 && n < (int64_t{1} << 31), "the kernel takes rows of 1 to 2^31 logits");
    const auto settings = [&](nb::handle tensor, const char* what) { return read<double>(tensor, what, {Kind::f64}, rows); };
    const DrawArgs a{read<float>(logits, "logits", {Kind::f32}, rows * n), n, settings(temperature, "temperature"),
                     read<int64_t>(top_k, "top_k", {Kind::i64}, rows), settings(top_p, "top_p"), settings(drawn, "drawn"),
                     read<int64_t>(out, "out", {Kind::i64}, rows)};
    for (int64_t i = 0; i < rows; ++i)
        require(a.temperature[i] >= 0 && a.temperature[i] <= std::numeric_limits<double>::max() && a.top_k[i] >= 0 && a.top_p[i] > 0 &&
                    a.top_p[i] <= 1 && a.drawn[i] >= 0 && a.drawn[i] < 1,
                "a setting is out of range");
    nb::gil_scoped_release release;
    share(rows, useful_threads(rows * n, kEncodeGrain, threads), [&](int64_t begin, int64_t end) {
        thread_local std::vector<uint64_t> scratch;
        const size_t size = static_cast<size_t>(n + (n + 1) / 2);
        if (scratch.size() < size) scratch.resize(size);
        kernels().draw(a, begin, end, scratch.data());
    });
}

// Rows `ids` of a table, int8, or of 4 bits by groups: out [ids, columns]. False where an id is no row.
bool table_rows(nb::handle ids, nb::handle weight, nb::handle multipliers, nb::handle scale, int64_t columns, nb::handle out,
                int threads) {
    const int64_t count = numel_of(ids), rows = numel_of(scale), width = multipliers.is_none() ? columns : columns / 2;
    require(columns >= 1, "a table without columns");
    require_sizes({count, columns}), require_sizes({rows, columns});
    const int64_t groups = multipliers.is_none() || rows == 0 ? 1 : numel_of(multipliers) / rows;
    require(groups >= 1 && columns % groups == 0 && (multipliers.is_none() || columns / groups % 2 == 0),
            "the groups do not divide the columns");
    const auto* const id = read<int64_t>(ids, "ids", {Kind::i64}, count);
    TableRowsArgs a{};
    if (multipliers.is_none()) {
        a.bytes = read<int8_t>(weight, "weight", {Kind::i8}, rows * columns);
    } else {
        a.halves = read<uint8_t>(weight, "weight", {Kind::u8}, rows * width);
        a.multipliers = read<uint8_t>(multipliers, "multipliers", {Kind::u8}, rows * groups);
    }
    a.scale = read<float>(scale, "scale", {Kind::f32}, rows), a.columns = columns, a.groups = groups;
    float* const to = read<float>(out, "out", {Kind::f32}, count * columns);
    nb::gil_scoped_release release;
    if (std::any_of(id, id + count, [&](int64_t each) { return each < 0 || each >= rows; })) return false;
    share(count, useful_threads(count * columns, kEncodeGrain, threads), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) table_row(a, id[i], to + i * columns);
    });
    return true;
}

// packed [rows, bytes], values [256, codes of a byte], scale [rows, groups] and out [rows, columns].
void decode_bytes(nb::handle packed, nb::handle values, nb::handle scale, int64_t rows, int64_t columns, nb::handle out, int threads) {
    const int64_t codes = numel_of(values) / 256, groups = rows < 1 ? 1 : numel_of(scale) / rows;
    require_sizes({rows, columns}), require_sizes({256, codes});
    require(columns >= 1 && codes >= 1 && groups >= 1 && columns % groups == 0, "the groups do not divide the columns");
    const DecodeBytesArgs a{read<uint8_t>(packed, "packed", {Kind::u8}, rows * ((columns + codes - 1) / codes)),
                            read<float>(values, "values", {Kind::f32}, 256 * codes), read<float>(scale, "scale", {Kind::f32}, rows * groups),
                            columns, codes, groups};
    float* const to = read<float>(out, "out", {Kind::f32}, rows * columns);
    nb::gil_scoped_release release;
    share(rows, useful_threads(rows * columns, kEncodeGrain, threads), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) decoded_row(a, i, to + i * columns);
    });
}

// The layout of a binarized matrix is that of ops/binarized_linear.py; rows of x are rounded to -most..most first.
void binarized(nb::handle planes, nb::handle scales, nb::handle steps, nb::handle order, nb::handle bias, int64_t n, int64_t k,
               nb::handle x, int most, nb::handle out, int threads) {
    require_sizes({n, k});
    require(n >= 1 && k >= 1 && most >= 1 && most <= 127, "sizes or the largest integer are out of range");
    const int64_t blocks = numel_of(steps) / 2, total = numel_of(order) / 4, numel = numel_of(x), tiles = (n + 15) / 16;
    require(numel % k == 0, "x does not consist of rows of k");
    const int64_t m = numel / k;
    const int32_t* const step = read<int32_t>(steps, "steps", {Kind::i32}, 2 * blocks);
    const int32_t* const place = read<int32_t>(order, "order", {Kind::i32}, 4 * total);
    int64_t taken = 0;
    for (int64_t i = 0; i < 2 * blocks; ++i) {
        require(step[i] >= 0 && step[i] <= total, "a step is out of range");
        taken += step[i];
    }
    require(taken == total, "steps do not add up to the order");
    for (int64_t i = 0; i < 4 * total; ++i) require(place[i] >= 0 && place[i] <= k, "the order names a column that is not there");
    const Binarized w{reinterpret_cast<const uint64_t*>(read<uint8_t>(planes, "planes", {Kind::u8}, tiles * total * 16)),
                      reinterpret_cast<const uint16_t*>(read<void>(scales, "scales", {Kind::f16}, tiles * blocks * 7 * 16)),
                      step, place, read_or_null<float>(bias, "bias", {Kind::f32}, n), n, k, blocks, total};
    const float* const from = read<float>(x, "x", {Kind::f32}, numel);
    float* const to = read<float>(out, "out", {Kind::f32}, m * n);
    nb::gil_scoped_release release;
    std::vector<int8_t> rounded(static_cast<size_t>(k + 1)), ordered(static_cast<size_t>(4 * m * total));
    std::vector<int32_t> sums(static_cast<size_t>(2 * m * blocks));
    std::vector<float> x_scale(static_cast<size_t>(m));
    for (int64_t row = 0; row < m; ++row)
        x_scale[static_cast<size_t>(row)] =
            kernels().binarized_input(w, from + row * k, static_cast<float>(most), rounded.data(),
                                      ordered.data() + 4 * row * total, sums.data() + 2 * row * blocks);
    const BinarizedArgs a{w, ordered.data(), sums.data(), x_scale.data(), m, to};
    share(tiles, useful_threads(m * n * k, kLinearGrain, threads),
          [&](int64_t begin, int64_t end) { kernels().binarized(a, begin, end); });
}

// Multiply-adds done by `threads` threads, `rounds` rounds each.
int64_t integer_peak(int64_t rounds, int threads) {
    nb::gil_scoped_release release;
    std::vector<int64_t> done(static_cast<size_t>(std::max(1, threads)));
    share(static_cast<int64_t>(done.size()), threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) done[static_cast<size_t>(i)] = kernels().integer_peak(rounds);
    });
    return std::accumulate(done.begin(), done.end(), int64_t{0});
}

void rotate(nb::handle x, int64_t k, int block, float factor, nb::handle out, int threads) {
    const int64_t numel = numel_of(x);
    require(k >= 1 && numel % k == 0, "x does not consist of such rows");
    require_rows(numel / k, k, block);
    const RotateArgs a{read<void>(x, "x", kFloats, numel), type_of_tensor(x, "x"), numel / k, k, block, factor,
                       read<void>(out, "out", kFloats, numel), type_of_tensor(out, "out")};
    nb::gil_scoped_release release;
    share(a.rows, useful_threads(numel, kEncodeGrain, threads), [&](int64_t begin, int64_t end) { kernels().rotate(a, begin, end); });
}

// One number for all rows, or one for each.
int64_t stride_of(nb::handle numbers, int64_t rows, const char* what) {
    const int64_t count = numel_of(numbers);
    require(count == 1 || count >= rows, std::string(what) + " has neither one number nor one for each row");
    return count == 1 ? 0 : 1;
}

// The least step of each code, and so the thresholds as steps.
std::vector<int8_t> lowest_steps(const float* thresholds, int64_t n) {
    std::vector<int8_t> lowest(static_cast<size_t>(n), static_cast<int8_t>(-kKeptMost));
    for (int64_t code = 1; code < n; ++code) {
        const float step = std::ceil(thresholds[code - 1] * kKeptSteps);
        require(step > lowest[static_cast<size_t>(code - 1)] && step <= kKeptMost, "bytes do not tell these thresholds apart");
        lowest[static_cast<size_t>(code)] = static_cast<int8_t>(step);
    }
    return lowest;
}

// x and kept [rows, k].
void keep(nb::handle x, int64_t rows, int64_t k, int block, nb::handle thresholds, nb::handle r, nb::handle kept, int threads) {
    require_rows(rows, k, block);
    const int32_t n = levels_of(thresholds);
    const float* const cuts = read<float>(thresholds, "thresholds", {Kind::f32}, n - 1);
    const std::vector<int8_t> lowest = lowest_steps(cuts, n);
    const KeepArgs a{read<void>(x, "x", kFloats, rows * k), type_of_tensor(x, "x"), rows, k, block, cuts, n,
                     read<float>(r, "r", {Kind::f32}, 1), stride_of(r, rows, "r"), lowest.data(),
                     read<int8_t>(kept, "kept", {Kind::i8}, rows * k)};
    nb::gil_scoped_release release;
    share(rows, useful_threads(rows * k, kEncodeGrain, threads), [&](int64_t begin, int64_t end) { kernels().keep(a, begin, end); });
}

// kept [rows, k] times a packed layer's weights, to out [rows, n of the weights]; row_scale [rows] or [1].
void kept_linear(nb::handle kept, nb::handle row_scale, nb::dict buffers, int64_t columns, int32_t weight_levels,
                 double weight_zero_point, double act_zero_point, nb::handle out, int threads) {
    const Plan plan(std::move(buffers), {columns, weight_levels, weight_zero_point, act_zero_point, 1, "rms", false}, columns, 1);
    const int64_t numel = numel_of(kept), rows = numel / columns, n = plan.weights().n();
    require(numel % columns == 0, "kept does not consist of rows of the weights' length");
    require_sizes({rows, n});
    const EachRow each(row_scale, "row_scale", rows);
    const void* const from = read<void>(kept, "kept", {Kind::i8}, numel);
    void* const to = read<void>(out, "out", kFloats, rows * n);
    const Type out_type = type_of_tensor(out, "out");
    nb::gil_scoped_release release;
    const std::vector<const PackedWeights*> weights{&plan.weights()};
    const std::vector<float> act_scales{plan.act_scale()};
    const std::vector<void*> outs{to};
    Job job{plan.coding().of(from, Type::kept, rows, columns, columns), weights, act_scales, outs, out_type};
    job.a.r = each.data();
    linear(job, threads);
}

// x_hat and v [rows, k] of one dtype; v may be None.
void forward(nb::handle x, int64_t rows, int64_t k, int block, nb::handle thresholds, float offset, nb::handle r, nb::handle scale,
             nb::handle x_hat, nb::handle v, int threads) {
    require_rows(rows, k, block);
    const int32_t n = levels_of(thresholds);
    const Type type = type_of_input(x, block), out_type = type_of_tensor(x_hat, "x_hat");
    require(v.is_none() || out_type == type_of_tensor(v, "v"), "x_hat and v have different dtypes");
    require(v.is_none() == (type == Type::kept), "v is kept where, and only where, the input is not kept bytes");
    const ForwardArgs a{read<void>(x, "x", kInputs, rows * k), type, rows, k, block,
                        read<float>(thresholds, "thresholds", {Kind::f32}, n - 1), n, offset,
                        read<float>(r, "r", {Kind::f32}, 1), stride_of(r, rows, "r"),
                        read<float>(scale, "scale", {Kind::f32}, 1), stride_of(scale, rows, "scale"),
                        read<void>(x_hat, "x_hat", kFloats, rows * k), read_or_null<void>(v, "v", kFloats, rows * k), out_type};
    nb::gil_scoped_release release;
    share(rows, threads, [&](int64_t begin, int64_t end) { kernels().forward(a, begin, end); });
}

void run_backward(BackwardArgs a, nb::handle grad, nb::handle r, nb::handle gamma, nb::handle follows, nb::handle grad_x,
                  nb::handle row_dot, int threads) {
    const int64_t rows = a.rows;
    a.grad = read<void>(grad, "grad", kFloats, rows * a.k), a.grad_x = read<void>(grad_x, "grad_x", kFloats, rows * a.k);
    a.r = read<float>(r, "r", {Kind::f32}, 1), a.r_stride = stride_of(r, rows, "r");
    a.gamma = read<float>(gamma, "gamma", {Kind::f32}, 1), a.gamma_stride = stride_of(gamma, rows, "gamma");
    a.free = read<float>(follows, "follows", {Kind::f32}, 1), a.free_stride = stride_of(follows, rows, "follows");
    a.row_dot = read<float>(row_dot, "row_dot", {Kind::f32}, rows);
    nb::gil_scoped_release release;
    share(rows, threads, [&](int64_t begin, int64_t end) { kernels().backward(a, begin, end); });
}

void backward(nb::handle grad, nb::handle v, nb::handle x_hat, int64_t rows, int64_t k, int block, nb::handle r, nb::handle gamma,
              nb::handle follows, nb::handle grad_x, nb::handle row_dot, int threads) {
    require_rows(rows, k, block);
    BackwardArgs a{};
    a.type = a.out_type = type_of_tensor(grad, "grad"), a.rows = rows, a.k = k, a.block = block;
    for (const nb::handle each : {v, x_hat, grad_x}) require(type_of_tensor(each, "v") == a.type, "dtypes differ");
    a.v_type = a.type, a.v = read<void>(v, "v", kFloats, rows * k), a.x_hat = read<void>(x_hat, "x_hat", kFloats, rows * k);
    run_backward(a, grad, r, gamma, follows, grad_x, row_dot, threads);
}

// The same from kept bytes; row_dot is the sum of grad * (code - offset).
void backward_kept(nb::handle grad, nb::handle kept, nb::handle thresholds, float offset, int64_t rows, int64_t k, int block,
                   nb::handle r, nb::handle gamma, nb::handle follows, nb::handle grad_x, nb::handle row_dot, int threads) {
    require_rows(rows, k, block);
    const int32_t n = levels_of(thresholds);
    BackwardArgs a{};
    a.type = type_of_tensor(grad, "grad"), a.rows = rows, a.k = k, a.block = block;
    a.out_type = type_of_tensor(grad_x, "grad_x");
    a.v_type = Type::kept, a.v = read<void>(kept, "kept", {Kind::i8}, rows * k);
    a.thresholds = read<float>(thresholds, "thresholds", {Kind::f32}, n - 1), a.n = n, a.offset = offset;
    run_backward(a, grad, r, gamma, follows, grad_x, row_dot, threads);
}

// codes [rows, columns] into the layout of src/bellbox/ops/weight_layout.py.
void prepack(nb::handle codes, int64_t rows, int64_t columns, int32_t bits, int64_t places, nb::handle out, int threads) {
    require(bits >= 1 && bits <= 4 && rows >= 0 && columns >= 1, "sizes or bits are out of range");
    require(places >= 1 && columns % places == 0, "places do not divide the columns");
    require_sizes({rows, columns});
    const uint8_t* const from = read<uint8_t>(codes, "codes", {Kind::u8}, rows * columns);
    uint8_t all = 0;
    for (int64_t i = 0; i < rows * columns; ++i) all |= from[i];
    require(all < 1 << bits, "a code needs more bits");
    uint8_t* const to = read<uint8_t>(out, "out", {Kind::u8}, static_cast<int64_t>(PackedWeights::bytes(bits, rows, columns, places)));
    require(reinterpret_cast<uintptr_t>(to) % 4 == 0, "out does not begin at a multiple of four bytes");
    nb::gil_scoped_release release;
    PackedWeights::fill(from, bits, rows, columns, places, to, threads);
}

void unpack_codes(nb::handle packed, int64_t rows, int64_t columns, int32_t bits, nb::handle codes) {
    require(bits >= 1 && bits <= 4 && rows >= 0 && columns >= 1, "sizes or bits are out of range");
    require_sizes({rows, columns});
    const uint8_t* const from = read<uint8_t>(packed, "packed", {Kind::u8}, static_cast<int64_t>(packed_size(bits, rows, columns)));
    uint8_t* const to = read<uint8_t>(codes, "codes", {Kind::u8}, rows * columns);
    nb::gil_scoped_release release;
    unpack(from, bits, rows, columns, to);
}

uint64_t fingerprint_of(nb::handle tensor, int64_t bytes) {
    const void* const data = read<void>(tensor, "tensor", {Kind::f32, Kind::bf16, Kind::f16, Kind::f64, Kind::u8, Kind::i8, Kind::i16,
                                                           Kind::i32, Kind::i64}, 0);
    static PyObject* const nbytes = interned("nbytes");
    require(bytes == nb::cast<int64_t>(attribute(tensor, nbytes)), "bytes are not those of the tensor");
    nb::gil_scoped_release release;
    return fingerprint(data, static_cast<size_t>(bytes));
}

// The packed layers of a decoder's block. The groups are taken as they are now, so one object serves one generation.
struct PlannedBlock {
    static Block make(const GroupPlan& qkv, const GroupPlan& output, const GroupPlan& wide, const GroupPlan& down, int64_t head_dim) {
        check(qkv, output, wide, down, head_dim);
        return Block(qkv.now(), output.now(), wide.now(), down.now(), head_dim);
    }
    static void check(const GroupPlan& qkv, const GroupPlan& output, const GroupPlan& wide, const GroupPlan& down, int64_t head_dim) {
        const auto q = qkv.widths(), o = output.widths(), w = wide.widths(), d = down.widths();
        require(q.size() == 3 && q[1] == q[2] && o.size() == 1 && !w.empty() && d.size() == 1, "these are no layers of a block");
        require(head_dim >= 1 && q[0] % head_dim == 0 && q[1] % head_dim == 0 && q[1] >= head_dim && q[0] % q[1] == 0,
                "heads do not fit the layers");
        require(output.k() == q[0] && down.k() == w[0] && wide.k() == qkv.k() && o[0] == qkv.k() && d[0] == qkv.k(),
                "widths of the layers do not fit together");
        for (const GroupPlan* each : {&qkv, &output, &wide, &down}) require(each->holds(), "a buffer of a layer was replaced");
    }
};

struct DecoderBlock {
    Block block;
    int64_t hidden, inner, kv, head_dim;

    DecoderBlock(const GroupPlan& qkv, const GroupPlan& output, const GroupPlan& wide, const GroupPlan& down, int64_t head_dim_)
        : block(PlannedBlock::make(qkv, output, wide, down, head_dim_)), hidden(qkv.k()), inner(wide.widths()[0]),
          kv(qkv.widths()[1]), head_dim(head_dim_) {}
};

struct LlamaDecoderBlock {
    LlamaBlock block;
    int64_t hidden, inner, kv, head_dim;

    LlamaDecoderBlock(const GroupPlan& qkv, const GroupPlan& output, const GroupPlan& gate_up, const GroupPlan& down, int64_t head_dim_,
                      nb::handle first_norm, nb::handle second_norm, double eps)
        : block((PlannedBlock::check(qkv, output, gate_up, down, head_dim_), qkv.now()), output.now(), gate_up.now(), down.now(), head_dim_,
                read<float>(first_norm, "the first norm", {Kind::f32}, qkv.k()),
                read<float>(second_norm, "the second norm", {Kind::f32}, qkv.k()), eps),
          hidden(qkv.k()), inner(gate_up.widths()[0]), kv(qkv.widths()[1]), head_dim(head_dim_) {
        require(gate_up.widths().size() == 2 && gate_up.widths()[1] == inner, "gate and up have different widths");
    }
};

float* rows_of(nb::handle tensor, const char* what, int64_t count) { return read<float>(tensor, what, {Kind::f32}, count); }

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Bellbox's kernels for CPUs; used through bellbox.ops.";
    m.attr("source") = BELLBOX_SOURCE;
#ifdef _OPENMP
    m.attr("threads") = true;
#else
    m.attr("threads") = false;  // one thread, whatever is asked for
#endif
    nb::class_<Plan>(m, "Plan")
        .def("__init__", [](Plan* self, nb::dict buffers, int64_t columns, int32_t weight_levels, double weight_zero_point,
                            double act_zero_point, int32_t block, std::string normalise, bool rescale) {
            new (self) Plan(buffers, {columns, weight_levels, weight_zero_point, act_zero_point, block, std::move(normalise), rescale},
                            columns, 1);
        })
        .def("holds", &Plan::holds)
        .def("__call__", &Plan::linear);
    nb::class_<GroupPlan>(m, "GroupPlan")
        .def(nb::init<std::vector<nb::object>>())
        .def("holds", &GroupPlan::holds)
        .def("__call__", &GroupPlan::linear);
    nb::class_<ConvPlan>(m, "ConvPlan")
        .def("__init__", [](ConvPlan* self, nb::dict buffers, int64_t columns, int32_t weight_levels, double weight_zero_point,
                            double act_zero_point, int32_t block, std::string normalise, bool rescale, int64_t channels,
                            std::array<int64_t, 10> geometry) {
            new (self) ConvPlan(buffers, {columns, weight_levels, weight_zero_point, act_zero_point, block, std::move(normalise), rescale},
                                channels, geometry);
        })
        .def("holds", &ConvPlan::holds)
        .def("__call__", &ConvPlan::convolve, nb::arg("x"), nb::arg("out"), nb::arg("add").none(), nb::arg("relu"), nb::arg("batch"),
             nb::arg("height"), nb::arg("width"), nb::arg("threads"));
    nb::class_<DecoderBlock>(m, "Block")
        .def(nb::init<const GroupPlan&, const GroupPlan&, const GroupPlan&, const GroupPlan&, int64_t>(), nb::keep_alive<1, 2>(),
             nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>())
        .def("attention", [](DecoderBlock& self, nb::handle x, nb::handle normed, int64_t batch, nb::handle keys, nb::handle values,
                             nb::handle key_scales, nb::handle value_scales, int64_t rotation, int64_t room, nb::handle start,
                             int threads) {
            const GivenCache cache = cache_of(keys, values, key_scales, value_scales, rotation, batch, self.kv / self.head_dim,
                                             self.head_dim, room, start);
            float *const to = rows_of(x, "x", batch * self.hidden), *const from = rows_of(normed, "normed", batch * self.hidden);
            nb::gil_scoped_release release;
            self.block.attention(to, from, batch, nullptr, nullptr, cache.view, threads);
        }, nb::arg("x"), nb::arg("normed"), nb::arg("batch"), nb::arg("keys"), nb::arg("values"), nb::arg("key_scales").none(),
             nb::arg("value_scales").none(), nb::arg("block"), nb::arg("room"), nb::arg("start"), nb::arg("threads"))
        .def("widen", [](DecoderBlock& self, nb::handle normed, int64_t batch, nb::handle out, int threads) {
            require_sizes({batch, self.hidden}), require_sizes({batch, self.inner});
            float *const from = rows_of(normed, "normed", batch * self.hidden), *const to = rows_of(out, "out", batch * self.inner);
            nb::gil_scoped_release release;
            self.block.widen(from, batch, {to}, threads);
        })
        .def("narrow", [](DecoderBlock& self, nb::handle x, nb::handle active, int64_t batch, int threads) {
            require_sizes({batch, self.hidden}), require_sizes({batch, self.inner});
            float *const to = rows_of(x, "x", batch * self.hidden), *const from = rows_of(active, "active", batch * self.inner);
            nb::gil_scoped_release release;
            self.block.narrow(to, from, batch, threads);
        });
    nb::class_<LlamaDecoderBlock>(m, "LlamaBlock")
        .def(nb::init<const GroupPlan&, const GroupPlan&, const GroupPlan&, const GroupPlan&, int64_t, nb::handle, nb::handle, double>(),
             nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 7>(),
             nb::keep_alive<1, 8>())
        .def("attend_and_widen", [](LlamaDecoderBlock& self, nb::handle x, int64_t batch, nb::handle cosines, nb::handle sines,
                                    nb::handle keys, nb::handle values, nb::handle key_scales, nb::handle value_scales,
                                    int64_t rotation, int64_t room, nb::handle start, nb::handle gate, nb::handle up, int threads) {
            const GivenCache cache = cache_of(keys, values, key_scales, value_scales, rotation, batch, self.kv / self.head_dim,
                                             self.head_dim, room, start);
            require_sizes({batch, self.hidden}), require_sizes({batch, self.inner});
            const int64_t half = self.head_dim / 2;
            require(self.head_dim % 2 == 0, "rotary positions need an even head");
            const float* const cosine = rows_of(cosines, "cosines", (cache.view.start + 1) * half);
            const float* const sine = rows_of(sines, "sines", (cache.view.start + 1) * half);
            float *const to = rows_of(x, "x", batch * self.hidden), *const a = rows_of(gate, "gate", batch * self.inner),
                  *const b = rows_of(up, "up", batch * self.inner);
            nb::gil_scoped_release release;
            self.block.attend_and_widen(to, batch, self.hidden, cosine, sine, cache.view, a, b, threads);
        }, nb::arg("x"), nb::arg("batch"), nb::arg("cosines"), nb::arg("sines"), nb::arg("keys"), nb::arg("values"),
             nb::arg("key_scales").none(), nb::arg("value_scales").none(), nb::arg("block"), nb::arg("room"), nb::arg("start"),
             nb::arg("gate"), nb::arg("up"), nb::arg("threads"))
        .def("narrow", [](LlamaDecoderBlock& self, nb::handle x, nb::handle gate, nb::handle up, int64_t batch, int threads) {
            require_sizes({batch, self.hidden}), require_sizes({batch, self.inner});
            float *const to = rows_of(x, "x", batch * self.hidden), *const a = rows_of(gate, "gate", batch * self.inner),
                  *const b = rows_of(up, "up", batch * self.inner);
            nb::gil_scoped_release release;
            self.block.narrow_product(to, a, b, batch * self.inner, batch, threads);
        })
        .def("narrow_gated", [](LlamaDecoderBlock& self, nb::handle x, nb::handle gate, nb::handle up, int64_t batch, int threads) {
            require_sizes({batch, self.hidden}), require_sizes({batch, self.inner});
            float *const to = rows_of(x, "x", batch * self.hidden), *const a = rows_of(gate, "gate", batch * self.inner),
                  *const b = rows_of(up, "up", batch * self.inner);
            nb::gil_scoped_release release;
            self.block.narrow_gated(to, a, b, batch * self.inner, batch, threads);
        });
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("use", [](const std::string& name) { use(name.c_str()); });
    m.def("convolves_pixels", [] { return kernels().joined; });
    m.def("available", [] { return std::string(available()); });
    m.def("encode", &encode);
    m.def("rotate", &rotate);
    m.def("row_rms", &row_rms);
    m.def("rms_norm", &rms_norm);
    m.def("layer_norm", &layer_norm, nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg());
    m.def("cross_entropy", &cross_entropy);
    m.def("cross_entropy_backward", &cross_entropy_backward);
    m.def("activate", &activate, nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg());
    m.def("rotary", &rotary);
    m.def("attend_prompt", &attend_prompt, nb::arg("query"), nb::arg("key"), nb::arg("value"), nb::arg("cosines").none(),
          nb::arg("sines").none(), nb::arg("keys"), nb::arg("values"), nb::arg("key_scales").none(), nb::arg("value_scales").none(),
          nb::arg("block"), nb::arg("batch"), nb::arg("tokens"), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("room"),
          nb::arg("start"), nb::arg("causal"), nb::arg("out"), nb::arg("threads"));
    m.def("attend", &attend, nb::arg("query"), nb::arg("key"), nb::arg("value"), nb::arg("cosines").none(), nb::arg("sines").none(),
          nb::arg("keys"), nb::arg("values"), nb::arg("key_scales").none(), nb::arg("value_scales").none(), nb::arg("block"),
          nb::arg("batch"), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("room"), nb::arg("start"), nb::arg("out"),
          nb::arg("threads"));
    m.def("float_linear", &float_linear);
    m.def("int8_linear", &int8_linear);
    m.def("int4_linear", &int4_linear);
    m.def("draw", &draw);
    m.def("table_rows", &table_rows, nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg());
    m.def("decode_bytes", &decode_bytes);
    m.def("binarized", &binarized, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg(), nb::arg(), nb::arg());
    m.def("integer_peak", &integer_peak);
    m.def("forward", &forward, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg().none(), nb::arg());
    m.def("backward", &backward);
    m.def("backward_kept", &backward_kept);
    m.def("keep", &keep);
    m.def("kept_linear", &kept_linear);
    m.def("prepack", &prepack);
    m.def("unpack", &unpack_codes);
    m.def("fingerprint", &fingerprint_of);
}
