/* library.c - libimagebart: sampling/draw.c and sampling/edit.c for other programs. All that it knows of a model is in the
 * handle; what failed is told by the error text, which each thread has of its own. */
#include "sampling/libimagebart.h"
#include "sampling/sampling.h"

#include <stdlib.h>
#include <string.h>

struct imagebart_model {
    Model model;
};

typedef struct {
    Model *model;
    imagebart_options o; /* the caller's, as far as they go */
    SamplingArgs args;
    Draw draw;
    real *pixels; /* (3,side,side) of a preview */
    uint8_t *rgb; /* (side,side,3) of one */
    int cancelled;
} Call;

enum { BATCH = 16 };

int imagebart_api(void) {
    return IMAGEBART_API;
}

const char *imagebart_error(void) {
    return err_text();
}

void imagebart_threads(size_t n) {
    threads_set((int)min_size(n, 4096));
}

/* ---- Models ---- */

int imagebart_open(imagebart_model **model, const char *name_or_folder, const char *weights) {
    WeightFormat format = WEIGHTS_REAL;
    *model = NULL;
    Err e = name_or_folder ? weight_format(&format, weights, "weights") : err("no model was named");
    if (e == OK) e = mem_alloc(model, 1, sizeof **model, "a model");
    if (e != OK) return IMAGEBART_FAILED;
    memset(*model, 0, sizeof **model);
    e = model_open(&(*model)->model, name_or_folder, NULL);
    (*model)->model.weights = format;
    if (e == OK) return IMAGEBART_OK;
    free(*model); /* model_open leaves nothing open */
    *model = NULL;
    return IMAGEBART_FAILED;
}

void imagebart_close(imagebart_model *model) {
    if (model) model_close(&model->model);
    free(model);
}

void imagebart_get_shape(const imagebart_model *model, imagebart_shape *shape) {
    const Model *m = &model->model;
    *shape = (imagebart_shape){m->side, m->h, m->w, m->K, (size_t)m->schedule.T, m->classes.n};
}

/* ---- On the way ---- */

/* rgb (side,side,3) of tokens (N); the first stage is planned for one picture */
static Err picture_of(const Model *m, const int32_t *tokens, real *pixels, uint8_t *rgb) {
    Image im = {0};
    TRY(vqgan_decode_tokens(m->vqgan, tokens, 1, m->h, m->w, pixels));
    TRY(image_grid(&im, pixels, 1, m->side, m->side, 1, 0));
    memcpy(rgb, im.rgb, 3 * m->side * m->side);
    image_free(&im);
    return OK;
}

static int on_progress(void *context, const DrawBatch *b, int t, size_t repeat, size_t done, size_t of) {
    Call *c = context;
    (void)b, (void)repeat;
    if (c->o.progress && c->o.progress(c->o.user, (size_t)t, done, of)) c->cancelled = 1;
    return c->cancelled;
}

static int is_cancelled(void *context) {
    return ((const Call *)context)->cancelled;
}

/* Of the rows that are drawn for a picture the first is shown. */
static void on_scale(void *context, const DrawBatch *b, int t, const int32_t *tokens) {
    Call *c = context;
    const Model *m = c->model;
    for (size_t k = 0; k < b->count && c->o.preview && !c->cancelled && t <= m->schedule.T; k++)
        if (picture_of(m, tokens + k * b->each * m->h * m->w, c->pixels, c->rgb) == OK)
            c->o.preview(c->o.user, b->at + k, (size_t)t, c->rgb);
}

/* ---- Drawing ---- */

static Err call_open(Call *c, imagebart_model *model, const imagebart_options *o, DrawKind kind) {
    memset(c, 0, sizeof *c);
    c->model = &model->model;
    if (o && o->bytes == 0) return err("imagebart_options.bytes is 0, expected sizeof(imagebart_options)");
    if (o) memcpy(&c->o, o, min_size(o->bytes, sizeof c->o));
    const size_t n = c->o.count ? c->o.count : 1;
    if (n > 4096) return err("count %zu: expected 1 to 4096", n);
    c->args = (SamplingArgs){.class_name = c->o.class_name,
                             .temperature = c->o.temperature,
                             .top_k = c->o.top_k,
                             .guidance = c->o.guidance,
                             .chain_length = c->o.chain_length,
                             .seed = c->o.seed,
                             .quiet = 1};
    c->draw = (Draw){.model = c->model, .n = n, .first = c->o.first};
    TRY(sampling_choose(&c->draw.options, &c->args, c->model, kind));
    TRY(sampling_many(&c->draw.M, c->model, c->o.best_of, kind));
    if (c->draw.M > (kind == DRAW_EDIT ? MAX_CANDIDATES : MAX_BEST_OF)) return err("best_of %zu: too many", c->draw.M);
    c->draw.rows = draw_rows(n, BATCH, c->draw.M);
    c->draw.with_bounds = kind == DRAW_NEW && c->draw.M > 1;
    c->draw.watch = (DrawWatch){on_progress, on_scale, NULL, is_cancelled, c};
    TRY(mem_alloc(&c->pixels, 3 * c->model->side, c->model->side * sizeof *c->pixels, "a picture"));
    return mem_alloc(&c->rgb, 3 * c->model->side, c->model->side, "a picture");
}

static int call_close(Call *c, Err e) {
    free(c->pixels), free(c->rgb);
    draw_free(&c->draw);
    if (e != OK && c->cancelled) err("cancelled");
    return e == OK ? IMAGEBART_OK : c->cancelled ? IMAGEBART_CANCELLED : IMAGEBART_FAILED;
}

/* Whether there is memory for it; then room for one picture at a time to be decoded. */
static Err call_prepare(Call *c) {
    Model *m = c->model;
    ModelMemory need;
    const size_t rows = sampling_rows(&c->draw.options, m->schedule.T, c->draw.rows);
    TRY(model_memory(m, max_size(rows, BOUND_ROWS), 1, &need));
    TRY(memory_fits(need.total, memory_available(), "this call", "a smaller count takes less"));
    return vqgan_plan(m->vqgan, 1, m->side, m->side, 0);
}

/* What was drawn, for the caller. */
static Err call_results(Call *c, uint8_t *rgb, int32_t *tokens) {
    const Model *m = c->model;
    const size_t N = m->h * m->w, bytes = 3 * m->side * m->side;
    if (tokens) memcpy(tokens, c->draw.tokens, c->draw.n * N * sizeof *tokens);
    for (size_t b = 0; b < c->draw.n && rgb; b++)
        TRY(picture_of(m, c->draw.tokens + b * N, c->pixels, rgb + b * bytes));
    return OK;
}

int imagebart_sample(imagebart_model *model, const imagebart_options *o, uint8_t *rgb, int32_t *tokens) {
    Call c;
    Err e = call_open(&c, model, o, DRAW_NEW);
    Draw *d = &c.draw;
    if (e == OK) e = draw_classes(&d->label, c.model, c.o.class_name, c.o.seed, d->first, d->n);
    if (e == OK) e = call_prepare(&c);
    if (e == OK) e = draw_pictures(d);
    if (e == OK) e = call_results(&c, rgb, tokens);
    return call_close(&c, e);
}

/* ---- Editing ---- */

/* The picture and its mask as the files that ./inpaint would read. */
static Err edit_from(EditPicture *p, const Model *m, const uint8_t *picture, const uint8_t *keep) {
    const size_t pixels = m->side * m->side;
    const Image image = {.H = m->side, .W = m->side, .rgb = (uint8_t *)(uintptr_t)picture};
    Image mask = {.H = m->side, .W = m->side};
    uint8_t *bytes = NULL, *mask_bytes = NULL;
    EditArgs a = {0};
    TRY(mem_alloc(&mask.rgb, pixels, 3, "mask"));
    for (size_t i = 0; i < 3 * pixels; i++) mask.rgb[i] = keep[i / 3] ? 255 : 0;
    Err e = image_encode_png(&bytes, &a.image_bytes, &image, NULL);
    if (e == OK) e = image_encode_png(&mask_bytes, &a.mask_bytes, &mask, NULL);
    a.image = bytes, a.mask = mask_bytes;
    if (e == OK) e = edit_read(p, m, &a);
    free(bytes), free(mask_bytes);
    image_free(&mask);
    return e;
}

/* The class that was named, else the one that the kept part looks like */
static Err edit_label(Call *c, const int32_t *known, const EditPicture *p) {
    const Chain chain = model_chain(c->model);
    Draw *d = &c->draw;
    int32_t guess;
    TRY(draw_classes(&d->label, c->model, c->o.class_name, c->o.seed, 0, d->n));
    if (!d->label || c->o.class_name) return OK;
    TRY(edit_class(&guess, &chain, known, p->keep_token, c->o.seed));
    for (size_t b = 0; b < d->n; b++) d->label[b] = guess;
    return OK;
}

int imagebart_inpaint(imagebart_model *model, const imagebart_options *o, const uint8_t *picture, const uint8_t *keep,
                      uint8_t *rgb, int32_t *tokens) {
    Call c;
    EditPicture p = {0};
    int32_t *known = NULL;
    Err e = call_open(&c, model, o, DRAW_EDIT);
    const Model *m = c.model;
    const size_t pixels = m->side * m->side;
    if (e == OK) e = edit_from(&p, m, picture, keep);
    if (e == OK) e = mem_alloc(&known, m->h * m->w, sizeof *known, "known tokens");
    if (e == OK) e = edit_encode(&p, c.model, c.o.seed, known);
    if (e == OK) e = edit_label(&c, known, &p);
    c.draw.known = known, c.draw.keep = p.keep_token;
    if (e == OK) e = call_prepare(&c);
    if (e == OK) e = draw_pictures(&c.draw);
    if (e == OK) e = call_results(&c, rgb, tokens);
    for (size_t i = 0; e == OK && rgb && i < c.draw.n * pixels; i++)
        if (keep[i % pixels]) memcpy(rgb + 3 * i, picture + 3 * (i % pixels), 3);
    free(known);
    edit_free(&p);
    return call_close(&c, e);
}

/* ---- The first stage alone ---- */

int imagebart_encode(imagebart_model *model, const uint8_t *rgb, size_t count, int32_t *tokens) {
    Model *m = &model->model;
    const size_t pixels = m->side * m->side, N = m->h * m->w;
    real *x;
    if (mem_alloc(&x, 3 * pixels, sizeof *x, "a picture") != OK) return IMAGEBART_FAILED;
    Err e = vqgan_plan(m->vqgan, 1, m->side, m->side, 0);
    for (size_t b = 0; b < count && e == OK; b++) {
        const Image im = {.H = m->side, .W = m->side, .rgb = (uint8_t *)(uintptr_t)(rgb + b * 3 * pixels)};
        e = image_prepare(x, &im, PREP_FOLDER, m->side, -1, -1, 0);
        if (e == OK) e = vqgan_encode(m->vqgan, x, 1, m->side, m->side, 0, NULL, NULL, tokens + b * N);
    }
    free(x);
    return e == OK ? IMAGEBART_OK : IMAGEBART_FAILED;
}

int imagebart_decode(imagebart_model *model, const int32_t *tokens, size_t count, uint8_t *rgb) {
    Model *m = &model->model;
    const size_t pixels = m->side * m->side, N = m->h * m->w;
    real *x;
    if (mem_alloc(&x, 3 * pixels, sizeof *x, "a picture") != OK) return IMAGEBART_FAILED;
    Err e = vqgan_plan(m->vqgan, 1, m->side, m->side, 0);
    for (size_t b = 0; b < count && e == OK; b++) e = picture_of(m, tokens + b * N, x, rgb + b * 3 * pixels);
    free(x);
    return e == OK ? IMAGEBART_OK : IMAGEBART_FAILED;
}
