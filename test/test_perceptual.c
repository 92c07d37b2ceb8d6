/* test_perceptual.c - the layers of LPIPS, fast against plain; small networks against plain layers called one by one,
 * their gradient against central differences (of plain layers too); what is said of damaged weight files. Full-size
 * VGG16 is compared with PyTorch by test_torch.py. */
#include "files.h"

enum { IS_DOUBLE = sizeof(real) == 8 };

static const PerceptualConfig odd = {{4, 5, 6, 7, 8}, {2, 2, 3, 3, 3}};
static const PerceptualConfig wide = {{16, 20, 17, 16, 18}, {2, 1, 2, 1, 2}}; /* wide enough for Winograd's algorithm */

static real *random_reals(size_t n, double scale, uint64_t stream) {
    real *x = NULL;
    CHECK_OK(mem_alloc(&x, n, sizeof *x, "test"));
    for (size_t i = 0; i < n; i++) x[i] = (real)(scale * rng_normal(7, rng_stream(RNG_TEST, stream, 0), i));
    return x;
}

static Perceptual *make(const PerceptualConfig *c) {
    Perceptual *p = NULL;
    CHECK_OK(perceptual_create(&p, c));
    if (!p) exit(test_report());
    Params *t = perceptual_params(p);
    CHECK_OK(params_plan(t, PLAN_VALUE));
    params_init(t, 3);
    for (size_t i = 0; i < t->n; i++) /* the lin layers: not all the same */
        for (size_t k = 0; t->row[i].init == INIT_ONE && k < t->row[i].size; k++)
            t->row[i].value[k] = (real)rng_uniform(4, i, k);
    return p;
}

/* ---- The fast layers against the plain ones ---- */

static const Compute plain = {.unit = sizeof(real)};
static const double NEAR = IS_DOUBLE ? 1e-12 : 1e-5;

static int same_reals(const real *a, const real *b, size_t n) {
    return memcmp(a, b, n * sizeof *a) == 0;
}

/* Whole numbers few enough that the largest of 2x2 comes more than once: the first gets the gradient. */
static void check_layers(size_t B, size_t C, size_t h, size_t w) {
    const Compute fast = {.fast = layers_here(), .unit = sizeof(real), .threads = threads_get()};
    const size_t n = B * C * h * w, small = B * C * (h / 2) * (w / 2);
    real *x = random_reals(n, 1, 1), *dy = random_reals(small, 1, 2), *y[2], *dx[2], *relu[2], *drelu[2];
    for (size_t i = 0; i < n; i++) x[i] = (real)floor((double)x[i]);
    for (int k = 0; k < 2; k++) {
        const Compute *on = k ? &fast : &plain;
        y[k] = random_reals(small, 1, 3), dx[k] = random_reals(n, 1, 4);
        relu[k] = random_reals(n, 1, 5), drelu[k] = random_reals(n, 1, 6);
        pool_forward(on, y[k], x, B, C, h, w);
        pool_backward(on, dx[k], dy, x, B, C, h, w);
        relu_forward(on, relu[k], n);
        relu_backward(on, drelu[k], relu[k], n);
    }
    CHECK(same_reals(y[0], y[1], small) && same_reals(dx[0], dx[1], n));
    CHECK(same_reals(relu[0], relu[1], n) && same_reals(drelu[0], drelu[1], n));
    size_t passed = 0, zeros = 0;
    for (size_t i = 0; i < n; i++) passed += dx[0][i] != 0, zeros += relu[0][i] == 0 && drelu[0][i] == 0;
    CHECK(passed == small && zeros > 0 && zeros < n);
    real *all[] = {x, dy, y[0], y[1], dx[0], dx[1], relu[0], relu[1], drelu[0], drelu[1]};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static double sum_of(const double *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i];
    return sum;
}

/* Position 0 of both pictures, and position 1 of r alone, have no direction. */
static void check_comparison(size_t B, size_t C, size_t hw, int accumulate) {
    const Compute fast = {.fast = layers_here(), .unit = sizeof(real), .threads = threads_get()};
    const TapShape c = {B, C, hw, 0.7, accumulate};
    const size_t n = B * C * hw;
    real *a = random_reals(n, 1, 1), *r = random_reals(n, 1, 2), *lin = random_reals(C, 1, 3), *dr[2];
    double *sums[2], total[2];
    for (size_t i = 0; i < n; i++) {
        a[i] = a[i] > 0 && i % hw > 0 ? a[i] : 0;
        r[i] = r[i] > 0 && i % hw > 1 ? r[i] : 0;
    }
    for (size_t k = 0; k < C; k++) lin[k] = (real)fabs((double)lin[k]);
    for (int k = 0; k < 2; k++) {
        const Compute *on = k ? &fast : &plain;
        const size_t parts = comparison_sums(on, B, hw);
        CHECK_OK(mem_alloc(&sums[k], parts, sizeof *sums[k], "test"));
        dr[k] = random_reals(n, 1, 4);
        compare_features(on, sums[k], dr[k], a, r, lin, &c);
        total[k] = sum_of(sums[k], parts);
    }
    CHECK(total[0] > 0 && fabs(total[1] - total[0]) <= 1e-12 * total[0]);
    CHECK_NEAR("compared", dr[1], dr[0], n, 0, NEAR);
    free(a), free(r), free(lin), free(dr[0]), free(dr[1]), free(sums[0]), free(sums[1]);
}

/* ---- The network against plain layers, called one by one ---- */

/* The features at the end of every stage, of one picture */
static void features(real *tap[PERCEPTUAL_STAGES], Perceptual *p, const PerceptualConfig *c, const real *image,
                     size_t H, size_t W) {
    static const double shift[3] = {-.030, -.088, -.188}, scale[3] = {.458, .448, .450};
    const Param *row = perceptual_params(p)->row;
    size_t h = H, w = W, C = 3;
    real *x = random_reals(3 * H * W, 0, 0);
    for (size_t i = 0; i < 3 * H * W; i++) x[i] = (real)(((double)image[i] - shift[i / (H * W)]) / scale[i / (H * W)]);
    for (int s = 0; s < PERCEPTUAL_STAGES; s++, row++ /* lin */) {
        for (size_t k = 0; k < c->depth[s]; k++, row += 2, C = c->width[s]) {
            const Conv conv = {.kind = CONV3, .B = 1, .C = C, .M = c->width[s], .h = h, .w = w};
            real *y = random_reals(conv.M * h * w, 0, 0);
            conv_forward(&plain, y, x, row->value, row[1].value, NULL, &conv);
            relu_forward(&plain, y, conv.M * h * w);
            free(x);
            x = y;
        }
        tap[s] = x;
        x = random_reals(C * (h / 2) * (w / 2), 0, 0);
        pool_forward(&plain, x, tap[s], 1, C, h, w);
        h /= 2, w /= 2;
    }
    free(x);
}

static double by_layers(Perceptual *p, const PerceptualConfig *c, const real *a, const real *b, size_t H, size_t W) {
    real *fa[PERCEPTUAL_STAGES], *fb[PERCEPTUAL_STAGES];
    double loss = 0, sum;
    const Param *lin = perceptual_params(p)->row;
    features(fa, p, c, a, H, W);
    features(fb, p, c, b, H, W);
    for (int s = 0; s < PERCEPTUAL_STAGES; s++, lin++) {
        const TapShape of = {1, c->width[s], (H >> s) * (W >> s), 0, 0};
        lin += 2 * c->depth[s];
        compare_features(&plain, &sum, NULL, fa[s], fb[s], lin->value, &of);
        loss += sum / (double)of.hw;
        free(fa[s]);
        free(fb[s]);
    }
    return loss;
}

static void check_network(const PerceptualConfig *c, size_t B, size_t H, size_t W) {
    Perceptual *p = make(c);
    const size_t n = 3 * H * W;
    real *a = random_reals(B * n, 0.5, 1), *b = random_reals(B * n, 0.5, 2);
    double loss = NAN, ref = 0;
    for (size_t i = 0; i < B; i++) ref += by_layers(p, c, a + i * n, b + i * n, H, W) / (double)B;
    CHECK_OK(perceptual_plan(p, B, H, W, 0));
    CHECK_OK(perceptual_loss(p, a, b, B, H, W, 0, &loss, NULL));
    if (!CHECK(ref > 0.01 && fabs(loss - ref) <= (IS_DOUBLE ? 1e-12 : 1e-5) * ref))
        printf("     %zu of %zux%zu: %.17g, layer by layer %.17g\n", B, H, W, loss, ref);
    perceptual_free(p);
    free(a);
    free(b);
}

/* ---- The gradient ---- */

typedef struct {
    Perceptual *p;
    real *a, *b;
    size_t B, H, W;
} Pair;

static double pair_loss(void *context) {
    Pair *x = (Pair *)context;
    double loss;
    return perceptual_loss(x->p, x->a, x->b, x->B, x->H, x->W, 0, &loss, NULL) == OK ? loss : NAN;
}

/* The difference is taken over so little that hardly a relu or a pool changes its mind in between; the pictures are
 * such that none does for the pixels that are looked at. */
static void check_gradient(const PerceptualConfig *c, size_t B, size_t H, size_t W) {
    Pair x = {make(c), NULL, NULL, B, H, W};
    const size_t n = B * 3 * H * W;
    real *d = random_reals(n, 1, 3), *before = random_reals(n, 1, 3);
    double loss;
    x.a = random_reals(n, 0.5, 1), x.b = random_reals(n, 0.5, 2);
    CHECK_OK(perceptual_plan(x.p, B, H, W, 1));
    CHECK_OK(perceptual_loss(x.p, x.a, x.b, B, H, W, 2.5, &loss, d));
    for (size_t i = 0; i < n; i++) d[i] = (d[i] - before[i]) / (real)2.5; /* it is added to what was there */
    const double error = gradient_error(pair_loss, &x, x.b, d, n, 150, 1e-7, 0);
    if (!CHECK(error <= 1e-6)) printf("     %zu of %zux%zu: %g\n", B, H, W, error);
    d[0] = -d[0];
    CHECK(gradient_error(pair_loss, &x, x.b, d, 1, 1, 1e-7, 0) > 0.1);
    perceptual_free(x.p);
    free(x.a);
    free(x.b);
    free(d);
    free(before);
}

/* Equal pictures, and features that are all 0, whose direction is undefined: nothing, and no NaN. */
static void check_zeros(void) {
    enum { B = 2, H = 20, W = 18, N = B * 3 * H * W };
    Perceptual *p = make(&odd);
    real *a = random_reals(N, 0.5, 1), *b = random_reals(N, 0.5, 2), *d = random_reals(N, 0, 3);
    double loss = NAN;
    size_t wrong = 0;
    CHECK_OK(perceptual_plan(p, B, H, W, 1));
    CHECK_OK(perceptual_loss(p, a, a, B, H, W, 1, &loss, d));
    for (size_t i = 0; i < N; i++) wrong += !(d[i] == 0);
    CHECK(loss == 0 && wrong == 0);
    Params *t = perceptual_params(p);
    for (size_t i = 0; i < t->n; i++)
        for (size_t k = 0; t->row[i].ndim == 1 && k < t->row[i].size; k++) t->row[i].value[k] = -1000;
    CHECK_OK(perceptual_loss(p, a, b, B, H, W, 1, &loss, d));
    for (size_t i = 0; i < N; i++) wrong += !(d[i] == 0);
    CHECK(loss == 0 && wrong == 0);
    perceptual_free(p);
    free(a);
    free(b);
    free(d);
}

/* ---- The same bits for any number of threads, and for a picture alone and in company ---- */

static void check_bits(const PerceptualConfig *c, size_t B, size_t H, size_t W) {
    const size_t n = 3 * H * W;
    const int threads = threads_get();
    Perceptual *p = make(c);
    real *a = random_reals(B * n, 0.5, 1), *b = random_reals(B * n, 0.5, 2);
    real *d = random_reals(B * n, 0, 3), *d1 = random_reals(B * n, 0, 3), *d2 = random_reals(B * n, 0, 3);
    double loss, loss1, part, sum = 0;
    CHECK_OK(perceptual_plan(p, B, H, W, 1));
    CHECK_OK(perceptual_loss(p, a, b, B, H, W, 1, &loss, d));
    threads_set(threads == 1 ? 3 : 1);
    CHECK_OK(perceptual_plan(p, B, H, W, 1));
    CHECK_OK(perceptual_loss(p, a, b, B, H, W, 1, &loss1, d1));
    threads_set(threads);
    CHECK(loss == loss1 && memcmp(d, d1, B * n * sizeof *d) == 0);
    CHECK_OK(perceptual_plan(p, 1, H, W, 1));
    for (size_t i = 0; i < B; i++) {
        CHECK_OK(perceptual_loss(p, a + i * n, b + i * n, 1, H, W, 1 / (double)B, &part, d2 + i * n));
        sum += part / (double)B;
    }
    CHECK(fabs(sum - loss) <= 1e-12 * loss && memcmp(d, d2, B * n * sizeof *d) == 0);
    perceptual_free(p);
    real *all[] = {a, b, d, d1, d2};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* ---- Weight files ---- */

/* Writes the table's rows first..end-1 that are (lin) or are not lin layers, each prefix + its name, or as
 * torchvision. */
static void write_weights(const char *name, Perceptual *p, const char *prefix, int convs, int lins) {
    TensorList list = {0};
    const Params *t = perceptual_params(p);
    for (size_t i = 0; i < t->n; i++) {
        const Param *r = &t->row[i];
        const int lin = strncmp(r->name, "lin", 3) == 0;
        char full[NAME_MAX_BYTES];
        if (lin ? !lins : !convs) continue;
        if (strcmp(prefix, "features") == 0)
            snprintf(full, sizeof full, "features%s", strchr(r->name + 5, '.'));
        else
            snprintf(full, sizeof full, "%s%.100s", prefix, r->name);
        CHECK_OK(tensor_list_add(&list, full, DT_F32, r->ndim, r->dim, r->value, 1));
    }
    const size_t dim[4] = {1, 3, 1, 1};
    static const real shift[3] = {(real)-.030, (real)-.088, (real)-.188};
    char full[NAME_MAX_BYTES];
    snprintf(full, sizeof full, "%sscaling_layer.shift", prefix);
    if (lins) CHECK_OK(tensor_list_add(&list, full, DT_F32, 4, dim, shift, 1));
    CHECK_OK(checkpoint_write(in_folder(name), list.tensor, list.from_real, list.n, NULL));
    tensor_list_free(&list);
}

static Err load(Perceptual *p, const char *first, const char *second) {
    Checkpoint ck[2];
    memset(ck, 0, sizeof ck);
    Err e = checkpoint_open(&ck[0], in_folder(first));
    if (e == OK && second) e = checkpoint_open(&ck[1], in_folder(second));
    if (e == OK) e = perceptual_load(p, ck, second ? 2 : 1);
    checkpoint_close(&ck[0]);
    checkpoint_close(&ck[1]);
    return e;
}

static int loads_as(Perceptual *from, const char *first, const char *second) {
    Perceptual *p = NULL;
    CHECK_OK(perceptual_create(&p, &odd));
    CHECK_OK(load(p, first, second));
    const Params *a = perceptual_params(from), *b = perceptual_params(p);
    int same = a->n == b->n && a->n > 0;
    for (size_t i = 0; same && i < a->n; i++)
        for (size_t k = 0; k < a->row[i].size; k++) same &= (float)a->row[i].value[k] == (float)b->row[i].value[k];
    perceptual_free(p);
    return same;
}

static void truncate_file(const char *to, const char *from, size_t less) {
    size_t n;
    uint8_t *bytes = get_file(in_folder(from), &n);
    put_file(in_folder(to), bytes, n - less);
}

static void check_files(void) {
    Perceptual *p = make(&odd), *q = NULL, *other = make(&wide);
    write_weights("lpips.safetensors", p, "", 1, 1);
    write_weights("vqgan.safetensors", p, "loss.perceptual_loss.", 1, 1);
    write_weights("vgg16.safetensors", p, "features", 1, 0);
    write_weights("lins.safetensors", p, "", 0, 1);
    CHECK(loads_as(p, "lpips.safetensors", NULL) && loads_as(p, "vqgan.safetensors", NULL));
    CHECK(loads_as(p, "vgg16.safetensors", "lins.safetensors") && loads_as(p, "lins.safetensors", "vgg16.safetensors"));
    CHECK(!loads_as(other, "lpips.safetensors", NULL));

    CHECK_OK(perceptual_create(&q, &odd));
    CHECK_ERR(load(q, "vgg16.safetensors", NULL), "no tensor 'lin0.model.1.weight'");
    CHECK_ERR(load(q, "lins.safetensors", NULL), "no tensor 'net.slice1.0.weight' (or 'features.0.weight')");
    write_weights("wide.safetensors", other, "", 1, 1);
    CHECK_ERR(load(q, "wide.safetensors", NULL), "net.slice1.0.weight");
    truncate_file("cut.safetensors", "lpips.safetensors", 100);
    CHECK_ERR(load(q, "cut.safetensors", NULL), "cut.safetensors");
    Param *row = &perceptual_params(p)->row[3];
    const real keep = row->value[1];
    row->value[1] = NAN;
    write_weights("nan.safetensors", p, "", 1, 1);
    row->value[1] = keep;
    CHECK_ERR(load(q, "nan.safetensors", NULL), "tensor 'net.slice1.2.bias' element 1 is nan");

    TensorList list = {0};
    const size_t dim[4] = {1, 3, 1, 1};
    const real scale[3] = {(real).458, (real).448, (real).225};
    CHECK_OK(tensor_list_add(&list, "scaling_layer.scale", DT_F32, 4, dim, scale, 1));
    CHECK_OK(checkpoint_write(in_folder("scale.safetensors"), list.tensor, list.from_real, list.n, NULL));
    tensor_list_free(&list);
    CHECK_ERR(load(q, "lpips.safetensors", "scale.safetensors"), "'scaling_layer.scale' element 2 is 0.225");
    perceptual_free(p);
    perceptual_free(q);
    perceptual_free(other);
}

static void check_refusals(void) {
    Perceptual *p = NULL;
    real x[1] = {0};
    double loss;
    size_t bytes = 0, more = 0;
    PerceptualConfig c = odd;
    c.width[2] = 0;
    CHECK_ERR(perceptual_create(&p, &c), "stage 3 has 0 channels");
    CHECK(!p);
    CHECK_OK(perceptual_create(&p, &odd));
    CHECK_ERR(perceptual_loss(p, x, x, 1, 16, 16, 1, &loss, NULL), "perceptual_plan first");
    CHECK_ERR(perceptual_plan(p, 1, 15, 16, 1), "pictures of 15x16, expected 16");
    CHECK_ERR(perceptual_plan(p, 0, 16, 16, 1), "an empty batch");
    CHECK_OK(perceptual_plan(p, 1, 16, 16, 0));
    CHECK_ERR(perceptual_loss(p, x, x, 1, 16, 16, 1, &loss, NULL), "no values yet");
    CHECK_OK(params_plan(perceptual_params(p), PLAN_VALUE));
    CHECK_ERR(perceptual_loss(p, x, x, 1, 16, 32, 1, &loss, NULL), "planned for 16x16");
    CHECK_ERR(perceptual_loss(p, x, x, 1, 16, 16, 1, &loss, x), "without the gradient");
    CHECK_OK(perceptual_plan_bytes(p, 4, 256, 256, 1, &bytes));
    CHECK_OK(perceptual_plan_bytes(p, 400, 256, 256, 1, &more));
    CHECK(bytes > 0 && more == bytes);
    perceptual_free(p);
    perceptual_free(NULL);

    const PerceptualConfig vgg = perceptual_vgg16();
    CHECK_OK(perceptual_create(&p, &vgg));
    const Params *t = perceptual_params(p);
    CHECK(t->n == 31 && params_count(t) == 14714688 + 1472); /* VGG16's convolutions; the lin layers */
    CHECK(strcmp(t->row[0].name, "net.slice1.0.weight") == 0 && strcmp(t->row[29].name, "net.slice5.28.bias") == 0);
    perceptual_free(p);
}

int main(void) {
    if (!temporary_folder(folder)) return 1;
    check_layers(2, 8, 6, 4), check_layers(1, 5, 7, 9), check_layers(2, 3, 2, 3), check_layers(3, 7, 40, 50);
    check_comparison(2, 5, 3, 0), check_comparison(1, 64, 300, 1), check_comparison(2, 3, 2500, 1);
    check_network(&odd, 2, 16, 16);
    check_network(&odd, 1, 37, 50);
    check_network(&wide, 2, 32, 40);
    if (IS_DOUBLE) {
        check_gradient(&odd, 2, 16, 16);
        check_gradient(&odd, 1, 37, 22);
        check_gradient(&wide, 1, 32, 40);
        compute_plainly(1);
        check_gradient(&odd, 2, 16, 16);
        check_gradient(&odd, 1, 37, 22);
    }
    compute_plainly(1);
    check_network(&odd, 1, 37, 50);
    check_zeros();
    compute_plainly(0);
    check_zeros();
    check_bits(&odd, 3, 23, 18);
    check_bits(&wide, 4, 32, 40);
    check_bits(&odd, 2, 256, 320); /* one at a time */
    check_files();
    check_refusals();
    nftw(folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    return test_report();
}
