/* perceptual.c - how different two pictures look: LPIPS (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep
 * Features as a Perceptual Metric"), as the training of official VQGANs weighs it into their loss (SPEC section 9).
 *
 *     (picture - shift) / scale -> [conv, relu]*2 -> tap 0 -> pool -> [conv, relu]*2 -> tap 1 -> pool -> ... -> tap 4
 *     LPIPS(x, xrec) = sum over taps of the mean over positions of  sum over channels of  lin (a/|a| - r/|r|)^2
 *                      a, r: the features of x and of xrec at a position of the tap
 *
 * Owns: a VGG16 whose weights are frozen, its walk with both pictures, the comparison of their features, and the gradient
 * with respect to xrec. No gradients of weights are formed. Refuses: weight files that lack a tensor.
 *
 * xrec and x go through the network side by side, as one batch: xrec first. A few pictures at a time, so that memory does
 * not grow with the batch; a picture has the same bits alone and in company, so it does not matter how many. Values are
 * (B,C,h,w); on a GPU (B,h,w,C). The convolutions are vqgan.c's.
 *
 * Read in this order: the layers; the walk; weights; building; planning. Then first_stage.c, which weighs it. */
#include "base/plan.h"
#include "training/training.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    STAGES = PERCEPTUAL_STAGES,
    MAX_CONVS = PERCEPTUAL_STAGES * PERCEPTUAL_DEPTH,
    AT_ONCE = 256 * 256, /* pixels of x that are in the network at a time, unless a picture has more */
    AT_ONCE_GPU = 8 * AT_ONCE,
    SMALLEST = 1 << (STAGES - 1)
};

/* By channel: pictures in [-1,1] to what VGG16 was trained on */
static const double input_shift[3] = {-0.030, -0.088, -0.188}, input_scale[3] = {0.458, 0.448, 0.450};

/* ---- The layers ---- */

/* put_scaled   x = (picture - shift) / scale     pictures (B,3,hw), the caller's -> x (B,3,hw), where it computes
 * get_scaled   dpicture = dx / scale             back */
static void put_scaled(const Compute *on, real *x, const real *pictures, size_t B, size_t hw) {
    if (on->device) return on->fast->put_scaled(on, x, pictures, input_shift, input_scale, B, hw);
    for (size_t i = 0; i < B * 3 * hw; i++)
        x[i] = (pictures[i] - (real)input_shift[i / hw % 3]) / (real)input_scale[i / hw % 3];
}
static Err get_scaled(const Compute *on, real *dpictures, const real *dx, size_t B, size_t hw) {
    if (on->device) return on->fast->get_scaled(on, dpictures, dx, input_scale, B, hw);
    for (size_t i = 0; i < B * 3 * hw; i++) dpictures[i] = dx[i] / (real)input_scale[i / hw % 3];
    return OK;
}

/* relu_forward    y = max(y, 0), in place     n numbers
 * relu_backward   dy = dy where y > 0, else 0, in place */
void relu_forward(const Compute *on, real *y, size_t n) {
    if (on->fast) return on->fast->relu_forward(on, y, n);
    for (size_t i = 0; i < n; i++) y[i] = y[i] > 0 ? y[i] : 0;
}
void relu_backward(const Compute *on, real *dy, const real *y, size_t n) {
    if (on->fast) return on->fast->relu_backward(on, dy, y, n);
    for (size_t i = 0; i < n; i++) dy[i] = y[i] > 0 ? dy[i] : 0;
}

/* Place of the largest of the 2x2 pixels that pixel i of the smaller planes covers, the first of them if there are
 * several. x (planes,h,w) */
static size_t largest_of(const real *x, size_t i, size_t h, size_t w) {
    const size_t oh = h / 2, ow = w / 2, corner = (i / ow / oh * h + i / ow % oh * 2) * w + i % ow * 2;
    size_t most = corner;
    for (size_t k = 1; k < 4; k++)
        if (x[corner + k / 2 * w + k % 2] > x[most]) most = corner + k / 2 * w + k % 2;
    return most;
}

/* pool_forward    y = the largest of every 2x2 pixels     x (B,C,h,w) -> y (B,C,h/2,w/2)
 * pool_backward   dx = dy at the first of the largest, 0 at the others. A last odd row or column is left out. */
void pool_forward(const Compute *on, real *y, const real *x, size_t B, size_t C, size_t h, size_t w) {
    if (on->fast) return on->fast->pool_forward(on, y, x, B, C, h, w);
    for (size_t i = 0; i < B * C * (h / 2) * (w / 2); i++) y[i] = x[largest_of(x, i, h, w)];
}
void pool_backward(const Compute *on, real *dx, const real *dy, const real *x, size_t B, size_t C, size_t h, size_t w) {
    if (on->fast) return on->fast->pool_backward(on, dx, dy, x, B, C, h, w);
    memset(dx, 0, B * C * h * w * sizeof *dx);
    for (size_t i = 0; i < B * C * (h / 2) * (w / 2); i++) dx[largest_of(x, i, h, w)] = dy[i];
}

/* compare_features   At each position, with |a| = root of the sum over channels of a^2:
 *     d = a/|a| - r/|r|     distance = sum over channels of lin d^2
 *     dr = or += weight * d distance/dr = -2 weight/|r| (lin d - r/|r|^2 * sum over channels of lin d r)
 *   sums: of distances, comparison_sums of them     dr, a, r (B,C,hw); dr may be NULL     lin (C)
 * |a| and |r| get 1e-10 where they divide; where a is 0 in all channels, so is a/|a|. Where r is 0 in all channels
 * its direction has no gradient. d is computed as (a-r)/|a| + r (1/|a| - 1/|r|), which is exactly 0 for equal
 * features. All in double, for what is alike cancels out. */
void compare_features(const Compute *on, double *sums, real *dr, const real *a, const real *r, const real *lin,
                      const TapShape *c) {
    if (on->fast) return on->fast->compare_features(on, sums, dr, a, r, lin, c);
    for (size_t i = 0; i < c->B * c->hw; i++) {
        const size_t b = i / c->hw, at = b * c->C * c->hw + i % c->hw, end = at + c->C * c->hw;
        double aa = 0, rr = 0, distance = 0, along = 0;
        for (size_t k = at; k < end; k += c->hw) {
            aa += (double)a[k] * (double)a[k];
            rr += (double)r[k] * (double)r[k];
        }
        const double by_a = aa > 0 ? 1 / (sqrt(aa) + 1e-10) : 0, by_r = 1 / (sqrt(rr) + 1e-10);
        for (size_t k = at; k < end; k += c->hw) {
            const double d = ((double)a[k] - (double)r[k]) * by_a + (double)r[k] * (by_a - by_r);
            distance += (double)lin[(k - at) / c->hw] * d * d;
            along += (double)lin[(k - at) / c->hw] * d * (double)r[k];
        }
        sums[b] = (i % c->hw ? sums[b] : 0) + distance;
        for (size_t k = at; dr && k < end; k += c->hw) {
            const double d = ((double)a[k] - (double)r[k]) * by_a + (double)r[k] * (by_a - by_r);
            const double turn = rr > 0 ? (double)r[k] * along * by_r / sqrt(rr) : 0;
            dr[k] = (c->accumulate ? dr[k] : 0) +
                    (real)(-2 * c->weight * by_r * ((double)lin[(k - at) / c->hw] * d - turn));
        }
    }
}

size_t comparison_sums(const Compute *on, size_t B, size_t hw) {
    return on->fast ? on->fast->comparison_sums(B, hw) : B;
}

/* ---- The walk over 2b pictures, the first b of xrec ---- */

typedef struct {
    size_t C, M, weight, bias; /* channels; rows of the table */
    real *y;                   /* (2b,M,h,w) after the relu */
    void *prepared;            /* a GPU: the weights as convolutions read them */
} VggConv;

struct Perceptual {
    PerceptualConfig c;
    Params params;
    VggConv conv[MAX_CONVS];
    size_t first[STAGES + 1]; /* convolution of each stage; their number */
    size_t lin[STAGES];       /* rows */
    /* the plan */
    Compute on;
    void *memory;               /* of all that follows but `back` and `host_sums` */
    size_t b, H, W;             /* pictures of x at once */
    int backward;               /* there is room for the gradient */
    real *input[STAGES];        /* (2b,C,h,w) what a stage reads */
    real *dy, *dx;              /* (b,..) gradients of xrec's half, taking turns */
    double *sums;               /* of distances, */
    size_t sums_at[STAGES + 1]; /* those of each stage; their number */
    uint64_t changes;           /* compute_changes when the weights were prepared */
    real *back;                 /* (b,3,H,W) the host's: the gradient, before it is added to the caller's */
    double *host_sums;
};

static size_t positions(const Perceptual *p, size_t stage) {
    return (p->H >> stage) * (p->W >> stage);
}

static Conv shape_of(const Perceptual *p, const VggConv *l, size_t stage, size_t pictures) {
    return (Conv){.kind = CONV3,
                  .B = pictures,
                  .C = l->C,
                  .M = l->M,
                  .h = p->H >> stage,
                  .w = p->W >> stage,
                  .prepared = l->prepared};
}

/* Features of xrec at the end of a stage; those of x are b pictures further on. */
static real *tap_of(const Perceptual *p, size_t stage) {
    return p->conv[p->first[stage + 1] - 1].y;
}

/* What b pictures' features at the end of a stage say: `weight` times the gradient goes to dr, unless NULL. */
static void compare_stage(Perceptual *p, size_t stage, size_t b, double weight, real *dr) {
    const size_t C = p->c.width[stage], hw = positions(p, stage);
    const TapShape c = {b, C, hw, weight / (double)hw, stage + 1 < STAGES};
    const real *r = tap_of(p, stage), *a = (const real *)(const void *)((const char *)r + b * C * hw * p->on.unit);
    compare_features(&p->on, p->sums + p->sums_at[stage], dr, a, r, param_value(&p->params, p->lin[stage]), &c);
}

/* compare: at once, for there will be no backward. */
static void run_forward(Perceptual *p, size_t b, int compare) {
    for (size_t s = 0; s < STAGES; s++) {
        const real *x = p->input[s];
        for (size_t k = p->first[s]; k < p->first[s + 1]; x = p->conv[k++].y) {
            const VggConv *l = &p->conv[k];
            const Conv c = shape_of(p, l, s, 2 * b);
            conv_forward(&p->on, l->y, x, param_value(&p->params, l->weight), param_value(&p->params, l->bias), NULL,
                         &c);
            relu_forward(&p->on, l->y, c.B * c.M * c.h * c.w);
        }
        if (compare) compare_stage(p, s, b, 0, NULL);
        if (s + 1 < STAGES) pool_forward(&p->on, p->input[s + 1], x, 2 * b, p->c.width[s], p->H >> s, p->W >> s);
    }
}

static void swap_gradients(Perceptual *p) {
    real *const keep = p->dy;
    p->dy = p->dx, p->dx = keep;
}

/* p->dy: before, the gradient of what stage s writes; afterwards, of what it reads. */
static void stage_backward(Perceptual *p, size_t s, size_t b) {
    for (size_t k = p->first[s + 1]; k-- > p->first[s];) {
        const VggConv *l = &p->conv[k];
        const Conv c = shape_of(p, l, s, b);
        relu_backward(&p->on, p->dy, l->y, c.B * c.M * c.h * c.w);
        conv_backward(&p->on, p->dx, NULL, NULL, p->dy, NULL, param_value(&p->params, l->weight), 0, &c);
        swap_gradients(p);
    }
}

/* p->dy = weight times the gradient of the distances' sum with respect to the network's input */
static void run_backward(Perceptual *p, size_t b, double weight) {
    for (size_t s = STAGES; s-- > 0;) {
        if (s + 1 < STAGES) {
            pool_backward(&p->on, p->dx, p->dy, tap_of(p, s), b, p->c.width[s], p->H >> s, p->W >> s);
            swap_gradients(p);
        }
        compare_stage(p, s, b, weight, p->dy);
        stage_backward(p, s, b);
    }
}

/* *sum += the distances of b pictures */
static Err add_distances(Perceptual *p, size_t b, double *sum) {
    double part = 0;
    TRY(compute_get(&p->on, p->host_sums, p->sums, p->sums_at[STAGES] * sizeof *p->sums));
    for (size_t s = STAGES; s-- > 0;) {
        double stage = 0;
        for (size_t i = 0; i < comparison_sums(&p->on, b, positions(p, s)); i++)
            stage += p->host_sums[p->sums_at[s] + i];
        part += stage / (double)positions(p, s);
    }
    *sum += part;
    return OK;
}

/* On a GPU: the weights in the order that convolutions read, once after they were sent. */
static void prepare_weights(Perceptual *p) {
    if (!p->on.device || p->changes == compute_changes(&p->on)) return;
    for (size_t s = 0; s < STAGES; s++)
        for (size_t k = p->first[s]; k < p->first[s + 1]; k++) {
            const Conv c = shape_of(p, &p->conv[k], s, 1);
            p->on.fast->conv_prepare(&p->on, c.prepared, param_value(&p->params, p->conv[k].weight), &c);
        }
    p->changes = compute_changes(&p->on);
}

/* b pictures: *sum += their distances; dxrec += weight times the gradient, unless NULL. */
static Err compare_pictures(Perceptual *p, const real *x, const real *xrec, size_t b, double weight, double *sum,
                            real *dxrec) {
    const size_t hw = p->H * p->W, pixels = b * 3 * hw;
    real *const input = p->input[0];
    put_scaled(&p->on, input, xrec, b, hw);
    put_scaled(&p->on, (real *)(void *)((char *)input + pixels * p->on.unit), x, b, hw);
    run_forward(p, b, !dxrec);
    if (dxrec) {
        run_backward(p, b, weight);
        TRY(get_scaled(&p->on, p->back, p->dy, b, hw));
        for (size_t i = 0; i < pixels; i++) dxrec[i] += p->back[i];
    }
    return add_distances(p, b, sum);
}

Err perceptual_loss(Perceptual *p, const real *x, const real *xrec, size_t B, size_t H, size_t W, double weight,
                    double *loss, real *dxrec) {
    double sum = 0;
    if (!p->memory) return err("perceptual_loss: call perceptual_plan first");
    TRY(params_there(&p->params, "perceptual_loss"));
    if (B == 0 || H != p->H || W != p->W)
        return err("perceptual_loss: %zu pictures of %zux%zu; planned for %zux%zu", B, H, W, p->H, p->W);
    if (dxrec && !p->backward) return err("perceptual_loss: planned without the gradient");
    prepare_weights(p);
    for (size_t i = 0; i < B; i += p->b) {
        const size_t b = min_size(p->b, B - i), at = i * 3 * H * W;
        TRY(compare_pictures(p, x + at, xrec + at, b, weight / (double)B, &sum, dxrec ? dxrec + at : NULL));
    }
    *loss = sum / (double)B;
    return compute_status(&p->on);
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

/* ---- Building ---- */

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
    compute_free(&p->on, p->memory);
    free(p->back);
    free(p->host_sums);
    p->memory = NULL, p->back = NULL, p->host_sums = NULL;
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

Err perceptual_use_cuda(Perceptual *p, Precision precision) {
    return use_cuda(&p->params, precision);
}

/* ---- Planning. Steps are convolutions: n forward, then n backward. ---- */

/* The values of convolution k, the scratch that it needs; *largest: of a picture's values. */
static void plan_conv(Perceptual *p, size_t stage, size_t k, Plan *plan, size_t *largest) {
    VggConv *l = &p->conv[k];
    const Conv c = shape_of(p, l, stage, 2 * p->b), half = shape_of(p, l, stage, p->b);
    const size_t n = p->first[STAGES], last = p->backward ? 2 * n - 1 - k : k + 1;
    conv_needs(&p->on, &c, 0);
    if (p->backward) conv_needs(&p->on, &half, 2);
    if (p->on.device) plan_add(plan, &l->prepared, p->on.fast->conv_prepared_bytes(&c), 1, 0, PLAN_END);
    plan_add(plan, &l->y, c.B * c.M * c.h * c.w, p->on.unit, k, last);
    *largest = max_size(*largest, max_size(c.C, c.M) * c.h * c.w);
}

static void plan_values(Perceptual *p, Plan *plan) {
    const size_t n = p->first[STAGES];
    size_t largest = 0;
    p->sums_at[0] = 0;
    for (size_t s = 0; s < STAGES; s++) {
        const size_t C = p->conv[p->first[s]].C, hw = positions(p, s);
        plan_add(plan, &p->input[s], 2 * p->b * C * hw, p->on.unit, max_size(p->first[s], 1) - 1, p->first[s]);
        for (size_t k = p->first[s]; k < p->first[s + 1]; k++) plan_conv(p, s, k, plan, &largest);
        p->sums_at[s + 1] = p->sums_at[s] + comparison_sums(&p->on, p->b, hw);
    }
    plan_add(plan, &p->sums, p->sums_at[STAGES], sizeof *p->sums, 0, PLAN_END);
    if (p->backward) plan_add(plan, &p->dy, p->b * largest, p->on.unit, n, PLAN_END);
    if (p->backward) plan_add(plan, &p->dx, p->b * largest, p->on.unit, n, PLAN_END);
    if (p->on.device) compute_needs(&p->on, p->b * 3 * p->H * p->W * sizeof(real)); /* of put_scaled */
}

static Err check_size(const Perceptual *p) {
    for (size_t s = 0; s < STAGES; s++)
        if (2 * p->b * p->c.width[s] * positions(p, s) > (p->on.device ? (size_t)1 << 31 : SIZE_MAX / 64))
            return err("perceptual_plan: pictures of %zux%zu are too large", p->H, p->W);
    return OK;
}

/* memory NULL: only counted */
static Err plan_memory(Perceptual *p, size_t B, size_t H, size_t W, int backward, void **memory, size_t *bytes) {
    Plan plan = {.what = "perceptual loss: features"};
    drop_plan(p);
    p->on = compute_of(&p->params);
    if (B == 0) return err("perceptual_plan: an empty batch");
    if (H < SMALLEST || W < SMALLEST || H > 1 << 20 || W > 1 << 20)
        return err("perceptual_plan: pictures of %zux%zu, expected %d or more along each side", H, W, SMALLEST);
    p->b = min_size(B, max_size(1, (p->on.device ? AT_ONCE_GPU : AT_ONCE) / (H * W)));
    p->H = H, p->W = W, p->backward = backward, p->changes = (uint64_t)-1;
    TRY(check_size(p));
    plan_values(p, &plan);
    return compute_memory(&p->on, &plan, memory, bytes);
}

Err perceptual_plan_bytes(Perceptual *p, size_t B, size_t H, size_t W, int backward, size_t *bytes) {
    return plan_memory(p, B, H, W, backward, NULL, bytes);
}

Err perceptual_plan(Perceptual *p, size_t B, size_t H, size_t W, int backward) {
    size_t bytes;
    TRY(plan_memory(p, B, H, W, backward, &p->memory, &bytes));
    TRY(mem_alloc(&p->host_sums, p->sums_at[STAGES], sizeof *p->host_sums, "perceptual loss: sums"));
    return backward ? mem_alloc(&p->back, p->b * 3 * H * W, sizeof *p->back, "perceptual loss: gradient") : OK;
}
