/* attention.cu - softmax(q k^T / sqrt(D)) v on a GPU, forward and backward, and query by query as decoding has it.
 *
 * The fellows of the plain loops in transformer.cu. In float the kernels are plain, which is where to begin; in bf16 they
 * are made for tensor cores. device.cu includes this file. */
#include "kernels/device.h"

/* ---- How ----
 *
 * Scores never leave the chip: a block holds TILE queries of one head and goes through the keys, keeping for each query
 * the largest score so far, the sum of exponentials relative to it, and the output relative to it (Milakov and
 * Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention"). Any number of keys
 * will do. Forward leaves lse, the logarithm of the sum, from which backward gets the probabilities again.
 *
 * Backward. With p the probabilities and delta_i = sum_d dy[i,d] y[i,d], which equals sum_j p_ij dp_ij:
 *     dv = p^T dy     dp = dy v^T     ds = p (dp - delta)     dq = ds k / sqrt(D)     dk = ds^T q / sqrt(D)
 * One kernel has a tile of queries and gives dq, the other a tile of keys and gives dk and dv: both form p and ds anew,
 * and nobody adds to what another block writes.
 *
 * These three kernels are here twice, under the same names: in float, as plain as the mathematics allows, and in bf16
 * on tensor cores. The float build of device.cu has the ones, the bf16 build the others. */

enum { TILE = 64, GPU_HEAD_MAX = 128 };

static __device__ inline unsigned visible_keys(const Attention *s, unsigned i) {
    const unsigned Tk = (unsigned)s->Tk, unmasked = (unsigned)s->unmasked;
    if (!s->causal) return Tk;
    return i >= unmasked ? i + 1 : unmasked < Tk ? unmasked : Tk;
}

/* Of query i0 and those that share its tile, the last. It sees the most keys. */
static __device__ inline unsigned last_query(const Attention *s, unsigned i0, unsigned tile) {
    const unsigned Tq = (unsigned)s->Tq;
    return i0 + tile < Tq ? i0 + tile - 1 : Tq - 1;
}

/* Where head h of batch row b begins in q (B,Tq,q_row), k, v (B,key_stride,kv_row) and y (B,Tq,inner), and with which of
 * its T queries or keys the block's tile. Blocks are the tiles of the first head, then those of the second, in one
 * dimension, for CUDA allows no more than 65,535 heads in another. */
typedef struct {
    size_t queries, keys, outs, row; /* row: of lse (B*heads,Tq) */
    unsigned q_row, kv_row, inner, first;
} HeadAt;
static __device__ inline HeadAt head_at(const Attention *s, size_t T) {
    const unsigned tiles = ((unsigned)T + TILE - 1) / TILE, head = blockIdx.x / tiles;
    const size_t b = head / s->heads, h = head % s->heads;
    HeadAt at;
    at.inner = (unsigned)(s->heads * s->D);
    at.q_row = s->q_row ? (unsigned)s->q_row : at.inner, at.kv_row = s->kv_row ? (unsigned)s->kv_row : at.inner;
    at.queries = b * s->Tq * at.q_row + h * s->D, at.keys = b * s->key_stride * at.kv_row + h * s->D;
    at.outs = b * s->Tq * at.inner + h * s->D;
    at.row = head * s->Tq, at.first = blockIdx.x % tiles * TILE;
    return at;
}

typedef struct {
    Attention s;
    floatX *dq, *dk, *dv;
    const floatX *dy, *q, *k, *v;
    const float *lse, *delta;
} AttendBackward;

/* Rows of D numbers begin at multiples of D, so that 16 bytes of them can move at a time, or only two numbers, or one:
 * a Unit. ACROSS lanes share a row of up to W numbers and have PER_LANE units each. */
template <int UNIT> struct alignas(UNIT * sizeof(floatX)) Unit { floatX at[UNIT]; };
template <int UNIT, int W> struct Moves {
    enum { ACROSS = W / UNIT < WARP ? W / UNIT : WARP, PER_LANE = W / UNIT / ACROSS };
};

#ifndef FLOATX_BF16
/* ---- In float: plain ----
 *
 * Keys come TILE at a time. 256 threads stand as 16 x 16: thread (tx,ty) has queries ty + 16a and keys or channels
 * tx + 16b, so that 16 lanes that share a query can add up by exchanging. Tiles lie in shared memory as float, rows of
 * D+1 or TILE+1: the odd stride puts what 16 lanes read in different banks. */

enum { SIDE = 16, PER_SIDE = TILE / SIDE, ATTEND_THREADS = SIDE * SIDE };

/* Shared memory: tiles of queries and keys, of dy and values, and one of probabilities or their gradient */
static size_t attend_bytes(size_t D, int backward) {
    return TILE * ((backward ? 4 : 2) * (D + 1) + TILE + 1) * sizeof(float);
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

/* sum[a][b] += sum_j w[ty+16a, j] x[j, tx+16b]; with turned, w[j, ty+16a]. w (TILE,TILE+1), x (TILE,D+1). W: how many
 * channels there can be. */
template <int W>
static __device__ inline void weigh_rows(float sum[PER_SIDE][W / SIDE], const float *w, int turned, const float *x,
                                         int D) {
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    for (int j = 0; j < TILE; j++) {
        float ws[PER_SIDE];
        for (int a = 0; a < PER_SIDE; a++)
            ws[a] = turned ? w[j * (TILE + 1) + ty + SIDE * a] : w[(ty + SIDE * a) * (TILE + 1) + j];
#pragma unroll
        for (int b = 0; b < W / SIDE; b++) {
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

template <int W>
static __global__ void __launch_bounds__(ATTEND_THREADS)
    attend_forward_kernel(Attention s, floatX *y, float *lse, const floatX *q, const floatX *k, const floatX *v) {
    SHARED(float, queries);
    const int D = (int)s.D, tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    float *keys = queries + TILE * (D + 1), *p = keys + TILE * (D + 1); /* keys, then values; probabilities */
    const HeadAt at = head_at(&s, s.Tq);
    const unsigned i0 = at.first, end = visible_keys(&s, last_query(&s, i0, TILE));
    float out[PER_SIDE][W / SIDE], largest[PER_SIDE], sum[PER_SIDE];
    for (int a = 0; a < PER_SIDE; a++) {
        largest[a] = -HUGE_VALF, sum[a] = 0;
#pragma unroll
        for (int b = 0; b < W / SIDE; b++) out[a][b] = 0;
    }
    load_tile(queries, q + at.queries, i0, s.Tq, at.q_row, D, 1 / sqrtf((float)D));
    for (unsigned j0 = 0; j0 < end; j0 += TILE) {
        float score[PER_SIDE][PER_SIDE];
        __syncthreads();
        load_tile(keys, k + at.keys, j0, s.Tk, at.kv_row, D, 1);
        __syncthreads();
        multiply_rows(score, queries, keys, D, D + 1);
        for (int a = 0; a < PER_SIDE; a++) {
            const unsigned i = i0 + ty + SIDE * a, seen = visible_keys(&s, i);
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
            for (int b = 0; b < W / SIDE; b++) out[a][b] *= fade;
        }
        __syncthreads();
        load_tile(keys, v + at.keys, j0, s.Tk, at.kv_row, D, 1);
        __syncthreads();
        weigh_rows<W>(out, p, 0, keys, D);
    }
    for (int a = 0; a < PER_SIDE; a++) {
        const size_t i = i0 + ty + SIDE * a;
        if (i >= s.Tq) continue;
#pragma unroll
        for (int b = 0; b < W / SIDE; b++)
            if (tx + SIDE * b < D) y[at.outs + i * at.inner + tx + SIDE * b] = to_floatX(out[a][b] / sum[a]);
        if (tx == 0 && lse) lse[at.row + i] = largest[a] + logf(sum[a]);
    }
}

/* p and dp of queries i0.. and keys j0.., whose tiles are in shared memory, become p and ds. */
static __device__ inline void softmax_gradient(float p[PER_SIDE][PER_SIDE], float dp[PER_SIDE][PER_SIDE],
                                               const Attention *s, const float *lse, const float *delta, unsigned i0,
                                               unsigned j0) {
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    for (int a = 0; a < PER_SIDE; a++) {
        const unsigned i = i0 + ty + SIDE * a, seen = i < s->Tq ? visible_keys(s, i) : 0;
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

template <int W>
static __device__ inline void put_rows(floatX *x, size_t first, size_t rows, size_t stride,
                                       float sum[PER_SIDE][W / SIDE], int D, float scale) {
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    for (int a = 0; a < PER_SIDE; a++) {
        const size_t i = first + ty + SIDE * a;
#pragma unroll
        for (int b = 0; b < W / SIDE; b++)
            if (i < rows && tx + SIDE * b < D) x[i * stride + tx + SIDE * b] = to_floatX(scale * sum[a][b]);
    }
}

template <int W> static __global__ void __launch_bounds__(ATTEND_THREADS) attend_queries_kernel(AttendBackward x) {
    SHARED(float, queries);
    const Attention *s = &x.s;
    const int D = (int)s->D, tile = TILE * (D + 1);
    float *outs = queries + tile, *keys = outs + tile, *values = keys + tile, *ds = values + tile;
    const HeadAt at = head_at(s, s->Tq);
    const unsigned i0 = at.first, end = visible_keys(s, last_query(s, i0, TILE));
    float dq[PER_SIDE][W / SIDE] = {};
    load_tile(queries, x.q + at.queries, i0, s->Tq, at.q_row, D, 1 / sqrtf((float)D));
    load_tile(outs, x.dy + at.outs, i0, s->Tq, at.inner, D, 1);
    for (unsigned j0 = 0; j0 < end; j0 += TILE) {
        float p[PER_SIDE][PER_SIDE], dp[PER_SIDE][PER_SIDE];
        __syncthreads();
        load_tile(keys, x.k + at.keys, j0, s->Tk, at.kv_row, D, 1);
        load_tile(values, x.v + at.keys, j0, s->Tk, at.kv_row, D, 1);
        __syncthreads();
        multiply_rows(p, queries, keys, D, D + 1);
        multiply_rows(dp, outs, values, D, D + 1);
        softmax_gradient(p, dp, s, x.lse + at.row, x.delta + at.row, i0, j0);
        put_tile(ds, dp);
        __syncthreads();
        weigh_rows<W>(dq, ds, 0, keys, D);
    }
    put_rows<W>(x.dq + at.queries, i0, s->Tq, at.q_row, dq, D, 1 / sqrtf((float)D));
}

template <int W> static __global__ void __launch_bounds__(ATTEND_THREADS) attend_keys_kernel(AttendBackward x) {
    SHARED(float, queries);
    const Attention *s = &x.s;
    const int D = (int)s->D, tile = TILE * (D + 1);
    float *outs = queries + tile, *keys = outs + tile, *values = keys + tile, *weights = values + tile;
    const HeadAt at = head_at(s, s->Tk);
    const unsigned j0 = at.first;
    float dk[PER_SIDE][W / SIDE] = {}, dv[PER_SIDE][W / SIDE] = {};
    load_tile(keys, x.k + at.keys, j0, s->Tk, at.kv_row, D, 1);
    load_tile(values, x.v + at.keys, j0, s->Tk, at.kv_row, D, 1);
    for (unsigned i0 = 0; i0 < s->Tq; i0 += TILE) {
        float p[PER_SIDE][PER_SIDE], dp[PER_SIDE][PER_SIDE];
        if (visible_keys(s, last_query(s, i0, TILE)) <= j0) continue; /* none of these queries sees any of our keys */
        __syncthreads();
        load_tile(queries, x.q + at.queries, i0, s->Tq, at.q_row, D, 1 / sqrtf((float)D));
        load_tile(outs, x.dy + at.outs, i0, s->Tq, at.inner, D, 1);
        __syncthreads();
        multiply_rows(p, queries, keys, D, D + 1);
        multiply_rows(dp, outs, values, D, D + 1);
        softmax_gradient(p, dp, s, x.lse + at.row, x.delta + at.row, i0, j0);
        put_tile(weights, p);
        __syncthreads();
        weigh_rows<W>(dv, weights, 1, outs, D);
        __syncthreads();
        put_tile(weights, dp);
        __syncthreads();
        weigh_rows<W>(dk, weights, 1, queries, D);
    }
    put_rows<W>(x.dk + at.keys, j0, s->Tk, at.kv_row, dk, D, 1);
    put_rows<W>(x.dv + at.keys, j0, s->Tk, at.kv_row, dv, D, 1);
}

#else
/* ---- In bf16: tensor cores ----
 *
 * A block of 4 warps has tiles of TILE rows of its own, 16 for a warp, and others stream past them, a stage of copies
 * ahead of the products: queries see keys and values pass (forward and dq), keys and values see queries and dy (dk and
 * dv). What is multiplied lies in shared memory, rows of W = 64 or 128 channels, zeros from D on, W + 8 apart, so that
 * the 8 rows that a warp loads at a time lie in different banks. Products stay in registers, as multiply_tiles leaves
 * them: of every 8 columns a thread has two in each of two rows, lane / 4 of its warp's 16 and the 8th after it, and 4
 * lanes share a row. Rounded to bf16, this is how multiply_tiles takes its left operand: probabilities go straight into
 * the next product (Dao 2023, "FlashAttention-2"). */

enum { ATTEND_THREADS = TILE / 16 * WARP, STREAM = 32 /* rows that pass at a time */ };

/* Sizes in numbers: from row to row, of an own tile, of a tile that passes, and of a stage, which is two of these */
template <int W> struct Tiles {
    enum { PITCH = W + 8, OWN = TILE * PITCH, PASSING = STREAM * PITCH, STAGE = 2 * PASSING };
};

/* Shared memory: own queries or, in backward, two own tiles; two stages; in backward lse and delta of each */
template <int W> static size_t tile_bytes(int backward) {
    typedef Tiles<W> T;
    return ((backward ? 2 : 1) * T::OWN + 2 * T::STAGE) * sizeof(floatX) + 4 * STREAM * sizeof(float);
}
static size_t attend_bytes(size_t D, int backward) {
    return D <= 64 ? tile_bytes<64>(backward) : tile_bytes<128>(backward);
}

template <int UNIT, int W, int ROWS>
static __device__ inline void copy_units(floatX *tile, const floatX *x, unsigned first, unsigned rows, unsigned stride,
                                         unsigned D) {
    typedef Moves<UNIT, W> M;
    const unsigned c = threadIdx.x % M::ACROSS * UNIT;
#pragma unroll 2
    for (unsigned r = threadIdx.x / M::ACROSS; r < ROWS; r += ATTEND_THREADS / M::ACROSS) {
        const bool there = first + r < rows;
        const floatX *from = there ? x + (size_t)(first + r) * stride : x;
#pragma unroll
        for (unsigned at = c; at < c + W; at += M::ACROSS * UNIT)
            if (at < D) copy_async<UNIT * sizeof(floatX)>(tile + r * Tiles<W>::PITCH + at, from + at, there);
    }
}

/* tile (ROWS,PITCH) = rows first.. of x, which has `rows` of them, stride apart, each of D; zeros beyond the last */
template <int W, int ROWS>
static __device__ inline void copy_tile(floatX *tile, const floatX *x, unsigned first, unsigned rows, unsigned stride,
                                        unsigned D) {
    if (D % PACK == 0)
        copy_units<PACK, W, ROWS>(tile, x, first, rows, stride, D);
    else if (D % 2 == 0)
        copy_units<2, W, ROWS>(tile, x, first, rows, stride, D);
    else
        copy_units<1, W, ROWS>(tile, x, first, rows, stride, D);
}

/* A stage: STREAM rows of x, and as many of y. Closes the group of copies. */
template <int W>
static __device__ inline void copy_stage(floatX *stage, const floatX *x, unsigned x_row, const floatX *y,
                                         unsigned y_row, unsigned first, unsigned rows, unsigned D) {
    copy_tile<W, STREAM>(stage, x, first, rows, x_row, D);
    copy_tile<W, STREAM>(stage + Tiles<W>::PASSING, y, first, rows, y_row, D);
    copy_commit();
}

/* Before any copy: zeros where none will go, between D and W. */
template <int W> static __device__ inline void clear_tiles(floatX *tiles, unsigned rows, unsigned D) {
    if (D == W) return;
    for (unsigned i = threadIdx.x * PACK; i < rows * Tiles<W>::PITCH; i += ATTEND_THREADS * PACK)
        *(Pack *)(tiles + i) = {};
    __syncthreads();
}

/* The warp's 16 rows, as the left operand of multiply_tiles */
template <int W> static __device__ inline void load_rows(unsigned a[W / 16][4], const floatX *rows) {
    const unsigned lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < W / 16; k++) load_matrices(a[k], rows + lane % 16 * Tiles<W>::PITCH + lane / 16 * 8 + k * 16);
}

/* p (16,STREAM) = rows (16,W) tile (STREAM,W)^T */
template <int W>
static __device__ inline void multiply_rows(float p[STREAM / 8][4], const unsigned rows[W / 16][4],
                                            const floatX *tile) {
    typedef Tiles<W> T;
    const unsigned lane = threadIdx.x % WARP;
    tile += (lane / 16 * 8 + lane % 8) * T::PITCH + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < STREAM / 8; n++) p[n][0] = p[n][1] = p[n][2] = p[n][3] = 0;
#pragma unroll
    for (int k = 0; k < W / 16; k++)
#pragma unroll
        for (int n = 0; n < STREAM / 8; n += 2) {
            unsigned b[4]; /* 8 rows of the tile, with the first and the second 8 of the 16 channels, then 8 more */
            load_matrices(b, tile + n * 8 * T::PITCH + k * 16);
            multiply_tiles(p[n], rows[k], b), multiply_tiles(p[n + 1], rows[k], b + 2);
        }
}

/* sum (16,W) += p (16,STREAM) tile (STREAM,W) */
template <int W>
static __device__ inline void weigh_rows(float sum[W / 8][4], const float p[STREAM / 8][4], const floatX *tile) {
    typedef Tiles<W> T;
    const unsigned lane = threadIdx.x % WARP;
    tile += lane % 16 * T::PITCH + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < STREAM / 8; k += 2) {
        const unsigned a[4] = {bf16_pair(p[k][0], p[k][1]), bf16_pair(p[k][2], p[k][3]),
                               bf16_pair(p[k + 1][0], p[k + 1][1]), bf16_pair(p[k + 1][2], p[k + 1][3])};
#pragma unroll
        for (int n = 0; n < W / 8; n += 2) {
            unsigned b[4]; /* 8 channels of the first and the second 8 of 16 rows, then of 8 channels more */
            load_matrices_turned(b, tile + k * 8 * T::PITCH + n * 8);
            multiply_tiles(sum[n], a, b), multiply_tiles(sum[n + 1], a, b + 2);
        }
    }
}

template <int UNIT, int W>
static __device__ inline void store_units(floatX *x, const floatX *own, unsigned rows, unsigned stride, unsigned D) {
    typedef Moves<UNIT, W> M;
    const unsigned lane = threadIdx.x % WARP, c = lane % M::ACROSS * UNIT;
#pragma unroll 2
    for (unsigned r = lane / M::ACROSS; r < 16; r += WARP / M::ACROSS)
#pragma unroll
        for (unsigned at = c; at < c + W; at += M::ACROSS * UNIT)
            if (r < rows && at < D)
                *(Unit<UNIT> *)(x + (size_t)r * stride + at) = *(const Unit<UNIT> *)(own + r * Tiles<W>::PITCH + at);
}

/* x, up to 16 rows = sum (16,W), row r times factor[r / 8]; by way of own, what the warp has in shared memory of a tile
 * of its own and needs no more, so that a row is written in one go */
template <int W>
static __device__ inline void store_rows(floatX *x, unsigned first, unsigned end, unsigned stride, unsigned D,
                                         floatX *own, const float sum[W / 8][4], float factor, float factor_8) {
    const unsigned lane = threadIdx.x % WARP, rows = first < end ? end - first : 0;
    unsigned *word = (unsigned *)(void *)(own + lane / 4 * Tiles<W>::PITCH + lane % 4 * 2);
    x += (size_t)first * stride;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < W / 8; n++) {
        word[n * 4] = bf16_pair(sum[n][0] * factor, sum[n][1] * factor);
        word[n * 4 + 4 * Tiles<W>::PITCH] = bf16_pair(sum[n][2] * factor_8, sum[n][3] * factor_8);
    }
    __syncwarp();
    if (D % PACK == 0)
        store_units<PACK, W>(x, own, rows, stride, D);
    else if (D % 2 == 0)
        store_units<2, W>(x, own, rows, stride, D);
    else
        store_units<1, W>(x, own, rows, stride, D);
}

static const float LOG2_E = 1.44269504f, LN_2 = 0.69314718f; /* powers of 2 are what a GPU computes */

/* Over the 4 lanes that share a row */
static __device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
static __device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/* What forward keeps of a thread's two queries: how many keys each sees, the largest q k^T so far, and the thread's
 * part of the sum of 2^(scale (q k^T - largest)) */
typedef struct {
    unsigned seen[2];
    float largest[2], sum[2];
} Softmax;

/* p holds q k^T of keys j0..; becomes the numerators of probabilities, and what is in out (16,W) fades accordingly.
 * Every query sees key 0, so the first keys that come make `largest` finite. */
template <int W>
static __device__ inline void softmax_step(Softmax *x, float p[STREAM / 8][4], float out[W / 8][4], unsigned j0,
                                           float scale) {
    const unsigned j = j0 + threadIdx.x % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float peak = x->largest[r];
        if (x->seen[r] < j0 + STREAM) {
#pragma unroll
            for (unsigned n = 0; n < STREAM / 8; n++)
                for (unsigned k = 0; k < 2; k++)
                    if (j + n * 8 + k >= x->seen[r]) p[n][2 * r + k] = -HUGE_VALF;
        }
#pragma unroll
        for (int n = 0; n < STREAM / 8; n++) peak = fmaxf(peak, fmaxf(p[n][2 * r], p[n][2 * r + 1]));
        peak = quad_max(peak);
        const float fade = exp2_approx(scale * (x->largest[r] - peak)), top = scale * peak;
        x->largest[r] = peak, x->sum[r] *= fade;
#pragma unroll
        for (int n = 0; n < STREAM / 8; n++)
            for (int k = 2 * r; k < 2 * r + 2; k++)
                p[n][k] = exp2_approx(fmaf(scale, p[n][k], -top)), x->sum[r] += p[n][k];
#pragma unroll
        for (int n = 0; n < W / 8; n++) out[n][2 * r] *= fade, out[n][2 * r + 1] *= fade;
    }
}

template <int W>
static __global__ void __launch_bounds__(ATTEND_THREADS)
    attend_forward_kernel(Attention s, floatX *y, float *lse, const floatX *q, const floatX *k, const floatX *v) {
    typedef Tiles<W> T;
    SHARED(floatX, own);
    const HeadAt at = head_at(&s, s.Tq);
    const unsigned D = (unsigned)s.D, Tk = (unsigned)s.Tk, i0 = at.first, first = threadIdx.x / WARP * 16,
                   i = i0 + first + threadIdx.x % WARP / 4;
    const unsigned end = visible_keys(&s, last_query(&s, i0, TILE));
    const float scale = LOG2_E / sqrtf((float)D);
    floatX *stages = own + T::OWN, *mine = own + first * T::PITCH;
    Softmax x = {{visible_keys(&s, i), visible_keys(&s, i + 8)}, {-HUGE_VALF, -HUGE_VALF}, {0, 0}};
    unsigned rows[W / 16][4];
    float out[W / 8][4] = {};
    clear_tiles<W>(own, TILE + 4 * STREAM, D);
    copy_tile<W, TILE>(own, q + at.queries, i0, (unsigned)s.Tq, at.q_row, D);
    copy_stage<W>(stages, k + at.keys, at.kv_row, v + at.keys, at.kv_row, 0, Tk, D);
    for (unsigned j0 = 0, turn = 0; j0 < end; j0 += STREAM, turn = !turn) {
        float p[STREAM / 8][4];
        const floatX *now = stages + turn * T::STAGE;
        copy_wait<0>();
        __syncthreads(); /* everybody's copies are there, and nobody reads the other stage any more */
        if (j0 + STREAM < end)
            copy_stage<W>(stages + !turn * T::STAGE, k + at.keys, at.kv_row, v + at.keys, at.kv_row, j0 + STREAM, Tk,
                          D);
        if (j0 == 0) load_rows<W>(rows, mine);
        multiply_rows<W>(p, rows, now);
        softmax_step<W>(&x, p, out, j0, scale);
        weigh_rows<W>(out, p, now + T::PASSING);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) x.sum[r] = quad_sum(x.sum[r]);
    store_rows<W>(y + at.outs, i0 + first, s.Tq, at.inner, D, mine, out, 1 / x.sum[0], 1 / x.sum[1]);
#pragma unroll
    for (unsigned r = 0; r < 2; r++)
        if (lse && threadIdx.x % 4 == 0 && i + 8 * r < s.Tq)
            lse[at.row + i + 8 * r] = LN_2 * scale * x.largest[r] + logf(x.sum[r]);
}

/* p holds q k^T and dp holds dy v^T of a query and a key; they become p and ds. */
static __device__ inline void softmax_gradient(float *p, float *dp, bool seen, float scale, float log2_sum,
                                               float delta) {
    *p = seen ? exp2_approx(fmaf(scale, *p, -log2_sum)) : 0;
    *dp = *p * (*dp - delta);
}

template <int W> static __global__ void __launch_bounds__(ATTEND_THREADS) attend_queries_kernel(AttendBackward x) {
    typedef Tiles<W> T;
    SHARED(floatX, own);
    const Attention *s = &x.s;
    const HeadAt at = head_at(s, s->Tq);
    const unsigned D = (unsigned)s->D, Tq = (unsigned)s->Tq, Tk = (unsigned)s->Tk, i0 = at.first,
                   first = threadIdx.x / WARP * 16, i = i0 + first + threadIdx.x % WARP / 4;
    const unsigned end = visible_keys(s, last_query(s, i0, TILE));
    const unsigned seen[2] = {visible_keys(s, i), visible_keys(s, i + 8)};
    const float *lse = x.lse + at.row, *delta = x.delta + at.row, scale = LOG2_E / sqrtf((float)D);
    const float log2_sum[2] = {i < Tq ? LOG2_E * lse[i] : 0, i + 8 < Tq ? LOG2_E * lse[i + 8] : 0};
    const float mean[2] = {i < Tq ? delta[i] : 0, i + 8 < Tq ? delta[i + 8] : 0};
    floatX *stages = own + 2 * T::OWN, *mine = own + first * T::PITCH;
    unsigned rows[W / 16][4], outs[W / 16][4];
    float dq[W / 8][4] = {};
    clear_tiles<W>(own, 2 * TILE + 4 * STREAM, D);
    copy_tile<W, TILE>(own, x.q + at.queries, i0, Tq, at.q_row, D);
    copy_tile<W, TILE>(own + T::OWN, x.dy + at.outs, i0, Tq, at.inner, D);
    copy_stage<W>(stages, x.k + at.keys, at.kv_row, x.v + at.keys, at.kv_row, 0, Tk, D);
    for (unsigned j0 = 0, turn = 0; j0 < end; j0 += STREAM, turn = !turn) {
        const unsigned j = j0 + threadIdx.x % 4 * 2;
        float p[STREAM / 8][4], dp[STREAM / 8][4];
        const floatX *now = stages + turn * T::STAGE;
        copy_wait<0>();
        __syncthreads();
        if (j0 + STREAM < end)
            copy_stage<W>(stages + !turn * T::STAGE, x.k + at.keys, at.kv_row, x.v + at.keys, at.kv_row, j0 + STREAM,
                          Tk, D);
        if (j0 == 0) load_rows<W>(rows, mine), load_rows<W>(outs, mine + T::OWN);
        multiply_rows<W>(p, rows, now);
        multiply_rows<W>(dp, outs, now + T::PASSING);
#pragma unroll
        for (unsigned n = 0; n < STREAM / 8; n++)
#pragma unroll
            for (unsigned k = 0; k < 4; k++)
                softmax_gradient(&p[n][k], &dp[n][k], j + n * 8 + k % 2 < seen[k / 2], scale, log2_sum[k / 2],
                                 mean[k / 2]);
        weigh_rows<W>(dq, dp, now);
    }
    const float factor = 1 / sqrtf((float)D);
    store_rows<W>(x.dq + at.queries, i0 + first, Tq, at.q_row, D, mine, dq, factor, factor);
}

/* STREAM queries' lse and delta, for a stage; zeros beyond the last */
static __device__ inline void copy_sums(float *sums, const float *lse, const float *delta, unsigned i0, unsigned Tq) {
    const unsigned n = threadIdx.x % STREAM, which = threadIdx.x / STREAM;
    const float *from = which ? delta : lse;
    if (which < 2) copy_async<4>(sums + threadIdx.x, i0 + n < Tq ? from + i0 + n : from, i0 + n < Tq);
}

/* Rows are keys and columns are queries here: a thread has two keys, and of every 8 queries two. */
static __device__ inline void softmax_gradient_turned(float p[STREAM / 8][4], float dp[STREAM / 8][4],
                                                      const Attention *s, const float *sums, unsigned i0, unsigned j,
                                                      float scale) {
    const bool all = visible_keys(s, i0) > j + 8; /* the first of these queries sees both, and so does the last */
#pragma unroll
    for (unsigned n = 0; n < STREAM / 8; n++)
#pragma unroll
        for (unsigned k = 0; k < 2; k++) {
            const unsigned i = n * 8 + threadIdx.x % 4 * 2 + k;
            const unsigned seen = all ? ~0u : visible_keys(s, i0 + i);
            const float log2_sum = LOG2_E * sums[i], delta = sums[STREAM + i];
            softmax_gradient(&p[n][k], &dp[n][k], j < seen, scale, log2_sum, delta);
            softmax_gradient(&p[n][k + 2], &dp[n][k + 2], j + 8 < seen, scale, log2_sum, delta);
        }
}

template <int W> static __global__ void __launch_bounds__(ATTEND_THREADS) attend_keys_kernel(AttendBackward x) {
    typedef Tiles<W> T;
    SHARED(floatX, own);
    const Attention *s = &x.s;
    const HeadAt at = head_at(s, s->Tk);
    const unsigned D = (unsigned)s->D, Tq = (unsigned)s->Tq, Tk = (unsigned)s->Tk, j0 = at.first,
                   first = threadIdx.x / WARP * 16;
    const float *lse = x.lse + at.row, *delta = x.delta + at.row, scale = LOG2_E / sqrtf((float)D);
    floatX *stages = own + 2 * T::OWN, *mine = own + first * T::PITCH;
    float *sums = (float *)(void *)(stages + 2 * T::STAGE);
    float dk[W / 8][4] = {}, dv[W / 8][4] = {};
    unsigned i0 = 0; /* the first queries of which one sees one of our keys */
    while (i0 < Tq && visible_keys(s, last_query(s, i0, STREAM)) <= j0) i0 += STREAM;
    clear_tiles<W>(own, 2 * TILE + 4 * STREAM, D);
    copy_tile<W, TILE>(own, x.k + at.keys, j0, Tk, at.kv_row, D);
    copy_tile<W, TILE>(own + T::OWN, x.v + at.keys, j0, Tk, at.kv_row, D);
    copy_sums(sums, lse, delta, i0, Tq);
    copy_stage<W>(stages, x.q + at.queries, at.q_row, x.dy + at.outs, at.inner, i0, Tq, D);
    for (unsigned turn = 0; i0 < Tq; i0 += STREAM, turn = !turn) {
        float p[STREAM / 8][4], dp[STREAM / 8][4];
        unsigned rows[W / 16][4];
        const floatX *now = stages + turn * T::STAGE;
        copy_wait<0>();
        __syncthreads();
        if (i0 + STREAM < Tq) {
            copy_sums(sums + !turn * 2 * STREAM, lse, delta, i0 + STREAM, Tq);
            copy_stage<W>(stages + !turn * T::STAGE, x.q + at.queries, at.q_row, x.dy + at.outs, at.inner, i0 + STREAM,
                          Tq, D);
        }
        load_rows<W>(rows, mine);
        multiply_rows<W>(p, rows, now);
        load_rows<W>(rows, mine + T::OWN);
        multiply_rows<W>(dp, rows, now + T::PASSING);
        softmax_gradient_turned(p, dp, s, sums + turn * 2 * STREAM, i0, j0 + first + threadIdx.x % WARP / 4, scale);
        weigh_rows<W>(dv, p, now + T::PASSING);
        weigh_rows<W>(dk, dp, now);
    }
    copy_wait<0>();
    __syncthreads();
    store_rows<W>(x.dk + at.keys, j0 + first, Tk, at.kv_row, D, mine, dk, 1 / sqrtf((float)D), 1 / sqrtf((float)D));
    store_rows<W>(x.dv + at.keys, j0 + first, Tk, at.kv_row, D, mine + T::OWN, dv, 1, 1);
}
#endif

/* ---- Launching either ---- */

static Err check_head(const Attention *s) {
    if (s->D <= GPU_HEAD_MAX) return OK;
    return err("transformer: heads of %zu channels; on the GPU they may have %d", s->D, (int)GPU_HEAD_MAX);
}

static unsigned head_blocks(const Attention *s, size_t T) {
    return (unsigned)(s->B * s->heads * ceil_div(T, TILE));
}

/* Forward leaves lse (B*heads,Tq). */
static size_t attention_saved_gpu(const Attention *s) {
    return s->B * s->heads * s->Tq * sizeof(float);
}

static Err attention_forward_gpu(const Compute *on, real *y, real *saved, const real *q, const real *k, const real *v,
                                 const Attention *s) {
    const unsigned grid = head_blocks(s, s->Tq);
    const size_t bytes = attend_bytes(s->D, 0);
    const floatX *qx = (const floatX *)q, *kx = (const floatX *)k, *vx = (const floatX *)v;
    TRY(check_head(s));
    if (s->D <= 64)
        LAUNCH(on->device, attend_forward_kernel<64>, grid, ATTEND_THREADS, bytes, *s, (floatX *)y, saved, qx, kx, vx);
    else
        LAUNCH(on->device, attend_forward_kernel<128>, grid, ATTEND_THREADS, bytes, *s, (floatX *)y, saved, qx, kx, vx);
    return OK;
}

/* delta (B*heads,Tq): a warp per row. */
static __global__ void attend_delta_kernel(Attention s, float *delta, const floatX *dy, const floatX *y) {
    const size_t r = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (r >= s.B * s.heads * s.Tq) return;
    const size_t i = r % s.Tq, b = r / s.Tq / s.heads, h = r / s.Tq % s.heads;
    const size_t at = (b * s.Tq + i) * s.heads * s.D + h * s.D;
    float sum = 0;
    for (size_t c = lane; c < s.D; c += WARP) sum += to_float(dy[at + c]) * to_float(y[at + c]);
    sum = warp_sum(sum);
    if (lane == 0) delta[r] = sum;
}

/* Scratch: delta (B*heads,Tq) */
static size_t attention_needs_gpu(const Compute *, const Attention *s, int backward) {
    return backward ? s->B * s->heads * s->Tq * sizeof(float) : 0;
}

static Err attention_backward_gpu(const Compute *on, real *dq, real *dk, real *dv, const real *dy, const real *y,
                                  const real *saved, const real *q, const real *k, const real *v, const Attention *s) {
    Device *d = on->device;
    float *delta = (float *)on->scratch;
    const AttendBackward x = {*s,
                              (floatX *)dq,
                              (floatX *)dk,
                              (floatX *)dv,
                              (const floatX *)dy,
                              (const floatX *)q,
                              (const floatX *)k,
                              (const floatX *)v,
                              saved,
                              delta};
    const unsigned queries = head_blocks(s, s->Tq), keys = head_blocks(s, s->Tk);
    const size_t bytes = attend_bytes(s->D, 1);
    TRY(check_head(s));
    LAUNCH(d, attend_delta_kernel, blocks_for(s->B * s->heads * s->Tq, ROW_WARPS), ROW_WARPS * WARP, 0, *s, delta, x.dy,
           (const floatX *)y);
    if (s->D <= 64) {
        LAUNCH(d, attend_queries_kernel<64>, queries, ATTEND_THREADS, bytes, x);
        LAUNCH(d, attend_keys_kernel<64>, keys, ATTEND_THREADS, bytes, x);
    } else {
        LAUNCH(d, attend_queries_kernel<128>, queries, ATTEND_THREADS, bytes, x);
        LAUNCH(d, attend_keys_kernel<128>, keys, ATTEND_THREADS, bytes, x);
    }
    return OK;
}

/* ---- Decoding: n new queries (one, or a prompt) against all keys so far ----
 *
 * A block per head and batch row. The lanes that share a row are a team; the teams of a block share the keys, and each
 * reads AHEAD keys and values at a time. A team keeps of its keys what forward keeps: the largest score, the sum of
 * exponentials relative to it, and the output relative to it, of which a lane has the channels that it reads. In the
 * end they are put together in shared memory, (W + 2) floats for each team. */

enum { DECODE_THREADS = 256, AHEAD = 4 };

template <int UNIT, int W> struct Team {
    enum { LANES = Moves<UNIT, W>::ACROSS, PER_LANE = Moves<UNIT, W>::PER_LANE, COUNT = DECODE_THREADS / LANES };
    float query[PER_LANE][UNIT], out[PER_LANE][UNIT], largest, sum;
};

/* Puts the new keys or values, rows (B,n,inner), in their places in a cache (B,key_stride,inner), from pos on. */
static __device__ inline void append_keys(const Attention *s, floatX *cache, const floatX *fresh, size_t pos) {
    const size_t b = blockIdx.x / s->heads, h = blockIdx.x % s->heads, inner = s->heads * s->D;
    for (size_t x = threadIdx.x; x < s->Tq * s->D; x += blockDim.x) {
        const size_t i = x / s->D, c = h * s->D + x % s->D;
        cache[(b * s->key_stride + pos + i) * inner + c] = fresh[(b * s->Tq + i) * inner + c];
    }
}

/* What a lane has of a row of D numbers; zeros beyond, or if the row is not there */
template <int UNIT, int W>
static __device__ inline void load_share(Unit<UNIT> share[Moves<UNIT, W>::PER_LANE], const floatX *row, unsigned D,
                                         bool there) {
    typedef Moves<UNIT, W> M;
#pragma unroll
    for (unsigned u = 0; u < M::PER_LANE; u++) {
        const unsigned c = (u * M::ACROSS + threadIdx.x % M::ACROSS) * UNIT;
        share[u] = {};
        if (there && c < D) share[u] = *(const Unit<UNIT> *)(row + c);
    }
}

/* A team sees key j and AHEAD - 1 more, as many apart as there are teams, of rows inner apart. */
template <int UNIT, int W>
static __device__ inline void see_keys(Team<UNIT, W> *x, const floatX *k, const floatX *v, unsigned j, unsigned keys,
                                       size_t inner, unsigned D) {
    typedef Team<UNIT, W> T;
    Unit<UNIT> key[AHEAD][T::PER_LANE], value[AHEAD][T::PER_LANE];
    float score[AHEAD], peak = x->largest;
#pragma unroll
    for (unsigned a = 0; a < AHEAD; a++) {
        const unsigned at = j + a * T::COUNT;
        load_share<UNIT, W>(key[a], k + at * inner, D, at < keys);
        load_share<UNIT, W>(value[a], v + at * inner, D, at < keys);
    }
#pragma unroll
    for (unsigned a = 0; a < AHEAD; a++) {
        score[a] = 0;
        for (int u = 0; u < T::PER_LANE; u++)
            for (int e = 0; e < UNIT; e++) score[a] += x->query[u][e] * to_float(key[a][u].at[e]);
        for (int far = T::LANES / 2; far; far /= 2) score[a] += __shfl_xor_sync(0xffffffffu, score[a], far);
        if (j + a * T::COUNT < keys) peak = fmaxf(peak, score[a]);
    }
    const float fade = peak == x->largest ? 1 : expf(x->largest - peak); /* no key seen yet, nor now: both infinite */
    x->largest = peak, x->sum *= fade;
    for (int u = 0; u < T::PER_LANE; u++)
        for (int e = 0; e < UNIT; e++) x->out[u][e] *= fade;
#pragma unroll
    for (unsigned a = 0; a < AHEAD; a++) {
        const float weight = j + a * T::COUNT < keys ? expf(score[a] - peak) : 0;
        x->sum += weight;
        for (int u = 0; u < T::PER_LANE; u++)
            for (int e = 0; e < UNIT; e++) x->out[u][e] += weight * to_float(value[a][u].at[e]);
    }
}

/* y (D) = what all teams of the block have seen; thread c gives channel c */
template <int UNIT, int W>
static __device__ inline void join_teams(floatX *y, float *shared, const Team<UNIT, W> *x, unsigned D) {
    typedef Team<UNIT, W> T;
    const unsigned lane = threadIdx.x % T::LANES, c = threadIdx.x;
    float *mine = shared + threadIdx.x / T::LANES * (W + 2), peak = -HUGE_VALF, sum = 0, out = 0;
    for (unsigned u = 0; u < T::PER_LANE; u++)
        for (unsigned e = 0; e < UNIT; e++) mine[(u * T::LANES + lane) * UNIT + e] = x->out[u][e];
    if (lane == 0) mine[W] = x->largest, mine[W + 1] = x->sum;
    __syncthreads();
    for (unsigned t = 0; t < T::COUNT; t++) peak = fmaxf(peak, shared[t * (W + 2) + W]);
#pragma unroll 4
    for (unsigned t = 0; t < T::COUNT && c < D; t++) {
        const float *other = shared + t * (W + 2), weight = expf(other[W] - peak);
        sum += weight * other[W + 1], out += weight * other[c];
    }
    if (c < D) y[c] = to_floatX(out / sum);
    __syncthreads();
}

/* pos: where the new keys and values go, in caches that have as many before them; NULL: all are there, s.Tk of them. */
typedef struct {
    Attention s;
    const int *pos;
    floatX *y, *k, *v;
    const floatX *q, *new_k, *new_v;
} AttendDecode;

template <int UNIT, int W>
static __global__ void __launch_bounds__(DECODE_THREADS, 2) attend_decode_kernel(AttendDecode a) {
    SHARED(float, shared);
    typedef Team<UNIT, W> T;
    const Attention *s = &a.s;
    const size_t b = blockIdx.x / s->heads, h = blockIdx.x % s->heads, inner = s->heads * s->D;
    const size_t at_key = b * s->key_stride * inner + h * s->D;
    const unsigned D = (unsigned)s->D, pos = a.pos ? (unsigned)*a.pos : 0,
                   keys = (unsigned)(a.pos ? pos + s->Tq : s->Tk);
    if (a.pos) append_keys(s, a.k, a.new_k, pos), append_keys(s, a.v, a.new_v, pos);
    __syncthreads();
    for (size_t i = 0; i < s->Tq; i++) {
        const size_t at = (b * s->Tq + i) * inner + h * s->D;
        Unit<UNIT> query[T::PER_LANE];
        T x = {{}, {}, -HUGE_VALF, 0};
        load_share<UNIT, W>(query, a.q + at, D, true);
        for (int u = 0; u < T::PER_LANE; u++)
            for (int e = 0; e < UNIT; e++) x.query[u][e] = to_float(query[u].at[e]) / sqrtf((float)D);
        for (unsigned j = 0; j < keys; j += AHEAD * T::COUNT)
            see_keys<UNIT, W>(&x, a.k + at_key, a.v + at_key, j + threadIdx.x / T::LANES, keys, inner, D);
        join_teams<UNIT, W>(a.y + at, shared, &x, D);
    }
}

template <int UNIT, int W> static Err launch_decode(Device *d, const AttendDecode *a) {
    const size_t bytes = Team<UNIT, W>::COUNT * (W + 2) * sizeof(float);
    LAUNCH(d, (attend_decode_kernel<UNIT, W>), (unsigned)(a->s.B * a->s.heads), DECODE_THREADS, bytes, *a);
    return OK;
}

/* Decoding keeps keys and values as they are, (B,key_stride,heads*D). */
static size_t kept_bytes_gpu(const Compute *, const Attention *s) {
    return s->B * s->key_stride * s->heads * s->D * sizeof(floatX);
}

/* Of a whole context, n = key_stride positions of every row */
static Err keep_positions_gpu(const Compute *on, void *kept, const real *x, size_t n, const Attention *s) {
    return device_copy(on->device, kept, x, s->B * n * s->heads * s->D * sizeof(floatX));
}

static Err attend_decode_gpu(Device *d, const Attention *s, const int *pos, floatX *y, const floatX *q, floatX *k,
                             floatX *v, const floatX *new_k, const floatX *new_v) {
    const AttendDecode a = {*s, pos, y, k, v, q, new_k, new_v};
    TRY(check_head(s));
    if (s->D % PACK == 0) return s->D <= 64 ? launch_decode<PACK, 64>(d, &a) : launch_decode<PACK, 128>(d, &a);
    if (s->D % 2 == 0) return s->D <= 64 ? launch_decode<2, 64>(d, &a) : launch_decode<2, 128>(d, &a);
    return s->D <= 64 ? launch_decode<1, 64>(d, &a) : launch_decode<1, 128>(d, &a);
}
