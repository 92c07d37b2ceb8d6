/* perceptual.h - what perceptual.c and its twin on a GPU, perceptual.cu, share. */
#ifndef PERCEPTUAL_H
#define PERCEPTUAL_H

#include "kernels/device.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_CONVS = PERCEPTUAL_STAGES * PERCEPTUAL_DEPTH };

/* Of the network's input, by channel: pictures in [-1,1] to what VGG16 was trained on. */
static const double input_shift[3] = {-0.030, -0.088, -0.188}, input_scale[3] = {0.458, 0.448, 0.450};

typedef struct {
    size_t C, M, weight, bias; /* rows of the table */
    real *y;                   /* (2b,M,h,w) after the relu */
} VggConv;

typedef struct PerceptualTwin PerceptualTwin; /* the plan on a GPU */

struct Perceptual {
    PerceptualConfig c;
    Params params;
    VggConv conv[MAX_CONVS];
    size_t first[PERCEPTUAL_STAGES + 1]; /* convolution of each stage; their number */
    size_t lin[PERCEPTUAL_STAGES];       /* rows */
    /* the plan */
    size_t b, H, W; /* pictures at once */
    int backward;
    Compute on;
    real *arena, *input;             /* input (2b,3,H,W) */
    real *pooled[PERCEPTUAL_STAGES]; /* (2b,C,h,w) what the first convolution of a stage reads; [0] is the input */
    real *dy, *dx;                   /* gradients of xrec's half, taking turns */
    double *sums;                    /* of blocks of cells */
    PerceptualTwin *twin;            /* NULL on the CPU; then the arena stays empty */
};

static Conv shape_of(const Perceptual *p, const VggConv *l, size_t stage, size_t pictures) {
    const Conv c = {CONV3, pictures, l->C, l->M, p->H >> stage, p->W >> stage};
    return c;
}

#endif
