/* conv.c - convolutions on a CPU, forward and backward, made of matrix products.
 *
 * Owns: 1x1 and 3x3 convolutions of (B,C,h,w) arrays with padding 1, at stride 1, at stride 2 (padded right and below)
 * and after nearest doubling, and their gradients. vqgan.c has the plain loops that say what each computes. Refuses:
 * nothing; sizes are the caller's to check, memory the caller's to give.
 *
 * All of them, in both directions, are matrix products of weights with patches of a source. The grid of results is cut
 * into tiles whose patches stay in the L2 cache; threads share tiles, and no sum crosses from one to another.
 *
 * Backward, one gather of the gradient's patches serves both results, for the gradient of a convolution is a
 * convolution of the gradient with the mirrored kernel: dx = w^T patches(dy)          dw^T = x patches(dy)^T
 *
 * Direct: patches are the 1 or 9 source pixels around each result, the kernel is used as it is. For 1x1 convolutions,
 * few channels and odd sizes.
 *
 * Winograd: blocks of 2x2 or 4x4 results at a time, which mostly takes less than half or a quarter of the
 * multiplications. For everything else.
 *
 * In the order of this file: which way, and the tiles; the direct way; Winograd's; both together, which is what the
 * rest of the program calls. */

#include <string.h>

#include "kernels/kernels.h"

enum { ALIGN = 16 }; /* reals between the starts of two areas: a cache line or more */

/* Scratch of a convolution: for each thread patches, products and rows in transformation; for all of them the weights,
 * transformed or transposed, and partial sums of the weights' gradient. */
typedef struct {
    size_t threads, column_reals, stage_reals, line_reals, weight_reals, partial_reals;
    real *columns, *stages, *lines, *weights, *partials;
} Scratch;

enum { KEPT = -1 };
typedef enum { FINE, DOUBLED, APART } Source; /* how a row of the source is read */
typedef enum { ALL, SUMS, LAST } Results;     /* what of a block is kept */

/* One product: results (B,M,..) = weights (M, C*n) x patches of the source (B,C,..). */
typedef struct {
    size_t B, C, M, gh, gw; /* grid of results or blocks */
    size_t block, side,
        n; /* Winograd: results and points along a side of a block, n = side*side; direct: 0, 0, 1 or 9 */
    int backward;
    Source source, pixels; /* of patches; of x in the gradient of the weights */
    Results results;
    int drops;                             /* the i and j that drop out, or KEPT */
    Precision precision;                   /* of the direct way */
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

enum {
    SLICE = 4096,      /* numbers of a task that adds parts up */
    PARTS = 16,        /* partial sums of a weight gradient: fixed, so that threads do not change bits */
    FEW_CHANNELS = 16, /* fewer: transforms cost more than they save */
    FEW_PIXELS = 1024  /* fewer: blocks of 4x4 leave too narrow matrices */
};
/* Of a tile's patches, unless that is less than MIN_COLUMNS; see cut_tiles */
static const size_t PATCH_REALS = 64 * 1024;
static const size_t MIN_COLUMNS = 64;

/* Results along a side of a block of the fastest algorithm; 0: direct. It depends on one picture, not on how many there
 * are, so that a picture alone has the same bits as in a batch. */
static size_t best_block(const Conv *c) {
    if (c->kind == CONV_UP || c->kind == CONV_DOWN) return 2;
    if (c->kind == CONV1 || min_size(c->C, c->M) < FEW_CHANNELS || c->h % 2 || c->w % 2) return 0;
    return c->h % 4 == 0 && c->w % 4 == 0 && c->h * c->w >= FEW_PIXELS ? 4 : 2;
}

/* Columns of a tile's patches of so many reals, if the grid is not wider. */
static size_t tile_columns(const Product *p, size_t reals) {
    return max_size(reals / (p->C * p->n), MIN_COLUMNS);
}

/* What a tile's patches take of a picture that is cut: forward, a quarter of the L2 cache. Backward, tiles are
 * pieces of the sums for the weights: their sizes are part of the promise on bits. */
static size_t patch_reals(const Product *p) {
    return p->backward ? PATCH_REALS : l2_bytes() / 4 / sizeof(real);
}

/* Cuts the grid: whole rows, several pictures where one is small. Which are small does not depend on caches: sums of
 * several are added to what is there in another order. */
static void cut_tiles(Product *p) {
    size_t rows = max_size(tile_columns(p, PATCH_REALS) / p->gw, 1);
    p->images = p->row_tiles = 1;
    p->rows = p->gh;
    if (rows >= p->gh) {
        p->images = min_size(rows / p->gh, p->B);
    } else {
        rows = max_size(tile_columns(p, patch_reals(p)) / p->gw, 1);
        p->row_tiles = (p->gh + rows - 1) / rows;
        p->rows = (p->gh + p->row_tiles - 1) / p->row_tiles; /* equal heights, not one thin rest */
        p->row_tiles = (p->gh + p->rows - 1) / p->rows;
    }
    p->tiles = (p->B + p->images - 1) / p->images * p->row_tiles;
}

/* Is it conv_bf16.c's? In bf16 and bf16x3 only sources of few channels stay here, whose patches fill the tiles of a
 * product better. */
static int in_blocks(const Compute *on, const Conv *c, int backward) {
    return on->precision != PRECISION_F32 && (c->kind != CONV3 || (backward ? c->M : c->C) >= FEW_CHANNELS);
}

static Product make_product(Precision precision, const Conv *c, size_t block, int backward) {
    const size_t pixels =
        block && c->kind != CONV_UP ? block : 1; /* of c's grid in one of the product's, along a side */
    Product p;
    memset(&p, 0, sizeof p);
    p.B = c->B;
    p.C = backward ? c->M : c->C;
    p.M = backward ? c->C : c->M;
    p.gh = c->h / pixels;
    p.gw = c->w / pixels;
    p.block = block;
    p.side = block ? block + 2 : 0;
    p.n = block ? p.side * p.side : c->kind == CONV1 ? 1 : 9;
    p.backward = backward;
    p.drops = KEPT;
    p.precision = precision;
    if (c->kind == CONV_UP) {
        p.source = backward ? FINE : DOUBLED;
        p.pixels = DOUBLED;
        p.results = backward ? SUMS : ALL;
        p.drops = 2;
    } else if (c->kind == CONV_DOWN) {
        p.source = backward ? APART : FINE;
        p.results = backward ? ALL : LAST;
        p.drops = backward ? 3 : 0;
    }
    cut_tiles(&p);
    return p;
}

static Tile tile_at(const Product *p, size_t i) {
    Tile t;
    t.b = i / p->row_tiles * p->images;
    t.images = min_size(p->images, p->B - t.b);
    t.y = i % p->row_tiles * p->rows;
    t.rows = min_size(p->rows, p->gh - t.y);
    t.cols = t.images * t.rows * p->gw;
    return t;
}

/* ---- The direct way ---- */

/* to (rows,gw) = the pixels (y+dy, x+dx) of a plane: a shifted copy with zeros where the shift leaves the plane */
static void gather_shifted(real *to, const real *plane, const Product *p, const Tile *t, int dy, int dx) {
    const size_t w = p->gw, above = dy < 0 && t->y == 0, below = dy > 0 && t->y + t->rows == p->gh;
    const size_t n = (t->rows - min_size(above + below, t->rows)) * w;
    memset(to, 0, above * w * sizeof(real));
    if (below) memset(to + (t->rows - 1) * w, 0, w * sizeof(real));
    if (n == 0) return;
    to += above * w;
    const real *from = plane + (t->y + above) * w;
    from = dy < 0 ? from - w : dy > 0 ? from + w : from;
    if (dx == 0) {
        memcpy(to, from, n * sizeof(real));
    } else if (dx < 0) {
        memcpy(to + 1, from, (n - 1) * sizeof(real));
        for (size_t i = 0; i < n; i += w) to[i] = 0;
    } else {
        memcpy(to, from + 1, (n - 1) * sizeof(real));
        for (size_t i = w - 1; i < n; i += w) to[i] = 0;
    }
}

/* Where a tile begins in channel c of picture b of a (B,C,gh,gw) array. */
static size_t tile_offset(const Product *p, const Tile *t, size_t b, size_t C, size_t c) {
    return (((t->b + b) * C + c) * p->gh + t->y) * p->gw;
}

/* The n pixels around each of a tile's, of x (B,C,gh,gw): (C*n, cols) with row stride *ld, gathered into `to` unless
 * they stand so in x. */
static const real *gather(real *to, size_t *ld, const Product *p, const Tile *t, const real *x, size_t C, size_t n) {
    if (n == 1 && t->images == 1) {
        *ld = p->gh * p->gw;
        return x + tile_offset(p, t, 0, C, 0);
    }
    *ld = t->cols;
    for (size_t c = 0; c < C; c++)
        for (size_t k = 0; k < n; k++)
            for (size_t b = 0; b < t->images; b++) {
                const real *plane = x + ((t->b + b) * C + c) * p->gh * p->gw;
                const size_t at = n == 1 ? 4 : p->backward ? 8 - k : k;
                gather_shifted(to, plane, p, t, (int)(at / 3) - 1, (int)(at % 3) - 1);
                to += t->rows * p->gw;
            }
    return to - C * n * t->cols;
}

/* out at the tile = stage (M, cols) + bias (M) + add (as out); bias and add may be NULL, add may be out itself */
static void store_tile(real *out, const Product *p, const Tile *t, const real *stage, size_t ld, const real *bias,
                       const real *add) {
    const size_t run = t->rows * p->gw;
    for (size_t m = 0; m < p->M; m++)
        for (size_t b = 0; b < t->images; b++) {
            const size_t at = tile_offset(p, t, b, p->M, m);
            const real *from = stage + m * ld + b * run, shift = bias ? bias[m] : 0;
            for (size_t i = 0; i < run; i++) out[at + i] = from[i] + shift + (add ? add[at + i] : 0);
        }
}

/* out = or += weight (M, C*n) x patch, + bias + add unless NULL */
static void direct_products(real *out, const Product *p, const Tile *t, const real *weight, const real *patch,
                            size_t ld, const real *bias, const real *add, real *stage) {
    const int in_place = t->images == 1;
    real *to = in_place ? out + tile_offset(p, t, 0, p->M, 0) : stage;
    const size_t K = p->C * p->n, ld_to = in_place ? p->gh * p->gw : t->cols;
    const int adds = in_place && add == out;
    gemm(p->precision, 0, 0, p->M, t->cols, K, weight, K, patch, ld, adds, to, ld_to);
    if (!in_place || bias || (add && !adds)) store_tile(out, p, t, to, ld_to, bias, adds ? NULL : add);
}

static void direct_forward(real *y, const Product *p, const Tile *t, const real *x, const real *w, const real *bias,
                           const real *add, real *columns, real *stage) {
    size_t ld;
    const real *patch = gather(columns, &ld, p, t, x, p->C, p->n);
    direct_products(y, p, t, w, patch, ld, bias, add, stage);
}

/* partial (C*n, M) = or += patches(dy) x^T unless x is NULL;  dx = or += weight patches(dy) unless NULL */
static void direct_backward(real *dx, real *partial, const Product *p, const Tile *t, const real *dy, const real *x,
                            const real *weight, int begun, int accumulate, real *columns, real *stage) {
    size_t ld, ldx;
    const real *patch = gather(columns, &ld, p, t, dy, p->C, p->n);
    const real *pixels = x ? gather(stage, &ldx, p, t, x, p->M, 1) : NULL;
    if (pixels) gemm(p->precision, 0, 1, p->C * p->n, p->M, t->cols, patch, ld, pixels, ldx, begun, partial, p->M);
    if (dx) direct_products(dx, p, t, weight, patch, ld, NULL, accumulate ? dx : NULL, stage);
}

/* Backward: weight (M, C*n) from w (C,M,n) */
typedef struct {
    real *weight;
    const real *w;
    const Product *p;
} WeightTurn;

static void direct_weights_task(void *context, size_t m) {
    const WeightTurn *t = (const WeightTurn *)context;
    const Product *p = t->p;
    for (size_t c = 0; c < p->C; c++)
        for (size_t k = 0; k < p->n; k++) t->weight[(m * p->C + c) * p->n + k] = t->w[(c * p->M + m) * p->n + k];
}

static void direct_weights(real *weight, const real *w, const Product *p) {
    WeightTurn t = {weight, w, p};
    parallel_for(threads_free(), p->M, direct_weights_task, &t);
}

/* dw (C,M,n) += total (C*n, M) */
static void add_direct_gradient(real *dw, const real *total, const Product *p) {
    for (size_t c = 0; c < p->C; c++)
        for (size_t k = 0; k < p->n; k++)
            for (size_t m = 0; m < p->M; m++) dw[(c * p->M + m) * p->n + k] += total[(c * p->n + k) * p->M + m];
}

/* ---- Winograd's convolution: fewer multiplications for 3x3 kernels, forward and backward ----
 *
 * F(2x2,3x3) (Lavin and Gray 2016): 16 multiplications instead of 36 for a block of 2x2 results. With
 *
 *          1  0 -1  0           1    0    0            1  0
 *    B^T = 0  1  1  0     G =  1/2  1/2  1/2      A =  1  1        U = G g G^T of each kernel g
 *          0 -1  1  0          1/2 -1/2  1/2           1 -1        V = B^T d B of the 4x4 source pixels d at each block
 *          0  1  0 -1           0    0    1            0 -1
 *
 * the results are A^T [U .* V] A: for each of the 16 points k = 4i + j one product of U[k] (M,C) with V[k] (C, blocks).
 * Where the source or the results are coarse, one value of i, and of j, drops out, which leaves 9 products:
 *
 *     CONV_UP, forward       nearest doubling, then 3x3: the source is doubled              i = 2 drops out
 *     CONV_UP, backward      only the sum of each block is wanted                           i = 2
 *     CONV_DOWN, forward     3x3, stride 2, padded right and below: only the last of each   i = 0
 *                            block is wanted (SPEC section 8)
 *     CONV_DOWN, backward    source pixels stand apart, with zeros around                    i = 3
 *
 * F(4x4,3x3): 36 multiplications instead of 144 for a block of 4x4 results. Both algorithms interpolate polynomials,
 * the first at 0, 1, -1 and infinity, this one at 0, +-P, +-Q and infinity: with p(x) = x (x^2-P^2) (x^2-Q^2), the row
 * of a point t holds the coefficients of p(x)/(x-t) in B^T, (1 t t^2)/p'(t) in G, and (1 t t^2 t^3) in A; for infinity
 * those are p(x), (0 0 1) and (0 0 0 1). The textbook's points 1 and 2 lose twice as much precision as these: on the
 * decoder at full size the error is 1.4e-5 of the largest result, with these 8e-6, with F(2x2,3x3) 6e-6. */

/* -- Transforms: V and the products are (n, channels, cols), n = side*side. The transform of a square is one along rows
 * and one along columns, each over lines of as many numbers as there are blocks in a row -- */

/* Scratch of the transforms: a square of lines, and a row in phases or two squares of results. */
static size_t winograd_line_reals(const Product *p) {
    return round_up((p->n + 2 * p->block * p->side) * p->gw + p->block * (p->gw + 2 * ALIGN), ALIGN);
}

/* The points of F(4x4,3x3) besides 0 and infinity, +-P and +-Q, and their squares. */
static const real P = (real)0.625, Q = (real)1.5, PP = (real)0.390625, QQ = (real)2.25;

/* to[k*step] (n) = row k of B^T times the lines d */
static void times_b4(real *to, size_t step, const real *const *d, size_t n) {
    const real *d0 = d[0], *d1 = d[1], *d2 = d[2], *d3 = d[3];
    real *t1 = to + step, *t2 = t1 + step, *t3 = t2 + step;
#pragma omp simd
    for (size_t i = 0; i < n; i++) {
        to[i] = d0[i] - d2[i];
        t1[i] = d1[i] + d2[i];
        t2[i] = d2[i] - d1[i];
        t3[i] = d1[i] - d3[i];
    }
}

static void times_b6(real *to, size_t step, const real *const *d, size_t n) {
    const real *d0 = d[0], *d1 = d[1], *d2 = d[2], *d3 = d[3], *d4 = d[4], *d5 = d[5];
    real *t1 = to + step, *t2 = t1 + step, *t3 = t2 + step, *t4 = t3 + step, *t5 = t4 + step;
#pragma omp simd
    for (size_t i = 0; i < n; i++) {
        const real p_even = d4[i] - QQ * d2[i], p_odd = P * (d3[i] - QQ * d1[i]);
        const real q_even = d4[i] - PP * d2[i], q_odd = Q * (d3[i] - PP * d1[i]);
        to[i] = PP * QQ * d0[i] - (PP + QQ) * d2[i] + d4[i];
        t1[i] = p_even + p_odd;
        t2[i] = p_even - p_odd;
        t3[i] = q_even + q_odd;
        t4[i] = q_even - q_odd;
        t5[i] = PP * QQ * d1[i] - (PP + QQ) * d3[i] + d5[i];
    }
}

static void times_b(const Product *p, real *to, size_t step, const real *const *d, size_t n) {
    p->side == 4 ? times_b4(to, step, d, n) : times_b6(to, step, d, n);
}

/* to[k*step] (n) = row k of A times the lines d, for the gradient of the weights */
static void times_a4(real *to, size_t step, const real *const *d, size_t n) {
    const real *d0 = d[0], *d1 = d[1];
    real *t1 = to + step, *t2 = t1 + step, *t3 = t2 + step;
#pragma omp simd
    for (size_t i = 0; i < n; i++) {
        to[i] = d0[i];
        t1[i] = d0[i] + d1[i];
        t2[i] = d0[i] - d1[i];
        t3[i] = -d1[i];
    }
}

static void times_a6(real *to, size_t step, const real *const *d, size_t n) {
    const real *d0 = d[0], *d1 = d[1], *d2 = d[2], *d3 = d[3];
    real *t1 = to + step, *t2 = t1 + step, *t3 = t2 + step, *t4 = t3 + step, *t5 = t4 + step;
#pragma omp simd
    for (size_t i = 0; i < n; i++) {
        const real p_even = d0[i] + PP * d2[i], p_odd = P * (d1[i] + PP * d3[i]);
        const real q_even = d0[i] + QQ * d2[i], q_odd = Q * (d1[i] + QQ * d3[i]);
        to[i] = d0[i];
        t1[i] = p_even + p_odd;
        t2[i] = p_even - p_odd;
        t3[i] = q_even + q_odd;
        t4[i] = q_even - q_odd;
        t5[i] = d3[i];
    }
}

static void times_a(const Product *p, real *to, size_t step, const real *const *d, size_t n) {
    p->side == 4 ? times_a4(to, step, d, n) : times_a6(to, step, d, n);
}

/* to[k*step] (n) = row k of A^T times the lines d */
static void times_at4(real *to, size_t step, const real *const *d, size_t n) {
    const real *d0 = d[0], *d1 = d[1], *d2 = d[2], *d3 = d[3];
    real *t1 = to + step;
#pragma omp simd
    for (size_t i = 0; i < n; i++) {
        to[i] = d0[i] + d1[i] + d2[i];
        t1[i] = d1[i] - d2[i] - d3[i];
    }
}

static void times_at6(real *to, size_t step, const real *const *d, size_t n) {
    const real *d0 = d[0], *d1 = d[1], *d2 = d[2], *d3 = d[3], *d4 = d[4], *d5 = d[5];
    real *t1 = to + step, *t2 = t1 + step, *t3 = t2 + step;
#pragma omp simd
    for (size_t i = 0; i < n; i++) {
        const real p_sum = d1[i] + d2[i], p_gap = P * (d1[i] - d2[i]);
        const real q_sum = d3[i] + d4[i], q_gap = Q * (d3[i] - d4[i]);
        to[i] = d0[i] + p_sum + q_sum;
        t1[i] = p_gap + q_gap;
        t2[i] = PP * p_sum + QQ * q_sum;
        t3[i] = PP * p_gap + QQ * q_gap + d5[i];
    }
}

static void times_at(const Product *p, real *to, size_t step, const real *const *d, size_t n) {
    p->side == 4 ? times_at4(to, step, d, n) : times_at6(to, step, d, n);
}

/* What is n numbers long and needed a channel later: planes lie too far apart for the processor to guess it. */
static void prefetch(const real *x, size_t n, int exists) {
    for (size_t i = 0; exists && i < n; i += ALIGN) __builtin_prefetch(x + i);
}

/* Numbers in a plane that the fine picture of whole blocks is made from. */
static size_t source_pixels(const Product *p, Source source) {
    return p->gh * p->gw * (source == FINE ? p->block * p->block : 1);
}

/* Row `row` of the fine picture behind a plane, as `block` phases: pixel x stands at to[(x+1) % block * pitch +
 * (x+1) / block], between two zeros. */
static void fetch_row(real *to, size_t pitch, const Product *p, Source source, const real *plane, size_t row) {
    const size_t n = p->gw;
    const real *from = plane + row / 2 * n;
    real *first = to + pitch, *second = first + pitch, *third = second + pitch, *last = to + 1;
    to[0] = first[n] = 0;
    if (source == FINE && p->block == 4) {
        from = plane + row * 4 * n;
#pragma omp simd
        for (size_t i = 0; i < n; i++) {
            first[i] = from[4 * i];
            second[i] = from[4 * i + 1];
            third[i] = from[4 * i + 2];
            last[i] = from[4 * i + 3];
        }
    } else if (source == FINE) {
        from = plane + row * 2 * n;
#pragma omp simd
        for (size_t i = 0; i < n; i++) {
            first[i] = from[2 * i];
            last[i] = from[2 * i + 1];
        }
    } else if (source == DOUBLED || row % 2) {
        for (size_t i = 0; i < n; i++) first[i] = source == DOUBLED ? from[i] : 0;
        memcpy(last, from, n * sizeof *last);
    } else {
        memset(first, 0, n * sizeof *first);
        memset(last, 0, n * sizeof *last);
    }
}

/* What the tasks of a transform or of the products of a tile share. Inside a loop over tiles they run one after the
 * other; where there are too few tiles for the threads, the threads share these tasks. */
typedef struct {
    const Product *p;
    const Tile *t;
    const Scratch *s;
    const real *x;
    real *V;
    const real *bias, *add, *U, *stage;
    real *out;
    int begun;
} TileJob;

static void tile_tasks(TileJob *j, size_t n, Task *task) {
    parallel_work((int)min_size((size_t)threads_free(), j->s->threads), n, task, j);
}

static real *own_lines(const Scratch *s) {
    return s->lines + thread_index() * s->line_reals;
}

/* V of one plane. `side` lines go round: a row of blocks shares two with the next. */
static void b_task(void *context, size_t cb) {
    const TileJob *j = (const TileJob *)context;
    const Product *p = j->p;
    const Tile *t = j->t;
    const size_t n = p->gw, side = p->side, step = matrix_step(p->C, t->cols), pitch = round_up(n + 1, ALIGN);
    const size_t c = cb / t->images, b = cb % t->images, plane_size = source_pixels(p, p->source);
    const size_t width = plane_size / p->gh / p->block; /* of the source, for each fine row */
    const real *plane = j->x + ((t->b + b) * p->C + c) * plane_size, *d[6];
    real *v = j->V + c * t->cols + b * t->rows * n, *lines = own_lines(j->s), *phases = lines + side * side * n;
    for (size_t i = 0; i < p->block * t->rows + 2; i++) { /* fine row block*y - 1 + i */
        const size_t row = p->block * t->y + i;
        real *line = lines + i % side * side * n;
        if (row == 0 || row > p->block * p->gh) {
            memset(line, 0, side * n * sizeof(real));
        } else {
            prefetch(plane + plane_size + (row - 1) * width, width, c + 1 < p->C);
            fetch_row(phases, pitch, p, p->source, plane, row - 1);
            for (size_t k = 0; k < side; k++) d[k] = phases + k % p->block * pitch + k / p->block;
            times_b(p, line, n, d, n);
        }
        if (i + 1 < side || (i + 1 - side) % p->block) continue;
        for (size_t m = 0; m < side; m++) {
            for (size_t k = 0; k < side; k++) d[k] = lines + ((i + 1 + k) % side * side + m) * n;
            times_b(p, v + m * step, side * step, d, n);
        }
        v += n;
    }
}

/* (n, M, cols) = A x A^T of every block of one plane of x */
static void a_task(void *context, size_t mb) {
    const TileJob *j = (const TileJob *)context;
    const Product *p = j->p;
    const Tile *t = j->t;
    const size_t n = p->gw, side = p->side, step = matrix_step(p->M, t->cols), pitch = round_up(n + 1, ALIGN);
    const size_t m = mb / t->images, b = mb % t->images;
    const real *plane = j->x + ((t->b + b) * p->M + m) * source_pixels(p, p->pixels), *d[6];
    real *v = j->V + m * t->cols + b * t->rows * n, *lines = own_lines(j->s), *phases = lines + side * side * n;
    for (size_t y = t->y; y < t->y + t->rows; y++, v += n) {
        for (size_t i = 0; i < p->block; i++) {
            fetch_row(phases, pitch, p, p->pixels, plane, p->block * y + i);
            for (size_t k = 0; k < p->block; k++) d[k] = phases + (k + 1) % p->block * pitch + (k + 1) / p->block;
            times_a(p, lines + i * side * n, n, d, n);
        }
        for (size_t i = 0; i < side; i++) {
            for (size_t k = 0; k < p->block; k++) d[k] = lines + (k * side + i) * n;
            times_a(p, v + i * step, side * step, d, n);
        }
    }
}

/* to (block*n) = `block` lines, interleaved */
static void interleave(real *to, const real *line, size_t block, size_t n) {
    const real *l1 = line + n, *l2 = l1 + n, *l3 = l2 + n;
    if (block == 4) {
#pragma omp simd
        for (size_t i = 0; i < n; i++) {
            to[4 * i] = line[i];
            to[4 * i + 1] = l1[i];
            to[4 * i + 2] = l2[i];
            to[4 * i + 3] = l3[i];
        }
    } else {
#pragma omp simd
        for (size_t i = 0; i < n; i++) {
            to[2 * i] = line[i];
            to[2 * i + 1] = l1[i];
        }
    }
}

/* out (n) = row + shift + add, which may be NULL or out itself */
static void put_row(real *out, const real *row, real shift, const real *add, size_t n) {
    if (add)
#pragma omp simd
        for (size_t i = 0; i < n; i++) out[i] = row[i] + shift + add[i];
    else
#pragma omp simd
        for (size_t i = 0; i < n; i++) out[i] = row[i] + shift;
}

/* out at the tile, channel m = the results of the products (n, M, cols) + bias (M) + add (as out); bias and add may be
 * NULL, add may be out itself */
static void store_task(void *context, size_t m) {
    const TileJob *j = (const TileJob *)context;
    const Product *p = j->p;
    const Tile *t = j->t;
    const size_t n = p->gw, side = p->side, block = p->block, step = matrix_step(p->M, t->cols);
    const size_t kept = p->results == ALL ? block : 1; /* of a block, along a side */
    const real shift = j->bias ? j->bias[m] : 0, *d[6];
    real *half = own_lines(j->s), *done = half + block * side * n, *row = done + block * block * n;
    for (size_t i = 0; i < t->images * t->rows; i++) {
        const size_t b = t->b + i / t->rows, y = t->y + i % t->rows;
        const size_t at = ((b * p->M + m) * p->gh + y) * kept * kept * n;
        const real *from = j->stage + m * t->cols + i * n;
        for (size_t l = 0; l < side; l++) {
            for (size_t k = 0; k < side; k++) d[k] = from + (k * side + l) * step;
            times_at(p, half + l * n, side * n, d, n);
        }
        for (size_t r = 0; r < block; r++) {
            for (size_t k = 0; k < side; k++) d[k] = half + (r * side + k) * n;
            times_at(p, done + r * block * n, n, d, n);
        }
        if (p->results == SUMS)
            for (size_t k = 0; k < n; k++) row[k] = done[k] + done[n + k] + done[2 * n + k] + done[3 * n + k];
        for (size_t r = 0; r < kept; r++) {
            if (p->results == ALL) interleave(row, done + r * block * n, block, n);
            const size_t out = at + r * kept * n;
            prefetch(j->out + out + p->gh * kept * kept * n, kept * n, m + 1 < p->M);
            put_row(j->out + out, p->results == LAST ? done + 3 * n : row, shift, j->add ? j->add + out : NULL,
                    kept * n);
        }
    }
}

/* -- The kernels' side: U = G g G^T, and back -- */

enum { KERNELS = 32 }; /* transformed side by side */

/* to[k*step] (KERNELS) = row k of G times the lines g, and its transpose to[k] = G^T h */
static void times_g(const Product *p, real *to, size_t step, const real *g0, const real *g1, const real *g2) {
    const real zero = 1 / (PP * QQ), p_unit = 1 / (2 * PP * (PP - QQ)), q_unit = 1 / (2 * QQ * (QQ - PP));
    for (size_t i = 0; i < KERNELS; i++) {
        const real half_sum = (g0[i] + g2[i]) / 2, half = g1[i] / 2;
        const real p_even = p_unit * (g0[i] + PP * g2[i]), p_odd = p_unit * P * g1[i];
        const real q_even = q_unit * (g0[i] + QQ * g2[i]), q_odd = q_unit * Q * g1[i];
        const int four = p->side == 4;
        to[i] = four ? g0[i] : zero * g0[i];
        to[step + i] = four ? half_sum + half : p_even + p_odd;
        to[2 * step + i] = four ? half_sum - half : p_even - p_odd;
        to[3 * step + i] = four ? g2[i] : q_even + q_odd;
        if (four) continue;
        to[4 * step + i] = q_even - q_odd;
        to[5 * step + i] = g2[i];
    }
}

static void times_gt(const Product *p, real *to, const real *h, size_t step) {
    const real zero = 1 / (PP * QQ), p_unit = 1 / (2 * PP * (PP - QQ)), q_unit = 1 / (2 * QQ * (QQ - PP));
    const real *h1 = h + step, *h2 = h1 + step, *h3 = h2 + step;
    real *t1 = to + KERNELS, *t2 = t1 + KERNELS;
    if (p->side == 4)
        for (size_t i = 0; i < KERNELS; i++) {
            const real half_sum = (h1[i] + h2[i]) / 2;
            to[i] = h[i] + half_sum;
            t1[i] = (h1[i] - h2[i]) / 2;
            t2[i] = half_sum + h3[i];
        }
    else
        for (size_t i = 0; i < KERNELS; i++) {
            const real p_sum = p_unit * (h1[i] + h2[i]), p_gap = p_unit * (h1[i] - h2[i]);
            const real q_sum = q_unit * (h3[i] + h3[step + i]), q_gap = q_unit * (h3[i] - h3[step + i]);
            to[i] = zero * h[i] + p_sum + q_sum;
            t1[i] = P * p_gap + Q * q_gap;
            t2[i] = PP * p_sum + QQ * q_sum + h3[2 * step + i];
        }
}

typedef struct {
    const Product *p;
    real *U, *dw;
    const real *w;
    size_t parts;
} KernelJob;

/* Backward, w is used mirrored: element k stands at 8-k. */
static size_t kernel_place(const Product *p, size_t k) {
    return p->backward ? 8 - k : k;
}

/* U (n, kernels) of kernels w (C*M, 3, 3) */
static void kernels_task(void *context, size_t task) {
    const KernelJob *j = (const KernelJob *)context;
    const Product *p = j->p;
    const size_t first = task * KERNELS, count = min_size(KERNELS, p->C * p->M - first), side = p->side;
    const size_t step = matrix_step(p->C, p->M);
    real g[9][KERNELS] = {{0}}, h[3][6][KERNELS], u[6][KERNELS];
    for (size_t i = 0; i < count; i++)
        for (size_t k = 0; k < 9; k++) g[k][i] = j->w[9 * (first + i) + kernel_place(p, k)];
    for (size_t c = 0; c < 3; c++) times_g(p, h[c][0], KERNELS, g[c], g[3 + c], g[6 + c]);
    for (size_t r = 0; r < side; r++) {
        times_g(p, u[0], KERNELS, h[0][r], h[1][r], h[2][r]);
        for (size_t c = 0; c < side; c++) memcpy(j->U + (r * side + c) * step + first, u[c], count * sizeof(real));
    }
}

/* dw (C*M, 3, 3) += G^T dU G, dU the sum of the parts (n, kernels) in order */
static void kernel_gradients_task(void *context, size_t task) {
    const KernelJob *j = (const KernelJob *)context;
    const Product *p = j->p;
    const size_t first = task * KERNELS, count = min_size(KERNELS, p->C * p->M - first), side = p->side;
    const size_t step = matrix_step(p->C, p->M);
    real u[6][KERNELS] = {{0}}, h[6][3][KERNELS], turned[3][6][KERNELS], g[3][KERNELS];
    for (size_t r = 0; r < side; r++) {
        for (size_t c = 0; c < side; c++)
            for (size_t part = 0; part < j->parts; part++) {
                const real *from = j->U + (part * p->n + r * side + c) * step + first;
                for (size_t i = 0; i < count; i++) u[c][i] = part ? u[c][i] + from[i] : from[i];
            }
        times_gt(p, h[r][0], u[0], KERNELS);
        for (size_t c = 0; c < 3; c++) memcpy(turned[c][r], h[r][c], sizeof turned[c][r]);
    }
    for (size_t c = 0; c < 3; c++) {
        times_gt(p, g[0], turned[c][0], KERNELS);
        for (size_t i = 0; i < count; i++)
            for (size_t r = 0; r < 3; r++) j->dw[9 * (first + i) + kernel_place(p, 3 * r + c)] += g[r][i];
    }
}

static void kernel_tasks(KernelJob *j, Task *task) {
    parallel_for(threads_free(), ceil_div(j->p->C * j->p->M, KERNELS), task, j);
}

static void winograd_weights(real *U, const real *w, const Product *p) {
    KernelJob j = {p, U, NULL, w, 0};
    kernel_tasks(&j, kernels_task);
}

static void winograd_weight_gradients(real *dw, real *dU, size_t parts, const Product *p) {
    KernelJob j = {p, dU, dw, NULL, parts};
    kernel_tasks(&j, kernel_gradients_task);
}

/* -- Products -- */

static int drops_out(const Product *p, size_t k) {
    return (int)(k / p->side) == p->drops || (int)(k % p->side) == p->drops;
}

/* V (n, M, cols) = U[k] x[k], or backward U[k]^T x[k] */
static void product_task(void *context, size_t k) {
    const TileJob *j = (const TileJob *)context;
    const Product *p = j->p;
    const size_t cols = j->t->cols, n = p->M * cols, ldu = p->backward ? p->M : p->C;
    real *to = j->V + k * matrix_step(p->M, cols);
    if (drops_out(p, k))
        memset(to, 0, n * sizeof(real));
    else
        gemm(PRECISION_F32, p->backward, 0, p->M, cols, p->C, j->U + k * matrix_step(p->C, p->M), ldu,
             j->x + k * matrix_step(p->C, cols), cols, 0, to, cols);
}

/* out (n, C, M) = or += V[k] stage[k]^T */
static void gradient_task(void *context, size_t k) {
    const TileJob *j = (const TileJob *)context;
    const Product *p = j->p;
    const size_t cols = j->t->cols;
    real *to = j->out + k * matrix_step(p->C, p->M);
    if (!drops_out(p, k))
        gemm(PRECISION_F32, 0, 1, p->C, p->M, cols, j->V + k * matrix_step(p->C, cols), cols,
             j->stage + k * matrix_step(p->M, cols), cols, j->begun, to, p->M);
    else if (!j->begun)
        memset(to, 0, p->C * p->M * sizeof(real));
}

/* out = or += products of U with the transformed source in columns, + bias + add unless NULL */
static void winograd_results(real *out, const Product *p, const Tile *t, const Scratch *s, const real *bias,
                             const real *add, const real *columns, real *stage) {
    TileJob multiply = {p, t, s, columns, stage, NULL, NULL, s->weights, NULL, NULL, 0};
    TileJob store = {p, t, s, NULL, NULL, bias, add, NULL, stage, out, 0};
    tile_tasks(&multiply, p->n, product_task);
    tile_tasks(&store, p->M, store_task);
}

static void winograd_forward(real *y, const Product *p, const Tile *t, const Scratch *s, const real *x,
                             const real *bias, const real *add, real *columns, real *stage) {
    TileJob source = {p, t, s, x, columns, NULL, NULL, NULL, NULL, NULL, 0};
    tile_tasks(&source, p->C * t->images, b_task);
    winograd_results(y, p, t, s, bias, add, columns, stage);
}

/* partial (n, C, M) = or += dU unless x is NULL;  dx = or += unless NULL */
static void winograd_backward(real *dx, real *partial, const Product *p, const Tile *t, const Scratch *s,
                              const real *dy, const real *x, int begun, int accumulate, real *columns, real *stage) {
    TileJob source = {p, t, s, dy, columns, NULL, NULL, NULL, NULL, NULL, 0};
    TileJob pixels = {p, t, s, x, stage, NULL, NULL, NULL, NULL, NULL, 0};
    TileJob gradient = {p, t, s, NULL, columns, NULL, NULL, NULL, stage, partial, begun};
    tile_tasks(&source, p->C * t->images, b_task);
    if (x) tile_tasks(&pixels, p->M * t->images, a_task);
    if (x) tile_tasks(&gradient, p->n, gradient_task);
    if (dx) winograd_results(dx, p, t, s, NULL, accumulate ? dx : NULL, columns, stage);
}

/* ---- Both ways together ---- */

/* Raises what scratch must hold so that it is enough for this algorithm. backward: 0 no, 1 yes, 2 of dx alone. */
static void raise_needs(Scratch *s, const Conv *c, size_t block, int backward) {
    const Product p = make_product(PRECISION_F32, c, block, backward != 0);
    const size_t cols = max_size(tile_columns(&p, max_size(PATCH_REALS, patch_reals(&p))), p.gw),
                 extra = block ? p.n * 2 * ALIGN : 0; /* matrix_step */
    s->column_reals = max_size(s->column_reals, round_up(p.C * p.n * cols + extra, ALIGN));
    s->stage_reals = max_size(s->stage_reals, round_up((block ? p.n : 1) * p.M * cols + extra, ALIGN));
    s->line_reals = max_size(s->line_reals, block ? winograd_line_reals(&p) : 0);
    s->weight_reals = max_size(s->weight_reals, round_up(p.n * matrix_step(p.C, p.M), ALIGN));
    if (backward == 1) s->partial_reals = max_size(s->partial_reals, PARTS * p.n * matrix_step(p.C, p.M));
}

static size_t scratch_bytes(const Scratch *s) {
    const size_t of_thread = s->column_reals + s->stage_reals + s->line_reals;
    return (of_thread * s->threads + s->weight_reals + s->partial_reals) * sizeof(real);
}

/* Enough for c and for the same convolution of fewer or smaller pictures, which may be done another way. */
size_t conv_needs_fast(const Compute *on, const Conv *c, int backward) {
    Scratch s = {.threads = (size_t)on->threads};
    if (in_blocks(on, c, backward)) return conv_bf16_needs(on, c, backward);
    for (size_t block = 0; block <= 4; block += 2) {
        const int direct = c->kind == CONV1 || c->kind == CONV3;
        const int blocks = block == 2 ? c->kind != CONV1 : c->kind == CONV3;
        if (block ? !blocks || (c->kind != CONV_UP && min_size(c->h, c->w) < block) : !direct) continue;
        if (block == 4 && c->h * c->w < FEW_PIXELS) continue;
        raise_needs(&s, c, block, backward);
    }
    return scratch_bytes(&s);
}

/* The scratch of c as it is done, where the network has put it. */
static Scratch place_scratch(const Compute *on, const Conv *c, int backward) {
    Scratch s = {.threads = (size_t)on->threads};
    raise_needs(&s, c, best_block(c), backward);
    s.columns = (real *)on->scratch;
    s.stages = s.columns + s.threads * s.column_reals;
    s.lines = s.stages + s.threads * s.stage_reals;
    s.weights = s.lines + s.threads * s.line_reals;
    s.partials = s.weights + s.weight_reals;
    return s;
}

/* Threads for a loop over tiles that uses the scratch of its thread. Too few tiles: one, and products share the work. */
static int tile_threads(const Scratch *s, size_t tiles) {
    const size_t threads = min_size((size_t)threads_free(), s->threads);
    return tiles < threads ? 1 : (int)threads;
}

/* What the tasks of one convolution share. */
typedef struct {
    Product p;
    const Scratch *s;
    const real *x, *w, *bias, *add, *dy;
    real *y, *dx;
    int accumulate;
    size_t parts;
} Job;

static void forward_task(void *context, size_t tile) {
    const Job *j = (const Job *)context;
    const Tile t = tile_at(&j->p, tile);
    real *columns = j->s->columns + thread_index() * j->s->column_reals;
    real *stage = j->s->stages + thread_index() * j->s->stage_reals;
    if (j->p.block)
        winograd_forward(j->y, &j->p, &t, j->s, j->x, j->bias, j->add, columns, stage);
    else
        direct_forward(j->y, &j->p, &t, j->x, j->w, j->bias, j->add, columns, stage);
}

/* -- CONV_DOWN of a picture with an odd side, forward: no block of 2x2 pixels holds its last row or column -- */

static int is_odd(const Conv *c) {
    return c->kind == CONV_DOWN && (c->h % 2 || c->w % 2);
}

typedef struct {
    const Conv *c;
    real *y;
    const real *x, *w, *bias, *add;
} OddJob;

/* Channel m of picture b: y[i,j] = bias + add[i,j] + sum over c, k, l of w[c,k,l] x[c,2i+k,2j+l], which lie inside. */
static void odd_task(void *context, size_t bm) {
    const OddJob *o = (const OddJob *)context;
    const Conv *c = o->c;
    const size_t h = c->h / 2, w = c->w / 2, b = bm / c->M, m = bm % c->M;
    real *y = o->y + bm * h * w;
    for (size_t i = 0; i < h * w; i++) y[i] = o->bias[m] + (o->add ? o->add[bm * h * w + i] : 0);
    for (size_t ck = 0; ck < c->C * 9; ck++) {
        const real weight = o->w[m * c->C * 9 + ck];
        const real *x = o->x + ((b * c->C + ck / 9) * c->h + ck % 9 / 3) * c->w + ck % 3;
        const size_t rows = 2 * (h - 1) + ck % 9 / 3 < c->h ? h : h - 1; /* an even side's last one sees zeros */
        const size_t columns = 2 * (w - 1) + ck % 3 < c->w ? w : w - 1;
        for (size_t i = 0; i < rows; i++)
            for (size_t j = 0; j < columns; j++) y[i * w + j] += weight * x[2 * i * c->w + 2 * j];
    }
}

void conv_forward_fast(const Compute *on, real *y, const real *x, const real *w, const real *bias, const real *add,
                       const Conv *c) {
    if (in_blocks(on, c, 0)) {
        conv_bf16_forward(on, y, x, w, bias, add, c);
        return;
    }
    if (is_odd(c)) {
        OddJob odd = {c, y, x, w, bias, add};
        parallel_for(threads_free(), c->B * c->M, odd_task, &odd);
        return;
    }
    const Product p = make_product(on->precision, c, best_block(c), 0);
    const Scratch s = place_scratch(on, c, 0);
    if (p.block) winograd_weights(s.weights, w, &p);
    Job job = {p, &s, x, w, bias, add, NULL, y, NULL, 0, 0};
    parallel_work(tile_threads(&s, p.tiles), p.tiles, forward_task, &job);
}

/* db (C) += sums of dy (B,C,hw) over pictures and pixels */
typedef struct {
    real *db;
    const real *dy;
    size_t B, C, hw;
} BiasSum;

static void bias_task(void *context, size_t c) {
    const BiasSum *a = (const BiasSum *)context;
    double s = 0;
    for (size_t b = 0; b < a->B; b++) s += sum_reals(a->dy + (b * a->C + c) * a->hw, a->hw);
    a->db[c] += (real)s;
}

static void bias_backward(real *db, const real *dy, size_t B, size_t C, size_t hw) {
    BiasSum a = {db, dy, B, C, hw};
    parallel_for(threads_free(), C, bias_task, &a);
}

/* partial[0] (n) += the others, in order; a task does SLICE numbers. */
typedef struct {
    real *partial;
    size_t parts, n;
} Parts;

static void add_parts_task(void *context, size_t task) {
    const Parts *a = (const Parts *)context;
    const size_t begin = task * SLICE, end = min_size(a->n, begin + SLICE);
    for (size_t i = 1; i < a->parts; i++)
        for (size_t j = begin; j < end; j++) a->partial[j] += a->partial[i * a->n + j];
}

static void add_parts(real *partial, size_t parts, size_t n) {
    Parts a = {partial, parts, n};
    parallel_for(threads_free(), ceil_div(n, SLICE), add_parts_task, &a);
}

static void backward_task(void *context, size_t part) {
    const Job *j = (const Job *)context;
    const Product *p = &j->p;
    const Scratch *s = j->s;
    const size_t first = p->tiles * part / j->parts, end = p->tiles * (part + 1) / j->parts;
    real *columns = s->columns + thread_index() * s->column_reals;
    real *stage = s->stages + thread_index() * s->stage_reals;
    const size_t of_part = p->block ? p->n * matrix_step(p->C, p->M) : p->C * p->n * p->M;
    real *partial = j->x ? s->partials + part * of_part : NULL;
    for (size_t i = first; i < end; i++) {
        const Tile t = tile_at(p, i);
        if (p->block)
            winograd_backward(j->dx, partial, p, &t, s, j->dy, j->x, i > first, j->accumulate, columns, stage);
        else
            direct_backward(j->dx, partial, p, &t, j->dy, j->x, s->weights, i > first, j->accumulate, columns, stage);
    }
}

/* A part is a run of tiles, and their number does not depend on the threads. */
static void backward_by_parts(const Compute *on, real *dx, real *dw, const real *dy, const real *x, const real *w,
                              int accumulate, const Conv *c) {
    const Product p = make_product(on->precision, c, best_block(c), 1);
    const Scratch s = place_scratch(on, c, dw ? 1 : 2);
    const size_t n = p.C * p.n * p.M, parts = dw ? min_size(PARTS, p.tiles) : p.tiles;
    if (p.block)
        winograd_weights(s.weights, w, &p);
    else
        direct_weights(s.weights, w, &p);
    Job job = {p, &s, dw ? x : NULL, w, NULL, NULL, dy, NULL, dx, accumulate, parts};
    parallel_for(tile_threads(&s, parts), parts, backward_task, &job);
    if (!dw) return;
    if (p.block) {
        winograd_weight_gradients(dw, s.partials, parts, &p);
    } else {
        add_parts(s.partials, parts, n);
        add_direct_gradient(dw, s.partials, &p);
    }
}

void conv_backward_fast(const Compute *on, real *dx, real *dw, real *db, const real *dy, const real *x, const real *w,
                        int accumulate, const Conv *c) {
    if (in_blocks(on, c, 1))
        conv_bf16_backward(on, dx, dw, dy, x, w, accumulate, c);
    else
        backward_by_parts(on, dx, dw, dy, x, w, accumulate, c);
    if (dw) bias_backward(db, dy, c->B, c->M, conv_height(c) * conv_width(c));
}

/* How many multiplications c takes. The direct way takes C*M*9 (1x1: C*M) for each pixel of y, and twice that backward. */
double conv_multiplications(Precision precision, const Conv *c, int backward) {
    const Product p = make_product(precision, c, precision == PRECISION_F32 ? best_block(c) : 0, backward);
    const double pixels = (double)(p.B * p.gh * p.gw) / (p.block || c->kind != CONV_DOWN ? 1 : 4);
    const double points = !p.block && c->kind == CONV_UP ? 16 : p.drops == KEPT ? (double)p.n : 9;
    return points * pixels * (double)(p.C * p.M) * (backward ? 2 : 1);
}
