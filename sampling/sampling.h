/* sampling.h - what sampling/ gives: a model's folder opened, bounds, nearest pictures, pictures in a terminal, and
 * what ./sample and ./inpaint ask and say alike. */
#ifndef SAMPLING_H
#define SAMPLING_H

#include "imagebart.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- model.c: a model as it lies on the disk: a VQGAN, a schedule and T transitions in one folder ---- */

typedef struct {
    char folder[PATH_BYTES], recipe[PATH_BYTES]; /* recipe: official files' configuration */
    Config meta;                                 /* of scale 1 */
    Schedule schedule;
    Vqgan *vqgan;
    Checkpoint vqgan_file; /* its weights stay there */
    size_t h, w, K, side;  /* token grid, token values, picture side in pixels */
    Classes classes;       /* n = 0: none */
    int loaded;            /* scale whose transition is in memory, 0: none. One at a time. */
    Transformer *net;
    Checkpoint file;                    /* its file: the weights stay there */
    NetConfig config[MAX_SCALES + 1];   /* [t] of scale t, [0] of all scales of a joint model */
    int32_t null_class[MAX_SCALES + 1]; /* [t] the label "no class" that scale t was trained with too; -1: none */
    int joint;                          /* one file for all scales */
    int official;         /* the files do not say what they are, and have the first stage in them: the recipe says it */
    int ckpt;             /* they are PyTorch's, else safetensors */
    char note[ERR_MAX];   /* what is to be said once about the files; "": nothing */
    int no_ema;           /* set after model_open: sample with the trained weights rather than their moving average */
    WeightFormat weights; /* model_weights: how the transitions' matrices are kept */
    int cuda;             /* model_use_cuda */
} Model;
/* name_or_folder: a named model, or a folder with vqgan.safetensors and scale1..scaleT.safetensors, or one with the
 * official scale1..scaleT.ckpt and, unless their tensors are a named model's, a recipe config.txt. *substituted is set
 * to the named entry when its weights are not installed and the bundled model was opened instead (the caller must say
 * so); NULL forbids that. */
Err model_open(Model *m, const char *name_or_folder, const NamedModel **substituted);
/* f32, bf16x3, bf16 or int8; NULL: the usual. Another name, or what there is not here, is an error, of this option. cuda:
 * for a GPU. */
Err weight_format(WeightFormat *format, const char *name, int cuda, const char *option);
const char *weight_name(WeightFormat format);
/* How matrices of transitions are kept; and so, what products multiply everywhere else in both networks
 * (weight_precision). f32 until then. */
void model_weights(Model *m, WeightFormat format);
void model_close(Model *m);
/* How many of a named model's files are here; missing: the first that is not, "" if all are. */
size_t model_files(char missing[32], const NamedModel *named);
/* After model_weights: everything computes on the GPU from now on. */
Err model_use_cuda(Model *m);
void model_unload(Model *m);      /* releases the transition that is in memory */
Err model_scale(Model *m, int t); /* loads scale t's transition (EMA weights), releases the other */
/* What diffusion.c draws from: the chain's network t is loaded when its turn comes. Valid as long as the model. */
Chain model_chain(Model *m);
/* images (n,3,side,side) decoded from tokens (n,N), decode_batch pictures at a time. */
Err decode_pictures(Model *m, const int32_t *tokens, size_t n, real *images);
Err decode_planned(Model *m, const int32_t *tokens, size_t n, real *images); /* n are planned for already */
size_t decode_batch(const Model *m, size_t n);
/* A class of the model as classes_find knows it; an error if the model has none. */
Err model_class(const Model *m, const char *name, int32_t *label);
/* Bytes that sampling `batch` at a time holds; they are all needed throughout, weights in mapped files too: if the
 * kernel drops their pages, every token reads them from the disk again. */
typedef struct {
    size_t first_stage, scale; /* weights: of the VQGAN; of the largest transition, as one is loaded at a time */
    size_t activations;        /* what both plan, the caches of decoding among it, and `pictures` decoded pictures */
    size_t total;              /* of the host */
    size_t gpu_first_stage, gpu_scale, gpu_activations; /* with Model.cuda: the same on the GPU */
} ModelMemory;
Err model_memory(Model *m, size_t batch, size_t pictures, ModelMemory *out);
/* Writes the model as safetensors, weights as F32, F16 or BF16, into a folder that has no model. */
Err model_convert(Model *m, const char *folder, Dtype store);
/* A transition's file: its alphats and alphacum buffers; without them, redraw_prob of its metadata. */
Err schedule_read(Schedule *s, const Checkpoint *ck, int T);

/* ---- bounds.c: how likely a model finds a picture ---- */

enum { BOUND_ROWS = 8 }; /* rows in a batch of the following two */
/* bound (n_classes) = what tells the class of a picture of which only some tokens of x_0 (N) are kept, the least being
 * the best: the variational bound (paper section 3.1) on them under each class, in nats per token, a mean over a few
 * draws of the chain of sum_t KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t, class)). What is not kept is noise at every
 * scale, which the networks of t >= 2 have learnt to expect; scale 1, whose decoder has read nothing but clean
 * pictures, has no say unless it is the only one. n_classes forward passes per scale. */
Err class_bounds(const Chain *c, const int32_t *tokens, const uint8_t *keep, uint64_t seed, double *bound);
/* *bound = the same for one class alone; label -1: a model without classes. Fewer draws. */
Err kept_bound(const Chain *c, const int32_t *tokens, const uint8_t *keep, int32_t label, uint64_t seed, double *bound);
/* bound (n) = how unlikely the model finds each picture (n,N) of class label (n; NULL: a model without classes): the
 * variational bound as above, of all tokens and over all scales. Two draws of the chain for each. */
Err picture_bounds(const Chain *c, const int32_t *tokens, const int32_t *label, size_t n, uint64_t seed, double *bound);

/* The same, and entropy (n,N) = how unsure the model is of each token: that of p(x_0[i] | x_0[0..i-1], x_1) in bits, a
 * mean over the draws; NULL: not wanted. */
Err picture_guesses(const Chain *c, const int32_t *tokens, const int32_t *label, size_t n, uint64_t seed, double *bound,
                    float *entropy);

/* ---- draw.c: new pictures, a batch at a time ---- */

/* The pictures that are being drawn: number at .. at + count - 1 of a job, `each` rows for each of them. */
typedef struct {
    size_t at, count, each;
    const SampleOptions *options;
} DrawBatch;
/* Who watches a job: each may be NULL, none changes what is drawn. */
typedef struct {
    int (*progress)(void *context, const DrawBatch *b, int t, size_t repeat, size_t done,
                    size_t of); /* nonzero: stop */
    void (*scale_done)(void *context, const DrawBatch *b, int t,
                       const int32_t *tokens);       /* (count * each, N) = x_{t-1} */
    Err (*drawn)(void *context, const DrawBatch *b); /* the batch's pictures are there */
    int (*stopped)(void *context);                   /* asked before every scale, of bounds too; nonzero: stop */
    void *context;
} DrawWatch;

typedef struct {
    Model *model;
    SampleOptions options; /* seed, temperature, ..., counts */
    size_t n, M, rows;     /* M are drawn for each picture, of which one is kept; rows of a batch: draw_rows */
    uint64_t first;        /* number of the first picture */
    int32_t *label;        /* (n) or NULL */
    const int32_t *known;  /* (N) of a picture that is edited: its tokens, ... */
    const uint8_t *keep;   /* ... (N) which of them stay; M are candidates then (sample_chain). NULL: new pictures */
    int with_chain, with_bounds;
    DrawWatch watch;
    /* results, to be released with draw_free, as label is */
    int32_t *tokens; /* (n,N) x_0 */
    int32_t *chain;  /* (n,T+1,N) x_T .. x_0, with_chain */
    double *bound;   /* (n) with_bounds: see picture_guesses */
    float *entropy;  /* (n,N) */
    /* a batch, (rows), of which one in M is kept */
    DrawBatch batch;
    Chain chain_of_model;
    size_t N;
    int32_t *drawn_label, *drawn, *drawn_chain, *known_rows;
    double *drawn_bound;
    float *drawn_entropy;
} Draw;
size_t draw_rows(size_t n, size_t batch, size_t M);
/* *label (n) = the class of that name, or a random one for each picture, which the seed and its number tell; NULL: the
 * model has no classes. */
Err draw_classes(int32_t **label, const Model *m, const char *name, uint64_t seed, uint64_t first, size_t n);
Err draw_pictures(Draw *d);
Chain draw_chain(Draw *d); /* the model's, which ends where the watcher stops it */
void draw_free(Draw *d);

/* What the bound of scales T..last would be if every token were guessed blindly, p = 1/K: for all of them and last = 1 it
 * is somewhat more than ln K. */
double blind_bound(const Chain *c, int last);

/* ---- score.c ---- */

enum { SCORE_BYTES = 160, MAX_SCORED = 1024 };
/* What is a good bound of a whole picture: what blind guessing has, and, if the model's file says it
 * (imagebart.own_nats), what the model's good pictures have. */
const char *score_anchors(char text[SCORE_BYTES], const Chain *c, const Config *meta);

/* ---- edit.c, paste.c: a part of a picture drawn anew ---- */

/* What is to be edited, as files lie in memory, and which part of it: one of mask, half, window, outside and extend. */
typedef struct {
    const uint8_t *image, *mask;
    size_t image_bytes, mask_bytes;
    const Image *pixels, *mask_pixels; /* instead of them, or NULL */
    const char *half;                  /* upper, lower, left or right of the centred square */
    size_t window, outside;            /* a square in its middle, in the model's pixels; all but that */
    size_t extend;                     /* all around the picture, which is scaled to so many pixels; not with paste */
    int invert;                        /* light parts of the mask are drawn anew */
    int official;       /* a token stays if its first pixel does, as in the official code (SPEC section 5) */
    int paste;          /* the result goes back into the whole picture: the square lies around the hole */
    size_t most_pixels; /* of a picture; 0: as image_decode */
} EditArgs;
typedef struct {
    Prep prep;
    size_t H, W;         /* of the picture, upright */
    Image whole;         /* with paste: it, with its alpha */
    size_t y0, x0;       /* with paste: where the square begins that the model sees, ... */
    size_t square;       /* ... and its side */
    uint8_t *hole;       /* with paste: (square,square) 1 = drawn anew */
    int hole_is_exact;   /* the mask had the picture's size */
    Image picture;       /* (side,side) that square, as the model sees it */
    uint8_t *keep;       /* (side,side) 1 = the pixel stays */
    uint8_t *keep_token; /* (N) */
    size_t kept;         /* pixels */
    size_t redrawn;      /* tokens */
    const char *note;    /* how transparent parts of the mask were taken, or NULL */
    Profile profile;     /* of the file whose kept pixels the result has */
    /* why it failed, if not since it does not fit: */
    const char *unreadable; /* "image", "mask": no picture that can be read; NULL */
    int too_many;           /* pixels */
} EditPicture;
/* To be released with edit_free in any case. */
Err edit_read(EditPicture *p, const Model *m, const EditArgs *a);
void edit_free(EditPicture *p);
/* With paste: the result goes into this picture of the same size instead. */
Err edit_into(EditPicture *p, const uint8_t *image, size_t bytes);
/* known (N) = the tokens of the picture. Plans the first stage. */
Err edit_encode(const EditPicture *p, Model *m, uint64_t seed, int32_t *known);
/* An error that says why no token is kept, and what to do: then nothing tells the class. */
Err edit_keeps_some(const EditPicture *p, const Model *m, const EditArgs *a);
/* *label = the class that explains the kept tokens best. */
Err edit_class(int32_t *label, const Chain *chain, const int32_t *known, const uint8_t *keep_token, uint64_t seed);
/* text = a sentence if the kept part is unlike all that the model has learnt, else "". label -1: a model without
 * classes. */
Err edit_unlike(char text[ERR_MAX], const EditPicture *p, Model *m, const int32_t *known, int32_t label, uint64_t seed);
/* out (H,W) = the whole picture with what was drawn (side,side) in its hole; all else is as it was, bit for bit. */
Err paste_picture(Image *out, const EditPicture *p, const Model *m, const Image *drawn);

/* ---- library.c: see libimagebart.h ---- */

struct imagebart_model;
Model *library_model(struct imagebart_model *model);

/* ---- nearest.c ---- */

/* How near drawn pictures, tokens (n,N), come to the training pictures of the dataset at path, mirrored ones included:
 * a line on stdout for each, a sum on stderr. Ends the first stage's plan. */
Err nearest_report(Model *m, const int32_t *tokens, size_t n, const char *path);
/* Whether there are such pictures, before the work. */
Err nearest_check(const char *path);

/* ---- list.c ---- */

/* On stdout: the named models, which of them are here, how to get the others. */
Err list_models(void);

/* ---- output.c: where pictures will go, looked at before the work; errors name the option ---- */

/* "DIR/": a file for each picture goes there. */
int is_out_folder(const char *path);
/* folder, which ends in '/', and 0001.png */
Err single_path(char path[PATH_BYTES], const char *folder, size_t number);
/* PNGs can be written there: the folders are there and writable (out may be DIR/, which is made), the names are not other
 * formats', and no two are the same file. Nothing is left there. chain, film: NULL when none is wanted. */
Err outputs_check(const char *out, const char *chain, const char *film);
/* path, which may be NULL, is not the file that is read, nor in the folder that is; `input` says which option names it. */
Err output_spares(const char *option, const char *path, const char *input, const char *input_path);
Err output_spares_folder(const char *option, const char *path, const char *input, const char *folder);
/* A grid of n pictures (side,side), enlarged, is not too large for image_grid and for those who read it. */
Err output_grid_check(const char *option, size_t n, size_t side, size_t columns, size_t gap, size_t enlarge);

/* ---- region.c ---- */

/* keep (side,side) = 1 outside of (inside = 1: inside of) a centred square of `size` pixels. */
void window_mask(uint8_t *keep, size_t side, size_t size, int inside);
/* keep (side,side) = 0 in the upper, lower, left or right half. */
void half_mask(uint8_t *keep, size_t side, const char *half);
/* The square picture moves into the middle of one of side x side. Around it its edges go on: the first stage sees them
 * beside the kept part. */
Err put_into_middle(Image *im, size_t side);

/* ---- terminal.c ---- */

/* Draws a PNG file on stdout: Kitty or iTerm2 graphics where the terminal says it has them, else 24-bit half blocks. */
Err show_png(const char *path);

/* ---- options.c: what ./sample and ./inpaint ask and say alike ---- */

typedef struct {
    const char *model, *out, *class_name, *temperature, *top_k, *guidance, *chain_length, *device, *weights;
    size_t n, first, batch, block, threads; /* first: number of the first picture */
    uint64_t seed;                          /* the user's or a new one; it is printed and kept in the PNG */
    const char *animate;                    /* where the chain goes as an animated PNG, or NULL */
    size_t enlarge;                         /* a pixel becomes so many squared */
    int official_temperature, no_ema, show, quiet, verbose;
    int one_of_several; /* its number is told, though it is drawn alone */
} SamplingArgs;
/* options_parse with the program's own rows, then those that both have, which fill *a. */
void sampling_parse(int argc, char **argv, const Option *own, SamplingArgs *a, const char *intro);
/* Threads, seed, device, model; dies on error. */
void sampling_start(SamplingArgs *a, Model *m, const NamedModel **stand_in_for);
/* New pictures, or edited ones, for which a model recommends other numbers. */
typedef enum { DRAW_NEW, DRAW_EDIT } DrawKind;
/* What the user gave, else what the model's file recommends (imagebart.temperature, .top_k, .guidance, and
 * .chain_length or for edits .inpaint_chain_length), else 1, all, 1 and the official chain lengths. */
Err sampling_choose(SampleOptions *o, const SamplingArgs *a, const Model *m, DrawKind kind);
void sampling_options(SampleOptions *o, const SamplingArgs *a, const Model *m, DrawKind kind); /* ends the program */
/* *M = how many are drawn for each picture, of which one is kept, or for an edit how many candidates: the user's number,
 * else (0) what the model recommends, else 1. */
Err sampling_many(size_t *M, const Model *m, size_t given, DrawKind kind);
/* Rows of the decoder's batch for n samples: with guidance at any scale two for each, with its class and with none. */
size_t sampling_rows(const SampleOptions *o, int T, size_t n);
/* On stderr unless -q; on stderr with -v alone. */
void say(const SamplingArgs *a, const char *fmt, ...) PRINTF_LIKE(2, 3);
void detail(const SamplingArgs *a, const char *fmt, ...) PRINTF_LIKE(2, 3);
/* On stderr, with -v: how much memory this takes (see model_memory) and how much there is, and which vectors and how many
 * threads compute, this also if a quota leaves few; dies if memory does not suffice. */
void sampling_memory(const SamplingArgs *a, Model *m, size_t batch, size_t pictures);
int sampling_progress(void *context, int t, size_t repeat, size_t done, size_t of); /* SampleOptions.progress */
/* A line on stderr per scale: how many passes of the decoder it took, and how good the guesses were. */
void say_drafts(const SamplingArgs *a, const DraftCounts *counts, int T);
/* The name of a file or folder without those above it: a picture is passed on, and tells nobody's folders. */
const char *last_part(const char *path);
/* "0.75,0.5,0.4": x[T] .. x[1], each with as many digits as bring it back. */
const char *scales_text(char list[MAX_SCALES * 32], const double *x, int T);
/* The options as PNG text, for image_write_png: n pictures from number `first` on. Of one picture its number is told, if
 * it is of several. */
Err sampling_text(Config *text, const SamplingArgs *a, const SampleOptions *o, const Model *m);
/* What the text says of an edit beside that: the picture's name without its folder, ... */
Err sampling_text_edit(Config *text, const char *image, size_t candidates, const EditArgs *a);
Err sampling_text_place(Config *text, size_t n, uint64_t first, int of_several);

/* ---- settings.c: ./sample --settings ---- */

enum { SETTINGS_WORDS = 32 };
typedef struct {
    const char *path; /* the picture, NULL: none was given */
    Config text;      /* what it says */
    const char *word[SETTINGS_WORDS];
    size_t words;
    char **argv;
    int one_of_several;
} PictureSettings;
/* If the arguments give --settings: *argc and *argv are theirs with the picture's options in front, valid until
 * picture_settings_close. An error if the picture does not say how ./sample drew it. */
Err picture_settings_open(PictureSettings *s, int *argc, char ***argv);
/* *model = its model; an error if that is not here: no other may stand in for it. */
Err picture_settings_model(const PictureSettings *s, const char **model);
void picture_settings_close(PictureSettings *s);

/* ---- sheet.c: pictures from tokens, into files ---- */

enum { SHEET_GAP = 2, MAX_ENLARGE = 64 }; /* white pixels between the pictures of a grid */
typedef struct {
    Model *model;
    const SamplingArgs *args;
    const SampleOptions *options;
    const Config *text;      /* what files say of themselves beside the options, or NULL */
    const int32_t *label;    /* (n) classes, or NULL */
    const Image *original;   /* (side,side) whose kept pixels are put back, or NULL */
    const uint8_t *keep;     /* (side,side) */
    const Profile *profile;  /* that files are written with, or NULL */
    const EditPicture *into; /* they go back into this whole picture, or NULL */
    int no_paste, compare;   /* compare: grids begin with the original, and with what is kept of it */
} Sheet;
size_t sheet_columns(const Sheet *s, size_t n); /* of a grid of n */
/* A grid of the pictures of tokens (n,N). */
Err sheet_write(const Sheet *s, const int32_t *tokens, size_t n, size_t columns, const char *path);
/* The chains (n,steps,N), a row for each picture, as a grid that says that it is of these. */
Err sheet_chain(const Sheet *s, const int32_t *chain, size_t n, size_t steps, const char *path);
/* folder/0001.png ..., from *first on, which is behind what is there already. */
Err sheet_singles(const Sheet *s, const int32_t *tokens, size_t n, const char *folder, size_t *first);
/* chain (n,steps,N) as an animated PNG, a frame a step. */
Err sheet_animate(const Sheet *s, const int32_t *chain, size_t n, size_t steps, const char *path);
/* All that was asked for: args->out, a grid or single files; the chain, unless NULL, into args->animate. Says where on
 * stdout, and shows it in the terminal where that was asked for. */
Err sheet_files(const Sheet *s, const int32_t *tokens, const int32_t *chain, size_t n, size_t steps);

/* ---- score.c ---- */
/* What tells whether a picture is like those that the model has learnt. Photographs, to a model of emoji, differ most in
 * how badly its first stage draws them; what a good first stage of other things can draw, the bound tells. */
typedef struct {
    double nats, blind; /* the bound per kept token; what blind guessing would have */
    double error;       /* rms, pixels in 0..1, between the kept part and the first stage's of it */
    double nats_known[2],
        error_known[2]; /* least (0: unknown) and most of what the model knows: imagebart.familiar_nats,
                                           * .familiar_error of its file, else a share of blind, and 0.15 */
    int unlike;
} Familiar;
/* image (3,side,side); its tokens (N), some of which are kept; label -1: a model without classes. */
Err familiar(Familiar *f, Model *m, const real *image, const int32_t *tokens, const uint8_t *keep, int32_t label,
             uint64_t seed);
/* text = the sentence that says that it is unlike. */
void familiar_text(char text[ERR_MAX], const Model *m, const Familiar *f);
/* ./sample --score: a line on stdout for each picture. */
Err score_pictures(SamplingArgs *a, OptionList *pictures);

#ifdef __cplusplus
}
#endif
#endif
