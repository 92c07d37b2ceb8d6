/* ahead.c - --all before its first step: how much work its stages are, and how much of the disk they will take.
 *
 * Work is counted in multiply-adds of a step's forward pass: every number of a matrix takes one at each position of every
 * picture where it is applied. With it the time of the stages to come follows from that of the present one. It is about
 * right: what a multiply-add costs differs between convolutions and transformers, and attention, discriminator and LPIPS
 * are not counted.
 *
 * Read in this order: work; disk. */
#include "training/stage.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

/* ---- work ---- */

/* How often a first stage's layer halves the sides of a picture, before it is applied: encoder.down.L and decoder.up.L
 * work at level L, but for their ends, the layers between at the deepest. */
static size_t level_of(const char *name, size_t levels) {
    static const char down[] = "encoder.down.", up[] = "decoder.up.";
    if (!strncmp(name, "encoder.conv_in", 15) || !strncmp(name, "decoder.conv_out", 16)) return 0;
    if (!strncmp(name, down, sizeof down - 1))
        return min_size(strtoul(name + sizeof down - 1, NULL, 10) + (strstr(name, "downsample") != NULL), levels - 1);
    if (!strncmp(name, up, sizeof up - 1))
        return strtoul(name + sizeof up - 1, NULL, 10) - (strstr(name, "upsample") != NULL);
    return levels - 1;
}

static double first_work(const Stage *s) {
    const size_t levels = vqgan_config(s->vqgan)->levels;
    double sum = (double)s->N * (double)vqgan_config(s->vqgan)->n_embed * (double)vqgan_config(s->vqgan)->embed_dim;
    for (size_t i = 0; i < s->params->n; i++) {
        const Param *row = &s->params->row[i];
        const double side = (double)(s->size >> level_of(row->name, levels));
        if (row->ndim == 4) sum += (double)row->size * side * side;
    }
    return sum;
}

/* Encoder and decoder both have about N positions. A row of an embedding is copied, not multiplied. On a CPU, a
 * transformer's multiply-add takes about twice the time of a convolution's. */
static double second_work(const Stage *s) {
    enum { COST = 2 };
    double sum = (double)s->K * (double)transformer_config(s->second.net)->dim;
    for (size_t i = 0; i < s->params->n; i++)
        if (s->params->row[i].ndim == 2 && !strstr(s->params->row[i].name, "emb"))
            sum += (double)s->params->row[i].size;
    return COST * sum * (double)s->N;
}

double step_work(const Stage *s) {
    const double pictures = (double)(s->global_batch * s->set.accumulate);
    return pictures * (s->vqgan && s->set.vqgan ? first_work(s) : second_work(s));
}

/* ---- disk ---- */

enum { LOG_BYTES = 256 }; /* of a step, in log.tsv and events/ */

void ahead_add(Ahead *a, const Stage *s) {
    char path[PATH_BYTES];
    size_t there, state = 0, tokens = 0;
    const size_t index = s->set.vqgan ? 0 : s->set.scale, done = trained_steps(s);
    const size_t left = s->set.steps - min_size(done, s->set.steps);
    if (!s->params || !left) return;
    a->work[index] = (double)left * step_work(s);
    const size_t planned = planned_bytes(s, s->set.vqgan ? gan_state_bytes(s) : 0, &state, &there) + left * LOG_BYTES;
    a->bytes += planned - min_size(there, planned);
    a->moment = max_size(a->moment, state);
    snprintf(path, sizeof path, "%s/train.tokens", s->set.run);
    if (s->set.vqgan || a->tokens || file_exists(path) || token_bytes(s, &tokens) != OK) return;
    a->tokens = tokens;
}

double work_behind(const Ahead *a, size_t index) {
    double sum = 0;
    while (++index <= MAX_SCALES) sum += a->work[index];
    return sum;
}

/* Of the disk where the run is or will be. 0: not known. */
static int room(const char *run, size_t *bytes) {
    char path[PATH_BYTES];
    struct statvfs disk;
    snprintf(path, sizeof path, "%s", run);
    while (statvfs(path, &disk) != 0) {
        char *slash = strrchr(path, '/');
        if (!strcmp(path, ".") || !strcmp(path, "/")) return 0;
        if (!slash)
            strcpy(path, ".");
        else
            slash[slash == path] = 0;
    }
    *bytes = (size_t)disk.f_bavail * disk.f_frsize;
    return 1;
}

/* A file of tokens is twice there for a moment; so is a state. */
Err ahead_disk(const Ahead *a, const Settings *o) {
    const size_t needed = a->bytes + a->tokens + max_size(a->moment, a->tokens);
    size_t there;
    char all[32], left[32], missing[32];
    if (!a->bytes || !room(o->run, &there)) return OK;
    bytes_text(all, needed), bytes_text(left, there), bytes_text(missing, needed - min_size(there, needed));
    if (needed <= there) {
        say_once("disk: all stages will take about %s more in %s, %s free\n", all, o->run, left);
        return OK;
    }
    if (o->no_wait)
        return err(
            "%s: all stages will take about %s more, %s free: %s are missing (without --no-wait training waits for "
            "room when the disk is full)",
            o->run, all, left, missing);
    say_once("disk: all stages will take about %s more in %s, %s free: %s are missing; when the disk is full, training "
             "waits until there is room\n",
             all, o->run, left, missing);
    return OK;
}
