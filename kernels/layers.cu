/* layers.cu - the layers of the transformer but attention: GELU, layer norm, linear, embedding; forward and backward.
 *
 * Activations are (R,C), R rows of B*n positions. Rows run in parallel forward; sums over rows (gradients of biases,
 * norms, embeddings) run in parallel over columns, so that the order of additions, hence every bit, is the same for any
 * number of threads. Prototypes: transformer.h. */
#include "kernels/transformer.h"

enum { COLUMN_BLOCK = 32 }; /* columns that one task sums over all rows */
static const double NORM_EPS = 1e-5;

/* ---- Elementwise: GELU (its mathematics: transformer.h) ---- */

/* gelu_forward    g = gelu(g + bias), in place; dg = gelu'(g + bias), or not wanted when NULL
 * gelu_backward   dh *= dg
 *   g, dg, dh (R,H); bias (H). gelu(x) = x P(z < x), the exact one (SPEC 1.8). */

/* Grid and block: a thread takes PACK neighbours, which it moves 16 bytes at a time. The bias of an element is that of
 * its column, i % H; its few kilobytes stay in cache. */
static __global__ void gelu_forward_kernel(floatX *g, floatX *dg, const float *bias, size_t n, size_t H) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * PACK;
    if (i >= n) return;
    Pack x = load_pack(g, i, n), slope;
    size_t column = i % H;
#pragma unroll
    for (int k = 0; k < PACK; k++) {
        const float h = to_float(x.at[k]) + bias[column];
        const float cdf = 0.5f * erfcf(-h * 0.70710678f), pdf = 0.39894228f * expf(-0.5f * h * h);
        x.at[k] = to_floatX(h * cdf);
        slope.at[k] = to_floatX(cdf + h * pdf);
        if (++column == H) column = 0;
    }
    store_pack(g, i, n, x);
    if (dg) store_pack(dg, i, n, slope);
}

static Err gelu_forward_cuda(Device *d, floatX *g, floatX *dg, const float *bias, size_t R, size_t H) {
    enum { THREADS = 128 };
    LAUNCH(d, gelu_forward_kernel, blocks_for(R * H, THREADS * PACK), THREADS, 0, g, dg, bias, R * H, H);
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

static Err gelu_backward_cuda(Device *d, floatX *dh, const floatX *dg, size_t R, size_t H) {
    enum { THREADS = 128 };
    LAUNCH(d, gelu_backward_kernel, blocks_for(R * H, THREADS * PACK), THREADS, 0, dh, dg, R * H);
    return OK;
}

/* ---- Norm: y = (x - mean) / sqrt(var + eps) * weight + bias, over each row of C channels ---- */

/* norm_forward    y (R,C), mean (R), rstd (R) from x (R,C)
 * norm_backward   dx (R,C) +=, dweight (C) +=, dbias (C) += from dy (R,C) and what forward saw and left */

/* The twins read and write rows of the residual stream x and of its gradient dx, which are float. Of x, whose batch
 * rows are n positions long, the first `skip` positions of each are left out: row r is row `source` of x. */
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

static Err norm_forward_cuda(Device *d, const Norm *norm, floatX *y, float *mean, float *rstd, const float *x, size_t R,
                             size_t n, size_t skip) {
    LAUNCH(d, norm_forward_kernel, blocks_for(R, ROW_WARPS), ROW_WARPS * WARP, 0, y, mean, rstd, x,
           d->row[norm->weight].value, d->row[norm->bias].value, R, norm->C, n, skip, (float)NORM_EPS);
    return OK;
}

/* dx += and, for the matrix product that reads it next, a copy of it in floatX. As norm_forward: a warp per row. */
static __global__ void norm_backward_kernel(float *dx, floatX *dx_copy, const float *dy, const float *x,
                                            const float *weight, const float *mean, const float *rstd, size_t R,
                                            size_t C, size_t n, size_t skip) {
    const size_t r = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (r >= R) return;
    const size_t at = source_row(r, n, skip) * C;
    const float mu = mean[r], s = rstd[r];
    float sum = 0, sum_hat = 0;
    for (size_t c = lane; c < C; c += WARP) {
        const float g = dy[r * C + c] * weight[c];
        sum += g, sum_hat += g * (x[at + c] - mu);
    }
    const float shift = warp_sum(sum) / (float)C, slope = warp_sum(sum_hat) * s * s / (float)C;
    for (size_t c = lane; c < C; c += WARP) {
        const float more = s * (dy[r * C + c] * weight[c] - shift - (x[at + c] - mu) * slope),
                    total = dx[at + c] + more;
        dx[at + c] = total;
        if ((void *)dx_copy != (void *)dx) dx_copy[at + c] = to_floatX(total);
    }
}

/* ---- Sums over rows: each block adds up a slice of the rows for 32 columns, then one thread a column adds the slices.
 * The order depends on sizes alone. ---- */

enum { SLICE_ROWS = 128, COLUMN_THREADS = 256 };

/* Of the slices of R rows of C columns, for `sums` sums of each */
static size_t partial_floats(size_t R, size_t C, size_t sums) {
    return ceil_div(R, SLICE_ROWS) * C * sums;
}

/* Eight sums of a column, one a warp, meet in shared memory (8,32); the first warp returns their total. */
static __device__ inline float add_warps(float *shared, float x) {
    const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float sum = 0;
    __syncthreads(); /* whoever still reads what is there */
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

/* The same for a norm: partial (2,slices,C) = sums of dy (x - mean) rstd, and of dy. */
static __global__ void norm_columns_kernel(float *partial, const float *dy, const float *x, const float *mean,
                                           const float *rstd, size_t R, size_t C, size_t n, size_t skip) {
    SHARED(float, shared);
    const size_t c = (size_t)blockIdx.x * WARP + threadIdx.x % WARP, r0 = (size_t)blockIdx.y * SLICE_ROWS;
    float dw = 0, db = 0;
    for (size_t r = r0 + threadIdx.x / WARP; c < C && r < R && r < r0 + SLICE_ROWS; r += COLUMN_THREADS / WARP) {
        const float g = dy[r * C + c];
        dw += g * (x[source_row(r, n, skip) * C + c] - mean[r]) * rstd[r];
        db += g;
    }
    dw = add_warps(shared, dw), db = add_warps(shared, db);
    if (threadIdx.x >= WARP || c >= C) return;
    partial[blockIdx.y * C + c] = dw;
    partial[(gridDim.y + blockIdx.y) * C + c] = db;
}

static __global__ void add_slices_kernel(float *sum, const float *partial, size_t slices, size_t C) {
    const size_t c = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    float total = 0;
    if (c >= C) return;
#pragma unroll 16 /* few threads: each has many loads under way */
    for (size_t k = 0; k < slices; k++) total += partial[k * C + c];
    sum[c] += total;
}

static Err add_slices(Device *d, float *sum, const float *partial, size_t slices, size_t C) {
    enum { THREADS = 128 };
    LAUNCH(d, add_slices_kernel, blocks_for(C, THREADS), THREADS, 0, sum, partial, slices, C);
    return OK;
}

static Err norm_backward_cuda(Device *d, const Norm *norm, float *dx, floatX *dx_copy, const float *dy, const float *x,
                              const float *mean, const float *rstd, float *partial, size_t R, size_t n, size_t skip) {
    const size_t C = norm->C, slices = ceil_div(R, SLICE_ROWS);
    const dim3 grid(blocks_for(C, WARP), (unsigned)slices);
    const DeviceRow *weight = &d->row[norm->weight], *bias = &d->row[norm->bias];
    LAUNCH(d, norm_backward_kernel, blocks_for(R, ROW_WARPS), ROW_WARPS * WARP, 0, dx, dx_copy, dy, x, weight->value,
           mean, rstd, R, C, n, skip);
    LAUNCH(d, norm_columns_kernel, grid, COLUMN_THREADS, COLUMN_THREADS * sizeof(float), partial, dy, x, mean, rstd, R,
           C, n, skip);
    TRY(add_slices(d, weight->grad, partial, slices, C));
    return add_slices(d, bias->grad, partial + slices * C, slices, C);
}

/* ---- Linear: out = residual + bias + in weight^T ---- */

/* out (R,l->out) is floatX, or, where the residual stream or logits go on, float: then residual may be given too. */
static Err linear_forward_cuda(Device *d, const Linear *l, void *out, int out_is_float, const float *residual,
                               const floatX *in, size_t R) {
    Matmul p;
    memset(&p, 0, sizeof p);
    p.trans_b = 1, p.d_is_float = out_is_float, p.M = R, p.N = l->out, p.K = l->in;
    p.A = in, p.lda = l->in, p.B = d->row[l->weight].weight, p.ldb = l->in, p.D = out, p.ldd = l->out, p.add = residual;
    if (l->bias != NO_ROW && out_is_float) p.bias = d->row[l->bias].value;
    if (l->bias != NO_ROW && !out_is_float) p.bias = d->row[l->bias].weight;
    return matmul(d, &p);
}

/* din (R,l->in) is floatX, or float where gradients of several readers add up. */
static Err linear_backward_cuda(Device *d, const Linear *l, void *din, int din_is_float, int accumulate,
                                const floatX *dout, const floatX *in, float *partial, size_t R) {
    Matmul p;
    memset(&p, 0, sizeof p);
    p.d_is_float = din_is_float, p.M = R, p.N = l->in, p.K = l->out;
    p.A = dout, p.lda = l->out, p.B = d->row[l->weight].weight, p.ldb = l->in, p.D = din, p.ldd = l->in;
    p.add = accumulate ? din : NULL;
    TRY(matmul(d, &p));
    memset(&p, 0, sizeof p);
    p.trans_a = 1, p.d_is_float = 1, p.M = l->out, p.N = l->in, p.K = R;
    p.A = dout, p.lda = l->out, p.B = in, p.ldb = l->in, p.ldd = l->in;
    p.D = d->row[l->weight].grad, p.add = p.D;
    TRY(matmul(d, &p));
    if (l->bias == NO_ROW) return OK;
    const dim3 grid(blocks_for(l->out, WARP), blocks_for(R, SLICE_ROWS));
    LAUNCH(d, sum_columns_kernel, grid, COLUMN_THREADS, COLUMN_THREADS * sizeof(float), partial, dout, R, l->out);
    return add_slices(d, d->row[l->bias].grad, partial, grid.y, l->out);
}

/* ---- Embedding ---- */

/* embed_forward    x[b,i,:] = token_emb[ids[b,i],:] + pos_emb[i,:], or the position that the cell says
 * embed_backward   dtoken_emb[ids[b,i],:] += dx[b,i,:], dpos_emb[i,:] += dx[b,i,:]
 *   x, dx (B,n,C); ids (B,n) */

/* A block per position; *at (NULL: 0) is where the n positions begin. */
static __global__ void embed_forward_kernel(float *x, const int32_t *ids, const float *token, const float *position,
                                            size_t n, const int *at, size_t C) {
    const size_t r = blockIdx.x, i = (at ? (size_t)*at : 0) + r % n;
    const float *t = token + (size_t)ids[r] * C, *p = position + i * C;
    for (size_t c = threadIdx.x; c < C; c += blockDim.x) x[r * C + c] = t[c] + p[c];
}

static Err embed_forward_cuda(Device *d, const Stack *s, float *x, const int32_t *ids, size_t B, size_t n,
                              const int *at) {
    enum { THREADS = 128 };
    LAUNCH(d, embed_forward_kernel, (unsigned)(B * n), THREADS, 0, x, ids, d->row[s->token_emb].value,
           d->row[s->pos_emb].value, n, at, s->C);
    return OK;
}

/* A block per value of a token: it goes through all ids, and where it finds its own adds up that row of dx, in order; a
 * thread has columns of its own. shared: sums (C), which of the present ids are ours, by warp. */
static __global__ void embed_backward_kernel(float *dtoken, const float *dx, const int32_t *ids, size_t R, size_t C) {
    SHARED(float, sum);
    unsigned *ours = (unsigned *)(void *)(sum + C);
    const size_t value = blockIdx.x;
    int found = 0;
    for (size_t c = threadIdx.x; c < C; c += blockDim.x) sum[c] = 0;
    for (size_t r0 = 0; r0 < R; r0 += blockDim.x) {
        const size_t mine = r0 + threadIdx.x;
        const unsigned bits = __ballot_sync(0xffffffffu, mine < R && (size_t)ids[mine] == value);
        __syncthreads();
        if (threadIdx.x % WARP == 0) ours[threadIdx.x / WARP] = bits;
        __syncthreads();
        for (unsigned k = 0; k < blockDim.x; k++) {
            if (!(ours[k / WARP] >> k % WARP & 1)) continue;
            found = 1;
            for (size_t c = threadIdx.x; c < C; c += blockDim.x) sum[c] += dx[(r0 + k) * C + c];
        }
    }
    if (!found) return;
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

/* `values`: rows of the table of tokens */
static Err embed_backward_cuda(Device *d, const Stack *s, const float *dx, const int32_t *ids, size_t B, size_t n,
                               size_t values) {
    enum { THREADS = 128 };
    LAUNCH(d, embed_backward_kernel, (unsigned)values, THREADS, (s->C + THREADS / WARP) * sizeof(float),
           d->row[s->token_emb].grad, dx, ids, B * n, s->C);
    LAUNCH(d, position_backward_kernel, (unsigned)n, THREADS, 0, d->row[s->pos_emb].grad, dx, B, n, s->C);
    return OK;
}
