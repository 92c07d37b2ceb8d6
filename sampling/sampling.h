/* sampling.h - what sampling/ gives: a model's folder opened, class names, bounds, what ./sample and ./inpaint share. */
#ifndef SAMPLING_H
#define SAMPLING_H

#include "imagebart.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- model.c: a model as it lies on the disk: a VQGAN, a schedule and T transitions in one folder ---- */

typedef struct {
    char folder[1024], recipe[1100]; /* recipe: official files' configuration */
    Config meta;                     /* of scale 1 */
    Schedule schedule;
    Vqgan *vqgan;
    Checkpoint vqgan_file; /* its weights stay there */
    size_t h, w, K, side;  /* token grid, token values, picture side in pixels */
    size_t n_classes;
    char **class_name; /* all names of a class, after its synset if it has one: "n01440764 tench, Tinca tinca" */
    int loaded;        /* scale whose transition is in memory, 0: none. One at a time. */
    Transformer *net;
    Checkpoint file;                    /* its file: the weights stay there */
    NetConfig config[MAX_SCALES + 1];   /* [t] of scale t, [0] of all scales of a joint model */
    int32_t null_class[MAX_SCALES + 1]; /* [t] the label "no class" that scale t was trained with too; -1: none */
    int joint;                          /* one file for all scales */
    int official;                       /* the files are PyTorch's */
    int no_ema;           /* set after model_open: sample with the trained weights rather than their moving average */
    WeightFormat weights; /* set after model_open: how the transitions' matrices are kept */
    int cuda; /* set after model_open: the transitions run on the GPU, in f32 or, with bf16 weights, in bf16 */
} Model;
/* A transition's file: its alphats and alphacum buffers; without them, redraw_prob of its metadata. */
Err schedule_read(Schedule *s, const Checkpoint *ck, int T);
/* name_or_folder: a named model, or a folder with vqgan.safetensors and scale1..scaleT.safetensors, or one with the
 * official scale1..scaleT.ckpt and, unless their tensors are a named model's, a recipe config.txt. *substituted is set
 * to the named entry when its weights are not installed and the bundled model was opened instead (the caller must say
 * so); NULL forbids that. */
Err model_open(Model *m, const char *name_or_folder, const NamedModel **substituted);
/* How many of a named model's files are here; missing: the first that is not, "" if all are. */
size_t model_files(char missing[32], const NamedModel *named);
Err model_scale(Model *m, int t); /* loads scale t's transition (EMA weights), releases the other */
void model_close(Model *m);
/* Bytes that sampling `batch` at a time holds; they are all needed throughout, weights in mapped files too: if the
 * kernel drops their pages, every token reads them from the disk again. */
typedef struct {
    size_t first_stage, scale; /* weights: of the VQGAN; of the largest transition, as one is loaded at a time */
    size_t activations;        /* what both plan, the caches of decoding among it, and `pictures` decoded pictures */
    size_t total;              /* of the host */
    size_t gpu_first_stage, gpu_scale, gpu_activations; /* with Model.cuda: the same on the GPU */
} ModelMemory;
Err model_memory(Model *m, size_t batch, size_t pictures, ModelMemory *out);
/* Once m->weights are chosen: everything computes on the GPU from now on. */
Err model_use_cuda(Model *m);
/* Of n pictures, how many decode_pictures decodes at a time. */
size_t decode_batch(const Model *m, size_t n);
/* Writes the model as safetensors, weights as F32, F16 or BF16, into a folder that has no model. */
Err model_convert(Model *m, const char *folder, Dtype store);

/* ---- classes.c: what the classes are called ---- */
/* m->class_name, n_classes from imagebart.classes: a class a line, or between commas; NULL: the numbers below rows,
 * which is how many classes the network knows. */
Err classes_open(Model *m, const char *list, size_t rows);
/* A class's first name, without its synset, for messages. */
enum { CLASS_TITLE_BYTES = 80 };
const char *class_title(char out[CLASS_TITLE_BYTES], const Model *m, size_t label);
/* How many classes have exactly this name or synset, whatever its case; *label = the first of them. */
size_t classes_named(const Model *m, const char *name, int32_t *label);
/* A number, a synset, a name or a part of one -> label; an ambiguous or unknown one is an error that lists what there
 * is. */
Err model_class(const Model *m, const char *name, int32_t *label);

void sample_defaults(SampleOptions *o, const Model *m);
/* Rows of the decoder's batch for n samples: with guidance at any scale two for each, with its class and with none. */
size_t sample_rows(const SampleOptions *o, const Model *m, size_t n);
enum { BOUND_ROWS = 8 }; /* rows in a batch of the following two */
/* bound (n_classes) = what tells the class of a picture of which only some tokens of x_0 (N) are kept, the least being
 * the best: the variational bound (paper section 3.1) on them under each class, in nats per token, a mean over a few
 * draws of the chain of sum_t KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t, class)). What is not kept is noise at every
 * scale, which the networks of t >= 2 have learnt to expect; scale 1, whose decoder has read nothing but clean
 * pictures, has no say unless it is the only one. n_classes forward passes per scale. */
Err model_class_bounds(Model *m, const int32_t *tokens, const uint8_t *keep, uint64_t seed, double *bound);
/* bound (n) = how unlikely the model finds each picture (n,N) of class label (n; NULL: a model without classes): the
 * variational bound as above, of all tokens and over all scales. Two draws of the chain for each. */
Err model_picture_bounds(Model *m, const int32_t *tokens, const int32_t *label, size_t n, uint64_t seed, double *bound);
/* tokens (n,N) = x_0, by ancestral sampling t = T..1 (SPEC section 5), with the guide and chains of inpainting.
 * The guide forces known tokens without asking whether what was drawn before them agrees. Candidates ask: after every
 * pass each group is drawn anew from itself, a candidate's weight being the probability its pass gave the known tokens
 * (importance resampling); the first of each group is the result. */
Err model_sample(Model *m, const SampleOptions *o, int32_t *tokens);

/* nearest.c: how near drawn pictures, tokens (n,N), come to the training pictures of the dataset at path, mirrored ones
 * included: a line on stdout for each, a sum on stderr. Ends the first stage's plan. */
Err nearest_report(Model *m, const int32_t *tokens, size_t n, const char *path);

/* ---- options.c, terminal.c ---- */
/* "a,b,c": the first value is for scale T, which is sampled first, and so on down; one value is for all. out[t]. */
Err parse_per_scale(double *out, int T, const char *list, double lo, double hi, const char *option);
/* What ./sample and ./inpaint ask alike, and how both draw. SAMPLING_OPTIONS(a, ...) are the rows of an Option table.
 */
typedef struct {
    const char *model, *out, *class_name, *temperature, *top_k, *guidance, *chain_length, *device, *weights;
    size_t n, batch, block, threads;
    uint64_t seed; /* SEED_NOT_GIVEN: take one from the clock; it is printed and kept in the PNG */
    int official_temperature, no_ema, show;
} SamplingArgs;
#define SEED_NOT_GIVEN UINT64_MAX
#define SAMPLING_OPTIONS(a)                                                                                            \
    {OPT_U64, "--seed", "N", &(a).seed, 0, 0, "same seed, same pictures (default: from the clock; always printed)"},   \
        {OPT_STRING,                                                                                                   \
         "--class",                                                                                                    \
         "NAME|ID",                                                                                                    \
         &(a).class_name,                                                                                              \
         0,                                                                                                            \
         0,                                                                                                            \
         "which class, for models that have classes; ImageNet's also by synset\n(n02099601) or any WordNet name "      \
         "(\"golden retriever\")"},                                                                                    \
        {OPT_STRING,                                                                                                   \
         "--temperature",                                                                                              \
         "T,..",                                                                                                       \
         &(a).temperature,                                                                                             \
         0,                                                                                                            \
         0,                                                                                                            \
         "per scale, noisiest first, or one for all (default 1; lower is safer)"},                                     \
        {OPT_STRING,                                                                                                   \
         "--top-k",                                                                                                    \
         "K,..",                                                                                                       \
         &(a).top_k,                                                                                                   \
         0,                                                                                                            \
         0,                                                                                                            \
         "draw among the K likeliest tokens only; per scale or one for all\n(default 0: all)"},                        \
        {OPT_STRING,                                                                                                   \
         "--guidance",                                                                                                 \
         "G,..",                                                                                                       \
         &(a).guidance,                                                                                                \
         0,                                                                                                            \
         0,                                                                                                            \
         "more of the class: logits = uncond + G (cond - uncond); per scale or one\nfor all (default 1: none; "        \
         "needs ./train --label-dropout)"},                                                                            \
        {OPT_FLAG,                                                                                                     \
         "--official-temperature",                                                                                     \
         NULL,                                                                                                         \
         &(a).official_temperature,                                                                                    \
         0,                                                                                                            \
         0,                                                                                                            \
         "as the official code: --temperature acts on the noisiest scale only"},                                       \
        {OPT_STRING,                                                                                                   \
         "--chain-length",                                                                                             \
         "L,..",                                                                                                       \
         &(a).chain_length,                                                                                            \
         0,                                                                                                            \
         0,                                                                                                            \
         "passes of every scale, with some noise in between; per scale or one\nfor all"},                              \
        {OPT_FLAG,                                                                                                     \
         "--no-ema",                                                                                                   \
         NULL,                                                                                                         \
         &(a).no_ema,                                                                                                  \
         0,                                                                                                            \
         0,                                                                                                            \
         "the trained weights, not their moving average, where a file has both"},                                      \
        {OPT_STRING,                                                                                                   \
         "--weights",                                                                                                  \
         "TYPE",                                                                                                       \
         &(a).weights,                                                                                                 \
         0,                                                                                                            \
         0,                                                                                                            \
         "the transformers' matrices as f32 (default), bf16 or int8: faster,\nless exact"},                            \
        {OPT_SIZE, "--batch", "N", &(a).batch, 1, 4096, "samples computed side by side (default 16)"},                 \
        {OPT_SIZE,                                                                                                     \
         "--block",                                                                                                    \
         "N",                                                                                                          \
         &(a).block,                                                                                                   \
         0,                                                                                                            \
         DECODE_BLOCK,                                                                                                 \
         "guess ahead up to N positions: 1 none, 0 (default) as many as pay off;\nthe result does not depend on it"},  \
        {OPT_STRING,                                                                                                   \
         "--device",                                                                                                   \
         "cpu|cuda",                                                                                                   \
         &(a).device,                                                                                                  \
         0,                                                                                                            \
         0,                                                                                                            \
         "where everything runs (default: a GPU if there is one)"},                                                    \
        {OPT_SIZE, "--threads", "N", &(a).threads, 0, 4096, "0 (default): all; the result does not depend on it"}, {   \
        OPT_FLAG, "--show", NULL, &(a).show, 0, 0, "draw the result in the terminal too"                               \
    }
void sampling_start(SamplingArgs *a, Model *m,
                    const NamedModel **stand_in_for); /* threads, seed, model; dies on error */
/* What the user gave, else what the model's file recommends (imagebart.temperature, .top_k, .guidance,
 * imagebart.CHAIN_KEY), else 1, all, 1 and chain_default. Chains may have least_chain passes or more. */
void sampling_options(SampleOptions *o, const SamplingArgs *a, const Model *m, const char *chain_key,
                      const char *chain_default, double least_chain);
/* A line on stderr per scale: how many passes of the decoder it took, and how good the guesses were. */
void say_drafts(const DraftCounts *counts, int T);
int sampling_progress(void *context, int t, size_t repeat, size_t done, size_t of); /* SampleOptions.progress */
/* On stderr: how much memory this takes (see model_memory) and how much there is, and which vectors and how many
 * threads compute; dies if memory does not suffice. */
void sampling_memory(Model *m, size_t batch, size_t pictures);
/* The options as PNG text, for image_write_png. */
Err sampling_text(Config *text, const SamplingArgs *a, const SampleOptions *o, const Model *m);
/* images (n,3,side,side) decoded from tokens (n,N), a picture at a time. */
Err decode_pictures(Model *m, const int32_t *tokens, size_t n, real *images);
/* Draws a PNG file on stdout: Kitty or iTerm2 graphics where the terminal says it has them, else 24-bit half blocks. */
Err show_png(const char *path);

#ifdef __cplusplus
}
#endif
#endif
