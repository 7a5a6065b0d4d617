// Python's view of the kernels: addresses and sizes in, nothing owned but the packed weights.
//
// src/bellbox/kernels/native.py is the only caller; it has checked dtypes, shapes and contiguity. Plain integers
// for addresses keep a call at a fraction of a microsecond.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "layers/block.h"
#include "layers/convolution.h"
#include "layers/layer.h"
#include "python/tensors.h"

namespace nb = nanobind;
using namespace bellbox;

namespace {

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void encode(uintptr_t x, int x_type, int64_t rows, int64_t k, int64_t ldx, const Coding& coding, uintptr_t levels,
            int64_t ldl, uintptr_t sums, uintptr_t row_scales, int threads) {
    EncodeArgs a = coding.of(at<void>(x), static_cast<Type>(x_type), rows, k, ldx);
    a.levels = at<int8_t>(levels), a.ldl = ldl, a.sums = at<int32_t>(sums), a.row_scales = at<float>(row_scales);
    nb::gil_scoped_release release;
    run_encode(a, threads);
}

// window: the fields of Window in their order.
void convolution(uintptr_t x, int x_type, int64_t batch, const Coding& coding, const std::vector<int64_t>& window,
                 const PackedWeights& weights, uintptr_t code_sums, uintptr_t addresses, float act_scale, uintptr_t out,
                 int out_type, uintptr_t add, bool relu, int threads) {
    const auto& v = window;
    const Window w{v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13] != 0};
    const int64_t k = w.height * w.width * w.channels;
    nb::gil_scoped_release release;
    convolve({coding.of(at<void>(x), static_cast<Type>(x_type), batch, k, k), w, weights, at<int32_t>(code_sums),
              at<uint16_t>(addresses), act_scale, at<char>(out), static_cast<Type>(out_type), at<float>(add), relu},
             threads);
}

// The nearest of -2047..2047 (ties to even) with the largest magnitude at 2047; returns what one of them is worth.
float row_to_int16(const float* x, int64_t k, int16_t* out) {
    float largest = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < k; ++i) {
        const float size = std::fabs(x[i]);
        largest = std::max(largest, size);
        finite &= size <= std::numeric_limits<float>::max();
    }
    const bool usable = finite && largest >= 1e-30f;
    const float factor = usable ? 2047.0f / largest : 0.0f;
    for (int64_t i = 0; i < k; ++i) out[i] = usable ? static_cast<int16_t>(std::nearbyint(x[i] * factor)) : int16_t{0};
    return finite ? (usable ? largest / 2047.0f : 0.0f) : std::numeric_limits<float>::quiet_NaN();
}

void rms_norm(uintptr_t x, uintptr_t weight, int64_t rows, int64_t k, double eps, uintptr_t out, int threads) {
    const RmsNormArgs a{at<float>(x), at<float>(weight), rows, k, eps, at<float>(out)};
    const int64_t useful = std::max<int64_t>(1, rows * k / kEncodeGrain);
    nb::gil_scoped_release release;
    share(rows, static_cast<int>(std::min<int64_t>(threads, useful)),
          [&](int64_t begin, int64_t end) { kernels().rms_norm(a, begin, end); });
}

void attend(uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t cosine, uintptr_t sine, uintptr_t keys,
            uintptr_t values, int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t room, int64_t start,
            uintptr_t out, int threads) {
    const AttendArgs a{at<float>(query),  at<float>(key), at<float>(value), at<float>(cosine), at<float>(sine),
                       at<float>(keys),   at<float>(values), batch, heads, kv_heads, head_dim, room, start,
                       at<float>(out)};
    nb::gil_scoped_release release;
    run_attend(a, threads);
}

// Each row of x becomes 12-bit integers by its largest magnitude first; a row with NaN or infinity gives NaN.
void int8_linear(uintptr_t x, uintptr_t weight, uintptr_t scale, int64_t m, int64_t n, int64_t k, uintptr_t out, int threads) {
    nb::gil_scoped_release release;
    std::vector<int16_t> integers(static_cast<size_t>(m * k));
    std::vector<float> x_scale(static_cast<size_t>(m));
    for (int64_t row = 0; row < m; ++row)
        x_scale[static_cast<size_t>(row)] = row_to_int16(at<float>(x) + row * k, k, integers.data() + row * k);
    const Int8LinearArgs a{integers.data(), x_scale.data(), at<int8_t>(weight), at<float>(scale), m, n, k, at<float>(out)};
    const int64_t useful = std::max<int64_t>(1, m * n * k / kLinearGrain);
    share(n, static_cast<int>(std::min<int64_t>(threads, useful)),
          [&](int64_t begin, int64_t end) { kernels().int8_linear(a, begin, end); });
}

// Rows of x are rounded to -most..most first.
void binarized(uintptr_t bits, uintptr_t scales, uintptr_t steps, uintptr_t order, uintptr_t bias, int64_t n, int64_t k,
               int64_t blocks, int64_t total, uintptr_t x, int64_t m, int most, uintptr_t out, int threads) {
    const Binarized w{at<uint64_t>(bits), at<uint16_t>(scales), at<int32_t>(steps), at<int32_t>(order), at<float>(bias),
                      n, k, blocks, total};
    nb::gil_scoped_release release;
    std::vector<int8_t> rounded(static_cast<size_t>(k + 1)), ordered(static_cast<size_t>(4 * m * total));
    std::vector<int32_t> sums(static_cast<size_t>(2 * m * blocks));
    std::vector<float> x_scale(static_cast<size_t>(m));
    for (int64_t row = 0; row < m; ++row)
        x_scale[static_cast<size_t>(row)] =
            kernels().binarized_input(w, at<float>(x) + row * k, static_cast<float>(most), rounded.data(),
                                      ordered.data() + 4 * row * total, sums.data() + 2 * row * blocks);
    const BinarizedArgs a{w, ordered.data(), sums.data(), x_scale.data(), m, at<float>(out)};
    const int64_t useful = std::max<int64_t>(1, m * n * k / kLinearGrain);
    share((n + 15) / 16, static_cast<int>(std::min<int64_t>(threads, useful)),
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

void rotate(uintptr_t x, int x_type, int64_t rows, int64_t k, int block, float factor, uintptr_t out, int out_type,
            int threads) {
    const RotateArgs a{at<void>(x), static_cast<Type>(x_type), rows, k, block, factor, at<void>(out),
                       static_cast<Type>(out_type)};
    const int64_t useful = std::max<int64_t>(1, rows * k / kEncodeGrain);
    nb::gil_scoped_release release;
    share(rows, static_cast<int>(std::min<int64_t>(threads, useful)),
          [&](int64_t begin, int64_t end) { kernels().rotate(a, begin, end); });
}

void forward(uintptr_t x, int x_type, int64_t rows, int64_t k, int block, uintptr_t thresholds, int n, float offset,
             uintptr_t r, int64_t r_stride, uintptr_t scale, int64_t scale_stride, uintptr_t x_hat, uintptr_t v,
             int out_type, int threads) {
    const ForwardArgs a{at<void>(x),   static_cast<Type>(x_type), rows, k, block, at<float>(thresholds), n, offset,
                        at<float>(r),  r_stride, at<float>(scale), scale_stride, at<void>(x_hat), at<void>(v),
                        static_cast<Type>(out_type)};
    nb::gil_scoped_release release;
    share(rows, threads, [&](int64_t begin, int64_t end) { kernels().forward(a, begin, end); });
}

void backward(uintptr_t grad, uintptr_t v, uintptr_t x_hat, int type, int64_t rows, int64_t k, int block, uintptr_t r,
              int64_t r_stride, uintptr_t gamma, int64_t gamma_stride, uintptr_t free, int64_t free_stride,
              uintptr_t grad_x, uintptr_t row_dot, int threads) {
    BackwardArgs a{};
    a.grad = at<void>(grad), a.v = at<void>(v), a.x_hat = at<void>(x_hat), a.type = static_cast<Type>(type);
    a.rows = rows, a.k = k, a.block = block;
    a.r = at<float>(r), a.r_stride = r_stride;
    a.gamma = at<float>(gamma), a.gamma_stride = gamma_stride;
    a.free = at<float>(free), a.free_stride = free_stride;
    a.grad_x = at<void>(grad_x), a.row_dot = at<float>(row_dot);
    nb::gil_scoped_release release;
    share(rows, threads, [&](int64_t begin, int64_t end) { kernels().backward(a, begin, end); });
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Bellbox's kernels for CPUs; used through bellbox.kernels.native.";
    m.attr("source") = BELLBOX_SOURCE;
    m.def("packed_size", &packed_size);
    nb::class_<Arena>(m, "Arena").def(nb::init<size_t>());
    nb::class_<PackedWeights>(m, "PackedWeights")
        .def("__init__", [](PackedWeights* self, int32_t bits, int64_t n, int64_t k, int32_t multiplier, int32_t shift,
                            uintptr_t scale, uintptr_t bias, Arena& arena) {
            new (self) PackedWeights(bits, n, k, multiplier, shift, at<float>(scale), at<float>(bias), arena);
        })
        .def("fill", [](PackedWeights& self, uintptr_t codes, int64_t ldc, int64_t first, int64_t rows) {
            self.fill(at<uint8_t>(codes), ldc, first, rows);
        })
        .def_prop_ro("n", &PackedWeights::n)
        .def_prop_ro("k", &PackedWeights::k)
        .def_prop_ro("nbytes", &PackedWeights::nbytes);
    nb::class_<Coding>(m, "Coding")
        .def("__init__", [](Coding* self, int32_t block, std::vector<float> thresholds, int32_t normalise, double rstd,
                            bool rescale, int32_t multiplier, int32_t shift) {
            new (self) Coding{block, std::move(thresholds), static_cast<Normalise>(normalise), rstd, rescale, multiplier, shift};
        });
    nb::class_<Siblings>(m, "Siblings")
        .def("__init__", [](Siblings* self, const Coding* coding, std::vector<const PackedWeights*> weights,
                            std::vector<float> act_scales) {
            new (self) Siblings{coding, std::move(weights), std::move(act_scales)};
        })
        .def("__call__", &call);
    nb::class_<Snapshot>(m, "Snapshot").def(nb::init<nb::dict>()).def("holds", &Snapshot::holds);
    nb::class_<Block>(m, "Block")
        .def("__init__", [](Block* self, const Siblings& qkv, const Siblings& output, const Siblings& wide,
                            const Siblings& down, int64_t head_dim) {
            new (self) Block(qkv, output, wide, down, head_dim);
        })
        .def("attention", [](Block& self, uintptr_t x, uintptr_t normed, int64_t batch, uintptr_t keys, uintptr_t values,
                             int64_t room, int64_t start, int threads) {
            nb::gil_scoped_release release;
            self.attention(at<float>(x), at<float>(normed), batch, nullptr, nullptr, at<float>(keys), at<float>(values),
                           room, start, threads);
        })
        .def("widen", [](Block& self, uintptr_t normed, int64_t batch, uintptr_t out, int threads) {
            nb::gil_scoped_release release;
            self.widen(at<float>(normed), batch, {at<void>(out)}, threads);
        })
        .def("narrow", [](Block& self, uintptr_t x, uintptr_t active, int64_t batch, int threads) {
            nb::gil_scoped_release release;
            self.narrow(at<float>(x), at<float>(active), batch, threads);
        });
    nb::class_<LlamaBlock, Block>(m, "LlamaBlock")
        .def("__init__", [](LlamaBlock* self, const Siblings& qkv, const Siblings& output, const Siblings& gate_up,
                            const Siblings& down, int64_t head_dim, uintptr_t first_norm, uintptr_t second_norm,
                            double eps) {
            new (self) LlamaBlock(qkv, output, gate_up, down, head_dim, at<float>(first_norm), at<float>(second_norm), eps);
        })
        .def("attend_and_widen", [](LlamaBlock& self, uintptr_t x, int64_t batch, int64_t hidden, uintptr_t cosine,
                                    uintptr_t sine, uintptr_t keys, uintptr_t values, int64_t room, int64_t start,
                                    uintptr_t gate, uintptr_t up, int threads) {
            nb::gil_scoped_release release;
            self.attend_and_widen(at<float>(x), batch, hidden, at<float>(cosine), at<float>(sine), at<float>(keys),
                                  at<float>(values), room, start, at<float>(gate), at<float>(up), threads);
        });
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("use", [](const std::string& name) { use(name.c_str()); });
    m.def("convolves_pixels", [] { return kernels().joined; });
    m.def("available", [] { return std::string(available()); });
    m.def("encode", &encode);
    m.def("rotate", &rotate);
    m.def("convolution", &convolution);
    m.def("rms_norm", &rms_norm);
    m.def("attend", &attend);
    m.def("int8_linear", &int8_linear);
    m.def("binarized", &binarized);
    m.def("integer_peak", &integer_peak);
    m.def("forward", &forward);
    m.def("backward", &backward);
}
