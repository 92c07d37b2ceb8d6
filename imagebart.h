/* imagebart.h - the components: their types and calls, in the order in which data flows through them.
 *
 *     pictures -> data.c -> vqgan.c -> tokens -> diffusion.c (noise) -> transformer.cu (denoise) -> tokens
 *                                      tokens -> vqgan.c -> pictures
 *
 *     1. data.c           pictures and their labels, batches read ahead
 *     2. vqgan.c          the first stage: picture <-> tokens; its layers
 *     3. transformer.cu   one reverse transition p(x_{t-1} | x_t), also token by token; its loss
 *     4. diffusion.c      the Markov chain: noise, posterior, the draw of a token, sampling over scales
 *
 * What they stand on is beneath, a header a folder: base/ (errors, memory, random numbers, threads, parameter tables,
 * and compute.h, where a network computes), files/ (checkpoints, pictures, tokens, recipes). Above them are sampling/
 * and training/, and the programs: sample.c, inpaint.c, train.c. Explanations stand with the code.
 *
 * Names: B batch, N = h*w tokens of a grid (row-major), T number of scales, t in 1..T a scale, K token values,
 * C channels, H W image height and width in pixels, h w grid height and width in tokens. x_0 are the data tokens,
 * x_t the t times noised ones. Arrays are row-major, shapes are written (outer,...,inner).
 *
 * Rules that hold for every function here:
 *   - Err is OK, FAILED or DAMAGED (base.h); unless OK, err_text() says what, where, what was found and what was
 *     expected.
 *   - Nothing below the programs prints or exits. Nothing allocates between a plan call and the next.
 *   - x_backward accumulates (+=) into parameter gradients and overwrites gradients of activations.
 *   - Results do not depend on the number of threads.
 *
 * Paper: Esser, Rombach, Blattmann, Ommer, "ImageBART", NeurIPS 2021, arXiv 2108.08827. */
#ifndef IMAGEBART_H
#define IMAGEBART_H

#include "base/compute.h"
#include "files/files.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------------------------------------------------
 * 1. data.c: pictures and their labels
 * ---------------------------------------------------------------------------------------------------------- */
/* A set of labelled pictures: files, or values in LMDBs (whose path is the LMDB's, a slash and the key). */
typedef struct {
    size_t n, n_classes;
    char **path;        /* sorted by name */
    int32_t *label;     /* index into class_name; 0 everywhere if there are no sub-folders */
    char **class_name;  /* sub-folder names, sorted; n_classes = 0: unlabelled */
    uint64_t identity;  /* hash of the names below the folder and of the sizes of the files */
    struct Lmdb **lmdb; /* (n_lmdb) open ones */
    size_t n_lmdb;
    Damage *damage;    /* pictures that could not be decoded, as they are met */
    LeftOut *left_out; /* what the folder holds besides */
    char stray[256];   /* a picture in no sub-folder, for which the set has no classes; or "" */
} Dataset;
/* SPLIT_FLAT, with one of the others (|): nobody wants classes, so that pictures beside class folders belong to the set */
typedef enum { SPLIT_ALL, SPLIT_TRAIN, SPLIT_VAL, SPLIT_FLAT = 4 } Split;
/* path: a folder (searched recursively; its sub-folders are the classes; a data.mdb is an LMDB of pictures), an LMDB's
 * file, or a text file with one picture path a line (relative to the list's folder). If the folder holds train/ and
 * val/ (or valid/, validation/, a lone test/, or ILSVRC2012_train/data/ and ILSVRC2012_validation/data/), or LSUN's
 * NAME_train_lmdb and NAME_val_lmdb, these are the split; else every picture whose name hashes into 1 of 20 is held
 * out, the first if none does. Of one picture none is held out. An empty set is an error. */
Err dataset_open(Dataset *d, const char *path, Split split);
/* The same, but of the folder `path` only what list files name (the official lists of FFHQ and LSUN; list NULL: all of
 * it). A name is a file below the folder, or the one picture or key anywhere in it that is called so but for the
 * extension; a missing one is an error. val_list, unless NULL: the validation pictures; then `list` is for training. */
Err dataset_open_lists(Dataset *d, const char *path, const char *list, const char *val_list, Split split);
void dataset_close(Dataset *d);
/* *im = picture i, decoded and resized as prep_resize does; *damaged: it cannot be, which is noted and no error; *im is
 * empty then. An error is what lies not in the picture, such as a disk that fails. Any number of threads at a time. */
Err dataset_picture(const Dataset *d, size_t i, Prep prep, size_t size, Image *im, int *damaged);
size_t dataset_damaged(const Dataset *d); /* how many have been met so far */
/* Of which pictures met so far a part is used, such as of animations, and (damaged) which cannot be read: how many, with
 * an example each; "": none. */
void dataset_met(const Dataset *d, char text[ERR_MAX], int damaged);
/* Adds those to the list in the file at path: path, tab, why, a line each, sorted, each once. */
Err dataset_write_damaged(const Dataset *d, const char *path);
/* order[0..n-1] = the permutation of epoch `epoch` under `seed`. */
void epoch_order(uint32_t *order, size_t n, uint64_t seed, uint64_t epoch);
/* Label dropout: does row b of this micro batch lose its label, as it does with probability p? */
int label_dropped(double p, uint64_t seed, uint64_t micro, uint64_t b);

/* Which of a picture's encoded crops, and which mirroring, is number `at` of the training sequence, in this epoch.
 * balanced: classes are drawn equally often, so that a picture may come often in an epoch. */
void choose_crop(size_t *crop, size_t *flip, const Tokens *x, uint64_t seed, uint64_t at, uint64_t epoch,
                 size_t picture, int balanced);

/* Batches read ahead by threads. Step s takes examples s*B .. s*B+B-1 of the endless sequence of epochs, whatever the
 * number of threads. For a damaged picture stands the next whole one in the order of the set. */
typedef struct Loader Loader;
typedef struct {
    Prep prep;           /* all but PREP_FOLDER ignore EXIF orientation, as the official code does */
    size_t B, size;      /* batch, pixels a side */
    size_t global_batch; /* of batches of this many (0: B) ... */
    size_t rank_first;   /* ... the rows rank_first..rank_first+B-1: what other ranks take is left out */
    uint64_t seed, step; /* first step to deliver: resuming needs no other state */
    int train;           /* shuffle, random crop of the preset */
    int flip;            /* mirror half of the training pictures */
    int mark;            /* damaged pictures keep their place, with label -1 */
    size_t crops;        /* to be encoded once: this many random crops of every picture, images (B,crops,3,size,size) */
} LoaderConfig;
Err loader_start(Loader **l, const Dataset *d, const LoaderConfig *c);
/* The next batch: images (B,3,size,size), labels (B); valid until the next call. */
Err loader_next(Loader *l, const real **images, const int32_t **labels);
void loader_stop(Loader *l); /* NULL is fine */
/* About the most that loaders of B rows a batch together take for n pictures, those that are being decoded included. */
size_t loader_bytes(size_t n, size_t B, size_t size);

/* ------------------------------------------------------------------------------------------------------------
 * 2. vqgan.c: first stage, image <-> tokens (SPEC section 8; Esser et al. 2021, "Taming Transformers")
 * ---------------------------------------------------------------------------------------------------------- */
typedef struct Vqgan Vqgan;
/* Builds the network and its parameter table (values are not allocated: params_plan). honour_tanh: apply tanh_out,
 * which the official decoder swallows silently. */
Err vqgan_create(Vqgan **v, const VqganConfig *c, int honour_tanh);
void vqgan_free(Vqgan *v);
const VqganConfig *vqgan_config(const Vqgan *v);
Params *vqgan_params(Vqgan *v);
size_t vqgan_K(const Vqgan *v); /* token values: re_embed or n_embed */
/* Parameters and, with re_embed, quantize.used from a checkpoint, names prefixed ("" or "first_stage_model."). */
Err vqgan_load(Vqgan *v, const Checkpoint *ck, const char *prefix);
/* The same, but the parameters are used where they lie in the file, which must stay open: see params_map. */
Err vqgan_map(Vqgan *v, const Checkpoint *ck, const char *prefix);
size_t vqgan_codebook(const Vqgan *v);     /* the codebook's row of the parameter table */
const int32_t *vqgan_used(const Vqgan *v); /* (re_embed) or NULL */
/* Sizes activations for batches up to B of pictures up to HxW; train: keep what backward needs, and H and W must be
 * multiples of 2^(levels-1). One allocation; call again to change. */
Err vqgan_plan(Vqgan *v, size_t B, size_t H, size_t W, int train);
/* How much that allocates. Allocates nothing itself; there is no plan afterwards. */
Err vqgan_plan_bytes(Vqgan *v, size_t B, size_t H, size_t W, int train, size_t *bytes);

/* images (B,in_channels,H,W) -> prequant (B,embed_dim,h,w) or NULL, raw (B,h*w) codebook entries or NULL, tokens
 * (B,h*w) remapped or NULL. A code outside `used` becomes a random token drawn from RNG_UNKNOWN under seed. */
Err vqgan_encode(Vqgan *v, const real *images, size_t B, size_t H, size_t W, uint64_t seed, real *prequant,
                 int32_t *raw, int32_t *tokens);
/* tokens (B,h*w) -> images (B,out_ch,H,W), not clamped; a token outside 0..K-1 is an error. */
Err vqgan_decode_tokens(Vqgan *v, const int32_t *tokens, size_t B, size_t h, size_t w, real *images);

/* Training. forward: image -> quantise straight through -> reconstruction. *xrec (B,out_ch,H,W) points into the
 * activations; *codebook_loss as the official quantiser (mean over all elements).
 * backward: from dxrec (B,out_ch,H,W) and the weight of the codebook loss to every parameter's grad (+=) and to dimage
 * (B,in_channels,H,W; overwritten; may be NULL). */
Err vqgan_forward(Vqgan *v, const real *images, size_t B, size_t H, size_t W, const real **xrec, double *codebook_loss);
Err vqgan_backward(Vqgan *v, const real *dxrec, double codebook_weight, real *dimage);
/* Between the two, and changing nothing but dw (out_ch,C,3,3) and db (out_ch), overwritten: the gradient of the
 * decoder's last layer alone, whose weight's row vqgan_last_layer is. */
Err vqgan_last_gradient(Vqgan *v, const real *dxrec, real *dw, real *db);
const Param *vqgan_last_layer(const Vqgan *v);
/* What the last forward saw: latents z and straight-through z_q (B,embed_dim,h,w), raw codes (B,h*w). z is NULL if
 * there was none under this plan. */
void vqgan_latents(const Vqgan *v, const real **z, const real **zq_st, const int32_t **raw);

/* Its layers. What each computes stands with it in vqgan.c; what they need of scratch, and GPUs of Conv.prepared, must
 * be planned before: base/compute.h. conv_needs: backward 0 no, 1 yes, 2 of dx alone. */
void conv_forward(const Compute *on, real *y, const real *x, const real *w, const real *bias, const real *add,
                  const Conv *c);
void conv_backward(const Compute *on, real *dx, real *dw, real *db, const real *dy, const real *x, const real *w,
                   int accumulate, const Conv *c);
void group_norm_forward(const Compute *on, real *y, real *kept, const real *x, const real *gamma, const real *beta,
                        const GroupNorm *n);
void group_norm_backward(const Compute *on, real *dx, real *dgamma, real *dbeta, real *dy, const real *x,
                         const real *gamma, const real *beta, const real *kept, int accumulate, const GroupNorm *n);
void picture_attention_forward(const Compute *on, real *y, real *p, const real *q, const real *k, const real *v,
                               size_t B, size_t C, size_t N);
void picture_attention_backward(const Compute *on, real *dq, real *dk, real *dv, const real *dy, const real *q,
                                const real *k, const real *v, const real *p, const int accumulate[3], size_t B,
                                size_t C, size_t N);
void nearest_codes(const Compute *on, int32_t *code, const real *z, const real *book, const Codes *s);
void straight_through(const Compute *on, real *zq, double *gap, const real *z, const real *book, const int32_t *code,
                      const Codes *s);
void quantize_backward(const Compute *on, real *dz, real *dbook, const real *z, const real *book, const int32_t *code,
                       double to_z, double to_e, const Codes *s);
void lookup_codes(const Compute *on, real *zq, const real *book, const int32_t *code, const Codes *s);
void tanh_forward(const Compute *on, real *y, const real *x, size_t n);
void tanh_backward(const Compute *on, real *dx, const real *dy, const real *y, size_t n);

/* ------------------------------------------------------------------------------------------------------------
 * 3. transformer.cu: one reverse transition p(x_{t-1} | x_t) (paper section 3.2; SPEC sections 1, 2, 4, 14)
 * ---------------------------------------------------------------------------------------------------------- */
typedef struct Schedule { /* of the Markov chain: section 4 */
    int T;
    float beta[MAX_SCALES + 1], alpha[MAX_SCALES + 1], alphacum[MAX_SCALES + 1]; /* index t; beta[0] = 0 */
} Schedule;
typedef struct Transformer Transformer;
Err transformer_create(Transformer **m, const NetConfig *c);
void transformer_free(Transformer *m);
const NetConfig *transformer_config(const Transformer *m);
Params *transformer_params(Transformer *m);
/* What a transition's file holds: `which` ('v' or 'e') of every parameter as transformer.*, the schedule's buffers and,
 * unless compact, what follows from the rest and the official classes expect (masks, the second name of a tied
 * embedding): every name of the official state dict but first_stage_model.* and transformer_ema.* (SPEC sections 11 and
 * 12). */
Err transition_tensors(TensorList *list, Transformer *net, char which, const Schedule *s, Dtype store, int compact);
/* Per-step alphas alpha[1..T] of the schedule, read by the residual variants (SPEC section 1). */
void transformer_set_alphas(Transformer *m, const float *alpha);
/* Sizes activations for batches up to B of N tokens. train: keep what backward needs; else: the KV caches of decoding
 * and a forward without backward. One allocation; call again to change. */
Err transformer_plan(Transformer *m, size_t B, size_t N, int train);
/* How much that allocates. Allocates nothing itself; there is no plan afterwards. */
Err transformer_plan_bytes(Transformer *m, size_t B, size_t N, int train, size_t *bytes);

/* logits[b,i,:] of p(x_{t-1}[i] | x_{t-1}[<i], x_t). Teacher forcing.
 *   x (B,N) x_{t-1}; x_t (B,N) (ignored by NET_GPT, may be NULL); t (B) 1..T; label (B) (has_class, else NULL)
 *   *logits (B,N,K) points into the activations. Tokens, t and labels out of range are errors. */
Err transformer_forward(Transformer *m, const int32_t *x, const int32_t *x_t, const int32_t *t, const int32_t *label,
                        size_t B, size_t N, const real **logits);
/* dlogits (B,N,K) -> grad of every parameter (+=); after transformer_forward under a training plan. */
Err transformer_backward(Transformer *m, const real *dlogits);

/* The losses (SPEC section 4), each a mean over the R = B*N rows, in nats per token:
 *     hard = -log softmax(logits)[target]     soft = KL(posterior || softmax(logits))
 *     loss = alpha soft + (1 - alpha) hard    dlogits = weight * its gradient, overwritten
 *   logits, posterior, dlogits (R,K)   target (R)
 * dlogits may be NULL, or the memory of logits. posterior may be NULL when alpha = 0; then soft is NAN. */
typedef struct Loss {
    double loss, hard, soft;
} Loss;
Err denoising_loss(Loss *out, const real *logits, const int32_t *target, const real *posterior, size_t R, size_t K,
                   double alpha, double weight, real *dlogits);

/* Decoding with kept keys and values.
 *   begin   runs the encoder, and keeps the context's keys and values (NET_X); or feeds the prompt (NET_GPT), whose
 *           tokens see each other.
 *   block   feeds n <= B*DECODE_BLOCK positions in one pass: position i of batch row b with the token in front of it,
 *           prev = x_{t-1}[b,i-1] (ignored at i = 0). Rows rise. A row's positions follow each other and begin anywhere
 *           up to where it was fed before; what lay behind is forgotten, so that guessed tokens are taken back. Each
 *           position sees the earlier ones of its row, those of this block included. *logits (n,K) points into the
 *           activations.
 *   step    feeds position i of all rows; logits (B,K).
 * Logits equal those of transformer_forward up to rounding, and each other's bits however positions are cut into
 * blocks. */
enum { DECODE_BLOCK = 64 };
typedef struct {
    size_t b, i;
    int32_t prev;
} DecodePosition;
Err transformer_decode_begin(Transformer *m, const int32_t *x_t, const int32_t *t, const int32_t *label, size_t B,
                             size_t N);
Err transformer_decode_block(Transformer *m, const DecodePosition *cell, size_t n, const real **logits);
Err transformer_decode_step(Transformer *m, const int32_t *prev, size_t i, const real **logits);
/* For kernels/guess.c, which weighs passes against positions: what a pass reads when rows have N positions. */
DecodeReads transformer_decode_reads(const Transformer *m, size_t N);

/* From here on this network is planned, run and updated on the GPU. Call it before transformer_plan; when the
 * parameters have their values, params_send. */
Err transformer_use_cuda(Transformer *m, Precision precision);
int transformer_on_cuda(const Transformer *m);
/* The same for a first stage, also before vqgan_plan: afterwards everything in section 2 computes there. */
Err vqgan_use_cuda(Vqgan *v, Precision precision);
/* A training pass that leaves logits where they are: transformer_forward, then denoising_loss against the posterior of
 * x_0 and x_t, then, if backward, transformer_backward. x0, x (= x_{t-1}), x_t (B,N), t, label (B). On the GPU only. */
Err transformer_loss_cuda(Transformer *m, const Schedule *s, const int32_t *x0, const int32_t *x, const int32_t *x_t,
                          const int32_t *t, const int32_t *label, size_t B, size_t N, double alpha, double weight,
                          int backward, Loss *out);
/* After transformer_decode_begin: draws all N positions of the n = B rows, which is what N steps of
 * transformer_decode_step, sample_probs and sample_pick give, without a word to the host in between. tokens (n,N).
 * Guided: the batch is n = B/2 samples with their class, then the same with none. On the GPU only. */
Err transformer_draw_cuda(Transformer *m, const DrawOptions *o, int32_t *tokens);

/* ------------------------------------------------------------------------------------------------------------
 * 4. diffusion.c: the Markov chain over tokens (paper section 3.1; SPEC sections 3 and 5)
 * ---------------------------------------------------------------------------------------------------------- */
/* x (n) = one forward step: each token, with probability beta, becomes a uniform draw from 0..K-1. Token i uses index
 * first+i of the stream. */
void noise_step(int32_t *x, size_t n, size_t K, double beta, uint64_t seed, uint64_t stream, uint64_t first);
/* x_prev, x_t (n) = x_{t-1} and x_t from x0: x_i = noise_step(x_{i-1}), i = 1..t, the numbers of element k of step i
 * those of stream (RNG_NOISE, i, micro) at first + k. */
void noise_chain(int32_t *x_prev, int32_t *x_t, const int32_t *x0, size_t n, size_t K, const Schedule *s, int t,
                 uint64_t seed, uint64_t micro, uint64_t first);
/* q (R,K) = q(x_{t-1} | x_t, x_0), rows sum to 1 (SPEC section 3, paper eq. 7). */
void posterior(real *q, const int32_t *x0, const int32_t *xt, size_t R, size_t K, const Schedule *s, int t);
/* prob (K) = softmax of (logits + guide)/temperature, after all but the top_k largest are cut (0 or >= K: no cut; ties
 * with the last of them are all kept). guide: -1 free, else the one token that is allowed. Temperature 0 puts all of
 * prob on the first of the largest logits. Logits with NaN, or nothing but -inf, make it all NaN. */
void sample_probs(real *prob, const real *logits, size_t K, int32_t guide, double temperature, size_t top_k);
/* Index of the first cumulative probability above u; skips zeros. -1 if nothing is above 0. */
int32_t sample_pick(const real *prob, size_t K, double u);

/* How a scale's passes of the decoder went: see SampleOptions.block. */
typedef struct {
    size_t passes;       /* of the decoder, over a block of positions of every sample in a batch */
    size_t positions;    /* fed */
    size_t tokens;       /* drawn, known ones too */
    size_t tried, right; /* tokens guessed; guessed right */
} DraftCounts;

typedef struct {
    size_t n;                           /* samples */
    uint64_t seed, first;               /* sample b uses the streams of number first+b, modulo 2^32 */
    double temperature[MAX_SCALES + 1]; /* [t] */
    size_t top_k[MAX_SCALES + 1];       /* [t]; 0: all */
    size_t chain[MAX_SCALES + 1];       /* [t] forward-backward repeats, >= 1; 0 with known tokens: x_{t-1} = x_t */
    double guidance[MAX_SCALES + 1];    /* [t] classifier-free: logits = uncond + g (cond - uncond); 1: none */
    int official_temperature;           /* encoder-decoder scales ignore it, as the official code does */
    const int32_t *label;               /* (n) or NULL */
    const int32_t *known;               /* (n,N) tokens to keep, or NULL */
    const uint8_t *keep;                /* (N) 1 = keep */
    size_t candidates; /* > 1: samples are candidates in groups of so many (n a multiple): see sample_chain */
    size_t block;      /* positions of a sample in a pass of the decoder: 0: as many as pay off; 1: one by one. All give
                          the same tokens: guesses only decide how much work that takes (kernels/guess.c) */
    DraftCounts *counts; /* [MAX_SCALES + 1], [t] is added to; or NULL */
    /* Called after every pass of the decoder, with the number of positions that all samples have. A nonzero return
     * stops with an error. */
    int (*progress)(void *context, int t, size_t repeat, size_t done, size_t of);
    /* Called after every scale: tokens (n,N) = x_{t-1}; first with t = T+1: the start x_T. */
    void (*scale_done)(void *context, int t, const int32_t *tokens);
    void *context;
} SampleOptions;
void sample_defaults(SampleOptions *o); /* one sample, temperature 1, one pass a scale */

/* A model as the chain needs it: tokens and networks, no files. */
typedef struct {
    const Schedule *schedule;
    size_t h, w, K;            /* token grid, token values */
    size_t n_classes;          /* 0: none */
    const int32_t *null_class; /* [t] the label "no class" that scale t was trained with too; -1: none */
    const char *name;          /* for messages */
    Err (*network)(void *context, int t, Transformer **net); /* *net = scale t's, until the next call */
    void *context;
} Chain;
Err check_guidance(const Chain *c, double g, int t); /* can scale t be guided by g? */
/* tokens (n,N) = x_0, by ancestral sampling t = T..1 (SPEC section 5), with the guide and chains of inpainting.
 * The guide forces known tokens without asking whether what was drawn before them agrees. Candidates ask: after every
 * pass each group is drawn anew from itself, a candidate's weight being the probability its pass gave the known tokens
 * (importance resampling); the first of each group is the result. */
Err sample_chain(const Chain *c, const SampleOptions *o, int32_t *tokens);
/* One reverse step for o->n samples: tokens (n,N) x_t in, x_{t-1} out. repeat numbers the passes of a chain. Plans the
 * network for decoding. No guidance, which needs a Chain. */
Err sample_scale(Transformer *net, const SampleOptions *o, int t, size_t repeat, size_t N, int32_t *tokens);

/* redraw_prob as in the official configs: "geometric", or what betas_read knows. */
Err schedule_make(Schedule *s, const char *redraw_prob, int T);
/* From s->beta[1..T] to alpha and alphacum. */
Err schedule_from_betas(Schedule *s, int T);

#ifdef __cplusplus
}
#endif
#endif
