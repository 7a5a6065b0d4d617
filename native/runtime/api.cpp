// The C interface: nothing is thrown across it.
#include <cstdio>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "bellbox.h"
#include "runtime/continuation.h"
#include "runtime/model/opened.h"
#include "runtime/ppm.h"
#include "runtime/text/tokenizer.h"

using namespace bellbox;

struct bellbox_model {
    Opened model;
    std::optional<Tokenizer> tokenizer;

    bellbox_model(const std::string& folder, const bellbox_choices& choices) : model(folder, choices) {
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

struct bellbox_text {
    Continuation text;
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

}  // namespace

extern "C" {

bellbox_status bellbox_open(const char* folder, bellbox_model** model, bellbox_error* error) {
    const bellbox_choices none{};
    return bellbox_open_with(folder, &none, model, error);
}

bellbox_status bellbox_open_with(const char* folder, const bellbox_choices* choices, bellbox_model** model, bellbox_error* error) {
    *model = nullptr;
    return guarded(error, [&] { *model = new bellbox_model(folder, *choices); });
}

bellbox_status bellbox_widths(const bellbox_model* model, int* widths, size_t room, size_t* count, int* used, bellbox_error* error) {
    return guarded(error, [&] {
        const std::vector<int>& choices = model->model.choices;
        std::copy_n(choices.begin(), std::min(room, choices.size()), widths);
        *count = choices.size(), *used = model->model.bits;
    });
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
    return bellbox_begin_coded(model, tokens, 32, threads, session, error);
}

bellbox_status bellbox_begin_coded(const bellbox_model* model, int64_t tokens, int cache_bits, int threads, bellbox_session** session, bellbox_error* error) {
    *session = nullptr;
    return guarded(error, [&] {
        if (tokens < 1) throw Error("a cache of " + std::to_string(tokens) + " tokens; give at least 1");
        const Language& text = model->model.text();
        *session = new bellbox_session{text, text.new_cache(tokens, cache_type(cache_bits)), std::max(1, threads)};
    });
}

void bellbox_end(bellbox_session* session) { delete session; }

bellbox_status bellbox_forward(bellbox_session* session, const uint32_t* tokens, size_t count, float* logits, bellbox_error* error) {
    return guarded(error, [&] { session->model.forward(tokens, static_cast<int64_t>(count), session->cache, logits, session->threads); });
}

bellbox_status bellbox_start(const bellbox_model* model, const char* prompt, const bellbox_options* options, bellbox_text** text, bellbox_error* error) {
    *text = nullptr;
    return guarded(error, [&] { *text = new bellbox_text{Continuation(model->model.text(), model->words(), prompt, *options)}; });
}

bellbox_status bellbox_next(bellbox_text* text, bellbox_piece piece, void* user, int* more, bellbox_error* error) {
    *more = 0;
    return guarded(error, [&] { *more = text->text.next(piece, user) ? 1 : 0; });
}

void bellbox_timing(const bellbox_text* text, bellbox_times* times) { *times = text->text.times(); }
void bellbox_finish(bellbox_text* text) { delete text; }
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
    return guarded(error, [&] {
        const Language& language = model->model.text();  // what a model of images is told, before its missing tokenizer
        Continuation text(language, model->words(), prompt, *options);
        while (text.next(piece, user)) {}
        if (times != nullptr) *times = text.times();
    });
}

}  // extern "C"
