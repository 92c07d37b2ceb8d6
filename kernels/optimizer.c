/* optimizer.c - what training does with logits and gradients: the losses, AdamW, the moving average, the learning
 * rate.
 *
 * Sums run in parts of fixed size and tensors in pieces of fixed size, so that threads do not change a bit. */
#include "kernels/transformer.h"

enum { LOSS_CHUNKS = 64 }; /* partial sums of the loss */

/* ---- Losses (SPEC section 4) ---- */

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

Err denoising_loss(Loss *out, const real *logits, const int32_t *target, const real *posterior, size_t R, size_t K,
                   double alpha, double weight, real *dlogits) {
    double hard_sum = 0, soft_sum = 0;
    if (R < 1 || K < 1) return err("loss: %zu rows of %zu classes, expected at least one", R, K);
    if (!(alpha >= 0 && alpha <= 1)) return err("loss: alpha is %g, expected 0..1", alpha);
    if (!posterior && alpha > 0) return err("loss: alpha is %g, but there is no posterior", alpha);
    TRY(check_ids("target", target, R, 0, K));
    LossRows rows;
    memset(&rows, 0, sizeof rows);
    rows.logits = logits, rows.posterior = posterior, rows.target = target, rows.dlogits = dlogits, rows.K = K;
    rows.soft_weight = (real)(weight * alpha / (double)R), rows.hard_weight = (real)(weight * (1 - alpha) / (double)R);
    rows.R = R, rows.chunk = (R + LOSS_CHUNKS - 1) / LOSS_CHUNKS;
    parallel_for(threads_free(), LOSS_CHUNKS, loss_chunk, &rows);
    for (size_t c = 0; c < LOSS_CHUNKS; c++) hard_sum += rows.hard[c], soft_sum += rows.soft[c];
    out->hard = hard_sum / (double)R;
    out->soft = posterior ? soft_sum / (double)R : (double)NAN;
    out->loss = alpha == 0 ? out->hard : alpha * out->soft + (1 - alpha) * out->hard;
    return OK;
}

Err transformer_loss_cuda(Transformer *m, const Schedule *s, const int32_t *x0, const int32_t *x, const int32_t *x_t,
                          const int32_t *t, const int32_t *label, size_t B, size_t N, double alpha, double weight,
                          int backward, Loss *out) {
    if (!m->params.device) return err("transformer: it is not on the GPU");
    if (backward && !m->train) return err("transformer: backward under a plan without training");
    if (backward && !m->params.row[0].grad) return err("transformer: the parameters have no gradients planned");
    if (!(alpha >= 0 && alpha <= 1)) return err("loss: alpha is %g, expected 0..1", alpha);
    TRY(take_batch(m, x, x_t, t, label, B, N));
    TRY(check_ids("x_0", x0, B * N, 0, m->config.dec_num_tokens));
    TRY(check_ids("x_t", x_t, B * N, 0, m->config.dec_num_tokens));
    if (s->T != m->config.n_scales) return err("loss: a schedule of %d scales, expected %d", s->T, m->config.n_scales);
    return m->params.ops->train(m, s, x0, x, x_t, t, alpha, weight, backward, out);
}

/* ---- Optimizer (SPEC sections 6 and 7) ---- */

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
    const Param *row;
    real keep, rate, inverse, eps, beta1, beta2, rest1, rest2; /* AdamW */
    real step;                                                 /* EMA */
    uint64_t stream;                                           /* of random numbers, for moments in bf16 */
} Update;

static size_t pieces(size_t n) {
    return (n + SMALL_WORK - 1) / SMALL_WORK;
}

static void adamw_piece(void *context, size_t piece) {
    const Update *a = (const Update *)context;
    const size_t k0 = piece * SMALL_WORK, n = min_size(SMALL_WORK, a->row->size - k0);
    const real keep = a->keep, rate = a->rate, inverse = a->inverse, eps = a->eps;
    const real beta1 = a->beta1, beta2 = a->beta2, rest1 = a->rest1, rest2 = a->rest2;
    real *w = a->row->value + k0, *m = a->row->m + k0, *v = a->row->v + k0;
    const real *g = a->row->grad + k0;
#pragma omp simd
    for (size_t k = 0; k < n; k++) {
        m[k] = beta1 * m[k] + rest1 * g[k];
        v[k] = beta2 * v[k] + rest2 * g[k] * g[k];
        w[k] = keep * w[k] - rate * m[k] / (square_root(v[k]) * inverse + eps);
    }
}

/* ---- Moments in bf16. Rounded to the nearest, what changes a moment by less than 2^-9 of itself would be lost every
 * time; rounded up or down at random, by chances that keep the mean, it adds up. ---- */

uint16_t round_at_random(float x, uint32_t random) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7f800000u) != 0x7f800000u)
        bits += random & 0xffffu;
    else if (bits & 0x7fffffu)
        bits |= 0x400000u; /* a NaN whose upper half would be infinity's */
    return (uint16_t)(bits >> 16);
}

/* a b + c rounded once, whatever a compiler would make of it: the GPU's twin must give the same bits. */
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
    const size_t k0 = piece * SMALL_WORK, n = min_size(SMALL_WORK, a->row->size - k0);
    real *w = a->row->value + k0;
    const real *g = a->row->grad + k0;
    uint16_t *m16 = a->row->m16 + k0, *v16 = a->row->v16 + k0;
    uint32_t random[4] = {0};
    for (size_t k = 0; k < n; k++) {
        if (k % 4 == 0) philox(random, 0, a->stream, (k0 + k) / 4);
        const real m = multiply_add(a->rest1, g[k], a->beta1 * (real)bf16_to_float(m16[k]));
        const real v = multiply_add(a->rest2 * g[k], g[k], a->beta2 * (real)bf16_to_float(v16[k]));
        const real change = a->rate * m / multiply_add(square_root(v), a->inverse, a->eps);
        w[k] = multiply_add(a->keep, w[k], -change);
        m16[k] = round_at_random((float)m, random[k % 4]);
        v16[k] = round_at_random((float)v, random[k % 4] >> 16);
    }
}

void adamw_step(Params *p, const AdamW *o, uint64_t step) {
    if (p->device) {
        p->ops->update(p->device, p, o, step, 0);
        return;
    }
    const double correction1 = 1 - pow(o->beta1, (double)step), correction2 = 1 - pow(o->beta2, (double)step);
    Update a;
    memset(&a, 0, sizeof a);
    a.beta1 = (real)o->beta1, a.beta2 = (real)o->beta2, a.eps = (real)o->eps;
    a.rest1 = (real)(1 - o->beta1), a.rest2 = (real)(1 - o->beta2);
    a.rate = (real)(o->lr / correction1), a.inverse = (real)(1 / sqrt(correction2));
    for (size_t i = 0; i < p->n; i++) {
        a.row = &p->row[i];
        if (a.row->untrained) continue;
        a.keep = (real)(1 - o->lr * a.row->decay * o->decay_scale);
        a.stream = rng_stream(RNG_ROUND, i, step & 0xffffffffu);
        parallel_for(threads_free(), pieces(a.row->size), p->bf16_moments ? adamw_bf16_piece : adamw_piece, &a);
    }
}

static void ema_piece(void *context, size_t piece) {
    const Update *a = (const Update *)context;
    const size_t k0 = piece * SMALL_WORK, n = min_size(SMALL_WORK, a->row->size - k0);
    const real step = a->step, *w = a->row->value + k0;
    real *e = a->row->ema + k0;
#pragma omp simd
    for (size_t k = 0; k < n; k++) e[k] -= step * (e[k] - w[k]);
}

/* 1 - d */
static float ema_step(double decay, uint64_t num_updates) {
    const float n = (float)num_updates, warm = (1 + n) / (10 + n), limit = (float)decay;
    return 1 - (warm < limit ? warm : limit);
}

void ema_update(Params *p, double decay, uint64_t num_updates) {
    Update a;
    memset(&a, 0, sizeof a);
    a.step = (real)ema_step(decay, num_updates);
    if (p->device) {
        p->ops->update(p->device, p, NULL, 0, (float)a.step);
        return;
    }
    for (size_t i = 0; i < p->n; i++) {
        a.row = &p->row[i];
        parallel_for(threads_free(), pieces(a.row->size), ema_piece, &a);
    }
}

void adamw_ema_step(Params *p, const AdamW *o, uint64_t step, double decay, uint64_t num_updates) {
    if (p->device) {
        p->ops->update(p->device, p, o, step, ema_step(decay, num_updates));
        return;
    }
    adamw_step(p, o, step);
    ema_update(p, decay, num_updates);
}

double lr_at(const LrSchedule *s, uint64_t n) {
    const double pi = 3.14159265358979323846, x = (double)n;
    if (x < s->warm_up_steps) return (s->lr_max - s->lr_start) / s->warm_up_steps * x + s->lr_start;
    double done = (x - s->warm_up_steps) / (s->max_decay_steps - s->warm_up_steps);
    return s->lr_min + 0.5 * (s->lr_max - s->lr_min) * (1 + cos(pi * (done < 1 ? done : 1)));
}
