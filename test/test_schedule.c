/* test_schedule.c - schedules against the official numbers; noise and posterior against sums over every token; the
 * draw of one token. */
#include "test.h"

#include <float.h>

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

int main(void) {
    char dir[FOLDER_BYTES];
    if (!temporary_folder(dir)) return 1;
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
    CHECK(remove_folder(dir) == 0);
    return test_report();
}
