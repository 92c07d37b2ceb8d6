/* caches.c - how much of an L2 cache a thread has: the system is asked for its size first, then the processor itself
 * (x86). The logical processors of a core share it, as far as this process may run on them. */
#include "base/base.h"

#ifdef __linux__
#include <sched.h>
#endif
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

static atomic_size_t l2_known; /* 0: not asked yet */

static size_t l2_of_system(void) {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (bytes > 0) return (size_t)bytes;
#endif
    return 0;
}

#if defined(__x86_64__) || defined(__i386__)
/* A leaf that lists caches, one after the other until one of type 0: bytes = ways * parts * line * sets, each less one in
 * the registers. */
static size_t l2_in_leaf(unsigned leaf) {
    enum { CACHES = 16, TYPE = 31, INSTRUCTIONS = 2 };
    unsigned a, b, c, d;
    for (unsigned i = 0; i < CACHES && __get_cpuid_count(leaf, i, &a, &b, &c, &d) && (a & TYPE); i++)
        if ((a >> 5 & 7) == 2 && (a & TYPE) != INSTRUCTIONS)
            return ((size_t)(b >> 22) + 1) * ((b >> 12 & 0x3ff) + 1) * ((b & 0xfff) + 1) * ((size_t)c + 1);
    return 0;
}

static size_t l2_of_processor(void) {
    const size_t intel = l2_in_leaf(4);
    return intel ? intel : l2_in_leaf(0x8000001d); /* AMD's */
}
#else
static size_t l2_of_processor(void) {
    return 0;
}
#endif

#ifdef __linux__
/* Those of a list, "0-1,8", that are in `ours` */
static size_t count_listed(const char *list, const cpu_set_t *ours) {
    size_t n = 0;
    for (char *end; *list >= '0' && *list <= '9'; list = *end == ',' ? end + 1 : end) {
        const unsigned long first = strtoul(list, &end, 10), last = *end == '-' ? strtoul(end + 1, &end, 10) : first;
        for (unsigned long i = first; i <= last && i < CPU_SETSIZE; i++) n += CPU_ISSET(i, ours) != 0;
    }
    return n;
}

size_t l2_sharers(const char *root) {
    char path[PATH_BYTES], list[256] = "";
    cpu_set_t ours;
    const int here = sched_getcpu();
    if (here < 0 || sched_getaffinity(0, sizeof ours, &ours) != 0 ||
        path_make(path, "%s/sys/devices/system/cpu/cpu%d/cache/index2/shared_cpu_list", root, here) != OK)
        return 1;
    FILE *f = fopen(path, "r");
    if (f && !fgets(list, sizeof list, f)) *list = 0;
    if (f) fclose(f);
    return max_size(1, count_listed(list, &ours));
}
#else
size_t l2_sharers(const char *root) {
    (void)root;
    return 1;
}
#endif

static size_t ask_for_l2(void) {
    size_t bytes = l2_of_system();
    if (bytes == 0) bytes = l2_of_processor();
    if (bytes == 0) bytes = L2_USUAL;
    return min_size(max_size(bytes / l2_sharers(""), L2_LEAST), L2_MOST);
}

size_t l2_bytes(void) {
    size_t bytes = atomic_load(&l2_known);
    if (bytes == 0) atomic_store(&l2_known, bytes = ask_for_l2());
    return bytes;
}

void l2_set(size_t bytes) {
    atomic_store(&l2_known, bytes ? min_size(max_size(bytes, L2_LEAST), L2_MOST) : 0);
}
