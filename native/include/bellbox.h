/* libbellbox: packed Bellbox models without Python.
 *
 * Every function that can fail returns a bellbox_status and writes one line into `error`, which may be NULL. Nothing is
 * global: several models, and several threads with a session of their own each, run at once. Strings are UTF-8. */
#ifndef BELLBOX_H
#define BELLBOX_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define BELLBOX_API __attribute__((visibility("default")))
#else
#define BELLBOX_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    BELLBOX_OK = 0,
    BELLBOX_REFUSED = 2, /* a folder, a prompt or a number that cannot be used; `error` says which, and the way out */
    BELLBOX_FAILED = 3   /* no memory, or a fault of the program */
} bellbox_status;

typedef struct {
    char text[512];
} bellbox_error;

typedef struct bellbox_model bellbox_model;
typedef struct bellbox_session bellbox_session;

typedef struct {
    int64_t vocabulary, positions, hidden, blocks; /* of a model of text, else 0 */
    int64_t labels, channels, image;               /* of one of images; image: its height and width, 0 for any */
} bellbox_shape;

/* A packed folder, checked and laid out for this processor. `*model` is to be closed with bellbox_close. */
BELLBOX_API bellbox_status bellbox_open(const char* folder, bellbox_model** model, bellbox_error* error);
/* The same with choices. Members that are 0 leave things as they are stored. */
typedef struct {
    int bits;           /* of a folder of several widths (docs/nested.md): the one to use, its widest where 0. Files of wider
                           ones are not opened and may be missing. A folder of one width takes 0 alone. */
    int embedding_bits; /* of embeddings and head of a model of text, if they are fp32: 16 (bf16), 8 or 4; this rounds */
} bellbox_choices;
BELLBOX_API bellbox_status bellbox_open_with(const char* folder, const bellbox_choices* choices, bellbox_model** model,
                                 bellbox_error* error);
BELLBOX_API void bellbox_close(bellbox_model* model);
/* Bits of the widths that its folder has, the widest first: at most `room` are written, `*count` is how many there are, 0
 * for a folder of one width. `*used` is the one that was opened, or 0. */
BELLBOX_API bellbox_status bellbox_widths(const bellbox_model* model, int* widths, size_t room, size_t* count, int* used,
                              bellbox_error* error);
BELLBOX_API bellbox_status bellbox_describe(const bellbox_model* model, bellbox_shape* shape, bellbox_error* error);
/* The instruction set whose kernels run: "avx512", "avx2", "portable" and so on. */
BELLBOX_API const char* bellbox_kernels(void);

/* Tokens of a text: at most `room` are written, `*count` is how many there are. */
BELLBOX_API bellbox_status bellbox_encode(const bellbox_model* model, const char* text, uint32_t* tokens, size_t room, size_t* count,
                              bellbox_error* error);

/* A sequence and its cache of at most `tokens` tokens. */
BELLBOX_API bellbox_status bellbox_begin(const bellbox_model* model, int64_t tokens, int threads, bellbox_session** session,
                             bellbox_error* error);
/* Likewise; keys and values are kept in fp32 (32), or coded in 8 or 4 bits: less memory, and rounded. */
BELLBOX_API bellbox_status bellbox_begin_coded(const bellbox_model* model, int64_t tokens, int cache_bits, int threads,
                                   bellbox_session** session, bellbox_error* error);
BELLBOX_API void bellbox_end(bellbox_session* session);
/* Logits [vocabulary] for the token after these, which go into the cache. */
BELLBOX_API bellbox_status bellbox_forward(bellbox_session* session, const uint32_t* tokens, size_t count, float* logits,
                               bellbox_error* error);

typedef struct {
    int64_t max_new_tokens; /* 0: 200, or what the context leaves */
    double temperature;     /* 0 takes the likeliest token */
    int64_t top_k;          /* 0: all */
    double top_p;           /* 0: all */
    uint64_t seed;          /* the same seed gives the same text */
    const char* stop;       /* a token, written as text; NULL: the tokenizer's end of text */
    int threads;            /* 0: 1 */
    int cache_bits;         /* what keys and values are kept in: 32 or 0 (fp32), 8 or 4 */
} bellbox_options;

typedef struct {
    int64_t prompt_tokens, new_tokens;
    double prefill_seconds, decode_seconds;
} bellbox_times;

/* Called with each piece of text as it is made; another value than 0 ends the text. */
typedef int (*bellbox_piece)(void* user, const char* text, size_t bytes);

BELLBOX_API bellbox_status bellbox_generate(const bellbox_model* model, const char* prompt, const bellbox_options* options,
                                bellbox_piece piece, void* user, bellbox_times* times, bellbox_error* error);

/* The same text one token a call, for programs that have other things to do: `*more` is 0 after the last one. A text is to
 * be closed with bellbox_finish, before its model. */
typedef struct bellbox_text bellbox_text;
BELLBOX_API bellbox_status bellbox_start(const bellbox_model* model, const char* prompt, const bellbox_options* options,
                                bellbox_text** text, bellbox_error* error);
BELLBOX_API bellbox_status bellbox_next(bellbox_text* text, bellbox_piece piece, void* user, int* more, bellbox_error* error);
BELLBOX_API void bellbox_timing(const bellbox_text* text, bellbox_times* times);
BELLBOX_API void bellbox_finish(bellbox_text* text);
/* Logits [labels] of an image [height, width, channels] of numbers from 0 to 1. */
BELLBOX_API bellbox_status bellbox_classify(const bellbox_model* model, const float* image, int64_t height, int64_t width, int threads,
                                float* logits, bellbox_error* error);
/* A picture in PPM or PGM (P6, P5, up to 8 bits) as such an image, to be given back to bellbox_free_picture. */
BELLBOX_API bellbox_status bellbox_read_picture(const char* path, float** image, int64_t* height, int64_t* width, int64_t* channels,
                                    bellbox_error* error);
BELLBOX_API void bellbox_free_picture(float* image);

#ifdef __cplusplus
}
#endif
#endif
