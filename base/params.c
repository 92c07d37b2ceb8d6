/* params.c - parameter tables: one row per tensor of a model.
 *
 * A table is a list of rows (official name, shape, rule of initialisation, weight decay) over at most five arenas:
 * value, gradient, two Adam moments, EMA. Each arena is one allocation, and a row has its place in every one of them.
 * Whoever allocates, initialises, loads, saves, updates or checks a model loops over its rows, so adding a layer to a
 * network means adding rows, and nothing else in the project knows a name or an order.
 *
 * Files of tables are files/weights.c's. Where a table has a copy on a GPU, what
 * happens to all its rows at once happens there.
 *
 * Read in this order: building a table; planning memory; initial values; what happens to all rows at once; updates. */
#include "base/params.h"
#include "base/compute.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

real **params_slot(Param *row, int arena) {
    real **slots[ARENAS] = {&row->value, &row->grad, &row->m, &row->v, &row->ema};
    return slots[arena];
}

int params_in_bf16(const Params *p, int arena) {
    return p->bf16_moments && (arena == 2 || arena == 3);
}

uint16_t **params_slot16(Param *row, int arena) {
    return arena == 2 ? &row->m16 : &row->v16;
}

int params_arena(const Params *p, char which) {
    static const char letters[] = "vg12e";
    const char *letter = which ? strchr(letters, which) : NULL;
    if (letter && p->arena[letter - letters]) return (int)(letter - letters);
    if (letter)
        err("parameters of kind '%c' were never planned", which);
    else
        err("parameters of kind '%c', expected one of %s", which, letters);
    return -1;
}

/* ---- Building a table ---- */

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

Name name_of(const char *fmt, ...) {
    Name name;
    va_list args;
    va_start(args, fmt);
    vsnprintf(name.s, sizeof name.s, fmt, args);
    va_end(args);
    return name;
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

/* ---- Planning memory ---- */

void params_sort(Params *p, int (*order)(const char *, const char *), size_t *moved) {
    for (size_t i = 0; i < p->n; i++) {
        const Param row = p->row[i];
        size_t k = i;
        for (; k > 0 && order(p->row[k - 1].name, row.name) > 0; k--) p->row[k] = p->row[k - 1];
        p->row[k] = row;
        for (size_t j = 0; j < i; j++) moved[j] += moved[j] >= k;
        moved[i] = k;
    }
}

static Err plan_arena(Params *p, int arena, const char *what) {
    if (p->arena[arena]) return OK;
    const int bf16 = params_in_bf16(p, arena);
    TRY(mem_alloc(&p->arena[arena], p->total, bf16 ? sizeof(uint16_t) : sizeof(real), what));
    size_t next = 0;
    for (size_t i = 0; i < p->n; i++) {
        if (bf16)
            *params_slot16(&p->row[i], arena) = (uint16_t *)(void *)p->arena[arena] + next;
        else
            *params_slot(&p->row[i], arena) = p->arena[arena] + next;
        next += round_up(p->row[i].size, ROW_REALS);
    }
    return OK;
}

Err params_plan(Params *p, int what) {
    if ((what & PLAN_ADAM) && p->bf16_moments && !compute_of(p).fast)
        return err("moments in bf16 take kernels/, which this program was built without: make without PLAIN=1");
    if (what & PLAN_VALUE) TRY(plan_arena(p, 0, "parameters"));
    if (what & PLAN_GRAD) TRY(plan_arena(p, 1, "gradients"));
    if (what & PLAN_ADAM) TRY(plan_arena(p, 2, "first moments"));
    if (what & PLAN_ADAM) TRY(plan_arena(p, 3, "second moments"));
    if (what & PLAN_EMA) TRY(plan_arena(p, 4, "the moving average"));
    return OK;
}

/* ---- Initial values ---- */

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

/* ---- All rows at once ---- */

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

void params_send_part(Params *p, size_t row, size_t at, size_t n) {
    if (p->device) p->ops->send_part(p->device, p, row, at, n);
}

Err params_fetch(Params *p) {
    return p->device ? p->ops->fetch(p->device, p) : OK;
}

void params_free(Params *p) {
    if (p->device) p->ops->close(p->device);
    for (int k = 0; k < ARENAS; k++) free(p->arena[k]);
    free(p->packed);
    free(p->row);
    *p = (Params){0};
}

/* ---- AdamW and the moving average (SPEC sections 6 and 7) ---- */

/* With decayed weights and bias corrections of step n:
 *     m = beta1 m + (1 - beta1) g     v = beta2 v + (1 - beta2) g^2
 *     w = (1 - lr decay) w - lr (m / (1 - beta1^n)) / (sqrt(v / (1 - beta2^n)) + eps)
 * a: keep = 1 - lr decay, rate = lr / (1 - beta1^n), inverse = 1/sqrt(1 - beta2^n), rest = 1 - beta */
void adamw(const Compute *on, real *w, real *m, real *v, const real *g, const AdamStep *a, size_t n) {
    if (on->fast) return on->fast->adamw(on, w, m, v, g, a, n);
    for (size_t i = 0; i < n; i++) {
        m[i] = a->beta1 * m[i] + a->rest1 * g[i];
        v[i] = a->beta2 * v[i] + a->rest2 * g[i] * g[i];
        w[i] = a->keep * w[i] - a->rate * m[i] / ((real)sqrt((double)v[i]) * a->inverse + a->eps);
    }
}

/* ema = ema - step (ema - w) */
void moving_average(const Compute *on, real *ema, const real *w, real step, size_t n) {
    if (on->fast) return on->fast->ema(on, ema, w, step, n);
    for (size_t i = 0; i < n; i++) ema[i] -= step * (ema[i] - w[i]);
}

void adamw_step(Params *p, const AdamW *o, uint64_t step) {
    const Compute on = compute_of(p);
    const double correction1 = 1 - pow(o->beta1, (double)step), correction2 = 1 - pow(o->beta2, (double)step);
    AdamStep a = {.rate = (real)(o->lr / correction1), .inverse = (real)(1 / sqrt(correction2))};
    if (p->device) return p->ops->update(p->device, p, o, step, 0);
    a.beta1 = (real)o->beta1, a.beta2 = (real)o->beta2, a.eps = (real)o->eps;
    a.rest1 = (real)(1 - o->beta1), a.rest2 = (real)(1 - o->beta2);
    for (size_t i = 0; i < p->n; i++) {
        const Param *row = &p->row[i];
        if (row->untrained) continue;
        a.keep = (real)(1 - o->lr * row->decay * o->decay_scale);
        a.stream = rng_stream(RNG_ROUND, i, step & 0xffffffffu);
        if (p->bf16_moments)
            on.fast->adamw_bf16(&on, row->value, row->m16, row->v16, row->grad, &a, row->size);
        else
            adamw(&on, row->value, row->m, row->v, row->grad, &a, row->size);
    }
}

/* 1 - d */
static float ema_step(double decay, uint64_t num_updates) {
    const float n = (float)num_updates, warm = (1 + n) / (10 + n), limit = (float)decay;
    return 1 - (warm < limit ? warm : limit);
}

void ema_update(Params *p, double decay, uint64_t num_updates) {
    const Compute on = compute_of(p);
    const float step = ema_step(decay, num_updates);
    if (p->device) return p->ops->update(p->device, p, NULL, 0, step);
    for (size_t i = 0; i < p->n; i++) moving_average(&on, p->row[i].ema, p->row[i].value, (real)step, p->row[i].size);
}

void adamw_ema_step(Params *p, const AdamW *o, uint64_t step, double decay, uint64_t num_updates) {
    if (p->device) return p->ops->update(p->device, p, o, step, ema_step(decay, num_updates));
    adamw_step(p, o, step);
    ema_update(p, decay, num_updates);
}

double lr_at(const LrSchedule *s, uint64_t n) {
    const double pi = 3.14159265358979323846, x = (double)n;
    if (x < s->warm_up_steps) return (s->lr_max - s->lr_start) / s->warm_up_steps * x + s->lr_start;
    double done = (x - s->warm_up_steps) / (s->max_decay_steps - s->warm_up_steps);
    return s->lr_min + 0.5 * (s->lr_max - s->lr_min) * (1 + cos(pi * (done < 1 ? done : 1)));
}
