/* diffusion.c - the Markov chain over tokens: noise forward, networks backward.
 *
 * A grid x_0 of N tokens, each one of K values, is destroyed in T steps. At step t each token becomes, with
 * probability beta_t, a uniform one. alpha_t = 1 - beta_t; A_t = alpha_1 ... alpha_t (alphacum) is the probability
 * that a token is left alone t times. beta_T = 1, so x_T is pure noise. [a = b] is 1 if a equals b, else 0. c makes
 * a sum of 1. For one token:
 *
 *     a step      q(x_t = k | x_{t-1})       =  alpha_t [k = x_{t-1}] + (1 - alpha_t)/K             noise_step
 *     t steps     q(x_t = k | x_0)           =  A_t [k = x_0] + (1 - A_t)/K
 *     posterior   q(x_{t-1} = k | x_t, x_0)  =  c q(x_{t-1} = k | x_0) q(x_t | x_{t-1} = k)           posterior
 *
 * Backward, one network for each scale t draws x_{t-1} from x_t token by token:
 *
 *     p(x_{t-1} | x_t)  =  prod over i of p(x_{t-1}[i] | x_{t-1}[0..i-1], x_t)                      sample_pass
 *     p(x_0)            =  sum over x_1 .. x_T of p(x_T) p(x_{T-1} | x_T) ... p(x_0 | x_1)          sample_chain
 *
 * Training lowers a bound on -log p(x_0), whose terms can be lowered one by one. (It has another term, KL(q(x_T | x_0)
 * || p(x_T)), which is 0 because beta_T = 1.)
 *
 *     -log p(x_0)  <=  sum over t = 1..T of E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))         denoising_loss
 *
 * This is the paper's section 3.1, the posterior its equation 7, the networks its section 3.2; SPEC sections 3 and 5.
 * The paper counts from x_1: its x_0 is the picture and its x_1 the picture's tokens, which are x_0 here. So its x_t is
 * our x_{t-1}.
 *
 * This file owns noise, posterior, the draw of one token (temperature, top-k, guide), the chain with its guidance,
 * candidates and forward-backward repeats, and the schedules beta_t. It knows tokens and networks, but no files. Every
 * random number is a Philox draw named by (seed, purpose, scale and repeat, sample, position): tokens depend on neither
 * the batch that a sample is in nor the number of threads. It refuses schedules whose betas leave [0,1], options that a
 * model cannot follow, networks that answer with NaN.
 *
 * Read next: transformer.cu, the network p(x_{t-1} | x_t) and its loss; train.c, which teaches it; sampling/bounds.c,
 * the bound of a given picture; kernels/guess.c, how a pass draws several tokens of a sample at once. */
#include "imagebart.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- q: noise, and what it was before ----------------------------------------------------------------------- */

/* q(x_t = k | x_{t-1}) = (1 - beta) [k = x_{t-1}] + beta/K, for n tokens in place. A draw of Philox has four words: two
 * say whether the token is replaced, two by which. */
void noise_step(int32_t *x, size_t n, size_t K, double beta, uint64_t seed, uint64_t stream, uint64_t first) {
    for (size_t i = 0; i < n; i++) {
        uint32_t r[4];
        philox(r, seed, stream, first + i);
        if (unit_of_bits(r[0], r[1]) < beta) x[i] = (int32_t)below_of_bits(r[2], r[3], K);
    }
}

/* x_t by t steps from x_0, and x_{t-1} on the way. */
void noise_chain(int32_t *x_prev, int32_t *x_t, const int32_t *x0, size_t n, size_t K, const Schedule *s, int t,
                 uint64_t seed, uint64_t micro, uint64_t first) {
    memcpy(x_t, x0, n * sizeof *x_t);
    for (int i = 1; i <= t; i++) {
        memcpy(x_prev, x_t, n * sizeof *x_t);
        noise_step(x_t, n, K, s->beta[i], seed, rng_stream(RNG_NOISE, (uint64_t)i, micro), first);
    }
}

/* q (K) = q(x_{t-1} = k | x_t, x_0) = f(k) g(k) / sum over j of f(j) g(j)                               (paper eq. 7)
 *     f(k) = A [k = x_0] + (1 - A)/K       x_{t-1} from x_0; A = A_{t-1}
 *     g(k) = a [k = x_t] + (1 - a)/K       x_t from x_{t-1}; a = alpha_t
 * f and g take two values each, so q takes at most three: at x_0, at x_t, and at the rest. In the code f and g are their
 * values at the rest, so f(x_0) = A + f and g(x_t) = a + g. */
static void posterior_row(real *q, size_t x0, size_t xt, size_t K, double A, double a) {
    double f = (1 - A) / (double)K, g = (1 - a) / (double)K;
    double rest = f * g, at0 = (A + f) * g, at_t = f * (a + g);
    if (x0 == xt) at0 = at_t = (A + f) * (a + g);
    double sum = x0 == xt ? (double)(K - 1) * rest + at0 : (double)(K - 2) * rest + at0 + at_t;
    if (!(sum > 0)) { /* x_t cannot come from x_0 (beta_t = 0): only x_0 is left to aim at */
        rest = at_t = 0;
        at0 = sum = 1;
    }
    for (size_t k = 0; k < K; k++) q[k] = (real)(rest / sum);
    q[xt] = (real)(at_t / sum);
    q[x0] = (real)(at0 / sum);
}

typedef struct {
    real *q;
    const int32_t *x0, *xt;
    size_t K;
    double A, a;
} Posterior;

static void posterior_task(void *context, size_t r) {
    const Posterior *p = (const Posterior *)context;
    posterior_row(p->q + r * p->K, (size_t)p->x0[r], (size_t)p->xt[r], p->K, p->A, p->a);
}

void posterior(real *q, const int32_t *x0, const int32_t *xt, size_t R, size_t K, const Schedule *s, int t) {
    Posterior p = {q, x0, xt, K, s->alphacum[t - 1], s->alpha[t]};
    parallel_for(R * K > 65536 ? threads_free() : 1, R, posterior_task, &p);
}

/* ---- p: one token ------------------------------------------------------------------------------------------- */

/* prob = softmax(logits / temperature) of the top_k largest, or all on the guide's token (SPEC 5: logits + guide, then
 * temperature, top-k, softmax). */
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
        memset(prob, 0, K * sizeof *prob);
        prob[guide >= 0 ? (size_t)guide : argmax] = 1;
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

/* The token at which the sum of probabilities first exceeds u, uniform in [0,1). */
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

/* Classifier-free guidance (Ho and Salimans 2022): uncond + g (cond - uncond), logits with a class and with none. */
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

/* ---- The chain ---------------------------------------------------------------------------------------------- */

/* n samples on their way down the scales; at present in pass `repeat` of scale t. */
typedef struct {
    const SampleOptions *o;
    Transformer *net;
    int t;
    size_t repeat, n, N, K;
    size_t rows;      /* of the network's batch: n, or 2n at a guided scale: samples with their class, then with none */
    int32_t no_class; /* the label of the latter */
    int32_t *tokens;  /* (n,N) the caller's: x_{t-1} as it grows */
    int32_t *x_t;     /* (rows,N) */
    int32_t *before;  /* (n,N) what this scale drew the last time, before it was noised again; the first time x_t */
    int32_t *scale, *label; /* (rows) */
    real *mixed, *prob;     /* (n,K) guided logits; probabilities */
    double *fit;            /* (n) log probability that this pass gave to the known tokens */
    uint64_t *stream;       /* (n) random numbers of this pass; index = position */
    Sample *sample;         /* (n) where each sample stands */
    DecodePosition *block;  /* (rows * min(N,DECODE_BLOCK)) positions that the decoder is fed at once */
    size_t length;          /* of the block, without its second half under guidance */
    const real *logits;     /* of the block: (length,K) with a class; guided, (length,K) with none follow */
    size_t end;             /* positions from here on are known, and nobody asks for their probability */
    DrawOptions how;        /* the tokens of this pass are drawn */
    Guesses guesses;        /* what kernels/guess.c makes longer blocks from */
} Drawing;

static int is_known(const Drawing *d, size_t i) {
    return d->o->known && d->o->keep[i];
}

/* The random numbers of a sample in this pass. */
static uint64_t pass_stream(const Drawing *d, RngPurpose purpose, size_t b) {
    return rng_stream(purpose, (uint64_t)d->t << 16 | d->repeat, d->o->first + b);
}

/* x_T: uniform tokens, known ones in their places (SPEC 5). */
static void start_tokens(const Drawing *d) {
    for (size_t b = 0; b < d->n; b++)
        for (size_t i = 0; i < d->N; i++) {
            const uint64_t stream = rng_stream(RNG_START, 0, d->o->first + b);
            const int32_t drawn = (int32_t)rng_below(d->o->seed, stream, i, (uint32_t)d->K);
            d->tokens[b * d->N + i] = is_known(d, i) ? d->o->known[b * d->N + i] : drawn;
        }
}

/* Between repeats the tokens, known ones too, go part of the way forward again: beta_t fades to nothing over the
 * chain (SPEC 5). */
static void renoise(const Drawing *d, const Schedule *s) {
    const double beta = (1 - (double)d->repeat / (double)d->o->chain[d->t]) * (double)s->beta[d->t];
    for (size_t b = 0; b < d->n; b++)
        noise_step(d->tokens + b * d->N, d->N, d->K, beta, d->o->seed, pass_stream(d, RNG_RENOISE, b), 0);
}

static int report_pass(void *context, size_t done) {
    const Drawing *d = (const Drawing *)context;
    return d->o->progress ? d->o->progress(d->o->context, d->t, d->repeat, done, d->N) : 0;
}

/* How this pass draws, and what its guesses are made from. */
static void set_pass(Drawing *d) {
    const SampleOptions *o = d->o;
    const int has_drafts = transformer_config(d->net)->kind == NET_X; /* the last scale does not look at x_t */
    const int is_one = o->official_temperature && has_drafts;         /* SPEC 1.11 */
    const size_t most = o->block ? min_size(o->block, DECODE_BLOCK) : DECODE_BLOCK;
    d->how = (DrawOptions){.seed = o->seed, .stream = d->stream, .known = o->known, .keep = o->keep};
    d->how.temperature = is_one ? 1 : o->temperature[d->t], d->how.top_k = o->top_k[d->t];
    d->how.guided = d->rows > d->n, d->how.guidance = o->guidance[d->t];
    d->how.fit = o->known && o->candidates > 1 ? d->fit : NULL;
    d->how.progress = report_pass, d->how.context = d;
    d->guesses = (Guesses){d->n, d->N, d->end, most, o->block > 0, has_drafts};
    d->guesses.tokens = d->tokens, d->guesses.x_t = d->x_t, d->guesses.before = d->before;
    d->guesses.known = o->known, d->guesses.keep = o->keep, d->guesses.rows = d->rows / d->n;
    d->guesses.reads = transformer_decode_reads(d->net, d->N);
}

/* x_t = tokens. All positions must be fed, unless only known tokens are left and candidates do not ask how likely they
 * are. */
static void start_pass(Drawing *d) {
    const SampleOptions *o = d->o;
    for (size_t b = 0; b < d->rows; b++) {
        memcpy(d->x_t + b * d->N, d->tokens + b % d->n * d->N, d->N * sizeof *d->tokens);
        d->scale[b] = d->t;
        d->label[b] = b >= d->n ? d->no_class : o->label ? o->label[b] : 0;
    }
    for (size_t b = 0; b < d->n; b++) d->fit[b] = 0, d->sample[b].at = 0, d->stream[b] = pass_stream(d, RNG_SAMPLE, b);
    d->end = d->N;
    while (o->candidates <= 1 && d->end > 0 && is_known(d, d->end - 1)) d->end--;
    for (size_t k = 0; k < d->n * d->N; k++)
        if (k % d->N >= d->end) d->tokens[k] = o->known[k];
    set_pass(d);
}

/* Which positions are fed next, and the token before each. Plainly: one position of every sample. kernels/guess.c adds
 * positions behind it, and writes into tokens what it guesses in front of them. */
static void next_block(Drawing *d) {
    const Compute on = compute_of(transformer_params(d->net));
    for (size_t b = 0; b < d->n; b++) d->sample[b].length = d->sample[b].at < d->end;
    if (on.fast && on.fast->guess_block) on.fast->guess_block(d->sample, &d->guesses);
    d->length = 0;
    for (size_t b = 0; b < d->n; b++) {
        Sample *s = &d->sample[b];
        s->first = d->length;
        for (size_t i = s->at; i < s->at + s->length; i++)
            d->block[d->length++] = (DecodePosition){b, i, i > 0 ? d->tokens[b * d->N + i - 1] : 0};
    }
    for (size_t c = 0; c < d->length && d->how.guided; c++)
        d->block[d->length + c] = (DecodePosition){d->n + d->block[c].b, d->block[c].i, d->block[c].prev};
}

/* The token of sample b at position i, which is number c of the block. */
static int32_t draw_token(const Drawing *d, size_t b, size_t i, size_t c) {
    const DrawOptions *how = &d->how;
    const real *logits = d->logits + c * d->K;
    real *prob = d->prob + b * d->K, *mixed = d->mixed + b * d->K;
    if (how->guided) {
        mix_logits(mixed, logits, logits + d->length * d->K, d->K, how->guidance);
        logits = mixed;
    }
    const int32_t known = is_known(d, i) ? how->known[b * d->N + i] : -1;
    if (how->fit && known >= 0) how->fit[b] += log_prob(logits, d->K, (size_t)known);
    sample_probs(prob, logits, d->K, known, how->temperature, how->top_k);
    return sample_pick(prob, d->K, rng_uniform(how->seed, how->stream[b], i));
}

/* A sample's positions of the block in turn, up to the first token that is not what the next position was fed: the
 * logits behind it are for another prefix. */
static void draw_task(void *context, size_t b) {
    const Drawing *d = (const Drawing *)context;
    Sample *s = &d->sample[b];
    for (size_t c = s->first, end = c + s->length; c < end; c++) {
        const size_t i = s->at++;
        const int32_t token = d->tokens[b * d->N + i] = draw_token(d, b, i, c);
        if (c + 1 < end && token != d->block[c + 1].prev) break;
    }
}

static Err check_drawn(const Drawing *d, size_t b, size_t i) {
    if (d->tokens[b * d->N + i] >= 0) return OK;
    return err("scale %d gives no usable probabilities (NaN or infinite logits) at position %zu", d->t, i);
}

static Err draw_block(Drawing *d) {
    size_t done = d->N;
    parallel_for(threads_free(), d->n, draw_task, d);
    for (size_t b = 0; b < d->n; b++) {
        const size_t at = d->sample[b].at;
        if (at > 0) TRY(check_drawn(d, b, at - 1));
        if (at < d->end) done = min_size(done, at);
    }
    if (d->o->counts) d->o->counts[d->t].passes++, d->o->counts[d->t].positions += d->length;
    return report_pass(d, done) ? err("sampling was stopped") : OK;
}

/* All positions are drawn where the network is, on the GPU. */
static Err draw_on_gpu(Drawing *d) {
    TRY(transformer_draw_cuda(d->net, &d->how, d->tokens));
    for (size_t k = 0; k < d->n * d->N; k++) TRY(check_drawn(d, k % d->n, k / d->n));
    return OK;
}

/* x_{t-1} ~ p(x_{t-1} | x_t): tokens x_t in, x_{t-1} out. */
static Err sample_pass(Drawing *d) {
    start_pass(d);
    TRY(transformer_decode_begin(d->net, d->x_t, d->scale, d->o->label ? d->label : NULL, d->rows, d->N));
    if (transformer_on_cuda(d->net)) return draw_on_gpu(d);
    for (next_block(d); d->length > 0; next_block(d)) {
        TRY(transformer_decode_block(d->net, d->block, d->length * d->rows / d->n, &d->logits));
        TRY(draw_block(d));
    }
    DraftCounts *counts = d->o->counts ? &d->o->counts[d->t] : NULL;
    for (size_t b = 0; counts && b < d->n; b++)
        counts->tokens += d->end, counts->tried += d->sample[b].tried, counts->right += d->sample[b].right;
    return OK;
}

/* Importance resampling: each group of candidates is drawn anew from itself, in proportion to exp(fit). */
static void choose_candidates(const Drawing *d) {
    const size_t M = d->o->candidates, N = d->N;
    memcpy(d->x_t, d->tokens, d->n * N * sizeof *d->tokens);
    for (size_t g = 0; g < d->n; g += M) {
        double best = -HUGE_VAL, sum = 0;
        for (size_t j = g; j < g + M; j++) best = fmax(best, d->fit[j]);
        for (size_t j = g; j < g + M; j++) sum += d->fit[j] = exp(d->fit[j] - best);
        for (size_t j = g; j < g + M; j++) {
            double u = rng_uniform(d->o->seed, pass_stream(d, RNG_CHOOSE, j), 0) * sum;
            size_t from = g;
            while (from + 1 < g + M && u >= d->fit[from]) u -= d->fit[from++];
            memcpy(d->tokens + j * N, d->x_t + from * N, N * sizeof *d->tokens);
        }
    }
}

/* All passes of scale t. */
static Err sample_repeats(Drawing *d, const Chain *c) {
    const SampleOptions *o = d->o;
    d->rows = o->guidance[d->t] != 1 ? 2 * d->n : d->n;
    d->no_class = c->null_class[d->t];
    memset(d->sample, 0, d->n * sizeof *d->sample);
    TRY(c->network(c->context, d->t, &d->net));
    TRY(transformer_plan(d->net, d->rows, d->N, 0));
    for (d->repeat = 0; d->repeat < o->chain[d->t]; d->repeat++) {
        memcpy(d->before, d->tokens, d->n * d->N * sizeof *d->before);
        if (d->repeat > 0) renoise(d, c->schedule);
        TRY(sample_pass(d));
        if (o->candidates > 1) choose_candidates(d);
    }
    return OK;
}

/* x_T -> x_{T-1} -> ... -> x_0 */
static Err sample_scales(Drawing *d, const Chain *c) {
    const SampleOptions *o = d->o;
    start_tokens(d);
    if (o->scale_done) o->scale_done(o->context, c->schedule->T + 1, d->tokens);
    for (d->t = c->schedule->T; d->t >= 1; d->t--) {
        if (o->chain[d->t] > 0) TRY(sample_repeats(d, c));
        if (o->scale_done) o->scale_done(o->context, d->t, d->tokens);
    }
    return OK;
}

static Err drawing_buffers(Drawing *d) {
    const size_t rows = 2 * d->n; /* at most */
    TRY(mem_alloc(&d->x_t, 2 * rows, (d->N + 1) * sizeof *d->x_t, "tokens of a batch"));
    d->before = d->x_t + rows * d->N, d->scale = d->before + rows * d->N, d->label = d->scale + rows;
    TRY(mem_alloc(&d->prob, d->n, 2 * d->K * sizeof *d->prob, "token probabilities"));
    d->mixed = d->prob + d->n * d->K;
    TRY(mem_alloc(&d->fit, d->n, sizeof *d->fit, "weights of candidates"));
    TRY(mem_alloc(&d->stream, d->n, sizeof *d->stream, "random streams"));
    TRY(mem_alloc(&d->sample, d->n, sizeof *d->sample, "positions of a batch"));
    return mem_alloc(&d->block, rows * min_size(d->N, DECODE_BLOCK), sizeof *d->block, "a block of positions");
}

static void drawing_free(Drawing *d) {
    free(d->x_t), free(d->prob), free(d->fit), free(d->stream), free(d->sample), free(d->block);
}

static Err check_options(const Chain *c, const SampleOptions *o);

Err sample_chain(const Chain *c, const SampleOptions *o, int32_t *tokens) {
    TRY(check_options(c, o));
    Drawing d = {.o = o, .n = o->n, .N = c->h * c->w, .K = c->K, .tokens = tokens};
    Err e = drawing_buffers(&d);
    if (e == OK) e = sample_scales(&d, c);
    drawing_free(&d);
    return e == OK || strstr(err_text(), c->name) ? e : err_in(c->name);
}

Err sample_scale(Transformer *net, const SampleOptions *o, int t, size_t repeat, size_t N, int32_t *tokens) {
    const size_t K = transformer_config(net)->dec_num_tokens;
    Drawing d = {o, net, t, repeat, o->n, N, K, .rows = o->n, .tokens = tokens};
    Err e = drawing_buffers(&d);
    if (e == OK) e = transformer_plan(net, o->n, N, 0);
    if (e == OK) memcpy(d.before, tokens, o->n * N * sizeof *tokens);
    if (e == OK) e = sample_pass(&d);
    drawing_free(&d);
    return e;
}

/* ---- Schedules ---------------------------------------------------------------------------------------------- */

/* alpha and alphacum as the official float32 buffers: differences round to float, the running product is kept in double
 * and rounded at each t. */
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

/* "geometric": beta_t = 1/(T-t+1), so that A_t = 1 - t/T. */
Err schedule_make(Schedule *s, const char *redraw_prob, int T) {
    memset(s, 0, sizeof *s);
    if (T < 1 || T > MAX_SCALES) return err("schedule: %d scales, expected 1..%d", T, MAX_SCALES);
    if (strcmp(redraw_prob, "geometric") == 0)
        for (int t = 1; t <= T; t++) s->beta[t] = (float)(1.0 / (T - t + 1));
    else
        TRY(betas_read(s->beta, redraw_prob, T));
    return schedule_from_betas(s, T);
}

/* ---- Options ------------------------------------------------------------------------------------------------ */

void sample_defaults(SampleOptions *o) {
    memset(o, 0, sizeof *o);
    o->n = o->candidates = 1;
    for (int t = 0; t <= MAX_SCALES; t++) o->temperature[t] = o->guidance[t] = 1, o->chain[t] = 1;
}

Err check_guidance(const Chain *c, double g, int t) {
    if (g == 1) return OK;
    if (!(g >= 0) || !isfinite(g)) return err("guidance %g of scale %d, expected 0 or more", g, t);
    if (!c->n_classes) return err("guidance %g at scale %d: %s is not a model with classes", g, t, c->name);
    if (c->null_class[t] >= 0) return OK;
    return err("guidance %g at scale %d: %s was trained without \"no class\" (./train --label-dropout 0.1), expected "
               "--guidance 1",
               g, t, c->name);
}

static Err check_labels(const Chain *c, const SampleOptions *o) {
    if (c->n_classes && !o->label) return err("sampling: %s needs a class for each sample", c->name);
    if (!c->n_classes && o->label) return err("sampling: %s is not a model with classes", c->name);
    for (size_t b = 0; o->label && b < o->n; b++)
        if (o->label[b] < 0 || (size_t)o->label[b] >= c->n_classes)
            return err("sampling: class %d, expected 0..%zu", (int)o->label[b], c->n_classes - 1);
    return OK;
}

static Err check_options(const Chain *c, const SampleOptions *o) {
    enum { MAX_CHAIN = 65535 }; /* repeats share 24 bits of the stream's name with t */
    const size_t N = c->h * c->w, least = o->known ? 0 : 1;
    if (o->n < 1 || o->n > UINT32_MAX) return err("sampling: %zu samples, expected 1 to 2^32 - 1", o->n);
    for (int t = 1; t <= c->schedule->T; t++) {
        if (!(o->temperature[t] >= 0) || !isfinite(o->temperature[t]))
            return err("sampling: temperature %g of scale %d, expected 0 or more", o->temperature[t], t);
        TRY(check_guidance(c, o->guidance[t], t));
        if (o->chain[t] < least || o->chain[t] > MAX_CHAIN)
            return err("sampling: a chain of %zu at scale %d, expected %zu..%d", o->chain[t], t, least, MAX_CHAIN);
    }
    TRY(check_labels(c, o));
    if (o->candidates < 1 || o->n % o->candidates)
        return err("sampling: %zu samples in groups of %zu candidates", o->n, o->candidates);
    if (!o->known != !o->keep) return err("sampling: known tokens and their mask go together");
    for (size_t i = 0; o->known && i < o->n * N; i++)
        if (o->keep[i % N] && (o->known[i] < 0 || (size_t)o->known[i] >= c->K))
            return err("sampling: known token %d, expected 0..%zu", (int)o->known[i], c->K - 1);
    return OK;
}
