/* ckpt.c - the tensors of a PyTorch .ckpt file, found without PyTorch, Python or running anything.
 *
 * torch.save writes either a zip archive (any top folder X: X/data.pkl and raw storages X/data/KEY, all stored, not
 * compressed) or, before version 1.6, five pickles in a row followed by the raw storages:
 *
 *     magic number | protocol 1001 | facts about the machine | the object | list of storage keys | n, n elements | ...
 *
 * A pickle is a program for a stack machine. `step` below runs all of its instructions that build plain things:
 * numbers, strings, lists, dictionaries. The ones that would call a function call nothing: REDUCE knows by name the few
 * that describe a tensor (torch._utils._rebuild_tensor_v2 and its kin, collections.OrderedDict) and turns everything
 * else into an inert value that is skipped, whatever it is called with. So os.system in a file is five bytes of text.
 *
 * What comes out is the table of a Checkpoint: names, dtypes and shapes, pointing into the mapped file. Only a tensor
 * whose elements do not lie in row-major order is copied. A Lightning file's tensors are its "state_dict"; a plain
 * file's are its one dictionary.
 *
 * Refuses: whatever reaches outside the file or overlaps in it, compressed or encrypted entries, big-endian data.
 * Every value of the machine costs the file at least a byte, so a file is answered in memory in proportion to its size.
 *
 * Read in this order: values; the pickle machine; instructions; torch's own objects; storages;
 * from values to tensors; the zip archive; the old format. */
#include "files/files.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

/* ------------------------------------------------------------------------------------------------------------
 * Values
 * ---------------------------------------------------------------------------------------------------------- */

typedef enum {
    V_NONE,
    V_INT,     /* number; bool too */
    V_TEXT,    /* text, length: str, bytes, and int too long for 64 bits */
    V_TUPLE,   /* item: tuple, list or set */
    V_DICT,    /* item: key, value, key, value, ... */
    V_GLOBAL,  /* "module name" in item[0], item[1] */
    V_STORAGE, /* dtype; item: key; number: elements; first: where a view of it begins */
    V_TENSOR,  /* item: storage, offset, size, stride */
    V_INERT,   /* anything else: not looked at */
    V_MARK
} ValueKind;

typedef uint32_t Index; /* of a value in the one array of all values; the array moves when it grows, indices stay */

typedef struct {
    ValueKind kind;
    Dtype dtype;
    int64_t number;
    size_t first;
    const unsigned char *text;
    size_t length;
    Index *item;
    size_t n, capacity;
} Value;

enum { MAX_VALUES = 1 << 23 };

typedef struct {
    const unsigned char *start, *p, *end; /* the bytes of the program */
    Value *value;
    size_t n, capacity;
    Index *stack;
    size_t depth, stack_capacity;
    Index *memo;
    size_t n_memo, memo_capacity;
} Pickle;

static void pickle_free(Pickle *k) {
    for (size_t i = 0; i < k->n; i++) free(k->value[i].item);
    free(k->value);
    free(k->stack);
    free(k->memo);
    memset(k, 0, sizeof *k);
}

static int is_text(const Value *v, const char *text) {
    return v->kind == V_TEXT && v->length == strlen(text) && memcmp(v->text, text, v->length) == 0;
}

/* ------------------------------------------------------------------------------------------------------------
 * The machine: reading the program, the stack, the memo
 * ---------------------------------------------------------------------------------------------------------- */

static Err take(Pickle *k, size_t bytes, const unsigned char **out) {
    *out = k->p;
    if (bytes > (size_t)(k->end - k->p)) return err("ends in the middle of an instruction: it is truncated");
    k->p += bytes;
    return OK;
}

/* An unsigned number of 1, 2, 4 or 8 bytes, little-endian */
static Err take_number(Pickle *k, size_t bytes, uint64_t *out) {
    const unsigned char *p;
    *out = 0;
    TRY(take(k, bytes, &p));
    for (size_t i = 0; i < bytes; i++) *out |= (uint64_t)p[i] << 8 * i;
    return OK;
}

static Err take_line(Pickle *k, const unsigned char **out, size_t *length) {
    const unsigned char *newline = memchr(k->p, '\n', (size_t)(k->end - k->p));
    *out = k->p, *length = 0;
    if (!newline) return err("ends in the middle of a line: it is truncated");
    *length = (size_t)(newline - k->p);
    TRY(take(k, *length + 1, out));
    return OK;
}

static Err push_index(Pickle *k, Index v) {
    if (k->depth == MAX_VALUES) return err("has over %d values on its stack: not a file of weights", MAX_VALUES);
    TRY(mem_grow(&k->stack, k->depth, 1, &k->stack_capacity, sizeof *k->stack, "the stack of a pickle"));
    k->stack[k->depth++] = v;
    return OK;
}

/* Pushes a new value; it is k->value[k->n - 1] until the next one. */
static Err push(Pickle *k, ValueKind kind) {
    if (k->n == MAX_VALUES) return err("has over %d values: not a file of weights", MAX_VALUES);
    TRY(mem_grow(&k->value, k->n, 1, &k->capacity, sizeof *k->value, "the values of a pickle"));
    memset(&k->value[k->n], 0, sizeof *k->value);
    k->value[k->n].kind = kind;
    return push_index(k, (Index)k->n++);
}

static Err push_int(Pickle *k, int64_t number) {
    TRY(push(k, V_INT));
    k->value[k->n - 1].number = number;
    return OK;
}

static Err push_text(Pickle *k, const unsigned char *text, size_t length) {
    TRY(push(k, V_TEXT));
    k->value[k->n - 1].text = text;
    k->value[k->n - 1].length = length;
    return OK;
}

static Err pop(Pickle *k, Index *out) {
    *out = 0;
    if (k->depth == 0 || k->value[k->stack[k->depth - 1]].kind == V_MARK) return err("takes a value that is not there");
    *out = k->stack[--k->depth];
    return OK;
}

static Err peek(const Pickle *k, Index *out) {
    *out = 0;
    if (k->depth == 0 || k->value[k->stack[k->depth - 1]].kind == V_MARK) return err("uses a value that is not there");
    *out = k->stack[k->depth - 1];
    return OK;
}

/* Stack position of the first value above the topmost mark */
static Err find_mark(const Pickle *k, size_t *above) {
    *above = 0;
    for (size_t i = k->depth; i-- > 0;) {
        if (k->value[k->stack[i]].kind == V_MARK) return *above = i + 1, OK;
    }
    return err("takes values down to a mark that is not there");
}

static Err add_items(Value *v, const Index *items, size_t n) {
    if (n == 0) return OK;
    TRY(mem_grow(&v->item, v->n, n, &v->capacity, sizeof *v->item, "a list in a pickle"));
    memcpy(v->item + v->n, items, n * sizeof *items);
    v->n += n;
    return OK;
}

/* The n topmost values become the items of a new one. */
static Err gather(Pickle *k, ValueKind kind, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (i == k->depth || k->value[k->stack[k->depth - 1 - i]].kind == V_MARK)
            return err("takes a value that is not there");
    }
    if (kind == V_DICT && n % 2) return err("makes a dictionary of %zu keys and values", n);
    Index first = (Index)(k->depth - n);
    TRY(push(k, kind));
    Index made = k->stack[--k->depth];
    TRY(add_items(&k->value[made], k->stack + first, n));
    k->depth = first;
    return push_index(k, made);
}

static Err gather_to_mark(Pickle *k, ValueKind kind) {
    size_t above;
    TRY(find_mark(k, &above));
    size_t n = k->depth - above;
    memmove(k->stack + above - 1, k->stack + above, n * sizeof *k->stack);
    k->depth--;
    return gather(k, kind, n);
}

/* ------------------------------------------------------------------------------------------------------------
 * Instructions
 * ---------------------------------------------------------------------------------------------------------- */

/* Appends the values above stack position `above` to the container below them. Another kind of container becomes
 * inert. */
static Err append(Pickle *k, ValueKind kind, size_t above, size_t marks) {
    size_t n = k->depth - above;
    if (above < marks + 1 || k->value[k->stack[above - marks - 1]].kind == V_MARK)
        return err("adds to a container that is not there");
    Value *to = &k->value[k->stack[above - marks - 1]];
    if (kind == V_DICT && n % 2) return err("sets %zu keys and values", n);
    if (to->kind == kind) TRY(add_items(to, k->stack + above, n));
    k->depth = above - marks;
    return OK;
}

static Err append_one(Pickle *k, ValueKind kind, size_t n) {
    if (k->depth < n + 1) return err("adds a value that is not there");
    for (size_t i = 0; i < n; i++) {
        if (k->value[k->stack[k->depth - 1 - i]].kind == V_MARK) return err("adds a value that is not there");
    }
    return append(k, kind, k->depth - n, 0);
}

static Err append_to_mark(Pickle *k, ValueKind kind) {
    size_t above;
    TRY(find_mark(k, &above));
    return append(k, kind, above, 1);
}

/* Writers number the values that they remember without gaps, so a number larger than the program's length is an
 * attack. */
static Err memo_put(Pickle *k, uint64_t at) {
    Index v;
    TRY(peek(k, &v));
    if (at > (size_t)(k->end - k->start)) return err("remembers value number %llu", (unsigned long long)at);
    if (at >= k->n_memo) {
        size_t more = (size_t)at + 1 - k->n_memo;
        TRY(mem_grow(&k->memo, k->n_memo, more, &k->memo_capacity, sizeof *k->memo, "the memo of a pickle"));
        memset(k->memo + k->n_memo, 0xff, more * sizeof *k->memo);
        k->n_memo += more;
    }
    k->memo[at] = v;
    return OK;
}

static Err memo_get(Pickle *k, uint64_t at) {
    if (at >= k->n_memo || k->memo[at] == UINT32_MAX)
        return err("recalls value number %llu, which it never remembered", (unsigned long long)at);
    return push_index(k, k->memo[at]);
}

static Err memo_line(Pickle *k, int put) {
    const unsigned char *line;
    size_t length;
    uint64_t at = 0;
    TRY(take_line(k, &line, &length));
    for (size_t i = 0; i < length; i++) {
        if (line[i] < '0' || line[i] > '9' || at > UINT32_MAX) return err("has a memo number that is none");
        at = at * 10 + (uint64_t)(line[i] - '0');
    }
    return put ? memo_put(k, at) : memo_get(k, at);
}

static Err memo_binary(Pickle *k, size_t bytes, int put) {
    uint64_t at;
    TRY(take_number(k, bytes, &at));
    return put ? memo_put(k, at) : memo_get(k, at);
}

static Err text_of(Pickle *k, size_t length_bytes) {
    uint64_t length;
    const unsigned char *text;
    TRY(take_number(k, length_bytes, &length));
    if (length > SIZE_MAX) return err("has a text of %llu bytes", (unsigned long long)length);
    TRY(take(k, (size_t)length, &text));
    return push_text(k, text, (size_t)length);
}

static Err text_line(Pickle *k) {
    const unsigned char *line;
    size_t length;
    TRY(take_line(k, &line, &length));
    return push_text(k, line, length);
}

/* Two's complement in `length` bytes. Longer than 64 bits: kept as text. */
static Err long_of(Pickle *k, size_t length_bytes) {
    uint64_t length, bits = 0;
    const unsigned char *p;
    TRY(take_number(k, length_bytes, &length));
    if (length > SIZE_MAX) return err("has a number of %llu bytes", (unsigned long long)length);
    TRY(take(k, (size_t)length, &p));
    if (length > 8) return push_text(k, p, (size_t)length);
    for (size_t i = 0; i < length; i++) bits |= (uint64_t)p[i] << 8 * i;
    if (length && length < 8 && p[length - 1] >= 0x80) bits |= UINT64_MAX << 8 * length;
    return push_int(k, (int64_t)bits);
}

static Err number_of(Pickle *k, size_t bytes, int is_signed) {
    uint64_t bits;
    TRY(take_number(k, bytes, &bits));
    return push_int(k, is_signed ? (int64_t)(int32_t)(uint32_t)bits : (int64_t)bits);
}

/* "-12", "12L"; "00" and "01" are False and True */
static Err number_line(Pickle *k) {
    const unsigned char *line;
    size_t length, i = 0;
    TRY(take_line(k, &line, &length));
    if (length && line[length - 1] == 'L') length--;
    const int negative = length && line[0] == '-';
    int64_t number = 0;
    for (i = (size_t)negative; i < length; i++) {
        if (line[i] < '0' || line[i] > '9' || number > (INT64_MAX - 9) / 10) return err("has a number that is none");
        number = number * 10 + (line[i] - '0');
    }
    return push_int(k, negative ? -number : number);
}

static Err skip(Pickle *k, size_t bytes) {
    const unsigned char *p;
    return take(k, bytes, &p);
}

static Err inert_of(Pickle *k, size_t bytes) {
    TRY(skip(k, bytes));
    return push(k, V_INERT);
}

static Err global_lines(Pickle *k) {
    TRY(text_line(k));
    TRY(text_line(k));
    return gather(k, V_GLOBAL, 2);
}

static Err call(Pickle *k);
static Err persistent(Pickle *k);

/* Replaces the n topmost values by an inert one. */
static Err inert_instead(Pickle *k, size_t n) {
    Index dropped;
    while (n--) TRY(pop(k, &dropped));
    return push(k, V_INERT);
}

static Err inert_to_mark(Pickle *k) {
    size_t above;
    TRY(find_mark(k, &above));
    k->depth = above - 1;
    return push(k, V_INERT);
}

static Err drop(Pickle *k) {
    if (k->depth == 0) return err("takes a value that is not there");
    k->depth--;
    return OK;
}

static Err drop_to_mark(Pickle *k) {
    size_t above;
    TRY(find_mark(k, &above));
    k->depth = above - 1;
    return OK;
}

static Err duplicate(Pickle *k) {
    Index top;
    TRY(peek(k, &top));
    return push_index(k, top);
}

static Err instance_lines(Pickle *k) {
    TRY(global_lines(k));
    Index name;
    TRY(pop(k, &name));
    return inert_to_mark(k);
}

static Err protocol(Pickle *k) {
    uint64_t version;
    TRY(take_number(k, 1, &version));
    return version <= 5 ? OK : err("is of pickle protocol %d, expected 0 to 5", (int)version);
}

/* The instructions of protocols 0 to 5, under their names in Python's pickle.py. First those that push one value. */
static Err push_step(Pickle *k, unsigned char op) {
    switch (op) {
    case 'N': /* NONE */ return push(k, V_NONE);
    case 0x88: /* NEWTRUE */ return push_int(k, 1);
    case 0x89: /* NEWFALSE */ return push_int(k, 0);
    case 'I': /* INT */ return number_line(k);
    case 'L': /* LONG */ return number_line(k);
    case 'K': /* BININT1 */ return number_of(k, 1, 0);
    case 'M': /* BININT2 */ return number_of(k, 2, 0);
    case 'J': /* BININT */ return number_of(k, 4, 1);
    case 0x8a: /* LONG1 */ return long_of(k, 1);
    case 0x8b: /* LONG4 */ return long_of(k, 4);
    case 'F': /* FLOAT */ return text_line(k);
    case 'G': /* BINFLOAT */ return inert_of(k, 8);

    case 'S': /* STRING */ return text_line(k);
    case 'V': /* UNICODE */ return text_line(k);
    case 'U': /* SHORT_BINSTRING */ return text_of(k, 1);
    case 'C': /* SHORT_BINBYTES */ return text_of(k, 1);
    case 0x8c: /* SHORT_BINUNICODE */ return text_of(k, 1);
    case 'T': /* BINSTRING */ return text_of(k, 4);
    case 'B': /* BINBYTES */ return text_of(k, 4);
    case 'X': /* BINUNICODE */ return text_of(k, 4);
    case 0x8d: /* BINUNICODE8 */ return text_of(k, 8);
    case 0x8e: /* BINBYTES8 */ return text_of(k, 8);
    case 0x96: /* BYTEARRAY8 */ return text_of(k, 8);
    }
    return err("has instruction 0x%02x, which no file of weights needs", op);
}

/* One instruction. *done: STOP */
static Err step(Pickle *k, int *done) {
    const unsigned char *op;
    TRY(take(k, 1, &op));
    switch (*op) {
    case 0x80: /* PROTO */ return protocol(k);
    case 0x95: /* FRAME */ return skip(k, 8);
    case '.': /* STOP */ return *done = 1, OK;

    case '(': /* MARK */ return push(k, V_MARK);
    case ')': /* EMPTY_TUPLE */ return push(k, V_TUPLE);
    case ']': /* EMPTY_LIST */ return push(k, V_TUPLE);
    case 0x8f: /* EMPTY_SET */ return push(k, V_TUPLE);
    case '}': /* EMPTY_DICT */ return push(k, V_DICT);
    case 0x85: /* TUPLE1 */ return gather(k, V_TUPLE, 1);
    case 0x86: /* TUPLE2 */ return gather(k, V_TUPLE, 2);
    case 0x87: /* TUPLE3 */ return gather(k, V_TUPLE, 3);
    case 't': /* TUPLE */ return gather_to_mark(k, V_TUPLE);
    case 'l': /* LIST */ return gather_to_mark(k, V_TUPLE);
    case 0x91: /* FROZENSET */ return gather_to_mark(k, V_TUPLE);
    case 'd': /* DICT */ return gather_to_mark(k, V_DICT);
    case 'a': /* APPEND */ return append_one(k, V_TUPLE, 1);
    case 'e': /* APPENDS */ return append_to_mark(k, V_TUPLE);
    case 0x90: /* ADDITEMS */ return append_to_mark(k, V_TUPLE);
    case 's': /* SETITEM */ return append_one(k, V_DICT, 2);
    case 'u': /* SETITEMS */ return append_to_mark(k, V_DICT);

    case '0': /* POP */ return drop(k);
    case '1': /* POP_MARK */ return drop_to_mark(k);
    case '2': /* DUP */ return duplicate(k);
    case 'p': /* PUT */ return memo_line(k, 1);
    case 'q': /* BINPUT */ return memo_binary(k, 1, 1);
    case 'r': /* LONG_BINPUT */ return memo_binary(k, 4, 1);
    case 0x94: /* MEMOIZE */ return memo_put(k, k->n_memo);
    case 'g': /* GET */ return memo_line(k, 0);
    case 'h': /* BINGET */ return memo_binary(k, 1, 0);
    case 'j': /* LONG_BINGET */ return memo_binary(k, 4, 0);

    case 'c': /* GLOBAL */ return global_lines(k);
    case 0x93: /* STACK_GLOBAL */ return gather(k, V_GLOBAL, 2);
    case 'R': /* REDUCE */ return call(k);
    case 'Q': /* BINPERSID */ return persistent(k);
    case 0x81: /* NEWOBJ */ return inert_instead(k, 2);
    case 0x92: /* NEWOBJ_EX */ return inert_instead(k, 3);
    case 'o': /* OBJ */ return inert_to_mark(k);
    case 'i': /* INST */ return instance_lines(k);
    case 'b': /* BUILD: attributes, of no interest */ return drop(k);
    }
    return push_step(k, *op);
}

/* Runs from k->p to STOP. *result: the value it leaves */
static Err run(Pickle *k, Index *result) {
    int done = 0;
    while (!done) {
        const unsigned char *at = k->p;
        if (step(k, &done) == OK) continue;
        char where[64];
        snprintf(where, sizeof where, "its pickle, at byte %zu,", (size_t)(at - k->start));
        return err("%s %s", where, err_text());
    }
    return pop(k, result);
}

/* ------------------------------------------------------------------------------------------------------------
 * Torch's own objects
 * ---------------------------------------------------------------------------------------------------------- */

static int is_global(const Pickle *k, const Value *v, const char *module, const char *name) {
    return v->kind == V_GLOBAL && is_text(&k->value[v->item[0]], module) && is_text(&k->value[v->item[1]], name);
}

static const Value *item(const Pickle *k, const Value *v, size_t i) {
    return &k->value[v->item[i]];
}

/* OrderedDict(), or OrderedDict([(key, value), ...]) as protocol 2 writes it at times */
static Err ordered_dict(Pickle *k, Index arguments) {
    TRY(push(k, V_DICT));
    Value *made = &k->value[k->n - 1];
    const Value *given = &k->value[arguments];
    const Value *pairs = given->n ? item(k, given, 0) : NULL;
    for (size_t i = 0; pairs && pairs->kind == V_TUPLE && i < pairs->n; i++) {
        const Value *pair = item(k, pairs, i);
        if (pair->kind == V_TUPLE && pair->n == 2) TRY(add_items(made, pair->item, 2));
    }
    return OK;
}

/* storage, offset, size, stride, and what else the version adds */
static Err rebuilt_tensor(Pickle *k, Index arguments) {
    if (k->value[arguments].n < 4) return err("rebuilds a tensor from %zu arguments", k->value[arguments].n);
    TRY(push(k, V_TENSOR));
    return add_items(&k->value[k->n - 1], k->value[arguments].item, 4);
}

/* REDUCE: function(arguments). The functions that describe tensors are known by name; nothing is ever called. */
static Err call(Pickle *k) {
    Index arguments, function;
    TRY(pop(k, &arguments));
    TRY(pop(k, &function));
    const Value *f = &k->value[function], *a = &k->value[arguments];
    if (a->kind != V_TUPLE) return push(k, V_INERT);
    if (is_global(k, f, "collections", "OrderedDict")) return ordered_dict(k, arguments);
    if (is_global(k, f, "torch._utils", "_rebuild_tensor_v2")) return rebuilt_tensor(k, arguments);
    if (is_global(k, f, "torch._utils", "_rebuild_tensor")) return rebuilt_tensor(k, arguments);
    const int wraps = is_global(k, f, "torch._utils", "_rebuild_parameter") || is_global(k, f, "torch", "Size");
    return wraps && a->n ? push_index(k, a->item[0]) : push(k, V_INERT);
}

static int storage_dtype(const Value *name, Dtype *out) {
    static const struct {
        const char *name;
        Dtype dtype;
    } types[] = {{"DoubleStorage", DT_F64},    {"FloatStorage", DT_F32}, {"HalfStorage", DT_F16},
                 {"BFloat16Storage", DT_BF16}, {"LongStorage", DT_I64},  {"IntStorage", DT_I32},
                 {"ShortStorage", DT_I16},     {"CharStorage", DT_I8},   {"ByteStorage", DT_U8},
                 {"BoolStorage", DT_BOOL}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        if (is_text(name, types[i].name)) return *out = types[i].dtype, 1;
    }
    return 0;
}

static int is_count(const Value *v) {
    return v->kind == V_INT && v->number >= 0;
}

/* A part of a storage, as the old format may describe it: (key, first, elements) */
static Err storage_view(const Pickle *k, Value *storage, const Value *view) {
    if (view->kind != V_TUPLE) return OK;
    if (view->n != 3 || !is_count(item(k, view, 1)) || !is_count(item(k, view, 2)))
        return err("has a view of a storage that is none");
    storage->first = (size_t)item(k, view, 1)->number;
    storage->number = item(k, view, 2)->number;
    return OK;
}

/* BINPERSID: ("storage", torch.FloatStorage, key, device, elements[, view]). Types we have no numbers for are inert. */
static Err persistent(Pickle *k) {
    Index id;
    TRY(pop(k, &id));
    TRY(push(k, V_INERT));
    Value *storage = &k->value[k->n - 1];
    const Value *v = &k->value[id];
    if (v->kind != V_TUPLE || v->n < 5 || !is_text(item(k, v, 0), "storage")) return OK;
    const Value *type = item(k, v, 1), *key = item(k, v, 2), *count = item(k, v, 4);
    if (type->kind != V_GLOBAL || key->kind != V_TEXT || !is_count(count)) return OK;
    if (!storage_dtype(item(k, type, 1), &storage->dtype)) return OK;
    storage->kind = V_STORAGE;
    storage->text = key->text;
    storage->length = key->length;
    storage->number = count->number;
    return v->n > 5 ? storage_view(k, storage, item(k, v, 5)) : OK;
}

/* ------------------------------------------------------------------------------------------------------------
 * Storages: the raw numbers, found by key in either format
 * ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    const unsigned char *key;
    size_t length;
    const unsigned char *data; /* NULL: not found yet */
    size_t bytes;
    Dtype dtype; /* old format */
} Blob;

typedef struct {
    Blob *blob; /* sorted by key */
    size_t n, capacity;
} Blobs;

static int by_key(const void *pa, const void *pb) {
    const Blob *a = (const Blob *)pa, *b = (const Blob *)pb;
    int order = memcmp(a->key, b->key, a->length < b->length ? a->length : b->length);
    return order ? order : (a->length > b->length) - (a->length < b->length);
}

static Err add_blob(Blobs *s, Blob b) {
    TRY(mem_grow(&s->blob, s->n, 1, &s->capacity, sizeof *s->blob, "the table of storages"));
    s->blob[s->n++] = b;
    return OK;
}

static Blob *find_blob(const Blobs *s, const unsigned char *key, size_t length) {
    const Blob wanted = {.key = key, .length = length};
    return s->n ? (Blob *)bsearch(&wanted, s->blob, s->n, sizeof *s->blob, by_key) : NULL;
}

/* ------------------------------------------------------------------------------------------------------------
 * From values to tensors
 * ---------------------------------------------------------------------------------------------------------- */

/* Row-major copies hang on the checkpoint as a list; they may take as much as the file itself and a little. */
typedef struct Copy {
    struct Copy *next;
    size_t bytes;
    max_align_t data[];
} Copy;

enum { COPY_SLACK = 1 << 20 };

static Err copy_room(Checkpoint *ck, size_t bytes, unsigned char **out) {
    Copy *last = (Copy *)ck->copies, *copy = NULL;
    size_t total = last ? last->bytes : 0;
    if (bytes > ck->map_bytes + COPY_SLACK || total > ck->map_bytes + COPY_SLACK - bytes)
        return err("repeats its elements until they exceed the file");
    TRY(mem_alloc(&copy, sizeof *copy + bytes, 1, "a tensor in row-major order"));
    copy->next = last;
    copy->bytes = total + bytes;
    ck->copies = copy;
    *out = (unsigned char *)copy->data;
    return OK;
}

void ckpt_free_copies(void *copies) {
    for (Copy *c = (Copy *)copies, *next; c; c = next) {
        next = c->next;
        free(c);
    }
}

/* Elements from the first to the last that the shape reaches; 0 for an empty tensor. */
static Err reach(const Tensor *x, const size_t *stride, size_t *out) {
    size_t last = 0, step_bytes;
    *out = 0;
    if (x->size == 0) return OK;
    for (int i = 0; i < x->ndim; i++) {
        TRY(size_mul(&step_bytes, x->dim[i] - 1, stride[i]));
        if (last > SIZE_MAX - 1 - step_bytes) return err("a size is too large");
        last += step_bytes;
    }
    *out = last + 1;
    return OK;
}

static int row_major(const Tensor *x, const size_t *stride) {
    size_t expected = 1;
    for (int i = x->ndim; i-- > 0;) {
        if (x->dim[i] != 1 && stride[i] != expected) return x->size == 0;
        expected *= x->dim[i];
    }
    return 1;
}

/* out = the elements in row-major order; the last index runs fastest */
static void reorder(unsigned char *out, const Tensor *x, const size_t *stride, const unsigned char *from) {
    const size_t width = dtype_size(x->dtype);
    size_t at[TENSOR_DIMS] = {0}, offset = 0;
    for (size_t i = 0; i < x->size; i++) {
        memcpy(out + i * width, from + offset * width, width);
        for (int d = x->ndim; d-- > 0;) {
            offset += stride[d];
            if (++at[d] < x->dim[d]) break;
            offset -= at[d] * stride[d];
            at[d] = 0;
        }
    }
}

/* x: shape from the tuples of a tensor value */
static Err read_shape(const Pickle *k, const Value *v, Tensor *x, size_t *stride) {
    const Value *sizes = item(k, v, 2), *strides = item(k, v, 3);
    if (sizes->kind != V_TUPLE || strides->kind != V_TUPLE || sizes->n != strides->n) return err("has no shape");
    if (sizes->n > TENSOR_DIMS) return err("has %zu dimensions, expected at most %d", sizes->n, TENSOR_DIMS);
    x->size = 1;
    for (size_t i = 0; i < sizes->n; i++) {
        if (!is_count(item(k, sizes, i)) || !is_count(item(k, strides, i))) return err("has no shape");
        x->dim[x->ndim++] = (size_t)item(k, sizes, i)->number;
        stride[i] = (size_t)item(k, strides, i)->number;
        TRY(size_mul(&x->size, x->size, x->dim[i]));
    }
    return OK;
}

static Err place(Checkpoint *ck, const Pickle *k, const Value *v, const Blobs *blobs, Tensor *x) {
    const Value *storage = item(k, v, 0), *offset = item(k, v, 1);
    size_t stride[TENSOR_DIMS], elements, have, width = dtype_size(x->dtype), first = storage->first;
    TRY(read_shape(k, v, x, stride));
    TRY(reach(x, stride, &elements));
    const Blob *blob = find_blob(blobs, storage->text, storage->length);
    if (!blob || !blob->data)
        return err("lies in storage '%.*s', which is not in the file",
                   (int)(storage->length < 40 ? storage->length : 40), (const char *)storage->text);
    have = blob->bytes / width;
    if (first > have || (size_t)storage->number > have - first)
        return err("lies in a storage of %zu bytes, expected %llu elements of %s", blob->bytes,
                   (unsigned long long)storage->number, dtype_name(x->dtype));
    if (!is_count(offset) || offset->number > storage->number || elements > (size_t)(storage->number - offset->number))
        return err("reaches element %zu beyond offset %lld of a storage of %lld", elements, (long long)offset->number,
                   (long long)storage->number);
    const unsigned char *data = blob->data + (first + (size_t)offset->number) * width;
    x->data = data;
    if (row_major(x, stride)) return OK;
    unsigned char *copy = NULL;
    TRY(size_mul(&elements, x->size, width));
    TRY(copy_room(ck, elements, &copy));
    reorder(copy, x, stride, data);
    x->data = copy;
    return OK;
}

static Err add_tensor(Checkpoint *ck, size_t *capacity, const Pickle *k, const Value *key, const Value *v,
                      const Blobs *blobs) {
    char name[NAME_MAX_BYTES];
    const Value *storage = item(k, v, 0);
    if (storage->kind != V_STORAGE) return OK; /* complex or quantised numbers: this project has none */
    if (key->length >= NAME_MAX_BYTES || memchr(key->text, 0, key->length))
        return err("a tensor's name of %zu bytes, expected at most %d", key->length, NAME_MAX_BYTES - 1);
    memcpy(name, key->text, key->length);
    name[key->length] = 0;
    TRY(mem_grow(&ck->tensor, ck->n, 1, capacity, sizeof *ck->tensor, "the table of tensors"));
    Tensor *x = &ck->tensor[ck->n];
    memset(x, 0, sizeof *x);
    memcpy(x->name, name, sizeof name);
    x->dtype = storage->dtype;
    if (place(ck, k, v, blobs, x) != OK) return err("tensor '%s' %s", name, err_text());
    ck->n++;
    return OK;
}

static const Value *dict_get(const Pickle *k, const Value *dict, const char *key) {
    for (size_t i = 0; i + 1 < dict->n; i += 2) {
        if (is_text(item(k, dict, i), key)) return item(k, dict, i + 1);
    }
    return NULL;
}

static Err keep_count(Checkpoint *ck, const Pickle *k, const Value *top, const char *key) {
    const Value *v = dict_get(k, top, key);
    return v && v->kind == V_INT ? config_set(&ck->meta, key, "%lld", (long long)v->number) : OK;
}

static Err collect(Checkpoint *ck, const Pickle *k, Index result, const Blobs *blobs) {
    const Value *top = &k->value[result], *state = top;
    size_t capacity = 0;
    if (top->kind == V_DICT && dict_get(k, top, "state_dict")) {
        state = dict_get(k, top, "state_dict");
        TRY(keep_count(ck, k, top, "epoch"));
        TRY(keep_count(ck, k, top, "global_step"));
    }
    if (state->kind != V_DICT) return err("holds no dictionary of tensors: expected a 'state_dict'");
    for (size_t i = 0; i + 1 < state->n; i += 2) {
        const Value *key = item(k, state, i), *v = item(k, state, i + 1);
        if (key->kind == V_TEXT && v->kind == V_TENSOR) TRY(add_tensor(ck, &capacity, k, key, v, blobs));
    }
    return ck->n ? OK : err("holds no tensors: expected a 'state_dict' of them");
}

/* ------------------------------------------------------------------------------------------------------------
 * The zip archive. All numbers are little-endian. From its end: a directory of entries, each with the place of a
 * local header that the data follow. Where 32 bits do not do, a field is all ones and an extra block has the number.
 * ---------------------------------------------------------------------------------------------------------- */

static uint64_t number_at(const unsigned char *p, size_t bytes) {
    uint64_t out = 0;
    for (size_t i = 0; i < bytes; i++) out |= (uint64_t)p[i] << 8 * i;
    return out;
}

enum { END_BYTES = 22, END64_BYTES = 56, LOCATOR_BYTES = 20, ENTRY_BYTES = 46, LOCAL_BYTES = 30, COMMENT_MAX = 65535 };

typedef struct {
    const unsigned char *name;
    size_t name_length, begin, end; /* of local header, name and data together */
    const unsigned char *data;
    size_t bytes;
    uint32_t crc;
} Entry;

typedef struct {
    const unsigned char *file;
    size_t bytes, directory, directory_bytes, count;
    Entry *entry;
} Zip;

/* The directory's place, from the end record and, where there is one, its 64-bit companion */
static Err zip_directory(Zip *z) {
    size_t at = z->bytes < END_BYTES ? 0 : z->bytes - END_BYTES, lowest = at > COMMENT_MAX ? at - COMMENT_MAX : 0;
    while (at > lowest && memcmp(z->file + at, "PK\5\6", 4) != 0) at--;
    if (z->bytes < END_BYTES || memcmp(z->file + at, "PK\5\6", 4) != 0)
        return err("is a zip archive without an end: it is truncated; fetch it again");
    const unsigned char *end = z->file + at;
    uint64_t count = number_at(end + 10, 2), bytes = number_at(end + 12, 4), place = number_at(end + 16, 4);
    if (at >= LOCATOR_BYTES && memcmp(end - LOCATOR_BYTES, "PK\6\7", 4) == 0) {
        uint64_t at64 = number_at(end - LOCATOR_BYTES + 8, 8);
        if (at64 > at || at - at64 < END64_BYTES || memcmp(z->file + at64, "PK\6\6", 4) != 0)
            return err("is a zip archive whose 64-bit end record is not where it says");
        const unsigned char *end64 = z->file + at64;
        count = number_at(end64 + 32, 8), bytes = number_at(end64 + 40, 8), place = number_at(end64 + 48, 8);
        at = (size_t)at64;
    }
    if (place > at || bytes > at - place || count > bytes / ENTRY_BYTES)
        return err("is a zip archive whose directory of %llu entries does not fit in it", (unsigned long long)count);
    z->directory = (size_t)place;
    z->directory_bytes = (size_t)bytes;
    z->count = (size_t)count;
    return OK;
}

/* Replaces the numbers that are all ones by those of the 64-bit extra block, which has them in this order. */
static Err zip_extra(const unsigned char *p, size_t bytes, uint64_t *number[3]) {
    while (bytes >= 4) {
        size_t id = (size_t)number_at(p, 2), length = (size_t)number_at(p + 2, 2), at = 4;
        if (length > bytes - 4) return err("has a zip entry with a broken extra field");
        for (int i = 0; id == 1 && i < 3; i++) {
            if (*number[i] != UINT32_MAX) continue;
            if (at + 8 > length + 4) return err("has a zip entry with a broken 64-bit field");
            *number[i] = number_at(p + at, 8);
            at += 8;
        }
        p += 4 + length, bytes -= 4 + length;
    }
    return OK;
}

/* The data behind the local header, whose name and extra field have lengths of their own */
static Err zip_data(const Zip *z, Entry *e, uint64_t place, uint64_t bytes) {
    if (place > z->directory || z->directory - place < LOCAL_BYTES) return err("has a zip entry outside of the file");
    const unsigned char *local = z->file + place;
    if (memcmp(local, "PK\3\4", 4) != 0) return err("has a zip entry that is not where the directory says");
    size_t skip_bytes = LOCAL_BYTES + (size_t)number_at(local + 26, 2) + (size_t)number_at(local + 28, 2);
    if (z->directory - place < skip_bytes || z->directory - place - skip_bytes < bytes)
        return err("has a zip entry of %llu bytes that does not fit in the file", (unsigned long long)bytes);
    e->begin = (size_t)place;
    e->data = local + skip_bytes;
    e->bytes = (size_t)bytes;
    e->end = e->begin + skip_bytes + e->bytes;
    return OK;
}

static int ends_in(const unsigned char *text, size_t length, const char *end) {
    size_t n = strlen(end);
    return length >= n && memcmp(text + length - n, end, n) == 0;
}

static Err zip_entry(const Zip *z, Entry *e, size_t *at) {
    const size_t stop = z->directory + z->directory_bytes;
    const unsigned char *p = z->file + *at;
    if (stop - *at < ENTRY_BYTES || memcmp(p, "PK\1\2", 4) != 0) return err("has a broken zip directory");
    size_t name = (size_t)number_at(p + 28, 2), extra = (size_t)number_at(p + 30, 2);
    size_t whole = ENTRY_BYTES + name + extra + (size_t)number_at(p + 32, 2);
    if (stop - *at < whole) return err("has a broken zip directory");
    uint64_t stored = number_at(p + 20, 4), bytes = number_at(p + 24, 4), place_ = number_at(p + 42, 4);
    uint64_t *wide[3] = {&bytes, &stored, &place_};
    TRY(zip_extra(p + ENTRY_BYTES + name, extra, wide));
    if (number_at(p + 8, 2) & 1) return err("has an encrypted zip entry");
    if (ends_in(p + ENTRY_BYTES, name, ".ckpt") || ends_in(p + ENTRY_BYTES, name, ".safetensors"))
        return err("is a zip archive that holds '%.*s': unzip it and use what comes out", (int)min_size(name, 100),
                   (const char *)p + ENTRY_BYTES);
    if (number_at(p + 10, 2) != 0 || stored != bytes)
        return err("has a compressed zip entry '%.*s': unzip it, PyTorch stores without compression",
                   (int)(name < 60 ? name : 60), (const char *)p + ENTRY_BYTES);
    e->name = p + ENTRY_BYTES;
    e->name_length = name;
    e->crc = (uint32_t)number_at(p + 16, 4);
    *at += whole;
    return zip_data(z, e, place_, bytes);
}

static int by_begin(const void *pa, const void *pb) {
    const Entry *a = (const Entry *)pa, *b = (const Entry *)pb;
    return (a->begin > b->begin) - (a->begin < b->begin);
}

static Err zip_open(Zip *z, const Checkpoint *ck) {
    z->file = (const unsigned char *)ck->map;
    z->bytes = ck->map_bytes;
    TRY(zip_directory(z));
    TRY(mem_alloc(&z->entry, z->count, sizeof *z->entry, "a zip directory"));
    size_t at = z->directory;
    for (size_t i = 0; i < z->count; i++) TRY(zip_entry(z, &z->entry[i], &at));
    if (z->count) qsort(z->entry, z->count, sizeof *z->entry, by_begin);
    for (size_t i = 1; i < z->count; i++) {
        if (z->entry[i].begin < z->entry[i - 1].end) return err("has zip entries that overlap");
    }
    return OK;
}

/* X/data.pkl, for the one X that has it: then *folder is the length of "X/" */
static Err zip_pickle(const Zip *z, const Entry **pickle, size_t *folder) {
    static const char name[] = "/data.pkl";
    const size_t length = sizeof name - 1;
    *pickle = NULL;
    for (size_t i = 0; i < z->count; i++) {
        const Entry *e = &z->entry[i];
        if (e->name_length <= length || memcmp(e->name + e->name_length - length, name, length) != 0) continue;
        if (memchr(e->name, '/', e->name_length) != e->name + e->name_length - length) continue; /* deeper */
        if (*pickle) return err("is a zip archive with two data.pkl");
        *pickle = e;
        *folder = e->name_length - length + 1;
    }
    if (!*pickle) return err("is a zip archive without data.pkl: not from torch.save");
    if (crc32_z(0, (*pickle)->data, (*pickle)->bytes) != (*pickle)->crc)
        return err("has a damaged data.pkl: its checksum differs; fetch it again");
    return OK;
}

/* Entries X/data/KEY become storages. */
static Err zip_blobs(const Zip *z, const unsigned char *folder, size_t length, Blobs *out) {
    static const char data[] = "data/", order[] = "byteorder";
    for (size_t i = 0; i < z->count; i++) {
        const Entry *e = &z->entry[i];
        if (e->name_length < length || memcmp(e->name, folder, length) != 0) continue;
        const unsigned char *name = e->name + length;
        size_t n = e->name_length - length;
        if (n == sizeof order - 1 && memcmp(name, order, n) == 0 && (e->bytes != 6 || memcmp(e->data, "little", 6)))
            return err("was written on a big-endian machine");
        if (n < sizeof data || memcmp(name, data, sizeof data - 1) != 0) continue;
        TRY(add_blob(out, (Blob){.key = name + sizeof data - 1,
                                 .length = n - (sizeof data - 1),
                                 .data = e->data,
                                 .bytes = e->bytes}));
    }
    if (out->n) qsort(out->blob, out->n, sizeof *out->blob, by_key);
    for (size_t i = 1; i < out->n; i++) {
        if (by_key(&out->blob[i - 1], &out->blob[i]) == 0) return err("has two zip entries of one name");
    }
    return OK;
}

static Err read_zip(Checkpoint *ck, Zip *z, Pickle *k, Blobs *blobs) {
    const Entry *pickle = NULL;
    size_t folder = 0;
    Index result = 0;
    TRY(zip_open(z, ck));
    TRY(zip_pickle(z, &pickle, &folder));
    k->start = k->p = pickle->data;
    k->end = pickle->data + pickle->bytes;
    TRY(run(k, &result));
    TRY(zip_blobs(z, pickle->name, folder, blobs));
    return collect(ck, k, result, blobs);
}

/* ------------------------------------------------------------------------------------------------------------
 * The old format: pickles in a row, then the storages in the order of the last one's keys
 * ---------------------------------------------------------------------------------------------------------- */

static Err old_preamble(Pickle *k) {
    static const unsigned char magic[] = {0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19};
    Index at;
    TRY(run(k, &at));
    const Value *v = &k->value[at];
    if (v->kind != V_TEXT || v->length != sizeof magic || memcmp(v->text, magic, sizeof magic) != 0)
        return err("is a pickle, but not one of torch.save");
    TRY(run(k, &at));
    if (k->value[at].kind != V_INT || k->value[at].number != 1001) return err("is not of torch.save protocol 1001");
    TRY(run(k, &at));
    v = k->value[at].kind == V_DICT ? dict_get(k, &k->value[at], "little_endian") : NULL;
    return v && v->kind == V_INT && v->number == 0 ? err("was written on a big-endian machine") : OK;
}

/* One blob for each key that the pickle mentions */
static Err old_keys(const Pickle *k, Blobs *out) {
    for (size_t i = 0; i < k->n; i++) {
        const Value *v = &k->value[i];
        if (v->kind == V_STORAGE) TRY(add_blob(out, (Blob){.key = v->text, .length = v->length, .dtype = v->dtype}));
    }
    if (out->n == 0) return err("holds no tensors");
    qsort(out->blob, out->n, sizeof *out->blob, by_key);
    size_t n = 1;
    for (size_t i = 1; i < out->n; i++) {
        if (by_key(&out->blob[n - 1], &out->blob[i]) != 0)
            out->blob[n++] = out->blob[i];
        else if (out->blob[n - 1].dtype != out->blob[i].dtype)
            return err("has a storage of two types");
    }
    out->n = n;
    return OK;
}

/* Storages follow each other, so each must be known to find the next: number of elements, then the elements. */
static Err old_storages(Pickle *k, Index keys, Blobs *blobs) {
    const Value *list = &k->value[keys];
    if (list->kind != V_TUPLE) return err("has no list of storages");
    for (size_t i = 0; i < list->n; i++) {
        const Value *key = item(k, list, i);
        Blob *blob = key->kind == V_TEXT ? find_blob(blobs, key->text, key->length) : NULL;
        uint64_t elements;
        if (!blob || blob->data) return err("has a storage that no tensor uses, or that comes twice");
        TRY(take_number(k, 8, &elements));
        if (elements > (size_t)(k->end - k->p) / dtype_size(blob->dtype))
            return err("has a storage of %llu elements that ends behind the file: it is truncated; fetch it again",
                       (unsigned long long)elements);
        blob->bytes = (size_t)elements * dtype_size(blob->dtype);
        TRY(take(k, blob->bytes, &blob->data));
    }
    return OK;
}

static Err read_old(Checkpoint *ck, Pickle *k, Blobs *blobs) {
    Index object = 0, keys = 0;
    k->start = k->p = (const unsigned char *)ck->map;
    k->end = k->p + ck->map_bytes;
    TRY(old_preamble(k));
    TRY(run(k, &object));
    TRY(old_keys(k, blobs));
    TRY(run(k, &keys));
    TRY(old_storages(k, keys, blobs));
    return collect(ck, k, object, blobs);
}

Err ckpt_read(Checkpoint *ck) {
    Pickle k = {0};
    Blobs blobs = {0};
    Zip z = {0};
    const int zip = ck->map_bytes >= 4 && memcmp(ck->map, "PK", 2) == 0;
    Err e = zip ? read_zip(ck, &z, &k, &blobs) : read_old(ck, &k, &blobs);
    free(z.entry);
    free(blobs.blob);
    pickle_free(&k);
    return e;
}
