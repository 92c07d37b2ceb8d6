/* gate.c - who may call.
 *
 * A page from elsewhere that a browser shows must not use this server behind its user's back. Its requests tell by
 * Origin where they come from, and by Host what they take the server for, which betrays a foreign name that was pointed
 * at this machine (DNS rebinding). Without a token nothing but this machine's own names passes. With one, any host is
 * taken, and every call but those of the page's own files must show the token: as a bearer, or as a cookie that signing
 * in gave. Tokens are compared in a time that does not tell how much of them was right. */
#include "serving/serving.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/random.h>
#include <unistd.h>

enum { SESSIONS = 1024, SESSION_BYTES = 24, SESSION_TEXT = 33 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char session[SESSIONS][SESSION_TEXT]; /* cookies that were given, the newest in the place of the oldest */
static size_t sessions;

/* ---- Names of hosts ---- */

static int is_port(const char *s, size_t n) {
    if (n < 1 || n > 5) return 0;
    for (size_t i = 0; i < n; i++)
        if (!isdigit((unsigned char)s[i])) return 0;
    return 1;
}

/* name, name:port or [address]:port; *name_length: up to the colon. */
static int host_is_whole(const char *host, size_t *name_length) {
    size_t n = 0;
    if (*host == '[') {
        n = strspn(host + 1, "0123456789abcdefABCDEF:.") + 1;
        if (n < 3 || host[n++] != ']') return 0;
    } else {
        n = strspn(host, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-_");
        if (n < 1 || n > 253) return 0;
    }
    *name_length = n;
    return !host[n] || (host[n] == ':' && is_port(host + n + 1, strlen(host + n + 1)));
}

int origin_is_whole(const char *origin) {
    size_t n;
    const char *host = !strncasecmp(origin, "http://", 7)    ? origin + 7
                       : !strncasecmp(origin, "https://", 8) ? origin + 8
                                                             : NULL;
    return host && host_is_whole(host, &n);
}

/* The name without the port that http has anyway. */
static size_t without_port_80(const char *host) {
    const size_t n = strlen(host);
    return n > 3 && !strcmp(host + n - 3, ":80") ? n - 3 : n;
}

static int same_host(const char *a, const char *b) {
    const size_t n = without_port_80(a);
    return n == without_port_80(b) && !strncasecmp(a, b, n);
}

static int host_is_ours(const Gate *g, const char *host) {
    static const char *const names[] = {"127.0.0.1", "localhost", "[::1]"};
    char with_port[64];
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(with_port, sizeof with_port, "%s:%u", names[i], g->port);
        if (same_host(host, with_port)) return 1;
    }
    for (size_t i = 0; i < g->origins; i++)
        if (same_host(host, strstr(g->origin[i], "//") + 2)) return 1;
    return 0;
}

static int origin_is_ours(const Gate *g, const char *origin, const char *host) {
    if (!strncasecmp(origin, "http://", 7) && same_host(origin + 7, host)) return 1;
    for (size_t i = 0; i < g->origins; i++)
        if (!strcasecmp(origin, g->origin[i])) return 1;
    return 0;
}

/* ---- The token ---- */

static int same_secret(const char *given, size_t n, const char *secret) {
    const size_t length = strlen(secret);
    unsigned differ = n != length;
    for (size_t i = 0; i < length; i++) differ |= (unsigned char)secret[i] ^ (unsigned char)(n ? given[i % n] : 0);
    return !differ;
}

Err token_read(char **token, const char *path) {
    if (file_text(token, path, 4096) != OK) return err_in("--token-file");
    char *text = *token;
    size_t n = strlen(text);
    if (n && text[n - 1] == '\n') n--;
    if (n && text[n] == '\n' && text[n - 1] == '\r') n--;
    text[n] = 0;
    return n ? OK : err("--token-file %s: the token is empty", path);
}

static void cookie_name(char name[32], const Gate *g) {
    snprintf(name, 32, "imagebart-%u", g->port);
}

static int is_session(const char *given, size_t n) {
    unsigned found = 0;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < SESSIONS && i < sessions; i++) found |= (unsigned)same_secret(given, n, session[i]);
    pthread_mutex_unlock(&lock);
    return found != 0;
}

static int has_cookie(const Gate *g, const char *cookies) {
    char name[32];
    cookie_name(name, g);
    const size_t n = strlen(name);
    for (const char *p = cookies; *p;) {
        p += strspn(p, " ;\t");
        const size_t length = strcspn(p, ";");
        size_t value = length;
        while (value > 0 && (p[value - 1] == ' ' || p[value - 1] == '\t')) value--;
        if (value > n && !strncmp(p, name, n) && p[n] == '=' && is_session(p + n + 1, value - n - 1)) return 1;
        p += length;
    }
    return 0;
}

static int has_token(const Gate *g, const Request *r) {
    const char *bearer = request_header(r, "Authorization"), *cookies = request_header(r, "Cookie");
    if (bearer && !strncasecmp(bearer, "Bearer ", 7)) {
        const char *given = bearer + 7 + strspn(bearer + 7, " ");
        if (same_secret(given, strlen(given), g->token)) return 1;
    }
    return cookies && has_cookie(g, cookies);
}

unsigned gate_check(const Gate *g, const Request *r, int secret, const char **why) {
    const char *host = request_header(r, "Host"), *origin = request_header(r, "Origin");
    size_t n;
    *why = "Host: the name of this server expected, and in it no other site's";
    if (!host || !host_is_whole(host, &n)) return 400;
    if (!g->token && !host_is_ours(g, host)) return 403;
    *why = "Origin: a page from elsewhere may not call this server (./serve --origin allows one)";
    if (origin && !origin_is_ours(g, origin, host)) return 403;
    *why = "the server's token is missing or wrong: Authorization: Bearer TOKEN, or sign in on the page";
    return secret && g->token && !has_token(g, r) ? 401 : 0;
}

/* ---- Signing in ---- */

Err random_text(char *text, size_t n) {
    static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    uint8_t bytes[64] = {0};
    if (n > sizeof bytes - 2 || getentropy(bytes, n) != 0) return err("no random numbers from the system");
    size_t at = 0;
    for (size_t bit = 0; bit < 8 * n; bit += 6) {
        const unsigned pair = (unsigned)bytes[bit / 8] << 8 | bytes[bit / 8 + 1];
        text[at++] = letters[pair >> (10 - bit % 8) & 63];
    }
    text[at] = 0;
    return OK;
}

static int hex_digit(int c) {
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

/* value (n) = the form's field of that name, decoded; its length, or NONE. */
static size_t form_field(char *value, const char *form, const char *name) {
    const size_t n = strlen(name);
    for (const char *p = form; *p; p += *p == '&') {
        const size_t length = strcspn(p, "&");
        if (length > n && !strncmp(p, name, n) && p[n] == '=') {
            size_t to = 0;
            for (size_t i = n + 1; i < length; i++) {
                const int high = p[i] == '%' && i + 2 < length ? hex_digit(p[i + 1]) : -1;
                const int low = high >= 0 ? hex_digit(p[i + 2]) : -1;
                value[to++] = low >= 0 ? (char)(high << 4 | low) : p[i] == '+' ? ' ' : p[i];
                if (low >= 0) i += 2;
            }
            return to;
        }
        p += length;
    }
    return NONE;
}

static Reply signed_in(const Gate *g) {
    char text[SESSION_TEXT], name[32], cookie[128];
    if (random_text(text, SESSION_BYTES) != OK) return reply_error(500, NULL, "%s", err_text());
    pthread_mutex_lock(&lock);
    memcpy(session[sessions++ % SESSIONS], text, sizeof text);
    pthread_mutex_unlock(&lock);
    cookie_name(name, g);
    snprintf(cookie, sizeof cookie, "%s=%s; Path=/; SameSite=Strict; HttpOnly", name, text);
    Reply r = reply_empty(303);
    reply_header(&r, "Location", "./");
    reply_header(&r, "Set-Cookie", cookie);
    reply_header(&r, "Cache-Control", "no-store");
    return r;
}

Reply gate_sign_in(const Gate *g, const Request *r) {
    static const char type[] = "application/x-www-form-urlencoded";
    if (!g->token) return reply_error(404, NULL, "this server has no token: nobody needs to sign in");
    const size_t n = strcspn(r->type, "; \t");
    if (n != strlen(type) || strncasecmp(r->type, type, n) != 0)
        return reply_error(415, NULL, "Content-Type: %s expected", type);
    char *value = malloc(r->size + 1);
    if (!value) return reply_error(500, NULL, "no memory");
    const size_t length = memchr(r->body, 0, r->size) ? NONE : form_field(value, (const char *)r->body, "token");
    const int right = length != NONE && same_secret(value, length, g->token);
    free(value);
    if (right) return signed_in(g);
    Reply wrong = reply_error(401, "token", "token: not this server's");
    reply_header(&wrong, "WWW-Authenticate", "Bearer");
    return wrong;
}

Reply gate_form(void) {
    static const char form[] =
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" "
        "content=\"width=device-width\">\n<title>imagebart: sign in</title>\n<link rel=\"stylesheet\" "
        "href=\"page.css\">\n"
        "<main><h1>imagebart</h1>\n<form method=\"post\" action=\"sign-in\">\n<label>Token <input type=\"password\" "
        "name=\"token\" autocomplete=\"current-password\" autofocus required></label>\n<button>Sign in</button>\n"
        "</form>\n<p>Who started <code>./serve</code> chose the token.</p></main></html>\n";
    return reply_static(401, "text/html; charset=utf-8", form, sizeof form - 1);
}
