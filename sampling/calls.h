/* calls.h - the calls of the library as a table. A library for any x86-64 holds a copy of all its code for each level, each
 * with a table (library.c), and passes calls on to the one that it takes (levels.c). */
#ifndef CALLS_H
#define CALLS_H

#include "sampling/libimagebart.h"

/* CALL(type, name, parameters, arguments): all but those that open a model and imagebart_api */
#define LIBRARY_CALLS(CALL)                                                                                            \
    CALL(const char *, error, (void), ())                                                                              \
    CALL(void, threads, (size_t n), (n))                                                                               \
    CALL(void, close, (imagebart_model * m), (m))                                                                      \
    CALL(void, get_shape, (const imagebart_model *m, imagebart_shape *shape), (m, shape))                              \
    CALL(const char *, class_name, (const imagebart_model *m, size_t number), (m, number))                             \
    CALL(const char *, device, (const imagebart_model *m), (m))                                                        \
    CALL(size_t, memory, (imagebart_model * m), (m))                                                                   \
    CALL(void, get_advice, (const imagebart_model *m, int of_edits, size_t scale, imagebart_advice *advice),           \
         (m, of_edits, scale, advice))                                                                                 \
    CALL(int, sample, (imagebart_model * m, const imagebart_options *o, uint8_t *rgb, int32_t *tokens),                \
         (m, o, rgb, tokens))                                                                                          \
    CALL(int, inpaint,                                                                                                 \
         (imagebart_model * m, const imagebart_options *o, const uint8_t *picture, const uint8_t *keep, uint8_t *rgb,  \
          int32_t *tokens),                                                                                            \
         (m, o, picture, keep, rgb, tokens))                                                                           \
    CALL(int, complete, (imagebart_model * m, const imagebart_options *o, const imagebart_edit *edit), (m, o, edit))   \
    CALL(int, encode, (imagebart_model * m, const uint8_t *rgb, size_t count, int32_t *tokens),                        \
         (m, rgb, count, tokens))                                                                                      \
    CALL(int, decode, (imagebart_model * m, const int32_t *tokens, size_t count, uint8_t *rgb), (m, tokens, count, rgb))

typedef struct {
    int (*open_on)(imagebart_model **model, const char *name_or_folder, const char *weights, const char *device);
    int (*refuse)(const char *why); /* what fails with this text */
#define AS_FIELD(type, name, parameters, arguments) type(*name) parameters;
    LIBRARY_CALLS(AS_FIELD)
#undef AS_FIELD
} LibraryCalls;

#endif
