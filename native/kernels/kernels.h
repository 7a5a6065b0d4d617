// What the kernels of every instruction set offer: plain buffers in, plain buffers out, no Python, no PyTorch.
//
// Numerics are pinned (docs/design.md): the butterfly's additions in fp32 with stages h = 1, 2, 4, ...; sums of
// squares in fp64; one rounding of the normaliser to fp32; codes by comparison (v >= threshold, ties up); exact
// integer sums; three separate fp32 roundings in the epilogue. Every implementation gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bellbox {

// kept: int8, in steps of 1/32, what training keeps of a normalised value (KeepArgs); only ever read.
enum class Type : int32_t { f32 = 0, bf16 = 1, kept = 2 };
static constexpr int64_t bytes_of(Type type) { return type == Type::f32 ? 4 : type == Type::bf16 ? 2 : 1; }
constexpr float kKeptSteps = 32;
constexpr int kKeptMost = 127;
enum class Normalise : int32_t { rms = 0, absmax = 1, fixed = 2 };  // sigma: of each row, or 1 / rstd

// Rows of floats to rows of integer levels. Of `kept`, block is 1, and `r` the row_scales.
struct EncodeArgs {
    const void* x;             // [rows, k], row stride ldx elements
    Type x_type;
    int64_t rows, k, ldx;
    int32_t block;             // Hadamard block, a power of two dividing k; 1 for none
    const float* thresholds;   // n - 1 rising numbers
    int32_t n;                 // levels, 2..16
    Normalise normalise;       // sigma of a row: RMS or largest |x|, floor 1e-8; or one number for all
    double rstd;             // 1 / sigma where it is fixed
    bool rescale;              // row_scales carry sigma
    const float* r;            // what each row is multiplied with, [rows]; null: it follows from the four above
    int32_t multiplier;        // integer level = multiplier * code - shift
    int32_t shift;
    int8_t* levels;            // [rows, ldl], ldl >= k a multiple of 64; columns k..ldl-1 are set to 0
    int64_t ldl;
    int32_t* sums;             // [rows]: sum of the integer levels of a row
    float* row_scales;              // [rows]: 1.0, or sigma if `rescale`; NaN where the row has a NaN or infinity
};

// Rows of floats to rotated rows: out = butterfly(x) * factor.
struct RotateArgs {
    const void* x;             // [rows, k] contiguous
    Type x_type;
    int64_t rows, k;
    int32_t block;
    float factor;
    void* out;                 // [rows, k]
    Type out_type;
};

// The RMS of each row, as coding takes it.
struct RmsArgs {
    const void* x;             // [rows, k] contiguous
    Type x_type;
    int64_t rows, k;
    double* out;               // [rows]
};

// A weight matrix in the layout of the kernels: see pack() in dispatch.cpp.
//   [ceil(n/16)][ceil(k/64)][2*bits vectors of 64 bytes], unsigned codes.
// A block of 64 columns has 16 groups of 4 columns; group g of 16 rows is the operand of one dpbusd: byte 4*r + c
// is row r, column 4*g + c. Bit field f (bits wide) of vector j holds group f * 2*bits + j.
// 3 bits: 4 vectors of the low two bits as for bits = 2, then 2 vectors of the high bit as for bits = 1.
struct Weights {
    const uint8_t* data;
    int32_t bits;              // 1..4 (ternary is stored in 2)
    int64_t n, k;              // rows (outputs), columns (inputs)
    int32_t multiplier;        // integer level = multiplier * code - shift
    int32_t shift;
    const float* scale;        // [n], what one integer is worth
    const float* bias;         // [n] or null
    const int32_t* code_sums;  // [n]: sum of the codes of a row; for 1 and 2 bits, else null
};

// out[m, n] = float(sum_k levels * weight) * (scale[n] * act_scale) * row_scales[m] + bias[n]
struct LinearArgs {
    const Weights* weights;
    const int8_t* levels;      // from EncodeArgs, like all that follows up to row_scales
    int64_t ldl;
    int32_t act_n, act_multiplier, act_shift;
    const int32_t* sums;
    const float* row_scales;
    int64_t m;
    float act_scale;           // what one integer of the activation is worth
    void* out;                 // [m, ldo]
    Type out_type;
    int64_t ldo;
};

// Normalised rotated values v = butterfly(x) * r as bytes (src/bellbox/ops/kept.py): the nearest of -127..127 steps of 1/32
// that has the code of v, when compared with the thresholds' own steps.
struct KeepArgs {
    const void* x;             // [rows, k] contiguous
    Type x_type;
    int64_t rows, k;
    int32_t block;
    const float* thresholds;
    int32_t n;
    const float* r;            // as below; a NaN gives the lowest step
    int64_t r_stride;
    const int8_t* lowest;      // [n], the least step of each code
    int8_t* kept;              // [rows, k]
};

// Fake quantization for training (src/bellbox/ops/fake_quantize.py): x_hat = scale * (code - offset), v kept.
struct ForwardArgs {
    const void* x;             // [rows, k] contiguous
    Type x_type;
    int64_t rows, k;
    int32_t block;
    const float* thresholds;
    int32_t n;
    float offset;
    const float* r;            // 1 / (sigma sqrt(block)); NaN poisons its row
    int64_t r_stride;          // 1: one a row; 0: one for all
    const float* scale;        // gamma / (n/2)
    int64_t scale_stride;
    void* x_hat;               // [rows, k]
    void* v;                   // [rows, k], or null
    Type out_type;             // of x_hat and v
};

struct BackwardArgs {
    const void* grad;          // [rows, k]
    const void* v;
    Type type, v_type;         // of grad and x_hat; of v, the same or `kept`
    Type out_type;             // of grad_x: that of grad, or any float where v is `kept`
    int64_t rows, k;
    int32_t block;
    const float* r;
    int64_t r_stride;
    const float* gamma;
    int64_t gamma_stride;
    const float* free;         // 1 where sigma follows the input, else 0
    int64_t free_stride;
    const float* mean;         // given mean of g_v * v (whole-tensor statistic), or null: mean over each row
    void* grad_x;
    const void* x_hat;         // what the forward returned; read only for row_dot, and not where v is `kept`
    const float* thresholds;   // where v is `kept`: of its steps, for row_dot
    int32_t n;
    float offset;
    float* row_dot;            // [rows]: sum of grad * x_hat of each row (the gradient of gamma), of grad * (code - offset)
                               // where v is `kept`; or null
};

// What stands between the packed layers of a decoder (native/kernels/decoder.h); all fp32 and contiguous.
struct RmsNormArgs {
    const float* x;            // [rows, k]
    const float* weight;       // [k]
    int64_t rows, k;
    double eps;
    float* out;                // [rows, k]
};

// A GPT's: the mean and the sum of squares in fp64.
struct LayerNormArgs {
    const float* x;            // [rows, k]
    const float *weight, *bias;  // [k]; the bias may be null
    int64_t rows, k;
    double eps;
    float* out;                // [rows, k]
};

enum class Activation : int { silu, gelu_tanh, gelu_erf, relu };

// out = activation(x) [* times]
struct ActivateArgs {
    const float *x, *times;    // [count]; times may be null
    Activation kind;
    float* out;                // [count], may be x
};

// Keys and values of `start` tokens, with room for more: rows of fp32 numbers, or of codes that are each times the scale of
// their row. Of 4 bits, byte i has the code of number i, plus 8, in its low half, and that of i + ceil(head_dim / 2) above.
// Sequences that come and go have places of their own: a slot of the cache, and how many tokens it holds.
enum class CacheType : int { f32, i8, i4 };

struct CacheView {
    CacheType type;
    void* keys;                // [slots, kv_heads, room, head_dim], of 4 bits ceil(head_dim / 2) bytes
    void* values;
    float* key_scales;         // [slots, kv_heads, room] of codes, else null
    float* value_scales;
    int64_t room, start;       // of places, the largest start
    int64_t block;             // of the rotation of rows before they are coded, a divisor of head_dim; 1: none
    const int64_t* places = nullptr;  // [batch, 2]: slot (no two alike) and start of each sequence; null: its number, `start`

    int64_t slot_of(int64_t sequence) const { return places == nullptr ? sequence : places[2 * sequence]; }
    int64_t start_of(int64_t sequence) const { return places == nullptr ? start : places[2 * sequence + 1]; }
};

// One new token of each sequence: rotary positions, its key and value into the cache, attention over all so far.
struct AttendArgs {
    const float* query;        // [batch, heads, head_dim]
    const float* key;          // [batch, kv_heads, head_dim]
    const float* value;
    const float* cosine;       // [start + 1, head_dim / 2], or null: no rotary positions
    const float* sine;
    int64_t batch, heads, kv_heads, head_dim;
    CacheView cache;
    float* out;                // [batch, heads, head_dim]
};

constexpr int64_t kCacheRows = 32;  // rows of a cache that `attend` decodes at once, a multiple of 4
constexpr int64_t kPromptKeys = 64;   // a multiple of the keys whose products with a query lie side by side
constexpr int64_t kPromptTokens = 16;  // new tokens that go together

// Some new tokens of each sequence: their keys and values into the cache, then attention of each over all before it and
// itself, or over all. An item of work is up to kPromptTokens tokens of a pair (sequence, key-value head).
struct PromptArgs {
    const float* query;        // [batch, tokens, heads, head_dim]
    const float* key;          // [batch, tokens, kv_heads, head_dim]
    const float* value;
    const float* cosine;       // [start + tokens, head_dim / 2], or null
    const float* sine;
    int64_t batch, tokens, heads, kv_heads, head_dim;
    bool causal;
    CacheView cache;           // without places: sequence i has slot i
    float* out;                // as query

    int64_t blocks() const { return (tokens + kPromptTokens - 1) / kPromptTokens; }
    int64_t items() const { return batch * kv_heads * blocks(); }
    int64_t padded() const { return (cache.start + tokens + kPromptKeys - 1) / kPromptKeys * kPromptKeys; }
    int64_t scratch() const {  // floats
        const int64_t rows = kPromptTokens * (heads / kv_heads);
        const int64_t lanes = (head_dim + 15) / 16 * 16;  // of keys, as they are turned
        return (2 * rows + kCacheRows) * head_dim + padded() * lanes + rows * (padded() + 1);
    }
};

// out[m, n] = the product of row m of x and row n of the weights, in fp32, each by itself: sums of sixteen lanes.
struct FloatLinearArgs {
    const float* x;            // [m, k]
    const float* weight;       // [n, k]
    int64_t m, n, k;
    float* out;                // [m, n]
};

// Rows of 12-bit integers times rows of int8: out = float(sum) * (scale[n] * x_scale[m]).
struct Int8LinearArgs {
    const int16_t* x;          // [m, k], -2047..2047; k at most 8192, so that a sum fits 32 bits
    const float* x_scale;      // [m]
    const int8_t* weight;      // [n, k]
    const float* scale;        // [n]
    int64_t m, n, k;
    float* out;                // [m, n]
};

// Rows of 8-bit integers times rows of 4 bits by groups of columns: out = float(sum over groups of multiplier * sum) *
// (scale[n] * x_scale[m]), in the layout of core/table.py.
struct Int4LinearArgs {
    const int8_t* x;           // [m, chunks, 2, 64], -127..127: of 128 columns the even ones, then the odd; zeros fill up
    const int16_t* less;       // [m, chunks, 32]: 8 times the sum of columns 4 i to 4 i + 3 of a chunk; read by AVX-512
    const int16_t* sums;       // [m, groups up to a multiple of 16]: sum of each group, zeros fill up; read by AVX2
    const float* x_scale;      // [m]
    const uint8_t* weight;     // [n, k / 2]: integer + 8, the even column in the low half
    const uint8_t* multipliers;  // [n, k / group]
    const float* scale;        // [n]
    int64_t m, n, k, group;    // k at most 8192, so that a sum fits 32 bits; group 32 or 64, of which k is a multiple
    float* out;                // [m, n]
};

// Rows of logits against the class that each is of (native/kernels/cross_entropy.h).
struct CrossEntropyArgs {
    const void* logits;        // [rows, n], f32 or bf16
    Type type;
    int64_t n;
    const int64_t* targets;    // [rows], 0 to n - 1
    float* losses;             // [rows]
    float* log_sums;           // [rows]
};

struct CrossEntropyBackwardArgs {
    const void* logits;        // as above
    Type type;
    int64_t n;
    const int64_t* targets;
    const float* log_sums;     // of the forward
    const float* grads;        // [rows], of the losses
    void* out;                 // [rows, n], of the type of the logits
};

// The next token of each row of logits (native/kernels/draw.h).
struct DrawArgs {
    const float* logits;       // [rows, n]
    int64_t n;                 // 1 to 2^31
    const double* temperature; // [rows], 0: the likeliest
    const int64_t* top_k;      // [rows], among so many of the likeliest; 0: all
    const double* top_p;       // [rows], above 0, among the fewest that reach this share of those; 1: all
    const double* drawn;       // [rows], which of the shares: at least 0, below 1
    int64_t* out;              // [rows]
};

// A binarized matrix (src/bellbox/ptq) in the layout of the kernels. In each block of columns the salient ones come first,
// then the others, both filled up with columns of zero inputs to whole steps of four.
struct Binarized {
    const uint64_t* bits;      // [ceil(n/16)][total][2]: signs and second bits of a step; bit 4 r + c: row r, column c
    const uint16_t* scales;    // [ceil(n/16)][blocks][7][16], fp16, finite, in the order of core/binarize.py
    const int32_t* steps;      // [blocks][2]: steps of salient columns, and of others
    const int32_t* order;      // [4 * total]: which of k inputs a step's columns take; k for zero
    const float* bias;         // [n] or null
    int64_t n, k, blocks, total;
};

// out[m, n] = x_scale[m] * sum over blocks and seven scales of scale * float(exact sum of integers), + bias[n]
struct BinarizedArgs {
    Binarized weights;
    const int8_t* x;           // [m, 4 * total]
    const int32_t* sums;       // [m, blocks, 2]: of x, over salient columns and over others
    const float* x_scale;      // [m]
    int64_t m;
    float* out;                // [m, n]
};

// A convolution whose output pixels lie side by side in vectors (native/layers/pixels.h): 2-bit weights, at most 4 levels.
struct PixelArgs {
    int64_t height, width, channels, left, top;   // of the input and its padding
    int64_t rows, columns, stride_y, stride_x;    // of the output
    int64_t pixels;            // of the output, of all samples
    const int8_t* codes;       // of each sample code_stride, of which [height, width, channels]
    int64_t code_stride;
    // Of a sample, `tuples` + `sum_planes` planes of plane_width bytes a line: codes of channels q, Q + q (2nd digit to base
    // 4) and so on, as many as Kernels::joined, q < Q = tuples; then the sums of the codes of 28 such tuples each. 64
    // bytes lie behind all.
    uint8_t* planes;
    int64_t tuples, sum_planes, plane, plane_width, sample_bytes;
    int64_t places;            // of the window
    const int64_t* offsets;    // [places]: in a plane, from the first place of a window
    // Tuples of the weights' codes, times 4^joined: [n up to a multiple of 16, by 8][lookups][8], lookups being
    // [places][tuples] up to a multiple of 8; zeros fill up.
    const uint16_t* addresses;
    int64_t lookups;
    const int32_t* border;     // [rows * columns]: which of the borders that a window may have
    // What leaves the sum of the multiplied levels: [borders, less_stride], on whole lines, act_shift * weights' multiplier *
    // sum of the codes of an output inside; and weights' shift * sum of the levels that a window sees, of which here
    const int32_t* less;
    int64_t less_stride;
    const int32_t* shifts;     // [rows * columns]: act_shift * inputs inside
    LinearArgs product;        // weights, row_scales (of samples), what concerns the activation, out (of the first sample)
    const float* add;          // to what is written, which is then fp32; null: nothing
    bool relu;                 // of that; fp32 too
};

// The runtime (native/runtime) neither trains nor binarizes, and all its numbers are fp32: with BELLBOX_RUNTIME_ONLY what else
// there is stays null, or is not compiled.
#ifdef BELLBOX_RUNTIME_ONLY
constexpr bool kAllTypes = false;
#else
constexpr bool kAllTypes = true;
#endif

// One instruction set. Row ranges let the caller divide the work among threads.
struct Kernels {
    const char* name;
    void (*encode)(const EncodeArgs&, int64_t row_begin, int64_t row_end);
    void (*rotate)(const RotateArgs&, int64_t row_begin, int64_t row_end) = nullptr;
    void (*forward)(const ForwardArgs&, int64_t row_begin, int64_t row_end) = nullptr;
    void (*backward)(const BackwardArgs&, int64_t row_begin, int64_t row_end) = nullptr;
    void (*keep)(const KeepArgs&, int64_t row_begin, int64_t row_end) = nullptr;
    void (*row_rms)(const RmsArgs&, int64_t row_begin, int64_t row_end) = nullptr;
    void (*cross_entropy)(const CrossEntropyArgs&, int64_t row_begin, int64_t row_end) = nullptr;
    void (*cross_entropy_backward)(const CrossEntropyBackwardArgs&, int64_t row_begin, int64_t row_end) = nullptr;
    // Columns of the output [16*tile_begin, 16*tile_end) and rows [m_begin, m_end).
    void (*linear)(const LinearArgs&, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end);
    void (*rms_norm)(const RmsNormArgs&, int64_t row_begin, int64_t row_end);
    void (*layer_norm)(const LayerNormArgs&, int64_t row_begin, int64_t row_end);
    void (*activate)(const ActivateArgs&, int64_t begin, int64_t end);
    // Pairs (sequence, key-value head) of queries = heads / kv_heads; scratch has room for
    // (queries + kCacheRows + 1) * head_dim + queries * (start + 2) floats.
    void (*attend)(const AttendArgs&, int64_t pair_begin, int64_t pair_end, float* scratch);
    // Pairs of a prompt, all of them before the first item; scratch has room for head_dim floats.
    void (*store_prompt)(const PromptArgs&, int64_t pair_begin, int64_t pair_end, float* scratch);
    void (*attend_prompt)(const PromptArgs&, int64_t item_begin, int64_t item_end, float* scratch);
    void (*float_linear)(const FloatLinearArgs&, int64_t n_begin, int64_t n_end);
    void (*int8_linear)(const Int8LinearArgs&, int64_t n_begin, int64_t n_end);
    void (*int4_linear)(const Int4LinearArgs&, int64_t n_begin, int64_t n_end);
    void (*draw)(const DrawArgs&, int64_t row_begin, int64_t row_end, uint64_t* scratch);
    int64_t (*integer_peak)(int64_t rounds) = nullptr;   // native/kernels/peak.h
    // A row of x [k] to integers, -most..most, in the order of the steps, and their sums; returns what one is worth.
    float (*binarized_input)(const Binarized&, const float* x, float most, int8_t* rounded, int8_t* ordered, int32_t* sums) = nullptr;
    void (*binarized)(const BinarizedArgs&, int64_t tile_begin, int64_t tile_end) = nullptr;
    // Whether `linear` takes so many rows as codes (a level that is no code's is wrong there, code_sums is used), or null
    // where it never does.
    bool (*counts)(const LinearArgs&, int64_t rows) = nullptr;
    // Planes of samples, and output pixels [64 begin, 64 end) from them; null where rows of patches serve.
    void (*make_planes)(const PixelArgs&, int64_t sample_begin, int64_t sample_end) = nullptr;
    void (*convolve)(const PixelArgs&, int64_t begin, int64_t end) = nullptr;
    int64_t joined = 0;        // codes that one lookup of `convolve` multiplies; 0: none, rows of patches serve
};

// Tables of addresses, constexpr where they are defined: what initializes a variable of a file compiled for an
// instruction set would run, in those instructions, on every processor that loads the library.
extern const Kernels portable_kernels;
extern const Kernels wasm_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels neon_kernels;
// On ARM: what the two that follow do otherwise than neon; their tables are made in dispatch.cpp.
struct Products {
    decltype(Kernels::linear) linear;
    decltype(Kernels::int8_linear) int8_linear;
    decltype(Kernels::int4_linear) int4_linear;
    decltype(Kernels::integer_peak) integer_peak;
};
extern const Products dotprod_products;
extern const Products i8mm_products;
extern const Kernels dotprod_kernels;
extern const Kernels i8mm_kernels;
extern const Kernels amx_kernels;  // avx512's but for amx_linear; made in dispatch.cpp
void amx_linear(const LinearArgs&, int64_t m_begin, int64_t m_end, int64_t tile_begin, int64_t tile_end);
int64_t amx_integer_peak(int64_t rounds);
bool amx_permitted();          // asks the operating system, once

// The best that this processor runs, or the one that BELLBOX_ISA names. Throws std::runtime_error with one clear line
// where that is unknown or cannot run here.
const Kernels& kernels();
void use(const char* name);    // from now on; the best again for "". Throws like kernels().
const char* available();       // names, best first, separated by commas

// Codes [n, k] (uint8, row stride ldc) into the layout above. `out` has packed_size(bits, n, k) bytes.
size_t packed_size(int32_t bits, int64_t n, int64_t k);
// Rows [row_begin, row_end), from a multiple of 16 on.
void pack(const uint8_t* codes, int64_t ldc, int32_t bits, int64_t n, int64_t k, int64_t row_begin, int64_t row_end, uint8_t* out);
void unpack(const uint8_t* data, int32_t bits, int64_t n, int64_t k, uint8_t* codes);  // the inverse: codes [n, k]

// A number that is another one, all but surely, where a byte is: for what is derived from memory that anybody may write.
uint64_t fingerprint(const void* data, size_t bytes);

}  // namespace bellbox
