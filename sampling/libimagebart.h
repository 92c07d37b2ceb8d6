/* libimagebart.h - the library: pictures drawn, completed and taken apart by ImageBART models, in C or any language that
 * calls it. "make lib" makes libimagebart.so and libimagebart.a in the folder under build/ that it prints, imagebart.pc of
 * "make install" says what they need. Under a prefix that is not searched: PKG_CONFIG_PATH=PREFIX/lib/pkgconfig to compile,
 * LD_LIBRARY_PATH=PREFIX/lib to run, or -Wl,-rpath,PREFIX/lib. dev/imagebart.py is an example, ./serve another.
 *
 * Pictures are bytes: (count, side, side, 3) red, green, blue, row by row. Tokens are (count, h * w), each 0..K-1. Scales
 * are numbered from 1, the last that is drawn, to the noisiest.
 * Calls return IMAGEBART_OK or, with imagebart_error() saying why, another status; they never end the program and print
 * nothing. The results are those of ./sample and ./inpaint with the same options.
 *
 * Models share nothing: several may be open, and used by several threads at once, each model by one call at a time: while
 * it draws, completes, encodes or decodes, other such calls fail, of another thread or of a function that it calls back.
 * What a process has once is the threads that compute (imagebart_threads; a call whose turn it is not computes alone), the
 * memory that large pictures may take while they are decoded, and that of large products in bf16. None changes a result.
 * Each thread has an error text of its own. Threads need 1 MiB of stack. The environment is read by imagebart_open
 * (IMAGEBART_MODELS, _DEVICE) and by the first call but imagebart_api (_LEVEL). */
#ifndef LIBIMAGEBART_H
#define LIBIMAGEBART_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define IMAGEBART_API 2 /* grows when calls or fields are added; fields are added at the end */
#if defined(__GNUC__)
#define IMAGEBART_CALL __attribute__((visibility("default")))
#else
#define IMAGEBART_CALL
#endif

enum { IMAGEBART_OK = 0, IMAGEBART_FAILED = 1, IMAGEBART_CANCELLED = 2 };

typedef struct imagebart_model imagebart_model;

IMAGEBART_CALL int imagebart_api(void);           /* IMAGEBART_API of the library */
IMAGEBART_CALL const char *imagebart_error(void); /* of the calling thread's last call that failed */
IMAGEBART_CALL void imagebart_threads(size_t n);  /* that compute, for all models; 0 (default): all */

/* ---- A model ---- */

/* *model = the one of that name (emoji, ffhq ...; looked for in $IMAGEBART_MODELS, in models/ here, in
 * share/imagebart of the library's prefix) or in that folder. weights: "f32", "bf16x3", "bf16", "int8", as --weights
 * of ./sample; NULL: "f32". It computes where $IMAGEBART_DEVICE says, else on a GPU if there is one. */
IMAGEBART_CALL int imagebart_open(imagebart_model **model, const char *name_or_folder, const char *weights);
/* The same on this device: "cpu", "cuda", NULL as above (API 2) */
IMAGEBART_CALL int imagebart_open_on(imagebart_model **model, const char *name_or_folder, const char *weights,
                                     const char *device);
IMAGEBART_CALL void imagebart_close(imagebart_model *model); /* NULL: nothing; at work: freed when that call ends */

typedef struct {
    size_t side;    /* of a picture, in pixels */
    size_t h, w, K; /* the token grid, and how many values a token has */
    size_t scales;
    size_t classes; /* 0: none */
} imagebart_shape;
IMAGEBART_CALL void imagebart_get_shape(const imagebart_model *model, imagebart_shape *shape);

/* The name of class 0 .. classes-1, as text that stays as long as the model; NULL: there is none (API 2) */
IMAGEBART_CALL const char *imagebart_class_name(const imagebart_model *model, size_t number);
/* Where the model computes: "CPU", "CPU, for no usable GPU was found", or a GPU's name (API 2) */
IMAGEBART_CALL const char *imagebart_device(const imagebart_model *model);
/* Bytes of memory that drawing takes at most; 0: unknown or at work, imagebart_error() says why (API 2) */
IMAGEBART_CALL size_t imagebart_memory(imagebart_model *model);

/* What a model recommends for new pictures or for edits at a scale (API 2) */
typedef struct {
    double temperature, guidance;
    size_t top_k, chain_length; /* top_k 0: all */
    int can_guide;              /* guidance may be another than 1 */
    size_t best_of;             /* the same at all scales */
} imagebart_advice;
IMAGEBART_CALL void imagebart_get_advice(const imagebart_model *model, int of_edits, size_t scale,
                                         imagebart_advice *advice);

/* ---- Drawing ---- */

/* A picture, for the time of the call that it is told by (API 2) */
typedef struct {
    size_t number;              /* 0 .. count-1 */
    size_t scale;               /* that is done, whose preview this is; 0: the picture is finished */
    size_t width, height;       /* in pixels */
    const uint8_t *rgb, *alpha; /* (height,width,3); (height,width), or NULL: opaque */
    const int32_t *tokens;      /* (h*w) */
    int32_t label;              /* number of its class; -1: the model has none */
    double bound;               /* with `guesses`: how unlikely the model finds it, in nats per token; else 0 */
    const float *entropy;       /* with `guesses`: (h*w) how unsure it is of each token, in bits; else NULL */
    const uint8_t *profile;     /* of an edited file: its ICC profile, if it has one; else NULL */
    size_t profile_bytes;
    const int32_t *chain; /* with `chains`, of a finished one: (scales+1,h*w) from noise to its tokens; else NULL */
    const char *note; /* of an edit: what of its files was left out, that the kept part is unlike all learnt; or NULL */
} imagebart_picture;

/* All zero but `bytes` is what the model recommends, one picture, seed 0. */
typedef struct {
    size_t bytes; /* sizeof(imagebart_options), as the caller was compiled; sizes that no version had are refused */
    size_t count; /* how many; 0: one */
    uint64_t seed, first;   /* first: number of the first picture, as ./sample --first */
    const char *class_name; /* as --class; NULL: of each its own, of an edit what the kept part looks like */
    const char *temperature, *top_k, *guidance, *chain_length; /* "0.9" or "1,0.9,0.8", noisiest first; NULL */
    size_t best_of; /* as --best-of, of an edit --candidates; 0: as recommended */
    /* Called by the calling thread; each may be NULL. progress: after every token of a batch, `done` of `of` in this pass
     * of the scale; nonzero cancels. preview: what picture (0..count-1) looks like when the scale is done. */
    int (*progress)(void *user, size_t scale, size_t done, size_t of);
    void (*preview)(void *user, size_t picture, size_t scale, const uint8_t *rgb);
    void *user;
    /* API 2. step: at every step of all the work and often in between, with how many tokens of the scale are drawn,
     * of those of all pictures, candidates and passes; nonzero cancels. picture: what the pictures of a batch look
     * like when they are finished and, with `previews`, when a scale is done, of the first that is drawn for each
     * picture; once another of the best_of is chosen, all scales but the last again, of that one. nonzero cancels. */
    int (*step)(void *user, size_t scale, size_t done, size_t of);
    int (*picture)(void *user, const imagebart_picture *p);
    int previews, guesses, chains;
} imagebart_options;

/* New pictures: rgb (count,side,side,3), tokens (count,h*w); each may be NULL. */
IMAGEBART_CALL int imagebart_sample(imagebart_model *model, const imagebart_options *o, uint8_t *rgb, int32_t *tokens);
/* The picture (side,side,3) with what keep (side,side) has as 0 drawn anew, `count` times; kept pixels stay. */
IMAGEBART_CALL int imagebart_inpaint(imagebart_model *model, const imagebart_options *o, const uint8_t *picture,
                                     const uint8_t *keep, uint8_t *rgb, int32_t *tokens);

/* ---- Editing pictures of any size (API 2) ---- */

/* A file (PNG, JPEG, WebP) as it lies in memory; or with bytes = 0 pixels, row by row: red, green, blue, of a mask one
 * byte, 0 = drawn anew. */
typedef struct {
    const void *data; /* NULL: none */
    size_t bytes, width, height;
} imagebart_image;
/* What ./inpaint is given: a picture, and one of mask, half, window, outside, extend */
typedef struct {
    size_t bytes; /* sizeof(imagebart_edit), as the caller was compiled */
    imagebart_image image;
    imagebart_image mask;           /* of the picture's size, or (side,side) */
    const char *half;               /* "upper", "lower", "left", "right" */
    size_t window, outside, extend; /* in pixels of the model */
    int invert;                     /* the mask's light parts are drawn anew */
    int official;                   /* as --official-mask */
    int paste;                      /* results have the picture's size, as with --paste-into it; else the model's */
} imagebart_edit;
/* The results go to o->picture. */
IMAGEBART_CALL int imagebart_complete(imagebart_model *model, const imagebart_options *o, const imagebart_edit *edit);

/* ---- The first stage alone: pictures to tokens and back ---- */

IMAGEBART_CALL int imagebart_encode(imagebart_model *model, const uint8_t *rgb, size_t count, int32_t *tokens);
IMAGEBART_CALL int imagebart_decode(imagebart_model *model, const int32_t *tokens, size_t count, uint8_t *rgb);

#ifdef __cplusplus
}
#endif

#endif
