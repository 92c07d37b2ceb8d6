/* sample.c - draws pictures: pure noise, then the transitions of scale T down to 1, then the VQGAN's decoder.
 *
 *     draw     x_T -> ... -> x_0      draw_tokens: sample_chain (diffusion.c), a batch at a time; of the M that are
 *                                     drawn for each picture, sampling/draw.c keeps one that the model finds likely
 *     decode   x_0 -> pixels          write_grid: decode_pictures, which is vqgan_decode_tokens
 *     write    pixels -> PNG          write_grid: image_grid, image_write_png, with the options as text
 *
 * sample() is all of it in order. Read next: diffusion.c, the chain; vqgan.c, the decoder. */
#include "sampling/sampling.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    Model model;
    const SamplingArgs *args;
    Draw draw;
    size_t pixels, steps; /* steps: T+1 */
    DraftCounts counts[MAX_SCALES + 1];
} Pictures;

/* ---- Draw ---- */

static int progress(void *context, const DrawBatch *b, int t, size_t repeat, size_t done, size_t of) {
    SampleOptions shown = *b->options;
    shown.candidates = b->each; /* pictures are counted, not what is drawn for them */
    (void)context;
    return sampling_progress(&shown, t, repeat, done, of);
}

/* x_0 of all n pictures, and with_chain x_T .. x_0. */
static Err draw_tokens(Pictures *p, int with_chain) {
    p->draw.with_chain = with_chain;
    p->draw.options.counts = p->counts;
    p->draw.watch.progress = progress;
    TRY(draw_pictures(&p->draw));
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
    if (e == OK) e = sampling_text(&text, p->args, &p->draw.options, &p->model);
    if (e == OK && p->draw.M > 1) e = config_set(&text, "best-of", "%zu", p->draw.M);
    if (e == OK) e = sampling_text_place(&text, p->draw.n, p->draw.first, 0);
    if (e == OK) e = image_write_png(path, &im, &text);
    image_free(&im);
    config_free(&text);
    free(images);
    return e;
}

/* ---- The whole ---- */

/* The seed, and the classes: the first 64 where each sample has its own. */
static void say_classes(const Pictures *p) {
    const int32_t *label = p->draw.label;
    char title[CLASS_TITLE_BYTES];
    fprintf(stderr, "seed %llu", (unsigned long long)p->args->seed);
    for (size_t b = 0; label && !p->args->class_name && b < p->args->n && b < 64; b++)
        fprintf(stderr, "%s%s", b ? ", " : ", classes: ", class_title(title, &p->model.classes, (size_t)label[b]));
    if (label && p->args->class_name)
        fprintf(stderr, ", class %d: %s", (int)label[0], class_title(title, &p->model.classes, (size_t)label[0]));
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
    p->draw = (Draw){.model = &p->model, .n = a->n, .first = a->first};
    sampling_options(&p->draw.options, a, &p->model, DRAW_NEW);
    check(sampling_many(&p->draw.M, &p->model, most, DRAW_NEW));
    p->draw.rows = draw_rows(a->n, a->batch, p->draw.M);
    p->pixels = 3 * p->model.side * p->model.side;
    p->steps = (size_t)p->model.schedule.T + 1;
    check(output_grid_check("-o", a->n, p->model.side, grid_columns(a->n), 2));
    if (with_chain) check(output_grid_check("--chain", a->n * p->steps, p->model.side, p->steps, 2));
    check(draw_classes(&p->draw.label, &p->model, a->class_name, a->seed, a->first, a->n));
    const size_t rows = sampling_rows(&p->draw.options, p->model.schedule.T, p->draw.rows),
                 bound_rows = p->draw.M > 1 ? BOUND_ROWS : 0;
    sampling_memory(&p->model, max_size(rows, bound_rows), with_chain ? a->n * p->steps : a->n);
    say_classes(p);
    catch_interrupts();
}

static void say_end(const Pictures *p, double took) {
    char text[32], likeliest[48] = "";
    say_drafts(p->counts, p->model.schedule.T);
    if (p->draw.M > 1) snprintf(likeliest, sizeof likeliest, ", each a likely one of %zu,", p->draw.M);
    fprintf(stderr, "%zu picture%s%s in %s, seed %llu\n", p->args->n, p->args->n == 1 ? "" : "s", likeliest,
            duration(text, took), (unsigned long long)p->args->seed);
}

static void sample(SamplingArgs *a, size_t most, const char *chain_path, const char *nearest) {
    const double start = seconds();
    Pictures p;
    prepare(&p, a, most, chain_path, nearest);
    check(draw_tokens(&p, chain_path != NULL));
    check(write_grid(&p, p.draw.tokens, a->n, grid_columns(a->n), a->out));
    if (chain_path)
        check(write_grid(&p, p.draw.chain, a->n * p.steps, p.steps, chain_path)); /* x_T .. x_0 of a sample: a row */
    say_end(&p, seconds() - start);
    printf("%s\n", a->out);
    if (chain_path) printf("%s\n", chain_path);
    if (a->show) check(show_png(a->out));
    if (nearest) check(nearest_report(&p.model, p.draw.tokens, a->n, nearest));
    model_close(&p.model);
    draw_free(&p.draw);
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
