/* training.h - what training/ gives beside stages (stage.h): the discriminator, LPIPS, several processes. */
#ifndef TRAINING_H
#define TRAINING_H

#include "imagebart.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- image_loss.c ---- */

/* l1 = mean|x-xrec|, l2 = mean (x-xrec)^2; dxrec (n) = w1 dl1 + w2 dl2 (overwritten; may be NULL). */
void image_loss(const real *x, const real *xrec, size_t n, double w1, double w2, double *l1, double *l2, real *dxrec);

/* ---- restart.c ---- */

/* Every entry of the codebook with usage[code] = 0 becomes a latent of the last vqgan_forward, which had B pictures of N
 * latents; RNG_CODES picks it. The entry's Adam moments become 0, its EMA the latent. Returns how many there were. */
size_t restart_codes(Vqgan *v, const uint32_t *usage, size_t B, size_t N, uint64_t seed, uint64_t step);
/* The same in parts, where several processes share the latents: which of so many is picked for an entry; the entry
 * becomes a latent, whose number d is latent[d * stride]. */
size_t restart_pick(uint64_t seed, uint64_t step, size_t code, size_t latents);
void restart_code(Vqgan *v, size_t code, const real *latent, size_t stride);

/* ---- rate.c: the learning rate, as base_learning_rate and scheduler_config of the official configuration say it ---- */
enum { CYCLES_MAX = 64 };
typedef enum { RATE_CONSTANT, RATE_COSINE, RATE_COSINE_CYCLES, RATE_LINEAR_CYCLES } RateKind;
typedef struct {
    RateKind kind;
    LrSchedule cosine; /* RATE_COSINE */
    size_t n_cycles;   /* the others: what each cycle has, and its steps */
    double warm_up_steps[CYCLES_MAX], f_start[CYCLES_MAX], f_max[CYCLES_MAX], f_min[CYCLES_MAX], length[CYCLES_MAX];
} Rate;
/* An unknown scheduler_config.target is an error, so is a key of another one. */
Err rate_kind(RateKind *kind, const Config *recipe);
/* For a stage of so many steps */
Err rate_read(Rate *r, const Config *recipe, size_t steps);
/* The factor of base_learning_rate, or without one the rate, after so many steps; the largest */
double rate_at(const Rate *r, uint64_t step);
double rate_peak(const Rate *r);

/* spike.c: is x more than `spike` deviations above the median of the last steps (NaN: none)? A deviation counts as at
 * least `least` times the median, for a loss that hardly moves is no reason to be strict, and at least `small`, for one
 * that is nearly 0 is none either. spike 0: never. */
enum { RECENT = 64 };
int is_spike(const real recent[RECENT], double spike, double least, double small, double x);

/* perceptual.c: LPIPS, how different two pictures look (Zhang et al. 2018; SPEC section 9). Its network is VGG16, with
 * frozen weights; tests take a smaller one. */
enum { PERCEPTUAL_STAGES = 5, PERCEPTUAL_DEPTH = 4 };
typedef struct {
    size_t width[PERCEPTUAL_STAGES], depth[PERCEPTUAL_STAGES]; /* channels and number of convolutions of each stage */
} PerceptualConfig;
PerceptualConfig perceptual_vgg16(void);
typedef struct Perceptual Perceptual;
/* Builds the table of weights, under the names of taming-transformers' LPIPS (values are not allocated). */
Err perceptual_create(Perceptual **p, const PerceptualConfig *c);
Err perceptual_use_cuda(Perceptual *p, Precision precision); /* before perceptual_plan; pictures stay the host's */
void perceptual_free(Perceptual *p);
Params *perceptual_params(Perceptual *p);
/* Every weight from the first of n open files that has it: as here, as "loss.perceptual_loss.*" of a VQGAN's
 * checkpoint, or as "features.*" of torchvision's VGG16. An error names the tensor that is missing, misshapen or not
 * finite. */
Err perceptual_load(Perceptual *p, const Checkpoint *ck, size_t n);
/* Memory for pictures of HxW, 16 or more along each side, in batches of about B; backward: also for the gradient. */
Err perceptual_plan(Perceptual *p, size_t B, size_t H, size_t W, int backward);
/* How much that allocates. Allocates nothing itself; there is no plan afterwards. */
Err perceptual_plan_bytes(Perceptual *p, size_t B, size_t H, size_t W, int backward, size_t *bytes);
/* *loss = mean over pictures of LPIPS(x, xrec), both (B,3,H,W) in [-1,1]. dxrec (as xrec) += weight * its gradient;
 * NULL: not wanted. */
Err perceptual_loss(Perceptual *p, const real *x, const real *xrec, size_t B, size_t H, size_t W, double weight,
                    double *loss, real *dxrec);

/* Its layers, for tests: perceptual.c says what each computes. */
void relu_forward(const Compute *on, real *y, size_t n);
void relu_backward(const Compute *on, real *dy, const real *y, size_t n);
void pool_forward(const Compute *on, real *y, const real *x, size_t B, size_t C, size_t h, size_t w);
void pool_backward(const Compute *on, real *dx, const real *dy, const real *x, size_t B, size_t C, size_t h, size_t w);
size_t comparison_sums(const Compute *on, size_t B, size_t hw);
void compare_features(const Compute *on, double *sums, real *dr, const real *a, const real *r, const real *lin,
                      const TapShape *c);

/* ------------------------------------------------------------------------------------------------------------
 * discriminator.c: tells pictures from reconstructions while a first stage is trained (SPEC section 9; the official
 *     NLayerDiscriminator).
 * ---------------------------------------------------------------------------------------------------------- */
typedef struct { /* the official disc_in_channels, disc_ndf, disc_num_layers */
    size_t in_channels, ndf, n_layers;
} DiscConfig;
/* prefix e.g. "model.params.lossconfig.params."; official defaults 3, 64, 3. */
Err disc_config_read(DiscConfig *c, const Config *from, const char *prefix);

typedef struct Discriminator Discriminator;
/* Rows have their official names, loss.discriminator.main.N.*, batch norm's buffers included, which are untrained. */
Err disc_use_cuda(Discriminator *d, Precision precision); /* before disc_plan; pictures and logits stay the host's */
Err disc_create(Discriminator **d, const DiscConfig *c);
void disc_free(Discriminator *d);
Params *disc_params(Discriminator *d);
/* Sizes activations for B pictures of HxW, which every forward then has. features: room for disc_keep_features. One
 * allocation; call again to change. Pictures of which the layers leave nothing are an error. bytes: how much that is;
 * allocates nothing itself, and there is no plan afterwards. */
Err disc_plan(Discriminator *d, size_t B, size_t H, size_t W, int features);
Err disc_plan_bytes(Discriminator *d, size_t B, size_t H, size_t W, int features, size_t *bytes);
size_t disc_logits(const Discriminator *d); /* how many logits a forward gives: B*h*w */
/* images (B,in_channels,H,W) -> *logits (B,1,h,w), which stay until the next forward. As in training: batch norm takes the
 * batch's own mean and variance; update: its buffers follow (momentum 0.1, unbiased variance). */
Err disc_forward(Discriminator *d, const real *images, int update, const real **logits);
/* From dlogits (B,1,h,w; NULL: zeros) and feature_weight times the gradient of disc_feature_loss to every parameter's
 * grad (+=) if `trained`, and to dimages (B,in_channels,H,W; overwritten; may be NULL). Any number of times after a
 * forward. */
Err disc_backward(Discriminator *d, const real *dlogits, double feature_weight, int trained, real *dimages);
/* Feature matching: the activations of the last forward stay for comparison; how far those of a later forward are from
 * them: the mean over the layers of mean |a - kept| after each leaky ReLU. Only the later forward gets a gradient. */
Err disc_keep_features(Discriminator *d);
double disc_feature_loss(const Discriminator *d);
/* Losses, means over n logits D(x); dlogits (n) = weight * gradient, overwritten.
 *   disc_loss       half of relu(1 - D) for genuine pictures, of relu(1 + D) for reconstructions; DISC_VANILLA: of
 *                   softplus(-D) and softplus(D). The discriminator's loss is the sum of both halves.
 *   generator_loss  -D
 *   adaptive_weight |d nll/d W| / (|d g/d W| + 1e-4), at most 1e4; W is the weight of the decoder's last layer. The
 *                   generator's loss is multiplied with it, times disc_weight. */
typedef enum { DISC_HINGE, DISC_VANILLA } DiscLoss;
double disc_loss(DiscLoss kind, const real *logits, size_t n, int genuine, double weight, real *dlogits);
double generator_loss(const real *logits, size_t n, double weight, real *dlogits);
double adaptive_weight(double nll_norm, double g_norm);

/* Its layers, for tests: discriminator.c says what each computes. */
void conv4_forward(const Compute *on, real *y, const real *x, const real *w, const Conv4 *c);
void conv4_backward(const Compute *on, real *dx, real *dw, const real *dy, const real *x, const real *w,
                    const Conv4 *c);
void activate_forward(const Compute *on, real *a, const real *y, const Activation *s);
void activate_backward(const Compute *on, real *g, real *dgamma, real *dbeta, const real *a, const real *y,
                       const real *other, double step, const Activation *s);
double feature_gap(const Compute *on, const real *a, const real *other, size_t n);

/* ------------------------------------------------------------------------------------------------------------
 * parallel.c: ./train in more than one process, each with the whole model and a share of every batch
 * ---------------------------------------------------------------------------------------------------------- */
/* Joins the processes that mpirun or srun started together; without them there is one, and MPI is not touched. waiting,
 * unless NULL: called again and again while this process waits for others, with how long it has. Then exiting without
 * ranks_end ends the other processes too. Refuses: several processes without MPI in this build, or with another. */
Err ranks_start(void (*waiting)(double seconds));
void ranks_end(void);
size_t rank(void), ranks(void);             /* this process is number 0..ranks-1 */
size_t rank_local(void), ranks_local(void); /* the same among those on its machine */
int rank_threads(void); /* the processors of its machine, shared out; 0: all of them, there is one process */
/* Every rank calls these at the same time; they return when all have. x (n) = the sum over ranks; *flag = 1 if any has
 * it; bytes (n) are those of rank `from`. */
Err ranks_sum(double *x, size_t n);
Err ranks_sum_counts(uint32_t *x, size_t n);
Err ranks_any(int *flag);
Err ranks_broadcast(size_t from, void *bytes, size_t n);
/* OK if e is OK on every rank; else FAILED on all of them, with the text of the first rank that failed. */
Err ranks_agree(Err e);
/* An error, which calls the bytes `what`, unless all ranks have the same. */
Err ranks_same(const void *bytes, size_t n, const char *what);
/* An error, which calls the bytes `what`, if two ranks have the same n <= 64. */
Err ranks_differ(const void *bytes, size_t n, const char *what);
/* begin, then a backward pass, then end: every row's gradient is the sum over ranks. While backward goes on, the rows
 * that params_ready says are complete are sent already. One table at a time. A rank whose backward failed calls end all
 * the same. */
Err gradients_begin(Params *p);
Err gradients_end(Params *p);

#ifdef __cplusplus
}
#endif
#endif
