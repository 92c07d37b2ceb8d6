/* bad_batches.c - what a run does after a step that is not to be taken: passes it over, or goes back and leaves its
 * pictures out.
 *
 * A step is bad if its loss or gradient norm is not finite, or out of all proportion to the last steps'. If only its
 * gradient is, the weights are fine: a network that learns few pictures by heart has such gradients now and then. The
 * step is passed over: it counts, and moves nothing. If its loss is, the weights may have been led astray before: the
 * run goes back to the newest state and leaves the step's micro batches out from then on. Where nothing was learnt that
 * could be returned to, before the first checkpoint, such a step is passed over too; and with --all, which nobody
 * watches, once the run went back ROLLBACKS times. Otherwise that ends the run. What is bad of a discriminator alone
 * costs it that update, and the first stage nothing.
 *
 * The numbers left out are part of the state, as are the losses and norms that a step is measured against, and all
 * decisions are functions of these and of the step's mean loss and norm. So a run that was killed takes the same
 * decisions as one that was not, and ends with the same bits; and so do several processes, which all have the same sums
 * (parallel.c).
 *
 * Read in this order: which micro batches; what is bad; passing over; going back. */
#include "training/stage.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROLLBACKS = 3 }; /* to the same checkpoint */

/* ------------------------------------------------------------------------------------------------------------
 * Which micro batches
 * ---------------------------------------------------------------------------------------------------------- */

/* The data of a run are an endless sequence of micro batches. Micro batch i of a step is number step * accumulate + i
 * of those that are not left out: a function of the step and the list, whatever happened on the way. */
uint64_t micro_number(const Stage *s, size_t i) {
    uint64_t micro = s->step * s->set.accumulate + i;
    for (size_t k = 0; k < s->history.n_skipped && s->history.skipped[k] <= micro; k++) micro++;
    return micro;
}

/* Keeps the list ascending. */
static Err skip(Stage *s, size_t micro) {
    size_t k = s->history.n_skipped;
    while (k && s->history.skipped[k - 1] > micro) k--;
    if (k && s->history.skipped[k - 1] == micro) return OK;
    if (s->history.n_skipped == SKIPPED_MAX)
        return err("%s: %d micro batches were left out already; data or settings need a look", s->name, SKIPPED_MAX);
    memmove(s->history.skipped + k + 1, s->history.skipped + k,
            (s->history.n_skipped - k) * sizeof *s->history.skipped);
    s->history.skipped[k] = micro;
    s->history.n_skipped++;
    return OK;
}

/* Writes the list into the recipe, which is saved with the state. */
static Err skipped_to_recipe(Stage *s) {
    enum { DIGITS = 21 };
    char *text;
    size_t n = 0;
    TRY(mem_alloc(&text, s->history.n_skipped + 1, DIGITS, "skipped micro batches"));
    for (size_t k = 0; k < s->history.n_skipped; k++)
        n += (size_t)sprintf(text + n, "%s%zu", k ? "," : "", s->history.skipped[k]);
    Err e = config_set(&s->recipe, "train.skipped", "%s", text);
    free(text);
    return e;
}

/* "14-15,20"; cut where there is no more room */
static const char *numbers_text(char *out, size_t bytes, const size_t *list, size_t n) {
    size_t at = 0;
    *out = 0;
    for (size_t i = 0, last; i < n && at < bytes; i = last + 1) {
        for (last = i; last + 1 < n && list[last + 1] == list[last] + 1;) last++;
        at += (size_t)snprintf(out + at, bytes - at, at ? ",%zu" : "%zu", list[i]);
        if (last > i && at < bytes) at += (size_t)snprintf(out + at, bytes - at, "-%zu", list[last]);
    }
    return out;
}

static int is_skipped(const Stage *s, uint64_t micro) {
    for (size_t k = 0; k < s->history.n_skipped; k++)
        if (s->history.skipped[k] == micro) return 1;
    return 0;
}

static const char skipped_header[] = "stage\tstep\tmicro_batches\tloss\tgrad_norm\treason\n";
#define PASSED_OVER ", passed over" /* ends a reason */

static const char gradient_spike[] = "gradient spike";

/* Does the state know of this line: are its micro batches left out, or was its step passed over before? */
static int is_known(const Stage *s, const char *line, uint64_t step, uint64_t first) {
    return is_skipped(s, first) || (step <= s->step && strstr(line, PASSED_OVER));
}

/* Of this stage, the lines that the state knows of stay. */
Err list_skipped(Stage *s, void *line) {
    char path[PATH_BYTES], old[512], stage[16];
    unsigned long long step, first;
    AtomicFile out;
    snprintf(path, sizeof path, "%s/skipped_batches.tsv", s->set.run);
    if (!line && !file_exists(path)) return OK;
    TRY(atomic_open(&out, path));
    Err e = atomic_write(&out, skipped_header, strlen(skipped_header));
    FILE *in = NULL;
    if (e == OK) e = open_lines(&in, path);
    while (in && e == OK && fgets(old, sizeof old, in)) {
        if (sscanf(old, "%15s\t%llu\t%llu", stage, &step, &first) != 3 || (line && !strcmp(old, line))) continue;
        if (strcmp(stage, s->name) && strchr(old, '\n')) e = atomic_write(&out, old, strlen(old));
        if (!strcmp(stage, s->name) && is_known(s, old, step, first)) e = atomic_write(&out, old, strlen(old));
    }
    e = close_lines(in, path, e);
    if (line && e == OK) e = atomic_write(&out, line, strlen(line));
    return atomic_close(&out, e);
}

/* ------------------------------------------------------------------------------------------------------------
 * What is bad
 * ---------------------------------------------------------------------------------------------------------- */

static int named_in(const char *variable, const Stage *s, uint64_t micro) {
    const char *text = getenv(variable);
    size_t n = strlen(s->name);
    if (!text || strncmp(text, s->name, n) != 0 || text[n] != ':') return 0;
    for (text += n; *text == ':' || *text == ',';) {
        char *end;
        if (strtoull(text + 1, &end, 10) == micro && end > text + 1) return 1;
        text = end;
    }
    return 0;
}

double test_loss(const Stage *s, uint64_t micro, double loss) {
    if (named_in("IMAGEBART_TEST_NAN", s, micro)) return NAN;
    return named_in("IMAGEBART_TEST_SPIKE", s, micro) ? 100 * loss : loss;
}

double test_norm(const Stage *s, double norm) {
    for (size_t i = 0; i < s->set.accumulate; i++)
        if (named_in("IMAGEBART_TEST_GRADIENT", s, micro_number(s, i))) return 1e5 * norm;
    return norm;
}

double test_discriminator_loss(const Stage *s, double loss) {
    return named_in("IMAGEBART_TEST_SPIKE_DISCRIMINATOR", s, s->first.loader_at - 1) ? 100 : loss;
}

double test_discriminator_norm(const Stage *s, double norm) {
    if (named_in("IMAGEBART_TEST_GRADIENT_DISCRIMINATOR", s, s->first.loader_at - 1)) return 1e5 * norm;
    return named_in("IMAGEBART_TEST_NAN_DISCRIMINATOR", s, s->first.loader_at - 1) ? (double)NAN : norm;
}

/* A norm moves more than a loss: with 10 deviations, twice the usual loss can be a spike, eleven times the usual
 * norm. A network that knows few pictures by heart has losses of thousandths of a nat, among which a step of 0.03 is no
 * harm: with 10 deviations, a spike is at least a tenth above the usual loss. */
const char *why_bad(const Stage *s, double loss, double norm) {
    if (!isfinite(loss) || !isfinite(norm)) return "not finite";
    if (is_spike(s->history.recent, s->set.spike, 0.1, 0.01, loss)) return "loss spike";
    return is_spike(s->history.recent + RECENT, s->set.spike, 1, 0, norm) ? gradient_spike : NULL;
}

static void remember(const Stage *s, real recent[2 * RECENT], double loss, double norm) {
    recent[s->step % RECENT] = (real)loss;
    recent[RECENT + s->step % RECENT] = (real)norm;
}

void remember_step(Stage *s, double loss, double norm) {
    s->not_finite = 0;
    remember(s, s->history.recent, loss, norm);
}

static double largest(const real *recent) {
    double most = 0;
    for (size_t i = 0; i < RECENT; i++)
        if ((double)recent[i] > most) most = (double)recent[i];
    return most;
}

/* One that is right about nearly all pictures has losses and gradients near 0, out of which those it is wrong about
 * stand: what it learns from. So a spike of it is far above the largest of the last ones, too, and remembered as no more
 * than that: if all are so large from here on, that is usual soon. */
const char *why_bad_discriminator(const Stage *s, real recent[2 * RECENT], double loss, double norm) {
    enum { FAR = 3 };
    real *norms = recent + RECENT;
    const double far_loss = FAR * fmax(largest(recent), 1), far_norm = FAR * largest(norms);
    if (!isfinite(loss) || !isfinite(norm)) return "discriminator not finite";
    const int steep = far_norm > 0 && norm > far_norm && is_spike(norms, s->set.spike, 1, 0, norm);
    const int wrong = loss > far_loss && is_spike(recent, s->set.spike, 0.1, 0, loss);
    remember(s, recent, wrong ? far_loss : loss, steep ? far_norm : norm);
    return wrong ? "discriminator: loss spike" : steep ? "discriminator: gradient spike" : NULL;
}

/* ------------------------------------------------------------------------------------------------------------
 * Passing over
 * ---------------------------------------------------------------------------------------------------------- */

/* How often the run went back to its newest state: what it leaves out behind that, in steps. Not from a counter, so
 * that a new process knows it too. */
static size_t times_back(const Stage *s) {
    const History *h = &s->history;
    size_t n = 0;
    for (size_t k = 0; k < h->n_skipped; k++) n += h->skipped[k] - k >= s->saved * s->set.accumulate;
    return n / s->set.accumulate;
}

int can_pass_over(const Stage *s, const Step *step) {
    return step->bad == gradient_spike || s->saved == 0 || (s->set.all && times_back(s) >= ROLLBACKS);
}

/* A step's line for RUN/skipped_batches.tsv; micros: "14-15" */
static void describe(const Stage *s, const Step *step, const char *micros, const char *how, char line[400]) {
    snprintf(line, 400, "%s\t%llu\t%s\t%.6g\t%.6g\t%s%s\n", s->name, (unsigned long long)s->step + 1, micros,
             step->mean.loss, step->norm, step->bad, how);
}

/* The present step's line for skipped_batches.tsv, and, the first times, a word; how: what is passed over */
static Err note_passed_over(Stage *s, const Step *step, const char *how) {
    char micros[256], line[400];
    size_t list[64];
    const size_t n = min_size(s->set.accumulate, 64);
    for (size_t i = 0; i < n; i++) list[i] = micro_number(s, i);
    numbers_text(micros, sizeof micros, list, n);
    describe(s, step, micros, PASSED_OVER, line);
    s->step++;
    TRY(ranks_agree(rank() ? OK : retry_when_full(s, list_skipped, line, 0)));
    if (rank() > 0 || s->said_passed_over++ >= 3) return OK;
    progress_end();
    say_text("%s step %llu: %s: loss %g, gradient norm %g; %s is passed over%s\n", s->name, (unsigned long long)s->step,
             step->bad, step->mean.loss, step->norm, how,
             s->said_passed_over == 3 ? ", as others will be without a word: skipped_batches.tsv lists them" : "");
    return OK;
}

/* The step counts from here on. What is remembered is what steps are measured against: if all are so large from here on,
 * that is usual soon. */
Err pass_over(Stage *s, Step *step) {
    const int finite = isfinite(step->mean.loss) && isfinite(step->norm);
    if (!finite && ++s->not_finite > RECENT)
        return err(
            "%s step %llu: loss %g, gradient norm %g: the last %d steps were none to be taken; a smaller --lr than %g "
            "may help",
            s->name, (unsigned long long)s->step + 1, step->mean.loss, step->norm, s->not_finite,
            s->lr_scale * rate_peak(&s->rate));
    if (finite) remember_step(s, step->mean.loss, step->norm);
    TRY(note_passed_over(s, step, "the step"));
    step->bad = NULL;
    return OK;
}

/* The step, which counts, has been made; so it becomes the present one once more while it is described. */
Err pass_over_discriminator(Stage *s, const char *why, double loss, double norm) {
    const Step step = {.mean = {.loss = loss}, .norm = norm, .bad = why};
    s->step--;
    return note_passed_over(s, &step, "its update");
}

/* ------------------------------------------------------------------------------------------------------------
 * Going back
 * ---------------------------------------------------------------------------------------------------------- */

/* Is this key a count of progress, which belongs to a state, rather than a setting? */
static int is_count(const char *key) {
    static const char *const counts[] = {"train.step", "train.ema_updates", "train.skipped", "train.best_step",
                                         "train.best_validation_loss"};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        if (!strcmp(key, counts[i])) return 1;
    return 0;
}

/* This process's settings, with the counts of a state, which may be of one that had others. */
static Err restore_counts(Config *settings, const Config *state) {
    Config c = {0};
    Err e = copy_settings(&c, state);
    for (size_t i = 0; i < settings->n && e == OK; i++)
        if (!is_count(settings->kv[i].key)) e = config_copy(&c, settings->kv[i].key, &settings->kv[i]);
    config_free(e == OK ? settings : &c);
    if (e == OK) *settings = c;
    return e;
}

/* As a new process would find it */
static Err reload(Stage *s) {
    Checkpoint ck;
    memset(&ck, 0, sizeof ck);
    TRY(state_open(s, &ck, 1));
    Err e = restore_counts(&s->recipe, &ck.meta);
    if (e == OK) e = load_state(s, &ck);
    checkpoint_close(&ck);
    if (e == OK) e = params_send(s->params);
    return ranks_agree(e);
}

/* The numbers of all micro batches to leave out: those that are, and the present step's. *n of them. */
static Err left_out(const Stage *s, size_t out[SKIPPED_MAX], size_t *n) {
    const History *h = &s->history;
    if (h->n_skipped + s->set.accumulate > SKIPPED_MAX) return FAILED;
    memcpy(out, h->skipped, h->n_skipped * sizeof *out);
    for (size_t i = 0; i < s->set.accumulate; i++) out[h->n_skipped + i] = micro_number(s, i);
    *n = h->n_skipped + s->set.accumulate;
    return OK;
}

Err roll_back(Stage *s, const Step *step) {
    size_t out[SKIPPED_MAX], n = 0;
    const unsigned long long number = s->step + 1;
    const double loss = step->mean.loss, norm = step->norm;
    char micros[256], which[280], line[400];
    if (left_out(s, out, &n) != OK)
        return err("%s step %llu: %s: loss %g, gradient norm %g, and %zu micro batches were left out already", s->name,
                   number, step->bad, loss, norm, s->history.n_skipped);
    numbers_text(micros, sizeof micros, out + s->history.n_skipped, s->set.accumulate);
    snprintf(which, sizeof which, s->set.accumulate == 1 ? " %s is" : "es %s are", micros);
    describe(s, step, micros, "", line);
    if (s->rollbacks++ == ROLLBACKS)
        return err("%s step %llu: %s: loss %g, gradient norm %g, after going back to step %llu %d times; a smaller "
                   "--lr than %g may help, or --spike 0, after which no step is one (now %g)",
                   s->name, number, step->bad, loss, norm, (unsigned long long)s->saved, ROLLBACKS,
                   s->lr_scale * rate_peak(&s->rate), s->set.spike);
    TRY(reload(s)); /* the state may be older than the last time that we went back, and know fewer */
    for (size_t i = 0; i < n; i++) TRY(skip(s, out[i]));
    TRY(skipped_to_recipe(s));
    TRY(ranks_agree(rank() ? OK : retry_when_full(s, list_skipped, line, 0)));
    TRY(save_state(s, 0)); /* in the place of the one without the list */
    if (rank() > 0) return OK;
    progress_end();
    say_text("%s step %llu: %s: loss %g, gradient norm %g; back to step %llu, micro batch%s left out from now on\n",
             s->name, number, step->bad, loss, norm, (unsigned long long)s->step, which);
    return OK;
}
