/* second_stage.c - ./train --scale N and --joint: tokens x_t -> x_{t-1}. All but the micro batch, which train.c shows;
 * the mathematics is in transformer.cu and diffusion.c.
 *
 * Read in this order: the tokens of a step; evaluation and picture; building; state and log. */
#include "training/stage.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ------------------------------------------------------------------------------------------------------------
 * The tokens of a step
 * ---------------------------------------------------------------------------------------------------------- */

static void take_example(Stage *s, const Tokens *from, size_t example, size_t crop, size_t flip, size_t b) {
    SecondStage *x = &s->second;
    const uint16_t *token = from->token + ((example * from->crops + crop) * from->flips + flip) * s->N;
    for (size_t i = 0; i < s->N; i++) x->x0[b * s->N + i] = token[i];
    x->label[b] = from->label[example];
}

/* Which example is number `at` of the endless training sequence, and its epoch. */
static size_t next_example(Stage *s, uint64_t at, uint64_t *epoch) {
    SecondStage *x = &s->second;
    size_t n = x->train.n;
    *epoch = at / n;
    if (s->set.balance) {
        uint64_t stream = rng_stream(RNG_ORDER, 0, at);
        size_t *start = x->class_at + rng_below(s->set.seed, stream, 0, (uint32_t)x->n_drawn);
        return x->order[start[0] + rng_below(s->set.seed, stream, 1, (uint32_t)(start[1] - start[0]))];
    }
    if (*epoch != x->epoch) epoch_order(x->order, n, s->set.seed, x->epoch = *epoch);
    return x->order[at % n];
}

void next_tokens(Stage *s, uint64_t micro) {
    SecondStage *x = &s->second;
    for (size_t b = 0; b < s->batch; b++) {
        const uint64_t at = example_number(s, micro, b);
        uint64_t epoch;
        size_t crop, flip, example = next_example(s, at, &epoch);
        choose_crop(&crop, &flip, &x->train, s->set.seed, at, epoch, example, s->set.balance);
        take_example(s, &x->train, example, crop, flip, b);
        if (label_dropped(s->set.label_dropout, s->set.seed, micro, s->rank_first + b)) x->label[b] = x->null_class;
    }
}

static Err group_by_class(Stage *s) {
    SecondStage *x = &s->second;
    size_t at = 0;
    if (s->train.n_classes == 0)
        return config_err(&s->recipe, "train.", "balance_classes", "train.balance_classes: %s has no classes",
                          s->set.data);
    TRY(mem_alloc(&x->class_at, s->train.n_classes + 1, sizeof *x->class_at, "classes"));
    for (size_t c = 0; c < s->train.n_classes; c++) {
        x->class_at[x->n_drawn] = at;
        for (size_t i = 0; i < x->train.n; i++)
            if (x->train.label[i] == (int32_t)c) x->order[at++] = (uint32_t)i;
        if (at > x->class_at[x->n_drawn]) x->n_drawn++;
    }
    x->class_at[x->n_drawn] = at;
    return OK;
}

/* ------------------------------------------------------------------------------------------------------------
 * Evaluation and picture
 * ---------------------------------------------------------------------------------------------------------- */

/* The noise of an example depends on nothing but the example, so that evaluations can be compared. */
static const uint64_t VALIDATION_SEED = 0x76616c6964;

Err second_evaluate(Stage *s, TransitionLoss *loss_of, Metrics *out) {
    const SecondStage *x = &s->second;
    const size_t n = x->val.n;
    const int first = x->t ? x->t : 1, last = x->t ? x->t : x->schedule.T;
    double sum[3] = {0}, count = 0;
    for (int t = first; t <= last; t++)
        for (size_t i = 0, B; i < n; i += B) {
            Loss loss;
            B = min_size(n - i, s->batch);
            for (size_t b = 0; b < B; b++) take_example(s, &x->val, i + b, 0, 0, b);
            TRY(loss_of(s, t, B, VALIDATION_SEED, 0, i * s->N, 0, &loss));
            sum[0] += loss.loss * (double)B, sum[1] += loss.hard * (double)B, sum[2] += loss.soft * (double)B;
            count += (double)B;
        }
    *out = (Metrics){.loss = sum[0] / count, .part = {sum[1] / count, sum[2] / count}};
    return OK;
}

static Err decode_rows(Stage *s, const int32_t *tokens, size_t n, real *images) {
    return vqgan_decode_tokens(s->vqgan, tokens, n, s->h, s->w, images);
}

/* Held-out pictures noised to x_t, what the network makes of them, and the true x_{t-1}; the noisiest scale, which sees
 * no x_t, shows samples only. Drawn with the EMA weights. */
Err second_picture(Stage *s, const char *path) {
    SecondStage *x = &s->second;
    enum { COLUMNS = 8 };
    int t = x->t ? x->t : 1 + (int)(s->step / s->set.picture_every) % x->schedule.T;
    const Tokens *from = x->val.n ? &x->val : &x->train; /* a small set holds nothing out */
    size_t n = min_size(from->n, COLUMNS), side = drawn_size(s), pixels = 3 * side * side, rows = 0;
    if (n > s->batch) n = s->batch;
    real *images = NULL;
    Image im = {0};
    SampleOptions o;
    for (size_t b = 0; b < n; b++) take_example(s, from, b * (from->n / n), 0, 0, b);
    noise_chain(x->x_prev, x->x_t, x->x0, n * s->N, s->K, &x->schedule, t, VALIDATION_SEED, 1, 0);
    TRY(mem_alloc(&images, 3 * n * pixels, sizeof *images, "picture"));
    memset(&o, 0, sizeof o);
    o.n = n, o.seed = s->set.seed, o.temperature[t] = 1, o.chain[t] = 1;
    o.label = transformer_config(x->net)->has_class ? x->label : NULL;
    int x_t_shown = transformer_config(x->net)->kind == NET_X;
    Err e = OK;
    if (x_t_shown) e = decode_rows(s, x->x_t, n, images + n * pixels * rows++);
    if (e == OK) e = sample_scale(x->net, &o, t, 0, s->N, x->x_t);
    if (e == OK) e = decode_rows(s, x->x_t, n, images + n * pixels * rows++);
    if (e == OK && x_t_shown) e = decode_rows(s, x->x_prev, n, images + n * pixels * rows++);
    if (e == OK) e = transformer_plan(x->net, s->batch, s->N, 1);
    if (e == OK) e = image_grid(&im, images, rows * n, side, side, n, 2);
    if (e == OK) e = image_write_png(path, &im, &s->recipe);
    image_free(&im);
    free(images);
    return e;
}

/* ------------------------------------------------------------------------------------------------------------
 * Building
 * ---------------------------------------------------------------------------------------------------------- */

static Err check_transition(const Stage *s, const NetConfig *c) {
    const SecondStage *x = &s->second;
    size_t vocabulary = c->kind == NET_X ? c->enc_num_tokens : c->input_vocab_size;
    TRY(prep_size_check(&s->recipe, s->size));
    if (c->dec_num_tokens != s->K)
        return err("%s: the network writes %zu token values, the first stage has %zu", s->name, c->dec_num_tokens,
                   s->K);
    if (c->has_class && s->train.n_classes == 0 && s->train.stray[0])
        return err(
            "%s: the model is conditioned on classes; the pictures need one sub-folder per class, and some lie in "
            "none, such as %s",
            s->set.data, s->train.stray);
    if (c->has_class && s->train.n_classes == 0)
        return err("%s: the model is conditioned on classes; the pictures need one sub-folder per class "
                   "(the recipe photos has no classes)",
                   s->set.data);
    if (c->has_class && s->train.n_classes > vocabulary)
        return err("%s: %zu classes; the network has %zu input tokens", s->set.data, s->train.n_classes, vocabulary);
    if (s->set.label_dropout > 0 && !c->has_class)
        return config_err(&s->recipe, "train.", "label_dropout",
                          "train.label_dropout: %s is not conditioned on classes, expected 0", s->name);
    if (s->set.label_dropout > 0 && s->train.n_classes >= vocabulary)
        return config_err(
            &s->recipe, "train.", "label_dropout",
            "train.label_dropout: %zu classes and \"no class\" need as many input tokens, the network has %zu; "
            "raise %s to %zu",
            s->train.n_classes, vocabulary, c->kind == NET_X ? "enc_num_tokens" : "input_vocab_size",
            s->train.n_classes + 1);
    if (x->t && c->kind == NET_GPT && x->t != x->schedule.T)
        return err("%s: a decoder-only network sees no x_t, so it can only be scale %d", s->name, x->schedule.T);
    return OK;
}

/* "No class" is the first row of the class embedding that no class has. */
static Err add_model_keys(Stage *s, const NetConfig *c) {
    SecondStage *x = &s->second;
    x->null_class = (int32_t)s->train.n_classes;
    if (s->set.label_dropout > 0) TRY(config_set(&s->recipe, "imagebart.null_class", "%d", (int)x->null_class));
    if (c->has_class) TRY(classes_from_folders(&s->recipe, s->train.class_name, s->train.n_classes));
    TRY(config_set(&s->recipe, "imagebart.h", "%zu", s->h));
    TRY(config_set(&s->recipe, "imagebart.w", "%zu", s->w));
    return x->t ? config_set(&s->recipe, "model.params.single_scale", "%d", x->t) : OK;
}

static Err transition_buffers(Stage *s) {
    SecondStage *x = &s->second;
    size_t B = s->batch, n;
    TRY(size_mul(&n, B * s->N, s->K));
    TRY(mem_alloc(&x->x0, B * s->N, sizeof *x->x0, "tokens"));
    TRY(mem_alloc(&x->x_prev, B * s->N, sizeof *x->x0, "tokens"));
    TRY(mem_alloc(&x->x_t, B * s->N, sizeof *x->x0, "tokens"));
    TRY(mem_alloc(&x->ts, B, sizeof *x->ts, "scales"));
    TRY(mem_alloc(&x->label, B, sizeof *x->label, "labels"));
    if (s->set.cuda) n = 0; /* there, neither is written down */
    TRY(mem_alloc(&x->q, n, sizeof *x->q, "posterior"));
    TRY(mem_alloc(&x->dlogits, n, sizeof *x->dlogits, "gradient of the logits"));
    return mem_alloc(&x->order, x->train.n, sizeof *x->order, "order of the examples");
}

static Err read_schedule(Stage *s) {
    const char *redraw = config_get(&s->recipe, "model.params.", "redraw_prob");
    size_t T = 0;
    TRY(config_size(&T, &s->recipe, "model.params.", "n_scales", 1, MAX_SCALES, 0));
    const Err e = schedule_make(&s->second.schedule, redraw ? redraw : "geometric", (int)T);
    return e == OK ? OK : config_blame(&s->recipe, "model.params.", "redraw_prob");
}

static Err create_network(Stage *s, const NetConfig *c) {
    Transformer *net;
    size_t bytes = 0;
    if (net_config_check(c) != OK) return config_in_file(&s->recipe);
    TRY(transformer_create(&s->second.net, c));
    net = s->second.net;
    s->params = transformer_params(net);
    transformer_set_alphas(net, s->second.schedule.alpha);
    s->params->precision = s->precision;
    if (s->set.cuda) TRY(transformer_use_cuda(net, s->precision));
    TRY(transformer_plan_bytes(net, s->batch, s->N, 1, &bytes));
    if (s->set.cuda) TRY(check_gpu_memory(s, bytes));
    TRY(token_bytes(s, &s->memory.tokens));
    /* 2: the posterior, the gradient of the logits */
    return check_memory(s, 5, s->set.cuda ? 0 : bytes, 2 * s->batch * s->N, s->K);
}

/* What second_build will find when the first stage, of this configuration, is trained */
Err second_check(Stage *s, const VqganConfig *first, Err (*open_pictures)(Stage *s)) {
    NetConfig c;
    s->second.t = (int)s->set.scale;
    TRY(read_schedule(s));
    TRY(net_config_read(&c, &s->recipe, "model.params."));
    if (s->train.n == 0) TRY(open_pictures(s));
    s->size = first->resolution;
    s->h = s->w = s->size >> (first->levels - 1);
    s->N = s->h * s->w;
    s->K = first->re_embed && c.dec_num_tokens != first->n_embed ? first->re_embed : first->n_embed;
    TRY(check_transition(s, &c));
    if (s->K > TOKEN_VALUES)
        return err("%s: a codebook of %zu entries; tokens are kept in 16 bits, so that %d are the most", s->name, s->K,
                   TOKEN_VALUES);
    return create_network(s, &c);
}

/* The network, if it goes with the run's first stage and with the pictures; path: that first stage's file */
static Err second_fit(Stage *s, NetConfig *c, char path[PATH_BYTES]) {
    TRY(open_first_stage(s, path));
    TRY(fit_to_codes(s, c));
    TRY(check_transition(s, c));
    TRY(add_model_keys(s, c));
    return create_network(s, c);
}

Err second_build(Stage *s) {
    SecondStage *x = &s->second;
    char vqgan_path[PATH_BYTES];
    NetConfig c;
    x->t = (int)s->set.scale;
    TRY(read_schedule(s));
    TRY(net_config_read(&c, &s->recipe, "model.params."));
    TRY(path_make(vqgan_path, "%s/vqgan.safetensors", s->set.run));
    const int had = rank() != 0 || file_exists(vqgan_path);
    TRY(ranks_agree(rank() == 0 ? copy_first_stage(s) : OK));
    if (ranks_agree(rank() == 0 ? adopt_codes(s) : OK) != OK || second_fit(s, &c, vqgan_path) != OK) {
        if (!had) unlink(vqgan_path); /* the model's, which the next try would take for the run's own */
        return FAILED;
    }
    TRY(load_tokens(s, vqgan_path));
    TRY(transformer_plan(x->net, s->batch, s->N, 1));
    TRY(transition_buffers(s));
    x->epoch = UINT64_MAX;
    return s->set.balance ? group_by_class(s) : OK;
}

void second_free(Stage *s) {
    SecondStage *x = &s->second;
    tokens_free(&x->train);
    tokens_free(&x->val);
    transformer_free(x->net);
    void *buffers[] = {x->order, x->class_at, x->x0, x->x_prev, x->x_t, x->ts, x->label, x->q, x->dlogits};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
}

/* ------------------------------------------------------------------------------------------------------------
 * State and log
 * ---------------------------------------------------------------------------------------------------------- */

/* A model's weights are its moving average, as the official "-ema_weights" files have them. */
Err second_start_from(Stage *s, const Checkpoint *ck) {
    TRY(transition_known(transformer_config(s->second.net), s->params, ck));
    TRY(params_load(s->params, ck, 'v', "transformer."));
    return params_load(s->params, ck, 'e', "transformer.");
}

/* The EMA weights, if there is one, under their plain names; the schedule's buffers */
Err second_collect_weights(Stage *s, TensorList *list) {
    SecondStage *x = &s->second;
    return transition_tensors(list, x->net, s->without_ema ? 'v' : 'e', &x->schedule, s->store, s->set.compact);
}

void second_print_evaluation(const Stage *s, FILE *to, const Metrics *val, const Metrics *ema) {
    fprintf(
        to,
        "%s step %llu: validation, nats per token: hard %.4f soft %.4f; with EMA: hard %.4f soft %.4f (uniform guess: "
        "ln K = %.2f)\n",
        s->name, (unsigned long long)s->step, val->part[0], val->part[1], ema->part[0], ema->part[1],
        log((double)s->K));
}
