// bellbox-run: continue a prompt with a packed folder, with the flags of `bellbox generate`.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <time.h>

#include "bellbox.h"

namespace {

const char kUsage[] =
    "usage: bellbox-run FOLDER --prompt TEXT [--max-new-tokens N] [--temperature T] [--top-k K] [--top-p P] [--seed S]\n"
    "                   [--stop TOKEN] [--threads N] [--bench]\n"
    "Continue a text with a packed Bellbox model; the same seed gives the text of `bellbox generate`.\n";

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

long long whole(const char* flag, const char* text, long long least) {
    char* end = nullptr;
    const long long value = std::strtoll(text, &end, 10);
    if (end == text || *end != '\0' || value < least) refuse(std::string(flag) + " is " + text + "; it must be a whole number of at least " + std::to_string(least));
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

int write_text(const char* text, size_t bytes) {
    return std::fwrite(text, 1, bytes, stdout) == bytes && std::fflush(stdout) == 0 ? 0 : 1;
}

// `user`: the prompt, until it is written, before the first piece: what is refused is refused before.
int write_piece(void* user, const char* text, size_t bytes) {
    const char*& prompt = *static_cast<const char**>(user);
    if (prompt != nullptr && write_text(prompt, std::strlen(prompt)) != 0) return 1;
    prompt = nullptr;
    return write_text(text, bytes);
}

int drop_piece(void*, const char*, size_t) { return 0; }

}  // namespace

int main(int argc, char** argv) {
    const char *folder = nullptr, *prompt = nullptr;
    bellbox_options options{};
    options.temperature = 1.0, options.threads = 1;
    bool bench = false, seeded = false;
    for (int i = 1; i < argc; ++i) {
        const std::string flag = argv[i];
        if (flag == "--help" || flag == "-h") return std::fputs(kUsage, stdout), 0;
        if (flag == "--bench") {
            bench = true;
            continue;
        }
        if (flag.rfind("--", 0) != 0) {
            if (folder != nullptr) refuse("there are two folders, '" + std::string(folder) + "' and '" + flag + "'");
            folder = argv[i];
            continue;
        }
        if (i + 1 == argc) refuse(flag + " has no value");
        const char* const value = argv[++i];
        if (flag == "--prompt") prompt = value;
        else if (flag == "--max-new-tokens") options.max_new_tokens = whole("--max-new-tokens", value, 1);
        else if (flag == "--temperature") options.temperature = number("--temperature", value);
        else if (flag == "--top-k") options.top_k = whole("--top-k", value, 1);
        else if (flag == "--top-p") {
            options.top_p = number("--top-p", value);
            if (!(options.top_p > 0 && options.top_p <= 1)) refuse(std::string("top_p is ") + value + "; it must be above 0 and at most 1");
        } else if (flag == "--seed") options.seed = static_cast<uint64_t>(whole("--seed", value, -9223372036854775807LL - 1)), seeded = true;
        else if (flag == "--stop") options.stop = value;
        else if (flag == "--threads") options.threads = static_cast<int>(whole("--threads", value, 1));
        else refuse(flag + " is unknown; see bellbox-run --help");
    }
    if (folder == nullptr) refuse("give the folder of a packed model; see bellbox-run --help");
    if (prompt == nullptr && bench) prompt = "Once upon a time";
    if (prompt == nullptr) refuse("give --prompt, the text to continue");
    if (!seeded) {
        timespec time;
        clock_gettime(CLOCK_REALTIME, &time);
        options.seed = static_cast<uint64_t>(time.tv_nsec) * 0x9e3779b97f4a7c15u ^ static_cast<uint64_t>(time.tv_sec);
    }
    bellbox_error error;
    bellbox_model* model = nullptr;
    const double begun = now();
    if (const bellbox_status status = bellbox_open(folder, &model, &error); status != BELLBOX_OK) {
        std::fprintf(stderr, "bellbox-run: error: %s\n", error.text);
        return status;
    }
    const double loaded = now() - begun;
    bellbox_times times{};
    const char* unwritten = prompt;
    const bellbox_status status = bellbox_generate(model, prompt, &options, bench ? drop_piece : write_piece, &unwritten, &times, &error);
    bellbox_close(model);
    if (status != BELLBOX_OK) {
        if (!bench && unwritten == nullptr) std::fputs("\n", stdout);
        std::fprintf(stderr, "bellbox-run: error: %s\n", error.text);
        return status;
    }
    if (!bench) write_piece(&unwritten, "\n", 1);
    const auto rate = [](double count, double time) { return time > 0 ? count / time : 0.0; };
    std::fprintf(stderr, "%s kernels, loaded in %.3f s, prefill %lld tokens at %.0f tokens/s, decode %lld tokens at %.0f tokens/s, peak memory %.1f MB\n", bellbox_kernels(),
                 loaded, static_cast<long long>(times.prompt_tokens), rate(static_cast<double>(times.prompt_tokens), times.prefill_seconds), static_cast<long long>(times.new_tokens),
                 rate(static_cast<double>(times.new_tokens - 1), times.decode_seconds), peak_memory());
    return 0;
}
