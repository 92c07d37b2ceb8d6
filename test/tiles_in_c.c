/* tiles_in_c.c - each thread's tiles in plain C, their product, and what base/tiles.c asks of processor and system. It
 * stands for a processor: it is compiled for this one and without sanitizers, whatever the code under test is compiled for. */
#include "test/tiles_in_c.h"

#include <float.h>
#include <math.h>

_Thread_local TilesInC tiles_in_c;
int tiles_in_c_refused; /* by the system: errno */

int processor_has_tiles(void);
int processor_has_tiles(void) {
    return 1;
}

int system_refuses_tiles(void);
int system_refuses_tiles(void) {
    return tiles_in_c_refused;
}

static inline float no_denormal(float x) {
    return fabsf(x) < FLT_MIN ? 0 * x : x; /* keeps the sign */
}

/* The numbers of a row of pairs of bf16: even or odd ones. Columns that a tile does not have are zeros. */
static inline void tile_row_numbers(float *to, const unsigned char *row, int odd) {
    for (int i = 0; i < 16; i++) {
        uint16_t half;
        memcpy(&half, row + 4 * i + 2 * odd, sizeof half);
        const uint32_t bits = (uint32_t)half << 16;
        memcpy(to + i, &bits, sizeof bits);
        to[i] = no_denormal(to[i]);
    }
}

void tile_add_product(int sum, int a, int b) {
    TileInC *c = tile_in_c(sum);
    const TileInC *x = tile_in_c(a), *y = tile_in_c(b);
    const int pairs = x->bytes / 4;
    float of_b[2][16][16];
    if (c->rows != x->rows || c->bytes != y->bytes || pairs != y->rows) {
        fprintf(stderr, "shapes of tiles do not match: %d x %d, %d x %d, %d x %d\n", c->rows, c->bytes / 4, x->rows,
                pairs, y->rows, y->bytes / 4);
        abort();
    }
    for (int k = 0; k < pairs; k++)
        for (int odd = 0; odd < 2; odd++) tile_row_numbers(of_b[odd][k], y->row[k], odd);
    for (int m = 0; m < c->rows; m++) {
        float of_a[2][16], part[2][16] = {{0}}, total[16];
        for (int odd = 0; odd < 2; odd++) {
            tile_row_numbers(of_a[odd], x->row[m], odd);
            for (int k = 0; k < pairs; k++)
                for (int n = 0; n < 16; n++)
                    part[odd][n] = no_denormal(fmaf(of_a[odd][k], of_b[odd][k][n], part[odd][n]));
        }
        memcpy(total, c->row[m], sizeof total);
        for (int n = 0; n < 16; n++)
            total[n] = no_denormal(no_denormal(total[n]) + no_denormal(part[0][n] + part[1][n]));
        memcpy(c->row[m], total, (size_t)c->bytes);
    }
}
