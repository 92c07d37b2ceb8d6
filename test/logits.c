/* logits.c - what a model's networks say, for test_torch.py to compare with PyTorch.
 *
 *   logits MODEL OUT.safetensors     for every scale t, from random tokens:
 *
 * x1, xt1, label1, logits1, x2 ..., each of two samples: x (2,N) is x_{t-1}, xt (2,N) is x_t, logits (2,N,K). */
#include "sampling/sampling.h"
#include "training/training.h"

#include <stdio.h>
#include <stdlib.h>

enum { SAMPLES = 2 };

static Err random_ints(int32_t **x, size_t n, size_t below, uint64_t number) {
    TRY(mem_alloc(x, n, sizeof **x, "random numbers"));
    for (size_t i = 0; i < n; i++) (*x)[i] = (int32_t)rng_below(1, rng_stream(RNG_TEST, 0, number), i, (uint32_t)below);
    return OK;
}

static Err add(TensorList *list, const char *what, int t, Dtype dtype, int ndim, const size_t *dim, const void *data) {
    char name[32];
    snprintf(name, sizeof name, "%s%d", what, t);
    return tensor_list_add(list, name, dtype, ndim, dim, data, 0);
}

/* The list owns the arrays; main frees them. */
static Err scale(TensorList *list, Model *m, int t) {
    int32_t *x, *xt, *label = NULL, ts[SAMPLES];
    const real *logits;
    real *copy;
    size_t N = m->h * m->w, dim[3] = {SAMPLES, N, m->K}, n = SAMPLES * N * m->K;
    TRY(model_scale(m, t));
    TRY(transformer_plan(m->net, SAMPLES, N, 0));
    TRY(random_ints(&x, SAMPLES * N, m->K, 3 * (uint64_t)t));
    TRY(random_ints(&xt, SAMPLES * N, m->K, 3 * (uint64_t)t + 1));
    if (m->classes.n) TRY(random_ints(&label, SAMPLES, m->classes.n, 3 * (uint64_t)t + 2));
    for (int b = 0; b < SAMPLES; b++) ts[b] = t;
    TRY(transformer_forward(m->net, x, xt, ts, label, SAMPLES, N, &logits));
    TRY(mem_alloc(&copy, n, sizeof *copy, "logits"));
    for (size_t i = 0; i < n; i++) copy[i] = logits[i];
    TRY(add(list, "x", t, DT_I32, 2, dim, x));
    TRY(add(list, "xt", t, DT_I32, 2, dim, xt));
    if (label) TRY(add(list, "label", t, DT_I32, 1, dim, label));
    return add(list, "logits", t, DT_F32, 3, dim, copy);
}

int main(int argc, char **argv) {
    Model m;
    TensorList list = {0};
    if (argc != 3) return fprintf(stderr, "usage: logits MODEL OUT.safetensors\n"), 2;
    Err e = model_open(&m, argv[1], NULL);
    for (int t = 1; e == OK && t <= m.schedule.T; t++) e = scale(&list, &m, t);
    if (e == OK) e = checkpoint_write(argv[2], list.tensor, list.from_real, list.n, NULL);
    if (e != OK) fprintf(stderr, "logits: %s\n", err_text());
    for (size_t i = 0; i < list.n; i++) free((void *)(uintptr_t)list.tensor[i].data);
    tensor_list_free(&list);
    model_close(&m);
    return e != OK;
}
