/* discriminator.cu - the discriminator's layers on a GPU: 4x4 convolutions, batch norm with leaky ReLU, the distance of
 * features. The plain loops are in training/discriminator.c.
 *
 * Values are (B,h,w,C): a convolution is patches (B*h*w,C*16) times the weights in their order (conv.cu), and a channel,
 * over which batch norm takes its mean, is a column. They are floatX; means, deviations and everything in the parameter
 * table are float. */
#include "kernels/device.h"

/* ---- 4x4 convolutions ---- */

static Window conv4_window(const Conv4 *c) {
    return make_window(c->C, conv4_side(c->H, c->stride), conv4_side(c->W, c->stride), c->H, c->W, CONV4_SIDE,
                       (int)c->stride, 1, 0);
}

/* Which results saw a pixel of x: with a stride of 2 in four phases, each 2x2 of them. */
static Window conv4_input_window(const Conv4 *c) {
    const size_t h = conv4_side(c->H, c->stride), w = conv4_side(c->W, c->stride);
    if (c->stride == 2) return phase_window(c->M, ceil_div(c->H, 2), ceil_div(c->W, 2), h, w, 0);
    return make_window(c->M, c->H, c->W, h, w, CONV4_SIDE, 1, 2, 0);
}
static int conv4_input_directly(const Conv4 *c) {
    const Window p = conv4_input_window(c);
    return can_multiply_directly(&p);
}

/* out (M,pitch) = w (M,C,4,4) tap by tap, in each C channels; zeros behind them */
static __global__ void order_taps_kernel(floatX *out, const float *w, size_t M, size_t C, size_t pitch) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, m = i / pitch, tap = i % pitch / C,
                 c = i % pitch % C;
    if (m < M) out[i] = to_floatX(tap < CONV4_TAPS ? w[(m * C + c) * CONV4_TAPS + tap] : 0);
}

/* The same for dx: out (C,16,M), the window turned round, or, with a stride of 2, (4,C,4,M): along each axis a pixel
 * of phase q is seen by result j of its two through kernel row 3 - q - 2j. */
static __global__ void order_input_taps_kernel(floatX *out, const float *w, unsigned M, unsigned C, unsigned stride) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, taps = CONV4_TAPS / stride / stride,
                   side = CONV4_SIDE / stride;
    const unsigned m = i % M, j = i / M % taps, c = i / M / taps % C, phase = i / M / taps / C;
    const unsigned ky = 3 - stride * (j / side) - phase / 2, kx = 3 - stride * (j % side) - phase % 2;
    if (i < M * C * CONV4_TAPS) out[i] = to_floatX(w[(m * C + c) * CONV4_TAPS + ky * CONV4_SIDE + kx]);
}

/* dw (M,C,4,4) += totals (shares,M,pitch), which are in that order */
static __global__ void add_taps_kernel(float *dw, const float *total, size_t M, size_t C, size_t pitch, size_t shares) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, m = i / CONV4_TAPS / C, c = i / CONV4_TAPS % C,
                 tap = i % CONV4_TAPS;
    float sum = 0;
    if (m >= M) return;
    for (size_t s = 0; s < shares; s++) sum += total[(s * M + m) * pitch + tap * C + c];
    dw[i] += sum;
}

/* The scratch of a convolution: the weights' gradient in the order of patches, sums of splits (conv_tiles.cu), then
 * patches of as many rows as fit. */
typedef struct {
    float *totals; /* (shares,M,pitch) */
    float *partial;
    floatX *columns; /* (column_size) */
    size_t column_size;
} Conv4Scratch;

static size_t totals_bytes(const Conv4 *c) {
    const Window p = conv4_window(c);
    const size_t shares = can_multiply_directly(&p) ? shares_of(&p, c->B, c->M) : 1;
    return round_up(shares * c->M * p.pitch * sizeof(float), 4 * ALIGNMENT);
}
static size_t splits_bytes(const Conv4 *c) {
    const Window y = conv4_window(c), x = conv4_input_window(c);
    return max_size(split_floats(&y, c->M), split_floats(&x, c->C)) * sizeof(float);
}

static Conv4Scratch conv4_scratch(const Compute *on, const Conv4 *c) {
    const size_t totals = totals_bytes(c), fixed = totals + splits_bytes(c);
    char *at = (char *)on->scratch;
    const Conv4Scratch s = {(float *)(void *)at, (float *)(void *)(at + totals), (floatX *)(void *)(at + fixed),
                            (on->scratch_bytes - fixed) / sizeof(floatX)};
    return s;
}

/* All patches, or as many as make a tile, or at least those of a picture. */
static size_t conv4_needs_gpu(const Compute *on, const Conv4 *c) {
    const Window p = conv4_window(c);
    const size_t positions = p.gh * p.gw, picture = (round_up(positions, TILE_ROWS) + TILE_ROWS) * p.pitch,
                 fixed = totals_bytes(c) + splits_bytes(c);
    (void)on;
    if (can_multiply_directly(&p) && conv4_input_directly(c)) return fixed;
    return fixed + max_size(columns_for(&p, c->B * positions), picture) * sizeof(floatX);
}

/* Weights in the order of patches, and then, if tensor cores make dx, in the order of its. */
static size_t conv4_prepared_bytes_gpu(const Conv4 *c) {
    const size_t forward = round_up(c->M * conv4_window(c).pitch * sizeof(floatX), ALIGNMENT);
    return forward + (conv4_input_directly(c) ? c->M * c->C * CONV4_TAPS * sizeof(floatX) : 0);
}
static floatX *input_weights(void *prepared, const Conv4 *c) {
    return (floatX *)(void *)((char *)prepared + round_up(c->M * conv4_window(c).pitch * sizeof(floatX), ALIGNMENT));
}

static Err prepare_conv4(Device *d, void *prepared, const float *w, const Conv4 *c) {
    const size_t pitch = conv4_window(c).pitch;
    LAUNCH(d, order_taps_kernel, blocks_for(c->M * pitch, CELL_THREADS), CELL_THREADS, 0, (floatX *)prepared, w, c->M,
           c->C, pitch);
    if (conv4_input_directly(c))
        LAUNCH(d, order_input_taps_kernel, blocks_for(c->M * c->C * CONV4_TAPS, CELL_THREADS), CELL_THREADS, 0,
               input_weights(prepared, c), w, (unsigned)c->M, (unsigned)c->C, (unsigned)c->stride);
    return OK;
}

static Err forward_conv4(const Compute *on, floatX *y, const floatX *x, const Conv4 *c) {
    const Window p = conv4_window(c);
    const Conv4Scratch s = conv4_scratch(on, c);
    const size_t rows = c->B * p.gh * p.gw, tile = tile_rows(s.column_size, p.pitch);
    const floatX *w = (const floatX *)c->prepared;
    if (can_multiply_directly(&p))
        return multiply_tiles_of(on->device, tile_conv(y, &p, c->B, c->M, plain_source(x), w, s.partial));
    for (size_t r = 0; r < rows; r += tile) {
        const size_t n = min_size(tile, rows - r);
        TRY(gather(on->device, s.columns, x, &p, r, n));
        const Matmul product = rows_times(y + r * c->M, s.columns, w, n, c->M, p.pitch, p.pitch, 1, NULL);
        TRY(matmul(on->device, &product));
    }
    return OK;
}

/* dw (M,C,4,4) += from dy (rows,M) and x */
static Err weights_of_conv4(const Compute *on, float *dw, const floatX *dy, const floatX *x, const Conv4 *c) {
    const Window p = conv4_window(c);
    const Conv4Scratch s = conv4_scratch(on, c);
    const size_t rows = c->B * p.gh * p.gw, tile = tile_rows(s.column_size, p.pitch);
    const int directly = can_multiply_directly(&p);
    if (directly) TRY(multiply_weights(on->device, TileWeights{p, c->B, c->M, plain_source(x), dy, s.totals, 0}));
    for (size_t r = 0; r < rows && !directly; r += tile) {
        const size_t n = min_size(tile, rows - r);
        TRY(gather(on->device, s.columns, x, &p, r, n));
        const Matmul sums = turned_times(s.totals, dy + r * c->M, s.columns, c->M, p.pitch, n, r > 0);
        TRY(matmul(on->device, &sums));
    }
    LAUNCH(on->device, add_taps_kernel, blocks_for(c->M * c->C * CONV4_TAPS, CELL_THREADS), CELL_THREADS, 0, dw,
           s.totals, c->M, c->C, p.pitch, directly ? shares_of(&p, c->B, c->M) : (size_t)1);
    return OK;
}

/* dx (..,h,w,C), n elements from picture `first` on = what all results that saw a pixel say of it: sums of dcolumns,
 * gradients of their patches, which begin with that of result `begin`. */
static __global__ void fold_taps_kernel(floatX *dx, const floatX *dcolumns, Window p, size_t begin, unsigned first,
                                        unsigned n) {
    const unsigned C = (unsigned)p.C, w = (unsigned)p.w, h = (unsigned)p.h, stride = (unsigned)p.stride;
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, c = i % C, x = i / C % w, y = i / C / w % h;
    const size_t results = (first + i / C / w / h) * p.gh * p.gw - begin;
    if (i >= n) return;
    float sum = 0;
    for (unsigned k = 0; k < CONV4_TAPS; k++) {
        const unsigned above = y + 1 - k / CONV4_SIDE,
                       left = x + 1 - k % CONV4_SIDE; /* below 0: wraps round, too large as well */
        if (above % stride || left % stride || above / stride >= p.gh || left / stride >= p.gw) continue;
        sum += to_float(dcolumns[(results + above / stride * p.gw + left / stride) * p.pitch + k * C + c]);
    }
    dx[(size_t)first * h * w * C + i] = to_floatX(sum);
}

static Err input_of_conv4_directly(const Compute *on, floatX *dx, const floatX *dy, const Conv4 *c) {
    const Window p = conv4_input_window(c);
    const TileConv a =
        tile_conv(dx, &p, c->B, c->C, plain_source(dy), input_weights(c->prepared, c), conv4_scratch(on, c).partial);
    return c->stride == 2 ? multiply_phases(on->device, a, c->H, c->W) : multiply_tiles_of(on->device, a);
}

/* dx of all pictures, as many at a time as there is room for; a matrix begins at an aligned row, at or before theirs. */
static Err input_of_conv4(const Compute *on, floatX *dx, const floatX *dy, const Conv4 *c) {
    const Window p = conv4_window(c);
    const Conv4Scratch s = conv4_scratch(on, c);
    if (conv4_input_directly(c)) return input_of_conv4_directly(on, dx, dy, c);
    const size_t positions = p.gh * p.gw, numbers = p.h * p.w * p.C;
    const size_t at_once = max_size((s.column_size / p.pitch - TILE_ROWS) / positions, 1);
    for (size_t b = 0; b < c->B; b += at_once) {
        const size_t n = min_size(at_once, c->B - b), begin = b * positions / TILE_ROWS * TILE_ROWS;
        const Matmul product = rows_times(s.columns, dy + begin * c->M, (const floatX *)c->prepared,
                                          (b + n) * positions - begin, p.pitch, c->M, p.pitch, 0, NULL);
        TRY(matmul(on->device, &product));
        LAUNCH(on->device, fold_taps_kernel, blocks_for(n * numbers, CELL_THREADS), CELL_THREADS, 0, dx, s.columns, p,
               begin, (unsigned)b, (unsigned)(n * numbers));
    }
    return OK;
}

static void conv4_prepare_gpu(const Compute *on, void *prepared, const real *w, const Conv4 *c) {
    keep_failure(on->device, prepare_conv4(on->device, prepared, w, c));
}
static void conv4_forward_gpu(const Compute *on, real *y, const real *x, const real *w, const Conv4 *c) {
    (void)w; /* prepared */
    keep_failure(on->device, forward_conv4(on, (floatX *)y, (const floatX *)x, c));
}
static void conv4_backward_gpu(const Compute *on, real *dx, real *dw, const real *dy, const real *x, const real *w,
                               const Conv4 *c) {
    (void)w;
    if (dw) keep_failure(on->device, weights_of_conv4(on, dw, (const floatX *)dy, (const floatX *)x, c));
    if (dx) keep_failure(on->device, input_of_conv4(on, (floatX *)dx, (const floatX *)dy, c));
}

/* ---- Batch norm or a bias, then leaky ReLU. Values are (n,M). A thread takes WIDTH neighbouring channels at a time: PACK
 *      if the number of channels is a multiple of PACK, else 1. ---- */

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

static __device__ inline float moved(float from, double to, double momentum) {
    return (float)((1 - momentum) * (double)from + momentum * to);
}

/* Mean, deviation and buffers of a channel, by a warp */
static __global__ void batch_stats_kernel(Activation s, const float *partial, const floatX *y, size_t slices) {
    const size_t c = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    double sum = 0, square = 0;
    if (c >= s.M) return;
    for (size_t i = lane; i < slices; i += WARP)
        sum += (double)partial[2 * i * s.M + c], square += (double)partial[(2 * i + 1) * s.M + c];
    const double n = (double)s.n, gap = warp_sum(sum) / n, rest = warp_sum(square) / n - gap * gap;
    const double mean = (double)to_float(y[c]) + gap, variance = rest > 0 ? rest : 0;
    if (lane) return;
    s.mean[c] = (float)mean, s.rstd[c] = (float)(1 / sqrt(variance + s.eps));
    if (!s.running_mean) return;
    s.running_mean[c] = moved(s.running_mean[c], mean, s.momentum);
    s.running_var[c] = moved(s.running_var[c], variance * n / (n - 1), s.momentum);
    if (c == 0) *s.tracked += 1;
}

/* a = leaky((y - mean) rstd gamma + beta), or leaky(y + beta) where there is no norm */
template <int WIDTH> static __global__ void activate_kernel(floatX *a, const floatX *y, Activation s) {
    const unsigned i = (blockIdx.x * blockDim.x + threadIdx.x) * WIDTH, first = i % (unsigned)s.M;
    if (i >= (unsigned)(s.n * s.M)) return;
    Channels<WIDTH> p = channels_at<WIDTH>(y, i);
    ChannelNumbers<WIDTH> mean = {}, rstd = {}, gamma = {};
    const ChannelNumbers<WIDTH> beta = numbers_of<WIDTH>(s.beta + first);
    if (s.gamma) {
        mean = numbers_of<WIDTH>(s.mean + first), rstd = numbers_of<WIDTH>(s.rstd + first);
        gamma = numbers_of<WIDTH>(s.gamma + first);
    }
    for (unsigned j = 0; j < WIDTH; j++) {
        float t = to_float(p.at[j]);
        t = s.gamma ? (t - mean.at[j]) * (rstd.at[j] * gamma.at[j]) + beta.at[j] : t + beta.at[j];
        p.at[j] = to_floatX(t > 0 ? t : s.slope * t);
    }
    *(Channels<WIDTH> *)(a + i) = p;
}

/* The scratch of both directions */
typedef struct {
    float *lines;   /* (2,M) of backward */
    float *partial; /* (slices,2,M) sums */
} ActivationScratch;

static ActivationScratch activation_scratch(const Compute *on, const Activation *s) {
    const size_t lines = round_up(2 * s->M * sizeof(float), 4 * ALIGNMENT);
    const ActivationScratch a = {(float *)on->scratch, (float *)(void *)((char *)on->scratch + lines)};
    return a;
}
static size_t activate_needs_gpu(const Compute *on, const Activation *s) {
    (void)on;
    return round_up(2 * s->M * sizeof(float), 4 * ALIGNMENT) + channel_slices(1, s->n, s->M) * sizeof(float);
}

template <int WIDTH> static Err activate(const Compute *on, floatX *a, const floatX *y, const Activation *s) {
    const dim3 grid = slice_grid(s->M, s->n, 1, WIDTH);
    float *partial = activation_scratch(on, s).partial;
    if (s->gamma) {
        LAUNCH(on->device, batch_sums_kernel<WIDTH>, grid, CELL_THREADS, CELL_THREADS * WIDTH * sizeof(float), partial,
               y, s->n, s->M);
        LAUNCH(on->device, batch_stats_kernel, blocks_for(s->M, CELL_THREADS / WARP), CELL_THREADS, 0, *s, partial, y,
               (size_t)grid.y);
    }
    LAUNCH(on->device, activate_kernel<WIDTH>, blocks_for(s->n * s->M, CELL_THREADS * WIDTH), CELL_THREADS, 0, a, y,
           *s);
    return OK;
}

/* g = (g + step sign(a - other)) leaky'(a); other is not read where step is 0 */
template <int WIDTH>
static __global__ void leaky_gradient_kernel(floatX *g, const floatX *a, const floatX *other, float step, float slope,
                                             size_t total) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * WIDTH;
    if (i >= total) return;
    Channels<WIDTH> p = channels_at<WIDTH>(g, i), was = {};
    const Channels<WIDTH> now = channels_at<WIDTH>(a, i);
    if (step != 0) was = channels_at<WIDTH>(other, i);
    for (int j = 0; j < WIDTH; j++) {
        const float v = to_float(now.at[j]), gap = step != 0 ? v - to_float(was.at[j]) : 0;
        const float t = to_float(p.at[j]) + step * (float)((gap > 0) - (gap < 0));
        p.at[j] = to_floatX(v > 0 ? t : slope * t);
    }
    *(Channels<WIDTH> *)(g + i) = p;
}

/* Sums of g and of g times the normalised y. */
template <int WIDTH>
static __global__ void batch_gradient_sums_kernel(float *partial, const floatX *g, const floatX *y, Activation s) {
    const Share share = share_of(s.M, s.n, WIDTH);
    float sum[WIDTH] = {}, along[WIDTH] = {}, mean[WIDTH] = {}, rstd[WIDTH] = {};
    for (int j = 0; j < WIDTH && share.end; j++) mean[j] = s.mean[share.c + j], rstd[j] = s.rstd[share.c + j];
    for (size_t r = share.first; r < share.end; r += CELL_LANES) {
        const Channels<WIDTH> p = channels_at<WIDTH>(g, r * s.M + share.c),
                              v = channels_at<WIDTH>(y, r * s.M + share.c);
        for (int j = 0; j < WIDTH; j++) {
            const float t = to_float(p.at[j]);
            sum[j] += t, along[j] += t * (to_float(v.at[j]) - mean[j]) * rstd[j];
        }
    }
    store_channel_sums<WIDTH>(partial, sum, along, s.M);
}

/* lines (2,M) = level, tilt: g = rstd gamma (g - level - tilt (y - mean)); dgamma, dbeta (M) += unless NULL */
static __global__ void batch_lines_kernel(float *lines, float *dgamma, float *dbeta, const float *partial, Activation s,
                                          size_t slices) {
    const size_t c = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    double sum = 0, along = 0;
    if (c >= s.M) return;
    for (size_t i = lane; i < slices; i += WARP)
        sum += (double)partial[2 * i * s.M + c], along += (double)partial[(2 * i + 1) * s.M + c];
    sum = warp_sum(sum), along = warp_sum(along);
    if (lane) return;
    lines[c] = (float)(sum / (double)s.n), lines[s.M + c] = (float)((double)s.rstd[c] * along / (double)s.n);
    if (dgamma) dgamma[c] += (float)along;
    if (dbeta) dbeta[c] += (float)sum;
}

template <int WIDTH>
static __global__ void batch_gradient_kernel(floatX *g, const floatX *y, Activation s, const float *lines) {
    const unsigned i = (blockIdx.x * blockDim.x + threadIdx.x) * WIDTH, first = i % (unsigned)s.M;
    if (i >= s.n * s.M) return;
    Channels<WIDTH> p = channels_at<WIDTH>(g, i);
    const Channels<WIDTH> v = channels_at<WIDTH>(y, i);
    const ChannelNumbers<WIDTH> mean = numbers_of<WIDTH>(s.mean + first), rstd = numbers_of<WIDTH>(s.rstd + first),
                                gamma = numbers_of<WIDTH>(s.gamma + first), level = numbers_of<WIDTH>(lines + first),
                                tilt = numbers_of<WIDTH>(lines + s.M + first);
    for (unsigned j = 0; j < WIDTH; j++) {
        const float t = to_float(p.at[j]) - level.at[j] - tilt.at[j] * (to_float(v.at[j]) - mean.at[j]);
        p.at[j] = to_floatX(rstd.at[j] * gamma.at[j] * t);
    }
    *(Channels<WIDTH> *)(g + i) = p;
}

/* The plain activate_backward says what. */
template <int WIDTH>
static Err activate_gradient(const Compute *on, floatX *g, float *dgamma, float *dbeta, const floatX *a,
                             const floatX *y, const floatX *other, float step, const Activation *s) {
    Device *d = on->device;
    const size_t total = s->n * s->M;
    const unsigned blocks = blocks_for(total, CELL_THREADS * WIDTH);
    const dim3 grid = slice_grid(s->M, s->n, 1, WIDTH);
    const ActivationScratch scratch = activation_scratch(on, s);
    if (s->slope != 1 || step != 0)
        LAUNCH(d, leaky_gradient_kernel<WIDTH>, blocks, CELL_THREADS, 0, g, a, other, step, s->slope, total);
    if (!s->gamma) return dbeta ? add_channel_sums(d, dbeta, g, s->n, s->M, scratch.partial) : OK;
    LAUNCH(d, batch_gradient_sums_kernel<WIDTH>, grid, CELL_THREADS, CELL_THREADS * WIDTH * sizeof(float),
           scratch.partial, g, y, *s);
    LAUNCH(d, batch_lines_kernel, blocks_for(s->M, CELL_THREADS / WARP), CELL_THREADS, 0, scratch.lines, dgamma, dbeta,
           scratch.partial, *s, (size_t)grid.y);
    LAUNCH(d, batch_gradient_kernel<WIDTH>, blocks, CELL_THREADS, 0, g, y, *s, scratch.lines);
    return OK;
}

static void activate_forward_gpu(const Compute *on, real *a, const real *y, const Activation *s) {
    floatX *to = (floatX *)a;
    const floatX *from = (const floatX *)y;
    keep_failure(on->device, s->M % PACK ? activate<1>(on, to, from, s) : activate<PACK>(on, to, from, s));
}
static void activate_backward_gpu(const Compute *on, real *g, real *dgamma, real *dbeta, const real *a, const real *y,
                                  const real *other, double step, const Activation *s) {
    auto *const gradient = s->M % PACK ? activate_gradient<1> : activate_gradient<PACK>;
    keep_failure(on->device, gradient(on, (floatX *)g, dgamma, dbeta, (const floatX *)a, (const floatX *)y,
                                      (const floatX *)other, (float)step, s));
}

/* ---- The distance of features ---- */

/* sums (blocks) of |a - other| */
static __global__ void gap_kernel(double *sums, const floatX *a, const floatX *other, size_t n) {
    double sum = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        sum += (double)fabsf(to_float(a[i]) - to_float(other[i]));
    store_block_sum(sums, sum);
}

static Err add_gaps(Device *d, double *sum, const floatX *a, const floatX *other, size_t n) {
    const unsigned blocks = sum_blocks(n, CELL_THREADS);
    double sums[SUM_BLOCKS];
    *sum = 0;
    LAUNCH(d, gap_kernel, blocks, CELL_THREADS, BLOCK_SUM_BYTES, d->sums, a, other, n);
    TRY(to_host(d, sums, d->sums, blocks * sizeof *sums));
    for (unsigned k = 0; k < blocks; k++) *sum += sums[k];
    return OK;
}

/* NaN when something failed, which the next call says */
static double feature_gap_gpu(const Compute *on, const real *a, const real *other, size_t n) {
    double sum = 0;
    keep_failure(on->device, add_gaps(on->device, &sum, (const floatX *)a, (const floatX *)other, n));
    return on->device->failed == OK ? sum : (double)NAN;
}

static void add_discriminator_layers(Layers *l) {
    l->conv4_needs = conv4_needs_gpu;
    l->conv4_prepared_bytes = conv4_prepared_bytes_gpu;
    l->conv4_prepare = conv4_prepare_gpu;
    l->conv4_forward = conv4_forward_gpu;
    l->conv4_backward = conv4_backward_gpu;
    l->activate_needs = activate_needs_gpu;
    l->activate_forward = activate_forward_gpu;
    l->activate_backward = activate_backward_gpu;
    l->feature_gap = feature_gap_gpu;
}
