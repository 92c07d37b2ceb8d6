/* png_text.c - the texts in a PNG: what pictures say of how they were drawn. Only the chunks are walked: no pixel is
 * decoded, so that any PNG, however large, is read at once. A text is looked for among those before it: MOST_TEXTS
 * bounds them. */
#include "files/files.h"

#include <stdlib.h>
#include <string.h>

static uint32_t big_endian(const uint8_t *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

/* Latin-1 becomes UTF-8; what is UTF-8 already, as many programs write it there, stays. */
static Err add_latin(Config *to, const char *key, const char *text) {
    char utf8[2 * 4096 + 1], *at = utf8;
    int is_utf8 = 1;
    for (const char *p = text; *p && is_utf8;) {
        const size_t n = utf8_length(p);
        is_utf8 = n > 0;
        p += n;
    }
    if (is_utf8) return config_set(to, key, "%s", text);
    for (const char *p = text; *p && at < utf8 + 2 * 4096 - 1; p++) {
        const unsigned char c = (unsigned char)*p;
        if (c < 0x80) {
            *at++ = (char)c;
        } else {
            *at++ = (char)(0xC0 | c >> 6);
            *at++ = (char)(0x80 | (c & 0x3F));
        }
    }
    *at = 0;
    return config_set(to, key, "%s", utf8);
}

/* key, zero byte, text; in iTXt two flags and two texts between, each with its zero byte. Compressed ones are left out. */
static Err add_chunk(Config *to, const uint8_t *data, size_t n, int international) {
    enum { LONGEST = 65536 };
    char *copy, *end, *text;
    if (n > LONGEST || !memchr(data, 0, n)) return OK;
    TRY(mem_alloc(&copy, n + 1, 1, "a text of a PNG"));
    memcpy(copy, data, n);
    text = copy + strlen(copy) + 1, end = copy + n;
    int whole = 1;
    if (international) {
        whole = end - text >= 2 && text[0] == 0;
        text += 2;
        for (int i = 0; i < 2 && whole; i++) {
            const char *zero = text < end ? memchr(text, 0, (size_t)(end - text)) : NULL;
            whole = zero != NULL;
            if (whole) text += zero + 1 - text;
        }
    }
    Err e = OK;
    if (whole && *copy && !config_get(to, "", copy)) e = add_latin(to, copy, text);
    free(copy);
    return e;
}

Err png_read_texts(Config *to, const uint8_t *bytes, size_t n) {
    static const uint8_t signature[8] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1A, '\n'};
    size_t texts = 0;
    if (n < 8 || memcmp(bytes, signature, 8) != 0) return err_damaged("not a PNG");
    for (size_t at = 8; n - at >= 12;) {
        const size_t length = big_endian(bytes + at);
        const uint8_t *type = bytes + at + 4;
        if (length > n - at - 12) return err_damaged("a PNG that is cut short");
        if (!memcmp(type, "IEND", 4)) return OK;
        if (!memcmp(type, "tEXt", 4) || !memcmp(type, "iTXt", 4)) {
            if (++texts > MOST_TEXTS) return err_damaged("a PNG with more than %d texts", MOST_TEXTS);
            TRY(add_chunk(to, type + 4, length, *type == 'i'));
        }
        at += 12 + length;
    }
    return err_damaged("a PNG that is cut short");
}
