/* work.c - what the worker does for a ticket: draws its pictures (sampling/), decodes and keeps them, shows every scale on
 * the way as a picture, tells the listeners. A job that is cancelled stops at the next block of tokens; what was
 * finished by then stays. */
#include "serving/serving.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const double TELL_SECONDS = 0.1;

typedef struct {
    Ticket *ticket;
    Model *model;
    const Draw *draw;
    const EditPicture *edit;       /* NULL: new pictures */
    size_t before[MAX_SCALES + 1]; /* tokens of a scale in earlier batches */
    double last, told;             /* the last pass; the last progress that was told */
    real *pixels;                  /* of a picture */
} Work;

/* ---- Pictures ---- */

/* im = the picture of tokens (N). */
static Err decode_one(const Work *w, const int32_t *tokens, Image *im) {
    const Model *m = w->model;
    TRY(vqgan_decode_tokens(m->vqgan, tokens, 1, m->h, m->w, w->pixels));
    return image_grid(im, w->pixels, 1, m->side, m->side, 1, 0);
}

/* Puts a picture into a list of the ticket's. */
static Err keep_png(Ticket *t, Blob **list, size_t k, const Image *im, const Config *text) {
    uint8_t *bytes;
    size_t size;
    Blob *b;
    TRY(image_encode_png(&bytes, &size, im, text));
    TRY(blob_new(&b, bytes, size));
    pthread_mutex_lock(&t->lock);
    list[k] = b;
    pthread_mutex_unlock(&t->lock);
    return OK;
}

static Err keep_preview(Ticket *t, size_t k, int scale, const Image *im) {
    char address[96];
    const size_t at = k * ((size_t)t->job.served->model.schedule.T + 1) + (size_t)scale;
    TRY(keep_png(t, t->preview, at, im, NULL));
    cJSON *x = cJSON_CreateObject();
    snprintf(address, sizeof address, "api/jobs/%s/%zu.png?scale=%d", t->id, k, scale);
    cJSON_AddStringToObject(x, "picture", address);
    cJSON_AddNumberToObject(x, "k", (double)k);
    cJSON_AddNumberToObject(x, "scale", scale);
    events_put(t->events, EVENT_KEPT, "preview", x);
    return OK;
}

/* The result of an edit: the whole picture, or the model's with the kept pixels as they were; in the file's colours. */
static Err finish_edit(const Work *w, Image *im) {
    const EditPicture *p = w->edit;
    if (w->ticket->job.paste) {
        Image whole;
        TRY(paste_picture(&whole, p, w->model, im));
        image_free(im);
        *im = whole;
        im->profile = &p->profile;
        return OK;
    }
    im->profile = &p->profile;
    for (size_t i = 0; i < im->H * im->W; i++)
        if (p->keep[i]) memcpy(im->rgb + 3 * i, p->picture.rgb + 3 * i, 3);
    return OK;
}

static Err keep_picture(const Work *w, size_t k, Image *im) {
    Ticket *t = w->ticket;
    Config text = {0};
    Err e = w->edit ? finish_edit(w, im) : OK;
    if (e == OK) e = job_text(&text, &t->job, k);
    if (e == OK) e = keep_png(t, t->picture, k, im, &text);
    config_free(&text);
    pthread_mutex_lock(&t->lock);
    t->width = im->W, t->height = im->H;
    pthread_mutex_unlock(&t->lock);
    return e;
}

/* K.json of tokens (N) and their entropies (N) */
static Err keep_details(const Work *w, size_t k, const int32_t *tokens, const float *entropy) {
    Ticket *t = w->ticket;
    const size_t N = w->model->h * w->model->w, room = 20 * N + 256;
    char *text = malloc(room), *to = text;
    Blob *b;
    if (!text) return err("no memory for what is told of a picture");
    to += sprintf(to, "{\"tokens\":[");
    for (size_t i = 0; i < N; i++) to += sprintf(to, "%s%d", i ? "," : "", (int)tokens[i]);
    to += sprintf(to, "],\"grid\":[%zu,%zu],\"bound\":%.9g,\"entropy\":[", w->model->h, w->model->w, t->bound[k]);
    for (size_t i = 0; i < N; i++) to += sprintf(to, "%s%.3f", i ? "," : "", (double)entropy[i]);
    to += sprintf(to, "]}");
    TRY(blob_new(&b, (uint8_t *)text, (size_t)(to - text)));
    pthread_mutex_lock(&t->lock);
    t->details[k] = b;
    pthread_mutex_unlock(&t->lock);
    return OK;
}

/* ---- On the way ---- */

static void tell_progress(Ticket *t) {
    cJSON *x = cJSON_CreateObject();
    pthread_mutex_lock(&t->lock);
    ticket_add_progress(x, t);
    pthread_mutex_unlock(&t->lock);
    events_put(t->events, EVENT_PASSING, "progress", x);
}

static int on_progress(void *context, const DrawBatch *b, int scale, size_t repeat, size_t done, size_t of) {
    Work *w = context;
    Ticket *t = w->ticket;
    const double now = seconds();
    pthread_mutex_lock(&t->lock);
    t->scale = scale;
    t->done[scale] = w->before[scale] + (repeat * of + done) * b->count * b->each;
    t->spent[scale] += now - w->last;
    pthread_mutex_unlock(&t->lock);
    w->last = now;
    if (now - w->told >= TELL_SECONDS) {
        tell_progress(t);
        w->told = now;
    }
    return t->cancel;
}

/* A scale is done: its pictures, of the first that is drawn for each. */
static void on_scale(void *context, const DrawBatch *b, int scale, const int32_t *tokens) {
    Work *w = context;
    Ticket *t = w->ticket;
    const Model *m = w->model;
    const int T = m->schedule.T, is_result = scale == 1 && b->each == 1;
    if (scale > T || !t->job.options.chain[scale]) return;
    w->before[scale] += ticket_tokens(t, scale) / t->job.count * b->count;
    for (size_t k = 0; k < b->count && t->job.previews && !is_result && !t->cancel; k++) {
        Image im = {0};
        Err e = decode_one(w, tokens + k * b->each * m->h * m->w, &im);
        if (e == OK) e = keep_preview(t, b->at + k, scale, &im);
        image_free(&im);
        if (e != OK) fprintf(stderr, "%s: a preview is missing: %s\n", program(), err_text());
    }
    w->last = seconds();
}

static int is_cancelled(void *context) {
    return ((const Work *)context)->ticket->cancel;
}

/* A batch is done: its pictures. Where one is drawn for each, it is the last scale's preview too. */
static Err on_drawn(void *context, const DrawBatch *b) {
    Work *w = context;
    Ticket *t = w->ticket;
    const size_t N = w->model->h * w->model->w;
    for (size_t k = b->at; k < b->at + b->count; k++) {
        Image im = {0};
        if (t->cancel) return err("cancelled");
        pthread_mutex_lock(&t->lock);
        t->bound[k] = -w->draw->bound[k];
        pthread_mutex_unlock(&t->lock);
        Err e = decode_one(w, w->draw->tokens + k * N, &im);
        if (e == OK && t->job.previews && b->each == 1) e = keep_preview(t, k, 1, &im);
        if (e == OK) e = keep_details(w, k, w->draw->tokens + k * N, w->draw->entropy + k * N);
        if (e == OK) e = keep_picture(w, k, &im);
        image_free(&im);
        TRY(e);
    }
    w->last = seconds();
    return OK;
}

/* ---- New pictures ---- */

/* Whether there is memory for it; then room for one picture at a time to be decoded. */
static Err prepare(Work *w, size_t rows) {
    Model *m = w->model;
    ModelMemory need;
    TRY(model_memory(m, max_size(sampling_rows(&w->ticket->job.options, m->schedule.T, rows), BOUND_ROWS), 1, &need));
    TRY(memory_fits(need.total, memory_available(), "this job", "a smaller one takes less"));
    TRY(mem_alloc(&w->pixels, 3 * m->side, m->side * sizeof *w->pixels, "a picture"));
    return vqgan_plan(m->vqgan, 1, m->side, m->side, 0);
}

static Err draw(Work *w, Draw *d) {
    d->rows = draw_rows(d->n, SERVED_BATCH, d->M);
    d->watch = (DrawWatch){on_progress, on_scale, on_drawn, is_cancelled, w};
    w->draw = d;
    TRY(prepare(w, d->rows));
    w->last = seconds();
    return draw_pictures(d);
}

/* Classes of the pictures, told from now on */
static void set_classes(Ticket *t, int32_t *label) {
    pthread_mutex_lock(&t->lock);
    t->label = label;
    pthread_mutex_unlock(&t->lock);
}

static Draw draw_of(const Work *w) {
    const Job *j = &w->ticket->job;
    return (Draw){
        .model = w->model, .options = j->options, .n = j->count, .M = j->best_of, .first = j->first, .with_bounds = 1};
}

static Err run_sample(Work *w) {
    const Job *j = &w->ticket->job;
    Draw d = draw_of(w);
    Err e = draw_classes(&d.label, w->model, j->class_name, j->seed, j->first, j->count);
    set_classes(w->ticket, d.label);
    if (e == OK) e = draw(w, &d);
    d.label = NULL; /* the ticket's */
    draw_free(&d);
    return e;
}

/* ---- Edited ones ---- */

/* The class that was named, else the one that the kept part looks like */
static Err choose_class(Work *w, int32_t **label, const int32_t *known, const EditPicture *p, const EditArgs *a) {
    const Job *j = &w->ticket->job;
    const Chain chain = model_chain(w->model);
    int32_t guess;
    TRY(draw_classes(label, w->model, j->class_name, j->seed, 0, j->count));
    if (!*label || j->class_name) return OK;
    TRY(edit_keeps_some(p, w->model, a));
    TRY(edit_class(&guess, &chain, known, p->keep_token, j->seed));
    for (size_t k = 0; k < j->count; k++) (*label)[k] = guess;
    return OK;
}

static Err run_edit(Work *w) {
    const Job *j = &w->ticket->job;
    const EditArgs a = job_edit_args(j);
    Draw d = draw_of(w);
    EditPicture p;
    int32_t *known = NULL;
    Err e = edit_read(&p, w->model, &a);
    w->edit = &p;
    if (e == OK) e = mem_alloc(&known, w->model->h * w->model->w, sizeof *known, "known tokens");
    if (e == OK) e = edit_encode(&p, w->model, j->seed, known);
    if (e == OK) e = choose_class(w, &d.label, known, &p, &a);
    set_classes(w->ticket, d.label);
    d.known = known, d.keep = p.keep_token;
    if (e == OK) e = draw(w, &d);
    d.label = NULL;
    draw_free(&d);
    free(known);
    edit_free(&p);
    return e;
}

/* ---- A job ---- */

/* The error's text without the model's folder, which is nobody's business */
static void keep_error(Ticket *t) {
    const char *text = err_text(), *folder = t->job.served->model.folder, *at = strstr(text, folder);
    if (at)
        snprintf(t->error, sizeof t->error, "%.*s%s%s", (int)(at - text), text, t->job.served->name,
                 at + strlen(folder));
    else
        snprintf(t->error, sizeof t->error, "%s", text);
}

void ticket_run(Ticket *t) {
    Work w = {.ticket = t, .model = &t->job.served->model, .last = seconds()};
    const Err e = t->job.kind == DRAW_EDIT ? run_edit(&w) : run_sample(&w);
    free(w.pixels);
    if (e == OK)
        tell_progress(t);
    else
        keep_error(t);
    ticket_end(t, e == OK ? TICKET_DONE : t->cancel ? TICKET_CANCELLED : TICKET_FAILED);
}
