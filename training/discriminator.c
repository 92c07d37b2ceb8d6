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
#include "kernels/discriminator.h"

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

Err disc_use_cuda(Discriminator *d, Precision precision) {
    return use_cuda(&d->params, precision);
}
