// A program for `make sanitize`: random shapes through the kernels of every instruction set, each result held against
// the portable ones bit by bit (gradients: to rounding; convolutions: against plain loops). Every buffer has exactly the
// size that the kernels may touch, so that AddressSanitizer sees a byte too far. The
// instructions of AMX are carried out by tests/check_amx.h on a processor that lacks them.
//
//     check [cases [seed]]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/portable/encode.h"
#include "layers/convolution.h"
#include "layers/layer.h"
#ifdef BELLBOX_X86
#include "tests/check_amx.h"
#endif

// Memory that begins 16 bytes behind a line, as any may: what is rounded up to a line then leaves little behind itself.
constexpr size_t kBehindLine = 16;
void* operator new(size_t bytes) {
    void* line = nullptr;
    if (posix_memalign(&line, 64, bytes + kBehindLine) != 0) throw std::bad_alloc();  // of this very size
    return static_cast<char*>(line) + kBehindLine;
}
void operator delete(void* p) noexcept {
    if (p != nullptr) std::free(static_cast<char*>(p) - kBehindLine);
}
void operator delete(void* p, size_t) noexcept { operator delete(p); }

using namespace bellbox;

namespace {

std::mt19937 randomness;

int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(randomness); }

template <typename T>
T one_of(std::initializer_list<T> values) {
    return values.begin()[pick(0, static_cast<int64_t>(values.size()) - 1)];
}

size_t size_of(Type type) { return type == Type::f32 ? 4 : 2; }

// Normal numbers as fp32 or bf16, now and then a value exactly on a threshold, or one that is not finite.
std::vector<char> numbers(int64_t count, Type type, const std::vector<float>& thresholds, bool wild) {
    std::normal_distribution<float> normal;
    std::vector<char> bytes(static_cast<size_t>(count) * size_of(type));
    for (int64_t i = 0; i < count; ++i) {
        float value = normal(randomness);
        if (pick(0, 19) == 0) value = thresholds[static_cast<size_t>(pick(0, static_cast<int64_t>(thresholds.size()) - 1))];
        if (wild && pick(0, 199) == 0) value = one_of({NAN, INFINITY, -INFINITY, 1e38f, 1e-42f, -0.0f});
        uint32_t bits;
        memcpy(&bits, &value, 4);
        const uint16_t half = static_cast<uint16_t>(bits >> 16);
        if (type == Type::f32)
            memcpy(&bytes[static_cast<size_t>(4 * i)], &value, 4);
        else
            memcpy(&bytes[static_cast<size_t>(2 * i)], &half, 2);
    }
    return bytes;
}

// Equal bits, any NaN being like any other.
bool same(const std::vector<char>& a, const std::vector<char>& b, Type type) {
    for (size_t i = 0; i < a.size(); i += size_of(type)) {
        uint32_t x = 0, y = 0;
        memcpy(type == Type::f32 ? reinterpret_cast<char*>(&x) : reinterpret_cast<char*>(&x) + 2, &a[i], size_of(type));
        memcpy(type == Type::f32 ? reinterpret_cast<char*>(&y) : reinterpret_cast<char*>(&y) + 2, &b[i], size_of(type));
        const bool both_nan = (x & 0x7fffffffu) > 0x7f800000u && (y & 0x7fffffffu) > 0x7f800000u;
        if (x != y && !both_nan) return false;
    }
    return true;
}

void expect(bool condition, const std::string& what) {
    if (!condition) throw std::runtime_error(what + " differs from the reference");
}

// A coding and the memory of its thresholds.
struct OwnCoding : Coding {
    std::shared_ptr<std::vector<float>> values = std::make_shared<std::vector<float>>();
};

OwnCoding random_coding(int64_t& k, int n) {
    OwnCoding c{};
    c.block = 1 << pick(0, 8);
    k = std::max<int64_t>(1, k / c.block) * c.block;
    std::normal_distribution<float> normal;
    for (int i = 0; i < n - 1; ++i) c.values->push_back(pick(0, 30) == 0 ? 0 : normal(randomness));
    std::sort(c.values->begin(), c.values->end());
    c.thresholds = c.values->data(), c.n = n;
    c.normalise = one_of({Normalise::rms, Normalise::fixed, Normalise::absmax});
    c.rstd = one_of({1.0, 0.3, 7.0});
    c.rescale = pick(0, 1) == 1;
    c.multiplier = static_cast<int32_t>(pick(1, 2));
    c.shift = static_cast<int32_t>(pick(0, n));
    return c;
}

struct Encoded {
    std::vector<char> levels, row_scales;
    std::vector<int32_t> sums;
};

Encoded encode(const Kernels& kernels, EncodeArgs a) {
    Encoded e{std::vector<char>(static_cast<size_t>(a.rows * a.ldl), 99), std::vector<char>(static_cast<size_t>(4 * a.rows)),
              std::vector<int32_t>(static_cast<size_t>(a.rows))};
    a.levels = reinterpret_cast<int8_t*>(e.levels.data()), a.sums = e.sums.data();
    a.row_scales = reinterpret_cast<float*>(e.row_scales.data());
    const int64_t middle = pick(0, a.rows);
    kernels.encode(a, 0, middle);
    kernels.encode(a, middle, a.rows);
    return e;
}

// A matrix in memory of exactly the size that it may touch.
struct OwnWeights : PackedWeights {
    std::shared_ptr<Aligned<uint8_t>> data;
    std::shared_ptr<std::vector<float>> scale, bias;
};

OwnWeights random_weights(int64_t outputs, int64_t k, int weight_n, std::vector<uint8_t>& codes, int64_t places = 1) {
    const int bits = weight_n <= 2 ? 1 : weight_n <= 4 ? 2 : weight_n <= 8 ? 3 : 4;
    codes.resize(static_cast<size_t>(outputs * k));
    for (uint8_t& code : codes) code = static_cast<uint8_t>(pick(0, weight_n - 1));
    const auto random_numbers = [&] {
        auto all = std::make_shared<std::vector<float>>(static_cast<size_t>(outputs));
        std::normal_distribution<float> normal;
        for (float& each : *all) each = normal(randomness);
        return all;
    };
    const auto scale = random_numbers(), bias = random_numbers();
    const auto data = std::make_shared<Aligned<uint8_t>>(aligned<uint8_t>(PackedWeights::bytes(bits, outputs, k, places)));
    PackedWeights::fill(codes.data(), bits, outputs, k, places, data->get(), 1);
    return {PackedWeights(data->get(), bits, outputs, k, places, static_cast<int32_t>(pick(1, 2)), static_cast<int32_t>(pick(0, 9)),
                          scale->data(), pick(0, 1) == 0 ? bias->data() : nullptr),
            data, scale, bias};
}

// Codes, then the product, by row and column ranges and as a whole layer on two threads.
void check_layer(const Kernels& kernels) {
    int64_t k = pick(1, 700);
    const int64_t rows = one_of<int64_t>({1, 2, 3, 5, 8, 17, 64, 65, 130, 300}), outputs = pick(1, 150);
    const int act_n = one_of({2, 2, 3, 4, 8, 16}), weight_n = one_of({2, 2, 3, 4, 7, 8, 16});
    const OwnCoding coding = random_coding(k, act_n);
    const Type in = one_of({Type::f32, Type::bf16}), out = one_of({Type::f32, Type::bf16});
    const std::vector<char> x = numbers(rows * k, in, *coding.values, true);
    EncodeArgs a = coding.of(x.data(), in, rows, k, k);
    a.ldl = (k + 63) / 64 * 64 + 64 * pick(0, 1);
    Encoded base = encode(portable_kernels, a);
    {
        const Encoded mine = encode(kernels, a);
        expect(same(mine.row_scales, base.row_scales, Type::f32), "encode: row_scales");
        for (int64_t r = 0; r < rows; ++r) {
            const float row_scale = reinterpret_cast<float*>(base.row_scales.data())[r];
            if (row_scale != row_scale) continue;  // what a row that is not finite is coded as does not matter
            const size_t at = static_cast<size_t>(r * a.ldl), row = static_cast<size_t>(r);
            expect(memcmp(&mine.levels[at], &base.levels[at], static_cast<size_t>(a.ldl)) == 0, "encode: levels");
            expect(mine.sums[row] == base.sums[row], "encode: sums");
        }
    }
    std::vector<OwnWeights> matrices;
    std::vector<uint8_t> codes;
    for (int i = 0; i < 2; ++i) matrices.push_back(random_weights(outputs, k, weight_n, codes));
    const size_t bytes = static_cast<size_t>(rows * outputs) * size_of(out);
    std::vector<char> expected[2], direct(bytes);
    for (int i = 0; i < 2; ++i) {
        LinearArgs p{};
        p.weights = &matrices[static_cast<size_t>(i)].view();
        p.levels = reinterpret_cast<const int8_t*>(base.levels.data()), p.ldl = a.ldl, p.sums = base.sums.data();
        p.row_scales = reinterpret_cast<const float*>(base.row_scales.data()), p.m = rows, p.act_scale = 0.37f;
        p.act_n = act_n, p.act_multiplier = coding.multiplier, p.act_shift = coding.shift;
        p.out_type = out, p.ldo = outputs;
        expected[i].resize(bytes);
        p.out = expected[i].data();
        portable_kernels.linear(p, 0, rows, 0, tiles_of(matrices[0]));
        p.out = direct.data();
        const int64_t row = pick(0, rows), tile = pick(0, tiles_of(matrices[0]));
        kernels.linear(p, 0, row, 0, tile);
        kernels.linear(p, 0, row, tile, tiles_of(matrices[0]));
        kernels.linear(p, row, rows, 0, tiles_of(matrices[0]));
        expect(same(direct, expected[i], out), "linear, " + std::to_string(matrices[0].view().bits) + " bits,");
    }
    std::vector<char> outs[2] = {std::vector<char>(bytes), std::vector<char>(bytes)};
    const Group layers{coding, {&matrices[0], &matrices[1]}, {0.37f, 0.37f}};
    layers.run(x.data(), in, rows, {outs[0].data(), outs[1].data()}, out, static_cast<int>(pick(1, 3)));
    for (int i = 0; i < 2; ++i) expect(same(outs[i], expected[i], out), "a layer on threads");
}

// A window that fits its image; `channels` follow from what is left of a budget of multiply-adds.
ConvGeometry random_geometry(int64_t outputs) {
    ConvGeometry w{};
    w.kernel_height = pick(1, 4), w.kernel_width = pick(1, 4);
    w.stride_y = pick(1, 3), w.stride_x = pick(1, 3);
    w.dilation_y = one_of({1, 1, 2, 3}), w.dilation_x = one_of({1, 1, 2, 3});
    int64_t right = 0, below = 0;
    if (pick(0, 2) != 0) w.left = pick(0, 4), w.top = pick(0, 4), right = pick(0, 4), below = pick(0, 4);
    w.padded = w.left + w.top + right + below != 0;
    const int64_t largest = one_of({5, 9, 20});
    const int64_t reach_y = w.dilation_y * (w.kernel_height - 1) + 1, reach_x = w.dilation_x * (w.kernel_width - 1) + 1;
    w.height = std::max(pick(1, largest), reach_y - w.top - below);
    w.width = std::max(pick(1, largest), reach_x - w.left - right);
    w.rows = (w.height + w.top + below - reach_y) / w.stride_y + 1;
    w.columns = (w.width + w.left + right - reach_x) / w.stride_x + 1;
    const int64_t each = w.rows * w.columns * w.kernel_height * w.kernel_width * outputs;
    w.channels = std::min(std::max<int64_t>(1, 2000000 / each), one_of<int64_t>({pick(1, 16), pick(1, 300), 32, 64, 256}));
    return w;
}

// The sum that output `i` of pixel (y, x) is, place by place; padding adds nothing.
int32_t plain_sum(const ConvGeometry& w, const int8_t* sample, const Weights& weights, const uint8_t* codes, int64_t y, int64_t x) {
    int32_t sum = 0;
    for (int64_t ky = 0; ky < w.kernel_height; ++ky)
        for (int64_t kx = 0; kx < w.kernel_width; ++kx, codes += w.channels) {
            const int64_t line = y * w.stride_y - w.top + ky * w.dilation_y, column = x * w.stride_x - w.left + kx * w.dilation_x;
            if (line < 0 || line >= w.height || column < 0 || column >= w.width) continue;
            for (int64_t c = 0; c < w.channels; ++c)
                sum += sample[(line * w.width + column) * w.channels + c] * (weights.multiplier * codes[c] - weights.shift);
        }
    return sum;
}

// One call of a convolution, in memory that no larger case before has left behind.
void check_convolution() {
    const int64_t outputs = one_of<int64_t>({pick(1, 4), pick(1, 40), pick(64, 127), pick(128, 150)}), batch = pick(1, 3);
    const ConvGeometry w = random_geometry(outputs);
    const int64_t k = w.height * w.width * w.channels, places = w.kernel_height * w.kernel_width;
    const int act_n = one_of({2, 2, 3, 4, 8, 16}), weight_n = one_of({2, 2, 3, 4, 7, 8, 16});
    int64_t features = w.channels;
    OwnCoding coding = random_coding(features, act_n);
    while (w.channels % coding.block != 0) coding.block /= 2;
    const Type in = one_of({Type::f32, Type::bf16}), out = one_of({Type::f32, Type::bf16});
    const std::vector<char> x = numbers(batch * k, in, *coding.values, pick(0, 9) == 0);
    std::vector<uint8_t> codes;
    const OwnWeights weights = random_weights(outputs, w.patch(), weight_n, codes, places);
    EncodeArgs a = coding.of(x.data(), in, batch, k, k);
    a.ldl = (k + 63) / 64 * 64;
    const Encoded base = encode(portable_kernels, a);
    std::vector<char> expected(static_cast<size_t>(batch * w.rows * w.columns * outputs) * size_of(out));
    std::vector<float> add(out == Type::f32 && pick(0, 1) == 1 ? expected.size() / 4 : 0, 0.25f);
    const bool relu = out == Type::f32 && pick(0, 1) == 1;
    for (int64_t i = 0; i < batch * w.rows * w.columns * outputs; ++i) {
        const int64_t output = i % outputs, pixel = i / outputs % (w.rows * w.columns), sample = i / (outputs * w.rows * w.columns);
        const int32_t sum = plain_sum(w, reinterpret_cast<const int8_t*>(base.levels.data()) + sample * a.ldl, weights.view(),
                                      codes.data() + output * w.patch(), pixel / w.columns, pixel % w.columns);
        const float row_scale = reinterpret_cast<const float*>(base.row_scales.data())[sample];
        const float y = static_cast<float>(sum) * (weights.view().scale[output] * 0.37f) * row_scale;
        float z = weights.view().bias != nullptr ? y + weights.view().bias[output] : y;
        if (!add.empty()) z += add[static_cast<size_t>(i)];
        store(expected.data(), out, i, relu && z < 0 ? 0 : z);
    }
    share(3, 3, [](int64_t, int64_t) { slab_of_thread = Slab{}; });
    images_of_thread = CodedImages{};
    std::vector<char> mine(expected.size());
    const std::vector<uint16_t> addresses = pixel_addresses(w, outputs, codes);
    pixels_of_thread = PixelMemory{};
    convolve({coding.of(x.data(), in, batch, k, k), w, weights, addresses.data(), 0.37f, mine.data(), out,
              add.empty() ? nullptr : add.data(), relu},
             static_cast<int>(pick(1, 3)));
    expect(same(mine, expected, out), "convolution, " + std::to_string(weights.view().bits) + " bits,");
}

void check_rotation(const Kernels& kernels) {
    const int32_t block = 1 << pick(0, 9);
    const int64_t rows = pick(1, 5), k = block * pick(1, std::max<int64_t>(1, 700 / block));
    const Type in = one_of({Type::f32, Type::bf16}), out = one_of({Type::f32, Type::bf16});
    const std::vector<char> x = numbers(rows * k, in, {1.0f}, false);
    std::vector<char> mine(static_cast<size_t>(rows * k) * size_of(out)), base(mine.size());
    RotateArgs a{x.data(), in, rows, k, block, 0.31f, mine.data(), out};
    kernels.rotate(a, 0, rows);
    a.out = base.data();
    portable_kernels.rotate(a, 0, rows);
    expect(same(mine, base, out), "rotate");
}

// fp32 numbers that agree but for the order of sums.
bool near(const std::vector<char>& a, const std::vector<char>& b) {
    const float *mine = reinterpret_cast<const float*>(a.data()), *base = reinterpret_cast<const float*>(b.data());
    double error = 0, size = 1e-12;
    for (size_t i = 0; i < a.size() / 4; ++i) {
        error += std::pow(mine[i] - base[i], 2);
        size += std::pow(base[i], 2) + 1e-4;
    }
    return std::sqrt(error / size) < 1e-4;
}

void check_training(const Kernels& kernels) {
    int64_t k = pick(1, 700);
    const int n = static_cast<int>(pick(2, 16));
    const OwnCoding coding = random_coding(k, n);
    const int64_t rows = pick(1, 5);
    const Type in = one_of({Type::f32, Type::bf16}), out = one_of({Type::f32, Type::bf16});
    const std::vector<char> x = numbers(rows * k, in, *coding.values, false);
    const std::vector<char> grad = numbers(rows * k, out, *coding.values, false);
    const std::vector<float> r(static_cast<size_t>(rows), 0.1f), gamma = {0.8f}, free(static_cast<size_t>(rows), 1.0f);
    const size_t bytes = static_cast<size_t>(rows * k) * size_of(out);
    std::vector<char> x_hat[2], v[2], grad_x[2], dots[2];
    for (int i = 0; i < 2; ++i) {
        const Kernels& used = i == 0 ? portable_kernels : kernels;
        x_hat[i].resize(bytes), v[i].resize(bytes), grad_x[i].resize(bytes), dots[i].resize(static_cast<size_t>(4 * rows));
        used.forward(ForwardArgs{x.data(), in, rows, k, coding.block, coding.thresholds, n, 1.5f, r.data(), 1,
                                 gamma.data(), 0, x_hat[i].data(), v[i].data(), out},
                     0, rows);
        BackwardArgs b{};
        b.grad = grad.data(), b.v = v[i].data(), b.type = b.v_type = b.out_type = out;
        b.rows = rows, b.k = k, b.block = coding.block;
        b.r = r.data(), b.r_stride = 1, b.gamma = gamma.data(), b.free = free.data(), b.free_stride = 1;
        b.grad_x = grad_x[i].data(), b.x_hat = x_hat[i].data(), b.row_dot = reinterpret_cast<float*>(dots[i].data());
        used.backward(b, 0, rows);
    }
    expect(same(x_hat[0], x_hat[1], out) && same(v[0], v[1], out), "forward");
    if (out == Type::f32) expect(near(grad_x[1], grad_x[0]), "backward");  // rounding to bf16 may fall either way
}

// Kept bytes: made, decoded, coded, multiplied and differentiated.
void check_kept(const Kernels& kernels) {
    int64_t k = pick(1, 700);
    const int n = static_cast<int>(pick(2, 16));
    OwnCoding coding = random_coding(k, n);
    std::vector<int8_t> lowest(static_cast<size_t>(n), static_cast<int8_t>(-kKeptMost));
    std::vector<float> steps;
    for (int code = 1; code < n; ++code) {
        lowest[static_cast<size_t>(code)] = static_cast<int8_t>(lowest[static_cast<size_t>(code - 1)] + pick(1, 16));
        const float step = lowest[static_cast<size_t>(code)];
        steps.push_back(step / kKeptSteps);
        (*coding.values)[static_cast<size_t>(code - 1)] = (step - one_of({0.0f, 0.4f, 0.9f})) / kKeptSteps;
    }
    const int64_t rows = pick(1, 5), count = rows * k;
    const Type in = one_of({Type::f32, Type::bf16}), out = one_of({Type::f32, Type::bf16}), back = one_of({Type::f32, Type::bf16});
    const std::vector<char> x = numbers(count, in, *coding.values, true), grad = numbers(count, back, *coding.values, false);
    std::vector<float> r(static_cast<size_t>(rows), 1.0f), scales(static_cast<size_t>(rows), 0.7f);
    const std::vector<float> one = {1.0f}, free(static_cast<size_t>(rows), 1.0f);
    if (pick(0, 3) == 0) r[0] = NAN;
    scales[0] = one_of({0.3f, NAN});
    std::vector<int8_t> kept[2];
    std::vector<char> x_hat[2], grad_x[2], dots[2], rms[2];
    EncodeArgs e = coding.of(nullptr, Type::kept, rows, k, k);
    e.block = 1, e.thresholds = steps.data(), e.r = scales.data(), e.ldl = (k + 63) / 64 * 64;
    Encoded coded[2];
    for (size_t i = 0; i < 2; ++i) {
        const Kernels& used = i == 0 ? portable_kernels : kernels;
        kept[i].resize(static_cast<size_t>(count)), x_hat[i].resize(static_cast<size_t>(count) * size_of(out));
        used.keep({x.data(), in, rows, k, coding.block, coding.thresholds, n, r.data(), 1, lowest.data(), kept[i].data()}, 0, rows);
        used.forward(ForwardArgs{kept[i].data(), Type::kept, rows, k, 1, steps.data(), n, 1.5f, one.data(), 0, scales.data(), 1,
                                 x_hat[i].data(), nullptr, out},
                     0, rows);
        e.x = kept[i].data();
        coded[i] = encode(used, e);
        grad_x[i].resize(static_cast<size_t>(4 * count)), dots[i].resize(static_cast<size_t>(4 * rows));
        BackwardArgs b{};
        b.grad = grad.data(), b.v = kept[i].data(), b.type = back, b.v_type = Type::kept, b.out_type = Type::f32;
        b.rows = rows, b.k = k, b.block = coding.block, b.thresholds = steps.data(), b.n = n, b.offset = 1.5f;
        b.r = free.data(), b.r_stride = 1, b.gamma = one.data(), b.free = free.data(), b.free_stride = 1;
        b.grad_x = grad_x[i].data(), b.row_dot = reinterpret_cast<float*>(dots[i].data());
        used.backward(b, 0, rows);
        rms[i].resize(static_cast<size_t>(8 * rows));
        used.row_rms({x.data(), in, rows, k, reinterpret_cast<double*>(rms[i].data())}, 0, rows);
    }
    expect(kept[0] == kept[1], "keep");
    expect(same(x_hat[0], x_hat[1], out), "kept bytes decoded");
    expect(coded[0].sums == coded[1].sums && same(coded[0].row_scales, coded[1].row_scales, Type::f32), "kept bytes coded");
    for (int64_t row = 0; row < rows; ++row)
        expect(std::equal(coded[0].levels.begin() + row * e.ldl, coded[0].levels.begin() + row * e.ldl + k,
                          coded[1].levels.begin() + row * e.ldl),
               "levels of kept bytes");
    expect(near(grad_x[1], grad_x[0]) && near(dots[1], dots[0]), "backward of kept bytes");
    for (int64_t row = 0; row < rows; ++row) {
        double a, b;
        memcpy(&a, &rms[0][static_cast<size_t>(8 * row)], 8), memcpy(&b, &rms[1][static_cast<size_t>(8 * row)], 8);
        expect((a != a && b != b) || a == b || std::abs(a - b) < 1e-12 * std::abs(a), "row_rms");
    }
}

std::vector<float> floats(int64_t count, bool wild = false) {
    const std::vector<char> bytes = numbers(count, Type::f32, {1.0f}, wild);
    std::vector<float> values(static_cast<size_t>(count));
    memcpy(values.data(), bytes.data(), bytes.size());
    return values;
}

char* bytes_of(std::vector<float>& values) { return reinterpret_cast<char*>(values.data()); }
bool same_floats(const std::vector<float>& a, const std::vector<float>& b) {
    const auto bytes = [](const std::vector<float>& x) {
        const char* const begin = reinterpret_cast<const char*>(x.data());
        return std::vector<char>(begin, begin + 4 * x.size());
    };
    return same(bytes(a), bytes(b), Type::f32);
}

// What a GPT has between its layers, by ranges of rows and of numbers, into its own input too.
void check_between(const Kernels& kernels) {
    const int64_t rows = pick(1, 5), k = one_of<int64_t>({pick(1, 40), pick(1, 700)}), count = rows * k;
    const std::vector<float> x = floats(count, pick(0, 3) == 0), weight = floats(k), bias = floats(k), times = floats(count);
    const bool biased = pick(0, 1) == 1, gated = pick(0, 1) == 1, in_place = pick(0, 1) == 1;
    const Activation kind = one_of({Activation::silu, Activation::gelu_tanh, Activation::gelu_erf, Activation::relu});
    const double eps = one_of({1e-5, 1e-12});
    const int64_t row = pick(0, rows), at = pick(0, count);
    std::vector<float> normed[2], activated[2];
    for (int i = 0; i < 2; ++i) {
        const Kernels& used = i == 0 ? portable_kernels : kernels;
        normed[i].resize(x.size());
        const LayerNormArgs norm{x.data(), weight.data(), biased ? bias.data() : nullptr, rows, k, eps, normed[i].data()};
        used.layer_norm(norm, 0, row), used.layer_norm(norm, row, rows);
        activated[i] = x;
        const ActivateArgs activation{in_place ? activated[i].data() : x.data(), gated ? times.data() : nullptr, kind, activated[i].data()};
        used.activate(activation, 0, at), used.activate(activation, at, count);
    }
    expect(same_floats(normed[0], normed[1]), "layer_norm");
    expect(same_floats(activated[0], activated[1]), "activate " + std::to_string(static_cast<int>(kind)));
}

// The loss of next tokens and its gradient, by ranges of rows.
void check_loss(const Kernels& kernels) {
    if (kernels.cross_entropy == nullptr) return;
    const Type type = one_of({Type::f32, Type::bf16});
    const int64_t rows = pick(1, 5), n = one_of<int64_t>({pick(1, 40), pick(1, 1500)}), row = pick(0, rows);
    const std::vector<char> logits = numbers(rows * n, type, {0.0f, 30.0f}, pick(0, 3) == 0);
    const std::vector<float> grads = floats(rows);
    std::vector<int64_t> targets;
    for (int64_t r = 0; r < rows; ++r) targets.push_back(pick(0, n - 1));
    std::vector<float> losses[2], log_sums[2];
    std::vector<char> gradient[2];
    for (int i = 0; i < 2; ++i) {
        const Kernels& used = i == 0 ? portable_kernels : kernels;
        losses[i].resize(grads.size()), log_sums[i].resize(grads.size()), gradient[i].resize(logits.size());
        const CrossEntropyArgs loss{logits.data(), type, n, targets.data(), losses[i].data(), log_sums[i].data()};
        used.cross_entropy(loss, 0, row), used.cross_entropy(loss, row, rows);
        const CrossEntropyBackwardArgs back{logits.data(), type, n, targets.data(), log_sums[i].data(), grads.data(), gradient[i].data()};
        used.cross_entropy_backward(back, 0, row), used.cross_entropy_backward(back, row, rows);
    }
    expect(same_floats(losses[0], losses[1]) && same_floats(log_sums[0], log_sums[1]), "cross_entropy");
    expect(same(gradient[0], gradient[1], type), "cross_entropy_backward");
}

// Many new tokens behind some that the cache holds; causal ones get the bits of a token at a time.
void check_prompt(const Kernels& kernels) {
    const int64_t batch = pick(1, 2), kv = pick(1, 2), count = pick(1, 3), heads = kv * count, d = 2 * pick(1, 40);
    const int64_t start = one_of<int64_t>({0, pick(1, 70)}), tokens = one_of<int64_t>({pick(1, 4), pick(5, 40), pick(41, 70)});
    const int64_t whole = start + tokens, room = whole + pick(0, 3);
    const CacheType type = one_of({CacheType::f32, CacheType::i8, CacheType::i4});
    const bool rotary = pick(0, 1) == 1, causal = pick(0, 3) != 0, coded = type != CacheType::f32;
    const int64_t block = coded ? one_of<int64_t>({1, 2, d & -d}) : 1, slots = batch * kv * room;
    const int64_t row = type == CacheType::f32 ? 4 * d : type == CacheType::i8 ? d : (d + 1) / 2;
    const std::vector<float> query = floats(batch * tokens * heads * d), key = floats(batch * tokens * kv * d), turn = floats(whole * (d / 2));
    std::vector<float> before = floats(slots * d), scales = floats(slots);
    struct Held {
        std::vector<char> keys, values;
        std::vector<float> key_scales, value_scales;
    };
    const auto held_before = [&] {
        const std::vector<char> rows(bytes_of(before), bytes_of(before) + slots * row);
        return Held{rows, rows, scales, scales};
    };
    const auto view_of = [&](Held& held, int64_t from) {
        return CacheView{type, held.keys.data(), held.values.data(), coded ? held.key_scales.data() : nullptr,
                         coded ? held.value_scales.data() : nullptr, room, from, block};
    };
    const float *const cosine = rotary ? turn.data() : nullptr, *const sine = rotary ? turn.data() : nullptr;
    std::vector<float> out[2], fresh(static_cast<size_t>(d));
    Held held[2];
    for (int i = 0; i < 2; ++i) {
        const Kernels& used = i == 0 ? portable_kernels : kernels;
        out[i].resize(query.size()), held[i] = held_before();
        const PromptArgs a{query.data(), key.data(), key.data(), cosine, sine, batch, tokens, heads, kv, d, causal, view_of(held[i], start), out[i].data()};
        const int64_t pair = pick(0, batch * kv), item = pick(0, a.items());
        std::vector<float> scratch(static_cast<size_t>(a.scratch()));
        used.store_prompt(a, 0, pair, fresh.data()), used.store_prompt(a, pair, batch * kv, fresh.data());
        used.attend_prompt(a, 0, item, scratch.data()), used.attend_prompt(a, item, a.items(), scratch.data());
    }
    expect(held[0].keys == held[1].keys && held[0].values == held[1].values, "the cache after store_prompt");
    expect(same_floats(held[0].key_scales, held[1].key_scales) && same_floats(held[0].value_scales, held[1].value_scales), "scales of store_prompt");
    expect(same_floats(out[0], out[1]), "attend_prompt");
    if (!causal) return;
    Held alone = held_before();
    std::vector<float> scratch(static_cast<size_t>((count + kCacheRows + 1) * d + count * (whole + 1)));
    std::vector<float> now_query(static_cast<size_t>(batch * heads * d)), now_key(static_cast<size_t>(batch * kv * d)), now_out(now_query.size());
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t i = 0; i < batch; ++i) {
            std::copy_n(query.begin() + (i * tokens + t) * heads * d, heads * d, now_query.begin() + i * heads * d);
            std::copy_n(key.begin() + (i * tokens + t) * kv * d, kv * d, now_key.begin() + i * kv * d);
        }
        kernels.attend(AttendArgs{now_query.data(), now_key.data(), now_key.data(), cosine, sine, batch, heads, kv, d, view_of(alone, start + t), now_out.data()},
                       0, batch * kv, scratch.data());
        for (int64_t i = 0; i < batch; ++i)
            expect(memcmp(&now_out[static_cast<size_t>(i * heads * d)], &out[1][static_cast<size_t>((i * tokens + t) * heads * d)],
                          static_cast<size_t>(4 * heads * d)) == 0,
                   "attend, token by token,");
    }
}

// One token of a decoder: norm, attention over a cache that has room for exactly it, fp32 and int8 heads. Sequences stand in
// the cache one after the other and hold alike many tokens, or have places of their own.
void check_decoder(const Kernels& kernels) {
    const int64_t batch = pick(1, 6), kv = pick(1, 2), heads = kv * pick(1, 3), d = 2 * pick(1, 40), start = pick(0, 40);
    const int64_t room = start + 1, k = heads * d, outputs = pick(1, 40);
    const std::vector<float> query = floats(batch * heads * d), key = floats(batch * kv * d), turn = floats((start + 1) * (d / 2));
    const std::vector<float> cache = floats(batch * kv * room * d), weight = floats(k), scale = floats(outputs);
    const std::vector<float> floats_in = floats(batch * k), floats_weight = floats(outputs * k);
    std::vector<int16_t> x(static_cast<size_t>(batch * k));
    std::vector<int8_t> head(static_cast<size_t>(outputs * k));
    for (int16_t& value : x) value = static_cast<int16_t>(pick(-2047, 2047));
    for (int8_t& value : head) value = static_cast<int8_t>(pick(-127, 127));
    const bool rotary = pick(0, 1) == 1;
    const CacheType type = one_of<CacheType>({CacheType::f32, CacheType::i8, CacheType::i4});
    const int64_t block = one_of<int64_t>({1, 2, d & -d});
    std::vector<int64_t> places;
    if (pick(0, 1) == 1)
        for (int64_t i = 0; i < batch; ++i) places.push_back(batch - 1 - i), places.push_back(i == 0 ? start : pick(0, start));
    std::vector<char> out[2], normed[2], scores[2], floats_of_head[2], held[2];
    for (int i = 0; i < 2; ++i) {
        const Kernels& used = i == 0 ? portable_kernels : kernels;
        out[i].resize(static_cast<size_t>(batch * heads * d) * 4), normed[i].resize(out[i].size());
        scores[i].resize(static_cast<size_t>(batch * outputs) * 4);
        const int64_t pairs = batch * kv * room, row = type == CacheType::f32 ? 4 * d : type == CacheType::i8 ? d : (d + 1) / 2;
        std::vector<char> keys(static_cast<size_t>(pairs * row));
        memcpy(keys.data(), cache.data(), keys.size());
        std::vector<char> values = keys;
        std::vector<float> key_scales(cache.begin(), cache.begin() + pairs), value_scales = key_scales;
        std::vector<float> scratch(static_cast<size_t>((heads / kv + kCacheRows + 1) * d + heads / kv * (start + 2)));
        const bool coded = type != CacheType::f32;
        const CacheView view{type, keys.data(), values.data(), coded ? key_scales.data() : nullptr,
                             coded ? value_scales.data() : nullptr, room, start, coded ? block : 1,
                             places.empty() ? nullptr : places.data()};
        used.attend(AttendArgs{query.data(), key.data(), key.data(), rotary ? turn.data() : nullptr, turn.data(), batch,
                               heads, kv, d, view, reinterpret_cast<float*>(out[i].data())},
                    0, batch * kv, scratch.data());
        held[i] = keys, held[i].insert(held[i].end(), values.begin(), values.end());
        used.rms_norm(RmsNormArgs{query.data(), weight.data(), batch, k, 1e-5, reinterpret_cast<float*>(normed[i].data())},
                      0, batch);
        floats_of_head[i].resize(scores[i].size());
        used.float_linear(FloatLinearArgs{floats_in.data(), floats_weight.data(), batch, outputs, k,
                                          reinterpret_cast<float*>(floats_of_head[i].data())},
                          0, outputs);
        used.int8_linear(Int8LinearArgs{x.data(), query.data(), head.data(), scale.data(), batch, outputs, k,
                                        reinterpret_cast<float*>(scores[i].data())},
                         0, outputs);
    }
    expect(same(out[0], out[1], Type::f32), "attend");
    expect(held[0] == held[1], "the cache after attend");
    expect(same(normed[0], normed[1], Type::f32), "rms_norm");
    expect(same(scores[0], scores[1], Type::f32), "int8_linear");
    expect(same(floats_of_head[0], floats_of_head[1], Type::f32), "float_linear");
}

// A head of 4 bits by groups of columns, at the largest values too.
void check_head(const Kernels& kernels) {
    const int64_t group = one_of<int64_t>({32, 64}), k = group * pick(1, 12), m = pick(1, 19), n = pick(1, 9), chunks = (k + 127) / 128;
    const bool largest = pick(0, 3) == 0;
    std::vector<int8_t> x(static_cast<size_t>(m * chunks * 128));
    const int64_t sums_row = (k / group + 15) / 16 * 16;
    std::vector<int16_t> less(static_cast<size_t>(m * chunks * 32)), sums(static_cast<size_t>(m * sums_row));
    for (int64_t row = 0; row < m; ++row)
        for (int64_t c = 0; c < k; ++c) {
            const int64_t place = row * chunks * 128 + c / 128 * 128, value = largest ? -127 : pick(-127, 127);
            x[static_cast<size_t>(place + c % 2 * 64 + c % 128 / 2)] = static_cast<int8_t>(value);
            less[static_cast<size_t>((place + c % 128) / 4)] += static_cast<int16_t>(8 * value);
            sums[static_cast<size_t>(row * sums_row + c / group)] += static_cast<int16_t>(value);
        }
    std::vector<uint8_t> weight(static_cast<size_t>(n * k / 2)), multipliers(static_cast<size_t>(n * k / group));
    for (uint8_t& byte : weight) byte = static_cast<uint8_t>(largest ? 0 : pick(0, 255));
    for (uint8_t& each : multipliers) each = static_cast<uint8_t>(largest ? 255 : pick(0, 255));
    std::vector<float> scale(static_cast<size_t>(n)), x_scale(static_cast<size_t>(m));
    for (float& each : scale) each = static_cast<float>(pick(1, 1000)) / 1000.0f;
    for (float& each : x_scale) each = static_cast<float>(pick(1, 1000)) / 1000.0f;
    std::vector<char> out[2];
    for (int i = 0; i < 2; ++i) {
        out[i].resize(static_cast<size_t>(m * n) * 4);
        const Int4LinearArgs a{x.data(), less.data(), sums.data(), x_scale.data(), weight.data(), multipliers.data(), scale.data(), m, n, k,
                               group, reinterpret_cast<float*>(out[i].data())};
        const int64_t middle = pick(0, n);
        (i == 0 ? portable_kernels : kernels).int4_linear(a, 0, middle);
        (i == 0 ? portable_kernels : kernels).int4_linear(a, middle, n);
    }
    expect(same(out[0], out[1], Type::f32), "int4_linear");
}

// Tokens drawn with every kind of setting, with ties, from one logit on.
void check_draw(const Kernels& kernels) {
    const int64_t rows = pick(1, 4), n = one_of<int64_t>({1, 2, pick(3, 40), pick(200, 900)});
    const std::vector<char> bytes = numbers(rows * n, Type::f32, {0.0f, 0.5f}, pick(0, 9) == 0);
    std::vector<float> logits(static_cast<size_t>(rows * n));
    memcpy(logits.data(), bytes.data(), bytes.size());
    std::vector<double> temperature, top_p, drawn;
    std::vector<int64_t> top_k, out[2];
    for (int64_t i = 0; i < rows; ++i) {
        temperature.push_back(one_of({0.0, 1.0, 0.3, 1e-320, 1e300}));
        top_k.push_back(one_of<int64_t>({0, 1, pick(1, n), 1000000}));
        top_p.push_back(one_of({1.0, 0.9, 0.3, 1e-300}));
        drawn.push_back(one_of({0.0, static_cast<double>(pick(0, 999)) / 1000.0, 1 - 1.0 / 9007199254740992.0}));
    }
    for (int i = 0; i < 2; ++i) {
        out[i].resize(static_cast<size_t>(rows));
        std::vector<uint64_t> scratch(static_cast<size_t>(n + (n + 1) / 2));
        (i == 0 ? portable_kernels : kernels)
            .draw(DrawArgs{logits.data(), n, temperature.data(), top_k.data(), top_p.data(), drawn.data(), out[i].data()}, 0, rows,
                  scratch.data());
    }
    expect(out[0] == out[1], "draw");
    for (const int64_t token : out[1]) expect(token >= -1 && token < n, "a token of draw");
}

// Random order of the columns of a matrix: salient ones first in each block, whole steps.
void check_binarized(const Kernels& kernels) {
    const int64_t n = pick(1, 40), k = one_of<int64_t>({pick(1, 300), pick(1, 300), pick(500, 1500)}), m = pick(1, 9);
    const int64_t block = 8 * one_of<int64_t>({pick(1, 20), pick(1, 20), 100});  // 800: sums of several pieces
    std::vector<int32_t> steps, order;
    for (int64_t first = 0; first < k; first += block) {
        std::vector<int32_t> parts[2];
        for (int64_t i = first; i < std::min(first + block, k); ++i)
            parts[pick(0, 4) == 0 ? 0 : 1].push_back(static_cast<int32_t>(i));
        for (auto& part : parts) {
            while (part.size() % 4 != 0) part.push_back(static_cast<int32_t>(k));
            steps.push_back(static_cast<int32_t>(part.size() / 4));
            order.insert(order.end(), part.begin(), part.end());
        }
    }
    const int64_t tiles = (n + 15) / 16, blocks = static_cast<int64_t>(steps.size()) / 2;
    const int64_t total = static_cast<int64_t>(order.size()) / 4;
    std::vector<uint64_t> bits(static_cast<size_t>(2 * tiles * total));
    std::vector<uint16_t> scales(static_cast<size_t>(112 * tiles * blocks));
    for (uint64_t& word : bits) word = static_cast<uint64_t>(randomness()) << 32 | randomness();
    for (uint16_t& scale : scales) scale = static_cast<uint16_t>(pick(0, 0x7bff) | pick(0, 1) << 15);
    std::vector<float> x(static_cast<size_t>(m * k)), bias(static_cast<size_t>(n));
    std::vector<char> bytes = numbers(m * k, Type::f32, {0.5f}, true);
    memcpy(x.data(), bytes.data(), bytes.size());
    const Binarized w{bits.data(), scales.data(), steps.data(), order.data(), pick(0, 1) == 1 ? bias.data() : nullptr,
                      n, k, blocks, total};
    std::vector<char> out[2];
    for (int i = 0; i < 2; ++i) {
        const Kernels& used = i == 0 ? portable_kernels : kernels;
        std::vector<int8_t> rounded(static_cast<size_t>(k + 1)), ordered(static_cast<size_t>(4 * m * total));
        std::vector<int32_t> sums(static_cast<size_t>(2 * m * blocks));
        std::vector<float> worth(static_cast<size_t>(m));
        for (int64_t row = 0; row < m; ++row)
            worth[static_cast<size_t>(row)] = used.binarized_input(
                w, x.data() + row * k, 127.0f, rounded.data(), ordered.data() + 4 * row * total, sums.data() + 2 * row * blocks);
        out[i].resize(static_cast<size_t>(4 * m * n));
        const BinarizedArgs a{w, ordered.data(), sums.data(), worth.data(), m, reinterpret_cast<float*>(out[i].data())};
        used.binarized(a, 0, tiles);
    }
    expect(same(out[0], out[1], Type::f32), "binarized");
}

}  // namespace

int main(int count, char** arguments) {
    const long cases = count > 1 ? std::atol(arguments[1]) : 300;
    const unsigned seed = count > 2 ? static_cast<unsigned>(std::atol(arguments[2])) : 1;
#ifdef BELLBOX_X86
    trap::install();
#endif
    std::string names = available();
    std::printf("%ld cases each on %s, seed %u\n", cases, names.c_str(), seed);
    for (size_t from = 0; from < names.size();) {
        const size_t to = std::min(names.find(", ", from), names.size());
        const std::string name = names.substr(from, to - from);
        from = to + 2;
        use(name.c_str());
        randomness.seed(seed);
        for (long i = 0; i < cases; ++i) try {
                check_layer(kernels());
                check_convolution();
                check_rotation(kernels());
                check_training(kernels());
                check_kept(kernels());
                check_between(kernels());
                check_loss(kernels());
                check_prompt(kernels());
                check_decoder(kernels());
                check_head(kernels());
                check_draw(kernels());
                check_binarized(kernels());
            } catch (const std::exception& error) {
                std::printf("%s, case %ld: %s\n", name.c_str(), i, error.what());
                return 1;
            }
        if (kernels().integer_peak(3) <= 0) return 1;
        std::printf("%s: the same bits\n", name.c_str());
#ifdef BELLBOX_X86
        if (name == "amx") std::printf("amx: %ld tile instructions were carried out by the signal handler\n", trap::executed.load());
#endif
    }
    return 0;
}
