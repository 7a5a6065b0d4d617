// A packed convolution: each sample coded once, patches of its integer levels gathered, the linear kernel on them.
//
// Images lie channels last, so a patch is one run of memory for each row of the window. Padding adds nothing to a sum. To
// a product of levels it is the level 0. Products that count codes (1 bit) have no code for that: they get code
// 0, which adds nothing to sum(code * code), and the sum of the weights' codes over the window's other places, which is
// what turns that into sum(level * code). It depends on where the window reaches beyond the image; so pixels are taken
// border by border: those with the same missing places together.
#pragma once

#include <cstring>

#include "layers/pixels.h"

namespace bellbox {

// Coded samples and what the sums of their patches follow from.
struct CodedImages {
    std::vector<int8_t> levels;
    std::vector<int32_t> sums, prefix;    // prefix: [batch, height, width + 1], sums of the pixels to the left
    std::vector<float> row_scales;
    int64_t stride = 0;                   // of a sample

    void code(EncodeArgs a, const ConvGeometry& w, int threads) {
        stride = a.ldl = (a.k + 63) / 64 * 64;
        levels.resize(static_cast<size_t>(a.rows * stride) + 128);  // 64 to begin on a line, 64 to copy beyond the end
        sums.resize(static_cast<size_t>(a.rows)), row_scales.resize(static_cast<size_t>(a.rows));
        prefix.resize(static_cast<size_t>(a.rows * w.height * (w.width + 1)));
        a.levels = first(), a.sums = sums.data(), a.row_scales = row_scales.data();
        run_encode(a, threads);
        share(a.rows * w.height, a.rows * a.k < kEncodeGrain ? 1 : threads, [&](int64_t begin, int64_t end) {
            for (int64_t line = begin; line < end; ++line) {
                const int8_t* p = sample(line / w.height) + line % w.height * w.width * w.channels;
                int32_t* sum = prefix.data() + line * (w.width + 1);
                sum[0] = 0;
                for (int64_t x = 0; x < w.width; ++x, p += w.channels) sum[x + 1] = sum[x] + total(p, w.channels);
            }
        });
    }
    const int8_t* sample(int64_t i) const { return const_cast<CodedImages*>(this)->first() + i * stride; }

  private:
    int8_t* first() { return reinterpret_cast<int8_t*>((reinterpret_cast<uintptr_t>(levels.data()) + 63) / 64 * 64); }
    static int32_t total(const int8_t* p, int64_t count) {
        int32_t sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += p[i];
        return sum;
    }
};

// Copies in whole vectors, up to 63 bytes too far: patches are written from front to back, with room behind the last.
inline void copy_over(int8_t* to, const int8_t* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) std::memcpy(to + i, from + i, 64);
}

// The patch that output pixel (y, x) sees, with `pad` where it sees none of the image, and the sum of the rest.
inline int32_t gather(const ConvGeometry& w, const int8_t* sample, const int32_t* prefix, int64_t y, int64_t x, int pad, int8_t* to) {
    const int64_t depth = w.channels, left = x * w.stride_x - w.left;
    int32_t sum = 0;
    for (int64_t ky = 0; ky < w.kernel_height; ++ky, to += w.kernel_width * depth) {
        const int64_t line = y * w.stride_y - w.top + ky * w.dilation_y;
        if (line < 0 || line >= w.height) {
            std::memset(to, pad, static_cast<size_t>(w.kernel_width * depth));
            continue;
        }
        const int8_t* from = sample + line * w.width * depth;
        const int32_t* known = prefix + line * (w.width + 1);
        if (w.dilation_x == 1) {
            const int64_t begin = std::max<int64_t>(left, 0), end = std::min(left + w.kernel_width, w.width);
            if (begin > left || end < left + w.kernel_width) {
                std::memset(to, pad, static_cast<size_t>(w.kernel_width * depth));
                if (begin >= end) continue;
                std::memcpy(to + (begin - left) * depth, from + begin * depth, static_cast<size_t>((end - begin) * depth));
            } else {
                copy_over(to, from + begin * depth, w.kernel_width * depth);
            }
            sum += known[end] - known[begin];
            continue;
        }
        for (int64_t kx = 0; kx < w.kernel_width; ++kx) {
            const int64_t at = left + kx * w.dilation_x;
            if (at < 0 || at >= w.width) {
                std::memset(to + kx * depth, pad, static_cast<size_t>(depth));
                continue;
            }
            std::memcpy(to + kx * depth, from + at * depth, static_cast<size_t>(depth));
            sum += known[at + 1] - known[at];
        }
    }
    return sum;
}

// Output pixels of a sample whose windows lack the same places.
struct Pixel {
    int32_t y, x;
};
struct Border {
    std::vector<Pixel> pixels;
    std::vector<int32_t> code_sums;       // [n]: of the weights at the places inside, if codes are to be counted
};

inline std::vector<Border> borders_of(const ConvGeometry& w, const int32_t* by_place, int64_t n) {
    const Borders borders(w);
    std::vector<Border> all(static_cast<size_t>(borders.count()));
    for (int64_t i = 0; i < borders.count(); ++i) {
        all[static_cast<size_t>(i)].code_sums.resize(static_cast<size_t>(n));
        borders.add_inside(i, by_place, n, all[static_cast<size_t>(i)].code_sums.data());
    }
    for (int32_t y = 0; y < w.rows; ++y)
        for (int32_t x = 0; x < w.columns; ++x)
            all[static_cast<size_t>(borders.of_pixel[static_cast<size_t>(y * w.columns + x)])].pixels.push_back({y, x});
    return all;
}

inline std::vector<Border> whole(const ConvGeometry& w) {    // all pixels, whatever they lack
    Border all;
    for (int32_t y = 0; y < w.rows; ++y)
        for (int32_t x = 0; x < w.columns; ++x) all.pixels.push_back({y, x});
    return {all};
}

// What a thread works with: levels of some patches, as the linear kernel takes them, and its results.
struct Slab {
    Levels memory;
    EncodeArgs rows{};
    std::vector<char> results;

    void make_room(int64_t count, int64_t columns, size_t result_bytes) {
        rows.rows = count + 1, rows.k = columns, rows.ldl = (columns + 63) / 64 * 64;  // a row to copy beyond the end
        memory.attach(rows);
        if (results.size() < result_bytes) results.resize(result_bytes);
    }
};
inline thread_local Slab slab_of_thread;
inline thread_local CodedImages images_of_thread;

struct RowConvolution {
    const ConvolutionJob& job;

    // Patches [begin, end) of a border: numbered sample by sample.
    void multiply(const CodedImages& images, const Border& border, int64_t begin, int64_t end) const {
        const ConvGeometry& w = job.w;
        const int64_t k = w.patch(), each = static_cast<int64_t>(border.pixels.size());
        Slab& slab = slab_of_thread;
        slab.make_room(end - begin, k, static_cast<size_t>(end - begin) * job.row_bytes());
        Weights view = job.weights.view();
        LinearArgs p{};
        p.weights = &view, p.levels = slab.rows.levels, p.ldl = slab.rows.ldl, p.m = end - begin;
        p.sums = slab.rows.sums, p.row_scales = slab.rows.row_scales;
        p.act_n = job.a.n, p.act_multiplier = job.a.multiplier, p.act_shift = job.a.shift, p.act_scale = job.act_scale;
        p.out = slab.results.data(), p.out_type = job.out_type, p.ldo = job.weights.n();
        const bool counts = !border.code_sums.empty();
        if (counts) view.code_sums = border.code_sums.data();
        if (w.padded && !counts) p.act_n = 256;  // levels, then, further down too
        int64_t sample = begin / each, at = begin % each;
        const auto next = [&] { at + 1 < each ? ++at : (++sample, at = 0); };
        for (int64_t row = 0; row < end - begin; ++row, next()) {
            const Pixel pixel = border.pixels[static_cast<size_t>(at)];
            int8_t* to = slab.rows.levels + row * slab.rows.ldl;
            const int32_t* prefix = images.prefix.data() + sample * w.height * (w.width + 1);
            slab.rows.sums[row] = gather(w, images.sample(sample), prefix, pixel.y, pixel.x, counts ? -job.a.shift : 0, to);
            slab.rows.row_scales[row] = images.row_scales[static_cast<size_t>(sample)];
            if (slab.rows.ldl > k) std::memset(to + k, 0, static_cast<size_t>(slab.rows.ldl - k));
        }
        kernels().linear(p, 0, p.m, 0, tiles_of(job.weights));
        sample = begin / each, at = begin % each;
        for (int64_t row = 0; row < end - begin; ++row, next()) {
            const Pixel pixel = border.pixels[static_cast<size_t>(at)];
            const int64_t place = (sample * w.rows + pixel.y) * w.columns + pixel.x;
            std::memcpy(job.out + static_cast<size_t>(place) * job.row_bytes(),
                        slab.results.data() + static_cast<size_t>(row) * job.row_bytes(), job.row_bytes());
        }
    }

    // Whether `linear` is to count codes (kernels/avx512/binary.h), where a place outside the image has no level of its own.
    bool by_border() const {
        return job.w.padded && job.weights.view().bits == 1 && job.a.n == 2 && kernels().counts != nullptr;
    }

    void run(int threads) const {
        CodedImages& images = images_of_thread;
        images.code(job.a, job.w, threads);
        const int64_t k = (job.w.patch() + 63) / 64 * 64;
        for (const Border& border : by_border() ? borders_of(job.w, job.weights.place_sums(), job.weights.n()) : whole(job.w)) {
            const int64_t count = job.a.rows * static_cast<int64_t>(border.pixels.size());
            const int64_t room = std::max<int64_t>(96, (int64_t{1} << 18) / k / 8 * 8);  // second-level cache
            const int64_t useful = std::max<int64_t>(1, job.products(count) / kLinearGrain);
            share(count, static_cast<int>(std::min<int64_t>(threads, useful)), [&](int64_t first, int64_t last) {
                for (int64_t begin = first; begin < last; begin += room)
                    multiply(images, border, begin, std::min(begin + room, last));
            });
        }
    }
};

inline void convolve(const ConvolutionJob& job, int threads) {
    if (job.a.rows == 0) return;
    const PixelConvolution pixels{job};
    if (pixels.serves()) return pixels.run(threads);
    RowConvolution{job}.run(threads);
    if (job.add == nullptr && !job.relu) return;
    float* y = reinterpret_cast<float*>(job.out);
    share(job.a.rows * job.w.rows * job.w.columns, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * job.weights.n(); i < end * job.weights.n(); ++i) {
            if (job.add != nullptr) y[i] += job.add[i];
            if (job.relu && y[i] < 0) y[i] = 0;
        }
    });
}

}  // namespace bellbox
