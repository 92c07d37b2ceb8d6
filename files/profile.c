/* profile.c - what the numbers of a picture mean as colours: the ICC profile in its file, for the PNG that is made of it.
 *
 *     PNG     a chunk iCCP: name, 0, 0, the profile as zlib packs it
 *     JPEG    segments APP2: "ICC_PROFILE", 0, which part of how many (from 1), the part
 *     WebP    a chunk ICCP
 *
 * A profile is carried as it is, or left out with a word: one that is damaged, has more than PROFILE_BYTES, or is not for
 * RGB, which is what pictures become here; in a PNG also one for RGB where the picture is grey, or behind the pixels.
 * sRGB needs none: what says nothing is shown as that. */
#include "files/decode.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <zlib.h>

static const char damaged[] = "its colour profile is damaged and left out: the result may look different";
static const char too_large[] = "its colour profile has more than 1 MiB and is left out: the result may look different";
static const char not_rgb[] = "its colour profile is not for RGB and is left out: the result may look different";

static const char for_colours[] =
    "its colour profile is for RGB, the picture is grey: it is left out: the result may look different";
static const char late[] = "its colour profile comes behind the pixels and is left out: the result may look different";

static size_t u16(const uint8_t *p) {
    return (size_t)p[0] << 8 | p[1];
}

static size_t u32(const uint8_t *p) {
    return u16(p) << 16 | u16(p + 2);
}

void profile_free(Profile *p) {
    free(p->bytes);
    *p = (Profile){0};
}

/* ---- What a profile says: a header, tags with their places, what they hold ---- */

enum { HEADER = 128, TAGS = HEADER + 4, TAG = 12 };

static const char *profile_fault(const uint8_t *p, size_t n) {
    if (n < TAGS || memcmp(p + 36, "acsp", 4) != 0) return damaged;
    const size_t size = u32(p), tags = u32(p + HEADER);
    if (size > n || size < TAGS || tags > (size - TAGS) / TAG) return damaged;
    for (size_t i = 0; i < tags; i++) {
        const size_t at = u32(p + TAGS + i * TAG + 4), bytes = u32(p + TAGS + i * TAG + 8);
        if (at > size || bytes > size - at) return damaged;
    }
    if (memcmp(p + 20, "XYZ ", 4) != 0 && memcmp(p + 20, "Lab ", 4) != 0) return damaged;
    return memcmp(p + 16, "RGB ", 4) != 0 ? not_rgb : NULL;
}

/* What the tag holds, if it is of that type (NULL: any) and has so many bytes at least; NULL: there is none. */
static const uint8_t *find_tag(const Profile *p, const char *name, const char *type, size_t least, size_t *bytes) {
    for (size_t i = 0; i < u32(p->bytes + HEADER); i++) {
        const uint8_t *tag = p->bytes + TAGS + i * TAG, *at = p->bytes + u32(tag + 4);
        *bytes = u32(tag + 8);
        if (!memcmp(tag, name, 4)) return *bytes >= least && (!type || !memcmp(at, type, 4)) ? at : NULL;
    }
    return NULL;
}

static double fixed(const uint8_t *p) { /* s15Fixed16 */
    return (double)(int32_t)(uint32_t)u32(p) / 65536;
}

/* *y = the curve of a channel at x: a table, or the five numbers of y = x < d ? c x : (a x + b)^g. Others are not
 * sRGB's. */
static int curve_at(double *y, const Profile *p, const char *name, double x) {
    size_t bytes;
    const uint8_t *at = find_tag(p, name, "curv", 12, &bytes);
    if (at) {
        const size_t n = u32(at + 8);
        if (n < 2 || n > (bytes - 12) / 2) return 0;
        const size_t i = min_size((size_t)(x * (double)(n - 1)), n - 2);
        const double share = x * (double)(n - 1) - (double)i, lower = (double)u16(at + 12 + 2 * i);
        *y = (lower + share * ((double)u16(at + 14 + 2 * i) - lower)) / 65535;
        return 1;
    }
    at = find_tag(p, name, "para", 32, &bytes);
    if (!at || u16(at + 8) != 3) return 0;
    const double g = fixed(at + 12), a = fixed(at + 16), b = fixed(at + 20), c = fixed(at + 24), d = fixed(at + 28);
    *y = x < d ? c * x : pow(a * x + b, g);
    return 1;
}

/* Are its primaries and its curves sRGB's (IEC 61966-2-1), as D50 sees them? */
static int is_srgb(const Profile *p) {
    static const struct {
        const char *primary, *curve;
        double xyz[3];
    } channels[] = {{"rXYZ", "rTRC", {0.43607, 0.22249, 0.01392}},
                    {"gXYZ", "gTRC", {0.38515, 0.71687, 0.09708}},
                    {"bXYZ", "bTRC", {0.14307, 0.06061, 0.71410}}};
    static const double near_by = 0.001;
    size_t bytes;
    if (find_tag(p, "A2B0", NULL, 0, &bytes)) return 0; /* tables, which come before the rest */
    for (size_t k = 0; k < 3; k++) {
        const uint8_t *at = find_tag(p, channels[k].primary, "XYZ ", 20, &bytes);
        for (size_t i = 0; i < 3; i++)
            if (!at || !(fabs(fixed(at + 8 + 4 * i) - channels[k].xyz[i]) < near_by)) return 0;
        for (double x = 0.0625, y; x < 1; x += 0.0625)
            if (!curve_at(&y, p, channels[k].curve, x) ||
                !(fabs(y - (x < 0.04045 ? x / 12.92 : pow((x + 0.055) / 1.055, 2.4))) < near_by))
                return 0;
    }
    return 1;
}

/* *p takes the bytes, if they are a profile that has to be kept. */
static void take(Profile *p, uint8_t *bytes, size_t n) {
    p->bytes = bytes;
    p->note = profile_fault(bytes, n);
    p->size = p->note ? 0 : u32(bytes);
    if (!p->note && !is_srgb(p)) return;
    free(bytes);
    p->bytes = NULL, p->size = 0;
}

static Err take_copy(Profile *p, const uint8_t *from, size_t n) {
    uint8_t *bytes;
    if (n > PROFILE_BYTES) {
        p->note = too_large;
        return OK;
    }
    TRY(mem_alloc(&bytes, n, 1, "a colour profile"));
    if (n) memcpy(bytes, from, n);
    take(p, bytes, n);
    return OK;
}

/* ---- Where it is ---- */

static Err unpack(Profile *p, const uint8_t *packed, size_t n) {
    uint8_t *bytes;
    uLongf size = PROFILE_BYTES;
    TRY(mem_alloc(&bytes, PROFILE_BYTES, 1, "a colour profile"));
    const int z = uncompress(bytes, &size, packed, (uLong)n);
    if (z == Z_OK)
        take(p, bytes, size);
    else
        free(bytes);
    if (z == Z_MEM_ERROR) return err("no memory to unpack a colour profile");
    if (z != Z_OK) p->note = z == Z_BUF_ERROR && size == PROFILE_BYTES ? too_large : damaged;
    return OK;
}

/* A grey PNG has a profile for grey, which RGB cannot take; one for RGB is not its own. */
static Err unpack_of_png(Profile *p, int grey, const uint8_t *packed, size_t n) {
    TRY(unpack(p, packed, n));
    if (!grey || !p->size) return OK;
    profile_free(p);
    p->note = for_colours;
    return OK;
}

static Err of_png(Profile *p, const uint8_t *bytes, size_t n) {
    enum { COLOUR_TYPE = 25, COLOURED = 2 };
    int behind_pixels = 0;
    for (size_t at = 8; n >= 12 && at <= n - 12;) {
        const size_t length = u32(bytes + at);
        const uint8_t *type = bytes + at + 4, *data = type + 4;
        if (length > n - at - 12) return OK;
        at += 12 + length;
        behind_pixels |= !memcmp(type, "IDAT", 4);
        if (memcmp(type, "iCCP", 4) != 0) continue;
        if (behind_pixels) {
            p->note = late;
            return OK;
        }
        const uint8_t *zero = length ? memchr(data, 0, length) : NULL;
        if (zero && zero + 2 <= data + length && !zero[1])
            return unpack_of_png(p, !(bytes[COLOUR_TYPE] & COLOURED), zero + 2, (size_t)(data + length - zero) - 2);
        p->note = damaged;
        return OK;
    }
    return OK;
}

typedef struct {
    const uint8_t *part[256]; /* from 1 on */
    size_t size[256], parts, bytes;
} Parts;

/* A segment's content; 0: it fits the others not. */
static int add_part(Parts *s, const uint8_t *data, size_t n) {
    enum { BEFORE = 14 };
    const size_t number = data[12], of = data[13];
    if (!number || number > of || (s->parts && s->parts != of) || s->part[number]) return 0;
    s->parts = of, s->part[number] = data + BEFORE;
    s->bytes += s->size[number] = n - BEFORE;
    return 1;
}

static Err join(Profile *p, const Parts *s) {
    uint8_t *bytes;
    size_t at = 0;
    for (size_t i = 1; i <= s->parts && !p->note; i++)
        if (!s->part[i]) p->note = damaged;
    if (!p->note && s->bytes > PROFILE_BYTES) p->note = too_large;
    if (!s->parts || p->note) return OK;
    TRY(mem_alloc(&bytes, s->bytes, 1, "a colour profile"));
    for (size_t i = 1; i <= s->parts; at += s->size[i], i++) memcpy(bytes + at, s->part[i], s->size[i]);
    take(p, bytes, s->bytes);
    return OK;
}

/* Segments up to the pixels: FF, which, and with most of them a length that counts itself. */
static Err of_jpeg(Profile *p, const uint8_t *bytes, size_t n) {
    enum { APP2 = 0xe2, START_OF_SCAN = 0xda, RESTART = 0xd0, END = 0xd9, ALONE = 0x01 };
    Parts s = {0};
    for (size_t at = 2; at + 4 <= n;) {
        const uint8_t which = bytes[at + 1];
        if (bytes[at] != 0xff || which == 0xff || !which) { /* filling, or bytes that belong to nothing */
            at++;
            continue;
        }
        if (which == START_OF_SCAN || which == END) break;
        if (which == ALONE || (which >= RESTART && which < END)) {
            at += 2;
            continue;
        }
        const size_t length = u16(bytes + at + 2);
        const uint8_t *data = bytes + at + 4;
        if (length < 2 || length > n - at - 2) break;
        if (which == APP2 && length >= 16 && !memcmp(data, "ICC_PROFILE", 12) && !add_part(&s, data, length - 2))
            p->note = damaged;
        at += 2 + length;
    }
    return join(p, &s);
}

static Err of_webp(Profile *p, const uint8_t *bytes, size_t n) {
    enum { FIRST = 12, NAME = 8, HAS_PROFILE = 0x20 };
    int has = 0; /* the first chunk says so; else nobody looks at it */
    for (size_t at = FIRST; n >= NAME && at <= n - NAME;) {
        const uint8_t *name = bytes + at, *data = name + NAME;
        const size_t length = name[4] | (size_t)name[5] << 8 | (size_t)name[6] << 16 | (size_t)name[7] << 24;
        at += NAME;
        if (length > n - at) {
            if (has && !memcmp(name, "ICCP", 4)) p->note = damaged;
            return OK;
        }
        if (!memcmp(name, "VP8X", 4) && length) has = data[0] & HAS_PROFILE;
        if (!memcmp(name, "ICCP", 4)) return has ? take_copy(p, data, length) : OK;
        at += length + (length & 1);
    }
    return OK;
}

Err profile_read(Profile *p, const uint8_t *bytes, size_t n) {
    const char *name;
    *p = (Profile){0};
    switch (file_kind(&name, bytes, n)) {
    case FILE_PNG: return of_png(p, bytes, n);
    case FILE_JPEG: return of_jpeg(p, bytes, n);
    case FILE_WEBP: return of_webp(p, bytes, n);
    default: return OK;
    }
}
