/* test_vqgan_cuda.cu - the first stage on a GPU against the plain loops of vqgan.c, layer by layer through the
 * seam, then whole networks. As test_cuda.cu. */
#include "transformer.cu"

#include "device_test.h"
#include "first_stage.h"
#include "training/training.h"

/* ---- A layer on both sides: the plain loop here, its fellow there ---- */

static const Compute plain = {NULL, NULL, NULL, sizeof(real), PRECISION_F32, 1, NULL, 0};

/* Two parameters of a layer: n and m numbers, in a table on both sides. `there` computes with `bytes` of scratch. */
typedef struct {
    Params table;
    Compute there;
    real *w, *b, *dw, *db; /* here */
} Side;

static Side make_side(size_t n, size_t m, uint64_t stream, double size) {
    Side s = {};
    const size_t dim[2] = {n, m};
    CHECK_OK(params_add(&s.table, NULL, INIT_ZERO, 0, 0, 1, dim, "w"));
    CHECK_OK(params_add(&s.table, NULL, INIT_ZERO, 0, 0, 1, dim + 1, "b"));
    CHECK_OK(params_plan(&s.table, PLAN_VALUE | PLAN_GRAD));
    for (int i = 0; i < 2; i++) {
        real *x = random_reals(dim[i], stream + i, i ? 1 : size);
        memcpy(s.table.row[i].value, x, dim[i] * sizeof *x);
        free(x);
        x = random_reals(dim[i], stream + 7 + i, 1);
        memcpy(s.table.row[i].grad, x, dim[i] * sizeof *x);
        free(x);
    }
    s.table.device = device, s.table.ops = &CUDA_TABLE;
    free_rows(device);
    CHECK_OK(params_send(&s.table)); /* gradients there begin with 0 */
    for (int i = 0; i < 2; i++)
        CHECK_OK(to_device(device, device->row[i].grad, s.table.row[i].grad, dim[i] * sizeof(float)));
    s.there = compute_of(&s.table);
    s.w = s.table.row[0].value, s.b = s.table.row[1].value, s.dw = s.table.row[0].grad, s.db = s.table.row[1].grad;
    return s;
}

static void free_side(Side *s) {
    s->table.device = NULL; /* it goes on */
    params_free(&s->table);
    free_arrays();
}

static void give_scratch(Compute *on, size_t bytes) {
    on->scratch_bytes = bytes;
    on->scratch = on_device(bytes);
}

static real *as_real(const void *p) {
    return (real *)(void *)(uintptr_t)p;
}

/* Room for n numbers there, and for their f32 copy. */
static real *room(const Compute *on, size_t n) {
    return as_real(on_device(compute_bytes(on, n, 1)));
}

/* x (B,C,hw) there, and its f32 copy behind it. */
static real *send_both(const Compute *on, const real *x, size_t B, size_t C, size_t hw) {
    const size_t n = B * C * hw;
    real *to = room(on, n), *pixels = as_cells(x, B, C, hw);
    floatX *half = (floatX *)malloc((n + 1) * sizeof *half);
    for (size_t i = 0; i < n; i++) half[i] = to_floatX(pixels[i]);
    CHECK_OK(to_device(device, to, half, n * sizeof *half));
    CHECK_OK(to_device(device, compute_f32_copy(on, to, n), pixels, n * sizeof *pixels));
    free(pixels), free(half);
    return to;
}

static void near_low(const char *name, const real *got, const real *want, size_t B, size_t C, size_t hw) {
    near_picture(name, (const floatX *)(const void *)got, want, B, C, hw);
}

/* ---- Convolutions ---- */

/* Results kept in float have its precision, whatever products read; beside them those in floatX, if wanted. Into gaps
 * of NaN, so that what is not written shows. y: what is wanted; add NULL: nothing is added. */
static void test_f32(Conv c, const Side *s, const real *x, const real *add, const real *y) {
    const size_t out = rows_of(&c) / c.B, ny = c.B * c.M * out;
    real *pixels = as_cells(y, c.B, c.M, out), *dev_add = add ? send_both(&s->there, add, c.B, c.M, out) : NULL;
    c.y_f32 = 1, c.add_f32 = add != NULL;
    for (int beside = 0; beside < 2; beside++) {
        real *dev_y = room(&s->there, ny), *got = random_reals(ny, 1, 1);
        c.y_f32_only = !beside;
        conv_forward(&s->there, dev_y, x, param_value(&s->table, 0), param_value(&s->table, 1), dev_add, &c);
        CHECK_OK(compute_get(&s->there, got, compute_f32_copy(&s->there, dev_y, ny), ny * sizeof *got));
        CHECK_NEAR("conv y in float", got, pixels, ny, 1e-30, c.kind == CONV_UP && IS_BF16 ? 2e-2 : 1e-4);
        if (beside) near_low("and in floatX", dev_y, y, c.B, c.M, out);
        free(got);
    }
    free(pixels);
}

/* With `small` as little memory as will do, so that there are several tiles. */
static void conv_scratch(Compute *on, const Conv *c, int small) {
    for (int backward = 0; backward < 2; backward++) conv_needs(on, c, backward);
    ConvMemory m = {};
    for (int backward = 0; backward < 2; backward++) conv_needs_cuda(&m, c, backward);
    const size_t least = (round_up(c->w + 1, TILE_ROWS) + TILE_ROWS) * (c->kind == CONV_UP ? 16 : 9) *
                         round_up(max_size(c->C, c->M), PACK);
    give_scratch(on, small ? min_size(on->scratch_bytes, fixed_bytes(&m) + least * sizeof(floatX)) : on->scratch_bytes);
    if (c->kind != CONV1) CHECK(conv_prepared_bytes(c) > 0);
}

/* order 1: threads and blocks in reverse, the same bits. order 2: once more, without the addend, and dx is added to. */
static void test_conv_order(Conv c, int small, int order, uint64_t *first) {
    const size_t hw = c.h * c.w, out = rows_of(&c) / c.B, k = c.kind == CONV1 ? 1 : 9, nw = c.M * c.C * k;
    const size_t nx = c.B * c.C * hw, ny = c.B * c.M * out;
    Side s = make_side(nw, c.M, 2, 0.3);
    real *x = random_reals(nx, 1, 1), *add = order < 2 ? random_reals(ny, 4, 1) : NULL, *dy = random_reals(ny, 5, 1);
    real *y = random_reals(ny, 6, 1), *dx = random_reals(nx, 7, 1);
    real *dev_x = as_real(send_picture(x, c.B, c.C, hw)), *dev_dy = as_real(send_picture(dy, c.B, c.M, out));
    real *dev_add = add ? as_real(send_picture(add, c.B, c.M, out)) : NULL, *dev_y = room(&s.there, ny);
    real *dev_dx = as_real(send_picture(dx, c.B, c.C, hw));
    const real *w = param_value(&s.table, 0), *bias = param_value(&s.table, 1);
    real *dw = param_grad(&s.table, 0), *db = param_grad(&s.table, 1);
    conv_scratch(&s.there, &c, small);
    if (conv_prepared_bytes(&c)) c.prepared = on_device(conv_prepared_bytes(&c));
    reverse(order == 1);
    s.there.fast->conv_prepare(&s.there, c.prepared, w, &c);
    conv_forward(&s.there, dev_y, dev_x, w, bias, dev_add, &c);
    conv_backward(&s.there, dev_dx, dw, db, dev_dy, dev_x, w, order == 2, &c);
    reverse(0);
    conv_forward(&plain, y, x, s.w, s.b, add, &c);
    conv_backward(&plain, dx, s.dw, s.db, dy, x, s.w, order == 2, &c);
    near_low("conv y", dev_y, y, c.B, c.M, out);
    near_low("conv dx", dev_dx, dx, c.B, c.C, hw);
    near_f("conv dw", dw, s.dw, nw);
    near_f("conv db", db, s.db, c.M);
    digest = 0;
    add_digest(dev_y, ny * sizeof(floatX)), add_digest(dev_dx, nx * sizeof(floatX)), add_digest(dw, nw * 4);
    if (order == 1) CHECK(digest == *first);
    *first = digest;
    if (c.kind == CONV3) { /* dx alone; once more, added to */
        reverse(order == 1);
        conv_backward(&s.there, dev_dx, NULL, NULL, dev_dy, NULL, w, order == 2, &c);
        reverse(0);
        conv_backward(&plain, dx, NULL, NULL, dy, NULL, s.w, order == 2, &c);
        near_low("conv dx alone", dev_dx, dx, c.B, c.C, hw);
    }
    if (order != 1) test_f32(c, &s, dev_x, add, y);
    if (order == 2) { /* dx is not always wanted */
        conv_backward(&s.there, NULL, dw, db, dev_dy, dev_x, w, 0, &c);
        conv_backward(&plain, NULL, s.dw, s.db, dy, x, s.w, 0, &c);
        near_f("conv dw alone", dw, s.dw, nw);
    }
    CHECK_OK(compute_status(&s.there));
    free(x), free(add), free(dy), free(y), free(dx);
    free_side(&s);
}

static void test_conv(Conv c, int small) {
    uint64_t first = 0;
    for (int order = 0; order < 3; order++) test_conv_order(c, small, order, &first);
}

/* What is planned for many large pictures is enough for one small one. */
static void test_needs(void) {
    const Compute on = {.fast = &cuda_layers};
    for (int kind = CONV1; kind <= CONV_UP; kind++)
        for (size_t C = 3; C <= 512; C = C < 32 ? 32 : 4 * C)
            for (size_t M = 3; M <= 512; M = M < 32 ? 32 : 4 * M) {
                const Conv large = {(ConvKind)kind, 16, C, M, 64, 128}, small = {(ConvKind)kind, 1, C, M, 2, 4},
                           middle = {(ConvKind)kind, 2, C, M, 16, 16};
                for (int backward = 0; backward < (kind == CONV3 ? 3 : 2); backward++) {
                    CHECK(on.fast->conv_needs(&on, &large, backward) >= on.fast->conv_needs(&on, &middle, backward));
                    CHECK(on.fast->conv_needs(&on, &middle, backward) >= on.fast->conv_needs(&on, &small, backward));
                }
            }
}

static void test_convs(void) {
    static const Conv cases[] = {{CONV1, 2, 5, 3, 7, 9},
                                 {CONV1, 1, 32, 16, 4, 4},
                                 {CONV1, 1, 1, 1, 1, 1},
                                 {CONV3, 2, 8, 8, 12, 11},
                                 {CONV_DOWN, 3, 8, 16, 22, 10},
                                 {CONV_UP, 2, 16, 8, 11, 10},
                                 /* those that tensor cores do directly: several tiles, and parts of tiles, each way */
                                 {CONV3, 1, 32, 8, 9, 15},
                                 {CONV3, 2, 32, 136, 5, 7},
                                 {CONV3, 1, 64, 3, 6, 6},
                                 {CONV_DOWN, 1, 32, 40, 14, 20},
                                 {CONV_UP, 1, 64, 32, 4, 9},
                                 {CONV3, 1, 96, 33, 3, 2},
                                 /* a share of the weights' gradient has several of the tiles; a stride of 2, and twice
                                    32 channels that follow each other in one place */
                                 {CONV3, 2, 32, 16, 9, 33},
                                 {CONV_DOWN, 2, 64, 8, 34, 20},
                                 {CONV_UP, 1, 32, 64, 9, 17},
                                 /* 4 divides the channels, 8 does not: a pack would reach into the next cell */
                                 {CONV3, 1, 4, 8, 5, 7},
                                 {CONV3, 1, 36, 12, 3, 5},
                                 {CONV_DOWN, 2, 12, 4, 6, 10},
                                 {CONV_UP, 1, 4, 12, 3, 4},
                                 {CONV3, 2, 3, 5, 7, 9},
                                 {CONV3, 1, 1, 1, 1, 1},
                                 {CONV3, 2, 16, 24, 5, 3},
                                 {CONV3, 1, 8, 40, 6, 10},
                                 {CONV_DOWN, 2, 3, 5, 2, 2},
                                 {CONV_DOWN, 2, 8, 17, 6, 10},
                                 {CONV_DOWN, 1, 16, 8, 10, 4},
                                 {CONV_UP, 2, 3, 5, 1, 1},
                                 {CONV_UP, 2, 8, 16, 3, 5},
                                 {CONV_UP, 1, 17, 8, 4, 3}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        test_conv(cases[i], 0);
        test_conv(cases[i], 1);
    }
}

/* What a convolution says of its results' channels, part by part, put together: (B,M,3) count, mean, sum of squares
 * around it. */
static void join_parts(real *all, const float *part, size_t B, size_t parts, size_t M) {
    for (size_t bm = 0; bm < B * M; bm++) {
        double n = 0, mean = 0, square = 0;
        for (size_t i = 0; i < parts; i++) {
            const float *p = part + (bm / M * parts + i) * 3 * M + bm % M;
            const double m = (double)p[0], gap = (double)p[M] - mean;
            square += (double)p[2 * M] + gap * gap * n * m / (n + m), mean += gap * m / (n + m), n += m;
        }
        all[3 * bm] = (real)n, all[3 * bm + 1] = (real)mean, all[3 * bm + 2] = (real)square;
    }
}

static void test_moments(Conv c, int f32, double offset) {
    const size_t k = c.kind == CONV1 ? 1 : 9, nx = c.B * c.C * c.h * c.w, out = rows_of(&c) / c.B, ny = c.B * c.M * out;
    uint64_t first = 0;
    for (int order = 0; order < orders(); order++) {
        Side s = make_side(c.M * c.C * k, c.M, 2, 0.3);
        const size_t parts = s.there.fast->conv_parts(&c), size = c.B * parts * 3 * c.M;
        real *x = random_reals(nx, 1, 1), *y = random_reals(ny, 6, 1), *add = random_reals(ny, 4, 1), *got, *want,
             *here;
        CHECK(parts > 0);
        for (size_t i = 0; i < ny; i++) add[i] += (real)offset;
        real *dev_x = as_real(send_picture(x, c.B, c.C, c.h * c.w)), *dev_y = room(&s.there, ny);
        real *dev_add = send_both(&s.there, add, c.B, c.M, out);
        conv_scratch(&s.there, &c, 0);
        c.prepared = on_device(s.there.fast->conv_prepared_bytes(&c));
        c.moments = on_device(size * sizeof(float)), c.y_f32 = c.add_f32 = f32;
        reverse(order);
        s.there.fast->conv_prepare(&s.there, c.prepared, param_value(&s.table, 0), &c);
        conv_forward(&s.there, dev_y, dev_x, param_value(&s.table, 0), param_value(&s.table, 1), dev_add, &c);
        reverse(0);
        conv_forward(&plain, y, x, s.w, s.b, add, &c);
        got = random_reals(size, 1, 1), want = random_reals(c.B * c.M * 3, 1, 1),
        here = random_reals(c.B * c.M * 3, 1, 1);
        CHECK_OK(compute_get(&s.there, got, c.moments, size * sizeof *got));
        join_parts(here, got, c.B, parts, c.M);
        for (size_t bm = 0; bm < c.B * c.M; bm++) {
            double mean = 0, square = 0;
            for (size_t i = 0; i < out; i++) mean += (double)y[bm * out + i] / (double)out;
            for (size_t i = 0; i < out; i++)
                square += ((double)y[bm * out + i] - mean) * ((double)y[bm * out + i] - mean);
            CHECK(here[3 * bm] == (real)out);
            want[3 * bm] = here[3 * bm] = 0, want[3 * bm + 1] = (real)mean, want[3 * bm + 2] = (real)square;
        }
        CHECK_NEAR("moments", here, want, c.B * c.M * 3, 1e-30, f32 && c.kind != CONV_UP ? 1e-4 : TOLERANCE);
        digest = 0;
        add_digest(c.moments, size * sizeof(float));
        if (order) CHECK(digest == first);
        first = digest;
        free(x), free(y), free(add), free(got), free(want), free(here);
        free_side(&s);
    }
}

/* A convolution that norms what it reads is the norm and then the convolution, bit for bit, and so are both ways back. */
static void test_normed(Conv c, int swish, int f32) {
    const size_t hw = c.h * c.w, nx = c.B * c.C * hw, ny = c.B * c.M * hw, nw = c.M * c.C * 9;
    GroupNorm n = {c.B, c.C, hw, swish, f32, 0, NULL, 0};
    uint64_t first[2] = {0, 0};
    for (int deferred = 0; deferred < 2; deferred++) {
        Side s = make_side(nw, max_size(c.M, c.C), 2, 0.3);
        real *x = random_reals(nx, 1, 2), *dy = random_reals(ny, 5, 1);
        real *dev_x = send_both(&s.there, x, c.B, c.C, hw), *dev_y = room(&s.there, ny),
             *dev_normed = room(&s.there, nx);
        real *dev_dy = as_real(send_picture(dy, c.B, c.M, hw)), *dev_dx = room(&s.there, nx);
        real *kept = as_real(on_device(s.there.fast->group_norm_kept(&n)));
        const real *w = param_value(&s.table, 0), *b = param_value(&s.table, 1);
        CHECK(s.there.fast->conv_norms(&c));
        compute_needs(&s.there, s.there.fast->group_norm_needs(&s.there, &n, 1));
        conv_scratch(&s.there, &c, 0);
        c.prepared = on_device(s.there.fast->conv_prepared_bytes(&c));
        s.there.fast->conv_prepare(&s.there, c.prepared, w, &c);
        n.deferred = deferred;
        c.norm = deferred ? kept : NULL, c.norm_swish = swish, c.norm_f32 = f32;
        group_norm_forward(&s.there, deferred ? NULL : dev_normed, kept, dev_x, b, b, &n);
        conv_forward(&s.there, dev_y, deferred ? dev_x : dev_normed, w, b, NULL, &c);
        conv_backward(&s.there, dev_dx, param_grad(&s.table, 0), param_grad(&s.table, 1), dev_dy,
                      deferred ? dev_x : dev_normed, w, 0, &c);
        CHECK_OK(compute_status(&s.there));
        for (int i = 0; i < 2; i++) {
            digest = 0;
            i ? add_digest(param_grad(&s.table, 0), nw * 4) : add_digest(dev_y, ny * sizeof(floatX));
            if (deferred) CHECK(digest == first[i]);
            first[i] = digest;
        }
        free(x), free(dy);
        free_side(&s);
    }
}

static void test_reading(void) {
    const Conv c = {CONV3, 2, 64, 40, 9, 21}, narrow = {CONV3, 1, 32, 3, 17, 5}, small = {CONV3, 1, 160, 136, 4, 4};
    const Conv down = {CONV_DOWN, 2, 32, 16, 18, 20}, up = {CONV_UP, 1, 32, 40, 5, 18};
    const Compute on = {.fast = &cuda_layers};
    CHECK(on.fast->conv_norms(&c) == IS_BF16 && (on.fast->conv_parts(&c) > 0) == IS_BF16);
    const int cases = IS_BF16 ? 4 : 0;
    for (int i = 0; i < cases; i++) {
        test_normed(i / 2 ? narrow : c, i % 2, i % 2), test_normed(i / 2 ? small : c, i % 2, !(i % 2));
        test_moments(i / 2 ? small : c, i % 2, 0), test_moments(i / 2 ? up : down, i % 2, i % 2 * 100);
    }
}

/* ---- Norm, attention, quantiser, tanh ---- */

static void test_norm(size_t B, size_t hw, size_t C, int swish, int accumulate) {
    const size_t size = B * hw * C;
    GroupNorm n = {B, C, hw, swish, 0, 0, NULL, 0};
    uint64_t first = 0;
    for (int order = 0; order < 3; order++) { /* order 2: x is read in f32 */
        Side s = make_side(C, C, 12, 1);
        real *x = random_reals(size, 11, 2), *dy = random_reals(size, 14, 1), *y = random_reals(size, 15, 1),
             *dx = random_reals(size, 16, 1), *kept = random_reals(B * NORM_GROUPS * 2, 17, 1);
        for (size_t i = 0; i < size; i++) x[i] += 8; /* a mean far from zero, which bf16 holds exactly enough */
        for (size_t i = 0; IS_BF16 && i < size; i++) x[i] = to_float(to_floatX(x[i]));
        n.x_f32 = order == 2;
        compute_needs(&s.there, s.there.fast->group_norm_needs(&s.there, &n, 1));
        give_scratch(&s.there, s.there.scratch_bytes);
        real *dev_kept = as_real(on_device(s.there.fast->group_norm_kept(&n))), *dev_y = room(&s.there, size);
        real *dev_x = send_both(&s.there, x, B, C, hw), *dev_dx = as_real(send_picture(dx, B, C, hw));
        real *dev_dy = as_real(send_picture(dy, B, C, hw)), *dgamma = param_grad(&s.table, 0),
             *dbeta = param_grad(&s.table, 1);
        const real *gamma = param_value(&s.table, 0), *beta = param_value(&s.table, 1);
        reverse(order == 1);
        group_norm_forward(&s.there, dev_y, dev_kept, dev_x, gamma, beta, &n);
        group_norm_backward(&s.there, dev_dx, dgamma, dbeta, dev_dy, dev_x, gamma, beta, dev_kept, accumulate, &n);
        reverse(0);
        group_norm_forward(&plain, y, kept, x, s.w, s.b, &n);
        group_norm_backward(&plain, dx, s.dw, s.db, dy, x, s.w, s.b, kept, accumulate, &n);
        near_low("norm y", dev_y, y, B, C, hw);
        near_low("norm dx", dev_dx, dx, B, C, hw);
        near_f("norm dgamma", dgamma, s.dw, C);
        near_f("norm dbeta", dbeta, s.db, C);
        digest = 0;
        add_digest(dev_y, size * sizeof(floatX)), add_digest(dev_dx, size * sizeof(floatX)), add_digest(dgamma, C * 4);
        if (order == 1) CHECK(digest == first);
        first = digest;
        CHECK_OK(compute_status(&s.there));
        free(x), free(dy), free(y), free(dx), free(kept);
        free_side(&s);
    }
}

static void test_picture_attention(size_t B, size_t N, size_t C) {
    const size_t size = B * N * C;
    const int accumulate[3] = {0, 1, 0};
    uint64_t first = 0;
    for (int order = 0; order < orders(); order++) {
        Side s = make_side(1, 1, 20, 1);
        real *q = random_reals(size, 21, 1), *k = random_reals(size, 22, 1), *v = random_reals(size, 23, 1),
             *dy = random_reals(size, 24, 1), *y = random_reals(size, 25, 1), *p = random_reals(B * N * N, 29, 1);
        real *d[3] = {random_reals(size, 26, 1), random_reals(size, 27, 1), random_reals(size, 28, 1)}, *dev_d[3];
        real *dev_q = as_real(send_picture(q, B, C, N)), *dev_k = as_real(send_picture(k, B, C, N)),
             *dev_v = as_real(send_picture(v, B, C, N)), *dev_dy = as_real(send_picture(dy, B, C, N));
        real *dev_y = room(&s.there, size), *dev_p = room(&s.there, B * N * round_up(N, 64));
        for (int i = 0; i < 3; i++) dev_d[i] = as_real(send_picture(d[i], B, C, N));
        give_scratch(&s.there, s.there.fast->picture_attention_needs(&s.there, B, C, N, 1));
        reverse(order);
        picture_attention_forward(&s.there, dev_y, dev_p, dev_q, dev_k, dev_v, B, C, N);
        picture_attention_backward(&s.there, dev_d[0], dev_d[1], dev_d[2], dev_dy, dev_q, dev_k, dev_v, dev_p,
                                   accumulate, B, C, N);
        reverse(0);
        picture_attention_forward(&plain, y, p, q, k, v, B, C, N);
        picture_attention_backward(&plain, d[0], d[1], d[2], dy, q, k, v, p, accumulate, B, C, N);
        near_low("attention y", dev_y, y, B, C, N);
        near_low("attention dq", dev_d[0], d[0], B, C, N);
        near_low("attention dk", dev_d[1], d[1], B, C, N);
        near_low("attention dv", dev_d[2], d[2], B, C, N);
        digest = 0;
        for (int i = 0; i < 3; i++) add_digest(dev_d[i], size * sizeof(floatX));
        if (order) CHECK(digest == first);
        first = digest;
        CHECK_OK(compute_status(&s.there));
        free(q), free(k), free(v), free(dy), free(y), free(p), free(d[0]), free(d[1]), free(d[2]);
        free_side(&s);
    }
}

/* Every entry comes twice: the first of equals must win. tile: latents compared at a time. */
static void test_quantiser(size_t rows, size_t K, size_t D, size_t tile) {
    const Codes c = {1, D, rows, K};
    int32_t *want = (int32_t *)malloc(rows * sizeof *want), *got = (int32_t *)malloc(rows * sizeof *got);
    for (int order = 0; order < orders(); order++) {
        Side s = make_side(K * D, 1, 32, 1);
        real *z = random_reals(rows * D, 31, 1), *dz = random_reals(rows * D, 33, 1),
             *zq = random_reals(rows * D, 35, 1);
        double gap = 0, want_gap = 0;
        memcpy(s.w + K / 2 * D, s.w, K / 2 * D * sizeof *s.w);
        params_send_part(&s.table, 0, 0, K * D);
        int32_t *code = (int32_t *)on_device(rows * sizeof *code);
        double *dev_gap = (double *)on_device(sizeof *dev_gap);
        real *dev_z = as_real(send_picture(z, 1, D, rows)), *dev_dz = as_real(send_picture(dz, 1, D, rows)),
             *dev_zq = room(&s.there, rows * D), *dev_e = room(&s.there, rows * D), *dbook = param_grad(&s.table, 0);
        const real *book = param_value(&s.table, 0);
        CHECK(s.there.fast->nearest_needs(&s.there, &c) >= K * sizeof(float) + TILE_ROWS * K * sizeof(float));
        give_scratch(&s.there, round_up(K * sizeof(float), ALIGNMENT) + tile * K * sizeof(float));
        reverse(order);
        nearest_codes(&s.there, code, dev_z, book, &c);
        straight_through(&s.there, dev_zq, dev_gap, dev_z, book, code, &c);
        lookup_codes(&s.there, dev_e, book, code, &c);
        quantize_backward(&s.there, dev_dz, dbook, dev_z, book, code, 0.3, 0.7, &c);
        reverse(0);
        nearest_codes(&plain, want, z, s.w, &c);
        straight_through(&plain, zq, &want_gap, z, s.w, want, &c);
        quantize_backward(&plain, dz, s.dw, z, s.w, want, 0.3, 0.7, &c);
        CHECK_OK(compute_get(&s.there, got, code, rows * sizeof *got));
        CHECK_OK(compute_get(&s.there, &gap, dev_gap, sizeof gap));
        CHECK(memcmp(got, want, rows * sizeof *got) == 0);
        CHECK(fabs(gap - want_gap) <= 1e-4 * want_gap);
        near_low("z_q", dev_zq, zq, 1, D, rows);
        near_low("quantiser dz", dev_dz, dz, 1, D, rows);
        near_f("codebook gradient", dbook, s.dw, K * D);
        lookup_codes(&plain, zq, s.w, want, &c);
        near_low("entries", dev_e, zq, 1, D, rows);
        CHECK_OK(compute_status(&s.there));
        free(z), free(dz), free(zq);
        free_side(&s);
    }
    free(want), free(got);
}

static void test_tanh(size_t n) {
    Side s = make_side(1, 1, 40, 1);
    real *x = random_reals(n, 41, 1), *dy = random_reals(n, 42, 1), *y = random_reals(n, 43, 1),
         *dx = random_reals(n, 44, 1);
    real *dev_x = as_real(send_x(x, n)), *dev_dy = as_real(send_x(dy, n)), *dev_y = room(&s.there, n);
    real *dev_dx = room(&s.there, n);
    tanh_forward(&s.there, dev_y, dev_x, n);
    tanh_backward(&s.there, dev_dx, dev_dy, dev_y, n);
    tanh_forward(&plain, y, x, n);
    near_low("tanh y", dev_y, y, 1, n, 1);
    for (size_t i = 0; IS_BF16 && i < n; i++) y[i] = to_float(to_floatX(y[i]));
    tanh_backward(&plain, dx, dy, y, n);
    near_low("tanh dx", dev_dx, dx, 1, n, 1);
    free(x), free(dy), free(y), free(dx);
    free_side(&s);
}

static void test_layers(void) {
    test_norm(2, 35, 32, 1, 0);
    test_norm(1, 1, 96, 0, 1);
    test_norm(3, 9, 64, 1, 1);
    test_norm(2, 1030, 32, 0, 0); /* three slices */
    test_norm(1, 3, 1312, 1, 0);  /* groups whose channels several warps add up */
    test_picture_attention(2, 15, 32);
    test_picture_attention(2, 1, 32);
    test_picture_attention(3, 40, 32);
    test_quantiser(37, 22, 5, 37);
    test_quantiser(80, 70, 8, 33);
    test_quantiser(300, 4, 16, 299);
    test_tanh(77);
}

/* ---- Whole networks ---- */

static VqganConfig tiny(void) {
    VqganConfig c;
    memset(&c, 0, sizeof c);
    c.ch = 32, c.levels = 2, c.ch_mult[0] = 1, c.ch_mult[1] = 2, c.num_res_blocks = 1; /* nin_shortcut up and down */
    c.resolution = 8, c.n_attn = 1, c.attn_resolutions[0] = 4;
    c.in_channels = 3, c.out_ch = 2, c.z_channels = 7, c.embed_dim = 5, c.n_embed = 11;
    c.legacy = 1, c.beta = 0.25, c.resamp_with_conv = 1;
    return c;
}

/* The same numbers each time, which bf16 has. */
static Vqgan *make_vqgan(const VqganConfig *c, int honour_tanh) {
    Vqgan *v = NULL;
    CHECK_OK(vqgan_create(&v, c, honour_tanh));
    Params *p = vqgan_params(v);
    CHECK_OK(params_plan(p, PLAN_VALUE | PLAN_GRAD));
    params_init(p, 3);
    for (size_t i = 0; i < p->n; i++) {
        Param *r = &p->row[i];
        for (size_t j = 0; j < r->size; j++) {
            const double normal = rng_normal(5, rng_stream(RNG_TEST, 99, i), j);
            if (r->ndim == 1) r->value[j] += (real)(0.2 * normal);
            if (strcmp(r->name, "quantize.embedding.weight") == 0) r->value[j] = (real)(6 * normal);
            if (IS_BF16) r->value[j] = to_float(to_floatX(r->value[j]));
        }
    }
    return v;
}

/* What a first stage says and learns, on either side. */
typedef struct {
    real *prequant, *decoded, *drawn, *xrec, *z, *zq, *dimage, *grad, *last; /* last: of the last layer alone */
    int32_t *tokens, *raw;
    double loss;
} Said;

typedef struct {
    size_t B, H, W, cells, n_image, n_out, n_z;
    real *image, *z, *dxrec;
    int32_t *tokens;
} Asked;

static Asked ask(const VqganConfig *c, size_t B, size_t H, size_t W) {
    Asked a = {B, H, W, (H >> (c->levels - 1)) * (W >> (c->levels - 1)), 0, 0, 0, NULL, NULL, NULL, NULL};
    a.n_image = B * c->in_channels * H * W, a.n_out = B * c->out_ch * H * W, a.n_z = B * c->embed_dim * a.cells;
    a.image = random_reals(a.n_image, 51, 0.5), a.z = random_reals(a.n_z, 52, 2),
    a.dxrec = random_reals(a.n_out, 53, 1);
    a.tokens = (int32_t *)malloc(B * a.cells * sizeof *a.tokens);
    for (size_t i = 0; i < B * a.cells; i++)
        a.tokens[i] =
            (int32_t)rng_below(7, rng_stream(RNG_TEST, 54, 0), i, (uint32_t)(c->re_embed ? c->re_embed : c->n_embed));
    return a;
}

static Said say(Vqgan *v, const Asked *a) {
    const VqganConfig *c = vqgan_config(v);
    const size_t shift = c->levels - 1, h = a->H >> shift, w = a->W >> shift;
    const real *xrec, *z, *zq;
    const int32_t *raw;
    Said s;
    s.prequant = random_reals(a->n_z, 1, 1), s.decoded = random_reals(a->n_out, 1, 1),
    s.drawn = random_reals(a->n_out, 1, 1);
    s.dimage = random_reals(a->n_image, 1, 1);
    s.last = random_reals(vqgan_last_layer(v)->size + c->out_ch, 1, 1);
    s.tokens = (int32_t *)malloc(a->B * a->cells * 4), s.raw = (int32_t *)malloc(a->B * a->cells * 4);
    CHECK_OK(vqgan_plan(v, a->B, a->H, a->W, 0));
    CHECK_OK(vqgan_encode(v, a->image, a->B, a->H, a->W, 1, s.prequant, NULL, s.tokens));
    CHECK_OK(vqgan_decode(v, a->z, a->B, h, w, s.decoded));
    CHECK_OK(vqgan_decode_tokens(v, a->tokens, a->B, h, w, s.drawn));
    CHECK_ERR(vqgan_forward(v, a->image, a->B, a->H, a->W, &xrec, &s.loss), "planned for inference");
    CHECK_OK(vqgan_plan(v, a->B + 1, a->H, a->W, 1)); /* a batch smaller than the plan */
    params_zero_grad(vqgan_params(v));
    for (int twice = 0; twice < 2; twice++) { /* gradients of parameters add up */
        CHECK_OK(vqgan_forward(v, a->image, a->B, a->H, a->W, &xrec, &s.loss));
        if (twice)
            vqgan_latents(v, &z, &zq, &raw), s.xrec = copy_of(xrec, a->n_out), s.z = copy_of(z, a->n_z),
                                             s.zq = copy_of(zq, a->n_z);
        if (twice) memcpy(s.raw, raw, a->B * a->cells * sizeof *raw);
        if (!c->tanh_out)
            CHECK_OK(vqgan_last_gradient(v, a->dxrec, s.last, s.last + vqgan_last_layer(v)->size));
        else
            CHECK_ERR(vqgan_last_gradient(v, a->dxrec, s.last, s.last), "not behind a tanh");
        CHECK_OK(vqgan_backward(v, a->dxrec, 1.5, twice ? s.dimage : NULL));
    }
    CHECK_ERR(vqgan_backward(v, a->dxrec, 1, NULL), "must follow");
    CHECK_ERR(vqgan_last_gradient(v, a->dxrec, s.last, s.last), "must follow");
    CHECK_OK(params_fetch(vqgan_params(v)));
    s.grad = copy_of(vqgan_params(v)->arena[1], vqgan_params(v)->total);
    return s;
}

static void forget(Said *s) {
    void *all[] = {s->prequant, s->decoded, s->drawn, s->xrec,   s->z,  s->zq,
                   s->dimage,   s->grad,    s->last,  s->tokens, s->raw};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* Of row i. A bias is compared on the scale of the weight before it: in front of a norm, and in attention's keys, a
 * bias has no gradient but what rounding leaves.
 *
 * In bf16 the gradient as a whole is held to 2e-2, and so is what the network says. A single weight's is held to what bf16
 * means: `rounded` is the C that rounds the operands of its products, and nothing else. The GPU, whose activations are in
 * bf16 besides, may be twice as far off (seen: 1.5 times, of up to 2.1e-2). Biases are off by more. */
static const double BIASES = IS_BF16 ? 7e-2 : 1e-4, WEIGHTS = IS_BF16 ? 1e-3 : 1e-4, ROUNDINGS = 2;

static void same_gradient(const Said *got, const Said *want, const Said *rounded, const Params *p, size_t i) {
    const Param *r = &p->row[i];
    const size_t at = (size_t)(r->grad - p->arena[1]), before = i ? (size_t)(p->row[i - 1].grad - p->arena[1]) : 0;
    const int is_bias = r->ndim == 1;
    const double scale = is_bias && i ? rms_of(want->grad + before, p->row[i - 1].size) : 0;
    double limit = is_bias ? BIASES : WEIGHTS;
    if (IS_BF16 && !is_bias)
        limit = fmax(limit, ROUNDINGS * rms_error(rounded->grad + at, want->grad + at, r->size, 0));
    near_rms(r->name, got->grad + at, want->grad + at, r->size, scale, limit);
}

/* The same network and questions, with the operands of products in bf16 on this processor. In float nobody asks. */
static Said say_rounded(Vqgan *here, const Asked *a) {
    vqgan_params(here)->precision = PRECISION_BF16;
    return IS_BF16 ? say(here, a) : Said{};
}

static void same_said(const Said *got, const Said *want, const Said *rounded, const Asked *a, Vqgan *v) {
    const Params *p = vqgan_params(v);
    near_rms("prequant", got->prequant, want->prequant, a->n_z, 0, TOLERANCE);
    near_rms("decoded", got->decoded, want->decoded, a->n_out, 0, TOLERANCE);
    near_rms("drawn", got->drawn, want->drawn, a->n_out, 0, TOLERANCE);
    near_rms("reconstruction", got->xrec, want->xrec, a->n_out, 0, TOLERANCE);
    near_rms("z", got->z, want->z, a->n_z, 0, TOLERANCE);
    near_rms("z_q", got->zq, want->zq, a->n_z, 0, TOLERANCE);
    near_rms("image gradient", got->dimage, want->dimage, a->n_image, 0, TOLERANCE);
    near_rms("last layer's gradient", got->last, want->last, vqgan_last_layer(v)->size, 0, TOLERANCE);
    near_rms("last bias's gradient", got->last + vqgan_last_layer(v)->size, want->last + vqgan_last_layer(v)->size,
             vqgan_config(v)->out_ch, 0, TOLERANCE);
    CHECK(memcmp(got->tokens, want->tokens, a->B * a->cells * 4) == 0);
    CHECK(memcmp(got->raw, want->raw, a->B * a->cells * 4) == 0);
    CHECK(fabs(got->loss - want->loss) <= TOLERANCE * fabs(want->loss));
    near_rms("gradient as a whole", got->grad, want->grad, p->total, 0, TOLERANCE);
    for (size_t i = 0; i < p->n; i++) same_gradient(got, want, rounded, p, i);
}

static void test_network(const VqganConfig *c, int honour_tanh, size_t B, size_t H, size_t W) {
    const Asked a = ask(c, B, H, W);
    Vqgan *here = make_vqgan(c, honour_tanh);
    Said want = say(here, &a), rounded = say_rounded(here, &a), first = {};
    for (int order = 0; order < orders(); order++) {
        Vqgan *there = make_vqgan(c, honour_tanh);
        Params *p = vqgan_params(there);
        CHECK_OK(open_device(&p->device));
        p->ops = &CUDA_TABLE;
        CHECK_OK(vqgan_plan(there, B, H, W, 0));
        CHECK_ERR(vqgan_decode_tokens(there, a.tokens, B, 1, 1, want.drawn), "not on the GPU yet");
        CHECK_OK(params_send(p));
        reverse(order);
        Said got = say(there, &a);
        reverse(0);
        if (order == 0) {
            same_said(&got, &want, &rounded, &a, there);
            first = got;
        } else {
            CHECK(memcmp(got.grad, first.grad, p->total * sizeof *got.grad) == 0);
            CHECK(memcmp(got.dimage, first.dimage, a.n_image * sizeof *got.dimage) == 0);
            CHECK(memcmp(got.drawn, first.drawn, a.n_out * sizeof *got.drawn) == 0);
            forget(&got);
        }
        vqgan_free(there);
    }
    forget(&want), forget(&rounded), forget(&first);
    vqgan_free(here);
    free(a.image), free(a.z), free(a.dxrec), free(a.tokens);
}

/* From the second picture of a size on, the decoder's launches are a recording: the same bits as launched one by one, for
 * other tokens, after other sizes, and after a weight has changed. */
static void test_replay(void) {
    enum { TIMES = 9, MOST = 2 * 2 * 8 * 12 };
    static const size_t pictures[TIMES] = {1, 1, 1, 1, 2, 2, 2, 1, 2};
    const VqganConfig c = tiny();
    static real picture[2][TIMES][MOST];
    int32_t tokens[2 * 24];
    for (int anew = 0; anew < 2; anew++) { /* 1: a plan forgets what was recorded */
        Vqgan *v = make_vqgan(&c, 0);
        Params *p = vqgan_params(v);
        Param *row = &p->row[first_stage_row(v, "decoder.mid.block_1.conv1.weight") - p->row];
        CHECK_OK(open_device(&p->device));
        p->ops = &CUDA_TABLE;
        CHECK_OK(params_send(p));
        CHECK_OK(vqgan_plan(v, 2, 8, 12, 0));
        for (size_t k = 0; k < TIMES; k++) {
            for (size_t i = 0; i < 2 * 24; i++) tokens[i] = (int32_t)((i * 7 + k * 5) % 11);
            for (size_t i = 0; i < 32; i++) row->value[i] = k < 3 ? 1 : -2;
            params_send_part(p, (size_t)(row - p->row), 0, 32);
            if (anew) CHECK_OK(vqgan_plan(v, 2, 8, 12, 0));
            CHECK_OK(vqgan_decode_tokens(v, tokens, pictures[k], 4, 6, picture[anew][k]));
            CHECK(memcmp(picture[anew][k], picture[0][k], pictures[k] * 2 * 8 * 12 * sizeof(real)) == 0);
            CHECK(k == 0 || memcmp(picture[anew][k], picture[anew][k - 1], 2 * 8 * 12 * sizeof(real)));
        }
        vqgan_free(v);
    }
}

/* Codes start again from latents, and an optimizer step is seen by the convolutions. */
static void test_training(void) {
    const VqganConfig c = tiny();
    const Asked a = ask(&c, 2, 8, 12);
    const AdamW o = {1e-4, 0.9, 0.95, 1e-8, 1};
    Vqgan *v[2];
    real *out[2];
    for (int k = 0; k < 2; k++) {
        uint32_t usage[11] = {1, 0, 3, 0, 1, 1, 1, 0, 1, 1, 1};
        const real *xrec;
        double loss;
        v[k] = make_vqgan(&c, 0);
        Params *p = vqgan_params(v[k]);
        CHECK_OK(params_plan(p, PLAN_VALUE | PLAN_GRAD | PLAN_ADAM | PLAN_EMA));
        if (k) CHECK_OK(open_device(&p->device));
        if (k) p->ops = &CUDA_TABLE;
        CHECK_OK(vqgan_plan(v[k], 2, 8, 12, 1));
        CHECK_OK(params_send(p));
        params_zero_grad(p);
        for (int step = 1; step <= 2; step++) {
            CHECK_OK(vqgan_forward(v[k], a.image, 2, 8, 12, &xrec, &loss));
            CHECK_OK(vqgan_backward(v[k], a.dxrec, 1, NULL));
            adamw_step(p, &o, (uint64_t)step);
            CHECK(restart_codes(v[k], usage, 2, 24, 5, (uint64_t)step) == 3);
        }
        CHECK_OK(vqgan_forward(v[k], a.image, 2, 8, 12, &xrec, &loss));
        out[k] = copy_of(xrec, a.n_out);
        CHECK_OK(params_fetch(p));
    }
    const Param *here = first_stage_row(v[0], "quantize.embedding.weight"),
                *there = first_stage_row(v[1], "quantize.embedding.weight");
    near_rms("codebook after two steps", there->value, here->value, here->size, 0, TOLERANCE);
    CHECK(rms_of(there->ema, there->size) > 0);
    if (!IS_BF16) { /* in bf16 latents, and so the new codes, are others, and may choose others */
        near_rms("its average", there->ema, here->ema, here->size, 0, TOLERANCE);
        near_rms("its moments", there->m, here->m, here->size, 0, TOLERANCE);
        near_rms("reconstruction after two steps", out[1], out[0], a.n_out, 0, TOLERANCE);
    }
    for (int k = 0; k < 2; k++) vqgan_free(v[k]), free(out[k]);
    free(a.image), free(a.z), free(a.dxrec), free(a.tokens);
}

/* The bundled first stage, a network as training leaves them, on 32x32 pixels of a picture, and the gradient of a
 * loss. */
static void test_bundled(void) {
    enum { SIDE = 32, PIXELS = 3 * SIDE * SIDE, F32 = 0, ROUNDED, GPU, NETS };
    Model m;
    Image im;
    Said s[NETS];
    real x[PIXELS], dxrec[PIXELS];
    CHECK_OK(model_open(&m, "models/emoji", NULL));
    CHECK_OK(image_read(&im, "models/emoji/example.png"));
    CHECK(im.H >= 48 && im.W >= 48);
    for (size_t i = 0; i < PIXELS; i++) {
        const size_t c = i / SIDE / SIDE, row = 4 + i / SIDE % SIDE, column = 24 + i % SIDE;
        x[i] = to_float(to_floatX((float)im.rgb[(row * im.W + column) * 3 + c] / 127.5f - 1));
    }
    for (int n = F32; n < NETS; n++) {
        const real *xrec, *z;
        const int32_t *raw;
        double l1, l2;
        Vqgan *v;
        memset(&s[n], 0, sizeof s[n]);
        CHECK_OK(vqgan_create(&v, vqgan_config(m.vqgan), 0));
        Params *p = vqgan_params(v), *from = vqgan_params(m.vqgan);
        CHECK_OK(params_plan(p, PLAN_VALUE | PLAN_GRAD));
        for (size_t r = 0; r < p->n; r++)
            for (size_t k = 0; k < p->row[r].size; k++) p->row[r].value[k] = to_float(to_floatX(from->row[r].value[k]));
        if (n == ROUNDED && IS_BF16) p->precision = PRECISION_BF16;
        if (n == GPU) CHECK_OK(open_device(&p->device));
        if (n == GPU) p->ops = &CUDA_TABLE;
        CHECK_OK(vqgan_plan(v, 1, SIDE, SIDE, 1));
        CHECK_OK(params_send(p));
        params_zero_grad(p);
        CHECK_OK(vqgan_forward(v, x, 1, SIDE, SIDE, &xrec, &s[n].loss));
        vqgan_latents(v, &z, NULL, &raw);
        s[n].xrec = copy_of(xrec, PIXELS), s[n].raw = (int32_t *)malloc(16 * sizeof(int32_t));
        memcpy(s[n].raw, raw, 16 * sizeof(int32_t));
        if (n == F32) image_loss(x, xrec, PIXELS, 1, 1, &l1, &l2, dxrec);
        CHECK_OK(vqgan_backward(v, dxrec, 1, NULL));
        CHECK_OK(params_fetch(p));
        s[n].grad = copy_of(p->arena[1], p->total);
        CHECK(memcmp(s[n].raw, s[F32].raw, 16 * sizeof(int32_t)) == 0);
        if (n == GPU) {
            near_rms("reconstruction, bundled", s[GPU].xrec, s[F32].xrec, PIXELS, 0, TOLERANCE);
            near_rms("gradient as a whole, bundled", s[GPU].grad, s[F32].grad, p->total, 0, TOLERANCE);
            for (size_t r = 0; r < p->n; r++) same_gradient(&s[GPU], &s[F32], &s[ROUNDED], p, r);
        }
        vqgan_free(v);
    }
    for (int n = F32; n < NETS; n++) forget(&s[n]);
    image_free(&im), model_close(&m);
}

static void test_networks(void) {
    VqganConfig c = tiny();
    test_network(&c, 0, 2, 8, 12);
    c.legacy = 0, c.beta = 0.6, c.tanh_out = 1, c.re_embed = 6, c.n_attn = 0, c.levels = 1, c.ch_mult[0] = 1;
    test_network(&c, 1, 1, 3, 5);
    test_replay();
    test_training();
    test_bundled();
}

/* ---- main ---- */

static const Section sections[] = {{"needs", test_needs},
                                   {"conv", test_convs},
                                   {"reading", test_reading},
                                   {"layers", test_layers},
                                   {"networks", test_networks}};

int main(int argc, char **argv) {
    return run_sections(argc, argv, sections, sizeof sections / sizeof *sections);
}
