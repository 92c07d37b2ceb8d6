/* lpips.c - LPIPS of the full-size VGG16, for test_lpips.py to compare with PyTorch, and weights for test_programs.sh
 * and test_cuda_programs.sh.
 *
 *   lpips run FILE[,FILE] PAIR OUT   PAIR has x and xrec (B,3,H,W); OUT gets loss (1) and dxrec, its gradient
 *   lpips make OUT                   random weights in the shapes of the real ones
 *
 * All but FILE are safetensors. */
#include "sampling/sampling.h"
#include "training/training.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static Err make(const char *path) {
    const PerceptualConfig c = perceptual_vgg16();
    Perceptual *p;
    TensorList list = {0};
    TRY(perceptual_create(&p, &c));
    TRY(params_plan(perceptual_params(p), PLAN_VALUE));
    params_init(perceptual_params(p), 1);
    TRY(tensor_list_params(&list, perceptual_params(p), 'v', "", DT_F32));
    TRY(checkpoint_write(path, list.tensor, list.from_real, list.n, NULL));
    tensor_list_free(&list);
    perceptual_free(p);
    return OK;
}

static Err load(Perceptual **p, char *files) {
    const PerceptualConfig c = perceptual_vgg16();
    Checkpoint ck[2];
    size_t n = 0;
    memset(ck, 0, sizeof ck);
    for (char *file = strtok(files, ","); file && n < 2; file = strtok(NULL, ",")) TRY(checkpoint_open(&ck[n++], file));
    TRY(perceptual_create(p, &c));
    TRY(perceptual_load(*p, ck, n));
    for (size_t i = 0; i < n; i++) checkpoint_close(&ck[i]);
    return OK;
}

static Err run(char *files, const char *pair, const char *out) {
    Perceptual *p;
    Checkpoint ck;
    TensorList list = {0};
    real *x, *xrec, *dxrec, said;
    double loss;
    const size_t one = 1;
    memset(&ck, 0, sizeof ck);
    TRY(load(&p, files));
    TRY(checkpoint_open(&ck, pair));
    const Tensor *t = checkpoint_find(&ck, "x");
    if (!t || t->ndim != 4 || t->dim[1] != 3) return err("%s: no x (B,3,H,W)", pair);
    TRY(mem_alloc(&x, t->size, sizeof *x, "x"));
    TRY(mem_alloc(&xrec, t->size, sizeof *xrec, "xrec"));
    TRY(mem_alloc(&dxrec, t->size, sizeof *dxrec, "dxrec"));
    TRY(checkpoint_reals(&ck, "x", 4, t->dim, t->size, x));
    TRY(checkpoint_reals(&ck, "xrec", 4, t->dim, t->size, xrec));
    TRY(perceptual_plan(p, t->dim[0], t->dim[2], t->dim[3], 1));
    TRY(perceptual_loss(p, x, xrec, t->dim[0], t->dim[2], t->dim[3], 1, &loss, dxrec));
    said = (real)loss;
    TRY(tensor_list_add(&list, "loss", DT_F32, 1, &one, &said, 1));
    TRY(tensor_list_add(&list, "dxrec", DT_F32, 4, t->dim, dxrec, 1));
    TRY(checkpoint_write(out, list.tensor, list.from_real, list.n, NULL));
    tensor_list_free(&list);
    checkpoint_close(&ck);
    perceptual_free(p);
    free(x);
    free(xrec);
    free(dxrec);
    return OK;
}

int main(int argc, char **argv) {
    Err e = FAILED;
    if (argc == 3 && !strcmp(argv[1], "make"))
        e = make(argv[2]);
    else if (argc == 5 && !strcmp(argv[1], "run"))
        e = run(argv[2], argv[3], argv[4]);
    else
        return fprintf(stderr, "usage: lpips run FILE[,FILE] PAIR OUT | make OUT\n"), 2;
    if (e != OK) fprintf(stderr, "lpips: %s\n", err_text());
    return e != OK;
}
