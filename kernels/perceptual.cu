/* perceptual.cu - the same as perceptual.c on a GPU. */
#include "kernels/perceptual.h"

/* ---- The twin ----
 *
 * Features are (2b,h,w,C) of floatX, those of xrec first here, so that what backward reads of them begins where packs
 * do. Pictures and the gradient cross over in the host's order, (b,3,H,W): beside thirteen convolutions at full width
 * that is little. Lengths of features are summed in double, as in C: those of two pictures that are nearly alike cancel
 * out. */

typedef struct {
    floatX *y, *ordered; /* after the relu; weights in the order of patches */
} VggConvTwin;

struct PerceptualTwin {
    Device *d;
    DeviceArena arena; /* all of the following but `back` */
    VggConvTwin conv[MAX_CONVS];
    floatX *pooled[PERCEPTUAL_STAGES], *dy, *dx;
    float *planes; /* (b,3,H,W) pictures or their gradient on their way */
    double *sums;  /* (stages,SUM_BLOCKS) distances */
    ConvMemory memory;
    uint64_t changes; /* of the weights (Device.changes) when they were put in order */
    real *back;       /* (b,3,H,W) here: the gradient, before it is added to the caller's */
};

/* ---- The twin: what layers do ---- */

typedef struct {
    float shift[3], scale[3];
} Scaling;

static Scaling input_scaling(void) {
    Scaling s;
    for (int c = 0; c < 3; c++) s.shift[c] = (float)input_shift[c], s.scale[c] = (float)input_scale[c];
    return s;
}

/* to (b,cells,3) from planes (b,3,cells), and back the gradient */
static __global__ void scale_input_kernel(floatX *to, const float *planes, Scaling s, size_t n, size_t cells) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, c = i % 3, cell = i / 3 % cells, b = i / 3 / cells;
    if (i < n) to[i] = to_floatX((planes[(b * 3 + c) * cells + cell] - s.shift[c]) / s.scale[c]);
}
static __global__ void scale_gradient_kernel(float *planes, const floatX *from, Scaling s, size_t n, size_t cells) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, cell = i % cells, c = i / cells % 3,
                 b = i / cells / 3;
    if (i < n) planes[i] = to_float(from[(b * cells + cell) * 3 + c]) / s.scale[c];
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

/* y (..,h/2,w/2,C), n numbers, = the largest of every 2x2 cells of x (..,h,w,C); a last odd row or column is left
 * out. */
static __global__ void pool_kernel(floatX *y, const floatX *x, unsigned n, unsigned h, unsigned w, unsigned C) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, c = i % C, cell = i / C, column = cell % (w / 2),
                   row = cell / (w / 2) % (h / 2), b = cell / (w / 2) / (h / 2);
    if (i >= n) return;
    const floatX *from = x + (((size_t)b * h + 2 * row) * w + 2 * column) * C + c;
    float most = to_float(from[0]);
    for (unsigned k = 1; k < 4; k++) most = fmaxf(most, to_float(from[(k / 2 * w + k % 2) * C]));
    y[i] = to_floatX(most);
}

/* dx (..,h,w,C), n numbers: dy of each 2x2 cells goes to the first of the largest, zeros to the others. */
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

/* sums (blocks) of the distances of a (cells,C), features of x, and r, of xrec; a warp takes a cell at a time. dr = or
 * += weight times the gradient, unless NULL. In double, as in C: what is alike cancels out, and where all of x's
 * features are 0 the two parts are as large as 1e10. */
static __global__ void compare_kernel(double *sums, floatX *dr, const floatX *a, const floatX *r, const float *lin,
                                      size_t cells, size_t C, double weight, int more) {
    const size_t warps = CELL_THREADS / WARP, lane = threadIdx.x % WARP;
    double total = 0;
    for (size_t cell = blockIdx.x * warps + threadIdx.x / WARP; cell < cells; cell += gridDim.x * warps) {
        const size_t end = (cell + 1) * C;
        double in_a = 0, in_r = 0, sum = 0, along = 0;
        for (size_t c = cell * C + lane; c < end; c += WARP) {
            in_a += (double)to_float(a[c]) * (double)to_float(a[c]);
            in_r += (double)to_float(r[c]) * (double)to_float(r[c]);
        }
        const double length = sqrt(warp_sum(in_r));
        in_a = 1 / (sqrt(warp_sum(in_a)) + 1e-10), in_r = 1 / (length + 1e-10);
        for (size_t c = cell * C + lane; c < end; c += WARP) {
            const double d = direction_gap(a[c], r[c], in_a, in_a - in_r), of = (double)lin[c + C - end];
            sum += of * d * d, along += of * d * (double)to_float(r[c]);
        }
        sum = warp_sum(sum), along = warp_sum(along);
        if (lane == 0) total += sum;
        if (!dr) continue;
        const double slope = length > 0 ? along * in_r / length : 0, step = -2 * weight * in_r;
        for (size_t c = cell * C + lane; c < end; c += WARP) {
            const double d = direction_gap(a[c], r[c], in_a, in_a - in_r), of = (double)lin[c + C - end];
            const float g = (float)(step * (of * d - (double)to_float(r[c]) * slope));
            dr[c] = to_floatX((more ? to_float(dr[c]) : 0) + g);
        }
    }
    store_block_sum(sums, total);
}

static Err compare_features(Device *d, double *sums, floatX *dr, const floatX *a, const floatX *r, const float *lin,
                            size_t cells, size_t C, double weight, int more) {
    LAUNCH(d, compare_kernel, sum_blocks(cells, CELL_THREADS / WARP), CELL_THREADS, BLOCK_SUM_BYTES, sums, dr, a, r,
           lin, cells, C, weight, more);
    return OK;
}

/* ---- The twin: the walk over 2b pictures, the first b of xrec ---- */

static const floatX *end_of(const Perceptual *p, size_t s) {
    return p->twin->conv[p->first[s + 1] - 1].y;
}

static Err order_vgg(Perceptual *p) {
    PerceptualTwin *t = p->twin;
    TRY(earlier_failure(t->d));
    if (!t->d->row) return err("perceptual_loss: its weights are not on the GPU yet");
    for (size_t s = 0; s < PERCEPTUAL_STAGES && t->changes != t->d->changes; s++)
        for (size_t k = p->first[s]; k < p->first[s + 1]; k++) {
            const Conv c = shape_of(p, &p->conv[k], s, 1);
            TRY(conv_order_weights_cuda(t->d, t->conv[k].ordered, t->d->row[p->conv[k].weight].weight, &c));
        }
    t->changes = t->d->changes;
    return OK;
}

static Err put_pictures(Perceptual *p, floatX *to, const real *images, size_t b) {
    PerceptualTwin *t = p->twin;
    const size_t n = b * 3 * p->H * p->W;
    TRY(to_device(t->d, t->planes, images, n * sizeof *images));
    LAUNCH(t->d, scale_input_kernel, blocks_for(n, CELL_THREADS), CELL_THREADS, 0, to, t->planes, input_scaling(), n,
           p->H * p->W);
    return OK;
}

static Err vgg_forward_cuda(Perceptual *p, size_t b) {
    PerceptualTwin *t = p->twin;
    for (size_t s = 0; s < PERCEPTUAL_STAGES; s++) {
        const floatX *x = t->pooled[s];
        for (size_t k = p->first[s]; k < p->first[s + 1]; k++) {
            const Conv c = shape_of(p, &p->conv[k], s, 2 * b);
            floatX *y = t->conv[k].y;
            TRY(conv_forward_cuda(t->d, y, &c, x, t->conv[k].ordered, t->d->row[p->conv[k].bias].weight, NULL,
                                  &t->memory));
            TRY(relu_cuda(t->d, y, c.B * c.M * c.h * c.w));
            x = y;
        }
        if (s + 1 == PERCEPTUAL_STAGES) return OK;
        TRY(pool_cuda(t->d, t->pooled[s + 1], x, 2 * b, p->H >> s, p->W >> s, p->c.width[s]));
    }
    return OK;
}

/* The distances at the end of stage s; dr (b,h,w,C) = or += weight times their gradient, unless NULL. */
static Err compare_cuda(Perceptual *p, size_t s, size_t b, double weight, floatX *dr) {
    PerceptualTwin *t = p->twin;
    const size_t hw = (p->H >> s) * (p->W >> s), C = p->c.width[s];
    return compare_features(t->d, t->sums + s * SUM_BLOCKS, dr, end_of(p, s) + b * hw * C, end_of(p, s),
                            t->d->row[p->lin[s]].value, b * hw, C, weight / (double)hw, s + 1 < PERCEPTUAL_STAGES);
}

/* Gradient of what stage s reads: in t->dy before, of its end; in t->dy after. */
static Err stage_backward_cuda(Perceptual *p, size_t s, size_t b) {
    PerceptualTwin *t = p->twin;
    for (size_t k = p->first[s + 1]; k-- > p->first[s];) {
        const Conv c = shape_of(p, &p->conv[k], s, b);
        TRY(relu_backward_cuda(t->d, t->dy, t->conv[k].y, c.B * c.M * c.h * c.w));
        TRY(conv_input_cuda(t->d, t->dx, &c, t->dy, t->d->row[p->conv[k].weight].weight, &t->memory));
        floatX *keep = t->dy;
        t->dy = t->dx, t->dx = keep;
    }
    return OK;
}

/* dxrec (b,3,H,W) += weight times the gradient of the distances' sum. */
static Err vgg_backward_cuda(Perceptual *p, size_t b, double weight, real *dxrec) {
    PerceptualTwin *t = p->twin;
    const size_t pixels = b * 3 * p->H * p->W;
    for (size_t s = PERCEPTUAL_STAGES; s-- > 0;) {
        if (s + 1 < PERCEPTUAL_STAGES) {
            TRY(pool_backward_cuda(t->d, t->dx, t->dy, end_of(p, s), b, p->H >> s, p->W >> s, p->c.width[s]));
            floatX *keep = t->dy;
            t->dy = t->dx, t->dx = keep;
        }
        TRY(compare_cuda(p, s, b, weight, t->dy));
        TRY(stage_backward_cuda(p, s, b));
    }
    LAUNCH(t->d, scale_gradient_kernel, blocks_for(pixels, CELL_THREADS), CELL_THREADS, 0, t->planes, t->dy,
           input_scaling(), pixels, p->H * p->W);
    TRY(to_host(t->d, t->back, t->planes, pixels * sizeof *t->back));
    for (size_t i = 0; i < pixels; i++) dxrec[i] += t->back[i];
    return OK;
}

static Err add_distances(Perceptual *p, size_t b, double *sum) {
    double sums[PERCEPTUAL_STAGES * SUM_BLOCKS];
    TRY(to_host(p->twin->d, sums, p->twin->sums, sizeof sums));
    for (size_t s = PERCEPTUAL_STAGES; s-- > 0;) {
        const size_t hw = (p->H >> s) * (p->W >> s), blocks = sum_blocks(b * hw, CELL_THREADS / WARP);
        for (size_t k = 0; k < blocks; k++) *sum += sums[s * SUM_BLOCKS + k] / (double)hw;
    }
    return OK;
}

static Err perceptual_cuda(Perceptual *p, const real *x, const real *xrec, size_t B, double weight, double *loss,
                           real *dxrec) {
    const size_t pixels = 3 * p->H * p->W;
    double sum = 0;
    TRY(order_vgg(p));
    for (size_t i = 0; i < B; i += p->b) {
        const size_t b = min_size(p->b, B - i), at = i * pixels;
        TRY(put_pictures(p, p->twin->pooled[0], xrec + at, b));
        TRY(put_pictures(p, p->twin->pooled[0] + b * pixels, x + at, b));
        TRY(vgg_forward_cuda(p, b));
        if (dxrec)
            TRY(vgg_backward_cuda(p, b, weight / (double)B, dxrec + at));
        else
            for (size_t s = 0; s < PERCEPTUAL_STAGES; s++) TRY(compare_cuda(p, s, b, 0, NULL));
        TRY(add_distances(p, b, &sum));
    }
    *loss = sum / (double)B;
    return OK;
}

/* ---- The twin: its memory ---- */

static void place_conv_twin(const Perceptual *p, size_t s, size_t k, PerceptualTwin *t) {
    const Conv c = shape_of(p, &p->conv[k], s, 2 * p->b), half = shape_of(p, &p->conv[k], s, p->b);
    conv_needs_cuda(&t->memory, &c, 0);
    if (p->backward) conv_needs_cuda(&t->memory, &half, 2);
    carve(&t->arena, &t->conv[k].ordered, ordered_weight_size(&c), sizeof(floatX));
    carve(&t->arena, &t->conv[k].y, c.B * c.M * c.h * c.w, sizeof(floatX));
}

static void place_perceptual_twin(const Perceptual *p, PerceptualTwin *t) {
    const size_t pixels = 3 * p->H * p->W;
    size_t largest = pixels;
    t->arena.used = 0;
    for (size_t s = 0; s < PERCEPTUAL_STAGES; s++) {
        const size_t hw = (p->H >> s) * (p->W >> s), C = s ? p->c.width[s - 1] : 3;
        carve(&t->arena, &t->pooled[s], 2 * p->b * C * hw, sizeof(floatX));
        for (size_t k = p->first[s]; k < p->first[s + 1]; k++) place_conv_twin(p, s, k, t);
        largest = max_size(largest, max_size(C, p->c.width[s]) * hw);
    }
    if (p->backward) carve(&t->arena, &t->dy, p->b * largest, sizeof(floatX));
    if (p->backward) carve(&t->arena, &t->dx, p->b * largest, sizeof(floatX));
    carve(&t->arena, &t->planes, p->b * pixels, sizeof *t->planes);
    carve(&t->arena, &t->sums, PERCEPTUAL_STAGES * SUM_BLOCKS, sizeof *t->sums);
    carve(&t->arena, &t->memory.columns, t->memory.column_size, sizeof(floatX));
    carve(&t->arena, &t->memory.weights, t->memory.weight_size, sizeof(floatX));
}

static void perceptual_free_cuda(Perceptual *p) {
    device_free(p->twin->arena.base);
    free(p->twin->back);
    free(p->twin);
    p->twin = NULL;
}

/* p->b, H and W are there. *bytes: of everything. */
static Err perceptual_plan_cuda(Perceptual *p, int allocate, size_t *bytes) {
    static const char what[] = "perceptual loss: features";
    PerceptualTwin counted;
    for (size_t s = 0; s < PERCEPTUAL_STAGES; s++)
        if (2 * p->b * p->c.width[s] * (p->H >> s) * (p->W >> s) > (1u << 31))
            return err("perceptual_plan: pictures of %zux%zu are too large", p->H, p->W);
    memset(&counted, 0, sizeof counted);
    place_perceptual_twin(p, &counted);
    *bytes = counted.arena.used;
    if (!allocate) return OK;
    TRY(mem_alloc(&p->twin, 1, sizeof *p->twin, what));
    p->twin->d = p->params.device, p->twin->changes = (uint64_t)-1;
    Err e = mem_alloc(&p->twin->back, p->b * 3 * p->H * p->W, sizeof(real), what);
    if (e == OK) e = device_alloc(&p->twin->arena.base, *bytes, what);
    if (e == OK)
        place_perceptual_twin(p, p->twin);
    else
        perceptual_free_cuda(p);
    return e;
}
