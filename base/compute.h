/* compute.h - where a network computes: the seam between the plain layers and their fast versions.
 *
 * Every layer of the networks is a plain loop: in vqgan.c, in transformer.cu, and for what only training needs in
 * training/. That loop is the definition. In its first line it hands over to its fast version, its fellow of the
 * same name, if the network has one: the CPU's (kernels/fast.c), or a GPU's (kernels/layers.cu, in float or in
 * bf16).
 *
 *     void gelu_backward(const Compute *on, real *dh, const real *dg, size_t R, size_t H) {
 *         if (on->fast) return on->fast->gelu_backward(on, dh, dg, R, H);
 *         for (size_t i = 0; i < R * H; i++) dh[i] *= dg[i];
 *     }
 *
 * A few cheap layers (tanh, codes) are fast enough on a CPU as they stand: they ask on->device instead.
 *
 * So a network's walk is written once, and calls the same layers wherever it computes.
 *
 * Pointers are addresses where the network computes. On a CPU numbers are real. On a GPU activations are as its kernels
 * have them (floatX: float, or bf16), and lie as (B,h,w,C) where vqgan.c says (B,C,h,w); what is marked f32 below is
 * float on every GPU. Parameters and their gradients are f32; kernels find a parameter's bf16 copy by its place.
 *
 * A layer cannot fail on a CPU. On a GPU the first failure sticks to the device, and compute_status gives it; also that
 * the work is to stop (work_ask), when what was computed is not whole. */
#ifndef COMPUTE_H
#define COMPUTE_H

#include "base/params.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct Compute Compute;
typedef struct Layers Layers;
typedef struct DeviceOps DeviceOps;
struct Plan;
typedef struct Device Device; /* a GPU's stream, and a parameter table's copy there */

/* ---- Where a network computes ---- */

struct Compute {
    const Layers *fast;   /* the fellows of the plain layers; NULL: the plain loops themselves */
    const DeviceOps *ops; /* of the GPU, whose fellows they are; NULL: this processor's */
    Device *device;
    size_t unit;          /* bytes of a number of an activation */
    Precision precision;  /* of products on this processor: the parameter table's */
    int threads;          /* that the scratch memory is for */
    void *scratch;        /* what layers work in, one after the other */
    size_t scratch_bytes; /* the most that any of them needs */
};

/* Where the network of this table computes, from the next plan on; of none (NULL): this processor. Scratch is still to be
 * planned. */
Compute compute_of(const Params *p);
/* This processor's fellows, whoever else computes; NULL in a program without kernels/ (PLAIN=1). */
const Layers *layers_here(void);
const char *precision_name(Precision p); /* f32, bf16x3, bf16 */
/* Another name is an error, of this option. */
Err precision_read(Precision *p, const char *name, const char *option);
/* What a processor multiplies where nobody says anything: f32. bf16x3 is faster where there are tiles, but in logits
 * it errs 15 times as much: by up to 2.5e-5 of the largest, where 1e-4 is allowed, and less than a tenth of that is
 * wanted. */
Precision precision_usual(void);
/* OK, or an error: products of operands in bf16 are those of kernels/. */
Err precision_there(Precision p);
/* "bf16", and whether that is slower here than f32 */
enum { PRECISION_TEXT = 64 };
const char *precision_text(char text[PRECISION_TEXT], Precision p);
/* Tests: networks that are planned from now on compute with the plain loops. */
void compute_plainly(int plainly);
/* A layer will need so many bytes of scratch. */
static inline void compute_needs(Compute *on, size_t bytes) {
    on->scratch_bytes = max_size(on->scratch_bytes, bytes);
}
/* Memory where it computes: bytes of it, not cleared on a GPU; given back; cleared. */
Err compute_alloc(const Compute *on, void *out_pointer, size_t bytes, const char *what);
void compute_free(const Compute *on, void *p);
void compute_zero(const Compute *on, void *p, size_t bytes);
void compute_copy(const Compute *on, void *to, const void *from, size_t bytes); /* within that memory */
/* Bytes from the host to where it computes, and back (which waits until they are there). */
void compute_put(const Compute *on, void *to, const void *from, size_t bytes);
Err compute_get(const Compute *on, void *to, const void *from, size_t bytes);
/* The caller's (B,C,hw) numbers as a value where it computes: on a CPU *value points at them, which are only read; on a
 * GPU they are copied to where it points, by way of the scratch. Then a value to the caller. */
void compute_lend(const Compute *on, real **value, const real *planes, size_t B, size_t C, size_t hw);
Err compute_hand_back(const Compute *on, real *planes, const real *value, size_t B, size_t C, size_t hw);
/* An error, "`what` gives ...", if a value has numbers whose squares do not add up: NaN, infinite or beyond USABLE_MOST. */
Err compute_usable(const Compute *on, const real *value, size_t B, size_t C, size_t hw, const char *what);
#define USABLE_MOST 1e15
/* Counts whatever changes the parameters' values on a GPU: what a network has prepared from them is then too old. */
uint64_t compute_changes(const Compute *on);
/* An error if attention with heads of D channels is not possible where it computes. */
Err compute_heads_fit(const Compute *on, size_t D, int train);
/* The f32 copy of x, which has n numbers: it lies behind them. And how many bytes such a value takes. */
enum { F32_COPY_ALIGNMENT = 256 };
static inline float *compute_f32_copy(const Compute *on, const void *x, size_t n) {
    return (float *)(void *)((char *)x + round_up(n * on->unit, F32_COPY_ALIGNMENT));
}
static inline size_t compute_bytes(const Compute *on, size_t n, int f32_copy) {
    return f32_copy ? round_up(n * on->unit, F32_COPY_ALIGNMENT) + n * sizeof(float) : n * on->unit;
}
/* Number n of an array of activations */
static inline real *compute_at(const Compute *on, real *x, size_t n) {
    return (real *)(void *)((char *)x + n * on->unit);
}
/* The first failure of a layer on a GPU; OK on a CPU. */
Err compute_status(const Compute *on);
/* The memory of a network: the areas of its plan, and the scratch of its layers. *bytes: all of it. memory: where it then
 * lies, and the plan's targets point into it; NULL: it is only counted. Frees the plan. */
Err compute_memory(Compute *on, struct Plan *plan, void **memory, size_t *bytes);
/* Does work(context). On a GPU, where that only launches kernels, and always the same ones while key is the same (sizes,
 * addresses), they are recorded the second time, and from then on launched all at once. forget: when addresses change. */
enum { REPLAY_KEY = 4 };
Err compute_replay(const Compute *on, void **recorded, const size_t key[REPLAY_KEY], void (*work)(void *),
                   void *context);
void compute_forget(const Compute *on, void **recorded);
/* A parameter and its gradient where the network computes. */
const real *param_value(const Params *p, size_t row);
real *param_grad(const Params *p, size_t row);
/* An error unless the parameters have values where the network computes. what: whose they are. */
Err params_there(const Params *p, const char *what);

/* ---- Shapes ---- */

/* Convolutions, with bias, of (B,C,h,w) arrays. CONV1 is 1x1, the others 3x3 with zeros around: CONV3 at every pixel;
 * CONV_DOWN at every second, padded right and below only (h and w even); CONV_UP after nearest doubling. */
typedef enum { CONV1, CONV3, CONV_DOWN, CONV_UP } ConvKind;
typedef struct {
    ConvKind kind;
    size_t B, C, M, h, w; /* x (B,C,h,w) -> y (B,M, ..): h x w, half of it, or double */
    /* GPUs in bf16 keep residual streams in f32 too: behind the bf16 numbers (compute_f32_copy). */
    int y_f32, add_f32; /* y, add have such a copy */
    int y_f32_only;     /* nobody reads the bf16 numbers of y: they need not be written */
    void *prepared;     /* a GPU: the weights in the order of patches, from conv_prepare; else NULL */
    /* GPUs may compute a group norm while reading its input, which x then is (conv_norms); y's moments are for the norm
     * that comes next (conv_parts). */
    const real *norm; /* what group_norm_forward kept, or NULL: x is read as it is */
    int norm_swish, norm_f32;
    void *moments; /* (B,conv_parts,3,M) floats: y's count, mean and sum of squares around it, or NULL: not wanted */
} Conv;

static inline size_t conv_height(const Conv *c) { /* of y */
    return c->kind == CONV_UP ? 2 * c->h : c->kind == CONV_DOWN ? c->h / 2 : c->h;
}
static inline size_t conv_width(const Conv *c) {
    return c->kind == CONV_UP ? 2 * c->w : c->kind == CONV_DOWN ? c->w / 2 : c->w;
}

/* Group norm of x (B,C,hw) in 32 groups of C/32 neighbouring channels. */
enum { NORM_GROUPS = 32 };
typedef struct {
    size_t B, C, hw;
    int swish;           /* y = swish(t), else y = t */
    int x_f32;           /* a GPU in bf16: x has an f32 copy, which is read */
    int deferred;        /* y is not written: the convolution that reads it norms x itself */
    const void *moments; /* (B,parts,3,C) of x: Conv.moments; or NULL */
    size_t parts;
} GroupNorm;

/* Entries of the codebook (K,D) for latents z (B,D,N). */
typedef struct {
    size_t B, D, N, K;
} Codes;

/* A row of a decoding pass: position pos of batch row b, which sees the keys 0..visible-1 of that row. */
typedef struct {
    size_t b, pos, visible;
} Position;

/* Attention of Tq queries to Tk keys, in `heads` heads of D channels each; inner = heads*D. */
enum { HEAD_MAX = 1024 }; /* channels of a head */
typedef struct {
    size_t B, heads, D, Tq, Tk;
    size_t key_stride; /* positions from one batch row's keys to the next's, >= Tk */
    int causal;        /* query i sees keys 0..i; Tq = Tk */
    size_t unmasked;   /* and the first `unmasked` positions see each other */
    /* Decoding, from kept keys and values: (Tq) which positions the queries are; B = 1. Each sees what its position says
     * or, when Tk > 0, keys 0..Tk-1 of its row. NULL: all positions of all rows. */
    const Position *position;
    int kept_bf16; /* kept keys and values are bf16, else real */
    /* Numbers from row to row of q, and of k and v, which a GPU may have side by side; 0: heads*D */
    size_t q_row, kv_row;
} Attention;

/* A convolution of 4x4 windows, one pixel of zeros around: x (C,B,H,W) -> y (M,B,h,w), h = (H-2)/stride + 1. */
enum { CONV4_SIDE = 4, CONV4_TAPS = CONV4_SIDE * CONV4_SIDE };
typedef struct {
    size_t B, C, M, H, W, stride;
    void *prepared; /* a GPU: the weights in the order of patches, from conv4_prepare; else NULL */
} Conv4;
static inline size_t conv4_side(size_t H, size_t stride) { /* h of H, w of W */
    return (H - CONV4_SIDE + 2) / stride + 1;
}

/* Of y (M,n), channel by channel: batch norm, or a bias alone, then leaky ReLU. */
typedef struct {
    size_t M, n;                                /* channels; numbers of each, B*h*w */
    real slope;                                 /* of leaky ReLU below 0; 1: there is none */
    double eps, momentum;                       /* of the norm */
    const real *gamma, *beta;                   /* (M) scale and shift; gamma NULL: no norm, beta is the bias */
    real *mean, *rstd;                          /* (M) of the norm: what forward leaves for backward. f32 */
    real *running_mean, *running_var, *tracked; /* (M), (M), (1) buffers that follow the batch; NULL: they stay */
} Activation;

/* Features of two pictures that are compared, (B,C,hw). */
typedef struct {
    size_t B, C, hw;
    double weight;  /* of the gradient */
    int accumulate; /* which is added */
} TapShape;

/* ---- Guessing tokens ahead: kernels/guess.c for diffusion.c ---- */

/* One of the n samples that are drawn side by side. All zero when a scale begins. */
typedef struct {
    size_t at;            /* the position that is drawn next */
    size_t first, length; /* its part of the block: positions at .. at+length-1, entries first .. of the block */
    /* guess_block's own */
    size_t judged;                                /* positions before this one have been compared with their guesses */
    size_t tried, right;                          /* tokens of this pass that were guessed, and guessed right */
    double same_tried, same_right;                /* counts where both drafts agree */
    double differ_tried, x_t_right, before_right; /* counts where they differ */
    double chance, gain;                          /* of the block: see kernels/guess.c */
    size_t best;
} Sample;

/* What a pass of the decoder multiplies and reads: `numbers` weights for each position; weight_bytes of them from
 * memory, once for the whole block; kept_bytes of keys and values for each batch row, on average over all positions. */
typedef struct {
    double numbers, weight_bytes, kept_bytes;
} DecodeReads;

/* What guess_block reads and writes. */
typedef struct {
    size_t n, N;                 /* samples; positions of each */
    size_t end;                  /* positions from here on are known: they need not be fed */
    size_t most;                 /* positions of one sample in a block, at most */
    int always;                  /* 1: blocks as long as that; 0: as long as pays off */
    int has_drafts;              /* 0: only known tokens can be told ahead */
    int begun;                   /* 0 at the first block of a pass */
    int32_t *tokens;             /* (n,N) what is drawn before each sample's `at`; guesses are written from there on */
    const int32_t *x_t, *before; /* (n,N) two drafts of it: the scale's input; the result of the pass before */
    const int32_t *known;        /* (n,N) tokens that are forced where keep (N) is 1; both NULL: none */
    const uint8_t *keep;
    DecodeReads reads;
    size_t rows; /* the network's batch rows of a sample: 2 under guidance, else 1 */
} Guesses;

#define LAYER_NORM_EPS 1e-5

/* What the head's variants make of the raw logits r of position i, whose scale is t and whose noisier token is x:
 *     logits[k] = exp(s) r[k] + log(alpha_t [k = x] + (1 - alpha_t)/K),   s = log_scalors[t-1], or [t-1,i] if fine */
typedef struct {
    const real *log_scalors; /* (scales), or (scales,length) if fine; NULL: s = 0 */
    int fine, residual;      /* not residual: without the logarithm */
    size_t scales, length;
    const int32_t *ids; /* (B,prompt+N) what the encoder read: t, (label,) x_t[0..N-1] */
    size_t prompt, N;
    float alpha[MAX_SCALES + 1];
} Variant;

/* The numbers of one step for one tensor */
typedef struct {
    real keep, rate, inverse, eps, beta1, beta2, rest1, rest2;
    uint64_t stream; /* of random numbers, for moments in bf16 */
} AdamStep;

/* base/params.c: one step for n numbers of a tensor, and of its moving average. */
void adamw(const Compute *on, real *w, real *m, real *v, const real *g, const AdamStep *a, size_t n);
void moving_average(const Compute *on, real *ema, const real *w, real step, size_t n);

/* ---- The fellows. Outputs, then inputs, then sizes. What each computes stands with its plain loop: vqgan.c and
 *      transformer.cu. x_needs: bytes of scratch for that shape, backward too if it says so. ---- */

struct Layers {
    /* ---- vqgan.c: values (B,C,h,w). A CPU has none for straight_through and what follows ---- */
    size_t (*conv_needs)(const Compute *on, const Conv *c, int backward);
    size_t (*conv_prepared_bytes)(const Conv *c); /* 0: nothing is prepared */
    void (*conv_prepare)(const Compute *on, void *prepared, const real *w, const Conv *c);
    int (*conv_norms)(const Conv *c);    /* a GPU: can it norm what it reads? */
    size_t (*conv_parts)(const Conv *c); /* a GPU: how many moments of each channel of a picture it leaves; 0: none */
    void (*conv_forward)(const Compute *on, real *y, const real *x, const real *w, const real *bias, const real *add,
                         const Conv *c);
    void (*conv_backward)(const Compute *on, real *dx, real *dw, real *db, const real *dy, const real *x, const real *w,
                          int accumulate, const Conv *c);
    size_t (*group_norm_needs)(const Compute *on, const GroupNorm *n, int backward);
    size_t (*group_norm_kept)(const GroupNorm *n); /* bytes that forward leaves for backward */
    void (*group_norm_forward)(const Compute *on, real *y, real *kept, const real *x, const real *gamma,
                               const real *beta, const GroupNorm *n);
    void (*group_norm_backward)(const Compute *on, real *dx, real *dgamma, real *dbeta, real *dy, const real *x,
                                const real *gamma, const real *beta, const real *kept, int accumulate,
                                const GroupNorm *n);
    size_t (*picture_attention_needs)(const Compute *on, size_t B, size_t C, size_t N, int backward);
    void (*picture_attention_forward)(const Compute *on, real *y, real *p, const real *q, const real *k, const real *v,
                                      size_t B, size_t C, size_t N);
    void (*picture_attention_backward)(const Compute *on, real *dq, real *dk, real *dv, const real *dy, const real *q,
                                       const real *k, const real *v, const real *p, const int accumulate[3], size_t B,
                                       size_t C, size_t N);
    size_t (*nearest_needs)(const Compute *on, const Codes *s);
    void (*nearest_codes)(const Compute *on, int32_t *code, const real *z, const real *book, const Codes *s);
    void (*straight_through)(const Compute *on, real *zq, double *gap, const real *z, const real *book,
                             const int32_t *code, const Codes *s);
    void (*quantize_backward)(const Compute *on, real *dz, real *dbook, const real *z, const real *book,
                              const int32_t *code, double to_z, double to_e, const Codes *s);
    void (*lookup_codes)(const Compute *on, real *zq, const real *book, const int32_t *code, const Codes *s);
    void (*tanh_forward)(const Compute *on, real *y, const real *x, size_t n);
    void (*tanh_backward)(const Compute *on, real *dx, const real *dy, const real *y, size_t n);
    /* between the host's (B,C,hw) reals and a value where it computes */
    void (*put_planes)(const Compute *on, real *to, const real *planes, size_t B, size_t C, size_t hw);
    Err (*get_planes)(const Compute *on, real *planes, const real *from, size_t B, size_t C, size_t hw);

    /* ---- transformer.cu: activations (R,C). f32: x, dx, mean, rstd, logits ---- */
    void (*embed_forward)(const Compute *on, real *x, const int32_t *ids, const real *token, const real *position,
                          const Position *at, size_t B, size_t n, size_t C);
    void (*embed_backward)(const Compute *on, real *dtoken, real *dposition, const real *dx, const int32_t *ids,
                           size_t B, size_t n, size_t C, size_t V);
    size_t (*norm_needs)(const Compute *on, size_t R, size_t C);
    void (*norm_forward)(const Compute *on, real *y, real *mean, real *rstd, const real *x, const real *weight,
                         const real *bias, size_t R, size_t C, size_t n, size_t skip);
    void (*norm_backward)(const Compute *on, real *dx, real *dx_operand, real *dweight, real *dbias, const real *dy,
                          const real *x, const real *weight, const real *mean, const real *rstd, int dy_f32, size_t R,
                          size_t C, size_t n, size_t skip);
    size_t (*linear_needs)(const Compute *on, size_t R, size_t C, size_t M);
    void (*linear_forward)(const Compute *on, real *y, const real *x, const real *w, const real *bias, const real *add,
                           int y_f32, size_t R, size_t C, size_t M);
    void (*linear_backward)(const Compute *on, real *dx, real *dw, real *db, const real *dy, const real *x,
                            const real *w, int accumulate, int dx_f32, size_t R, size_t C, size_t M);
    void (*gelu_forward)(const Compute *on, real *g, real *dg, const real *bias, size_t R, size_t H);
    void (*gelu_backward)(const Compute *on, real *dh, const real *dg, size_t R, size_t H);
    size_t (*attention_needs)(const Compute *on, const Attention *s, int backward);
    size_t (*attention_saved)(const Attention *s); /* bytes that forward leaves for backward */
    void (*attention_forward)(const Compute *on, real *y, real *saved, const real *q, const real *k, const real *v,
                              const Attention *s);
    void (*attention_backward)(const Compute *on, real *dq, real *dk, real *dv, const real *dy, const real *y,
                               const real *saved, const real *q, const real *k, const real *v, const Attention *s);
    size_t (*variant_needs)(const Compute *on, size_t R);
    void (*variant_forward)(const Compute *on, real *logits, const real *raw, const Variant *v, const Position *at,
                            size_t B, size_t n, size_t K);
    void (*variant_backward)(const Compute *on, real *draw, real *dlog_scalors, const real *dlogits, const real *raw,
                             const Variant *v, size_t B, size_t n, size_t K);
    /* ---- what a GPU does in another way: fused_loss and update of DeviceOps. Updates: base/params.c ---- */
    void (*denoising_loss)(const Compute *on, double sums[2], real *dlogits, const real *logits, const int32_t *target,
                           const real *posterior, real soft_weight, real hard_weight, size_t R, size_t K);
    void (*adamw)(const Compute *on, real *w, real *m, real *v, const real *g, const AdamStep *a, size_t n);
    void (*adamw_bf16)(const Compute *on, real *w, uint16_t *m, uint16_t *v, const real *g, const AdamStep *a,
                       size_t n);
    void (*ema)(const Compute *on, real *ema, const real *w, real step, size_t n);

    /* ---- Keys and values kept while decoding. The GPU only takes whole contexts; its loop is DeviceOps' ---- */
    size_t (*kept_bytes)(const Compute *on, const Attention *s); /* of the keys of a layer, as many of its values */
    void (*keep_positions)(const Compute *on, void *kept, const real *x, size_t n, const Attention *s);
    void (*attention_from_kept)(const Compute *on, real *y, const real *q, const void *k, const void *v,
                                const Attention *s);
    /* ---- Few rows, on a CPU alone: products that stream weights by ---- */
    size_t (*stream_needs)(const Compute *on, size_t R, size_t C);
    void (*linear_stream)(const Compute *on, real *y, const real *x, const Weights *w, const real *bias,
                          const real *add, size_t R, size_t C, size_t M);
    size_t (*weights_bytes)(WeightFormat format, size_t N, size_t K);
    void (*weights_pack)(WeightFormat format, void *data, float *scale, const real *x, size_t j, size_t K);

    /* ---- training/discriminator.c: values (C,B,h,w) ---- */
    size_t (*conv4_needs)(const Compute *on, const Conv4 *c);
    void (*conv4_forward)(const Compute *on, real *y, const real *x, const real *w, const Conv4 *c);
    void (*conv4_backward)(const Compute *on, real *dx, real *dw, const real *dy, const real *x, const real *w,
                           const Conv4 *c);
    size_t (*activate_needs)(const Compute *on, const Activation *s);
    void (*activate_forward)(const Compute *on, real *a, const real *y, const Activation *s);
    void (*activate_backward)(const Compute *on, real *g, real *dgamma, real *dbeta, const real *a, const real *y,
                              const real *other, double step, const Activation *s);
    /* a GPU alone */
    size_t (*conv4_prepared_bytes)(const Conv4 *c);
    void (*conv4_prepare)(const Compute *on, void *prepared, const real *w, const Conv4 *c);
    double (*feature_gap)(const Compute *on, const real *a, const real *other, size_t n);
    /* ---- training/perceptual.c: values (B,C,h,w) ---- */
    void (*relu_forward)(const Compute *on, real *y, size_t n);
    void (*relu_backward)(const Compute *on, real *dy, const real *y, size_t n);
    void (*pool_forward)(const Compute *on, real *y, const real *x, size_t B, size_t C, size_t h, size_t w);
    void (*pool_backward)(const Compute *on, real *dx, const real *dy, const real *x, size_t B, size_t C, size_t h,
                          size_t w);
    size_t (*comparison_sums)(size_t B, size_t hw); /* how many */
    void (*compare_features)(const Compute *on, double *sums, real *dr, const real *a, const real *r, const real *lin,
                             const TapShape *c);
    /* a GPU alone, by way of on->scratch: B*3*hw reals */
    void (*put_scaled)(const Compute *on, real *x, const real *pictures, const double *shift, const double *scale,
                       size_t B, size_t hw);
    Err (*get_scaled)(const Compute *on, real *dpictures, const real *dx, const double *scale, size_t B, size_t hw);

    int (*multiplies_fast)(Precision p); /* at least as fast as in f32? */

    /* ---- diffusion.c, on a CPU alone ---- */
    void (*guess_block)(Sample *sample, Guesses *g);
};

/* Before on->scratch is planned: a convolution will need scratch. backward: 0 no, 1 yes, 2 of dx alone. */
static inline void conv_needs(Compute *on, const Conv *c, int backward) {
    if (on->fast) compute_needs(on, on->fast->conv_needs(on, c, backward));
}
/* As Layers say; 0 on a CPU. */
static inline int conv_norms(const Compute *on, Conv c) {
    return on->device && on->fast->conv_norms(&c);
}
static inline size_t conv_parts(const Compute *on, Conv c) {
    return on->device ? on->fast->conv_parts(&c) : 0;
}

/* ---- The GPU, if the program was built with nvcc ---- */

/* Is there one? text (CUDA_TEXT_BYTES): its name, compute capability and memory; free, total: bytes of it. Each may be
 * NULL. FAILED says why not: a program without CUDA, no driver, no GPU, too old a GPU. */
enum { CUDA_TEXT_BYTES = 320 };
int cuda_built(void); /* was this program made with CUDA? */
Err cuda_find(char *text, size_t *free_bytes, size_t *total_bytes);
/* Of several processes on a machine each takes one GPU: before anything else, the one of this number among those that it
 * sees, which may be one alone, its own (then again from 0); id: which one that is, of all in the world. */
enum { GPU_ID_BYTES = 16 };
Err cuda_choose(size_t local, unsigned char id[GPU_ID_BYTES]);
/* What the GPU can do at best, for test/bench_cuda.c: seconds (medians) that a product of two n x n matrices takes, as
 * the networks multiply them, and a copy of `bytes` from one place in its memory to another, which reads and writes
 * them. */
Err cuda_measure(Precision precision, size_t n, size_t bytes, double *product, double *copy);
Err use_cuda(Params *p, Precision precision); /* makes the table's copy there, for params_send to fill */
/* Where to compute: as device says, "cpu" or "cuda", which has to be built in and there; NULL: as IMAGEBART_DEVICE in the
 * environment says, else on a GPU if there is one. */
typedef enum { DEVICE_CPU, DEVICE_NO_GPU /* the CPU, for none was found */, DEVICE_CUDA } DevicePlace;
Err device_choose(DevicePlace *place, const char *device);
/* For programs: is it the GPU? Dies on error. say_cpu: a line on stderr, where there was a choice, and
 * one where the system refuses AMX. */
int check_device(const char *device);
void say_cpu(void);

/* ---- What a GPU does whole ---- */

/* Losses of training and the gradient of raw logits, in one kernel. All addresses are on the GPU. */
typedef struct {
    const real *raw; /* (B,N,K) f32 */
    real *draw;      /* (B,N,K) overwritten; NULL: no gradient */
    real *dlog_scalors;
    double *sums;                         /* (2) of the hard and the soft loss over all positions */
    const int32_t *x0, *target, *x_t, *t; /* (B,N) and t (B): x_0, x_{t-1}, x_t */
    const float *alpha, *alphacum;        /* (T+1) of the schedule, on the host */
    int T;
    Variant variant;
    size_t B, N, K;
    real soft_weight, hard_weight; /* of the gradient of one position */
} FusedLoss;

/* A decoder for the loop that draws tokens there. All addresses are on the GPU but `layer` itself. */
typedef enum { BLOCK_SELF, BLOCK_CROSS, BLOCK_FEED } BlockKind;
typedef struct {
    const real *weight, *bias; /* weight (out,in); bias (out) or NULL */
    size_t in, out;
} Projection;
typedef struct {
    BlockKind kind;
    const real *norm_weight, *norm_bias;
    Projection q, k, v, out, up, down;
    real *key, *value; /* (B,T,inner) of earlier positions, or (B,T_context,inner) of the context */
} DecoderLayer;
typedef struct {
    const DecoderLayer *layer;
    size_t n_layers, B, N, C, K, heads, D;
    size_t T, T_context; /* positions that keys have room for; of the context */
    size_t prompt;       /* positions in front of token 0's */
    int prompted;        /* the prompt has been fed, and its end gave the logits of token 0 */
    const real *token, *position, *norm_weight, *norm_bias;
    Projection head;
    Variant variant;
    int32_t *ids;                        /* (B,n) what the next pass reads */
    real *x, *mean, *rstd;               /* (B*n,C), (B*n) x2, f32 */
    real *normed, *query, *y, *g, *last; /* (B*n,C), (B*n,inner) x2, (B*n,4C), (B*n,C) */
    real *raw, *logits;                  /* (B,K) f32 */
    void *work;
} Decoder;

/* How tokens are drawn: transformer_draw_cuda of imagebart.h. */
typedef struct DrawOptions {
    uint64_t seed;
    const uint64_t *stream; /* (n) of random numbers; index = position */
    double temperature;
    size_t top_k;
    const int32_t *known; /* (n,N) tokens that are forced where keep (N) is 1; both or neither */
    const uint8_t *keep;
    double *fit;                                 /* (n) += log probability of what is forced; NULL: not wanted */
    int (*progress)(void *context, size_t done); /* now and then; nonzero return stops with an error; or NULL */
    void *context;
    int guided;
    double guidance; /* then: logits = uncond + guidance (cond - uncond) */
} DrawOptions;

enum { DEVICE_ID_BYTES = 128 };

/* Functions that return nothing keep an error for the next one that returns an Err. */
struct DeviceOps {
    Err (*find)(char *text, size_t *free_bytes, size_t *total_bytes); /* CUDA_TEXT_BYTES; NULL: not wanted */
    Err (*open)(Device **out);
    void (*close)(Device *d);
    Err (*measure)(Device *d, size_t n, size_t bytes, double *product, double *copy); /* cuda_measure */
    const Layers *layers;
    size_t unit; /* bytes of a number in an activation */
    /* memory there; put and zero do not wait, get does */
    Err (*alloc)(void *out_pointer, size_t bytes, const char *what);
    void (*free)(void *p);
    void (*put)(Device *d, void *to, const void *from, size_t bytes);
    Err (*get)(Device *d, void *to, const void *from, size_t bytes);
    void (*zero)(Device *d, void *p, size_t bytes);
    void (*copy)(Device *d, void *to, const void *from, size_t bytes); /* within that memory */
    Err (*status)(const Device *d);
    Err (*replay)(Device *d, void **recorded, const size_t *key, void (*work)(void *), void *context);
    void (*forget)(void *recorded);
    uint64_t (*changes)(const Device *d);
    real *(*value)(const Device *d, size_t row); /* where a parameter lies, and its gradient; NULL: not sent yet */
    real *(*grad)(const Device *d, size_t row);
    /* parameters: optimizer.cu. update: AdamW unless o is NULL, then the moving average unless ema_step is 0 */
    Err (*send)(Device *d, const Params *p);
    Err (*fetch)(Device *d, Params *p);
    void (*send_part)(Device *d, const Params *p, size_t row, size_t at, size_t n);
    void (*zero_grad)(Device *d);
    double (*grad_norm)(Device *d);
    void (*swap_ema)(Device *d);
    void (*update)(Device *d, const Params *p, const AdamW *o, uint64_t step, float ema_step);
    /* transformers: what is not made of layers. heads_fit: an error if attention cannot have heads of D channels. */
    Err (*heads_fit)(const Device *d, size_t D, int train);
    size_t (*fused_loss_needs)(size_t R);
    Err (*fused_loss)(const Compute *on, const FusedLoss *l);
    size_t (*decode_needs)(const Decoder *s); /* bytes of Decoder.work */
    Err (*decode_prompt)(Device *d, const Decoder *s, size_t n);
    Err (*decode_step)(Device *d, const Decoder *s, size_t pos);
    Err (*draw)(Device *d, const Decoder *s, const DrawOptions *o, int32_t *tokens);
    /* several GPUs, one for each rank of parallel.c: nccl.cu. choose: the GPU of the rank of this number on
     * its machine. join_id: what the ranks find each other by, drawn by one of them. place: where a row lies in the
     * values, the gradient and so on of a table that is trained, sent or not; row n: their length. grad_sum: n numbers
     * of the gradient become the sum over ranks, while the GPU goes on; grad_wait: what follows waits for that. */
    Err (*choose)(size_t local, unsigned char id[GPU_ID_BYTES]);
    int (*joined)(const Device *d);
    Err (*join_id)(unsigned char id[DEVICE_ID_BYTES]);
    Err (*join)(Device *d, const unsigned char id[DEVICE_ID_BYTES], int ranks, int rank);
    size_t (*place)(const Params *p, size_t row); /* optimizer.cu */
    Err (*grad_sum)(Device *d, size_t from, size_t n);
    Err (*grad_wait)(Device *d);
};

#ifdef __cplusplus
}
#endif
#endif
