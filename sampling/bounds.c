/* bounds.c - how likely a model finds a picture: the variational bound (paper section 3.1; diffusion.c's top),
 *
 *     -log p(x_0)  <=  sum over t of E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)),
 *
 * the mean over draws of x_1 .. x_T given x_0: noise_step makes them, posterior gives q, a forward pass p. For all
 * tokens of some pictures, or for the kept tokens of one picture under every class. */
#include "sampling/sampling.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { CLASS_DRAWS = 8, KEPT_DRAWS = 4, PICTURE_DRAWS = 2 }; /* draws of the chain for a case; they divide BOUND_ROWS */

/* Cases whose bound is wanted: classes for one picture, or pictures. A batch has BOUND_ROWS / draws of them, n tokens
 * in all, of which the kept ones come first in the arrays of size (n) and (n,K). */
typedef struct {
    size_t cases, draws;
    int last; /* scales T..last have a say */
    int one_picture;
    const int32_t *tokens; /* (cases,N), or (N) of the one picture */
    const uint8_t *keep;   /* (N), or NULL: all */
    const int32_t *label;  /* (cases), or NULL */
    size_t N, n, rows, kept;
    int32_t *x;                     /* (T+1,n) x_0 .. x_T */
    int32_t *x_0, *x_prev, *x_t;    /* (n) */
    int32_t *row_scale, *row_label; /* (BOUND_ROWS) */
    real *q, *logits;               /* (n,K) */
    float *entropy;                 /* (cases,N) or NULL */
} Bound;

static Err bound_buffers(Bound *a, const Chain *chain) {
    size_t n = a->n = BOUND_ROWS * a->N, reals;
    TRY(size_mul(&reals, n, chain->K));
    TRY(mem_alloc(&a->x, (size_t)chain->schedule->T + 4, n * sizeof *a->x, "tokens of every scale"));
    TRY(mem_alloc(&a->row_scale, 2 * BOUND_ROWS, sizeof *a->row_scale, "scales of a batch"));
    TRY(mem_alloc(&a->q, reals, sizeof *a->q, "posterior"));
    a->x_0 = a->x + ((size_t)chain->schedule->T + 1) * n, a->x_prev = a->x_0 + n, a->x_t = a->x_prev + n;
    a->row_label = a->row_scale + BOUND_ROWS;
    return mem_alloc(&a->logits, reals, sizeof *a->logits, "logits");
}

static void bound_free(Bound *a) {
    void *buffers[] = {a->x, a->row_scale, a->q, a->logits};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
}

static int bound_keeps(const Bound *a, size_t i) {
    return !a->keep || a->keep[i % a->N];
}

/* A row's chain, as noise makes it: the same noise for all cases, so that they can be compared. What is not kept is
 * unknown: uniform at every scale. */
static void bound_row(Bound *a, const Chain *chain, size_t first_case, size_t row, uint64_t seed) {
    const size_t N = a->N, c = first_case + row / a->draws;
    const size_t at = row % a->draws * N; /* of its random numbers */
    const int32_t *tokens = a->tokens + (a->one_picture ? 0 : c) * N;
    int32_t *x = a->x + row * N;
    for (size_t i = 0; i < N; i++)
        x[i] = bound_keeps(a, i) ? tokens[i]
                                 : (int32_t)rng_below(seed, rng_stream(RNG_START, 2, 0), at + i, (uint32_t)chain->K);
    for (int t = 1; t <= chain->schedule->T; t++, x += a->n) {
        memcpy(x + a->n, x, N * sizeof *x);
        noise_step(x + a->n, N, chain->K, chain->schedule->beta[t], seed, rng_stream(RNG_NOISE, (uint64_t)t, 0), at);
    }
    a->row_label[row] = a->label ? a->label[c] : 0;
}

/* In bits, of softmax(logits) */
static double entropy_of(const real *logits, size_t K) {
    double largest = -HUGE_VAL, sum = 0, mean = 0;
    for (size_t k = 0; k < K; k++)
        if ((double)logits[k] > largest) largest = (double)logits[k];
    for (size_t k = 0; k < K; k++) {
        const double z = (double)logits[k] - largest, e = exp(z);
        sum += e;
        mean += e > 0 ? e * z : 0;
    }
    return (log(sum) - mean / sum) / log(2);
}

typedef struct {
    Bound *a;
    const real *logits;
    size_t first_case, K;
} Entropies;

/* entropy (N) of a case: a mean over its rows */
static void entropy_task(void *context, size_t c) {
    const Entropies *e = (const Entropies *)context;
    const Bound *a = e->a;
    for (size_t i = 0; i < a->N; i++) {
        double sum = 0;
        for (size_t r = c * a->draws; r < (c + 1) * a->draws; r++)
            sum += entropy_of(e->logits + (r * a->N + i) * e->K, e->K);
        a->entropy[(e->first_case + c) * a->N + i] = (float)(sum / (double)a->draws);
    }
}

/* bound[c] += KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), a mean over the kept tokens, for the cases of a batch */
static Err bound_batch(Bound *a, const Chain *chain, Transformer *net, size_t first_case, int t, double *bound) {
    const size_t n = a->rows * a->N, K = chain->K;
    const int32_t *x_t = a->x + (size_t)t * a->n, *x_prev = x_t - a->n;
    const real *logits;
    for (size_t b = 0; b < a->rows; b++) a->row_scale[b] = t;
    TRY(transformer_forward(net, x_prev, x_t, a->row_scale, a->label ? a->row_label : NULL, a->rows, a->N, &logits));
    if (a->entropy && t == 1) {
        Entropies e = {a, logits, first_case, K};
        parallel_for(threads_free(), a->rows / a->draws, entropy_task, &e);
    }
    a->kept = 0;
    for (size_t i = 0; i < n; i++) {
        if (!bound_keeps(a, i)) continue;
        memcpy(a->logits + a->kept * K, logits + i * K, K * sizeof *logits);
        a->x_0[a->kept] = a->x[i], a->x_prev[a->kept] = x_prev[i], a->x_t[a->kept++] = x_t[i];
    }
    posterior(a->q, a->x_0, a->x_t, a->kept, K, chain->schedule, t);
    const size_t per_case = a->kept / a->rows * a->draws;
    for (size_t c = 0; c < a->rows / a->draws; c++) {
        const size_t at = c * per_case;
        Loss loss;
        TRY(denoising_loss(&loss, a->logits + at * K, a->x_prev + at, a->q + at * K, per_case, K, 1, 1, NULL));
        bound[first_case + c] += loss.soft;
    }
    return OK;
}

static Err bound_cases(Bound *a, const Chain *chain, uint64_t seed, double *bound) {
    const size_t at_once = BOUND_ROWS / a->draws;
    memset(bound, 0, a->cases * sizeof *bound);
    TRY(bound_buffers(a, chain));
    for (int t = chain->schedule->T; t >= a->last; t--) {
        Transformer *net;
        TRY(chain->network(chain->context, t, &net));
        TRY(transformer_plan(net, BOUND_ROWS, a->N, 0));
        for (size_t first = 0; first < a->cases; first += at_once) {
            TRY(chain->network(chain->context, t, &net)); /* the same, unless the work is to stop */
            a->rows = min_size(at_once, a->cases - first) * a->draws;
            for (size_t row = 0; row < a->rows; row++) bound_row(a, chain, first, row, seed);
            TRY(bound_batch(a, chain, net, first, t, bound));
        }
    }
    return OK;
}

Err class_bounds(const Chain *chain, const int32_t *tokens, const uint8_t *keep, uint64_t seed, double *bound) {
    const size_t N = chain->h * chain->w;
    int32_t *label;
    if (!memchr(keep, 1, N)) return err("no token is kept: nothing tells the class of the picture");
    TRY(mem_alloc(&label, chain->n_classes, sizeof *label, "classes"));
    for (size_t c = 0; c < chain->n_classes; c++) label[c] = (int32_t)c;
    Bound a = {.cases = chain->n_classes,
               .draws = CLASS_DRAWS,
               .last = chain->schedule->T > 1 ? 2 : 1,
               .one_picture = 1,
               .tokens = tokens,
               .keep = keep,
               .label = label,
               .N = N};
    const Err e = bound_cases(&a, chain, seed, bound);
    bound_free(&a);
    free(label);
    return e;
}

Err kept_bound(const Chain *chain, const int32_t *tokens, const uint8_t *keep, int32_t label, uint64_t seed,
               double *bound) {
    const size_t N = chain->h * chain->w;
    if (!memchr(keep, 1, N)) return err("no token is kept");
    Bound a = {.cases = 1,
               .draws = KEPT_DRAWS,
               .last = chain->schedule->T > 1 ? 2 : 1,
               .one_picture = 1,
               .tokens = tokens,
               .keep = keep,
               .label = label < 0 ? NULL : &label,
               .N = N};
    const Err e = bound_cases(&a, chain, seed, bound);
    bound_free(&a);
    return e;
}

Err picture_guesses(const Chain *chain, const int32_t *tokens, const int32_t *label, size_t n, uint64_t seed,
                    double *bound, float *entropy) {
    Bound a = {
        .cases = n, .draws = PICTURE_DRAWS, .last = 1, .tokens = tokens, .label = label, .N = chain->h * chain->w};
    a.entropy = entropy;
    const Err e = bound_cases(&a, chain, seed, bound);
    bound_free(&a);
    return e;
}

Err picture_bounds(const Chain *chain, const int32_t *tokens, const int32_t *label, size_t n, uint64_t seed,
                   double *bound) {
    return picture_guesses(chain, tokens, label, n, seed, bound, NULL);
}

double blind_bound(const Chain *chain, int last) {
    const size_t K = chain->K;
    const int32_t x_0[2] = {0, 0}, x_t[2] = {0, K > 1};
    double sum = 0;
    real *q;
    if (mem_alloc(&q, 2 * K, sizeof *q, "posterior") != OK) return NAN;
    for (int t = chain->schedule->T; t >= last; t--) {
        double kl[2] = {log((double)K), log((double)K)};
        posterior(q, x_0, x_t, 2, K, chain->schedule, t);
        for (size_t i = 0; i < 2 * K; i++)
            if (q[i] > 0) kl[i / K] += (double)q[i] * log((double)q[i]);
        const double same = (double)chain->schedule->alphacum[t] * (1 - 1 / (double)K) + 1 / (double)K;
        sum += same * kl[0] + (1 - same) * kl[1];
    }
    free(q);
    return sum;
}
