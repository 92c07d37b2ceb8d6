/* first_stage.cu - the CUDA twins of conv.c and vqgan.c: convolutions, group norm, attention, quantiser.
 *
 * On the GPU pictures lie as (B,h,w,C), so that a cell is a row of C neighbours and every array is a matrix of B*h*w
 * rows. Convolutions are matrix products of rows gathered from around a cell (its patch) with weights put in the same
 * order; 1x1 ones need no gathering. Activations and their gradients are floatX; statistics, sums and the gradients of
 * parameters are float, and every sum has an order that depends on sizes alone. */
#include "vqgan.h"

#ifdef DEVICE_CODE

enum { CELL_THREADS = 256 }; /* of a block where a thread has an element or PACK of them */

/* ---- Convolutions: the twin of conv.c ----
 *
 * A patch is read through a window of side x side cells: along each axis, result i of the grid sees cells
 * (stride*i - pad + k) >> shift, k = 0..side-1, where shift = 1 is nearest doubling. */
typedef struct {
    size_t C, gh, gw;                    /* channels of the source; grid of results */
    size_t h, w;                         /* source before the shift; cells beyond are 0 */
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

/* Where the gradient of a cell of x comes from in dy. After doubling a cell has four results' worth of it: windows of 3x3
 * around each of 2x2 results make one of 4x4. Not for CONV_DOWN. */
static Window backward_window(const Conv *c) {
    if (c->kind == CONV_UP) return make_window(c->M, c->h, c->w, 2 * c->h, 2 * c->w, 4, 2, 1, 0);
    return make_window(c->M, c->h, c->w, c->h, c->w, 3, 1, 1, 0);
}

/* columns (rows,pitch) = patches of results first.. of the grid (B,gh,gw). A thread moves WIDTH neighbouring channels. */
template <int WIDTH>
static __global__ void gather_kernel(floatX *columns, const floatX *x, Window p, unsigned first, unsigned rows) {
    const unsigned packs = (unsigned)p.pitch / WIDTH, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * packs) return;
    const unsigned row = first + i / packs, k = i % packs * WIDTH, gw = (unsigned)p.gw, gh = (unsigned)p.gh;
    const unsigned cell = k / (unsigned)p.C, c = k % (unsigned)p.C, side = (unsigned)p.side;
    const long y = (long)(row / gw % gh) * p.stride - p.pad + (long)(cell / side);
    const long at = (long)(row % gw) * p.stride - p.pad_x + (long)(cell % side);
    const bool inside = cell < side * side && y >= 0 && at >= 0 && y < (long)p.h && at < (long)p.w;
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

/* The weights (M,C,3,3) in the order of patches. FORWARD: (M,pitch), cell by cell, in each C channels. MIRRORED: (C,pitch)
 * with M channels in each cell, for the gradient's patches. DOUBLED: the same for the 4x4 window of CONV_UP, along each axis
 * of which kernel row k meets window rows 2-k and 3-k. PHASES: CONV_UP from the cells that are doubled. Along each axis a
 * result of phase 0, the first of two, sees the cell before its own through kernel row 0 and its own through rows 1 and 2;
 * one of phase 1 its own through rows 0 and 1 and the next through row 2. So there are four kernels of 2x2, (4,M,pitch). */
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
    const size_t cells = c->B * c->h * c->w;
    return c->kind == CONV_UP ? 4 * cells : c->kind == CONV_DOWN ? cells / 4 : cells;
}

/* Rows of sums over a slice of SLICE_CELLS rows each: see below. */
enum { SLICE_CELLS = 512 };
static size_t channel_slices(size_t B, size_t cells, size_t C) {
    return B * ceil_div(cells, SLICE_CELLS) * 2 * C;
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

/* Raises what m must hold so that it is enough for c. */
static void conv_needs_cuda(ConvMemory *m, const Conv *c, int train) {
    const Window f = forward_window(c), b = backward_window(c);
    const size_t rows = rows_of(c);
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

/* What the results of a phase see: the cells that will be doubled. */
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
static Matmul turned_times(float *y, const floatX *a, const floatX *b, size_t M, size_t N, size_t rows, int more) {
    Matmul p;
    memset(&p, 0, sizeof p);
    p.trans_a = 1, p.d_is_float = 1, p.M = M, p.N = N, p.K = rows, p.A = a, p.lda = M, p.B = b, p.ldb = N, p.D = y,
    p.ldd = N;
    if (more) p.add = y;
    return p;
}

#ifdef FLOATX_BF16
/* ---- Convolutions on tensor cores, without writing patches down ("implicit GEMM") ----
 *
 * A block of 8 warps makes TILE_M results of TILE_N channels. For STEP channels of one cell of the window at a time it copies
 * the source cells of its results, and as much of the weights, to shared memory, STAGES - 1 steps ahead of the products;
 * beyond the picture, zeros. A warp has 32 channels, and as many results as that leaves: MI pieces of 16 by 4 of 8. A row of
 * a stage is 64 bytes, four chunks of 16, which change places from row to row so that the 8 rows that a warp reads at a time
 * lie in different banks. In the end sums go through shared memory, so that 16 bytes of results are written at a time. */
enum { TILE_M = 128, STAGES = 4, MMA_THREADS = 256, MMA_WARPS = MMA_THREADS / WARP };

/* Chunk k (0..3) of row r of a stage */
static __device__ inline floatX *chunk_at(floatX *stage, unsigned r, unsigned k) {
    return stage + r * STEP + (k ^ (r / 2 % 4)) * PACK;
}

/* Where a thread's two rows of the source tile are: picture, and the cell that their window begins with. */
typedef struct {
    size_t picture;
    long y, x;
    bool there;
} MmaRow;

static __device__ inline MmaRow mma_row(const Window *p, size_t row, size_t rows) {
    const unsigned r = (unsigned)row, gw = (unsigned)p->gw, gh = (unsigned)p->gh;
    MmaRow m;
    m.there = row < rows;
    m.picture = r / (gw * gh) * ((p->h >> p->shift) * (p->w >> p->shift));
    m.y = (long)(r / gw % gh) * p->stride - p->pad, m.x = (long)(r % gw) * p->stride - p->pad_x;
    return m;
}

typedef struct {
    floatX *y;
    const floatX *x, *w, *bias, *add;
    Window p;
    size_t rows, M;
    int phase; /* of CONV_UP, or -1: results lie one after the other */
} MmaConv;

/* Where result r goes: of a phase, to every second row and column of a grid twice as large. */
static __device__ inline size_t mma_place(const MmaConv *a, size_t r) {
    const unsigned gw = (unsigned)a->p.gw, row = (unsigned)r / gw;
    return a->phase < 0
               ? r
               : (2 * row + (unsigned)a->phase / 2) * 2 * (size_t)gw + 2 * ((unsigned)r % gw) + (unsigned)a->phase % 2;
}

/* Step s of the sum: copies its part of source and weights to a stage. */
template <int TILE_N>
static __device__ inline void mma_copy(floatX *stage, const MmaConv *a, const MmaRow row[2], size_t m0, unsigned s) {
    const unsigned C = (unsigned)a->p.C, cell = s * STEP / C, k = threadIdx.x % 4, c = s * STEP % C + k * PACK;
    floatX *weights = stage + TILE_M * STEP;
    for (unsigned i = 0; i < 2; i++) {
        const long y = row[i].y + (long)(cell / (unsigned)a->p.side), x = row[i].x + (long)(cell % (unsigned)a->p.side);
        const bool there = row[i].there && y >= 0 && x >= 0 && y < (long)a->p.h && x < (long)a->p.w;
        const size_t from =
            row[i].picture + (size_t)(y >> a->p.shift) * (a->p.w >> a->p.shift) + (size_t)(x >> a->p.shift);
        copy_async(chunk_at(stage, threadIdx.x / 4 + i * 64, k), there ? a->x + from * C + c : a->x, there);
    }
    for (unsigned r = threadIdx.x / 4; r < TILE_N; r += 64) {
        const bool there = m0 + r < a->M;
        copy_async(chunk_at(weights, r, k), there ? a->w + (m0 + r) * a->p.pitch + s * STEP + k * PACK : a->w, there);
    }
}

/* sum (MI,4) += the products of a stage: of rows first_row.. of the source tile with weights first_m.. */
template <int MI>
static __device__ inline void mma_multiply(float sum[MI][4][4], floatX *stage, unsigned first_row, unsigned first_m) {
    const unsigned lane = threadIdx.x % WARP;
    floatX *weights = stage + TILE_M * STEP;
    for (unsigned k = 0; k < STEP / 16; k++) {
        unsigned b[4][2];
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

/* What is in sums (TILE_M, TILE_N+4), + bias + add, to y */
template <int TILE_N>
static __device__ inline void mma_store(const MmaConv *a, const float *sums, size_t r0, size_t m0) {
    for (unsigned i = threadIdx.x; i < TILE_M * TILE_N / PACK; i += MMA_THREADS) {
        const unsigned r = i / (TILE_N / PACK), m = i % (TILE_N / PACK) * PACK;
        const size_t at = mma_place(a, r0 + r) * a->M + m0 + m, left = m0 + m < a->M ? a->M - m0 - m : 0;
        if (r0 + r >= a->rows || left == 0) continue;
        const bool whole = left >= PACK && a->M % PACK == 0;
        Pack out = {};
        if (a->add && whole) out = *(const Pack *)(a->add + at);
        for (unsigned k = 0; k < PACK && k < left; k++) {
            const float more = !a->add ? 0 : to_float(whole ? out.at[k] : a->add[at + k]);
            out.at[k] =
                to_floatX(sums[r * (TILE_N + 4) + m + k] + (a->bias ? to_float(a->bias[m0 + m + k]) : 0) + more);
        }
        if (whole)
            *(Pack *)(a->y + at) = out;
        else
            for (unsigned k = 0; k < PACK && k < left; k++) a->y[at + k] = out.at[k];
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
    for (unsigned s = 0; s < STAGES - 1; s++) {
        if (s < steps) mma_copy<TILE_N>(stages + s * STAGE, &a, row, m0, s);
        copy_commit();
    }
    for (unsigned s = 0; s < steps; s++) {
        copy_wait<STAGES - 2>();
        __syncthreads(); /* everybody's copies of this step are there, and the stage before it is free */
        const unsigned next = s + STAGES - 1;
        if (next < steps) mma_copy<TILE_N>(stages + next % STAGES * STAGE, &a, row, m0, next);
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
                             size_t M, const floatX *bias, const floatX *add, int phase) {
    const MmaConv a = {y, x, w, bias, add, *p, rows, M, phase};
    return M <= 32 ? launch_mma<32>(d, &a) : launch_mma<128>(d, &a);
}
#else
static Err multiply_directly(Device *d, floatX *y, const Window *p, const floatX *x, const floatX *w, size_t rows,
                             size_t M, const floatX *bias, const floatX *add, int phase) {
    (void)d, (void)y, (void)p, (void)x, (void)w, (void)rows, (void)M, (void)bias, (void)add, (void)phase;
    return err("internal: no convolution on tensor cores in float");
}
#endif

static Err phases_forward(Device *d, floatX *y, const Conv *c, const floatX *x, const floatX *w, const floatX *bias,
                          const floatX *add) {
    for (int phase = 0; phase < 4; phase++) {
        const Window p = phase_window(c, phase);
        TRY(multiply_directly(d, y, &p, x, w + (size_t)phase * c->M * p.pitch, c->B * c->h * c->w, c->M, bias, add,
                              phase));
    }
    return OK;
}

/* y = w * x + bias + add; x (B,h,w,C), y and add (B,..,M), w from conv_order_weights_cuda; add may be NULL, or y. */
static Err conv_forward_cuda(Device *d, floatX *y, const Conv *c, const floatX *x, const floatX *w, const floatX *bias,
                             const floatX *add, const ConvMemory *memory) {
    const Window p = forward_window(c);
    const size_t rows = rows_of(c), K = c->kind == CONV1 ? c->C : p.pitch;
    if (in_phases(c)) return phases_forward(d, y, c, x, w, bias, add);
    if (c->kind != CONV1 && can_multiply_directly(&p))
        return multiply_directly(d, y, &p, x, w, rows, c->M, bias, add, -1);
    const size_t tile = c->kind == CONV1 ? rows : tile_rows(memory->column_size, p.pitch);
    for (size_t r = 0; r < rows; r += tile) {
        const size_t n = min_size(tile, rows - r);
        if (c->kind != CONV1) TRY(gather(d, memory->columns, x, &p, r, n));
        Matmul product = rows_times(y + r * c->M, c->kind == CONV1 ? x : memory->columns, w, n, c->M, K, K, 1,
                                    add ? add + r * c->M : NULL);
        product.bias = bias;
        TRY(matmul(d, &product));
    }
    return OK;
}

/* dx (B,2gh,2gw,C) = or += the share in it of dcolumns, gradients of the patches of CONV_DOWN: four cells of dx for each
 * result first.. of the grid; the patches begin with that of result `begin`. A cell was seen by up to four results. */
static __global__ void fold_kernel(floatX *dx, const floatX *dcolumns, Window p, unsigned begin, unsigned first,
                                   unsigned rows, int more) {
    const unsigned C = (unsigned)p.C, gw = (unsigned)p.gw, gh = (unsigned)p.gh;
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)rows * 4 * C) return;
    const unsigned c = (unsigned)(i % C), corner = (unsigned)(i / C % 4), row = first + (unsigned)(i / C / 4);
    const unsigned gy = row / gw % gh, gx = row % gw, dy = corner / 2, at = corner % 2;
    float sum = 0;
    for (unsigned up = 0; up <= (dy == 0 && gy > 0); up++)
        for (unsigned left = 0; left <= (at == 0 && gx > 0); left++) {
            const unsigned cell = (dy + 2 * up) * 3 + at + 2 * left;
            sum += to_float(dcolumns[(row - up * gw - left - begin) * p.pitch + cell * C + c]);
        }
    floatX *to = dx + (((size_t)(row / (gw * gh)) * 2 * gh + 2 * gy + dy) * 2 * gw + 2 * gx + at) * C + c;
    *to = to_floatX(sum + (more ? to_float(*to) : 0));
}

/* CONV_DOWN: the weights' gradient from the patches of x; dx from the patches' gradient, with the results above and to the
 * left of a tile computed once more. */
static Err down_backward(Device *d, floatX *dx, float *dw, const Conv *c, const floatX *dy, const floatX *x,
                         const floatX *w, int more, const ConvMemory *memory) {
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
               (unsigned)begin, (unsigned)r, (unsigned)n, more);
    }
    return OK;
}

/* One gather of the gradient's patches serves both results, as in C: dx = patches(dy) w, dw = x^T patches(dy). */
static Err same_backward(Device *d, floatX *dx, float *dw, const Conv *c, const floatX *dy, const floatX *x,
                         const floatX *w, int more, const ConvMemory *memory) {
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
            rows_times(part, memory->columns, memory->weights, n, c->C, p.pitch, p.pitch, 1, more ? part : NULL);
        TRY(matmul(d, &product));
    }
    return add_ordered(d, dw, memory->totals, c, &p, order);
}

static Err add_channel_sums(Device *d, float *sum, const floatX *x, size_t rows, size_t C, float *partial);

/* dx overwritten, or added to if `more`; NULL: not wanted. dw (M,C,3,3), db (M) +=. w (M,C,3,3) as it is in the table. */
static Err conv_backward_cuda(Device *d, floatX *dx, float *dw, float *db, const Conv *c, const floatX *dy,
                              const floatX *x, const floatX *w, int more, const ConvMemory *memory) {
    TRY(add_channel_sums(d, db, dy, rows_of(c), c->M, memory->partial));
    if (c->kind == CONV_DOWN) return down_backward(d, dx, dw, c, dy, x, w, more, memory);
    if (c->kind != CONV1) return same_backward(d, dx, dw, c, dy, x, w, more, memory);
    Matmul product = turned_times(dw, dy, x, c->M, c->C, rows_of(c), 1);
    TRY(matmul(d, &product));
    if (!dx) return OK;
    product = rows_times(dx, dy, w, rows_of(c), c->C, c->M, c->C, 0, more ? dx : NULL);
    return matmul(d, &product);
}

/* ---- Sums of channels over cells ----
 *
 * A block of 256 threads has a slice of SLICE_CELLS rows and 8 packs of channels: a thread adds up every 32nd row of a pack,
 * then the 32 sums of a pack are added in order. Grid: packs / 8, slices, pictures. partial (B,slices,2,C) takes two sums
 * of each channel. */
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

static dim3 slice_grid(size_t C, size_t cells, size_t B, int width) {
    return dim3(blocks_for(C, (size_t)(PACK_LANES * width)), blocks_for(cells, SLICE_CELLS), (unsigned)B);
}

/* Where a thread's share of a slice begins and ends, in rows of its picture, and which channel its pack begins with. */
typedef struct {
    size_t c, first, end;
} Share;
static __device__ inline Share share_of(size_t C, size_t cells, int width) {
    Share s;
    s.c = ((size_t)blockIdx.x * PACK_LANES + threadIdx.x % PACK_LANES) * width;
    s.first = (size_t)blockIdx.y * SLICE_CELLS + threadIdx.x / PACK_LANES;
    s.end = (size_t)(blockIdx.y + 1) * SLICE_CELLS;
    if (s.end > cells) s.end = cells;
    if (s.c >= C) s.end = 0;
    return s;
}

template <int WIDTH>
static __global__ void channel_sums_kernel(float *partial, const floatX *x, size_t cells, size_t C) {
    const Share s = share_of(C, cells, WIDTH);
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

/* ---- GroupNorm, with or without swish: the twin of vqgan.c's ----
 *
 * x, y (B,cells,C); a group is C/32 neighbouring channels. Three kernels each way: sums of channels over slices; a warp per
 * group adds them up; every element. What forward keeps: */
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

/* Sums of x - pivot and of its square, where the pivot is the first number of the group: close to the mean, so that little
 * is lost in their difference. */
static __global__ void norm_sums_kernel(float *partial, const floatX *x, NormShape n) {
    const Share s = share_of(n.C, n.cells, PACK);
    const size_t per = n.C / NORM_GROUPS;
    float sum[PACK] = {}, square[PACK] = {}, pivot[PACK] = {};
    x += blockIdx.z * n.cells * n.C;
    for (int j = 0; j < PACK && s.end; j++) pivot[j] = to_float(x[(s.c + j) / per * per]);
    for (size_t r = s.first; r < s.end; r += CELL_LANES) {
        const Pack p = *(const Pack *)(x + r * n.C + s.c);
        for (int j = 0; j < PACK; j++) {
            const float gap = to_float(p.at[j]) - pivot[j];
            sum[j] += gap, square[j] += gap * gap;
        }
    }
    store_channel_sums<PACK>(partial, sum, square, n.C);
}

/* A block per picture, a warp per group. */
static __global__ void norm_groups_kernel(NormKept kept, const float *partial, const floatX *x, const float *gamma,
                                          const float *beta, NormShape n, size_t slices) {
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
static __global__ void norm_cells_kernel(floatX *y, const floatX *x, const float *channel, NormShape n) {
    const unsigned C = (unsigned)n.C, in_picture = (blockIdx.x * blockDim.x + threadIdx.x) * PACK;
    const size_t i = blockIdx.y * n.cells * n.C + in_picture;
    if (in_picture >= n.cells * n.C) return;
    const float *scale = channel + (blockIdx.y * n.C + in_picture % C) * 2;
    Pack p = *(const Pack *)(x + i);
    for (int j = 0; j < PACK; j++) {
        const float t = to_float(p.at[j]) * scale[2 * j] + scale[2 * j + 1];
        p.at[j] = to_floatX(n.swish ? t * sigmoid(t) : t);
    }
    *(Pack *)(y + i) = p;
}

static dim3 pack_grid(const NormShape *n) {
    return dim3(blocks_for(n->cells * n->C, CELL_THREADS * PACK), (unsigned)n->B);
}

static Err group_norm_forward_cuda(Device *d, floatX *y, NormKept kept, const floatX *x, const float *gamma,
                                   const float *beta, const NormShape *n, float *partial) {
    const dim3 grid = slice_grid(n->C, n->cells, n->B, PACK);
    LAUNCH(d, norm_sums_kernel, grid, CELL_THREADS, CELL_THREADS * PACK * sizeof(float), partial, x, *n);
    LAUNCH(d, norm_groups_kernel, (unsigned)n->B, NORM_GROUPS * WARP, 0, kept, partial, x, gamma, beta, *n,
           (size_t)grid.y);
    LAUNCH(d, norm_cells_kernel, pack_grid(n), CELL_THREADS, 0, y, x, kept.channel, *n);
    return OK;
}

/* dL/dt from dL/dy */
static __device__ inline float through_swish(float dy, float t) {
    const float s = sigmoid(t);
    return dy * s * (1 + t * (1 - s));
}

/* Sums of d = dL/dt and of d xhat. */
static __global__ void norm_gradient_sums_kernel(float *partial, const floatX *dy, const floatX *x, NormKept kept,
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
        const Pack p = *(const Pack *)(x + at), g = *(const Pack *)(dy + at);
        for (int j = 0; j < PACK; j++) {
            const float v = to_float(p.at[j]), dt = to_float(g.at[j]);
            const float t = n.swish ? through_swish(dt, v * scale[j] + shift[j]) : dt;
            sum[j] += t, sum_hat[j] += t * (v - mean[j]) * rstd[j];
        }
    }
    store_channel_sums<PACK>(partial, sum, sum_hat, n.C);
}

/* line (B,C,2) = slope, offset: dx = scale d + slope x + offset, alike in a group. A block per picture, a warp per group. */
static __global__ void norm_lines_kernel(float *line, const float *partial, const float *gamma, NormKept kept,
                                         NormShape n, size_t slices) {
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

static __global__ void norm_gradient_kernel(floatX *dx, const floatX *dy, const floatX *x, const float *channel,
                                            const float *line, NormShape n, int more) {
    const unsigned C = (unsigned)n.C, in_picture = (blockIdx.x * blockDim.x + threadIdx.x) * PACK;
    const size_t i = blockIdx.y * n.cells * n.C + in_picture, c = blockIdx.y * n.C + in_picture % C;
    if (in_picture >= n.cells * n.C) return;
    const float *scale = channel + c * 2, *add = line + c * 2;
    const Pack p = *(const Pack *)(x + i), g = *(const Pack *)(dy + i);
    Pack out = {};
    if (more) out = *(const Pack *)(dx + i);
    for (int j = 0; j < PACK; j++) {
        const float v = to_float(p.at[j]), dt = to_float(g.at[j]);
        const float t = n.swish ? through_swish(dt, v * scale[2 * j] + scale[2 * j + 1]) : dt;
        out.at[j] = to_floatX((more ? to_float(out.at[j]) : 0) + scale[2 * j] * t + add[2 * j] * v + add[2 * j + 1]);
    }
    *(Pack *)(dx + i) = out;
}

/* dx overwritten, or added to if `more`; dgamma, dbeta (C) +=. partial: norm_partial_size floats. */
static Err group_norm_backward_cuda(Device *d, floatX *dx, float *dgamma, float *dbeta, const floatX *dy,
                                    const floatX *x, NormKept kept, const float *gamma, const NormShape *n, int more,
                                    float *partial) {
    const dim3 grid = slice_grid(n->C, n->cells, n->B, PACK);
    float *line = partial + channel_slices(n->B, n->cells, n->C);
    LAUNCH(d, norm_gradient_sums_kernel, grid, CELL_THREADS, CELL_THREADS * PACK * sizeof(float), partial, dy, x, kept,
           *n);
    LAUNCH(d, norm_lines_kernel, (unsigned)n->B, NORM_GROUPS * WARP, 0, line, partial, gamma, kept, *n, (size_t)grid.y);
    LAUNCH(d, norm_gradient_kernel, pack_grid(n), CELL_THREADS, 0, dx, dy, x, kept.channel, line, *n, more);
    return add_channels(d, dbeta, dgamma, partial, n->B * grid.y, n->C);
}

static size_t norm_partial_size(const NormShape *n) {
    return channel_slices(n->B, n->cells, n->C) + n->B * n->C * 2;
}

/* ---- Attention over the cells of a picture, one head: the twin of vqgan.c's ----
 *
 * With N cells of C channels the scores (N,N) fit in memory and C is too wide for a block's, so scores are written down:
 * products by matmul, picture by picture, the softmax a warp per row. q, k, v, y (B,N,C); p (B,N,N) kept. */

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

/* ---- Vector quantiser: the twin of vqgan.c's ---- */

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

/* raw (rows) = nearest entries of z (rows,D) in book (K,D). half (K), scores: work space, score_size >= TILE_ROWS*K floats. */
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

/* zq = z + (e - z), straight through; sums (SUM_BLOCKS) += of (e - z)^2: a block adds up its share, warp after warp. */
static __global__ void straight_kernel(floatX *zq, double *sums, const floatX *z, const floatX *book,
                                       const int32_t *raw, size_t rows, size_t D) {
    SHARED(double, warps);
    double sum = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < rows * D; i += (size_t)SUM_BLOCKS * blockDim.x) {
        const float at = to_float(z[i]), gap = to_float(book[(size_t)raw[i / D] * D + i % D]) - at;
        zq[i] = to_floatX(at + gap);
        sum += (double)gap * (double)gap;
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (unsigned k = 1; k < blockDim.x / WARP; k++) sum += warps[k];
    sums[blockIdx.x] = sum;
}

static Err straight_through_cuda(Device *d, floatX *zq, double *sums, const floatX *z, const floatX *book,
                                 const int32_t *raw, size_t rows, size_t D) {
    LAUNCH(d, straight_kernel, SUM_BLOCKS, CELL_THREADS, CELL_THREADS / WARP * sizeof(double), zq, sums, z, book, raw,
           rows, D);
    return OK;
}

/* dz += to_z (z - e) */
static __global__ void commit_kernel(floatX *dz, const floatX *z, const floatX *book, const int32_t *raw, float to_z,
                                     size_t rows, size_t D) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * D) return;
    dz[i] = to_floatX(to_float(dz[i]) + to_z * (to_float(z[i]) - to_float(book[(size_t)raw[i / D] * D + i % D])));
}

/* dbook[k] += to_e (e - z) over the rows whose code is k, in their order: a block per entry looks for its rows, 256 at a
 * time, and a thread has channels of its own. Shared: the sums (D), then which of those rows are ours. */
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

/* ---- The whole network: the twin of vqgan.c's walk ---- */

struct VqTwin {
    Device *d;
    floatX *arena;       /* every value and gradient, and what norms and attention keep, as vqgan_plan laid them out */
    float *planes;       /* a picture batch, or latents, in the host's order, on their way */
    int32_t *raw;        /* (B,N) codes */
    floatX **ordered;    /* (n_layers) weights of 3x3 convolutions in the order of patches, else NULL */
    floatX *order_arena; /* they lie here */
    uint64_t changes;    /* of the parameters (Device.changes) when they were put in order */
    ConvMemory conv;
    size_t score_size;
    float *partial, *scores, *half; /* sums of slices; scores of attention or codes; of the codebook */
    floatX *ds;                     /* gradient of attention's scores */
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
    return conv_forward_cuda(v->twin->d, value_at(v, l->out), &c, value_at(v, l->in[0]), w, row_at(v, l->bias)->weight,
                             l->add == NO_VALUE ? NULL : value_at(v, l->add), &v->twin->conv);
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
    return group_norm_forward_cuda(v->twin->d, value_at(v, l->out), kept_by(v, l, &n), value_at(v, l->in[0]),
                                   row_at(v, l->weight)->value, row_at(v, l->bias)->value, &n, v->twin->partial);
}

static Err vq_norm_backward(Vqgan *v, const VqLayer *l) {
    const NormShape n = norm_shape(v, l);
    return group_norm_backward_cuda(v->twin->d, grad_at(v, l->in[0]), row_at(v, l->weight)->grad,
                                    row_at(v, l->bias)->grad, grad_at(v, l->out), value_at(v, l->in[0]),
                                    kept_by(v, l, &n), row_at(v, l->weight)->value, &n, l->more[0], v->twin->partial);
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
    for (size_t i = v->n_layers; i-- > 0;) {
        const VqLayer *l = &v->layer[i];
        switch (l->kind) {
        case VQ_NORM: TRY(vq_norm_backward(v, l)); break;
        case VQ_ATTEND: TRY(vq_attend_backward(v, l)); break;
        case VQ_QUANTIZE: TRY(vq_quantize_backward(v, l, codebook_weight)); break;
        case VQ_TANH: TRY(vq_tanh(v, l, 1)); break;
        default: TRY(vq_conv_backward(v, l, image_wanted));
        }
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

/* An entry becomes a latent; its moments and average follow. Each of these may be NULL. */
static __global__ void restart_kernel(DeviceRow book, const floatX *z, size_t code, size_t pick, size_t D) {
    for (size_t k = threadIdx.x; k < D; k += blockDim.x) {
        const float value = to_float(z[pick * D + k]);
        const size_t at = code * D + k;
        book.value[at] = value, book.weight[at] = to_floatX(value);
        if (book.m) book.m[at] = 0;
        if (book.v) book.v[at] = 0;
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

static size_t shared_bytes(const Vqgan *v, const VqNeeds *n) {
    const size_t floats = n->planes + n->partial + n->scores + n->cells + v->c.n_embed + n->conv.total_size;
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
    TRY(device_alloc(&t->order_arena, n->order * sizeof(floatX), "first stage: weights in the order of patches"));
    TRY(device_alloc(&t->planes, n->planes * sizeof(float), what));
    TRY(device_alloc(&t->raw, n->cells * sizeof *t->raw, what));
    TRY(device_alloc(&t->partial, n->partial * sizeof(float), what));
    TRY(device_alloc(&t->scores, n->scores * sizeof(float), what));
    TRY(device_alloc(&t->half, v->c.n_embed * sizeof(float), what));
    TRY(device_alloc(&t->ds, n->ds * sizeof(floatX), what));
    TRY(device_alloc(&t->conv.columns, n->conv.column_size * sizeof(floatX), what));
    TRY(device_alloc(&t->conv.weights, n->conv.weight_size * sizeof(floatX), what));
    TRY(device_alloc(&t->conv.totals, n->conv.total_size * sizeof(float), what));
    t->conv.partial = t->partial;
    return place_ordered(v);
}

static void vqgan_free_cuda(Vqgan *v) {
    VqTwin *t = v->twin;
    void *const all[] = {t->arena, t->order_arena, t->planes,       t->raw,          t->partial,    t->scores,
                         t->half,  t->ds,          t->conv.columns, t->conv.weights, t->conv.totals};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) device_free(all[i]);
    free(t->ordered);
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
    *bytes = units * sizeof(floatX) + shared_bytes(v, &n);
    if (!allocate) return OK;
    TRY(mem_alloc(&v->twin, 1, sizeof *v->twin, "vqgan: on the GPU"));
    v->twin->d = v->params.device;
    v->twin->changes = (uint64_t)-1;
    if (allocate_twin(v, &n, units) == OK) return OK;
    vqgan_free_cuda(v);
    return FAILED;
}
#endif
