/* webp.c - WebP in, where libwebp was found. The chunks around the pixels are walked here: orientation, and the first
 * picture of an animation. */
#include "files/decode.h"

#include <stdlib.h>
#include <string.h>

#ifdef HAVE_WEBP
#include <webp/decode.h>

static uint32_t u24(const uint8_t *p) {
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16;
}

typedef struct {
    const uint8_t *bytes; /* what libwebp decodes: the file, or the first frame */
    size_t size;
    size_t H, W;   /* of the picture */
    size_t y0, x0; /* where in it a frame lies */
    int animated, orientation;
} WebpParts;

/* A frame: its place, its size, its duration and flags, then its chunks. */
static void take_frame(WebpParts *w, const uint8_t *p, size_t n) {
    enum { HEADER = 16 };
    if (w->bytes || n < HEADER) return;
    w->x0 = 2 * u24(p), w->y0 = 2 * u24(p + 3);
    w->bytes = p + HEADER, w->size = n - HEADER;
}

/* RIFF, size, WEBP, then chunks: name, size, content, a byte of padding if the size is odd. */
static void walk_chunks(WebpParts *w, const uint8_t *p, size_t n) {
    enum { FILE_HEADER = 12, HEADER = 8, EXTENDED = 10, ANIMATED = 2 };
    int exif = 0, xmp = 0;
    for (size_t at = FILE_HEADER; n >= HEADER && at <= n - HEADER;) {
        const uint8_t *name = p + at, *content = name + HEADER;
        const size_t length = u24(name + 4) | (size_t)name[7] << 24;
        at += HEADER;
        if (length > n - at) break;
        if (!memcmp(name, "VP8X", 4) && length >= EXTENDED) {
            w->animated = (content[0] & ANIMATED) != 0;
            w->W = 1 + (size_t)u24(content + 4), w->H = 1 + (size_t)u24(content + 7);
        }
        if (!memcmp(name, "ANMF", 4) && w->animated) take_frame(w, content, length);
        if (!memcmp(name, "EXIF", 4) && !exif) exif = exif_orientation_prefixed(content, length);
        if (!memcmp(name, "XMP ", 4) && !xmp) xmp = xmp_orientation(content, length);
        at += length + (length & 1);
    }
    w->orientation = exif ? exif : xmp;
}

static const char *webp_message(VP8StatusCode s) {
    switch (s) {
    case VP8_STATUS_NOT_ENOUGH_DATA:
    case VP8_STATUS_SUSPENDED: return "the file is cut short";
    case VP8_STATUS_UNSUPPORTED_FEATURE: return "an unsupported feature";
    default: return "the bits make no sense";
    }
}

/* What libwebp takes for so many pixels beside those that it gives back: all of them once more if they are lossless. */
static size_t webp_bytes(const WebPBitstreamFeatures *f) {
    const size_t pixels = (size_t)f->width * (size_t)f->height, lossless = f->format == 2;
    return (lossless ? 4 * pixels : f->has_alpha ? pixels : 0) + 64 * (size_t)f->width + (1 << 20);
}

/* to (H,W,channels). libwebp says of some places where it got no memory that the bits make no sense. So what it refuses is
 * tried again, and is damaged only if there was memory. */
static Err webp_pixels(WebPDecoderConfig *c, uint8_t *to, size_t channels, const WebpParts *w) {
    const size_t stride = channels * (size_t)c->input.width;
    uint8_t *room = NULL;
    c->output.colorspace = channels == 4 ? MODE_RGBA : MODE_RGB;
    c->output.is_external_memory = 1;
    c->output.u.RGBA.rgba = to;
    c->output.u.RGBA.stride = (int)stride;
    c->output.u.RGBA.size = stride * (size_t)c->input.height;
    VP8StatusCode s = VP8_STATUS_SUSPENDED;
    for (int tries = 0; tries < 2 && s != VP8_STATUS_OK; tries++) {
        s = WebPDecode(w->bytes, w->size, c);
        WebPFreeDecBuffer(&c->output);
    }
    if (s == VP8_STATUS_OK) return OK;
    if (s == VP8_STATUS_OUT_OF_MEMORY) return err("no memory to read a WebP");
    TRY(mem_alloc(&room, webp_bytes(&c->input), 1, "to read a WebP"));
    free(room);
    return err_damaged("damaged WebP: %s", webp_message(s));
}

/* raw (h,w,channels) lies in a picture that is transparent elsewhere. */
static Err put_frame(Rows *r, const WebpParts *w, const uint8_t *raw, size_t h, size_t width, size_t channels) {
    uint8_t *row = NULL, *rgb = NULL;
    Err e = mem_alloc(&row, w->W, 4, "a row of a WebP");
    if (e == OK) e = mem_alloc(&rgb, w->W, 3, "a row of a picture");
    for (size_t y = 0; y < w->H && e == OK; y++) {
        const int inside = y >= w->y0 && y - w->y0 < h;
        memset(row, 0, 4 * w->W);
        for (size_t x = 0; inside && x < width; x++) {
            const uint8_t *from = raw + ((y - w->y0) * width + x) * channels;
            memcpy(row + 4 * (w->x0 + x), (uint8_t[4]){from[0], from[1], from[2], channels == 4 ? from[3] : 255}, 4);
        }
        samples_to_rgb(rgb, row, w->W, 4, 8, r->how);
        rows_put(r, y, rgb);
    }
    free(row);
    free(rgb);
    return e;
}

Err webp_decode(Rows *r, const uint8_t *bytes, size_t size) {
    WebPDecoderConfig c;
    WebpParts w = {0};
    uint8_t *raw = NULL;
    if (!WebPInitDecoderConfig(&c)) return err("libwebp is another version than the one compiled for");
    const size_t riff = u24(bytes + 4) | (size_t)bytes[7] << 24;
    if (riff + 8 > size) return err_damaged("damaged WebP: the file is cut short");
    walk_chunks(&w, bytes, riff + 8);
    if (w.animated && !w.bytes) return err_damaged("damaged WebP: an animation without pictures");
    if (w.animated) r->note = "animated WebP, of which the first picture is used";
    if (!w.animated) w.bytes = bytes, w.size = size;
    const VP8StatusCode s = WebPGetFeatures(w.bytes, w.size, &c.input);
    if (s != VP8_STATUS_OK) return err_damaged("damaged WebP: %s", webp_message(s));
    const size_t H = (size_t)c.input.height, W = (size_t)c.input.width, channels = c.input.has_alpha ? 4 : 3;
    if (!w.animated) w.H = H, w.W = W;
    if (w.y0 + H > w.H || w.x0 + W > w.W) return err_damaged("damaged WebP: a picture outside of its canvas");
    TRY(rows_begin(r, w.H, w.W, w.orientation, 0, H * W * channels + webp_bytes(&c.input)));
    TRY(mem_alloc(&raw, H * W, channels, "the pixels of a WebP"));
    Err e = webp_pixels(&c, raw, channels, &w);
    if (e == OK) e = put_frame(r, &w, raw, H, W, channels);
    free(raw);
    return e;
}
#else
Err webp_decode(Rows *r, const uint8_t *bytes, size_t size) {
    (void)r, (void)bytes, (void)size;
    return err(
        "is a WebP file, and this build reads none: install libwebp (Debian: apt-get install libwebp-dev) and run "
        "make again");
}
#endif
