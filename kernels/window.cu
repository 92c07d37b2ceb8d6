/* window.cu - what a result of a convolution sees of its source, on a GPU; and packs of numbers that a thread moves. */
#include "kernels/device.h"

enum { CELL_THREADS = 256 }; /* of a block where a thread has an element or PACK of them */

/* ---- Windows ----
 *
 * On the GPU pictures lie as (B,h,w,C), so that a pixel is a row of C neighbours and every array is a matrix of B*h*w
 * rows. Convolutions are matrix products of rows gathered from around a pixel (its patch) with weights put in the same
 * order; 1x1 ones need no gathering. Activations and their gradients are floatX; sums and the gradients of parameters
 * are float, and every sum has an order that depends on sizes alone.
 *
 * A patch is read through a window of side x side pixels: along each axis, result i of the grid sees pixels
 * (stride*i - pad + k) >> shift, k = 0..side-1, where shift = 1 is nearest doubling. */
typedef struct {
    size_t C, gh, gw;                    /* channels of the source; grid of results */
    size_t h, w;                         /* source before the shift; pixels beyond are 0 */
    int side, stride, pad, pad_x, shift; /* pad_x: the same as pad, but for phase_window */
    size_t pitch;                        /* of a patch: side*side*C, rounded up to whole packs */
} Window;

static Window make_window(size_t C, size_t gh, size_t gw, size_t h, size_t w, int side, int stride, int pad,
                          int shift) {
    Window p = {C, gh, gw, h, w, side, stride, pad, pad, shift, 0};
    p.pitch = round_up((size_t)(side * side) * C, PACK);
    return p;
}

/* What a result of c sees of x. */
static Window forward_window(const Conv *c) {
    switch (c->kind) {
    case CONV_DOWN: return make_window(c->C, c->h / 2, c->w / 2, c->h, c->w, 3, 2, 0, 0);
    case CONV_UP: return make_window(c->C, 2 * c->h, 2 * c->w, 2 * c->h, 2 * c->w, 3, 1, 1, 1);
    default: return make_window(c->C, c->h, c->w, c->h, c->w, 3, 1, 1, 0);
    }
}

/* Where the gradient of a pixel of x comes from in dy. After doubling a pixel has four results' worth of it: windows of
 * 3x3 around each of 2x2 results make one of 4x4. Not for CONV_DOWN. */
static Window backward_window(const Conv *c) {
    if (c->kind == CONV_UP) return make_window(c->M, c->h, c->w, 2 * c->h, 2 * c->w, 4, 2, 1, 0);
    return make_window(c->M, c->h, c->w, c->h, c->w, 3, 1, 1, 0);
}

/* Where each of 2x2 neighbours is a sum of its own, four phases: the pixels of every second row and column, the first or
 * the second of two, see 2x2 pixels of a source (h,w) that is half as large. A result of phase 0 sees the pixel before
 * its own and its own, one of phase 1 its own and the next. */
static Window phase_window(size_t C, size_t gh, size_t gw, size_t h, size_t w, int phase) {
    Window p = make_window(C, gh, gw, h, w, 2, 1, 1, 0);
    p.pad -= phase / 2, p.pad_x -= phase % 2;
    return p;
}

static size_t rows_of(const Conv *c) { /* of y */
    return c->B * conv_height(c) * conv_width(c);
}

/* ---- Packs of numbers ---- */

/* Four floats, which a thread moves at once */
struct alignas(16) Floats {
    float at[4];
};

/* PACK numbers of x, which is in floatX or, in a residual stream, float */
struct Numbers {
    float at[PACK];
};
static __device__ inline Numbers numbers_at(const floatX *x, size_t i) {
    const Pack p = *(const Pack *)(x + i);
    Numbers n;
    for (int k = 0; k < PACK; k++) n.at[k] = to_float(p.at[k]);
    return n;
}
#ifdef FLOATX_BF16
static __device__ inline Numbers numbers_at(const float *x, size_t i) {
    const Floats a = *(const Floats *)(x + i), b = *(const Floats *)(x + i + 4);
    Numbers n;
    for (int k = 0; k < 4; k++) n.at[k] = a.at[k], n.at[k + 4] = b.at[k];
    return n;
}
#endif

/* Pairs of numbers for PACK channels, from a multiple of 16 bytes: what lanes read lies far apart, so four at a time */
struct Pairs {
    float at[2 * PACK];
};
static __device__ inline Pairs pairs_at(const float *x) {
    Pairs p;
#pragma unroll
    for (int k = 0; k < PACK / 2; k++) {
        const Floats four = *(const Floats *)(x + 4 * k);
        for (int j = 0; j < 4; j++) p.at[4 * k + j] = four.at[j];
    }
    return p;
}

/* To bf16's precision where results are bf16: two instructions instead of some twenty. */
static __device__ inline float sigmoid(float t) {
#ifdef FLOATX_BF16
    return reciprocal_approx(1 + exp2_approx(-1.44269504f * t));
#else
    return 1 / (1 + expf(-t));
#endif
}

/* What group norm makes of PACK numbers, whose channels have these pairs of scale and shift. */
static __device__ inline Pack normed(const Numbers &x, const Pairs &scale, int swish) {
    Pack out;
#pragma unroll
    for (int j = 0; j < PACK; j++) {
        const float t = x.at[j] * scale.at[2 * j] + scale.at[2 * j + 1];
        out.at[j] = to_floatX(swish ? t * sigmoid(t) : t);
    }
    return out;
}
