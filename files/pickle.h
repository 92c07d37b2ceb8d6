/* pickle.h - what the files of .ckpt share among themselves: the pickle machine with its values, and zip archives. */
#ifndef PICKLE_H
#define PICKLE_H

#include "files/files.h"

/* ---- pickle.c ---- */

typedef enum {
    V_NONE,    /* None; numbers with a fraction, too, which no tensor needs */
    V_INT,     /* number; bool too */
    V_TEXT,    /* text, length: str, bytes, and int too long for 64 bits */
    V_TUPLE,   /* items: tuple, list or set */
    V_DICT,    /* items: key, value, key, value, ... */
    V_GLOBAL,  /* "module name" in items 0 and 1 */
    V_STORAGE, /* dtype; text, length: key; number: elements; first: where a view of it begins */
    V_TENSOR,  /* dtype; items: storage, offset, size, stride */
    V_INERT,   /* anything else: not looked at */
    V_MARK
} ValueKind;

typedef uint32_t Index; /* of a value in the one array of all values; the array moves when it grows, indices stay */

enum { FEW = 4 };
typedef struct {
    uint8_t kind, dtype; /* ValueKind, Dtype */
    uint32_t n, room;    /* items; how many fit into `many`, 0: they are `few` */
    union {
        struct {
            const unsigned char *text;
            size_t length;
        };
        Index few[FEW], *many;
    };
    int64_t number;
    size_t first;
} Value;

typedef struct {
    const unsigned char *start, *p, *end; /* the bytes of the program */
    Value *value;
    size_t n, capacity;
    Index *stack;
    size_t depth, stack_capacity;
    Index *memo;
    size_t n_memo, memo_capacity;
} Pickle;

/* Runs from k->p to STOP. *result: the value it leaves. Values of an earlier run stay. */
Err pickle_run(Pickle *k, Index *result);
void pickle_free(Pickle *k);
/* The next bytes behind the last run, and a number of 1, 2, 4 or 8 of them, little-endian */
Err pickle_take(Pickle *k, size_t bytes, const unsigned char **out);
Err pickle_number(Pickle *k, size_t bytes, uint64_t *out);
const Value *pickle_item(const Pickle *k, const Value *v, size_t i);
/* The last value that a dictionary has for a text; NULL: none */
const Value *pickle_get(const Pickle *k, const Value *dict, const char *key);
int value_is(const Value *v, const char *text);
int value_is_count(const Value *v); /* a whole number from 0 on */

/* ---- zip.c. All sizes are checked against the file, and entries do not overlap. ---- */

struct ZipEntry {
    const unsigned char *name;
    size_t name_length, begin, end; /* of local header, name and data together */
    const unsigned char *data;
    size_t stored, bytes; /* in the file; once inflated */
    int deflated;
    uint32_t crc; /* 0: none was computed */
    int checked;  /* 1: its bytes have that checksum */
};

typedef struct {
    const unsigned char *file;
    size_t file_bytes, directory, directory_bytes, count;
    size_t inflated; /* bytes of all deflated entries, once inflated */
    ZipEntry *entry;
} Zip;

Err zip_open(Zip *z, const unsigned char *file, size_t bytes); /* release with free(z->entry), errors too */
/* X/data.pkl, for the one X that has it; then *folder is the length of "X/" */
Err zip_pickle(const Zip *z, ZipEntry **pickle, size_t *folder);
/* out (e->bytes) = a deflated entry's bytes. A checksum that differs is an error. */
Err zip_inflate(const ZipEntry *e, unsigned char *out);
/* Of a stored entry: compares its checksum, if that was not done yet. Any number of threads at a time. */
Err zip_check(ZipEntry *e);

#endif
