/* load.c - many clients at once upon ./serve, for a while: none of them gets an answer that is wrong for what it
 * asked, none holds the others up, and what the server holds does not grow.
 *
 *     load SERVE SECONDS [CLIENTS]     starts SERVE (build/.../serve); 50 clients
 *
 * A client pays one visit after the other, by chance (visits): it draws, follows the events, comes back with
 * Last-Event-ID, reads slowly, writes slowly, cancels, hangs up in the middle of whatever it is, or sends what is to
 * be refused. The same job is drawn again and again, and must always be the same bytes. Then all leave: threads and
 * descriptors of the server must be as before. At last they come once more, and SIGTERM comes while they are busy. */
#include "test/test.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <sys/wait.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SLOWER = 5 }; /* what a sanitizer may cost */
#else
enum { SLOWER = 1 };
#endif
#ifdef __SANITIZE_THREAD__
enum { KEEPS = 1 }; /* the thread sanitizer remembers what was freed */
#else
enum { KEEPS = 0 };
#endif
enum { SEEDS = 4, STATUSES = 600 };
static const double PATIENCE = 60 * SLOWER, ENDING_SECONDS = 5 * SLOWER;

static int port;
static pid_t server;
static atomic_int leaving, ending; /* clients finish their visit; the server ends: anything may be refused */
static atomic_size_t answers[STATUSES], visits_paid, wrong;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    uint8_t *bytes; /* the picture of this seed, as it first came */
    size_t size;
} first_picture[SEEDS];
static uint8_t *photo; /* a PNG to edit */
static size_t photo_size;

/* ---- A client and its answers ---- */

typedef struct {
    int number;
    uint32_t chance;
    char id[32];   /* its last job */
    size_t nibble; /* bytes read at a time, 0: as many as there are */
} Client;

typedef struct {
    int fd, status; /* 0: closed without an answer */
    enum { IN_HEAD, IN_SIZE, IN_DATA, IN_GAP, IN_LAST, IN_RAW, IS_WHOLE } at;
    int chunked, bodiless, closed;
    size_t left;          /* of the chunk, or of all */
    char *bytes;          /* head and body, without the chunks' lines; a zero behind them */
    size_t n, room, body; /* body: where it begins */
} Answer;

static uint32_t below(Client *c, uint32_t n) {
    c->chance = c->chance * 1664525u + 1013904223u;
    return (c->chance >> 8) % n;
}

static void complain(const char *what, const Answer *a) {
    pthread_mutex_lock(&lock);
    if (wrong++ < 20)
        printf("FAIL %s: status %d%s: %.200s\n", what, a->status, a->closed ? ", closed" : "",
               a->n > a->body ? a->bytes + a->body : "");
    fflush(stdout);
    pthread_mutex_unlock(&lock);
}

static int dial(void) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&to, sizeof to) != 0 && !ending) {
        const Answer none = {.closed = 1};
        complain("cannot connect", &none);
    }
    return fd;
}

/* Hangs up, now and then with a reset. */
static void hang_up(Client *c, Answer *a) {
    const struct linger at_once = {1, 0};
    if (below(c, 3) == 0) setsockopt(a->fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    close(a->fd);
    free(a->bytes);
    *a = (Answer){.fd = -1};
}

static void put(int fd, const void *bytes, size_t n) {
    const char *from = bytes;
    while (n > 0) {
        const ssize_t sent = send(fd, from, n, MSG_NOSIGNAL);
        if (sent <= 0) return;
        from += sent, n -= (size_t)sent;
    }
}

static void add(Answer *a, char c) {
    if (a->n + 2 > a->room) a->bytes = realloc(a->bytes, a->room = 2 * a->room + 1024);
    a->bytes[a->n++] = c, a->bytes[a->n] = 0;
}

static void head_is_there(Answer *a) {
    const char *length = strcasestr(a->bytes, "\r\nContent-Length:");
    a->status = atoi(a->bytes + 9);
    a->chunked = strcasestr(a->bytes, "\r\nTransfer-Encoding: chunked") != NULL;
    a->body = a->n;
    a->left = !a->chunked && length ? strtoul(length + 17, NULL, 10) : 0;
    if (a->status == 100)
        a->n = 0;
    else if (a->bodiless || a->status == 204 || a->status == 304 || (length && !a->left))
        a->at = IS_WHOLE;
    else
        a->at = a->chunked ? IN_SIZE : length ? IN_DATA : IN_RAW;
}

static void feed(Answer *a, char c) {
    if (a->at == IN_HEAD || a->at == IN_DATA || a->at == IN_RAW) add(a, c);
    if (a->at == IN_HEAD && a->n >= 4 && !memcmp(a->bytes + a->n - 4, "\r\n\r\n", 4)) {
        head_is_there(a);
    } else if (a->at == IN_DATA) {
        if (--a->left == 0) a->at = a->chunked ? IN_GAP : IS_WHOLE;
    } else if (a->at == IN_SIZE) {
        if (c == '\n')
            a->at = a->left ? IN_DATA : IN_LAST;
        else if (c != '\r')
            a->left = a->left * 16 + (size_t)(c <= '9' ? c - '0' : (c | 32) - 'a' + 10);
    } else if ((a->at == IN_GAP || a->at == IN_LAST) && c == '\n') {
        a->at = a->at == IN_GAP ? IN_SIZE : IS_WHOLE;
    }
}

/* Some bytes more; 0: it is whole, or no more will come. */
static int hear_some(Client *c, Answer *a, double until) {
    char bytes[65536];
    struct pollfd p = {a->fd, POLLIN, 0};
    const double left = until - seconds();
    if (a->at == IS_WHOLE || a->closed || left <= 0 || poll(&p, 1, (int)(left * 1000) + 1) <= 0) return 0;
    const ssize_t got = recv(a->fd, bytes, c->nibble ? c->nibble : sizeof bytes, 0);
    a->closed = got <= 0;
    for (ssize_t i = 0; i < got; i++) feed(a, bytes[i]);
    if (c->nibble) usleep(1000 + below(c, 20000));
    return got > 0;
}

/* The whole answer, whose status must be one of these (0 ends them). */
static int hear(Client *c, Answer *a, const char *what, const int *right) {
    const double until = seconds() + PATIENCE;
    while (hear_some(c, a, until)) {
    }
    const int whole = a->at == IS_WHOLE || (a->at == IN_RAW && a->closed);
    answers[a->status > 0 && a->status < STATUSES ? a->status : 0]++;
    while (*right && *right != a->status) right++;
    if (!ending && (!*right || !whole)) complain(what, a);
    return whole ? a->status : 0;
}
#define HEAR(c, a, what, ...) hear(c, a, what, (const int[]){__VA_ARGS__, 0})

static Answer ask(const char *method, const char *path, const char *headers, const void *body, size_t size) {
    char head[1024];
    Answer a = {.fd = dial(), .bodiless = !strcmp(method, "HEAD")};
    const int n =
        snprintf(head, sizeof head,
                 "%s /%s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: close\r\n%sContent-Length: %zu\r\n\r\n", method,
                 path, port, headers, size);
    put(a.fd, head, (size_t)n);
    put(a.fd, body, size);
    return a;
}

static void done(Answer *a) {
    close(a->fd);
    free(a->bytes);
}

#define CALL(c, method, path, ...)                                                                                     \
    do {                                                                                                               \
        Answer answer_ = ask(method, path, "", "", 0);                                                                 \
        HEAR(c, &answer_, method " " #path, __VA_ARGS__);                                                              \
        done(&answer_);                                                                                                \
    } while (0)

/* ---- Jobs ---- */

static const char json_type[] = "Content-Type: application/json\r\n";

/* Posts a job; 1: it was taken, c->id is its id. */
static int take_id(Client *c, Answer *a) {
    const int status = HEAR(c, a, "POST api/jobs", 202, 429);
    const char *id = status == 202 ? strstr(a->bytes + a->body, "\"id\":\"") : NULL;
    if (status == 202 && !id) complain("no id", a);
    if (id) snprintf(c->id, sizeof c->id, "%.22s", id + 6);
    done(a);
    return id != NULL;
}

static int post(Client *c, const char *job) {
    Answer a = ask("POST", "api/jobs", json_type, job, strlen(job));
    return take_id(c, &a);
}

static const char *path_of(char path[128], const Client *c, const char *what) {
    snprintf(path, 128, "api/jobs/%s%s", c->id, what);
    return path;
}

/* Reads whole events from *at on: their numbers rise. 1: the last one was there. */
static int read_events(const Answer *a, size_t *at, unsigned long *told, const char **last) {
    for (const char *end; a->n > *at && (end = strstr(a->bytes + *at, "\n\n")); *at = (size_t)(end - a->bytes) + 2) {
        const char *event = a->bytes + *at, *type = strstr(event, "\nevent: ");
        unsigned long number;
        if (*event == ':') continue;
        if (sscanf(event, "id: %lu\n", &number) != 1 || number <= *told || !type || type > end)
            complain("an event out of order", a);
        *told = number;
        if (type && !strncmp(type + 8, "done", 4)) return *last = "done", 1;
        if (type && !strncmp(type + 8, "failed", 6)) return *last = "failed", 1;
        if (type && !strncmp(type + 8, "cancelled", 9)) return *last = "cancelled", 1;
    }
    return 0;
}

/* Follows the job to its end, hanging up and coming back now and then: "done", "cancelled"; NULL: it was forgotten, or the
 * client left. */
static const char *follow(Client *c, size_t most_events) {
    unsigned long told = 0;
    char path[128], header[64];
    const char *last = NULL;
    const double until = seconds() + PATIENCE;
    while (!last && !ending) {
        snprintf(header, sizeof header, told ? "Last-Event-ID: %lu\r\n" : "", told);
        Answer a = ask("GET", path_of(path, c, "/events"), header, "", 0);
        const size_t patience = 1 + below(c, 12), before = told;
        size_t at = 0;
        while (!last && a.at != IS_WHOLE && hear_some(c, &a, until)) {
            if (!at && a.at != IN_HEAD) at = a.body;
            if (at && a.status == 200 && read_events(&a, &at, &told, &last)) break;
            if (told > before + patience && below(c, 4) == 0) break; /* comes back */
        }
        const int forgotten = a.status == 410 || a.status == 404, left = told >= most_events;
        answers[a.status]++;
        if (!ending && a.status != 200 && !forgotten) complain("GET events", &a);
        if (!ending && seconds() > until) complain("events that do not end", &a);
        hang_up(c, &a);
        if (forgotten || left || seconds() > until) return last;
    }
    return last;
}

static int is_png(const Answer *a) {
    const size_t size = a->n - a->body;
    return size > 57 && !memcmp(a->bytes + a->body, "\x89PNG", 4) && !memcmp(a->bytes + a->n - 8, "IEND", 4);
}

/* A picture that is whole, and the same as every other of this seed; seed SEEDS: any. */
static void read_picture(Client *c, const char *name, uint32_t seed) {
    char path[128];
    Answer a = ask("GET", path_of(path, c, name), "", "", 0);
    if (HEAR(c, &a, "a picture", 200, 410) == 200 && !is_png(&a)) complain("no PNG", &a);
    if (a.status == 200 && a.at == IS_WHOLE && seed < SEEDS) {
        const size_t size = a.n - a.body;
        pthread_mutex_lock(&lock);
        if (!first_picture[seed].bytes) {
            first_picture[seed].bytes = malloc(size), first_picture[seed].size = size;
            memcpy(first_picture[seed].bytes, a.bytes + a.body, size);
        }
        const int same = size == first_picture[seed].size && !memcmp(first_picture[seed].bytes, a.bytes + a.body, size);
        pthread_mutex_unlock(&lock);
        if (!same) complain("another picture for the same job", &a);
    }
    done(&a);
}

/* ---- Visits ---- */

#define JOB                                                                                                            \
    "{\"kind\":\"sample\",\"best_of\":1,\"class\":\"food\",\"chain_length\":1,\"temperature\":1,\"top_k\":0,"          \
    "\"guidance\":1,"

/* Draws a picture and looks at everything that there is of it. */
static void visit_draw(Client *c) {
    char job[256], path[128];
    const uint32_t seed = below(c, SEEDS), previews = below(c, 2);
    snprintf(job, sizeof job, JOB "\"seed\":%u,\"previews\":%s,\"owned\":%s}", seed, previews ? "true" : "false",
             below(c, 2) ? "true" : "false");
    if (!post(c, job)) {
        usleep(200000);
        return;
    }
    const char *end = follow(c, SIZE_MAX);
    if (!end) return;
    const Answer none = {0};
    if (!ending && strcmp(end, "done") != 0) complain("a job that ended otherwise", &none);
    read_picture(c, "/0.png", seed);
    if (previews) read_picture(c, "/0.png?scale=2", SEEDS);
    CALL(c, "GET", path_of(path, c, "/0.json"), 200, 410);
    CALL(c, "GET", path_of(path, c, ""), 200, 410);
    CALL(c, "GET", path_of(path, c, "/1.png"), 404, 410);
    if (below(c, 3)) return;
    CALL(c, "DELETE", path_of(path, c, ""), 204, 410);
    CALL(c, "GET", path_of(path, c, "/0.png"), 410);
}

/* A large job that is cancelled on its way, while it waits, or left alone with nobody listening. */
static void visit_cancel(Client *c) {
    char path[128];
    if (!post(c, "{\"kind\":\"sample\",\"count\":4,\"best_of\":4,\"class\":\"food\"}")) return;
    if (below(c, 2)) follow(c, 1 + below(c, 6));
    CALL(c, "DELETE", path_of(path, c, ""), 204, 410);
    const char *end = follow(c, SIZE_MAX);
    const Answer none = {0};
    if (!ending && end && !strcmp(end, "failed")) complain("a cancelled job failed", &none);
}

/* An edit by a form, whose body is sent in pieces. */
static void visit_edit(Client *c) {
    static const char head[] = "--xYz\r\nContent-Disposition: form-data; name=\"job\"\r\n\r\n"
                               "{\"kind\":\"inpaint\",\"half\":\"upper\",\"best_of\":1,\"class\":\"food\",\"chain_"
                               "length\":[1,0,1]}\r\n--xYz\r\n"
                               "Content-Disposition: form-data; name=\"image\"; filename=\"a.png\"\r\n\r\n";
    static const char tail[] = "\r\n--xYz--\r\n";
    char request[1024];
    Answer a = {.fd = dial()};
    put(a.fd, request,
        (size_t)snprintf(request, sizeof request,
                         "POST /api/jobs HTTP/1.1\r\nHost: localhost:%d\r\nConnection: close\r\n"
                         "Content-Type: multipart/form-data; boundary=xYz\r\nContent-Length: %zu\r\n\r\n%s",
                         port, sizeof head + sizeof tail - 2 + photo_size, head));
    for (size_t at = 0; at < photo_size; at += 997) {
        put(a.fd, photo + at, min_size(997, photo_size - at));
        if (below(c, 4) == 0) usleep(1000);
    }
    put(a.fd, tail, sizeof tail - 1);
    if (take_id(c, &a) && follow(c, SIZE_MAX)) read_picture(c, "/0.png", SEEDS);
}

/* A body that stops half way. */
static void visit_half_a_body(Client *c) {
    static const char body[] = JOB "\"seed\":1}";
    char request[512];
    Answer a = {.fd = dial()};
    const int n = snprintf(request, sizeof request, "POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n%s%s\r\n\r\n",
                           port, json_type, below(c, 2) ? "Content-Length: 99999" : "Transfer-Encoding: chunked");
    put(a.fd, request, (size_t)n - below(c, 2) * below(c, 30));
    if (below(c, 2)) put(a.fd, "2000\r\n", 6);
    put(a.fd, body, below(c, sizeof body));
    usleep(below(c, 50000));
    hang_up(c, &a);
}

/* A chunked body, a few bytes at a time. */
static void visit_slow_writer(Client *c) {
    static const char body[] = "{\"kind\":\"sample\",\"count\":0}";
    char text[512];
    Answer a = {.fd = dial()};
    const int n = snprintf(text, sizeof text,
                           "POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: close\r\n%sTransfer-Encoding: "
                           "chunked\r\n\r\n",
                           port, json_type);
    for (int i = 0; i < n; i += 16) put(a.fd, text + i, min_size(16, (size_t)(n - i))), usleep(below(c, 20000));
    for (size_t i = 0; i < sizeof body - 1; i += 5) {
        const int piece = (int)min_size(5, sizeof body - 1 - i);
        put(a.fd, text, (size_t)sprintf(text, "%x\r\n%.*s\r\n", (unsigned)piece, piece, body + i));
        usleep(below(c, 50000));
    }
    put(a.fd, "0\r\n\r\n", 5);
    HEAR(c, &a, "a slow body", 400);
    done(&a);
}

/* The page, a few bytes at a time; some leave in the middle. */
static void visit_slow_reader(Client *c) {
    Answer a = ask("GET", below(c, 2) ? "page.js" : "", "", "", 0);
    c->nibble = 512 + below(c, 4096);
    if (below(c, 2)) {
        for (int i = 0; i < 5 && hear_some(c, &a, seconds() + PATIENCE); i++) {
        }
        hang_up(c, &a);
    } else {
        HEAR(c, &a, "the page, slowly", 200);
        done(&a);
    }
    c->nibble = 0;
}

/* Listens without reading: what the server sends waits in the socket. */
static void visit_deaf(Client *c) {
    char path[128];
    const int small = 1;
    if (!*c->id) return;
    Answer a = ask("GET", path_of(path, c, "/events"), "", "", 0);
    setsockopt(a.fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    usleep(below(c, 800000));
    hang_up(c, &a);
}

/* What is refused, and closed where its end is in doubt. */
static void visit_wrong(Client *c) {
    static const struct {
        const char *request;
        int status;
    } cases[] = {
        {"GET /api/health HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", 403},
        {"GET /api/health HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nOrigin: null\r\nConnection: close\r\n\r\n", 403},
        {"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Length: 4\r\nTransfer-Encoding: "
         "chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
         400},
        {"POST /api/health HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400},
        {"GET /api/health%%00 HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n", 400},
        {"DELETE /api/models HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: close\r\n\r\n", 405},
        {"GET /api/jobs/AAAAAAAAAAAAAAAAAAAAAA HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: close\r\n\r\n", 404},
        {"POST /api/settings HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Length: 3\r\nConnection: close\r\n\r\nGIF", 415},
        {"POST /api/jobs HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\nContent-Length: "
         "2\r\nConnection: close\r\n\r\n{}",
         400}};
    char text[512];
    const size_t i = below(c, sizeof cases / sizeof *cases);
    Answer a = {.fd = dial()};
    put(a.fd, text, (size_t)snprintf(text, sizeof text, cases[i].request, port));
    HEAR(c, &a, cases[i].request, cases[i].status);
    done(&a);
}

/* Several requests on one connection, the last two at once. */
static void visit_again(Client *c) {
    char text[512];
    const int fd = dial(),
              n = snprintf(text, sizeof text, "GET /api/models HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n", port);
    for (int i = 0; i < 4; i++) {
        Answer a = {.fd = fd};
        put(fd, text, (size_t)n);
        HEAR(c, &a, "again on the same connection", 200);
        free(a.bytes);
        if (below(c, 3) == 0) usleep(below(c, 300000));
    }
    close(fd);
}

/* A picture's settings, and what the server says of itself */
static void visit_settings(Client *c) {
    uint8_t *bytes = NULL;
    size_t size = 0;
    pthread_mutex_lock(&lock);
    if (first_picture[0].bytes && (bytes = malloc(first_picture[0].size)))
        memcpy(bytes, first_picture[0].bytes, size = first_picture[0].size);
    pthread_mutex_unlock(&lock);
    CALL(c, "GET", "api/health", 200);
    CALL(c, "HEAD", "api/models", 200);
    CALL(c, "GET", "page.css", 200);
    if (!bytes) return;
    Answer a = ask("POST", "api/settings", "Content-Type: image/png\r\n", bytes, size);
    HEAR(c, &a, "POST api/settings", 200);
    done(&a);
    free(bytes);
}

static void (*const visits[])(Client *c) = {
    visit_draw,        visit_draw,        visit_draw, visit_cancel, visit_cancel, visit_edit,    visit_half_a_body,
    visit_slow_writer, visit_slow_reader, visit_deaf, visit_wrong,  visit_again,  visit_settings};

static void *client(void *context) {
    Client *c = context;
    while (!leaving) {
        visits[below(c, sizeof visits / sizeof *visits)](c);
        visits_paid++;
    }
    return NULL;
}

/* ---- The server ---- */

static void start_server(const char *serve) {
    int end[2];
    char line[256] = "";
    CHECK(pipe(end) == 0);
    server = fork();
    if (server == 0) {
        dup2(end[1], 1);
        close(end[0]), close(end[1]);
        execl(serve, serve, "emoji", "--port", "0", "--queue", SLOWER > 1 ? "3" : "10", "--count-limit", "4",
              "--results", "2", (char *)NULL);
        _exit(127);
    }
    close(end[1]);
    FILE *f = fdopen(end[0], "r");
    const char *at = f && fgets(line, sizeof line, f) ? strrchr(line, ':') : NULL;
    if (f) fclose(f);
    port = at ? atoi(at + 1) : 0;
}

/* A number of /proc/PID/status, 0: there is none */
static long status_of(const char *name) {
    char path[64], line[256];
    long value = 0;
    snprintf(path, sizeof path, "/proc/%d/status", (int)server);
    FILE *f = fopen(path, "r");
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, name, strlen(name))) value = atol(line + strlen(name));
    if (f) fclose(f);
    return value;
}

static int descriptors(void) {
    char path[64];
    int n = 0;
    snprintf(path, sizeof path, "/proc/%d/fd", (int)server);
    DIR *d = opendir(path);
    while (d && readdir(d)) n++;
    if (d) closedir(d);
    return n;
}

typedef struct {
    Client *client;
    pthread_t *thread;
    int n;
} Crowd;

static void crowd_comes(Crowd *crowd) {
    leaving = 0;
    for (int i = 0; i < crowd->n; i++) {
        crowd->client[i].number = i;
        crowd->client[i].chance = crowd->client[i].chance * 31 + (uint32_t)i;
        if (pthread_create(&crowd->thread[i], NULL, client, &crowd->client[i]) != 0) exit(1);
    }
}

static void crowd_goes(Crowd *crowd) {
    leaving = 1;
    for (int i = 0; i < crowd->n; i++) pthread_join(crowd->thread[i], NULL);
}

/* Memory in MiB: a mean over the second and the last quarter of the time. The first is to warm up. */
static void watch_memory(double duration, double mean[2]) {
    const double start = seconds();
    double sum[4] = {0}, n[4] = {0};
    for (double now = start; now < start + duration; now = seconds()) {
        const int quarter = (int)(4 * (now - start) / duration);
        sum[quarter] += (double)status_of("VmRSS:") / 1024, n[quarter]++;
        usleep(200000);
    }
    for (int i = 0; i < 4; i++) printf("%.1f MiB%s", sum[i] / fmax(n[i], 1), i < 3 ? ", " : "\n");
    mean[0] = sum[1] / fmax(n[1], 1), mean[1] = sum[3] / fmax(n[3], 1);
}

static void show(void) {
    printf("%zu visits; answers:", (size_t)visits_paid);
    for (int i = 0; i < STATUSES; i++)
        if (answers[i]) printf(" %d: %zu", i, (size_t)answers[i]);
    printf("\n");
}

static void end_server(void) {
    int status = -1;
    const double start = seconds();
    ending = 1;
    kill(server, SIGTERM);
    while (waitpid(server, &status, WNOHANG) == 0 && seconds() < start + ENDING_SECONDS) usleep(20000);
    printf("ended after %.2f s, status %d\n", seconds() - start, status);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    if (status == -1) kill(server, SIGKILL);
}

static void make_photo(void) {
    Image im = {.H = 90, .W = 120, .rgb = malloc(3 * 90 * 120)};
    for (size_t i = 0; i < 3 * 90 * 120; i++) im.rgb[i] = (uint8_t)(i * i / 7);
    CHECK_OK(image_encode_png(&photo, &photo_size, &im, NULL));
    image_free(&im);
}

int main(int argc, char **argv) {
    if (argc < 3) return fprintf(stderr, "usage: load SERVE SECONDS [CLIENTS]\n"), 2;
    const double duration = atof(argv[2]);
    double memory[2];
    Crowd crowd = {.n = argc > 3 ? atoi(argv[3]) : 50};
    crowd.client = calloc((size_t)crowd.n, sizeof *crowd.client);
    crowd.thread = calloc((size_t)crowd.n, sizeof *crowd.thread);
    make_photo();
    start_server(argv[1]);
    if (!CHECK(port > 0)) return test_report();
    Client first = {.chance = 1};
    visit_draw(&first); /* the model is in memory, the pool's threads are there */
    const long threads_before = status_of("Threads:");
    const int descriptors_before = descriptors();
    crowd_comes(&crowd);
    watch_memory(duration, memory);
    crowd_goes(&crowd);
    show();
    CHECK(wrong == 0 && answers[200] > 10 && answers[202] > 5);
    if (duration >= 30 && !KEEPS) CHECK(memory[1] < 1.05 * memory[0] + 4);
    for (int i = 0; i < 100 && (status_of("Threads:") > threads_before || descriptors() > descriptors_before); i++)
        usleep(100000);
    if (!CHECK(status_of("Threads:") <= threads_before && descriptors() <= descriptors_before))
        printf("     %ld threads, %ld before; %d descriptors, %d before\n", status_of("Threads:"), threads_before,
               descriptors(), descriptors_before);
    crowd_comes(&crowd);
    usleep(1500000);
    end_server();
    crowd_goes(&crowd);
    for (size_t i = 0; i < SEEDS; i++) free(first_picture[i].bytes);
    free(photo), free(crowd.client), free(crowd.thread);
    return test_report();
}
