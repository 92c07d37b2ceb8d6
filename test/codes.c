/* codes.c - what a first stage makes of the training pictures, for test_programs.sh.
 *
 *   codes VQGAN.safetensors DATA OUT     their tokens, and their reconstructions from these tokens as raw floats to OUT;
 *                                        prints K, how many of the K tokens occur, and the dtype of quantize.used or
 *                                        "none" */
#include "sampling/sampling.h"
#include "training/training.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static Err open_vqgan(Vqgan **v, Checkpoint *ck, const char *path) {
    VqganConfig c;
    TRY(checkpoint_open(ck, path));
    TRY(vqgan_config_read(&c, &ck->meta, "model.params."));
    TRY(vqgan_create(v, &c, 0));
    TRY(vqgan_map(*v, ck, ""));
    return vqgan_plan(*v, 1, c.resolution, c.resolution, 0);
}

static Err rebuild(Vqgan *v, const Dataset *d, char *seen, FILE *out) {
    const size_t side = vqgan_config(v)->resolution, n = 3 * side * side, h = side >> (vqgan_config(v)->levels - 1);
    LoaderConfig c = {.prep = PREP_FOLDER, .B = 1, .size = side};
    Loader *l;
    real *image;
    int32_t *tokens;
    TRY(mem_alloc(&image, n, sizeof *image, "picture"));
    TRY(mem_alloc(&tokens, h * h, sizeof *tokens, "tokens"));
    TRY(loader_start(&l, d, &c));
    for (size_t i = 0; i < d->n; i++) {
        const real *images;
        const int32_t *labels;
        TRY(loader_next(l, &images, &labels));
        TRY(vqgan_encode(v, images, 1, side, side, 0, NULL, NULL, tokens));
        TRY(vqgan_decode_tokens(v, tokens, 1, h, h, image));
        for (size_t k = 0; k < h * h; k++) seen[tokens[k]] = 1;
        if (fwrite(image, sizeof *image, n, out) != n) return err("cannot write");
    }
    loader_stop(l);
    free(image);
    free(tokens);
    return OK;
}

int main(int argc, char **argv) {
    Vqgan *v = NULL;
    Checkpoint ck = {0};
    Dataset d = {0};
    char *seen = NULL;
    size_t distinct = 0;
    if (argc != 4) return fprintf(stderr, "usage: codes VQGAN DATA OUT\n"), 2;
    FILE *out = fopen(argv[3], "wb");
    Err e = out ? open_vqgan(&v, &ck, argv[1]) : err("cannot write %s", argv[3]);
    if (e == OK) e = dataset_open(&d, argv[2], SPLIT_TRAIN);
    if (e == OK) e = mem_alloc(&seen, vqgan_K(v), 1, "tokens");
    if (e == OK) e = rebuild(v, &d, seen, out);
    if (out && fclose(out) && e == OK) e = err("cannot write %s", argv[3]);
    if (e != OK) return fprintf(stderr, "codes: %s\n", err_text()), 1;
    for (size_t k = 0; k < vqgan_K(v); k++) distinct += (size_t)seen[k];
    const Tensor *used = checkpoint_find(&ck, "quantize.used");
    printf("%zu %zu %s\n", vqgan_K(v), distinct, used ? dtype_name(used->dtype) : "none");
    free(seen);
    dataset_close(&d);
    vqgan_free(v);
    checkpoint_close(&ck);
    return 0;
}
