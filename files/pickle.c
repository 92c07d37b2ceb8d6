/* pickle.c - the machine that runs a pickle without running anything.
 *
 * A pickle is a program for a stack machine. `step` below runs all of its instructions that build plain things:
 * numbers, strings, lists, dictionaries. The ones that would call a function call nothing: REDUCE knows by name the few
 * that describe a tensor (torch._utils._rebuild_tensor_v2 and its kin, collections.OrderedDict) and turns everything
 * else into an inert value that is skipped, whatever it is called with. So os.system in a file is five bytes of text.
 *
 * Every value of the machine costs the file at least a byte and takes at most some hundred, and there is a limit to
 * their number that no file of weights comes near.
 *
 * Read in this order: values; the machine; instructions; torch's own objects. */
#include "files/pickle.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------------------------------------------------------
 * Values
 * ---------------------------------------------------------------------------------------------------------- */

enum { MAX_VALUES = 1 << 21 };

void pickle_free(Pickle *k) {
    for (size_t i = 0; i < k->n; i++)
        if (k->value[i].room) free(k->value[i].many);
    free(k->value);
    free(k->stack);
    free(k->memo);
    memset(k, 0, sizeof *k);
}

int value_is(const Value *v, const char *text) {
    return v->kind == V_TEXT && v->length == strlen(text) && memcmp(v->text, text, v->length) == 0;
}

static const Index *items_of(const Value *v) {
    return v->room ? v->many : v->few;
}

const Value *pickle_item(const Pickle *k, const Value *v, size_t i) {
    return &k->value[items_of(v)[i]];
}

static Err add_items(Value *v, const Index *items, size_t n) {
    size_t room = v->room;
    if (v->n + n > (room ? room : FEW)) {
        Index *many = room ? v->many : NULL;
        TRY(mem_grow(&many, room ? v->n : 0, room ? n : v->n + n, &room, sizeof *many, "a list in a pickle"));
        if (!v->room) memcpy(many, v->few, v->n * sizeof *many);
        v->many = many, v->room = (uint32_t)room;
    }
    for (size_t i = 0; i < n; i++) (v->room ? v->many : v->few)[v->n++] = items[i];
    return OK;
}

const Value *pickle_get(const Pickle *k, const Value *dict, const char *key) {
    for (size_t i = dict->n; i >= 2; i -= 2) {
        if (value_is(pickle_item(k, dict, i - 2), key)) return pickle_item(k, dict, i - 1);
    }
    return NULL;
}

/* ------------------------------------------------------------------------------------------------------------
 * The machine: reading the program, the stack, the memo
 * ---------------------------------------------------------------------------------------------------------- */

Err pickle_take(Pickle *k, size_t bytes, const unsigned char **out) {
    *out = k->p;
    if (bytes > (size_t)(k->end - k->p)) return err_damaged("ends in the middle of an instruction: it is truncated");
    k->p += bytes;
    return OK;
}

/* An unsigned number of 1, 2, 4 or 8 bytes, little-endian */
Err pickle_number(Pickle *k, size_t bytes, uint64_t *out) {
    const unsigned char *p;
    *out = 0;
    TRY(pickle_take(k, bytes, &p));
    for (size_t i = 0; i < bytes; i++) *out |= (uint64_t)p[i] << 8 * i;
    return OK;
}

static Err take_line(Pickle *k, const unsigned char **out, size_t *length) {
    const unsigned char *newline = memchr(k->p, '\n', (size_t)(k->end - k->p));
    *out = k->p, *length = 0;
    if (!newline) return err_damaged("ends in the middle of a line: it is truncated");
    *length = (size_t)(newline - k->p);
    TRY(pickle_take(k, *length + 1, out));
    return OK;
}

static Err push_index(Pickle *k, Index v) {
    if (k->depth == MAX_VALUES)
        return err_damaged("has over %d values on its stack: not a file of weights", MAX_VALUES);
    TRY(mem_grow(&k->stack, k->depth, 1, &k->stack_capacity, sizeof *k->stack, "the stack of a pickle"));
    k->stack[k->depth++] = v;
    return OK;
}

/* Pushes a new value; it is k->value[k->n - 1] until the next one. */
static Err push(Pickle *k, ValueKind kind) {
    if (k->n == MAX_VALUES) return err_damaged("has over %d values: not a file of weights", MAX_VALUES);
    TRY(mem_grow(&k->value, k->n, 1, &k->capacity, sizeof *k->value, "the values of a pickle"));
    memset(&k->value[k->n], 0, sizeof *k->value);
    k->value[k->n].kind = (uint8_t)kind;
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
    if (k->depth == 0 || k->value[k->stack[k->depth - 1]].kind == V_MARK)
        return err_damaged("takes a value that is not there");
    *out = k->stack[--k->depth];
    return OK;
}

static Err peek(const Pickle *k, Index *out) {
    *out = 0;
    if (k->depth == 0 || k->value[k->stack[k->depth - 1]].kind == V_MARK)
        return err_damaged("uses a value that is not there");
    *out = k->stack[k->depth - 1];
    return OK;
}

/* Stack position of the first value above the topmost mark */
static Err find_mark(const Pickle *k, size_t *above) {
    *above = 0;
    for (size_t i = k->depth; i-- > 0;) {
        if (k->value[k->stack[i]].kind == V_MARK) return *above = i + 1, OK;
    }
    return err_damaged("takes values down to a mark that is not there");
}

/* The n topmost values become the items of a new one. */
static Err gather(Pickle *k, ValueKind kind, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (i == k->depth || k->value[k->stack[k->depth - 1 - i]].kind == V_MARK)
            return err_damaged("takes a value that is not there");
    }
    if (kind == V_DICT && n % 2) return err_damaged("makes a dictionary of %zu keys and values", n);
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
        return err_damaged("adds to a container that is not there");
    Value *to = &k->value[k->stack[above - marks - 1]];
    if (kind == V_DICT && n % 2) return err_damaged("sets %zu keys and values", n);
    if (to->kind == kind) TRY(add_items(to, k->stack + above, n));
    k->depth = above - marks;
    return OK;
}

static Err append_one(Pickle *k, ValueKind kind, size_t n) {
    if (k->depth < n + 1) return err_damaged("adds a value that is not there");
    for (size_t i = 0; i < n; i++) {
        if (k->value[k->stack[k->depth - 1 - i]].kind == V_MARK) return err_damaged("adds a value that is not there");
    }
    return append(k, kind, k->depth - n, 0);
}

static Err append_to_mark(Pickle *k, ValueKind kind) {
    size_t above;
    TRY(find_mark(k, &above));
    return append(k, kind, above, 1);
}

/* Writers number the values that they remember without gaps, so a number larger than the program's length, or than all
 * values, is an attack. */
static Err memo_put(Pickle *k, uint64_t at) {
    Index v;
    TRY(peek(k, &v));
    if (at > (size_t)(k->end - k->start) || at >= MAX_VALUES)
        return err_damaged("remembers value number %llu", (unsigned long long)at);
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
        return err_damaged("recalls value number %llu, which it never remembered", (unsigned long long)at);
    return push_index(k, k->memo[at]);
}

static Err memo_line(Pickle *k, int put) {
    const unsigned char *line;
    size_t length;
    uint64_t at = 0;
    TRY(take_line(k, &line, &length));
    for (size_t i = 0; i < length; i++) {
        if (line[i] < '0' || line[i] > '9' || at > UINT32_MAX) return err_damaged("has a memo number that is none");
        at = at * 10 + (uint64_t)(line[i] - '0');
    }
    return put ? memo_put(k, at) : memo_get(k, at);
}

static Err memo_binary(Pickle *k, size_t bytes, int put) {
    uint64_t at;
    TRY(pickle_number(k, bytes, &at));
    return put ? memo_put(k, at) : memo_get(k, at);
}

static Err text_of(Pickle *k, size_t length_bytes) {
    uint64_t length;
    const unsigned char *text;
    TRY(pickle_number(k, length_bytes, &length));
    if (length > SIZE_MAX) return err_damaged("has a text of %llu bytes", (unsigned long long)length);
    TRY(pickle_take(k, (size_t)length, &text));
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
    TRY(pickle_number(k, length_bytes, &length));
    if (length > SIZE_MAX) return err_damaged("has a number of %llu bytes", (unsigned long long)length);
    TRY(pickle_take(k, (size_t)length, &p));
    if (length > 8) return push_text(k, p, (size_t)length);
    for (size_t i = 0; i < length; i++) bits |= (uint64_t)p[i] << 8 * i;
    if (length && length < 8 && p[length - 1] >= 0x80) bits |= UINT64_MAX << 8 * length;
    return push_int(k, (int64_t)bits);
}

static Err number_of(Pickle *k, size_t bytes, int is_signed) {
    uint64_t bits;
    TRY(pickle_number(k, bytes, &bits));
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
        if (line[i] < '0' || line[i] > '9' || number > (INT64_MAX - 9) / 10)
            return err_damaged("has a number that is none");
        number = number * 10 + (line[i] - '0');
    }
    return push_int(k, negative ? -number : number);
}

static Err skip(Pickle *k, size_t bytes) {
    const unsigned char *p;
    return pickle_take(k, bytes, &p);
}

static Err float_of(Pickle *k) {
    TRY(skip(k, 8));
    return push(k, V_NONE);
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
    if (k->depth == 0) return err_damaged("takes a value that is not there");
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
    TRY(pickle_number(k, 1, &version));
    return version <= 5 ? OK : err_damaged("is of pickle protocol %d, expected 0 to 5", (int)version);
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
    case 'G': /* BINFLOAT */ return float_of(k);

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
    return err_damaged("has instruction 0x%02x, which no file of weights needs", op);
}

/* One instruction. *done: STOP */
static Err step(Pickle *k, int *done) {
    const unsigned char *op;
    TRY(pickle_take(k, 1, &op));
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
Err pickle_run(Pickle *k, Index *result) {
    int done = 0;
    k->depth = k->n_memo = 0; /* a program knows nothing of the one before */
    while (!done) {
        const unsigned char *at = k->p;
        if (step(k, &done) == OK) continue;
        char where[64];
        snprintf(where, sizeof where, "its pickle, at byte %zu", (size_t)(at - k->start));
        return err_in(where);
    }
    return pop(k, result);
}

/* ------------------------------------------------------------------------------------------------------------
 * Torch's own objects
 * ---------------------------------------------------------------------------------------------------------- */

static int is_global(const Pickle *k, const Value *v, const char *module, const char *name) {
    return v->kind == V_GLOBAL && value_is(pickle_item(k, v, 0), module) && value_is(pickle_item(k, v, 1), name);
}

/* OrderedDict(), or OrderedDict([(key, value), ...]) as protocol 2 writes it at times */
static Err ordered_dict(Pickle *k, Index arguments) {
    TRY(push(k, V_DICT));
    Value *made = &k->value[k->n - 1];
    const Value *given = &k->value[arguments];
    const Value *pairs = given->n ? pickle_item(k, given, 0) : NULL;
    for (size_t i = 0; pairs && pairs->kind == V_TUPLE && i < pairs->n; i++) {
        const Value *pair = pickle_item(k, pairs, i);
        if (pair->kind == V_TUPLE && pair->n == 2) TRY(add_items(made, items_of(pair), 2));
    }
    return OK;
}

/* torch.float32 and its like, as newer versions name the type of what lies in a storage of bytes */
static Dtype dtype_of(const Pickle *k, const Value *v) {
    static const struct {
        const char *name;
        Dtype dtype;
    } types[] = {{"float64", DT_F64},
                 {"float32", DT_F32},
                 {"float16", DT_F16},
                 {"bfloat16", DT_BF16},
                 {"int64", DT_I64},
                 {"int32", DT_I32},
                 {"int16", DT_I16},
                 {"int8", DT_I8},
                 {"uint8", DT_U8},
                 {"bool", DT_BOOL},
                 {"uint64", DT_U64},
                 {"uint32", DT_U32},
                 {"uint16", DT_U16},
                 {"float8_e5m2", DT_F8_E5M2},
                 {"float8_e4m3fn", DT_F8_E4M3},
                 {"float8_e5m2fnuz", DT_F8_E5M2FNUZ},
                 {"float8_e4m3fnuz", DT_F8_E4M3FNUZ},
                 {"float8_e8m0fnu", DT_F8_E8M0},
                 {"complex32", DT_C32},
                 {"complex64", DT_C64},
                 {"complex128", DT_C128}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        if (is_global(k, v, "torch", types[i].name)) return types[i].dtype;
    }
    return DT_OTHER;
}

/* storage, offset, size, stride, and what else the version adds; typed: the seventh is the type, the storage has none */
static Err rebuilt_tensor(Pickle *k, Index arguments, int typed) {
    const Value *a = &k->value[arguments];
    if (a->n < (typed ? 7 : 4)) return err_damaged("rebuilds a tensor from %zu arguments", (size_t)a->n);
    const Value *storage = pickle_item(k, a, 0);
    const Dtype of_storage = storage->kind == V_STORAGE ? (Dtype)storage->dtype : DT_OTHER;
    const Dtype dtype = typed && storage->kind == V_STORAGE ? dtype_of(k, pickle_item(k, a, 6)) : of_storage;
    TRY(push(k, V_TENSOR));
    k->value[k->n - 1].dtype = (uint8_t)dtype;
    return add_items(&k->value[k->n - 1], items_of(&k->value[arguments]), 4);
}

enum { MAX_WRAPS = 8 };

/* REDUCE: function(arguments). The functions that describe tensors are known by name; nothing is ever called. */
static Err call(Pickle *k) {
    static const char *const wraps[][2] = {
        {"torch._utils", "_rebuild_parameter"}, {"torch._utils", "_rebuild_parameter_with_state"}, {"torch", "Size"}};
    Index arguments, function;
    TRY(pop(k, &arguments));
    TRY(pop(k, &function));
    /* tensors of a class of their own, or with attributes: (function, class, arguments, attributes) */
    for (int i = 0; i < MAX_WRAPS; i++) {
        const Value *f = &k->value[function], *a = &k->value[arguments];
        const int own = is_global(k, f, "torch._tensor", "_rebuild_from_type_v2") ||
                        is_global(k, f, "torch._tensor", "_rebuild_from_type");
        if (!own || a->kind != V_TUPLE || a->n < 3) break;
        function = items_of(a)[0], arguments = items_of(a)[2];
    }
    const Value *f = &k->value[function], *a = &k->value[arguments];
    if (a->kind != V_TUPLE) return push(k, V_INERT);
    if (is_global(k, f, "collections", "OrderedDict")) return ordered_dict(k, arguments);
    if (is_global(k, f, "torch._utils", "_rebuild_tensor_v2")) return rebuilt_tensor(k, arguments, 0);
    if (is_global(k, f, "torch._utils", "_rebuild_tensor")) return rebuilt_tensor(k, arguments, 0);
    if (is_global(k, f, "torch._utils", "_rebuild_tensor_v3")) return rebuilt_tensor(k, arguments, 1);
    for (size_t i = 0; i < sizeof wraps / sizeof *wraps && a->n; i++) {
        if (is_global(k, f, wraps[i][0], wraps[i][1])) return push_index(k, items_of(a)[0]);
    }
    return push(k, V_INERT);
}

/* The storage's type says how wide its elements are, which the old format needs to step over it. Quantised numbers are
 * stored as integers; a storage without a type is one of bytes. DT_OTHER: unknown */
static Dtype storage_dtype(const Value *name) {
    static const struct {
        const char *name;
        Dtype dtype;
    } types[] = {{"DoubleStorage", DT_F64},         {"FloatStorage", DT_F32},       {"HalfStorage", DT_F16},
                 {"BFloat16Storage", DT_BF16},      {"LongStorage", DT_I64},        {"IntStorage", DT_I32},
                 {"ShortStorage", DT_I16},          {"CharStorage", DT_I8},         {"ByteStorage", DT_U8},
                 {"BoolStorage", DT_BOOL},          {"UntypedStorage", DT_U8},      {"ComplexFloatStorage", DT_C64},
                 {"ComplexDoubleStorage", DT_C128}, {"ComplexHalfStorage", DT_C32}, {"QInt8Storage", DT_I8},
                 {"QUInt8Storage", DT_U8},          {"QInt32Storage", DT_I32},      {"QUInt4x2Storage", DT_U8},
                 {"QUInt2x4Storage", DT_U8}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        if (value_is(name, types[i].name)) return types[i].dtype;
    }
    return DT_OTHER;
}

int value_is_count(const Value *v) {
    return v->kind == V_INT && v->number >= 0;
}

/* A part of a storage, as the old format may describe it: (key, first, elements) */
static Err storage_view(const Pickle *k, Value *storage, const Value *view) {
    if (view->kind != V_TUPLE) return OK;
    if (view->n != 3 || !value_is_count(pickle_item(k, view, 1)) || !value_is_count(pickle_item(k, view, 2)))
        return err_damaged("has a view of a storage that is none");
    storage->first = (size_t)pickle_item(k, view, 1)->number;
    storage->number = pickle_item(k, view, 2)->number;
    return OK;
}

/* BINPERSID: ("storage", torch.FloatStorage, key, device, elements[, view]). */
static Err persistent(Pickle *k) {
    Index id;
    TRY(pop(k, &id));
    TRY(push(k, V_INERT));
    Value *storage = &k->value[k->n - 1];
    const Value *v = &k->value[id];
    if (v->kind != V_TUPLE || v->n < 5 || !value_is(pickle_item(k, v, 0), "storage")) return OK;
    const Value *type = pickle_item(k, v, 1), *key = pickle_item(k, v, 2), *count = pickle_item(k, v, 4);
    if (type->kind != V_GLOBAL || key->kind != V_TEXT || !value_is_count(count)) return OK;
    storage->kind = V_STORAGE;
    storage->dtype = (uint8_t)storage_dtype(pickle_item(k, type, 1));
    storage->text = key->text;
    storage->length = key->length;
    storage->number = count->number;
    return v->n > 5 ? storage_view(k, storage, pickle_item(k, v, 5)) : OK;
}
