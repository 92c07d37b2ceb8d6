/* train.c - trains every part of a model: the VQGAN, one transition, or all transitions in one network.
 *
 * Reading order: the options at the end of the file say what a user can ask for; `Stage` (train.h) is what is being
 * trained. The two kinds of stage are train_vqgan.c (with its discriminator, LPIPS and codebook in train_gan.c,
 * train_perceptual.c and train_codes.c) and train_scale.c, each as three functions: one micro batch, an evaluation, a
 * picture. Here is the one loop that drives them; parallel.c adds up the gradients of several processes. train_run.c
 * keeps the run, train_survive.c is what it goes on after, train_view.c shows it; train_schedule.c is --schedule. No
 * mathematics here: it is in vqgan.c, transformer.cu and diffusion.c. */
#include "training/stage.h"
#include "training/stage.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

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
    options_parse(argc, argv, option_table, train_intro);
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
