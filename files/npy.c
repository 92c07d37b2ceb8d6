/* npy.c - arrays of NumPy: lists of whole numbers, such as the codes that are tokens (remap.c).
 *
 *     "\x93NUMPY" | major, minor version | length of the header, 2 bytes, from version 2 on 4, little-endian | header | numbers
 *
 * The header is text: {'descr': '<i8', 'fortran_order': False, 'shape': (548,), }, in any order, blanks behind it.
 *
 * Refuses: versions beyond 3, numbers that are no integers of 2, 4 or 8 bytes, more dimensions than one, sizes that the
 * file does not have, anything else in the header. */
#include "files/files.h"

#include <stdlib.h>
#include <string.h>

enum { HEADER_MOST = 10000, MAGIC_BYTES = 6, FRONT_BYTES = 8 }; /* as much as numpy.load takes; magic and version */
static const char MAGIC[] = "\x93NUMPY";

typedef struct {
    char descr[16]; /* "<i8" */
    size_t dims, n; /* n: along the first */
    int seen[3];    /* descr, fortran_order, shape */
} Header;

/* ---- The header's text: each takes what it is named after at *s, and moves behind it, or gives 0 ---- */

static int take(const char **s, char c) {
    *s += strspn(*s, " \n");
    const int there = **s == c;
    *s += there;
    return there;
}

static int take_word(const char **s, const char *word) {
    *s += strspn(*s, " \n");
    const size_t n = strlen(word);
    const int there = !strncmp(*s, word, n);
    *s += there ? n : 0;
    return there;
}

static int take_text(char *out, size_t room, const char **s) {
    *s += strspn(*s, " \n");
    const char quote = **s;
    if (quote != '\'' && quote != '"') return 0;
    const char *end = strchr(*s + 1, quote);
    const size_t n = end ? (size_t)(end - *s - 1) : room;
    if (n >= room) return 0;
    memcpy(out, *s + 1, n);
    out[n] = 0;
    *s = end + 1;
    return 1;
}

/* "(548,)", "(2, 3)", "()"; Python 2 wrote "(548L,)" */
static int take_shape(Header *h, const char **s) {
    size_t size;
    if (!take(s, '(')) return 0;
    while (!take(s, ')')) {
        if (!text_digits(&size, s)) return 0;
        take(s, 'L');
        if (h->dims++ == 0) h->n = size;
        if (!take(s, ',') && (**s != ')' || h->dims == 1)) return 0;
    }
    return 1;
}

static int take_value(Header *h, const char *key, const char **s) {
    static const char *const keys[] = {"descr", "fortran_order", "shape"};
    int k = 0;
    while (k < 3 && strcmp(key, keys[k])) k++;
    if (k == 3 || h->seen[k]++) return 0;
    if (k == 0) return take_text(h->descr, sizeof h->descr, s);
    return k == 1 ? take_word(s, "False") || take_word(s, "True") : take_shape(h, s); /* one row has one order */
}

static int take_header(Header *h, const char *s) {
    char key[16];
    if (!take(&s, '{')) return 0;
    while (!take(&s, '}'))
        if (!take_text(key, sizeof key, &s) || !take(&s, ':') || !take_value(h, key, &s) ||
            (!take(&s, ',') && *s != '}'))
            return 0;
    return s[strspn(s, " \n")] == 0 && h->seen[0] && h->seen[1] && h->seen[2];
}

/* ---- The file ---- */

static size_t little_endian(const uint8_t *p, size_t bytes) {
    size_t x = 0;
    for (size_t i = bytes; i-- > 0;) x = x << 8 | p[i];
    return x;
}

/* *h, *at: where the numbers begin */
static Err read_header(Header *h, size_t *at, const uint8_t *bytes, size_t size) {
    char text[HEADER_MOST + 1];
    *h = (Header){0};
    if (size < FRONT_BYTES + 2 || memcmp(bytes, MAGIC, MAGIC_BYTES) != 0)
        return err_damaged("is no .npy file: expected \"\\x93NUMPY\" at its beginning");
    const int major = bytes[MAGIC_BYTES];
    const size_t width = major > 1 ? 4 : 2;
    if (major < 1 || major > 3) return err_damaged("is a .npy file of version %d, expected 1 to 3", major);
    const size_t begin = FRONT_BYTES + width, length = size < begin ? 0 : little_endian(bytes + FRONT_BYTES, width);
    if (size < begin || length > size - begin)
        return err_damaged("is a .npy file that ends in its header: it is truncated");
    if (length > HEADER_MOST)
        return err_damaged("is a .npy file with a header of %zu bytes, expected at most %d", length, HEADER_MOST);
    memcpy(text, bytes + begin, length);
    text[length] = 0;
    if (memchr(text, 0, length) || !take_header(h, text))
        return err_damaged(
            "is a .npy file whose header is not {'descr': '<i8', 'fortran_order': False, 'shape': (N,), }");
    *at = begin + length;
    return OK;
}

/* Bytes of a number; 0: it is none of those that are read */
static size_t width_of(const char *descr) {
    static const char sizes[] = "248";
    const int known = (descr[0] == '<' || descr[0] == '>') && descr[1] == 'i' && descr[2] && strchr(sizes, descr[2]);
    return known && !descr[3] ? (size_t)(descr[2] - '0') : 0;
}

static int64_t number_at(const uint8_t *p, size_t width, int big) {
    uint64_t x = 0;
    for (size_t i = 0; i < width; i++) x |= (uint64_t)p[big ? width - 1 - i : i] << 8 * i;
    const uint64_t sign = (uint64_t)1 << (8 * width - 1);
    return (int64_t)((x ^ sign) - sign);
}

static Err read_numbers(int64_t **out, size_t *n, const uint8_t *bytes, size_t size, size_t most) {
    Header h;
    size_t at;
    TRY(read_header(&h, &at, bytes, size));
    const size_t width = width_of(h.descr);
    if (!width)
        return err_damaged("has numbers of type '%s', expected whole ones: <i8, <i4, <i2, >i8, >i4 or >i2", h.descr);
    if (h.dims != 1) return err_damaged("has %zu dimensions, expected 1", h.dims);
    if (h.n < 1 || h.n > most) return err_damaged("has %zu numbers, expected 1 to %zu", h.n, most);
    if ((size - at) % width || (size - at) / width != h.n)
        return err_damaged("has %zu bytes of numbers, expected %zu of %zu bytes", size - at, h.n, width);
    TRY(mem_alloc(out, h.n, sizeof **out, "the numbers of a .npy file"));
    *n = h.n;
    for (size_t i = 0; i < h.n; i++) (*out)[i] = number_at(bytes + at + i * width, width, h.descr[0] == '>');
    return OK;
}

Err npy_read(int64_t **out, size_t *n, const char *path, size_t most) {
    uint8_t *bytes;
    size_t size, most_bytes;
    *out = NULL, *n = 0;
    TRY(size_mul(&most_bytes, most, sizeof **out));
    TRY(file_bytes(&bytes, &size, path, most_bytes + FRONT_BYTES + 4 + HEADER_MOST, NULL));
    const Err e = read_numbers(out, n, bytes, size, most);
    free(bytes);
    return e == OK ? OK : err_in(path);
}
