/* discriminator.h - what discriminator.c and its twin on a GPU, discriminator.cu, share. */
#ifndef DISCRIMINATOR_H
#define DISCRIMINATOR_H

#include "kernels/device.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
    KERNEL = 4, /* cells along each side */
    TAPS = KERNEL * KERNEL,
    MAX_LAYERS = 16 /* n_layers */
};
#define NONE ((size_t)-1)
static const double BATCH_EPS = 1e-5, MOMENTUM = 0.1;
static const real SLOPE = (real)0.2; /* of leaky ReLU below 0 */

typedef struct {
    size_t C, M, stride; /* channels read and written */
    size_t weight, bias; /* rows of the table; bias NONE where a norm follows */
    size_t norm;         /* first of its five rows, or NONE */
    int leaky;
    size_t H, W, h, w, n; /* planned: reads (C,B,H,W), writes (M,B,h,w); n = B*h*w */
    real *y, *a;          /* (M,n) products; what leaves the layer (the same where there is no norm) */
    real *kept;           /* (M,n) another batch's a, for feature matching */
    real *mean, *rstd;    /* (M) of a norm */
} DiscLayer;

typedef struct DiscTwin DiscTwin; /* the plan on a GPU */

struct Discriminator {
    DiscConfig c;
    Params params;
    DiscLayer layer[MAX_LAYERS + 2];
    size_t n_layers;
    size_t B;
    int features;                 /* planned with room for them */
    real *arena, *columns, *g[2]; /* g: gradients of a layer's result, of what it read */
    size_t used;                  /* reals of the arena */
    const real *images;           /* of the last forward; the caller's */
    DiscTwin *twin;               /* NULL on the CPU; then the arena here has the logits alone */
};

#endif
