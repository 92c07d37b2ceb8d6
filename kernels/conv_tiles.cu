/* conv_tiles.cu - convolutions on tensor cores, without writing patches down ("implicit GEMM"): results, and the
 * weights' gradient. In bf16 alone.
 *
 * A block has a tile of TILE_H x TILE_W results of one picture. For STEP channels of the source at a time it keeps in
 * shared memory all pixels that these results see, their halo: each is read once, not once for every pixel of the window,
 * and what stands between the source and the convolution, group norm and swish, is computed on the way, once a pixel.
 *
 * A row of shared memory has STEP channels of a pixel, and a pack more: 80 bytes, so that the 8 neighbouring rows that a
 * warp reads at a time lie in different banks. Whole numbers are of 32 bits, which plans have seen to. */
#include "kernels/device.h"

/* ---- What both kernels are asked for ---- */

/* Results in float, and what is added to them, instead of or beside those in floatX: of a residual stream in bf16. */
typedef struct {
    float *y;
    const float *add, *bias;
} Wide;
static const Wide not_wide = {NULL, NULL, NULL};

/* A source (B,h,w,C): as it is, or through group norm, whose input is in floatX or in float (f32). */
typedef enum { AS_IT_IS, NORMED, NORMED_F32 } Reading;
typedef struct {
    Reading how;
    const floatX *x;
    const float *f32, *channel; /* channel (B,C,2): scale and shift */
    int swish;
} Source;
static Source plain_source(const floatX *x) {
    const Source s = {AS_IT_IS, x, NULL, NULL, 0};
    return s;
}

/* Count, mean and sum of squares around it, of each channel of y, over parts of pictures: (B,parts,3,M) floats, of which
 * these results have parts first.. of each picture, one for each tile. sum NULL: not wanted. */
typedef struct {
    float *sum;
    unsigned first, parts;
} Moments;
static const Moments no_moments = {NULL, 0, 0};

/* Results that lie in every step-th row and column of pictures (h,w), from row y and column x on */
typedef struct {
    unsigned step, y, x, h, w;
} Places;

typedef struct {
    Window p;
    size_t B, M;
    Source from;
    const floatX *w; /* (M,pitch) */
    const floatX *add;
    floatX *y;
    Wide wide; /* if it has y, y may be NULL; its bias counts anyhow */
    Places to;
    Moments moments;
    float *partial; /* sums of splits: see there */
    unsigned splits;
} TileConv;

typedef struct {
    Window p;
    size_t B, M;
    Source from;
    const floatX *results; /* (B,gh,gw,M) */
    float *total;          /* (shares,M,pitch) */
    unsigned shares;       /* of the tiles */
} TileWeights;

enum { STEP = 32, TILE_H = 8, TILE_W = 16, TILE_M = TILE_H * TILE_W };

/* Of pictures; of a batch. */
static size_t tiles_of(const Window *p) {
    return ceil_div(p->gh, TILE_H) * ceil_div(p->gw, TILE_W);
}

static int can_multiply_directly(const Window *p) {
    return IS_BF16 && p->C % STEP == 0;
}

/* Channels of a tile, or of a narrow one; FEW_BLOCKS: see splits_of */
enum { TILE_N = 128, NARROW_N = 32, FEW_BLOCKS = 64 };

/* Floats of TileConv.partial: enough for fewer and smaller pictures, too, which may be split where these are not. Blocks
 * are doubled while there are fewer than FEW_BLOCKS. */
static size_t split_floats(const Window *p, size_t M) {
    const int splits = can_multiply_directly(p) && M > NARROW_N && p->C >= 2 * STEP;
    return splits ? (size_t)2 * FEW_BLOCKS * TILE_M * TILE_N : 0;
}

/* Of the weights' gradient: rows of it that a block makes, and how many blocks share the tiles, each with a sum of its
 * own, so that there are blocks enough. */
enum { MANY_BLOCKS = 264, TILES_A_SHARE = 4 };
static size_t weight_rows(const Window *p) {
    return p->side > 3 ? 32 : 64;
}
static unsigned shares_of(const Window *p, size_t B, size_t M) {
    const size_t blocks = ceil_div(M, weight_rows(p)) * (p->C / STEP);
    return (unsigned)min_size(ceil_div(B * tiles_of(p), TILES_A_SHARE), ceil_div(MANY_BLOCKS, blocks));
}

#ifdef FLOATX_BF16
/* Where few tiles would leave most of a GPU idle, each is made by several blocks, which share the channels of the source:
 * their sums are written down, and added in order. */
static unsigned splits_of(const Window *p, size_t B, size_t M) {
    const size_t blocks = B * tiles_of(p) * ceil_div(M, TILE_N), chunks = p->C / STEP;
    unsigned splits = 1;
    while (M > NARROW_N && blocks * splits < FEW_BLOCKS && 2 * splits <= chunks) splits *= 2;
    return splits;
}

/* ---- Tiles and their halos ---- */

enum { ROW = STEP + PACK, STAGES = 4, MMA_THREADS = 256, MMA_WARPS = MMA_THREADS / WARP, LOADERS = MMA_THREADS / 4 };

/* Pixels that a tile sees through SIDE x SIDE with this STRIDE, row by row. With a stride of 2 those of even rows and
 * columns come first, then those of even rows and odd columns, and so on: what neighbouring results see through one pixel
 * of the window lies side by side, always. LOADERS threads have one each, PIECES times. */
template <int SIDE, int STRIDE> struct Halo {
    enum {
        W = TILE_W + (SIDE - 1) / STRIDE,
        PLANE = (TILE_H + (SIDE - 1) / STRIDE) * W,
        PIXELS = STRIDE * STRIDE * PLANE,
        PIECES = (PIXELS + LOADERS - 1) / LOADERS,
        BUFFERS = STRIDE == 1 ? 2 : 1, /* what is read next while this is multiplied */
        SIZE = PIXELS * ROW
    };
    /* Where the pixel lies that the first result sees through pixel (y,x) of the window */
    static __device__ inline unsigned seen(unsigned y, unsigned x) {
        return (y % STRIDE * STRIDE + x % STRIDE) * PLANE + y / STRIDE * W + x / STRIDE;
    }
};

/* The first result of a tile */
typedef struct {
    unsigned picture, y, x;
} Tile;

static __device__ inline Tile tile_at(const Window *p, unsigned i) {
    const unsigned across = ((unsigned)p->gw + TILE_W - 1) / TILE_W, down = ((unsigned)p->gh + TILE_H - 1) / TILE_H;
    const Tile t = {i / (across * down), i / across % down * TILE_H, i % across * TILE_W};
    return t;
}

/* Which pixel of the source (B,h,w) is pixel q of a tile's halo? NOWHERE: beyond the picture, or q beyond the halo. */
static const unsigned NOWHERE = 0xffffffffu;
template <int SIDE, int STRIDE> static __device__ inline unsigned halo_pixel(const Window *p, Tile t, unsigned q) {
    typedef Halo<SIDE, STRIDE> H;
    const unsigned plane = q / H::PLANE, rest = q % H::PLANE; /* above or left of the picture: too large */
    const unsigned y = (t.y + rest / H::W) * STRIDE + plane / STRIDE - (unsigned)p->pad,
                   x = (t.x + rest % H::W) * STRIDE + plane % STRIDE - (unsigned)p->pad_x;
    return q < H::PIXELS && y < p->h && x < p->w ? (t.picture * (unsigned)p->h + y) * (unsigned)p->w + x : NOWHERE;
}

/* Begins to copy channels c.. of the halo. */
template <int SIDE, int STRIDE>
static __device__ inline void copy_halo(floatX *halo, const Window *p, const Source *from, Tile t, unsigned c) {
    typedef Halo<SIDE, STRIDE> H;
    const unsigned k = threadIdx.x % 4 * PACK;
#pragma unroll
    for (unsigned i = 0; i < H::PIECES; i++) {
        const unsigned q = i * LOADERS + threadIdx.x / 4, pixel = halo_pixel<SIDE, STRIDE>(p, t, q);
        const bool there = pixel != NOWHERE;
        if (q < H::PIXELS)
            copy_async(halo + q * ROW + k, from->x + (there ? pixel * (unsigned)p->C + c + k : 0), there);
    }
}

/* The same through group norm, in two halves, between which the numbers are on their way: piece i of them. */
template <Reading READ> static __device__ inline Numbers read_source(const Source *from, size_t i) {
    if constexpr (READ == NORMED_F32) return numbers_at(from->f32, i);
    return numbers_at(from->x, i);
}
template <int SIDE, int STRIDE, Reading READ>
static __device__ inline Numbers begin_piece(const Window *p, const Source *from, Tile t, unsigned c, unsigned i,
                                             unsigned *pixel) {
    *pixel = halo_pixel<SIDE, STRIDE>(p, t, i * LOADERS + threadIdx.x / 4);
    const size_t at = *pixel == NOWHERE ? 0 : *pixel * (unsigned)p->C + c + threadIdx.x % 4 * PACK;
    return read_source<READ>(from, at);
}
template <int SIDE, int STRIDE>
static __device__ inline void end_piece(floatX *halo, const Window *p, const Source *from, Tile t, unsigned c,
                                        unsigned i, unsigned pixel, const Numbers &x) {
    const unsigned q = i * LOADERS + threadIdx.x / 4, k = threadIdx.x % 4 * PACK;
    Pack out = {};
    if (q >= Halo<SIDE, STRIDE>::PIXELS) return;
    if (pixel != NOWHERE)
        out = normed(x, pairs_at(from->channel + (t.picture * (unsigned)p->C + c + k) * 2), from->swish);
    *(Pack *)(halo + q * ROW + k) = out;
}

/* Channels c.. of the halo at once: copies are begun, what is normed is there. */
template <int SIDE, int STRIDE, Reading READ>
static __device__ inline void load_halo(floatX *halo, const Window *p, const Source *from, Tile t, unsigned c) {
    if constexpr (READ == AS_IT_IS)
        copy_halo<SIDE, STRIDE>(halo, p, from, t, c);
    else
        for (unsigned i = 0; i < Halo<SIDE, STRIDE>::PIECES; i++) {
            unsigned pixel;
            const Numbers x = begin_piece<SIDE, STRIDE, READ>(p, from, t, c, i, &pixel);
            end_piece<SIDE, STRIDE>(halo, p, from, t, c, i, pixel, x);
        }
}

/* ---- What becomes of a tile's sums ---- */

/* Of a block that makes N channels: a warp has 32 of them, and as many results as that leaves: MI pieces of 16, which are
 * rows of the tile, by 4 of 8. In shared memory, rows of sums are 32 bytes longer than they need be, for the banks. */
template <int N> struct Shape {
    enum {
        WARPS = N / 32,
        MI = TILE_H / (MMA_WARPS / WARPS),
        PITCH = N + 8,
        SUMS = TILE_M * (PITCH + 1),   /* and places */
        SEEN = 4 * MMA_THREADS * PACK, /* store_moments */
        BYTES = (SUMS > SEEN ? SUMS : SEEN) * 4
    };
};
struct alignas(8) TwoFloats {
    float at[2];
};

template <int N>
static __device__ inline void share_sums(float *sums, const float sum[Shape<N>::MI][4][4], unsigned first_row,
                                         unsigned first_m) {
    const unsigned lane = threadIdx.x % WARP;
    float *to = sums + (first_row + lane / 4) * Shape<N>::PITCH + first_m + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < Shape<N>::MI; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const TwoFloats two = {{sum[i][j][2 * k], sum[i][j][2 * k + 1]}};
                *(TwoFloats *)(to + (i * 16 + k * 8) * Shape<N>::PITCH + j * 8) = two;
            }
}

/* place (TILE_M): where each result of a tile goes, in pixels, or NOWHERE */
static __device__ inline void find_places(unsigned *place, const TileConv *a, Tile t) {
    const unsigned y = t.y + threadIdx.x / TILE_W, x = t.x + threadIdx.x % TILE_W;
    if (threadIdx.x >= TILE_M) return;
    const unsigned row = t.picture * a->to.h + y * a->to.step + a->to.y;
    place[threadIdx.x] = y < a->p.gh && x < a->p.gw ? row * a->to.w + x * a->to.step + a->to.x : NOWHERE;
}

/* What a thread has seen of PACK channels: sums of x - pivot and of its square, the pivot being the first x */
typedef struct {
    float pivot[PACK], sum[PACK], square[PACK], n;
} Seen;

static __device__ inline void look_at(Seen *s, const float x[PACK]) {
#pragma unroll
    for (int k = 0; k < PACK; k++) {
        if (s->n == 0) s->pivot[k] = x[k];
        const float gap = x[k] - s->pivot[k];
        s->sum[k] += gap, s->square[k] += gap * gap;
    }
    s->n += 1;
}

/* The moments of the tile's N channels from m0 on: those of LANES threads for each, in order. A thread's pivot is moved
 * to that of the first, who has always seen something. */
template <int N>
static __device__ inline void store_moments(const TileConv *a, float *shared, const Seen *s, Tile t, unsigned tile,
                                            unsigned m0) {
    enum { LANES = MMA_THREADS * PACK / N, PLANE = LANES * N }; /* pivots, sums, squares, counts */
    float *mine = shared + threadIdx.x * PACK;
    __syncthreads(); /* the sums that were here have been read */
#pragma unroll
    for (int k = 0; k < PACK; k++)
        mine[k] = s->pivot[k], mine[PLANE + k] = s->sum[k], mine[2 * PLANE + k] = s->square[k],
        mine[3 * PLANE + k] = s->n;
    __syncthreads();
    const unsigned m = m0 + threadIdx.x;
    if (threadIdx.x >= N || m >= a->M) return;
    const float *from = shared + threadIdx.x, pivot = from[0];
    float n = 0, sum = 0, square = 0;
    for (unsigned i = 0; i < LANES; i++, from += N) {
        const float gap = from[0] - pivot, count = from[3 * PLANE];
        if (count == 0) continue;
        n += count, sum += from[PLANE] + count * gap, square += from[2 * PLANE] + gap * (2 * from[PLANE] + count * gap);
    }
    const unsigned tiles = ((unsigned)a->p.gh + TILE_H - 1) / TILE_H * (((unsigned)a->p.gw + TILE_W - 1) / TILE_W);
    float *to = a->moments.sum + ((t.picture * a->moments.parts + a->moments.first + tile % tiles) * 3) * a->M + m;
    to[0] = n, to[a->M] = pivot + sum / n, to[2 * a->M] = square - sum * sum / n;
}

/* Results of PACK channels at a time, of a matrix whose rows are whole packs: sums + bias + add, to y. A thread's packs
 * all have the same channels. */
template <int N>
static __device__ inline void store_packs(const TileConv *a, const float *sums, const unsigned *place, unsigned m0,
                                          Seen *seen) {
    const unsigned k0 = threadIdx.x % (N / PACK) * PACK, m = m0 + k0, M = (unsigned)a->M;
    Numbers bias = {};
    if (m >= M) return;
    if (a->wide.bias) bias = numbers_at(a->wide.bias, m);
#pragma unroll 2
    for (unsigned r = threadIdx.x / (N / PACK); r < TILE_M; r += MMA_THREADS / (N / PACK)) {
        const unsigned at = place[r] * M + m;
        Numbers out = numbers_at(sums, r * Shape<N>::PITCH + k0), add = {};
        Pack low;
        if (place[r] == NOWHERE) continue;
        if (a->wide.add)
            add = numbers_at(a->wide.add, at);
        else if (a->add)
            add = numbers_at(a->add, at);
#pragma unroll
        for (int k = 0; k < PACK; k++) {
            out.at[k] += bias.at[k] + add.at[k];
            low.at[k] = to_floatX(out.at[k]);
        }
        if (a->y) store_whole(a->y + at, low);
        for (int k = 0; k < PACK && a->wide.y; k += 4) {
            const Floats four = {{out.at[k], out.at[k + 1], out.at[k + 2], out.at[k + 3]}};
            store_whole(a->wide.y + at + k, four);
        }
        if (!a->moments.sum) continue;
        for (int k = 0; k < PACK && !a->wide.y; k++) out.at[k] = to_float(low.at[k]); /* as the norm reads them */
        look_at(seen, out.at);
    }
}

/* One by one, where the rows of the results are not whole packs */
template <int N>
static __device__ inline void store_numbers(const TileConv *a, const float *sums, const unsigned *place, unsigned m0) {
    const unsigned n = a->M - m0 < N ? (unsigned)a->M - m0 : (unsigned)N;
    for (unsigned i = threadIdx.x; i < TILE_M * n; i += MMA_THREADS) {
        const unsigned r = i / n, m = m0 + i % n;
        const size_t at = (size_t)place[r] * a->M + m;
        if (place[r] == NOWHERE) continue;
        float out = sums[r * Shape<N>::PITCH + i % n] + (a->wide.bias ? a->wide.bias[m] : 0);
        if (a->wide.add)
            out += a->wide.add[at];
        else if (a->add)
            out += to_float(a->add[at]);
        if (a->y) a->y[at] = to_floatX(out);
        if (a->wide.y) a->wide.y[at] = out;
    }
}

/* The end of a tile: all threads have left shared memory to it. */
template <int N>
static __device__ inline void finish_tile(const TileConv *a, float *shared, const float sum[Shape<N>::MI][4][4], Tile t,
                                          unsigned tile, unsigned m0) {
    const unsigned warp = threadIdx.x / WARP;
    unsigned *place = (unsigned *)(void *)(shared + TILE_M * Shape<N>::PITCH);
    Seen seen = {};
    share_sums<N>(shared, sum, warp / Shape<N>::WARPS * Shape<N>::MI * 16, warp % Shape<N>::WARPS * 32);
    find_places(place, a, t);
    __syncthreads();
    if (a->M % PACK) return store_numbers<N>(a, shared, place, m0);
    store_packs<N>(a, shared, place, m0, &seen);
    if (a->moments.sum) store_moments<N>(a, shared, &seen, t, tile, m0);
}

/* ---- Results ---- */

/* Begins to copy a step's weights: N rows, of which `left` are there, from the address that is this thread's in the first
 * LOADERS of them. pitch: from row to row, in elements. */
template <int N>
static __device__ inline void copy_weights(floatX *stage, const floatX *from, unsigned left, unsigned pitch) {
    const unsigned r = threadIdx.x / 4;
#pragma unroll
    for (unsigned m = 0; m < N; m += LOADERS) {
        const bool there = m + r < left;
        if (N % LOADERS == 0 || m + r < N)
            copy_async(stage + (m + r) * ROW + threadIdx.x % 4 * PACK, there ? from + m * pitch : from, there);
    }
}

/* sum += STEP channels of pixels, W to a row of the halo, times those of weights: from where the lane reads on */
template <int MI, int W>
static __device__ inline void multiply_step(float sum[MI][4][4], const floatX *pixels, const floatX *weights) {
#pragma unroll
    for (unsigned k = 0; k < STEP; k += 16) {
        unsigned b[4][2];
#pragma unroll
        for (unsigned j = 0; j < 4; j += 2) {
            unsigned word[4]; /* channels j*8..+7 with the first and second 8 of the 16, then the next 8 channels */
            load_matrices(word, weights + j * 8 * ROW + k);
            b[j][0] = word[0], b[j][1] = word[1], b[j + 1][0] = word[2], b[j + 1][1] = word[3];
        }
#pragma unroll
        for (int i = 0; i < MI; i++) {
            unsigned word[4]; /* pixels 0..7 and 8..15 with the first 8, then with the second */
            load_matrices(word, pixels + (unsigned)i * W * ROW + k);
#pragma unroll
            for (int j = 0; j < 4; j++) multiply_tiles(sum[i][j], word, b[j]);
        }
    }
}

/* Where a split's sums of 16 results and 32 channels begin: (splits, tiles of N channels, N/32, TILE_H, 4, WARP, 4) */
template <int N>
static __device__ inline size_t partial_at(unsigned split, size_t blocks, size_t block, unsigned group) {
    return ((split * blocks + block) * (N / 32) + group) * TILE_M * 32 + threadIdx.x % WARP * 4;
}

template <int N> static __device__ inline void store_split(float *partial, const float sum[Shape<N>::MI][4][4]) {
    typedef Shape<N> S;
    const unsigned warp = threadIdx.x / WARP;
    float *to = partial + partial_at<N>(blockIdx.y, gridDim.x, blockIdx.x, warp % S::WARPS);
#pragma unroll
    for (int i = 0; i < S::MI; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const Floats four = {{sum[i][j][0], sum[i][j][1], sum[i][j][2], sum[i][j][3]}};
            store_whole(to + ((warp / S::WARPS * S::MI + (unsigned)i) * 4 + (unsigned)j) * WARP * 4, four);
        }
}

/* Grid: tiles of channels, then of results; splits. A step is a pixel of the window and STEP channels; its weights are
 * copied STAGES - 1 steps ahead, and the next channels of the halo while the present ones are multiplied. */
template <int N, int SIDE, int STRIDE, Reading READ>
static __global__ void __launch_bounds__(MMA_THREADS, 2) conv_tile_kernel(TileConv a) {
    typedef Halo<SIDE, STRIDE> H;
    typedef Shape<N> S;
    enum { TAPS = SIDE * SIDE };
    SHARED(floatX, halo); /* (BUFFERS,PIXELS,ROW), then weights (STAGES,N,ROW) */
    floatX *weights = halo + H::BUFFERS * H::SIZE;
    const unsigned across = ((unsigned)a.M + N - 1) / N, tile = blockIdx.x / across, m0 = blockIdx.x % across * N,
                   chunks = (unsigned)a.p.C / STEP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const unsigned first = chunks * blockIdx.y / a.splits, end = chunks * (blockIdx.y + 1) / a.splits;
    const Tile t = tile_at(&a.p, tile);
    const unsigned mine = (warp / S::WARPS * S::MI * H::W + lane % 16) * ROW + lane / 16 * PACK;
    const floatX *rows = weights + (warp % S::WARPS * 32 + lane / 16 * 8 + lane % 8) * ROW + lane / 8 % 2 * PACK;
    const unsigned left = (unsigned)a.M - m0, pitch = (unsigned)a.p.pitch, C = (unsigned)a.p.C, row = threadIdx.x / 4;
    const floatX *from = a.w + (row < left ? (m0 + row) * pitch : 0) + first * STEP + threadIdx.x % 4 * PACK;
    float sum[S::MI][4][4] = {};
    load_halo<SIDE, STRIDE, READ>(halo, &a.p, &a.from, t, first * STEP);
    for (unsigned tap = 0; tap < STAGES - 1; tap++) {
        copy_weights<N>(weights + tap * N * ROW, from + tap * C, left, pitch);
        copy_commit();
    }
    unsigned stage = 0, free = (STAGES - 1) * N * ROW; /* of this step's weights; of those that come next */
    for (unsigned chunk = first; chunk < end; chunk++, from += STEP) {
        const unsigned c = (chunk + 1) * STEP, buffer = (chunk - first) % H::BUFFERS;
        const floatX *pixels = halo + buffer * H::SIZE + mine;
        floatX *other = halo + (1 - buffer) * H::SIZE;
        const bool last = chunk + 1 == end, more = H::BUFFERS == 2 && !last;
        if (H::BUFFERS == 1 && chunk > first) {
            __syncthreads(); /* everybody has read the halo */
            load_halo<SIDE, STRIDE, READ>(halo, &a.p, &a.from, t, chunk * STEP);
            copy_commit();
            copy_wait<0>();
        }
#pragma unroll
        for (unsigned tap = 0; tap < TAPS; tap++) {
            const unsigned ahead = tap + STAGES - 1;
            const bool piece = READ != AS_IT_IS && more && tap < H::PIECES;
            unsigned pixel = NOWHERE;
            Numbers x = {};
            copy_wait<STAGES - 2>();
            __syncthreads(); /* everybody's copies of this step are there, and the stage before it is free */
            if (ahead < TAPS || !last)
                copy_weights<N>(weights + free, from + ahead % TAPS * C + ahead / TAPS * STEP, left, pitch);
            if (READ == AS_IT_IS && more && tap == 0) copy_halo<SIDE, STRIDE>(other, &a.p, &a.from, t, c);
            copy_commit();
            if (piece) x = begin_piece<SIDE, STRIDE, READ>(&a.p, &a.from, t, c, tap, &pixel);
            multiply_step<S::MI, H::W>(sum, pixels + H::seen(tap / SIDE, tap % SIDE) * ROW, rows + stage);
            if (piece) end_piece<SIDE, STRIDE>(other, &a.p, &a.from, t, c, tap, pixel, x);
            free = stage, stage = stage == (STAGES - 1) * N * ROW ? 0 : stage + N * ROW;
        }
    }
    copy_wait<0>();
    __syncthreads();
    if (a.splits < 2) return finish_tile<N>(&a, (float *)(void *)halo, sum, t, tile, m0);
    store_split<N>(a.partial, sum);
}

/* The sums of all splits, in order, and what becomes of them: a block has all results of a tile and 32 of its channels. */
static __global__ void __launch_bounds__(MMA_THREADS) add_splits_kernel(TileConv a) {
    SHARED(float, shared);
    const unsigned across = ((unsigned)a.M + TILE_N - 1) / TILE_N, groups = TILE_N / 32, block = blockIdx.x / groups,
                   group = blockIdx.x % groups, m0 = block % across * TILE_N + group * 32, warp = threadIdx.x / WARP;
    float sum[1][4][4] = {};
    if (m0 >= a.M) return;
    for (unsigned s = 0; s < a.splits; s++) {
        const float *from = a.partial + partial_at<TILE_N>(s, gridDim.x / groups, block, group);
#pragma unroll
        for (unsigned j = 0; j < 4; j++) {
            const Floats four = *(const Floats *)(from + (warp * 4 + j) * WARP * 4);
            for (int k = 0; k < 4; k++) sum[0][j][k] += four.at[k];
        }
    }
    finish_tile<NARROW_N>(&a, shared, sum, tile_at(&a.p, block / across), block / across, m0);
}

template <int N, int SIDE, int STRIDE, Reading READ> static Err launch_tiles(Device *d, const TileConv *a) {
    typedef Halo<SIDE, STRIDE> H;
    auto *const conv_tile = conv_tile_kernel<N, SIDE, STRIDE, READ>;
    const size_t copies = (H::BUFFERS * H::SIZE + STAGES * N * ROW) * sizeof(floatX), sums = Shape<N>::BYTES;
    const size_t blocks = a->B * tiles_of(&a->p) * ceil_div(a->M, N);
    LAUNCH(d, conv_tile, dim3((unsigned)blocks, a->splits), MMA_THREADS, max_size(copies, sums), *a);
    if (a->splits > 1)
        LAUNCH(d, add_splits_kernel, (unsigned)blocks * (N / 32), MMA_THREADS, Shape<NARROW_N>::BYTES, *a);
    return OK;
}

template <int SIDE, int STRIDE, Reading READ> static Err launch_tiles(Device *d, const TileConv *a) {
    if (a->M <= NARROW_N) return launch_tiles<NARROW_N, SIDE, STRIDE, READ>(d, a);
    return launch_tiles<TILE_N, SIDE, STRIDE, READ>(d, a);
}

/* a's splits are still to be set. */
static Err multiply_tiles_of(Device *d, TileConv a) {
    a.splits = a.partial ? splits_of(&a.p, a.B, a.M) : 1;
    const int form = a.p.side * 10 + a.p.stride;
    switch (a.from.how) {
    case NORMED: return form == 31 ? launch_tiles<3, 1, NORMED>(d, &a) : err("internal: a norm before such a window");
    case NORMED_F32: return form == 31 ? launch_tiles<3, 1, NORMED_F32>(d, &a) : err("internal: as above, in float");
    case AS_IT_IS: break;
    }
    switch (form) {
    case 21: return launch_tiles<2, 1, AS_IT_IS>(d, &a);
    case 31: return launch_tiles<3, 1, AS_IT_IS>(d, &a);
    case 32: return launch_tiles<3, 2, AS_IT_IS>(d, &a);
    case 41: return launch_tiles<4, 1, AS_IT_IS>(d, &a);
    case 42: return launch_tiles<4, 2, AS_IT_IS>(d, &a);
    default: return err("internal: no tiles for a window of %d with stride %d", a.p.side, a.p.stride);
    }
}

/* ---- The weights' gradient: total[m,k,c] = sum over results r of results[r,m] source[what r sees through k,c] ----
 *
 * A block makes ROWS rows of m and STEP channels c, for every pixel k of the window: a warp half of these rows and 8
 * channels. It goes through its share of the tiles, whose results are the sum's other axis. */

template <int SIDE> struct WeightShape {
    enum { MF = SIDE > 3 ? 1 : 2, ROWS = 32 * MF, PITCH = ROWS + PACK, SIZE = TILE_M * PITCH };
};

/* Begins to copy channels m0.. of a tile's results. */
template <int SIDE> static __device__ inline void copy_results(floatX *to, const TileWeights *a, Tile t, unsigned m0) {
    typedef WeightShape<SIDE> S;
    const unsigned packs = S::ROWS / PACK, k = threadIdx.x % packs * PACK, M = (unsigned)a->M;
#pragma unroll
    for (unsigned r = threadIdx.x / packs; r < TILE_M; r += MMA_THREADS / packs) {
        const unsigned y = t.y + r / TILE_W, x = t.x + r % TILE_W;
        const bool there = y < a->p.gh && x < a->p.gw && m0 + k < M;
        const unsigned from = ((t.picture * (unsigned)a->p.gh + y) * (unsigned)a->p.gw + x) * M + m0 + k;
        if (M % PACK == 0) {
            copy_async(to + r * S::PITCH + k, a->results + (there ? from : 0), there);
            continue;
        }
        Pack one_by_one = {};
        for (unsigned j = 0; j < PACK && there && m0 + k + j < M; j++) one_by_one.at[j] = a->results[from + j];
        *(Pack *)(to + r * S::PITCH + k) = one_by_one;
    }
}

/* sum += two rows of a tile's results, 32 in all, with what they see through every pixel of the window */
template <int SIDE, int STRIDE>
static __device__ inline void multiply_rows(float sum[WeightShape<SIDE>::MF][SIDE * SIDE][4], const floatX *results,
                                            const floatX *pixels) {
    typedef WeightShape<SIDE> S;
    unsigned word[S::MF][2][4];
#pragma unroll
    for (int i = 0; i < S::MF; i++)
#pragma unroll
        for (int row = 0; row < 2; row++)
            load_matrices_turned(word[i][row], results + row * TILE_W * S::PITCH + i * 16);
#pragma unroll
    for (unsigned tap = 0; tap < SIDE * SIDE; tap++) {
        const unsigned seen = Halo<SIDE, STRIDE>::seen(tap / SIDE, tap % SIDE) * ROW;
        unsigned b[4]; /* results 0..7 and 8..15 of the first row, then of the second */
        load_matrices_turned(b, pixels + seen);
#pragma unroll
        for (int i = 0; i < S::MF; i++) {
            multiply_tiles(sum[i][tap], word[i][0], b);
            multiply_tiles(sum[i][tap], word[i][1], b + 2);
        }
    }
}

/* Grid: STEP channels of the source, then ROWS rows; shares of the tiles. */
template <int SIDE, int STRIDE, Reading READ>
static __global__ void __launch_bounds__(MMA_THREADS, 2) weight_tile_kernel(TileWeights a) {
    typedef Halo<SIDE, STRIDE> H;
    typedef WeightShape<SIDE> S;
    enum { STAGE = S::SIZE + H::SIZE };
    SHARED(floatX, stages); /* (BUFFERS): results (TILE_M,PITCH), then their halo (PIXELS,ROW) */
    const unsigned chunks = (unsigned)a.p.C / STEP, c = blockIdx.x % chunks * STEP, m0 = blockIdx.x / chunks * S::ROWS,
                   warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const unsigned tiles =
        (unsigned)a.B * (((unsigned)a.p.gh + TILE_H - 1) / TILE_H) * (((unsigned)a.p.gw + TILE_W - 1) / TILE_W);
    const unsigned first = tiles * blockIdx.y / a.shares, end = tiles * (blockIdx.y + 1) / a.shares;
    const floatX *results = stages + (lane / 16 * 8 + lane % 8) * S::PITCH + warp / 4 * S::MF * 16 + lane / 8 % 2 * 8,
                 *pixels = stages + S::SIZE + (lane / 16 * H::W + lane % 16) * ROW + warp % 4 * 8;
    float sum[S::MF][SIDE * SIDE][4] = {};
    for (unsigned n = first; n < end; n++) {
        const unsigned at = (n - first) % H::BUFFERS * STAGE, other = (n + 1 - first) % H::BUFFERS * STAGE;
        const Tile t = tile_at(&a.p, n), next = tile_at(&a.p, n + 1);
        const bool more = H::BUFFERS == 2 && n + 1 < end;
        if (H::BUFFERS == 1 || n == first) {
            if (n > first) __syncthreads(); /* everybody has read the tile before */
            copy_results<SIDE>(stages + at, &a, t, m0);
            load_halo<SIDE, STRIDE, READ>(stages + at + S::SIZE, &a.p, &a.from, t, c);
            copy_commit();
        }
        copy_wait<0>();
        __syncthreads(); /* everybody's copies are there, and the other stage is free */
        if (more) copy_results<SIDE>(stages + other, &a, next, m0);
        if (more && READ == AS_IT_IS) copy_halo<SIDE, STRIDE>(stages + other + S::SIZE, &a.p, &a.from, next, c);
        copy_commit();
#pragma unroll 1 /* what it would keep for four goes is more than there are registers */
        for (unsigned y = 0; y < TILE_H; y += 2) {
            const bool piece = more && READ != AS_IT_IS && y / 2 < H::PIECES;
            unsigned pixel = NOWHERE;
            Numbers x = {};
            if (piece) x = begin_piece<SIDE, STRIDE, READ>(&a.p, &a.from, next, c, y / 2, &pixel);
            multiply_rows<SIDE, STRIDE>(sum, results + at + y * TILE_W * S::PITCH, pixels + at + y * H::W * ROW);
            if (piece) end_piece<SIDE, STRIDE>(stages + other + S::SIZE, &a.p, &a.from, next, c, y / 2, pixel, x);
        }
    }
    copy_wait<0>();
    const unsigned m = m0 + warp / 4 * S::MF * 16 + lane / 4, column = c + warp % 4 * 8 + lane % 4 * 2;
#pragma unroll
    for (unsigned i = 0; i < 2 * S::MF; i++)
#pragma unroll
        for (unsigned tap = 0; tap < SIDE * SIDE; tap++) {
            const TwoFloats two = {{sum[i / 2][tap][i % 2 * 2], sum[i / 2][tap][i % 2 * 2 + 1]}};
            const size_t row = (size_t)blockIdx.y * a.M + m + i * 8;
            if (m + i * 8 < a.M) *(TwoFloats *)(a.total + row * a.p.pitch + tap * a.p.C + column) = two;
        }
}

template <int SIDE, int STRIDE, Reading READ> static Err launch_weights(Device *d, const TileWeights *a) {
    typedef Halo<SIDE, STRIDE> H;
    auto *const weight_tile = weight_tile_kernel<SIDE, STRIDE, READ>;
    const size_t blocks = ceil_div(a->M, WeightShape<SIDE>::ROWS) * (a->p.C / STEP);
    LAUNCH(d, weight_tile, dim3((unsigned)blocks, a->shares), MMA_THREADS,
           H::BUFFERS * (WeightShape<SIDE>::SIZE + H::SIZE) * sizeof(floatX), *a);
    return OK;
}

/* a's shares are still to be set: total has room for shares_of. */
static Err multiply_weights(Device *d, TileWeights a) {
    a.shares = shares_of(&a.p, a.B, a.M);
    const int form = a.p.side * 10 + a.p.stride;
    switch (a.from.how) {
    case NORMED: return form == 31 ? launch_weights<3, 1, NORMED>(d, &a) : err("internal: a norm before such a window");
    case NORMED_F32: return form == 31 ? launch_weights<3, 1, NORMED_F32>(d, &a) : err("internal: as above, in float");
    case AS_IT_IS: break;
    }
    switch (form) {
    case 31: return launch_weights<3, 1, AS_IT_IS>(d, &a);
    case 32: return launch_weights<3, 2, AS_IT_IS>(d, &a);
    case 41: return launch_weights<4, 1, AS_IT_IS>(d, &a);
    case 42: return launch_weights<4, 2, AS_IT_IS>(d, &a);
    default: return err("internal: no weights' gradient for a window of %d with stride %d", a.p.side, a.p.stride);
    }
}
#else
static Err multiply_tiles_of(Device *d, TileConv a) {
    (void)d, (void)a;
    return err("internal: no convolution on tensor cores in float");
}
static Err multiply_weights(Device *d, TileWeights a) {
    (void)d, (void)a;
    return err("internal: no convolution on tensor cores in float");
}
#endif
