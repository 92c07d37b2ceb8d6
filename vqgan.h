/* vqgan.h - what vqgan_layers.c and vqgan.c share: the network as a list of layers, and what each layer does. Nobody else
 * includes it; what others may use is in imagebart.h. */
#ifndef VQGAN_H
#define VQGAN_H

#include "imagebart.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    GROUPS = 32, /* of every GroupNorm */
    CODES = 512, /* codebook entries compared at a time */
    SPOTS = 256  /* latents compared at a time */
};
#define NONE ((size_t)-1) /* no value, no row, no memory */

typedef enum { CONV, NORM, ATTEND, QUANTIZE, TANH } Kind;

typedef struct {
    Kind kind;
    ConvKind conv;       /* CONV */
    size_t in[3], out;   /* values; in[1], in[2] only for ATTEND: q, k, v */
    size_t add;          /* convolutions: a value added to the result, or NONE */
    size_t weight, bias; /* rows of the parameter table, or NONE */
    int swish;           /* NORM: followed by x*sigmoid(x) */
    int more[3];         /* backward: in[i] already holds a gradient, add to it */
    size_t saved;        /* offset of what forward keeps: NORM (B,32,2), ATTEND (B,N,N) */
    size_t scratch;      /* offset of what backward needs: ATTEND (B,N,N) */
} Layer;

typedef struct {
    size_t C, level;  /* (B, C, H >> level, W >> level) */
    size_t act, grad; /* offsets in the arena; NONE: the caller's memory */
} Value;

struct Vqgan {
    VqganConfig c;
    Params params;
    Layer *layer;
    Value *value;
    size_t n_layers, n_values;
    Err broken;                          /* while building */
    size_t quantize, image, z, zq, xrec; /* layer; values */
    size_t codebook;                     /* row */
    int32_t *used, *inverse;             /* (re_embed), (n_embed): -1 = not in used */
    /* the plan */
    size_t B, H, W;
    int train;
    ConvScratch scratch;
    size_t scratch_at, raw, code_norm, image_loss; /* offsets */
    real *arena;
    /* the present run */
    size_t b, h, w; /* batch, picture */
    int ready;      /* vqgan_forward ran: backward may, once, for it reuses the activations' memory */
    int latents;    /* z, z_q and the codes of a forward stand */
    real **x, **dx; /* where every value and its gradient lie */
};

/* ---- vqgan_layers.c. Layers read and write values where v->x and v->dx say; backward overwrites the gradient of what
 *      forward read, or adds to it where Layer.more says so, and adds to the gradients of parameters. ---- */

size_t plane_size(const Vqgan *v, size_t value); /* h*w of a value in the present run */
Conv layer_conv(const Vqgan *v, const Layer *l);
void conv_layer_forward(Vqgan *v, const Layer *l);
void conv_layer_backward(Vqgan *v, const Layer *l);
void group_norm_forward(Vqgan *v, const Layer *l);
void group_norm_backward(Vqgan *v, const Layer *l);
void spatial_attention_forward(Vqgan *v, const Layer *l);
void spatial_attention_backward(Vqgan *v, const Layer *l);
void quantize_forward(Vqgan *v, const Layer *l);
void quantize_backward(Vqgan *v, const Layer *l, double loss_weight);
void tanh_forward(Vqgan *v, const Layer *l);
void tanh_backward(Vqgan *v, const Layer *l);

/* raw (B,N) = nearest codebook entries of z (B,D,N) */
void nearest_codes(Vqgan *v, const real *z, size_t B, size_t N, int32_t *raw);
/* tokens (B,N) = raw remapped; a code that the table lacks becomes a random token */
void remap_codes(const Vqgan *v, const int32_t *raw, size_t B, size_t N, uint64_t seed, int32_t *tokens);
/* (1 + beta) mean (e-z)^2 over `elements` numbers, after quantize_forward */
double codebook_loss_value(const Vqgan *v, size_t elements);

#ifdef __cplusplus
}
#endif
#endif
