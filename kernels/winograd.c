/* winograd.c - Winograd's convolution: fewer multiplications for 3x3 kernels, forward and backward.
 *
 * Owns: the transforms of source, results and kernels, and the products between them, for one tile of a convolution.
 * Refuses: nothing; conv.c says when it is used, cuts the tiles and has checked and planned all memory. Read conv.h
 * first. In the order of this file: the transforms as products with B^T, A and A^T; those of planes, which run through
 * their lines; those of kernels; the products and what conv.c calls.
 *
 * F(2x2,3x3) (Lavin and Gray 2016): 16 multiplications instead of 36 for a block of 2x2 results. With
 *
 *          1  0 -1  0           1    0    0            1  0
 *    B^T = 0  1  1  0     G =  1/2  1/2  1/2      A =  1  1        U = G g G^T of each kernel g
 *          0 -1  1  0          1/2 -1/2  1/2           1 -1        V = B^T d B of the 4x4 source cells d at each block
 *          0  1  0 -1           0    0    1            0 -1
 *
 * the results are A^T [U .* V] A: for each of the 16 points k = 4i + j one product of U[k] (M,C) with V[k] (C, blocks).
 * Where the source or the results are coarse, one value of i, and of j, drops out, which leaves 9 products:
 *
 *     CONV_UP, forward       nearest doubling, then 3x3: the source is doubled              i = 2 drops out
 *     CONV_UP, backward      only the sum of each block is wanted                           i = 2
 *     CONV_DOWN, forward     3x3, stride 2, padded right and below: only the last of each   i = 0
 *                            block is wanted (SPEC section 8)
 *     CONV_DOWN, backward    source cells stand apart, with zeros around                    i = 3
 *
 * F(4x4,3x3): 36 multiplications instead of 144 for a block of 4x4 results. Both algorithms interpolate polynomials,
 * the first at 0, 1, -1 and infinity, this one at 0, +-P, +-Q and infinity: with p(x) = x (x^2-P^2) (x^2-Q^2), the row
 * of a point t holds the coefficients of p(x)/(x-t) in B^T, (1 t t^2)/p'(t) in G, and (1 t t^2 t^3) in A; for infinity
 * those are p(x), (0 0 1) and (0 0 0 1). The textbook's points 1 and 2 lose twice as much precision as these: on the
 * decoder at full size the error is 1.4e-5 of the largest result, with these 8e-6, with F(2x2,3x3) 6e-6. */

#include <string.h>

#include "kernels/conv.h"

/* -- Transforms: V and the products are (n, channels, cols), n = side*side. The transform of a square is one along rows
 * and one along columns, each over lines of as many numbers as there are blocks in a row -- */

/* Scratch of the transforms: a square of lines, and a row in phases or two squares of results. */
size_t winograd_line_reals(const Product *p) {
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
static size_t source_cells(const Product *p, Source source) {
    return p->gh * p->gw * (source == FINE ? p->block * p->block : 1);
}

/* Row `row` of the fine picture behind a plane, as `block` phases: cell x stands at to[(x+1) % block * pitch +
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
    const ConvScratch *s;
    const real *x;
    real *V;
    const real *bias, *add, *U, *stage;
    real *out;
    int begun;
} TileJob;

static void tile_tasks(TileJob *j, size_t n, Task *task) {
    parallel_for((int)min_size((size_t)threads_free(), j->s->threads), n, task, j);
}

static real *own_lines(const ConvScratch *s) {
    return s->lines + thread_index() * s->line_reals;
}

/* V of one plane. `side` lines go round: a row of blocks shares two with the next. */
static void b_task(void *context, size_t cb) {
    const TileJob *j = (const TileJob *)context;
    const Product *p = j->p;
    const Tile *t = j->t;
    const size_t n = p->gw, side = p->side, step = matrix_step(p->C, t->cols), pitch = round_up(n + 1, ALIGN);
    const size_t c = cb / t->images, b = cb % t->images, plane_size = source_cells(p, p->source);
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
    const real *plane = j->x + ((t->b + b) * p->M + m) * source_cells(p, p->cells), *d[6];
    real *v = j->V + m * t->cols + b * t->rows * n, *lines = own_lines(j->s), *phases = lines + side * side * n;
    for (size_t y = t->y; y < t->y + t->rows; y++, v += n) {
        for (size_t i = 0; i < p->block; i++) {
            fetch_row(phases, pitch, p, p->cells, plane, p->block * y + i);
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
static size_t kernel_cell(const Product *p, size_t k) {
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
        for (size_t k = 0; k < 9; k++) g[k][i] = j->w[9 * (first + i) + kernel_cell(p, k)];
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
            for (size_t r = 0; r < 3; r++) j->dw[9 * (first + i) + kernel_cell(p, 3 * r + c)] += g[r][i];
    }
}

static void kernel_tasks(KernelJob *j, Task *task) {
    parallel_for(threads_free(), ceil_div(j->p->C * j->p->M, KERNELS), task, j);
}

void winograd_weights(real *U, const real *w, const Product *p) {
    KernelJob j = {p, U, NULL, w, 0};
    kernel_tasks(&j, kernels_task);
}

void winograd_weight_gradients(real *dw, real *dU, size_t parts, const Product *p) {
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
        gemm(p->backward, 0, p->M, cols, p->C, j->U + k * matrix_step(p->C, p->M), ldu,
             j->x + k * matrix_step(p->C, cols), cols, 0, to, cols);
}

/* out (n, C, M) = or += V[k] stage[k]^T */
static void gradient_task(void *context, size_t k) {
    const TileJob *j = (const TileJob *)context;
    const Product *p = j->p;
    const size_t cols = j->t->cols;
    real *to = j->out + k * matrix_step(p->C, p->M);
    if (!drops_out(p, k))
        gemm(0, 1, p->C, p->M, cols, j->V + k * matrix_step(p->C, cols), cols, j->stage + k * matrix_step(p->M, cols),
             cols, j->begun, to, p->M);
    else if (!j->begun)
        memset(to, 0, p->C * p->M * sizeof(real));
}

/* out = or += products of U with the transformed source in columns, + bias + add unless NULL */
static void winograd_results(real *out, const Product *p, const Tile *t, const ConvScratch *s, const real *bias,
                             const real *add, const real *columns, real *stage) {
    TileJob multiply = {p, t, s, columns, stage, NULL, NULL, s->weights, NULL, NULL, 0};
    TileJob store = {p, t, s, NULL, NULL, bias, add, NULL, stage, out, 0};
    tile_tasks(&multiply, p->n, product_task);
    tile_tasks(&store, p->M, store_task);
}

void winograd_forward(real *y, const Product *p, const Tile *t, const ConvScratch *s, const real *x, const real *bias,
                      const real *add, real *columns, real *stage) {
    TileJob source = {p, t, s, x, columns, NULL, NULL, NULL, NULL, NULL, 0};
    tile_tasks(&source, p->C * t->images, b_task);
    winograd_results(y, p, t, s, bias, add, columns, stage);
}

/* partial (n, C, M) = or += dU unless x is NULL;  dx = or += unless NULL */
void winograd_backward(real *dx, real *partial, const Product *p, const Tile *t, const ConvScratch *s, const real *dy,
                       const real *x, int begun, int more, real *columns, real *stage) {
    TileJob source = {p, t, s, dy, columns, NULL, NULL, NULL, NULL, NULL, 0};
    TileJob cells = {p, t, s, x, stage, NULL, NULL, NULL, NULL, NULL, 0};
    TileJob gradient = {p, t, s, NULL, columns, NULL, NULL, NULL, stage, partial, begun};
    tile_tasks(&source, p->C * t->images, b_task);
    if (x) tile_tasks(&cells, p->M * t->images, a_task);
    if (x) tile_tasks(&gradient, p->n, gradient_task);
    if (dx) winograd_results(dx, p, t, s, NULL, more ? dx : NULL, columns, stage);
}
