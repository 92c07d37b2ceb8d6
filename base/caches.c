/* caches.c - how large the L2 cache of a core is: the system is asked first, then the processor itself (x86). */
#include "base/base.h"

#include <stdatomic.h>
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

static size_t ask_for_l2(void) {
    size_t bytes = l2_of_system();
    if (bytes == 0) bytes = l2_of_processor();
    if (bytes == 0) bytes = L2_USUAL;
    return min_size(max_size(bytes, L2_LEAST), L2_MOST);
}

size_t l2_bytes(void) {
    size_t bytes = atomic_load(&l2_known);
    if (bytes == 0) atomic_store(&l2_known, bytes = ask_for_l2());
    return bytes;
}

void l2_set(size_t bytes) {
    atomic_store(&l2_known, bytes ? min_size(max_size(bytes, L2_LEAST), L2_MOST) : 0);
}
