/* ckpt.c - the tensors of a PyTorch .ckpt file, found without PyTorch, Python or running anything.
 *
 * torch.save writes either a zip archive (any top folder X: X/data.pkl and raw storages X/data/KEY) or, before version
 * 1.6, five pickles in a row followed by the raw storages:
 *
 *     magic number | protocol 1001 | facts about the machine | the object | list of storage keys | n, n elements | ...
 *
 * What comes out is the table of a Checkpoint: names, dtypes and shapes, pointing into the mapped file. Only a tensor
 * whose elements do not lie in row-major order is copied, and one whose storage is compressed. A Lightning file's tensors
 * are its "state_dict"; a plain file's are its one dictionary. What stands among them and is no tensor that we know stays
 * in the table under its name, so that whoever asks for it is told.
 *
 * Refuses: whatever reaches outside the file, big-endian data, more tensors than any network has.
 *
 * Read in this order: storages; from values to tensors; the zip archive's; the old format. The pickle machine is
 * pickle.c's, the archive zip.c's. */
#include "files/pickle.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------------------------------------------------------
 * Storages: the raw numbers, found by key in either format
 * ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    const unsigned char *key;
    size_t length;
    const unsigned char *data; /* NULL: not found yet, or in an entry */
    size_t bytes;
    ZipEntry *entry; /* of an archive */
    Dtype dtype;     /* old format */
} Blob;

typedef struct {
    Blob *blob; /* sorted by key */
    size_t n, capacity;
    size_t room; /* bytes that copies may take */
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

/* Copies, of what is not in row-major order and of what was deflated, hang on the checkpoint as a list; they may take as
 * much as the file itself and a little, and twice what is deflated in it. */
typedef struct Copy {
    struct Copy *next;
    size_t bytes;
    max_align_t data[];
} Copy;

enum { COPY_SLACK = 1 << 20 };

static Err copy_room(Checkpoint *ck, const Blobs *blobs, size_t bytes, unsigned char **out) {
    Copy *last = (Copy *)ck->copies, *copy = NULL;
    size_t total = last ? last->bytes : 0;
    if (bytes > blobs->room || total > blobs->room - bytes)
        return err_damaged("repeats its elements until they exceed the file");
    TRY(mem_alloc(&copy, sizeof *copy + bytes, 1, "a tensor's numbers"));
    copy->next = last;
    copy->bytes = total + bytes;
    ck->copies = copy;
    *out = (unsigned char *)copy->data;
    return OK;
}

/* An entry's bytes, once a tensor lies in them. Those of a deflated one are a copy, whose checksum is compared at once. */
static Err take_entry(Checkpoint *ck, const Blobs *blobs, Blob *b) {
    unsigned char *out = NULL;
    if (b->data) return OK;
    if (b->entry->deflated) {
        TRY(copy_room(ck, blobs, b->bytes, &out));
        TRY(zip_inflate(b->entry, out));
    }
    b->data = out ? out : b->entry->data;
    if (out) b->entry = NULL;
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
        if (last > SIZE_MAX - 1 - step_bytes) return err_damaged("a size is too large");
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
    const Value *sizes = pickle_item(k, v, 2), *strides = pickle_item(k, v, 3);
    if (sizes->kind != V_TUPLE || strides->kind != V_TUPLE || sizes->n != strides->n)
        return err_damaged("has no shape");
    if (sizes->n > TENSOR_DIMS) return err_damaged("has %u dimensions, expected at most %d", sizes->n, TENSOR_DIMS);
    x->size = 1;
    for (size_t i = 0; i < sizes->n; i++) {
        if (!value_is_count(pickle_item(k, sizes, i)) || !value_is_count(pickle_item(k, strides, i)))
            return err_damaged("has no shape");
        x->dim[x->ndim++] = (size_t)pickle_item(k, sizes, i)->number;
        stride[i] = (size_t)pickle_item(k, strides, i)->number;
        TRY(size_mul(&x->size, x->size, x->dim[i]));
    }
    return OK;
}

/* The bytes of the storage that a tensor lies in, *have of them, from where a view of it begins; *entry: NULL, or in which
 * entry of the archive */
static Err storage_bytes(Checkpoint *ck, const Value *storage, const Blobs *blobs, const unsigned char **data,
                         size_t *have, ZipEntry **entry) {
    const size_t width = dtype_size((Dtype)storage->dtype);
    Blob *blob = find_blob(blobs, storage->text, storage->length);
    if (!blob || (!blob->data && !blob->entry))
        return err_damaged("lies in storage '%.*s', which is not in the file",
                           (int)(storage->length < 40 ? storage->length : 40), (const char *)storage->text);
    const size_t there = blob->bytes / width;
    if (storage->first > there || (size_t)storage->number > there - storage->first)
        return err_damaged("lies in a storage of %zu bytes, expected %llu elements of %s", blob->bytes,
                           (unsigned long long)storage->number, dtype_name((Dtype)storage->dtype));
    TRY(take_entry(ck, blobs, blob));
    *data = blob->data + storage->first * width;
    *have = (size_t)storage->number * width;
    *entry = blob->entry;
    return OK;
}

static Err place(Checkpoint *ck, const Pickle *k, const Value *v, const Blobs *blobs, Tensor *x) {
    const Value *storage = pickle_item(k, v, 0), *offset = pickle_item(k, v, 1);
    size_t stride[TENSOR_DIMS], elements, bytes = 0, width = dtype_size(x->dtype);
    const unsigned char *data = NULL;
    TRY(read_shape(k, v, x, stride));
    TRY(reach(x, stride, &elements));
    TRY(storage_bytes(ck, storage, blobs, &data, &bytes, &x->entry));
    const size_t have = bytes / width;
    if (!value_is_count(offset) || (size_t)offset->number > have || elements > have - (size_t)offset->number)
        return err_damaged("reaches element %zu beyond offset %lld of a storage of %zu", elements,
                           (long long)offset->number, have);
    data += (size_t)offset->number * width;
    x->data = data;
    if (row_major(x, stride)) return OK;
    unsigned char *copy = NULL;
    if (x->entry) TRY(zip_check(x->entry));
    TRY(size_mul(&elements, x->size, width));
    TRY(copy_room(ck, blobs, elements, &copy));
    reorder(copy, x, stride, data);
    x->data = copy;
    return OK;
}

typedef struct {
    size_t capacity, usable;
} Collected;

/* Whatever is no tensor that we know, or of no numbers that we know, has a name but no elements. */
static Err add_tensor(Checkpoint *ck, Collected *all, const Pickle *k, const Value *key, const Value *v,
                      const Blobs *blobs) {
    if (key->length >= NAME_MAX_BYTES || memchr(key->text, 0, key->length))
        return err_damaged("a tensor's name of %zu bytes, expected at most %d", key->length, NAME_MAX_BYTES - 1);
    if (ck->n == CHECKPOINT_TENSORS)
        return err_damaged("has over %d tensors: not a file of weights", CHECKPOINT_TENSORS);
    TRY(mem_grow(&ck->tensor, ck->n, 1, &all->capacity, sizeof *ck->tensor, "the table of tensors"));
    Tensor *x = &ck->tensor[ck->n];
    memset(x, 0, sizeof *x);
    memcpy(x->name, key->text, key->length);
    x->dtype = v->kind == V_TENSOR ? (Dtype)v->dtype : DT_OTHER;
    if (x->dtype == DT_OTHER) {
        x->ndim = 1, x->data = "";
    } else {
        char where[NAME_MAX_BYTES + 16];
        snprintf(where, sizeof where, "tensor '%s'", x->name);
        if (place(ck, k, v, blobs, x) != OK) return err_in(where);
        all->usable += x->dtype < DT_NUMBERS;
    }
    ck->n++;
    return OK;
}

static Err keep_count(Checkpoint *ck, const Pickle *k, const Value *top, const char *key) {
    const Value *v = pickle_get(k, top, key);
    return v && v->kind == V_INT ? config_set(&ck->meta, key, "%lld", (long long)v->number) : OK;
}

/* Numbers, texts and lists that stand among the tensors are the writer's own; an object in the place of a tensor is
 * not. */
static Err collect(Checkpoint *ck, const Pickle *k, Index result, const Blobs *blobs) {
    const Value *top = &k->value[result], *state = top;
    Collected all = {0};
    if (top->kind == V_DICT && pickle_get(k, top, "state_dict")) {
        state = pickle_get(k, top, "state_dict");
        TRY(keep_count(ck, k, top, "epoch"));
        TRY(keep_count(ck, k, top, "global_step"));
    }
    if (state->kind != V_DICT) return err_damaged("holds no dictionary of tensors: expected a 'state_dict'");
    for (size_t i = 0; i + 1 < state->n; i += 2) {
        const Value *key = pickle_item(k, state, i), *v = pickle_item(k, state, i + 1);
        if (key->kind != V_TEXT) continue;
        const int object = v->kind == V_INERT && (state != top || memchr(key->text, '.', key->length));
        if (v->kind == V_TENSOR || object) TRY(add_tensor(ck, &all, k, key, v, blobs));
    }
    return all.usable ? OK : err_damaged("holds no tensors: expected a 'state_dict' of them");
}

/* ------------------------------------------------------------------------------------------------------------
 * The zip archive
 * ---------------------------------------------------------------------------------------------------------- */

static Err check_byteorder(const ZipEntry *e) {
    unsigned char order[6];
    if (e->bytes != sizeof order) return err_damaged("was written on a big-endian machine");
    if (e->deflated)
        TRY(zip_inflate(e, order));
    else
        memcpy(order, e->data, sizeof order);
    return memcmp(order, "little", sizeof order) ? err_damaged("was written on a big-endian machine") : OK;
}

/* Entries X/data/KEY become storages. */
static Err zip_blobs(const Zip *z, const unsigned char *folder, size_t length, Blobs *out) {
    static const char data[] = "data/", order[] = "byteorder";
    for (size_t i = 0; i < z->count; i++) {
        ZipEntry *e = &z->entry[i];
        if (e->name_length < length || memcmp(e->name, folder, length) != 0) continue;
        const unsigned char *name = e->name + length;
        size_t n = e->name_length - length;
        if (n == sizeof order - 1 && memcmp(name, order, n) == 0) TRY(check_byteorder(e));
        if (n < sizeof data || memcmp(name, data, sizeof data - 1) != 0) continue;
        TRY(add_blob(
            out,
            (Blob){.key = name + sizeof data - 1, .length = n - (sizeof data - 1), .bytes = e->bytes, .entry = e}));
    }
    if (out->n) qsort(out->blob, out->n, sizeof *out->blob, by_key);
    for (size_t i = 1; i < out->n; i++) {
        if (by_key(&out->blob[i - 1], &out->blob[i]) == 0) return err_damaged("has two zip entries of one name");
    }
    return OK;
}

/* The program may be deflated, too; then `copy` is to be freed when its values are no longer needed. */
static Err read_zip(Checkpoint *ck, Zip *z, Pickle *k, Blobs *blobs, unsigned char **copy) {
    ZipEntry *pickle = NULL;
    size_t folder = 0;
    Index result = 0;
    TRY(zip_open(z, (const unsigned char *)ck->map, ck->map_bytes));
    TRY(zip_pickle(z, &pickle, &folder));
    blobs->room += 2 * z->inflated;
    if (pickle->deflated) {
        TRY(mem_alloc(copy, pickle->bytes, 1, "an inflated pickle"));
        TRY(zip_inflate(pickle, *copy));
    } else
        TRY(zip_check(pickle));
    k->start = k->p = pickle->deflated ? *copy : pickle->data;
    k->end = k->p + pickle->bytes;
    TRY(pickle_run(k, &result));
    TRY(zip_blobs(z, pickle->name, folder, blobs));
    return collect(ck, k, result, blobs);
}

/* ------------------------------------------------------------------------------------------------------------
 * The old format: pickles in a row, then the storages in the order of the last one's keys
 * ---------------------------------------------------------------------------------------------------------- */

static Err old_preamble(Pickle *k) {
    static const unsigned char magic[] = {0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19};
    Index at;
    TRY(pickle_run(k, &at));
    const Value *v = &k->value[at];
    if (v->kind != V_TEXT || v->length != sizeof magic || memcmp(v->text, magic, sizeof magic) != 0)
        return err_damaged("is a pickle, but not one of torch.save");
    TRY(pickle_run(k, &at));
    if (k->value[at].kind != V_INT || k->value[at].number != 1001)
        return err_damaged("is not of torch.save protocol 1001");
    TRY(pickle_run(k, &at));
    v = k->value[at].kind == V_DICT ? pickle_get(k, &k->value[at], "little_endian") : NULL;
    return v && v->kind == V_INT && v->number == 0 ? err_damaged("was written on a big-endian machine") : OK;
}

/* One blob for each key that the pickle mentions */
static Err old_keys(const Pickle *k, Blobs *out) {
    for (size_t i = 0; i < k->n; i++) {
        const Value *v = &k->value[i];
        if (v->kind == V_STORAGE)
            TRY(add_blob(out, (Blob){.key = v->text, .length = v->length, .dtype = (Dtype)v->dtype}));
    }
    if (out->n == 0) return err_damaged("holds no tensors");
    qsort(out->blob, out->n, sizeof *out->blob, by_key);
    size_t n = 1;
    for (size_t i = 1; i < out->n; i++) {
        if (by_key(&out->blob[n - 1], &out->blob[i]) != 0)
            out->blob[n++] = out->blob[i];
        else if (out->blob[n - 1].dtype != out->blob[i].dtype)
            return err_damaged("has a storage of two types");
    }
    out->n = n;
    return OK;
}

/* Storages follow each other, so each must be known to find the next: number of elements, then the elements. */
static Err old_storages(Pickle *k, Index keys, Blobs *blobs) {
    const Value *list = &k->value[keys];
    if (list->kind != V_TUPLE) return err_damaged("has no list of storages");
    for (size_t i = 0; i < list->n; i++) {
        const Value *key = pickle_item(k, list, i);
        Blob *blob = key->kind == V_TEXT ? find_blob(blobs, key->text, key->length) : NULL;
        uint64_t elements;
        if (!blob || blob->data) return err_damaged("has a storage that no tensor uses, or that comes twice");
        if (blob->dtype == DT_OTHER)
            return err_damaged(
                "has a storage of a type that this program does not know, so that it cannot be stepped over");
        TRY(pickle_number(k, 8, &elements));
        if (elements > (size_t)(k->end - k->p) / dtype_size(blob->dtype))
            return err_damaged(
                "has a storage of %llu elements that ends behind the file: it is truncated; fetch it again",
                (unsigned long long)elements);
        blob->bytes = (size_t)elements * dtype_size(blob->dtype);
        TRY(pickle_take(k, blob->bytes, &blob->data));
    }
    return OK;
}

static Err read_old(Checkpoint *ck, Pickle *k, Blobs *blobs) {
    Index object = 0, keys = 0;
    k->start = k->p = (const unsigned char *)ck->map;
    k->end = k->p + ck->map_bytes;
    TRY(old_preamble(k));
    TRY(pickle_run(k, &object));
    TRY(old_keys(k, blobs));
    TRY(pickle_run(k, &keys));
    TRY(old_storages(k, keys, blobs));
    return collect(ck, k, object, blobs);
}

Err ckpt_read(Checkpoint *ck) {
    Pickle k = {0};
    Blobs blobs = {.room = ck->map_bytes + COPY_SLACK};
    Zip z = {0};
    unsigned char *copy = NULL;
    const int zip = ck->map_bytes >= 4 && memcmp(ck->map, "PK", 2) == 0;
    Err e = zip ? read_zip(ck, &z, &k, &blobs, &copy) : read_old(ck, &k, &blobs);
    ck->entries = z.entry;
    free(blobs.blob);
    pickle_free(&k);
    free(copy);
    return e;
}
