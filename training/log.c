/* log.c - log.tsv, the progress line, what an evaluation says. */
#include "training/stage.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ------------------------------------------------------------------------------------------------------------
 * The log: one line per step; when a run resumes, lines that are about to be repeated are dropped
 * ---------------------------------------------------------------------------------------------------------- */

static const char log_header[] =
    "stage\tstep\tloss\thard_or_l1\tsoft_or_l2\tlr\tgrad_norm\timages_per_s\tval\tval_ema\tval_part1_ema\tval_part2_"
    "ema\t"
    "disc_loss\tg_loss\td_weight\tlpips\tval_lpips\tcodes\tperplexity\tval_codes\tval_perplexity\n";

static Err log_rewind(Stage *s, void *log_path) {
    const char *path = log_path;
    char line[512], stage[16];
    unsigned long long step;
    AtomicFile out;
    TRY(atomic_open(&out, path));
    Err e = atomic_write(&out, log_header, strlen(log_header));
    FILE *in = fopen(path, "r");
    while (in && e == OK && fgets(line, sizeof line, in)) {
        if (sscanf(line, "%15s\t%llu", stage, &step) != 2) continue; /* the header, or a line cut short by a kill */
        if (!strchr(line, '\n') || (!strcmp(stage, s->name) && step > s->step)) continue;
        e = atomic_write(&out, line, strlen(line));
    }
    if (in) fclose(in);
    return atomic_close(&out, e);
}

Err log_open(Stage *s, Progress *p) {
    snprintf(p->log_path, sizeof p->log_path, "%s/log.tsv", s->opt->run);
    TRY(until_room(s, log_rewind, p->log_path, 0));
    p->started = seconds();
    p->first_step = s->step;
    return until_room(s, list_skipped, NULL, 0);
}

static Err log_append(Stage *s, void *p) {
    (void)s;
    const Progress *progress = p;
    return file_append(progress->log_path, progress->line, strlen(progress->line));
}

Err log_step(Stage *s, Progress *p, const Metrics *m, double lr, double norm, const Metrics *val, const Metrics *ema) {
    int n = snprintf(p->line, sizeof p->line, "%s\t%llu\t%.6g\t%.6g\t%.6g\t%.6g\t%.6g\t%.1f\t", s->name,
                     (unsigned long long)s->step, m->loss, m->part[0], m->part[1], lr, norm, p->rate);
    if (val)
        n += snprintf(p->line + n, sizeof p->line - (size_t)n, "%.6g\t%.6g\t%.6g\t%.6g", val->loss, ema->loss,
                      ema->part[0], ema->part[1]);
    else
        n += snprintf(p->line + n, sizeof p->line - (size_t)n, "\t\t\t");
    n += gan_log(s, p->line + n, sizeof p->line - (size_t)n);
    n += log_codes(s, p->line + n, sizeof p->line - (size_t)n, m, val);
    snprintf(p->line + n, sizeof p->line - (size_t)n, "\n");
    return until_room(s, log_append, p, 0);
}

void show_step(const Stage *s, Progress *p, const Metrics *m, double lr, double norm) {
    char left[32], gan[96];
    double per_step = (seconds() - p->started) / (double)(s->step - p->first_step);
    p->rate = (double)(s->of * s->accumulate) / per_step;
    duration(left, per_step * (double)(s->steps - s->step));
    progress_line("%s step %llu/%zu | loss %.4f | %s %.4f | %s %.4f%s | lr %.2e | norm %.3f | %.1f images/s | %s left",
                  s->name, (unsigned long long)s->step, s->steps, m->loss, s->opt->vqgan ? "L1" : "hard", m->part[0],
                  s->opt->vqgan ? "L2" : "soft", m->part[1], gan_text(s, gan), lr, norm, p->rate, left);
}

/* Evaluates with the weights as they are and, for transitions, with their EMA. */
Err evaluate_both(Stage *s, Metrics *val, Metrics *ema) {
    TRY(s->evaluate(s, val));
    *ema = *val;
    if (s->opt->vqgan) return OK;
    params_swap_ema(s->params);
    Err e = s->evaluate(s, ema);
    params_swap_ema(s->params);
    return e;
}

void print_evaluation(const Stage *s, FILE *to, const Metrics *val, const Metrics *ema) {
    if (s->opt->vqgan) {
        /* Pixels span 2, so PSNR = 10 log10(4 / mean square error). */
        fprintf(to, "%s step %llu: validation loss %.4f, L1 %.4f, PSNR %.2f dB", s->name, (unsigned long long)s->step,
                val->loss, val->part[0], 10 * log10(4 / val->part[1]));
        if (s->perceptual) fprintf(to, ", LPIPS %.4f", val->perceptual);
        print_codes(s, to, &val->codes);
        fprintf(to, "\n");
        return;
    }
    fprintf(to, "%s step %llu: validation, nats per token: hard %.4f soft %.4f; with EMA: hard %.4f soft %.4f\n",
            s->name, (unsigned long long)s->step, val->part[0], val->part[1], ema->part[0], ema->part[1]);
}
