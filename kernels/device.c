/* device.c - the GPU: finding it, its memory, matrix products on it, parameter tables there.
 *
 * device.h says how this file is compiled. The first half is C, for the rest of the program; the second half is CUDA:
 * what the twins of the layers stand on, then the twins themselves, included at the end, and the table of functions
 * that is all that C sees of them. Everything runs on one stream, in the order in which it is asked for.
 *
 * Matrix products are cuBLASLt's, which is opened when first needed: a program built here starts where there is no
 * CUDA. Sums run in an order that depends on sizes alone, nothing is added by float atomics, and split products that
 * add up in whatever order they finish are excluded: the same seed gives the same bits on the same kind of GPU.
 *
 * Refuses: no driver, no GPU, GPUs before compute capability 8.0 (no bf16), too little memory. */
#include "kernels/transformer.h"

#include <stdio.h>
#include <time.h>
#if defined(DEVICE_CODE) && !defined(CUDA_ON_CPU)
#include <dlfcn.h>
#endif

/* ---- C: which half computes ---- */

static const DeviceOps *cuda_ops(Precision precision) {
    const DeviceOps *f32 = &cuda_f32, *bf16 = &cuda_bf16;
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

Err cuda_choose(size_t local) {
    const DeviceOps *ops = cuda_ops(PRECISION_F32);
    if (!ops) ops = cuda_ops(PRECISION_BF16);
    return ops ? ops->choose(local) : cuda_find(NULL, NULL, NULL);
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

static Err use_cuda(Params *p, Precision precision) {
    const DeviceOps *ops = cuda_ops(precision);
    if (!ops) return cuda_find(NULL, NULL, NULL) == OK ? err("this program has no CUDA of that precision") : FAILED;
    if (p->device) return err("the parameters are on the GPU already");
    TRY(ops->open(&p->device));
    p->ops = ops;
    return OK;
}

Err transformer_use_cuda(Transformer *m, Precision precision) {
    return use_cuda(&m->params, precision);
}

Err vqgan_use_cuda(Vqgan *v, Precision precision) {
    return use_cuda(vqgan_params(v), precision);
}

Err disc_use_cuda(Discriminator *d, Precision precision) {
    return use_cuda(disc_params(d), precision);
}

Err perceptual_use_cuda(Perceptual *p, Precision precision) {
    return use_cuda(perceptual_params(p), precision);
}

int vqgan_on_cuda(Vqgan *v) {
    return vqgan_params(v)->device != NULL;
}

int transformer_on_cuda(const Transformer *m) {
    return m->params.device != NULL;
}
