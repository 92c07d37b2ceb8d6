/* http.c - requests and replies over libmicrohttpd, a thread for each connection.
 *
 * The library parses HTTP. It is lenient in ways by which a proxy in front and this server could disagree where a
 * request ends, and what it asks for: Transfer-Encoding beside Content-Length, "Transfer-Encoding :", a header twice,
 * %00 in an address. Such requests are refused here, and their connection is closed. The order of all refusals: broken
 * requests, then those that may not call (gate.c), then what there is not, then what is wrong with the body.
 *
 * Nobody holds others up. A head that does not come, a body that stops, a connection that idles are closed by a thread
 * that looks every half second; what all bodies take together is limited. The body of a refused request is read and
 * dropped, so that the client, who may still be sending, gets its answer. */
#include "serving/serving.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <microhttpd.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    CONNECTIONS = 1024,
    DROPPED_BYTES = 128 << 20, /* of a refused body that are still read */
    BODIES_BYTES = 256 << 20   /* of all bodies at a time */
};
static const double HEAD_SECONDS = 10, BODY_STEP_SECONDS = 30, BODY_SECONDS = 600, IDLE_SECONDS = 60;

typedef enum { IDLE, HEAD, BODY, REPLY } Phase;

/* A connection as the watching thread sees it. */
typedef struct Wire {
    int fd;
    Phase phase;
    double since, stepped;     /* the phase began; the body's last byte came */
    struct Exchange *exchange; /* that is under way, or NULL */
    struct Wire *next, *before;
} Wire;

struct Http {
    HttpConfig config;
    struct MHD_Daemon *daemon;
    pthread_mutex_t lock;
    Wire wires;    /* a ring */
    size_t bodies; /* bytes of all that are being received */
    pthread_t watcher;
    _Atomic int stopping;
};

/* A request and what has come of it. */
typedef struct Exchange {
    Request request;
    Wire *wire;
    const Route *route;
    int begun, is_broken; /* is_broken: its end is in doubt */
    Reply refusal;        /* once response is set */
    uint8_t *body;
    size_t room, dropped;
    char target[1024]; /* as it came */
    const char *sent_target;
} Exchange;

/* ---- Where a request ends, and what it asks for ------------------------------------------------------------ */

typedef struct {
    int hosts, lengths, encodings, origins, is_broken;
    const char *encoding;
    const char *line_end; /* of the head's last line that was looked at, in the library's buffer */
} Framing;

/* Is the library that runs 0.9.77 or later? */
static int is_strict(void) {
    unsigned major = 0, minor = 0, patch = 0;
    sscanf(MHD_get_version(), "%u.%u.%u", &major, &minor, &patch);
    return (major * 1000 + minor) * 1000 + patch >= 9077;
}

/* Are two parts of the head so many bytes apart? The library, before 0.9.77, reads it in place and leaves zeros between its
 * parts. It takes a lone LF for a line's end too, cuts text at a zero, joins a line that begins with a blank to the one
 * before, which then lies elsewhere, and takes a line that begins with a zero or a colon for the empty one. Later ones are
 * strict themselves. */
static int is_next(const char *end, const char *next, size_t between) {
    return (uintptr_t)next - (uintptr_t)end == between || is_strict();
}

/* Letters of a method and of a header's name */
static const char name_letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'*+-.^_`|~";

static enum MHD_Result look_at_header(void *context, enum MHD_ValueKind kind, const char *key, size_t key_size,
                                      const char *value, size_t value_size) {
    Framing *f = context;
    (void)kind;
    f->is_broken |= !key_size || strspn(key, name_letters) != key_size || (value && strcspn(value, "\r") != value_size);
    f->is_broken |= !is_next(f->line_end, key, 2);
    f->line_end = value ? value + strlen(value) : key + key_size;
    f->hosts += !strcasecmp(key, "Host");
    f->origins += !strcasecmp(key, "Origin");
    if (!strcasecmp(key, "Transfer-Encoding")) f->encodings++, f->encoding = value ? value : "";
    if (!strcasecmp(key, "Content-Length")) {
        f->lengths++;
        f->is_broken |= !value_size || strspn(value, "0123456789") != value_size;
    }
    return MHD_YES;
}

static int is_target(const char *target) {
    for (const char *p = target; *p; p++)
        if ((unsigned char)*p <= ' ' || *p == 0x7f) return 0;
    return *target == '/' && !strstr(target, "%00");
}

/* Where the request ends, and for whom it is, could be read in two ways: why, else NULL. */
static const char *framing_fault(const Framing *f, const char *target, const char *version) {
    if (f->is_broken) return "a method or a header that is none";
    if (!is_target(target)) return "address: one that begins with / expected, without %00 and control characters";
    if (f->hosts != 1) return "Host: expected once";
    if (f->lengths > 1) return "Content-Length: expected once";
    if (f->encodings && f->lengths) return "Transfer-Encoding and Content-Length: expected one of them";
    if (f->encodings && (f->encodings > 1 || strcasecmp(f->encoding, "chunked") != 0))
        return "Transfer-Encoding: chunked expected, once";
    if (f->encodings && strcmp(version, "HTTP/1.1") != 0) return "Transfer-Encoding: not in HTTP/1.0";
    return NULL;
}

static int hex_value(char c) {
    const char *const digits = "0123456789abcdef", *at = c ? strchr(digits, c | (c >= 'A' ? 32 : 0)) : NULL;
    return at ? (int)(at - digits) : -1;
}

/* path = the address without its / in front and its query behind, decoded; 0: it is none. */
static int read_path(char path[256], const char *target) {
    size_t to = 0;
    for (const char *p = target + 1; *p && *p != '?'; p++) {
        int c = (unsigned char)*p;
        if (c == '%') {
            const int high = hex_value(p[1]), low = high < 0 ? -1 : hex_value(p[2]);
            if (low < 0) return 0;
            c = high << 4 | low;
            p += 2;
        }
        if (to == 255 || c < 0x20) return 0;
        path[to++] = (char)c;
    }
    path[to] = 0;
    return 1;
}

/* Does the path have the route's form? part[] = what stands for its ?s */
static int path_fits(const char *form, const char *path, char part[2][128]) {
    size_t parts = 0;
    for (; *form; form++) {
        if (*form != '?') {
            if (*form != *path++) return 0;
            continue;
        }
        const size_t n = strcspn(path, "/");
        if (!n || n >= 128) return 0;
        memcpy(part[parts], path, n);
        part[parts++][n] = 0;
        path += n;
    }
    return !*path;
}

/* The route, or none: then *allow says what there is instead, "" nothing. */
static const Route *find_route(const Http *h, Request *r, const char *method, char allow[64]) {
    const char *const wanted = !strcmp(method, "HEAD") ? "GET" : method;
    *allow = 0;
    for (size_t i = 0; i < h->config.routes; i++) {
        const Route *route = &h->config.route[i];
        if (!path_fits(route->path, r->path, r->part)) continue;
        if (!strcmp(route->method, wanted)) return route;
        const size_t n = strlen(allow);
        if (!strstr(allow, route->method))
            snprintf(allow + n, 64 - n, "%s%s%s", n ? ", " : "", route->method,
                     strcmp(route->method, "GET") ? "" : ", HEAD");
    }
    return NULL;
}

/* ---- A request, from its head to its reply ------------------------------------------------------------------ */

static void set_phase(Http *h, Wire *w, Phase phase) {
    if (!w) return;
    pthread_mutex_lock(&h->lock);
    if (w->phase != phase) w->since = w->stepped = seconds();
    w->phase = phase;
    pthread_mutex_unlock(&h->lock);
}

static Reply allow_reply(const char *allow) {
    Reply r = reply_error(405, NULL, "method: %s expected", allow);
    reply_header(&r, "Allow", allow);
    return r;
}

/* What forbids the request before its body is there; response NULL: nothing. */
static Reply refuse(const Http *h, Exchange *x, const char *method, const char *version) {
    Request *r = &x->request;
    Framing f = {.line_end = version + strlen(version)};
    char allow[64];
    const char *why;
    MHD_get_connection_values_n(r->connection, MHD_HEADER_KIND, look_at_header, &f);
    const union MHD_ConnectionInfo *head =
        MHD_get_connection_info(r->connection, MHD_CONNECTION_INFO_REQUEST_HEADER_SIZE);
    if (head) f.is_broken |= !is_next(f.line_end, method + head->header_size, 4);
    f.is_broken |= strspn(method, name_letters) != strlen(method);
    f.is_broken |= !is_next(method + strlen(method), x->sent_target, 1) ||
                   !is_next(x->sent_target + strlen(x->target), version, 1);
    why = framing_fault(&f, x->target, version);
    x->is_broken = why || !read_path(r->path, x->target);
    if (x->is_broken) return reply_error(400, NULL, "%s", why ? why : "address: not well-formed, or too long");
    if (f.origins > 1) return reply_error(403, NULL, "Origin: expected once");
    x->route = find_route(h, r, method, allow);
    const unsigned status = gate_check(&h->config.gate, r, !x->route || !x->route->open, &why);
    if (status == 401 && x->route && !*r->path) return gate_form();
    if (status) {
        Reply refusal = reply_error(status, NULL, "%s", why);
        if (status == 401) reply_header(&refusal, "WWW-Authenticate", "Bearer");
        return refusal;
    }
    if (!x->route && *allow) return allow_reply(allow);
    if (!x->route) return reply_error(404, NULL, "there is nothing at this address");
    if (request_header(r, "Content-Encoding")) return reply_error(415, NULL, "Content-Encoding: none expected");
    const char *length = request_header(r, "Content-Length");
    if (length && strtoull(length, NULL, 10) > BODY_BYTES)
        return reply_error(413, NULL, "the body has %.20s bytes, at most %d expected", length, BODY_BYTES);
    return (Reply){0, NULL};
}

static enum MHD_Result send_reply(Exchange *x, Reply r) {
    const char *path = x->request.path;
    if (!r.response) r = reply_static(500, "application/json", "{\"error\":\"no memory\"}", 21);
    if (!r.response) return MHD_NO;
    if (!strncmp(path, "api/", 4)) {
        reply_header(&r, "Cache-Control", "no-store");
        reply_header(&r, "Cross-Origin-Resource-Policy", "same-origin");
    }
    if (!*path)
        reply_header(&r, "Content-Security-Policy",
                     "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; base-uri 'none'; "
                     "form-action 'self'");
    if (x->is_broken) reply_header(&r, "Connection", "close");
    const enum MHD_Result result = MHD_queue_response(x->request.connection, r.status, r.response);
    MHD_destroy_response(r.response);
    x->refusal.response = NULL;
    return result;
}

/* The head is there. A refused request's body is dropped as it comes, unless the client waits for leave to send it, its
 * end is in doubt, or it is too long even for that. */
static enum MHD_Result begin(Http *h, Exchange *x, const char *method, const char *version) {
    Request *r = &x->request;
    x->begun = 1;
    set_phase(h, x->wire, BODY);
    x->refusal = refuse(h, x, method, version);
    const char *type = request_header(r, "Content-Type"), *length = request_header(r, "Content-Length");
    r->type = type ? type : "";
    if (!x->refusal.response && x->refusal.status) return send_reply(x, x->refusal);
    if (!x->refusal.response) return MHD_YES;
    const int is_long = length && strtoull(length, NULL, 10) > DROPPED_BYTES;
    return x->is_broken || is_long || request_header(r, "Expect") ? send_reply(x, x->refusal) : MHD_YES;
}

/* Room for `more` bytes and a zero behind them, within what all bodies may take. */
static int body_grow(Http *h, Exchange *x, size_t more) {
    if (x->request.size + more < x->room) return 1;
    const size_t room = max_size(x->request.size + more + 1, min_size(2 * x->room, BODY_BYTES + 1));
    pthread_mutex_lock(&h->lock);
    const int fits = h->bodies + room - x->room <= BODIES_BYTES;
    if (fits) h->bodies += room - x->room;
    pthread_mutex_unlock(&h->lock);
    uint8_t *body = fits ? realloc(x->body, room) : NULL;
    if (body) {
        x->body = body;
        x->room = room;
    } else if (fits) {
        pthread_mutex_lock(&h->lock);
        h->bodies -= room - x->room;
        pthread_mutex_unlock(&h->lock);
    }
    return body != NULL;
}

static enum MHD_Result take_body(Http *h, Exchange *x, const char *data, size_t *size) {
    Request *r = &x->request;
    if (x->wire) {
        pthread_mutex_lock(&h->lock);
        x->wire->stepped = seconds();
        pthread_mutex_unlock(&h->lock);
    }
    if (!x->refusal.response && r->size + *size > BODY_BYTES)
        x->refusal = reply_error(413, NULL, "the body has more than the %d bytes that are expected", BODY_BYTES);
    if (!x->refusal.response && !body_grow(h, x, *size)) {
        x->refusal = reply_error(503, NULL, "too many bodies are being received; again in a moment");
        reply_header(&x->refusal, "Retry-After", "5");
    }
    if (x->refusal.response) {
        x->dropped += *size;
        *size = 0;
        return x->dropped > DROPPED_BYTES ? MHD_NO : MHD_YES;
    }
    memcpy(x->body + r->size, data, *size);
    r->size += *size;
    x->body[r->size] = 0;
    *size = 0;
    return MHD_YES;
}

static enum MHD_Result on_request(void *context, struct MHD_Connection *connection, const char *url, const char *method,
                                  const char *version, const char *data, size_t *size, void **own) {
    Http *h = context;
    Exchange *x = *own;
    (void)url;
    if (!x) return MHD_NO;
    x->request.connection = connection;
    if (!x->begun) return begin(h, x, method, version);
    if (*size) return take_body(h, x, data, size);
    set_phase(h, x->wire, REPLY);
    if (x->refusal.response) return send_reply(x, x->refusal);
    x->request.body = x->body ? x->body : (const uint8_t *)"";
    x->request.fd = x->wire ? x->wire->fd : -1;
    return send_reply(x, x->route->call(h->config.context, &x->request));
}

static void exchange_end(Http *h, Exchange *x) {
    pthread_mutex_lock(&h->lock);
    h->bodies -= x->room;
    pthread_mutex_unlock(&h->lock);
    if (x->refusal.response) MHD_destroy_response(x->refusal.response);
    if (x->wire) x->wire->exchange = NULL;
    free(x->body);
    free(x);
}

/* The request's line is there. Of some heads that it cannot read the library does not say that they are over. */
static void *on_line(void *context, const char *target, struct MHD_Connection *connection) {
    Http *h = context;
    Exchange *x = calloc(1, sizeof *x);
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    if (!x) return NULL;
    x->wire = info ? info->socket_context : NULL;
    if (x->wire && x->wire->exchange) exchange_end(h, x->wire->exchange);
    if (x->wire) x->wire->exchange = x;
    snprintf(x->target, sizeof x->target, "%s", strlen(target) < sizeof x->target ? target : "/%"); /* "%": refused */
    x->sent_target = target;
    set_phase(h, x->wire, HEAD);
    return x;
}

static void on_end(void *context, struct MHD_Connection *connection, void **own, enum MHD_RequestTerminationCode code) {
    Http *h = context;
    Exchange *x = *own;
    (void)connection, (void)code;
    if (!x) return;
    *own = NULL;
    set_phase(h, x->wire, IDLE);
    exchange_end(h, x);
}

/* Addresses are decoded here, not by the library, which would end them at %00. */
static size_t leave_escaped(void *context, struct MHD_Connection *connection, char *text) {
    (void)context, (void)connection;
    return strlen(text);
}

/* ---- Connections -------------------------------------------------------------------------------------------- */

static void on_connection(void *context, struct MHD_Connection *connection, void **own,
                          enum MHD_ConnectionNotificationCode code) {
    Http *h = context;
    if (code == MHD_CONNECTION_NOTIFY_STARTED) {
        const union MHD_ConnectionInfo *info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD);
        Wire *w = calloc(1, sizeof *w);
        *own = w;
        if (!w || !info) return;
        w->fd = info->connect_fd;
        w->phase = HEAD;
        w->since = seconds();
        pthread_mutex_lock(&h->lock);
        w->next = h->wires.next, w->before = &h->wires;
        w->next->before = w->before->next = w;
        pthread_mutex_unlock(&h->lock);
        return;
    }
    Wire *w = *own;
    if (!w) return;
    if (w->exchange) exchange_end(h, w->exchange);
    pthread_mutex_lock(&h->lock); /* the watcher must not close what by then is another's */
    if (w->next) w->next->before = w->before, w->before->next = w->next;
    pthread_mutex_unlock(&h->lock);
    free(w);
}

/* Have bytes come since it began to idle? Then the next head has begun. */
static int is_heard(const Wire *w, double now) {
#ifdef TCP_INFO
    struct tcp_info info = {0};
    socklen_t n = sizeof info;
    if (getsockopt(w->fd, IPPROTO_TCP, TCP_INFO, &info, &n) == 0)
        return (double)info.tcpi_last_data_recv < 1000 * (now - w->since) - 100;
#endif
    (void)w, (void)now;
    return 0;
}

static int is_late(Wire *w, double now) {
    if (w->phase == IDLE && is_heard(w, now)) w->phase = HEAD, w->since = now;
    if (w->phase == IDLE) return now - w->since > IDLE_SECONDS;
    if (w->phase == HEAD) return now - w->since > HEAD_SECONDS;
    return w->phase == BODY && (now - w->stepped > BODY_STEP_SECONDS || now - w->since > BODY_SECONDS);
}

static void *watch(void *context) {
    Http *h = context;
    while (!h->stopping) {
        const double now = seconds();
        pthread_mutex_lock(&h->lock);
        for (Wire *w = h->wires.next; w != &h->wires; w = w->next)
            if (is_late(w, now)) shutdown(w->fd, SHUT_RDWR);
        pthread_mutex_unlock(&h->lock);
        usleep(250000);
    }
    return NULL;
}

/* ---- Beginning and end -------------------------------------------------------------------------------------- */

static int is_loopback(const struct sockaddr *a) {
    if (a->sa_family == AF_INET)
        return ntohl(((const struct sockaddr_in *)(const void *)a)->sin_addr.s_addr) >> 24 == 127;
    return a->sa_family == AF_INET6 && IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)(const void *)a)->sin6_addr);
}

Err http_listen(int *fd, unsigned *port, int *loopback, const char *host) {
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    struct addrinfo *found = NULL;
    struct sockaddr_storage got;
    socklen_t n = sizeof got;
    char service[16];
    const int yes = 1;
    snprintf(service, sizeof service, "%u", *port);
    const int trouble = getaddrinfo(host, service, &hints, &found);
    if (trouble) return err("--host %s: %s", host, gai_strerror(trouble));
    *loopback = 1;
    for (const struct addrinfo *a = found; a; a = a->ai_next) *loopback &= is_loopback(a->ai_addr);
    *fd = socket(found->ai_family, SOCK_STREAM, 0);
    int ok = *fd >= 0 && fcntl(*fd, F_SETFD, FD_CLOEXEC) == 0 &&
             setsockopt(*fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes) == 0 &&
             bind(*fd, found->ai_addr, found->ai_addrlen) == 0 && listen(*fd, 511) == 0 &&
             getsockname(*fd, (struct sockaddr *)&got, &n) == 0;
    freeaddrinfo(found);
    if (!ok) {
        err("--host %s --port %u: cannot listen there: %s", host, *port, strerror(errno));
        if (*fd >= 0) close(*fd);
        return FAILED;
    }
    *port = ntohs(got.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&got)->sin6_port
                                            : ((struct sockaddr_in *)&got)->sin_port);
    return OK;
}

/* A descriptor for each connection, beside those of models and of the program. */
static void raise_file_limit(void) {
    struct rlimit limit;
    const rlim_t wanted = CONNECTIONS + 256;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= wanted) return;
    limit.rlim_cur = limit.rlim_max == RLIM_INFINITY || limit.rlim_max > wanted ? wanted : limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

static void say_nothing(void *context, const char *fmt, va_list args) {
    (void)context, (void)fmt, (void)args;
}

Err http_start(Http **out, int fd, const HttpConfig *c) {
    Http *h = calloc(1, sizeof *h);
    if (!h) return err("no memory for the server");
    h->config = *c;
    h->wires.next = h->wires.before = &h->wires;
    pthread_mutex_init(&h->lock, NULL);
    raise_file_limit();
    h->daemon = MHD_start_daemon(
        MHD_USE_INTERNAL_POLLING_THREAD | MHD_USE_THREAD_PER_CONNECTION | MHD_USE_POLL | MHD_USE_ERROR_LOG, 0, NULL,
        NULL, on_request, h, MHD_OPTION_EXTERNAL_LOGGER, say_nothing, NULL, MHD_OPTION_LISTEN_SOCKET, fd,
        MHD_OPTION_URI_LOG_CALLBACK, on_line, h, MHD_OPTION_NOTIFY_COMPLETED, on_end, h, MHD_OPTION_NOTIFY_CONNECTION,
        on_connection, h, MHD_OPTION_UNESCAPE_CALLBACK, leave_escaped, NULL, MHD_OPTION_STRICT_FOR_CLIENT, 1,
        MHD_OPTION_CONNECTION_LIMIT, (unsigned)CONNECTIONS, MHD_OPTION_CONNECTION_TIMEOUT, 75u,
        MHD_OPTION_THREAD_STACK_SIZE, (size_t)STACK_USUAL, MHD_OPTION_END);
    const int started = h->daemon && thread_start(&h->watcher, 0, watch, h) == 0;
    *out = h;
    if (started) return OK;
    if (h->daemon) MHD_stop_daemon(h->daemon);
    free(h);
    return err("the server cannot start its threads");
}

void http_stop(Http *h) {
    h->stopping = 1;
    pthread_join(h->watcher, NULL);
    MHD_stop_daemon(h->daemon);
    pthread_mutex_destroy(&h->lock);
    free(h);
}
