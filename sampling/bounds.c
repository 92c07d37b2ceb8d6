/* bounds.c - how likely a model finds a picture: the variational bound (paper section 3.1). */
#include "sampling/sampling.h"

#include <stdlib.h>
#include <string.h>

enum { CLASS_DRAWS = 8, PICTURE_DRAWS = 2 }; /* draws of the chain for a case; they divide BOUND_ROWS */

/* Cases whose bound is wanted: classes for one picture, or pictures. A batch has BOUND_ROWS / draws of them, n cells in
 * all, of which the kept ones come first in the arrays of size (n) and (n,K). */
typedef struct {
    size_t cases, draws;
    int last; /* scales T..last have a say */
    int one_picture;
    const int32_t *tokens; /* (cases,N), or (N) of the one picture */
    const uint8_t *keep;   /* (N), or NULL: all */
    const int32_t *label;  /* (cases), or NULL */
    size_t N, n, rows, kept;
    int32_t *chain;                 /* (T+1,n) x_0 .. x_T */
    int32_t *x_0, *x_prev, *x_t;    /* (n) */
    int32_t *row_scale, *row_label; /* (BOUND_ROWS) */
    real *q, *logits;               /* (n,K) */
} Bound;

static Err bound_buffers(Bound *a, const Model *m) {
    size_t n = a->n = BOUND_ROWS * a->N, reals;
    TRY(size_mul(&reals, n, m->K));
    TRY(mem_alloc(&a->chain, (size_t)m->schedule.T + 4, n * sizeof *a->chain, "tokens of every scale"));
    TRY(mem_alloc(&a->row_scale, 2 * BOUND_ROWS, sizeof *a->row_scale, "scales of a batch"));
    TRY(mem_alloc(&a->q, reals, sizeof *a->q, "posterior"));
    a->x_0 = a->chain + ((size_t)m->schedule.T + 1) * n, a->x_prev = a->x_0 + n, a->x_t = a->x_prev + n;
    a->row_label = a->row_scale + BOUND_ROWS;
    return mem_alloc(&a->logits, reals, sizeof *a->logits, "logits");
}

static void bound_free(Bound *a) {
    void *buffers[] = {a->chain, a->row_scale, a->q, a->logits};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
}

static int bound_keeps(const Bound *a, size_t cell) {
    return !a->keep || a->keep[cell % a->N];
}

/* A row's chain, as noise makes it: the same noise for all cases, so that they can be compared. What is not kept is
 * unknown: uniform at every scale. */
static void bound_row(Bound *a, const Model *m, size_t first_case, size_t row, uint64_t seed) {
    const size_t N = a->N, c = first_case + row / a->draws;
    const size_t at = row % a->draws * N; /* of its random numbers */
    const int32_t *tokens = a->tokens + (a->one_picture ? 0 : c) * N;
    int32_t *x = a->chain + row * N;
    for (size_t i = 0; i < N; i++)
        x[i] = bound_keeps(a, i) ? tokens[i]
                                 : (int32_t)rng_below(seed, rng_stream(RNG_START, 2, 0), at + i, (uint32_t)m->K);
    for (int t = 1; t <= m->schedule.T; t++, x += a->n) {
        memcpy(x + a->n, x, N * sizeof *x);
        noise_step(x + a->n, N, m->K, m->schedule.beta[t], seed, rng_stream(RNG_NOISE, (uint64_t)t, 0), at);
    }
    a->row_label[row] = a->label ? a->label[c] : 0;
}

/* bound[c] += KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), a mean over the kept cells, for the cases of a batch */
static Err bound_batch(Bound *a, Model *m, size_t first_case, int t, double *bound) {
    const size_t cells = a->rows * a->N, K = m->K;
    const int32_t *x_t = a->chain + (size_t)t * a->n, *x_prev = x_t - a->n;
    const real *logits;
    for (size_t b = 0; b < a->rows; b++) a->row_scale[b] = t;
    TRY(transformer_forward(m->net, x_prev, x_t, a->row_scale, a->label ? a->row_label : NULL, a->rows, a->N, &logits));
    a->kept = 0;
    for (size_t i = 0; i < cells; i++) {
        if (!bound_keeps(a, i)) continue;
        memcpy(a->logits + a->kept * K, logits + i * K, K * sizeof *logits);
        a->x_0[a->kept] = a->chain[i], a->x_prev[a->kept] = x_prev[i], a->x_t[a->kept++] = x_t[i];
    }
    posterior(a->q, a->x_0, a->x_t, a->kept, K, &m->schedule, t);
    const size_t per_case = a->kept / a->rows * a->draws;
    for (size_t c = 0; c < a->rows / a->draws; c++) {
        const size_t at = c * per_case;
        Loss loss;
        TRY(denoising_loss(&loss, a->logits + at * K, a->x_prev + at, a->q + at * K, per_case, K, 1, 1, NULL));
        bound[first_case + c] += loss.soft;
    }
    return OK;
}

static Err bound_cases(Bound *a, Model *m, uint64_t seed, double *bound) {
    const size_t at_once = BOUND_ROWS / a->draws;
    memset(bound, 0, a->cases * sizeof *bound);
    TRY(bound_buffers(a, m));
    for (int t = m->schedule.T; t >= a->last; t--) {
        TRY(model_scale(m, t));
        TRY(transformer_plan(m->net, BOUND_ROWS, a->N, 0));
        for (size_t c = 0; c < a->cases; c += at_once) {
            a->rows = min_size(at_once, a->cases - c) * a->draws;
            for (size_t row = 0; row < a->rows; row++) bound_row(a, m, c, row, seed);
            TRY(bound_batch(a, m, c, t, bound));
        }
    }
    return OK;
}

Err model_class_bounds(Model *m, const int32_t *tokens, const uint8_t *keep, uint64_t seed, double *bound) {
    const size_t N = m->h * m->w;
    int32_t *label;
    if (!memchr(keep, 1, N)) return err("no token is kept: nothing tells the class of the picture");
    TRY(mem_alloc(&label, m->n_classes, sizeof *label, "classes"));
    for (size_t c = 0; c < m->n_classes; c++) label[c] = (int32_t)c;
    Bound a = {.cases = m->n_classes,
               .draws = CLASS_DRAWS,
               .last = m->schedule.T > 1 ? 2 : 1,
               .one_picture = 1,
               .tokens = tokens,
               .keep = keep,
               .label = label,
               .N = N};
    const Err e = bound_cases(&a, m, seed, bound);
    bound_free(&a);
    free(label);
    return e;
}

Err model_picture_bounds(Model *m, const int32_t *tokens, const int32_t *label, size_t n, uint64_t seed,
                         double *bound) {
    Bound a = {.cases = n, .draws = PICTURE_DRAWS, .last = 1, .tokens = tokens, .label = label, .N = m->h * m->w};
    const Err e = bound_cases(&a, m, seed, bound);
    bound_free(&a);
    return e;
}
