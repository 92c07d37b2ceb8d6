/* libimagebart.h - the library: pictures drawn, completed and taken apart by ImageBART models, in C or any language that
 * calls it. "make lib" makes libimagebart.so and libimagebart.a (for -limagebart -lpng -ljpeg -lz -lm -lpthread, with
 * -lwebp and -llmdb where make found them); dev/imagebart.py is an example.
 *
 * Pictures are bytes: (count, side, side, 3) red, green, blue, row by row. Tokens are (count, h * w), each 0..K-1.
 * Calls return IMAGEBART_OK or, with imagebart_error() saying why, another status; they never end the program and print
 * nothing. Models share nothing: several may be open, and used by several threads at once, each model by one thread at a
 * time. Threads need 1 MiB of stack. The results are those of ./sample and ./inpaint with the same options. */
#ifndef LIBIMAGEBART_H
#define LIBIMAGEBART_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define IMAGEBART_API 1 /* grows when calls or fields are added; fields are added at the end */
#if defined(__GNUC__)
#define IMAGEBART_CALL __attribute__((visibility("default")))
#else
#define IMAGEBART_CALL
#endif

enum { IMAGEBART_OK = 0, IMAGEBART_FAILED = 1, IMAGEBART_CANCELLED = 2 };

typedef struct imagebart_model imagebart_model;

typedef struct {
    size_t side;    /* of a picture, in pixels */
    size_t h, w, K; /* the token grid, and how many values a token has */
    size_t scales;
    size_t classes; /* 0: none */
} imagebart_shape;

/* All zero but `bytes` is what the model recommends, one picture, seed 0. */
typedef struct {
    size_t bytes;           /* sizeof(imagebart_options), as the caller was compiled */
    size_t count;           /* how many; 0: one */
    uint64_t seed, first;   /* first: number of the first picture, as ./sample --first */
    const char *class_name; /* as --class; NULL: of each its own, of an edit what the kept part looks like */
    const char *temperature, *top_k, *guidance, *chain_length; /* "0.9" or "1,0.9,0.8", noisiest first; NULL */
    size_t best_of; /* as --best-of, of an edit --candidates; 0: as recommended */
    /* Called by the calling thread; each may be NULL. progress: after every token of a batch, `done` of `of` in this pass
     * of the scale; nonzero cancels. preview: what picture (0..count-1) looks like when the scale is done. */
    int (*progress)(void *user, size_t scale, size_t done, size_t of);
    void (*preview)(void *user, size_t picture, size_t scale, const uint8_t *rgb);
    void *user;
} imagebart_options;

IMAGEBART_CALL int imagebart_api(void);           /* IMAGEBART_API of the library */
IMAGEBART_CALL const char *imagebart_error(void); /* of the calling thread's last call that failed */
IMAGEBART_CALL void imagebart_threads(size_t n);  /* that compute, for all models; 0 (default): all */

/* *model = the one of that name (emoji, ffhq ...; looked for in $IMAGEBART_MODELS, in models/ here, in share/imagebart of the
 * library's prefix) or in that folder.
 * weights: NULL or "f32", "bf16", "int8". */
IMAGEBART_CALL int imagebart_open(imagebart_model **model, const char *name_or_folder, const char *weights);
IMAGEBART_CALL void imagebart_close(imagebart_model *model); /* NULL: nothing */
IMAGEBART_CALL void imagebart_get_shape(const imagebart_model *model, imagebart_shape *shape);

/* New pictures: rgb (count,side,side,3), tokens (count,h*w); each may be NULL. */
IMAGEBART_CALL int imagebart_sample(imagebart_model *model, const imagebart_options *o, uint8_t *rgb, int32_t *tokens);
/* The picture (side,side,3) with what keep (side,side) has as 0 drawn anew, `count` times; kept pixels stay. */
IMAGEBART_CALL int imagebart_inpaint(imagebart_model *model, const imagebart_options *o, const uint8_t *picture,
                                     const uint8_t *keep, uint8_t *rgb, int32_t *tokens);
/* The first stage alone: pictures to tokens and back. */
IMAGEBART_CALL int imagebart_encode(imagebart_model *model, const uint8_t *rgb, size_t count, int32_t *tokens);
IMAGEBART_CALL int imagebart_decode(imagebart_model *model, const int32_t *tokens, size_t count, uint8_t *rgb);

#ifdef __cplusplus
}
#endif

#endif
