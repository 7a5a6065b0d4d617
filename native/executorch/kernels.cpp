// Bellbox's operations for ExecuTorch: a library that registers them when it is loaded (docs/device.md).
//
// Arguments are those of the operations in src/bellbox/ops, then the output. A program is a file from elsewhere, so all
// that is read is checked first; what does not fit is an error of ExecuTorch's.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <string_view>
#include <vector>

#include "layers/convolution.h"
#include "layers/head.h"
#include "layers/layer.h"
#include "layers/table.h"

namespace {

using namespace bellbox;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kMaxLevels = 16, kMaxInteger = 34, kMaxColumns = 8192;  // as in python/plan.h

struct Unfit : std::exception {
    const char* why;
    explicit Unfit(const char* text) : why(text) {}
};
void require(bool holds, const char* why) {
    if (!holds) throw Unfit(why);
}

const float* floats(const Tensor& tensor, int64_t count, const char* why) {
    require(tensor.scalar_type() == ScalarType::Float && tensor.numel() == count, why);
    return tensor.const_data_ptr<float>();
}

// Runs f, and says what it refuses in ExecuTorch's words.
template <typename F>
Tensor& attempt(KernelRuntimeContext& context, Tensor& out, const F& f) {
    try {
        f();
    } catch (const Unfit& unfit) {
        ET_LOG(Error, "bellbox: %s", unfit.why);
        context.fail(Error::InvalidArgument);
    } catch (const std::exception& error) {
        ET_LOG(Error, "bellbox: %s", error.what());
        context.fail(Error::Internal);
    }
    return out;
}

void give_shape(Tensor& out, const std::vector<int64_t>& shape) {
    require(shape.size() <= executorch::runtime::kTensorDimensionLimit && out.scalar_type() == ScalarType::Float, "an output of another kind");
    executorch::aten::SizesType sizes[executorch::runtime::kTensorDimensionLimit];
    for (size_t i = 0; i < shape.size(); ++i) sizes[i] = static_cast<executorch::aten::SizesType>(shape[i]);
    require(executorch::runtime::resize_tensor(out, {sizes, shape.size()}) == Error::Ok, "the output has no room");
}

// Runs f on rows of fp32, and gives `out` the shape of x but for the last axis.
template <typename F>
Tensor& guarded(KernelRuntimeContext& context, const Tensor& x, int64_t width, Tensor& out, const F& f) {
    return attempt(context, out, [&] {
        require(x.dim() >= 1 && x.scalar_type() == ScalarType::Float, "the input is fp32");
        std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
        shape.back() = width;
        give_shape(out, shape);
        const int64_t columns = x.size(x.dim() - 1);
        f(columns, columns > 0 ? x.numel() / columns : 0);
    });
}

struct Levels {
    int32_t multiplier, shift;
    // Of n levels, code - n/2 - zero_point.
    Levels(int64_t n, double zero_point) {
        const double twice = static_cast<double>(n) + 2 * zero_point;
        require(std::abs(twice) <= 512 && twice == std::floor(twice), "a zero point that is no multiple of 1/2");
        multiplier = static_cast<int64_t>(twice) % 2 == 0 ? 1 : 2, shift = static_cast<int32_t>(twice * multiplier / 2);
    }
    int64_t largest(int64_t n) const { return std::max<int64_t>(std::abs(shift), std::abs(multiplier * (n - 1) - shift)); }
};

// A packed layer from a program's arguments; it points into their memory.
struct Layer {
    Coding coding;
    PackedWeights weights;
    float act_scale;

    Layer(const Tensor& weight, const Tensor& weight_scale, const MaybeTensor& bias, const Tensor& act_scale_, const Tensor& thresholds,
          const MaybeTensor& act_rstd, const MaybeTensor& act_signs, int64_t columns, int64_t places, int64_t weight_levels, double weight_zero_point,
          double act_zero_point, int64_t block, std::string_view normalise, bool rescale, ScalarType dtype)
        : coding{}, weights(nullptr, 4, 0, 0, 1, 1, 0, nullptr, nullptr), act_scale(0) {
        const int64_t outputs = weight_scale.numel(), n = thresholds.numel() + 1;
        require(dtype == ScalarType::Float, "an output of another type than fp32");
        require(columns >= 1 && columns <= (int64_t{1} << 24), "1 to 2^24 weights an output");
        require(!act_signs.has_value(), "signs, which these kernels do not run");
        require(weight_levels >= 2 && weight_levels <= kMaxLevels && n >= 2 && n <= kMaxLevels, "2 to 16 levels");
        require(block >= 1 && (block & (block - 1)) == 0 && columns / places % block == 0, "a block that does not divide the input");
        const Levels levels(n, act_zero_point), of_weights(weight_levels, weight_zero_point);
        require(levels.largest(n) <= kMaxInteger && of_weights.largest(weight_levels) <= 127, "levels that do not fit the kernels");
        const int32_t bits = weight_levels <= 2 ? 1 : weight_levels <= 4 ? 2 : weight_levels <= 8 ? 3 : 4;
        require(weight.scalar_type() == ScalarType::Byte && static_cast<size_t>(weight.numel()) >= PackedWeights::bytes(bits, outputs, columns, places),
                "too few bytes of weights");
        const auto* const bytes = static_cast<const uint8_t*>(weight.const_data_ptr());
        require(reinterpret_cast<uintptr_t>(bytes) % 4 == 0, "weights that are not aligned");
        const bool fixed = normalise == "static", absmax = normalise == "absmax";
        require(fixed || normalise == "rms" || (absmax && block == 1), "a normalisation that these kernels do not run");
        require(fixed == act_rstd.has_value() && !(fixed && rescale), "act_rstd belongs to a static sigma");
        coding = {static_cast<int32_t>(block), floats(thresholds, n - 1, "thresholds that are not fp32"), static_cast<int32_t>(n),
                  fixed ? Normalise::fixed : absmax ? Normalise::absmax : Normalise::rms, 0, rescale, levels.multiplier, levels.shift};
        if (fixed) coding.rstd = static_cast<double>(*floats(*act_rstd, 1, "act_rstd is one fp32"));
        weights = PackedWeights(bytes, bits, outputs, columns, places, of_weights.multiplier, of_weights.shift,
                                floats(weight_scale, outputs, "scales that are not fp32"),
                                bias.has_value() ? floats(*bias, outputs, "a bias of another size") : nullptr);
        act_scale = *floats(act_scale_, 1, "act_scale is one fp32") * (1.0f / static_cast<float>(of_weights.multiplier * levels.multiplier));
    }
};

Tensor& packed_linear(KernelRuntimeContext& context, const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const MaybeTensor& bias,
                      const Tensor& act_scale, const Tensor& thresholds, const MaybeTensor& act_rstd, const MaybeTensor& act_signs, int64_t in_features,
                      int64_t weight_levels, double weight_zero_point, double act_zero_point, int64_t block, std::string_view normalise, bool rescale,
                      ScalarType dtype, Tensor& out) {
    return guarded(context, x, weight_scale.numel(), out, [&](int64_t columns, int64_t rows) {
        require(columns == in_features, "an input of another width");
        const Layer layer(weight, weight_scale, bias, act_scale, thresholds, act_rstd, act_signs, columns, 1, weight_levels, weight_zero_point, act_zero_point,
                          block, normalise, rescale, dtype);
        run_linear(layer.coding, {&layer.weights}, {layer.act_scale}, x.const_data_ptr(), Type::f32, rows, {out.mutable_data_ptr()}, Type::f32, 1);
    });
}

// Of [batch, channels, height, width] in any order of dimensions, or into it: memory with the channels innermost.
template <typename Outside, typename F>
void each_pixel(const Tensor& image, Outside* outside, const F& f) {
    const auto strides = image.strides();
    int64_t at = 0;
    for (int64_t b = 0; b < image.size(0); ++b)
        for (int64_t y = 0; y < image.size(2); ++y)
            for (int64_t x = 0; x < image.size(3); ++x)
                for (int64_t c = 0; c < image.size(1); ++c, ++at) f(at, outside[b * strides[0] + c * strides[1] + y * strides[2] + x * strides[3]]);
}

Tensor& packed_conv2d(KernelRuntimeContext& context, const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const MaybeTensor& bias,
                      const Tensor& act_scale, const Tensor& thresholds, const MaybeTensor& act_rstd, const MaybeTensor& act_signs, int64_t in_features,
                      int64_t weight_levels, double weight_zero_point, double act_zero_point, int64_t block, std::string_view normalise, bool rescale,
                      int64_t channels, executorch::aten::ArrayRef<int64_t> geometry, const MaybeTensor& add, bool relu, ScalarType dtype, Tensor& out) {
    return attempt(context, out, [&] {
        require(x.dim() == 4 && x.scalar_type() == ScalarType::Float && x.size(1) == channels, "the input is fp32 [batch, channels, height, width]");
        require(geometry.size() == 11 && geometry[10] == 1, "a geometry of one group");
        require(!add.has_value() && !relu, "a sum or a ReLU behind it, which these kernels do not run");
        for (size_t i = 0; i < 10; ++i) require(geometry[i] >= (i >= 4 && i < 8 ? 0 : 1) && geometry[i] <= 1 << 16, "a number of the geometry is out of range");
        const int64_t kh = geometry[0], kw = geometry[1], sy = geometry[2], sx = geometry[3], left = geometry[4], right = geometry[5], top = geometry[6],
                      bottom = geometry[7], dy = geometry[8], dx = geometry[9], height = x.size(2), width = x.size(3);
        require(in_features == kh * kw * channels, "columns are not kernel times channels");
        const int64_t room_y = height + top + bottom - dy * (kh - 1) - 1, room_x = width + left + right - dx * (kw - 1) - 1;
        require(height >= 1 && width >= 1 && height <= 1 << 16 && width <= 1 << 16 && room_y >= 0 && room_x >= 0, "the image is smaller than the window");
        const ConvGeometry w{height, width, channels, room_y / sy + 1, room_x / sx + 1, kh, kw, sy, sx, dy, dx, left, top, left + right + top + bottom != 0};
        const Layer layer(weight, weight_scale, bias, act_scale, thresholds, act_rstd, act_signs, in_features, kh * kw, weight_levels, weight_zero_point,
                          act_zero_point, block, normalise, rescale, dtype);
        give_shape(out, {x.size(0), layer.weights.n(), w.rows, w.columns});
        std::vector<float> from(static_cast<size_t>(x.numel())), to(static_cast<size_t>(out.numel()));
        each_pixel(x, x.const_data_ptr<float>(), [&](int64_t at, float value) { from[static_cast<size_t>(at)] = value; });
        const int64_t k = height * width * channels;
        convolve({layer.coding.of(from.data(), Type::f32, x.size(0), k, k), w, layer.weights, nullptr, layer.act_scale, reinterpret_cast<char*>(to.data()), Type::f32,
                  nullptr, false},
                 1);
        each_pixel(out, out.mutable_data_ptr<float>(), [&](int64_t at, float& value) { value = to[static_cast<size_t>(at)]; });
    });
}

Tensor& table_rows(KernelRuntimeContext& context, const Tensor& ids, const Tensor& weight, const MaybeTensor& multipliers, const Tensor& scale, Tensor& out) {
    return attempt(context, out, [&] {
        const bool halves = multipliers.has_value();
        const int64_t rows = scale.numel(), columns = weight.dim() == 2 ? weight.size(1) * (halves ? 2 : 1) : 0;
        require(ids.scalar_type() == ScalarType::Long, "rows are named by int64");
        require(columns >= 1 && weight.size(0) == rows && weight.scalar_type() == (halves ? ScalarType::Byte : ScalarType::Char), "a table of another kind");
        TableRowsArgs table{nullptr, nullptr, nullptr, floats(scale, rows, "scales that are not fp32"), columns, 1};
        if (halves) {
            require(multipliers->scalar_type() == ScalarType::Byte && multipliers->dim() == 2 && multipliers->size(0) == rows && multipliers->size(1) >= 1 &&
                        columns % (2 * multipliers->size(1)) == 0,
                    "multipliers of another size");
            table.halves = weight.const_data_ptr<uint8_t>(), table.multipliers = multipliers->const_data_ptr<uint8_t>(), table.groups = multipliers->size(1);
        } else {
            table.bytes = weight.const_data_ptr<int8_t>();
        }
        std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
        shape.push_back(columns);
        give_shape(out, shape);
        const int64_t* const wanted = ids.const_data_ptr<int64_t>();
        for (int64_t i = 0; i < ids.numel(); ++i) {
            require(wanted[i] >= 0 && wanted[i] < rows, "a token outside of the embedding");
            table_row(table, wanted[i], out.mutable_data_ptr<float>() + i * columns);
        }
    });
}

Tensor& rms_norm(KernelRuntimeContext& context, const Tensor& x, const Tensor& weight, double eps, Tensor& out) {
    return guarded(context, x, x.dim() > 0 ? x.size(x.dim() - 1) : 0, out, [&](int64_t columns, int64_t rows) {
        kernels().rms_norm(RmsNormArgs{x.const_data_ptr<float>(), floats(weight, columns, "a weight of another width"), rows, columns, eps, out.mutable_data_ptr<float>()}, 0, rows);
    });
}

Tensor& int8_linear(KernelRuntimeContext& context, const Tensor& x, const Tensor& weight, const Tensor& scale, Tensor& out) {
    return guarded(context, x, scale.numel(), out, [&](int64_t columns, int64_t rows) {
        require(columns >= 1 && columns <= kMaxColumns, "1 to 8192 columns");
        require(weight.scalar_type() == ScalarType::Char && weight.numel() == scale.numel() * columns, "weights of another size");
        run_int8_linear(x.const_data_ptr<float>(),
                        Int8LinearArgs{nullptr, nullptr, weight.const_data_ptr<int8_t>(), floats(scale, scale.numel(), "scales that are not fp32"), rows, scale.numel(), columns,
                                       out.mutable_data_ptr<float>()},
                        1);
    });
}

Tensor& int4_linear(KernelRuntimeContext& context, const Tensor& x, const Tensor& weight, const Tensor& multipliers, const Tensor& scale, Tensor& out) {
    return guarded(context, x, scale.numel(), out, [&](int64_t columns, int64_t rows) {
        const int64_t outputs = scale.numel(), group = outputs > 0 && multipliers.numel() > 0 ? columns * outputs / multipliers.numel() : 0;
        require(columns >= 1 && columns <= kMaxColumns && (group == 32 || group == 64) && columns % group == 0, "groups of 32 or 64, of at most 8192 columns");
        require(weight.scalar_type() == ScalarType::Byte && weight.numel() == outputs * (columns / 2), "weights of another size");
        require(multipliers.scalar_type() == ScalarType::Byte && multipliers.numel() == outputs * (columns / group), "multipliers of another size");
        run_int4_linear(x.const_data_ptr<float>(),
                        Int4LinearArgs{nullptr, nullptr, nullptr, nullptr, weight.const_data_ptr<uint8_t>(), multipliers.const_data_ptr<uint8_t>(),
                                       floats(scale, outputs, "scales that are not fp32"), rows, outputs, columns, group, out.mutable_data_ptr<float>()},
                        1);
    });
}

}  // namespace

EXECUTORCH_LIBRARY(bellbox, "packed_linear.out", packed_linear);
EXECUTORCH_LIBRARY(bellbox, "packed_conv2d.out", packed_conv2d);
EXECUTORCH_LIBRARY(bellbox, "table_rows.out", table_rows);
EXECUTORCH_LIBRARY(bellbox, "rms_norm.out", rms_norm);
EXECUTORCH_LIBRARY(bellbox, "int8_linear.out", int8_linear);
EXECUTORCH_LIBRARY(bellbox, "int4_linear.out", int4_linear);
