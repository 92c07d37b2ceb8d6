/* tokens.c - the token cache: a dataset encoded once by the first stage, kept in a file.
 *
 * Refuses: token files whose length or tokens do not add up. */
#include "data.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "token files are little-endian");

/* The file: this header, then labels int32 (n), then tokens uint16 (n, flips, h*w). Nothing else. */
typedef struct {
    char magic[8];
    uint64_t n, h, w, K, flips, vqgan, source;
} TokensHeader;
static const char tokens_magic[8] = "ibtokens";

/* Sizes in range, and how many tokens they mean. */
static Err tokens_sizes(size_t *count, uint64_t n, uint64_t h, uint64_t w, uint64_t K, uint64_t flips) {
    enum { MAX_GRID = 4096, MAX_K = 65536 };
    if (n < 1 || n > INT32_MAX) return err("%ju pictures, 1..2^31-1 expected", (uintmax_t)n);
    if (h < 1 || w < 1 || h > MAX_GRID || w > MAX_GRID)
        return err("a grid of %ju x %ju tokens, sides of 1..%d expected", (uintmax_t)h, (uintmax_t)w, MAX_GRID);
    if (K < 1 || K > MAX_K) return err("%ju token values, 1..%d expected", (uintmax_t)K, MAX_K);
    if (flips < 1 || flips > 2) return err("%ju flips, 1 or 2 expected", (uintmax_t)flips);
    *count = (size_t)(n * flips * h * w); /* at most 2^31 * 2 * 2^24 */
    return OK;
}

static Err tokens_check(const Tokens *x, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (x->token[i] >= x->K) return err("token %zu is %u, 0..%zu expected", i, (unsigned)x->token[i], x->K - 1);
    for (size_t i = 0; i < x->n; i++)
        if (x->label[i] < 0) return err("label %zu is %d, 0 or more expected", i, (int)x->label[i]);
    return OK;
}

Err tokens_write(const char *path, const Tokens *x) {
    size_t count;
    if (tokens_sizes(&count, x->n, x->h, x->w, x->K, x->flips) != OK || tokens_check(x, count) != OK)
        return err_in(path);
    TokensHeader head = {{0}, x->n, x->h, x->w, x->K, x->flips, x->vqgan, x->source};
    memcpy(head.magic, tokens_magic, sizeof head.magic);
    AtomicFile f;
    TRY(atomic_open(&f, path));
    Err e = atomic_write(&f, &head, sizeof head);
    if (e == OK) e = atomic_write(&f, x->label, x->n * sizeof *x->label);
    if (e == OK) e = atomic_write(&f, x->token, count * sizeof *x->token);
    if (e == OK) return atomic_commit(&f);
    atomic_abandon(&f);
    return e;
}

/* x from an open file of `size` bytes; every size is checked against the length before memory is asked for. */
static Err tokens_read_fd(Tokens *x, int fd, const char *path, uint64_t size) {
    TokensHeader head;
    size_t count;
    if (size < sizeof head)
        return err("%s: has %ju bytes; a token file has at least %zu", path, (uintmax_t)size, sizeof head);
    TRY(read_exactly(fd, path, (uint8_t *)&head, sizeof head));
    if (memcmp(head.magic, tokens_magic, sizeof head.magic) != 0) return err("%s: is not a token file", path);
    if (tokens_sizes(&count, head.n, head.h, head.w, head.K, head.flips) != OK) return err_in(path);
    uint64_t expected = sizeof head + head.n * sizeof *x->label + (uint64_t)count * sizeof *x->token;
    if (size != expected)
        return err("%s: has %ju bytes, its header says %ju", path, (uintmax_t)size, (uintmax_t)expected);
    *x = (Tokens){head.n, head.h, head.w, head.K, head.flips, head.vqgan, head.source, NULL, NULL};
    TRY(mem_alloc(&x->label, x->n, sizeof *x->label, "labels"));
    TRY(mem_alloc(&x->token, count, sizeof *x->token, "tokens"));
    TRY(read_exactly(fd, path, (uint8_t *)x->label, x->n * sizeof *x->label));
    TRY(read_exactly(fd, path, (uint8_t *)x->token, count * sizeof *x->token));
    return tokens_check(x, count) == OK ? OK : err_in(path);
}

Err tokens_read(Tokens *x, const char *path) {
    *x = (Tokens){0};
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return err("%s: %s", path, strerror(errno));
    struct stat st;
    Err e;
    if (fstat(fd, &st) != 0)
        e = err("%s: %s", path, strerror(errno));
    else if (!S_ISREG(st.st_mode))
        e = err("%s: is not a regular file", path);
    else
        e = tokens_read_fd(x, fd, path, (uint64_t)st.st_size);
    close(fd);
    if (e != OK) tokens_free(x);
    return e;
}

void tokens_free(Tokens *x) {
    free(x->label);
    free(x->token);
    *x = (Tokens){0};
}
