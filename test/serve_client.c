/* serve_client.c - what ./serve answers, byte by byte on a socket: test_serve.sh starts it.
 *
 *     serve_client http PORT      broken, foreign and smuggled requests to a server without a token
 *     serve_client token PORT     to one whose token is "sesame", with --origin https://page.example */
#include "test/test.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
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
    for (char *p = buffer; (p = memmem(p, n - (size_t)(p - buffer), "HTTP/1.1 ", 9)); p += 9)
        a.served += p[9] == '2';
    a.status = atoi(buffer + 9);
    char *end = strstr(buffer, "\r\n\r\n");
    if (!end) return a;
    *end = 0;
    a.head = buffer, a.body = end + 4, a.size = n - (size_t)(a.body - buffer);
    return a;
}

/* text with %H for this server's name and port */
static size_t fill(char *out, const char *text) {
    char *to = out;
    for (const char *p = text; *p; p++)
        if (p[0] == '%' && p[1] == 'H')
            to += sprintf(to, "127.0.0.1:%d", port), p++;
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
        if (a.head && !has_header(&a, "X-Content-Type-Options: nosniff") && a.status != 400)
            test_note(0, __FILE__, __LINE__, "nosniff");
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

static void test_http(void) {
    CASES(smuggled, 1);
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

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    port = atoi(argv[2]);
    if (!strcmp(argv[1], "http")) test_http();
    if (!strcmp(argv[1], "token")) test_token();
    return test_report();
}
