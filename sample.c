/* sample.c - draws pictures: pure noise, then the transitions of scale T down to 1, then the VQGAN's decoder.
 *
 *     draw     x_T -> ... -> x_0      draw_tokens: sample_chain (diffusion.c), a batch at a time; of the M that are
 *                                     drawn for each picture, keep_best keeps one that the model finds likely
 *     decode   x_0 -> pixels          write_grid: decode_pictures, which is vqgan_decode_tokens
 *     write    pixels -> PNG          write_grid: image_grid, image_write_png, with the options as text
 *
 * sample() is all of it in order. Read next: diffusion.c, the chain; vqgan.c, the decoder. */
#include "sampling/sampling.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const double NEARLY = 0.5; /* nats per token: bounds of good pictures differ by less, of bad ones by more */

typedef struct {
    Model model;
    const SamplingArgs *args;
    size_t N, pixels, steps; /* steps: T+1 */
    size_t M, rows;          /* M are drawn for every picture, of which one is kept; rows are drawn in a batch */
    int32_t *label;          /* (n) */
    int32_t *tokens;         /* (n,N) x_0 */
    int32_t *chain;          /* (n,steps,N) x_T .. x_0, when a picture of the chain is wanted */
    int32_t *drawn_label;    /* (rows) a batch, of which one in M is kept */
    int32_t *drawn;          /* (rows,N) */
    int32_t *drawn_chain;    /* (rows,steps,N) */
    double *bound;           /* (rows) */
    SampleOptions options;
    DraftCounts counts[MAX_SCALES + 1];
} Pictures;

/* ---- Draw ---- */

/* tokens = x_{t-1} of a batch, when scale t is done: a column of the picture of the chain. */
static void keep_scale(void *context, int t, const int32_t *tokens) {
    Pictures *p = (Pictures *)context;
    size_t column = p->steps - (size_t)t; /* t = T+1: x_T, column 0 */
    for (size_t b = 0; p->chain && b < p->options.n; b++)
        memcpy(p->drawn_chain + (b * p->steps + column) * p->N, tokens + b * p->N, p->N * sizeof *tokens);
}

static int progress(void *context, int t, size_t repeat, size_t done, size_t of) {
    const Pictures *p = (const Pictures *)context;
    SampleOptions shown = p->options;
    shown.candidates = p->M; /* pictures are counted, not what is drawn for them */
    return sampling_progress(&shown, t, repeat, done, of);
}

/* Draws M times `count` pictures, from number first on. */
static Err draw_batch(Pictures *p, size_t first, size_t count) {
    for (size_t b = 0; p->label && b < count * p->M; b++) p->drawn_label[b] = p->label[first + b / p->M];
    p->options.first = first * p->M;
    p->options.n = count * p->M;
    p->options.label = p->label ? p->drawn_label : NULL;
    const Chain chain = model_chain(&p->model);
    return sample_chain(&chain, &p->options, p->drawn);
}

/* Of the M bounds of a picture, the first that is nearly the least: among good pictures the least would be the
 * simplest, and the same again and again. */
static size_t first_good(const double *bound, size_t M) {
    size_t least = 0, first = 0;
    for (size_t j = 1; j < M; j++)
        if (bound[j] < bound[least]) least = j;
    while (bound[first] > bound[least] + NEARLY) first++;
    return first;
}

/* Of the M that are drawn for each of `count` pictures, one becomes picture first, first+1, ... */
static Err keep_best(Pictures *p, size_t first, size_t count) {
    const size_t M = p->M, N = p->N, chain_N = p->steps * p->N;
    const Chain chain = model_chain(&p->model);
    if (M > 1) TRY(picture_bounds(&chain, p->drawn, p->options.label, count * M, p->args->seed, p->bound));
    for (size_t b = 0; b < count; b++) {
        const size_t to = first + b, from = b * M + (M > 1 ? first_good(p->bound + b * M, M) : 0);
        memcpy(p->tokens + to * N, p->drawn + from * N, N * sizeof *p->tokens);
        if (!p->chain) continue;
        memcpy(p->chain + to * chain_N, p->drawn_chain + from * chain_N, chain_N * sizeof *p->chain);
    }
    return OK;
}

/* x_0 of all n pictures, and with_chain x_T .. x_0. */
static Err draw_tokens(Pictures *p, int with_chain) {
    const size_t n = p->args->n, at_once = p->rows / p->M;
    const size_t bytes = p->N * sizeof *p->tokens;
    TRY(mem_alloc(&p->tokens, n, bytes, "tokens"));
    TRY(mem_alloc(&p->drawn, p->rows, bytes, "tokens of a batch"));
    TRY(mem_alloc(&p->drawn_label, p->rows, sizeof *p->drawn_label, "classes of a batch"));
    TRY(mem_alloc(&p->bound, p->rows, sizeof *p->bound, "bounds of a batch"));
    if (with_chain) TRY(mem_alloc(&p->chain, n, p->steps * bytes, "tokens of every scale"));
    if (with_chain) TRY(mem_alloc(&p->drawn_chain, p->rows, p->steps * bytes, "tokens of every scale"));
    p->options.progress = progress;
    p->options.counts = p->counts;
    p->options.scale_done = keep_scale;
    p->options.context = p;
    for (size_t first = 0; first < n; first += at_once) {
        const size_t count = min_size(at_once, n - first);
        TRY(draw_batch(p, first, count));
        TRY(keep_best(p, first, count));
    }
    progress_end();
    return OK;
}

/* ---- Decode and write ---- */

static size_t grid_columns(size_t n) {
    return (size_t)ceil(sqrt((double)n));
}

/* tokens (n,N) -> pictures (n,3,side,side) -> one PNG, `columns` wide, that says how it was made. */
static Err write_grid(Pictures *p, const int32_t *tokens, size_t n, size_t columns, const char *path) {
    real *images = NULL;
    Image im = {0};
    Config text = {0};
    TRY(mem_alloc(&images, n, p->pixels * sizeof *images, "pictures"));
    Err e = decode_pictures(&p->model, tokens, n, images);
    if (e == OK) e = image_grid(&im, images, n, p->model.side, p->model.side, columns, 2);
    if (e == OK) e = sampling_text(&text, p->args, &p->options, &p->model);
    if (e == OK && p->M > 1) e = config_set(&text, "best-of", "%zu", p->M);
    if (e == OK) e = image_write_png(path, &im, &text);
    image_free(&im);
    config_free(&text);
    free(images);
    return e;
}

/* ---- The whole ---- */

/* One class for all, or every sample its own drawn at random. */
static Err choose_classes(Pictures *p) {
    int32_t one = -1;
    const SamplingArgs *a = p->args;
    if (a->class_name) TRY(model_class(&p->model, a->class_name, &one));
    if (p->model.classes.n == 0) return OK;
    TRY(mem_alloc(&p->label, a->n, sizeof *p->label, "classes"));
    for (size_t b = 0; b < a->n; b++)
        p->label[b] =
            one >= 0 ? one : (int32_t)rng_below(a->seed, rng_stream(RNG_START, 1, b), 0, (uint32_t)p->model.classes.n);
    return OK;
}

/* How many are drawn for every picture: the user's number, else what the model recommends. */
static void best_of(Pictures *p, size_t given) {
    check(sampling_many(&p->M, &p->model, given, DRAW_NEW));
    p->rows = max_size(1, min_size(p->args->n, p->args->batch / p->M)) * p->M;
}

/* The seed, and the classes: the first 64 where each sample has its own. */
static void say_classes(const Pictures *p) {
    char title[CLASS_TITLE_BYTES];
    fprintf(stderr, "seed %llu", (unsigned long long)p->args->seed);
    for (size_t b = 0; p->label && !p->args->class_name && b < p->args->n && b < 64; b++)
        fprintf(stderr, "%s%s", b ? ", " : ", classes: ", class_title(title, &p->model.classes, (size_t)p->label[b]));
    if (p->label && p->args->class_name)
        fprintf(stderr, ", class %d: %s", (int)p->label[0], class_title(title, &p->model.classes, (size_t)p->label[0]));
    fprintf(stderr, "\n");
}

/* The model, its options, and room for what will be drawn; what is said before the work begins. */
static void prepare(Pictures *p, SamplingArgs *a, size_t most, const char *chain_path, const char *nearest) {
    const NamedModel *missing;
    const int with_chain = chain_path != NULL;
    check(outputs_check(a->out, chain_path));
    if (nearest) check(nearest_check(nearest));
    memset(p, 0, sizeof *p);
    p->args = a;
    sampling_start(a, &p->model, &missing);
    sampling_options(&p->options, a, &p->model, DRAW_NEW);
    p->N = p->model.h * p->model.w;
    p->pixels = 3 * p->model.side * p->model.side;
    p->steps = (size_t)p->model.schedule.T + 1;
    check(output_grid_check("-o", a->n, p->model.side, grid_columns(a->n), 2));
    if (with_chain) check(output_grid_check("--chain", a->n * p->steps, p->model.side, p->steps, 2));
    check(choose_classes(p));
    best_of(p, most);
    const size_t rows = sampling_rows(&p->options, p->model.schedule.T, p->rows),
                 bound_rows = p->M > 1 ? BOUND_ROWS : 0;
    sampling_memory(&p->model, max_size(rows, bound_rows), with_chain ? a->n * p->steps : a->n);
    say_classes(p);
    catch_interrupts();
}

static void say_end(const Pictures *p, double took) {
    char text[32], likeliest[48] = "";
    say_drafts(p->counts, p->model.schedule.T);
    if (p->M > 1) snprintf(likeliest, sizeof likeliest, ", each a likely one of %zu,", p->M);
    fprintf(stderr, "%zu picture%s%s in %s, seed %llu\n", p->args->n, p->args->n == 1 ? "" : "s", likeliest,
            duration(text, took), (unsigned long long)p->args->seed);
}

static void sample(SamplingArgs *a, size_t most, const char *chain_path, const char *nearest) {
    const double start = seconds();
    Pictures p;
    prepare(&p, a, most, chain_path, nearest);
    check(draw_tokens(&p, chain_path != NULL));
    check(write_grid(&p, p.tokens, a->n, grid_columns(a->n), a->out));
    if (chain_path)
        check(write_grid(&p, p.chain, a->n * p.steps, p.steps, chain_path)); /* x_T .. x_0 of a sample: a row */
    say_end(&p, seconds() - start);
    printf("%s\n", a->out);
    if (chain_path) printf("%s\n", chain_path);
    if (a->show) check(show_png(a->out));
    if (nearest) check(nearest_report(&p.model, p.tokens, a->n, nearest));
    model_close(&p.model);
    void *buffers[] = {p.label, p.tokens, p.chain, p.drawn_label, p.drawn, p.drawn_chain, p.bound};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
}

/* ---- --convert ---- */

static void convert(SamplingArgs *a, const char *folder, const char *store) {
    Model m;
    Dtype type;
    if (dtype_of_store(&type, store) != OK) usage_error("--store %s", err_text());
    check(model_open(&m, a->model, NULL));
    m.no_ema = a->no_ema;
    check(model_convert(&m, folder, type));
    printf("%s\n", folder);
    model_close(&m);
}

static const char intro[] =
    "usage: ./sample [MODEL] [options]\n\n"
    "Draws pictures with an ImageBART model: starts from a grid of random tokens x_T and, scale by scale, lets a\n"
    "transformer that sees the whole noisier grid write the cleaner one, token by token: x_T -> ... -> x_0. A VQGAN\n"
    "turns the tokens x_0 into pixels. --chain shows every step of it.\n";

int main(int argc, char **argv) {
    SamplingArgs a = {.model = "emoji", .out = "samples.png", .n = 16, .batch = 16};
    const char *chain = NULL, *nearest = NULL, *folder = NULL, *store = "f32";
    size_t most = 0;
    int list = 0;
    const Option table[] = {
        {OPT_HEADING, "Arguments", NULL, NULL, 0, 0, NULL},
        {OPT_ARGUMENT, "MODEL", NULL, &a.model, 0, 0,
         "emoji (default), a name that --list shows, or a folder with\nweights such as runs/emoji"},
        {OPT_HEADING, "Options", NULL, NULL, 0, 0, NULL},
        {OPT_SIZE, "-n", "COUNT", &a.n, 1, 4096, "how many pictures (default 16)"},
        {OPT_STRING, "-o", "OUT.png", &a.out, 0, 0, "where the grid of them goes (default samples.png)"},
        {OPT_SIZE, "--best-of", "M", &most, 1, MAX_BEST_OF,
         "draw M for each picture and keep one that the model itself finds likely,\nby the bound it was trained with "
         "(default: what the model recommends, else 1)"},
        {OPT_STRING, "--chain", "CHAIN.png", &chain, 0, 0, "also draw every scale: a row per sample, x_T at the left"},
        {OPT_STRING, "--nearest", "DATA", &nearest, 0, 0,
         "compare each picture with the training pictures in this folder: same tokens,\ndistance of pixels"},
        {OPT_FLAG, "--list", NULL, &list, 0, 0,
         "the models, which of them are here, how to get the others\n(make ffhq)"},
        {OPT_STRING, "--convert", "DIR", &folder, 0, 0, "write the model as safetensors into DIR instead of sampling"},
        {OPT_STRING, "--store", "TYPE", &store, 0, 0, "with --convert: weights as f32 (default), f16 or bf16"},
        {OPT_END, NULL, NULL, NULL, 0, 0, NULL}};
    sampling_parse(argc, argv, table, &a, intro);
    if (list)
        check(list_models());
    else if (folder)
        convert(&a, folder, store);
    else
        sample(&a, most, chain, nearest);
    if (fflush(stdout)) die("standard output could not be written");
    return 0;
}
