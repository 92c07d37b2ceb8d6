/* fuzz.h - what the fuzzers share: a file in memory is opened as a checkpoint, and every number in it is read. */
#ifndef FUZZ_H
#define FUZZ_H

#include "files/files.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

/* One file of two parts, the first may be empty. */
static inline int fuzz_open(const void *first, size_t n_first, const uint8_t *data, size_t n) {
    char path[64];
    Checkpoint ck;
    int fd = memfd_create("fuzz", 0);
    if (fd < 0 || write(fd, first, n_first) != (ssize_t)n_first || write(fd, data, n) != (ssize_t)n) abort();
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (checkpoint_open(&ck, path) == OK) {
        for (size_t i = 0; i < ck.n; i++) {
            const Tensor *x = &ck.tensor[i];
            real *out = (real *)malloc((x->size + 1) * sizeof *out);
            if (!out) abort();
            const Err e = checkpoint_reals(&ck, x->name, x->ndim, x->dim, x->size, out);
            if ((e == OK) != (x->dtype < DT_NUMBERS)) abort();
            free(out);
        }
        checkpoint_close(&ck);
    } else if (!err_text()[0])
        abort(); /* a refusal says why */
    close(fd);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

#endif
