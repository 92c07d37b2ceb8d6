/* plan.c - one planner for all networks: memory that areas of different lifetimes share.
 *
 * A network lists its areas: where the address is wanted, how many bytes, and from which step to which step of a run
 * they are needed. Areas whose lives overlap do not overlap in memory; others take turns in the same place. Steps are
 * the network's own numbers: vqgan.c counts its layers forward and backward; whoever needs everything always says
 * 0 and PLAN_END. */
#include "base/plan.h"

#include <stdlib.h>
#include <string.h>

enum { AREA_BYTES = 256 }; /* areas begin at a multiple: cache lines, the widest vectors, a GPU's moves */

void plan_add(Plan *p, void *target, size_t count, size_t size, size_t from, size_t to) {
    size_t bytes;
    if (p->broken != OK) return;
    if (size_mul(&bytes, count, size) != OK || bytes > SIZE_MAX / 4) {
        p->broken = err("%s: an array of %zu x %zu bytes is too large", p->what, count, size);
        return;
    }
    p->broken = mem_grow(&p->area, p->n, 1, &p->capacity, sizeof *p->area, p->what);
    if (p->broken != OK) return;
    const Area a = {round_up(bytes, AREA_BYTES), from, to, 0, target};
    p->area[p->n++] = a;
}

static int larger_first(const void *a, const void *b) {
    const Area *x = (const Area *)a, *y = (const Area *)b;
    if (x->bytes != y->bytes) return x->bytes > y->bytes ? -1 : 1;
    return x->from < y->from ? -1 : x->from > y->from;
}

/* Largest first, each at the lowest place that is free during its whole life. placed[] is kept sorted by offset. */
Err plan_lay_out(Plan *p, size_t *bytes) {
    Area *placed;
    *bytes = 0;
    TRY(p->broken);
    TRY(mem_alloc(&placed, p->n, sizeof *placed, p->what));
    qsort(p->area, p->n, sizeof *p->area, larger_first);
    for (size_t i = 0; i < p->n && *bytes < SIZE_MAX / 4; i++) {
        Area a = p->area[i];
        size_t at = 0, k = i;
        for (size_t j = 0; j < i; j++) {
            const Area *o = &placed[j];
            if (o->from > a.to || a.from > o->to) continue;
            if (o->offset >= at + a.bytes) break;
            at = max_size(at, o->offset + o->bytes);
        }
        a.offset = p->area[i].offset = at;
        for (; k > 0 && placed[k - 1].offset > at; k--) placed[k] = placed[k - 1];
        placed[k] = a;
        *bytes = max_size(*bytes, at + a.bytes);
    }
    free(placed);
    return *bytes < SIZE_MAX / 4 ? OK : err("%s: too large for memory", p->what);
}

void plan_place(const Plan *p, void *memory) {
    for (size_t i = 0; i < p->n; i++) {
        const void *const at = (char *)memory + p->area[i].offset;
        memcpy(p->area[i].target, &at, sizeof at);
    }
}

void plan_free(Plan *p) {
    free(p->area);
    *p = (Plan){0};
}

/* ---- Lives of a network's values ---- */

static void needed(Life *life, size_t step) {
    life->from = min_size(life->from, step);
    life->to = max_size(life->to, step);
}

/* Backward's order: homes, and what a layer finds begun. begun (n_values) is kept in grad[].to until lives are known. */
static void plan_gradients(PlanStep *step, size_t n_layers, Life *grad) {
    for (size_t j = n_layers; j-- > 0;) {
        PlanStep *s = &step[j];
        if (s->add != NONE) grad[s->add].home = grad[s->out].home, grad[s->add].to = 1;
        if (s->in_place) grad[s->in[0]].home = grad[s->out].home;
        for (int k = 0; k < 3 && s->in[k] != NONE; k++) {
            s->accumulate[k] = grad[s->in[k]].to != 0;
            grad[s->in[k]].to = 1;
        }
    }
}

/* Whose result does one layer read alone, which takes it over? */
static void plan_deferred(PlanStep *step, size_t n_layers) {
    for (size_t j = 0; j < n_layers; j++) {
        size_t readers = 0, reader = j;
        for (size_t i = 0; i < n_layers; i++) {
            const PlanStep *s = &step[i];
            if (s->in[0] != step[j].out && s->in[1] != step[j].out && s->in[2] != step[j].out && s->add != step[j].out)
                continue;
            readers++, reader = i;
        }
        step[j].deferred = step[j].defers && readers == 1 && step[reader].takes_over && step[reader].add != step[j].out;
    }
}

/* Values live from their making to their last use, which in training may be a backward; gradients from the backward of
 * the last layer that reads the value to the backward of the one that made it. A home lives as long as all that share
 * it. */
void plan_lives(PlanStep *step, size_t n_layers, int train, Life *value, Life *grad, size_t n_values) {
    for (size_t i = 0; i < n_values; i++) value[i] = grad[i] = (Life){NONE, 0, i};
    plan_gradients(step, n_layers, grad);
    plan_deferred(step, n_layers);
    for (size_t i = 0; i < n_values; i++) grad[i].to = 0;
    for (size_t j = 0; j < n_layers; j++) {
        const PlanStep *s = &step[j];
        const size_t back = 2 * n_layers - 1 - j;
        needed(&value[s->out], j);
        needed(&grad[grad[s->out].home], back);
        if (s->add != NONE) needed(&value[s->add], j);
        for (int k = 0; k < 3 && s->in[k] != NONE; k++) {
            needed(&value[s->in[k]], j);
            needed(&grad[grad[s->in[k]].home], back);
            if (train && !s->rereads_out) needed(&value[s->in[k]], back);
        }
        if (train && s->rereads_out) needed(&value[s->out], back);
    }
    for (size_t j = 0; j < n_layers; j++)
        if (step[j].deferred) needed(&value[step[j].in[0]], value[step[j].out].to);
}
