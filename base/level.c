/* level.c - the levels of the x86-64 ABI: which of them this processor and its system have, and which one to take.
 * IMAGEBART_LEVEL=x86-64-v3 chooses that level; one that the machine lacks, or that was not compiled, is refused. */
#if defined(__x86_64__)
#include "base/level.h"
#include "base/tiles.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The builtin also asks whether the system keeps the wide registers when it changes tasks. gcc 12 knows whole levels;
 * older compilers and clang know features, but for three of x86-64-v3's. */
#define HAS(feature) (__builtin_cpu_supports(feature) != 0)
#if !defined(__clang__) && __GNUC__ >= 12
#define HAS_V3 HAS("x86-64-v3")
#define HAS_V4 HAS("x86-64-v4")
#else
#include <cpuid.h>
static int has_cpuid(unsigned leaf, unsigned bits) {
    unsigned a, b, c, d;
    return __get_cpuid(leaf, &a, &b, &c, &d) && (c & bits) == bits;
}
#define HAS_V3                                                                                                         \
    (HAS("popcnt") && HAS("avx2") && HAS("fma") && HAS("bmi") && HAS("bmi2") && has_cpuid(1, bit_MOVBE | bit_F16C) &&  \
     has_cpuid(0x80000001, bit_LZCNT))
#define HAS_V4 (HAS("avx512f") && HAS("avx512dq") && HAS("avx512cd") && HAS("avx512bw") && HAS("avx512vl"))
#endif
#if defined(__clang__) || __GNUC__ >= 11
#define HAS_BF16 (HAS("avx512bf16") && HAS("avx512vnni") && HAS("avx512vbmi"))
#else
#define HAS_BF16 0
#endif

static const char *const names[LEVELS] = {"x86-64", "x86-64-v3", "x86-64-v4", "x86-64-v4-bf16", "x86-64-v4-amx"};

/* How many of the levels, from the first, this machine has. The system is asked for tiles only where they are wanted, or
 * listed. */
static int machine_has(int wants_tiles) {
    __builtin_cpu_init();
    if (!HAS_V3) return LEVEL_V3;
    if (!HAS_V4) return LEVEL_V4;
    if (!HAS_BF16) return LEVEL_V4_BF16;
    return wants_tiles && tiles_here() ? LEVELS : LEVEL_V4_AMX;
}

static int refuse(char refusal[LEVEL_TEXT], const char *wanted, const char *why, const int there[LEVELS], int has) {
    int at = snprintf(refusal, LEVEL_TEXT, "IMAGEBART_LEVEL=%.64s: %s; expected one of:", wanted, why);
    for (int i = 0; i < has; i++)
        if (there[i]) at += snprintf(refusal + at, (size_t)(LEVEL_TEXT - at), " %s", names[i]);
    return -1;
}

int level_take(const int there[LEVELS], char refusal[LEVEL_TEXT]) {
    const char *wanted = getenv("IMAGEBART_LEVEL");
    int take = 0;
    while (wanted && take < LEVELS && strcmp(wanted, names[take]) != 0) take++;
    const int has = machine_has(there[LEVEL_V4_AMX] && (!wanted || take >= LEVEL_V4_AMX));
    *refusal = 0;
    if (!wanted) {
        for (take = has - 1; take > 0 && !there[take];) take--;
        return take;
    }
    if (take == LEVELS) return refuse(refusal, wanted, "no such level", there, has);
    if (!there[take]) return refuse(refusal, wanted, "not compiled into this program", there, has);
    return take < has ? take : refuse(refusal, wanted, "this processor or system lacks it", there, has);
}
#endif
