/* train_scale.c - ./train --scale N and --joint: tokens x_t -> x_{t-1}. One micro batch, an evaluation, a picture; the
 * dataset as tokens, encoded once; the first stage that the transition stands on. The mathematics is in transformer.cu
 * and diffusion.c. */
#include "training/stage.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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
        size_t example = next_example(s, example_number(s, micro, b), &epoch);
        uint32_t flip = rng_below(s->seed, rng_stream(RNG_CROP, epoch, example), 0, (uint32_t)s->train_tokens.flips);
        take_example(s, &s->train_tokens, example, flip, b);
        if (label_dropped(s->label_dropout, s->seed, micro, s->first + b)) s->label[b] = s->null_class;
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
    draw_chain(s, t, s->batch, s->seed, micro, s->first * s->N);
    TRY(transition_loss(s, t, s->batch, 1 / s->shares, &loss, s->dlogits));
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

/* images (B,...) as they are and, with flips, mirrored: token (B, flips, N). Where a label is -1 the image is not
 * used. */
static Err encode_batch(Stage *s, size_t flips, const real *images, size_t B, real *mirrored, int32_t *once,
                        int32_t *token) {
    size_t pixels = 3 * s->size * s->size;
    memcpy(mirrored, images, B * pixels * sizeof *mirrored);
    for (size_t flip = 0; flip < flips; flip++) {
        if (flip) image_mirror(mirrored, B * 3, s->size);
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
        if (e == OK && interrupted() && p->done < n)
            e = err("%s: stopped after %zu of %zu pictures; the same command goes on from there", p->part, p->done, n);
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

static Err load_both(Stage *s, const char *vqgan_path) {
    TRY(load_tokens(s, &s->train_tokens, &s->train, "train", vqgan_path));
    return load_tokens(s, &s->val_tokens, &s->val, "val", vqgan_path);
}

/* ---- the first stage that a transition stands on ---- */

static Err copy_file(const char *to, const char *from) {
    Checkpoint ck;
    AtomicFile f;
    memset(&ck, 0, sizeof ck);
    TRY(checkpoint_open(&ck, from));
    Err e = atomic_open(&f, to);
    if (e == OK) e = atomic_close(&f, atomic_write(&f, ck.map, ck.map_bytes));
    checkpoint_close(&ck);
    return e;
}

/* A run without a VQGAN gets the model's, so that it can be sampled as it stands. */
Err copy_vqgan(const Stage *s) {
    char ours[1100], theirs[1100];
    snprintf(ours, sizeof ours, "%s/vqgan.safetensors", s->opt->run);
    snprintf(theirs, sizeof theirs, "%s/vqgan.safetensors", model_folder(s->opt->model));
    if (file_exists(ours)) return OK;
    if (!file_exists(theirs)) return err("%s: no first stage there, nor at %s; train it first: --vqgan", ours, theirs);
    return copy_file(ours, theirs);
}

/* The run's own VQGAN */
Err open_vqgan(Stage *s, char path[1100]) {
    Checkpoint ck;
    VqganConfig c;
    snprintf(path, 1100, "%s/vqgan.safetensors", s->opt->run);
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
    if (s->label_dropout > 0 && !c->has_class)
        return err("train.label_dropout: %s is not conditioned on classes, expected 0", s->name);
    if (s->label_dropout > 0 && s->train.n_classes >= vocabulary)
        return err("train.label_dropout: %zu classes and \"no class\" need as many input tokens, the network has %zu; "
                   "raise %s to %zu",
                   s->train.n_classes, vocabulary, c->kind == NET_X ? "enc_num_tokens" : "input_vocab_size",
                   s->train.n_classes + 1);
    if (s->t && c->kind == NET_GPT && s->t != s->schedule.T)
        return err("%s: a decoder-only network sees no x_t, so it can only be scale %d", s->name, s->schedule.T);
    return OK;
}

/* "No class" is the first row of the class embedding that no class has. */
static Err add_model_keys(Stage *s, const NetConfig *c) {
    s->null_class = (int32_t)s->train.n_classes;
    if (s->label_dropout > 0) TRY(config_set(&s->settings, "imagebart.null_class", "%d", (int)s->null_class));
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

Err transition_stage(Stage *s) {
    char vqgan_path[1100];
    NetConfig c;
    size_t T = 0, bytes = 0;
    const char *redraw = config_get(&s->settings, "model.params.", "redraw_prob");
    TRY(config_size(&T, &s->settings, "model.params.", "n_scales", 1, MAX_SCALES, 0));
    TRY(schedule_make(&s->schedule, redraw ? redraw : "geometric", (int)T));
    TRY(net_config_read(&c, &s->settings, "model.params."));
    TRY(ranks_agree(rank() == 0 ? copy_vqgan(s) : OK));
    TRY(open_vqgan(s, vqgan_path));
    TRY(fit_to_codes(s, &c));
    TRY(check_transition(s, &c));
    TRY(add_model_keys(s, &c));
    TRY(ranks_agree(rank() == 0 ? load_both(s, vqgan_path) : OK)); /* which makes them, for the others to read */
    if (rank() > 0) TRY(load_both(s, vqgan_path));
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
