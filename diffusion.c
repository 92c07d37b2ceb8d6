/* diffusion.c - the Markov chain over tokens, forward and backward.
 *
 * Forward, a token grid x_0 is destroyed in T steps: at step t each token becomes, with probability beta_t, a uniform
 * one. Backward, the transition of scale t draws x_{t-1} from x_t, token by token. This file owns the schedules beta_t,
 * the forward step, the posterior q(x_{t-1} | x_t, x_0) that training aims at, the draw of one token (temperature,
 * top-k, guide), and the sampling of a whole chain with its forward-backward repeats. The networks are transformer.cu's
 * and vqgan.c's; model.c finds and reads them; training is train.c's.
 *
 * It refuses: schedules whose betas leave [0,1], options that a model cannot follow, networks that answer with NaN.
 *
 * Every random number is a Philox draw named by (seed, purpose, scale and repeat, sample number, position): tokens
 * depend on neither the batch a sample is in nor the number of threads.
 *
 * Read: schedules; forward and posterior; one token; sampling a chain; which class?
 *
 * Paper section 3, SPEC sections 3 and 5.
 */
#include "sampling/sampling.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Schedules --------------------------------------------------------------------------------------------- */

/* From s->beta to alpha and alphacum as the official float32 buffers: differences round to float, the running product
 * is kept in double and rounded at each t. */
Err schedule_from_betas(Schedule *s, int T) {
    double product = 1;
    s->T = T;
    s->beta[0] = 0;
    s->alpha[0] = s->alphacum[0] = 1;
    for (int t = 1; t <= T; t++) {
        if (!(s->beta[t] >= 0 && s->beta[t] <= 1)) return err("schedule: beta_%d is %g, expected 0..1", t, s->beta[t]);
        s->alpha[t] = 1 - s->beta[t];
        product *= s->alpha[t];
        s->alphacum[t] = (float)product;
    }
    return OK;
}

static int sign(double y) {
    return (y > 0) - (y < 0);
}

/* Where a curve first takes a value, in file order: linear interpolation at the first change of sign of y = metric -
 * value. Changes from and to zero count; y_i = 0 then gives alphacum_i itself, the quotient being infinite. */
static Err curve_crossing(double *out, const double *alphacum, const double *metric, size_t n, double value) {
    for (size_t i = 0; i + 1 < n; i++) {
        double a = metric[i] - value, b = metric[i + 1] - value;
        if (sign(a) == sign(b)) continue;
        double ratio = a == 0 ? HUGE_VAL : fabs(b / a);
        *out = alphacum[i] + (alphacum[i + 1] - alphacum[i]) / (ratio + 1);
        return OK;
    }
    return err("schedule: the metric curve never crosses %g", value);
}

Err schedule_from_curve(Schedule *s, const double *alphacum, const double *metric, size_t n, int T) {
    if (T < 1 || T > MAX_SCALES) return err("schedule: %d scales, expected 1..%d", T, MAX_SCALES);
    if (n < 2) return err("schedule: a metric curve of %zu points, expected at least 2", n);
    double lo = HUGE_VAL, hi = -HUGE_VAL;
    for (size_t i = 0; i < n; i++) {
        if (!(alphacum[i] >= 0 && alphacum[i] <= 1) || !isfinite(metric[i]))
            return err("schedule: point %zu of the metric curve is (%g, %g), expected alphacum in 0..1 and a number",
                       i + 1, alphacum[i], metric[i]);
        lo = metric[i] < lo ? metric[i] : lo;
        hi = metric[i] > hi ? metric[i] : hi;
    }
    double step = (hi - lo) / T, before = 0;
    for (int t = 0; t <= T; t++) {
        double a = 0;
        TRY(curve_crossing(&a, alphacum, metric, n, t == T ? hi : t * step + lo));
        if (t > 0 && !(before > 0 && a <= before))
            return err("schedule: the metric curve gives alphacum %g after %g, expected falling values", a, before);
        if (t > 0) s->beta[t] = (float)(1 - a / before);
        before = a;
    }
    return schedule_from_betas(s, T);
}

/* A text file of two columns, alphacum and metric; empty lines and lines after # are skipped. */
static Err curve_read(double *alphacum, double *metric, size_t *n, size_t max, const char *path) {
    FILE *f = fopen(path, "r");
    if (!f) return err("%s: %s", path, strerror(errno));
    char line[512], tail;
    Err e = OK;
    *n = 0;
    for (size_t number = 1; e == OK && fgets(line, sizeof line, f); number++) {
        size_t start = strspn(line, " \t\r\n");
        if (line[start] == 0 || line[start] == '#') continue;
        if (*n == max)
            e = err("%s: more than %zu points", path, max);
        else if (sscanf(line, "%lf %lf %c", &alphacum[*n], &metric[*n], &tail) != 2)
            e = err("%s: line %zu is not two numbers", path, number);
        else
            ++*n;
    }
    if (e == OK && ferror(f)) e = err("%s: %s", path, strerror(errno));
    fclose(f);
    return e;
}

static Err schedule_curve_file(Schedule *s, const char *path, int T) {
    enum { POINTS = 4096 };
    double *points;
    size_t n;
    TRY(mem_alloc(&points, 2 * POINTS, sizeof *points, "a metric curve"));
    Err e = curve_read(points, points + POINTS, &n, POINTS, path);
    if (e == OK && schedule_from_curve(s, points, points + POINTS, n, T) != OK) e = err_in(path);
    free(points);
    return e;
}

/* "alphacum:a0,a1,...,aT": alpha_t = a_t / a_{t-1}. */
static Err schedule_alphacum(Schedule *s, const char *list, int T) {
    double before = 0;
    const char *p = list;
    for (int t = 0; t <= T; t++) {
        char *end;
        double a = strtod(p, &end);
        if (end == p || *end != (t < T ? ',' : 0))
            return err("schedule alphacum:%s: expected %d numbers for %d scales", list, T + 1, T);
        if (!(a >= 0 && a <= 1) || (t > 0 && !(before > 0 && a <= before)))
            return err("schedule alphacum:%s: value %d is %g, expected numbers that fall from 1 to 0", list, t + 1, a);
        if (t > 0) s->beta[t] = (float)(1 - a / before);
        before = a;
        p = end + 1;
    }
    return schedule_from_betas(s, T);
}

/* The metric-spaced schedules of the released models, betas as their checkpoints hold them. */
static const struct {
    const char *name;
    int T;
    float beta[5];
} released[] = {
    {"ffhq_bernoulli_PSIM", 2, {0.3639524579048157f, 1}},
    {"bernoulli_PSIM", 3, {0.1517287641763687f, 0.23063573241233826f, 1}},
    {"bernoulli_PSIM", 5, {0.0901111289858818f, 0.1041797399520874f, 0.13920249044895172f, 0.2660215497016907f, 1}},
};

static Err schedule_released(Schedule *s, const char *name, int T) {
    int known = 0;
    for (size_t i = 0; i < sizeof released / sizeof *released; i++) {
        if (strcmp(name, released[i].name) != 0) continue;
        known = 1;
        if (released[i].T != T) continue;
        for (int t = 1; t <= T; t++) s->beta[t] = released[i].beta[t - 1];
        return schedule_from_betas(s, T);
    }
    if (known)
        return err("schedule %s with %d scales is not one of the released models; give its metric as curve:FILE", name,
                   T);
    return err("schedule \"%.200s\": expected geometric, a probability, alphacum:a0,a1,..., curve:FILE, "
               "ffhq_bernoulli_PSIM or bernoulli_PSIM",
               name);
}

Err schedule_make(Schedule *s, const char *redraw_prob, int T) {
    memset(s, 0, sizeof *s);
    if (T < 1 || T > MAX_SCALES) return err("schedule: %d scales, expected 1..%d", T, MAX_SCALES);
    if (strcmp(redraw_prob, "geometric") == 0) {
        for (int t = 1; t <= T; t++) s->beta[t] = (float)(1.0 / (T - t + 1));
        return schedule_from_betas(s, T);
    }
    if (strncmp(redraw_prob, "alphacum:", 9) == 0) return schedule_alphacum(s, redraw_prob + 9, T);
    if (strncmp(redraw_prob, "curve:", 6) == 0) return schedule_curve_file(s, redraw_prob + 6, T);
    char *end;
    double p = strtod(redraw_prob, &end);
    if (end == redraw_prob || *end != 0) return schedule_released(s, redraw_prob, T);
    for (int t = 1; t <= T; t++) s->beta[t] = (float)p;
    return schedule_from_betas(s, T);
}

/* ---- Forward and posterior --------------------------------------------------------------------------------- */

void noise_step(int32_t *x, size_t n, size_t K, double beta, uint64_t seed, uint64_t stream, uint64_t first) {
    for (size_t i = 0; i < n; i++) {
        uint32_t r[4];
        philox(r, seed, stream, first + i);
        double u = unit_of_bits(r[0], r[1]);
        if (u < beta) x[i] = (int32_t)((unsigned __int128)((uint64_t)r[2] << 32 | r[3]) * K >> 64);
    }
}

void noise_chain(int32_t *x_prev, int32_t *x_t, const int32_t *x0, size_t n, size_t K, const Schedule *s, int t,
                 uint64_t seed, uint64_t micro, uint64_t first) {
    memcpy(x_t, x0, n * sizeof *x_t);
    for (int i = 1; i <= t; i++) {
        memcpy(x_prev, x_t, n * sizeof *x_t);
        noise_step(x_t, n, K, s->beta[i], seed, rng_stream(RNG_NOISE, (uint64_t)i, micro), first);
    }
}

/* One row takes at most three values: at x_0, at x_t, elsewhere. */
static void posterior_row(real *q, size_t x0, size_t xt, size_t K, double A, double a) {
    double far0 = (1 - A) / (double)K, fart = (1 - a) / (double)K;
    double rest = far0 * fart, at0 = (A + far0) * fart, att = far0 * (a + fart);
    if (x0 == xt) at0 = att = (A + far0) * (a + fart);
    double sum = x0 == xt ? (double)(K - 1) * rest + at0 : (double)(K - 2) * rest + at0 + att;
    if (!(sum > 0)) { /* x_t cannot come from x_0 (beta_t = 0): only x_0 is left to aim at */
        rest = att = 0;
        at0 = sum = 1;
    }
    for (size_t k = 0; k < K; k++) q[k] = (real)(rest / sum);
    q[xt] = (real)(att / sum);
    q[x0] = (real)(at0 / sum);
}

typedef struct {
    real *q;
    const int32_t *x0, *xt;
    size_t K;
    double A, a;
} PosteriorRows;

static void posterior_task(void *context, size_t r) {
    const PosteriorRows *p = (const PosteriorRows *)context;
    posterior_row(p->q + r * p->K, (size_t)p->x0[r], (size_t)p->xt[r], p->K, p->A, p->a);
}

void posterior(real *q, const int32_t *x0, const int32_t *xt, size_t R, size_t K, const Schedule *s, int t) {
    PosteriorRows rows = {q, x0, xt, K, s->alphacum[t - 1], s->alpha[t]};
    parallel_for(R * K > 65536 ? threads_free() : 1, R, posterior_task, &rows);
}

/* ---- One token --------------------------------------------------------------------------------------------- */

/* The rank-th largest (rank >= 1) of z (n), which is reordered. No NaN in z. */
static real select_largest(real *z, size_t n, size_t rank) {
    size_t lo = 0, hi = n - 1, want = rank - 1;
    while (lo < hi) {
        real pivot = z[lo + (hi - lo) / 2];
        size_t i = lo, j = hi;
        for (;;) { /* Hoare: z[lo..j] >= pivot >= z[j+1..hi] */
            while (z[i] > pivot) i++;
            while (z[j] < pivot) j--;
            if (i >= j) break;
            real swap = z[i];
            z[i++] = z[j];
            z[j--] = swap;
        }
        if (want <= j)
            hi = j;
        else
            lo = j + 1;
    }
    return z[want];
}

static void one_hot(real *prob, size_t K, size_t k) {
    memset(prob, 0, K * sizeof *prob);
    prob[k] = 1;
}

void sample_probs(real *prob, const real *logits, size_t K, int32_t guide, double temperature, size_t top_k) {
    real largest = -(real)HUGE_VAL, heat = (real)temperature;
    size_t argmax = 0;
    for (size_t k = 0; k < K; k++) {
        if (isnan(logits[k])) { /* nothing can be drawn from these: sample_pick gives -1 */
            for (size_t j = 0; j < K; j++) prob[j] = (real)NAN;
            return;
        }
        if (logits[k] > largest) largest = logits[argmax = k];
    }
    if (guide >= 0 || temperature == 0) {
        one_hot(prob, K, guide >= 0 ? (size_t)guide : argmax);
        return;
    }
    real least = -(real)HUGE_VAL;
    if (top_k > 0 && top_k < K) {
        for (size_t k = 0; k < K; k++) prob[k] = logits[k] / heat;
        least = select_largest(prob, K, top_k);
    }
    double sum = 0;
    largest /= heat;
    for (size_t k = 0; k < K; k++) {
        real z = logits[k] / heat;
        prob[k] = z < least ? 0 : (real)exp((double)(z - largest));
        sum += (double)prob[k];
    }
    for (size_t k = 0; k < K; k++) prob[k] = (real)((double)prob[k] / sum);
}

int32_t sample_pick(const real *prob, size_t K, double u) {
    double below = 0;
    int32_t last = -1; /* what u next to 1 falls on when the sum is rounded below it */
    for (size_t k = 0; k < K; k++) {
        if (!(prob[k] > 0)) continue;
        below += (double)prob[k];
        last = (int32_t)k;
        if (below > u) break;
    }
    return last;
}

/* ---- Sampling a chain -------------------------------------------------------------------------------------- */

enum { MAX_CHAIN = 65535 }; /* repeats share 24 bits of the stream's name with t */

/* A sample in a pass, and how well its tokens could be guessed lately, where x_t and what came of the pass before are
 * the same and where they differ. */
typedef struct {
    size_t at;           /* the position whose turn it is */
    size_t first, cells; /* of the block: positions at.. */
    double chance;       /* that the last of them will be of use */
    double gain;         /* tokens that the block may be expected to give */
    size_t best;         /* cells of the best choice so far */
    double same_tried, same_right, differ_tried, x_t_right, before_right;
    size_t tried, right; /* guesses of this block */
} Row;

/* Samples on their way down the scales: the options, the network of the present scale and the buffers. */
typedef struct {
    Model *m; /* NULL for a single scale */
    Transformer *net;
    const SampleOptions *o;
    size_t N, K;
    int32_t *tokens;  /* (n,N) the caller's: x_{t-1} as it grows */
    size_t rows;      /* of the network's batch: n, or 2n at a guided scale: samples with their class, then with none */
    int32_t *x_t;     /* (rows,N) */
    int32_t *before;  /* (n,N) what this scale drew the last time, before it was noised again; the first time x_t */
    int32_t *scale;   /* (rows) */
    int32_t *label;   /* (rows), guided */
    int32_t *prefix;  /* (rows,N), guided and uncached */
    real *mixed;      /* (n,K) guided logits */
    real *prob;       /* (n,K) */
    double *fit;      /* (n) log probability of the known tokens in this pass */
    Row *row;         /* (n) */
    DecodeCell *cell; /* (rows*min(N,DECODE_BLOCK)) a block */
    double pass_cost, sample_cost; /* see transformer_pass_cost */
    size_t end;                    /* positions from here on are known and nobody asks for their probability */
} Run;

void sample_defaults(SampleOptions *o, const Model *m) {
    memset(o, 0, sizeof *o);
    o->n = o->candidates = 1;
    for (int t = 0; t <= m->schedule.T; t++) {
        o->temperature[t] = o->guidance[t] = 1;
        o->chain[t] = 1;
    }
}

size_t sample_rows(const SampleOptions *o, const Model *m, size_t n) {
    for (int t = 1; t <= m->schedule.T; t++)
        if (o->guidance[t] != 1) return 2 * n;
    return n;
}

/* Classifier-free guidance (Ho and Salimans 2022): at such a scale every sample is fed twice, with its class and with
 * "no class", and drawn from uncond + g (cond - uncond). */
static int is_guided(const Run *r, int t) {
    return r->m && r->o->guidance[t] != 1;
}

static Err check_guidance(const Model *m, const SampleOptions *o, int t) {
    const double g = o->guidance[t];
    if (g == 1) return OK;
    if (!(g >= 0) || !isfinite(g)) return err("guidance %g of scale %d, expected 0 or more", g, t);
    if (!m->n_classes) return err("guidance %g at scale %d: %s is not a model with classes", g, t, m->folder);
    if (m->null_class[t] < 0)
        return err(
            "guidance %g at scale %d: %s was trained without \"no class\" (./train --label-dropout 0.1), expected "
            "--guidance 1",
            g, t, m->folder);
    return OK;
}

static Err check_options(const Model *m, const SampleOptions *o) {
    if (o->n < 1 || o->n > UINT32_MAX || o->first > UINT32_MAX - o->n)
        return err("sampling: %zu samples from number %llu on, expected at least 1 and numbers below 2^32", o->n,
                   (unsigned long long)o->first);
    for (int t = 1; t <= m->schedule.T; t++) {
        if (!(o->temperature[t] >= 0) || !isfinite(o->temperature[t]))
            return err("sampling: temperature %g of scale %d, expected 0 or more", o->temperature[t], t);
        TRY(check_guidance(m, o, t));
        size_t least = o->known ? 0 : 1;
        if (o->chain[t] < least || o->chain[t] > MAX_CHAIN)
            return err("sampling: a chain of %zu at scale %d, expected %zu..%d", o->chain[t], t, least, MAX_CHAIN);
    }
    if (m->n_classes && !o->label) return err("sampling: %s needs a class for each sample", m->folder);
    if (!m->n_classes && o->label) return err("sampling: %s is not a model with classes", m->folder);
    for (size_t b = 0; o->label && b < o->n; b++)
        if (o->label[b] < 0 || (size_t)o->label[b] >= m->n_classes)
            return err("sampling: class %d, expected 0..%zu", (int)o->label[b], m->n_classes - 1);
    if (o->candidates < 1 || o->n % o->candidates)
        return err("sampling: %zu samples in groups of %zu candidates", o->n, o->candidates);
    if (!o->known != !o->keep) return err("sampling: known tokens and their mask go together");
    for (size_t i = 0, N = m->h * m->w; o->known && i < o->n * N; i++)
        if (o->keep[i % N] && (o->known[i] < 0 || (size_t)o->known[i] >= m->K))
            return err("sampling: known token %d, expected 0..%zu", (int)o->known[i], m->K - 1);
    return OK;
}

/* x_T: uniform tokens, known ones in their places (SPEC 5). */
static void start_tokens(const Run *r) {
    for (size_t b = 0; b < r->o->n; b++)
        for (size_t i = 0; i < r->N; i++) {
            uint64_t stream = rng_stream(RNG_START, 0, r->o->first + b);
            int keep = r->o->known && r->o->keep[i];
            r->tokens[b * r->N + i] =
                keep ? r->o->known[b * r->N + i] : (int32_t)rng_below(r->o->seed, stream, i, (uint32_t)r->K);
        }
}

static uint64_t pass_stream(RngPurpose purpose, int t, size_t repeat, uint64_t sample) {
    return rng_stream(purpose, (uint64_t)t << 16 | repeat, sample);
}

/* Between repeats the tokens, known ones too, go part of the way forward again: beta_t fades to nothing over the
 * chain (SPEC 5). */
static void renoise(const Run *r, int t, size_t repeat) {
    double beta = (1 - (double)repeat / (double)r->o->chain[t]) * (double)r->m->schedule.beta[t];
    for (size_t b = 0; b < r->o->n; b++)
        noise_step(r->tokens + b * r->N, r->N, r->K, beta, r->o->seed,
                   pass_stream(RNG_RENOISE, t, repeat, r->o->first + b), 0);
}

/* Less work, exactly. A pass of the decoder over several positions of a sample costs little more than over one, but
 * each position needs the token in front of it. Some of those are known (inpainting), and the others can be guessed:
 * scales differ by little noise, so x_t is a good draft of x_{t-1}; so is, in a chain, what the pass before made of the
 * same picture, before some noise went into it. Whichever of the two has been right more often is taken where they
 * differ.
 *
 * Speculative decoding (Leviathan et al. 2023; Chen et al. 2023) accepts a draft d of distribution q with probability
 * min(1, p(d)/q(d)), else it draws from the rest max(0, p - q), normalised; that leaves the model's distribution p as
 * it is. Here q is all on one token, so the rule reads: keep d with probability p(d), else draw from p without d. That
 * is the same as to draw from p, and see whether it is d. So every token is drawn just as without drafts, temperature,
 * top-k, guide and random number included; if it is the guess, the next position's logits are there already, else the
 * rest of the block is thrown away and fed again. The logits have the bits of single steps (decode.cu), so not only the
 * distribution but every token is the same, whatever the blocks. Each sample goes on at its own pace. */

/* What is guessed counts as tried so often, and to be right at first this often, before there is more to go by. */
static const double TRIED_BEFORE = 4, RIGHT_BEFORE = 0.75;

static int is_known(const Run *r, size_t i) {
    return r->o->known && r->o->keep[i];
}

/* The token expected at position i. */
static int32_t guess_of(const Run *r, size_t b, size_t i) {
    const Row *row = &r->row[b];
    if (is_known(r, i)) return r->o->known[b * r->N + i];
    return row->before_right > row->x_t_right ? r->before[b * r->N + i] : r->x_t[b * r->N + i];
}

/* Last scales guess nothing: they do not look at x_t. */
static int guesses(const Run *r) {
    return transformer_config(r->net)->kind == NET_X;
}

/* That the token at position i is what is guessed. */
static double chance_of(const Run *r, size_t b, size_t i) {
    const Row *row = &r->row[b];
    if (is_known(r, i)) return 1;
    if (!guesses(r)) return 0;
    if (r->x_t[b * r->N + i] == r->before[b * r->N + i]) return row->same_right / row->same_tried;
    return fmax(row->x_t_right, row->before_right) / row->differ_tried;
}

/* One more cell, if there is room and any chance that it is of use. */
static int extend(const Run *r, size_t b) {
    Row *row = &r->row[b];
    const size_t next = row->at + row->cells, most = r->o->block ? r->o->block : DECODE_BLOCK;
    if (row->cells == 0 || next == r->end || row->cells >= min_size(most, DECODE_BLOCK) || r->o->uncached) return 0;
    const double chance = row->chance * chance_of(r, b, next - 1);
    if (!(chance > 0.01)) return 0;
    row->chance = chance, row->gain += chance;
    row->cells++;
    return 1;
}

/* Passes that a sample takes to its end, if all go as this one is expected to. */
static double passes_left(const Run *r, const Row *row) {
    return row->cells > 0 ? (double)(r->end - row->at) / row->gain : 0;
}

/* What is left to do, in cells; *longest = passes of the sample that takes most. */
static double cost_left(const Run *r, double *longest) {
    double cost = 0;
    *longest = 0;
    for (size_t b = 0; b < r->o->n; b++) {
        const double passes = passes_left(r, &r->row[b]);
        cost += passes * (r->sample_cost + (double)r->row[b].cells);
        *longest = fmax(*longest, passes);
    }
    return cost + r->pass_cost * *longest;
}

/* Cells for the samples that would take longest, again and again; the cheapest of all that are met on the way stays, or
 * the last if the length is given. A choice that no clock has a part in. */
static void choose_lengths(const Run *r) {
    enum { ROUNDS_WITHOUT_GAIN = 4 };
    double longest, least = cost_left(r, &longest);
    for (size_t b = 0; b < r->o->n; b++) r->row[b].best = r->row[b].cells;
    for (int rounds = 0, more = 1; more && rounds < ROUNDS_WITHOUT_GAIN; rounds++) {
        more = 0;
        for (size_t b = 0; b < r->o->n; b++)
            if (r->o->block > 0 || passes_left(r, &r->row[b]) > 0.9 * longest) more |= extend(r, b);
        const double cost = cost_left(r, &longest);
        if (cost >= least && r->o->block == 0) continue;
        least = cost, rounds = -1;
        for (size_t b = 0; b < r->o->n; b++) r->row[b].best = r->row[b].cells;
    }
    for (size_t b = 0; b < r->o->n; b++) r->row[b].cells = r->row[b].best;
}

/* What is fed with position i: what is drawn there already, else what is expected. */
static int32_t token_before(const Run *r, size_t b, size_t i) {
    if (i == 0) return 0; /* not looked at */
    return i == r->row[b].at ? r->tokens[b * r->N + i - 1] : guess_of(r, b, i - 1);
}

/* The next block: every sample's next position, what is sure behind it, and guesses as far as they pay off. */
static size_t choose_block(const Run *r) {
    size_t cells = 0;
    for (size_t b = 0; b < r->o->n; b++) {
        Row *row = &r->row[b];
        row->cells = row->at < r->end;
        row->chance = row->gain = 1, row->tried = row->right = 0;
        for (int more = r->o->block != 1 && row->cells > 0; more;)
            more = is_known(r, row->at + row->cells - 1) && extend(r, b);
    }
    if (r->o->block != 1) choose_lengths(r);
    for (size_t b = 0; b < r->o->n; b++) {
        Row *row = &r->row[b];
        row->first = cells;
        for (size_t i = row->at; i < row->at + row->cells; i++)
            r->cell[cells++] = (DecodeCell){b, i, token_before(r, b, i)};
    }
    return cells;
}

/* Logits of the block's cells. Uncached, every sample's whole prefix is run again: (n,N,K). Guided, those without a
 * class follow. */
static Err block_logits(const Run *r, size_t cells, const real **logits) {
    const size_t n = r->o->n;
    const int guided = r->rows > n;
    if (!r->o->uncached) {
        for (size_t c = 0; c < cells && guided; c++)
            r->cell[cells + c] = (DecodeCell){n + r->cell[c].b, r->cell[c].i, r->cell[c].prev};
        return transformer_decode_block(r->net, r->cell, guided ? 2 * cells : cells, logits);
    }
    for (size_t b = 0; b < r->rows && guided; b++)
        memcpy(r->prefix + b * r->N, r->tokens + b % n * r->N, r->N * sizeof *r->tokens);
    return transformer_forward(r->net, guided ? r->prefix : r->tokens, r->x_t, r->scale,
                               guided ? r->label : r->o->label, r->rows, r->N, logits);
}

/* mixed (K) = uncond + g (cond - uncond) */
static void mix_logits(real *mixed, const real *cond, const real *uncond, size_t K, double g) {
    for (size_t k = 0; k < K; k++) mixed[k] = uncond[k] + (real)g * (cond[k] - uncond[k]);
}

/* log softmax(logits)[k] */
static double log_prob(const real *logits, size_t K, size_t k) {
    double largest = -HUGE_VAL, sum = 0;
    for (size_t j = 0; j < K; j++) /* fmax here breaks gcc 12 on Arm: internal compiler error */
        if ((double)logits[j] > largest) largest = (double)logits[j];
    for (size_t j = 0; j < K; j++) sum += exp((double)logits[j] - largest);
    return (double)logits[k] - largest - log(sum);
}

/* A block's tokens, from the logits of its cells. */
typedef struct {
    const Run *r;
    const real *logits, *uncond; /* NULL: no guidance */
    size_t repeat;
    int t;
    double temperature;
} Draw;

/* at: of the position's logits */
static int32_t draw_token(const Draw *d, size_t b, size_t i, size_t at) {
    const Run *r = d->r;
    const SampleOptions *o = r->o;
    const real *logits = d->logits + at;
    if (d->uncond) {
        mix_logits(r->mixed + b * r->K, logits, d->uncond + at, r->K, o->guidance[d->t]);
        logits = r->mixed + b * r->K;
    }
    real *prob = r->prob + b * r->K;
    int32_t known = is_known(r, i) ? o->known[b * r->N + i] : -1;
    if (o->candidates > 1 && known >= 0) r->fit[b] += log_prob(logits, r->K, (size_t)known);
    sample_probs(prob, logits, r->K, known, d->temperature, o->top_k[d->t]);
    return sample_pick(prob, r->K, rng_uniform(o->seed, pass_stream(RNG_SAMPLE, d->t, d->repeat, o->first + b), i));
}

/* What the drawn token says about the guesses at its place. */
static void judge(const Run *r, Row *row, size_t b, size_t i) {
    const size_t at = b * r->N + i;
    const int32_t token = r->tokens[at];
    if (is_known(r, i) || !guesses(r)) return;
    row->tried++, row->right += token == guess_of(r, b, i);
    if (r->x_t[at] == r->before[at])
        row->same_tried++, row->same_right += token == r->x_t[at];
    else
        row->differ_tried++, row->x_t_right += token == r->x_t[at], row->before_right += token == r->before[at];
}

/* A sample's positions in turn, up to the first that is not as the next cell was told: its logits are for another
 * prefix. */
static void draw_task(void *context, size_t b) {
    const Draw *d = (const Draw *)context;
    const Run *r = d->r;
    Row *row = &r->row[b];
    for (size_t c = row->first, end = c + row->cells; c < end; c++) {
        const size_t i = row->at++, at = b * r->N + i;
        r->tokens[at] = draw_token(d, b, i, (r->o->uncached ? at : c) * r->K);
        judge(r, row, b, i);
        if (c + 1 < end && r->tokens[at] != r->cell[c + 1].prev) break;
    }
}

static double temperature_of(const Run *r, int t) {
    int official_one = r->o->official_temperature && transformer_config(r->net)->kind == NET_X; /* SPEC 1.11 */
    return official_one ? 1 : r->o->temperature[t];
}

static Err draw_block(Run *r, const real *logits, size_t cells, int t, size_t repeat) {
    const SampleOptions *o = r->o;
    const real *uncond = r->rows > o->n ? logits + (o->uncached ? o->n * r->N : cells) * r->K : NULL;
    Draw d = {r, logits, uncond, repeat, t, temperature_of(r, t)};
    size_t least = r->N, tried = 0, right = 0, before = 0, after = 0;
    for (size_t b = 0; b < o->n; b++) before += r->row[b].at;
    parallel_for(threads_free(), o->n, draw_task, &d);
    for (size_t b = 0; b < o->n; b++) {
        const size_t at = r->row[b].at;
        if (at > 0 && r->tokens[b * r->N + at - 1] < 0)
            return err("scale %d gives no usable probabilities (NaN or infinite logits) at position %zu", t, at - 1);
        least = min_size(least, at < r->end ? at : r->N);
        after += at, tried += r->row[b].tried, right += r->row[b].right;
    }
    if (o->counts) {
        DraftCounts *n = &o->counts[t];
        n->passes++, n->cells += cells, n->tokens += after - before, n->tried += tried, n->right += right;
    }
    return o->progress && o->progress(o->context, t, repeat, least, r->N) ? err("sampling was stopped") : OK;
}

/* What was learnt before counts as a few tokens. */
static void start_row(Row *row) {
    const double same = row->same_tried > 0 ? row->same_right / row->same_tried : RIGHT_BEFORE;
    const double differ = row->differ_tried > 0 ? TRIED_BEFORE / row->differ_tried : 0;
    row->at = 0;
    row->same_tried = TRIED_BEFORE, row->same_right = same * TRIED_BEFORE;
    row->x_t_right = differ > 0 ? row->x_t_right * differ : TRIED_BEFORE / 2;
    row->before_right = differ > 0 ? row->before_right * differ : TRIED_BEFORE / 2;
    row->differ_tried = TRIED_BEFORE;
}

/* What must be fed: all, unless only known tokens are left and candidates do not ask how likely they are. */
static void start_pass(Run *r, int t) {
    const SampleOptions *o = r->o;
    for (size_t b = 0; b < r->rows; b++) {
        memcpy(r->x_t + b * r->N, r->tokens + b % o->n * r->N, r->N * sizeof *r->tokens);
        r->scale[b] = t;
        if (r->rows > o->n) r->label[b] = b < o->n ? o->label[b] : r->m->null_class[t];
    }
    memset(r->fit, 0, o->n * sizeof *r->fit);
    for (size_t b = 0; b < o->n; b++) start_row(&r->row[b]);
    transformer_pass_cost(r->net, r->N, &r->pass_cost, &r->sample_cost);
    r->pass_cost *= (double)o->n / (double)r->rows; /* in pairs of cells */
    r->end = r->N;
    while (o->candidates <= 1 && r->end > 0 && is_known(r, r->end - 1)) r->end--;
    for (size_t k = 0; k < o->n * r->N; k++)
        if (k % r->N >= r->end) r->tokens[k] = o->known[k];
}

/* All positions drawn where the network is, on the GPU. */
typedef struct {
    const Run *r;
    int t;
    size_t repeat;
} PassReport;
static int report_pass(void *context, size_t done) {
    const PassReport *p = (const PassReport *)context;
    const SampleOptions *o = p->r->o;
    return o->progress ? o->progress(o->context, p->t, p->repeat, done, p->r->N) : 0;
}

static Err draw_on_gpu(const Run *r, int t, size_t repeat) {
    const SampleOptions *o = r->o;
    PassReport report = {r, t, repeat};
    uint64_t *stream;
    TRY(mem_alloc(&stream, o->n, sizeof *stream, "random streams"));
    for (size_t b = 0; b < o->n; b++) stream[b] = pass_stream(RNG_SAMPLE, t, repeat, o->first + b);
    const DrawOptions d = {.seed = o->seed,
                           .stream = stream,
                           .temperature = temperature_of(r, t),
                           .guided = r->rows > o->n,
                           .guidance = o->guidance[t],
                           .top_k = o->top_k[t],
                           .known = o->known,
                           .keep = o->keep,
                           .fit = o->known && o->candidates > 1 ? r->fit : NULL,
                           .progress = report_pass,
                           .context = &report};
    const Err e = transformer_draw_cuda(r->net, &d, r->tokens);
    free(stream);
    return e;
}

static Err check_drawn(const Run *r, int t, size_t i) {
    for (size_t b = 0; b < r->o->n; b++)
        if (r->tokens[b * r->N + i] < 0)
            return err("scale %d gives no usable probabilities (NaN or infinite logits) at position %zu", t, i);
    return OK;
}

/* tokens: x_t in, x_{t-1} out. */
static Err sample_pass(Run *r, int t, size_t repeat) {
    const SampleOptions *o = r->o;
    start_pass(r, t);
    const int32_t *label = r->rows > o->n ? r->label : o->label;
    if (!o->uncached) TRY(transformer_decode_begin(r->net, r->x_t, r->scale, label, r->rows, r->N));
    if (!o->uncached && transformer_on_cuda(r->net)) {
        TRY(draw_on_gpu(r, t, repeat));
        for (size_t i = 0; i < r->N; i++) TRY(check_drawn(r, t, i));
        return OK;
    }
    for (size_t cells; (cells = choose_block(r)) > 0;) {
        const real *logits;
        TRY(block_logits(r, cells, &logits));
        TRY(draw_block(r, logits, cells, t, repeat));
    }
    return OK;
}

/* Each group of candidates is drawn anew from itself, in proportion to exp(fit). */
static void choose_candidates(const Run *r, int t, size_t repeat) {
    size_t M = r->o->candidates, N = r->N;
    memcpy(r->x_t, r->tokens, r->o->n * N * sizeof *r->tokens);
    for (size_t g = 0; g < r->o->n; g += M) {
        double best = -HUGE_VAL, sum = 0;
        for (size_t j = g; j < g + M; j++) best = fmax(best, r->fit[j]);
        for (size_t j = g; j < g + M; j++) sum += r->fit[j] = exp(r->fit[j] - best);
        for (size_t j = g; j < g + M; j++) {
            double u = rng_uniform(r->o->seed, pass_stream(RNG_CHOOSE, t, repeat, r->o->first + j), 0) * sum;
            size_t from = g;
            while (from + 1 < g + M && u >= r->fit[from]) u -= r->fit[from++];
            memcpy(r->tokens + j * N, r->x_t + from * N, N * sizeof *r->tokens);
        }
    }
}

static Err sample_scales(Run *r) {
    const SampleOptions *o = r->o;
    start_tokens(r);
    if (o->scale_done) o->scale_done(o->context, r->m->schedule.T + 1, r->tokens);
    for (int t = r->m->schedule.T; t >= 1; t--) {
        memset(r->row, 0, o->n * sizeof *r->row);
        r->rows = is_guided(r, t) ? 2 * o->n : o->n;
        if (o->chain[t] > 0) {
            TRY(model_scale(r->m, t));
            r->net = r->m->net;
            TRY(transformer_plan(r->net, r->rows, r->N, 0));
        }
        for (size_t repeat = 0; repeat < o->chain[t]; repeat++) {
            memcpy(r->before, r->tokens, o->n * r->N * sizeof *r->before);
            if (repeat > 0) renoise(r, t, repeat);
            TRY(sample_pass(r, t, repeat));
            if (o->candidates > 1) choose_candidates(r, t, repeat);
        }
        if (o->scale_done) o->scale_done(o->context, t, r->tokens);
    }
    return OK;
}

static Err run_buffers(Run *r) {
    const size_t n = r->o->n, rows = r->m ? sample_rows(r->o, r->m, n) : n;
    size_t nN, nK;
    TRY(size_mul(&nN, n, r->N));
    TRY(size_mul(&nK, n, r->K));
    r->rows = n; /* of a scale that is not guided */
    TRY(mem_alloc(&r->x_t, rows * r->N, sizeof *r->x_t, "tokens of a batch"));
    TRY(mem_alloc(&r->label, rows, sizeof *r->label, "labels of a batch"));
    TRY(mem_alloc(&r->prefix, rows * r->N, sizeof *r->prefix, "tokens of a batch"));
    TRY(mem_alloc(&r->mixed, rows > n ? nK : 0, sizeof *r->mixed, "guided logits"));
    TRY(mem_alloc(&r->before, nN, sizeof *r->before, "tokens of the pass before"));
    TRY(mem_alloc(&r->row, n, sizeof *r->row, "positions of a batch"));
    TRY(mem_alloc(&r->cell, rows * min_size(r->N, DECODE_BLOCK), sizeof *r->cell, "a block of positions"));
    TRY(mem_alloc(&r->scale, rows, sizeof *r->scale, "scales of a batch"));
    TRY(mem_alloc(&r->fit, n, sizeof *r->fit, "weights of candidates"));
    return mem_alloc(&r->prob, nK, sizeof *r->prob, "token probabilities");
}

static void free_buffers(Run *r) {
    void *buffers[] = {r->x_t, r->before, r->row, r->cell, r->scale, r->label, r->prefix, r->mixed, r->fit, r->prob};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
}

Err model_sample(Model *m, const SampleOptions *o, int32_t *tokens) {
    TRY(check_options(m, o));
    Run r = {.m = m, .o = o, .N = m->h * m->w, .K = m->K, .tokens = tokens};
    Err e = run_buffers(&r);
    if (e == OK) e = sample_scales(&r);
    free_buffers(&r);
    return e == OK ? OK : err_in(m->folder);
}

Err sample_scale(Transformer *net, const SampleOptions *o, int t, size_t repeat, size_t N, int32_t *tokens) {
    Run r = {.net = net, .o = o, .N = N, .K = transformer_config(net)->dec_num_tokens, .tokens = tokens};
    Err e = run_buffers(&r);
    if (e == OK) e = transformer_plan(net, o->n, N, 0);
    if (e == OK) memcpy(r.before, tokens, o->n * N * sizeof *tokens);
    if (e == OK) e = sample_pass(&r, t, repeat);
    free_buffers(&r);
    return e;
}

/* ---- How likely is a picture? ------------------------------------------------------------------------------ */
