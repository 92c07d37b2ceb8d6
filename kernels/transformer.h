/* transformer.h - what the files of the transformer share: layers.cu, attention.cu, transformer.cu,
 * decode.cu and optimizer.cu, from small to large. Nobody else includes it; what others may use is in imagebart.h. */
#ifndef TRANSFORMER_H
#define TRANSFORMER_H

#include "kernels/device.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { SMALL_WORK = 16384 }; /* elements below which a loop is not worth waking the other threads */
#define NO_ROW ((size_t)-1)

/* ---- The network ---- */

typedef struct {
    size_t weight, bias; /* rows of the parameter table */
    size_t C;
} Norm;

typedef struct {
    size_t weight, bias; /* weight (out,in); bias (out) or NO_ROW */
    size_t in, out;
} Linear;

typedef enum { BLOCK_SELF, BLOCK_CROSS, BLOCK_FEED } BlockKind;

/* One x = x + block(norm(x)) and what its last forward left for backward; R = B*n rows of the pass. */
typedef struct {
    BlockKind kind;
    Norm norm;
    Linear q, k, v, out; /* attention */
    size_t heads, D;     /* heads of D channels each; inner = heads*D */
    Linear up, down;     /* feed-forward */

    real *x;                     /* (R,C) input */
    real *mean, *rstd;           /* (R) of the norm */
    real *normed;                /* (R,C) */
    real *query, *y;             /* (R,inner) queries; what the heads say */
    real *key, *value;           /* (B,keys,inner) */
    void *kept_key, *kept_value; /* (B,heads,keys,kept_width) real, or bf16 with packed weights; NULL: not a decoder */
    real *p;                     /* (B,heads,n,keys) attention probabilities; NULL: not kept */
    real *g, *dg;                /* (R,4C) gelu(h) and its derivative; dg NULL: not kept */
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
    int32_t *ids;      /* (B,T) */
    real *x_end, *out; /* (R,C) input and output of the final norm */
    real *end_mean, *end_rstd;
} Stack;

typedef enum { IDLE, FORWARD_DONE, DECODING } State;

/* What a row of a decoding pass is: a position of a batch row, which sees the keys 0..visible-1 of that row. */
typedef struct {
    size_t b, pos, visible;
} Cell;

typedef struct NetTwin NetTwin; /* the plan on a GPU: transformer.cu's second half */

struct Transformer {
    NetConfig config;
    Params params;
    Stack encoder, decoder; /* NET_GPT: decoder only */
    Linear head;
    size_t log_scalors; /* row, or NO_ROW */
    float alpha[MAX_SCALES + 1];

    size_t B, N; /* planned */
    WeightFormat format;
    int train;
    void *arena;
    real *raw, *logits;            /* (B,N,K) before and after scaling and residual; may be one */
    real *scores;                  /* attention scores of one block of queries per (row, head) */
    real *dx, *dcontext, *dnormed; /* gradients, reused by every layer */
    real *dquery, *dkey, *dvalue, *dy, *dh;
    real *row_sum; /* (B*N) */
    void *work;    /* of gemm_stream, for packed weights */

    NetTwin *twin; /* NULL on the CPU */

    State state;
    size_t now_B, now_N; /* of the last forward or decode_begin */
    size_t *fed;         /* (B) decoding: positions of a batch row whose keys and values are there */
    int32_t *first;      /* (B) what stands in front of position 0: sos, or the end of a GPT's prompt */
    Cell *cell;          /* (B*DECODE_BLOCK) decoding: the positions of a pass */
};

/* A pass over positions 0..n-1 of B batch rows, as training has it; or, while decoding, over n cells, B = 1. */
typedef struct {
    size_t B, n;
    const Cell *cell;    /* (n), or NULL */
    size_t stride;       /* positions that a batch row's keys and values have room for */
    int causal;          /* mask among the positions; cells say what they see */
    const real *context; /* (B,T_context,C); NULL: keys and values of the context are in place */
    size_t T_context;
} Pass;

/* Of the prompt in front of x_t or of a GPT's tokens: t, and the class if there is one. */
static inline size_t prompt_length(const NetConfig *c) {
    return c->has_class ? 2 : 1;
}

static inline real *value_of(const Transformer *m, size_t row) {
    return m->params.row[row].value;
}
static inline real *grad_of(const Transformer *m, size_t row) {
    return m->params.row[row].grad;
}

enum {
    FEED_FACTOR = 4 /* hidden width of a feed-forward block over dim */
};
static inline int is_scaled(const NetConfig *c) {
    return c->variant == X_SCALED || c->variant == X_FINE_SCALED || c->variant == X_RESIDUAL_SCALED;
}
static inline int is_residual(const NetConfig *c) {
    return c->variant == X_RESIDUAL || c->variant == X_RESIDUAL_SCALED;
}

/* ---- Memory plan: one arena, laid out by running the same code twice, first to measure, then to assign ---- */

typedef struct {
    char *base; /* NULL: measuring */
    size_t bytes;
    int overflow;
} Arena;

static inline void *take_bytes(Arena *a, size_t n1, size_t n2, size_t n3, size_t size) {
    size_t bytes, start = a->bytes;
    if (size_mul(&bytes, n1, n2) || size_mul(&bytes, bytes, n3) || size_mul(&bytes, bytes, size) ||
        bytes > (size_t)-1 / 4 || a->bytes > (size_t)-1 / 4) {
        a->overflow = 1;
        return NULL;
    }
    a->bytes += (bytes + 63) / 64 * 64;
    return a->base ? a->base + start : NULL;
}

static inline size_t widest_inner(const Transformer *m) {
    const Layer *e = m->encoder.n_layers ? m->encoder.layer : m->decoder.layer, *d = m->decoder.layer;
    return max_size(e->heads * e->D, d->heads * d->D);
}

/* ---- Blocks: next = x + block(normed) ---- */

/* In backward's order the rows from here on are a layer's own and those of layers behind it: a feed-forward block's
 * norm may lie in front of the attention that comes before it. */
static inline size_t first_row(const Layer *l) {
    return l->kind == BLOCK_FEED ? l->up.weight : l->norm.weight;
}

/* ---- layers.cu: what each does, and shapes, stand there ---- */

void gelu_forward(real *g, real *dg, const real *bias, size_t R, size_t H);
void gelu_backward(real *dh, real *dg, size_t R, size_t H);
void norm_forward(const Transformer *m, const Norm *norm, real *y, real *mean, real *rstd, const real *x, size_t R);
void norm_backward(const Transformer *m, const Norm *norm, real *dx, const real *dy, const real *x, real *mean,
                   real *rstd, size_t R);
void multiply(const Transformer *m, const Linear *l, real *out, size_t ldo, int accumulate, const real *in, size_t ldi,
              size_t R);
void linear_forward(const Transformer *m, const Linear *l, real *out, size_t ldo, const real *residual, const real *in,
                    size_t ldi, size_t R);
void linear_backward(const Transformer *m, const Linear *l, real *din, int accumulate, const real *dout, const real *in,
                     size_t R);
void embed_forward(const Transformer *m, const Stack *s, real *x, const int32_t *ids, size_t B, size_t n,
                   const Cell *cell);
void embed_backward(const Transformer *m, const Stack *s, const real *dx, const int32_t *ids, size_t B, size_t n);

/* ---- attention.cu ---- */

enum {
    QUERY_BLOCK = 144, /* queries that attention treats at a time: their scores stay in cache */
    HEAD_MAX = 1024    /* channels of a head */
};

typedef struct {
    size_t B, heads, D, Tq, Tk;
    size_t key_stride; /* positions from one batch row's keys to the next's, >= Tk */
    int causal;        /* query i sees keys 0..i; Tq = Tk */
    const Cell *
        cell; /* (Tq), B = 1: decoding, from what is kept; each query sees its cell's keys or, when Tk > 0, 0..Tk-1 of its row */
    size_t unmasked; /* and the first `unmasked` positions see each other */
    int kept_bf16;   /* how keys and values are kept: bf16, or real */
} AttendShape;

void attend_forward(const AttendShape *s, real *y, real *p, real *scores, const real *q, const real *k, const real *v);
void attend_kept(const AttendShape *s, real *y, real *scores, const real *q, const void *k, const void *v);
void keep_positions(const AttendShape *s, void *kept, const real *x, size_t n);
static inline size_t kept_width(size_t D) {
    return (D + 15) / 16 * 16;
}
static inline size_t kept_bytes(const AttendShape *s) { /* of one number */
    return s->kept_bf16 ? sizeof(uint16_t) : sizeof(real);
}
void attend_backward(const AttendShape *s, real *dq, real *dk, real *dv, const real *dy, real *p, real *scores,
                     const real *q, const real *k, const real *v);

/* What layer l of stack s does in a pass. */
static inline AttendShape attend_shape(const Transformer *m, const Stack *s, const Layer *l, const Pass *pass) {
    int cross = l->kind == BLOCK_CROSS;
    AttendShape shape;
    shape.B = pass->B, shape.heads = l->heads, shape.D = l->D, shape.Tq = pass->n;
    shape.Tk = cross ? pass->T_context : pass->cell ? 0 : pass->n;
    shape.key_stride = cross ? pass->T_context : pass->stride;
    shape.causal = pass->causal && !cross;
    shape.cell = pass->cell;
    shape.unmasked = s->unmasked;
    shape.kept_bf16 = m->format != WEIGHTS_REAL;
    return shape;
}

/* ---- transformer.cu ---- */

/* Every ids[i] must be in lo..end-1; an error names `what`. */
Err check_ids(const char *what, const int32_t *ids, size_t n, int32_t lo, size_t end);
Err check_batch(const Transformer *m, const int32_t *x_t, const int32_t *t, const int32_t *label, size_t B, size_t N);
Err take_batch(Transformer *m, const int32_t *x, const int32_t *x_t, const int32_t *t, const int32_t *label, size_t B,
               size_t N);
/* ids (B,P+n) = [t, (label,) tokens[b,0..n-1]]; rows of tokens are `stride` apart. */
void prompted_ids(const NetConfig *c, int32_t *ids, const int32_t *t, const int32_t *label, const int32_t *tokens,
                  size_t stride, size_t B, size_t n);
Pass whole_pass(const Stack *s, size_t B, size_t n, const real *context, size_t T_context);
/* Keys and values of source (B,n,C), or of cells (n,C), join those of a layer, which has room for `stride`
 * positions. */
void project_keys(const Transformer *m, const Layer *l, const AttendShape *s, const real *source, size_t n);
void stack_forward(Transformer *m, Stack *s, const int32_t *ids, const Pass *pass, size_t skip);
void head_forward(Transformer *m, size_t B, size_t n, const Cell *cell);

#ifndef DEVICE_CODE
/* ---- Elementwise mathematics. In float: polynomials, good to 1e-7, that compilers turn into vector code ---- */

#ifdef REAL_DOUBLE
static inline real exp_negative(real x) {
    return exp(x);
}
static inline real log_positive(real x) {
    return log(x);
}

/* *cdf = P(z < x), *pdf = its derivative, for z ~ N(0,1) */
static inline void normal_distribution(real *cdf, real *pdf, real x) {
    *cdf = 0.5 * erfc(-x * 0.70710678118654752440);
    *pdf = 0.39894228040143267794 * exp(-0.5 * x * x);
}
#else
static inline uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}
static inline float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* e^x for x <= 0; 0 below -87. x = n ln 2 + r, |r| <= ln(2)/2; 2^n is added to the exponent bits of e^r. Adding
 * 1.5 * 2^23 rounds to the whole number n and leaves it in the low bits. */
static inline real exp_negative(real x) {
    const float round = 12582912.0f, ln2_high = 0.693145751953125f, ln2_low = 1.428606820e-6f;
    float y = x < -87.0f ? -87.0f : x;
    float shifted = y * 1.44269504f + round, n = shifted - round;
    float r = (y - n * ln2_high) - n * ln2_low;
    const float taylor[7] = {1, 1, 1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720};
    float e = 1.0f / 5040;
    for (int k = 6; k >= 0; k--) e = e * r + taylor[k];
    float result = float_of(bits_of(e) + (bits_of(shifted) << 23));
    return x < -87.0f ? 0.0f : result; /* NaN stays NaN */
}

/* ln x for normal x > 0: x = 2^e f with f in [sqrt(1/2), sqrt 2), ln f = 2 artanh((f-1)/(f+1)). */
static inline real log_positive(real x) {
    const uint32_t sqrt_half = 0x3f3504f3u;
    uint32_t u = bits_of(x) - sqrt_half + (127u << 23);
    float e = (float)((int32_t)(u >> 23) - 127), f = float_of((u & 0x7fffffu) + sqrt_half);
    float s = (f - 1) / (f + 1), s2 = s * s;
    float series = 1.0f + s2 * (1.0f / 3 + s2 * (1.0f / 5 + s2 * (1.0f / 7 + s2 * (1.0f / 9))));
    return e * 0.69314718f + 2 * s * series;
}

/* *cdf = P(z < x), *pdf = its derivative, for z ~ N(0,1). The tail beyond a = |x| is exp(-a^2/2) u w(u) with
 * u = 1/(1+0.26a); w is a polynomial fitted to 6e-9 relative by Chebyshev interpolation on 0 <= a <= 9. */
static inline void normal_distribution(real *cdf, real *pdf, real x) {
    const float w[9] = {0.10379182f,  0.10251124f, 0.10634528f,  0.038958745f, 0.18764427f,
                        -0.18772396f, 0.28233662f, -0.16725112f, 0.033387092f};
    float a = x < 0 ? -x : x, u = 1 / (1 + 0.26f * a), bell = exp_negative(-0.5f * a * a), sum = w[8];
    for (int k = 7; k >= 0; k--) sum = sum * u + w[k];
    float tail = bell * u * sum;
    *cdf = x < 0 ? tail : 1 - tail;
    *pdf = 0.398942280f * bell;
}
#endif

static inline real dot(const real *a, const real *b, size_t n) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static inline real max_of(const real *x, size_t n) {
    real largest = x[0];
#pragma omp simd reduction(max : largest)
    for (size_t i = 0; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

/* How many threads a loop over that many elements is worth. */
static inline int threads_for(size_t elements) {
    return elements > SMALL_WORK ? threads_free() : 1;
}
#endif

#ifdef __cplusplus
}
#endif
#endif
