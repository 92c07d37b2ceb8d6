/* inpaint.c - completes a picture: keeps what a mask keeps and lets the model draw the rest.
 *
 *     read     picture, mask       read_picture, make_mask: at the model's resolution
 *     encode   pixels -> x_0       encode_picture: the known tokens; token_mask: which of them stay
 *     draw     x_T -> ... -> x_0   draw_tokens: sample_chain (diffusion.c)
 *     write    x_0 -> pixels       write_files: sheet_files (sampling/sheet.c), which puts the kept pixels back exactly
 *
 * At every scale the known tokens are forced (the guide of SPEC section 5) and the others are drawn. Each scale may run
 * several times, with some noise in between (the paper's forward-backward chains), which lets known and new parts
 * settle on each other. inpaint() is all of it in order. Read next: diffusion.c. */
#include "sampling/sampling.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const char *image, *mask, *half;
    size_t window, outside, extend, candidates;
    int invert, no_paste, official_mask, compare;
} InpaintArgs;

typedef struct {
    Model model;
    const SamplingArgs *args;
    const InpaintArgs *in;
    size_t side, N, steps; /* steps: T+1 */
    size_t M, rows;        /* candidates for a sample; samples times candidates in a batch */
    Prep prep;             /* how the model's pictures are prepared */
    Image picture;         /* (side,side), what is completed */
    uint8_t *keep;         /* (side,side) 1 = the pixel stays */
    uint8_t *keep_token;   /* (N) */
    size_t redrawn;        /* how many of them do not stay */
    int32_t *known;        /* (rows,N) tokens of the picture, once per row of a batch */
    int32_t *label;        /* (rows) */
    int32_t *drawn;        /* (rows,N) a batch */
    int32_t *tokens;       /* (n,N) */
    int32_t *chain;        /* (n,steps,N) x_T .. x_0, for --animate */
    size_t first;          /* the sample that the batch begins with */
    SampleOptions options;
    DraftCounts counts[MAX_SCALES + 1];
} Completion;

/* ---- Read: the picture and its mask, at the model's resolution ---- */

/* The picture, prepared as those that the model was trained on, but upright; height x width: the size of the file. */
static Err read_picture(Completion *c, size_t *height, size_t *width) {
    const char *path = c->in->image, *told = config_get(&c->model.meta, "data.", "prep");
    const size_t extend = c->in->extend, size = extend ? extend : c->side;
    if (extend >= c->side) return err("--extend %zu: the model's pictures have %zu pixels", extend, c->side);
    TRY(prep_read(&c->prep, &c->model.meta));
    TRY(image_read_as(&c->picture, path, prep_how(c->prep) | IMAGE_UPRIGHT));
    size_t H = *height = c->picture.H, W = *width = c->picture.W;
    if (c->picture.note) say(c->args, "%s: %s\n", path, c->picture.note);
    if (H != size || W != size)
        say(c->args, "%s is %zux%zu: its centre square is used at %zux%zu%s%s%s\n", path, W, H, size, size,
            extend ? ", in the middle" : "", told ? "" : ", scaled as data.prep ", told ? "" : prep_name(c->prep));
    if (image_square(&c->picture, c->prep, size) != OK) return err_in(path);
    return extend ? put_into_middle(&c->picture, c->side) : OK;
}

/* keep (side,side), for a picture whose file is H x W. */
static Err make_mask(Completion *c, size_t H, size_t W) {
    const InpaintArgs *in = c->in;
    const char *note = NULL;
    size_t kept = 0;
    TRY(mem_alloc(&c->keep, c->side * c->side, 1, "mask"));
    if (in->window >= c->side || in->outside >= c->side)
        return err("a window of %zu pixels: the picture has %zu", in->window ? in->window : in->outside, c->side);
    if (in->mask) {
        TRY(mask_read(c->keep, &note, in->mask, c->prep, c->side, H, W, in->invert));
        if (note) say(c->args, "%s: %s\n", in->mask, note);
    } else if (in->half)
        half_mask(c->keep, c->side, in->half);
    else
        window_mask(c->keep, c->side, in->window ? in->window : in->outside ? in->outside : in->extend, !in->window);
    for (size_t i = 0; i < c->side * c->side; i++) kept += c->keep[i];
    if (kept == c->side * c->side)
        return err("the mask keeps everything: nothing to draw (%s are redrawn)",
                   in->invert ? "with --invert light parts" : "black and transparent parts; with --invert light ones");
    if (!kept) say(c->args, "the mask keeps nothing: the whole picture is drawn anew\n");
    return OK;
}

/* keep_token (N): a token stays if all its pixels do. The official code asks only its first pixel (nearest neighbour,
 * SPEC section 5). */
static Err token_mask(Completion *c) {
    size_t patch = c->side / c->model.h, redrawn = 0;
    TRY(mem_alloc(&c->keep_token, c->N, 1, "token mask"));
    for (size_t i = 0; i < c->N; i++) {
        const uint8_t *corner = c->keep + (i / c->model.w) * patch * c->side + (i % c->model.w) * patch;
        c->keep_token[i] = corner[0];
        for (size_t p = 0; !c->in->official_mask && p < patch * patch; p++)
            c->keep_token[i] &= corner[p / patch * c->side + p % patch];
        redrawn += !c->keep_token[i];
    }
    if (redrawn == 0)
        return err("the mask redraws no token (each is %zux%zu pixels); without --official-mask it would", patch,
                   patch);
    c->redrawn = redrawn;
    return OK;
}

/* ---- Encode ---- */

/* x_0 = the picture's tokens, once for every row of a batch; room for what will be drawn. */
static Err encode_picture(Completion *c) {
    real *image = NULL;
    size_t side = c->side;
    TRY(mem_alloc(&image, 3 * side, side * sizeof *image, "picture"));
    TRY(mem_alloc(&c->known, c->rows * c->N, sizeof *c->known, "known tokens"));
    TRY(mem_alloc(&c->drawn, c->rows * c->N, sizeof *c->drawn, "tokens of a batch"));
    TRY(mem_alloc(&c->tokens, c->args->n * c->N, sizeof *c->tokens, "tokens"));
    Err e = image_prepare(image, &c->picture, PREP_FOLDER, side, -1, -1, 0);
    if (e == OK) e = vqgan_plan(c->model.vqgan, 1, side, side, 0);
    if (e == OK) e = vqgan_encode(c->model.vqgan, image, 1, side, side, c->args->seed, NULL, NULL, c->known);
    for (size_t b = 1; e == OK && b < c->rows; b++) memcpy(c->known + b * c->N, c->known, c->N * sizeof *c->known);
    free(image);
    return e;
}

/* ---- Draw ---- */

static int progress(void *context, int t, size_t repeat, size_t done, size_t of) {
    return sampling_progress(&((Completion *)context)->options, t, repeat, done, of);
}

/* tokens (rows,N) = x_{t-1} of a batch, when scale t is done, of which each sample's first candidate is shown. */
static void keep_scale(void *context, int t, const int32_t *tokens) {
    Completion *c = (Completion *)context;
    const size_t column = c->steps - (size_t)t; /* t = T+1: x_T, column 0 */
    for (size_t b = 0; c->chain && b < c->options.n / c->M; b++)
        memcpy(c->chain + ((c->first + b) * c->steps + column) * c->N, tokens + b * c->M * c->N, c->N * sizeof *tokens);
}

/* tokens (n,N): of the M candidates for a sample, the first that sample_chain chose. */
static Err draw_tokens(Completion *c) {
    const SamplingArgs *a = c->args;
    const Chain chain = model_chain(&c->model);
    c->options.keep = c->keep_token;
    c->options.progress = progress;
    c->options.counts = c->counts;
    c->options.scale_done = keep_scale;
    c->options.context = c;
    if (a->animate) TRY(mem_alloc(&c->chain, a->n * c->steps, c->N * sizeof *c->chain, "tokens of every scale"));
    size_t M = c->options.candidates = c->M, most = c->rows / M;
    c->options.known = c->known;
    c->options.label = c->label;
    for (size_t first = 0; first < a->n; first += most) {
        size_t n = min_size(most, a->n - first);
        c->first = first;
        c->options.first = (a->first + first) * M;
        c->options.n = n * M;
        TRY(sample_chain(&chain, &c->options, c->drawn));
        for (size_t b = 0; b < n; b++)
            memcpy(c->tokens + (first + b) * c->N, c->drawn + b * M * c->N, c->N * sizeof *c->tokens);
    }
    progress_end();
    return OK;
}

/* ---- Write ---- */

static Err write_files(Completion *c) {
    Config text = {0};
    const Sheet s = {.model = &c->model,
                     .args = c->args,
                     .options = &c->options,
                     .text = &text,
                     .original = &c->picture,
                     .keep = c->keep,
                     .no_paste = c->in->no_paste,
                     .compare = c->in->compare};
    Err e = config_set(&text, "inpainted", "%s", last_part(c->in->image));
    if (e == OK) e = config_set(&text, "candidates", "%zu", c->M);
    if (e == OK) e = sheet_files(&s, c->tokens, c->chain, c->args->n, c->steps);
    config_free(&text);
    return e;
}

/* ---- The whole ---- */

/* The class that explains the kept part best. */
static Err guess_class(Completion *c, int32_t *label) {
    enum { MOST = 100 };
    double bound[MOST];
    size_t n = c->model.classes.n;
    if (n > MOST) return err("%s has %zu classes, too many to try them all; name one: --class", c->model.folder, n);
    const Chain chain = model_chain(&c->model);
    if (class_bounds(&chain, c->known, c->keep_token, c->args->seed, bound) != OK)
        return err_in("--class was not given");
    *label = 0;
    for (size_t k = 1; k < n; k++)
        if (bound[k] < bound[*label]) *label = (int32_t)k;
    return OK;
}

/* --class, else the name of the picture's folder if that is a class, else what the known part looks like. */
static Err choose_class(Completion *c) {
    const SamplingArgs *a = c->args;
    int32_t label = -1;
    char folder[256] = "";
    if (c->model.classes.n == 0) return a->class_name ? model_class(&c->model, a->class_name, &label) : OK;
    TRY(mem_alloc(&c->label, c->rows, sizeof *c->label, "classes"));
    const char *end = strrchr(c->in->image, '/'), *start = end;
    while (start && start > c->in->image && start[-1] != '/') start--;
    if (end && (size_t)(end - start) < sizeof folder) memcpy(folder, start, (size_t)(end - start));
    if (classes_named(&c->model.classes, folder, &label) != 1) label = -1;
    if (a->class_name)
        TRY(model_class(&c->model, a->class_name, &label));
    else if (label < 0)
        TRY(guess_class(c, &label));
    for (size_t b = 0; b < c->rows; b++) c->label[b] = label;
    return OK;
}

/* The model and its options; how many are drawn. */
static void prepare(Completion *c, SamplingArgs *a, const InpaintArgs *in) {
    const NamedModel *missing;
    memset(c, 0, sizeof *c);
    c->args = a, c->in = in;
    check(outputs_check(a->out, NULL, a->animate));
    sampling_start(a, &c->model, &missing);
    if (missing && a->class_name == missing->stand_in) a->class_name = NULL; /* the picture tells its class */
    sampling_options(&c->options, a, &c->model, DRAW_EDIT);
    c->side = c->model.side;
    c->N = c->model.h * c->model.w;
    c->steps = (size_t)c->model.schedule.T + 1;
    const size_t tiles = is_out_folder(a->out) && !a->animate ? 1 : a->n + (in->compare ? 2 : 0);
    check(output_grid_check("-o", tiles, c->side, min_size(tiles, 8), SHEET_GAP, a->enlarge));
    check(sampling_many(&c->M, &c->model, in->candidates, DRAW_EDIT));
    c->rows = min_size(a->n, max_size(1, a->batch / c->M)) * c->M;
}

/* Says so if the kept part is unlike all that the model has learnt. */
static Err look_at_kept(const Completion *c) {
    real *image;
    Familiar f;
    if (c->redrawn == c->N) return OK;
    TRY(mem_alloc(&image, 3 * c->side, c->side * sizeof *image, "picture"));
    Err e = image_prepare(image, &c->picture, PREP_FOLDER, c->side, -1, -1, 0);
    if (e == OK)
        e = familiar(&f, (Model *)&c->model, image, c->known, c->keep_token, c->label ? c->label[0] : -1,
                     c->args->seed);
    if (e == OK && f.unlike) familiar_warn(c->args, &c->model, &f);
    free(image);
    return e;
}

/* What will be completed, with what. */
static void say_beginning(const Completion *c) {
    const SamplingArgs *a = c->args;
    char title[CLASS_TITLE_BYTES];
    say(a, "completing %s with %s, seed %llu: %zu of %zu tokens are drawn anew", last_part(c->in->image),
        last_part(c->model.folder), (unsigned long long)a->seed, c->redrawn, c->N);
    if (c->label)
        say(a, ", class %s%s", class_title(title, &c->model.classes, (size_t)c->label[0]),
            a->class_name ? "" : " (--class chooses another)");
    say(a, "\n");
}

static void inpaint(SamplingArgs *a, const InpaintArgs *in) {
    const double start = seconds();
    char took[32];
    Completion c;
    size_t H = 0, W = 0;
    prepare(&c, a, in);
    check(read_picture(&c, &H, &W));
    check(make_mask(&c, H, W));
    check(token_mask(&c));
    const size_t rows = sampling_rows(&c.options, c.model.schedule.T, c.rows);
    sampling_memory(a, &c.model, max_size(rows, BOUND_ROWS), a->n + (in->compare ? 2 : 0));
    check(encode_picture(&c));
    check(choose_class(&c));
    say_beginning(&c);
    check(look_at_kept(&c));
    catch_interrupts();
    check(draw_tokens(&c));
    say_drafts(a, c.counts, c.model.schedule.T);
    check(write_files(&c));
    say(a, "%zu completion%s in %s\n", a->n, a->n == 1 ? "" : "s", duration(took, seconds() - start));
    image_free(&c.picture);
    model_close(&c.model);
    void *buffers[] = {c.keep, c.keep_token, c.known, c.label, c.drawn, c.tokens, c.chain};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
}

/* One thing says what is drawn anew. */
static void check_what(const InpaintArgs *in) {
    const struct {
        const char *option;
        int given;
    } what[] = {{"--mask", in->mask != NULL},
                {"--half", in->half != NULL},
                {"--window", in->window > 0},
                {"--outside", in->outside > 0},
                {"--extend", in->extend > 0}};
    char given[64] = "";
    size_t n = 0, at = 0;
    for (size_t i = 0; i < sizeof what / sizeof *what; i++)
        if (what[i].given)
            at += (size_t)snprintf(given + at, sizeof given - at, "%s%s", n++ ? " and " : "", what[i].option);
    if (n != 1)
        usage_error("%s%sgive one of --mask, --half, --window, --outside, --extend; -h explains", given, n ? ": " : "");
}

static const char intro[] =
    "usage: ./inpaint [MODEL] IMAGE (--mask MASK.png | --half upper | --window SIZE |\n"
    "                 --outside SIZE | --extend SIZE) [options]\n\n"
    "Completes a picture with an ImageBART model: the tokens of the kept part are forced at every scale, the others\n"
    "are sampled with the whole picture in view. Each scale runs several times with some noise in between, so that\n"
    "old and new parts settle on each other (--chain-length; default: what the model recommends, else 3, or 5 and 1\n"
    "for the noisiest where the schedule is not geometric; 0 leaves a scale out: the start is as noisy as the next\n"
    "one's input). Forcing the kept tokens does not ask whether they fit what was drawn before them; --candidates\n"
    "does. The kept pixels are put back exactly as they were.\n";

int main(int argc, char **argv) {
    SamplingArgs a = {.out = "inpainted.png", .n = 1, .batch = 16};
    InpaintArgs in = {0};
    const Option table[] = {
        {OPT_HEADING, "Arguments", NULL, NULL, 0, 0, NULL},
        {OPT_ARGUMENT, "MODEL", NULL, &a.model, 0, 0,
         "emoji (default), a name that ./sample --list shows, or a folder"},
        {OPT_ARGUMENT, "IMAGE", NULL, &in.image, 0, 0,
         "PNG, JPEG or WebP; other sizes than the model's: the centre square, scaled"},
        {OPT_HEADING, "What to draw anew (one of)", NULL, NULL, 0, 0, NULL},
        {OPT_STRING, "--mask", "MASK.png", &in.mask, 0, 0,
         "the dark and the transparent parts of this picture; light ones are kept"},
        {OPT_FLAG, "--invert", NULL, &in.invert, 0, 0,
         "... the light parts of it; black and transparent ones are kept"},
        {OPT_STRING, "--half", "WHICH", &in.half, 0, 0, "the upper, lower, left or right half"},
        {OPT_SIZE, "--window", "SIZE", &in.window, 1, 65536, "a centred square of SIZE pixels"},
        {OPT_SIZE, "--outside", "SIZE", &in.outside, 1, 65536,
         "everything but a centred square of SIZE pixels: what the picture has\noutside it is dropped"},
        {OPT_SIZE, "--extend", "SIZE", &in.extend, 1, 65536,
         "all around the picture, which is scaled to SIZE pixels and continued\noutwards to the model's size"},
        {OPT_HEADING, "Options", NULL, NULL, 0, 0, NULL},
        {OPT_FLAG, "--no-paste", NULL, &in.no_paste, 0, 0, "leave the kept part as the VQGAN draws it"},
        {OPT_FLAG, "--compare", NULL, &in.compare, 0, 0, "show the picture and what is kept of it before the results"},
        {OPT_FLAG, "--official-mask", NULL, &in.official_mask, 0, 0,
         "a token is kept if its first pixel is, as in the official code"},
        {OPT_SIZE, "-n", "COUNT", &a.n, 1, 4096, "how many completions (default 1)"},
        {OPT_STRING, "-o", "OUT.png", &a.out, 0, 0,
         "where they go (default inpainted.png); DIR/: a file for each,\nDIR/0001.png ..., behind those that are "
         "there"},
        {OPT_SIZE, "--candidates", "M", &in.candidates, 1, MAX_CANDIDATES,
         "draw M of each, and after every pass go on from those that the kept part\nfits best (default: what the model "
         "recommends, or 1)"},
        {OPT_END, NULL, NULL, NULL, 0, 0, NULL}};
    sampling_parse(argc, argv, table, &a, intro);
    if (a.model && !in.image) in.image = a.model, a.model = NULL; /* one argument is the picture */
    if (!a.model) a.model = "emoji";
    if (!in.image) usage_error("which picture? ./inpaint [MODEL] IMAGE; -h explains");
    check_what(&in);
    if (in.invert && !in.mask) usage_error("--invert is for --mask");
    if (in.half && strcmp(in.half, "upper") && strcmp(in.half, "lower") && strcmp(in.half, "left") &&
        strcmp(in.half, "right"))
        usage_error("--half %s: expected upper, lower, left or right", in.half);
    inpaint(&a, &in);
    if (fflush(stdout)) die("standard output could not be written");
    return 0;
}
