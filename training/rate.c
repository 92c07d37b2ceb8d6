/* rate.c - the learning rate of a step, as the official configuration says it (SPEC section 7):
 *
 *     rate = base_learning_rate * pictures of a step * factor(n), n = 0, 1, ... the steps made so far
 *
 * The factor is what scheduler_config.target names; without scheduler_config it is 1. LambdaWarmUpCosineScheduler rises
 * from lr_start to lr_max and falls by a cosine to lr_min. The other two have cycles, each with its own length:
 *     n < warm_up_steps   (f_max - f_start) n / warm_up_steps + f_start
 *     Scheduler2          f_min + (f_max - f_min) (1 + cos(pi (n - warm_up_steps) / (length - warm_up_steps))) / 2
 *     LinearScheduler     f_min + (f_max - f_min) (length - n) / length
 * n is counted from the cycle's start. A cycle's last step, n = length, is still its own.
 *
 * Ours: without a base_learning_rate the factor is the rate, and its keys need not be said. */
#include "training/training.h"

#include <math.h>
#include <string.h>

#define SCHEDULER "model.params.scheduler_config."
#define PARAMS SCHEDULER "params."
static const double MOST_STEPS = 1e15;

static const char *const cosine_keys[] = {"lr_start", "lr_max", "lr_min", "max_decay_steps", NULL};
static const char *const cycle_keys[] = {"f_start", "f_max", "f_min", "cycle_lengths", NULL};

static int has_schedule(const Config *c) {
    const size_t n = strlen(SCHEDULER);
    for (size_t i = 0; i < c->n; i++)
        if (!strncmp(c->kv[i].key, SCHEDULER, n)) return 1;
    return 0;
}

static int has_base(const Config *c) {
    const char *base = config_get(c, "model.", "base_learning_rate");
    return base && strcmp(base, "none") != 0;
}

/* The class that a target names, in whichever module of that name */
static int is_class(const char *target, const char *name) {
    const char *dot = strrchr(target, '.'), *module = "lr_scheduler";
    const size_t n = strlen(module);
    return dot && !strcmp(dot + 1, name) && dot >= target + n && !strncmp(dot - n, module, n);
}

Err rate_kind(RateKind *kind, const Config *c) {
    const char *target = config_get(c, SCHEDULER, "target");
    *kind = has_base(c) && !has_schedule(c) ? RATE_CONSTANT : RATE_COSINE;
    if (!target || is_class(target, "LambdaWarmUpCosineScheduler")) return OK;
    *kind = is_class(target, "LambdaLinearScheduler") ? RATE_LINEAR_CYCLES : RATE_COSINE_CYCLES;
    if (*kind == RATE_LINEAR_CYCLES || is_class(target, "LambdaWarmUpCosineScheduler2")) return OK;
    return config_err(c, SCHEDULER, "target",
                      SCHEDULER "target is %s, expected imagebart.lr_scheduler.LambdaWarmUpCosineScheduler, "
                                "...LambdaWarmUpCosineScheduler2 or ...LambdaLinearScheduler",
                      target);
}

/* Keys of the other kind say that the target is another one than meant. */
static Err refuse_keys(const Config *c, const char *const *keys, const char *kind) {
    for (; *keys; keys++)
        if (config_get(c, PARAMS, *keys))
            return config_err(c, PARAMS, *keys, PARAMS "%s: is not a key of %s", *keys, kind);
    return OK;
}

/* A factor that is not said beside a base_learning_rate is 1, or as the largest; the official class wants all of them. */
static Err read_cosine(Rate *r, const Config *c, size_t steps) {
    const int optional = !has_base(c) || !config_get(c, SCHEDULER, "target");
    LrSchedule *s = &r->cosine;
    TRY(refuse_keys(c, cycle_keys, "LambdaWarmUpCosineScheduler, which scheduler_config.target says or leaves out"));
    *s = (LrSchedule){2.5e-6, has_base(c) ? 1 : 1e-4, 1e-8, 0, (double)steps};
    TRY(config_real(&s->lr_max, c, PARAMS, "lr_max", 0, 10, optional));
    if (has_base(c)) s->lr_start = s->lr_min = s->lr_max;
    TRY(config_real(&s->lr_start, c, PARAMS, "lr_start", 0, 10, optional));
    TRY(config_real(&s->lr_min, c, PARAMS, "lr_min", 0, 10, optional));
    TRY(config_real(&s->warm_up_steps, c, PARAMS, "warm_up_steps", 0, MOST_STEPS, 1));
    return config_real(&s->max_decay_steps, c, PARAMS, "max_decay_steps", 1, MOST_STEPS, 1);
}

static Err read_cycles(Rate *r, const Config *c, size_t steps) {
    const struct {
        const char *key;
        double *to, least, most;
    } lists[] = {{"cycle_lengths", r->length, 1, MOST_STEPS},
                 {"warm_up_steps", r->warm_up_steps, 0, MOST_STEPS},
                 {"f_start", r->f_start, 0, 1e6},
                 {"f_max", r->f_max, 0, 1e6},
                 {"f_min", r->f_min, 0, 1e6}};
    double last = 0;
    TRY(refuse_keys(c, cosine_keys, "a schedule of cycles"));
    for (size_t i = 0, n; i < sizeof lists / sizeof *lists; i++) {
        TRY(config_reals(lists[i].to, &n, CYCLES_MAX, c, PARAMS, lists[i].key, lists[i].least, lists[i].most));
        if (i == 0) r->n_cycles = n;
        if (n != r->n_cycles || n == 0)
            return config_err(c, PARAMS, lists[i].key,
                              PARAMS "%s has %zu numbers, cycle_lengths %zu; expected as many, one a cycle",
                              lists[i].key, n, r->n_cycles);
    }
    for (size_t i = 0; i < r->n_cycles; i++) last += r->length[i];
    if (steps && (double)(steps - 1) > last)
        return config_err(c, PARAMS, "cycle_lengths",
                          PARAMS "cycle_lengths end at step %.0f, train.steps is %zu, expected at most %.0f", last,
                          steps, last + 1);
    return OK;
}

Err rate_read(Rate *r, const Config *recipe, size_t steps) {
    *r = (Rate){.kind = RATE_CONSTANT};
    TRY(rate_kind(&r->kind, recipe));
    if (r->kind == RATE_CONSTANT) return OK;
    const Err e = r->kind == RATE_COSINE ? read_cosine(r, recipe, steps) : read_cycles(r, recipe, steps);
    return e == OK ? OK : config_in_file(recipe);
}

double rate_at(const Rate *r, uint64_t step) {
    if (r->kind == RATE_CONSTANT) return 1;
    if (r->kind == RATE_COSINE) return lr_at(&r->cosine, step);
    size_t i = 0;
    double n = (double)step;
    for (; i + 1 < r->n_cycles && n > r->length[i]; i++) n -= r->length[i];
    const LrSchedule cycle = {r->f_start[i], r->f_max[i], r->f_min[i], r->warm_up_steps[i], r->length[i]};
    if (r->kind == RATE_COSINE_CYCLES || n < r->warm_up_steps[i]) return lr_at(&cycle, (uint64_t)n);
    return r->f_min[i] + (r->f_max[i] - r->f_min[i]) * (r->length[i] - n) / r->length[i];
}

double rate_peak(const Rate *r) {
    double peak = r->n_cycles ? r->f_max[0] : 1;
    for (size_t i = 1; i < r->n_cycles; i++) peak = r->f_max[i] > peak ? r->f_max[i] : peak;
    return r->kind == RATE_COSINE ? r->cosine.lr_max : peak;
}
