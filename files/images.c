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

/* It begins in ASCII, and every byte is one of a text, in ASCII or beyond. */
static int is_text(const uint8_t *p, size_t n) {
    if (n && p[0] >= 0x80) return 0;
    for (size_t i = 0; i < n; i++)
        if ((p[i] < ' ' && !isspace(p[i])) || p[i] == 0x7f) return 0;
    return n > 0;
}

/* Texts: by what stands first in them. */
static FileKind text_kind(const char **name, const uint8_t *p, size_t n) {
    enum { LOOKED_AT = 4096 };
    const char *text = (const char *)p;
    n = min_size(n, LOOKED_AT);
    if (n >= 3 && !memcmp(text, "\xef\xbb\xbf", 3)) text += 3, n -= 3; /* a byte order mark */
    while (n && isspace((uint8_t)*text)) text++, n--;
    *name = "HTML";
    if (n >= 5 && (strncasecmp(text, "<html", 5) == 0 || strncasecmp(text, "<!doc", 5) == 0)) return FILE_OTHER;
    *name = "XML or SVG";
    if (n && *text == '<') return FILE_OTHER;
    *name = "text";
    return is_text((const uint8_t *)text, n) ? FILE_OTHER : FILE_UNKNOWN;
}

FileKind file_kind(const char **name, const uint8_t *p, size_t n) {
    static const struct {
        FileKind kind;
        size_t at, length;
        const char *bytes, *name;
    } known[] = {
        {FILE_PNG, 0, 8, "\x89PNG\r\n\x1a\n", "PNG"},
        {FILE_JPEG, 0, 3, "\xff\xd8\xff", "JPEG"},
        {FILE_WEBP, 8, 4, "WEBP", "WebP"},
        {FILE_FOREIGN, 0, 4, "GIF8", "GIF"},
        {FILE_FOREIGN, 0, 2, "BM", "BMP"},
        {FILE_FOREIGN, 0, 4, "II*\0", "TIFF"},
        {FILE_FOREIGN, 0, 4, "MM\0*", "TIFF"},
        {FILE_FOREIGN, 0, 4, "II+\0", "TIFF"},
        {FILE_FOREIGN, 0, 4, "MM\0+", "TIFF"},
        {FILE_FOREIGN, 4, 8, "ftypavif", "AVIF"},
        {FILE_FOREIGN, 4, 8, "ftypavis", "AVIF"},
        {FILE_FOREIGN, 4, 7, "ftyphei", "HEIC"},
        {FILE_FOREIGN, 4, 7, "ftyphev", "HEIC"},
        {FILE_FOREIGN, 4, 8, "ftypmif1", "HEIC"},
        {FILE_FOREIGN, 4, 8, "ftypmsf1", "HEIC"},
        {FILE_FOREIGN, 4, 8, "ftypcrx ", "Canon raw"},
        {FILE_OTHER, 4, 4, "ftyp", "video"},
        {FILE_OTHER, 0, 4, "\x1a\x45\xdf\xa3", "video"},
        {FILE_OTHER, 8, 4, "AVI ", "video"},
        {FILE_FOREIGN, 0, 2, "\xff\x0a", "JPEG XL"},
        {FILE_FOREIGN, 4, 8, "JXL \r\n\x87\n", "JPEG XL"},
        {FILE_FOREIGN, 4, 4, "jP  ", "JPEG 2000"},
        {FILE_FOREIGN, 0, 4, "\xff\x4f\xff\x51", "JPEG 2000"},
        {FILE_FOREIGN, 0, 4, "8BPS", "Photoshop"},
        {FILE_FOREIGN, 0, 8, "gimp xcf", "GIMP"},
        {FILE_FOREIGN, 0, 4, "\0\0\1\0", "icon"},
        {FILE_FOREIGN, 0, 4, "\x76\x2f\x31\x01", "OpenEXR"},
        {FILE_FOREIGN, 0, 4, "qoif", "QOI"},
        {FILE_FOREIGN, 0, 4, "DDS ", "DDS"},
        {FILE_OTHER, 0, 5, "%PDF-", "PDF"},
        {FILE_OTHER, 0, 4, "%!PS", "PostScript"},
        {FILE_OTHER, 0, 6, "\x93NUMPY", "NumPy"},
        {FILE_OTHER, 0, 4, "PK\3\4", "zip"},
        {FILE_OTHER, 0, 2, "\x1f\x8b", "gzip"},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (n >= known[i].at + known[i].length && memcmp(p + known[i].at, known[i].bytes, known[i].length) == 0 &&
            !(known[i].length == 2 && is_text(p, n))) { /* "BMW ..." */
            *name = known[i].name;
            return known[i].kind;
        }
    *name = "portable pixmap (PBM, PGM, PPM)";
    if (n >= 3 && p[0] == 'P' && p[1] >= '1' && p[1] <= '7' && isspace(p[2])) return FILE_FOREIGN;
    return text_kind(name, p, n);
}

int is_picture(const uint8_t *bytes, size_t n) {
    const char *name;
    const FileKind kind = file_kind(&name, bytes, n);
    return kind == FILE_PNG || kind == FILE_JPEG || kind == FILE_WEBP;
}

/* What is no picture of ours is damage to a set of pictures. */
static Err decode_rows(Rows *r, const uint8_t *bytes, size_t size) {
    const char *name;
    switch (file_kind(&name, bytes, size)) {
    case FILE_PNG: return png_decode(r, bytes, size);
    case FILE_JPEG: return jpeg_decode(r, bytes, size);
    case FILE_WEBP: return webp_decode(r, bytes, size);
    case FILE_FOREIGN:
    case FILE_OTHER:
        return err_damaged("is %s %s file; " READABLE " expected", strchr("AEIOHX", name[0]) ? "an" : "a", name);
    default: return err_damaged("is neither PNG nor JPEG nor WebP");
    }
}

Err image_decode_most(Image *im, const uint8_t *bytes, size_t size, int how, size_t pixels, int *too_many) {
    Rows r = {.how = how, .out = im, .most = pixels};
    const Err e = rows_end(&r, decode_rows(&r, bytes, size));
    *too_many = r.too_many;
    return e;
}

Err image_decode(Image *im, const uint8_t *bytes, size_t size, int how) {
    int too_many;
    return image_decode_most(im, bytes, size, how, 0, &too_many);
}

Err image_decode_prepared(Image *im, const uint8_t *bytes, size_t size, Prep prep, size_t side) {
    Rows r = {.how = prep_how(prep), .prep = prep, .size = side, .out = im};
    if (side < 1 || side > IMAGE_MAX_SIDE) return err("size %zu: 1..%d expected", side, IMAGE_MAX_SIDE);
    return rows_end(&r, decode_rows(&r, bytes, size));
}

Err image_read_as(Image *im, const char *path, int how) {
    uint8_t *bytes;
    size_t size;
    *im = (Image){0};
    TRY(file_bytes(&bytes, &size, path, IMAGE_FILE_BYTES, NULL));
    Err e = image_decode(im, bytes, size, how);
    free(bytes);
    return e == OK ? OK : err_in(path);
}

Err image_read(Image *im, const char *path) {
    return image_read_as(im, path, IMAGE_UPRIGHT);
}
