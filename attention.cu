/* attention.cu - softmax(q k^T / sqrt(D)) v, forward and backward, and query by query as decoding has it.
 *
 * Heads run in parallel, up to QUERY_BLOCK queries at a time, so that their scores stay in cache. Prototypes:
 * transformer.h. */
#include "transformer.h"

#ifndef DEVICE_CODE
/* Keys 0..visible-1 are seen by query i; never falls with i. */
static size_t visible(const AttendShape *s, size_t i) {
    if (!s->causal) return s->Tk;
    return i < s->unmasked ? min_size(s->unmasked, s->Tk) : i + 1;
}

/* Queries at a time, equal shares: large blocks read keys and values less often, but causal ones see more in vain. */
static size_t query_rows(const AttendShape *s) {
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

/* attend_forward    y = softmax(q k^T / sqrt(D), over the visible keys) v, for every batch row and head
 * attend_backward   dq, dk, dv overwritten, from dy and the probabilities p of forward
 *   q, y (B,Tq,heads*D)   k, v (B,key_stride,heads*D)   p (B,heads,Tq,Tk), beyond the visible keys unspecified
 *   scores (B*heads, QUERY_BLOCK, Tk): work space; forward uses it when p is NULL. backward needs key_stride = Tk. */
typedef struct {
    const AttendShape *s;
    const real *q, *k, *v, *dy;
    real *y, *p, *scores, *dq, *dk, *dv;
} Attend;

static void attend_forward_head(void *context, size_t task) {
    const Attend *a = (const Attend *)context;
    const AttendShape *s = a->s;
    const size_t inner = s->heads * s->D, b = task / s->heads, h = task % s->heads, block = query_rows(s);
    const size_t at_key = b * s->key_stride * inner + h * s->D;
    const real scale = (real)(1 / sqrt((double)s->D));
    for (size_t i0 = 0; i0 < s->Tq; i0 += block) {
        const size_t rows = min_size(block, s->Tq - i0), keys = visible(s, i0 + rows - 1);
        const size_t at = (b * s->Tq + i0) * inner + h * s->D;
        real *pi = a->p ? a->p + (task * s->Tq + i0) * s->Tk : a->scores + task * QUERY_BLOCK * s->Tk;
        gemm(0, 1, rows, keys, s->D, a->q + at, inner, a->k + at_key, inner, 0, pi, s->Tk);
        for (size_t i = 0; i < rows; i++) softmax_row(pi + i * s->Tk, visible(s, i0 + i), keys, scale);
        gemm(0, 0, rows, s->D, keys, pi, s->Tk, a->v + at_key, inner, 0, a->y + at, inner);
    }
}

void attend_forward(const AttendShape *s, real *y, real *p, real *scores, const real *q, const real *k, const real *v) {
    Attend a = {s, q, k, v, NULL, y, p, scores, NULL, NULL, NULL};
    parallel_for(threads_free(), s->B * s->heads, attend_forward_head, &a);
}

/* ---- Kept keys and values ----
 *
 * Decoding keeps keys and values, a head's positions one after the other, D padded with zeros to kept_width(D): with packed
 * weights rounded to bf16, and then whole sequences go the same way, one query at a time, so that decoding with kept keys
 * equals them bit for bit. A query among others gives the same bits as alone. */

/* attend_kept      y = softmax(q k^T / sqrt(D), over the visible keys) v, for every batch row and head, or cell and head
 * keep_positions   kept (B,heads,key_stride,width) at 0..n-1, or where the cells say, = x (B,n,heads*D)
 *   q, y (B,Tq,heads*D)   k, v as kept   scores (B*heads, QUERY_BLOCK, Tk): work space */
typedef struct {
    const AttendShape *s;
    const real *q;
    const char *k, *v;
    real *y, *scores;
} AttendKept;

/* Row r of q, head h, with the first `keys` of batch row b. */
static void attend_kept_query(const AttendKept *a, size_t b, size_t h, size_t r, size_t keys, real *p) {
    const AttendShape *s = a->s;
    const size_t D = s->D, width = kept_width(D);
    const size_t at = (b * s->heads + h) * s->key_stride * width * kept_bytes(s);
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
    const AttendShape *s = a->s;
    const size_t b = task / s->heads, h = task % s->heads;
    for (size_t i = 0; i < s->Tq; i++)
        attend_kept_query(a, b, h, b * s->Tq + i, visible(s, i), a->scores + task * QUERY_BLOCK * s->Tk);
}

static void attend_kept_cell(void *context, size_t task) {
    const AttendKept *a = (const AttendKept *)context;
    const AttendShape *s = a->s;
    const size_t h = task / s->Tq, r = task % s->Tq, keys = s->Tk ? s->Tk : s->cell[r].visible;
    attend_kept_query(a, s->cell[r].b, h, r, keys, a->scores + task * s->key_stride);
}

void attend_kept(const AttendShape *s, real *y, real *scores, const real *q, const void *k, const void *v) {
    AttendKept a = {s, q, (const char *)k, (const char *)v, y, scores};
    const int threads = threads_for(s->B * s->Tq * s->key_stride * s->heads * s->D);
    if (s->cell)
        parallel_for(threads, s->Tq * s->heads, attend_kept_cell, &a);
    else
        parallel_for(threads, s->B * s->heads, attend_kept_head, &a);
}

typedef struct {
    const AttendShape *s;
    char *kept;
    const real *x;
    size_t n;
} Keep;

static void keep_row(void *context, size_t r) {
    const Keep *a = (const Keep *)context;
    const AttendShape *s = a->s;
    const size_t width = kept_width(s->D), b = s->cell ? s->cell[r].b : r / a->n,
                 at = s->cell ? s->cell[r].pos : r % a->n;
    for (size_t h = 0; h < s->heads; h++) {
        const size_t bytes = kept_bytes(s);
        char *to = a->kept + ((b * s->heads + h) * s->key_stride + at) * width * bytes;
        const real *x = a->x + (r * s->heads + h) * s->D;
        if (s->kept_bf16)
            round_bf16((uint16_t *)(void *)to, x, s->D);
        else
            memcpy(to, x, s->D * bytes);
        memset(to + s->D * bytes, 0, (width - s->D) * bytes);
    }
}

void keep_positions(const AttendShape *s, void *kept, const real *x, size_t n) {
    Keep a = {s, (char *)kept, x, n};
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
    const AttendShape *s = a->s;
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
        gemm(1, 0, keys, s->D, rows, pi, s->Tk, a->dy + at, inner, 1, dv, inner);
        gemm(0, 1, rows, keys, s->D, a->dy + at, inner, a->v + at_key, inner, 0, ds, s->Tk);
        softmax_backward(ds, pi, rows, keys, s->Tk, scale);
        gemm(0, 0, rows, s->D, keys, ds, s->Tk, a->k + at_key, inner, 0, a->dq + at, inner);
        gemm(1, 0, keys, s->D, rows, ds, s->Tk, a->q + at, inner, 1, dk, inner);
    }
}

void attend_backward(const AttendShape *s, real *dq, real *dk, real *dv, const real *dy, real *p, real *scores,
                     const real *q, const real *k, const real *v) {
    Attend a = {s, q, k, v, dy, NULL, p, scores, dq, dk, dv};
    parallel_for(threads_free(), s->B * s->heads, attend_backward_head, &a);
}
#else

/* ---- The twins ----
 *
 * Scores never leave the chip: a block holds TILE queries of one head and goes through the keys TILE at a time, keeping for
 * each query the largest score so far, the sum of exponentials relative to it, and the output relative to it (Milakov and
 * Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention"). Any number of keys
 * will do. Forward leaves lse, the logarithm of the sum, from which backward gets the probabilities again.
 *
 * 256 threads stand as 16 x 16: thread (tx,ty) has queries ty + 16a and keys or channels tx + 16b, so that 16 lanes that
 * share a query can add up by exchanging. Tiles lie in shared memory as float, rows of D+1 or TILE+1: the odd stride puts
 * what 16 lanes read in different banks. */

enum { TILE = 64, SIDE = 16, PER_SIDE = TILE / SIDE, ATTEND_THREADS = SIDE * SIDE, GPU_HEAD_MAX = 128 };

static __device__ inline size_t visible_keys(const AttendShape *s, size_t i) {
    if (!s->causal) return s->Tk;
    const size_t corner = s->unmasked < s->Tk ? s->unmasked : s->Tk;
    return i < s->unmasked ? corner : i + 1;
}

/* tile (TILE,D+1) = scale * rows first.. of x, which has `rows` of them, stride apart; zeros beyond */
static __device__ inline void load_tile(float *tile, const floatX *x, size_t first, size_t rows, size_t stride, int D,
                                        float scale) {
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    for (int r = ty; r < TILE; r += SIDE)
        for (int c = tx; c < D; c += SIDE)
            tile[r * (D + 1) + c] = first + r < rows ? scale * to_float(x[(first + r) * stride + c]) : 0;
}

/* sum[a][b] = row ty+16a of x times row tx+16b of y, each of n numbers, rows stride apart */
static __device__ inline void multiply_rows(float sum[PER_SIDE][PER_SIDE], const float *x, const float *y, int n,
                                            int stride) {
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    for (int a = 0; a < PER_SIDE; a++)
        for (int b = 0; b < PER_SIDE; b++) sum[a][b] = 0;
    for (int c = 0; c < n; c++) {
        float xs[PER_SIDE], ys[PER_SIDE];
        for (int a = 0; a < PER_SIDE; a++) xs[a] = x[(ty + SIDE * a) * stride + c];
        for (int b = 0; b < PER_SIDE; b++) ys[b] = y[(tx + SIDE * b) * stride + c];
        for (int a = 0; a < PER_SIDE; a++)
            for (int b = 0; b < PER_SIDE; b++) sum[a][b] += xs[a] * ys[b];
    }
}

/* sum[a][b] += sum_j w[ty+16a, j] x[j, tx+16b]; with turned, w[j, ty+16a]. w (TILE,TILE+1), x (TILE,D+1). CHANNELS: how
 * many times 16 channels there can be. */
template <int CHANNELS>
static __device__ inline void weigh_rows(float sum[PER_SIDE][CHANNELS], const float *w, int turned, const float *x,
                                         int D) {
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    for (int j = 0; j < TILE; j++) {
        float ws[PER_SIDE];
        for (int a = 0; a < PER_SIDE; a++)
            ws[a] = turned ? w[j * (TILE + 1) + ty + SIDE * a] : w[(ty + SIDE * a) * (TILE + 1) + j];
#pragma unroll
        for (int b = 0; b < CHANNELS; b++) {
            if (tx + SIDE * b >= D) continue;
            const float v = x[j * (D + 1) + tx + SIDE * b];
            for (int a = 0; a < PER_SIDE; a++) sum[a][b] += ws[a] * v;
        }
    }
}

static __device__ inline float side_max(float x) {
    for (int k = SIDE / 2; k; k /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, k));
    return x;
}
static __device__ inline float side_sum(float x) {
    for (int k = SIDE / 2; k; k /= 2) x += __shfl_xor_sync(0xffffffffu, x, k);
    return x;
}

/* Where head h of batch row b begins in q, y (B,Tq,inner), k, v (B,key_stride,inner). A block is tile blockIdx.x of head
 * blockIdx.y. */
typedef struct {
    size_t queries, keys, inner, row; /* row: of lse (B*heads,Tq) */
} HeadAt;
static __device__ inline HeadAt head_at(const AttendShape *s) {
    const size_t b = blockIdx.y / s->heads, h = blockIdx.y % s->heads;
    HeadAt at;
    at.inner = s->heads * s->D;
    at.queries = b * s->Tq * at.inner + h * s->D, at.keys = b * s->key_stride * at.inner + h * s->D;
    at.row = blockIdx.y * s->Tq;
    return at;
}

template <int CHANNELS>
static __global__ void __launch_bounds__(ATTEND_THREADS)
    attend_forward_kernel(AttendShape s, floatX *y, float *lse, const floatX *q, const floatX *k, const floatX *v) {
    SHARED(float, queries);
    const int D = (int)s.D, tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    float *keys = queries + TILE * (D + 1), *p = keys + TILE * (D + 1); /* keys, then values; probabilities */
    const HeadAt at = head_at(&s);
    const size_t i0 = (size_t)blockIdx.x * TILE, last = i0 + TILE < s.Tq ? i0 + TILE - 1 : s.Tq - 1;
    float out[PER_SIDE][CHANNELS], largest[PER_SIDE], sum[PER_SIDE];
    for (int a = 0; a < PER_SIDE; a++) {
        largest[a] = -HUGE_VALF, sum[a] = 0;
#pragma unroll
        for (int b = 0; b < CHANNELS; b++) out[a][b] = 0;
    }
    load_tile(queries, q + at.queries, i0, s.Tq, at.inner, D, 1 / sqrtf((float)D));
    for (size_t j0 = 0; j0 < visible_keys(&s, last); j0 += TILE) {
        float score[PER_SIDE][PER_SIDE];
        __syncthreads();
        load_tile(keys, k + at.keys, j0, s.Tk, at.inner, D, 1);
        __syncthreads();
        multiply_rows(score, queries, keys, D, D + 1);
        for (int a = 0; a < PER_SIDE; a++) {
            const size_t i = i0 + ty + SIDE * a, seen = visible_keys(&s, i);
            float peak = largest[a], part = 0;
            for (int b = 0; b < PER_SIDE; b++) {
                if (j0 + tx + SIDE * b >= seen) score[a][b] = -HUGE_VALF;
                peak = fmaxf(peak, score[a][b]);
            }
            peak = side_max(peak);
            const float fade = peak == -HUGE_VALF ? 1 : expf(largest[a] - peak);
            for (int b = 0; b < PER_SIDE; b++) {
                const float e = score[a][b] == -HUGE_VALF ? 0 : expf(score[a][b] - peak);
                p[(ty + SIDE * a) * (TILE + 1) + tx + SIDE * b] = e;
                part += e;
            }
            sum[a] = sum[a] * fade + side_sum(part);
            largest[a] = peak;
#pragma unroll
            for (int b = 0; b < CHANNELS; b++) out[a][b] *= fade;
        }
        __syncthreads();
        load_tile(keys, v + at.keys, j0, s.Tk, at.inner, D, 1);
        __syncthreads();
        weigh_rows<CHANNELS>(out, p, 0, keys, D);
    }
    for (int a = 0; a < PER_SIDE; a++) {
        const size_t i = i0 + ty + SIDE * a;
        if (i >= s.Tq) continue;
#pragma unroll
        for (int b = 0; b < CHANNELS; b++)
            if (tx + SIDE * b < D) y[at.queries + i * at.inner + tx + SIDE * b] = to_floatX(out[a][b] / sum[a]);
        if (tx == 0 && lse) lse[at.row + i] = largest[a] + logf(sum[a]);
    }
}

static Err check_head(const AttendShape *s) {
    if (s->D <= GPU_HEAD_MAX) return OK;
    return err("transformer: heads of %zu channels; on the GPU they may have %d", s->D, (int)GPU_HEAD_MAX);
}

static Err attend_forward_cuda(Device *d, const AttendShape *s, floatX *y, float *lse, const floatX *q, const floatX *k,
                               const floatX *v) {
    const dim3 grid(blocks_for(s->Tq, TILE), (unsigned)(s->B * s->heads));
    const size_t bytes = TILE * (2 * (s->D + 1) + TILE + 1) * sizeof(float);
    TRY(check_head(s));
    if (s->D <= 64)
        LAUNCH(d, attend_forward_kernel<4>, grid, ATTEND_THREADS, bytes, *s, y, lse, q, k, v);
    else
        LAUNCH(d, attend_forward_kernel<8>, grid, ATTEND_THREADS, bytes, *s, y, lse, q, k, v);
    return OK;
}

/* Backward. With p the probabilities and delta_i = sum_d dy[i,d] y[i,d], which equals sum_j p_ij dp_ij:
 *     dv = p^T dy     dp = dy v^T     ds = p (dp - delta)     dq = ds k / sqrt(D)     dk = ds^T q / sqrt(D)
 * One kernel has a tile of queries and gives dq, the other a tile of keys and gives dk and dv: both form p and ds anew, and
 * nobody adds to what another block writes. */

/* delta (B*heads,Tq): a warp per row. */
static __global__ void attend_delta_kernel(AttendShape s, float *delta, const floatX *dy, const floatX *y) {
    const size_t r = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (r >= s.B * s.heads * s.Tq) return;
    const size_t i = r % s.Tq, b = r / s.Tq / s.heads, h = r / s.Tq % s.heads;
    const size_t at = (b * s.Tq + i) * s.heads * s.D + h * s.D;
    float sum = 0;
    for (size_t c = lane; c < s.D; c += WARP) sum += to_float(dy[at + c]) * to_float(y[at + c]);
    sum = warp_sum(sum);
    if (lane == 0) delta[r] = sum;
}

/* p and dp of queries i0.. and keys j0.., whose tiles are in shared memory, become p and ds. */
static __device__ inline void softmax_gradient(float p[PER_SIDE][PER_SIDE], float dp[PER_SIDE][PER_SIDE],
                                               const AttendShape *s, const float *lse, const float *delta, size_t i0,
                                               size_t j0) {
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    for (int a = 0; a < PER_SIDE; a++) {
        const size_t i = i0 + ty + SIDE * a, seen = i < s->Tq ? visible_keys(s, i) : 0;
        const float log_sum = i < s->Tq ? lse[i] : 0, mean = i < s->Tq ? delta[i] : 0;
        for (int b = 0; b < PER_SIDE; b++) {
            p[a][b] = j0 + tx + SIDE * b < seen ? expf(p[a][b] - log_sum) : 0;
            dp[a][b] = p[a][b] * (dp[a][b] - mean);
        }
    }
}

static __device__ inline void put_tile(float *tile, float x[PER_SIDE][PER_SIDE]) {
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    for (int a = 0; a < PER_SIDE; a++)
        for (int b = 0; b < PER_SIDE; b++) tile[(ty + SIDE * a) * (TILE + 1) + tx + SIDE * b] = x[a][b];
}

template <int CHANNELS>
static __device__ inline void put_rows(floatX *x, size_t first, size_t rows, size_t stride,
                                       float sum[PER_SIDE][CHANNELS], int D, float scale) {
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    for (int a = 0; a < PER_SIDE; a++) {
        const size_t i = first + ty + SIDE * a;
#pragma unroll
        for (int b = 0; b < CHANNELS; b++)
            if (i < rows && tx + SIDE * b < D) x[i * stride + tx + SIDE * b] = to_floatX(scale * sum[a][b]);
    }
}

typedef struct {
    AttendShape s;
    floatX *dq, *dk, *dv;
    const floatX *dy, *q, *k, *v;
    const float *lse, *delta;
} AttendBackward;

template <int CHANNELS>
static __global__ void __launch_bounds__(ATTEND_THREADS) attend_queries_kernel(AttendBackward x) {
    SHARED(float, queries);
    const AttendShape *s = &x.s;
    const int D = (int)s->D, tile = TILE * (D + 1);
    float *outs = queries + tile, *keys = outs + tile, *values = keys + tile, *ds = values + tile;
    const HeadAt at = head_at(s);
    const size_t i0 = (size_t)blockIdx.x * TILE, last = i0 + TILE < s->Tq ? i0 + TILE - 1 : s->Tq - 1;
    float dq[PER_SIDE][CHANNELS] = {};
    load_tile(queries, x.q + at.queries, i0, s->Tq, at.inner, D, 1 / sqrtf((float)D));
    load_tile(outs, x.dy + at.queries, i0, s->Tq, at.inner, D, 1);
    for (size_t j0 = 0; j0 < visible_keys(s, last); j0 += TILE) {
        float p[PER_SIDE][PER_SIDE], dp[PER_SIDE][PER_SIDE];
        __syncthreads();
        load_tile(keys, x.k + at.keys, j0, s->Tk, at.inner, D, 1);
        load_tile(values, x.v + at.keys, j0, s->Tk, at.inner, D, 1);
        __syncthreads();
        multiply_rows(p, queries, keys, D, D + 1);
        multiply_rows(dp, outs, values, D, D + 1);
        softmax_gradient(p, dp, s, x.lse + at.row, x.delta + at.row, i0, j0);
        put_tile(ds, dp);
        __syncthreads();
        weigh_rows<CHANNELS>(dq, ds, 0, keys, D);
    }
    put_rows<CHANNELS>(x.dq + at.queries, i0, s->Tq, at.inner, dq, D, 1 / sqrtf((float)D));
}

template <int CHANNELS> static __global__ void __launch_bounds__(ATTEND_THREADS) attend_keys_kernel(AttendBackward x) {
    SHARED(float, queries);
    const AttendShape *s = &x.s;
    const int D = (int)s->D, tile = TILE * (D + 1);
    float *outs = queries + tile, *keys = outs + tile, *values = keys + tile, *weights = values + tile;
    const HeadAt at = head_at(s);
    const size_t j0 = (size_t)blockIdx.x * TILE;
    float dk[PER_SIDE][CHANNELS] = {}, dv[PER_SIDE][CHANNELS] = {};
    load_tile(keys, x.k + at.keys, j0, s->Tk, at.inner, D, 1);
    load_tile(values, x.v + at.keys, j0, s->Tk, at.inner, D, 1);
    for (size_t i0 = 0; i0 < s->Tq; i0 += TILE) {
        const size_t last = i0 + TILE < s->Tq ? i0 + TILE - 1 : s->Tq - 1;
        float p[PER_SIDE][PER_SIDE], dp[PER_SIDE][PER_SIDE];
        if (visible_keys(s, last) <= j0) continue; /* none of these queries sees any of our keys */
        __syncthreads();
        load_tile(queries, x.q + at.queries, i0, s->Tq, at.inner, D, 1 / sqrtf((float)D));
        load_tile(outs, x.dy + at.queries, i0, s->Tq, at.inner, D, 1);
        __syncthreads();
        multiply_rows(p, queries, keys, D, D + 1);
        multiply_rows(dp, outs, values, D, D + 1);
        softmax_gradient(p, dp, s, x.lse + at.row, x.delta + at.row, i0, j0);
        put_tile(weights, p);
        __syncthreads();
        weigh_rows<CHANNELS>(dv, weights, 1, outs, D);
        __syncthreads();
        put_tile(weights, dp);
        __syncthreads();
        weigh_rows<CHANNELS>(dk, weights, 1, queries, D);
    }
    put_rows<CHANNELS>(x.dk + at.keys, j0, s->Tk, at.inner, dk, D, 1);
    put_rows<CHANNELS>(x.dv + at.keys, j0, s->Tk, at.inner, dv, D, 1);
}

/* delta (B*heads,Tq) is work space. */
static Err attend_backward_cuda(Device *d, const AttendShape *s, floatX *dq, floatX *dk, floatX *dv, const floatX *dy,
                                const floatX *y, const float *lse, float *delta, const floatX *q, const floatX *k,
                                const floatX *v) {
    const AttendBackward x = {*s, dq, dk, dv, dy, q, k, v, lse, delta};
    const dim3 queries(blocks_for(s->Tq, TILE), (unsigned)(s->B * s->heads)), keys(blocks_for(s->Tk, TILE), queries.y);
    const size_t bytes = TILE * (4 * (s->D + 1) + TILE + 1) * sizeof(float);
    TRY(check_head(s));
    LAUNCH(d, attend_delta_kernel, blocks_for(s->B * s->heads * s->Tq, ROW_WARPS), ROW_WARPS * WARP, 0, *s, delta, dy,
           y);
    if (s->D <= 64) {
        LAUNCH(d, attend_queries_kernel<4>, queries, ATTEND_THREADS, bytes, x);
        LAUNCH(d, attend_keys_kernel<4>, keys, ATTEND_THREADS, bytes, x);
    } else {
        LAUNCH(d, attend_queries_kernel<8>, queries, ATTEND_THREADS, bytes, x);
        LAUNCH(d, attend_keys_kernel<8>, keys, ATTEND_THREADS, bytes, x);
    }
    return OK;
}

/* ---- Decoding: n new queries (one, or a prompt) against all keys so far ---- */

/* A block per head and batch row: puts the new keys and values, rows (B,n,inner), in their places in the caches
 * (B,key_stride,inner) from position *pos on (NULL: all keys are there, s.Tk of them), then lets every new query see all.
 * Scores: a thread has keys of its own. Then a thread has a channel, and some of the keys: with D channels the threads are
 * `parts` groups. shared: query (D), scores (key_stride), sums (DECODE_THREADS). */
enum { DECODE_THREADS = 128 };

static __device__ inline void append_keys(const AttendShape *s, floatX *cache, const floatX *fresh, size_t pos) {
    const size_t b = blockIdx.x / s->heads, h = blockIdx.x % s->heads, inner = s->heads * s->D;
    for (size_t x = threadIdx.x; x < s->Tq * s->D; x += blockDim.x) {
        const size_t i = x / s->D, c = h * s->D + x % s->D;
        cache[(b * s->key_stride + pos + i) * inner + c] = fresh[(b * s->Tq + i) * inner + c];
    }
}

/* Of a block's x the largest, or the sum; shared (DECODE_THREADS / 32) */
static __device__ inline float block_max(float *shared, float x) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    x = shared[0];
    for (unsigned k = 1; k < blockDim.x / WARP; k++) x = fmaxf(x, shared[k]);
    return x;
}
static __device__ inline float block_sum(float *shared, float x) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    x = shared[0];
    for (unsigned k = 1; k < blockDim.x / WARP; k++) x += shared[k];
    return x;
}

/* y (D) of one query: p (keys) are its scores' memory. */
static __device__ inline void attend_one(const AttendShape *s, floatX *y, float *p, float *sums, const float *query,
                                         const floatX *k, const floatX *v, size_t keys) {
    const size_t inner = s->heads * s->D, D = s->D, parts = DECODE_THREADS / D ? DECODE_THREADS / D : 1;
    const size_t part = threadIdx.x / D, c = threadIdx.x % D;
    float peak = -HUGE_VALF, sum = 0, out = 0;
    for (size_t j = threadIdx.x; j < keys; j += blockDim.x) {
        float score = 0;
        for (size_t e = 0; e < D; e++) score += query[e] * to_float(k[j * inner + e]);
        p[j] = score, peak = fmaxf(peak, score);
    }
    peak = block_max(sums, peak);
    for (size_t j = threadIdx.x; j < keys; j += blockDim.x) sum += p[j] = expf(p[j] - peak);
    sum = block_sum(sums, sum);
    __syncthreads();
    for (size_t j = part; part < parts && j < keys; j += parts) out += p[j] * to_float(v[j * inner + c]);
    sums[threadIdx.x] = out;
    __syncthreads();
    if (part > 0) return;
    for (size_t other = 1; other < parts; other++) out += sums[other * D + c];
    y[c] = to_floatX(out / sum);
}

static __global__ void __launch_bounds__(DECODE_THREADS)
    attend_decode_kernel(AttendShape s, const int *pos, floatX *y, const floatX *q, floatX *k, floatX *v,
                         const floatX *new_k, const floatX *new_v) {
    SHARED(float, query);
    float *p = query + s.D, *sums = p + s.key_stride;
    const size_t b = blockIdx.x / s.heads, h = blockIdx.x % s.heads, inner = s.heads * s.D;
    const size_t keys = pos ? (size_t)*pos + s.Tq : s.Tk, at_key = b * s.key_stride * inner + h * s.D;
    if (pos) append_keys(&s, k, new_k, (size_t)*pos), append_keys(&s, v, new_v, (size_t)*pos);
    for (size_t i = 0; i < s.Tq; i++) {
        const size_t at = (b * s.Tq + i) * inner + h * s.D;
        __syncthreads();
        for (size_t c = threadIdx.x; c < s.D; c += blockDim.x) query[c] = to_float(q[at + c]) / sqrtf((float)s.D);
        __syncthreads();
        attend_one(&s, y + at, p, sums, query, k + at_key, v + at_key, keys);
    }
}

static Err attend_decode_cuda(Device *d, const AttendShape *s, const int *pos, floatX *y, const floatX *q, floatX *k,
                              floatX *v, const floatX *new_k, const floatX *new_v) {
    TRY(check_head(s));
    LAUNCH(d, attend_decode_kernel, (unsigned)(s->B * s->heads), DECODE_THREADS,
           (s->D + s->key_stride + DECODE_THREADS) * sizeof(float), *s, pos, y, q, k, v, new_k, new_v);
    return OK;
}
#endif
