/* test_model.c - whole models, tiny random ones in a temporary folder: their bounds against brute force, options, moving
 * averages, classes; what a folder may hold, and what is wrong with others; memory; where models lie. */
#include "tiny.h"

#include <unistd.h>

/* ---- bounds ---- */

/* At one scale x_1 is pure noise and the posterior sits on x_0, so that the bound is the cross entropy. */
static void test_class_bounds(const char *one_scale, const char *three_scales) {
    Model m;
    int32_t x_0[N], scale = 1, other[N];
    uint8_t keep[N], few[N] = {0, 0, 1};
    double bound[3], again[3];
    for (int i = 0; i < N; i++) x_0[i] = (i * 5) % USED, keep[i] = 1;
    CHECK_OK(model_open(&m, one_scale, NULL));
    Chain chain = model_chain(&m);
    CHECK_OK(class_bounds(&chain, x_0, keep, 3, bound));
    for (int32_t c = 0; c < 3; c++) {
        const real *logits;
        Loss loss = {NAN, NAN, NAN};
        CHECK_OK(transformer_forward(m.net, x_0, NULL, &scale, &c, 1, N, &logits));
        CHECK_OK(denoising_loss(&loss, logits, x_0, NULL, N, USED, 0, 1, NULL));
        CHECK(fabs(bound[c] - loss.hard) < 1e-5 * loss.hard);
        CHECK(!(fabs(bound[(c + 1) % 3] - loss.hard) < 1e-5 * loss.hard)); /* the check can fail */
        CHECK_OK(kept_bound(&chain, x_0, keep, c, 3, &again[c]));
        CHECK(fabs(again[c] - loss.hard) < 1e-5 * loss.hard);
    }
    CHECK(fabs(blind_bound(&chain, 1) - log(USED)) < 1e-6); /* one scale: each token is one of USED */
    model_close(&m);
    CHECK_OK(model_open(&m, three_scales, NULL));
    chain = model_chain(&m);
    for (int i = 0; i < N; i++) other[i] = i == 2 ? x_0[i] : (x_0[i] + 1) % USED;
    CHECK_OK(class_bounds(&chain, x_0, few, 3, bound));
    CHECK_OK(class_bounds(&chain, other, few, 3, again));
    CHECK(memcmp(bound, again, sizeof bound) == 0); /* what is not kept has no say */
    other[2] = (x_0[2] + 1) % USED;
    CHECK_OK(class_bounds(&chain, other, few, 3, again));
    for (int c = 0; c < 3; c++) CHECK(bound[c] != again[c]);
    CHECK_OK(kept_bound(&chain, x_0, few, 1, 3, &again[0]));
    CHECK(again[0] != again[1] && isfinite(again[0]));
    few[2] = 0;
    CHECK_ERR(class_bounds(&chain, x_0, few, 3, bound), "no token is kept");
    CHECK_ERR(kept_bound(&chain, x_0, few, 1, 3, bound), "no token is kept");
    model_close(&m);
}

/* The bound of one picture under one row of noise, by its formula: the sum over scales of KL(q || p), a mean over
 * tokens */
static double picture_bound(Model *m, const int32_t *x_0, const int32_t *label, uint64_t seed, size_t row) {
    int32_t chain[4][N];
    real q[N * USED];
    double bound = 0;
    memcpy(chain[0], x_0, sizeof chain[0]);
    for (int32_t t = 1; t <= m->schedule.T; t++) {
        const real *logits;
        memcpy(chain[t], chain[t - 1], sizeof chain[t]);
        noise_step(chain[t], N, USED, m->schedule.beta[t], seed, rng_stream(RNG_NOISE, (uint64_t)t, 0), row * N);
        CHECK_OK(model_scale(m, t));
        CHECK_OK(transformer_plan(m->net, 1, N, 0));
        CHECK_OK(transformer_forward(m->net, chain[t - 1], chain[t], &t, label, 1, N, &logits));
        posterior(q, x_0, chain[t], N, USED, &m->schedule, t);
        for (size_t r = 0; r < N; r++) {
            double sum = 0;
            for (size_t k = 0; k < USED; k++) sum += exp((double)logits[r * USED + k]);
            for (size_t k = 0; k < USED; k++)
                if (q[r * USED + k] > 0)
                    bound += (double)q[r * USED + k] *
                             (log((double)q[r * USED + k]) - (double)logits[r * USED + k] + log(sum)) / N;
        }
    }
    return bound;
}

/* What blind guessing has, by drawing x_t many times: ln K less the entropy of the posterior. */
static void test_blind_bound(const char *dir) {
    enum { DRAWS = 40000 };
    static int32_t x_0[DRAWS], x_t[DRAWS];
    static real q[DRAWS * USED];
    Model m;
    double drawn[2] = {0, 0};
    CHECK_OK(model_open(&m, dir, NULL));
    const Chain chain = model_chain(&m);
    for (int i = 0; i < DRAWS; i++) x_t[i] = x_0[i] = i % USED;
    for (int t = 1; t <= m.schedule.T; t++) {
        noise_step(x_t, DRAWS, USED, m.schedule.beta[t], 9, rng_stream(RNG_NOISE, (uint64_t)t, 0), 0);
        posterior(q, x_0, x_t, DRAWS, USED, &m.schedule, t);
        double sum = log(USED);
        for (size_t i = 0; i < DRAWS * USED; i++)
            if (q[i] > 0) sum += (double)q[i] * log((double)q[i]) / DRAWS;
        drawn[0] += sum, drawn[1] += t > 1 ? sum : 0;
    }
    CHECK(fabs(blind_bound(&chain, 1) - drawn[0]) < 0.01 && fabs(blind_bound(&chain, 2) - drawn[1]) < 0.01);
    CHECK(blind_bound(&chain, 1) > log(USED) && blind_bound(&chain, 2) < blind_bound(&chain, 1));
    model_close(&m);
}

/* What a model knows, as its file says it or by default; a first stage of random weights draws nothing of it. */
static void test_familiar(const char *dir) {
    enum { EDGE = 64 };
    static real image[3 * EDGE * EDGE];
    Model m;
    Familiar f;
    int32_t x_0[N];
    uint8_t keep[N];
    CHECK_OK(model_open(&m, dir, NULL));
    if (!CHECK(m.side <= EDGE)) return;
    for (int i = 0; i < N; i++) x_0[i] = (i * 5) % USED, keep[i] = i < 6;
    CHECK_OK(decode_pictures(&m, x_0, 1, image));
    for (size_t i = 0; i < 3 * m.side * m.side; i++) image[i] = (real)fmin(fmax((double)image[i], -1), 1);
    CHECK_OK(familiar(&f, &m, image, x_0, keep, 1, 3));
    CHECK(f.error < 1e-3 && f.nats > 0 && f.blind > 0 && f.nats_known[0] == 0 && f.error_known[1] == 0.15);
    CHECK(fabs(f.nats_known[1] - 0.75 * f.blind) < 1e-9);
    for (size_t i = 0; i < 3 * m.side * m.side; i++) image[i] = image[i] > 0 ? -1 : 1; /* nothing like it */
    CHECK_OK(familiar(&f, &m, image, x_0, keep, 1, 3));
    CHECK(f.error > 0.45 && f.unlike);
    char text[ERR_MAX];
    familiar_text(text, &m, &f);
    CHECK(strstr(text, "unlike all that") != NULL);
    CHECK_OK(config_set(&m.meta, "imagebart.familiar_nats", "1,100"));
    CHECK_OK(familiar(&f, &m, image, x_0, keep, 1, 3));
    CHECK(f.unlike); /* since the first stage's is off */
    CHECK_OK(config_set(&m.meta, "imagebart.familiar_error", "0.1,0.9"));
    CHECK_OK(familiar(&f, &m, image, x_0, keep, 1, 3));
    CHECK(!f.unlike && f.nats_known[0] == 1 && f.nats_known[1] == 100);
    CHECK_OK(config_set(&m.meta, "imagebart.familiar_nats", "0,1e-3"));
    CHECK_OK(familiar(&f, &m, image, x_0, keep, 1, 3));
    CHECK(f.unlike);
    model_close(&m);
}

static void test_picture_bounds(const char *dir, int labelled) {
    enum { PICTURES = 5, DRAWS = 2 }; /* more than go into a batch */
    Model m;
    int32_t x_0[PICTURES * N], label[PICTURES];
    double bound[PICTURES], alone;
    CHECK_OK(model_open(&m, dir, NULL));
    for (int32_t i = 0; i < PICTURES * N; i++) x_0[i] = (i * 5 + i / N) % USED, label[i / N] = i / N % 3;
    const Chain chain = model_chain(&m);
    CHECK_OK(picture_bounds(&chain, x_0, labelled ? label : NULL, PICTURES, 3, bound));
    for (size_t b = 0; b < PICTURES; b++) {
        double expected = 0;
        for (size_t row = 0; row < DRAWS; row++)
            expected += picture_bound(&m, x_0 + b * N, labelled ? &label[b] : NULL, 3, row) / DRAWS;
        CHECK(fabs(bound[b] - expected) < 1e-5 * expected);
        CHECK(!(fabs(bound[(b + 1) % PICTURES] - expected) < 1e-5 * expected)); /* the check can fail */
        CHECK_OK(picture_bounds(&chain, x_0 + b * N, labelled ? label + b : NULL, 1, 3, &alone));
        CHECK(alone == bound[b]);
    }
    model_close(&m);
}

/* Chains: when repeat r has written its first token, the others still hold x_t, the renoised result of the repeat
 * before. Each differs from that result with probability (1 - r/n) beta_t (1 - 1/K), known tokens too. */
typedef struct {
    const int32_t *tokens;
    int32_t *before;
    size_t n, changed[MAX_SCALES + 1][4], seen[MAX_SCALES + 1][4];
} Rates;

static int watch_rates(void *context, int t, size_t repeat, size_t done, size_t of) {
    Rates *w = context;
    for (size_t b = 0; done == 1 && repeat > 0 && b < w->n; b++)
        for (size_t i = 1; i < of; i++) {
            w->changed[t][repeat] += w->tokens[b * of + i] != w->before[b * of + i];
            w->seen[t][repeat]++;
        }
    if (done == of) memcpy(w->before, w->tokens, w->n * of * sizeof *w->tokens);
    return 0;
}

static int rate_is(const Rates *w, int t, size_t repeat, double p) {
    double seen = (double)w->seen[t][repeat], sigma = sqrt(p * (1 - p) / seen);
    return fabs((double)w->changed[t][repeat] / seen - p) < 4.5 * sigma;
}

static void test_chain_rates(const char *dir) {
    enum { SAMPLES = 300 };
    Model m;
    SampleOptions o;
    Rates w = {0};
    int32_t *tokens = NULL, *known = NULL;
    uint8_t keep[N] = {0, 1, 0, 0, 1, 1};
    CHECK_OK(model_open(&m, dir, NULL));
    CHECK_OK(mem_alloc(&tokens, SAMPLES * N, sizeof *tokens, "test"));
    CHECK_OK(mem_alloc(&w.before, SAMPLES * N, sizeof *w.before, "test"));
    CHECK_OK(mem_alloc(&known, SAMPLES * N, sizeof *known, "test"));
    w.tokens = tokens, w.n = SAMPLES;
    sample_defaults(&o);
    o.n = SAMPLES, o.known = known, o.keep = keep, o.progress = watch_rates, o.context = &w;
    o.chain[1] = 4, o.chain[2] = 3, o.chain[3] = 2, o.block = 1;
    CHECK_OK(model_sample(&m, &o, tokens));
    for (int t = 1; t <= 3; t++)
        for (size_t r = 1; r < o.chain[t]; r++) {
            double p = (1 - (double)r / (double)o.chain[t]) * (double)m.schedule.beta[t] * (1 - 1.0 / USED);
            CHECK(rate_is(&w, t, r, p));
            CHECK(!rate_is(&w, t, r, p + 0.12));
        }
    free(tokens), free(known), free(w.before);
    model_close(&m);
}

static int stop_at_four(void *context, int t, size_t repeat, size_t done, size_t of) {
    (void)context, (void)t, (void)repeat, (void)of;
    return done >= 4;
}

static void test_sample_options(const char *dir) {
    Model m;
    SampleOptions o;
    int32_t tokens[N], hot[BATCH * N], cold[BATCH * N], label = 0;
    CHECK_OK(model_open(&m, dir, NULL));
    sample_defaults(&o);
    o.progress = stop_at_four;
    CHECK_ERR(model_sample(&m, &o, tokens), "stopped");
    sample_defaults(&o);
    o.temperature[1] = -1;
    CHECK_ERR(model_sample(&m, &o, tokens), "temperature");
    o.temperature[1] = 1, o.chain[2] = 0;
    CHECK_ERR(model_sample(&m, &o, tokens), "chain");
    o.chain[2] = 1, o.n = 0;
    CHECK_ERR(model_sample(&m, &o, tokens), "0 samples");
    o.n = 1, o.label = &label;
    CHECK_ERR(model_sample(&m, &o, tokens), "not a model with classes");
    /* official_temperature: the encoder-decoder scales 1, 2 run at 1, the decoder-only scale 3 as asked */
    sample_defaults(&o);
    o.n = BATCH, o.temperature[3] = 0.5;
    CHECK_OK(model_sample(&m, &o, cold));
    o.temperature[1] = o.temperature[2] = 0.1;
    CHECK_OK(model_sample(&m, &o, hot));
    CHECK(memcmp(hot, cold, sizeof hot));
    o.official_temperature = 1;
    CHECK_OK(model_sample(&m, &o, hot));
    CHECK(!memcmp(hot, cold, sizeof hot));
    CHECK_ERR(model_scale(&m, 4), "scale 4");
    CHECK_ERR(model_scale(&m, 0), "scale 0");
    model_close(&m);
}

/* A file with transformer_ema.* is sampled with those. */
static void test_ema(void) {
    Tiny x = {3, 0, 0, 1, 0, X_PLAIN, 0};
    char dir[512], path[600];
    Model m;
    Checkpoint ck = {0};
    CHECK_OK(model_open(&m, tiny_folder(dir, "ema", &x), NULL));
    CHECK_OK(model_scale(&m, 2));
    Param *row = &transformer_params(m.net)->row[1];
    char name[200];
    snprintf(name, sizeof name, "transformer.%s", row->name);
    tiny_path(path, dir, "scale2.safetensors");
    CHECK_OK(checkpoint_open(&ck, path));
    real *value = NULL;
    CHECK_OK(mem_alloc(&value, row->size, sizeof *value, "test"));
    CHECK_OK(checkpoint_reals(&ck, name, -1, NULL, row->size, value));
    CHECK(row->value[0] == value[0]); /* without transformer_ema.*: these */
    /* the same file with transformer_ema.* added */
    TensorList list = {0};
    int32_t updates = 5;
    for (size_t i = 0; i < ck.n; i++) {
        const Tensor *y = &ck.tensor[i];
        char ema[200] = "transformer_ema.";
        CHECK_OK(tensor_list_add(&list, y->name, y->dtype, y->ndim, y->dim, y->data, 0));
        if (strncmp(y->name, "transformer.", 12) != 0) continue;
        size_t length = strlen(ema);
        for (const char *c = y->name + 12; *c; c++)
            if (*c != '.') ema[length++] = *c;
        ema[length] = 0;
        float *negative = NULL;
        CHECK_OK(mem_alloc(&negative, y->size, sizeof *negative, "test"));
        for (size_t k = 0; k < y->size; k++) negative[k] = -((const float *)y->data)[k];
        CHECK_OK(tensor_list_add(&list, ema, y->dtype, y->ndim, y->dim, negative, 0));
    }
    CHECK_OK(tensor_list_add(&list, "transformer_ema.num_updates", DT_I32, 0, NULL, &updates, 0));
    CHECK_OK(checkpoint_write(path, list.tensor, list.from_real, list.n, &ck.meta));
    CHECK_OK(model_scale(&m, 1));
    CHECK_OK(model_scale(&m, 2));
    row = &transformer_params(m.net)->row[1];
    CHECK(row->value[0] == -value[0]);
    for (size_t i = 0; i < list.n; i++)
        if (!strncmp(list.tensor[i].name, "transformer_ema.", 16) && list.tensor[i].data != &updates)
            free((void *)(uintptr_t)list.tensor[i].data);
    tensor_list_free(&list);
    free(value);
    checkpoint_close(&ck);
    model_close(&m);
}

static const Tensor *listed(const TensorList *list, const char *name) {
    for (size_t i = 0; i < list->n; i++)
        if (!strcmp(list->tensor[i].name, name)) return &list->tensor[i];
    return NULL;
}

/* What PyTorch's classes want besides parameters; compact files do without. */
static void test_derived_tensors(void) {
    Tiny x = {2, 0, 1, 0, 0, X_PLAIN, 0};
    Schedule s;
    CHECK_OK(schedule_make(&s, "geometric", 2));
    for (int t = 1; t <= 2; t++)
        for (int compact = 0; compact < 2; compact++) {
            NetConfig c;
            Transformer *net = NULL;
            TensorList list = {0};
            tiny_net(&c, &x, t);
            c.tie_token_emb = 1, c.dec_num_tokens = c.enc_num_tokens;
            if (t == 2) c.n_unmasked = 3, c.dec_num_tokens = USED;
            CHECK_OK(transformer_create(&net, &c));
            CHECK_OK(params_plan(transformer_params(net), PLAN_VALUE | PLAN_EMA));
            CHECK_OK(transition_tensors(&list, net, 'e', &s, DT_F16, compact));
            const Tensor *mask = listed(&list, "transformer.blocks.0.attn.mask");
            const Tensor *own = listed(&list, "transformer.encoder.token_emb.weight");
            const Tensor *other = listed(&list, "transformer.decoder.token_emb.weight");
            CHECK(listed(&list, "sos_token") && listed(&list, "alphats") && listed(&list, "alphacum"));
            CHECK(!mask == (t == 1 || compact) && !other == (t == 2 || compact));
            if (other && own) CHECK(other->data == own->data && other->dtype == DT_F16 && other->size == own->size);
            const size_t L = c.dec_max_seq_len;
            int right = mask && mask->ndim == 4 && mask->size == L * L && mask->dim[3] == L;
            for (size_t i = 0; right && i < L * L; i++)
                right = ((const uint8_t *)mask->data)[i] == (i % L <= i / L || (i % L < 3 && i / L < 3));
            CHECK(right == (mask != NULL));
            tensor_list_free(&list);
            transformer_free(net);
        }
}

static void test_classes(const char *dir) {
    Model m;
    int32_t label = -1;
    SampleOptions o;
    int32_t tokens[N];
    CHECK_OK(model_open(&m, dir, NULL));
    CHECK(m.classes.n == 3);
    CHECK_OK(model_class(&m, "bee", &label));
    CHECK(label == 1);
    CHECK_OK(model_class(&m, "2", &label));
    CHECK(label == 2);
    CHECK_OK(model_class(&m, "CYC", &label));
    CHECK(label == 2);
    CHECK_OK(model_class(&m, "a", &label));
    CHECK(label == 0);
    CHECK_ERR(model_class(&m, "b", &label), "could be any of bee, bicycle");
    CHECK_ERR(model_class(&m, "zebra", &label), "expected one of a, bee, bicycle");
    CHECK_ERR(model_class(&m, "3", &label), "0..2");
    CHECK_ERR(model_class(&m, "99999999999999999999999", &label), "0..2");
    CHECK_ERR(model_class(&m, "", &label), "expected one of");
    sample_defaults(&o);
    CHECK_ERR(model_sample(&m, &o, tokens), "needs a class");
    label = 3;
    o.label = &label;
    CHECK_ERR(model_sample(&m, &o, tokens), "class 3");
    model_close(&m);
}

/* ---- folders ---- */

/* A file's schedule is taken in whatever format of numbers it is kept, if its products are those of its factors. */
static void test_schedule_formats(void) {
    static const Dtype formats[] = {DT_F32, DT_F64, DT_F16, DT_BF16};
    static const char *const kinds[] = {"geometric", "0.1", "0.02"};
    for (int f = 0; f < 4; f++)
        for (int T = 1; T <= 20; T++)
            for (int k = 0; k < 3; k++)
                for (int wrong = 0; wrong < 2; wrong++) {
                    Schedule s, got;
                    real x[2][21];
                    unsigned char bytes[2][21 * 8];
                    CHECK_OK(schedule_make(&s, kinds[k], T));
                    for (int t = 0; t <= T; t++) x[0][t] = (real)s.alphacum[t], x[1][t] = (real)s.alpha[t];
                    if (wrong) x[0][T] += (real)0.1;
                    Tensor tensor[2] = {{.name = "alphacum"}, {.name = "alphats"}};
                    for (int i = 0; i < 2; i++) {
                        tensor_from_reals(bytes[i], formats[f], x[i], (size_t)T + 1);
                        tensor[i].dtype = formats[f], tensor[i].ndim = 1, tensor[i].data = bytes[i];
                        tensor[i].size = tensor[i].dim[0] = (size_t)T + 1;
                    }
                    const Checkpoint ck = {.tensor = tensor, .n = 2};
                    const Err e = schedule_read(&got, &ck, T);
                    if (!CHECK((e == OK) == !wrong))
                        printf("     %s, %d scales, %s: %s\n", kinds[k], T, dtype_name(formats[f]), err_text());
                }
}

/* A first stage's file with a number that is none, or with tensors that its settings do not have: refused when the
 * model is opened. With what other training left beside it: opened. */
static void test_vqgan_files(void) {
    static const struct {
        const char *row, *extra; /* whose element 5 is NaN, or NULL; another tensor of the file, or NULL */
        const char *says;        /* NULL: it opens */
    } cases[] = {{"decoder.conv_out.weight", NULL, "tensor 'decoder.conv_out.weight' element 5 is nan"},
                 {"encoder.conv_in.weight", NULL, "tensor 'encoder.conv_in.weight' element 5 is nan"},
                 {NULL, "encoder.down.1.attn.0.q.weight", "unexpected tensor 'encoder.down.1.attn.0.q.weight'"},
                 {NULL, "quantize.embed.weight", "unexpected tensor 'quantize.embed.weight'"},
                 {NULL, "loss.logvar", NULL},
                 {NULL, "loss.discriminator.main.0.weight", NULL},
                 {NULL, NULL, NULL}};
    char dir[512], path[600];
    Model m;
    Tiny x = {1, 0, 0, 0, 0, X_PLAIN, 0};
    tiny_folder(dir, "first-stages", &x);
    tiny_path(path, dir, "vqgan.safetensors");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Checkpoint ck;
        TensorList list = {0};
        float numbers[4096] = {0};
        write_vqgan(dir);
        CHECK_OK(checkpoint_open(&ck, path));
        for (size_t k = 0; k < ck.n; k++) {
            const Tensor *from = &ck.tensor[k];
            const int changed = cases[i].row && !strcmp(from->name, cases[i].row) && CHECK(from->size <= 4096);
            if (changed) memcpy(numbers, from->data, from->size * sizeof *numbers), numbers[5] = NAN;
            CHECK_OK(tensor_list_add(&list, from->name, from->dtype, from->ndim, from->dim,
                                     changed ? numbers : from->data, 0));
        }
        if (cases[i].extra) CHECK_OK(tensor_list_add(&list, cases[i].extra, DT_F32, 0, NULL, numbers, 0));

        CHECK_OK(checkpoint_write(path, list.tensor, NULL, list.n, &ck.meta));
        tensor_list_free(&list);
        checkpoint_close(&ck);
        if (cases[i].says)
            CHECK_ERR(model_open(&m, dir, NULL), cases[i].says);
        else
            CHECK_OK(model_open(&m, dir, NULL));
        CHECK(!cases[i].says || strstr(err_text(), "vqgan.safetensors") != NULL);
        if (!cases[i].says) model_close(&m);
    }
}

/* The file again, with `value` in all of a row (NULL: in none) and with another tensor (NULL: without) */
static void rewrite(const char *path, const char *row, float value, const char *extra) {
    enum { MOST = 1 << 14 };
    static float numbers[MOST];
    Checkpoint ck;
    TensorList list = {0};
    for (int i = 0; i < MOST; i++) numbers[i] = value;
    CHECK_OK(checkpoint_open(&ck, path));
    for (size_t k = 0; k < ck.n; k++) {
        const Tensor *from = &ck.tensor[k];
        const int changed = row && !strcmp(from->name, row) && CHECK(from->size <= MOST);
        CHECK_OK(
            tensor_list_add(&list, from->name, from->dtype, from->ndim, from->dim, changed ? numbers : from->data, 0));
    }
    if (extra) CHECK_OK(tensor_list_add(&list, extra, DT_F32, 0, NULL, numbers, 0));
    CHECK_OK(checkpoint_write(path, list.tensor, NULL, list.n, &ck.meta));
    tensor_list_free(&list);
    checkpoint_close(&ck);
}

/* Numbers so large that what they give is none: said, and no black picture. */
static void test_too_large(void) {
    static const char *const row[] = {"decoder.conv_in.weight", "decoder.mid.block_1.conv1.weight",
                                      "quantize.embedding.weight", "transformer.encoder.token_emb.weight"};
    for (size_t i = 0; i < 4; i++) {
        char dir[512], path[600], name[32];
        static real image[3 * 64 * 64];
        int32_t x_0[N] = {0};
        uint8_t keep[N] = {1};
        Familiar f;
        Model m;
        Tiny x = {2, 0, 0, 0, 0, X_PLAIN, 0};
        snprintf(name, sizeof name, "too-large-%zu", i);
        tiny_folder(dir, name, &x);
        tiny_path(path, dir, i < 3 ? "vqgan.safetensors" : "scale1.safetensors");
        rewrite(path, row[i], 3e38f, NULL);
        CHECK_OK(model_open(&m, dir, NULL));
        if (i < 3)
            CHECK_ERR(decode_pictures(&m, x_0, 1, image), "no numbers");
        else
            CHECK_OK(decode_pictures(&m, x_0, 1, image));
        CHECK(familiar(&f, &m, image, x_0, keep, -1, 3) == FAILED || (i == 3 && isfinite(f.nats)));
        model_close(&m);
    }
}

/* What lies beside a transition in its file is left out, and said; what lies in it is of another network. */
static void test_beside_transition(void) {
    static const char *const extra[] = {
        "logvar",      "cond_stage_model.embedding.weight", "lpips.net.0.weight", "model_ema.decay",
        "loss.logvar", "transformer.decoder.other.weight"};
    for (size_t i = 0; i < sizeof extra / sizeof *extra; i++) {
        char dir[512], path[600], name[32];
        Model m;
        Tiny x = {2, 0, 0, 0, 0, X_PLAIN, 0};
        snprintf(name, sizeof name, "beside-%zu", i);
        tiny_folder(dir, name, &x);
        tiny_path(path, dir, "scale1.safetensors");
        rewrite(path, NULL, 0, extra[i]);
        if (i == 5) {
            CHECK_ERR(model_open(&m, dir, NULL), "unexpected tensor 'transformer.decoder.other.weight'");
            continue;
        }
        CHECK_OK(model_open(&m, dir, NULL));
        CHECK(i == 4 ? !*m.note : strstr(m.note, extra[i]) && strstr(m.note, "left out"));
        model_close(&m);
    }
}

static void test_broken(void) {
    static const struct {
        int flip;
        const char *name, *says;
    } cases[] = {
        {1, "other-T", "n_scales"},     {2, "other-schedule", "schedule"}, {3, "other-scale", "its name says 2"},
        {4, "small-grid", "positions"}, {5, "no-class", "class"},          {6, "other-K", "token values"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Tiny x = {3, 0, cases[i].flip == 5, 0, cases[i].flip, X_PLAIN, 0};
        char dir[512];
        Model m;
        CHECK_ERR(model_open(&m, tiny_folder(dir, cases[i].name, &x), NULL), cases[i].says);
        CHECK(strstr(err_text(), "scale2.safetensors") != NULL);
    }
    test_vqgan_files();
    test_too_large();
    test_beside_transition();
    test_schedule_formats();
    Tiny nan = {2, 0, 0, 0, 7, X_PLAIN, 0}, short_gpt = {2, 0, 0, 0, 4, X_PLAIN, 0};
    char dir[512];
    Model m;
    CHECK_ERR(model_open(&m, tiny_folder(dir, "short-gpt", &short_gpt), NULL), "takes 8 positions");
    SampleOptions o;
    int32_t tokens[N];
    CHECK_OK(model_open(&m, tiny_folder(dir, "nan", &nan), NULL));
    sample_defaults(&o);
    CHECK_ERR(model_sample(&m, &o, tokens), "scale2.safetensors: tensor 'transformer.head.weight' element 0 is nan");
    model_close(&m);
}

static void test_missing(const char *dir) {
    char path[600], kept[600];
    Model m;
    static const char *files[] = {"scale2.safetensors", "scale3.safetensors", "vqgan.safetensors"};
    for (int i = 0; i < 3; i++) {
        tiny_path(path, dir, files[i]);
        tiny_path(kept, dir, "kept");
        CHECK(rename(path, kept) == 0);
        CHECK_ERR(model_open(&m, dir, NULL), files[i]);
        CHECK(strstr(err_text(), "missing") != NULL);
        CHECK(rename(kept, path) == 0);
    }
    tiny_path(path, dir, "scale1.safetensors");
    CHECK(rename(path, kept) == 0);
    CHECK_ERR(model_open(&m, dir, NULL), "scale1.safetensors is missing");
    char ckpt[600];
    tiny_path(ckpt, dir, "scale1.ckpt");
    write_text(ckpt, "PK");
    CHECK_ERR(model_open(&m, dir, NULL), "it is truncated");
    write_text(path, "not a safetensors file");
    CHECK_ERR(model_open(&m, dir, NULL), "scale1.safetensors");
    CHECK(remove(path) == 0 && remove(ckpt) == 0 && rename(kept, path) == 0);
    CHECK_OK(model_open(&m, dir, NULL));
    model_close(&m);
    CHECK_ERR(model_open(&m, path, NULL), "is a file, expected a folder");
    CHECK_ERR(model_open(&m, "no-such-model", NULL), "no-such-model");
    CHECK_ERR(model_open(&m, "", NULL), "no such folder");
}

/* What model_memory foretells is what loading the largest scale and planning allocate. */
static void test_model_memory(const char *dir) {
    Model m;
    ModelMemory one, four, pictures;
    size_t weights = 0, plan = 0, decoder = 0;
    CHECK_OK(model_open(&m, dir, NULL));
    CHECK_OK(model_memory(&m, 1, 0, &one));
    CHECK_OK(model_memory(&m, 4, 0, &four));
    CHECK_OK(model_memory(&m, 4, 3, &pictures));
    CHECK(!m.net && !m.loaded); /* it loads nothing */
#ifndef PLAIN
    ModelMemory wide[WEIGHTS_BF16X3 + 1]; /* packed rows are multiples of 32 numbers: wider than the tiny model's */
    for (int t = 1; t <= m.schedule.T; t++) m.config[t].dim *= 8;
    for (int format = WEIGHTS_REAL; format <= WEIGHTS_BF16X3; format++) {
        m.weights = (WeightFormat)format;
        CHECK_OK(model_memory(&m, 1, 0, &wide[format]));
    }
    for (int t = 1; t <= m.schedule.T; t++) m.config[t].dim /= 8;
    m.weights = WEIGHTS_REAL;
    const size_t f32 = wide[WEIGHTS_REAL].scale, bf16 = wide[WEIGHTS_BF16].scale, int8 = wide[WEIGHTS_INT8].scale;
    CHECK(2 * bf16 >= f32 && bf16 < f32 && int8 < bf16 && wide[WEIGHTS_BF16X3].scale > bf16);
#else
    m.weights = WEIGHTS_BF16;
    CHECK_ERR(model_memory(&m, 1, 0, &one), "packed weights");
    m.weights = WEIGHTS_REAL;
    CHECK_OK(model_memory(&m, 1, 0, &one));
#endif
    for (int t = 1; t <= m.schedule.T; t++) {
        size_t bytes = 0;
        CHECK_OK(model_scale(&m, t));
        CHECK_OK(transformer_plan_bytes(m.net, 4, m.h * m.w, 0, &bytes));
        weights = max_size(weights, params_count(transformer_params(m.net)) * sizeof(real));
        plan = max_size(plan, bytes);
    }
    CHECK_OK(vqgan_plan_bytes(m.vqgan, 1, m.side, m.side, 0, &decoder));
    CHECK(four.scale == weights && four.activations == plan + decoder);
    CHECK(four.first_stage == params_count(vqgan_params(m.vqgan)) * sizeof(real));
    CHECK(four.total == four.first_stage + four.scale + four.activations);
    CHECK(one.scale == four.scale && one.activations < four.activations);
    CHECK(pictures.activations == four.activations + 3 * 3 * m.side * m.side * (sizeof(real) + 1));
    CHECK_ERR(model_memory(&m, 0, 0, &one), "batch of 0");
    int32_t tokens[N];
    sample_into(&m, tokens, 1, 0, NULL); /* measuring leaves a model that works */
    model_close(&m);
}

/* In an empty folder nothing is installed; with models/emoji there, the others are substituted by it. */
static void put_empty(const char *path) {
    FILE *f = fopen(path, "wb");
    CHECK(f && fclose(f) == 0);
}

/* models/ is looked for in $IMAGEBART_MODELS, then here, then beside the program, a name at a time. */
static void test_places(void) {
    char home[1024], path[PATH_BYTES], folder[PATH_BYTES], text[PLACES_BYTES], fetch[FETCH_BYTES];
    if (!CHECK(getcwd(home, sizeof home) && chdir(scratch) == 0)) return;
    CHECK(mkdir("chosen", 0777) == 0 && mkdir("chosen/emoji", 0777) == 0);
    CHECK(unsetenv("IMAGEBART_MODELS") == 0);
    CHECK(!models_find(path, "models/emoji") && !strcmp(path, "models/emoji")); /* nowhere: the usual name */
    CHECK(!strncmp(models_places(text), "models/ here, /", 15) && !models_place(folder, 0));
    CHECK(setenv("IMAGEBART_MODELS", "chosen", 1) == 0);
    CHECK_OK(models_check());
    CHECK(models_find(path, "models/emoji") && !strcmp(path, "chosen/emoji"));
    CHECK(models_place(folder, 0) && !strcmp(folder, "chosen") && !models_place(folder, 1));
    CHECK(!strncmp(models_places(text), "chosen, models/ here, /", 23));
    CHECK(mkdir("models", 0777) == 0 && mkdir("models/emoji", 0777) == 0 && mkdir("models/cats", 0777) == 0);
    CHECK(models_find(path, "models/emoji") && !strcmp(path, "chosen/emoji")); /* the chosen one first */
    CHECK(models_find(path, "models/cats") && !strcmp(path, "models/cats"));   /* what it lacks is here */
    CHECK(!strcmp(model_folder(path, "emoji"), "chosen/emoji") && !strcmp(model_folder(path, "runs/x"), "runs/x"));
    CHECK(setenv("IMAGEBART_MODELS", "models", 1) == 0);
    CHECK(models_place(folder, 0) && !models_place(folder, 1)); /* the same folder counts once */
    CHECK(!strncmp(models_places(text), "models/ here, /", 15));
    CHECK(setenv("IMAGEBART_MODELS", "", 1) == 0);
    CHECK_OK(models_check());
    CHECK(setenv("IMAGEBART_MODELS", "no/such", 1) == 0);
    CHECK_ERR(models_check(), "IMAGEBART_MODELS=no/such: no such folder");
    CHECK(unsetenv("IMAGEBART_MODELS") == 0);
    CHECK(!strcmp(models_fetch(fetch, "ffhq"), "make ffhq"));
    CHECK(rmdir("models/emoji") == 0 && rmdir("models/cats") == 0 && rmdir("models") == 0 && chdir(home) == 0);
}

static void test_named(void) {
    char home[1024], missing[32];
    size_t n;
    Model m;
    const NamedModel *list = named_models(&n), *substituted = list;
    if (!CHECK(n == 8 && getcwd(home, sizeof home) && chdir(scratch) == 0)) return;
    CHECK(!strcmp(list[0].name, "emoji") && !strcmp(list[7].zip, "cin_4_scales_geometric.zip"));
    for (size_t i = 1; i < n; i++) {
        Schedule s;
        CHECK_OK(schedule_make(&s, list[i].schedule, list[i].T));
        CHECK(model_files(missing, &list[i]) == 0 && !strcmp(missing, "scale1.ckpt"));
        char folder[200];
        snprintf(folder, sizeof folder, "models/%s", list[i].zip);
        folder[strlen(folder) - 4] = 0; /* .zip */
        CHECK(!strcmp(folder, list[i].folder));
    }
    CHECK_ERR(model_open(&m, "ffhq", &substituted), "bundled model is missing too");
    CHECK(substituted == NULL);
    CHECK_ERR(model_open(&m, "emoji", &substituted), "models/emoji");
    CHECK(mkdir("models", 0777) == 0);
    Tiny x = {3, 0, 0, 0, 0, X_PLAIN, 0};
    char dir[512];
    tiny_folder(dir, "models/emoji", &x);
    CHECK_OK(model_open(&m, "emoji", &substituted));
    CHECK(substituted == NULL && model_files(missing, &list[0]) == 4 && !*missing);
    model_close(&m);
    CHECK_OK(model_open(&m, "ffhq", &substituted));
    CHECK(substituted == &list[1] && !strcmp(m.folder, "models/emoji"));
    model_close(&m);
    CHECK_ERR(model_open(&m, "ffhq", NULL), "no folder models/ffhq_4_scales_geometric; \"make ffhq\" fetches it");
    CHECK_ERR(model_open(&m, "nothing", &substituted), "nothing");
    CHECK(mkdir("models/ffhq_2_scales_custom", 0777) == 0); /* there, but incomplete: said, not replaced */
    CHECK_ERR(model_open(&m, "ffhq2", &substituted), "scale1.ckpt is missing; \"make ffhq2\" fetches it");
    put_empty("models/ffhq_2_scales_custom/scale1.ckpt");
    CHECK(model_files(missing, &list[2]) == 1 && !strcmp(missing, "scale2.ckpt"));
    CHECK_ERR(model_open(&m, "ffhq2", &substituted), "scale2.ckpt is missing; \"make ffhq2\" fetches it");
    put_empty("models/ffhq_2_scales_custom/scale2.ckpt");
    CHECK(model_files(missing, &list[2]) == 2 && !*missing);
    CHECK_ERR(model_open(&m, "ffhq2", &substituted), "scale1.ckpt: is empty");
    put_empty(
        "models/ffhq_2_scales_custom/joint.safetensors"); /* a model of our own in the place of the official one */
    put_empty("models/ffhq_2_scales_custom/vqgan.safetensors");
    CHECK(model_files(missing, &list[2]) == 2 && !*missing);
    CHECK(remove("models/ffhq_2_scales_custom/vqgan.safetensors") == 0);
    CHECK(model_files(missing, &list[2]) == 2 && !*missing); /* the official files again */
    put_empty("models/ffhq.zip");
    CHECK_ERR(model_open(&m, "models/ffhq.zip", &substituted), "is a file, expected a folder");
    CHECK(remove("models/emoji/scale2.safetensors") == 0);
    CHECK(model_files(missing, &list[0]) == 3 && !strcmp(missing, "scale2.safetensors"));
    CHECK(chdir(home) == 0);
}

int main(void) {
    char dir[FOLDER_BYTES], plain[512], classes[512], labelled[512];
    if (!temporary_folder(dir)) return 1;
    scratch = dir;
    tiny_folder(plain, "plain", &(Tiny){3, 0, 0, 0, 0, X_PLAIN, 0});
    tiny_folder(classes, "classes", &(Tiny){3, 0, 1, 0, 0, X_FINE_SCALED, 0});
    tiny_folder(labelled, "labelled", &(Tiny){1, 0, 1, 0, 0, X_PLAIN, 0});
    test_class_bounds(labelled, classes);
    test_blind_bound(classes);
    test_familiar(classes);
    test_picture_bounds(labelled, 1);
    test_picture_bounds(classes, 1);
    test_picture_bounds(plain, 0);
    test_chain_rates(plain);
    test_sample_options(plain);
    test_ema();
    test_derived_tensors();
    test_classes(classes);
    test_broken();
    test_missing(plain);
    test_model_memory(plain);
    test_places();
    test_named();
    CHECK(remove_folder(dir) == 0);
    return test_report();
}
