/* png.c - PNG in and out. libpng reports errors by longjmp: its state is one struct, so that nothing lives in registers
 * across the jump, and the jump becomes an Err at one place. */
#include "files/decode.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <png.h>
#include <zlib.h>

/* ------------------------------------------------------------------------------------------------------------
 * In
 * ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    const uint8_t *bytes;
    size_t size, at;
    Rows *rows;
    uint8_t *raw, *rgb; /* a row: 8 or 16 bits, 3 or 4 channels; 8 bits, 3 channels */
    int orientation;    /* 0: unknown */
    int no_memory;      /* libpng asked for some and got none: then nothing that it says or gives is to be believed */
    char message[200];  /* what libpng said before it jumped */
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

static png_voidp png_in_malloc(png_structp png, png_alloc_size_t bytes) {
    PngIn *p = png_get_mem_ptr(png);
    void *memory = malloc(bytes);
    if (!memory) p->no_memory = 1;
    return memory;
}

static void png_in_free(png_structp png, png_voidp memory) {
    (void)png;
    free(memory);
}

static void png_in_read(png_structp png, png_bytep to, size_t n) {
    PngIn *p = png_get_io_ptr(png);
    if (n > p->size - p->at) png_error(png, "the file is cut short");
    memcpy(to, p->bytes + p->at, n);
    p->at += n;
}

/* From EXIF in its chunk or in ImageMagick's text, else from XMP. 0: nothing says it so far. */
static int png_orientation(PngIn *p) {
    static const struct {
        const char *key;
        int xmp, raw;
    } keys[] = {{"Raw profile type exif", 0, 1},
                {"Raw profile type APP1", 0, 1},
                {"XML:com.adobe.xmp", 1, 0},
                {"Raw profile type xmp", 1, 1}};
    png_textp text = NULL;
    png_unknown_chunkp chunk = NULL;
    int found = 0, n = png_get_unknown_chunks(p->png, p->info, &chunk);
    for (int i = 0; i < n && !found; i++)
        if (!memcmp(chunk[i].name, "eXIf", 4)) found = exif_orientation_prefixed(chunk[i].data, chunk[i].size);
    n = 0;
    png_get_text(p->png, p->info, &text, &n);
    for (size_t k = 0; k < sizeof keys / sizeof *keys; k++)
        for (int i = 0; i < n && !found; i++) {
            const size_t bytes = text[i].text_length ? text[i].text_length : text[i].itxt_length;
            if (!text[i].text || strcmp(text[i].key, keys[k].key) != 0) continue;
            found = keys[k].raw ? profile_orientation(text[i].text, bytes, keys[k].xmp)
                                : xmp_orientation((const uint8_t *)text[i].text, bytes);
        }
    return found;
}

/* Whether there are other pictures behind the first: an APNG's chunk acTL begins with their number. */
static int png_is_animated(PngIn *p) {
    png_unknown_chunkp chunk = NULL;
    const int n = png_get_unknown_chunks(p->png, p->info, &chunk);
    for (int i = 0; i < n; i++)
        if (!memcmp(chunk[i].name, "acTL", 4) && chunk[i].size >= 4) return png_get_uint_32(chunk[i].data) > 1;
    return 0;
}

/* The rows of one pass of an interlaced PNG: pixels from, from + step, ... of every so many rows. */
static void png_in_pass(PngIn *p, int pass, size_t H, size_t W, size_t channels, int depth, int how) {
    const size_t from = (size_t)PNG_PASS_START_COL(pass), step = (size_t)PNG_PASS_COL_OFFSET(pass);
    const size_t columns = PNG_PASS_COLS((png_uint_32)W, pass);
    if (!columns) return; /* libpng leaves such a pass out */
    for (size_t y = (size_t)PNG_PASS_START_ROW(pass); y < H; y += (size_t)PNG_PASS_ROW_OFFSET(pass)) {
        png_read_row(p->png, p->raw, NULL);
        samples_to_rgb(p->rgb, p->raw, columns, channels, depth, how);
        rows_put_part(p->rows, y, p->rgb, columns, from, step);
    }
}

/* Everything that may jump. Every kind of PNG is expanded to RGB or RGBA of 8 or 16 bits. */
static Err png_in_body(PngIn *p) {
    png_structp png = p->png;
    png_set_read_fn(png, p, png_in_read);
    png_set_user_limits(png, PNG_UINT_31_MAX, PNG_UINT_31_MAX); /* rows_size has ours */
    png_set_chunk_cache_max(png, MOST_TEXTS); /* libpng keeps each unpacked, with 8 MB at most, until the end */
    png_set_crc_action(png, PNG_CRC_ERROR_QUIT, PNG_CRC_ERROR_QUIT);
    png_set_keep_unknown_chunks(png, PNG_HANDLE_CHUNK_ALWAYS, (png_const_bytep) "acTL\0eXIf", 2);
    png_read_info(png, p->info);
    if (png_is_animated(p)) p->rows->note = "animated PNG, of which the first picture is used";
    if (!p->orientation) p->orientation = png_orientation(p);
    const int held = p->orientation, interlaced = png_get_interlace_type(png, p->info) != PNG_INTERLACE_NONE;
    const int clip = png_get_color_type(png, p->info) == PNG_COLOR_TYPE_GRAY && p->rows->how & IMAGE_OFFICIAL;
    TRY(rows_size(p->rows, png_get_image_height(png, p->info), png_get_image_width(png, p->info)));
    png_set_expand(png);
    png_set_gray_to_rgb(png);
    png_read_update_info(png, p->info);

    const size_t H = png_get_image_height(png, p->info), W = png_get_image_width(png, p->info);
    const size_t channels = png_get_channels(png, p->info), stride = png_get_rowbytes(png, p->info);
    const int depth = png_get_bit_depth(png, p->info), how = p->rows->how | (clip && depth == 16 ? SAMPLES_CLIP : 0);
    if ((channels != 3 && channels != 4) || (depth != 8 && depth != 16) || stride != W * channels * (size_t)depth / 8)
        return err("%zu channels of %d bits after expansion; 3 or 4 of 8 or 16 expected", channels, depth);
    if (how & SAMPLES_CLIP)
        p->rows->note = "16-bit grey, of which the official preprocessing makes white all above 255";
    TRY(rows_begin(p->rows, H, W, held, interlaced, 4 * stride));
    TRY(mem_alloc(&p->raw, stride, 1, "a row of a PNG"));
    TRY(mem_alloc(&p->rgb, W, 3, "a row of a picture"));
    for (int pass = 0; interlaced && pass < PNG_INTERLACE_ADAM7_PASSES; pass++)
        png_in_pass(p, pass, H, W, channels, depth, how);
    for (size_t y = 0; !interlaced && y < H; y++) {
        png_read_row(png, p->raw, NULL);
        samples_to_rgb(p->rgb, p->raw, W, channels, depth, how);
        rows_put(p->rows, y, p->rgb);
    }
    png_read_end(png, p->info);
    if (!held) p->orientation = png_orientation(p); /* it may come behind the pixels */
    return OK;
}

static Err png_in(PngIn *p) {
    Err e;
    p->at = 0;
    p->png = png_create_read_struct_2(PNG_LIBPNG_VER_STRING, p, png_in_error, png_ignore_warning, p, png_in_malloc,
                                      png_in_free);
    p->info = p->png ? png_create_info_struct(p->png) : NULL;
    if (!p->info)
        e = err("no memory to read a PNG");
    else if (setjmp(png_jmpbuf(p->png)))
        e = err_damaged("damaged PNG: %s", p->message);
    else
        e = png_in_body(p);
    if (p->no_memory) e = err("no memory to read a PNG");
    png_destroy_read_struct(&p->png, &p->info, NULL);
    free(p->raw);
    free(p->rgb);
    p->raw = p->rgb = NULL;
    return e;
}

Err png_decode(Rows *r, const uint8_t *bytes, size_t size) {
    PngIn p = {.bytes = bytes, .size = size, .rows = r};
    TRY(png_in(&p));
    const int late = p.orientation > 1 && r->how & IMAGE_UPRIGHT && r->orientation != p.orientation;
    return late ? png_in(&p) : OK;
}

/* ------------------------------------------------------------------------------------------------------------
 * Out
 * ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    AtomicFile file;
    uint8_t *bytes; /* instead of the file */
    size_t size, capacity;
    int in_memory;
    uint8_t *rgba; /* a row, if the picture has alpha */
    const Image *im;
    size_t enlarge;
    uint8_t *row; /* enlarged */
    png_text *text;
    char (*key)[PNG_KEY_BYTES + 1], **whole; /* of each text; a value with its key in front, or NULL */
    size_t n_text;
    int write_failed; /* err_text() already says what */
    uint8_t *profile; /* a chunk's */
    size_t profile_bytes;
    png_structp png;
    png_infop info;
} PngOut;

static void png_out_error(png_structp png, png_const_charp text) {
    PngOut *p = png_get_error_ptr(png);
    if (!p->write_failed) err("writing a PNG: %s%s", text, strstr(text, "too many") ? ", or no memory for them" : "");
    png_longjmp(png, 1);
}

static void png_out_write(png_structp png, png_bytep data, size_t n) {
    PngOut *p = png_get_io_ptr(png);
    if (p->in_memory) {
        p->write_failed = mem_grow(&p->bytes, p->size, n, &p->capacity, 1, "a PNG") != OK;
        if (!p->write_failed) memcpy(p->bytes + p->size, data, n), p->size += n;
    } else
        p->write_failed = atomic_write(&p->file, data, n) != OK;
    if (p->write_failed) png_error(png, "write failed");
}

static void png_out_flush(png_structp png) {
    (void)png;
}

int is_wide_utf8(const char *s) {
    int wide = 0;
    for (size_t n; *s; s += n) {
        n = utf8_length(s);
        if (n == 0) return 0;
        wide |= n > 1;
    }
    return wide;
}

int png_key(char out[PNG_KEY_BYTES + 1], const char *key) {
    size_t n = 0;
    for (const char *p = key; *p && n < PNG_KEY_BYTES; p++) {
        if (*p == ' ' && (n == 0 || out[n - 1] == ' ')) continue;
        out[n++] = *p >= ' ' && *p <= '~' ? *p : '?';
    }
    while (n && out[n - 1] == ' ') n--;
    if (n == 0) out[n++] = '?';
    out[n] = 0;
    return strcmp(out, key) == 0;
}

/* iTXt holds UTF-8, tEXt Latin-1: whatever is not UTF-8 goes there byte by byte. Where the key does not fit, the value
 * has it in front: "key value". */
static Err png_texts(PngOut *p, const Config *text) {
    p->n_text = text ? text->n : 0;
    TRY(mem_alloc(&p->text, p->n_text, sizeof *p->text, "PNG texts"));
    TRY(mem_alloc(&p->key, p->n_text, sizeof *p->key, "PNG texts"));
    TRY(mem_alloc(&p->whole, p->n_text, sizeof *p->whole, "PNG texts"));
    for (size_t i = 0; i < p->n_text; i++) {
        png_text *t = &p->text[i];
        const KeyValue *kv = &text->kv[i];
        t->text = kv->value;
        if (!png_key(p->key[i], kv->key)) {
            const size_t bytes = strlen(kv->key) + strlen(kv->value) + 2;
            TRY(mem_alloc(&p->whole[i], bytes, 1, "PNG texts"));
            snprintf(p->whole[i], bytes, "%s %s", kv->key, kv->value);
            t->text = p->whole[i];
        }
        t->compression = is_wide_utf8(t->text) ? PNG_ITXT_COMPRESSION_NONE : PNG_TEXT_COMPRESSION_NONE;
        t->key = p->key[i];
        t->lang = t->lang_key = "";
    }
    return OK;
}

Err png_profile(uint8_t **data, size_t *n, const Profile *p) {
    static const char name[] = "ICC profile"; /* and a zero byte; another says how it is packed */
    uLongf size = compressBound((uLong)p->size);
    TRY(mem_alloc(data, sizeof name + 1 + size, 1, "a colour profile"));
    memcpy(*data, name, sizeof name);
    const int z = compress2(*data + sizeof name + 1, &size, p->bytes, (uLong)p->size, Z_BEST_COMPRESSION);
    *n = sizeof name + 1 + size;
    if (z == Z_OK) return OK;
    free(*data);
    return err("no memory to pack a colour profile");
}

static void free_texts(PngOut *p) {
    for (size_t i = 0; p->whole && i < p->n_text; i++) free(p->whole[i]);
    free(p->whole);
    free(p->key);
    free(p->text);
}

/* rgba = row y, enlarged, with its alpha */
static void row_with_alpha(PngOut *p, size_t y) {
    const size_t N = p->enlarge, W = p->im->W;
    for (size_t x = 0; x < W * N; x++) {
        memcpy(p->rgba + 4 * x, p->row + 3 * x, 3);
        p->rgba[4 * x + 3] = p->im->alpha[y * W + x / N];
    }
}

/* Everything that may jump. */
static void png_out_body(PngOut *p) {
    png_structp png = p->png;
    const Image *im = p->im;
    const size_t N = p->enlarge;
    png_set_write_fn(png, p, png_out_write, png_out_flush);
    png_set_user_limits(png, PNG_UINT_31_MAX, PNG_UINT_31_MAX);
    png_set_IHDR(png, p->info, (png_uint_32)(im->W * N), (png_uint_32)(im->H * N), 8,
                 p->rgba ? PNG_COLOR_TYPE_RGB_ALPHA : PNG_COLOR_TYPE_RGB, PNG_INTERLACE_NONE,
                 PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
    if (p->n_text) png_set_text(png, p->info, p->text, (int)p->n_text);
    if (p->profile) { /* libpng itself would refuse some that others read */
        png_write_info_before_PLTE(png, p->info);
        png_write_chunk(png, (png_const_bytep) "iCCP", p->profile, p->profile_bytes);
    }
    png_write_info(png, p->info);
    for (size_t y = 0; y < im->H * N; y++) {
        if (work_stops()) png_error(png, "the work was stopped");
        if (y % N == 0) image_row_enlarged(p->row, im, y / N, N);
        if (p->rgba && y % N == 0) row_with_alpha(p, y / N);
        png_write_row(png, p->rgba ? p->rgba : p->row);
    }
    png_write_end(png, p->info);
}

static Err png_encode(PngOut *p) {
    p->png = png_create_write_struct(PNG_LIBPNG_VER_STRING, p, png_out_error, png_ignore_warning);
    p->info = p->png ? png_create_info_struct(p->png) : NULL;
    const Profile *profile = p->im->profile;
    Err e = p->im->alpha ? mem_alloc(&p->rgba, p->im->W * p->enlarge, 4, "a row of a PNG") : OK;
    if (e == OK && profile && profile->size) e = png_profile(&p->profile, &p->profile_bytes, profile);
    if (e != OK)
        ;
    else if (!p->info)
        e = err("no memory to write a PNG");
    else if (setjmp(png_jmpbuf(p->png)))
        e = FAILED;
    else
        png_out_body(p);
    png_destroy_write_struct(&p->png, &p->info);
    free(p->rgba), free(p->profile);
    return e;
}

Err image_write_png_enlarged(const char *path, const Image *im, size_t enlarge, const Config *text) {
    if (im->H < 1 || im->W < 1 || enlarge < 1 || im->H > PNG_UINT_31_MAX / enlarge ||
        im->W > PNG_UINT_31_MAX / 8 / enlarge)
        return err("%s: a picture of %zu x %zu pixels cannot be a PNG", path, im->W, im->H);
    PngOut p = {.im = im, .enlarge = enlarge};
    Err e = mem_alloc(&p.row, im->W * enlarge, 3, "a row of a PNG");
    if (e == OK) e = png_texts(&p, text);
    if (e == OK) e = atomic_open(&p.file, path);
    if (e == OK) e = atomic_close(&p.file, png_encode(&p));
    free_texts(&p);
    free(p.row);
    return e;
}

Err image_encode_png(uint8_t **bytes, size_t *size, const Image *im, const Config *text) {
    PngOut p = {.im = im, .enlarge = 1, .in_memory = 1};
    Err e = mem_alloc(&p.row, im->W, 3, "a row of a PNG");
    if (e == OK) e = png_texts(&p, text);
    if (e == OK) e = png_encode(&p);
    free_texts(&p);
    free(p.row);
    if (e != OK) free(p.bytes);
    *bytes = e == OK ? p.bytes : NULL;
    *size = p.size;
    return e;
}

Err image_write_png(const char *path, const Image *im, const Config *text) {
    return image_write_png_enlarged(path, im, 1, text);
}
