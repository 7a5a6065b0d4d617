// The C interface: nothing is thrown across it.
#include <chrono>
#include <cstdio>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "bellbox.h"
#include "runtime/model/opened.h"
#include "runtime/ppm.h"
#include "runtime/sampling.h"
#include "runtime/text/stream.h"
#include "runtime/text/tokenizer.h"

using namespace bellbox;

struct bellbox_model {
    Opened model;
    std::optional<Tokenizer> tokenizer;

    explicit bellbox_model(const std::string& folder) : model(folder) {
        const std::string path = folder + "/tokenizer.json";
        if (is_file(path)) tokenizer.emplace(Mapped(path).bytes());
    }
    const Tokenizer& words() const {
        if (!tokenizer) throw Error("the folder has no tokenizer.json; it takes tokens, no text");
        return *tokenizer;
    }
};

struct bellbox_session {
    const Language& model;
    Cache cache;
    int threads;
};

namespace {

void say(bellbox_error* error, const char* text) {
    if (error != nullptr) std::snprintf(error->text, sizeof(error->text), "%s", text);
}

template <typename F>
bellbox_status guarded(bellbox_error* error, const F& run) {
    try {
        run();
        say(error, "");
        return BELLBOX_OK;
    } catch (const Error& refused) {
        say(error, refused.what());
        return BELLBOX_REFUSED;
    } catch (const std::bad_alloc&) {
        say(error, "there is not enough memory");
    } catch (const std::exception& failed) {
        say(error, failed.what());
    }
    return BELLBOX_FAILED;
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

uint32_t stop_of(const Tokenizer& words, const char* stop) {
    if (stop == nullptr) {
        if (!words.end_of_text()) throw Error("no token of the tokenizer closes a document; name one with stop");
        return *words.end_of_text();
    }
    if (const auto token = words.token_of(stop)) return *token;
    const std::vector<uint32_t> ids = words.encode(stop);
    if (ids.size() != 1) throw Error("stop " + shown(stop) + " is " + std::to_string(ids.size()) + " tokens of this tokenizer; it must be exactly one");
    return ids[0];
}

void generate(const bellbox_model& opened, const char* prompt, const bellbox_options& options, bellbox_piece piece, void* user, bellbox_times& times) {
    const Language& model = opened.model.text();
    const Tokenizer& words = opened.words();
    const std::vector<uint32_t> ids = words.encode(prompt);
    const int64_t count = static_cast<int64_t>(ids.size()), longest = model.shape().positions;
    if (count == 0) throw Error("the prompt is empty; give at least one token");
    if (options.max_new_tokens < 0) throw Error("max_new_tokens is " + std::to_string(options.max_new_tokens) + "; it must be at least 1");
    if (options.max_new_tokens == 0 && count >= longest)
        throw Error("the prompt has " + std::to_string(count) + " tokens and the model takes " + std::to_string(longest) + ", new ones included; shorten it");
    const int64_t most = options.max_new_tokens > 0 ? options.max_new_tokens : std::min<int64_t>(200, longest - count);
    if (most > longest - count)
        throw Error("a prompt of " + std::to_string(count) + " and " + std::to_string(most) + " new tokens exceed the model's context of " + std::to_string(longest));
    Sampling how;
    how.temperature = options.temperature;
    if (options.top_k != 0) how.top_k = options.top_k;
    if (options.top_p != 0) how.top_p = options.top_p;
    Sampler sampler(how, options.seed);
    const uint32_t stop = stop_of(words, options.stop);
    const int threads = std::max(1, options.threads);

    Cache cache = model.new_cache(count + most);
    const int64_t vocabulary = model.shape().vocabulary;
    std::vector<float> logits(static_cast<size_t>(vocabulary));
    TextStream stream(words, ids);
    times = {count, 0, 0, 0};
    const auto give = [&](const std::string& text) { return text.empty() || piece == nullptr || piece(user, text.c_str(), text.size()) == 0; };
    const uint32_t* next = ids.data();
    uint32_t token = 0;
    for (int64_t made = 0; made < most; ++made) {
        const double begun = seconds();
        model.forward(next, made == 0 ? count : 1, cache, logits.data(), threads);
        require_finite(logits.data(), vocabulary, made + 1);
        token = sampler.draw(logits.data(), vocabulary), next = &token;
        (made == 0 ? times.prefill_seconds : times.decode_seconds) += seconds() - begun;
        if (token == stop) break;
        ++times.new_tokens;
        if (!give(stream.push(token))) return;
    }
    give(stream.flush());
}

}  // namespace

extern "C" {

bellbox_status bellbox_open(const char* folder, bellbox_model** model, bellbox_error* error) {
    *model = nullptr;
    return guarded(error, [&] { *model = new bellbox_model(folder); });
}

void bellbox_close(bellbox_model* model) { delete model; }

bellbox_status bellbox_describe(const bellbox_model* model, bellbox_shape* shape, bellbox_error* error) {
    return guarded(error, [&] {
        *shape = {};
        if (model->model.language) {
            const LanguageShape& is = model->model.language->shape();
            shape->vocabulary = is.vocabulary, shape->positions = is.positions, shape->hidden = is.hidden, shape->blocks = is.blocks;
        } else {
            const VisionShape& is = model->model.vision->shape();
            shape->labels = is.labels, shape->channels = is.channels, shape->image = is.image;
        }
    });
}

const char* bellbox_kernels(void) {
    try {
        return kernels().name;
    } catch (const std::exception&) {
        return "none";
    }
}

bellbox_status bellbox_encode(const bellbox_model* model, const char* text, uint32_t* tokens, size_t room, size_t* count, bellbox_error* error) {
    return guarded(error, [&] {
        const std::vector<uint32_t> ids = model->words().encode(text);
        std::copy_n(ids.begin(), std::min(room, ids.size()), tokens);
        *count = ids.size();
    });
}

bellbox_status bellbox_begin(const bellbox_model* model, int64_t tokens, int threads, bellbox_session** session, bellbox_error* error) {
    *session = nullptr;
    return guarded(error, [&] {
        if (tokens < 1) throw Error("a cache of " + std::to_string(tokens) + " tokens; give at least 1");
        const Language& text = model->model.text();
        *session = new bellbox_session{text, text.new_cache(tokens), std::max(1, threads)};
    });
}

void bellbox_end(bellbox_session* session) { delete session; }

bellbox_status bellbox_forward(bellbox_session* session, const uint32_t* tokens, size_t count, float* logits, bellbox_error* error) {
    return guarded(error, [&] { session->model.forward(tokens, static_cast<int64_t>(count), session->cache, logits, session->threads); });
}

bellbox_status bellbox_classify(const bellbox_model* model, const float* image, int64_t height, int64_t width, int threads, float* logits,
                                bellbox_error* error) {
    return guarded(error, [&] { model->model.images().forward(image, height, width, logits, std::max(1, threads)); });
}

bellbox_status bellbox_read_picture(const char* path, float** image, int64_t* height, int64_t* width, int64_t* channels, bellbox_error* error) {
    *image = nullptr;
    return guarded(error, [&] {
        const Picture picture = PictureReader(Mapped(path).bytes(), path).read();
        std::unique_ptr<float[]> values(new float[picture.values.size()]);
        std::copy(picture.values.begin(), picture.values.end(), values.get());
        *image = values.release(), *height = picture.height, *width = picture.width, *channels = picture.channels;
    });
}

void bellbox_free_picture(float* image) { delete[] image; }

bellbox_status bellbox_generate(const bellbox_model* model, const char* prompt, const bellbox_options* options, bellbox_piece piece, void* user,
                                bellbox_times* times, bellbox_error* error) {
    bellbox_times own{};
    return guarded(error, [&] { generate(*model, prompt, *options, piece, user, times != nullptr ? *times : own); });
}

}  // extern "C"
