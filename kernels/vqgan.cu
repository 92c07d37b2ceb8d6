/* vqgan.cu - the first stage on a GPU: its layers, what it keeps there, its walk. */
#include "vqgan.h"

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

/* By way of on->scratch */
static Err put_values(const Compute *on, floatX *to, const real *planes, size_t B, size_t C, size_t hw) {
    const size_t n = B * C * hw;
    TRY(to_device(on->device, on->scratch, planes, n * sizeof *planes));
    LAUNCH(on->device, from_planes_kernel, blocks_for(n, CELL_THREADS), CELL_THREADS, 0, to, (const float *)on->scratch,
           B, C, hw);
    return OK;
}
static void put_planes_gpu(const Compute *on, real *to, const real *planes, size_t B, size_t C, size_t hw) {
    keep_failure(on->device, put_values(on, (floatX *)to, planes, B, C, hw));
}
static Err get_planes_gpu(const Compute *on, real *planes, const real *from, size_t B, size_t C, size_t hw) {
    const size_t n = B * C * hw;
    TRY(earlier_failure(on->device));
    LAUNCH(on->device, to_planes_kernel, blocks_for(n, CELL_THREADS), CELL_THREADS, 0, (float *)on->scratch,
           (const floatX *)from, B, C, hw);
    return to_host(on->device, planes, on->scratch, n * sizeof *planes);
}

/* ---- The twins: the walk on a GPU ---- */

struct VqTwin {
    Device *d;
    floatX *arena;       /* every value and gradient, and what norms and attention keep, as vqgan_plan laid them out */
    float *wide;         /* in bf16 the values of the residual stream, in float */
    size_t *wide_at;     /* (n_values) where in there, or NO_VALUE */
    uint8_t *operand;    /* (n_values) read as an operand of a product: in floatX, even if it is in float too */
    float *planes;       /* a picture batch, or latents, in the host's order, on their way */
    int32_t *raw;        /* (B,N) codes */
    floatX **ordered;    /* (n_layers) weights of 3x3 convolutions in the order of patches, else NULL */
    floatX *order_arena; /* they lie here */
    uint64_t changes;    /* of the parameters (Device.changes) when they were put in order */
    ConvMemory conv;
    size_t score_size;
    float *partial, *scores, *half; /* sums of slices; scores of attention or codes; of the codebook */
    floatX *ds;                     /* gradient of attention's scores */
    float *last;                    /* gradients of the last layer's weight and bias, alone */
};

static floatX *value_at(const Vqgan *v, size_t value) {
    return v->twin->arena + v->value[value].act;
}
static floatX *grad_at(const Vqgan *v, size_t value) {
    return v->twin->arena + v->value[value].grad;
}
static DeviceRow *row_at(const Vqgan *v, size_t row) {
    return &v->twin->d->row[row];
}
static float *wide_at(const Vqgan *v, size_t value) { /* NULL: it is in floatX only */
    return value == NO_VALUE || v->twin->wide_at[value] == NO_VALUE ? NULL : v->twin->wide + v->twin->wide_at[value];
}
static size_t last_size(const Vqgan *v) {
    const VqLayer *l = &v->layer[v->n_layers - 1];
    return v->train && l->kind == VQ_CONV ? v->params.row[l->weight].size + v->params.row[l->bias].size : 0;
}
static size_t value_elements(const Vqgan *v, size_t value) {
    return v->b * v->value[value].C * plane_size(v, value);
}
static NormShape norm_shape(const Vqgan *v, const VqLayer *l) {
    const NormShape n = {v->b, plane_size(v, l->out), v->value[l->out].C, l->swish};
    return n;
}
static NormKept kept_by(const Vqgan *v, const VqLayer *l, const NormShape *n) {
    return norm_kept((float *)(void *)(v->twin->arena + l->saved), n);
}

static Err vq_conv_forward(Vqgan *v, size_t i) {
    const VqLayer *l = &v->layer[i];
    const Conv c = layer_conv(v, l);
    const floatX *w = v->twin->ordered[i] ? v->twin->ordered[i] : row_at(v, l->weight)->weight;
    const Wide wide = {wide_at(v, l->out), wide_at(v, l->add), row_at(v, l->bias)->value};
    return conv_forward_cuda(v->twin->d, wide.y && !v->twin->operand[l->out] ? NULL : value_at(v, l->out), &c,
                             value_at(v, l->in[0]), w, row_at(v, l->bias)->weight,
                             l->add == NO_VALUE ? NULL : value_at(v, l->add), &v->twin->conv, wide);
}

static Err vq_conv_backward(Vqgan *v, const VqLayer *l, int image_wanted) {
    const Conv c = layer_conv(v, l);
    floatX *dx = l->in[0] == v->image && !image_wanted ? NULL : grad_at(v, l->in[0]);
    return conv_backward_cuda(v->twin->d, dx, row_at(v, l->weight)->grad, row_at(v, l->bias)->grad, &c,
                              grad_at(v, l->out), value_at(v, l->in[0]), row_at(v, l->weight)->weight, l->more[0],
                              &v->twin->conv);
}

static Err vq_norm_forward(Vqgan *v, const VqLayer *l) {
    const NormShape n = norm_shape(v, l);
    const float *wide = wide_at(v, l->in[0]), *gamma = row_at(v, l->weight)->value, *beta = row_at(v, l->bias)->value;
    floatX *y = value_at(v, l->out);
    if (wide) return group_norm_forward_cuda(v->twin->d, y, kept_by(v, l, &n), wide, gamma, beta, &n, v->twin->partial);
    return group_norm_forward_cuda(v->twin->d, y, kept_by(v, l, &n), (const floatX *)value_at(v, l->in[0]), gamma, beta,
                                   &n, v->twin->partial);
}

static Err vq_norm_backward(Vqgan *v, const VqLayer *l) {
    const NormShape n = norm_shape(v, l);
    const float *wide = wide_at(v, l->in[0]);
    const DeviceRow *weight = row_at(v, l->weight), *bias = row_at(v, l->bias);
    floatX *dx = grad_at(v, l->in[0]), *dy = grad_at(v, l->out);
    if (wide)
        return group_norm_backward_cuda(v->twin->d, dx, weight->grad, bias->grad, dy, wide, kept_by(v, l, &n),
                                        weight->value, &n, l->more[0], v->twin->partial);
    return group_norm_backward_cuda(v->twin->d, dx, weight->grad, bias->grad, dy, (const floatX *)value_at(v, l->in[0]),
                                    kept_by(v, l, &n), weight->value, &n, l->more[0], v->twin->partial);
}

static Err vq_attend_forward(Vqgan *v, const VqLayer *l) {
    return picture_attend_forward_cuda(v->twin->d, value_at(v, l->out), v->twin->arena + l->saved,
                                       value_at(v, l->in[0]), value_at(v, l->in[1]), value_at(v, l->in[2]), v->b,
                                       plane_size(v, l->out), v->value[l->out].C, v->twin->scores);
}

static Err vq_attend_backward(Vqgan *v, const VqLayer *l) {
    floatX *const dx[3] = {grad_at(v, l->in[0]), grad_at(v, l->in[1]), grad_at(v, l->in[2])};
    return picture_attend_backward_cuda(v->twin->d, dx, l->more, grad_at(v, l->out), value_at(v, l->in[0]),
                                        value_at(v, l->in[1]), value_at(v, l->in[2]), v->twin->arena + l->saved, v->b,
                                        plane_size(v, l->out), v->value[l->out].C, v->twin->scores, v->twin->ds);
}

static Err vq_nearest(Vqgan *v) {
    return nearest_cuda(v->twin->d, v->twin->raw, value_at(v, v->z), row_at(v, v->codebook)->weight,
                        v->b * plane_size(v, v->z), v->c.n_embed, v->c.embed_dim, v->twin->half, v->twin->scores,
                        v->twin->score_size);
}

static Err vq_quantize_forward(Vqgan *v, const VqLayer *l) {
    TRY(vq_nearest(v));
    return straight_through_cuda(v->twin->d, value_at(v, l->out), v->twin->d->sums, value_at(v, l->in[0]),
                                 row_at(v, l->weight)->weight, v->twin->raw, v->b * plane_size(v, l->out),
                                 v->c.embed_dim);
}

static Err vq_quantize_backward(Vqgan *v, const VqLayer *l, double loss_weight) {
    const size_t rows = v->b * plane_size(v, l->out), D = v->c.embed_dim;
    real to_z, to_e;
    codebook_weights(&v->c, loss_weight, rows * D, &to_z, &to_e);
    return quantize_backward_cuda(v->twin->d, grad_at(v, l->in[0]), row_at(v, l->weight)->grad, value_at(v, l->in[0]),
                                  row_at(v, l->weight)->weight, v->twin->raw, to_z, to_e, rows, v->c.n_embed, D);
}

static Err vq_tanh(Vqgan *v, const VqLayer *l, int backward) {
    const size_t n = value_elements(v, l->out);
    if (backward)
        LAUNCH(v->twin->d, tanh_backward_kernel, blocks_for(n, CELL_THREADS), CELL_THREADS, 0, grad_at(v, l->in[0]),
               grad_at(v, l->out), value_at(v, l->out), n);
    else
        LAUNCH(v->twin->d, tanh_forward_kernel, blocks_for(n, CELL_THREADS), CELL_THREADS, 0, value_at(v, l->out),
               value_at(v, l->in[0]), n);
    return OK;
}

/* Weights that changed since they were last put in order. */
static Err order_changed_weights(Vqgan *v) {
    VqTwin *t = v->twin;
    if (!t->d->row) return err("vqgan: its parameters are not on the GPU yet");
    if (t->changes == t->d->changes) return OK;
    for (size_t i = 0; i < v->n_layers; i++) {
        const VqLayer *l = &v->layer[i];
        if (!t->ordered[i]) continue;
        const Conv c = layer_conv(v, l);
        TRY(conv_order_weights_cuda(t->d, t->ordered[i], row_at(v, l->weight)->weight, &c));
    }
    t->changes = t->d->changes;
    return OK;
}

static Err walk_forward(Vqgan *v, size_t first, size_t end) {
    TRY(earlier_failure(v->twin->d));
    TRY(order_changed_weights(v));
    for (size_t i = first; i < end; i++) {
        const VqLayer *l = &v->layer[i];
        switch (l->kind) {
        case VQ_NORM: TRY(vq_norm_forward(v, l)); break;
        case VQ_ATTEND: TRY(vq_attend_forward(v, l)); break;
        case VQ_QUANTIZE: TRY(vq_quantize_forward(v, l)); break;
        case VQ_TANH: TRY(vq_tanh(v, l, 0)); break;
        default: TRY(vq_conv_forward(v, i));
        }
    }
    return OK;
}

static Err walk_backward(Vqgan *v, double codebook_weight, int image_wanted) {
    for (size_t i = v->n_layers; i-- > backward_end(v, image_wanted);) {
        const VqLayer *l = &v->layer[i];
        switch (l->kind) {
        case VQ_NORM: TRY(vq_norm_backward(v, l)); break;
        case VQ_ATTEND: TRY(vq_attend_backward(v, l)); break;
        case VQ_QUANTIZE: TRY(vq_quantize_backward(v, l, codebook_weight)); break;
        case VQ_TANH: TRY(vq_tanh(v, l, 1)); break;
        default: TRY(vq_conv_backward(v, l, image_wanted));
        }
        params_ready(&v->params, l->complete);
    }
    return OK;
}

/* ---- Between the host's planes and the GPU's cells ---- */

static Err put_planes(Vqgan *v, floatX *to, const real *planes, size_t value) {
    VqTwin *t = v->twin;
    const size_t n = value_elements(v, value);
    TRY(to_device(t->d, t->planes, planes, n * sizeof *planes));
    LAUNCH(t->d, from_planes_kernel, blocks_for(n, CELL_THREADS), CELL_THREADS, 0, to, t->planes, v->b,
           v->value[value].C, plane_size(v, value));
    return OK;
}

static Err get_planes(Vqgan *v, real *planes, const floatX *from, size_t value) {
    VqTwin *t = v->twin;
    const size_t n = value_elements(v, value);
    LAUNCH(t->d, to_planes_kernel, blocks_for(n, CELL_THREADS), CELL_THREADS, 0, t->planes, from, v->b,
           v->value[value].C, plane_size(v, value));
    return to_host(t->d, planes, t->planes, n * sizeof *planes);
}

/* ---- What C calls: device.h ---- */

/* `in` planes to value from, layers first..end-1, value to to `out` planes unless NULL. */
static Err vqgan_run_cuda(Vqgan *v, size_t from, const real *in, size_t first, size_t end, size_t to, real *out) {
    TRY(put_planes(v, value_at(v, from), in, from));
    TRY(walk_forward(v, first, end));
    return out ? get_planes(v, out, value_at(v, to), to) : OK;
}

/* raw (B,N): codes of z (B,D,N), or of the latents that are there if it is NULL */
static Err vqgan_nearest_cuda(Vqgan *v, const real *z, int32_t *raw) {
    if (!v->twin->d->row) return err("vqgan: its parameters are not on the GPU yet");
    if (z) TRY(put_planes(v, value_at(v, v->z), z, v->z));
    TRY(vq_nearest(v));
    return to_host(v->twin->d, raw, v->twin->raw, v->b * plane_size(v, v->z) * sizeof *raw);
}

/* images from entries of the codebook (B,N) */
static Err vqgan_draw_cuda(Vqgan *v, const int32_t *raw, real *images) {
    VqTwin *t = v->twin;
    const size_t n = value_elements(v, v->zq);
    if (!t->d->row) return err("vqgan: its parameters are not on the GPU yet");
    TRY(to_device(t->d, t->raw, raw, v->b * plane_size(v, v->zq) * sizeof *raw));
    LAUNCH(t->d, lookup_kernel, blocks_for(n, CELL_THREADS), CELL_THREADS, 0, value_at(v, v->zq),
           row_at(v, v->codebook)->weight, t->raw, n / v->c.embed_dim, v->c.embed_dim);
    TRY(walk_forward(v, v->quantize + 1, v->n_layers));
    return get_planes(v, images, value_at(v, v->xrec), v->xrec);
}

/* z, z_q and the reconstruction go where v->x has them, codes to raw; *sum of (e-z)^2 */
static Err vqgan_forward_cuda(Vqgan *v, const real *images, int32_t *raw, double *sum) {
    VqTwin *t = v->twin;
    double sums[SUM_BLOCKS];
    TRY(vqgan_run_cuda(v, v->image, images, 0, v->n_layers, v->xrec, v->x[v->xrec]));
    TRY(get_planes(v, v->x[v->z], value_at(v, v->z), v->z));
    TRY(get_planes(v, v->x[v->zq], value_at(v, v->zq), v->zq));
    TRY(to_host(t->d, raw, t->raw, v->b * plane_size(v, v->z) * sizeof *raw));
    TRY(to_host(t->d, sums, t->d->sums, sizeof sums));
    *sum = 0;
    for (int k = 0; k < SUM_BLOCKS; k++) *sum += sums[k];
    return OK;
}

static Err vqgan_backward_cuda(Vqgan *v, const real *dxrec, double codebook_weight, real *dimage) {
    TRY(put_planes(v, grad_at(v, v->xrec), dxrec, v->xrec));
    TRY(walk_backward(v, codebook_weight, dimage != NULL));
    return dimage ? get_planes(v, dimage, grad_at(v, v->image), v->image) : OK;
}

/* Of the last layer alone, which is a convolution; in grad_at of the reconstruction, where backward's will be. */
static Err vqgan_last_cuda(Vqgan *v, const real *dxrec, real *dw, real *db) {
    VqTwin *t = v->twin;
    const VqLayer *l = &v->layer[v->n_layers - 1];
    const Conv c = layer_conv(v, l);
    const size_t weights = v->params.row[l->weight].size;
    TRY(put_planes(v, grad_at(v, v->xrec), dxrec, v->xrec));
    TRY(device_zero(t->d, t->last, last_size(v) * sizeof *t->last));
    TRY(conv_backward_cuda(t->d, NULL, t->last, t->last + weights, &c, grad_at(v, v->xrec), value_at(v, l->in[0]),
                           row_at(v, l->weight)->weight, 0, &t->conv));
    TRY(to_host(t->d, dw, t->last, weights * sizeof *dw));
    return to_host(t->d, db, t->last + weights, c.M * sizeof *db);
}

/* An entry becomes a latent; its moments and average follow. Each of these may be NULL. */
static __global__ void restart_kernel(DeviceRow book, const floatX *z, size_t code, size_t pick, size_t D) {
    for (size_t k = threadIdx.x; k < D; k += blockDim.x) {
        const float value = to_float(z[pick * D + k]);
        const size_t at = code * D + k;
        book.value[at] = value, book.weight[at] = to_floatX(value);
        if (book.m) book.m[at] = 0;
        if (book.v) book.v[at] = 0;
        if (book.m16) book.m16[at] = book.v16[at] = 0;
        if (book.ema) book.ema[at] = value;
    }
}

static Err restart_cuda(Vqgan *v, size_t code, size_t pick) {
    LAUNCH(v->twin->d, restart_kernel, 1, CELL_THREADS, 0, *row_at(v, v->codebook), value_at(v, v->z), code, pick,
           v->c.embed_dim);
    return OK;
}

static void vqgan_restart_cuda(Vqgan *v, size_t code, size_t pick) {
    keep_failure(v->twin->d, restart_cuda(v, code, pick));
}

/* ---- Its memory ---- */

/* What the layers share, one after the other. Sizes follow from the planned sizes, which are in b, h, w. */
typedef struct {
    ConvMemory conv;
    size_t order, planes, partial, scores, ds, cells; /* elements */
} VqNeeds;

static VqNeeds shared_needs(const Vqgan *v) {
    VqNeeds n;
    memset(&n, 0, sizeof n);
    n.cells = v->b * plane_size(v, v->z);
    for (size_t i = 0; i < v->n_layers; i++) {
        const VqLayer *l = &v->layer[i];
        const size_t N = plane_size(v, l->out);
        if (l->kind == VQ_CONV) {
            const Conv c = layer_conv(v, l);
            conv_needs_cuda(&n.conv, &c, v->train);
            n.order += round_up(ordered_weight_size(&c), 64);
        } else if (l->kind == VQ_NORM) {
            const NormShape s = norm_shape(v, l);
            n.partial = max_size(n.partial, norm_partial_size(&s));
        } else if (l->kind == VQ_ATTEND) {
            n.scores = max_size(n.scores, N * N);
            if (v->train) n.ds = max_size(n.ds, N * N);
        }
    }
    n.partial = max_size(n.partial, n.conv.partial_size);
    n.scores = max_size(n.scores,
                        max_size(TILE_ROWS * v->c.n_embed,
                                 min_size(round_up(n.cells, TILE_ROWS) * v->c.n_embed, COLUMN_BYTES / sizeof(float))));
    const size_t shown[3] = {v->image, v->z, v->xrec};
    for (int k = 0; k < 3; k++) n.planes = max_size(n.planes, value_elements(v, shown[k]));
    return n;
}

/* Is a value of bf16 kept in float? Those are that residuals are added to and that norms read along the way: the sum
 * over a network's depth, whose roundings would all count. What lies within a block, and what only products read, is
 * not. */
static int is_wide(const Vqgan *v, size_t value) {
    int made = 0, summed = 0, added = 0, normed = 0, other = 0;
    for (size_t i = 0; i < v->n_layers && IS_BF16; i++) {
        const VqLayer *l = &v->layer[i];
        const int attends = l->kind == VQ_ATTEND && (l->in[1] == value || l->in[2] == value);
        if (l->kind == VQ_CONV && l->out == value) made = 1, summed |= l->add != NO_VALUE;
        added |= l->kind == VQ_CONV && l->add == value;
        normed |= l->kind == VQ_NORM && l->in[0] == value;
        other |= attends || (l->kind != VQ_NORM && l->in[0] == value);
    }
    return made && (added || summed || (normed && other));
}

static int is_operand(const Vqgan *v, size_t value) {
    for (size_t i = 0; i < v->n_layers; i++) {
        const VqLayer *l = &v->layer[i];
        if (l->kind == VQ_NORM) continue;
        if (l->in[0] == value || (l->kind == VQ_ATTEND && (l->in[1] == value || l->in[2] == value))) return 1;
    }
    return 0;
}

/* Floats of the wide arena. In training, values one after the other; else as in the other arena, where they make room
 * for each other. at (n_values), or NULL. */
static size_t place_wide(const Vqgan *v, size_t units, size_t *at) {
    size_t total = 0;
    for (size_t i = 0; i < v->n_values; i++) {
        const int wide = is_wide(v, i);
        if (at) at[i] = !wide ? NO_VALUE : v->train ? total : v->value[i].act;
        if (wide) total = v->train ? total + round_up(value_elements(v, i), 64) : units;
    }
    return total;
}

static size_t shared_bytes(const Vqgan *v, const VqNeeds *n) {
    const size_t floats =
        n->planes + n->partial + n->scores + n->cells + v->c.n_embed + n->conv.total_size + last_size(v);
    return floats * sizeof(float) + (n->order + n->ds + n->conv.column_size + n->conv.weight_size) * sizeof(floatX);
}

static Err place_ordered(Vqgan *v) {
    VqTwin *t = v->twin;
    size_t at = 0;
    TRY(mem_alloc(&t->ordered, v->n_layers, sizeof *t->ordered, "vqgan: weights on the GPU"));
    for (size_t i = 0; i < v->n_layers; i++) {
        const VqLayer *l = &v->layer[i];
        if (l->kind != VQ_CONV || l->conv == CONV1) continue;
        const Conv c = layer_conv(v, l);
        t->ordered[i] = t->order_arena + at;
        at += round_up(ordered_weight_size(&c), 64);
    }
    return OK;
}

static Err allocate_twin(Vqgan *v, const VqNeeds *n, size_t units) {
    VqTwin *t = v->twin;
    static const char *const what = "first stage: activations";
    t->conv = n->conv, t->score_size = n->scores;
    TRY(device_alloc(&t->arena, units * sizeof(floatX), what));
    TRY(mem_alloc(&t->wide_at, v->n_values, sizeof *t->wide_at, what));
    TRY(mem_alloc(&t->operand, v->n_values, sizeof *t->operand, what));
    for (size_t i = 0; i < v->n_values; i++) t->operand[i] = (uint8_t)is_operand(v, i);
    TRY(device_alloc(&t->wide, place_wide(v, units, t->wide_at) * sizeof(float), what));
    TRY(device_alloc(&t->order_arena, n->order * sizeof(floatX), "first stage: weights in the order of patches"));
    TRY(device_alloc(&t->planes, n->planes * sizeof(float), what));
    TRY(device_alloc(&t->raw, n->cells * sizeof *t->raw, what));
    TRY(device_alloc(&t->partial, n->partial * sizeof(float), what));
    TRY(device_alloc(&t->scores, n->scores * sizeof(float), what));
    TRY(device_alloc(&t->half, v->c.n_embed * sizeof(float), what));
    TRY(device_alloc(&t->ds, n->ds * sizeof(floatX), what));
    TRY(device_alloc(&t->last, last_size(v) * sizeof(float), what));
    TRY(device_alloc(&t->conv.columns, n->conv.column_size * sizeof(floatX), what));
    TRY(device_alloc(&t->conv.weights, n->conv.weight_size * sizeof(floatX), what));
    TRY(device_alloc(&t->conv.totals, n->conv.total_size * sizeof(float), what));
    t->conv.partial = t->partial;
    return place_ordered(v);
}

static void vqgan_free_cuda(Vqgan *v) {
    VqTwin *t = v->twin;
    void *const all[] = {t->arena, t->order_arena,  t->planes,       t->raw,         t->partial, t->scores, t->half,
                         t->ds,    t->conv.columns, t->conv.weights, t->conv.totals, t->last,    t->wide};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) device_free(all[i]);
    free(t->ordered), free(t->wide_at), free(t->operand);
    free(t);
    v->twin = NULL;
}

/* units: of the arena. *bytes: of everything. */
static Err vqgan_plan_cuda(Vqgan *v, size_t units, int allocate, size_t *bytes) {
    v->b = v->B, v->h = v->H, v->w = v->W;
    for (size_t i = 0; i < v->n_values; i++)
        if (value_elements(v, i) > (1u << 31))
            return err("vqgan: activations of more than 2^31 numbers; a smaller batch takes less");
    const VqNeeds n = shared_needs(v);
    *bytes = units * sizeof(floatX) + place_wide(v, units, NULL) * sizeof(float) + shared_bytes(v, &n);
    if (!allocate) return OK;
    TRY(mem_alloc(&v->twin, 1, sizeof *v->twin, "vqgan: on the GPU"));
    v->twin->d = v->params.device;
    v->twin->changes = (uint64_t)-1;
    if (allocate_twin(v, &n, units) == OK) return OK;
    vqgan_free_cuda(v);
    return FAILED;
}
