/* conv_bf16.c - convolutions on a CPU, forward and backward, in bf16 and in bf16x3: sums over the blocks of bf16.h.
 *
 * Owns: 1x1 and 3x3 convolutions of (B,C,h,w) arrays, the latter with padding 1, at stride 1, at stride 2 (padded right
 * and below) and after nearest doubling, and their gradients, of numbers rounded to bf16, or each the sum of two bf16;
 * sums are float. vqgan.c has the plain loops that say what each computes. Refuses: nothing. conv.c calls it, and does
 * itself what has a source of few channels.
 *
 * Phases. At stride 2 the source is seen as four pictures, after nearest doubling the results are: pixel (i,j) of phase
 * 2p+q is pixel (2i+p, 2j+q). All else has one phase. Then every convolution is made of taps, matrices between pixels:
 *
 *     y[out][i,j] = bias + add + sum over taps of W x[in][i+down,j+right]     W (M,C)     9 taps, CONV_UP 16, CONV1 1
 *
 *     dx[in][i+down,j+right] = sum over taps of W^T dy[out][i,j]     dW = sum over pixels of dy[out][i,j] x[in][..]^T
 *
 * In each phase of CONV_UP's results one, two or four elements of a kernel see the same pixel: W is their sum, rounded
 * after adding. That errs no more than adding what was rounded, for |u+v| <= |u|+|v|, and takes 16 products, not 36.
 *
 * Stack. The pictures of a batch stand one below the other, with a row of zeros behind each and a pixel of zeros behind
 * each row, so that a tap is one distance in memory, whatever the pixel: the tiles of A are the stack itself. A band of
 * its rows is converted at a time, as large as stays in the L2 cache.
 *
 *     y, dx   A: 16 pixels of a band, channels last     B: weights           a step: 32 channels of a tap
 *     dW      A: 16 channels of x, pixels last          B: dy, packed        a step: 32 pixels
 *
 * Promise on bits: they do not depend on threads, nor on the size of caches; those of y and dx not on the batch either. */

#include "kernels/bf16.h"

enum {
    KERNEL = 9,        /* elements of 3x3 */
    MOST_TAPS = 16,    /* of a convolution */
    PART_STEPS = 16,   /* of a sum: so much of B stays in the L1 cache. Part of the promise on bits */
    GROUP_BLOCKS = 32, /* of results at a time */
    AHEAD = 128        /* reals: of a plane, that are fetched while others are converted */
};
/* Of a band's x, and of its dy, for the gradient of weights. Part of the promise on bits. */
static const size_t LINES_NUMBERS = 512 * 1024;

/* ---- Taps ---- */

typedef struct {
    size_t out, in;    /* phases of results and of the source */
    int down, right;   /* from a result's pixel to the source's */
    unsigned elements; /* of the kernel, whose sum it is: a bit for each */
} Tap;

/* Along one side: a result of phase `out` sees through element k of the kernel, at `*distance`, this phase. */
static size_t phase_seen(ConvKind kind, size_t out, size_t k, int *distance) {
    switch (kind) {
    case CONV1: *distance = 0; return 0;
    case CONV_DOWN: *distance = (int)k / 2; return k % 2;
    case CONV_UP: *distance = (int)(out + k + 1) / 2 - 1; return 0;
    default: *distance = (int)k - 1; return 0;
    }
}

/* Adds what phase `out` of the results sees through element e of the kernel; returns how many taps there are. */
static size_t add_element(Tap *tap, size_t taps, ConvKind kind, size_t out, size_t e) {
    Tap t = {.out = out, .elements = 1u << e};
    t.in = 2 * phase_seen(kind, out / 2, e / 3, &t.down);
    t.in += phase_seen(kind, out % 2, e % 3, &t.right);
    for (size_t i = 0; i < taps; i++)
        if (tap[i].out == t.out && tap[i].in == t.in && tap[i].down == t.down && tap[i].right == t.right) {
            tap[i].elements |= t.elements;
            return taps;
        }
    tap[taps] = t;
    return taps + 1;
}

/* ---- The stack ---- */

/* (B,C,H,W) planes, in step*step phases. */
typedef struct {
    size_t C, H, W, step;
} Planes;

static size_t phases_of(const Planes *p) {
    return p->step * p->step;
}

static size_t phase_width(const Planes *p, size_t phase) {
    return ceil_div(p->W - min_size(p->W, phase % p->step), p->step);
}

typedef struct {
    int x3;
    size_t B, parts; /* bf16 of a number */
    Planes from, to; /* the source, the results */
    size_t elements; /* of a kernel */
    Tap tap[MOST_TAPS];
    size_t taps, first[5];    /* of phase p of the results: taps first[p] .. first[p+1]-1 */
    size_t above, below;      /* rows that taps reach beyond a result's */
    size_t high, wide, stack; /* rows and pixels of a picture in the stack, zeros included; rows of the stack */
    size_t depth, pixel;      /* channels of the source, of whole steps; numbers of a pixel of a band */
} Window;

/* Forward, taps come by phase of y; backward the same ones the other way round, by phase of x. */
static void set_taps(Window *o, ConvKind kind, int backward) {
    Tap tap[MOST_TAPS];
    size_t taps = 0, n = 0;
    for (size_t out = 0; out < (kind == CONV_UP ? 4 : 1); out++)
        for (size_t e = 0; e < o->elements; e++) taps = add_element(tap, taps, kind, out, e);
    for (size_t phase = 0; phase < 4; phase++) {
        o->first[phase] = n;
        for (size_t i = 0; i < taps; i++) {
            const Tap t = tap[i], back = {t.in, t.out, -t.down, -t.right, t.elements};
            if ((backward ? t.in : t.out) == phase) o->tap[n++] = backward ? back : t;
        }
    }
    o->taps = o->first[4] = n;
    for (size_t i = 0; i < n; i++) {
        if (o->tap[i].down < 0) o->above = 1;
        if (o->tap[i].down > 0) o->below = 1;
    }
}

static Window window_of(const Compute *on, const Conv *c, int backward) {
    const Planes x = {c->C, c->h, c->w, c->kind == CONV_DOWN ? 2 : 1};
    const Planes y = {c->M, conv_height(c), conv_width(c), c->kind == CONV_UP ? 2 : 1};
    Window o = {.x3 = on->precision == PRECISION_BF16X3, .B = c->B};
    o.parts = o.x3 ? 2 : 1, o.elements = c->kind == CONV1 ? 1 : 9;
    o.from = backward ? y : x, o.to = backward ? x : y;
    set_taps(&o, c->kind, backward);
    const size_t zeros = c->kind != CONV1;
    o.high = max_size(ceil_div(x.H, x.step), ceil_div(y.H, y.step)) + zeros;
    o.wide = max_size(ceil_div(x.W, x.step), ceil_div(y.W, y.step)) + zeros;
    o.stack = c->B * o.high - zeros;
    o.depth = round_up(o.from.C, STEP);
    o.pixel = o.depth * o.parts;
    if (o.pixel % (8 * LINE_BYTES) == 0) o.pixel += STEP; /* 16 pixels would share few places in the L1 cache */
    return o;
}

/* What a phase of p has of row `row` of the stack, at channel 0; NULL: zeros. */
static const real *row_of(const Window *o, const Planes *p, const real *planes, size_t phase, long row) {
    const size_t b = (size_t)row / o->high, i = (size_t)row % o->high * p->step + phase / p->step;
    if (row < 0 || b >= o->B || i >= p->H) return NULL;
    return planes + (b * p->C * p->H + i) * p->W + phase % p->step;
}

/* Pixels that a band may have, of so many at most unless that is less than a row: rows are whole. Fewer or smaller
 * pictures have no larger bands. */
static size_t band_pixels(const Window *o, size_t most) {
    return min_size(o->stack * o->wide, max_size(most, o->wide));
}

/* to (rows,n), row stride to_row = every step-th number of rows of `from` */
INLINE void copy_every(size_t step, real *to, size_t to_row, const real *from, size_t from_row, size_t rows, size_t n) {
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < n; i++) to[r * to_row + i] = from[r * from_row + i * step];
}

/* The same of the n pixels of a phase from `first` on, channel after channel */
static void copy_pixels(const Planes *p, real *to, size_t to_row, const real *first, size_t channels, size_t n) {
    const size_t plane = p->H * p->W;
    if (p->step == 1)
        copy_every(1, to, to_row, first, plane, channels, n);
    else if (n == TILE)
        copy_every(2, to, to_row, first, plane, channels, TILE);
    else if (n == STEP)
        copy_every(2, to, to_row, first, plane, channels, STEP);
    else
        copy_every(2, to, to_row, first, plane, channels, n);
}

/* n <= STEP pixels of `channels` channels as a matrix (channels, n); by way of `copy` if they do not lie side by side. */
static View pixels_of(const Planes *p, const real *first, size_t channels, size_t n, real *copy) {
    if (p->step == 1) return (View){first, p->H * p->W, 1};
    copy_pixels(p, copy, n, first, channels, n);
    return (View){copy, n, 1};
}

static void pack(const Window *o, int by_pairs, uint16_t *to, size_t to_row, size_t to_low, View v, size_t rows,
                 size_t n) {
    if (!o->x3) {
        pack_tile(PART_WHOLE, by_pairs, to, to_row, v, rows, n);
        return;
    }
    pack_tile(PART_HIGH, by_pairs, to, to_row, v, rows, n);
    pack_tile(PART_LOW, by_pairs, to + to_low, to_row, v, rows, n);
}

static void sum_block(const Window *o, const BlockSum *sum, size_t rows, size_t cols, int add, real *c) {
    if (o->x3)
        block_sum(1, sum, rows, cols, add, c, BLOCK);
    else
        block_sum(0, sum, rows, cols, add, c, BLOCK);
}

/* ---- Weights ---- */

/* What the tasks of one convolution share. */
typedef struct {
    Window o;
    const real *from, *w, *bias, *add;
    real *to;
    int backward;               /* w is of channels of the source, then of the results; else the other way round */
    size_t steps;               /* of all taps */
    size_t rows, bands, splits; /* rows of a band; shares of the channels of the results */
    size_t pixels;              /* that a band may have */
    size_t phase, band, stage;  /* numbers of a phase in a band and of a band; reals of a stage */
    uint32_t *offset;           /* (steps) in a band */
    uint16_t *weights;          /* panels of 16 channels of the results */
    uint16_t *band_memory;      /* of each thread: a band, */
    real *stage_memory;         /* and the blocks of a group */
} Job;

static size_t panel_numbers(const Job *j) {
    return j->steps * j->o.parts * TILE_NUMBERS;
}

/* to (kernels,n) = of the numbers (kernels,elements,n) the sum of those elements that are a tap's */
static void sum_elements(real *to, const real *from, const Tap *t, const Window *o, size_t kernels, size_t n) {
    int begun = 0;
    for (size_t e = 0; e < o->elements; e++) {
        if (!(t->elements >> e & 1)) continue;
        for (size_t k = 0; k < kernels; k++)
            for (size_t i = 0; i < n; i++) {
                const real x = from[(k * o->elements + e) * n + i];
                to[k * n + i] = begun ? to[k * n + i] + x : x;
            }
        begun = 1;
    }
}

/* One panel, 32 channels of the source: the tiles of all taps. Kernels that stand one behind the other in w are a row of
 * a matrix, which is transposed. */
static void weights_task(void *context, size_t task) {
    const Job *j = (const Job *)context;
    const Window *o = &j->o;
    const size_t chunks = o->depth / STEP, m = task / chunks * TILE, c = task % chunks * STEP;
    const size_t outs = min_size(TILE, o->to.C - m), ins = min_size(STEP, o->from.C - c);
    const size_t rows = j->backward ? ins : outs, kernels = j->backward ? outs : ins;
    const real *w = j->w + (j->backward ? c * o->to.C + m : m * o->from.C + c) * o->elements;
    real turned[KERNEL * STEP * TILE], sum[STEP * TILE];
    transpose(turned, rows, w, (j->backward ? o->to.C : o->from.C) * o->elements, rows, kernels * o->elements);
    uint16_t *to = j->weights + m / TILE * panel_numbers(j) + c / STEP * o->parts * TILE_NUMBERS;
    for (size_t t = 0; t < o->taps; t++, to += chunks * o->parts * TILE_NUMBERS) {
        sum_elements(sum, turned, &o->tap[t], o, kernels, rows);
        pack(o, 1, to, STEP, TILE_NUMBERS, j->backward ? (View){sum, rows, 1} : (View){sum, 1, rows}, outs, ins);
    }
}

static void set_offsets(const Job *j) {
    const Window *o = &j->o;
    const size_t chunks = o->depth / STEP;
    for (size_t s = 0; s < j->steps; s++) {
        const Tap *t = &o->tap[s / chunks];
        const size_t pixels = (size_t)((t->down + (int)o->above) * (int)o->wide + t->right + 1);
        j->offset[s] = (uint32_t)(t->in * j->phase + pixels * o->pixel + s % chunks * STEP * o->parts);
    }
}

/* ---- A band: for each phase a pixel of zeros, then rows `first` - above .. first + rows - 1 + below of the stack ---- */

/* 32 channels of a row of a phase */
static void pack_row(const Window *o, uint16_t *to, const real *row, size_t width, size_t c) {
    const size_t channels = min_size(STEP, o->from.C - c);
    for (size_t i = 0; i < width; i += TILE) {
        real copy[STEP * TILE];
        const size_t n = min_size(TILE, width - i);
        const real *first = row + c * o->from.H * o->from.W + i * o->from.step;
        for (size_t k = 0; k < channels; k++) __builtin_prefetch(first + k * o->from.H * o->from.W + AHEAD, 0, 3);
        const View v = pixels_of(&o->from, first, channels, n, copy);
        pack(o, 0, to + i * o->pixel, o->pixel, STEP, (View){v.p, v.col, v.row}, n, channels);
    }
}

static void pack_band(const Job *j, uint16_t *band, size_t first, size_t rows) {
    const Window *o = &j->o;
    memset(band, 0, j->band * sizeof *band);
    for (size_t c = 0; c < o->from.C; c += STEP)
        for (size_t r = 0; r < o->above + rows + o->below; r++)
            for (size_t phase = 0; phase < phases_of(&o->from); phase++) {
                const real *row = row_of(o, &o->from, j->from, phase, (long)(first + r) - (long)o->above);
                uint16_t *to = band + phase * j->phase + (r * o->wide + 1) * o->pixel + c * o->parts;
                if (row) pack_row(o, to, row, phase_width(&o->from, phase), c);
            }
}

/* ---- Results ---- */

/* A group of tiles of a band: 16 neighbouring pixels each, counted from its first row on. */
typedef struct {
    size_t first, rows; /* of the band */
    size_t tiles, start[2 * GROUP_BLOCKS];
} Group;

/* The tiles from pixel *at on. None begins at a pixel that is no result. */
static void next_group(const Window *o, Group *g, size_t *at) {
    const size_t high = ceil_div(o->to.H, o->to.step), wide = ceil_div(o->to.W, o->to.step);
    g->tiles = 0;
    while (g->tiles < 2 * GROUP_BLOCKS && *at < g->rows * o->wide) {
        const size_t row = *at / o->wide;
        if ((g->first + row) % o->high >= high || *at % o->wide >= wide) {
            *at = (row + 1) * o->wide;
        } else {
            g->start[g->tiles++] = *at;
            *at += TILE;
        }
    }
}

/* to (n) = x + shift + add, unless add is NULL */
INLINE void put_pixels(real *to, const real *x, real shift, const real *add, size_t n) {
    if (add)
        for (size_t i = 0; i < n; i++) to[i] = x[i] + shift + add[i];
    else
        for (size_t i = 0; i < n; i++) to[i] = x[i] + shift;
}

/* The results of n pixels side by side go to their places from number `at` of channel 0's plane on. line (step, BLOCK,
 * TILE): those of the phases that lie side by side; m, outs: channels. */
static void store_pixels(const Job *j, size_t at, const real *line, size_t n, size_t m, size_t outs) {
    const Planes *to = &j->o.to;
    for (size_t i = 0; i < outs; i++, line += TILE, at += to->H * to->W) {
        const real shift = j->bias ? j->bias[m + i] : 0, *add = j->add ? j->add + at : NULL;
        real both[2 * TILE];
        if (to->step == 2)
            for (size_t k = 0; k < ceil_div(n, 2); k++) both[2 * k] = line[k], both[2 * k + 1] = line[BLOCK * TILE + k];
        if (to->step == 2)
            put_pixels(j->to + at, both, shift, add, n);
        else if (n == TILE)
            put_pixels(j->to + at, line, shift, add, TILE);
        else
            put_pixels(j->to + at, line, shift, add, n);
    }
}

/* Tile t of the group; row phase p; a stage has the blocks of each column phase. */
static void store_tile(const Job *j, const Group *g, size_t t, size_t p, const real *stage, size_t m, size_t outs) {
    const Window *o = &j->o;
    const Planes *to = &o->to;
    real line[2][BLOCK * TILE];
    for (size_t q = 0; q < to->step; q++)
        transpose(line[q], TILE, stage + (q * GROUP_BLOCKS * BLOCK + t * TILE) * BLOCK, BLOCK, TILE, outs);
    for (size_t i = 0, run; i < TILE; i += run) {
        const size_t row = (g->start[t] + i) / o->wide, x = (g->start[t] + i) % o->wide * to->step;
        const size_t b = (g->first + row) / o->high, y = (g->first + row) % o->high * to->step + p;
        run = min_size(TILE - i, o->wide - x / to->step);
        if (row < g->rows && y < to->H && x < to->W)
            store_pixels(j, ((b * to->C + m) * to->H + y) * to->W + x, line[0] + i, min_size(run * to->step, to->W - x),
                         m, outs);
    }
}

/* All of the sums of a group for one phase of the results: blocks (32,32) behind each other. */
static void sum_group(const Job *j, const Group *g, size_t phase, const uint16_t *band, size_t m, real *stage) {
    const Window *o = &j->o;
    const size_t chunks = o->depth / STEP, first = o->first[phase] * chunks, end = o->first[phase + 1] * chunks;
    const size_t outs = min_size(BLOCK, o->to.C - m), step = o->parts * TILE_NUMBERS;
    const size_t n = ceil_div(end - first, ceil_div(end - first, PART_STEPS / o->parts));
    for (size_t s = first; s < end; s += n)
        for (size_t t = 0; t < g->tiles; t += 2) {
            const uint16_t *b = j->weights + m / TILE * panel_numbers(j) + s * step;
            const size_t second = g->start[min_size(t + 1, g->tiles - 1)];
            const BlockSum sum = {.steps = min_size(n, end - s),
                                  .a = {band + g->start[t] * o->pixel, band + second * o->pixel},
                                  .offset = j->offset + s,
                                  .a_row = o->pixel,
                                  .a_low = STEP,
                                  .b = {b, b + panel_numbers(j)}};
            sum_block(o, &sum, min_size(2, g->tiles - t) * TILE, outs, s > first, stage + t * TILE * BLOCK);
        }
}

/* A band, and a share of the channels of the results. */
static void band_task(void *context, size_t task) {
    const Job *j = (const Job *)context;
    const Window *o = &j->o;
    const size_t panels = ceil_div(o->to.C, BLOCK), split = task % j->splits;
    uint16_t *band = j->band_memory + thread_index() * j->band;
    real *stage = j->stage_memory + thread_index() * j->stage;
    Group g = {.first = task / j->splits * j->rows};
    g.rows = min_size(j->rows, o->stack - g.first);
    pack_band(j, band, g.first, g.rows);
    tiles_see_stores();
    tiles_begin(TILE);
    for (size_t panel = panels * split / j->splits; panel < panels * (split + 1) / j->splits; panel++)
        for (size_t p = 0; p < o->to.step; p++) {
            const size_t m = panel * BLOCK, outs = min_size(BLOCK, o->to.C - m);
            for (size_t at = 0; next_group(o, &g, &at), g.tiles > 0;) {
                for (size_t q = 0; q < o->to.step; q++)
                    sum_group(j, &g, o->to.step * p + q, band, m, stage + q * GROUP_BLOCKS * BLOCK * BLOCK);
                for (size_t t = 0; t < g.tiles; t++) store_tile(j, &g, t, p, stage, m, outs);
            }
        }
    tiles_end();
}

/* Numbers of a band, unless that is less than a row: three eighths of the L2 cache */
static size_t band_numbers(void) {
    return l2_bytes() / 8 * 3 / sizeof(uint16_t);
}

/* Bands of equal heights, as many as keep all threads at work; channels are shared where there are too few. */
static void cut_bands(Job *j, size_t threads) {
    const Window *o = &j->o;
    const size_t least = ceil_div(o->stack, j->pixels / o->wide);
    const size_t most = max_size(least, o->stack / 4); /* lower ones convert too many rows twice */
    j->bands = min_size(round_up(least, threads), most);
    j->rows = ceil_div(o->stack, j->bands);
    j->bands = ceil_div(o->stack, j->rows);
    j->splits = min_size(ceil_div(threads, j->bands), ceil_div(o->to.C, BLOCK));
}

/* Where the scratch of a convolution lies, from `at` on; returns its end. */
static uintptr_t place_job(Job *j, uintptr_t at, size_t threads) {
    const Window *o = &j->o;
    j->pixels = band_pixels(o, band_numbers() / (o->pixel * phases_of(&o->from)));
    j->steps = o->taps * (o->depth / STEP);
    j->phase = (1 + j->pixels + (o->above + o->below) * o->wide + TILE) * o->pixel;
    j->band = j->phase * phases_of(&o->from);
    j->stage = o->to.step * GROUP_BLOCKS * BLOCK * BLOCK;
    j->weights = (uint16_t *)at;
    at += round_up(o->to.C, TILE) / TILE * panel_numbers(j) * sizeof *j->weights;
    j->band_memory = (uint16_t *)at;
    at += threads * j->band * sizeof *j->band_memory;
    j->stage_memory = (real *)at;
    at += threads * j->stage * sizeof *j->stage_memory;
    j->offset = (uint32_t *)at;
    return at + round_up(j->steps * sizeof *j->offset, LINE_BYTES);
}

static void convolve(const Compute *on, Job *j) {
    const size_t threads = min_size((size_t)threads_free(), (size_t)on->threads);
    place_job(j, (uintptr_t)on->scratch, (size_t)on->threads);
    cut_bands(j, threads);
    set_offsets(j);
    parallel_for(threads_free(), ceil_div(j->o.to.C, TILE) * (j->o.depth / STEP), weights_task, j);
    parallel_work((int)threads, j->bands * j->splits, band_task, j);
}

/* ---- The gradient of the weights ---- */

/* A band of x, channel by channel, and of dy, packed, as all threads see them. A block of dW (32 channels of x, 32 of dy)
 * is one task's. */
typedef struct {
    Window o; /* forward */
    const real *x, *dy;
    real *dw;
    size_t x16, dy16;          /* times 16 channels, of all phases */
    size_t pixels;             /* that a band may have */
    size_t first, rows, steps; /* of the band; steps of 32 pixels */
    size_t line, lines;        /* numbers of a line, and from one channel's to the next's */
    size_t panel;              /* numbers of a panel of 16 channels of dy */
    uint16_t *of_x, *of_dy;
    real *blocks; /* of each task, for each tap */
} Gradient;

/* Phase and 16 channels of x. A line: a pixel of zeros, then the rows as a band has them, zeros behind. */
static void pack_lines(const Gradient *g, size_t phase, size_t c) {
    const Window *o = &g->o;
    const size_t channels = min_size(TILE, o->from.C - c), width = phase_width(&o->from, phase);
    uint16_t *lines = g->of_x + (phase * round_up(o->from.C, TILE) + c) * g->lines;
    memset(lines, 0, TILE * g->lines * sizeof *lines);
    for (size_t r = 0; r < o->above + g->rows + o->below; r++) {
        const real *row = row_of(o, &o->from, g->x, phase, (long)(g->first + r) - (long)o->above);
        for (size_t i = 0; row && i < width; i += STEP) {
            real copy[STEP * TILE];
            const size_t n = min_size(STEP, width - i);
            const real *first = row + c * o->from.H * o->from.W + i * o->from.step;
            pack(o, 0, lines + 1 + r * o->wide + i, g->lines, g->line, pixels_of(&o->from, first, channels, n, copy),
                 channels, n);
        }
    }
}

/* Phase and 16 channels of dy: a tile for every 32 pixels of the band. */
static void pack_panels(const Gradient *g, size_t phase, size_t m) {
    const Window *o = &g->o;
    const Planes *p = &o->to;
    const size_t channels = min_size(TILE, p->C - m), width = phase_width(p, phase);
    uint16_t *to = g->of_dy + (phase * ceil_div(p->C, TILE) + m / TILE) * g->panel;
    for (size_t s = 0; s < g->steps; s++, to += o->parts * TILE_NUMBERS) {
        real pixels[TILE][STEP] = {{0}};
        for (size_t i = 0, run; i < STEP; i += run) {
            const size_t row = (s * STEP + i) / o->wide, x = (s * STEP + i) % o->wide;
            const real *from = row < g->rows ? row_of(o, p, g->dy, phase, (long)(g->first + row)) : NULL;
            run = min_size(STEP - i, o->wide - x);
            if (from && x < width)
                copy_pixels(p, pixels[0] + i, STEP, from + m * p->H * p->W + x * p->step, channels,
                            min_size(run, width - x));
        }
        pack(o, 1, to, STEP, TILE_NUMBERS, (View){pixels[0], STEP, 1}, TILE, STEP);
    }
}

static void pack_task(void *context, size_t task) {
    const Gradient *g = (const Gradient *)context;
    const Window *o = &g->o;
    const size_t x16 = ceil_div(o->from.C, TILE), dy16 = ceil_div(o->to.C, TILE);
    if (task < g->x16)
        pack_lines(g, task / x16, task % x16 * TILE);
    else
        pack_panels(g, (task - g->x16) / dy16, (task - g->x16) % dy16 * TILE);
}

static real *blocks_of(const Gradient *g, size_t task) {
    return g->blocks + task * g->o.taps * BLOCK * BLOCK;
}

static void gradient_task(void *context, size_t task) {
    const Gradient *g = (const Gradient *)context;
    const Window *o = &g->o;
    const size_t down = ceil_div(o->from.C, BLOCK), c = task % down * BLOCK, m = task / down * BLOCK;
    tiles_begin(TILE);
    for (size_t s = 0; s < g->steps; s += PART_STEPS)
        for (size_t i = 0; i < o->taps; i++) {
            const Tap *t = &o->tap[i];
            const size_t at = (size_t)((t->down + (int)o->above) * (int)o->wide + t->right + 1);
            const uint16_t *a = g->of_x + (t->in * round_up(o->from.C, TILE) + c) * g->lines + at + s * STEP;
            const uint16_t *b = g->of_dy + (t->out * ceil_div(o->to.C, TILE) + m / TILE) * g->panel;
            const BlockSum sum = {.steps = min_size(PART_STEPS, g->steps - s),
                                  .a = {a, a + TILE * g->lines},
                                  .a_step = STEP,
                                  .a_row = g->lines,
                                  .a_low = g->line,
                                  .b = {b + s * o->parts * TILE_NUMBERS, b + s * o->parts * TILE_NUMBERS + g->panel}};
            sum_block(o, &sum, min_size(BLOCK, o->from.C - c), min_size(BLOCK, o->to.C - m), g->first + s > 0,
                      blocks_of(g, task) + i * BLOCK * BLOCK);
        }
    tiles_end();
}

/* dw (M,C,elements) += the blocks: each tap's goes to all elements that it is the sum of. */
static void spread_task(void *context, size_t task) {
    const Gradient *g = (const Gradient *)context;
    const Window *o = &g->o;
    const size_t down = ceil_div(o->from.C, BLOCK), c = task % down * BLOCK, m = task / down * BLOCK;
    const size_t outs = min_size(BLOCK, o->to.C - m), rows = min_size(BLOCK, o->from.C - c) * o->elements;
    real sum[BLOCK * KERNEL * BLOCK] = {0}, turned[BLOCK * BLOCK * KERNEL];
    for (size_t t = 0; t < o->taps; t++)
        for (size_t e = 0; e < o->elements; e++) {
            const real *from = blocks_of(g, task) + t * BLOCK * BLOCK;
            if (!(o->tap[t].elements >> e & 1)) continue;
            for (size_t row = e; row < rows; row += o->elements, from += BLOCK)
                for (size_t i = 0; i < BLOCK; i++) sum[row * BLOCK + i] += from[i];
        }
    transpose(turned, rows, sum, BLOCK, rows, outs);
    for (size_t i = 0; i < outs; i++) {
        real *dw = g->dw + ((m + i) * o->from.C + c) * o->elements;
        for (size_t k = 0; k < rows; k++) dw[k] += turned[i * rows + k];
    }
}

static uintptr_t place_gradient(Gradient *g, uintptr_t at) {
    const Window *o = &g->o;
    g->x16 = phases_of(&o->from) * ceil_div(o->from.C, TILE), g->dy16 = phases_of(&o->to) * ceil_div(o->to.C, TILE);
    g->pixels = band_pixels(o, LINES_NUMBERS / (max_size(g->x16, g->dy16) * TILE * o->parts));
    g->line = round_up(1 + g->pixels + (o->above + o->below) * o->wide + 2 * STEP, 2 * STEP) + STEP;
    g->lines = g->line * o->parts;
    g->panel = round_up(g->pixels, STEP) * TILE * o->parts;
    g->of_x = (uint16_t *)at;
    at += g->x16 * TILE * g->lines * sizeof *g->of_x;
    g->of_dy = (uint16_t *)at;
    at += g->dy16 * g->panel * sizeof *g->of_dy;
    g->blocks = (real *)at;
    return at + ceil_div(o->from.C, BLOCK) * ceil_div(o->to.C, BLOCK) * o->taps * BLOCK * BLOCK * sizeof *g->blocks;
}

static void weight_gradient(const Compute *on, Gradient *g) {
    const Window *o = &g->o;
    const size_t tasks = ceil_div(o->from.C, BLOCK) * ceil_div(o->to.C, BLOCK);
    place_gradient(g, (uintptr_t)on->scratch);
    for (g->first = 0; g->first < o->stack; g->first += g->rows) {
        g->rows = min_size(g->pixels / o->wide, o->stack - g->first);
        g->steps = ceil_div(g->rows * o->wide, STEP);
        parallel_for(threads_free(), g->x16 + g->dy16, pack_task, g);
        parallel_for(threads_free(), tasks, gradient_task, g);
    }
    parallel_for(threads_free(), tasks, spread_task, g);
}

/* ---- What conv.c calls ---- */

size_t conv_bf16_needs(const Compute *on, const Conv *c, int backward) {
    Job j = {.o = window_of(on, c, backward != 0)};
    Gradient g = {.o = window_of(on, c, 0)};
    const size_t of_job = place_job(&j, 0, (size_t)on->threads);
    return backward == 1 ? max_size(of_job, place_gradient(&g, 0)) : of_job;
}

void conv_bf16_forward(const Compute *on, real *y, const real *x, const real *w, const real *bias, const real *add,
                       const Conv *c) {
    Job j = {.o = window_of(on, c, 0), .from = x, .w = w, .bias = bias, .add = add, .to = y};
    convolve(on, &j);
}

void conv_bf16_backward(const Compute *on, real *dx, real *dw, const real *dy, const real *x, const real *w,
                        int accumulate, const Conv *c) {
    Job j = {.o = window_of(on, c, 1), .from = dy, .w = w, .backward = 1, .add = accumulate ? dx : NULL, .to = dx};
    Gradient g = {.o = window_of(on, c, 0), .x = x, .dy = dy, .dw = dw};
    if (dx) convolve(on, &j);
    if (dw) weight_gradient(on, &g);
}
