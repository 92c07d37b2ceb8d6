/* sample.c - draws pictures: pure noise, then the transitions of scale T down to 1, then the VQGAN's decoder.
 *
 * Options, progress and files; the sampling itself is model_sample in diffusion.c. */
#include "imagebart.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    Model model;
    const SamplingArgs *args;
    size_t N, pixels;
    int32_t *label;  /* (n) */
    int32_t *tokens; /* (n,N) x_0 */
    int32_t *chain;  /* (n,T+1,N) x_T .. x_0, when a picture of the chain is wanted */
    SampleOptions options;
    DraftCounts counts[MAX_SCALES + 1];
} Job;

static void list_models(void) {
    size_t n;
    const NamedModel *m = named_models(&n);
    printf("%-10s %-36s %s\n", "model", "weights", "what");
    for (size_t i = 0; i < n; i++) {
        char missing[32], state[64] = "here";
        size_t here = model_files(missing, &m[i]);
        if (*missing && !m[i].zip)
            snprintf(state, sizeof state, "damaged: no %s", missing);
        else if (*missing && here)
            snprintf(state, sizeof state, "partly here, no %s: make %s", missing, m[i].name);
        else if (*missing)
            snprintf(state, sizeof state, "not here: make %s", m[i].name);
        printf("%-10s %-36s %s\n", m[i].name, state, m[i].what);
    }
    printf(
        "\n\"make ffhq\" and so on fetch the official files into models/; their .ckpt files are read as they are.\n"
        "Any folder with vqgan.safetensors and scale1.safetensors ... is a model too, such as a run of ./train; so is\n"
        "one with scale1.ckpt ... of the official code and a recipe config.txt (models/ffhq.txt is an example).\n");
}

/* One class for all, or every sample its own drawn at random. */
static Err choose_classes(Job *job) {
    int32_t one = -1;
    const SamplingArgs *a = job->args;
    if (a->class_name) TRY(model_class(&job->model, a->class_name, &one));
    if (job->model.n_classes == 0) return OK;
    TRY(mem_alloc(&job->label, a->n, sizeof *job->label, "classes"));
    for (size_t b = 0; b < a->n; b++)
        job->label[b] =
            one >= 0 ? one
                     : (int32_t)rng_below(a->seed, rng_stream(RNG_START, 1, b), 0, (uint32_t)job->model.n_classes);
    return OK;
}

static void keep_scale(void *context, int t, const int32_t *tokens) {
    Job *job = (Job *)context;
    size_t T = (size_t)job->model.schedule.T, column = T + 1 - (size_t)t; /* t = T+1: x_T, column 0 */
    for (size_t b = 0; job->chain && b < job->options.n; b++)
        memcpy(job->chain + ((job->options.first + b) * (T + 1) + column) * job->N, tokens + b * job->N,
               job->N * sizeof *tokens);
}

static int progress(void *context, int t, size_t repeat, size_t done, size_t of) {
    return sampling_progress(&((Job *)context)->options, t, repeat, done, of);
}

static Err draw_tokens(Job *job, int with_chain) {
    const SamplingArgs *a = job->args;
    size_t T = (size_t)job->model.schedule.T, n;
    TRY(size_mul(&n, a->n, job->N));
    TRY(mem_alloc(&job->tokens, n, sizeof *job->tokens, "tokens"));
    if (with_chain) TRY(mem_alloc(&job->chain, n * (T + 1), sizeof *job->chain, "tokens of every scale"));
    job->options.progress = progress;
    job->options.counts = job->counts;
    job->options.scale_done = keep_scale;
    job->options.context = job;
    for (size_t first = 0; first < a->n; first += a->batch) {
        job->options.first = first;
        job->options.n = a->n - first < a->batch ? a->n - first : a->batch;
        job->options.label = job->label ? job->label + first : NULL;
        TRY(model_sample(&job->model, &job->options, job->tokens + first * job->N));
    }
    progress_end();
    return OK;
}

static Err write_grid(Job *job, const int32_t *tokens, size_t n, size_t columns, const char *path) {
    real *images = NULL;
    Image im = {0};
    Config text = {0};
    TRY(mem_alloc(&images, n, job->pixels * sizeof *images, "pictures"));
    Err e = decode_pictures(&job->model, tokens, n, images);
    if (e == OK) e = image_grid(&im, images, n, job->model.side, job->model.side, columns, 2);
    if (e == OK) e = sampling_text(&text, job->args, &job->options, &job->model);
    if (e == OK) e = image_write_png(path, &im, &text);
    image_free(&im);
    config_free(&text);
    free(images);
    return e;
}

static void say_classes(const Job *job) {
    char title[CLASS_TITLE_BYTES];
    fprintf(stderr, "seed %llu", (unsigned long long)job->args->seed);
    for (size_t b = 0; job->label && !job->args->class_name && b < job->args->n && b < 64; b++)
        fprintf(stderr, "%s%s", b ? ", " : ", classes: ", class_title(title, &job->model, (size_t)job->label[b]));
    if (job->label && job->args->class_name)
        fprintf(stderr, ", class %d: %s", (int)job->label[0], class_title(title, &job->model, (size_t)job->label[0]));
    fprintf(stderr, "\n");
}

static void sample(SamplingArgs *a, const char *chain_path, const char *nearest) {
    Job job;
    const NamedModel *missing;
    double start = seconds();
    char took[32];
    memset(&job, 0, sizeof job);
    job.args = a;
    sampling_start(a, &job.model, &missing);
    sampling_options(&job.options, a, &job.model, "chain_length", "1", 1);
    job.N = job.model.h * job.model.w;
    job.pixels = 3 * job.model.side * job.model.side;
    size_t T = (size_t)job.model.schedule.T, columns = (size_t)ceil(sqrt((double)a->n));
    check(choose_classes(&job));
    sampling_memory(&job.model, sample_rows(&job.options, &job.model, min_size(a->n, a->batch)),
                    chain_path ? a->n * (T + 1) : a->n);
    say_classes(&job);
    catch_interrupts();
    check(draw_tokens(&job, chain_path != NULL));
    check(write_grid(&job, job.tokens, a->n, columns, a->out));
    if (chain_path) check(write_grid(&job, job.chain, a->n * (T + 1), T + 1, chain_path));
    say_drafts(job.counts, (int)T);
    fprintf(stderr, "%zu pictures in %s, seed %llu\n", a->n, duration(took, seconds() - start),
            (unsigned long long)a->seed);
    printf("%s\n", a->out);
    if (chain_path) printf("%s\n", chain_path);
    if (a->show) check(show_png(a->out));
    if (nearest) check(nearest_report(&job.model, job.tokens, a->n, nearest));
    model_close(&job.model);
    free(job.label);
    free(job.tokens);
    free(job.chain);
}

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
    SamplingArgs a = {.model = "emoji", .out = "samples.png", .n = 16, .batch = 16, .seed = SEED_NOT_GIVEN};
    const char *chain = NULL, *nearest = NULL, *folder = NULL, *store = "f32";
    int list = 0;
    const Option table[] = {
        {OPT_HEADING, "Arguments", NULL, NULL, 0, 0, NULL},
        {OPT_ARGUMENT, "MODEL", NULL, &a.model, 0, 0,
         "emoji (default), a name that --list shows, or a folder with\nweights such as runs/emoji"},
        {OPT_HEADING, "Options", NULL, NULL, 0, 0, NULL},
        {OPT_SIZE, "-n", "COUNT", &a.n, 1, 4096, "how many pictures (default 16)"},
        {OPT_STRING, "-o", "OUT.png", &a.out, 0, 0, "where the grid of them goes (default samples.png)"},
        SAMPLING_OPTIONS(a),
        {OPT_STRING, "--chain", "CHAIN.png", &chain, 0, 0, "also draw every scale: a row per sample, x_T at the left"},
        {OPT_STRING, "--nearest", "DATA", &nearest, 0, 0,
         "compare each picture with the training pictures in this folder: same tokens,\ndistance of pixels"},
        {OPT_FLAG, "--list", NULL, &list, 0, 0,
         "the models, which of them are here, how to get the others\n(make ffhq)"},
        {OPT_STRING, "--convert", "DIR", &folder, 0, 0, "write the model as safetensors into DIR instead of sampling"},
        {OPT_STRING, "--store", "TYPE", &store, 0, 0, "with --convert: weights as f32 (default), f16 or bf16"},
        {OPT_END, NULL, NULL, NULL, 0, 0, NULL}};
    options_parse(argc, argv, table, intro);
    if (list)
        list_models();
    else if (folder)
        convert(&a, folder, store);
    else
        sample(&a, chain, nearest);
    if (fflush(stdout)) die("standard output could not be written");
    return 0;
}
