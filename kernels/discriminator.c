/* discriminator.c - the discriminator's layers on a CPU, fast: 4x4 convolutions, batch norm with leaky ReLU. The plain
 * loops are in training/discriminator.c.
 *
 * A convolution of the whole batch is one matrix product, weight (M,C*16) times columns (C*16,n): column i holds the
 * pixels that result i sees. Columns are gathered for some rows of results at a time (a strip). Strips are cut by sizes
 * alone, and a task is one channel or one row of the columns, so results do not depend on the number of threads. */
#include "kernels/kernels.h"

#include <math.h>
#include <string.h>

enum {
    STRIP_REALS = 1 << 20, /* columns of a strip, unless that is less than MIN_COLUMNS */
    MIN_COLUMNS = 256,     /* fewer make poor matrix products */
    FEW = 1 << 16          /* numbers that are not worth a second thread */
};

static int threads_worth(size_t numbers) {
    return numbers < FEW ? 1 : threads_free();
}

/* ---- 4x4 convolutions ---- */

/* Rows row0.. of the B*h rows of results, and their columns (C*16,rows*w) */
typedef struct {
    const Conv4 *c;
    size_t h, w; /* of y */
    const real *x;
    real *dx, *columns;
    size_t row0, rows;
} Strip;

static size_t strip_rows(const Conv4 *c) {
    const size_t w = conv4_side(c->W, c->stride);
    return max_size(max_size(STRIP_REALS / (c->C * CONV4_TAPS), MIN_COLUMNS) / w, 1);
}

static Strip strip_at(const Compute *on, const Conv4 *c, const real *x, real *dx, size_t row0) {
    const size_t h = conv4_side(c->H, c->stride), w = conv4_side(c->W, c->stride);
    const Strip s = {c, h, w, x, dx, (real *)on->scratch, row0, min_size(strip_rows(c), c->B * h - row0)};
    return s;
}

/* Results first..end-1 of a row see a pixel through this tap, at row *iy of the plane; none when first = end. */
static void taps_inside(const Strip *s, size_t row, size_t tap, size_t *iy, size_t *first, size_t *end) {
    const Conv4 *c = s->c;
    const size_t ky = tap / CONV4_SIDE, kx = tap % CONV4_SIDE;
    *iy = c->stride * (row % s->h) + ky - 1; /* above the plane: wraps round, and is too large as well */
    *first = kx == 0;
    *end = *iy < c->H && kx <= c->W ? min_size((c->W - kx) / c->stride + 1, s->w) : *first;
    if (*end < *first) *end = *first;
}

/* Row k = 16 c + tap of the columns: pixel (stride*y - 1 + ky, stride*x - 1 + kx) of channel c, 0 outside. */
static void gather_task(void *context, size_t k) {
    const Strip *s = (const Strip *)context;
    const Conv4 *c = s->c;
    const size_t w = s->w, stride = c->stride;
    real *to = s->columns + k * s->rows * w;
    for (size_t r = s->row0; r < s->row0 + s->rows; r++, to += w) {
        size_t iy, first, end;
        taps_inside(s, r, k % CONV4_TAPS, &iy, &first, &end);
        const real *from = s->x + (k / CONV4_TAPS * c->B + r / s->h) * c->H * c->W;
        if (end > first) from += iy * c->W + stride * first + k % CONV4_SIDE - 1;
        memset(to, 0, first * sizeof *to);
        if (stride == 1)
            memcpy(to + first, from, (end - first) * sizeof *to);
        else
            for (size_t x = first; x < end; x++) to[x] = from[2 * (x - first)];
        memset(to + end, 0, (w - end) * sizeof *to);
    }
}

/* The other way, for the gradient: what all taps of channel `channel` hold is added to dx. */
static void scatter_task(void *context, size_t channel) {
    const Strip *s = (const Strip *)context;
    const Conv4 *c = s->c;
    const size_t w = s->w, stride = c->stride;
    for (size_t tap = 0; tap < CONV4_TAPS; tap++) {
        const real *from = s->columns + (channel * CONV4_TAPS + tap) * s->rows * w;
        for (size_t r = s->row0; r < s->row0 + s->rows; r++, from += w) {
            size_t iy, first, end;
            taps_inside(s, r, tap, &iy, &first, &end);
            if (end == first) continue;
            real *to = s->dx + ((channel * c->B + r / s->h) * c->H + iy) * c->W + stride * first + tap % CONV4_SIDE - 1;
            if (stride == 1)
                for (size_t x = first; x < end; x++) to[x - first] += from[x];
            else
                for (size_t x = first; x < end; x++) to[2 * (x - first)] += from[x];
        }
    }
}

size_t conv4_needs_fast(const Compute *on, const Conv4 *c) {
    const size_t h = conv4_side(c->H, c->stride), w = conv4_side(c->W, c->stride);
    (void)on;
    return c->C * CONV4_TAPS * min_size(strip_rows(c), c->B * h) * w * sizeof(real);
}

/* y (M,n) = w (M,C*16) columns */
void conv4_forward_fast(const Compute *on, real *y, const real *x, const real *w, const Conv4 *c) {
    const size_t K = c->C * CONV4_TAPS, rows = c->B * conv4_side(c->H, c->stride);
    for (size_t row = 0; row < rows; row += strip_rows(c)) {
        Strip s = strip_at(on, c, x, NULL, row);
        const size_t cols = s.rows * s.w;
        parallel_for(threads_worth(K * cols), K, gather_task, &s);
        gemm(on->precision, 0, 0, c->M, cols, K, w, K, s.columns, cols, 0, y + row * s.w, rows * s.w);
    }
}

/* dw (M,C*16) += dy columns^T     columns of dx = w^T dy */
void conv4_backward_fast(const Compute *on, real *dx, real *dw, const real *dy, const real *x, const real *w,
                         const Conv4 *c) {
    const size_t K = c->C * CONV4_TAPS, rows = c->B * conv4_side(c->H, c->stride);
    if (dx) memset(dx, 0, c->C * c->B * c->H * c->W * sizeof *dx);
    for (size_t row = 0; row < rows; row += strip_rows(c)) {
        Strip s = strip_at(on, c, x, dx, row);
        const size_t cols = s.rows * s.w, n = rows * s.w;
        const real *g = dy + row * s.w;
        if (dw) {
            parallel_for(threads_worth(K * cols), K, gather_task, &s);
            gemm(on->precision, 0, 1, c->M, K, cols, g, n, s.columns, cols, 1, dw, K);
        }
        if (!dx) continue;
        gemm(on->precision, 1, 0, K, cols, c->M, w, K, g, n, 0, s.columns, cols);
        parallel_for(threads_worth(K * cols), c->C, scatter_task, &s);
    }
}

/* ---- Batch norm or a bias, then leaky ReLU: a task is a channel ---- */

typedef struct {
    const Activation *s;
    real *a;             /* forward */
    const real *y, *was; /* was: a, backward */
    const real *other;
    real *g, *dgamma, *dbeta;
    double step;
} Channel;

/* sum of (x-a)(y-b), emptied into double every 1024 numbers */
static double sum_products(const real *x, real a, const real *y, real b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i += 1024) {
        const size_t end = min_size(n, i + 1024);
        real part = 0;
#pragma omp simd reduction(+ : part)
        for (size_t j = i; j < end; j++) part += (x[j] - a) * (y[j] - b);
        sum += (double)part;
    }
    return sum;
}

static void measure_channel(const Activation *s, const real *y, size_t m) {
    const double n = (double)s->n, mean = sum_reals(y, s->n) / n;
    s->mean[m] = (real)mean;
    const double variance = sum_products(y, s->mean[m], y, s->mean[m], s->n) / n;
    s->rstd[m] = (real)(1 / sqrt(variance + s->eps));
    if (!s->running_mean) return;
    s->running_mean[m] = (real)((1 - s->momentum) * (double)s->running_mean[m] + s->momentum * mean);
    s->running_var[m] = (real)((1 - s->momentum) * (double)s->running_var[m] + s->momentum * (variance * n / (n - 1)));
    if (m == 0) *s->tracked += 1;
}

static void forward_task(void *context, size_t m) {
    const Channel *channel = (const Channel *)context;
    const Activation *s = channel->s;
    const real *y = channel->y + m * s->n, slope = s->slope, shift = s->beta[m];
    real *a = channel->a + m * s->n, mean = 0, scale = 1;
    if (s->gamma) {
        measure_channel(s, y, m);
        mean = s->mean[m], scale = s->rstd[m] * s->gamma[m];
    }
    for (size_t i = 0; i < s->n; i++) {
        const real t = (y[i] - mean) * scale + shift;
        a[i] = t > 0 ? t : slope * t;
    }
}

static void backward_task(void *context, size_t m) {
    const Channel *channel = (const Channel *)context;
    const Activation *s = channel->s;
    const size_t n = s->n;
    const real *a = channel->was + m * n, *y = channel->y + m * n, slope = s->slope;
    real *g = channel->g + m * n;
    if (channel->step != 0) {
        const real *other = channel->other + m * n, step = (real)channel->step;
        for (size_t i = 0; i < n; i++) g[i] += step * (real)((a[i] > other[i]) - (a[i] < other[i]));
    }
    for (size_t i = 0; i < n; i++) g[i] *= a[i] > 0 ? 1 : slope;
    const double sum = sum_reals(g, n);
    if (channel->dbeta) channel->dbeta[m] += (real)sum;
    if (!s->gamma) return;
    const real mean = s->mean[m], rstd = s->rstd[m], scale = rstd * s->gamma[m];
    const double along = (double)rstd * sum_products(g, 0, y, mean, n); /* sum of g times the normalised y */
    if (channel->dgamma) channel->dgamma[m] += (real)along;
    const real level = (real)(sum / (double)n), tilt = (real)((double)rstd * along / (double)n);
    for (size_t i = 0; i < n; i++) g[i] = scale * (g[i] - level - tilt * (y[i] - mean));
}

size_t activate_needs_fast(const Compute *on, const Activation *s) {
    (void)on, (void)s;
    return 0;
}

void activate_forward_fast(const Compute *on, real *a, const real *y, const Activation *s) {
    Channel channel = {.s = s, .a = a, .y = y};
    (void)on;
    parallel_for(threads_worth(s->M * s->n), s->M, forward_task, &channel);
}

void activate_backward_fast(const Compute *on, real *g, real *dgamma, real *dbeta, const real *a, const real *y,
                            const real *other, double step, const Activation *s) {
    Channel channel = {
        .s = s, .y = y, .was = a, .other = other, .g = g, .dgamma = dgamma, .dbeta = dbeta, .step = step};
    (void)on;
    parallel_for(threads_worth(s->M * s->n), s->M, backward_task, &channel);
}
