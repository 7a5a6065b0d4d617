// The operator bellbox::PackedLinear for onnxruntime: a packed layer in one call, with the weights as they lie in memory.
//
// SessionOptions.register_custom_ops_library(path of this library). Inputs, all but x constants: x [..., columns],
// packed uint8, weight_scale [rows], bias [rows] or [0], act_scale [1], act_thresholds [n - 1], act_rstd [1] or [0].
#include <exception>
#include <new>
#include <string>

#include "layers/layer.h"
#include "onnx/runtime_abi.h"

namespace bellbox::runtime {
namespace {

constexpr size_t kInputs = 7;
constexpr int64_t kMaxLevels = 16, kMaxInteger = 34;  // as in python/plan.h

Status* refuse(const Api* api, const std::string& why) {
    return call(api, kCreateStatus, kInvalidArgument, ("bellbox::PackedLinear: " + why).c_str());
}

struct Numbers {
    int64_t columns, weight_levels, weight_twice, act_twice, block, normalise, rescale;
    // In the order of the members; `twice` is 2 * (n/2 + zero point).
    static constexpr const char* names[] = {"in_features", "weight_levels", "weight_twice", "act_twice",
                                            "block",       "normalise",     "rescale"};
};

struct Grid {
    int32_t multiplier, shift;
    explicit Grid(int64_t twice)
        : multiplier(twice % 2 == 0 ? 1 : 2), shift(static_cast<int32_t>(twice * multiplier / 2)) {}
    int64_t largest(int64_t n) const {
        return std::max<int64_t>(std::abs(shift), std::abs(multiplier * (n - 1) - shift));
    }
};

struct Tensor {
    const void* value = nullptr;
    void* data = nullptr;
    size_t count = 0;
};

class Kernel {
  public:
    Kernel(const Api* api, const Numbers& numbers) : api_(api), n_(numbers) {}

    Status* compute(void* context) const {
        Tensor inputs[kInputs];
        for (size_t i = 0; i < kInputs; ++i)
            if (Status* failed = read(context, i, inputs[i])) return failed;
        const auto& [x, packed, scale, bias, act_scale, thresholds, rstd] = inputs;
        const int64_t rows = static_cast<int64_t>(scale.count), act_n = static_cast<int64_t>(thresholds.count) + 1;
        const int32_t bits = n_.weight_levels <= 2 ? 1 : n_.weight_levels <= 4 ? 2 : n_.weight_levels <= 8 ? 3 : 4;
        const Grid weights(n_.weight_twice), levels(n_.act_twice);
        if (rows < 1 || act_n < 2 || act_n > kMaxLevels || levels.largest(act_n) > kMaxInteger)
            return refuse(api_, "scales and thresholds of no layer");
        if (packed.count < PackedWeights::bytes(bits, rows, n_.columns, 1) || reinterpret_cast<uintptr_t>(packed.data) % 4 != 0)
            return refuse(api_, "packed has too few bytes");
        if ((bias.count != 0 && bias.count != scale.count) || act_scale.count != 1)
            return refuse(api_, "bias or act_scale of another size");
        if ((n_.normalise == 2) != (rstd.count == 1)) return refuse(api_, "act_rstd belongs to a static sigma");
        std::vector<int64_t> shape;
        if (Status* failed = shape_of(x.value, shape)) return failed;
        if (shape.empty() || shape.back() != n_.columns) return refuse(api_, "an input of another width");
        shape.back() = rows;
        void *output = nullptr, *out = nullptr;
        if (Status* failed =
                call(api_, kKernelContextGetOutput, context, size_t{0}, const_cast<const int64_t*>(shape.data()), shape.size(), &output))
            return failed;
        if (Status* failed = call(api_, kGetTensorMutableData, output, &out)) return failed;
        const PackedWeights matrix(static_cast<const uint8_t*>(packed.data), bits, rows, n_.columns, 1, weights.multiplier, weights.shift,
                                   static_cast<const float*>(scale.data), bias.count == 0 ? nullptr : static_cast<const float*>(bias.data));
        Coding coding{};
        coding.block = static_cast<int32_t>(n_.block), coding.n = static_cast<int32_t>(act_n);
        coding.thresholds = static_cast<const float*>(thresholds.data);
        coding.normalise = static_cast<Normalise>(n_.normalise), coding.rescale = n_.rescale != 0;
        coding.rstd = rstd.count == 1 ? static_cast<double>(*static_cast<const float*>(rstd.data)) : 0.0;
        coding.multiplier = levels.multiplier, coding.shift = levels.shift;
        const float worth = *static_cast<const float*>(act_scale.data) * (1.0f / static_cast<float>(weights.multiplier * levels.multiplier));
#ifdef _OPENMP
        const int threads = omp_get_max_threads();
#else
        const int threads = 1;
#endif
        run_linear(coding, {&matrix}, {worth}, x.data, Type::f32, static_cast<int64_t>(x.count) / n_.columns, {out}, Type::f32, threads);
        return nullptr;
    }

    Status* failed(const std::exception& error) const { return refuse(api_, error.what()); }

  private:
    Status* read(void* context, size_t i, Tensor& tensor) const {
        if (Status* failed = call(api_, kKernelContextGetInput, static_cast<const void*>(context), i, &tensor.value)) return failed;
        if (tensor.value == nullptr) return refuse(api_, "an input is missing");
        if (Status* failed = call(api_, kGetTensorMutableData, const_cast<void*>(tensor.value), &tensor.data)) return failed;
        void* info = nullptr;
        if (Status* failed = call(api_, kGetTensorTypeAndShape, tensor.value, &info)) return failed;
        Status* const failed = call(api_, kGetTensorShapeElementCount, static_cast<const void*>(info), &tensor.count);
        release(info);
        return failed;
    }
    Status* shape_of(const void* value, std::vector<int64_t>& shape) const {
        void* info = nullptr;
        if (Status* failed = call(api_, kGetTensorTypeAndShape, value, &info)) return failed;
        size_t axes = 0;
        Status* failed = call(api_, kGetDimensionsCount, static_cast<const void*>(info), &axes);
        shape.resize(axes);
        if (failed == nullptr) failed = call(api_, kGetDimensions, static_cast<const void*>(info), shape.data(), axes);
        release(info);
        return failed;
    }
    void release(void* info) const {
        reinterpret_cast<void (*)(void*)>(const_cast<void*>(api_->places[kReleaseTensorTypeAndShapeInfo]))(info);
    }

    const Api* api_;
    Numbers n_;
};

Status* create(const CustomOp*, const Api* api, const void* info, void** kernel) {
    Numbers numbers{};
    int64_t* const members[] = {&numbers.columns, &numbers.weight_levels, &numbers.weight_twice, &numbers.act_twice,
                                &numbers.block,   &numbers.normalise,     &numbers.rescale};
    for (size_t i = 0; i < std::size(members); ++i)
        if (Status* failed = call(api, kKernelInfoGetAttributeInt64, info, Numbers::names[i], members[i])) return failed;
    const int64_t block = numbers.block;
    if (numbers.columns < 1 || numbers.columns > (int64_t{1} << 24)) return refuse(api, "in_features out of range");
    if (block < 1 || (block & (block - 1)) != 0 || numbers.columns % block != 0) return refuse(api, "the block does not divide in_features");
    if (numbers.weight_levels < 2 || numbers.weight_levels > kMaxLevels) return refuse(api, "2 to 16 levels of weights");
    if (std::abs(numbers.weight_twice) > 512 || std::abs(numbers.act_twice) > 512) return refuse(api, "a zero point out of range");
    if (Grid(numbers.weight_twice).largest(numbers.weight_levels) > 127) return refuse(api, "integers of the weight do not fit int8");
    if (numbers.normalise < 0 || numbers.normalise > 2 || (numbers.normalise == 1 && block != 1) ||
        (numbers.normalise == 2 && numbers.rescale != 0))
        return refuse(api, "normalise is 0 (rms), 1 (absmax, block 1) or 2 (static, no rescale)");
    *kernel = new (std::nothrow) Kernel(api, numbers);
    return *kernel == nullptr ? refuse(api, "out of memory") : nullptr;
}

Status* compute(void* kernel, void* context) {
    const auto* const own = static_cast<const Kernel*>(kernel);
    try {
        return own->compute(context);
    } catch (const std::exception& error) {  // no memory; nothing of C++ may leave
        return own->failed(error);
    }
}

const CustomOp kPackedLinear = {
    kVersion,
    nullptr,
    [](const CustomOp*) { return "PackedLinear"; },
    [](const CustomOp*) -> const char* { return nullptr; },
    [](const CustomOp*, size_t i) { return i == 1 ? kUint8 : kFloat; },
    [](const CustomOp*) { return kInputs; },
    [](const CustomOp*, size_t) { return kFloat; },
    [](const CustomOp*) { return size_t{1}; },
    nullptr,
    [](void* kernel) { delete static_cast<Kernel*>(kernel); },
    [](const CustomOp*, size_t) { return 0; },
    [](const CustomOp*, size_t) { return 0; },
    [](const CustomOp*, size_t) { return 0; },
    [](const CustomOp*) { return 0; },
    [](const CustomOp*) { return 0; },
    [](const CustomOp*) { return 0; },
    [](const CustomOp*) { return 0; },
    create,
    compute,
    {},
};

}  // namespace
}  // namespace bellbox::runtime

// What onnxruntime looks for in the library.
extern "C" __attribute__((visibility("default"))) void* RegisterCustomOps(void* options, const bellbox::runtime::ApiBase* base) {
    using namespace bellbox::runtime;
    const Api* const api = base->get_api(kVersion);
    if (api == nullptr) return nullptr;  // older than 1.16: it then knows no such operator, and says so
    void* domain = nullptr;  // lives as long as the process: sessions may outlive any moment that we know of
    if (Status* failed = call(api, kCreateCustomOpDomain, "bellbox", &domain)) return failed;
    if (Status* failed = call(api, kCustomOpDomainAdd, domain, &kPackedLinear)) return failed;
    return call(api, kAddCustomOpDomain, options, domain);
}
