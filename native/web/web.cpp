// libbellbox as a browser's worker calls it: numbers and addresses only, one model and one text at a time.
#include <emscripten.h>

#include <cstdint>
#include <string>

#include "bellbox.h"

namespace {

bellbox_model* model = nullptr;
bellbox_text* text = nullptr;
bellbox_error error;
std::string made;  // what the last token completed

int add_piece(void*, const char* piece, size_t bytes) {
    made.append(piece, bytes);
    return 0;
}

void finish() {
    bellbox_finish(text);
    text = nullptr;
}

}  // namespace

extern "C" {

EMSCRIPTEN_KEEPALIVE const char* web_error() { return error.text; }
EMSCRIPTEN_KEEPALIVE const char* web_kernels() { return bellbox_kernels(); }

// In place of the model that was open, which stays where this one is refused; a bellbox_status.
EMSCRIPTEN_KEEPALIVE int web_open(const char* folder) {
    bellbox_model* opened = nullptr;
    const bellbox_status status = bellbox_open(folder, &opened, &error);
    if (status != BELLBOX_OK) return status;
    finish();
    bellbox_close(model);
    model = opened;
    return status;
}

// In place of the text that was begun. The seed comes in two halves: a number of JavaScript has 53 bits.
EMSCRIPTEN_KEEPALIVE int web_start(const char* prompt, double tokens, double temperature, double top_k, double top_p, uint32_t seed_high, uint32_t seed_low) {
    finish();
    bellbox_options options{};
    options.max_new_tokens = static_cast<int64_t>(tokens), options.temperature = temperature;
    options.top_k = static_cast<int64_t>(top_k), options.top_p = top_p;
    options.seed = uint64_t{seed_high} << 32 | seed_low;
    return bellbox_start(model, prompt, &options, &text, &error);
}

// 1: there is more to come, 0: that was the end, -1: see web_error. The text is `web_piece` and `web_bytes`.
EMSCRIPTEN_KEEPALIVE int web_next() {
    int more = 0;
    made.clear();
    return bellbox_next(text, add_piece, nullptr, &more, &error) != BELLBOX_OK ? -1 : more;
}
EMSCRIPTEN_KEEPALIVE const char* web_piece() { return made.data(); }
EMSCRIPTEN_KEEPALIVE size_t web_bytes() { return made.size(); }

// Of the text so far: 0 tokens of the prompt, 1 new tokens, 2 and 3 the seconds that they took.
EMSCRIPTEN_KEEPALIVE double web_timing(int which) {
    bellbox_times times;
    bellbox_timing(text, &times);
    const double all[] = {static_cast<double>(times.prompt_tokens), static_cast<double>(times.new_tokens), times.prefill_seconds, times.decode_seconds};
    return all[which & 3];
}

}  // extern "C"
