/* start.c - one program for every x86-64: chooses among copies of the whole program the one with the widest vectors
 * that this processor and its system have, and goes on in that copy's main.
 *
 * The Makefile compiles the program once per level of the x86-64 ABI, links each copy into one object whose names are
 * its own, and calls its main main_LEVEL. So no other file knows of levels, and loops that the compiler turned into
 * vectors gain as much as those written with them. A level that the compiler did not know is missing here: a null
 * pointer. IMAGEBART_LEVEL=x86-64-v3 chooses that level; one that the machine lacks is refused. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Main(int argc, char **argv);
extern Main main_x86_64;
extern Main main_x86_64_v3 __attribute__((weak));
extern Main main_x86_64_v4 __attribute__((weak));
extern Main main_x86_64_v4_bf16 __attribute__((weak));

/* ---- what there is ---- */

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
#define HAS_BF16 (HAS("avx512bf16") && HAS("avx512vnni"))
#else
#define HAS_BF16 0
#endif

/* A level needs all that the levels before it need. */
static const struct {
    const char *name;
    Main *main;
} levels[] = {{"x86-64", main_x86_64},
              {"x86-64-v3", main_x86_64_v3},
              {"x86-64-v4", main_x86_64_v4},
              {"x86-64-v4-bf16", main_x86_64_v4_bf16}};
enum { LEVELS = sizeof levels / sizeof *levels };

/* How many of the levels, from the first, this machine has. */
static int machine_has(void) {
    __builtin_cpu_init();
    if (!HAS_V3) return 1;
    if (!HAS_V4) return 2;
    return HAS_BF16 ? 4 : 3;
}

/* ---- which to take ---- */

static int refuse(const char *program, const char *wanted, const char *why, int there) {
    const char *slash = strrchr(program, '/');
    fprintf(stderr, "%s: IMAGEBART_LEVEL=%s: %s; expected one of:", slash ? slash + 1 : program, wanted, why);
    for (int i = 0; i < there; i++)
        if (levels[i].main) fprintf(stderr, " %s", levels[i].name);
    fprintf(stderr, "\n");
    return 2;
}

int main(int argc, char **argv) {
    const int there = machine_has();
    int take = there - 1;
    const char *wanted = getenv("IMAGEBART_LEVEL"), *program = argc > 0 ? argv[0] : "imagebart";
    while (!levels[take].main) take--; /* the first is always here */
    if (wanted) {
        for (take = 0; take < LEVELS && strcmp(wanted, levels[take].name) != 0;) take++;
        if (take == LEVELS) return refuse(program, wanted, "no such level", there);
        if (!levels[take].main) return refuse(program, wanted, "not compiled into this program", there);
        if (take >= there) return refuse(program, wanted, "this processor or system lacks it", there);
        unsetenv("IMAGEBART_LEVEL"); /* obeyed: options_parse complains of one that nobody obeyed */
    }
    return levels[take].main(argc, argv);
}
