/* conv.cu - convolutions on a GPU. */
#include "kernels/device.h"

enum { CELL_THREADS = 256 }; /* of a block where a thread has an element or PACK of them */

/* ---- Convolutions ----
 *
 * On the GPU pictures lie as (B,h,w,C), so that a pixel is a row of C neighbours and every array is a matrix of B*h*w
 * rows. Convolutions are matrix products of rows gathered from around a pixel (its patch) with weights put in the same
 * order; 1x1 ones need no gathering. Activations and their gradients are floatX; sums and the gradients of parameters
 * are float, and every sum has an order that depends on sizes alone.
 *
 * A patch is read through a window of side x side pixels: along each axis, result i of the grid sees pixels
 * (stride*i - pad + k) >> shift, k = 0..side-1, where shift = 1 is nearest doubling. */
typedef struct {
    size_t C, gh, gw;                    /* channels of the source; grid of results */
    size_t h, w;                         /* source before the shift; pixels beyond are 0 */
    int side, stride, pad, pad_x, shift; /* pad_x: the same as pad, but for phase_window */
    size_t pitch;                        /* of a patch: side*side*C, rounded up to whole packs */
} Window;

static Window make_window(size_t C, size_t gh, size_t gw, size_t h, size_t w, int side, int stride, int pad,
                          int shift) {
    Window p = {C, gh, gw, h, w, side, stride, pad, pad, shift, 0};
    p.pitch = round_up((size_t)(side * side) * C, PACK);
    return p;
}

/* What a result of c sees of x. */
static Window forward_window(const Conv *c) {
    switch (c->kind) {
    case CONV_DOWN: return make_window(c->C, c->h / 2, c->w / 2, c->h, c->w, 3, 2, 0, 0);
    case CONV_UP: return make_window(c->C, 2 * c->h, 2 * c->w, 2 * c->h, 2 * c->w, 3, 1, 1, 1);
    default: return make_window(c->C, c->h, c->w, c->h, c->w, 3, 1, 1, 0);
    }
}

/* Where the gradient of a pixel of x comes from in dy. After doubling a pixel has four results' worth of it: windows of
 * 3x3 around each of 2x2 results make one of 4x4. Not for CONV_DOWN. */
static Window backward_window(const Conv *c) {
    if (c->kind == CONV_UP) return make_window(c->M, c->h, c->w, 2 * c->h, 2 * c->w, 4, 2, 1, 0);
    return make_window(c->M, c->h, c->w, c->h, c->w, 3, 1, 1, 0);
}

/* columns (rows,pitch) = patches of results first.. of the grid (B,gh,gw). A thread moves WIDTH neighbouring
 * channels. */
template <int WIDTH>
static __global__ void gather_kernel(floatX *columns, const floatX *x, Window p, unsigned first, unsigned rows) {
    const unsigned packs = (unsigned)p.pitch / WIDTH, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * packs) return;
    const unsigned row = first + i / packs, k = i % packs * WIDTH, gw = (unsigned)p.gw, gh = (unsigned)p.gh;
    const unsigned pixel = k / (unsigned)p.C, c = k % (unsigned)p.C, side = (unsigned)p.side;
    const long y = (long)(row / gw % gh) * p.stride - p.pad + (long)(pixel / side);
    const long at = (long)(row % gw) * p.stride - p.pad_x + (long)(pixel % side);
    const bool inside = pixel < side * side && y >= 0 && at >= 0 && y < (long)p.h && at < (long)p.w;
    const size_t picture = row / (gw * gh) * ((p.h >> p.shift) * (p.w >> p.shift));
    const size_t from =
        inside ? (picture + (size_t)(y >> p.shift) * (p.w >> p.shift) + (size_t)(at >> p.shift)) * p.C + c : 0;
    if (WIDTH == 1) {
        columns[i] = inside ? x[from] : to_floatX(0);
    } else {
        Pack zero;
        for (int j = 0; j < PACK; j++) zero.at[j] = to_floatX(0);
        ((Pack *)columns)[i] = inside ? *(const Pack *)(x + from) : zero;
    }
}

static Err gather(Device *d, floatX *columns, const floatX *x, const Window *p, size_t first, size_t rows) {
    if (p->C % PACK == 0)
        LAUNCH(d, gather_kernel<PACK>, blocks_for(rows * p->pitch / PACK, CELL_THREADS), CELL_THREADS, 0, columns, x,
               *p, (unsigned)first, (unsigned)rows);
    else
        LAUNCH(d, gather_kernel<1>, blocks_for(rows * p->pitch, CELL_THREADS), CELL_THREADS, 0, columns, x, *p,
               (unsigned)first, (unsigned)rows);
    return OK;
}

/* The weights (M,C,3,3) in the order of patches. FORWARD: (M,pitch), pixel by pixel, in each C channels. MIRRORED:
 * (C,pitch) with M channels in each pixel, for the gradient's patches. DOUBLED: the same for the 4x4 window of CONV_UP,
 * along each axis of which kernel row k meets window rows 2-k and 3-k. PHASES: CONV_UP from the pixels that are doubled.
 * Along each axis a result of phase 0, the first of two, sees the pixel before its own through kernel row 0 and its own
 * through rows 1 and 2; one of phase 1 its own through rows 0 and 1 and the next through row 2. So there are four
 * kernels of 2x2, (4,M,pitch). */
typedef enum { FORWARD, MIRRORED, DOUBLED, PHASES } WeightOrder;

/* Does kernel row k have a part in window row j? */
static __device__ inline bool meets(WeightOrder order, int phase, int j, int k) {
    switch (order) {
    case MIRRORED: return j == 2 - k;
    case DOUBLED: return j == 2 - k || j == 3 - k;
    case PHASES: return phase ? (j == 1) == (k == 2) : (j == 0) == (k == 0);
    default: return j == k;
    }
}

static __global__ void order_weights_kernel(floatX *out, const floatX *w, size_t M, size_t C, size_t pitch, int side,
                                            WeightOrder order) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = i / pitch, k = i % pitch;
    const bool forward = order == FORWARD || order == PHASES;
    const size_t inner = forward ? C : M, m = forward ? row % M : k % inner, c = forward ? k % inner : row;
    const int jy = (int)(k / inner) / side, jx = (int)(k / inner) % side, phase = forward ? (int)(row / M) : 0;
    if (row >= (forward ? (order == PHASES ? 4 * M : M) : C)) return;
    float sum = 0;
    for (int ky = 0; ky < 3; ky++)
        for (int kx = 0; kx < 3; kx++)
            if (meets(order, phase / 2, jy, ky) && meets(order, phase % 2, jx, kx))
                sum += to_float(w[(m * C + c) * 9 + (size_t)(3 * ky + kx)]);
    out[i] = to_floatX(sum);
}

static Err order_weights(Device *d, floatX *out, const floatX *w, const Conv *c, const Window *p, WeightOrder order) {
    const size_t n = (order == PHASES ? 4 * c->M : order == FORWARD ? c->M : c->C) * p->pitch;
    LAUNCH(d, order_weights_kernel, blocks_for(n, CELL_THREADS), CELL_THREADS, 0, out, w, c->M, c->C, p->pitch, p->side,
           order);
    return OK;
}

/* dw (M,C,3,3) += total, which is in such an order. */
static __global__ void add_ordered_kernel(float *dw, const float *total, size_t M, size_t C, size_t pitch, int side,
                                          WeightOrder order) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= M * C * 9) return;
    const size_t m = i / 9 / C, c = i / 9 % C, row = order == FORWARD ? m : c, inner = order == FORWARD ? C : M;
    const int ky = (int)(i % 9) / 3, kx = (int)(i % 9) % 3;
    float sum = 0;
    for (int jy = 0; jy < side; jy++)
        for (int jx = 0; jx < side; jx++)
            if (meets(order, 0, jy, ky) && meets(order, 0, jx, kx))
                sum += total[row * pitch + (size_t)(jy * side + jx) * inner + (order == FORWARD ? c : m)];
    dw[i] += sum;
}

static Err add_ordered(Device *d, float *dw, const float *total, const Conv *c, const Window *p, WeightOrder order) {
    LAUNCH(d, add_ordered_kernel, blocks_for(c->M * c->C * 9, CELL_THREADS), CELL_THREADS, 0, dw, total, c->M, c->C,
           p->pitch, p->side, order);
    return OK;
}

/* Memory that convolutions share, one after the other: sizes in elements. */
typedef struct {
    size_t column_size, weight_size, total_size, partial_size;
    floatX *columns; /* patches of as many rows as fit */
    floatX *weights; /* in their order for backward */
    float *totals;   /* the weights' gradient in that order */
    float *partial;  /* sums of slices: channel_slices */
} ConvMemory;

static const size_t COLUMN_BYTES =
    64 << 20; /* patches of a tile; a few tiles fill a GPU, and its cache holds much of one */

static size_t rows_of(const Conv *c) { /* of y */
    if (c->kind == CONV_DOWN) return c->B * (c->h / 2) * (c->w / 2);
    return c->kind == CONV_UP ? 4 * c->B * c->h * c->w : c->B * c->h * c->w;
}

/* Rows of sums over a slice of SLICE_CELLS rows each: see below. */
enum { SLICE_CELLS = 512 };
static size_t channel_slices(size_t B, size_t pixels, size_t C) {
    return B * ceil_div(pixels, SLICE_CELLS) * 2 * C;
}

/* Matrix products begin at multiples of ALIGNMENT bytes: tiles are whole numbers of this many rows. */
enum { TILE_ROWS = ALIGNMENT / sizeof(floatX) };

static size_t tile_rows(size_t room, size_t per_row) {
    return room / per_row / TILE_ROWS * TILE_ROWS;
}

/* Room for a tile of patches: all of them, or COLUMN_BYTES, or at least what down_backward needs. */
static size_t columns_for(const Window *p, size_t rows) {
    const size_t least = (round_up(p->gw + 1, TILE_ROWS) + TILE_ROWS) * p->pitch;
    return min_size(round_up(rows, TILE_ROWS) * p->pitch, max_size(COLUMN_BYTES / sizeof(floatX), least));
}

enum { STEP = 32 }; /* channels that tensor cores take at a time; they have no float32 */
static int can_multiply_directly(const Window *p) {
    return IS_BF16 && p->C % STEP == 0;
}

/* Raises what m must hold so that it is enough for c. train: 0 no, 1 yes, 2 of dx alone, which only CONV3 has. */
static void conv_needs_cuda(ConvMemory *m, const Conv *c, int train) {
    const Window f = forward_window(c), b = backward_window(c);
    const size_t rows = rows_of(c);
    if (train == 2) {
        if (!can_multiply_directly(&b)) m->column_size = max_size(m->column_size, columns_for(&b, rows));
        m->weight_size = max_size(m->weight_size, c->C * b.pitch);
        return;
    }
    if (c->kind != CONV1 && (!can_multiply_directly(&f) || (c->kind == CONV_DOWN && train)))
        m->column_size = max_size(m->column_size, columns_for(&f, rows));
    if (train) m->partial_size = max_size(m->partial_size, channel_slices(1, rows, c->M));
    if (!train || c->kind == CONV1) return;
    const size_t weights = c->kind == CONV_DOWN ? c->M * f.pitch : c->C * b.pitch;
    if (c->kind != CONV_DOWN) m->column_size = max_size(m->column_size, columns_for(&b, c->B * c->h * c->w));
    m->weight_size = max_size(m->weight_size, weights), m->total_size = max_size(m->total_size, weights);
}

static int in_phases(const Conv *c) {
    const Window p = forward_window(c);
    return c->kind == CONV_UP && can_multiply_directly(&p);
}

/* What the results of a phase see: the pixels that will be doubled. */
static Window phase_window(const Conv *c, int phase) {
    Window p = make_window(c->C, c->h, c->w, c->h, c->w, 2, 1, 1, 0);
    p.pad -= phase / 2, p.pad_x -= phase % 2;
    return p;
}

static size_t ordered_weight_size(const Conv *c) { /* elements that conv_order_weights_cuda writes */
    const Window p = forward_window(c);
    return c->kind == CONV1 ? 0 : c->M * (in_phases(c) ? 16 * c->C : p.pitch);
}

/* For conv_forward_cuda, once after the weights w (M,C,3,3) have changed. A 1x1 kernel is used as it is. */
static Err conv_order_weights_cuda(Device *d, floatX *out, const floatX *w, const Conv *c) {
    const Window p = in_phases(c) ? phase_window(c, 0) : forward_window(c);
    return order_weights(d, out, w, c, &p, in_phases(c) ? PHASES : FORWARD);
}

/* y = or += a (rows,K) b (N,K)^T or, unless trans_b, b (K,N) */
static Matmul rows_times(void *y, const floatX *a, const floatX *b, size_t rows, size_t N, size_t K, size_t ldb,
                         int trans_b, const void *add) {
    Matmul p;
    memset(&p, 0, sizeof p);
    p.trans_b = trans_b, p.M = rows, p.N = N, p.K = K, p.A = a, p.lda = K, p.B = b, p.ldb = ldb, p.D = y, p.ldd = N,
    p.add = add;
    return p;
}

/* d (M,N) float = or += a (rows,M)^T b (rows,N) */
static Matmul turned_times(float *y, const floatX *a, const floatX *b, size_t M, size_t N, size_t rows,
                           int accumulate) {
    Matmul p;
    memset(&p, 0, sizeof p);
    p.trans_a = 1, p.d_is_float = 1, p.M = M, p.N = N, p.K = rows, p.A = a, p.lda = M, p.B = b, p.ldb = N, p.D = y,
    p.ldd = N;
    if (accumulate) p.add = y;
    return p;
}

/* Results in float, and what is added to them, instead of or beside those in floatX: of a residual stream in bf16. */
typedef struct {
    float *y;
    const float *add, *bias;
} Wide;
static const Wide not_wide = {NULL, NULL, NULL};

/* Four floats, which a thread moves at once */
struct alignas(16) Floats {
    float at[4];
};

#ifdef FLOATX_BF16
/* ---- Convolutions on tensor cores, without writing patches down ("implicit GEMM") ----
 *
 * A block of 8 warps makes TILE_M results of TILE_N channels. For STEP channels of one pixel of the window at a time it
 * copies the source pixels of its results, and as much of the weights, to shared memory, STAGES - 1 steps ahead of the
 * products; beyond the picture, zeros. A warp has 32 channels, and as many results as that leaves: MI pieces of 16 by 4
 * of 8. A row of a stage is 64 bytes, four chunks of 16, which change places from row to row so that the 8 rows that a
 * warp reads at a time lie in different banks. In the end sums go through shared memory, so that 16 bytes of results
 * are written at a time. */
enum { TILE_M = 128, STAGES = 4, MMA_THREADS = 256, MMA_WARPS = MMA_THREADS / WARP };

/* Chunk k (0..3) of row r of a stage */
static __device__ inline floatX *chunk_at(floatX *stage, unsigned r, unsigned k) {
    return stage + r * STEP + (k ^ (r / 2 % 4)) * PACK;
}

/* Where a thread's two rows of the source tile are: first pixel of the picture, and the one that their window begins
 * with. Whole numbers are of 32 bits here, which vqgan_plan_cuda has seen to: between products there is time for few
 * others. */
typedef struct {
    unsigned picture;
    int y, x;
    bool there;
} MmaRow;

/* A step of the sum: channels c.. of pixel (y,x) of the window; k: how far that is in a row of weights */
typedef struct {
    unsigned c, k;
    int y, x;
} MmaStep;

static __device__ inline MmaRow mma_row(const Window *p, size_t row, size_t rows) {
    const unsigned r = (unsigned)row, gw = (unsigned)p->gw, gh = (unsigned)p->gh;
    MmaRow m;
    m.there = row < rows;
    m.picture = r / (gw * gh) * ((unsigned)(p->h >> p->shift) * (unsigned)(p->w >> p->shift));
    m.y = (int)(r / gw % gh) * p->stride - p->pad, m.x = (int)(r % gw) * p->stride - p->pad_x;
    return m;
}

typedef struct {
    floatX *y;
    const floatX *x, *w, *bias, *add;
    Window p;
    size_t rows, M;
    int phase; /* of CONV_UP, or -1: results lie one after the other */
    Wide wide; /* if it has y, y may be NULL */
} MmaConv;

/* Where result r goes: of a phase, to every second row and column of a grid twice as large. */
static __device__ inline size_t mma_place(const MmaConv *a, size_t r) {
    const unsigned gw = (unsigned)a->p.gw, row = (unsigned)r / gw;
    return a->phase < 0
               ? r
               : (2 * row + (unsigned)a->phase / 2) * 2 * (size_t)gw + 2 * ((unsigned)r % gw) + (unsigned)a->phase % 2;
}

/* Copies a step's part of source and weights to a stage, and goes on to the next step. */
template <int TILE_N>
static __device__ inline void mma_copy(floatX *stage, const MmaConv *a, const MmaRow row[2], unsigned m0, MmaStep *s) {
    const unsigned k = threadIdx.x % 4, r = threadIdx.x / 4, shift = (unsigned)a->p.shift, C = (unsigned)a->p.C,
                   h = (unsigned)a->p.h, w = (unsigned)a->p.w;
#pragma unroll
    for (unsigned i = 0; i < TILE_M / 64; i++) {
        const unsigned y = (unsigned)(row[i].y + s->y), x = (unsigned)(row[i].x + s->x); /* above or left: too large */
        const bool there = row[i].there && y < h && x < w;
        const size_t from = (row[i].picture + (y >> shift) * (w >> shift) + (x >> shift)) * C + s->c + k * PACK;
        copy_async(chunk_at(stage, r + i * 64, k), a->x + (there ? from : 0), there);
    }
#pragma unroll
    for (unsigned m = 0; m < TILE_N; m += 64) {
        const bool there = m0 + m + r < a->M;
        const size_t from = (m0 + m + r) * (unsigned)a->p.pitch + s->k + k * PACK;
        if (TILE_N % 64 == 0 || m + r < TILE_N)
            copy_async(chunk_at(stage + TILE_M * STEP, m + r, k), a->w + (there ? from : 0), there);
    }
    s->k += STEP, s->c += STEP;
    if (s->c < C) return;
    s->c = 0;
    if (++s->x == a->p.side) s->x = 0, s->y++;
}

/* sum (MI,4) += the products of a stage: of rows first_row.. of the source tile with weights first_m.. */
template <int MI>
static __device__ inline void mma_multiply(float sum[MI][4][4], floatX *stage, unsigned first_row, unsigned first_m) {
    const unsigned lane = threadIdx.x % WARP;
    floatX *weights = stage + TILE_M * STEP;
#pragma unroll
    for (unsigned k = 0; k < STEP / 16; k++) {
        unsigned b[4][2];
#pragma unroll
        for (unsigned j = 0; j < 4; j += 2) {
            unsigned word[4]; /* channels j*8..+7 with the first and second 8 of the 16, then the next 8 channels */
            load_matrices(word, chunk_at(weights, first_m + j * 8 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
            b[j][0] = word[0], b[j][1] = word[1], b[j + 1][0] = word[2], b[j + 1][1] = word[3];
        }
#pragma unroll
        for (int i = 0; i < MI; i++) {
            unsigned word[4]; /* rows 0..7 and 8..15 with the first 8, then with the second */
            load_matrices(word, chunk_at(stage, first_row + (unsigned)i * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
            for (int j = 0; j < 4; j++) multiply_tiles(sum[i][j], word, b[j]);
        }
    }
}

/* out (PACK, of which the first n count) = sums + bias + what is to be added, for PACK channels of a result */
static __device__ inline void mma_finish(float *out, const MmaConv *a, const float *sums, size_t at, size_t m,
                                         bool whole, unsigned n) {
    Pack add = {};
    Floats wide[2] = {};
    if (whole && a->wide.add)
        wide[0] = *(const Floats *)(a->wide.add + at), wide[1] = *(const Floats *)(a->wide.add + at + 4);
    if (whole && a->add && !a->wide.add) add = *(const Pack *)(a->add + at);
    for (unsigned k = 0; k < n; k++) {
        out[k] = sums[k] + (a->bias ? to_float(a->bias[m + k]) : 0);
        if (a->wide.add)
            out[k] += whole ? wide[k / 4].at[k % 4] : a->wide.add[at + k];
        else if (a->add)
            out[k] += to_float(whole ? add.at[k] : a->add[at + k]);
    }
}

/* What is in sums (TILE_M, TILE_N+4), + bias + add, to y */
template <int TILE_N>
static __device__ inline void mma_store(const MmaConv *a, const float *sums, size_t r0, size_t m0) {
    for (unsigned i = threadIdx.x; i < TILE_M * TILE_N / PACK; i += MMA_THREADS) {
        const unsigned r = i / (TILE_N / PACK), m = i % (TILE_N / PACK) * PACK;
        const size_t at = mma_place(a, r0 + r) * a->M + m0 + m, left = m0 + m < a->M ? a->M - m0 - m : 0;
        if (r0 + r >= a->rows || left == 0) continue;
        const bool whole = left >= PACK && a->M % PACK == 0;
        const unsigned n = left < PACK ? (unsigned)left : (unsigned)PACK;
        float out[PACK] = {};
        Pack low;
        mma_finish(out, a, sums + r * (TILE_N + 4) + m, at, m0 + m, whole, n);
        for (unsigned k = 0; k < PACK; k++) low.at[k] = to_floatX(out[k]);
        if (a->y && whole) store_whole(a->y + at, low);
        for (unsigned k = 0; a->y && !whole && k < n; k++) a->y[at + k] = low.at[k];
        for (unsigned k = 0; a->wide.y && whole && k < PACK; k += 4) {
            const Floats four = {{out[k], out[k + 1], out[k + 2], out[k + 3]}};
            store_whole(a->wide.y + at + k, four);
        }
        for (unsigned k = 0; a->wide.y && !whole && k < n; k++) a->wide.y[at + k] = out[k];
    }
}

/* Grid: tiles of channels, then of results. */
template <int TILE_N> static __global__ void __launch_bounds__(MMA_THREADS, 2) mma_conv_kernel(MmaConv a) {
    enum {
        WARPS_N = TILE_N / 32,
        ROWS = TILE_M / (MMA_WARPS / WARPS_N),
        MI = ROWS / 16,
        STAGE = (TILE_M + TILE_N) * STEP
    };
    SHARED(floatX, stages);
    const unsigned tiles = (unsigned)((a.M + TILE_N - 1) / TILE_N), warp = threadIdx.x / WARP,
                   lane = threadIdx.x % WARP;
    const unsigned first_row = warp / WARPS_N * ROWS, first_m = warp % WARPS_N * 32,
                   steps = (unsigned)(a.p.pitch / STEP);
    const size_t r0 = (size_t)(blockIdx.x / tiles) * TILE_M, m0 = (size_t)(blockIdx.x % tiles) * TILE_N;
    const MmaRow row[2] = {mma_row(&a.p, r0 + threadIdx.x / 4, a.rows),
                           mma_row(&a.p, r0 + threadIdx.x / 4 + 64, a.rows)};
    float sum[MI][4][4] = {};
    MmaStep step = {0, 0, 0, 0}; /* that is copied next */
    for (unsigned s = 0; s < STAGES - 1; s++) {
        if (s < steps) mma_copy<TILE_N>(stages + s * STAGE, &a, row, (unsigned)m0, &step);
        copy_commit();
    }
    for (unsigned s = 0; s < steps; s++) {
        copy_wait<STAGES - 2>();
        __syncthreads(); /* everybody's copies of this step are there, and the stage before it is free */
        const unsigned next = s + STAGES - 1;
        if (next < steps) mma_copy<TILE_N>(stages + next % STAGES * STAGE, &a, row, (unsigned)m0, &step);
        copy_commit();
        mma_multiply<MI>(sum, stages + s % STAGES * STAGE, first_row, first_m);
    }
    copy_wait<0>();
    __syncthreads();
    float *sums = (float *)(void *)stages;
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            for (unsigned k = 0; k < 4; k++)
                sums[(first_row + (unsigned)i * 16 + lane / 4 + k / 2 * 8) * (TILE_N + 4) + first_m + (unsigned)j * 8 +
                     lane % 4 * 2 + k % 2] = sum[i][j][k];
    __syncthreads();
    mma_store<TILE_N>(&a, sums, r0, m0);
}

template <int TILE_N> static Err launch_mma(Device *d, const MmaConv *a) {
    const size_t stages = (size_t)STAGES * (TILE_M + TILE_N) * STEP * sizeof(floatX),
                 sums = TILE_M * (TILE_N + 4) * sizeof(float);
    const size_t blocks = ceil_div(a->M, TILE_N) * ceil_div(a->rows, TILE_M);
    LAUNCH(d, mma_conv_kernel<TILE_N>, (unsigned)blocks, MMA_THREADS, max_size(stages, sums), *a);
    return OK;
}

/* y (rows,M) = patches of x times w (M,pitch), + bias + add unless NULL */
static Err multiply_directly(Device *d, floatX *y, const Window *p, const floatX *x, const floatX *w, size_t rows,
                             size_t M, const floatX *bias, const floatX *add, int phase, Wide wide = not_wide) {
    const MmaConv a = {y, x, w, bias, add, *p, rows, M, phase, wide};
    return M <= 32 ? launch_mma<32>(d, &a) : launch_mma<128>(d, &a);
}
#else
static Err multiply_directly(Device *d, floatX *y, const Window *p, const floatX *x, const floatX *w, size_t rows,
                             size_t M, const floatX *bias, const floatX *add, int phase, Wide wide = not_wide) {
    (void)d, (void)y, (void)p, (void)x, (void)w, (void)rows, (void)M, (void)bias, (void)add, (void)phase, (void)wide;
    return err("internal: no convolution on tensor cores in float");
}
#endif

static Err phases_forward(Device *d, floatX *y, const Conv *c, const floatX *x, const floatX *w, const floatX *bias,
                          const floatX *add, Wide wide) {
    for (int phase = 0; phase < 4; phase++) {
        const Window p = phase_window(c, phase);
        TRY(multiply_directly(d, y, &p, x, w + (size_t)phase * c->M * p.pitch, c->B * c->h * c->w, c->M, bias, add,
                              phase, wide));
    }
    return OK;
}

static __global__ void narrow_kernel(floatX *y, const float *wide, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = to_floatX(wide[i]);
}

/* n results from row r on, of rows (n,K) of a matrix */
static Err conv_rows(Device *d, floatX *y, const Conv *c, const floatX *rows, const floatX *w, size_t r, size_t n,
                     size_t K, const floatX *bias, const floatX *add, Wide wide) {
    const size_t at = r * c->M;
    Matmul product = wide.y ? rows_times(wide.y + at, rows, w, n, c->M, K, K, 1, wide.add ? wide.add + at : NULL)
                            : rows_times(y + at, rows, w, n, c->M, K, K, 1, add ? add + at : NULL);
    product.bias = wide.y ? (const void *)wide.bias : (const void *)bias;
    if (wide.y) product.d_is_float = 1;
    TRY(matmul(d, &product));
    if (wide.y && y)
        LAUNCH(d, narrow_kernel, blocks_for(n * c->M, CELL_THREADS), CELL_THREADS, 0, y + at, wide.y + at, n * c->M);
    return OK;
}

/* y = w * x + bias + add; x (B,h,w,C), y and add (B,..,M), w from conv_order_weights_cuda; add may be NULL, or y. wide:
 * the same in float where it has a y; then y may be NULL, and wide.add counts instead of add. */
static Err conv_forward_cuda(Device *d, floatX *y, const Conv *c, const floatX *x, const floatX *w, const floatX *bias,
                             const floatX *add, const ConvMemory *memory, Wide wide = not_wide) {
    const Window p = forward_window(c);
    const size_t rows = rows_of(c), K = c->kind == CONV1 ? c->C : p.pitch;
    if (in_phases(c)) return phases_forward(d, y, c, x, w, bias, add, wide);
    if (c->kind != CONV1 && can_multiply_directly(&p))
        return multiply_directly(d, y, &p, x, w, rows, c->M, bias, add, -1, wide);
    const size_t tile = c->kind == CONV1 ? rows : tile_rows(memory->column_size, p.pitch);
    for (size_t r = 0; r < rows; r += tile) {
        const size_t n = min_size(tile, rows - r);
        if (c->kind != CONV1) TRY(gather(d, memory->columns, x, &p, r, n));
        TRY(conv_rows(d, y, c, c->kind == CONV1 ? x : memory->columns, w, r, n, K, bias, add, wide));
    }
    return OK;
}

/* dx (B,2gh,2gw,C) = or += the share in it of dcolumns, gradients of the patches of CONV_DOWN: four pixels of dx for
 * each result first.. of the grid; the patches begin with that of result `begin`. A pixel was seen by up to four
 * results. */
static __global__ void fold_kernel(floatX *dx, const floatX *dcolumns, Window p, unsigned begin, unsigned first,
                                   unsigned rows, int accumulate) {
    const unsigned C = (unsigned)p.C, gw = (unsigned)p.gw, gh = (unsigned)p.gh;
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, c = i % C, corner = i / C % 4, row = first + i / C / 4;
    if (i >= rows * 4 * C) return;
    const unsigned gy = row / gw % gh, gx = row % gw, dy = corner / 2, at = corner % 2;
    float sum = 0;
    for (unsigned up = 0; up <= (dy == 0 && gy > 0); up++)
        for (unsigned left = 0; left <= (at == 0 && gx > 0); left++) {
            const unsigned pixel = (dy + 2 * up) * 3 + at + 2 * left;
            sum += to_float(dcolumns[(row - up * gw - left - begin) * p.pitch + pixel * C + c]);
        }
    floatX *to = dx + (((size_t)(row / (gw * gh)) * 2 * gh + 2 * gy + dy) * 2 * gw + 2 * gx + at) * C + c;
    *to = to_floatX(sum + (accumulate ? to_float(*to) : 0));
}

/* CONV_DOWN: the weights' gradient from the patches of x; dx from the patches' gradient, with the results above and to
 * the left of a tile computed once more. */
static Err down_backward(Device *d, floatX *dx, float *dw, const Conv *c, const floatX *dy, const floatX *x,
                         const floatX *w, int accumulate, const ConvMemory *memory) {
    const Window p = forward_window(c);
    const size_t rows = rows_of(c), room = tile_rows(memory->column_size, p.pitch);
    const size_t above = round_up(p.gw + 1, TILE_ROWS);
    for (size_t r = 0; r < rows; r += room) {
        const size_t n = min_size(room, rows - r);
        TRY(gather(d, memory->columns, x, &p, r, n));
        const Matmul product = turned_times(memory->totals, dy + r * c->M, memory->columns, c->M, p.pitch, n, r > 0);
        TRY(matmul(d, &product));
    }
    TRY(add_ordered(d, dw, memory->totals, c, &p, FORWARD));
    if (!dx) return OK;
    TRY(order_weights(d, memory->weights, w, c, &p, FORWARD));
    for (size_t r = 0, n; r < rows; r += n) {
        const size_t begin = r - min_size(r, above);
        n = min_size(room - (r - begin), rows - r);
        const Matmul product = rows_times(memory->columns, dy + begin * c->M, memory->weights, r + n - begin, p.pitch,
                                          c->M, p.pitch, 0, NULL);
        TRY(matmul(d, &product));
        LAUNCH(d, fold_kernel, blocks_for(n * 4 * c->C, CELL_THREADS), CELL_THREADS, 0, dx, memory->columns, p,
               (unsigned)begin, (unsigned)r, (unsigned)n, accumulate);
    }
    return OK;
}

/* One gather of the gradient's patches serves both results, as in C: dx = patches(dy) w, dw = x^T patches(dy). */
static Err same_backward(Device *d, floatX *dx, float *dw, const Conv *c, const floatX *dy, const floatX *x,
                         const floatX *w, int accumulate, const ConvMemory *memory) {
    const Window p = backward_window(c);
    const WeightOrder order = c->kind == CONV_UP ? DOUBLED : MIRRORED;
    const size_t rows = c->B * c->h * c->w, tile = tile_rows(memory->column_size, p.pitch);
    if (dx) TRY(order_weights(d, memory->weights, w, c, &p, order));
    for (size_t r = 0; r < rows; r += tile) {
        const size_t n = min_size(tile, rows - r);
        TRY(gather(d, memory->columns, dy, &p, r, n));
        const Matmul sums = turned_times(memory->totals, x + r * c->C, memory->columns, c->C, p.pitch, n, r > 0);
        TRY(matmul(d, &sums));
        if (!dx) continue;
        floatX *part = dx + r * c->C;
        const Matmul product =
            rows_times(part, memory->columns, memory->weights, n, c->C, p.pitch, p.pitch, 1, accumulate ? part : NULL);
        TRY(matmul(d, &product));
    }
    return add_ordered(d, dw, memory->totals, c, &p, order);
}

/* dx alone of CONV3, overwritten or added to: a convolution of dy with the weights mirrored. */
static Err conv_input_cuda(Device *d, floatX *dx, const Conv *c, const floatX *dy, const floatX *w,
                           const ConvMemory *memory, int accumulate = 0) {
    const Window p = backward_window(c);
    const size_t rows = rows_of(c), tile = tile_rows(memory->column_size, p.pitch);
    TRY(order_weights(d, memory->weights, w, c, &p, MIRRORED));
    if (can_multiply_directly(&p))
        return multiply_directly(d, dx, &p, dy, memory->weights, rows, c->C, NULL, accumulate ? dx : NULL, -1);
    for (size_t r = 0; r < rows; r += tile) {
        const size_t n = min_size(tile, rows - r);
        TRY(gather(d, memory->columns, dy, &p, r, n));
        floatX *part = dx + r * c->C;
        const Matmul product =
            rows_times(part, memory->columns, memory->weights, n, c->C, p.pitch, p.pitch, 1, accumulate ? part : NULL);
        TRY(matmul(d, &product));
    }
    return OK;
}

static Err add_channel_sums(Device *d, float *sum, const floatX *x, size_t rows, size_t C, float *partial);

/* dx overwritten, or added to if `accumulate`; NULL: not wanted. dw (M,C,3,3), db (M) +=. w (M,C,3,3) as it is in the
 * table. */
static Err conv_backward_cuda(Device *d, floatX *dx, float *dw, float *db, const Conv *c, const floatX *dy,
                              const floatX *x, const floatX *w, int accumulate, const ConvMemory *memory) {
    TRY(add_channel_sums(d, db, dy, rows_of(c), c->M, memory->partial));
    if (c->kind == CONV_DOWN) return down_backward(d, dx, dw, c, dy, x, w, accumulate, memory);
    if (c->kind != CONV1) return same_backward(d, dx, dw, c, dy, x, w, accumulate, memory);
    Matmul product = turned_times(dw, dy, x, c->M, c->C, rows_of(c), 1);
    TRY(matmul(d, &product));
    if (!dx) return OK;
    product = rows_times(dx, dy, w, rows_of(c), c->C, c->M, c->C, 0, accumulate ? dx : NULL);
    return matmul(d, &product);
}

/* ---- Sums of channels over pixels ----
 *
 * A block of 256 threads has a slice of SLICE_CELLS rows and 8 packs of channels: a thread adds up every 32nd row of a
 * pack, then the 32 sums of a pack are added in order. Grid: packs / 8, slices, pictures. partial (B,slices,2,C) takes
 * two sums of each channel. */
enum { PACK_LANES = 8, CELL_LANES = CELL_THREADS / PACK_LANES };

template <int WIDTH>
static __device__ inline void store_channel_sums(float *partial, const float *a, const float *b, size_t C) {
    SHARED(float, sums); /* (CELL_LANES, PACK_LANES*WIDTH) */
    const size_t c = (size_t)blockIdx.x * PACK_LANES * WIDTH;
    for (int k = 0; k < 2; k++) {
        __syncthreads();
        for (int j = 0; j < WIDTH; j++) sums[threadIdx.x * WIDTH + j] = k ? b[j] : a[j];
        __syncthreads();
        if (threadIdx.x >= PACK_LANES * WIDTH || c + threadIdx.x >= C) continue;
        float sum = 0;
        for (int i = 0; i < CELL_LANES; i++) sum += sums[i * PACK_LANES * WIDTH + (int)threadIdx.x];
        partial[(((size_t)blockIdx.z * gridDim.y + blockIdx.y) * 2 + k) * C + c + threadIdx.x] = sum;
    }
}

static dim3 slice_grid(size_t C, size_t pixels, size_t B, int width) {
    return dim3(blocks_for(C, (size_t)(PACK_LANES * width)), blocks_for(pixels, SLICE_CELLS), (unsigned)B);
}

/* Where a thread's share of a slice begins and ends, in rows of its picture, and which channel its pack begins with. */
typedef struct {
    size_t c, first, end;
} Share;
static __device__ inline Share share_of(size_t C, size_t pixels, int width) {
    Share s;
    s.c = ((size_t)blockIdx.x * PACK_LANES + threadIdx.x % PACK_LANES) * width;
    s.first = (size_t)blockIdx.y * SLICE_CELLS + threadIdx.x / PACK_LANES;
    s.end = (size_t)(blockIdx.y + 1) * SLICE_CELLS;
    if (s.end > pixels) s.end = pixels;
    if (s.c >= C) s.end = 0;
    return s;
}

template <int WIDTH>
static __global__ void channel_sums_kernel(float *partial, const floatX *x, size_t pixels, size_t C) {
    const Share s = share_of(C, pixels, WIDTH);
    float sum[WIDTH] = {}, none[WIDTH] = {};
    for (size_t r = s.first; r < s.end; r += CELL_LANES)
        for (int j = 0; j < WIDTH; j++) sum[j] += to_float(x[r * C + s.c + j]);
    store_channel_sums<WIDTH>(partial, sum, none, C);
}

/* a (C) += the first sums of n slices, b (C) += the second ones unless NULL: a warp per channel. */
static __global__ void add_channels_kernel(float *a, float *b, const float *partial, size_t n, size_t C) {
    const size_t c = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (c >= C) return;
    float sum_a = 0, sum_b = 0;
    for (size_t i = threadIdx.x % WARP; i < n; i += WARP) {
        sum_a += partial[2 * i * C + c];
        if (b) sum_b += partial[(2 * i + 1) * C + c];
    }
    sum_a = warp_sum(sum_a), sum_b = warp_sum(sum_b);
    if (threadIdx.x % WARP) return;
    a[c] += sum_a;
    if (b) b[c] += sum_b;
}

static Err add_channels(Device *d, float *a, float *b, const float *partial, size_t n, size_t C) {
    LAUNCH(d, add_channels_kernel, blocks_for(C, CELL_THREADS / WARP), CELL_THREADS, 0, a, b, partial, n, C);
    return OK;
}

/* sum (C) += the columns' sums of x (rows,C) */
static Err add_channel_sums(Device *d, float *sum, const floatX *x, size_t rows, size_t C, float *partial) {
    if (C % PACK == 0)
        LAUNCH(d, channel_sums_kernel<PACK>, slice_grid(C, rows, 1, PACK), CELL_THREADS,
               CELL_THREADS * PACK * sizeof(float), partial, x, rows, C);
    else
        LAUNCH(d, channel_sums_kernel<1>, slice_grid(C, rows, 1, 1), CELL_THREADS, CELL_THREADS * sizeof(float),
               partial, x, rows, C);
    return add_channels(d, sum, NULL, partial, ceil_div(rows, SLICE_CELLS), C);
}

/* ---- The fellows of vqgan.c's convolutions ---- */

/* Bytes of what does not shrink: all but the patches. */
static size_t fixed_bytes(const ConvMemory *m) {
    return round_up(m->weight_size * sizeof(floatX), ALIGNMENT) + round_up(m->total_size * sizeof(float), ALIGNMENT) +
           round_up(m->partial_size * sizeof(float), ALIGNMENT);
}

static size_t conv_needs_gpu(const Compute *on, const Conv *c, int backward) {
    ConvMemory m = {};
    (void)on;
    conv_needs_cuda(&m, c, backward);
    return fixed_bytes(&m) + m.column_size * sizeof(floatX);
}

/* Where in the scratch everything lies; patches have what is left. */
static ConvMemory conv_memory(const Compute *on, const Conv *c, int backward) {
    ConvMemory m = {};
    conv_needs_cuda(&m, c, backward);
    char *at = (char *)on->scratch;
    m.weights = (floatX *)(void *)at, at += round_up(m.weight_size * sizeof(floatX), ALIGNMENT);
    m.totals = (float *)(void *)at, at += round_up(m.total_size * sizeof(float), ALIGNMENT);
    m.partial = (float *)(void *)at, at += round_up(m.partial_size * sizeof(float), ALIGNMENT);
    m.columns = (floatX *)(void *)at;
    m.column_size = min_size(m.column_size, (on->scratch_bytes - fixed_bytes(&m)) / sizeof(floatX));
    return m;
}

static size_t conv_prepared_bytes(const Conv *c) {
    return ordered_weight_size(c) * sizeof(floatX);
}

static void conv_prepare_gpu(const Compute *on, void *prepared, const real *w, const Conv *c) {
    if (c->kind == CONV1) return;
    keep_failure(on->device, conv_order_weights_cuda(on->device, (floatX *)prepared, operand_of(on->device, w), c));
}

static void conv_forward_gpu(const Compute *on, real *y, const real *x, const real *w, const real *bias,
                             const real *add, const Conv *c) {
    const ConvMemory m = conv_memory(on, c, 0);
    const size_t n = rows_of(c) * c->M;
    const Wide wide = {c->y_f32 ? compute_f32_copy(on, y, n) : NULL,
                       add && c->add_f32 ? compute_f32_copy(on, add, n) : NULL, bias};
    const floatX *weight = c->prepared ? (const floatX *)c->prepared : operand_of(on->device, w);
    keep_failure(on->device,
                 conv_forward_cuda(on->device, c->y_f32_only ? NULL : (floatX *)(void *)y, c, (const floatX *)(void *)x,
                                   weight, operand_of(on->device, bias), (const floatX *)(void *)add, &m, wide));
}

static void conv_backward_gpu(const Compute *on, real *dx, real *dw, real *db, const real *dy, const real *x,
                              const real *w, int accumulate, const Conv *c) {
    const ConvMemory m = conv_memory(on, c, dw ? 1 : 2);
    const floatX *weight = operand_of(on->device, w);
    floatX *to = (floatX *)(void *)dx;
    const floatX *from = (const floatX *)(void *)dy, *seen = (const floatX *)(void *)x;
    keep_failure(on->device, dw ? conv_backward_cuda(on->device, to, dw, db, c, from, seen, weight, accumulate, &m)
                                : conv_input_cuda(on->device, to, c, from, weight, &m, accumulate));
}
