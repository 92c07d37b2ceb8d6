/* weights.c - parameter tables from files and into them: loaded, mapped where they lie, packed in fewer bits. */
#include "base/compute.h"
#include "files/files.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* out = prefix + name, without the name's dots if strip_dots: so the official EMA calls its buffers (SPEC section 6). */
static Err join_name(char out[NAME_MAX_BYTES], const char *prefix, const char *name, int strip_dots) {
    size_t n = strlen(prefix), length = strlen(name);
    if (n + length >= NAME_MAX_BYTES) return err("tensor name '%s%s' is too long", prefix, name);
    memcpy(out, prefix, n);
    for (; *name; name++) {
        if (!strip_dots || *name != '.') out[n++] = *name;
    }
    out[n] = 0;
    return OK;
}

/* Weights that are no numbers draw black pictures, and train nothing. */
static Err check_finite(const Checkpoint *ck, const char *name, const real *x, size_t n, size_t first) {
    size_t bad = 0;
    for (size_t i = 0; i < n; i++) bad += !isfinite(x[i]);
    for (size_t i = 0; i < n && bad; i++)
        if (!isfinite(x[i]))
            return err(
                "%s: tensor '%s' element %zu is %g, expected a number: the file is of a training that failed, or "
                "damaged",
                ck->path, name, first + i, (double)x[i]);
    return OK;
}

/* A moment: as it is where the file has bf16, else rounded to the nearest. */
static Err load_bf16(uint16_t *out, const Checkpoint *ck, const char *name, const Param *row) {
    const Tensor *x;
    real *numbers;
    TRY(checkpoint_whole(ck, name, row->ndim, row->dim, row->size, &x));
    TRY(mem_alloc(&numbers, row->size, sizeof *numbers, "a moment"));
    tensor_to_reals(x, numbers);
    const Err e = check_finite(ck, name, numbers, row->size, 0);
    if (e == OK && x->dtype == DT_BF16)
        memcpy(out, x->data, row->size * sizeof *out);
    else
        for (size_t i = 0; e == OK && i < row->size; i++) out[i] = bf16_from_float((float)numbers[i]);
    free(numbers);
    return e;
}

static Err load_rows(Params *p, const Checkpoint *ck, char which, const char *prefix, int strip_dots) {
    const int arena = params_arena(p, which);
    if (arena < 0) return err_in(ck->path);
    for (size_t i = 0; i < p->n; i++) {
        char name[NAME_MAX_BYTES];
        Param *row = &p->row[i];
        TRY(join_name(name, prefix, row->name, strip_dots));
        if (params_in_bf16(p, arena)) {
            TRY(load_bf16(*params_slot16(row, arena), ck, name, row));
            continue;
        }
        TRY(checkpoint_reals(ck, name, row->ndim, row->dim, row->size, *params_slot(row, arena)));
        TRY(check_finite(ck, name, *params_slot(row, arena), row->size, 0));
    }
    return OK;
}

Err params_load(Params *p, const Checkpoint *ck, char which, const char *prefix) {
    return load_rows(p, ck, which, prefix, 0);
}

Err params_load_ema(Params *p, const Checkpoint *ck, char which, const char *ema_prefix) {
    return load_rows(p, ck, which, ema_prefix, 1);
}

/* Can the numbers be used where they lie in the file? */
static int usable_in_place(const Tensor *x) {
    const Dtype own = sizeof(real) == sizeof(double) ? DT_F64 : DT_F32;
    return x->dtype == own && (uintptr_t)x->data % sizeof(real) == 0;
}

/* Bytes of a packed matrix without the factors of its rows. */
static size_t packed_bytes(const Param *row, WeightFormat format) {
    return round_up(layers_here()->weights_bytes(format, row->dim[0], row->dim[1]), LINE_BYTES);
}

/* Bytes of a row's value, the factors of a packed matrix's rows included. */
static size_t value_bytes(const Param *row, WeightFormat format) {
    if (!row->matrix || format == WEIGHTS_REAL || !layers_here()) return row->size * sizeof(real);
    return packed_bytes(row, format) + round_up(row->dim[0] * sizeof(float), LINE_BYTES);
}

size_t params_bytes(const Params *p, WeightFormat format) {
    size_t bytes = 0;
    for (size_t i = 0; i < p->n; i++) bytes += value_bytes(&p->row[i], format);
    return bytes;
}

/* Room for every packed matrix and the factors of its rows. */
static Err plan_packed(Params *p, WeightFormat format) {
    size_t bytes = 0;
    if (p->packed) return err("matrices are packed already");
    if (!layers_here())
        return err("weights in fewer bits need kernels/, which this program was built without (PLAIN=1)");
    for (size_t i = 0; i < p->n; i++)
        if (p->row[i].matrix) bytes += value_bytes(&p->row[i], format);
    TRY(mem_alloc(&p->packed, bytes, 1, "packed matrices"));
    char *next = (char *)p->packed;
    for (size_t i = 0; i < p->n; i++) {
        Param *row = &p->row[i];
        if (!row->matrix) continue;
        row->packed = (Weights){format, next, (const float *)(const void *)(next + packed_bytes(row, format))};
        next += value_bytes(row, format);
    }
    return OK;
}

/* Gives back the pages of a tensor that nobody needs any more; reading it again fetches them from the file. */
static void unmap_pages(const Checkpoint *ck, const Tensor *x) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), map = (size_t)ck->map;
    const size_t begin = round_up((size_t)x->data, page), bytes = tensor_bytes(x);
    const size_t end = ((size_t)x->data + bytes) / page * page;
    if (begin >= map && end <= map + ck->map_bytes && begin < end) madvise((void *)begin, end - begin, MADV_DONTNEED);
}

/* Packs x (out,in) into its place in the table, a row of x at a time. ck: the file that it is from, or NULL */
static Err pack_matrix(const Param *row, const Tensor *x, const Checkpoint *ck) {
    const size_t in = row->dim[1];
    real *line;
    Err e = OK;
    TRY(mem_alloc(&line, in, sizeof *line, "a row of a matrix"));
    Tensor part = *x;
    part.size = in;
    for (size_t r = 0; r < row->dim[0] && e == OK; r++) {
        part.data = (const char *)x->data + r * in * dtype_size(x->dtype);
        tensor_to_reals(&part, line);
        if (ck) e = check_finite(ck, x->name, line, in, r * in);
        layers_here()->weights_pack(row->packed.format, (void *)row->packed.data, (float *)row->packed.scale, line, r,
                                    in);
    }
    free(line);
    return e;
}

Err params_pack(Params *p, WeightFormat format) {
    TRY(plan_packed(p, format));
    p->format = format;
    for (size_t i = 0; i < p->n; i++) {
        Tensor x = {.dtype = sizeof(real) == sizeof(double) ? DT_F64 : DT_F32, .data = p->row[i].value};
        x.size = p->row[i].size;
        if (p->row[i].matrix) TRY(pack_matrix(&p->row[i], &x, NULL));
    }
    return OK;
}

/* Points rows at the file, and the others into the arena, in order; arena NULL: only counts what those need. */
static Err map_rows(Params *p, const Checkpoint *ck, const char *prefix, int strip_dots, real *arena, size_t *need) {
    const WeightFormat format = p->format;
    *need = 0;
    for (size_t i = 0; i < p->n; i++) {
        char name[NAME_MAX_BYTES];
        Param *row = &p->row[i];
        const Tensor *x;
        TRY(join_name(name, prefix, row->name, strip_dots));
        TRY((arena ? checkpoint_whole : checkpoint_shaped)(ck, name, row->ndim, row->dim, row->size, &x));
        if (row->matrix && format != WEIGHTS_REAL) {
            if (arena) {
                TRY(pack_matrix(row, x, ck));
                unmap_pages(ck, x);
            }
            continue;
        }
        if (usable_in_place(x)) {
            memcpy(&row->value, &x->data, sizeof row->value);
            if (arena) TRY(check_finite(ck, name, row->value, row->size, 0));
            continue;
        }
        row->value = arena ? arena + *need : NULL;
        if (arena) {
            tensor_to_reals(x, row->value);
            TRY(check_finite(ck, name, row->value, row->size, 0));
        }
        *need += round_up(row->size, ROW_REALS);
    }
    return OK;
}

Err params_map(Params *p, const Checkpoint *ck, const char *prefix, int strip_dots) {
    size_t need;
    for (int k = 0; k < ARENAS; k++) {
        if (p->arena[k]) return err("%s: a parameter table that has memory cannot be mapped", ck->path);
    }
    TRY(map_rows(p, ck, prefix, strip_dots, NULL, &need));
    if (p->format != WEIGHTS_REAL) TRY(plan_packed(p, p->format));
    TRY(mem_alloc(&p->arena[0], need, sizeof(real), "parameters"));
    return map_rows(p, ck, prefix, strip_dots, p->arena[0], &need);
}

Err params_fit(const Params *p, const Checkpoint *ck, const char *prefix, int strip_dots) {
    for (size_t i = 0; i < p->n; i++) {
        char name[NAME_MAX_BYTES];
        const Param *row = &p->row[i];
        const Tensor *x;
        TRY(join_name(name, prefix, row->name, strip_dots));
        TRY(checkpoint_shaped(ck, name, row->ndim, row->dim, row->size, &x));
    }
    return OK;
}

int params_has(const Params *p, const char *name) {
    for (size_t i = 0; i < p->n; i++)
        if (strcmp(p->row[i].name, name) == 0) return 1;
    return 0;
}

Err tensor_list_params(TensorList *list, const Params *p, char which, const char *prefix, Dtype dtype) {
    const int arena = params_arena(p, which);
    if (arena < 0) return FAILED;
    for (size_t i = 0; i < p->n; i++) {
        Param *row = &p->row[i];
        char name[NAME_MAX_BYTES];
        TRY(join_name(name, prefix, row->name, 0));
        if (row->packed.data && !row->value)
            return err("'%s' is packed: its numbers are in the file it came from", name);
        if (params_in_bf16(p, arena))
            TRY(tensor_list_add(list, name, DT_BF16, row->ndim, row->dim, *params_slot16(row, arena), 0));
        else
            TRY(tensor_list_add(list, name, dtype, row->ndim, row->dim, *params_slot(row, arena), 1));
    }
    return OK;
}
