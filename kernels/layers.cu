/* layers.cu - the layers of the transformer but attention on a GPU: layer norm, linear, GELU, embedding, head
 * variants. (The embedding's kernel stands at the end of transformer.cu.)
 *
 * Each is the fellow of the plain loop of the same name in transformer.cu, where formula and shapes stand. device.cu
 * includes this file. */
#include "kernels/device.h"

/* ---- Layer norm ---- */

/* The residual stream x and its gradient dx are float. Row r of what is normalised is this row of x: the first `skip` of
 * every n rows are left out. */
static __device__ inline size_t source_row(size_t r, size_t n, size_t skip) {
    const size_t kept = n - skip;
    return skip ? r / kept * n + skip + r % kept
                : r; /* a division takes longer than all else that is done to a number */
}

/* A warp per row, so that no barrier is needed: 4 rows a block. Lanes read neighbours; a row stays in cache for the
 * second and third reading. */
static __global__ void norm_forward_kernel(floatX *y, float *mean, float *rstd, const float *x, const float *weight,
                                           const float *bias, size_t R, size_t C, size_t n, size_t skip, float eps) {
    const size_t r = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (r >= R) return;
    const float *row = x + source_row(r, n, skip) * C;
    float sum = 0, square = 0;
    for (size_t c = lane; c < C; c += WARP) sum += row[c];
    const float mu = warp_sum(sum) / (float)C;
    for (size_t c = lane; c < C; c += WARP) square += (row[c] - mu) * (row[c] - mu);
    const float s = 1 / sqrtf(warp_sum(square) / (float)C + eps);
    for (size_t c = lane; c < C; c += WARP) y[r * C + c] = to_floatX((row[c] - mu) * s * weight[c] + bias[c]);
    if (lane == 0) mean[r] = mu, rstd[r] = s;
}

enum { ROW_WARPS = 4 }; /* rows of a block, where a warp has one */

static Err norm_forward_gpu(const Compute *on, real *y, real *mean, real *rstd, const real *x, const real *weight,
                            const real *bias, size_t R, size_t C, size_t n, size_t skip) {
    LAUNCH(on->device, norm_forward_kernel, blocks_for(R, ROW_WARPS), ROW_WARPS * WARP, 0, (floatX *)y, mean, rstd, x,
           weight, bias, R, C, n, skip, (float)LAYER_NORM_EPS);
    return OK;
}

/* ---- Sums over rows: each block adds up a slice of the rows, then a second kernel the slices. The order depends on sizes
 * alone. ---- */

enum { SLICE_ROWS = 128, NORM_ROWS = 32 /* of a slice of products', of norms' gradients */, COLUMN_THREADS = 256 };

/* Of the slices of R rows of C columns */
static size_t partial_floats(size_t R, size_t C, size_t slice_rows) {
    return ceil_div(R, slice_rows) * C;
}

/* Eight sums of a column, one a warp, meet in shared memory (8,32); the first warp returns their total. */
static __device__ inline float add_warps(float *shared, float x) {
    const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float sum = 0;
    shared[threadIdx.x] = x;
    __syncthreads();
    for (unsigned k = 0; warp == 0 && k < COLUMN_THREADS / WARP; k++) sum += shared[k * WARP + lane];
    return sum;
}

/* partial (slices,C) = sums of the columns of x (R,C). Grid: columns / 32, slices; block: 32 columns x 8 rows. */
static __global__ void sum_columns_kernel(float *partial, const floatX *x, size_t R, size_t C) {
    SHARED(float, shared);
    const size_t c = (size_t)blockIdx.x * WARP + threadIdx.x % WARP, r0 = (size_t)blockIdx.y * SLICE_ROWS;
    float sum = 0;
    for (size_t r = r0 + threadIdx.x / WARP; c < C && r < R && r < r0 + SLICE_ROWS; r += COLUMN_THREADS / WARP)
        sum += to_float(x[r * C + c]);
    sum = add_warps(shared, sum);
    if (threadIdx.x < WARP && c < C) partial[blockIdx.y * C + c] = sum;
}

/* first (C) += the slices of partial (slices,C), and second (C) += the slices behind those. Grid: columns / 32, which of
 * the two; block: 32 columns x 8 slices. */
static __global__ void add_slices_kernel(float *first, float *second, const float *partial, size_t slices, size_t C) {
    SHARED(float, shared);
    const size_t c = (size_t)blockIdx.x * WARP + threadIdx.x % WARP;
    float sum = 0;
    partial += blockIdx.y * slices * C;
#pragma unroll 8 /* few threads: each has many loads under way */
    for (size_t k = threadIdx.x / WARP; k < slices; k += COLUMN_THREADS / WARP)
        if (c < C) sum += partial[k * C + c];
    sum = add_warps(shared, sum);
    if (threadIdx.x < WARP && c < C) (blockIdx.y ? second : first)[c] += sum;
}

/* second: may be NULL */
static Err add_slices(Device *d, float *first, float *second, const float *partial, size_t slices, size_t C) {
    const dim3 grid(blocks_for(C, WARP), second ? 2 : 1);
    LAUNCH(d, add_slices_kernel, grid, COLUMN_THREADS, COLUMN_THREADS * sizeof(float), first, second, partial, slices,
           C);
    return OK;
}

/* ---- Layer norm, backward ---- */

/* sum (n) = over the block's warps what their lanes have of n columns, lane by lane. shared: (ROW_WARPS,HELD,WARP) */
template <int HELD>
static __device__ inline void add_rows(float *sum, float *shared, const float mine[HELD], size_t n) {
    __syncthreads(); /* whoever still reads what is there */
#pragma unroll
    for (int k = 0; k < HELD; k++) shared[(threadIdx.x / WARP * HELD + k) * WARP + threadIdx.x % WARP] = mine[k];
    __syncthreads();
    for (size_t c = threadIdx.x; c < n; c += ROW_WARPS * WARP) {
        sum[c] = 0;
        for (unsigned w = 0; w < ROW_WARPS; w++) sum[c] += shared[w * HELD * WARP + c];
    }
}

typedef struct {
    float *dx, *partial; /* partial (2,slices,C): what a slice adds to dweight, and to dbias */
    floatX *dx_copy;
    const void *dy; /* T */
    const float *x, *weight, *mean, *rstd;
    size_t R, C, n, skip;
} NormBackward;

/* dx += and, for the matrix product that reads it next, a copy of it in floatX; and the sums of columns. As norm_forward: a
 * warp per row. A block has a slice of the rows, of which it writes a panel of columns, HELD for each lane; their dy and
 * x stay in registers, so that a row of one panel is read once. Grid: the panels of the first slice, then the second's. */
template <int HELD, typename T>
static __global__ void __launch_bounds__(ROW_WARPS *WARP) norm_backward_kernel(NormBackward a) {
    SHARED(float, shared);
    const size_t C = a.C, panels = (C + HELD * WARP - 1) / (HELD * WARP), slice = blockIdx.x / panels;
    const size_t panel = blockIdx.x % panels * HELD * WARP, own = panel + threadIdx.x % WARP;
    const size_t r0 = slice * NORM_ROWS, end = r0 + NORM_ROWS < a.R ? r0 + NORM_ROWS : a.R;
    float dweight[HELD] = {}, dbias[HELD] = {};
    for (size_t r = r0 + threadIdx.x / WARP; r < end; r += ROW_WARPS) {
        const size_t at = source_row(r, a.n, a.skip) * C;
        const T *dy = (const T *)a.dy + r * C;
        const float *x = a.x + at, mu = a.mean[r], s = a.rstd[r];
        float g[HELD], hat[HELD], sum = 0, sum_hat = 0; /* g = dy weight, hat = (x - mean) rstd */
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            const size_t c = own + k * WARP;
            g[k] = c < C ? to_float(dy[c]) : 0, hat[k] = c < C ? (x[c] - mu) * s : 0;
        }
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            dweight[k] += g[k] * hat[k], dbias[k] += g[k];
            g[k] *= own + k * WARP < C ? a.weight[own + k * WARP] : 0;
            sum += g[k], sum_hat += g[k] * hat[k];
        }
        for (size_t c = threadIdx.x % WARP; panels > 1 && c < C; c += WARP) { /* the other panels */
            const float other = c < panel || c >= panel + HELD * WARP ? to_float(dy[c]) * a.weight[c] : 0;
            sum += other, sum_hat += other * (x[c] - mu) * s;
        }
        const float shift = warp_sum(sum) / (float)C, slope = warp_sum(sum_hat) / (float)C;
#pragma unroll
        for (int k = 0; k < HELD; k++) { /* all loads, then all stores, which nothing may overtake */
            g[k] = s * (g[k] - shift - hat[k] * slope);
            if (own + k * WARP < C) g[k] += a.dx[at + own + k * WARP];
        }
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            const size_t c = own + k * WARP;
            if (c < C) a.dx[at + c] = g[k];
            if (c < C && (void *)a.dx_copy != (void *)a.dx) a.dx_copy[at + c] = to_floatX(g[k]);
        }
    }
    const size_t width = C - panel < HELD * WARP ? C - panel : HELD * WARP;
    float *sums = a.partial + slice * C + panel;
    add_rows<HELD>(sums, shared, dweight, width);
    add_rows<HELD>(sums + gridDim.x / panels * C, shared, dbias, width);
}

template <int HELD> static Err launch_norm_backward(Device *d, const NormBackward *a, int dy_f32) {
    const unsigned grid = blocks_for(a->C, HELD * WARP) * blocks_for(a->R, NORM_ROWS), block = ROW_WARPS * WARP;
    const size_t bytes = ROW_WARPS * HELD * WARP * sizeof(float);
    if (dy_f32)
        LAUNCH(d, (norm_backward_kernel<HELD, float>), grid, block, bytes, *a);
    else
        LAUNCH(d, (norm_backward_kernel<HELD, floatX>), grid, block, bytes, *a);
    return OK;
}

/* Scratch of both: the slices */
static size_t norm_needs_gpu(const Compute *, size_t R, size_t C) {
    return 2 * partial_floats(R, C, NORM_ROWS) * sizeof(float);
}
static size_t linear_needs_gpu(const Compute *, size_t R, size_t, size_t M) {
    return partial_floats(R, M, SLICE_ROWS) * sizeof(float);
}

static Err norm_backward_gpu(const Compute *on, real *dx, real *dx_operand, real *dweight, real *dbias, const real *dy,
                             const real *x, const real *weight, const real *mean, const real *rstd, int dy_f32,
                             size_t R, size_t C, size_t n, size_t skip) {
    float *partial = (float *)on->scratch;
    const NormBackward a = {dx, partial, (floatX *)dx_operand, dy, x, weight, mean, rstd, R, C, n, skip};
    if (C <= 8 * WARP)
        TRY(launch_norm_backward<8>(on->device, &a, dy_f32));
    else if (C <= 24 * WARP)
        TRY(launch_norm_backward<24>(on->device, &a, dy_f32));
    else
        TRY(launch_norm_backward<32>(on->device, &a, dy_f32));
    return add_slices(on->device, dweight, dbias, partial, ceil_div(R, NORM_ROWS), C);
}

/* ---- Linear ---- */

/* y is floatX; or float, for the residual stream and for logits: then add may be given too. */
static Err linear_forward_gpu(const Compute *on, real *y, const real *x, const real *w, const real *bias,
                              const real *add, int y_f32, size_t R, size_t C, size_t M) {
    Matmul p;
    memset(&p, 0, sizeof p);
    p.trans_b = 1, p.d_is_float = y_f32, p.M = R, p.N = M, p.K = C;
    p.A = (const floatX *)x, p.lda = C, p.B = operand_of(on->device, w), p.ldb = C, p.D = y, p.ldd = M, p.add = add;
    if (bias) p.bias = y_f32 ? (const void *)bias : (const void *)operand_of(on->device, bias);
    return matmul(on->device, &p);
}

/* dx is floatX; or float, where gradients of several readers add up. */
static Err linear_backward_gpu(const Compute *on, real *dx, real *dw, real *db, const real *dy, const real *x,
                               const real *w, int accumulate, int dx_f32, size_t R, size_t C, size_t M) {
    Device *d = on->device;
    float *partial = (float *)on->scratch;
    Matmul p;
    memset(&p, 0, sizeof p);
    p.d_is_float = dx_f32, p.M = R, p.N = C, p.K = M;
    p.A = (const floatX *)dy, p.lda = M, p.B = operand_of(d, w), p.ldb = C, p.D = dx, p.ldd = C;
    p.add = accumulate ? dx : NULL;
    TRY(matmul(d, &p));
    memset(&p, 0, sizeof p);
    p.trans_a = 1, p.d_is_float = 1, p.M = M, p.N = C, p.K = R;
    p.A = (const floatX *)dy, p.lda = M, p.B = (const floatX *)x, p.ldb = C, p.D = dw, p.ldd = C, p.add = dw;
    if (!db) return matmul(d, &p);
    int done;
    p.sums = partial;
    TRY(multiply_and_sum(d, &p, &done));
    if (done) return add_slices(d, db, NULL, partial, 1, M);
    const dim3 grid(blocks_for(M, WARP), blocks_for(R, SLICE_ROWS));
    p.sums = NULL;
    TRY(matmul(d, &p));
    LAUNCH(d, sum_columns_kernel, grid, COLUMN_THREADS, COLUMN_THREADS * sizeof(float), partial, p.A, R, M);
    return add_slices(d, db, NULL, partial, grid.y, M);
}

/* ---- GELU ---- */

/* Grid and block: a thread takes PACK neighbours, which it moves 16 bytes at a time. The bias of an element is that of
 * its column, i % H; its few kilobytes stay in cache. A division of 64 bits takes longer than all the rest. */
static __global__ void gelu_forward_kernel(floatX *g, floatX *dg, const float *bias, size_t n, size_t H) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * PACK;
    if (i >= n) return;
    Pack x = load_pack(g, i, n), slope;
    float column[PACK], cdf, pdf;
    load_columns(column, bias, n >> 32 ? i % H : (unsigned)i % (unsigned)H, H);
#pragma unroll
    for (int k = 0; k < PACK; k++) {
        const float h = to_float(x.at[k]) + column[k];
        normal_distribution_gpu(&cdf, &pdf, h);
        x.at[k] = to_floatX(h * cdf);
        slope.at[k] = to_floatX(cdf + h * pdf);
    }
    store_pack(g, i, n, x);
    if (dg) store_pack(dg, i, n, slope);
}

static Err gelu_forward_gpu(const Compute *on, real *g, real *dg, const real *bias, size_t R, size_t H) {
    enum { THREADS = 128 };
    LAUNCH(on->device, gelu_forward_kernel, blocks_for(R * H, THREADS * PACK), THREADS, 0, (floatX *)g, (floatX *)dg,
           bias, R * H, H);
    return OK;
}

static __global__ void gelu_backward_kernel(floatX *dh, const floatX *dg, size_t n) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * PACK;
    if (i >= n) return;
    Pack x = load_pack(dh, i, n);
    const Pack slope = load_pack(dg, i, n);
#pragma unroll
    for (int k = 0; k < PACK; k++) x.at[k] = to_floatX(to_float(x.at[k]) * to_float(slope.at[k]));
    store_pack(dh, i, n, x);
}

static Err gelu_backward_gpu(const Compute *on, real *dh, const real *dg, size_t R, size_t H) {
    enum { THREADS = 128 };
    LAUNCH(on->device, gelu_backward_kernel, blocks_for(R * H, THREADS * PACK), THREADS, 0, (floatX *)dh,
           (const floatX *)dg, R * H);
    return OK;
}

/* ---- Embedding ---- */

/* at: while decoding, see decode.cu; NULL elsewhere */
static Err embed_from(Device *d, float *x, const int32_t *ids, const float *token, const float *position, const int *at,
                      size_t B, size_t n, size_t C) {
    enum { THREADS = 128 };
    LAUNCH(d, embed_forward_kernel, (unsigned)(B * n), THREADS, 0, x, ids, token, position, n, at, C);
    return OK;
}

static Err embed_forward_gpu(const Compute *on, real *x, const int32_t *ids, const real *token, const real *position,
                             const Position *, size_t B, size_t n, size_t C) {
    return embed_from(on->device, x, ids, token, position, NULL, B, n, C);
}

/* A block per value of a token adds up its rows of dx; a thread has columns of its own. Shared: the sums (C), then what
 * for_rows_of needs. */
static __global__ void embed_backward_kernel(float *dtoken, const float *dx, const int32_t *ids, size_t R, size_t C) {
    SHARED(float, sum);
    unsigned *found = (unsigned *)(void *)(sum + C);
    const size_t value = blockIdx.x;
    for (size_t c = threadIdx.x; c < C; c += blockDim.x) sum[c] = 0;
    const bool any = for_rows_of(value, ids, R, found, [=](size_t r) {
        for (size_t c = threadIdx.x; c < C; c += blockDim.x) sum[c] += dx[r * C + c];
    });
    if (!any) return;
    for (size_t c = threadIdx.x; c < C; c += blockDim.x) dtoken[value * C + c] += sum[c];
}

/* A block per position: sums over the batch. */
static __global__ void position_backward_kernel(float *dposition, const float *dx, size_t B, size_t n, size_t C) {
    const size_t i = blockIdx.x;
    for (size_t c = threadIdx.x; c < C; c += blockDim.x) {
        float sum = 0;
        for (size_t b = 0; b < B; b++) sum += dx[(b * n + i) * C + c];
        dposition[i * C + c] += sum;
    }
}

static Err embed_backward_gpu(const Compute *on, real *dtoken, real *dposition, const real *dx, const int32_t *ids,
                              size_t B, size_t n, size_t C, size_t V) {
    enum { THREADS = 128 };
    LAUNCH(on->device, embed_backward_kernel, (unsigned)V, THREADS, (C + THREADS / WARP) * sizeof(float), dtoken, dx,
           ids, B * n, C);
    LAUNCH(on->device, position_backward_kernel, (unsigned)n, THREADS, 0, dposition, dx, B, n, C);
    return OK;
}

/* ---- Variants of the head ---- */

/* A row of logits = raw * scale + different, and `same` where the token is x_t's. */
typedef struct {
    float scale, same, different;
} RowVariant;

/* For position i under scale t */
static __device__ inline RowVariant row_variant(const Variant *v, int t, size_t i) {
    RowVariant r = {1, 0, 0};
    if (v->log_scalors)
        r.scale = (float)exp((double)v->log_scalors[v->fine ? (t - 1) * v->length + i : (size_t)(t - 1)]);
    return r;
}
static __device__ inline RowVariant with_residual(RowVariant r, const Variant *v, int t, size_t K) {
    if (!v->residual) return r;
    const double alpha = (double)v->alpha[t], other = (1 - alpha) / (double)K;
    r.same = (float)log(alpha + other), r.different = (float)log(other);
    return r;
}

/* logits (B,n,K) from raw; a warp per row. ids (B,P+N): what the encoder read; positions begin at *at (NULL: 0). */
static __global__ void variant_forward_kernel(float *logits, const float *raw, Variant v, const int32_t *ids, size_t P,
                                              size_t N, const int *at, size_t R, size_t n, size_t K) {
    const size_t r = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (r >= R) return;
    const size_t i = (at ? (size_t)*at : 0) + r % n;
    const int32_t *row = ids + r / n * (P + N);
    const RowVariant x = with_residual(row_variant(&v, row[0], i), &v, row[0], K);
    const size_t kept = (size_t)row[P + i];
    for (size_t k = lane; k < K; k += WARP)
        logits[r * K + k] = raw[r * K + k] * x.scale + (k == kept ? x.same : x.different);
}

/* draw (B,N,K) = dlogits * scale; row_sum[r] = scale * sum_k dlogits raw, the gradient of the row's log_scalor */
static __global__ void variant_backward_kernel(floatX *draw, float *row_sum, const float *dlogits, const float *raw,
                                               Variant v, const int32_t *ids, size_t P, size_t R, size_t N, size_t K) {
    const size_t r = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (r >= R) return;
    const float scale = row_variant(&v, v.log_scalors ? ids[r / N * (P + N)] : 0, r % N).scale;
    float sum = 0;
    for (size_t k = lane; k < K; k += WARP) {
        const float g = dlogits[r * K + k];
        sum += g * raw[r * K + k];
        draw[r * K + k] = to_floatX(g * scale);
    }
    sum = warp_sum(sum);
    if (lane == 0) row_sum[r] = sum * scale;
}

/* A warp per element of log_scalors looks for its rows, lane by lane in the same order always. */
static __global__ void scalors_backward_kernel(float *dlog_scalors, const float *row_sum, const int32_t *ids,
                                               size_t stride, size_t R, size_t N, size_t length, int fine) {
    const size_t t = fine ? blockIdx.x / length : blockIdx.x, i = blockIdx.x % length;
    float sum = 0;
    for (size_t r = threadIdx.x; r < R; r += WARP)
        if ((size_t)ids[r / N * stride] == t + 1 && (!fine || r % N == i)) sum += row_sum[r];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) dlog_scalors[blockIdx.x] += sum;
}

static Err scalors_backward(Device *d, float *dlog_scalors, const float *row_sum, const Variant *v, size_t R) {
    LAUNCH(d, scalors_backward_kernel, (unsigned)(v->fine ? v->scales * v->length : v->scales), WARP, 0, dlog_scalors,
           row_sum, v->ids, v->prompt + v->N, R, v->N, v->length, v->fine);
    return OK;
}

/* Scratch: (R) sums of the rows' logits times their gradients */
static size_t variant_needs_gpu(const Compute *, size_t R) {
    return R * sizeof(float);
}

/* The first position is *at (NULL: 0). */
static Err variant_from(Device *d, float *logits, const float *raw, const Variant *v, const int *at, size_t B, size_t n,
                        size_t K) {
    LAUNCH(d, variant_forward_kernel, blocks_for(B * n, ROW_WARPS), ROW_WARPS * WARP, 0, logits, raw, *v, v->ids,
           v->prompt, v->N, at, B * n, n, K);
    return OK;
}

static Err variant_forward_gpu(const Compute *on, real *logits, const real *raw, const Variant *v, const Position *,
                               size_t B, size_t n, size_t K) {
    return variant_from(on->device, logits, raw, v, NULL, B, n, K);
}

/* Also for networks without a variant, whose dlogits only become floatX */
static Err variant_backward_gpu(const Compute *on, real *draw, real *dlog_scalors, const real *dlogits, const real *raw,
                                const Variant *v, size_t B, size_t n, size_t K) {
    float *row_sum = (float *)on->scratch;
    LAUNCH(on->device, variant_backward_kernel, blocks_for(B * n, ROW_WARPS), ROW_WARPS * WARP, 0, (floatX *)draw,
           row_sum, dlogits, raw, *v, v->ids, v->prompt, B * n, n, K);
    return v->log_scalors ? scalors_backward(on->device, dlog_scalors, row_sum, v, B * n) : OK;
}
