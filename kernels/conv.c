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
 * Winograd: blocks of 2x2 or 4x4 results at a time, which mostly takes less than half or a quarter of the
 * multiplications (winograd.c). For everything else.
 *
 * Read conv.h first. In the order of this file: which way, and the tiles; the direct way; both ways together, which is
 * what the rest of the program calls; behind #else the twins on a GPU. */

#include <string.h>

#include "kernels/device.h"

#include "kernels/conv.h"

enum {
    PARTS = 16,        /* partial sums of a weight gradient: fixed, so that threads do not change bits */
    FEW_CHANNELS = 16, /* fewer: transforms cost more than they save */
    FEW_CELLS = 1024   /* fewer: blocks of 4x4 leave too narrow matrices */
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

/* Results along a side of a block of the fastest algorithm; 0: direct. It depends on one picture, not on how many there
 * are, so that a picture alone has the same bits as in a batch. */
static size_t best_block(const Conv *c) {
    if (c->kind == CONV_UP || c->kind == CONV_DOWN) return 2;
    if (c->kind == CONV1 || min_size(c->C, c->M) < FEW_CHANNELS || c->h % 2 || c->w % 2) return 0;
    return c->h % 4 == 0 && c->w % 4 == 0 && c->h * c->w >= FEW_CELLS ? 4 : 2;
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

static Product make_product(const Conv *c, size_t block, int backward) {
    const size_t cells =
        block && c->kind != CONV_UP ? block : 1; /* of c's grid in one of the product's, along a side */
    Product p;
    memset(&p, 0, sizeof p);
    p.B = c->B;
    p.C = backward ? c->M : c->C;
    p.M = backward ? c->C : c->M;
    p.gh = c->h / cells;
    p.gw = c->w / cells;
    p.block = block;
    p.side = block ? block + 2 : 0;
    p.n = block ? p.side * p.side : c->kind == CONV1 ? 1 : 9;
    p.backward = backward;
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

/* partial (C*n, M) = or += patches(dy) x^T unless x is NULL;  dx = or += weight patches(dy) unless NULL */
static void direct_backward(real *dx, real *partial, const Product *p, const Tile *t, const real *dy, const real *x,
                            const real *weight, int begun, int more, real *columns, real *stage) {
    size_t ld, ldx;
    const real *patch = gather(columns, &ld, p, t, dy, p->C, p->n);
    const real *cells = x ? gather(stage, &ldx, p, t, x, p->M, 1) : NULL;
    if (cells) gemm(0, 1, p->C * p->n, p->M, t->cols, patch, ld, cells, ldx, begun, partial, p->M);
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

/* -- Both -- */

/* Raises what scratch must hold so that it is enough for c and for the same convolution of fewer or smaller pictures.
 */
void conv_needs(ConvScratch *s, const Conv *c, int backward) {
    for (size_t block = 0; block <= 4; block += 2) {
        const int direct = c->kind == CONV1 || c->kind == CONV3;
        const int blocks = block == 2 ? c->kind != CONV1 : c->kind == CONV3;
        if (block ? !blocks || (c->kind != CONV_UP && min_size(c->h, c->w) < block) : !direct) continue;
        if (block == 4 && c->h * c->w < FEW_CELLS) continue;
        const Product p = make_product(c, block, backward);
        const size_t cols = max_size(tile_columns(&p), p.gw), extra = block ? p.n * 2 * ALIGN : 0; /* matrix_step */
        s->column_reals = max_size(s->column_reals, round_up(p.C * p.n * cols + extra, ALIGN));
        s->stage_reals = max_size(s->stage_reals, round_up((block ? p.n : 1) * p.M * cols + extra, ALIGN));
        s->line_reals = max_size(s->line_reals, block ? winograd_line_reals(&p) : 0);
        s->weight_reals = max_size(s->weight_reals, p.n * matrix_step(p.C, p.M));
        if (backward == 1) s->partial_reals = max_size(s->partial_reals, PARTS * p.n * matrix_step(p.C, p.M));
    }
}

/* Threads for a loop over tiles that uses the scratch of its thread. Too few tiles: one, and products share the work.
 */
int conv_threads(const ConvScratch *s, size_t tiles) {
    const size_t threads = min_size((size_t)threads_free(), s->threads);
    return tiles < threads ? 1 : (int)threads;
}

size_t conv_scratch_reals(const ConvScratch *s) {
    return (s->column_reals + s->stage_reals + s->line_reals) * s->threads + s->weight_reals + s->partial_reals;
}

void conv_scratch_place(ConvScratch *s, real *memory) {
    s->columns = memory;
    s->stages = s->columns + s->threads * s->column_reals;
    s->lines = s->stages + s->threads * s->stage_reals;
    s->weights = s->lines + s->threads * s->line_reals;
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

/* y = w * x + bias (+ add unless NULL)     w (M,C,3,3) or (M,C,1,1)   bias (M)   add (as y) */
void conv_forward(real *y, const Conv *c, const real *x, const real *w, const real *bias, const real *add,
                  const ConvScratch *s) {
    if (is_odd(c)) {
        OddJob odd = {c, y, x, w, bias, add};
        parallel_for(threads_free(), c->B * c->M, odd_task, &odd);
        return;
    }
    const Product p = make_product(c, best_block(c), 0);
    if (p.block) winograd_weights(s->weights, w, &p);
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
    real *stage = s->stages + thread_index() * s->stage_reals;
    const size_t of_part = p->block ? p->n * matrix_step(p->C, p->M) : p->C * p->n * p->M;
    real *partial = j->x ? s->partials + part * of_part : NULL;
    for (size_t i = first; i < end; i++) {
        const Tile t = tile_at(p, i);
        if (p->block)
            winograd_backward(j->dx, partial, p, &t, s, j->dy, j->x, i > first, j->more, columns, stage);
        else
            direct_backward(j->dx, partial, p, &t, j->dy, j->x, s->weights, i > first, j->more, columns, stage);
    }
}

/* dx (as x) overwritten, or added to if `more`; NULL: not wanted. dw, db +=; NULL: not wanted. A part is a run of
 * tiles, and their number does not depend on the threads. */
void conv_backward(real *dx, real *dw, real *db, const Conv *c, const real *dy, const real *x, const real *w, int more,
                   const ConvScratch *s) {
    const Product p = make_product(c, best_block(c), 1);
    const size_t n = p.C * p.n * p.M, parts = dw ? min_size(PARTS, p.tiles) : p.tiles, results = c->h * c->w;
    if (p.block)
        winograd_weights(s->weights, w, &p);
    else
        direct_weights(s->weights, w, &p);
    Job job = {p, s, dw ? x : NULL, w, NULL, NULL, dy, NULL, dx, more, parts};
    parallel_for(conv_threads(s, parts), parts, backward_task, &job);
    if (!dw) return;
    if (p.block) {
        winograd_weight_gradients(dw, s->partials, parts, &p);
    } else {
        add_parts(s->partials, parts, n);
        add_direct_gradient(dw, s->partials, &p);
    }
    bias_backward(db, dy, c->B, c->M, c->kind == CONV_UP ? 4 * results : c->kind == CONV_DOWN ? results / 4 : results);
}

double conv_multiplications(const Conv *c, int backward) {
    const Product p = make_product(c, best_block(c), backward);
    const double points = p.drops == KEPT ? (double)p.n : 9, cells = (double)(p.B * p.gh * p.gw);
    return points * cells * (double)(p.C * p.M) * (backward ? 2 : 1);
}
