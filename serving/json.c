/* json.c - JSON that strangers send. cJSON reads it, once it is known to be what RFC 8259 calls JSON: cJSON itself takes
 * more than that, such as numbers that begin with 0, bytes that are not UTF-8, and the same key twice. How deep, how many
 * and how long values are is limited before anything is built. */
#include "serving/serving.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEPTH = 16, VALUES = 4096, SHOWN_LETTERS = 60 };

/* ---- Faults ---- */

int fault(Fault *f, unsigned status, const char *field, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    vsnprintf(f->text, sizeof f->text, fmt, args);
    va_end(args);
    f->status = status;
    snprintf(f->field, sizeof f->field, "%s", field ? field : "");
    return 0;
}

Reply fault_reply(const Fault *f) {
    return reply_error(f->status, *f->field ? f->field : NULL, "%s", f->text);
}

const char *shown_text(char out[SHOWN_BYTES], const char *text) {
    char *to = out;
    size_t letters = 0;
    for (const char *p = text; *p && letters < SHOWN_LETTERS; letters++) {
        const size_t n = utf8_length(p);
        const unsigned char c = (unsigned char)*p;
        if (n == 0 || c < 0x20 || c == 0x7f || c == '\'' || c == '\\') {
            to += sprintf(to, c == '\'' || c == '\\' ? "\\%c" : "\\x%02x", c);
            p++;
        } else {
            memcpy(to, p, n);
            to += n, p += n;
        }
        if (letters + 1 == SHOWN_LETTERS && *p) to += sprintf(to, "...");
    }
    *to = 0;
    return out;
}

/* A value as a message shows it */
static const char *shown(char out[SHOWN_BYTES], const cJSON *x) {
    char text[SHOWN_BYTES];
    if (cJSON_IsNumber(x))
        snprintf(out, SHOWN_BYTES, "%.15g", x->valuedouble);
    else if (cJSON_IsString(x))
        snprintf(out, SHOWN_BYTES, "'%s'", shown_text(text, x->valuestring));
    else
        snprintf(out, SHOWN_BYTES, "%s",
                 cJSON_IsNull(x)    ? "null"
                 : cJSON_IsTrue(x)  ? "true"
                 : cJSON_IsFalse(x) ? "false"
                 : cJSON_IsArray(x) ? "a list"
                                    : "an object");
    return out;
}

int wrong_value(Fault *f, unsigned status, const char *field, const cJSON *found, const char *expected) {
    char text[SHOWN_BYTES];
    return fault(f, status, field, "%s: %s: expected %s", field, shown(text, found), expected);
}

/* ---- Is it JSON? ---- */

typedef struct {
    const unsigned char *at, *end;
    size_t values;
    const char *fault; /* the first, NULL: none so far */
} Scan;

static int bad(Scan *s, const char *fault) {
    if (!s->fault) s->fault = fault;
    return 0;
}

static void skip_space(Scan *s) {
    while (s->at < s->end && strchr(" \t\n\r", *s->at) && *s->at) s->at++;
}

static int next_is(Scan *s, char c) {
    skip_space(s);
    if (s->at == s->end || *s->at != (unsigned char)c) return 0;
    s->at++;
    return 1;
}

/* Four hexadecimal digits, -1: there are none. */
static int hex4(Scan *s) {
    int value = 0;
    for (int i = 0; i < 4; i++, s->at++) {
        const int c = s->at < s->end ? *s->at : 0;
        const int digit = c >= '0' && c <= '9'   ? c - '0'
                          : c >= 'a' && c <= 'f' ? c - 'a' + 10
                          : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                 : -1;
        if (digit < 0) return -1;
        value = value << 4 | digit;
    }
    return value;
}

static int scan_escape(Scan *s) {
    const int c = s->at < s->end ? *s->at++ : 0;
    if (c && strchr("\"\\/bfnrt", c)) return 1;
    if (c != 'u') return bad(s, "an escape that is none");
    const int unit = hex4(s);
    if (unit < 0) return bad(s, "an escape that is none");
    if (unit == 0) return bad(s, "a character of code 0");
    if (unit < 0xD800 || unit > 0xDFFF) return 1;
    if (unit > 0xDBFF || s->end - s->at < 6 || s->at[0] != '\\' || s->at[1] != 'u') return bad(s, "half a surrogate");
    s->at += 2;
    const int low = hex4(s);
    return low >= 0xDC00 && low <= 0xDFFF ? 1 : bad(s, "half a surrogate");
}

static int scan_string(Scan *s) {
    while (s->at < s->end && *s->at != '"') {
        if (*s->at < 0x20) return bad(s, "a control character in a text");
        if (*s->at == '\\') {
            s->at++;
            if (!scan_escape(s)) return 0;
        } else if (*s->at < 0x80) {
            s->at++;
        } else {
            const size_t n = utf8_length((const char *)s->at);
            if (n == 0 || n > (size_t)(s->end - s->at)) return bad(s, "bytes that are not UTF-8");
            s->at += n;
        }
    }
    return s->at++ < s->end ? 1 : bad(s, "a text without its end");
}

static int scan_digits(Scan *s) {
    const unsigned char *from = s->at;
    while (s->at < s->end && *s->at >= '0' && *s->at <= '9') s->at++;
    return s->at > from;
}

static int scan_number(Scan *s) {
    if (*s->at == '-') s->at++;
    const int zero = s->at < s->end && *s->at == '0';
    if (zero)
        s->at++;
    else if (!scan_digits(s))
        return bad(s, "a value that is none");
    if (s->at < s->end && *s->at == '.') {
        s->at++;
        if (!scan_digits(s)) return bad(s, "a number that is none");
    }
    if (s->at < s->end && (*s->at | 32) == 'e') {
        s->at++;
        if (s->at < s->end && (*s->at == '+' || *s->at == '-')) s->at++;
        if (!scan_digits(s)) return bad(s, "a number that is none");
    }
    return 1;
}

static int scan_value(Scan *s, int depth);

/* What follows { or [ */
static int scan_members(Scan *s, int depth, char end) {
    if (depth > DEPTH) return bad(s, "lists or objects within more than 16 others");
    if (next_is(s, end)) return 1;
    do {
        if (end == '}' && !(next_is(s, '"') && scan_string(s))) return bad(s, "a field without a name in quotes");
        if (end == '}' && !next_is(s, ':')) return bad(s, "a field without a colon");
        if (!scan_value(s, depth)) return 0;
    } while (next_is(s, ','));
    return next_is(s, end) ? 1 : bad(s, "a list or an object without its end");
}

static int scan_value(Scan *s, int depth) {
    static const char *const words[] = {"true", "false", "null"};
    skip_space(s);
    if (++s->values > VALUES) return bad(s, "more than 4096 values");
    if (next_is(s, '{')) return scan_members(s, depth + 1, '}');
    if (next_is(s, '[')) return scan_members(s, depth + 1, ']');
    if (next_is(s, '"')) return scan_string(s);
    for (size_t i = 0; i < 3; i++) {
        const size_t n = strlen(words[i]);
        if ((size_t)(s->end - s->at) < n || memcmp(s->at, words[i], n) != 0) continue;
        s->at += n;
        return 1;
    }
    return s->at < s->end ? scan_number(s) : bad(s, "a value is missing");
}

/* The first name that an object has twice, in x or in what is in it; NULL: none */
static const char *named_twice(const cJSON *x) {
    for (const cJSON *a = x ? x->child : NULL; a; a = a->next) {
        const char *inside = named_twice(a);
        if (inside) return inside;
        for (const cJSON *b = cJSON_IsObject(x) ? a->next : NULL; b; b = b->next)
            if (!strcmp(a->string, b->string)) return a->string;
    }
    return NULL;
}

cJSON *json_read(Fault *f, const uint8_t *text, size_t size) {
    Scan s = {.at = text, .end = text + size};
    char name[SHOWN_BYTES];
    const int whole = scan_value(&s, 0);
    skip_space(&s);
    if (!whole || s.at != s.end) {
        fault(f, 400, NULL, "the body is not JSON: byte %zu: %s", (size_t)(s.at - text),
              whole ? "something behind the value" : s.fault);
        return NULL;
    }
    cJSON *x = cJSON_ParseWithLength((const char *)text, size);
    const char *twice = named_twice(x);
    if (!x) fault(f, 500, NULL, "no memory to read the body");
    if (!twice) return x;
    fault(f, 400, twice, "%s: this field is there twice", shown_text(name, twice));
    cJSON_Delete(x);
    return NULL;
}

/* ---- Values of a field ---- */

int json_number(Fault *f, double *out, const cJSON *x, const char *field, double lo, double hi, int whole) {
    char expected[96];
    if (cJSON_IsNumber(x) && x->valuedouble >= lo && x->valuedouble <= hi &&
        (!whole || x->valuedouble == floor(x->valuedouble))) {
        *out = x->valuedouble;
        return 1;
    }
    snprintf(expected, sizeof expected, "a %snumber of %.16g to %.16g", whole ? "whole " : "", lo, hi);
    return wrong_value(f, 400, field, x, expected);
}

int json_flag(Fault *f, int *out, const cJSON *x, const char *field) {
    if (!cJSON_IsBool(x)) return wrong_value(f, 400, field, x, "true or false");
    *out = cJSON_IsTrue(x) != 0;
    return 1;
}
