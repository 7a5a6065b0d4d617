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

#include "layers/head.h"
#include "layers/layer.h"

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

// Runs f, and gives `out` the shape of x but for the last axis.
template <typename F>
Tensor& guarded(KernelRuntimeContext& context, const Tensor& x, int64_t width, Tensor& out, const F& f) {
    try {
        require(x.dim() >= 1 && x.scalar_type() == ScalarType::Float && out.scalar_type() == ScalarType::Float, "input and output are fp32");
        executorch::aten::SizesType sizes[executorch::runtime::kTensorDimensionLimit];
        std::copy_n(x.sizes().data(), x.dim(), sizes);
        sizes[x.dim() - 1] = static_cast<executorch::aten::SizesType>(width);
        require(executorch::runtime::resize_tensor(out, {sizes, static_cast<size_t>(x.dim())}) == Error::Ok, "the output has no room");
        const int64_t columns = x.size(x.dim() - 1);
        f(columns, columns > 0 ? x.numel() / columns : 0);
    } catch (const Unfit& unfit) {
        ET_LOG(Error, "bellbox: %s", unfit.why);
        context.fail(Error::InvalidArgument);
    } catch (const std::exception& error) {
        ET_LOG(Error, "bellbox: %s", error.what());
        context.fail(Error::Internal);
    }
    return out;
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

Tensor& packed_linear(KernelRuntimeContext& context, const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const MaybeTensor& bias,
                      const Tensor& act_scale, const Tensor& thresholds, const MaybeTensor& act_rstd, const MaybeTensor& act_signs, int64_t in_features,
                      int64_t weight_levels, double weight_zero_point, double act_zero_point, int64_t block, std::string_view normalise, bool rescale,
                      ScalarType dtype, Tensor& out) {
    return guarded(context, x, weight_scale.numel(), out, [&](int64_t columns, int64_t rows) {
        const int64_t outputs = weight_scale.numel(), n = thresholds.numel() + 1;
        require(dtype == ScalarType::Float, "an output of another type than fp32");
        require(columns == in_features && columns >= 1 && columns <= (int64_t{1} << 24), "an input of another width");
        require(!act_signs.has_value(), "signs, which these kernels do not run");
        require(weight_levels >= 2 && weight_levels <= kMaxLevels && n >= 2 && n <= kMaxLevels, "2 to 16 levels");
        require(block >= 1 && (block & (block - 1)) == 0 && columns % block == 0, "a block that does not divide the input");
        const Levels levels(n, act_zero_point), weights(weight_levels, weight_zero_point);
        require(levels.largest(n) <= kMaxInteger && weights.largest(weight_levels) <= 127, "levels that do not fit the kernels");
        const int32_t bits = weight_levels <= 2 ? 1 : weight_levels <= 4 ? 2 : weight_levels <= 8 ? 3 : 4;
        require(weight.scalar_type() == ScalarType::Byte && static_cast<size_t>(weight.numel()) >= PackedWeights::bytes(bits, outputs, columns, 1),
                "too few bytes of weights");
        const auto* const bytes = static_cast<const uint8_t*>(weight.const_data_ptr());
        require(reinterpret_cast<uintptr_t>(bytes) % 4 == 0, "weights that are not aligned");
        const bool fixed = normalise == "static", absmax = normalise == "absmax";
        require(fixed || normalise == "rms" || (absmax && block == 1), "a normalisation that these kernels do not run");
        require(fixed == act_rstd.has_value() && !(fixed && rescale), "act_rstd belongs to a static sigma");
        Coding coding{static_cast<int32_t>(block), floats(thresholds, n - 1, "thresholds that are not fp32"), static_cast<int32_t>(n),
                      fixed ? Normalise::fixed : absmax ? Normalise::absmax : Normalise::rms, 0, rescale, levels.multiplier, levels.shift};
        if (fixed) coding.rstd = static_cast<double>(*floats(*act_rstd, 1, "act_rstd is one fp32"));
        const PackedWeights matrix(bytes, bits, outputs, columns, 1, weights.multiplier, weights.shift, floats(weight_scale, outputs, "scales that are not fp32"),
                                   bias.has_value() ? floats(*bias, outputs, "a bias of another size") : nullptr);
        const float worth = *floats(act_scale, 1, "act_scale is one fp32") * (1.0f / static_cast<float>(weights.multiplier * levels.multiplier));
        run_linear(coding, {&matrix}, {worth}, x.const_data_ptr(), Type::f32, rows, {out.mutable_data_ptr()}, Type::f32, 1);
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
EXECUTORCH_LIBRARY(bellbox, "rms_norm.out", rms_norm);
EXECUTORCH_LIBRARY(bellbox, "int8_linear.out", int8_linear);
EXECUTORCH_LIBRARY(bellbox, "int4_linear.out", int4_linear);
