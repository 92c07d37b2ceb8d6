/* level.h - the levels of x86-64 for which a program or the library holds copies of itself. */
#ifndef LEVEL_H
#define LEVEL_H

/* Each needs all that those before it need. */
enum { LEVEL_X86_64, LEVEL_V3, LEVEL_V4, LEVEL_V4_BF16, LEVEL_V4_AMX, LEVELS, LEVEL_TEXT = 256 };
/* Which of the copies that there are to take: that with the widest vectors that this machine has; or the one that
 * IMAGEBART_LEVEL in the environment names. -1: that cannot be, and refusal says why. The first is always there. */
int level_take(const int there[LEVELS], char refusal[LEVEL_TEXT]);

#endif
