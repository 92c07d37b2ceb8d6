/* stage.h - what the files of ./train share: settings, the stage being trained, the run's folder.
 *
 * training/ by height; a file calls only those before it:
 *
 *     parallel.c        several processes                    discriminator.c, perceptual.c   networks beside a VQGAN
 *     rate.c            the learning rate of a step
 *     folder.c          the run's folder: paths, notes, writing when the disk is full
 *     memory.c          what a stage takes
 *     state.c           checkpoints
 *     bad_batches.c     which steps do not count; going back
 *     edited.c          what an edited recipe says to a run that goes on
 *     official.c        what a recipe says in official words
 *     settings.c        the table of all options and recipe keys
 *     log.c view.c      log.tsv; loss.svg and TensorBoard
 *     report.c          what the user is told
 *     encoded.c         the data set as tokens
 *     gan.c codes.c     the first stage's discriminator and its codebook
 *     schedule.c        --schedule psim
 *     ahead.c           --all before its first step: work and disk
 *     first_stage.c     pictures -> tokens -> pictures: all but the micro batch, which train.c shows
 *     second_stage.c    tokens x_t -> x_{t-1}: the same
 *
 * What the lower files must know of a kind of stage, they ask through StageKind. Nobody else includes this.
 *
 * For tests only, from the environment:
 *   IMAGEBART_TEST_NAN="stage:micro[,micro...]"    the loss of these micro batches becomes NaN
 *   IMAGEBART_TEST_SPIKE="stage:micro[,micro...]"  ... a hundred times what it is
 *   IMAGEBART_TEST_GRADIENT=...                    the gradient norm of their steps becomes 100,000 times what it is
 *   IMAGEBART_TEST_NAN_DISCRIMINATOR=...           the discriminator's gradient norm becomes NaN behind them
 *   IMAGEBART_TEST_GRADIENT_DISCRIMINATOR=...      ... 100,000 times what it is
 *   IMAGEBART_TEST_SPIKE_DISCRIMINATOR=...         its loss becomes 100
 *   IMAGEBART_TEST_PAUSE=SECONDS                   between tries while the disk is full, instead of 30 */
#ifndef STAGE_H
#define STAGE_H

#include "training/training.h"

#include <stdio.h>

/* ------------------------------------------------------------------------------------------------------------
 * Settings: what the user and the recipe said
 * ---------------------------------------------------------------------------------------------------------- */

#define NOT_GIVEN ((size_t)-1)

/* One field for each row of the table in settings.c, which says its option, its key in the recipe, default and range.
 * As the user gave them, numbers that the recipe has too are NOT_GIVEN, or -1 if real, where the user said nothing. */
typedef struct {
    const char *program; /* as it was called */
    int cuda;            /* on the GPU */
    double later;        /* with --all: the work of the stages behind this one, as ahead.c counts it */

    /* the user's alone */
    const char *model, *data, *list, *val_list, *run, *config, *init, *device, *precision, *schedule;
    const char *perceptual, *convert_perceptual;
    int vqgan, joint, all, resume, eval, no_wait, remap;
    size_t scale, threads, save_every, eval_every, picture_every, keep;

    /* the recipe's, or the user's over it */
    size_t steps, batch, accumulate, seed;
    double lr;            /* the learning rate's peak, as the user gave it */
    double alpha;         /* loss = alpha soft + (1-alpha) hard */
    double label_dropout; /* how often a label gives way to "no class" (classifier-free guidance) */
    size_t crops;         /* of a picture, for transitions; settings_read says how many where nobody does */
    size_t early_stop;    /* evaluations without a better one that end a stage; 0: none do */
    int balance;          /* draw every class equally often */
    int bf16_states;      /* Adam's moments in bf16 */
    const char *store;    /* the user's; Stage.store is what holds */

    /* the recipe's alone */
    int flip;             /* pictures mirrored, too */
    int compact;          /* leave out of the weights what can be derived */
    size_t restart_codes; /* steps after which unused codes are put where latents are; 0: never */
    double l1_weight, l2_weight, codebook_weight;
    double ema_decay, weight_decay_scale;
    double spike; /* how many deviations are one; 0: no such thing */
} Settings;

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

typedef struct {
    Metrics mean;    /* over the step's micro batches, of all ranks */
    double norm, lr; /* of the gradient; learning rate */
    const char *bad; /* why the step does not count; NULL: it does */
} Step;

typedef struct {
    /* bytes: parameters, gradients and optimizer; the network's plan; a first stage's data, as they are read, and a
     * transition's; what was free */
    size_t state, activations, pictures, tokens, available;
} Memory;

enum {
    KEEP_MAX = 99,     /* states */
    SKIPPED_MAX = 4096 /* micro batches that a run may leave out */
};

/* What has happened so far: part of the state. */
typedef struct {
    real recent[2 * RECENT];                /* (2,RECENT) loss and gradient norm of step i at i % RECENT; NaN: none */
    size_t skipped[SKIPPED_MAX], n_skipped; /* numbers of micro batches that are left out, ascending */
    double best;                            /* the least validation loss, */
    size_t best_step;                       /* and its step; known to the first rank alone until the state is read */
} History;

typedef struct Gan Gan; /* gan.c */

/* A first stage's own */
typedef struct {
    Loader *loader;
    uint64_t loader_at;  /* the micro batch that it gives next */
    real *dxrec;         /* (B,3,size,size) gradient of the reconstruction */
    uint32_t *usage;     /* (n_embed) how often each code was used since the last restart of dead codes */
    uint32_t *val_usage; /* (n_embed) the same in an evaluation */
    int64_t *used; /* (n_used) codes that are tokens, as the recipe's remap says; NULL: all, or --remap counts them */
    size_t n_used;
    double perceptual_weight;
    Perceptual *perceptual; /* NULL: not part of the loss */
    Gan *gan;               /* NULL: no discriminator */
} FirstStage;

/* A transition's own */
typedef struct {
    Transformer *net;
    Schedule schedule;
    int t; /* the scale; 0: joint */
    Tokens train, val;
    int32_t null_class; /* the label that means "no class" */
    uint32_t *order;    /* of the present epoch; when balanced: the examples, class by class */
    uint64_t epoch;
    size_t *class_at; /* balanced: where each class that has examples starts in order, and the end; n_drawn classes */
    size_t n_drawn;
    int32_t *x0, *x_prev, *x_t, *ts, *label; /* (B,N) x_0, x_{t-1}, x_t; (B) scales, labels */
    real *q, *dlogits;                       /* (B,N,K) posterior, gradient */
} SecondStage;

typedef struct Stage Stage;

/* What differs between the two kinds. NULL: nothing to do. */
typedef struct {
    int ema;                                                    /* a moving average of the weights is kept */
    const char *part_name[2];                                   /* of Metrics.part */
    Err (*build)(Stage *s);                                     /* data, network, buffers; not the parameters' memory */
    Err (*micro_batch)(Stage *s, uint64_t micro, Metrics *out); /* forward, loss, backward with weight 1/shares */
    Err (*after_step)(Stage *s);                                /* which counts */
    Err (*evaluate)(Stage *s, Metrics *out);                    /* on the held-out split */
    Err (*picture)(Stage *s, const char *path);
    Err (*start_from)(Stage *s, const Checkpoint *ck);
    /* state.c: what ranks have between them, to the first; counts alone, or other networks too. Tensors beside the
     * stage's own parameters, out of a state again; those for sampling. */
    Err (*gather)(Stage *s, int counts_alone);
    Err (*collect)(Stage *s, TensorList *list);
    Err (*load)(Stage *s, const Checkpoint *ck);
    Err (*collect_weights)(Stage *s, TensorList *list);
    /* log.c: the last columns of log.tsv, as snprintf, val NULL: none; a part of the progress line; an evaluation */
    int (*log)(const Stage *s, char *text, size_t size, const Metrics *m, const Metrics *val);
    const char *(*progress)(const Stage *s, char text[96]);
    void (*print_evaluation)(const Stage *s, FILE *to, const Metrics *val, const Metrics *ema);
} StageKind;

struct Stage {
    char name[16]; /* "vqgan", "scale2", "joint": names the files */
    const StageKind *kind;
    const Settings *given; /* by the user */
    Settings set;          /* what holds */
    Config recipe;         /* the recipe's part for this stage, under the official keys, with the user's changes */
    Params *params;
    AdamW adam;
    double lr_scale;                      /* base_learning_rate times the pictures of a step, or 1 */
    Rate rate;                            /* the factor of that, step by step */
    Dtype store;                          /* of the weights for sampling */
    Precision precision, usual_precision; /* of products; where neither the user nor the run says which */

    size_t batch, global_batch, rank_first; /* pictures of a micro batch: this rank's, all ranks', where its begin */
    double shares;                          /* a step is the mean over these: micro batches of all ranks */
    size_t micro_index;                     /* of the present micro batch in its step */
    uint64_t step, ema_updates;             /* done */

    Dataset train, val;
    Prep prep;
    size_t size; /* pixels a side */
    Vqgan *vqgan;
    size_t h, w, N, K; /* grid, tokens, token values */
    FirstStage first;
    SecondStage second;

    char idle[256];        /* options that a finished stage has otherwise: "--seed 5, --lr 1"; "": none */
    char init[PATH_BYTES]; /* the recipe's ckpt_path, which Settings.init then is */
    int without_ema;       /* the weights that are written are the plain ones */

    History history;
    uint64_t saved;           /* the step of the last checkpoint */
    int has_state, rollbacks; /* there is one; how often this process went back to it */
    int said_risen;           /* that the validation loss rises */
    int trained;              /* this process took steps */
    int not_finite,
        said_passed_over; /* how many steps passed over were not finite, in a row; of how many it was said */
    Memory memory, gpu_memory;
    int all_read;     /* every picture was read before training began, */
    size_t n_damaged; /* of which these could not be */
};

/* Pixels a side of what the first stage draws: where its levels do not divide s->size, fewer. */
static inline size_t drawn_size(const Stage *s) {
    return s->h << (vqgan_config(s->vqgan)->levels - 1);
}

/* Which number of the endless sequence of training examples row b of a micro batch is, whichever rank computes it. */
static inline uint64_t example_number(const Stage *s, uint64_t micro, size_t b) {
    return micro * s->global_batch + s->rank_first + b;
}

/* ------------------------------------------------------------------------------------------------------------
 * The files, by height
 * ---------------------------------------------------------------------------------------------------------- */

/* folder.c. To stderr, by the first rank alone */
void say_once(const char *fmt, ...) PRINTF_LIKE(1, 2);
void say_note(const Checkpoint *ck); /* what is to be said of a file that was opened, if there is anything */
const char *run_path(const Stage *s, char out[PATH_BYTES], const char *suffix); /* out = RUN/STAGEsuffix, returned */
int file_exists(const char *path);
/* A file of lines, which may be missing: *f = NULL. close: e, or the error that ended the reading before the file's end */
Err open_lines(FILE **f, const char *path);
Err close_lines(FILE *f, const char *path, Err e);
Err data_is_there(const char *data); /* Settings.data; the error says how to come by pictures */
Err make_folder(const char *path);
/* Keeps other ./train out of the run, to the end of this one; an error if one is there. Nothing yet if the run has no
 * folder: make_run makes it, too. Where files cannot be locked, that is said. The first rank's work. */
Err lock_run(const char *run);
Err make_run(const char *run);
void unlock_run(void); /* where another program takes this one's place */
/* RUN/skipped.txt gets the damaged pictures of d; how many there are is said */
Err list_damaged(const Stage *s, const Dataset *d);
/* The classes of the pictures, if the recipe has such, and what of the folder is left out. say_start says how many there
 * are. Once in a process. */
void say_pictures(const Stage *s, int has_class);
void say_damaged(const Stage *s);
/* write(s, argument), again and again while the disk is full, unless --no-wait or a signal says otherwise. bytes: what
 * it takes, at least. */
Err retry_when_full(Stage *s, Err (*write)(Stage *s, void *argument), void *argument, size_t bytes);
void remove_leftovers(const Stage *s); /* temporary files whose process is gone */

/* memory.c. Before anything large is allocated: `arenas` arrays as large as all parameters, the network's plan (bytes),
 * other buffers (rows x columns). On a GPU: values, gradients, moments and moving average in float, in bf16 the values
 * again. */
Err check_memory(Stage *s, size_t arenas, size_t plan, size_t rows, size_t columns);
Err check_gpu_memory(Stage *s, size_t plan);

/* state.c */
Err copy_settings(Config *to, const Config *from); /* but for the checksum of the file that they came from */
int state_exists(const Stage *s);
int first_stage_trained(const Stage *s, char path[PATH_BYTES]); /* path: of a first stage's state, if the run has one */
int transitions_path(const Stage *s, char path[PATH_BYTES]);    /* of a transition's state, if the run has one */
/* The newest that can be read, on every rank; damaged newer ones are said, and put aside if `tidy`. */
Err state_open(const Stage *s, Checkpoint *ck, int tidy);
Err load_state(Stage *s, const Checkpoint *ck);
/* STAGE.state.safetensors and STAGE.safetensors, atomically; the first alone, beside the one before or in its place;
 * STAGE.best.safetensors if the evaluation is the best so far. All wait for room. */
Err save(Stage *s);
Err save_state(Stage *s, int beside);
Err save_best(Stage *s, const Metrics *val);
/* A run that ended between a state and its weights: those of the present step, unless the run has them, or the best
 * ones of a stage that ended early. A transition's first stage: an error if its file, path, is missing or older in such
 * a way. Both are the first rank's work. */
Err save_missing_weights(Stage *s);
Err check_first_stage(const Stage *s, const char *path);
/* Have evaluations been no better for as long as --early-stop says? Nothing but the state tells. use_best: then the
 * best weights become STAGE.safetensors; a first stage's do not if transitions know its tokens. */
int ended_early(const Stage *s);
Err use_best(Stage *s);
void say_disk(Stage *s); /* how much of it checkpoints take */
/* Before the stage is built, its parameters' table is enough: what its states and weights will take when it is done,
 * of which *state is one state, with `others` in it of other networks, and *there what there is of them. How many
 * steps its weights have: all, if it ended early. */
size_t planned_bytes(const Stage *s, size_t others, size_t *state, size_t *there);
size_t trained_steps(const Stage *s);
void history_start(History *h);
void forget_recent(real recent[2 * RECENT]);
void forget_steps(History *h); /* the loss will be another one from here on */

/* bad_batches.c. The number of micro batch i of the present step; the loss as tests want it */
uint64_t micro_number(const Stage *s, size_t i);
double test_loss(const Stage *s, uint64_t micro, double loss);
double test_norm(const Stage *s, double norm);
double test_discriminator_loss(const Stage *s, double loss);
double test_discriminator_norm(const Stage *s, double norm);
/* NULL, or what is wrong with a step of this loss and norm; a step that was right becomes part of the measure */
const char *why_bad(const Stage *s, double loss, double norm);
void remember_step(Stage *s, double loss, double norm);
/* The same of a discriminator's update of the step that was just made, which is remembered; recent as History.recent.
 * That update alone is passed over. */
const char *why_bad_discriminator(const Stage *s, real recent[2 * RECENT], double loss, double norm);
Err pass_over_discriminator(Stage *s, const char *why, double loss, double norm);
/* Need the run not go back after this bad step, whose gradients were not taken? Then the step is passed over. */
int can_pass_over(const Stage *s, const Step *step);
Err pass_over(Stage *s, Step *step);
/* Back to the last checkpoint, from where the present step's micro batches are left out. */
Err roll_back(Stage *s, const Step *step);
/* RUN/skipped_batches.tsv: what the state leaves out, and one more line or NULL */
Err list_skipped(Stage *s, void *line);

/* settings.c. parse: exits where the command line is wrong. read: of the stage whose Settings.vqgan, .scale say which,
 * over what the recipe says, or ck, the state that the run continues. */
/* edited.c. Does the stage go on, for there are steps left? */
int goes_on(const Stage *s);
/* A run goes on, and the recipe may have been edited: what it says otherwise than Stage.recipe, which is the
 * run's, is said or taken over, but for the keys that the user gives now; a key that the recipe says no more */
Err compare_recipe(Stage *s, const Config *recipe, const Config *given);
Err compare_removed(Stage *s, const Config *recipe, const Config *given, const char *key);

/* official.c. The settings read, over them what the recipe says in official words; recipe: its file, of a stage that
 * begins, or NULL */
Err official_settings(Stage *s, const char *recipe);

void settings_parse(Settings *given, int argc, char **argv);
Err settings_read(Stage *s, const Checkpoint *ck);
/* The training pictures, once they are open, as a setting of the run; says so if a run that goes on had others. */
Err settle_pictures(Stage *s, int continuing);
Err count_scales(const Settings *given, const Config *recipe, size_t *T);
int has_classes(
    const Stage
        *s); /* is the model conditioned on classes? As the stage's own recipe says; a first stage's is the file's */

/* view.c: RUN/events/STAGE/events.out.tfevents.TIME.HOST, for TensorBoard, begun; after a step is in log.tsv: its
 * numbers, every tenth step, and RUN/loss.svg anew when it was evaluated; a picture that was written to path; the end.
 * What the disk has no room for can be tried again. */
typedef struct {
    char path[PATH_BYTES + 320]; /* of the events; "": none */
    int evaluated;               /* the present step was */
} View;
Err view_open(Stage *s, void *view);
Err view_step(Stage *s, void *view);
Err view_picture(const Stage *s, View *v, const char *path);
Err view_close(Stage *s, void *view);

/* log.c: log.tsv, a line per step; lines behind the present step, about to be repeated, are dropped */
typedef struct {
    char path[PATH_BYTES], line[512];
    double started, rate; /* when; pictures a second */
    double work;          /* of a step, where stages follow */
    uint64_t first_step;
} Log;
Err log_open(Stage *s, Log *log);
Err log_step(Stage *s, Log *log, const Step *step, const Metrics *val, const Metrics *ema);
void show_step(const Stage *s, Log *log, const Step *step);
/* Evaluates with the weights as they are and, where there is one, with their EMA. */
Err evaluate_both(Stage *s, Metrics *val, Metrics *ema);

/* report.c. What is seen of a run, which is the first rank's work: at its beginning and after it went back; of a step;
 * at its end. All ranks call these. */
typedef struct {
    Log log;
    View view;
} Report;
int due(uint64_t step, size_t every, size_t last);
Err report_begin(Stage *s, Report *r);
Err report_step(Stage *s, Report *r, const Step *step);
Err report_end(Stage *s, Report *r);
int is_done(const Stage *s);
/* and the precision of products, unless that was the last that was said of it */ /* nothing is left to train */
void say_start(Stage *s);
void say_end(const Stage *s);
void say_waiting(double waited);         /* while this process waits for others */
int is_installed(const Settings *set);   /* called as "imagebart train" (base/command.c) */
int program_folder(const Settings *set); /* how much of Settings.program is its folder */

/* encoded.c. A run without a first stage gets the model's; opens the run's own, path: its file; the data set as its
 * tokens, to Stage.second. */
Err copy_first_stage(Stage *s);
Err open_first_stage(Stage *s, char path[PATH_BYTES]);
Err load_tokens(Stage *s, const char *vqgan_path);
Err token_bytes(const Stage *s, size_t *bytes); /* of the data as tokens: in memory, and as files once they are made */

/* gan.c: the first stage's discriminator, if the recipe asks for one; without one all of these do nothing. gan_create,
 * when it is known whether there is a perceptual loss, reads the settings, train.freeze_encoder too; gan_plan_bytes
 * adds what gan_plan then allocates: where it computes, and what the host has in any case, which are parameters and
 * what belongs to them. */
Err gan_check(const Stage *s); /* what gan_create will refuse, for --all before the first step */
Err gan_create(Stage *s);
Err gan_plan_bytes(const Stage *s, size_t *plan, size_t *tables);
Err gan_plan(Stage *s);
void gan_free(Stage *s);
/* Of a micro batch, before and after vqgan_backward: adds the discriminator's judgement to dxrec, which holds
 * 1/accumulate of the gradient of nll, and to loss; the gradients of the discriminator's own loss. Then its update. */
Err gan_generator(Stage *s, const real *images, const real *xrec, double *loss);
Err gan_discriminator(Stage *s, const real *xrec);
Err gan_after_step(Stage *s);
/* Its part of the state file, of --init, of a line of the log and of the progress line */
Err gan_gather(const Stage *s); /* from the GPU; an error unless all ranks have the same */
Err gan_collect_state(const Stage *s, TensorList *list);
Err gan_load_state(Stage *s, const Checkpoint *ck);
Err gan_start_from(Stage *s, const Checkpoint *ck);
size_t gan_state_bytes(const Stage *s); /* of a stage that is not built: as the recipe says */
int gan_log(const Stage *s, char *text, size_t size);
const char *gan_progress(const Stage *s, char text[96]);

/* codes.c. count: the codes of the last forward to usage. fit: a new transition's token values are the codes in use.
 * remap: the run's first stage, so that it numbers only what the training pictures use. */
void count_codes(Stage *s);
CodeUse code_use(const uint32_t *usage, size_t n_embed);
void print_codes(const Stage *s, FILE *to, const CodeUse *val);
int log_codes(const Stage *s, char *text, size_t size, const Metrics *val); /* the last columns, as StageKind.log */
Err fit_to_codes(Stage *s, NetConfig *c);
Err remap_first_stage(Stage *s);
/* A line, if the codes that a file lists as tokens have some twice */
Err say_repeated(const Stage *s, const char *file, const int64_t *codes, size_t n);
/* Before transitions: the run's first stage numbers the codes that their recipe's first_stage_config says. */
Err adopt_codes(Stage *s);

/* ahead.c: what the stages of --all will be. step_work: multiply-adds of a step of this stage; it is built, or checked as
 * below. add: a stage that was checked. behind: of all stages after that of this index, 0: the first stage. disk: says how
 * much of it is needed, or refuses. */
typedef struct {
    double work[MAX_SCALES + 1]; /* that is left */
    size_t bytes, moment,
        tokens; /* of the disk, beyond what is there: in the end, and while a state is written; files of
                                   * tokens */
} Ahead;
double step_work(const Stage *s);
void ahead_add(Ahead *a, const Stage *s);
double work_behind(const Ahead *a, size_t index);
Err ahead_disk(const Ahead *a, const Settings *o);

/* schedule.c: RUN/psim.txt, a curve for schedule_make, from the run's first stage and held-out pictures; the recipe's
 * line on stdout */
Err metric_schedule(Stage *s);

/* first_stage.c. next_pictures: images (B,3,size,size) of a micro batch. add_perceptual: *mean = LPIPS of B
 * reconstructions, 0 without; dxrec += weight times the gradient of its part of the loss. */
Err first_build(Stage *s);
Err first_check(Stage *s, VqganConfig *c); /* --all, before the first step: its configuration and table of parameters */
Err next_pictures(Stage *s, uint64_t micro, const real **images);
Err add_perceptual(Stage *s, const real *images, const real *xrec, size_t B, double weight, double *mean, real *dxrec);
Err first_after_step(Stage *s);
Err first_evaluate(Stage *s, Metrics *out);
Err first_picture(Stage *s, const char *path);
Err first_start_from(Stage *s, const Checkpoint *ck);
Err first_gather(Stage *s, int counts_alone);
Err first_collect(Stage *s, TensorList *list);
Err first_load(Stage *s, const Checkpoint *ck);
Err first_collect_weights(Stage *s, TensorList *list);
int first_log(const Stage *s, char *text, size_t size, const Metrics *m, const Metrics *val);
void first_print_evaluation(const Stage *s, FILE *to, const Metrics *val, const Metrics *ema);
void first_free(Stage *s);
Err convert_perceptual(const char *files, const char *out);

/* second_stage.c. next_tokens: x0 (B,N), label (B) of a micro batch. evaluate: over the held-out tokens, batch by batch
 * with loss_of, which train.c has: the loss of B examples at scale t, noised under seed, micro and the number of their
 * first token; with a weight above 0, gradients too. */
typedef Err TransitionLoss(Stage *s, int t, size_t B, uint64_t seed, uint64_t micro, uint64_t token, double weight,
                           Loss *loss);
Err second_build(Stage *s);
/* --all, before the first step: what second_build would refuse on a first stage of this configuration */
enum { TOKEN_VALUES = 65536 };
Err second_check(Stage *s, const VqganConfig *first, Err (*open_pictures)(Stage *s));
void next_tokens(Stage *s, uint64_t micro);
Err second_evaluate(Stage *s, TransitionLoss *loss_of, Metrics *out);
Err second_picture(Stage *s, const char *path);
Err second_start_from(Stage *s, const Checkpoint *ck);
Err second_collect_weights(Stage *s, TensorList *list);
void second_print_evaluation(const Stage *s, FILE *to, const Metrics *val, const Metrics *ema);
void second_free(Stage *s);

#endif
