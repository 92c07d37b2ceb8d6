/* data.h - what images.c, data.c and tokens.c share and nobody else needs. */
#ifndef DATA_H
#define DATA_H

#include "imagebart.h"

/* *bytes (*size) = a whole regular file of at most `most` bytes; release with free(). Never blocks on a pipe or a
 * terminal. */
Err file_bytes(uint8_t **bytes, size_t *size, const char *path, size_t most);
/* Reads to the end of an open file into bytes (size). */
Err read_exactly(int fd, const char *path, uint8_t *bytes, size_t size);

/* image_prepare in its two steps. out = im with its short side resized to size, or its centre square for the presets
 * that cut first. */
Err prep_resize(Image *out, const Image *im, Prep prep, size_t size);
/* out (3,size,size) = a window of im (at least size x size), [0,255] to [-1,1]. */
void prep_crop(real *out, const Image *im, size_t size, double u_y, double u_x, int flip);

#endif
