/* discriminator.c - the first stage's adversary: tells pictures from reconstructions, patch by patch (SPEC section 9;
 * the NLayerDiscriminator of pix2pix, Isola et al. 2017, as taming-transformers trains it).
 *
 * Owns: the network, its parameter table (with batch norm's buffers, as rows that are not trained), running it forward
 * and backward in one allocation, and the adversarial losses. Refuses: pictures too small for its layers.
 *
 *     pictures (B,C,H,W) -> conv, leaky -> [conv, batch norm, leaky] * n_layers -> conv -> logits (B,1,h,w)
 *
 * Every convolution is 4x4 with one zero around, the first n_layers of them at every second cell. Activations are
 * (C,B,h,w), other than everywhere else: so what batch norm sums over is one row, and a convolution of the whole batch
 * one matrix product, weight (M,C*16) times columns (C*16,B*h*w): column i holds the cells that result i sees. Columns
 * are gathered for a tile of rows at a time. Tiles are cut by sizes alone and a task is one channel or one row of the
 * columns, so results do not depend on the number of threads.
 *
 * Read in this order: types; building; planning; convolution; norm and leaky ReLU; public functions; losses; after
 * #else the same on a GPU. */
#include "kernels/device.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    KERNEL = 4, /* cells along each side */
    TAPS = KERNEL * KERNEL,
    MAX_LAYERS = 16 /* n_layers */
};
#define NONE ((size_t)-1)
static const double BATCH_EPS = 1e-5, MOMENTUM = 0.1;
static const real SLOPE = (real)0.2; /* of leaky ReLU below 0 */

typedef struct {
    size_t C, M, stride; /* channels read and written */
    size_t weight, bias; /* rows of the table; bias NONE where a norm follows */
    size_t norm;         /* first of its five rows, or NONE */
    int leaky;
    size_t H, W, h, w, n; /* planned: reads (C,B,H,W), writes (M,B,h,w); n = B*h*w */
    real *y, *a;          /* (M,n) products; what leaves the layer (the same where there is no norm) */
    real *kept;           /* (M,n) another batch's a, for feature matching */
    real *mean, *rstd;    /* (M) of a norm */
} DiscLayer;

typedef struct DiscTwin DiscTwin; /* the plan on a GPU */

struct Discriminator {
    DiscConfig c;
    Params params;
    DiscLayer layer[MAX_LAYERS + 2];
    size_t n_layers;
    size_t B;
    int features;                 /* planned with room for them */
    real *arena, *columns, *g[2]; /* g: gradients of a layer's result, of what it read */
    size_t used;                  /* reals of the arena */
    const real *images;           /* of the last forward; the caller's */
    DiscTwin *twin;               /* NULL on the CPU; then the arena here has the logits alone */
};

#ifndef DEVICE_CODE

enum {
    TILE_REALS = 1 << 20, /* columns of a tile, unless that is less than MIN_COLUMNS */
    MIN_COLUMNS = 256,    /* fewer make poor matrix products */
    FEW = 1 << 16,        /* numbers that are not worth a second thread */
    ALIGN = 64 / sizeof(real)
};

/* ---- Building ---- */

static Err add_norm(Discriminator *d, DiscLayer *l, size_t module) {
    static const char *const buffer[] = {"running_mean", "running_var", "num_batches_tracked"};
    Params *p = &d->params;
    TRY(params_add(p, &l->norm, INIT_ONE, 0.02, 0, 1, &l->M, "loss.discriminator.main.%zu.weight", module));
    TRY(params_add(p, NULL, INIT_ZERO, 0, 0, 1, &l->M, "loss.discriminator.main.%zu.bias", module));
    for (int k = 0; k < 3; k++) {
        size_t row;
        TRY(params_add(p, &row, k == 1 ? INIT_ONE : INIT_ZERO, 0, 0, k < 2, &l->M, "loss.discriminator.main.%zu.%s",
                       module, buffer[k]));
        p->row[row].untrained = 1;
    }
    return OK;
}

/* Convolution i of n_layers + 2; modules are numbered as in the official Sequential. */
static Err add_layer(Discriminator *d, size_t i) {
    const size_t last = d->n_layers - 1, module = i ? 3 * i - 1 : 0;
    DiscLayer *l = &d->layer[i];
    l->C = i ? d->layer[i - 1].M : d->c.in_channels;
    l->M = i == last ? 1 : d->c.ndf << (i < 3 ? i : 3);
    l->stride = i < d->c.n_layers ? 2 : 1;
    l->leaky = i < last;
    l->bias = l->norm = NONE;
    const size_t dim[4] = {l->M, l->C, KERNEL, KERNEL};
    TRY(params_add(&d->params, &l->weight, INIT_NORMAL, 0.02, 0, 4, dim, "loss.discriminator.main.%zu.weight", module));
    if (i && i < last) return add_norm(d, l, module + 1);
    return params_add(&d->params, &l->bias, INIT_UNIFORM, 1 / sqrt((double)(l->C * TAPS)), 0, 1, dim,
                      "loss.discriminator.main.%zu.bias", module);
}

static Err check_size(const char *key, size_t x, size_t hi) {
    return x >= 1 && x <= hi ? OK : err("discriminator: %s is %zu, expected 1..%zu", key, x, hi);
}

Err disc_config_read(DiscConfig *c, const Config *from, const char *prefix) {
    *c = (DiscConfig){3, 64, 3};
    TRY(config_size(&c->in_channels, from, prefix, "disc_in_channels", 1, 1024, 1));
    TRY(config_size(&c->ndf, from, prefix, "disc_ndf", 1, 4096, 1));
    return config_size(&c->n_layers, from, prefix, "disc_num_layers", 1, MAX_LAYERS, 1);
}

Err disc_create(Discriminator **out, const DiscConfig *c) {
    Discriminator *d;
    *out = NULL;
    TRY(check_size("disc_in_channels", c->in_channels, 1024));
    TRY(check_size("disc_ndf", c->ndf, 4096));
    TRY(check_size("disc_num_layers", c->n_layers, MAX_LAYERS));
    TRY(mem_alloc(&d, 1, sizeof *d, "discriminator"));
    d->c = *c;
    d->n_layers = c->n_layers + 2;
    for (size_t i = 0; i < d->n_layers; i++)
        if (add_layer(d, i) != OK) {
            disc_free(d);
            return FAILED;
        }
    *out = d;
    return OK;
}

static void drop_plan(Discriminator *d) {
    if (d->twin) d->params.ops->disc_free(d);
    free(d->arena);
    d->arena = NULL, d->images = NULL, d->twin = NULL;
}

void disc_free(Discriminator *d) {
    if (!d) return;
    drop_plan(d);
    params_free(&d->params);
    free(d);
}

Params *disc_params(Discriminator *d) {
    return &d->params;
}

size_t disc_logits(const Discriminator *d) {
    return d->layer[d->n_layers - 1].n;
}

/* ---- Planning: arrays one after the other, counted first and then placed ---- */

static Err take(Discriminator *d, real **out, size_t rows, size_t n) {
    TRY(size_mul(&n, rows, n));
    if (n > SIZE_MAX / sizeof(real) / 4 || d->used > SIZE_MAX / sizeof(real) / 4)
        return err("discriminator: the batch is too large");
    *out = d->arena ? d->arena + d->used : NULL;
    d->used += round_up(n, ALIGN);
    return OK;
}

static Err cut_layer(DiscLayer *l, size_t B, size_t H, size_t W) {
    l->H = H, l->W = W;
    if (H < 2 || W < 2)
        return err("discriminator: nothing is left of the pictures after so many layers; smaller disc_num_layers or "
                   "larger pictures");
    l->h = (H - 2) / l->stride + 1, l->w = (W - 2) / l->stride + 1;
    TRY(size_mul(&l->n, B, l->h));
    TRY(size_mul(&l->n, l->n, l->w));
    if (l->norm != NONE && l->n < 2) return err("discriminator: batch norm has one cell a channel, expected more");
    return OK;
}

/* Rows of results of a tile */
static size_t tile_rows(const DiscLayer *l) {
    return max_size(max_size(TILE_REALS / (l->C * TAPS), MIN_COLUMNS) / l->w, 1);
}

static Err place(Discriminator *d, size_t B, size_t H, size_t W, int features) {
    size_t columns = 0, widest = 0, tile;
    d->used = 0, d->features = features;
    for (size_t i = 0; i < d->n_layers; i++) {
        DiscLayer *l = &d->layer[i];
        TRY(i ? cut_layer(l, B, l[-1].h, l[-1].w) : cut_layer(l, B, H, W));
        TRY(take(d, &l->a, l->M, l->n));
        widest = max_size(widest, l->M * l->n);
        TRY(size_mul(&tile, l->C * TAPS, min_size(tile_rows(l) * l->w, l->n)));
        columns = max_size(columns, tile);
        l->y = l->a, l->kept = NULL;
        if (features && l->leaky) TRY(take(d, &l->kept, l->M, l->n));
        if (l->norm == NONE) continue;
        TRY(take(d, &l->y, l->M, l->n));
        TRY(take(d, &l->mean, l->M, 1));
        TRY(take(d, &l->rstd, l->M, 1));
    }
    TRY(take(d, &d->g[0], widest, 1));
    TRY(take(d, &d->g[1], widest, 1));
    return take(d, &d->columns, columns, 1);
}

Err disc_plan_bytes(Discriminator *d, size_t B, size_t H, size_t W, int features, size_t *bytes) {
    drop_plan(d);
    d->B = B;
    if (B < 1) return err("discriminator: an empty batch");
    TRY(place(d, B, H, W, features));
    return d->params.ops ? d->params.ops->disc_plan(d, features, 0, bytes) : size_mul(bytes, d->used, sizeof(real));
}

/* Activations there; here what callers see. */
static Err plan_on_gpu(Discriminator *d, int features) {
    size_t bytes;
    TRY(mem_alloc(&d->arena, disc_logits(d), sizeof(real), "discriminator: logits"));
    return d->params.ops->disc_plan(d, features, 1, &bytes);
}

Err disc_plan(Discriminator *d, size_t B, size_t H, size_t W, int features) {
    size_t bytes;
    TRY(disc_plan_bytes(d, B, H, W, features, &bytes));
    if (d->params.ops) return plan_on_gpu(d, features);
    TRY(mem_alloc(&d->arena, d->used, sizeof(real), "discriminator: activations"));
    return place(d, B, H, W, features);
}

/* ---- Convolution ---- */

/* What a layer reads, or the gradient of that: (C,B,H,W), or the caller's pictures (B,C,H,W). */
typedef struct {
    const real *x;
    real *dx;
    size_t channel, picture; /* reals from one to the next */
} Planes;

static Planes planes_of(const Discriminator *d, size_t i, const real *x, real *dx) {
    const DiscLayer *l = &d->layer[i];
    const size_t plane = l->H * l->W;
    const Planes p = {x, dx, i ? d->B * plane : plane, i ? plane : l->C * plane};
    return p;
}

/* Rows row0.. of the B*h rows of results, and their columns (C*16, rows*w) */
typedef struct {
    const DiscLayer *l;
    Planes p;
    real *columns;
    size_t row0, rows;
} Tile;

static int threads_for(size_t numbers) {
    return numbers < FEW ? 1 : threads_free();
}

/* The results of a row whose tap (ky,kx) lies in the plane at row *iy: first..end-1; none when first = end. */
static void taps_inside(const DiscLayer *l, size_t row, size_t tap, size_t *iy, size_t *first, size_t *end) {
    const size_t ky = tap / KERNEL, kx = tap % KERNEL;
    *iy = l->stride * (row % l->h) + ky - 1; /* above the plane: wraps round, and is too large as well */
    *first = kx == 0;
    *end = *iy < l->H && kx <= l->W ? min_size((l->W - kx) / l->stride + 1, l->w) : *first;
    if (*end < *first) *end = *first;
}

/* Row k = 16 c + tap of the columns: cell (stride*y - 1 + ky, stride*x - 1 + kx) of channel c, 0 outside. */
static void gather_task(void *context, size_t k) {
    const Tile *t = (const Tile *)context;
    const DiscLayer *l = t->l;
    const size_t w = l->w, stride = l->stride;
    real *to = t->columns + k * t->rows * w;
    for (size_t r = t->row0; r < t->row0 + t->rows; r++, to += w) {
        size_t iy, first, end;
        taps_inside(l, r, k % TAPS, &iy, &first, &end);
        const real *from = t->p.x + k / TAPS * t->p.channel + r / l->h * t->p.picture;
        if (end > first) from += iy * l->W + stride * first + k % KERNEL - 1;
        memset(to, 0, first * sizeof *to);
        if (stride == 1)
            memcpy(to + first, from, (end - first) * sizeof *to);
        else
            for (size_t x = first; x < end; x++) to[x] = from[2 * (x - first)];
        memset(to + end, 0, (w - end) * sizeof *to);
    }
}

/* The other way, for the gradient: what all taps of channel c hold is added to dx. */
static void scatter_task(void *context, size_t c) {
    const Tile *t = (const Tile *)context;
    const DiscLayer *l = t->l;
    const size_t w = l->w, stride = l->stride;
    for (size_t tap = 0; tap < TAPS; tap++) {
        const real *from = t->columns + (c * TAPS + tap) * t->rows * w;
        for (size_t r = t->row0; r < t->row0 + t->rows; r++, from += w) {
            size_t iy, first, end;
            taps_inside(l, r, tap, &iy, &first, &end);
            if (end == first) continue;
            real *to =
                t->p.dx + c * t->p.channel + r / l->h * t->p.picture + iy * l->W + stride * first + tap % KERNEL - 1;
            if (stride == 1)
                for (size_t x = first; x < end; x++) to[x - first] += from[x];
            else
                for (size_t x = first; x < end; x++) to[2 * (x - first)] += from[x];
        }
    }
}

static Tile tile_at(const Discriminator *d, const DiscLayer *l, const Planes *p, size_t row0) {
    const Tile t = {l, *p, d->columns, row0, min_size(tile_rows(l), d->B * l->h - row0)};
    return t;
}

/* y (M,n) = weight (M,C*16) columns */
static void conv4_forward(const Discriminator *d, const DiscLayer *l, Planes p) {
    const size_t K = l->C * TAPS;
    const real *weight = d->params.row[l->weight].value;
    for (size_t row = 0; row < d->B * l->h; row += tile_rows(l)) {
        Tile t = tile_at(d, l, &p, row);
        const size_t cols = t.rows * l->w;
        parallel_for(threads_for(K * cols), K, gather_task, &t);
        gemm(0, 0, l->M, cols, K, weight, K, t.columns, cols, 0, l->y + row * l->w, l->n);
    }
}

/* From dy (M,n): the gradient of the weight += if `trained`; p.dx, which is zero, unless NULL. */
static void conv4_backward(const Discriminator *d, const DiscLayer *l, Planes p, const real *dy, int trained) {
    const size_t K = l->C * TAPS;
    const Param *weight = &d->params.row[l->weight];
    for (size_t row = 0; row < d->B * l->h; row += tile_rows(l)) {
        Tile t = tile_at(d, l, &p, row);
        const size_t cols = t.rows * l->w;
        const real *g = dy + row * l->w;
        if (trained) {
            parallel_for(threads_for(K * cols), K, gather_task, &t);
            gemm(0, 1, l->M, K, cols, g, l->n, t.columns, cols, 1, weight->grad, K);
        }
        if (!p.dx) continue;
        gemm(1, 0, K, cols, l->M, weight->value, K, g, l->n, 0, t.columns, cols);
        parallel_for(threads_for(K * cols), l->C, scatter_task, &t);
    }
}

/* ---- Bias or batch norm, then leaky ReLU: a task is a channel ---- */

/* sum of (x-a)(y-b), emptied into double every 1024 numbers */
static double sum_products(const real *x, real a, const real *y, real b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i += 1024) {
        const size_t end = min_size(n, i + 1024);
        real part = 0;
#pragma omp simd reduction(+ : part)
        for (size_t j = i; j < end; j++) part += (x[j] - a) * (y[j] - b);
        sum += (double)part;
    }
    return sum;
}

typedef struct {
    Discriminator *d;
    DiscLayer *l;
    real *g; /* (M,n) */
    double feature_weight;
    int flag; /* forward: the buffers follow; backward: parameters get gradients */
} LayerJob;

static real *row_of(const LayerJob *j, size_t row, size_t m) {
    return j->d->params.row[row].value + m;
}

static void measure_channel(const LayerJob *j, size_t m) {
    DiscLayer *l = j->l;
    const real *y = l->y + m * l->n;
    const double mean = sum_reals(y, l->n) / (double)l->n;
    l->mean[m] = (real)mean;
    const double variance = sum_products(y, l->mean[m], y, l->mean[m], l->n) / (double)l->n;
    l->rstd[m] = (real)(1 / sqrt(variance + BATCH_EPS));
    if (!j->flag) return;
    real *running_mean = row_of(j, l->norm + 2, m), *running_var = row_of(j, l->norm + 3, m);
    const double unbiased = variance * (double)l->n / (double)(l->n - 1);
    *running_mean = (real)((1 - MOMENTUM) * (double)*running_mean + MOMENTUM * mean);
    *running_var = (real)((1 - MOMENTUM) * (double)*running_var + MOMENTUM * unbiased);
}

/* a = leaky(scale y + shift) */
static void activate_task(void *context, size_t m) {
    const LayerJob *j = (const LayerJob *)context;
    DiscLayer *l = j->l;
    const real *y = l->y + m * l->n, below = l->leaky ? SLOPE : 1;
    real *a = l->a + m * l->n, mean = 0, scale = 1, shift;
    if (l->norm == NONE) {
        shift = *row_of(j, l->bias, m);
    } else {
        measure_channel(j, m);
        mean = l->mean[m], scale = l->rstd[m] * *row_of(j, l->norm, m), shift = *row_of(j, l->norm + 1, m);
    }
    for (size_t i = 0; i < l->n; i++) {
        const real t = (y[i] - mean) * scale + shift;
        a[i] = t > 0 ? t : below * t;
    }
}

/* In place: from the gradient of a, to which feature matching adds, to that of y */
static void activate_backward_task(void *context, size_t m) {
    const LayerJob *j = (const LayerJob *)context;
    DiscLayer *l = j->l;
    const size_t n = l->n;
    const real *a = l->a + m * n, *y = l->y + m * n, below = l->leaky ? SLOPE : 1;
    real *g = j->g + m * n;
    Param *row = j->d->params.row;
    if (j->feature_weight != 0 && l->leaky) {
        const real *kept = l->kept + m * n, step = (real)(j->feature_weight / (double)(l->M * n));
        for (size_t i = 0; i < n; i++) g[i] += step * (real)((a[i] > kept[i]) - (a[i] < kept[i]));
    }
    for (size_t i = 0; i < n; i++) g[i] *= a[i] > 0 ? 1 : below;
    const double sum = sum_reals(g, n);
    if (l->norm == NONE) {
        if (j->flag) row[l->bias].grad[m] += (real)sum;
        return;
    }
    const real mean = l->mean[m], rstd = l->rstd[m], scale = rstd * *row_of(j, l->norm, m);
    const double along = (double)rstd * sum_products(g, 0, y, mean, n); /* sum of g times the normalised y */
    if (j->flag) row[l->norm].grad[m] += (real)along, row[l->norm + 1].grad[m] += (real)sum;
    const real level = (real)(sum / (double)n), tilt = (real)((double)rstd * along / (double)n);
    for (size_t i = 0; i < n; i++) g[i] = scale * (g[i] - level - tilt * (y[i] - mean));
}

/* ---- Public functions: running it ---- */

Err disc_forward(Discriminator *d, const real *images, int update, const real **logits) {
    if (!d->arena) return err("discriminator: call disc_plan first");
    if (!d->params.row[0].value) return err("discriminator: the parameters have no values yet");
    d->images = images;
    if (d->twin) {
        *logits = d->arena;
        return d->params.ops->disc_forward(d, images, update, d->arena);
    }
    for (size_t i = 0; i < d->n_layers; i++) {
        DiscLayer *l = &d->layer[i];
        LayerJob j = {d, l, NULL, 0, update};
        conv4_forward(d, l, planes_of(d, i, i ? l[-1].a : images, NULL));
        parallel_for(threads_for(l->M * l->n), l->M, activate_task, &j);
        if (update && l->norm != NONE) *d->params.row[l->norm + 4].value += 1;
    }
    *logits = d->layer[d->n_layers - 1].a;
    return OK;
}

Err disc_backward(Discriminator *d, const real *dlogits, double feature_weight, int trained, real *dimages) {
    const size_t last = d->n_layers - 1;
    if (!d->images) return err("discriminator: disc_backward must follow disc_forward");
    if (trained && !d->params.row[0].grad) return err("discriminator: the parameters have no gradients planned");
    if (feature_weight != 0 && !d->features) return err("discriminator: planned without features");
    if (d->twin) return d->params.ops->disc_backward(d, dlogits, feature_weight, trained, dimages);
    real *dy = d->g[0], *dx = d->g[1];
    if (dlogits)
        memcpy(dy, dlogits, disc_logits(d) * sizeof *dy);
    else
        memset(dy, 0, disc_logits(d) * sizeof *dy);
    for (size_t i = last + 1; i-- > 0;) {
        DiscLayer *l = &d->layer[i];
        LayerJob j = {d, l, dy, feature_weight / (double)last, trained};
        real *to = i ? dx : dimages;
        parallel_for(threads_for(l->M * l->n), l->M, activate_backward_task, &j);
        if (to) memset(to, 0, d->B * l->C * l->H * l->W * sizeof *to);
        if (to || trained) conv4_backward(d, l, planes_of(d, i, i ? l[-1].a : d->images, to), dy, trained);
        dx = dy, dy = to;
    }
    return OK;
}

Err disc_keep_features(Discriminator *d) {
    if (!d->images || !d->features) return err("discriminator: no features to keep");
    if (d->twin) return d->params.ops->disc_keep(d);
    for (size_t i = 0; i + 1 < d->n_layers; i++)
        memcpy(d->layer[i].kept, d->layer[i].a, d->layer[i].M * d->layer[i].n * sizeof(real));
    return OK;
}

double disc_feature_loss(const Discriminator *d) {
    double mean = 0;
    if (d->twin) return d->params.ops->disc_gap(d);
    for (size_t i = 0; i + 1 < d->n_layers; i++) {
        const DiscLayer *l = &d->layer[i];
        double sum = 0;
        for (size_t k = 0; k < l->M * l->n; k++) sum += fabs((double)l->a[k] - (double)l->kept[k]);
        mean += sum / (double)(l->M * l->n) / (double)(d->n_layers - 1);
    }
    return mean;
}

/* ---- Public functions: losses ---- */

double disc_loss(DiscLoss kind, const real *logits, size_t n, int genuine, double weight, real *dlogits) {
    const double sign = genuine ? -1 : 1;
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        const double u = sign * (double)logits[i];
        double value, slope;
        if (kind == DISC_HINGE) {
            value = u <= -1 ? 0 : 1 + u, slope = u > -1;
        } else {
            value = fmax(u, 0) + log1p(exp(-fabs(u))), slope = 1 / (1 + exp(-u));
        }
        sum += 0.5 * value;
        dlogits[i] = (real)(weight * 0.5 * sign * slope / (double)n);
    }
    return sum / (double)n;
}

double generator_loss(const real *logits, size_t n, double weight, real *dlogits) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum -= (double)logits[i];
        dlogits[i] = (real)(-weight / (double)n);
    }
    return sum / (double)n;
}

double adaptive_weight(double nll_norm, double g_norm) {
    const double w = nll_norm / (g_norm + 1e-4);
    return w > 1e4 ? 1e4 : w; /* NaN stays */
}

#else

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
#endif
