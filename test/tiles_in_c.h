/* tiles_in_c.h - the tile instructions of Intel's processors (AMX) in plain C, for machines that have none: what
 * kernels/tiles.h calls when it is compiled with TILES_IN_C.
 *
 * As Intel's manual defines them (Software Developer's Manual, volume 2: LDTILECFG, TILELOADD, TILESTORED, TDPBF16PS): a
 * product has a sum for the even and one for the odd k of its tiles, each of fused multiply-adds in order, which are
 * added at its end; numbers below 2^-126 count as 0. What a processor would refuse (tiles that nobody configured, shapes
 * that do not match) ends the program. Each thread has tiles of its own. */
#ifndef TILES_IN_C_H
#define TILES_IN_C_H

#include <float.h>
#include <math.h>
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

static inline float no_denormal(float x) {
    return fabsf(x) < FLT_MIN ? 0 * x : x; /* keeps the sign */
}

/* The numbers of a row of pairs of bf16: even (or odd) ones of n pairs. */
static inline void tile_row_numbers(float *to, const unsigned char *row, int odd, int n) {
    for (int i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, row + 4 * i + 2 * odd, sizeof half);
        const uint32_t bits = (uint32_t)half << 16;
        memcpy(to + i, &bits, sizeof bits);
        to[i] = no_denormal(to[i]);
    }
}

static inline void tile_add_product(int sum, int a, int b) {
    TileInC *c = tile_in_c(sum);
    const TileInC *x = tile_in_c(a), *y = tile_in_c(b);
    const int pairs = x->bytes / 4, columns = c->bytes / 4;
    float of_b[2][16][16];
    if (c->rows != x->rows || c->bytes != y->bytes || pairs != y->rows) {
        fprintf(stderr, "shapes of tiles do not match: %d x %d, %d x %d, %d x %d\n", c->rows, columns, x->rows, pairs,
                y->rows, y->bytes / 4);
        abort();
    }
    for (int k = 0; k < pairs; k++)
        for (int odd = 0; odd < 2; odd++) tile_row_numbers(of_b[odd][k], y->row[k], odd, columns);
    for (int m = 0; m < c->rows; m++) {
        float of_a[2][16], part[2][16] = {{0}}, total[16];
        for (int odd = 0; odd < 2; odd++) {
            tile_row_numbers(of_a[odd], x->row[m], odd, pairs);
            for (int k = 0; k < pairs; k++)
                for (int n = 0; n < columns; n++)
                    part[odd][n] = no_denormal(fmaf(of_a[odd][k], of_b[odd][k][n], part[odd][n]));
        }
        memcpy(total, c->row[m], sizeof total);
        for (int n = 0; n < columns; n++)
            total[n] = no_denormal(no_denormal(total[n]) + no_denormal(part[0][n] + part[1][n]));
        memcpy(c->row[m], total, (size_t)c->bytes);
    }
}

#endif
