/* compute.c - where a network computes. A program linked without the GPU's objects lacks their tables, and so knows that
 * it has no CUDA. */
#include "base/compute.h"
#include "base/plan.h"
#include "base/tiles.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __ELF__
extern const DeviceOps cuda_f32 __attribute__((weak)), cuda_bf16 __attribute__((weak));
#define IF_LINKED(table) (&(table))
#else /* no weak references, and no CUDA either */
#define IF_LINKED(table) NULL
#endif

#ifndef PLAIN
extern const Layers fast_layers; /* kernels/fast.c */
#endif

/* ---- Where a network computes ---- */

static int plainly; /* compute_plainly */

void compute_plainly(int yes) {
    plainly = yes;
}

const Layers *layers_here(void) {
#ifdef PLAIN
    return NULL;
#else
    return &fast_layers;
#endif
}

Compute compute_of(const Params *p) {
    Compute on = {.unit = sizeof(real), .threads = threads_get(), .precision = p ? p->precision : PRECISION_F32};
    if (p && p->device) {
        on.ops = p->ops, on.device = p->device;
        on.fast = p->ops->layers, on.unit = p->ops->unit;
        return on;
    }
    if (!plainly) on.fast = layers_here();
    return on;
}

/* ---- What is multiplied ---- */

static const char *const precision_names[] = {"f32", "bf16x3", "bf16"};

const char *precision_name(Precision p) {
    return precision_names[p];
}

Err precision_read(Precision *p, const char *name, const char *option) {
    for (int i = PRECISION_F32; i <= PRECISION_BF16; i++) {
        *p = (Precision)i;
        if (!strcmp(name, precision_names[i])) return OK;
    }
    return err("%s %s: expected f32, bf16x3 or bf16", option, name);
}

Precision precision_usual(void) {
    return PRECISION_F32;
}

Err precision_there(Precision p) {
    if (p == PRECISION_F32 || layers_here()) return OK;
    return err("products in %s need kernels/, which this program was built without (PLAIN=1)", precision_name(p));
}

const char *precision_text(char text[PRECISION_TEXT], Precision p) {
    const Layers *here = layers_here();
    const int slow = here && !here->multiplies_fast(p);
    snprintf(text, PRECISION_TEXT, "%s%s", precision_name(p), slow ? ", slower than f32 on this processor" : "");
    return text;
}

/* ---- Memory there ---- */

Err compute_alloc(const Compute *on, void *out_pointer, size_t bytes, const char *what) {
    return on->device ? on->ops->alloc(out_pointer, bytes, what) : mem_alloc(out_pointer, bytes, 1, what);
}

void compute_free(const Compute *on, void *p) {
    if (on->device)
        on->ops->free(p);
    else
        free(p);
}

void compute_zero(const Compute *on, void *p, size_t bytes) {
    if (on->device)
        on->ops->zero(on->device, p, bytes);
    else
        memset(p, 0, bytes);
}

void compute_put(const Compute *on, void *to, const void *from, size_t bytes) {
    if (on->device)
        on->ops->put(on->device, to, from, bytes);
    else
        memcpy(to, from, bytes);
}

void compute_copy(const Compute *on, void *to, const void *from, size_t bytes) {
    if (on->device)
        on->ops->copy(on->device, to, from, bytes);
    else
        memcpy(to, from, bytes);
}

Err compute_get(const Compute *on, void *to, const void *from, size_t bytes) {
    if (on->device) return on->ops->get(on->device, to, from, bytes);
    if (to != from) memcpy(to, from, bytes);
    return OK;
}

Err compute_status(const Compute *on) {
    if (on->device) TRY(on->ops->status(on->device));
    return work_stops() ? err("the work was stopped") : OK;
}

Err compute_heads_fit(const Compute *on, size_t D, int train) {
    return on->ops ? on->ops->heads_fit(on->device, D, train) : OK;
}

Err compute_replay(const Compute *on, void **recorded, const size_t key[REPLAY_KEY], void (*work)(void *),
                   void *context) {
    if (on->device) return on->ops->replay(on->device, recorded, key, work, context);
    work(context);
    return OK;
}

void compute_forget(const Compute *on, void **recorded) {
    if (*recorded) on->ops->forget(*recorded);
    *recorded = NULL;
}

void compute_lend(const Compute *on, real **value, const real *planes, size_t B, size_t C, size_t hw) {
    if (on->device)
        on->fast->put_planes(on, *value, planes, B, C, hw);
    else
        *value = (real *)(uintptr_t)planes;
}

Err compute_hand_back(const Compute *on, real *planes, const real *value, size_t B, size_t C, size_t hw) {
    if (on->device) return on->fast->get_planes(on, planes, value, B, C, hw);
    if (planes != value) memcpy(planes, value, B * C * hw * sizeof *planes);
    return OK;
}

Err compute_usable(const Compute *on, const real *value, size_t B, size_t C, size_t hw, const char *what) {
    const size_t n = B * C * hw;
    size_t i = 0;
    double bad;
    real *numbers;
    TRY(mem_alloc(&numbers, n, sizeof *numbers, what));
    const Err e = compute_hand_back(on, numbers, value, B, C, hw);
    while (e == OK && i < n && fabs((double)numbers[i]) <= USABLE_MOST) i++; /* false for NaN */
    bad = i < n ? (double)numbers[i] : 0;
    free(numbers);
    if (e != OK || i == n) return e;
    return err("%s gives no usable numbers (%g): its weights are of a training that failed, or damaged", what, bad);
}

uint64_t compute_changes(const Compute *on) {
    return on->device ? on->ops->changes(on->device) : 0;
}

Err compute_memory(Compute *on, struct Plan *plan, void **memory, size_t *bytes) {
    plan_add(plan, &on->scratch, on->scratch_bytes, 1, 0, PLAN_END);
    Err e = plan_lay_out(plan, bytes);
    if (e == OK && memory) e = compute_alloc(on, memory, *bytes, plan->what);
    if (e == OK && memory) plan_place(plan, *memory);
    plan_free(plan);
    return e;
}

const real *param_value(const Params *p, size_t row) {
    return p->device ? p->ops->value(p->device, row) : p->row[row].value;
}

real *param_grad(const Params *p, size_t row) {
    return p->device ? p->ops->grad(p->device, row) : p->row[row].grad;
}

Err params_there(const Params *p, const char *what) {
    if (p->device) TRY(p->ops->status(p->device));
    if (param_value(p, 0)) return OK;
    return err("%s: %s", what,
               p->device ? "its parameters are not on the GPU yet" : "the parameters have no values yet");
}

/* ---- The GPU ---- */

static const DeviceOps *cuda_ops(Precision precision) {
    const DeviceOps *f32 = IF_LINKED(cuda_f32), *bf16 = IF_LINKED(cuda_bf16);
    return precision == PRECISION_BF16 ? bf16 : f32;
}

int cuda_built(void) {
    return cuda_ops(PRECISION_F32) || cuda_ops(PRECISION_BF16);
}

Err cuda_find(char *text, size_t *free_bytes, size_t *total_bytes) {
    const DeviceOps *ops = cuda_ops(PRECISION_F32);
    if (!ops) ops = cuda_ops(PRECISION_BF16);
    if (!ops)
        return err("--device cuda: this program was built without CUDA; install the CUDA toolkit (nvcc 12 or later; "
                   "Debian: nvidia-cuda-toolkit), then: make clean && make");
    return ops->find(text, free_bytes, total_bytes);
}

Err cuda_choose(size_t local, unsigned char id[GPU_ID_BYTES]) {
    const DeviceOps *ops = cuda_ops(PRECISION_F32);
    if (!ops) ops = cuda_ops(PRECISION_BF16);
    return ops ? ops->choose(local, id) : cuda_find(NULL, NULL, NULL);
}

Err cuda_measure(Precision precision, size_t n, size_t bytes, double *product, double *copy) {
    const DeviceOps *ops = cuda_ops(precision);
    Device *d;
    if (!ops) return cuda_find(NULL, NULL, NULL) == OK ? err("this program has no CUDA of that precision") : FAILED;
    TRY(ops->open(&d));
    const Err e = ops->measure(d, n, bytes, product, copy);
    ops->close(d);
    return e;
}

Err use_cuda(Params *p, Precision precision) {
    const DeviceOps *ops = cuda_ops(precision);
    if (!ops) return cuda_find(NULL, NULL, NULL) == OK ? err("this program has no CUDA of that precision") : FAILED;
    if (p->device) return err("the parameters are on the GPU already");
    TRY(ops->open(&p->device));
    p->ops = ops;
    return OK;
}

static int looked_for_gpu; /* and found none */

static int is_device(const char *device) {
    return !strcmp(device, "cpu") || !strcmp(device, "cuda");
}

/* *device = what it is, or IMAGEBART_DEVICE says; NULL: nobody says anything */
static Err device_named(const char **device) {
    const char *said = *device ? NULL : getenv("IMAGEBART_DEVICE");
    if (*device && !is_device(*device)) return err("device %s: expected cpu or cuda", *device);
    if (said && !is_device(said)) return err("IMAGEBART_DEVICE=%s: expected cpu or cuda", said);
    if (said) *device = said;
    return OK;
}

Err device_choose(DevicePlace *place, const char *device) {
    *place = DEVICE_CPU;
    TRY(device_named(&device));
    if (!device ? !cuda_built() : !strcmp(device, "cpu")) return OK;
    const Err e = cuda_find(NULL, NULL, NULL);
    *place = e == OK ? DEVICE_CUDA : DEVICE_NO_GPU;
    return device ? e : OK;
}

int check_device(const char *device) {
    DevicePlace place;
    const char *option = device ? "--" : "";
    if (device_named(&device) != OK) usage_error("%s%s", option, err_text());
    check(device_choose(&place, device));
    looked_for_gpu = place == DEVICE_NO_GPU;
    return place == DEVICE_CUDA;
}

void say_cpu(void) {
    char text[TILES_TEXT];
    if (cuda_built())
        fprintf(stderr, "device: CPU%s\n",
                looked_for_gpu ? ", for no usable GPU was found (--device cuda says why)"
                               : " (--device cuda: the GPU)");
    if (*tiles_refusal(text)) fprintf(stderr, "note: %s\n", text);
}
