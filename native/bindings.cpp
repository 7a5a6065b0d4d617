// Python's view of the kernels: addresses and sizes in, nothing owned but the packed weights.
//
// src/bellbox/kernels/native.py is the only caller; it has checked dtypes, shapes and contiguity. Plain integers
// for addresses keep a call at a fraction of a microsecond.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;
using namespace bellbox;

namespace {

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Aligned = std::unique_ptr<T[], Free>;

template <typename T>
Aligned<T> aligned(size_t count) {
    const size_t bytes = (std::max<size_t>(count * sizeof(T), 1) + 63) / 64 * 64;
    void* p = std::aligned_alloc(64, bytes);
    if (p == nullptr) throw std::bad_alloc();
    return Aligned<T>(static_cast<T*>(p));
}

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Run f(begin, end) over [0, count) in contiguous shares, one a thread; alone where the work is small.
template <typename F>
void share(int64_t count, int threads, const F& f) {
    const int team = static_cast<int>(std::min<int64_t>(threads, count));
    if (team <= 1) {
        if (count > 0) f(int64_t{0}, count);
        return;
    }
#pragma omp parallel num_threads(team)
    {
#ifdef _OPENMP
        const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
#else
        const int64_t i = 0, n = 1;
#endif
        const int64_t begin = count * i / n, end = count * (i + 1) / n;
        if (begin < end) f(begin, end);
    }
}

// A weight matrix in the machine's layout, with its scales.
class PackedWeights {
  public:
    PackedWeights(uintptr_t codes, int64_t ldc, int32_t bits, int64_t n, int64_t k, int32_t multiplier, int32_t shift,
                  uintptr_t scale, uintptr_t bias)
        : data_(aligned<uint8_t>(packed_size(bits, n, k))), scale_(at<float>(scale), at<float>(scale) + n) {
        if (bias != 0) bias_.assign(at<float>(bias), at<float>(bias) + n);
        pack(at<uint8_t>(codes), ldc, bits, n, k, data_.get());
        view_ = Weights{data_.get(), bits, n, k, multiplier, shift, scale_.data(), bias != 0 ? bias_.data() : nullptr};
    }
    const Weights& view() const { return view_; }
    int64_t n() const { return view_.n; }
    int64_t k() const { return view_.k; }
    size_t nbytes() const {
        return packed_size(view_.bits, view_.n, view_.k) + (scale_.size() + bias_.size()) * sizeof(float);
    }

  private:
    Aligned<uint8_t> data_;
    std::vector<float> scale_, bias_;
    Weights view_{};
};

// How rows are coded: everything of EncodeArgs but the rows.
struct Coding {
    int32_t block;
    std::vector<float> thresholds;
    int32_t normalise;
    double rsigma;
    bool rescale;
    int32_t multiplier, shift;

    EncodeArgs of(uintptr_t x, int x_type, int64_t rows, int64_t k, int64_t ldx) const {
        EncodeArgs a{};
        a.x = at<void>(x), a.x_type = static_cast<Type>(x_type), a.rows = rows, a.k = k, a.ldx = ldx;
        a.block = block, a.thresholds = thresholds.data(), a.n = static_cast<int32_t>(thresholds.size()) + 1;
        a.normalise = static_cast<Normalise>(normalise), a.rsigma = rsigma, a.rescale = rescale;
        a.multiplier = multiplier, a.shift = shift;
        return a;
    }
};

// Work below which a second thread costs more than it gives.
constexpr int64_t kEncodeGrain = 1 << 13;   // elements
constexpr int64_t kLinearGrain = 1 << 19;   // multiply-adds: 1 to 4 microseconds

void run_encode(const EncodeArgs& a, int threads) {
    const int64_t useful = std::max<int64_t>(1, a.rows * a.k / kEncodeGrain);
    share(a.rows, static_cast<int>(std::min<int64_t>(threads, useful)),
          [&](int64_t begin, int64_t end) { kernels().encode(a, begin, end); });
}

void run_linear(const LinearArgs& a, int threads) {
    const int64_t tiles = (a.weights->n + 15) / 16;
    const int64_t useful = std::max<int64_t>(1, a.m * a.weights->n * a.weights->k / kLinearGrain);
    const int team = static_cast<int>(std::min<int64_t>(threads, useful));
    if (a.m >= 64 * team) {  // many rows: each thread reads all weights for its own rows
        share((a.m + 5) / 6, team, [&](int64_t begin, int64_t end) {
            kernels().linear(a, 6 * begin, std::min(6 * end, a.m), 0, tiles);
        });
    } else {                 // few rows: each thread reads its own weights
        share(tiles, team, [&](int64_t begin, int64_t end) { kernels().linear(a, 0, a.m, begin, end); });
    }
}

void encode(uintptr_t x, int x_type, int64_t rows, int64_t k, int64_t ldx, const Coding& coding, uintptr_t levels,
            int64_t ldl, uintptr_t sums, uintptr_t marks, int threads) {
    EncodeArgs a = coding.of(x, x_type, rows, k, ldx);
    a.levels = at<int8_t>(levels), a.ldl = ldl, a.sums = at<int32_t>(sums), a.marks = at<float>(marks);
    nb::gil_scoped_release release;
    run_encode(a, threads);
}

// Rotation, codes, product and epilogue of one input with one or several weight matrices.
void linear(uintptr_t x, int x_type, int64_t rows, int64_t k, int64_t ldx, const Coding& coding,
            const std::vector<const PackedWeights*>& weights, const std::vector<float>& act_scales,
            const std::vector<uintptr_t>& outs, int out_type, int threads) {
    EncodeArgs a = coding.of(x, x_type, rows, k, ldx);
    nb::gil_scoped_release release;
    a.ldl = (k + 63) / 64 * 64;
    // Rows are worked on in slabs of even size whose codes stay in the caches between quantizer and product (1 MB a
    // thread); each slab reads all weights.
    const int64_t room = std::max<int64_t>(96, std::max(threads, 1) * (int64_t{1} << 20) / std::max<int64_t>(a.ldl, 1));
    const int64_t slabs = std::max<int64_t>(1, (rows + room - 1) / room), slab = ((rows + slabs - 1) / slabs + 5) / 6 * 6;
    const int64_t size = std::min(rows, slab);
    thread_local std::vector<int8_t> storage;
    thread_local std::vector<int32_t> sums;
    thread_local std::vector<float> marks;
    if (storage.size() < static_cast<size_t>(size * a.ldl) + 64) storage.resize(static_cast<size_t>(size * a.ldl) + 64);
    if (sums.size() < static_cast<size_t>(size)) sums.resize(static_cast<size_t>(size)), marks.resize(static_cast<size_t>(size));
    a.levels = at<int8_t>((reinterpret_cast<uintptr_t>(storage.data()) + 63) / 64 * 64);
    a.sums = sums.data(), a.marks = marks.data();
    const size_t x_size = a.x_type == Type::f32 ? 4 : 2, out_size = out_type == 0 ? 4 : 2;
    for (int64_t row = 0; row < rows; row += slab) {
        a.x = at<char>(x) + static_cast<size_t>(row * ldx) * x_size;
        a.rows = std::min(slab, rows - row);
        run_encode(a, threads);
        for (size_t i = 0; i < weights.size(); ++i) {
            const Weights& w = weights[i]->view();
            run_linear(LinearArgs{&w, a.levels, a.ldl, a.sums, a.marks, a.rows, act_scales[i],
                                  at<char>(outs[i]) + static_cast<size_t>(row * w.n) * out_size,
                                  static_cast<Type>(out_type), w.n},
                       threads);
        }
    }
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
    nb::class_<PackedWeights>(m, "PackedWeights")
        .def(nb::init<uintptr_t, int64_t, int32_t, int64_t, int64_t, int32_t, int32_t, uintptr_t, uintptr_t>())
        .def_prop_ro("n", &PackedWeights::n)
        .def_prop_ro("k", &PackedWeights::k)
        .def_prop_ro("nbytes", &PackedWeights::nbytes);
    nb::class_<Coding>(m, "Coding")
        .def("__init__", [](Coding* self, int32_t block, std::vector<float> thresholds, int32_t normalise, double rsigma,
                            bool rescale, int32_t multiplier, int32_t shift) {
            new (self) Coding{block, std::move(thresholds), normalise, rsigma, rescale, multiplier, shift};
        });
    m.def("isa", [] { return std::string(kernels().name); });
    m.def("use", [](const std::string& name) { use(name.c_str()); });
    m.def("available", [] { return std::string(available()); });
    m.def("encode", &encode);
    m.def("rotate", &rotate);
    m.def("linear", &linear);
    m.def("forward", &forward);
    m.def("backward", &backward);
}
