/* test_cuda.cu - every kernel against the plain loop of its name, then whole networks, decoding and training.
 *
 * Compiled twice, with floatX = float and = bf16: by a C++ compiler for the emulation on the CPU (make
 * test-cuda-emulated), by nvcc for a GPU (make test-cuda). It includes transformer.cu, so it sees every function there.
 * Tolerances are relative to the largest number of a tensor: 1e-4 in float, 2e-2 in bf16; inputs of a bf16 kernel are
 * rounded to bf16 first. Every kernel runs twice, the second time in the opposite order of threads and blocks when it
 * is emulated, and must give the same bits. A line at the end has a digest of all bits: an interpreter of nvcc's PTX has
 * more orders, between which runs are compared (make test-cuda-ptx). */
#include "transformer.cu"

#include "device_test.h"

/* ---- Layers: through the seam, beside the plain loops of transformer.cu ---- */

extern "C" {
extern const Layers transformer_layers;
}
static const Layers *const plain = &transformer_layers;

/* Where the kernels compute, and where the plain loops do; each with that much scratch. */
static Compute gpu, cpu;

static void seam(size_t gpu_scratch, size_t cpu_scratch) {
    gpu = Compute(), cpu = Compute();
    gpu.fast = &cuda_layers, gpu.device = device, gpu.ops = &CUDA_TABLE, gpu.unit = sizeof(floatX);
    gpu.scratch = on_device(gpu_scratch);
    cpu.unit = sizeof(real), cpu.scratch = malloc(cpu_scratch + 1);
}

/* Ends what seam began. */
static void seam_end(void) {
    CHECK_OK(earlier_failure(device));
    free(cpu.scratch);
    free_arrays();
}

static real *as_real(void *p) {
    return (real *)p;
}

static void test_gelu(size_t R, size_t H, int backward) {
    const size_t n = R * H;
    real *h = random_reals(n, 1, 2), *bias = random_reals(H, 2, 1), *slope = random_reals(n, 3, 1),
         *dh = random_reals(n, 4, 1);
    for (int order = first_order(); order < 2; order = next_order(order)) {
        seam(0, 0);
        floatX *g = send_x(h, n), *dg = send_x(slope, n), *d = send_x(dh, n);
        gpu.fast->gelu_forward(&gpu, as_real(g), backward ? as_real(dg) : NULL, send(bias, H), R, H);
        if (backward) gpu.fast->gelu_backward(&gpu, as_real(d), as_real(dg), R, H);
        real *want_g = random_reals(n, 1, 2), *want_dg = random_reals(n, 3, 1), *want_d = random_reals(n, 4, 1);
        plain->gelu_forward(&cpu, want_g, backward ? want_dg : NULL, bias, R, H);
        if (backward) plain->gelu_backward(&cpu, want_d, want_dg, R, H);
        near_x("gelu", g, want_g, n);
        near_x("slope of gelu", dg, want_dg, n);
        near_x("gradient of gelu", d, want_d, n);
        free(want_g), free(want_dg), free(want_d);
        seam_end();
    }
    free(h), free(bias), free(slope), free(dh);
}

/* A table of nothing but the tensors that single layers need, on both sides */
typedef struct {
    Params params;
    size_t norm_weight, norm_bias, weight, bias, token, position; /* rows */
} Fixture;

enum { TOKENS = 13, POSITIONS = 9 };

static void fixture_make(Fixture *f, size_t C, size_t out) {
    memset(f, 0, sizeof *f);
    Params *p = &f->params;
    size_t matrix[2] = {out, C}, tokens[2] = {TOKENS, C}, positions[2] = {POSITIONS, C};
    CHECK_OK(params_add(p, &f->norm_weight, INIT_NORMAL, 1, 0.01, 1, &C, "norm.weight"));
    CHECK_OK(params_add(p, &f->norm_bias, INIT_NORMAL, 1, 0, 1, &C, "norm.bias"));
    CHECK_OK(params_add(p, &f->weight, INIT_NORMAL, 0.3, 0.02, 2, matrix, "linear.weight"));
    CHECK_OK(params_add(p, &f->bias, INIT_NORMAL, 1, 0, 1, &out, "linear.bias"));
    CHECK_OK(params_add(p, &f->token, INIT_NORMAL, 1, 0, 2, tokens, "tokens"));
    CHECK_OK(params_add(p, &f->position, INIT_NORMAL, 1, 0, 2, positions, "positions"));
    CHECK_OK(params_plan(p, PLAN_VALUE | PLAN_GRAD | PLAN_ADAM | PLAN_EMA));
    params_init(p, 3);
    for (size_t r = 0; r < p->n; r++)
        for (size_t k = 0; k < p->row[r].size; k++) {
            if (IS_BF16) p->row[r].value[k] = to_float(to_floatX(p->row[r].value[k]));
            p->row[r].grad[k] = (real)rng_normal(8, rng_stream(RNG_TEST, r, 1), k);
            p->row[r].ema[k] = (real)rng_normal(8, rng_stream(RNG_TEST, r, 2), k);
        }
    free_rows(device);
    CHECK_OK(send_params(device, p));
    for (size_t r = 0; r < p->n; r++)
        CHECK_OK(to_device(device, device->row[r].grad, p->row[r].grad, p->row[r].size * sizeof(real)));
}

static void fixture_free(Fixture *f) {
    params_free(&f->params);
    free_arrays();
}

static void near_grad(const Fixture *f, size_t row) {
    const Param *p = &f->params.row[row];
    near_f(p->name, device->row[row].grad, p->grad, p->size);
}

/* A parameter and its gradient: there, and here */
static const real *there(size_t row) {
    return row_value(device, row);
}
static real *grad_there(size_t row) {
    return row_grad(device, row);
}
static const real *here(const Fixture *f, size_t row) {
    return f->params.row[row].value;
}
static real *grad_here(const Fixture *f, size_t row) {
    return f->params.row[row].grad;
}

static real *reals(size_t n) {
    real *x = (real *)malloc((n + 1) * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = (real)NAN;
    return x;
}

static void test_norm(size_t B, size_t n, size_t skip, size_t C, int dy_f32) {
    const size_t R = B * (n - skip), all = B * n * C;
    Fixture f;
    for (int order = first_order(); order < 2; order = next_order(order)) {
        fixture_make(&f, C, 3);
        seam(gpu.fast->norm_needs(&gpu, R, C), 0);
        const size_t w = f.norm_weight, b = f.norm_bias;
        real *x = random_reals(all, 1, 2), *dy = random_reals(R * C, 2, 1), *dx = random_reals(all, 3, 1);
        real *y = reals(R * C), *mean = reals(R), *rstd = reals(R);
        float *gx = send(x, all), *gdx = send(dx, all), *gm = send(mean, R), *gr = send(rstd, R);
        floatX *gy = send_x(y, R * C), *copy = IS_BF16 ? send_x(dx, all) : (floatX *)(void *)gdx;
        gpu.fast->norm_forward(&gpu, as_real(gy), gm, gr, gx, there(w), there(b), R, C, n, skip);
        const real *gdy = dy_f32 ? send(dy, R * C) : as_real(send_x(dy, R * C));
        gpu.fast->norm_backward(&gpu, gdx, as_real(copy), grad_there(w), grad_there(b), gdy, gx, there(w), gm, gr,
                                dy_f32, R, C, n, skip);
        plain->norm_forward(&cpu, y, mean, rstd, x, here(&f, w), here(&f, b), R, C, n, skip);
        plain->norm_backward(&cpu, dx, dx, grad_here(&f, w), grad_here(&f, b), dy, x, here(&f, w), mean, rstd, dy_f32,
                             R, C, n, skip);
        near_x("norm", gy, y, R * C);
        near_f("norm, mean", gm, mean, R);
        near_f("norm, rstd", gr, rstd, R);
        near_f("norm, dx", gdx, dx, all);
        near_x("norm, dx in floatX", copy, dx, all);
        near_grad(&f, w);
        near_grad(&f, b);
        free(x), free(dy), free(dx), free(y), free(mean), free(rstd);
        seam_end();
        fixture_free(&f);
    }
}

static void test_linear(size_t R, size_t in, size_t out, int bias) {
    Fixture f;
    fixture_make(&f, in, out);
    seam(gpu.fast->linear_needs(&gpu, R, in, out), 0);
    const real *w = there(f.weight), *b = bias ? there(f.bias) : NULL, *hw = here(&f, f.weight),
               *hb = bias ? here(&f, f.bias) : NULL;
    real *dw = grad_there(f.weight), *db = bias ? grad_there(f.bias) : NULL, *hdw = grad_here(&f, f.weight),
         *hdb = bias ? grad_here(&f, f.bias) : NULL;
    real *x = random_reals(R * in, 1, 1), *residual = random_reals(R * out, 2, 1), *dy = random_reals(R * out, 3, 1);
    real *y = reals(R * out), *sum = reals(R * out), *dx = reals(R * in), *more = random_reals(R * in, 4, 1);
    floatX *gx = send_x(x, R * in), *gy = send_x(y, R * out), *gdy = send_x(dy, R * out), *gdx = send_x(dx, R * in);
    float *gsum = send(sum, R * out), *gmore = send(more, R * in);
    gpu.fast->linear_forward(&gpu, as_real(gy), as_real(gx), w, b, NULL, 0, R, in, out);
    gpu.fast->linear_forward(&gpu, gsum, as_real(gx), w, b, send(residual, R * out), 1, R, in, out);
    gpu.fast->linear_backward(&gpu, as_real(gdx), dw, db, as_real(gdy), as_real(gx), w, 0, 0, R, in, out);
    gpu.fast->linear_backward(&gpu, gmore, dw, db, as_real(gdy), as_real(gx), w, 1, 1, R, in, out);
    plain->linear_forward(&cpu, y, x, hw, hb, NULL, 0, R, in, out);
    plain->linear_forward(&cpu, sum, x, hw, hb, residual, 1, R, in, out);
    plain->linear_backward(&cpu, dx, hdw, hdb, dy, x, hw, 0, 0, R, in, out);
    plain->linear_backward(&cpu, more, hdw, hdb, dy, x, hw, 1, 1, R, in, out);
    near_x("linear", gy, y, R * out);
    near_f("linear + residual", gsum, sum, R * out);
    near_x("linear, din", gdx, dx, R * in);
    near_f("linear, din +=", gmore, more, R * in);
    near_grad(&f, f.weight);
    near_grad(&f, f.bias); /* untouched without bias */
    free(x), free(residual), free(dy), free(y), free(sum), free(dx), free(more);
    seam_end();
    fixture_free(&f);
}

/* Ones: whoever splits K into parts and leaves out some of it is caught, at the K of weights' gradients. */
static void test_ones(size_t K) {
    enum { M = 64, N = 32 };
    real *ones = reals(K * M), *want = reals(M * N);
    for (size_t i = 0; i < K * M; i++) ones[i] = 1;
    for (size_t i = 0; i < M * N; i++) want[i] = (real)K;
    float *D = send(want, M * N);
    Matmul p;
    memset(&p, 0, sizeof p);
    p.trans_a = 1, p.d_is_float = 1, p.M = M, p.N = N, p.K = K, p.D = D, p.ldd = N;
    p.A = send_x(ones, K * M), p.lda = M, p.B = send_x(ones, K * N), p.ldb = N;
    CHECK_OK(matmul(device, &p));
    real *got = reals(M * N);
    CHECK_OK(to_host(device, got, D, M * N * sizeof *got));
    CHECK(memcmp(got, want, M * N * sizeof *got) == 0);
    free(ones), free(want), free(got);
    free_arrays();
}

static void test_embedding(size_t B, size_t n, size_t C) {
    int32_t ids[64];
    Fixture f;
    for (int order = first_order(); order < 2; order = next_order(order)) {
        fixture_make(&f, C, 3);
        seam(0, 0);
        for (size_t i = 0; i < B * n; i++) ids[i] = (int32_t)rng_below(5, 6, i, TOKENS - 3);
        real *x = reals(B * n * C), *dx = random_reals(B * n * C, 1, 1);
        const real *token = here(&f, f.token), *position = here(&f, f.position);
        float *gx = send(x, B * n * C), *gdx = send(dx, B * n * C);
        int32_t *gids = (int32_t *)on_device(sizeof ids);
        int two = 2, *at = (int *)on_device(sizeof two);
        CHECK_OK(to_device(device, gids, ids, sizeof ids));
        CHECK_OK(to_device(device, at, &two, sizeof two));
        gpu.fast->embed_forward(&gpu, gx, gids, there(f.token), there(f.position), NULL, B, n, C);
        plain->embed_forward(&cpu, x, ids, token, position, NULL, B, n, C);
        near_f("embedding", gx, x, B * n * C);
        CHECK_OK(embed_from(device, gx, gids, there(f.token), there(f.position), at, B, n, C));
        Position from[64];
        for (size_t r = 0; r < B * n; r++) from[r].b = r / n, from[r].pos = 2 + r % n, from[r].visible = 0;
        plain->embed_forward(&cpu, x, ids, token, position, from, B, n, C);
        near_f("embedding from position 2 on", gx, x, B * n * C);
        gpu.fast->embed_backward(&gpu, grad_there(f.token), grad_there(f.position), gdx, gids, B, n, C, TOKENS);
        plain->embed_backward(&cpu, grad_here(&f, f.token), grad_here(&f, f.position), dx, ids, B, n, C, TOKENS);
        near_grad(&f, f.token);
        near_grad(&f, f.position);
        free(x), free(dx);
        seam_end();
        fixture_free(&f);
    }
}

/* scaled: 0, 1, or 2 for fine */
static void test_variant(size_t B, size_t N, size_t K, int scaled, int residual) {
    enum { SCALES = 3, LENGTH = 9, PROMPT = 2 };
    const size_t n = B * N * K, scalors = scaled == 2 ? SCALES * LENGTH : SCALES;
    int32_t ids[64];
    for (size_t b = 0; b < B; b++)
        for (size_t i = 0; i < PROMPT + N; i++)
            ids[b * (PROMPT + N) + i] = (int32_t)(i ? rng_below(3, 4, b * N + i, (uint32_t)K) : 1 + b % SCALES);
    for (int order = first_order(); order < 2; order = next_order(order)) {
        seam(gpu.fast->variant_needs(&gpu, B * N), 0);
        real *raw = random_reals(n, 1, 2), *s = random_reals(scalors, 2, 0.3), *dlogits = random_reals(n, 3, 1);
        real *logits = reals(n), *draw = reals(n), *ds = random_reals(scalors, 4, 1);
        float *graw = send(raw, n), *glogits = send(logits, n), *gds = send(ds, scalors);
        floatX *gdraw = send_x(draw, n);
        Variant v, w;
        memset(&v, 0, sizeof v);
        v.fine = scaled == 2, v.residual = residual, v.scales = SCALES, v.length = LENGTH, v.prompt = PROMPT, v.N = N;
        for (int t = 1; t <= SCALES; t++) v.alpha[t] = 1 - 0.2f * (float)t;
        w = v;
        int32_t *gids = (int32_t *)on_device(sizeof ids);
        CHECK_OK(to_device(device, gids, ids, sizeof ids));
        v.log_scalors = scaled ? send(s, scalors) : NULL, w.log_scalors = scaled ? s : NULL;
        v.ids = gids, w.ids = ids;
        gpu.fast->variant_forward(&gpu, glogits, graw, &v, NULL, B, N, K);
        gpu.fast->variant_backward(&gpu, as_real(gdraw), gds, send(dlogits, n), graw, &v, B, N, K);
        plain->variant_forward(&cpu, logits, raw, &w, NULL, B, N, K);
        if (scaled) plain->variant_backward(&cpu, draw, ds, dlogits, raw, &w, B, N, K);
        near_f("logits of a variant", glogits, logits, n);
        near_x("gradient of raw logits", gdraw, scaled ? draw : dlogits, n);
        near_f("gradient of log_scalors", gds, ds, scalors);
        free(raw), free(s), free(dlogits), free(logits), free(draw), free(ds);
        seam_end();
    }
}

/* ---- Attention ---- */

/* x is 0 but for the rounding of sums of numbers around 1 */
static void near_zero(const char *name, const floatX *got, size_t n) {
    floatX *x = (floatX *)malloc(n * sizeof *x);
    double worst = 0;
    CHECK_OK(to_host(device, x, got, n * sizeof *x));
    for (size_t i = 0; i < n && worst == worst; i++) /* NaN stays */
        if (!(fabs((double)to_float(x[i])) <= worst)) worst = fabs((double)to_float(x[i]));
    if (!CHECK(worst <= 1e-4)) printf("     %s: %g\n", name, worst);
    free(x);
}

/* (R,row) of zeros with x (R,n) from column `at` on */
static real *apart(const real *x, size_t R, size_t n, size_t row, size_t at) {
    real *y = reals(R * row);
    for (size_t i = 0; i < R * row; i++) y[i] = i % row >= at && i % row < at + n ? x[i / row * n + i % row - at] : 0;
    return y;
}
static floatX *send_apart(const real *x, size_t R, size_t n, size_t row, size_t at) {
    real *y = apart(x, R, n, row, at);
    floatX *there = send_x(y, R * row) + at;
    free(y);
    return there;
}
/* got: where send_apart put zeros, and what lies between must be zero still */
static void near_apart(const char *name, const floatX *got, const real *want, size_t R, size_t n, size_t row,
                       size_t at) {
    real *y = apart(want, R, n, row, at);
    near_x(name, got - at, y, R * row);
    free(y);
}

/* Once with rows that follow each other, once with those of q, k and v side by side with others, backwards. */
static void test_attention(size_t B, size_t heads, size_t D, size_t Tq, size_t Tk, int causal, size_t unmasked) {
    Attention s = {B, heads, D, Tq, Tk, Tk, causal, unmasked, NULL, 0, 0, 0};
    const size_t inner = heads * D, Rq = B * Tq, Rk = B * Tk, nq = Rq * inner, nk = Rk * inner;
    real *q = random_reals(nq, 1, 1.5), *k = random_reals(nk, 2, 1.5), *v = random_reals(nk, 3, 1),
         *dy = random_reals(nq, 4, 1), *zero = random_reals(nq + nk, 5, 0);
    real *y = reals(nq), *p = reals(B * heads * Tq * Tk);
    real *dq = reals(nq), *dk = reals(nk), *dv = reals(nk);
    seam(0, Tk * sizeof(real));
    plain->attention_forward(&cpu, y, p, q, k, v, &s);
    plain->attention_backward(&cpu, dq, dk, dv, dy, y, p, q, k, v, &s);
    seam_end();
    for (int order = 0; order < 2; order++) {
        const size_t q_row = order ? 3 * inner : inner, kv_row = order ? 2 * inner : inner, at = q_row - inner,
                     v_at = kv_row - inner;
        if (order) s.q_row = q_row, s.kv_row = kv_row;
        seam(gpu.fast->attention_needs(&gpu, &s, 1), 0);
        floatX *gq = send_apart(q, Rq, inner, q_row, at), *gk = send_apart(k, Rk, inner, kv_row, 0);
        floatX *gv = send_apart(v, Rk, inner, kv_row, v_at), *gdy = send_x(dy, nq);
        floatX *gy = (floatX *)on_device(nq * sizeof(floatX)), *gdq = send_apart(zero, Rq, inner, q_row, at);
        floatX *gdk = send_apart(zero, Rk, inner, kv_row, 0), *gdv = send_apart(zero, Rk, inner, kv_row, v_at);
        float *lse = (float *)on_device(gpu.fast->attention_saved(&s));
        reverse(order);
        gpu.fast->attention_forward(&gpu, as_real(gy), lse, as_real(gq), as_real(gk), as_real(gv), &s);
        gpu.fast->attention_backward(&gpu, as_real(gdq), as_real(gdk), as_real(gdv), as_real(gdy), as_real(gy), lse,
                                     as_real(gq), as_real(gk), as_real(gv), &s);
        reverse(0);
        near_x("attention", gy, y, nq);
        if (Tk == 1) { /* p is 1 whatever q and k are */
            near_zero("attention to one key, dq", gdq - at, Rq * q_row);
            near_zero("attention to one key, dk", gdk, Rk * kv_row);
        } else {
            near_apart("attention, dq", gdq, dq, Rq, inner, q_row, at);
            near_apart("attention, dk", gdk, dk, Rk, inner, kv_row, 0);
        }
        near_apart("attention, dv", gdv, dv, Rk, inner, kv_row, v_at);
        seam_end();
    }
    free(q), free(k), free(v), free(dy), free(zero), free(y), free(p), free(dq), free(dk), free(dv);
}

/* Widths of a head whose rows begin at multiples of 16, of 4 and of 2 bytes, each with whole and broken tiles of
 * queries and keys, and with every kind of sight. */
static void test_attention_shapes(void) {
    static const size_t width[] = {64, 50, 20, 128, 15, 121}, length[] = {1, 64, 65, 257};
    for (size_t w = 0; w < 6; w++)
        for (size_t i = 0; i < (w < 4 ? 4 : 3); i++) {
            const size_t T = length[i], large = T > 100, B = large ? 1 : 2;
            test_attention(B, 2, width[w], T, T, 0, 0);
            test_attention(B, 1, width[w], T, length[3 - i], 0, 0);
            if (large && w > 1) continue;
            test_attention(B, 2, width[w], T, T, 1, 0);
            test_attention(B, 1, width[w], T, T, 1, large ? 130 : T / 2);
        }
}

/* n new positions from `pos` on in caches with room for more, all seeing all. */
static void test_attention_decoding(size_t B, size_t heads, size_t D, size_t pos, size_t n, size_t room) {
    const size_t inner = heads * D, keys = pos + n, all = B * room * inner, rows = B * n * inner;
    const Attention s = {B, heads, D, n, keys, room, 0, 0, NULL, 0, 0, 0};
    real *q = random_reals(rows, 1, 1.5), *k = random_reals(all, 2, 1.5), *v = random_reals(all, 3, 1);
    real *new_k = random_reals(rows, 4, 1.5), *new_v = random_reals(rows, 5, 1), *y = reals(rows);
    seam(0, room * sizeof(real));
    int at = (int)pos, *gat = (int *)on_device(sizeof at);
    CHECK_OK(to_device(device, gat, &at, sizeof at));
    floatX *gq = send_x(q, rows), *gk = send_x(k, all), *gv = send_x(v, all), *gy = send_x(y, rows);
    CHECK_OK(attend_decode_gpu(device, &s, gat, gy, gq, gk, gv, send_x(new_k, rows), send_x(new_v, rows)));
    for (size_t b = 0; b < B; b++) {
        memcpy(k + (b * room + pos) * inner, new_k + b * n * inner, n * inner * sizeof *k);
        memcpy(v + (b * room + pos) * inner, new_v + b * n * inner, n * inner * sizeof *v);
    }
    plain->attention_forward(&cpu, y, NULL, q, k, v, &s);
    near_x("attention while decoding", gy, y, rows);
    near_x("keys after it", gk, k, all);
    near_x("values after it", gv, v, all);
    CHECK_OK(attend_decode_gpu(device, &s, NULL, gy, gq, gk, gv, NULL, NULL));
    near_x("attention to keys in place", gy, y, rows);
    free(q), free(k), free(v), free(new_k), free(new_v), free(y);
    seam_end();
}

/* ---- Updates ---- */

static void test_updates(void) {
    const AdamW o = {1e-2, 0.9, 0.95, 1e-8, 1.5};
    Fixture f;
    Params *p = &f.params;
    fixture_make(&f, 50, 90);
    p->row[f.norm_bias].untrained = 1;
    free_rows(device);
    CHECK_OK(send_params(device, p));
    for (uint64_t step = 1; step <= 3; step++) {
        for (size_t r = 0; r < p->n; r++)
            CHECK_OK(to_device(device, device->row[r].grad, p->row[r].grad, p->row[r].size * sizeof(real)));
        const double norm = grad_norm_cuda(device);
        CHECK(fabs(norm - params_grad_norm(p)) <= 1e-9 * norm);
        if (step == 2) {
            update_params(device, p, &o, step, 0);
            update_params(device, p, NULL, 0, 0.125f);
            adamw_step(p, &o, step);
            ema_update(p, 0.875, 1000);
        } else {
            update_params(device, p, &o, step, 0.25f);
            adamw_ema_step(p, &o, step, 0.75, 1000);
        }
    }
    for (size_t r = 0; r < p->n; r++) {
        const Param *row = &p->row[r];
        near_f("value", device->row[r].value, row->value, row->size);
        near_f("first moment", device->row[r].m, row->m, row->size);
        near_f("second moment", device->row[r].v, row->v, row->size);
        near_f("moving average", device->row[r].ema, row->ema, row->size);
        near_x("value in floatX", device->row[r].weight, row->value, row->size);
    }
    swap_ema_cuda(device);
    params_swap_ema(p);
    near_f("value after the exchange", device->row[2].value, p->row[2].value, p->row[2].size);
    near_x("in floatX too", device->row[2].weight, p->row[2].value, p->row[2].size);
    near_f("moving average after it", device->row[2].ema, p->row[2].ema, p->row[2].size);
    zero_grad_cuda(device);
    CHECK(grad_norm_cuda(device) == 0);
    CHECK_OK(earlier_failure(device));
    fixture_free(&f);
}

/* Moments in bf16: bit for bit what the CPU makes of the same gradients, also after a way to the host and back. */
static void test_bf16_moments(void) {
    const AdamW o = {1e-2, 0.9, 0.999, 1e-8, 1.5};
    const size_t sizes[3] = {CHUNK + 5, 7, 3 * CHUNK + 1};
    Params p;
    memset(&p, 0, sizeof p);
    for (size_t r = 0; r < 3; r++) CHECK_OK(params_add(&p, NULL, INIT_NORMAL, 1, 0.01, 1, &sizes[r], "w%zu", r));
    p.bf16_moments = 1, p.row[1].untrained = 1;
    CHECK_OK(params_plan(&p, PLAN_VALUE | PLAN_GRAD | PLAN_ADAM));
    params_init(&p, 5);
    free_rows(device);
    CHECK_OK(send_params(device, &p));
    uint16_t *m16 = (uint16_t *)malloc(p.total * sizeof *m16);
    real *value = (real *)malloc(p.total * sizeof *value);
    for (uint64_t step = 1; step <= 40; step++) {
        for (size_t r = 0; r < 3; r++) {
            for (size_t k = 0; k < p.row[r].size; k++)
                p.row[r].grad[k] = (real)rng_normal(3, rng_stream(RNG_TEST, r, step), k);
            CHECK_OK(to_device(device, device->row[r].grad, p.row[r].grad, p.row[r].size * sizeof(real)));
        }
        update_params(device, &p, &o, step, 0);
        CHECK_OK(wait_for(device)); /* has the gradient */
        adamw_step(&p, &o, step);
    }
    memcpy(value, p.arena[0], p.total * sizeof *value), memcpy(m16, p.arena[2], p.total * sizeof *m16);
    for (size_t r = 0; r < 3; r++) {
        const size_t n = p.row[r].size;
        uint16_t *const want = (uint16_t *)malloc(n * sizeof *want);
        memcpy(want, p.row[r].v16, n * sizeof *want);
        memset(p.row[r].v16, 1, n * sizeof *want), memset(p.row[r].m16, 1, n * sizeof *want);
        memset(p.row[r].value, 1, n * sizeof(real));
        CHECK_OK(fetch_params(device, &p));
        CHECK(memcmp(p.row[r].v16, want, n * sizeof *want) == 0);
        free(want);
    }
    add_bits(p.arena[0], p.total * sizeof *value);
    CHECK(memcmp(value, p.arena[0], p.total * sizeof *value) == 0);
    CHECK(memcmp(m16, p.arena[2], p.total * sizeof *m16) == 0);
    free_rows(device);
    CHECK_OK(send_params(device, &p));
    memset(p.row[0].m16, 1, p.row[0].size * sizeof *m16);
    CHECK_OK(fetch_params(device, &p));
    CHECK(memcmp(m16, p.arena[2], p.total * sizeof *m16) == 0);
    CHECK_OK(earlier_failure(device));
    free(m16), free(value);
    free_rows(device), params_free(&p);
}

/* ---- Whole networks: one on the CPU, one on the GPU, with the same parameters ---- */

enum { B_MAX = 12, N_MAX = 72 };
typedef struct {
    Transformer *cpu, *gpu;
    size_t B, N, K;
    Schedule schedule;
    int32_t x0[B_MAX * N_MAX], x[B_MAX * N_MAX], x_t[B_MAX * N_MAX], t[B_MAX], label[B_MAX];
    real *q, *dlogits;
} Pair;

static const NetConfig x_small = {NET_X, X_PLAIN, 3, 0, 24, 11, 1, 2, 74, 9, 2, 1, 72, 0, 0, 0};
static const NetConfig gpt_small = {NET_GPT, X_PLAIN, 3, 0, 30, 0, 0, 0, 0, 9, 2, 3, 73, 12, 0, 0};

static double shaking = 0.15; /* less where rows are long: what a bf16 is off by grows from layer to layer */

static void shake(Params *p) {
    for (size_t r = 0; r < p->n; r++)
        for (size_t k = 0; k < p->row[r].size; k++) {
            p->row[r].value[k] += (real)(shaking * rng_normal(5, rng_stream(RNG_TEST, r, 0), k));
            if (IS_BF16 && p->row[r].matrix) p->row[r].value[k] = to_float(to_floatX(p->row[r].value[k]));
        }
    memcpy(p->arena[4], p->arena[0], p->total * sizeof(real));
}

static void network_make(Transformer **net, const NetConfig *c, const Schedule *s, int on_gpu) {
    if (!CHECK(transformer_create(net, c) == OK)) printf("%s\n", err_text()), exit(1);
    if (on_gpu) CHECK_OK(transformer_use_cuda(*net, IS_BF16 ? PRECISION_BF16 : PRECISION_F32));
    transformer_set_alphas(*net, s->alpha);
    CHECK_OK(params_plan(transformer_params(*net), PLAN_VALUE | PLAN_GRAD | PLAN_ADAM | PLAN_EMA));
    params_init(transformer_params(*net), 3);
    shake(transformer_params(*net));
    CHECK_OK(params_send(transformer_params(*net)));
}

static void pair_make(Pair *a, const NetConfig *c, size_t B, size_t N, int train) {
    memset(a, 0, sizeof *a);
    a->B = B, a->N = N, a->K = c->dec_num_tokens;
    CHECK_OK(schedule_make(&a->schedule, "geometric", c->n_scales));
    network_make(&a->cpu, c, &a->schedule, 0);
    network_make(&a->gpu, c, &a->schedule, 1);
    CHECK_OK(transformer_plan(a->cpu, B, N, train));
    CHECK_OK(transformer_plan(a->gpu, B, N, train));
    CHECK(transformer_on_cuda(a->gpu) && !transformer_on_cuda(a->cpu));
    const size_t labels = c->kind == NET_X ? c->enc_num_tokens : c->input_vocab_size;
    for (size_t i = 0; i < B * N; i++) {
        a->x0[i] = (int32_t)rng_below(1, 1, i, (uint32_t)a->K), a->x[i] = (int32_t)rng_below(1, 2, i, (uint32_t)a->K);
        a->x_t[i] = i % 3 ? (int32_t)rng_below(1, 3, i, (uint32_t)a->K) : a->x0[i];
    }
    for (size_t b = 0; b < B; b++)
        a->t[b] = 1 + (int32_t)(b % (size_t)c->n_scales), a->label[b] = (int32_t)(labels - 1 - b % labels);
    CHECK_OK(mem_alloc(&a->q, B * N * a->K, sizeof(real), "posterior"));
    CHECK_OK(mem_alloc(&a->dlogits, B * N * a->K, sizeof(real), "gradient"));
    for (size_t b = 0; b < B; b++)
        posterior(a->q + b * N * a->K, a->x0 + b * N, a->x_t + b * N, N, a->K, &a->schedule, a->t[b]);
}

static void pair_free(Pair *a) {
    transformer_free(a->cpu);
    transformer_free(a->gpu);
    free(a->q), free(a->dlogits);
}

/* A tensor of a whole network. In float: 1e-4 of its largest number. In bf16 the gradient of a projection to queries or
 * keys is a difference of nearly equal terms, each rounded: it may be off by 5e-2 of its norm (and that of a key's
 * bias, which is 0 but for rounding, by that of its weight's), while the gradient as a whole must agree to 2e-2. */
static void near_rows(const char *what, const Params *got, const Params *want, int which) {
    double all_off = 0, all = 0, before = 0;
    for (size_t r = 0; r < want->n; r++) {
        const real *g = which == 'g' ? got->row[r].grad : which == 'e' ? got->row[r].ema : got->row[r].value;
        const real *w = which == 'g' ? want->row[r].grad : which == 'e' ? want->row[r].ema : want->row[r].value;
        const int key_bias = strstr(want->row[r].name, "key.bias") != NULL;
        char name[NAME_MAX_BYTES + 64];
        double off = 0, norm = 0;
        snprintf(name, sizeof name, "%s, %s", what, want->row[r].name);
        for (size_t k = 0; k < want->row[r].size; k++)
            off += pow((double)g[k] - (double)w[k], 2), norm += pow((double)w[k], 2);
        all_off += off, all += norm;
        add_bits(g, want->row[r].size * sizeof *g);
        if (IS_BF16 && which == 'g') {
            if (!test_note(sqrt(off) <= 5e-2 * sqrt(key_bias ? before : norm) + 1e-7, __FILE__, __LINE__, name))
                printf("     off by %.3g of %.3g\n", sqrt(off), sqrt(norm));
        } else /* Adam makes the noise of a key's bias as large as any other step */
            CHECK_NEAR(name, g, w, want->row[r].size, which != 'g' && key_bias ? 2e-2 : 1e-7, TOLERANCE);
        before = norm; /* of the tensor before: a key's weight, in front of its bias */
    }
    if (which == 'g' && !CHECK(sqrt(all_off) <= TOLERANCE * sqrt(all)))
        printf("     %s: the gradient as a whole is off by %.3g of %.3g\n", what, sqrt(all_off), sqrt(all));
}

static real *gradients(Pair *a, const char *what, const real *dlogits) {
    params_zero_grad(transformer_params(a->gpu));
    CHECK_OK(transformer_backward(a->gpu, dlogits));
    CHECK_OK(params_fetch(transformer_params(a->gpu)));
    near_rows(what, transformer_params(a->gpu), transformer_params(a->cpu), 'g');
    real *copy = reals(transformer_params(a->gpu)->total);
    memcpy(copy, transformer_params(a->gpu)->arena[1], transformer_params(a->gpu)->total * sizeof *copy);
    return copy;
}

/* Logits; gradients from given dlogits; loss and gradients in one go; the same bits in either order of threads. */
static void test_network(const char *what, const NetConfig *c, size_t B, size_t N) {
    Pair a;
    const real *want, *got;
    Loss loss, fused;
    pair_make(&a, c, B, N, 1);
    const size_t n = B * N * a.K;
    CHECK_OK(transformer_forward(a.cpu, a.x, a.x_t, a.t, a.label, B, N, &want));
    CHECK_OK(transformer_forward(a.gpu, a.x, a.x_t, a.t, a.label, B, N, &got));
    CHECK_NEAR(what, got, want, n, 0, TOLERANCE);
    CHECK_OK(denoising_loss(&loss, want, a.x, a.q, B * N, a.K, 0.3, 1.7, a.dlogits));
    params_zero_grad(transformer_params(a.cpu));
    CHECK_OK(transformer_backward(a.cpu, a.dlogits));
    real *first = gradients(&a, what, a.dlogits);
    reverse(1);
    CHECK_OK(transformer_forward(a.gpu, a.x, a.x_t, a.t, a.label, B, N, &got));
    real *second = gradients(&a, what, a.dlogits);
    CHECK(memcmp(first, second, transformer_params(a.gpu)->total * sizeof *first) == 0);
    reverse(0);
    params_zero_grad(transformer_params(a.gpu));
    CHECK_OK(transformer_loss_cuda(a.gpu, &a.schedule, a.x0, a.x, a.x_t, a.t, a.label, B, N, 0.3, 1.7, 1, &fused));
    CHECK(fabs(fused.hard - loss.hard) <= TOLERANCE * loss.hard &&
          fabs(fused.soft - loss.soft) <= TOLERANCE * loss.soft);
    CHECK(fabs(fused.loss - loss.loss) <= TOLERANCE * loss.loss);
    CHECK_OK(params_fetch(transformer_params(a.gpu)));
    near_rows(what, transformer_params(a.gpu), transformer_params(a.cpu), 'g');
    free(first), free(second);
    pair_free(&a);
}

static void test_networks(void) {
    NetConfig c = x_small;
    test_network("plain", &c, 3, 6);
    c.variant = X_SCALED, c.has_class = 1;
    test_network("scaled, class", &c, 4, 5);
    c.variant = X_FINE_SCALED, c.has_class = 0, c.tie_token_emb = 1;
    test_network("fine-scaled, tied", &c, 4, 5);
    c.variant = X_RESIDUAL;
    test_network("residual", &c, 2, 70);
    c.variant = X_RESIDUAL_SCALED, c.has_class = 1, c.tie_token_emb = 0;
    test_network("residual-scaled, class", &c, 5, 7);
    c = gpt_small;
    test_network("gpt", &c, 3, 8);
    c.has_class = 1, c.n_unmasked = 2;
    test_network("gpt, class, 2 unmasked", &c, 2, 72);
    c.dim = 64, c.dec_heads = 2; /* whose projections follow each other: one product */
    test_network("gpt, key, query and value as one", &c, 2, 10);
}

/* tokens (B,N) of the example picture and of its parts moved around */
static void example_tokens(Model *m, int32_t *tokens, size_t B) {
    const size_t side = m->side, n = 3 * side * side;
    Image im;
    real *x = reals(B * n);
    CHECK_OK(image_read(&im, "models/emoji/example.png"));
    CHECK(im.H == side && im.W == side);
    for (size_t i = 0; i < B * n; i++) {
        const size_t column = (i + i / n * side / 2) % side, row = i / side % side, c = i / side / side % 3;
        x[i] = (real)im.rgb[(row * side + column) * 3 + c] / (real)127.5 - 1;
    }
    CHECK_OK(vqgan_plan(m->vqgan, B, side, side, 0));
    CHECK_OK(vqgan_encode(m->vqgan, x, B, side, side, 1, NULL, NULL, tokens));
    free(x), image_free(&im);
}

static double distance(const Params *a, const Params *b) { /* of their gradients; b NULL: from 0 */
    double sum = 0;
    for (size_t i = 0; i < a->total; i++) sum += pow((double)a->arena[1][i] - (b ? (double)b->arena[1][i] : 0), 2);
    return sqrt(sum);
}

/* Scales of the bundled model, networks as training leaves them, on what they were trained on. In bf16 the gradient as a
 * whole: scales 1 and 2 know the picture by heart, so that it is what is left where p and q nearly cancel. Rounding the
 * operands of the processor's products moves it by 1 to 2 in 100, and the GPU's may be 1.5 times as far away. */
static void test_bundled(int t) {
    enum { B = 2, N = 64, F32 = 0, ROUNDED, GPU, NETS };
    Model m;
    Loss loss, fused;
    Transformer *net[NETS];
    const Params *p[NETS];
    int32_t x0[B * N], x[B * N], x_t[B * N], at[B] = {t, t}, label[B] = {6, 6}; /* a smiley */
    const real *logits;
    CHECK_OK(model_open(&m, "models/emoji", NULL));
    CHECK_OK(model_scale(&m, t));
    const size_t K = m.config[t].dec_num_tokens;
    const Params *from = transformer_params(m.net);
    for (int k = 0; k < NETS; k++) {
        CHECK_OK(transformer_create(&net[k], &m.config[t]));
        if (k == GPU) CHECK_OK(transformer_use_cuda(net[k], IS_BF16 ? PRECISION_BF16 : PRECISION_F32));
        if (k == ROUNDED) transformer_params(net[k])->precision = PRECISION_BF16;
        p[k] = transformer_params(net[k]);
        transformer_set_alphas(net[k], m.schedule.alpha);
        CHECK_OK(params_plan(transformer_params(net[k]), PLAN_VALUE | PLAN_GRAD));
        for (size_t r = 0; r < from->n; r++)
            for (size_t i = 0; i < from->row[r].size; i++) {
                const real w = from->row[r].value[i];
                transformer_params(net[k])->row[r].value[i] =
                    IS_BF16 && from->row[r].matrix ? to_float(to_floatX(w)) : w;
            }
        CHECK_OK(params_send(transformer_params(net[k])));
        CHECK_OK(transformer_plan(net[k], B, N, 1));
        params_zero_grad(transformer_params(net[k]));
    }
    example_tokens(&m, x0, B);
    memcpy(x_t, x0, sizeof x0);
    for (int k = 1; k <= t; k++) {
        memcpy(x, x_t, sizeof x);
        noise_step(x_t, B * N, K, (double)m.schedule.beta[k], 1, rng_stream(RNG_TEST, 5, (uint64_t)k), 0);
    }
    real *q = reals(B * N * K), *dlogits = reals(B * N * K);
    for (size_t b = 0; b < B; b++) posterior(q + b * N * K, x0 + b * N, x_t + b * N, N, K, &m.schedule, t);
    for (int k = ROUNDED; k >= F32; k--) {
        CHECK_OK(transformer_forward(net[k], x, x_t, at, label, B, N, &logits));
        CHECK_OK(denoising_loss(&loss, logits, x, q, B * N, K, 0.5, 1, dlogits));
        CHECK_OK(transformer_backward(net[k], dlogits));
    }
    CHECK_OK(transformer_loss_cuda(net[GPU], &m.schedule, x0, x, x_t, at, label, B, N, 0.5, 1, 1, &fused));
    CHECK(fabs(fused.loss - loss.loss) <= TOLERANCE * loss.loss);
    CHECK_OK(params_fetch(transformer_params(net[GPU])));
    if (IS_BF16) {
        const double off = distance(p[GPU], p[F32]), rounding = distance(p[ROUNDED], p[F32]);
        if (!CHECK(rounding <= 3e-2 * distance(p[F32], NULL) && off <= 1.5 * rounding))
            printf("     bundled %d: off by %.3g of %.3g; rounding %.3g\n", t, off, distance(p[F32], NULL), rounding);
        add_bits(p[GPU]->arena[1], p[GPU]->total * sizeof(real));
    } else
        near_rows("bundled", p[GPU], p[F32], 'g');
    for (int k = 0; k < NETS; k++) transformer_free(net[k]);
    free(q), free(dlogits);
    model_close(&m);
}

/* A few steps of training: losses and what they leave. */
static void test_training(const NetConfig *c) {
    enum { STEPS = 6 };
    const AdamW o = {3e-3, 0.9, 0.95, 1e-8, 1};
    Pair a;
    pair_make(&a, c, 4, 6, 1);
    for (uint64_t step = 1; step <= STEPS; step++) {
        const real *logits;
        Loss want, got;
        params_zero_grad(transformer_params(a.cpu)), params_zero_grad(transformer_params(a.gpu));
        CHECK_OK(transformer_forward(a.cpu, a.x, a.x_t, a.t, a.label, a.B, a.N, &logits));
        CHECK_OK(denoising_loss(&want, logits, a.x, a.q, a.B * a.N, a.K, 0.5, 1, a.dlogits));
        CHECK_OK(transformer_backward(a.cpu, a.dlogits));
        CHECK_OK(transformer_loss_cuda(a.gpu, &a.schedule, a.x0, a.x, a.x_t, a.t, a.label, a.B, a.N, 0.5, 1, 1, &got));
        CHECK(fabs(got.loss - want.loss) <= TOLERANCE * want.loss);
        const double norm = params_grad_norm(transformer_params(a.cpu));
        CHECK(fabs(params_grad_norm(transformer_params(a.gpu)) - norm) <= (IS_BF16 ? 5e-2 : TOLERANCE) * norm);
        adamw_ema_step(transformer_params(a.cpu), &o, step, 0.9, step),
            adamw_ema_step(transformer_params(a.gpu), &o, step, 0.9, step);
    }
    CHECK_OK(params_fetch(transformer_params(a.gpu)));
    near_rows("trained", transformer_params(a.gpu), transformer_params(a.cpu), 'v');
    near_rows("trained", transformer_params(a.gpu), transformer_params(a.cpu), 'e');
    pair_free(&a);
}

/* ---- Decoding ---- */

/* Logits of every step, given the tokens. */
static void test_decoding(const char *what, const NetConfig *c, size_t B, size_t N) {
    Pair a;
    pair_make(&a, c, B, N, 0);
    CHECK_OK(transformer_decode_begin(a.cpu, a.x_t, a.t, a.label, B, N));
    CHECK_OK(transformer_decode_begin(a.gpu, a.x_t, a.t, a.label, B, N));
    for (size_t i = 0; i < N; i++) {
        int32_t prev[B_MAX] = {0};
        const real *want, *got;
        for (size_t b = 0; i > 0 && b < B; b++) prev[b] = a.x[b * N + i - 1];
        CHECK_OK(transformer_decode_step(a.cpu, prev, i, &want));
        CHECK_OK(transformer_decode_step(a.gpu, prev, i, &got));
        add_bits(got, B * a.K * sizeof *got);
        CHECK_NEAR(what, got, want, B * a.K, 0, TOLERANCE);
    }
    const real *whole, *got;
    CHECK_OK(transformer_forward(a.cpu, a.x, a.x_t, a.t, a.label, B, N, &whole)); /* the plan serves this too */
    CHECK_OK(transformer_forward(a.gpu, a.x, a.x_t, a.t, a.label, B, N, &got));
    add_bits(got, B * N * a.K * sizeof *got);
    CHECK_NEAR(what, got, whole, B * N * a.K, 0, TOLERANCE);
    pair_free(&a);
}

/* Logits (N,B,K) of rows `first` to first+B-1 on the GPU, given the tokens */
static real *decoded(Pair *a, size_t first, size_t B) {
    real *all = reals(a->N * B * a->K);
    CHECK_OK(transformer_decode_begin(a->gpu, a->x_t + first * a->N, a->t + first, a->label + first, B, a->N));
    for (size_t i = 0; i < a->N; i++) {
        int32_t prev[B_MAX] = {0};
        const real *got = NULL;
        for (size_t b = 0; i > 0 && b < B; b++) prev[b] = a->x[(first + b) * a->N + i - 1];
        CHECK_OK(transformer_decode_step(a->gpu, prev, i, &got));
        memcpy(all + i * B * a->K, got, B * a->K * sizeof *all);
    }
    return all;
}

/* Every row moves to the next one's place, the last to the first. */
static void turn_batch(Pair *a) {
    int32_t *const all[] = {a->x, a->x_t, a->t, a->label};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        const size_t n = i < 2 ? a->N : 1, last = (a->B - 1) * n;
        int32_t kept[N_MAX];
        memcpy(kept, all[i] + last, n * sizeof *kept);
        memmove(all[i] + n, all[i], last * sizeof *kept);
        memcpy(all[i], kept, n * sizeof *kept);
    }
}

/* The same bits with fewer blocks, and of a row elsewhere in the batch; and alone, where no product is cuBLASLt's, whose
 * sums are of another order for another number of rows: GPT's, whose prompt is one token. */
static void test_decoded_bits(const NetConfig *c, size_t B, size_t N) {
    Pair a;
    pair_make(&a, c, B, N, 0);
    const size_t n = B * a.K;
    real *want = decoded(&a, 0, B);
    add_bits(want, N * n * sizeof *want);
#ifdef CUDA_ON_CPU
    cuda_on_cpu_clusters = 1;
    real *other = decoded(&a, 0, B);
    cuda_on_cpu_clusters = 2;
    CHECK(memcmp(want, other, N * n * sizeof *want) == 0);
    free(other);
#endif
    for (size_t b = 0; b < B && c->kind == NET_GPT; b += B - 1) {
        real *row = decoded(&a, b, 1);
        for (size_t i = 0; i < N; i++) CHECK(memcmp(want + i * n + b * a.K, row + i * a.K, a.K * sizeof *want) == 0);
        free(row);
    }
    turn_batch(&a);
    real *turned = decoded(&a, 0, B);
    for (size_t i = 0; i < N; i++)
        CHECK(memcmp(want + i * n, turned + i * n + a.K, (n - a.K) * sizeof *want) == 0 &&
              memcmp(want + (i + 1) * n - a.K, turned + i * n, a.K * sizeof *want) == 0);
    free(turned);
    free(want);
    pair_free(&a);
}

static int count_reports(void *context, size_t done) {
    return ++*(int *)context == 3 || done > 1000;
}

/* The same tokens as the CPU's steps, sample_probs and sample_pick. In bf16 logits differ, so only what must hold is
 * asked: forced tokens are in their places, others follow from the device's own logits. */
static void test_drawing(const NetConfig *c, size_t B, size_t N, double temperature, size_t top_k, int guided,
                         double guidance) {
    int32_t known[B_MAX * N_MAX], got[B_MAX * N_MAX], want[B_MAX * N_MAX];
    uint8_t keep[N_MAX];
    uint64_t stream[B_MAX];
    const size_t n = guidance != 1 ? B / 2 : B; /* samples: guided, each is two rows */
    double fit[B_MAX] = {0}, want_fit[B_MAX] = {0};
    real *prob = reals(64), *mixed = reals(64);
    Pair a;
    pair_make(&a, c, B, N, 0);
    for (size_t i = 0; i < n * N; i++) known[i] = (int32_t)rng_below(2, 2, i, (uint32_t)a.K);
    for (size_t i = 0; i < N; i++) keep[i] = i % 3 == 1;
    for (size_t b = 0; b < n; b++) stream[b] = rng_stream(RNG_TEST, 77, b);
    DrawOptions o = {
        99,   stream, temperature,   top_k,   guided ? known : NULL, guided ? keep : NULL, guided ? fit : NULL,
        NULL, NULL,   guidance != 1, guidance};
    CHECK_OK(transformer_decode_begin(a.gpu, a.x_t, a.t, a.label, B, N));
    CHECK_OK(transformer_draw_cuda(a.gpu, &o, got));
    Transformer *steps = IS_BF16 ? a.gpu : a.cpu; /* whose logits are drawn from */
    CHECK_OK(transformer_decode_begin(steps, a.x_t, a.t, a.label, B, N));
    for (size_t i = 0; i < N; i++) {
        int32_t prev[B_MAX] = {0};
        const real *logits;
        for (size_t b = 0; i > 0 && b < B; b++) prev[b] = want[b % n * N + i - 1];
        CHECK_OK(transformer_decode_step(steps, prev, i, &logits));
        for (size_t b = 0; b < n; b++) {
            for (size_t k = 0; k < a.K; k++) {
                const real uncond = logits[(B - n + b) * a.K + k];
                mixed[k] = guidance != 1 ? uncond + (real)guidance * (logits[b * a.K + k] - uncond) : uncond;
            }
            const int32_t guide = guided && keep[i] ? known[b * N + i] : -1;
            sample_probs(prob, mixed, a.K, -1, 1, 0);
            if (guide >= 0) want_fit[b] += log((double)prob[guide]);
            sample_probs(prob, mixed, a.K, guide, temperature, top_k);
            want[b * N + i] = sample_pick(prob, a.K, rng_uniform(99, stream[b], i));
        }
    }
    add_bits(got, n * N * sizeof *got), add_bits(fit, sizeof fit);
    CHECK(memcmp(got, want, n * N * sizeof *got) == 0);
    for (size_t b = 0; b < n; b++) CHECK(fabs(fit[b] - want_fit[b]) <= 1e-4 * fabs(want_fit[b]));
    free(prob), free(mixed);
    pair_free(&a);
}

/* What is drawn from rows of logits, beside sample_probs and sample_pick; ties, infinities, NaN. */
static void test_pick(size_t K, double temperature, size_t top_k) {
    enum { ROWS = 10, N = 2 };
    real *logits = random_reals(ROWS * K, 1, 3), *prob = reals(K);
    int32_t got[ROWS * N];
    uint64_t stream[ROWS];
    for (size_t b = 0; b < ROWS; b++) stream[b] = rng_stream(RNG_TEST, 78, b);
    for (size_t k = 0; k < K; k++) {
        logits[0 * K + k] = k % 5 ? 1 : 2;               /* ties */
        logits[1 * K + k] = k % 2 ? -(real)HUGE_VAL : 1; /* impossible tokens */
        logits[2 * K + k] = -(real)HUGE_VAL;             /* nothing possible */
        logits[4 * K + k] = k % 3 ? 0 : -(real)0.0;      /* both zeros */
        logits[6 * K + k] = k % 7 == 3 ? 2 : 1;          /* ties, the first not in the first thread */
    }
    logits[3 * K + K / 2] = (real)NAN, logits[5 * K + K - 1] = (real)HUGE_VAL;
    const DrawHow how = {42, temperature, top_k, 0, 0, 0, 0};
    int at[ROWS];
    for (int &one : at) one = 1;
    DrawStep a;
    NextStep next;
    memset(&a, 0, sizeof a), memset(&next, 0, sizeof next);
    next.pos = (int *)on_device(sizeof at);
    DrawHow *ghow = (DrawHow *)on_device(sizeof how);
    uint64_t *gstream = (uint64_t *)on_device(sizeof stream);
    a.logits = send(logits, ROWS * K), a.K = (int)K, a.N = N, a.how = ghow, a.stream = gstream, a.samples = ROWS;
    a.tokens = (int32_t *)on_device(sizeof got), a.ids = (int32_t *)on_device(ROWS * sizeof *a.ids);
    CHECK_OK(to_device(device, ghow, &how, sizeof how));
    CHECK_OK(to_device(device, gstream, stream, sizeof stream));
    CHECK_OK(to_device(device, next.pos, at, sizeof at));
    CHECK_OK(device_zero(device, a.tokens, sizeof got)); /* of which the kernel writes the second of a row */
    CHECK_OK(launch_draw(device, &a, &next));
    CHECK_OK(to_host(device, got, a.tokens, sizeof got));
    add_bits(got, sizeof got);
    for (size_t b = 0; b < ROWS; b++) {
        sample_probs(prob, logits + b * K, K, -1, temperature, top_k);
        const int32_t want = sample_pick(prob, K, rng_uniform(42, stream[b], 1));
        if (!CHECK(got[b * N + 1] == want))
            printf("     row %zu of %zu: %d, expected %d\n", b, K, (int)got[b * N + 1], (int)want);
    }
    free(logits), free(prob);
    free_arrays();
}

static int steps_here(void) {
    const size_t shared = 100 << 10;
    return IS_BF16 && most_shared() >= shared && most_clusters(step_kernel, CLUSTER, STEP_THREADS, shared) > 0;
}

/* Whether the step kernel serves an official model's scale: nobody must notice only by the time that it takes. */
static void test_step_fits(void) {
    Decoder s;
    Step p;
    memset(&s, 0, sizeof s);
    s.n_layers = 18, s.B = 8, s.N = s.T = s.T_context = 256, s.C = 752, s.K = 548, s.heads = 16, s.D = 64;
    const int can = steps_here();
    CHECK(step_fits(&p, &s) == can);
    s.C = 800, s.D = 50, s.n_layers = 52, s.T_context = 0;
    CHECK(step_fits(&p, &s) == can);
    s.C = 1216, s.D = 76, s.K = 8192, s.n_layers = 72;
    CHECK(step_fits(&p, &s) == can);
    s.D = 75;
    CHECK(!step_fits(&p, &s));
}

/* A plan's memory is enough for every smaller batch, also where the step kernel only just fits, or does not. */
static void test_step_memory(void) {
    Decoder s;
    memset(&s, 0, sizeof s);
    s.n_layers = 18, s.prompt = 1, s.N = s.T = s.T_context = 256, s.K = 548, s.heads = 16;
    for (s.D = 8; s.D <= GPU_HEAD_MAX; s.D += 2) {
        size_t most = 0;
        s.C = s.heads * s.D;
        for (s.B = 1; s.B <= 2 * STEP_ROWS; s.B++) {
            const size_t needs = decode_needs_gpu(&s);
            CHECK(needs >= most);
            most = needs;
        }
    }
}

/* Rows long enough that warps share a tile, more parts than clusters, wide heads */
static void test_wide_decoding(void) {
    NetConfig c = x_small;
    c.dim = 264, shaking = 0.05;
    test_decoding("decoding, wide", &c, 2, 4);
    test_decoded_bits(&c, 3, 2);
    c = gpt_small;
    c.dim = 264;
    test_decoding("decoding, wide gpt", &c, 3, 4);
    test_decoded_bits(&c, 3, 2);
    shaking = 0.15;
}

/* What any kernels serve */
static void test_decodings(void) {
    NetConfig c = x_small;
    test_decoded_bits(&c, 8, 5);
    c.variant = X_FINE_SCALED;
    test_decoding("decoding", &c, 3, 7);
    test_drawing(&c, 3, 7, 1, 0, 0, 1);
    c = gpt_small;
    test_decoded_bits(&c, 8, 5);
    test_decoding("decoding, gpt", &c, 2, 40);
    test_drawing(&c, 2, 40, 1.2, 0, 1, 1);
    test_drawing(&c, 2, 40, 1.2, 0, 0, 0);
    c.has_class = 1, c.n_unmasked = 2;
    test_drawing(&c, 1, 6, 0, 0, 0, 1);
    test_drawing(&c, 6, 6, 1, 0, 0, 3);
    test_wide_decoding();
}

/* What the step kernel leaves to others: more rows than it has, and draws alone */
static void test_large_decodings(void) {
    NetConfig c = x_small;
    c.variant = X_RESIDUAL_SCALED, c.has_class = 1;
    test_decoding("decoding a large batch", &c, 12, 5);
    test_drawing(&c, 12, 5, 0.8, 3, 1, 1);
    test_drawing(&c, 12, 5, 0.8, 3, 1, 2.5);
    c = gpt_small, c.has_class = 1, c.n_unmasked = 2;
    test_decoding("decoding, gpt with class", &c, 12, 6);
    for (size_t K = 1; K < 3000; K = K * 3 + 1) {
        test_pick(K, 1, 0), test_pick(K, 0.7, 2), test_pick(K, 1.3, K / 2), test_pick(K, 0, 0);
    }
}

#ifdef CUDA_ON_CPU
/* Heads that a block's shared memory is too small for are refused when it is planned. */
static void test_wide_heads(int fit) {
    for (int heads = 2; heads > 0; heads--) {
        NetConfig c = gpt_small;
        Schedule s;
        Transformer *net;
        c.dim = heads == 2 ? 2 * 76 : 128, c.dec_heads = heads;
        CHECK_OK(schedule_make(&s, "geometric", c.n_scales));
        network_make(&net, &c, &s, 1);
        if (fit || (!IS_BF16 && heads == 2))
            CHECK_OK(transformer_plan(net, 2, 8, 1));
        else
            CHECK_ERR(transformer_plan(net, 2, 8, 1), "channels takes");
        CHECK_OK(transformer_plan(net, 2, 8, 0));
        transformer_free(net);
    }
}
#endif

static void test_refusals(void) {
    NetConfig c = x_small;
    Pair a;
    Loss loss;
    int reports = 0;
    int32_t tokens[B_MAX * N_MAX];
    uint64_t stream[B_MAX] = {0};
    DrawOptions o = {1, stream, 1, 0, NULL, NULL, NULL, count_reports, &reports, 0, 0};
    pair_make(&a, &c, 2, 70, 0);
    CHECK_ERR(transformer_loss_cuda(a.gpu, &a.schedule, a.x0, a.x, a.x_t, a.t, a.label, 2, 70, 0, 1, 1, &loss),
              "without training");
    CHECK_ERR(transformer_loss_cuda(a.cpu, &a.schedule, a.x0, a.x, a.x_t, a.t, a.label, 2, 70, 0, 1, 0, &loss),
              "not on the GPU");
    CHECK_ERR(transformer_draw_cuda(a.gpu, &o, tokens), "begun");
    CHECK_OK(transformer_decode_begin(a.gpu, a.x_t, a.t, a.label, 1, 70));
    o.guided = 1;
    CHECK_ERR(transformer_draw_cuda(a.gpu, &o, tokens), "expected pairs");
    o.guided = 0;
    CHECK_OK(transformer_decode_begin(a.gpu, a.x_t, a.t, a.label, 2, 70));
    CHECK_ERR(transformer_draw_cuda(a.gpu, &o, tokens), "stopped");
    CHECK(reports == 3);
    a.x0[3] = 9;
    CHECK_OK(transformer_plan(a.gpu, 2, 70, 1));
    CHECK_ERR(transformer_loss_cuda(a.gpu, &a.schedule, a.x0, a.x, a.x_t, a.t, a.label, 2, 70, 0, 1, 1, &loss),
              "x_0[3] is 9");
    CHECK_ERR(transformer_use_cuda(a.gpu, IS_BF16 ? PRECISION_BF16 : PRECISION_F32), "already");
    CHECK_ERR(transformer_use_cuda(a.cpu, IS_BF16 ? PRECISION_F32 : PRECISION_BF16), "precision");
    pair_free(&a);
#ifdef CUDA_ON_CPU
    cuda_on_cpu_shared = 99 << 10; /* as of compute capability 8.6, 8.9 and 12.0 */
    test_wide_heads(1);
    cuda_on_cpu_shared = 60 << 10;
    test_wide_heads(0);
    cuda_on_cpu_shared = 227 << 10;
#endif
}

/* ---- The emulation itself ---- */

#ifdef CUDA_ON_CPU
#include <sys/wait.h>

enum { HONEST, NO_BARRIER, TWO_BARRIERS, LEAVES, LANE_LEAVES, OVERRUN };
static __global__ void faulty_kernel(int *out, int fault) {
    SHARED(int, x);
    const int i = (int)threadIdx.x, n = (int)blockDim.x;
    if (fault == LEAVES && i == 3) return;
    x[i + (fault == OVERRUN ? n : 0)] = i;
    if (fault == TWO_BARRIERS && i == 5)
        __syncthreads();
    else if (fault != NO_BARRIER)
        __syncthreads();
    int sum = x[(i + 1) % n];
    if (fault == LANE_LEAVES && i == 3) return;
    for (int k = WARP / 2; k; k /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, k);
    const unsigned odd = __ballot_sync(0xffffffffu, i & 1);
    out[blockIdx.x * n + i] = sum + (odd == 0xaaaaaaaau ? 0 : 1000000);
}

static int run_faulty(int *out, int fault) {
    LAUNCH(device, faulty_kernel, 2, 64, 64 * sizeof(int), out, fault);
    return OK;
}

static void test_emulation(void) {
    int out[128];
    for (int order = 0; order < 2; order++) {
        reverse(order);
        run_faulty(out, HONEST);
        for (int i = 0; i < 128; i++) CHECK(out[i] == (i % 64 < 32 ? 32 * 33 / 2 : 32 * 33 / 2 + 32 * 32 - 64));
        run_faulty(out, NO_BARRIER);
        CHECK(out[0] != 32 * 33 / 2 || out[32] != 32 * 33 / 2 + 32 * 32 - 64);
    }
    reverse(0);
    for (int fault = TWO_BARRIERS; fault <= OVERRUN; fault++) {
        int status = 0;
        fflush(stdout);
        const pid_t child = fork();
        if (child == 0) {
            if (!freopen("/dev/null", "w", stderr)) _exit(0);
            run_faulty(out, fault);
            _exit(0);
        }
        CHECK(waitpid(child, &status, 0) == child && !(WIFEXITED(status) && WEXITSTATUS(status) == 0));
    }
}
#endif

/* test_cuda_bf16 decoding: that alone */
/* ---- Sections ---- */

static void test_layers(void) {
    seam(0, 0); /* so that needs can be asked for */
    test_gelu(3, 5, 1);
    test_gelu(1, 1, 0);
    test_gelu(7, 300, 1);
    test_gelu(1, 4097, 0);
    for (int dy_f32 = 0; dy_f32 < 2; dy_f32++) {
        test_norm(1, 1, 0, 1, dy_f32);
        test_norm(3, 50, 0, 33, dy_f32);
        test_norm(2, 9, 1, 70, dy_f32);
        test_norm(3, 5, 2, 7, dy_f32);
        test_norm(2, 70, 1, 300, dy_f32);
        test_norm(1, 7, 0, 1050, dy_f32);
    }
    for (int order = first_order(); order < 2; order = next_order(order)) {
        test_ones(257), test_ones(514), test_ones(1028), test_ones(4112);
        test_linear(1, 1, 1, 1);
        test_linear(5, 7, 3, 0);
        test_linear(140, 40, 33, 1);
        test_linear(9, 5, 36, 1);
    }
    test_embedding(3, 7, 40);
    test_embedding(1, 1, 5);
    for (int scaled = 0; scaled < 3; scaled++) test_variant(3, 7, 11, scaled, 0), test_variant(4, 5, 40, scaled, 1);
}

static void test_attentions(void) {
    test_attention(2, 2, 5, 7, 7, 0, 0);
    test_attention(1, 3, 50, 69, 69, 1, 0);
    test_attention(2, 1, 64, 65, 130, 0, 0);
    test_attention(1, 2, 16, 70, 70, 1, 2);
    test_attention(1, 1, 72, 70, 70, 1, 66);
    test_attention(2, 1, 128, 1, 3, 0, 0);
    test_attention(1, 8, 50, 69, 133, 0, 0); /* heads begin at every even place among 8 */
    test_attention(2, 8, 19, 70, 70, 1, 0);  /* and at every place */
    test_attention(1, 4, 62, 65, 66, 0, 0);  /* a window wider than 64 */
    test_attention(1, 8, 126, 9, 20, 0, 0);  /* and one wider than 128 */
    test_attention(1, 2, 50, 70, 400, 0, 0); /* more keys than are on their way at once */
    test_attention(1, 1, 64, 400, 400, 1, 0);
    test_attention(1, 4, 50, 330, 330, 1, 130); /* and queries, with strangers */
    test_attention_shapes();
    for (int order = first_order(); order < 2; order = next_order(order)) {
        test_attention_decoding(2, 3, 50, 4, 1, 9);
        test_attention_decoding(3, 1, 64, 0, 2, 5);
        test_attention_decoding(1, 2, 128, 200, 1, 258);
        test_attention_decoding(1, 2, 64, 256, 1, 257);
        test_attention_decoding(1, 1, 50, 255, 2, 257);
        test_attention_decoding(2, 1, 15, 30, 1, 40);
        test_attention_decoding(1, 2, 121, 0, 1, 3);
        test_attention_decoding(2, 8, 50, 5, 3, 9);
        test_attention_decoding(2, 8, 19, 5, 1, 9);
    }
}

static void test_all_updates(void) {
    for (int order = first_order(); order < 2; order = next_order(order)) {
        test_updates();
        test_bf16_moments();
    }
}

static void test_bundled_scales(void) {
    for (int t = 1; t <= 3; t++) test_bundled(t);
}

static void test_trainings(void) {
    for (int order = first_order(); order < 2; order = next_order(order)) {
        test_training(&x_small);
        test_training(&gpt_small);
    }
}

/* By the kernels that serve all GPUs and batches, and by the step kernel where it is */
static void test_kernel_decodings(void) {
    decode_by_kernels = 1;
    for (int order = first_order(); order < 2; order = next_order(order)) test_decodings(), test_large_decodings();
    decode_by_kernels = 0;
}

static void test_step_decodings(void) {
    test_step_fits();
    test_step_memory();
    for (int order = first_order(); order < 2 && steps_here(); order = next_order(order)) test_decodings();
}

static const Section sections[] = {
#ifdef CUDA_ON_CPU
    {"emulation", test_emulation},
#endif
    {"layers", test_layers},
    {"attention", test_attentions},
    {"updates", test_all_updates},
    {"networks", test_networks},
    {"bundled", test_bundled_scales},
    {"training", test_trainings},
    {"decoding", test_kernel_decodings},
    {"steps", test_step_decodings},
    {"refusals", test_refusals},
};

int main(int argc, char **argv) {
    return run_sections(argc, argv, sections, sizeof sections / sizeof *sections);
}
