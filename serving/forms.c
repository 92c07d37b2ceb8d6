/* forms.c - bodies that are not JSON alone: base64, and the parts of a multipart form (RFC 7578). */
#include "serving/serving.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

/* ---- base64 (RFC 4648), with padding ---- */

static int base64_value(int c) {
    return c >= 'A' && c <= 'Z'   ? c - 'A'
           : c >= 'a' && c <= 'z' ? c - 'a' + 26
           : c >= '0' && c <= '9' ? c - '0' + 52
           : c == '+'             ? 62
           : c == '/'             ? 63
                                  : -1;
}

Err base64_decode(uint8_t **out, size_t *size, const char *text) {
    const size_t length = strlen(text);
    const size_t padding = length && text[length - 1] == '=' ? 1 + (length > 1 && text[length - 2] == '=') : 0;
    if (length % 4) return err_damaged("%zu letters are no base64: expected a multiple of 4", length);
    uint8_t *bytes = malloc(length / 4 * 3 + 1), *to = bytes;
    if (!bytes) return err("no memory for a picture");
    for (size_t i = 0; i < length; i += 4) {
        const size_t left = i + 4 == length ? padding : 0;
        uint32_t group = 0;
        int bad = 0;
        for (size_t k = 0; k < 4; k++) {
            const int value = k < 4 - left ? base64_value((unsigned char)text[i + k]) : 0;
            bad |= value < 0;
            group = group << 6 | (uint32_t)(value & 63);
        }
        if (bad || (left == 1 && group & 0xff) || (left == 2 && group & 0xffff)) {
            free(bytes);
            return err_damaged("no base64 at letter %zu: expected A-Z, a-z, 0-9, + and /, with = at the end", i);
        }
        for (size_t k = 0; k < 3 - left; k++) *to++ = (uint8_t)(group >> (16 - 8 * k));
    }
    *out = bytes;
    *size = (size_t)(to - bytes);
    return OK;
}

/* ---- Forms ---- */

/* The value of a parameter behind a header's first word, such as boundary=... or name="..."; 0: there is none. */
static int parameter(char *out, size_t room, const char *text, size_t n, const char *name) {
    const size_t length = strlen(name);
    for (const char *p = text, *end = text + n; p < end;) {
        while (p < end && *p != ';') {
            if (*p == '"')
                for (p++; p < end && *p != '"'; p++) p += *p == '\\';
            p++;
        }
        if (p >= end) return 0;
        for (p++; p < end && (*p == ' ' || *p == '\t'); p++) {
        }
        if ((size_t)(end - p) <= length || strncasecmp(p, name, length) != 0 || p[length] != '=') continue;
        p += length + 1;
        size_t to = 0;
        const int quoted = p < end && *p == '"';
        for (p += quoted; p < end && (quoted ? *p != '"' : !strchr("; \t", *p)); p++) {
            if (quoted && *p == '\\' && p + 1 < end) p++;
            if (to + 1 >= room) return 0;
            out[to++] = *p;
        }
        out[to] = 0;
        return quoted ? p < end : to > 0;
    }
    return 0;
}

/* name = what the part's head, lines that end in \r\n, calls it */
static int part_name(char name[64], const uint8_t *head, size_t n) {
    static const char wanted[] = "content-disposition:";
    for (const char *p = (const char *)head, *end = p + n; p < end;) {
        const char *line_end = memmem(p, (size_t)(end - p), "\r\n", 2);
        if (!line_end) line_end = end;
        if ((size_t)(line_end - p) > strlen(wanted) && !strncasecmp(p, wanted, strlen(wanted)))
            return parameter(name, 64, p, (size_t)(line_end - p), "name");
        p = line_end + 2;
    }
    return 0;
}

static int bad_form(Fault *f, const char *why) {
    return fault(f, 400, NULL, "the form: %s", why);
}

int form_read(Fault *f, FormPart part[FORM_PARTS], size_t *parts, const Request *r) {
    char boundary[80] = "\r\n--";
    const uint8_t *at = r->body, *end = r->body + r->size;
    *parts = 0;
    if (!parameter(boundary + 4, 72, r->type, strlen(r->type), "boundary") || strlen(boundary) > 74)
        return bad_form(f, "no boundary of 1 to 70 letters in its Content-Type");
    const size_t n = strlen(boundary);
    if (r->size >= n - 2 && !memcmp(at, boundary + 2, n - 2))
        at += n - 2;
    else if ((at = memmem(at, r->size, boundary, n)))
        at += n;
    else
        return bad_form(f, "its boundary is not in it");
    for (;;) {
        if (end - at >= 2 && at[0] == '-' && at[1] == '-') return 1;
        while (at < end && (*at == ' ' || *at == '\t')) at++;
        if (end - at < 2 || at[0] != '\r' || at[1] != '\n') return bad_form(f, "something behind a boundary");
        if (*parts == FORM_PARTS) return bad_form(f, "more than 16 parts");
        FormPart *p = &part[*parts];
        const uint8_t *head_end = memmem(at, (size_t)(end - at), "\r\n\r\n", 4);
        if (!head_end || !part_name(p->name, at + 2, (size_t)(head_end - at)))
            return bad_form(f, "a part without a name");
        p->bytes = head_end + 4;
        const uint8_t *next = memmem(head_end + 2, (size_t)(end - head_end - 2), boundary, n);
        if (!next) return bad_form(f, "the boundary that ends it is missing");
        p->size = next > p->bytes ? (size_t)(next - p->bytes) : 0;
        at = next + n;
        ++*parts;
    }
}
