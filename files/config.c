/* config.c - flat configurations: "dotted.key value" strings. */
#include "files/files.h"

#include "base/bits.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static KeyValue *config_find(const Config *c, const char *prefix, const char *key) {
    size_t skip = prefix ? strlen(prefix) : 0;
    for (size_t i = 0; i < c->n; i++) {
        const char *k = c->kv[i].key;
        if ((skip == 0 || strncmp(k, prefix, skip) == 0) && strcmp(k + skip, key) == 0) return &c->kv[i];
    }
    return NULL;
}

static Err config_append(Config *c, const char *key, char *value) {
    size_t bytes = strlen(key) + 1;
    char *copy;
    TRY(mem_grow(&c->kv, c->n, 1, &c->capacity, sizeof *c->kv, "a configuration"));
    TRY(mem_alloc(&copy, bytes, 1, "a configuration key"));
    memcpy(copy, key, bytes);
    c->kv[c->n++] = (KeyValue){.key = copy, .value = value};
    return OK;
}

Err config_set(Config *c, const char *key, const char *fmt, ...) {
    va_list a;
    va_start(a, fmt);
    int length = vsnprintf(NULL, 0, fmt, a);
    va_end(a);
    if (length < 0) return err("configuration key '%s': its value cannot be printed", key);

    char *value;
    TRY(mem_alloc(&value, (size_t)length + 1, 1, "a configuration value"));
    va_start(a, fmt);
    vsnprintf(value, (size_t)length + 1, fmt, a);
    va_end(a);

    KeyValue *old = config_find(c, "", key);
    if (old) { /* only now: the old value may have been among the arguments */
        free(old->value), free(old->place);
        old->value = value, old->place = NULL, old->typed = NULL;
        return OK;
    }
    Err e = config_append(c, key, value);
    if (e != OK) free(value);
    return e;
}

static Err row_place(KeyValue *kv, const char *place, const char *typed) {
    const size_t at = strlen(place) + 1, bytes = strlen(typed) + 1;
    char *text;
    TRY(mem_alloc(&text, at + bytes, 1, "the place of a configuration key"));
    memcpy(text, place, at);
    memcpy(text + at, typed, bytes);
    free(kv->place);
    kv->place = text, kv->typed = text + at;
    return OK;
}

Err config_place(Config *c, const char *key, const char *place, const char *typed) {
    KeyValue *kv = config_find(c, "", key);
    return kv ? row_place(kv, place, typed) : OK;
}

Err config_copy(Config *to, const char *key, const KeyValue *from) {
    TRY(config_set(to, key, "%s", from->value));
    return from->place ? config_place(to, key, from->place, from->typed) : OK;
}

const char *config_get(const Config *c, const char *prefix, const char *key) {
    const KeyValue *kv = config_find(c, prefix, key);
    return kv ? kv->value : NULL;
}

Err config_in_file(const Config *c) {
    char file[PATH_BYTES + 48];
    size_t i = 0, end = 0;
    while (i < c->n && !c->kv[i].place) i++;
    if (i == c->n) return FAILED;
    snprintf(file, sizeof file, "%s", c->kv[i].place);
    for (const char *p = file; (p = strstr(p, ": line ")); p++) end = (size_t)(p - file);
    if (end) file[end] = 0;
    return err_in(file);
}

/* The value, or NULL: then *e says whether that is an error. */
static const char *config_need(Err *e, const Config *c, const char *prefix, const char *key, int optional) {
    const char *value = config_get(c, prefix, key);
    *e = OK;
    if (!value && !optional) {
        err("no configuration key '%s%s'", prefix ? prefix : "", key);
        *e = config_in_file(c);
    }
    return value;
}

Err config_bad(const Config *c, const char *prefix, const char *key, const char *expected) {
    const KeyValue *kv = config_find(c, prefix, key);
    const Err e =
        err("configuration key '%s' is '%s', expected %s", kv->place ? kv->typed : kv->key, kv->value, expected);
    return kv->place ? err_in(kv->place) : e;
}

Err config_blame(const Config *c, const char *prefix, const char *key) {
    const KeyValue *kv = config_find(c, prefix, key);
    return kv && kv->place ? err_in(kv->place) : FAILED;
}

Err config_err(const Config *c, const char *prefix, const char *key, const char *fmt, ...) {
    char text[ERR_MAX];
    va_list a;
    va_start(a, fmt);
    vsnprintf(text, sizeof text, fmt, a);
    va_end(a);
    err("%s", text);
    return config_blame(c, prefix, key);
}

typedef enum { NOTHING, NO_FILE, REGULAR_FILE } There;

/* What the path leads to; what cannot be looked at is no file, and file_open says why. */
static There what_is_at(const char *path) {
    struct stat st;
    if (stat(path, &st) != 0) return errno == ENOENT || errno == ENOTDIR ? NOTHING : NO_FILE;
    return S_ISREG(st.st_mode) ? REGULAR_FILE : NO_FILE;
}

int config_file(char path[PATH_BYTES], const Config *c, const char *prefix, const char *key) {
    const KeyValue *kv = config_find(c, prefix, key);
    const char *place = kv && kv->place ? kv->place : "", *slash = NULL, *line = NULL;
    char other[PATH_BYTES];
    *path = 0;
    if (!kv) return 0;
    for (const char *p = place; (p = strstr(p, ": line ")); p++) line = p;
    for (const char *p = place; *p && p != line; p++) slash = *p == '/' ? p : slash;
    const int folder = slash && kv->value[0] != '/' ? (int)(slash - place) + 1 : 0;
    const There beside = path_make(path, "%.*s%s", folder, place, kv->value) == OK ? what_is_at(path) : NOTHING;
    if (beside == REGULAR_FILE) return 1;
    const There here = folder && path_make(other, "%s", kv->value) == OK ? what_is_at(other) : NOTHING;
    if (here > beside) memcpy(path, other, sizeof other);
    if (beside == NOTHING && here == NOTHING) *path = 0;
    return here == REGULAR_FILE;
}

/* Decimal digits at *s, nothing else; *s moves behind them. 0: there are none, or too many for a size_t. */
int text_digits(size_t *out, const char **s) {
    const char *start = *s;
    *out = 0;
    for (; **s >= '0' && **s <= '9'; ++*s) {
        size_t d = (size_t)(**s - '0');
        if (*out > (SIZE_MAX - d) / 10) return 0;
        *out = *out * 10 + d;
    }
    return *s != start;
}

size_t utf8_length(const char *text) {
    const unsigned char *s = (const unsigned char *)text;
    if (s[0] < 0x80) return 1;
    if (s[0] < 0xC2 || s[0] > 0xF4) return 0;
    size_t length = s[0] >= 0xF0 ? 4 : s[0] >= 0xE0 ? 3 : 2;
    for (size_t i = 1; i < length; i++) {
        if ((s[i] & 0xC0) != 0x80) return 0;
    }
    int overlong = (s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xF0 && s[1] < 0x90);
    int outside = (s[0] == 0xED && s[1] > 0x9F) || (s[0] == 0xF4 && s[1] > 0x8F);
    return overlong || outside ? 0 : length;
}

Err config_size(size_t *out, const Config *c, const char *prefix, const char *key, size_t lo, size_t hi, int optional) {
    Err e;
    const char *value = config_need(&e, c, prefix, key, optional), *s = value;
    if (!value) return e;
    size_t number;
    char expected[96];
    snprintf(expected, sizeof expected, "a whole number from %zu to %zu", lo, hi);
    if (!text_digits(&number, &s) || *s || number < lo || number > hi) return config_bad(c, prefix, key, expected);
    *out = number;
    return OK;
}

Err config_real(double *out, const Config *c, const char *prefix, const char *key, double lo, double hi, int optional) {
    Err e;
    const char *value = config_need(&e, c, prefix, key, optional);
    if (!value) return e;
    char *end, expected[96];
    double number = strtod(value, &end);
    snprintf(expected, sizeof expected, "a number from %g to %g", lo, hi);
    if (end == value || *end || !(number >= lo && number <= hi)) return config_bad(c, prefix, key, expected);
    *out = number;
    return OK;
}

Err config_flag(int *out, const Config *c, const char *prefix, const char *key, int optional) {
    Err e;
    const char *value = config_need(&e, c, prefix, key, optional);
    if (!value) return e;
    const int yes = !strcmp(value, "true") || !strcmp(value, "True");
    if (!yes && strcmp(value, "false") && strcmp(value, "False")) return config_bad(c, prefix, key, "true or false");
    *out = yes;
    return OK;
}

/* The items of a list lie between *s and *end: all of the value, or what is in brackets. 0: it is no list. */
static int list_bounds(const char **s, const char **end, const char *value) {
    const size_t n = strlen(value);
    const int brackets = value[0] == '[', none = strcmp(value, "-") == 0;
    *s = value + brackets + none, *end = value + n - brackets;
    while (*s < *end && brackets && **s == ' ') ++*s;
    return n > 0 && (!brackets || (n > 1 && value[n - 1] == ']'));
}

/* Behind an item: a comma and another item, or the list's end. */
static int list_goes_on(const char **s, const char *end) {
    *s += strspn(*s, " ");
    return *s == end || (*(*s)++ == ',' && *s < end);
}

Err config_list(size_t *out, size_t *n, size_t max, const Config *c, const char *prefix, const char *key,
                int optional) {
    Err e;
    const char *value = config_need(&e, c, prefix, key, optional), *s, *end;
    if (!value) return e;
    size_t count = 0;
    char expected[96];
    snprintf(expected, sizeof expected, "at most %zu whole numbers with commas between them, or -", max);
    for (int ok = list_bounds(&s, &end, value); !ok || s < end;) {
        if (ok) s += strspn(s, " ");
        ok = ok && count < max && text_digits(&out[count++], &s) && list_goes_on(&s, end);
        if (!ok) return config_bad(c, prefix, key, expected);
    }
    *n = count;
    return OK;
}

Err config_reals(double *out, size_t *n, size_t max, const Config *c, const char *prefix, const char *key, double lo,
                 double hi) {
    Err e;
    const char *value = config_need(&e, c, prefix, key, 0), *s, *end;
    if (!value) return e;
    size_t count = 0;
    char expected[96], *after;
    snprintf(expected, sizeof expected, "1 to %zu numbers from %g to %g with commas between them", max, lo, hi);
    int ok = list_bounds(&s, &end, value) && s < end;
    while (ok && s < end) {
        const double number = strtod(s, &after);
        ok = after > s && number >= lo && number <= hi && count < max;
        if (ok) out[count++] = number;
        s = after;
        ok = ok && list_goes_on(&s, end);
    }
    if (!ok) return config_bad(c, prefix, key, expected);
    *n = count;
    return OK;
}

/* ---- Text files ---- */

enum { TEXT_BYTES = 1 << 20, LINE_MAX_BYTES = 1 << 16 };

/* Which keys a file has had: places of rows, plus 1, by their keys' hashes; 0: free */
typedef struct {
    size_t *row, places;
} KeySet;

static Err key_set_make(KeySet *s, const char *text) {
    size_t lines = 1;
    for (; *(text += strcspn(text, "\r\n")); text++) lines++;
    for (s->places = 2; s->places < 2 * lines;) s->places *= 2;
    return mem_alloc(&s->row, s->places, sizeof *s->row, "a configuration");
}

/* Where the key is, or will be */
static size_t *key_set_place(const KeySet *s, const Config *c, const char *key) {
    size_t i = (size_t)fnv1a(FNV_START, key, strlen(key)) & (s->places - 1);
    while (s->row[i] && strcmp(c->kv[s->row[i] - 1].key, key) != 0) i = (i + 1) & (s->places - 1);
    return &s->row[i];
}

/* One line, in place. old: how many rows there were before this file, which it may replace; where: the file and the line */
static Err config_line(Config *c, KeySet *seen, size_t old, char *line, const char *where, ConfigKeyCheck *refuse) {
    static const char blank[] = " \t\r";
    char *key = line + strspn(line, blank);
    for (size_t n = strlen(key); n && strchr(blank, key[n - 1]);) key[--n] = 0;
    if (*key == 0 || *key == '#') return OK;

    char *value = key + strcspn(key, blank), *copy;
    if (*value == 0) return err("'%.200s' has no value, expected 'key value'", key);
    *value++ = 0;
    value += strspn(value, blank);
    if (refuse) TRY(refuse(key));
    size_t *place = key_set_place(seen, c, key), bytes = strlen(value) + 1;
    if (*place) return err("second value for '%.200s'", key);
    if (old && config_find(c, "", key)) {
        TRY(config_set(c, key, "%s", value));
        return config_place(c, key, where, key);
    }
    TRY(mem_alloc(&copy, bytes, 1, "a configuration value"));
    memcpy(copy, value, bytes);
    if (config_append(c, key, copy) != OK) return free(copy), FAILED;
    *place = c->n;
    return row_place(&c->kv[c->n - 1], where, key);
}

Err config_read_checked(Config *c, const char *path, ConfigKeyCheck *refuse) {
    const size_t old = c->n;
    char *text, where[PATH_BYTES + 48];
    KeySet seen = {0};
    TRY(file_text(&text, path, TEXT_BYTES));
    Err e = key_set_make(&seen, text);
    size_t number = 1;
    for (char *line = text, *end; e == OK && *line; line = end, number++) {
        end = line + strcspn(line, "\r\n"); /* old files have "\r" alone */
        const size_t length = (size_t)(end - line);
        const int both = !strncmp(end, "\r\n", 2);
        if (*end) *end++ = 0;
        end += both;
        snprintf(where, sizeof where, "%s: line %zu", path, number);
        e = length < LINE_MAX_BYTES ? config_line(c, &seen, old, line, where, refuse)
                                    : err("longer than %d bytes", LINE_MAX_BYTES - 1);
        if (e != OK) err_in(where);
    }
    free(seen.row);
    free(text);
    return e;
}

Err config_read(Config *c, const char *path) {
    return config_read_checked(c, path, NULL);
}

void config_free(Config *c) {
    for (size_t i = 0; i < c->n; i++) {
        free(c->kv[i].key);
        free(c->kv[i].value);
        free(c->kv[i].place);
    }
    free(c->kv);
    *c = (Config){0};
}

/* ---- Tables of settings ---- */

static void *field(const void *x, size_t at) {
    return (char *)(uintptr_t)x + at;
}

static Err read_setting(void *to, const ConfigField *s, const Config *from, const char *prefix) {
    const size_t lo = (size_t)s->lo, hi = (size_t)s->hi;
    int flag = s->lo != 0;
    switch (s->kind) {
    case FIELD_SIZE: return config_size((size_t *)field(to, s->at), from, prefix, s->key, lo, hi, s->optional);
    case FIELD_FLAG: return config_flag((int *)field(to, s->at), from, prefix, s->key, s->optional);
    case FIELD_REAL: return config_real((double *)field(to, s->at), from, prefix, s->key, s->lo, s->hi, s->optional);
    case FIELD_LIST:
        return config_list((size_t *)field(to, s->at), (size_t *)field(to, s->length_at), hi, from, prefix, s->key,
                           s->optional);
    default:
        TRY(config_flag(&flag, from, prefix, s->key, 1));
        return flag == (s->lo != 0) ? OK : config_bad(from, prefix, s->key, s->lo != 0 ? "true" : "false");
    }
}

Err config_table_read(void *to, const ConfigField *s, size_t n, const Config *from, const char *prefix) {
    for (size_t i = 0; i < n; i++) TRY(read_setting(to, &s[i], from, prefix));
    return OK;
}

static Err write_numbers(Config *to, const char *key, const size_t *x, size_t n) {
    char text[1024] = "-";
    for (size_t i = 0, at = 0; i < n && at < sizeof text; i++)
        at += (size_t)snprintf(text + at, sizeof text - at, "%s%zu", i ? "," : "", x[i]);
    return config_set(to, key, "%s", text);
}

static Err write_setting(Config *to, const void *from, const ConfigField *s, const char *prefix) {
    char key[512];
    snprintf(key, sizeof key, "%s%s", prefix, s->key);
    const void *x = field(from, s->at);
    switch (s->kind) {
    case FIELD_SIZE: return config_set(to, key, "%zu", *(const size_t *)x);
    case FIELD_FLAG: return config_set(to, key, "%s", *(const int *)x ? "true" : "false");
    case FIELD_REAL: return config_set(to, key, "%.17g", *(const double *)x);
    case FIELD_LIST: return write_numbers(to, key, (const size_t *)x, *(const size_t *)field(from, s->length_at));
    default: return s->optional ? OK : config_set(to, key, "%s", s->lo != 0 ? "true" : "false");
    }
}

Err config_table_write(Config *to, const void *from, const ConfigField *s, size_t n, const char *prefix) {
    for (size_t i = 0; i < n; i++) TRY(write_setting(to, from, &s[i], prefix));
    return OK;
}

static Err check_setting(const void *x, const ConfigField *s, const char *whose) {
    const size_t size = s->kind == FIELD_SIZE   ? *(const size_t *)field(x, s->at)
                        : s->kind == FIELD_LIST ? *(const size_t *)field(x, s->length_at)
                                                : 0;
    const double number = s->kind == FIELD_REAL ? *(const double *)field(x, s->at) : (double)size;
    if (s->kind == FIELD_FLAG || s->kind == FIELD_FIXED || (number >= s->lo && number <= s->hi)) return OK;
    return err("%s: %s%s is %.15g, expected %.15g..%.15g", whose, s->kind == FIELD_LIST ? "the length of " : "", s->key,
               number, s->lo, s->hi);
}

Err config_table_check(const void *x, const ConfigField *s, size_t n, const char *whose) {
    for (size_t i = 0; i < n; i++) TRY(check_setting(x, &s[i], whose));
    return OK;
}
