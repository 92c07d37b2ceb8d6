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
#include "kernels/device.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_CONVS = PERCEPTUAL_STAGES * PERCEPTUAL_DEPTH };

/* Of the network's input, by channel: pictures in [-1,1] to what VGG16 was trained on. */
static const double input_shift[3] = {-0.030, -0.088, -0.188}, input_scale[3] = {0.458, 0.448, 0.450};

typedef struct {
    size_t C, M, weight, bias; /* rows of the table */
    real *y;                   /* (2b,M,h,w) after the relu */
} VggConv;

typedef struct PerceptualTwin PerceptualTwin; /* the plan on a GPU */

struct Perceptual {
    PerceptualConfig c;
    Params params;
    VggConv conv[MAX_CONVS];
    size_t first[PERCEPTUAL_STAGES + 1]; /* convolution of each stage; their number */
    size_t lin[PERCEPTUAL_STAGES];       /* rows */
    /* the plan */
    size_t b, H, W; /* pictures at once */
    int backward;
    ConvScratch scratch;
    real *arena, *input;             /* input (2b,3,H,W) */
    real *pooled[PERCEPTUAL_STAGES]; /* (2b,C,h,w) what the first convolution of a stage reads; [0] is the input */
    real *dy, *dx;                   /* gradients of xrec's half, taking turns */
    double *sums;                    /* of blocks of cells */
    PerceptualTwin *twin;            /* NULL on the CPU; then the arena stays empty */
};

static Conv shape_of(const Perceptual *p, const VggConv *l, size_t stage, size_t pictures) {
    const Conv c = {CONV3, pictures, l->C, l->M, p->H >> stage, p->W >> stage};
    return c;
}

#ifndef DEVICE_CODE

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
    memset(&p->scratch, 0, sizeof p->scratch);
    p->scratch.threads = (size_t)threads_get();
    TRY(place(p, &p->input, reals, n * largest));
    p->pooled[0] = p->input;
    for (size_t s = 0; s < STAGES; s++) {
        const size_t hw = (p->H >> s) * (p->W >> s);
        if (s) TRY(place(p, &p->pooled[s], reals, n * p->c.width[s - 1] * hw));
        for (size_t k = p->first[s]; k < p->first[s + 1]; k++) {
            const Conv c = shape_of(p, &p->conv[k], s, n), half = shape_of(p, &p->conv[k], s, p->b);
            TRY(place(p, &p->conv[k].y, reals, n * c.M * hw));
            conv_needs(&p->scratch, &c, 0);
            if (p->backward) conv_needs(&p->scratch, &half, 2);
            largest = max_size(largest, c.M * hw);
        }
        if (s) largest = max_size(largest, p->c.width[s - 1] * hw);
    }
    if (p->backward) TRY(place(p, &p->dy, reals, p->b * largest));
    if (p->backward) TRY(place(p, &p->dx, reals, p->b * largest));
    TRY(place(p, &shared, reals, conv_scratch_reals(&p->scratch)));
    if (shared) conv_scratch_place(&p->scratch, shared);
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
            conv_forward(l->y, &c, x, p->params.row[l->weight].value, p->params.row[l->bias].value, NULL, &p->scratch);
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
        conv_backward(p->dx, NULL, NULL, &c, p->dy, NULL, p->params.row[l->weight].value, 0, &p->scratch);
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

#else

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
#endif
