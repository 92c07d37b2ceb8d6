/* layers.c - the layers of the transformer but attention: GELU, layer norm, linear, embedding; forward and backward.
 *
 * Activations are (R,C), R rows of B*n positions. Rows run in parallel forward; sums over rows (gradients of biases,
 * norms, embeddings) run in parallel over columns, so that the order of additions, hence every bit, is the same for any
 * number of threads. Prototypes: transformer.h. */
#include "kernels/transformer.h"

enum { COLUMN_BLOCK = 32 }; /* columns that one task sums over all rows */
static const double NORM_EPS = 1e-5;

/* ---- Elementwise: GELU (its mathematics: transformer.h) ---- */

/* Tasks of a loop that sums C columns over all rows. */
static size_t column_tasks(size_t C) {
    return (C + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
}

/* gelu_forward    g = gelu(g + bias), in place; dg = gelu'(g + bias), or not wanted when NULL
 * gelu_backward   dh *= dg
 *   g, dg, dh (R,H); bias (H). gelu(x) = x P(z < x), the exact one (SPEC 1.8). */
typedef struct {
    real *g, *dg;
    const real *bias;
    size_t H;
} Gelu;

static void gelu_forward_row(void *context, size_t r) {
    const Gelu *a = (const Gelu *)context;
    const size_t H = a->H;
    const real *bias = a->bias;
    real *g = a->g + r * H, *dg = a->dg ? a->dg + r * H : NULL;
    if (dg) {
#pragma omp simd
        for (size_t i = 0; i < H; i++) {
            real x = g[i] + bias[i], cdf, pdf;
            normal_distribution(&cdf, &pdf, x);
            dg[i] = cdf + x * pdf;
            g[i] = x * cdf;
        }
    } else {
#pragma omp simd
        for (size_t i = 0; i < H; i++) {
            real x = g[i] + bias[i], cdf, pdf;
            normal_distribution(&cdf, &pdf, x);
            g[i] = x * cdf;
        }
    }
}

void gelu_forward(real *g, real *dg, const real *bias, size_t R, size_t H) {
    Gelu a = {g, dg, bias, H};
    parallel_for(threads_for(R * H), R, gelu_forward_row, &a);
}

static void gelu_backward_row(void *context, size_t r) {
    const Gelu *a = (const Gelu *)context;
    real *dh = a->g + r * a->H;
    const real *dg = a->dg + r * a->H;
#pragma omp simd
    for (size_t i = 0; i < a->H; i++) dh[i] *= dg[i];
}

void gelu_backward(real *dh, real *dg, size_t R, size_t H) {
    Gelu a = {dh, dg, NULL, H};
    parallel_for(threads_for(R * H), R, gelu_backward_row, &a);
}

/* ---- Norm: y = (x - mean) / sqrt(var + eps) * weight + bias, over each row of C channels ---- */

/* norm_forward    y (R,C), mean (R), rstd (R) from x (R,C)
 * norm_backward   dx (R,C) +=, dweight (C) +=, dbias (C) += from dy (R,C) and what forward saw and left */
typedef struct {
    const real *weight, *x;
    const real *bias, *dy;      /* forward; backward */
    real *y, *dx, *mean, *rstd; /* forward; backward; mean and rstd are read by backward */
    real *dweight, *dbias;
    size_t R, C;
} NormRows;

static void norm_forward_row(void *context, size_t r) {
    const NormRows *a = (const NormRows *)context;
    const size_t C = a->C;
    const real *x = a->x + r * C, *weight = a->weight, *bias = a->bias;
    real *y = a->y + r * C, sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < C; i++) sum += x[i];
    const real mu = sum / (real)C;
#pragma omp simd reduction(+ : square)
    for (size_t i = 0; i < C; i++) square += (x[i] - mu) * (x[i] - mu);
    const real s = (real)(1 / sqrt((double)square / (double)C + NORM_EPS));
#pragma omp simd
    for (size_t i = 0; i < C; i++) y[i] = (x[i] - mu) * s * weight[i] + bias[i];
    a->mean[r] = mu, a->rstd[r] = s;
}

void norm_forward(const Transformer *m, const Norm *norm, real *y, real *mean, real *rstd, const real *x, size_t R) {
    NormRows a;
    memset(&a, 0, sizeof a);
    a.weight = value_of(m, norm->weight), a.bias = value_of(m, norm->bias), a.x = x;
    a.y = y, a.mean = mean, a.rstd = rstd, a.R = R, a.C = norm->C;
    parallel_for(threads_for(R * a.C), R, norm_forward_row, &a);
}

static void norm_backward_row(void *context, size_t r) {
    const NormRows *a = (const NormRows *)context;
    const size_t C = a->C;
    const real *x = a->x + r * C, *dy = a->dy + r * C, *weight = a->weight, mu = a->mean[r], s = a->rstd[r];
    real *dx = a->dx + r * C, sum = 0, sum_hat = 0;
#pragma omp simd reduction(+ : sum, sum_hat)
    for (size_t i = 0; i < C; i++) {
        real d = dy[i] * weight[i];
        sum += d;
        sum_hat += d * (x[i] - mu);
    }
    const real shift = sum / (real)C, slope = sum_hat * s * s / (real)C;
#pragma omp simd
    for (size_t i = 0; i < C; i++) dx[i] += s * (dy[i] * weight[i] - shift - (x[i] - mu) * slope);
}

/* A task does COLUMN_BLOCK channels. */
static void norm_backward_columns(void *context, size_t task) {
    const NormRows *a = (const NormRows *)context;
    const size_t C = a->C, c0 = task * COLUMN_BLOCK, n = min_size(COLUMN_BLOCK, C - c0);
    real dw[COLUMN_BLOCK] = {0}, db[COLUMN_BLOCK] = {0};
    for (size_t r = 0; r < a->R; r++) {
        const real *x = a->x + r * C + c0, *dy = a->dy + r * C + c0, mu = a->mean[r], s = a->rstd[r];
#pragma omp simd
        for (size_t i = 0; i < n; i++) {
            dw[i] += dy[i] * (x[i] - mu) * s;
            db[i] += dy[i];
        }
    }
    for (size_t i = 0; i < n; i++) a->dweight[c0 + i] += dw[i], a->dbias[c0 + i] += db[i];
}

void norm_backward(const Transformer *m, const Norm *norm, real *dx, const real *dy, const real *x, real *mean,
                   real *rstd, size_t R) {
    NormRows a;
    memset(&a, 0, sizeof a);
    a.weight = value_of(m, norm->weight), a.x = x, a.dy = dy, a.dx = dx, a.mean = mean, a.rstd = rstd;
    a.dweight = grad_of(m, norm->weight), a.dbias = grad_of(m, norm->bias), a.R = R, a.C = norm->C;
    parallel_for(threads_for(R * a.C), R, norm_backward_row, &a);
    parallel_for(threads_for(R * a.C), column_tasks(a.C), norm_backward_columns, &a);
}

/* ---- Linear: out = residual + bias + in weight^T ---- */

typedef struct {
    real *out;
    const real *residual, *bias;
    size_t ldo, C;
} FillRows;

static void fill_row(void *context, size_t r) {
    const FillRows *a = (const FillRows *)context;
    real *o = a->out + r * a->ldo;
    const real *x = a->residual ? a->residual + r * a->ldo : NULL, *bias = a->bias;
    if (bias && x) {
#pragma omp simd
        for (size_t i = 0; i < a->C; i++) o[i] = x[i] + bias[i];
    } else
        memmove(o, bias ? bias : x, a->C * sizeof *o);
}

/* out (R,C), its rows ldo apart = residual + bias, each if there is one; residual may be out. Returns whether anything
 * was written: then the product must be added. */
static int fill_rows(real *out, size_t ldo, const real *residual, const real *bias, size_t R, size_t C) {
    FillRows a = {out, residual, bias, ldo, C};
    if (!bias && !residual) return 0;
    parallel_for(threads_for(R * C), R, fill_row, &a);
    return 1;
}

/* out (R,l->out) = or += in (R,l->in) weight^T. Packed weights, and those of decoding, whose rows are few, stream
 * by. */
void multiply(const Transformer *m, const Linear *l, real *out, size_t ldo, int accumulate, const real *in, size_t ldi,
              size_t R) {
    const Param *p = &m->params.row[l->weight];
    const Weights plain = {WEIGHTS_REAL, p->value, NULL}, w = p->packed.data ? p->packed : plain;
    if (m->state == DECODING || p->packed.data)
        gemm_stream(R, l->out, l->in, in, ldi, &w, accumulate, out, ldo, m->work);
    else
        gemm(0, 1, R, l->out, l->in, in, ldi, p->value, l->in, accumulate, out, ldo);
}

/* linear_forward    out (R,l->out) = residual + bias + in (R,l->in) weight^T; rows of out and residual are ldo apart,
 *                   rows of in ldi; residual may be NULL or out
 * linear_backward   din (R,l->in) = or += dout weight; dweight +=, dbias += from dout (R,l->out) and in */
void linear_forward(const Transformer *m, const Linear *l, real *out, size_t ldo, const real *residual, const real *in,
                    size_t ldi, size_t R) {
    const real *bias = l->bias == NO_ROW ? NULL : value_of(m, l->bias);
    int filled = fill_rows(out, ldo, residual, bias, R, l->out);
    multiply(m, l, out, ldo, filled, in, ldi, R);
}

typedef struct {
    real *dbias;
    const real *dout;
    size_t R, C;
} ColumnSums;

static void sum_columns(void *context, size_t task) {
    const ColumnSums *a = (const ColumnSums *)context;
    const size_t c0 = task * COLUMN_BLOCK, n = min_size(COLUMN_BLOCK, a->C - c0);
    real sum[COLUMN_BLOCK] = {0};
    for (size_t r = 0; r < a->R; r++) {
        const real *d = a->dout + r * a->C + c0;
#pragma omp simd
        for (size_t i = 0; i < n; i++) sum[i] += d[i];
    }
    for (size_t i = 0; i < n; i++) a->dbias[c0 + i] += sum[i];
}

void linear_backward(const Transformer *m, const Linear *l, real *din, int accumulate, const real *dout, const real *in,
                     size_t R) {
    gemm(0, 0, R, l->in, l->out, dout, l->out, value_of(m, l->weight), l->in, accumulate, din, l->in);
    gemm(1, 0, l->out, l->in, R, dout, l->out, in, l->in, 1, grad_of(m, l->weight), l->in);
    if (l->bias == NO_ROW) return;
    ColumnSums sums = {grad_of(m, l->bias), dout, R, l->out};
    parallel_for(threads_for(R * l->out), column_tasks(l->out), sum_columns, &sums);
}

/* ---- Embedding ---- */

/* embed_forward    x[b,i,:] = token_emb[ids[b,i],:] + pos_emb[i,:], or the position that the cell says
 * embed_backward   dtoken_emb[ids[b,i],:] += dx[b,i,:], dpos_emb[i,:] += dx[b,i,:]
 *   x, dx (B,n,C); ids (B,n) */
typedef struct {
    real *token, *position; /* the tables, or their gradients */
    real *x;
    const real *dx;
    const int32_t *ids;
    const Cell *cell; /* (B*n) or NULL */
    size_t R, n, C;
} Embed;

static void embed_row(void *context, size_t r) {
    const Embed *a = (const Embed *)context;
    const size_t pos = a->cell ? a->cell[r].pos : r % a->n;
    const real *t = a->token + (size_t)a->ids[r] * a->C, *p = a->position + pos * a->C;
    real *x = a->x + r * a->C;
#pragma omp simd
    for (size_t i = 0; i < a->C; i++) x[i] = t[i] + p[i];
}

void embed_forward(const Transformer *m, const Stack *s, real *x, const int32_t *ids, size_t B, size_t n,
                   const Cell *cell) {
    Embed a = {value_of(m, s->token_emb), value_of(m, s->pos_emb), x, NULL, ids, cell, B * n, n, s->C};
    parallel_for(threads_for(B * n * s->C), B * n, embed_row, &a);
}

static void embed_backward_columns(void *context, size_t task) {
    const Embed *a = (const Embed *)context;
    const size_t C = a->C, c0 = task * COLUMN_BLOCK, width = min_size(COLUMN_BLOCK, C - c0);
    for (size_t r = 0; r < a->R; r++) {
        real *t = a->token + (size_t)a->ids[r] * C + c0, *p = a->position + r % a->n * C + c0;
        const real *d = a->dx + r * C + c0;
#pragma omp simd
        for (size_t i = 0; i < width; i++) t[i] += d[i], p[i] += d[i];
    }
}

void embed_backward(const Transformer *m, const Stack *s, const real *dx, const int32_t *ids, size_t B, size_t n) {
    Embed a = {grad_of(m, s->token_emb), grad_of(m, s->pos_emb), NULL, dx, ids, NULL, B * n, n, s->C};
    parallel_for(threads_for(B * n * s->C), column_tasks(s->C), embed_backward_columns, &a);
}
