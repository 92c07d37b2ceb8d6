/* tiles.c - the tile registers of Intel's processors (AMX): whether this one has them, and the system's permission.
 *
 * Linux keeps 8 KB more for every thread that has touched a tile, so a process asks first (arch_prctl); the permission
 * holds for all of its threads. Kernels before 5.16 do not know the question, some containers forbid it. */
#include "base/tiles.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#if defined(TILES_IN_C) /* test/tiles_in_c.c */
int processor_has_tiles(void);
int system_refuses_tiles(void);
#elif defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

static int processor_has_tiles(void) {
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24, AMX_INT8 = 1 << 25, ALL = AMX_BF16 | AMX_TILE | AMX_INT8 };
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & ALL) == ALL;
}

/* 0, or errno */
static int system_refuses_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 ? 0 : errno;
}
#else
static int processor_has_tiles(void) {
    return 0;
}
static int system_refuses_tiles(void) {
    return 0;
}
#endif

enum { UNKNOWN, GRANTED = -1, NONE = -2 }; /* or errno: refused */
static atomic_int known;

int tiles_here(void) {
    int was = atomic_load(&known);
    if (was == UNKNOWN) {
        const int refused = processor_has_tiles() ? system_refuses_tiles() : NONE;
        const int now = refused ? refused : GRANTED;
        if (atomic_compare_exchange_strong(&known, &was, now)) was = now;
    }
    return was == GRANTED;
}

const char *tiles_refusal(char text[TILES_TEXT]) {
    const int error = atomic_load(&known);
    *text = 0;
    if (error == ENOSPC)
        snprintf(text, TILES_TEXT,
                 "AVX-512 instead of AMX, which Linux refuses while a thread's alternate signal stack is "
                 "too small for it");
    else if (error > 0)
        snprintf(text, TILES_TEXT,
                 "AVX-512 instead of AMX, which the system refuses: Linux grants it from 5.16 on, unless "
                 "a container forbids it (%s)",
                 strerror(error));
    return text;
}
