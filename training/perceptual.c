/* perceptual.c - how different two pictures look: LPIPS (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep
 * Features as a Perceptual Metric"), as the training of official VQGANs weighs it into their loss (SPEC section 9).
 *
 * Owns: a VGG16 whose weights are frozen, run on both pictures, the comparison of its features, and the gradient with
 * respect to the second picture. No gradients of weights are formed. Refuses: weight files that lack a tensor.
 *
 *     (x - shift) / scale -> [CONV3, relu]*2 -> tap 0 -> pool -> [CONV3, relu]*2 -> tap 1 -> pool -> ... -> tap 4
 *     distance of a tap = mean over cells of  sum over channels of  lin * (a/|a| - r/|r|)^2,  a of x, r of xrec
 *
 * The pictures of x and of xrec go through the network side by side, as one batch: x first. A few at a time, so that
 * memory does not grow with the batch; a picture has the same bits alone and in company, so it does not matter how
 * many.
 *
 * Read in this order: the table of layers; weights; planning; what layers do; comparing taps; the walk; after #else the
 * same on a GPU. */
#include "kernels/perceptual.h"

enum {
    STAGES = PERCEPTUAL_STAGES,
    ALIGN = 64,          /* reals between the starts of two areas */
    CELLS = 256,         /* compared at a time */
    AT_ONCE = 256 * 256, /* pixels of x that are in the network at a time, unless a picture has more */
    AT_ONCE_GPU = 8 * AT_ONCE,
    SMALLEST = 1 << (STAGES - 1)
};

/* ---- The table of layers ---- */

PerceptualConfig perceptual_vgg16(void) {
    return (PerceptualConfig){{64, 128, 256, 512, 512}, {2, 2, 3, 3, 3}};
}

static Err check_config(const PerceptualConfig *c) {
    for (int s = 0; s < STAGES; s++)
        if (c->width[s] < 1 || c->width[s] > 4096 || c->depth[s] < 1 || c->depth[s] > PERCEPTUAL_DEPTH)
            return err("perceptual: stage %d has %zu channels and %zu convolutions, expected 1..4096 and 1..%d", s + 1,
                       c->width[s], c->depth[s], PERCEPTUAL_DEPTH);
    return OK;
}

/* Names count layers as torchvision does: a convolution, its relu and a pool are one each. */
static Err build(Perceptual *p) {
    size_t n = 0, feature = 0, C = 3;
    for (size_t s = 0; s < STAGES; s++) {
        const size_t M = p->c.width[s], lin_dim[4] = {1, M, 1, 1};
        p->first[s] = n;
        for (size_t k = 0; k < p->c.depth[s]; k++, n++, feature += 2, C = M) {
            const size_t dim[4] = {M, C, 3, 3};
            const double bound = 1 / sqrt((double)(C * 9));
            VggConv *l = &p->conv[n];
            l->C = C, l->M = M;
            TRY(params_add(&p->params, &l->weight, INIT_UNIFORM, bound * 2, 0, 4, dim, "net.slice%zu.%zu.weight", s + 1,
                           feature));
            TRY(params_add(&p->params, &l->bias, INIT_UNIFORM, bound, 0, 1, dim, "net.slice%zu.%zu.bias", s + 1,
                           feature));
        }
        feature++; /* the pool */
        TRY(params_add(&p->params, &p->lin[s], INIT_ONE, 0, 0, 4, lin_dim, "lin%zu.model.1.weight", s));
    }
    p->first[STAGES] = n;
    return OK;
}

Err perceptual_create(Perceptual **out, const PerceptualConfig *c) {
    Perceptual *p;
    *out = NULL;
    TRY(check_config(c));
    TRY(mem_alloc(&p, 1, sizeof *p, "perceptual loss"));
    p->c = *c;
    if (build(p) != OK) {
        perceptual_free(p);
        return FAILED;
    }
    *out = p;
    return OK;
}

static void drop_plan(Perceptual *p) {
    if (p->twin) p->params.ops->perceptual_free(p);
    free(p->arena);
    free(p->sums);
    p->arena = NULL, p->sums = NULL, p->twin = NULL;
}

void perceptual_free(Perceptual *p) {
    if (!p) return;
    drop_plan(p);
    params_free(&p->params);
    free(p);
}

Params *perceptual_params(Perceptual *p) {
    return &p->params;
}

/* ---- Weights ---- */

/* What a tensor may be called: alone, within a VQGAN's checkpoint, within torchvision's VGG16. */
enum { ALIASES = 3 };
static void alias(char out[NAME_MAX_BYTES], const char *name, int which) {
    const char *number = strncmp(name, "net.slice", 9) ? NULL : strchr(name + 9, '.');
    if (which == 2 && number)
        snprintf(out, NAME_MAX_BYTES, "features%.100s", number);
    else
        snprintf(out, NAME_MAX_BYTES, "%s%.100s", which == 1 ? "loss.perceptual_loss." : "", name);
}

/* The first of the files that has the row, under any name */
static const Checkpoint *find_row(const Checkpoint *ck, size_t n, const char *row, char name[NAME_MAX_BYTES]) {
    for (size_t i = 0; i < n; i++)
        for (int a = 0; a < ALIASES; a++) {
            alias(name, row, a);
            if (checkpoint_find(&ck[i], name)) return &ck[i];
        }
    return NULL;
}

static Err missing_row(const Checkpoint *ck, size_t n, const char *row) {
    char other[NAME_MAX_BYTES];
    alias(other, row, strncmp(row, "lin", 3) ? 2 : 1);
    return err("%s%s%s: no tensor '%s' (or '%s') there; the perceptual loss needs VGG16's convolutions and LPIPS's lin "
               "layers: vgg16-397923af.pth and vgg.pth, or a VQGAN's .ckpt that has both",
               ck[0].path, n > 1 ? ", " : "", n > 1 ? ck[1].path : "", row, other);
}

/* Files of LPIPS carry shift and scale, which must be the ones that are compiled in here. */
static Err check_scaling(const Checkpoint *ck) {
    static const char *const names[2] = {"scaling_layer.shift", "scaling_layer.scale"};
    const size_t dim[4] = {1, 3, 1, 1};
    for (int k = 0; k < 2; k++)
        for (int a = 0; a < 2; a++) {
            char name[NAME_MAX_BYTES];
            real x[3];
            alias(name, names[k], a);
            if (!checkpoint_find(ck, name)) continue;
            TRY(checkpoint_reals(ck, name, 4, dim, 3, x));
            for (int i = 0; i < 3; i++)
                if (!(fabs((double)x[i] - (k ? input_scale : input_shift)[i]) < 1e-3))
                    return err("%s: tensor '%s' element %d is %g, expected LPIPS's %g", ck->path, name, i, (double)x[i],
                               (k ? input_scale : input_shift)[i]);
        }
    return OK;
}

Err perceptual_load(Perceptual *p, const Checkpoint *ck, size_t n) {
    TRY(params_plan(&p->params, PLAN_VALUE));
    for (size_t i = 0; i < n; i++) TRY(check_scaling(&ck[i]));
    for (size_t i = 0; i < p->params.n; i++) {
        const Param *row = &p->params.row[i];
        char name[NAME_MAX_BYTES];
        const Checkpoint *from = find_row(ck, n, row->name, name);
        if (!from) return missing_row(ck, n, row->name);
        TRY(checkpoint_reals(from, name, row->ndim, row->dim, row->size, row->value));
        for (size_t k = 0; k < row->size; k++)
            if (!isfinite(row->value[k]))
                return err("%s: tensor '%s' element %zu is %g", from->path, name, k, (double)row->value[k]);
    }
    return OK;
}

/* ---- Planning ---- */

/* Gives *area n reals behind the others; without an arena it only counts. */
static Err place(Perceptual *p, real **area, size_t *at, size_t n) {
    if (n > SIZE_MAX / sizeof(real) / 4 || *at > SIZE_MAX / sizeof(real) / 4)
        return err("perceptual_plan: pictures of %zux%zu are too large", p->H, p->W);
    *area = p->arena ? p->arena + *at : NULL;
    *at += round_up(n, ALIGN);
    return OK;
}

static Err lay_out(Perceptual *p, size_t *reals) {
    const size_t n = 2 * p->b;
    size_t largest = 3 * p->H * p->W;
    real *shared = NULL;
    *reals = 0;
    p->on = compute_of(&p->params);
    TRY(place(p, &p->input, reals, n * largest));
    p->pooled[0] = p->input;
    for (size_t s = 0; s < STAGES; s++) {
        const size_t hw = (p->H >> s) * (p->W >> s);
        if (s) TRY(place(p, &p->pooled[s], reals, n * p->c.width[s - 1] * hw));
        for (size_t k = p->first[s]; k < p->first[s + 1]; k++) {
            const Conv c = shape_of(p, &p->conv[k], s, n), half = shape_of(p, &p->conv[k], s, p->b);
            TRY(place(p, &p->conv[k].y, reals, n * c.M * hw));
            conv_needs(&p->on, &c, 0);
            if (p->backward) conv_needs(&p->on, &half, 2);
            largest = max_size(largest, c.M * hw);
        }
        if (s) largest = max_size(largest, p->c.width[s - 1] * hw);
    }
    if (p->backward) TRY(place(p, &p->dy, reals, p->b * largest));
    if (p->backward) TRY(place(p, &p->dx, reals, p->b * largest));
    TRY(place(p, &shared, reals, ceil_div(p->on.scratch_bytes, sizeof(real))));
    p->on.scratch = shared;
    return OK;
}

Err perceptual_plan_bytes(Perceptual *p, size_t B, size_t H, size_t W, int backward, size_t *bytes) {
    drop_plan(p);
    if (B == 0) return err("perceptual_plan: an empty batch");
    if (H < SMALLEST || W < SMALLEST || H > 1 << 20 || W > 1 << 20)
        return err("perceptual_plan: pictures of %zux%zu, expected %d or more along each side", H, W, SMALLEST);
    p->b = min_size(B, max_size(1, (p->params.ops ? AT_ONCE_GPU : AT_ONCE) / (H * W)));
    p->H = H, p->W = W, p->backward = backward;
    if (p->params.ops) return p->params.ops->perceptual_plan(p, 0, bytes);
    TRY(lay_out(p, bytes));
    return size_mul(bytes, *bytes, sizeof(real));
}

Err perceptual_plan(Perceptual *p, size_t B, size_t H, size_t W, int backward) {
    size_t bytes;
    TRY(perceptual_plan_bytes(p, B, H, W, backward, &bytes));
    if (p->params.ops) return p->params.ops->perceptual_plan(p, 1, &bytes);
    TRY(mem_alloc(&p->sums, p->b * ceil_div(H * W, CELLS), sizeof *p->sums, "perceptual loss: sums"));
    TRY(mem_alloc(&p->arena, bytes, 1, "perceptual loss: features"));
    return lay_out(p, &bytes);
}

/* ---- What layers do. Tasks are planes: a channel of a picture. ---- */

typedef struct {
    real *to, *kept; /* kept: what a backward reads again */
    const real *from;
    size_t h, w; /* of the larger planes */
} Planes;

static void relu_task(void *context, size_t plane) {
    const Planes *a = (const Planes *)context;
    const size_t hw = a->h * a->w;
    real *y = a->to + plane * hw;
    for (size_t i = 0; i < hw; i++) y[i] = y[i] > 0 ? y[i] : 0;
}

/* dy *= y > 0 */
static void relu_backward_task(void *context, size_t plane) {
    const Planes *a = (const Planes *)context;
    const size_t hw = a->h * a->w;
    real *dy = a->to + plane * hw;
    const real *y = a->kept + plane * hw;
    for (size_t i = 0; i < hw; i++) dy[i] = y[i] > 0 ? dy[i] : 0;
}

/* The largest of every 2x2 cells; a last odd row or column is left out. */
static void pool_task(void *context, size_t plane) {
    const Planes *a = (const Planes *)context;
    const size_t oh = a->h / 2, ow = a->w / 2;
    for (size_t y = 0; y < oh; y++) {
        const real *up = a->from + plane * a->h * a->w + 2 * y * a->w, *down = up + a->w;
        real *to = a->to + (plane * oh + y) * ow;
        for (size_t x = 0; x < ow; x++) {
            const real top = up[2 * x] > up[2 * x + 1] ? up[2 * x] : up[2 * x + 1];
            const real bottom = down[2 * x] > down[2 * x + 1] ? down[2 * x] : down[2 * x + 1];
            to[x] = top > bottom ? top : bottom;
        }
    }
}

/* to = gradient of the larger plane: that of each 2x2 cells goes to the first of the largest. */
static void pool_backward_task(void *context, size_t plane) {
    const Planes *a = (const Planes *)context;
    const size_t oh = a->h / 2, ow = a->w / 2;
    real *to = a->to + plane * a->h * a->w;
    memset(to, 0, a->h * a->w * sizeof *to);
    for (size_t y = 0; y < oh; y++)
        for (size_t x = 0; x < ow; x++) {
            const size_t cell[4] = {2 * y * a->w + 2 * x, 2 * y * a->w + 2 * x + 1, (2 * y + 1) * a->w + 2 * x,
                                    (2 * y + 1) * a->w + 2 * x + 1};
            const real *kept = a->kept + plane * a->h * a->w;
            size_t most = cell[0];
            for (int k = 1; k < 4; k++)
                if (kept[cell[k]] > kept[most]) most = cell[k];
            to[most] = a->from[(plane * oh + y) * ow + x];
        }
}

/* ---- Comparing the features of a tap ---- */

typedef struct {
    const real *a, *r, *lin; /* (b,C,hw) of x, of xrec; (C) */
    real *dr;                /* (b,C,hw) +=, or NULL */
    size_t C, hw, blocks;    /* blocks of cells in a picture */
    double weight;           /* of a cell's distance in the loss */
    double *sums;            /* (b,blocks) of distances */
} Tap;

/* Block `task % blocks` of picture task / blocks. Where all features of xrec are 0 the direction has no gradient. */
static void tap_task(void *context, size_t task) {
    const Tap *t = (const Tap *)context;
    const size_t begin = task % t->blocks * CELLS, n = min_size(CELLS, t->hw - begin);
    const size_t at = task / t->blocks * t->C * t->hw + begin;
    double in_a[CELLS] = {0}, in_r[CELLS] = {0}, along[CELLS] = {0}, sum[CELLS] = {0}, total = 0;
    for (size_t c = 0; c < t->C; c++) {
        const real *a = t->a + at + c * t->hw, *r = t->r + at + c * t->hw;
        for (size_t i = 0; i < n; i++) in_a[i] += (double)a[i] * (double)a[i], in_r[i] += (double)r[i] * (double)r[i];
    }
    for (size_t i = 0; i < n; i++) in_a[i] = 1 / (sqrt(in_a[i]) + 1e-10);
    double length[CELLS], gap[CELLS]; /* a/|a| - r/|r| = (a-r)/|a| + r gap, which is exactly 0 for equal ones */
    for (size_t i = 0; i < n; i++) {
        length[i] = sqrt(in_r[i]);
        in_r[i] = 1 / (length[i] + 1e-10);
        gap[i] = in_a[i] - in_r[i];
    }
    for (size_t c = 0; c < t->C; c++) {
        const real *a = t->a + at + c * t->hw, *r = t->r + at + c * t->hw;
        const double lin = (double)t->lin[c];
        for (size_t i = 0; i < n; i++) {
            const double d = ((double)a[i] - (double)r[i]) * in_a[i] + (double)r[i] * gap[i];
            sum[i] += lin * d * d;
            along[i] += lin * d * (double)r[i];
        }
    }
    for (size_t i = 0; i < n; i++) total += sum[i];
    t->sums[task] = total;
    if (!t->dr) return;
    for (size_t i = 0; i < n; i++) along[i] *= length[i] > 0 ? in_r[i] / length[i] : 0;
    for (size_t c = 0; c < t->C; c++) {
        const real *a = t->a + at + c * t->hw, *r = t->r + at + c * t->hw;
        real *dr = t->dr + at + c * t->hw;
        const double lin = (double)t->lin[c];
        for (size_t i = 0; i < n; i++) {
            const double d = ((double)a[i] - (double)r[i]) * in_a[i] + (double)r[i] * gap[i];
            dr[i] += (real)(-2 * t->weight * in_r[i] * (lin * d - (double)r[i] * along[i]));
        }
    }
}

/* Sum over b pictures of the distance at the end of stage s; dr (b,C,h,w) += weight times its gradient. */
static double compare(Perceptual *p, size_t s, size_t b, double weight, real *dr) {
    const VggConv *l = &p->conv[p->first[s + 1] - 1];
    const size_t hw = (p->H >> s) * (p->W >> s), blocks = ceil_div(hw, CELLS);
    Tap t = {l->y,   l->y + b * l->M * hw, p->params.row[p->lin[s]].value, dr, l->M, hw, blocks, weight / (double)hw,
             p->sums};
    double sum = 0;
    parallel_for(threads_free(), b * blocks, tap_task, &t);
    for (size_t i = 0; i < b * blocks; i++) sum += p->sums[i];
    return sum / (double)hw;
}

/* ---- The walk over 2b pictures, the first b of x ---- */

static void put_input(Perceptual *p, real *to, const real *images, size_t b) {
    const size_t hw = p->H * p->W;
    for (size_t i = 0; i < b * 3; i++)
        for (size_t k = 0; k < hw; k++)
            to[i * hw + k] = (images[i * hw + k] - (real)input_shift[i % 3]) / (real)input_scale[i % 3];
}

static void run_forward(Perceptual *p, size_t b) {
    for (size_t s = 0; s < STAGES; s++) {
        const real *x = p->pooled[s];
        for (size_t k = p->first[s]; k < p->first[s + 1]; k++) {
            const VggConv *l = &p->conv[k];
            const Conv c = shape_of(p, l, s, 2 * b);
            Planes relu = {l->y, NULL, NULL, c.h, c.w};
            conv_forward(&p->on, l->y, x, p->params.row[l->weight].value, p->params.row[l->bias].value, NULL, &c);
            parallel_for(threads_free(), c.B * c.M, relu_task, &relu);
            x = l->y;
        }
        if (s + 1 == STAGES) return;
        Planes pool = {p->pooled[s + 1], NULL, x, p->H >> s, p->W >> s};
        parallel_for(threads_free(), 2 * b * p->c.width[s], pool_task, &pool);
    }
}

/* Gradient of what stage s reads: in p->dy before, of its end; in p->dy after. */
static void stage_backward(Perceptual *p, size_t s, size_t b) {
    for (size_t k = p->first[s + 1]; k-- > p->first[s];) {
        const VggConv *l = &p->conv[k];
        const Conv c = shape_of(p, l, s, b);
        Planes relu = {p->dy, l->y + b * c.M * c.h * c.w, NULL, c.h, c.w};
        parallel_for(threads_free(), b * c.M, relu_backward_task, &relu);
        conv_backward(&p->on, p->dx, NULL, NULL, p->dy, NULL, p->params.row[l->weight].value, 0, &c);
        real *keep = p->dy;
        p->dy = p->dx, p->dx = keep;
    }
}

/* Returns the distances' sum; dxrec (b,3,H,W) += weight times its gradient. */
static double run_backward(Perceptual *p, size_t b, double weight, real *dxrec) {
    double sum = 0;
    for (size_t s = STAGES; s-- > 0;) {
        const VggConv *end = &p->conv[p->first[s + 1] - 1];
        const size_t h = p->H >> s, w = p->W >> s, n = b * end->M * h * w;
        if (s + 1 == STAGES)
            memset(p->dx, 0, n * sizeof *p->dx);
        else {
            Planes pool = {p->dx, end->y + n, p->dy, h, w};
            parallel_for(threads_free(), b * end->M, pool_backward_task, &pool);
        }
        real *keep = p->dy;
        p->dy = p->dx, p->dx = keep;
        sum += compare(p, s, b, weight, p->dy);
        stage_backward(p, s, b);
    }
    const size_t hw = p->H * p->W;
    for (size_t i = 0; i < b * 3; i++)
        for (size_t k = 0; k < hw; k++) dxrec[i * hw + k] += p->dy[i * hw + k] / (real)input_scale[i % 3];
    return sum;
}

Err perceptual_loss(Perceptual *p, const real *x, const real *xrec, size_t B, size_t H, size_t W, double weight,
                    double *loss, real *dxrec) {
    if (!p->arena && !p->twin) return err("perceptual_loss: call perceptual_plan first");
    if (!p->params.arena[0]) return err("perceptual_loss: the weights have no values yet");
    if (B == 0 || H != p->H || W != p->W)
        return err("perceptual_loss: %zu pictures of %zux%zu; planned for %zux%zu", B, H, W, p->H, p->W);
    if (dxrec && !p->backward) return err("perceptual_loss: planned without the gradient");
    if (p->twin) return p->params.ops->perceptual_loss(p, x, xrec, B, weight, loss, dxrec);
    double sum = 0;
    for (size_t i = 0; i < B; i += p->b) {
        const size_t b = min_size(p->b, B - i), at = i * 3 * H * W;
        put_input(p, p->input, x + at, b);
        put_input(p, p->input + b * 3 * H * W, xrec + at, b);
        run_forward(p, b);
        if (dxrec)
            sum += run_backward(p, b, weight / (double)B, dxrec + at);
        else
            for (size_t s = STAGES; s-- > 0;) sum += compare(p, s, b, 0, NULL);
    }
    *loss = sum / (double)B;
    return OK;
}

Err perceptual_use_cuda(Perceptual *p, Precision precision) {
    return use_cuda(&p->params, precision);
}
