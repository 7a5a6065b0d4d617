/* Continues a text with a packed folder, by libbellbox alone:
 *
 *     cc -Inative/include examples/device/continue.c build/runtime/libbellbox.so -Wl,-rpath,build/runtime -o continue
 *     ./continue demo/packed "Once upon a time"
 */
#include <stdio.h>

#include "bellbox.h"

static int write_piece(void* user, const char* text, size_t bytes) {
    (void)user;
    return fwrite(text, 1, bytes, stdout) == bytes ? 0 : 1;
}

int main(int count, char** arguments) {
    if (count != 3) {
        fprintf(stderr, "usage: %s FOLDER PROMPT\n", arguments[0]);
        return 2;
    }
    bellbox_error error;
    bellbox_model* model;
    bellbox_status status = bellbox_open(arguments[1], &model, &error);
    if (status == BELLBOX_OK) {
        bellbox_options options = {0}; /* temperature 0: the likeliest token every time */
        options.max_new_tokens = 50;
        status = bellbox_generate(model, arguments[2], &options, write_piece, NULL, NULL, &error);
        putchar('\n');
        bellbox_close(model);
    }
    if (status != BELLBOX_OK) fprintf(stderr, "%s\n", error.text);
    return (int)status;
}
