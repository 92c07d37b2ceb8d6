/* perceptual.cu - the layers of LPIPS on a GPU: scaling pictures, ReLU, pooling, the comparison of features. The plain
 * loops are in training/perceptual.c.
 *
 * Values are (B,h,w,C) of floatX. Pictures and the gradient cross over in the host's order, (B,3,H,W), by way of the
 * scratch: beside thirteen convolutions at full width that is little. Lengths of features are summed in double, as in C:
 * those of two pictures that are nearly alike cancel out. */
#include "kernels/device.h"

typedef struct {
    float shift[3], scale[3];
} Scaling;

static Scaling make_scaling(const double *shift, const double *scale) {
    Scaling s;
    for (int c = 0; c < 3; c++) s.shift[c] = shift ? (float)shift[c] : 0, s.scale[c] = (float)scale[c];
    return s;
}

/* to (B,hw,3) from planes (B,3,hw), and back the gradient */
static __global__ void scale_input_kernel(floatX *to, const float *planes, Scaling s, size_t n, size_t positions) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, c = i % 3, pixel = i / 3 % positions,
                 b = i / 3 / positions;
    if (i < n) to[i] = to_floatX((planes[(b * 3 + c) * positions + pixel] - s.shift[c]) / s.scale[c]);
}
static __global__ void scale_gradient_kernel(float *planes, const floatX *from, Scaling s, size_t n, size_t positions) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, pixel = i % positions, c = i / positions % 3,
                 b = i / positions / 3;
    if (i < n) planes[i] = to_float(from[(b * positions + pixel) * 3 + c]) / s.scale[c];
}

static __global__ void relu_kernel(floatX *y, size_t n) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * PACK;
    if (i >= n) return;
    Pack p = load_pack(y, i, n);
    for (int j = 0; j < PACK; j++) p.at[j] = to_float(p.at[j]) > 0 ? p.at[j] : to_floatX(0);
    store_pack(y, i, n, p);
}

/* dy *= y > 0 */
static __global__ void relu_backward_kernel(floatX *dy, const floatX *y, size_t n) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * PACK;
    if (i >= n) return;
    Pack p = load_pack(dy, i, n);
    const Pack kept = load_pack(y, i, n);
    for (int j = 0; j < PACK; j++) p.at[j] = to_float(kept.at[j]) > 0 ? p.at[j] : to_floatX(0);
    store_pack(dy, i, n, p);
}

static Err relu_cuda(Device *d, floatX *y, size_t n) {
    LAUNCH(d, relu_kernel, blocks_for(n, CELL_THREADS * PACK), CELL_THREADS, 0, y, n);
    return OK;
}
static Err relu_backward_cuda(Device *d, floatX *dy, const floatX *y, size_t n) {
    LAUNCH(d, relu_backward_kernel, blocks_for(n, CELL_THREADS * PACK), CELL_THREADS, 0, dy, y, n);
    return OK;
}

/* y (..,h/2,w/2,C), n numbers, = the largest of every 2x2 pixels of x (..,h,w,C); a last odd row or column is left
 * out. */
static __global__ void pool_kernel(floatX *y, const floatX *x, unsigned n, unsigned h, unsigned w, unsigned C) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, c = i % C, pixel = i / C, column = pixel % (w / 2),
                   row = pixel / (w / 2) % (h / 2), b = pixel / (w / 2) / (h / 2);
    if (i >= n) return;
    const floatX *from = x + (((size_t)b * h + 2 * row) * w + 2 * column) * C + c;
    float most = to_float(from[0]);
    for (unsigned k = 1; k < 4; k++) most = fmaxf(most, to_float(from[(k / 2 * w + k % 2) * C]));
    y[i] = to_floatX(most);
}

/* dx (..,h,w,C), n numbers: dy of each 2x2 pixels goes to the first of the largest, zeros to the others. */
static __global__ void pool_backward_kernel(floatX *dx, const floatX *dy, const floatX *x, unsigned n, unsigned h,
                                            unsigned w, unsigned C) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, c = i % C, column = i / C % w, row = i / C / w % h,
                   b = i / C / w / h, own = row % 2 * 2 + column % 2;
    if (i >= n) return;
    const bool inside = row / 2 < h / 2 && column / 2 < w / 2;
    const floatX *from = x + (((size_t)b * h + row / 2 * 2) * w + column / 2 * 2) * C + c;
    unsigned most = 0;
    for (unsigned k = 1; inside && k < 4; k++)
        if (to_float(from[(k / 2 * w + k % 2) * C]) > to_float(from[(most / 2 * w + most % 2) * C])) most = k;
    dx[i] = inside && most == own ? dy[(((size_t)b * (h / 2) + row / 2) * (w / 2) + column / 2) * C + c] : to_floatX(0);
}

static Err pool_cuda(Device *d, floatX *y, const floatX *x, size_t B, size_t h, size_t w, size_t C) {
    const size_t n = B * (h / 2) * (w / 2) * C;
    LAUNCH(d, pool_kernel, blocks_for(n, CELL_THREADS), CELL_THREADS, 0, y, x, (unsigned)n, (unsigned)h, (unsigned)w,
           (unsigned)C);
    return OK;
}
static Err pool_backward_cuda(Device *d, floatX *dx, const floatX *dy, const floatX *x, size_t B, size_t h, size_t w,
                              size_t C) {
    const size_t n = B * h * w * C;
    LAUNCH(d, pool_backward_kernel, blocks_for(n, CELL_THREADS), CELL_THREADS, 0, dx, dy, x, (unsigned)n, (unsigned)h,
           (unsigned)w, (unsigned)C);
    return OK;
}

/* a/|a| - r/|r| of a channel, as (a-r)/|a| + r gap, which is exactly 0 for equal features */
static __device__ inline double direction_gap(floatX a, floatX r, double in_a, double gap) {
    return ((double)to_float(a) - (double)to_float(r)) * in_a + (double)to_float(r) * gap;
}

/* sums (blocks) of the distances of a (positions,C), features of x, and r, of xrec; a warp takes a position at a
 * time. dr = or += weight times the gradient, unless NULL. In double, as in C: what is alike cancels out, and where
 * all of x's features are 0 the two parts are as large as 1e10. */
static __global__ void compare_kernel(double *sums, floatX *dr, const floatX *a, const floatX *r, const float *lin,
                                      size_t positions, size_t C, double weight, int accumulate) {
    const size_t warps = CELL_THREADS / WARP, lane = threadIdx.x % WARP;
    double total = 0;
    for (size_t at = blockIdx.x * warps + threadIdx.x / WARP; at < positions; at += gridDim.x * warps) {
        const size_t end = (at + 1) * C;
        double in_a = 0, in_r = 0, sum = 0, along = 0;
        for (size_t c = at * C + lane; c < end; c += WARP) {
            in_a += (double)to_float(a[c]) * (double)to_float(a[c]);
            in_r += (double)to_float(r[c]) * (double)to_float(r[c]);
        }
        const double length = sqrt(warp_sum(in_r));
        in_a = warp_sum(in_a), in_a = in_a > 0 ? 1 / (sqrt(in_a) + 1e-10) : 0, in_r = 1 / (length + 1e-10);
        for (size_t c = at * C + lane; c < end; c += WARP) {
            const double d = direction_gap(a[c], r[c], in_a, in_a - in_r), of = (double)lin[c + C - end];
            sum += of * d * d, along += of * d * (double)to_float(r[c]);
        }
        sum = warp_sum(sum), along = warp_sum(along);
        if (lane == 0) total += sum;
        if (!dr) continue;
        const double slope = length > 0 ? along * in_r / length : 0, step = -2 * weight * in_r;
        for (size_t c = at * C + lane; c < end; c += WARP) {
            const double d = direction_gap(a[c], r[c], in_a, in_a - in_r), of = (double)lin[c + C - end];
            const float g = (float)(step * (of * d - (double)to_float(r[c]) * slope));
            dr[c] = to_floatX((accumulate ? to_float(dr[c]) : 0) + g);
        }
    }
    store_block_sum(sums, total);
}

static Err compare_cuda(Device *d, double *sums, floatX *dr, const floatX *a, const floatX *r, const float *lin,
                        size_t positions, size_t C, double weight, int accumulate) {
    LAUNCH(d, compare_kernel, sum_blocks(positions, CELL_THREADS / WARP), CELL_THREADS, BLOCK_SUM_BYTES, sums, dr, a, r,
           lin, positions, C, weight, accumulate);
    return OK;
}

/* ---- The fellows ---- */

static Err put_scaled_pictures(const Compute *on, floatX *x, const real *pictures, Scaling s, size_t B, size_t hw) {
    const size_t n = B * 3 * hw;
    TRY(to_device(on->device, on->scratch, pictures, n * sizeof *pictures));
    LAUNCH(on->device, scale_input_kernel, blocks_for(n, CELL_THREADS), CELL_THREADS, 0, x, (const float *)on->scratch,
           s, n, hw);
    return OK;
}
static void put_scaled_gpu(const Compute *on, real *x, const real *pictures, const double *shift, const double *scale,
                           size_t B, size_t hw) {
    keep_failure(on->device, put_scaled_pictures(on, (floatX *)x, pictures, make_scaling(shift, scale), B, hw));
}
static Err get_scaled_gpu(const Compute *on, real *dpictures, const real *dx, const double *scale, size_t B,
                          size_t hw) {
    const size_t n = B * 3 * hw;
    TRY(earlier_failure(on->device));
    LAUNCH(on->device, scale_gradient_kernel, blocks_for(n, CELL_THREADS), CELL_THREADS, 0, (float *)on->scratch,
           (const floatX *)dx, make_scaling(NULL, scale), n, hw);
    return to_host(on->device, dpictures, on->scratch, n * sizeof *dpictures);
}
static void relu_forward_gpu(const Compute *on, real *y, size_t n) {
    keep_failure(on->device, relu_cuda(on->device, (floatX *)y, n));
}
static void relu_backward_gpu(const Compute *on, real *dy, const real *y, size_t n) {
    keep_failure(on->device, relu_backward_cuda(on->device, (floatX *)dy, (const floatX *)y, n));
}
static void pool_forward_gpu(const Compute *on, real *y, const real *x, size_t B, size_t C, size_t h, size_t w) {
    keep_failure(on->device, pool_cuda(on->device, (floatX *)y, (const floatX *)x, B, h, w, C));
}
static void pool_backward_gpu(const Compute *on, real *dx, const real *dy, const real *x, size_t B, size_t C, size_t h,
                              size_t w) {
    keep_failure(on->device,
                 pool_backward_cuda(on->device, (floatX *)dx, (const floatX *)dy, (const floatX *)x, B, h, w, C));
}
static size_t comparison_sums_gpu(size_t B, size_t hw) {
    return sum_blocks(B * hw, CELL_THREADS / WARP);
}
static void compare_features_gpu(const Compute *on, double *sums, real *dr, const real *a, const real *r,
                                 const real *lin, const TapShape *c) {
    keep_failure(on->device, compare_cuda(on->device, sums, (floatX *)dr, (const floatX *)a, (const floatX *)r, lin,
                                          c->B * c->hw, c->C, c->weight, c->accumulate));
}

static void add_perceptual_layers(Layers *l) {
    l->put_scaled = put_scaled_gpu, l->get_scaled = get_scaled_gpu;
    l->relu_forward = relu_forward_gpu, l->relu_backward = relu_backward_gpu;
    l->pool_forward = pool_forward_gpu, l->pool_backward = pool_backward_gpu;
    l->comparison_sums = comparison_sums_gpu, l->compare_features = compare_features_gpu;
}
