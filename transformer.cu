/* transformer.cu - one reverse transition p(x_{t-1} | x_t) of the Markov chain over tokens (paper, section 3.2).
 *
 * x_t are N tokens, noised t times; the network gives the distribution of the less noisy x_{t-1}, token by token:
 *
 *     p(x_{t-1} | x_t) = prod_i p(x_{t-1}[i] | x_{t-1}[0..i-1], x_t) = prod_i softmax(logits[i])[x_{t-1}[i]]
 *
 * There are two networks. sos is token 0, t and the class are read as tokens too, and "shifted" means that position i
 * reads token i-1, so that no position sees what it has to predict:
 *
 *     NET_X     encoder  reads [t, (class,) x_t]; every position sees every other                -> context
 *               decoder  reads [sos, x_{t-1} shifted]; position i sees 0..i, and the context     -> logits
 *     NET_GPT   decoder  reads [t, (class,) x_{t-1} shifted]; position i sees 0..i               -> logits
 *               for the last scale, whose x_t is pure noise and tells nothing
 *
 * Encoder and decoder are stacks of layers around a residual stream x (B,n,C), which begins as an embedding:
 *
 *     x = token[ids] + position                     embed
 *     x = x + block(norm(x))   for every layer      self-attention, cross-attention to the context, or feed-forward
 *     out = norm(x)
 *     logits = out head^T                           then what the variant does to them
 *
 * Variants of NET_X (SPEC section 1): X_SCALED multiplies the logits by exp(s[t]), X_FINE_SCALED by exp(s[t,i]);
 * X_RESIDUAL adds log(alpha_t [k = x_t[i]] + (1 - alpha_t)/K), what is known of x_{t-1} before any learning;
 * X_RESIDUAL_SCALED does both.
 *
 * Every layer is a plain loop with its backward pass beneath; its first line hands over to a faster one of the same
 * name where there is one (base/compute.h). So everything from section 2 on is written once for the plain loops, the
 * CPU's kernels and a GPU. Activations are row-major (R,C), R = B*n rows. `real` is float, or double in tests.
 * A backward pass adds to gradients of parameters, and overwrites gradients of activations unless it says so.
 *
 * Refused: tokens, t and labels outside their tables, sequences longer than the position tables, official options that
 * are not implemented. There is no dropout, for the official configurations use none.
 *
 * Read next: vqgan.c, which makes the tokens. (diffusion.c says where x_t comes from and what becomes of the logits.) */
#ifndef __cplusplus /* C: all but the last section, which is CUDA C++ */
#include "imagebart.h"
#include "base/plan.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ================================ 1. Layers ================================ */

/* ---- Embedding ---- */

/* x[b,i,:] = token[ids[b,i],:] + position[i,:]
 *   x (B,n,C)   ids (B,n)   token (V,C)   position (length,C)
 *   at (B*n): which positions those are, while decoding; NULL: 0..n-1 of every row */
static void embed_forward(const Compute *on, real *x, const int32_t *ids, const real *token, const real *position,
                          const Position *at, size_t B, size_t n, size_t C) {
    if (on->fast) return on->fast->embed_forward(on, x, ids, token, position, at, B, n, C);
    for (size_t r = 0; r < B * n; r++) {
        const size_t i = at ? at[r].pos : r % n;
        for (size_t c = 0; c < C; c++) x[r * C + c] = token[(size_t)ids[r] * C + c] + position[i * C + c];
    }
}

/* dtoken[ids[b,i],:] += dx[b,i,:]   dposition[i,:] += dx[b,i,:] */
static void embed_backward(const Compute *on, real *dtoken, real *dposition, const real *dx, const int32_t *ids,
                           size_t B, size_t n, size_t C, size_t V) {
    if (on->fast) return on->fast->embed_backward(on, dtoken, dposition, dx, ids, B, n, C, V);
    for (size_t r = 0; r < B * n; r++)
        for (size_t c = 0; c < C; c++) {
            dtoken[(size_t)ids[r] * C + c] += dx[r * C + c];
            dposition[r % n * C + c] += dx[r * C + c];
        }
}

/* ---- Layer norm ---- */

/* Row r of what is normalised is this row of x: the first `skip` of every n rows are left out. (The prompt of NET_GPT has
 * no logits.) */
static size_t source_row(size_t r, size_t n, size_t skip) {
    return r / (n - skip) * n + skip + r % (n - skip);
}

/* y = xhat weight + bias,   xhat = (x - mean) rstd,   rstd = 1/sqrt(variance + 1e-5), of each row
 *   y (R,C)   x (.,C)   mean, rstd (R), which backward reads   weight, bias (C) */
static void norm_forward(const Compute *on, real *y, real *mean, real *rstd, const real *x, const real *weight,
                         const real *bias, size_t R, size_t C, size_t n, size_t skip) {
    if (on->fast) return on->fast->norm_forward(on, y, mean, rstd, x, weight, bias, R, C, n, skip);
    for (size_t r = 0; r < R; r++) {
        const real *row = x + source_row(r, n, skip) * C;
        real sum = 0, square = 0;
        for (size_t c = 0; c < C; c++) sum += row[c];
        mean[r] = sum / (real)C;
        for (size_t c = 0; c < C; c++) square += (row[c] - mean[r]) * (row[c] - mean[r]);
        rstd[r] = (real)(1 / sqrt((double)square / (double)C + LAYER_NORM_EPS));
        for (size_t c = 0; c < C; c++) y[r * C + c] = (row[c] - mean[r]) * rstd[r] * weight[c] + bias[c];
    }
}

/* With g = dy weight, and means over a row:
 *     dx += rstd (g - mean(g) - xhat mean(g xhat))     dweight += sum_r dy xhat     dbias += sum_r dy
 * dx_operand: a GPU's copy of dx for matrix products; elsewhere it is dx. dy_f32: a GPU has dy as float */
static void norm_backward(const Compute *on, real *dx, real *dx_operand, real *dweight, real *dbias, const real *dy,
                          const real *x, const real *weight, const real *mean, const real *rstd, int dy_f32, size_t R,
                          size_t C, size_t n, size_t skip) {
    if (on->fast)
        return on->fast->norm_backward(on, dx, dx_operand, dweight, dbias, dy, x, weight, mean, rstd, dy_f32, R, C, n,
                                       skip);
    for (size_t r = 0; r < R; r++) {
        const size_t at = source_row(r, n, skip) * C;
        const real *row = x + at, *d = dy + r * C;
        real sum = 0, sum_hat = 0;
        for (size_t c = 0; c < C; c++) {
            const real hat = (row[c] - mean[r]) * rstd[r];
            sum += d[c] * weight[c], sum_hat += d[c] * weight[c] * hat;
            dweight[c] += d[c] * hat, dbias[c] += d[c];
        }
        for (size_t c = 0; c < C; c++)
            dx[at + c] +=
                rstd[r] * (d[c] * weight[c] - sum / (real)C - (row[c] - mean[r]) * rstd[r] * sum_hat / (real)C);
    }
}

/* ---- Linear ---- */

/* y = add + bias + x w^T
 *   y, add (R,M)   x (R,C)   w (M,C)   bias (M);   bias and add may be NULL, add may be y
 *   y_f32: a GPU writes y as float, for the residual stream and for logits; add is float then */
static void linear_forward(const Compute *on, real *y, const real *x, const real *w, const real *bias, const real *add,
                           int y_f32, size_t R, size_t C, size_t M) {
    if (on->fast) return on->fast->linear_forward(on, y, x, w, bias, add, y_f32, R, C, M);
    for (size_t r = 0; r < R; r++)
        for (size_t k = 0; k < M; k++) {
            real sum = (add ? add[r * M + k] : 0) + (bias ? bias[k] : 0);
            for (size_t c = 0; c < C; c++) sum += x[r * C + c] * w[k * C + c];
            y[r * M + k] = sum;
        }
}

/* dx = dy w, or += if accumulate     dw += dy^T x     db += sum_r dy, unless NULL */
static void linear_backward(const Compute *on, real *dx, real *dw, real *db, const real *dy, const real *x,
                            const real *w, int accumulate, int dx_f32, size_t R, size_t C, size_t M) {
    if (on->fast) return on->fast->linear_backward(on, dx, dw, db, dy, x, w, accumulate, dx_f32, R, C, M);
    for (size_t r = 0; r < R; r++) {
        for (size_t c = 0; c < C && !accumulate; c++) dx[r * C + c] = 0;
        for (size_t k = 0; k < M; k++) {
            const real d = dy[r * M + k];
            for (size_t c = 0; c < C; c++) dx[r * C + c] += d * w[k * C + c], dw[k * C + c] += d * x[r * C + c];
            if (db) db[k] += d;
        }
    }
}

/* ---- GELU ---- */

/* g = gelu(g + bias) in place, gelu(x) = x F(x) with F(x) = P(z < x) for z ~ N(0,1): the exact one (SPEC 1.8)
 * dg = gelu'(g + bias) = F(x) + x F'(x), for backward; NULL: not wanted
 *   g, dg (R,H)   bias (H) */
static void gelu_forward(const Compute *on, real *g, real *dg, const real *bias, size_t R, size_t H) {
    if (on->fast) return on->fast->gelu_forward(on, g, dg, bias, R, H);
    for (size_t i = 0; i < R * H; i++) {
        const double x = (double)(g[i] + bias[i % H]), cdf = 0.5 * erfc(-x * 0.70710678118654752440);
        if (dg) dg[i] = (real)(cdf + x * 0.39894228040143267794 * exp(-0.5 * x * x));
        g[i] = (real)(x * cdf);
    }
}

/* dh *= dg: the gradient of gelu(h) becomes that of h */
static void gelu_backward(const Compute *on, real *dh, const real *dg, size_t R, size_t H) {
    if (on->fast) return on->fast->gelu_backward(on, dh, dg, R, H);
    for (size_t i = 0; i < R * H; i++) dh[i] *= dg[i];
}

/* ---- Attention ---- */

/* Query i sees keys 0..visible_keys-1 of its batch row. */
static size_t visible_keys(const Attention *s, size_t i) {
    if (s->position) return s->Tk ? s->Tk : s->position[i].visible;
    if (!s->causal) return s->Tk;
    return i < s->unmasked ? s->unmasked < s->Tk ? s->unmasked : s->Tk : i + 1;
}

static size_t attention_needs(const Compute *on, const Attention *s, int backward) {
    return on->fast ? on->fast->attention_needs(on, s, backward) : s->key_stride * sizeof(real);
}

static size_t attention_saved(const Compute *on, const Attention *s) {
    return on->fast ? on->fast->attention_saved(s) : s->B * s->heads * s->Tq * s->Tk * sizeof(real);
}

/* In each head, over the keys j that query i sees:
 *     p[i,:] = softmax(q[i,:] k[j,:]^T / sqrt(D))     y[i,:] = sum_j p[i,j] v[j,:]
 *   q, y (B,Tq,heads*D)   k, v (B,key_stride,heads*D)
 *   saved: kept for backward, p (B,heads,Tq,Tk); NULL: nothing */
static void attention_forward(const Compute *on, real *y, real *saved, const real *q, const real *k, const real *v,
                              const Attention *s) {
    if (on->fast) return on->fast->attention_forward(on, y, saved, q, k, v, s);
    const size_t D = s->D, inner = s->heads * D;
    for (size_t task = 0; task < s->B * s->heads * s->Tq; task++) {
        const size_t i = task % s->Tq, h = task / s->Tq % s->heads, b = task / s->Tq / s->heads;
        const size_t keys = visible_keys(s, i), at = (b * s->Tq + i) * inner + h * D;
        const size_t at_key = (s->position ? s->position[i].b : b) * s->key_stride * inner + h * D;
        real *p = saved ? saved + task * s->Tk : (real *)on->scratch, largest = -(real)HUGE_VAL, sum = 0;
        for (size_t j = 0; j < keys; j++) {
            p[j] = 0;
            for (size_t d = 0; d < D; d++) p[j] += q[at + d] * k[at_key + j * inner + d];
            p[j] *= (real)(1 / sqrt((double)D));
            if (p[j] > largest) largest = p[j];
        }
        for (size_t j = 0; j < keys; j++) sum += p[j] = (real)exp((double)(p[j] - largest));
        for (size_t d = 0; d < D; d++) y[at + d] = 0;
        for (size_t j = 0; j < keys; j++) {
            p[j] /= sum;
            for (size_t d = 0; d < D; d++) y[at + d] += p[j] * v[at_key + j * inner + d];
        }
    }
}

/* With dp[i,j] = dy[i,:] v[j,:]^T and ds[i,j] = p[i,j] (dp[i,j] - sum_k p[i,k] dp[i,k]) / sqrt(D):
 *     dq[i,:] = sum_j ds[i,j] k[j,:]     dk[j,:] = sum_i ds[i,j] q[i,:]     dv[j,:] = sum_i p[i,j] dy[i,:]
 *   all overwritten; key_stride = Tk */
static void attention_backward(const Compute *on, real *dq, real *dk, real *dv, const real *dy, const real *y,
                               const real *saved, const real *q, const real *k, const real *v, const Attention *s) {
    if (on->fast) return on->fast->attention_backward(on, dq, dk, dv, dy, y, saved, q, k, v, s);
    const size_t D = s->D, inner = s->heads * D;
    real *dp = (real *)on->scratch;
    memset(dq, 0, s->B * s->Tq * inner * sizeof *dq);
    memset(dk, 0, s->B * s->Tk * inner * sizeof *dk);
    memset(dv, 0, s->B * s->Tk * inner * sizeof *dv);
    for (size_t task = 0; task < s->B * s->heads * s->Tq; task++) {
        const size_t i = task % s->Tq, h = task / s->Tq % s->heads, b = task / s->Tq / s->heads;
        const size_t keys = visible_keys(s, i), at = (b * s->Tq + i) * inner + h * D;
        const real *p = saved + task * s->Tk;
        real mean = 0; /* of dp under p: sum_j p[i,j] dp[i,j] */
        for (size_t j = 0; j < keys; j++) {
            const size_t to = (b * s->Tk + j) * inner + h * D;
            dp[j] = 0;
            for (size_t d = 0; d < D; d++) dp[j] += dy[at + d] * v[to + d], dv[to + d] += p[j] * dy[at + d];
            mean += p[j] * dp[j];
        }
        for (size_t j = 0; j < keys; j++) {
            const size_t to = (b * s->Tk + j) * inner + h * D;
            const real ds = p[j] * (dp[j] - mean) * (real)(1 / sqrt((double)D));
            for (size_t d = 0; d < D; d++) dq[at + d] += ds * k[to + d], dk[to + d] += ds * q[at + d];
        }
    }
}

/* Decoding keeps the keys and values of earlier positions; the new queries see those and their own.
 *   kept (B,key_stride,heads*D), or in a fast version's own format, such as bf16 */
static size_t kept_bytes(const Compute *on, const Attention *s) {
    return on->fast ? on->fast->kept_bytes(on, s) : s->B * s->key_stride * s->heads * s->D * sizeof(real);
}

/* kept[b,pos,:] = x (B,n,heads*D): positions 0..n-1 of every batch row, or those that s says */
static void keep_positions(const Compute *on, void *kept, const real *x, size_t n, const Attention *s) {
    if (on->fast) return on->fast->keep_positions(on, kept, x, n, s);
    const size_t inner = s->heads * s->D;
    for (size_t r = 0; r < s->B * n; r++) {
        const size_t b = s->position ? s->position[r].b : r / n, i = s->position ? s->position[r].pos : r % n;
        memcpy((real *)kept + (b * s->key_stride + i) * inner, x + r * inner, inner * sizeof *x);
    }
}

/* attention_forward, from kept keys and values */
static void attention_from_kept(const Compute *on, real *y, const real *q, const void *k, const void *v,
                                const Attention *s) {
    if (on->fast) return on->fast->attention_from_kept(on, y, q, k, v, s);
    attention_forward(on, y, NULL, q, (const real *)k, (const real *)v, s);
}

/* ---- The head's variants ---- */

/* The scale t of batch row b, and the noisier token at position i, as the encoder read them */
static size_t scale_of(const Variant *v, size_t b) {
    return (size_t)v->ids[b * (v->prompt + v->N)];
}
static size_t noisier_token(const Variant *v, size_t b, size_t i) {
    return (size_t)v->ids[b * (v->prompt + v->N) + v->prompt + i];
}

/* The element of log_scalors (the official spelling) that scales position i of batch row b */
static size_t scalor_of(const Variant *v, size_t b, size_t i) {
    return v->fine ? (scale_of(v, b) - 1) * v->length + i : scale_of(v, b) - 1;
}

static size_t variant_needs(const Compute *on, size_t R) {
    return on->fast ? on->fast->variant_needs(on, R) : 0;
}

/* logits[b,i,k] = exp(s) raw[b,i,k] + log(alpha_t [k = x_t[b,i]] + (1 - alpha_t)/K), either part if the variant has it
 *   logits, raw (B,n,K), may be one array   at: as embed_forward's; B = 1 then */
static void variant_forward(const Compute *on, real *logits, const real *raw, const Variant *v, const Position *at,
                            size_t B, size_t n, size_t K) {
    if (on->fast) return on->fast->variant_forward(on, logits, raw, v, at, B, n, K);
    for (size_t r = 0; r < B * n; r++) {
        const size_t b = at ? at[r].b : r / n, i = at ? at[r].pos : r % n;
        const double scale = v->log_scalors ? exp((double)v->log_scalors[scalor_of(v, b, i)]) : 1;
        const double alpha = v->residual ? (double)v->alpha[scale_of(v, b)] : 0;
        for (size_t k = 0; k < K; k++) {
            logits[r * K + k] = raw[r * K + k] * (real)scale;
            if (v->residual)
                logits[r * K + k] += (real)log((k == noisier_token(v, b, i) ? alpha : 0) + (1 - alpha) / (double)K);
        }
    }
}

/* draw = dlogits exp(s)     ds += exp(s) sum_k dlogits raw, s being log_scalors[t-1] or [t-1,i]
 *   draw, dlogits, raw (B,n,K); draw may be raw */
static void variant_backward(const Compute *on, real *draw, real *dlog_scalors, const real *dlogits, const real *raw,
                             const Variant *v, size_t B, size_t n, size_t K) {
    if (on->fast) return on->fast->variant_backward(on, draw, dlog_scalors, dlogits, raw, v, B, n, K);
    for (size_t r = 0; r < B * n; r++) {
        const size_t at = scalor_of(v, r / n, r % n);
        const real scale = (real)exp((double)v->log_scalors[at]);
        for (size_t k = r * K; k < (r + 1) * K; k++) {
            dlog_scalors[at] += scale * dlogits[k] * raw[k];
            draw[k] = dlogits[k] * scale;
        }
    }
}

/* ---- Denoising loss (SPEC section 4) ---- */

/* Of each row, with p = softmax(logits) and q the posterior of x_{t-1} given x_t and x_0:
 *     hard = -log p[target]                           d hard/d logits[k] = p[k] - [k = target]
 *     soft = KL(q || p) = sum_k q[k] log(q[k]/p[k])   d soft/d logits[k] = p[k] - q[k],  for sum_k q[k] = 1
 * since log p[k] = logits[k] - log sum_j exp(logits[j]), whose derivative by logits[j] is [j = k] - p[j].
 *     sums = sum_r hard, sum_r soft     dlogits = hard_weight (p - [k = target]) + soft_weight (p - q)
 *   logits, posterior, dlogits (R,K)   target (R);   posterior and dlogits may be NULL, dlogits may be logits */
static void loss_rows(const Compute *on, double sums[2], real *dlogits, const real *logits, const int32_t *target,
                      const real *posterior, real soft_weight, real hard_weight, size_t R, size_t K) {
    if (on->fast)
        return on->fast->denoising_loss(on, sums, dlogits, logits, target, posterior, soft_weight, hard_weight, R, K);
    sums[0] = sums[1] = 0;
    for (size_t r = 0; r < R; r++) {
        const real *l = logits + r * K, *q = posterior ? posterior + r * K : NULL;
        double largest = -HUGE_VAL, sum = 0;
        for (size_t k = 0; k < K; k++)
            if ((double)l[k] > largest) largest = (double)l[k]; /* fmax() here makes gcc 12 for Arm crash */
        for (size_t k = 0; k < K; k++) sum += exp((double)l[k] - largest);
        sum = log(sum);
        sums[0] += sum - ((double)l[target[r]] - largest);
        for (size_t k = 0; q && k < K; k++)
            if (q[k] > 0) sums[1] += (double)q[k] * (log((double)q[k]) - ((double)l[k] - largest - sum));
        real *d = dlogits ? dlogits + r * K : NULL; /* p, then the gradient */
        for (size_t k = 0; d && k < K; k++) d[k] = (real)exp((double)l[k] - largest - sum);
        for (size_t k = 0; d && k < K; k++)
            d[k] = hard_weight * (d[k] - (k == (size_t)target[r])) + soft_weight * (d[k] - (q ? q[k] : 0));
    }
}

/* ================================ 2. The network ================================ */

typedef struct {
    size_t weight, bias, C; /* rows of the parameter table */
} Norm;

typedef struct {
    size_t weight, bias, in, out; /* weight (out,in); bias (out) or NONE */
} Linear;

/* What a layer computes on the way forward, R = B*n rows */
typedef struct {
    real *x, *mean, *rstd; /* (R,C) input, which a GPU has in float; (R) of its norm */
    real *normed;          /* (R,C) */
    real *query, *y;       /* (R,inner) queries; output of the heads, before out */
    real *key, *value;     /* (B,keys,inner) */
    real *joint, *saved;   /* the first of those that are one product, or NULL; of attention, for backward, or NULL */
    real *g, *dg;          /* (R,4C) gelu(h) and its derivative; dg NULL: not wanted */
} Activations;

/* x = x + block(norm(x)) */
typedef struct {
    BlockKind kind;
    Norm norm;
    Linear q, k, v, out; /* attention, in heads of D channels; inner = heads*D */
    Linear joint;        /* q, k and v, or k and v of a context, as one; in = 0: they are not */
    size_t heads, D;
    Linear up, down;             /* feed-forward */
    Activations act;             /* training: its own; else all layers share one set */
    void *kept_key, *kept_value; /* a decoder that is not trained: of earlier positions, or of the context */
} Layer;

typedef struct {
    Layer *layer;
    size_t n_layers;
    size_t token_emb, pos_emb; /* rows of the table */
    Norm norm;                 /* the final one */
    size_t C, max_T;
    int causal;
    size_t unmasked; /* the first positions, that see each other even if causal */

    size_t T;          /* planned positions */
    int32_t *ids;      /* (B,T) where the network computes */
    int32_t *host_ids; /* (B,T) here; the same memory on a CPU */
    real *x_end, *out; /* (R,C) input and output of the final norm */
    real *end_mean, *end_rstd;
} Stack;

typedef enum { IDLE, FORWARD_DONE, DECODING } State;

struct Transformer {
    NetConfig config;
    Params params;
    Stack encoder, decoder; /* NET_GPT: decoder only */
    Linear head;
    size_t log_scalors; /* row, or NONE */
    float alpha[MAX_SCALES + 1];

    /* the plan */
    Compute on;
    size_t B, N;
    WeightFormat format;
    int train;
    void *memory, *host_memory;
    Activations shared;                         /* of all layers, unless trained */
    real *raw, *logits, *draw;                  /* (B,N,K) before and after the variant; gradient of raw */
    real *dx, *dx_operand, *dcontext, *dnormed; /* gradients, reused by every layer; dx, dcontext: f32 */
    real *dquery, *dkey, *dvalue, *dy, *dh;
    real *host_logits;        /* a GPU's, when asked for; else logits */
    size_t *fed;              /* (B) decoding: positions of a batch row whose keys and values are there */
    int32_t *first;           /* (B) what stands in front of position 0: sos, or the end of a GPT's prompt */
    Position *position;       /* (B*DECODE_BLOCK) the positions of a pass of decoding */
    Decoder gpu;              /* the decoder as a GPU's loop sees it */
    DecoderLayer *gpu_layer;  /* (decoder.n_layers) */
    int32_t *loss_ids[3], *t; /* (B,N) and (B) there: x_0, x_{t-1}, x_t and t, which a GPU's loss reads */
    double *loss_sums;        /* (2) there */

    State state;
    size_t now_B, now_N; /* of the last forward or decode_begin */
};

enum { FEED_FACTOR = 4 }; /* hidden width of a feed-forward block over dim */

/* Bytes of a number that a GPU has as float */
static size_t f32_bytes(const Compute *on) {
    return on->device ? sizeof(float) : sizeof(real);
}

static const real *value_of(const Transformer *m, size_t row) {
    return row == NONE ? NULL : param_value(&m->params, row);
}
static real *grad_of(const Transformer *m, size_t row) {
    return row == NONE ? NULL : param_grad(&m->params, row);
}

/* A pass over positions 0..n-1 of B batch rows; or, while decoding, over n positions of any rows, with B = 1. */
typedef struct {
    size_t B, n;
    const Position *position; /* (n), or NULL */
    size_t stride;            /* positions that a batch row's kept keys and values have room for */
    int causal;               /* mask among the positions; while decoding, each says what it sees */
    const real *context;      /* (B,T_context,C); NULL: keys and values of the context are in place */
    size_t T_context;
} Pass;

static Pass whole_pass(const Stack *s, size_t B, size_t n, const real *context, size_t T_context) {
    return (Pass){.B = B, .n = n, .stride = n, .causal = s->causal, .context = context, .T_context = T_context};
}

/* What the attention of layer l of stack s is in a pass */
static Attention attention_of(const Transformer *m, const Stack *s, const Layer *l, const Pass *pass) {
    const int cross = l->kind == BLOCK_CROSS;
    Attention a = {pass->B, l->heads, l->D, pass->n, pass->position ? 0 : pass->n, pass->stride};
    if (cross)
        a.Tk = a.key_stride = pass->T_context;
    else
        a.causal = pass->causal;
    a.unmasked = s->unmasked, a.position = pass->position, a.kept_bf16 = weight_precision(m->format) == PRECISION_BF16;
    a.q_row = cross ? 0 : l->joint.out, a.kv_row = l->joint.out;
    return a;
}

/* ---- Products with weights of the table ---- */

/* y (R,out) = add + bias + x (R,in) weight^T. On a CPU packed weights, and those of decoding, whose rows are few,
 * stream by. */
static void project(const Transformer *m, const Linear *l, real *y, const real *x, size_t bias, const real *add,
                    int y_f32, size_t R) {
    const Param *p = &m->params.row[l->weight];
    const Weights plain = {WEIGHTS_REAL, p->value, NULL}, *w = p->packed.data ? &p->packed : &plain;
    if (m->on.fast && !m->on.device && (m->state == DECODING || p->packed.data))
        m->on.fast->linear_stream(&m->on, y, x, w, value_of(m, bias), add, R, l->in, l->out);
    else
        linear_forward(&m->on, y, x, value_of(m, l->weight), value_of(m, bias), add, y_f32, R, l->in, l->out);
}

static void project_backward(const Transformer *m, const Linear *l, real *dx, const real *dy, const real *x,
                             int accumulate, int dx_f32, size_t R) {
    linear_backward(&m->on, dx, grad_of(m, l->weight), grad_of(m, l->bias), dy, x, value_of(m, l->weight), accumulate,
                    dx_f32, R, l->in, l->out);
}

/* Keys and values of source (B,n,C); keep: they join those that the layer keeps. */
static void project_keys(const Transformer *m, const Layer *l, const Attention *s, const real *source, size_t n,
                         int keep) {
    project(m, &l->k, l->act.key, source, l->k.bias, NULL, 0, s->B * n);
    project(m, &l->v, l->act.value, source, l->v.bias, NULL, 0, s->B * n);
    if (!keep) return;
    keep_positions(&m->on, l->kept_key, l->act.key, n, s);
    keep_positions(&m->on, l->kept_value, l->act.value, n, s);
}

/* On a GPU that trains, q, k and v of one input are one product each way where their weights follow each other, and side by
 * side in its rows: q, k, v, or GPT's order k, q, v, or k, v of a context. Does row `last` lie n tensors behind `first`? */
static int follows(const Transformer *m, size_t first, size_t last, size_t n) {
    size_t (*const place)(const Params *, size_t) = m->on.ops->place;
    return first == NONE || place(&m->params, last) == place(&m->params, first) + n * m->params.row[first].size;
}

static Linear joint_of(const Transformer *m, const Layer *l) {
    const size_t n = l->kind == BLOCK_CROSS ? 2 : 3;
    Linear x = n == 3 && l->q.weight < l->k.weight ? l->q : l->k;
    if (!follows(m, x.weight, l->v.weight, n - 1) || !follows(m, x.bias, l->v.bias, n - 1)) return (Linear){0};
    return x.out *= n, x;
}

/* Of q, k, v, or their gradients, those that are joint: where they lie in the array of the first, which is returned. */
static real *side_by_side(const Transformer *m, const Layer *l, real **q, real **k, real **v) {
    const size_t inner = l->heads * l->D;
    const int k_first = l->joint.weight == l->k.weight;
    real *const first = k_first ? *k : *q;
    if (!l->joint.in) return NULL;
    if (l->kind != BLOCK_CROSS) *(k_first ? q : k) = compute_at(&m->on, first, inner);
    *v = compute_at(&m->on, first, l->joint.out - inner);
    return first;
}

/* ---- Blocks ---- */

/* Queries, keys and values; those of the context may be in place. */
static void project_heads(const Transformer *m, const Layer *l, const Attention *s, const Pass *pass, int keep) {
    const Activations *act = &l->act;
    const int cross = l->kind == BLOCK_CROSS;
    const real *source = cross ? pass->context : act->normed;
    if (cross || !act->joint) project(m, &l->q, act->query, act->normed, l->q.bias, NULL, 0, pass->B * pass->n);
    if (act->joint)
        project(m, &l->joint, act->joint, source, l->joint.bias, NULL, 0, s->B * s->Tk);
    else if (source)
        project_keys(m, l, s, source, cross ? pass->T_context : pass->n, keep);
}

/* next (R,C) = x + out(attention(q normed, k source, v source)); source is normed itself, or the context.
 * With packed weights a whole pass reads the kept keys too, so that decoding gives the same bits. */
static void attention_block_forward(Transformer *m, const Stack *s, Layer *l, real *next, const Pass *pass) {
    const size_t R = pass->B * pass->n;
    const Attention a = attention_of(m, s, l, pass);
    const int keep = l->kept_key && (pass->position || (a.kept_bf16 && !m->on.device));
    Activations *act = &l->act;
    project_heads(m, l, &a, pass, keep);
    if (keep)
        attention_from_kept(&m->on, act->y, act->query, l->kept_key, l->kept_value, &a);
    else
        attention_forward(&m->on, act->y, act->saved, act->query, act->key, act->value, &a);
    project(m, &l->out, next, act->y, l->out.bias, act->x, 1, R);
}

/* From m->dx (R,C), the gradient of next: m->dnormed overwritten, dcontext += (cross-attention), parameters +=.
 * That of x through the sum, m->dx, stays as it is; the caller adds what comes through the norm. */
static void attention_block_backward(Transformer *m, const Stack *s, const Layer *l, real *dcontext, const Pass *pass) {
    const size_t R = pass->B * pass->n;
    const Attention a = attention_of(m, s, l, pass);
    const Activations *act = &l->act;
    const int cross = l->kind == BLOCK_CROSS;
    real *dsource = cross ? dcontext : m->dnormed, *dq = m->dquery, *dk = m->dkey, *dv = m->dvalue;
    real *djoint = side_by_side(m, l, &dq, &dk, &dv);
    const real *source = cross ? pass->context : act->normed;
    project_backward(m, &l->out, m->dy, m->dx_operand, act->y, 0, 0, R);
    attention_backward(&m->on, dq, dk, dv, m->dy, act->y, act->saved, act->query, act->key, act->value, &a);
    if (cross || !djoint) project_backward(m, &l->q, m->dnormed, dq, act->normed, 0, 0, R);
    if (djoint) return project_backward(m, &l->joint, dsource, djoint, source, cross, cross, a.B * a.Tk);
    project_backward(m, &l->k, dsource, dk, source, 1, cross, a.B * a.Tk);
    project_backward(m, &l->v, dsource, dv, source, 1, cross, a.B * a.Tk);
}

/* next (R,C) = x + down(gelu(up normed)) */
static void feed_block_forward(Transformer *m, Layer *l, real *next, size_t R) {
    Activations *act = &l->act;
    project(m, &l->up, act->g, act->normed, NONE, NULL, 0, R);
    gelu_forward(&m->on, act->g, act->dg, value_of(m, l->up.bias), R, l->up.out);
    project(m, &l->down, next, act->g, l->down.bias, act->x, 1, R);
}

static void feed_block_backward(Transformer *m, const Layer *l, size_t R) {
    const Activations *act = &l->act;
    project_backward(m, &l->down, m->dh, m->dx_operand, act->g, 0, 0, R);
    gelu_backward(&m->on, m->dh, act->dg, R, l->up.out);
    project_backward(m, &l->up, m->dnormed, m->dh, act->normed, 0, 0, R);
}

/* ---- Stacks ---- */

/* s->out (B,n-skip,C) = final norm of the last layer's output, without the first `skip` positions of each batch row */
static void stack_forward(Transformer *m, Stack *s, const Pass *pass, size_t skip) {
    const Compute *on = &m->on;
    const size_t R = pass->B * pass->n, C = s->C;
    embed_forward(on, s->layer[0].act.x, s->ids, value_of(m, s->token_emb), value_of(m, s->pos_emb), pass->position,
                  pass->B, pass->n, C);
    for (size_t i = 0; i < s->n_layers && !work_stops(); i++) {
        Layer *l = &s->layer[i];
        real *next = i + 1 < s->n_layers ? s->layer[i + 1].act.x : s->x_end;
        norm_forward(on, l->act.normed, l->act.mean, l->act.rstd, l->act.x, value_of(m, l->norm.weight),
                     value_of(m, l->norm.bias), R, C, pass->n, 0);
        if (l->kind == BLOCK_FEED)
            feed_block_forward(m, l, next, R);
        else
            attention_block_forward(m, s, l, next, pass);
    }
    norm_forward(on, s->out, s->end_mean, s->end_rstd, s->x_end, value_of(m, s->norm.weight), value_of(m, s->norm.bias),
                 pass->B * (pass->n - skip), C, pass->n, skip);
}

/* First parameter row of a layer. Backward visits layers last to first; when it leaves this one, the gradients of all
 * rows from here on are final. A feed-forward block's norm may lie in front of the attention before it. */
static size_t first_row(const Layer *l) {
    return l->kind == BLOCK_FEED ? l->up.weight : l->norm.weight;
}

/* From dout (B,n-skip,C): parameters +=, dcontext +=. Overwrites m->dx. */
static void stack_backward(Transformer *m, Stack *s, const real *dout, real *dcontext, const Pass *pass, size_t skip) {
    const Compute *on = &m->on;
    const size_t R = pass->B * pass->n, C = s->C, rows = pass->B * (pass->n - skip);
    compute_zero(on, m->dx, R * C * f32_bytes(on));
    if (m->dx_operand != m->dx) compute_zero(on, m->dx_operand, R * C * on->unit);
    norm_backward(on, m->dx, m->dx_operand, grad_of(m, s->norm.weight), grad_of(m, s->norm.bias), dout, s->x_end,
                  value_of(m, s->norm.weight), s->end_mean, s->end_rstd, dout == m->dcontext, rows, C, pass->n, skip);
    for (size_t i = s->n_layers; i-- > 0;) {
        const Layer *l = &s->layer[i];
        if (l->kind == BLOCK_FEED)
            feed_block_backward(m, l, R);
        else
            attention_block_backward(m, s, l, dcontext, pass);
        norm_backward(on, m->dx, m->dx_operand, grad_of(m, l->norm.weight), grad_of(m, l->norm.bias), m->dnormed,
                      l->act.x, value_of(m, l->norm.weight), l->act.mean, l->act.rstd, 0, R, C, pass->n, 0);
        params_ready(&m->params, first_row(l));
    }
    embed_backward(on, grad_of(m, s->token_emb), grad_of(m, s->pos_emb), m->dx, s->ids, pass->B, pass->n, C,
                   m->params.row[s->token_emb].dim[0]);
}

/* ---- Head ---- */

static Variant variant_of(const Transformer *m) {
    const NetConfig *c = &m->config;
    Variant v = {is_scaled(c) ? value_of(m, m->log_scalors) : NULL, c->variant == X_FINE_SCALED, is_residual(c)};
    v.scales = (size_t)c->n_scales, v.length = c->dec_max_seq_len;
    v.ids = m->encoder.ids, v.prompt = prompt_length(c), v.N = m->now_N;
    memcpy(v.alpha, m->alpha, sizeof v.alpha);
    return v;
}

/* The decoder's output (B,n,C) to m->logits (B,n,K); while decoding, B = 1 */
static void head_forward(Transformer *m, size_t B, size_t n, const Position *position) {
    const Variant v = variant_of(m);
    project(m, &m->head, m->raw, m->decoder.out, m->head.bias, NULL, 1, B * n);
    if (v.log_scalors || v.residual)
        variant_forward(&m->on, m->logits, m->raw, &v, position, B, n, m->config.dec_num_tokens);
}

/* ---- Both networks ---- */

/* Up to the decoder's output */
static void network_forward(Transformer *m) {
    Stack *e = &m->encoder, *d = &m->decoder;
    const size_t B = m->now_B, N = m->now_N, P = prompt_length(&m->config);
    if (m->config.kind == NET_X) {
        const Pass encode = whole_pass(e, B, P + N, NULL, 0), decode = whole_pass(d, B, N, e->out, P + N);
        stack_forward(m, e, &encode, 0);
        stack_forward(m, d, &decode, 0);
    } else {
        const Pass pass = whole_pass(d, B, P + N - 1, NULL, 0);
        stack_forward(m, d, &pass, P - 1);
    }
}

/* From the gradient of the raw logits to all parameters */
static void network_backward(Transformer *m, const real *draw) {
    Stack *e = &m->encoder, *d = &m->decoder;
    const size_t B = m->now_B, N = m->now_N, P = prompt_length(&m->config);
    real *dout = m->dnormed; /* (B*N,C): the final norm reads it before the last block writes there */
    project_backward(m, &m->head, dout, draw, d->out, 0, 0, B * N);
    if (m->config.kind == NET_X) {
        const Pass encode = whole_pass(e, B, P + N, NULL, 0), decode = whole_pass(d, B, N, e->out, P + N);
        compute_zero(&m->on, m->dcontext, B * (P + N) * e->C * f32_bytes(&m->on));
        stack_backward(m, d, dout, m->dcontext, &decode, 0);
        stack_backward(m, e, m->dcontext, NULL, &encode, 0);
    } else {
        const Pass pass = whole_pass(d, B, P + N - 1, NULL, 0);
        stack_backward(m, d, dout, NULL, &pass, P - 1);
    }
}

/* ---- What the networks read ---- */

/* Every ids[i] must be in lo..end-1; an error names `what`. */
static Err check_ids(const char *what, const int32_t *ids, size_t n, int32_t lo, size_t end) {
    if (!ids) return err("transformer: no %s given", what);
    for (size_t i = 0; i < n; i++)
        if (ids[i] < lo || (size_t)ids[i] >= end)
            return err("transformer: %s[%zu] is %d, expected %d..%zu", what, i, (int)ids[i], (int)lo, end - 1);
    return OK;
}

static Err check_batch(const Transformer *m, const int32_t *x_t, const int32_t *t, const int32_t *label, size_t B,
                       size_t N) {
    const NetConfig *c = &m->config;
    if (!m->B) return err("transformer: nothing is planned");
    if (m->format != m->params.format) return err("transformer: planned for matrices in another format");
    if (m->params.n == 0 || !m->params.row[0].value) return err("transformer: the parameters have no values yet");
    if (B < 1 || B > m->B || N < 1 || N > m->N)
        return err("transformer: a batch of %zu x %zu tokens, planned for up to %zu x %zu", B, N, m->B, m->N);
    TRY(check_ids("t", t, B, 1, (size_t)c->n_scales + 1));
    if (c->has_class) TRY(check_ids("label", label, B, 0, prompt_tokens(c)));
    if (c->kind == NET_X) TRY(check_ids("x_t", x_t, B * N, 0, c->dec_num_tokens));
    return compute_status(&m->on);
}

/* s reads [t, (label,) tokens[b,0..n-1]] of B batch rows; rows of tokens are `stride` apart. */
static void read_prompted(Transformer *m, Stack *s, const int32_t *t, const int32_t *label, const int32_t *tokens,
                          size_t stride, size_t B, size_t n) {
    const size_t P = prompt_length(&m->config);
    for (size_t b = 0; b < B; b++) {
        int32_t *row = s->host_ids + b * (P + n);
        row[0] = t[b];
        if (m->config.has_class) row[1] = label[b];
        if (n) memcpy(row + P, tokens + b * stride, n * sizeof *row);
    }
    if (s->ids != s->host_ids) compute_put(&m->on, s->ids, s->host_ids, B * (P + n) * sizeof *s->ids);
}

/* s reads [sos, x[b,0..N-2]]; sos is token 0 (SPEC 1.10). */
static void read_shifted(Transformer *m, Stack *s, const int32_t *x, size_t B, size_t N) {
    for (size_t b = 0; b < B; b++) {
        s->host_ids[b * N] = 0;
        memcpy(s->host_ids + b * N + 1, x + b * N, (N - 1) * sizeof *x);
    }
    if (s->ids != s->host_ids) compute_put(&m->on, s->ids, s->host_ids, B * N * sizeof *s->ids);
}

/* Checks the batch and lays out what the networks read. */
static Err take_batch(Transformer *m, const int32_t *x, const int32_t *x_t, const int32_t *t, const int32_t *label,
                      size_t B, size_t N) {
    m->state = IDLE;
    TRY(check_batch(m, x_t, t, label, B, N));
    TRY(check_ids("x", x, B * N, 0, m->config.dec_num_tokens));
    m->now_B = B, m->now_N = N;
    if (m->config.kind == NET_X) {
        read_prompted(m, &m->encoder, t, label, x_t, N, B, N);
        read_shifted(m, &m->decoder, x, B, N);
    } else
        read_prompted(m, &m->decoder, t, label, x, N, B, N - 1);
    return OK;
}

/* ================================ 3. Token by token ================================
 *
 * Decoding keeps the keys and values of earlier positions (a KV cache). A pass feeds new positions of any batch rows
 * through the same stack as training. Their keys and values join the kept ones before a layer's attention reads
 * them, so that a position sees those in front of it in the same pass. With one position a row, a pass does only two
 * operations for each number it reads: memory limits its speed. Further positions are cheap, and worth feeding whenever
 * tokens in front of them are known or likely: a guess that turns out wrong is taken back by feeding it once more.
 *
 * Promise on bits: the logits of a position are those of feeding one position at a time, whatever is fed beside it. */

/* The n positions of m->position, whose tokens are in decoder.ids, through the decoder */
static void feed_positions(Transformer *m, size_t n) {
    Stack *d = &m->decoder;
    const size_t T_context = m->config.kind == NET_X ? prompt_length(&m->config) + m->now_N : 0;
    const Pass pass = {.B = 1, .n = n, .position = m->position, .stride = d->T, .T_context = T_context};
    stack_forward(m, d, &pass, 0);
}

/* Keys and values of the context, for every cross-attention layer */
static void keep_context(Transformer *m, size_t B, size_t positions) {
    const Pass pass = {.B = B, .T_context = positions};
    for (size_t i = 0; i < m->decoder.n_layers; i++) {
        Layer *l = &m->decoder.layer[i];
        if (l->kind != BLOCK_CROSS) continue;
        const Attention a = attention_of(m, &m->decoder, l, &pass);
        project_keys(m, l, &a, m->encoder.out, positions, 1);
    }
}

/* Entry r of the next pass: position i of row b, behind the token prev. Position 0 of a GPT is the end of its prompt,
 * fed a second time to the same effect. */
static void set_position(Transformer *m, size_t r, size_t b, size_t i, int32_t prev) {
    const size_t pos = m->config.kind == NET_X ? i : prompt_length(&m->config) - 1 + i;
    m->position[r] = (Position){b, pos, pos + 1};
    m->decoder.ids[r] = i > 0 ? prev : m->first[b];
    m->fed[b] = i + 1;
}

/* ---- The loop that draws tokens on a GPU (kernels/decode.cu) sees arrays, not a network ---- */

static Projection projection_of(const Transformer *m, const Linear *l) {
    return l->in ? (Projection){value_of(m, l->weight), value_of(m, l->bias), l->in, l->out} : (Projection){0};
}

static void describe_decoder(Transformer *m) {
    const Stack *d = &m->decoder;
    const NetConfig *c = &m->config;
    Decoder *g = &m->gpu;
    for (size_t i = 0; i < d->n_layers; i++) {
        const Layer *l = &d->layer[i];
        DecoderLayer *to = &m->gpu_layer[i];
        to->kind = l->kind, to->key = (real *)l->kept_key, to->value = (real *)l->kept_value;
        to->norm_weight = value_of(m, l->norm.weight), to->norm_bias = value_of(m, l->norm.bias);
        to->q = projection_of(m, &l->q), to->k = projection_of(m, &l->k), to->v = projection_of(m, &l->v);
        to->out = projection_of(m, &l->out), to->up = projection_of(m, &l->up), to->down = projection_of(m, &l->down);
    }
    g->layer = m->gpu_layer, g->B = m->now_B, g->N = m->now_N, g->T = d->T; /* more: want_on_gpu */
    g->T_context = c->kind == NET_X ? prompt_length(c) + m->now_N : 0;
    g->prompt = c->kind == NET_X ? 0 : prompt_length(c) - 1, g->prompted = c->kind == NET_GPT;
    g->token = value_of(m, d->token_emb), g->position = value_of(m, d->pos_emb);
    g->norm_weight = value_of(m, d->norm.weight), g->norm_bias = value_of(m, d->norm.bias);
    g->head = projection_of(m, &m->head), g->variant = variant_of(m), g->ids = d->ids;
    g->x = m->shared.x, g->mean = m->shared.mean, g->rstd = m->shared.rstd, g->normed = m->shared.normed;
    g->query = m->shared.query, g->y = m->shared.y, g->g = m->shared.g, g->last = d->out;
    g->raw = m->raw, g->logits = m->logits;
}

/* On a GPU positions come in order, and nothing is taken back. */
static Err step_on_gpu(Transformer *m, const int32_t *prev, size_t i) {
    Stack *d = &m->decoder;
    if (i != m->fed[0]) return err("transformer: decoding step %zu on the GPU, expected %zu", i, m->fed[0]);
    for (size_t b = 0; b < m->now_B; b++) d->host_ids[b] = i > 0 ? prev[b] : 0, m->fed[b] = i + 1;
    if (m->config.kind == NET_X || i > 0) { /* else the prompt's end has given the logits */
        compute_put(&m->on, d->ids, d->host_ids, m->now_B * sizeof *d->ids);
        TRY(m->on.ops->decode_step(m->on.device, &m->gpu, m->gpu.prompt + i));
    }
    TRY(compute_get(&m->on, m->host_logits, m->logits, m->now_B * m->config.dec_num_tokens * sizeof *m->logits));
    return compute_status(&m->on);
}

/* ================================ 4. Public ================================ */

const NetConfig *transformer_config(const Transformer *m) {
    return &m->config;
}
Params *transformer_params(Transformer *m) {
    return &m->params;
}

void transformer_set_alphas(Transformer *m, const float *alpha) {
    memcpy(m->alpha, alpha, ((size_t)m->config.n_scales + 1) * sizeof *alpha);
}

Err transformer_use_cuda(Transformer *m, Precision precision) {
    return use_cuda(&m->params, precision);
}

int transformer_on_cuda(const Transformer *m) {
    return m->params.device != NULL;
}

/* ---- Plan: which arrays there are. Where they lie is base/plan.c's business. ---- */

/* Both sides of a plan: where the network computes, and here */
typedef struct {
    Transformer *m;
    Plan there, host;
    size_t bytes, host_bytes;
} Arrays;

/* An array (n1,n2) for the whole of a run; f32: of what a GPU has as float */
static void want(Plan *p, void *target, size_t n1, size_t n2, size_t size) {
    plan_add(p, target, n1 > 0 && n2 > SIZE_MAX / n1 ? SIZE_MAX : n1 * n2, size, 0, PLAN_END);
}
static void want_reals(Arrays *a, real **target, size_t n1, size_t n2) {
    want(&a->there, target, n1, n2, a->m->on.unit);
}
static void want_f32(Arrays *a, real **target, size_t n1, size_t n2) {
    want(&a->there, target, n1, n2, f32_bytes(&a->m->on));
}

/* R = B*n rows, and rows of keys. A layer has either attention or a feed-forward block, what all share has both. */
static void want_activations(Arrays *a, Activations *x, const Layer *l, size_t R, size_t keys, size_t C, size_t inner,
                             size_t hidden) {
    const size_t joint = l->joint.out, k_first = l->joint.weight == l->k.weight, cross = l->kind == BLOCK_CROSS;
    const size_t q = !joint || cross ? inner : k_first ? 0 : joint, k = !joint ? inner : k_first ? joint : 0;
    want_f32(a, &x->x, R, C), want_f32(a, &x->mean, R, 1), want_f32(a, &x->rstd, R, 1);
    want_reals(a, &x->normed, R, C);
    if (inner) want_reals(a, &x->query, R, q), want_reals(a, &x->y, R, inner);
    if (inner) want_reals(a, &x->key, keys, k), want_reals(a, &x->value, keys, joint ? 0 : inner);
    if (hidden) want_reals(a, &x->g, R, hidden);
}

static void want_layer(Arrays *a, const Stack *s, Layer *l, size_t T_context) {
    Transformer *m = a->m;
    Compute *on = &m->on;
    const Pass pass = whole_pass(s, m->B, s->T, NULL, T_context);
    const Pass step = {.B = 1, .n = m->B * DECODE_BLOCK, .stride = s->T, .T_context = T_context};
    const Attention whole = attention_of(m, s, l, &pass), decoding = attention_of(m, s, l, &step);
    const size_t R = m->B * s->T;
    const int attends = l->kind != BLOCK_FEED;
    memset(&l->act, 0, sizeof l->act);
    l->joint = attends && m->train && on->device ? joint_of(m, l) : (Linear){0};
    l->kept_key = l->kept_value = NULL;
    if (attends) compute_needs(on, attention_needs(on, &whole, m->train));
    if (m->train) {
        want_activations(a, &l->act, l, R, m->B * whole.Tk, s->C, l->heads * l->D, l->up.out);
        if (attends) want(&a->there, &l->act.saved, attention_saved(on, &whole), 1, 1);
        if (!attends) want_reals(a, &l->act.dg, R, l->up.out);
    } else if (attends && s->causal) {
        if (!on->device) compute_needs(on, attention_needs(on, &decoding, 0));
        want(&a->there, &l->kept_key, kept_bytes(on, &whole), 1, 1);
        want(&a->there, &l->kept_value, kept_bytes(on, &whole), 1, 1);
    }
}

/* T_context: positions of the context of cross-attention */
static void want_stack(Arrays *a, Stack *s, size_t T_context) {
    const size_t R = a->m->B * s->T;
    want(&a->host, &s->host_ids, R, 1, sizeof *s->ids);
    if (a->m->on.device) want(&a->there, &s->ids, R, 1, sizeof *s->ids);
    for (size_t i = 0; i < s->n_layers; i++) want_layer(a, s, &s->layer[i], T_context);
    want_reals(a, &s->out, R, s->C);
    if (!a->m->train) return;
    want_f32(a, &s->x_end, R, s->C), want_f32(a, &s->end_mean, R, 1), want_f32(a, &s->end_rstd, R, 1);
}

/* What gradients need; rows: B*N positions that have logits */
static void want_gradients(Arrays *a, size_t R, size_t inner, size_t hidden, size_t rows) {
    Transformer *m = a->m;
    Compute *on = &m->on;
    const size_t C = m->config.dim, K = m->config.dec_num_tokens, joint = on->device ? 3 * inner : inner;
    want_f32(a, &m->dx, R, C), want_reals(a, &m->dnormed, R, C), want_f32(a, &m->dcontext, R, C);
    if (on->unit != f32_bytes(on)) want_reals(a, &m->dx_operand, R, C);
    if (on->device) want_reals(a, &m->draw, rows, K);
    want_reals(a, &m->dquery, R, joint), want_reals(a, &m->dkey, R, joint), want_reals(a, &m->dvalue, R, inner);
    want_reals(a, &m->dy, R, inner), want_reals(a, &m->dh, R, hidden);
    if (is_scaled(&m->config)) compute_needs(on, variant_needs(on, rows));
    if (!on->fast || !on->fast->linear_needs) return;
    compute_needs(on, on->fast->norm_needs(on, R, C));
    compute_needs(on, on->fast->linear_needs(on, R, C, max_size(hidden, max_size(K, joint))));
}

/* What a GPU has besides: the arrays of its loss, or of its decoding */
static void want_on_gpu(Arrays *a, size_t rows) {
    Transformer *m = a->m;
    Decoder *g = &m->gpu;
    want(&a->host, &m->host_logits, rows, m->config.dec_num_tokens, sizeof(real));
    want(&a->host, &m->gpu_layer, m->decoder.n_layers, sizeof *m->gpu_layer, 1);
    for (int k = 0; k < 3; k++) want(&a->there, &m->loss_ids[k], rows, 1, sizeof(int32_t));
    want(&a->there, &m->t, m->B, 1, sizeof *m->t), want(&a->there, &m->loss_sums, 2, 1, sizeof *m->loss_sums);
    compute_needs(&m->on, m->on.ops->fused_loss_needs(rows));
    g->B = m->B, g->N = m->N, g->heads = m->decoder.layer->heads, g->D = m->decoder.layer->D;
    g->prompt = prompt_length(&m->config), g->C = m->decoder.C, g->K = m->config.dec_num_tokens;
    g->n_layers = m->decoder.n_layers, g->T_context = m->encoder.n_layers ? m->encoder.T : 0;
    if (!m->train) want(&a->there, &g->work, m->on.ops->decode_needs(g), 1, 1);
}

static void want_all(Arrays *a) {
    Transformer *m = a->m;
    Stack *e = &m->encoder, *d = &m->decoder;
    Compute *on = &m->on;
    const Layer *first = e->n_layers ? e->layer : d->layer;
    const size_t B = m->B, C = d->C, K = m->config.dec_num_tokens, R = B * max_size(e->T, d->T), rows = B * m->N;
    const size_t inner = max_size(first->heads * first->D, d->layer->heads * d->layer->D), hidden = FEED_FACTOR * C;
    if (!m->train) want_activations(a, &m->shared, &(Layer){0}, R, R, C, inner, hidden);
    if (e->n_layers) want_stack(a, e, 0);
    want_stack(a, d, e->T);
    want_f32(a, &m->logits, rows, K);
    if (m->train && is_scaled(&m->config)) want_f32(a, &m->raw, rows, K);
    want(&a->host, &m->fed, B, 1, sizeof *m->fed), want(&a->host, &m->first, B, 1, sizeof *m->first);
    if (!m->train) want(&a->host, &m->position, B, DECODE_BLOCK, sizeof *m->position);
    if (m->train) want_gradients(a, R, inner, hidden, rows);
    if (on->device) want_on_gpu(a, rows);
    if (m->format != WEIGHTS_REAL && !on->device)
        compute_needs(on, on->fast->stream_needs(on, R, max_size(hidden, inner)));
    want(&a->there, &on->scratch, on->scratch_bytes, 1, 1);
}

/* Aliases: arrays that share another one's memory */
static void share_arrays(Transformer *m) {
    Stack *const stack[2] = {&m->encoder, &m->decoder};
    for (int k = 0; k < 2; k++) {
        Stack *s = stack[k];
        if (!m->on.device) s->ids = s->host_ids;
        for (size_t i = 0; i < s->n_layers; i++) {
            Layer *l = &s->layer[i];
            if (!m->train) l->act = m->shared;
            l->act.joint = side_by_side(m, l, &l->act.query, &l->act.key, &l->act.value);
        }
        if (!m->train) s->x_end = m->shared.x, s->end_mean = m->shared.mean, s->end_rstd = m->shared.rstd;
    }
    if (!(m->train && is_scaled(&m->config))) m->raw = m->logits;
    if (!m->on.device) m->draw = m->raw, m->host_logits = m->logits;
    if (m->on.unit == f32_bytes(&m->on)) m->dx_operand = m->dx;
}

/* N tokens fit the position tables: the encoder reads the prompt and N, a decoder N, a GPT all but the last. */
static Err set_lengths(Transformer *m, size_t N) {
    Stack *e = &m->encoder, *d = &m->decoder;
    const size_t P = prompt_length(&m->config);
    if (N < 1 || N > NET_LENGTH_MAX) return err("transformer: %zu tokens, expected 1..%d", N, (int)NET_LENGTH_MAX);
    e->T = m->config.kind == NET_X ? P + N : 0;
    d->T = m->config.kind == NET_X ? N : P + N - 1;
    if (e->T > e->max_T)
        return err("transformer: %zu tokens need %zu encoder positions, the table has %zu", N, e->T, e->max_T);
    if (d->T <= d->max_T) return OK;
    return err("transformer: %zu tokens need %zu decoder positions, the table has %zu", N, d->T, d->max_T);
}

static void drop_plan(Transformer *m) {
    if (m->memory) compute_free(&m->on, m->memory);
    free(m->host_memory);
    m->memory = m->host_memory = NULL;
    m->state = IDLE, m->B = 0;
}

static Err lay_out(Arrays *a, size_t B, size_t N, int train) {
    enum { BATCH_MAX = 1 << 20 };
    Transformer *m = a->m;
    drop_plan(m);
    a->there.what = a->host.what = "transformer activations";
    if (B < 1 || B > BATCH_MAX) return err("transformer: batch of %zu, expected 1..%d", B, (int)BATCH_MAX);
    TRY(set_lengths(m, N));
    m->on = compute_of(&m->params), m->format = m->params.format, m->train = train;
    TRY(compute_heads_fit(&m->on, m->decoder.layer[0].D, train));
    if (m->format != WEIGHTS_REAL && !m->on.fast) return err("transformer: packed weights need kernels/");
    m->B = B, m->N = N;
    want_all(a);
    m->B = 0; /* until the memory is there */
    if (plan_lay_out(&a->there, &a->bytes) == OK && plan_lay_out(&a->host, &a->host_bytes) == OK) return OK;
    return err("transformer: a batch of %zu x %zu tokens is too large", B, N);
}

Err transformer_plan_bytes(Transformer *m, size_t B, size_t N, int train, size_t *bytes) {
    Arrays a = {.m = m};
    const Err e = lay_out(&a, B, N, train);
    plan_free(&a.there), plan_free(&a.host);
    *bytes = a.bytes + (m->on.device ? 0 : a.host_bytes);
    return e;
}

Err transformer_plan(Transformer *m, size_t B, size_t N, int train) {
    Arrays a = {.m = m};
    Err e = lay_out(&a, B, N, train);
    if (e == OK) e = compute_alloc(&m->on, &m->memory, a.bytes, a.there.what);
    if (e == OK) e = mem_alloc(&m->host_memory, a.host_bytes, 1, a.host.what);
    if (e == OK) {
        plan_place(&a.there, m->memory), plan_place(&a.host, m->host_memory);
        share_arrays(m);
        m->B = B;
    }
    plan_free(&a.there), plan_free(&a.host);
    return e;
}

/* ---- Forward and backward ---- */

/* Row i of the logits of batch row b gives p(x_{t-1}[i] | x_{t-1}[0..i-1], x_t) = softmax(logits[b,i,:]). The product
 * over i is never formed: loss_rows takes its -log as a sum, and diffusion.c draws one factor after the other. */
Err transformer_forward(Transformer *m, const int32_t *x, const int32_t *x_t, const int32_t *t, const int32_t *label,
                        size_t B, size_t N, const real **logits) {
    TRY(take_batch(m, x, x_t, t, label, B, N));
    network_forward(m);
    head_forward(m, B, N, NULL);
    if (m->on.device)
        TRY(compute_get(&m->on, m->host_logits, m->logits, B * N * m->config.dec_num_tokens * sizeof *m->logits));
    m->state = FORWARD_DONE;
    *logits = m->host_logits;
    return compute_status(&m->on);
}

/* On a GPU dlogits take the place of logits: whatever backward reads, it does not read these. */
Err transformer_backward(Transformer *m, const real *dlogits) {
    const size_t B = m->now_B, N = m->now_N, K = m->config.dec_num_tokens;
    if (!m->train) return err("transformer: backward under a plan without training");
    if (m->state != FORWARD_DONE) return err("transformer: backward without a forward before it");
    if (!m->params.row[0].grad) return err("transformer: the parameters have no gradients planned");
    m->state = IDLE; /* raw is spent: a second backward needs a new forward */
    if (m->on.device) compute_put(&m->on, m->logits, dlogits, B * N * K * sizeof *dlogits), dlogits = m->logits;
    if (m->on.device || is_scaled(&m->config)) {
        const Variant v = variant_of(m);
        variant_backward(&m->on, m->draw, grad_of(m, m->log_scalors), dlogits, m->raw, &v, B, N, K);
        dlogits = m->draw;
    }
    network_backward(m, dlogits);
    return compute_status(&m->on);
}

/* ---- Losses ---- */

Err denoising_loss(Loss *out, const real *logits, const int32_t *target, const real *posterior, size_t R, size_t K,
                   double alpha, double weight, real *dlogits) {
    const Compute on = compute_of(NULL);
    double sums[2];
    if (R < 1 || K < 1) return err("loss: %zu rows of %zu classes, expected at least one", R, K);
    if (!(alpha >= 0 && alpha <= 1)) return err("loss: alpha is %g, expected 0..1", alpha);
    if (!posterior && alpha > 0) return err("loss: alpha is %g, but there is no posterior", alpha);
    TRY(check_ids("target", target, R, 0, K));
    loss_rows(&on, sums, dlogits, logits, target, posterior, (real)(weight * alpha / (double)R),
              (real)(weight * (1 - alpha) / (double)R), R, K);
    out->hard = sums[0] / (double)R;
    out->soft = posterior ? sums[1] / (double)R : (double)NAN;
    out->loss = alpha == 0 ? out->hard : alpha * out->soft + (1 - alpha) * out->hard;
    return OK;
}

Err transformer_loss_cuda(Transformer *m, const Schedule *s, const int32_t *x0, const int32_t *x, const int32_t *x_t,
                          const int32_t *t, const int32_t *label, size_t B, size_t N, double alpha, double weight,
                          int backward, Loss *out) {
    const size_t K = m->config.dec_num_tokens, R = B * N;
    const int32_t *const ids[3] = {x0, x, x_t};
    double sums[2];
    if (!m->params.device) return err("transformer: it is not on the GPU");
    if (backward && !m->train) return err("transformer: backward under a plan without training");
    if (backward && !m->params.row[0].grad) return err("transformer: the parameters have no gradients planned");
    if (!(alpha >= 0 && alpha <= 1)) return err("loss: alpha is %g, expected 0..1", alpha);
    TRY(take_batch(m, x, x_t, t, label, B, N));
    TRY(check_ids("x_0", x0, R, 0, K));
    TRY(check_ids("x_t", x_t, R, 0, K));
    if (s->T != m->config.n_scales) return err("loss: a schedule of %d scales, expected %d", s->T, m->config.n_scales);
    for (int k = 0; k < 3; k++) compute_put(&m->on, m->loss_ids[k], ids[k], R * sizeof *x);
    compute_put(&m->on, m->t, t, B * sizeof *t);
    network_forward(m);
    project(m, &m->head, m->raw, m->decoder.out, m->head.bias, NULL, 1, R);
    FusedLoss loss = {m->raw, NULL, NULL, m->loss_sums, m->loss_ids[0], m->loss_ids[1], m->loss_ids[2], m->t};
    loss.alpha = s->alpha, loss.alphacum = s->alphacum, loss.T = s->T, loss.variant = variant_of(m);
    loss.B = B, loss.N = N, loss.K = K;
    loss.soft_weight = (real)(weight * alpha / (double)R), loss.hard_weight = (real)(weight * (1 - alpha) / (double)R);
    if (backward) loss.draw = m->draw, loss.dlog_scalors = grad_of(m, m->log_scalors);
    TRY(m->on.ops->fused_loss(&m->on, &loss));
    if (backward) network_backward(m, m->draw);
    TRY(compute_get(&m->on, sums, m->loss_sums, sizeof sums)); /* waits: everything has been asked for by now */
    out->hard = sums[0] / (double)R, out->soft = sums[1] / (double)R;
    out->loss = alpha == 0 ? out->hard : alpha * out->soft + (1 - alpha) * out->hard;
    return compute_status(&m->on);
}

/* ---- Decoding ---- */

/* NET_X: the encoder runs, and keys and values of its output are kept for every layer that looks at it. NET_GPT: the
 * prompt is fed without any mask, as the official sampler does; for a prompt (t, class) training must have used
 * n_unmasked = 2 to see the same (SPEC 2.6). */
Err transformer_decode_begin(Transformer *m, const int32_t *x_t, const int32_t *t, const int32_t *label, size_t B,
                             size_t N) {
    const NetConfig *c = &m->config;
    const size_t P = prompt_length(c);
    m->state = IDLE;
    if (m->B && m->train) return err("transformer: decoding under a training plan, which has no caches");
    TRY(check_batch(m, x_t, t, label, B, N));
    m->now_B = B, m->now_N = N;
    memset(m->fed, 0, B * sizeof *m->fed);
    memset(m->first, 0, B * sizeof *m->first); /* sos (SPEC 1.10) */
    if (m->on.device) describe_decoder(m);
    if (c->kind == NET_X) {
        const Pass encode = whole_pass(&m->encoder, B, P + N, NULL, 0);
        read_prompted(m, &m->encoder, t, label, x_t, N, B, N);
        stack_forward(m, &m->encoder, &encode, 0);
        keep_context(m, B, P + N);
        m->state = DECODING;
    } else {
        read_prompted(m, &m->decoder, t, label, NULL, 0, B, 0);
        memcpy(m->first, c->has_class ? label : t, B * sizeof *m->first);
        m->state =
            DECODING; /* already here: project() then streams weights for the prompt as well, as for every later position */
        if (m->on.device) return m->on.ops->decode_prompt(m->on.device, &m->gpu, P);
        for (size_t r = 0; r < B * P; r++) m->position[r] = (Position){r / P, r % P, P};
        feed_positions(m, B * P);
    }
    return compute_status(&m->on);
}

static Err check_positions(const Transformer *m, const DecodePosition *at, size_t n) {
    if (m->state != DECODING) return err("transformer: a block of positions before decoding began");
    if (n < 1 || n > m->now_B * DECODE_BLOCK)
        return err("transformer: a block of %zu positions, expected 1..%zu", n, m->now_B * DECODE_BLOCK);
    for (size_t r = 0; r < n; r++) {
        const size_t b = at[r].b, i = at[r].i;
        const int same_row = r > 0 && at[r - 1].b == b;
        if (b >= m->now_B || (r > 0 && b < at[r - 1].b))
            return err("transformer: row %zu of a batch of %zu, expected rows that rise", b, m->now_B);
        if (i >= m->now_N || (same_row ? i != at[r - 1].i + 1 : i > m->fed[b]))
            return err("transformer: decoding position %zu of row %zu, expected %s%zu of %zu", i, b,
                       same_row ? "" : "0..", same_row ? at[r - 1].i + 1 : m->fed[b], m->now_N);
        if (i > 0) TRY(check_ids("previous token", &at[r].prev, 1, 0, m->config.dec_num_tokens));
    }
    return OK;
}

Err transformer_decode_block(Transformer *m, const DecodePosition *at, size_t n, const real **logits) {
    TRY(check_positions(m, at, n));
    if (m->params.device) return err("transformer: a block of positions, which the GPU's decoding does not have");
    for (size_t r = 0; r < n; r++) set_position(m, r, at[r].b, at[r].i, at[r].prev);
    feed_positions(m, n);
    head_forward(m, 1, n, m->position);
    *logits = m->logits;
    return compute_status(&m->on);
}

Err transformer_decode_step(Transformer *m, const int32_t *prev, size_t i, const real **logits) {
    if (m->state != DECODING) return err("transformer: a decoding step before decoding began");
    for (size_t b = 0; b < m->now_B; b++)
        if (i > m->fed[b] || i >= m->now_N)
            return err("transformer: decoding step %zu, expected 0..%zu of %zu", i, m->fed[b], m->now_N);
    if (i > 0) TRY(check_ids("previous token", prev, m->now_B, 0, m->config.dec_num_tokens));
    *logits = m->host_logits;
    if (m->on.device) return step_on_gpu(m, prev, i);
    for (size_t b = 0; b < m->now_B; b++) set_position(m, b, b, i, i > 0 ? prev[b] : 0);
    feed_positions(m, m->now_B);
    head_forward(m, 1, m->now_B, m->position);
    return OK;
}

Err transformer_draw_cuda(Transformer *m, const DrawOptions *o, int32_t *tokens) {
    if (!m->params.device) return err("transformer: it is not on the GPU");
    if (m->state != DECODING || m->fed[0] != 0) return err("transformer: drawing without decoding just begun");
    if (!(o->temperature >= 0)) return err("transformer: temperature %g, expected 0 or more", o->temperature);
    if (!o->known != !o->keep) return err("transformer: known tokens and their mask go together");
    if (o->guided && m->now_B % 2) return err("transformer: a batch of %zu rows, expected pairs", m->now_B);
    for (size_t i = 0; o->known && i < (o->guided ? m->now_B / 2 : m->now_B) * m->now_N; i++)
        if (o->keep[i % m->now_N]) TRY(check_ids("known token", o->known + i, 1, 0, m->config.dec_num_tokens));
    for (size_t b = 0; b < m->now_B; b++) m->fed[b] = m->now_N;
    return m->on.ops->draw(m->on.device, &m->gpu, o, tokens);
}

DecodeReads transformer_decode_reads(const Transformer *m, size_t N) {
    const double number = weight_precision(m->format) == PRECISION_BF16 ? sizeof(uint16_t) : sizeof(real); /* of keys */
    DecodeReads r = {0, 0, 0};
    for (size_t i = 0; i < m->decoder.n_layers; i++) {
        const Layer *l = &m->decoder.layer[i];
        const Linear *const linear[] = {&l->q, &l->out, &l->up, &l->down, &l->k, &l->v};
        const int cross = l->kind == BLOCK_CROSS; /* the context's keys and values are there already */
        for (size_t k = 0; k < (cross ? 4 : 6); k++) {
            if (!linear[k]->in) continue;
            const Param *p = &m->params.row[linear[k]->weight];
            r.numbers += (double)p->size;
            r.weight_bytes += (double)p->size * (double)weight_bytes(p->packed.data ? p->packed.format : WEIGHTS_REAL);
        }
        r.kept_bytes += 2 * (double)(l->heads * l->D) * (double)N * number * (cross ? 1 : 0.5);
    }
    return r;
}

/* ================================ 5. The table of parameters ================================ */

enum {
    X_HEAD = 64 /* size of a head in NET_X, whatever dim and heads are (SPEC 1.6) */
};

static const double WEIGHT_DECAY = 0.01; /* PyTorch's default (SPEC section 7) */
static const double EMBEDDING_STD = 0.02;

/* ---- Parameter table, in the order of the official state dict; initial values: SPEC section 14 ---- */

static Err add_norm(Transformer *m, Norm *norm, size_t C, const char *name) {
    double decay = m->config.kind == NET_X ? WEIGHT_DECAY : 0;
    norm->C = C;
    TRY(params_add(&m->params, &norm->weight, INIT_ONE, 0, decay, 1, &C, "%s.weight", name));
    return params_add(&m->params, &norm->bias, INIT_ZERO, 0, decay, 1, &C, "%s.bias", name);
}

static Err add_linear(Transformer *m, Linear *l, size_t in, size_t out, int bias, const char *name) {
    int x = m->config.kind == NET_X;
    size_t dim[2] = {out, in};
    double half_width = 1 / sqrt((double)in);
    l->in = in, l->out = out, l->bias = NONE;
    TRY(params_add(&m->params, &l->weight, x ? INIT_UNIFORM : INIT_NORMAL, x ? half_width : EMBEDDING_STD, WEIGHT_DECAY,
                   2, dim, "%s.weight", name));
    m->params.row[l->weight].matrix = 1;
    if (!bias) return OK;
    return params_add(&m->params, &l->bias, x ? INIT_UNIFORM : INIT_ZERO, x ? half_width : 0, x ? WEIGHT_DECAY : 0, 1,
                      dim, "%s.bias", name);
}

static Err add_feed_forward(Transformer *m, Layer *l, size_t C, const char *up, const char *down) {
    TRY(add_linear(m, &l->up, C, FEED_FACTOR * C, 1, up));
    return add_linear(m, &l->down, FEED_FACTOR * C, C, 1, down);
}

/* Layer i of attn_layers: .0 its norm, .1 its block. */
static Err add_x_layer(Transformer *m, Layer *l, size_t C, size_t heads, const char *side, size_t i) {
    char name[4][NAME_MAX_BYTES];
    size_t inner = heads * X_HEAD;
    snprintf(name[0], sizeof name[0], "%s.attn_layers.layers.%zu.0", side, i);
    TRY(add_norm(m, &l->norm, C, name[0]));
    if (l->kind == BLOCK_FEED) {
        snprintf(name[0], sizeof name[0], "%s.attn_layers.layers.%zu.1.net.0.0", side, i);
        snprintf(name[1], sizeof name[1], "%s.attn_layers.layers.%zu.1.net.2", side, i);
        return add_feed_forward(m, l, C, name[0], name[1]);
    }
    static const char *const part[4] = {"to_q", "to_k", "to_v", "to_out"};
    for (int k = 0; k < 4; k++) snprintf(name[k], sizeof name[k], "%s.attn_layers.layers.%zu.1.%s", side, i, part[k]);
    l->heads = heads, l->D = X_HEAD;
    TRY(add_linear(m, &l->q, C, inner, 0, name[0]));
    TRY(add_linear(m, &l->k, C, inner, 0, name[1]));
    TRY(add_linear(m, &l->v, C, inner, 0, name[2]));
    return add_linear(m, &l->out, inner, C, 1, name[3]);
}

/* shared_emb: a row to embed tokens with, or NONE for an own table. logits: the Linear behind the final norm. */
static Err add_x_stack(Transformer *m, Stack *s, const char *side, size_t tokens, size_t length, size_t heads,
                       size_t shared_emb, Linear *logits) {
    char name[NAME_MAX_BYTES];
    size_t C = m->config.dim, dim[2] = {tokens, C}, pos_dim[2] = {length, C};
    s->C = C, s->max_T = length, s->token_emb = shared_emb;
    if (shared_emb == NONE)
        TRY(params_add(&m->params, &s->token_emb, INIT_NORMAL, EMBEDDING_STD, WEIGHT_DECAY, 2, dim,
                       "%s.token_emb.weight", side));
    TRY(params_add(&m->params, &s->pos_emb, INIT_NORMAL, EMBEDDING_STD, WEIGHT_DECAY, 2, pos_dim,
                   "%s.pos_emb.emb.weight", side));
    for (size_t i = 0; i < s->n_layers; i++) TRY(add_x_layer(m, &s->layer[i], C, heads, side, i));
    snprintf(name, sizeof name, "%s.norm", side);
    TRY(add_norm(m, &s->norm, C, name));
    snprintf(name, sizeof name, "%s.to_logits", side);
    return add_linear(m, logits, C, tokens, 1, name);
}

static Err build_x(Transformer *m) {
    const NetConfig *c = &m->config;
    size_t dim[2] = {(size_t)c->n_scales, c->dec_max_seq_len};
    if (c->variant != X_PLAIN) {
        TRY(params_add(&m->params, &m->log_scalors, INIT_ZERO, 0, WEIGHT_DECAY, c->variant == X_FINE_SCALED ? 2 : 1,
                       dim, "log_scalors"));
        m->params.row[m->log_scalors].untrained = !is_scaled(c);
    }
    Linear unused; /* encoder.to_logits is in every official file and takes part in nothing */
    TRY(add_x_stack(m, &m->encoder, "encoder", c->enc_num_tokens, c->enc_max_seq_len, c->enc_heads, NONE, &unused));
    m->params.row[unused.weight].untrained = m->params.row[unused.bias].untrained = 1;
    m->decoder.causal = 1;
    return add_x_stack(m, &m->decoder, "decoder", c->dec_num_tokens, c->dec_max_seq_len, c->dec_heads,
                       c->tie_token_emb ? m->encoder.token_emb : NONE, &m->head);
}

static Err add_gpt_block(Transformer *m, Layer *attention, Layer *feed, size_t i) {
    static const char *const part[8] = {"ln1",        "ln2",       "attn.key", "attn.query",
                                        "attn.value", "attn.proj", "mlp.0",    "mlp.2"};
    char name[8][NAME_MAX_BYTES];
    size_t C = m->config.dim;
    for (int k = 0; k < 8; k++) snprintf(name[k], sizeof name[k], "blocks.%zu.%s", i, part[k]);
    attention->heads = m->config.dec_heads, attention->D = C / m->config.dec_heads;
    TRY(add_norm(m, &attention->norm, C, name[0]));
    TRY(add_norm(m, &feed->norm, C, name[1]));
    TRY(add_linear(m, &attention->k, C, C, 1, name[2]));
    TRY(add_linear(m, &attention->q, C, C, 1, name[3]));
    TRY(add_linear(m, &attention->v, C, C, 1, name[4]));
    TRY(add_linear(m, &attention->out, C, C, 1, name[5]));
    return add_feed_forward(m, feed, C, name[6], name[7]);
}

static Err build_gpt(Transformer *m) {
    const NetConfig *c = &m->config;
    Stack *s = &m->decoder;
    size_t pos_dim[3] = {1, c->dec_max_seq_len, c->dim}, dim[2] = {c->input_vocab_size, c->dim};
    s->C = c->dim, s->max_T = c->dec_max_seq_len, s->causal = 1, s->unmasked = c->n_unmasked;
    TRY(params_add(&m->params, &s->pos_emb, INIT_ZERO, 0, 0, 3, pos_dim, "pos_emb"));
    TRY(params_add(&m->params, &s->token_emb, INIT_NORMAL, EMBEDDING_STD, 0, 2, dim, "tok_emb.weight"));
    for (size_t i = 0; i < c->dec_depth; i++) TRY(add_gpt_block(m, &s->layer[2 * i], &s->layer[2 * i + 1], i));
    TRY(add_norm(m, &s->norm, c->dim, "ln_f"));
    return add_linear(m, &m->head, c->dim, c->dec_num_tokens, 0, "head");
}

/* depth times the blocks of `order`, e.g. self, cross, feed. */
static Err stack_create(Stack *s, size_t depth, const BlockKind *order, size_t per_depth) {
    s->n_layers = depth * per_depth;
    TRY(mem_alloc(&s->layer, s->n_layers, sizeof(Layer), "layers"));
    for (size_t i = 0; i < s->n_layers; i++) s->layer[i].kind = order[i % per_depth];
    return OK;
}

static Err build(Transformer *m) {
    static const BlockKind two[2] = {BLOCK_SELF, BLOCK_FEED}, three[3] = {BLOCK_SELF, BLOCK_CROSS, BLOCK_FEED};
    m->log_scalors = NONE;
    if (m->config.kind == NET_GPT) {
        m->config.variant = X_PLAIN;
        TRY(stack_create(&m->decoder, m->config.dec_depth, two, 2));
        return build_gpt(m);
    }
    TRY(stack_create(&m->encoder, m->config.enc_depth, two, 2));
    TRY(stack_create(&m->decoder, m->config.dec_depth, three, 3));
    return build_x(m);
}

Err transformer_create(Transformer **out, const NetConfig *c) {
    *out = NULL;
    TRY(net_config_check(c));
    Transformer *m;
    TRY(mem_alloc(&m, 1, sizeof *m, "transformer"));
    m->config = *c;
    if (build(m) != OK) {
        transformer_free(m);
        return FAILED;
    }
    *out = m;
    return OK;
}

void transformer_free(Transformer *m) {
    if (!m) return;
    drop_plan(m);
    params_free(&m->params);
    free(m->encoder.layer);
    free(m->decoder.layer);
    free(m);
}

/* ---- What a transition's file holds ---- */

Err transition_tensors(TensorList *list, Transformer *net, char which, const Schedule *s, Dtype store, int compact) {
    static const int64_t sos = 0;
    size_t one = 1, rows = (size_t)s->T + 1;
    TRY(tensor_list_params(list, transformer_params(net), which, "transformer.", store));
    TRY(tensor_list_add(list, "sos_token", DT_I64, 1, &one, &sos, 0));
    TRY(tensor_list_add(list, "alphats", DT_F32, 1, &rows, s->alpha, 0));
    TRY(tensor_list_add(list, "alphacum", DT_F32, 1, &rows, s->alphacum, 0));
    return compact ? OK : net_derived_tensors(list, transformer_config(net));
}

/* ---- The plain loops, for tests, which compare each with its fellows ---- */

/* clang-format off */
extern const Layers transformer_layers;
const Layers transformer_layers = {
    .embed_forward = embed_forward, .embed_backward = embed_backward, .norm_forward = norm_forward,
    .norm_backward = norm_backward, .linear_forward = linear_forward, .linear_backward = linear_backward,
    .gelu_forward = gelu_forward, .gelu_backward = gelu_backward, .attention_forward = attention_forward,
    .attention_backward = attention_backward, .variant_forward = variant_forward, .variant_backward = variant_backward,
    .denoising_loss = loss_rows, .kept_bytes = kept_bytes, .keep_positions = keep_positions,
    .attention_from_kept = attention_from_kept,
};
/* clang-format on */

#else /* ================================ 6. On a GPU ================================ */

/* nvcc compiles what follows, with floatX = float and with floatX = bf16. A kernel is what one thread does; LAUNCH
 * starts as many as there are numbers. This is the shortest; kernels/layers.cu and attention.cu have the others. */
#include "kernels/runtime.cu"

/* A block per position; *at (NULL: 0) is where the n positions begin. */
static __global__ void embed_forward_kernel(float *x, const int32_t *ids, const float *token, const float *position,
                                            size_t n, const int *at, size_t C) {
    const size_t r = blockIdx.x, i = (at ? (size_t)*at : 0) + r % n;
    const float *t = token + (size_t)ids[r] * C, *p = position + i * C;
    for (size_t c = threadIdx.x; c < C; c += blockDim.x) x[r * C + c] = t[c] + p[c];
}

#include "kernels/device.cu"
#endif
