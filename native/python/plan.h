// A packed layer as Python holds it: its buffers, checked once, and read by address in every call.
//
// Whoever writes into a buffer (through .data, another process, an optimizer's kernel) is seen, since nothing is copied.
// Whoever puts another tensor in its place, or other memory under it, is seen by a look at each: the plan then says so, and
// a new one is made.
#pragma once

#include <array>
#include <memory>
#include <optional>

#include "layers/block.h"
#include "layers/convolution.h"
#include "layers/grid.h"
#include "python/tensors.h"

namespace bellbox {

// The numbers of a packed layer, as its operation's schema has them (src/bellbox/ops/packed_linear.py).
struct LayerNumbers {
    int64_t columns;           // weights of a row
    int32_t weight_levels;
    double weight_zero_point, act_zero_point;
    int32_t block;
    std::string normalise;
    bool rescale;
};

constexpr int32_t kMaxLevels = 16;
constexpr int32_t kMaxInteger = 34;  // of an activation, for which the 16-bit partial sums of AVX2 cannot overflow

inline Grid grid_of(int32_t n, double zero_point) {
    Grid grid;
    require(grid.set(n, zero_point), "a zero point is no multiple of 1/2");
    return grid;
}

class Plan {
  public:
    // features: entries that are rotated together, which `block` divides; places: of a filter.
    Plan(nb::dict buffers, const LayerNumbers& numbers, int64_t features, int64_t places) : buffers_(std::move(buffers)) {
        const int32_t n = numbers.weight_levels;
        require(n >= 2 && n <= kMaxLevels, "the kernels take 2 to 16 levels");
        const Grid weights = grid_of(n, numbers.weight_zero_point);
        const nb::object scale = hold("weight_scale"), thresholds = hold("act_thresholds");
        const int64_t rows = numel_of(scale), act_n = numel_of(thresholds) + 1;
        require(act_n >= 2 && act_n <= kMaxLevels, "the kernels take 2 to 16 levels");
        const Grid inputs = grid_of(static_cast<int32_t>(act_n), numbers.act_zero_point);
        require(inputs.largest() <= kMaxInteger, "integers of the input are above 34");
        require(weights.largest() <= 127, "integers of the weight do not fit int8");
        require(numbers.columns >= 1 && rows >= 1, "a layer without weights");
        require_sizes({numbers.columns, rows});
        require(numbers.columns <= (int64_t{1} << 24), "a row has more than 2^24 weights, whose sum may not fit 32 bits");
        require(power_of_two(numbers.block) && features >= 1 && features % numbers.block == 0,
                "the block does not divide the features");
        const int32_t bits = n <= 2 ? 1 : n <= 4 ? 2 : n <= 8 ? 3 : 4;
        const auto* data = read<uint8_t>(hold("packed"), "packed", {Kind::u8},
                                         static_cast<int64_t>(PackedWeights::bytes(bits, rows, numbers.columns, places)));
        require(reinterpret_cast<uintptr_t>(data) % 4 == 0, "packed does not begin at a multiple of four bytes");
        weights_.emplace(data, bits, rows, numbers.columns, places, weights.multiplier, weights.shift,
                         read<float>(scale, "weight_scale", {Kind::f32}, rows),
                         read_or_null<float>(hold("bias"), "bias", {Kind::f32}, rows));
        act_scale_ = read<float>(hold("act_scale"), "act_scale", {Kind::f32}, 1);
        worth_ = 1.0f / static_cast<float>(weights.multiplier * inputs.multiplier);
        coding_.block = numbers.block, coding_.n = static_cast<int32_t>(act_n);
        coding_.thresholds = read<float>(thresholds, "act_thresholds", {Kind::f32}, act_n - 1);
        coding_.rescale = numbers.rescale, coding_.multiplier = inputs.multiplier, coding_.shift = inputs.shift;
        if (numbers.normalise == "static") {
            const nb::object rstd = hold("act_rstd");
            coding_.normalise = Normalise::fixed;
            require(!numbers.rescale, "a static sigma has no rescale");
            if (kind_of(rstd, "act_rstd", {Kind::f32, Kind::f64}) == Kind::f32)
                rstd32_ = read<float>(rstd, "act_rstd", {Kind::f32}, 1);
            else
                rstd64_ = read<double>(rstd, "act_rstd", {Kind::f64}, 1);
        } else {
            require(numbers.normalise == "rms" || numbers.normalise == "absmax", "normalise is rms, absmax or static");
            coding_.normalise = numbers.normalise == "rms" ? Normalise::rms : Normalise::absmax;
            require(coding_.normalise == Normalise::rms || numbers.block == 1, "absmax goes with block 1");
        }
    }

    // Whether each buffer is the tensor that it was, with its memory where it was.
    bool holds() const {
        for (const Held& each : held_) {
            PyObject* const now = PyDict_GetItem(buffers_.ptr(), each.name.ptr());
            if (now != each.tensor.ptr()) return false;
            if (each.address != 0 && address_of(each.tensor) != each.address) return false;
        }
        return true;
    }

    const PackedWeights& weights() const { return *weights_; }
    float act_scale() const { return *act_scale_ * worth_; }
    Coding coding() const {
        Coding now = coding_;
        now.rstd = rstd32_ != nullptr ? static_cast<double>(*rstd32_) : rstd64_ != nullptr ? *rstd64_ : 0.0;
        return now;
    }

    // Of a tensor [..., columns] on the CPU: a tensor [..., rows] in `dtype`; None where a buffer is another than it was.
    nb::object linear(nb::handle x, nb::handle dtype, int threads) const {
        if (!holds()) return nb::none();
        const Input input(x, weights_->k());
        const Type out_type = type_of(dtype);
        const nb::object out = input.like(x, weights_->n(), dtype);
        void* const address = reinterpret_cast<void*>(address_of(out));
        nb::gil_scoped_release release;
        run_linear(coding(), {&*weights_}, {act_scale()}, input.data, input.type, input.rows, {address}, out_type, threads);
        return out;
    }

  private:
    struct Held {
        nb::object name, tensor;
        uintptr_t address;
    };
    nb::object hold(const char* name) {
        const nb::object key = nb::steal(interned(name));
        PyObject* const found = PyDict_GetItem(buffers_.ptr(), key.ptr());
        const nb::object tensor = found == nullptr ? nb::object(nb::none()) : nb::borrow(found);
        require(tensor.is_none() || is_tensor(tensor), std::string(name) + " is no tensor");
        held_.push_back({key, tensor, tensor.is_none() ? 0 : address_of(tensor)});
        return tensor;
    }

    nb::dict buffers_;
    std::vector<Held> held_;
    std::optional<PackedWeights> weights_;
    const float *act_scale_ = nullptr, *rstd32_ = nullptr;
    const double* rstd64_ = nullptr;
    float worth_ = 1;
    Coding coding_{};
};

// Layers that code their common input alike: one call for all of them.
class GroupPlan {
  public:
    explicit GroupPlan(std::vector<nb::object> plans) : kept_(std::move(plans)) {
        require(!kept_.empty(), "a group without layers");
        for (const nb::object& each : kept_) require(nb::isinstance<Plan>(each), "a group consists of plans");
        for (const nb::object& each : kept_) plans_.push_back(nb::cast<const Plan*>(each));
        for (const Plan* each : plans_) require(each->weights().k() == plans_[0]->weights().k(), "layers of different width");
    }
    // Whether each buffer is the tensor that it was, and all layers code their input alike, number for number.
    bool holds() const {
        const Coding first = plans_[0]->coding();
        for (const Plan* each : plans_)
            if (!each->holds() || !same(first, each->coding())) return false;
        return true;
    }
    static bool same(const Coding& a, const Coding& b) {
        return a.block == b.block && a.n == b.n && a.normalise == b.normalise && a.rstd == b.rstd && a.rescale == b.rescale &&
               a.multiplier == b.multiplier && a.shift == b.shift &&
               std::equal(a.thresholds, a.thresholds + a.n - 1, b.thresholds);
    }
    Group now() const {
        Group group{plans_[0]->coding(), {}, {}};
        for (const Plan* each : plans_) group.weights.push_back(&each->weights()), group.act_scales.push_back(each->act_scale());
        return group;
    }
    int64_t k() const { return plans_[0]->weights().k(); }
    std::vector<int64_t> widths() const {
        std::vector<int64_t> all;
        for (const Plan* each : plans_) all.push_back(each->weights().n());
        return all;
    }

    nb::object linear(nb::handle x, nb::handle dtype, int threads) const {
        if (!holds()) return nb::none();
        const Input input(x, k());
        const Type out_type = type_of(dtype);
        nb::list outs;
        std::vector<void*> addresses;
        for (const Plan* each : plans_) {
            const nb::object out = input.like(x, each->weights().n(), dtype);
            addresses.push_back(reinterpret_cast<void*>(address_of(out)));
            outs.append(out);
        }
        const Group group = now();
        nb::gil_scoped_release release;
        group.run(input.data, input.type, input.rows, addresses, out_type, threads);
        return outs;
    }

  private:
    std::vector<nb::object> kept_;
    std::vector<const Plan*> plans_;
};

// A packed convolution: the plan of its filters, and its geometry.
class ConvPlan {
  public:
    // numbers: kernel height and width, strides, padding left, right, top, bottom, dilations, each two but the padding.
    ConvPlan(nb::dict buffers, const LayerNumbers& numbers, int64_t channels, std::array<int64_t, 10> geometry)
        : plan_(std::move(buffers), numbers, channels, std::max<int64_t>(1, geometry[0] * geometry[1])), channels_(channels),
          geometry_(geometry) {
        for (int i = 0; i < 10; ++i)
            require(geometry[static_cast<size_t>(i)] >= (i >= 4 && i < 8 ? 0 : 1) && geometry[static_cast<size_t>(i)] <= 1 << 16,
                    "a number of the geometry is out of range");
        require(numbers.columns == geometry[0] * geometry[1] * channels, "columns are not kernel times channels");
    }
    bool holds() const { return plan_.holds(); }

    // x [batch, height, width, channels]; out and add (or None) [batch, out height, out width, rows]. False where a buffer is
    // another than it was; nothing was written then.
    bool convolve(nb::handle x, nb::handle out, nb::handle add, bool relu, int64_t batch, int64_t height, int64_t width,
                  int threads) {
        if (!holds()) return false;
        const auto [kh, kw, sy, sx, left, right, top, bottom, dy, dx] = geometry_;
        require_sizes({batch, channels_, height, width});
        const int64_t room_y = height + top + bottom - dy * (kh - 1) - 1, room_x = width + left + right - dx * (kw - 1) - 1;
        require(batch >= 0 && height >= 1 && width >= 1 && room_y >= 0 && room_x >= 0, "the image is smaller than the window");
        const ConvGeometry w{height, width, channels_, room_y / sy + 1, room_x / sx + 1, kh, kw, sy, sx, dy, dx, left, top,
                             left + right + top + bottom != 0};
        const PackedWeights& weights = plan_.weights();
        require_sizes({batch, weights.n(), w.rows, w.columns});
        const int64_t k = height * width * channels_, results = batch * w.rows * w.columns * weights.n();
        const Type in_type = type_of_tensor(x, "the input"), out_type = type_of_tensor(out, "the result");
        const void* const from = read<void>(x, "the input", {Kind::f32, Kind::bf16}, batch * k);
        char* const to = read<char>(out, "the result", {Kind::f32, Kind::bf16}, results);
        const float* const more = read_or_null<float>(add, "add", {Kind::f32}, results);
        require(out_type == Type::f32 || (more == nullptr && !relu), "a sum or a ReLU behind it needs float32");
        const std::shared_ptr<const std::vector<uint16_t>> addresses = addresses_of(w);
        nb::gil_scoped_release release;
        bellbox::convolve({plan_.coding().of(from, in_type, batch, k, k), w, weights,
                           addresses == nullptr ? nullptr : addresses->data(), plan_.act_scale(), to, out_type, more, relu},
                          threads);
        return true;
    }

  private:
    // Made again where a byte of the weights is another: a look at them costs far less than the product.
    std::shared_ptr<const std::vector<uint16_t>> addresses_of(const ConvGeometry& w) {
        const Weights& view = plan_.weights().view();
        if (kernels().convolve == nullptr || view.bits != 2 || plan_.coding().n > 4) return nullptr;
        const uint64_t bytes = fingerprint(view.data, packed_size(view.bits, view.n, view.k));
        const uint64_t now = bytes + static_cast<uint64_t>(kernels().joined);  // another instruction set joins others
        if (addresses_ == nullptr || now != made_from_) {
            std::vector<uint8_t> codes(static_cast<size_t>(view.n * view.k));
            unpack(view.data, view.bits, view.n, view.k, codes.data());
            addresses_ = std::make_shared<const std::vector<uint16_t>>(pixel_addresses(w, view.n, codes)), made_from_ = now;
        }
        return addresses_;
    }

    Plan plan_;
    int64_t channels_;
    std::array<int64_t, 10> geometry_;
    std::shared_ptr<const std::vector<uint16_t>> addresses_;
    uint64_t made_from_ = 0;
};

}  // namespace bellbox
