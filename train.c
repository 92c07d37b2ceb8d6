/* train.c - trains every part of a model: the VQGAN, one transition, or all transitions in one network.
 *
 * Reading order: the options at the end of the file say what a user can ask for; `Stage` (train.h) is what is being
 * trained. The two kinds of stage are train_vqgan.c (with its discriminator, LPIPS and codebook in train_gan.c,
 * train_perceptual.c and train_codes.c) and train_scale.c, each as three functions: one micro batch, an evaluation, a
 * picture. Here is the one loop that drives them; parallel.c adds up the gradients of several processes. train_run.c
 * keeps the run, train_survive.c is what it goes on after, train_view.c shows it; train_schedule.c is --schedule. No
 * mathematics here: it is in vqgan.c, transformer.cu and diffusion.c. */
#include "training/stage.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ------------------------------------------------------------------------------------------------------------
 * Settings: the recipe's lines for this stage, then what the user said
 * ---------------------------------------------------------------------------------------------------------- */

static const char *recipe_path(const Options *o, char out[1100]) {
    if (o->config)
        snprintf(out, 1100, "%s", o->config);
    else if (strchr(o->model, '/'))
        snprintf(out, 1100, "%s/config.txt", o->model);
    else
        snprintf(out, 1100, "models/%s.txt", o->model);
    return out;
}

/* The part of the recipe that this stage is trained by */
static Err read_recipe(Stage *s) {
    const Options *o = s->opt;
    char path[1100];
    recipe_path(o, path);
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
    if (o->label_dropout >= 0) TRY(config_set(c, "train.label_dropout", "%.17g", o->label_dropout));
    if (o->seed != NOT_GIVEN) TRY(config_set(c, "train.seed", "%zu", o->seed));
    if (o->bf16_states) TRY(config_set(c, "train.bf16_states", "true"));
    if (o->balance) TRY(config_set(c, "train.balance_classes", "true"));
    if (o->store) TRY(config_set(c, "imagebart.store", "%s", o->store));
    return OK;
}

/* `batch` of the settings is of a rank if the user or the recipe says it, of all ranks as a state file keeps it: so
 * that a run may go on with another number of ranks. given: of a rank. */
static Err share_batch(Stage *s, int given) {
    const size_t saved = s->batch;
    if (!given && saved % ranks())
        return err("%s: a micro batch of %zu pictures, as the run was trained, cannot be shared evenly by %zu "
                   "processes; --batch says how many each is to take",
                   s->name, saved, ranks());
    s->batch = given ? saved : saved / ranks();
    s->of = s->batch * ranks(), s->first = s->batch * rank(), s->shares = (double)(s->accumulate * ranks());
    return config_set(&s->settings, "data.params.batch_size", "%zu", s->of);
}

static Err read_settings(Stage *s, int continuing) {
    const Config *c = &s->settings;
    const char *store = config_get(c, "imagebart.", "store");
    size_t seed = 23, huge = SIZE_MAX / 2; /* 23: the official default */
    double base = 0;
    const int is_vqgan = s->opt->vqgan;
    s->batch = 16, s->accumulate = 1, s->steps = 0;
    s->adam = (AdamW){0, is_vqgan ? 0.5 : 0.9, is_vqgan ? 0.9 : 0.95, 1e-8, 1};
    s->lr = (LrSchedule){2.5e-6, 1e-4, 1e-8, 0, 0};
    s->ema_decay = 0.9999;
    s->w_l1 = s->w_l2 = s->w_codebook = 1;
    survive_defaults(s);
    TRY(config_size(&s->batch, c, "data.params.", "batch_size", 1, 1 << 20, 1));
    TRY(config_size(&s->accumulate, c, "lightning.trainer.", "accumulate_grad_batches", 1, 65536, 1));
    TRY(share_batch(s, !continuing || s->opt->batch != NOT_GIVEN));
    TRY(config_size(&s->steps, c, "train.", "steps", 1, UINT32_MAX, 0));
    TRY(config_size(&seed, c, "train.", "seed", 0, huge, 1));
    TRY(config_flag(&s->flip, c, "train.", "flip", 1));
    TRY(config_flag(&s->balance, c, "train.", "balance_classes", 1));
    TRY(config_flag(&s->bf16_states, c, "train.", "bf16_states", 1));
    TRY(config_size(&s->restart_every, c, "train.", "restart_codes", 0, huge, 1));
    TRY(config_real(&s->w_l1, c, "train.", "l1_weight", 0, 1e6, 1));
    TRY(config_real(&s->w_l2, c, "train.", "l2_weight", 0, 1e6, 1));
    TRY(config_real(&s->w_codebook, c, "train.", "codebook_weight", 0, 1e6, 1));
    TRY(config_real(&s->ema_decay, c, "train.", "ema_decay", 0, 1, 1));
    TRY(config_real(&s->spike, c, "train.", "spike", 0, 1e6, 1));
    TRY(config_real(&s->adam.decay_scale, c, "train.", "weight_decay_scale", 0, 1e6, 1));
    TRY(config_real(&s->alpha, c, "model.params.", "alpha", 0, 1, 1));
    TRY(config_real(&s->label_dropout, c, "train.", "label_dropout", 0, 1, 1));
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
        s->lr_scale = base * (double)(s->of * s->accumulate);
    }
    TRY(config_flag(&s->compact, c, "imagebart.", "compact", 1));
    s->store = DT_F32, s->seed = seed;
    if (store && dtype_of_store(&s->store, store) != OK) return err_in("imagebart.store");
    return prep_read(&s->prep, c);
}

/* ------------------------------------------------------------------------------------------------------------
 * The loop
 * ---------------------------------------------------------------------------------------------------------- */

/* The step's gradients, on every rank those of all; so are the mean loss and the norm: all that decides whether the
 * step is good (what_is_bad). A rank that fails still takes part in the sum. */
static Err gradients(Stage *s, Metrics *mean, double *norm) {
    double sums[4] = {0}; /* loss, parts, LPIPS */
    Err e = OK;
    params_zero_grad(s->params);
    for (size_t i = 0; i < s->accumulate; i++) {
        const uint64_t micro = micro_number(s, i);
        Metrics m = {0};
        const int last = i + 1 == s->accumulate;
        s->micro_index = i;
        if (last) TRY(gradients_begin(s->params));
        if (e == OK) e = s->micro_batch(s, micro, &m);
        sums[0] += test_loss(s, micro, m.loss) / s->shares, sums[1] += m.part[0] / s->shares;
        sums[2] += m.part[1] / s->shares, sums[3] += m.perceptual / s->shares;
        if (!last && !s->opt->vqgan) ema_update(s->params, s->ema_decay, ++s->ema_updates);
    }
    TRY(gradients_end(s->params));
    TRY(ranks_agree(e));
    TRY(ranks_sum(sums, 4));
    *mean = (Metrics){.loss = sums[0], .part = {sums[1], sums[2]}, .perceptual = sums[3]};
    *norm = params_grad_norm(s->params);
    return OK;
}

/* The optimizer's part of the step. *bad: the step is not to count, for what was seen after it; all that it changed is
 * to be as a checkpoint has it. */
static Err update(Stage *s, const Metrics *mean, double norm, double *lr, const char **bad) {
    remember_step(s, mean->loss, norm);
    s->adam.lr = *lr = s->lr_scale * lr_at(&s->lr, s->step);
    s->step++;
    if (s->opt->vqgan)
        adamw_step(s->params, &s->adam, s->step);
    else /* the moving average once per micro batch, as the official code */
        adamw_ema_step(s->params, &s->adam, s->step, s->ema_decay, ++s->ema_updates);
    if (s->after_step) TRY(s->after_step(s, bad));
    if (*bad) s->step--;
    return OK;
}

static Err draw_picture(Stage *s, void *view) {
    char suffix[40], path[1100];
    snprintf(suffix, sizeof suffix, "-%06llu.png", (unsigned long long)s->step);
    run_path(s, path, suffix);
    if (!s->opt->vqgan) params_swap_ema(s->params);
    Err e = s->picture(s, path);
    if (!s->opt->vqgan) params_swap_ema(s->params);
    return e == OK ? view_picture(s, view, path) : e;
}

static int due(uint64_t step, size_t every, size_t last) {
    return every && (step % every == 0 || step == last);
}

/* What is seen of a run is the first rank's work: at its beginning and after it went back; of a step. */
static Err begin_report(Stage *s, Progress *p, View *v) {
    if (rank() > 0) return OK;
    TRY(log_open(s, p));
    return until_room(s, view_open, v, 0);
}

static Err report_step(Stage *s, Progress *p, View *v, const Metrics *m, double lr, double norm) {
    Metrics val, ema;
    v->evaluated = due(s->step, s->opt->eval_every, s->steps);
    show_step(s, p, m, lr, norm);
    if (v->evaluated) {
        TRY(evaluate_both(s, &val, &ema));
        progress_end();
        print_evaluation(s, stderr, &val, &ema);
    }
    TRY(log_step(s, p, m, lr, norm, v->evaluated ? &val : NULL, &ema));
    TRY(until_room(s, view_step, v, 0));
    if (v->evaluated) TRY(save_best(s, &ema));
    return due(s->step, s->opt->picture_every, s->steps) ? until_room(s, draw_picture, v, 0) : OK;
}

static Err run(Stage *s) {
    Progress p = {0};
    View v;
    const int first = rank() == 0;
    int stop = 0, there = state_exists(s);
    TRY(ranks_any(&there));
    catch_interrupts();
    Err e = ranks_agree(begin_report(s, &p, &v));
    if (e == OK && !there) e = save_state(s, 1); /* something to go back to, and the disk shows what it has */
    while (e == OK && s->step < s->steps && !stop) {
        Metrics m;
        double lr = 0, norm = 0;
        e = gradients(s, &m, &norm);
        const char *bad = e == OK ? what_is_bad(s, m.loss, norm) : NULL;
        if (e == OK && !bad) e = update(s, &m, norm, &lr, &bad);
        if (e != OK) break;
        if (bad) {
            e = roll_back(s, &m, norm, bad);
            if (e == OK) e = ranks_agree(begin_report(s, &p, &v));
            continue;
        }
        if (due(s->step, s->opt->eval_every, s->steps)) e = gather_usage(s);
        if (e == OK) e = ranks_agree(first ? report_step(s, &p, &v, &m, lr, norm) : OK);
        stop = interrupted();
        if (e == OK) e = ranks_any(&stop);
        if (e == OK && (stop || due(s->step, s->opt->save_every, s->steps))) e = save(s);
    }
    if (e == OK) e = ranks_agree(first ? until_room(s, view_close, &v, 0) : OK);
    progress_end();
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
    gan_free(s);
    perceptual_free(s->perceptual);
    config_free(&s->settings);
    void *buffers[] = {s->dxrec, s->usage, s->val_usage, s->order, s->x0,      s->x_prev,
                       s->x_t,   s->ts,    s->label,     s->q,     s->dlogits, s->class_at};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
}

static int is_file(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISREG(st.st_mode);
}

/* Starts from the weights that a model's folder, or a file, has for this stage, with a fresh optimizer. */
static Err start_from(Stage *s, const char *folder) {
    char path[1100];
    Checkpoint ck;
    memset(&ck, 0, sizeof ck);
    const char *prefix = s->opt->vqgan ? "" : "transformer.";
    const size_t length = is_file(folder) ? (size_t)snprintf(path, sizeof path, "%s", folder)
                                          : (size_t)snprintf(path, sizeof path, "%s/%s.safetensors", folder, s->name);
    if (length >= sizeof path) return err("--init %.200s...: the path is too long", folder);
    TRY(checkpoint_open(&ck, path));
    Err e = params_load(s->params, &ck, 'v', prefix);
    if (e == OK && !s->opt->vqgan) e = params_load(s->params, &ck, 'e', prefix);
    if (e == OK && s->opt->vqgan) e = gan_start_from(s, &ck);
    if (e != OK) err_in(path);
    checkpoint_close(&ck);
    return e;
}

/* Builds the stage from its settings: data, network, parameters and optimizer; fresh, or as `ck` left it. */
static Err build_stage(Stage *s, const Checkpoint *ck) {
    const Options *o = s->opt;
    TRY(dataset_open_lists(&s->train, o->data, o->list, o->val_list, SPLIT_TRAIN));
    TRY(dataset_open_lists(&s->val, o->data, o->list, o->val_list, SPLIT_VAL));
    TRY(ranks_agree(rank() == 0 ? make_folder(s->opt->run) : OK));
    TRY(s->opt->vqgan ? vqgan_stage(s) : transition_stage(s));
    s->params->bf16_moments = s->bf16_states;
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
    fprintf(stderr, "device: %s; %s, %s (--device cpu: the processor)\n", text, s->name, s->opt->precision);
    fprintf(stderr, "GPU memory: parameters, gradients and optimizer %s, activations %s; %s was free\n",
            bytes_text(state, s->gpu_state), bytes_text(activations, s->gpu_activations),
            bytes_text(available, s->gpu_available));
}

static void say_start(Stage *s) {
    if (ranks() > 1)
        fprintf(stderr, "%zu processes, each takes %zu of the %zu pictures of a micro batch, with %d threads\n",
                ranks(), s->batch, s->of, threads_get());
    if (s->opt->cuda)
        say_gpu(s);
    else
        say_cpu();
    fprintf(stderr,
            "%s: %.2f million parameters, %zu pictures (%zu held out), batch %zu x %zu, %zu steps, seed %llu, %d "
            "threads, %s\n",
            s->name, (double)params_count(s->params) / 1e6, s->train.n, s->val.n, s->of, s->accumulate, s->steps,
            (unsigned long long)s->seed, threads_get(), vector_instructions());
    char state[32], activations[32], available[32];
    fprintf(stderr, "memory: parameters, gradients and optimizer%s %s, activations %s; %s available\n",
            s->bf16_states ? " (in bf16)" : "", bytes_text(state, s->state_bytes),
            bytes_text(activations, s->activation_bytes),
            s->available == SIZE_MAX ? "unknown how much is" : bytes_text(available, s->available));
    if (s->train_tokens.n) say_damaged(s);
    say_disk(s);
    if (s->step) fprintf(stderr, "%s: continuing after step %llu\n", s->name, (unsigned long long)s->step);
}

/* A word as a shell takes it */
static void say_word(const char *word) {
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./=+:,@%";
    if (*word && word[strspn(word, plain)] == 0) {
        fprintf(stderr, " %s", word);
        return;
    }
    fprintf(stderr, " '");
    for (; *word; word++) *word == '\'' ? fprintf(stderr, "'\\''") : fprintf(stderr, "%c", *word);
    fprintf(stderr, "'");
}

static void say_option(const char *option, const char *value) {
    if (!value) return;
    fprintf(stderr, " %s", option);
    say_word(value);
}

/* How many scales the model has. Of the settings of a transition, for those of a first stage do not say. */
static Err count_scales(const Options *o, const Config *settings, size_t *T) {
    Config recipe = {0};
    char path[1100];
    if (settings && config_get(settings, "model.params.", "n_scales"))
        return config_size(T, settings, "model.params.", "n_scales", 1, MAX_SCALES, 0);
    Err e = recipe_read(&recipe, recipe_path(o, path), 1);
    if (e == OK) e = config_size(T, &recipe, "model.params.", "n_scales", 1, MAX_SCALES, 0);
    config_free(&recipe);
    return e;
}

/* Has the run weights of this scale, trained to the end? Those of unknown history are. */
static int is_finished(const Options *o, size_t scale) {
    char path[1100];
    Checkpoint ck;
    size_t step = 0, steps = 0;
    snprintf(path, sizeof path, "%s/scale%zu.safetensors", o->run, scale);
    if (!file_exists(path) || checkpoint_open(&ck, path) != OK) return 0;
    Err e = config_size(&step, &ck.meta, "train.", "step", 0, UINT32_MAX, 1);
    if (e == OK) e = config_size(&steps, &ck.meta, "train.", "steps", 0, UINT32_MAX, 1);
    int known = config_get(&ck.meta, "train.", "step") != NULL;
    checkpoint_close(&ck);
    return e == OK && (!known || step >= steps);
}

/* The folder of ./train, where ./sample is too; "" when the shell looks for both */
static int program_folder(const Options *o) {
    const char *slash = strrchr(o->program, '/');
    return slash ? (int)(slash - o->program) + 1 : 0;
}

/* The next command, as it can be typed: the first scale that is not trained, then ./sample. */
static void say_next(const Stage *s) {
    const Options *o = s->opt;
    size_t T = 1, next = 1;
    char word[1100];
    if (count_scales(o, o->vqgan ? NULL : &s->settings, &T) != OK) T = 1;
    while (!o->joint && next <= T && is_finished(o, next)) next++;
    fprintf(stderr, "next:");
    if (o->joint || next > T) {
        snprintf(word, sizeof word, "%.*ssample", program_folder(o), o->program);
        say_word(word);
        say_word(o->run);
    } else {
        snprintf(word, sizeof word, "%zu", next);
        say_word(o->program);
        say_word(o->model);
        say_option("--scale", word);
        say_option("--config", o->config);
        say_option("--data", o->data);
        say_option("--list", o->list);
        say_option("--val-list", o->val_list);
        say_option("--run", o->run);
        say_option("--device", o->device);
        if (o->cuda) say_option("--precision", o->precision);
    }
    fprintf(stderr, "\n");
}

static void say_end(const Stage *s) {
    if (!s->train_tokens.n) say_damaged(s);
    if (s->step < s->steps) {
        fprintf(stderr, "stopped after step %llu, everything is saved; --resume continues\n",
                (unsigned long long)s->step);
        return;
    }
    char path[1100];
    printf("%s\n", run_path(s, path, ".safetensors"));
    if (!s->opt->all) say_next(s);
}

/* The first rank says what failed, on whichever rank it did, and all of them exit. */
static void check_all(Err e) {
    if (ranks_agree(e) == OK) return;
    progress_end();
    if (rank() == 0) die("%s", err_text());
    exit(EXIT_FAILURE);
}

/* The state file of an earlier run of this stage, if any; 1 when there is one to continue. */
static int open_state(Stage *s, Checkpoint *ck) {
    char path[1100];
    int there = state_exists(s);
    check_all(ranks_any(&there));
    run_path(s, path, ".state.safetensors");
    if (!there) {
        if (s->opt->resume && !s->opt->all && rank() == 0)
            fprintf(stderr, "%s: nothing to resume; starting at step 0\n", path);
        return 0;
    }
    if (!s->opt->resume && !s->opt->eval)
        check_all(err("%s exists: --resume continues it, --run DIR starts another run, or remove it", path));
    check_all(state_open_all(s, ck, !s->opt->eval));
    return 1;
}

static Err evaluate_only(Stage *s) {
    Metrics val, ema;
    TRY(evaluate_both(s, &val, &ema));
    print_evaluation(s, stdout, &val, &ema);
    return OK;
}

/* Pictures in a step as the settings have it */
static size_t pictures_per_step(const Stage *s) {
    size_t batch = 16, accumulate = 1;
    if (config_size(&batch, &s->settings, "data.params.", "batch_size", 1, SIZE_MAX / 2, 1) != OK ||
        config_size(&accumulate, &s->settings, "lightning.trainer.", "accumulate_grad_batches", 1, 65536, 1) != OK)
        return 0;
    return batch * accumulate;
}

/* A run goes on where it was, unless the user says otherwise: bits differ from one device to another. */
static const char *device_name(const Options *o) {
    return !o->cuda ? "cpu" : strcmp(o->precision, "bf16") ? "cuda f32" : "cuda bf16";
}

static Err settle_device(Stage *s, Options *o, int continuing) {
    const char *before = continuing ? config_get(&s->settings, "train.", "device") : NULL;
    if (before && !o->device) {
        o->cuda = strncmp(before, "cuda", 4) == 0;
        if (o->cuda && !o->precision) o->precision = strcmp(before, "cuda f32") ? "bf16" : "f32";
        if (o->cuda) TRY(cuda_find(NULL, NULL, NULL));
    }
    if (!o->precision) o->precision = "bf16";
    if (before && rank() == 0 && strcmp(before, device_name(o)))
        fprintf(stderr, "%s: trained on %s so far, from here on on %s: another run than without the change\n", s->name,
                before, device_name(o));
    return config_set(&s->settings, "train.device", "%s", device_name(o));
}

static void train(const Options *given) {
    Options own = *given, *o = &own;
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
    if (o->eval && !continuing)
        check_all(err("%s: no %s.state.safetensors there to evaluate; train it first", o->run, s.name));
    check_all(continuing ? copy_settings(&s.settings, &ck.meta) : read_recipe(&s));
    const size_t pictures = pictures_per_step(&s);
    check_all(apply_options(&s));
    check_all(settle_device(&s, o, continuing));
    check_all(read_settings(&s, continuing));
    check_all(build_stage(&s, continuing ? &ck : NULL));
    checkpoint_close(&ck);
    check_all(ranks_same(s.params->arena[0], s.params->total * sizeof(real), "weights to start from"));
    if (continuing && rank() == 0 && pictures != pictures_per_step(&s))
        fprintf(stderr,
                "%s: a step took %zu pictures, from here on it takes %zu: another run than without the change\n",
                s.name, pictures, pictures_per_step(&s));
    if (o->eval)
        check_all(rank() == 0 ? evaluate_only(&s) : OK);
    else {
        if (rank() == 0) remove_leftovers(&s), say_start(&s);
        check_all(run(&s));
        if (rank() == 0) say_end(&s);
    }
    free_stage(&s);
}

/* The first stage in the run, for transitions as the recipe has them: with their pictures, prepared their way. */
static Err remap(const Options *o) {
    Options transition = *o;
    Stage s = {.opt = &transition, .name = "scale1"};
    transition.vqgan = transition.all = 0;
    transition.scale = 1;
    Err e = read_recipe(&s);
    if (e == OK) e = read_settings(&s, 0);
    if (e == OK) e = dataset_open_lists(&s.train, o->data, o->list, o->val_list, SPLIT_TRAIN);
    if (e == OK) e = make_folder(o->run);
    if (e == OK) e = remap_first_stage(&s);
    free_stage(&s);
    return e;
}

static int any_interrupted(void) {
    int flag = interrupted();
    check_all(ranks_any(&flag));
    return flag;
}

/* A run that has a first stage is remapped as it stands, unless it is to be trained further. */
static void train_and_remap(const Options *o) {
    char path[1100];
    snprintf(path, sizeof path, "%s/vqgan.safetensors", o->run);
    int there = file_exists(path);
    check_all(ranks_any(&there));
    if (!o->remap || o->resume || !there) train(o);
    if (!o->remap || any_interrupted()) return;
    check_all(rank() == 0 ? remap(o) : OK);
}

static void make_schedule(const Options *o) {
    Stage s = {.opt = o, .name = "schedule"};
    check(read_recipe(&s));
    check(apply_options(&s));
    check(read_settings(&s, 0));
    check(metric_schedule(&s));
    free_stage(&s);
}

/* Every stage in turn, finished ones in no time, then ./sample, which lies beside this program. */
static void train_all(Options *o) {
    char sample[1100], out[1100];
    size_t T = 1;
    o->resume = 1;
    check_all(count_scales(o, NULL, &T));
    o->vqgan = 1;
    train_and_remap(o);
    o->vqgan = 0;
    if (o->init && is_file(o->init)) o->init = NULL; /* it is a first stage's */
    for (o->scale = 1; o->scale <= T && !any_interrupted(); o->scale++) train(o);
    if (any_interrupted()) return;
    ranks_end();
    if (rank() > 0) return;
    snprintf(sample, sizeof sample, "%.*ssample", program_folder(o), o->program);
    snprintf(out, sizeof out, "%s/samples.png", o->run);
    fflush(stdout);
    signal(SIGXFSZ, SIG_DFL), signal(SIGPIPE, SIG_DFL);
    execlp(sample, sample, o->run, "-o", out, o->device ? "--device" : (char *)NULL, o->device, (char *)NULL);
    die("%s: %s; when it is built: ./sample %s", sample, strerror(errno), o->run);
}

/* While this process waits for others: what to make of it if one was lost and the launcher is about to end the rest. */
static void say_waiting(double waited) {
    static double since;
    static int said;
    if (said || !interrupted() || rank() > 1) return;
    if (since == 0) since = seconds();
    if (waited < 0.5 || seconds() - since < 0.5) return;
    said = 1;
    fprintf(
        stderr,
        "\nprocess %zu: interrupted, and waiting for another process; if that was lost, this run ends here: the last "
        "checkpoint is intact and --resume continues from it\n",
        rank());
}

static const char intro[] =
    "usage: ./train [MODEL] (--vqgan | --scale N | --joint | --all) [options]\n\n"
    "Trains one part of an ImageBART model. Three steps make a model:\n"
    "  1. ./train emoji --vqgan --data data/emoji    a VQGAN learns to write a picture as a grid of tokens and back\n"
    "  2. ./train emoji --scale N --data data/emoji  for N = 1..T: noise has replaced a part of the tokens, more at\n"
    "                                                each scale; a transformer learns to undo one step of it\n"
    "  3. ./sample runs/emoji                        starts from pure noise and runs the steps back, T to 1\n"
    "--all does all three; killed, it goes on where it was. Everything is kept in the run's folder: weights,\n"
    "checkpoints, log.tsv, loss.svg and, as training goes on, pictures of held-out examples.\n";

static Options options = {.model = "emoji",
                          .steps = NOT_GIVEN,
                          .batch = NOT_GIVEN,
                          .accumulate = NOT_GIVEN,
                          .seed = NOT_GIVEN,
                          .save_every = 100,
                          .eval_every = 500,
                          .picture_every = 500,
                          .keep = 2,
                          .alpha = -1,
                          .label_dropout = -1};

static const Option table[] = {
    {OPT_HEADING, "Arguments", NULL, NULL, 0, 0, NULL},
    {OPT_ARGUMENT, "MODEL", NULL, &options.model, 0, 0,
     "its recipe, models/MODEL.txt: emoji (default), photos, ffhq ...; or a folder with\nconfig.txt"},

    {OPT_HEADING, "What to train (one of)", NULL, NULL, 0, 0, NULL},
    {OPT_FLAG, "--vqgan", NULL, &options.vqgan, 0, 0, "the first stage: pictures to tokens and back"},
    {OPT_SIZE, "--scale", "N", &options.scale, 1, MAX_SCALES, "the transition x_N -> x_(N-1)"},
    {OPT_FLAG, "--joint", NULL, &options.joint, 0, 0, "all transitions in one network, a random scale each step"},
    {OPT_FLAG, "--all", NULL, &options.all, 0, 0, "the first stage, then every scale, then draw samples with ./sample"},
    {OPT_STRING, "--schedule", "psim", &options.schedule, 0, 0,
     "nothing yet: measure, with the run's VQGAN, how far scales must be apart to look\n"
     "equally far apart, and write RUN/psim.txt and the recipe's line"},

    {OPT_HEADING, "On what", NULL, NULL, 0, 0, NULL},
    {OPT_STRING, "--data", "PATH", &options.data, 0, 0,
     "a folder of PNG, JPEG and WebP pictures (sub-folders are classes; train/ and val/\n"
     "are the split if they exist, else 1 in 20 is held out), LSUN's LMDB, or a list\n"
     "file (default data/MODEL)"},
    {OPT_STRING, "--list", "FILE", &options.list, 0, 0,
     "of the folder --data only what this file names, a picture a line, such as the\n"
     "official ffhqtrain.txt"},
    {OPT_STRING, "--val-list", "FILE", &options.val_list, 0, 0,
     "and hold out what this one names (ffhqvalidation.txt)"},

    {OPT_HEADING, "Beginning and going on", NULL, NULL, 0, 0, NULL},
    {OPT_STRING, "--run", "DIR", &options.run, 0, 0, "the run's folder (default runs/MODEL)"},
    {OPT_FLAG, "--resume", NULL, &options.resume, 0, 0, "continue the run, bit for bit as if it had not stopped"},
    {OPT_STRING, "--init", "PATH", &options.init, 0, 0,
     "start from the weights in this folder (models/emoji, another run) or file (an\n"
     "official vqgan .ckpt; with --all it is the first stage's), not from noise"},
    {OPT_STRING, "--config", "FILE", &options.config, 0, 0, "the recipe, instead of models/MODEL.txt"},

    {OPT_HEADING, "How (over what the recipe says)", NULL, NULL, 0, 0, NULL},
    {OPT_SIZE, "--steps", "N", &options.steps, 1, UINT32_MAX,
     "optimizer steps in all; warm-up and cosine decay fit themselves to it"},
    {OPT_SIZE, "--batch", "N", &options.batch, 1, 65536, "pictures per micro batch"},
    {OPT_SIZE, "--accumulate", "N", &options.accumulate, 1, 65536, "micro batches per step"},
    {OPT_REAL, "--lr", "X", &options.lr, 1e-12, 10, "peak learning rate"},
    {OPT_SIZE, "--seed", "N", &options.seed, 0, 9e15, "of everything random (default 23)"},
    {OPT_FLAG, "--bf16-states", NULL, &options.bf16_states, 0, 0,
     "the optimizer's moments in bf16, rounded at random: half their memory"},

    {OPT_HEADING, "How: the first stage (whose discriminator is the recipe's: README)", NULL, NULL, 0, 0, NULL},
    {OPT_STRING, "--perceptual", "FILE[,FILE]", &options.perceptual, 0, 0,
     "weights of LPIPS, a part of the loss: a VQGAN's .ckpt, or torchvision's\n"
     "vgg16-397923af.pth and LPIPS's vgg.pth (default: what models/lpips has, where the\n"
     "recipe wants it); none: without"},
    {OPT_STRING, "--convert-perceptual", "OUT", &options.convert_perceptual, 0, 0,
     "write what --perceptual names as one safetensors file, and end"},
    {OPT_FLAG, "--remap", NULL, &options.remap, 0, 0,
     "then let tokens number only the codes that the training pictures use; at once\n"
     "where the run has a first stage, unless --resume trains it further"},

    {OPT_HEADING, "How: transitions", NULL, NULL, 0, 0, NULL},
    {OPT_REAL, "--alpha", "X", &options.alpha, 0, 1,
     "loss = X soft (KL to the posterior) + (1-X) hard (cross entropy)"},
    {OPT_REAL, "--label-dropout", "P", &options.label_dropout, 0, 1,
     "with classes: leave the class out this often, so that ./sample can guide\n(--guidance); 0.1 is usual"},
    {OPT_FLAG, "--balance", NULL, &options.balance, 0, 0, "draw every class equally often, however few its pictures"},

    {OPT_HEADING, "Keeping", NULL, NULL, 0, 0, NULL},
    {OPT_SIZE, "--save-every", "N", &options.save_every, 1, UINT32_MAX, "steps between checkpoints (default 100)"},
    {OPT_SIZE, "--keep", "N", &options.keep, 1, KEEP_MAX,
     "checkpoints that are kept, the newest and those before it (default 2)"},
    {OPT_FLAG, "--no-wait", NULL, &options.no_wait, 0, 0,
     "stop when the disk is full, instead of trying until it is not"},
    {OPT_STRING, "--store", "TYPE", &options.store, 0, 0, "f32, f16 or bf16: how the weights for sampling are stored"},

    {OPT_HEADING, "Seeing", NULL, NULL, 0, 0, NULL},
    {OPT_SIZE, "--eval-every", "N", &options.eval_every, 1, UINT32_MAX,
     "steps between evaluations on the held-out pictures (default 500)"},
    {OPT_SIZE, "--picture-every", "N", &options.picture_every, 1, UINT32_MAX, "steps between pictures (default 500)"},
    {OPT_FLAG, "--eval", NULL, &options.eval, 0, 0, "only evaluate what the run has"},

    {OPT_HEADING, "On which machine", NULL, NULL, 0, 0, NULL},
    {OPT_SIZE, "--threads", "N", &options.threads, 0, 4096, "0 (default): all; the result does not depend on it"},
    {OPT_STRING, "--device", "cpu|cuda", &options.device, 0, 0,
     "where to train (default: where the run began, else a GPU if there is one)"},
    {OPT_STRING, "--precision", "TYPE", &options.precision, 0, 0,
     "with --device cuda: bf16 (default), weights and sums still in float, or f32"},
    {OPT_HEADING,
     "Several processes: mpirun -np 2 --bind-to none ./train ... (needs MPI; README, \"More than one machine\").\n"
     "Each takes --batch pictures, and the gradients are added up.",
     NULL, NULL, 0, 0, NULL},
    {OPT_END, NULL, NULL, NULL, 0, 0, NULL}};

static void check_options(const Options *o) {
    if (o->vqgan + o->joint + o->all + (o->scale > 0) + (o->schedule != NULL) != 1)
        usage_error("give one of --vqgan, --scale N, --joint, --all, --schedule psim; -h explains");
    if (o->schedule && strcmp(o->schedule, "psim")) usage_error("--schedule %s: expected psim", o->schedule);
    if (o->schedule && (o->eval || o->resume)) usage_error("--schedule goes with neither --eval nor --resume");
    if (o->val_list && !o->list) usage_error("--val-list goes with --list, which names the training pictures");
    if (o->remap && (!(o->vqgan || o->all) || o->eval))
        usage_error("--remap goes with --vqgan or --all, without --eval");
    if (o->perceptual && !(o->vqgan || o->all)) usage_error("--perceptual goes with --vqgan or --all");
    if (o->vqgan && (o->alpha >= 0 || o->label_dropout >= 0 || o->balance))
        usage_error("--alpha, --label-dropout and --balance are of transitions, --vqgan trains none");
    if (o->all && o->eval) usage_error("--eval evaluates one stage: --vqgan, --scale N or --joint");
    if (o->precision && strcmp(o->precision, "bf16") && strcmp(o->precision, "f32"))
        usage_error("--precision %s: expected bf16 or f32", o->precision);
}

/* Where nothing is said, run and data are called as the recipe is. */
static void default_folders(Options *o) {
    static char run_folder[1100], data[1100];
    const char *slash = strrchr(o->model, '/'), *short_name = slash && slash[1] ? slash + 1 : o->model;
    snprintf(run_folder, sizeof run_folder, "runs/%s", short_name);
    snprintf(data, sizeof data, "data/%s", short_name);
    if (!o->run) o->run = run_folder;
    if (!o->data) o->data = data;
}

/* By default all processes compute on a GPU of their own, or none does. */
static int choose_device(const Options *o) {
    const char *device = o->device ? o->device : getenv("IMAGEBART_DEVICE");
    if (ranks() == 1 || (device && strcmp(device, "cuda"))) return check_device(device);
    const Err e = cuda_built() || device ? cuda_choose(rank_local()) : FAILED;
    if (device) check_all(e);
    int without = e != OK;
    check_all(ranks_any(&without));
    return !without;
}

int main(int argc, char **argv) {
    Options *o = &options;
    signal(SIGXFSZ, SIG_IGN), signal(SIGPIPE, SIG_IGN); /* both are errors of the write, which are dealt with there */
    o->program = argv[0];
    options_parse(argc, argv, table, intro);
    if (o->convert_perceptual) {
        if (!o->perceptual) usage_error("--convert-perceptual goes with --perceptual, which names what to convert");
        check(convert_perceptual(o->perceptual, o->convert_perceptual));
        return 0;
    }
    check_options(o);
    default_folders(o);
    check(ranks_start(say_waiting));
    o->cuda = choose_device(o);
    threads_set(o->threads ? (int)o->threads : rank_threads());
    if (o->schedule && ranks() > 1)
        check_all(err("--schedule runs in one process"));
    else if (o->schedule)
        make_schedule(o);
    else if (o->all)
        train_all(o);
    else
        train_and_remap(o);
    ranks_end();
    return 0;
}
