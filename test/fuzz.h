/* fuzz.h - what the fuzzers share. A target reads one kind of input; a corpus of small files that are right is made by
 * the target itself. fuzz.c hands libFuzzer's bytes to the target that FUZZ_TARGET names (make fuzz); test_fuzz.c
 * gives each its corpus, and simple damages of it (make test). */
#ifndef FUZZ_H
#define FUZZ_H

#include "training/stage.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void FuzzSeed(const char *name, const void *bytes, size_t n); /* a corpus's file */
typedef struct {
    const char *name;
    void (*read)(const uint8_t *bytes, size_t n); /* aborts where anything but an answer comes */
    void (*seeds)(FuzzSeed *take);                /* the corpus */
    size_t (*mend)(uint8_t *bytes, size_t n, size_t most, unsigned seed); /* after a mutation; NULL: nothing */
} FuzzTarget;
/* fuzz_files.c, fuzz_sets.c, fuzz_serving.c, fuzz_requests.c; a NULL name ends each */
extern const FuzzTarget fuzz_file_targets[], fuzz_set_targets[], fuzz_serving_targets[], fuzz_request_targets[];
enum { FUZZ_TABLES = 4 };
extern const FuzzTarget *const fuzz_targets[FUZZ_TABLES];
const FuzzTarget *fuzz_target(const char *name); /* NULL: there is none */

/* ---- For targets ---- */

/* Stops unless an answer is OK, or says why not. */
#define MUST(condition)                                                                                                \
    do {                                                                                                               \
        if (!(condition)) fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition), abort();                     \
    } while (0)
extern size_t fuzz_accepted; /* how many answers were OK */
static inline Err answered(Err e) {
    fuzz_accepted += e == OK;
    MUST(e == OK || (err_text()[0] && !strchr(err_text(), '\n')));
    return e;
}
/* The file `name` in a temporary folder that the process has and removes at its end; the folder itself for NULL. Stays
 * valid for a few calls. */
const char *fuzz_path(const char *name);
/* Such a file, with two parts of bytes, the first may be empty. */
const char *fuzz_put(const char *name, const void *first, size_t n_first, const void *bytes, size_t n);
/* The bundled model, as ./serve has it (fuzz_serving.c) */
const struct Offer *fuzz_offer(void);
/* A file that is right, to a corpus. */
void fuzz_take_file(FuzzSeed *take, const char *name, const char *path);

#endif
