// A packed layer at work: its weights in memory, how its input is coded, and both on threads.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "kernels/kernels.h"

namespace bellbox {

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

inline int useful_threads(int64_t work, int64_t grain, int threads) {
    return static_cast<int>(std::clamp<int64_t>(work / grain, 1, std::clamp(threads, 1, 1024)));
}

constexpr int64_t kPackGrain = 1 << 16;  // codes, below which a second thread costs more than it gives

// A weight matrix as its tensor holds it (src/bellbox/ops/weight_layout.py): tiles, and for 1 and 2 bits the sums of the codes
// of each row, of the whole row first and, of a filter with several places, place by place. Nothing is copied: whoever
// makes it keeps the memory.
class PackedWeights {
  public:
    // Bytes of such a tensor.
    static size_t bytes(int32_t bits, int64_t n, int64_t k, int64_t places) {
        const int64_t sums = bits > 2 ? 0 : places > 1 ? 1 + places : 1;
        return packed_size(bits, n, k) + static_cast<size_t>(4 * n * sums);
    }
    // Fills one from codes [n, k], the columns place by place.
    static void fill(const uint8_t* codes, int32_t bits, int64_t n, int64_t k, int64_t places, uint8_t* out, int threads) {
        share((n + 15) / 16, static_cast<int>(std::clamp<int64_t>(n * k / kPackGrain, 1, std::clamp(threads, 1, 1024))),
              [&](int64_t begin, int64_t end) { pack(codes, k, bits, n, k, 16 * begin, std::min(16 * end, n), out); });
        if (bits > 2) return;
        int32_t* sums = reinterpret_cast<int32_t*>(out + packed_size(bits, n, k));
        const int64_t depth = k / places;
        for (int64_t row = 0; row < n; ++row) {
            int32_t all = 0;
            for (int64_t place = 0; place < places; ++place) {
                const uint8_t* first = codes + row * k + place * depth;
                const int32_t sum = std::accumulate(first, first + depth, int32_t{0});
                if (places > 1) sums[(1 + place) * n + row] = sum;
                all += sum;
            }
            sums[row] = all;
        }
    }

    PackedWeights(const uint8_t* data, int32_t bits, int64_t n, int64_t k, int64_t places, int32_t multiplier, int32_t shift,
                  const float* scale, const float* bias) {
        const int32_t* sums = bits > 2 ? nullptr : reinterpret_cast<const int32_t*>(data + packed_size(bits, n, k));
        view_ = Weights{data, bits, n, k, multiplier, shift, scale, bias, sums};
        place_sums_ = sums != nullptr && places > 1 ? sums + n : sums;
    }
    const Weights& view() const { return view_; }
    int64_t n() const { return view_.n; }
    int64_t k() const { return view_.k; }
    const int32_t* place_sums() const { return place_sums_; }  // [places][n], or null above 2 bits

  private:
    Weights view_{};
    const int32_t* place_sums_;
};

// How rows are coded: everything of EncodeArgs but the rows.
struct Coding {
    int32_t block;
    const float* thresholds;   // n - 1 rising numbers
    int32_t n;
    Normalise normalise;
    double rstd;
    bool rescale;
    int32_t multiplier, shift;

    EncodeArgs of(const void* x, Type x_type, int64_t rows, int64_t k, int64_t ldx) const {
        EncodeArgs a{};
        a.x = x, a.x_type = x_type, a.rows = rows, a.k = k, a.ldx = ldx;
        a.block = block, a.thresholds = thresholds, a.n = n;
        a.normalise = normalise, a.rstd = rstd, a.rescale = rescale;
        a.multiplier = multiplier, a.shift = shift;
        return a;
    }
};

inline int64_t tiles_of(const PackedWeights& w) { return (w.n() + 15) / 16; }

// Work below which a second thread costs more than it gives.
constexpr int64_t kEncodeGrain = 1 << 13;   // elements
constexpr int64_t kLinearGrain = 1 << 19;   // multiply-adds: 1 to 4 microseconds
constexpr int64_t kAttendGrain = 1 << 16;   // numbers of a cache's keys

inline void run_encode(const EncodeArgs& a, int threads) {
    const int64_t useful = std::max<int64_t>(1, a.rows * a.k / kEncodeGrain);
    share(a.rows, static_cast<int>(std::min<int64_t>(threads, useful)),
          [&](int64_t begin, int64_t end) { kernels().encode(a, begin, end); });
}

// Memory of a thread for the levels of some rows.
struct Levels {
    std::vector<int8_t> storage;
    std::vector<int32_t> sums;
    std::vector<float> row_scales;
    void attach(EncodeArgs& a) {
        const size_t bytes = static_cast<size_t>(a.rows * a.ldl) + 64, rows = static_cast<size_t>(a.rows);
        if (storage.size() < bytes) storage.resize(bytes);
        if (sums.size() < rows) sums.resize(rows), row_scales.resize(rows);
        a.levels = reinterpret_cast<int8_t*>((reinterpret_cast<uintptr_t>(storage.data()) + 63) / 64 * 64);
        a.sums = sums.data(), a.row_scales = row_scales.data();
    }
};
inline thread_local Levels levels_of_thread;

// One input and the weight matrices that it is multiplied with.
struct Job {
    EncodeArgs a;
    const std::vector<const PackedWeights*>& weights;
    const std::vector<float>& act_scales;
    const std::vector<void*>& outs;
    Type out_type;

    EncodeArgs rows(int64_t begin, int64_t end) const {
        EncodeArgs some = a;
        if (some.r != nullptr) some.r += begin;
        some.x = static_cast<const char*>(a.x) + begin * a.ldx * bytes_of(a.x_type);
        some.rows = end - begin;
        return some;
    }
    // The product of coded rows, which begin at `row` of the input, with matrix i.
    LinearArgs product(const EncodeArgs& coded, int64_t row, size_t i) const {
        const Weights& w = weights[i]->view();
        LinearArgs p{};
        p.weights = &w, p.levels = coded.levels, p.ldl = coded.ldl, p.sums = coded.sums, p.row_scales = coded.row_scales;
        p.act_n = a.n, p.act_multiplier = a.multiplier, p.act_shift = a.shift;
        p.m = coded.rows, p.act_scale = act_scales[i], p.out_type = out_type, p.ldo = w.n;
        p.out = static_cast<char*>(outs[i]) + row * w.n * (out_type == Type::f32 ? 4 : 2);
        return p;
    }
};

// Many rows: each thread codes and multiplies its own, in slabs whose codes (1 MB at most) stay in its cache between
// quantizer and product; each slab reads all weights.
inline void linear_by_rows(const Job& job, int team) {
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
inline void linear_by_outputs(const Job& job, int team, int threads) {
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

// Rotation, codes, product and epilogue of the rows of one input with all its weight matrices.
inline void linear(Job& job, int threads) {
    const EncodeArgs& a = job.a;
    if (a.rows == 0) return;
    job.a.ldl = (a.k + 63) / 64 * 64;
    int64_t products = 0;
    for (const PackedWeights* w : job.weights) products += a.rows * w->n() * a.k;
    const int team = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, products / kLinearGrain)));
    if (a.rows >= 64 * team)
        linear_by_rows(job, team);
    else
        linear_by_outputs(job, team, threads);
}

// x [rows, k] coded, and multiplied with each matrix into outs [rows, n of each]; all contiguous.
inline void run_linear(const Coding& coding, const std::vector<const PackedWeights*>& weights, const std::vector<float>& act_scales,
                       const void* x, Type x_type, int64_t rows, const std::vector<void*>& outs, Type out_type, int threads) {
    const int64_t k = weights[0]->k();
    Job job{coding.of(x, x_type, rows, k, k), weights, act_scales, outs, out_type};
    linear(job, threads);
}

// Layers that read the same input, as they are at the moment of a call.
struct Group {
    Coding coding;
    std::vector<const PackedWeights*> weights;
    std::vector<float> act_scales;

    void run(const void* x, Type x_type, int64_t rows, const std::vector<void*>& outs, Type out_type, int threads) const {
        run_linear(coding, weights, act_scales, x, x_type, rows, outs, out_type, threads);
    }
};

}  // namespace bellbox
