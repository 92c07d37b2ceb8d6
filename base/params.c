/* params.c - parameter tables: one row per tensor of a model.
 *
 * A table is a list of rows (official name, shape, rule of initialisation, weight decay) over at most five arenas:
 * value, gradient, two Adam moments, EMA. Each arena is one allocation, and a row has its place in every one of them.
 * Whoever allocates, initialises, loads, saves, updates or checks a model loops over its rows, so adding a layer to a
 * network means adding rows, and nothing else in the project knows a name or an order.
 *
 * Read in this order: building a table; planning memory; initial values; sums over a table; loading; saving. */
#include "kernels/device.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
    ARENAS = 5,
    ROW_REALS = 64 / sizeof(real) /* rows begin at a cache line, which is also the widest vector */
};

/* One of a row's pointers; they stand in the order of Params.arena. */
static real **slot(Param *row, int arena) {
    real **slots[ARENAS] = {&row->value, &row->grad, &row->m, &row->v, &row->ema};
    return slots[arena];
}

/* Adam's moments may be in bf16 */
static int in_bf16(const Params *p, int arena) {
    return p->bf16_moments && (arena == 2 || arena == 3);
}

static uint16_t **slot16(Param *row, int arena) {
    return arena == 2 ? &row->m16 : &row->v16;
}

/* The arena of a letter: v value, g gradient, 1 and 2 Adam moments, e EMA. -1: an error, already set. */
static int find_arena(const Params *p, char which) {
    static const char letters[] = "vg12e";
    const char *letter = which ? strchr(letters, which) : NULL;
    if (letter && p->arena[letter - letters]) return (int)(letter - letters);
    if (letter)
        err("parameters of kind '%c' were never planned", which);
    else
        err("parameters of kind '%c', expected one of %s", which, letters);
    return -1;
}

static Err check_row(const Params *p, const Param *row) {
    for (int k = 0; k < ARENAS; k++) {
        if (p->arena[k]) return err("parameter '%s' comes after the table was planned", row->name);
    }
    for (size_t i = 0; i < p->n; i++) {
        if (strcmp(p->row[i].name, row->name) == 0) return err("two parameters '%s'", row->name);
    }
    if (row->size > SIZE_MAX / 2 - ROW_REALS || p->total > SIZE_MAX / 2 - round_up(row->size, ROW_REALS))
        return err("parameter '%s' is too large", row->name);
    return OK;
}

Err params_add(Params *p, size_t *index, Init init, double scale, double decay, int ndim, const size_t *dim,
               const char *fmt, ...) {
    Param row = {.ndim = ndim, .size = 1, .init = init, .scale = scale, .decay = decay};
    va_list a;
    va_start(a, fmt);
    int length = vsnprintf(row.name, sizeof row.name, fmt, a);
    va_end(a);
    if (length < 0 || length >= NAME_MAX_BYTES) return err("parameter name '%s...' is too long", row.name);
    if (ndim < 0 || ndim > 4) return err("parameter '%s' has %d dimensions, expected 0..4", row.name, ndim);
    for (int i = 0; i < ndim; i++) {
        row.dim[i] = dim[i];
        if (size_mul(&row.size, row.size, dim[i]) != OK) return err_in(row.name);
    }
    TRY(check_row(p, &row));
    TRY(mem_grow(&p->row, p->n, 1, &p->capacity, sizeof *p->row, "a parameter table"));
    if (index) *index = p->n;
    p->total += round_up(row.size, ROW_REALS);
    p->row[p->n++] = row;
    return OK;
}

static Err plan_arena(Params *p, int arena, const char *what) {
    if (p->arena[arena]) return OK;
    const int bf16 = in_bf16(p, arena);
    TRY(mem_alloc(&p->arena[arena], p->total, bf16 ? sizeof(uint16_t) : sizeof(real), what));
    size_t next = 0;
    for (size_t i = 0; i < p->n; i++) {
        if (bf16)
            *slot16(&p->row[i], arena) = (uint16_t *)(void *)p->arena[arena] + next;
        else
            *slot(&p->row[i], arena) = p->arena[arena] + next;
        next += round_up(p->row[i].size, ROW_REALS);
    }
    return OK;
}

Err params_plan(Params *p, int what) {
    if (what & PLAN_VALUE) TRY(plan_arena(p, 0, "parameters"));
    if (what & PLAN_GRAD) TRY(plan_arena(p, 1, "gradients"));
    if (what & PLAN_ADAM) TRY(plan_arena(p, 2, "first moments"));
    if (what & PLAN_ADAM) TRY(plan_arena(p, 3, "second moments"));
    if (what & PLAN_EMA) TRY(plan_arena(p, 4, "the moving average"));
    return OK;
}

/* Element i of a row draws number i of the row's stream, so neither threads nor other rows matter. */
enum { INIT_RUN = 4096 }; /* elements of a task */
typedef struct {
    const Param *row;
    uint64_t seed, stream;
} RowInit;

static void init_task(void *context, size_t task) {
    const RowInit *a = (const RowInit *)context;
    const Param *row = a->row;
    for (size_t i = task * INIT_RUN; i < min_size(row->size, (task + 1) * INIT_RUN); i++) {
        double value = row->init == INIT_ONE ? 1 : 0;
        if (row->init == INIT_NORMAL) value = row->scale * rng_normal(a->seed, a->stream, i);
        if (row->init == INIT_ONE && row->scale > 0) value += row->scale * rng_normal(a->seed, a->stream, i);
        if (row->init == INIT_UNIFORM) value = row->scale * (2 * rng_uniform(a->seed, a->stream, i) - 1);
        row->value[i] = (real)value;
    }
}

static void init_row(const Param *row, uint64_t seed, uint64_t stream) {
    RowInit a = {row, seed, stream};
    parallel_for(threads_free(), (row->size + INIT_RUN - 1) / INIT_RUN, init_task, &a);
}

void params_init(Params *p, uint64_t seed) {
    for (size_t i = 0; i < p->n && p->arena[0]; i++) init_row(&p->row[i], seed, rng_stream(RNG_INIT, i, 0));
    if (p->arena[0] && p->arena[4]) memcpy(p->arena[4], p->arena[0], p->total * sizeof(real));
}

void params_zero_grad(Params *p) {
    if (p->device)
        p->ops->zero_grad(p->device);
    else if (p->arena[1])
        memset(p->arena[1], 0, p->total * sizeof(real));
}

size_t params_count(const Params *p) {
    size_t count = 0;
    for (size_t i = 0; i < p->n; i++) count += p->row[i].size;
    return count;
}

/* Eight sums side by side, whatever the machine: fast enough to be bound by memory, and always the same bits. */
static double sum_of_squares(const real *x, size_t n) {
    double lane[8] = {0};
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        for (int k = 0; k < 8; k++) lane[k] += (double)x[i + (size_t)k] * (double)x[i + (size_t)k];
    }
    for (; i < n; i++) lane[0] += (double)x[i] * (double)x[i];
    return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

double params_grad_norm(const Params *p) {
    double sum = 0;
    if (p->device) return p->ops->grad_norm(p->device);
    for (size_t i = 0; i < p->n && p->arena[1]; i++) sum += sum_of_squares(p->row[i].grad, p->row[i].size);
    return sqrt(sum);
}

/* Numbers move, pointers stay: whoever holds a pointer to a value sees the exchange. */
void params_swap_ema(Params *p) {
    if (!p->arena[0] || !p->arena[4]) return;
    if (p->device) {
        p->ops->swap_ema(p->device);
        return;
    }
    for (size_t i = 0; i < p->total; i++) {
        real value = p->arena[0][i];
        p->arena[0][i] = p->arena[4][i];
        p->arena[4][i] = value;
    }
}

Err params_send(Params *p) {
    return p->device ? p->ops->send(p->device, p) : OK;
}

Err params_fetch(Params *p) {
    return p->device ? p->ops->fetch(p->device, p) : OK;
}

/* out = prefix + name, the name without its dots if asked (so the official EMA calls its buffers, SPEC section 6) */
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

/* A moment: as it is where the file has bf16, else rounded to the nearest. */
static Err load_bf16(uint16_t *out, const Checkpoint *ck, const char *name, const Param *row) {
    const Tensor *x;
    real *numbers;
    TRY(checkpoint_shaped(ck, name, row->ndim, row->dim, row->size, &x));
    if (x->dtype == DT_BF16) {
        memcpy(out, x->data, row->size * sizeof *out);
        return OK;
    }
    TRY(mem_alloc(&numbers, row->size, sizeof *numbers, "a moment"));
    tensor_to_reals(x, numbers);
    round_bf16(out, numbers, row->size);
    free(numbers);
    return OK;
}

static Err load_rows(Params *p, const Checkpoint *ck, char which, const char *prefix, int strip_dots) {
    const int arena = find_arena(p, which);
    if (arena < 0) return err_in(ck->path);
    for (size_t i = 0; i < p->n; i++) {
        char name[NAME_MAX_BYTES];
        Param *row = &p->row[i];
        TRY(join_name(name, prefix, row->name, strip_dots));
        if (in_bf16(p, arena))
            TRY(load_bf16(*slot16(row, arena), ck, name, row));
        else
            TRY(checkpoint_reals(ck, name, row->ndim, row->dim, row->size, *slot(row, arena)));
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
static int lies_ready(const Tensor *x) {
    const Dtype own = sizeof(real) == sizeof(double) ? DT_F64 : DT_F32;
    return x->dtype == own && (uintptr_t)x->data % sizeof(real) == 0;
}

/* ---- Matrices in fewer bits ---- */

static size_t packed_bytes(const Param *row, WeightFormat format) {
    return round_up(weights_bytes(format, row->dim[0], row->dim[1]), 64);
}

/* With the factors of its rows */
static size_t kept_bytes(const Param *row, WeightFormat format) {
    if (!row->matrix || format == WEIGHTS_REAL) return row->size * sizeof(real);
    return packed_bytes(row, format) + round_up(row->dim[0] * sizeof(float), 64);
}

size_t params_bytes(const Params *p, WeightFormat format) {
    size_t bytes = 0;
    for (size_t i = 0; i < p->n; i++) bytes += kept_bytes(&p->row[i], format);
    return bytes;
}

/* Room for every packed matrix and the factors of its rows. */
static Err plan_packed(Params *p, WeightFormat format) {
    size_t bytes = 0;
    if (p->packed) return err("matrices are packed already");
    for (size_t i = 0; i < p->n; i++)
        if (p->row[i].matrix) bytes += kept_bytes(&p->row[i], format);
    TRY(mem_alloc(&p->packed, bytes, 1, "packed matrices"));
    char *next = (char *)p->packed;
    for (size_t i = 0; i < p->n; i++) {
        Param *row = &p->row[i];
        if (!row->matrix) continue;
        row->packed = (Weights){format, next, (const float *)(const void *)(next + packed_bytes(row, format))};
        next += kept_bytes(row, format);
    }
    return OK;
}

/* The pages of a file that nobody needs any more; they come back from it if somebody does. */
static void let_go(const Checkpoint *ck, const Tensor *x) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), map = (size_t)ck->map;
    const size_t begin = round_up((size_t)x->data, page), bytes = x->size * dtype_size(x->dtype);
    const size_t end = ((size_t)x->data + bytes) / page * page;
    if (begin >= map && end <= map + ck->map_bytes && begin < end) madvise((void *)begin, end - begin, MADV_DONTNEED);
}

/* Packs x (out,in) into the place of its row, a row of x at a time. */
static Err pack_matrix(const Param *row, const Tensor *x) {
    const size_t in = row->dim[1];
    real *line;
    TRY(mem_alloc(&line, in, sizeof *line, "a row of a matrix"));
    Tensor part = *x;
    part.size = in;
    for (size_t r = 0; r < row->dim[0]; r++) {
        part.data = (const char *)x->data + r * in * dtype_size(x->dtype);
        tensor_to_reals(&part, line);
        weights_pack(row->packed.format, (void *)row->packed.data, (float *)row->packed.scale, line, r, in);
    }
    free(line);
    return OK;
}

Err params_pack(Params *p, WeightFormat format) {
    TRY(plan_packed(p, format));
    p->format = format;
    for (size_t i = 0; i < p->n; i++) {
        Tensor x = {.dtype = sizeof(real) == sizeof(double) ? DT_F64 : DT_F32, .data = p->row[i].value};
        x.size = p->row[i].size;
        if (p->row[i].matrix) TRY(pack_matrix(&p->row[i], &x));
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
        TRY(checkpoint_shaped(ck, name, row->ndim, row->dim, row->size, &x));
        if (row->matrix && format != WEIGHTS_REAL) {
            if (arena) {
                TRY(pack_matrix(row, x));
                let_go(ck, x);
            }
            continue;
        }
        if (lies_ready(x)) {
            memcpy(&row->value, &x->data, sizeof row->value);
            continue;
        }
        row->value = arena ? arena + *need : NULL;
        if (arena) tensor_to_reals(x, row->value);
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

Err tensor_list_params(TensorList *list, const Params *p, char which, const char *prefix, Dtype dtype) {
    const int arena = find_arena(p, which);
    if (arena < 0) return FAILED;
    for (size_t i = 0; i < p->n; i++) {
        Param *row = &p->row[i];
        char name[NAME_MAX_BYTES];
        TRY(join_name(name, prefix, row->name, 0));
        if (row->packed.data && !row->value)
            return err("'%s' is packed: its numbers are in the file it came from", name);
        if (in_bf16(p, arena))
            TRY(tensor_list_add(list, name, DT_BF16, row->ndim, row->dim, *slot16(row, arena), 0));
        else
            TRY(tensor_list_add(list, name, dtype, row->ndim, row->dim, *slot(row, arena), 1));
    }
    return OK;
}

void params_free(Params *p) {
    if (p->device) p->ops->close(p->device);
    for (int k = 0; k < ARENAS; k++) free(p->arena[k]);
    free(p->packed);
    free(p->row);
    *p = (Params){0};
}
