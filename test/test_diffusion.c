/* test_diffusion.c - the chain against brute force: tokens that depend on neither batch, threads nor blocks, guidance, the
 * likeliest of several; with tiny random models in a temporary folder. */
#ifndef PLAIN
#include "kernels/kernels.h"
enum { GUESSES = 1 };
#else
enum { GUESSES = 0 }; /* without kernels/ every pass feeds one position of each sample */
#endif
#include "tiny.h"

#include <unistd.h>

/* ---- sampling ---- */

/* The chain once more, spelled out for one sample: each scale's file opened by hand, the whole prefix run for every
 * token. */
enum { NO_CLASS = 3 }; /* of guided models */

static void oracle_scale(int32_t *x, Transformer *net, const SampleOptions *o, const Schedule *s, int t,
                         int32_t label) {
    int32_t x_t[N], scale = t, none = NO_CLASS;
    real prob[USED], mixed[N * USED];
    const real *logits;
    for (size_t repeat = 0; repeat < o->chain[t]; repeat++) {
        uint64_t pass = ((uint64_t)t << 16) + repeat;
        double beta = (double)s->beta[t] * (1 - (double)repeat / (double)o->chain[t]);
        if (repeat > 0) noise_step(x, N, USED, beta, o->seed, rng_stream(RNG_RENOISE, pass, o->first), 0);
        memcpy(x_t, x, sizeof x_t);
        for (size_t i = 0; i < N; i++) {
            CHECK_OK(transformer_forward(net, x, x_t, &scale, &label, 1, N, &logits));
            memcpy(mixed, logits, sizeof mixed);
            if (o->guidance[t] != 1) CHECK_OK(transformer_forward(net, x, x_t, &scale, &none, 1, N, &logits));
            for (int k = 0; k < N * USED; k++) mixed[k] = logits[k] + (real)o->guidance[t] * (mixed[k] - logits[k]);
            sample_probs(prob, mixed + i * USED, USED, -1, o->temperature[t], o->top_k[t]);
            x[i] = sample_pick(prob, USED, rng_uniform(o->seed, rng_stream(RNG_SAMPLE, pass, o->first), i));
        }
    }
}

static void oracle(int32_t *x, const char *dir, const Tiny *model, const SampleOptions *o, int32_t label) {
    Schedule s;
    CHECK_OK(schedule_make(&s, "geometric", model->T));
    uint64_t start = rng_stream(RNG_START, 0, o->first);
    for (size_t i = 0; i < N; i++) x[i] = (int32_t)rng_below(o->seed, start, i, USED);
    for (int t = model->T; t >= 1; t--) {
        char file[64], path[600];
        Checkpoint ck = {0};
        NetConfig c;
        Transformer *net = NULL;
        snprintf(file, sizeof file, "scale%d.safetensors", t);
        tiny_path(path, dir, model->joint ? "joint.safetensors" : file);
        CHECK_OK(checkpoint_open(&ck, path));
        tiny_net(&c, model, t);
        CHECK_OK(transformer_create(&net, &c));
        CHECK_OK(params_plan(transformer_params(net), PLAN_VALUE));
        CHECK_OK(params_load(transformer_params(net), &ck, 'v', "transformer."));
        transformer_set_alphas(net, s.alpha);
        CHECK_OK(transformer_plan(net, 1, N, 0));
        oracle_scale(x, net, o, &s, t, label);
        transformer_free(net);
        checkpoint_close(&ck);
    }
}

/* The same as sample_into for a whole batch, by the oracle. */
static void oracle_into(const Tiny *x, const char *dir, const Model *m, int32_t *tokens,
                        void (*change)(SampleOptions *)) {
    for (uint64_t b = 0; b < BATCH; b++) {
        SampleOptions o;
        batch_options(&o, m, 1, b, change);
        oracle(tokens + b * N, dir, x, &o, batch_label[b]);
    }
}

static void set_seed(SampleOptions *o) {
    o->seed = 43;
}
static void set_heat(SampleOptions *o) {
    for (int t = 1; t < MAX_SCALES; t++) o->temperature[t] = 0.6, o->top_k[t] = 4, o->chain[t] = (size_t)(1 + t % 3);
}

static size_t block; /* of the next samples */

static void set_greedy(SampleOptions *o) {
    for (int t = 1; t < MAX_SCALES; t++) o->temperature[t] = 0, o->chain[t] = 2;
    o->block = block;
}
static void set_heat_block(SampleOptions *o) {
    set_heat(o);
    o->block = block;
}
static void set_block(SampleOptions *o) {
    o->block = block;
}

/* However positions are cut into blocks, the tokens are those of one by one: at temperature 1, at others with top-k and
 * chains, and greedily. */
static void test_same_blocks(const Tiny *x, const char *dir, Model *m) {
    static void (*const change[3])(SampleOptions *) = {set_block, set_heat_block, set_greedy};
    int32_t single[BATCH * N], again[BATCH * N];
    for (int k = 0; k < 3; k++) {
        block = 1;
        sample_into(m, single, BATCH, 0, change[k]);
        for (block = 0; block <= N + 1; block++) {
            sample_into(m, again, BATCH, 0, change[k]);
            CHECK(!memcmp(single, again, sizeof single));
        }
    }
    oracle_into(x, dir, m, again, set_greedy);
    CHECK(!memcmp(single, again, sizeof single));
}

/* The same tokens from one batch of four, four batches of one, two threads, and the oracle without a KV cache. */
static void test_same_tokens(const Tiny *x, const char *name) {
    char dir[512];
    Model m;
    int32_t all[BATCH * N], again[BATCH * N];
    CHECK_OK(model_open(&m, tiny_folder(dir, name, x), NULL));
    if (!CHECK(m.net == NULL && m.h == SIDE && m.w == SIDE && m.K == USED && m.side == 2 * SIDE)) return;
    threads_set(1);
    sample_into(&m, all, BATCH, 0, NULL);
    for (int i = 0; i < BATCH * N; i++)
        if (all[i] < 0 || all[i] >= USED) CHECK(0);
    for (uint64_t b = 0; b < BATCH; b++) sample_into(&m, again + b * N, 1, b, NULL);
    CHECK(!memcmp(all, again, sizeof all));
    threads_set(2);
    sample_into(&m, again, BATCH, 0, NULL);
    CHECK(!memcmp(all, again, sizeof all));
    oracle_into(x, dir, &m, again, NULL);
    CHECK(!memcmp(all, again, sizeof all));
    sample_into(&m, again, BATCH, 0, set_seed);
    CHECK(memcmp(all, again, sizeof all)); /* the comparison can fail */
    sample_into(&m, all, BATCH, 0, set_heat);
    CHECK(memcmp(all, again, sizeof all));
    oracle_into(x, dir, &m, again, set_heat);
    CHECK(!memcmp(all, again, sizeof all));
    for (uint64_t b = 0; b < BATCH; b++) sample_into(&m, again + b * N, 1, b, set_heat);
    CHECK(!memcmp(all, again, sizeof all));
    CHECK(memcmp(all, all + N, N * sizeof *all)); /* two samples differ */
    test_same_blocks(x, dir, &m);
    model_close(&m);
}

static void test_oracle(const Tiny *x, const char *name) {
    char dir[600];
    Model m;
    SampleOptions o;
    int32_t label = 1, got[N], want[N];
    tiny_path(dir, scratch, name);
    CHECK_OK(model_open(&m, dir, NULL));
    for (uint64_t sample = 5; sample < 15; sample++) {
        sample_defaults(&o);
        o.seed = 3, o.first = sample, o.label = m.classes.n ? &label : NULL;
        for (int t = 1; t <= x->T; t++)
            o.temperature[t] = 1 + 0.3 * t, o.top_k[t] = (size_t)(7 - t), o.chain[t] = 1 + t % 2;
        for (int t = 1; t <= x->T && x->null_class; t++) o.guidance[t] = t == 2 ? 1 : 0.5 * t + 1;
        CHECK_OK(model_sample(&m, &o, got));
        oracle(want, dir, x, &o, label);
        CHECK(!memcmp(got, want, sizeof got));
    }
    o.seed = 4;
    oracle(want, dir, x, &o, label);
    CHECK(memcmp(got, want, sizeof got));
    model_close(&m);
}

/* Known tokens stand in every scale's result; the rest is free. */
typedef struct {
    const int32_t *known;
    const uint8_t *keep;
    size_t n, scales, broken;
} Watch;

static void watch_scale(void *context, int t, const int32_t *tokens) {
    Watch *w = context;
    (void)t;
    w->scales++;
    for (size_t i = 0; i < w->n * N; i++) w->broken += w->keep[i % N] && tokens[i] != w->known[i];
}

static void test_guide(const char *dir) {
    Model m;
    SampleOptions o;
    int32_t known[BATCH * N], tokens[BATCH * N];
    uint8_t keep[N];
    CHECK_OK(model_open(&m, dir, NULL));
    for (int i = 0; i < BATCH * N; i++) known[i] = (i * 5) % USED;
    for (int i = 0; i < N; i++) keep[i] = i % 2 == 0;
    Watch w = {known, keep, BATCH, 0, 0};
    sample_defaults(&o);
    o.n = BATCH, o.known = known, o.keep = keep, o.scale_done = watch_scale, o.context = &w;
    o.chain[1] = 3, o.top_k[2] = 1;
    CHECK_OK(model_sample(&m, &o, tokens));
    CHECK(w.scales == (size_t)m.schedule.T + 1 && w.broken == 0);
    int32_t other[BATCH * N]; /* the watch sees a change */
    memcpy(other, tokens, sizeof other);
    other[2] = (other[2] + 1) % USED;
    watch_scale(&w, 1, other);
    CHECK(w.broken == 1);
    size_t same = 0;
    for (int i = 0; i < BATCH * N; i++) same += tokens[i] == known[i];
    CHECK(same < BATCH * N);                                /* the free ones are drawn */
    for (int t = 1; t <= m.schedule.T; t++) o.chain[t] = 0; /* every scale left out: x_T, with the known tokens */
    CHECK_OK(model_sample(&m, &o, tokens));
    for (int i = 0; i < BATCH * N; i++) {
        uint64_t stream = rng_stream(RNG_START, 0, (uint64_t)(i / N));
        int32_t start = (int32_t)rng_below(o.seed, stream, (uint64_t)(i % N), USED);
        CHECK(tokens[i] == (keep[i % N] ? known[i] : start));
    }
    o.known = NULL, o.keep = NULL;
    CHECK_ERR(model_sample(&m, &o, tokens), "a chain of 0 at scale 1, expected 1..");
    sample_defaults(&o);
    o.n = BATCH, o.known = known, o.keep = keep;
    known[0] = USED;
    CHECK_ERR(model_sample(&m, &o, tokens), "known token 7");
    o.keep = NULL;
    CHECK_ERR(model_sample(&m, &o, tokens), "go together");
    model_close(&m);
}

/* ---- blocks ---- */

/* Inpainting in blocks equals one by one, candidates and chains included; and takes the passes that it should. */
static void test_known_blocks(const char *dir) {
    Model m;
    int32_t known[BATCH * N], tokens[BATCH * N], single[BATCH * N];
    uint8_t keep[5][N] = {{1, 1, 1, 1, 0, 0, 0, 0, 0},
                          {0, 0, 0, 0, 1, 1, 1, 1, 1},
                          {1, 0, 0, 1, 1, 1, 0, 1, 1},
                          {1, 1, 1, 1, 1, 1, 1, 1, 0},
                          {0, 1, 1, 1, 1, 1, 1, 1, 1}};
    CHECK_OK(model_open(&m, dir, NULL));
    for (int i = 0; i < BATCH * N; i++) known[i] = (i * 5) % USED;
    for (int mask = 0; mask < 5; mask++)
        for (size_t M = 1; M <= 2; M++)
            for (size_t length = 0; length <= N; length++) {
                DraftCounts counts[MAX_SCALES + 1] = {{0}};
                SampleOptions o;
                sample_defaults(&o);
                o.n = BATCH, o.candidates = M, o.known = known, o.keep = keep[mask], o.counts = counts;
                o.chain[1] = 2, o.temperature[2] = 0.7, o.top_k[1] = 5, o.block = 1;
                size_t feeds = N; /* positions that have to be looked at */
                while (M == 1 && keep[mask][feeds - 1]) feeds--;
                CHECK_OK(model_sample(&m, &o, single));
                for (int t = 1; t <= 3; t++) CHECK(counts[t].passes == o.chain[t] * feeds);
                memset(counts, 0, sizeof counts);
                o.block = length;
                CHECK_OK(model_sample(&m, &o, tokens));
                CHECK(!memcmp(tokens, single, sizeof tokens));
                for (int t = 1; t <= 3; t++) CHECK(counts[t].tokens == BATCH * o.chain[t] * feeds);
                if (GUESSES && mask >= 3 &&
                    (length == 0 || length == N)) /* one unknown token: one pass, or it and what is behind */
                    for (int t = 1; t <= 3; t++)
                        CHECK(counts[t].passes <= o.chain[t] * (1 + (mask == 4 && M == 2)) && counts[t].passes > 0);
                if (GUESSES && mask == 0 && length == 0)
                    CHECK(counts[3].passes == 5 && counts[3].positions == BATCH * N);
            }
    model_close(&m);
}

/* A network that says what its residual says, p(x_t) = 0.8 + 0.2/K: what is drawn greedily is always x_t. */
static Transformer *echo(void) {
    Tiny x = {2, 0, 0, 0, 0, X_RESIDUAL, 0};
    const float alpha[] = {1, 0.8f, 0};
    NetConfig c;
    Transformer *net = NULL;
    tiny_net(&c, &x, 1);
    CHECK_OK(transformer_create(&net, &c));
    Params *p = transformer_params(net);
    CHECK_OK(params_plan(p, PLAN_VALUE));
    opinionated(p, 3);
    for (size_t r = p->n - 2; r < p->n; r++) memset(p->row[r].value, 0, p->row[r].size * sizeof(real));
    transformer_set_alphas(net, alpha);
    return net;
}

/* Without the seam's guesses: one position a pass, and the same tokens. */
static void test_plain_passes(void) {
    DraftCounts counts[MAX_SCALES + 1] = {{0}};
    SampleOptions o = {.n = BATCH, .candidates = 1, .seed = 1, .counts = counts};
    int32_t tokens[BATCH * N], start[BATCH * N];
    compute_plainly(1);
    Transformer *net = echo();
    for (int i = 0; i < BATCH * N; i++) start[i] = tokens[i] = (i * 3) % USED;
    CHECK_OK(sample_scale(net, &o, 1, 0, N, tokens));
    CHECK(!memcmp(tokens, start, sizeof tokens));
    CHECK(counts[1].passes == N && counts[1].positions == BATCH * N && counts[1].tokens == BATCH * N);
    CHECK(counts[1].tried == 0);
    transformer_free(net);
    compute_plainly(0);
}

#ifndef PLAIN
/* 3 positions for every byte of a weight from memory (12, 6, 3 for weights of 4, 2, 1 bytes); next to nothing from the
 * caches. */
static void test_costs(void) {
    double pass, each;
    Guesses g = {.reads = {1e6, 4e6, 1e5}, .rows = 1};
    guess_costs(&g, &pass, &each);
    CHECK(pass == 1 && each == 0);
    g.reads = (DecodeReads){1e7, 4e7, 1e5};
    guess_costs(&g, &pass, &each);
    CHECK(fabs(pass - 12) < 1e-9 && fabs(each - 0.03) < 1e-9);
    g.reads = (DecodeReads){1e7, 2e7, 2e5}, g.rows = 2;
    guess_costs(&g, &pass, &each);
    CHECK(fabs(pass - 3) < 1e-9 && fabs(each - 0.06) < 1e-9);
}
#endif

/* Right guesses are worth a pass each. */
static void test_passes(void) {
    Transformer *net = echo();
    for (size_t length = 0; length <= N; length++)
        for (int greedy = 1; greedy >= 0; greedy--) {
            DraftCounts counts[MAX_SCALES + 1] = {{0}};
            SampleOptions o = {.n = BATCH, .candidates = 1, .seed = 1, .block = length, .counts = counts};
            int32_t tokens[BATCH * N], start[BATCH * N];
            for (int i = 0; i < BATCH * N; i++) start[i] = tokens[i] = (i * 3) % USED;
            o.temperature[1] = greedy ? 0 : 1;
            CHECK_OK(sample_scale(net, &o, 1, 0, N, tokens));
            CHECK((memcmp(tokens, start, sizeof tokens) == 0) == greedy);
            CHECK(counts[1].tokens == BATCH * N && counts[1].tried == GUESSES * BATCH * N);
            size_t same = 0;
            for (int i = 0; i < BATCH * N; i++) same += tokens[i] == start[i];
            CHECK(counts[1].right == GUESSES * same);
            if (!GUESSES) continue;
            if (greedy && length > 0)
                CHECK(counts[1].passes == (N + length - 1) / length && counts[1].positions == BATCH * N);
            if (greedy && length == 0) CHECK(counts[1].passes < N);
            if (!greedy && length > 1) CHECK(counts[1].passes < N && counts[1].positions > BATCH * N);
        }
    transformer_free(net);
}

/* The whole joint distribution of three tokens of four values, enumerated with whole forward passes, against samples
 * drawn in blocks with temperature and top-k. */
enum { JOINT_N = 3, JOINT_K = 4, JOINT = JOINT_K * JOINT_K * JOINT_K, JOINT_BATCH = 1000, JOINT_ROUNDS = 40 };

static Transformer *joint_net(void) {
    Tiny x = {2, 0, 0, 0, 0, X_RESIDUAL_SCALED, 0};
    const float alpha[] = {1, 0.4f, 0};
    NetConfig c;
    Transformer *net = NULL;
    tiny_net(&c, &x, 1);
    c.dec_num_tokens = JOINT_K;
    CHECK_OK(transformer_create(&net, &c));
    CHECK_OK(params_plan(transformer_params(net), PLAN_VALUE));
    opinionated(transformer_params(net), 8);
    transformer_set_alphas(net, alpha);
    return net;
}

static void joint_exact(double p[JOINT], Transformer *net, const int32_t x_t[JOINT_N], double temperature,
                        size_t top_k) {
    int32_t x[JOINT * JOINT_N], all_x_t[JOINT * JOINT_N], scale[JOINT];
    const real *logits;
    for (int s = 0; s < JOINT; s++) {
        x[s * 3] = s / 16, x[s * 3 + 1] = s / 4 % 4, x[s * 3 + 2] = s % 4, scale[s] = 1;
        memcpy(all_x_t + s * 3, x_t, 3 * sizeof *x_t);
    }
    CHECK_OK(transformer_plan(net, JOINT, JOINT_N, 0));
    CHECK_OK(transformer_forward(net, x, all_x_t, scale, NULL, JOINT, JOINT_N, &logits));
    for (int s = 0; s < JOINT; s++) {
        p[s] = 1;
        for (int i = 0; i < JOINT_N; i++) {
            real prob[JOINT_K];
            sample_probs(prob, logits + (s * JOINT_N + i) * JOINT_K, JOINT_K, -1, temperature, top_k);
            p[s] *= (double)prob[x[s * 3 + i]];
        }
    }
}

static double joint_chi(const double count[JOINT], const double p[JOINT], size_t *cells) {
    double chi = 0, n = (double)JOINT_BATCH * JOINT_ROUNDS;
    *cells = 0;
    for (int s = 0; s < JOINT; s++) {
        if (p[s] == 0 && count[s] > 0) return HUGE_VAL;
        if (p[s] == 0) continue;
        chi += (count[s] - n * p[s]) * (count[s] - n * p[s]) / (n * p[s]);
        ++*cells;
    }
    return chi;
}

/* 26 degrees of freedom: 62 is exceeded by chance once in 10,000. */
static void test_joint(void) {
    const int32_t x_t[JOINT_N] = {2, 0, 3};
    Transformer *net = joint_net();
    double p[JOINT], other[JOINT];
    size_t cells, tried = 0, right = 0;
    joint_exact(p, net, x_t, 1.3, 3);
    joint_exact(other, net, x_t, 1.2, 3);
    for (size_t length = 0; length <= 3; length++) {
        double count[JOINT] = {0};
        static int32_t tokens[JOINT_BATCH * JOINT_N];
        DraftCounts counts[MAX_SCALES + 1] = {{0}};
        SampleOptions o = {.n = JOINT_BATCH, .candidates = 1, .seed = 2, .block = length, .counts = counts};
        o.temperature[1] = 1.3, o.top_k[1] = 3;
        for (uint64_t round = 0; round < JOINT_ROUNDS; round++) {
            o.first = round * JOINT_BATCH;
            for (int b = 0; b < JOINT_BATCH; b++) memcpy(tokens + b * 3, x_t, sizeof x_t);
            CHECK_OK(sample_scale(net, &o, 1, 0, JOINT_N, tokens));
            for (int b = 0; b < JOINT_BATCH; b++)
                count[tokens[b * 3] * 16 + tokens[b * 3 + 1] * 4 + tokens[b * 3 + 2]]++;
        }
        CHECK(joint_chi(count, p, &cells) < 62 && cells == 27);
        CHECK(!(joint_chi(count, other, &cells) < 62)); /* the check sees a temperature of 1.2 */
        tried = counts[1].tried, right = counts[1].right;
        if (GUESSES && length == 3)
            CHECK(counts[1].positions > counts[1].tokens + JOINT_BATCH); /* guesses were thrown away */
    }
    CHECK(!GUESSES ||
          (tried == (size_t)JOINT_BATCH * JOINT_ROUNDS * JOINT_N && right > tried / 5 && right < tried * 4 / 5));
    transformer_free(net);
}

/* ---- guidance ---- */

static void set_guided(SampleOptions *o) {
    for (int t = 1; t < MAX_SCALES; t++) o->guidance[t] = t == 2 ? 1 : 0.5 * t + 1; /* scale 2 is not guided */
    o->chain[1] = 2, o->temperature[3] = 0.8, o->block = block;
}
static void set_no_guidance(SampleOptions *o) {
    for (int t = 1; t < MAX_SCALES; t++) o->guidance[t] = 1;
    o->block = block;
}
static uint8_t guided_keep[N];
static int32_t guided_known[BATCH * N];
static void set_guided_known(SampleOptions *o) {
    set_guided(o);
    o->known = guided_known, o->keep = guided_keep, o->candidates = 2;
}

/* Guidance 1 is a model that knows nothing of it; others draw the same for any block, batch, number of threads, and
 * without a cache. */
static void test_guided(const Tiny *x, const char *name, const char *unguided) {
    char dir[512];
    Model m, plain;
    int32_t one[BATCH * N], all[BATCH * N], again[BATCH * N];
    static void (*const change[2])(SampleOptions *) = {set_guided, set_guided_known};
    CHECK_OK(model_open(&m, tiny_folder(dir, name, x), NULL));
    CHECK_OK(model_open(&plain, unguided, NULL));
    block = 0;
    sample_into(&plain, one, BATCH, 0, NULL);
    sample_into(&m, all, BATCH, 0, set_no_guidance);
    CHECK(!memcmp(one, all, sizeof all));
    for (int i = 0; i < N; i++) guided_keep[i] = i % 3 != 0;
    for (int i = 0; i < BATCH * N; i++) guided_known[i] = (i * 5) % USED;
    for (int k = 0; k < 2; k++) {
        block = 1;
        sample_into(&m, all, BATCH, 0, change[k]);
        CHECK(memcmp(one, all, sizeof all));
        for (block = 0; block <= N + 1; block++) {
            threads_set(1 + block % 2);
            sample_into(&m, again, BATCH, 0, change[k]);
            CHECK(!memcmp(all, again, sizeof all));
        }
        for (uint64_t b = 0; b < BATCH && k < 1; b++) sample_into(&m, again + b * N, 1, b, change[k]);
        CHECK(!memcmp(all, again, sizeof all));
        if (k == 0) oracle_into(x, dir, &m, again, change[k]);
        CHECK(!memcmp(all, again, sizeof all));
    }
    model_close(&m);
    model_close(&plain);
}

/* The first token of a model of one scale, against its exact distribution at guidance g; 6 degrees of freedom. */
static double guided_chi(Model *m, double g, double drawn_with) {
    enum { SAMPLES = 4000 };
    static int32_t tokens[SAMPLES * N], label[SAMPLES];
    int32_t x[N] = {0}, x_t[N] = {0}, scale = 1, with = 1, none = NO_CLASS;
    real cond[USED], mixed[USED], p[USED];
    double count[USED] = {0}, chi = 0;
    const real *logits;
    SampleOptions o;
    CHECK_OK(model_scale(m, 1));
    CHECK_OK(transformer_plan(m->net, 1, N, 0));
    CHECK_OK(transformer_forward(m->net, x, x_t, &scale, &with, 1, N, &logits));
    memcpy(cond, logits, sizeof cond);
    CHECK_OK(transformer_forward(m->net, x, x_t, &scale, &none, 1, N, &logits));
    for (int k = 0; k < USED; k++) mixed[k] = logits[k] + (real)g * (cond[k] - logits[k]);
    sample_probs(p, mixed, USED, -1, 1, 0);
    sample_defaults(&o);
    for (int b = 0; b < SAMPLES; b++) label[b] = with;
    o.n = SAMPLES, o.label = label, o.seed = 9, o.guidance[1] = drawn_with;
    CHECK_OK(model_sample(m, &o, tokens));
    for (int b = 0; b < SAMPLES; b++) count[tokens[b * N]]++;
    for (int k = 0; k < USED; k++) chi += pow(count[k] - SAMPLES * (double)p[k], 2) / (SAMPLES * (double)p[k]);
    return chi;
}

static void test_guided_distribution(void) {
    char dir[512];
    Model m;
    CHECK_OK(model_open(&m, tiny_folder(dir, "guided1", &(Tiny){1, 0, 1, 0, 0, X_PLAIN, NO_CLASS}), NULL));
    CHECK(guided_chi(&m, 1.5, 1.5) < 28);
    CHECK(guided_chi(&m, 0, 0) < 28); /* without a class */
    CHECK(!(guided_chi(&m, 1, 1.5) < 28) && !(guided_chi(&m, 1.5, 1) < 28));
    model_close(&m);
}

static void test_guidance_errors(const char *plain, const char *classes) {
    char dir[512];
    Model m;
    SampleOptions o;
    int32_t tokens[N], label = 0;
    CHECK_OK(model_open(&m, classes, NULL));
    sample_defaults(&o);
    CHECK(sampling_rows(&o, m.schedule.T, 5) == 5);
    o.label = &label, o.guidance[2] = 3;
    CHECK(sampling_rows(&o, m.schedule.T, 5) == 10);
    CHECK_ERR(model_sample(&m, &o, tokens), "guidance 3 at scale 2: ");
    CHECK_ERR(model_sample(&m, &o, tokens), "--label-dropout");
    o.guidance[2] = -1;
    CHECK_ERR(model_sample(&m, &o, tokens), "guidance -1 of scale 2");
    o.guidance[2] = NAN;
    CHECK_ERR(model_sample(&m, &o, tokens), "of scale 2");
    model_close(&m);
    CHECK_OK(model_open(&m, plain, NULL));
    sample_defaults(&o);
    o.guidance[1] = 2;
    CHECK_ERR(model_sample(&m, &o, tokens), "not a model with classes");
    model_close(&m);
    CHECK_ERR(model_open(&m, tiny_folder(dir, "guided9", &(Tiny){1, 0, 1, 0, 0, X_PLAIN, USED + 1}), NULL),
              "imagebart.null_class");
}

/* One scale, x_0[1] known, x_0[0] asked: p(x_0[0] | x_0[1]) is proportional to p(x_0[0]) p(x_0[1] | x_0[0]), which
 * takes a forward pass for each value. The guide alone draws from p(x_0[0]), candidates from the former. */
static void exact_first_token(Model *m, double p[USED], double guided[USED], int32_t known) {
    int32_t tokens[USED * N] = {0}, x_t[USED * N] = {0}, scale[USED];
    const real *logits;
    real prob[USED];
    double sum = 0;
    for (int k = 0; k < USED; k++) tokens[k * N] = k, tokens[k * N + 1] = known, scale[k] = 1;
    CHECK_OK(model_scale(m, 1));
    CHECK_OK(transformer_plan(m->net, USED, N, 0));
    CHECK_OK(transformer_forward(m->net, tokens, x_t, scale, NULL, USED, N, &logits));
    for (int k = 0; k < USED; k++) {
        sample_probs(prob, logits + k * N * USED, USED, -1, 1, 0);
        guided[k] = (double)prob[k];
        sample_probs(prob, logits + (k * N + 1) * USED, USED, -1, 1, 0);
        sum += p[k] = guided[k] * (double)prob[known];
    }
    for (int k = 0; k < USED; k++) p[k] /= sum;
}

static double first_token_chi(Model *m, const double p[USED], int32_t value, size_t groups, size_t M) {
    SampleOptions o;
    int32_t *tokens = NULL, *known = NULL;
    uint8_t keep[N] = {0, 1};
    double count[USED] = {0}, chi = 0;
    CHECK_OK(mem_alloc(&tokens, groups * M * N, sizeof *tokens, "test"));
    CHECK_OK(mem_alloc(&known, groups * M * N, sizeof *known, "test"));
    for (size_t b = 0; b < groups * M; b++) known[b * N + 1] = value;
    sample_defaults(&o);
    o.n = groups * M, o.candidates = M, o.known = known, o.keep = keep;
    CHECK_OK(model_sample(m, &o, tokens));
    for (size_t g = 0; g < groups; g++) {
        CHECK(tokens[g * M * N + 1] == value);
        count[tokens[g * M * N]]++;
    }
    for (int k = 0; k < USED; k++) chi += pow(count[k] - (double)groups * p[k], 2) / ((double)groups * p[k]);
    free(tokens), free(known);
    return chi;
}

/* 6 degrees of freedom: 28 is exceeded by chance once in 10,000. */
static void test_candidates(const char *dir) {
    Model m;
    SampleOptions o;
    int32_t tokens[BATCH * N], value = 0;
    double p[USED], guided[USED];
    CHECK_OK(model_open(&m, dir, NULL));
    exact_first_token(&m, p, guided, value);
    CHECK(first_token_chi(&m, p, value, 1000, 100) < 28);
    CHECK(first_token_chi(&m, guided, value, 1000, 1) < 28);
    CHECK(!(first_token_chi(&m, p, value, 1000, 1) < 28)); /* the check can fail */
    sample_defaults(&o);
    o.n = BATCH, o.candidates = 3;
    CHECK_ERR(model_sample(&m, &o, tokens), "groups of 3");
    o.candidates = 0;
    CHECK_ERR(model_sample(&m, &o, tokens), "groups of 0");
    model_close(&m);
}

int main(void) {
    char dir[FOLDER_BYTES], plain[600], classes[600], single[600], joint[600];
    const Tiny three = {3, 0, 0, 0, 0, X_PLAIN, 0}; /* scales 1, 2 NET_X, 3 NET_GPT */
    const Tiny fine = {3, 0, 1, 0, 0, X_FINE_SCALED, 0}, together = {4, 1, 1, 0, 0, X_RESIDUAL_SCALED, 0},
               residual = {2, 0, 0, 0, 0, X_RESIDUAL, 0}, guided = {3, 0, 1, 0, 0, X_FINE_SCALED, NO_CLASS};
    if (!temporary_folder(dir)) return 1;
    scratch = dir;
    tiny_path(single, dir, "single");
    tiny_path(plain, dir, "plain");
    tiny_path(classes, dir, "classes");
    tiny_path(joint, dir, "joint");
    test_same_tokens(&three, "plain");
    test_same_tokens(&fine, "classes");
    test_same_tokens(&together, "joint");
    test_same_tokens(&residual, "residual");
    test_same_tokens(&(Tiny){1, 0, 0, 0, 0, X_PLAIN, 0}, "single");
    test_same_tokens(&(Tiny){1, 0, 1, 0, 0, X_PLAIN, 0}, "labelled");
    test_oracle(&three, "plain");
    test_oracle(&fine, "classes");
    test_oracle(&together, "joint");
    test_oracle(&residual, "residual");
    test_guide(plain);
    test_known_blocks(plain);
    test_passes();
    test_plain_passes();
#ifndef PLAIN
    test_costs();
#endif
    test_joint();
    test_guided(&guided, "guided", classes);
    test_oracle(&guided, "guided");
    test_guided(&(Tiny){4, 1, 1, 0, 0, X_RESIDUAL_SCALED, NO_CLASS}, "guidedjoint", joint);
    test_guided_distribution();
    test_guidance_errors(plain, classes);
    test_candidates(single);
    CHECK(remove_folder(dir) == 0);
    return test_report();
}
