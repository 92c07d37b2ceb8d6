/* checkpoint.c - named tensors in files: safetensors in and out.
 *
 * A checkpoint is a read-only mapping of a file plus a sorted table of tensors that point into it. Nothing is copied
 * until someone asks for numbers.
 *
 * A safetensors file is:   u64 length, little-endian | JSON header of that length | data
 *   header: {"__metadata__": {"key": "text"}, "name": {"dtype": "F32", "shape": [2,3], "data_offsets": [0,24]}, ...}
 * Offsets count from the start of the data; together the tensors cover the data without a gap or an overlap.
 *
 * Refuses: whatever breaks a word of that. A file is hostile until every length, offset, shape and dtype in it has been
 * checked, so after checkpoint_open any tensor can be read without further thought. (A file that someone shortens
 * while it is mapped is beyond our reach: the kernel answers with SIGBUS. We replace files by rename for that reason.)
 * Does not know any model: which names and shapes there must be is said by the rows of a parameter table (params.c).
 *
 * Read in this order: the JSON cursor; reading safetensors; asking for tensors; writing safetensors; lists of tensors.
 * PyTorch's own containers are read in ckpt.c; checkpoint_open tells files apart by content. */
#include "files/pickle.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "safetensors data is little-endian and is mapped as it is"
#endif

enum {
    HEADER_MAX_BYTES = 100000000, /* the limit of the safetensors library */
    META_MAX_ENTRIES = 4096       /* Config is searched linearly; a hostile file must not make that slow */
};

/* ------------------------------------------------------------------------------------------------------------
 * The JSON cursor. It runs over a copy of the header that ends in a zero byte, where every function stops, and decodes
 * strings in place: none is longer than its source. It knows the shape of a safetensors header only (two levels of
 * objects, one of lists), so there is no depth to limit. The first error sticks: after it nothing is read any more.
 * ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    char *start, *p, *end;
    Err failed;
} Json;

static Err json_fail(Json *j, const char *fmt, ...) PRINTF_LIKE(2, 3);
static Err json_fail(Json *j, const char *fmt, ...) {
    if (j->failed) return j->failed;
    char text[640];
    va_list a;
    va_start(a, fmt);
    vsnprintf(text, sizeof text, fmt, a);
    va_end(a);
    return j->failed = err_damaged("header byte %zu: %s", (size_t)(j->p - j->start), text);
}

static Err json_unexpected(Json *j, const char *expected) {
    unsigned c = (unsigned char)*j->p;
    char found[16];
    snprintf(found, sizeof found, c > ' ' && c < 127 ? "'%c'" : "byte 0x%02x", c);
    return json_fail(j, "expected %s, found %s", expected, j->p == j->end ? "the end" : found);
}

/* The next character that is not white space */
static char json_peek(Json *j) {
    j->p += strspn(j->p, " \t\r\n");
    return *j->p;
}

static void json_expect(Json *j, char c) {
    char expected[4] = {'\'', c, '\'', 0};
    if (j->failed) return;
    if (json_peek(j) != c) json_unexpected(j, expected);
    if (!j->failed) j->p++;
}

/* Steps to the next member of a list or object: 0 behind the last one or after an error. */
static int json_more(Json *j, char close, int *first) {
    if (!j->failed && json_peek(j) == close) return j->p++, 0;
    if (!*first) json_expect(j, ',');
    *first = 0;
    return !j->failed;
}

static size_t json_size(Json *j) {
    size_t number = 0;
    if (j->failed) return 0;
    json_peek(j);
    const char *start = j->p, *s = start;
    int good = text_digits(&number, &s) && !(*start == '0' && s > start + 1) && !strchr(".eE", *s);
    if (!good) json_unexpected(j, "a whole number of 64 bits");
    j->p += s - start;
    return number;
}

static char *put_utf8(char *out, uint32_t u) {
    static const unsigned char lead[] = {0, 0, 0xC0, 0xE0, 0xF0};
    int n = u < 0x80 ? 1 : u < 0x800 ? 2 : u < 0x10000 ? 3 : 4;
    *out++ = (char)(lead[n] | u >> 6 * (n - 1));
    while (--n) *out++ = (char)(0x80 | (u >> 6 * (n - 1) & 63));
    return out;
}

static uint32_t json_hex4(Json *j) {
    static const char hex[] = "0123456789abcdef0123456789ABCDEF";
    uint32_t u = 0;
    for (int i = 0; i < 4 && !j->failed; i++) {
        const char *digit = *j->p ? strchr(hex, *j->p) : NULL, *upper = *j->p ? strrchr(hex, *j->p) : NULL;
        if (!digit) return json_unexpected(j, "four hexadecimal digits after \\u"), 0;
        u = u * 16 + (uint32_t)((upper - hex) & 15);
        j->p++;
    }
    return u;
}

/* The character behind a backslash. \u may need a second \u, the other half of a surrogate pair. */
static char *json_escape(Json *j, char *out) {
    static const char code[] = "\"\\/bfnrt", meaning[] = "\"\\/\b\f\n\r\t";
    const char *c = *j->p ? strchr(code, *j->p) : NULL;
    if (c) return *out = meaning[c - code], j->p++, out + 1;
    if (*j->p != 'u') return json_unexpected(j, "an escape sequence after '\\'"), out;
    j->p++;
    uint32_t u = json_hex4(j), low = 0;
    if (u >= 0xD800 && u < 0xDC00 && j->p[0] == '\\' && j->p[1] == 'u') {
        j->p += 2;
        low = json_hex4(j);
        if (low >= 0xDC00 && low < 0xE000) u = 0x10000 + ((u - 0xD800) << 10) + (low - 0xDC00);
    }
    if (u == 0 || (u >= 0xD800 && u < 0xE000)) return json_fail(j, "\\u%04x is no character", u), out;
    return put_utf8(out, u);
}

/* Never NULL; lives as long as the copy of the header. */
static const char *json_string(Json *j) {
    json_expect(j, '"');
    char *string = j->p, *out = string;
    while (!j->failed && *j->p != '"') {
        size_t n = utf8_length(j->p);
        if (*j->p == '\\') {
            j->p++;
            out = json_escape(j, out);
        } else if (n == 0 || (unsigned char)*j->p < ' ') {
            json_unexpected(j, "a string of UTF-8");
        } else {
            memmove(out, j->p, n);
            out += n, j->p += n;
        }
    }
    if (j->failed) return "";
    j->p++;
    *out = 0;
    return string;
}

static const char *json_key(Json *j) {
    const char *key = json_string(j);
    json_expect(j, ':');
    return key;
}

/* ------------------------------------------------------------------------------------------------------------
 * Reading safetensors
 * ---------------------------------------------------------------------------------------------------------- */

static Err read_metadata(Json *j, Config *meta) {
    json_expect(j, '{');
    for (int first = 1; json_more(j, '}', &first);) {
        const char *key = json_key(j), *value = json_string(j);
        if (j->failed) return j->failed;
        if (config_get(meta, "", key)) return json_fail(j, "second '%s' in __metadata__", key);
        if (meta->n == META_MAX_ENTRIES) return json_fail(j, "over %d entries in __metadata__", META_MAX_ENTRIES);
        TRY(config_set(meta, key, "%s", value));
    }
    return j->failed;
}

static Err read_dtype(Json *j, Tensor *x) {
    const char *name = json_string(j);
    for (int d = 0; d < DT_SAFETENSORS; d++) {
        if (strcmp(name, dtype_name((Dtype)d)) == 0) return x->dtype = (Dtype)d, OK;
    }
    return json_fail(j, "tensor '%s': dtype '%.40s', expected F64 F32 F16 BF16 I64 I32 I16 I8 U8 or BOOL", x->name,
                     name);
}

static Err read_shape(Json *j, Tensor *x) {
    json_expect(j, '[');
    for (int first = 1; json_more(j, ']', &first);) {
        size_t dim = json_size(j);
        if (x->ndim == TENSOR_DIMS) return json_fail(j, "tensor '%s': over %d dimensions", x->name, TENSOR_DIMS);
        x->dim[x->ndim++] = dim;
        if (dim && x->size > SIZE_MAX / dim) return json_fail(j, "tensor '%s': shape is too large", x->name);
        x->size *= dim;
    }
    return j->failed;
}

static Err read_range(Json *j, size_t range[2]) {
    json_expect(j, '[');
    range[0] = json_size(j);
    json_expect(j, ',');
    range[1] = json_size(j);
    json_expect(j, ']');
    return j->failed;
}

/* {"dtype": ..., "shape": ..., "data_offsets": ...} in any order */
static Err read_entry(Json *j, Tensor *x, size_t range[2]) {
    static const char *const fields[] = {"dtype", "shape", "data_offsets"};
    unsigned seen = 0;
    json_expect(j, '{');
    for (int first = 1; json_more(j, '}', &first);) {
        const char *key = json_key(j);
        unsigned field = 0;
        if (j->failed) return j->failed;
        while (field < 3 && strcmp(key, fields[field]) != 0) field++;
        if (field == 3) return json_fail(j, "tensor '%s': unknown field '%.40s'", x->name, key);
        if (seen >> field & 1) return json_fail(j, "tensor '%s': second '%s'", x->name, key);
        TRY(field == 0 ? read_dtype(j, x) : field == 1 ? read_shape(j, x) : read_range(j, range));
        seen |= 1u << field;
    }
    for (int field = 0; field < 3; field++) {
        if (!(seen >> field & 1)) return json_fail(j, "tensor '%s' has no %s", x->name, fields[field]);
    }
    return j->failed;
}

/* x->data, once its range lies in the data and holds just as many bytes as dtype and shape ask for */
static Err place_tensor(Tensor *x, const size_t range[2], const unsigned char *data, size_t data_bytes) {
    const size_t bits = dtype_bits(x->dtype);
    if (range[0] > range[1]) return err_damaged("tensor '%s' goes from byte %zu to %zu", x->name, range[0], range[1]);
    if (range[1] > data_bytes)
        return err_damaged("tensor '%s' ends at byte %zu of the data, the file at %zu: it is truncated", x->name,
                           range[1], data_bytes);
    if (x->size > SIZE_MAX / 8 || x->size % 8 * bits % 8 || range[1] - range[0] != tensor_bytes(x))
        return err_damaged("tensor '%s' has %zu bytes of data, expected %zu of %s with %zu bits each", x->name,
                           range[1] - range[0], x->size, dtype_name(x->dtype), bits);
    x->data = data + range[0];
    return OK;
}

static Err read_header(Json *j, Checkpoint *ck, const unsigned char *data, size_t data_bytes) {
    size_t capacity = 0, range[2] = {0, 0};
    int has_meta = 0;
    json_expect(j, '{');
    for (int first = 1; json_more(j, '}', &first);) {
        const char *name = json_key(j);
        size_t length = strlen(name);
        if (j->failed) return j->failed;
        if (strcmp(name, "__metadata__") == 0) {
            if (has_meta++) return json_fail(j, "second __metadata__");
            TRY(read_metadata(j, &ck->meta));
            continue;
        }
        if (length >= NAME_MAX_BYTES)
            return json_fail(j, "name of %zu bytes, expected at most %d: '%.40s...'", length, NAME_MAX_BYTES - 1, name);
        if (ck->n == CHECKPOINT_TENSORS) return json_fail(j, "over %d tensors", CHECKPOINT_TENSORS);
        TRY(mem_grow(&ck->tensor, ck->n, 1, &capacity, sizeof *ck->tensor, "the table of tensors"));
        Tensor *x = &ck->tensor[ck->n++];
        memset(x, 0, sizeof *x);
        memcpy(x->name, name, length + 1);
        x->size = 1;
        TRY(read_entry(j, x, range));
        TRY(place_tensor(x, range, data, data_bytes));
    }
    json_peek(j);
    return j->p == j->end ? j->failed : json_unexpected(j, "nothing behind the closing brace");
}

static int by_place(const void *pa, const void *pb) {
    const Tensor *a = (const Tensor *)pa, *b = (const Tensor *)pb;
    if (a->data != b->data) return (const char *)a->data < (const char *)b->data ? -1 : 1;
    return (a->size != 0) - (b->size != 0); /* an empty tensor ends where it begins */
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const Tensor *)a)->name, ((const Tensor *)b)->name);
}

/* Every byte of the data belongs to one tensor. */
static Err check_layout(Checkpoint *ck, const unsigned char *data, size_t data_bytes) {
    const unsigned char *end = data;
    if (ck->n) qsort(ck->tensor, ck->n, sizeof *ck->tensor, by_place);
    for (size_t i = 0; i < ck->n; i++) {
        const Tensor *x = &ck->tensor[i];
        const unsigned char *begin = (const unsigned char *)x->data;
        if (begin != end)
            return err_damaged("tensor '%s' begins at byte %zu of the data, the one before it ends at %zu: %s", x->name,
                               (size_t)(begin - data), (size_t)(end - data), begin < end ? "an overlap" : "a gap");
        end = begin + tensor_bytes(x);
    }
    if (end != data + data_bytes)
        return err_damaged("%zu bytes of data, the tensors cover %zu", data_bytes, (size_t)(end - data));
    return OK;
}

/* name = own without the parts that a wrapper of the network added. The official moving average has names without dots
 * behind its prefix. */
static void unwrap_name(char name[NAME_MAX_BYTES], const char *own) {
    static const char ema[] = "transformer_ema.";
    static const char *const wrappers[] = {"_orig_mod", "module"}; /* no parameter's name begins like these */
    size_t n = 0;
    for (size_t whole; *own; own += whole) {
        const size_t length = strcspn(own, ".");
        const int wraps =
            (length == 6 && !strncmp(own, "module.", 7)) || (length == 9 && !strncmp(own, "_orig_mod.", 10));
        whole = length + (own[length] == '.');
        if (!wraps) memcpy(name + n, own, whole), n += whole;
        if (n != sizeof ema - 1 || memcmp(name, ema, n) != 0) continue;
        for (size_t k = 0; k < 2; k++) {
            const size_t skip = strlen(wrappers[k]);
            if (!strncmp(own + whole, wrappers[k], skip)) whole += skip, k = (size_t)-1; /* from the first again */
        }
    }
    name[n] = 0;
}

static void unwrap_names(Checkpoint *ck) {
    for (size_t i = 0; i < ck->n; i++) {
        char name[NAME_MAX_BYTES], *const own = ck->tensor[i].name;
        unwrap_name(name, own);
        if (!*name || strcmp(name, own) == 0) continue;
        if (!*ck->wrapped) memcpy(ck->wrapped, own, sizeof ck->wrapped);
        memcpy(own, name, strlen(name) + 1);
    }
}

/* Sorts the table by name, for checkpoint_find. A name that comes twice is an error. */
static Err sort_by_name(Checkpoint *ck) {
    unwrap_names(ck);
    if (ck->n) qsort(ck->tensor, ck->n, sizeof *ck->tensor, by_name);
    for (size_t i = 1; i < ck->n; i++) {
        if (by_name(&ck->tensor[i - 1], &ck->tensor[i]) == 0)
            return err_damaged("two tensors '%s'", ck->tensor[i].name);
    }
    return OK;
}

static uint64_t read_u64(const void *p) {
    uint64_t u;
    memcpy(&u, p, sizeof u);
    return u;
}

static Err read_safetensors(Checkpoint *ck) {
    const char *file = (const char *)ck->map;
    uint64_t length = read_u64(file);
    if (length > HEADER_MAX_BYTES)
        return err_damaged("header of %llu bytes, expected at most %d", (unsigned long long)length, HEADER_MAX_BYTES);
    if (length > ck->map_bytes - 8)
        return err_damaged("header of %llu bytes in a file of %zu: it is truncated", (unsigned long long)length,
                           ck->map_bytes);

    char *text;
    TRY(mem_alloc(&text, (size_t)length + 1, 1, "the header"));
    memcpy(text, file + 8, (size_t)length);
    Json j = {text, text, text + length, 0};
    const unsigned char *data = (const unsigned char *)file + 8 + length;
    const size_t data_bytes = ck->map_bytes - 8 - (size_t)length;
    Err e = read_header(&j, ck, data, data_bytes);
    free(text);
    if (e == OK) e = check_layout(ck, data, data_bytes);
    return e == OK ? sort_by_name(ck) : e;
}

/* Kinds of files that are no checkpoints, told by their first bytes, for messages. */
static const struct {
    const char *magic, *what;
} foreign[] = {
    {"version https://git-lfs", "a git-lfs pointer, not the file it stands for (fetch that with 'git lfs pull')"},
    {"\x1f\x8b", "gzip data"},
    {"\x89PNG", "a PNG image"},
    {"\xff\xd8\xff", "a JPEG image"},
    {"\x93NUMPY", "a NumPy array"},
    {"<", "an HTML or XML page, saved by a download that went wrong (remove it and fetch the file again)"},
    {"{", "JSON text"},
};

static Err foreign_content(const Checkpoint *ck) {
    const char *file = (const char *)ck->map;
    size_t n = ck->map_bytes, skip = 0;
    if (n >= 3 && memcmp(file, "\xef\xbb\xbf", 3) == 0) skip = 3;
    while (skip < n && (file[skip] == ' ' || file[skip] == '\n' || file[skip] == '\r' || file[skip] == '\t')) skip++;
    for (size_t i = 0; i < sizeof foreign / sizeof *foreign; i++) {
        size_t length = strlen(foreign[i].magic);
        if (n - skip >= length && memcmp(file + skip, foreign[i].magic, length) == 0)
            return err_damaged("looks like %s; expected a safetensors or .ckpt file", foreign[i].what);
    }
    if (n < 10) return err_damaged("has only %zu bytes: it is truncated, or neither a safetensors nor a .ckpt file", n);
    return err_damaged(
        "is neither a .ckpt nor a safetensors file: expected a header length below %d and then '{', found %llu "
        "and byte 0x%02x",
        HEADER_MAX_BYTES, (unsigned long long)read_u64(file), (unsigned)(unsigned char)file[8]);
}

static Err map_file(Checkpoint *ck) {
    int fd;
    size_t bytes;
    TRY(file_open(&fd, &bytes, ck->path));
    void *map = bytes ? mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, fd, 0) : NULL;
    Err e = OK;
    if (bytes == 0)
        e = err_damaged("%s: is empty, expected a safetensors or .ckpt file", ck->path);
    else if (map == MAP_FAILED)
        e = err("%s: cannot map %zu bytes: %s", ck->path, bytes, strerror(errno));
    close(fd);
    if (e != OK) return e;
    ck->map = map;
    ck->map_bytes = bytes;
    return OK;
}

/* The container is told by content, never by the file's name. */
static Err read_content(Checkpoint *ck) {
    const char *file = (const char *)ck->map;
    int brace = ck->map_bytes >= 10 && file[8] == '{'; /* the shortest header is {} */
    int zip = ck->map_bytes >= 4 && (memcmp(file, "PK\3\4", 4) == 0 || memcmp(file, "PK\5\6", 4) == 0);
    int pickle = ck->map_bytes >= 2 && (unsigned char)file[0] == 0x80 && file[1] >= 2 && file[1] <= 5;
    if (brace && read_u64(file) >> 32 == 0) return read_safetensors(ck);
    if (!zip && !pickle) return foreign_content(ck);
    /* An archive has a header in front of every tensor. Reading ahead behind each of them would fetch the whole
     * file. */
    madvise(ck->map, ck->map_bytes, MADV_RANDOM);
    Err e = ckpt_read(ck);
    madvise(ck->map, ck->map_bytes, MADV_NORMAL);
    return e == OK ? sort_by_name(ck) : e;
}

Err checkpoint_open(Checkpoint *ck, const char *path) {
    memset(ck, 0, sizeof *ck);
    TRY(path_make(ck->path, "%s", path));
    TRY(map_file(ck));
    Err e = read_content(ck);
    for (size_t i = 0; i < ck->meta.n && e == OK; i++)
        e = config_place(&ck->meta, ck->meta.kv[i].key, path, ck->meta.kv[i].key);
    if (e == OK) return OK;
    checkpoint_close(ck);
    return err_in(path);
}

const char *checkpoint_note(char out[ERR_MAX], const Checkpoint *ck) {
    if (!*ck->wrapped) return NULL;
    snprintf(
        out, ERR_MAX,
        "%s: \"module.\" and \"_orig_mod.\", as wrappers of a network add them, are left out of names such as '%s'",
        ck->path, ck->wrapped);
    return make_printable(out);
}

void checkpoint_close(Checkpoint *ck) {
    if (ck->map) munmap(ck->map, ck->map_bytes);
    ckpt_free_copies(ck->copies);
    free(ck->tensor);
    free(ck->entries);
    config_free(&ck->meta);
    memset(ck, 0, sizeof *ck);
}

/* ------------------------------------------------------------------------------------------------------------
 * Asking for tensors
 * ---------------------------------------------------------------------------------------------------------- */

const Tensor *checkpoint_find(const Checkpoint *ck, const char *name) {
    size_t lo = 0, hi = ck->n;
    while (lo < hi) {
        size_t middle = lo + (hi - lo) / 2;
        int order = strcmp(name, ck->tensor[middle].name);
        if (order == 0) return &ck->tensor[middle];
        if (order < 0)
            hi = middle;
        else
            lo = middle + 1;
    }
    return NULL;
}

/* Whether one name ends in the other, at a dot: a prefix too many or too few is the usual mistake. */
static int same_ending(const char *a, const char *b) {
    size_t la = strlen(a), lb = strlen(b);
    if (la < lb) return same_ending(b, a);
    return la > lb && a[la - lb - 1] == '.' && strcmp(a + la - lb, b) == 0;
}

static Err missing_tensor(const Checkpoint *ck, const char *name) {
    for (size_t i = 0; i < ck->n; i++) {
        if (same_ending(name, ck->tensor[i].name))
            return err("%s: no tensor '%s' (there is '%s')", ck->path, name, ck->tensor[i].name);
    }
    return err("%s: no tensor '%s' among its %zu", ck->path, name, ck->n);
}

/* "(3,4)"; a scalar is "()" */
static const char *shape_text(char *out, size_t bytes, int ndim, const size_t *dim) {
    size_t n = (size_t)snprintf(out, bytes, "(");
    for (int i = 0; i < ndim && n < bytes; i++)
        n += (size_t)snprintf(out + n, bytes - n, "%s%zu", i ? "," : "", dim[i]);
    if (n < bytes) snprintf(out + n, bytes - n, ")");
    return out;
}

static Err wrong_shape(const Checkpoint *ck, const Tensor *x, int ndim, const size_t *dim, size_t size) {
    char found[200], expected[200];
    shape_text(found, sizeof found, x->ndim, x->dim);
    if (ndim < 0)
        snprintf(expected, sizeof expected, "%zu elements", size);
    else
        shape_text(expected, sizeof expected, ndim, dim);
    return err("%s: tensor '%s' has shape %s, expected %s", ck->path, x->name, found, expected);
}

Err checkpoint_shaped(const Checkpoint *ck, const char *name, int ndim, const size_t *dim, size_t size,
                      const Tensor **out) {
    const Tensor *x = *out = checkpoint_find(ck, name);
    if (!x) return missing_tensor(ck, name);
    int same = x->size == size && (ndim < 0 || x->ndim == ndim);
    for (int i = 0; same && i < ndim; i++) same = x->dim[i] == dim[i];
    if (x->dtype >= DT_NUMBERS)
        return err("%s: tensor '%s' is %s, expected numbers such as F32, F16 or BF16", ck->path, name,
                   dtype_name(x->dtype));
    return same ? OK : wrong_shape(ck, x, ndim, dim, size);
}

Err checkpoint_whole(const Checkpoint *ck, const char *name, int ndim, const size_t *dim, size_t size,
                     const Tensor **out) {
    TRY(checkpoint_shaped(ck, name, ndim, dim, size, out));
    const Tensor *x = *out;
    if (!x->entry || x->size == 0 || zip_check(x->entry) == OK) return OK;
    char where[NAME_MAX_BYTES + 16];
    snprintf(where, sizeof where, "tensor '%s'", x->name);
    err_in(where);
    return err_in(ck->path);
}

Err checkpoint_reals(const Checkpoint *ck, const char *name, int ndim, const size_t *dim, size_t size, real *out) {
    const Tensor *x;
    TRY(checkpoint_whole(ck, name, ndim, dim, size, &x));
    tensor_to_reals(x, out);
    return OK;
}

static int64_t integer_at(const Tensor *x, size_t i) {
    const unsigned char *p = (const unsigned char *)x->data + i * dtype_size(x->dtype);
    int64_t i64 = 0;
    int32_t i32 = 0;
    int16_t i16 = 0;
    switch (x->dtype) {
    case DT_I64: memcpy(&i64, p, sizeof i64); return i64;
    case DT_I32: memcpy(&i32, p, sizeof i32); return i32;
    case DT_I16: memcpy(&i16, p, sizeof i16); return i16;
    default: return *p;
    }
}

Err checkpoint_ints(const Checkpoint *ck, const char *name, size_t size, int32_t *out) {
    const Tensor *x = checkpoint_find(ck, name);
    if (x && x->dtype != DT_I64 && x->dtype != DT_I32 && x->dtype != DT_I16 && x->dtype != DT_U8)
        return err("%s: tensor '%s' is %s, expected I64, I32, I16 or U8", ck->path, name, dtype_name(x->dtype));
    TRY(checkpoint_whole(ck, name, -1, NULL, size, &x));
    for (size_t i = 0; i < size; i++) {
        int64_t v = integer_at(x, i);
        if (v < INT32_MIN || v > INT32_MAX)
            return err("%s: tensor '%s' element %zu is %lld, expected 32 bits", ck->path, name, i, (long long)v);
        out[i] = (int32_t)v;
    }
    return OK;
}

/* ------------------------------------------------------------------------------------------------------------
 * Writing safetensors
 * ---------------------------------------------------------------------------------------------------------- */

/* A growing text, made of short pieces; the first failure sticks. */
typedef struct {
    char *s;
    size_t n, capacity;
    Err failed;
} Text;

static void text_add(Text *t, const char *fmt, ...) PRINTF_LIKE(2, 3);
static void text_add(Text *t, const char *fmt, ...) {
    char piece[96];
    va_list a;
    va_start(a, fmt);
    size_t n = (size_t)vsnprintf(piece, sizeof piece, fmt, a);
    va_end(a);
    if (t->failed == OK) t->failed = mem_grow(&t->s, t->n, n, &t->capacity, 1, "a safetensors header");
    if (t->failed != OK) return;
    memcpy(t->s + t->n, piece, n);
    t->n += n;
}

/* "s", as JSON */
static void text_string(Text *t, const char *s) {
    text_add(t, "\"");
    for (size_t n; *s && t->failed == OK; s += n) {
        n = utf8_length(s);
        int plain = (unsigned char)*s >= ' ' && *s != '"' && *s != '\\';
        if (n == 0)
            t->failed = err("'%s' is not UTF-8, as names and metadata must be", s);
        else if (plain)
            text_add(t, "%.*s", (int)n, s);
        else
            text_add(t, "\\u%04x", (unsigned)*s);
    }
    text_add(t, "\"");
}

static void write_metadata(Text *t, const Config *meta) {
    text_add(t, "\"__metadata__\":{");
    for (size_t i = 0; i < meta->n; i++) {
        text_add(t, i ? "," : "");
        text_string(t, meta->kv[i].key);
        text_add(t, ":");
        text_string(t, meta->kv[i].value);
    }
    text_add(t, "}");
}

static void write_entry(Text *t, const Tensor *x, size_t begin, size_t bytes) {
    text_string(t, x->name);
    text_add(t, ":{\"dtype\":\"%s\",\"shape\":[", dtype_name(x->dtype));
    for (int i = 0; i < x->ndim; i++) text_add(t, "%s%zu", i ? "," : "", x->dim[i]);
    text_add(t, "],\"data_offsets\":[%zu,%zu]}", begin, begin + bytes);
}

static int by_name_pointer(const void *a, const void *b) {
    return strcmp((*(const Tensor *const *)a)->name, (*(const Tensor *const *)b)->name);
}

/* order = the tensors from wide to narrow elements, otherwise as given: each lies aligned in the file, and the same
 * list gives the same bytes. Uses the array for sorting by name first. */
static Err order_tensors(const Tensor **order, const Tensor *tensor, size_t n) {
    for (size_t i = 0; i < n; i++) order[i] = &tensor[i];
    if (n) qsort(order, n, sizeof *order, by_name_pointer);
    for (size_t i = 1; i < n; i++) {
        if (strcmp(order[i - 1]->name, order[i]->name) == 0) return err("two tensors '%s'", order[i]->name);
    }
    size_t k = 0;
    for (size_t width = 8; width; width /= 2) {
        for (size_t i = 0; i < n; i++) {
            if (max_size(dtype_size(tensor[i].dtype), 1) == width) order[k++] = &tensor[i];
        }
    }
    return OK;
}

/* Refuses a list that would make a file that nobody can open: a slip of our own code. */
static Err check_tensor(const Tensor *x, int from_real) {
    size_t size = 1;
    if (x->ndim < 0 || x->ndim > TENSOR_DIMS) return err("tensor '%s' has %d dimensions", x->name, x->ndim);
    for (int i = 0; i < x->ndim; i++) TRY(size_mul(&size, size, x->dim[i]));
    if (size != x->size) return err("tensor '%s' has %zu elements, its shape %zu", x->name, x->size, size);
    if ((unsigned)x->dtype >= DT_SAFETENSORS)
        return err("tensor '%s' is %s, which a safetensors file cannot have", x->name, dtype_name(x->dtype));
    TRY(size_mul(&size, size, 8));
    if (from_real && x->dtype > DT_BF16) return err("tensor '%s': reals as %s", x->name, dtype_name(x->dtype));
    if (strcmp(x->name, "__metadata__") == 0) return err("a tensor cannot be called __metadata__");
    if (size && !x->data) return err("tensor '%s' has no data", x->name);
    return OK;
}

/* Length and header, filled up with spaces so that the data begin at a multiple of 8 */
static Err make_header(Text *t, const Tensor *const *order, size_t n, const Config *meta) {
    size_t begin = 0;
    text_add(t, "%8s{", ""); /* the length, when it is known */
    if (meta && meta->n) write_metadata(t, meta);
    for (size_t i = 0; i < n; i++) {
        size_t bytes = tensor_bytes(order[i]);
        if (begin > SIZE_MAX - bytes) return err("the tensors are too large for a file");
        text_add(t, t->n > 9 ? "," : "");
        write_entry(t, order[i], begin, bytes);
        begin += bytes;
    }
    text_add(t, "}");
    while (t->failed == OK && t->n % 8) text_add(t, " ");
    if (t->failed) return FAILED;
    uint64_t length = t->n - 8;
    if (length > HEADER_MAX_BYTES) return err("header of %zu bytes, at most %d", t->n - 8, HEADER_MAX_BYTES);
    memcpy(t->s, &length, sizeof length);
    return OK;
}

static Err write_tensor(AtomicFile *f, const Tensor *x, int from_real) {
    enum { BLOCK = 4096 };
    unsigned char block[BLOCK * 8];
    size_t width = dtype_size(x->dtype);
    int as_is = x->dtype == (sizeof(real) == 8 ? DT_F64 : DT_F32);
    if (!from_real || as_is) return atomic_write(f, x->data, tensor_bytes(x));
    for (size_t i = 0; i < x->size; i += BLOCK) {
        size_t n = x->size - i < BLOCK ? x->size - i : BLOCK;
        tensor_from_reals(block, x->dtype, (const real *)x->data + i, n);
        TRY(atomic_write(f, block, n * width));
    }
    return OK;
}

static Err write_file(const char *path, const Text *header, const Tensor *const *order, const Tensor *tensor,
                      const int *from_real, size_t n) {
    AtomicFile f;
    TRY(atomic_open(&f, path));
    Err e = atomic_write(&f, header->s, header->n);
    for (size_t i = 0; i < n && e == OK; i++)
        e = write_tensor(&f, order[i], from_real ? from_real[order[i] - tensor] : 0);
    return atomic_close(&f, e);
}

Err checkpoint_write(const char *path, const Tensor *tensor, const int *from_real, size_t n, const Config *meta) {
    const Tensor **order;
    Text header = {0};
    Err e = OK;
    for (size_t i = 0; i < n && e == OK; i++) e = check_tensor(&tensor[i], from_real && from_real[i]);
    if (e != OK) return err_in(path);
    TRY(mem_alloc(&order, n, sizeof *order, "the order of tensors"));
    e = order_tensors(order, tensor, n);
    if (e == OK) e = make_header(&header, order, n, meta);
    if (e != OK)
        err_in(path);
    else
        e = write_file(path, &header, order, tensor, from_real, n);
    free(order);
    free(header.s);
    return e;
}

/* ------------------------------------------------------------------------------------------------------------
 * Lists of tensors to write
 * ---------------------------------------------------------------------------------------------------------- */

static Err list_room(TensorList *list) {
    size_t capacity = list->capacity; /* both arrays grow by the same rule */
    TRY(mem_grow(&list->tensor, list->n, 1, &capacity, sizeof *list->tensor, "a list of tensors"));
    return mem_grow(&list->from_real, list->n, 1, &list->capacity, sizeof *list->from_real, "a list of tensors");
}

Err tensor_list_add(TensorList *list, const char *name, Dtype dtype, int ndim, const size_t *dim, const void *data,
                    int from_real) {
    Tensor x = {.dtype = dtype, .ndim = ndim, .size = 1, .data = data};
    int length = snprintf(x.name, sizeof x.name, "%s", name);
    if (length < 0 || (size_t)length >= sizeof x.name) return err("tensor name '%s' is too long", name);
    if (ndim < 0 || ndim > TENSOR_DIMS) return err("tensor '%s' has %d dimensions", name, ndim);
    for (int i = 0; i < ndim; i++) {
        x.dim[i] = dim[i];
        if (size_mul(&x.size, x.size, dim[i]) != OK) return err_in(name);
    }
    TRY(list_room(list));
    list->tensor[list->n] = x;
    list->from_real[list->n++] = from_real;
    return OK;
}

void tensor_list_free(TensorList *list) {
    free(list->tensor);
    free(list->from_real);
    free(list->kept);
    *list = (TensorList){0};
}
