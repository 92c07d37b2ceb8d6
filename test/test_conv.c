/* test_conv.c - convolutions, forward and backward, against the definition in six loops; the same bits for every thread
 * count. Sizes are chosen to take every path: both algorithms, tiles of several pictures and of a few rows, edges. */

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
    const size_t cells = c->h * c->w;
    return c->B * c->M * (c->kind == CONV_UP ? 4 * cells : c->kind == CONV_DOWN ? cells / 4 : cells);
}

/* The source cell that kernel cell (ky,kx) reads for result (y,x), or -1 outside. */
static long source_cell(const Conv *c, long y, long x, long ky, long kx) {
    const long up = c->kind == CONV_UP ? 2 : 1, stride = c->kind == CONV_DOWN ? 2 : 1;
    const long pad = c->kind == CONV_DOWN || c->kind == CONV1 ? 0 : 1;
    const long sy = stride * y + ky - pad, sx = stride * x + kx - pad;
    if (sy < 0 || sx < 0 || sy >= up * (long)c->h || sx >= up * (long)c->w) return -1;
    return sy / up * (long)c->w + sx / up;
}

/* By definition, in double: y = w * x + bias + add, or with dy given the gradients of <y, dy>. */
static void naive(const Conv *c, const real *x, const real *w, const real *bias, const real *add, const real *dy,
                  double *y, double *dx, double *dw, double *db) {
    const size_t per = results(c) / c->B / c->M, k = c->kind == CONV1 ? 1 : 3;
    const size_t width = c->kind == CONV_UP ? 2 * c->w : c->kind == CONV_DOWN ? c->w / 2 : c->w;
    for (size_t b = 0; b < c->B; b++)
        for (size_t m = 0; m < c->M; m++)
            for (size_t i = 0; i < per; i++) {
                const size_t at = (b * c->M + m) * per + i;
                double s = (double)bias[m] + (add ? (double)add[at] : 0);
                if (dy) db[m] += (double)dy[at];
                for (size_t ci = 0; ci < c->C; ci++)
                    for (size_t kk = 0; kk < k * k; kk++) {
                        const long from =
                            source_cell(c, (long)(i / width), (long)(i % width), (long)(kk / k), (long)(kk % k));
                        if (from < 0) continue;
                        const size_t xi = (b * c->C + ci) * c->h * c->w + (size_t)from,
                                     wi = (m * c->C + ci) * k * k + kk;
                        s += (double)x[xi] * (double)w[wi];
                        if (dy) dx[xi] += (double)dy[at] * (double)w[wi];
                        if (dy) dw[wi] += (double)dy[at] * (double)x[xi];
                    }
                y[at] = s;
            }
}

static void make_scratch(ConvScratch *s, const Conv *c, real **memory) {
    memset(s, 0, sizeof *s);
    s->threads = (size_t)threads_get();
    conv_needs(s, c, 0);
    conv_needs(s, c, 1);
    CHECK_OK(mem_alloc(memory, conv_scratch_reals(s), sizeof **memory, "test"));
    conv_scratch_place(s, *memory);
}

/* |got - ref| within a tolerance for sums of n terms */
static int agrees(const real *got, const double *ref, size_t n, double terms) {
    const double tolerance = (sizeof(real) == 8 ? 1e-14 : 1e-5) * sqrt(terms);
    double largest = 0, worst = n ? 0 : NAN;
    for (size_t i = 0; i < n; i++) largest = fmax(largest, fabs(ref[i]));
    for (size_t i = 0; i < n; i++) {
        const double e = fabs((double)got[i] - ref[i]) / (1 + largest);
        if (!(e <= worst)) worst = e;
    }
    return worst <= tolerance;
}

static void check_conv(Conv c) {
    const size_t nx = c.B * c.C * c.h * c.w, ny = results(&c), nw = c.M * c.C * (c.kind == CONV1 ? 1 : 9);
    real *x = random_reals(nx, 1), *w = random_reals(nw, 2), *bias = random_reals(c.M, 3), *add = random_reals(ny, 4);
    real *dy = random_reals(ny, 5), *y = random_reals(ny, 6), *dx = random_reals(nx, 7), *dw = random_reals(nw, 8);
    real *db = random_reals(c.M, 9), *y1 = random_reals(ny, 10), *dx1 = random_reals(nx, 11), *memory;
    double *ref = NULL, *ref_y, *ref_dx, *ref_dw, *ref_db;
    ConvScratch s;
    CHECK_OK(mem_alloc(&ref, ny + nx + nw + c.M, sizeof *ref, "test"));
    ref_y = ref, ref_dx = ref_y + ny, ref_dw = ref_dx + nx, ref_db = ref_dw + nw;
    for (size_t i = 0; i < nw; i++) ref_dw[i] = (double)dw[i]; /* gradients of parameters are added to */
    for (size_t i = 0; i < c.M; i++) ref_db[i] = (double)db[i];
    naive(&c, x, w, bias, add, dy, ref_y, ref_dx, ref_dw, ref_db);

    make_scratch(&s, &c, &memory);
    conv_forward(y, &c, x, w, bias, add, &s);
    conv_backward(dx, dw, db, &c, dy, x, w, 0, &s);
    const double cells = (double)(ny / c.M);
    int ok = agrees(y, ref_y, ny, 9.0 * (double)c.C) && agrees(dx, ref_dx, nx, 9.0 * (double)c.M);
    ok = ok && agrees(dw, ref_dw, nw, cells) && agrees(db, ref_db, c.M, cells);
    if (!CHECK(ok)) printf("     %s B %zu C %zu M %zu %zux%zu\n", kind_name[c.kind], c.B, c.C, c.M, c.h, c.w);

    conv_backward(dx, dw, db, &c, dy, x, w, 1, &s); /* added to dx; once more to the others */
    for (size_t i = 0; i < nx; i++) ref_dx[i] *= 2;
    CHECK(agrees(dx, ref_dx, nx, 9.0 * (double)c.M) && !agrees(dw, ref_dw, nw, cells));
    free(memory);

    const int threads = threads_get();
    threads_set(threads == 1 ? 3 : 1);
    make_scratch(&s, &c, &memory);
    conv_forward(y1, &c, x, w, bias, add, &s);
    conv_backward(dx1, dw, db, &c, dy, x, w, 0, &s);
    conv_backward(dx1, dw, db, &c, dy, x, w, 1, &s);
    CHECK(memcmp(y, y1, ny * sizeof *y) == 0 && memcmp(dx, dx1, nx * sizeof *dx) == 0);
    threads_set(threads);
    free(memory);

    memset(&s, 0, sizeof s); /* dx alone: the same bits, in less memory */
    s.threads = (size_t)threads;
    conv_needs(&s, &c, 2);
    CHECK(s.partial_reals == 0);
    CHECK_OK(mem_alloc(&memory, conv_scratch_reals(&s), sizeof *memory, "test"));
    conv_scratch_place(&s, memory);
    conv_backward(dx1, NULL, NULL, &c, dy, NULL, w, 0, &s);
    conv_backward(dx1, NULL, NULL, &c, dy, NULL, w, 1, &s);
    CHECK(memcmp(dx, dx1, nx * sizeof *dx) == 0);
    free(memory);
    real *all[] = {x, w, bias, add, dy, y, dx, dw, db, y1, dx1};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    free(ref);
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
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) check_conv(cases[i]);
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
