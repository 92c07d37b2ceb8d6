/* walkthrough.c - the numbers of doc/walkthrough.md.
 *
 *   walkthrough PAGE      prints the numbers of that page, 1 to 8; from the project's folder
 *
 * Pages 3 to 6 are a grid of 2x2 tokens with K = 4 values, small enough for a pocket calculator. Their network has
 * weights that are set by hand: see set_weights. What the text computes by hand is computed here by hand too, in plain
 * loops that call nothing of the components, and printed beside what the components say. Pages 1, 2, 7 and 8 are the
 * bundled model. */
#include "sampling/sampling.h"
#include "training/training.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { K = 4, N = 4, SCALES = 3, SEED = 185 };

static const int32_t x0[N] = {2, 0, 1, 3};
static const char *const example = "models/emoji/example.png";

static void row(const char *name, const double *x, size_t n) {
    printf("%-10s", name);
    for (size_t k = 0; k < n; k++) printf(" %8.4f", fabs(x[k]) < 5e-5 ? 0 : x[k]); /* no "-0.0000" */
    printf("\n");
}

static void grid(const char *name, const int32_t *x, size_t h, size_t w) {
    for (size_t i = 0; i < h; i++) {
        printf("%-10s", i == 0 ? name : "");
        for (size_t j = 0; j < w; j++) printf(" %4d", (int)x[i * w + j]);
        printf("\n");
    }
}

/* ---- Pages 1, 2 and 8: the bundled first stage ---- */

typedef struct {
    Model m;
    size_t pixels; /* numbers of a picture: 3 * side * side */
    real *image;   /* (3,side,side), -1..1 */
    int32_t *tokens;
} Bundled;

static Err read_example(Bundled *b, int say) {
    Image im;
    TRY(model_open(&b->m, "models/emoji", NULL));
    b->pixels = 3 * b->m.side * b->m.side;
    TRY(mem_alloc(&b->image, b->pixels, sizeof *b->image, "a picture"));
    TRY(mem_alloc(&b->tokens, b->m.h * b->m.w, sizeof *b->tokens, "tokens"));
    TRY(image_read(&im, example));
    const size_t at = (im.H / 2 * im.W + im.W / 2) * 3;
    if (say) {
        printf("%s: %zu x %zu pixels\n", example, im.H, im.W);
        printf("pixel (32,32) in the file: %d %d %d\n", im.rgb[at], im.rgb[at + 1], im.rgb[at + 2]);
    }
    TRY(image_prepare(b->image, &im, PREP_FOLDER, b->m.side, -1, -1, 0));
    image_free(&im);
    return OK;
}

static void bundled_free(Bundled *b) {
    free(b->image);
    free(b->tokens);
    model_close(&b->m);
}

static Err page_1(void) {
    Bundled b = {0};
    TRY(read_example(&b, 1));
    const size_t plane = b.m.side * b.m.side, at = b.m.side / 2 * b.m.side + b.m.side / 2;
    printf("the same as numbers: %.4f %.4f %.4f\n", (double)b.image[at], (double)b.image[plane + at],
           (double)b.image[2 * plane + at]);
    printf("the picture: %zu numbers\n", b.pixels);
    printf("its tokens: %zu x %zu, each one of K = %zu\n", b.m.h, b.m.w, b.m.K);
    bundled_free(&b);
    return OK;
}

/* The three entries of the codebook (n,D) that are nearest to z (D), which has a stride of `step`. */
static void print_nearest(const real *z, size_t step, const real *book, size_t n, size_t D) {
    size_t before = n;
    double least = -1;
    for (int rank = 0; rank < 3; rank++) {
        double best = HUGE_VAL;
        size_t code = n;
        for (size_t k = 0; k < n; k++) {
            double sum = 0;
            for (size_t d = 0; d < D; d++) {
                const double gap = (double)z[d * step] - (double)book[k * D + d];
                sum += gap * gap;
            }
            if (sum < best && (sum > least || (sum == least && k > before))) best = sum, code = k;
        }
        printf("  code %4zu at a squared distance of %.4f\n", code, best);
        least = best, before = code;
    }
}

static const Param *find_row(Params *p, const char *name) {
    for (size_t i = 0; i < p->n; i++)
        if (!strcmp(p->row[i].name, name)) return &p->row[i];
    return NULL;
}

static Err page_2(void) {
    Bundled b = {0};
    real *z;
    TRY(read_example(&b, 0));
    const size_t h = b.m.h, w = b.m.w, D = vqgan_config(b.m.vqgan)->embed_dim, at = h / 2 * w + w / 2;
    TRY(mem_alloc(&z, D * h * w, sizeof *z, "latents"));
    TRY(vqgan_plan(b.m.vqgan, 1, b.m.side, b.m.side, 0));
    TRY(vqgan_encode(b.m.vqgan, b.image, 1, b.m.side, b.m.side, 0, z, NULL, b.tokens));
    const Param *book = find_row(vqgan_params(b.m.vqgan), "quantize.embedding.weight");
    if (!book) return err("the first stage has no codebook");
    printf("z at (4,4), the first 4 of %zu numbers:", D);
    for (size_t d = 0; d < 4; d++) printf(" %.3f", (double)z[d * h * w + at]);
    printf("\nnearest entries of the codebook (%zu,%zu):\n", book->dim[0], book->dim[1]);
    print_nearest(z + at, h * w, book->value, book->dim[0], D);
    grid("tokens", b.tokens, h, w);
    free(z);
    bundled_free(&b);
    return OK;
}

/* ---- Pages 3 and 4: noise and posterior of a 2x2 grid ---- */

/* x[t] for t = 0..SCALES; x[0] is given. say: with the random numbers. */
static Err make_noise(int32_t x[SCALES + 1][N], const Schedule *s, int say) {
    memcpy(x[0], x0, sizeof x0);
    for (int t = 1; t <= s->T; t++) {
        const uint64_t stream = rng_stream(RNG_NOISE, (uint64_t)t, 0);
        memcpy(x[t], x[t - 1], sizeof x0);
        noise_step(x[t], N, K, (double)s->beta[t], SEED, stream, 0);
        if (!say) continue;
        printf("t = %d    beta %.4f   u", t, (double)s->beta[t]);
        for (size_t i = 0; i < N; i++) printf(" %.4f", rng_uniform(SEED, stream, i));
        char name[8];
        snprintf(name, sizeof name, "x_%d", t);
        printf("\n");
        grid(name, x[t], 2, 2);
    }
    return OK;
}

static Err page_3(void) {
    Schedule s;
    int32_t x[SCALES + 1][N];
    TRY(schedule_make(&s, "geometric", SCALES));
    grid("x_0", x0, 2, 2);
    TRY(make_noise(x, &s, 1));
    printf("kept since x_0 with probability:");
    for (int t = 0; t <= s.T; t++) printf(" %.4f", (double)s.alphacum[t]);
    printf("\n");
    return OK;
}

/* The posterior of one token by its formula. */
static void posterior_by_hand(double q[K], int32_t start, int32_t noised, const Schedule *s, int t) {
    const double A = (double)s->alphacum[t - 1], a = (double)s->alpha[t];
    double sum = 0;
    for (int k = 0; k < K; k++) {
        q[k] = (A * (k == start) + (1 - A) / K) * (a * (k == noised) + (1 - a) / K);
        sum += q[k];
    }
    for (int k = 0; k < K; k++) q[k] /= sum;
}

static Err page_4(void) {
    Schedule s;
    int32_t x[SCALES + 1][N];
    real q[N * K];
    double gap = 0;
    TRY(schedule_make(&s, "geometric", SCALES));
    TRY(make_noise(x, &s, 0));
    posterior(q, x[0], x[2], N, K, &s, 2);
    printf("alphacum_1 = %.4f, alpha_2 = %.4f\n", (double)s.alphacum[1], (double)s.alpha[2]);
    for (size_t i = 0; i < N; i++) {
        double hand[K], shown[K];
        char name[32];
        posterior_by_hand(hand, x[0][i], x[2][i], &s, 2);
        for (size_t k = 0; k < K; k++) {
            shown[k] = (double)q[i * K + k];
            gap = fmax(gap, fabs(shown[k] - hand[k]));
        }
        snprintf(name, sizeof name, "x_0 %d x_2 %d", (int)x[0][i], (int)x[2][i]);
        row(name, shown, K);
    }
    printf("posterior() against the formula: %s\n", gap < 1e-6 ? "equal" : "DIFFERENT");
    return OK;
}

/* ---- Pages 5 and 6: one transition, forward and backward ---- */

typedef struct {
    Transformer *net;
    Schedule s;
    int32_t x[SCALES + 1][N];
    const real *logits; /* (N,K) */
    real q[N * K];      /* the posterior */
} Transition;

static Err fill(Params *p, const char *name, double diagonal, size_t n) {
    const Param *r = find_row(p, name);
    if (!r || r->ndim != 2) return err("the network has no matrix %s", name);
    memset(r->value, 0, r->size * sizeof *r->value);
    for (size_t i = 0; i < n; i++) r->value[i * r->dim[1] + i] = (real)diagonal;
    return OK;
}

/* Every weight is 0 but these: token k is the k-th unit vector; to_v and to_out of the decoder's attentions hand over
 * the four channels as they are, and so does to_logits. Queries and keys are 0, so that attention gives every position
 * that it sees the same weight: it takes a mean. The norms keep their 1 and 0. */
static Err set_weights(Params *p) {
    for (size_t i = 0; i < p->n; i++)
        if (p->row[i].init != INIT_ONE) memset(p->row[i].value, 0, p->row[i].size * sizeof(real));
    TRY(fill(p, "encoder.token_emb.weight", 1, K));
    for (int layer = 0; layer < 2; layer++) { /* 0: to itself, 1: to the encoder */
        char name[64];
        snprintf(name, sizeof name, "decoder.attn_layers.layers.%d.1.to_v.weight", layer);
        TRY(fill(p, name, 1, K));
        snprintf(name, sizeof name, "decoder.attn_layers.layers.%d.1.to_out.weight", layer);
        TRY(fill(p, name, 1, K));
    }
    return fill(p, "decoder.to_logits.weight", 1, K);
}

static Err transition_open(Transition *a) {
    const NetConfig c = {.kind = NET_X,
                         .variant = X_PLAIN,
                         .n_scales = SCALES,
                         .dim = K,
                         .enc_num_tokens = K,
                         .enc_depth = 1,
                         .enc_heads = 1,
                         .enc_max_seq_len = N + 1,
                         .dec_num_tokens = K,
                         .dec_depth = 1,
                         .dec_heads = 1,
                         .dec_max_seq_len = N,
                         .tie_token_emb = 1};
    memset(a, 0, sizeof *a);
    TRY(schedule_make(&a->s, "geometric", SCALES));
    TRY(make_noise(a->x, &a->s, 0));
    TRY(transformer_create(&a->net, &c));
    Params *p = transformer_params(a->net);
    TRY(params_plan(p, PLAN_VALUE | PLAN_GRAD | PLAN_ADAM));
    params_init(p, 0);
    TRY(set_weights(p));
    TRY(transformer_plan(a->net, 1, N, 1));
    posterior(a->q, a->x[0], a->x[2], N, K, &a->s, 2);
    return OK;
}

/* The logits of p(x_1 | x_2), and the two losses. */
static Err run(Transition *a, Loss *loss, real *dlogits) {
    const int32_t t = 2;
    TRY(transformer_forward(a->net, a->x[1], a->x[2], &t, NULL, 1, N, &a->logits));
    return denoising_loss(loss, a->logits, a->x[1], a->q, N, K, 1, 1, dlogits);
}

/* y = (x - mean) / deviation of x (K); gives the deviation. */
static double normalise(double *y, const double *x) {
    double mean = 0, variance = 0;
    for (int k = 0; k < K; k++) mean += x[k] / K;
    for (int k = 0; k < K; k++) variance += (x[k] - mean) * (x[k] - mean) / K;
    const double deviation = sqrt(variance + LAYER_NORM_EPS);
    for (int k = 0; k < K; k++) y[k] = (x[k] - mean) / deviation;
    return deviation;
}

static void unit(double *x, int32_t token) {
    for (int k = 0; k < K; k++) x[k] = k == token;
}

/* The transition by hand: sum[i] = what goes into the last norm at position i, h[i] = what comes out, which here is the
 * row of logits too; deviation[i] of the norm. */
typedef struct {
    double self[N][K], context[K], sum[N][K], h[N][K], deviation[N];
} ByHand;

static void forward_by_hand(ByHand *y, const int32_t *x1, const int32_t *x2) {
    double one[K], normed[K], seen[K] = {0};
    memset(y, 0, sizeof *y);
    for (int j = 0; j < N + 1; j++) { /* the encoder reads t = 2, then x_2 */
        unit(one, j == 0 ? 2 : x2[j - 1]);
        normalise(normed, one);
        for (int k = 0; k < K; k++) y->context[k] += normed[k] / (N + 1);
    }
    for (int i = 0; i < N; i++) { /* the decoder reads 0, then x_1 without its last */
        double between[K], again[K];
        unit(one, i == 0 ? 0 : x1[i - 1]);
        normalise(normed, one);
        for (int k = 0; k < K; k++) {
            seen[k] += normed[k];
            y->self[i][k] = seen[k] / (i + 1);
            between[k] = one[k] + y->self[i][k];
            y->sum[i][k] = between[k] + y->context[k];
        }
        normalise(again, between); /* the queries' norm: they are 0 whatever it gives */
        y->deviation[i] = normalise(y->h[i], y->sum[i]);
    }
}

static void print_rows(const char *name, const double *x) {
    for (int i = 0; i < N; i++) {
        char which[32];
        snprintf(which, sizeof which, "%s[%d]", name, i);
        row(which, x + i * K, K);
    }
}

static Err page_5(void) {
    Transition a;
    ByHand y;
    Loss loss;
    double gap = 0;
    TRY(transition_open(&a));
    TRY(run(&a, &loss, NULL));
    forward_by_hand(&y, a.x[1], a.x[2]);
    grid("x_2", a.x[2], 2, 2);
    grid("x_1", a.x[1], 2, 2);
    row("context", y.context, K);
    print_rows("self", y.self[0]);
    print_rows("sum", y.sum[0]);
    row("deviation", y.deviation, N);
    for (int i = 0; i < N; i++) {
        double p[K], all = 0;
        char name[32];
        for (int k = 0; k < K; k++) {
            gap = fmax(gap, fabs((double)a.logits[i * K + k] - y.h[i][k]));
            all += p[k] = exp((double)a.logits[i * K + k]);
        }
        for (int k = 0; k < K; k++) p[k] /= all;
        snprintf(name, sizeof name, "logits[%d]", i);
        double shown[K];
        for (int k = 0; k < K; k++) shown[k] = (double)a.logits[i * K + k];
        row(name, shown, K);
        snprintf(name, sizeof name, "p[%d]", i);
        row(name, p, K);
    }
    printf("transformer_forward() against the hand: %s\n", gap < 1e-5 ? "equal" : "DIFFERENT");
    transformer_free(a.net);
    return OK;
}

/* dlogits = (softmax - q) / N, then back through to_logits (the identity) and the norm; along[i] = mean(dlogits h). */
static void backward_by_hand(double dlogits[N][K], double along[N], double dsum[N][K], const ByHand *y, const real *q) {
    for (int i = 0; i < N; i++) {
        double all = 0, mean = 0;
        along[i] = 0;
        for (int k = 0; k < K; k++) all += exp(y->h[i][k]);
        for (int k = 0; k < K; k++) {
            dlogits[i][k] = (exp(y->h[i][k]) / all - (double)q[i * K + k]) / N;
            mean += dlogits[i][k] / K;
            along[i] += dlogits[i][k] * y->h[i][k] / K;
        }
        for (int k = 0; k < K; k++) dsum[i][k] = (dlogits[i][k] - mean - y->h[i][k] * along[i]) / y->deviation[i];
    }
}

/* The gradient of one parameter, by backward, by hand and by moving it a little. */
static Err compare_gradient(Transition *a, const char *name, size_t element, double hand) {
    const double step = 1.0 / 64;
    double loss[2];
    const Param *p = find_row(transformer_params(a->net), name);
    if (!p) return err("the network has no %s", name);
    const real before = p->value[element];
    for (int side = 0; side < 2; side++) {
        Loss l;
        p->value[element] = before + (real)(side ? step : -step);
        TRY(run(a, &l, NULL));
        loss[side] = l.loss;
    }
    p->value[element] = before;
    printf("%s[%zu]: backward %.4f, by hand %.4f, by moving it %.3f\n", name, element, (double)p->grad[element], hand,
           (loss[1] - loss[0]) / (2 * step));
    return OK;
}

static Err page_6(void) {
    Transition a;
    ByHand y;
    Loss loss, after;
    real dlogits[N * K];
    double d[N][K], along[N], dsum[N][K], of_weight = 0, of_bias = 0;
    TRY(transition_open(&a));
    TRY(run(&a, &loss, dlogits));
    forward_by_hand(&y, a.x[1], a.x[2]);
    backward_by_hand(d, along, dsum, &y, a.q);
    printf("hard %.4f, soft %.4f nats per token\n", loss.hard, loss.soft);
    double gap = 0;
    for (int i = 0; i < N * K; i++) gap = fmax(gap, fabs((double)dlogits[i] - d[i / K][i % K]));
    print_rows("dlogits", d[0]);
    printf("denoising_loss() against the hand: %s\n", gap < 1e-6 ? "equal" : "DIFFERENT");
    row("mean(dh h)", along, N);
    print_rows("dsum", dsum[0]);
    TRY(transformer_backward(a.net, dlogits));
    for (int i = 0; i < N; i++) of_weight += d[i][2] * y.h[i][0], of_bias += dsum[i][3];
    TRY(compare_gradient(&a, "decoder.to_logits.weight", 2 * K + 0, of_weight));
    TRY(compare_gradient(&a, "decoder.attn_layers.layers.1.1.to_out.bias", 3, of_bias));
    const AdamW adamw = {.lr = 0.1, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .decay_scale = 1};
    adamw_step(transformer_params(a.net), &adamw, 1);
    TRY(run(&a, &after, NULL));
    printf("soft loss before a step of AdamW %.4f, after it %.4f\n", loss.soft, after.soft);
    transformer_free(a.net);
    return OK;
}

/* ---- Page 7: the bundled model's transition, and its chain ---- */

/* One transition of scale 1: what it thinks of the example's tokens, a third of which are replaced. */
static Err denoise_example(Bundled *b) {
    int32_t x1[64], label, t = 1;
    const real *logits;
    size_t noised = 0, back = 0, wrong = 0;
    const size_t n = b->m.h * b->m.w;
    if (n != 64) return err("%zu tokens, expected 64", n);
    memcpy(x1, b->tokens, sizeof x1);
    noise_step(x1, n, b->m.K, (double)b->m.schedule.beta[1], SEED, rng_stream(RNG_NOISE, 1, 0), 0);
    TRY(model_class(&b->m, "smileys", &label));
    TRY(model_scale(&b->m, 1));
    TRY(transformer_plan(b->m.net, 1, n, 0));
    TRY(transformer_forward(b->m.net, b->tokens, x1, &t, &label, 1, n, &logits));
    for (size_t i = 0; i < n; i++) {
        size_t best = 0;
        for (size_t k = 1; k < b->m.K; k++)
            if (logits[i * b->m.K + k] > logits[i * b->m.K + best]) best = k;
        noised += x1[i] != b->tokens[i];
        back += x1[i] != b->tokens[i] && (int32_t)best == b->tokens[i];
        wrong += x1[i] == b->tokens[i] && (int32_t)best != b->tokens[i];
    }
    printf("x_1 differs from x_0 in %zu of %zu tokens\n", noised, n);
    printf("scale 1 finds %zu of these, and gets %zu of the others wrong\n", back, wrong);
    return OK;
}

typedef struct {
    int32_t x[SCALES + 2][64];
} Grids;

static void keep(void *context, int t, const int32_t *tokens) { /* tokens are x_{t-1} */
    Grids *g = (Grids *)context;
    memcpy(g->x[t - 1], tokens, sizeof g->x[0]);
}

static Err draw_grids(Model *m, Grids *grids) {
    SampleOptions o;
    int32_t label, tokens[64];
    const double temperature[SCALES + 1] = {0, 0.4, 0.5, 0.75};
    sample_defaults(&o);
    TRY(model_class(m, "food", &label));
    o.n = 1, o.seed = 3, o.label = &label, o.scale_done = keep, o.context = grids;
    for (int t = 1; t <= SCALES; t++) o.temperature[t] = temperature[t], o.chain[t] = t < SCALES ? 8 : 1;
    const Chain chain = model_chain(m);
    return sample_chain(&chain, &o, tokens);
}

static Err page_7(void) {
    Bundled b = {0};
    Grids grids;
    real prob[K], logits[K] = {1, 0, 2, -1};
    TRY(read_example(&b, 0));
    TRY(vqgan_plan(b.m.vqgan, 1, b.m.side, b.m.side, 0));
    TRY(vqgan_encode(b.m.vqgan, b.image, 1, b.m.side, b.m.side, 0, NULL, NULL, b.tokens));
    TRY(denoise_example(&b));
    sample_probs(prob, logits, K, -1, 0.5, 3);
    double shown[K];
    for (int k = 0; k < K; k++) shown[k] = (double)prob[k];
    row("prob", shown, K);
    printf("u = 0.05 draws %d, u = 0.90 draws %d\n", (int)sample_pick(prob, K, 0.05), (int)sample_pick(prob, K, 0.9));
    TRY(draw_grids(&b.m, &grids));
    for (int t = SCALES; t >= 0; t--) {
        char name[8];
        snprintf(name, sizeof name, "x_%d", t);
        grid(name, grids.x[t], 2, b.m.w); /* the two upper rows */
    }
    bundled_free(&b);
    return OK;
}

/* ---- Page 8: tokens -> picture ---- */

static Err page_8(void) {
    Bundled b = {0};
    real *back;
    double l1 = 0, l2 = 0;
    TRY(read_example(&b, 0));
    TRY(mem_alloc(&back, b.pixels, sizeof *back, "a picture"));
    TRY(vqgan_plan(b.m.vqgan, 1, b.m.side, b.m.side, 0));
    TRY(vqgan_encode(b.m.vqgan, b.image, 1, b.m.side, b.m.side, 0, NULL, NULL, b.tokens));
    TRY(vqgan_decode_tokens(b.m.vqgan, b.tokens, 1, b.m.h, b.m.w, back));
    image_loss(b.image, back, b.pixels, 0, 0, &l1, &l2, NULL);
    const size_t plane = b.m.side * b.m.side, at = b.m.side / 2 * b.m.side + b.m.side / 2;
    printf("pixel (32,32): %.3f %.3f %.3f, decoded %.3f %.3f %.3f\n", (double)b.image[at], (double)b.image[plane + at],
           (double)b.image[2 * plane + at], (double)back[at], (double)back[plane + at], (double)back[2 * plane + at]);
    printf("mean |x - x'| %.4f, PSNR %.2f dB\n", l1, 10 * log10(4 / l2));
    printf("adaptive weight for gradients of length 3 and 1.5: %.4f\n", adaptive_weight(3, 1.5));
    printf("bits of the picture: %zu, of its tokens: %.0f\n", 8 * b.pixels,
           (double)(b.m.h * b.m.w) * log2((double)b.m.K));
    free(back);
    bundled_free(&b);
    return OK;
}

int main(int argc, char **argv) {
    static Err (*const page[])(void) = {page_1, page_2, page_3, page_4, page_5, page_6, page_7, page_8};
    const int which = argc == 2 && strlen(argv[1]) == 1 ? argv[1][0] - '1' : -1;
    if (which < 0 || which > 7) return fprintf(stderr, "usage: walkthrough PAGE, which is 1 to 8\n"), 2;
    if (page[which]() != OK) return fprintf(stderr, "walkthrough: %s\n", err_text()), 1;
    return 0;
}
