/* conv.c - the convolutions of the first stage, forward and backward, made of gemm.
 *
 * Owns: 1x1 and 3x3 convolutions of (B,C,h,w) arrays with padding 1, at stride 1, at stride 2 (padded right and below)
 * and after nearest doubling, and their gradients. Refuses: nothing; sizes are the caller's to check, memory the
 * caller's to give.
 *
 * All of them, in both directions, are matrix products of weights with patches of a source. The grid of results is cut
 * into tiles whose patches stay in the L2 cache; threads share tiles, and no sum crosses from one to another.
 *
 * Backward, one gather of the gradient's patches serves both results, for the gradient of a convolution is a
 * convolution of the gradient with the mirrored kernel: dx = w^T patches(dy)          dw^T = x patches(dy)^T
 *
 * Direct: patches are the 1 or 9 source cells around each result, the kernel is used as it is. For 1x1 convolutions,
 * few channels and odd sizes.
 *
 * Winograd's F(2x2,3x3) (Lavin and Gray 2016): 16 multiplications instead of 36 for a block of 2x2 results. With
 *
 *          1  0 -1  0           1    0    0            1  0
 *    B^T = 0  1  1  0     G =  1/2  1/2  1/2      A =  1  1        U = G g G^T of each kernel g
 *          0 -1  1  0          1/2 -1/2  1/2           1 -1        V = B^T d B of the 4x4 source cells d at each block
 *          0  1  0 -1           0    0    1            0 -1
 *
 * the results are A^T [U .* V] A: for each of the 16 points k = 4i + j one product of U[k] (M,C) with V[k] (C, blocks).
 * A mirrored kernel exchanges i = 0 with i = 3, and j alike. Where the source or the results are coarse, one value of i,
 * and of j, drops out, which leaves 9 products:
 *
 *     CONV_UP, forward       nearest doubling, then 3x3: the source is doubled              i = 2 drops out
 *     CONV_UP, backward      only the sum of each block is wanted                           i = 2
 *     CONV_DOWN, forward     3x3, stride 2, padded right and below: only the last of each   i = 0
 *                            block is wanted (SPEC section 8)
 *     CONV_DOWN, backward    source cells stand apart, with zeros around                    i = 3
 */

#include <string.h>

#include "imagebart.h"

enum {
    PARTS = 16,        /* partial sums of a weight gradient: fixed, so that threads do not change bits */
    FEW_CHANNELS = 16, /* fewer: transforms cost more than they save */
    ALIGN = 16         /* reals between the starts of two areas: a cache line or more */
};
static const size_t PATCH_REALS = 64 * 1024; /* patches of a tile, unless that is less than MIN_COLUMNS */
static const size_t MIN_COLUMNS = 64;

/* Sums run in LANES interleaved chains, so that they vectorise without leave to reorder, and are emptied into double
 * every RUN numbers. Order depends on n alone. */
enum { LANES = 32, RUN = 4096 };

double sum_reals(const real *x, size_t n) {
    real lane[LANES] = {0};
    double s = 0;
    for (size_t i = 0; i < n; i += RUN) {
        const size_t end = min_size(n, i + RUN);
        size_t j = i;
        for (; j + LANES <= end; j += LANES)
            for (int l = 0; l < LANES; l++) lane[l] += x[j + (size_t)l];
        for (; j < end; j++) lane[0] += x[j];
        for (int l = 0; l < LANES; l++) {
            s += (double)lane[l];
            lane[l] = 0;
        }
    }
    return s;
}

enum { POINTS = 16, KEPT = -1 };
typedef enum { FINE, DOUBLED, APART } Source; /* how a row of the source is read */
typedef enum { ALL, SUMS, LAST } Results;     /* what of a block is kept */

/* One product: results (B,M,..) = weights (M, C*n) x patches of the source (B,C,..). */
typedef struct {
    size_t B, C, M, gh, gw, n; /* grid of results or blocks; 1, 9 or POINTS */
    int backward, winograd;
    Source source, cells; /* of patches; of x in the gradient of the weights */
    Results results;
    int drops;                             /* the i and j that drop out, or KEPT */
    size_t images, rows, row_tiles, tiles; /* a tile: `rows` grid rows of `images` pictures */
} Product;

typedef struct {
    size_t b, images, y, rows, cols; /* cols = images*rows*gw */
} Tile;

static int can_winograd(const Conv *c) {
    return c->kind == CONV_UP || c->kind == CONV_DOWN ||
           (c->kind == CONV3 && min_size(c->C, c->M) >= FEW_CHANNELS && c->h % 2 == 0 && c->w % 2 == 0);
}

/* Columns of a tile's patches, if the grid is not wider. */
static size_t tile_columns(const Product *p) {
    return max_size(PATCH_REALS / (p->C * p->n), MIN_COLUMNS);
}

/* Cuts the grid: whole rows, several pictures where one is small. */
static void cut_tiles(Product *p) {
    const size_t rows = max_size(tile_columns(p) / p->gw, 1);
    p->images = p->row_tiles = 1;
    p->rows = p->gh;
    if (rows >= p->gh) {
        p->images = min_size(rows / p->gh, p->B);
    } else {
        p->row_tiles = (p->gh + rows - 1) / rows;
        p->rows = (p->gh + p->row_tiles - 1) / p->row_tiles; /* equal heights, not one thin rest */
        p->row_tiles = (p->gh + p->rows - 1) / p->rows;
    }
    p->tiles = (p->B + p->images - 1) / p->images * p->row_tiles;
}

static Product make_product(const Conv *c, int winograd, int backward) {
    const size_t block = winograd && c->kind != CONV_UP ? 2 : 1;
    Product p;
    memset(&p, 0, sizeof p);
    p.B = c->B;
    p.C = backward ? c->M : c->C;
    p.M = backward ? c->C : c->M;
    p.gh = c->h / block;
    p.gw = c->w / block;
    p.n = winograd ? (size_t)POINTS : c->kind == CONV1 ? 1 : 9;
    p.backward = backward;
    p.winograd = winograd;
    p.drops = KEPT;
    if (c->kind == CONV_UP) {
        p.source = backward ? FINE : DOUBLED;
        p.cells = DOUBLED;
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

/* -- Direct -- */

/* to (rows,gw) = the cells (y+dy, x+dx) of a plane: a shifted copy with zeros where the shift leaves the plane */
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

/* The n cells around each of a tile's, of x (B,C,gh,gw): (C*n, cols) with row stride *ld, gathered into `to` unless
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
                const size_t cell = n == 1 ? 4 : p->backward ? 8 - k : k;
                gather_shifted(to, plane, p, t, (int)(cell / 3) - 1, (int)(cell % 3) - 1);
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
    gemm(0, 0, p->M, t->cols, K, weight, K, patch, ld, adds, to, ld_to);
    if (!in_place || bias || (add && !adds)) store_tile(out, p, t, to, ld_to, bias, adds ? NULL : add);
}

static void direct_forward(real *y, const Product *p, const Tile *t, const real *x, const real *w, const real *bias,
                           const real *add, real *columns, real *stage) {
    size_t ld;
    const real *patch = gather(columns, &ld, p, t, x, p->C, p->n);
    direct_products(y, p, t, w, patch, ld, bias, add, stage);
}

/* partial (C*n, M) = or += patches(dy) x^T;  dx = or += weight patches(dy) unless NULL */
static void direct_backward(real *dx, real *partial, const Product *p, const Tile *t, const real *dy, const real *x,
                            const real *weight, int begun, int more, real *columns, real *stage) {
    size_t ld, ldx;
    const real *patch = gather(columns, &ld, p, t, dy, p->C, p->n), *cells = gather(stage, &ldx, p, t, x, p->M, 1);
    gemm(0, 1, p->C * p->n, p->M, t->cols, patch, ld, cells, ldx, begun, partial, p->M);
    if (dx) direct_products(dx, p, t, weight, patch, ld, NULL, more ? dx : NULL, stage);
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

/* -- Winograd's algorithm: V and the products are (16, channels, cols); a transform is a pass along rows and a pass
 * along columns, over runs of n blocks -- */

#define NO_ALIAS __restrict       /* of gcc, clang and nvcc, in C and C++ */
#define LINES(gw) (18 * (gw) + 2) /* scratch of the transforms */

/* Row `row` of the fine picture behind a plane, at to[1..2*gw]; to[0] and to[2*gw+1] are zero. */
static void fetch_row(real *to, const real *plane, size_t row, size_t gw, Source source) {
    const real *from = plane + row / 2 * gw;
    to[0] = to[2 * gw + 1] = 0;
    if (source == FINE)
        memcpy(to + 1, plane + row * 2 * gw, 2 * gw * sizeof(real));
    else if (source == DOUBLED)
        for (size_t i = 0; i < gw; i++) to[1 + 2 * i] = to[2 + 2 * i] = from[i];
    else
        for (size_t i = 0; i < gw; i++) {
            to[1 + 2 * i] = 0;
            to[2 + 2 * i] = row % 2 ? from[i] : 0;
        }
}

/* line (4,n) = a source row times B, from a fetched row */
static void rows_times_b(real *NO_ALIAS line, const real *NO_ALIAS row, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const real a = row[2 * i], b = row[2 * i + 1], c = row[2 * i + 2], d = row[2 * i + 3];
        line[i] = a - c;
        line[n + i] = b + c;
        line[2 * n + i] = c - b;
        line[3 * n + i] = b - d;
    }
}

/* v[4 step i] = row i of B^T times one column of four lines */
static void columns_times_b(real *NO_ALIAS v, size_t step, const real *NO_ALIAS a, const real *NO_ALIAS b,
                            const real *NO_ALIAS c, const real *NO_ALIAS d, size_t n) {
    for (size_t i = 0; i < n; i++) v[i] = a[i] - c[i];
    for (size_t i = 0; i < n; i++) v[4 * step + i] = b[i] + c[i];
    for (size_t i = 0; i < n; i++) v[8 * step + i] = c[i] - b[i];
    for (size_t i = 0; i < n; i++) v[12 * step + i] = b[i] - d[i];
}

/* V (16, C, cols) of a tile. Four lines go round: a row of blocks shares two with the next. */
static void blocks_times_b(real *V, real *lines, const Product *p, const Tile *t, const real *x) {
    const size_t gw = p->gw, step = p->C * t->cols, plane_size = p->gh * gw * (p->source == FINE ? 4 : 1);
    for (size_t cb = 0; cb < p->C * t->images; cb++) {
        const size_t c = cb / t->images, b = cb % t->images;
        const real *plane = x + ((t->b + b) * p->C + c) * plane_size;
        real *v = V + c * t->cols + b * t->rows * gw, *line[4], *row = lines + 16 * gw;
        for (size_t i = 0; i < 2 * t->rows + 2; i++) { /* fine row 2y - 1 + i */
            for (size_t k = 0; k < 4; k++) line[k] = lines + (i + 1 + k) % 4 * 4 * gw;
            if (2 * t->y + i == 0 || 2 * t->y + i > 2 * p->gh) {
                memset(line[3], 0, 4 * gw * sizeof(real));
            } else {
                fetch_row(row, plane, 2 * t->y + i - 1, gw, p->source);
                rows_times_b(line[3], row, gw);
            }
            if (i < 3 || i % 2 == 0) continue;
            for (size_t j = 0; j < 4; j++)
                columns_times_b(v + j * step, step, line[0] + j * gw, line[1] + j * gw, line[2] + j * gw,
                                line[3] + j * gw, gw);
            v += gw;
        }
    }
}

/* The same two with A, for the gradient of the weights. */
static void rows_times_a(real *NO_ALIAS line, const real *NO_ALIAS row, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const real a = row[2 * i + 1], b = row[2 * i + 2];
        line[i] = a;
        line[n + i] = a + b;
        line[2 * n + i] = a - b;
        line[3 * n + i] = -b;
    }
}

static void columns_times_a(real *NO_ALIAS v, size_t step, const real *NO_ALIAS a, const real *NO_ALIAS b, size_t n) {
    for (size_t i = 0; i < n; i++) v[i] = a[i];
    for (size_t i = 0; i < n; i++) v[4 * step + i] = a[i] + b[i];
    for (size_t i = 0; i < n; i++) v[8 * step + i] = a[i] - b[i];
    for (size_t i = 0; i < n; i++) v[12 * step + i] = -b[i];
}

/* (16, M, cols) = A x A^T of every 2x2 block of x */
static void blocks_times_a(real *stage, real *lines, const Product *p, const Tile *t, const real *x) {
    const size_t gw = p->gw, step = p->M * t->cols, plane_size = p->gh * gw * (p->cells == FINE ? 4 : 1);
    for (size_t mb = 0; mb < p->M * t->images; mb++) {
        const size_t m = mb / t->images, b = mb % t->images;
        const real *plane = x + ((t->b + b) * p->M + m) * plane_size;
        real *v = stage + m * t->cols + b * t->rows * gw, *row = lines + 16 * gw;
        for (size_t y = t->y; y < t->y + t->rows; y++, v += gw) {
            for (size_t i = 0; i < 2; i++) {
                fetch_row(row, plane, 2 * y + i, gw, p->cells);
                rows_times_a(lines + 4 * i * gw, row, gw);
            }
            for (size_t j = 0; j < 4; j++)
                columns_times_a(v + j * step, step, lines + j * gw, lines + (4 + j) * gw, gw);
        }
    }
}

/* sum[r][j] = row r of A^T times column j of block i */
static inline void a_times_block(real sum[2][4], const real *m, size_t step, size_t i) {
    for (size_t j = 0; j < 4; j++) {
        const real a = m[j * step + i], b = m[(4 + j) * step + i], c = m[(8 + j) * step + i];
        sum[0][j] = a + b + c;
        sum[1][j] = b - c - m[(12 + j) * step + i];
    }
}

/* Two rows of 2n results, y0 and y1, = A^T m A + bias */
static void blocks_to_rows(real *NO_ALIAS y0, real *NO_ALIAS y1, const real *NO_ALIAS m, size_t step, size_t n,
                           real bias) {
    for (size_t i = 0; i < n; i++) {
        real s[2][4];
        a_times_block(s, m, step, i);
        y0[2 * i] = s[0][0] + s[0][1] + s[0][2] + bias;
        y0[2 * i + 1] = s[0][1] - s[0][2] - s[0][3] + bias;
        y1[2 * i] = s[1][0] + s[1][1] + s[1][2] + bias;
        y1[2 * i + 1] = s[1][1] - s[1][2] - s[1][3] + bias;
    }
}

/* One row of n results: the last of each block, or its sum, weights (1 2 0 -1) for A^T's rows (1 1 1 0), (0 1 -1 -1).
 */
static void blocks_to_last(real *NO_ALIAS y, const real *NO_ALIAS m, size_t step, size_t n, real bias) {
    for (size_t i = 0; i < n; i++) {
        real s[2][4];
        a_times_block(s, m, step, i);
        y[i] = s[1][1] - s[1][2] - s[1][3] + bias;
    }
}

static void blocks_to_sums(real *NO_ALIAS y, const real *NO_ALIAS m, size_t step, size_t n, real bias) {
    for (size_t i = 0; i < n; i++) {
        real s[2][4];
        a_times_block(s, m, step, i);
        y[i] = s[0][0] + s[1][0] + 2 * (s[0][1] + s[1][1]) - (s[0][3] + s[1][3]) + bias;
    }
}

/* out at the tile = the results of the products (16, M, cols) + bias (M) + add (as out); bias and add may be NULL, add
 * may be out itself */
static void store_blocks(real *out, real *lines, const Product *p, const Tile *t, const real *stage, const real *bias,
                         const real *add) {
    const size_t gw = p->gw, step = p->M * t->cols, run = p->results == ALL ? 4 * gw : gw;
    for (size_t m = 0; m < p->M; m++)
        for (size_t i = 0; i < t->images * t->rows; i++) {
            const size_t b = t->b + i / t->rows, y = t->y + i % t->rows, at = ((b * p->M + m) * p->gh + y) * run;
            const real *from = stage + m * t->cols + i * gw, shift = bias ? bias[m] : 0;
            real *to = add ? lines : out + at;
            if (p->results == ALL)
                blocks_to_rows(to, to + 2 * gw, from, step, gw, shift);
            else if (p->results == LAST)
                blocks_to_last(to, from, step, gw, shift);
            else
                blocks_to_sums(to, from, step, gw, shift);
            for (size_t j = 0; add && j < run; j++) out[at + j] = to[j] + add[at + j];
        }
}

/* U (16, n) of every kernel of w (n, 3, 3); a task does RUN kernels. */
typedef struct {
    real *U;
    const real *w;
    size_t n;
} KernelTransform;

static void winograd_weights_task(void *context, size_t task) {
    const KernelTransform *t = (const KernelTransform *)context;
    const real *w = t->w;
    real *U = t->U;
    const size_t n = t->n;
    for (size_t i = task * RUN; i < min_size(n, (task + 1) * RUN); i++) {
        const real *g = w + 9 * i;
        for (size_t k = 0; k < 4; k++) {
            real h[3], *u = U + 4 * k * n + i;
            for (size_t j = 0; j < 3; j++) {
                const real even = (g[j] + g[6 + j]) / 2, odd = g[3 + j] / 2;
                h[j] = k == 0 ? g[j] : k == 1 ? even + odd : k == 2 ? even - odd : g[6 + j];
            }
            u[0] = h[0];
            u[n] = (h[0] + h[2] + h[1]) / 2;
            u[2 * n] = (h[0] + h[2] - h[1]) / 2;
            u[3 * n] = h[2];
        }
    }
}

static void winograd_weights(real *U, const real *w, size_t n) {
    KernelTransform t = {U, w, n};
    parallel_for(threads_free(), (n + RUN - 1) / RUN, winograd_weights_task, &t);
}

/* dw (n, 3, 3) += G^T dU G, total (16, n) */
static void add_winograd_gradient(real *dw, const real *total, size_t n) {
    for (size_t i = 0; i < n; i++) {
        real h[3][4], *g = dw + 9 * i;
        for (size_t j = 0; j < 4; j++) {
            const real *u = total + j * n + i;
            const real half_sum = (u[4 * n] + u[8 * n]) / 2, half_gap = (u[4 * n] - u[8 * n]) / 2;
            h[0][j] = u[0] + half_sum;
            h[1][j] = half_gap;
            h[2][j] = half_sum + u[12 * n];
        }
        for (size_t k = 0; k < 3; k++) {
            g[3 * k] += h[k][0] + (h[k][1] + h[k][2]) / 2;
            g[3 * k + 1] += (h[k][1] - h[k][2]) / 2;
            g[3 * k + 2] += (h[k][1] + h[k][2]) / 2 + h[k][3];
        }
    }
}

/* Which element of U belongs to point k: backward the kernel is mirrored. */
static size_t kernel_point(const Product *p, size_t k) {
    static const size_t mirror[4] = {3, 1, 2, 0};
    return p->backward ? 4 * mirror[k / 4] + mirror[k % 4] : k;
}

static int drops_out(const Product *p, size_t k) {
    return (int)(k / 4) == p->drops || (int)(k % 4) == p->drops;
}

/* stage (16, M, cols) = U[k] V[k], or backward U[mirrored k]^T V[k] */
static void winograd_products(real *stage, const Product *p, const Tile *t, const real *U, const real *V) {
    const size_t n = p->M * t->cols, ldu = p->backward ? p->M : p->C;
    for (size_t k = 0; k < POINTS; k++) {
        if (drops_out(p, k))
            memset(stage + k * n, 0, n * sizeof(real));
        else
            gemm(p->backward, 0, p->M, t->cols, p->C, U + kernel_point(p, k) * p->M * p->C, ldu, V + k * p->C * t->cols,
                 t->cols, 0, stage + k * n, t->cols);
    }
}

static void winograd_forward(real *y, const Product *p, const Tile *t, const real *x, const real *U, const real *bias,
                             const real *add, real *columns, real *stage) {
    real *lines = columns + POINTS * p->C * t->cols;
    blocks_times_b(columns, lines, p, t, x);
    winograd_products(stage, p, t, U, columns);
    store_blocks(y, lines, p, t, stage, bias, add);
}

/* partial (16, C, M) = or += dU;  dx = or += unless NULL */
static void winograd_backward(real *dx, real *partial, const Product *p, const Tile *t, const real *dy, const real *x,
                              const real *U, int begun, int more, real *columns, real *stage) {
    real *lines = columns + POINTS * p->C * t->cols;
    blocks_times_b(columns, lines, p, t, dy);
    blocks_times_a(stage, lines, p, t, x);
    for (size_t k = 0; k < POINTS; k++) {
        real *to = partial + kernel_point(p, k) * p->C * p->M;
        if (!drops_out(p, k))
            gemm(0, 1, p->C, p->M, t->cols, columns + k * p->C * t->cols, t->cols, stage + k * p->M * t->cols, t->cols,
                 begun, to, p->M);
        else if (!begun)
            memset(to, 0, p->C * p->M * sizeof(real));
    }
    if (!dx) return;
    winograd_products(stage, p, t, U, columns);
    store_blocks(dx, lines, p, t, stage, NULL, more ? dx : NULL);
}

/* -- Both -- */

/* Raises what scratch must hold so that it is enough for c and for the same convolution of fewer or smaller pictures.
 */
void conv_needs(ConvScratch *s, const Conv *c, int backward) {
    const int direct = c->kind == CONV1 || c->kind == CONV3;
    const int blocks = c->kind == CONV_UP || (c->kind != CONV1 && c->h > 1 && c->w > 1);
    for (int winograd = 0; winograd < 2; winograd++) {
        if (winograd ? !blocks : !direct) continue;
        const Product p = make_product(c, winograd, backward);
        const size_t cols = max_size(tile_columns(&p), p.gw), K = p.C * p.n;
        s->column_reals = max_size(s->column_reals, round_up(K * cols + LINES(p.gw), ALIGN));
        s->stage_reals = max_size(s->stage_reals, round_up((winograd ? POINTS : 1) * p.M * cols, ALIGN));
        s->weight_reals = max_size(s->weight_reals, round_up(p.M * K, ALIGN));
        if (backward) s->partial_reals = max_size(s->partial_reals, round_up(PARTS * p.M * K, ALIGN));
    }
}

/* Threads for a loop over tiles that uses the scratch of its thread. Too few tiles: one, and products share the work.
 */
int conv_threads(const ConvScratch *s, size_t tiles) {
    const size_t threads = min_size((size_t)threads_free(), s->threads);
    return tiles < threads ? 1 : (int)threads;
}

size_t conv_scratch_reals(const ConvScratch *s) {
    return (s->column_reals + s->stage_reals) * s->threads + s->weight_reals + s->partial_reals;
}

void conv_scratch_place(ConvScratch *s, real *memory) {
    s->columns = memory;
    s->stages = s->columns + s->threads * s->column_reals;
    s->weights = s->stages + s->threads * s->stage_reals;
    s->partials = s->weights + s->weight_reals;
}

/* What the tasks of one convolution share. */
typedef struct {
    Product p;
    const ConvScratch *s;
    const real *x, *w, *bias, *add, *dy;
    real *y, *dx;
    int more;
    size_t parts;
} Job;

static void forward_task(void *context, size_t tile) {
    const Job *j = (const Job *)context;
    const Tile t = tile_at(&j->p, tile);
    real *columns = j->s->columns + thread_index() * j->s->column_reals;
    real *stage = j->s->stages + thread_index() * j->s->stage_reals;
    if (j->p.winograd)
        winograd_forward(j->y, &j->p, &t, j->x, j->s->weights, j->bias, j->add, columns, stage);
    else
        direct_forward(j->y, &j->p, &t, j->x, j->w, j->bias, j->add, columns, stage);
}

/* y = w * x + bias (+ add unless NULL)     w (M,C,3,3) or (M,C,1,1)   bias (M)   add (as y) */
void conv_forward(real *y, const Conv *c, const real *x, const real *w, const real *bias, const real *add,
                  const ConvScratch *s) {
    const Product p = make_product(c, can_winograd(c), 0);
    if (p.winograd) winograd_weights(s->weights, w, p.M * p.C);
    Job job = {p, s, x, w, bias, add, NULL, y, NULL, 0, 0};
    parallel_for(conv_threads(s, p.tiles), p.tiles, forward_task, &job);
}

/* db (C) += sums of dy (B,C,hw) over pictures and cells */
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

/* partial[0] (n) += the others, in order; a task does RUN numbers. */
typedef struct {
    real *partial;
    size_t parts, n;
} Parts;

static void add_parts_task(void *context, size_t task) {
    const Parts *a = (const Parts *)context;
    const size_t begin = task * RUN, end = min_size(a->n, begin + RUN);
    for (size_t i = 1; i < a->parts; i++)
        for (size_t j = begin; j < end; j++) a->partial[j] += a->partial[i * a->n + j];
}

static void add_parts(real *partial, size_t parts, size_t n) {
    Parts a = {partial, parts, n};
    parallel_for(threads_free(), (n + RUN - 1) / RUN, add_parts_task, &a);
}

static void backward_task(void *context, size_t part) {
    const Job *j = (const Job *)context;
    const Product *p = &j->p;
    const ConvScratch *s = j->s;
    const size_t first = p->tiles * part / j->parts, end = p->tiles * (part + 1) / j->parts;
    real *columns = s->columns + thread_index() * s->column_reals;
    real *stage = s->stages + thread_index() * s->stage_reals, *partial = s->partials + part * p->C * p->n * p->M;
    for (size_t i = first; i < end; i++) {
        const Tile t = tile_at(p, i);
        if (p->winograd)
            winograd_backward(j->dx, partial, p, &t, j->dy, j->x, s->weights, i > first, j->more, columns, stage);
        else
            direct_backward(j->dx, partial, p, &t, j->dy, j->x, s->weights, i > first, j->more, columns, stage);
    }
}

/* dx (as x) overwritten, or added to if `more`; NULL: not wanted. dw, db +=. A part is a run of tiles, and their number
 * does not depend on the threads. */
void conv_backward(real *dx, real *dw, real *db, const Conv *c, const real *dy, const real *x, const real *w, int more,
                   const ConvScratch *s) {
    const Product p = make_product(c, can_winograd(c), 1);
    const size_t n = p.C * p.n * p.M, parts = min_size(PARTS, p.tiles), results = c->h * c->w;
    if (p.winograd)
        winograd_weights(s->weights, w, p.M * p.C);
    else
        direct_weights(s->weights, w, &p);
    Job job = {p, s, x, w, NULL, NULL, dy, NULL, dx, more, parts};
    parallel_for(conv_threads(s, parts), parts, backward_task, &job);
    add_parts(s->partials, parts, n);
    if (p.winograd)
        add_winograd_gradient(dw, s->partials, p.C * p.M);
    else
        add_direct_gradient(dw, s->partials, &p);
    bias_backward(db, dy, c->B, c->M, c->kind == CONV_UP ? 4 * results : c->kind == CONV_DOWN ? results / 4 : results);
}
