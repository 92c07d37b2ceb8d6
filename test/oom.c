/* oom.c - memory that runs out, for test_faults.sh: LD_PRELOAD of a program, whose allocation number OOM_AT returns NULL
 * (OOM_ON=1: that and all after it). OOM_COUNT=FILE gets how many there were.
 *
 * Counted is what the program itself asks for, and what libpng, libjpeg, libz and the C library do for it: not the
 * loader, nor libraries that end a program without memory (MPI's, C++'s, libwebp). */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct {
    uintptr_t begin, end;
} Range;
enum { RANGES = 64 };

static void *(*real_malloc)(size_t), *(*real_calloc)(size_t, size_t), *(*real_realloc)(void *, size_t),
    *(*real_aligned)(size_t, size_t);
static void (*real_free)(void *);
static Range counted[RANGES];
static size_t ranges;
static atomic_long seen;
static long at;
static int on, ready;

/* What dlsym asks for before it has answered */
static _Alignas(64) char early[65536];
static size_t early_used;

static int is_early(const void *p) {
    return (const char *)p >= early && (const char *)p < early + sizeof early;
}

static void *early_alloc(size_t bytes) {
    const size_t begin = (early_used + 63) / 64 * 64;
    if (begin + bytes > sizeof early) _exit(99);
    early_used = begin + bytes;
    return early + begin;
}

/* The C++ library of programs built by nvcc asks for much before begin(). */
static void find_real(void) {
    static int finding;
    if (real_free || finding) return;
    finding = 1;
    real_malloc = (void *(*)(size_t))dlsym(RTLD_NEXT, "malloc");
    real_calloc = (void *(*)(size_t, size_t))dlsym(RTLD_NEXT, "calloc");
    real_realloc = (void *(*)(void *, size_t))dlsym(RTLD_NEXT, "realloc");
    real_aligned = (void *(*)(size_t, size_t))dlsym(RTLD_NEXT, "aligned_alloc");
    real_free = (void (*)(void *))dlsym(RTLD_NEXT, "free");
}

/* ---- whose allocations count ---- */

static int add_object(struct dl_phdr_info *o, size_t size, void *unused) {
    static const char *const names[] = {"/libpng", "/libjpeg", "/libz.", "/libc.", "/liblmdb"};
    (void)size, (void)unused;
    int wanted = o->dlpi_name[0] == 0; /* the program */
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) wanted |= strstr(o->dlpi_name, names[i]) != NULL;
    for (int i = 0; wanted && i < o->dlpi_phnum && ranges < RANGES; i++) {
        const ElfW(Phdr) *h = &o->dlpi_phdr[i];
        if (h->p_type == PT_LOAD && h->p_flags & PF_X)
            counted[ranges++] = (Range){o->dlpi_addr + h->p_vaddr, o->dlpi_addr + h->p_vaddr + h->p_memsz};
    }
    return 0;
}

__attribute__((constructor)) static void begin(void) {
    find_real();
    const char *number = getenv("OOM_AT");
    at = number ? atol(number) : 0;
    on = getenv("OOM_ON") != NULL;
    dl_iterate_phdr(add_object, NULL);
}

/* Counting begins with main(): what a CUDA library does before it, within the program's own code, is not ours to mend. */
typedef int Main(int, char **, char **);
static Main *real_main;

static int counted_main(int argc, char **argv, char **env) {
    ready = 1;
    return real_main(argc, argv, env);
}

int __libc_start_main(Main *program, int argc, char **argv, void (*init)(void), void (*fini)(void),
                      void (*loader_fini)(void), void *stack_end) {
    typedef int Start(Main *, int, char **, void (*)(void), void (*)(void), void (*)(void), void *);
    Start *start = (Start *)dlsym(RTLD_NEXT, "__libc_start_main");
    real_main = program;
    return start(counted_main, argc, argv, init, fini, loader_fini, stack_end);
}

__attribute__((destructor)) static void end(void) {
    const char *path = getenv("OOM_COUNT");
    char text[32];
    ready = 0;
    if (!path) return;
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666), n = snprintf(text, sizeof text, "%ld\n", (long)seen);
    if (fd >= 0 && write(fd, text, (size_t)n) == n) close(fd);
}

static int fails(const void *caller) {
    if (!ready) return 0;
    size_t i = 0;
    while (i < ranges && ((uintptr_t)caller < counted[i].begin || (uintptr_t)caller >= counted[i].end)) i++;
    if (i == ranges) return 0;
    const long n = atomic_fetch_add(&seen, 1) + 1;
    if (!at || (on ? n < at : n != at)) return 0;
    errno = ENOMEM;
    return 1;
}
#define FAILS fails(__builtin_return_address(0))

/* ---- the allocators ---- */

void *malloc(size_t bytes) {
    find_real();
    if (!real_free) return early_alloc(bytes);
    return FAILS ? NULL : real_malloc(bytes);
}

void *calloc(size_t n, size_t bytes) {
    find_real();
    if (!real_free) return early_alloc(n * bytes); /* zeros, as it is used once */
    return FAILS ? NULL : real_calloc(n, bytes);
}

void *realloc(void *old, size_t bytes) {
    find_real();
    if (!real_free || is_early(old)) {
        void *fresh = malloc(bytes);
        if (fresh && old) memcpy(fresh, old, bytes); /* more than it had, within the block that it is from */
        return fresh;
    }
    return FAILS ? NULL : real_realloc(old, bytes);
}

void *aligned_alloc(size_t unit, size_t bytes) {
    find_real();
    return FAILS ? NULL : real_aligned(unit, bytes);
}

void free(void *p) {
    find_real();
    if (!is_early(p)) real_free(p);
}
