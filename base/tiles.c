/* tiles.c - the tile registers of Intel's processors (AMX): whether this one has them, and the system's permission.
 *
 * Linux keeps 8 KB more for every thread that has touched a tile, so a process asks first (arch_prctl); the permission
 * holds for all of its threads. Kernels before 5.16 do not know the question, some containers forbid it. */
#include "base/tiles.h"

#include <stdatomic.h>
#include <stdio.h>

#if defined(TILES_IN_C) /* test/tiles_in_c.c */
int processor_has_tiles(void);
int system_grants_tiles(void);
#elif defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

static int processor_has_tiles(void) {
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24, AMX_INT8 = 1 << 25, ALL = AMX_BF16 | AMX_TILE | AMX_INT8 };
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & ALL) == ALL;
}

static int system_grants_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#else
static int processor_has_tiles(void) {
    return 0;
}
static int system_grants_tiles(void) {
    return 0;
}
#endif

int tiles_here(void) {
    enum { UNKNOWN, NO, YES };
    static atomic_int known;
    int was = atomic_load(&known);
    if (was != UNKNOWN) return was == YES;
    const int has = processor_has_tiles(), granted = has && system_grants_tiles();
    if (atomic_compare_exchange_strong(&known, &was, granted ? YES : NO) && has && !granted)
        fprintf(stderr,
                "note: this processor has AMX, but the system refuses its tiles (Linux grants them from 5.16 on, "
                "unless a container forbids it): AVX-512 goes on\n");
    return granted;
}
