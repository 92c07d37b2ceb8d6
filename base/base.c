/* base.c - the ground floor: error values, memory, paths, random streams.
 *
 * Owns the four things that every component needs and none of them is about. It refuses to print, to exit, and to
 * keep state other than one error text per thread.
 *
 * Random numbers are counter-based (philox of bits.h). There is no generator to seed, advance, save or share: number
 * `index` of stream `stream` under `seed` is a pure function, so nothing depends on the number of threads or on batch
 * order, and a resumed run needs to remember only its step. */
#include "base/base.h"

#include <errno.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>

/* ---- errors ---- */

static _Thread_local char error_text[ERR_MAX];
static _Thread_local Err error_kind; /* FAILED or DAMAGED */

/* File contents end up in messages: one line, no terminal escapes. In UTF-8, U+0080..U+009F (a terminal may take U+009B
 * for ESC [) are C2 80..C2 9F; a byte of theirs alone is as bad where a terminal does not read UTF-8. Marks of direction
 * (U+061C, U+200E, U+200F, U+2028..U+202E, U+2066..U+2069) show a text in another order than it has. */
static size_t unprintable(const unsigned char *s) {
    if (*s < 0x20 || *s == 0x7f || (*s >= 0x80 && *s < 0xa0)) return 1;
    if (*s == 0xc2 && s[1] >= 0x80 && s[1] < 0xa0) return 2;
    if (*s == 0xd8 && s[1] == 0x9c) return 2;
    if (*s != 0xe2 || (s[1] != 0x80 && s[1] != 0x81)) return 0;
    const int marks =
        s[1] == 0x80 ? s[2] == 0x8e || s[2] == 0x8f || (s[2] >= 0xa8 && s[2] <= 0xae) : s[2] >= 0xa6 && s[2] <= 0xa9;
    return marks ? 3 : 0;
}

/* Bytes of the character that begins with this one; a byte that begins none is one. */
static size_t utf8_bytes(const unsigned char *s) {
    const size_t n = *s >= 0xf0 ? 4 : *s >= 0xe0 ? 3 : *s >= 0xc2 ? 2 : 1;
    for (size_t i = 1; i < n; i++)
        if ((s[i] & 0xc0) != 0x80) return 1;
    return n;
}

char *make_printable(char *s) {
    unsigned char *to = (unsigned char *)s;
    for (const unsigned char *from = to; *from;) {
        const size_t bad = unprintable(from), n = bad ? bad : utf8_bytes(from);
        if (bad)
            *to++ = '?';
        else
            memmove(to, from, n), to += n;
        from += n;
    }
    *to = 0;
    return s;
}

const char *printable(char out[PATH_BYTES], const char *s) {
    snprintf(out, PATH_BYTES, "%s", s);
    return make_printable(out);
}

static Err set_error(Err kind, const char *fmt, va_list args) {
    char text[ERR_MAX]; /* an argument may be err_text() itself */
    vsnprintf(text, sizeof text, fmt, args);
    make_printable(text);
    memcpy(error_text, text, sizeof text);
    return error_kind = kind;
}

Err err(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    const Err e = set_error(FAILED, fmt, args);
    va_end(args);
    return e;
}

Err err_damaged(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    const Err e = set_error(DAMAGED, fmt, args);
    va_end(args);
    return e;
}

Err err_in(const char *where) {
    const size_t n = strlen(where);
    if (!strncmp(error_text, where, n) && error_text[n] == ':') return error_kind; /* it says so already */
    return error_kind == DAMAGED ? err_damaged("%s: %s", where, error_text) : err("%s: %s", where, error_text);
}

const char *err_text(void) {
    return error_text;
}

/* ---- whether to go on ---- */

static _Thread_local WorkAsker asked;

WorkAsker work_ask(int (*stop)(void *context), void *context) {
    const WorkAsker before = asked;
    asked = (WorkAsker){stop, context, 0};
    return before;
}

void work_ask_again(WorkAsker before) {
    asked = before;
}

int work_stops(void) {
    if (asked.stop && !asked.said) asked.said = asked.stop(asked.context) != 0;
    return asked.said;
}

/* ---- memory ---- */

Err size_mul(size_t *out, size_t a, size_t b) {
    if (__builtin_mul_overflow(a, b, out)) return err("a size of %zu x %zu is too large", a, b);
    return OK;
}

/* 0: the work is to stop, and not all of it was set. */
static int set_to_zero(char *p, size_t bytes) {
    const size_t piece = 16 << 20;
    for (size_t at = 0; at < bytes; at += piece) {
        if (at && work_stops()) return 0;
        memset(p + at, 0, min_size(piece, bytes - at));
    }
    return 1;
}

Err mem_alloc(void *out_pointer, size_t count, size_t size, const char *what) {
    enum { HUGE_PAGE = 2 << 20 };
    size_t bytes, rounded;
    void *p = NULL;
    if (__builtin_mul_overflow(count, size, &bytes) || __builtin_add_overflow(bytes, (size_t)LINE_BYTES, &rounded))
        return err("%s: %zu x %zu bytes is more than memory can address", what, count, size);
    rounded = rounded / LINE_BYTES * LINE_BYTES; /* at least one line: count = 0 is a valid pointer too */
    if (rounded == 0) rounded = LINE_BYTES;
#ifdef MADV_HUGEPAGE /* else a walk down a large matrix would look up a page's address for every row */
    if (rounded >= 2 * HUGE_PAGE && rounded < SIZE_MAX - HUGE_PAGE) {
        rounded = (rounded + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        p = aligned_alloc(HUGE_PAGE, rounded);
        if (p) madvise(p, rounded, MADV_HUGEPAGE); /* advice: without it everything is the same, but slower */
    } else
#endif
        p = aligned_alloc(LINE_BYTES, rounded);
    if (!p) return err("%s: no memory for %.1f MiB", what, (double)bytes / 1048576.0);
    if (!set_to_zero(p, rounded)) {
        free(p);
        return err("the work was stopped");
    }
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

void mem_give_back(void) {
#ifdef __GLIBC__ /* others keep little */
    mallopt(M_MMAP_THRESHOLD, 4 << 20);
    mallopt(M_TRIM_THRESHOLD, 1 << 20);
#endif
}

Err path_make(char path[PATH_BYTES], const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    const int length = vsnprintf(path, PATH_BYTES, fmt, args);
    va_end(args);
    if (length >= 0 && length < PATH_BYTES) return OK;
    return err("%.200s...: a path of %d bytes is too long, at most %d", path, length, PATH_BYTES - 1);
}

const char *bytes_text(char text[32], size_t bytes) {
    const double mib = (double)bytes / 1048576;
    if (mib < 1000)
        snprintf(text, 32, "%.*f MiB", mib < 10 ? 1 : 0, mib);
    else
        snprintf(text, 32, "%.1f GiB", mib / 1024);
    return text;
}

/* The number that follows `key` at the beginning of a line of a file, in bytes if it is in kB. key "": the number at the
 * beginning of the first line. SIZE_MAX: there is none. */
static size_t number_in(const char *path, const char *key) {
    char line[256];
    size_t found = SIZE_MAX, length = strlen(key);
    FILE *f = fopen(path, "r");
    while (f && found == SIZE_MAX && fgets(line, sizeof line, f)) {
        char *end;
        if (strncmp(line, key, length) != 0) continue;
        unsigned long long n = strtoull(line + length, &end, 10);
        if (end == line + length) break; /* "max" */
        if (n < SIZE_MAX / 1024) found = (size_t)n * (strncmp(end, " kB", 3) == 0 ? 1024 : 1);
    }
    if (f) fclose(f);
    return found;
}

/* a - b, at least 0. SIZE_MAX stands for no limit, and stays. */
static size_t minus(size_t a, size_t b) {
    return a == SIZE_MAX || b == SIZE_MAX ? SIZE_MAX : a > b ? a - b : 0;
}

static size_t number_at(const char *folder, const char *name, const char *key) {
    char path[PATH_BYTES];
    return path_make(path, "%s/%s", folder, name) == OK ? number_in(path, key) : SIZE_MAX;
}

typedef struct {
    const char *line; /* of /proc/self/cgroup: "0::/group", "4:memory:/group" */
    const char *mount, *limit, *usage, *inactive, *active;
} Cgroup;
static const Cgroup cgroups[2] = {
    {":memory:", "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ",
     "total_active_file "},
    {"0::", "/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file ", "active_file "},
};

/* Bytes that the control groups from `group` up to the mount point leave. */
static size_t cgroup_room(const Cgroup *c, const char *group) {
    char path[PATH_BYTES];
    size_t room = SIZE_MAX;
    if (path_make(path, "%s%s", c->mount, group) != OK) return SIZE_MAX;
    for (char *slash = path; slash; slash = strrchr(path + strlen(c->mount), '/')) {
        if (slash != path) *slash = 0; /* the group above */
        size_t used = number_at(path, c->usage, "");
        size_t inactive = number_at(path, "memory.stat", c->inactive); /* caches, which the kernel gives up */
        size_t active = number_at(path, "memory.stat", c->active);
        used = minus(used, (inactive == SIZE_MAX ? 0 : inactive) + (active == SIZE_MAX ? 0 : active));
        room = min_size(room, minus(number_at(path, c->limit, ""), used));
    }
    return room;
}

static size_t cgroups_room(void) {
    char line[900];
    size_t room = SIZE_MAX;
    FILE *f = fopen("/proc/self/cgroup", "r");
    while (f && fgets(line, sizeof line, f)) {
        char *group = strchr(line, '/');
        line[strcspn(line, "\n")] = 0;
        for (int i = 0; group && i < 2; i++)
            if (strstr(line, cgroups[i].line)) room = min_size(room, cgroup_room(&cgroups[i], group));
    }
    if (f) fclose(f);
    return room;
}

size_t memory_available(void) {
    static const struct {
        int resource;
        const char *used;
    } own[] = {{RLIMIT_AS, "VmSize:"}, {RLIMIT_DATA, "VmData:"}};
    size_t room = min_size(number_in("/proc/meminfo", "MemAvailable:"), cgroups_room());
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) {
        struct rlimit limit;
        if (getrlimit(own[i].resource, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) continue;
        room = min_size(room, minus((size_t)limit.rlim_cur, number_in("/proc/self/status", own[i].used)));
    }
    return room;
}

Err memory_fits(size_t needed, size_t available, const char *what, const char *advice) {
    char need[32], there[32];
    if (needed <= available) return OK;
    return err("%s: %s of memory needed, %s available; %s", what, bytes_text(need, needed),
               bytes_text(there, available), advice);
}

/* ---- random streams ---- */

uint64_t rng_stream(RngPurpose purpose, uint64_t a, uint64_t b) {
    return (uint64_t)purpose << 56 | (a & 0xFFFFFFu) << 32 | (b & 0xFFFFFFFFu);
}

double rng_uniform(uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t r[4];
    philox(r, seed, stream, index);
    return unit_of_bits(r[0], r[1]);
}

double rng_normal(uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t r[4];
    philox(r, seed, stream, index);
    double u = 1.0 - unit_of_bits(r[0], r[1]); /* (0,1]: the logarithm stays finite */
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * unit_of_bits(r[2], r[3]));
}

uint32_t rng_below(uint64_t seed, uint64_t stream, uint64_t index, uint32_t below) {
    uint32_t r[4];
    philox(r, seed, stream, index);
    return (uint32_t)below_of_bits(r[0], r[1], below);
}

/* Quickselect (Hoare 1961). */
real select_largest(real *z, size_t n, size_t rank) {
    size_t lo = 0, hi = n - 1, want = rank - 1;
    while (lo < hi) {
        real pivot = z[lo + (hi - lo) / 2];
        size_t i = lo, j = hi;
        for (;;) { /* Hoare: z[lo..j] >= pivot >= z[j+1..hi] */
            while (z[i] > pivot) i++;
            while (z[j] < pivot) j--;
            if (i >= j) break;
            real swap = z[i];
            z[i++] = z[j];
            z[j--] = swap;
        }
        if (want <= j)
            hi = j;
        else
            lo = j + 1;
    }
    return z[want];
}
