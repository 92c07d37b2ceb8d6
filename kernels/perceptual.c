/* perceptual.c - the layers of LPIPS on a CPU, fast: ReLU, pooling, the comparison of features. The plain loops are in
 * training/perceptual.c. Tasks are stretches of numbers, planes (a channel of a picture), blocks of positions. */
#include "kernels/kernels.h"

#include <math.h>
#include <string.h>

enum {
    STRETCH = 1 << 14, /* numbers of a task */
    POSITIONS = 256    /* compared at a time */
};

/* ---- ReLU ---- */

typedef struct {
    real *to;
    const real *y; /* backward */
    size_t n;
} Relu;

static void relu_task(void *context, size_t task) {
    const Relu *a = (const Relu *)context;
    const size_t end = min_size(a->n, (task + 1) * STRETCH);
    real *y = a->to;
    for (size_t i = task * STRETCH; i < end; i++) y[i] = y[i] > 0 ? y[i] : 0;
}

static void relu_backward_task(void *context, size_t task) {
    const Relu *a = (const Relu *)context;
    const size_t end = min_size(a->n, (task + 1) * STRETCH);
    real *dy = a->to;
    const real *y = a->y;
    for (size_t i = task * STRETCH; i < end; i++) dy[i] = y[i] > 0 ? dy[i] : 0;
}

void relu_forward_fast(const Compute *on, real *y, size_t n) {
    Relu a = {y, NULL, n};
    (void)on;
    parallel_for(threads_free(), ceil_div(n, STRETCH), relu_task, &a);
}

void relu_backward_fast(const Compute *on, real *dy, const real *y, size_t n) {
    Relu a = {dy, y, n};
    (void)on;
    parallel_for(threads_free(), ceil_div(n, STRETCH), relu_backward_task, &a);
}

/* ---- Pooling ---- */

typedef struct {
    real *to;
    const real *x, *dy; /* dy: backward */
    size_t h, w;        /* of x */
} Pool;

static void pool_task(void *context, size_t plane) {
    const Pool *a = (const Pool *)context;
    const size_t oh = a->h / 2, ow = a->w / 2;
    for (size_t y = 0; y < oh; y++) {
        const real *up = a->x + plane * a->h * a->w + 2 * y * a->w, *down = up + a->w;
        real *to = a->to + (plane * oh + y) * ow;
        for (size_t x = 0; x < ow; x++) {
            const real top = up[2 * x] > up[2 * x + 1] ? up[2 * x] : up[2 * x + 1];
            const real bottom = down[2 * x] > down[2 * x + 1] ? down[2 * x] : down[2 * x + 1];
            to[x] = top > bottom ? top : bottom;
        }
    }
}

static void pool_backward_task(void *context, size_t plane) {
    const Pool *a = (const Pool *)context;
    const size_t oh = a->h / 2, ow = a->w / 2, w = a->w;
    const real *read = a->x + plane * a->h * w;
    real *to = a->to + plane * a->h * w;
    memset(to, 0, a->h * w * sizeof *to);
    for (size_t y = 0; y < oh; y++)
        for (size_t x = 0; x < ow; x++) {
            const size_t corner = 2 * y * w + 2 * x, pixel[4] = {corner, corner + 1, corner + w, corner + w + 1};
            size_t most = pixel[0];
            for (int k = 1; k < 4; k++)
                if (read[pixel[k]] > read[most]) most = pixel[k];
            to[most] = a->dy[(plane * oh + y) * ow + x];
        }
}

void pool_forward_fast(const Compute *on, real *y, const real *x, size_t B, size_t C, size_t h, size_t w) {
    Pool a = {y, x, NULL, h, w};
    (void)on;
    parallel_for(threads_free(), B * C, pool_task, &a);
}

void pool_backward_fast(const Compute *on, real *dx, const real *dy, const real *x, size_t B, size_t C, size_t h,
                        size_t w) {
    Pool a = {dx, x, dy, h, w};
    (void)on;
    parallel_for(threads_free(), B * C, pool_backward_task, &a);
}

/* ---- Comparing features ---- */

typedef struct {
    const TapShape *c;
    const real *a, *r, *lin;
    real *dr;
    double *sums;  /* (B,blocks) */
    size_t blocks; /* of positions of a picture */
} Tap;

/* Block `task % blocks` of picture task / blocks */
static void tap_task(void *context, size_t task) {
    const Tap *t = (const Tap *)context;
    const size_t C = t->c->C, hw = t->c->hw, begin = task % t->blocks * POSITIONS, n = min_size(POSITIONS, hw - begin);
    const size_t at = task / t->blocks * C * hw + begin;
    double in_a[POSITIONS] = {0}, in_r[POSITIONS] = {0}, along[POSITIONS] = {0}, sum[POSITIONS] = {0}, total = 0;
    for (size_t c = 0; c < C; c++) {
        const real *a = t->a + at + c * hw, *r = t->r + at + c * hw;
        for (size_t i = 0; i < n; i++) in_a[i] += (double)a[i] * (double)a[i], in_r[i] += (double)r[i] * (double)r[i];
    }
    for (size_t i = 0; i < n; i++) in_a[i] = in_a[i] > 0 ? 1 / (sqrt(in_a[i]) + 1e-10) : 0;
    double length[POSITIONS], gap[POSITIONS];
    for (size_t i = 0; i < n; i++) {
        length[i] = sqrt(in_r[i]);
        in_r[i] = 1 / (length[i] + 1e-10);
        gap[i] = in_a[i] - in_r[i];
    }
    for (size_t c = 0; c < C; c++) {
        const real *a = t->a + at + c * hw, *r = t->r + at + c * hw;
        const double lin = (double)t->lin[c];
        for (size_t i = 0; i < n; i++) {
            const double d = ((double)a[i] - (double)r[i]) * in_a[i] + (double)r[i] * gap[i];
            sum[i] += lin * d * d;
            along[i] += lin * d * (double)r[i];
        }
    }
    for (size_t i = 0; i < n; i++) total += sum[i];
    t->sums[task] = total;
    if (!t->dr) return;
    for (size_t i = 0; i < n; i++) along[i] *= length[i] > 0 ? in_r[i] / length[i] : 0;
    for (size_t c = 0; c < C; c++) {
        const real *a = t->a + at + c * hw, *r = t->r + at + c * hw;
        real *dr = t->dr + at + c * hw;
        const double lin = (double)t->lin[c], weight = t->c->weight;
        const int accumulate = t->c->accumulate;
        for (size_t i = 0; i < n; i++) {
            const double d = ((double)a[i] - (double)r[i]) * in_a[i] + (double)r[i] * gap[i];
            dr[i] = (accumulate ? dr[i] : 0) + (real)(-2 * weight * in_r[i] * (lin * d - (double)r[i] * along[i]));
        }
    }
}

size_t comparison_sums_fast(size_t B, size_t hw) {
    return B * ceil_div(hw, POSITIONS);
}

void compare_features_fast(const Compute *on, double *sums, real *dr, const real *a, const real *r, const real *lin,
                           const TapShape *c) {
    Tap t = {c, a, r, lin, dr, sums, ceil_div(c->hw, POSITIONS)};
    (void)on;
    parallel_for(threads_free(), c->B * t.blocks, tap_task, &t);
}
