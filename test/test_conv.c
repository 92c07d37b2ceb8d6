/* test_conv.c - fast convolutions against the plain loops of vqgan.c, and those against themselves; the same bits for
 * every thread count. Sizes are chosen to take every path: both algorithms, tiles of several pictures and of a few rows, edges. */

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

int main(void) {
    static const Conv cases[] = {
        {CONV1, 2, 5, 3, 7, 9},         {CONV1, 3, 33, 17, 4, 4},   {CONV1, 1, 1, 1, 1, 1},
        {CONV1, 2, 20, 24, 40, 33},     {CONV3, 2, 3, 5, 7, 9},     {CONV3, 1, 1, 1, 1, 1},
        {CONV3, 3, 17, 19, 5, 3},       {CONV3, 2, 3, 32, 70, 64},  {CONV3, 3, 16, 17, 2, 2},
        {CONV3, 2, 17, 16, 6, 10},      {CONV3, 5, 48, 33, 4, 8},   {CONV3, 1, 20, 24, 34, 130},
        {CONV3, 2, 16, 16, 8, 1},       {CONV_DOWN, 2, 3, 5, 2, 2}, {CONV_DOWN, 3, 33, 17, 6, 10},
        {CONV_DOWN, 1, 32, 32, 64, 34}, {CONV_UP, 2, 3, 5, 1, 1},   {CONV_UP, 3, 17, 33, 3, 5},
        {CONV_UP, 1, 32, 32, 33, 20},   {CONV3, 2, 17, 16, 32, 36}, {CONV3, 1, 20, 24, 36, 132},
        {CONV3, 3, 16, 33, 32, 32},     {CONV3, 1, 70, 16, 4, 260}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) check_conv(cases[i]), check_plain(cases[i]);
    /* Of the 9 multiplications for every cell and pair of channels: all, 4, 9/4; after doubling 9 instead of 36. */
    static const struct {
        Conv c;
        double times;
    } counts[] = {{{CONV3, 2, 3, 5, 64, 64}, 9},      {{CONV3, 2, 16, 20, 30, 32}, 4},
                  {{CONV3, 2, 16, 20, 32, 32}, 2.25}, {{CONV_DOWN, 2, 3, 5, 32, 32}, 2.25},
                  {{CONV_UP, 2, 3, 5, 32, 32}, 9},    {{CONV1, 2, 3, 5, 7, 9}, 1}};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        const Conv *c = &counts[i].c;
        const double pairs = (double)(c->B * c->C * c->M * c->h * c->w);
        CHECK(conv_multiplications(c, 0) == counts[i].times * pairs);
        CHECK(conv_multiplications(c, 1) == 2 * counts[i].times * pairs);
    }
    real x[3] = {1, 2, 4};
    CHECK(sum_reals(x, 3) == 7 && sum_reals(x, 0) == 0);
    return test_report();
}
