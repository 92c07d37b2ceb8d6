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

enum { GPU_HEAD_MAX = 128 };

static __device__ inline unsigned visible_keys(const Attention *s, unsigned i) {
    const unsigned Tk = (unsigned)s->Tk, unmasked = (unsigned)s->unmasked;
    if (!s->causal) return Tk;
    return i >= unmasked ? i + 1 : unmasked < Tk ? unmasked : Tk;
}

/* The first query that sees key j; all later ones do, too. */
static __device__ inline unsigned first_query(const Attention *s, unsigned j) {
    return s->causal && j >= (unsigned)s->unmasked ? j : 0;
}

/* Of query i0 and those that share its tile, the last. It sees the most keys. */
static __device__ inline unsigned last_query(const Attention *s, unsigned i0, unsigned tile) {
    const unsigned Tq = (unsigned)s->Tq;
    return i0 + tile < Tq ? i0 + tile - 1 : Tq - 1;
}

/* Rows move in units of UNIT numbers: of 16 bytes where rows are a multiple of that, else one by one. A head's D
 * numbers may begin and end within a unit. What is moved is its window: `shift` strangers, the head up to `end`,
 * strangers up to a multiple of UNIT; all rows of a head have the same. W: the most that a window may have. */
static __device__ inline unsigned window_shift(const Attention *s, unsigned head, unsigned unit) {
    return head % (unsigned)s->heads * (unsigned)s->D % unit;
}
static size_t widest_window(const Attention *s, size_t unit) {
    size_t most = 0;
    if (s->heads * s->D % unit || s->q_row % unit || s->kv_row % unit) return (size_t)-1;
    for (size_t h = 0; h < s->heads && h < unit; h++) most = h * s->D % unit > most ? h * s->D % unit : most;
    return most + s->D;
}

/* What backward needs of a query: (B*heads,padded(Tq)), zeros beyond the last query of a head */
struct alignas(8) Sums {
    float lse, delta;
};
struct alignas(16) TwoSums {
    Sums at[2];
};
static __host__ __device__ inline size_t padded(size_t Tq) {
    return (Tq + 63) / 64 * 64;
}

/* Where the window of head h of batch row b begins in q (B,Tq,q_row), k, v (B,key_stride,kv_row) and y (B,Tq,inner), and
 * with which of its T queries or keys the block's tile. Blocks are the tiles of the first head, then those of the second,
 * in one dimension, for CUDA allows no more than 65,535 heads in another. */
typedef struct {
    size_t queries, keys, outs, row, sums; /* row: of lse (B*heads,Tq) */
    unsigned head, q_row, kv_row, inner, shift, end, first;
} HeadAt;
template <int UNIT> static __device__ inline HeadAt head_at(const Attention *s, size_t T, unsigned tile) {
    const unsigned tiles = ((unsigned)T + tile - 1) / tile, head = blockIdx.x / tiles, D = (unsigned)s->D;
    const unsigned b = head / (unsigned)s->heads, h = head % (unsigned)s->heads;
    HeadAt at;
    at.head = head, at.inner = (unsigned)s->heads * D, at.shift = window_shift(s, h, UNIT), at.end = at.shift + D;
    at.q_row = s->q_row ? (unsigned)s->q_row : at.inner, at.kv_row = s->kv_row ? (unsigned)s->kv_row : at.inner;
    at.queries = (size_t)b * s->Tq * at.q_row + h * D - at.shift;
    at.keys = (size_t)b * s->key_stride * at.kv_row + h * D - at.shift;
    at.outs = (size_t)b * s->Tq * at.inner + h * D - at.shift;
    at.row = (size_t)head * s->Tq, at.sums = head * padded(s->Tq), at.first = blockIdx.x % tiles * tile;
    return at;
}

typedef struct {
    Attention s;
    floatX *dq, *dk, *dv;
    const floatX *dy, *y, *q, *k, *v;
    const float *lse;
    Sums *sums;
} AttendBackward;

/* A lane moves a unit at a time. ACROSS lanes share a row of up to W numbers and have PER_LANE units each. */
template <int UNIT> struct alignas(UNIT * sizeof(floatX)) Unit { floatX at[UNIT]; };
template <int UNIT, int W> struct Moves {
    enum { ACROSS = W / UNIT < WARP ? W / UNIT : WARP, PER_LANE = W / UNIT / ACROSS };
};

/* What a lane has of a window; zeros beyond it, or if the row is not there */
template <int UNIT, int W>
static __device__ inline void load_share(Unit<UNIT> share[Moves<UNIT, W>::PER_LANE], const floatX *window, unsigned end,
                                         bool there) {
    typedef Moves<UNIT, W> M;
#pragma unroll
    for (unsigned u = 0; u < M::PER_LANE; u++) {
        const unsigned c = (u * M::ACROSS + threadIdx.x % M::ACROSS) * UNIT;
        share[u] = {};
        if (there && c < end) share[u] = *(const Unit<UNIT> *)(window + c);
    }
}
/* Zero for what load_share gave of strangers: number e of unit u */
template <int UNIT, int W>
static __device__ inline float own_number(const Unit<UNIT> share[Moves<UNIT, W>::PER_LANE], unsigned u, unsigned e,
                                          unsigned shift, unsigned end) {
    const unsigned c = (u * Moves<UNIT, W>::ACROSS + threadIdx.x % Moves<UNIT, W>::ACROSS) * UNIT + e;
    return c >= shift && c < end ? to_float(share[u].at[e]) : 0;
}

#ifndef FLOATX_BF16
/* ---- In float: plain ----
 *
 * Keys come TILE at a time, as many as a block has queries. 256 threads stand as 16 x 16: thread (tx,ty) has queries
 * ty + 16a and keys or channels tx + 16b, so that 16 lanes that share a query can add up by exchanging. Tiles lie in
 * shared memory as float, rows of D+1 or TILE+1: the odd stride puts what 16 lanes read in different banks. */

enum { SIDE = 16 };

/* Heads of more than 64 channels have smaller tiles: GPUs but those of data centres have 99 KB of shared memory. */
template <int W> struct Tiles {
    enum { TILE = W > 64 ? 32 : 64, PER_SIDE = TILE / SIDE, THREADS = SIDE * SIDE };
};

/* Shared memory: tiles of queries and keys, of dy and values, and one of probabilities or their gradient */
template <int W> static size_t attend_bytes(size_t D, int backward) {
    return Tiles<W>::TILE * ((backward ? 4 : 2) * (D + 1) + Tiles<W>::TILE + 1) * sizeof(float);
}

/* tile (TILE,D+1) = scale * rows first.. of x, which has `rows` of them, stride apart; zeros beyond */
template <int TILE>
static __device__ inline void load_tile(float *tile, const floatX *x, size_t first, size_t rows, size_t stride, int D,
                                        float scale) {
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    for (int r = ty; r < TILE; r += SIDE)
        for (int c = tx; c < D; c += SIDE)
            tile[r * (D + 1) + c] = first + r < rows ? scale * to_float(x[(first + r) * stride + c]) : 0;
}

/* sum[a][b] = row ty+16a of x times row tx+16b of y, each of n numbers, rows stride apart */
template <int PER_SIDE>
static __device__ inline void multiply_rows(float (*sum)[PER_SIDE], const float *x, const float *y, int n, int stride) {
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
static __device__ inline void weigh_rows(float sum[][W / SIDE], const float *w, int turned, const float *x, int D) {
    enum { TILE = Tiles<W>::TILE, PER_SIDE = Tiles<W>::PER_SIDE };
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

template <int UNIT, int W>
static __global__ void __launch_bounds__(Tiles<W>::THREADS)
    attend_forward_kernel(Attention s, floatX *y, float *lse, const floatX *q, const floatX *k, const floatX *v) {
    enum { TILE = Tiles<W>::TILE, PER_SIDE = Tiles<W>::PER_SIDE };
    SHARED(float, queries);
    const int D = (int)s.D, tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    float *keys = queries + TILE * (D + 1), *p = keys + TILE * (D + 1); /* keys, then values; probabilities */
    const HeadAt at = head_at<1>(&s, s.Tq, TILE);
    const unsigned i0 = at.first, end = visible_keys(&s, last_query(&s, i0, TILE));
    float out[PER_SIDE][W / SIDE], largest[PER_SIDE], sum[PER_SIDE];
    for (int a = 0; a < PER_SIDE; a++) {
        largest[a] = -HUGE_VALF, sum[a] = 0;
#pragma unroll
        for (int b = 0; b < W / SIDE; b++) out[a][b] = 0;
    }
    load_tile<TILE>(queries, q + at.queries, i0, s.Tq, at.q_row, D, 1 / sqrtf((float)D));
    for (unsigned j0 = 0; j0 < end; j0 += TILE) {
        float score[PER_SIDE][PER_SIDE];
        __syncthreads();
        load_tile<TILE>(keys, k + at.keys, j0, s.Tk, at.kv_row, D, 1);
        __syncthreads();
        multiply_rows<PER_SIDE>(score, queries, keys, D, D + 1);
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
        load_tile<TILE>(keys, v + at.keys, j0, s.Tk, at.kv_row, D, 1);
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
template <int PER_SIDE>
static __device__ inline void softmax_gradient(float (*p)[PER_SIDE], float (*dp)[PER_SIDE], const Attention *s,
                                               const Sums *sums, unsigned i0, unsigned j0) {
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    for (int a = 0; a < PER_SIDE; a++) {
        const unsigned i = i0 + ty + SIDE * a, seen = i < s->Tq ? visible_keys(s, i) : 0;
        const Sums of = i < s->Tq ? sums[i] : Sums{0, 0};
        for (int b = 0; b < PER_SIDE; b++) {
            p[a][b] = j0 + tx + SIDE * b < seen ? expf(p[a][b] - of.lse) : 0;
            dp[a][b] = p[a][b] * (dp[a][b] - of.delta);
        }
    }
}

template <int PER_SIDE> static __device__ inline void put_tile(float *tile, float (*x)[PER_SIDE]) {
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    for (int a = 0; a < PER_SIDE; a++)
        for (int b = 0; b < PER_SIDE; b++) tile[(ty + SIDE * a) * (SIDE * PER_SIDE + 1) + tx + SIDE * b] = x[a][b];
}

template <int W>
static __device__ inline void put_rows(floatX *x, size_t first, size_t rows, size_t stride, float sum[][W / SIDE],
                                       int D, float scale) {
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    for (int a = 0; a < Tiles<W>::PER_SIDE; a++) {
        const size_t i = first + ty + SIDE * a;
#pragma unroll
        for (int b = 0; b < W / SIDE; b++)
            if (i < rows && tx + SIDE * b < D) x[i * stride + tx + SIDE * b] = to_floatX(scale * sum[a][b]);
    }
}

template <int UNIT, int W>
static __global__ void __launch_bounds__(Tiles<W>::THREADS) attend_queries_kernel(AttendBackward x) {
    enum { TILE = Tiles<W>::TILE, PER_SIDE = Tiles<W>::PER_SIDE };
    SHARED(float, queries);
    const Attention *s = &x.s;
    const int D = (int)s->D, tile = TILE * (D + 1);
    float *outs = queries + tile, *keys = outs + tile, *values = keys + tile, *ds = values + tile;
    const HeadAt at = head_at<1>(s, s->Tq, TILE);
    const unsigned i0 = at.first, end = visible_keys(s, last_query(s, i0, TILE));
    float dq[PER_SIDE][W / SIDE] = {};
    load_tile<TILE>(queries, x.q + at.queries, i0, s->Tq, at.q_row, D, 1 / sqrtf((float)D));
    load_tile<TILE>(outs, x.dy + at.outs, i0, s->Tq, at.inner, D, 1);
    for (unsigned j0 = 0; j0 < end; j0 += TILE) {
        float p[PER_SIDE][PER_SIDE], dp[PER_SIDE][PER_SIDE];
        __syncthreads();
        load_tile<TILE>(keys, x.k + at.keys, j0, s->Tk, at.kv_row, D, 1);
        load_tile<TILE>(values, x.v + at.keys, j0, s->Tk, at.kv_row, D, 1);
        __syncthreads();
        multiply_rows<PER_SIDE>(p, queries, keys, D, D + 1);
        multiply_rows<PER_SIDE>(dp, outs, values, D, D + 1);
        softmax_gradient<PER_SIDE>(p, dp, s, x.sums + at.sums, i0, j0);
        put_tile<PER_SIDE>(ds, dp);
        __syncthreads();
        weigh_rows<W>(dq, ds, 0, keys, D);
    }
    put_rows<W>(x.dq + at.queries, i0, s->Tq, at.q_row, dq, D, 1 / sqrtf((float)D));
}

template <int UNIT, int W>
static __global__ void __launch_bounds__(Tiles<W>::THREADS) attend_keys_kernel(AttendBackward x) {
    enum { TILE = Tiles<W>::TILE, PER_SIDE = Tiles<W>::PER_SIDE };
    SHARED(float, queries);
    const Attention *s = &x.s;
    const int D = (int)s->D, tile = TILE * (D + 1);
    float *outs = queries + tile, *keys = outs + tile, *values = keys + tile, *weights = values + tile;
    const HeadAt at = head_at<1>(s, s->Tk, TILE);
    const unsigned j0 = at.first;
    float dk[PER_SIDE][W / SIDE] = {}, dv[PER_SIDE][W / SIDE] = {};
    load_tile<TILE>(keys, x.k + at.keys, j0, s->Tk, at.kv_row, D, 1);
    load_tile<TILE>(values, x.v + at.keys, j0, s->Tk, at.kv_row, D, 1);
    for (unsigned i0 = 0; i0 < s->Tq; i0 += TILE) {
        float p[PER_SIDE][PER_SIDE], dp[PER_SIDE][PER_SIDE];
        if (visible_keys(s, last_query(s, i0, TILE)) <= j0) continue; /* none of these queries sees any of our keys */
        __syncthreads();
        load_tile<TILE>(queries, x.q + at.queries, i0, s->Tq, at.q_row, D, 1 / sqrtf((float)D));
        load_tile<TILE>(outs, x.dy + at.outs, i0, s->Tq, at.inner, D, 1);
        __syncthreads();
        multiply_rows<PER_SIDE>(p, queries, keys, D, D + 1);
        multiply_rows<PER_SIDE>(dp, outs, values, D, D + 1);
        softmax_gradient<PER_SIDE>(p, dp, s, x.sums + at.sums, i0, j0);
        put_tile<PER_SIDE>(weights, p);
        __syncthreads();
        weigh_rows<W>(dv, weights, 1, outs, D);
        __syncthreads();
        put_tile<PER_SIDE>(weights, dp);
        __syncthreads();
        weigh_rows<W>(dk, weights, 1, queries, D);
    }
    put_rows<W>(x.dk + at.keys, j0, s->Tk, at.kv_row, dk, D, 1);
    put_rows<W>(x.dv + at.keys, j0, s->Tk, at.kv_row, dv, D, 1);
}

#else
/* ---- In bf16: tensor cores ----
 *
 * A block has tiles of rows of its own, 16 for a warp, and others stream past them, a stage of copies ahead of the
 * products: queries see keys and values pass (forward and dq), keys and values see queries and dy (dk and dv). What is
 * multiplied lies in shared memory, windows of W numbers, W + 8 apart, so that the 8 rows that a warp loads at a time
 * lie in different banks. Strangers are made zero in own tiles alone: in a product of two rows they count for nothing
 * then, and what they give in a sum of rows is not stored. Products stay in registers, as multiply_tiles leaves them: of
 * every 8 columns a thread has two in each of two rows, lane / 4 of its warp's 16 and the 8th after it, and 4 lanes share
 * a row. Rounded to bf16, this is how multiply_tiles takes its left operand: probabilities go straight into the next
 * product (Dao 2023, "FlashAttention-2"). A warp without rows, or whose rows see nothing of a stage, only copies. */

/* PASS: rows that pass in a stage. Sizes in numbers: from row to row, of an own tile, of a stage */
template <int W> struct Tiles {
    enum { TILE = W > 64 ? 64 : 128, THREADS = TILE / 16 * WARP, PASS = W > 64 ? 32 : 64 };
    enum { PITCH = W + 8, OWN = TILE * PITCH, PASSING = PASS * PITCH, STAGE = 2 * PASSING };
};

/* Shared memory: own queries or, in backward, two own tiles; two stages; in backward the sums of each */
template <int W> static size_t attend_bytes(size_t, int backward) {
    typedef Tiles<W> T;
    return ((backward ? 2 : 1) * T::OWN + 2 * T::STAGE) * sizeof(floatX) + (backward ? 2 * T::PASS * sizeof(Sums) : 0);
}

/* Of a tile of ROWS rows a thread copies the units from column `column` on of EACH rows, the first of them `row`. */
template <int UNIT, int W, int ROWS> struct CopyShare {
    enum { ACROSS = W / UNIT, APART = Tiles<W>::THREADS / ACROSS, EACH = ROWS / APART };
    static_assert(ROWS % APART == 0 && Tiles<W>::THREADS % ACROSS == 0, "every thread has as many units");
    static __device__ inline unsigned row() { return threadIdx.x / ACROSS; }
    static __device__ inline unsigned column() { return threadIdx.x % ACROSS * UNIT; }
};

/* tile (ROWS,PITCH) = windows, up to `end`, of rows first.. of x, which has `rows` of them, stride apart; zeros beyond the
 * last, and up to W. */
template <int UNIT, int W, int ROWS>
static __device__ inline void copy_tile(floatX *tile, const floatX *x, unsigned first, unsigned rows, unsigned stride,
                                        unsigned end) {
    typedef CopyShare<UNIT, W, ROWS> S;
    const unsigned r = S::row(), c = S::column(), left = c < end && first + r < rows ? rows - first - r : 0;
    const floatX *from = x + (size_t)(first + r) * stride + c;
    tile += r * Tiles<W>::PITCH + c;
#pragma unroll(UNIT == 1 ? 1 : S::EACH)
    for (unsigned n = 0; n < S::EACH; n++, from += S::APART * stride)
        copy_async<UNIT * sizeof(floatX)>(tile + n * S::APART * Tiles<W>::PITCH, n * S::APART < left ? from : x,
                                          n * S::APART < left);
}

/* Zeros for the strangers among the units that this thread has copied to an own tile */
template <int UNIT, int W> static __device__ inline void clear_strangers(floatX *tile, const HeadAt *at) {
    typedef CopyShare<UNIT, W, Tiles<W>::TILE> S;
    const unsigned c = S::column();
    if ((c >= at->shift && c + UNIT <= at->end) || c >= at->end) return;
#pragma unroll(UNIT == 1 ? 1 : S::EACH)
    for (unsigned n = 0; n < S::EACH; n++) {
        Unit<UNIT> *unit = (Unit<UNIT> *)(tile + (n * S::APART + S::row()) * Tiles<W>::PITCH + c), x = *unit;
#pragma unroll
        for (unsigned e = 0; e < UNIT; e++)
            if (c + e < at->shift || c + e >= at->end) x.at[e] = to_floatX(0);
        *unit = x;
    }
}

/* A stage: PASS rows of x, and as many of y. Closes the group of copies. */
template <int UNIT, int W>
static __device__ inline void copy_stage(floatX *stage, const floatX *x, unsigned x_row, const floatX *y,
                                         unsigned y_row, unsigned first, unsigned rows, unsigned end) {
    copy_tile<UNIT, W, Tiles<W>::PASS>(stage, x, first, rows, x_row, end);
    copy_tile<UNIT, W, Tiles<W>::PASS>(stage + Tiles<W>::PASSING, y, first, rows, y_row, end);
    copy_commit();
}

/* The warp's 16 rows, as the left operand of multiply_tiles */
template <int W> static __device__ inline void load_rows(unsigned a[W / 16][4], const floatX *rows) {
    const unsigned lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < W / 16; k++) load_matrices(a[k], rows + lane % 16 * Tiles<W>::PITCH + lane / 16 * 8 + k * 16);
}

/* p (16,ROWS) = rows (16,W) tile (ROWS,W)^T */
template <int W, int ROWS>
static __device__ inline void multiply_rows(float p[ROWS / 8][4], const unsigned rows[W / 16][4], const floatX *tile) {
    typedef Tiles<W> T;
    const unsigned lane = threadIdx.x % WARP;
    tile += (lane / 16 * 8 + lane % 8) * T::PITCH + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < ROWS / 8; n++) p[n][0] = p[n][1] = p[n][2] = p[n][3] = 0;
#pragma unroll
    for (int k = 0; k < W / 16; k++)
#pragma unroll
        for (int n = 0; n < ROWS / 8; n += 2) {
            unsigned b[4]; /* 8 rows of the tile, with the first and the second 8 of the 16 channels, then 8 more */
            load_matrices(b, tile + n * 8 * T::PITCH + k * 16);
            multiply_tiles(p[n], rows[k], b), multiply_tiles(p[n + 1], rows[k], b + 2);
        }
}

/* Two blocks of 8 columns, as multiply_tiles leaves them, as a left operand */
static __device__ inline void round_pairs(unsigned a[4], const float p[2][4]) {
    a[0] = bf16_pair(p[0][0], p[0][1]), a[1] = bf16_pair(p[0][2], p[0][3]);
    a[2] = bf16_pair(p[1][0], p[1][1]), a[3] = bf16_pair(p[1][2], p[1][3]);
}

/* sum (16,W) += p (16,ROWS) tile (ROWS,W) */
template <int W, int ROWS>
static __device__ inline void weigh_rows(float sum[W / 8][4], const float p[ROWS / 8][4], const floatX *tile) {
    typedef Tiles<W> T;
    const unsigned lane = threadIdx.x % WARP;
    tile += lane % 16 * T::PITCH + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < ROWS / 8; k += 2) {
        unsigned a[4];
        round_pairs(a, p + k);
#pragma unroll
        for (int n = 0; n < W / 8; n += 2) {
            unsigned b[4]; /* 8 channels of the first and the second 8 of 16 rows, then of 8 channels more */
            load_matrices_turned(b, tile + k * 8 * T::PITCH + n * 8);
            multiply_tiles(sum[n], a, b), multiply_tiles(sum[n + 1], a, b + 2);
        }
    }
}

/* A unit from column c on, BY numbers at a time, but for strangers */
template <int UNIT, int BY>
static __device__ inline void store_some(floatX *to, const floatX *from, unsigned shift, unsigned end, unsigned c) {
#pragma unroll
    for (unsigned e = 0; e < UNIT; e += BY)
        if (c + e >= shift && c + e < end) *(Unit<BY> *)(to + e) = *(const Unit<BY> *)(from + e);
}

/* Rows first.. of x, up to 16 before `end` = sum (16,W), row r times factor[r / 8]; by way of own, what the warp has in
 * shared memory of a tile of its own and needs no more, so that a row is written in units; strangers stay as they are. */
template <int UNIT, int W>
static __device__ inline void store_rows(floatX *x, unsigned first, unsigned end, unsigned stride, const HeadAt *at,
                                         floatX *own, const float sum[W / 8][4], float factor, float factor_8) {
    enum { ACROSS = Moves<UNIT, W>::ACROSS, STEP = ACROSS * UNIT };
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
    for (unsigned r = lane / ACROSS; r < 16 && r < rows; r += WARP / ACROSS)
        for (unsigned c = lane % ACROSS * UNIT; c < at->end; c += STEP) {
            const floatX *from = own + r * Tiles<W>::PITCH + c;
            floatX *to = x + (size_t)r * stride + c;
            if (c >= at->shift && c + UNIT <= at->end)
                *(Unit<UNIT> *)to = *(const Unit<UNIT> *)from;
            else if ((at->shift | at->end) % 2 == 0)
                store_some<UNIT, 2>(to, from, at->shift, at->end, c);
            else
                store_some<UNIT, 1>(to, from, at->shift, at->end, c);
        }
}

static const float LOG2_E = 1.44269504f; /* powers of 2 are what a GPU computes */

/* Over the 4 lanes that share a row */
static __device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
static __device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/* The keys that all of a warp's 16 queries see, and those that one does: none if it has no query. */
typedef struct {
    unsigned all, any;
} Sight;
static __device__ inline Sight warp_sight(const Attention *s, unsigned first) {
    if (first >= s->Tq) return {0, 0};
    return {visible_keys(s, first), visible_keys(s, last_query(s, first, 16))};
}

/* p holds q k^T of keys j0.. and the warp's 16 queries from `first` on; what a query does not see becomes -inf. */
template <int ROWS>
static __device__ inline void hide(const Attention *s, float p[ROWS / 8][4], unsigned first, unsigned j0) {
    const unsigned i = first + threadIdx.x % WARP / 4, j = j0 + threadIdx.x % 4 * 2;
#pragma unroll
    for (unsigned r = 0; r < 2; r++) {
        const unsigned seen = visible_keys(s, i + 8 * r);
#pragma unroll
        for (unsigned n = 0; n < ROWS / 8; n++)
#pragma unroll
            for (unsigned k = 0; k < 2; k++)
                if (j + n * 8 + k >= seen) p[n][2 * r + k] = -HUGE_VALF;
    }
}

/* What forward keeps of a thread's two queries: the largest q k^T so far, and the thread's part of the sum of
 * 2^(scale (q k^T - largest)) */
typedef struct {
    float largest[2], sum[2];
} Softmax;

/* A score may be larger than all before: `largest` follows, and what was summed up fades. */
template <int W> static __device__ inline void rise(Softmax *x, const float peak[2], float out[W / 8][4], float scale) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float top = quad_max(peak[r]), fade = exp2_approx(scale * (x->largest[r] - top));
        x->largest[r] = top, x->sum[r] *= fade;
#pragma unroll
        for (int n = 0; n < W / 8; n++) out[n][2 * r] *= fade, out[n][2 * r + 1] *= fade;
    }
}

/* p holds q k^T, -inf where a query does not see a key. Is one larger than all before, for any lane? peak: the lane's */
template <int ROWS>
static __device__ inline bool find_peaks(float peak[2], const Softmax *x, const float p[ROWS / 8][4]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        peak[r] = x->largest[r];
#pragma unroll
        for (int n = 0; n < ROWS / 8; n++) peak[r] = fmaxf(peak[r], fmaxf(p[n][2 * r], p[n][2 * r + 1]));
    }
    return __ballot_sync(0xffffffffu, peak[0] > x->largest[0] || peak[1] > x->largest[1]);
}

/* p becomes the numerators of probabilities, relative to `largest`, which is finite: every query sees key 0. */
template <int ROWS> static __device__ inline void take_powers(Softmax *x, float p[ROWS / 8][4], float scale) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float top = scale * x->largest[r];
#pragma unroll
        for (int n = 0; n < ROWS / 8; n++)
#pragma unroll
            for (int k = 2 * r; k < 2 * r + 2; k++)
                p[n][k] = exp2_approx(fmaf(scale, p[n][k], -top)), x->sum[r] += p[n][k];
    }
}

/* The warp's 16 queries from `first` on see ROWS more keys, j0.., which are in `keys` and `values`. */
template <int W, int ROWS>
static __device__ inline void attend_step(const Attention *s, Softmax *x, float out[W / 8][4],
                                          const unsigned rows[W / 16][4], const floatX *keys, const floatX *values,
                                          unsigned first, unsigned j0, Sight sight, float scale) {
    float p[ROWS / 8][4], peak[2];
    multiply_rows<W, ROWS>(p, rows, keys);
    if (sight.all < j0 + ROWS) hide<ROWS>(s, p, first, j0);
    if (find_peaks<ROWS>(peak, x, p)) rise<W>(x, peak, out, scale);
    take_powers<ROWS>(x, p, scale);
    weigh_rows<W, ROWS>(out, p, values);
}

/* lse is the base-2 logarithm here. */
template <int UNIT, int W>
static __global__ void __launch_bounds__(Tiles<W>::THREADS, 2)
    attend_forward_kernel(Attention s, floatX *y, float *lse, const floatX *q, const floatX *k, const floatX *v) {
    typedef Tiles<W> T;
    SHARED(floatX, own);
    const HeadAt at = head_at<UNIT>(&s, s.Tq, T::TILE);
    const unsigned Tk = (unsigned)s.Tk, mine = threadIdx.x / WARP * 16, first = at.first + mine,
                   end = visible_keys(&s, last_query(&s, at.first, T::TILE));
    const Sight sight = warp_sight(&s, first);
    const float scale = LOG2_E * rsqrtf((float)s.D);
    floatX *stages = own + T::OWN, *my_rows = own + mine * T::PITCH;
    Softmax x = {{-HUGE_VALF, -HUGE_VALF}, {0, 0}};
    unsigned rows[W / 16][4];
    float out[W / 8][4] = {};
    k += at.keys, v += at.keys;
    copy_tile<UNIT, W, T::TILE>(own, q + at.queries, at.first, (unsigned)s.Tq, at.q_row, at.end);
    copy_commit();
    copy_stage<UNIT, W>(stages, k, at.kv_row, v, at.kv_row, 0, Tk, at.end);
    copy_wait<1>();
    clear_strangers<UNIT, W>(own, &at);
    for (unsigned j0 = 0, turn = 0; j0 < end; j0 += T::PASS, turn = !turn) {
        const floatX *keys = stages + turn * T::STAGE, *values = keys + T::PASSING;
        copy_wait<0>();
        __syncthreads(); /* everybody's copies are there, and nobody reads the other stage any more */
        if (j0 + T::PASS < end)
            copy_stage<UNIT, W>(stages + !turn * T::STAGE, k, at.kv_row, v, at.kv_row, j0 + T::PASS, Tk, at.end);
        if (j0 == 0) load_rows<W>(rows, my_rows);
        if (sight.any + 16 > j0 + T::PASS)
            attend_step<W, T::PASS>(&s, &x, out, rows, keys, values, first, j0, sight, scale);
        else /* few are left */
            for (unsigned j = 0; j0 + j < sight.any; j += 16)
                attend_step<W, 16>(&s, &x, out, rows, keys + j * T::PITCH, values + j * T::PITCH, first, j0 + j, sight,
                                   scale);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) x.sum[r] = quad_sum(x.sum[r]);
    store_rows<UNIT, W>(y + at.outs, first, (unsigned)s.Tq, at.inner, &at, my_rows, out, 1 / x.sum[0], 1 / x.sum[1]);
    const unsigned i = first + threadIdx.x % WARP / 4;
#pragma unroll
    for (unsigned r = 0; r < 2; r++)
        if (lse && threadIdx.x % 4 == 0 && i + 8 * r < s.Tq)
            lse[at.row + i + 8 * r] = scale * x.largest[r] + log2_approx(x.sum[r]);
}

/* p = q k^T becomes probabilities, dp = dy v^T then ds. Rows are queries, and `of` are the sums of the thread's two;
 * TURNED: rows are keys, columns ROWS queries, whose sums are `of`. Queries beyond the last have dy = 0 and sums of
 * 0, and so count for nothing. */
template <bool TURNED> static __device__ inline TwoSums sums_of_block(const Sums *of, unsigned n) {
    if (TURNED) return *(const TwoSums *)(of + n * 8 + threadIdx.x % 4 * 2);
    return {{of[0], of[1]}};
}
template <int ROWS, bool TURNED>
static __device__ inline void take_probabilities(float p[ROWS / 8][4], const Sums *of, float scale) {
#pragma unroll
    for (unsigned n = 0; n < ROWS / 8; n++) {
        const TwoSums two = sums_of_block<TURNED>(of, n);
#pragma unroll
        for (unsigned e = 0; e < 4; e++)
            p[n][e] = exp2_approx(fmaf(scale, p[n][e], -two.at[TURNED ? e % 2 : e / 2].lse));
    }
}
template <int ROWS, bool TURNED>
static __device__ inline void take_gradients(float dp[ROWS / 8][4], const float p[ROWS / 8][4], const Sums *of) {
#pragma unroll
    for (unsigned n = 0; n < ROWS / 8; n++) {
        const TwoSums two = sums_of_block<TURNED>(of, n);
#pragma unroll
        for (unsigned e = 0; e < 4; e++) dp[n][e] = p[n][e] * (dp[n][e] - two.at[TURNED ? e % 2 : e / 2].delta);
    }
}

template <int UNIT, int W>
static __global__ void __launch_bounds__(Tiles<W>::THREADS, 2) attend_queries_kernel(AttendBackward x) {
    typedef Tiles<W> T;
    SHARED(floatX, own);
    const Attention *s = &x.s;
    const HeadAt at = head_at<UNIT>(s, s->Tq, T::TILE);
    const unsigned Tq = (unsigned)s->Tq, Tk = (unsigned)s->Tk, mine = threadIdx.x / WARP * 16, first = at.first + mine,
                   i = first + threadIdx.x % WARP / 4, end = visible_keys(s, last_query(s, at.first, T::TILE));
    const Sight sight = warp_sight(s, first);
    const float factor = rsqrtf((float)s->D), scale = LOG2_E * factor;
    const Sums *sums = x.sums + at.sums, none = {0, 0};
    const Sums of[2] = {i < Tq ? sums[i] : none, i + 8 < Tq ? sums[i + 8] : none};
    const floatX *k = x.k + at.keys, *v = x.v + at.keys;
    floatX *stages = own + 2 * T::OWN, *my_rows = own + mine * T::PITCH;
    unsigned rows[W / 16][4], outs[W / 16][4];
    float dq[W / 8][4] = {};
    copy_tile<UNIT, W, T::TILE>(own, x.q + at.queries, at.first, Tq, at.q_row, at.end);
    copy_tile<UNIT, W, T::TILE>(own + T::OWN, x.dy + at.outs, at.first, Tq, at.inner, at.end);
    copy_commit();
    copy_stage<UNIT, W>(stages, k, at.kv_row, v, at.kv_row, 0, Tk, at.end);
    copy_wait<1>();
    clear_strangers<UNIT, W>(own, &at), clear_strangers<UNIT, W>(own + T::OWN, &at);
    for (unsigned j0 = 0, turn = 0; j0 < end; j0 += T::PASS, turn = !turn) {
        const floatX *keys = stages + turn * T::STAGE;
        copy_wait<0>();
        __syncthreads();
        if (j0 + T::PASS < end)
            copy_stage<UNIT, W>(stages + !turn * T::STAGE, k, at.kv_row, v, at.kv_row, j0 + T::PASS, Tk, at.end);
        if (j0 == 0) load_rows<W>(rows, my_rows), load_rows<W>(outs, my_rows + T::OWN);
#pragma unroll 1
        for (unsigned j = j0; j < j0 + T::PASS && j < sight.any; j += 16, keys += 16 * T::PITCH) {
            float p[2][4], dp[2][4];
            multiply_rows<W, 16>(p, rows, keys);
            multiply_rows<W, 16>(dp, outs, keys + T::PASSING);
            if (sight.all < j + 16) hide<16>(s, p, first, j);
            take_probabilities<16, false>(p, of, scale);
            take_gradients<16, false>(dp, p, of);
            weigh_rows<W, 16>(dq, dp, keys);
        }
    }
    store_rows<UNIT, W>(x.dq + at.queries, first, Tq, at.q_row, &at, my_rows, dq, factor, factor);
}

/* The sums of ROWS queries, for a stage */
template <int ROWS> static __device__ inline void copy_sums(Sums *to, const Sums *from) {
    if (threadIdx.x < ROWS / 2) copy_async(to + 2 * threadIdx.x, from + 2 * threadIdx.x, 1);
}

/* p holds k q^T of the warp's 16 keys from `first` on and ROWS queries i0..; a key that a query does not see becomes -inf:
 * a thread has two keys, and of every 8 queries two. */
template <int ROWS>
static __device__ inline void hide_turned(const Attention *s, float p[ROWS / 8][4], unsigned first, unsigned i0) {
    const unsigned i = i0 + threadIdx.x % 4 * 2, j = first + threadIdx.x % WARP / 4;
#pragma unroll
    for (unsigned n = 0; n < ROWS / 8; n++)
#pragma unroll
        for (unsigned k = 0; k < 2; k++) {
            const unsigned seen = visible_keys(s, i + n * 8 + k);
            if (j >= seen) p[n][k] = -HUGE_VALF;
            if (j + 8 >= seen) p[n][k + 2] = -HUGE_VALF;
        }
}
/* Whether that does anything: where the first query sees all, the others do. */
static __device__ inline bool hides_turned(const Attention *s, unsigned first, unsigned i0) {
    return s->causal && visible_keys(s, i0) < first + 16;
}

template <int UNIT, int W>
static __global__ void __launch_bounds__(Tiles<W>::THREADS, 2) attend_keys_kernel(AttendBackward x) {
    typedef Tiles<W> T;
    SHARED(floatX, own);
    const Attention *s = &x.s;
    const HeadAt at = head_at<UNIT>(s, s->Tk, T::TILE);
    const unsigned Tq = (unsigned)s->Tq, Tk = (unsigned)s->Tk, mine = threadIdx.x / WARP * 16, first = at.first + mine;
    const Sums *sums_there = x.sums + at.sums;
    const float factor = rsqrtf((float)s->D), scale = LOG2_E * factor;
    const floatX *q = x.q + at.queries, *dy = x.dy + at.outs;
    floatX *stages = own + 2 * T::OWN, *my_rows = own + mine * T::PITCH;
    float dk[W / 8][4] = {}, dv[W / 8][4] = {};
    Sums *sums_here = (Sums *)(void *)(stages + 2 * T::STAGE);
    unsigned rows[W / 16][4], i0 = 0; /* the first queries of which one sees one of our keys */
    while (i0 < Tq && visible_keys(s, last_query(s, i0, T::PASS)) <= at.first) i0 += T::PASS;
    copy_tile<UNIT, W, T::TILE>(own, x.k + at.keys, at.first, Tk, at.kv_row, at.end);
    copy_tile<UNIT, W, T::TILE>(own + T::OWN, x.v + at.keys, at.first, Tk, at.kv_row, at.end);
    copy_commit();
    copy_sums<T::PASS>(sums_here, sums_there + i0);
    copy_stage<UNIT, W>(stages, q, at.q_row, dy, at.inner, i0, Tq, at.end);
    copy_wait<1>();
    clear_strangers<UNIT, W>(own, &at), clear_strangers<UNIT, W>(own + T::OWN, &at);
    copy_wait<0>();
    __syncthreads();
    load_rows<W>(rows, my_rows);
    for (unsigned turn = 0; i0 < Tq; i0 += T::PASS, turn = !turn) {
        const floatX *queries = stages + turn * T::STAGE;
        const Sums *sums = sums_here + turn * T::PASS;
        copy_wait<0>();
        __syncthreads();
        if (i0 + T::PASS < Tq) {
            copy_sums<T::PASS>(sums_here + !turn * T::PASS, sums_there + i0 + T::PASS);
            copy_stage<UNIT, W>(stages + !turn * T::STAGE, q, at.q_row, dy, at.inner, i0 + T::PASS, Tq, at.end);
        }
#pragma unroll 1
        for (unsigned i = i0; i < i0 + T::PASS && i < Tq && first < Tk; i += 16, queries += 16 * T::PITCH, sums += 16) {
            float p[2][4], dp[2][4];
            unsigned values[W / 16][4];
            if (s->causal && visible_keys(s, last_query(s, i, 16)) <= first) continue;
            multiply_rows<W, 16>(p, rows, queries);
            load_rows<W>(values, my_rows + T::OWN);
            multiply_rows<W, 16>(dp, values, queries + T::PASSING);
            if (hides_turned(s, first, i)) hide_turned<16>(s, p, first, i);
            take_probabilities<16, true>(p, sums, scale);
            take_gradients<16, true>(dp, p, sums);
            weigh_rows<W, 16>(dv, p, queries + T::PASSING);
            weigh_rows<W, 16>(dk, dp, queries);
        }
    }
    copy_wait<0>();
    __syncthreads();
    store_rows<UNIT, W>(x.dk + at.keys, first, Tk, at.kv_row, &at, my_rows, dk, factor, factor);
    store_rows<UNIT, W>(x.dv + at.keys, first, Tk, at.kv_row, &at, my_rows + T::OWN, dv, 1, 1);
}
#endif

/* ---- Launching either ---- */

static Err check_head(const Attention *s) {
    if (s->D <= GPU_HEAD_MAX) return OK;
    return err("transformer: heads of %zu channels; on the GPU they may have %d", s->D, (int)GPU_HEAD_MAX);
}

/* F<UNIT,W>(arguments...) for s */
#define FOR_WINDOWS(F, s, ...)                                                                                         \
    (widest_window(s, PACK) <= 64             ? F<PACK, 64>(__VA_ARGS__)                                               \
     : widest_window(s, PACK) <= GPU_HEAD_MAX ? F<PACK, GPU_HEAD_MAX>(__VA_ARGS__)                                     \
     : check_head(s) == OK                    ? F<1, GPU_HEAD_MAX>(__VA_ARGS__)                                        \
                                              : FAILED)

/* The most shared memory that heads of D channels take, whatever their windows */
static size_t attend_bytes(size_t D, int backward) {
    return max_size(D <= 64 ? attend_bytes<64>(D, backward) : 0, attend_bytes<GPU_HEAD_MAX>(D, backward));
}

static unsigned head_blocks(const Attention *s, size_t T, size_t tile) {
    return (unsigned)(s->B * s->heads * ceil_div(T, tile));
}

/* Forward leaves lse (B*heads,Tq). */
static size_t attention_saved_gpu(const Attention *s) {
    return s->B * s->heads * s->Tq * sizeof(float);
}

template <int UNIT, int W>
static Err launch_forward(Device *d, floatX *y, float *lse, const floatX *q, const floatX *k, const floatX *v,
                          const Attention *s) {
    LAUNCH(d, (attend_forward_kernel<UNIT, W>), head_blocks(s, s->Tq, Tiles<W>::TILE), Tiles<W>::THREADS,
           attend_bytes<W>(s->D, 0), *s, y, lse, q, k, v);
    return OK;
}

static Err attention_forward_gpu(const Compute *on, real *y, real *saved, const real *q, const real *k, const real *v,
                                 const Attention *s) {
    return FOR_WINDOWS(launch_forward, s, on->device, (floatX *)y, saved, (const floatX *)q, (const floatX *)k,
                       (const floatX *)v, s);
}

/* x.sums, from x.lse: lanes share a row as load_share has it. */
template <int UNIT, int W>
static __global__ void __launch_bounds__(ROW_WARPS *WARP) attend_sums_kernel(AttendBackward x) {
    enum { ACROSS = Moves<UNIT, W>::ACROSS, PER_LANE = Moves<UNIT, W>::PER_LANE };
    const Attention *s = &x.s;
    const unsigned Tq = (unsigned)s->Tq, rows = (unsigned)padded(Tq), heads = (unsigned)s->heads, D = (unsigned)s->D,
                   r = (blockIdx.x * blockDim.x + threadIdx.x) / ACROSS, i = r % rows, head = r / rows,
                   h = head % heads, shift = window_shift(s, h, UNIT), end = shift + D;
    const bool there = head < s->B * heads && i < Tq;
    const size_t at = ((size_t)(head / heads) * Tq + i) * heads * D + h * D - shift;
    Unit<UNIT> dy[PER_LANE], y[PER_LANE];
    float sum = 0;
    load_share<UNIT, W>(dy, x.dy + at, end, there), load_share<UNIT, W>(y, x.y + at, end, there);
#pragma unroll
    for (unsigned u = 0; u < PER_LANE; u++)
#pragma unroll
        for (unsigned e = 0; e < UNIT; e++) sum += own_number<UNIT, W>(dy, u, e, shift, end) * to_float(y[u].at[e]);
    for (int far = ACROSS / 2; far; far /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, far);
    if (head < s->B * heads && threadIdx.x % ACROSS == 0)
        x.sums[r] = there ? Sums{x.lse[(size_t)head * Tq + i], sum} : Sums{0, 0};
}

/* Scratch: sums */
static size_t attention_needs_gpu(const Compute *, const Attention *s, int backward) {
    return backward ? s->B * s->heads * padded(s->Tq) * sizeof(Sums) : 0;
}

template <int UNIT, int W> static Err launch_sums(Device *d, const AttendBackward *x) {
    LAUNCH(d, (attend_sums_kernel<UNIT, W>),
           blocks_for(x->s.B * x->s.heads * padded(x->s.Tq), ROW_WARPS * WARP / Moves<UNIT, W>::ACROSS),
           ROW_WARPS * WARP, 0, *x);
    return OK;
}

template <int UNIT, int W> static Err launch_backward(Device *d, const AttendBackward *x) {
    typedef Tiles<W> T;
    const Attention *s = &x->s;
    const size_t bytes = attend_bytes<W>(s->D, 1);
    TRY((launch_sums<UNIT, W>(d, x)));
    LAUNCH(d, (attend_queries_kernel<UNIT, W>), head_blocks(s, s->Tq, T::TILE), T::THREADS, bytes, *x);
    LAUNCH(d, (attend_keys_kernel<UNIT, W>), head_blocks(s, s->Tk, T::TILE), T::THREADS, bytes, *x);
    return OK;
}

static Err attend_backward(Device *d, const AttendBackward *x) {
    return FOR_WINDOWS(launch_backward, &x->s, d, x);
}
static Err attend_backward_best(Device *d, const AttendBackward *x); /* attention_90a.cu: that, or by warpgroups */

static Err attention_backward_gpu(const Compute *on, real *dq, real *dk, real *dv, const real *dy, const real *y,
                                  const real *saved, const real *q, const real *k, const real *v, const Attention *s) {
    const AttendBackward x = {*s,
                              (floatX *)dq,
                              (floatX *)dk,
                              (floatX *)dv,
                              (const floatX *)dy,
                              (const floatX *)y,
                              (const floatX *)q,
                              (const floatX *)k,
                              (const floatX *)v,
                              saved,
                              (Sums *)on->scratch};
    return attend_backward_best(on->device, &x);
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

/* Windows of the keys or values that a block sees: the first `pos` are in the cache, the rest in `fresh`. Other blocks put
 * these into the cache meanwhile, and strangers nobody wrote yet may be NaN. */
typedef struct {
    const floatX *cache, *fresh;
} SeenRows;
static __device__ inline const floatX *seen_row(SeenRows x, unsigned j, unsigned pos, unsigned inner) {
    return j < pos ? x.cache + (size_t)j * inner : x.fresh + (size_t)(j - pos) * inner;
}

/* A team sees key j and AHEAD - 1 more, as many apart as there are teams, of rows inner apart. */
template <int UNIT, int W>
static __device__ inline void see_keys(Team<UNIT, W> *x, SeenRows k, SeenRows v, unsigned j, unsigned pos,
                                       unsigned keys, unsigned inner, unsigned end) {
    typedef Team<UNIT, W> T;
    Unit<UNIT> key[AHEAD][T::PER_LANE], value[AHEAD][T::PER_LANE];
    float score[AHEAD], peak = x->largest;
#pragma unroll
    for (unsigned a = 0; a < AHEAD; a++) {
        const unsigned at = j + a * T::COUNT;
        load_share<UNIT, W>(key[a], seen_row(k, at, pos, inner), end, at < keys);
        load_share<UNIT, W>(value[a], seen_row(v, at, pos, inner), end, at < keys);
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

/* y (end), a window, = what all teams of the block have seen; thread c gives channel c, from `shift` on */
template <int UNIT, int W>
static __device__ inline void join_teams(floatX *y, float *shared, const Team<UNIT, W> *x, unsigned shift,
                                         unsigned end) {
    typedef Team<UNIT, W> T;
    const unsigned lane = threadIdx.x % T::LANES, c = threadIdx.x;
    float *mine = shared + threadIdx.x / T::LANES * (W + 2), peak = -HUGE_VALF, sum = 0, out = 0;
    for (unsigned u = 0; u < T::PER_LANE; u++)
        for (unsigned e = 0; e < UNIT; e++) mine[(u * T::LANES + lane) * UNIT + e] = x->out[u][e];
    if (lane == 0) mine[W] = x->largest, mine[W + 1] = x->sum;
    __syncthreads();
    for (unsigned t = 0; t < T::COUNT; t++) peak = fmaxf(peak, shared[t * (W + 2) + W]);
#pragma unroll 4
    for (unsigned t = 0; t < T::COUNT && c < end; t++) {
        const float *other = shared + t * (W + 2), weight = expf(other[W] - peak);
        sum += weight * other[W + 1], out += weight * other[c];
    }
    if (c >= shift && c < end) y[c] = to_floatX(out / sum);
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
    const HeadAt at = head_at<UNIT>(s, 1, 1); /* a block for each head */
    const unsigned pos = (unsigned)(a.pos ? *a.pos : s->Tk), keys = (unsigned)(a.pos ? pos + s->Tq : s->Tk);
    const SeenRows k = {a.k + at.keys, a.new_k + at.outs}, v = {a.v + at.keys, a.new_v + at.outs};
    const float factor = rsqrtf((float)s->D);
    if (a.pos) append_keys(s, a.k, a.new_k, pos), append_keys(s, a.v, a.new_v, pos);
    for (unsigned i = 0; i < s->Tq; i++) {
        Unit<UNIT> query[T::PER_LANE];
        T x = {{}, {}, -HUGE_VALF, 0};
        load_share<UNIT, W>(query, a.q + at.queries + (size_t)i * at.q_row, at.end, true);
#pragma unroll
        for (unsigned u = 0; u < T::PER_LANE; u++)
#pragma unroll
            for (unsigned e = 0; e < UNIT; e++)
                x.query[u][e] = factor * own_number<UNIT, W>(query, u, e, at.shift, at.end);
        for (unsigned j = 0; j < keys; j += AHEAD * T::COUNT)
            see_keys<UNIT, W>(&x, k, v, j + threadIdx.x / T::LANES, pos, keys, at.inner, at.end);
        join_teams<UNIT, W>(a.y + at.outs + (size_t)i * at.inner, shared, &x, at.shift, at.end);
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
    return FOR_WINDOWS(launch_decode, s, d, &a);
}
