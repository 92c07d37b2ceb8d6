/* test_conv.c - fast convolutions, in float, bf16x3 and bf16, against the plain loops of vqgan.c, and those against
 * themselves; the same bits for every thread count. Sizes are chosen to take every path: all algorithms, tiles and bands
 * of several pictures and of a few rows, edges. */

#include "kernels/kernels.h"
#include "test.h"

static const char *const kind_name[] = {"1x1", "3x3", "down", "up"};

static void fill(real *x, size_t n, uint64_t stream) {
    for (size_t i = 0; i < n; i++) x[i] = (real)rng_normal(11, rng_stream(RNG_TEST, stream, 0), i);
}

static real *random_reals(size_t n, uint64_t stream) {
    real *x = NULL;
    CHECK_OK(mem_alloc(&x, n, sizeof *x, "test"));
    fill(x, n, stream);
    return x;
}

#define COUNT(array) (sizeof(array) / sizeof *(array))

/* Shapes for every precision. */
static const Conv common[] = {{CONV1, 2, 5, 3, 7, 9},     {CONV3, 2, 3, 5, 7, 9},        {CONV3, 1, 1, 1, 1, 1},
                              {CONV3, 3, 17, 19, 5, 3},   {CONV3, 3, 16, 17, 2, 2},      {CONV3, 5, 48, 33, 4, 8},
                              {CONV_DOWN, 2, 3, 5, 2, 2}, {CONV_DOWN, 3, 33, 17, 6, 10}, {CONV_UP, 2, 3, 5, 1, 1},
                              {CONV_UP, 3, 17, 33, 3, 5}, {CONV_UP, 1, 32, 32, 33, 20},  {CONV3, 1, 70, 16, 4, 260}};

static size_t results(const Conv *c) {
    return c->B * c->M * conv_height(c) * conv_width(c);
}

/* Where the fast convolutions compute, with `least` or with all scratch that they need. */
static Compute fast(const Conv *c, int backward) {
    Compute on = compute_of(&(Params){0});
    conv_needs(&on, c, backward);
    if (backward == 1) conv_needs(&on, c, 0);
    CHECK_OK(mem_alloc(&on.scratch, on.scratch_bytes, 1, "test"));
    return on;
}

/* |got - ref| within a tolerance for sums of n terms */
static int agrees(const real *got, const real *ref, size_t n, double terms) {
    const double tolerance = (sizeof(real) == 8 ? 1e-14 : 1e-5) * sqrt(terms);
    double largest = 0, worst = n ? 0 : NAN;
    for (size_t i = 0; i < n; i++) largest = fmax(largest, fabs((double)ref[i]));
    for (size_t i = 0; i < n; i++) {
        const double e = fabs((double)got[i] - (double)ref[i]) / (1 + largest);
        if (!(e <= worst)) worst = e;
    }
    return worst <= tolerance;
}

/* Fast against plain, in one direction and back, and dx alone; the same bits with other threads. */
static void check_conv(Conv c) {
    const size_t nx = c.B * c.C * c.h * c.w, ny = results(&c), nw = c.M * c.C * (c.kind == CONV1 ? 1 : 9);
    real *x = random_reals(nx, 1), *w = random_reals(nw, 2), *bias = random_reals(c.M, 3), *add = random_reals(ny, 4);
    real *dy = random_reals(ny, 5), *y = random_reals(ny, 6), *dx = random_reals(nx, 7), *dw = random_reals(nw, 8);
    real *db = random_reals(c.M, 9), *y1 = random_reals(ny, 10), *dx1 = random_reals(nx, 11);
    real *ref_y = random_reals(ny, 6), *ref_dx = random_reals(nx, 7), *ref_dw = random_reals(nw, 8);
    real *ref_db = random_reals(c.M, 9);
    const Compute plain = {.unit = sizeof(real), .threads = 1};
    conv_forward(&plain, ref_y, x, w, bias, add, &c);
    conv_backward(&plain, ref_dx, ref_dw, ref_db, dy, x, w, 0, &c);

    Compute on = fast(&c, 1);
    conv_forward(&on, y, x, w, bias, add, &c);
    conv_backward(&on, dx, dw, db, dy, x, w, 0, &c);
    const double pixels = (double)(ny / c.M);
    int ok = agrees(y, ref_y, ny, 9.0 * (double)c.C) && agrees(dx, ref_dx, nx, 9.0 * (double)c.M);
    ok = ok && agrees(dw, ref_dw, nw, pixels) && agrees(db, ref_db, c.M, pixels);
    if (!CHECK(ok)) printf("     %s B %zu C %zu M %zu %zux%zu\n", kind_name[c.kind], c.B, c.C, c.M, c.h, c.w);

    conv_backward(&on, dx, dw, db, dy, x, w, 1, &c); /* added to dx; once more to the others */
    for (size_t i = 0; i < nx; i++) ref_dx[i] *= 2;
    CHECK(agrees(dx, ref_dx, nx, 9.0 * (double)c.M) && !agrees(dw, ref_dw, nw, pixels));
    conv_backward(&plain, ref_dx, ref_dw, ref_db, dy, x, w, 0, &c);
    conv_backward(&plain, ref_dx, NULL, NULL, dy, NULL, w, 1, &c);
    CHECK(agrees(dx, ref_dx, nx, 9.0 * (double)c.M) && agrees(dw, ref_dw, nw, pixels));
    const size_t all = on.scratch_bytes;
    free(on.scratch);

    const int threads = threads_get();
    threads_set(threads == 1 ? 3 : 1);
    on = fast(&c, 1);
    conv_forward(&on, y1, x, w, bias, add, &c);
    conv_backward(&on, dx1, dw, db, dy, x, w, 0, &c);
    conv_backward(&on, dx1, dw, db, dy, x, w, 1, &c);
    CHECK(memcmp(y, y1, ny * sizeof *y) == 0 && memcmp(dx, dx1, nx * sizeof *dx) == 0);
    threads_set(threads);
    free(on.scratch);

    on = fast(&c, 2); /* dx alone: the same bits, in less memory */
    CHECK(on.scratch_bytes < all);
    conv_backward(&on, dx1, NULL, NULL, dy, NULL, w, 0, &c);
    conv_backward(&on, dx1, NULL, NULL, dy, NULL, w, 1, &c);
    CHECK(memcmp(dx, dx1, nx * sizeof *dx) == 0);
    free(on.scratch);
    real *arrays[] = {x, w, bias, add, dy, y, dx, dw, db, y1, dx1, ref_y, ref_dx, ref_dw, ref_db};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) free(arrays[i]);
}

/* ---- bf16 and bf16x3 ---- */

/* Of one convolution: what it is given, and what comes out. */
typedef struct {
    size_t nx, ny, nw;
    real *x, *w, *bias, *add, *dy;
    real *y, *dx, *dw, *db;
} Numbers;

static Numbers numbers_of(const Conv *c) {
    Numbers n = {.nx = c->B * c->C * c->h * c->w, .ny = results(c), .nw = c->M * c->C * (c->kind == CONV1 ? 1 : 9)};
    n.x = random_reals(n.nx, 1), n.w = random_reals(n.nw, 2), n.bias = random_reals(c->M, 3);
    n.add = random_reals(n.ny, 4), n.dy = random_reals(n.ny, 5), n.y = random_reals(n.ny, 6);
    n.dx = random_reals(n.nx, 7), n.dw = random_reals(n.nw, 8), n.db = random_reals(c->M, 9);
    return n;
}

static void free_numbers(const Numbers *n) {
    real *const all[] = {n->x, n->w, n->bias, n->add, n->dy, n->y, n->dx, n->dw, n->db};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static void round_to_bf16(real *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = (real)bf16_to_float(bf16_from_float((float)x[i]));
}

/* Weights whose sums of four are bf16 too: after nearest doubling such sums are rounded, not the weights. */
static void make_coarse(real *w, size_t n) {
    for (size_t i = 0; i < n; i++) w[i] = (real)floor(fmin(fmax((double)w[i], -2), 2) * 32) / 64;
}

/* With scratch as large as needed to the byte. */
enum {
    NO_BIAS = 1,
    NO_ADD = 2,
    ADDS = 4 /* to dx */,
    DX_ALONE = 8,
    DW_ALONE = 16,
    IN_PLACE = 32 /* y itself is added */
};
static void run_conv(Numbers *n, const Conv *c, Precision precision, int options) {
    const int backward = options & DX_ALONE ? 2 : 1;
    for (int back = 0; back <= backward; back += backward) {
        Compute on = compute_of(&(Params){.precision = precision});
        conv_needs(&on, c, back);
        CHECK_OK(mem_alloc(&on.scratch, on.scratch_bytes, 1, "test"));
        memset(on.scratch, 0xff, on.scratch_bytes); /* NaN */
        if (back == 0)
            conv_forward(&on, n->y, n->x, n->w, options & NO_BIAS ? NULL : n->bias,
                         options & NO_ADD     ? NULL
                         : options & IN_PLACE ? n->y
                                              : n->add,
                         c);
        else if (options & DX_ALONE)
            conv_backward(&on, n->dx, NULL, NULL, n->dy, NULL, n->w, options & ADDS, c);
        else
            conv_backward(&on, options & DW_ALONE ? NULL : n->dx, n->dw, n->db, n->dy, n->x, n->w, options & ADDS, c);
        free(on.scratch);
    }
}

/* What the plain loops give without bias and add, from gradients that are 0. Errors of the others are of their arithmetic
 * alone: in bf16 the plain loops get operands that are rounded already. */
static Numbers plain_sums(Precision precision, const Conv *c) {
    Numbers n = numbers_of(c);
    const Compute plain = {.unit = sizeof(real), .threads = 1};
    if (c->kind == CONV_UP) make_coarse(n.w, n.nw);
    if (precision == PRECISION_BF16) round_to_bf16(n.x, n.nx), round_to_bf16(n.w, n.nw), round_to_bf16(n.dy, n.ny);
    memset(n.bias, 0, c->M * sizeof *n.bias), memset(n.dw, 0, n.nw * sizeof *n.dw);
    conv_forward(&plain, n.y, n.x, n.w, n.bias, NULL, c);
    conv_backward(&plain, n.dx, n.dw, NULL, n.dy, n.x, n.w, 0, c);
    return n;
}

/* |got - (sum + before)| is 1e-5 of the largest at most: in bf16x3 a product lacks low*low and what low was rounded by,
 * 2^-18 of it each; sums of float err less. */
static int is_sum(Precision precision, const real *got, const real *sum, const real *before, size_t n) {
    real *ref = NULL;
    double worst;
    CHECK_OK(mem_alloc(&ref, n, sizeof *ref, "test"));
    for (size_t i = 0; i < n; i++) ref[i] = sum[i] + (before ? before[i] : 0);
    const int ok = near_reals(got, ref, n, 0, precision == PRECISION_BF16 && sizeof(real) == 8 ? 1e-12 : 1e-5, &worst);
    free(ref);
    return ok;
}

static void check_in(Precision precision, const Conv *c, const Numbers *plain, int options) {
    Numbers n = numbers_of(c), before = numbers_of(c);
    if (c->kind == CONV_UP) make_coarse(n.w, n.nw);
    for (size_t i = 0; i < n.ny; i++) /* add and bias, as far as they are given */
        before.y[i] =
            (options & NO_ADD ? 0 : n.add[i]) + (options & NO_BIAS ? 0 : n.bias[i / (n.ny / c->B / c->M) % c->M]);
    run_conv(&n, c, precision, options);
    const int y = is_sum(precision, n.y, plain->y, before.y, n.ny);
    const int dx = options & DW_ALONE ? !memcmp(n.dx, before.dx, n.nx * sizeof *n.dx)
                                      : is_sum(precision, n.dx, plain->dx, options & ADDS ? before.dx : NULL, n.nx);
    const int dw = options & DX_ALONE ? !memcmp(n.dw, before.dw, n.nw * sizeof *n.dw)
                                      : is_sum(precision, n.dw, plain->dw, before.dw, n.nw);
    if (!CHECK(y && dx && dw))
        printf("     %s %s B %zu C %zu M %zu %zux%zu options %d: y %d dx %d dw %d\n", precision_name(precision),
               kind_name[c->kind], c->B, c->C, c->M, c->h, c->w, options, y, dx, dw);
    free_numbers(&n), free_numbers(&before);
}

static int same_results(const Numbers *a, const Numbers *b, const Conv *c) {
    return !memcmp(a->y, b->y, a->ny * sizeof *a->y) && !memcmp(a->dx, b->dx, a->nx * sizeof *a->dx) &&
           !memcmp(a->dw, b->dw, a->nw * sizeof *a->dw) && !memcmp(a->db, b->db, c->M * sizeof *a->db);
}

/* Blocks are chosen by the size of the L2 cache: the same bits for every size, in scratch for that size. */
static void check_caches(Precision precision, Conv c) {
    static const size_t sizes[] = {L2_LEAST, L2_MOST};
    static const int options[] = {IN_PLACE | ADDS, IN_PLACE | ADDS | DX_ALONE};
    for (size_t k = 0; k < COUNT(options); k++) {
        Numbers first = numbers_of(&c);
        l2_set(0);
        run_conv(&first, &c, precision, options[k]);
        for (size_t i = 0; i < COUNT(sizes); i++) {
            Numbers n = numbers_of(&c);
            l2_set(sizes[i]);
            run_conv(&n, &c, precision, options[k]);
            if (!CHECK(same_results(&n, &first, &c)))
                printf("     %s %s B %zu C %zu M %zu %zux%zu, L2 of %zu KB\n", precision_name(precision),
                       kind_name[c.kind], c.B, c.C, c.M, c.h, c.w, sizes[i] >> 10);
            free_numbers(&n);
        }
        free_numbers(&first);
    }
    l2_set(0);
}

/* The same bits with other threads; y and dx of the last picture alone as in the batch, in scratch as large as that of
 * the batch at most. */
static void check_bits_in(Precision precision, Conv c) {
    Numbers n = numbers_of(&c), other = numbers_of(&c), one;
    const int threads = threads_get();
    run_conv(&n, &c, precision, 0);
    threads_set(threads == 1 ? 3 : 1);
    run_conv(&other, &c, precision, 0);
    CHECK(same_results(&n, &other, &c));
    threads_set(threads);
    Conv alone = c;
    alone.B = 1;
    one = numbers_of(&alone);
    const size_t at_x = n.nx - one.nx, at_y = n.ny - one.ny;
    memcpy(one.x, n.x + at_x, one.nx * sizeof *n.x), memcpy(one.dy, n.dy + at_y, one.ny * sizeof *n.x);
    memcpy(one.add, n.add + at_y, one.ny * sizeof *n.x);
    run_conv(&one, &alone, precision, 0);
    CHECK(memcmp(one.y, n.y + at_y, one.ny * sizeof *n.y) == 0 &&
          memcmp(one.dx, n.dx + at_x, one.nx * sizeof *n.y) == 0);
    for (int backward = 0; backward < 3; backward++) {
        Compute all = compute_of(&(Params){.precision = precision}), less = all, shorter = all;
        Conv low = c;
        low.h = low.h > 2 ? low.h - 2 : low.h, low.w = low.w > 4 ? 4 : low.w;
        conv_needs(&all, &c, backward), conv_needs(&less, &alone, backward), conv_needs(&shorter, &low, backward);
        CHECK(less.scratch_bytes <= all.scratch_bytes && shorter.scratch_bytes <= all.scratch_bytes);
    }
    free_numbers(&n), free_numbers(&other), free_numbers(&one);
}

static void check_halves(Precision p, Conv c) {
    const Numbers plain = plain_sums(p, &c);
    check_in(p, &c, &plain, 0), check_in(p, &c, &plain, NO_BIAS | ADDS);
    check_in(p, &c, &plain, NO_ADD | DX_ALONE), check_in(p, &c, &plain, ADDS | DW_ALONE);
    check_bits_in(p, c), check_caches(p, c);
    free_numbers(&plain);
}

/* Where tiles and bands end, and rests begin. */
static void test_bf16(void) {
    static const Conv cases[] = {
        {CONV1, 2, 70, 33, 4, 4},       {CONV1, 1, 520, 20, 20, 21},  {CONV3, 2, 3, 40, 20, 16},
        {CONV3, 2, 40, 3, 16, 20},      {CONV3, 2, 16, 16, 1, 1},     {CONV3, 2, 32, 64, 16, 16},
        {CONV3, 1, 20, 24, 40, 50},     {CONV3, 2, 33, 100, 12, 31},  {CONV_DOWN, 1, 32, 40, 64, 34},
        {CONV_DOWN, 3, 130, 2, 40, 40}, {CONV_DOWN, 2, 17, 70, 7, 9}, {CONV_UP, 3, 2, 130, 20, 20},
        {CONV_UP, 2, 70, 33, 8, 16}};
    for (Precision p = PRECISION_BF16X3; p <= PRECISION_BF16; p++) {
        for (size_t i = 0; i < COUNT(common); i++) check_halves(p, common[i]);
        for (size_t i = 0; i < COUNT(cases); i++) check_halves(p, cases[i]);
    }
}

/* <dy, y> is linear in x and in w, so a difference has no error but rounding: the plain loops' gradients are its. */
static void check_plain(Conv c) {
    const size_t nx = c.B * c.C * c.h * c.w, ny = results(&c), nw = c.M * c.C * (c.kind == CONV1 ? 1 : 9);
    real *x = random_reals(nx, 1), *w = random_reals(nw, 2), *bias = random_reals(c.M, 3), *dy = random_reals(ny, 5);
    real *y = random_reals(ny, 6), *dx = random_reals(nx, 7), *dw = random_reals(nw, 8), *db = random_reals(c.M, 9);
    const Compute plain = {.unit = sizeof(real), .threads = 1};
    memset(dw, 0, nw * sizeof *dw), memset(db, 0, c.M * sizeof *db);
    conv_forward(&plain, y, x, w, bias, NULL, &c);
    conv_backward(&plain, dx, dw, db, dy, x, w, 0, &c);
    double value = 0, by_x = 0, by_w = 0, by_bias = 0, size = 0;
    for (size_t i = 0; i < ny; i++) value += (double)dy[i] * (double)y[i], size += fabs((double)dy[i] * (double)y[i]);
    for (size_t i = 0; i < nx; i++) by_x += (double)dx[i] * (double)x[i];
    for (size_t i = 0; i < nw; i++) by_w += (double)dw[i] * (double)w[i];
    for (size_t i = 0; i < c.M; i++) by_bias += (double)db[i] * (double)bias[i];
    const double limit = (sizeof(real) == 8 ? 1e-12 : 1e-4) * (1 + size);
    CHECK(fabs(by_x + by_bias - value) <= limit && fabs(by_w + by_bias - value) <= limit);
    real *arrays[] = {x, w, bias, dy, y, dx, dw, db};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) free(arrays[i]);
}

static void check_floats(Conv c) {
    check_conv(c), check_plain(c), check_caches(PRECISION_F32, c);
}

/* Where one algorithm ends, and the next one begins. */
static void test_f32(void) {
    static const Conv cases[] = {
        {CONV1, 3, 33, 17, 4, 4},    {CONV1, 1, 1, 1, 1, 1},         {CONV1, 2, 20, 24, 40, 33},
        {CONV3, 2, 3, 32, 70, 64},   {CONV3, 2, 17, 16, 6, 10},      {CONV3, 1, 20, 24, 34, 130},
        {CONV3, 2, 16, 16, 8, 1},    {CONV_DOWN, 1, 32, 32, 64, 34}, {CONV3, 2, 17, 16, 32, 36},
        {CONV3, 1, 20, 24, 36, 132}, {CONV3, 3, 16, 33, 32, 32}};
    for (size_t i = 0; i < COUNT(common); i++) check_floats(common[i]);
    for (size_t i = 0; i < COUNT(cases); i++) check_floats(cases[i]);
}

static void test_counts(void) {
    /* Of the 9 multiplications for every cell and pair of channels: all, 4, 9/4; after doubling 9 instead of 36. In bf16:
     * all, after doubling 16. */
    static const struct {
        Conv c;
        double times, in_bf16;
    } counts[] = {{{CONV3, 2, 3, 5, 64, 64}, 9, 9},      {{CONV3, 2, 16, 20, 30, 32}, 4, 9},
                  {{CONV3, 2, 16, 20, 32, 32}, 2.25, 9}, {{CONV_DOWN, 2, 3, 5, 32, 32}, 2.25, 2.25},
                  {{CONV_UP, 2, 3, 5, 32, 32}, 9, 16},   {{CONV1, 2, 3, 5, 7, 9}, 1, 1}};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        const Conv *c = &counts[i].c;
        const double pairs = (double)(c->B * c->C * c->M * c->h * c->w);
        CHECK(conv_multiplications(PRECISION_F32, c, 0) == counts[i].times * pairs);
        CHECK(conv_multiplications(PRECISION_F32, c, 1) == 2 * counts[i].times * pairs);
        CHECK(conv_multiplications(PRECISION_BF16, c, 0) == counts[i].in_bf16 * pairs);
        CHECK(conv_multiplications(PRECISION_BF16X3, c, 1) == 2 * counts[i].in_bf16 * pairs);
    }
}

int main(void) {
    test_f32();
    test_counts();
    test_bf16();
    real x[3] = {1, 2, 4};
    CHECK(sum_reals(x, 3) == 7 && sum_reals(x, 0) == 0);
    return test_report();
}
