/* train.h - what the files of ./train share: the user's options, the stage being trained, the run's folder.
 *
 * train.c reads options and recipe and drives the loop; train_vqgan.c and train_scale.c are the two kinds of stage, first
 * stage and transition, train_gan.c is the first one's discriminator; train_run.c keeps the run: memory plan,
 * checkpoints, log. Nobody else includes this. */
#ifndef TRAIN_H
#define TRAIN_H

#include "imagebart.h"

#include <stdio.h>

/* ------------------------------------------------------------------------------------------------------------
 * What the user said
 * ---------------------------------------------------------------------------------------------------------- */

#define NOT_GIVEN ((size_t)-1)

typedef struct {
    const char *model, *data, *list, *val_list, *run, *config, *init, *device, *store, *precision;
    int vqgan, joint, all, resume, eval, balance;
    int cuda; /* on the GPU */
    size_t scale, steps, batch, accumulate, threads, save_every, eval_every, picture_every;
    size_t seed;
    double lr, alpha;
} Options;

/* ------------------------------------------------------------------------------------------------------------
 * What is being trained
 * ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    double loss, part[2]; /* part: L1 and L2 of the VQGAN; hard and soft loss of a transition */
} Metrics;

typedef struct Stage Stage;
typedef struct Gan Gan; /* train_gan.c */
struct Stage {
    char name[16]; /* "vqgan", "scale2", "joint": names the files */
    const Options *opt;
    Config settings; /* the recipe's part for this stage, under the official keys, with the user's changes */
    Params *params;

    size_t batch, accumulate, steps;
    uint64_t seed;
    AdamW adam;
    LrSchedule lr;
    double lr_scale; /* the official learning-rate rule (SPEC section 7), or 1 */
    double ema_decay;
    Dtype store;
    int compact; /* leave out what can be derived */

    uint64_t step, ema_updates;                       /* optimizer steps done */
    size_t state_bytes, activation_bytes, available;  /* memory: of check_memory */
    size_t gpu_state, gpu_activations, gpu_available; /* the same on the GPU */

    Err (*micro_batch)(Stage *s, uint64_t micro, Metrics *out); /* forward, loss, backward with weight 1/accumulate */
    Err (*evaluate)(Stage *s, Metrics *out);                    /* on the held-out split */
    Err (*picture)(Stage *s, const char *path);
    Err (*after_step)(Stage *s); /* NULL: nothing to do */

    Dataset train, val;
    size_t size; /* pixels a side */
    Prep prep;
    int flip;

    /* first stage */
    Vqgan *vqgan;
    Loader *loader;
    real *dxrec;
    uint32_t *usage;      /* (n_embed) how often each code was used since the last restart of dead codes */
    size_t restart_every; /* 0: never */
    size_t codes_used;
    double w_l1, w_l2, w_codebook;
    Gan *gan; /* NULL: no discriminator */

    /* transitions */
    Transformer *net;
    Schedule schedule;
    Tokens train_tokens, val_tokens;
    int t; /* the scale; 0: joint */
    double alpha;
    size_t h, w, N, K;
    uint32_t *order;  /* of the present epoch; when balanced: the examples, class by class */
    int balance;      /* draw every class equally often */
    size_t *class_at; /* balanced: where each class that has examples starts in order, and the end; n_drawn classes */
    size_t n_drawn;
    uint64_t epoch;
    int32_t *x0, *x_prev, *x_t, *ts, *label; /* (B,N) ... (B) */
    real *q, *dlogits;                       /* (B,N,K) */
};

typedef struct {
    FILE *log;
    char log_path[1100];
    double started, rate;
    uint64_t first_step;
} Progress;

/* train_vqgan.c, train_scale.c: build the stage of Stage.settings. start_loader: pictures from the present step on. */
Err vqgan_stage(Stage *s);
Err start_loader(Stage *s);
Err transition_stage(Stage *s);

/* train_gan.c: the first stage's discriminator, if the recipe asks for one; without one all of these do nothing.
 * gan_create reads the settings, train.freeze_encoder too; gan_plan_bytes, when it is known whether there is a perceptual
 * loss, adds what gan_plan then allocates. */
Err gan_create(Stage *s);
Err gan_plan_bytes(Stage *s, size_t *bytes);
Err gan_plan(Stage *s);
void gan_free(Stage *s);
/* Of a micro batch, before and after vqgan_backward: adds the discriminator's judgement to s->dxrec, which holds
 * 1/accumulate of the gradient of nll, and to loss; the gradients of the discriminator's own loss. Then its update. */
Err gan_generator(Stage *s, uint64_t micro, const real *images, const real *xrec, double *loss);
Err gan_discriminator(Stage *s, uint64_t micro, const real *xrec);
Err gan_after_step(Stage *s);
/* Its part of the state file, of --init, of a line of the log and of the progress line */
Err gan_collect_state(const Stage *s, TensorList *list);
Err gan_load_state(Stage *s, const Checkpoint *ck);
Err gan_start_from(Stage *s, const Checkpoint *ck);
void gan_log(const Stage *s, FILE *log);
const char *gan_text(const Stage *s, char text[96]);

/* train_run.c. out = RUN/STAGEsuffix, returned */
const char *run_path(const Stage *s, char out[1100], const char *suffix);
int file_exists(const char *path);
Err make_folder(const char *path);
/* RUN/skipped.txt gets the damaged pictures of d; how many there are is said */
Err list_damaged(const Stage *s, const Dataset *d);
void say_damaged(const Stage *s);
/* Before anything large is allocated: `arenas` arrays as large as all parameters, the network's plan (bytes), other
 * buffers (rows x columns). On a GPU: values, gradients, moments and moving average in float, in bf16 the values again. */
Err check_memory(Stage *s, size_t arenas, size_t plan, size_t rows, size_t columns);
Precision gpu_precision(const Stage *s);
Err check_gpu_memory(Stage *s, size_t plan);
/* STAGE.state.safetensors and STAGE.safetensors, atomically; the stage as such a file left it */
Err save(Stage *s);
Err load_state(Stage *s, const Checkpoint *ck);
/* log.tsv: one line per step; lines behind the present step, about to be repeated, are dropped */
Err log_open(const Stage *s, Progress *p);
Err log_step(const Stage *s, Progress *p, const Metrics *m, double lr, double norm, const Metrics *val,
             const Metrics *ema);
void show_step(const Stage *s, Progress *p, const Metrics *m, double lr, double norm);
/* Evaluates with the weights as they are and, for transitions, with their EMA. */
Err evaluate_both(Stage *s, Metrics *val, Metrics *ema);
void print_evaluation(const Stage *s, FILE *to, const Metrics *val, const Metrics *ema);

#endif
