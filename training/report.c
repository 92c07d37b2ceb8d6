/* report.c - what a run tells the user: at its start, after a step, at its end. */
#include "training/stage.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int due(uint64_t step, size_t every, size_t last) {
    return every && (step % every == 0 || step == last);
}

static Err begin(Stage *s, Report *r) {
    TRY(log_open(s, &r->log));
    return retry_when_full(s, view_open, &r->view, 0);
}

Err report_begin(Stage *s, Report *r) {
    return ranks_agree(rank() == 0 ? begin(s, r) : OK);
}

/* A transition's is drawn with the weights that it will be sampled with. */
static Err draw_picture(Stage *s, void *view) {
    char suffix[40], path[PATH_BYTES];
    snprintf(suffix, sizeof suffix, "-%06llu.png", (unsigned long long)s->step);
    run_path(s, path, suffix);
    if (s->kind->ema) params_swap_ema(s->params);
    Err e = s->kind->picture(s, path);
    if (s->kind->ema) params_swap_ema(s->params);
    return e == OK ? view_picture(s, view, path) : e;
}

enum { RISEN = 3 };  /* evaluations after the best */
#define CLEARLY 1.02 /* times the best loss */

static int is_clearly_worse(const Stage *s, double loss) {
    return s->history.best_step > 0 && loss > CLEARLY * s->history.best;
}

/* Once, when validation has risen for long */
static void say_risen(Stage *s, double loss) {
    if (s->said_risen || s->set.early_stop || !is_clearly_worse(s, loss)) return;
    if (s->step < s->history.best_step + RISEN * s->set.eval_every) return;
    s->said_risen = 1;
    fprintf(
        stderr,
        "%s: the validation loss has risen since step %zu (%.4g, now %.4g): from there on it learns its pictures by "
        "heart; --early-stop %d ends a stage then, with the weights of its best step\n",
        s->name, s->history.best_step, s->history.best, loss, RISEN);
}

/* The first rank evaluates, writes the line of the log, shows it, keeps the best weights, draws. */
static Err show_and_log(Stage *s, Report *r, const Step *step) {
    Metrics val, ema;
    r->view.evaluated = s->val.n > 0 && due(s->step, s->set.eval_every, s->set.steps);
    show_step(s, &r->log, step);
    if (r->view.evaluated) {
        TRY(evaluate_both(s, &val, &ema));
        progress_end();
        s->kind->print_evaluation(s, stderr, &val, &ema);
        say_risen(s, ema.loss);
    }
    TRY(log_step(s, &r->log, step, r->view.evaluated ? &val : NULL, &ema));
    TRY(retry_when_full(s, view_step, &r->view, 0));
    if (r->view.evaluated) TRY(save_best(s, &ema));
    return due(s->step, s->set.picture_every, s->set.steps) ? retry_when_full(s, draw_picture, &r->view, 0) : OK;
}

Err report_step(Stage *s, Report *r, const Step *step) {
    if (s->kind->gather && due(s->step, s->set.eval_every, s->set.steps)) TRY(s->kind->gather(s, 1));
    return ranks_agree(rank() == 0 ? show_and_log(s, r, step) : OK);
}

Err report_end(Stage *s, Report *r) {
    return ranks_agree(rank() == 0 ? retry_when_full(s, view_close, &r->view, 0) : OK);
}

static void say_gpu(const Stage *s) {
    char text[CUDA_TEXT_BYTES], state[32], activations[32], available[32];
    check(cuda_find(text, NULL, NULL));
    say_text("device: %s; %s, %s (--device cpu: the processor)\n", text, s->name, precision_name(s->precision));
    say_text("GPU memory: parameters, gradients and optimizer %s, activations %s; %s was free\n",
             bytes_text(state, s->gpu_memory.state), bytes_text(activations, s->gpu_memory.activations),
             bytes_text(available, s->gpu_memory.available));
}

/* Is there nothing to train? */
int is_done(const Stage *s) {
    return s->step >= s->set.steps || ended_early(s);
}

/* What the stage is, and that there is nothing to do */
static void say_finished(const Stage *s) {
    char path[PATH_BYTES], what[64] = "the first stage";
    if (s->set.joint) snprintf(what, sizeof what, "all scales in one");
    if (s->second.t) snprintf(what, sizeof what, "x_%d -> x_%d", s->second.t, s->second.t - 1);
    say_text("%s: %s, finished after %llu steps%s: %s%s%s%s\n", s->name, what, (unsigned long long)s->step,
             s->step < s->set.steps ? " (--early-stop)" : "", run_path(s, path, ".safetensors"), *s->idle ? "; " : "",
             s->idle, *s->idle ? ": without effect" : "");
}

enum { FEW = 50 }; /* pictures */

void say_start(Stage *s) {
    char threads[96], precision[PRECISION_TEXT];
    if (s->has_state && is_done(s)) {
        say_finished(s);
        return;
    }
    if (!s->set.cuda)
        say_text("processor: %s, %s; products in %s\n", vector_instructions(), threads_text(threads),
                 precision_text(precision, s->precision));
    say_pictures(s, has_classes(s));
    if (ranks() > 1)
        say_text("%zu processes, each takes %zu of the %zu pictures of a micro batch, with %d threads\n", ranks(),
                 s->batch, s->global_batch, threads_get());
    if (s->set.cuda)
        say_gpu(s);
    else
        say_cpu();
    say_text("%s: %.2f million parameters, %zu picture%s (%zu held out), batch %zu x %zu, %zu steps, seed %llu\n",
             s->name, (double)params_count(s->params) / 1e6, s->train.n, s->train.n == 1 ? "" : "s", s->val.n,
             s->global_batch, s->set.accumulate, s->set.steps, (unsigned long long)s->set.seed);
    if (s->train.n < FEW)
        say_once("%s: fewer than %d pictures: they will be learnt by heart; what is drawn will resemble them\n",
                 s->set.data, FEW);
    char state[32], activations[32], tokens[64] = "", size[32], available[32];
    if (s->memory.tokens)
        snprintf(tokens, sizeof tokens, ", tokens of the pictures %s", bytes_text(size, s->memory.tokens));
    if (s->memory.pictures)
        snprintf(tokens, sizeof tokens, ", pictures read ahead at most %s", bytes_text(size, s->memory.pictures));
    say_text("memory: parameters, gradients and optimizer%s %s, activations %s%s; %s available\n",
             s->set.bf16_states ? " (in bf16)" : "", bytes_text(state, s->memory.state),
             bytes_text(activations, s->memory.activations), tokens,
             s->memory.available == SIZE_MAX ? "unknown how much is" : bytes_text(available, s->memory.available));
    if (s->second.train.crops > 1)
        say_text("crops: %zu random ones of each picture, another one each epoch; held-out pictures: the centre\n",
                 s->second.train.crops);
    if (s->all_read) say_damaged(s);
    say_disk(s);
    if (s->has_state)
        say_text("%s: continuing after step %llu\n", s->name, (unsigned long long)s->step);
    else
        say_text("%s: a new run of %zu step%s, kept in %s\n", s->name, s->set.steps, s->set.steps == 1 ? "" : "s",
                 s->set.run);
}

/* A word with what a terminal would obey, as $'\033' */
static void say_escaped(const char *word) {
    fprintf(stderr, " $'");
    for (; *word; word++) {
        const unsigned char c = (unsigned char)*word;
        if (c < 0x20 || c >= 0x7f)
            fprintf(stderr, "\\%03o", c);
        else
            fprintf(stderr, c == '\'' || c == '\\' ? "\\%c" : "%c", c);
    }
    fprintf(stderr, "'");
}

/* A word as a shell takes it */
static void say_word(const char *word) {
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./=+:,@%";
    if (*word && word[strspn(word, plain)] == 0) {
        fprintf(stderr, " %s", word);
        return;
    }
    char shown[PATH_BYTES];
    if (strcmp(printable(shown, word), word) != 0) {
        say_escaped(word);
        return;
    }
    fprintf(stderr, " '");
    for (; *word; word++) *word == '\'' ? fprintf(stderr, "'\\''") : fprintf(stderr, "%c", *word);
    fprintf(stderr, "'");
}

static void say_number(const char *option, size_t value) {
    if (value != NOT_GIVEN) say_text(" %s %zu", option, value);
}

static void say_option(const char *option, const char *value) {
    if (!value) return;
    say_text(" %s", option);
    say_word(value);
}

/* Has the run weights of this scale, trained to the end? Those of unknown history are. */
static int is_finished(const Settings *o, size_t scale) {
    char path[PATH_BYTES];
    Checkpoint ck;
    size_t step = 0, steps = 0;
    snprintf(path, sizeof path, "%s/scale%zu.safetensors", o->run, scale);
    if (!file_exists(path) || checkpoint_open(&ck, path) != OK) return 0;
    Err e = config_size(&step, &ck.meta, "train.", "step", 0, UINT32_MAX, 1);
    if (e == OK) e = config_size(&steps, &ck.meta, "train.", "steps", 0, UINT32_MAX, 1);
    int known = config_get(&ck.meta, "train.", "step") && !config_get(&ck.meta, "train.", "stopped_early");
    checkpoint_close(&ck);
    return e == OK && (!known || step >= steps);
}

static int is_begun(const Settings *o, size_t scale) {
    char path[PATH_BYTES];
    snprintf(path, sizeof path, "%s/scale%zu.state.safetensors", o->run, scale);
    return file_exists(path);
}

/* The folder of ./train, where ./sample is too; "" when the shell looks for both */
int program_folder(const Settings *o) {
    const char *slash = strrchr(o->program, '/');
    return slash ? (int)(slash - o->program) + 1 : 0;
}

int is_installed(const Settings *o) {
    return !strncmp(o->program, "imagebart ", strlen("imagebart "));
}

/* How this program was called, or how another one beside it is. */
static void say_program(const Settings *o, const char *other) {
    char word[PATH_BYTES];
    snprintf(word, sizeof word, "%.*s%s", program_folder(o), o->program,
             other ? other : o->program + program_folder(o));
    if (is_installed(o))
        say_text(" imagebart %s", other ? other : "train");
    else
        say_word(word);
}

/* The next command, as it can be typed: the first scale that is not trained, then ./sample. */
static void say_next(const Stage *s) {
    const Settings *o = &s->set;
    size_t T = 1, next = 1;
    char word[PATH_BYTES];
    if (count_scales(o, o->vqgan ? NULL : &s->recipe, &T) != OK) T = 1;
    while (!o->joint && next <= T && is_finished(o, next)) next++;
    say_text("next:");
    if (o->joint || next > T) {
        say_program(o, "sample");
        say_word(o->run);
    } else {
        snprintf(word, sizeof word, "%zu", next);
        say_program(o, NULL);
        say_word(o->model);
        say_option("--scale", word);
        if (is_begun(o, next)) say_text(" --resume");
        say_option("--config", o->config);
        say_option("--data", o->data);
        say_option("--list", o->list);
        say_option("--val-list", o->val_list);
        say_option("--run", o->run);
        say_number("--seed", s->given->seed); /* tokens depend on these two */
        say_number("--crops", s->given->crops);
        say_option("--device", o->device);
        if (s->precision != s->usual_precision) say_option("--precision", precision_name(s->precision));
    }
    say_text("\n");
}

void say_end(const Stage *s) {
    if (s->set.all && !s->trained && is_done(s)) return;
    if (!s->all_read) say_damaged(s);
    if (!is_done(s)) {
        say_text("stopped after step %llu, everything is saved; %s\n", (unsigned long long)s->step,
                 s->set.all ? "the same command continues" : "--resume continues");
        return;
    }
    char path[PATH_BYTES];
    say_result("%s\n", run_path(s, path, ".safetensors"));
    if (!s->set.all) say_next(s);
}

/* While this process waits for others: what to make of it if one was lost and the launcher is about to end the rest. */
void say_waiting(double waited) {
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
