/* remap.c - which entries of a codebook are tokens: the official quantize.used. */
#include "files/files.h"

#include <stdio.h>
#include <stdlib.h>

Err remap_make(Remap *r, size_t n, size_t n_codes) {
    *r = (Remap){.n = n, .n_codes = n_codes};
    if (n == 0) return OK;
    TRY(mem_alloc(&r->used, n, sizeof *r->used, "used codes"));
    TRY(mem_alloc(&r->inverse, n_codes, sizeof *r->inverse, "used codes"));
    for (size_t i = 0; i < n_codes; i++) r->inverse[i] = i < n ? (int32_t)i : -1;
    for (size_t i = 0; i < n; i++) r->used[i] = (int32_t)i;
    return OK;
}

/* The first position wins where a code is listed twice, as in the official search. */
Err remap_load(Remap *r, const Checkpoint *ck, const char *prefix) {
    char name[NAME_MAX_BYTES];
    if (r->n == 0) return OK;
    snprintf(name, sizeof name, "%squantize.used", prefix);
    TRY(checkpoint_ints(ck, name, r->n, r->used));
    for (size_t i = 0; i < r->n_codes; i++) r->inverse[i] = -1;
    for (size_t i = r->n; i-- > 0;) {
        if (r->used[i] < 0 || (size_t)r->used[i] >= r->n_codes)
            return err("%s: %s[%zu] is %d, expected 0..%zu", ck->path, name, i, r->used[i], r->n_codes - 1);
        r->inverse[r->used[i]] = (int32_t)i;
    }
    return OK;
}

void remap_free(Remap *r) {
    free(r->used);
    free(r->inverse);
    *r = (Remap){0};
}
