/* discriminator.cu - the same as discriminator.c on a GPU. */
#include "kernels/discriminator.h"

/* ---- The twin ----
 *
 * On the GPU pictures lie as (B,h,w,C), as everywhere there: a convolution is columns (B*h*w,C*16) times the weights in
 * their order (conv.c), and what batch norm sums over is a column. Activations and their gradients are floatX; sums,
 * the norms' means and deviations and everything in the table are float. Pictures, their gradients and logits cross
 * over as the host has them: a step of training copies the batch a few times each way, little beside what it
 * computes. */

typedef struct {
    floatX *y, *a, *kept; /* (n,M), as in DiscLayer; bias and leaky ReLU without a norm are done in place */
    floatX *ordered;      /* (M,pitch) weights in the order of patches */
    float *mean, *rstd;   /* (M) of a norm */
} DiscLayerTwin;

struct DiscTwin {
    Device *d;
    DeviceArena arena; /* all of the following */
    DiscLayerTwin layer[MAX_LAYERS + 2];
    floatX *images; /* (B,H,W,C) of the last forward */
    floatX *g[2];
    float *planes; /* pictures or logits in the host's order, on their way */
    float *lines;  /* (2,M) of a norm's backward */
    ConvMemory conv;
    uint64_t changes; /* of the parameters (Device.changes) when the weights were put in order */
};

/* ---- The twin: convolutions of 4x4 cells ---- */

static Window disc_window(const DiscLayer *l) {
    return make_window(l->C, l->h, l->w, l->H, l->W, KERNEL, (int)l->stride, 1, 0);
}

/* out (M,pitch) = w (M,C,4,4) cell by cell, in each C channels; zeros behind them */
static __global__ void order_taps_kernel(floatX *out, const floatX *w, size_t M, size_t C, size_t pitch) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, m = i / pitch, tap = i % pitch / C,
                 c = i % pitch % C;
    if (m < M) out[i] = tap < TAPS ? w[(m * C + c) * TAPS + tap] : to_floatX(0);
}

static Err order_taps(Device *d, floatX *out, const floatX *w, size_t M, size_t C, size_t pitch) {
    LAUNCH(d, order_taps_kernel, blocks_for(M * pitch, CELL_THREADS), CELL_THREADS, 0, out, w, M, C, pitch);
    return OK;
}

/* dw (M,C,4,4) += total (M,pitch), which is in that order */
static __global__ void add_taps_kernel(float *dw, const float *total, size_t M, size_t C, size_t pitch) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, m = i / TAPS / C, c = i / TAPS % C, tap = i % TAPS;
    if (m < M) dw[i] += total[m * pitch + tap * C + c];
}

/* y (rows,M) = patches of x times w (M,pitch), + bias unless NULL */
static Err conv4_forward_cuda(Device *d, floatX *y, const Window *p, const floatX *x, const floatX *w,
                              const floatX *bias, size_t rows, size_t M, const ConvMemory *memory) {
    if (can_multiply_directly(p)) return multiply_directly(d, y, p, x, w, rows, M, bias, NULL, -1);
    const size_t tile = tile_rows(memory->column_size, p->pitch);
    for (size_t r = 0; r < rows; r += tile) {
        const size_t n = min_size(tile, rows - r);
        TRY(gather(d, memory->columns, x, p, r, n));
        Matmul product = rows_times(y + r * M, memory->columns, w, n, M, p->pitch, p->pitch, 1, NULL);
        product.bias = bias;
        TRY(matmul(d, &product));
    }
    return OK;
}

/* dw (M,C,4,4) += from dy (rows,M) and x */
static Err conv4_weights_cuda(Device *d, float *dw, const Window *p, const floatX *dy, const floatX *x, size_t rows,
                              size_t M, const ConvMemory *memory) {
    const size_t tile = tile_rows(memory->column_size, p->pitch);
    for (size_t r = 0; r < rows; r += tile) {
        const size_t n = min_size(tile, rows - r);
        TRY(gather(d, memory->columns, x, p, r, n));
        const Matmul sums = turned_times(memory->totals, dy + r * M, memory->columns, M, p->pitch, n, r > 0);
        TRY(matmul(d, &sums));
    }
    LAUNCH(d, add_taps_kernel, blocks_for(M * p->C * TAPS, CELL_THREADS), CELL_THREADS, 0, dw, memory->totals, M, p->C,
           p->pitch);
    return OK;
}

/* dx (..,h,w,C), n elements from picture `first` on = what all results that saw a cell say of it: sums of dcolumns,
 * gradients of their patches, which begin with that of result `begin`. */
static __global__ void fold_taps_kernel(floatX *dx, const floatX *dcolumns, Window p, size_t begin, unsigned first,
                                        unsigned n) {
    const unsigned C = (unsigned)p.C, w = (unsigned)p.w, h = (unsigned)p.h, stride = (unsigned)p.stride;
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, c = i % C, x = i / C % w, y = i / C / w % h;
    const size_t results = (first + i / C / w / h) * p.gh * p.gw - begin;
    if (i >= n) return;
    float sum = 0;
    for (unsigned k = 0; k < TAPS; k++) {
        const unsigned above = y + 1 - k / KERNEL,
                       left = x + 1 - k % KERNEL; /* below 0: wraps round, too large as well */
        if (above % stride || left % stride || above / stride >= p.gh || left / stride >= p.gw) continue;
        sum += to_float(dcolumns[(results + above / stride * p.gw + left / stride) * p.pitch + k * C + c]);
    }
    dx[(size_t)first * h * w * C + i] = to_floatX(sum);
}

/* dx of B pictures, as many at a time as there is room for; a matrix begins at an aligned row, at or before theirs. */
static Err conv4_input_cuda(Device *d, floatX *dx, const Window *p, const floatX *dy, const floatX *w, size_t B,
                            size_t M, const ConvMemory *memory) {
    const size_t cells = p->gh * p->gw, room = memory->column_size / p->pitch, elements = p->h * p->w * p->C;
    const size_t at_once = max_size((room - TILE_ROWS) / cells, 1);
    for (size_t b = 0; b < B; b += at_once) {
        const size_t n = min_size(at_once, B - b), begin = b * cells / TILE_ROWS * TILE_ROWS;
        const Matmul product =
            rows_times(memory->columns, dy + begin * M, w, (b + n) * cells - begin, p->pitch, M, p->pitch, 0, NULL);
        TRY(matmul(d, &product));
        LAUNCH(d, fold_taps_kernel, blocks_for(n * elements, CELL_THREADS), CELL_THREADS, 0, dx, memory->columns, *p,
               begin, (unsigned)b, (unsigned)(n * elements));
    }
    return OK;
}

static void conv4_needs_cuda(ConvMemory *m, const Window *p, size_t B, size_t M) {
    const size_t cells = p->gh * p->gw, pictures = (round_up(cells, TILE_ROWS) + TILE_ROWS) * p->pitch;
    m->column_size = max_size(m->column_size, max_size(columns_for(p, B * cells), pictures));
    m->total_size = max_size(m->total_size, M * p->pitch);
    m->partial_size = max_size(m->partial_size, channel_slices(1, B * cells, M));
}

/* ---- The twin: batch norm and leaky ReLU. Kernels take WIDTH neighbouring channels at a time: PACK where a cell has
 * whole
 *      packs, else 1. ---- */

template <int WIDTH> struct alignas(WIDTH * sizeof(floatX)) Channels { floatX at[WIDTH]; };
template <int WIDTH> static __device__ inline Channels<WIDTH> channels_at(const floatX *x, size_t i) {
    return *(const Channels<WIDTH> *)(x + i);
}

/* A number for each of WIDTH channels, four at a time where they are a pack: x is then a multiple of 16 bytes. */
template <int WIDTH> struct ChannelNumbers { float at[WIDTH]; };
template <int WIDTH> static __device__ inline ChannelNumbers<WIDTH> numbers_of(const float *x) {
    ChannelNumbers<WIDTH> n;
    if constexpr (WIDTH == 1) {
        n.at[0] = x[0];
    } else {
#pragma unroll
        for (int k = 0; k < WIDTH; k += 4) {
            const Floats four = *(const Floats *)(x + k);
            for (int j = 0; j < 4; j++) n.at[k + j] = four.at[j];
        }
    }
    return n;
}

typedef struct {
    size_t n, C; /* y (n,C) */
    float *mean, *rstd;
    const float *gamma, *beta;
    float *running_mean, *running_var, *tracked; /* the buffers; NULL: they do not follow */
} BatchNorm;

/* Sums of y - pivot and of its square, where the pivot is the channel's first number, as in group norm. */
template <int WIDTH> static __global__ void batch_sums_kernel(float *partial, const floatX *y, size_t n, size_t C) {
    const Share s = share_of(C, n, WIDTH);
    float sum[WIDTH] = {}, square[WIDTH] = {}, pivot[WIDTH] = {};
    for (int j = 0; j < WIDTH && s.end; j++) pivot[j] = to_float(y[s.c + j]);
    for (size_t r = s.first; r < s.end; r += CELL_LANES) {
        const Channels<WIDTH> p = channels_at<WIDTH>(y, r * C + s.c);
        for (int j = 0; j < WIDTH; j++) {
            const float gap = to_float(p.at[j]) - pivot[j];
            sum[j] += gap, square[j] += gap * gap;
        }
    }
    store_channel_sums<WIDTH>(partial, sum, square, C);
}

static __device__ inline float moved(float from, double to) {
    return (float)((1 - MOMENTUM) * (double)from + MOMENTUM * to);
}

/* A warp per channel */
static __global__ void batch_stats_kernel(BatchNorm b, const float *partial, const floatX *y, size_t slices) {
    const size_t c = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    double sum = 0, square = 0;
    if (c >= b.C) return;
    for (size_t i = lane; i < slices; i += WARP)
        sum += (double)partial[2 * i * b.C + c], square += (double)partial[(2 * i + 1) * b.C + c];
    const double n = (double)b.n, gap = warp_sum(sum) / n, rest = warp_sum(square) / n - gap * gap;
    const double mean = (double)to_float(y[c]) + gap, variance = rest > 0 ? rest : 0;
    if (lane) return;
    b.mean[c] = (float)mean, b.rstd[c] = (float)(1 / sqrt(variance + BATCH_EPS));
    if (!b.running_mean) return;
    b.running_mean[c] = moved(b.running_mean[c], mean);
    b.running_var[c] = moved(b.running_var[c], variance * n / (n - 1));
    if (c == 0) *b.tracked += 1;
}

/* a = leaky((y - mean) rstd gamma + beta), or leaky(y) where there is no norm; total: numbers */
template <int WIDTH> static __global__ void activate_kernel(floatX *a, const floatX *y, BatchNorm b, unsigned total) {
    const unsigned i = (blockIdx.x * blockDim.x + threadIdx.x) * WIDTH, first = i % (unsigned)b.C;
    if (i >= total) return;
    Channels<WIDTH> p = channels_at<WIDTH>(y, i);
    ChannelNumbers<WIDTH> mean = {}, rstd = {}, gamma = {}, beta = {};
    if (b.mean) {
        mean = numbers_of<WIDTH>(b.mean + first), rstd = numbers_of<WIDTH>(b.rstd + first);
        gamma = numbers_of<WIDTH>(b.gamma + first), beta = numbers_of<WIDTH>(b.beta + first);
    }
    for (unsigned j = 0; j < WIDTH; j++) {
        float t = to_float(p.at[j]);
        if (b.mean) t = (t - mean.at[j]) * (rstd.at[j] * gamma.at[j]) + beta.at[j];
        p.at[j] = to_floatX(t > 0 ? t : SLOPE * t);
    }
    *(Channels<WIDTH> *)(a + i) = p;
}

template <int WIDTH>
static Err activate_cuda(Device *d, floatX *a, const floatX *y, const BatchNorm *b, float *partial) {
    const dim3 grid = slice_grid(b->C, b->n, 1, WIDTH);
    if (b->mean) {
        LAUNCH(d, batch_sums_kernel<WIDTH>, grid, CELL_THREADS, CELL_THREADS * WIDTH * sizeof(float), partial, y, b->n,
               b->C);
        LAUNCH(d, batch_stats_kernel, blocks_for(b->C, CELL_THREADS / WARP), CELL_THREADS, 0, *b, partial, y,
               (size_t)grid.y);
    }
    LAUNCH(d, activate_kernel<WIDTH>, blocks_for(b->n * b->C, CELL_THREADS * WIDTH), CELL_THREADS, 0, a, y, *b,
           (unsigned)(b->n * b->C));
    return OK;
}

/* g (n,C) = (g + step sign(a - kept)) leaky'(a); kept is not read where step is 0 */
template <int WIDTH>
static __global__ void leaky_gradient_kernel(floatX *g, const floatX *a, const floatX *kept, float step, size_t total) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (i >= total) return;
    Channels<WIDTH> p = channels_at<WIDTH>(g, i), was = {};
    const Channels<WIDTH> now = channels_at<WIDTH>(a, i);
    if (step != 0) was = channels_at<WIDTH>(kept, i);
    for (int j = 0; j < WIDTH; j++) {
        const float v = to_float(now.at[j]), gap = step != 0 ? v - to_float(was.at[j]) : 0;
        const float t = to_float(p.at[j]) + step * (float)((gap > 0) - (gap < 0));
        p.at[j] = to_floatX(v > 0 ? t : SLOPE * t);
    }
    *(Channels<WIDTH> *)(g + i) = p;
}

/* Sums of g and of g times the normalised y. */
template <int WIDTH>
static __global__ void batch_gradient_sums_kernel(float *partial, const floatX *g, const floatX *y, BatchNorm b) {
    const Share s = share_of(b.C, b.n, WIDTH);
    float sum[WIDTH] = {}, along[WIDTH] = {}, mean[WIDTH] = {}, rstd[WIDTH] = {};
    for (int j = 0; j < WIDTH && s.end; j++) mean[j] = b.mean[s.c + j], rstd[j] = b.rstd[s.c + j];
    for (size_t r = s.first; r < s.end; r += CELL_LANES) {
        const Channels<WIDTH> p = channels_at<WIDTH>(g, r * b.C + s.c), v = channels_at<WIDTH>(y, r * b.C + s.c);
        for (int j = 0; j < WIDTH; j++) {
            const float t = to_float(p.at[j]);
            sum[j] += t, along[j] += t * (to_float(v.at[j]) - mean[j]) * rstd[j];
        }
    }
    store_channel_sums<WIDTH>(partial, sum, along, b.C);
}

/* lines (2,C) = level, tilt: g = rstd gamma (g - level - tilt (y - mean)); dgamma, dbeta (C) += unless NULL */
static __global__ void batch_lines_kernel(float *lines, float *dgamma, float *dbeta, const float *partial, BatchNorm b,
                                          size_t slices) {
    const size_t c = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    double sum = 0, along = 0;
    if (c >= b.C) return;
    for (size_t i = lane; i < slices; i += WARP)
        sum += (double)partial[2 * i * b.C + c], along += (double)partial[(2 * i + 1) * b.C + c];
    sum = warp_sum(sum), along = warp_sum(along);
    if (lane) return;
    lines[c] = (float)(sum / (double)b.n), lines[b.C + c] = (float)((double)b.rstd[c] * along / (double)b.n);
    if (dgamma) dgamma[c] += (float)along, dbeta[c] += (float)sum;
}

template <int WIDTH>
static __global__ void batch_gradient_kernel(floatX *g, const floatX *y, BatchNorm b, const float *lines) {
    const unsigned i = (blockIdx.x * blockDim.x + threadIdx.x) * WIDTH, first = i % (unsigned)b.C;
    if (i >= b.n * b.C) return;
    Channels<WIDTH> p = channels_at<WIDTH>(g, i);
    const Channels<WIDTH> v = channels_at<WIDTH>(y, i);
    const ChannelNumbers<WIDTH> mean = numbers_of<WIDTH>(b.mean + first), rstd = numbers_of<WIDTH>(b.rstd + first),
                                gamma = numbers_of<WIDTH>(b.gamma + first), level = numbers_of<WIDTH>(lines + first),
                                tilt = numbers_of<WIDTH>(lines + b.C + first);
    for (unsigned j = 0; j < WIDTH; j++) {
        const float t = to_float(p.at[j]) - level.at[j] - tilt.at[j] * (to_float(v.at[j]) - mean.at[j]);
        p.at[j] = to_floatX(rstd.at[j] * gamma.at[j] * t);
    }
    *(Channels<WIDTH> *)(g + i) = p;
}

/* From the gradient of a leaky ReLU's result, to which feature matching adds step sign(a - kept), to that of y, in
 * place. */
template <int WIDTH>
static Err activate_backward_cuda(Device *d, floatX *g, const floatX *a, const floatX *kept, float step,
                                  const floatX *y, const BatchNorm *b, float *dgamma, float *dbeta, float *lines,
                                  float *partial) {
    const size_t total = b->n * b->C;
    const unsigned blocks = blocks_for(total, CELL_THREADS * WIDTH);
    const dim3 grid = slice_grid(b->C, b->n, 1, WIDTH);
    LAUNCH(d, leaky_gradient_kernel<WIDTH>, blocks, CELL_THREADS, 0, g, a, kept, step, total);
    if (!b->mean) return OK;
    LAUNCH(d, batch_gradient_sums_kernel<WIDTH>, grid, CELL_THREADS, CELL_THREADS * WIDTH * sizeof(float), partial, g,
           y, *b);
    LAUNCH(d, batch_lines_kernel, blocks_for(b->C, CELL_THREADS / WARP), CELL_THREADS, 0, lines, dgamma, dbeta, partial,
           *b, (size_t)grid.y);
    LAUNCH(d, batch_gradient_kernel<WIDTH>, blocks, CELL_THREADS, 0, g, y, *b, lines);
    return OK;
}

/* sums (blocks) of |a - kept| */
static __global__ void gap_kernel(double *sums, const floatX *a, const floatX *kept, size_t n) {
    double sum = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        sum += (double)fabsf(to_float(a[i]) - to_float(kept[i]));
    store_block_sum(sums, sum);
}

/* ---- The twin: the walk ---- */

static BatchNorm norm_of_layer(const Discriminator *d, size_t i, int update) {
    const DiscLayer *l = &d->layer[i];
    const DiscLayerTwin *t = &d->twin->layer[i];
    BatchNorm b;
    memset(&b, 0, sizeof b);
    b.n = l->n, b.C = l->M;
    if (l->norm == NONE) return b;
    const DeviceRow *row = &d->twin->d->row[l->norm];
    b.mean = t->mean, b.rstd = t->rstd, b.gamma = row[0].value, b.beta = row[1].value;
    if (update) b.running_mean = row[2].value, b.running_var = row[3].value, b.tracked = row[4].value;
    return b;
}

static Err order_all_taps(Discriminator *d) {
    DiscTwin *t = d->twin;
    TRY(earlier_failure(t->d));
    if (!t->d->row) return err("discriminator: its parameters are not on the GPU yet");
    if (t->changes == t->d->changes) return OK;
    for (size_t i = 0; i < d->n_layers; i++) {
        const DiscLayer *l = &d->layer[i];
        TRY(order_taps(t->d, t->layer[i].ordered, t->d->row[l->weight].weight, l->M, l->C, disc_window(l).pitch));
    }
    t->changes = t->d->changes;
    return OK;
}

/* Between (B,C,cells) of the host and (B,cells,C) */
static Err planes_to_device(DiscTwin *t, floatX *to, const real *from, size_t B, size_t C, size_t cells) {
    TRY(to_device(t->d, t->planes, from, B * C * cells * sizeof *from));
    LAUNCH(t->d, from_planes_kernel, blocks_for(B * C * cells, CELL_THREADS), CELL_THREADS, 0, to, t->planes, B, C,
           cells);
    return OK;
}
static Err planes_to_host(DiscTwin *t, real *to, const floatX *from, size_t B, size_t C, size_t cells) {
    LAUNCH(t->d, to_planes_kernel, blocks_for(B * C * cells, CELL_THREADS), CELL_THREADS, 0, t->planes, from, B, C,
           cells);
    return to_host(t->d, to, t->planes, B * C * cells * sizeof *to);
}

static Err disc_forward_cuda(Discriminator *d, const real *images, int update, real *logits) {
    DiscTwin *t = d->twin;
    const size_t last = d->n_layers - 1;
    TRY(order_all_taps(d));
    TRY(planes_to_device(t, t->images, images, d->B, d->layer[0].C, d->layer[0].H * d->layer[0].W));
    for (size_t i = 0; i <= last; i++) {
        const DiscLayer *l = &d->layer[i];
        const DiscLayerTwin *at = &t->layer[i];
        const Window p = disc_window(l);
        const BatchNorm b = norm_of_layer(d, i, update);
        TRY(conv4_forward_cuda(t->d, at->y, &p, i ? at[-1].a : t->images, at->ordered,
                               l->bias == NONE ? NULL : t->d->row[l->bias].weight, l->n, l->M, &t->conv));
        if (l->leaky)
            TRY(l->M % PACK ? activate_cuda<1>(t->d, at->a, at->y, &b, t->conv.partial)
                            : activate_cuda<PACK>(t->d, at->a, at->y, &b, t->conv.partial));
    }
    return planes_to_host(t, logits, t->layer[last].a, 1, 1, d->layer[last].n);
}

/* g (n,M), of what leaves layer i -> of the convolution's products, in place; to bias or norm if `trained` */
static Err layer_backward_cuda(Discriminator *d, size_t i, floatX *g, double feature_weight, int trained) {
    const DiscLayer *l = &d->layer[i];
    const DiscLayerTwin *at = &d->twin->layer[i];
    Device *device = d->twin->d;
    const BatchNorm b = norm_of_layer(d, i, 0);
    const DeviceRow *norm = trained && l->norm != NONE ? &device->row[l->norm] : NULL;
    float *dgamma = norm ? norm[0].grad : NULL, *dbeta = norm ? norm[1].grad : NULL, *partial = d->twin->conv.partial;
    const float step = (float)(feature_weight / (double)(l->M * l->n));
    if (l->leaky)
        TRY((l->M % PACK ? activate_backward_cuda<1> : activate_backward_cuda<PACK>)(device, g, at->a, at->kept, step,
                                                                                     at->y, &b, dgamma, dbeta,
                                                                                     d->twin->lines, partial));
    if (trained && l->bias != NONE) TRY(add_channel_sums(device, device->row[l->bias].grad, g, l->n, l->M, partial));
    return OK;
}

static Err disc_backward_cuda(Discriminator *d, const real *dlogits, double feature_weight, int trained,
                              real *dimages) {
    DiscTwin *t = d->twin;
    const size_t last = d->n_layers - 1;
    floatX *dy = t->g[0], *dx = t->g[1];
    TRY(earlier_failure(t->d));
    if (dlogits)
        TRY(planes_to_device(t, dy, dlogits, 1, 1, d->layer[last].n));
    else
        TRY(device_zero(t->d, dy, d->layer[last].n * sizeof *dy));
    for (size_t i = last + 1; i-- > 0;) {
        const DiscLayer *l = &d->layer[i];
        const Window p = disc_window(l);
        TRY(layer_backward_cuda(d, i, dy, feature_weight / (double)last, trained));
        if (trained)
            TRY(conv4_weights_cuda(t->d, t->d->row[l->weight].grad, &p, dy, i ? t->layer[i - 1].a : t->images, l->n,
                                   l->M, &t->conv));
        if (i == 0 && !dimages) return OK;
        TRY(conv4_input_cuda(t->d, dx, &p, dy, t->layer[i].ordered, d->B, l->M, &t->conv));
        floatX *keep = dy;
        dy = dx, dx = keep;
    }
    return planes_to_host(t, dimages, dy, d->B, d->layer[0].C, d->layer[0].H * d->layer[0].W);
}

static Err disc_keep_cuda(Discriminator *d) {
    for (size_t i = 0; i + 1 < d->n_layers; i++)
        TRY(device_copy(d->twin->d, d->twin->layer[i].kept, d->twin->layer[i].a,
                        d->layer[i].M * d->layer[i].n * sizeof(floatX)));
    return OK;
}

static Err layer_gap(const Discriminator *d, size_t i, double *mean) {
    const DiscLayerTwin *at = &d->twin->layer[i];
    const size_t n = d->layer[i].M * d->layer[i].n;
    const unsigned blocks = sum_blocks(n, CELL_THREADS);
    double sums[SUM_BLOCKS], sum = 0;
    LAUNCH(d->twin->d, gap_kernel, blocks, CELL_THREADS, BLOCK_SUM_BYTES, d->twin->d->sums, at->a, at->kept, n);
    TRY(to_host(d->twin->d, sums, d->twin->d->sums, blocks * sizeof *sums));
    for (unsigned k = 0; k < blocks; k++) sum += sums[k];
    *mean = sum / (double)n;
    return OK;
}

/* The mean distance of features; NaN when something failed, which the next call says */
static double disc_gap_cuda(const Discriminator *d) {
    double mean = 0, part = 0;
    for (size_t i = 0; i + 1 < d->n_layers; i++) {
        const Err e = layer_gap(d, i, &part);
        keep_failure(d->twin->d, e);
        if (e != OK) return (double)NAN;
        mean += part / (double)(d->n_layers - 1);
    }
    return mean;
}

/* ---- The twin: its memory ---- */

static Err place_layer_twin(const Discriminator *d, size_t i, DiscTwin *t, int features) {
    const DiscLayer *l = &d->layer[i];
    DiscLayerTwin *at = &t->layer[i];
    const Window p = disc_window(l);
    if (l->M * l->n > (1u << 31) || d->B * l->C * l->H * l->W > (1u << 31))
        return err("discriminator: activations of more than 2^31 numbers; a smaller batch takes less");
    conv4_needs_cuda(&t->conv, &p, d->B, l->M);
    carve(&t->arena, &at->ordered, l->M * p.pitch, sizeof *at->ordered);
    carve(&t->arena, &at->a, l->M * l->n, sizeof *at->a);
    at->y = at->a;
    if (features && l->leaky) carve(&t->arena, &at->kept, l->M * l->n, sizeof *at->kept);
    if (l->norm == NONE) return OK;
    carve(&t->arena, &at->y, l->M * l->n, sizeof *at->y);
    carve(&t->arena, &at->mean, l->M, sizeof *at->mean);
    carve(&t->arena, &at->rstd, l->M, sizeof *at->rstd);
    return OK;
}

static Err place_twin(const Discriminator *d, DiscTwin *t, int features) {
    const size_t pixels = d->B * d->layer[0].C * d->layer[0].H * d->layer[0].W;
    size_t widest = pixels, channels = 0;
    t->arena.used = 0;
    for (size_t i = 0; i < d->n_layers; i++) {
        TRY(place_layer_twin(d, i, t, features));
        widest = max_size(widest, d->layer[i].M * d->layer[i].n), channels = max_size(channels, d->layer[i].M);
    }
    carve(&t->arena, &t->images, pixels, sizeof *t->images);
    carve(&t->arena, &t->planes, max_size(pixels, disc_logits(d)), sizeof *t->planes);
    carve(&t->arena, &t->g[0], widest, sizeof *t->g[0]);
    carve(&t->arena, &t->g[1], widest, sizeof *t->g[1]);
    carve(&t->arena, &t->lines, 2 * channels, sizeof *t->lines);
    carve(&t->arena, &t->conv.columns, t->conv.column_size, sizeof *t->conv.columns);
    carve(&t->arena, &t->conv.totals, t->conv.total_size, sizeof *t->conv.totals);
    carve(&t->arena, &t->conv.partial, t->conv.partial_size, sizeof *t->conv.partial);
    return OK;
}

static void disc_free_cuda(Discriminator *d) {
    device_free(d->twin->arena.base);
    free(d->twin);
    d->twin = NULL;
}

/* The sizes of layers are planned already. *bytes: of everything. */
static Err disc_plan_cuda(Discriminator *d, int features, int allocate, size_t *bytes) {
    DiscTwin counted;
    memset(&counted, 0, sizeof counted);
    TRY(place_twin(d, &counted, features));
    *bytes = counted.arena.used;
    if (!allocate) return OK;
    TRY(mem_alloc(&d->twin, 1, sizeof *d->twin, "discriminator: on the GPU"));
    d->twin->d = d->params.device, d->twin->changes = (uint64_t)-1;
    if (device_alloc(&d->twin->arena.base, *bytes, "discriminator: activations") == OK)
        return place_twin(d, d->twin, features);
    disc_free_cuda(d);
    return FAILED;
}
