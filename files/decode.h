/* decode.h - what the files of pictures share among themselves: pictures in memory, where decoders put rows, and a
 * decoder for each format. */
#ifndef DECODE_H
#define DECODE_H

#include "files/files.h"

#ifdef HAVE_WEBP
#define READABLE "PNG, JPEG or WebP"
#else
#define READABLE "PNG or JPEG"
#endif

/* ---- pixels.c ---- */
Err image_size_check(size_t H, size_t W);
Err image_alloc(Image *im, size_t H, size_t W);
/* Where pixel (y,x) of a file that was held so lies in the upright picture. */
uint8_t *image_place(const Image *im, int orientation, size_t y, size_t x);
/* rgb (W,3) = a row of `channels` (3: opaque, 4: alpha last) of `depth` bits (8 or 16, big-endian). how: IMAGE_* flags,
 * and with IMAGE_OFFICIAL SAMPLES_CLIP: 16 bits are clipped to 255, as Pillow does with grey ones. */
enum { SAMPLES_CLIP = 1 << 8 };
void samples_to_rgb(uint8_t *rgb, const uint8_t *row, size_t W, size_t channels, int depth, int how);

/* row (N*W,3) = row y, every pixel N times. */
void image_row_enlarged(uint8_t *row, const Image *im, size_t y, size_t N);

/* ---- png.c: texts and profiles in PNGs ---- */
/* Whether s is well-formed UTF-8 with something beyond ASCII in it. */
int is_wide_utf8(const char *s);
/* out = the key as a PNG can hold it: 1..79 printable ASCII characters, single spaces. Whether it was so; if not, the value
 * is to have the whole key in front, "key value". */
enum { PNG_KEY_BYTES = 79 };
int png_key(char out[PNG_KEY_BYTES + 1], const char *key);

/* *data (n) = what the chunk iCCP of a PNG holds, to be freed. */
Err png_profile(uint8_t **data, size_t *n, const Profile *p);

/* ---- orientation.c. Metadata is often sloppy: 0 means that nothing in it says how the picture was held ---- */
/* Orientation from a TIFF structure (what follows "Exif\0\0" in a JPEG, the whole eXIf chunk in a PNG). */
int exif_orientation(const uint8_t *bytes, size_t n);
/* The same where "Exif\0\0" may be in front. */
int exif_orientation_prefixed(const uint8_t *bytes, size_t n);
/* From an XMP packet. */
int xmp_orientation(const uint8_t *bytes, size_t n);
/* From ImageMagick's texts "Raw profile type exif" and "... xmp": EXIF or XMP in hexadecimal. */
int profile_orientation(const char *text, size_t n, int xmp);

/* ---- resize.c ---- */
typedef struct Resizer Resizer;
/* What of a picture becomes what. */
typedef struct {
    size_t y0, x0, h, w; /* the part that is used */
    size_t H, W;         /* its size afterwards */
    Filter filter;
} Fit;
Err prep_fit(Fit *f, Prep prep, size_t size, size_t H, size_t W);
Err image_fit(Image *out, const Image *im, const Fit *f);
/* Of a picture whose file has file_H x file_W pixels, held so (1: upright); f is about the upright one. parts: rows come in
 * parts. */
Err resizer_start(Resizer **r, const Fit *f, size_t file_H, size_t file_W, int parts, int orientation);
size_t resizer_bytes(const Fit *f, int parts, int orientation); /* about how much it takes, the result included */
/* Takes row y of the file, (file_W,3), in any order. In parts: several times, with 0 where another part has the pixel. */
void resizer_row(Resizer *r, size_t y, const uint8_t *rgb);
Err resizer_finish(Resizer *r, Image *out);
void resizer_free(Resizer *r); /* NULL is fine */

/* ---- rows.c: where a decoder's rows go ---- */
typedef struct {
    int how;      /* IMAGE_* flags */
    Prep prep;    /* the picture is prepared as prep_resize does, ... */
    size_t size;  /* ... to this size; 0: it stays as it is */
    size_t most;  /* pixels at most, 0: see image_size_check; ... */
    int too_many; /* ... there are more */
    Image *out;   /* the result */
    /* from rows_begin on */
    size_t H, W; /* of the file */
    int orientation;
    size_t bytes;     /* counted in what all decoders take together */
    Image whole;      /* all pixels, upright, if size is 0, else ... */
    Resizer *resizer; /* ... they go here as they come */
    uint8_t *row;     /* (W,3) for rows_put_part */
    const char *note;
} Rows;
/* The file's size alone, before a decoder takes memory for it: a picture that promises too many pixels is an error. */
Err rows_size(Rows *r, size_t H, size_t W);
/* Before the first row: the file's size, how it was held (0: unknown), whether rows come in parts, and how many bytes
 * the decoder itself is about to take. A picture that is damaged, since it promises too many pixels, or that does not
 * fit into memory, is an error. A second call begins anew. */
Err rows_begin(Rows *r, size_t H, size_t W, int orientation, int parts, size_t bytes);
/* Row y as it lies in the file. */
void rows_put(Rows *r, size_t y, const uint8_t *rgb);
/* n pixels of row y: those at from, from + step, ... */
void rows_put_part(Rows *r, size_t y, const uint8_t *rgb, size_t n, size_t from, size_t step);
/* e: how decoding went. OK: makes the result. Releases everything else. */
Err rows_end(Rows *r, Err e);

/* ---- png.c, jpeg.c, webp.c: into rows, between rows_begin and rows_end, which is the caller's ---- */
Err png_decode(Rows *r, const uint8_t *bytes, size_t size);
Err jpeg_decode(Rows *r, const uint8_t *bytes, size_t size);
Err webp_decode(Rows *r, const uint8_t *bytes, size_t size);

#endif
