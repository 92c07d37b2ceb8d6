/* apng.c - animated PNGs: a PNG of the last frame, for viewers that know no animations, and behind it every frame in
 * chunks of its own (acTL, fcTL, fdAT of the PNG specification, third edition). Chunks are written here one by one, over
 * zlib, since libpng writes none of these. */
#include "files/decode.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <zlib.h>

typedef struct {
    AtomicFile file;
    size_t enlarge, H, W; /* H, W: enlarged */
    uint32_t sequence;    /* of fcTL and fdAT chunks together */
    uint8_t *rows;        /* a frame: filter type and differences to the row above, (H,1+3*W) */
    uint8_t *row;         /* (2,W,3) */
    uint8_t *packed;      /* 4 bytes for fdAT's number, then what zlib made of rows */
    size_t packed_room;
} Apng;

static void put_u32(uint8_t *p, size_t v) {
    for (int i = 0; i < 4; i++) p[i] = (uint8_t)(v >> (24 - 8 * i));
}

static void put_u16(uint8_t *p, size_t v) {
    p[0] = (uint8_t)(v >> 8), p[1] = (uint8_t)v;
}

/* Length, type, data, checksum of type and data */
static Err put_chunk(Apng *a, const char type[5], const uint8_t *data, size_t n) {
    uint8_t head[8], end[4];
    if (n > INT32_MAX) return err("%s: a frame takes more than a PNG's chunk can hold", a->file.path);
    put_u32(head, n);
    memcpy(head + 4, type, 4);
    uLong crc = crc32(crc32(0, NULL, 0), head + 4, 4);
    if (n) crc = crc32(crc, data, (uInt)n);
    put_u32(end, crc);
    TRY(atomic_write(&a->file, head, sizeof head));
    TRY(atomic_write(&a->file, data, n));
    return atomic_write(&a->file, end, sizeof end);
}

static Err put_header(Apng *a, size_t frames) {
    uint8_t head[13] = {0}, control[8] = {0};
    put_u32(head, a->W), put_u32(head + 4, a->H);
    head[8] = 8, head[9] = 2; /* bits; RGB */
    TRY(atomic_write(&a->file, "\x89PNG\r\n\x1a\n", 8));
    TRY(put_chunk(a, "IHDR", head, sizeof head));
    put_u32(control, frames); /* played endlessly */
    return put_chunk(a, "acTL", control, sizeof control);
}

/* tEXt: key, 0, Latin-1. iTXt: key, 0, not compressed (0, 0), language and its key for that language (0, 0), UTF-8. */
static Err put_text(Apng *a, const KeyValue *kv) {
    char key[PNG_KEY_BYTES + 1];
    const char *before = png_key(key, kv->key) ? "" : kv->key;
    const int wide = is_wide_utf8(kv->value) || is_wide_utf8(before);
    const size_t n = strlen(key), gap = wide ? 5 : 1, value = strlen(before) + (*before != 0) + strlen(kv->value);
    uint8_t *data;
    TRY(mem_alloc(&data, n + gap + value + 1, 1, "PNG texts"));
    memcpy(data, key, n);
    snprintf((char *)data + n + gap, value + 1, "%s%s%s", before, *before ? " " : "", kv->value);
    const Err e = put_chunk(a, wide ? "iTXt" : "tEXt", data, n + gap + value);
    free(data);
    return e;
}

/* packed = a frame as a zlib stream of rows, each as the differences to the one above: those of an enlarged picture are
 * nothing then. */
static Err pack(Apng *a, const Image *im, size_t *bytes) {
    const size_t stride = 3 * a->W, N = a->enlarge;
    uint8_t *above = a->row, *row = a->row + stride;
    memset(above, 0, stride);
    for (size_t y = 0; y < a->H; y++) {
        uint8_t *to = a->rows + y * (stride + 1);
        *to++ = 2; /* up */
        image_row_enlarged(row, im, y / N, N);
        for (size_t i = 0; i < stride; i++) to[i] = (uint8_t)(row[i] - above[i]);
        uint8_t *swap = above;
        above = row, row = swap;
    }
    uLongf n = (uLongf)(a->packed_room - 4);
    if (compress2(a->packed + 4, &n, a->rows, (uLong)(a->H * (stride + 1)), 6) != Z_OK)
        return err("no memory to pack a frame of an animation");
    *bytes = n;
    return OK;
}

static Err put_profile(Apng *a, const Profile *p) {
    uint8_t *data;
    size_t n;
    if (!p || !p->size) return OK;
    TRY(png_profile(&data, &n, p));
    const Err e = put_chunk(a, "iCCP", data, n);
    free(data);
    return e;
}

static Err put_frame(Apng *a, size_t bytes, size_t ms) {
    uint8_t control[26] = {0}; /* at (0,0), replacing what was there */
    put_u32(control, a->sequence++);
    put_u32(control + 4, a->W), put_u32(control + 8, a->H);
    put_u16(control + 20, ms), put_u16(control + 22, 1000);
    TRY(put_chunk(a, "fcTL", control, sizeof control));
    put_u32(a->packed, a->sequence++);
    return put_chunk(a, "fdAT", a->packed, 4 + bytes);
}

static Err apng_room(Apng *a, const Image *im) {
    a->H = im->H * a->enlarge, a->W = im->W * a->enlarge;
    TRY(image_size_check(a->H, a->W));
    const size_t raw = a->H * (3 * a->W + 1);
    a->packed_room = 4 + compressBound((uLong)raw);
    TRY(mem_alloc(&a->rows, raw, 1, "a frame of an animation"));
    TRY(mem_alloc(&a->row, 2 * a->W, 3, "rows of an animation"));
    return mem_alloc(&a->packed, a->packed_room, 1, "a packed frame of an animation");
}

/* The last frame comes first, as the picture that is no part of the animation. */
static Err put_all(Apng *a, size_t n, FrameMake *make, void *context, const Config *text) {
    for (size_t i = 0; i <= n; i++) {
        Image im = {0};
        size_t bytes = 0;
        Err e = make(context, i ? i - 1 : n - 1, &im);
        if (e == OK && i == 0) e = apng_room(a, &im);
        if (e == OK && (im.H * a->enlarge != a->H || im.W * a->enlarge != a->W)) e = err("frames of several sizes");
        if (e == OK && i == 0) e = put_header(a, n);
        if (e == OK && i == 0) e = put_profile(a, im.profile);
        for (size_t k = 0; text && k < text->n && i == 0 && e == OK; k++) e = put_text(a, &text->kv[k]);
        if (e == OK) e = pack(a, &im, &bytes);
        if (e == OK && i == 0)
            e = put_chunk(a, "IDAT", a->packed + 4, bytes);
        else if (e == OK)
            e = put_frame(a, bytes, i < n ? FRAME_MS : LAST_FRAME_MS);
        image_free(&im);
        TRY(e);
    }
    return put_chunk(a, "IEND", NULL, 0);
}

Err image_write_apng(const char *path, size_t n, FrameMake *make, void *context, size_t enlarge, const Config *text) {
    Apng a = {.enlarge = enlarge};
    if (n < 1 || enlarge < 1) return err("%s: an animation of no frames", path);
    Err e = atomic_open(&a.file, path);
    if (e == OK) e = atomic_close(&a.file, put_all(&a, n, make, context, text));
    free(a.rows), free(a.row), free(a.packed);
    return e;
}
