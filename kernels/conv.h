/* conv.h - what conv.c and winograd.c share: a convolution as products of weights with patches, cut into tiles, and
 * what winograd.c does for conv.c. Nobody else includes it; what others may use is in imagebart.h. */
#ifndef CONV_H
#define CONV_H

#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { ALIGN = 16 }; /* reals between the starts of two areas: a cache line or more */

enum { KEPT = -1 };
typedef enum { FINE, DOUBLED, APART } Source; /* how a row of the source is read */
typedef enum { ALL, SUMS, LAST } Results;     /* what of a block is kept */

/* One product: results (B,M,..) = weights (M, C*n) x patches of the source (B,C,..). */
typedef struct {
    size_t B, C, M, gh, gw; /* grid of results or blocks */
    size_t block, side,
        n; /* Winograd: results and points along a side of a block, n = side*side; direct: 0, 0, 1 or 9 */
    int backward;
    Source source, cells; /* of patches; of x in the gradient of the weights */
    Results results;
    int drops;                             /* the i and j that drop out, or KEPT */
    size_t images, rows, row_tiles, tiles; /* a tile: `rows` grid rows of `images` pictures */
} Product;

typedef struct {
    size_t b, images, y, rows, cols; /* cols = images*rows*gw */
} Tile;

/* Reals from one of the n matrices (rows, cols) to the next. A cache line more than they have: Winograd's transforms go
 * through all n side by side, and a power of two apart they would fight for one place in the cache. */
static inline size_t matrix_step(size_t rows, size_t cols) {
    return round_up(rows * cols, ALIGN) + ALIGN;
}

/* ---- winograd.c. What it transforms is (n, channels, cols), with matrix_step between the n ---- */

/* Scratch of the transforms, for each thread */
size_t winograd_line_reals(const Product *p);
/* U (n, kernels) of kernels w (C*M, 3, 3); backward they are mirrored */
void winograd_weights(real *U, const real *w, const Product *p);
/* dw (C*M, 3, 3) += the gradient that the sum of the parts dU (parts, n, C, M), in order, says */
void winograd_weight_gradients(real *dw, real *dU, size_t parts, const Product *p);
/* A tile of y = U in s->weights times patches of x, + bias (M) + add (as y) unless NULL; columns, stage: of this
 * thread */
void winograd_forward(real *y, const Product *p, const Tile *t, const ConvScratch *s, const real *x, const real *bias,
                      const real *add, real *columns, real *stage);
/* partial (n, C, M) = or, if begun, += dU of a tile, unless x is NULL;  dx at the tile = or, if more, += unless NULL */
void winograd_backward(real *dx, real *partial, const Product *p, const Tile *t, const ConvScratch *s, const real *dy,
                       const real *x, int begun, int more, real *columns, real *stage);

#ifdef __cplusplus
}
#endif
#endif
