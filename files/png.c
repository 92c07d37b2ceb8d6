/* png.c - PNG in and out. libpng reports errors by longjmp: its state is one struct, so that nothing lives in registers
 * across the jump, and the jump becomes an Err at one place. */
#include "files/decode.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <png.h>

/* ------------------------------------------------------------------------------------------------------------
 * In
 * ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    const uint8_t *bytes;
    size_t size, at;
    Image *im;
    uint8_t *raw;      /* one row, or all of them when interlaced: 8 or 16 bits, 3 or 4 channels */
    char message[200]; /* what libpng said before it jumped */
    png_structp png;
    png_infop info;
} PngIn;

static void png_in_error(png_structp png, png_const_charp text) {
    PngIn *p = png_get_error_ptr(png);
    snprintf(p->message, sizeof p->message, "%s", text);
    png_longjmp(png, 1);
}

/* Colour profiles and the like: nothing that changes pixels as we read them. */
static void png_ignore_warning(png_structp png, png_const_charp text) {
    (void)png;
    (void)text;
}

static void png_in_read(png_structp png, png_bytep to, size_t n) {
    PngIn *p = png_get_io_ptr(png);
    if (n > p->size - p->at) png_error(png, "the file is cut short");
    memcpy(to, p->bytes + p->at, n);
    p->at += n;
}

/* Everything that may jump. Every kind of PNG is expanded to RGB or RGBA of 8 or 16 bits. */
static Err png_in_body(PngIn *p) {
    png_structp png = p->png;
    png_set_read_fn(png, p, png_in_read);
    png_set_user_limits(png, IMAGE_MAX_SIDE, IMAGE_MAX_SIDE);
    png_set_crc_action(png, PNG_CRC_ERROR_QUIT, PNG_CRC_ERROR_QUIT);
    png_read_info(png, p->info);
    png_set_expand(png);
    png_set_gray_to_rgb(png);
    int passes = png_set_interlace_handling(png);
    png_read_update_info(png, p->info);

    size_t H = png_get_image_height(png, p->info), W = png_get_image_width(png, p->info);
    size_t channels = png_get_channels(png, p->info), stride = png_get_rowbytes(png, p->info);
    int depth = png_get_bit_depth(png, p->info);
    if ((channels != 3 && channels != 4) || (depth != 8 && depth != 16) || stride != W * channels * (size_t)depth / 8)
        return err("%zu channels of %d bits after expansion; 3 or 4 of 8 or 16 expected", channels, depth);
    TRY(image_alloc(p->im, H, W));
    TRY(mem_alloc(&p->raw, passes > 1 ? H : 1, stride, "the rows of a PNG"));
    for (int pass = 0; pass < passes; pass++)
        for (size_t y = 0; y < H; y++) {
            uint8_t *row = p->raw + (passes > 1 ? y * stride : 0);
            png_read_row(png, row, NULL);
            if (pass == passes - 1) png_row_to_rgb(p->im->rgb + y * W * 3, row, W, channels, depth);
        }
    png_read_end(png, p->info);
    return OK;
}

static int png_orientation(PngIn *p) {
#ifdef PNG_eXIf_SUPPORTED
    png_bytep exif = NULL;
    png_uint_32 n = 0;
    if (png_get_eXIf_1(p->png, p->info, &n, &exif)) return exif_orientation(exif, n);
#endif
    (void)p;
    return 1;
}

Err png_decode(Image *im, const uint8_t *bytes, size_t size, int upright) {
    PngIn p = {.bytes = bytes, .size = size, .im = im};
    p.png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &p, png_in_error, png_ignore_warning);
    p.info = p.png ? png_create_info_struct(p.png) : NULL;
    Err e;
    if (!p.info)
        e = err("no memory to read a PNG");
    else if (setjmp(png_jmpbuf(p.png)))
        e = err("damaged PNG: %s", p.message);
    else
        e = png_in_body(&p);
    int orientation = e == OK && upright ? png_orientation(&p) : 1;
    png_destroy_read_struct(&p.png, &p.info, NULL);
    free(p.raw);
    return e == OK ? image_orient(im, orientation) : FAILED;
}

/* ------------------------------------------------------------------------------------------------------------
 * Out
 * ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    AtomicFile file;
    const Image *im;
    png_text *text;
    size_t n_text;
    int write_failed; /* err_text() already says what */
    png_structp png;
    png_infop info;
} PngOut;

static void png_out_error(png_structp png, png_const_charp text) {
    PngOut *p = png_get_error_ptr(png);
    if (!p->write_failed) err("writing a PNG: %s", text);
    png_longjmp(png, 1);
}

static void png_out_write(png_structp png, png_bytep data, size_t n) {
    PngOut *p = png_get_io_ptr(png);
    p->write_failed = atomic_write(&p->file, data, n) != OK;
    if (p->write_failed) png_error(png, "write failed");
}

static void png_out_flush(png_structp png) {
    (void)png;
}

/* Whether s is well-formed UTF-8 with something beyond ASCII in it. */
static int is_wide_utf8(const char *s) {
    int wide = 0;
    for (size_t n; *s; s += n) {
        n = utf8_length(s);
        if (n == 0) return 0;
        wide |= n > 1;
    }
    return wide;
}

/* iTXt holds UTF-8, tEXt Latin-1: whatever is not UTF-8 goes there byte by byte. */
static Err png_texts(PngOut *p, const Config *text) {
    p->n_text = text ? text->n : 0;
    TRY(mem_alloc(&p->text, p->n_text, sizeof *p->text, "PNG texts"));
    for (size_t i = 0; i < p->n_text; i++) {
        const char *key = text->kv[i].key;
        size_t length = strlen(key);
        int plain = length >= 1 && length <= 79 && key[0] != ' ' && key[length - 1] != ' ' && !strstr(key, "  ");
        for (size_t k = 0; k < length; k++) plain &= key[k] >= ' ' && key[k] <= '~';
        if (!plain) return err("PNG text key '%s': 1..79 printable ASCII characters, single spaces expected", key);
        p->text[i].compression =
            is_wide_utf8(text->kv[i].value) ? PNG_ITXT_COMPRESSION_NONE : PNG_TEXT_COMPRESSION_NONE;
        p->text[i].key = text->kv[i].key;
        p->text[i].text = text->kv[i].value;
        p->text[i].lang = p->text[i].lang_key = "";
    }
    return OK;
}

/* Everything that may jump. */
static void png_out_body(PngOut *p) {
    png_structp png = p->png;
    const Image *im = p->im;
    png_set_write_fn(png, p, png_out_write, png_out_flush);
    png_set_user_limits(png, PNG_UINT_31_MAX, PNG_UINT_31_MAX);
    png_set_IHDR(png, p->info, (png_uint_32)im->W, (png_uint_32)im->H, 8, PNG_COLOR_TYPE_RGB, PNG_INTERLACE_NONE,
                 PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
    if (p->n_text) png_set_text(png, p->info, p->text, (int)p->n_text);
    png_write_info(png, p->info);
    for (size_t y = 0; y < im->H; y++) png_write_row(png, im->rgb + y * im->W * 3);
    png_write_end(png, p->info);
}

static Err png_encode(PngOut *p) {
    p->png = png_create_write_struct(PNG_LIBPNG_VER_STRING, p, png_out_error, png_ignore_warning);
    p->info = p->png ? png_create_info_struct(p->png) : NULL;
    Err e = OK;
    if (!p->info)
        e = err("no memory to write a PNG");
    else if (setjmp(png_jmpbuf(p->png)))
        e = FAILED;
    else
        png_out_body(p);
    png_destroy_write_struct(&p->png, &p->info);
    return e;
}

Err image_write_png(const char *path, const Image *im, const Config *text) {
    if (im->H < 1 || im->W < 1 || im->H > PNG_UINT_31_MAX || im->W > PNG_UINT_31_MAX / 8)
        return err("%s: a picture of %zu x %zu pixels cannot be a PNG", path, im->W, im->H);
    PngOut p = {.im = im};
    Err e = png_texts(&p, text);
    if (e == OK) e = atomic_open(&p.file, path);
    if (e == OK) e = atomic_close(&p.file, png_encode(&p));
    free(p.text);
    return e;
}
