// A packed convolution: each sample coded once, patches of its integer levels gathered, the linear kernel on them.
//
// Images lie channels last, so a patch is one run of memory for each row of the window. Padding is the level 0. Where the
// levels are half-integers no code stands for 0, so the products that count codes (1 and 2 bits) are left to windows
// without padding.
#pragma once

#include <cstring>

#include "layer.h"

namespace bellbox {

struct Window {
    int64_t height, width, channels;      // of the input
    int64_t rows, columns;                // of the output
    int64_t kernel_height, kernel_width, stride_y, stride_x, dilation_y, dilation_x;
    int64_t left, top;                    // padding; what lies right and below follows from the output's size
    bool padded;                          // whether any patch reaches beyond the image

    int64_t patch() const { return kernel_height * kernel_width * channels; }
};

// Coded samples and what the sums of their patches follow from.
struct CodedImages {
    std::vector<int8_t> levels;
    std::vector<int32_t> sums, prefix;    // prefix: [batch, height, width + 1], sums of the pixels to the left
    std::vector<float> marks;
    int64_t stride = 0;                   // of a sample

    void code(EncodeArgs a, const Window& w, int threads) {
        stride = a.ldl = (a.k + 63) / 64 * 64;
        levels.resize(static_cast<size_t>(a.rows * stride) + 64);
        sums.resize(static_cast<size_t>(a.rows)), marks.resize(static_cast<size_t>(a.rows));
        prefix.resize(static_cast<size_t>(a.rows * w.height * (w.width + 1)));
        a.levels = first(), a.sums = sums.data(), a.marks = marks.data();
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

// The patch that output pixel (y, x) sees, and its sum.
inline int32_t gather(const Window& w, const int8_t* sample, const int32_t* prefix, int64_t y, int64_t x, int8_t* to) {
    const int64_t depth = w.channels, left = x * w.stride_x - w.left;
    int32_t sum = 0;
    for (int64_t ky = 0; ky < w.kernel_height; ++ky, to += w.kernel_width * depth) {
        const int64_t line = y * w.stride_y - w.top + ky * w.dilation_y;
        if (line < 0 || line >= w.height) {
            std::memset(to, 0, static_cast<size_t>(w.kernel_width * depth));
            continue;
        }
        const int8_t* from = sample + line * w.width * depth;
        const int32_t* known = prefix + line * (w.width + 1);
        if (w.dilation_x == 1) {
            const int64_t begin = std::max<int64_t>(left, 0), end = std::min(left + w.kernel_width, w.width);
            if (begin > left || end < left + w.kernel_width)
                std::memset(to, 0, static_cast<size_t>(w.kernel_width * depth));
            if (begin >= end) continue;
            std::memcpy(to + (begin - left) * depth, from + begin * depth, static_cast<size_t>((end - begin) * depth));
            sum += known[end] - known[begin];
            continue;
        }
        for (int64_t kx = 0; kx < w.kernel_width; ++kx) {
            const int64_t at = left + kx * w.dilation_x;
            if (at < 0 || at >= w.width) {
                std::memset(to + kx * depth, 0, static_cast<size_t>(depth));
                continue;
            }
            std::memcpy(to + kx * depth, from + at * depth, static_cast<size_t>(depth));
            sum += known[at + 1] - known[at];
        }
    }
    return sum;
}

// Levels of some patches, as the linear kernel takes them.
struct Patches {
    Levels memory;
    EncodeArgs rows{};
    void make_room(int64_t count, int64_t columns) {
        rows.rows = count, rows.k = columns, rows.ldl = (columns + 63) / 64 * 64;
        memory.attach(rows);
    }
    // Pixels [begin, end) of the output of the whole batch.
    void fill(const Window& w, const CodedImages& images, int64_t begin, int64_t end) {
        const int64_t pixels = w.rows * w.columns, k = w.patch();
        for (int64_t pixel = begin; pixel < end; ++pixel) {
            const int64_t sample = pixel / pixels, at = pixel % pixels, row = pixel - begin;
            int8_t* to = rows.levels + row * rows.ldl;
            const int32_t* prefix = images.prefix.data() + sample * w.height * (w.width + 1);
            rows.sums[row] = gather(w, images.sample(sample), prefix, at / w.columns, at % w.columns, to);
            rows.marks[row] = images.marks[static_cast<size_t>(sample)];
            std::memset(to + k, 0, static_cast<size_t>(rows.ldl - k));
        }
    }
};
inline thread_local Patches patches_of_thread;
inline thread_local CodedImages images_of_thread;

// out [batch, rows, columns, n] of x, one sample a row: `a` says how samples are coded.
inline void convolve(const EncodeArgs& a, const Window& w, const PackedWeights& weights, float act_scale, void* out,
                     Type out_type, int threads) {
    if (a.rows == 0) return;
    CodedImages& images = images_of_thread;
    images.code(a, w, threads);
    const int64_t pixels = a.rows * w.rows * w.columns, k = w.patch(), ldl = (k + 63) / 64 * 64, n = weights.n();
    const int64_t room = std::max<int64_t>(96, (int64_t{1} << 18) / ldl / 6 * 6);  // patches stay in the second-level cache
    const int team = static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, pixels * n * k / kLinearGrain)));
    share(pixels, team, [&](int64_t first, int64_t last) {
        Patches& patches = patches_of_thread;
        for (int64_t begin = first; begin < last; begin += room) {
            const int64_t end = std::min(begin + room, last);
            patches.make_room(end - begin, k);
            patches.fill(w, images, begin, end);
            LinearArgs p{};
            p.weights = &weights.view(), p.levels = patches.rows.levels, p.ldl = ldl;
            p.sums = patches.rows.sums, p.marks = patches.rows.marks, p.m = end - begin;
            p.act_n = w.padded ? 256 : a.n, p.act_multiplier = a.multiplier, p.act_shift = a.shift;
            p.act_scale = act_scale, p.out_type = out_type, p.ldo = n;
            p.out = static_cast<char*>(out) + begin * n * (out_type == Type::f32 ? 4 : 2);
            kernels().linear(p, 0, p.m, 0, tiles_of(weights));
        }
    });
}

}  // namespace bellbox
