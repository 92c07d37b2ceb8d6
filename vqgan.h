/* vqgan.h - what vqgan_layers.c and vqgan.c share: the network as a list of layers, and what each layer does. Nobody
 * else includes it; what others may use is in imagebart.h. */
#ifndef VQGAN_H
#define VQGAN_H

#include "kernels/device.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    CODES = 512,      /* codebook entries compared at a time */
    SPOTS = 256       /* latents compared at a time */
};
#define NO_VALUE ((size_t)-1) /* no value, no row, no memory */

typedef enum { VQ_CONV, VQ_NORM, VQ_ATTEND, VQ_QUANTIZE, VQ_TANH } VqKind;

typedef struct {
    VqKind kind;
    ConvKind conv;       /* VQ_CONV */
    size_t in[3], out;   /* values; in[1], in[2] only for VQ_ATTEND: q, k, v */
    size_t add;          /* convolutions: a value added to the result, or NO_VALUE */
    size_t weight, bias; /* rows of the parameter table, or NO_VALUE */
    int swish;           /* VQ_NORM: followed by x*sigmoid(x) */
    int more[3];         /* backward: in[i] already holds a gradient, add to it */
    size_t complete;     /* after its backward the gradients of rows from here on are complete */
    size_t saved;        /* offset of what forward keeps: VQ_NORM (B,32,2), VQ_ATTEND (B,N,N) */
    size_t scratch;      /* offset of what backward needs: VQ_ATTEND (B,N,N) */
} VqLayer;

typedef struct {
    size_t C, level;  /* (B, C, H >> level, W >> level) */
    size_t act, grad; /* offsets in the arena; NO_VALUE: the caller's memory */
} VqValue;

typedef struct VqTwin VqTwin; /* the plan on a GPU */

struct Vqgan {
    VqganConfig c;
    Params params;
    VqLayer *layer;
    VqValue *value;
    size_t n_layers, n_values;
    Err broken;                          /* while building */
    size_t quantize, image, z, zq, xrec; /* layer; values */
    size_t codebook;                     /* row */
    int32_t *used, *inverse;             /* (re_embed), (n_embed): -1 = not in used */
    /* the plan. Offsets are in units: a real on the CPU; on a GPU a number as activations are kept there, and then the
     * arena here has only what callers see */
    size_t B, H, W;
    int train;
    Compute on;
    size_t scratch_at, raw, code_norm, image_loss; /* offsets */
    size_t shown[3];                               /* on a GPU: where z, z_q and the reconstruction are shown */
    real *arena;
    VqTwin *twin; /* NULL on the CPU */
    size_t units; /* of the arena */
    /* the present run */
    size_t b, h, w; /* batch, picture */
    int ready;      /* vqgan_forward ran: backward may, once, for it reuses the activations' memory */
    int latents;    /* z, z_q and the codes of a forward stand */
    real **x, **dx; /* where every value and its gradient lie */
};

/* What a norm of C channels keeps on a GPU: mean and 1/deviation of every group, scale and shift of every channel. */
static inline size_t norm_kept_floats(size_t B, size_t C) {
    return B * (2 * NORM_GROUPS + 2 * C);
}

/* Weights of the two terms of the codebook loss, which has `elements` numbers: to the latents, to the codebook. */
static inline void codebook_weights(const VqganConfig *c, double weight, size_t elements, real *to_z, real *to_e) {
    const double unit = 2 * weight / (double)elements;
    *to_z = (real)(unit * (c->legacy ? 1 : c->beta));
    *to_e = (real)(unit * (c->legacy ? c->beta : 1));
}

/* Where backward ends: nothing in front of the quantiser needs a gradient when encoder and codebook are not trained. */
static inline size_t backward_end(const Vqgan *v, int image_wanted) {
    const Param *row = v->params.row;
    const int frozen = row[v->layer[0].weight].untrained && row[v->codebook].untrained;
    return frozen && !image_wanted ? v->quantize + 1 : 0;
}

/* ---- vqgan_layers.c. Layers read and write values where v->x and v->dx say; backward overwrites the gradient of what
 *      forward read, or adds to it where Layer.more says so, and adds to the gradients of parameters. ---- */

size_t plane_size(const Vqgan *v, size_t value); /* h*w of a value in the present run */
Conv layer_conv(const Vqgan *v, const VqLayer *l);
void conv_layer_forward(Vqgan *v, const VqLayer *l);
void conv_layer_backward(Vqgan *v, const VqLayer *l);
void group_norm_forward(Vqgan *v, const VqLayer *l);
void group_norm_backward(Vqgan *v, const VqLayer *l);
void spatial_attention_forward(Vqgan *v, const VqLayer *l);
void spatial_attention_backward(Vqgan *v, const VqLayer *l);
void quantize_forward(Vqgan *v, const VqLayer *l);
void quantize_backward(Vqgan *v, const VqLayer *l, double loss_weight);
void tanh_forward(Vqgan *v, const VqLayer *l);
void tanh_backward(Vqgan *v, const VqLayer *l);

/* raw (B,N) = nearest codebook entries of z (B,D,N) */
void nearest_codes(Vqgan *v, const real *z, size_t B, size_t N, int32_t *raw);
/* tokens (B,N) = raw remapped; a code that the table lacks becomes a random token */
void remap_codes(const Vqgan *v, const int32_t *raw, size_t B, size_t N, uint64_t seed, int32_t *tokens);
/* (1 + beta) mean (e-z)^2 over `elements` numbers: from their sum, or after quantize_forward */
double codebook_loss_of(const VqganConfig *c, double sum, size_t elements);
double codebook_loss_value(const Vqgan *v, size_t elements);

#ifdef __cplusplus
}
#endif
#endif
