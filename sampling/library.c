/* library.c - libimagebart: from what a caller asks for to a Draw (sampling/draw.c), and from what is drawn to
 * pictures, one after the other as they are finished. All that it knows of a model is in the handle; what failed is
 * told by the error text, which each thread has of its own. */
#include "sampling/calls.h"
#include "sampling/sampling.h"

#include <ctype.h>
#include <locale.h>
#ifdef __APPLE__
#include <xlocale.h>
#endif
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef enum { IDLE, AT_WORK, CLOSED } ModelState; /* CLOSED: while at work; the call that works frees it */

struct imagebart_model {
    Model model;
    atomic_int state;             /* ModelState */
    SampleOptions recommended[2]; /* [DrawKind] */
    size_t many[2];               /* [DrawKind] pictures drawn for one, candidates of an edit */
    char device[CUDA_TEXT_BYTES];
};

/* The caller may have a locale in which 0.9 is written 0,9. In the thread that calls, it is "C" until the call returns, but
 * for the caller's own functions. Such a function may call the library again, for another model: whom work of the first
 * call asks, the second does not. */
typedef struct {
    locale_t ours, theirs;
    WorkAsker before;
} Entry;

typedef struct {
    Model *model;
    imagebart_options o; /* the caller's, as far as they go */
    Entry entry;
    Draw draw;
    DrawKind kind;
    EditPicture edit;   /* of DRAW_EDIT */
    char note[ERR_MAX]; /* of an edit: what its caller is to know */
    int32_t *known;     /* (N) its tokens */
    uint8_t *rgb;       /* (count,side,side,3) the caller's, or NULL, as */
    int32_t *tokens;    /* (count,N) */
    real *pixels;       /* (3,side,side) of one picture */
    size_t scale, done; /* where it is: tokens of this scale */
    int cancelled;
    Err failed; /* of a preview; its text is */
    char failure[ERR_MAX];
} Call;

enum { BATCH = 16, MOST = 4096 }; /* rows computed side by side, as ./sample has it; pictures of a call */

int imagebart_api(void) {
    return IMAGEBART_API;
}

/* What the parts say of options and programs, and what that is called here */
static const struct {
    const char *of_programs, *here;
} words[] = {{"--class", "class_name"},
             {"--temperature", "temperature"},
             {"--top-k", "top_k"},
             {"--guidance", "guidance"},
             {"--chain-length", "chain_length"},
             {"--extend", "extend"},
             {"--invert", "invert"},
             {"--official-mask", "official"},
             {"--device", "device"},
             {"this program", "this library"},
             {"make clean && make", "make clean && make lib"}};

/* The number of the words that text begins with, or how many there are */
static size_t word_at(const char *text) {
    const size_t count = sizeof words / sizeof *words;
    for (size_t i = 0; i < count; i++) {
        const size_t n = strlen(words[i].of_programs);
        if (!strncmp(text, words[i].of_programs, n) && !isalnum((unsigned char)text[n]) && text[n] != '-') return i;
    }
    return count;
}

const char *imagebart_error(void) {
    static _Thread_local char text[ERR_MAX];
    const char *from = err_text(), *const begin = from;
    size_t n = 0;
    while (*from && n + 1 < sizeof text) {
        const int begins = from == begin || from[-1] == ' ' || from[-1] == '(';
        const size_t i = begins ? word_at(from) : sizeof words / sizeof *words;
        if (i == sizeof words / sizeof *words) {
            text[n++] = *from++;
            continue;
        }
        n = min_size(n + (size_t)snprintf(text + n, sizeof text - n, "%s", words[i].here), sizeof text - 1);
        from += strlen(words[i].of_programs);
    }
    text[n] = '\0';
    return text;
}

void imagebart_threads(size_t n) {
    threads_set((int)min_size(n, 4096));
}

static int status(Err e) {
    return e == OK ? IMAGEBART_OK : IMAGEBART_FAILED;
}

static Entry enter(void) {
    Entry e = {.ours = newlocale(LC_ALL_MASK, "C", (locale_t)0), .before = work_ask(NULL, NULL)};
    e.theirs = uselocale(e.ours);
    return e;
}

static void leave(Entry e) {
    uselocale(e.theirs);
    if (e.ours) freelocale(e.ours);
    work_ask_again(e.before);
}

/* ---- Models ---- */

static Err there_is(const imagebart_model *m) {
    return m ? OK : err("model is NULL; expected one that imagebart_open has opened");
}

static void model_free(imagebart_model *m) {
    model_close(&m->model);
    free(m);
}

/* From here to model_leave it is this call's alone: not another thread's, not that of a function that it calls back. */
static Err model_enter(imagebart_model *m) {
    int idle = IDLE;
    TRY(there_is(m));
    if (atomic_compare_exchange_strong(&m->state, &idle, AT_WORK)) return OK;
    return err("this model is at work: one call at a time");
}

static void model_leave(imagebart_model *m) {
    int at_work = AT_WORK;
    if (!atomic_compare_exchange_strong(&m->state, &at_work, IDLE)) model_free(m);
}

Model *library_model(imagebart_model *model) {
    return &model->model;
}

static Err use_device(imagebart_model *m, DevicePlace place) {
    snprintf(m->device, sizeof m->device, "CPU%s", place == DEVICE_NO_GPU ? ", for no usable GPU was found" : "");
    if (place != DEVICE_CUDA) return OK;
    TRY(cuda_find(m->device, NULL, NULL));
    return model_use_cuda(&m->model);
}

static Err choose_recommended(imagebart_model *m) {
    const Chain chain = model_chain(&m->model);
    const SamplingArgs nothing = {.quiet = 1};
    for (int k = DRAW_NEW; k <= DRAW_EDIT; k++) {
        TRY(sampling_choose(&m->recommended[k], &nothing, &m->model, (DrawKind)k));
        TRY(sampling_many(&m->many[k], &m->model, 0, (DrawKind)k));
        for (int t = 1; t <= m->model.schedule.T; t++) TRY(check_guidance(&chain, m->recommended[k].guidance[t], t));
    }
    return OK;
}

/* A library for any x86-64 has obeyed it. */
static Err obeys_no_level(void) {
#ifdef LIBRARY_LEVELS
    return OK;
#else
    if (!getenv("IMAGEBART_LEVEL")) return OK;
    return err(
        "IMAGEBART_LEVEL: this library was compiled for one kind of processor, %s; \"make lib\" without MARCH makes "
        "one that chooses, on x86-64",
        vector_instructions());
#endif
}

static Err open_model(imagebart_model **model, const char *name_or_folder, const char *weights, const char *device) {
    WeightFormat format;
    DevicePlace place;
    imagebart_model *m;
    if (!model) return err("imagebart_open: model is NULL; expected where the opened one is to be put");
    *model = NULL;
    TRY(obeys_no_level());
    if (!name_or_folder) return err("no model was named");
    TRY(device_choose(&place, device));
    TRY(weight_format(&format, weights, place == DEVICE_CUDA, "weights"));
    TRY(mem_alloc(&m, 1, sizeof *m, "a model"));
    Err e = model_open(&m->model, name_or_folder, NULL);
    if (e != OK) free(m); /* it leaves nothing open */
    TRY(e);
    model_weights(&m->model, format);
    e = use_device(m, place);
    if (e == OK) e = choose_recommended(m);
    if (e == OK)
        *model = m;
    else
        imagebart_close(m);
    return e;
}

int imagebart_open_on(imagebart_model **model, const char *name_or_folder, const char *weights, const char *device) {
    const Entry entry = enter();
    const Err e = open_model(model, name_or_folder, weights, device);
    leave(entry);
    return status(e);
}

int imagebart_open(imagebart_model **model, const char *name_or_folder, const char *weights) {
    return imagebart_open_on(model, name_or_folder, weights, NULL);
}

void imagebart_close(imagebart_model *model) {
    if (model && atomic_exchange(&model->state, CLOSED) == IDLE) model_free(model);
}

void imagebart_get_shape(const imagebart_model *model, imagebart_shape *shape) {
    if (!shape) return;
    *shape = (imagebart_shape){0};
    if (there_is(model) != OK) return;
    const Model *m = &model->model;
    *shape = (imagebart_shape){m->side, m->h, m->w, m->K, (size_t)m->schedule.T, m->classes.n};
}

const char *imagebart_class_name(const imagebart_model *model, size_t number) {
    if (there_is(model) != OK) return NULL;
    const Classes *c = &model->model.classes;
    return number < c->n ? c->name[number] : NULL;
}

const char *imagebart_device(const imagebart_model *model) {
    return there_is(model) == OK ? model->device : NULL;
}

size_t imagebart_memory(imagebart_model *model) {
    ModelMemory need;
    if (model_enter(model) != OK) return 0;
    const Err e = model_memory(&model->model, 2 * BATCH, BATCH, &need); /* 2: with guidance */
    model_leave(model);
    return e == OK ? need.total : 0;
}

void imagebart_get_advice(const imagebart_model *model, int of_edits, size_t scale, imagebart_advice *advice) {
    const DrawKind kind = of_edits ? DRAW_EDIT : DRAW_NEW;
    if (!advice) return;
    *advice = (imagebart_advice){0};
    if (there_is(model) != OK || scale < 1 || scale > (size_t)model->model.schedule.T) return;
    const SampleOptions *o = &model->recommended[kind];
    *advice = (imagebart_advice){o->temperature[scale],
                                 o->guidance[scale],
                                 o->top_k[scale],
                                 o->chain[scale],
                                 model->model.null_class[scale] >= 0,
                                 model->many[kind]};
}

/* ---- On the way ---- */

static size_t tokens_of_pass(const Call *c) {
    return c->draw.n * c->draw.M * c->model->h * c->model->w;
}

static int step(Call *c) {
    const size_t of = tokens_of_pass(c) * c->draw.options.chain[c->scale];
    uselocale(c->entry.theirs);
    if (c->o.step && c->o.step(c->o.user, c->scale, c->done, of)) c->cancelled = 1;
    uselocale(c->entry.ours);
    return c->cancelled || c->failed;
}

static int is_stopped(void *context) {
    return step(context);
}

static int on_progress(void *context, const DrawBatch *b, int t, size_t repeat, size_t done, size_t of) {
    Call *c = context;
    const size_t drawn_before = b->at * b->each * c->model->h * c->model->w * c->draw.options.chain[t];
    c->scale = (size_t)t, c->done = drawn_before + (repeat * of + done) * b->count * b->each;
    uselocale(c->entry.theirs);
    if (c->o.progress && c->o.progress(c->o.user, (size_t)t, done, of)) c->cancelled = 1;
    return step(c);
}

/* ---- Pictures ---- */

/* im = the picture of tokens (N); the first stage is planned for one. */
static Err picture_of(Model *m, const int32_t *tokens, real *pixels, Image *im) {
    TRY(decode_planned(m, tokens, 1, pixels));
    return image_grid(im, pixels, 1, m->side, m->side, 1, 0);
}

static void tell_picture(Call *c, const imagebart_picture *p) {
    uselocale(c->entry.theirs);
    if (c->o.picture && c->o.picture(c->o.user, p)) c->cancelled = 1;
    uselocale(c->entry.ours);
}

static void tell(Call *c, const imagebart_picture *p) {
    uselocale(c->entry.theirs);
    if (p->scale && c->o.preview) c->o.preview(c->o.user, p->number, p->scale, p->rgb);
    if (!p->scale || c->o.previews) tell_picture(c, p);
    uselocale(c->entry.ours);
}

static imagebart_picture picture_to_tell(const Call *c, size_t k, int scale, const Image *im, const int32_t *tokens) {
    return (imagebart_picture){.number = k,
                               .scale = (size_t)scale,
                               .width = im->W,
                               .height = im->H,
                               .rgb = im->rgb,
                               .alpha = im->alpha,
                               .tokens = tokens,
                               .label = c->draw.label ? c->draw.label[k] : -1,
                               .profile = c->edit.profile.bytes,
                               .profile_bytes = c->edit.profile.size};
}

static int with_previews(const Call *c) {
    return c->o.preview || (c->o.previews && c->o.picture);
}

static Err preview(Call *c, size_t k, int scale, const int32_t *tokens) {
    Image im = {0};
    const Err e = picture_of(c->model, tokens, c->pixels, &im);
    const imagebart_picture p = picture_to_tell(c, k, scale, &im, tokens);
    if (e == OK) tell(c, &p);
    image_free(&im);
    return e;
}

/* A scale is done: its pictures, of the first that is drawn for each. The last scale's are the results, in on_drawn. */
static void on_scale(void *context, const DrawBatch *b, int t, const int32_t *tokens) {
    Call *c = context;
    if (t > c->model->schedule.T || t == 1 || !c->draw.options.chain[t] || !with_previews(c)) return;
    for (size_t k = 0; k < b->count && !step(c); k++) {
        c->failed = preview(c, b->at + k, t, tokens + k * b->each * c->model->h * c->model->w);
        if (c->failed) snprintf(c->failure, sizeof c->failure, "%s", err_text());
    }
}

/* The result of an edit: the whole picture, or the model's with the kept pixels as they were. */
static Err finish_edit(const Call *c, Image *im) {
    const EditPicture *p = &c->edit;
    if (p->whole.rgb) {
        Image whole;
        TRY(paste_picture(&whole, p, c->model, im));
        image_free(im);
        *im = whole;
        return OK;
    }
    for (size_t i = 0; i < im->H * im->W; i++)
        if (p->keep[i]) memcpy(im->rgb + 3 * i, p->picture.rgb + 3 * i, 3);
    return OK;
}

static Err finish(Call *c, size_t k, Image *im) {
    const size_t N = c->model->h * c->model->w, bytes = 3 * c->model->side * c->model->side;
    const int32_t *tokens = c->draw.tokens + k * N;
    if (c->kind == DRAW_EDIT) TRY(finish_edit(c, im));
    if (c->rgb) memcpy(c->rgb + k * bytes, im->rgb, bytes);
    if (c->tokens) memcpy(c->tokens + k * N, tokens, N * sizeof *tokens);
    imagebart_picture p = picture_to_tell(c, k, 0, im, tokens);
    if (c->draw.with_bounds) p.bound = c->draw.bound[k], p.entropy = c->draw.entropy + k * N;
    if (c->o.chains) p.chain = c->draw.chain + k * ((size_t)c->model->schedule.T + 1) * N;
    if (*c->note) p.note = c->note;
    tell(c, &p);
    return OK;
}

/* Of those that were drawn for picture b of the batch another than the first is kept: its steps, which those who want
 * previews have not seen. */
static Err tell_its_steps(Call *c, const DrawBatch *batch, size_t b) {
    const Draw *d = &c->draw;
    const int T = c->model->schedule.T;
    const size_t N = c->model->h * c->model->w, n = ((size_t)T + 1) * N, k = batch->at + b;
    const int32_t *chain = d->chain + k * n;
    if (!c->o.previews || !c->o.picture) return OK;
    if (!memcmp(chain, d->drawn_chain + b * batch->each * n, n * sizeof *chain)) return OK;
    for (int t = T; t > 1; t--) {
        if (!d->options.chain[t]) continue;
        if (step(c)) return err("drawing was stopped");
        const int32_t *tokens = chain + (size_t)(T + 1 - t) * N;
        Image im = {0};
        const Err e = picture_of(c->model, tokens, c->pixels, &im);
        const imagebart_picture p = picture_to_tell(c, k, t, &im, tokens);
        if (e == OK) tell_picture(c, &p);
        image_free(&im);
        TRY(e);
    }
    return OK;
}

/* A batch is done: its pictures, each of which is the last scale's preview too. */
static Err on_drawn(void *context, const DrawBatch *b) {
    Call *c = context;
    for (size_t k = b->at; k < b->at + b->count; k++) {
        const int32_t *tokens = c->draw.tokens + k * c->model->h * c->model->w;
        Image im = {0};
        if (step(c)) return err("drawing was stopped");
        Err e = picture_of(c->model, tokens, c->pixels, &im);
        const imagebart_picture p = picture_to_tell(c, k, 1, &im, tokens);
        if (e == OK) tell(c, &p);
        if (e == OK && c->draw.with_chain) e = tell_its_steps(c, b, k - b->at);
        if (e == OK) e = finish(c, k, &im);
        image_free(&im);
        TRY(e);
    }
    return OK;
}

/* ---- A call ---- */

/* `to` = what of a struct of the caller's a version had. bytes: that version's (older, or this one's), or a later one's. */
static Err take(void *to, size_t to_bytes, const void *given, size_t bytes, size_t older, const char *what) {
    char or_older[64] = "";
    if (older) snprintf(or_older, sizeof or_older, ", %zu as API 1 had it,", older);
    if (bytes < to_bytes && (!older || bytes != older))
        return err("%s.bytes is %zu; expected sizeof(%s): %zu%s or more", what, bytes, what, to_bytes, or_older);
    memcpy(to, given, min_size(bytes, to_bytes));
    return OK;
}

static Err call_open(Call *c, imagebart_model *model, const imagebart_options *o, DrawKind kind) {
    memset(c, 0, sizeof *c);
    c->entry = enter();
    c->model = &model->model, c->kind = kind;
    c->scale = (size_t)c->model->schedule.T;
    if (o) TRY(take(&c->o, sizeof c->o, o, o->bytes, offsetof(imagebart_options, step), "imagebart_options"));
    const size_t n = c->o.count ? c->o.count : 1;
    if (n > MOST) return err("count %zu: expected 1 to %d", n, MOST);
    const SamplingArgs a = {.class_name = c->o.class_name,
                            .temperature = c->o.temperature,
                            .top_k = c->o.top_k,
                            .guidance = c->o.guidance,
                            .chain_length = c->o.chain_length,
                            .seed = c->o.seed,
                            .quiet = 1};
    Draw *d = &c->draw;
    *d = (Draw){.model = c->model, .n = n, .first = c->o.first};
    TRY(sampling_choose(&d->options, &a, c->model, kind));
    const size_t most = kind == DRAW_EDIT ? MAX_CANDIDATES : MAX_BEST_OF;
    d->M = c->o.best_of ? c->o.best_of : model->many[kind];
    if (d->M > most) return err("best_of %zu: expected 1 to %zu, or 0: as recommended", d->M, most);
    d->rows = draw_rows(n, BATCH, d->M);
    d->with_bounds = c->o.guesses != 0;
    d->with_chain = c->o.chains || (c->o.previews && c->o.picture && d->M > 1);
    d->watch = (DrawWatch){on_progress, on_scale, on_drawn, is_stopped, c};
    work_ask(is_stopped, c);
    return mem_alloc(&c->pixels, 3 * c->model->side, c->model->side * sizeof *c->pixels, "a picture");
}

static int call_close(Call *c, Err e) {
    free(c->pixels), free(c->known);
    edit_free(&c->edit);
    draw_free(&c->draw);
    leave(c->entry);
    if (c->failed) e = err("%s", c->failure);
    if (c->cancelled) e = err("cancelled");
    return c->cancelled ? IMAGEBART_CANCELLED : status(e);
}

/* Whether there is memory for it; then room for one picture at a time to be decoded. */
static Err draw(Call *c, uint8_t *rgb, int32_t *tokens) {
    Model *m = c->model;
    ModelMemory need;
    const size_t rows = sampling_rows(&c->draw.options, m->schedule.T, c->draw.rows);
    c->rgb = rgb, c->tokens = tokens;
    TRY(model_memory(m, max_size(rows, BOUND_ROWS), 1, &need));
    TRY(memory_fits(need.total, memory_available(), "this job", "a smaller one takes less"));
    TRY(vqgan_plan(m->vqgan, 1, m->side, m->side, 0));
    return draw_pictures(&c->draw);
}

int imagebart_sample(imagebart_model *model, const imagebart_options *o, uint8_t *rgb, int32_t *tokens) {
    Call c;
    if (model_enter(model) != OK) return IMAGEBART_FAILED;
    Err e = call_open(&c, model, o, DRAW_NEW);
    Draw *d = &c.draw;
    if (e == OK) e = draw_classes(&d->label, c.model, c.o.class_name, c.o.seed, d->first, d->n);
    if (e == OK) e = draw(&c, rgb, tokens);
    const int s = call_close(&c, e);
    model_leave(model);
    return s;
}

/* ---- Editing ---- */

/* The class that was named, else the one that the kept part looks like */
static Err edit_label(Call *c, const EditArgs *a) {
    Draw *d = &c->draw;
    const Chain chain = draw_chain(d);
    int32_t guess;
    TRY(draw_classes(&d->label, c->model, c->o.class_name, c->o.seed, 0, d->n));
    if (!d->label || c->o.class_name) return OK;
    TRY(edit_keeps_some(&c->edit, c->model, a));
    TRY(edit_class(&guess, &chain, c->known, c->edit.keep_token, c->o.seed));
    for (size_t b = 0; b < d->n; b++) d->label[b] = guess;
    return OK;
}

static void add_note(Call *c, const char *of, const char *text) {
    const size_t at = strlen(c->note);
    if (text && *text) snprintf(c->note + at, sizeof c->note - at, "%s%s%s", at ? "; " : "", of, text);
}

static void note_files(Call *c) {
    const EditPicture *p = &c->edit;
    add_note(c, "the picture: ", p->whole.note ? p->whole.note : p->picture.note);
    add_note(c, "the mask: ", p->note);
    add_note(c, "the picture: ", p->profile.note);
}

/* As ./inpaint warns */
static Err note_unlike(Call *c) {
    char text[ERR_MAX];
    TRY(edit_unlike(text, &c->edit, c->model, c->known, c->draw.label ? c->draw.label[0] : -1, c->o.seed));
    add_note(c, "", text);
    return OK;
}

/* Its files; an error says which of them cannot be read. */
static Err read_files(Call *c, const EditArgs *a) {
    const Err e = edit_read(&c->edit, c->model, a);
    if (e == OK || !c->edit.unreadable) return e;
    return err_in(strcmp(c->edit.unreadable, "mask") ? "the picture" : "the mask");
}

static int complete(imagebart_model *model, const imagebart_options *o, const EditArgs *a, uint8_t *rgb,
                    int32_t *tokens) {
    Call c;
    Err e = call_open(&c, model, o, DRAW_EDIT);
    if (e == OK && step(&c)) e = err("cancelled");
    if (e == OK) e = read_files(&c, a);
    if (e == OK) note_files(&c);
    if (e == OK) e = mem_alloc(&c.known, c.model->h * c.model->w, sizeof *c.known, "known tokens");
    if (e == OK) e = edit_encode(&c.edit, c.model, c.o.seed, c.known);
    if (e == OK) e = edit_label(&c, a);
    if (e == OK) e = note_unlike(&c);
    c.draw.known = c.known, c.draw.keep = c.edit.keep_token;
    if (e == OK) e = draw(&c, rgb, tokens);
    return call_close(&c, e);
}

/* Pixels that the caller has; *at = NULL: there are none, but perhaps a file. The mask's become its own. */
static Err pixels_of(Image *im, const Image **at, const imagebart_image *given, int is_mask, const char *what) {
    const size_t n = given->width * given->height;
    *at = NULL;
    if (!given->data || given->bytes) return OK;
    if (given->width < 1 || given->height < 1 || given->width > IMAGE_MAX_SIDE || given->height > IMAGE_MAX_SIDE)
        return err("%s: %zux%zu pixels; expected 1 to %d a side", what, given->width, given->height, IMAGE_MAX_SIDE);
    *im = (Image){.H = given->height, .W = given->width, .rgb = (uint8_t *)(uintptr_t)given->data};
    *at = im;
    if (!is_mask) return OK;
    TRY(mem_alloc(&im->rgb, n, 3, "a mask"));
    for (size_t i = 0; i < 3 * n; i++) im->rgb[i] = ((const uint8_t *)given->data)[i / 3] ? 255 : 0;
    return OK;
}

/* A picture, and one thing that says what is drawn anew */
static Err check_edit(const imagebart_edit *e) {
    static const char *const halves[] = {"upper", "lower", "left", "right"};
    size_t i = 0;
    if (!e->image.data) return err("there is no picture to complete");
    if ((e->mask.data != NULL) + (e->half != NULL) + (e->window > 0) + (e->outside > 0) + (e->extend > 0) != 1)
        return err("expected one of mask, half, window, outside and extend");
    while (e->half && i < 4 && strcmp(e->half, halves[i]) != 0) i++;
    if (i == 4) return err("half \"%.20s\": expected upper, lower, left or right", e->half);
    if (e->extend && e->paste) return err("extend: nothing is pasted into the picture");
    return OK;
}

static int complete_edit(imagebart_model *model, const imagebart_options *o, const imagebart_edit *e) {
    Image image, mask = {0};
    EditArgs a = {.image = e->image.data,
                  .mask = e->mask.data,
                  .image_bytes = e->image.bytes,
                  .mask_bytes = e->mask.bytes,
                  .half = e->half,
                  .window = e->window,
                  .outside = e->outside,
                  .extend = e->extend,
                  .invert = e->invert,
                  .official = e->official,
                  .paste = e->paste};
    Err failed = check_edit(e);
    if (failed == OK) failed = pixels_of(&image, &a.pixels, &e->image, 0, "the picture");
    if (failed == OK) failed = pixels_of(&mask, &a.mask_pixels, &e->mask, 1, "the mask");
    const int s = failed == OK ? complete(model, o, &a, NULL, NULL) : status(failed);
    if (a.mask_pixels) image_free(&mask);
    return s;
}

int imagebart_complete(imagebart_model *model, const imagebart_options *o, const imagebart_edit *edit) {
    imagebart_edit e = {0};
    if (model_enter(model) != OK) return IMAGEBART_FAILED;
    Err failed = edit ? OK : err("edit is NULL: there is no picture to complete");
    if (failed == OK) failed = take(&e, sizeof e, edit, edit->bytes, 0, "imagebart_edit");
    const int s = failed == OK ? complete_edit(model, o, &e) : status(failed);
    model_leave(model);
    return s;
}

static int inpaint(imagebart_model *model, const imagebart_options *o, const uint8_t *picture, const uint8_t *keep,
                   uint8_t *rgb, int32_t *tokens) {
    const size_t side = model->model.side;
    Image mask = {0};
    EditArgs a = {0};
    const Image image = {.H = side, .W = side, .rgb = (uint8_t *)(uintptr_t)picture};
    Err e = picture ? OK : err("picture is NULL: there is no picture");
    if (e == OK && !keep) e = err("keep is NULL: there is no mask");
    if (e == OK) e = pixels_of(&mask, &a.mask_pixels, &(imagebart_image){keep, 0, side, side}, 1, "the mask");
    a.pixels = &image;
    const int s = e == OK ? complete(model, o, &a, rgb, tokens) : status(e);
    image_free(&mask);
    return s;
}

int imagebart_inpaint(imagebart_model *model, const imagebart_options *o, const uint8_t *picture, const uint8_t *keep,
                      uint8_t *rgb, int32_t *tokens) {
    if (model_enter(model) != OK) return IMAGEBART_FAILED;
    const int s = inpaint(model, o, picture, keep, rgb, tokens);
    model_leave(model);
    return s;
}

/* ---- The first stage alone ---- */

typedef Err OnePicture(Model *m, real *pixels, uint8_t *rgb, int32_t *tokens);

static Err encode_one(Model *m, real *pixels, uint8_t *rgb, int32_t *tokens) {
    const Image im = {.H = m->side, .W = m->side, .rgb = rgb};
    TRY(image_prepare(pixels, &im, PREP_FOLDER, m->side, -1, -1, 0));
    return vqgan_encode(m->vqgan, pixels, 1, m->side, m->side, 0, NULL, NULL, tokens);
}

static Err decode_one(Model *m, real *pixels, uint8_t *rgb, int32_t *tokens) {
    Image im = {0};
    const Err e = picture_of(m, tokens, pixels, &im);
    if (e == OK) memcpy(rgb, im.rgb, 3 * m->side * m->side);
    image_free(&im);
    return e;
}

static Err first_stage(Model *m, OnePicture *one, uint8_t *rgb, int32_t *tokens, size_t count) {
    const size_t bytes = 3 * m->side * m->side, N = m->h * m->w;
    real *pixels = NULL;
    if (!rgb && count) return err("rgb is NULL; expected %zu pictures, %zux%zu", count, m->side, m->side);
    if (!tokens && count) return err("tokens is NULL; expected those of %zu pictures, %zu each", count, N);
    TRY(mem_alloc(&pixels, bytes, sizeof *pixels, "a picture"));
    Err e = vqgan_plan(m->vqgan, 1, m->side, m->side, 0);
    for (size_t b = 0; b < count && e == OK; b++) e = one(m, pixels, rgb + b * bytes, tokens + b * N);
    free(pixels);
    return e;
}

static int call_first_stage(imagebart_model *model, OnePicture *one, uint8_t *rgb, int32_t *tokens, size_t count) {
    if (model_enter(model) != OK) return IMAGEBART_FAILED;
    const Entry entry = enter();
    const Err e = first_stage(&model->model, one, rgb, tokens, count);
    leave(entry);
    model_leave(model);
    return status(e);
}

int imagebart_encode(imagebart_model *model, const uint8_t *rgb, size_t count, int32_t *tokens) {
    return call_first_stage(model, encode_one, (uint8_t *)(uintptr_t)rgb, tokens, count);
}

int imagebart_decode(imagebart_model *model, const int32_t *tokens, size_t count, uint8_t *rgb) {
    return call_first_stage(model, decode_one, rgb, (int32_t *)(uintptr_t)tokens, count);
}

/* ---- For levels.c ---- */

#ifdef LIBRARY_LEVELS
static int refuse(const char *why) {
    return status(err("%s", why));
}

extern const LibraryCalls library_calls;
#define IN_TABLE(type, name, parameters, arguments) imagebart_##name,
const LibraryCalls library_calls = {imagebart_open_on, refuse, LIBRARY_CALLS(IN_TABLE)};
#endif
