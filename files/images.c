/* images.c - pictures in and out: files to pixels, pixels to batch rows, pixels to PNG files.
 *
 * Owns everything between a picture's bytes and a tensor: reading PNG, JPEG and WebP, resizing and cropping exactly as
 * the official preprocessing of each dataset does, and writing pictures.
 *
 * Refuses: a picture that is cut short or damaged in any way that its format lets us see (a PNG with one flipped byte
 * never loads; JPEG and WebP have no checksums, so some damage is invisible there), pictures with a side above
 * IMAGE_MAX_SIDE or more than IMAGE_MAX_PIXELS pixels, other formats (by name).
 *
 * How it is built: a file is read into memory whole, so that no decoder touches a file, and told by its first bytes.
 * libpng and libjpeg report errors by longjmp; each decoder keeps its state in one struct, so that nothing lives in
 * registers across the jump, and turns the jump into an Err at one place. A picture becomes a batch row in two steps:
 * prep_resize depends on the picture alone (its result is worth keeping in memory), prep_crop on the random draw.
 *
 * Read in this order: image_read, image_resize, image_prepare, image_grid. */
#include "files/files.h"

#include <ctype.h>
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include <jerror.h>
#include <jpeglib.h>
#include <png.h>

enum {
    IMAGE_MAX_PIXELS = 1 << 27, /* 400 MB of RGB: above any dataset, below what a hostile header could ask for */
    JPEG_MAX_SCANS = 500        /* real progressive files have about 10; thousands are an attack on our time */
};

/* ------------------------------------------------------------------------------------------------------------
 * Images in memory
 * ---------------------------------------------------------------------------------------------------------- */

static Err image_alloc(Image *im, size_t H, size_t W) {
    *im = (Image){0};
    if (H < 1 || W < 1 || H > IMAGE_MAX_SIDE || W > IMAGE_MAX_SIDE)
        return err("a picture of %zu x %zu pixels; sides of 1..%d expected", W, H, IMAGE_MAX_SIDE);
    if (H * W > IMAGE_MAX_PIXELS)
        return err("a picture of %zu x %zu pixels; at most %d pixels expected", W, H, IMAGE_MAX_PIXELS);
    TRY(mem_alloc(&im->rgb, H * W, 3, "a picture"));
    im->H = H;
    im->W = W;
    return OK;
}

void image_free(Image *im) {
    free(im->rgb);
    *im = (Image){0};
}

/* ------------------------------------------------------------------------------------------------------------
 * EXIF orientation
 * ---------------------------------------------------------------------------------------------------------- */

/* Orientation 1..8 from a TIFF structure of n bytes (what follows "Exif\0\0" in a JPEG, the whole eXIf chunk in a
 * PNG). Metadata is often sloppy, so anything out of order means 1, upright. */
static int exif_orientation(const uint8_t *p, size_t n) {
    enum { TAG_ORIENTATION = 0x112, TYPE_SHORT = 3, ENTRY = 12 };
    if (n < 8 || (memcmp(p, "II*\0", 4) != 0 && memcmp(p, "MM\0*", 4) != 0)) return 1;
    int hi = p[0] == 'I', lo = 1 - hi; /* offsets of a 16-bit number's two bytes */
#define U16(at) ((unsigned)p[(at) + (size_t)hi] << 8 | p[(at) + (size_t)lo])
    size_t ifd = p[0] == 'I' ? (size_t)U16(6) << 16 | U16(4) : (size_t)U16(4) << 16 | U16(6);
    if (ifd > n - 2) return 1;
    size_t entries = U16(ifd);
    for (size_t i = 0, at = ifd + 2; i < entries && at <= n - ENTRY && n >= ENTRY; i++, at += ENTRY)
        if (U16(at) == TAG_ORIENTATION && U16(at + 2) == TYPE_SHORT)
            return U16(at + 8) >= 1 && U16(at + 8) <= 8 ? (int)U16(at + 8) : 1;
#undef U16
    return 1;
}

/* Turns the stored picture upright. Orientations 5..8 exchange rows and columns. */
static Err image_orient(Image *im, int orientation) {
    if (orientation <= 1) return OK;
    int transposed = orientation >= 5;
    int from_bottom = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
    int from_right = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
    Image out;
    TRY(image_alloc(&out, transposed ? im->W : im->H, transposed ? im->H : im->W));
    for (size_t y = 0; y < out.H; y++)
        for (size_t x = 0; x < out.W; x++) {
            size_t sy = transposed ? x : y, sx = transposed ? y : x;
            if (from_bottom) sy = im->H - 1 - sy;
            if (from_right) sx = im->W - 1 - sx;
            memcpy(out.rgb + (y * out.W + x) * 3, im->rgb + (sy * im->W + sx) * 3, 3);
        }
    image_free(im);
    *im = out;
    return OK;
}

/* ------------------------------------------------------------------------------------------------------------
 * PNG in
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

/* A colour on white: round(255 * (c*a + 1-a)) with c and a in units of 1/most. most^2 is odd: no ties. */
static uint8_t on_white(uint64_t c, uint64_t a, uint64_t most) {
    const uint64_t v = c * a + most * (most - a);
    return (uint8_t)((255 * v + most * most / 2) / (most * most));
}

/* rgb (W,3) = one expanded PNG row of `channels` (3: opaque, 4: alpha last) of `depth` bits. */
static void png_row_to_rgb(uint8_t *rgb, const uint8_t *row, size_t W, size_t channels, int depth) {
    uint64_t most = depth == 16 ? 65535 : 255;
    if (depth == 8 && channels == 3) {
        memcpy(rgb, row, W * 3);
        return;
    }
    for (size_t x = 0; x < W; x++, rgb += 3) {
        uint64_t v[4] = {0, 0, 0, most};
        for (size_t c = 0; c < channels; c++, row += depth / 8)
            v[c] = depth == 16 ? (uint64_t)row[0] << 8 | row[1] : row[0]; /* PNG is big-endian */
        for (size_t c = 0; c < 3; c++) rgb[c] = on_white(v[c], v[3], most);
    }
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

static Err png_decode(Image *im, const uint8_t *bytes, size_t size, int upright) {
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
 * JPEG in
 * ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    struct jpeg_decompress_struct cinfo;
    struct jpeg_error_mgr manager;
    struct jpeg_progress_mgr progress;
    jmp_buf jump;
    char message[JMSG_LENGTH_MAX];
    const uint8_t *bytes;
    size_t size;
    Image *im;
    uint8_t *raw; /* one CMYK row */
    int orientation;
} JpegIn;

static void jpeg_in_error(j_common_ptr cinfo) {
    JpegIn *j = cinfo->client_data;
    cinfo->err->format_message(cinfo, j->message);
    longjmp(j->jump, 1);
}

/* Warnings (level < 0) mean damage that libjpeg papers over, such as a file cut short: here they are errors. Two are
 * harmless and common in real datasets: padding in front of the end marker, and a JFIF version from the future. */
static void jpeg_in_warning(j_common_ptr cinfo, int level) {
    const struct jpeg_error_mgr *m = cinfo->err;
    int padding = m->msg_code == JWRN_EXTRANEOUS_DATA && m->msg_parm.i[1] == 0xd9;
    if (level < 0 && !padding && m->msg_code != JWRN_JFIF_MAJOR) jpeg_in_error(cinfo);
}

static void jpeg_in_progress(j_common_ptr cinfo) {
    JpegIn *j = cinfo->client_data;
    if (cinfo->is_decompressor && j->cinfo.input_scan_number > JPEG_MAX_SCANS) {
        snprintf(j->message, sizeof j->message, "more than %d scans", JPEG_MAX_SCANS);
        longjmp(j->jump, 1);
    }
}

/* rgb (W,3) from a row of CMYK (W,4). Files with an Adobe marker store inks inverted: 255 is no ink. */
static void cmyk_to_rgb(uint8_t *rgb, const uint8_t *cmyk, size_t W, int inverted) {
    unsigned flip = inverted ? 0 : 255;
    for (size_t x = 0; x < W; x++, cmyk += 4, rgb += 3)
        for (size_t c = 0; c < 3; c++) rgb[c] = (uint8_t)(((cmyk[c] ^ flip) * (cmyk[3] ^ flip) + 127) / 255);
}

static int jpeg_orientation(const struct jpeg_decompress_struct *cinfo) {
    enum { PREFIX = 6 };
    for (jpeg_saved_marker_ptr m = cinfo->marker_list; m; m = m->next)
        if (m->data_length > PREFIX && memcmp(m->data, "Exif\0\0", PREFIX) == 0)
            return exif_orientation(m->data + PREFIX, m->data_length - PREFIX);
    return 1;
}

/* Everything that may jump. */
static Err jpeg_in_body(JpegIn *j) {
    struct jpeg_decompress_struct *cinfo = &j->cinfo;
    jpeg_create_decompress(cinfo);
    cinfo->progress = &j->progress;
    j->progress.progress_monitor = jpeg_in_progress;
    jpeg_mem_src(cinfo, j->bytes, (unsigned long)j->size);
    jpeg_save_markers(cinfo, JPEG_APP0 + 1, 0xffff);
    jpeg_read_header(cinfo, TRUE);
    size_t W = cinfo->image_width;
    TRY(image_alloc(j->im, cinfo->image_height, W)); /* before libjpeg allocates anything of that size */
    int cmyk = cinfo->num_components == 4;
    j->orientation = jpeg_orientation(cinfo);
    cinfo->out_color_space = cmyk ? JCS_CMYK : JCS_RGB;
    if (cmyk) TRY(mem_alloc(&j->raw, W, 4, "a CMYK row"));
    jpeg_start_decompress(cinfo);
    while (cinfo->output_scanline < cinfo->output_height) {
        uint8_t *rgb = j->im->rgb + (size_t)cinfo->output_scanline * W * 3;
        JSAMPROW row = cmyk ? j->raw : rgb;
        jpeg_read_scanlines(cinfo, &row, 1);
        if (cmyk) cmyk_to_rgb(rgb, row, W, cinfo->saw_Adobe_marker);
    }
    jpeg_finish_decompress(cinfo); /* reads up to the end marker: finds files cut right before it */
    return OK;
}

static Err jpeg_decode(Image *im, const uint8_t *bytes, size_t size, int upright) {
    JpegIn j = {.bytes = bytes, .size = size, .im = im};
    j.cinfo.err = jpeg_std_error(&j.manager);
    j.manager.error_exit = jpeg_in_error;
    j.manager.emit_message = jpeg_in_warning;
    j.cinfo.client_data = &j;
    Err e;
    if (setjmp(j.jump))
        e = err("damaged JPEG: %s", j.message);
    else
        e = jpeg_in_body(&j);
    jpeg_destroy_decompress(&j.cinfo);
    free(j.raw);
    return e == OK ? image_orient(im, upright ? j.orientation : 1) : FAILED;
}

/* ------------------------------------------------------------------------------------------------------------
 * WebP in
 * ---------------------------------------------------------------------------------------------------------- */

#ifdef HAVE_WEBP
#include <webp/decode.h>
#define READABLE "PNG, JPEG or WebP"
enum { WEBP_LEFT_OUT = 0 };

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
static Err webp_decode(Image *im, const uint8_t *bytes, size_t size) {
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
#define READABLE "PNG or JPEG"
enum { WEBP_LEFT_OUT = 1 };

static Err webp_decode(Image *im, const uint8_t *bytes, size_t size) {
    (void)im, (void)bytes, (void)size;
    return err(
        "is a WebP file, and this build reads none: install libwebp (Debian: apt-get install libwebp-dev) and run "
        "make again");
}
#endif

/* ------------------------------------------------------------------------------------------------------------
 * Pictures in
 * ---------------------------------------------------------------------------------------------------------- */

typedef enum { KIND_UNKNOWN, KIND_PNG, KIND_JPEG, KIND_WEBP, KIND_OTHER } Kind;

/* What the first bytes say. *name is for messages. */
static Kind file_kind(const char **name, const uint8_t *p, size_t n) {
    static const struct {
        Kind kind;
        size_t at, length;
        const char *bytes, *name;
    } known[] = {
        {KIND_PNG, 0, 8, "\x89PNG\r\n\x1a\n", "PNG"},
        {KIND_JPEG, 0, 3, "\xff\xd8\xff", "JPEG"},
        {KIND_WEBP, 8, 4, "WEBP", "WebP"},
        {KIND_OTHER, 0, 4, "GIF8", "GIF"},
        {KIND_OTHER, 0, 2, "BM", "BMP"},
        {KIND_OTHER, 0, 4, "II*\0", "TIFF"},
        {KIND_OTHER, 0, 4, "MM\0*", "TIFF"},
        {KIND_OTHER, 4, 8, "ftypavif", "AVIF"},
        {KIND_OTHER, 4, 7, "ftyphei", "HEIC"},
        {KIND_OTHER, 0, 5, "%PDF-", "PDF"},
        {KIND_OTHER, 0, 4, "PK\3\4", "zip"},
        {KIND_OTHER, 0, 2, "\x1f\x8b", "gzip"},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (n >= known[i].at + known[i].length && memcmp(p + known[i].at, known[i].bytes, known[i].length) == 0) {
            *name = known[i].name;
            return known[i].kind;
        }
    while (n && isspace(*p)) p++, n--;
    *name = "HTML";
    if (n >= 5 && (strncasecmp((const char *)p, "<html", 5) == 0 || strncasecmp((const char *)p, "<!doc", 5) == 0))
        return KIND_OTHER;
    *name = "XML or SVG";
    return n && *p == '<' ? KIND_OTHER : KIND_UNKNOWN;
}

int is_picture(const uint8_t *bytes, size_t n) {
    const char *name;
    Kind kind = file_kind(&name, bytes, n);
    return kind == KIND_PNG || kind == KIND_JPEG || kind == KIND_WEBP;
}

int is_left_out(const uint8_t *bytes, size_t n) {
    const char *name;
    return WEBP_LEFT_OUT && file_kind(&name, bytes, n) == KIND_WEBP;
}

static Err decode_any(Image *im, const uint8_t *bytes, size_t size, int upright) {
    const char *name;
    switch (file_kind(&name, bytes, size)) {
    case KIND_PNG: return png_decode(im, bytes, size, upright);
    case KIND_JPEG: return jpeg_decode(im, bytes, size, upright);
    case KIND_WEBP: return webp_decode(im, bytes, size);
    case KIND_OTHER: return err("is %s %s file; " READABLE " expected", strchr("AEIOHX", name[0]) ? "an" : "a", name);
    default: return err("is neither PNG nor JPEG nor WebP");
    }
}

Err image_decode(Image *im, const uint8_t *bytes, size_t size, int upright) {
    *im = (Image){0};
    Err e = decode_any(im, bytes, size, upright);
    if (e != OK) image_free(im);
    return e;
}

Err image_read(Image *im, const char *path) {
    uint8_t *bytes;
    size_t size;
    *im = (Image){0};
    TRY(file_bytes(&bytes, &size, path, IMAGE_FILE_BYTES, NULL));
    Err e = image_decode(im, bytes, size, 1);
    free(bytes);
    return e == OK ? OK : err_in(path);
}

/* ------------------------------------------------------------------------------------------------------------
 * PNG out
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

/* ------------------------------------------------------------------------------------------------------------
 * Resizing
 * ---------------------------------------------------------------------------------------------------------- */

static void resize_nearest(Image *out, const Image *in) {
    for (size_t y = 0; y < out->H; y++)
        for (size_t x = 0; x < out->W; x++) {
            size_t from = y * in->H / out->H * in->W + x * in->W / out->W;
            memcpy(out->rgb + (y * out->W + x) * 3, in->rgb + from * 3, 3);
        }
}

/* Exact halving: OpenCV answers INTER_LINEAR with the mean of 2x2 pixels. */
static void resize_half(Image *out, const Image *in) {
    for (size_t y = 0; y < out->H; y++)
        for (size_t x = 0; x < out->W; x++)
            for (size_t c = 0; c < 3; c++) {
                const uint8_t *a = in->rgb + (2 * y * in->W + 2 * x) * 3 + c, *b = a + in->W * 3;
                out->rgb[(y * out->W + x) * 3 + c] = (uint8_t)((a[0] + a[3] + b[0] + b[3] + 2) >> 2);
            }
}

/* Where output pixel i of `out` lies among `in` source pixels, half-pixel centres: pixels at and at+1, weights with
 * LINEAR_BITS fractional bits rounded half to even. Computed in float, as OpenCV does. */
enum { LINEAR_BITS = 11 };
typedef struct {
    ptrdiff_t at; /* -1 and in-1 are possible: clamp */
    int w0, w1;
} LinearTap;
static LinearTap linear_tap(size_t i, size_t in, size_t out) {
    double scale = 1 / ((double)out / (double)in);
    float f = (float)(((double)i + 0.5) * scale - 0.5);
    float whole = floorf(f);
    f -= whole;
    return (LinearTap){(ptrdiff_t)whole, (int)lrintf((1 - f) * (1 << LINEAR_BITS)),
                       (int)lrintf(f * (1 << LINEAR_BITS))};
}

static size_t clamp_index(ptrdiff_t i, size_t n) {
    return i < 0 ? 0 : (size_t)i >= n ? n - 1 : (size_t)i;
}

/* to (out,3) = a source row (in,3) at the column taps, LINEAR_BITS fractional bits. */
static void linear_row(int32_t *to, const uint8_t *row, const LinearTap *tap, size_t in, size_t out) {
    for (size_t x = 0; x < out; x++) {
        const uint8_t *a = row + clamp_index(tap[x].at, in) * 3;
        int inside = tap[x].at >= 0 && (size_t)tap[x].at < in - 1; /* else the edge pixel alone */
        for (size_t c = 0; c < 3; c++)
            to[x * 3 + c] = inside ? a[c] * tap[x].w0 + a[c + 3] * tap[x].w1 : a[c] << LINEAR_BITS;
    }
}

/* Rows first, then columns; the second pass drops bits in the steps in which OpenCV drops them, so that every
 * pixel comes out the same. row[k] holds the horizontal pass of source row have[k]. */
static Err resize_linear(Image *out, const Image *in) {
    LinearTap *tap = NULL;
    int32_t *row[2] = {NULL, NULL};
    Err e = mem_alloc(&tap, out->W, sizeof *tap, "column weights");
    for (int k = 0; k < 2 && e == OK; k++) e = mem_alloc(&row[k], out->W * 3, sizeof *row[k], "a resized row");
    size_t have[2] = {SIZE_MAX, SIZE_MAX};
    for (size_t x = 0; x < out->W && e == OK; x++) tap[x] = linear_tap(x, in->W, out->W);
    for (size_t y = 0; y < out->H && e == OK; y++) {
        LinearTap v = linear_tap(y, in->H, out->H);
        size_t want[2] = {clamp_index(v.at, in->H), clamp_index(v.at + 1, in->H)};
        if (want[0] == have[1]) { /* the lower row of the last line is the upper one of this */
            int32_t *swap = row[0];
            row[0] = row[1], row[1] = swap;
            have[1] = have[0], have[0] = want[0];
        }
        for (int k = 0; k < 2; k++)
            if (have[k] != want[k]) {
                linear_row(row[k], in->rgb + want[k] * in->W * 3, tap, in->W, out->W);
                have[k] = want[k];
            }
        uint8_t *to = out->rgb + y * out->W * 3;
        for (size_t i = 0; i < out->W * 3; i++)
            to[i] = (uint8_t)((((v.w0 * (row[0][i] >> 4)) >> 16) + ((v.w1 * (row[1][i] >> 4)) >> 16) + 2) >> 2);
    }
    free(tap);
    free(row[0]);
    free(row[1]);
    return e;
}

/* Antialiased bicubic along one axis: output i is the weighted sum of n[i] source pixels from first[i]. */
enum { BICUBIC_BITS = 22 };
typedef struct {
    size_t *first, *n; /* (out) */
    size_t most;       /* row stride of weight */
    int32_t *weight;   /* (out, most), BICUBIC_BITS fractional bits, rows sum to about 1 */
} Taps;

/* Keys' cubic with a = -0.5. */
static double cubic(double x) {
    const double a = -0.5;
    x = fabs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

static void taps_free(Taps *t) {
    free(t->first);
    free(t->n);
    free(t->weight);
}

/* One row of weights around source position `centre`; w is scratch (most). */
static void taps_fill(Taps *t, double *w, size_t i, size_t in, double scale) {
    double wide = scale < 1 ? 1 : scale, centre = ((double)i + 0.5) * scale, sum = 0;
    double from = centre - 2 * wide + 0.5, to = centre + 2 * wide + 0.5;
    size_t first = from < 0 ? 0 : (size_t)from, end = to > (double)in ? in : (size_t)to;
    for (size_t k = 0; k < end - first; k++) sum += w[k] = cubic(((double)(first + k) - centre + 0.5) / wide);
    t->first[i] = first;
    t->n[i] = end - first;
    for (size_t k = 0; k < end - first; k++)
        t->weight[i * t->most + k] = (int32_t)round(w[k] / sum * (1 << BICUBIC_BITS));
}

static Err taps_make(Taps *t, size_t in, size_t out) {
    double scale = (double)in / (double)out, *w = NULL;
    *t = (Taps){.most = (size_t)ceil(2 * (scale < 1 ? 1 : scale)) * 2 + 1};
    size_t weights;
    Err e = size_mul(&weights, out, t->most);
    if (e == OK) e = mem_alloc(&t->first, out, sizeof *t->first, "resize taps");
    if (e == OK) e = mem_alloc(&t->n, out, sizeof *t->n, "resize taps");
    if (e == OK) e = mem_alloc(&t->weight, weights, sizeof *t->weight, "resize weights");
    if (e == OK) e = mem_alloc(&w, t->most, sizeof *w, "resize weights");
    for (size_t i = 0; i < out && e == OK; i++) taps_fill(t, w, i, in, scale);
    free(w);
    if (e != OK) taps_free(t);
    return e;
}

static uint8_t clip_bicubic(int32_t v) {
    v >>= BICUBIC_BITS;
    return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
}

/* out (H,out,3) = the rows of in (H,in,3) */
static void bicubic_columns(Image *out, const Image *in, const Taps *t) {
    for (size_t y = 0; y < in->H; y++)
        for (size_t x = 0; x < out->W; x++) {
            const uint8_t *from = in->rgb + (y * in->W + t->first[x]) * 3;
            const int32_t *w = t->weight + x * t->most;
            int32_t sum[3] = {1 << (BICUBIC_BITS - 1), 1 << (BICUBIC_BITS - 1), 1 << (BICUBIC_BITS - 1)};
            for (size_t k = 0; k < t->n[x]; k++, from += 3)
                for (size_t c = 0; c < 3; c++) sum[c] += from[c] * w[k];
            for (size_t c = 0; c < 3; c++) out->rgb[(y * out->W + x) * 3 + c] = clip_bicubic(sum[c]);
        }
}

/* out (out,W,3) = the columns of in (in,W,3); sum (W*3) is scratch */
static void bicubic_rows(Image *out, const Image *in, const Taps *t, int32_t *sum) {
    size_t row = in->W * 3;
    for (size_t y = 0; y < out->H; y++) {
        for (size_t i = 0; i < row; i++) sum[i] = 1 << (BICUBIC_BITS - 1);
        for (size_t k = 0; k < t->n[y]; k++) {
            const uint8_t *from = in->rgb + (t->first[y] + k) * row;
            int32_t w = t->weight[y * t->most + k];
            for (size_t i = 0; i < row; i++) sum[i] += from[i] * w;
        }
        for (size_t i = 0; i < row; i++) out->rgb[y * row + i] = clip_bicubic(sum[i]);
    }
}

/* Columns, then rows, rounded to 8 bits between, each only where the size changes: as Pillow. */
static Err resize_bicubic(Image *out, const Image *in) {
    Taps across = {0}, down = {0};
    Image wide = {0};
    int32_t *sum = NULL;
    Err e = OK;
    if (out->W != in->W) {
        e = taps_make(&across, in->W, out->W);
        if (e == OK && out->H != in->H) e = image_alloc(&wide, in->H, out->W);
        if (e == OK) bicubic_columns(out->H != in->H ? &wide : out, in, &across);
    }
    if (e == OK && out->H != in->H) {
        e = taps_make(&down, in->H, out->H);
        if (e == OK) e = mem_alloc(&sum, out->W * 3, sizeof *sum, "a resized row");
        if (e == OK) bicubic_rows(out, out->W != in->W ? &wide : in, &down, sum);
    }
    if (across.weight) taps_free(&across);
    if (down.weight) taps_free(&down);
    image_free(&wide);
    free(sum);
    return e;
}

Err image_resize(Image *out, const Image *in, size_t H, size_t W, Filter filter) {
    if (in->H < 1 || in->W < 1) return err("resizing an empty picture");
    TRY(image_alloc(out, H, W));
    Err e = OK;
    if (H == in->H && W == in->W)
        memcpy(out->rgb, in->rgb, H * W * 3);
    else if (filter == FILTER_NEAREST)
        resize_nearest(out, in);
    else if (filter == FILTER_LINEAR && in->H == 2 * H && in->W == 2 * W)
        resize_half(out, in);
    else
        e = filter == FILTER_LINEAR ? resize_linear(out, in) : resize_bicubic(out, in);
    if (e != OK) image_free(out);
    return e;
}

/* ------------------------------------------------------------------------------------------------------------
 * Preprocessing (SPEC section 10)
 * ---------------------------------------------------------------------------------------------------------- */

/* out = the centre square of im; odd remainders leave the larger part below and on the right. */
static Err centre_square(Image *out, const Image *im) {
    size_t side = im->H < im->W ? im->H : im->W;
    size_t y0 = (im->H - side) / 2, x0 = (im->W - side) / 2;
    TRY(image_alloc(out, side, side));
    for (size_t y = 0; y < side; y++) memcpy(out->rgb + y * side * 3, im->rgb + ((y0 + y) * im->W + x0) * 3, side * 3);
    return OK;
}

Err prep_read(Prep *out, const Config *c) {
    static const char *const names[] = {"folder", "ffhq", "imagenet", "lsun"};
    const char *name = config_get(c, "data.", "prep");
    *out = PREP_FOLDER;
    for (int k = 0; name && k < 4; k++)
        if (!strcmp(name, names[k])) return *out = (Prep)k, OK;
    return name ? err("data.prep %.200s: expected folder, ffhq, imagenet or lsun", name) : OK;
}

Err prep_resize(Image *out, const Image *im, Prep prep, size_t size) {
    if (prep == PREP_FFHQ || prep == PREP_IMAGENET) {
        double scale = (double)size / (double)(im->H < im->W ? im->H : im->W);
        return image_resize(out, im, (size_t)rint((double)im->H * scale), (size_t)rint((double)im->W * scale),
                            FILTER_LINEAR); /* rint: half to even, as Python's round */
    }
    Image square;
    TRY(centre_square(&square, im));
    Err e = image_resize(out, &square, size, size, FILTER_BICUBIC);
    image_free(&square);
    return e;
}

static size_t crop_offset(size_t spare, double u) {
    return u < 0 ? spare / 2 : (size_t)((double)spare * u);
}

void prep_crop(real *out, const Image *im, size_t size, double u_y, double u_x, int flip) {
    real value[256];
    for (int i = 0; i < 256; i++) value[i] = (real)(i / 127.5 - 1);
    size_t y0 = crop_offset(im->H - size, u_y), x0 = crop_offset(im->W - size, u_x);
    for (size_t c = 0; c < 3; c++)
        for (size_t y = 0; y < size; y++) {
            const uint8_t *row = im->rgb + ((y0 + y) * im->W + x0) * 3 + c;
            for (size_t x = 0; x < size; x++) *out++ = value[row[(flip ? size - 1 - x : x) * 3]];
        }
}

void image_mirror(real *images, size_t planes, size_t side) {
    for (size_t row = 0; row < planes * side; row++)
        for (size_t i = 0, j = side - 1; i < j; i++, j--) {
            const real keep = images[row * side + i];
            images[row * side + i] = images[row * side + j];
            images[row * side + j] = keep;
        }
}

Err image_prepare(real *out, const Image *im, Prep prep, size_t size, double u_crop_y, double u_crop_x, int flip) {
    if (!(u_crop_y < 1 && u_crop_x < 1)) return err("crop position %g, %g: below 1 expected", u_crop_y, u_crop_x);
    if (size < 1 || size > IMAGE_MAX_SIDE) return err("size %zu: 1..%d expected", size, IMAGE_MAX_SIDE);
    if (im->H < 1 || im->W < 1) return err("preparing an empty picture");
    Image resized;
    TRY(prep_resize(&resized, im, prep, size));
    prep_crop(out, &resized, size, u_crop_y, u_crop_x, flip);
    image_free(&resized);
    return OK;
}

/* Truncation, not rounding: what the official sampling script does. NaN becomes black. */
static uint8_t real_to_u8(real x) {
    x = (x + 1) / 2;
    x = x > 0 ? x < 1 ? x : 1 : 0;
    return (uint8_t)(255 * x);
}

Err image_grid(Image *out, const real *images, size_t n, size_t H, size_t W, size_t columns, size_t gap) {
    if (n < 1 || columns < 1 || H < 1 || W < 1) return err("a grid of no pictures");
    if (columns > n) columns = n;
    size_t rows = (n + columns - 1) / columns;
    if (H > IMAGE_MAX_SIDE || W > IMAGE_MAX_SIDE || gap > IMAGE_MAX_SIDE || rows > IMAGE_MAX_SIDE ||
        columns > IMAGE_MAX_SIDE)
        return err("a grid of %zu x %zu pictures of %zu x %zu is too large", columns, rows, W, H);
    TRY(image_alloc(out, rows * (H + gap) - gap, columns * (W + gap) - gap));
    memset(out->rgb, 255, out->H * out->W * 3);
    for (size_t i = 0; i < n; i++)
        for (size_t y = 0; y < H; y++) {
            uint8_t *to = out->rgb + ((i / columns * (H + gap) + y) * out->W + i % columns * (W + gap)) * 3;
            for (size_t x = 0; x < W; x++)
                for (size_t c = 0; c < 3; c++) *to++ = real_to_u8(images[((i * 3 + c) * H + y) * W + x]);
        }
    return OK;
}
