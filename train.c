/* train.c - trains every part of a model: the VQGAN, one transition, or all transitions in one network.
 *
 * Reading order: the options at the end of the file say what a user can ask for; `Stage` is what is being trained; then
 * come the two kinds of stage (first stage: images -> reconstructions; transition: tokens x_t -> x_{t-1}), each as four
 * functions: one micro batch, an evaluation, a picture, the weights that sampling uses; then the one loop that drives
 * them. No mathematics here: it is in vqgan.c, transformer.cu and diffusion.c.
 *
 * A run is a folder: STAGE.state.safetensors holds everything that continuing needs (weights, EMA, optimizer, counters,
 * settings; all random numbers are functions of the step), STAGE.safetensors what sampling needs. Both are replaced
 * atomically, so a kill at any instant loses at most the steps since the last checkpoint, and resuming repeats them bit
 * for bit. */
#include "imagebart.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

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

static const char *run_path(const Stage *s, char out[1100], const char *suffix) {
    snprintf(out, 1100, "%s/%s%s", s->opt->run, s->name, suffix);
    return out;
}

static int file_exists(const char *path) {
    struct stat st;
    return stat(path, &st) == 0;
}

/* RUN/skipped.txt names the pictures that could not be read, and why. */
static const char *skipped_path(const Stage *s, char out[1100]) {
    snprintf(out, 1100, "%s/skipped.txt", s->opt->run);
    return out;
}

static Err list_damaged(const Stage *s, const Dataset *d) {
    char path[1100];
    return dataset_damaged(d) ? dataset_write_damaged(d, skipped_path(s, path)) : OK;
}

static void say_damaged(const Stage *s) {
    char path[1100];
    size_t n = dataset_damaged(&s->train) + dataset_damaged(&s->val);
    if (s->train_tokens.n) n = s->train.n - s->train_tokens.n + s->val.n - s->val_tokens.n;
    if (n) fprintf(stderr, "damaged pictures skipped: %zu; %s lists them\n", n, skipped_path(s, path));
}

static Err make_folder(const char *path) {
    char part[1024];
    if ((size_t)snprintf(part, sizeof part, "%s", path) >= sizeof part) return err("%s: the path is too long", path);
    for (char *p = part + 1;; p++)
        if (!*p || *p == '/') {
            char keep = *p;
            *p = 0;
            if (mkdir(part, 0777) && errno != EEXIST) return err("%s: %s", part, strerror(errno));
            *p = keep;
            if (!keep) return OK;
        }
}

/* Before anything large is allocated: `arenas` arrays as large as all parameters, the network's plan (bytes), other
 * buffers (rows x columns). */
static Err check_memory(Stage *s, size_t arenas, size_t plan, size_t rows, size_t columns) {
    TRY(size_mul(&s->state_bytes, s->params->total, arenas * sizeof(real)));
    TRY(size_mul(&s->activation_bytes, rows, columns));
    TRY(size_mul(&s->activation_bytes, s->activation_bytes, sizeof(real)));
    s->activation_bytes += plan;
    s->available = memory_available();
    char what[160], state[32], activations[32];
    snprintf(what, sizeof what, "%s: parameters, gradients and optimizer %s, activations %s", s->name,
             bytes_text(state, s->state_bytes), bytes_text(activations, s->activation_bytes));
    return memory_fits(s->state_bytes + s->activation_bytes, s->available, what, "a smaller --batch takes less");
}

static Precision gpu_precision(const Stage *s) {
    return strcmp(s->opt->precision, "bf16") ? PRECISION_F32 : PRECISION_BF16;
}

/* Values, gradients, moments and moving average in float, and in bf16 the values again; the network's plan. */
static Err check_gpu_memory(Stage *s, size_t plan) {
    const int bf16 = gpu_precision(s) == PRECISION_BF16;
    char what[160], state[32], activations[32];
    s->gpu_state = s->params->total * (5 * sizeof(float) + (bf16 ? 2 : 0)), s->gpu_activations = plan;
    TRY(cuda_find(NULL, &s->gpu_available, NULL));
    snprintf(what, sizeof what, "%s on the GPU: parameters, gradients and optimizer %s, activations %s", s->name,
             bytes_text(state, s->gpu_state), bytes_text(activations, plan));
    return memory_fits(s->gpu_state + plan, s->gpu_available, what, "a smaller --batch takes less");
}

/* ------------------------------------------------------------------------------------------------------------
 * First stage: images -> codes -> reconstructions
 * ---------------------------------------------------------------------------------------------------------- */

static Err start_loader(Stage *s) {
    LoaderConfig c = {.prep = s->prep, .B = s->batch, .size = s->size, .seed = s->seed, .train = 1, .flip = s->flip};
    c.step = s->step * s->accumulate;
    return loader_start(&s->loader, &s->train, &c);
}

static Err vqgan_micro_batch(Stage *s, uint64_t micro, Metrics *out) {
    (void)micro; /* the loader counts for itself */
    const real *images, *xrec;
    const int32_t *labels, *raw;
    double codebook;
    size_t n = s->batch * 3 * s->size * s->size, codes = s->batch * s->N;
    TRY(loader_next(s->loader, &images, &labels));
    TRY(vqgan_forward(s->vqgan, images, s->batch, s->size, s->size, &xrec, &codebook));
    image_loss(images, xrec, n, s->w_l1 / (double)s->accumulate, s->w_l2 / (double)s->accumulate, &out->part[0],
               &out->part[1], s->dxrec);
    out->loss = s->w_l1 * out->part[0] + s->w_l2 * out->part[1] + s->w_codebook * codebook;
    vqgan_latents(s->vqgan, NULL, NULL, &raw);
    for (size_t i = 0; i < codes; i++) s->usage[raw[i]]++;
    return vqgan_backward(s->vqgan, s->dxrec, s->w_codebook / (double)s->accumulate, NULL);
}

/* Codes that no latent chose for a while are put where latents are, until the last fifth of the run settles them. */
static Err vqgan_after_step(Stage *s) {
    if (!s->restart_every || s->step % s->restart_every) return OK;
    size_t n = vqgan_config(s->vqgan)->n_embed;
    s->codes_used = 0;
    for (size_t k = 0; k < n; k++) s->codes_used += s->usage[k] != 0;
    if (s->step < s->steps - s->steps / 5) vqgan_restart_codes(s->vqgan, s->usage, s->seed, s->step);
    memset(s->usage, 0, n * sizeof *s->usage);
    return OK;
}

static Err vqgan_evaluate(Stage *s, Metrics *out) {
    LoaderConfig c = {.prep = s->prep, .B = s->batch < s->val.n ? s->batch : s->val.n, .size = s->size};
    Loader *l = NULL;
    Err e = loader_start(&l, &s->val, &c);
    size_t batches = s->val.n / c.B < 32 ? s->val.n / c.B : 32;
    memset(out, 0, sizeof *out);
    for (size_t i = 0; e == OK && i < batches; i++) {
        const real *images, *xrec;
        const int32_t *labels;
        double l1, l2, codebook;
        e = loader_next(l, &images, &labels);
        if (e == OK) e = vqgan_forward(s->vqgan, images, c.B, s->size, s->size, &xrec, &codebook);
        if (e != OK) break;
        image_loss(images, xrec, c.B * 3 * s->size * s->size, 0, 0, &l1, &l2, NULL);
        out->part[0] += l1 / (double)batches;
        out->part[1] += l2 / (double)batches;
        out->loss += (s->w_l1 * l1 + s->w_l2 * l2 + s->w_codebook * codebook) / (double)batches;
    }
    loader_stop(l);
    return e;
}

/* Held-out pictures above their reconstructions. */
static Err vqgan_picture(Stage *s, const char *path) {
    enum { COLUMNS = 8 };
    size_t n = s->val.n < COLUMNS ? s->val.n : COLUMNS, pixels = 3 * s->size * s->size;
    if (n > s->batch) n = s->batch;
    real *rows = NULL;
    Loader *l = NULL;
    Image im = {0};
    LoaderConfig c = {.prep = s->prep, .B = n, .size = s->size};
    const real *images, *xrec;
    const int32_t *labels;
    double codebook;
    TRY(mem_alloc(&rows, 2 * n * pixels, sizeof *rows, "picture"));
    Err e = loader_start(&l, &s->val, &c);
    if (e == OK) e = loader_next(l, &images, &labels);
    if (e == OK) e = vqgan_forward(s->vqgan, images, n, s->size, s->size, &xrec, &codebook);
    if (e == OK) {
        memcpy(rows, images, n * pixels * sizeof *rows);
        memcpy(rows + n * pixels, xrec, n * pixels * sizeof *rows);
        e = image_grid(&im, rows, 2 * n, s->size, s->size, n, 2);
    }
    if (e == OK) e = image_write_png(path, &im, &s->settings);
    loader_stop(l);
    image_free(&im);
    free(rows);
    return e;
}

static Err vqgan_stage(Stage *s) {
    VqganConfig c;
    TRY(vqgan_config_read(&c, &s->settings, "model.params."));
    TRY(vqgan_create(&s->vqgan, &c, 0));
    s->params = vqgan_params(s->vqgan);
    s->size = c.resolution;
    s->h = s->w = s->size >> (c.levels - 1);
    s->N = s->h * s->w;
    if (s->train.n == 0) return OK;
    size_t bytes = 0;
    if (s->opt->cuda) TRY(vqgan_use_cuda(s->vqgan, gpu_precision(s)));
    TRY(vqgan_plan_bytes(s->vqgan, s->batch, s->size, s->size, 1, &bytes));
    TRY(s->opt->cuda ? check_gpu_memory(s, bytes) : OK);
    TRY(check_memory(s, 4, s->opt->cuda ? 0 : bytes, s->batch, 3 * s->size * s->size));
    TRY(vqgan_plan(s->vqgan, s->batch, s->size, s->size, 1));
    TRY(mem_alloc(&s->dxrec, s->batch * 3 * s->size, s->size * sizeof *s->dxrec, "reconstruction gradient"));
    TRY(mem_alloc(&s->usage, c.n_embed, sizeof *s->usage, "code usage"));
    s->micro_batch = vqgan_micro_batch;
    s->evaluate = vqgan_evaluate;
    s->picture = vqgan_picture;
    s->after_step = vqgan_after_step;
    return OK;
}

/* ------------------------------------------------------------------------------------------------------------
 * Transitions: tokens x_t -> x_{t-1}
 * ---------------------------------------------------------------------------------------------------------- */

/* x_{t-1} and x_t from x_0 by running the forward chain (SPEC section 3). */
static void draw_chain(Stage *s, int t, size_t B, uint64_t seed, uint64_t micro, uint64_t first) {
    size_t n = B * s->N;
    memcpy(s->x_t, s->x0, n * sizeof *s->x_t);
    for (int i = 1; i <= t; i++) {
        memcpy(s->x_prev, s->x_t, n * sizeof *s->x_t);
        noise_step(s->x_t, n, s->K, s->schedule.beta[i], seed, rng_stream(RNG_NOISE, (uint64_t)i, micro), first);
    }
    for (size_t b = 0; b < B; b++) s->ts[b] = t;
}

static void take_example(Stage *s, const Tokens *from, size_t example, size_t flip, size_t b) {
    const uint16_t *token = from->token + (example * from->flips + flip) * s->N;
    for (size_t i = 0; i < s->N; i++) s->x0[b * s->N + i] = token[i];
    s->label[b] = from->label[example];
}

/* Which example is number `at` of the endless training sequence, and its epoch. */
static size_t next_example(Stage *s, uint64_t at, uint64_t *epoch) {
    size_t n = s->train_tokens.n;
    *epoch = at / n;
    if (s->balance) {
        uint64_t stream = rng_stream(RNG_ORDER, 0, at);
        size_t *start = s->class_at + rng_below(s->seed, stream, 0, (uint32_t)s->n_drawn);
        return s->order[start[0] + rng_below(s->seed, stream, 1, (uint32_t)(start[1] - start[0]))];
    }
    if (*epoch != s->epoch) epoch_order(s->order, n, s->seed, s->epoch = *epoch);
    return s->order[at % n];
}

static void take_training_batch(Stage *s, uint64_t micro) {
    for (size_t b = 0; b < s->batch; b++) {
        uint64_t epoch;
        size_t example = next_example(s, micro * s->batch + b, &epoch);
        uint32_t flip = rng_below(s->seed, rng_stream(RNG_CROP, epoch, example), 0, (uint32_t)s->train_tokens.flips);
        take_example(s, &s->train_tokens, example, flip, b);
    }
}

static Err group_by_class(Stage *s) {
    const Tokens *x = &s->train_tokens;
    size_t at = 0;
    if (s->train.n_classes == 0) return err("train.balance_classes: %s has no classes", s->opt->data);
    TRY(mem_alloc(&s->class_at, s->train.n_classes + 1, sizeof *s->class_at, "classes"));
    for (size_t c = 0; c < s->train.n_classes; c++) {
        s->class_at[s->n_drawn] = at;
        for (size_t i = 0; i < x->n; i++)
            if (x->label[i] == (int32_t)c) s->order[at++] = (uint32_t)i;
        if (at > s->class_at[s->n_drawn]) s->n_drawn++;
    }
    s->class_at[s->n_drawn] = at;
    return OK;
}

/* Forward and losses of the B examples that draw_chain prepared; dlogits as denoising_loss leaves them. */
static Err transition_loss(Stage *s, int t, size_t B, double weight, Loss *loss, real *dlogits) {
    const real *logits;
    size_t R = B * s->N;
    const int32_t *label = transformer_config(s->net)->has_class ? s->label : NULL;
    if (transformer_on_cuda(s->net)) /* the gradients too, if they are wanted */
        return transformer_loss_cuda(s->net, &s->schedule, s->x0, s->x_prev, s->x_t, s->ts, label, B, s->N, s->alpha,
                                     weight, dlogits != NULL, loss);
    TRY(transformer_forward(s->net, s->x_prev, s->x_t, s->ts, label, B, s->N, &logits));
    posterior(s->q, s->x0, s->x_t, R, s->K, &s->schedule, t);
    return denoising_loss(loss, logits, s->x_prev, s->q, R, s->K, s->alpha, weight, dlogits);
}

static Err transition_micro_batch(Stage *s, uint64_t micro, Metrics *out) {
    Loss loss;
    int t = s->t ? s->t : 1 + (int)rng_below(s->seed, rng_stream(RNG_SCALE, 0, 0), micro, (uint32_t)s->schedule.T);
    take_training_batch(s, micro);
    draw_chain(s, t, s->batch, s->seed, micro, 0);
    TRY(transition_loss(s, t, s->batch, 1 / (double)s->accumulate, &loss, s->dlogits));
    out->loss = loss.loss, out->part[0] = loss.hard, out->part[1] = loss.soft;
    return transformer_on_cuda(s->net) ? OK : transformer_backward(s->net, s->dlogits);
}

/* The noise of an example depends on nothing but the example, so that evaluations can be compared. */
static const uint64_t VALIDATION_SEED = 0x76616c6964;

static Err transition_evaluate(Stage *s, Metrics *out) {
    size_t n = s->val_tokens.n, done = 0;
    int first = s->t ? s->t : 1, last = s->t ? s->t : s->schedule.T;
    memset(out, 0, sizeof *out);
    for (int t = first; t <= last; t++)
        for (size_t i = 0, B; i < n; i += B, done += B) {
            Loss loss;
            B = n - i < s->batch ? n - i : s->batch;
            for (size_t b = 0; b < B; b++) take_example(s, &s->val_tokens, i + b, 0, b);
            draw_chain(s, t, B, VALIDATION_SEED, 0, i * s->N);
            TRY(transition_loss(s, t, B, 0, &loss, NULL));
            out->loss += loss.loss * (double)B, out->part[0] += loss.hard * (double)B,
                out->part[1] += loss.soft * (double)B;
        }
    out->loss /= (double)done, out->part[0] /= (double)done, out->part[1] /= (double)done;
    return OK;
}

static Err decode_rows(Stage *s, const int32_t *tokens, size_t n, real *images) {
    return vqgan_decode_tokens(s->vqgan, tokens, n, s->h, s->w, images);
}

/* Held-out pictures noised to x_t, what the network makes of them, and the true x_{t-1}; the noisiest scale, which sees
 * no x_t, shows samples only. Drawn with the EMA weights. */
static Err transition_picture(Stage *s, const char *path) {
    enum { COLUMNS = 8 };
    int t = s->t ? s->t : 1 + (int)(s->step / s->opt->picture_every) % s->schedule.T;
    size_t n = s->val_tokens.n < COLUMNS ? s->val_tokens.n : COLUMNS, pixels = 3 * s->size * s->size, rows = 0;
    if (n > s->batch) n = s->batch;
    real *images = NULL;
    Image im = {0};
    SampleOptions o;
    for (size_t b = 0; b < n; b++) take_example(s, &s->val_tokens, b * (s->val_tokens.n / n), 0, b);
    draw_chain(s, t, n, VALIDATION_SEED, 1, 0);
    TRY(mem_alloc(&images, 3 * n * pixels, sizeof *images, "picture"));
    memset(&o, 0, sizeof o);
    o.n = n, o.seed = s->seed, o.temperature[t] = 1, o.chain[t] = 1;
    o.label = transformer_config(s->net)->has_class ? s->label : NULL;
    int x_t_shown = transformer_config(s->net)->kind == NET_X;
    Err e = OK;
    if (x_t_shown) e = decode_rows(s, s->x_t, n, images + n * pixels * rows++);
    if (e == OK) e = sample_scale(s->net, &o, t, 0, s->N, s->x_t);
    if (e == OK) e = decode_rows(s, s->x_t, n, images + n * pixels * rows++);
    if (e == OK && x_t_shown) e = decode_rows(s, s->x_prev, n, images + n * pixels * rows++);
    if (e == OK) e = transformer_plan(s->net, s->batch, s->N, 1);
    if (e == OK) e = image_grid(&im, images, rows * n, s->size, s->size, n, 2);
    if (e == OK) e = image_write_png(path, &im, &s->settings);
    image_free(&im);
    free(images);
    return e;
}

/* ---- tokens: encoded once, kept in the run ---- */

static uint64_t hash_bytes(uint64_t h, const void *data, size_t n) { /* FNV-1a */
    const unsigned char *p = data;
    for (size_t i = 0; i < n; i++) h = (h ^ p[i]) * 0x100000001b3u;
    return h;
}

static uint64_t dataset_hash(const Stage *s, const Dataset *d) {
    uint64_t h = hash_bytes(0xcbf29ce484222325u, &s->prep, sizeof s->prep);
    return hash_bytes(h, &d->identity, sizeof d->identity);
}

static void mirror(real *images, size_t planes, size_t side) {
    for (size_t row = 0; row < planes * side; row++)
        for (size_t i = 0, j = side - 1; i < j; i++, j--) {
            real keep = images[row * side + i];
            images[row * side + i] = images[row * side + j];
            images[row * side + j] = keep;
        }
}

/* images (B,...) as they are and, with flips, mirrored: token (B, flips, N). Where a label is -1 the image is not used. */
static Err encode_batch(Stage *s, size_t flips, const real *images, size_t B, real *mirrored, int32_t *once,
                        int32_t *token) {
    size_t pixels = 3 * s->size * s->size;
    memcpy(mirrored, images, B * pixels * sizeof *mirrored);
    for (size_t flip = 0; flip < flips; flip++) {
        if (flip) mirror(mirrored, B * 3, s->size);
        TRY(vqgan_encode(s->vqgan, mirrored, B, s->size, s->size, s->seed, NULL, NULL, once));
        for (size_t b = 0; b < B; b++) memcpy(token + (b * flips + flip) * s->N, once + b * s->N, s->N * sizeof *token);
    }
    return OK;
}

enum { ENCODED_AT_ONCE = 16 };

/* Pictures are read and prepared by the loader's threads, ahead, while all threads encode. Damaged pictures are listed
 * before their place is taken, so that a kill in between forgets none. */
static Err encode_dataset(Stage *s, TokensPart *p, const Dataset *d) {
    enum { B = ENCODED_AT_ONCE };
    Loader *l = NULL;
    real *mirrored = NULL;
    int32_t *once = NULL, *token = NULL;
    size_t n = d->n, flips = p->sizes.flips;
    LoaderConfig c = {.prep = s->prep, .B = B, .size = s->size, .step = p->done / B, .mark = 1};
    Err e = p->done < n ? loader_start(&l, d, &c) : OK;
    if (e == OK) e = mem_alloc(&mirrored, B * 3 * s->size, s->size * sizeof *mirrored, "batch");
    if (e == OK) e = mem_alloc(&once, B * s->N, sizeof *once, "batch of tokens");
    if (e == OK) e = mem_alloc(&token, B * s->N, flips * sizeof *token, "batch of tokens");
    while (e == OK && p->done < n) {
        const real *images;
        const int32_t *labels;
        size_t rows = min_size(n - p->done, B); /* the last batch wraps around: its tail is not used */
        e = loader_next(l, &images, &labels);
        if (e == OK) e = encode_batch(s, flips, images, rows, mirrored, once, token);
        if (e == OK) e = list_damaged(s, d);
        for (size_t b = 0; b < rows && e == OK; b++) e = tokens_append(p, labels[b], token + b * flips * s->N);
        progress_line("encoding %zu of %zu pictures", p->done, n);
    }
    progress_end();
    loader_stop(l);
    free(mirrored);
    free(once);
    free(token);
    return e;
}

/* x = the file, if it is there and of this first stage, dataset and preprocessing; else x->n = 0. */
static Err cached_tokens(Tokens *x, const char *path, const Tokens *wanted) {
    memset(x, 0, sizeof *x);
    if (!file_exists(path)) return OK;
    TRY(tokens_read(x, path));
    if (x->vqgan != wanted->vqgan || x->source != wanted->source || x->flips != wanted->flips) tokens_free(x);
    return OK;
}

/* The cache belongs to one VQGAN file and one set of pictures; any other is encoded afresh. */
static Err load_tokens(Stage *s, Tokens *x, const Dataset *d, const char *what, const char *vqgan_path) {
    char path[1100];
    TokensPart p;
    Tokens wanted = {.n = d->n, .h = s->h, .w = s->w, .K = s->K, .flips = s->flip ? 2 : 1};
    wanted.source = dataset_hash(s, d);
    snprintf(path, sizeof path, "%s/%s.tokens", s->opt->run, what);
    TRY(file_checksum(&wanted.vqgan, vqgan_path));
    TRY(cached_tokens(x, path, &wanted));
    if (x->n) return OK;
    TRY(tokens_start(&p, path, &wanted, ENCODED_AT_ONCE));
    Err e = cached_tokens(x, path, &wanted); /* another process may have made it while this one waited */
    if (e == OK && x->n) {
        unlink(p.part);
    } else if (e == OK) {
        if (p.done) fprintf(stderr, "%s: continuing after %zu pictures\n", p.part, p.done);
        e = encode_dataset(s, &p, d);
        if (e == OK) e = tokens_finish(&p, x);
    }
    tokens_stop(&p);
    return e;
}

/* ---- the first stage that a transition stands on ---- */

static Err copy_file(const char *to, const char *from) {
    Checkpoint ck;
    AtomicFile f;
    memset(&ck, 0, sizeof ck);
    TRY(checkpoint_open(&ck, from));
    Err e = atomic_open(&f, to);
    if (e == OK) e = atomic_write(&f, ck.map, ck.map_bytes);
    if (e == OK) e = atomic_commit(&f);
    checkpoint_close(&ck);
    return e;
}

/* The run's own VQGAN; if it has none, the model's is copied in, so that the run can be sampled as it stands. */
static Err open_vqgan(Stage *s, char path[1100]) {
    Checkpoint ck;
    VqganConfig c;
    snprintf(path, 1100, "%s/vqgan.safetensors", s->opt->run);
    if (!file_exists(path)) {
        char theirs[1100];
        snprintf(theirs, sizeof theirs, "%s/vqgan.safetensors", model_folder(s->opt->model));
        if (!file_exists(theirs))
            return err("%s: no first stage there, nor at %s; train it first: --vqgan", path, theirs);
        TRY(copy_file(path, theirs));
    }
    memset(&ck, 0, sizeof ck);
    TRY(checkpoint_open(&ck, path));
    Err e = vqgan_config_read(&c, &ck.meta, "model.params.");
    if (e == OK) e = vqgan_create(&s->vqgan, &c, 0);
    if (e == OK) e = params_plan(vqgan_params(s->vqgan), PLAN_VALUE);
    if (e == OK) e = vqgan_load(s->vqgan, &ck, "");
    /* in f32: whoever continues the run elsewhere must get the same tokens */
    if (e == OK && s->opt->cuda) e = vqgan_use_cuda(s->vqgan, PRECISION_F32);
    if (e == OK) e = params_send(vqgan_params(s->vqgan));
    checkpoint_close(&ck);
    if (e != OK) return err_in(path);
    s->size = c.resolution;
    s->h = s->w = s->size >> (c.levels - 1);
    s->N = s->h * s->w;
    s->K = vqgan_K(s->vqgan);
    return vqgan_plan(s->vqgan, 16, s->size, s->size, 0);
}

static Err check_transition(const Stage *s, const NetConfig *c) {
    size_t vocabulary = c->kind == NET_X ? c->enc_num_tokens : c->input_vocab_size;
    if (c->dec_num_tokens != s->K)
        return err("%s: the network writes %zu token values, the first stage has %zu", s->name, c->dec_num_tokens,
                   s->K);
    if (c->has_class && s->train.n_classes == 0)
        return err("%s: the model is conditioned on classes; the pictures need one sub-folder per class "
                   "(the recipe photos has no classes)",
                   s->opt->data);
    if (c->has_class && s->train.n_classes > vocabulary)
        return err("%s: %zu classes; the network has %zu input tokens", s->opt->data, s->train.n_classes, vocabulary);
    if (s->t && c->kind == NET_GPT && s->t != s->schedule.T)
        return err("%s: a decoder-only network sees no x_t, so it can only be scale %d", s->name, s->schedule.T);
    return OK;
}

static Err add_model_keys(Stage *s, const NetConfig *c) {
    if (c->has_class) TRY(classes_from_folders(&s->settings, s->train.class_name, s->train.n_classes));
    TRY(config_set(&s->settings, "imagebart.h", "%zu", s->h));
    TRY(config_set(&s->settings, "imagebart.w", "%zu", s->w));
    return s->t ? config_set(&s->settings, "model.params.single_scale", "%d", s->t) : OK;
}

static Err transition_buffers(Stage *s) {
    size_t B = s->batch, n;
    TRY(size_mul(&n, B * s->N, s->K));
    TRY(mem_alloc(&s->x0, B * s->N, sizeof *s->x0, "tokens"));
    TRY(mem_alloc(&s->x_prev, B * s->N, sizeof *s->x0, "tokens"));
    TRY(mem_alloc(&s->x_t, B * s->N, sizeof *s->x0, "tokens"));
    TRY(mem_alloc(&s->ts, B, sizeof *s->ts, "scales"));
    TRY(mem_alloc(&s->label, B, sizeof *s->label, "labels"));
    if (s->opt->cuda) n = 0; /* there, neither is written down */
    TRY(mem_alloc(&s->q, n, sizeof *s->q, "posterior"));
    TRY(mem_alloc(&s->dlogits, n, sizeof *s->dlogits, "gradient of the logits"));
    return mem_alloc(&s->order, s->train_tokens.n, sizeof *s->order, "order of the examples");
}

static Err transition_stage(Stage *s) {
    char vqgan_path[1100];
    NetConfig c;
    size_t T = 0, bytes = 0;
    const char *redraw = config_get(&s->settings, "model.params.", "redraw_prob");
    TRY(config_size(&T, &s->settings, "model.params.", "n_scales", 1, MAX_SCALES, 0));
    TRY(schedule_make(&s->schedule, redraw ? redraw : "geometric", (int)T));
    TRY(net_config_read(&c, &s->settings, "model.params."));
    TRY(open_vqgan(s, vqgan_path));
    TRY(check_transition(s, &c));
    TRY(add_model_keys(s, &c));
    TRY(load_tokens(s, &s->train_tokens, &s->train, "train", vqgan_path));
    TRY(load_tokens(s, &s->val_tokens, &s->val, "val", vqgan_path));
    TRY(transformer_create(&s->net, &c));
    s->params = transformer_params(s->net);
    transformer_set_alphas(s->net, s->schedule.alpha);
    if (s->opt->cuda) TRY(transformer_use_cuda(s->net, gpu_precision(s)));
    TRY(transformer_plan_bytes(s->net, s->batch, s->N, 1, &bytes));
    TRY(s->opt->cuda ? check_gpu_memory(s, bytes) : OK);
    TRY(check_memory(s, 5, s->opt->cuda ? 0 : bytes, 2 * s->batch * s->N,
                     s->K)); /* the posterior, the gradient of the logits */
    TRY(transformer_plan(s->net, s->batch, s->N, 1));
    TRY(transition_buffers(s));
    s->epoch = UINT64_MAX;
    if (s->balance) TRY(group_by_class(s));
    s->micro_batch = transition_micro_batch;
    s->evaluate = transition_evaluate;
    s->picture = transition_picture;
    return OK;
}

/* ------------------------------------------------------------------------------------------------------------
 * Settings: the recipe's lines for this stage, then what the user said
 * ---------------------------------------------------------------------------------------------------------- */

/* The part of the recipe that this stage is trained by */
static Err read_recipe(Stage *s) {
    const Options *o = s->opt;
    char path[1100];
    if (o->config)
        snprintf(path, sizeof path, "%s", o->config);
    else if (strchr(o->model, '/'))
        snprintf(path, sizeof path, "%s/config.txt", o->model);
    else
        snprintf(path, sizeof path, "models/%s.txt", o->model);
    if (!file_exists(path))
        return err("%s: no such recipe; --config FILE names one (models/emoji.txt is an example)", path);
    return recipe_read(&s->settings, path, o->vqgan ? RECIPE_VQGAN : o->joint ? 0 : (int)o->scale);
}

static const char LR[] = "model.params.scheduler_config.params.";

/* What the user gave goes over the recipe; --steps alone also fits warm-up and decay to the shorter run. */
static Err apply_options(Stage *s) {
    const Options *o = s->opt;
    Config *c = &s->settings;
    if (o->steps != NOT_GIVEN) {
        size_t warm = o->steps;
        TRY(config_size(&warm, c, LR, "warm_up_steps", 0, SIZE_MAX / 2, 1));
        TRY(config_set(c, "train.steps", "%zu", o->steps));
        TRY(config_set(c, "model.params.scheduler_config.params.max_decay_steps", "%zu", o->steps));
        TRY(config_set(c, "model.params.scheduler_config.params.warm_up_steps", "%zu",
                       warm < o->steps / 10 ? warm : o->steps / 10));
    }
    if (o->lr > 0) {
        TRY(config_set(c, "model.params.scheduler_config.params.lr_max", "%.17g", o->lr));
        TRY(config_set(c, "model.base_learning_rate", "none"));
    }
    if (o->batch != NOT_GIVEN) TRY(config_set(c, "data.params.batch_size", "%zu", o->batch));
    if (o->accumulate != NOT_GIVEN)
        TRY(config_set(c, "lightning.trainer.accumulate_grad_batches", "%zu", o->accumulate));
    if (o->alpha >= 0) TRY(config_set(c, "model.params.alpha", "%.17g", o->alpha));
    if (o->seed != NOT_GIVEN) TRY(config_set(c, "train.seed", "%zu", o->seed));
    if (o->balance) TRY(config_set(c, "train.balance_classes", "true"));
    if (o->store) TRY(config_set(c, "imagebart.store", "%s", o->store));
    return OK;
}

static Err choose(int *out, const Config *c, const char *key, const char *const *names, int n) {
    const char *value = config_get(c, "", key);
    if (!value) return OK;
    for (*out = 0; *out < n; ++*out)
        if (!strcmp(value, names[*out])) return OK;
    return err("%s %s: not one of %s, %s, %s%s%s", key, value, names[0], names[1], names[2], n > 3 ? ", " : "",
               n > 3 ? names[3] : "");
}

static Err read_settings(Stage *s) {
    static const char *const stores[] = {"f32", "f16", "bf16"}, *const preps[] = {"folder", "ffhq", "imagenet", "lsun"};
    static const Dtype dtypes[] = {DT_F32, DT_F16, DT_BF16};
    const Config *c = &s->settings;
    size_t seed = 23, huge = SIZE_MAX / 2; /* 23: the official default */
    double base = 0;
    int store = 0, prep = PREP_FOLDER, is_vqgan = s->opt->vqgan;
    s->batch = 16, s->accumulate = 1, s->steps = 0;
    s->adam = (AdamW){0, is_vqgan ? 0.5 : 0.9, is_vqgan ? 0.9 : 0.95, 1e-8, 1};
    s->lr = (LrSchedule){2.5e-6, 1e-4, 1e-8, 0, 0};
    s->ema_decay = 0.9999;
    s->w_l1 = s->w_l2 = s->w_codebook = 1;
    TRY(config_size(&s->batch, c, "data.params.", "batch_size", 1, 65536, 1));
    TRY(config_size(&s->accumulate, c, "lightning.trainer.", "accumulate_grad_batches", 1, 65536, 1));
    TRY(config_size(&s->steps, c, "train.", "steps", 1, UINT32_MAX, 0));
    TRY(config_size(&seed, c, "train.", "seed", 0, huge, 1));
    TRY(config_flag(&s->flip, c, "train.", "flip", 1));
    TRY(config_flag(&s->balance, c, "train.", "balance_classes", 1));
    TRY(config_size(&s->restart_every, c, "train.", "restart_codes", 0, huge, 1));
    TRY(config_real(&s->w_l1, c, "train.", "l1_weight", 0, 1e6, 1));
    TRY(config_real(&s->w_l2, c, "train.", "l2_weight", 0, 1e6, 1));
    TRY(config_real(&s->w_codebook, c, "train.", "codebook_weight", 0, 1e6, 1));
    TRY(config_real(&s->ema_decay, c, "train.", "ema_decay", 0, 1, 1));
    TRY(config_real(&s->adam.decay_scale, c, "train.", "weight_decay_scale", 0, 1e6, 1));
    TRY(config_real(&s->alpha, c, "model.params.", "alpha", 0, 1, 1));
    TRY(config_real(&s->lr.lr_start, c, LR, "lr_start", 0, 10, 1));
    TRY(config_real(&s->lr.lr_max, c, LR, "lr_max", 0, 10, 1));
    TRY(config_real(&s->lr.lr_min, c, LR, "lr_min", 0, 10, 1));
    TRY(config_real(&s->lr.warm_up_steps, c, LR, "warm_up_steps", 0, 1e12, 1));
    s->lr.max_decay_steps = (double)s->steps;
    TRY(config_real(&s->lr.max_decay_steps, c, LR, "max_decay_steps", 1, 1e12, 1));
    const char *base_text = config_get(c, "model.", "base_learning_rate");
    s->lr_scale = 1;
    if (base_text && strcmp(base_text, "none")) {
        TRY(config_real(&base, c, "model.", "base_learning_rate", 0, 10, 0));
        s->lr_scale = base * (double)(s->batch * s->accumulate);
    }
    TRY(config_flag(&s->compact, c, "imagebart.", "compact", 1));
    TRY(choose(&store, c, "imagebart.store", stores, 3));
    TRY(choose(&prep, c, "data.prep", preps, 4));
    s->store = dtypes[store], s->prep = (Prep)prep, s->seed = seed;
    return OK;
}

/* ------------------------------------------------------------------------------------------------------------
 * Checkpoints
 * ---------------------------------------------------------------------------------------------------------- */

static Err collect_state(Stage *s, TensorList *list) {
    TRY(tensor_list_params(list, s->params, 'v', "value.", DT_F32));
    TRY(tensor_list_params(list, s->params, '1', "adam.m.", DT_F32));
    TRY(tensor_list_params(list, s->params, '2', "adam.v.", DT_F32));
    if (!s->opt->vqgan) TRY(tensor_list_params(list, s->params, 'e', "ema.", DT_F32));
    if (s->usage) {
        size_t n = vqgan_config(s->vqgan)->n_embed;
        TRY(tensor_list_add(list, "usage", DT_I32, 1, &n, s->usage, 0));
    }
    return OK;
}

/* What sampling reads: the EMA weights of a transition under their plain names (as the official "-ema_weights" files),
 * the schedule's buffers; the VQGAN as it is. */
static Err collect_weights(Stage *s, TensorList *list) {
    if (s->opt->vqgan) return tensor_list_params(list, s->params, 'v', "", s->store);
    return transition_tensors(list, s->net, 'e', &s->schedule, s->store, s->compact);
}

static Err write_list(Stage *s, Err (*collect)(Stage *, TensorList *), const char *suffix) {
    char path[1100];
    TensorList list = {0};
    Err e = collect(s, &list);
    if (e == OK) e = checkpoint_write(run_path(s, path, suffix), list.tensor, list.from_real, list.n, &s->settings);
    tensor_list_free(&list);
    return e;
}

static Err save(Stage *s) {
    TRY(params_fetch(s->params));
    TRY(list_damaged(s, &s->train));
    TRY(list_damaged(s, &s->val));
    TRY(config_set(&s->settings, "train.step", "%llu", (unsigned long long)s->step));
    TRY(config_set(&s->settings, "train.ema_updates", "%llu", (unsigned long long)s->ema_updates));
    TRY(write_list(s, collect_state, ".state.safetensors"));
    return write_list(s, collect_weights, ".safetensors");
}

static Err load_state(Stage *s, const Checkpoint *ck) {
    size_t step = 0, updates = 0;
    TRY(params_load(s->params, ck, 'v', "value."));
    TRY(params_load(s->params, ck, '1', "adam.m."));
    TRY(params_load(s->params, ck, '2', "adam.v."));
    if (!s->opt->vqgan) TRY(params_load(s->params, ck, 'e', "ema."));
    if (s->usage) TRY(checkpoint_ints(ck, "usage", vqgan_config(s->vqgan)->n_embed, (int32_t *)s->usage));
    TRY(config_size(&step, &ck->meta, "train.", "step", 0, UINT32_MAX, 0));
    TRY(config_size(&updates, &ck->meta, "train.", "ema_updates", 0, SIZE_MAX / 2, 0));
    s->step = step, s->ema_updates = updates;
    return OK;
}

/* ------------------------------------------------------------------------------------------------------------
 * The log: one line per step; when a run resumes, lines that are about to be repeated are dropped
 * ---------------------------------------------------------------------------------------------------------- */

static const char log_header[] = "stage\tstep\tloss\thard_or_l1\tsoft_or_l2\tlr\tgrad_norm\timages_per_s\tval\tval_"
                                 "ema\tval_part1_ema\tval_part2_ema\n";

static Err log_rewind(const Stage *s, const char *path) {
    char line[512], stage[16];
    unsigned long long step;
    AtomicFile out;
    TRY(atomic_open(&out, path));
    Err e = atomic_write(&out, log_header, strlen(log_header));
    FILE *in = fopen(path, "r");
    while (in && e == OK && fgets(line, sizeof line, in)) {
        if (sscanf(line, "%15s\t%llu", stage, &step) != 2) continue; /* the header, or a line cut short by a kill */
        if (!strchr(line, '\n') || (!strcmp(stage, s->name) && step > s->step)) continue;
        e = atomic_write(&out, line, strlen(line));
    }
    if (in) fclose(in);
    if (e == OK) return atomic_commit(&out);
    atomic_abandon(&out);
    return e;
}

typedef struct {
    FILE *log;
    char log_path[1100];
    double started, rate;
    uint64_t first_step;
} Progress;

static Err log_open(const Stage *s, Progress *p) {
    snprintf(p->log_path, sizeof p->log_path, "%s/log.tsv", s->opt->run);
    TRY(log_rewind(s, p->log_path));
    p->log = fopen(p->log_path, "a");
    if (!p->log) return err("%s: %s", p->log_path, strerror(errno));
    p->started = seconds();
    p->first_step = s->step;
    return OK;
}

static Err log_step(const Stage *s, Progress *p, const Metrics *m, double lr, double norm, const Metrics *val,
                    const Metrics *ema) {
    fprintf(p->log, "%s\t%llu\t%.6g\t%.6g\t%.6g\t%.6g\t%.6g\t%.1f\t", s->name, (unsigned long long)s->step, m->loss,
            m->part[0], m->part[1], lr, norm, p->rate);
    if (val)
        fprintf(p->log, "%.6g\t%.6g\t%.6g\t%.6g\n", val->loss, ema->loss, ema->part[0], ema->part[1]);
    else
        fprintf(p->log, "\t\t\t\n");
    if (fflush(p->log) || ferror(p->log)) return err("%s: %s", p->log_path, strerror(errno));
    return OK;
}

static void show_step(const Stage *s, Progress *p, const Metrics *m, double lr, double norm) {
    char left[32];
    double per_step = (seconds() - p->started) / (double)(s->step - p->first_step);
    p->rate = (double)(s->batch * s->accumulate) / per_step;
    duration(left, per_step * (double)(s->steps - s->step));
    progress_line("%s step %llu/%zu | loss %.4f | %s %.4f | %s %.4f | lr %.2e | norm %.3f | %.1f images/s | %s left",
                  s->name, (unsigned long long)s->step, s->steps, m->loss, s->opt->vqgan ? "L1" : "hard", m->part[0],
                  s->opt->vqgan ? "L2" : "soft", m->part[1], lr, norm, p->rate, left);
}

/* Evaluates with the weights as they are and, for transitions, with their EMA. */
static Err evaluate_both(Stage *s, Metrics *val, Metrics *ema) {
    TRY(s->evaluate(s, val));
    *ema = *val;
    if (s->opt->vqgan) return OK;
    params_swap_ema(s->params);
    Err e = s->evaluate(s, ema);
    params_swap_ema(s->params);
    return e;
}

static void print_evaluation(const Stage *s, FILE *to, const Metrics *val, const Metrics *ema) {
    if (s->opt->vqgan) {
        /* Pixels span 2, so PSNR = 10 log10(4 / mean square error). */
        fprintf(to, "%s step %llu: validation loss %.4f, L1 %.4f, PSNR %.2f dB", s->name, (unsigned long long)s->step,
                val->loss, val->part[0], 10 * log10(4 / val->part[1]));
        if (s->codes_used) fprintf(to, ", %zu of %zu codes in use", s->codes_used, vqgan_config(s->vqgan)->n_embed);
        fprintf(to, "\n");
        return;
    }
    fprintf(to, "%s step %llu: validation, nats per token: hard %.4f soft %.4f; with EMA: hard %.4f soft %.4f\n",
            s->name, (unsigned long long)s->step, val->part[0], val->part[1], ema->part[0], ema->part[1]);
}

/* ------------------------------------------------------------------------------------------------------------
 * The loop
 * ---------------------------------------------------------------------------------------------------------- */

static Err train_step(Stage *s, Metrics *mean, double *lr, double *norm) {
    memset(mean, 0, sizeof *mean);
    params_zero_grad(s->params);
    for (size_t i = 0; i < s->accumulate; i++) {
        Metrics m;
        TRY(s->micro_batch(s, s->step * s->accumulate + i, &m));
        mean->loss += m.loss / (double)s->accumulate;
        for (int k = 0; k < 2; k++) mean->part[k] += m.part[k] / (double)s->accumulate;
        if (i + 1 < s->accumulate && !s->opt->vqgan) ema_update(s->params, s->ema_decay, ++s->ema_updates);
    }
    *norm = params_grad_norm(s->params);
    if (!isfinite(mean->loss) || !isfinite(*norm))
        return err(
            "%s step %llu: the loss is %g and the gradient norm %g; the last checkpoint is intact (a smaller --lr?)",
            s->name, (unsigned long long)s->step + 1, mean->loss, *norm);
    s->adam.lr = *lr = s->lr_scale * lr_at(&s->lr, s->step);
    s->step++;
    if (s->opt->vqgan)
        adamw_step(s->params, &s->adam, s->step);
    else /* the moving average once per micro batch, as the official code */
        adamw_ema_step(s->params, &s->adam, s->step, s->ema_decay, ++s->ema_updates);
    return s->after_step ? s->after_step(s) : OK;
}

static Err draw_picture(Stage *s) {
    char suffix[40], path[1100];
    snprintf(suffix, sizeof suffix, "-%06llu.png", (unsigned long long)s->step);
    run_path(s, path, suffix);
    if (s->opt->vqgan) return s->picture(s, path);
    params_swap_ema(s->params);
    Err e = s->picture(s, path);
    params_swap_ema(s->params);
    return e;
}

static int due(uint64_t step, size_t every, size_t last) {
    return every && (step % every == 0 || step == last);
}

static Err run(Stage *s) {
    Progress p = {0};
    TRY(log_open(s, &p));
    catch_interrupts();
    Err e = OK;
    while (e == OK && s->step < s->steps && !interrupted()) {
        Metrics m, val, ema;
        double lr = 0, norm = 0;
        e = train_step(s, &m, &lr, &norm);
        if (e != OK) break;
        int evaluating = due(s->step, s->opt->eval_every, s->steps);
        show_step(s, &p, &m, lr, norm);
        if (evaluating) e = evaluate_both(s, &val, &ema);
        if (e == OK && evaluating) progress_end(), print_evaluation(s, stderr, &val, &ema);
        if (e == OK) e = log_step(s, &p, &m, lr, norm, evaluating ? &val : NULL, &ema);
        if (e == OK && due(s->step, s->opt->picture_every, s->steps)) e = draw_picture(s);
        if (e == OK && due(s->step, s->opt->save_every, s->steps)) e = save(s);
    }
    if (e == OK && interrupted()) e = save(s);
    progress_end();
    if (fclose(p.log) && e == OK) e = err("%s: %s", p.log_path, strerror(errno));
    return e;
}

static void free_stage(Stage *s) {
    loader_stop(s->loader);
    dataset_close(&s->train);
    dataset_close(&s->val);
    tokens_free(&s->train_tokens);
    tokens_free(&s->val_tokens);
    transformer_free(s->net);
    vqgan_free(s->vqgan);
    config_free(&s->settings);
    void *buffers[] = {s->dxrec, s->usage, s->order, s->x0,      s->x_prev,  s->x_t,
                       s->ts,    s->label, s->q,     s->dlogits, s->class_at};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
}

/* Starts from the weights that a model's folder has for this stage, with a fresh optimizer. */
static Err start_from(Stage *s, const char *folder) {
    char path[1100];
    Checkpoint ck;
    memset(&ck, 0, sizeof ck);
    const char *prefix = s->opt->vqgan ? "" : "transformer.";
    if ((size_t)snprintf(path, sizeof path, "%s/%s.safetensors", folder, s->name) >= sizeof path)
        return err("--init %.200s...: the path is too long", folder);
    TRY(checkpoint_open(&ck, path));
    Err e = params_load(s->params, &ck, 'v', prefix);
    if (e == OK && !s->opt->vqgan) e = params_load(s->params, &ck, 'e', prefix);
    if (e != OK) err_in(path);
    checkpoint_close(&ck);
    return e;
}

/* Builds the stage from its settings: data, network, parameters and optimizer; fresh, or as `ck` left it. */
static Err build_stage(Stage *s, const Checkpoint *ck) {
    const Options *o = s->opt;
    TRY(dataset_open_lists(&s->train, o->data, o->list, o->val_list, SPLIT_TRAIN));
    TRY(dataset_open_lists(&s->val, o->data, o->list, o->val_list, SPLIT_VAL));
    TRY(make_folder(s->opt->run));
    TRY(s->opt->vqgan ? vqgan_stage(s) : transition_stage(s));
    TRY(params_plan(s->params, PLAN_VALUE | PLAN_GRAD | PLAN_ADAM | (s->opt->vqgan ? 0 : PLAN_EMA)));
    if (ck)
        TRY(load_state(s, ck));
    else
        params_init(s->params, s->seed);
    if (!ck && s->opt->init) TRY(start_from(s, s->opt->init));
    return params_send(s->params);
}

static void say_gpu(const Stage *s) {
    char text[CUDA_TEXT_BYTES], state[32], activations[32], available[32];
    check(cuda_find(text, NULL, NULL));
    fprintf(stderr, "device: %s; %s, %s\n", text, s->name, s->opt->precision);
    fprintf(stderr, "GPU memory: parameters, gradients and optimizer %s, activations %s; %s was free\n",
            bytes_text(state, s->gpu_state), bytes_text(activations, s->gpu_activations),
            bytes_text(available, s->gpu_available));
}

static void say_start(const Stage *s) {
    if (s->opt->cuda) say_gpu(s);
    fprintf(stderr,
            "%s: %.2f million parameters, %zu pictures (%zu held out), batch %zu x %zu, %zu steps, seed %llu, %d "
            "threads, %s\n",
            s->name, (double)params_count(s->params) / 1e6, s->train.n, s->val.n, s->batch, s->accumulate, s->steps,
            (unsigned long long)s->seed, threads_get(), vector_instructions());
    char state[32], activations[32], available[32];
    fprintf(stderr, "memory: parameters, gradients and optimizer %s, activations %s; %s available\n",
            bytes_text(state, s->state_bytes), bytes_text(activations, s->activation_bytes),
            s->available == SIZE_MAX ? "unknown how much is" : bytes_text(available, s->available));
    if (s->train_tokens.n) say_damaged(s);
    if (s->step) fprintf(stderr, "%s: continuing after step %llu\n", s->name, (unsigned long long)s->step);
}

static void say_end(const Stage *s) {
    const char *run = s->opt->run;
    if (!s->train_tokens.n) say_damaged(s);
    if (s->step < s->steps) {
        fprintf(stderr, "stopped after step %llu, everything is saved; --resume continues\n",
                (unsigned long long)s->step);
        return;
    }
    char path[1100];
    printf("%s\n", run_path(s, path, ".safetensors"));
    if (s->opt->all) return;
    if (s->opt->vqgan)
        fprintf(stderr, "next: ./train %s --scale 1 --data %s --run %s, then the other scales\n", s->opt->model,
                s->opt->data, run);
    else
        fprintf(stderr, "when every scale is trained: ./sample %s\n", run);
}

/* The state file of an earlier run of this stage, if any; 1 when there is one to continue. */
static int open_state(Stage *s, Checkpoint *ck) {
    char path[1100];
    run_path(s, path, ".state.safetensors");
    if (!file_exists(path)) {
        if (s->opt->resume && !s->opt->all) fprintf(stderr, "%s: nothing to resume; starting at step 0\n", path);
        return 0;
    }
    if (!s->opt->resume && !s->opt->eval)
        die("%s exists: --resume continues it, --run DIR starts another run, or remove it", path);
    check(checkpoint_open(ck, path));
    return 1;
}

static void evaluate_only(Stage *s) {
    Metrics val, ema;
    check(evaluate_both(s, &val, &ema));
    print_evaluation(s, stdout, &val, &ema);
}

static void train(const Options *o) {
    Stage s;
    Checkpoint ck;
    memset(&s, 0, sizeof s);
    memset(&ck, 0, sizeof ck);
    s.opt = o;
    s.t = (int)o->scale;
    if (o->vqgan || o->joint)
        snprintf(s.name, sizeof s.name, "%s", o->vqgan ? "vqgan" : "joint");
    else
        snprintf(s.name, sizeof s.name, "scale%zu", o->scale);
    int continuing = open_state(&s, &ck);
    if (o->eval && !continuing) die("%s: no %s.state.safetensors there to evaluate; train it first", o->run, s.name);
    if (continuing)
        for (size_t i = 0; i < ck.meta.n; i++)
            check(config_set(&s.settings, ck.meta.kv[i].key, "%s", ck.meta.kv[i].value));
    else
        check(read_recipe(&s));
    check(apply_options(&s));
    check(read_settings(&s));
    check(build_stage(&s, continuing ? &ck : NULL));
    checkpoint_close(&ck);
    if (o->eval)
        evaluate_only(&s);
    else {
        say_start(&s);
        if (o->vqgan) check(start_loader(&s));
        check(run(&s));
        say_end(&s);
    }
    free_stage(&s);
}

/* Every stage in turn, finished ones in no time, then ./sample, which lies beside this program. */
static void train_all(Options *o, const char *program) {
    char sample[1100], out[1100];
    const char *slash = strrchr(program, '/');
    size_t T = 1;
    Stage s = {.opt = o, .name = "scale"};
    o->resume = 1;
    check(read_recipe(&s));
    check(config_size(&T, &s.settings, "model.params.", "n_scales", 1, MAX_SCALES, 0));
    config_free(&s.settings);
    o->vqgan = 1;
    train(o);
    o->vqgan = 0;
    for (o->scale = 1; o->scale <= T && !interrupted(); o->scale++) train(o);
    if (interrupted()) return;
    snprintf(sample, sizeof sample, "%.*ssample", slash ? (int)(slash - program) + 1 : 0, program);
    snprintf(out, sizeof out, "%s/samples.png", o->run);
    fflush(stdout);
    execlp(sample, sample, o->run, "-o", out, (char *)NULL);
    die("%s: %s; when it is built: ./sample %s", sample, strerror(errno), o->run);
}

static const char intro[] =
    "usage: ./train [MODEL] (--vqgan | --scale N | --joint | --all) [options]\n\n"
    "Trains one part of an ImageBART model. Three steps make a model:\n"
    "  1. ./train emoji --vqgan --data data/emoji    a VQGAN learns to write a picture as a grid of tokens and back\n"
    "  2. ./train emoji --scale N --data data/emoji  for N = 1..T: noise has replaced a part of the tokens, more at "
    "each\n"
    "                                                scale; a transformer learns to undo one step of it\n"
    "  3. ./sample runs/emoji                        starts from pure noise and runs the steps back, T to 1\n"
    "--all runs them one after the other. "
    "MODEL names a recipe models/MODEL.txt (default emoji). Everything is kept in the run folder; the pictures there "
    "show\n"
    "held-out examples as training goes on.\n";

int main(int argc, char **argv) {
    static char default_run[1100];
    Options o = {.model = "emoji",
                 .steps = NOT_GIVEN,
                 .batch = NOT_GIVEN,
                 .accumulate = NOT_GIVEN,
                 .seed = NOT_GIVEN,
                 .save_every = 100,
                 .eval_every = 500,
                 .picture_every = 500,
                 .precision = "bf16",
                 .alpha = -1};
    const Option table[] = {
        {OPT_HEADING, "Arguments", NULL, NULL, 0, 0, NULL},
        {OPT_ARGUMENT, "MODEL", NULL, &o.model, 0, 0,
         "emoji, another recipe models/MODEL.txt, or a folder with config.txt"},
        {OPT_HEADING, "What to train (one of)", NULL, NULL, 0, 0, NULL},
        {OPT_FLAG, "--vqgan", NULL, &o.vqgan, 0, 0, "the first stage: pictures to tokens and back"},
        {OPT_SIZE, "--scale", "N", &o.scale, 1, MAX_SCALES, "the transition x_N -> x_(N-1)"},
        {OPT_FLAG, "--joint", NULL, &o.joint, 0, 0, "all transitions in one network, a random scale each step"},
        {OPT_FLAG, "--all", NULL, &o.all, 0, 0,
         "the first stage, then every scale, then draw samples with ./sample; the same\ncommand again goes on where it "
         "was "
         "stopped"},
        {OPT_HEADING, "On what", NULL, NULL, 0, 0, NULL},
        {OPT_STRING, "--data", "PATH", &o.data, 0, 0,
         "a folder of PNG, JPEG and WebP pictures (sub-folders are classes; train/ and val/\n"
         "are the split if they exist, else 1 in 20 is held out), LSUN's LMDB, or a list\nfile (default data/MODEL)"},
        {OPT_STRING, "--list", "FILE", &o.list, 0, 0,
         "of the folder --data only what this file names, a picture a line, such as the\nofficial ffhqtrain.txt"},
        {OPT_STRING, "--val-list", "FILE", &o.val_list, 0, 0, "and hold out what this one names (ffhqvalidation.txt)"},
        {OPT_STRING, "--run", "DIR", &o.run, 0, 0, "where weights, log and pictures go (default runs/MODEL)"},
        {OPT_STRING, "--config", "FILE", &o.config, 0, 0, "the recipe, instead of models/MODEL.txt"},
        {OPT_STRING, "--init", "DIR", &o.init, 0, 0,
         "start from the weights in this folder (models/emoji, another run), not from noise"},
        {OPT_HEADING, "How", NULL, NULL, 0, 0, NULL},
        {OPT_SIZE, "--steps", "N", &o.steps, 1, UINT32_MAX,
         "optimizer steps in all; warm-up and cosine decay fit themselves to it"},
        {OPT_SIZE, "--batch", "N", &o.batch, 1, 65536, "pictures per micro batch"},
        {OPT_SIZE, "--accumulate", "N", &o.accumulate, 1, 65536, "micro batches per step"},
        {OPT_REAL, "--lr", "X", &o.lr, 1e-12, 10, "peak learning rate"},
        {OPT_REAL, "--alpha", "X", &o.alpha, 0, 1, "loss = X soft (KL to the posterior) + (1-X) hard (cross entropy)"},
        {OPT_SIZE, "--seed", "N", &o.seed, 0, 9e15, "of everything random (default 23)"},
        {OPT_FLAG, "--balance", NULL, &o.balance, 0, 0,
         "transitions: draw every class equally often, however few its pictures"},
        {OPT_STRING, "--store", "TYPE", &o.store, 0, 0, "f32, f16 or bf16: how the weights for sampling are stored"},
        {OPT_SIZE, "--save-every", "N", &o.save_every, 1, UINT32_MAX, "steps between checkpoints (default 100)"},
        {OPT_SIZE, "--eval-every", "N", &o.eval_every, 1, UINT32_MAX, "steps between evaluations (default 500)"},
        {OPT_SIZE, "--picture-every", "N", &o.picture_every, 1, UINT32_MAX, "steps between pictures (default 500)"},
        {OPT_FLAG, "--resume", NULL, &o.resume, 0, 0, "continue the run, bit for bit as if it had not stopped"},
        {OPT_FLAG, "--eval", NULL, &o.eval, 0, 0, "only evaluate what the run has, on the held-out pictures"},
        {OPT_STRING, "--device", "cpu|cuda", &o.device, 0, 0, "where to train (default cpu)"},
        {OPT_STRING, "--precision", "TYPE", &o.precision, 0, 0,
         "with --device cuda: bf16 (default), weights and sums still in float, or f32"},
        {OPT_SIZE, "--threads", "N", &o.threads, 0, 4096, "0 (default): all; the result does not depend on it"},
        {OPT_END, NULL, NULL, NULL, 0, 0, NULL}};
    options_parse(argc, argv, table, intro);
    if (o.vqgan + o.joint + o.all + (o.scale > 0) != 1)
        usage_error("give one of --vqgan, --scale N, --joint, --all; -h explains");
    if (o.val_list && !o.list) usage_error("--val-list goes with --list, which names the training pictures");
    if (o.all && o.eval) usage_error("--eval evaluates one stage: --vqgan, --scale N or --joint");
    if (strcmp(o.precision, "bf16") && strcmp(o.precision, "f32"))
        usage_error("--precision %s: expected bf16 or f32", o.precision);
    o.cuda = check_device(o.device);
    threads_set((int)o.threads);
    const char *slash = strrchr(o.model, '/'), *short_name = slash && slash[1] ? slash + 1 : o.model;
    static char default_data[1100];
    snprintf(default_run, sizeof default_run, "runs/%s", short_name);
    snprintf(default_data, sizeof default_data, "data/%s", short_name);
    if (!o.run) o.run = default_run;
    if (!o.data) o.data = default_data;
    if (o.all)
        train_all(&o, argv[0]);
    else
        train(&o);
    return 0;
}
