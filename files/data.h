/* data.h - what images.c, lmdb.c, data.c and tokens.c share and nobody else needs. */
#ifndef DATA_H
#define DATA_H

#include "imagebart.h"

/* *bytes (*size) = a whole regular file of 1 to `most` bytes; release with free(). Never blocks on a pipe or a
 * terminal. empty, unless NULL: 1 when the file is there but has no bytes, which is an error too. */
Err file_bytes(uint8_t **bytes, size_t *size, const char *path, size_t most, int *empty);
/* Reads to the end of an open file into bytes (size). */
Err read_exactly(int fd, const char *path, uint8_t *bytes, size_t size);

enum { PATH_BYTES = 4096, IMAGE_FILE_BYTES = 1 << 30 };
/* Whether the first bytes are those of a picture that image_decode knows. */
int is_picture(const uint8_t *bytes, size_t n);
/* Whether they are those of one that this build was made without the library for. */
int is_left_out(const uint8_t *bytes, size_t n);

/* image_prepare in its two steps. out = im with its short side resized to size, or its centre square for the presets
 * that cut first. */
Err prep_resize(Image *out, const Image *im, Prep prep, size_t size);
/* out (3,size,size) = a window of im (at least size x size), [0,255] to [-1,1]. */
void prep_crop(real *out, const Image *im, size_t size, double u_y, double u_x, int flip);

/* lmdb.c */
typedef struct Lmdb Lmdb;
enum { LMDB_KEY_BYTES = 1024, LMDB_NAME_BYTES = 3 * LMDB_KEY_BYTES + 1 };
int lmdb_is(const uint8_t *bytes, size_t n); /* bytes: the beginning of a file */
Err lmdb_open(Lmdb **out, const char *path); /* path of the file, FOLDER/data.mdb as a rule */
const char *lmdb_path(const Lmdb *x);
void lmdb_close(Lmdb *x); /* NULL is fine */
/* Calls take for every key in the database's order (bytes compared), with the size of its value. */
typedef Err LmdbTake(void *context, const char *name, size_t value_bytes);
Err lmdb_names(Lmdb *x, LmdbTake *take, void *context);
/* *bytes (*size) = a copy of the value of that name; release with free(). Any number of threads at a time. */
Err lmdb_value(Lmdb *x, const char *name, uint8_t **bytes, size_t *size);

#endif
