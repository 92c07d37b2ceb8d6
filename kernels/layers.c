/* layers.c - the layers of the transformer but attention, faster: embedding, layer norm, linear, GELU, head variants.
 *
 * Each is the fellow of the plain loop of the same name in transformer.cu, where formula and shapes stand. Rows run in
 * parallel; sums over rows (gradients of biases, norms, embeddings) run in parallel over columns, so that the order of
 * additions, hence every bit, is the same for any number of threads. */
#include "kernels/math.h"

enum { COLUMN_BLOCK = 32 }; /* columns that one task sums over all rows */

static size_t column_tasks(size_t C) {
    return ceil_div(C, COLUMN_BLOCK);
}

/* ---- Embedding ---- */

typedef struct {
    real *dtoken, *dposition;
    const real *token, *position;
    real *x;
    const real *dx;
    const int32_t *ids;
    const Position *at;
    size_t R, n, C;
} Embed;

static void embed_row(void *context, size_t r) {
    const Embed *a = (const Embed *)context;
    const size_t pos = a->at ? a->at[r].pos : r % a->n;
    const real *t = a->token + (size_t)a->ids[r] * a->C, *p = a->position + pos * a->C;
    real *x = a->x + r * a->C;
#pragma omp simd
    for (size_t i = 0; i < a->C; i++) x[i] = t[i] + p[i];
}

void embed_forward_fast(const Compute *on, real *x, const int32_t *ids, const real *token, const real *position,
                        const Position *at, size_t B, size_t n, size_t C) {
    Embed a = {NULL, NULL, token, position, x, NULL, ids, at, B * n, n, C};
    (void)on;
    parallel_for(threads_for(B * n * C), B * n, embed_row, &a);
}

static void embed_backward_columns(void *context, size_t task) {
    const Embed *a = (const Embed *)context;
    const size_t C = a->C, c0 = task * COLUMN_BLOCK, width = min_size(COLUMN_BLOCK, C - c0);
    for (size_t r = 0; r < a->R; r++) {
        real *t = a->dtoken + (size_t)a->ids[r] * C + c0, *p = a->dposition + r % a->n * C + c0;
        const real *d = a->dx + r * C + c0;
#pragma omp simd
        for (size_t i = 0; i < width; i++) t[i] += d[i], p[i] += d[i];
    }
}

void embed_backward_fast(const Compute *on, real *dtoken, real *dposition, const real *dx, const int32_t *ids, size_t B,
                         size_t n, size_t C, size_t V) {
    Embed a = {dtoken, dposition, NULL, NULL, NULL, dx, ids, NULL, B * n, n, C};
    (void)on, (void)V;
    parallel_for(threads_for(B * n * C), column_tasks(C), embed_backward_columns, &a);
}

/* ---- Layer norm ---- */

typedef struct {
    const real *weight, *x;
    const real *bias, *dy;      /* forward; backward */
    real *y, *dx, *mean, *rstd; /* forward; backward; mean and rstd are read by backward */
    real *dweight, *dbias;
    size_t R, C, n, skip;
} NormRows;

/* Row r of what is normalised is this row of x. */
static inline size_t source_row(const NormRows *a, size_t r) {
    const size_t rows = a->n - a->skip; /* of a batch row */
    return a->skip ? r / rows * a->n + a->skip + r % rows : r;
}

static void norm_forward_row(void *context, size_t r) {
    const NormRows *a = (const NormRows *)context;
    const size_t C = a->C;
    const real *x = a->x + source_row(a, r) * C, *weight = a->weight, *bias = a->bias;
    real *y = a->y + r * C, sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < C; i++) sum += x[i];
    const real mu = sum / (real)C;
#pragma omp simd reduction(+ : square)
    for (size_t i = 0; i < C; i++) square += (x[i] - mu) * (x[i] - mu);
    const real s = (real)(1 / sqrt((double)square / (double)C + LAYER_NORM_EPS));
#pragma omp simd
    for (size_t i = 0; i < C; i++) y[i] = (x[i] - mu) * s * weight[i] + bias[i];
    a->mean[r] = mu, a->rstd[r] = s;
}

void norm_forward_fast(const Compute *on, real *y, real *mean, real *rstd, const real *x, const real *weight,
                       const real *bias, size_t R, size_t C, size_t n, size_t skip) {
    NormRows a = {.weight = weight, .bias = bias, .x = x, .y = y, .mean = mean, .rstd = rstd};
    (void)on;
    a.R = R, a.C = C, a.n = n, a.skip = skip;
    parallel_for(threads_for(R * C), R, norm_forward_row, &a);
}

static void norm_backward_row(void *context, size_t r) {
    const NormRows *a = (const NormRows *)context;
    const size_t C = a->C, at = source_row(a, r) * C;
    const real *x = a->x + at, *dy = a->dy + r * C, *weight = a->weight, mu = a->mean[r], s = a->rstd[r];
    real *dx = a->dx + at, sum = 0, sum_hat = 0;
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

/* Adds the sums over rows from..from+rows-1 of n channels from c0 on. */
static void norm_backward_rows(const NormRows *a, size_t from, size_t rows, size_t c0, size_t n) {
    const size_t C = a->C, source = source_row(a, from);
    real dw[COLUMN_BLOCK] = {0}, db[COLUMN_BLOCK] = {0};
    for (size_t r = 0; r < rows; r++) {
        const real *x = a->x + (source + r) * C + c0, *dy = a->dy + (from + r) * C + c0;
        const real mu = a->mean[from + r], s = a->rstd[from + r];
#pragma omp simd
        for (size_t i = 0; i < n; i++) {
            dw[i] += dy[i] * (x[i] - mu) * s;
            db[i] += dy[i];
        }
    }
    for (size_t i = 0; i < n; i++) a->dweight[c0 + i] += dw[i], a->dbias[c0 + i] += db[i];
}

/* A task does COLUMN_BLOCK channels, rows that follow each other in x at a time. */
static void norm_backward_columns(void *context, size_t task) {
    const NormRows *a = (const NormRows *)context;
    const size_t c0 = task * COLUMN_BLOCK, n = min_size(COLUMN_BLOCK, a->C - c0),
                 rows = a->skip ? a->n - a->skip : a->R;
    for (size_t r = 0; r < a->R; r += rows) norm_backward_rows(a, r, rows, c0, n);
}

void norm_backward_fast(const Compute *on, real *dx, real *dx_operand, real *dweight, real *dbias, const real *dy,
                        const real *x, const real *weight, const real *mean, const real *rstd, int dy_f32, size_t R,
                        size_t C, size_t n, size_t skip) {
    NormRows a = {.weight = weight, .x = x, .dy = dy, .dx = dx, .mean = (real *)mean, .rstd = (real *)rstd};
    (void)on, (void)dx_operand, (void)dy_f32;
    a.dweight = dweight, a.dbias = dbias, a.R = R, a.C = C, a.n = n, a.skip = skip;
    parallel_for(threads_for(R * C), R, norm_backward_row, &a);
    parallel_for(threads_for(R * C), column_tasks(C), norm_backward_columns, &a);
}

/* ---- Linear: y = add + bias, each if there is one; then the product comes on top ---- */

typedef struct {
    real *y;
    const real *add, *bias;
    size_t M;
} FillRows;

static void fill_row(void *context, size_t r) {
    const FillRows *a = (const FillRows *)context;
    real *y = a->y + r * a->M;
    const real *x = a->add ? a->add + r * a->M : NULL, *bias = a->bias;
    if (bias && x) {
#pragma omp simd
        for (size_t i = 0; i < a->M; i++) y[i] = x[i] + bias[i];
    } else
        memmove(y, bias ? bias : x, a->M * sizeof *y);
}

/* Returns whether anything was written: then the product must be added. */
static int fill_rows(real *y, const real *add, const real *bias, size_t R, size_t M) {
    FillRows a = {y, add, bias, M};
    if (!bias && !add) return 0;
    parallel_for(threads_for(R * M), R, fill_row, &a);
    return 1;
}

void linear_forward_fast(const Compute *on, real *y, const real *x, const real *w, const real *bias, const real *add,
                         int y_f32, size_t R, size_t C, size_t M) {
    const int filled = fill_rows(y, add, bias, R, M);
    (void)on, (void)y_f32;
    gemm(on->precision, 0, 1, R, M, C, x, C, w, C, filled, y, M);
}

size_t stream_needs_fast(const Compute *on, size_t R, size_t C) {
    (void)on;
    return gemm_stream_work(R, C);
}

void linear_stream_fast(const Compute *on, real *y, const real *x, const Weights *w, const real *bias, const real *add,
                        size_t R, size_t C, size_t M) {
    const int filled = fill_rows(y, add, bias, R, M);
    gemm_stream(R, M, C, x, C, w, filled, y, M, on->scratch);
}

typedef struct {
    real *sum;
    const real *x;
    size_t R, C;
} ColumnSums;

static void sum_columns(void *context, size_t task) {
    const ColumnSums *a = (const ColumnSums *)context;
    const size_t c0 = task * COLUMN_BLOCK, n = min_size(COLUMN_BLOCK, a->C - c0);
    real sum[COLUMN_BLOCK] = {0};
    for (size_t r = 0; r < a->R; r++) {
        const real *x = a->x + r * a->C + c0;
#pragma omp simd
        for (size_t i = 0; i < n; i++) sum[i] += x[i];
    }
    for (size_t i = 0; i < n; i++) a->sum[c0 + i] += sum[i];
}

void linear_backward_fast(const Compute *on, real *dx, real *dw, real *db, const real *dy, const real *x, const real *w,
                          int accumulate, int dx_f32, size_t R, size_t C, size_t M) {
    (void)on, (void)dx_f32;
    gemm(on->precision, 0, 0, R, C, M, dy, M, w, C, accumulate, dx, C);
    gemm(on->precision, 1, 0, M, C, R, dy, M, x, C, 1, dw, C);
    if (!db) return;
    ColumnSums sums = {db, dy, R, M};
    parallel_for(threads_for(R * M), column_tasks(M), sum_columns, &sums);
}

/* ---- GELU ---- */

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

void gelu_forward_fast(const Compute *on, real *g, real *dg, const real *bias, size_t R, size_t H) {
    Gelu a = {g, dg, bias, H};
    (void)on;
    parallel_for(threads_for(R * H), R, gelu_forward_row, &a);
}

static void gelu_backward_row(void *context, size_t r) {
    const Gelu *a = (const Gelu *)context;
    real *dh = a->g + r * a->H;
    const real *dg = a->dg + r * a->H;
#pragma omp simd
    for (size_t i = 0; i < a->H; i++) dh[i] *= dg[i];
}

void gelu_backward_fast(const Compute *on, real *dh, const real *dg, size_t R, size_t H) {
    Gelu a = {dh, (real *)dg, NULL, H};
    (void)on;
    parallel_for(threads_for(R * H), R, gelu_backward_row, &a);
}

/* ---- Variants of the head ---- */

typedef struct {
    const Variant *v;
    real *logits, *row_sum;
    const real *raw, *dlogits;
    const Position *at;
    size_t n, K;
} VariantRows;

/* What the encoder read of batch row b: t, (label,) x_t. */
static const int32_t *ids_of(const Variant *v, size_t b) {
    return v->ids + b * (v->prompt + v->N);
}

/* Element of log_scalors for position i of batch row b */
static size_t scalor_index(const Variant *v, size_t b, size_t i) {
    const size_t t = (size_t)ids_of(v, b)[0] - 1;
    return v->fine ? t * v->length + i : t;
}

static void add_residual(real *row, size_t K, double alpha, int32_t x_t) {
    const double other = (1 - alpha) / (double)K;
    const real same = (real)log(alpha + other), different = (real)log(other), there = row[x_t] + same;
#pragma omp simd
    for (size_t k = 0; k < K; k++) row[k] += different;
    row[x_t] = there;
}

static void variant_forward_row(void *context, size_t r) {
    const VariantRows *a = (const VariantRows *)context;
    const Variant *v = a->v;
    const size_t K = a->K, b = a->at ? a->at[r].b : r / a->n, i = a->at ? a->at[r].pos : r % a->n;
    const int32_t *ids = ids_of(v, b);
    const real *raw = a->raw + r * K;
    real *logits = a->logits + r * K;
    if (v->log_scalors) {
        const real scale = (real)exp((double)v->log_scalors[scalor_index(v, b, i)]);
#pragma omp simd
        for (size_t k = 0; k < K; k++) logits[k] = raw[k] * scale;
    } else if (logits != raw)
        memcpy(logits, raw, K * sizeof *raw);
    if (v->residual) add_residual(logits, K, (double)v->alpha[ids[0]], ids[v->prompt + i]);
}

size_t variant_needs_fast(const Compute *on, size_t R) {
    (void)on;
    return R * sizeof(real);
}

void variant_forward_fast(const Compute *on, real *logits, const real *raw, const Variant *v, const Position *at,
                          size_t B, size_t n, size_t K) {
    VariantRows a = {v, logits, NULL, raw, NULL, at, n, K};
    (void)on;
    parallel_for(threads_for(B * n * K), B * n, variant_forward_row, &a);
}

static void variant_backward_row(void *context, size_t r) {
    const VariantRows *a = (const VariantRows *)context;
    const size_t K = a->K;
    const real scale = (real)exp((double)a->v->log_scalors[scalor_index(a->v, r / a->n, r % a->n)]);
    const real *d = a->dlogits + r * K, *raw = a->raw + r * K;
    real *draw = a->logits + r * K;
    a->row_sum[r] = scale * dot(d, raw, K);
#pragma omp simd
    for (size_t k = 0; k < K; k++) draw[k] = d[k] * scale;
}

void variant_backward_fast(const Compute *on, real *draw, real *dlog_scalors, const real *dlogits, const real *raw,
                           const Variant *v, size_t B, size_t n, size_t K) {
    VariantRows a = {v, draw, (real *)on->scratch, raw, dlogits, NULL, n, K};
    parallel_for(threads_for(B * n * K), B * n, variant_backward_row, &a);
    for (size_t r = 0; r < B * n; r++) dlog_scalors[scalor_index(v, r / n, r % n)] += a.row_sum[r];
}
