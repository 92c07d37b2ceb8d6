/* sample.c - draws pictures: pure noise, then the transitions of scale T down to 1, then the VQGAN's decoder.
 *
 *     draw     x_T -> ... -> x_0      draw_tokens: sample_chain (diffusion.c), a batch at a time; of the M that are
 *                                     drawn for each picture, sampling/draw.c keeps one that the model finds likely
 *     decode   x_0 -> pixels          write_files: sheet_files (sampling/sheet.c), decode_pictures, vqgan_decode_tokens
 *     write    pixels -> PNG          image_grid, image_write_png, with the options as text
 *
 * sample() is all of it in order. Read next: diffusion.c, the chain; vqgan.c, the decoder. */
#include "sampling/sampling.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    Model model;
    const SamplingArgs *args;
    Draw draw;
    size_t steps; /* T+1 */
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
    p->draw.with_bounds = p->draw.M > 1;
    p->draw.options.counts = p->counts;
    p->draw.watch.progress = progress;
    TRY(draw_pictures(&p->draw));
    progress_end();
    return OK;
}

/* ---- The whole ---- */

/* What will be drawn, with what; with -v the class of each of the first 64, where they have their own. */
static void say_beginning(const Pictures *p) {
    const SamplingArgs *a = p->args;
    const Classes *classes = &p->model.classes;
    char title[CLASS_TITLE_BYTES], of[CLASS_TITLE_BYTES + 40] = "";
    if (p->draw.label && a->class_name)
        snprintf(of, sizeof of, ", class %d: %s", (int)p->draw.label[0],
                 class_title(title, classes, (size_t)p->draw.label[0]));
    else if (p->draw.label)
        snprintf(of, sizeof of, ", %s of %zu classes", a->n == 1 ? "one" : "each one", classes->n);
    say(a, "drawing %zu picture%s with %s, seed %llu%s\n", a->n, a->n == 1 ? "" : "s", last_part(p->model.folder),
        (unsigned long long)a->seed, of);
    for (size_t b = 0; p->draw.label && !a->class_name && b < a->n && b < 64; b++)
        detail(a, "%s%s", b ? ", " : "classes: ", class_title(title, classes, (size_t)p->draw.label[b]));
    if (p->draw.label && !a->class_name) detail(a, "\n");
}

/* The model, its options, and room for what will be drawn; what is said before the work begins. */
static void prepare(Pictures *p, SamplingArgs *a, size_t most, const char *chain_path, const char *nearest) {
    const NamedModel *missing;
    const Sheet sheet = {0};
    const int with_chain = chain_path != NULL;
    check(outputs_check(a->out, chain_path, a->animate));
    check(output_spares_folder("-o", a->out, "--nearest", nearest));
    check(output_spares_folder("--chain", chain_path, "--nearest", nearest));
    check(output_spares_folder("--animate", a->animate, "--nearest", nearest));
    if (nearest) check(nearest_check(nearest));
    memset(p, 0, sizeof *p);
    p->args = a;
    sampling_start(a, &p->model, &missing);
    p->draw = (Draw){.model = &p->model, .n = a->n, .first = a->first};
    sampling_options(&p->draw.options, a, &p->model, DRAW_NEW);
    check(sampling_many(&p->draw.M, &p->model, most, DRAW_NEW));
    p->draw.rows = draw_rows(a->n, a->batch, p->draw.M);
    p->steps = (size_t)p->model.schedule.T + 1;
    check(output_grid_check("-o", is_out_folder(a->out) && !a->animate ? 1 : a->n, p->model.side,
                            sheet_columns(&sheet, a->n), SHEET_GAP, a->enlarge));
    if (with_chain)
        check(output_grid_check("--chain", a->n * p->steps, p->model.side, p->steps, SHEET_GAP, a->enlarge));
    check(draw_classes(&p->draw.label, &p->model, a->class_name, a->seed, a->first, a->n));
    const size_t rows = sampling_rows(&p->draw.options, p->model.schedule.T, p->draw.rows),
                 bound_rows = p->draw.M > 1 ? BOUND_ROWS : 0;
    sampling_memory(a, &p->model, max_size(rows, bound_rows), with_chain ? a->n * p->steps : a->n);
    say_beginning(p);
    catch_interrupts();
}

/* How long it took; where one in M was kept, how likely those are, and what a good number is. */
static void say_end(const Pictures *p, double took) {
    const SamplingArgs *a = p->args;
    const Chain chain = model_chain(&((Pictures *)p)->model);
    char text[32], anchors[SCORE_BYTES];
    double nats = 0;
    for (size_t b = 0; p->draw.bound && b < a->n; b++) nats += p->draw.bound[b] / (double)a->n;
    say_drafts(a, p->counts, p->model.schedule.T);
    say(a, "%zu picture%s", a->n, a->n == 1 ? "" : "s");
    if (p->draw.M > 1)
        say(a, ", %sa likely one of %zu, %.2f nats per token (%s),", a->n == 1 ? "" : "each ", p->draw.M, nats,
            score_anchors(anchors, &chain, &p->model.meta));
    say(a, " in %s, seed %llu\n", duration(text, took), (unsigned long long)a->seed);
}

/* The pictures; each one's chain, x_T .. x_0, as a row. */
static Err write_files(Pictures *p, const char *chain_path) {
    const SamplingArgs *a = p->args;
    Config text = {0};
    Sheet s = {.model = &p->model, .args = a, .options = &p->draw.options, .text = &text, .label = p->draw.label};
    Err e = p->draw.M > 1 ? config_set(&text, "best-of", "%zu", p->draw.M) : OK;
    if (e == OK) e = sheet_files(&s, p->draw.tokens, p->draw.chain, a->n, p->steps);
    if (e == OK && chain_path) e = sheet_chain(&s, p->draw.chain, a->n, p->steps, chain_path);
    if (e == OK && chain_path && !a->quiet) say_result("%s\n", chain_path);
    config_free(&text);
    return e;
}

static void sample(SamplingArgs *a, size_t most, const char *chain_path, const char *nearest) {
    const double start = seconds();
    Pictures p;
    prepare(&p, a, most, chain_path, nearest);
    check(draw_tokens(&p, chain_path || a->animate));
    check(write_files(&p, chain_path));
    say_end(&p, seconds() - start);
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
    say_result("%s\n", folder);
    model_close(&m);
}

/* One thing at a time: what is not drawn goes nowhere. drawing: an option is given that only drawing obeys. */
static void check_kind(int list, int score, const char *folder, int drawing) {
    if (list + score + (folder != NULL) > 1) usage_error("give one of --list, --score, --convert");
    if (drawing && (list || score || folder))
        usage_error("%s draws nothing: -n, -o, --chain, --nearest, --animate, --best-of and --show are for drawing",
                    list    ? "--list"
                    : score ? "--score"
                            : "--convert");
}

static const char intro[] =
    "usage: ./sample [MODEL] [options]\n\n"
    "Draws pictures with an ImageBART model: starts from a grid of random tokens x_T and, scale by scale, lets a\n"
    "transformer that sees the whole noisier grid write the cleaner one, token by token: x_T -> ... -> x_0. A VQGAN\n"
    "turns the tokens x_0 into pixels. --chain shows every step of it.\n";

int main(int argc, char **argv) {
    enum { DRAWN = 16 };
    const char *const out = "samples.png";
    SamplingArgs a = {.model = "emoji", .out = out, .n = DRAWN, .batch = 16};
    const char *chain = NULL, *nearest = NULL, *folder = NULL, *store = NULL;
    size_t most = 0;
    const char *item[MAX_SCORED];
    OptionList pictures = {item, 0, MAX_SCORED};
    int list = 0, score = 0;
    PictureSettings settings;
    const char *from = NULL;
    const Option table[] = {
        {OPT_HEADING, "Arguments", NULL, NULL, 0, 0, NULL},
        {OPT_ARGUMENT, "MODEL", NULL, &a.model, 0, 0,
         "emoji (default), a name that --list shows, or a folder with\nweights such as runs/emoji"},
        {OPT_ARGUMENTS, "PICTURE...", NULL, &pictures, 0, 0, "for --score"},
        {OPT_HEADING, "Options", NULL, NULL, 0, 0, NULL},
        {OPT_SIZE, "-n", "COUNT", &a.n, 1, 4096, "how many pictures (default 16)"},
        {OPT_STRING, "-o", "OUT.png", &a.out, 0, 0,
         "where the grid of them goes (default samples.png); DIR/: a file for\neach, DIR/0001.png ..., behind those "
         "that are there"},
        {OPT_SIZE, "--best-of", "M", &most, 1, MAX_BEST_OF,
         "draw M for each picture and keep one that the model itself finds likely,\nby the bound it was trained with "
         "(default: what the model recommends, else 1)"},
        {OPT_STRING, "--chain", "CHAIN.png", &chain, 0, 0, "also draw every scale: a row per sample, x_T at the left"},
        {OPT_STRING, "--nearest", "DATA", &nearest, 0, 0,
         "compare each picture with the training pictures in this folder: same tokens,\ndistance of pixels"},
        {OPT_STRING, "--settings", "PICTURE.png", &from, 0, 0,
         "draw again what ./sample or ./serve drew: with the model and the options that\nthe text in this file says; "
         "others that are given come instead"},
        {OPT_FLAG, "--score", NULL, &score, 0, 0,
         "draw nothing: how likely the model finds each PICTURE, in nats per token,\nand how well its first stage "
         "draws it"},
        {OPT_FLAG, "--list", NULL, &list, 0, 0,
         "the models, which of them are here, how to get the others\n(make ffhq)"},
        {OPT_STRING, "--convert", "DIR", &folder, 0, 0, "write the model as safetensors into DIR, new or empty"},
        {OPT_STRING, "--store", "TYPE", &store, 0, 0, "with --convert: weights as f32 (default), f16 or bf16"},
        {OPT_END, NULL, NULL, NULL, 0, 0, NULL}};
    const Err e = picture_settings_open(&settings, &argc, &argv);
    if (settings.path) a.model = NULL;
    sampling_parse(argc, argv, table, &a, intro);
    check(e);
    if (from && (list || score || folder)) usage_error("--settings draws: it is not for --list, --score or --convert");
    if (from && !a.model) check(picture_settings_model(&settings, &a.model));
    a.one_of_several = settings.one_of_several && a.n == 1;
    if (pictures.n && !score) usage_error("unexpected argument \"%s\"; -h explains", pictures.item[0]);
    check_kind(list, score, folder, chain || nearest || a.animate || most || a.show || a.out != out || a.n != DRAWN);
    if (store && !folder) usage_error("--store is for --convert");
    if (list)
        check(list_models());
    else if (score)
        check(score_pictures(&a, &pictures));
    else if (folder)
        convert(&a, folder, store ? store : "f32");
    else
        sample(&a, most, chain, nearest);
    picture_settings_close(&settings);
    if (fflush(stdout)) die("standard output could not be written");
    return 0;
}
