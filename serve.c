/* serve.c - a page to draw on, and the HTTP interface behind it (doc/api.md).
 *
 *     queue    who waits, who is forgotten        enqueue, cancel, make_room
 *     worker   one job after the other            work: ticket_run (serving/work.c), which draws as ./sample and ./inpaint do
 *     calls    a request -> a reply               the table of routes; each runs on its connection's thread
 *     serve    options, models, a socket          everything in order
 *
 * Safe by default: only this machine can call, no request reads or writes a file. Read next: serving/http.c, how a
 * request comes; serving/gate.c, who may send one. */
#include "base/version.h"
#include "serving/serving.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
    OptionList models, origins;
    const char *host, *token, *token_file, *device, *weights;
    size_t port, queue, threads, most, results; /* most: pictures of a job; results: MiB */
} ServeArgs;

typedef struct {
    const ServeArgs *args;
    Offer offer;
    Gate gate;
    int cuda;
    WeightFormat weights;
    pthread_mutex_t lock; /* of what follows */
    pthread_cond_t changed;
    Ticket *first;         /* in the order in which they came: over, running, queued; held */
    Ticket *running;       /* or NULL */
    Served *last;          /* whose transition is in memory */
    char (*forgotten)[24]; /* ids, a ring */
    size_t forgotten_n;
    int is_ended;       /* the worker has stopped */
    _Atomic int ending; /* no more jobs; set with the lock */
} Server;
enum { FORGOTTEN = 65536 };
static const double OWNED_SECONDS = 30, ENDING_SECONDS = 4;

/* ---- The queue: every call with the lock ---- */

static size_t queued(const Server *s) {
    size_t n = 0;
    for (const Ticket *t = s->first; t; t = t->next) n += t->state == TICKET_QUEUED;
    return n;
}

/* How many end before it starts */
static size_t place_of(const Server *s, const Ticket *ticket) {
    size_t place = s->running != NULL;
    for (const Ticket *t = s->first; t && t != ticket; t = t->next) place += t->state == TICKET_QUEUED;
    return ticket->state == TICKET_QUEUED ? place : 0;
}

/* Tells those that wait when they move up. */
static void tell_places(Server *s) {
    for (Ticket *t = s->first; t; t = t->next) {
        const size_t place = place_of(s, t);
        if (t->state != TICKET_QUEUED || t->told_place == place) continue;
        ticket_tell_place(t, t->told_place = place);
    }
}

static void forget(Server *s, Ticket *t) {
    Ticket **at = &s->first;
    while (*at != t) at = &(*at)->next;
    *at = t->next;
    memcpy(s->forgotten[s->forgotten_n++ % FORGOTTEN], t->id, sizeof t->id);
    ticket_release(t);
}

static int is_forgotten(const Server *s, const char *id) {
    for (size_t i = 0; i < FORGOTTEN && i < s->forgotten_n; i++)
        if (!strcmp(s->forgotten[i], id)) return 1;
    return 0;
}

/* The oldest that are over go, until all fits. */
static void make_room(Server *s) {
    size_t bytes = 0;
    for (const Ticket *t = s->first; t; t = t->next) bytes += t->bytes;
    while (bytes > s->args->results << 20) {
        Ticket *oldest = NULL;
        for (Ticket *t = s->first; t; t = t->next)
            if (ticket_is_over(t) && (!oldest || t->ended < oldest->ended)) oldest = t;
        if (!oldest) return;
        bytes -= oldest->bytes;
        forget(s, oldest);
    }
}

static void cancel(Server *s, Ticket *t) {
    t->cancel = 1;
    if (t->state != TICKET_QUEUED) return;
    ticket_end(t, TICKET_CANCELLED);
    tell_places(s);
}

/* A ticket at the end of the queue; response set: it cannot be. */
static Reply enqueue(Server *s, Ticket *ticket) {
    const size_t most = s->args->results << 20;
    size_t waiting = 0;
    Ticket **end = &s->first;
    Reply r = {0, NULL};
    for (; *end; end = &(*end)->next)
        if (!ticket_is_over(*end)) waiting += (*end)->bytes;
    if (s->ending)
        r = reply_error(503, NULL, "the server is ending");
    else if (queued(s) >= s->args->queue)
        r = reply_error(429, NULL, "%zu jobs wait already; again in a while", queued(s));
    else if (waiting + ticket->bytes > most)
        r = reply_error(429, NULL, "the results of the jobs that wait leave no room for this one's; again in a while");
    if (r.response) {
        if (r.status == 429) reply_header(&r, "Retry-After", "5");
        return r;
    }
    *end = ticket;
    make_room(s);
    tell_places(s);
    pthread_cond_broadcast(&s->changed);
    return r;
}

/* ---- The worker: one job at a time, in the order in which they came ---- */

static void *work(void *context) {
    Server *s = context;
    pthread_mutex_lock(&s->lock);
    for (;;) {
        Ticket *t = s->first;
        while (t && t->state != TICKET_QUEUED) t = t->next;
        if (!t && s->ending) break;
        if (!t) {
            pthread_cond_wait(&s->changed, &s->lock);
            continue;
        }
        s->running = t;
        t->holders++; /* the list may forget it as soon as it is over */
        ticket_start(t);
        tell_places(s);
        pthread_mutex_unlock(&s->lock);
        if (s->last && s->last != t->job.served) model_unload(library_model(s->last->library));
        s->last = t->job.served;
        ticket_run(t);
        ticket_release(t);
        pthread_mutex_lock(&s->lock);
        s->running = NULL;
        make_room(s);
        tell_places(s);
    }
    s->is_ended = 1;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

/* ---- Calls ---- */

static Reply get_health(void *context, const Request *r) {
    Server *s = context;
    char text[128], gpu[CUDA_TEXT_BYTES] = "cpu";
    size_t available, total;
    cJSON *x = cJSON_CreateObject();
    (void)r;
    if (s->cuda && cuda_find(gpu, &available, &total) != OK) snprintf(gpu, sizeof gpu, "cuda");
    snprintf(text, sizeof text, "%s, %s", weight_name(s->weights), s->cuda ? "GPU" : vector_instructions());
    cJSON_AddStringToObject(x, "version", version_commit_text());
    cJSON_AddStringToObject(x, "device", gpu);
    cJSON_AddStringToObject(x, "arithmetic", text);
    cJSON_AddNumberToObject(x, "threads", threads_get());
    pthread_mutex_lock(&s->lock);
    cJSON_AddNumberToObject(x, "running", s->running != NULL);
    cJSON_AddNumberToObject(x, "queued", (double)queued(s));
    pthread_mutex_unlock(&s->lock);
    cJSON_AddNumberToObject(x, "most", (double)s->args->most);
    return reply_json(200, x);
}

static Reply get_models(void *context, const Request *r) {
    const Server *s = context;
    cJSON *x = cJSON_CreateObject(), *list = cJSON_AddArrayToObject(x, "models");
    (void)r;
    for (size_t i = 0; i < s->offer.models; i++) cJSON_AddItemToArray(list, served_json(&s->offer.model[i]));
    return reply_json(200, x);
}

static Reply post_sign_in(void *context, const Request *r) {
    return gate_sign_in(&((Server *)context)->gate, r);
}

/* A job that was read goes into the queue. */
static Reply admit(Server *s, Job *job) {
    Ticket *t;
    char location[64];
    const size_t most = s->args->results;
    if (ticket_results(job) > most << 20)
        return reply_error(413, "count", "the results may take more than the %zu MiB that are kept (./serve --results)",
                           most);
    if (ticket_bytes(job) > most << 20) /* not even alone */
        return reply_error(413, job->image ? "image" : "count",
                           "the results and the pictures that came may take more than the %zu MiB that are kept "
                           "(./serve --results)",
                           most);
    if (ticket_new(&t, job, &s->offer) != OK) return reply_error(500, NULL, "%s", err_text());
    cJSON *x = cJSON_CreateObject();
    cJSON_AddStringToObject(x, "id", t->id);
    snprintf(location, sizeof location, "jobs/%s", t->id);
    pthread_mutex_lock(&s->lock);
    t->told_place = NONE;
    Reply r = enqueue(s, t);
    if (!r.response) cJSON_AddNumberToObject(x, "place", (double)place_of(s, t));
    pthread_mutex_unlock(&s->lock);
    if (r.response) {
        ticket_release(t);
        cJSON_Delete(x);
        return r;
    }
    r = reply_json(202, x);
    reply_header(&r, "Location", location);
    return r;
}

static Reply post_job(void *context, const Request *r) {
    Server *s = context;
    Fault f;
    Job job = {0};
    if (s->ending) return reply_error(503, NULL, "the server is ending");
    const int ok = job_of_request(&job, &s->offer, r, &f);
    Reply reply = ok ? admit(s, &job) : fault_reply(&f);
    job_free(&job);
    return reply;
}

/* The ticket of the request's id, held; NULL: why. */
static Ticket *find(Server *s, const Request *r, Reply *why) {
    const char *id = r->part[0];
    pthread_mutex_lock(&s->lock);
    Ticket *t = s->first;
    while (t && strcmp(t->id, id) != 0) t = t->next;
    if (t) t->holders++;
    const int forgotten = !t && is_forgotten(s, id);
    pthread_mutex_unlock(&s->lock);
    if (!t)
        *why = forgotten ? reply_error(410, NULL, "this job is forgotten")
                         : reply_error(404, NULL, "there is no such job");
    return t;
}

static Reply get_job(void *context, const Request *r) {
    Server *s = context;
    Reply reply;
    Ticket *t = find(s, r, &reply);
    if (!t) return reply;
    pthread_mutex_lock(&s->lock);
    const size_t place = place_of(s, t);
    pthread_mutex_unlock(&s->lock);
    reply = reply_json(200, ticket_json(t, place));
    ticket_release(t);
    return reply;
}

static Reply get_events(void *context, const Request *r) {
    Reply reply;
    Ticket *t = find(context, r, &reply);
    if (!t) return reply;
    reply = events_reply(t->events, r);
    ticket_release(t);
    return reply;
}

/* K.png, K.png?scale=S, K.json */
static Reply get_file(void *context, const Request *r) {
    Reply reply;
    Ticket *t = find(context, r, &reply);
    if (!t) return reply;
    reply = ticket_file(t, r);
    ticket_release(t);
    return reply;
}

static Reply delete_job(void *context, const Request *r) {
    Server *s = context;
    Reply reply;
    Ticket *t = find(s, r, &reply);
    if (!t) return reply;
    pthread_mutex_lock(&s->lock);
    if (!ticket_is_over(t))
        cancel(s, t);
    else if (!is_forgotten(s, t->id))
        forget(s, t);
    pthread_mutex_unlock(&s->lock);
    ticket_release(t);
    return reply_empty(204);
}

static Reply post_settings(void *context, const Request *r) {
    Server *s = context;
    Fault f;
    Job job = {0};
    Config text = {0};
    if (s->ending) return reply_error(503, NULL, "the server is ending");
    const Err e = png_read_texts(&text, r->body, r->size);
    Reply reply = e != OK ? reply_error(415, NULL, "the body: %s: expected a PNG of ours", err_text())
                  : job_of_text(&job, &s->offer, &text, &f) ? reply_json(200, job_json(&job))
                                                            : fault_reply(&f);
    job_free(&job);
    config_free(&text);
    return reply;
}

static const Route routes[] = {
    {"GET", "", page_index, 0},
    {"GET", "page.css", page_css, 1},
    {"GET", "page.js", page_js, 1},
    {"POST", "sign-in", post_sign_in, 1},
    {"GET", "api/health", get_health, 0},
    {"GET", "api/models", get_models, 0},
    {"POST", "api/jobs", post_job, 0},
    {"GET", "api/jobs/?", get_job, 0},
    {"DELETE", "api/jobs/?", delete_job, 0},
    {"GET", "api/jobs/?/events", get_events, 0},
    {"GET", "api/jobs/?/?", get_file, 0},
    {"POST", "api/settings", post_settings, 0},
};

/* ---- The beginning ---- */

/* Owned jobs to which nobody has listened for a while */
static void cancel_deserted(Server *s) {
    pthread_mutex_lock(&s->lock);
    for (Ticket *t = s->first; t; t = t->next)
        if (t->job.owned && !ticket_is_over(t) && events_alone(t->events) > OWNED_SECONDS) cancel(s, t);
    pthread_mutex_unlock(&s->lock);
}

/* What waits is cancelled; what runs may finish within a few seconds. */
static void end(Server *s) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += (time_t)ENDING_SECONDS;
    pthread_mutex_lock(&s->lock);
    s->ending = 1;
    for (Ticket *t = s->first; t; t = t->next)
        if (t->state == TICKET_QUEUED) cancel(s, t);
    pthread_cond_broadcast(&s->changed);
    while (!s->is_ended && pthread_cond_timedwait(&s->changed, &s->lock, &until) == 0) {
    }
    if (s->running) s->running->cancel = 1;
    while (!s->is_ended) pthread_cond_wait(&s->changed, &s->lock);
    pthread_mutex_unlock(&s->lock);
}

static void serve(ServeArgs *a) {
    Server s = {.args = a};
    char *token = NULL;
    Http *http;
    pthread_t worker;
    int fd, loopback;
    unsigned port = (unsigned)a->port;
    for (size_t i = 0; i < a->origins.n; i++)
        if (!origin_is_whole(a->origins.item[i]))
            usage_error("--origin %s: expected http://HOST, https://HOST or one with :PORT", a->origins.item[i]);
    if (a->token && a->token_file) usage_error("--token and --token-file: expected one of them");
    if (a->token_file) check(token_read(&token, a->token_file));
    if (token) a->token = token;
    signals_hold();
    mem_give_back();
    threads_set((int)a->threads);
    s.cuda = check_device(a->device);
    if (!s.cuda) say_cpu();
    if (weight_format(&s.weights, a->weights, s.cuda, "--weights") != OK) usage_error("%s", err_text());
    if (offer_open(&s.offer, &a->models, s.weights, s.cuda) != OK)
        s.offer.twice ? usage_error("%s", err_text()) : die("%s", err_text());
    check(http_listen(&fd, &port, &loopback, a->host));
    if (!loopback && !a->token)
        usage_error("--host %s: others can reach this machine there; give a --token that they must know", a->host);
    s.gate = (Gate){a->token, a->origins.item, a->origins.n, port};
    const HttpConfig c = {s.gate, routes, sizeof routes / sizeof *routes, &s};
    pthread_mutex_init(&s.lock, NULL);
    pthread_cond_init(&s.changed, NULL);
    s.offer.most = a->most, s.offer.device = a->device, s.offer.weights = a->weights;
    check(mem_alloc(&s.forgotten, FORGOTTEN, sizeof *s.forgotten, "ids"));
    if (thread_start(&worker, 0, work, &s) != 0) die("the worker cannot be started");
    check(http_start(&http, fd, &c));
    printf("http://%s%s%s:%u/\n", strchr(a->host, ':') ? "[" : "", a->host, strchr(a->host, ':') ? "]" : "", port);
    if (fflush(stdout)) die("standard output could not be written");
    while (!signal_within(1)) cancel_deserted(&s);
    end(&s);
    pthread_join(worker, NULL);
    http_stop(http);
    while (s.first) forget(&s, s.first);
    free(s.forgotten);
    offer_close(&s.offer);
    free(token);
}

static const char intro[] =
    "usage: ./serve [MODEL ...] [options]\n\n"
    "Shows a page on which pictures are drawn and edited, and answers HTTP calls (doc/api.md). One picture job is\n"
    "computed at a time, the others wait. Only this machine can call, unless --host says otherwise.\n";

int main(int argc, char **argv) {
    enum { MODELS = 64, ORIGINS = 16 };
    static const char *models[MODELS], *origins[ORIGINS];
    ServeArgs a = {{models, 0, MODELS}, {origins, 0, ORIGINS}, .host = "127.0.0.1", .port = 8080, .queue = 64,
                   .most = 64,          .results = 256};
    const Option table[] = {
        {OPT_HEADING, "Arguments", NULL, NULL, 0, 0, NULL},
        {OPT_ARGUMENTS, "MODEL ...", NULL, &a.models, 0, 0,
         "names that ./sample --list shows, or folders with weights such as\nruns/emoji (default: all named ones that "
         "are "
         "here)"},
        {OPT_HEADING, "Options", NULL, NULL, 0, 0, NULL},
        {OPT_SIZE, "--port", "N", &a.port, 0, 65535,
         "where it listens (default 8080; 0: one that is free, which is told)"},
        {OPT_STRING, "--host", "ADDRESS", &a.host, 0, 0,
         "which address it listens at (default 127.0.0.1; another than this\nmachine's own needs a token)"},
        {OPT_STRING, "--token", "T", &a.token, 0, 0, "callers must know it; the page asks for it"},
        {OPT_STRING, "--token-file", "FILE", &a.token_file, 0, 0,
         "the same from a file, unseen by others on this machine"},
        {OPT_STRINGS, "--origin", "URL", &a.origins, 0, 0,
         "https://example.org: pages from there may call too (may be given\nseveral times)"},
        {OPT_SIZE, "--queue", "N", &a.queue, 1, 4096, "jobs that wait at most (default 64)"},
        {OPT_SIZE, "--count-limit", "N", &a.most, 1, 4096, "pictures of a job at most (default 64)"},
        {OPT_SIZE, "--results", "MIB", &a.results, 1, 1 << 20,
         "memory for pictures; the oldest are forgotten (default 256)"},
        {OPT_SIZE, "--threads", "N", &a.threads, 0, 4096, "that compute; 0 (default): all"},
        {OPT_STRING, "--device", "cpu|cuda", &a.device, 0, 0, "where everything runs (default: a GPU if there is one)"},
        {OPT_STRING, "--weights", "TYPE", &a.weights, 0, 0,
         "the transformers' matrices as f32 (default), bf16 or int8: faster, less exact, and\n"
         "products of both networks are of bf16 then. bf16x3: three products of bf16 for one,\n"
         "within 3e-5 of f32, faster than f32 with AMX"},
        {OPT_END, NULL, NULL, NULL, 0, 0, NULL}};
    options_parse(argc, argv, table, intro);
    serve(&a);
    return 0;
}
