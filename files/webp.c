/* webp.c - WebP in, where libwebp was found. */
#include "files/decode.h"

#include <stdlib.h>

#ifdef HAVE_WEBP
#include <webp/decode.h>

static const char *webp_message(VP8StatusCode s) {
    switch (s) {
    case VP8_STATUS_NOT_ENOUGH_DATA:
    case VP8_STATUS_SUSPENDED: return "the file is cut short";
    case VP8_STATUS_OUT_OF_MEMORY: return "no memory";
    case VP8_STATUS_UNSUPPORTED_FEATURE: return "an unsupported feature";
    default: return "the bits make no sense";
    }
}

/* Into rgb, or into raw (H,W,4) where there is alpha. */
static VP8StatusCode webp_pixels(WebPDecoderConfig *c, uint8_t *to, const uint8_t *bytes, size_t size) {
    size_t channels = c->input.has_alpha ? 4 : 3, stride = channels * (size_t)c->input.width;
    c->output.colorspace = c->input.has_alpha ? MODE_RGBA : MODE_RGB;
    c->output.is_external_memory = 1;
    c->output.u.RGBA.rgba = to;
    c->output.u.RGBA.stride = (int)stride;
    c->output.u.RGBA.size = stride * (size_t)c->input.height;
    VP8StatusCode s = WebPDecode(bytes, size, c);
    WebPFreeDecBuffer(&c->output);
    return s;
}

/* EXIF orientation is ignored in WebP: no camera writes it. */
Err webp_decode(Image *im, const uint8_t *bytes, size_t size) {
    WebPDecoderConfig c;
    if (!WebPInitDecoderConfig(&c)) return err("libwebp is another version than the one compiled for");
    VP8StatusCode s = WebPGetFeatures(bytes, size, &c.input);
    if (s != VP8_STATUS_OK) return err("damaged WebP: %s", webp_message(s));
    uint32_t riff = bytes[4] | (uint32_t)bytes[5] << 8 | (uint32_t)bytes[6] << 16 | (uint32_t)bytes[7] << 24;
    if ((size_t)riff + 8 > size) return err("damaged WebP: the file is cut short");
    if (c.input.has_animation) return err("is an animated WebP; a still picture expected");
    size_t H = (size_t)c.input.height, W = (size_t)c.input.width;
    TRY(image_alloc(im, H, W));
    uint8_t *raw = NULL;
    if (c.input.has_alpha) TRY(mem_alloc(&raw, H * W, 4, "the pixels of a WebP"));
    s = webp_pixels(&c, raw ? raw : im->rgb, bytes, size);
    if (s == VP8_STATUS_OK && raw) png_row_to_rgb(im->rgb, raw, H * W, 4, 8);
    free(raw);
    return s == VP8_STATUS_OK ? OK : err("damaged WebP: %s", webp_message(s));
}
#else
Err webp_decode(Image *im, const uint8_t *bytes, size_t size) {
    (void)im, (void)bytes, (void)size;
    return err(
        "is a WebP file, and this build reads none: install libwebp (Debian: apt-get install libwebp-dev) and run "
        "make again");
}
#endif
