/* first_stage.h - of the first stage what only tests and benchmarks call. */
#ifndef FIRST_STAGE_H
#define FIRST_STAGE_H

#include "imagebart.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* z (B,embed_dim,h,w) -> images (B,out_ch,H,W), not clamped: vqgan.c. */
#ifdef __cplusplus
extern "C"
#endif
    Err
    vqgan_decode(Vqgan *v, const real *z, size_t B, size_t h, size_t w, real *images);

static inline const Param *first_stage_row(Vqgan *v, const char *name) {
    const Params *p = vqgan_params(v);
    for (size_t i = 0; i < p->n; i++)
        if (strcmp(p->row[i].name, name) == 0) return &p->row[i];
    return NULL;
}

/* Entries of tokens (B,N): z (B,embed_dim,N), by the layer itself. Remapped tokens: see vqgan_used. */
static inline Err first_stage_lookup(Vqgan *v, const int32_t *tokens, size_t B, size_t N, real *z) {
    const Compute on = {.fast = NULL};
    const Codes s = {B, vqgan_config(v)->embed_dim, N, vqgan_config(v)->n_embed};
    int32_t *code;
    TRY(mem_alloc(&code, B * N, sizeof *code, "codes"));
    for (size_t i = 0; i < B * N; i++) {
        if (tokens[i] < 0 || (size_t)tokens[i] >= vqgan_K(v)) return free(code), err("token %d", tokens[i]);
        code[i] = vqgan_used(v) ? vqgan_used(v)[tokens[i]] : tokens[i];
    }
    lookup_codes(&on, z, first_stage_row(v, "quantize.embedding.weight")->value, code, &s);
    free(code);
    return OK;
}

/* The level on which a convolution of this name has its results; *side: 'e', 'd', or 'q' for those between. */
static inline size_t level_of(const VqganConfig *c, const char *name, char *side) {
    unsigned level;
    *side = name[0] == 'e' || name[0] == 'd' ? name[0] : 'q';
    if (sscanf(name, "encoder.down.%u", &level) == 1) return level + (strstr(name, "downsample") != NULL);
    if (sscanf(name, "decoder.up.%u", &level) == 1) return level - (strstr(name, "upsample") != NULL);
    return strcmp(name, "encoder.conv_in.weight") == 0 || strcmp(name, "decoder.conv_out.weight") == 0 ? 0
                                                                                                       : c->levels - 1;
}

/* Additions and multiplications of a pass over encoder, decoder or both, convolutions done the direct way. */
static inline double vqgan_flops(Vqgan *v, size_t B, size_t H, size_t W, int encode, int decode) {
    const Params *p = vqgan_params(v);
    double sum = 0;
    for (size_t i = 0; i < p->n; i++) {
        const Param *row = &p->row[i];
        char side;
        const size_t level = level_of(vqgan_config(v), row->name, &side);
        const int encodes = side == 'e' || !strncmp(row->name, "quant_conv", 10);
        const double pixels = (double)(H >> level) * (double)(W >> level);
        if (row->ndim != 4 || !(encodes ? encode : decode)) continue;
        sum += pixels * (double)row->size;
        if (strstr(row->name, ".q.weight")) sum += 2 * pixels * pixels * (double)row->dim[0]; /* of the attention */
    }
    return 2 * (double)B * sum;
}

#endif
