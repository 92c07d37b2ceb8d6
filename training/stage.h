/* train.h - what the files of ./train share: the user's options, the stage being trained, the run's folder.
 *
 * train.c reads options and recipe and drives the loop; train_vqgan.c and train_scale.c are the two kinds of stage,
 * first stage and transition; train_gan.c, train_perceptual.c and train_codes.c are the first one's discriminator,
 * LPIPS and codebook; train_run.c keeps the run: memory plan, checkpoints, log; train_survive.c is what a run goes on
 * after: bad batches, full disks, damaged files; train_view.c shows it; train_schedule.c measures a schedule. Nobody
 * else includes this.
 *
 * For tests only, from the environment:
 *   IMAGEBART_TEST_NAN="stage:micro[,micro...]"    the loss of these micro batches becomes NaN
 *   IMAGEBART_TEST_SPIKE="stage:micro[,micro...]"  ... a hundred times what it is
 *   IMAGEBART_TEST_NAN_DISCRIMINATOR=...           the discriminator's gradient norm becomes NaN behind them
 *   IMAGEBART_TEST_PAUSE=SECONDS                   between tries while the disk is full, instead of 30 */
#ifndef TRAIN_H
#define TRAIN_H

#include "training/training.h"

#include <stdio.h>

/* ------------------------------------------------------------------------------------------------------------
 * What the user said
 * ---------------------------------------------------------------------------------------------------------- */

#define NOT_GIVEN ((size_t)-1)

typedef struct {
    const char *model, *data, *list, *val_list, *run, *config, *init, *device, *store, *precision, *schedule;
    const char *perceptual, *convert_perceptual;
    const char *program; /* as it was called */
    int vqgan, joint, all, resume, eval, balance, bf16_states, no_wait, remap;
    int cuda; /* on the GPU */
    size_t scale, steps, batch, accumulate, threads, save_every, eval_every, picture_every, keep;
    size_t seed;
    double lr, alpha, label_dropout;
} Options;

/* ------------------------------------------------------------------------------------------------------------
 * What is being trained
 * ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    size_t used;       /* entries of a codebook that occur */
    double perplexity; /* exp of the entropy of how often: as many entries, used equally often, would be as varied */
} CodeUse;

typedef struct {
    double loss, part[2]; /* part: L1 and L2 of the VQGAN; hard and soft loss of a transition */
    double perceptual;    /* LPIPS of the VQGAN */
    CodeUse codes;        /* of an evaluation of the VQGAN */
} Metrics;

enum {
    KEEP_MAX = 99,     /* states */
    RECENT = 64,       /* steps that a spike is measured against */
    SKIPPED_MAX = 4096 /* micro batches that a run may leave out */
};

typedef struct Stage Stage;
typedef struct Gan Gan; /* train_gan.c */
struct Stage {
    char name[16]; /* "vqgan", "scale2", "joint": names the files */
    const Options *opt;
    Config settings; /* the recipe's part for this stage, under the official keys, with the user's changes */
    Params *params;

    size_t batch, accumulate, steps; /* pictures of this rank in a micro batch, micro batches of a step */
    size_t of, first;                /* of all ranks' pictures in a micro batch, of, this rank's begin with first */
    double shares;                   /* a step is the mean over these: micro batches of all ranks */
    uint64_t seed;
    AdamW adam;
    LrSchedule lr;
    double lr_scale; /* the official learning-rate rule (SPEC section 7), or 1 */
    double ema_decay;
    int bf16_states; /* Adam's moments in bf16 */
    Dtype store;
    int compact; /* leave out what can be derived */

    size_t micro_index;                               /* of the present micro batch in its step */
    uint64_t step, ema_updates;                       /* optimizer steps done */
    size_t state_bytes, activation_bytes, available;  /* memory: of check_memory */
    size_t gpu_state, gpu_activations, gpu_available; /* the same on the GPU */

    /* surviving: what loss and norm have been, what is left out, what was best; part of the state (train_survive.c) */
    double spike;                           /* train.spike: how many deviations are one; 0: no such thing */
    real recent[2 * RECENT];                /* (2,RECENT) loss and gradient norm of step i at i % RECENT; NaN: none */
    size_t skipped[SKIPPED_MAX], n_skipped; /* numbers of micro batches, ascending */
    double best;                            /* the least validation loss so far */
    uint64_t saved;                         /* the step of the last checkpoint */
    int rollbacks;                          /* to it, in this process */

    Err (*micro_batch)(Stage *s, uint64_t micro, Metrics *out); /* forward, loss, backward with weight 1/accumulate */
    Err (*evaluate)(Stage *s, Metrics *out);                    /* on the held-out split */
    Err (*picture)(Stage *s, const char *path);
    Err (*after_step)(Stage *s,
                      const char **bad); /* *bad: why the step must not count after all; NULL: nothing to do */

    Dataset train, val;
    size_t size; /* pixels a side */
    Prep prep;
    int flip;

    /* first stage */
    Vqgan *vqgan;
    Loader *loader;
    uint64_t loader_at; /* the micro batch that it gives next */
    real *dxrec;
    uint32_t *usage;      /* (n_embed) how often each code was used since the last restart of dead codes */
    uint32_t *val_usage;  /* (n_embed) the same in an evaluation */
    size_t restart_every; /* 0: never */
    double w_l1, w_l2, w_codebook, w_perceptual;
    Perceptual *perceptual; /* NULL: not part of the loss */
    Gan *gan;               /* NULL: no discriminator */

    /* transitions */
    Transformer *net;
    Schedule schedule;
    Tokens train_tokens, val_tokens;
    int t; /* the scale; 0: joint */
    double alpha;
    double label_dropout; /* how often a label gives way to "no class" (classifier-free guidance) */
    int32_t null_class;   /* which label that is */
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
    char log_path[1100], line[512];
    double started, rate;
    uint64_t first_step;
} Progress;

/* train_view.c */
typedef struct {
    char path[1500]; /* of the events; "": none */
    int evaluated;   /* the present step was */
} View;
/* RUN/events/STAGE/events.out.tfevents.TIME.HOST, for TensorBoard, begun; after a step is in log.tsv: its numbers,
 * every tenth step, and RUN/loss.svg anew when it was evaluated; a picture that was written to path; the end. What the
 * disk has no room for can be tried again. */
Err view_open(Stage *s, void *view);
Err view_step(Stage *s, void *view);
Err view_picture(const Stage *s, View *v, const char *path);
Err view_close(Stage *s, void *view);

/* train_vqgan.c, train_scale.c: build the stage of Stage.settings. */
Err vqgan_stage(Stage *s);
Err transition_stage(Stage *s);

/* train_gan.c: the first stage's discriminator, if the recipe asks for one; without one all of these do nothing.
 * gan_create, when it is known whether there is a perceptual loss, reads the settings, train.freeze_encoder too;
 * gan_plan_bytes adds what gan_plan then allocates: where it computes, and what the host has in any case, which are
 * parameters and what belongs to them. */
Err gan_create(Stage *s);
Err gan_plan_bytes(const Stage *s, size_t *plan, size_t *tables);
Err gan_plan(Stage *s);
void gan_free(Stage *s);
/* Of a micro batch, before and after vqgan_backward: adds the discriminator's judgement to s->dxrec, which holds
 * 1/accumulate of the gradient of nll, and to loss; the gradients of the discriminator's own loss. Then its update. */
Err gan_generator(Stage *s, const real *images, const real *xrec, double *loss);
Err gan_discriminator(Stage *s, const real *xrec, double *loss);
Err gan_after_step(Stage *s, const char **bad);
/* Its part of the state file, of --init, of a line of the log and of the progress line */
Err gan_gather(const Stage *s); /* from the GPU; an error unless all ranks have the same */
Err gan_collect_state(const Stage *s, TensorList *list);
Err gan_load_state(Stage *s, const Checkpoint *ck);
Err gan_start_from(Stage *s, const Checkpoint *ck);
int gan_log(const Stage *s, char *text, size_t size);
const char *gan_text(const Stage *s, char text[96]);

/* A run without a first stage gets the model's; the run's own, path: its file. */
Err copy_vqgan(const Stage *s);
Err load_both(Stage *s, const char *vqgan_path);
Err open_vqgan(Stage *s, char path[1100]);
/* train_schedule.c: RUN/psim.txt, a curve for schedule_make, from the run's first stage and held-out pictures; the
 * recipe's line on stdout */
Err metric_schedule(Stage *s);

/* train_perceptual.c. open: decides whether s->perceptual is part of the loss and loads it; *plan and *tables += its
 * memory, as gan_plan_bytes; plan: allocates it. add: *mean = LPIPS of B reconstructions, 0 without; dxrec += weight
 * times the gradient of its part of the loss. */
Err open_perceptual(Stage *s, size_t *plan, size_t *tables);
Err plan_perceptual(Stage *s);
Err add_perceptual(Stage *s, const real *images, const real *xrec, size_t B, double weight, double *mean, real *dxrec);
Err convert_perceptual(const char *files, const char *out);

/* train_codes.c. count: the codes raw (n) of a micro batch to s->usage. fit: a new transition's token values are the
 * codes in use. remap: the run's first stage, so that it numbers only what the training pictures use. */
void count_codes(Stage *s, const int32_t *raw, size_t n);
CodeUse code_use(const uint32_t *usage, size_t n_embed);
void print_codes(const Stage *s, FILE *to, const CodeUse *val);
/* the last columns; val NULL: none; as snprintf */
int log_codes(const Stage *s, char *text, size_t size, const Metrics *m, const Metrics *val);
Err fit_to_codes(Stage *s, NetConfig *c);
Err remap_first_stage(Stage *s);

/* Which number of the endless sequence of training examples row b of a micro batch is, whichever rank computes it. */
static inline uint64_t example_number(const Stage *s, uint64_t micro, size_t b) {
    return micro * s->of + s->first + b;
}

/* train_run.c. To stderr, by the first rank alone */
void note(const char *fmt, ...) PRINTF_LIKE(1, 2);
/* out = RUN/STAGEsuffix, returned */
const char *run_path(const Stage *s, char out[1100], const char *suffix);
int file_exists(const char *path);
Err make_folder(const char *path);
/* RUN/skipped.txt gets the damaged pictures of d; how many there are is said */
Err list_damaged(const Stage *s, const Dataset *d);
void say_damaged(const Stage *s);
/* Before anything large is allocated: `arenas` arrays as large as all parameters, the network's plan (bytes), other
 * buffers (rows x columns). On a GPU: values, gradients, moments and moving average in float, in bf16 the values
 * again. */
Err check_memory(Stage *s, size_t arenas, size_t plan, size_t rows, size_t columns);
Precision gpu_precision(const Stage *s);
Err check_gpu_memory(Stage *s, size_t plan);
/* to = the settings in from, but for the checksum of the file that they came from */
Err copy_settings(Config *to, const Config *from);
/* STAGE.state.safetensors and STAGE.safetensors, atomically; the first alone, beside the one before or in its place;
 * STAGE.best.safetensors if the evaluation is the best so far; the stage as a state left it. All wait for room. */
Err save(Stage *s);
Err gather_usage(Stage *s); /* the first rank then has the counts of all */
Err save_state(Stage *s, int beside);
Err save_best(Stage *s, const Metrics *val);
Err load_state(Stage *s, const Checkpoint *ck);
void say_disk(Stage *s); /* how much of it checkpoints take */
/* log.tsv: one line per step; lines behind the present step, about to be repeated, are dropped */
Err log_open(Stage *s, Progress *p);
Err log_step(Stage *s, Progress *p, const Metrics *m, double lr, double norm, const Metrics *val, const Metrics *ema);
void show_step(const Stage *s, Progress *p, const Metrics *m, double lr, double norm);
/* Evaluates with the weights as they are and, for transitions, with their EMA. */
Err evaluate_both(Stage *s, Metrics *val, Metrics *ema);
void print_evaluation(const Stage *s, FILE *to, const Metrics *val, const Metrics *ema);

/* train_survive.c */
void survive_defaults(Stage *s);
/* Its part of the state; its tensor among the others */
Err survive_load(Stage *s, const Checkpoint *ck);
Err survive_collect(Stage *s, TensorList *list);
/* The number of micro batch i of the present step; the loss as tests want it */
uint64_t micro_number(const Stage *s, size_t i);
double test_loss(const Stage *s, uint64_t micro, double loss);
double test_discriminator(const Stage *s, double norm);
/* NULL, or what is wrong with a step of this loss and norm; a step that was right becomes part of the measure */
const char *what_is_bad(const Stage *s, double loss, double norm);
void remember_step(Stage *s, double loss, double norm);
void forget_steps(Stage *s); /* the loss will be another one from here on */
/* Back to the last checkpoint, from where the present step's micro batches are left out. */
Err roll_back(Stage *s, const Metrics *m, double norm, const char *reason);
/* RUN/skipped_batches.tsv: what the state leaves out, and one more line or NULL */
Err list_skipped(Stage *s, void *line);
/* write(s, argument), again and again while the disk is full, unless --no-wait or a signal says otherwise. bytes: what
 * it takes, at least. */
Err until_room(Stage *s, Err (*write)(Stage *s, void *argument), void *argument, size_t bytes);
/* meta gets the checksum of the tensors and of itself. */
Err add_checksum(Config *meta, const Tensor *tensor, size_t n);
/* The state that was written as `written` becomes the newest; with `beside`, the newest becomes the one before. */
Err state_put(const Stage *s, const char *written, int beside);
int state_exists(const Stage *s);
/* The newest that can be read; damaged newer ones are said, and put aside if `tidy`. */
Err state_open(const Stage *s, Checkpoint *ck, int tidy);
Err state_open_all(const Stage *s, Checkpoint *ck, int tidy); /* on every rank; the first tidies */
/* Temporary files of this stage whose process is gone */
void remove_leftovers(const Stage *s);

/* settings.c */
extern Options options;
extern const Option option_table[];
extern const char train_intro[];
const char *recipe_path(const Options *o, char out[1100]);
Err read_recipe(Stage *s);
Err apply_options(Stage *s);
Err read_settings(Stage *s, int continuing);
size_t pictures_per_step(const Stage *s);
Err settle_device(Stage *s, Options *o, int continuing);
void check_options(const Options *o);
void default_folders(Options *o);

/* report.c */
int due(uint64_t step, size_t every, size_t last);
Err begin_report(Stage *s, Progress *p, View *v);
Err report_step(Stage *s, Progress *p, View *v, const Metrics *m, double lr, double norm);
void say_start(Stage *s);
void say_end(const Stage *s);
void say_waiting(double waited);
Err count_scales(const Options *o, const Config *settings, size_t *T);
int program_folder(const Options *o);

#endif
