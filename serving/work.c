/* work.c - what the worker does for a ticket: has the library draw its pictures (sampling/libimagebart.h), keeps
 * them and, on the way, every scale as a picture, and tells the listeners. A job that is cancelled stops at the next
 * block of tokens; what was finished by then stays. */
#include "sampling/libimagebart.h"
#include "serving/serving.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const double TELL_SECONDS = 0.1;

typedef struct {
    Ticket *ticket;
    double last, told; /* the last step; the last progress that was told */
    int failed;        /* the ticket says why */
} Work;

/* The error's text without the model's folder, which is nobody's business */
static void keep_error(Ticket *t) {
    const char *text = err_text(), *folder = t->job.served->model->folder, *at = strstr(text, folder);
    if (at)
        snprintf(t->error, sizeof t->error, "%.*s%s%s", (int)(at - text), text, t->job.served->name,
                 at + strlen(folder));
    else
        snprintf(t->error, sizeof t->error, "%s", text);
}

/* ---- Pictures ---- */

/* Puts a picture into a list of the ticket's. */
static Err keep_png(Ticket *t, Blob **list, size_t k, const imagebart_picture *p, const Config *text) {
    const Profile profile = {.bytes = (uint8_t *)(uintptr_t)p->profile, .size = p->profile_bytes};
    const Image im = {.H = p->height,
                      .W = p->width,
                      .rgb = (uint8_t *)(uintptr_t)p->rgb,
                      .alpha = (uint8_t *)(uintptr_t)p->alpha,
                      .profile = &profile};
    uint8_t *bytes;
    size_t size;
    Blob *b;
    TRY(image_encode_png(&bytes, &size, &im, text));
    TRY(blob_new(&b, bytes, size));
    pthread_mutex_lock(&t->lock);
    blob_release(list[k]);
    list[k] = b;
    pthread_mutex_unlock(&t->lock);
    return OK;
}

/* The second one of a scale is of another candidate, which is kept: at the same address, told by no event */
static Err keep_preview(Ticket *t, const imagebart_picture *p) {
    char address[96];
    const size_t at = p->number * ((size_t)t->job.served->model->schedule.T + 1) + p->scale;
    const int is_second = t->preview[at] != NULL; /* only this thread changes it */
    TRY(keep_png(t, t->preview, at, p, NULL));
    if (is_second) return OK;
    cJSON *x = cJSON_CreateObject();
    snprintf(address, sizeof address, "api/jobs/%s/%zu.png?scale=%zu", t->id, p->number, p->scale);
    cJSON_AddStringToObject(x, "picture", address);
    cJSON_AddNumberToObject(x, "k", (double)p->number);
    cJSON_AddNumberToObject(x, "scale", (double)p->scale);
    events_put(t->events, EVENT_KEPT, "preview", x);
    return OK;
}

/* K.json */
static Err keep_details(Ticket *t, const imagebart_picture *p) {
    const Model *m = t->job.served->model;
    const size_t N = m->h * m->w, room = 20 * N + 256;
    char *text = malloc(room), *to = text;
    Blob *b;
    if (!text) return err("no memory for what is told of a picture");
    to += sprintf(to, "{\"tokens\":[");
    for (size_t i = 0; i < N; i++) to += sprintf(to, "%s%d", i ? "," : "", (int)p->tokens[i]);
    to += sprintf(to, "],\"grid\":[%zu,%zu],\"bound\":%.9g,\"entropy\":[", m->h, m->w, -p->bound);
    for (size_t i = 0; i < N; i++) to += sprintf(to, "%s%.3f", i ? "," : "", (double)p->entropy[i]);
    to += sprintf(to, "]}");
    TRY(blob_new(&b, (uint8_t *)text, (size_t)(to - text)));
    pthread_mutex_lock(&t->lock);
    t->details[p->number] = b;
    pthread_mutex_unlock(&t->lock);
    return OK;
}

/* x_T .. x_0 of the picture */
static Err keep_chain(Ticket *t, const imagebart_picture *p) {
    const Model *m = t->job.served->model;
    const size_t bytes = ((size_t)m->schedule.T + 1) * m->h * m->w * sizeof *p->chain;
    Blob *b;
    TRY(blob_new(&b, NULL, bytes));
    memcpy(b->bytes, p->chain, bytes);
    pthread_mutex_lock(&t->lock);
    t->chain[p->number] = b;
    pthread_mutex_unlock(&t->lock);
    return OK;
}

static Err keep_picture(Ticket *t, const imagebart_picture *p) {
    Config text = {0};
    TRY(keep_details(t, p));
    TRY(keep_chain(t, p));
    Err e = job_text(&text, &t->job, p->number);
    if (e == OK) e = keep_png(t, t->picture, p->number, p, &text);
    config_free(&text);
    pthread_mutex_lock(&t->lock);
    t->width = p->width, t->height = p->height;
    t->label[p->number] = p->label;
    t->bound[p->number] = -p->bound;
    if (p->note) snprintf(t->note, sizeof t->note, "%s", p->note);
    pthread_mutex_unlock(&t->lock);
    return e;
}

static int on_picture(void *context, const imagebart_picture *p) {
    Work *w = context;
    w->failed = (p->scale ? keep_preview(w->ticket, p) : keep_picture(w->ticket, p)) != OK;
    if (w->failed) keep_error(w->ticket);
    w->last = seconds();
    return w->failed;
}

/* ---- On the way ---- */

static void tell_progress(Ticket *t) {
    cJSON *x = cJSON_CreateObject();
    pthread_mutex_lock(&t->lock);
    ticket_add_progress(x, t);
    pthread_mutex_unlock(&t->lock);
    events_put(t->events, EVENT_PASSING, "progress", x);
}

static int on_step(void *context, size_t scale, size_t done, size_t of) {
    Work *w = context;
    Ticket *t = w->ticket;
    const double now = seconds();
    (void)of;                                                               /* ticket_tokens */
    if (t->scale == (int)scale && t->done[scale] == done) return t->cancel; /* only the worker writes them */
    pthread_mutex_lock(&t->lock);
    t->scale = (int)scale;
    if (done > t->done[scale]) t->spent[scale] += now - w->last;
    t->done[scale] = done;
    pthread_mutex_unlock(&t->lock);
    w->last = now;
    if (now - w->told >= TELL_SECONDS) {
        tell_progress(t);
        w->told = now;
    }
    return t->cancel;
}

/* ---- A job ---- */

/* What ./inpaint would be told */
static imagebart_edit edit_of(const Job *j) {
    imagebart_edit e = {.bytes = sizeof e,
                        .image = {.data = j->image->bytes, .bytes = j->image->size},
                        .half = *j->half ? j->half : NULL,
                        .window = j->window,
                        .outside = j->outside,
                        .extend = j->extend,
                        .paste = j->paste};
    if (j->mask) e.mask = (imagebart_image){.data = j->mask->bytes, .bytes = j->mask->size};
    return e;
}

static int draw(Work *w) {
    const Job *j = &w->ticket->job;
    const SampleOptions *s = &j->options;
    const int T = j->served->model->schedule.T;
    char list[4][MAX_SCALES * 32];
    double top_k[MAX_SCALES + 1], chain[MAX_SCALES + 1];
    for (int t = 1; t <= T; t++) top_k[t] = (double)s->top_k[t], chain[t] = (double)s->chain[t];
    const imagebart_options o = {.bytes = sizeof o,
                                 .count = j->count,
                                 .seed = j->seed,
                                 .first = j->first,
                                 .class_name = j->class_name,
                                 .temperature = scales_text(list[0], s->temperature, T),
                                 .top_k = scales_text(list[1], top_k, T),
                                 .guidance = scales_text(list[2], s->guidance, T),
                                 .chain_length = scales_text(list[3], chain, T),
                                 .best_of = j->best_of,
                                 .step = on_step,
                                 .picture = on_picture,
                                 .previews = j->previews,
                                 .guesses = 1,
                                 .chains = 1,
                                 .user = w};
    if (j->kind == DRAW_NEW) return imagebart_sample(j->served->library, &o, NULL, NULL);
    const imagebart_edit e = edit_of(j);
    return imagebart_complete(j->served->library, &o, &e);
}

void ticket_run(Ticket *t) {
    Work w = {.ticket = t, .last = seconds()};
    const int s = draw(&w);
    if (s == IMAGEBART_OK)
        tell_progress(t);
    else if (!w.failed)
        keep_error(t);
    ticket_end(t, s == IMAGEBART_OK ? TICKET_DONE : t->cancel ? TICKET_CANCELLED : TICKET_FAILED);
}
