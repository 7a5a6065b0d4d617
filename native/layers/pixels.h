// A packed convolution whose output pixels lie side by side in vectors (kernels/pixels.h): the way of a batch through it.
#pragma once

#include "layers/layer.h"
#include "layers/geometry.h"

namespace bellbox {

struct ConvolutionJob {
    EncodeArgs a;                         // how samples are coded
    const ConvGeometry& w;
    const PackedWeights& weights;
    const uint16_t* addresses;            // of the weights, see PixelArgs; null where they were not made
    float act_scale;
    char* out;                            // [batch, rows, columns, n]
    Type out_type;
    const float* add;                     // to the result, of its size; null: nothing. Only where that is fp32, like:
    bool relu;                            // whether the result is to be that of a ReLU

    size_t row_bytes() const { return static_cast<size_t>(weights.n()) * (out_type == Type::f32 ? 4 : 2); }
    int64_t products(int64_t pixels) const { return pixels * weights.n() * w.patch(); }
};

// Filters [outputs, places, channels] of codes below 4 as rows of the kernel's table of products: PixelArgs.addresses.
inline std::vector<uint16_t> pixel_addresses(const ConvGeometry& w, int64_t outputs, const std::vector<uint8_t>& codes) {
    const int64_t joined = kernels().joined;
    if (joined == 0) return {};
    const int64_t tuples = (w.channels + joined - 1) / joined, lookups = (w.patch() / w.channels * tuples + 7) / 8 * 8;
    std::vector<uint16_t> addresses(static_cast<size_t>((outputs + 15) / 16 * 16 * lookups));
    for (int64_t i = 0; i < outputs * w.patch(); ++i) {
        const int64_t output = i / w.patch(), place = i % w.patch() / w.channels, channel = i % w.channels;
        const int64_t at = (output / 8 * lookups + place * tuples + channel % tuples) * 8 + output % 8;
        addresses[static_cast<size_t>(at)] = static_cast<uint16_t>(
            addresses[static_cast<size_t>(at)] | codes[static_cast<size_t>(i)] << (2 * joined + 2 * (channel / tuples)));
    }
    return addresses;
}

// Memory for the samples under way.
struct PixelMemory {
    Levels codes;
    std::vector<uint8_t> planes;
};
inline thread_local PixelMemory pixels_of_thread;

struct PixelConvolution {
    const ConvolutionJob& job;

    static constexpr int64_t kRoom = 1 << 18;        // bytes of codes and planes that are made at a time
    static constexpr int64_t kMostInputs = 1 << 14;  // of an output: the sum of their codes fits 16 bits
    static constexpr int64_t kFewPixels = 32;        // that leave the vectors half empty

    bool serves() const {
        return job.addresses != nullptr && kernels().joined != 0 && job.weights.view().bits == 2 && job.a.n <= 4 &&
               job.w.patch() <= kMostInputs && job.a.rows * job.w.rows * job.w.columns >= kFewPixels;
    }

    void run(int threads) const {
        const EncodeArgs& a = job.a;
        const int64_t n = job.weights.n(), pixels = job.w.rows * job.w.columns;
        const Borders borders(job.w);
        const int64_t stride = (n + 15) / 16 * 16;
        const Aligned<int32_t> less = aligned<int32_t>(static_cast<size_t>(borders.count() * stride));
        std::vector<int32_t> inside;
        for (int64_t border = 0; border < borders.count(); ++border) {
            int32_t* sums = less.get() + border * stride;
            std::fill(sums, sums + stride, 0);
            borders.add_inside(border, job.weights.place_sums(), n, sums);
            for (int64_t i = 0; i < n; ++i) sums[i] *= a.shift * job.weights.view().multiplier;
            inside.push_back(static_cast<int32_t>(a.shift * borders.places_inside(border) * job.w.channels));
        }
        std::vector<int32_t> shifts;
        for (const int32_t border : borders.of_pixel) shifts.push_back(inside[static_cast<size_t>(border)]);
        PixelArgs p = geometry();
        const std::vector<int64_t> offsets = offsets_in(p);
        p.offsets = offsets.data(), p.addresses = job.addresses, p.code_stride = (a.k + 63) / 64 * 64;
        p.border = borders.of_pixel.data(), p.less = less.get(), p.less_stride = stride, p.shifts = shifts.data();
        p.product.weights = &job.weights.view(), p.product.act_n = a.n, p.product.act_multiplier = a.multiplier;
        p.product.act_shift = a.shift, p.product.act_scale = job.act_scale;
        p.product.out_type = job.out_type, p.product.ldo = n;
        const int64_t step = std::min(a.rows, std::max<int64_t>(threads, kRoom / (p.code_stride + p.sample_bytes)));
        EncodeArgs some = a;
        some.multiplier = 1, some.shift = 0;  // codes, not levels
        some.ldl = p.code_stride, some.rows = step + 1;  // a row to read beyond the end
        PixelMemory& memory = pixels_of_thread;
        memory.codes.attach(some);
        memory.planes.resize(static_cast<size_t>(step * p.sample_bytes) + 64);
        p.codes = some.levels, p.planes = memory.planes.data(), p.product.row_scales = some.row_scales;
        for (int64_t sample = 0; sample < a.rows; sample += step) {
            some.rows = std::min(step, a.rows - sample), p.pixels = some.rows * pixels;
            some.x = static_cast<const char*>(a.x) + sample * a.ldx * (a.x_type == Type::f32 ? 4 : 2);
            p.product.out = job.out + static_cast<size_t>(sample * pixels) * job.row_bytes();
            p.add = job.add == nullptr ? nullptr : job.add + sample * pixels * n, p.relu = job.relu;
            run_encode(some, threads);
            share(some.rows, some.rows * a.k < kEncodeGrain ? 1 : threads,
                  [&](int64_t begin, int64_t end) { kernels().make_planes(p, begin, end); });
            const int64_t useful = std::max<int64_t>(1, job.products(p.pixels) / kLinearGrain);
            share((p.pixels + 63) / 64, static_cast<int>(std::min<int64_t>(threads, useful)),
                  [&](int64_t begin, int64_t end) { kernels().convolve(p, begin, end); });
        }
    }

  private:
    PixelArgs geometry() const {
        const ConvGeometry& w = job.w;
        PixelArgs p{};
        p.height = w.height, p.width = w.width, p.channels = w.channels, p.left = w.left, p.top = w.top;
        p.rows = w.rows, p.columns = w.columns, p.stride_y = w.stride_y, p.stride_x = w.stride_x;
        const int64_t lines = (w.rows - 1) * w.stride_y + (w.kernel_height - 1) * w.dilation_y + 1;  // that windows see
        const int64_t columns = (w.columns - 1) * w.stride_x + (w.kernel_width - 1) * w.dilation_x + 1;
        p.plane_width = std::max(w.left + w.width, columns);
        p.plane = p.plane_width * std::max(w.top + w.height, lines);
        p.tuples = (w.channels + kernels().joined - 1) / kernels().joined, p.sum_planes = (p.tuples + 27) / 28;
        p.sample_bytes = (p.tuples + p.sum_planes) * p.plane;
        p.places = w.kernel_height * w.kernel_width, p.lookups = (p.places * p.tuples + 7) / 8 * 8;
        return p;
    }
    std::vector<int64_t> offsets_in(const PixelArgs& p) const {
        std::vector<int64_t> offsets;
        for (int64_t y = 0; y < job.w.kernel_height; ++y)
            for (int64_t x = 0; x < job.w.kernel_width; ++x)
                offsets.push_back(y * job.w.dilation_y * p.plane_width + x * job.w.dilation_x);
        return offsets;
    }
};

}  // namespace bellbox
