/* test_diffusion.c - schedules against the official numbers, the chain against brute force, the draw of one token, and
 * whole models: tiny random ones written into a temporary folder. */
#ifndef PLAIN
#include "kernels/kernels.h"
enum { GUESSES = 1 };
#else
enum { GUESSES = 0 }; /* without kernels/ every pass feeds one position of each sample */
#endif
#include "test.h"

#include <float.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- schedules ---- */

/* The buffers of the official implementation (float32 printed as exact doubles). */
static const struct {
    const char *redraw_prob;
    int T;
    float beta[6], alpha[6], alphacum[6];
} official[] = {
    {"geometric", 2, {0.0f, 0.5f, 1.0f}, {1.0f, 0.5f, 0.0f}, {1.0f, 0.5f, 0.0f}},
    {"geometric",
     3,
     {0.0f, 0.3333333432674408f, 0.5f, 1.0f},
     {1.0f, 0.6666666269302368f, 0.5f, 0.0f},
     {1.0f, 0.6666666269302368f, 0.3333333134651184f, 0.0f}},
    {"geometric",
     4,
     {0.0f, 0.25f, 0.3333333432674408f, 0.5f, 1.0f},
     {1.0f, 0.75f, 0.6666666269302368f, 0.5f, 0.0f},
     {1.0f, 0.75f, 0.4999999701976776f, 0.2499999850988388f, 0.0f}},
    {"geometric",
     5,
     {0.0f, 0.20000000298023224f, 0.25f, 0.3333333432674408f, 0.5f, 1.0f},
     {1.0f, 0.800000011920929f, 0.75f, 0.6666666269302368f, 0.5f, 0.0f},
     {1.0f, 0.800000011920929f, 0.6000000238418579f, 0.3999999761581421f, 0.19999998807907104f, 0.0f}},
    {"ffhq_bernoulli_PSIM",
     2,
     {0.0f, 0.3639524579048157f, 1.0f},
     {1.0f, 0.6360475420951843f, 0.0f},
     {1.0f, 0.6360475420951843f, 0.0f}},
    {"bernoulli_PSIM",
     3,
     {0.0f, 0.1517287641763687f, 0.23063573241233826f, 1.0f},
     {1.0f, 0.8482712507247925f, 0.7693642377853394f, 0.0f},
     {1.0f, 0.8482712507247925f, 0.652629554271698f, 0.0f}},
    {"bernoulli_PSIM",
     5,
     {0.0f, 0.0901111289858818f, 0.1041797399520874f, 0.13920249044895172f, 0.2660215497016907f, 1.0f},
     {1.0f, 0.9098888635635376f, 0.8958202600479126f, 0.8607975244522095f, 0.7339784502983093f, 0.0f},
     {1.0f, 0.9098888635635376f, 0.8150968551635742f, 0.7016333937644958f, 0.5149837732315063f, 0.0f}},
    {"0.3",
     4,
     {0.0f, 0.30000001192092896f, 0.30000001192092896f, 0.30000001192092896f, 0.30000001192092896f},
     {1.0f, 0.699999988079071f, 0.699999988079071f, 0.699999988079071f, 0.699999988079071f},
     {1.0f, 0.699999988079071f, 0.4899999797344208f, 0.34299999475479126f, 0.2400999814271927f}},
    {"alphacum:1.0,0.7,0.3,0.0",
     3,
     {0.0f, 0.30000001192092896f, 0.5714285969734192f, 1.0f},
     {1.0f, 0.699999988079071f, 0.4285714030265808f, 0.0f},
     {1.0f, 0.699999988079071f, 0.29999998211860657f, 0.0f}},
};

static void test_official_schedules(void) {
    for (size_t i = 0; i < sizeof official / sizeof *official; i++) {
        Schedule s;
        CHECK_OK(schedule_make(&s, official[i].redraw_prob, official[i].T));
        CHECK(s.T == official[i].T);
        for (int t = 0; t <= s.T; t++)
            CHECK(s.beta[t] == official[i].beta[t] && s.alpha[t] == official[i].alpha[t] &&
                  s.alphacum[t] == official[i].alphacum[t]);
    }
}

static void test_schedule_errors(void) {
    Schedule s;
    CHECK_ERR(schedule_make(&s, "geometric", 0), "0 scales");
    CHECK_ERR(schedule_make(&s, "geometric", MAX_SCALES + 1), "65 scales");
    CHECK_ERR(schedule_make(&s, "1.5", 3), "beta_1");
    CHECK_ERR(schedule_make(&s, "-0.1", 3), "beta_1");
    CHECK_ERR(schedule_make(&s, "nan", 3), "beta_1");
    CHECK_ERR(schedule_make(&s, "0.3x", 3), "0.3x");
    CHECK_ERR(schedule_make(&s, "", 3), "expected geometric");
    CHECK_ERR(schedule_make(&s, "cosine", 3), "cosine");
    CHECK_ERR(schedule_make(&s, "bernoulli_PSIM", 4), "curve:");
    CHECK_ERR(schedule_make(&s, "alphacum:1,0.5,0", 3), "4 numbers");
    CHECK_ERR(schedule_make(&s, "alphacum:1,0.5,0.2,0,0", 3), "4 numbers");
    CHECK_ERR(schedule_make(&s, "alphacum:1,0.5,0.6,0", 3), "value 3");
    CHECK_ERR(schedule_make(&s, "alphacum:1,0,0,0", 3), "value 3");
    CHECK_ERR(schedule_make(&s, "alphacum:1,x,0,0", 3), "4 numbers");
    CHECK_ERR(schedule_make(&s, "curve:/no/such/file", 3), "/no/such/file");
    CHECK_ERR(schedule_make(&s, "curve:/dev/zero", 3), "is a device or a pipe");
}

static int betas_are(const Schedule *s, const double *beta) {
    for (int t = 1; t <= s->T; t++)
        if (!(fabs((double)s->beta[t] - beta[t - 1]) < 1e-6)) return 0;
    return 1;
}

static void write_text(const char *path, const char *text) {
    FILE *f = fopen(path, "w");
    if (!CHECK(f != NULL)) return;
    fputs(text, f);
    fclose(f);
}

/* The schedule of n points (alphacum, metric), which go through a file. */
static Err curve(Schedule *s, const char *dir, const double *alphacum, const double *metric, size_t n, int T) {
    char path[512], redraw[600], text[1024] = "";
    snprintf(path, sizeof path, "%s/points.txt", dir);
    snprintf(redraw, sizeof redraw, "curve:%s", path);
    for (size_t i = 0, at = 0; i < n; i++)
        at += (size_t)snprintf(text + at, sizeof text - at, "%.17g %.17g\n", alphacum[i], metric[i]);
    write_text(path, text);
    return schedule_make(s, redraw, T);
}

/* Three points worked out by hand: equal steps of the metric 0,1,2,3,4 cross the curve at alphacum 1, 5/6, 4/6, 1/2, 0,
 * so beta = 1/6, 1/5, 1/4, 1. Reversed, each change of sign is found from the other side. */
static void test_curve(const char *dir) {
    Schedule s;
    double a[] = {1, 0.5, 0}, m[] = {0, 3, 4}, ra[] = {0, 0.5, 1}, rm[] = {4, 3, 0};
    double beta[] = {1.0 / 6, 0.2, 0.25, 1}, wrong[] = {1.0 / 6, 0.2, 0.26, 1};
    CHECK_OK(curve(&s, dir, a, m, 3, 4));
    CHECK(betas_are(&s, beta));
    CHECK(!betas_are(&s, wrong));
    CHECK_OK(curve(&s, dir, ra, rm, 3, 4));
    CHECK(betas_are(&s, beta));
    double bent[] = {1, 0.8, 0.6, 0.4, 0}, bm[] = {0, 2, 1, 2, 4}; /* 2 is first reached at 0.8 */
    double bent_beta[] = {0.2, 1};
    CHECK_OK(curve(&s, dir, bent, bm, 5, 2));
    CHECK(betas_are(&s, bent_beta));
    double flat[] = {1, 1, 1}, hole[] = {0, NAN, 1}, up[] = {0.2, 0.5, 1};
    CHECK_ERR(curve(&s, dir, a, flat, 3, 2), "never crosses");
    CHECK_ERR(curve(&s, dir, a, hole, 3, 2), "point 2");
    CHECK_ERR(curve(&s, dir, up, m, 3, 2), "falling");
    CHECK_ERR(curve(&s, dir, a, m, 1, 2), "1 points");
}

static void test_curve_file(const char *dir) {
    Schedule s;
    char path[512], redraw[600];
    snprintf(path, sizeof path, "%s/curve.txt", dir);
    snprintf(redraw, sizeof redraw, "curve:%s", path);
    write_text(path, "# alphacum metric\n1 0\n\n  0.5\t3\n0 4");
    CHECK_OK(schedule_make(&s, redraw, 4));
    double beta[] = {1.0 / 6, 0.2, 0.25, 1};
    CHECK(betas_are(&s, beta));
    write_text(path, "1 0\n0.5 3 7\n0 4\n");
    CHECK_ERR(schedule_make(&s, redraw, 4), "line 2");
    write_text(path, "1 0\n0.5\n");
    CHECK_ERR(schedule_make(&s, redraw, 4), "line 2");
    write_text(path, "");
    CHECK_ERR(schedule_make(&s, redraw, 4), "curve.txt");
}

/* ---- forward and posterior ---- */

/* q(x_{t-1} = k | x_t, x_0) by Bayes from the K x K matrices of the steps. */
static double brute_force(const Schedule *s, size_t K, size_t x0, size_t xt, size_t k, int t) {
    double joint[8], sum = 0;
    for (size_t j = 0; j < K; j++) {
        double reach[8] = {0}, next[8] = {0};
        reach[x0] = 1;
        for (int u = 1; u < t; u++) {
            for (size_t b = 0; b < K; b++) {
                next[b] = 0;
                for (size_t a = 0; a < K; a++)
                    next[b] += reach[a] * ((a == b) * (double)s->alpha[u] + (1 - (double)s->alpha[u]) / (double)K);
            }
            memcpy(reach, next, sizeof next);
        }
        joint[j] = reach[j] * ((j == xt) * (double)s->alpha[t] + (1 - (double)s->alpha[t]) / (double)K);
        sum += joint[j];
    }
    return joint[k] / sum;
}

static double posterior_error(const Schedule *s, size_t K, int t, double *worst_sum) {
    int32_t x0[64] = {0}, xt[64] = {0};
    real q[8 * 64];
    double worst = 0;
    for (size_t r = 0; r < K * K; r++) x0[r] = (int32_t)(r / K), xt[r] = (int32_t)(r % K);
    posterior(q, x0, xt, K * K, K, s, t);
    for (size_t r = 0; r < K * K; r++) {
        double sum = 0;
        for (size_t k = 0; k < K; k++) {
            double d = fabs((double)q[r * K + k] - brute_force(s, K, r / K, r % K, k, t));
            if (!(d <= worst)) worst = d;
            sum += (double)q[r * K + k];
        }
        if (!(fabs(sum - 1) <= *worst_sum)) *worst_sum = fabs(sum - 1);
    }
    return worst;
}

static void test_posterior(void) {
    static const char *names[] = {"geometric", "0.3", "bernoulli_PSIM"};
    for (size_t i = 0; i < 3; i++)
        for (size_t K = 1; K <= 5; K += 1 + (K > 1)) { /* 1, 2, 4 */
            Schedule s;
            double sum = 0;
            CHECK_OK(schedule_make(&s, names[i], 5));
            for (int t = 1; t <= 5; t++) {
                CHECK(posterior_error(&s, K, t, &sum) < 1e-6);
                CHECK(sum < 1e-6);
            }
            if (K < 2) continue;
            Schedule wrong = s; /* the check sees a wrong schedule */
            wrong.alpha[3] *= 0.9f;
            double unused = 0;
            posterior_error(&wrong, K, 3, &unused);
            int32_t x0 = 0, xt = 1;
            real a[5], b[5];
            posterior(a, &x0, &xt, 1, K, &s, 3);
            posterior(b, &x0, &xt, 1, K, &wrong, 3);
            CHECK(fabs((double)(a[1] - b[1])) > 1e-4);
        }
}

/* t = 1 is exactly one-hot at x_0, whatever x_t; so is T = 1, where x_1 is pure noise. beta = 0 cannot give NaN. */
static void test_posterior_exact(void) {
    Schedule s;
    real q[7];
    for (int T = 1; T <= 3; T++) {
        CHECK_OK(schedule_make(&s, "geometric", T));
        for (int32_t xt = 0; xt < 7; xt++) {
            int32_t x0 = 4;
            posterior(q, &x0, &xt, 1, 7, &s, 1);
            for (int k = 0; k < 7; k++) CHECK(q[k] == (k == 4));
        }
    }
    CHECK_OK(schedule_make(&s, "0", 2));
    int32_t x0 = 2, xt = 3;
    posterior(q, &x0, &xt, 1, 7, &s, 1);
    for (int k = 0; k < 7; k++) CHECK(q[k] == (k == 2));
}

/* After t steps a token is still x_0 with probability alphacum_t + (1 - alphacum_t)/K and each other value equally
 * often: chi-square over the K values, 10 degrees of freedom, 35 is exceeded by chance once in 8,000. */
static double marginal_chi(const Schedule *s, double claimed, int t, size_t K, size_t n) {
    int32_t *x = NULL;
    size_t count[32] = {0}, outside = 0;
    CHECK_OK(mem_alloc(&x, n, sizeof *x, "test tokens"));
    for (size_t i = 0; i < n; i++) x[i] = 3;
    for (int u = 1; u <= t; u++) noise_step(x, n, K, s->beta[u], 11, rng_stream(RNG_TEST, (uint64_t)u, 0), 0);
    for (size_t i = 0; i < n; i++) {
        if (x[i] >= 0 && (size_t)x[i] < K)
            count[x[i]]++;
        else
            outside++;
    }
    free(x);
    CHECK(outside == 0);
    double chi = 0;
    for (size_t k = 0; k < K; k++) {
        double expected = (double)n * ((1 - claimed) / (double)K + (k == 3 ? claimed : 0));
        chi += ((double)count[k] - expected) * ((double)count[k] - expected) / expected;
    }
    return chi;
}

static void test_marginals(void) {
    Schedule s;
    CHECK_OK(schedule_make(&s, "geometric", 4));
    for (int t = 1; t <= 4; t++) {
        CHECK(marginal_chi(&s, (double)s.alphacum[t], t, 11, 40000) < 35);
        CHECK(!(marginal_chi(&s, fabs((double)s.alphacum[t] - 0.03), t, 11, 40000) < 35)); /* the check can fail */
    }
}

static void test_noise_step(void) {
    enum { N = 257, K = 5 };
    int32_t whole[N], parts[N], still[N], fresh[N];
    size_t counts[K] = {0};
    for (int i = 0; i < N; i++) whole[i] = parts[i] = still[i] = fresh[i] = 9;
    uint64_t stream = rng_stream(RNG_TEST, 0, 0);
    noise_step(whole, N, K, 0.5, 1, stream, 1000);
    noise_step(parts, 100, K, 0.5, 1, stream, 1000);
    noise_step(parts + 100, N - 100, K, 0.5, 1, stream, 1100);
    CHECK(!memcmp(whole, parts, sizeof whole)); /* token i is draw first+i */
    noise_step(still, N, K, 0, 1, stream, 0);
    noise_step(fresh, N, K, 1, 1, stream, 0);
    int kept = 1, all = 1;
    for (int i = 0; i < N; i++) {
        kept &= still[i] == 9;
        all &= fresh[i] >= 0 && fresh[i] < K;
        if (fresh[i] >= 0 && fresh[i] < K) counts[fresh[i]]++;
    }
    CHECK(kept && all);
    for (int k = 0; k < K; k++) CHECK(counts[k] > 20); /* 51 expected */
}

/* ---- one token ---- */

static void test_sample_probs(void) {
    real p[6], z[6] = {1, 3, 2, 3, -1, 2}, big = 1e30f;
    sample_probs(p, z, 6, -1, 1, 0);
    double sum = 0;
    for (int k = 0; k < 6; k++) sum += exp((double)z[k]);
    for (int k = 0; k < 6; k++) CHECK(fabs((double)p[k] - exp((double)z[k]) / sum) < 1e-6);
    sample_probs(p, z, 6, -1, 0.5, 0);
    CHECK(fabs((double)(p[2] / p[1]) - exp(-2)) < 1e-6);
    sample_probs(p, z, 6, -1, 1, 1); /* two share the largest value: both stay */
    CHECK(p[0] == 0 && p[1] == 0.5f && p[2] == 0 && p[3] == 0.5f && p[4] == 0 && p[5] == 0);
    sample_probs(p, z, 6, -1, 1, 3); /* third largest is 2, twice */
    CHECK(p[0] == 0 && p[2] > 0 && p[2] == p[5] && p[4] == 0);
    sample_probs(p, z, 6, -1, 1, 6);
    CHECK(p[4] > 0);
    sample_probs(p, z, 6, -1, 1, 1000); /* more than there are: no cut */
    CHECK(p[4] > 0);
    sample_probs(p, z, 6, 4, 0.7, 1); /* the guide beats everything */
    for (int k = 0; k < 6; k++) CHECK(p[k] == (k == 4));
    sample_probs(p, z, 6, -1, 0, 0); /* temperature 0: the first of the largest */
    for (int k = 0; k < 6; k++) CHECK(p[k] == (k == 1));
    real inf[6] = {-INFINITY, 2, -INFINITY, -INFINITY, 1, -INFINITY};
    sample_probs(p, inf, 6, -1, 1, 3); /* the third largest is -inf: nothing more is cut */
    CHECK(p[0] == 0 && p[2] == 0 && fabs((double)p[1] - 1 / (1 + exp(-1))) < 1e-6);
    real huge[6] = {big, big, -big, 0, 0, 0};
    sample_probs(p, huge, 6, -1, 1, 0);
    CHECK(p[0] == 0.5f && p[1] == 0.5f && p[3] == 0);
    z[2] = NAN;
    sample_probs(p, z, 6, -1, 1, 2);
    CHECK(sample_pick(p, 6, 0.3) == -1);
    real none[3] = {-INFINITY, -INFINITY, -INFINITY}, one = -7;
    sample_probs(p, none, 3, -1, 1, 2);
    CHECK(sample_pick(p, 3, 0.3) == -1);
    sample_probs(p, &one, 1, -1, 1, 1);
    CHECK(p[0] == 1);
}

static int falling(const void *a, const void *b) {
    real x = *(const real *)a, y = *(const real *)b;
    return (x < y) - (x > y);
}

/* top-k against a full sort, on values with many ties, for every k. */
static void test_top_k(void) {
    enum { K = 61 };
    real z[K], sorted[K], p[K];
    size_t wrong = 0;
    for (uint64_t round = 0; round < 200; round++) {
        for (uint64_t k = 0; k < K; k++) {
            z[k] = (real)rng_below(1, rng_stream(RNG_TEST, 7, round), k, round % 2 ? 9 : 1000) / 64;
            if (round % 3 == 0 && k % 5 == 1) z[k] = -INFINITY;
        }
        memcpy(sorted, z, sizeof z);
        qsort(sorted, K, sizeof *sorted, falling);
        size_t k = 1 + round % (K + 3);
        sample_probs(p, z, K, -1, 1, k);
        real least = k < K ? sorted[k - 1] : -INFINITY;
        for (int i = 0; i < K; i++) wrong += (p[i] > 0) != (z[i] >= least && z[i] > -INFINITY);
    }
    CHECK(wrong == 0);
}

static void test_sample_pick(void) {
    real p[5] = {0, 0.25f, 0, 0.75f, 0}, thirds[3], zero[3] = {0, 0, 0};
    CHECK(sample_pick(p, 5, 0) == 1);
    CHECK(sample_pick(p, 5, 0.2499) == 1);
    CHECK(sample_pick(p, 5, 0.25) == 3);
    CHECK(sample_pick(p, 5, 1 - DBL_EPSILON / 2) == 3); /* not the zero after it */
    for (int k = 0; k < 3; k++) thirds[k] = 0.333333f;  /* a sum rounded below 1 */
    CHECK(sample_pick(thirds, 3, 0.9999999999) == 2);
    CHECK(sample_pick(thirds, 3, 0.5) == 1);
    CHECK(sample_pick(zero, 3, 0.5) == -1);
    CHECK(sample_pick(zero, 0, 0.5) == -1);
}

/* ---- tiny models in a folder ---- */

typedef struct {
    int T, joint, classes; /* classes: class-conditional, names a, bee, bicycle */
    int ema;               /* add transformer_ema.* (others than transformer.*) */
    int flip;              /* 1: scale 2 says another number of scales; 2: another schedule; 3: another scale number;
                              4: a grid that does not fit; 5: no classes; 6: other token values; 7: NaN weights */
    XVariant variant;
    int null_class; /* the label that means none; 0: the model was trained without */
} Tiny;
enum { SIDE = 3, N = SIDE * SIDE, CODES = 13, USED = 7 };

static void tiny_path(char out[600], const char *dir, const char *name) {
    CHECK(snprintf(out, 600, "%s/%s", dir, name) < 600);
}

static void write_vqgan(const char *dir) {
    char path[600];
    VqganConfig c;
    Vqgan *v = NULL;
    Config meta = {0};
    TensorList list = {0};
    int64_t used[USED] = {1, 2, 4, 5, 8, 11, 12};
    size_t dim = USED;
    memset(&c, 0, sizeof c);
    c.ch = 32, c.levels = 2, c.ch_mult[0] = c.ch_mult[1] = 1, c.num_res_blocks = 1, c.resolution = 2 * SIDE;
    c.in_channels = c.out_ch = 3, c.z_channels = 4, c.embed_dim = 3, c.n_embed = CODES, c.re_embed = USED;
    c.legacy = 1, c.beta = 0.25, c.resamp_with_conv = 1;
    CHECK_OK(vqgan_create(&v, &c, 0));
    CHECK_OK(params_plan(vqgan_params(v), PLAN_VALUE));
    params_init(vqgan_params(v), 5);
    CHECK_OK(vqgan_config_write(&meta, &c, "model.params."));
    CHECK_OK(tensor_list_params(&list, vqgan_params(v), 'v', "", DT_F32));
    CHECK_OK(tensor_list_add(&list, "quantize.used", DT_I64, 1, &dim, used, 0));
    tiny_path(path, dir, "vqgan.safetensors");
    CHECK_OK(checkpoint_write(path, list.tensor, list.from_real, list.n, &meta));
    tensor_list_free(&list);
    config_free(&meta);
    vqgan_free(v);
}

static void tiny_net(NetConfig *c, const Tiny *x, int t) {
    memset(c, 0, sizeof *c);
    size_t values = x->flip == 6 && t == 2 ? USED + 1 : USED;
    size_t room = x->flip == 4 && t == 2 ? N - 1 : N;
    int has_class = x->classes && !(x->flip == 5 && t == 2);
    c->kind = !x->joint && t == x->T ? NET_GPT : NET_X;
    c->variant = x->variant;
    c->n_scales = x->T;
    c->has_class = has_class;
    c->dim = 8;
    c->dec_num_tokens = values;
    c->dec_depth = c->dec_heads = 1;
    c->dec_max_seq_len = c->kind == NET_X ? room : room + (size_t)has_class;
    c->enc_num_tokens = values + 1, c->enc_depth = c->enc_heads = 1, c->enc_max_seq_len = room + 1 + (size_t)has_class;
    c->input_vocab_size = USED + 1, c->n_unmasked = has_class ? 2 : 0;
}

/* Random weights, large enough that the network has opinions. */
static void opinionated(Params *p, uint64_t seed) {
    params_init(p, seed);
    for (size_t r = 0; r < p->n; r++)
        for (size_t i = 0; i < p->row[r].size; i++)
            if (p->row[r].ndim > 1) p->row[r].value[i] = (real)(0.7 * rng_normal(seed, rng_stream(RNG_TEST, r, 1), i));
}

static void tiny_meta(Config *meta, const Tiny *x, const NetConfig *c, int t) {
    int second = t == 2;
    CHECK_OK(net_config_write(meta, c, "model.params."));
    CHECK_OK(config_set(meta, "model.params.n_scales", "%d", x->T + (second && x->flip == 1)));
    if (!x->joint) CHECK_OK(config_set(meta, "model.params.single_scale", "%d", second && x->flip == 3 ? 1 : t));
    CHECK_OK(config_set(meta, "model.params.redraw_prob", "geometric"));
    CHECK_OK(config_set(meta, "imagebart.h", "%d", SIDE));
    CHECK_OK(config_set(meta, "imagebart.w", "%d", SIDE));
    if (x->classes) CHECK_OK(config_set(meta, "imagebart.classes", "a,bee,bicycle"));
    if (x->null_class) CHECK_OK(config_set(meta, "imagebart.null_class", "%d", x->null_class));
}

/* One transition's file; seed: other weights. */
static void write_scale(const char *dir, const char *name, const Tiny *x, int t, uint64_t seed) {
    char path[600];
    NetConfig c;
    Transformer *net = NULL;
    Config meta = {0};
    TensorList list = {0};
    Schedule s;
    int64_t sos = 0;
    size_t rows = (size_t)x->T + 1 + (x->flip == 1 && t == 2), one = 1;
    tiny_net(&c, x, t);
    tiny_meta(&meta, x, &c, t);
    CHECK_OK(transformer_create(&net, &c));
    Params *p = transformer_params(net);
    CHECK_OK(params_plan(p, PLAN_VALUE | PLAN_EMA));
    opinionated(p, seed);
    if (x->flip == 7 && t == 2) p->row[p->n - 1].value[0] = NAN;
    for (size_t r = 0; r < p->n; r++)
        for (size_t i = 0; i < p->row[r].size; i++) p->row[r].ema[i] = -p->row[r].value[i];
    CHECK_OK(schedule_make(&s, x->flip == 2 && t == 2 ? "0.3" : "geometric", (int)rows - 1));
    CHECK_OK(tensor_list_params(&list, p, x->ema ? 'e' : 'v', "transformer.", DT_F32));
    CHECK_OK(tensor_list_add(&list, "alphats", DT_F32, 1, &rows, s.alpha, 0));
    CHECK_OK(tensor_list_add(&list, "alphacum", DT_F32, 1, &rows, s.alphacum, 0));
    CHECK_OK(tensor_list_add(&list, "sos_token", DT_I64, 1, &one, &sos, 0));
    tiny_path(path, dir, name);
    CHECK_OK(checkpoint_write(path, list.tensor, list.from_real, list.n, &meta));
    tensor_list_free(&list);
    config_free(&meta);
    transformer_free(net);
}

static const char *scratch; /* the test's temporary folder */

static const char *tiny_folder(char dir[512], const char *name, const Tiny *x) {
    char file[64];
    snprintf(dir, 512, "%s/%s", scratch, name);
    if (!CHECK(mkdir(dir, 0777) == 0)) return dir;
    write_vqgan(dir);
    if (x->joint) write_scale(dir, "joint.safetensors", x, 1, 100);
    for (int t = 1; !x->joint && t <= x->T; t++) {
        snprintf(file, sizeof file, "scale%d.safetensors", t);
        write_scale(dir, file, x, t, 100 + (uint64_t)t);
    }
    return dir;
}

/* ---- sampling ---- */

enum { BATCH = 4 };

static Err model_sample(Model *m, const SampleOptions *o, int32_t *tokens) {
    const Chain c = model_chain(m);
    return sample_chain(&c, o, tokens);
}

static const int32_t batch_label[BATCH] = {2, 0, 1, 2};

static void batch_options(SampleOptions *o, const Model *m, size_t n, uint64_t first, void (*change)(SampleOptions *)) {
    sample_defaults(o);
    o->n = n, o->first = first, o->seed = 42;
    o->label = m->classes.n ? batch_label + first : NULL;
    if (change) change(o);
}

static void sample_into(Model *m, int32_t *tokens, size_t n, uint64_t first, void (*change)(SampleOptions *)) {
    SampleOptions o;
    batch_options(&o, m, n, first, change);
    CHECK_OK(model_sample(m, &o, tokens));
}

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
    SamplingArgs quiet = {.quiet = 1};
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
    familiar_warn(&quiet, &m, &f);
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
    ModelMemory bf16, int8;
    m.weights = WEIGHTS_BF16;
    CHECK_OK(model_memory(&m, 1, 0, &bf16));
    m.weights = WEIGHTS_INT8;
    CHECK_OK(model_memory(&m, 1, 0, &int8));
    m.weights = WEIGHTS_REAL;
    CHECK(2 * bf16.scale >= one.scale && bf16.scale < one.scale && int8.scale < bf16.scale);
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
    char dir[FOLDER_BYTES], command[FOLDER_BYTES + 8];
    if (!temporary_folder(dir)) return 1;
    scratch = dir;
    test_official_schedules();
    test_schedule_errors();
    test_curve(dir);
    test_curve_file(dir);
    test_posterior();
    test_posterior_exact();
    test_marginals();
    test_noise_step();
    test_sample_probs();
    test_top_k();
    test_sample_pick();
    char plain[600], classes[600], single[600], labelled[600], joint[600];
    tiny_path(labelled, dir, "labelled");
    tiny_path(single, dir, "single");
    tiny_path(plain, dir, "plain");
    tiny_path(classes, dir, "classes");
    test_same_tokens(&(Tiny){3, 0, 0, 0, 0, X_PLAIN, 0}, "plain"); /* scales 1, 2 NET_X, 3 NET_GPT */
    test_same_tokens(&(Tiny){3, 0, 1, 0, 0, X_FINE_SCALED, 0}, "classes");
    test_same_tokens(&(Tiny){4, 1, 1, 0, 0, X_RESIDUAL_SCALED, 0}, "joint");
    test_same_tokens(&(Tiny){2, 0, 0, 0, 0, X_RESIDUAL, 0}, "residual");
    test_same_tokens(&(Tiny){1, 0, 0, 0, 0, X_PLAIN, 0}, "single");
    test_same_tokens(&(Tiny){1, 0, 1, 0, 0, X_PLAIN, 0}, "labelled");
    test_oracle(&(Tiny){3, 0, 0, 0, 0, X_PLAIN, 0}, "plain");
    test_oracle(&(Tiny){3, 0, 1, 0, 0, X_FINE_SCALED, 0}, "classes");
    test_oracle(&(Tiny){4, 1, 1, 0, 0, X_RESIDUAL_SCALED, 0}, "joint");
    test_oracle(&(Tiny){2, 0, 0, 0, 0, X_RESIDUAL, 0}, "residual");
    test_guide(plain);
    test_known_blocks(plain);
    test_passes();
    test_plain_passes();
#ifndef PLAIN
    test_costs();
#endif
    test_joint();
    test_guided(&(Tiny){3, 0, 1, 0, 0, X_FINE_SCALED, NO_CLASS}, "guided", classes);
    test_oracle(&(Tiny){3, 0, 1, 0, 0, X_FINE_SCALED, NO_CLASS}, "guided");
    tiny_path(joint, dir, "joint");
    test_guided(&(Tiny){4, 1, 1, 0, 0, X_RESIDUAL_SCALED, NO_CLASS}, "guidedjoint", joint);
    test_guided_distribution();
    test_guidance_errors(plain, classes);
    test_candidates(single);
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
    snprintf(command, sizeof command, "rm -r %s", dir);
    CHECK(system(command) == 0);
    return test_report();
}
