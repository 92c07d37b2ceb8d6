/* norm.c - the other layers of the first stage on a CPU: group norm with swish, attention over a picture, nearest
 * codes. vqgan.c has the plain loops that say what each computes.
 *
 * Every layer shares its work among threads by tasks that touch different memory: a group of channels, a picture, a
 * stretch of latents. So no sum depends on the number of threads. */
#include "kernels/kernels.h"

#include <math.h>
#include <string.h>

static const double NORM_EPS = 1e-6;

/* ---- Arithmetic of the hot loops ---- */

/* e^x to about 1 ulp, in a form that compilers vectorise: e^x = 2^n e^r, |r| <= ln2/2. Adding 1.5*2^23 rounds to an
 * integer and leaves it in the low bits. Clamped where float ends; NaN stays NaN. */
static inline real exp_real(real x) {
#ifdef REAL_DOUBLE
    return exp(x);
#else
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.3f ? 88.3f : x;
    const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000u;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
#endif
}

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

/* sum of (x-a)(y-b) */
static double dot(const real *x, real a, const real *y, real b, size_t n) {
    real lane[LANES] = {0};
    double s = 0;
    for (size_t i = 0; i < n; i += RUN) {
        const size_t end = min_size(n, i + RUN);
        size_t j = i;
        for (; j + LANES <= end; j += LANES)
            for (int l = 0; l < LANES; l++) lane[l] += (x[j + (size_t)l] - a) * (y[j + (size_t)l] - b);
        for (; j < end; j++) lane[0] += (x[j] - a) * (y[j] - b);
        for (int l = 0; l < LANES; l++) {
            s += (double)lane[l];
            lane[l] = 0;
        }
    }
    return s;
}

/* ---- Group norm. A task is a group of channels of a picture. ---- */

typedef struct {
    const GroupNorm *n;
    real *y, *kept; /* kept (B,32,2): mean and 1/deviation of each group */
    const real *x, *gamma, *beta;
    real *dx, *dy, *channel; /* channel (B,C,2): sums of d and d xhat of each plane */
    int accumulate;
} NormJob;

size_t group_norm_needs_fast(const Compute *on, const GroupNorm *n, int backward) {
    (void)on;
    return backward ? n->B * n->C * 2 * sizeof(real) : 0;
}

size_t group_norm_kept_fast(const GroupNorm *n) {
    return n->B * NORM_GROUPS * 2 * sizeof(real);
}

static void norm_forward_task(void *context, size_t bg) {
    const NormJob *job = (const NormJob *)context;
    const size_t hw = job->n->hw, per = job->n->C / NORM_GROUPS, n = per * hw;
    const real *x = job->x + bg * n;
    real *y = job->y + bg * n;
    const real mean = (real)(sum_reals(x, n) / (double)n);
    const real rstd = (real)(1 / sqrt(dot(x, mean, x, mean, n) / (double)n + NORM_EPS));
    job->kept[2 * bg] = mean;
    job->kept[2 * bg + 1] = rstd;
    for (size_t i = 0; i < per; i++, x += hw, y += hw) {
        const size_t c = bg % NORM_GROUPS * per + i;
        const real scale = rstd * job->gamma[c], shift = job->beta[c] - mean * scale;
        if (job->n->swish)
            for (size_t j = 0; j < hw; j++) {
                const real t = x[j] * scale + shift, s = 1 / (1 + exp_real(-t));
                y[j] = t * s;
            }
        else
            for (size_t j = 0; j < hw; j++) y[j] = x[j] * scale + shift;
    }
}

void group_norm_forward_fast(const Compute *on, real *y, real *kept, const real *x, const real *gamma, const real *beta,
                             const GroupNorm *n) {
    NormJob job = {.n = n, .y = y, .kept = kept, .x = x, .gamma = gamma, .beta = beta};
    (void)on;
    parallel_for(threads_free(), n->B * NORM_GROUPS, norm_forward_task, &job);
}

/* dy (n) = dy swish'(t), in place; t = scale x + shift; swish' = s (1 + t (1-s)), s = sigmoid(t) */
static void swish_backward(real *dy, const real *x, size_t n, real scale, real shift) {
    for (size_t j = 0; j < n; j++) {
        const real t = x[j] * scale + shift, s = 1 / (1 + exp_real(-t));
        dy[j] *= s * (1 + t * (1 - s));
    }
}

/* With d = dL/dt and xhat = (x - mean) rstd, means over the group:
 *     dx = or += rstd (gamma d - mean(gamma d) - xhat mean(gamma d xhat)) = scale d + slope x + offset
 * dy is overwritten with d. */
static void norm_backward_task(void *context, size_t bg) {
    const NormJob *job = (const NormJob *)context;
    const size_t hw = job->n->hw, per = job->n->C / NORM_GROUPS, n = per * hw;
    const real mean = job->kept[2 * bg], rstd = job->kept[2 * bg + 1];
    double d_mean = 0, dx_mean = 0;
    for (size_t i = 0; i < per; i++) {
        const size_t c = bg % NORM_GROUPS * per + i, at = bg * n + i * hw;
        const real *x = job->x + at, scale = rstd * job->gamma[c];
        real *d = job->dy + at;
        if (job->n->swish) swish_backward(d, x, hw, scale, job->beta[c] - mean * scale);
        const double sum_d = sum_reals(d, hw), sum_dx = dot(d, 0, x, mean, hw) * (double)rstd;
        job->channel[2 * (bg * per + i)] = (real)sum_d;
        job->channel[2 * (bg * per + i) + 1] = (real)sum_dx;
        d_mean += (double)job->gamma[c] * sum_d / (double)n;
        dx_mean += (double)job->gamma[c] * sum_dx / (double)n;
    }
    const real slope = (real)(-dx_mean * (double)rstd * (double)rstd);
    const real offset = (real)(-d_mean * (double)rstd) - slope * mean;
    for (size_t i = 0; i < per; i++) {
        const size_t c = bg % NORM_GROUPS * per + i, at = bg * n + i * hw;
        const real *x = job->x + at, *d = job->dy + at, scale = rstd * job->gamma[c];
        real *dx = job->dx + at;
        if (job->accumulate)
            for (size_t j = 0; j < hw; j++) dx[j] += scale * d[j] + slope * x[j] + offset;
        else
            for (size_t j = 0; j < hw; j++) dx[j] = scale * d[j] + slope * x[j] + offset;
    }
}

void group_norm_backward_fast(const Compute *on, real *dx, real *dgamma, real *dbeta, real *dy, const real *x,
                              const real *gamma, const real *beta, const real *kept, int accumulate,
                              const GroupNorm *n) {
    real *channel = (real *)on->scratch;
    NormJob job = {n, NULL, (real *)kept, x, gamma, beta, dx, dy, channel, accumulate};
    parallel_for(threads_free(), n->B * NORM_GROUPS, norm_backward_task, &job);
    for (size_t b = 0; b < n->B; b++)
        for (size_t c = 0; c < n->C; c++) {
            dbeta[c] += channel[2 * (b * n->C + c)];
            dgamma[c] += channel[2 * (b * n->C + c) + 1];
        }
}

/* ---- Attention over the pixels of a picture, one head. A task is a picture. ---- */

typedef struct {
    size_t C, N;
    real *y, *p;
    const real *q, *k, *v, *dy;
    real *dq, *dk, *dv, *ds; /* ds (B,N,N) */
    const int *accumulate;
    Precision precision;
} AttentionJob;

size_t picture_attention_needs_fast(const Compute *on, size_t B, size_t C, size_t N, int backward) {
    (void)on, (void)C;
    return backward ? B * N * N * sizeof(real) : 0;
}

/* p (n) = softmax of p */
static void softmax_row(real *p, size_t n) {
    real largest = p[0], total;
    for (size_t j = 1; j < n; j++) largest = p[j] > largest ? p[j] : largest;
    for (size_t j = 0; j < n; j++) p[j] = exp_real(p[j] - largest);
    total = (real)sum_reals(p, n);
    for (size_t j = 0; j < n; j++) p[j] /= total;
}

static void attention_forward_task(void *context, size_t b) {
    const AttentionJob *a = (const AttentionJob *)context;
    const size_t C = a->C, N = a->N, at = b * C * N;
    const real scale = (real)(1 / sqrt((double)C));
    real *p = a->p + b * N * N;
    gemm(a->precision, 1, 0, N, N, C, a->q + at, N, a->k + at, N, 0, p, N);
    for (size_t i = 0; i < N; i++) {
        for (size_t j = 0; j < N; j++) p[i * N + j] *= scale;
        softmax_row(p + i * N, N);
    }
    gemm(a->precision, 0, 1, C, N, N, a->v + at, N, p, N, 0, a->y + at, N);
}

void picture_attention_forward_fast(const Compute *on, real *y, real *p, const real *q, const real *k, const real *v,
                                    size_t B, size_t C, size_t N) {
    AttentionJob job = {.C = C, .N = N, .y = y, .p = p, .q = q, .k = k, .v = v, .precision = on->precision};
    parallel_for(threads_free(), B, attention_forward_task, &job);
}

/* dv = dy p,  dp = dy^T v,  ds = scale p (dp - sum_j dp p),  dq = k ds^T,  dk = q ds */
static void attention_backward_task(void *context, size_t b) {
    const AttentionJob *a = (const AttentionJob *)context;
    const size_t C = a->C, N = a->N, at = b * C * N;
    const real scale = (real)(1 / sqrt((double)C));
    const real *dy = a->dy + at, *p = a->p + b * N * N;
    real *ds = a->ds + b * N * N;
    gemm(a->precision, 0, 0, C, N, N, dy, N, p, N, a->accumulate[2], a->dv + at, N);
    gemm(a->precision, 1, 0, N, N, C, dy, N, a->v + at, N, 0, ds, N);
    for (size_t i = 0; i < N; i++) {
        const real *row = p + i * N, mean = (real)dot(ds + i * N, 0, row, 0, N);
        for (size_t j = 0; j < N; j++) ds[i * N + j] = scale * row[j] * (ds[i * N + j] - mean);
    }
    gemm(a->precision, 0, 1, C, N, N, a->k + at, N, ds, N, a->accumulate[0], a->dq + at, N);
    gemm(a->precision, 0, 0, C, N, N, a->q + at, N, ds, N, a->accumulate[1], a->dk + at, N);
}

void picture_attention_backward_fast(const Compute *on, real *dq, real *dk, real *dv, const real *dy, const real *q,
                                     const real *k, const real *v, const real *p, const int accumulate[3], size_t B,
                                     size_t C, size_t N) {
    AttentionJob job = {C, N, NULL, (real *)p, q, k, v, dy, dq, dk, dv, (real *)on->scratch, accumulate, on->precision};
    parallel_for(threads_free(), B, attention_backward_task, &job);
}

/* ---- Nearest codes. A task is a stretch of a picture's latents. ---- */

enum {
    CODES = 512,  /* codebook entries compared at a time */
    LATENTS = 256 /* latents compared at a time */
};

typedef struct {
    const Codes *s;
    int32_t *code;
    const real *z, *book;
    real *half_norm, *scores; /* half_norm (K) = |e|^2/2; scores (threads,CODES,LATENTS) */
    size_t per;               /* tasks of a picture */
} NearestJob;

static size_t half_norm_reals(const Codes *s) {
    return round_up(s->K, 64 / sizeof(real));
}

size_t nearest_needs_fast(const Compute *on, const Codes *s) {
    return (half_norm_reals(s) + (size_t)on->threads * CODES * LATENTS) * sizeof(real);
}

/* For n latents, columns of z (D, row stride ld): the entry with the least |e|^2/2 - z.e, the first of equals. That is
 * half the squared distance less |z|^2/2, which all entries share. score (CODES, n) scratch. */
static void nearest_of_few(const NearestJob *a, const real *z, size_t ld, size_t n, real *score, int32_t *code) {
    const size_t D = a->s->D;
    real best[LATENTS];
    for (size_t k = 0; k < a->s->K; k += CODES) {
        const size_t codes = min_size(CODES, a->s->K - k);
        gemm(PRECISION_F32, 0, 0, codes, n, D, a->book + k * D, D, z, ld, 0, score, n);
        for (size_t i = 0; i < codes; i++) {
            const int32_t id = (int32_t)(k + i);
            const real half = a->half_norm[k + i];
            if (id == 0)
                for (size_t j = 0; j < n; j++) {
                    best[j] = half - score[j];
                    code[j] = 0;
                }
            for (size_t j = 0; j < n; j++) {
                const real d = half - score[i * n + j];
                code[j] = d < best[j] ? id : code[j];
                best[j] = d < best[j] ? d : best[j];
            }
        }
    }
}

static void half_norm_task(void *context, size_t k) {
    const NearestJob *a = (const NearestJob *)context;
    const real *entry = a->book + k * a->s->D;
    a->half_norm[k] = (real)(dot(entry, 0, entry, 0, a->s->D) / 2);
}

static void nearest_task(void *context, size_t task) {
    const NearestJob *a = (const NearestJob *)context;
    const size_t N = a->s->N, b = task / a->per, at = task % a->per * LATENTS;
    nearest_of_few(a, a->z + b * a->s->D * N + at, N, min_size(LATENTS, N - at),
                   a->scores + thread_index() * CODES * LATENTS, a->code + b * N + at);
}

/* Too few tasks for the threads: one, and products share the work. */
void nearest_codes_fast(const Compute *on, int32_t *code, const real *z, const real *book, const Codes *s) {
    real *scratch = (real *)on->scratch;
    NearestJob job = {s, code, z, book, scratch, scratch + half_norm_reals(s), ceil_div(s->N, LATENTS)};
    const size_t tasks = s->B * job.per, threads = min_size((size_t)threads_free(), (size_t)on->threads);
    parallel_for(threads_free(), s->K, half_norm_task, &job);
    parallel_for(tasks < threads ? 1 : (int)threads, tasks, nearest_task, &job);
}
