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

#ifndef DEVICE_CODE

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
    conv_forward(v->x[l->out], &c, v->x[l->in[0]], v->params.row[l->weight].value, v->params.row[l->bias].value,
                 l->add == NO_VALUE ? NULL : v->x[l->add], &v->scratch);
}

void conv_layer_backward(Vqgan *v, const VqLayer *l) {
    const Conv c = layer_conv(v, l);
    const Param *w = &v->params.row[l->weight];
    conv_backward(v->dx[l->in[0]], w->grad, v->params.row[l->bias].grad, &c, v->dx[l->out], v->x[l->in[0]], w->value,
                  l->more[0], &v->scratch);
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
    real *channel = v->scratch.partials;
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
    const real *channel = v->scratch.partials;
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
    const ConvScratch *s = &j->v->scratch;
    const size_t N = j->N, b = task / j->per, at = task % j->per * SPOTS;
    real *score = s->columns + thread_index() * s->column_reals;
    nearest_of_few(j->v, j->z + b * j->v->c.embed_dim * N + at, N, min_size(SPOTS, N - at), score, j->raw + b * N + at);
}

/* raw (B,N) = nearest entries of z (B,D,N) */
void nearest_codes(Vqgan *v, const real *z, size_t B, size_t N, int32_t *raw) {
    NearestJob job = {v, z, N, (N + SPOTS - 1) / SPOTS, raw};
    parallel_for(threads_free(), v->c.n_embed, code_norm_task, &job);
    parallel_for(conv_threads(&v->scratch, B * job.per), B * job.per, nearest_task, &job);
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

#else

/* ---- The twins: GroupNorm, with or without swish ----
 *
 * x, y (B,cells,C); a group is C/32 neighbouring channels. Three kernels each way: sums of channels over slices; a warp
 * per group adds them up; every element. What forward keeps: */
typedef struct {
    float *group;   /* (B,32,2) mean and 1/deviation */
    float *channel; /* (B,C,2) scale, shift: t = x scale + shift */
} NormKept;

static const float GROUP_EPS = 1e-6f;

typedef struct {
    size_t B, cells, C;
    int swish;
} NormShape;

static NormKept norm_kept(float *memory, const NormShape *s) {
    const NormKept k = {memory, memory + s->B * 2 * NORM_GROUPS};
    return k;
}

/* PACK numbers of x, which is in floatX or, in a residual stream, float */
struct Numbers {
    float at[PACK];
};
static __device__ inline Numbers numbers_at(const floatX *x, size_t i) {
    const Pack p = *(const Pack *)(x + i);
    Numbers n;
    for (int k = 0; k < PACK; k++) n.at[k] = to_float(p.at[k]);
    return n;
}
#ifdef FLOATX_BF16
static __device__ inline Numbers numbers_at(const float *x, size_t i) {
    const Floats a = *(const Floats *)(x + i), b = *(const Floats *)(x + i + 4);
    Numbers n;
    for (int k = 0; k < 4; k++) n.at[k] = a.at[k], n.at[k + 4] = b.at[k];
    return n;
}
#endif

/* Pairs of numbers for PACK channels, from a multiple of 16 bytes: what lanes read lies far apart, so four at a time */
struct Pairs {
    float at[2 * PACK];
};
static __device__ inline Pairs pairs_at(const float *x) {
    Pairs p;
#pragma unroll
    for (int k = 0; k < PACK / 2; k++) {
        const Floats four = *(const Floats *)(x + 4 * k);
        for (int j = 0; j < 4; j++) p.at[4 * k + j] = four.at[j];
    }
    return p;
}

/* Sums of x - pivot and of its square, where the pivot is the first number of the group: close to the mean, so that
 * little is lost in their difference. */
template <typename X> static __global__ void norm_sums_kernel(float *partial, const X *x, NormShape n) {
    const Share s = share_of(n.C, n.cells, PACK);
    const size_t per = n.C / NORM_GROUPS;
    float sum[PACK] = {}, square[PACK] = {}, pivot[PACK] = {};
    x += blockIdx.z * n.cells * n.C;
    for (int j = 0; j < PACK && s.end; j++) pivot[j] = to_float(x[(s.c + j) / per * per]);
    for (size_t r = s.first; r < s.end; r += CELL_LANES) {
        const Numbers p = numbers_at(x, r * n.C + s.c);
        for (int j = 0; j < PACK; j++) {
            const float gap = p.at[j] - pivot[j];
            sum[j] += gap, square[j] += gap * gap;
        }
    }
    store_channel_sums<PACK>(partial, sum, square, n.C);
}

/* A block per picture, a warp per group. */
template <typename X>
static __global__ void __launch_bounds__(NORM_GROUPS *WARP)
    norm_groups_kernel(NormKept kept, const float *partial, const X *x, const float *gamma, const float *beta,
                       NormShape n, size_t slices) {
    const size_t b = blockIdx.x, g = threadIdx.x / WARP, lane = threadIdx.x % WARP, per = n.C / NORM_GROUPS;
    double sum = 0, square = 0;
    for (size_t i = lane; i < slices * per; i += WARP) {
        const float *p = partial + (b * slices + i / per) * 2 * n.C + g * per + i % per;
        sum += (double)p[0], square += (double)p[n.C];
    }
    const double count = (double)(n.cells * per), gap = warp_sum(sum) / count,
                 var = warp_sum(square) / count - gap * gap;
    const float mean = (float)((double)to_float(x[b * n.cells * n.C + g * per]) + gap);
    const float rstd = (float)(1 / sqrt((var > 0 ? var : 0) + (double)GROUP_EPS));
    if (lane == 0) kept.group[(b * NORM_GROUPS + g) * 2] = mean, kept.group[(b * NORM_GROUPS + g) * 2 + 1] = rstd;
    for (size_t c = g * per + lane; c < (g + 1) * per; c += WARP) {
        const float scale = rstd * gamma[c];
        kept.channel[(b * n.C + c) * 2] = scale, kept.channel[(b * n.C + c) * 2 + 1] = beta[c] - mean * scale;
    }
}

static __device__ inline float sigmoid(float t) {
    return 1 / (1 + expf(-t));
}

/* y = swish(t). Grid: packs of a picture, pictures; a pack is within a cell. */
template <typename X>
static __global__ void norm_cells_kernel(floatX *y, const X *x, const float *channel, NormShape n) {
    const unsigned C = (unsigned)n.C, in_picture = (blockIdx.x * blockDim.x + threadIdx.x) * PACK;
    const size_t i = blockIdx.y * n.cells * n.C + in_picture;
    if (in_picture >= n.cells * n.C) return;
    const Pairs scale = pairs_at(channel + (blockIdx.y * n.C + in_picture % C) * 2);
    const Numbers p = numbers_at(x, i);
    Pack out;
    for (int j = 0; j < PACK; j++) {
        const float t = p.at[j] * scale.at[2 * j] + scale.at[2 * j + 1];
        out.at[j] = to_floatX(n.swish ? t * sigmoid(t) : t);
    }
    store_whole(y + i, out);
}

static dim3 pack_grid(const NormShape *n) {
    return dim3(blocks_for(n->cells * n->C, CELL_THREADS * PACK), (unsigned)n->B);
}

template <typename X>
static Err group_norm_forward_cuda(Device *d, floatX *y, NormKept kept, const X *x, const float *gamma,
                                   const float *beta, const NormShape *n, float *partial) {
    const dim3 grid = slice_grid(n->C, n->cells, n->B, PACK);
    LAUNCH(d, norm_sums_kernel<X>, grid, CELL_THREADS, CELL_THREADS * PACK * sizeof(float), partial, x, *n);
    LAUNCH(d, norm_groups_kernel<X>, (unsigned)n->B, NORM_GROUPS * WARP, 0, kept, partial, x, gamma, beta, *n,
           (size_t)grid.y);
    LAUNCH(d, norm_cells_kernel<X>, pack_grid(n), CELL_THREADS, 0, y, x, kept.channel, *n);
    return OK;
}

/* dL/dt from dL/dy */
static __device__ inline float through_swish(float dy, float t) {
    const float s = sigmoid(t);
    return dy * s * (1 + t * (1 - s));
}

/* Sums of d = dL/dt and of d xhat. */
template <typename X>
static __global__ void norm_gradient_sums_kernel(float *partial, const floatX *dy, const X *x, NormKept kept,
                                                 NormShape n) {
    const Share s = share_of(n.C, n.cells, PACK);
    const size_t b = blockIdx.z, per = n.C / NORM_GROUPS;
    float sum[PACK] = {}, sum_hat[PACK] = {}, mean[PACK] = {}, rstd[PACK] = {}, scale[PACK] = {}, shift[PACK] = {};
    for (int j = 0; j < PACK && s.end; j++) {
        const float *group = kept.group + (b * NORM_GROUPS + (s.c + j) / per) * 2,
                    *channel = kept.channel + (b * n.C + s.c + j) * 2;
        mean[j] = group[0], rstd[j] = group[1], scale[j] = channel[0], shift[j] = channel[1];
    }
    for (size_t r = s.first; r < s.end; r += CELL_LANES) {
        const size_t at = (b * n.cells + r) * n.C + s.c;
        const Numbers p = numbers_at(x, at), g = numbers_at(dy, at);
        for (int j = 0; j < PACK; j++) {
            const float v = p.at[j], dt = g.at[j];
            const float t = n.swish ? through_swish(dt, v * scale[j] + shift[j]) : dt;
            sum[j] += t, sum_hat[j] += t * (v - mean[j]) * rstd[j];
        }
    }
    store_channel_sums<PACK>(partial, sum, sum_hat, n.C);
}

/* line (B,C,2) = slope, offset: dx = scale d + slope x + offset, alike in a group. A block per picture, a warp per
 * group. */
static __global__ void __launch_bounds__(NORM_GROUPS *WARP)
    norm_lines_kernel(float *line, const float *partial, const float *gamma, NormKept kept, NormShape n,
                      size_t slices) {
    const size_t b = blockIdx.x, g = threadIdx.x / WARP, lane = threadIdx.x % WARP, per = n.C / NORM_GROUPS;
    double sum = 0, sum_hat = 0;
    for (size_t i = lane; i < slices * per; i += WARP) {
        const float *p = partial + (b * slices + i / per) * 2 * n.C + g * per + i % per;
        sum += (double)gamma[g * per + i % per] * (double)p[0],
            sum_hat += (double)gamma[g * per + i % per] * (double)p[n.C];
    }
    const double count = (double)(n.cells * per), mean_d = warp_sum(sum) / count, mean_hat = warp_sum(sum_hat) / count;
    const double mean = (double)kept.group[(b * NORM_GROUPS + g) * 2],
                 rstd = (double)kept.group[(b * NORM_GROUPS + g) * 2 + 1];
    const double slope = -mean_hat * rstd * rstd, offset = -mean_d * rstd - slope * mean;
    for (size_t c = g * per + lane; c < (g + 1) * per; c += WARP)
        line[(b * n.C + c) * 2] = (float)slope, line[(b * n.C + c) * 2 + 1] = (float)offset;
}

template <typename X>
static __global__ void norm_gradient_kernel(floatX *dx, const floatX *dy, const X *x, const float *channel,
                                            const float *line, NormShape n, int more) {
    const unsigned C = (unsigned)n.C, in_picture = (blockIdx.x * blockDim.x + threadIdx.x) * PACK;
    const size_t i = blockIdx.y * n.cells * n.C + in_picture, c = blockIdx.y * n.C + in_picture % C;
    if (in_picture >= n.cells * n.C) return;
    const Pairs scale = pairs_at(channel + c * 2), add = pairs_at(line + c * 2);
    const Numbers p = numbers_at(x, i), g = numbers_at(dy, i);
    Pack out = {};
    if (more) out = *(const Pack *)(dx + i);
    for (int j = 0; j < PACK; j++) {
        const float v = p.at[j], dt = g.at[j];
        const float t = n.swish ? through_swish(dt, v * scale.at[2 * j] + scale.at[2 * j + 1]) : dt;
        out.at[j] =
            to_floatX((more ? to_float(out.at[j]) : 0) + scale.at[2 * j] * t + add.at[2 * j] * v + add.at[2 * j + 1]);
    }
    store_whole(dx + i, out);
}

/* dx overwritten, or added to if `more`; dgamma, dbeta (C) +=. partial: norm_partial_size floats. */
template <typename X>
static Err group_norm_backward_cuda(Device *d, floatX *dx, float *dgamma, float *dbeta, const floatX *dy, const X *x,
                                    NormKept kept, const float *gamma, const NormShape *n, int more, float *partial) {
    const dim3 grid = slice_grid(n->C, n->cells, n->B, PACK);
    float *line = partial + channel_slices(n->B, n->cells, n->C);
    LAUNCH(d, norm_gradient_sums_kernel<X>, grid, CELL_THREADS, CELL_THREADS * PACK * sizeof(float), partial, dy, x,
           kept, *n);
    LAUNCH(d, norm_lines_kernel, (unsigned)n->B, NORM_GROUPS * WARP, 0, line, partial, gamma, kept, *n, (size_t)grid.y);
    LAUNCH(d, norm_gradient_kernel<X>, pack_grid(n), CELL_THREADS, 0, dx, dy, x, kept.channel, line, *n, more);
    return add_channels(d, dbeta, dgamma, partial, n->B * grid.y, n->C);
}

static size_t norm_partial_size(const NormShape *n) {
    return channel_slices(n->B, n->cells, n->C) + n->B * n->C * 2;
}

/* ---- The twin of attention over the cells of a picture, one head ----
 *
 * With N cells of C channels the scores (N,N) fit in memory and C is too wide for a block's, so scores are written
 * down: products by matmul, picture by picture, the softmax a warp per row. q, k, v, y (B,N,C); p (B,N,N) kept. */

/* p = softmax(scale * scores), rows of n */
static __global__ void softmax_rows_kernel(floatX *p, const float *scores, float scale, size_t n) {
    const size_t r = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (r >= n) return;
    const float *s = scores + r * n;
    float largest = -HUGE_VALF, sum = 0;
    for (size_t j = lane; j < n; j += WARP) largest = fmaxf(largest, s[j]);
    largest = warp_max(largest);
    for (size_t j = lane; j < n; j += WARP) sum += expf(scale * (s[j] - largest));
    const float norm = 1 / warp_sum(sum);
    for (size_t j = lane; j < n; j += WARP) p[r * n + j] = to_floatX(expf(scale * (s[j] - largest)) * norm);
}

/* ds = scale p (dp - sum_j dp p) */
static __global__ void softmax_gradient_kernel(floatX *ds, const float *dp, const floatX *p, float scale, size_t n) {
    const size_t r = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (r >= n) return;
    float sum = 0;
    for (size_t j = lane; j < n; j += WARP) sum += dp[r * n + j] * to_float(p[r * n + j]);
    const float mean = warp_sum(sum);
    for (size_t j = lane; j < n; j += WARP)
        ds[r * n + j] = to_floatX(scale * to_float(p[r * n + j]) * (dp[r * n + j] - mean));
}

/* From the probabilities of one picture to those of the next. */
static size_t picture_scores(size_t N) {
    return round_up(N * N, TILE_ROWS);
}

/* p (B, picture_scores(N)). scores: N*N floats of work space; backward N*N floatX more, ds. */
static Err picture_attend_forward_cuda(Device *d, floatX *y, floatX *p, const floatX *q, const floatX *k,
                                       const floatX *v, size_t B, size_t N, size_t C, float *scores) {
    for (size_t b = 0; b < B; b++) {
        const size_t at = b * N * C;
        Matmul product = rows_times(scores, q + at, k + at, N, N, C, C, 1, NULL);
        product.d_is_float = 1;
        TRY(matmul(d, &product));
        LAUNCH(d, softmax_rows_kernel, blocks_for(N, CELL_THREADS / WARP), CELL_THREADS, 0, p + b * picture_scores(N),
               scores, 1 / sqrtf((float)C), N);
        product = rows_times(y + at, p + b * picture_scores(N), v + at, N, C, N, C, 0, NULL);
        TRY(matmul(d, &product));
    }
    return OK;
}

/* y (M,N) = or += a (K,M)^T b (K,N) */
static Matmul turned_rows(floatX *y, const floatX *a, const floatX *b, size_t M, size_t N, size_t K, int more) {
    Matmul p = turned_times(NULL, a, b, M, N, K, 0);
    p.d_is_float = 0, p.D = y, p.add = more ? y : NULL;
    return p;
}

/* dx[3]: dq, dk, dv, each overwritten or, where more, added to. */
static Err picture_attend_backward_cuda(Device *d, floatX *const dx[3], const int more[3], const floatX *dy,
                                        const floatX *q, const floatX *k, const floatX *v, const floatX *p, size_t B,
                                        size_t N, size_t C, float *scores, floatX *ds) {
    for (size_t b = 0; b < B; b++) {
        const size_t at = b * N * C;
        floatX *dq = dx[0] + at, *dk = dx[1] + at, *dv = dx[2] + at;
        Matmul product = turned_rows(dv, p + b * picture_scores(N), dy + at, N, C, N, more[2]);
        TRY(matmul(d, &product));
        product = rows_times(scores, dy + at, v + at, N, N, C, C, 1, NULL);
        product.d_is_float = 1;
        TRY(matmul(d, &product));
        LAUNCH(d, softmax_gradient_kernel, blocks_for(N, CELL_THREADS / WARP), CELL_THREADS, 0, ds, scores,
               p + b * picture_scores(N), 1 / sqrtf((float)C), N);
        product = rows_times(dq, ds, k + at, N, C, N, C, 0, more[0] ? dq : NULL);
        TRY(matmul(d, &product));
        product = turned_rows(dk, ds, q + at, N, C, N, more[1]);
        TRY(matmul(d, &product));
    }
    return OK;
}

/* ---- The twin of the vector quantiser ---- */

/* half (K) = |e|^2/2 of each entry as the product reads it: a warp per entry */
static __global__ void half_norms_kernel(float *half, const floatX *book, size_t K, size_t D) {
    const size_t k = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (k >= K) return;
    float sum = 0;
    for (size_t i = threadIdx.x % WARP; i < D; i += WARP) sum += to_float(book[k * D + i]) * to_float(book[k * D + i]);
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) half[k] = sum / 2;
}

/* code[r] = the entry with the least |e|^2/2 - z.e, the first of equals; a warp per row, scores (rows,K) = z.e. */
static __global__ void least_kernel(int32_t *code, const float *scores, const float *half, size_t rows, size_t K) {
    const size_t r = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (r >= rows) return;
    float best = HUGE_VALF;
    int id = 0x7fffffff;
    for (size_t k = lane; k < K; k += WARP) {
        const float distance = half[k] - scores[r * K + k];
        if (distance < best || id == 0x7fffffff) best = distance, id = (int)k;
    }
    for (int k = WARP / 2; k; k /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, best, k);
        const int other_id = __shfl_xor_sync(0xffffffffu, id, k);
        if (other < best || (other == best && other_id < id)) best = other, id = other_id;
    }
    if (lane == 0) code[r] = id < (int)K ? id : 0; /* distances that are not numbers */
}

/* raw (rows) = nearest entries of z (rows,D) in book (K,D). half (K), scores: work space, score_size >= TILE_ROWS*K
 * floats. */
static Err nearest_cuda(Device *d, int32_t *raw, const floatX *z, const floatX *book, size_t rows, size_t K, size_t D,
                        float *half, float *scores, size_t score_size) {
    const size_t tile = tile_rows(score_size, K);
    LAUNCH(d, half_norms_kernel, blocks_for(K, CELL_THREADS / WARP), CELL_THREADS, 0, half, book, K, D);
    for (size_t r = 0; r < rows; r += tile) {
        const size_t n = min_size(tile, rows - r);
        Matmul product = rows_times(scores, z + r * D, book, n, K, D, D, 1, NULL);
        product.d_is_float = 1;
        TRY(matmul(d, &product));
        LAUNCH(d, least_kernel, blocks_for(n, CELL_THREADS / WARP), CELL_THREADS, 0, raw + r, scores, half, n, K);
    }
    return OK;
}

/* sums[block] = the sum over a block of CELL_THREADS, warp after warp */
enum { BLOCK_SUM_BYTES = CELL_THREADS / WARP * sizeof(double) };
static __device__ inline void store_block_sum(double *sums, double sum) {
    SHARED(double, warps);
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (unsigned k = 1; k < CELL_THREADS / WARP; k++) sum += warps[k];
    sums[blockIdx.x] = sum;
}
/* Blocks that share n things in steps of the grid, per_block at a time */
static unsigned sum_blocks(size_t n, size_t per_block) {
    return (unsigned)min_size(SUM_BLOCKS, ceil_div(n, per_block));
}

/* zq = z + (e - z), straight through; sums (SUM_BLOCKS) = of (e - z)^2 */
static __global__ void straight_kernel(floatX *zq, double *sums, const floatX *z, const floatX *book,
                                       const int32_t *raw, size_t rows, size_t D) {
    double sum = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < rows * D; i += (size_t)SUM_BLOCKS * blockDim.x) {
        const float at = to_float(z[i]), gap = to_float(book[(size_t)raw[i / D] * D + i % D]) - at;
        zq[i] = to_floatX(at + gap);
        sum += (double)gap * (double)gap;
    }
    store_block_sum(sums, sum);
}

static Err straight_through_cuda(Device *d, floatX *zq, double *sums, const floatX *z, const floatX *book,
                                 const int32_t *raw, size_t rows, size_t D) {
    LAUNCH(d, straight_kernel, SUM_BLOCKS, CELL_THREADS, BLOCK_SUM_BYTES, zq, sums, z, book, raw, rows, D);
    return OK;
}

/* dz += to_z (z - e) */
static __global__ void commit_kernel(floatX *dz, const floatX *z, const floatX *book, const int32_t *raw, float to_z,
                                     size_t rows, size_t D) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * D) return;
    dz[i] = to_floatX(to_float(dz[i]) + to_z * (to_float(z[i]) - to_float(book[(size_t)raw[i / D] * D + i % D])));
}

/* dbook[k] += to_e (e - z) over the rows whose code is k, in their order: a block per entry looks for its rows, 256 at
 * a time, and a thread has channels of its own. Shared: the sums (D), then which of those rows are ours. */
static __global__ void book_gradient_kernel(float *dbook, const floatX *z, const floatX *book, const int32_t *raw,
                                            float to_e, size_t rows, size_t D) {
    SHARED(float, sum);
    unsigned *ours = (unsigned *)(void *)(sum + D);
    const size_t k = blockIdx.x;
    for (size_t c = threadIdx.x; c < D; c += blockDim.x) sum[c] = 0;
    for (size_t r0 = 0; r0 < rows; r0 += blockDim.x) {
        const size_t mine = r0 + threadIdx.x;
        const unsigned bits = __ballot_sync(0xffffffffu, mine < rows && (size_t)raw[mine] == k);
        __syncthreads();
        if (threadIdx.x % WARP == 0) ours[threadIdx.x / WARP] = bits;
        __syncthreads();
        for (unsigned i = 0; i < blockDim.x; i++)
            for (size_t c = threadIdx.x; (ours[i / WARP] >> i % WARP & 1) && c < D; c += blockDim.x)
                sum[c] += to_float(book[k * D + c]) - to_float(z[(r0 + i) * D + c]);
    }
    for (size_t c = threadIdx.x; c < D; c += blockDim.x) dbook[k * D + c] += to_e * sum[c];
}

static Err quantize_backward_cuda(Device *d, floatX *dz, float *dbook, const floatX *z, const floatX *book,
                                  const int32_t *raw, float to_z, float to_e, size_t rows, size_t K, size_t D) {
    LAUNCH(d, commit_kernel, blocks_for(rows * D, CELL_THREADS), CELL_THREADS, 0, dz, z, book, raw, to_z, rows, D);
    LAUNCH(d, book_gradient_kernel, (unsigned)K, CELL_THREADS, (D + CELL_THREADS / WARP) * sizeof(float), dbook, z,
           book, raw, to_e, rows, D);
    return OK;
}

/* z (rows,D) = entries of the book */
static __global__ void lookup_kernel(floatX *z, const floatX *book, const int32_t *raw, size_t rows, size_t D) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < rows * D) z[i] = book[(size_t)raw[i / D] * D + i % D];
}

/* ---- tanh on the picture; the host's order of a picture ---- */

static __global__ void tanh_forward_kernel(floatX *y, const floatX *x, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = to_floatX(tanhf(to_float(x[i])));
}
static __global__ void tanh_backward_kernel(floatX *dx, const floatX *dy, const floatX *y, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) dx[i] = to_floatX(to_float(dy[i]) * (1 - to_float(y[i]) * to_float(y[i])));
}

/* (B,C,cells) of floats as (B,cells,C), and back */
static __global__ void from_planes_kernel(floatX *to, const float *from, size_t B, size_t C, size_t cells) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, c = i % C, cell = i / C % cells, b = i / C / cells;
    if (b < B) to[i] = to_floatX(from[(b * C + c) * cells + cell]);
}
static __global__ void to_planes_kernel(float *to, const floatX *from, size_t B, size_t C, size_t cells) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, cell = i % cells, c = i / cells % C,
                 b = i / C / cells;
    if (b < B) to[i] = to_float(from[(b * cells + cell) * C + c]);
}
#endif
