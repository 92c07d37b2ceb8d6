/* base.c - the ground floor: error values, memory, random streams, threads.
 *
 * Owns the four things that every component needs and none of them is about. It refuses to print, to exit, and to
 * keep state other than one error text per thread.
 *
 * Random numbers are counter-based: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as
 * 1, 2, 3", SC 2011) is a keyed bijection of a 128-bit counter. There is no generator to seed, advance, save or
 * share: number `index` of stream `stream` under `seed` is a pure function, so nothing depends on the number of
 * threads or on batch order, and a resumed run needs to remember only its step. */
#include "imagebart.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* ---- errors ---- */

static _Thread_local char error_text[ERR_MAX];

/* File contents end up in messages: one line, no terminal escapes. */
static void make_printable(char *s) {
    for (; *s; s++)
        if ((unsigned char)*s < 0x20 || *s == 0x7f) *s = '?';
}

Err err(const char *fmt, ...) {
    char text[ERR_MAX]; /* an argument may be err_text() itself */
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    make_printable(text);
    memcpy(error_text, text, sizeof text);
    return FAILED;
}

Err err_in(const char *where) {
    char text[ERR_MAX];
    memcpy(text, error_text, sizeof text);
    return err("%s: %s", where, text);
}

const char *err_text(void) {
    return error_text;
}

/* ---- memory ---- */

Err size_mul(size_t *out, size_t a, size_t b) {
    if (__builtin_mul_overflow(a, b, out)) return err("a size of %zu x %zu is too large", a, b);
    return OK;
}

Err mem_alloc(void *out_pointer, size_t count, size_t size, const char *what) {
    enum { ALIGN = 64 }; /* a cache line, and the widest vector */
    size_t bytes, rounded;
    void *p = NULL;
    if (__builtin_mul_overflow(count, size, &bytes) || __builtin_add_overflow(bytes, (size_t)ALIGN, &rounded))
        return err("%s: %zu x %zu bytes is more than memory can address", what, count, size);
    rounded = rounded / ALIGN * ALIGN; /* at least one line: count = 0 is a valid pointer too */
    if (rounded == 0) rounded = ALIGN;
    p = aligned_alloc(ALIGN, rounded);
    if (!p) return err("%s: no memory for %.1f MiB", what, (double)bytes / 1048576.0);
    memset(p, 0, rounded);
    memcpy(out_pointer, &p, sizeof p);
    return OK;
}

Err mem_grow(void *array, size_t n, size_t more, size_t *capacity, size_t size, const char *what) {
    if (more <= *capacity - n) return OK;
    void *old, *larger = NULL;
    size_t wanted = *capacity + *capacity / 2 + 16;
    if (wanted - n < more) wanted = n + more;
    TRY(mem_alloc(&larger, wanted, size, what));
    memcpy(&old, array, sizeof old);
    if (n) memcpy(larger, old, n * size);
    memcpy(array, &larger, sizeof larger);
    *capacity = wanted;
    free(old);
    return OK;
}

/* ---- random streams ---- */

void philox(uint32_t out[4], uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t c[4] = {(uint32_t)index, (uint32_t)(index >> 32), (uint32_t)stream, (uint32_t)(stream >> 32)};
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
        uint32_t n0 = (uint32_t)(b >> 32) ^ c[1] ^ key0, n2 = (uint32_t)(a >> 32) ^ c[3] ^ key1;
        c[1] = (uint32_t)b, c[3] = (uint32_t)a, c[0] = n0, c[2] = n2;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u; /* golden ratio and sqrt(3)-1: the published Weyl constants */
    }
    memcpy(out, c, sizeof c);
}

uint64_t rng_stream(RngPurpose purpose, uint64_t a, uint64_t b) {
    return (uint64_t)purpose << 56 | (a & 0xFFFFFFu) << 32 | (b & 0xFFFFFFFFu);
}

static double to_unit(uint32_t hi, uint32_t lo) { /* 53 bits in [0,1) */
    return (double)(((uint64_t)hi << 32 | lo) >> 11) * 0x1p-53;
}

double rng_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t r[4];
    philox(r, seed, stream, index);
    return to_unit(r[0], r[1]);
}

double rng_normal(uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t r[4];
    philox(r, seed, stream, index);
    double u = 1.0 - to_unit(r[0], r[1]); /* (0,1]: the logarithm stays finite */
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * to_unit(r[2], r[3]));
}

uint32_t rng_below(uint64_t seed, uint64_t stream, uint64_t index, uint32_t below) {
    uint32_t r[4];
    philox(r, seed, stream, index);
    /* The high word of a 64-bit draw times `below` (Lemire): biased by less than below/2^64. */
    uint64_t wide = (uint64_t)r[0] << 32 | r[1];
    return (uint32_t)((unsigned __int128)wide * below >> 64);
}

/* ---- threads ---- */

void threads_set(int n) {
#ifdef _OPENMP
    if (n <= 0) n = omp_get_num_procs();
    omp_set_dynamic(0);
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

int threads_get(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

size_t thread_index(void) {
#ifdef _OPENMP
    return (size_t)omp_get_thread_num();
#else
    return 0;
#endif
}
