/* train.c - trains every part of a model, one stage at a time (SPEC sections 4, 7 and 9).
 *
 * The first stage (--vqgan) learns to write pictures as tokens and back. A micro batch of pictures x:
 *     z = encoder(x); k = nearest codes of z; x' = decoder(codes k)
 *     loss = |x - x'| + (x - x')^2 + LPIPS(x, x') - d_weight * discriminator(x') + |z - codes|^2
 * A transition (--scale t) learns to undo one step of noise. A micro batch of tokens x_0, which are a picture's k:
 *     x_i = noise(x_{i-1}), i = 1 .. t
 *     p = softmax(transformer(x_t)), for every token of x_{t-1}
 *     loss = -(1-alpha) log p(x_{t-1}) + alpha KL(q(x_{t-1} | x_t, x_0) || p)
 * Both: backward; gradients added up over micro batches and processes; AdamW. Of a transition, a moving average of the
 * weights (EMA) is kept, from which samples are drawn.
 *
 * Here is the loop, then what it needs: build a stage, continue a run, all stages in order, main. What a run survives,
 * logs, shows and stores is in training/ (stage.h lists it), and no mathematics is here: read next diffusion.c for
 * noise and posterior, transformer.cu and vqgan.c for forward and backward, then sample.c, which draws. */
#include "training/stage.h"
#include "files/places.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ------------------------------------------------------------------------------------------------------------
 * One micro batch: forward, loss, backward. Gradients are weighted with 1/shares (shares: all micro
 * batches of a step, over all processes), so that a step's sum is its mean.
 * ---------------------------------------------------------------------------------------------------------- */

/* The first stage, of B pictures x (B,3,size,size); xrec, the reconstructions, and dxrec, the loss's gradient by them,
 * have the same shape.
 *     loss = l1 |x - xrec| + l2 (x - xrec)^2 + p LPIPS(x, xrec) - d D(xrec) + c codebook
 * The four terms of xrec each add their part to dxrec; from there backward goes through decoder, codes (straight
 * through: as if the quantizer were not there) and encoder. The codebook's term has its gradient in vqgan_backward. */
static Err first_micro_batch(Stage *s, uint64_t micro, Metrics *m) {
    const Settings *set = &s->set;
    const size_t B = s->batch, n = B * 3 * s->size * s->size;
    const double weight = 1 / s->shares;
    real *dxrec = s->first.dxrec;
    const real *x, *xrec;
    double codebook;

    /* batch, forward: xrec = decoder(nearest codes of encoder(x)) */
    TRY(next_pictures(s, micro, &x));
    TRY(vqgan_forward(s->vqgan, x, B, s->size, s->size, &xrec, &codebook));

    /* loss; dxrec = its gradient, then += LPIPS's, then += the discriminator's D */
    image_loss(x, xrec, n, set->l1_weight * weight, set->l2_weight * weight, &m->part[0], &m->part[1], dxrec);
    TRY(add_perceptual(s, x, xrec, B, weight, &m->perceptual, dxrec));
    m->loss = set->l1_weight * m->part[0] + set->l2_weight * m->part[1] + s->first.perceptual_weight * m->perceptual;
    TRY(gan_generator(s, x, xrec, &m->loss));
    m->loss += set->codebook_weight * codebook;
    count_codes(s);

    /* backward; then the discriminator learns to tell x and xrec apart */
    TRY(vqgan_backward(s->vqgan, dxrec, set->codebook_weight * weight, NULL));
    return gan_discriminator(s, xrec);
}

/* A transition at scale t, of B grids of N tokens, of which there are K: x_0, x_{t-1}, x_t (B,N); p, q and dlogits, the
 * loss's gradient, (B,N,K).
 *     x_i = noise(x_{i-1}), i = 1 .. t       with probability beta_i a token becomes any of the K
 *     p = softmax(logits)                    what the network thinks that x_{t-1} was
 *     q = q(x_{t-1} | x_t, x_0)              what it was, as far as that can be known: Bayes' rule
 *     loss = -(1-alpha) log p(x_{t-1}) + alpha KL(q || p), mean over tokens
 * seed, micro and token, the number of the first token, name the random numbers. Without a weight: no gradients. */
static Err transition_loss(Stage *s, int t, size_t B, uint64_t seed, uint64_t micro, uint64_t token, double weight,
                           Loss *loss) {
    SecondStage *second = &s->second;
    const size_t N = s->N, K = s->K;
    const int32_t *label = transformer_config(second->net)->has_class ? second->label : NULL;
    real *dlogits = weight > 0 ? second->dlogits : NULL;
    const real *logits;

    noise_chain(second->x_prev, second->x_t, second->x0, B * N, K, &second->schedule, t, seed, micro, token);
    for (size_t b = 0; b < B; b++) second->ts[b] = t;
    if (transformer_on_cuda(second->net)) /* the rest in one call, in which logits are never written down */
        return transformer_loss_cuda(second->net, &second->schedule, second->x0, second->x_prev, second->x_t,
                                     second->ts, label, B, N, s->set.alpha, weight, weight > 0, loss);

    TRY(transformer_forward(second->net, second->x_prev, second->x_t, second->ts, label, B, N, &logits));
    posterior(second->q, second->x0, second->x_t, B * N, K, &second->schedule, t);
    TRY(denoising_loss(loss, logits, second->x_prev, second->q, B * N, K, s->set.alpha, weight, dlogits));
    return dlogits ? transformer_backward(second->net, dlogits) : OK;
}

/* The next x_0 (B,N) and labels (B); the stage's scale, or, where one network has all, a random one */
static Err second_micro_batch(Stage *s, uint64_t micro, Metrics *m) {
    const SecondStage *second = &s->second;
    const uint64_t stream = rng_stream(RNG_SCALE, 0, 0);
    const int t = second->t ? second->t : 1 + (int)rng_below(s->set.seed, stream, micro, (uint32_t)second->schedule.T);
    Loss loss;
    next_tokens(s, micro);
    TRY(transition_loss(s, t, s->batch, s->set.seed, micro, s->rank_first * s->N, 1 / s->shares, &loss));
    m->loss = loss.loss, m->part[0] = loss.hard, m->part[1] = loss.soft;
    return OK;
}

/* ------------------------------------------------------------------------------------------------------------
 * The loop
 * ---------------------------------------------------------------------------------------------------------- */

/* The step's gradients and mean loss: on every rank the sums over all ranks. A rank that fails still takes part in the
 * sum, for the others wait for it. */
static Err gradients(Stage *s, Step *step) {
    double sums[4] = {0}; /* loss, parts, LPIPS */
    Err e = OK;
    params_zero_grad(s->params);
    for (size_t i = 0; i < s->set.accumulate; i++) {
        const uint64_t micro = micro_number(s, i);
        const int last = i + 1 == s->set.accumulate;
        Metrics m = {0};
        s->micro_index = i;
        if (last) TRY(gradients_begin(s->params));
        if (e == OK) e = s->kind->micro_batch(s, micro, &m);
        sums[0] += test_loss(s, micro, m.loss) / s->shares, sums[1] += m.part[0] / s->shares;
        sums[2] += m.part[1] / s->shares, sums[3] += m.perceptual / s->shares;
        if (!last && s->kind->ema) ema_update(s->params, s->set.ema_decay, ++s->ema_updates);
    }
    TRY(gradients_end(s->params));
    TRY(ranks_agree(e));
    TRY(ranks_sum(sums, 4));
    step->mean = (Metrics){.loss = sums[0], .part = {sums[1], sums[2]}, .perceptual = sums[3]};
    step->norm = test_norm(s, params_grad_norm(s->params));
    step->bad = why_bad(s, step->mean.loss, step->norm);
    return OK;
}

/* AdamW; for a transition EMA with it, once per micro batch as in the official code. */
static Err update(Stage *s, Step *step) {
    remember_step(s, step->mean.loss, step->norm);
    s->adam.lr = step->lr = s->lr_scale * rate_at(&s->rate, s->step);
    s->step++;
    if (s->kind->ema)
        adamw_ema_step(s->params, &s->adam, s->step, s->set.ema_decay, ++s->ema_updates);
    else
        adamw_step(s->params, &s->adam, s->step);
    return s->kind->after_step ? s->kind->after_step(s) : OK;
}

/* After a step that counts: the report, a checkpoint. *stop: the user wants an end. */
static Err report_and_save(Stage *s, Report *r, const Step *step, int *stop) {
    TRY(report_step(s, r, step));
    *stop = interrupted() || (rank() == 0 && ended_early(s)); /* the first rank evaluates */
    TRY(ranks_any(stop));
    return *stop || due(s->step, s->set.save_every, s->set.steps) ? save(s) : OK;
}

static Err run(Stage *s) {
    Report r;
    int stop = s->has_state && ended_early(s);
    catch_interrupts();
    Err e = report_begin(s, &r);
    if (e == OK && !s->has_state) e = save_state(s, 1); /* something to go back to, and the disk shows what it has */
    if (e == OK) e = ranks_agree(rank() == 0 ? save_missing_weights(s) : OK);
    while (e == OK && s->step < s->set.steps && !stop) {
        Step step = {0};
        s->trained = 1;
        e = gradients(s, &step);
        if (e == OK && step.bad && can_pass_over(s, &step))
            e = pass_over(s, &step);
        else if (e == OK && !step.bad)
            e = update(s, &step);
        if (e == OK && step.bad) {
            e = roll_back(s, &step);
            if (e == OK) e = report_begin(s, &r);
        } else if (e == OK)
            e = report_and_save(s, &r, &step, &stop);
    }
    if (e == OK) e = report_end(s, &r);
    progress_end();
    return e;
}

/* ------------------------------------------------------------------------------------------------------------
 * A stage: built, started from somewhere, trained
 * ---------------------------------------------------------------------------------------------------------- */

/* The first rank says what failed, on whichever rank it did, and all of them exit. */
static void check_all(Err e) {
    if (ranks_agree(e) == OK) return;
    progress_end();
    if (rank() == 0) die("%s", err_text());
    exit(EXIT_FAILURE);
}

static int any_interrupted(void) {
    int flag = interrupted();
    check_all(ranks_any(&flag));
    return flag;
}

static Err evaluate_transition(Stage *s, Metrics *m) {
    return second_evaluate(s, transition_loss, m);
}

/* What the files of training/ must know of either kind (stage.h) */
static const StageKind first_stage = {
    .part_name = {"L1", "L2"},
    .build = first_build,
    .micro_batch = first_micro_batch,
    .after_step = first_after_step,
    .evaluate = first_evaluate,
    .picture = first_picture,
    .start_from = first_start_from,
    .gather = first_gather,
    .collect = first_collect,
    .load = first_load,
    .collect_weights = first_collect_weights,
    .log = first_log,
    .progress = gan_progress,
    .print_evaluation = first_print_evaluation,
};

static const StageKind second_stage = {
    .ema = 1,
    .part_name = {"hard", "soft"},
    .build = second_build,
    .micro_batch = second_micro_batch,
    .evaluate = evaluate_transition,
    .picture = second_picture,
    .start_from = second_start_from,
    .collect_weights = second_collect_weights,
    .print_evaluation = second_print_evaluation,
};

static Stage new_stage(const Settings *given) {
    Stage s = {.given = given, .set = *given};
    s.kind = given->vqgan ? &first_stage : &second_stage;
    if (given->vqgan || given->joint)
        snprintf(s.name, sizeof s.name, "%s", given->vqgan ? "vqgan" : "joint");
    else
        snprintf(s.name, sizeof s.name, "scale%zu", given->scale);
    return s;
}

static void free_stage(Stage *s) {
    first_free(s);
    second_free(s);
    vqgan_free(s->vqgan);
    dataset_close(&s->train);
    dataset_close(&s->val);
    config_free(&s->recipe);
}

static int is_file(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISREG(st.st_mode);
}

/* Starts from the weights that a model's folder, or a file, has for this stage, with a fresh optimizer. */
static Err start_from(Stage *s, const char *folder) {
    char path[PATH_BYTES];
    Checkpoint ck;
    memset(&ck, 0, sizeof ck);
    const size_t length = is_file(folder) ? (size_t)snprintf(path, sizeof path, "%s", folder)
                                          : (size_t)snprintf(path, sizeof path, "%s/%s.safetensors", folder, s->name);
    if (length >= sizeof path) return err("--init %.200s...: the path is too long", folder);
    TRY(checkpoint_open(&ck, path));
    Err e = s->kind->start_from(s, &ck);
    if (e != OK && !strstr(err_text(), path)) err_in(path);
    if (e == OK) say_note(&ck);
    checkpoint_close(&ck);
    return e;
}

/* --init's weights, or those that the recipe's ckpt_path names */
static Err begin_with(Stage *s) {
    const int from_recipe = s->set.init == s->init;
    if (start_from(s, s->set.init) != OK)
        return from_recipe ? config_blame(&s->recipe, "model.params.", "ckpt_path") : FAILED;
    if (from_recipe) say_once("%s: begins with the weights of %s (ckpt_path)\n", s->name, s->init);
    return OK;
}

static Err open_pictures(Stage *s) {
    const Settings *o = &s->set;
    const Split flat = has_classes(s) ? 0 : SPLIT_FLAT;
    TRY(data_is_there(o->data));
    TRY(dataset_open_lists(&s->train, o->data, o->list, o->val_list, SPLIT_TRAIN | flat));
    return dataset_open_lists(&s->val, o->data, o->list, o->val_list, SPLIT_VAL | flat);
}

/* A run that was not there when its states were looked for may be another's by now. */
static Err enter_run(const Stage *s) {
    if (s->set.eval) return OK;
    TRY(make_run(s->set.run));
    return s->has_state || !state_exists(s) ? OK : err("%s: another ./train began this run meanwhile", s->set.run);
}

/* Builds the stage from its settings: data, network, parameters and optimizer; fresh, or as `ck` left it. */
static Err build_stage(Stage *s, const Checkpoint *ck) {
    TRY(open_pictures(s));
    TRY(settle_pictures(s, ck != NULL));
    TRY(ranks_agree(rank() == 0 ? enter_run(s) : OK));
    TRY(s->kind->build(s));
    s->params->bf16_moments = s->set.bf16_states;
    TRY(params_plan(s->params, PLAN_VALUE | PLAN_GRAD | PLAN_ADAM | (s->kind->ema ? PLAN_EMA : 0)));
    if (ck)
        TRY(load_state(s, ck));
    else
        params_init(s->params, s->set.seed);
    if (!ck && s->set.init) TRY(begin_with(s));
    if (ck && s->set.init && !s->set.all)
        say_once("%s: goes on with its own weights; --init %s is of runs that begin\n", s->name, s->set.init);
    return params_send(s->params);
}

/* The state file of an earlier run of this stage, if any; 1 when there is one to continue. */
static int open_state(Stage *s, Checkpoint *ck) {
    char path[PATH_BYTES];
    s->has_state = state_exists(s);
    check_all(ranks_any(&s->has_state));
    run_path(s, path, ".state.safetensors");
    if (!s->has_state) {
        if (s->set.eval)
            check_all(err("%s: no %s.state.safetensors there to evaluate; train it first", s->set.run, s->name));
        if (s->set.resume && !s->set.all) say_once("%s: nothing to resume; starting at step 0\n", path);
        return 0;
    }
    if (!s->set.resume && !s->set.eval)
        check_all(err("%s exists: --resume continues it, --run DIR starts another run, or remove it", path));
    check_all(state_open(s, ck, !s->set.eval));
    return 1;
}

static Err evaluate_only(Stage *s) {
    Metrics val, ema;
    if (s->val.n == 0) return err("%s: no held-out pictures to evaluate on", s->set.data);
    TRY(evaluate_both(s, &val, &ema));
    s->kind->print_evaluation(s, stdout, &val, &ema);
    return OK;
}

static void train(const Settings *given) {
    Stage s = new_stage(given);
    Checkpoint ck;
    memset(&ck, 0, sizeof ck);
    const int continuing = open_state(&s, &ck);
    check_all(settings_read(&s, continuing ? &ck : NULL));
    check_all(build_stage(&s, continuing ? &ck : NULL));
    checkpoint_close(&ck);
    check_all(ranks_same(s.params->arena[0], s.params->total * sizeof(real), "weights to start from"));
    if (given->eval)
        check_all(rank() == 0 ? evaluate_only(&s) : OK);
    else {
        if (rank() == 0) remove_leftovers(&s), say_start(&s);
        check_all(run(&s));
        check_all(rank() == 0 ? use_best(&s) : OK);
        if (rank() == 0) say_end(&s);
    }
    free_stage(&s);
}

/* ------------------------------------------------------------------------------------------------------------
 * All stages in order
 * ---------------------------------------------------------------------------------------------------------- */

/* The first stage in the run, for transitions as the recipe has them: with their pictures, prepared their way. */
static Err remap(const Settings *given) {
    Settings transition = *given;
    transition.vqgan = transition.all = 0;
    transition.scale = 1;
    Stage s = new_stage(&transition);
    Err e = settings_read(&s, NULL);
    if (e == OK) e = open_pictures(&s);
    if (e == OK) e = make_run(given->run);
    if (e == OK) e = remap_first_stage(&s);
    free_stage(&s);
    return e;
}

/* A run that has a first stage is remapped as it stands, unless it is to be trained further. */
static void train_and_remap(const Settings *given) {
    char path[PATH_BYTES];
    snprintf(path, sizeof path, "%s/vqgan.safetensors", given->run);
    int there = file_exists(path);
    check_all(ranks_any(&there));
    if (!given->remap || given->resume || !there) train(given);
    if (!given->remap || any_interrupted()) return;
    check_all(rank() == 0 ? remap(given) : OK);
}

/* ./sample, which lies beside this program, in its place */
static void draw_samples(const Settings *o) {
    char sample[PATH_BYTES], out[PATH_BYTES];
    const int installed = is_installed(o);
    if (!installed || !program_beside(sample, "sample"))
        snprintf(sample, sizeof sample, "%.*ssample", program_folder(o), o->program);
    snprintf(out, sizeof out, "%s/samples.png", o->run);
    fflush(stdout);
    unlock_run();
    signal(SIGXFSZ, SIG_DFL), signal(SIGPIPE, SIG_DFL);
    execlp(sample, installed ? "imagebart sample" : sample, o->run, "-o", out, o->device ? "--device" : (char *)NULL,
           o->device, (char *)NULL);
    die("%s: %s; when it is built: ./sample %s", sample, strerror(errno), o->run);
}

/* Whatever the transitions would refuse when the first stage is trained, an hour from now, is said at once; those that
 * were begun have passed. *a: how much they will be. */
static Err check_ahead(const Settings *given, size_t T, Ahead *a) {
    Settings o = *given;
    VqganConfig c;
    Dataset train = {0}, val = {0};
    o.vqgan = 1;
    Stage first = new_stage(&o);
    Err e = settings_read(&first, NULL);
    if (e == OK) e = first_check(&first, &c);
    if (e == OK) ahead_add(a, &first);
    free_stage(&first);
    o.vqgan = 0;
    for (o.scale = 1; e == OK && o.scale <= T; o.scale++) {
        Stage s = new_stage(&o);
        s.train = train, s.val = val; /* opened once */
        e = settings_read(&s, NULL);
        if (e == OK) e = second_check(&s, &c, open_pictures);
        if (e == OK) ahead_add(a, &s);
        if (state_exists(&s)) e = OK;
        train = s.train, val = s.val;
        memset(&s.train, 0, sizeof s.train), memset(&s.val, 0, sizeof s.val);
        free_stage(&s);
    }
    dataset_close(&train);
    dataset_close(&val);
    return e == OK ? ahead_disk(a, given) : e;
}

/* Every stage in turn, finished ones in no time, then samples. */
static void train_all(const Settings *given) {
    Settings o = *given;
    Ahead ahead = {0};
    size_t T = 1;
    o.resume = 1;
    check_all(count_scales(&o, NULL, &T));
    check_all(check_ahead(&o, T, &ahead));
    o.vqgan = 1, o.later = work_behind(&ahead, 0);
    train_and_remap(&o);
    o.vqgan = 0;
    if (o.init && is_file(o.init)) o.init = NULL; /* it is a first stage's */
    for (o.scale = 1; o.scale <= T && !any_interrupted(); o.scale++) {
        o.later = work_behind(&ahead, o.scale);
        train(&o);
    }
    if (any_interrupted()) return;
    ranks_end();
    if (rank() == 0) draw_samples(&o);
}

static void make_schedule(const Settings *given) {
    Stage s = {.set = *given, .name = "schedule"};
    if (ranks() > 1) check_all(err("--schedule runs in one process"));
    check(settings_read(&s, NULL));
    check(metric_schedule(&s));
    free_stage(&s);
}

/* By default all processes compute on a GPU of their own, or none does. */
static int choose_device(const Settings *o) {
    const char *device = o->device ? o->device : getenv("IMAGEBART_DEVICE");
    if (ranks() == 1 || (device && strcmp(device, "cuda"))) return check_device(o->device);
    unsigned char id[GPU_ID_BYTES] = {0};
    const Err e = cuda_built() || device ? cuda_choose(rank_local(), id) : FAILED;
    if (device) check_all(e);
    int without = e != OK;
    check_all(ranks_any(&without));
    if (without) return 0;
    const Err own = ranks_differ(id, sizeof id, "GPU");
    if (device) check_all(own);
    return own == OK;
}

int main(int argc, char **argv) {
    Settings given;
    signal(SIGPIPE, SIG_IGN); /* an error of the write, which is dealt with there */
    settings_parse(&given, argc, argv);
    if (given.convert_perceptual) {
        check(convert_perceptual(given.perceptual, given.convert_perceptual));
        return 0;
    }
    check(ranks_start(say_waiting));
    given.cuda = choose_device(&given);
    check_all(rank() == 0 && !given.eval ? lock_run(given.run) : OK);
    threads_set(given.threads ? (int)given.threads : rank_threads());
    if (given.schedule)
        make_schedule(&given);
    else if (given.all)
        train_all(&given);
    else
        train_and_remap(&given);
    ranks_end();
    return 0;
}
