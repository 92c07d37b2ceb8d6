/* inpaint.c - completes a picture: keeps what a mask keeps and lets the model draw the rest.
 *
 *     read     picture, mask       read_files: edit_read (sampling/edit.c), at the model's resolution; which tokens stay
 *     encode   pixels -> x_0       edit_encode: the known tokens
 *     draw     x_T -> ... -> x_0   draw_tokens: sample_chain (diffusion.c), a batch at a time
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
    const char *image, *mask, *into;
    EditArgs what; /* which part is drawn anew */
    size_t candidates;
    int no_paste, compare;
} InpaintArgs;

typedef struct {
    Model model;
    const SamplingArgs *args;
    const InpaintArgs *in;
    size_t N, steps;  /* steps: T+1 */
    EditPicture edit; /* the picture as the model sees it, and what of it stays */
    int32_t *known;   /* (N) its tokens */
    Draw draw;
    DraftCounts counts[MAX_SCALES + 1];
} Completion;

/* ---- Read ---- */

/* What was said of the files: their sizes, what of them is left out */
static void say_picture(const Completion *c) {
    const EditPicture *p = &c->edit;
    const char *path = c->in->image, *said = config_get(&c->model.meta, "data.", "prep");
    const size_t side = c->model.side, size = c->in->what.extend ? c->in->what.extend : side;
    if (p->picture.note) say(c->args, "%s: %s\n", path, p->picture.note);
    if (c->in->into)
        say(c->args, "%s is %zux%zu: the model sees %zux%zu pixels of it, from (%zu, %zu) on, at %zux%zu\n", path, p->W,
            p->H, p->square, p->square, p->x0, p->y0, side, side);
    else if (p->H != size || p->W != size)
        say(c->args, "%s is %zux%zu: its centre square is used at %zux%zu%s%s%s\n", path, p->W, p->H, size, size,
            size < side ? ", in the middle" : "", said ? "" : ", scaled as data.prep ", said ? "" : prep_name(p->prep));
    if (p->note) say(c->args, "%s: %s\n", c->in->mask, p->note);
    if (p->profile.note) say(c->args, "%s: %s\n", c->in->into ? c->in->into : path, p->profile.note);
    if (!p->kept) say(c->args, "the mask keeps nothing: the whole picture is drawn anew\n");
}

/* The picture and its mask, as the model sees them (sampling/edit.c). */
static Err read_files(Completion *c) {
    const InpaintArgs *in = c->in;
    EditArgs a = in->what;
    uint8_t *image = NULL, *mask = NULL, *into = NULL;
    size_t bytes;
    a.paste = in->into != NULL;
    Err e = file_bytes(&image, &a.image_bytes, in->image, IMAGE_FILE_BYTES, NULL);
    if (e == OK && in->mask) e = file_bytes(&mask, &a.mask_bytes, in->mask, IMAGE_FILE_BYTES, NULL);
    a.image = image, a.mask = mask;
    if (e == OK && (e = edit_read(&c->edit, &c->model, &a)) != OK) {
        const int of_image = c->edit.unreadable && !strcmp(c->edit.unreadable, "image");
        e = of_image ? err_in(in->image) : mask ? err_in(in->mask) : e;
    }
    if (e == OK && in->into && strcmp(in->into, in->image) != 0) {
        e = file_bytes(&into, &bytes, in->into, IMAGE_FILE_BYTES, NULL);
        if (e == OK && (e = edit_into(&c->edit, into, bytes)) != OK) e = err_in(in->into);
    }
    free(image), free(mask), free(into);
    return e;
}

/* ---- Draw ---- */

static int progress(void *context, const DrawBatch *b, int t, size_t repeat, size_t done, size_t of) {
    (void)context;
    return sampling_progress((void *)(uintptr_t)b->options, t, repeat, done, of);
}

/* tokens (n,N): of the M candidates for a sample, the first that sample_chain chose. */
static Err draw_tokens(Completion *c) {
    c->draw.known = c->known, c->draw.keep = c->edit.keep_token;
    c->draw.with_chain = c->args->animate != NULL;
    c->draw.options.counts = c->counts;
    c->draw.watch.progress = progress;
    TRY(draw_pictures(&c->draw));
    progress_end();
    return OK;
}

/* ---- Write ---- */

static Err write_files(Completion *c) {
    Config text = {0};
    const Sheet s = {.model = &c->model,
                     .args = c->args,
                     .options = &c->draw.options,
                     .text = &text,
                     .original = &c->edit.picture,
                     .keep = c->edit.keep,
                     .profile = &c->edit.profile,
                     .into = c->in->into ? &c->edit : NULL,
                     .no_paste = c->in->no_paste,
                     .compare = c->in->compare};
    EditArgs what = c->in->what;
    what.paste = c->in->into != NULL;
    Err e = sampling_text_edit(&text, c->in->image, c->draw.M, &what);
    if (e == OK) e = sheet_files(&s, c->draw.tokens, c->draw.chain, c->args->n, c->steps);
    config_free(&text);
    return e;
}

/* ---- The whole ---- */

/* --class, else the name of the picture's folder if that is a class, else what the known part looks like. */
static Err choose_class(Completion *c) {
    const SamplingArgs *a = c->args;
    const Chain chain = model_chain(&c->model);
    int32_t label = -1;
    char folder[256] = "";
    TRY(draw_classes(&c->draw.label, &c->model, a->class_name, a->seed, 0, a->n));
    if (!c->draw.label || a->class_name) return OK;
    const char *end = strrchr(c->in->image, '/'), *start = end;
    while (start && start > c->in->image && start[-1] != '/') start--;
    if (end && (size_t)(end - start) < sizeof folder) memcpy(folder, start, (size_t)(end - start));
    if (classes_named(&c->model.classes, folder, &label) != 1) label = -1;
    if (label < 0) TRY(edit_keeps_some(&c->edit, &c->model, &c->in->what));
    if (label < 0 && edit_class(&label, &chain, c->known, c->edit.keep_token, a->seed) != OK)
        return err_in("--class was not given");
    for (size_t b = 0; b < a->n; b++) c->draw.label[b] = label;
    return OK;
}

/* No picture that is read is written over. */
static void check_inputs(const SamplingArgs *a, const InpaintArgs *in) {
    const struct { const char *option, *path; } out[] = {{"-o", a->out}, {"--animate", a->animate}};
    for (size_t i = 0; i < 2; i++) {
        check(output_spares(out[i].option, out[i].path, "IMAGE", in->image));
        check(output_spares(out[i].option, out[i].path, "--mask", in->mask));
        check(output_spares(out[i].option, out[i].path, "--paste-into", in->into));
    }
}

/* The model and its options; how many are drawn. */
static void prepare(Completion *c, SamplingArgs *a, const InpaintArgs *in) {
    const NamedModel *missing;
    memset(c, 0, sizeof *c);
    c->args = a, c->in = in;
    check(outputs_check(a->out, NULL, a->animate));
    check_inputs(a, in);
    sampling_start(a, &c->model, &missing);
    if (missing && a->class_name == missing->stand_in) a->class_name = NULL; /* the picture tells its class */
    c->draw = (Draw){.model = &c->model, .n = a->n, .first = a->first};
    sampling_options(&c->draw.options, a, &c->model, DRAW_EDIT);
    c->N = c->model.h * c->model.w;
    c->steps = (size_t)c->model.schedule.T + 1;
    const size_t tiles = is_out_folder(a->out) && !a->animate ? 1 : a->n + (in->compare ? 2 : 0);
    check(output_grid_check("-o", tiles, c->model.side, min_size(tiles, 8), SHEET_GAP, a->enlarge));
    check(sampling_many(&c->draw.M, &c->model, in->candidates, DRAW_EDIT));
    c->draw.rows = draw_rows(a->n, a->batch, c->draw.M);
}

/* Whole pictures side by side are a large grid. */
static Err check_size(const Completion *c) {
    size_t H, W;
    const size_t n = is_out_folder(c->args->out) && !c->args->animate ? 1 : c->args->n, N = c->args->enlarge;
    if (!c->in->into) return OK;
    if (image_grid_size(&H, &W, n, c->edit.H, c->edit.W, min_size(n, 8), SHEET_GAP) == OK &&
        image_grid_size(&H, &W, 1, H * N, W * N, 1, 0) == OK)
        return OK;
    return err("--paste-into: %s; a smaller -n, or -o DIR/ for a file for each", err_text());
}

/* Says so if the kept part is unlike all that the model has learnt. */
static Err look_at_kept(const Completion *c) {
    char text[ERR_MAX];
    const int32_t label = c->draw.label ? c->draw.label[0] : -1;
    TRY(edit_unlike(text, &c->edit, (Model *)&c->model, c->known, label, c->args->seed));
    if (*text) say(c->args, "%s\n", text);
    return OK;
}

/* What will be completed, with what. */
static void say_beginning(const Completion *c) {
    const SamplingArgs *a = c->args;
    char title[CLASS_TITLE_BYTES];
    say(a, "completing %s with %s, seed %llu: %zu of %zu tokens are drawn anew", last_part(c->in->image),
        last_part(c->model.folder), (unsigned long long)a->seed, c->edit.redrawn, c->N);
    if (c->draw.label)
        say(a, ", class %s%s", class_title(title, &c->model.classes, (size_t)c->draw.label[0]),
            a->class_name ? "" : " (--class chooses another)");
    say(a, "\n");
}

static void inpaint(SamplingArgs *a, const InpaintArgs *in) {
    const double start = seconds();
    char took[32];
    Completion c;
    prepare(&c, a, in);
    check(read_files(&c));
    say_picture(&c);
    check(check_size(&c));
    const size_t rows = sampling_rows(&c.draw.options, c.model.schedule.T, c.draw.rows);
    sampling_memory(a, &c.model, max_size(rows, BOUND_ROWS), a->n + (in->compare ? 2 : 0));
    check(mem_alloc(&c.known, c.N, sizeof *c.known, "known tokens"));
    check(edit_encode(&c.edit, &c.model, a->seed, c.known));
    check(choose_class(&c));
    say_beginning(&c);
    check(look_at_kept(&c));
    catch_interrupts();
    check(draw_tokens(&c));
    say_drafts(a, c.counts, c.model.schedule.T);
    check(write_files(&c));
    say(a, "%zu completion%s in %s\n", a->n, a->n == 1 ? "" : "s", duration(took, seconds() - start));
    edit_free(&c.edit);
    draw_free(&c.draw);
    free(c.known);
    model_close(&c.model);
}

/* One thing says what is drawn anew. */
static void check_what(const InpaintArgs *in) {
    const EditArgs *a = &in->what;
    const struct {
        const char *option;
        int given;
    } what[] = {{"--mask", in->mask != NULL},
                {"--half", a->half != NULL},
                {"--window", a->window > 0},
                {"--outside", a->outside > 0},
                {"--extend", a->extend > 0}};
    char given[64] = "";
    size_t n = 0, at = 0;
    for (size_t i = 0; i < sizeof what / sizeof *what; i++)
        if (what[i].given)
            at += (size_t)snprintf(given + at, sizeof given - at, "%s%s", n++ ? " and " : "", what[i].option);
    if (n != 1)
        usage_error("%s%sgive one of --mask, --half, --window, --outside, --extend; -h explains", given, n ? ": " : "");
    if (in->into && (in->compare || in->no_paste || a->extend))
        usage_error("--paste-into is not for --%s", a->extend ? "extend" : in->compare ? "compare" : "no-paste");
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
        {OPT_FLAG, "--invert", NULL, &in.what.invert, 0, 0,
         "... the light parts of it; black and transparent ones are kept"},
        {OPT_STRING, "--half", "WHICH", &in.what.half, 0, 0, "the upper, lower, left or right half"},
        {OPT_SIZE, "--window", "SIZE", &in.what.window, 1, 65536, "a centred square of SIZE pixels"},
        {OPT_SIZE, "--outside", "SIZE", &in.what.outside, 1, 65536,
         "everything but a centred square of SIZE pixels: what the picture has\noutside it is dropped"},
        {OPT_SIZE, "--extend", "SIZE", &in.what.extend, 1, 65536,
         "all around the picture, which is scaled to SIZE pixels and continued\noutwards to the model's size"},
        {OPT_HEADING, "Options", NULL, NULL, 0, 0, NULL},
        {OPT_STRING, "--paste-into", "FILE", &in.into, 0, 0,
         "put what is drawn back into this picture, IMAGE as a rule, at its full\nsize: the model sees a square around "
         "the "
         "mask's hole, kept pixels stay\nexactly as they are, -o gets the result"},
        {OPT_FLAG, "--no-paste", NULL, &in.no_paste, 0, 0, "leave the kept part as the VQGAN draws it"},
        {OPT_FLAG, "--compare", NULL, &in.compare, 0, 0, "show the picture and what is kept of it before the results"},
        {OPT_FLAG, "--official-mask", NULL, &in.what.official, 0, 0,
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
    if (in.what.invert && !in.mask) usage_error("--invert is for --mask");
    if (in.compare && is_out_folder(a.out)) usage_error("--compare is for a grid, not for the files of -o %s", a.out);
    const char *half = in.what.half;
    if (half && strcmp(half, "upper") && strcmp(half, "lower") && strcmp(half, "left") && strcmp(half, "right"))
        usage_error("--half %s: expected upper, lower, left or right", half);
    inpaint(&a, &in);
    if (fflush(stdout)) die("standard output could not be written");
    return 0;
}
