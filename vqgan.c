/* vqgan.c - the first stage: pictures <-> tokens (Esser et al. 2021, "Taming Transformers"; SPEC section 8).
 *
 * An encoder E turns a picture x (3,H,W) into latents z = E(x) (D,h,w), 8 or 16 times smaller along each side. Each
 * latent z_i is replaced by the nearest entry e_k of a codebook of K entries, and k is its token:
 *
 *     k_i = argmin_k |z_i - e_k|^2        xrec = decoder(e_{k_1}, e_{k_2}, ...)
 *
 * ImageBART's Markov chain lives on these tokens. The decoder turns them back into a picture. All three are trained
 * together. argmin has no derivative, so backward pretends that the decoder had read z (straight through), and two
 * terms pull latents and entries together, sg meaning "no gradient through here":
 *
 *     loss = |x - xrec| + |z - sg(e)|^2 + beta |sg(z) - e|^2        (+ LPIPS + GAN loss: training/)
 *
 * (The paper has beta with the other term; the official code has it here by default: `legacy`.)
 *
 * In the order of this file: every layer as its plain loop, backward beneath forward; the network as a list of layers;
 * the walk along that list, forward and backward; what the rest of the program calls, in the order of use; memory.
 *
 * A layer's loop is its definition. Its first line hands over to a faster way of computing the same, if there is one
 * (base/compute.h): on a CPU kernels/conv.c and norm.c, on a GPU kernels/conv.cu and vqgan.cu. Values are (B,C,h,w).
 *
 * Read next: data.c, then train.c, the loop that trains both stages. */

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/plan.h"
#include "imagebart.h"

/* ---- Convolution, with bias ----
 *
 *     y[b,m,i,j] = bias[m] + add[b,m,i,j] + sum over c,k,l of w[m,c,k,l] x[b,c,seen(i,k),seen(j,l)]
 *
 *     x    (B,C,h,w)   w (M,C,3,3), CONV1 (M,C,1,1)   bias (M)
 *     y    (B,M,h,w), CONV_DOWN (B,M,h/2,w/2), CONV_UP (B,M,2h,2w)
 *     add  as y, or NULL
 *
 * seen(i,k) is the row of x that row i of y reads through row k of the kernel, and the same for columns. Outside the
 * picture x counts as 0. Below, two indices are often one: bm = b*M + m, ij = i*W + j, kl = k*side + l. */

/* n: rows of x. -1: outside. */
static long seen(ConvKind kind, size_t i, size_t k, size_t n) {
    switch (kind) {
    case CONV1: return (long)i;
    case CONV_DOWN: return 2 * i + k < n ? (long)(2 * i + k) : -1;
    case CONV_UP: return i + k < 1 || i + k > 2 * n ? -1 : (long)(i + k - 1) / 2; /* of the doubled picture */
    default: return i + k < 1 || i + k > n ? -1 : (long)(i + k - 1);
    }
}

void conv_forward(const Compute *on, real *y, const real *x, const real *w, const real *bias, const real *add,
                  const Conv *c) {
    if (on->fast) return on->fast->conv_forward(on, y, x, w, bias, add, c);
    const size_t side = c->kind == CONV1 ? 1 : 3, W = conv_width(c), HW = conv_height(c) * W;
    for (size_t bm = 0; bm < c->B * c->M; bm++, y += HW) {
        for (size_t ij = 0; ij < HW; ij++) y[ij] = bias[bm % c->M] + (add ? add[bm * HW + ij] : 0);
        for (size_t ci = 0; ci < c->C; ci++)
            for (size_t kl = 0; kl < side * side; kl++) {
                const real weight = w[(bm % c->M * c->C + ci) * side * side + kl];
                const real *plane = x + (bm / c->M * c->C + ci) * c->h * c->w;
                for (size_t ij = 0; ij < HW; ij++) {
                    const long u = seen(c->kind, ij / W, kl / side, c->h), v = seen(c->kind, ij % W, kl % side, c->w);
                    if (u >= 0 && v >= 0) y[ij] += weight * plane[(size_t)u * c->w + (size_t)v];
                }
            }
    }
}

/* Every y[b,m,i,j] that reads x[b,c,u,v] through w[m,c,k,l] hands its gradient on to both:
 *     dx[b,c,u,v] += w[m,c,k,l] dy[b,m,i,j]     dw[m,c,k,l] += x[b,c,u,v] dy[b,m,i,j]     db[m] += dy[b,m,i,j]
 * dx begins as it is if accumulate, else as 0; NULL: not wanted. dw and db both NULL: not wanted, and x is not read. */
void conv_backward(const Compute *on, real *dx, real *dw, real *db, const real *dy, const real *x, const real *w,
                   int accumulate, const Conv *c) {
    if (on->fast) return on->fast->conv_backward(on, dx, dw, db, dy, x, w, accumulate, c);
    const size_t side = c->kind == CONV1 ? 1 : 3, W = conv_width(c), HW = conv_height(c) * W;
    if (dx && !accumulate) memset(dx, 0, c->B * c->C * c->h * c->w * sizeof *dx);
    for (size_t bm = 0; bm < c->B * c->M; bm++, dy += HW) {
        for (size_t ij = 0; db && ij < HW; ij++) db[bm % c->M] += dy[ij];
        for (size_t ci = 0; ci < c->C; ci++)
            for (size_t kl = 0; kl < side * side; kl++) {
                const size_t at_w = (bm % c->M * c->C + ci) * side * side + kl;
                const size_t plane = (bm / c->M * c->C + ci) * c->h * c->w;
                for (size_t ij = 0; ij < HW; ij++) {
                    const long u = seen(c->kind, ij / W, kl / side, c->h), v = seen(c->kind, ij % W, kl % side, c->w);
                    if (u < 0 || v < 0) continue;
                    const size_t at_x = plane + (size_t)u * c->w + (size_t)v;
                    if (dx) dx[at_x] += w[at_w] * dy[ij];
                    if (dw) dw[at_w] += x[at_x] * dy[ij];
                }
            }
    }
}

/* ---- Halving and doubling without weights, where settings ask for that (resamp_with_conv false) ----
 *
 *     halve    y[c,i,j] = mean of x[c,2i..2i+1,2j..2j+1]      dx[c,i,j] += dy[c,i/2,j/2] / 4
 *     double   y[c,i,j] = x[c,i/2,j/2]                        dx[c,i,j] += sum of dy[c,2i..2i+1,2j..2j+1]
 *
 * Each one's backward is the other's forward, but for a factor. c: planes; h and w: sides of the smaller; H and W: of the
 * larger, twice that or one more, which nobody reads. */
static void shrink(real *small, const real *large, double factor, int accumulate, size_t c, size_t h, size_t w,
                   size_t H, size_t W) {
    for (size_t i = 0; i < c * h; i++)
        for (size_t j = 0; j < w; j++) {
            const real *x = large + (i / h * H + i % h * 2) * W + 2 * j;
            const double sum = (double)x[0] + (double)x[1] + (double)x[W] + (double)x[W + 1];
            small[i * w + j] = (real)((accumulate ? (double)small[i * w + j] : 0) + factor * sum);
        }
}

static void grow(real *large, const real *small, double factor, int accumulate, size_t c, size_t h, size_t w, size_t H,
                 size_t W) {
    for (size_t i = 0; i < c * H; i++)
        for (size_t j = 0; j < W; j++) {
            const size_t u = i % H / 2, v = j / 2;
            const double x = u < h && v < w ? factor * (double)small[(i / H * h + u) * w + v] : 0;
            large[i * W + j] = (real)((accumulate ? (double)large[i * W + j] : 0) + x);
        }
}

/* ---- Group norm, with or without swish ----
 *
 * The C channels form 32 groups of neighbours. With the mean and the variance of a group's numbers in a picture:
 *
 *     xhat = (x - mean) rstd      rstd = 1 / sqrt(variance + 1e-6)      t = gamma xhat + beta
 *     y = swish(t) = t sigmoid(t), or y = t
 *
 *     x, y  (B,C,hw)   gamma, beta (C)   kept (B,32,2): mean and rstd, for backward */

static double sigmoid(double t) {
    return 1 / (1 + exp(-t));
}

void group_norm_forward(const Compute *on, real *y, real *kept, const real *x, const real *gamma, const real *beta,
                        const GroupNorm *n) {
    if (on->fast) return on->fast->group_norm_forward(on, y, kept, x, gamma, beta, n);
    const size_t size = n->C / NORM_GROUPS * n->hw; /* numbers in a group */
    for (size_t g = 0; g < n->B * NORM_GROUPS; g++, x += size, y += size, kept += 2) {
        double mean = 0, variance = 0;
        for (size_t i = 0; i < size; i++) mean += (double)x[i] / (double)size;
        for (size_t i = 0; i < size; i++) variance += ((double)x[i] - mean) * ((double)x[i] - mean) / (double)size;
        const double rstd = 1 / sqrt(variance + 1e-6);
        kept[0] = (real)mean, kept[1] = (real)rstd;
        for (size_t i = 0; i < size; i++) {
            const size_t c = (g * size + i) / n->hw % n->C;
            const double t = (double)gamma[c] * ((double)x[i] - mean) * rstd + (double)beta[c];
            y[i] = (real)(n->swish ? t * sigmoid(t) : t);
        }
    }
}

/* swish'(t) = s (1 + t (1 - s)), s = sigmoid(t). With d = dL/dt = dy swish'(t), sums and means over a group:
 *
 *     dgamma[c] += sum d xhat      dbeta[c] += sum d
 *     dx = or += rstd (gamma d - mean(gamma d) - xhat mean(gamma d xhat))
 *
 * because every x of a group moves its mean and its variance. dy is overwritten with d. */
void group_norm_backward(const Compute *on, real *dx, real *dgamma, real *dbeta, real *dy, const real *x,
                         const real *gamma, const real *beta, const real *kept, int accumulate, const GroupNorm *n) {
    if (on->fast) return on->fast->group_norm_backward(on, dx, dgamma, dbeta, dy, x, gamma, beta, kept, accumulate, n);
    const size_t size = n->C / NORM_GROUPS * n->hw;
    for (size_t g = 0; g < n->B * NORM_GROUPS; g++, x += size, dy += size, dx += size, kept += 2) {
        const double mean = (double)kept[0], rstd = (double)kept[1];
        double mean_d = 0, mean_dx = 0; /* of gamma d, of gamma d xhat */
        for (size_t i = 0; i < size; i++) {
            const size_t c = (g * size + i) / n->hw % n->C;
            const double xhat = ((double)x[i] - mean) * rstd, t = (double)gamma[c] * xhat + (double)beta[c];
            const double d = (double)dy[i] * (n->swish ? sigmoid(t) * (1 + t * (1 - sigmoid(t))) : 1);
            dgamma[c] += (real)(d * xhat), dbeta[c] += (real)d;
            mean_d += (double)gamma[c] * d / (double)size, mean_dx += (double)gamma[c] * d * xhat / (double)size;
            dy[i] = (real)d;
        }
        for (size_t i = 0; i < size; i++) {
            const double xhat = ((double)x[i] - mean) * rstd;
            const double scaled = (double)gamma[(g * size + i) / n->hw % n->C] * (double)dy[i];
            dx[i] = (real)((accumulate ? (double)dx[i] : 0) + rstd * (scaled - mean_d - xhat * mean_dx));
        }
    }
}

/* ---- Attention of the N pixels of a picture to each other, one head ----
 *
 *     p[i,:] = softmax over j of q[:,i] . k[:,j] / sqrt(C)        y[:,i] = sum_j p[i,j] v[:,j]
 *
 *     q, k, v, y  (B,C,N)   p (B,N,N), for backward */
void picture_attention_forward(const Compute *on, real *y, real *p, const real *q, const real *k, const real *v,
                               size_t B, size_t C, size_t N) {
    if (on->fast) return on->fast->picture_attention_forward(on, y, p, q, k, v, B, C, N);
    for (size_t b = 0; b < B; b++, q += C * N, k += C * N, v += C * N, y += C * N)
        for (size_t i = 0; i < N; i++, p += N) {
            double largest = -HUGE_VAL, sum = 0;
            for (size_t j = 0; j < N; j++) {
                double score = 0;
                for (size_t c = 0; c < C; c++) score += (double)q[c * N + i] * (double)k[c * N + j] / sqrt((double)C);
                p[j] = (real)score;
                largest = fmax(largest, score);
            }
            for (size_t j = 0; j < N; j++) sum += exp((double)p[j] - largest);
            for (size_t j = 0; j < N; j++) p[j] = (real)(exp((double)p[j] - largest) / sum);
            for (size_t c = 0; c < C; c++) {
                double s = 0;
                for (size_t j = 0; j < N; j++) s += (double)p[j] * (double)v[c * N + j];
                y[c * N + i] = (real)s;
            }
        }
}

/* dp[i,j] = dy[:,i] . v[:,j]      ds[i,j] = p[i,j] (dp[i,j] - sum_j' p[i,j'] dp[i,j']) / sqrt(C)      (softmax)
 * dv[:,j] += p[i,j] dy[:,i]       dq[:,i] += ds[i,j] k[:,j]       dk[:,j] += ds[i,j] q[:,i]
 * dq, dk, dv begin with what they are where accumulate[0], [1], [2] say so, else with 0. */
void picture_attention_backward(const Compute *on, real *dq, real *dk, real *dv, const real *dy, const real *q,
                                const real *k, const real *v, const real *p, const int accumulate[3], size_t B,
                                size_t C, size_t N) {
    if (on->fast) return on->fast->picture_attention_backward(on, dq, dk, dv, dy, q, k, v, p, accumulate, B, C, N);
    real *const d[3] = {dq, dk, dv};
    for (int i = 0; i < 3; i++)
        if (!accumulate[i]) memset(d[i], 0, B * C * N * sizeof(real));
    for (size_t b = 0; b < B; b++)
        for (size_t i = 0; i < N; i++) {
            const real *const row = p + (b * N + i) * N;
            double mean = 0;
            for (size_t j = 0; j < N; j++)
                for (size_t c = b * C; c < (b + 1) * C; c++)
                    mean += (double)row[j] * (double)dy[c * N + i] * (double)v[c * N + j];
            for (size_t j = 0; j < N; j++) {
                double dp = 0;
                for (size_t c = b * C; c < (b + 1) * C; c++) dp += (double)dy[c * N + i] * (double)v[c * N + j];
                const real ds = (real)((double)row[j] * (dp - mean) / sqrt((double)C));
                for (size_t c = b * C; c < (b + 1) * C; c++) {
                    dv[c * N + j] += row[j] * dy[c * N + i];
                    dq[c * N + i] += ds * k[c * N + j];
                    dk[c * N + j] += ds * q[c * N + i];
                }
            }
        }
}

/* ---- Vector quantiser ----
 *
 *     code[b,i] = argmin_k |z[b,:,i] - book[k,:]|^2, the first of equals
 *
 *     z (B,D,N)   book (K,D)   code (B,N) */
void nearest_codes(const Compute *on, int32_t *code, const real *z, const real *book, const Codes *s) {
    if (on->fast) return on->fast->nearest_codes(on, code, z, book, s);
    for (size_t b = 0; b < s->B; b++)
        for (size_t i = 0; i < s->N; i++) {
            double best = HUGE_VAL;
            code[b * s->N + i] = 0;
            for (size_t k = 0; k < s->K; k++) {
                double distance = 0;
                for (size_t d = 0; d < s->D; d++) {
                    const double gap = (double)z[(b * s->D + d) * s->N + i] - (double)book[k * s->D + d];
                    distance += gap * gap;
                }
                if (distance < best) best = distance, code[b * s->N + i] = (int32_t)k;
            }
        }
}

/* zq = z + (e - z), e = book[code]: the entry, rounded as the official code does.
 * *gap = sum of (e - z)^2, which both terms of the codebook loss are made of: loss = (1 + beta) gap / (B D N). */
void straight_through(const Compute *on, real *zq, double *gap, const real *z, const real *book, const int32_t *code,
                      const Codes *s) {
    if (on->device) return on->fast->straight_through(on, zq, gap, z, book, code, s);
    *gap = 0;
    for (size_t b = 0; b < s->B; b++) {
        double sum = 0;
        for (size_t d = 0; d < s->D; d++)
            for (size_t i = 0; i < s->N; i++) {
                const size_t at = (b * s->D + d) * s->N + i;
                const real e = book[(size_t)code[b * s->N + i] * s->D + d], distance = e - z[at];
                zq[at] = z[at] + distance;
                sum += (double)distance * (double)distance;
            }
        *gap += sum;
    }
}

/* Straight through, dz begins as dzq, in the same memory. Then the codebook loss:
 *     dz += to_z (z - e)        dbook[code] += to_e (e - z) */
void quantize_backward(const Compute *on, real *dz, real *dbook, const real *z, const real *book, const int32_t *code,
                       double to_z, double to_e, const Codes *s) {
    if (on->device) return on->fast->quantize_backward(on, dz, dbook, z, book, code, to_z, to_e, s);
    for (size_t b = 0; b < s->B; b++)
        for (size_t d = 0; d < s->D; d++)
            for (size_t i = 0; i < s->N; i++) {
                const size_t at = (b * s->D + d) * s->N + i, entry = (size_t)code[b * s->N + i] * s->D + d;
                const real distance = z[at] - book[entry];
                dz[at] += (real)to_z * distance;
                dbook[entry] -= (real)to_e * distance;
            }
}

/* zq[b,:,i] = book[code[b,i],:] */
void lookup_codes(const Compute *on, real *zq, const real *book, const int32_t *code, const Codes *s) {
    if (on->device) return on->fast->lookup_codes(on, zq, book, code, s);
    for (size_t b = 0; b < s->B; b++)
        for (size_t i = 0; i < s->N; i++)
            for (size_t d = 0; d < s->D; d++)
                zq[(b * s->D + d) * s->N + i] = book[(size_t)code[b * s->N + i] * s->D + d];
}

/* ---- tanh on the picture: y = tanh(x), dx = dy (1 - y^2) ---- */

void tanh_forward(const Compute *on, real *y, const real *x, size_t n) {
    if (on->device) return on->fast->tanh_forward(on, y, x, n);
    for (size_t i = 0; i < n; i++) y[i] = (real)tanh((double)x[i]);
}

void tanh_backward(const Compute *on, real *dx, const real *dy, const real *y, size_t n) {
    if (on->device) return on->fast->tanh_backward(on, dx, dy, y, n);
    for (size_t i = 0; i < n; i++) dx[i] = dy[i] * (1 - y[i] * y[i]);
}

/* ---- The network, as a list of layers in the order in which they run ----
 *
 *     image -> CONV3 -> [blocks, CONV_DOWN]* -> mid -> NORM, CONV3 -> CONV1 -> z                          encoder
 *     z -> QUANTIZE -> zq -> CONV1 -> CONV3 -> mid -> [blocks, CONV_UP]* -> NORM, CONV3 -> xrec           decoder
 *     block:     x + CONV3(NORM(CONV3(NORM(x))))      attention: x + CONV1(ATTEND(q, k, v))
 *
 * A layer names the values (activations) that it reads and writes and its rows of the parameter table. Where two
 * branches are summed, the last convolution of one adds the other (Layer.add). Backward, the gradient of the sum is
 * the gradient of the other branch: it stays where it is. */

typedef enum { CONV, NORM, ATTEND, QUANTIZE, TANH, RESAMPLE } LayerKind;

typedef struct {
    LayerKind kind;
    ConvKind conv;         /* CONV */
    int swish;             /* NORM */
    size_t in[3], out;     /* values; in[1], in[2] only for ATTEND: q, k, v */
    size_t add;            /* CONV: a value that is added to the result, or NONE */
    size_t weight, bias;   /* rows of the parameter table, or NONE */
    size_t gradients_from; /* after its backward, rows from here on get no more of their gradient */
    real *kept;            /* what forward keeps for backward: NORM (B,32,2), ATTEND (B,N,N); CONV: Conv.moments */
    void *prepared;        /* CONV on a GPU: Conv.prepared */
} Layer;

typedef struct {
    size_t C, level;            /* (B, C, H >> level, W >> level) */
    int f32_copy, f32_only;     /* on a GPU in bf16: see plan_precision */
    real *memory, *grad_memory; /* planned; NULL: the caller's is used */
    real *x, *dx;               /* of this run */
    real *seen;                 /* z, zq, xrec: what callers see */
} Value;

enum { SHOWN = 3 };

struct Vqgan {
    VqganConfig c;
    Params params;
    Layer *layer;
    Value *value;
    size_t n_layers, n_values;
    PlanStep *step;            /* (n_layers) what base/plan.c knows of a layer, and says of it */
    Life *life;                /* (2,n_values) of values, of their gradients */
    size_t image, z, zq, xrec; /* values */
    size_t shown[SHOWN];       /* z, zq, xrec */
    size_t quantize;           /* layer */
    Remap remap;               /* which entries are tokens; empty: all, under their numbers */
    Err broken;                /* the first error of the functions that build */
    /* the plan */
    Compute on;
    size_t B, H, W; /* the most pictures, the largest sides */
    int train;
    void *memory, *seen_memory;
    int32_t *code, *seen_code; /* (B,N) entries of the codebook; the same where callers see them */
    double *gap;               /* of straight_through */
    real *last;                /* on a GPU: gradients of the last layer's weight and bias, alone */
    uint64_t prepared_at;      /* compute_changes when weights were prepared */
    void *recorded;            /* on a GPU: the decoder's launches */
    /* the present run */
    size_t b, h, w;   /* pictures; their sides */
    int can_backward; /* vqgan_forward ran: backward may, once, for it reuses the memory of values */
    int has_latents;  /* z, zq and the codes of vqgan_forward are there */
};

/* Each of the following appends to the lists and returns the value that it writes. */

static size_t add_value(Vqgan *v, size_t C, size_t level) {
    v->value[v->n_values] = (Value){.C = C, .level = level};
    return v->n_values++;
}

static Layer *add_layer(Vqgan *v, LayerKind kind, size_t in, size_t C, size_t level) {
    Layer *l = &v->layer[v->n_layers++];
    *l = (Layer){.kind = kind, .in = {in, NONE, NONE}, .add = NONE, .weight = NONE, .bias = NONE};
    l->out = add_value(v, C, level);
    return l;
}

static void add_row(Vqgan *v, size_t *index, Init init, double scale, int ndim, const size_t *dim, const char *name) {
    if (v->broken == OK) v->broken = params_add(&v->params, index, init, scale, 0, ndim, dim, "%s", name);
}

/* C: channels of the result; add: a value, or NONE */
static size_t conv(Vqgan *v, ConvKind kind, size_t in, size_t C, size_t add, Name name) {
    const size_t level = v->value[in].level, kernel = kind == CONV1 ? 1 : 3;
    const size_t dim[4] = {C, v->value[in].C, kernel, kernel};
    const double bound = 1 / sqrt((double)(dim[1] * kernel * kernel));
    Layer *l = add_layer(v, CONV, in, C, kind == CONV_DOWN ? level + 1 : kind == CONV_UP ? level - 1 : level);
    add_row(v, &l->weight, INIT_UNIFORM, bound, 4, dim, name_of("%s.weight", name.s).s);
    add_row(v, &l->bias, INIT_UNIFORM, bound, 1, dim, name_of("%s.bias", name.s).s);
    l->conv = kind, l->add = add;
    return l->out;
}

/* From one level to the next, with a convolution or without weights */
static size_t resample(Vqgan *v, ConvKind kind, size_t x, size_t C, Name name) {
    if (v->c.resamp_with_conv) return conv(v, kind, x, C, NONE, name);
    return add_layer(v, RESAMPLE, x, C, v->value[x].level + (kind == CONV_DOWN ? 1 : (size_t)-1))->out;
}

static size_t norm(Vqgan *v, size_t in, int swish, Name name) {
    Layer *l = add_layer(v, NORM, in, v->value[in].C, v->value[in].level);
    add_row(v, &l->weight, INIT_ONE, 0, 1, &v->value[in].C, name_of("%s.weight", name.s).s);
    add_row(v, &l->bias, INIT_ZERO, 0, 1, &v->value[in].C, name_of("%s.bias", name.s).s);
    l->swish = swish;
    return l->out;
}

static size_t block(Vqgan *v, size_t x, size_t C, Name name) {
    size_t y = norm(v, x, 1, name_of("%s.norm1", name.s));
    y = conv(v, CONV3, y, C, NONE, name_of("%s.conv1", name.s));
    y = norm(v, y, 1, name_of("%s.norm2", name.s));
    if (v->value[x].C != C) x = conv(v, CONV1, x, C, NONE, name_of("%s.nin_shortcut", name.s));
    return conv(v, CONV3, y, C, x, name_of("%s.conv2", name.s));
}

static size_t attention(Vqgan *v, size_t x, Name name) {
    const size_t C = v->value[x].C, y = norm(v, x, 0, name_of("%s.norm", name.s));
    const size_t q = conv(v, CONV1, y, C, NONE, name_of("%s.q", name.s));
    const size_t k = conv(v, CONV1, y, C, NONE, name_of("%s.k", name.s));
    const size_t values = conv(v, CONV1, y, C, NONE, name_of("%s.v", name.s));
    Layer *l = add_layer(v, ATTEND, q, C, v->value[x].level);
    l->in[1] = k, l->in[2] = values;
    return conv(v, CONV1, l->out, C, x, name_of("%s.proj_out", name.s));
}

static size_t mid(Vqgan *v, size_t x, const char *side) {
    x = block(v, x, v->value[x].C, name_of("%s.mid.block_1", side));
    x = attention(v, x, name_of("%s.mid.attn_1", side));
    return block(v, x, v->value[x].C, name_of("%s.mid.block_2", side));
}

/* The n blocks of a level, each followed by attention where the settings list `resolution`. */
static size_t level_blocks(Vqgan *v, size_t x, size_t n, size_t C, size_t resolution, Name level) {
    int attends = 0;
    for (size_t i = 0; i < v->c.n_attn; i++) attends |= v->c.attn_resolutions[i] == resolution;
    for (size_t i = 0; i < n; i++) {
        x = block(v, x, C, name_of("%s.block.%zu", level.s, i));
        if (attends) x = attention(v, x, name_of("%s.attn.%zu", level.s, i));
    }
    return x;
}

static size_t encoder(Vqgan *v, size_t x) {
    const VqganConfig *c = &v->c;
    x = conv(v, CONV3, x, c->ch, NONE, name_of("encoder.conv_in"));
    for (size_t i = 0; i < c->levels; i++) {
        const size_t C = c->ch * c->ch_mult[i];
        x = level_blocks(v, x, c->num_res_blocks, C, c->resolution >> i, name_of("encoder.down.%zu", i));
        if (i + 1 < c->levels) x = resample(v, CONV_DOWN, x, C, name_of("encoder.down.%zu.downsample.conv", i));
    }
    x = norm(v, mid(v, x, "encoder"), 1, name_of("encoder.norm_out"));
    return conv(v, CONV3, x, c->z_channels, NONE, name_of("encoder.conv_out"));
}

/* The official decoder starts from the resolution that halving left and doubles it, which matters for odd ones. */
static size_t decoder(Vqgan *v, size_t x) {
    const VqganConfig *c = &v->c;
    const size_t top = c->levels - 1;
    x = conv(v, CONV3, x, c->ch * c->ch_mult[top], NONE, name_of("decoder.conv_in"));
    x = mid(v, x, "decoder");
    for (size_t i = c->levels; i-- > 0;) {
        const size_t C = c->ch * c->ch_mult[i], resolution = c->resolution >> top << (top - i);
        x = level_blocks(v, x, c->num_res_blocks + 1, C, resolution, name_of("decoder.up.%zu", i));
        if (i > 0) x = resample(v, CONV_UP, x, C, name_of("decoder.up.%zu.upsample.conv", i));
    }
    x = norm(v, x, 1, name_of("decoder.norm_out"));
    return conv(v, CONV3, x, c->out_ch, NONE, name_of("decoder.conv_out"));
}

static size_t quantizer(Vqgan *v, size_t z) {
    const size_t dim[2] = {v->c.n_embed, v->c.embed_dim};
    Layer *l = add_layer(v, QUANTIZE, z, v->c.embed_dim, v->value[z].level);
    add_row(v, &l->weight, INIT_UNIFORM, 1.0 / (double)v->c.n_embed, 2, dim, "quantize.embedding.weight");
    v->quantize = v->n_layers - 1;
    return l->out;
}

static void whole_network(Vqgan *v, int with_tanh) {
    const VqganConfig *c = &v->c;
    v->image = add_value(v, c->in_channels, 0);
    v->z = conv(v, CONV1, encoder(v, v->image), c->embed_dim, NONE, name_of("quant_conv"));
    v->zq = quantizer(v, v->z);
    v->xrec = decoder(v, conv(v, CONV1, v->zq, c->z_channels, NONE, name_of("post_quant_conv")));
    if (with_tanh) v->xrec = add_layer(v, TANH, v->xrec, c->out_ch, 0)->out;
    v->shown[0] = v->z, v->shown[1] = v->zq, v->shown[2] = v->xrec;
}

/* ---- The walk: the same wherever the network computes ---- */

static size_t plane_size(const Vqgan *v, size_t value) { /* h*w, in this run */
    return (v->h >> v->value[value].level) * (v->w >> v->value[value].level);
}

/* Layer i writes value i + 1; value 0 is the picture. Is this one left to the layer that reads it (base/plan.h)? */
static int deferred(const Vqgan *v, size_t value) {
    return value > 0 && v->step[value - 1].deferred;
}

static Conv conv_of(const Vqgan *v, const Layer *l) {
    const Value *x = &v->value[l->in[0]], *y = &v->value[l->out];
    Conv c = {.kind = l->conv, .B = v->b, .C = x->C, .M = y->C, .h = v->h >> x->level, .w = v->w >> x->level};
    c.y_f32 = y->f32_copy, c.y_f32_only = y->f32_only, c.add_f32 = l->add != NONE && v->value[l->add].f32_copy;
    c.prepared = l->prepared, c.moments = l->kept;
    if (!deferred(v, l->in[0])) return c;
    const Layer *n = &v->layer[l->in[0] - 1];
    c.norm = n->kept, c.norm_swish = n->swish, c.norm_f32 = v->value[n->in[0]].f32_copy;
    return c;
}

static GroupNorm norm_of(const Vqgan *v, const Layer *l) {
    const Value *x = &v->value[l->in[0]];
    const Layer *maker = &v->layer[l->in[0] ? l->in[0] - 1 : 0];
    GroupNorm n = {v->b, x->C, plane_size(v, l->out), l->swish, x->f32_copy, deferred(v, l->out), NULL, 0};
    if (l->in[0] && maker->kind == CONV) n.moments = maker->kept, n.parts = conv_parts(&v->on, conv_of(v, maker));
    return n;
}

static Codes codes_of(const Vqgan *v) {
    return (Codes){.B = v->b, .D = v->c.embed_dim, .N = plane_size(v, v->z), .K = v->c.n_embed};
}

static const real *codebook(const Vqgan *v) {
    return param_value(&v->params, v->layer[v->quantize].weight);
}

/* Of a layer without weights: to = or += from, both the values or, backward, the gradients on its two sides. */
static void resample_layer(const Vqgan *v, const Layer *l, real *to, const real *from, int backward, int accumulate) {
    const Value *x = &v->value[l->in[0]], *y = &v->value[l->out];
    const size_t halves = y->level > x->level, small = halves ? l->out : l->in[0], large = halves ? l->in[0] : l->out;
    const size_t h = v->h >> v->value[small].level, H = v->h >> v->value[large].level, c = v->b * x->C;
    const size_t w = v->w >> v->value[small].level, W = v->w >> v->value[large].level;
    (halves != (size_t)backward ? shrink : grow)(to, from, halves ? 0.25 : 1, accumulate, c, h, w, H, W);
}

static void layer_forward(Vqgan *v, const Layer *l) {
    const Compute *on = &v->on;
    const size_t N = plane_size(v, l->out), C = v->value[l->out].C;
    const real *w = l->weight == NONE ? NULL : param_value(&v->params, l->weight);
    const real *bias = l->bias == NONE ? NULL : param_value(&v->params, l->bias);
    const real *x = v->value[l->in[0]].x, *add = l->add == NONE ? NULL : v->value[l->add].x;
    real *y = v->value[l->out].x;
    const Conv c = conv_of(v, l);
    const GroupNorm n = norm_of(v, l);
    const Codes s = codes_of(v);
    switch (l->kind) {
    case CONV: conv_forward(on, y, x, w, bias, add, &c); break;
    case NORM: group_norm_forward(on, y, l->kept, x, w, bias, &n); break;
    case ATTEND:
        picture_attention_forward(on, y, l->kept, x, v->value[l->in[1]].x, v->value[l->in[2]].x, v->b, C, N);
        break;
    case QUANTIZE:
        nearest_codes(on, v->code, x, w, &s);
        straight_through(on, y, v->gap, x, w, v->code, &s);
        break;
    case TANH: tanh_forward(on, y, x, v->b * C * N); break;
    case RESAMPLE: resample_layer(v, l, y, x, 0, 0); break;
    }
}

/* Both terms of the codebook loss have the value mean (e-z)^2, over B*D*N numbers; one pulls the latents, the other the
 * codebook. The paper multiplies the latents' term by beta, the official code by default (legacy) the codebook's. */
static void quantize_layer_backward(Vqgan *v, const Layer *l, double codebook_weight) {
    const Codes s = codes_of(v);
    const double unit = 2 * codebook_weight / (double)(s.B * s.D * s.N);
    const double to_z = unit * (v->c.legacy ? 1 : v->c.beta), to_e = unit * (v->c.legacy ? v->c.beta : 1);
    quantize_backward(&v->on, v->value[l->in[0]].dx, param_grad(&v->params, l->weight), v->value[l->in[0]].x,
                      codebook(v), v->code, to_z, to_e, &s);
}

static void layer_backward(Vqgan *v, const Layer *l, double codebook_weight) {
    const Compute *on = &v->on;
    const size_t N = plane_size(v, l->out), C = v->value[l->out].C;
    const real *w = l->weight == NONE ? NULL : param_value(&v->params, l->weight);
    const real *bias = l->bias == NONE ? NULL : param_value(&v->params, l->bias);
    real *dw = l->weight == NONE ? NULL : param_grad(&v->params, l->weight);
    real *db = l->bias == NONE ? NULL : param_grad(&v->params, l->bias);
    const Value *in = &v->value[l->in[0]], *out = &v->value[l->out];
    const int *accumulate = v->step[l - v->layer].accumulate;
    const Conv c = conv_of(v, l);
    const GroupNorm n = norm_of(v, l);
    switch (l->kind) {
    case CONV: conv_backward(on, in->dx, dw, db, out->dx, in->x, w, accumulate[0], &c); break;
    case NORM: group_norm_backward(on, in->dx, dw, db, out->dx, in->x, w, bias, l->kept, accumulate[0], &n); break;
    case ATTEND: {
        const Value *k = &v->value[l->in[1]], *values = &v->value[l->in[2]];
        picture_attention_backward(on, in->dx, k->dx, values->dx, out->dx, in->x, k->x, values->x, l->kept, accumulate,
                                   v->b, C, N);
        break;
    }
    case QUANTIZE: quantize_layer_backward(v, l, codebook_weight); break;
    case TANH: tanh_backward(on, in->dx, out->dx, out->x, v->b * C * N); break;
    case RESAMPLE: resample_layer(v, l, in->dx, out->dx, 1, accumulate[0]); break;
    }
}

/* Weights that changed since they were last put in the order in which a GPU's convolutions read them. */
static void prepare_weights(Vqgan *v) {
    const uint64_t now = compute_changes(&v->on);
    for (size_t i = 0; i < v->n_layers && now != v->prepared_at; i++) {
        const Layer *l = &v->layer[i];
        const Conv c = conv_of(v, l);
        if (l->prepared) v->on.fast->conv_prepare(&v->on, l->prepared, param_value(&v->params, l->weight), &c);
    }
    v->prepared_at = now;
}

static void walk_forward(Vqgan *v, size_t first, size_t end) {
    prepare_weights(v);
    for (size_t i = first; i < end && !work_stops(); i++) layer_forward(v, &v->layer[i]);
}

/* Nothing in front of the quantiser needs a gradient when encoder and codebook are not trained. */
static void walk_backward(Vqgan *v, double codebook_weight, int image_wanted) {
    const Param *row = v->params.row;
    const int frozen = row[v->layer[0].weight].untrained && row[v->layer[v->quantize].weight].untrained;
    for (size_t i = v->n_layers; i-- > (frozen && !image_wanted ? v->quantize + 1 : 0);) {
        layer_backward(v, &v->layer[i], codebook_weight);
        params_ready(&v->params, v->layer[i].gradients_from);
    }
}

/* ---- Created and loaded ---- */

static void drop_plan(Vqgan *v);

/* The table's rows go into PyTorch's order. Each layer notes which gradients are complete when backward leaves it. */
static Err finish_network(Vqgan *v) {
    size_t *moved, complete = 0;
    TRY(v->broken);
    TRY(mem_alloc(&moved, v->params.n, sizeof *moved, "vqgan: rows"));
    params_sort(&v->params, vqgan_row_order, moved);
    for (Layer *l = v->layer; l < v->layer + v->n_layers; l++) {
        l->gradients_from = complete; /* behind the rows of all layers before it */
        if (l->weight != NONE) l->weight = moved[l->weight], complete = max_size(complete, l->weight + 1);
        if (l->bias != NONE) l->bias = moved[l->bias], complete = max_size(complete, l->bias + 1);
        v->step[l - v->layer] = (PlanStep){.in = {l->in[0], l->in[1], l->in[2]},
                                           .add = l->add,
                                           .out = l->out,
                                           .rereads_out = l->kind == TANH,
                                           .in_place = l->kind == QUANTIZE,
                                           .defers = l->kind == NORM};
    }
    free(moved);
    return OK;
}

static Err build(Vqgan *v, int with_tanh) {
    const VqganConfig *c = &v->c;
    const size_t most = 11 * ((2 * c->num_res_blocks + 1) * c->levels + 6) + 2 * c->levels + 16;
    TRY(mem_alloc(&v->layer, most, sizeof *v->layer, "vqgan: layers"));
    TRY(mem_alloc(&v->value, most + 1, sizeof *v->value, "vqgan: values"));
    TRY(mem_alloc(&v->step, most, sizeof *v->step, "vqgan: layers"));
    TRY(mem_alloc(&v->life, 2 * (most + 1), sizeof *v->life, "vqgan: values"));
    whole_network(v, with_tanh);
    return finish_network(v);
}

Err vqgan_create(Vqgan **out, const VqganConfig *c, int honour_tanh) {
    Vqgan *v;
    *out = NULL;
    TRY(vqgan_config_check(c));
    TRY(mem_alloc(&v, 1, sizeof *v, "vqgan"));
    v->c = *c;
    if (build(v, c->tanh_out && honour_tanh) != OK || remap_make(&v->remap, c) != OK) {
        vqgan_free(v);
        return FAILED;
    }
    *out = v;
    return OK;
}

void vqgan_free(Vqgan *v) {
    if (!v) return;
    drop_plan(v);
    params_free(&v->params);
    free(v->layer);
    free(v->value);
    free(v->step);
    free(v->life);
    remap_free(&v->remap);
    free(v);
}

const VqganConfig *vqgan_config(const Vqgan *v) {
    return &v->c;
}

Params *vqgan_params(Vqgan *v) {
    return &v->params;
}

size_t vqgan_K(const Vqgan *v) {
    return remap_K(&v->remap);
}

size_t vqgan_codebook(const Vqgan *v) {
    return v->layer[v->quantize].weight;
}

const int32_t *vqgan_used(const Vqgan *v) {
    return v->remap.used;
}

Err vqgan_use_cuda(Vqgan *v, Precision precision) {
    if (!v->c.resamp_with_conv) return err("ddconfig.resamp_with_conv false: not on a GPU; --device cpu does it");
    return use_cuda(&v->params, precision);
}

Err vqgan_map(Vqgan *v, const Checkpoint *ck, const char *prefix) {
    TRY(params_map(&v->params, ck, prefix, 0));
    TRY(first_stage_known(&v->params, ck, prefix));
    return remap_load(&v->remap, ck, prefix);
}

Err vqgan_load(Vqgan *v, const Checkpoint *ck, const char *prefix) {
    TRY(params_plan(&v->params, PLAN_VALUE));
    TRY(params_load(&v->params, ck, 'v', prefix));
    TRY(first_stage_known(&v->params, ck, prefix));
    return remap_load(&v->remap, ck, prefix);
}

/* ---- A run begins, and ends ---- */

static Err check_run(const Vqgan *v, size_t B, size_t H, size_t W, const char *where);

/* Before a run: the values lie in their planned memory; the pictures' size is that of this run, not of the plan. */
static void begin(Vqgan *v, size_t B, size_t H, size_t W) {
    v->b = B, v->h = H, v->w = W;
    v->can_backward = v->has_latents = 0;
    for (size_t i = 0; i < v->n_values; i++) {
        v->value[i].x = deferred(v, i) ? v->value[v->layer[i - 1].in[0]].x : v->value[i].memory;
        v->value[i].dx = v->value[v->life[v->n_values + i].home].grad_memory;
    }
}

/* The caller's numbers of a value, or of its gradient, where layers read them; what layers wrote, to the caller. */
static void lend(Vqgan *v, size_t value, real **to, const real *from) {
    compute_lend(&v->on, to, from, v->b, v->value[value].C, plane_size(v, value));
}

static Err hand_back(const Vqgan *v, size_t value, real *to, const real *from) {
    return compute_hand_back(&v->on, to, from, v->b, v->value[value].C, plane_size(v, value));
}

/* ---- Pictures to tokens ---- */

Err vqgan_encode(Vqgan *v, const real *images, size_t B, size_t H, size_t W, uint64_t seed, real *prequant,
                 int32_t *raw, int32_t *tokens) {
    TRY(check_run(v, B, H, W, "vqgan_encode"));
    begin(v, B, H, W);
    lend(v, v->image, &v->value[v->image].x, images);
    walk_forward(v, 0, v->quantize);
    const Codes s = codes_of(v);
    TRY(compute_usable(&v->on, v->value[v->z].x, s.B, s.D, s.N, "the first stage's encoder"));
    if (prequant) TRY(hand_back(v, v->z, prequant, v->value[v->z].x));
    if (!raw && !tokens) return compute_status(&v->on);
    nearest_codes(&v->on, v->code, v->value[v->z].x, codebook(v), &s);
    TRY(compute_get(&v->on, v->seen_code, v->code, s.B * s.N * sizeof *v->code));
    if (raw) memcpy(raw, v->seen_code, s.B * s.N * sizeof *raw);
    if (tokens) remap_tokens(&v->remap, tokens, v->seen_code, s.B, s.N, seed);
    return compute_status(&v->on);
}

/* ---- Tokens to pictures ---- */

/* From zq to the reconstruction, which on a CPU is written where the caller wants it. */
static void walk_decoder(void *v) {
    walk_forward((Vqgan *)v, ((Vqgan *)v)->quantize + 1, ((Vqgan *)v)->n_layers);
}
static Err decode(Vqgan *v, real *images) {
    Value *xrec = &v->value[v->xrec];
    const size_t key[REPLAY_KEY] = {v->b, v->h, v->w, (size_t)(uintptr_t)codebook(v)};
    if (!v->on.device) xrec->x = images;
    prepare_weights(v);
    TRY(compute_replay(&v->on, &v->recorded, key, walk_decoder, v));
    TRY(hand_back(v, v->xrec, images, xrec->x));
    return compute_status(&v->on);
}

/* Sides of the picture of a grid; what is too large stays too large. */
static size_t picture_side(const Vqgan *v, size_t grid_side) {
    return min_size(grid_side, (size_t)1 << 20) << (v->c.levels - 1);
}

Err vqgan_decode_tokens(Vqgan *v, const int32_t *tokens, size_t B, size_t h, size_t w, real *images) {
    TRY(check_run(v, B, picture_side(v, h), picture_side(v, w), "vqgan_decode_tokens"));
    begin(v, B, picture_side(v, h), picture_side(v, w));
    const Codes s = codes_of(v);
    TRY(remap_entries(&v->remap, v->seen_code, tokens, B, h * w));
    if (v->on.device) compute_put(&v->on, v->code, v->seen_code, B * h * w * sizeof *v->code);
    lookup_codes(&v->on, v->value[v->zq].x, codebook(v), v->code, &s);
    return decode(v, images);
}

/* z (B,D,h,w) -> images, not clamped. For tests: test/first_stage.h */
Err vqgan_decode(Vqgan *v, const real *z, size_t B, size_t h, size_t w, real *images) {
    TRY(check_run(v, B, picture_side(v, h), picture_side(v, w), "vqgan_decode"));
    begin(v, B, picture_side(v, h), picture_side(v, w));
    lend(v, v->zq, &v->value[v->zq].x, z);
    return decode(v, images);
}

/* ---- Training ---- */

Err vqgan_forward(Vqgan *v, const real *images, size_t B, size_t H, size_t W, const real **xrec,
                  double *codebook_loss) {
    TRY(check_run(v, B, H, W, "vqgan_forward"));
    if (!v->train) return err("vqgan_forward: planned for inference");
    begin(v, B, H, W);
    Value *image = &v->value[v->image];
    if (v->on.device)
        lend(v, v->image, &image->x, images);
    else
        memcpy(image->x, images, B * image->C * H * W * sizeof *images); /* backward reads it again */
    walk_forward(v, 0, v->n_layers);
    const Codes s = codes_of(v);
    double gap = 0;
    TRY(compute_get(&v->on, &gap, v->gap, sizeof gap));
    for (int i = 0; i < SHOWN; i++) TRY(hand_back(v, v->shown[i], v->value[v->shown[i]].seen, v->value[v->shown[i]].x));
    TRY(compute_get(&v->on, v->seen_code, v->code, s.B * s.N * sizeof *v->code));
    *codebook_loss = (1 + v->c.beta) * gap / (double)(s.B * s.D * s.N);
    *xrec = v->value[v->xrec].seen;
    v->can_backward = v->has_latents = 1;
    return compute_status(&v->on);
}

Err vqgan_backward(Vqgan *v, const real *dxrec, double codebook_weight, real *dimage) {
    Value *image = &v->value[v->image];
    if (!v->can_backward) return err("vqgan_backward: must follow vqgan_forward");
    if (!v->params.row[0].grad) return err("vqgan_backward: the parameters have no gradients planned");
    v->can_backward = 0;
    lend(v, v->xrec, &v->value[v->xrec].dx, dxrec);
    if (!v->on.device || !dimage) image->dx = dimage; /* NULL: the first layer leaves it out */
    walk_backward(v, codebook_weight, dimage != NULL);
    if (dimage) TRY(hand_back(v, v->image, dimage, image->dx));
    return compute_status(&v->on);
}

const Param *vqgan_last_layer(const Vqgan *v) {
    const Layer *l = &v->layer[v->n_layers - 1];
    return &v->params.row[(l->kind == TANH ? l - 1 : l)->weight];
}

Err vqgan_last_gradient(Vqgan *v, const real *dxrec, real *dw, real *db) {
    const Layer *l = &v->layer[v->n_layers - 1];
    const Param *w = vqgan_last_layer(v);
    if (!v->can_backward) return err("vqgan_last_gradient: must follow vqgan_forward");
    if (l->kind == TANH) return err("vqgan_last_gradient: not behind a tanh");
    const size_t weights = w->size * sizeof *dw, biases = w->dim[0] * sizeof *db;
    real *to_w = v->last ? v->last : dw, *to_b = v->last ? v->last + w->size : db;
    real *dy = v->value[v->xrec].dx;
    const Conv c = conv_of(v, l);
    lend(v, v->xrec, &dy, dxrec);
    compute_zero(&v->on, to_w, weights);
    compute_zero(&v->on, to_b, biases);
    conv_backward(&v->on, NULL, to_w, to_b, dy, v->value[l->in[0]].x, param_value(&v->params, l->weight), 0, &c);
    if (v->last) TRY(compute_get(&v->on, dw, to_w, weights));
    if (v->last) TRY(compute_get(&v->on, db, to_b, biases));
    return compute_status(&v->on);
}

void vqgan_latents(const Vqgan *v, const real **z, const real **zq_st, const int32_t **raw) {
    if (z) *z = v->has_latents ? v->value[v->z].seen : NULL;
    if (zq_st) *zq_st = v->value[v->zq].seen;
    if (raw) *raw = v->seen_code;
}

/* ---- Memory. Step i of a run is forward of layer i, step 2n-1-i its backward; base/plan.c shares memory among what is
 *      not needed in the same steps. ---- */

static int reads(const Layer *l, size_t value) {
    return l->in[0] == value || l->in[1] == value || l->in[2] == value;
}

/* A GPU in bf16 keeps in f32 too what residuals are added to and norms read along the way: the sum over the network's
 * depth, whose roundings would all count. Where no product reads the bf16 numbers, they are not even written. */
static void plan_precision(Vqgan *v, size_t i) {
    const int made = i > 0 && v->layer[i - 1].kind == CONV;
    int summed = 0, normed = 0, multiplied = 0;
    for (const Layer *l = v->layer; l < v->layer + v->n_layers; l++) {
        summed |= l->add == i || (l->out == i && l->add != NONE);
        normed |= l->kind == NORM && l->in[0] == i;
        multiplied |= l->kind != NORM && reads(l, i);
    }
    const int bf16 = v->on.device && v->on.unit < sizeof(float);
    v->value[i].f32_copy = bf16 && made && (summed || (normed && multiplied));
    v->value[i].f32_only = v->value[i].f32_copy && !multiplied;
}

/* On a CPU the picture and its reconstruction are the caller's; in training only their gradients. */
static void plan_values(Vqgan *v, Plan *plan) {
    for (size_t i = 0; i < v->n_values; i++) {
        Value *x = &v->value[i];
        const Life *grad = &v->life[v->n_values + i];
        const size_t n = v->B * x->C * plane_size(v, i);
        x->memory = x->grad_memory = NULL;
        plan_precision(v, i);
        const int callers = !v->on.device && (i == v->image || i == v->xrec);
        if (v->on.device && n > (size_t)1 << 31 && plan->broken == OK)
            plan->broken = err("vqgan: activations of more than 2^31 numbers; a smaller batch takes less");
        if ((!callers || v->train) && !deferred(v, i))
            plan_add(plan, &x->memory, compute_bytes(&v->on, n, x->f32_copy), 1, v->life[i].from, v->life[i].to);
        if (!callers && v->train && grad->home == i)
            plan_add(plan, &x->grad_memory, n, v->on.unit, grad->from, grad->to);
    }
}

/* What a layer keeps for its backward, and prepares, and its scratch. */
static void plan_layer(Vqgan *v, Plan *plan, size_t j) {
    Layer *l = &v->layer[j];
    const Layers *fast = v->on.fast;
    const size_t C = v->value[l->out].C, N = plane_size(v, l->out), read = v->life[l->out].to;
    size_t kept = 0, needs = 0, last = v->train ? 2 * v->n_layers - 1 - j : l->kind == NORM ? read : j;
    const Conv c = conv_of(v, l);
    const GroupNorm n = norm_of(v, l);
    l->prepared = NULL, l->kept = NULL;
    for (int backward = 0; l->kind == CONV && backward <= v->train; backward++) conv_needs(&v->on, &c, backward);
    if (l->kind == CONV && v->on.device && fast->conv_prepared_bytes(&c))
        plan_add(plan, &l->prepared, fast->conv_prepared_bytes(&c), 1, 0, PLAN_END);
    if (l->kind == CONV)
        kept = v->B * conv_parts(&v->on, c) * 3 * C * sizeof(float), last = min_size(read, v->n_layers);
    if (l->kind == NORM) kept = fast ? fast->group_norm_kept(&n) : v->B * NORM_GROUPS * 2 * sizeof(real);
    if (l->kind == NORM && fast) needs = fast->group_norm_needs(&v->on, &n, v->train);
    if (l->kind == ATTEND) kept = round_up(N, 64) * v->on.unit; /* a GPU's pictures begin at a multiple of 64 */
    if (l->kind == ATTEND && fast) needs = fast->picture_attention_needs(&v->on, v->B, C, N, v->train);
    if (kept) plan_add(plan, &l->kept, l->kind == ATTEND ? v->B * N : 1, kept, j, last);
    compute_needs(&v->on, needs);
}

static void plan_rest(Vqgan *v, Plan *plan) {
    const Codes s = codes_of(v);
    const Layer *l = &v->layer[v->n_layers - 1];
    const size_t moved[] = {v->image, v->z, v->xrec}; /* on a GPU: from and to the host, by way of the scratch */
    for (int i = 0; i < 3 && v->on.device; i++)
        compute_needs(&v->on, v->B * v->value[moved[i]].C * plane_size(v, moved[i]) * sizeof(real));
    if (v->on.fast) compute_needs(&v->on, v->on.fast->nearest_needs(&v->on, &s));
    plan_add(plan, &v->code, s.B * s.N, sizeof *v->code, 0, PLAN_END);
    plan_add(plan, &v->gap, 1, sizeof *v->gap, 0, PLAN_END);
    v->last = NULL;
    if (!v->on.device || !v->train || l->kind != CONV) return;
    plan_add(plan, &v->last, v->params.row[l->weight].size + v->params.row[l->bias].size, sizeof(float), 0, PLAN_END);
}

static void drop_plan(Vqgan *v) {
    if (v->memory) compute_free(&v->on, v->memory);
    compute_forget(&v->on, &v->recorded);
    free(v->seen_memory);
    v->memory = v->seen_memory = NULL;
    v->can_backward = v->has_latents = 0;
}

/* Odd sides lose their last row or column at a CONV_DOWN; training needs a reconstruction as large as the picture. */
static Err check_picture(const Vqgan *v, size_t B, size_t H, size_t W, const char *where) {
    const size_t unit = (size_t)1 << (v->c.levels - 1);
    if (B == 0) return err("%s: an empty batch", where);
    if (v->train && (H == 0 || W == 0 || H % unit || W % unit))
        return err("%s: a picture of %zux%zu; both sides must be multiples of %zu", where, H, W, unit);
    if (H < unit || W < unit)
        return err("%s: a picture of %zux%zu; both sides must be at least %zu", where, H, W, unit);
    if (B > 1 << 20 || H > 1 << 20 || W > 1 << 20 || B * H > ((size_t)1 << 40) / W)
        return err("%s: %zu pictures of %zux%zu is too much", where, B, H, W);
    return OK;
}

static Err check_run(const Vqgan *v, size_t B, size_t H, size_t W, const char *where) {
    if (!v->params.n || !v->params.row[0].value) return err("%s: the parameters have no values yet", where);
    if (!v->memory) return err("%s: call vqgan_plan first", where);
    if (!codebook(v)) return err("%s: the parameters are not on the GPU yet", where);
    if (B > v->B || H > v->H || W > v->W)
        return err("%s: %zu pictures of %zux%zu; planned for %zu of %zux%zu", where, B, H, W, v->B, v->H, v->W);
    TRY(check_picture(v, B, H, W, where));
    return compute_status(&v->on);
}

/* memory NULL: only counts the bytes. */
static Err lay_out(Vqgan *v, size_t B, size_t H, size_t W, int train, void **memory, size_t *bytes) {
    Plan plan = {.what = "vqgan: activations"};
    drop_plan(v);
    v->train = train != 0;
    TRY(check_picture(v, B, H, W, "vqgan_plan"));
    v->on = compute_of(&v->params);
    v->b = v->B = B, v->h = v->H = H, v->w = v->W = W;
    for (size_t j = 0; j < v->n_layers; j++) v->step[j].takes_over = conv_norms(&v->on, conv_of(v, &v->layer[j]));
    plan_lives(v->step, v->n_layers, v->train, v->life, v->life + v->n_values, v->n_values);
    for (int i = 0; v->train && i < SHOWN; i++) v->life[v->shown[i]].to = PLAN_END;
    plan_values(v, &plan);
    for (size_t j = 0; j < v->n_layers; j++) plan_layer(v, &plan, j);
    plan_rest(v, &plan);
    return compute_memory(&v->on, &plan, memory, bytes);
}

/* What callers see: on a CPU the values themselves, on a GPU copies in the host's memory. */
static Err place_seen(Vqgan *v) {
    size_t reals = v->B * plane_size(v, v->z); /* the codes */
    v->seen_code = v->code;
    for (int i = 0; i < SHOWN; i++) {
        v->value[v->shown[i]].seen = v->value[v->shown[i]].memory;
        reals += v->B * v->value[v->shown[i]].C * plane_size(v, v->shown[i]);
    }
    if (!v->on.device) return OK;
    TRY(mem_alloc(&v->seen_memory, reals, sizeof(real), "vqgan: what the GPU gives back"));
    real *at = (real *)v->seen_memory;
    for (int i = 0; i < SHOWN; at += v->B * v->value[v->shown[i]].C * plane_size(v, v->shown[i]), i++)
        v->value[v->shown[i]].seen = at;
    v->seen_code = (int32_t *)(void *)at;
    return OK;
}

Err vqgan_plan_bytes(Vqgan *v, size_t B, size_t H, size_t W, int train, size_t *bytes) {
    return lay_out(v, B, H, W, train, NULL, bytes);
}

Err vqgan_plan(Vqgan *v, size_t B, size_t H, size_t W, int train) {
    size_t bytes = 0;
    TRY(lay_out(v, B, H, W, train, &v->memory, &bytes));
    v->prepared_at = (uint64_t)-1;
    return place_seen(v);
}
