/* test_transformer.c - the transition networks, their losses, decoding and the optimizer.
 *
 * The official numbers are compared elsewhere (test/golden.c). Here: every analytic gradient against central
 * differences (double build), decoding with caches against the full forward, closed forms of losses and optimizer,
 * what must not depend on threads, batch or future tokens, and that wrong use is an error. Each kind of check is also
 * shown to fail on a planted fault. */
#include "test.h"
#include "test/inside.h"

enum { B_MAX = 8, N_MAX = 80 };
#ifdef PLAIN
enum { FORMATS = WEIGHTS_REAL + 1 }; /* of matrices */
#else
enum { FORMATS = WEIGHTS_BF16X3 + 1 };
#endif

/* A network with every parameter moved off its initial value, so that no term is hidden by a 0 or a 1. */
typedef struct {
    Transformer *net;
    Params *params;
    size_t B, N, K, P;
    int32_t x[B_MAX * N_MAX], x_t[B_MAX * N_MAX], t[B_MAX], label[B_MAX];
    real *posterior, *dlogits;
    double alpha, weight;
} Case;

static const NetConfig x_small = {.kind = NET_X,
                                  .n_scales = 3,
                                  .dim = 10,
                                  .enc_num_tokens = 9,
                                  .enc_depth = 1,
                                  .enc_heads = 2,
                                  .enc_max_seq_len = 9,
                                  .dec_num_tokens = 7,
                                  .dec_depth = 2,
                                  .dec_heads = 1,
                                  .dec_max_seq_len = 6};
static const NetConfig gpt_small = {.kind = NET_GPT,
                                    .n_scales = 4,
                                    .dim = 12,
                                    .dec_num_tokens = 7,
                                    .dec_depth = 2,
                                    .dec_heads = 3,
                                    .dec_max_seq_len = 8,
                                    .input_vocab_size = 11};

static void shake(Params *p, double size) {
    for (size_t i = 0; i < p->n; i++)
        for (size_t k = 0; k < p->row[i].size; k++)
            p->row[i].value[k] += (real)(size * rng_normal(5, rng_stream(RNG_TEST, i, 0), k));
}

static int32_t draw(uint64_t stream, size_t i, size_t lo, size_t end) {
    return (int32_t)(lo + rng_below(11, rng_stream(RNG_TEST, stream, 1), i, (uint32_t)(end - lo)));
}

static void case_make(Case *c, const NetConfig *config, size_t B, size_t N) {
    memset(c, 0, sizeof *c);
    c->B = B, c->N = N, c->K = config->dec_num_tokens, c->P = config->has_class ? 2 : 1;
    c->alpha = 0.3, c->weight = 1.7;
    if (!CHECK(transformer_create(&c->net, config) == OK) || B > B_MAX || N > N_MAX) {
        printf("     %s\n", err_text());
        exit(1);
    }
    c->params = transformer_params(c->net);
    CHECK_OK(params_plan(c->params, PLAN_VALUE | PLAN_GRAD | PLAN_ADAM | PLAN_EMA));
    params_init(c->params, 3);
    shake(c->params, 0.15);
    float alpha[MAX_SCALES + 1] = {1, 0.8f, 0.6f, 0.5f, 0.3f};
    transformer_set_alphas(c->net, alpha);
    size_t labels = config->kind == NET_X ? config->enc_num_tokens : config->input_vocab_size;
    for (size_t i = 0; i < B * N; i++) c->x[i] = draw(1, i, 0, c->K), c->x_t[i] = draw(2, i, 0, c->K);
    for (size_t b = 0; b < B; b++) /* every row its own t, and the largest label */
        c->t[b] = (int32_t)(1 + b % (size_t)config->n_scales), c->label[b] = (int32_t)(labels - 1 - b % labels);
    CHECK_OK(mem_alloc(&c->posterior, B * N * c->K, sizeof(real), "posterior"));
    CHECK_OK(mem_alloc(&c->dlogits, B * N * c->K, sizeof(real), "dlogits"));
    for (size_t r = 0; r < B * N; r++) {
        double sum = 0;
        for (size_t k = 0; k < c->K; k++) { /* some entries exactly 0 */
            double u = rng_uniform(13, rng_stream(RNG_TEST, 3, 0), r * c->K + k);
            c->posterior[r * c->K + k] = (real)(u < 0.3 && k ? 0 : u);
            sum += (double)c->posterior[r * c->K + k];
        }
        for (size_t k = 0; k < c->K; k++) c->posterior[r * c->K + k] /= (real)sum;
    }
}

static void case_free(Case *c) {
    transformer_free(c->net);
    free(c->posterior);
    free(c->dlogits);
}

static Err forward(Case *c, const real **logits) {
    return transformer_forward(c->net, c->x, c->x_t, c->t, c->label, c->B, c->N, logits);
}

static void gradients(Case *c) {
    const real *logits;
    Loss loss;
    CHECK_OK(forward(c, &logits));
    CHECK_OK(denoising_loss(&loss, logits, c->x, c->posterior, c->B * c->N, c->K, c->alpha, c->weight, c->dlogits));
    CHECK_OK(transformer_backward(c->net, c->dlogits));
}

/* ---- gradients: double only ---- */

#ifdef REAL_DOUBLE
static double loss_of(void *context) {
    Case *c = (Case *)context;
    const real *logits;
    Loss loss = {NAN, NAN, NAN};
    if (forward(c, &logits) != OK ||
        denoising_loss(&loss, logits, c->x, c->posterior, c->B * c->N, c->K, c->alpha, c->weight, NULL) != OK)
        return NAN;
    return loss.loss * c->weight;
}

static double row_error(Case *c, size_t row, size_t most) {
    Param *p = &c->params->row[row];
    return gradient_error(loss_of, c, p->value, p->grad, p->size, most, 1e-5, 1e-4);
}

static void check_gradients(const char *what, const NetConfig *config, size_t B, size_t N, size_t most) {
    Case c;
    case_make(&c, config, B, N);
    CHECK_OK(transformer_plan(c.net, B, N, 1));
    params_zero_grad(c.params);
    ready_begin(c.params);
    gradients(&c);
    ready_end(c.params);
    double worst = 0;
    for (size_t i = 0; i < c.params->n; i++) {
        double e = row_error(&c, i, most);
        if (!CHECK(e <= 1e-6)) printf("     %s: %s is wrong by %.3g\n", what, c.params->row[i].name, e);
        if (!(e <= worst)) worst = e;
    }
    printf("%-34s %3zu tensors, worst %.1e\n", what, c.params->n, worst);
    case_free(&c);
}

static void test_gradients(void) {
    NetConfig c = x_small;
    check_gradients("plain", &c, 3, 5, 30);
    c.variant = X_SCALED, c.has_class = 1;
    check_gradients("scaled, class", &c, 4, 5, 20);
    c.variant = X_FINE_SCALED, c.has_class = 0, c.tie_token_emb = 1;
    check_gradients("fine-scaled, tied", &c, 4, 5, 20);
    c.variant = X_RESIDUAL, c.has_class = 1;
    check_gradients("residual, class, tied", &c, 2, 6, 20);
    c.variant = X_RESIDUAL_SCALED, c.has_class = 0, c.tie_token_emb = 0;
    check_gradients("residual-scaled", &c, 4, 5, 20);
    c.enc_max_seq_len = 75, c.dec_max_seq_len = 72, c.dec_depth = 1;
    check_gradients("more queries than a block", &c, 2, 69, 4);
    c = gpt_small;
    check_gradients("gpt", &c, 3, 7, 30);
    c.has_class = 1, c.n_unmasked = 2;
    check_gradients("gpt, class, 2 unmasked", &c, 2, 7, 20);
    c.n_unmasked = 5;
    check_gradients("gpt, class, 5 unmasked", &c, 2, 6, 20);
    c.dec_max_seq_len = 72, c.n_unmasked = 66, c.dec_depth = 1;
    check_gradients("gpt, unmasked across blocks", &c, 2, 69, 4);
}

/* The check itself must see a sign, a missing term and a single wrong element. */
static void test_gradient_check_fails(void) {
    Case c;
    case_make(&c, &x_small, 2, 5);
    CHECK_OK(transformer_plan(c.net, 2, 5, 1));
    params_zero_grad(c.params);
    gradients(&c);
    size_t row = 5; /* a projection of the first layer */
    Param *p = &c.params->row[row];
    CHECK(row_error(&c, row, 1000) <= 1e-6);
    p->grad[p->size / 2] *= -1;
    CHECK(row_error(&c, row, 1000) > 1e-6);
    p->grad[p->size / 2] *= -(real)1.00001;
    p->grad[0] += (real)1e-4;
    CHECK(row_error(&c, row, 1000) > 1e-6);
    p->grad[0] = (real)NAN;
    CHECK(!(row_error(&c, row, 1000) <= 1e-6));
    case_free(&c);
}

static double only_loss(void *context) {
    Case *c = (Case *)context;
    Loss loss = {NAN, NAN, NAN};
    denoising_loss(&loss, c->dlogits, c->x, c->posterior, c->B * c->N, c->K, c->alpha, 1, NULL);
    return loss.loss;
}

static void test_loss_gradient(void) {
    static real grad[3 * 5 * 7];
    Case c;
    Loss loss;
    case_make(&c, &x_small, 3, 5);
    size_t n = c.B * c.N * c.K;
    for (size_t i = 0; i < n; i++) c.dlogits[i] = (real)rng_normal(1, 2, i);
    for (c.alpha = 0; c.alpha <= 1; c.alpha += 0.25) {
        CHECK_OK(denoising_loss(&loss, c.dlogits, c.x, c.posterior, c.B * c.N, c.K, c.alpha, 1, grad));
        CHECK(gradient_error(only_loss, &c, c.dlogits, grad, n, n, 1e-5, 1e-4) <= 1e-8);
    }
    case_free(&c);
}
#endif

/* backward adds to what is there, and leaves alone what takes part in nothing. */
static void test_accumulation(void) {
    Case c;
    NetConfig config = x_small;
    config.variant = X_RESIDUAL;
    case_make(&c, &config, 3, 5);
    CHECK_OK(transformer_plan(c.net, 4, 6, 1)); /* planned for more than is used */
    params_zero_grad(c.params);
    gradients(&c);
    size_t untrained = 0;
    for (size_t i = 0; i < c.params->n; i++) {
        Param *p = &c.params->row[i];
        memcpy(p->m, p->grad, p->size * sizeof(real));
        for (size_t k = 0; k < p->size; k++) p->m[k] *= 2;
        untrained += p->untrained != 0;
        for (size_t k = 0; k < p->size && p->untrained; k++)
            if (p->grad[k] != 0) CHECK(!"an untrained tensor has a gradient");
    }
    CHECK(untrained == 3); /* log_scalors, encoder.to_logits.{weight,bias} */
    gradients(&c);
    for (size_t i = 0; i < c.params->n; i++) {
        Param *p = &c.params->row[i];
        CHECK_NEAR(p->name, p->grad, p->m, p->size, 1e-8, 1e-5);
    }
    case_free(&c);
}

/* ---- decoding ---- */

/* Feeds x token by token; logits of all positions into out (B,N,K). */
static Err decode_all(Case *c, real *out) {
    TRY(transformer_decode_begin(c->net, c->x_t, c->t, c->label, c->B, c->N));
    for (size_t i = 0; i < c->N; i++) {
        int32_t prev[B_MAX] = {0};
        const real *logits;
        for (size_t b = 0; b < c->B && i > 0; b++) prev[b] = c->x[b * c->N + i - 1];
        TRY(transformer_decode_step(c->net, prev, i, &logits));
        for (size_t b = 0; b < c->B; b++) memcpy(out + (b * c->N + i) * c->K, logits + b * c->K, c->K * sizeof(real));
    }
    return OK;
}

/* Largest difference between decoding and the full forward, over the largest logit. */
static double decoding_error(const NetConfig *config, size_t B, size_t N, size_t plan_B, size_t plan_N) {
    Case c;
    const real *logits;
    real *full;
    double error = NAN;
    case_make(&c, config, B, N);
    const size_t n = B * N * c.K;
    CHECK_OK(mem_alloc(&full, n, sizeof(real), "logits"));
    CHECK_OK(transformer_plan(c.net, plan_B, plan_N, 0));
    CHECK_OK(decode_all(&c, c.dlogits));
    CHECK_OK(forward(&c, &logits));
    memcpy(full, logits, n * sizeof(real));
    near_reals(c.dlogits, full, n, 0, 1, &error);
    CHECK_OK(transformer_plan(c.net, B, N, 1));
    CHECK_OK(forward(&c, &logits));
    CHECK_NEAR("forward of the two plans", logits, full, n, 0, sizeof(real) == 8 ? 1e-13 : 1e-6);
    free(full);
    case_free(&c);
    return error;
}

static void test_decoding(void) {
    const double tolerance = sizeof(real) == 8 ? 1e-13 : 2e-6;
    NetConfig c = x_small;
    for (int v = X_PLAIN; v <= X_RESIDUAL_SCALED; v++) {
        c.variant = (XVariant)v, c.has_class = v % 2, c.tie_token_emb = v == X_SCALED;
        CHECK(decoding_error(&c, 3, 5, 3, 5) <= tolerance);
        CHECK(decoding_error(&c, 2, 4, 5, 6) <= tolerance); /* caches larger than what is used */
    }
    c.enc_max_seq_len = 75, c.dec_max_seq_len = 72;
    CHECK(decoding_error(&c, 1, 70, 1, 72) <= tolerance);
    c = gpt_small;
    CHECK(decoding_error(&c, 3, 7, 3, 8) <= tolerance);
    CHECK(decoding_error(&c, 1, 1, 1, 1) <= tolerance);
    c.has_class = 1, c.n_unmasked = 2;
    CHECK(decoding_error(&c, 3, 6, 4, 7) <= tolerance);
    c.n_unmasked = 0; /* the official sampler lets the prompt see itself, trained for it or not (SPEC 2.6) */
    CHECK(decoding_error(&c, 3, 6, 3, 6) > 1e-4);
}

/* Feeds x in blocks of n positions of every row; logits of all into out (B,N,K). */
static Err decode_in_blocks(Case *c, size_t n, real *out) {
    TRY(transformer_decode_begin(c->net, c->x_t, c->t, c->label, c->B, c->N));
    for (size_t i = 0; i < c->N; i += n) {
        DecodePosition cell[B_MAX * N_MAX];
        const real *logits;
        size_t cells = 0;
        for (size_t b = 0; b < c->B; b++)
            for (size_t k = i; k < c->N && k < i + n; k++)
                cell[cells++] = (DecodePosition){b, k, k > 0 ? c->x[b * c->N + k - 1] : 0};
        TRY(transformer_decode_block(c->net, cell, cells, &logits));
        for (size_t r = 0; r < cells; r++)
            memcpy(out + (cell[r].b * c->N + cell[r].i) * c->K, logits + r * c->K, c->K * sizeof(real));
    }
    return OK;
}

/* Every row at its own pace, in blocks of its own length, with a wrong token in some of them: what comes behind it is
 * thrown away and fed again. */
static Err decode_with_mistakes(Case *c, uint64_t seed, real *out) {
    size_t at[B_MAX] = {0}, cells = 1;
    TRY(transformer_decode_begin(c->net, c->x_t, c->t, c->label, c->B, c->N));
    for (size_t pass = 0; cells > 0; pass++) {
        DecodePosition cell[B_MAX * N_MAX];
        const real *logits;
        size_t good[B_MAX * N_MAX];
        cells = 0;
        for (size_t b = 0; b < c->B; b++) {
            const uint64_t stream = rng_stream(RNG_TEST, seed, b);
            const size_t n = 1 + rng_below(seed, stream, 2 * pass, 4), wrong = rng_below(seed, stream, 2 * pass + 1, 6);
            const size_t from = at[b];
            for (size_t k = 0; k < n && from + k < c->N; k++) {
                const size_t i = from + k;
                int32_t prev = i > 0 ? c->x[b * c->N + i - 1] : 0;
                if (k > 0 && k >= wrong) prev = (prev + 1 + (int32_t)(pass % (c->K - 1))) % (int32_t)c->K;
                good[cells] = k == 0 || k < wrong;
                at[b] += good[cells];
                cell[cells++] = (DecodePosition){b, i, prev};
            }
        }
        if (cells > 0) TRY(transformer_decode_block(c->net, cell, cells, &logits));
        for (size_t r = 0; r < cells; r++)
            if (good[r]) memcpy(out + (cell[r].b * c->N + cell[r].i) * c->K, logits + r * c->K, c->K * sizeof(real));
    }
    return OK;
}

/* The logits of blocks have the bits of single steps. */
static void check_blocks(const NetConfig *config, size_t B, size_t N, WeightFormat format) {
    Case c;
    real *got;
    case_make(&c, config, B, N);
    const size_t n = B * N * c.K;
    CHECK_OK(mem_alloc(&got, n, sizeof(real), "logits"));
    if (format != WEIGHTS_REAL) CHECK_OK(params_pack(c.params, format));
    CHECK_OK(transformer_plan(c.net, B + 1, N, 0));
    CHECK_OK(decode_all(&c, c.dlogits));
    for (size_t length = 1; length <= N && length <= DECODE_BLOCK; length++) {
        memset(got, 0, n * sizeof *got);
        CHECK_OK(decode_in_blocks(&c, length, got));
        CHECK(!memcmp(got, c.dlogits, n * sizeof *got));
    }
    for (uint64_t seed = 0; seed < 20; seed++) {
        memset(got, 0, n * sizeof *got);
        CHECK_OK(decode_with_mistakes(&c, seed, got));
        CHECK(!memcmp(got, c.dlogits, n * sizeof *got));
    }
    c.x[0] = (c.x[0] + 1) % (int32_t)c.K; /* the comparison can fail */
    CHECK_OK(decode_in_blocks(&c, N < DECODE_BLOCK ? N : DECODE_BLOCK, got));
    CHECK((memcmp(got, c.dlogits, n * sizeof *got) != 0) == (N > 1));
    free(got);
    case_free(&c);
}

static void test_blocks(void) {
    NetConfig c = x_small;
    for (int v = X_PLAIN; v <= X_RESIDUAL_SCALED; v++) {
        c.variant = (XVariant)v, c.has_class = v % 2, c.tie_token_emb = v == X_SCALED;
        check_blocks(&c, 3, 6, (WeightFormat)(v % FORMATS));
        check_blocks(&c, 1, 5, WEIGHTS_REAL);
    }
    c.enc_max_seq_len = 75, c.dec_max_seq_len = 72, c.dim = 70, c.dec_heads = 2;
    check_blocks(&c, 2, 70, WEIGHTS_REAL);
    c = gpt_small;
    check_blocks(&c, 4, 7, WEIGHTS_REAL);
    check_blocks(&c, 2, 1, WEIGHTS_REAL);
    c.has_class = 1, c.n_unmasked = 2;
    for (int format = 0; format < FORMATS; format++) check_blocks(&c, 3, 6, (WeightFormat)format);
}

/* What a pass reads: 4, 2, 1 bytes for a number, twice the keys and values for twice the positions. */
static void test_reads(void) {
    NetConfig c = x_small;
    Transformer *net;
    c.dim = 512, c.dec_depth = 4;
    CHECK_OK(transformer_create(&net, &c));
    DecodeReads r = transformer_decode_reads(net, 5), more = transformer_decode_reads(net, 10);
    CHECK(r.numbers > 0 && r.weight_bytes == sizeof(real) * r.numbers);
    CHECK(r.kept_bytes > 0 && more.kept_bytes == 2 * r.kept_bytes && more.weight_bytes == r.weight_bytes);
    CHECK_OK(params_plan(transformer_params(net), PLAN_VALUE));
#ifndef PLAIN
    CHECK_OK(params_pack(transformer_params(net), WEIGHTS_BF16));
    more = transformer_decode_reads(net, 5);
    CHECK(more.numbers == r.numbers && more.weight_bytes == 2 * r.numbers);
#endif
    transformer_free(net);
}

#ifndef PLAIN
/* Logits (B,N,K) of decoding and of a whole forward. */
static void logits_both_ways(Case *c, real *decoded, real *whole) {
    const real *logits;
    CHECK_OK(transformer_plan(c->net, c->B, c->N, 0));
    CHECK_OK(decode_all(c, decoded));
    CHECK_OK(forward(c, &logits));
    memcpy(whole, logits, c->B * c->N * c->K * sizeof(real));
}

/* Every matrix in place becomes what its packed form says: its products with rows that are 1 at one k. */
static void unpack_matrices(Params *p) {
    for (size_t i = 0; i < p->n; i++) {
        Param *row = &p->row[i];
        if (!row->matrix) continue;
        const size_t out = row->dim[0], in = row->dim[1];
        real *one, *column;
        void *work;
        CHECK_OK(mem_alloc(&one, in, sizeof *one, "a row"));
        CHECK_OK(mem_alloc(&column, out, sizeof *column, "a column"));
        CHECK_OK(mem_alloc(&work, gemm_stream_work(1, in), 1, "work space"));
        for (size_t k = 0; k < in; k++) {
            one[k] = 1;
            gemm_stream(1, out, in, one, in, &row->packed, 0, column, out, work);
            for (size_t j = 0; j < out; j++) row->value[j * in + k] = column[j];
            one[k] = 0;
        }
        row->packed.data = NULL;
        free(one);
        free(column);
        free(work);
    }
    p->format = WEIGHTS_REAL;
}

/* With packed matrices the network computes what it does with the numbers they stand for, except that activations and
 * kept keys and values are rounded to bf16; decoding equals a whole forward bit for bit. How far the logits are from
 * those of the full weights is printed. */
static void test_packed(void) {
    static const char *const names[] = {"f32", "bf16", "int8"};
    static const double bounds[] = {0, 0.02, 0.05};
    const NetConfig *const configs[] = {&x_small, &gpt_small};
    for (size_t net = 0; net < 2; net++)
        for (int format = WEIGHTS_BF16; format <= WEIGHTS_INT8; format++) { /* which have the same bits both ways */
            Case c;
            real *out;
            const real *logits;
            double packing, rounding;
            case_make(&c, configs[net], 3, 6);
            const size_t n = c.B * c.N * c.K;
            CHECK_OK(mem_alloc(&out, 6 * n, sizeof *out, "logits"));
            logits_both_ways(&c, out, out + n);
            CHECK_OK(params_pack(c.params, (WeightFormat)format));
            CHECK_ERR(params_pack(c.params, (WeightFormat)format), "packed already");
            CHECK_ERR(forward(&c, &logits), "planned for matrices in another format");
            logits_both_ways(&c, out + 2 * n, out + 3 * n);
            CHECK(!memcmp(out + 2 * n, out + 3 * n, n * sizeof *out));
            unpack_matrices(c.params);
            logits_both_ways(&c, out + 4 * n, out + 5 * n);
            near_reals(out + 2 * n, out + 4 * n, n, 0, 1, &rounding);
            CHECK(rounding > 1e-5 && rounding <= bounds[WEIGHTS_BF16]); /* 2^-8 a number at most, in each layer */
            near_reals(out + 2 * n, out, n, 0, 1, &packing);
            CHECK(packing > 1e-5 && packing <= bounds[format]);
            printf("%s, %s matrices: logits are off by %.1e of the largest, by %.1e from rounded activations alone\n",
                   net ? "gpt" : "encoder-decoder", names[format], packing, rounding);
            free(out);
            case_free(&c);
        }
}
#endif

/* Logits at i depend on x before i only, on all of x_t, and not on the other rows of the batch. */
static void test_dependence(void) {
    for (int gpt = 0; gpt < 2; gpt++) {
        Case c;
        const real *logits;
        const size_t B = 3, N = 6, at = 3;
        case_make(&c, gpt ? &gpt_small : &x_small, B, N);
        size_t row = N * c.K;
        CHECK_OK(transformer_plan(c.net, B, N, 0));
        CHECK_OK(forward(&c, &logits));
        memcpy(c.dlogits, logits, B * row * sizeof(real));
        c.x[N + at] = (c.x[N + at] + 1) % (int32_t)c.K; /* row 1 */
        CHECK_OK(forward(&c, &logits));
        CHECK(!memcmp(logits, c.dlogits, row * sizeof(real)));
        CHECK(!memcmp(logits + 2 * row, c.dlogits + 2 * row, row * sizeof(real)));
        CHECK(!memcmp(logits + row, c.dlogits + row, (at + 1) * c.K * sizeof(real)));
        for (size_t i = at + 1; i < N; i++)
            CHECK(memcmp(logits + row + i * c.K, c.dlogits + row + i * c.K, c.K * sizeof(real)));
        memcpy(c.dlogits, logits, B * row * sizeof(real));
        c.x_t[2 * N + N - 1] = (c.x_t[2 * N + N - 1] + 1) % (int32_t)c.K;
        CHECK_OK(forward(&c, &logits));
        for (size_t i = 0; i < N; i++) /* a GPT does not read x_t at all */
            CHECK((memcmp(logits + 2 * row + i * c.K, c.dlogits + 2 * row + i * c.K, c.K * sizeof(real)) == 0) == gpt);
        memcpy(c.dlogits, logits, B * row * sizeof(real));
        for (size_t b = 0; b < B; b++) c.t[b] = 1 + c.t[b] % 3;
        CHECK_OK(forward(&c, &logits));
        CHECK(memcmp(logits, c.dlogits, row * sizeof(real)));
        case_free(&c);
    }
}

/* The residual is log(alpha [k = x_t] + (1-alpha)/K): with a zeroed head nothing else is left. */
static void test_residual(void) {
    Case c;
    const real *logits;
    NetConfig config = x_small;
    config.variant = X_RESIDUAL_SCALED;
    case_make(&c, &config, 3, 5);
    for (size_t i = c.params->n - 2; i < c.params->n; i++)
        memset(c.params->row[i].value, 0, c.params->row[i].size * sizeof(real));
    CHECK_OK(transformer_plan(c.net, 3, 5, 0));
    CHECK_OK(forward(&c, &logits));
    const double alpha[4] = {1, (double)0.8f, (double)0.6f, 0.5};
    for (size_t r = 0; r < 15; r++)
        for (size_t k = 0; k < c.K; k++) {
            double a = alpha[c.t[r / 5]], want = log((k == (size_t)c.x_t[r]) * a + (1 - a) / (double)c.K);
            if (!(fabs((double)logits[r * c.K + k] - want) < 1e-6)) CHECK(!"residual");
        }
    CHECK_OK(decode_all(&c, c.dlogits));
    CHECK_OK(forward(&c, &logits));
    CHECK_NEAR("residual while decoding", c.dlogits, logits, 15 * c.K, 0, 1e-6);
    case_free(&c);
}

/* Position i of a row with scale t is scaled by its own element of log_scalors (T,dec_max_seq_len). */
static void test_fine_scaling(void) {
    Case c;
    const real *logits;
    const size_t B = 3, N = 5;
    NetConfig config = x_small;
    config.variant = X_FINE_SCALED;
    case_make(&c, &config, B, N);
    real *log_scalors = c.params->row[0].value;
    memset(log_scalors, 0, c.params->row[0].size * sizeof(real));
    CHECK_OK(transformer_plan(c.net, B, N, 0));
    CHECK_OK(forward(&c, &logits));
    memcpy(c.dlogits, logits, B * N * c.K * sizeof(real));
    for (size_t t = 0; t < 3; t++)
        for (size_t i = 0; i < 6; i++) log_scalors[t * 6 + i] = (real)(0.1 * (double)t - 0.07 * (double)i);
    for (size_t r = 0; r < B * N; r++)
        for (size_t k = 0; k < c.K; k++)
            c.dlogits[r * c.K + k] *= (real)exp(0.1 * (c.t[r / N] - 1) - 0.07 * (double)(r % N));
    CHECK_OK(forward(&c, &logits));
    CHECK_NEAR("fine scaling", logits, c.dlogits, B * N * c.K, 0, 1e-6);
    case_free(&c);
}

/* With 4 unmasked positions (t, class, x[0], x[1]) logits 0..2 see x[0] and x[1] but not x[2]; logits 3 sees x[2]. */
static void test_unmasked(void) {
    Case c;
    const real *logits;
    NetConfig config = gpt_small;
    config.has_class = 1, config.n_unmasked = 4;
    case_make(&c, &config, 1, 5);
    CHECK_OK(transformer_plan(c.net, 1, 5, 0));
    for (size_t j = 0; j < 4; j++) {
        CHECK_OK(forward(&c, &logits));
        memcpy(c.dlogits, logits, 5 * c.K * sizeof(real));
        c.x[j] = (c.x[j] + 1) % (int32_t)c.K;
        CHECK_OK(forward(&c, &logits));
        for (size_t i = 0; i < 5; i++) {
            int seen = j < 2 || j < i, changed = memcmp(logits + i * c.K, c.dlogits + i * c.K, c.K * sizeof(real)) != 0;
            CHECK(seen == changed);
        }
    }
    case_free(&c);
}

/* ---- threads ---- */

/* One training step at a size where every loop is parallel: *out = dlogits and all arenas; their number of elements. */
static size_t training_step(const NetConfig *config, int threads, real **out) {
    Case c;
    threads_set(threads);
    case_make(&c, config, B_MAX, 70);
    CHECK_OK(transformer_plan(c.net, B_MAX, 70, 1));
    params_zero_grad(c.params);
    gradients(&c);
    AdamW o = {1e-3, 0.9, 0.95, 1e-8, 1};
    adamw_step(c.params, &o, 1);
    ema_update(c.params, 0.9999, 1);
    size_t used = B_MAX * 70 * c.K;
    CHECK_OK(mem_alloc(out, 5 * c.params->total + used, sizeof(real), "step"));
    memcpy(*out, c.dlogits, used * sizeof(real));
    for (int arena = 0; arena < 5; arena++, used += c.params->total)
        memcpy(*out + used, c.params->arena[arena], c.params->total * sizeof(real));
    case_free(&c);
    return used;
}

/* A forward pass that is stopped anywhere is an error; the next one is as if it had not been. */
static int ask_patience(void *context) {
    return (*(size_t *)context)-- == 0;
}
static void test_stopped(void) {
    Case c;
    const real *logits;
    case_make(&c, &x_small, 2, 5);
    CHECK_OK(transformer_plan(c.net, 2, 5, 0));
    const size_t n = 2 * 5 * c.K;
    CHECK_OK(forward(&c, &logits));
    real *whole = (real *)malloc(n * sizeof(real));
    memcpy(whole, logits, n * sizeof(real));
    size_t stopped = 0;
    for (size_t patience = 0; stopped == patience; patience++) {
        size_t left = patience;
        work_ask(ask_patience, &left);
        const Err e = forward(&c, &logits);
        stopped += e != OK && strstr(err_text(), "stopped");
        work_ask(NULL, NULL);
        CHECK_OK(forward(&c, &logits));
        CHECK(!memcmp(whole, logits, n * sizeof(real)));
    }
    CHECK(stopped > 4);
    free(whole);
    case_free(&c);
}

static void test_threads(void) {
    int before = threads_get();
    NetConfig x = x_small, gpt = gpt_small;
    x.variant = X_FINE_SCALED, x.dim = 70, x.dec_num_tokens = 37, x.enc_num_tokens = 41;
    x.enc_max_seq_len = 75, x.dec_max_seq_len = 72, x.enc_heads = 3;
    gpt.dim = 66, gpt.dec_max_seq_len = 80, gpt.dec_num_tokens = 37, gpt.input_vocab_size = 38;
    const NetConfig *both[2] = {&x, &gpt};
    for (int k = 0; k < 2; k++) {
        real *one, *other;
        size_t n = training_step(both[k], 1, &one);
        for (int threads = 2; threads <= 3; threads++) {
            CHECK(training_step(both[k], threads, &other) == n);
            CHECK(!memcmp(one, other, n * sizeof(real)));
            free(other);
        }
        one[n / 2] += 1;
        training_step(both[k], 1, &other);
        CHECK(memcmp(one, other, n * sizeof(real)));
        free(other);
        free(one);
    }
    threads_set(before);
}

/* ---- losses ---- */

static void test_loss_closed_forms(void) {
    enum { R = 67, K = 257 };
    static real logits[R * K], q[R * K], d[R * K];
    static int32_t target[R];
    const double e = 1e-6 * (sizeof(real) == 8 ? 1e-6 : 1);
    Loss loss, same;
    memset(logits, 0, sizeof logits), memset(q, 0, sizeof q);
    for (size_t r = 0; r < R; r++) target[r] = draw(4, r, 0, K), q[r * K + (size_t)target[r]] = 1;
    CHECK_OK(denoising_loss(&loss, logits, target, q, R, K, 0.25, 1, d)); /* uniform model, one-hot posterior */
    CHECK(fabs(loss.hard - log(K)) < 6 * e && fabs(loss.soft - log(K)) < 6 * e && fabs(loss.loss - log(K)) < 6 * e);
    CHECK(fabs((double)d[(size_t)target[0]] - (1.0 / K - 1) / R) < e);
    for (size_t i = 0; i < R * K; i++) q[i] = (real)1 / K;
    CHECK_OK(denoising_loss(&loss, logits, target, q, R, K, 1, 1, d)); /* posterior = model */
    CHECK(fabs(loss.soft) < 6 * e && fabs((double)d[5]) < e);

    double hard = 0, soft = 0; /* against plain double arithmetic, with zeros in the posterior */
    for (size_t r = 0; r < R; r++) {
        double sum = 0, total = 0;
        for (size_t k = 0; k < K; k++) {
            size_t i = r * K + k;
            double u = rng_uniform(7, 7, i);
            logits[i] = (real)(4 * rng_normal(8, 8, i) - 900.0 * (k % 50 == 3)), q[i] = (real)(u < 0.5 ? 0 : u * u * u);
            if (k % 50 == 3) q[i] = 0;
            if (k % 50 == 3 && (size_t)target[r] == k) target[r]++;
            sum += exp((double)logits[i]), total += (double)q[i];
        }
        for (size_t k = 0; k < K; k++) {
            q[r * K + k] = (real)((double)q[r * K + k] / total);
            double qk = (double)q[r * K + k], l = (double)logits[r * K + k] - log(sum);
            if (qk > 0) soft += qk * (log(qk) - l) / R;
            if (k == (size_t)target[r]) hard -= l / R;
        }
    }
    CHECK_OK(denoising_loss(&loss, logits, target, q, R, K, 0.25, 3, d));
    CHECK(fabs(loss.hard - hard) < 5 * e && fabs(loss.soft - soft) < 5 * e);
    CHECK(fabs(loss.loss - (0.25 * soft + 0.75 * hard)) < 5 * e);
    CHECK(!(fabs(loss.loss - (0.75 * soft + 0.25 * hard)) < 5 * e)); /* the tolerance tells the two apart */
    static real in_place[R * K];
    memcpy(in_place, logits, sizeof logits);
    CHECK_OK(denoising_loss(&same, in_place, target, q, R, K, 0.25, 3, in_place));
    CHECK(!memcmp(&same, &loss, sizeof loss) && !memcmp(in_place, d, sizeof d));
    CHECK_OK(denoising_loss(&same, logits, target, NULL, R, K, 0, 1, d));
    CHECK(same.hard == loss.hard && same.loss == same.hard && isnan(same.soft));
    logits[5] = -(real)INFINITY, q[5] = 0, target[0] = 6; /* impossible and never asked for: no harm */
    CHECK_OK(denoising_loss(&same, logits, target, q, R, K, 0.25, 1, d));
    CHECK(isfinite(same.loss) && d[5] == 0);
    logits[3 * K + 1] = (real)NAN;
    CHECK_OK(denoising_loss(&same, logits, target, q, R, K, 0.25, 1, NULL));
    CHECK(isnan(same.loss));
    CHECK_ERR(denoising_loss(&loss, logits, target, NULL, R, K, 0.5, 1, NULL), "no posterior");
    CHECK_ERR(denoising_loss(&loss, logits, target, q, R, K, 1.5, 1, NULL), "alpha");
    CHECK_ERR(denoising_loss(&loss, logits, target, q, 0, K, 0, 1, NULL), "0 rows");
    target[R - 1] = K;
    CHECK_ERR(denoising_loss(&loss, logits, target, q, R, K, 0.5, 1, NULL), "target[66] is 257, expected 0..256");
}

/* ---- optimizer ---- */

static void test_decay_rules(void) {
    Transformer *net;
    NetConfig config = x_small;
    config.variant = X_SCALED;
    CHECK_OK(transformer_create(&net, &config));
    for (size_t i = 0; i < transformer_params(net)->n; i++) CHECK(transformer_params(net)->row[i].decay == 0.01);
    transformer_free(net);
    CHECK_OK(transformer_create(&net, &gpt_small));
    size_t decayed = 0;
    for (size_t i = 0; i < transformer_params(net)->n; i++) {
        Param *p = &transformer_params(net)->row[i];
        int linear = p->ndim == 2 && strcmp(p->name, "tok_emb.weight") != 0;
        CHECK(p->decay == (linear ? 0.01 : 0));
        decayed += linear;
    }
    CHECK(decayed == 2 * 6 + 1); /* key query value proj mlp.0 mlp.2 of two blocks, head */
    transformer_free(net);
}

static void test_adamw_and_ema(void) {
    const double lr = 0.01, b1 = 0.9, b2 = 0.95, eps = 1e-8, tolerance = sizeof(real) == 8 ? 1e-12 : 1e-6;
    AdamW o = {lr, b1, b2, eps, 1};
    Case c;
    NetConfig config = x_small;
    config.variant = X_RESIDUAL;
    case_make(&c, &config, 1, 2);
    double worst = 0, worst_ema = 0, moved = 0;
    for (size_t i = 0; i < c.params->n; i++)
        memcpy(c.params->row[i].ema, c.params->row[i].value, c.params->row[i].size * sizeof(real));
    Param *p = &c.params->row[4];
    double w = (double)p->value[1], m = 0, v = 0, ema = w, untrained = (double)c.params->row[0].value[0];
    CHECK(c.params->row[0].untrained && !p->untrained);
    for (uint64_t step = 1; step <= 5; step++) {
        for (size_t i = 0; i < c.params->n; i++)
            for (size_t k = 0; k < c.params->row[i].size; k++) c.params->row[i].grad[k] = (real)rng_normal(step, i, k);
        double g = (double)p->grad[1];
        w *= 1 - lr * 0.01, m = b1 * m + (1 - b1) * g, v = b2 * v + (1 - b2) * g * g;
        w -= lr / (1 - pow(b1, (double)step)) * m / (sqrt(v) / sqrt(1 - pow(b2, (double)step)) + eps);
        adamw_step(c.params, &o, step);
        float d = (1 + (float)step) / (10 + (float)step);
        if (d > 0.4f) d = 0.4f;
        ema -= (double)(1 - d) * (ema - w);
        ema_update(c.params, 0.4, step);
        worst = fmax(worst, fabs((double)p->value[1] - w)), worst_ema = fmax(worst_ema, fabs((double)p->ema[1] - ema));
        moved = fmax(moved, fabs((double)p->value[1] - (double)p->value[2]));
    }
    CHECK(worst <= tolerance && worst_ema <= tolerance && moved > 1e-3);
    CHECK((double)c.params->row[0].value[0] == untrained); /* no gradient: no step, no decay */
    for (size_t k = 0; k < p->size; k++) p->grad[k] = 0, p->m[k] = 0, p->v[k] = 0;
    o.decay_scale = 0;
    w = (double)p->value[1];
    adamw_step(c.params, &o, 9);
    CHECK((double)p->value[1] == w);
    o.decay_scale = 2;
    adamw_step(c.params, &o, 10);
    CHECK(fabs((double)p->value[1] - w * (1 - 2 * 0.01 * lr)) <= tolerance && (double)p->value[1] != w);
    case_free(&c);
}

/* ---- moments in bf16 ---- */

#ifndef PLAIN
static double bf16_value(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return (double)number;
}

/* Over all 65,536 random numbers the mean is x, to the last bit; and only x's two neighbours come out. */
static void test_round_at_random(void) {
    const float some[] = {1, -1.0003f, 3.14159f, 1e-30f, -7.3e8f, 1.1754944e-38f, 3e-39f, 0, 0.99999994f};
    for (size_t i = 0; i < sizeof some / sizeof *some; i++) {
        double sum = 0, lo = HUGE_VAL, hi = -HUGE_VAL;
        for (uint32_t random = 0; random < 65536; random++) {
            const double y = bf16_value(round_at_random(some[i], random | 0xabcd0000u));
            sum += y, lo = fmin(lo, y), hi = fmax(hi, y);
        }
        CHECK(sum == 65536 * (double)some[i]);
        CHECK(lo <= (double)some[i] && hi >= (double)some[i] && hi - lo <= fabs((double)some[i]) / 64 + 1e-40);
    }
    uint32_t bits = 0x7f800001u; /* a NaN that its upper half would take for infinity */
    float nan;
    memcpy(&nan, &bits, sizeof nan);
    CHECK(isnan(bf16_value(round_at_random(nan, 0))));
    CHECK(bf16_value(round_at_random((float)HUGE_VAL, 65535)) == HUGE_VAL);
}

enum { MOMENTS = 40000, MOMENT_STEPS = 200 };

/* A table of one tensor after steps with gradients of some mean and much noise. */
static void train_moments(Params *p, int bf16, int threads) {
    const size_t size = MOMENTS;
    AdamW o = {1e-3, 0.9, 0.999, 1e-8, 1};
    memset(p, 0, sizeof *p);
    threads_set(threads);
    CHECK_OK(params_add(p, NULL, INIT_ONE, 0, 0, 1, &size, "w"));
    p->bf16_moments = bf16;
    CHECK_OK(params_plan(p, PLAN_VALUE | PLAN_GRAD | PLAN_ADAM));
    params_init(p, 1);
    for (uint64_t step = 1; step <= MOMENT_STEPS; step++) {
        for (size_t k = 0; k < MOMENTS; k++)
            p->row[0].grad[k] = (real)(0.3 + rng_uniform(2, rng_stream(RNG_TEST, 0, step), k) - 0.5);
        adamw_step(p, &o, step);
    }
}

/* In the mean the weights go where they go with moments in float: beta2 0.999 moves v by a thousandth a step, which a
 * bf16 rounded to the nearest never notices. Any number of threads gives the same bits. */
static void test_bf16_moments(void) {
    Params f, h, one;
    train_moments(&f, 0, 2);
    train_moments(&h, 1, 2);
    train_moments(&one, 1, 1);
    CHECK(!h.row[0].m && h.row[0].m16 && !f.row[0].m16);
    CHECK(!memcmp(h.arena[0], one.arena[0], MOMENTS * sizeof(real)));
    CHECK(!memcmp(h.row[0].v16, one.row[0].v16, MOMENTS * sizeof *h.row[0].v16));
    double moved = 0, apart = 0, v = 0, v16 = 0;
    for (size_t k = 0; k < MOMENTS; k++) {
        moved += 1 - (double)f.row[0].value[k], apart += (double)(h.row[0].value[k] - f.row[0].value[k]);
        v += (double)f.row[0].v[k], v16 += bf16_value(h.row[0].v16[k]);
    }
    CHECK(moved > 0.05 * MOMENTS && fabs(apart) < 1e-3 * moved && apart != 0);
    CHECK(fabs(v16 - v) < 1e-3 * v);
    params_free(&f), params_free(&h), params_free(&one);
}
#endif

static void test_learning_rate(void) {
    LrSchedule s = {2.5e-6, 1e-4, 1e-8, 1000, 9000};
    CHECK(fabs(lr_at(&s, 0) - 2.5e-6) < 1e-18);
    CHECK(fabs(lr_at(&s, 500) - (2.5e-6 + 1e-4) / 2) < 1e-18);
    CHECK(fabs(lr_at(&s, 1000) - 1e-4) < 1e-18);
    CHECK(fabs(lr_at(&s, 5000) - (1e-4 + 1e-8) / 2) < 1e-18);
    CHECK(fabs(lr_at(&s, 9000) - 1e-8) < 1e-18 && lr_at(&s, 90000) == lr_at(&s, 9000));
    CHECK(lr_at(&s, 999) < lr_at(&s, 1000) && lr_at(&s, 1001) < lr_at(&s, 1000));
    s.warm_up_steps = 0;
    CHECK(fabs(lr_at(&s, 0) - 1e-4) < 1e-18);
}

/* ---- names, configurations, errors ---- */

static void check_names(const NetConfig *config, const char *const *name, size_t n) {
    Transformer *net;
    CHECK_OK(transformer_create(&net, config));
    Params *p = transformer_params(net);
    CHECK(p->n == n);
    for (size_t i = 0; i < n && i < p->n; i++)
        if (!CHECK(!strcmp(p->row[i].name, name[i]))) printf("     \"%s\", expected \"%s\"\n", p->row[i].name, name[i]);
    transformer_free(net);
}

#define X_ATTENTION(l)                                                                                                 \
    l ".0.weight", l ".0.bias", l ".1.to_q.weight", l ".1.to_k.weight", l ".1.to_v.weight", l ".1.to_out.weight",      \
        l ".1.to_out.bias"
#define X_FEED(l)                                                                                                      \
    l ".0.weight", l ".0.bias", l ".1.net.0.0.weight", l ".1.net.0.0.bias", l ".1.net.2.weight", l ".1.net.2.bias"
#define X_END(s) s ".norm.weight", s ".norm.bias", s ".to_logits.weight", s ".to_logits.bias"

static void test_names(void) {
    static const char *const x[] = {"log_scalors",
                                    "encoder.token_emb.weight",
                                    "encoder.pos_emb.emb.weight",
                                    X_ATTENTION("encoder.attn_layers.layers.0"),
                                    X_FEED("encoder.attn_layers.layers.1"),
                                    X_END("encoder"),
                                    "decoder.token_emb.weight",
                                    "decoder.pos_emb.emb.weight",
                                    X_ATTENTION("decoder.attn_layers.layers.0"),
                                    X_ATTENTION("decoder.attn_layers.layers.1"),
                                    X_FEED("decoder.attn_layers.layers.2"),
                                    X_END("decoder")};
    static const char *const gpt[] = {"pos_emb",
                                      "tok_emb.weight",
                                      "blocks.0.ln1.weight",
                                      "blocks.0.ln1.bias",
                                      "blocks.0.ln2.weight",
                                      "blocks.0.ln2.bias",
                                      "blocks.0.attn.key.weight",
                                      "blocks.0.attn.key.bias",
                                      "blocks.0.attn.query.weight",
                                      "blocks.0.attn.query.bias",
                                      "blocks.0.attn.value.weight",
                                      "blocks.0.attn.value.bias",
                                      "blocks.0.attn.proj.weight",
                                      "blocks.0.attn.proj.bias",
                                      "blocks.0.mlp.0.weight",
                                      "blocks.0.mlp.0.bias",
                                      "blocks.0.mlp.2.weight",
                                      "blocks.0.mlp.2.bias",
                                      "ln_f.weight",
                                      "ln_f.bias",
                                      "head.weight"};
    NetConfig c = x_small;
    c.dec_depth = 1, c.variant = X_RESIDUAL_SCALED;
    check_names(&c, x, sizeof x / sizeof *x);
    c = gpt_small, c.dec_depth = 1;
    check_names(&c, gpt, sizeof gpt / sizeof *gpt);
}

/* Elements of the full FFHQ transitions (SPEC section 12). */
static void test_full_size_counts(void) {
    NetConfig x = {.kind = NET_X,
                   .variant = X_RESIDUAL_SCALED,
                   .n_scales = 4,
                   .dim = 752,
                   .enc_num_tokens = 548,
                   .enc_depth = 18,
                   .enc_heads = 16,
                   .enc_max_seq_len = 257,
                   .dec_num_tokens = 548,
                   .dec_depth = 6,
                   .dec_heads = 16,
                   .dec_max_seq_len = 256};
    NetConfig gpt = {.kind = NET_GPT,
                     .n_scales = 4,
                     .dim = 800,
                     .dec_num_tokens = 548,
                     .dec_depth = 26,
                     .dec_heads = 16,
                     .dec_max_seq_len = 256,
                     .input_vocab_size = 548};
    Transformer *net;
    CHECK_OK(transformer_create(&net, &x));
    CHECK(params_count(transformer_params(net)) == 203214812);
    transformer_free(net);
    CHECK_OK(transformer_create(&net, &gpt));
    CHECK(params_count(transformer_params(net)) == 201033600);
    transformer_free(net);
}

static void test_config(void) {
    for (int k = 0; k < 6; k++) {
        Config text = {0};
        NetConfig c = k < 5 ? x_small : gpt_small, back;
        if (k < 5)
            c.variant = (XVariant)k, c.tie_token_emb = k % 2;
        else
            c.n_unmasked = 2;
        c.has_class = k >= 2;
        CHECK_OK(net_config_write(&text, &c, "model.params."));
        CHECK_OK(net_config_read(&back, &text, "model.params."));
        CHECK(!memcmp(&c, &back, sizeof c));
        config_free(&text);
    }
}

/* Each entry replaces one key of a good configuration and must be refused with a text that holds `part`. */
static void test_config_errors(void) {
    static const char *const wrong[][3] = {
        {"transformer_config.target", "x.transformer.Perceiver", "Perceiver"},
        {"transformer_config.params.enc_rel_pos_bias", "true", "enc_rel_pos_bias"},
        {"transformer_config.params.wrap_decoder", "true", "wrap_decoder"},
        {"transformer_config.params.dim", "0", "dim"},
        {"transformer_config.params.dec_heads", "-3", "dec_heads"},
        {"transformer_config.params.enc_depth", "99999999999999999999", "enc_depth"},
        {"transformer_config.params.xt_start", "2", "xt_start"},
        {"transformer_config.params.n_scales", "2", "n_scales"},
        {"n_scales", "65", "n_scales"},
        {"conditioner_config.target", "imagebart.util.TextProvider", "TextProvider"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        Config text = {0};
        NetConfig c = x_small, back;
        c.variant = X_RESIDUAL;
        CHECK_OK(net_config_write(&text, &c, ""));
        CHECK_OK(config_set(&text, wrong[i][0], "%s", wrong[i][1]));
        CHECK_ERR(net_config_read(&back, &text, ""), wrong[i][2]);
        config_free(&text);
    }
    Config empty = {0};
    NetConfig back;
    CHECK_ERR(net_config_read(&back, &empty, "a."), "a.transformer_config.target is missing");
    Transformer *net;
    NetConfig c = gpt_small;
    c.dec_heads = 5;
    CHECK_ERR(transformer_create(&net, &c), "n_head");
    c = x_small, c.enc_num_tokens = 6;
    CHECK_ERR(transformer_create(&net, &c), "6 tokens is too small for 7 token values");
    c = x_small, c.n_scales = 9;
    CHECK_ERR(transformer_create(&net, &c), "9 scales");
    c = x_small, c.dim = 0;
    CHECK_ERR(transformer_create(&net, &c), "dim");
    CHECK(net == NULL);
}

/* One id at a time is put out of range, refused by name and place, and put back. */
static void test_bad_ids(Case *c) {
    const real *logits;
    const struct {
        int32_t *id, bad;
        const char *part;
    } bad[] = {{&c->x[4], 7, "x[4] is 7, expected 0..6"},
               {&c->x[4], -1, "x[4] is -1"},
               {&c->x_t[9], 7, "x_t[9] is 7, expected 0..6"},
               {&c->t[1], 0, "t[1] is 0, expected 1..3"},
               {&c->t[1], 4, "t[1] is 4"},
               {&c->label[0], 9, "label[0] is 9, expected 0..8"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        int32_t keep = *bad[i].id;
        *bad[i].id = bad[i].bad;
        CHECK_ERR(forward(c, &logits), bad[i].part);
        *bad[i].id = keep;
    }
    CHECK_OK(forward(c, &logits));
    CHECK_ERR(transformer_forward(c->net, c->x, NULL, c->t, c->label, 2, 5, &logits), "no x_t");
    CHECK_ERR(transformer_forward(c->net, c->x, c->x_t, c->t, NULL, 2, 5, &logits), "no label");
    CHECK_ERR(transformer_forward(c->net, c->x, c->x_t, c->t, c->label, 3, 5, &logits), "3 x 5");
    CHECK_ERR(transformer_forward(c->net, c->x, c->x_t, c->t, c->label, 2, 6, &logits), "2 x 6");
}

static void test_errors(void) {
    Case c;
    const real *logits;
    int32_t prev[2] = {0, 7};
    NetConfig config = x_small;
    config.has_class = 1;
    case_make(&c, &config, 2, 5);
    CHECK_ERR(forward(&c, &logits), "nothing is planned");
    CHECK_ERR(transformer_plan(c.net, 2, 7, 0), "7 tokens need 7 decoder positions, the table has 6");
    CHECK_ERR(transformer_plan(c.net, 2, 8, 0), "8 tokens need 10 encoder positions, the table has 9");
    CHECK_ERR(transformer_plan(c.net, 0, 5, 0), "batch of 0");
    CHECK_ERR(transformer_plan(c.net, 2, 0, 0), "0 tokens");
    CHECK_OK(transformer_plan(c.net, 2, 5, 1));
    CHECK_ERR(transformer_backward(c.net, c.dlogits), "without a forward");
    CHECK_ERR(transformer_decode_begin(c.net, c.x_t, c.t, c.label, 2, 5), "training plan");
    test_bad_ids(&c);
    CHECK_OK(transformer_plan(c.net, 2, 5, 0));
    CHECK_OK(forward(&c, &logits));
    CHECK_ERR(transformer_backward(c.net, c.dlogits), "without training");
    CHECK_ERR(transformer_decode_step(c.net, prev, 0, &logits), "decoding");
    CHECK_OK(transformer_decode_begin(c.net, c.x_t, c.t, c.label, 2, 5));
    CHECK_ERR(transformer_decode_step(c.net, prev, 1, &logits), "decoding step 1, expected 0..0 of 5");
    CHECK_OK(transformer_decode_step(c.net, NULL, 0, &logits));
    CHECK_ERR(transformer_decode_step(c.net, prev, 1, &logits), "previous token[1] is 7");
    CHECK_ERR(transformer_decode_step(c.net, prev, 2, &logits), "decoding step 2, expected 0..1 of 5");
    prev[1] = 6;
    CHECK_OK(transformer_decode_step(c.net, prev, 1, &logits));
    DecodePosition ahead[] = {{0, 3, 1}}, gap[] = {{1, 0, 0}, {1, 2, 1}}, twice[] = {{1, 0, 0}, {1, 0, 0}};
    DecodePosition falls[] = {{1, 0, 0}, {0, 0, 0}}, beyond[] = {{2, 0, 0}}, bad[] = {{0, 1, -1}}, back[] = {{0, 1, 3}};
    CHECK_ERR(transformer_decode_block(c.net, ahead, 1, &logits), "decoding position 3 of row 0, expected 0..2 of 5");
    CHECK_ERR(transformer_decode_block(c.net, gap, 2, &logits), "decoding position 2 of row 1, expected 1 of 5");
    CHECK_ERR(transformer_decode_block(c.net, twice, 2, &logits), "decoding position 0 of row 1, expected 1 of 5");
    CHECK_ERR(transformer_decode_block(c.net, falls, 2, &logits), "row 0 of a batch of 2");
    CHECK_ERR(transformer_decode_block(c.net, beyond, 1, &logits), "row 2 of a batch of 2");
    CHECK_ERR(transformer_decode_block(c.net, bad, 1, &logits), "previous token[0] is -1");
    CHECK_ERR(transformer_decode_block(c.net, back, 0, &logits), "a block of 0 positions, expected 1..128");
    CHECK_ERR(transformer_decode_block(c.net, back, 129, &logits), "a block of 129 positions");
    CHECK_OK(transformer_decode_block(c.net, back, 1, &logits)); /* back by one: position 1 is forgotten */
    ahead[0].i = 2;
    CHECK_OK(transformer_decode_block(c.net, ahead, 1, &logits));
    CHECK_OK(transformer_decode_block(c.net, back, 1, &logits));
    ahead[0].i = 3;
    CHECK_ERR(transformer_decode_block(c.net, ahead, 1, &logits), "decoding position 3 of row 0, expected 0..2 of 5");
    CHECK_OK(forward(&c, &logits));
    CHECK_ERR(transformer_decode_step(c.net, prev, 2, &logits), "decoding"); /* forward used the caches */
    CHECK_ERR(transformer_decode_block(c.net, back, 1, &logits), "before decoding began");
    case_free(&c);

    config.dec_max_seq_len = 1 << 20, config.enc_max_seq_len = 1 << 20; /* a plan beyond any memory */
    Transformer *net;
    CHECK_OK(transformer_create(&net, &config));
    CHECK_ERR(transformer_plan(net, 1 << 20, (1 << 20) - 2, 1), "");
    CHECK_ERR(transformer_forward(net, c.x, c.x_t, c.t, c.label, 1, 1, &logits), "nothing is planned");
    transformer_free(net);
}

#ifndef PLAIN
static void test_plain_refusals(void) {
    Case c;
    case_make(&c, &x_small, 2, 5);
    CHECK_OK(params_pack(c.params, WEIGHTS_BF16));
    CHECK_ERR(transformer_plan(c.net, 2, 5, 0), "packed");
    case_free(&c);
    Params p = {.bf16_moments = 1};
    const size_t n = 3;
    CHECK_OK(params_add(&p, NULL, INIT_ZERO, 0, 0, 1, &n, "w"));
    CHECK_ERR(params_plan(&p, PLAN_VALUE | PLAN_ADAM), "kernels/");
    params_free(&p);
}

/* ---- Each fast layer beside the plain loop of its name: 1e-12 in double, 1e-5 in float ---- */

extern const Layers transformer_layers;

static const double FELLOWS = sizeof(real) == 8 ? 1e-12 : 1e-5;

static real *numbers(size_t n, uint64_t stream, double size) {
    real *x;
    CHECK_OK(mem_alloc(&x, n + 1, sizeof *x, "a test"));
    for (size_t i = 0; i < n; i++) x[i] = (real)(size * rng_normal(7, rng_stream(RNG_TEST, 9, stream), i));
    return x;
}

/* Two places to compute, and how they are called */
typedef struct {
    Compute on;
    const Layers *layers;
} Place;

static void places(Place place[2], size_t scratch) {
    compute_plainly(0);
    place[0].on = place[1].on = compute_of(NULL);
    place[0].layers = &transformer_layers, place[0].on.fast = NULL;
    place[1].layers = place[1].on.fast;
    for (int k = 0; k < 2; k++) CHECK_OK(mem_alloc(&place[k].on.scratch, scratch + 1, 1, "scratch"));
}
static void places_end(Place place[2]) {
    free(place[0].on.scratch);
    free(place[1].on.scratch);
}

static void near_fellows(const char *layer, const char *tensor, real *x[2], size_t n) {
    char name[80];
    snprintf(name, sizeof name, "%s, %s", layer, tensor);
    CHECK_NEAR(name, x[1], x[0], n, 1e-30, FELLOWS);
    free(x[0]), free(x[1]);
}

static void test_embed_fellows(size_t B, size_t n, size_t C, size_t V) {
    Place place[2];
    real *x[2], *dtoken[2], *dposition[2], *token = numbers(V * C, 1, 1), *position = numbers(n * C, 2, 1);
    int32_t ids[64];
    for (size_t i = 0; i < B * n; i++) ids[i] = draw(21, i, 0, V);
    places(place, 0);
    for (int k = 0; k < 2; k++) {
        const Layers *l = place[k].layers;
        x[k] = numbers(B * n * C, 3, 1), dtoken[k] = numbers(V * C, 4, 1), dposition[k] = numbers(n * C, 5, 1);
        l->embed_backward(&place[k].on, dtoken[k], dposition[k], x[k], ids, B, n, C, V);
        l->embed_forward(&place[k].on, x[k], ids, token, position, NULL, B, n, C);
    }
    near_fellows("embed", "x", x, B * n * C);
    near_fellows("embed", "dtoken", dtoken, V * C);
    near_fellows("embed", "dposition", dposition, n * C);
    free(token), free(position);
    places_end(place);
}

static void test_norm_fellows(size_t B, size_t n, size_t skip, size_t C) {
    const size_t R = B * (n - skip);
    Place place[2];
    real *y[2], *mean[2], *rstd[2], *dx[2], *dw[2], *db[2];
    real *x = numbers(B * n * C, 1, 2), *dy = numbers(R * C, 2, 1), *w = numbers(C, 3, 1), *b = numbers(C, 4, 1);
    places(place, 0);
    for (int k = 0; k < 2; k++) {
        const Layers *l = place[k].layers;
        y[k] = numbers(R * C, 5, 1), mean[k] = numbers(R, 6, 1), rstd[k] = numbers(R, 7, 1);
        dx[k] = numbers(B * n * C, 8, 1), dw[k] = numbers(C, 9, 1), db[k] = numbers(C, 10, 1);
        l->norm_forward(&place[k].on, y[k], mean[k], rstd[k], x, w, b, R, C, n, skip);
        l->norm_backward(&place[k].on, dx[k], dx[k], dw[k], db[k], dy, x, w, mean[k], rstd[k], 1, R, C, n, skip);
    }
    near_fellows("norm", "y", y, R * C);
    near_fellows("norm", "mean", mean, R);
    near_fellows("norm", "rstd", rstd, R);
    near_fellows("norm", "dx", dx, B * n * C);
    near_fellows("norm", "dweight", dw, C);
    near_fellows("norm", "dbias", db, C);
    free(x), free(dy), free(w), free(b);
    places_end(place);
}

static void test_linear_fellows(size_t R, size_t C, size_t M, int bias, int accumulate) {
    Place place[2];
    real *y[2], *dx[2], *dw[2], *db[2];
    real *x = numbers(R * C, 1, 1), *w = numbers(M * C, 2, 1), *b = numbers(M, 3, 1), *dy = numbers(R * M, 4, 1);
    places(place, 0);
    for (int k = 0; k < 2; k++) {
        const Layers *l = place[k].layers;
        y[k] = numbers(R * M, 5, 1), dx[k] = numbers(R * C, 6, 1), dw[k] = numbers(M * C, 7, 1);
        db[k] = numbers(M, 8, 1);
        l->linear_forward(&place[k].on, y[k], x, w, bias ? b : NULL, accumulate ? y[k] : NULL, 0, R, C, M);
        l->linear_backward(&place[k].on, dx[k], dw[k], bias ? db[k] : NULL, dy, x, w, accumulate, 0, R, C, M);
    }
    near_fellows("linear", "y", y, R * M);
    near_fellows("linear", "dx", dx, R * C);
    near_fellows("linear", "dw", dw, M * C);
    near_fellows("linear", "db", db, M);
    free(x), free(w), free(b), free(dy);
    places_end(place);
}

static void test_gelu_fellows(size_t R, size_t H) {
    Place place[2];
    real *g[2], *dg[2], *dh[2], *bias = numbers(H, 1, 1);
    places(place, 0);
    for (int k = 0; k < 2; k++) {
        const Layers *l = place[k].layers;
        g[k] = numbers(R * H, 2, 3), dg[k] = numbers(R * H, 3, 1), dh[k] = numbers(R * H, 4, 1);
        l->gelu_forward(&place[k].on, g[k], dg[k], bias, R, H);
        l->gelu_backward(&place[k].on, dh[k], dg[k], R, H);
    }
    near_fellows("gelu", "g", g, R * H);
    near_fellows("gelu", "dg", dg, R * H);
    near_fellows("gelu", "dh", dh, R * H);
    free(bias);
    places_end(place);
}

static void test_attention_fellows(size_t B, size_t heads, size_t D, size_t Tq, size_t Tk, int causal,
                                   size_t unmasked) {
    const Attention s = {
        .B = B, .heads = heads, .D = D, .Tq = Tq, .Tk = Tk, .key_stride = Tk, .causal = causal, .unmasked = unmasked};
    const size_t nq = B * Tq * heads * D, nk = B * Tk * heads * D;
    Place place[2];
    real *y[2], *p[2], *dq[2], *dk[2], *dv[2];
    real *q = numbers(nq, 1, 1), *key = numbers(nk, 2, 1), *v = numbers(nk, 3, 1), *dy = numbers(nq, 4, 1);
    places(place, 0);
    for (int k = 0; k < 2; k++) {
        const Layers *l = place[k].layers;
        free(place[k].on.scratch);
        CHECK_OK(mem_alloc(&place[k].on.scratch, place[1].layers->attention_needs(&place[1].on, &s, 1), 1, "scratch"));
        y[k] = numbers(nq, 5, 1), p[k] = numbers(B * heads * Tq * Tk, 6, 1);
        dq[k] = numbers(nq, 7, 1), dk[k] = numbers(nk, 8, 1), dv[k] = numbers(nk, 9, 1);
        l->attention_forward(&place[k].on, y[k], p[k], q, key, v, &s);
        l->attention_backward(&place[k].on, dq[k], dk[k], dv[k], dy, y[k], p[k], q, key, v, &s);
        free(p[k]);
    }
    near_fellows("attention", "y", y, nq);
    near_fellows("attention", "dq", dq, nq);
    near_fellows("attention", "dk", dk, nk);
    near_fellows("attention", "dv", dv, nk);
    free(q), free(key), free(v), free(dy);
    places_end(place);
}

/* scaled: 0, 1, or 2 for fine */
static void test_variant_fellows(int scaled, int residual) {
    enum { B = 4, N = 5, K = 37, SCALES = 3, LENGTH = 9, PROMPT = 2 };
    const size_t scalors = scaled == 2 ? SCALES * LENGTH : SCALES;
    Place place[2];
    real *logits[2], *draw_raw[2], *ds[2], *s = numbers(SCALES * LENGTH, 1, 0.3), *dlogits = numbers(B * N * K, 2, 1);
    int32_t ids[B * (PROMPT + N)];
    for (size_t i = 0; i < B * (PROMPT + N); i++)
        ids[i] = i % (PROMPT + N) ? draw(23, i, 0, K) : 1 + (int32_t)(i / (PROMPT + N) % SCALES);
    const Variant v = {.log_scalors = scaled ? s : NULL,
                       .fine = scaled == 2,
                       .residual = residual,
                       .scales = SCALES,
                       .length = LENGTH,
                       .ids = ids,
                       .prompt = PROMPT,
                       .N = N,
                       .alpha = {1, 0.8f, 0.6f, 0.4f}};
    places(place, B * N * sizeof(real));
    for (int k = 0; k < 2; k++) {
        const Layers *l = place[k].layers;
        logits[k] = numbers(B * N * K, 3, 1), draw_raw[k] = numbers(B * N * K, 4, 1), ds[k] = numbers(scalors, 5, 1);
        l->variant_forward(&place[k].on, logits[k], draw_raw[k], &v, NULL, B, N, K);
        if (scaled) l->variant_backward(&place[k].on, draw_raw[k], ds[k], dlogits, draw_raw[k], &v, B, N, K);
    }
    near_fellows("variant", "logits", logits, B * N * K);
    near_fellows("variant", "draw", draw_raw, B * N * K);
    near_fellows("variant", "dlog_scalors", ds, scalors);
    free(s), free(dlogits);
    places_end(place);
}

static void test_loss_fellows(size_t R, size_t K, int soft) {
    Place place[2];
    real *dlogits[2], *sums[2], *logits = numbers(R * K, 1, 2), *q = numbers(R * K, 2, 1);
    int32_t target[64];
    for (size_t r = 0; r < R; r++) {
        real sum = 0;
        target[r] = draw(24, r, 0, K);
        for (size_t k = 0; k < K; k++) sum += q[r * K + k] = k > 0 && k % 3 == 0 ? 0 : q[r * K + k] * q[r * K + k];
        for (size_t k = 0; k < K; k++) q[r * K + k] /= sum;
    }
    places(place, 0);
    for (int k = 0; k < 2; k++) {
        double both[2];
        dlogits[k] = numbers(R * K, 3, 1), sums[k] = numbers(2, 4, 1);
        place[k].layers->denoising_loss(&place[k].on, both, dlogits[k], logits, target, soft ? q : NULL,
                                        soft ? (real)0.3 : 0, (real)0.7, R, K);
        sums[k][0] = (real)both[0], sums[k][1] = (real)both[1];
    }
    near_fellows("loss", "dlogits", dlogits, R * K);
    near_fellows("loss", "sums", sums, 2);
    free(logits), free(q);
    places_end(place);
}

static void test_update_fellows(size_t n) {
    const AdamW o = {.lr = 0.01, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .decay_scale = 1.5};
    real *w[2], *m[2], *v[2], *ema[2];
    for (int k = 0; k < 2; k++) {
        Params p = {0};
        compute_plainly(k == 0);
        CHECK_OK(params_add(&p, NULL, INIT_NORMAL, 1, 0.1, 1, &n, "w"));
        CHECK_OK(params_plan(&p, PLAN_VALUE | PLAN_GRAD | PLAN_ADAM | PLAN_EMA));
        params_init(&p, 3);
        for (uint64_t step = 1; step <= 3; step++) {
            for (size_t i = 0; i < n; i++) p.row->grad[i] = (real)rng_normal(8, rng_stream(RNG_TEST, 1, step), i);
            adamw_ema_step(&p, &o, step, 0.9, step);
        }
        w[k] = numbers(n, 2, 1), m[k] = numbers(n, 3, 1), v[k] = numbers(n, 4, 1), ema[k] = numbers(n, 5, 1);
        memcpy(w[k], p.row->value, n * sizeof(real)), memcpy(m[k], p.row->m, n * sizeof(real));
        memcpy(v[k], p.row->v, n * sizeof(real)), memcpy(ema[k], p.row->ema, n * sizeof(real));
        params_free(&p);
    }
    near_fellows("adamw", "w", w, n);
    near_fellows("adamw", "m", m, n);
    near_fellows("adamw", "v", v, n);
    near_fellows("ema", "ema", ema, n);
}

static void test_fellows(void) {
    test_embed_fellows(3, 7, 40, 13);
    test_norm_fellows(3, 5, 0, 70), test_norm_fellows(2, 9, 2, 33);
    test_linear_fellows(1, 1, 1, 1, 0), test_linear_fellows(70, 33, 40, 1, 1), test_linear_fellows(5, 7, 3, 0, 0);
    test_gelu_fellows(7, 300);
    test_attention_fellows(2, 2, 20, 7, 7, 0, 0), test_attention_fellows(1, 3, 50, 150, 150, 1, 0);
    test_attention_fellows(2, 1, 64, 65, 130, 0, 0), test_attention_fellows(1, 2, 15, 80, 80, 1, 76);
    for (int scaled = 0; scaled < 3; scaled++) test_variant_fellows(scaled, 0), test_variant_fellows(scaled, 1);
    test_loss_fellows(9, 50, 0), test_loss_fellows(9, 50, 1);
    test_update_fellows(40000);
}
#endif

/* What must hold of the plain loops as of their faster fellows */
static void test_layers(void) {
#ifdef REAL_DOUBLE
    test_gradients();
    test_gradient_check_fails();
    test_loss_gradient();
#endif
    test_accumulation();
    test_decoding();
    test_loss_closed_forms();
    test_adamw_and_ema();
}

int main(void) {
    test_layers();
    compute_plainly(1);
    test_layers();
#ifndef PLAIN
    test_plain_refusals();
    compute_plainly(0);
    test_fellows();
    test_packed();
    test_round_at_random();
    test_bf16_moments();
#endif
    test_blocks();
    test_reads();
    test_dependence();
    test_residual();
    test_fine_scaling();
    test_unmasked();
    test_threads();
    test_stopped();
    test_decay_rules();
    test_learning_rate();
    test_names();
    test_full_size_counts();
    test_config();
    test_config_errors();
    test_errors();
    return test_report();
}
