/* train_scale.c - ./train --scale N and --joint: tokens x_t -> x_{t-1}. One micro batch, an evaluation, a picture; the
 * dataset as tokens, encoded once; the first stage that the transition stands on. The mathematics is in transformer.cu
 * and diffusion.c. */
#include "training/stage.h"
#include "training/stage.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
