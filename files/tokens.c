/* tokens.c - the token cache: a dataset encoded once by the first stage, kept in a file.
 *
 * Owns two formats. A token file is complete and replaced atomically. While a dataset is being encoded its records go
 * to PATH.part one after the other, each under a checksum, so that a kill at any instant loses the last batch at most:
 * the next run finds how far the last one came and goes on there, provided that the first stage and the dataset are the
 * same. One process at a time encodes into a file; others wait for it and then use what it made.
 *
 * Refuses: token files whose length or tokens do not add up.
 *
 * Read in this order: tokens_write, tokens_read, tokens_start, tokens_append, tokens_finish. */
#include "files/files.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "token files are little-endian");

/* A token file is this header, then labels int32 (n), then tokens uint16 (n, crops, flips, h*w), and nothing else. The
 * header of one crop a picture ends before `crops`: the first version of the format, which knew no others. Several have
 * the second version. */
typedef struct {
    char magic[8];
    uint64_t n, h, w, K, flips, vqgan, source, crops;
} TokensHeader;
enum { FIRST_HEADER = offsetof(TokensHeader, crops) };
static const char tokens_magic[2][9] = {"ibtokens", "ibtokns2"};

static size_t header_bytes(uint64_t crops) {
    return crops > 1 ? sizeof(TokensHeader) : FIRST_HEADER;
}

static TokensHeader header_of(const Tokens *x, const char magic[2][9]) {
    TokensHeader head = {{0}, x->n, x->h, x->w, x->K, x->flips, x->vqgan, x->source, x->crops};
    memcpy(head.magic, magic[x->crops > 1], sizeof head.magic);
    return head;
}

/* Checks that sizes are in range; *count = the number of tokens that they mean. */
static Err tokens_sizes(size_t *count, uint64_t n, uint64_t h, uint64_t w, uint64_t K, uint64_t flips, uint64_t crops) {
    enum { MAX_GRID = 4096, MAX_K = 65536 };
    if (n < 1 || n > INT32_MAX) return err("%ju pictures, 1..2^31-1 expected", (uintmax_t)n);
    if (h < 1 || w < 1 || h > MAX_GRID || w > MAX_GRID)
        return err("a grid of %ju x %ju tokens, sides of 1..%d expected", (uintmax_t)h, (uintmax_t)w, MAX_GRID);
    if (K < 1 || K > MAX_K) return err("%ju token values, 1..%d expected", (uintmax_t)K, MAX_K);
    if (flips < 1 || flips > 2) return err("%ju flips, 1 or 2 expected", (uintmax_t)flips);
    if (crops < 1 || crops > CROPS_MAX) return err("%ju crops, 1..%d expected", (uintmax_t)crops, CROPS_MAX);
    *count = (size_t)(n * crops * flips * h * w); /* at most 2^31 * 2^6 * 2 * 2^24 */
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
    if (tokens_sizes(&count, x->n, x->h, x->w, x->K, x->flips, x->crops) != OK || tokens_check(x, count) != OK)
        return err_in(path);
    const TokensHeader head = header_of(x, tokens_magic);
    AtomicFile f;
    TRY(atomic_open(&f, path));
    Err e = atomic_write(&f, &head, header_bytes(x->crops));
    if (e == OK) e = atomic_write(&f, x->label, x->n * sizeof *x->label);
    if (e == OK) e = atomic_write(&f, x->token, count * sizeof *x->token);
    return atomic_close(&f, e);
}

/* The header of either version */
static Err read_header(TokensHeader *head, int fd, const char *path, uint64_t size) {
    if (size < FIRST_HEADER)
        return err("%s: has %ju bytes; a token file has at least %d", path, (uintmax_t)size, FIRST_HEADER);
    TRY(read_exactly(fd, path, (uint8_t *)head, FIRST_HEADER));
    head->crops = 1;
    if (!memcmp(head->magic, tokens_magic[0], sizeof head->magic)) return OK;
    if (memcmp(head->magic, tokens_magic[1], sizeof head->magic)) return err("%s: is not a token file", path);
    if (size < sizeof *head)
        return err("%s: has %ju bytes; a token file of several crops has at least %zu", path, (uintmax_t)size,
                   sizeof *head);
    TRY(read_exactly(fd, path, (uint8_t *)&head->crops, sizeof head->crops));
    return head->crops > 1 ? OK : err("%s: %ju crops, 2..%d expected", path, (uintmax_t)head->crops, CROPS_MAX);
}

/* x from an open file of `size` bytes; every size is checked against the length before memory is asked for. */
static Err tokens_read_fd(Tokens *x, int fd, const char *path, uint64_t size) {
    TokensHeader head;
    size_t count;
    TRY(read_header(&head, fd, path, size));
    if (tokens_sizes(&count, head.n, head.h, head.w, head.K, head.flips, head.crops) != OK) return err_in(path);
    uint64_t expected = header_bytes(head.crops) + head.n * sizeof *x->label + (uint64_t)count * sizeof *x->token;
    if (size != expected)
        return err("%s: has %ju bytes, its header says %ju", path, (uintmax_t)size, (uintmax_t)expected);
    *x = (Tokens){head.n, head.h, head.w, head.K, head.flips, head.crops, head.vqgan, head.source, NULL, NULL};
    TRY(mem_alloc(&x->label, x->n, sizeof *x->label, "labels"));
    TRY(mem_alloc(&x->token, count, sizeof *x->token, "tokens"));
    TRY(read_exactly(fd, path, (uint8_t *)x->label, x->n * sizeof *x->label));
    TRY(read_exactly(fd, path, (uint8_t *)x->token, count * sizeof *x->token));
    return tokens_check(x, count) == OK ? OK : err_in(path);
}

Err tokens_read(Tokens *x, const char *path) {
    int fd;
    size_t size;
    *x = (Tokens){0};
    TRY(file_open(&fd, &size, path));
    Err e = tokens_read_fd(x, fd, path, size);
    close(fd);
    if (e != OK) tokens_free(x);
    return e;
}

void tokens_free(Tokens *x) {
    free(x->label);
    free(x->token);
    *x = (Tokens){0};
}

/* ------------------------------------------------------------------------------------------------------------
 * Encoding that survives a kill
 * ---------------------------------------------------------------------------------------------------------- */

/* PATH.part: the header with another magic, then records: checksum uint64 of what follows and of the record's number,
 * label int32 (-1: a damaged picture), tokens uint16 (crops, flips, h*w). */
static const char part_magic[2][9] = {"ibtokprt", "ibtokpr2"};
enum { RECORD_LABEL = sizeof(uint64_t), RECORD_TOKENS = RECORD_LABEL + sizeof(int32_t) };

static uint64_t record_checksum(const uint8_t *record, size_t bytes, uint64_t number) {
    return fnv1a(FNV_START ^ number, record + RECORD_LABEL, bytes - RECORD_LABEL);
}

/* Opens the part file and waits until no other process has it. If that process finished it meanwhile, it is gone:
 * another try makes a new one. Where files cannot be locked, nobody is waited for. */
static Err part_open(TokensPart *p) {
    for (;;) {
        struct stat ours, theirs;
        p->fd = open(p->part, O_RDWR | O_CREAT | O_CLOEXEC | O_NONBLOCK, 0666);
        if (p->fd < 0) return io_error(p->part, "open");
        if (fstat(p->fd, &ours) != 0) return io_error(p->part, "open");
        if (!S_ISREG(ours.st_mode)) return err("%s: is not a regular file", p->part);
        while (flock(p->fd, LOCK_EX) != 0 && errno == EINTR) continue;
        if (stat(p->part, &theirs) == 0 && ours.st_ino == theirs.st_ino && ours.st_dev == theirs.st_dev) return OK;
        close(p->fd);
    }
}

/* Reads on, to the end at most; *got: how far. */
static Err part_read(TokensPart *p, void *bytes, size_t size, size_t *got) {
    for (*got = 0; *got < size;) {
        const ssize_t n = read(p->fd, (uint8_t *)bytes + *got, size - *got);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return io_error(p->part, "read");
        if (n == 0) return OK;
        *got += (size_t)n;
    }
    return OK;
}

/* Reads the next record into p->record. *whole = 0: no whole one is left. */
static Err part_next(TokensPart *p, uint64_t number, int *whole) {
    uint64_t checksum;
    size_t got;
    TRY(part_read(p, p->record, p->bytes, &got));
    memcpy(&checksum, p->record, sizeof checksum);
    *whole = got == p->bytes && checksum == record_checksum(p->record, p->bytes, number);
    return OK;
}

/* Where the next record goes */
static uint64_t record_at(const TokensPart *p) {
    return header_bytes(p->sizes.crops) + (uint64_t)p->done * p->bytes;
}

/* Counts the whole batches that an earlier run left, and cuts the file behind them. */
static Err part_continue(TokensPart *p, const TokensHeader *head, size_t batch) {
    TokensHeader theirs;
    const size_t bytes = header_bytes(p->sizes.crops);
    size_t got;
    TRY(part_read(p, &theirs, bytes, &got));
    int whole = got == bytes && memcmp(&theirs, head, bytes) == 0;
    for (p->done = 0; whole && p->done < p->sizes.n; p->done += (size_t)whole) TRY(part_next(p, p->done, &whole));
    if (p->done < p->sizes.n) p->done = p->done / batch * batch;
    if (ftruncate(p->fd, p->done ? (off_t)record_at(p) : 0) != 0) return io_error(p->part, "cut");
    return p->done ? OK : file_write_at(p->fd, p->part, head, bytes, 0);
}

Err tokens_start(TokensPart *p, const char *path, const Tokens *sizes, size_t batch) {
    size_t count;
    *p = (TokensPart){.fd = -1, .sizes = *sizes};
    if (tokens_sizes(&count, sizes->n, sizes->h, sizes->w, sizes->K, sizes->flips, sizes->crops) != OK)
        return err_in(path);
    const TokensHeader head = header_of(sizes, part_magic);
    TRY(path_make(p->path, "%s", path));
    TRY(path_make(p->part, "%s.part", path));
    p->bytes = RECORD_TOKENS + count / sizes->n * sizeof *sizes->token;
    Err e = mem_alloc(&p->record, p->bytes, 1, "a picture's tokens");
    if (e == OK) e = part_open(p);
    if (e == OK) e = part_continue(p, &head, batch);
    if (e != OK) tokens_stop(p);
    return e;
}

Err tokens_append(TokensPart *p, int32_t label, const int32_t *token) {
    size_t n = (p->bytes - RECORD_TOKENS) / sizeof(uint16_t);
    memcpy(p->record + RECORD_LABEL, &label, sizeof label);
    for (size_t i = 0; i < n; i++) {
        uint16_t narrow = (uint16_t)token[i];
        memcpy(p->record + RECORD_TOKENS + i * sizeof narrow, &narrow, sizeof narrow);
    }
    uint64_t checksum = record_checksum(p->record, p->bytes, p->done);
    memcpy(p->record, &checksum, sizeof checksum);
    TRY(file_write_at(p->fd, p->part, p->record, p->bytes, record_at(p)));
    p->done++;
    return OK;
}

/* x = the whole pictures of the part file */
static Err part_collect(TokensPart *p, Tokens *x) {
    size_t each = (p->bytes - RECORD_TOKENS) / sizeof *x->token, total;
    *x = p->sizes;
    x->n = 0, x->label = NULL, x->token = NULL;
    TRY(size_mul(&total, p->sizes.n, each));
    TRY(mem_alloc(&x->label, p->sizes.n, sizeof *x->label, "labels"));
    TRY(mem_alloc(&x->token, total, sizeof *x->token, "tokens"));
    if (lseek(p->fd, (off_t)header_bytes(x->crops), SEEK_SET) < 0) return io_error(p->part, "read");
    for (size_t i = 0; i < p->sizes.n; i++) {
        int whole;
        TRY(part_next(p, i, &whole));
        if (!whole) return err_damaged("%s: record %zu is not what was written", p->part, i);
        memcpy(&x->label[x->n], p->record + RECORD_LABEL, sizeof *x->label);
        if (x->label[x->n] < 0) continue;
        memcpy(x->token + x->n * each, p->record + RECORD_TOKENS, each * sizeof *x->token);
        x->n++;
    }
    return x->n ? OK : err("%s: none of the %zu pictures can be read", p->path, p->sizes.n);
}

Err tokens_finish(TokensPart *p, Tokens *x) {
    *x = (Tokens){0};
    if (p->done != p->sizes.n) return err("%s: %zu of %zu pictures are encoded", p->part, p->done, p->sizes.n);
    Err e = part_collect(p, x);
    if (e == OK) e = tokens_write(p->path, x);
    if (e == OK) e = unlink(p->part) == 0 ? OK : io_error(p->part, "remove");
    if (e != OK) tokens_free(x);
    return e;
}

void tokens_drop_part(const char *path) {
    char part[PATH_BYTES];
    if (path_make(part, "%s.part", path) != OK) return;
    const int fd = open(part, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0) return;
    if (file_lock(fd) != 0) unlink(part);
    close(fd);
}

void tokens_stop(TokensPart *p) {
    if (p->fd >= 0) close(p->fd);
    free(p->record);
    *p = (TokensPart){.fd = -1};
}
