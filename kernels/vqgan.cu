/* vqgan.cu - the first stage's layers on a GPU, but for convolutions: conv.cu. */
#include "kernels/device.h"

/* ---- Group norm, with or without swish ----
 *
 * x, y (B,pixels,C); a group is C/32 neighbouring channels. Three kernels each way: sums of channels over slices; a warp
 * per group adds them up; every element. What forward keeps: */
typedef struct {
    float *group;   /* (B,32,2) mean and 1/deviation */
    float *channel; /* (B,C,2) scale, shift: t = x scale + shift */
} NormKept;

static const float GROUP_EPS = 1e-6f;

typedef struct {
    size_t B, pixels, C;
    int swish;
} NormShape;

static NormKept norm_kept(float *memory, const NormShape *s) {
    const NormKept k = {memory, memory + s->B * 2 * NORM_GROUPS};
    return k;
}

/* Moments are the count of some numbers, their mean, and the sum of squares around it: of each channel over parts of a
 * picture, (B,parts,3,C), from the convolution that made x, or from here, where a part is a slice. Sums are of x - pivot,
 * where the pivot is the first number of the group: close to the mean, so that little is lost in their difference. */
template <typename X> static __global__ void norm_sums_kernel(float *moments, const X *x, NormShape n) {
    const Share s = share_of(n.C, n.pixels, PACK);
    const size_t per = n.C / NORM_GROUPS, left = n.pixels - blockIdx.y * SLICE_CELLS;
    float sum[PACK] = {}, square[PACK] = {}, pivot[PACK] = {};
    x += blockIdx.z * n.pixels * n.C;
    for (int j = 0; j < PACK && s.end; j++) pivot[j] = to_float(x[(s.c + j) / per * per]);
    for (size_t r = s.first; r < s.end; r += CELL_LANES) {
        const Numbers p = numbers_at(x, r * n.C + s.c);
        for (int j = 0; j < PACK; j++) {
            const float gap = p.at[j] - pivot[j];
            sum[j] += gap, square[j] += gap * gap;
        }
    }
    const ChannelSums total = add_lanes<PACK>(sum, square, n.C);
    if (!total.there) return;
    const float count = (float)(left < SLICE_CELLS ? left : (size_t)SLICE_CELLS);
    float *to = moments + ((size_t)blockIdx.z * gridDim.y + blockIdx.y) * 3 * n.C + total.c;
    to[0] = count, to[n.C] = to_float(x[total.c / per * per]) + total.a / count;
    to[2 * n.C] = total.b - total.a * total.a / count;
}

/* Of all threads, warp after warp; warps: shared, one for each */
static __device__ inline double block_sum(double *warps, double x) {
    x = warp_sum(x);
    __syncthreads(); /* the sum before has been read */
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = x;
    __syncthreads();
    x = 0;
    for (unsigned k = 0; k < blockDim.x / WARP; k++) x += warps[k];
    return x;
}

/* A block per group and picture: the mean of all its moments, then the squares around it. */
static __global__ void norm_groups_kernel(NormKept kept, const float *moments, const float *gamma, const float *beta,
                                          NormShape s, size_t parts) {
    SHARED(double, warps);
    const size_t b = blockIdx.y, g = blockIdx.x, per = s.C / NORM_GROUPS, row = 3 * s.C;
    const double count = (double)(s.pixels * per);
    double sum = 0, square = 0;
    moments += b * parts * row + g * per;
    for (size_t i = threadIdx.x; i < parts * per; i += blockDim.x) {
        const float *p = moments + i / per * row + i % per;
        sum += (double)p[0] * (double)p[s.C];
    }
    const double mean = block_sum(warps, sum) / count;
    for (size_t i = threadIdx.x; i < parts * per; i += blockDim.x) {
        const float *p = moments + i / per * row + i % per;
        const double gap = (double)p[s.C] - mean;
        square += (double)p[2 * s.C] + (double)p[0] * gap * gap;
    }
    const float rstd = (float)(1 / sqrt(block_sum(warps, square) / count + (double)GROUP_EPS)), level = (float)mean;
    if (threadIdx.x == 0)
        kept.group[(b * NORM_GROUPS + g) * 2] = level, kept.group[(b * NORM_GROUPS + g) * 2 + 1] = rstd;
    for (size_t c = g * per + threadIdx.x; c < (g + 1) * per; c += blockDim.x) {
        const float scale = rstd * gamma[c];
        kept.channel[(b * s.C + c) * 2] = scale, kept.channel[(b * s.C + c) * 2 + 1] = beta[c] - level * scale;
    }
}

/* y = swish(t). Grid: packs of a picture, pictures; a pack is within a pixel. */
template <typename X>
static __global__ void norm_cells_kernel(floatX *y, const X *x, const float *channel, NormShape n) {
    const unsigned C = (unsigned)n.C, in_picture = (blockIdx.x * blockDim.x + threadIdx.x) * PACK;
    const size_t i = blockIdx.y * n.pixels * n.C + in_picture;
    if (in_picture >= n.pixels * n.C) return;
    const Pairs scale = pairs_at(channel + (blockIdx.y * n.C + in_picture % C) * 2);
    store_whole(y + i, normed(numbers_at(x, i), scale, n.swish));
}

static dim3 pack_grid(const NormShape *n) {
    return dim3(blocks_for(n->pixels * n->C, CELL_THREADS * PACK), (unsigned)n->B);
}

/* y NULL: only what is kept is wanted. moments (B,parts,3,C) NULL: they are still to be found, in partial. */
template <typename X>
static Err group_norm_forward_cuda(Device *d, floatX *y, NormKept kept, const X *x, const float *gamma,
                                   const float *beta, const NormShape *n, const float *moments, size_t parts,
                                   float *partial) {
    const dim3 grid = slice_grid(n->C, n->pixels, n->B, PACK);
    if (!moments) {
        LAUNCH(d, norm_sums_kernel<X>, grid, CELL_THREADS, CELL_THREADS * PACK * sizeof(float), partial, x, *n);
        moments = partial, parts = grid.y;
    }
    LAUNCH(d, norm_groups_kernel, dim3(NORM_GROUPS, (unsigned)n->B), CELL_THREADS, CELL_THREADS / WARP * sizeof(double),
           kept, moments, gamma, beta, *n, parts);
    if (y) LAUNCH(d, norm_cells_kernel<X>, pack_grid(n), CELL_THREADS, 0, y, x, kept.channel, *n);
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
    const Share s = share_of(n.C, n.pixels, PACK);
    const size_t b = blockIdx.z, per = n.C / NORM_GROUPS;
    float sum[PACK] = {}, sum_hat[PACK] = {}, mean[PACK] = {}, rstd[PACK] = {}, scale[PACK] = {}, shift[PACK] = {};
    for (int j = 0; j < PACK && s.end; j++) {
        const float *group = kept.group + (b * NORM_GROUPS + (s.c + j) / per) * 2,
                    *channel = kept.channel + (b * n.C + s.c + j) * 2;
        mean[j] = group[0], rstd[j] = group[1], scale[j] = channel[0], shift[j] = channel[1];
    }
    for (size_t r = s.first; r < s.end; r += CELL_LANES) {
        const size_t at = (b * n.pixels + r) * n.C + s.c;
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
    const double count = (double)(n.pixels * per), mean_d = warp_sum(sum) / count, mean_hat = warp_sum(sum_hat) / count;
    const double mean = (double)kept.group[(b * NORM_GROUPS + g) * 2],
                 rstd = (double)kept.group[(b * NORM_GROUPS + g) * 2 + 1];
    const double slope = -mean_hat * rstd * rstd, offset = -mean_d * rstd - slope * mean;
    for (size_t c = g * per + lane; c < (g + 1) * per; c += WARP)
        line[(b * n.C + c) * 2] = (float)slope, line[(b * n.C + c) * 2 + 1] = (float)offset;
}

template <typename X>
static __global__ void norm_gradient_kernel(floatX *dx, const floatX *dy, const X *x, const float *channel,
                                            const float *line, NormShape n, int accumulate) {
    const unsigned C = (unsigned)n.C, in_picture = (blockIdx.x * blockDim.x + threadIdx.x) * PACK;
    const size_t i = blockIdx.y * n.pixels * n.C + in_picture, c = blockIdx.y * n.C + in_picture % C;
    if (in_picture >= n.pixels * n.C) return;
    const Pairs scale = pairs_at(channel + c * 2), add = pairs_at(line + c * 2);
    const Numbers p = numbers_at(x, i), g = numbers_at(dy, i);
    Pack out = {};
    if (accumulate) out = *(const Pack *)(dx + i);
    for (int j = 0; j < PACK; j++) {
        const float v = p.at[j], dt = g.at[j];
        const float t = n.swish ? through_swish(dt, v * scale.at[2 * j] + scale.at[2 * j + 1]) : dt;
        out.at[j] = to_floatX((accumulate ? to_float(out.at[j]) : 0) + scale.at[2 * j] * t + add.at[2 * j] * v +
                              add.at[2 * j + 1]);
    }
    store_whole(dx + i, out);
}

/* dx overwritten, or added to if `accumulate`; dgamma, dbeta (C) +=. partial: norm_partial_size floats. */
template <typename X>
static Err group_norm_backward_cuda(Device *d, floatX *dx, float *dgamma, float *dbeta, const floatX *dy, const X *x,
                                    NormKept kept, const float *gamma, const NormShape *n, int accumulate,
                                    float *partial) {
    const dim3 grid = slice_grid(n->C, n->pixels, n->B, PACK);
    float *line = partial + channel_slices(n->B, n->pixels, n->C);
    LAUNCH(d, norm_gradient_sums_kernel<X>, grid, CELL_THREADS, CELL_THREADS * PACK * sizeof(float), partial, dy, x,
           kept, *n);
    LAUNCH(d, norm_lines_kernel, (unsigned)n->B, NORM_GROUPS * WARP, 0, line, partial, gamma, kept, *n, (size_t)grid.y);
    LAUNCH(d, norm_gradient_kernel<X>, pack_grid(n), CELL_THREADS, 0, dx, dy, x, kept.channel, line, *n, accumulate);
    return add_channels(d, dbeta, dgamma, partial, n->B * grid.y, n->C);
}

static size_t norm_partial_size(const NormShape *n) {
    return n->B * n->C * (3 * ceil_div(n->pixels, SLICE_CELLS) + 2);
}

/* ---- Attention over the pixels of a picture, one head ----
 *
 * With N pixels of C channels the scores (N,N) fit in memory and C is too wide for a block's, so scores are written
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

/* ds = scale p (dp - sum_j dp p). A row of ds adds up to 0, and what keys have in common must cancel: as p is rounded, the
 * sum is divided by that of p. */
static __global__ void softmax_gradient_kernel(floatX *ds, const float *dp, const floatX *p, float scale, size_t n) {
    const size_t r = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (r >= n) return;
    float sum = 0, all = 0;
    for (size_t j = lane; j < n; j += WARP) {
        const float weight = to_float(p[r * n + j]);
        sum += dp[r * n + j] * weight, all += weight;
    }
    const float mean = warp_sum(sum) / warp_sum(all);
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
static Matmul turned_rows(floatX *y, const floatX *a, const floatX *b, size_t M, size_t N, size_t K, int accumulate) {
    Matmul p = turned_times(NULL, a, b, M, N, K, 0);
    p.d_is_float = 0, p.D = y, p.add = accumulate ? y : NULL;
    return p;
}

/* dx[3]: dq, dk, dv, each overwritten or, where accumulate, added to. */
static Err picture_attend_backward_cuda(Device *d, floatX *const dx[3], const int accumulate[3], const floatX *dy,
                                        const floatX *q, const floatX *k, const floatX *v, const floatX *p, size_t B,
                                        size_t N, size_t C, float *scores, floatX *ds) {
    for (size_t b = 0; b < B; b++) {
        const size_t at = b * N * C;
        floatX *dq = dx[0] + at, *dk = dx[1] + at, *dv = dx[2] + at;
        Matmul product = turned_rows(dv, p + b * picture_scores(N), dy + at, N, C, N, accumulate[2]);
        TRY(matmul(d, &product));
        product = rows_times(scores, dy + at, v + at, N, N, C, C, 1, NULL);
        product.d_is_float = 1;
        TRY(matmul(d, &product));
        LAUNCH(d, softmax_gradient_kernel, blocks_for(N, CELL_THREADS / WARP), CELL_THREADS, 0, ds, scores,
               p + b * picture_scores(N), 1 / sqrtf((float)C), N);
        product = rows_times(dq, ds, k + at, N, C, N, C, 0, accumulate[0] ? dq : NULL);
        TRY(matmul(d, &product));
        product = turned_rows(dk, ds, q + at, N, C, N, accumulate[1]);
        TRY(matmul(d, &product));
    }
    return OK;
}

/* ---- The vector quantiser ---- */

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

/* *total = the sum of SUM_BLOCKS sums, in order. One warp, of which one thread works. */
static __global__ void add_sums_kernel(double *total, const double *sums) {
    double sum = 0;
    if (threadIdx.x > 0) return;
    for (int k = 0; k < SUM_BLOCKS; k++) sum += sums[k];
    *total = sum;
}

/* *gap = the sum of (e - z)^2 */
static Err straight_through_cuda(Device *d, floatX *zq, double *gap, const floatX *z, const floatX *book,
                                 const int32_t *raw, size_t rows, size_t D) {
    LAUNCH(d, straight_kernel, SUM_BLOCKS, CELL_THREADS, BLOCK_SUM_BYTES, zq, d->sums, z, book, raw, rows, D);
    LAUNCH(d, add_sums_kernel, 1, WARP, 0, gap, (const double *)d->sums);
    return OK;
}

/* dz += to_z (z - e) */
static __global__ void commit_kernel(floatX *dz, const floatX *z, const floatX *book, const int32_t *raw, float to_z,
                                     size_t rows, size_t D) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * D) return;
    dz[i] = to_floatX(to_float(dz[i]) + to_z * (to_float(z[i]) - to_float(book[(size_t)raw[i / D] * D + i % D])));
}

/* dbook[k] += to_e (e - z) over the rows whose code is k: a block per entry, and a thread has channels of its own. Shared:
 * the sums (D), then what for_rows_of needs. */
static __global__ void book_gradient_kernel(float *dbook, const floatX *z, const floatX *book, const int32_t *raw,
                                            float to_e, size_t rows, size_t D) {
    SHARED(float, sum);
    unsigned *found = (unsigned *)(void *)(sum + D);
    const size_t k = blockIdx.x;
    for (size_t c = threadIdx.x; c < D; c += blockDim.x) sum[c] = 0;
    for_rows_of(k, raw, rows, found, [=](size_t r) {
        for (size_t c = threadIdx.x; c < D; c += blockDim.x)
            sum[c] += to_float(book[k * D + c]) - to_float(z[r * D + c]);
    });
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

/* (B,C,pixels) of floats as (B,pixels,C), and back */
static __global__ void from_planes_kernel(floatX *to, const float *from, size_t B, size_t C, size_t pixels) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, c = i % C, pixel = i / C % pixels,
                 b = i / C / pixels;
    if (b < B) to[i] = to_floatX(from[(b * C + c) * pixels + pixel]);
}
static __global__ void to_planes_kernel(float *to, const floatX *from, size_t B, size_t C, size_t pixels) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, pixel = i % pixels, c = i / pixels % C,
                 b = i / C / pixels;
    if (b < B) to[i] = to_float(from[(b * pixels + pixel) * C + c]);
}

/* ---- The fellows of vqgan.c's layers ---- */

static floatX *low(const real *x) {
    return (floatX *)(void *)(real *)x;
}
/* Of a layer's scratch: floats. */
static float *scratch_floats(const Compute *on) {
    return (float *)on->scratch;
}
static NormShape norm_shape(const GroupNorm *n) {
    const NormShape s = {n->B, n->hw, n->C, n->swish};
    return s;
}

static size_t group_norm_needs_gpu(const Compute *on, const GroupNorm *n, int backward) {
    const NormShape s = norm_shape(n);
    (void)on, (void)backward;
    return norm_partial_size(&s) * sizeof(float);
}

/* Mean and 1/deviation of every group, scale and shift of every channel */
static size_t group_norm_kept_gpu(const GroupNorm *n) {
    return n->B * (2 * NORM_GROUPS + 2 * n->C) * sizeof(float);
}

static void group_norm_forward_gpu(const Compute *on, real *y, real *kept, const real *x, const real *gamma,
                                   const real *beta, const GroupNorm *n) {
    const NormShape s = norm_shape(n);
    const NormKept k = norm_kept(kept, &s);
    const float *moments = (const float *)n->moments, *f32 = compute_f32_copy(on, x, n->B * n->C * n->hw);
    Device *d = on->device;
    floatX *to = n->deferred ? NULL : low(y);
    float *partial = scratch_floats(on);
    keep_failure(d, n->x_f32 ? group_norm_forward_cuda(d, to, k, f32, gamma, beta, &s, moments, n->parts, partial)
                             : group_norm_forward_cuda(d, to, k, (const floatX *)low(x), gamma, beta, &s, moments,
                                                       n->parts, partial));
}

static void group_norm_backward_gpu(const Compute *on, real *dx, real *dgamma, real *dbeta, real *dy, const real *x,
                                    const real *gamma, const real *beta, const real *kept, int accumulate,
                                    const GroupNorm *n) {
    const NormShape s = norm_shape(n);
    const NormKept k = norm_kept((float *)kept, &s);
    Device *d = on->device;
    float *partial = scratch_floats(on);
    (void)beta;
    if (n->x_f32) {
        const float *f32 = compute_f32_copy(on, x, n->B * n->C * n->hw);
        keep_failure(
            d, group_norm_backward_cuda(d, low(dx), dgamma, dbeta, low(dy), f32, k, gamma, &s, accumulate, partial));
    } else
        keep_failure(d, group_norm_backward_cuda(d, low(dx), dgamma, dbeta, low(dy), (const floatX *)low(x), k, gamma,
                                                 &s, accumulate, partial));
}

/* Scratch: scores (N,N) float, then ds (N,N) floatX */
static size_t picture_attention_needs_gpu(const Compute *on, size_t B, size_t C, size_t N, int backward) {
    (void)on, (void)B, (void)C;
    return round_up(N * N * sizeof(float), ALIGNMENT) + (backward ? N * N * sizeof(floatX) : 0);
}

static void picture_attention_forward_gpu(const Compute *on, real *y, real *p, const real *q, const real *k,
                                          const real *v, size_t B, size_t C, size_t N) {
    keep_failure(on->device, picture_attend_forward_cuda(on->device, low(y), low(p), low(q), low(k), low(v), B, N, C,
                                                         scratch_floats(on)));
}

static void picture_attention_backward_gpu(const Compute *on, real *dq, real *dk, real *dv, const real *dy,
                                           const real *q, const real *k, const real *v, const real *p,
                                           const int accumulate[3], size_t B, size_t C, size_t N) {
    floatX *const dx[3] = {low(dq), low(dk), low(dv)};
    floatX *ds = (floatX *)(void *)((char *)on->scratch + round_up(N * N * sizeof(float), ALIGNMENT));
    keep_failure(on->device, picture_attend_backward_cuda(on->device, dx, accumulate, low(dy), low(q), low(k), low(v),
                                                          low(p), B, N, C, scratch_floats(on), ds));
}

/* Scratch: |e|^2/2 of the codebook, then scores of as many latents as fit, or as COLUMN_BYTES allow. */
static size_t nearest_needs_gpu(const Compute *on, const Codes *s) {
    const size_t all = round_up(s->B * s->N, TILE_ROWS) * s->K;
    (void)on;
    return round_up(s->K * sizeof(float), ALIGNMENT) +
           max_size(TILE_ROWS * s->K, min_size(all, COLUMN_BYTES / sizeof(float))) * sizeof(float);
}

static void nearest_codes_gpu(const Compute *on, int32_t *code, const real *z, const real *book, const Codes *s) {
    const size_t half = round_up(s->K * sizeof(float), ALIGNMENT);
    keep_failure(on->device, nearest_cuda(on->device, code, low(z), operand_of(on->device, book), s->B * s->N, s->K,
                                          s->D, scratch_floats(on), (float *)(void *)((char *)on->scratch + half),
                                          (on->scratch_bytes - half) / sizeof(float)));
}

static void straight_through_gpu(const Compute *on, real *zq, double *gap, const real *z, const real *book,
                                 const int32_t *code, const Codes *s) {
    keep_failure(on->device, straight_through_cuda(on->device, low(zq), gap, low(z), operand_of(on->device, book), code,
                                                   s->B * s->N, s->D));
}

static void quantize_backward_gpu(const Compute *on, real *dz, real *dbook, const real *z, const real *book,
                                  const int32_t *code, double to_z, double to_e, const Codes *s) {
    keep_failure(on->device, quantize_backward_cuda(on->device, low(dz), dbook, low(z), operand_of(on->device, book),
                                                    code, (float)to_z, (float)to_e, s->B * s->N, s->K, s->D));
}

static Err lookup_cuda(Device *d, floatX *zq, const floatX *book, const int32_t *code, size_t rows, size_t D) {
    LAUNCH(d, lookup_kernel, blocks_for(rows * D, CELL_THREADS), CELL_THREADS, 0, zq, book, code, rows, D);
    return OK;
}
static void lookup_codes_gpu(const Compute *on, real *zq, const real *book, const int32_t *code, const Codes *s) {
    keep_failure(on->device, lookup_cuda(on->device, low(zq), operand_of(on->device, book), code, s->B * s->N, s->D));
}

static Err tanh_cuda(Device *d, floatX *y, const floatX *x, size_t n) {
    LAUNCH(d, tanh_forward_kernel, blocks_for(n, CELL_THREADS), CELL_THREADS, 0, y, x, n);
    return OK;
}
static void tanh_forward_gpu(const Compute *on, real *y, const real *x, size_t n) {
    keep_failure(on->device, tanh_cuda(on->device, low(y), low(x), n));
}

static Err tanh_gradient_cuda(Device *d, floatX *dx, const floatX *dy, const floatX *y, size_t n) {
    LAUNCH(d, tanh_backward_kernel, blocks_for(n, CELL_THREADS), CELL_THREADS, 0, dx, dy, y, n);
    return OK;
}
static void tanh_backward_gpu(const Compute *on, real *dx, const real *dy, const real *y, size_t n) {
    keep_failure(on->device, tanh_gradient_cuda(on->device, low(dx), low(dy), low(y), n));
}

/* ---- Between the host's planes and the GPU's pixels, by way of the scratch ---- */

static Err put_planes(const Compute *on, floatX *to, const real *planes, size_t B, size_t C, size_t hw) {
    float *staged = scratch_floats(on);
    TRY(to_device(on->device, staged, planes, B * C * hw * sizeof *staged));
    LAUNCH(on->device, from_planes_kernel, blocks_for(B * C * hw, CELL_THREADS), CELL_THREADS, 0, to, staged, B, C, hw);
    return OK;
}
static void put_planes_gpu(const Compute *on, real *to, const real *planes, size_t B, size_t C, size_t hw) {
    keep_failure(on->device, put_planes(on, low(to), planes, B, C, hw));
}

static Err get_planes_gpu(const Compute *on, real *planes, const real *from, size_t B, size_t C, size_t hw) {
    float *staged = scratch_floats(on);
    TRY(earlier_failure(on->device));
    LAUNCH(on->device, to_planes_kernel, blocks_for(B * C * hw, CELL_THREADS), CELL_THREADS, 0, staged,
           (const floatX *)low(from), B, C, hw);
    return to_host(on->device, planes, staged, B * C * hw * sizeof *staged);
}
