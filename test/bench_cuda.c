/* bench_cuda.c - how fast the GPU trains and decodes at the full size of the FFHQ models, with random weights.
 *
 *   bench_cuda [f32|bf16]     default bf16
 *
 * A training step: forward, both losses, backward, AdamW and EMA, batch 32, an encoder-decoder scale and the last scale.
 * Decoding: 256 tokens drawn on the GPU, batch 1 and 64. The median of some runs after one that warms up; host clock, for
 * every run ends with numbers on the host. FLOP count matrix products and attention only: 6 per weight and row, as is
 * usual, and 12 T_q T_k D per head. test/bench_cuda_torch.py does the same work in PyTorch. */
#include "../imagebart.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { N = 256, K = 548, RUNS = 7, B_TRAIN = 32, B_MAX = 64 };

static const NetConfig encoder_decoder = {NET_X, X_RESIDUAL_SCALED, 4, 0, 752, K, 18, 16, N + 1, K, 6, 16, N, 0, 0, 0};
static const NetConfig last_scale = {NET_GPT, X_PLAIN, 4, 0, 800, 0, 0, 0, 0, K, 26, 16, N, K, 0, 0};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void need(Err e) {
    if (e == OK) return;
    fprintf(stderr, "bench_cuda: %s\n", err_text());
    exit(1);
}

static int by_size(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef struct {
    Transformer *net;
    Params *params;
    Schedule schedule;
    int32_t x0[B_MAX * N], x[B_MAX * N], x_t[B_MAX * N], t[B_MAX], tokens[B_MAX * N];
    uint64_t stream[B_MAX], step;
    size_t B;
} Bench;

static void train_step(Bench *a) {
    const AdamW o = {1e-4, 0.9, 0.95, 1e-8, 1};
    Loss loss;
    params_zero_grad(a->params);
    need(transformer_loss_cuda(a->net, &a->schedule, a->x0, a->x, a->x_t, a->t, NULL, a->B, N, 0.5, 1, 1, &loss));
    if (!(params_grad_norm(a->params) > 0)) need(err("the gradient is 0 or NaN"));
    a->step++;
    adamw_ema_step(a->params, &o, a->step, 0.9999, a->step);
}

static void decode(Bench *a) {
    const DrawOptions o = {.seed = 1, .stream = a->stream, .temperature = 1};
    need(transformer_decode_begin(a->net, a->x_t, a->t, NULL, a->B, N));
    need(transformer_draw_cuda(a->net, &o, a->tokens));
}

static double median(Bench *a, void (*run)(Bench *)) {
    double took[RUNS];
    run(a);
    for (int i = 0; i < RUNS; i++) {
        const double start = now();
        run(a);
        took[i] = now() - start;
    }
    qsort(took, RUNS, sizeof *took, by_size);
    return took[RUNS / 2];
}

static void open_net(Bench *a, const NetConfig *c, Precision precision, int train) {
    need(schedule_make(&a->schedule, "geometric", c->n_scales));
    need(transformer_create(&a->net, c));
    need(transformer_use_cuda(a->net, precision));
    transformer_set_alphas(a->net, a->schedule.alpha);
    a->params = transformer_params(a->net), a->step = 0;
    need(params_plan(a->params, PLAN_VALUE | (train ? PLAN_GRAD | PLAN_ADAM | PLAN_EMA : 0)));
    params_init(a->params, 1);
    need(params_send(a->params));
    for (size_t i = 0; i < B_MAX * N; i++)
        a->x0[i] = (int32_t)rng_below(1, 1, i, K), a->x[i] = (int32_t)rng_below(1, 2, i, K), a->x_t[i] = a->x[i];
    for (size_t b = 0; b < B_MAX; b++)
        a->t[b] = c->kind == NET_X ? 1 : c->n_scales, a->stream[b] = rng_stream(RNG_TEST, 0, b);
}

/* Of a training step, per picture */
static double flop(const NetConfig *c, const Params *p) {
    double weights = 0, attention;
    for (size_t r = 0; r < p->n; r++)
        if (p->row[r].matrix && !p->row[r].untrained) weights += (double)p->row[r].size;
    attention = c->kind == NET_X ? 12.0 * N * N * 64 * 16 * (double)(c->enc_depth + 2 * c->dec_depth)
                                 : 12.0 * N * N * (double)(c->dim * c->dec_depth);
    return 6 * weights * N + attention;
}

static void bench(Bench *a, const char *what, const NetConfig *c, Precision precision) {
    open_net(a, c, precision, 1);
    a->B = B_TRAIN;
    need(transformer_plan(a->net, a->B, N, 1));
    const double step = median(a, train_step), work = flop(c, a->params) * B_TRAIN;
    printf("%-18s training step, batch %d: %8.2f ms, %6.1f pictures/s, %6.1f TFLOP/s\n", what, (int)B_TRAIN, 1e3 * step,
           B_TRAIN / step, 1e-12 * work / step);
    transformer_free(a->net);
    open_net(a, c, precision, 0);
    for (a->B = 1; a->B <= B_MAX; a->B *= 64) {
        need(transformer_plan(a->net, a->B, N, 0));
        const double pass = median(a, decode);
        printf("%-18s decoding, batch %2zu: %8.3f ms a position, %8.0f tokens/s\n", what, a->B, 1e3 * pass / N,
               (double)(a->B * N) / pass);
    }
    transformer_free(a->net);
}

int main(int argc, char **argv) {
    static Bench a;
    char text[CUDA_TEXT_BYTES];
    const int f32 = argc > 1 && strcmp(argv[1], "f32") == 0;
    need(cuda_find(text, NULL, NULL));
    printf("%s, %s\n", text, f32 ? "f32" : "bf16");
    bench(&a, "encoder-decoder", &encoder_decoder, f32 ? PRECISION_F32 : PRECISION_BF16);
    bench(&a, "last scale (GPT)", &last_scale, f32 ? PRECISION_F32 : PRECISION_BF16);
    return 0;
}
