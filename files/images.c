/* images.c - pictures in: files to pixels.
 *
 * Refuses: a picture that is cut short or damaged in any way that its format lets us see (a PNG with one flipped byte
 * never loads; JPEG and WebP have no checksums, so some damage is invisible there), pictures with a side above
 * IMAGE_MAX_SIDE or more than IMAGE_MAX_PIXELS pixels, other formats (by name).
 *
 * How it is built: a file is read into memory whole, so that no decoder touches a file, and told by its first bytes. A
 * decoder for each format (png.c, jpeg.c, webp.c) makes RGB of it; resize.c makes batch rows of that. */
#include "files/decode.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#ifdef HAVE_WEBP
#define READABLE "PNG, JPEG or WebP"
enum { WEBP_LEFT_OUT = 0 };
#else
#define READABLE "PNG or JPEG"
enum { WEBP_LEFT_OUT = 1 };
#endif

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
