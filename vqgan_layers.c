/* vqgan_layers.c - what the layers of the first stage do, forward and backward (SPEC section 8).
 *
 * Owns: group norm with swish, attention over a picture, the vector quantiser with its remap table, tanh; convolutions
 * are handed to conv.c. Refuses: nothing; vqgan.c has checked all sizes and planned all memory.
 *
 * Every layer shares its work among threads by tasks that touch different memory: a group of channels, a picture, a
 * stretch of latents. So no sum depends on the number of threads. */

#include "vqgan.h"

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

/* Sums as in sum_reals: in LANES chains, emptied into double every RUN numbers. */
enum { LANES = 32, RUN = 4096 };

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

/* ---- Layers: convolutions ---- */

size_t plane_size(const Vqgan *v, size_t value) {
    return (v->h >> v->value[value].level) * (v->w >> v->value[value].level);
}

Conv layer_conv(const Vqgan *v, const VqLayer *l) {
    const VqValue *x = &v->value[l->in[0]];
    const Conv c = {l->conv, v->b, x->C, v->value[l->out].C, v->h >> x->level, v->w >> x->level};
    return c;
}

void conv_layer_forward(Vqgan *v, const VqLayer *l) {
    const Conv c = layer_conv(v, l);
    conv_forward(&v->on, v->x[l->out], v->x[l->in[0]], v->params.row[l->weight].value, v->params.row[l->bias].value,
                 l->add == NO_VALUE ? NULL : v->x[l->add], &c);
}

void conv_layer_backward(Vqgan *v, const VqLayer *l) {
    const Conv c = layer_conv(v, l);
    const Param *w = &v->params.row[l->weight];
    conv_backward(&v->on, v->dx[l->in[0]], w->grad, v->params.row[l->bias].grad, v->dx[l->out], v->x[l->in[0]],
                  w->value, l->more[0], &c);
}

/* ---- GroupNorm, with or without swish ---- */

/* What the tasks of one layer share: for norms a task is a group of channels, for attention a picture. */
typedef struct {
    Vqgan *v;
    const VqLayer *l;
} LayerJob;

static void layer_tasks(Vqgan *v, const VqLayer *l, size_t n, Task *task) {
    LayerJob job = {v, l};
    parallel_for(threads_free(), n, task, &job);
}

/* y = swish(t), t = gamma (x - mean) rstd + beta     x, y (B,C,hw); saved (B,32,2) = mean, rstd of each group */
static void norm_forward_task(void *context, size_t bg) {
    Vqgan *v = ((const LayerJob *)context)->v;
    const VqLayer *l = ((const LayerJob *)context)->l;
    const real *gamma = v->params.row[l->weight].value, *beta = v->params.row[l->bias].value;
    const size_t C = v->value[l->out].C, hw = plane_size(v, l->out), per = C / NORM_GROUPS, n = per * hw;
    real *saved = v->arena + l->saved;
    const real *x = v->x[l->in[0]] + bg * n;
    real *y = v->x[l->out] + bg * n;
    const real mean = (real)(sum_reals(x, n) / (double)n);
    const real rstd = (real)(1 / sqrt(dot(x, mean, x, mean, n) / (double)n + NORM_EPS));
    saved[2 * bg] = mean;
    saved[2 * bg + 1] = rstd;
    for (size_t i = 0; i < per; i++, x += hw, y += hw) {
        const size_t c = bg % NORM_GROUPS * per + i;
        const real scale = rstd * gamma[c], shift = beta[c] - mean * scale;
        if (l->swish)
            for (size_t j = 0; j < hw; j++) {
                const real t = x[j] * scale + shift, s = 1 / (1 + exp_real(-t));
                y[j] = t * s;
            }
        else
            for (size_t j = 0; j < hw; j++) y[j] = x[j] * scale + shift;
    }
}

void group_norm_forward(Vqgan *v, const VqLayer *l) {
    layer_tasks(v, l, v->b * NORM_GROUPS, norm_forward_task);
}

/* dy (n) = dy swish'(t), in place; t = scale x + shift; swish' = s (1 + t (1-s)), s = sigmoid(t) */
static void swish_backward(real *dy, const real *x, size_t n, real scale, real shift) {
    for (size_t j = 0; j < n; j++) {
        const real t = x[j] * scale + shift, s = 1 / (1 + exp_real(-t));
        dy[j] *= s * (1 + t * (1 - s));
    }
}

/* With d = dL/dt and xhat = (x - mean) rstd, means over the group:
 *     dx = or += rstd (gamma d - mean(gamma d) - xhat mean(gamma d xhat))     dgamma += sum d xhat     dbeta += sum d
 * dy is overwritten with d; nothing reads it afterwards. channel (B,C,2): sums of d and d xhat of each plane. */
static void norm_backward_task(void *context, size_t bg) {
    Vqgan *v = ((const LayerJob *)context)->v;
    const VqLayer *l = ((const LayerJob *)context)->l;
    const real *gamma = v->params.row[l->weight].value, *beta = v->params.row[l->bias].value;
    const size_t C = v->value[l->out].C, hw = plane_size(v, l->out), per = C / NORM_GROUPS, n = per * hw;
    const real *saved = v->arena + l->saved;
    real *channel = (real *)v->on.scratch;
    const real mean = saved[2 * bg], rstd = saved[2 * bg + 1];
    double d_mean = 0, dx_mean = 0;
    for (size_t i = 0; i < per; i++) {
        const size_t c = bg % NORM_GROUPS * per + i, at = bg * n + i * hw;
        const real *x = v->x[l->in[0]] + at, scale = rstd * gamma[c];
        real *d = v->dx[l->out] + at;
        if (l->swish) swish_backward(d, x, hw, scale, beta[c] - mean * scale);
        const double sum_d = sum_reals(d, hw), sum_dx = dot(d, 0, x, mean, hw) * (double)rstd;
        channel[2 * (bg * per + i)] = (real)sum_d;
        channel[2 * (bg * per + i) + 1] = (real)sum_dx;
        d_mean += (double)gamma[c] * sum_d / (double)n;
        dx_mean += (double)gamma[c] * sum_dx / (double)n;
    }
    const real slope = (real)(-dx_mean * (double)rstd * (double)rstd);
    const real offset = (real)(-d_mean * (double)rstd) - slope * mean;
    for (size_t i = 0; i < per; i++) {
        const size_t c = bg % NORM_GROUPS * per + i, at = bg * n + i * hw;
        const real *x = v->x[l->in[0]] + at, *d = v->dx[l->out] + at, scale = rstd * gamma[c];
        real *dx = v->dx[l->in[0]] + at;
        if (l->more[0])
            for (size_t j = 0; j < hw; j++) dx[j] += scale * d[j] + slope * x[j] + offset;
        else
            for (size_t j = 0; j < hw; j++) dx[j] = scale * d[j] + slope * x[j] + offset;
    }
}

void group_norm_backward(Vqgan *v, const VqLayer *l) {
    const size_t C = v->value[l->out].C;
    const real *channel = (real *)v->on.scratch;
    layer_tasks(v, l, v->b * NORM_GROUPS, norm_backward_task);
    real *dgamma = v->params.row[l->weight].grad, *dbeta = v->params.row[l->bias].grad;
    for (size_t b = 0; b < v->b; b++)
        for (size_t c = 0; c < C; c++) {
            dbeta[c] += channel[2 * (b * C + c)];
            dgamma[c] += channel[2 * (b * C + c) + 1];
        }
}

/* ---- Attention over the cells of a picture, one head ---- */

/* p (n) = softmax of p */
static void softmax_row(real *p, size_t n) {
    real largest = p[0], total;
    for (size_t j = 1; j < n; j++) largest = p[j] > largest ? p[j] : largest;
    for (size_t j = 0; j < n; j++) p[j] = exp_real(p[j] - largest);
    total = (real)sum_reals(p, n);
    for (size_t j = 0; j < n; j++) p[j] /= total;
}

/* y[:,i] = sum_j p[i,j] v[:,j],  p[i,:] = softmax(C^-0.5 q[:,i] . k[:,:])     q,k,v,y (B,C,N)  p (B,N,N) saved */
static void spatial_attention_forward_task(void *context, size_t b) {
    Vqgan *v = ((const LayerJob *)context)->v;
    const VqLayer *l = ((const LayerJob *)context)->l;
    const size_t C = v->value[l->out].C, N = plane_size(v, l->out);
    const real scale = (real)(1 / sqrt((double)C));
    const size_t at = b * C * N;
    real *p = v->arena + l->saved + b * N * N;
    gemm(1, 0, N, N, C, v->x[l->in[0]] + at, N, v->x[l->in[1]] + at, N, 0, p, N);
    for (size_t i = 0; i < N; i++) {
        for (size_t j = 0; j < N; j++) p[i * N + j] *= scale;
        softmax_row(p + i * N, N);
    }
    gemm(0, 1, C, N, N, v->x[l->in[2]] + at, N, p, N, 0, v->x[l->out] + at, N);
}

void spatial_attention_forward(Vqgan *v, const VqLayer *l) {
    layer_tasks(v, l, v->b, spatial_attention_forward_task);
}

/* dv = dy p,  dp = dy^T v,  ds = scale p (dp - sum_j dp p),  dq = k ds^T,  dk = q ds     ds (B,N,N) scratch */
static void spatial_attention_backward_task(void *context, size_t b) {
    Vqgan *v = ((const LayerJob *)context)->v;
    const VqLayer *l = ((const LayerJob *)context)->l;
    const size_t C = v->value[l->out].C, N = plane_size(v, l->out);
    const real scale = (real)(1 / sqrt((double)C));
    const size_t at = b * C * N;
    const real *dy = v->dx[l->out] + at, *p = v->arena + l->saved + b * N * N;
    real *ds = v->arena + l->scratch + b * N * N;
    gemm(0, 0, C, N, N, dy, N, p, N, l->more[2], v->dx[l->in[2]] + at, N);
    gemm(1, 0, N, N, C, dy, N, v->x[l->in[2]] + at, N, 0, ds, N);
    for (size_t i = 0; i < N; i++) {
        const real *row = p + i * N, mean = (real)dot(ds + i * N, 0, row, 0, N);
        for (size_t j = 0; j < N; j++) ds[i * N + j] = scale * row[j] * (ds[i * N + j] - mean);
    }
    gemm(0, 1, C, N, N, v->x[l->in[1]] + at, N, ds, N, l->more[0], v->dx[l->in[0]] + at, N);
    gemm(0, 0, C, N, N, v->x[l->in[0]] + at, N, ds, N, l->more[1], v->dx[l->in[1]] + at, N);
}

void spatial_attention_backward(Vqgan *v, const VqLayer *l) {
    layer_tasks(v, l, v->b, spatial_attention_backward_task);
}

/* ---- Vector quantiser ---- */

/* For n <= SPOTS latents, columns of z (D, row stride ld): the entry with the least |e|^2/2 - z.e, the first of equals.
 * That is half the squared distance less |z|^2/2, which all entries share. score (CODES, n) scratch. */
static void nearest_of_few(const Vqgan *v, const real *z, size_t ld, size_t n, real *score, int32_t *code) {
    const size_t D = v->c.embed_dim;
    const real *book = v->params.row[v->codebook].value, *half_norm = v->arena + v->code_norm;
    real best[SPOTS];
    for (size_t k = 0; k < v->c.n_embed; k += CODES) {
        const size_t codes = min_size(CODES, v->c.n_embed - k);
        gemm(0, 0, codes, n, D, book + k * D, D, z, ld, 0, score, n);
        for (size_t i = 0; i < codes; i++) {
            const int32_t id = (int32_t)(k + i);
            const real half = half_norm[k + i];
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

typedef struct {
    Vqgan *v;
    const real *z;
    size_t N, per; /* cells and tasks of a picture */
    int32_t *raw;
} NearestJob;

static void code_norm_task(void *context, size_t k) {
    const Vqgan *v = ((const NearestJob *)context)->v;
    const size_t D = v->c.embed_dim;
    const real *code = v->params.row[v->codebook].value + k * D;
    v->arena[v->code_norm + k] = (real)(dot(code, 0, code, 0, D) / 2);
}

static void nearest_task(void *context, size_t task) {
    const NearestJob *j = (const NearestJob *)context;
    const size_t N = j->N, b = task / j->per, at = task % j->per * SPOTS;
    real *score = (real *)j->v->on.scratch + thread_index() * CODES * SPOTS;
    nearest_of_few(j->v, j->z + b * j->v->c.embed_dim * N + at, N, min_size(SPOTS, N - at), score, j->raw + b * N + at);
}

/* raw (B,N) = nearest entries of z (B,D,N) */
void nearest_codes(Vqgan *v, const real *z, size_t B, size_t N, int32_t *raw) {
    NearestJob job = {v, z, N, (N + SPOTS - 1) / SPOTS, raw};
    parallel_for(threads_free(), v->c.n_embed, code_norm_task, &job);
    parallel_for((int)min_size((size_t)v->on.threads, (size_t)threads_free()), B * job.per, nearest_task, &job);
}

/* tokens (B,N) = raw remapped; a code that the table lacks becomes a random token (SPEC section 8: unknown_index) */
void remap_codes(const Vqgan *v, const int32_t *raw, size_t B, size_t N, uint64_t seed, int32_t *tokens) {
    const size_t K = vqgan_K(v);
    for (size_t b = 0; b < B; b++)
        for (size_t i = 0; i < N; i++) {
            int32_t token = v->inverse ? v->inverse[raw[b * N + i]] : raw[b * N + i];
            if (token < 0) token = (int32_t)rng_below(seed, rng_stream(RNG_UNKNOWN, 0, b), i, (uint32_t)K);
            tokens[b * N + i] = token;
        }
}

/* z_q = z + (e - z), e the nearest entry: straight through, rounding as the official code does */
void quantize_forward(Vqgan *v, const VqLayer *l) {
    const size_t D = v->c.embed_dim, N = plane_size(v, l->out);
    const real *book = v->params.row[v->codebook].value;
    int32_t *raw = (int32_t *)(v->arena + v->raw);
    double *loss = (double *)(v->arena + v->image_loss);
    nearest_codes(v, v->x[l->in[0]], v->b, N, raw);
    for (size_t b = 0; b < v->b; b++) {
        const real *z = v->x[l->in[0]] + b * D * N;
        real *zq = v->x[l->out] + b * D * N;
        double s = 0;
        for (size_t d = 0; d < D; d++)
            for (size_t i = 0; i < N; i++) {
                const real e = book[(size_t)raw[b * N + i] * D + d], gap = e - z[d * N + i];
                zq[d * N + i] = z[d * N + i] + gap;
                s += (double)gap * (double)gap;
            }
        loss[b] = s;
    }
}

double codebook_loss_of(const VqganConfig *c, double sum, size_t elements) {
    return (1 + c->beta) * sum / (double)elements;
}

/* Both terms of the codebook loss have the value mse = mean (e-z)^2; one moves the encoder, one the codebook, and beta
 * weighs one of them. */
double codebook_loss_value(const Vqgan *v, size_t elements) {
    const double *loss = (const double *)(v->arena + v->image_loss);
    double s = 0;
    for (size_t b = 0; b < v->b; b++) s += loss[b];
    return codebook_loss_of(&v->c, s, elements);
}

/* dz = dz_q + weight w_z 2 (z-e)/n  (in place: dz is dz_q's memory)     de += weight w_e 2 (e-z)/n */
void quantize_backward(Vqgan *v, const VqLayer *l, double loss_weight) {
    const size_t D = v->c.embed_dim, N = plane_size(v, l->out);
    real to_z, to_e;
    codebook_weights(&v->c, loss_weight, v->b * D * N, &to_z, &to_e);
    const real *book = v->params.row[v->codebook].value, *z = v->x[l->in[0]];
    const int32_t *raw = (const int32_t *)(v->arena + v->raw);
    real *dz = v->dx[l->in[0]], *dbook = v->params.row[v->codebook].grad;
    for (size_t b = 0; b < v->b; b++)
        for (size_t d = 0; d < D; d++)
            for (size_t i = 0; i < N; i++) {
                const size_t at = (b * D + d) * N + i, entry = (size_t)raw[b * N + i] * D + d;
                const real gap = z[at] - book[entry];
                dz[at] += to_z * gap;
                dbook[entry] -= to_e * gap;
            }
}

/* ---- tanh on the picture, where the configuration is taken at its word ---- */

void tanh_forward(Vqgan *v, const VqLayer *l) {
    const size_t n = v->b * v->value[l->out].C * plane_size(v, l->out);
    const real *x = v->x[l->in[0]];
    real *y = v->x[l->out];
    for (size_t i = 0; i < n; i++) y[i] = (real)tanh((double)x[i]);
}

void tanh_backward(Vqgan *v, const VqLayer *l) {
    const size_t n = v->b * v->value[l->out].C * plane_size(v, l->out);
    const real *y = v->x[l->out], *dy = v->dx[l->out];
    real *dx = v->dx[l->in[0]];
    for (size_t i = 0; i < n; i++) dx[i] = dy[i] * (1 - y[i] * y[i]);
}
