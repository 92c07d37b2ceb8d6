/* decode.h - what the files of pictures share among themselves: pictures in memory, and a decoder for each format. */
#ifndef DECODE_H
#define DECODE_H

#include "files/files.h"

enum { IMAGE_MAX_PIXELS = 1 << 27 }; /* 400 MB of RGB: above any dataset, below what a hostile header could ask for */

/* ---- pixels.c ---- */
Err image_alloc(Image *im, size_t H, size_t W);
/* Turns the stored picture upright. Orientations 5..8 exchange rows and columns. */
Err image_orient(Image *im, int orientation);
/* rgb (W,3) = one expanded PNG row of `channels` (3: opaque, 4: alpha last) of `depth` bits. */
void png_row_to_rgb(uint8_t *rgb, const uint8_t *row, size_t W, size_t channels, int depth);

/* ---- orientation.c ---- */
/* Orientation 1..8 from a TIFF structure of n bytes (what follows "Exif\0\0" in a JPEG, the whole eXIf chunk in a
 * PNG). Metadata is often sloppy, so anything out of order means 1, upright. */
int exif_orientation(const uint8_t *p, size_t n);

/* ---- png.c, jpeg.c, webp.c ---- */
Err png_decode(Image *im, const uint8_t *bytes, size_t size, int upright);
Err jpeg_decode(Image *im, const uint8_t *bytes, size_t size, int upright);
Err webp_decode(Image *im, const uint8_t *bytes, size_t size);

#endif
