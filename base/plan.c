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
