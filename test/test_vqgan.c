/* test_vqgan.c - the first stage against finite differences, against itself at other sizes and thread counts, and
 * against brute force. Agreement with the official implementation is test/golden's business.
 *
 * Gradients: the network is not differentiable where a latent changes its code, and straight-through gradients are
 * not the derivative of anything it computes. So the finite differences are taken of a surrogate whose derivative
 * they are: the codes and the step e - z are frozen, and S = <R, decode(z + frozen)> + the term of the codebook loss
 * that moves z. The other term, which moves the codebook, is checked by its closed form. */

#include "first_stage.h"
#include "training/training.h"
#include "test.h"

enum { IS_DOUBLE = sizeof(real) == 8 };

/* ---- Tiny first stages ---- */

static VqganConfig tiny(void) {
    VqganConfig c;
    memset(&c, 0, sizeof c);
    c.ch = 32;
    c.levels = 3;
    c.ch_mult[0] = 1, c.ch_mult[1] = 2, c.ch_mult[2] = 1; /* nin_shortcut up and down */
    c.num_res_blocks = 1;
    c.resolution = 12;
    c.n_attn = 1;
    c.attn_resolutions[0] = 6; /* level 1 */
    c.in_channels = 3;
    c.out_ch = 2;
    c.z_channels = 7;
    c.embed_dim = 5;
    c.n_embed = 11;
    c.legacy = 1;
    c.resamp_with_conv = 1;
    c.beta = 0.25;
    return c;
}

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
    real *y = NULL;
    CHECK_OK(mem_alloc(&y, n, sizeof *y, "test"));
    memcpy(y, x, n * sizeof *y);
    return y;
}

static int same_bits(const real *a, const real *b, size_t n) {
    return memcmp(a, b, n * sizeof *a) == 0;
}

/* Norms and biases away from their initial 1 and 0, codes far enough apart that small steps do not change them. */
static Vqgan *make(const VqganConfig *c, int honour_tanh) {
    Vqgan *v = NULL;
    CHECK_OK(vqgan_create(&v, c, honour_tanh));
    if (!v) exit(test_report());
    Params *p = vqgan_params(v);
    CHECK_OK(params_plan(p, PLAN_VALUE | PLAN_GRAD));
    params_init(p, 3);
    for (size_t i = 0; i < p->n; i++)
        if (p->row[i].ndim == 1)
            for (size_t j = 0; j < p->row[i].size; j++)
                p->row[i].value[j] += (real)(0.2 * rng_normal(5, rng_stream(RNG_TEST, 99, i), j));
    for (size_t i = 0; i < p->n; i++)
        if (strcmp(p->row[i].name, "quantize.embedding.weight") == 0) fill(p->row[i].value, p->row[i].size, 1, 98);
    return v;
}

static Param *find(Vqgan *v, const char *name) {
    Params *p = vqgan_params(v);
    for (size_t i = 0; i < p->n; i++)
        if (strcmp(p->row[i].name, name) == 0) return &p->row[i];
    printf("no parameter %s\n", name);
    exit(1);
}

/* ---- Gradients ---- */

typedef struct {
    Vqgan *v;
    size_t B, H, W, n_image, n_z, n_out;
    real *image, *R, *z, *frozen, *e, *out; /* frozen = e - z at the start */
    double to_z;                            /* weight of mean (e-z)^2 in S */
} Surrogate;

static double surrogate(Surrogate *s) {
    const size_t shift = vqgan_config(s->v)->levels - 1;
    double value = 0, gap = 0;
    if (vqgan_encode(s->v, s->image, s->B, s->H, s->W, 0, s->z, NULL, NULL) != OK) return NAN;
    for (size_t i = 0; i < s->n_z; i++) {
        gap += ((double)s->e[i] - (double)s->z[i]) * ((double)s->e[i] - (double)s->z[i]);
        s->z[i] += s->frozen[i];
    }
    if (vqgan_decode(s->v, s->z, s->B, s->H >> shift, s->W >> shift, s->out) != OK) return NAN;
    for (size_t i = 0; i < s->n_out; i++) value += (double)s->R[i] * (double)s->out[i];
    return value + s->to_z * gap / (double)s->n_z;
}

/* |dS/dr - <grad, r>| / |grad| for a random direction r: one wrong element among all shows. */
static double direction_error(Surrogate *s, real *x, const real *grad, size_t n, uint64_t stream) {
    const double step = 3e-5 / sqrt((double)n);
    real *r = random_reals(n, 1, stream), *keep = copied(x, n);
    double along = 0, size = 0, up, down;
    for (size_t i = 0; i < n; i++) {
        along += (double)grad[i] * (double)r[i];
        size += (double)grad[i] * (double)grad[i];
    }
    for (size_t i = 0; i < n; i++) x[i] = keep[i] + (real)step * r[i];
    up = surrogate(s);
    for (size_t i = 0; i < n; i++) x[i] = keep[i] - (real)step * r[i];
    down = surrogate(s);
    memcpy(x, keep, n * sizeof *x);
    free(r);
    free(keep);
    return fabs((up - down) / (2 * step) - along) / fmax(sqrt(size), 0.1); /* some are exactly 0 */
}

static Surrogate start(Vqgan *v, size_t B, size_t H, size_t W) {
    const VqganConfig *c = vqgan_config(v);
    const size_t N = (H >> (c->levels - 1)) * (W >> (c->levels - 1));
    Surrogate s;
    memset(&s, 0, sizeof s);
    s.v = v;
    s.B = B, s.H = H, s.W = W;
    s.n_image = B * c->in_channels * H * W;
    s.n_out = B * c->out_ch * H * W;
    s.n_z = B * c->embed_dim * N;
    s.image = random_reals(s.n_image, 0.5, 1);
    s.R = random_reals(s.n_out, 1, 2);
    s.z = random_reals(s.n_z, 1, 3);
    s.frozen = random_reals(s.n_z, 1, 4);
    s.e = random_reals(s.n_z, 1, 5);
    s.out = random_reals(s.n_out, 1, 6);
    return s;
}

static void finish(Surrogate *s) {
    free(s->image);
    free(s->R);
    free(s->z);
    free(s->frozen);
    free(s->e);
    free(s->out);
}

/* After vqgan_forward: the codes and latents that stay frozen. book_grad = what the codebook's gradient must be. */
static void freeze(Surrogate *s, double weight, real *book_grad) {
    const VqganConfig *c = vqgan_config(s->v);
    const size_t D = c->embed_dim, N = s->n_z / s->B / D;
    const real *z, *book = find(s->v, "quantize.embedding.weight")->value;
    const int32_t *raw;
    const double to_e = weight * (c->legacy ? c->beta : 1) * 2 / (double)s->n_z;
    s->to_z = weight * (c->legacy ? 1 : c->beta);
    vqgan_latents(s->v, &z, NULL, &raw);
    memset(book_grad, 0, c->n_embed * D * sizeof *book_grad);
    for (size_t b = 0; b < s->B; b++)
        for (size_t d = 0; d < D; d++)
            for (size_t i = 0; i < N; i++) {
                const size_t at = (b * D + d) * N + i, entry = (size_t)raw[b * N + i] * D + d;
                s->e[at] = book[entry];
                s->frozen[at] = book[entry] - z[at];
                book_grad[entry] += (real)(to_e * ((double)book[entry] - (double)z[at]));
            }
}

static void check_gradients(const VqganConfig *c, int honour_tanh, size_t B, size_t H, size_t W) {
    const double weight = 1.7, limit = 1e-6; /* float could not tell: directions only in double */
    Vqgan *v = make(c, honour_tanh);
    Params *p = vqgan_params(v);
    CHECK_OK(vqgan_plan(v, B, H, W, 1));
    Surrogate s = start(v, B, H, W);
    real *dimage = random_reals(s.n_image, 1, 8), *book_grad = random_reals(c->n_embed * c->embed_dim, 1, 9);
    const real *xrec;
    double loss, worst = 0;
    CHECK_OK(vqgan_forward(v, s.image, B, H, W, &xrec, &loss));
    freeze(&s, weight, book_grad);
    params_zero_grad(p);
    ready_begin(p);
    CHECK_OK(vqgan_backward(v, s.R, weight, dimage));
    ready_end(p);
    CHECK(loss > 0);
    for (size_t i = 0; IS_DOUBLE && i < p->n; i++) {
        Param *row = &p->row[i];
        if (strcmp(row->name, "quantize.embedding.weight") == 0) continue;
        const double e = direction_error(&s, row->value, row->grad, row->size, 100 + i);
        if (!test_note(e <= limit, __FILE__, __LINE__, row->name)) printf("     error %.3g\n", e);
        worst = e > worst ? e : worst;
    }
    const double image_error = IS_DOUBLE ? direction_error(&s, s.image, dimage, s.n_image, 10) : 0;
    CHECK(image_error <= limit);
    Param *book = find(v, "quantize.embedding.weight");
    CHECK_NEAR("codebook gradient", book->grad, book_grad, book->size, 1e-9, IS_DOUBLE ? 1e-12 : 1e-4);
    if (IS_DOUBLE) printf("gradients: parameters %.2g, image %.2g\n", worst, image_error);
    /* negative controls: one flipped element must show */
    if (IS_DOUBLE) {
        Param *row = find(v, c->resamp_with_conv ? "decoder.up.1.upsample.conv.weight" : "decoder.conv_out.weight");
        row->grad[5] += (real)1e-2 * row->grad[6];
        CHECK(direction_error(&s, row->value, row->grad, row->size, 11) > limit);
    }
    finish(&s);
    free(dimage);
    free(book_grad);
    vqgan_free(v);
}

static void test_gradients(int plainly) {
    VqganConfig c = tiny();
    const int before = threads_get();
    threads_set(1); /* the pictures are too small for threads to help */
    compute_plainly(plainly);
    if (plainly) c.levels = 2; /* the walk is the same; plain loops in double are slow */
    check_gradients(&c, 0, plainly ? 1 : 2, plainly ? 6 : 12, plainly ? 10 : 20); /* not square; 3x5 latents */
    c.legacy = 0;
    c.beta = 0.6;
    c.tanh_out = 1;
    c.re_embed = 6;
    c.n_attn = 0;
    c.levels = 2;
    c.ch_mult[0] = plainly ? 1 : 2;
    c.ch_mult[1] = 1;
    check_gradients(&c, 1, 1, 6, 10);
    c.resamp_with_conv = 0;
    check_gradients(&c, 0, 1, 6, 10);
    compute_plainly(0);
    threads_set(before);
}

/* Without convolutions, halving and doubling are what convolutions with these weights do: a quarter of each of 2x2 pixels,
 * one of the doubled picture. Odd sides lose their last row and column. */
static void test_resampling(void) {
    enum { B = 2, H = 13, W = 22, PREQUANT = B * 5 * 3 * 5, OUT = B * 2 * 12 * 20 };
    VqganConfig c = tiny();
    Vqgan *with = make(&c, 0);
    c.resamp_with_conv = 0;
    Vqgan *without = make(&c, 0);
    const Params *p = vqgan_params(without);
    size_t resampled = 0;
    for (size_t i = 0; i < vqgan_params(with)->n; i++) {
        const Param *row = &vqgan_params(with)->row[i];
        if (!strstr(row->name, "sample.conv.")) continue;
        resampled++;
        memset(row->value, 0, row->size * sizeof *row->value);
        for (size_t k = 0; row->ndim == 4 && k < row->dim[0]; k++) {
            real *w = row->value + (k * row->dim[1] + k) * 9;
            if (strstr(row->name, "down"))
                w[0] = w[1] = w[3] = w[4] = (real)0.25;
            else
                w[4] = 1;
        }
    }
    CHECK(resampled == 8 && p->n + resampled == vqgan_params(with)->n);
    for (size_t i = 0; i < p->n; i++)
        memcpy(p->row[i].value, find(with, p->row[i].name)->value, p->row[i].size * sizeof(real));
    real *image = random_reals(B * 3 * H * W, 1, 70), *z = random_reals(PREQUANT, 1, 71),
         *dx = random_reals(OUT, 1, 72);
    real *encoded[2], *decoded[2], *dimage[2];
    for (int k = 0; k < 2; k++) {
        Vqgan *v = k ? without : with;
        const real *xrec;
        double loss;
        encoded[k] = random_reals(PREQUANT, 1, 73), decoded[k] = random_reals(OUT, 1, 74);
        dimage[k] = random_reals(B * 3 * 12 * 20, 1, 75);
        CHECK_OK(vqgan_plan(v, B, H, W, 0));
        CHECK_OK(vqgan_encode(v, image, B, H, W, 0, encoded[k], NULL, NULL));
        CHECK_OK(vqgan_decode(v, z, B, 3, 5, decoded[k]));
        CHECK_OK(vqgan_plan(v, B, 12, 20, 1));
        CHECK_OK(vqgan_forward(v, image, B, 12, 20, &xrec, &loss));
        params_zero_grad(vqgan_params(v));
        CHECK_OK(vqgan_backward(v, dx, 1, dimage[k]));
    }
    const double limit = IS_DOUBLE ? 1e-11 : 3e-5;
    CHECK_NEAR("halved without convolution", encoded[1], encoded[0], PREQUANT, limit, limit);
    CHECK_NEAR("doubled", decoded[1], decoded[0], OUT, limit, limit);
    CHECK_NEAR("backward", dimage[1], dimage[0], B * 3 * 12 * 20, 10 * limit, 10 * limit);
    const Param *a = find(with, "encoder.conv_in.weight"), *b = find(without, "encoder.conv_in.weight");
    CHECK_NEAR("gradients", b->grad, a->grad, a->size, 100 * limit, 10 * limit);
    for (int k = 0; k < 2; k++) free(encoded[k]), free(decoded[k]), free(dimage[k]);
    free(image), free(z), free(dx);
    vqgan_free(with);
    vqgan_free(without);
}

#ifndef PLAIN
/* The whole network with fast layers and with plain ones: values, gradients of parameters and of the image. */
static void test_fast(void) {
    const VqganConfig c = tiny();
    const double limit = IS_DOUBLE ? 1e-12 : 1e-5;
    real *xrec[2], *dimage[2], *grad[2];
    double loss[2];
    size_t n_out = 0, n_image = 0, n_grad = 0;
    for (int plainly = 0; plainly < 2; plainly++) {
        Vqgan *v = make(&c, 0);
        Surrogate s = start(v, 2, 8, 12);
        const real *out;
        compute_plainly(plainly);
        CHECK_OK(vqgan_plan(v, 2, 8, 12, 1));
        compute_plainly(0);
        CHECK_OK(vqgan_forward(v, s.image, 2, 8, 12, &out, &loss[plainly]));
        n_out = s.n_out, n_image = s.n_image, n_grad = vqgan_params(v)->total;
        xrec[plainly] = copied(out, n_out), dimage[plainly] = random_reals(n_image, 1, 8);
        params_zero_grad(vqgan_params(v));
        CHECK_OK(vqgan_backward(v, s.R, 1.5, dimage[plainly]));
        grad[plainly] = copied(vqgan_params(v)->arena[1], n_grad);
        finish(&s);
        vqgan_free(v);
    }
    double largest = 0;
    for (size_t i = 0; i < n_grad; i++) largest = fmax(largest, fabs((double)grad[1][i]));
    CHECK_NEAR("fast xrec", xrec[0], xrec[1], n_out, 10 * limit, 10 * limit);
    CHECK_NEAR("fast dimage", dimage[0], dimage[1], n_image, 10 * limit, 10 * limit);
    CHECK_NEAR("fast gradients", grad[0], grad[1], n_grad, 10 * limit * largest, 10 * limit);
    CHECK(fabs(loss[0] - loss[1]) <= limit * loss[1]);
    CHECK(!same_bits(grad[0], grad[1], n_grad)); /* they were computed in two ways */
    for (int k = 0; k < 2; k++) free(xrec[k]), free(dimage[k]), free(grad[k]);
}
#endif

/* backward adds to parameter gradients; dimage = NULL changes none of them; tanh_out is ignored unless honoured */
static void test_accumulation(void) {
    VqganConfig c = tiny();
    c.tanh_out = 1;
    Vqgan *v = make(&c, 0), *honest = make(&c, 1);
    Params *p = vqgan_params(v);
    Surrogate s = start(v, 2, 8, 12);
    const real *xrec, *other;
    double loss, other_loss;
    CHECK_OK(vqgan_plan(v, 2, 8, 12, 1));
    CHECK_OK(vqgan_forward(v, s.image, 2, 8, 12, &xrec, &loss));
    params_zero_grad(p);
    CHECK_OK(vqgan_backward(v, s.R, 1, NULL));
    real *once = copied(p->arena[1], p->total), *dimage = random_reals(s.n_image, 1, 20);
    CHECK_ERR(vqgan_backward(v, s.R, 1, dimage), "must follow");
    CHECK_OK(vqgan_forward(v, s.image, 2, 8, 12, &xrec, &loss));
    CHECK_OK(vqgan_backward(v, s.R, 1, dimage));
    for (size_t i = 0; i < p->total; i++) once[i] *= 2;
    CHECK_NEAR("two backwards", p->arena[1], once, p->total, 0, IS_DOUBLE ? 1e-12 : 1e-5);
    params_zero_grad(p);
    CHECK_OK(vqgan_forward(v, s.image, 2, 8, 12, &xrec, &loss));
    CHECK_OK(vqgan_backward(v, s.R, 1, dimage));
    for (size_t i = 0; i < p->total; i++) once[i] /= 2;
    CHECK(same_bits(once, p->arena[1], p->total));

    CHECK_OK(vqgan_plan(honest, 2, 8, 12, 1));
    CHECK_OK(vqgan_forward(honest, s.image, 2, 8, 12, &other, &other_loss));
    for (size_t i = 0; i < s.n_out; i++) s.out[i] = (real)tanh((double)xrec[i]);
    CHECK_NEAR("tanh", other, s.out, s.n_out, 0, 1e-6);
    CHECK(loss == other_loss);
    finish(&s);
    free(once);
    free(dimage);
    vqgan_free(v);
    vqgan_free(honest);
}

/* ---- The same bits for every thread count, plan and batch ---- */

typedef struct {
    real *xrec, *dimage, *grad, *decoded;
    double loss;
    size_t n_out, n_image, n_grad;
} Run;

static Run run_with(const VqganConfig *c, int threads, size_t B, size_t H, size_t W) {
    Run r;
    threads_set(threads);
    Vqgan *v = make(c, 0);
    Params *p = vqgan_params(v);
    Surrogate s = start(v, B, H, W);
    const real *xrec, *zq;
    CHECK_OK(vqgan_plan(v, B, H, W, 1));
    CHECK_OK(vqgan_forward(v, s.image, B, H, W, &xrec, &r.loss));
    r.xrec = copied(xrec, s.n_out);
    r.dimage = random_reals(s.n_image, 1, 30);
    params_zero_grad(p);
    CHECK_OK(vqgan_backward(v, s.R, 1, r.dimage));
    r.grad = copied(p->arena[1], p->total);
    vqgan_latents(v, NULL, &zq, NULL);
    r.decoded = copied(zq, s.n_z);
    CHECK_OK(vqgan_plan(v, B, H, W, 0)); /* and once more with memory shared by liveness */
    CHECK_OK(vqgan_decode(v, r.decoded, B, H >> (c->levels - 1), W >> (c->levels - 1), s.out));
    free(r.decoded);
    r.decoded = copied(s.out, s.n_out);
    r.n_out = s.n_out;
    r.n_image = s.n_image;
    r.n_grad = p->total;
    finish(&s);
    vqgan_free(v);
    return r;
}

static void run_free(Run *r) {
    free(r->xrec);
    free(r->dimage);
    free(r->grad);
    free(r->decoded);
}

static void test_threads(size_t B, size_t H, size_t W) {
    const VqganConfig c = tiny();
    const int before = threads_get();
    Run one = run_with(&c, 1, B, H, W);
    CHECK(same_bits(one.xrec, one.decoded, one.n_out)); /* training and inference plans */
    for (int threads = 2; threads <= 3; threads++) {
        Run r = run_with(&c, threads, B, H, W);
        CHECK(r.loss == one.loss);
        CHECK(same_bits(r.xrec, one.xrec, one.n_out));
        CHECK(same_bits(r.dimage, one.dimage, one.n_image));
        CHECK(same_bits(r.grad, one.grad, one.n_grad));
        CHECK(same_bits(r.decoded, one.decoded, one.n_out));
        r.xrec[one.n_out - 1] += (real)1e-3;
        CHECK(!same_bits(r.xrec, one.xrec, one.n_out));
        run_free(&r);
    }
    run_free(&one);
    threads_set(before);
}

/* Latents that are no numbers, or too large to be told apart, have no tokens: that is said, not guessed. */
static void test_unusable(void) {
    static const struct {
        double bias;
        int usable;
    } at[] = {{1e3, 1}, {-1e14, 1}, {1e16, 0}, {-1e30, 0}, {HUGE_VAL, 0}, {-HUGE_VAL, 0}, {NAN, 0}};
    const VqganConfig c = tiny();
    Vqgan *v = make(&c, 0);
    Surrogate s = start(v, 3, 12, 20);
    real *last = find(v, "quant_conv.bias")->value;
    const real before = *last;
    int32_t tokens[3 * 15];
    CHECK_OK(vqgan_plan(v, 3, 12, 20, 0));
    for (size_t i = 0; i < sizeof at / sizeof *at; i++) {
        *last = (real)at[i].bias;
        if (at[i].usable)
            CHECK_OK(vqgan_encode(v, s.image, 3, 12, 20, 1, NULL, NULL, tokens));
        else
            CHECK_ERR(vqgan_encode(v, s.image, 3, 12, 20, 1, NULL, NULL, tokens), "encoder gives no usable numbers");
    }
    *last = before;
    CHECK_OK(vqgan_encode(v, s.image, 3, 12, 20, 1, NULL, NULL, tokens));
    finish(&s);
    vqgan_free(v);
}

/* A picture alone, or in a plan made for larger ones, has the same latents and the same reconstruction. */
static void test_sizes(void) {
    const VqganConfig c = tiny();
    Vqgan *v = make(&c, 0);
    Surrogate s = start(v, 3, 12, 20);
    const size_t picture = s.n_image / 3, latent = s.n_z / 3;
    real *alone = random_reals(s.n_z, 1, 40);
    int32_t tokens[3 * 15], token[15];
    CHECK_OK(vqgan_plan(v, 3, 12, 20, 0));
    CHECK_OK(vqgan_encode(v, s.image, 3, 12, 20, 1, s.z, NULL, tokens));
    CHECK_OK(vqgan_plan(v, 5, 24, 32, 1));
    for (size_t b = 0; b < 3; b++) {
        CHECK_OK(vqgan_encode(v, s.image + b * picture, 1, 12, 20, 1, alone, NULL, token));
        CHECK(same_bits(alone, s.z + b * latent, latent));
        CHECK(memcmp(token, tokens + b * 15, sizeof token) == 0);
    }
    finish(&s);
    free(alone);
    vqgan_free(v);
}

/* Training on H x W in a plan made for odd_H x odd_W: other algorithms, other tiles, and still enough memory. */
static void test_smaller_run(size_t odd_H, size_t odd_W, size_t H, size_t W) {
    VqganConfig c = tiny();
    c.levels = 1;
    c.n_attn = 0;
    Vqgan *v = make(&c, 0);
    Params *p = vqgan_params(v);
    Surrogate s = start(v, 3, H, W);
    const real *xrec;
    real *first = NULL, *grad = NULL;
    double loss;
    for (int large = 0; large < 2; large++) {
        CHECK_OK(large ? vqgan_plan(v, 3, odd_H, odd_W, 1) : vqgan_plan(v, 3, H, W, 1));
        CHECK_OK(vqgan_forward(v, s.image, 3, H, W, &xrec, &loss));
        if (large) CHECK(same_bits(first, xrec, s.n_out));
        if (!large) first = copied(xrec, s.n_out);
        params_zero_grad(p);
        CHECK_OK(vqgan_backward(v, s.R, 1, NULL));
        if (large) CHECK(same_bits(grad, p->arena[1], p->total));
        if (!large) grad = copied(p->arena[1], p->total);
    }
    finish(&s);
    free(first);
    free(grad);
    vqgan_free(v);
}

/* ---- Quantiser ---- */

/* The nearest entry by exhaustive search in double, the first of equals; *margin: how clear the smallest choice is. */
static void search(const real *book, size_t K, size_t D, const real *z, size_t B, size_t N, int32_t *raw,
                   double *margin) {
    *margin = INFINITY;
    for (size_t i = 0; i < B * N; i++) {
        double best = INFINITY, second = INFINITY;
        for (size_t k = 0; k < K; k++) {
            double d = 0;
            for (size_t j = 0; j < D; j++) {
                const double gap = (double)z[(i / N * D + j) * N + i % N] - (double)book[k * D + j];
                d += gap * gap;
            }
            if (d < best) {
                second = best;
                best = d;
                raw[i] = (int32_t)k;
            } else if (d > best && d < second)
                second = d;
        }
        *margin = fmin(*margin, second - best);
    }
}

/* With all scratch that the layer needs; its processor's fellow, or the plain loop. */
static void quantize(const real *z, const real *book, const Codes *s, int32_t *code) {
    Compute on = compute_of(&(Params){0});
    if (on.fast) CHECK_OK(mem_alloc(&on.scratch, on.fast->nearest_needs(&on, s), 1, "test"));
    nearest_codes(&on, code, z, book, s);
    free(on.scratch);
}

static void test_quantizer(void) {
    VqganConfig c = tiny();
    c.levels = 1;
    c.n_attn = 0;
    c.n_embed = 1031; /* more than one block of codes */
    enum { B = 2, H = 17, W = 19, N = H * W, D = 5 };
    Vqgan *v = make(&c, 0);
    real *book = find(v, "quantize.embedding.weight")->value, *z = random_reals(B * N * D, 1, 50);
    real *back = random_reals(B * N * D, 1, 51);
    static int32_t tokens[B * N], expected[B * N];
    const Codes s = {B, D, N, c.n_embed};
    double margin;
    memcpy(book + 700 * D, book + 3 * D, D * sizeof *book); /* a tie: 3 wins over 700 */
    for (size_t i = 0; i < 40; i++)
        for (size_t d = 0; d < D; d++) z[d * N + i] = book[3 * D + d];
    search(book, c.n_embed, D, z, B, N, expected, &margin);
    printf("quantizer: clearest doubt %.2g\n", margin);
    CHECK(margin > 1e-6);
    for (int plainly = 0; plainly < 2; plainly++) {
        compute_plainly(plainly);
        memset(tokens, -1, sizeof tokens);
        quantize(z, book, &s, tokens);
        compute_plainly(0);
        CHECK(memcmp(tokens, expected, sizeof tokens) == 0);
        CHECK(tokens[0] == 3 && tokens[39] == 3);
    }
    CHECK_OK(first_stage_lookup(v, tokens, B, N, back));
    for (size_t i = 0; i < B * N; i++)
        for (size_t d = 0; d < D; d++)
            if (back[(i / N * D + d) * N + i % N] != book[(size_t)expected[i] * D + d]) CHECK(!"lookup");
    CHECK_OK(vqgan_plan(v, B, H, W, 0));
    tokens[5] = (int32_t)c.n_embed;
    CHECK_ERR(vqgan_decode_tokens(v, tokens, B, H, W, back), "token 5 of picture 0 is 1031, expected 0..1030");
    tokens[5] = -1;
    CHECK_ERR(vqgan_decode_tokens(v, tokens, B, H, W, back), "is -1");
    free(z);
    free(back);
    vqgan_free(v);
}

static void write_model(Vqgan *v, const char *path, const int64_t *used, size_t n_used) {
    TensorList list;
    memset(&list, 0, sizeof list);
    CHECK_OK(tensor_list_params(&list, vqgan_params(v), 'v', "first_stage_model.", DT_F32));
    if (used) CHECK_OK(tensor_list_add(&list, "first_stage_model.quantize.used", DT_I64, 1, &n_used, used, 0));
    Config meta;
    memset(&meta, 0, sizeof meta);
    CHECK_OK(checkpoint_write(path, list.tensor, list.from_real, list.n, &meta));
    tensor_list_free(&list);
}

static const int64_t remap_used[4] = {9, 2, 5, 10};
enum { REMAP_B = 3, REMAP_N = 15 * 12 };

/* The tokens of pictures, where raw says the nearest entries: known ones have their number, each unknown one any, other
 * ones under another seed. */
static void check_tokens(const int32_t *raw, const int32_t *tokens, const int32_t *other) {
    size_t known = 0, unknown = 0, moved = 0, count[4] = {0};
    for (size_t i = 0; i < REMAP_B * REMAP_N; i++) {
        CHECK(tokens[i] >= 0 && tokens[i] < 4);
        count[tokens[i]]++;
        size_t at = 0;
        while (at < 4 && remap_used[at] != raw[i]) at++;
        if (at < 4) {
            known++;
            if (tokens[i] != (int32_t)at || other[i] != (int32_t)at) CHECK(!"a known code moved");
        } else {
            unknown++;
            moved += other[i] != tokens[i];
        }
    }
    CHECK(known > 20 && unknown > 20 && moved > unknown / 2);
    CHECK(count[0] > 20 && count[1] > 20 && count[2] > 20 && count[3] > 20);
}

static void test_remapped(Vqgan *w) {
    enum { B = REMAP_B, N = REMAP_N };
    real *image = random_reals(B * 3 * 60 * 48, 2, 60), *back = random_reals(B * N * 5, 1, 61);
    real *book = find(w, "quantize.embedding.weight")->value, *z = random_reals(B * N * 5, 1, 62);
    static int32_t raw[B * N], tokens[B * N], again[B * N], other[B * N];
    CHECK_OK(vqgan_plan(w, B, 60, 48, 0));
    CHECK_OK(vqgan_encode(w, image, B, 60, 48, 1, z, NULL, NULL));
    for (size_t k = 0; k < 11; k++) /* entries that are latents, so that each is the nearest of some */
        for (size_t d = 0; d < 5; d++) book[k * 5 + d] = z[d * N + k * N / 11];
    CHECK_OK(vqgan_encode(w, image, B, 60, 48, 1, NULL, raw, tokens));
    CHECK_OK(vqgan_encode(w, image, B, 60, 48, 1, NULL, NULL, again));
    CHECK_OK(vqgan_encode(w, image, B, 60, 48, 2, NULL, NULL, other));
    check_tokens(raw, tokens, other);
    CHECK(memcmp(tokens, again, sizeof tokens) == 0);
    CHECK_OK(first_stage_lookup(w, tokens, B, N, back));
    CHECK(back[0] == book[remap_used[tokens[0]] * 5]);
    free(image);
    free(z);
    free(back);
}

static void test_remap(void) {
    const char *path = "/tmp/test_vqgan.safetensors";
    VqganConfig c = tiny();
    c.re_embed = 4;
    int64_t used[4];
    memcpy(used, remap_used, sizeof used);
    Vqgan *v = make(&c, 0), *w = make(&c, 0);
    Checkpoint ck;
    memset(&ck, 0, sizeof ck);
    write_model(v, path, used, 4);
    CHECK_OK(checkpoint_open(&ck, path));
    params_init(vqgan_params(w), 77);
    CHECK_OK(vqgan_load(w, &ck, "first_stage_model."));
    checkpoint_close(&ck);
    CHECK(vqgan_K(w) == 4 && vqgan_used(w)[0] == 9 && vqgan_used(w)[3] == 10);
    const real *a = find(v, "encoder.mid.attn_1.q.weight")->value, *b = find(w, "encoder.mid.attn_1.q.weight")->value;
    CHECK_NEAR("loaded", b, a, 32 * 32, 0, 1e-7);
    test_remapped(w);

    used[2] = 11;
    write_model(v, path, used, 4);
    CHECK_OK(checkpoint_open(&ck, path));
    CHECK_ERR(vqgan_load(w, &ck, "first_stage_model."), "quantize.used[2] is 11, expected 0..10");
    CHECK_ERR(vqgan_load(w, &ck, ""), "encoder.conv_in.weight");
    checkpoint_close(&ck);
    write_model(v, path, NULL, 0);
    CHECK_OK(checkpoint_open(&ck, path));
    CHECK_ERR(vqgan_load(w, &ck, "first_stage_model."), "quantize.used");
    checkpoint_close(&ck);
    remove(path);
    vqgan_free(v);
    vqgan_free(w);
}

static void test_restart(void) {
    const VqganConfig c = tiny();
    Vqgan *v = make(&c, 0);
    Param *book = find(v, "quantize.embedding.weight");
    CHECK_OK(params_plan(vqgan_params(v), PLAN_ADAM | PLAN_EMA));
    CHECK_OK(vqgan_plan(v, 2, 12, 20, 1));
    Surrogate s = start(v, 2, 12, 20);
    const real *xrec, *z;
    double loss;
    uint32_t usage[11] = {1, 0, 3, 1, 1, 1, 1, 1, 0, 1, 1};
    CHECK(restart_codes(v, usage, 2, 15, 1, 1) == 0); /* nothing to restart from yet */
    CHECK_OK(vqgan_forward(v, s.image, 2, 12, 20, &xrec, &loss));
    vqgan_latents(v, &z, NULL, NULL);
    fill(book->m, book->size, 1, 70);
    fill(book->v, book->size, 1, 71);
    real *before = copied(book->value, book->size);
    CHECK(restart_codes(v, usage, 2, 15, 1, 1) == 2);
    for (size_t code = 0; code < 11; code++) {
        int found = 0;
        for (size_t i = 0; i < 30; i++) {
            int same = 1;
            for (size_t d = 0; d < 5; d++) same &= book->value[code * 5 + d] == z[(i / 15 * 5 + d) * 15 + i % 15];
            found |= same;
        }
        CHECK(found == !usage[code]);
        CHECK(same_bits(before + code * 5, book->value + code * 5, 5) == !!usage[code]);
        CHECK((book->m[code * 5] == 0 && book->v[code * 5 + 4] == 0) == !usage[code]);
        if (!usage[code]) CHECK(same_bits(book->ema + code * 5, book->value + code * 5, 5));
    }
    real *first = copied(book->value, book->size);
    CHECK(restart_codes(v, usage, 2, 15, 1, 1) == 2 && same_bits(first, book->value, book->size));
    CHECK(restart_codes(v, usage, 2, 15, 1, 2) == 2 && !same_bits(first, book->value, book->size));
    free(first);
    free(before);
    finish(&s);
    vqgan_free(v);
}

static void test_image_loss(void) {
    enum { N = 257 };
    real *x = random_reals(N, 1, 80), *y = random_reals(N, 1, 81), d[N];
    double l1, l2, s1 = 0, s2 = 0, up, down, unused;
    y[3] = x[3];
    image_loss(x, y, N, 0.3, 0.7, &l1, &l2, d);
    for (size_t i = 0; i < N; i++) {
        s1 += fabs((double)y[i] - (double)x[i]) / N;
        s2 += ((double)y[i] - (double)x[i]) * ((double)y[i] - (double)x[i]) / N;
    }
    CHECK(fabs(l1 - s1) < 1e-6 && fabs(l2 - s2) < 1e-6);
    CHECK(d[3] == 0);
    y[5] += (real)1e-3;
    image_loss(x, y, N, 0, 0, &up, &unused, NULL);
    y[5] -= (real)2e-3;
    image_loss(x, y, N, 0, 0, &down, &unused, NULL);
    image_loss(x, y, N, 1, 0, &s1, &s2, d);
    CHECK(fabs((up - down) / 2e-3 - (double)d[5]) < 1e-4);
    free(x);
    free(y);
}

/* ---- Names, shapes, refusals ---- */

static VqganConfig official(void) {
    VqganConfig c = tiny();
    const size_t mult[5] = {1, 1, 2, 2, 4};
    c.ch = 128;
    c.levels = 5;
    memcpy(c.ch_mult, mult, sizeof mult);
    c.num_res_blocks = 2;
    c.resolution = 256;
    c.attn_resolutions[0] = 16;
    c.out_ch = 3;
    c.z_channels = c.embed_dim = 256;
    c.n_embed = 1024;
    c.re_embed = 548;
    return c;
}

static void test_table(void) {
    const VqganConfig c = official();
    Vqgan *v = NULL;
    CHECK_OK(vqgan_create(&v, &c, 0));
    Params *p = vqgan_params(v);
    CHECK(params_count(p) == 72141699); /* SPEC section 12 */
    const char *order[] = {"encoder.conv_in.weight",
                           "encoder.down.2.block.0.nin_shortcut.bias",
                           "encoder.down.4.block.1.norm1.weight",
                           "encoder.down.4.attn.0.norm.weight",
                           "encoder.mid.block_1.norm1.weight",
                           "encoder.conv_out.bias",
                           "decoder.conv_in.weight",
                           "decoder.mid.block_2.conv2.bias",
                           "decoder.up.0.block.0.norm1.weight",
                           "decoder.up.4.attn.2.proj_out.bias",
                           "decoder.up.4.upsample.conv.bias",
                           "decoder.conv_out.bias",
                           "quantize.embedding.weight",
                           "quant_conv.weight",
                           "post_quant_conv.bias"};
    size_t at = 0;
    for (size_t i = 0; i < p->n && at < sizeof order / sizeof *order; i++) at += !strcmp(p->row[i].name, order[at]);
    CHECK(at == sizeof order / sizeof *order);
    CHECK(strcmp(p->row[0].name, order[0]) == 0 && strcmp(p->row[p->n - 1].name, order[at - 1]) == 0);
    CHECK(find(v, "decoder.up.3.block.0.nin_shortcut.weight")->dim[1] == 512);
    vqgan_free(v);
}

/* A picture of 256x256 decoded by the official network: activations, scratch and the decoder's weights. */
static void test_memory(void) {
    const VqganConfig c = official();
    Vqgan *v = NULL;
    const size_t limit = (size_t)400 << 20;
    const int before = threads_get();
    size_t activations = 0, training = 0, weights = 0;
    CHECK_OK(vqgan_create(&v, &c, 0));
    const Params *p = vqgan_params(v);
    for (size_t i = 0; i < p->n; i++)
        if (strncmp(p->row[i].name, "encoder.", 8) != 0) weights += p->row[i].size * sizeof(float);
    threads_set(2); /* each needs scratch of its own */
    CHECK_OK(vqgan_plan_bytes(v, 1, 256, 256, 1, &training));
    CHECK_OK(vqgan_plan_bytes(v, 1, 256, 256, 0, &activations));
    threads_set(before);
    activations = activations / sizeof(real) * sizeof(float); /* as the programs, which are float, need it */
    printf("decoding 256x256: %zu MiB of activations, %zu MiB of weights\n", activations >> 20, weights >> 20);
    CHECK(activations > (size_t)3 * 128 * 256 * 256 * sizeof(float)); /* three values live at once */
    CHECK(activations + weights < limit && training > limit);
    vqgan_free(v);
}

static void test_flops(void) {
    VqganConfig c = official();
    Vqgan *v = NULL;
    c.levels = 1;
    c.num_res_blocks = 1;
    c.n_attn = 0;
    CHECK_OK(vqgan_create(&v, &c, 0));
    const double encode = vqgan_flops(v, 3, 2, 4, 1, 0), decode = vqgan_flops(v, 3, 2, 4, 0, 1);
    const double block = 2 * 9 * 128 * 128, attention = 4 * 128 * 128 + 2 * 8 * 128; /* multiplications for a cell */
    CHECK(encode == 2 * 3 * 8 * (9 * 3 * 128 + 3 * block + attention + 9 * 128 * 256 + 256 * 256));
    CHECK(decode == 2 * 3 * 8 * (256 * 256 + 9 * 256 * 128 + 4 * block + attention + 9 * 128 * 3));
    CHECK(vqgan_flops(v, 3, 2, 4, 1, 1) == encode + decode);
    vqgan_free(v);
}

static void test_config(void) {
    VqganConfig c = official(), d;
    Config text;
    memset(&text, 0, sizeof text);
    c.tanh_out = 1;
    c.legacy = 0;
    c.beta = 0.3;
    CHECK_OK(vqgan_config_write(&text, &c, "model.params."));
    CHECK_OK(vqgan_config_read(&d, &text, "model.params."));
    for (size_t i = c.levels; i < VQ_LEVELS; i++) d.ch_mult[i] = c.ch_mult[i];
    CHECK(memcmp(c.ch_mult, d.ch_mult, sizeof c.ch_mult) == 0 && d.levels == 5 && d.n_attn == 1);
    CHECK(d.ch == 128 && d.attn_resolutions[0] == 16 && d.resolution == 256 && d.num_res_blocks == 2);
    CHECK(d.in_channels == 3 && d.out_ch == 3 && d.z_channels == 256 && d.embed_dim == 256);
    CHECK(d.n_embed == 1024 && d.re_embed == 548 && d.tanh_out == 1 && d.legacy == 0 && d.beta == 0.3);
    CHECK_ERR(vqgan_config_read(&d, &text, "other."), "other.embed_dim");
    CHECK_OK(config_set(&text, "model.params.ddconfig.double_z", "true"));
    CHECK_ERR(vqgan_config_read(&d, &text, "model.params."), "double_z");
    config_free(&text);
}

/* What programs open: three channels, a grid of a token at least, a remap table as long as the settings say. */
static void test_first_stage_config(void) {
    static const struct {
        const char *key, *value;
        size_t used; /* entries of the file's quantize.used; NONE: it has none */
        const char *says;
    } cases[] = {{"ddconfig.out_ch", "4", 548, "out_ch 4, expected 3"},
                 {"ddconfig.out_ch", "1", 548, "out_ch 1, expected 3"},
                 {"ddconfig.in_channels", "6", 548, "in_channels is 6"},
                 {"ddconfig.resolution", "15", 548, "expected 16..32768 for 5 levels"},
                 {"ddconfig.resolution", "32769", 548, "expected 16..32768"},
                 {"re_embed", "548", 547, "re_embed is 548, v.quantize.used has 547"},
                 {"re_embed", "548", NONE, "v.quantize.used has 0"},
                 {"re_embed", "0", 548, "re_embed is 0"},
                 {"re_embed", "1025", 1025, "re_embed is 1025, expected 0..1024"},
                 {"re_embed", "0", 0, "v.quantize.used is empty"}};
    const VqganConfig good = official();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        VqganConfig c;
        Config text = {0};
        Tensor used = {.name = "v.quantize.used", .dtype = DT_I64, .ndim = 1, .size = 548};
        Checkpoint ck = {.tensor = &used, .n = 1};
        char key[96];
        CHECK_OK(vqgan_config_write(&text, &good, "model.params."));
        CHECK_OK(first_stage_config(&c, &text, &ck, "v."));
        CHECK(c.re_embed == 548);
        used.size = cases[i].used, ck.n = cases[i].used != NONE;
        snprintf(key, sizeof key, "model.params.%s", cases[i].key);
        CHECK_OK(config_set(&text, key, "%s", cases[i].value));
        CHECK_ERR(first_stage_config(&c, &text, &ck, "v."), cases[i].says);
        config_free(&text);
    }
}

static void refuse(VqganConfig c, const char *part) {
    Vqgan *v;
    CHECK_ERR(vqgan_create(&v, &c, 0), part);
    CHECK(v == NULL);
}

static void test_refusals(void) {
    VqganConfig c = tiny();
#define REFUSE(change, part)                                                                                           \
    do {                                                                                                               \
        c = tiny();                                                                                                    \
        change;                                                                                                        \
        refuse(c, part);                                                                                               \
    } while (0)
    REFUSE(c.ch = 48, "ch is 48, expected a multiple of 32");
    REFUSE(c.ch = 0, "ch is 0");
    REFUSE(c.levels = 0, "the length of ddconfig.ch_mult is 0, expected 1..8");
    REFUSE(c.levels = 9, "the length of ddconfig.ch_mult is 9");
    REFUSE(c.ch_mult[1] = 0, "ch_mult");
    REFUSE(c.ch_mult[2] = (size_t)-1, "ch_mult");
    REFUSE(c.num_res_blocks = 0, "num_res_blocks");
    REFUSE(c.n_embed = 0, "n_embed");
    REFUSE(c.re_embed = 12, "re_embed is 12, expected 0..11");
    REFUSE(c.beta = NAN, "beta");
    REFUSE(c.z_channels = 0, "z_channels");

    c = tiny();
    Vqgan *v = NULL;
    Surrogate s;
    const real *xrec;
    double loss;
    CHECK_OK(vqgan_create(&v, &c, 0));
    CHECK_OK(vqgan_plan(v, 2, 12, 20, 0));
    real dummy[1] = {0};
    CHECK_ERR(vqgan_encode(v, dummy, 1, 12, 20, 0, NULL, NULL, NULL), "no values");
    vqgan_free(v);
    v = make(&c, 0);
    s = start(v, 2, 12, 20);
    CHECK_ERR(vqgan_encode(v, s.image, 2, 12, 20, 0, NULL, NULL, NULL), "vqgan_plan");
    CHECK_ERR(vqgan_plan(v, 2, 12, 18, 1), "12x18; both sides must be multiples of 4");
    CHECK_ERR(vqgan_plan(v, 2, 12, 3, 0), "12x3; both sides must be at least 4");
    CHECK_ERR(vqgan_plan(v, 0, 12, 20, 0), "empty batch");
    CHECK_ERR(vqgan_plan(v, (size_t)-1, 12, 20, 0), "too much");
    CHECK_OK(vqgan_plan(v, 2, 12, 20, 0));
    CHECK_ERR(vqgan_encode(v, s.image, 3, 12, 20, 0, NULL, NULL, NULL), "planned for 2 of 12x20");
    CHECK_ERR(vqgan_encode(v, s.image, 2, 16, 20, 0, NULL, NULL, NULL), "planned for");
    CHECK_ERR(vqgan_decode(v, s.z, 2, (size_t)-1, 5, s.out), "planned for");
    CHECK_ERR(vqgan_forward(v, s.image, 2, 12, 20, &xrec, &loss), "inference");
    CHECK_ERR(vqgan_backward(v, s.R, 1, NULL), "must follow");
    CHECK_OK(vqgan_plan(v, 2, 12, 20, 1));
    CHECK_ERR(vqgan_backward(v, s.R, 1, NULL), "must follow");
    CHECK_OK(vqgan_forward(v, s.image, 2, 12, 20, &xrec, &loss));
    CHECK_OK(vqgan_encode(v, s.image, 2, 12, 20, 0, NULL, NULL, NULL));
    CHECK_ERR(vqgan_backward(v, s.R, 1, NULL), "must follow");
    finish(&s);
    vqgan_free(v);
}

int main(void) {
    test_table();
    test_memory();
    test_flops();
    test_config();
    test_first_stage_config();
    test_refusals();
    test_image_loss();
    test_quantizer();
    test_remap();
    test_restart();
    test_sizes();
    test_unusable();
    test_smaller_run(17, 19, 16, 16);
    test_smaller_run(9, 101, 8, 64);
    test_smaller_run(20, 20, 19, 3);
    test_smaller_run(6, 4, 1, 1);
    test_accumulation();
    test_resampling();
#ifndef PLAIN
    test_gradients(0);
#endif
    test_gradients(1);
#ifndef PLAIN
    test_fast();
#endif
    test_threads(3, 8, 12);
    test_threads(1, 64, 80);
    return test_report();
}
