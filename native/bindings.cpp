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
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
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

// Memory for weights: on huge pages where it fills some. Reading it at a stretch is then twice as fast: no page walks,
// and the hardware's own fetching does not stop at every 4 KB.
Aligned<uint8_t> weight_memory(size_t bytes) {
#ifdef __linux__
    constexpr size_t kHugePage = size_t{1} << 21;
    if (bytes >= kHugePage) {
        void* p = std::aligned_alloc(kHugePage, (bytes + 63) / 64 * 64);
        if (p == nullptr) throw std::bad_alloc();
        madvise(p, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // a wish: refused, the memory serves as it is
        return Aligned<uint8_t>(static_cast<uint8_t*>(p));
    }
#endif
    return aligned<uint8_t>(bytes);
}

// A weight matrix in the machine's layout, with its scales.
class PackedWeights {
  public:
    PackedWeights(int32_t bits, int64_t n, int64_t k, int32_t multiplier, int32_t shift, uintptr_t scale, uintptr_t bias)
        : data_(weight_memory(packed_size(bits, n, k))), scale_(at<float>(scale), at<float>(scale) + n) {
        if (bias != 0) bias_.assign(at<float>(bias), at<float>(bias) + n);
        if (bits == 1) code_sums_.resize(static_cast<size_t>(n));
        view_ = Weights{data_.get(),   bits,
                        n,             k,
                        multiplier,    shift,
                        scale_.data(), bias != 0 ? bias_.data() : nullptr,
                        bits == 1 ? code_sums_.data() : nullptr};
    }
    // Codes of some rows, the first a multiple of 16: a whole matrix of bytes need never exist at once.
    void fill(uintptr_t codes, int64_t ldc, int64_t first, int64_t rows) {
        pack(at<uint8_t>(codes), ldc, view_.bits, rows, view_.k, data_.get() + packed_size(view_.bits, first, view_.k));
        for (int64_t i = 0; view_.bits == 1 && i < rows; ++i)
            code_sums_[static_cast<size_t>(first + i)] =
                std::accumulate(at<uint8_t>(codes) + i * ldc, at<uint8_t>(codes) + i * ldc + view_.k, int32_t{0});
    }
    const Weights& view() const { return view_; }
    int64_t n() const { return view_.n; }
    int64_t k() const { return view_.k; }
    size_t nbytes() const {
        return packed_size(view_.bits, view_.n, view_.k) + (scale_.size() + bias_.size() + code_sums_.size()) * 4;
    }

  private:
    Aligned<uint8_t> data_;
    std::vector<float> scale_, bias_;
    std::vector<int32_t> code_sums_;
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

int64_t tiles_of(const PackedWeights& w) { return (w.n() + 15) / 16; }

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

// Work below which a second thread costs more than it gives.
constexpr int64_t kEncodeGrain = 1 << 13;   // elements
constexpr int64_t kLinearGrain = 1 << 19;   // multiply-adds: 1 to 4 microseconds
constexpr int64_t kAttendGrain = 1 << 16;   // numbers of a cache's keys

void run_encode(const EncodeArgs& a, int threads) {
    const int64_t useful = std::max<int64_t>(1, a.rows * a.k / kEncodeGrain);
    share(a.rows, static_cast<int>(std::min<int64_t>(threads, useful)),
          [&](int64_t begin, int64_t end) { kernels().encode(a, begin, end); });
}

void encode(uintptr_t x, int x_type, int64_t rows, int64_t k, int64_t ldx, const Coding& coding, uintptr_t levels,
            int64_t ldl, uintptr_t sums, uintptr_t marks, int threads) {
    EncodeArgs a = coding.of(x, x_type, rows, k, ldx);
    a.levels = at<int8_t>(levels), a.ldl = ldl, a.sums = at<int32_t>(sums), a.marks = at<float>(marks);
    nb::gil_scoped_release release;
    run_encode(a, threads);
}

// Memory of a thread for the levels of some rows.
struct Levels {
    std::vector<int8_t> storage;
    std::vector<int32_t> sums;
    std::vector<float> marks;
    void attach(EncodeArgs& a) {
        const size_t bytes = static_cast<size_t>(a.rows * a.ldl) + 64, rows = static_cast<size_t>(a.rows);
        if (storage.size() < bytes) storage.resize(bytes);
        if (sums.size() < rows) sums.resize(rows), marks.resize(rows);
        a.levels = at<int8_t>((reinterpret_cast<uintptr_t>(storage.data()) + 63) / 64 * 64);
        a.sums = sums.data(), a.marks = marks.data();
    }
};
thread_local Levels levels_of_thread;

// One input and the weight matrices that it is multiplied with.
struct Job {
    EncodeArgs a;
    const std::vector<const PackedWeights*>& weights;
    const std::vector<float>& act_scales;
    const std::vector<uintptr_t>& outs;
    Type out_type;

    EncodeArgs rows(int64_t begin, int64_t end) const {
        EncodeArgs some = a;
        some.x = static_cast<const char*>(a.x) + begin * a.ldx * (a.x_type == Type::f32 ? 4 : 2);
        some.rows = end - begin;
        return some;
    }
    // The product of coded rows, which begin at `row` of the input, with matrix i.
    LinearArgs product(const EncodeArgs& coded, int64_t row, size_t i) const {
        const Weights& w = weights[i]->view();
        LinearArgs p{};
        p.weights = &w, p.levels = coded.levels, p.ldl = coded.ldl, p.sums = coded.sums, p.marks = coded.marks;
        p.act_n = a.n, p.act_multiplier = a.multiplier, p.act_shift = a.shift;
        p.m = coded.rows, p.act_scale = act_scales[i], p.out_type = out_type, p.ldo = w.n;
        p.out = at<char>(outs[i]) + row * w.n * (out_type == Type::f32 ? 4 : 2);
        return p;
    }
};

// Many rows: each thread codes and multiplies its own, in slabs whose codes (1 MB at most) stay in its cache between
// quantizer and product; each slab reads all weights.
void linear_by_rows(const Job& job, int team) {
    share((job.a.rows + 5) / 6, team, [&](int64_t first, int64_t last) {
        const int64_t begin = 6 * first, end = std::min(6 * last, job.a.rows), rows = end - begin;
        const int64_t room = std::max<int64_t>(96, (int64_t{1} << 20) / std::max<int64_t>(job.a.ldl, 1));
        const int64_t slabs = (rows + room - 1) / room, slab = ((rows + slabs - 1) / slabs + 5) / 6 * 6;
        for (int64_t row = begin; row < end; row += slab) {
            EncodeArgs some = job.rows(row, std::min(row + slab, end));
            levels_of_thread.attach(some);
            kernels().encode(some, 0, some.rows);
            for (size_t i = 0; i < job.weights.size(); ++i)
                kernels().linear(job.product(some, row, i), 0, some.rows, 0, tiles_of(*job.weights[i]));
        }
    });
}

// Few rows: coded once, and each thread reads its own weights, of all matrices in one parallel region.
void linear_by_outputs(const Job& job, int team, int threads) {
    EncodeArgs all = job.a;
    levels_of_thread.attach(all);
    run_encode(all, threads);
    int64_t total = 0;
    for (const PackedWeights* w : job.weights) total += tiles_of(*w);
    share(total, team, [&](int64_t begin, int64_t end) {
        for (size_t i = 0; i < job.weights.size(); ++i) {
            const int64_t tiles = tiles_of(*job.weights[i]);
            const int64_t from = std::max<int64_t>(begin, 0), to = std::min(end, tiles);
            if (from < to) kernels().linear(job.product(all, 0, i), 0, all.rows, from, to);
            begin -= tiles, end -= tiles;
        }
    });
}

// Rotation, codes, product and epilogue of one input with one or several weight matrices.
void linear(uintptr_t x, int x_type, int64_t rows, int64_t k, int64_t ldx, const Coding& coding,
            const std::vector<const PackedWeights*>& weights, const std::vector<float>& act_scales,
            const std::vector<uintptr_t>& outs, int out_type, int threads) {
    nb::gil_scoped_release release;
    Job job{coding.of(x, x_type, rows, k, ldx), weights, act_scales, outs, static_cast<Type>(out_type)};
    job.a.ldl = (k + 63) / 64 * 64;
    if (rows == 0) return;
    int64_t products = 0;
    for (const PackedWeights* w : weights) products += rows * w->n() * k;
    const int team = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, products / kLinearGrain)));
    if (rows >= 64 * team)
        linear_by_rows(job, team);
    else
        linear_by_outputs(job, team, threads);
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
    const int64_t useful = std::max<int64_t>(1, batch * heads * head_dim * start / kAttendGrain);
    nb::gil_scoped_release release;
    share(batch * kv_heads, static_cast<int>(std::min<int64_t>(threads, useful)), [&](int64_t begin, int64_t end) {
        thread_local std::vector<float> scratch;
        if (scratch.size() < static_cast<size_t>(head_dim + start + 1)) scratch.resize(static_cast<size_t>(head_dim + 2 * start + 1));
        kernels().attend(a, begin, end, scratch.data());
    });
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
        .def(nb::init<int32_t, int64_t, int64_t, int32_t, int32_t, uintptr_t, uintptr_t>())
        .def("fill", &PackedWeights::fill)
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
    m.def("rms_norm", &rms_norm);
    m.def("attend", &attend);
    m.def("int8_linear", &int8_linear);
    m.def("forward", &forward);
    m.def("backward", &backward);
}
