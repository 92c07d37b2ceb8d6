/* fuzz_requests.c - a fuzzer of bytes upon a socket of ./serve: its whole way from libmicrohttpd through http.c, gate.c,
 * forms.c and json.c to a call. Byte 0: to a server without a token, or to one with.
 *
 * Beside it stands a strict reader of HTTP/1.1 (RFC 9112), which takes nothing in doubt. What the server calls must be, in
 * this order, requests that the strict reader finds, with the same bodies: nothing is smuggled. */
#include "fuzz.h"

#ifdef HAVE_SERVE
#include "serving/serving.h"

#include <ctype.h>
#include <errno.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { MANY = 64 };

/* ---- What was called ---- */

typedef struct {
    uint64_t method, body; /* hashes */
    size_t size;
} Called;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Called called[MANY];
static size_t calls;

static uint64_t hash(const void *bytes, size_t n) {
    uint64_t h = 14695981039346656037u;
    for (size_t i = 0; i < n; i++) h = (h ^ ((const uint8_t *)bytes)[i]) * 1099511628211u;
    return h;
}

static void note(const char *method, const Request *r) {
    MUST(r->body[r->size] == 0);
    pthread_mutex_lock(&lock);
    if (calls < MANY) called[calls] = (Called){hash(method, strlen(method)), hash(r->body, r->size), r->size};
    calls++, fuzz_accepted++;
    pthread_mutex_unlock(&lock);
}

/* ---- Calls, as serve.c has them ---- */

static Reply get_nothing(void *context, const Request *r) {
    (void)context;
    note("GET", r);
    return reply_json(200, cJSON_CreateObject());
}

static Reply post_job(void *context, const Request *r) {
    Job j = {0};
    Fault f = {0};
    (void)context;
    note("POST", r);
    const int ok = job_of_request(&j, fuzz_offer(), r, &f);
    if (!ok) MUST(f.status >= 400 && f.status < 600 && f.text[0] && !strchr(f.text, '\n'));
    Reply reply = ok ? reply_json(202, job_json(&j)) : fault_reply(&f);
    job_free(&j);
    return reply;
}

static Reply post_settings(void *context, const Request *r) {
    Job j = {0};
    Fault f = {0};
    Config text = {0};
    (void)context;
    note("POST", r);
    const Err e = png_read_texts(&text, r->body, r->size);
    Reply reply = e != OK                                    ? reply_error(415, NULL, "%s", err_text())
                  : job_of_text(&j, fuzz_offer(), &text, &f) ? reply_json(200, job_json(&j))
                                                             : fault_reply(&f);
    job_free(&j);
    config_free(&text);
    return reply;
}

static Reply post_sign_in(void *context, const Request *r) {
    note("POST", r);
    return gate_sign_in(context, r);
}

static Ticket *ticket(void) {
    static Ticket *t;
    Job j = {0};
    Fault f;
    if (t) return t;
    cJSON *json = cJSON_Parse("{\"kind\":\"sample\"}");
    MUST(job_read(&j, fuzz_offer(), json, NULL, NULL, 0, &f) && ticket_new(&t, &j, fuzz_offer()) == OK);
    MUST(blob_new(&t->picture[0], NULL, 10) == OK);
    ticket_tell_place(t, 1);
    ticket_end(t, TICKET_DONE);
    cJSON_Delete(json);
    return t;
}

static Reply get_events(void *context, const Request *r) {
    (void)context;
    note("GET", r);
    return events_reply(ticket()->events, r);
}

static Reply get_file(void *context, const Request *r) {
    (void)context;
    note("GET", r);
    return ticket_file(ticket(), r);
}

static Reply delete_job(void *context, const Request *r) {
    (void)context;
    note("DELETE", r);
    return reply_empty(204);
}

static Reply get_page(void *context, const Request *r) {
    note("GET", r);
    return page_index(context, r);
}

static const Route routes[] = {
    {"GET", "", get_page, 0},
    {"POST", "sign-in", post_sign_in, 1},
    {"GET", "api/health", get_nothing, 0},
    {"POST", "api/jobs", post_job, 0},
    {"DELETE", "api/jobs/?", delete_job, 0},
    {"GET", "api/jobs/?/events", get_events, 0},
    {"GET", "api/jobs/?/?", get_file, 0},
    {"POST", "api/settings", post_settings, 0},
};

/* ---- A server at a socket in the file system ---- */

static struct sockaddr_un address_of(int with_token) {
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    snprintf(a.sun_path, sizeof a.sun_path, "%s", fuzz_path(with_token ? "token" : "plain"));
    return a;
}

static void start(int with_token) {
    static const char *const origin[] = {"https://page.example"};
    static HttpConfig config[2];
    const struct sockaddr_un a = address_of(with_token);
    const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    Http *http;
    MUST(fd >= 0 && bind(fd, (const struct sockaddr *)&a, sizeof a) == 0 && listen(fd, 16) == 0);
    const Gate gate = {with_token ? "sesame" : NULL, origin, 1, 8080};
    config[with_token] = (HttpConfig){gate, routes, sizeof routes / sizeof *routes, &config[with_token].gate};
    MUST(http_start(&http, fd, &config[with_token]) == OK);
}

/* Sends all, and reads what comes until the server closes: nothing, or answers. */
static void send_bytes(int with_token, const uint8_t *bytes, size_t n) {
    static char answer[1 << 20];
    const struct sockaddr_un a = address_of(with_token);
    const struct timeval patience = {20, 0};
    const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    size_t have = 0;
    ssize_t got;
    MUST(fd >= 0 && connect(fd, (const struct sockaddr *)&a, sizeof a) == 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    for (size_t at = 0; at < n;) {
        const ssize_t sent = send(fd, bytes + at, n - at, MSG_NOSIGNAL);
        if (sent <= 0) break;
        at += (size_t)sent;
    }
    shutdown(fd, SHUT_WR);
    while (have < sizeof answer && (got = recv(fd, answer + have, sizeof answer - have, 0)) > 0) have += (size_t)got;
    MUST(have == sizeof answer || got == 0 || (errno != EAGAIN && errno != EWOULDBLOCK));
    MUST(have < 13 || (!memcmp(answer, "HTTP/1.1 ", 9) && answer[9] >= '1' && answer[9] <= '5'));
    close(fd);
}

/* ---- A strict reader ---- */

typedef struct {
    const uint8_t *at, *end;
    uint8_t *body; /* of a request */
    size_t size;
    char method[16];
    int empty_next; /* looks_like_end: an empty line comes next */
} Strict;

/* Where CR LF, CR LF may stand so that the library leaves the same in memory, for it writes zeros over what ends names and
 * lines: four bytes around the line's LF, each CR, LF, a zero or a colon. NULL: nowhere */
static const uint8_t *looks_like_end(const Strict *s, const uint8_t *line, const uint8_t *lf) {
    for (const uint8_t *t = lf - line < 3 ? line : lf - 3; t <= lf && t + 4 <= s->end; t++) {
        size_t like = 0;
        while (like < 4 && (!t[like] || strchr("\r\n:", t[like]))) like++;
        if (like == 4 && !memchr(line, '\r', (size_t)(t - line)) && !memchr(line, 0, (size_t)(t - line))) return t;
    }
    return NULL;
}

/* line (n) = up to CR LF, in which there is no other CR, LF or zero; 0: there is none. What the library leaves in
 * memory as it leaves CR LF passes too, for http.c cannot see it: a zero and LF; a colon and LF, an empty line;
 * looks_like_end. */
static int strict_line(Strict *s, const char **line, size_t *n) {
    const uint8_t *const begin = s->at, *const lf = memchr(begin, '\n', (size_t)(s->end - begin)), *end;
    *line = (const char *)begin, *n = 0;
    if (s->empty_next) return s->empty_next = 0, 1;
    if (!lf) return 0;
    s->at = lf + 1;
    if (lf > begin) {
        *n = (size_t)(lf - begin) - 1;
        if (!*n && *begin == ':') return 1;
        if ((lf[-1] == '\r' || !lf[-1]) && !memchr(begin, '\r', *n) && !memchr(begin, 0, *n)) return 1;
    }
    if (!(end = looks_like_end(s, begin, lf))) return 0;
    *n = (size_t)(end - begin), s->at = end + 4, s->empty_next = 1;
    return 1;
}

typedef struct {
    int hosts, lengths, encodings, chunked;
    size_t length;
} StrictHead;

static int strict_header(StrictHead *h, const char *line, size_t n) {
    static const char name[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'*+-.^_`|~";
    char text[256] = "";
    const size_t length = strspn(line, name);
    if (!length || length >= n || line[length] != ':') return 0;
    const char *value = line + length + 1, *end = line + n;
    while (value < end && (*value == ' ' || *value == '\t')) value++;
    while (end > value && (end[-1] == ' ' || end[-1] == '\t')) end--;
    snprintf(text, sizeof text, "%.*s", (int)min_size(255, (size_t)(end - value)), value);
    h->hosts += length == 4 && !strncasecmp(line, "Host", 4);
    if (length == 14 && !strncasecmp(line, "Content-Length", 14)) {
        if (!*text || strspn(text, "0123456789") != strlen(text) || strlen(text + strspn(text, "0")) > 12) return 0;
        h->lengths++, h->length = strtoul(text, NULL, 10);
    }
    if (length == 17 && !strncasecmp(line, "Transfer-Encoding", 17))
        h->encodings++, h->chunked = !strcasecmp(text, "chunked");
    return 1;
}

/* Lines of chunks may end in LF alone: the library has it so, and http.c cannot see it. */
static int strict_chunks(Strict *s) {
    for (;;) {
        size_t size = 0, digits = 0;
        while (s->at < s->end && isxdigit(*s->at) && size >> 40 == 0)
            size = size * 16 + (size_t)(*s->at <= '9' ? *s->at - '0' : (*s->at | 32) - 'a' + 10), s->at++, digits++;
        const uint8_t *line = memchr(s->at, '\n', (size_t)(s->end - s->at));
        if (!digits || !line) return 0;
        s->at = line + 1;
        if (size > (size_t)(s->end - s->at)) return 0;
        if (!size) break;
        memcpy(s->body + s->size, s->at, size);
        s->size += size, s->at += size;
        if (s->at < s->end && *s->at == '\r') s->at++;
        if (s->at == s->end || *s->at++ != '\n') return 0;
    }
    for (;;) { /* trailers */
        const uint8_t *line = memchr(s->at, '\n', (size_t)(s->end - s->at));
        if (!line) return 0;
        const size_t n = (size_t)(line - s->at);
        const int empty = n == 0 || (n == 1 && *s->at == '\r') || !*s->at; /* a zero makes a line empty here, too */
        s->at = line + 1;
        if (empty) return 1;
    }
}

/* The next request; 0: there is none, or one that is in doubt. */
static int strict_request(Strict *s) {
    StrictHead h = {0};
    const char *line;
    size_t n;
    s->size = 0;
    /* Empty lines in front: a zero makes a line empty, too, and LF alone may end it. */
    while (s->end - s->at >= 2 && (!memcmp(s->at, "\r\n", 2) || *s->at == '\n' || !*s->at)) {
        const uint8_t *empty = memchr(s->at, '\n', (size_t)(s->end - s->at));
        if (!empty) return 0;
        s->at = empty + 1;
    }
    if (!strict_line(s, &line, &n)) return 0;
    const size_t method = strcspn(line, " \t\r");
    if (!method || line[method] != ' ') return 0;
    snprintf(s->method, sizeof s->method, "%.*s", (int)min_size(method, 15), line);
    if (n < 9 || memcmp(line + n - 9, " HTTP/1.", 8) != 0) return 0;
    const int old = line[n - 1] == '0';
    for (;;) {
        if (!strict_line(s, &line, &n)) return 0;
        if (!n) break;
        if (!strict_header(&h, line, n)) return 0;
    }
    if (h.hosts != 1 || h.lengths > 1 || h.encodings > 1 || (h.encodings && (h.lengths || !h.chunked || old))) return 0;
    if (h.encodings) return strict_chunks(s);
    if (h.length > (size_t)(s->end - s->at)) return 0;
    memcpy(s->body, s->at, h.length);
    s->at += h.length, s->size = h.length;
    return 1;
}

/* Is each call a request that the strict reader finds too? */
static void compare(const uint8_t *bytes, size_t n) {
    uint8_t *body = malloc(n + 1);
    Strict s = {bytes, bytes + n, body, 0, "", 0};
    size_t c = 0;
    MUST(body);
    while (c < calls && c < MANY && strict_request(&s)) {
        if (!strcmp(s.method, "HEAD")) snprintf(s.method, sizeof s.method, "GET");
        c += called[c].method == hash(s.method, strlen(s.method)) && called[c].size == s.size &&
             called[c].body == hash(s.body, s.size);
    }
    MUST(c >= calls || c == MANY);
    free(body);
}

static void read_requests(const uint8_t *bytes, size_t n) {
    static int started;
    if (n < 1) return;
    if (!started) start(0), start(1), ticket(), started = 1;
    uint8_t *copy = malloc(n); /* with a zero behind */
    MUST(copy);
    memcpy(copy, bytes + 1, n - 1), copy[n - 1] = 0;
    calls = 0;
    send_bytes(bytes[0] & 1, copy, n - 1);
    pthread_mutex_lock(&lock);
    compare(copy, n - 1);
    pthread_mutex_unlock(&lock);
    free(copy);
}

/* ---- Seeds ---- */

#define HOST "Host: 127.0.0.1:8080\r\n"
#define TOKEN "Host: art.example\r\nAuthorization: Bearer sesame\r\n"
static const struct {
    const char *name, *text;
} requests[] = {
    {"page", "0GET / HTTP/1.1\r\n" HOST "If-None-Match: W/\"a\", *\r\nAccept-Encoding: gzip\r\n\r\n"},
    {"health", "0HEAD /api/healt%68?x=1&y HTTP/1.1\r\nHost: LocalHost:8080\r\nOrigin: http://localhost:8080\r\n\r\n"},
    {"old", "0GET /api/health HTTP/1.0\r\nHost: [::1]:8080\r\nConnection: keep-alive\r\n\r\n"},
    {"two",
     "0GET /api/health HTTP/1.1\r\n" HOST "\r\nDELETE /api/jobs/AAAAAAAAAAAAAAAAAAAAAA HTTP/1.1\r\n" HOST "\r\n"},
    {"origin", "0GET /api/health HTTP/1.1\r\nHost: page.example\r\nOrigin: https://page.example\r\n\r\n"},
    {"events", "0GET /api/jobs/x/events HTTP/1.1\r\n" HOST "Last-Event-ID: 1\r\n\r\n"},
    {"preview", "0GET /api/jobs/x/0.png?scale=2 HTTP/1.1\r\n" HOST
                "\r\nGET /api/jobs/x/0.json?scale=%31 HTTP/1.1\r\n" HOST "\r\n"},
    {"job", "0POST /api/jobs HTTP/1.1\r\n" HOST "Content-Type: application/json\r\nContent-Length: 0000025\r\n\r\n"
            "{\"kind\":\"sample\",\"seed\":7}"},
    {"chunks",
     "0POST /api/jobs HTTP/1.1\r\n" HOST "Content-Type: application/json; charset=utf-8\r\nTransfer-Encoding: "
     "chunked\r\n\r\nA\r\n{\"kind\":\"s\r\n10;x=y\r\nample\",\"seed\":7}\r\n0\r\nX: y\r\n\r\n"
     "GET /api/health HTTP/1.1\r\n" HOST "\r\n"},
    {"form",
     "0POST /api/jobs HTTP/1.1\r\n" HOST "Content-Type: multipart/form-data; boundary=\"b-1\"\r\nContent-Length: "
     "0000099\r\n\r\n--b-1\r\nContent-Disposition: form-data; name=\"job\"\r\n\r\n{\"kind\":\"sample\",\"seed\":7}"
     "\r\n--b-1--\r\n"},
    {"expect", "0POST /api/settings HTTP/1.1\r\n" HOST "Expect: 100-continue\r\nContent-Length: 0000003\r\n\r\nGIF"},
    {"sign-in",
     "1POST /sign-in HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: "
     "0000018\r\n\r\nx=1&token=s%65same"},
    {"bearer", "1GET /api/health HTTP/1.1\r\n" TOKEN "\r\n"},
    {"cookie",
     "1POST /sign-in HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: "
     "0000012\r\nCookie: a=b; imagebart-8080=AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA ;c\r\n\r\ntoken=sesame"},
};

/* The first length is that of what follows the head again. */
static size_t mend_request(uint8_t *bytes, size_t n, size_t most, unsigned seed) {
    static const char name[] = "Content-Length: ";
    char digits[8];
    (void)most, (void)seed;
    const uint8_t *head_end = memmem(bytes, n, "\r\n\r\n", 4);
    uint8_t *length = memmem(bytes, n, name, sizeof name - 1);
    if (!head_end || !length || length + sizeof name + 6 > head_end) return n;
    snprintf(digits, sizeof digits, "%07zu", (size_t)(bytes + n - head_end - 4) % 10000000);
    memcpy(length + sizeof name - 1, digits, 7);
    return n;
}

static void request_seeds(FuzzSeed *take) {
    for (size_t i = 0; i < sizeof requests / sizeof *requests; i++) {
        uint8_t bytes[1024];
        const size_t length = strlen(requests[i].text);
        memcpy(bytes, requests[i].text, length);
        take(requests[i].name, bytes, mend_request(bytes, length, sizeof bytes, 0));
    }
    Config text = {0}; /* a picture with settings */
    Image im = {.H = 2, .W = 2, .rgb = calloc(12, 1)};
    uint8_t *png, *all;
    size_t n;
    char head[256];
    MUST(config_set(&text, "model", "emoji") == OK && config_set(&text, "seed", "7") == OK &&
         config_set(&text, "temperature", "1,0.9,0.8") == OK && image_encode_png(&png, &n, &im, &text) == OK);
    const int head_size =
        snprintf(head, sizeof head, "0POST /api/settings HTTP/1.1\r\n" HOST "Content-Length: %07zu\r\n\r\n", n);
    MUST((all = malloc((size_t)head_size + n)));
    memcpy(all, head, (size_t)head_size), memcpy(all + head_size, png, n);
    take("settings", all, (size_t)head_size + n);
    free(all), free(png), image_free(&im), config_free(&text);
}

const FuzzTarget fuzz_request_targets[] = {{"requests", read_requests, request_seeds, mend_request},
                                           {NULL, NULL, NULL, NULL}};
#else
const FuzzTarget fuzz_request_targets[] = {{NULL, NULL, NULL, NULL}};
#endif
