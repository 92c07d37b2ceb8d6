/* conv.cu - convolutions on a GPU: on tensor cores (conv_tiles.cu), or as matrix products of patches. */
#include "kernels/device.h"

/* ---- Patches, and weights in their order ---- */

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
 * along each axis of which kernel row k meets window rows 2-k and 3-k. PHASES: CONV_UP from the pixels that are doubled,
 * (4,M,pitch). Along each axis a result of phase 0 sees the pixel before its own through kernel row 0 and its own
 * through rows 1 and 2; one of phase 1 its own through rows 0 and 1 and the next through row 2. HALVED: the gradient of
 * CONV_DOWN's x, (4,C,pitch) with M channels in each pixel. A pixel of phase 0 was seen by the result before its own
 * through row 2, and by its own through row 0; one of phase 1 by its own alone, through row 1. */
typedef enum { FORWARD, MIRRORED, DOUBLED, PHASES, HALVED } WeightOrder;

static constexpr __host__ __device__ int side_of(WeightOrder order) { /* of the window */
    return order == DOUBLED ? 4 : order == PHASES || order == HALVED ? 2 : 3;
}
static constexpr __host__ __device__ bool rows_are_results(WeightOrder order) {
    return order == FORWARD || order == PHASES;
}
static constexpr __host__ __device__ int phases_of(WeightOrder order) {
    return order == PHASES || order == HALVED ? 4 : 1;
}

/* Does kernel row k have a part in window row j? */
static constexpr __host__ __device__ bool meets(WeightOrder order, int phase, int j, int k) {
    return order == MIRRORED  ? j == 2 - k
           : order == DOUBLED ? j == 2 - k || j == 3 - k
           : order == PHASES  ? (phase ? (j == 1) == (k == 2) : (j == 0) == (k == 0))
           : order == HALVED  ? (phase ? j == 0 && k == 1 : k == (j ? 0 : 2))
                              : j == k;
}

/* A kernel of 3x3 that a thread has: which m and c, and where in the order */
typedef struct {
    unsigned row, at, inner, rows;
    size_t kernel;
    bool there;
} Kernel;
template <WeightOrder ORDER> static __device__ inline Kernel my_kernel(unsigned M, unsigned C) {
    constexpr bool by_result = rows_are_results(ORDER);
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, inner = by_result ? C : M, row = i / inner,
                   at = i % inner;
    const Kernel k = {row,      at, inner, by_result ? M : C, by_result ? (size_t)i * 9 : ((size_t)at * C + row) * 9,
                      i < M * C};
    return k;
}

template <WeightOrder ORDER>
static __global__ void order_weights_kernel(floatX *out, const floatX *w, unsigned M, unsigned C, unsigned pitch) {
    constexpr int SIDE = side_of(ORDER);
    const Kernel mine = my_kernel<ORDER>(M, C);
    float k[9];
    if (!mine.there) return;
#pragma unroll
    for (int i = 0; i < 9; i++) k[i] = to_float(w[mine.kernel + i]);
#pragma unroll
    for (int phase = 0; phase < phases_of(ORDER); phase++) {
        floatX *to = out + (size_t)((unsigned)phase * mine.rows + mine.row) * pitch;
#pragma unroll
        for (int j = 0; j < SIDE * SIDE; j++) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < 9; i++)
                if (meets(ORDER, phase / 2, j / SIDE, i / 3) && meets(ORDER, phase % 2, j % SIDE, i % 3)) sum += k[i];
            to[(unsigned)j * mine.inner + mine.at] = to_floatX(sum);
        }
        for (unsigned i = SIDE * SIDE * mine.inner + mine.at; i < pitch; i += mine.inner) to[i] = to_floatX(0);
    }
}

template <WeightOrder ORDER>
static Err order_weights(Device *d, floatX *out, const floatX *w, const Conv *c, size_t pitch) {
    LAUNCH(d, order_weights_kernel<ORDER>, blocks_for(c->M * c->C, CELL_THREADS), CELL_THREADS, 0, out, w,
           (unsigned)c->M, (unsigned)c->C, (unsigned)pitch);
    return OK;
}

/* dw (M,C,3,3) += totals (shares,rows,pitch), which are in such an order, one after the other. */
template <WeightOrder ORDER>
static __global__ void add_ordered_kernel(float *dw, const float *total, unsigned M, unsigned C, unsigned pitch,
                                          unsigned shares) {
    constexpr int SIDE = side_of(ORDER);
    const Kernel mine = my_kernel<ORDER>(M, C);
    float k[9] = {};
    if (!mine.there) return;
    for (unsigned s = 0; s < shares; s++) {
        const float *from = total + ((size_t)s * mine.rows + mine.row) * pitch + mine.at;
#pragma unroll
        for (int j = 0; j < SIDE * SIDE; j++) {
            const float g = from[(unsigned)j * mine.inner];
#pragma unroll
            for (int i = 0; i < 9; i++)
                if (meets(ORDER, 0, j / SIDE, i / 3) && meets(ORDER, 0, j % SIDE, i % 3)) k[i] += g;
        }
    }
    for (int i = 0; i < 9; i++) dw[mine.kernel + i] += k[i];
}

template <WeightOrder ORDER>
static Err add_ordered(Device *d, float *dw, const float *total, const Conv *c, size_t pitch, size_t shares = 1) {
    LAUNCH(d, add_ordered_kernel<ORDER>, blocks_for(c->M * c->C, CELL_THREADS), CELL_THREADS, 0, dw, total,
           (unsigned)c->M, (unsigned)c->C, (unsigned)pitch, (unsigned)shares);
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

/* Of a dx that tensor cores make: its pixels are four phases of results (CONV_DOWN), or it is a convolution of dy. */
static Window input_window(const Conv *c) {
    if (c->kind == CONV_DOWN) return phase_window(c->M, c->h / 2, c->w / 2, c->h / 2, c->w / 2, 0);
    return backward_window(c);
}

/* Results of c as four phases of the pixels that will be doubled */
static int in_phases(const Conv *c) {
    const Window p = forward_window(c);
    return c->kind == CONV_UP && can_multiply_directly(&p);
}
static Window up_window(const Conv *c, int phase) {
    return phase_window(c->C, c->h, c->w, c->h, c->w, phase);
}
static Window direct_window(const Conv *c) { /* of y, on tensor cores */
    return in_phases(c) ? up_window(c, 0) : forward_window(c);
}

/* What the weights' gradient is summed over: the rows of results are dy's, and what they see is x. CONV_UP: rows of x see
 * dy; so they do for CONV3 where dy has fewer channels to be gathered. */
static int rows_of_x(const Conv *c) {
    return c->kind == CONV_UP || (c->kind == CONV3 && c->M < c->C && c->C % STEP);
}
static Window weight_window(const Conv *c) {
    return rows_of_x(c) ? backward_window(c) : forward_window(c);
}

static void patches_need(ConvMemory *m, const Window *p, size_t B) {
    m->column_size = max_size(m->column_size, columns_for(p, B * p->gh * p->gw));
}
static void input_needs(ConvMemory *m, const Conv *c) {
    const Window p = input_window(c), f = forward_window(c);
    if (can_multiply_directly(&p)) {
        m->weight_size = max_size(m->weight_size, (c->kind == CONV_DOWN ? 4 : 1) * c->C * p.pitch);
        m->partial_size = max_size(m->partial_size, split_floats(&p, c->C));
    } else if (c->kind == CONV_DOWN) {
        m->weight_size = max_size(m->weight_size, c->M * f.pitch), patches_need(m, &f, c->B);
    } else
        m->weight_size = max_size(m->weight_size, c->C * p.pitch), patches_need(m, &p, c->B);
}
static void weights_need(ConvMemory *m, const Conv *c) {
    const Window p = weight_window(c);
    const size_t rows = rows_of_x(c) ? c->C : c->M, shares = can_multiply_directly(&p) ? shares_of(&p, c->B, rows) : 1;
    m->total_size = max_size(m->total_size, shares * rows * p.pitch);
    if (!can_multiply_directly(&p)) patches_need(m, &p, c->B);
}

/* Raises what m must hold so that it is enough for c. train: 0 no, 1 yes, 2 of dx alone, which only CONV3 has. */
static void conv_needs_cuda(ConvMemory *m, const Conv *c, int train) {
    const Window f = direct_window(c);
    if (train == 1) m->partial_size = max_size(m->partial_size, channel_slices(1, rows_of(c), c->M));
    if (c->kind == CONV1) return;
    if (train) input_needs(m, c);
    if (train == 1) weights_need(m, c);
    if (train) return;
    if (can_multiply_directly(&f))
        m->partial_size = max_size(m->partial_size, split_floats(&f, c->M));
    else
        patches_need(m, &f, c->B);
}

static size_t ordered_weight_size(const Conv *c) { /* elements that conv_order_weights_cuda writes */
    return c->kind == CONV1 ? 0 : (in_phases(c) ? 4 : 1) * c->M * direct_window(c).pitch;
}

/* For conv_forward_cuda, once after the weights w (M,C,3,3) have changed. A 1x1 kernel is used as it is. */
static Err conv_order_weights_cuda(Device *d, floatX *out, const floatX *w, const Conv *c) {
    const size_t pitch = direct_window(c).pitch;
    return in_phases(c) ? order_weights<PHASES>(d, out, w, c, pitch) : order_weights<FORWARD>(d, out, w, c, pitch);
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

/* A convolution of B pictures on tensor cores, whose results lie one after the other. partial: of split_floats */
static TileConv tile_conv(floatX *y, const Window *p, size_t B, size_t M, Source from, const floatX *w,
                          float *partial) {
    TileConv a;
    memset(&a, 0, sizeof a);
    a.p = *p, a.B = B, a.M = M, a.from = from, a.w = w, a.y = y, a.partial = partial;
    a.to = Places{1, 0, 0, (unsigned)p->gh, (unsigned)p->gw};
    return a;
}

/* The same in phases: every second row and column of pictures (h,w). C: channels of the source, side its sides. */
static Err multiply_phases(Device *d, TileConv a, size_t h, size_t w) {
    for (int phase = 0; phase < 4; phase++) {
        const unsigned y = (unsigned)phase / 2, x = (unsigned)phase % 2;
        TileConv part = a;
        part.p = phase_window(a.p.C, ceil_div(h - y, 2), ceil_div(w - x, 2), a.p.h, a.p.w, phase);
        part.w = a.w + (size_t)phase * a.M * a.p.pitch;
        part.to = Places{2, y, x, (unsigned)h, (unsigned)w};
        part.moments.first = (unsigned)(phase * tiles_of(&a.p));
        if (part.p.gh && part.p.gw) TRY(multiply_tiles_of(d, part));
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
static Err conv_forward_cuda(Device *d, floatX *y, const Conv *c, Source x, const floatX *w, const floatX *bias,
                             const floatX *add, const ConvMemory *memory, Wide wide, Moments moments) {
    const Window p = direct_window(c);
    const size_t rows = rows_of(c), K = c->kind == CONV1 ? c->C : p.pitch;
    if (c->kind != CONV1 && can_multiply_directly(&p)) {
        TileConv a = tile_conv(y, &p, c->B, c->M, x, w, memory->partial);
        a.add = add, a.wide = wide, a.moments = moments;
        return in_phases(c) ? multiply_phases(d, a, conv_height(c), conv_width(c)) : multiply_tiles_of(d, a);
    }
    const size_t tile = c->kind == CONV1 ? rows : tile_rows(memory->column_size, p.pitch);
    if (!wide.y) wide = not_wide;
    for (size_t r = 0; r < rows; r += tile) {
        const size_t n = min_size(tile, rows - r);
        if (c->kind != CONV1) TRY(gather(d, memory->columns, x.x, &p, r, n));
        TRY(conv_rows(d, y, c, c->kind == CONV1 ? x.x : memory->columns, w, r, n, K, bias, add, wide));
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

/* dw += from patches: what each row of `rows` (n,channels) sees of what */
static Err weights_from_patches(Device *d, float *total, const Window *p, const floatX *rows, size_t n, size_t channels,
                                const floatX *seen, const ConvMemory *memory) {
    const size_t tile = tile_rows(memory->column_size, p->pitch);
    for (size_t r = 0; r < n; r += tile) {
        const size_t part = min_size(tile, n - r);
        TRY(gather(d, memory->columns, seen, p, r, part));
        const Matmul sums = turned_times(total, rows + r * channels, memory->columns, channels, p->pitch, part, r > 0);
        TRY(matmul(d, &sums));
    }
    return OK;
}

/* dw (M,C,3,3) += */
static Err conv_weights_cuda(Device *d, float *dw, const Conv *c, const floatX *dy, Source x,
                             const ConvMemory *memory) {
    const Window p = weight_window(c);
    const floatX *rows = rows_of_x(c) ? x.x : dy;
    const Source seen = rows_of_x(c) ? plain_source(dy) : x;
    const size_t channels = rows_of_x(c) ? c->C : c->M, n = c->B * p.gh * p.gw;
    size_t shares = 1;
    if (can_multiply_directly(&p)) {
        TRY(multiply_weights(d, TileWeights{p, c->B, channels, seen, rows, memory->totals, 0}));
        shares = shares_of(&p, c->B, channels);
    } else
        TRY(weights_from_patches(d, memory->totals, &p, rows, n, channels, seen.x, memory));
    if (c->kind == CONV_UP) return add_ordered<DOUBLED>(d, dw, memory->totals, c, p.pitch, shares);
    return rows_of_x(c) ? add_ordered<MIRRORED>(d, dw, memory->totals, c, p.pitch, shares)
                        : add_ordered<FORWARD>(d, dw, memory->totals, c, p.pitch, shares);
}

/* dx of CONV_DOWN from the patches' gradient, with the results above and to the left of a tile computed once more. */
static Err fold_patches(Device *d, floatX *dx, const Conv *c, const floatX *dy, const floatX *w, int accumulate,
                        const ConvMemory *memory) {
    const Window p = forward_window(c);
    const size_t rows = rows_of(c), room = tile_rows(memory->column_size, p.pitch);
    const size_t above = round_up(p.gw + 1, TILE_ROWS);
    TRY(order_weights<FORWARD>(d, memory->weights, w, c, p.pitch));
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

/* dx overwritten, or added to: a convolution of dy with the weights mirrored, or CONV_DOWN's in four phases. */
static Err conv_input_cuda(Device *d, floatX *dx, const Conv *c, const floatX *dy, const floatX *w,
                           const ConvMemory *memory, int accumulate) {
    const Window p = input_window(c);
    TileConv a = tile_conv(dx, &p, c->B, c->C, plain_source(dy), memory->weights, memory->partial);
    a.add = accumulate ? dx : NULL;
    if (c->kind == CONV_DOWN) {
        if (!can_multiply_directly(&p)) return fold_patches(d, dx, c, dy, w, accumulate, memory);
        TRY(order_weights<HALVED>(d, memory->weights, w, c, p.pitch));
        return multiply_phases(d, a, c->h, c->w);
    }
    TRY(c->kind == CONV_UP ? order_weights<DOUBLED>(d, memory->weights, w, c, p.pitch)
                           : order_weights<MIRRORED>(d, memory->weights, w, c, p.pitch));
    if (can_multiply_directly(&p)) return multiply_tiles_of(d, a);
    const size_t rows = c->B * c->h * c->w, tile = tile_rows(memory->column_size, p.pitch);
    for (size_t r = 0; r < rows; r += tile) {
        const size_t n = min_size(tile, rows - r);
        floatX *part = dx + r * c->C;
        TRY(gather(d, memory->columns, dy, &p, r, n));
        const Matmul product =
            rows_times(part, memory->columns, memory->weights, n, c->C, p.pitch, p.pitch, 1, accumulate ? part : NULL);
        TRY(matmul(d, &product));
    }
    return OK;
}

static Err add_channel_sums(Device *d, float *sum, const floatX *x, size_t rows, size_t C, float *partial);

/* dx overwritten, or added to if `accumulate`; NULL: not wanted. dw (M,C,3,3), db (M) +=. w (M,C,3,3) as it is in the
 * table. */
static Err conv_backward_cuda(Device *d, floatX *dx, float *dw, float *db, const Conv *c, const floatX *dy, Source x,
                              const floatX *w, int accumulate, const ConvMemory *memory) {
    TRY(add_channel_sums(d, db, dy, rows_of(c), c->M, memory->partial));
    if (c->kind != CONV1) {
        TRY(conv_weights_cuda(d, dw, c, dy, x, memory));
        return dx ? conv_input_cuda(d, dx, c, dy, w, memory, accumulate) : OK;
    }
    Matmul product = turned_times(dw, dy, x.x, c->M, c->C, rows_of(c), 1);
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

/* Two sums of a channel c over a slice; there: the thread has one */
typedef struct {
    size_t c;
    float a, b;
    bool there;
} ChannelSums;

template <int WIDTH> static __device__ inline ChannelSums add_lanes(const float *a, const float *b, size_t C) {
    SHARED(float, sums); /* (CELL_LANES, PACK_LANES*WIDTH) */
    ChannelSums s = {(size_t)blockIdx.x * PACK_LANES * WIDTH + threadIdx.x, 0, 0, false};
    s.there = threadIdx.x < PACK_LANES * WIDTH && s.c < C;
    for (int k = 0; k < 2; k++) {
        __syncthreads();
        for (int j = 0; j < WIDTH; j++) sums[threadIdx.x * WIDTH + j] = k ? b[j] : a[j];
        __syncthreads();
        float sum = 0;
        for (int i = 0; i < CELL_LANES && s.there; i++) sum += sums[i * PACK_LANES * WIDTH + (int)threadIdx.x];
        *(k ? &s.b : &s.a) = sum;
    }
    return s;
}

template <int WIDTH>
static __device__ inline void store_channel_sums(float *partial, const float *a, const float *b, size_t C) {
    const ChannelSums s = add_lanes<WIDTH>(a, b, C);
    float *to = partial + ((size_t)blockIdx.z * gridDim.y + blockIdx.y) * 2 * C + s.c;
    if (s.there) to[0] = s.a, to[C] = s.b;
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

/* x as c reads it: as it is, or through a norm */
static Source source_of(const Compute *on, const Conv *c, const real *x) {
    Source s = plain_source((const floatX *)(const void *)x);
    if (!c->norm) return s;
    s.how = c->norm_f32 ? NORMED_F32 : NORMED, s.swish = c->norm_swish;
    s.f32 = compute_f32_copy(on, x, c->B * c->C * c->h * c->w);
    s.channel = (const float *)c->norm + c->B * 2 * NORM_GROUPS;
    return s;
}

static int conv_norms_gpu(const Conv *c) {
    const Window p = forward_window(c);
    return c->kind == CONV3 && can_multiply_directly(&p);
}

static size_t conv_parts_gpu(const Conv *c) {
    const Window p = direct_window(c);
    if (c->kind == CONV1 || !can_multiply_directly(&p) || c->M % PACK) return 0;
    return tiles_of(&p) * (in_phases(c) ? 4 : 1);
}

static void conv_forward_gpu(const Compute *on, real *y, const real *x, const real *w, const real *bias,
                             const real *add, const Conv *c) {
    const ConvMemory m = conv_memory(on, c, 0);
    const size_t n = rows_of(c) * c->M;
    const Wide wide = {c->y_f32 ? compute_f32_copy(on, y, n) : NULL,
                       add && c->add_f32 ? compute_f32_copy(on, add, n) : NULL, bias};
    const Moments moments = {(float *)c->moments, 0, (unsigned)conv_parts_gpu(c)};
    const floatX *weight = c->prepared ? (const floatX *)c->prepared : operand_of(on->device, w);
    keep_failure(on->device, conv_forward_cuda(on->device, c->y_f32_only ? NULL : (floatX *)(void *)y, c,
                                               source_of(on, c, x), weight, operand_of(on->device, bias),
                                               (const floatX *)(void *)add, &m, wide, moments));
}

static void conv_backward_gpu(const Compute *on, real *dx, real *dw, real *db, const real *dy, const real *x,
                              const real *w, int accumulate, const Conv *c) {
    const ConvMemory m = conv_memory(on, c, dw ? 1 : 2);
    const floatX *weight = operand_of(on->device, w), *from = (const floatX *)(void *)dy;
    floatX *to = (floatX *)(void *)dx;
    keep_failure(on->device,
                 dw ? conv_backward_cuda(on->device, to, dw, db, c, from, source_of(on, c, x), weight, accumulate, &m)
                    : conv_input_cuda(on->device, to, c, from, weight, &m, accumulate));
}
