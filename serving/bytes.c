/* bytes.c - bytes that several hold: a picture is forgotten while somebody still reads it. */
#include "serving/serving.h"

#include <stdlib.h>

Err blob_new(Blob **out, uint8_t *bytes, size_t size) {
    Blob *b = malloc(sizeof *b);
    if (b && !bytes) bytes = calloc(1, size + 1);
    if (!b || !bytes) {
        free(b);
        free(bytes);
        return err("no memory for %zu bytes", size);
    }
    *b = (Blob){.bytes = bytes, .size = size, .holders = 1};
    *out = b;
    return OK;
}

Blob *blob_hold(Blob *b) {
    b->holders++;
    return b;
}

void blob_release(Blob *b) {
    if (!b || --b->holders) return;
    free(b->bytes);
    free(b);
}
