/* serve_client.c - what ./serve answers, byte by byte on a socket: test_serve.sh starts it.
 *
 *     serve_client http PORT      broken, foreign and smuggled requests to a server without a token
 *     serve_client version PORT TEXT  it says this version
 *     serve_client token PORT     to one whose token is "sesame", with --origin https://page.example
 *     serve_client jobs PORT DIR  jobs, to one with --queue 2 --count-limit 40; DIR has ./sample, ./inpaint and models/
 *     serve_client forget PORT    to one with --results 1
 *     serve_client end PORT PID   it is ended while jobs run and wait */
#include "serving/serving.h"
#include "test/profiles.h"
#include "test/test.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>

static int port;

/* ---- A client ---- */

typedef struct {
    int status; /* 0: closed without an answer, -1: neither within the time */
    int closed; /* the server closed the connection behind it */
    int served; /* how many answers gave something (the library sends the head of its own refusals twice) */
    char *head, *body;
    size_t size;
} Answer;

static int dial(void) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (struct sockaddr *)&to, sizeof to) != 0) {
        printf("FAIL cannot connect: %s\n", strerror(errno));
        exit(1);
    }
    return fd;
}

static void put(int fd, const char *bytes, size_t n) {
    while (n > 0) {
        const ssize_t sent = send(fd, bytes, n, MSG_NOSIGNAL);
        if (sent <= 0) return;
        bytes += sent, n -= (size_t)sent;
    }
}

/* What comes until the server closes, or nothing more comes for a while. */
static Answer hear(int fd, double patience) {
    static char *buffer;
    static size_t room;
    size_t n = 0;
    Answer a = {.status = -1};
    for (;;) {
        struct pollfd p = {fd, POLLIN, 0};
        if (n + 65536 > room) buffer = realloc(buffer, room = 2 * room + 131072);
        if (poll(&p, 1, (int)(patience * 1000)) <= 0) break;
        const ssize_t got = recv(fd, buffer + n, room - n - 1, 0);
        if (got <= 0) {
            a.closed = 1;
            break;
        }
        n += (size_t)got;
    }
    if (!buffer || n == 0) {
        if (a.closed) a.status = 0;
        return a;
    }
    buffer[n] = 0;
    for (char *p = buffer; (p = memmem(p, n - (size_t)(p - buffer), "HTTP/1.1 ", 9)); p += 9) a.served += p[9] == '2';
    a.status = atoi(buffer + 9);
    char *end = strstr(buffer, "\r\n\r\n");
    if (!end) return a;
    *end = 0;
    a.head = buffer, a.body = end + 4, a.size = n - (size_t)(a.body - buffer);
    return a;
}

/* text with %H for this server's name and port, %Z for a zero */
static size_t fill(char *out, const char *text) {
    char *to = out;
    for (const char *p = text; *p; p++)
        if (p[0] == '%' && p[1] == 'H')
            to += sprintf(to, "127.0.0.1:%d", port), p++;
        else if (p[0] == '%' && p[1] == 'Z')
            *to++ = 0, p++;
        else
            *to++ = *p;
    *to = 0;
    return (size_t)(to - out);
}

static Answer ask_for(const char *text, double patience) {
    static char request[65536];
    const size_t n = fill(request, text);
    const int fd = dial();
    put(fd, request, n);
    Answer a = hear(fd, patience);
    close(fd);
    return a;
}

#define END "Connection: close\r\n\r\n"

static int has_header(const Answer *a, const char *line) {
    return a->head && strcasestr(a->head, line) != NULL;
}

/* ---- What is refused ---- */

typedef struct {
    const char *what, *request;
    int status, or_status; /* 0: closed without an answer is right */
} Case;

/* Where the body ends is in doubt: behind it stands a second request, which must not be answered. */
#define SECOND "GET /api/health HTTP/1.1\r\nHost: %H\r\n\r\n"
static const Case smuggled[] = {
    {"both lengths",
     "POST /api/health HTTP/1.1\r\nHost: %H\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" SECOND,
     400, 400},
    {"both, the other way",
     "POST /api/health HTTP/1.1\r\nHost: %H\r\nTransfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n0\r\n\r\n" SECOND,
     400, 400},
    {"a space before the colon",
     "POST /api/health HTTP/1.1\r\nHost: %H\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n" SECOND, 400, 400},
    {"a tab before the colon",
     "POST /api/health HTTP/1.1\r\nHost: %H\r\nTransfer-Encoding\t: chunked\r\n\r\n0\r\n\r\n" SECOND, 400, 400},
    {"a space in front", "GET /api/health HTTP/1.1\r\n Host: %H\r\nHost: %H\r\n\r\n" SECOND, 400, 0},
    {"lengths that differ",
     "POST /api/health HTTP/1.1\r\nHost: %H\r\nContent-Length: 0\r\nContent-Length: 40\r\n\r\n" SECOND, 400, 400},
    {"a length twice", "POST /api/health HTTP/1.1\r\nHost: %H\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n" SECOND,
     400, 400},
    {"a list of lengths", "POST /api/health HTTP/1.1\r\nHost: %H\r\nContent-Length: 0, 0\r\n\r\n" SECOND, 400, 0},
    {"a signed length", "POST /api/health HTTP/1.1\r\nHost: %H\r\nContent-Length: +0\r\n\r\n" SECOND, 400, 0},
    {"a length in hexadecimal", "POST /api/health HTTP/1.1\r\nHost: %H\r\nContent-Length: 0x0\r\n\r\n" SECOND, 400, 0},
    {"an encoding twice",
     "POST /api/health HTTP/1.1\r\nHost: %H\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: "
     "chunked\r\n\r\n0\r\n\r\n" SECOND,
     400, 400},
    {"another encoding",
     "POST /api/health HTTP/1.1\r\nHost: %H\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" SECOND, 400, 400},
    {"no encoding at all", "POST /api/health HTTP/1.1\r\nHost: %H\r\nTransfer-Encoding: identity\r\n\r\n" SECOND, 400,
     400},
    {"an odd encoding", "POST /api/health HTTP/1.1\r\nHost: %H\r\nTransfer-Encoding: xchunked\r\n\r\n" SECOND, 400,
     400},
    {"chunks of HTTP/1.0",
     "POST /api/health HTTP/1.0\r\nHost: %H\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" SECOND, 400, 400},
    {"two hosts", "GET /api/health HTTP/1.1\r\nHost: %H\r\nHost: %H\r\n\r\n" SECOND, 400, 403},
    {"two hosts, one foreign", "GET /api/health HTTP/1.1\r\nHost: %H\r\nHost: evil.example\r\n\r\n" SECOND, 400, 403},
    {"no host", "GET /api/health HTTP/1.1\r\n\r\n" SECOND, 400, 400},
    {"no host in HTTP/1.0", "GET /api/health HTTP/1.0\r\n\r\n" SECOND, 400, 400},
    {"a zero in the address", "GET /api/health%00.html HTTP/1.1\r\nHost: %H\r\n\r\n" SECOND, 400, 404},
    {"a zero in the query", "GET /api/health?x=%00 HTTP/1.1\r\nHost: %H\r\n\r\n" SECOND, 400, 404},
    {"half an escape", "GET /api/health%4 HTTP/1.1\r\nHost: %H\r\n\r\n" SECOND, 400, 404},
    {"a whole address", "GET http://evil.example/api/health HTTP/1.1\r\nHost: %H\r\n\r\n" SECOND, 400, 404},
    {"a head's lines without CR", "GET /api/health HTTP/1.1\nHost: %H\n\n" SECOND, 400, 0},
    {"a length behind LF alone", "POST /api/settings HTTP/1.1\r\nHost: %H\r\nX: a\nContent-Length: 3\r\n\r\nabc" SECOND,
     400, 0},
    {"an encoding behind CR alone",
     "POST /api/settings HTTP/1.1\r\nHost: %H\r\nX: a\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" SECOND, 400, 0},
    {"a length on a joined line",
     "POST /api/settings HTTP/1.1\r\nHost: %H\r\nX: a\r\n Content-Length: 3\r\n\r\nabc" SECOND, 400, 0},
    {"an encoding on a joined line",
     "POST /api/settings HTTP/1.1\r\nHost: %H\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n" SECOND, 400, 0},
    {"a line of a colon", "POST /api/settings HTTP/1.1\r\nHost: %H\r\n:\r\nContent-Length: 3\r\n\r\nabc" SECOND, 400,
     0},
    {"a line of a zero", "POST /api/settings HTTP/1.1\r\nHost: %H\r\n%Z\r\nContent-Length: 3\r\n\r\nabc" SECOND, 400,
     0},
    {"a zero in a name", "GET /api/health HTTP/1.1\r\nHost: %H\r\nX%Z: a\r\n\r\n" SECOND, 400, 0},
    {"a zero in a value", "GET /api/health HTTP/1.1\r\nHost: %H%Z.evil.example\r\n\r\n" SECOND, 400, 0},
    {"a zero in an address, raw", "GET /api/health%Zx HTTP/1.1\r\nHost: %H\r\n\r\n" SECOND, 400, 0},
    {"CR alone in an address", "GET /api/health?\rx=1 HTTP/1.1\r\nHost: %H\r\n\r\n" SECOND, 400, 0},
    {"a method that is none", "GE(T) /api/health HTTP/1.1\r\nHost: %H\r\n\r\n" SECOND, 400, 0},
    {"a tab in a method", "X\tGET /api/health HTTP/1.1\r\nHost: %H\r\n\r\n" SECOND, 400, 0},
    {"two blanks", "GET  /api/health HTTP/1.1\r\nHost: %H\r\n\r\n" SECOND, 400, 0},
    {"three words", "GET /api/health x HTTP/1.1\r\nHost: %H\r\n\r\n" SECOND, 400, 0},
    {"HTTP/0.9", "GET /api/health\r\nHost: %H\r\n\r\n" SECOND, 400, 0},
    {"HTTP/2", "GET /api/health HTTP/2.0\r\nHost: %H\r\n\r\n" SECOND, 505, 400},
    {"CONNECT", "CONNECT evil.example:80 HTTP/1.1\r\nHost: %H\r\n\r\n" SECOND, 400, 405},
    {"a line without a colon", "GET /api/health HTTP/1.1\r\nHost: %H\r\nnothing\r\n\r\n" SECOND, 400, 0},
    {"no length after its name", "POST /api/settings HTTP/1.1\r\nHost: %H\r\nContent-Length: \r\n\r\n" SECOND, 400, 0},
    {"a length beyond 2^64",
     "POST /api/settings HTTP/1.1\r\nHost: %H\r\nContent-Length: 18446744073709551617\r\n\r\nx" SECOND, 413, 400},
};

/* Chunks whose size is none, or not that of what follows */
#define CHUNKS "POST /api/settings HTTP/1.1\r\nHost: %H\r\nTransfer-Encoding: chunked\r\n\r\n"
#define NO_CHUNK(what, chunk)                                                                                          \
    { what, CHUNKS chunk "\r\n0\r\n\r\n" SECOND, 400, 413 }
static const Case chunked[] = {
    NO_CHUNK("0x", "0x3\r\nabc"),
    NO_CHUNK("plus", "+3\r\nabc"),
    NO_CHUNK("minus", "-3\r\nabc"),
    NO_CHUNK("a blank in front", " 3\r\nabc"),
    NO_CHUNK("a blank behind", "3 \r\nabc"),
    NO_CHUNK("no digit", "\r\nabc"),
    NO_CHUNK("no number", "x\r\nabc"),
    NO_CHUNK("more than is said", "2\r\nabc"),
    NO_CHUNK("no line behind", "3\r\nabcd"),
    NO_CHUNK("2^64", "10000000000000003\r\nabc"),
    NO_CHUNK("17 digits", "fffffffffffffffff\r\nabc"),
    NO_CHUNK("LF in an extension", "3;a\nb\r\nabc"),
};

static const Case foreign[] = {
    {"another name", "GET /api/health HTTP/1.1\r\nHost: evil.example\r\n" END, 403, 403},
    {"another port", "GET /api/health HTTP/1.1\r\nHost: 127.0.0.1:1\r\n" END, 403, 403},
    {"no port", "GET /api/health HTTP/1.1\r\nHost: 127.0.0.1\r\n" END, 403, 403},
    {"a name that ends in ours", "GET /api/health HTTP/1.1\r\nHost: x%H\r\n" END, 403, 403},
    {"a name that begins with ours", "GET /api/health HTTP/1.1\r\nHost: %H0\r\n" END, 403, 400},
    {"another loopback", "GET /api/health HTTP/1.1\r\nHost: 127.0.0.2\r\n" END, 403, 403},
    {"a user in front", "GET /api/health HTTP/1.1\r\nHost: a@%H\r\n" END, 400, 403},
    {"an empty host", "GET /api/health HTTP/1.1\r\nHost: \r\n" END, 400, 403},
    {"a page from elsewhere", "GET /api/health HTTP/1.1\r\nHost: %H\r\nOrigin: http://evil.example\r\n" END, 403, 403},
    {"a sandbox", "GET /api/health HTTP/1.1\r\nHost: %H\r\nOrigin: null\r\n" END, 403, 403},
    {"https of ours", "GET /api/health HTTP/1.1\r\nHost: %H\r\nOrigin: https://%H\r\n" END, 403, 403},
    {"no origin after its name", "GET /api/health HTTP/1.1\r\nHost: %H\r\nOrigin: \r\n" END, 403, 403},
    {"an origin that begins with ours",
     "GET /api/health HTTP/1.1\r\nHost: %H\r\nOrigin: http://%H.evil.example\r\n" END, 403, 403},
    {"an origin with a path", "GET /api/health HTTP/1.1\r\nHost: %H\r\nOrigin: http://%H/\r\n" END, 403, 403},
    {"another port's page", "GET /api/health HTTP/1.1\r\nHost: %H\r\nOrigin: http://127.0.0.1:1\r\n" END, 403, 403},
    {"a list of origins", "GET /api/health HTTP/1.1\r\nHost: %H\r\nOrigin: http://%H http://%H\r\n" END, 403, 403},
    {"a file's page", "GET /api/health HTTP/1.1\r\nHost: %H\r\nOrigin: file://\r\n" END, 403, 403},
    {"whether a page from elsewhere may",
     "OPTIONS /api/jobs HTTP/1.1\r\nHost: %H\r\nOrigin: http://evil.example\r\nAccess-Control-Request-Method: "
     "POST\r\n" END,
     403, 403},
    {"a job from elsewhere",
     "POST /api/jobs HTTP/1.1\r\nHost: %H\r\nOrigin: http://evil.example\r\nContent-Type: text/plain\r\n"
     "Content-Length: 17\r\n" END "{\"kind\":\"sample\"}",
     403, 403},
    {"what a page from elsewhere cancels",
     "DELETE /api/jobs/AAAAAAAAAAAAAAAAAAAAAA HTTP/1.1\r\nHost: %H\r\nOrigin: null\r\n" END, 403, 403},
    {"two origins", "GET /api/health HTTP/1.1\r\nHost: %H\r\nOrigin: http://%H\r\nOrigin: http://%H\r\n" END, 403, 403},
    {"even for what is not there", "GET /nothing HTTP/1.1\r\nHost: %H\r\nOrigin: null\r\n" END, 403, 403},
    {"even for the page's files", "GET /page.js HTTP/1.1\r\nHost: evil.example\r\n" END, 403, 403},
    {"what is not there", "GET /nothing HTTP/1.1\r\nHost: %H\r\n" END, 404, 404},
    {"a folder above", "GET /../README.md HTTP/1.1\r\nHost: %H\r\n" END, 404, 404},
    {"the same, escaped", "GET /%2e%2e/README.md HTTP/1.1\r\nHost: %H\r\n" END, 404, 404},
    {"another method", "DELETE /api/health HTTP/1.1\r\nHost: %H\r\n" END, 405, 405},
    {"a method nobody knows", "BREW /api/health HTTP/1.1\r\nHost: %H\r\n" END, 405, 405},
    {"what may be done", "OPTIONS /api/models HTTP/1.1\r\nHost: %H\r\n" END, 405, 405},
    {"signing in without a token",
     "POST /sign-in HTTP/1.1\r\nHost: %H\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: "
     "7\r\n" END "token=x",
     404, 404},
    {"an encoded body",
     "POST /api/settings HTTP/1.1\r\nHost: %H\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n" END "x", 415, 415},
};

static const Case fine[] = {
    {"a name", "GET /api/health HTTP/1.1\r\nHost: %H\r\n" END, 200, 200},
    {"an origin", "GET /api/health HTTP/1.1\r\nHost: %H\r\nOrigin: http://%H\r\n" END, 200, 200},
    {"HTTP/1.0", "GET /api/health HTTP/1.0\r\nHost: %H\r\n\r\n", 200, 200},
    {"an escaped letter", "GET /api/healt%68 HTTP/1.1\r\nHost: %H\r\n" END, 200, 200},
    {"a body that nobody reads", "GET /api/health HTTP/1.1\r\nHost: %H\r\nContent-Length: 3\r\n" END "abc", 200, 200},
    {"HEAD", "HEAD /api/models HTTP/1.1\r\nHost: %H\r\n" END, 200, 200},
    {"the page", "GET / HTTP/1.1\r\nHost: %H\r\n" END, 200, 200},
    {"the page with a query", "GET /?x=1 HTTP/1.1\r\nHost: %H\r\n" END, 200, 200},
    {"its colours", "GET /page.css HTTP/1.1\r\nHost: %H\r\n" END, 200, 200},
    {"its script", "GET /page.js HTTP/1.1\r\nHost: %H\r\n" END, 200, 200},
    {"any etag", "GET / HTTP/1.1\r\nHost: %H\r\nIf-None-Match: *\r\n" END, 304, 304},
    {"another etag", "GET / HTTP/1.1\r\nHost: %H\r\nIf-None-Match: \"a\", W/\"b\"\r\n" END, 200, 200},
};

static void run_cases(const Case *c, size_t n, int must_close) {
    for (size_t i = 0; i < n; i++) {
        const Answer a = ask_for(c[i].request, 5);
        const int right = a.status == c[i].status || a.status == c[i].or_status;
        const int once = a.served <= 1 && (!must_close || (a.closed && a.served == 0));
        test_note(right && once, __FILE__, __LINE__, c[i].what);
        if (!right || !once)
            printf("     status %d, %d served, %s\n", a.status, a.served, a.closed ? "closed" : "open");
        const int is_library = a.status >= 400 && a.body && strstr(a.body, "<html><head>");
        if (a.head && !has_header(&a, "X-Content-Type-Options: nosniff") && a.status != 400 && !is_library)
            test_note(0, __FILE__, __LINE__, c[i].what), printf("     %s\n", a.body ? a.body : "");
    }
}
#define CASES(list, must_close) run_cases(list, sizeof list / sizeof *list, must_close)

/* A body that is too long is refused with an answer, whether its length is told or not. */
static void long_bodies(void) {
    enum { MANY = 40 << 20 };
    char *bytes = calloc(1, MANY), head[256];
    const size_t n = fill(head, "POST /api/settings HTTP/1.1\r\nHost: %H\r\nContent-Length: 41943040\r\n" END);
    int fd = dial();
    put(fd, head, n);
    put(fd, bytes, MANY);
    Answer a = hear(fd, 10);
    CHECK(a.status == 413);
    close(fd);
    fd = dial();
    put(fd, head, fill(head, "POST /api/settings HTTP/1.1\r\nHost: %H\r\nTransfer-Encoding: chunked\r\n" END));
    put(fd, "2800000\r\n", 9);
    put(fd, bytes, MANY);
    put(fd, "\r\n0\r\n\r\n", 7);
    a = hear(fd, 10);
    CHECK(a.status == 413);
    close(fd);
    free(bytes);
    a = ask_for("POST /api/settings HTTP/1.1\r\nHost: %H\r\nContent-Length: 99999999999\r\n" END, 5);
    CHECK(a.status == 413 && a.closed);
}

/* What is longer than there is room for: refused or closed, nothing is served. */
static void long_heads(void) {
    enum { MANY = 200000 };
    static const struct {
        const char *what, *front, *fill, *back;
    } heads[] = {
        {"a long value", "GET /api/health HTTP/1.1\r\nHost: %H\r\nX: ", "a", "\r\n" END},
        {"a long address", "GET /api/health?", "a", " HTTP/1.1\r\nHost: %H\r\n" END},
        {"a long method", "", "A", " /api/health HTTP/1.1\r\nHost: %H\r\n" END},
        {"many lines", "GET /api/health HTTP/1.1\r\nHost: %H\r\n", "X: a\r\n", END},
        {"many cookies", "GET /api/health HTTP/1.1\r\nHost: %H\r\nCookie: ", "a=b; ", "\r\n" END},
        {"many empty lines in front", "", "\r\n", "GET /api/health HTTP/1.1\r\nHost: %H\r\nX: a\nb: c\r\n" END},
    };
    char *text = malloc(2 * MANY), *sent = malloc(2 * MANY);
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) {
        char *to = text + sprintf(text, "%s", heads[i].front);
        while (to < text + MANY) to += sprintf(to, "%s", heads[i].fill);
        strcpy(to, heads[i].back);
        const int fd = dial();
        put(fd, sent, fill(sent, text));
        const Answer a = hear(fd, 12);
        if (!test_note(a.closed && !a.served && (a.status == 0 || a.status >= 400), __FILE__, __LINE__, heads[i].what))
            printf("     status %d, %d served, %s\n", a.status, a.served, a.closed ? "closed" : "open");
        close(fd);
    }
    free(text), free(sent);
}

/* Requests that end too early get nothing, those that come a byte at a time their answer. */
static void broken_off(void) {
    static const char whole[] =
        "POST /api/settings HTTP/1.1\r\nHost: %H\r\nContent-Length: 6\r\nConnection: close\r\n\r\nGIF89a";
    char text[256];
    const size_t n = fill(text, whole);
    for (size_t cut = 1; cut < n; cut += cut + 8 < n ? 7 : 1) {
        const int fd = dial();
        put(fd, text, cut);
        shutdown(fd, SHUT_WR);
        const Answer a = hear(fd, 5);
        if (!CHECK(a.closed && !a.served && a.status != 415)) printf("     %zu of %zu bytes: %d\n", cut, n, a.status);
        close(fd);
    }
    const int fd = dial();
    for (size_t i = 0; i < n; i++) put(fd, text + i, 1), usleep(2000);
    const Answer a = hear(fd, 5);
    CHECK(a.status == 415 && a.closed);
    close(fd);
}

/* A head that does not come to its end is waited for 10 s; others are answered meanwhile. */
static const double HEAD_SECONDS = 10;
static void late_head(int fd, double since) {
    const Answer a = hear(fd, HEAD_SECONDS + 3);
    const double took = seconds() - since;
    if (!CHECK(a.closed && !a.served && took > HEAD_SECONDS - 0.5 && took < HEAD_SECONDS + 2))
        printf("     %s after %.1f s\n", a.closed ? "closed" : "open", took);
    close(fd);
}

static void test_http(void) {
    const double since = seconds();
    const int late[2] = {dial(), dial()};
    put(late[0], "GET /api/health HTTP/1.1\r\nX: ", 30);
    CASES(smuggled, 1);
    CASES(chunked, 1);
    broken_off();
    late_head(late[0], since);
    late_head(late[1], since);
    long_heads();
    CASES(foreign, 0);
    CASES(fine, 0);
    Answer a = ask_for("OPTIONS /api/health HTTP/1.1\r\nHost: %H\r\n" END, 5);
    CHECK(has_header(&a, "\r\nAllow: GET, HEAD"));
    a = ask_for("GET / HTTP/1.1\r\nHost: %H\r\n" END, 5);
    CHECK(has_header(&a, "Content-Security-Policy: default-src 'self'; img-src 'self' blob: data:; frame-ancestors "
                         "'none'; base-uri 'none'; form-action 'self'"));
    CHECK(has_header(&a, "ETag: \""));
    a = ask_for("GET /api/health HTTP/1.1\r\nHost: LocalHost:1\r\n" END, 5);
    CHECK(a.status == 403);
    a = ask_for("GET /api/health HTTP/1.1\r\nHost: %H\r\n" END, 5);
    CHECK(has_header(&a, "Cache-Control: no-store") && has_header(&a, "Cross-Origin-Resource-Policy: same-origin"));
    long_bodies();
}

static void test_version(const char *expected) {
    Answer a = ask_for("GET /api/health HTTP/1.1\r\nHost: %H\r\n" END, 5);
    cJSON *x = a.status == 200 ? cJSON_Parse(a.body) : NULL;
    const char *version = cJSON_GetStringValue(cJSON_GetObjectItem(x, "version"));
    if (!CHECK(version && strlen(expected) >= 7 && !strcmp(version, expected)))
        printf("     %s, expected %s\n", version ? version : "none", expected);
    cJSON_Delete(x);
}

/* ---- With a token ---- */

static const Case tokens[] = {
    {"none", "GET /api/health HTTP/1.1\r\nHost: %H\r\n" END, 401, 401},
    {"wrong", "GET /api/health HTTP/1.1\r\nHost: %H\r\nAuthorization: Bearer sesamE\r\n" END, 401, 401},
    {"too short", "GET /api/health HTTP/1.1\r\nHost: %H\r\nAuthorization: Bearer sesam\r\n" END, 401, 401},
    {"too long", "GET /api/health HTTP/1.1\r\nHost: %H\r\nAuthorization: Bearer sesamesesame\r\n" END, 401, 401},
    {"empty", "GET /api/health HTTP/1.1\r\nHost: %H\r\nAuthorization: Bearer \r\n" END, 401, 401},
    {"another scheme", "GET /api/health HTTP/1.1\r\nHost: %H\r\nAuthorization: Basic sesame\r\n" END, 401, 401},
    {"a cookie that is the token", "GET /api/health HTTP/1.1\r\nHost: %H\r\nCookie: imagebart=sesame\r\n" END, 401,
     401},
    {"before what is not there", "GET /nothing HTTP/1.1\r\nHost: %H\r\n" END, 401, 401},
    {"before another method", "DELETE /api/health HTTP/1.1\r\nHost: %H\r\n" END, 401, 401},
    {"right", "GET /api/health HTTP/1.1\r\nHost: %H\r\nAuthorization: Bearer sesame\r\n" END, 200, 200},
    {"any host then", "GET /api/health HTTP/1.1\r\nHost: art.example\r\nAuthorization: bearer sesame\r\n" END, 200,
     200},
    {"any host, its own origin",
     "GET /api/health HTTP/1.1\r\nHost: art.example\r\nOrigin: http://art.example\r\nAuthorization: Bearer "
     "sesame\r\n" END,
     200, 200},
    {"the origin that was allowed",
     "GET /api/health HTTP/1.1\r\nHost: %H\r\nOrigin: https://page.example\r\nAuthorization: Bearer sesame\r\n" END,
     200, 200},
    {"another origin",
     "GET /api/health HTTP/1.1\r\nHost: %H\r\nOrigin: https://page.example.org\r\nAuthorization: Bearer sesame\r\n" END,
     403, 403},
    {"the page", "GET / HTTP/1.1\r\nHost: %H\r\n" END, 401, 401},
    {"the page's colours", "GET /page.css HTTP/1.1\r\nHost: %H\r\n" END, 200, 200},
    {"the page's script", "GET /page.js HTTP/1.1\r\nHost: %H\r\n" END, 200, 200},
    {"a wrong form",
     "POST /sign-in HTTP/1.1\r\nHost: %H\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: "
     "7\r\n" END "token=x",
     401, 401},
    {"no field",
     "POST /sign-in HTTP/1.1\r\nHost: %H\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: "
     "8\r\n" END "tok=seas",
     401, 401},
    {"no form",
     "POST /sign-in HTTP/1.1\r\nHost: %H\r\nContent-Type: application/json\r\nContent-Length: 12\r\n" END
     "token=sesame",
     415, 415},
    {"a form from elsewhere",
     "POST /sign-in HTTP/1.1\r\nHost: %H\r\nOrigin: https://evil.example\r\nContent-Type: "
     "application/x-www-form-urlencoded\r\nContent-Length: 12\r\n" END "token=sesame",
     403, 403},
};

static void test_token(void) {
    char request[1024], cookie[256] = "";
    CASES(tokens, 0);
    Answer a = ask_for("GET /api/health HTTP/1.1\r\nHost: %H\r\n" END, 5);
    CHECK(has_header(&a, "WWW-Authenticate: Bearer") && has_header(&a, "application/json"));
    a = ask_for("GET / HTTP/1.1\r\nHost: %H\r\n" END, 5);
    CHECK(has_header(&a, "text/html") && has_header(&a, "Content-Security-Policy") &&
          strstr(a.body, "action=\"sign-in\""));
    a = ask_for("POST /sign-in HTTP/1.1\r\nHost: %H\r\nContent-Type: application/x-www-form-urlencoded; "
                "charset=utf-8\r\nContent-Length: 18\r\n" END "x=1&token=s%65same",
                5);
    CHECK(a.status == 303 && has_header(&a, "Location: ./\r\n") &&
          has_header(&a, "; Path=/; SameSite=Strict; HttpOnly"));
    const char *set = a.head ? strstr(a.head, "Set-Cookie: ") : NULL;
    if (CHECK(set != NULL)) snprintf(cookie, sizeof cookie, "%.*s", (int)strcspn(set + 12, ";"), set + 12);
    CHECK(strlen(cookie) > 32 && !strstr(cookie, "sesame"));
    snprintf(request, sizeof request, "GET /api/health HTTP/1.1\r\nHost: %%H\r\nCookie: a=b; %s\r\n" END, cookie);
    CHECK(ask_for(request, 5).status == 200);
    cookie[strlen(cookie) - 1] ^= 1;
    snprintf(request, sizeof request, "GET /api/health HTTP/1.1\r\nHost: %%H\r\nCookie: %s\r\n" END, cookie);
    CHECK(ask_for(request, 5).status == 401);
}

/* ---- Calls ---- */

/* Chunks to a body */
static void join_chunks(Answer *a) {
    char *from = a->body, *to = a->body, *end = a->body + a->size;
    while (from < end) {
        char *line;
        const size_t n = strtoul(from, &line, 16);
        if (n == 0 || line + 2 + n > end) break;
        memmove(to, line + 2, n);
        to += n, from = line + 2 + n + 2;
    }
    *to = 0;
    a->size = (size_t)(to - a->body);
}

static Answer call(const char *method, const char *path, const char *headers, const void *body, size_t size) {
    char head[2048];
    const int fd = dial();
    const int n =
        snprintf(head, sizeof head,
                 "%s /%s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: close\r\n%sContent-Length: %zu\r\n\r\n", method,
                 path, port, headers, size);
    put(fd, head, (size_t)n);
    put(fd, body, size);
    Answer a = hear(fd, 60);
    if (has_header(&a, "Transfer-Encoding: chunked")) join_chunks(&a);
    close(fd);
    return a;
}

static Answer get(const char *path) {
    return call("GET", path, "", "", 0);
}

static Answer post(const char *job) {
    return call("POST", "api/jobs", "Content-Type: application/json\r\n", job, strlen(job));
}

/* A job that must be taken: its id, and its place in the queue. */
static int taken(char id[32], const Answer *a) {
    char location[64];
    cJSON *x = a->status == 202 ? cJSON_Parse(a->body) : NULL;
    const char *text = cJSON_GetStringValue(cJSON_GetObjectItem(x, "id"));
    const cJSON *place = cJSON_GetObjectItem(x, "place");
    snprintf(id, 32, "%s", text ? text : "");
    snprintf(location, sizeof location, "Location: jobs/%s\r\n", id);
    if (!CHECK(text && strlen(text) == 22 && cJSON_IsNumber(place) && has_header(a, location)))
        printf("     %d %s\n", a->status, a->body ? a->body : "");
    const int at = place ? place->valueint : -1;
    cJSON_Delete(x);
    return at;
}

static Answer of_job(const char *id, const char *what) {
    char path[128];
    snprintf(path, sizeof path, "api/jobs/%s%s", id, what);
    return get(path);
}

/* The events of a job as text, from after the one of that number on; waits for its end. */
static char *events_of(const char *id, const char *after) {
    char path[128], header[128] = "";
    snprintf(path, sizeof path, "api/jobs/%s/events", id);
    if (after) snprintf(header, sizeof header, "Last-Event-ID: %s\r\n", after);
    Answer a = call("GET", path, header, "", 0);
    CHECK(a.status == 200 && has_header(&a, "text/event-stream"));
    return strdup(a.body ? a.body : "");
}

static size_t count_of(const char *text, const char *what) {
    size_t n = 0;
    for (const char *p = text; (p = strstr(p, what)); p++) n++;
    return n;
}

static cJSON *state_of(const char *id) {
    Answer a = of_job(id, "");
    return a.status == 200 ? cJSON_Parse(a.body) : NULL;
}

static int is_state(const char *id, const char *state) {
    cJSON *x = state_of(id);
    const char *found = cJSON_GetStringValue(cJSON_GetObjectItem(x, "state"));
    const int same = found && !strcmp(found, state);
    if (!same) printf("     state %s, expected %s\n", found ? found : "none", state);
    cJSON_Delete(x);
    return same;
}

/* Is the body the file DIR/name? */
static int same_file(const Answer *a, const char *dir, const char *name) {
    char path[PATH_BYTES];
    uint8_t *bytes;
    size_t n;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    if (file_bytes(&bytes, &n, path, 1 << 28, NULL) != OK) return 0;
    const int same = a->status == 200 && n == a->size && !memcmp(bytes, a->body, n);
    free(bytes);
    return same;
}

/* Runs the command that the job shows, in DIR, with more options. */
static int run_command_with(const char *dir, const char *id, const char *more) {
    char line[PATH_BYTES + 4096];
    cJSON *x = state_of(id);
    const char *command = cJSON_GetStringValue(cJSON_GetObjectItem(x, "command"));
    snprintf(line, sizeof line, "cd '%s' && %s%s >command.log 2>&1", dir, command ? command : "false", more);
    const int ok = system(line) == 0;
    if (!ok) printf("     %s\n", line);
    cJSON_Delete(x);
    return ok;
}

static int run_command(const char *dir, const char *id) {
    return run_command_with(dir, id, "");
}

/* ---- What jobs are refused ---- */

typedef struct {
    const char *job;
    int status;
    const char *field; /* NULL: none */
} JobCase;
#define S "{\"kind\":\"sample\","
#define E "{\"kind\":\"inpaint\",\"image\":\"iVBORw0KGgo=\","
static const JobCase refused[] = {
    {"", 400, NULL},
    {"{}", 400, "kind"},
    {"[]", 400, NULL},
    {"\"sample\"", 400, NULL},
    {"{\"kind\":\"vary\"}", 400, "kind"},
    {"{\"kind\":null}", 400, "kind"},
    {"{\"kind\":\"Sample\"}", 400, "kind"},
    {"{\"kind\":\"sample\"} x", 400, NULL},
    {"{\"kind\":\"sample\",}", 400, NULL},
    {"{'kind':'sample'}", 400, NULL},
    {"\xef\xbb\xbf{\"kind\":\"sample\"}", 400, NULL},
    {S "\"count\":NaN}", 400, NULL},
    {S "\"count\":01}", 400, NULL},
    {S "\"count\":1.}", 400, NULL},
    {S "\"count\":+1}", 400, NULL},
    {S "\"class\":\"\xff\"}", 400, NULL},
    {S "\"class\":\"\xc0\x80\"}", 400, NULL},
    {S "\"class\":\"\\ud800\"}", 400, NULL},
    {S "\"class\":\"\\udc00\\ud800\"}", 400, NULL},
    {S "\"class\":\"\\u0000\"}", 400, NULL},
    {S "\"class\":\"a\nb\"}", 400, NULL},
    {S "\"count\":1,\"count\":1}", 400, "count"},
    {S "\"c\\u006funt\":1,\"count\":1}", 400, "count"},
    {S "\"x\":[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]}", 400, NULL},
    {S "\"colour\":1}", 400, "colour"},
    {S "\"image\":\"AAAA\"}", 400, "image"},
    {S "\"window\":24}", 400, "window"},
    {S "\"count\":0}", 400, "count"},
    {S "\"count\":-1}", 400, "count"},
    {S "\"count\":1.5}", 400, "count"},
    {S "\"count\":\"1\"}", 400, "count"},
    {S "\"count\":null}", 400, "count"},
    {S "\"count\":41}", 413, "count"},
    {S "\"count\":1e300}", 413, "count"},
    {S "\"first\":-1}", 400, "first"},
    {S "\"first\":2147483648}", 400, "first"},
    {S "\"seed\":9007199254740992}", 400, "seed"},
    {S "\"seed\":-1}", 400, "seed"},
    {S "\"seed\":\"7\"}", 400, "seed"},
    {S "\"best_of\":0}", 400, "best_of"},
    {S "\"best_of\":65}", 400, "best_of"},
    {S "\"temperature\":\"x\"}", 400, "temperature"},
    {S "\"temperature\":1001}", 400, "temperature"},
    {S "\"temperature\":[1,\"x\",1]}", 400, "temperature[1]"},
    {S "\"temperature\":[1,1,-1]}", 400, "temperature[2]"},
    {S "\"temperature\":[1,1]}", 400, "temperature"},
    {S "\"temperature\":[]}", 400, "temperature"},
    {S "\"temperature\":[1,1,1,1]}", 400, "temperature"},
    {S "\"top_k\":1.5}", 400, "top_k"},
    {S "\"top_k\":[0,0,1000000001]}", 400, "top_k[2]"},
    {S "\"chain_length\":0}", 400, "chain_length"},
    {S "\"chain_length\":[1,1001,1]}", 400, "chain_length[1]"},
    {S "\"guidance\":[1,1,2]}", 422, "guidance[2]"},
    {S "\"guidance\":{}}", 400, "guidance"},
    {S "\"class\":\"spoons\"}", 422, "class"},
    {S "\"class\":\"9\"}", 422, "class"},
    {S "\"class\":\"00000000001\"}", 422, "class"},
    {S "\"class\":\"\"}", 422, "class"},
    {S "\"class\":3}", 400, "class"},
    {S "\"model\":\"nothing\"}", 422, "model"},
    {S "\"model\":\"ffhq\"}", 422, "model"},
    {S "\"model\":\"../emoji\"}", 422, "model"},
    {S "\"model\":null}", 400, "model"},
    {S "\"previews\":1}", 400, "previews"},
    {S "\"owned\":\"yes\"}", 400, "owned"},
    {"{\"kind\":\"inpaint\"}", 400, "image"},
    {"{\"kind\":\"inpaint\",\"image\":\"%\"}", 400, "image"},
    {"{\"kind\":\"inpaint\",\"image\":\"AAA\"}", 400, "image"},
    {"{\"kind\":\"inpaint\",\"image\":\"AA==AAAA\"}", 400, "image"},
    {"{\"kind\":\"inpaint\",\"image\":\"AB==\"}", 400, "image"},
    {"{\"kind\":\"inpaint\",\"image\":\"AA A=\"}", 400, "image"},
    {"{\"kind\":\"inpaint\",\"image\":7}", 400, "image"},
    {E "\"best_of\":1}", 400, "mask"},
    {E "\"half\":\"upper\",\"window\":8}", 400, "window"},
    {E "\"half\":\"middle\"}", 400, "half"},
    {E "\"window\":64}", 400, "window"},
    {E "\"window\":0}", 400, "window"},
    {E "\"outside\":64}", 400, "outside"},
    {E "\"extend\":64}", 400, "extend"},
    {E "\"extend\":0}", 400, "extend"},
    {E "\"extend\":32,\"half\":\"upper\"}", 400, "extend"},
    {E "\"extend\":32,\"paste\":true}", 400, "paste"},
    {S "\"extend\":32}", 400, "extend"},
    {E "\"half\":\"upper\",\"chain_length\":0}", 400, "chain_length"},
    {E "\"half\":\"upper\",\"chain_length\":[0,0,0]}", 400, "chain_length"},
    {E "\"half\":\"upper\",\"best_of\":4097}", 400, "best_of"},
    {E "\"half\":\"upper\",\"paste\":0}", 400, "paste"},
    {E "\"half\":\"upper\",\"from_scale\":2}", 400, "from_scale"},
    {E "\"half\":\"upper\"}", 415, "image"},
    {"{\"kind\":\"inpaint\",\"image\":\"AAAA\",\"half\":\"upper\"}", 415, "image"},
};

static void test_refused(void) {
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        const Answer a = post(refused[i].job);
        cJSON *x = a.body ? cJSON_Parse(a.body) : NULL;
        const char *field = cJSON_GetStringValue(cJSON_GetObjectItem(x, "field"));
        const char *text = cJSON_GetStringValue(cJSON_GetObjectItem(x, "error"));
        const int same = refused[i].field ? field && !strcmp(field, refused[i].field) : !field;
        if (!test_note(a.status == refused[i].status && same && text && !strstr(text, "models/"), __FILE__, __LINE__,
                       refused[i].job))
            printf("     %d, field %s: %s\n", a.status, field ? field : "none", text ? text : "no error");
        cJSON_Delete(x);
    }
    Answer a = post(S "\"temperature\":\"'\\u001b[31m\xc3\xa4"
                      "0123456789012345678901234567890123456789012345678901234567890\"}");
    CHECK(strstr(a.body, "\\\\'\\\\x1b[31m\xc3\xa4") && strstr(a.body, "...") && !strstr(a.body, "67890'"));
    a = call("POST", "api/jobs", "Content-Type: text/plain\r\n", "{}", 2);
    CHECK(a.status == 415);
    char *many = malloc(40000), *to = many + sprintf(many, S "\"temperature\":[1");
    for (int k = 0; k < 5000; k++) to += sprintf(to, ",1");
    sprintf(to, "]}");
    a = post(many);
    CHECK(a.status == 400);
    free(many);
    a = of_job("AAAAAAAAAAAAAAAAAAAAAA", "");
    CHECK(a.status == 404);
    a = of_job("AAAAAAAAAAAAAAAAAAAAAA", "/events");
    CHECK(a.status == 404);
}

/* ---- The chain ---- */

enum { STEPS = 4, TOKENS = 64 }; /* of emoji */

static double item(const cJSON *x, const char *list, int i) {
    const cJSON *found = cJSON_GetArrayItem(cJSON_GetObjectItem(x, list), i);
    return cJSON_IsNumber(found) ? found->valuedouble : NAN;
}

/* q (K) = q(x_{t-1} | x_t, x_0) by going from x_0 step by step through all K values, then weighing by q(x_t | x_{t-1}) */
static void step_by_step(double *q, size_t K, const double *beta, int t, size_t x0, size_t xt) {
    double sum = 0;
    for (size_t k = 0; k < K; k++) q[k] = k == x0;
    for (int s = 1; s < t; s++)
        for (size_t k = 0; k < K; k++) q[k] = (1 - beta[s]) * q[k] + beta[s] / (double)K;
    for (size_t k = 0; k < K; k++) sum += q[k] *= (1 - beta[t]) * (k == xt) + beta[t] / (double)K;
    for (size_t k = 0; k < K; k++) q[k] /= sum;
}

/* Step t of a chain: what is told of each token is what follows from the tokens and the betas. */
static void check_step(const cJSON *x, int t, const double *beta, size_t K, const cJSON *x0) {
    double *q = malloc(K * sizeof *q), worst = 0;
    int changed = 0, others = 0;
    for (int i = 0; i < TOKENS; i++) {
        const size_t at = (size_t)item(x, "before", i), clean = (size_t)item(x0, "tokens", i);
        const double told[3] = {item(x, "at_xt", i), item(x, "at_x0", i), item(x, "elsewhere", i)};
        step_by_step(q, K, beta, t, clean, at);
        const double rest = 1 - q[at] - (at == clean ? 0 : q[clean]);
        worst = fmax(worst, fmax(fabs(told[0] - q[at]), fmax(fabs(told[1] - q[clean]), fabs(told[2] - rest))));
        worst = isnan(told[0] + told[1] + told[2]) ? INFINITY : worst;
        changed += item(x, "before", i) != item(x, "tokens", i);
        others += at != clean;
    }
    CHECK(worst < 1e-6);
    CHECK(cJSON_GetObjectItem(x, "changed")->valueint == changed && (t == 1 || (changed > 0 && others > 0)));
    CHECK(cJSON_GetObjectItem(x, "scale")->valueint == t && item(x, "grid", 0) == 8 && item(x, "grid", 1) == 8);
    CHECK(fabs(cJSON_GetObjectItem(x, "beta")->valuedouble - beta[t]) < 1e-6);
    free(q);
}

/* The whole chain of picture k: each step begins where the one before ended, the last has the picture's tokens. */
static void check_chain(const char *id, int k) {
    char what[64];
    double beta[STEPS] = {0}, product = 1;
    Answer a = get("api/models");
    cJSON *all = cJSON_Parse(a.body), *step[STEPS] = {0};
    const cJSON *m = cJSON_GetArrayItem(cJSON_GetObjectItem(all, "models"), 0);
    for (int t = 1; t < STEPS; t++) {
        beta[t] = item(m, "betas", STEPS - 1 - t);
        product *= 1 - beta[t];
        CHECK(fabs(item(m, "alpha_bar", STEPS - 1 - t) - product) < 1e-6);
    }
    CHECK(beta[STEPS - 1] == 1 && cJSON_GetArraySize(cJSON_GetObjectItem(m, "betas")) == STEPS - 1);
    for (int t = 0; t < STEPS; t++) {
        snprintf(what, sizeof what, t ? "/%d.json?scale=%d" : "/%d.json", k, t);
        a = of_job(id, what);
        step[t] = a.status == 200 ? cJSON_Parse(a.body) : NULL;
        CHECK(cJSON_GetArraySize(cJSON_GetObjectItem(step[t], "tokens")) == TOKENS);
    }
    for (int t = 1; t < STEPS && step[t] && step[0]; t++) {
        CHECK(cJSON_Compare(cJSON_GetObjectItem(step[t], "tokens"),
                            cJSON_GetObjectItem(step[t - 1], t > 1 ? "before" : "tokens"), 1));
        check_step(step[t], t, beta, (size_t)cJSON_GetObjectItem(m, "codebook")->valueint, step[0]);
    }
    for (int t = 0; t < STEPS; t++) cJSON_Delete(step[t]);
    cJSON_Delete(all);
}

/* How many pixels of a job's picture differ from the tile at x0 of a grid. */
static size_t differ_from(const char *id, const char *what, const Image *grid, size_t x0) {
    Image im;
    size_t n = 0;
    Answer a = of_job(id, what);
    if (a.status != 200 || image_decode(&im, (const uint8_t *)a.body, a.size, 0) != OK) return SIZE_MAX;
    for (size_t y = 0; y < im.H; y++)
        for (size_t x = 0; x < im.W; x++)
            n += memcmp(im.rgb + 3 * (y * im.W + x), grid->rgb + 3 * (y * grid->W + x0 + x), 3) != 0;
    image_free(&im);
    return n;
}

/* One of four is kept: the steps are its own, as ./sample --chain draws them. */
static void test_chain(const char *dir) {
    static const char *const steps[STEPS] = {NULL, "/0.png?scale=3", "/0.png?scale=2", "/0.png?scale=1"};
    for (int seed = 1; seed <= 4; seed++) {
        char id[32], job[128], path[PATH_BYTES];
        Image grid;
        snprintf(job, sizeof job, S "\"seed\":%d,\"best_of\":4}", seed);
        Answer a = post(job);
        taken(id, &a);
        free(events_of(id, NULL));
        check_chain(id, 0);
        CHECK(run_command_with(dir, id, " --chain chain.png"));
        snprintf(path, sizeof path, "%s/chain.png", dir);
        if (!CHECK(image_read(&grid, path) == OK)) continue;
        for (int i = 1; i < STEPS; i++) CHECK(differ_from(id, steps[i], &grid, 66 * (size_t)i) == 0);
        CHECK(differ_from(id, "/0.png", &grid, 66 * 3) == 0 && differ_from(id, "/0.png", &grid, 66) > 0);
        image_free(&grid);
    }
}

/* ---- Jobs ---- */

/* The progress of a stream never goes backwards, scale by scale. */
static int is_monotone(const char *events) {
    int last_scale = 99, last_token = 0;
    for (const char *p = events; (p = strstr(p, "event: progress\ndata: ")); p++) {
        cJSON *x = cJSON_Parse(p + 22);
        const int scale = cJSON_GetObjectItem(x, "scale")->valueint, token = cJSON_GetObjectItem(x, "token")->valueint;
        const int of = cJSON_GetObjectItem(x, "tokens")->valueint;
        cJSON_Delete(x);
        if (scale > last_scale || (scale == last_scale && token < last_token) || token > of) return 0;
        last_scale = scale, last_token = token;
    }
    return last_scale == 1;
}

/* What was sent of a job that is done, again from any event on */
static void check_events(const char *id) {
    char *events = events_of(id, NULL);
    CHECK(!strncmp(events, "id: 1\nevent: queued\ndata: {\"place\":0}\n\n", 39));
    CHECK(count_of(events, "event: preview\n") == 6 && is_monotone(events));
    CHECK(count_of(events, "event: done\n") == 1 && strstr(events, "\"state\":\"done\""));
    char last[32] = "";
    for (const char *p = events; (p = strstr(p, "id: ")); p++)
        if (p == events || p[-1] == '\n') snprintf(last, sizeof last, "%.*s", (int)strcspn(p + 4, "\n"), p + 4);
    free(events);
    events = events_of(id, NULL);
    CHECK(count_of(events, "event: progress\n") == 1 && count_of(events, "event: preview\n") == 6);
    free(events);
    events = events_of(id, "1");
    CHECK(!strstr(events, "event: queued") && count_of(events, "event: done\n") == 1);
    free(events);
    events = events_of(id, "99999");
    CHECK(strstr(events, "event: queued") != NULL);
    free(events);
    char path[128], header[64];
    snprintf(path, sizeof path, "api/jobs/%s/events", id);
    snprintf(header, sizeof header, "Last-Event-ID: %s\r\n", last);
    CHECK(call("GET", path, header, "", 0).status == 204);
}

static void check_results(const char *id) {
    cJSON *x = state_of(id);
    const cJSON *job = cJSON_GetObjectItem(x, "job"), *results = cJSON_GetObjectItem(x, "results");
    char *guidance = cJSON_PrintUnformatted(cJSON_GetObjectItem(job, "guidance"));
    CHECK(guidance && !strcmp(guidance, "[2,2,1]")); /* the last scale has not learnt it */
    free(guidance);
    CHECK(cJSON_GetArraySize(results) == 2 && cJSON_IsNull(cJSON_GetObjectItem(x, "error")));
    const double bound = cJSON_GetObjectItem(cJSON_GetArrayItem(results, 1), "bound")->valuedouble;
    CHECK(bound < 0 && bound > -50);
    cJSON_Delete(x);
    const Answer a = of_job(id, "/1.json");
    x = cJSON_Parse(a.body);
    CHECK(cJSON_GetArraySize(cJSON_GetObjectItem(x, "tokens")) == 64 &&
          cJSON_GetArraySize(cJSON_GetObjectItem(x, "entropy")) == 64);
    CHECK(fabs(cJSON_GetObjectItem(x, "bound")->valuedouble - bound) < 1e-6);
    cJSON_Delete(x);
}

static void check_files(const char *id) {
    const struct {
        const char *file;
        int status;
    } files[] = {{"/0.png", 200},
                 {"/1.png", 200},
                 {"/2.png", 404},
                 {"/x.png", 404},
                 {"/0.gif", 404},
                 {"/0.png?scale=3", 200},
                 {"/1.png?scale=1", 200},
                 {"/0.png?scale=4", 404},
                 {"/0.png?scale=0", 404},
                 {"/0.png?scale=x", 400},
                 {"/0.png?scale=", 400},
                 {"/0.png?scale", 400},
                 {"/0.png?scale=1&scale=2", 400},
                 {"/0.png?scale=1&scale", 400},
                 {"/0.json?scale", 400},
                 {"/0.json?scale=1&scale=1", 400},
                 {"/2.json", 404},
                 {"/0.json?scale=0", 404},
                 {"/0.json?scale=4", 404},
                 {"/0.json?scale=x", 400},
                 {"/2.json?scale=1", 404}};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        test_note(of_job(id, files[i].file).status == files[i].status, __FILE__, __LINE__, files[i].file);
}

/* Previews change nothing; picture 1 alone is the command's file, byte for byte. */
static void check_alone(const char *dir, const char *id) {
    char one[32];
    Answer a =
        post(S "\"count\":1,\"first\":1,\"seed\":7,\"best_of\":1,\"class\":\"food\",\"chain_length\":2,\"guidance\":2,"
               "\"previews\":false}");
    taken(one, &a);
    char *events = events_of(one, NULL);
    CHECK(!strstr(events, "event: preview"));
    free(events);
    CHECK(of_job(one, "/0.png?scale=1").status == 404);
    CHECK(run_command(dir, one));
    a = of_job(one, "/0.png");
    CHECK(same_file(&a, dir, "samples.png"));
    Answer b = of_job(id, "/1.png");
    CHECK(same_file(&b, dir, "samples.png"));
}

/* A seed in a picture's text is digits, as the programs want it. */
static void check_seed_text(const char *seed, int status) {
    KeyValue kv[] = {{.key = (char *)"model", .value = (char *)"emoji"},
                     {.key = (char *)"seed", .value = (char *)(uintptr_t)seed}};
    uint8_t rgb[3] = {0}, *bytes;
    size_t n;
    CHECK_OK(image_encode_png(&bytes, &n, &(Image){.H = 1, .W = 1, .rgb = rgb}, &(Config){kv, 2, 2}));
    const Answer a = call("POST", "api/settings", "", bytes, n);
    if (!CHECK(a.status == status)) printf("     seed %s: %d\n", seed, a.status);
    free(bytes);
}

/* What a picture says is a job that draws it. */
static void check_settings(const char *id) {
    const Answer b = of_job(id, "/1.png");
    char *bytes = malloc(b.size);
    const size_t size = b.size;
    memcpy(bytes, b.body, size);
    Answer a = call("POST", "api/settings", "", bytes, size);
    CHECK(a.status == 200 && strstr(a.body, "\"first\":1") && strstr(a.body, "\"count\":1") &&
          strstr(a.body, "\"seed\":7"));
    a = call("POST", "api/settings", "", bytes, size / 2);
    CHECK(a.status == 415);
    free(bytes);
    a = call("POST", "api/settings", "", "GIF89a", 6);
    CHECK(a.status == 415);
    check_seed_text("1000", 200);
    check_seed_text("1e3", 422), check_seed_text("0x10", 422), check_seed_text("1.0", 422), check_seed_text("", 422);
}

static void test_sample(const char *dir) {
    char id[32], path[128];
    Answer a = post(S "\"count\":2,\"seed\":7,\"best_of\":1,\"class\":\"food\",\"chain_length\":2,\"guidance\":2}");
    CHECK(taken(id, &a) == 0);
    check_events(id);
    check_results(id);
    check_chain(id, 1);
    check_files(id);
    check_alone(dir, id);
    check_settings(id);
    snprintf(path, sizeof path, "api/jobs/%s", id);
    CHECK(call("DELETE", path, "", "", 0).status == 204 && get(path).status == 410 &&
          call("DELETE", path, "", "", 0).status == 410);
}

static double until_over(const char *id) {
    const double start = seconds();
    free(events_of(id, NULL));
    return seconds() - start;
}

/* One that runs and two that wait; more are refused; the first is cancelled on its way. */
static void test_queue(void) {
    char id[4][32], path[128];
    Answer a = post(S "\"count\":40,\"best_of\":16}");
    CHECK(taken(id[0], &a) == 0);
    for (int i = 0; i < 100 && !strstr(of_job(id[0], "").body, "\"running\""); i++) usleep(20000);
    a = post(S "\"count\":40,\"best_of\":16}");
    CHECK(taken(id[1], &a) == 1);
    a = post(S "\"count\":1,\"best_of\":1,\"seed\":1}");
    CHECK(taken(id[2], &a) == 2);
    a = post(S "\"count\":1}");
    CHECK(a.status == 429 && has_header(&a, "Retry-After: "));
    a = get("api/health");
    CHECK(strstr(a.body, "\"running\":1,\"queued\":2,\"most\":40") != NULL);
    CHECK(of_job(id[0], "/0.png").status == 404);
    snprintf(path, sizeof path, "api/jobs/%s", id[1]);
    CHECK(call("DELETE", path, "", "", 0).status == 204 && is_state(id[1], "cancelled"));
    cJSON *x = state_of(id[2]);
    CHECK(cJSON_GetObjectItem(x, "place")->valueint == 1);
    cJSON_Delete(x);
    usleep(300000);
    snprintf(path, sizeof path, "api/jobs/%s", id[0]);
    CHECK(call("DELETE", path, "", "", 0).status == 204);
    const double took = until_over(id[0]);
    CHECK(took < 1 && is_state(id[0], "cancelled"));
    char *events = events_of(id[2], NULL);
    CHECK(count_of(events, "event: queued\n") >= 2 && strstr(events, "event: done\n"));
    free(events);
}

/* ---- Edits ---- */

/* A picture of H x W with alpha where asked for, and a mask with a hole, as PNGs in memory */
static void make_pictures(Image *im, Image *mask, size_t H, size_t W, int with_alpha) {
    *im = (Image){.H = H, .W = W, .rgb = malloc(3 * H * W), .alpha = with_alpha ? malloc(H * W) : NULL};
    *mask = (Image){.H = H, .W = W, .rgb = malloc(3 * H * W)};
    for (size_t i = 0; i < H * W; i++) {
        const size_t y = i / W, x = i % W;
        im->rgb[3 * i] = (uint8_t)(x * 2), im->rgb[3 * i + 1] = (uint8_t)(y * 2), im->rgb[3 * i + 2] = (uint8_t)(x ^ y);
        if (with_alpha) im->alpha[i] = (uint8_t)(x * 7);
        const int hole = y >= H / 4 && y < H / 2 && x + 40 > W && x + 10 < W;
        memset(mask->rgb + 3 * i, hole ? 0 : 255, 3);
    }
}

static void write_file(const char *dir, const char *name, const uint8_t *bytes, size_t n) {
    char path[PATH_BYTES];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(bytes, n, 1, f) == 1 && fclose(f) == 0);
}

static Answer post_form(const char *job, const uint8_t *image, size_t n, const uint8_t *mask, size_t m) {
    char *body = malloc(n + m + 4096);
    size_t at = (size_t)sprintf(
        body,
        "--xYz\r\nContent-Disposition: form-data; name=\"job\"\r\n\r\n%s\r\n--xYz\r\n"
        "Content-Disposition: form-data; name=\"image\"; filename=\"../../a.png\"\r\nContent-Type: image/png\r\n\r\n",
        job);
    memcpy(body + at, image, n), at += n;
    if (mask) {
        at += (size_t)sprintf(body + at, "\r\n--xYz\r\nContent-Disposition: form-data; name=mask\r\n\r\n");
        memcpy(body + at, mask, m), at += m;
    }
    at += (size_t)sprintf(body + at, "\r\n--xYz--\r\n");
    Answer a = call("POST", "api/jobs", "Content-Type: multipart/form-data; boundary=xYz\r\n", body, at);
    free(body);
    return a;
}

static void test_edit(const char *dir, size_t H, size_t W, int with_alpha, const char *job) {
    Image im, mask, got = {0}, alpha = {0};
    uint8_t *image, *mask_bytes;
    size_t n, m, wrong = 0, changed = 0;
    char id[32];
    uint8_t p3[P3_BYTES];
    const Profile profile = {p3, P3_BYTES, NULL};
    Profile back;
    make_profile(p3, P3_BYTES, p3_primaries, CURVE_PARAMETRIC);
    make_pictures(&im, &mask, H, W, with_alpha);
    im.profile = with_alpha ? &profile : NULL;
    CHECK_OK(image_encode_png(&image, &n, &im, NULL));
    CHECK_OK(image_encode_png(&mask_bytes, &m, &mask, NULL));
    write_file(dir, "image.png", image, n), write_file(dir, "mask.png", mask_bytes, m);
    Answer a = post_form(job, image, n, mask_bytes, m);
    taken(id, &a);
    free(events_of(id, NULL));
    CHECK(is_state(id, "done") && run_command(dir, id));
    a = of_job(id, "/0.png");
    CHECK(same_file(&a, dir, "out.png"));
    for (int preview = 1; preview >= 0; preview--) {
        a = of_job(id, preview ? "/0.png?scale=1" : "/0.png");
        CHECK_OK(profile_read(&back, (const uint8_t *)a.body, a.size));
        CHECK(with_alpha ? back.size == P3_BYTES && !memcmp(back.bytes, p3, P3_BYTES) : back.size == 0);
        profile_free(&back);
    }
    CHECK_OK(image_decode(&got, (const uint8_t *)a.body, a.size, IMAGE_STRAIGHT));
    CHECK_OK(image_decode(&alpha, (const uint8_t *)a.body, a.size, IMAGE_ALPHA));
    CHECK(got.H == H && got.W == W);
    for (size_t i = 0; i < H * W && got.H == H && got.W == W; i++) {
        const int kept = mask.rgb[3 * i] == 255;
        if (kept)
            wrong +=
                memcmp(got.rgb + 3 * i, im.rgb + 3 * i, 3) != 0 || alpha.rgb[3 * i] != (with_alpha ? im.alpha[i] : 255);
        if (!kept) wrong += alpha.rgb[3 * i] != 255, changed += memcmp(got.rgb + 3 * i, im.rgb + 3 * i, 3) != 0;
    }
    CHECK(wrong == 0 && changed > 100);
    image_free(&im), image_free(&mask), image_free(&got), image_free(&alpha);
    free(image), free(mask_bytes);
}

/* Did the last command say this? */
static int system_says(const char *dir, const char *text) {
    char path[PATH_BYTES];
    uint8_t *bytes;
    size_t n;
    snprintf(path, sizeof path, "%s/command.log", dir);
    if (file_bytes(&bytes, &n, path, 1 << 20, NULL) != OK) return 0;
    const int found = memmem(bytes, n, text, strlen(text)) != NULL;
    free(bytes);
    return found;
}

/* A board of 8x8 squares is no emoji: the note says so in the words of ./inpaint. An emoji's is null. */
static void test_unlike(const char *dir) {
    static const char job[] =
        "{\"kind\":\"inpaint\",\"seed\":1,\"best_of\":1,\"chain_length\":[0,0,1],\"half\":\"upper\"}";
    Image board = {.H = 64, .W = 64, .rgb = malloc(3 * 64 * 64)};
    uint8_t *image;
    size_t n;
    char id[32];
    for (size_t i = 0; i < 64 * 64; i++) memset(board.rgb + 3 * i, (i / 512 + i % 64 / 8) % 2 ? 255 : 0, 3);
    CHECK_OK(image_encode_png(&image, &n, &board, NULL));
    write_file(dir, "image.png", image, n);
    Answer a = post_form(job, image, n, NULL, 0);
    taken(id, &a);
    free(events_of(id, NULL));
    CHECK(is_state(id, "done") && run_command(dir, id));
    a = of_job(id, "");
    char *note = strstr(a.body, "\"note\":\"the kept part is unlike all that emoji has learnt"), *end = NULL;
    if (note) end = strchr(note += strlen("\"note\":\""), '"');
    if (CHECK(end != NULL)) *end = '\0';
    CHECK(end && system_says(dir, note));
    free(image), image_free(&board);
    CHECK_OK(file_bytes(&image, &n, "models/emoji/example.png", 1 << 20, NULL));
    a = post_form(job, image, n, NULL, 0);
    taken(id, &a);
    free(events_of(id, NULL));
    a = of_job(id, "");
    CHECK(is_state(id, "done") && strstr(a.body, "\"note\":null"));
    free(image);
}

/* A picture that goes on around its edges: as ./inpaint --extend draws it, and its text says so. */
static void test_extend(const char *dir) {
    Image im, mask;
    uint8_t *image;
    size_t n;
    char id[32];
    uint8_t ink[P3_BYTES];
    const Profile profile = {ink, P3_BYTES, NULL};
    make_profile(ink, P3_BYTES, p3_primaries, CURVE_PARAMETRIC);
    memcpy(ink + 16, "CMYK", 4); /* left out, which is said */
    make_pictures(&im, &mask, 80, 100, 0);
    im.profile = &profile;
    CHECK_OK(image_encode_png(&image, &n, &im, NULL));
    write_file(dir, "image.png", image, n);
    Answer a = post_form("{\"kind\":\"inpaint\",\"seed\":3,\"best_of\":1,\"class\":\"food\",\"extend\":48}", image, n,
                         NULL, 0);
    taken(id, &a);
    free(events_of(id, NULL));
    CHECK(is_state(id, "done") && run_command(dir, id));
    a = of_job(id, "");
    CHECK(strstr(a.body, "--extend 48") && !strstr(a.body, "--paste-into"));
    CHECK(strstr(a.body, "\"note\":\"the picture: its colour profile is not for RGB and is left out"));
    CHECK(system_says(dir, "not for RGB"));
    a = of_job(id, "/0.png");
    CHECK(same_file(&a, dir, "inpainted.png"));
    uint8_t *png = malloc(a.size);
    memcpy(png, a.body, a.size);
    a = call("POST", "api/settings", "", png, a.size);
    CHECK(a.status == 200 && strstr(a.body, "\"extend\":48,\"paste\":false}") &&
          strstr(a.body, "\"kind\":\"inpaint\""));
    /* what it says is a job again, with the picture beside it */
    char *job = strdup(a.body);
    a = post_form(job, image, n, NULL, 0);
    taken(id, &a);
    free(events_of(id, NULL));
    a = of_job(id, "/0.png");
    CHECK(same_file(&a, dir, "inpainted.png"));
    image_free(&im), image_free(&mask);
    free(image), free(png), free(job);
}

/* Forms and pictures that are refused */
static void test_bad_forms(void) {
    static const struct {
        const char *type, *body;
    } forms[] = {
        {"multipart/form-data", "--x--\r\n"},
        {"multipart/form-data; boundary=x", ""},
        {"multipart/form-data; boundary=x", "--x--\r\n"},
        {"multipart/form-data; boundary=x", "--x\r\nContent-Disposition: form-data; name=\"job\"\r\n\r\n{}"},
        {"multipart/form-data; boundary=x", "--x\r\nContent-Disposition: form-data\r\n\r\n{}\r\n--x--\r\n"},
        {"multipart/form-data; boundary=x",
         "--x\r\nContent-Disposition: form-data; name=\"other\"\r\n\r\n{}\r\n--x--\r\n"},
        {"multipart/form-data; boundary=x", "--x\r\nContent-Disposition: form-data; "
                                            "name=\"job\"\r\n\r\n{\"kind\":\"sample\"}\r\n--x\r\nContent-Disposition: "
                                            "form-data; name=\"job\"\r\n\r\n{\"kind\":\"sample\"}\r\n--x--\r\n"},
        {"multipart/form-data; boundary=x", "--x\r\nContent-Disposition: form-data; "
                                            "name=\"job\"\r\n\r\n{\"kind\":\"sample\"}\r\n--x\r\nContent-Disposition: "
                                            "form-data; name=\"image\"\r\n\r\nabc\r\n--x--\r\n"},
        {"multipart/form-data; boundary=x",
         "--x\r\nContent-Disposition: form-data; "
         "name=\"job\"\r\n\r\n{\"kind\":\"inpaint\",\"image\":\"AAAA\",\"half\":\"left\"}\r\n--x\r\nContent-"
         "Disposition: form-data; name=\"image\"\r\n\r\nabc\r\n--x--\r\n"}};
    char header[128];
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        snprintf(header, sizeof header, "Content-Type: %s\r\n", forms[i].type);
        test_note(call("POST", "api/jobs", header, forms[i].body, strlen(forms[i].body)).status == 400, __FILE__,
                  __LINE__, forms[i].body);
    }
}

/* A small file that promises 100 million pixels */
static void check_huge(const uint8_t *image, size_t n) {
    uint8_t *huge = malloc(n);
    memcpy(huge, image, n);
    const uint32_t side = 10000;
    for (int i = 0; i < 4; i++) huge[16 + i] = huge[20 + i] = (uint8_t)(side >> (24 - 8 * i));
    uint32_t crc = 0xFFFFFFFF;
    for (size_t i = 12; i < 29; i++)
        for (int bit = 0; bit < 8; bit++) {
            if (bit == 0) crc ^= huge[i];
            crc = crc & 1 ? crc >> 1 ^ 0xEDB88320 : crc >> 1;
        }
    for (int i = 0; i < 4; i++) huge[29 + i] = (uint8_t)(~crc >> (24 - 8 * i));
    CHECK(post_form("{\"kind\":\"inpaint\",\"half\":\"upper\"}", huge, n, NULL, 0).status == 413);
    free(huge);
}

/* Where no token is kept nothing tells the class, which so must be named. */
static void check_all_new(const uint8_t *image, size_t n) {
    static const char *const edits[] = {"\"extend\":1", "\"window\":63", "\"outside\":1"};
    char job[128];
    for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) {
        snprintf(job, sizeof job, "{\"kind\":\"inpaint\",%s}", edits[i]);
        const Answer a = post_form(job, image, n, NULL, 0);
        if (!CHECK(a.status == 422 && strstr(a.body, "\"field\":\"class\""))) printf("     %s: %d\n", job, a.status);
    }
}

static void test_bad_edits(void) {
    Image im, mask;
    uint8_t *image, *bytes;
    size_t n, m;
    make_pictures(&im, &mask, 64, 96, 0);
    CHECK_OK(image_encode_png(&image, &n, &im, NULL));
    memset(mask.rgb, 255, 3 * 64 * 96);
    CHECK_OK(image_encode_png(&bytes, &m, &mask, NULL));
    CHECK(post_form("{\"kind\":\"inpaint\"}", image, n, bytes, m).status == 422); /* keeps everything */
    CHECK(post_form("{\"kind\":\"inpaint\"}", image, n, image, n / 2).status == 415);
    CHECK(post_form("{\"kind\":\"inpaint\",\"half\":\"upper\"}", image, n / 2, NULL, 0).status == 415);
    CHECK(post_form("{\"kind\":\"inpaint\",\"half\":\"upper\"}", image, n, bytes, m).status == 400);
    free(bytes);
    for (size_t i = 0; i < 64 * 96; i++) memset(mask.rgb + 3 * i, i % 96 < 4 || i % 96 > 92 ? 0 : 255, 3);
    CHECK_OK(image_encode_png(&bytes, &m, &mask, NULL));
    CHECK(post_form("{\"kind\":\"inpaint\"}", image, n, bytes, m).status == 422); /* fits no square */
    free(bytes);
    mask.H = 50;
    CHECK_OK(image_encode_png(&bytes, &m, &mask, NULL));
    CHECK(post_form("{\"kind\":\"inpaint\"}", image, n, bytes, m).status == 422); /* another size */
    check_huge(image, n);
    check_all_new(image, n);
    image_free(&im), image_free(&mask);
    free(image), free(bytes);
}

static void test_jobs(const char *dir) {
    test_refused();
    test_sample(dir);
    test_chain(dir);
    test_edit(dir, 64, 64, 0, "{\"kind\":\"inpaint\",\"seed\":3,\"best_of\":2,\"class\":\"food\"}");
    test_edit(dir, 100, 150, 1,
              "{\"kind\":\"inpaint\",\"seed\":3,\"best_of\":1,\"temperature\":[0.1234567890123,1,0.5]}");
    test_extend(dir);
    test_unlike(dir);
    test_bad_forms();
    test_bad_edits();
    test_queue();
}

/* ---- Forgetting ---- */

/* What never fits is not to come again. */
static void check_too_large(void) {
    enum { SIDE = 800 };
    Image im = {.H = SIDE, .W = SIDE, .rgb = malloc(3 * SIDE * SIDE)};
    uint8_t *bytes;
    size_t n;
    for (size_t i = 0; i < 3 * SIDE * SIDE; i++)
        im.rgb[i] = (uint8_t)rng_below(1, rng_stream(RNG_START, 1, i), 0, 256); /* cannot be packed */
    CHECK_OK(image_encode_png(&bytes, &n, &im, NULL));
    const Answer a = post_form("{\"kind\":\"inpaint\",\"extend\":32,\"class\":\"food\"}", bytes, n, NULL, 0);
    CHECK(n > 1 << 20 && a.status == 413 && strstr(a.body, "\"field\":\"image\""));
    image_free(&im);
    free(bytes);
}

static void test_forget(void) {
    char first[32], id[32];
    check_too_large();
    Answer a = post(S "\"count\":1,\"best_of\":1}");
    taken(first, &a);
    until_over(first);
    CHECK(of_job(first, "/0.png").status == 200);
    a = post(S "\"count\":64}");
    CHECK(a.status == 413); /* more than all that is kept */
    for (int i = 0; i < 6 && of_job(first, "").status == 200; i++) {
        a = post(S "\"count\":8,\"best_of\":1,\"chain_length\":1}");
        taken(id, &a);
        until_over(id);
    }
    CHECK(of_job(first, "").status == 410 && of_job(first, "/0.png").status == 410 &&
          of_job(first, "/events").status == 410);
    CHECK(of_job(id, "/7.png").status == 200);
    a = post(S "\"count\":8,\"best_of\":4}");
    taken(id, &a);
    a = post(S "\"count\":8,\"best_of\":4}");
    CHECK(a.status == 429 && has_header(&a, "Retry-After: "));
}

/* ---- The end ---- */

static void test_end(pid_t pid) {
    char running[32], queued[32], request[256];
    Answer a = post(S "\"count\":64,\"best_of\":64}");
    taken(running, &a);
    a = post(S "\"count\":1}");
    taken(queued, &a);
    const int fd[2] = {dial(), dial()};
    for (int i = 0; i < 2; i++) {
        const int n =
            snprintf(request, sizeof request, "GET /api/jobs/%s/events HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n",
                     i ? queued : running, port);
        put(fd[i], request, (size_t)n);
    }
    usleep(300000);
    kill(pid, SIGTERM);
    usleep(200000);
    CHECK(post(S "\"count\":1}").status == 503);
    for (int i = 1; i >= 0; i--) {
        a = hear(fd[i], 10);
        CHECK(a.closed && a.body && strstr(a.body, "event: cancelled\n"));
    }
}

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    port = atoi(argv[2]);
    if (!strcmp(argv[1], "http")) test_http();
    if (!strcmp(argv[1], "version")) test_version(argv[3]);
    if (!strcmp(argv[1], "token")) test_token();
    if (!strcmp(argv[1], "jobs")) test_jobs(argv[3]);
    if (!strcmp(argv[1], "forget")) test_forget();
    if (!strcmp(argv[1], "end")) test_end((pid_t)atoi(argv[3]));
    return test_report();
}
