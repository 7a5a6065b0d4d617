// A packed ResNet or ViT: an image in and logits out.
//
// Packed layers, norms and attention are the kernels of the Python package. Stem and classifier, in full precision, are its
// fp32 product (ops/float_linear.py). A batch norm in evaluation is x * alpha + beta by one fused multiply-add, as torch
// computes it on a processor that has such.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "layers/block.h"
#include "layers/convolution.h"
#include "layers/head.h"
#include "runtime/model/packed.h"

namespace bellbox {

// Numbers of an image, channels innermost.
struct Image {
    int64_t height = 0, width = 0, channels = 0;
    Floats values;

    Image(int64_t h, int64_t w, int64_t c) : height(h), width(w), channels(c), values(static_cast<size_t>(h * w * c)) {}
    int64_t pixels() const { return height * width; }
};

// [outputs, inputs] in fp32, row by row.
struct FloatLayer {
    int64_t inputs = 0, outputs = 0;
    Floats weight, bias;

    FloatLayer() = default;
    FloatLayer(Store& store, const std::string& name, const std::vector<int64_t>& shape, bool biased)
        : outputs(shape[0]), weight(store.floats(name + ".weight", shape)) {
        inputs = static_cast<int64_t>(weight.size()) / outputs;
        if (biased) bias = store.floats(name + ".bias", {outputs});
    }
    void run(const float* x, int64_t rows, float* out, int threads) const {
        run_float_linear(FloatLinearArgs{x, weight.data(), rows, outputs, inputs, out}, threads);
        for (int64_t i = 0; i < rows * outputs && !bias.empty(); ++i) out[i] += bias[static_cast<size_t>(i % outputs)];
    }
};

// A convolution in full precision: windows of kernel x kernel, padded with zeros, as rows (channel, line, column).
inline Image convolve_floats(const FloatLayer& layer, const Image& x, int64_t kernel, int64_t stride, int64_t padding, int threads) {
    Image out((x.height + 2 * padding - kernel) / stride + 1, (x.width + 2 * padding - kernel) / stride + 1, layer.outputs);
    Floats rows(static_cast<size_t>(out.width * layer.inputs));
    for (int64_t y = 0; y < out.height; ++y) {
        size_t at = 0;
        for (int64_t column = 0; column < out.width; ++column)
            for (int64_t c = 0; c < x.channels; ++c)
                for (int64_t ky = 0; ky < kernel; ++ky)
                    for (int64_t kx = 0; kx < kernel; ++kx) {
                        const int64_t line = y * stride - padding + ky, place = column * stride - padding + kx;
                        const bool inside = line >= 0 && line < x.height && place >= 0 && place < x.width;
                        rows[at++] = inside ? x.values[static_cast<size_t>((line * x.width + place) * x.channels + c)] : 0.0f;
                    }
        layer.run(rows.data(), out.width, out.values.data() + y * out.width * out.channels, threads);
    }
    return out;
}

struct PackedConvolution {
    PackedLayer layer;
    int64_t kernel = 0, stride = 0;
    std::vector<uint16_t> addresses;

    PackedConvolution() = default;
    PackedConvolution(const Description& described, Store& store, const std::string& name, int64_t inputs, int64_t outputs, int64_t kernel_, int64_t stride_,
                      const std::string& path)
        : layer(read_packed(described, store, name, kernel_ * kernel_ * inputs, outputs, path, true)), kernel(kernel_), stride(stride_) {
        const StoredWindow& window = *described.layers.at(name).window;
        const auto all = [](const std::vector<int64_t>& sizes, int64_t value) { return std::all_of(sizes.begin(), sizes.end(), [&](int64_t each) { return each == value; }); };
        if (window.channels != inputs || !all(window.kernel, kernel) || !all(window.stride, stride) || !all(window.padding, kernel / 2) || !all(window.dilation, 1))
            throw Error(path + ": layer " + shown(name) + " has another window than the model");
        const Weights& view = layer.weights->view();
        if (kernels().convolve == nullptr || view.bits != 2 || layer.coding.n > 4) return;
        std::vector<uint8_t> codes(static_cast<size_t>(view.n * view.k));
        unpack(view.data, view.bits, view.n, view.k, codes.data());
        addresses = pixel_addresses(geometry(Image(kernel, kernel, inputs)), view.n, codes);
    }
    ConvGeometry geometry(const Image& x) const {
        const int64_t pad = kernel / 2, rows = (x.height + 2 * pad - kernel) / stride + 1, columns = (x.width + 2 * pad - kernel) / stride + 1;
        return {x.height, x.width, x.channels, rows, columns, kernel, kernel, stride, stride, 1, 1, pad, pad, pad != 0};
    }
    Image run(const Image& x, int threads) const {
        const ConvGeometry w = geometry(x);
        Image out(w.rows, w.columns, layer.weights->n());
        const int64_t k = x.pixels() * x.channels;
        Coding coding = layer.coding;
        coding.thresholds = layer.thresholds.data();
        const float worth = 1.0f / static_cast<float>(layer.weights->view().multiplier * coding.multiplier);
        convolve({coding.of(x.values.data(), Type::f32, 1, k, k), w, *layer.weights, addresses.empty() ? nullptr : addresses.data(), layer.act_scale * worth,
                  reinterpret_cast<char*>(out.values.data()), Type::f32, nullptr, false},
                 threads);
        return out;
    }
};

struct BatchNorm {
    Floats alpha, beta;

    BatchNorm() = default;
    BatchNorm(Store& store, const std::string& name, int64_t channels) : alpha(store.floats(name + ".running_var", {channels})), beta(store.floats(name + ".bias", {channels})) {
        const Floats weight = store.floats(name + ".weight", {channels}), mean = store.floats(name + ".running_mean", {channels});
        store.pass_counter(name + ".num_batches_tracked");
        for (size_t i = 0; i < alpha.size(); ++i) {
            alpha[i] = 1.0f / std::sqrt(alpha[i] + 1e-5f) * weight[i];
            beta[i] = std::fma(-mean[i], alpha[i], beta[i]);
        }
    }
    void run(Image& x) const {
        const size_t channels = alpha.size();
        for (size_t i = 0; i < x.values.size(); i += channels)
            for (size_t c = 0; c < channels; ++c) x.values[i + c] = std::fma(x.values[i + c], alpha[c], beta[c]);
    }
};

inline void rectify(Image& x) {
    for (float& each : x.values) each = each < 0.0f ? 0.0f : each;
}

// The largest of 3 x 3 pixels, every second one.
inline Image pooled(const Image& x) {
    Image out((x.height - 1) / 2 + 1, (x.width - 1) / 2 + 1, x.channels);
    for (int64_t y = 0; y < out.height; ++y)
        for (int64_t column = 0; column < out.width; ++column)
            for (int64_t c = 0; c < x.channels; ++c) {
                float most = -INFINITY;
                for (int64_t line = std::max<int64_t>(0, 2 * y - 1); line <= std::min(x.height - 1, 2 * y + 1); ++line)
                    for (int64_t place = std::max<int64_t>(0, 2 * column - 1); place <= std::min(x.width - 1, 2 * column + 1); ++place) {
                        const float value = x.values[static_cast<size_t>((line * x.width + place) * x.channels + c)];
                        most = value > most || std::isnan(value) ? value : most;
                    }
                out.values[static_cast<size_t>((y * out.width + column) * x.channels + c)] = most;
            }
    return out;
}

// The mean of rows [rows, width], in fp64.
inline Floats mean_of(const float* x, int64_t rows, int64_t width) {
    std::vector<double> sums(static_cast<size_t>(width));
    for (int64_t i = 0; i < rows * width; ++i) sums[static_cast<size_t>(i % width)] += static_cast<double>(x[i]);
    Floats out;
    for (const double sum : sums) out.push_back(static_cast<float>(sum / static_cast<double>(rows)));
    return out;
}

class ResNet {
  public:
    ResNet(const Description& described, Store& store, const std::string& path) : shape_(*described.vision) {
        const int64_t kernel = shape_.stem_kernel;
        if (described.layers.count("stem.conv") + described.layers.count("head") > 0) throw Error(path + ": its stem or its head is packed, which this program does not run");
        stem_ = FloatLayer(store, "stem.conv", {shape_.width, shape_.channels, kernel, kernel}, false), stem_norm_ = BatchNorm(store, "stem.norm", shape_.width);
        int64_t inputs = shape_.width;
        size_t used = 0;
        for (int64_t stage = 0; stage < shape_.stages; ++stage)
            for (int64_t block = 0; block < shape_.blocks; ++block) {
                const std::string name = "stages." + std::to_string(stage) + "." + std::to_string(block);
                const int64_t outputs = shape_.width << stage, stride = stage > 0 && block == 0 ? 2 : 1;
                const auto part = [&](const char* which, int64_t from, int64_t size, int64_t step) {
                    const std::string whole = name + which;
                    ++used;
                    return Part{PackedConvolution(described, store, whole + ".conv", from, outputs, size, step, path), BatchNorm(store, whole + ".norm", outputs)};
                };
                Block made{part(".first", inputs, 3, stride), part(".second", outputs, 3, 1), {}};
                if (inputs != outputs || stride != 1) made.shortcut.push_back(part(".shortcut", inputs, 1, stride));
                blocks_.push_back(std::move(made)), inputs = outputs;
            }
        if (used != described.layers.size()) throw Error(path + ": describes layers that the model has not");
        head_ = FloatLayer(store, "head", {shape_.labels, inputs}, true);
    }

    void forward(const Image& image, float* logits, int threads) const {
        Image x = convolve_floats(stem_, image, shape_.stem_kernel, shape_.stem_stride, shape_.stem_kernel / 2, threads);
        stem_norm_.run(x), rectify(x);
        if (shape_.max_pool) x = pooled(x);
        for (const Block& block : blocks_) {
            Image inner = block.first.run(x, threads);
            rectify(inner);
            inner = block.second.run(inner, threads);
            const Image beside = block.shortcut.empty() ? std::move(x) : block.shortcut[0].run(x, threads);
            for (size_t i = 0; i < inner.values.size(); ++i) inner.values[i] += beside.values[i];
            rectify(inner);
            x = std::move(inner);
        }
        head_.run(mean_of(x.values.data(), x.pixels(), x.channels).data(), 1, logits, threads);
    }

  private:
    struct Part {
        PackedConvolution conv;
        BatchNorm norm;
        Image run(const Image& x, int threads) const {
            Image out = conv.run(x, threads);
            norm.run(out);
            return out;
        }
    };
    struct Block {
        Part first, second;
        std::vector<Part> shortcut;  // one, or none
    };
    VisionShape shape_;
    FloatLayer stem_, head_;
    BatchNorm stem_norm_;
    std::vector<Block> blocks_;
};

class ViT {
  public:
    ViT(const Description& described, Store& store, const std::string& path) : shape_(*described.vision) {
        const int64_t hidden = shape_.hidden, inner = shape_.inner, patch = shape_.patch, side = shape_.image / patch;
        if (described.layers.count("patch_embed") + described.layers.count("head") > 0) throw Error(path + ": its stem or its head is packed, which this program does not run");
        tokens_ = side * side + (shape_.class_token ? 1 : 0);
        patches_ = FloatLayer(store, "patch_embed", {hidden, shape_.channels, patch, patch}, true);
        positions_ = store.floats("positions", {1, tokens_, hidden});
        if (shape_.class_token) class_token_ = store.floats("class_token", {1, 1, hidden});
        for (int64_t i = 0; i < shape_.blocks; ++i) {
            const std::string name = "blocks." + std::to_string(i) + ".";
            Block made;
            const auto pack = [&](const char* which, int64_t from, int64_t to) { made.layers.push_back(read_packed(described, store, name + which, from, to, path)); };
            made.first = norm_of(store, name + "norm1"), made.second = norm_of(store, name + "norm2");
            for (const char* each : {"attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"}) pack(each, hidden, hidden);
            pack("mlp.fc1", hidden, inner), pack("mlp.fc2", inner, hidden);
            made.qkv = group_of(made.layers, 0, 3, name), made.output = group_of(made.layers, 3, 1, name);
            made.wide = group_of(made.layers, 4, 1, name), made.down = group_of(made.layers, 5, 1, name);
            blocks_.push_back(std::move(made));
        }
        if (6 * blocks_.size() != described.layers.size()) throw Error(path + ": describes layers that the model has not");
        norm_ = norm_of(store, "norm"), head_ = FloatLayer(store, "head", {shape_.labels, hidden}, true);
    }

    void forward(const Image& image, float* logits, int threads) const {
        const int64_t hidden = shape_.hidden, skipped = shape_.class_token ? 1 : 0;
        const Image patches = convolve_floats(patches_, image, shape_.patch, shape_.patch, 0, threads);
        Floats x(class_token_);
        x.insert(x.end(), patches.values.begin(), patches.values.end());
        for (size_t i = 0; i < x.size(); ++i) x[i] += positions_[i];
        for (const Block& block : blocks_) run_block(block, x, threads);
        Floats normed(x.size());
        normalise(norm_, x, normed, threads);
        const Floats mean = skipped > 0 ? Floats(normed.begin(), normed.begin() + hidden) : mean_of(normed.data(), tokens_, hidden);
        head_.run(mean.data(), 1, logits, threads);
    }

  private:
    struct Norm {
        Floats weight, bias;
    };
    struct Block {
        Norm first, second;
        std::vector<PackedLayer> layers;  // q, k, v, output, wide, down
        Group qkv, output, wide, down;
    };

    Norm norm_of(Store& store, const std::string& name) const { return {store.floats(name + ".weight", {shape_.hidden}), store.floats(name + ".bias", {shape_.hidden})}; }

    void normalise(const Norm& norm, const Floats& x, Floats& out, int threads) const {
        run_layer_norm(LayerNormArgs{x.data(), norm.weight.data(), norm.bias.data(), tokens_, shape_.hidden, shape_.eps, out.data()}, threads);
    }

    void run_block(const Block& block, Floats& x, int threads) const {
        const int64_t head = shape_.hidden / shape_.heads, wide_count = tokens_ * shape_.inner;
        Floats normed(x.size()), query(x.size()), key(x.size()), value(x.size()), keys(x.size()), values(x.size()), wide(static_cast<size_t>(wide_count));
        normalise(block.first, x, normed, threads);
        block.qkv.run(normed.data(), Type::f32, tokens_, {query.data(), key.data(), value.data()}, Type::f32, threads);
        const CacheView cache{CacheType::f32, keys.data(), values.data(), nullptr, nullptr, tokens_, 0, 1};
        run_prompt(PromptArgs{query.data(), key.data(), value.data(), nullptr, nullptr, 1, tokens_, shape_.heads, shape_.heads, head, false, cache, normed.data()}, threads);
        add(block.output, normed.data(), x, query, threads);
        normalise(block.second, x, normed, threads);
        block.wide.run(normed.data(), Type::f32, tokens_, {wide.data()}, Type::f32, threads);
        run_activate(ActivateArgs{wide.data(), nullptr, Activation::gelu_erf, wide.data()}, wide_count, threads);
        add(block.down, wide.data(), x, query, threads);
    }

    // x += the layers' product of `from`.
    void add(const Group& layers, const float* from, Floats& x, Floats& room, int threads) const {
        layers.run(from, Type::f32, tokens_, {room.data()}, Type::f32, threads);
        for (size_t i = 0; i < x.size(); ++i) x[i] += room[i];
    }

    VisionShape shape_;
    int64_t tokens_ = 0;
    FloatLayer patches_, head_;
    Floats positions_, class_token_;
    std::vector<Block> blocks_;
    Norm norm_;
};

// Either, behind the mean and deviation of its training images.
class Vision {
  public:
    Vision(const Description& described, Store& store, const std::string& path)
        : shape_(*described.vision), mean_(store.floats("normalise.mean", {shape_.channels, 1, 1})), deviation_(store.floats("normalise.std", {shape_.channels, 1, 1})) {
        if (shape_.resnet) resnet_.emplace(described, store, path);
        else vit_.emplace(described, store, path);
    }

    const VisionShape& shape() const { return shape_; }

    // Logits [labels] of numbers from 0 to 1, [height, width, channels].
    void forward(const float* numbers, int64_t height, int64_t width, float* logits, int threads) const {
        constexpr int64_t kMost = 1 << 14;
        if (height < 1 || width < 1 || height > kMost || width > kMost)
            throw Error("an image of " + std::to_string(width) + " x " + std::to_string(height) + "; it must have 1 to " + std::to_string(kMost) + " pixels a side");
        if (shape_.image != 0 && (height != shape_.image || width != shape_.image))
            throw Error("an image of " + std::to_string(width) + " x " + std::to_string(height) + ", but the model takes " + std::to_string(shape_.image) + " x " +
                        std::to_string(shape_.image) + "; scale it first");
        Image image(height, width, shape_.channels);
        for (size_t i = 0; i < image.values.size(); ++i) {
            const size_t channel = i % static_cast<size_t>(shape_.channels);
            image.values[i] = (numbers[i] - mean_[channel]) / deviation_[channel];
        }
        if (resnet_) resnet_->forward(image, logits, threads);
        else vit_->forward(image, logits, threads);
    }

  private:
    VisionShape shape_;
    Floats mean_, deviation_;
    std::optional<ResNet> resnet_;
    std::optional<ViT> vit_;
};

}  // namespace bellbox
