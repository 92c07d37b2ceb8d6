/* optimizer.c - what training does with logits and gradients, faster: the losses, AdamW, the moving average.
 *
 * The fellows of the plain loops in transformer.cu. Sums run in parts of fixed size and tensors in pieces of fixed size,
 * so that threads do not change a bit. */
#include "kernels/math.h"

enum { LOSS_CHUNKS = 64 }; /* partial sums of the loss */

/* ---- Losses ---- */

typedef struct {
    const real *logits, *posterior;
    const int32_t *target;
    real *dlogits;
    size_t K;
    real soft_weight, hard_weight; /* of one row's gradient */
    size_t R, chunk;               /* rows in all, rows of a task */
    double hard[LOSS_CHUNKS], soft[LOSS_CHUNKS];
} LossRows;

/* *hard = -log p[target], *soft = sum_k q_k log(q_k/p_k) with 0 log 0 = 0, for p = softmax(logits) of row r;
 * dlogits = soft_weight (p - q) + hard_weight (p - onehot). */
static void loss_row(const LossRows *a, size_t r, double *hard, double *soft) {
    const size_t K = a->K;
    const real *l = a->logits + r * K, *q = a->posterior ? a->posterior + r * K : NULL;
    real *d = a->dlogits ? a->dlogits + r * K : NULL;
    const real largest = max_of(l, K);
    real sum = 0, kl = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t k = 0; k < K; k++) sum += exp_negative(l[k] - largest);
    const real log_sum = (real)log((double)sum), inverse = 1 / sum;
    *hard = (double)log_sum - ((double)l[a->target[r]] - (double)largest);
    if (q) {
#pragma omp simd reduction(+ : kl)
        for (size_t k = 0; k < K; k++) {
            const real qk = q[k] > (real)1e-37 ? q[k] : 1, term = log_positive(qk) - (l[k] - largest - log_sum);
            kl += q[k] > (real)1e-37 ? q[k] * term : 0;
        }
        *soft = (double)kl;
    }
    if (!d) return;
    const real total = a->soft_weight + a->hard_weight, on_target = a->hard_weight;
    if (q && a->soft_weight != 0) {
#pragma omp simd
        for (size_t k = 0; k < K; k++) d[k] = total * inverse * exp_negative(l[k] - largest) - a->soft_weight * q[k];
    } else {
#pragma omp simd
        for (size_t k = 0; k < K; k++) d[k] = total * inverse * exp_negative(l[k] - largest);
    }
    d[a->target[r]] -= on_target;
}

static void loss_chunk(void *context, size_t c) {
    LossRows *a = (LossRows *)context;
    for (size_t r = c * a->chunk; r < min_size((c + 1) * a->chunk, a->R); r++) {
        double h = 0, s = 0;
        loss_row(a, r, &h, &s);
        a->hard[c] += h, a->soft[c] += s;
    }
}

void denoising_loss_fast(const Compute *on, double sums[2], real *dlogits, const real *logits, const int32_t *target,
                         const real *posterior, real soft_weight, real hard_weight, size_t R, size_t K) {
    LossRows a = {.logits = logits, .posterior = posterior, .target = target, .dlogits = dlogits, .K = K, .R = R};
    (void)on;
    a.soft_weight = soft_weight, a.hard_weight = hard_weight, a.chunk = ceil_div(R, LOSS_CHUNKS);
    parallel_for(threads_free(), LOSS_CHUNKS, loss_chunk, &a);
    sums[0] = sums[1] = 0;
    for (size_t c = 0; c < LOSS_CHUNKS; c++) sums[0] += a.hard[c], sums[1] += a.soft[c];
}

/* ---- AdamW and the moving average ---- */

#ifdef REAL_DOUBLE
static inline real square_root(real x) {
    return sqrt(x);
}
#else
static inline real square_root(real x) {
    return sqrtf(x);
}
#endif

/* Tensors are cut into pieces of fixed size, so that threads do not decide which elements run as vectors. */
typedef struct {
    const AdamStep *step;
    real *w, *m, *v, *ema;
    const real *g, *value;
    uint16_t *m16, *v16;
    real rate; /* of the moving average */
    size_t n;
} Update;

static size_t pieces(size_t n) {
    return (n + SMALL_WORK - 1) / SMALL_WORK;
}

static void adamw_piece(void *context, size_t piece) {
    const Update *a = (const Update *)context;
    const AdamStep *o = a->step;
    const size_t k0 = piece * SMALL_WORK, n = min_size(SMALL_WORK, a->n - k0);
    const real keep = o->keep, rate = o->rate, inverse = o->inverse, eps = o->eps;
    const real beta1 = o->beta1, beta2 = o->beta2, rest1 = o->rest1, rest2 = o->rest2;
    real *w = a->w + k0, *m = a->m + k0, *v = a->v + k0;
    const real *g = a->g + k0;
#pragma omp simd
    for (size_t k = 0; k < n; k++) {
        m[k] = beta1 * m[k] + rest1 * g[k];
        v[k] = beta2 * v[k] + rest2 * g[k] * g[k];
        w[k] = keep * w[k] - rate * m[k] / (square_root(v[k]) * inverse + eps);
    }
}

/* Moments in bf16. Rounded to the nearest, what changes a moment by less than 2^-9 of itself would be lost every time;
 * rounded up or down at random, by chances that keep the mean, it adds up. */

uint16_t round_at_random(float x, uint32_t random) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7f800000u) != 0x7f800000u)
        bits += random & 0xffffu;
    else if (bits & 0x7fffffu)
        bits |= 0x400000u; /* a NaN whose upper half would be infinity's */
    return (uint16_t)(bits >> 16);
}

/* a b + c rounded once, whatever a compiler would make of it: the GPU's must give the same bits. */
static inline real multiply_add(real a, real b, real c) {
#ifdef REAL_DOUBLE
    return fma(a, b, c);
#else
    return fmaf(a, b, c);
#endif
}

/* Four elements share a draw of four numbers, each of which has bits for both moments. */
static void adamw_bf16_piece(void *context, size_t piece) {
    const Update *a = (const Update *)context;
    const AdamStep *o = a->step;
    const size_t k0 = piece * SMALL_WORK, n = min_size(SMALL_WORK, a->n - k0);
    real *w = a->w + k0;
    const real *g = a->g + k0;
    uint16_t *m16 = a->m16 + k0, *v16 = a->v16 + k0;
    uint32_t random[4] = {0};
    for (size_t k = 0; k < n; k++) {
        if (k % 4 == 0) philox(random, 0, o->stream, (k0 + k) / 4);
        const real m = multiply_add(o->rest1, g[k], o->beta1 * (real)bf16_to_float(m16[k]));
        const real v = multiply_add(o->rest2 * g[k], g[k], o->beta2 * (real)bf16_to_float(v16[k]));
        const real change = o->rate * m / multiply_add(square_root(v), o->inverse, o->eps);
        w[k] = multiply_add(o->keep, w[k], -change);
        m16[k] = round_at_random((float)m, random[k % 4]);
        v16[k] = round_at_random((float)v, random[k % 4] >> 16);
    }
}

void adamw_fast(const Compute *on, real *w, real *m, real *v, const real *g, const AdamStep *a, size_t n) {
    Update u = {.step = a, .w = w, .m = m, .v = v, .g = g, .n = n};
    (void)on;
    parallel_for(threads_free(), pieces(n), adamw_piece, &u);
}

void adamw_bf16_fast(const Compute *on, real *w, uint16_t *m, uint16_t *v, const real *g, const AdamStep *a, size_t n) {
    Update u = {.step = a, .w = w, .m16 = m, .v16 = v, .g = g, .n = n};
    (void)on;
    parallel_for(threads_free(), pieces(n), adamw_bf16_piece, &u);
}

static void ema_piece(void *context, size_t piece) {
    const Update *a = (const Update *)context;
    const size_t k0 = piece * SMALL_WORK, n = min_size(SMALL_WORK, a->n - k0);
    const real step = a->rate, *w = a->value + k0;
    real *e = a->ema + k0;
#pragma omp simd
    for (size_t k = 0; k < n; k++) e[k] -= step * (e[k] - w[k]);
}

void ema_fast(const Compute *on, real *ema, const real *w, real step, size_t n) {
    Update u = {.ema = ema, .value = w, .rate = step, .n = n};
    (void)on;
    parallel_for(threads_free(), pieces(n), ema_piece, &u);
}
