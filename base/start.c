/* start.c - one program for every x86-64: chooses among copies of the whole program the one with the widest vectors
 * that this processor and its system have, and goes on in that copy's main.
 *
 * The Makefile compiles the program once per level of the x86-64 ABI, links each copy into one object whose names are
 * its own, and calls its main main_LEVEL. So no other file knows of levels, and loops that the compiler turned into
 * vectors gain as much as those written with them. A level that the compiler did not know is missing here: a null
 * pointer. IMAGEBART_LEVEL=x86-64-v3 chooses that level; one that the machine lacks is refused. */
#include <cpuid.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Main(int argc, char **argv);
extern Main main_x86_64;
extern Main main_x86_64_v3 __attribute__((weak));
extern Main main_x86_64_v4 __attribute__((weak));
extern Main main_x86_64_v4_bf16 __attribute__((weak));

/* ---- what there is ---- */

enum { EAX, EBX, ECX, EDX };
#define BIT(n) (1u << (n))

/* A level has every bit of the levels before it. Bits: Intel's Software Developer's Manual, CPUID; levels: the x86-64
 * ABI's "micro-architecture levels". */
static const struct {
    const char *name;
    Main *main;
    unsigned saved; /* parts of the registers that the system must keep: XCR0 */
    struct {
        unsigned leaf, part, reg, bits;
    } needs[5];
} levels[] = {
    {"x86-64", main_x86_64, 0, {{0, 0, 0, 0}}},
    {"x86-64-v3",
     main_x86_64_v3,
     0x6,
     {{1, 0, ECX,
       BIT(0) | BIT(9) | BIT(13) | BIT(19) | BIT(20) | BIT(23)},    /* v2: SSE3 SSSE3 CX16 SSE4.1 SSE4.2 POPCNT */
      {1, 0, ECX, BIT(12) | BIT(22) | BIT(27) | BIT(28) | BIT(29)}, /* FMA MOVBE OSXSAVE AVX F16C */
      {7, 0, EBX, BIT(3) | BIT(5) | BIT(8)},                        /* BMI1 AVX2 BMI2 */
      {0x80000001, 0, ECX, BIT(0) | BIT(5)}}},                      /* LAHF LZCNT */
    {"x86-64-v4",
     main_x86_64_v4,
     0xe6,
     {{7, 0, EBX, BIT(16) | BIT(17) | BIT(28) | BIT(30) | BIT(31)}}}, /* AVX512F DQ CD BW VL */
    {"x86-64-v4-bf16",
     main_x86_64_v4_bf16,
     0xe6,
     {{7, 0, ECX, BIT(11)}, {7, 1, EAX, BIT(5)}}}, /* AVX512-VNNI AVX512-BF16 */
};
enum { LEVELS = sizeof levels / sizeof *levels };

static int has_bits(unsigned leaf, unsigned part, unsigned reg, unsigned bits) {
    unsigned r[4] = {0, 0, 0, 0}, parts = part, rest[3];
    if (part > 0 && !__get_cpuid_count(leaf, 0, &parts, &rest[0], &rest[1], &rest[2])) return 0;
    if (part > parts || !__get_cpuid_count(leaf, part, &r[EAX], &r[EBX], &r[ECX], &r[EDX])) return 0;
    return (r[reg] & bits) == bits;
}

/* Whether the system keeps these registers when it changes tasks; asked only where OSXSAVE says that it can be. */
static int system_saves(unsigned parts) {
    unsigned low, high;
    if (!has_bits(1, 0, ECX, BIT(27))) return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & parts) == parts;
}

/* How many of the levels, from the first, this machine has. */
static int machine_has(void) {
    int n = 1;
    for (; n < LEVELS; n++) {
        if (!system_saves(levels[n].saved)) return n;
        for (int i = 0; i < 5 && levels[n].needs[i].bits; i++)
            if (!has_bits(levels[n].needs[i].leaf, levels[n].needs[i].part, levels[n].needs[i].reg,
                          levels[n].needs[i].bits))
                return n;
    }
    return n;
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
