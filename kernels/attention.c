/* attention.c - softmax(q k^T / sqrt(D)) v, forward and backward, and query by query as decoding has it.
 *
 * The fellows of the plain loops in transformer.cu, where formula and shapes stand. Heads run in parallel, up to
 * QUERY_BLOCK queries at a time, so that their scores stay in cache. */
#include "kernels/math.h"

enum { QUERY_BLOCK = 144 }; /* queries that attention treats at a time */

/* Scratch: the scores of a block of queries for every batch row and head, (B*heads, QUERY_BLOCK, key_stride); while
 * decoding, those of every query and head, (Tq*heads, key_stride). */
size_t attention_needs_fast(const Compute *on, const Attention *s, int backward) {
    (void)on, (void)backward;
    return s->B * s->heads * max_size(QUERY_BLOCK, s->B == 1 ? s->Tq : 0) * s->key_stride * sizeof(real);
}

/* Forward leaves the probabilities p (B,heads,Tq,Tk); beyond the visible keys they are unspecified. */
size_t attention_saved_fast(const Attention *s) {
    return s->B * s->heads * s->Tq * s->Tk * sizeof(real);
}

/* Keys 0..visible-1 are seen by query i; never falls with i. */
static size_t visible(const Attention *s, size_t i) {
    if (!s->causal) return s->Tk;
    return i < s->unmasked ? min_size(s->unmasked, s->Tk) : i + 1;
}

/* Queries at a time, equal shares: large blocks read keys and values less often, but causal ones see more in vain. */
static size_t query_rows(const Attention *s) {
    const size_t most = s->causal ? QUERY_BLOCK / 2 : QUERY_BLOCK;
    return ceil_div(s->Tq, ceil_div(s->Tq, most));
}

/* s[0..n-1] = softmax(scale * s), s[n..end-1] = 0 */
static void softmax_row(real *s, size_t n, size_t end, real scale) {
    real largest = max_of(s, n), sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t j = 0; j < n; j++) {
        s[j] = exp_negative((s[j] - largest) * scale);
        sum += s[j];
    }
    const real norm = 1 / sum;
#pragma omp simd
    for (size_t j = 0; j < n; j++) s[j] *= norm;
    for (size_t j = n; j < end; j++) s[j] = 0;
}

typedef struct {
    const Attention *s;
    const real *q, *k, *v, *dy;
    real *y, *scores, *dq, *dk, *dv;
    real *p; /* NULL: the probabilities are not kept */
    Precision precision;
} Attend;

static void attend_forward_head(void *context, size_t task) {
    const Attend *a = (const Attend *)context;
    const Attention *s = a->s;
    const size_t inner = s->heads * s->D, b = task / s->heads, h = task % s->heads, block = query_rows(s);
    const size_t at_key = b * s->key_stride * inner + h * s->D;
    const real scale = (real)(1 / sqrt((double)s->D));
    for (size_t i0 = 0; i0 < s->Tq; i0 += block) {
        const size_t rows = min_size(block, s->Tq - i0), keys = visible(s, i0 + rows - 1);
        const size_t at = (b * s->Tq + i0) * inner + h * s->D;
        real *pi = a->p ? a->p + (task * s->Tq + i0) * s->Tk : a->scores + task * QUERY_BLOCK * s->Tk;
        gemm(a->precision, 0, 1, rows, keys, s->D, a->q + at, inner, a->k + at_key, inner, 0, pi, s->Tk);
        for (size_t i = 0; i < rows; i++) softmax_row(pi + i * s->Tk, visible(s, i0 + i), keys, scale);
        gemm(a->precision, 0, 0, rows, s->D, keys, pi, s->Tk, a->v + at_key, inner, 0, a->y + at, inner);
    }
}

void attention_forward_fast(const Compute *on, real *y, real *saved, const real *q, const real *k, const real *v,
                            const Attention *s) {
    Attend a = {
        .s = s, .q = q, .k = k, .v = v, .y = y, .p = saved, .scores = (real *)on->scratch, .precision = on->precision};
    parallel_work(threads_free(), s->B * s->heads, attend_forward_head, &a);
}

/* ---- Kept keys and values ----
 *
 * Decoding keeps keys and values, a head's positions one after the other, D padded with zeros to kept_width(D): with
 * packed weights rounded to bf16, and then whole sequences go the same way, one query at a time, so that decoding with
 * kept keys equals them bit for bit. A query among others gives the same bits as alone. */

static inline size_t kept_width(size_t D) {
    return round_up(D, 16);
}
static inline size_t kept_number(const Attention *s) { /* its bytes */
    return s->kept_bf16 ? sizeof(uint16_t) : sizeof(real);
}

/* kept (B,heads,key_stride,width) */
size_t kept_bytes_fast(const Compute *on, const Attention *s) {
    (void)on;
    return s->B * s->heads * s->key_stride * kept_width(s->D) * kept_number(s);
}

typedef struct {
    const Attention *s;
    const real *q;
    const char *k, *v;
    real *y, *scores;
} AttendKept;

/* Row r of q, head h, with the first `keys` of batch row b. */
static void attend_kept_query(const AttendKept *a, size_t b, size_t h, size_t r, size_t keys, real *p) {
    const Attention *s = a->s;
    const size_t D = s->D, width = kept_width(D);
    const size_t at = (b * s->heads + h) * s->key_stride * width * kept_number(s);
    const size_t row = (r * s->heads + h) * D;
    real padded[HEAD_MAX];
    memcpy(padded, a->q + row, D * sizeof *padded);
    for (size_t d = D; d < width; d++) padded[d] = 0;
    kept_dots(s->kept_bf16, p, padded, a->k + at, keys, width);
    softmax_row(p, keys, keys, (real)(1 / sqrt((double)D)));
    kept_weighted(s->kept_bf16, padded, p, a->v + at, keys, width);
    memcpy(a->y + row, padded, D * sizeof *padded);
}

static void attend_kept_head(void *context, size_t task) {
    const AttendKept *a = (const AttendKept *)context;
    const Attention *s = a->s;
    const size_t b = task / s->heads, h = task % s->heads;
    for (size_t i = 0; i < s->Tq; i++)
        attend_kept_query(a, b, h, b * s->Tq + i, visible(s, i), a->scores + task * QUERY_BLOCK * s->Tk);
}

static void attend_kept_position(void *context, size_t task) {
    const AttendKept *a = (const AttendKept *)context;
    const Attention *s = a->s;
    const size_t h = task / s->Tq, r = task % s->Tq, keys = s->Tk ? s->Tk : s->position[r].visible;
    attend_kept_query(a, s->position[r].b, h, r, keys, a->scores + task * s->key_stride);
}

void attention_from_kept_fast(const Compute *on, real *y, const real *q, const void *k, const void *v,
                              const Attention *s) {
    AttendKept a = {s, q, (const char *)k, (const char *)v, y, (real *)on->scratch};
    const int threads = threads_for(s->B * s->Tq * s->key_stride * s->heads * s->D);
    if (s->position)
        parallel_for(threads, s->Tq * s->heads, attend_kept_position, &a);
    else
        parallel_for(threads, s->B * s->heads, attend_kept_head, &a);
}

typedef struct {
    const Attention *s;
    char *kept;
    const real *x;
    size_t n;
} Keep;

static void keep_row(void *context, size_t r) {
    const Keep *a = (const Keep *)context;
    const Attention *s = a->s;
    const size_t width = kept_width(s->D), b = s->position ? s->position[r].b : r / a->n,
                 at = s->position ? s->position[r].pos : r % a->n;
    for (size_t h = 0; h < s->heads; h++) {
        const size_t bytes = kept_number(s);
        char *to = a->kept + ((b * s->heads + h) * s->key_stride + at) * width * bytes;
        const real *x = a->x + (r * s->heads + h) * s->D;
        if (s->kept_bf16)
            round_bf16((uint16_t *)(void *)to, x, s->D);
        else
            memcpy(to, x, s->D * bytes);
        memset(to + s->D * bytes, 0, (width - s->D) * bytes);
    }
}

void keep_positions_fast(const Compute *on, void *kept, const real *x, size_t n, const Attention *s) {
    Keep a = {s, (char *)kept, x, n};
    (void)on;
    parallel_for(threads_for(s->B * n * s->heads * s->D), s->B * n, keep_row, &a);
}

/* ---- Backward ---- */

/* ds (rows,keys; Tk apart) holds dp; becomes the gradient of q k^T: p (dp - sum_j p dp) scale */
static void softmax_backward(real *ds, const real *p, size_t rows, size_t keys, size_t Tk, real scale) {
    for (size_t i = 0; i < rows; i++) {
        real *d = ds + i * Tk;
        const real *pi = p + i * Tk, mean = dot(d, pi, keys);
#pragma omp simd
        for (size_t j = 0; j < keys; j++) d[j] = pi[j] * (d[j] - mean) * scale;
    }
}

static void attend_backward_head(void *context, size_t task) {
    const Attend *a = (const Attend *)context;
    const Attention *s = a->s;
    const size_t inner = s->heads * s->D, b = task / s->heads, h = task % s->heads, block = query_rows(s);
    const size_t at_key = b * s->Tk * inner + h * s->D;
    const real scale = (real)(1 / sqrt((double)s->D));
    real *ds = a->scores + task * QUERY_BLOCK * s->Tk, *dk = a->dk + at_key, *dv = a->dv + at_key;
    for (size_t j = 0; j < s->Tk; j++) {
        memset(dk + j * inner, 0, s->D * sizeof *dk);
        memset(dv + j * inner, 0, s->D * sizeof *dv);
    }
    for (size_t i0 = 0; i0 < s->Tq; i0 += block) {
        const size_t rows = min_size(block, s->Tq - i0), keys = visible(s, i0 + rows - 1);
        const size_t at = (b * s->Tq + i0) * inner + h * s->D;
        const real *pi = a->p + (task * s->Tq + i0) * s->Tk;
        gemm(a->precision, 1, 0, keys, s->D, rows, pi, s->Tk, a->dy + at, inner, 1, dv, inner);
        gemm(a->precision, 0, 1, rows, keys, s->D, a->dy + at, inner, a->v + at_key, inner, 0, ds, s->Tk);
        softmax_backward(ds, pi, rows, keys, s->Tk, scale);
        gemm(a->precision, 0, 0, rows, s->D, keys, ds, s->Tk, a->k + at_key, inner, 0, a->dq + at, inner);
        gemm(a->precision, 1, 0, keys, s->D, rows, ds, s->Tk, a->q + at, inner, 1, dk, inner);
    }
}

void attention_backward_fast(const Compute *on, real *dq, real *dk, real *dv, const real *dy, const real *y,
                             const real *saved, const real *q, const real *k, const real *v, const Attention *s) {
    Attend a = {.s = s, .q = q, .k = k, .v = v, .dy = dy, .p = (real *)saved, .scores = (real *)on->scratch};
    (void)y;
    a.dq = dq, a.dk = dk, a.dv = dv, a.precision = on->precision;
    parallel_for(threads_free(), s->B * s->heads, attend_backward_head, &a);
}
