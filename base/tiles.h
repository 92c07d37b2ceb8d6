/* tiles.h - may this process use the tile registers of Intel's processors, AMX? */
#ifndef TILES_H
#define TILES_H

/* 1: the compiler may use their instructions. Older clang has names of its own. */
#if (defined(__AMX_BF16__) && defined(__AMX_INT8__)) || (defined(__AMXBF16__) && defined(__AMXINT8__))
#define TILES_COMPILED 1
#else
#define TILES_COMPILED 0
#endif

/* 1: this processor has them, with products of bf16, and the system has granted them to this process; both are asked
 * once. */
int tiles_here(void);

/* Where the system has refused what the processor has: what goes on instead, and why. Else "", also before anybody has
 * asked. */
enum { TILES_TEXT = 192 };
const char *tiles_refusal(char text[TILES_TEXT]);

#endif
