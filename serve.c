/* serve.c - a page to draw on, and the HTTP interface behind it (doc/api.md).
 *
 *     main     options, models, a socket          serve(): everything in order
 *     calls    a request -> a reply               the table of routes; each runs on its connection's thread
 *
 * Safe by default: only this machine can call, no request reads or writes a file. Read next: serving/http.c, how a
 * request comes; serving/gate.c, who may send one. */
#include "serving/serving.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char VERSION[] = "0.1";

typedef struct {
    OptionList models, origins;
    const char *host, *token, *token_file, *device, *weights;
    size_t port, queue, threads, most, results; /* most: pictures of a job; results: MiB */
} ServeArgs;

typedef struct {
    const ServeArgs *args;
    Served *model;
    size_t models;
    int cuda;
    WeightFormat weights;
    Gate gate;
} Server;

/* ---- Calls ---- */

static Reply get_health(void *context, const Request *r) {
    const Server *s = context;
    static const char *const formats[] = {"f32", "bf16", "int8"};
    char text[128], gpu[CUDA_TEXT_BYTES] = "cpu";
    cJSON *x = cJSON_CreateObject();
    (void)r;
    if (s->cuda && cuda_find(gpu, NULL, NULL) != OK) snprintf(gpu, sizeof gpu, "cuda");
    snprintf(text, sizeof text, "%s, %s", formats[s->weights], s->cuda ? "GPU" : vector_instructions());
    cJSON_AddStringToObject(x, "version", VERSION);
    cJSON_AddStringToObject(x, "device", gpu);
    cJSON_AddStringToObject(x, "arithmetic", text);
    cJSON_AddNumberToObject(x, "threads", threads_get());
    cJSON_AddNumberToObject(x, "running", 0);
    cJSON_AddNumberToObject(x, "queued", 0);
    cJSON_AddNumberToObject(x, "most", (double)s->args->most);
    return reply_json(200, x);
}

static Reply get_models(void *context, const Request *r) {
    const Server *s = context;
    cJSON *x = cJSON_CreateObject(), *list = cJSON_AddArrayToObject(x, "models");
    (void)r;
    for (size_t i = 0; i < s->models; i++) cJSON_AddItemToArray(list, served_json(&s->model[i]));
    return reply_json(200, x);
}

static Reply post_sign_in(void *context, const Request *r) {
    return gate_sign_in(&((Server *)context)->gate, r);
}

static Reply post_settings(void *context, const Request *r) {
    (void)context, (void)r;
    return reply_error(415, NULL, "not yet");
}

static const Route routes[] = {
    {"GET", "", page_index, 0},
    {"GET", "page.css", page_css, 1},
    {"GET", "page.js", page_js, 1},
    {"POST", "sign-in", post_sign_in, 1},
    {"POST", "api/settings", post_settings, 0},
    {"GET", "api/health", get_health, 0},
    {"GET", "api/models", get_models, 0},
};

/* ---- The beginning ---- */

/* Those that were named; else all that there are, those that are not here as such. */
static void open_models(Server *s) {
    const OptionList *given = &s->args->models;
    size_t n, missing_files;
    const NamedModel *named = named_models(&n);
    check(mem_alloc(&s->model, given->n ? given->n : n, sizeof *s->model, "models"));
    for (size_t i = 0; i < given->n; i++, s->models++) {
        check(served_open(&s->model[i], given->item[i], s->weights, s->cuda));
        for (size_t k = 0; k < i; k++)
            if (!strcmp(s->model[k].name, s->model[i].name) ||
                !strcmp(s->model[k].model.folder, s->model[i].model.folder))
                usage_error("%s and %s: a model of this name twice", given->item[k], given->item[i]);
    }
    for (size_t i = 0; i < n && !given->n; i++, s->models++) {
        char missing[32];
        missing_files = model_files(missing, &named[i]);
        if (!*missing && served_open(&s->model[i], named[i].name, s->weights, s->cuda) == OK) continue;
        if (!*missing || missing_files)
            fprintf(stderr, "%s is left out: %s\n", named[i].name, *missing ? missing : err_text());
        served_absent(&s->model[i], &named[i]);
    }
    if (!s->model[0].here) die("the bundled model is missing; ./serve FOLDER serves another");
}

/* The token in a file, but for one line end. */
static void read_token(ServeArgs *a) {
    char *text;
    if (!a->token_file) return;
    if (a->token) die("--token and --token-file: expected one of them");
    if (file_text(&text, a->token_file, 4096) != OK) die("--token-file: %s", err_text());
    size_t n = strlen(text);
    if (n && text[n - 1] == '\n') n--;
    if (n && text[n] == '\n' && text[n - 1] == '\r') n--;
    text[n] = 0;
    if (!n) die("--token-file %s: the token is empty", a->token_file);
    a->token = text;
}

static WeightFormat weight_format(const char *name) {
    static const char *const formats[] = {"f32", "bf16", "int8"};
    for (int i = 0; i < 3; i++)
        if (!name || !strcmp(name, formats[i])) return (WeightFormat)i;
    usage_error("--weights %s: expected f32, bf16 or int8", name);
    return WEIGHTS_REAL;
}

static void wait_for_end(void) {
    sigset_t signals;
    int number;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    sigwait(&signals, &number);
}

/* Signals come to the thread that waits for them, no other. */
static void hold_signals(void) {
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    signal(SIGPIPE, SIG_IGN);
}

static void serve(ServeArgs *a) {
    Server s = {.args = a, .weights = weight_format(a->weights)};
    Http *http;
    int fd, loopback;
    unsigned port = (unsigned)a->port;
    for (size_t i = 0; i < a->origins.n; i++)
        if (!origin_is_whole(a->origins.item[i]))
            usage_error("--origin %s: expected http://HOST, https://HOST or one with :PORT", a->origins.item[i]);
    read_token(a);
    hold_signals();
    threads_set((int)a->threads);
    s.cuda = check_device(a->device);
    if (s.cuda && s.weights == WEIGHTS_INT8) usage_error("--weights int8 is for --device cpu; on a GPU f32 or bf16");
    open_models(&s);
    check(http_listen(&fd, &port, &loopback, a->host));
    if (!loopback && !a->token)
        die("--host %s: others can reach this machine there; give a --token that they must know", a->host);
    s.gate = (Gate){a->token, a->origins.item, a->origins.n, port};
    const HttpConfig c = {s.gate, routes, sizeof routes / sizeof *routes, &s};
    check(http_start(&http, fd, &c));
    printf("http://%s%s%s:%u/\n", strchr(a->host, ':') ? "[" : "", a->host, strchr(a->host, ':') ? "]" : "", port);
    if (fflush(stdout)) die("standard output could not be written");
    wait_for_end();
    http_stop(http);
    for (size_t i = 0; i < s.models; i++)
        if (s.model[i].here) model_close(&s.model[i].model);
    free(s.model);
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
         "the transformers' matrices as f32 (default), bf16 or int8: faster,\nless exact"},
        {OPT_END, NULL, NULL, NULL, 0, 0, NULL}};
    options_parse(argc, argv, table, intro);
    serve(&a);
    return 0;
}
