/* page.c - web/, the page, as it lies in the repository, in the program itself. */
#include "base/bits.h"
#include "serving/serving.h"

#include <stdio.h>
#include <string.h>

#ifdef __APPLE__
#define SECTION ".const_data"
#define SYMBOL(name) "_" #name
#else
#define SECTION ".section .rodata"
#define SYMBOL(name) #name
#endif
/* name[] = the bytes of a file, name_end[] what follows them */
#define EMBED(name, file)                                                                                              \
    __asm__(SECTION "\n.globl " SYMBOL(name) "\n.globl " SYMBOL(name##_end) "\n.balign 16\n" SYMBOL(                   \
        name) ":\n.incbin \"" file "\"\n" SYMBOL(name##_end) ":\n.byte 0\n.text\n");                                   \
    extern const char name[], name##_end[]

EMBED(web_index, "web/index.html");
EMBED(web_css, "web/page.css");
EMBED(web_js, "web/page.js");

/* "hash" of the bytes: 64-bit FNV-1a */
static void etag_of(char etag[24], const char *at, size_t n) {
    snprintf(etag, 24, "\"%016llx\"", (unsigned long long)fnv1a(FNV_START, at, n));
}

/* Is the tag among those of If-None-Match? A list; W/ in front changes nothing; * is any. */
static int has_etag(const char *list, const char *etag) {
    for (const char *p = list; p && *p;) {
        p += strspn(p, " \t,");
        if (*p == '*') return 1;
        if (!strncmp(p, "W/", 2)) p += 2;
        const char *end = *p == '"' ? strchr(p + 1, '"') : NULL;
        if (!end) return 0;
        if ((size_t)(end + 1 - p) == strlen(etag) && !strncmp(p, etag, strlen(etag))) return 1;
        p = end + 1;
    }
    return 0;
}

static Reply page_file(const Request *r, const char *type, const char *at, const char *end) {
    char etag[24];
    const size_t n = (size_t)(end - at);
    etag_of(etag, at, n);
    Reply reply =
        has_etag(request_header(r, "If-None-Match"), etag) ? reply_empty(304) : reply_static(200, type, at, n);
    reply_header(&reply, "ETag", etag);
    reply_header(&reply, "Cache-Control", "no-cache");
    return reply;
}

Reply page_index(void *context, const Request *r) {
    (void)context;
    return page_file(r, "text/html; charset=utf-8", web_index, web_index_end);
}

Reply page_css(void *context, const Request *r) {
    (void)context;
    return page_file(r, "text/css; charset=utf-8", web_css, web_css_end);
}

Reply page_js(void *context, const Request *r) {
    (void)context;
    return page_file(r, "text/javascript; charset=utf-8", web_js, web_js_end);
}
