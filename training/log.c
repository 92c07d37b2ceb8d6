/* log.c - log.tsv, a line per step; the progress line; evaluations.
 *
 * log.tsv is one table for all stages of a run; a column that a stage has nothing for is empty. When a run resumes,
 * lines that are about to be repeated are dropped. */
#include "training/stage.h"

#include <stdio.h>
#include <string.h>

static const char log_header[] =
    "stage\tstep\tloss\thard_or_l1\tsoft_or_l2\tlr\tgrad_norm\timages_per_s\tval\tval_ema\tval_part1_ema\tval_part2_"
    "ema\t"
    "disc_loss\tg_loss\td_weight\tlpips\tval_lpips\tcodes\tperplexity\tval_codes\tval_perplexity\tval_psnr\n";

/* The columns from disc_loss on, of a kind of stage that has none of them */
static const char no_columns[] = "\t\t\t\t\t\t\t\t\t\t";

static Err log_rewind(Stage *s, void *log_path) {
    const char *path = log_path;
    char line[512], stage[16];
    unsigned long long step;
    AtomicFile out;
    TRY(atomic_open(&out, path));
    Err e = atomic_write(&out, log_header, strlen(log_header));
    FILE *in = NULL;
    if (e == OK) e = open_lines(&in, path);
    while (in && e == OK && fgets(line, sizeof line, in)) {
        if (sscanf(line, "%15s\t%llu", stage, &step) != 2) continue; /* the header, or a line cut short by a kill */
        if (!strchr(line, '\n') || (!strcmp(stage, s->name) && step > s->step)) continue;
        e = atomic_write(&out, line, strlen(line));
    }
    return atomic_close(&out, close_lines(in, path, e));
}

Err log_open(Stage *s, Log *log) {
    snprintf(log->path, sizeof log->path, "%s/log.tsv", s->set.run);
    TRY(retry_when_full(s, log_rewind, log->path, 0));
    log->started = seconds();
    log->work = s->set.later > 0 ? step_work(s) : 0;
    log->first_step = s->step;
    return retry_when_full(s, list_skipped, NULL, 0);
}

static Err log_append(Stage *s, void *log) {
    (void)s;
    const Log *l = log;
    return file_append(l->path, l->line, strlen(l->line));
}

Err log_step(Stage *s, Log *log, const Step *step, const Metrics *val, const Metrics *ema) {
    const Metrics *m = &step->mean;
    char *line = log->line;
    const size_t size = sizeof log->line;
    size_t n =
        (size_t)snprintf(line, size, "%s\t%llu\t%.6g\t%.6g\t%.6g\t%.6g\t%.6g\t%.1f\t", s->name,
                         (unsigned long long)s->step, m->loss, m->part[0], m->part[1], step->lr, step->norm, log->rate);
    if (val)
        n += (size_t)snprintf(line + n, size - n, "%.6g\t%.6g\t%.6g\t%.6g", val->loss, ema->loss, ema->part[0],
                              ema->part[1]);
    else
        n += (size_t)snprintf(line + n, size - n, "\t\t\t");
    n += (size_t)(s->kind->log ? s->kind->log(s, line + n, size - n, m, val)
                               : snprintf(line + n, size - n, "%s", no_columns));
    snprintf(line + n, size - n, "\n");
    return retry_when_full(s, log_append, log, 0);
}

void show_step(const Stage *s, Log *log, const Step *step) {
    char left[32], later[32], all[64] = "", own[96] = "";
    const Metrics *m = &step->mean;
    const double per_step = (seconds() - log->started) / (double)(s->step - log->first_step);
    log->rate = (double)(s->global_batch * s->set.accumulate) / per_step;
    const double steps = (double)(s->set.steps - s->step);
    duration(left, per_step * steps);
    if (log->work > 0)
        snprintf(all, sizeof all, ", all stages about %s",
                 duration(later, per_step * (steps + s->set.later / log->work)));
    if (s->kind->progress) s->kind->progress(s, own);
    progress_line(
        "%s step %llu/%zu | loss %.4f | %s %.4f | %s %.4f%s | lr %.2e | norm %.3f | %.1f images/s | %s left%s", s->name,
        (unsigned long long)s->step, s->set.steps, m->loss, s->kind->part_name[0], m->part[0], s->kind->part_name[1],
        m->part[1], own, step->lr, step->norm, log->rate, left, all);
}

Err evaluate_both(Stage *s, Metrics *val, Metrics *ema) {
    TRY(s->kind->evaluate(s, val));
    *ema = *val;
    if (!s->kind->ema) return OK;
    params_swap_ema(s->params);
    Err e = s->kind->evaluate(s, ema);
    params_swap_ema(s->params);
    return e;
}
