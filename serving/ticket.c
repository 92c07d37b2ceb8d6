/* ticket.c - a job in the queue and beyond: from its arrival to its pictures: how far it is, what it has, what its
 * listeners are told.
 *
 * The worker runs it (ticket_run), any number of connections look at it. Under the lock is what both touch. What is
 * drawn does not depend on whether anybody looks, nor on previews. */
#include "serving/serving.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TICKET_BYTES = 8192, PNG_SLACK = 4096 }; /* of a ticket itself; of a PNG beside its pixels */

size_t ticket_tokens(const Ticket *t, int scale) {
    const Model *m = t->job.served->model;
    return t->job.count * t->job.best_of * m->h * m->w * t->job.options.chain[scale];
}

/* ---- Arrival and end ---- */

/* Bytes at most: of a packed profile, of a picture of the model, of what is told of its tokens, of its chain, of a
 * result */
static size_t profile_bytes(const Job *j) {
    return j->profile_bytes + j->profile_bytes / 1000;
}

static size_t worst_picture(const Job *j) {
    const Model *m = j->served->model;
    return profile_bytes(j) + 3 * m->side * m->side + m->side + PNG_SLACK;
}

static size_t worst_details(const Job *j) {
    return 20 * j->served->model->h * j->served->model->w + 256;
}

static size_t chain_bytes(const Job *j) {
    const Model *m = j->served->model;
    return ((size_t)m->schedule.T + 1) * m->h * m->w * sizeof(int32_t);
}

static size_t worst_result(const Job *j) {
    if (!j->paste_pixels) return worst_picture(j);
    return profile_bytes(j) + 4 * j->paste_pixels + j->paste_pixels / 512 + PNG_SLACK;
}

size_t ticket_results(const Job *j) {
    const size_t previews = j->previews ? (size_t)j->served->model->schedule.T * worst_picture(j) : 0;
    return j->count * (worst_result(j) + previews + worst_details(j) + chain_bytes(j));
}

static size_t waiting_bytes(const Job *j) {
    return (j->image ? j->image->size : 0) + (j->mask ? j->mask->size : 0);
}

size_t ticket_bytes(const Job *j) {
    return TICKET_BYTES + waiting_bytes(j) + ticket_results(j);
}

Err ticket_new(Ticket **out, Job *job, const Offer *offer) {
    const size_t T = (size_t)job->served->model->schedule.T, n = job->count;
    Ticket *t = calloc(1, sizeof *t);
    if (!t) return err("no memory for a job");
    t->job = *job;
    *job = (Job){0};
    t->offer = offer;
    t->holders = 1;
    t->scale = (int)T;
    t->bytes = ticket_bytes(&t->job);
    pthread_mutex_init(&t->lock, NULL);
    t->picture = calloc(n, sizeof *t->picture);
    t->details = calloc(n, sizeof *t->details);
    t->preview = calloc(n * (T + 1), sizeof *t->preview);
    t->chain = calloc(n, sizeof *t->chain);
    t->bound = calloc(n, sizeof *t->bound);
    t->label = calloc(n, sizeof *t->label);
    Err e =
        t->picture && t->details && t->preview && t->chain && t->bound && t->label ? OK : err("no memory for a job");
    if (e == OK) e = random_text(t->id, 16);
    if (e == OK) e = events_new(&t->events);
    if (e == OK)
        *out = t;
    else
        ticket_release(t);
    return e;
}

void ticket_release(Ticket *t) {
    if (--t->holders) return;
    const size_t n = t->job.count, scales = t->job.served ? (size_t)t->job.served->model->schedule.T + 1 : 0;
    for (size_t k = 0; k < n && t->picture; k++) blob_release(t->picture[k]);
    for (size_t k = 0; k < n && t->details; k++) blob_release(t->details[k]);
    for (size_t k = 0; k < n * scales && t->preview; k++) blob_release(t->preview[k]);
    for (size_t k = 0; k < n && t->chain; k++) blob_release(t->chain[k]);
    free(t->picture), free(t->details), free(t->preview), free(t->chain), free(t->bound), free(t->label);
    if (t->events) events_release(t->events);
    pthread_mutex_destroy(&t->lock);
    job_free(&t->job);
    free(t);
}

int ticket_is_over(const Ticket *t) {
    return t->state > TICKET_RUNNING;
}

/* ---- What is told of it ---- */

static cJSON *results_json(const Ticket *t) {
    cJSON *list = cJSON_CreateArray();
    const Classes *classes = &t->job.served->model->classes;
    for (size_t k = 0; k < t->job.count && t->state == TICKET_DONE; k++) {
        char address[64], title[CLASS_TITLE_BYTES];
        cJSON *x = cJSON_CreateObject();
        snprintf(address, sizeof address, "api/jobs/%s/%zu.png", t->id, k);
        cJSON_AddStringToObject(x, "picture", address);
        cJSON_AddNumberToObject(x, "width", (double)t->width);
        cJSON_AddNumberToObject(x, "height", (double)t->height);
        if (t->label[k] >= 0)
            cJSON_AddStringToObject(x, "class", class_title(title, classes, (size_t)t->label[k]));
        else
            cJSON_AddNullToObject(x, "class");
        cJSON_AddNumberToObject(x, "bound", t->bound[k]);
        cJSON_AddItemToArray(list, x);
    }
    return list;
}

/* Seconds: what is left of every scale, at the pace of that scale so far, or of all of them. -1: unknown, as it is until a
 * twentieth is done. */
static double time_left(const Ticket *t) {
    const int T = t->job.served->model->schedule.T;
    double spent = 0, left = 0;
    size_t done = 0, all = 0;
    for (int s = 1; s <= T; s++) spent += t->spent[s], done += t->done[s], all += ticket_tokens(t, s);
    if (t->state == TICKET_DONE) return 0;
    if (t->state != TICKET_RUNNING || 20 * done < all || spent <= 0) return -1;
    for (int s = 1; s <= T; s++) {
        const double pace = t->done[s] ? t->spent[s] / (double)t->done[s] : spent / (double)done;
        left += pace * (double)(ticket_tokens(t, s) - t->done[s]);
    }
    return left;
}

void ticket_add_progress(cJSON *x, const Ticket *t) {
    const double left = time_left(t);
    cJSON_AddNumberToObject(x, "scale", t->scale);
    cJSON_AddNumberToObject(x, "scales", t->job.served->model->schedule.T);
    cJSON_AddNumberToObject(x, "token", (double)t->done[t->scale]);
    cJSON_AddNumberToObject(x, "tokens", (double)ticket_tokens(t, t->scale));
    if (left >= 0)
        cJSON_AddNumberToObject(x, "left", (double)(long)(left * 1000) / 1000);
    else
        cJSON_AddNullToObject(x, "left");
}

cJSON *ticket_json(Ticket *t, size_t place) {
    static const char *const states[] = {"queued", "running", "done", "failed", "cancelled"};
    cJSON *x = cJSON_CreateObject();
    pthread_mutex_lock(&t->lock);
    const double until = ticket_is_over(t) ? t->ended : seconds();
    cJSON_AddStringToObject(x, "id", t->id);
    cJSON_AddStringToObject(x, "state", states[t->state]);
    cJSON_AddNumberToObject(x, "place", t->state == TICKET_QUEUED ? (double)place : 0);
    ticket_add_progress(x, t);
    cJSON_AddNumberToObject(x, "took", t->began > 0 ? (double)(long)((until - t->began) * 1000) / 1000 : 0);
    cJSON_AddItemToObject(x, "job", job_json(&t->job));
    cJSON_AddItemToObject(x, "command", job_command(&t->job, t->offer));
    cJSON_AddItemToObject(x, "results", results_json(t));
    if (t->state == TICKET_FAILED)
        cJSON_AddStringToObject(x, "error", t->error);
    else
        cJSON_AddNullToObject(x, "error");
    if (*t->note)
        cJSON_AddStringToObject(x, "note", t->note);
    else
        cJSON_AddNullToObject(x, "note");
    pthread_mutex_unlock(&t->lock);
    return x;
}

void ticket_tell_place(Ticket *t, size_t place) {
    cJSON *x = cJSON_CreateObject();
    cJSON_AddNumberToObject(x, "place", (double)place);
    events_put(t->events, EVENT_KEPT, "queued", x);
}

void ticket_start(Ticket *t) {
    pthread_mutex_lock(&t->lock);
    t->state = TICKET_RUNNING;
    t->began = seconds();
    pthread_mutex_unlock(&t->lock);
}

/* The blob that stands in a list, held for the caller; NULL: it is not there yet. */
static Blob *held(Ticket *t, Blob **list, size_t k) {
    pthread_mutex_lock(&t->lock);
    Blob *b = list[k] ? blob_hold(list[k]) : NULL;
    pthread_mutex_unlock(&t->lock);
    return b;
}

/* *number = decimal digits, nothing else; *text moves behind them. */
static int whole_number(size_t *number, const char **text) {
    return **text >= '0' && **text <= '9' && text_digits(number, text);
}

Reply ticket_file(Ticket *t, const Request *r) {
    const Model *m = t->job.served->model;
    const size_t T = (size_t)m->schedule.T;
    const char *name = r->part[1], *scale;
    size_t k = 0, s = 0;
    const size_t times = request_query(&scale, r, "scale");
    const char *digits = scale;
    const int numbered = whole_number(&k, &name), png = !strcmp(name, ".png");
    if (!numbered || (!png && strcmp(name, ".json") != 0)) return reply_error(404, NULL, "a job has no such file");
    if (times > 1 || (scale && (!whole_number(&s, &digits) || *digits)))
        return reply_error(400, "scale", "scale: expected a whole number, once");
    const int is_one = k < t->job.count && (!scale || (s >= 1 && s <= T));
    Blob **const list = png ? (scale ? t->preview : t->picture) : scale ? t->chain : t->details;
    Blob *b = is_one ? held(t, list, png && scale ? k * (T + 1) + s : k) : NULL;
    if (!b) return reply_error(404, NULL, "this is not there%s", ticket_is_over(t) ? "" : " yet");
    Reply reply = !png && scale ? chain_reply(m, b, (int)s) : reply_blob(png ? "image/png" : "application/json", b);
    blob_release(b);
    return reply;
}

static size_t size_of(const Blob *b) {
    return b ? b->size : 0;
}

void ticket_end(Ticket *t, TicketState state) {
    size_t held_bytes = TICKET_BYTES;
    const size_t T = (size_t)t->job.served->model->schedule.T;
    pthread_mutex_lock(&t->lock);
    t->ended = seconds();
    blob_release(t->job.image), blob_release(t->job.mask);
    t->job.image = t->job.mask = NULL;
    for (size_t k = 0; k < t->job.count; k++) {
        held_bytes += size_of(t->picture[k]) + size_of(t->details[k]) + size_of(t->chain[k]);
        for (size_t s = 1; s <= T; s++) held_bytes += size_of(t->preview[k * (T + 1) + s]);
    }
    t->bytes = held_bytes;
    t->state = state; /* the last: from now on the ticket may be forgotten */
    pthread_mutex_unlock(&t->lock);
    cJSON *x = state == TICKET_DONE ? ticket_json(t, 0) : cJSON_CreateObject();
    if (state == TICKET_FAILED) cJSON_AddStringToObject(x, "error", t->error);
    events_put(t->events, EVENT_LAST,
               state == TICKET_DONE     ? "done"
               : state == TICKET_FAILED ? "failed"
                                        : "cancelled",
               x);
}
