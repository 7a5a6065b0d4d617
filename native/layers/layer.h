// A packed layer at work: its weights in memory, how its input is coded, and both on threads.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
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

#ifdef __linux__
// A piece of memory on huge pages. Reading it at a stretch is twice as fast: no page walks, and the hardware's own fetching
// does not stop at every 4 KB.
inline std::shared_ptr<uint8_t> huge_pages(size_t bytes) {
    constexpr size_t kHugePage = size_t{1} << 21;
    void* p = std::aligned_alloc(kHugePage, (bytes + 63) / 64 * 64);
    if (p == nullptr) throw std::bad_alloc();
    madvise(p, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // a wish: refused, the memory serves as it is
    return {static_cast<uint8_t*>(p), Free()};
}
#endif

// Memory for weights. What does not fill a huge page shares one with others; it is given back when the last of them goes.
inline std::shared_ptr<uint8_t> weight_memory(size_t bytes) {
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)  // there, what is read beyond a matrix shall be seen
    constexpr size_t kPiece = size_t{1} << 21;
    if (bytes >= kPiece) return huge_pages(bytes);
    static std::mutex one_at_a_time;
    static std::shared_ptr<uint8_t> piece;
    static size_t used = kPiece;
    const std::lock_guard<std::mutex> guard(one_at_a_time);
    if (used + bytes > kPiece) piece = huge_pages(kPiece), used = 0;
    std::shared_ptr<uint8_t> part(piece, piece.get() + used);
    used += (bytes + 63) / 64 * 64;
    return part;
#else
    return {aligned<uint8_t>(bytes).release(), Free()};
#endif
}

// Memory for the weights of many matrices, one after another, so that siblings are one stream. It lives as long as one of
// its parts.
class Arena {
  public:
    explicit Arena(size_t bytes) : memory_(weight_memory(bytes)), left_(bytes) {}
    std::shared_ptr<uint8_t> take(size_t bytes) {
        if (bytes > left_) throw std::bad_alloc();
        std::shared_ptr<uint8_t> part(memory_, memory_.get() + used_);
        used_ += bytes, left_ -= bytes;
        return part;
    }

  private:
    std::shared_ptr<uint8_t> memory_;
    size_t used_ = 0, left_;
};

// A weight matrix in the machine's layout, with its scales.
class PackedWeights {
  public:
    PackedWeights(int32_t bits, int64_t n, int64_t k, int32_t multiplier, int32_t shift, const float* scale,
                  const float* bias, Arena& arena)
        : data_(arena.take(packed_size(bits, n, k))), scale_(scale, scale + n) {
        if (bias != nullptr) bias_.assign(bias, bias + n);
        if (bits <= 2) code_sums_.resize(static_cast<size_t>(n));
        view_ = Weights{data_.get(),   bits,
                        n,             k,
                        multiplier,    shift,
                        scale_.data(), bias != nullptr ? bias_.data() : nullptr,
                        bits <= 2 ? code_sums_.data() : nullptr};
    }
    // Codes of some rows, the first a multiple of 16: a whole matrix of bytes need never exist at once.
    void fill(const uint8_t* codes, int64_t ldc, int64_t first, int64_t rows) {
        pack(codes, ldc, view_.bits, rows, view_.k, data_.get() + packed_size(view_.bits, first, view_.k));
        for (int64_t i = 0; view_.bits <= 2 && i < rows; ++i)
            code_sums_[static_cast<size_t>(first + i)] =
                std::accumulate(codes + i * ldc, codes + i * ldc + view_.k, int32_t{0});
    }
    const Weights& view() const { return view_; }
    int64_t n() const { return view_.n; }
    int64_t k() const { return view_.k; }
    size_t nbytes() const {
        return packed_size(view_.bits, view_.n, view_.k) + (scale_.size() + bias_.size() + code_sums_.size()) * 4;
    }

  private:
    std::shared_ptr<uint8_t> data_;
    std::vector<float> scale_, bias_;
    std::vector<int32_t> code_sums_;
    Weights view_{};
};

// How rows are coded: everything of EncodeArgs but the rows.
struct Coding {
    int32_t block;
    std::vector<float> thresholds;
    Normalise normalise;
    double rstd;
    bool rescale;
    int32_t multiplier, shift;

    EncodeArgs of(const void* x, Type x_type, int64_t rows, int64_t k, int64_t ldx) const {
        EncodeArgs a{};
        a.x = x, a.x_type = x_type, a.rows = rows, a.k = k, a.ldx = ldx;
        a.block = block, a.thresholds = thresholds.data(), a.n = static_cast<int32_t>(thresholds.size()) + 1;
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
        some.x = static_cast<const char*>(a.x) + begin * a.ldx * (a.x_type == Type::f32 ? 4 : 2);
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

// Layers that read the same input: all of a call that stays the same from call to call.
struct Siblings {
    const Coding* coding;
    std::vector<const PackedWeights*> weights;
    std::vector<float> act_scales;

    // x [rows, k] and outs [rows, n of each], contiguous.
    void run(const void* x, Type x_type, int64_t rows, const std::vector<void*>& outs, Type out_type, int threads) const {
        const int64_t k = weights[0]->k();
        Job job{coding->of(x, x_type, rows, k, k), weights, act_scales, outs, out_type};
        linear(job, threads);
    }
};

}  // namespace bellbox
