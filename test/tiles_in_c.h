/* tiles_in_c.h - the tile instructions of Intel's processors (AMX) in plain C, for machines that have none: what
 * kernels/tiles.h calls when it is compiled with TILES_IN_C.
 *
 * As Intel's manual defines them (Software Developer's Manual, volume 2: LDTILECFG, TILELOADD, TILESTORED, TDPBF16PS): a
 * product has a sum for the even and one for the odd k of its tiles, each of fused multiply-adds in order, which are
 * added at its end; numbers below 2^-126 count as 0. What a processor would refuse (tiles that nobody configured, shapes
 * that do not match) ends the program. Each thread has tiles of its own. */
#ifndef TILES_IN_C_H
#define TILES_IN_C_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int rows, bytes;
    unsigned char row[16][64];
} TileInC;
typedef struct {
    int configured;
    TileInC tile[8];
} TilesInC;
extern _Thread_local TilesInC tiles_in_c; /* tiles_in_c.c */

static inline TileInC *tile_in_c(int t) {
    if (!tiles_in_c.configured || t < 0 || t > 7 || !tiles_in_c.tile[t].rows) {
        fprintf(stderr, "tile %d is used, but not configured on this thread\n", t);
        abort();
    }
    return &tiles_in_c.tile[t];
}

static inline void tile_configure(const void *shape) {
    const unsigned char *p = (const unsigned char *)shape;
    memset(&tiles_in_c, 0, sizeof tiles_in_c);
    for (int i = 0; i < 64; i++)
        if (i == 0 ? p[i] != 1 : (i < 16 || (i >= 32 && i < 48) || i >= 56) && p[i] != 0)
            abort(); /* palette; reserved */
    for (int t = 0; t < 8; t++) {
        uint16_t bytes;
        memcpy(&bytes, p + 16 + 2 * t, sizeof bytes);
        if (bytes > 64 || p[48 + t] > 16) abort();
        tiles_in_c.tile[t].bytes = bytes, tiles_in_c.tile[t].rows = p[48 + t];
    }
    tiles_in_c.configured = 1;
}

static inline void tile_release(void) {
    memset(&tiles_in_c, 0, sizeof tiles_in_c);
}

static inline void tile_zero(int t) {
    memset(tile_in_c(t)->row, 0, sizeof tile_in_c(t)->row);
}

static inline void tile_load(int t, const void *p, size_t stride) {
    TileInC *to = tile_in_c(t);
    for (int i = 0; i < to->rows; i++) memcpy(to->row[i], (const char *)p + (size_t)i * stride, (size_t)to->bytes);
}

static inline void tile_store(int t, void *p, size_t stride) {
    const TileInC *from = tile_in_c(t);
    for (int i = 0; i < from->rows; i++) memcpy((char *)p + (size_t)i * stride, from->row[i], (size_t)from->bytes);
}

void tile_add_product(int sum, int a, int b);

#endif
