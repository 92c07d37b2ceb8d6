/* mask.c - which part of a picture stays, as another picture says it.
 *
 * Light parts stay, dark ones are holes. What an editor leaves transparent is a hole too, whatever colour lies beneath:
 * a pixel counts as it looks on black, so that white becomes a hole where it is half transparent. Two kinds are meant
 * otherwise. Dark paint on a transparent layer, which on black would be one hole, counts as it looks on white: the paint
 * is the hole. Of a picture with holes, such as the one to be completed, parts of which were erased, colours say nothing:
 * what is more transparent than not is a hole. */
#include "files/files.h"

#include <stdlib.h>
#include <string.h>

typedef enum { MASK_OPAQUE, MASK_CLEAR_IS_DARK, MASK_PAINT, MASK_PICTURE } MaskKind;

static int is_light(const uint8_t *p) {
    return p[0] + p[1] + p[2] >= 3 * 128;
}

/* Alpha of a pixel by how it looks on black and on white, 128 or more? */
static int is_solid(const uint8_t *black, const uint8_t *white) {
    return white[1] - black[1] < 128;
}

/* A mask is painted in black and white, or in one colour; but for a few pixels. */
static MaskKind mask_kind(const Image *black, const Image *white) {
    enum { BITS = 3, DARKEST = 64, LIGHTEST = 192 };
    const size_t n = black->H * black->W;
    size_t of_colour[1 << 3 * BITS] = {0}, opaque = 0, extreme = 0, most = 0, clear = 0, light = 0, dark = 0;
    for (size_t i = 0; i < n; i++) {
        const uint8_t *b = black->rgb + 3 * i, *w = white->rgb + 3 * i;
        clear += !is_solid(b, w), light += is_light(b) != 0, dark += !is_light(w);
        if (memcmp(b, w, 3) != 0) continue;
        const int r = b[0] >> (8 - BITS), g = b[1] >> (8 - BITS), blue = b[2] >> (8 - BITS);
        most = max_size(most, ++of_colour[(r << BITS | g) << BITS | blue]);
        extreme += (b[0] < DARKEST && b[1] < DARKEST && b[2] < DARKEST) ||
                   (b[0] >= LIGHTEST && b[1] >= LIGHTEST && b[2] >= LIGHTEST);
        opaque++;
    }
    if (opaque == n) return MASK_OPAQUE;
    if (clear && max_size(extreme, most) < opaque - opaque / 10) return MASK_PICTURE;
    return !light && dark && dark < n ? MASK_PAINT : MASK_CLEAR_IS_DARK;
}

static const char *kind_note(MaskKind kind, int invert) {
    switch (kind) {
    case MASK_CLEAR_IS_DARK:
        return invert ? "its transparent parts stay, as dark ones do"
                      : "its transparent parts are drawn anew, as dark ones are";
    case MASK_PAINT:
        return invert ? "is dark paint on a transparent layer: the paint stays"
                      : "is dark paint on a transparent layer: the paint is drawn anew";
    case MASK_PICTURE:
        return invert ? "is a picture with transparent parts: they stay, and nothing else"
                      : "is a picture with transparent parts: they are drawn anew, and nothing else";
    default: return NULL;
    }
}

int mask_keeps(const Image *mask, size_t y, size_t x, int invert) {
    return is_light(mask->rgb + 3 * (y * mask->W + x)) == !invert;
}

Err mask_decode(Image *mask, const char **note, const uint8_t *bytes, size_t size, int invert, size_t pixels,
                int *too_many) {
    Image white = {0};
    TRY(image_decode_most(mask, bytes, size, IMAGE_UPRIGHT | IMAGE_ON_BLACK, pixels, too_many));
    TRY(image_decode(&white, bytes, size, IMAGE_UPRIGHT));
    const MaskKind kind = mask_kind(mask, &white);
    for (size_t i = 0; i < mask->H * mask->W && kind == MASK_PICTURE; i++)
        memset(mask->rgb + 3 * i, is_solid(mask->rgb + 3 * i, white.rgb + 3 * i) ? 255 : 0, 3);
    *note = kind_note(kind, invert);
    if (kind == MASK_PAINT) {
        uint8_t *black = mask->rgb;
        mask->rgb = white.rgb, white.rgb = black;
    }
    image_free(&white);
    return OK;
}

Err mask_size_error(const Image *mask, size_t H, size_t W, size_t size) {
    if (H == size && W == size)
        return err("the mask is %zux%zu; expected the picture's size, %zux%zu", mask->W, mask->H, W, H);
    return err("the mask is %zux%zu; expected the picture's size, %zux%zu, or the model's, %zux%zu", mask->W, mask->H,
               W, H, size, size);
}

Err mask_read(uint8_t *keep, const char **note, const char *path, Prep prep, size_t size, size_t H, size_t W,
              int invert) {
    Image mask = {0};
    uint8_t *bytes;
    size_t n;
    int too_many;
    TRY(file_bytes(&bytes, &n, path, IMAGE_FILE_BYTES, NULL));
    Err e = mask_decode(&mask, note, bytes, n, invert, 0, &too_many);
    if (e == OK && (mask.H != H || mask.W != W) && (mask.H != size || mask.W != size))
        e = mask_size_error(&mask, H, W, size);
    if (e == OK) e = mask_square(keep, &mask, prep, size, invert);
    image_free(&mask);
    free(bytes);
    return e == OK ? OK : err_in(path);
}
