/* test_gan_cuda.cu - the CUDA twins of what trains a first stage beside itself, the discriminator and LPIPS, against
 * the C: every layer, then whole networks, then steps of the optimizer. As test_cuda.cu. */
#include "transformer.cu"

#include "device_test.h"

/* ---- A layer's two sides: plain ones on the host, the GPU's ---- */

static Compute plain_side(void) {
    Compute on;
    memset(&on, 0, sizeof on);
    on.unit = sizeof(real);
    return on;
}

static Compute gpu_side(size_t scratch_bytes) {
    Compute on;
    memset(&on, 0, sizeof on);
    on.fast = &cuda_layers, on.ops = &CUDA_TABLE, on.device = device, on.unit = sizeof(floatX);
    on.scratch = on_device(scratch_bytes), on.scratch_bytes = scratch_bytes;
    return on;
}

static real *as_real(const floatX *x) { /* as layers are called */
    return (real *)(void *)x;
}

/* (C,B,hw) as the plain layers of the discriminator have it, to (B,C,hw) */
static real *by_picture(const real *x, size_t B, size_t C, size_t hw) {
    real *y = (real *)malloc((B * C * hw + 1) * sizeof *y);
    for (size_t i = 0; i < B * C; i++) memcpy(y + (i % B * C + i / B) * hw, x + i * hw, hw * sizeof *y);
    return y;
}
static floatX *send_value(const real *x, size_t B, size_t C, size_t hw) {
    real *y = by_picture(x, B, C, hw);
    floatX *p = send_picture(y, B, C, hw);
    free(y);
    return p;
}
static void near_value(const char *name, const floatX *got, const real *want, size_t B, size_t C, size_t hw) {
    real *y = by_picture(want, B, C, hw);
    near_picture(name, got, y, B, C, hw);
    free(y);
}

/* ---- The discriminator's convolution ---- */

/* small: as little memory as will do, so that there are several tiles */
static void test_conv4(size_t B, size_t C, size_t M, size_t stride, size_t H, size_t W, int small) {
    Conv4 c = {B, C, M, H, W, stride, NULL};
    const size_t hw = conv4_side(H, stride) * conv4_side(W, stride), nx = B * C * H * W, ny = M * B * hw,
                 nw = M * C * CONV4_TAPS, pitch = conv4_window(&c).pitch;
    real *x = random_reals(nx, 1, 1), *w = random_reals(nw, 2, 0.3), *dy = random_reals(ny, 4, 1),
         *dw = random_reals(nw, 5, 1), *before = random_reals(nw, 5, 1), *y = random_reals(ny, 6, 1),
         *dx = random_reals(nx, 7, 1);
    const Compute plain = plain_side();
    uint64_t first = 0;
    conv4_forward(&plain, y, x, w, &c);
    conv4_backward(&plain, dx, dw, dy, x, w, &c);
    for (int order = 0; order < orders(); order++) {
        const size_t least = round_up(M * pitch * sizeof(float), 4 * ALIGNMENT) +
                             (round_up(hw, TILE_ROWS) + TILE_ROWS) * pitch * sizeof(floatX);
        const Compute gpu = gpu_side(small ? least : cuda_layers.conv4_needs(&plain, &c));
        real *dev_y = as_real((floatX *)on_device(ny * sizeof(floatX))),
             *dev_dx = as_real((floatX *)on_device(nx * sizeof(floatX)));
        const real *dev_x = as_real(send_value(x, B, C, H * W)), *dev_dy = as_real(send_value(dy, B, M, hw));
        float *dev_w = send(w, nw), *dev_dw = send(before, nw);
        c.prepared = on_device(cuda_layers.conv4_prepared_bytes(&c));
        reverse(order);
        cuda_layers.conv4_prepare(&gpu, c.prepared, dev_w, &c);
        conv4_forward(&gpu, dev_y, dev_x, dev_w, &c);
        conv4_backward(&gpu, dev_dx, dev_dw, dev_dy, dev_x, dev_w, &c);
        reverse(0);
        CHECK_OK(compute_status(&gpu));
        near_value("4x4 y", (floatX *)(void *)dev_y, y, B, M, hw);
        near_value("4x4 dx", (floatX *)(void *)dev_dx, dx, B, C, H * W);
        near_f("4x4 dw", dev_dw, dw, nw);
        digest = 0;
        add_digest(dev_y, ny * sizeof(floatX)), add_digest(dev_dx, nx * sizeof(floatX)), add_digest(dev_dw, nw * 4);
        if (order) CHECK(digest == first);
        first = digest;
        free_arrays();
    }
    void *all[] = {x, w, dy, dw, before, y, dx};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static void test_convs(void) {
    for (int small = 0; small < 2; small++) {
        test_conv4(2, 3, 8, 2, 16, 16, small);
        test_conv4(3, 5, 10, 2, 7, 9, small); /* odd sides, channels that are not whole packs */
        test_conv4(3, 8, 1, 1, 5, 4, small);
        test_conv4(5, 10, 20, 1, 3, 4, small);
        test_conv4(1, 1, 1, 2, 2, 2, small);
        /* those that tensor cores do directly: several tiles, and parts of tiles */
        test_conv4(1, 32, 8, 2, 12, 10, small);
        test_conv4(3, 32, 40, 1, 8, 9, small);
        test_conv4(2, 64, 1, 1, 4, 4, small);
    }
}

/* ---- Batch norm or a bias, and leaky ReLU ---- */

/* (n,M), as a GPU has it, from (M,n), or back with n and M exchanged */
static real *turned(const real *x, size_t M, size_t n) {
    real *y = (real *)malloc((M * n + 1) * sizeof *y);
    for (size_t i = 0; i < M * n; i++) y[i % n * M + i / n] = x[i];
    return y;
}
static floatX *send_turned(const real *x, size_t M, size_t n) {
    real *y = turned(x, M, n);
    floatX *p = send_x(y, M * n);
    free(y);
    return p;
}
static void near_turned(const char *name, const floatX *got, const real *want, size_t M, size_t n) {
    real *y = turned(want, M, n);
    near_x(name, got, y, M * n);
    free(y);
}

/* What a side of the test has: values (M,n), numbers of channels */
typedef struct {
    real *a, *y, *other, *g;
    float *dgamma, *dbeta, *stats, *tracked; /* stats (4,M): mean, rstd, and their buffers */
    const float *gamma, *beta;
} ActivationSide;

static Activation activation_on(const ActivationSide *side, size_t M, size_t n, int normal) {
    const Activation s = {M,
                          n,
                          (real)0.2,
                          1e-5,
                          0.1,
                          normal ? side->gamma : NULL,
                          side->beta,
                          side->stats,
                          side->stats + M,
                          side->stats + 2 * M,
                          side->stats + 3 * M,
                          side->tracked};
    return s;
}

/* The same on the device; what is turned lies there so; a is to be written. */
static ActivationSide sent_side(const ActivationSide *here, size_t n, size_t M) {
    ActivationSide there = {as_real((floatX *)on_device(n * M * sizeof(floatX))),
                            as_real(send_turned(here->y, M, n)),
                            as_real(send_turned(here->other, M, n)),
                            as_real(send_turned(here->g, M, n)),
                            send(here->dgamma, M),
                            send(here->dbeta, M),
                            NULL,
                            send(here->tracked, 1),
                            send(here->gamma, M),
                            send(here->beta, M)};
    return there;
}

static void near_statistics(const Activation *gpu, const Activation *plain, size_t M) {
    near_f("mean", gpu->mean, plain->mean, M), near_f("1/deviation", gpu->rstd, plain->rstd, M);
    near_f("running mean", gpu->running_mean, plain->running_mean, M);
    near_f("running variance", gpu->running_var, plain->running_var, M);
}

/* normal: with a norm, else a bias */
static void test_norm(size_t n, size_t M, double step, int normal) {
    const size_t size = n * M;
    real *y = random_reals(size, 11, 2), *gamma = random_reals(M, 12, 1), *beta = random_reals(M, 13, 1),
         *other = random_reals(size, 14, 1), *da = random_reals(size, 15, 1);
    const Compute plain = plain_side();
    uint64_t first = 0;
    for (size_t i = 0; i < size; i++) y[i] = to_float(to_floatX(y[i] + 4)); /* a mean far from zero */
    for (int order = 0; order < orders(); order++) {
        float tracked = 3, dev_tracked = 0;
        real *stats = random_reals(4 * M, 20, 1);
        ActivationSide here = {random_reals(size, 16, 1),
                               y,
                               other,
                               copy_of(da, size),
                               random_reals(M, 18, 1),
                               random_reals(M, 19, 1),
                               stats,
                               &tracked,
                               gamma,
                               beta};
        for (size_t i = 2 * M; i < 4 * M; i++) stats[i] = (real)fabs((double)stats[i]);
        ActivationSide there = sent_side(&here, n, M);
        Activation s = activation_on(&here, M, n, normal), gpu_s = activation_on(&there, M, n, normal);
        gpu_s.mean = send(stats, M), gpu_s.rstd = send(stats + M, M);
        gpu_s.running_mean = send(stats + 2 * M, M), gpu_s.running_var = send(stats + 3 * M, M);
        const Compute gpu = gpu_side(cuda_layers.activate_needs(&plain, &s));
        reverse(order);
        activate_forward(&gpu, there.a, there.y, &gpu_s);
        activate_backward(&gpu, there.g, there.dgamma, there.dbeta, there.a, there.y, there.other, step, &gpu_s);
        reverse(0);
        CHECK_OK(compute_status(&gpu));
        activate_forward(&plain, here.a, y, &s);
        near_turned("norm a", (floatX *)(void *)there.a, here.a, M, n);
        /* which side of 0 and of the other feature a number is on is the device's to say, where it rounds */
        for (size_t i = 0; i < size; i++) here.a[i] = to_float(to_floatX(here.a[i]));
        activate_backward(&plain, here.g, here.dgamma, here.dbeta, here.a, y, other, step, &s);
        near_turned("norm dy", (floatX *)(void *)there.g, here.g, M, n);
        near_f("norm dgamma", there.dgamma, here.dgamma, M);
        near_f("norm dbeta", there.dbeta, here.dbeta, M);
        CHECK_OK(to_host(device, &dev_tracked, there.tracked, sizeof dev_tracked));
        CHECK(dev_tracked == (normal ? 4 : 3) && tracked == dev_tracked);
        if (normal) near_statistics(&gpu_s, &s, M);
        digest = 0;
        add_digest(there.a, size * sizeof(floatX)), add_digest(there.g, size * sizeof(floatX)),
            add_digest(there.dgamma, M * 4);
        if (order) CHECK(digest == first);
        first = digest;
        void *all[] = {here.a, here.g, here.dgamma, here.dbeta, stats};
        for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
        free_arrays();
    }
    void *all[] = {y, gamma, beta, other, da};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static void test_norms(void) {
    test_norm(35, 8, 0, 1);
    test_norm(35, 8, 0.5, 0);
    test_norm(3, 5, 0.3, 1);
    test_norm(9, 40, 0.7, 1);
    test_norm(1030, 16, 0, 1); /* three slices */
    test_norm(517, 3, 0.1, 1);
}

/* ---- Whole networks ----
 *
 * In float they are held to 1e-4. In bf16 the layers are, to 2e-2, but whole networks can be held only to what rounding
 * does to them: where it moves a number across 0, a leaky ReLU or a pool changes its mind, and with it all gradients
 * below. So the C is run again with every weight moved by up to a rounding step of bf16, MOVES times; twice what that
 * does at most is what the device may be off. */
enum { MOVES = IS_BF16 ? 3 : 0 };

static void near_moved(const char *name, const real *got, const real *want, const real *const moved[], size_t n) {
    double limit = TOLERANCE;
    for (int m = 0; m < MOVES; m++) {
        real *gap = copy_of(moved[m], n);
        for (size_t i = 0; i < n; i++) gap[i] -= want[i];
        limit = fmax(limit, 2 * rms_of(gap, n) / rms_of(want, n));
        free(gap);
    }
    near_rms(name, got, want, n, 0, limit);
}

/* The same numbers each time, which bf16 has: as at the beginning of training, those around 1 spread out, `noise` added
 * to the others. move: 0, or which of the moves */
static void fill(Params *p, double noise, int move) {
    params_init(p, 3);
    for (size_t i = 0; i < p->n; i++)
        for (size_t k = 0; k < p->row[i].size; k++) {
            real *v = &p->row[i].value[k];
            if (p->row[i].init != INIT_ONE && !p->row[i].untrained)
                *v += (real)(noise * rng_normal(5, rng_stream(RNG_TEST, 99, i), k));
            if (p->row[i].init == INIT_ONE && !p->row[i].untrained) *v = (real)(0.5 + rng_uniform(4, i, k));
            if (IS_BF16) *v = to_float(to_floatX(*v));
            if (move) *v *= (real)(1 + (2 * rng_uniform(80 + (uint64_t)move, i, k) - 1) / 256);
        }
}

/* ---- Whole discriminators ---- */

static Discriminator *make_disc(const DiscConfig *c, int there, int move) {
    Discriminator *d = NULL;
    CHECK_OK(disc_create(&d, c));
    Params *p = disc_params(d);
    CHECK_OK(params_plan(p, PLAN_VALUE | PLAN_GRAD | PLAN_ADAM));
    fill(p, 0.2, move); /* every layer matters */
    if (!there) return d;
    CHECK_OK(open_device(&p->device));
    p->ops = &CUDA_TABLE;
    return d;
}

/* What a discriminator says and learns, on either side. */
typedef struct {
    real *logits, *dimage, *matched, *grad, *value;
    double gap;
    size_t n, pixels;
} Said;

static Said say(Discriminator *d, size_t B, size_t H, size_t W) {
    Params *p = disc_params(d);
    const size_t pixels = B * p->row[0].dim[1] * H * W;
    real *image = random_reals(pixels, 1, 0.7), *other = random_reals(pixels, 2, 0.7);
    const real *logits;
    Said s;
    CHECK_OK(disc_plan(d, B, H, W, 1));
    if (p->device) CHECK_ERR(disc_forward(d, image, 0, &logits), "not on the GPU yet");
    CHECK_OK(params_send(p));
    s.n = disc_logits(d), s.pixels = pixels;
    s.dimage = random_reals(pixels, 3, 1), s.matched = random_reals(pixels, 3, 1);
    real *dlogits = random_reals(s.n, 4, 1);
    params_zero_grad(p);
    CHECK_OK(disc_forward(d, other, 1, &logits));
    CHECK_OK(disc_backward(d, dlogits, 0, 1, NULL)); /* gradients of parameters add up */
    CHECK_OK(disc_keep_features(d));
    CHECK_OK(disc_forward(d, image, 1, &logits));
    s.logits = copy_of(logits, s.n);
    s.gap = disc_feature_loss(d);
    CHECK_OK(disc_backward(d, NULL, 1.5, 0, s.matched));
    CHECK_OK(disc_backward(d, dlogits, 0, 1, s.dimage));
    CHECK_OK(disc_forward(d, other, 0, &logits)); /* no buffer follows, nothing is learnt */
    CHECK_OK(disc_backward(d, dlogits, 0, 0, NULL));
    CHECK_OK(params_fetch(p));
    s.grad = copy_of(p->arena[1], p->total), s.value = copy_of(p->arena[0], p->total);
    free(image), free(other), free(dlogits);
    return s;
}

static void forget(Said *s) {
    void *all[] = {s->logits, s->dimage, s->matched, s->grad, s->value};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static void same_said(const Said *got, const Said *want, const Said moved[], const Params *p) {
    const real *run[3];
#define SAME(name, array, at, n)                                                                                       \
    for (int m = 0; m < MOVES; m++) run[m] = moved[m].array + (at);                                                    \
    near_moved(name, got->array + (at), want->array + (at), run, n)
    SAME("logits", logits, 0, want->n);
    SAME("gradient of pictures", dimage, 0, want->pixels);
    SAME("gradient of feature matching", matched, 0, want->pixels);
    for (size_t i = 0; i < p->n; i++) {
        const Param *r = &p->row[i];
        const size_t at = (size_t)(r->value - p->arena[0]);
        if (r->untrained) {
            SAME(r->name, value, at, r->size);
        } else {
            SAME(r->name, grad, at, r->size);
        }
    }
#undef SAME
    CHECK(fabs(got->gap - want->gap) <= TOLERANCE * want->gap);
}

static Said said_here(const DiscConfig *c, int move, size_t B, size_t H, size_t W) {
    Discriminator *d = make_disc(c, 0, move);
    const Said s = say(d, B, H, W);
    disc_free(d);
    return s;
}

static void test_disc(DiscConfig c, size_t B, size_t H, size_t W) {
    Said want = said_here(&c, 0, B, H, W), moved[MOVES + 1], first = {};
    for (int m = 0; m < MOVES; m++) moved[m] = said_here(&c, m + 1, B, H, W);
    for (int order = 0; order < orders(); order++) {
        Discriminator *there = make_disc(&c, 1, 0);
        const Params *p = disc_params(there);
        reverse(order);
        Said got = say(there, B, H, W);
        reverse(0);
        if (order == 0) {
            same_said(&got, &want, moved, p);
            first = got;
        } else {
            CHECK(memcmp(got.grad, first.grad, p->total * sizeof *got.grad) == 0);
            CHECK(memcmp(got.value, first.value, p->total * sizeof *got.value) == 0);
            CHECK(memcmp(got.dimage, first.dimage, got.pixels * sizeof *got.dimage) == 0);
            CHECK(memcmp(got.matched, first.matched, got.pixels * sizeof *got.matched) == 0 && got.gap == first.gap);
            forget(&got);
        }
        disc_free(there);
    }
    forget(&want), forget(&first);
    for (int m = 0; m < MOVES; m++) forget(&moved[m]);
}

/* Steps of the optimizer are seen by the convolutions; the buffers are left to batch norm. */
static void test_steps(void) {
    const DiscConfig c = {3, 8, 1};
    const AdamW o = {1e-3, 0.5, 0.9, 1e-8, 0};
    enum { PIXELS = 2 * 3 * 16 * 16 };
    real *image = random_reals(PIXELS, 1, 0.7), dlogits[128], *value[2], out[2][128];
    size_t n = 0;
    for (int k = 0; k < 2; k++) {
        Discriminator *d = make_disc(&c, k, 0);
        Params *p = disc_params(d);
        const real *logits;
        CHECK_OK(disc_plan(d, 2, 16, 16, 0));
        CHECK_OK(params_send(p));
        for (uint64_t step = 1; step <= 3; step++) {
            params_zero_grad(p);
            CHECK_OK(disc_forward(d, image, 1, &logits));
            n = disc_logits(d);
            disc_loss(step % 2 ? DISC_HINGE : DISC_VANILLA, logits, n, step > 1, 1, dlogits);
            CHECK_OK(disc_backward(d, dlogits, 0, 1, NULL));
            CHECK(params_grad_norm(p) > 0);
            adamw_step(p, &o, step);
        }
        CHECK_OK(disc_forward(d, image, 0, &logits));
        memcpy(out[k], logits, n * sizeof *logits);
        CHECK_ERR(disc_backward(d, dlogits, 1, 0, NULL), "without features");
        CHECK_OK(params_fetch(p));
        value[k] = copy_of(p->arena[0], p->total);
        if (k) near_rms("values after three steps", value[1], value[0], p->total, 0, TOLERANCE);
        disc_free(d);
    }
    near_rms("logits after three steps", out[1], out[0], n, 0, TOLERANCE);
    free(image), free(value[0]), free(value[1]);
}

static void test_discs(void) {
    test_disc((DiscConfig){3, 8, 2}, 4, 32, 32);
    test_disc((DiscConfig){3, 5, 2}, 2, 14, 19);  /* odd and even sides: 7x9, 3x4, 2x3, 1x2 */
    test_disc((DiscConfig){3, 32, 1}, 2, 16, 20); /* on tensor cores */
    test_steps();
}

/* ---- What LPIPS is made of ---- */

static void test_relu(size_t n) {
    const Compute plain = plain_side(), gpu = gpu_side(1);
    real *y = random_reals(n, 41, 1), *dy = random_reals(n, 42, 1);
    floatX *dev_y = send_x(y, n), *dev_dy = send_x(dy, n);
    relu_forward(&gpu, as_real(dev_y), n);
    relu_backward(&gpu, as_real(dev_dy), as_real(dev_y), n);
    CHECK_OK(compute_status(&gpu));
    relu_forward(&plain, y, n);
    relu_backward(&plain, dy, y, n);
    near_x("relu", dev_y, y, n);
    near_x("relu backward", dev_dy, dy, n);
    free(y), free(dy);
    free_arrays();
}

/* Whole numbers few enough that the largest comes more than once: the first gets the gradient. */
static void test_pool(size_t B, size_t C, size_t h, size_t w) {
    const Compute plain = plain_side(), gpu = gpu_side(1);
    const size_t nx = B * C * h * w, hw = (h / 2) * (w / 2), ny = B * C * hw;
    real *x = random_reals(nx, 43, 1), *dy = random_reals(ny, 44, 1), *y = random_reals(ny, 45, 1),
         *dx = random_reals(nx, 46, 1);
    for (size_t i = 0; i < nx; i++) x[i] = (real)floor((double)x[i]);
    pool_forward(&plain, y, x, B, C, h, w);
    pool_backward(&plain, dx, dy, x, B, C, h, w);
    floatX *dev_y = (floatX *)on_device(ny * sizeof *dev_y), *dev_dx = (floatX *)on_device(nx * sizeof *dev_dx);
    const floatX *dev_x = send_picture(x, B, C, h * w);
    pool_forward(&gpu, as_real(dev_y), as_real(dev_x), B, C, h, w);
    pool_backward(&gpu, as_real(dev_dx), as_real(send_picture(dy, B, C, hw)), as_real(dev_x), B, C, h, w);
    CHECK_OK(compute_status(&gpu));
    near_picture("pool", dev_y, y, B, C, hw);
    near_picture("pool backward", dev_dx, dx, B, C, h * w);
    free(x), free(dy), free(y), free(dx);
    free_arrays();
}

static double sum_of(const double *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i];
    return sum;
}

/* Position 0 of both pictures, and position 1 of r alone, have no direction. B = 1 */
static void test_compare(size_t hw, size_t C, int accumulate) {
    const Compute plain = plain_side(), gpu = gpu_side(1);
    const TapShape c = {1, C, hw, 0.7, accumulate};
    const size_t n = hw * C, n_sums = comparison_sums(&gpu, 1, hw);
    real *a = random_reals(n, 46, 1), *r = random_reals(n, 47, 1), *lin = random_reals(C, 48, 1),
         *dr = random_reals(n, 49, 1);
    double want[1], sums[SUM_BLOCKS];
    CHECK(comparison_sums(&plain, 1, hw) == 1 && n_sums <= SUM_BLOCKS);
    for (size_t k = 0; k < C; k++) lin[k] = (real)fabs((double)lin[k]); /* as LPIPS has them */
    for (size_t i = 0; i < n; i++) {
        a[i] = a[i] > 0 && i % hw > 0 ? a[i] : 0;
        r[i] = r[i] > 0 && i % hw > 1 ? r[i] : 0;
    }
    floatX *dev_dr = send_picture(dr, 1, C, hw);
    const floatX *dev_a = send_picture(a, 1, C, hw), *dev_r = send_picture(r, 1, C, hw);
    compare_features(&gpu, device->sums, as_real(dev_dr), as_real(dev_a), as_real(dev_r), send(lin, C), &c);
    CHECK_OK(compute_get(&gpu, sums, device->sums, n_sums * sizeof *sums));
    compare_features(&plain, want, dr, a, r, lin, &c);
    const double got = sum_of(sums, n_sums);
    CHECK(fabs(got - want[0]) <= TOLERANCE * fabs(want[0]));
    real *by_position = as_cells(dr, 1, C, hw);
    near_x("compared, no direction", dev_dr, by_position, min_size(2, hw) * C);
    if (hw > 2) near_x("compared", dev_dr + 2 * C, by_position + 2 * C, n - 2 * C);
    free(a), free(r), free(lin), free(dr), free(by_position);
    free_arrays();
}

static void test_lpips_layers(void) {
    test_relu(1000), test_relu(7);
    test_pool(2, 8, 6, 4), test_pool(1, 5, 7, 9), test_pool(2, 3, 2, 3);
    test_compare(3, 5, 0), test_compare(40, 64, 1), test_compare(2500, 3, 1); /* blocks take several cells a warp */
}

/* ---- Whole LPIPS ---- */

static Perceptual *make_perceptual(const PerceptualConfig *c, int there, int move) {
    Perceptual *p = NULL;
    CHECK_OK(perceptual_create(&p, c));
    Params *t = perceptual_params(p);
    CHECK_OK(params_plan(t, PLAN_VALUE));
    fill(t, 0, move);
    if (!there) return p;
    CHECK_OK(open_device(&t->device));
    t->ops = &CUDA_TABLE;
    return p;
}

typedef struct {
    size_t B, H, W, n;
    real *x, *xrec;
} Pair;

/* *loss; the gradient, from 0 on */
static real *differ_here(const PerceptualConfig *c, int move, const Pair *a, double *loss) {
    Perceptual *p = make_perceptual(c, 0, move);
    real *d = (real *)calloc(a->n, sizeof *d);
    CHECK_OK(perceptual_plan(p, a->B, a->H, a->W, 1));
    CHECK_OK(perceptual_loss(p, a->x, a->xrec, a->B, a->H, a->W, 2.5, loss, d));
    perceptual_free(p);
    return d;
}

static void check_equal_pictures(Perceptual *p, const Pair *a) {
    real *d = (real *)calloc(a->n, sizeof *d), *zero = (real *)calloc(a->n, sizeof *zero);
    double loss = 1;
    CHECK_OK(perceptual_loss(p, a->x, a->x, a->B, a->H, a->W, 1, &loss, d));
    CHECK(loss == 0 && memcmp(d, zero, a->n * sizeof *d) == 0);
    free(d), free(zero);
}

/* at_once: pictures in the network, planned for, maybe fewer than the batch */
static void test_perceptual(const PerceptualConfig *c, size_t B, size_t H, size_t W, size_t at_once) {
    const size_t n = B * 3 * H * W;
    const Pair a = {B, H, W, n, random_reals(n, 61, 0.5), random_reals(n, 62, 0.5)};
    double wanted, said, alone;
    const real *moved[MOVES + 1];
    real *want = differ_here(c, 0, &a, &wanted), *first = NULL;
    for (int m = 0; m < MOVES; m++) moved[m] = differ_here(c, m + 1, &a, &said);
    for (int order = 0; order < orders(); order++) {
        Perceptual *p = make_perceptual(c, 1, 0);
        real *got = (real *)calloc(n, sizeof *got);
        CHECK_OK(perceptual_plan(p, at_once, H, W, 1));
        CHECK_ERR(perceptual_loss(p, a.x, a.xrec, B, H, W, 2.5, &said, got), "not on the GPU yet");
        CHECK_OK(params_send(perceptual_params(p)));
        reverse(order);
        CHECK_OK(perceptual_loss(p, a.x, a.xrec, B, H, W, 2.5, &said, got));
        CHECK_OK(perceptual_loss(p, a.x, a.xrec, B, H, W, 0, &alone, NULL));
        reverse(0);
        CHECK(alone == said && fabs(said - wanted) <= TOLERANCE * wanted);
        near_moved("gradient of LPIPS", got, want, moved, n);
        if (order) CHECK(memcmp(got, first, n * sizeof *got) == 0);
        free(first), first = copy_of(got, n);
        CHECK_OK(perceptual_loss(p, a.x, a.xrec, B, H, W, 2.5, &said, got)); /* it adds to what is there */
        for (size_t i = 0; i < n; i++) got[i] /= 2;
        CHECK(memcmp(got, first, n * sizeof *got) == 0);
        check_equal_pictures(p, &a);
        free(got);
        perceptual_free(p);
    }
    for (int m = 0; m < MOVES; m++) free((void *)moved[m]);
    free(a.x), free(a.xrec), free(want), free(first);
}

static void test_perceptuals(void) {
    const PerceptualConfig odd = {{4, 5, 6, 7, 8}, {2, 2, 3, 3, 3}}, wide = {{32, 40, 32, 9, 8}, {2, 1, 2, 1, 1}};
    test_perceptual(&odd, 3, 16, 16, 2);
    test_perceptual(&odd, 1, 23, 18, 1);
    test_perceptual(&wide, 2, 16, 20, 2); /* on tensor cores */
}

/* ---- main ---- */

static const Section sections[] = {{"conv", test_convs},
                                   {"norm", test_norms},
                                   {"disc", test_discs},
                                   {"lpips_layers", test_lpips_layers},
                                   {"lpips", test_perceptuals}};

int main(int argc, char **argv) {
    return run_sections(argc, argv, sections, sizeof sections / sizeof *sections);
}
