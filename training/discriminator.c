/* discriminator.c - the first stage's adversary: tells pictures from reconstructions, patch by patch (SPEC section 9;
 * the NLayerDiscriminator of pix2pix, Isola et al. 2017, as taming-transformers trains it).
 *
 *     pictures (B,C,H,W) -> conv4, leaky -> [conv4, batch norm, leaky] * n_layers -> conv4 -> logits (B,1,h,w)
 *
 * The first n_layers convolutions halve the picture (stride 2), the last two do not. Each logit sees one patch of the
 * picture, and says how genuine that patch looks. Training alternates: the discriminator learns to give pictures
 * positive logits and reconstructions negative ones, the first stage learns to raise the logits of its reconstructions.
 *
 * Owns: the network, its parameter table (batch norm's buffers are rows that are not trained), its walk forward and
 * backward, and the adversarial losses. Refuses: pictures too small for its layers.
 *
 * Values are (C,B,h,w), unlike everywhere else: all that batch norm takes the mean of lies together. On a GPU they are
 * (B,h,w,C), as there always. Pictures are put into that order at the beginning, their gradients back at the end.
 *
 * Read in this order: the layers; the walk; the losses; building; planning. Then gan.c, which trains it. */
#include "base/plan.h"
#include "training/training.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_LAYERS = 16 }; /* of the configuration's n_layers */
static const double BATCH_EPS = 1e-5, MOMENTUM = 0.1;
static const real SLOPE = (real)0.2; /* of leaky ReLU below 0 */

/* ---- The layers ---- */

/* Place in x (C,B,H,W) that result i of y's B*h*w sees through tap k of C*16: channel k/16, row k/4 % 4 and column k % 4
 * of its window. NONE: outside, where x is 0. */
static size_t seen_through(const Conv4 *c, size_t i, size_t k) {
    const size_t h = conv4_side(c->H, c->stride), w = conv4_side(c->W, c->stride);
    const size_t y = i / w % h * c->stride + k / CONV4_SIDE % CONV4_SIDE; /* one too large, for the zeros in front */
    const size_t x = i % w * c->stride + k % CONV4_SIDE;
    if (y < 1 || x < 1 || y > c->H || x > c->W) return NONE;
    return ((k / CONV4_TAPS * c->B + i / w / h) * c->H + y - 1) * c->W + x - 1;
}

static size_t results_of(const Conv4 *c) {
    return c->B * conv4_side(c->H, c->stride) * conv4_side(c->W, c->stride);
}

/* conv4_forward   y[m,i] = sum over k of w[m,k] x[seen(i,k)]
 *   y (M,n)   n = B*h*w results a channel
 *   x (C,B,H,W)   w (M,C,4,4), whose taps are k = 0..C*16-1 */
void conv4_forward(const Compute *on, real *y, const real *x, const real *w, const Conv4 *c) {
    if (on->fast) return on->fast->conv4_forward(on, y, x, w, c);
    const size_t n = results_of(c), taps = c->C * CONV4_TAPS;
    for (size_t m = 0; m < c->M; m++)
        for (size_t i = 0; i < n; i++) {
            double sum = 0;
            for (size_t k = 0; k < taps; k++) {
                const size_t at = seen_through(c, i, k);
                if (at != NONE) sum += (double)w[m * taps + k] * (double)x[at];
            }
            y[m * n + i] = (real)sum;
        }
}

/* conv4_backward   dx[j] = sum over m and all i,k with seen(i,k) = j of w[m,k] dy[m,i]     (overwritten; NULL: not wanted)
 *                  dw[m,k] += sum over i of dy[m,i] x[seen(i,k)]                           (NULL: not wanted) */
void conv4_backward(const Compute *on, real *dx, real *dw, const real *dy, const real *x, const real *w,
                    const Conv4 *c) {
    if (on->fast) return on->fast->conv4_backward(on, dx, dw, dy, x, w, c);
    const size_t n = results_of(c), taps = c->C * CONV4_TAPS;
    if (dx) memset(dx, 0, c->C * c->B * c->H * c->W * sizeof *dx);
    for (size_t k = 0; k < taps; k++)
        for (size_t m = 0; m < c->M; m++) {
            double sum = 0;
            for (size_t i = 0; i < n; i++) {
                const size_t at = seen_through(c, i, k);
                if (at == NONE) continue;
                if (dx) dx[at] += w[m * taps + k] * dy[m * n + i];
                sum += (double)dy[m * n + i] * (double)x[at];
            }
            if (dw) dw[m * taps + k] += (real)sum;
        }
}

/* Mean of the channel over the batch, and one over its deviation: the root of mean (y - mean)^2 + eps. The buffers go a
 * tenth (momentum) of the way to this batch's mean and unbiased variance. */
static void measure_channel(const Activation *s, const real *y, size_t m) {
    double mean = 0, variance = 0;
    for (size_t i = 0; i < s->n; i++) mean += (double)y[i] / (double)s->n;
    for (size_t i = 0; i < s->n; i++) variance += ((double)y[i] - mean) * ((double)y[i] - mean) / (double)s->n;
    s->mean[m] = (real)mean, s->rstd[m] = (real)(1 / sqrt(variance + s->eps));
    if (!s->running_mean) return;
    const double unbiased = variance * (double)s->n / (double)(s->n - 1);
    s->running_mean[m] = (real)((1 - s->momentum) * (double)s->running_mean[m] + s->momentum * mean);
    s->running_var[m] = (real)((1 - s->momentum) * (double)s->running_var[m] + s->momentum * unbiased);
    if (m == 0) *s->tracked += 1;
}

/* activate_forward   a = leaky(t),   t = gamma (y - mean) rstd + beta;   t = y + beta without a norm
 *                    leaky(t) = t where t > 0, else slope*t
 *   a, y (M,n), may be the same where there is no norm;  gamma, beta, mean, rstd (M) */
void activate_forward(const Compute *on, real *a, const real *y, const Activation *s) {
    if (on->fast) return on->fast->activate_forward(on, a, y, s);
    for (size_t m = 0; m < s->M; m++, a += s->n, y += s->n) {
        if (s->gamma) measure_channel(s, y, m);
        for (size_t i = 0; i < s->n; i++) {
            const real hat = s->gamma ? (y[i] - s->mean[m]) * s->rstd[m] : y[i];
            const real t = (s->gamma ? s->gamma[m] : 1) * hat + s->beta[m];
            a[i] = t > 0 ? t : s->slope * t;
        }
    }
}

/* activate_backward   in place, from the gradient g of a to that of y, which the convolution takes.
 *   dt = (g + step sign(a - other)) leaky'(t);   t has the sign of a;   step: of feature matching, 0 without it
 *   With a norm, hat = (y - mean) rstd, and mean and rstd depend on every y of the channel:
 *       g = gamma rstd (dt - mean(dt) - hat mean(dt hat))     dgamma += sum dt hat     dbeta += sum dt
 *   without: g = dt, dbeta += sum dt.     dgamma, dbeta NULL: not wanted */
void activate_backward(const Compute *on, real *g, real *dgamma, real *dbeta, const real *a, const real *y,
                       const real *other, double step, const Activation *s) {
    if (on->fast) return on->fast->activate_backward(on, g, dgamma, dbeta, a, y, other, step, s);
    const double n = (double)s->n;
    for (size_t m = 0; m < s->M; m++)
        for (size_t i = m * s->n; i < (m + 1) * s->n; i++) {
            if (step != 0) g[i] += (real)(step * ((a[i] > other[i]) - (a[i] < other[i])));
            if (!(a[i] > 0)) g[i] *= s->slope;
        }
    for (size_t m = 0; m < s->M; m++, g += s->n, y += s->n) {
        double sum = 0, along = 0;
        for (size_t i = 0; i < s->n; i++) {
            sum += (double)g[i];
            if (s->gamma) along += (double)g[i] * ((double)y[i] - (double)s->mean[m]) * (double)s->rstd[m];
        }
        if (dbeta) dbeta[m] += (real)sum;
        if (!s->gamma) continue;
        if (dgamma) dgamma[m] += (real)along;
        for (size_t i = 0; i < s->n; i++) {
            const double hat = ((double)y[i] - (double)s->mean[m]) * (double)s->rstd[m];
            g[i] = (real)((double)s->gamma[m] * (double)s->rstd[m] * ((double)g[i] - sum / n - hat * along / n));
        }
    }
}

/* Sum of |a - other| over n numbers. */
double feature_gap(const Compute *on, const real *a, const real *other, size_t n) {
    if (on->device) return on->fast->feature_gap(on, a, other, n);
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += fabs((double)a[i] - (double)other[i]);
    return sum;
}

/* Between the caller's pictures (B,C,hw) and a value, (C,B,hw) here */
static void put_pictures(const Compute *on, real *to, const real *pictures, size_t B, size_t C, size_t hw) {
    if (on->device) return on->fast->put_planes(on, to, pictures, B, C, hw);
    for (size_t i = 0; i < B * C; i++) memcpy(to + (i % C * B + i / C) * hw, pictures + i * hw, hw * sizeof *to);
}
static Err get_pictures(const Compute *on, real *pictures, const real *from, size_t B, size_t C, size_t hw) {
    if (on->device) return on->fast->get_planes(on, pictures, from, B, C, hw);
    for (size_t i = 0; i < B * C; i++) memcpy(pictures + i * hw, from + (i % C * B + i / C) * hw, hw * sizeof *from);
    return OK;
}

/* ---- The walk ---- */

typedef struct {
    size_t C, M, stride; /* channels read and written */
    size_t weight, bias; /* rows of the table; bias NONE where a norm follows */
    size_t norm;         /* first of its five rows, or NONE */
    int leaky;
    size_t H, W, h, w, n; /* planned: reads (C,B,H,W), writes (M,B,h,w); n = B*h*w */
    real *y, *a;       /* (M,n) results of the convolution; what leaves the layer. One array where there is no norm */
    real *other;       /* (M,n) another batch's a, for feature matching */
    real *mean, *rstd; /* (M) of a norm */
    void *prepared;    /* a GPU: the weights as its convolution reads them */
} DiscLayer;

struct Discriminator {
    DiscConfig c;
    Params params;
    DiscLayer layer[MAX_LAYERS + 2];
    size_t n_layers;
    /* the plan */
    Compute on;
    void *memory; /* of all values */
    size_t B;
    int features;     /* there is room for feature matching */
    real *pictures;   /* (C,B,H,W) of the last forward */
    real *g[2];       /* gradients of what a layer writes, of what it reads: they take turns */
    real *logits;     /* (B,1,h,w), the host's */
    uint64_t changes; /* compute_changes when the weights were prepared */
    int has_features; /* a forward ran: backward may */
};

static Conv4 conv_of(const Discriminator *d, const DiscLayer *l) {
    return (Conv4){d->B, l->C, l->M, l->H, l->W, l->stride, l->prepared};
}

/* update: the buffers of the norm follow the batch. */
static Activation activation_of(const Discriminator *d, const DiscLayer *l, int update) {
    Activation s = {.M = l->M, .n = l->n, .slope = l->leaky ? SLOPE : 1, .eps = BATCH_EPS, .momentum = MOMENTUM};
    const Params *p = &d->params;
    if (l->norm == NONE) {
        s.beta = param_value(p, l->bias);
        return s;
    }
    s.gamma = param_value(p, l->norm), s.beta = param_value(p, l->norm + 1);
    s.mean = l->mean, s.rstd = l->rstd;
    if (!update) return s;
    real **const buffer[3] = {&s.running_mean, &s.running_var, &s.tracked};
    for (size_t k = 0; k < 3; k++) *buffer[k] = (real *)param_value(p, l->norm + 2 + k);
    return s;
}

/* On a GPU: the weights in the order that convolutions read, once after each update. */
static void prepare_weights(Discriminator *d) {
    if (!d->on.device || d->changes == compute_changes(&d->on)) return;
    for (size_t i = 0; i < d->n_layers; i++) {
        const Conv4 c = conv_of(d, &d->layer[i]);
        d->on.fast->conv4_prepare(&d->on, d->layer[i].prepared, param_value(&d->params, d->layer[i].weight), &c);
    }
    d->changes = compute_changes(&d->on);
}

Err disc_forward(Discriminator *d, const real *images, int update, const real **logits) {
    const DiscLayer *first = &d->layer[0], *last = &d->layer[d->n_layers - 1];
    const real *x = d->pictures;
    if (!d->memory) return err("discriminator: call disc_plan first");
    TRY(params_there(&d->params, "discriminator"));
    prepare_weights(d);
    put_pictures(&d->on, d->pictures, images, d->B, first->C, first->H * first->W);
    for (const DiscLayer *l = first; l <= last; x = l++->a) {
        const Conv4 c = conv_of(d, l);
        const Activation s = activation_of(d, l, update);
        conv4_forward(&d->on, l->y, x, param_value(&d->params, l->weight), &c);
        activate_forward(&d->on, l->a, l->y, &s);
    }
    d->has_features = 1;
    *logits = d->logits;
    TRY(get_pictures(&d->on, d->logits, last->a, 1, 1, last->n));
    return compute_status(&d->on);
}

/* Layer i: from the gradient dy of what it writes, which is overwritten, to dx of what it reads, unless NULL. */
static void layer_backward(Discriminator *d, size_t i, real *dx, real *dy, double feature_weight, int trained) {
    const DiscLayer *l = &d->layer[i];
    const Params *p = &d->params;
    const Conv4 c = conv_of(d, l);
    const Activation s = activation_of(d, l, 0);
    const double step = l->leaky ? feature_weight / (double)(l->M * l->n) : 0;
    real *dw = trained ? param_grad(p, l->weight) : NULL;
    real *dgamma = trained && l->norm != NONE ? param_grad(p, l->norm) : NULL;
    real *dbeta = trained ? param_grad(p, l->norm != NONE ? l->norm + 1 : l->bias) : NULL;
    activate_backward(&d->on, dy, dgamma, dbeta, l->a, l->y, l->other, step, &s);
    if (dx || dw) conv4_backward(&d->on, dx, dw, dy, i ? l[-1].a : d->pictures, param_value(p, l->weight), &c);
}

Err disc_backward(Discriminator *d, const real *dlogits, double feature_weight, int trained, real *dimages) {
    const size_t last = d->n_layers - 1, n = disc_logits(d);
    const DiscLayer *first = &d->layer[0];
    real *dy = d->g[0], *dx = d->g[1];
    if (!d->has_features) return err("discriminator: disc_backward must follow disc_forward");
    if (trained && !d->params.row[0].grad) return err("discriminator: the parameters have no gradients planned");
    if (feature_weight != 0 && !d->features) return err("discriminator: planned without features");
    if (dlogits)
        put_pictures(&d->on, dy, dlogits, 1, 1, n);
    else
        compute_zero(&d->on, dy, n * d->on.unit);
    for (size_t i = last + 1; i-- > 0;) {
        real *const written = dy;
        layer_backward(d, i, i || dimages ? dx : NULL, dy, feature_weight / (double)last, trained);
        dy = dx, dx = written;
    }
    if (dimages) TRY(get_pictures(&d->on, dimages, dy, d->B, first->C, first->H * first->W));
    return compute_status(&d->on);
}

Err disc_keep_features(Discriminator *d) {
    if (!d->has_features || !d->features) return err("discriminator: no features to keep");
    for (size_t i = 0; i + 1 < d->n_layers; i++)
        compute_copy(&d->on, d->layer[i].other, d->layer[i].a, d->layer[i].M * d->layer[i].n * d->on.unit);
    return compute_status(&d->on);
}

double disc_feature_loss(const Discriminator *d) {
    double mean = 0;
    for (size_t i = 0; i + 1 < d->n_layers; i++) {
        const DiscLayer *l = &d->layer[i];
        mean += feature_gap(&d->on, l->a, l->other, l->M * l->n) / (double)(l->M * l->n) / (double)(d->n_layers - 1);
    }
    return mean;
}

/* ---- The losses ---- */

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

/* lambda = |dL_rec/dW| / (|dL_adv/dW| + 1e-4), at most 1e4: nll_norm and g_norm are the two lengths, which gan.c takes. */
double adaptive_weight(double nll_norm, double g_norm) {
    const double w = nll_norm / (g_norm + 1e-4);
    return w > 1e4 ? 1e4 : w; /* NaN stays */
}

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
    const size_t dim[4] = {l->M, l->C, CONV4_SIDE, CONV4_SIDE};
    TRY(params_add(&d->params, &l->weight, INIT_NORMAL, 0.02, 0, 4, dim, "loss.discriminator.main.%zu.weight", module));
    if (i && i < last) return add_norm(d, l, module + 1);
    return params_add(&d->params, &l->bias, INIT_UNIFORM, 1 / sqrt((double)(l->C * CONV4_TAPS)), 0, 1, dim,
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
    compute_free(&d->on, d->memory);
    free(d->logits);
    d->memory = NULL, d->logits = NULL, d->has_features = 0;
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

Err disc_use_cuda(Discriminator *d, Precision precision) {
    return use_cuda(&d->params, precision);
}

size_t disc_logits(const Discriminator *d) {
    return d->layer[d->n_layers - 1].n;
}

/* ---- Planning: everything is needed all the time, for a backward may come any number of times ---- */

/* *n = B*C*h*w, in bounds */
static Err count(const Discriminator *d, size_t *n, size_t C, size_t h, size_t w) {
    TRY(size_mul(n, d->B, C));
    TRY(size_mul(n, *n, h));
    TRY(size_mul(n, *n, w));
    if (d->on.device && *n > (size_t)1 << 31)
        return err("discriminator: activations of more than 2^31 numbers; a smaller batch takes less");
    return OK;
}

static Err cut_layer(const Discriminator *d, DiscLayer *l, size_t H, size_t W) {
    l->H = H, l->W = W;
    if (H < 2 || W < 2)
        return err("discriminator: nothing is left of the pictures after so many layers; smaller disc_num_layers or "
                   "larger pictures");
    l->h = conv4_side(H, l->stride), l->w = conv4_side(W, l->stride);
    TRY(count(d, &l->n, 1, l->h, l->w));
    if (l->norm != NONE && l->n < 2) return err("discriminator: batch norm has one number a channel, expected more");
    return OK;
}

/* The values of layer l and the scratch that it needs; *widest: the largest value. */
static Err plan_layer(Discriminator *d, DiscLayer *l, Plan *plan, size_t *widest) {
    const Layers *fast = d->on.fast;
    const Conv4 c = conv_of(d, l);
    const Activation s = {.M = l->M, .n = l->n};
    size_t n;
    TRY(count(d, &n, l->M, l->h, l->w));
    *widest = max_size(*widest, n);
    if (fast) compute_needs(&d->on, fast->conv4_needs(&d->on, &c));
    if (fast) compute_needs(&d->on, fast->activate_needs(&d->on, &s));
    if (d->on.device) plan_add(plan, &l->prepared, fast->conv4_prepared_bytes(&c), 1, 0, PLAN_END);
    plan_add(plan, &l->y, n, d->on.unit, 0, PLAN_END);
    if (d->features && l->leaky) plan_add(plan, &l->other, n, d->on.unit, 0, PLAN_END);
    if (l->norm == NONE) return OK;
    plan_add(plan, &l->a, n, d->on.unit, 0, PLAN_END);
    plan_add(plan, &l->mean, l->M, sizeof(real), 0, PLAN_END);
    plan_add(plan, &l->rstd, l->M, sizeof(real), 0, PLAN_END);
    return OK;
}

static Err plan_layers(Discriminator *d, Plan *plan, size_t H, size_t W) {
    size_t pixels, widest = 0;
    for (size_t i = 0; i < d->n_layers; i++) {
        DiscLayer *l = &d->layer[i];
        TRY(i ? cut_layer(d, l, l[-1].h, l[-1].w) : cut_layer(d, l, H, W));
        TRY(plan_layer(d, l, plan, &widest));
    }
    TRY(count(d, &pixels, d->layer[0].C, H, W));
    plan_add(plan, &d->pictures, pixels, d->on.unit, 0, PLAN_END);
    for (int k = 0; k < 2; k++) plan_add(plan, &d->g[k], max_size(widest, pixels), d->on.unit, 0, PLAN_END);
    if (d->on.device) compute_needs(&d->on, pixels * sizeof(real)); /* of put_planes */
    return OK;
}

/* memory NULL: only counted */
static Err plan_memory(Discriminator *d, size_t B, size_t H, size_t W, int features, void **memory, size_t *bytes) {
    Plan plan = {.what = "discriminator: activations"};
    drop_plan(d);
    d->on = compute_of(&d->params);
    d->B = B, d->features = features, d->changes = (uint64_t)-1;
    if (B < 1) return err("discriminator: an empty batch");
    if (plan_layers(d, &plan, H, W) != OK) {
        plan_free(&plan);
        return FAILED;
    }
    return compute_memory(&d->on, &plan, memory, bytes);
}

Err disc_plan_bytes(Discriminator *d, size_t B, size_t H, size_t W, int features, size_t *bytes) {
    return plan_memory(d, B, H, W, features, NULL, bytes);
}

Err disc_plan(Discriminator *d, size_t B, size_t H, size_t W, int features) {
    size_t bytes;
    TRY(plan_memory(d, B, H, W, features, &d->memory, &bytes));
    for (size_t i = 0; i < d->n_layers; i++)
        if (d->layer[i].norm == NONE) d->layer[i].a = d->layer[i].y;
    return mem_alloc(&d->logits, disc_logits(d), sizeof *d->logits, "discriminator: logits");
}
