/* bench_cuda.c - how fast the GPU trains, draws and decodes at the full size of the FFHQ models, with random weights,
 * and whether that is what was asked for.
 *
 *   bench_cuda [tiny] [f32] [--beside FILE]     tiny: a model of nothing, to see the program work; default: bf16
 *   bench_cuda gpu                              exit status 0 where there is a GPU
 *
 * FILE is what test/bench_cuda_torch.py wrote on the same machine just before: a line "name<TAB>seconds" for the same
 * work. The program measures two ceilings (a large matrix product; a copy within the GPU's memory, reading and writing
 * counted), then a training step, drawing a scale, a whole picture and the first stage, and ends with a table of what
 * is required, measured, and their ratio: 1 or more is enough.
 *
 * The median of some runs after one that warms up. Host clock, for every run ends with numbers on the host. Operations:
 * matrix products and attention only, those of a forward pass times 3; of causal attention the half that is needed.
 * What a token reads of weights: every matrix of the decoder but those of the context's keys and values.
 *
 * Read: sizes and the clock; transitions; the first stage; the table. */
#include "kernels/kernels.h"
#include "sampling/sampling.h"
#include "training/training.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- Sizes, results, the clock ---- */

enum { RUNS = 7, KINDS = 2 };

typedef struct {
    const char *recipe;
    size_t train, many;        /* batch of a training step; of drawing, beside 1 */
    size_t stage, stage_train; /* of the first stage */
    size_t matrix, copy;       /* side; bytes */
    int runs;                  /* whose median counts, at most RUNS */
} Sizes;
static const Sizes full = {"models/ffhq.txt", 32, 64, 8, 4, 8192, (size_t)2 << 30, RUNS};
static const Sizes tiny = {"test/tiny.txt", 2, 4, 2, 1, 64, 1 << 16, 1};

static const char *const kind_name[KINDS] = {"encoder-decoder scale", "last scale (GPT)"};
static const char *const kind_key[KINDS] = {"x", "gpt"};

typedef struct {
    Sizes size;
    Precision precision;
    double flops, bytes; /* ceilings: per second */
    double step[KINDS];  /* seconds of a training step */
    double step_flop[KINDS];
    double position[KINDS];               /* seconds of one at batch 1 */
    double weights[KINDS];                /* bytes of them that it reads */
    double pass[KINDS][2];                /* seconds of drawing a scale, encoder and all: batch 1, many */
    double picture;                       /* of one, all scales and pixels */
    double decode[2], encode, stage_step; /* decode: batch 1, stage */
} Results;

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

typedef void Work(void *context);
static double median(Work *work, void *context, int runs) {
    double took[RUNS];
    work(context);
    for (int i = 0; i < runs; i++) {
        const double start = now();
        work(context);
        took[i] = now() - start;
    }
    qsort(took, (size_t)runs, sizeof *took, by_size);
    return took[runs / 2];
}

static void say_speed(const char *what, size_t batch, double seconds, const char *rate, double per_second) {
    printf("%-24s batch %2zu  %9.3f ms", what, batch, 1e3 * seconds);
    if (rate) printf("  %10.1f %s", per_second, rate);
    printf("\n");
    fflush(stdout);
}

/* ---- Transitions ---- */

typedef struct {
    Transformer *net;
    Params *params;
    Schedule schedule;
    size_t N, B, B_max;
    int32_t *x0, *x, *x_t, *tokens; /* (B_max,N) */
    int32_t *t, *label;             /* (B_max) */
    uint64_t *stream, step;
    /* of the last pass: when it had drawn so many */
    double first_time, last_time;
    size_t first_done, last_done;
} Bench;

static void train_step(void *context) {
    Bench *a = (Bench *)context;
    const AdamW o = {1e-4, 0.9, 0.95, 1e-8, 1};
    Loss loss;
    params_zero_grad(a->params);
    need(
        transformer_loss_cuda(a->net, &a->schedule, a->x0, a->x, a->x_t, a->t, a->label, a->B, a->N, 0.5, 1, 1, &loss));
    if (!(params_grad_norm(a->params) > 0)) need(err("the gradient is 0 or NaN"));
    a->step++;
    adamw_ema_step(a->params, &o, a->step, 0.9999, a->step);
}

/* The GPU has just finished: what comes between two reports is nothing but steps. */
static int report(void *context, size_t done) {
    Bench *a = (Bench *)context;
    a->last_time = now(), a->last_done = done;
    if (!a->first_done) a->first_time = a->last_time, a->first_done = done;
    return 0;
}

static void draw(void *context) {
    Bench *a = (Bench *)context;
    const DrawOptions o = {.seed = 1, .stream = a->stream, .temperature = 1, .progress = report, .context = a};
    a->first_done = 0;
    need(transformer_decode_begin(a->net, a->x_t, a->t, a->label, a->B, a->N));
    need(transformer_draw_cuda(a->net, &o, a->tokens));
}

static void ids(int32_t **out, size_t n, uint64_t stream, size_t below) {
    need(mem_alloc(out, n, sizeof **out, "tokens"));
    for (size_t i = 0; i < n; i++) (*out)[i] = (int32_t)rng_below(1, stream, i, (uint32_t)below);
}

/* Scale t of the recipe, 0: the last one */
static void open_net(Bench *a, const Sizes *size, int t, Precision precision, int train) {
    Config recipe = {0};
    NetConfig c;
    const size_t B = size->train > size->many ? size->train : size->many;
    memset(a, 0, sizeof *a);
    need(recipe_read(&recipe, size->recipe, 1));
    need(net_config_read(&c, &recipe, "model.params."));
    config_free(&recipe);
    a->N = c.dec_max_seq_len, a->B_max = B; /* of an encoder-decoder scale, which has no prompt there */
    if (t == 0) {
        t = c.n_scales;
        need(recipe_read(&recipe, size->recipe, t));
        need(net_config_read(&c, &recipe, "model.params."));
        config_free(&recipe);
    }
    need(schedule_make(&a->schedule, "geometric", c.n_scales));
    need(transformer_create(&a->net, &c));
    need(transformer_use_cuda(a->net, precision));
    transformer_set_alphas(a->net, a->schedule.alpha);
    a->params = transformer_params(a->net);
    need(params_plan(a->params, PLAN_VALUE | (train ? PLAN_GRAD | PLAN_ADAM | PLAN_EMA : 0)));
    params_init(a->params, 1);
    need(params_send(a->params));
    ids(&a->x0, B * a->N, 1, c.dec_num_tokens), ids(&a->x, B * a->N, 2, c.dec_num_tokens);
    ids(&a->x_t, B * a->N, 3, c.dec_num_tokens), ids(&a->tokens, B * a->N, 4, c.dec_num_tokens);
    ids(&a->t, B, 5, 1), ids(&a->label, B, 6, 2);
    need(mem_alloc(&a->stream, B, sizeof *a->stream, "random streams"));
    for (size_t b = 0; b < B; b++) a->t[b] = t, a->stream[b] = rng_stream(RNG_TEST, 0, b);
}

static void close_net(Bench *a) {
    void *all[] = {a->x0, a->x, a->x_t, a->tokens, a->t, a->label, a->stream};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    transformer_free(a->net);
}

/* Numbers in the matrices whose names begin with `part` */
static double matrix_numbers(const Params *p, const char *part) {
    double n = 0;
    for (size_t r = 0; r < p->n; r++)
        if (p->row[r].matrix && !p->row[r].untrained && strncmp(p->row[r].name, part, strlen(part)) == 0)
            n += (double)p->row[r].size;
    return n;
}

/* Of the cross-attention's keys and values, which read the context */
static double context_numbers(const NetConfig *c) {
    return c->kind == NET_X ? 2.0 * 64 * (double)(c->dec_heads * c->dim * c->dec_depth) : 0;
}

static double step_flop(const Bench *a) {
    const NetConfig *c = transformer_config(a->net);
    const int x = c->kind == NET_X;
    const double N = (double)a->N, T = N + (c->has_class ? 2 : 1), depth = (double)c->dec_depth,
                 self = depth * N * N / 2;
    const double inner = x ? 64.0 * (double)c->dec_heads : (double)c->dim;
    const double encoder = x ? matrix_numbers(a->params, "encoder.") : 0;
    const double context = context_numbers(c), rest = matrix_numbers(a->params, "") - encoder - context;
    const double pairs = x ? self + depth * N * T + (double)c->enc_depth * T * T : self;
    return 3 * (double)a->B * (2 * (rest * N + (encoder + context) * T) + 4 * inner * pairs);
}

static void bench_training(Results *r, int k) {
    Bench a;
    open_net(&a, &r->size, k == 0 ? 1 : 0, r->precision, 1);
    a.B = r->size.train;
    need(transformer_plan(a.net, a.B, a.N, 1));
    r->step[k] = median(train_step, &a, r->size.runs), r->step_flop[k] = step_flop(&a);
    printf("%s\n", kind_name[k]);
    say_speed("  training step", a.B, r->step[k], "TFLOP/s", 1e-12 * r->step_flop[k] / r->step[k]);
    close_net(&a);
}

static void bench_drawing(Results *r, int k) {
    Bench a;
    open_net(&a, &r->size, k == 0 ? 1 : 0, r->precision, 0);
    const double encoder = matrix_numbers(a.params, "encoder."),
                 of_context = context_numbers(transformer_config(a.net));
    const double bytes = r->precision == PRECISION_BF16 ? 2 : 4;
    r->weights[k] = bytes * (matrix_numbers(a.params, "") - encoder - of_context);
    for (int many = 0; many < 2; many++) {
        a.B = many ? r->size.many : 1;
        need(transformer_plan(a.net, a.B, a.N, 0));
        r->pass[k][many] = median(draw, &a, r->size.runs);
        const double position = (a.last_time - a.first_time) / (double)(a.last_done - a.first_done);
        say_speed("  drawing a scale", a.B, r->pass[k][many], "tokens/s", (double)(a.B * a.N) / r->pass[k][many]);
        say_speed("    a position of it", a.B, position, many ? NULL : "GB/s of weights",
                  1e-9 * r->weights[k] / position);
        if (!many) r->position[k] = position;
    }
    close_net(&a);
}

/* ---- The first stage ---- */

typedef struct {
    Vqgan *v;
    size_t B, side, grid;
    real *images, *gradient;
    int32_t *tokens;
    uint64_t step;
} Stage;

static void open_stage(Stage *s, const Sizes *size, Precision precision, int train) {
    Config recipe = {0};
    VqganConfig c;
    size_t n;
    memset(s, 0, sizeof *s);
    need(recipe_read(&recipe, size->recipe, RECIPE_VQGAN));
    need(vqgan_config_read(&c, &recipe, "model.params."));
    config_free(&recipe);
    s->side = c.resolution, s->grid = c.resolution >> (c.levels - 1), n = size->stage * 3 * s->side * s->side;
    need(vqgan_create(&s->v, &c, 0));
    need(vqgan_use_cuda(s->v, precision));
    need(params_plan(vqgan_params(s->v), PLAN_VALUE | (train ? PLAN_GRAD | PLAN_ADAM : 0)));
    params_init(vqgan_params(s->v), 1);
    need(params_send(vqgan_params(s->v)));
    need(mem_alloc(&s->images, n, sizeof *s->images, "pictures"));
    need(mem_alloc(&s->gradient, n, sizeof *s->gradient, "their gradient"));
    for (size_t i = 0; i < n; i++) s->images[i] = (real)(2 * rng_uniform(1, 7, i) - 1), s->gradient[i] = s->images[i];
    ids(&s->tokens, size->stage * s->grid * s->grid, 8, vqgan_K(s->v));
}

static void close_stage(Stage *s) {
    vqgan_free(s->v);
    free(s->images), free(s->gradient), free(s->tokens);
}

static void decode(void *context) {
    Stage *s = (Stage *)context;
    need(vqgan_decode_tokens(s->v, s->tokens, s->B, s->grid, s->grid, s->images));
}

static void encode(void *context) {
    Stage *s = (Stage *)context;
    need(vqgan_encode(s->v, s->images, s->B, s->side, s->side, 0, NULL, s->tokens, NULL));
}

static void stage_step(void *context) {
    Stage *s = (Stage *)context;
    const AdamW o = {1e-5, 0.5, 0.9, 1e-8, 1};
    const real *xrec;
    double loss;
    params_zero_grad(vqgan_params(s->v));
    need(vqgan_forward(s->v, s->images, s->B, s->side, s->side, &xrec, &loss));
    need(vqgan_backward(s->v, s->gradient, 1, NULL));
    if (!(params_grad_norm(vqgan_params(s->v)) > 0)) need(err("the first stage's gradient is 0 or NaN"));
    adamw_step(vqgan_params(s->v), &o, ++s->step);
}

static void bench_stage(Results *r) {
    Stage s;
    open_stage(&s, &r->size, r->precision, 0);
    printf("first stage, %zux%zu\n", s.side, s.side);
    for (int many = 1; many >= 0; many--) {
        s.B = many ? r->size.stage : 1;
        need(vqgan_plan(s.v, s.B, s.side, s.side, 0));
        r->decode[many] = median(decode, &s, r->size.runs);
        say_speed("  decode", s.B, r->decode[many], "pictures/s", (double)s.B / r->decode[many]);
        if (!many) continue;
        r->encode = median(encode, &s, r->size.runs);
        say_speed("  encode", s.B, r->encode, "pictures/s", (double)s.B / r->encode);
    }
    close_stage(&s);
    open_stage(&s, &r->size, r->precision, 1);
    s.B = r->size.stage_train;
    need(vqgan_plan(s.v, s.B, s.side, s.side, 1));
    r->stage_step = median(stage_step, &s, r->size.runs);
    say_speed("  training step", s.B, r->stage_step, "pictures/s", (double)s.B / r->stage_step);
    close_stage(&s);
}

/* One picture: the last scale, the others, whose networks are of one shape and here one network, and the pixels. What
 * each drew is the next one's x_t. Everything is on the GPU already. */
typedef struct {
    Bench net[KINDS];
    Stage stage;
} Drawing;

static void picture(void *context) {
    Drawing *c = (Drawing *)context;
    draw(&c->net[1]);
    memcpy(c->net[0].x_t, c->net[1].tokens, c->net[0].N * sizeof(int32_t));
    for (int32_t t = c->net[1].t[0] - 1; t >= 1; t--) {
        c->net[0].t[0] = t;
        draw(&c->net[0]);
        memcpy(c->net[0].x_t, c->net[0].tokens, c->net[0].N * sizeof(int32_t));
    }
    memcpy(c->stage.tokens, c->net[0].tokens, c->net[0].N * sizeof(int32_t));
    decode(&c->stage);
}

static void bench_picture(Results *r) {
    static Drawing c;
    for (int k = 0; k < KINDS; k++) {
        open_net(&c.net[k], &r->size, k == 0 ? 1 : 0, r->precision, 0);
        c.net[k].B = 1;
        need(transformer_plan(c.net[k].net, 1, c.net[k].N, 0));
    }
    open_stage(&c.stage, &r->size, r->precision, 0);
    c.stage.B = 1;
    need(vqgan_plan(c.stage.v, 1, c.stage.side, c.stage.side, 0));
    r->picture = median(picture, &c, r->size.runs);
    printf("a picture of %d scales, tokens to pixels\n", c.net[1].t[0]);
    say_speed("  drawing and decoding", 1, r->picture, NULL, 0);
    for (int k = 0; k < KINDS; k++) close_net(&c.net[k]);
    close_stage(&c.stage);
}

/* ---- The table ---- */

typedef struct {
    char name[64];
    double seconds;
} Beside;
static Beside beside[64];
static size_t n_beside;

static void read_beside(const char *path) {
    FILE *f = fopen(path, "r");
    char line[256];
    if (!f) need(err("%s: cannot be read; test/bench_cuda_torch.py -o %s writes it", path, path));
    while (fgets(line, sizeof line, f)) {
        Beside *b = &beside[n_beside];
        if (n_beside == sizeof beside / sizeof *beside) need(err("%s: more than %zu lines", path, n_beside));
        if (sscanf(line, "%63[^\t]\t%lf", b->name, &b->seconds) != 2 || !(b->seconds > 0))
            need(err("%s: line %zu is not a name, a tab and seconds: %.80s", path, n_beside + 1, line));
        n_beside++;
    }
    fclose(f);
}

/* PyTorch's seconds, 0: not measured */
static double theirs(const char *what, const char *of) {
    char name[64];
    snprintf(name, sizeof name, "%s%s%s", what, *of ? " " : "", of);
    for (size_t i = 0; i < n_beside; i++)
        if (strcmp(beside[i].name, name) == 0) return beside[i].seconds;
    return 0;
}

/* measured 0: there was nothing to compare with. required: at least, at most if negative, for information if 0. */
static void line(const char *what, const char *of, double measured, double required, const char *unit) {
    char name[96];
    snprintf(name, sizeof name, "%s%s%s", what, *of ? ", " : "", of);
    printf("%-58s", name);
    if (measured > 0)
        printf(" %9.3f", measured);
    else
        printf(" %9s", "no PyTorch");
    if (required != 0)
        printf(" %s%8.3f", required < 0 ? "<" : ">", required < 0 ? -required : required);
    else
        printf(" %9s", "-");
    if (measured > 0 && required != 0)
        printf(" %9.2f", required > 0 ? measured / required : -required / measured);
    else
        printf(" %9s", "-");
    printf("  %s\n", unit);
}

static void table(const Results *r) {
    static const char *const against = "x PyTorch";
    double ours[2], their = 0;
    printf("\n%-58s %9s %9s %9s\n", "requirement", "measured", "required", "ratio");
    for (int k = 0; k < KINDS; k++)
        line("training, compiled", kind_name[k], theirs("train compiled", kind_key[k]) / r->step[k], 1.3, against);
    for (int k = 0; k < KINDS; k++)
        line("training", kind_name[k], r->step_flop[k] / r->step[k] / r->flops, 0.4, "of the matrix rate");
    for (int k = 0; k < KINDS; k++)
        line("a token at batch 1", kind_name[k], r->weights[k] / r->position[k] / r->bytes, 0.5,
             "of the copy bandwidth");
    line("one picture, all scales and pixels", "", r->picture, -0.25, "s");
    for (int many = 1; many >= 0; many--) { /* all scales but one are encoder-decoder scales; FFHQ has four */
        const char *const batch = many ? "many" : "one";
        const double x = theirs("draw x", batch), gpt = theirs("draw gpt", batch);
        ours[many] = 3 * r->pass[0][many] + r->pass[1][many], their = x > 0 && gpt > 0 ? 3 * x + gpt : 0;
        line(many ? "tokens of pictures at the large batch" : "tokens of a picture at batch 1", "static KV cache",
             their / ours[many], many ? 2 : 0, against);
    }
    line("first stage decodes at its batch", "channels-last bf16", theirs("decode", "many") / r->decode[1], 1.2,
         against);
    line("first stage decodes one picture", "channels-last bf16", theirs("decode", "one") / r->decode[0], 1.2, against);
    line("first stage decodes at its batch", "compiled", theirs("decode compiled", "many") / r->decode[1], 0, against);
    line("first stage encodes", "channels-last bf16", theirs("encode", "many") / r->encode, 0, against);
    line("first stage, training step", "channels-last bf16", theirs("stage step", "") / r->stage_step, 0, against);
    for (int k = 0; k < KINDS; k++)
        line("training, eager", kind_name[k], theirs("train eager", kind_key[k]) / r->step[k], 0, against);
    line("matrix rate", "", 1e-12 * r->flops, 0, "TFLOP/s");
    line("copy bandwidth", "", 1e-9 * r->bytes, 0, "GB/s");
}

/* ---- All of it ---- */

/* The better of two sizes */
static void bench_ceilings(Results *r) {
    for (size_t n = r->size.matrix; n >= r->size.matrix / 2; n /= 2) {
        double product, copy;
        need(cuda_measure(r->precision, n, r->size.copy, &product, &copy));
        const double flops = 2.0 * (double)n * (double)n * (double)n / product, bytes = 2 * (double)r->size.copy / copy;
        if (flops > r->flops) r->flops = flops;
        if (bytes > r->bytes) r->bytes = bytes;
    }
    printf("ceilings: %.1f TFLOP/s, %.0f GB/s\n", 1e-12 * r->flops, 1e-9 * r->bytes);
}

int main(int argc, char **argv) {
    static Results r;
    char text[CUDA_TEXT_BYTES];
    r.size = full, r.precision = PRECISION_BF16;
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], "tiny"))
            r.size = tiny;
        else if (!strcmp(argv[i], "f32"))
            r.precision = PRECISION_F32;
        else if (!strcmp(argv[i], "gpu"))
            return cuda_find(NULL, NULL, NULL) != OK;
        else if (!strcmp(argv[i], "--beside") && i + 1 < argc)
            read_beside(argv[++i]);
        else
            return fprintf(stderr, "usage: bench_cuda [tiny] [f32] [--beside FILE]\n"), 2;
    need(cuda_find(text, NULL, NULL));
    printf("%s, %s, %s\n", text, r.precision == PRECISION_F32 ? "f32" : "bf16", r.size.recipe);
    bench_ceilings(&r);
    for (int k = 0; k < KINDS; k++) bench_training(&r, k), bench_drawing(&r, k);
    bench_stage(&r);
    bench_picture(&r);
    table(&r);
    return 0;
}
