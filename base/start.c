/* start.c - one program for every x86-64: chooses among copies of the whole program the one with the widest vectors
 * that this processor and its system have (level.c), and goes on in that copy's main.
 *
 * The Makefile compiles the program once per level of the x86-64 ABI, links each copy into one object whose names are
 * its own, and calls its main main_LEVEL. So no other file knows of levels, and loops that the compiler turned into
 * vectors gain as much as those written with them. A level that the compiler did not know is missing here: a null
 * pointer. */
#include "base/level.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Main(int argc, char **argv);
extern Main main_x86_64;
extern Main main_x86_64_v3 __attribute__((weak));
extern Main main_x86_64_v4 __attribute__((weak));
extern Main main_x86_64_v4_bf16 __attribute__((weak));
extern Main main_x86_64_v4_amx __attribute__((weak));

int main(int argc, char **argv) {
    Main *const copy[LEVELS] = {main_x86_64, main_x86_64_v3, main_x86_64_v4, main_x86_64_v4_bf16, main_x86_64_v4_amx};
    const char *program = argc > 0 ? argv[0] : "imagebart", *slash = strrchr(program, '/');
    char refusal[LEVEL_TEXT];
    int there[LEVELS];
    for (int i = 0; i < LEVELS; i++) there[i] = copy[i] != NULL;
    const int take = level_take(there, refusal);
    if (take < 0) fprintf(stderr, "%s: %s\n", slash ? slash + 1 : program, refusal);
    if (take < 0) return 2;
    unsetenv("IMAGEBART_LEVEL"); /* obeyed: options_parse complains of one that nobody obeyed */
    return copy[take](argc, argv);
}
