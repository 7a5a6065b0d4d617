// bellbox-run: continue a prompt with a packed folder, with the flags of `bellbox generate`; or say what an image shows.
#include <algorithm>
#include <cerrno>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <time.h>
#include <vector>

#include "bellbox.h"

#ifdef __GLIBCXX__
// Nothing is thrown here. The library's own handler would bring a demangler of 50 KB, to name what was.
namespace __gnu_cxx {
void __verbose_terminate_handler() { std::abort(); }
}  // namespace __gnu_cxx
#endif

namespace {

const char kUsage[] =
    "usage: bellbox-run FOLDER --prompt TEXT [--max-new-tokens N] [--temperature T] [--top-k K] [--top-p P] [--seed S]\n"
    "                   [--stop TOKEN] [--bits N] [--embeddings bf16|int8|int4] [--kv-cache fp32|int8|int4] [--threads N] [--bench]\n"
    "       bellbox-run FOLDER --image FILE.ppm [--bits N] [--threads N] [--bench]\n"
    "Continue a text with a packed Bellbox model; the same seed gives the text of `bellbox generate`.\n"
    "Or name the likeliest classes of a picture in PPM or PGM, of the size that the model takes.\n"
    "--bits: of a folder of several widths, the one to use; its widest where not given.\n"
    "--embeddings: round fp32 embeddings and head while loading. --kv-cache: what keys and values are kept in; int8 and int4 round.\n"
    "--bench writes no text, but loading, prefill and decode as JSON.\n";

[[noreturn]] void refuse(const std::string& why) {
    std::fprintf(stderr, "bellbox-run: error: %s\n", why.c_str());
    std::exit(2);
}

double number(const char* flag, const char* text) {
    char* end = nullptr;
    const double value = std::strtod(text, &end);
    if (end == text || *end != '\0') refuse(std::string(flag) + " is " + text + "; it must be a number");
    return value;
}

long long whole(const char* flag, const char* text, long long least, long long most = LLONG_MAX) {
    char* end = nullptr;
    const long long value = std::strtoll(text, &end, 10);
    if (end == text || *end != '\0' || value < least) refuse(std::string(flag) + " is " + text + "; it must be a whole number of at least " + std::to_string(least));
    if (value > most) refuse(std::string(flag) + " is " + text + "; it must be at most " + std::to_string(most));
    return value;
}

double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// The largest resident size of this program so far, in MB; 0 where the system does not tell.
double peak_memory() {
    double kilobytes = 0;
    if (FILE* const file = std::fopen("/proc/self/status", "r")) {
        char line[256];
        while (std::fgets(line, sizeof(line), file) != nullptr)
            if (std::strncmp(line, "VmHWM:", 6) == 0) kilobytes = std::strtod(line + 6, nullptr);
        std::fclose(file);
    }
    return kilobytes / 1e3;
}

// A disk that is full, or an output that is closed: no text that somebody could take for the whole one.
int write_text(const char* text, size_t bytes) {
    if (std::fwrite(text, 1, bytes, stdout) == bytes && std::fflush(stdout) == 0) return 0;
    std::fprintf(stderr, "bellbox-run: error: the output cannot be written (%s)\n", std::strerror(errno));
    std::_Exit(BELLBOX_FAILED);
}

// `user`: the prompt, until it is written, before the first piece: what is refused is refused before.
int write_piece(void* user, const char* text, size_t bytes) {
    const char*& prompt = *static_cast<const char**>(user);
    if (prompt != nullptr && write_text(prompt, std::strlen(prompt)) != 0) return 1;
    prompt = nullptr;
    return write_text(text, bytes);
}

int drop_piece(void*, const char*, size_t) { return 0; }

struct Flags {
    const char *folder = nullptr, *prompt = nullptr, *image = nullptr;
    bellbox_options options{};
    bool bench = false;
    bellbox_choices choices{};
};

// Bits of a precision, by the names that `bellbox generate` takes.
int bits_of(const char* flag, const std::string& name, const char* plain, int plain_bits) {
    if (name == plain) return plain_bits;
    if (name != "int8" && name != "int4") refuse(std::string(flag) + " is " + name + "; it must be " + plain + ", int8 or int4");
    return name == "int8" ? 8 : 4;
}

Flags flags_of(int argc, char** argv) {
    Flags flags;
    bellbox_options& options = flags.options;
    options.temperature = 1.0, options.threads = 1;
    bool seeded = false;
    for (int i = 1; i < argc; ++i) {
        std::string flag = argv[i];
        if (flag == "--help" || flag == "-h") std::exit(std::fputs(kUsage, stdout) < 0);
        if (flag == "--bench") {
            flags.bench = true;
            continue;
        }
        if (flag.rfind("--", 0) != 0) {
            if (flags.folder != nullptr) refuse("there are two folders, '" + std::string(flags.folder) + "' and '" + flag + "'");
            flags.folder = argv[i];
            continue;
        }
        const char* value = std::strchr(argv[i], '=');  // --flag=value, as `bellbox generate` takes it too
        if (value != nullptr) {
            flag.resize(static_cast<size_t>(value++ - argv[i]));
        } else {
            if (i + 1 == argc) refuse(flag + " has no value");
            value = argv[++i];
        }
        if (flag == "--prompt") flags.prompt = value;
        else if (flag == "--image") flags.image = value;
        else if (flag == "--max-new-tokens") options.max_new_tokens = whole("--max-new-tokens", value, 1);
        else if (flag == "--temperature") options.temperature = number("--temperature", value);
        else if (flag == "--top-k") options.top_k = whole("--top-k", value, 1);
        else if (flag == "--top-p") {
            options.top_p = number("--top-p", value);
            if (!(options.top_p > 0 && options.top_p <= 1)) refuse(std::string("top_p is ") + value + "; it must be above 0 and at most 1");
        } else if (flag == "--seed") options.seed = static_cast<uint64_t>(whole("--seed", value, -9223372036854775807LL - 1)), seeded = true;
        else if (flag == "--stop") options.stop = value;
        else if (flag == "--bits") flags.choices.bits = static_cast<int>(whole("--bits", value, 1, INT_MAX));
        else if (flag == "--embeddings") flags.choices.embedding_bits = bits_of("--embeddings", value, "bf16", 16);
        else if (flag == "--kv-cache") options.cache_bits = bits_of("--kv-cache", value, "fp32", 32);
        else if (flag == "--checkpoint") refuse("--checkpoint is of a run; this program takes packed folders, which `bellbox convert --checkpoint` writes");
        else if (flag == "--threads") options.threads = static_cast<int>(whole("--threads", value, 1, INT_MAX));
        else refuse(flag + " is unknown; see bellbox-run --help");
    }
    if (flags.folder == nullptr || *flags.folder == '\0') refuse("give the folder of a packed model; see bellbox-run --help");
    if (flags.prompt != nullptr && flags.image != nullptr) refuse("--prompt and --image are two things; give one");
    if (flags.prompt == nullptr && flags.image == nullptr && flags.bench) flags.prompt = "Once upon a time";
    if (flags.prompt == nullptr && flags.image == nullptr) refuse("give --prompt, the text to continue, or --image");
    if (!seeded) {
        timespec time;
        clock_gettime(CLOCK_REALTIME, &time);
        options.seed = static_cast<uint64_t>(time.tv_nsec) * 0x9e3779b97f4a7c15u ^ static_cast<uint64_t>(time.tv_sec);
    }
    return flags;
}

double rate(double count, double time) { return time > 0 ? count / time : 0.0; }

int failed(bellbox_status status, const bellbox_error& error) {
    std::fprintf(stderr, "bellbox-run: error: %s\n", error.text);
    return status;
}

int continue_text(const bellbox_model* model, const Flags& flags, double loaded, bellbox_error& error) {
    bellbox_times times{};
    const char* unwritten = flags.prompt;
    const bellbox_status status =
        bellbox_generate(model, flags.prompt, &flags.options, flags.bench ? drop_piece : write_piece, &unwritten, &times, &error);
    if (status != BELLBOX_OK) {
        if (!flags.bench && unwritten == nullptr) std::fputs("\n", stdout);
        return failed(status, error);
    }
    const double prefill = rate(static_cast<double>(times.prompt_tokens), times.prefill_seconds);
    const double decode = rate(static_cast<double>(times.new_tokens - 1), times.decode_seconds);
    const auto prompt_tokens = static_cast<long long>(times.prompt_tokens), new_tokens = static_cast<long long>(times.new_tokens);
    if (flags.bench) {
        std::printf("{\"kernels\": \"%s\", \"threads\": %d, \"load_seconds\": %.6f, \"first_token_seconds\": %.6f, \"prompt_tokens\": %lld, "
                    "\"prefill_tokens_per_second\": %.2f, \"new_tokens\": %lld, \"decode_tokens_per_second\": %.2f, \"peak_mb\": %.2f}\n",
                    bellbox_kernels(), flags.options.threads, loaded, loaded + times.prefill_seconds, prompt_tokens, prefill, new_tokens, decode, peak_memory());
        return 0;
    }
    write_piece(&unwritten, "\n", 1);
    std::fprintf(stderr, "%s kernels, loaded in %.3f s, prefill %lld tokens at %.0f tokens/s, decode %lld tokens at %.0f tokens/s, peak memory %.1f MB\n",
                 bellbox_kernels(), loaded, prompt_tokens, prefill, new_tokens, decode, peak_memory());
    return 0;
}

// The likeliest classes, one a line: number and probability.
int name_classes(const bellbox_model* model, const Flags& flags, double loaded, bellbox_error& error) {
    bellbox_shape shape;
    float* image = nullptr;
    int64_t height = 0, width = 0, channels = 0;
    bellbox_describe(model, &shape, nullptr);
    if (shape.labels == 0) refuse(std::string(flags.folder) + " is a model of text; give --prompt");
    if (const bellbox_status status = bellbox_read_picture(flags.image, &image, &height, &width, &channels, &error); status != BELLBOX_OK) return failed(status, error);
    if (channels != shape.channels)
        refuse(std::string(flags.image) + " has " + std::to_string(channels) + " channels, but the model takes " + std::to_string(shape.channels));
    std::vector<float> logits(static_cast<size_t>(shape.labels));
    const double begun = now();
    int64_t runs = 0;
    do {
        const bellbox_status status = bellbox_classify(model, image, height, width, flags.options.threads, logits.data(), &error);
        if (status != BELLBOX_OK) return bellbox_free_picture(image), failed(status, error);
        ++runs;
    } while (flags.bench && now() - begun < 2.0);
    const double each = (now() - begun) / static_cast<double>(runs);
    bellbox_free_picture(image);
    if (flags.bench) {
        std::printf("{\"kernels\": \"%s\", \"threads\": %d, \"load_seconds\": %.6f, \"images\": %lld, \"images_per_second\": %.2f, \"peak_mb\": %.2f}\n", bellbox_kernels(),
                    flags.options.threads, loaded, static_cast<long long>(runs), 1 / each, peak_memory());
        return 0;
    }
    std::vector<size_t> order(logits.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
    double sum = 0;
    for (const float logit : logits) sum += std::exp(static_cast<double>(logit - logits[order[0]]));
    char text[5 * 100];
    int text_length = 0;
    for (size_t i = 0; i < std::min<size_t>(5, order.size()); ++i)
        text_length += std::snprintf(text + text_length, sizeof(text) - static_cast<size_t>(text_length), "class %zu  %.4f  logit %.6g\n", order[i], std::exp(static_cast<double>(logits[order[i]] - logits[order[0]])) / sum, static_cast<double>(logits[order[i]]));
    write_text(text, static_cast<size_t>(text_length));
    std::fprintf(stderr, "%s kernels, loaded in %.3f s, one image in %.4f s, peak memory %.1f MB\n", bellbox_kernels(), loaded, each, peak_memory());
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    const Flags flags = flags_of(argc, argv);
    bellbox_error error;
    bellbox_model* model = nullptr;
    const double begun = now();
    if (const bellbox_status status = bellbox_open_with(flags.folder, &flags.choices, &model, &error); status != BELLBOX_OK) return failed(status, error);
    const double loaded = now() - begun;
    const int code = flags.image != nullptr ? name_classes(model, flags, loaded, error) : continue_text(model, flags, loaded, error);
    bellbox_close(model);
    return code;
}
