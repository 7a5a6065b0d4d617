// Opens one folder after another and uses what opens: names come in line by line, and out go status and message.
// benchmarks/reliability/hostile_folders.py feeds it.
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "bellbox.h"

namespace {

bellbox_status use(const bellbox_model* model, bellbox_error* error) {
    bellbox_shape shape;
    if (const bellbox_status status = bellbox_describe(model, &shape, error); status != BELLBOX_OK) return status;
    if (shape.labels > 0) {
        const int64_t side = shape.image > 0 ? shape.image : 9;
        if (side > 256) return BELLBOX_OK;
        std::vector<float> image(static_cast<size_t>(side * side * shape.channels), 0.5f), logits(static_cast<size_t>(shape.labels));
        return bellbox_classify(model, image.data(), side, side, 1, logits.data(), error);
    }
    bellbox_session* session = nullptr;
    std::vector<float> logits(static_cast<size_t>(shape.vocabulary));
    bellbox_status status = bellbox_begin(model, 4, 1, &session, error);
    const uint32_t tokens[] = {0, 1, 2};
    if (status == BELLBOX_OK) status = bellbox_forward(session, tokens, 3, logits.data(), error);
    if (status == BELLBOX_OK) status = bellbox_forward(session, tokens, 1, logits.data(), error);
    bellbox_end(session);
    if (status != BELLBOX_OK) return status;
    bellbox_options options{};
    options.max_new_tokens = 2;
    bellbox_error unsaid;
    const bellbox_status generated = bellbox_generate(model, "a dark 1", &options, nullptr, nullptr, nullptr, &unsaid);
    return generated == BELLBOX_FAILED ? generated : BELLBOX_OK;  // it may have no tokenizer, or no token that ends a text
}

// The narrower widths of a folder that opened at its widest; a layer may have none so narrow, so each may be refused.
void use_narrower(const char* folder, const bellbox_model* widest) {
    int widths[7], used = 0;
    size_t count = 0;
    bellbox_error unsaid;
    if (bellbox_widths(widest, widths, 7, &count, &used, &unsaid) != BELLBOX_OK || count > 7) std::abort();
    for (size_t i = 1; i < count; ++i) {
        const bellbox_choices choices{widths[i], 0};
        bellbox_model* model = nullptr;
        if (bellbox_open_with(folder, &choices, &model, &unsaid) == BELLBOX_OK) use(model, &unsaid);
        bellbox_close(model);
    }
}

}  // namespace

int main() {
    std::string folder;
    while (std::getline(std::cin, folder)) {
        bellbox_error error{};
        bellbox_model* model = nullptr;
        bellbox_status status = bellbox_open(folder.c_str(), &model, &error);
        const bool opened = status == BELLBOX_OK;
        if (opened) status = use(model, &error), use_narrower(folder.c_str(), model);
        bellbox_close(model);
        std::printf("%s %d %s\n", opened ? "opened" : "refused", static_cast<int>(status), error.text);
        std::fflush(stdout);
    }
    return 0;
}
