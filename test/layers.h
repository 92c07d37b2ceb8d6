/* layers.h - how test_layers.c compares a layer's plain loop with its faster fellows, and with central differences.
 *
 * A layer is described by its tensors: what it is given, what it makes, which of them is the gradient of which. The same
 * description serves the plain loop, the CPU's fellow and the GPU's. */
#ifndef LAYERS_H
#define LAYERS_H

#include "test.h"

/* What must work for a comparison to mean something; not counted. */
#define MUST(call)                                                                                                     \
    do {                                                                                                               \
        if ((call) != OK) test_failed++, printf("FAIL %s: %s\n", #call, err_text());                                   \
    } while (0)

/* What an array is */
enum {
    GIVEN = 1,     /* filled with random numbers before */
    MADE = 2,      /* compared afterwards; GIVEN | MADE: added to, or changed in place */
    PICTURE = 4,   /* (B,C,hw), on a GPU (B,hw,C) */
    F32 = 8,       /* float on every GPU */
    PARAM = 16,    /* a row of the parameter table */
    GRAD = 32,     /* the gradient of the PARAM that it is `of` */
    WHOLE = 64,    /* int32_t below `below` */
    SAVED = 128,   /* n bytes that forward leaves for backward as it likes */
    ON_HOST = 256, /* of the caller, wherever the layer computes */
    DOUBLE = 512   /* of doubles */
};
typedef struct {
    const char *name;
    int kind;
    size_t n, B, C, hw; /* numbers; of a PICTURE */
    size_t below;
    int of;     /* MADE: the gradient of this tensor; GIVEN alone: the loss's gradient by it. NOTHING */
    size_t row; /* of the table */
} Array;

enum { TENSORS = 16, SIZES = 10, NOTHING = -1 };
typedef struct {
    size_t s[SIZES]; /* the sizes of this case, in the layer's own order */
    Array t[TENSORS];
    int n;
    void *p[TENSORS]; /* where they lie */
    Params params;
} Case;
typedef struct {
    const char *name;  /* of the entry, without _forward and _backward */
    const char *sizes; /* what the sizes are called: "B C hw" */
    void (*describe)(Case *c, const Compute *on);
    void (*needs)(Compute *on, const Case *c);       /* scratch; NULL: none */
    void (*run)(const Compute *on, const Case *c);   /* forward, then backward */
    void (*choose)(const Case *c, real *x[TENSORS]); /* changes the random numbers; NULL: no */
    const size_t (*cases)[SIZES];
    size_t n_cases;
    int (*there)(const Layers *l); /* has this table the fellows? */
} Checked;

static inline int array(Case *c, const char *name, int kind, size_t n, int of) {
    c->t[c->n] = (Array){name, kind, n, 0, 0, 0, 0, of, 0};
    return c->n++;
}
static inline int picture(Case *c, const char *name, int kind, size_t B, size_t C, size_t hw, int of) {
    c->t[c->n] = (Array){name, kind | PICTURE, B * C * hw, B, C, hw, 0, of, 0};
    return c->n++;
}
static inline int whole(Case *c, const char *name, int kind, size_t n, size_t below) {
    c->t[c->n] = (Array){name, kind | WHOLE, n, 0, 0, 0, below, NOTHING, 0};
    return c->n++;
}

typedef enum { PLAIN_LOOPS, FAST_LAYERS, GPU_F32, GPU_BF16, PLACES } Place;
static const char *const place_name[] = {"plain", "fast", "gpu f32", "gpu bf16"};
static inline double allowed(Place where) { /* of the largest number that is wanted */
    static const double fast = sizeof(real) == 8 ? 1e-12 : 1e-5;
    return where == GPU_BF16 ? 2e-2 : where == GPU_F32 ? 1e-4 : fast;
}

/* ---- Numbers between the host, where all are reals, and where a layer computes ---- */

static inline real to_bf16(real x) {
    float f = (float)x;
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    memcpy(&f, &bits, sizeof f);
    return (real)f;
}

static inline size_t bytes_of(const Compute *on, const Array *t) {
    if (t->kind & SAVED) return t->n;
    if (t->kind & WHOLE) return t->n * sizeof(int32_t);
    if (t->kind & DOUBLE) return t->n * sizeof(double);
    return t->n * (t->kind & (F32 | PARAM | GRAD | ON_HOST) ? sizeof(real) : on->unit);
}
/* Element i of the tensor as the host has it lies here where the layer computes. */
static inline size_t place_of(const Compute *on, const Array *t, size_t i) {
    if (!on->device || !(t->kind & PICTURE)) return i;
    return (i / (t->C * t->hw) * t->hw + i % t->hw) * t->C + i / t->hw % t->C;
}

static inline void put_tensor(const Compute *on, const Array *t, void *to, const real *x) {
    char *bytes = (char *)malloc(bytes_of(on, t) + 1);
    for (size_t i = 0; i < t->n; i++) {
        const size_t at = place_of(on, t, i);
        const int32_t whole_number = (int32_t)x[i];
        const double number = (double)x[i];
        if (t->kind & WHOLE)
            memcpy(bytes + at * sizeof whole_number, &whole_number, sizeof whole_number);
        else if (t->kind & DOUBLE)
            memcpy(bytes + at * sizeof number, &number, sizeof number);
        else if (bytes_of(on, t) == t->n * 2) {
            const float f = (float)x[i];
            memcpy(bytes + at * 2, (const char *)&f + 2, 2);
        } else
            memcpy(bytes + at * sizeof(real), &x[i], sizeof(real));
    }
    if (t->kind & ON_HOST)
        memcpy(to, bytes, bytes_of(on, t));
    else
        compute_put(on, to, bytes, bytes_of(on, t));
    free(bytes);
}

static inline void get_tensor(const Compute *on, const Array *t, real *x, const void *from) {
    char *bytes = (char *)malloc(bytes_of(on, t) + 1);
    if (t->kind & ON_HOST)
        memcpy(bytes, from, bytes_of(on, t));
    else
        MUST(compute_get(on, bytes, from, bytes_of(on, t)));
    for (size_t i = 0; i < t->n; i++) {
        const size_t at = place_of(on, t, i);
        int32_t whole_number;
        double number;
        float f = 0;
        if (t->kind & WHOLE)
            memcpy(&whole_number, bytes + at * sizeof whole_number, sizeof whole_number), x[i] = (real)whole_number;
        else if (t->kind & DOUBLE)
            memcpy(&number, bytes + at * sizeof number, sizeof number), x[i] = (real)number;
        else if (bytes_of(on, t) == t->n * 2)
            memcpy((char *)&f + 2, bytes + at * 2, 2), x[i] = (real)f;
        else
            memcpy(&x[i], bytes + at * sizeof(real), sizeof(real));
    }
    free(bytes);
}

/* ---- One case, computed in one place ---- */

static inline void describe(const Checked *l, const size_t sizes[SIZES], const Compute *on, Case *c) {
    memset(c, 0, sizeof *c);
    memcpy(c->s, sizes, sizeof c->s);
    l->describe(c, on);
    for (int i = 0; i < c->n; i++)
        if (c->t[i].kind & PARAM)
            MUST(params_add(&c->params, &c->t[i].row, INIT_ZERO, 0, 0, 1, &c->t[i].n, "%s", c->t[i].name));
}

static inline Compute plain_loops(void) {
    const Compute on = {.unit = sizeof(real), .threads = 1};
    return on;
}

static inline void lay_tensors(const Compute *on, Case *c, real *const x[TENSORS]) {
    for (int i = 0; i < c->n; i++) {
        Array *t = &c->t[i];
        if (t->kind & PARAM)
            c->p[i] = (void *)(uintptr_t)param_value(&c->params, t->row);
        else if (t->kind & GRAD)
            c->p[i] = param_grad(&c->params, c->t[t->of].row);
        else if (t->kind & ON_HOST)
            c->p[i] = malloc(bytes_of(on, t) + 1);
        else
            MUST(compute_alloc(on, &c->p[i], bytes_of(on, t), "a test"));
        if ((t->kind & GIVEN) && !(t->kind & PARAM)) put_tensor(on, t, c->p[i], x[i]);
    }
}

/* x: the numbers before; y: those afterwards of what is MADE, unless NULL. */
static inline void compute_case(const Checked *l, const size_t sizes[SIZES], Place where, real *const x[TENSORS],
                                real *const y[TENSORS]) {
    Case c;
    Compute on = plain_loops();
    describe(l, sizes, &on, &c);
    MUST(params_plan(&c.params, PLAN_VALUE | PLAN_GRAD));
    for (int i = 0; i < c.n; i++)
        if (c.t[i].kind & PARAM) memcpy(c.params.row[c.t[i].row].value, x[i], c.t[i].n * sizeof(real));
    if (where >= GPU_F32) {
        MUST(use_cuda(&c.params, where == GPU_BF16 ? PRECISION_BF16 : PRECISION_F32));
        MUST(params_send(&c.params));
    }
    if (where != PLAIN_LOOPS) on = compute_of(&c.params);
    Params table = c.params;
    describe(l, sizes, &on, &c); /* once more: what is saved depends on who saves it */
    params_free(&c.params);
    c.params = table;
    if (l->needs) l->needs(&on, &c);
    MUST(compute_alloc(&on, &on.scratch, on.scratch_bytes + 1, "a test"));
    lay_tensors(&on, &c, x);
    l->run(&on, &c);
    MUST(compute_status(&on));
    for (int i = 0; i < c.n; i++) {
        if (y && (c.t[i].kind & MADE)) get_tensor(&on, &c.t[i], y[i], c.p[i]);
        if (c.t[i].kind & ON_HOST)
            free(c.p[i]);
        else if (!(c.t[i].kind & (PARAM | GRAD)))
            compute_free(&on, c.p[i]);
    }
    compute_free(&on, on.scratch);
    params_free(&c.params);
}

/* What a layer does in place begins as a copy of n numbers of an activation. */
static inline void copy_numbers(const Compute *on, void *to, const void *from, size_t n) {
    void *bytes = malloc(n * on->unit + 1);
    MUST(compute_get(on, bytes, from, n * on->unit));
    compute_put(on, to, bytes, n * on->unit);
    free(bytes);
}

/* ---- Checks: each says in one line layer, sizes, tensor, element and both numbers ---- */

static inline void say_where(const Checked *l, const size_t sizes[SIZES], const Array *t, size_t element,
                             const char *whose, double got, const char *other, double want) {
    char text[160] = "";
    size_t k = 0, used = 0;
    for (const char *name = l->sizes; *name && k < SIZES; k++) {
        const int length = (int)strcspn(name, " ");
        used += (size_t)snprintf(text + used, sizeof text - used, "%.*s %zu ", length, name, sizes[k]);
        name += length + (name[length] == ' ');
    }
    printf("FAIL %s %s(%s): %s[%zu] is %.9g, %s %.9g\n", l->name, text, whose, t->name, element, got, other, want);
}

static inline void new_numbers(const Case *c, real *x[TENSORS]) {
    for (int i = 0; i < TENSORS; i++)
        x[i] = (real *)calloc(i < c->n && !(c->t[i].kind & SAVED) ? c->t[i].n + 1 : 1, sizeof(real));
}
static inline void free_numbers(real *x[TENSORS]) {
    for (int i = 0; i < TENSORS; i++) free(x[i]);
}
static inline void random_numbers(const Checked *l, const Case *c, int in_bf16, real *x[TENSORS]) {
    for (int i = 0; i < c->n; i++)
        for (size_t k = 0; (c->t[i].kind & GIVEN) && k < c->t[i].n; k++) {
            const uint64_t stream = rng_stream(RNG_TEST, 3, (uint64_t)i);
            x[i][k] = c->t[i].kind & WHOLE ? (real)rng_below(5, stream, k, (uint32_t)c->t[i].below)
                                           : (real)rng_normal(5, stream, k);
        }
    if (l->choose) l->choose(c, x);
    for (int i = 0; in_bf16 && i < c->n; i++)
        for (size_t k = 0; (c->t[i].kind & GIVEN) && !(c->t[i].kind & WHOLE) && k < c->t[i].n; k++)
            x[i][k] = to_bf16(x[i][k]);
}

/* What is made there and by the plain loop, tensor by tensor; the worst element of each that is off is said. */
static inline void compare_case(const Checked *l, const size_t sizes[SIZES], Place where) {
    real *x[TENSORS], *want[TENSORS], *got[TENSORS];
    Case c;
    const Compute on = plain_loops();
    describe(l, sizes, &on, &c);
    new_numbers(&c, x), new_numbers(&c, want), new_numbers(&c, got);
    random_numbers(l, &c, where == GPU_BF16, x);
    compute_case(l, sizes, PLAIN_LOOPS, x, want);
    compute_case(l, sizes, where, x, got);
    for (int i = 0; i < c.n; i++) {
        if (!(c.t[i].kind & MADE)) continue;
        double largest = 0, worst = -1;
        size_t at = 0;
        for (size_t k = 0; k < c.t[i].n; k++) largest = fmax(largest, fabs((double)want[i][k]));
        for (size_t k = 0; k < c.t[i].n; k++) {
            const double gap = fabs((double)got[i][k] - (double)want[i][k]);
            if (!(gap <= worst)) worst = gap, at = k;
            if (gap != gap) break;
        }
        if (c.t[i].n > 0 && worst <= allowed(where) * largest)
            test_passed++;
        else
            test_failed++, say_where(l, sizes, &c.t[i], at, place_name[where], (double)got[i][at], "by the plain loop",
                                     (double)want[i][at]);
    }
    free_numbers(x), free_numbers(want), free_numbers(got);
    params_free(&c.params);
}

/* The loss whose gradient by every y is its dy: sum of dy y */
static inline double loss_of(const Checked *l, const Case *c, Place where, real *x[TENSORS], real *y[TENSORS]) {
    double loss = 0;
    compute_case(l, c->s, where, x, y);
    for (int i = 0; i < c->n; i++)
        if (c->t[i].of != NOTHING && !(c->t[i].kind & (MADE | GRAD)))
            for (size_t k = 0; k < c->t[i].n; k++) loss += (double)x[i][k] * (double)y[c->t[i].of][k];
    return loss;
}

/* In double: every gradient against central differences, at some elements. */
static inline void check_gradients(const Checked *l, const size_t sizes[SIZES], Place where) {
    enum { ELEMENTS = 7 };
    const double step = 1e-5;
    real *x[TENSORS], *y[TENSORS], *unused[TENSORS];
    Case c;
    const Compute on = plain_loops();
    describe(l, sizes, &on, &c);
    new_numbers(&c, x), new_numbers(&c, y), new_numbers(&c, unused);
    random_numbers(l, &c, 0, x);
    loss_of(l, &c, where, x, y);
    for (int i = 0; i < c.n; i++) {
        const Array *t = &c.t[i];
        if (t->of == NOTHING || !(t->kind & MADE)) continue;
        double largest = 0, worst = -1, wanted = 0;
        size_t at = 0;
        for (size_t k = 0; k < t->n; k++) largest = fmax(largest, fabs((double)y[i][k] - (double)x[i][k]));
        for (size_t k = 0; k < t->n; k += t->n / ELEMENTS + 1) {
            const real before = x[t->of][k];
            x[t->of][k] = (real)((double)before + step);
            const double up = loss_of(l, &c, where, x, unused);
            x[t->of][k] = (real)((double)before - step);
            const double want = (up - loss_of(l, &c, where, x, unused)) / (2 * step);
            x[t->of][k] = before;
            const double gap = fabs((double)y[i][k] - (double)x[i][k] - want);
            if (!(gap <= worst)) worst = gap, at = k, wanted = want;
        }
        if (t->n > 0 && worst <= 1e-6 * largest)
            test_passed++;
        else
            test_failed++, say_where(l, sizes, t, at, place_name[where], (double)y[i][at] - (double)x[i][at],
                                     "by central differences", wanted);
    }
    free_numbers(x), free_numbers(y), free_numbers(unused);
    params_free(&c.params);
}

#endif
