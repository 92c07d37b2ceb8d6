/* test_discriminator.c - the discriminator's fast layers against its plain ones, the network against plain layers called
 * one by one, against finite differences (in double; the plain layers too), and against itself at other thread counts;
 * the gradient of the first stage's last layer. Agreement with the official implementation is test/golden's business
 * (case vqgan_gan). */
#include "test.h"

enum { IS_DOUBLE = sizeof(real) == 8 };

static void fill(real *x, size_t n, double scale, uint64_t stream) {
    for (size_t i = 0; i < n; i++) x[i] = (real)(scale * rng_normal(7, rng_stream(RNG_TEST, stream, 0), i));
}

static real *random_reals(size_t n, double scale, uint64_t stream) {
    real *x = NULL;
    CHECK_OK(mem_alloc(&x, n, sizeof *x, "test"));
    fill(x, n, scale, stream);
    return x;
}

static real *copied(const real *x, size_t n) {
    real *y = random_reals(n, 0, 0);
    memcpy(y, x, n * sizeof *y);
    return y;
}

static const DiscConfig tiny = {3, 5, 2};
enum { B = 2, H = 14, W = 19, PIXELS = B * 3 * H * W }; /* odd and even sides: 7x9, 3x4, 2x3, 1x2 */

/* Weights large enough that every layer matters */
static Discriminator *make(const DiscConfig *c) {
    Discriminator *d = NULL;
    CHECK_OK(disc_create(&d, c));
    if (!d) exit(test_report());
    Params *p = disc_params(d);
    CHECK_OK(params_plan(p, PLAN_VALUE | PLAN_GRAD));
    params_init(p, 3);
    for (size_t i = 0; i < p->n; i++)
        for (size_t k = 0; k < p->row[i].size && !p->row[i].untrained; k++)
            p->row[i].value[k] += (real)(0.2 * rng_normal(5, rng_stream(RNG_TEST, 99, i), k));
    return d;
}

static Param *find(Params *p, const char *name) {
    for (size_t i = 0; i < p->n; i++)
        if (strcmp(p->row[i].name, name) == 0) return &p->row[i];
    printf("no parameter %s\n", name);
    exit(1);
}

/* ---- Names, shapes, initial values ---- */

static void test_table(void) {
    const DiscConfig c = {3, 64, 3};
    Discriminator *d = NULL;
    CHECK_OK(disc_create(&d, &c));
    Params *p = disc_params(d);
    size_t trained = 0;
    for (size_t i = 0; i < p->n; i++) trained += p->row[i].untrained ? 0 : p->row[i].size;
    CHECK(trained == 2765633 && params_count(p) == trained + 2 * (128 + 256 + 512) + 3);
    CHECK(p->n == 2 + 3 * 6 + 2 && !strcmp(p->row[0].name, "loss.discriminator.main.0.weight"));
    CHECK(find(p, "loss.discriminator.main.11.weight")->dim[1] == 512);
    CHECK(find(p, "loss.discriminator.main.9.num_batches_tracked")->ndim == 0);
    CHECK_OK(params_plan(p, PLAN_VALUE));
    params_init(p, 1);
    const Param *norm = find(p, "loss.discriminator.main.9.weight"), *w = find(p, "loss.discriminator.main.5.weight");
    double mean = 0, square = 0, weights = 0;
    for (size_t i = 0; i < norm->size; i++) mean += (double)norm->value[i] / (double)norm->size;
    for (size_t i = 0; i < norm->size; i++) square += pow((double)norm->value[i] - mean, 2) / (double)norm->size;
    for (size_t i = 0; i < w->size; i++) weights += pow((double)w->value[i], 2) / (double)w->size;
    CHECK(fabs(mean - 1) < 0.005 && fabs(sqrt(square) - 0.02) < 0.002 && fabs(sqrt(weights) - 0.02) < 1e-4);
    CHECK(find(p, "loss.discriminator.main.3.running_var")->value[7] == 1);
    CHECK(find(p, "loss.discriminator.main.3.running_mean")->value[7] == 0);
    disc_free(d);
}

/* ---- The fast layers against the plain ones ---- */

static const double NEAR = IS_DOUBLE ? 1e-12 : 1e-5;
static const Compute plain = {.unit = sizeof(real)};

/* Where the fast layers compute, with as much scratch as they say they need */
static Compute fast_with(size_t scratch) {
    Compute on = {.fast = layers_here(), .unit = sizeof(real), .threads = threads_get(), .scratch_bytes = scratch};
    CHECK_OK(mem_alloc(&on.scratch, scratch, 1, "test"));
    return on;
}

static void test_conv4(Conv4 c) {
    const size_t nx = c.C * c.B * c.H * c.W, nw = c.M * c.C * CONV4_TAPS;
    const size_t ny = c.M * c.B * conv4_side(c.H, c.stride) * conv4_side(c.W, c.stride);
    real *x = random_reals(nx, 1, 1), *w = random_reals(nw, 0.3, 2), *dy = random_reals(ny, 1, 3);
    real *y[2], *dx[2], *dw[2];
    Compute on = fast_with(layers_here() ? layers_here()->conv4_needs(&plain, &c) : 0);
    for (int k = 0; k < 2; k++) {
        const Compute *where = k ? &on : &plain;
        y[k] = random_reals(ny, 1, 4), dx[k] = random_reals(nx, 1, 5), dw[k] = random_reals(nw, 1, 6);
        conv4_forward(where, y[k], x, w, &c);
        conv4_backward(where, dx[k], dw[k], dy, x, w, &c);
        conv4_backward(where, NULL, dw[k], dy, x, w, &c); /* it is added */
        conv4_backward(where, dx[k], NULL, dy, x, w, &c); /* it is overwritten */
    }
    CHECK_NEAR("4x4 y", y[1], y[0], ny, 0, NEAR);
    CHECK_NEAR("4x4 dx", dx[1], dx[0], nx, 0, NEAR);
    CHECK_NEAR("4x4 dw", dw[1], dw[0], nw, 0, NEAR);
    void *all[] = {x, w, dy, y[0], y[1], dx[0], dx[1], dw[0], dw[1], on.scratch};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* normal: with a norm, else a bias; step: of feature matching */
static void test_activation(size_t M, size_t n, int normal, real slope, double step) {
    const size_t size = M * n;
    real *y = random_reals(size, 2, 1), *da = random_reals(size, 1, 2), *other = random_reals(size, 1, 3),
         *gamma = random_reals(M, 1, 4), *beta = random_reals(M, 1, 5);
    real *a[2], *g[2], *dgamma[2], *dbeta[2], *stats[2], tracked[2] = {3, 3};
    for (size_t i = 0; i < size; i++) y[i] += 4; /* a mean far from zero */
    for (int k = 0; k < 2; k++) {
        const Compute on = {.fast = k ? layers_here() : NULL, .unit = sizeof(real)};
        a[k] = random_reals(size, 0, 6), g[k] = copied(da, size), stats[k] = random_reals(4 * M, 1, 7);
        dgamma[k] = random_reals(M, 1, 8), dbeta[k] = random_reals(M, 1, 9);
        Activation s = {M,
                        n,
                        slope,
                        1e-5,
                        0.1,
                        normal ? gamma : NULL,
                        beta,
                        stats[k],
                        stats[k] + M,
                        stats[k] + 2 * M,
                        stats[k] + 3 * M,
                        &tracked[k]};
        activate_forward(&on, a[k], y, &s);
        activate_backward(&on, g[k], dgamma[k], dbeta[k], a[k], y, other, step, &s);
        s.running_mean = s.running_var = s.tracked = NULL; /* once more, and nothing follows */
        activate_forward(&on, a[k], y, &s);
        activate_backward(&on, g[k], NULL, NULL, a[k], y, other, 0, &s);
        CHECK(tracked[k] == (normal ? 4 : 3));
    }
    CHECK_NEAR("activation a", a[1], a[0], size, 0, NEAR);
    CHECK_NEAR("activation dy", g[1], g[0], size, 0, NEAR);
    CHECK_NEAR("activation dgamma", dgamma[1], dgamma[0], M, 0, NEAR);
    CHECK_NEAR("activation dbeta", dbeta[1], dbeta[0], M, 0, NEAR);
    CHECK_NEAR("activation statistics", stats[1], stats[0], 4 * M, 0, NEAR);
    CHECK(fabs(feature_gap(&plain, a[0], other, size) - feature_gap(&plain, other, a[0], size)) == 0);
    CHECK(feature_gap(&plain, a[0], other, size) > 0 && feature_gap(&plain, other, other, size) == 0);
    void *all[] = {y,    da,        other,     gamma,    beta,     a[0],     a[1],    g[0],
                   g[1], dgamma[0], dgamma[1], dbeta[0], dbeta[1], stats[0], stats[1]};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static void test_layers(void) {
    static const Conv4 conv[] = {{2, 3, 8, 16, 16, 2, NULL},  {3, 5, 10, 7, 9, 2, NULL}, {3, 8, 1, 5, 4, 1, NULL},
                                 {5, 10, 20, 3, 4, 1, NULL},  {1, 1, 1, 2, 2, 2, NULL},  {1, 32, 8, 12, 10, 2, NULL},
                                 {1, 200, 3, 24, 26, 1, NULL} /* several strips */};
    for (size_t i = 0; i < sizeof conv / sizeof *conv; i++) test_conv4(conv[i]);
    test_activation(8, 35, 1, (real)0.2, 0), test_activation(8, 35, 0, (real)0.2, 0.5);
    test_activation(5, 3, 1, (real)0.2, 0.3), test_activation(1, 9, 0, 1, 0);
    test_activation(40, 2100, 1, (real)0.2, 0.7);
}

/* ---- The network against plain layers, called one by one ---- */

/* The next value (M,B,h,w) of x (C,B,H,W): the 4x4 convolution called weight, then the norm or bias that begins with row
 * `first`, then leaky ReLU; stats (2,M): mean, rstd of the norm. */
static void next_value(real *y, const real *x, Params *p, const char *weight, size_t h0, size_t w0, size_t stride,
                       int normal, real slope, real *stats) {
    const Param *w = find(p, weight), *first = w + 1;
    const Conv4 c = {B, w->dim[1], w->dim[0], h0, w0, stride, NULL};
    Activation s = {c.M,          B * conv4_side(h0, stride) * conv4_side(w0, stride),
                    slope,        1e-5,
                    0.1,          NULL,
                    first->value, stats,
                    stats + c.M,  NULL,
                    NULL,         NULL};
    if (normal) s.gamma = first->value, s.beta = first[1].value;
    conv4_forward(&plain, y, x, w->value, &c);
    activate_forward(&plain, y, y, &s);
}

static void test_forward(int plainly) {
    static real x[PIXELS], y0[5 * B * 7 * 9], y1[10 * B * 3 * 4], y2[20 * B * 2 * 3], want[B * 2], stats[40];
    const real slope = (real)0.2, *logits;
    compute_plainly(plainly);
    Discriminator *d = make(&tiny);
    Params *p = disc_params(d);
    real *image = random_reals(PIXELS, 0.7, 1);
    for (size_t i = 0; i < PIXELS; i++) x[(i / (H * W) % 3 * B + i / (3 * H * W)) * H * W + i % (H * W)] = image[i];
    next_value(y0, x, p, "loss.discriminator.main.0.weight", H, W, 2, 0, slope, stats);
    next_value(y1, y0, p, "loss.discriminator.main.2.weight", 7, 9, 2, 1, slope, stats);
    next_value(y2, y1, p, "loss.discriminator.main.5.weight", 3, 4, 1, 1, slope, stats);
    const double mean = (double)stats[0], n = B * 6,
                 variance = (1 / ((double)stats[20] * (double)stats[20]) - 1e-5) * n / (n - 1);
    next_value(want, y2, p, "loss.discriminator.main.8.weight", 2, 3, 1, 0, 1, stats);
    CHECK_OK(disc_plan(d, B, H, W, 0));
    CHECK(disc_logits(d) == B * 2);
    CHECK_OK(disc_forward(d, image, 0, &logits));
    CHECK_NEAR("logits", logits, want, B * 2, 0, NEAR);
    CHECK(find(p, "loss.discriminator.main.6.running_mean")->value[0] == 0); /* not asked to follow */
    CHECK_OK(disc_forward(d, image, 1, &logits));
    CHECK_OK(disc_forward(d, image, 1, &logits));
    const double m0 = 0.19 * mean, v0 = 0.81 + 0.19 * variance; /* after two batches */
    CHECK(fabs((double)find(p, "loss.discriminator.main.6.running_mean")->value[0] - m0) < 1e-5 * fabs(m0) + 1e-7);
    CHECK(fabs((double)find(p, "loss.discriminator.main.6.running_var")->value[0] - v0) < 1e-5 * v0);
    CHECK(find(p, "loss.discriminator.main.3.num_batches_tracked")->value[0] == 2);
    free(image);
    disc_free(d);
    compute_plainly(0);
}

/* ---- Gradients ---- */

typedef enum { OF_LOGITS, OF_GENUINE, OF_FAKE, OF_VANILLA, OF_GENERATOR, OF_FEATURES, KINDS } Which;

typedef struct {
    Discriminator *d;
    real *image, *R, *dlogits;
    Which which;
} Loss1;

/* The loss, and in dlogits its gradient */
static double loss_of(void *context) {
    Loss1 *l = (Loss1 *)context;
    const size_t n = disc_logits(l->d);
    const real *logits;
    if (disc_forward(l->d, l->image, 0, &logits) != OK) return NAN;
    if (l->which == OF_FEATURES) return 1.5 * disc_feature_loss(l->d);
    if (l->which == OF_GENERATOR) return 2 * generator_loss(logits, n, 2, l->dlogits);
    if (l->which != OF_LOGITS)
        return 3 * disc_loss(l->which == OF_VANILLA ? DISC_VANILLA : DISC_HINGE, logits, n, l->which != OF_FAKE, 3,
                             l->dlogits);
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)logits[i] * (double)l->R[i], l->dlogits[i] = l->R[i];
    return sum;
}

static void check_gradients(Which which) {
    const double step = 1e-6, limit = 1e-6, floor_ = 1e-3;
    Loss1 l = {make(&tiny), random_reals(PIXELS, 0.7, 1), random_reals(64, 1, 2), random_reals(64, 1, 3), which};
    Params *p = disc_params(l.d);
    real *other = random_reals(PIXELS, 0.7, 4), *dimage = random_reals(PIXELS, 1, 5);
    const real *logits;
    double worst = 0;
    CHECK_OK(disc_plan(l.d, B, H, W, which == OF_FEATURES));
    CHECK_OK(disc_forward(l.d, other, 0, &logits));
    if (which == OF_FEATURES) CHECK_OK(disc_keep_features(l.d));
    const double value = loss_of(&l);
    CHECK(isfinite(value) && value != 0);
    CHECK_OK(disc_backward(l.d, which == OF_FEATURES ? NULL : l.dlogits, which == OF_FEATURES ? 1.5 : 0, 1, dimage));
    for (size_t i = 0; IS_DOUBLE && i < p->n; i++) {
        Param *row = &p->row[i];
        if (row->untrained) continue;
        const double e = gradient_error(loss_of, &l, row->value, row->grad, row->size, 60, step, floor_);
        if (!test_note(e <= limit, __FILE__, __LINE__, row->name)) printf("     kind %d, error %.3g\n", which, e);
        worst = fmax(worst, e);
    }
    const double e = IS_DOUBLE ? gradient_error(loss_of, &l, l.image, dimage, PIXELS, PIXELS, step, floor_) : 0;
    if (!CHECK(e <= limit)) printf("     kind %d, error %.3g\n", which, e);
    if (IS_DOUBLE) printf("gradients of loss %d: parameters %.2g, image %.2g\n", which, worst, e);
    /* a second backward adds to the parameters and overwrites the image; an untrained one leaves them alone */
    real *once = copied(p->arena[1], p->total), *image_once = copied(dimage, PIXELS);
    loss_of(&l);
    for (int trained = 0; trained < 2; trained++)
        CHECK_OK(disc_backward(l.d, which == OF_FEATURES ? NULL : l.dlogits, which == OF_FEATURES ? 1.5 : 0, trained,
                               dimage));
    for (size_t i = 0; i < p->total; i++) once[i] *= 2;
    CHECK_NEAR("two backwards", p->arena[1], once, p->total, 0, IS_DOUBLE ? 1e-12 : 1e-5);
    CHECK(memcmp(dimage, image_once, PIXELS * sizeof *dimage) == 0);
    /* negative control: one wrong element must show */
    Param *w = find(p, "loss.discriminator.main.5.weight");
    memcpy(once, w->grad, w->size * sizeof *once);
    for (size_t i = 0; i < w->size; i++) once[i] /= 2;
    once[0] += (real)1e-3;
    CHECK(!IS_DOUBLE || gradient_error(loss_of, &l, w->value, once, w->size, 60, step, floor_) > limit);
    void *all[] = {l.image, l.R, l.dlogits, other, dimage, once, image_once};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    disc_free(l.d);
}

/* Numbers by hand */
static void test_losses(void) {
    const real logits[3] = {2, (real)0.5, -3};
    real g[3];
    CHECK(fabs(disc_loss(DISC_HINGE, logits, 3, 1, 1, g) - 0.5 * (0 + 0.5 + 4) / 3) < 1e-7);
    CHECK(g[0] == 0 && fabs((double)g[1] + 1.0 / 6) < 1e-7 && g[1] == g[2]);
    CHECK(fabs(disc_loss(DISC_HINGE, logits, 3, 0, 6, g) - 0.5 * (3 + 1.5 + 0) / 3) < 1e-7);
    CHECK(g[0] == 1 && g[1] == 1 && g[2] == 0);
    const double soft = log1p(exp(-2.0)) + log1p(exp(-0.5)) + log1p(exp(3.0));
    CHECK(fabs(disc_loss(DISC_VANILLA, logits, 3, 1, 1, g) - 0.5 * soft / 3) < 1e-7);
    const real far[1] = {1000}, bad[1] = {(real)NAN};
    CHECK(disc_loss(DISC_VANILLA, far, 1, 0, 1, g) == 500 && (double)g[0] == 0.5);
    CHECK(disc_loss(DISC_VANILLA, far, 1, 1, 1, g) == 0 && g[0] == 0);
    CHECK(isnan(disc_loss(DISC_HINGE, bad, 1, 1, 1, g)) && isnan(disc_loss(DISC_VANILLA, bad, 1, 1, 1, g)));
    CHECK(isnan(generator_loss(bad, 1, 1, g)) && isnan(adaptive_weight((double)NAN, 1)));
    CHECK(fabs(generator_loss(logits, 3, 1, g) - 0.5 / 3) < 1e-7 && fabs((double)g[2] + 1.0 / 3) < 1e-7);
    CHECK(adaptive_weight(1, 0) == 1e4 && adaptive_weight(0, 0) == 0);
    CHECK(fabs(adaptive_weight(3, 1.5) - 3 / 1.5001) < 1e-12);
}

/* ---- The same bits for every thread count ---- */

typedef struct {
    real *grad, *dimage, logits[512], buffers[64];
    size_t total;
} Run;

/* Large enough that several tiles and several threads take part */
enum { LARGE = 2 * 3 * 96 * 80 };
static Run run_with(int threads) {
    const DiscConfig c = {3, 16, 3};
    Run r = {0};
    threads_set(threads);
    Discriminator *d = make(&c);
    Params *p = disc_params(d);
    real *image = random_reals(LARGE, 0.7, 1);
    const real *logits;
    r.dimage = random_reals(LARGE, 1, 2);
    CHECK_OK(disc_plan(d, 2, 96, 80, 1));
    CHECK_OK(disc_forward(d, r.dimage, 1, &logits));
    CHECK_OK(disc_keep_features(d));
    CHECK_OK(disc_forward(d, image, 1, &logits));
    const size_t n = disc_logits(d);
    CHECK(n == 2 * 10 * 8);
    memcpy(r.logits, logits, n * sizeof *logits);
    real *R = random_reals(n, 1, 3);
    CHECK_OK(disc_backward(d, R, 0.5, 1, r.dimage));
    r.grad = copied(p->arena[1], p->total), r.total = p->total;
    memcpy(r.buffers, find(p, "loss.discriminator.main.6.running_var")->value, sizeof r.buffers);
    free(R);
    free(image);
    disc_free(d);
    return r;
}

static void test_threads(void) {
    const int before = threads_get();
    Run one = run_with(1);
    for (int threads = 2; threads <= 3; threads++) {
        Run r = run_with(threads);
        CHECK(memcmp(r.logits, one.logits, sizeof r.logits) == 0);
        CHECK(memcmp(r.buffers, one.buffers, sizeof r.buffers) == 0);
        CHECK(memcmp(r.dimage, one.dimage, LARGE * sizeof *r.dimage) == 0);
        CHECK(memcmp(r.grad, one.grad, one.total * sizeof *r.grad) == 0 && r.grad[5] != 0);
        free(r.grad);
        free(r.dimage);
    }
    free(one.grad);
    free(one.dimage);
    threads_set(before);
}

/* ---- The last layer of a first stage ---- */

static void test_last_layer(void) {
    VqganConfig c = {.ch = 32, .levels = 2, .ch_mult = {1, 1}, .num_res_blocks = 1, .resolution = 16};
    c.in_channels = c.out_ch = 3, c.z_channels = 4, c.embed_dim = 4, c.n_embed = 8, c.legacy = 1, c.beta = 0.25,
    c.resamp_with_conv = 1;
    enum { N = 2 * 3 * 16 * 12, WEIGHT = 3 * 32 * 9 };
    Vqgan *v = NULL;
    CHECK_OK(vqgan_create(&v, &c, 0));
    Params *p = vqgan_params(v);
    CHECK_OK(params_plan(p, PLAN_VALUE | PLAN_GRAD));
    params_init(p, 1);
    CHECK_OK(vqgan_plan(v, 2, 16, 12, 1));
    real *image = random_reals(N, 0.5, 1), *dxrec = random_reals(N, 1, 2), *dw = random_reals(WEIGHT, 1, 3), db[3];
    const real *xrec;
    double loss;
    CHECK(!strcmp(vqgan_last_layer(v)->name, "decoder.conv_out.weight") && vqgan_last_layer(v)->size == WEIGHT);
    CHECK_ERR(vqgan_last_gradient(v, dxrec, dw, db), "must follow vqgan_forward");
    CHECK_OK(vqgan_forward(v, image, 2, 16, 12, &xrec, &loss));
    for (int i = 0; i < 2; i++) CHECK_OK(vqgan_last_gradient(v, dxrec, dw, db)); /* overwritten */
    CHECK(params_grad_norm(p) == 0);
    CHECK_OK(vqgan_backward(v, dxrec, 1, NULL));
    CHECK(memcmp(dw, vqgan_last_layer(v)->grad, sizeof(real) * WEIGHT) == 0 && dw[7] != 0);
    CHECK(memcmp(db, find(p, "decoder.conv_out.bias")->grad, sizeof db) == 0);
    CHECK_ERR(vqgan_last_gradient(v, dxrec, dw, db), "must follow vqgan_forward");
    /* a frozen encoder gets no gradient, and the decoder the same one */
    real *whole = copied(p->arena[1], p->total);
    for (size_t i = 0; i < p->n; i++)
        p->row[i].untrained = strncmp(p->row[i].name, "decoder.", 8) && strncmp(p->row[i].name, "post_", 5);
    params_zero_grad(p);
    CHECK_OK(vqgan_forward(v, image, 2, 16, 12, &xrec, &loss));
    CHECK_OK(vqgan_backward(v, dxrec, 0, NULL));
    size_t begun = 0;
    for (size_t i = 0; i < p->n; i++) {
        const Param *row = &p->row[i];
        if (!row->untrained)
            CHECK(memcmp(row->grad, whole + (row->grad - p->arena[1]), row->size * sizeof *whole) == 0);
        for (size_t k = 0; row->untrained && k < row->size; k++) begun += row->grad[k] != 0;
    }
    CHECK(begun == 0);
    free(whole);
    free(image);
    free(dxrec);
    free(dw);
    vqgan_free(v);
}

static void test_refusals(void) {
    DiscConfig c = tiny;
    Discriminator *d = NULL;
    const real *logits;
    real x[1] = {0};
    c.n_layers = 17;
    CHECK_ERR(disc_create(&d, &c), "disc_num_layers is 17, expected 1..16");
    c = tiny, c.ndf = 0;
    CHECK_ERR(disc_create(&d, &c), "disc_ndf is 0");
    c = tiny, c.in_channels = 0;
    CHECK_ERR(disc_create(&d, &c), "disc_in_channels");
    CHECK(!d);
    CHECK_OK(disc_create(&d, &tiny));
    CHECK_ERR(disc_forward(d, x, 0, &logits), "disc_plan");
    CHECK_ERR(disc_plan(d, 1, 11, 40, 0), "nothing is left");
    CHECK_ERR(disc_plan(d, 0, 16, 16, 0), "empty batch");
    CHECK_ERR(disc_plan(d, (size_t)-1 / 4, 16, 16, 0), "");
    CHECK_ERR(disc_plan(d, 1, (size_t)-1, (size_t)-1, 0), "");
    CHECK_OK(disc_plan(d, 1, 12, 12, 0));
    CHECK_ERR(disc_forward(d, x, 0, &logits), "no values");
    CHECK_ERR(disc_backward(d, x, 0, 0, NULL), "must follow");
    CHECK_ERR(disc_keep_features(d), "no features");
    disc_free(d);
}

int main(void) {
    test_table();
    test_layers();
    test_forward(1), test_forward(0);
    test_losses();
    for (Which w = OF_LOGITS; w < KINDS; w++) {
        compute_plainly(1), check_gradients(w);
        compute_plainly(0), check_gradients(w);
    }
    test_threads();
    test_last_layer();
    test_refusals();
    return test_report();
}
