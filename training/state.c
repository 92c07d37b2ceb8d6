/* train_run.c - the run's folder: the memory plan, checkpoints, the log.
 *
 * STAGE.state.safetensors holds everything that continuing needs (weights, EMA, optimizer, counters, settings; all
 * random numbers are functions of the step), STAGE.safetensors what sampling needs, STAGE.best.safetensors the same as
 * it was when the validation loss was least. They are replaced atomically, so a kill at any instant loses at most the
 * steps since the last checkpoint, and resuming repeats them bit for bit. Older states, and what happens when one
 * cannot be written or read: train_survive.c. */
#include "training/stage.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

void note(const char *fmt, ...) {
    va_list args;
    if (rank() > 0) return;
    va_start(args, fmt);
    vfprintf(stderr, fmt, args);
    va_end(args);
}

const char *run_path(const Stage *s, char out[1100], const char *suffix) {
    snprintf(out, 1100, "%s/%s%s", s->opt->run, s->name, suffix);
    return out;
}

int file_exists(const char *path) {
    struct stat st;
    return stat(path, &st) == 0;
}

/* RUN/skipped.txt names the pictures that could not be read, and why. */
static const char *skipped_path(const Stage *s, char out[1100]) {
    snprintf(out, 1100, "%s/skipped.txt", s->opt->run);
    return out;
}

Err list_damaged(const Stage *s, const Dataset *d) {
    char path[1100];
    return dataset_damaged(d) ? dataset_write_damaged(d, skipped_path(s, path)) : OK;
}

/* Where each of several processes met its own: as many as the list has */
static size_t listed_damaged(const Stage *s) {
    char path[1100];
    size_t lines = 0;
    FILE *f = fopen(skipped_path(s, path), "r");
    for (int c; f && (c = getc(f)) != EOF;) lines += c == '\n';
    if (f) fclose(f);
    return lines;
}

void say_damaged(const Stage *s) {
    char path[1100];
    size_t n = dataset_damaged(&s->train) + dataset_damaged(&s->val);
    if (ranks() > 1) n = listed_damaged(s);
    if (s->train_tokens.n) n = s->train.n - s->train_tokens.n + s->val.n - s->val_tokens.n;
    if (n) fprintf(stderr, "damaged pictures skipped: %zu; %s lists them\n", n, skipped_path(s, path));
}

Err make_folder(const char *path) {
    char part[1024];
    if ((size_t)snprintf(part, sizeof part, "%s", path) >= sizeof part) return err("%s: the path is too long", path);
    for (char *p = part + 1;; p++)
        if (!*p || *p == '/') {
            char keep = *p;
            *p = 0;
            if (mkdir(part, 0777) && errno != EEXIST) return err("%s: %s", part, strerror(errno));
            *p = keep;
            if (!keep) return OK;
        }
}

/* Before anything large is allocated: `arenas` arrays as large as all parameters, the network's plan (bytes), other
 * buffers (rows x columns). */
Err check_memory(Stage *s, size_t arenas, size_t plan, size_t rows, size_t columns) {
    TRY(size_mul(&s->state_bytes, s->params->total, arenas * sizeof(real)));
    if (s->bf16_states) s->state_bytes -= s->params->total * 2 * (sizeof(real) - sizeof(uint16_t));
    TRY(size_mul(&s->activation_bytes, rows, columns));
    TRY(size_mul(&s->activation_bytes, s->activation_bytes, sizeof(real)));
    s->activation_bytes += plan;
    s->available = memory_available();
    if (s->available != SIZE_MAX) s->available /= ranks_local();
    char what[160], state[32], activations[32];
    snprintf(what, sizeof what, "%s: parameters, gradients and optimizer %s, activations %s", s->name,
             bytes_text(state, s->state_bytes), bytes_text(activations, s->activation_bytes));
    return memory_fits(s->state_bytes + s->activation_bytes, s->available, what, "a smaller --batch takes less");
}

Precision gpu_precision(const Stage *s) {
    return strcmp(s->opt->precision, "bf16") ? PRECISION_F32 : PRECISION_BF16;
}

/* Values, gradients, moments (or in bf16) and moving average in float, and in bf16 the values again; the network's
 * plan. */
Err check_gpu_memory(Stage *s, size_t plan) {
    const int bf16 = gpu_precision(s) == PRECISION_BF16;
    char what[160], state[32], activations[32];
    const size_t moment = s->bf16_states ? sizeof(uint16_t) : sizeof(float);
    s->gpu_state = s->params->total * (3 * sizeof(float) + 2 * moment + (bf16 ? 2 : 0)), s->gpu_activations = plan;
    TRY(cuda_find(NULL, &s->gpu_available, NULL));
    snprintf(what, sizeof what, "%s on the GPU: parameters, gradients and optimizer %s, activations %s", s->name,
             bytes_text(state, s->gpu_state), bytes_text(activations, plan));
    return memory_fits(s->gpu_state + plan, s->gpu_available, what, "a smaller --batch takes less");
}

/* ------------------------------------------------------------------------------------------------------------
 * Checkpoints
 * ---------------------------------------------------------------------------------------------------------- */

static Err collect_state(Stage *s, TensorList *list) {
    TRY(tensor_list_params(list, s->params, 'v', "value.", DT_F32));
    TRY(tensor_list_params(list, s->params, '1', "adam.m.", DT_F32));
    TRY(tensor_list_params(list, s->params, '2', "adam.v.", DT_F32));
    if (!s->opt->vqgan) TRY(tensor_list_params(list, s->params, 'e', "ema.", DT_F32));
    TRY(gan_collect_state(s, list));
    if (s->usage) {
        size_t n = vqgan_config(s->vqgan)->n_embed;
        TRY(tensor_list_add(list, "usage", DT_I32, 1, &n, s->usage, 0));
    }
    return survive_collect(s, list);
}

/* What sampling reads: the EMA weights of a transition under their plain names (as the official "-ema_weights" files),
 * the schedule's buffers; the VQGAN as it is. */
static Err collect_weights(Stage *s, TensorList *list) {
    if (s->opt->vqgan) return tensor_list_params(list, s->params, 'v', "", s->store);
    return transition_tensors(list, s->net, 'e', &s->schedule, s->store, s->compact);
}

static const char CHECKSUM[] = "train.checksum";

Err copy_settings(Config *to, const Config *from) {
    for (size_t i = 0; i < from->n; i++)
        if (strcmp(from->kv[i].key, CHECKSUM)) TRY(config_set(to, from->kv[i].key, "%s", from->kv[i].value));
    return OK;
}

typedef Err Collect(Stage *s, TensorList *list);

static Err write_list(Stage *s, Collect *collect, const char *path) {
    TensorList list = {0};
    Config meta = {0};
    Err e = collect(s, &list);
    if (e == OK) e = copy_settings(&meta, &s->settings);
    if (e == OK && collect == collect_state) e = add_checksum(&meta, list.tensor, list.n);
    if (e == OK) e = checkpoint_write(path, list.tensor, list.from_real, list.n, &meta);
    tensor_list_free(&list);
    config_free(&meta);
    return e;
}

static size_t list_bytes(Stage *s, Collect *collect) {
    TensorList list = {0};
    size_t bytes = 65536; /* names and settings */
    if (collect(s, &list) == OK)
        for (size_t i = 0; i < list.n; i++) bytes += list.tensor[i].size * dtype_size(list.tensor[i].dtype);
    tensor_list_free(&list);
    return bytes;
}

static Err write_damaged(Stage *s, void *unused) {
    (void)unused;
    TRY(list_damaged(s, &s->train));
    return list_damaged(s, &s->val);
}

/* One after the other, for they add to the same list. */
static Err list_all_damaged(Stage *s) {
    for (size_t r = 0; r < ranks(); r++) {
        Err e = OK;
        if (r == rank()) e = until_room(s, write_damaged, NULL, 0);
        TRY(ranks_agree(e));
    }
    return OK;
}

/* The first rank's counts are everybody's afterwards. */
Err gather_usage(Stage *s) {
    if (!s->usage || ranks() == 1) return OK;
    const size_t n = vqgan_config(s->vqgan)->n_embed;
    TRY(ranks_sum_counts(s->usage, n));
    if (rank() > 0) memset(s->usage, 0, n * sizeof *s->usage);
    return OK;
}

/* What only all ranks together know, and whether they agree on what all should: then the first can write it down. */
static Err gather_state(Stage *s) {
    int damaged = dataset_damaged(&s->train) + dataset_damaged(&s->val) > 0;
    TRY(ranks_agree(params_fetch(s->params)));
    TRY(ranks_same(s->params->arena[0], s->params->total * sizeof(real), "weights after a step"));
    TRY(gan_gather(s));
    TRY(gather_usage(s));
    TRY(ranks_any(&damaged));
    return damaged ? list_all_damaged(s) : OK;
}

static Err write_state(Stage *s, void *beside) {
    char path[1100];
    TRY(write_list(s, collect_state, run_path(s, path, ".state-new.safetensors")));
    return state_put(s, path, beside != NULL);
}

static Err write_weights(Stage *s, void *suffix) {
    char path[1100];
    return write_list(s, collect_weights, run_path(s, path, suffix));
}

static Err set_counters(Stage *s) {
    TRY(config_set(&s->settings, "train.step", "%llu", (unsigned long long)s->step));
    return config_set(&s->settings, "train.ema_updates", "%llu", (unsigned long long)s->ema_updates);
}

Err save_state(Stage *s, int beside) {
    TRY(gather_state(s));
    TRY(set_counters(s));
    TRY(ranks_agree(rank() ? OK : until_room(s, write_state, beside ? s : NULL, list_bytes(s, collect_state))));
    s->saved = s->step;
    return OK;
}

Err save(Stage *s) {
    static char suffix[] = ".safetensors";
    TRY(save_state(s, 1));
    s->rollbacks = 0;
    return ranks_agree(rank() ? OK : until_room(s, write_weights, suffix, list_bytes(s, collect_weights)));
}

/* The first rank's work, which evaluates */
Err save_best(Stage *s, const Metrics *val) {
    static char suffix[] = ".best.safetensors";
    if (!(val->loss < s->best)) return OK;
    s->best = val->loss;
    TRY(params_fetch(s->params));
    TRY(set_counters(s));
    TRY(config_set(&s->settings, "train.best_step", "%llu", (unsigned long long)s->step));
    TRY(config_set(&s->settings, "train.best_validation_loss", "%.17g", s->best));
    return until_room(s, write_weights, suffix, list_bytes(s, collect_weights));
}

/* While a state is written, it, the N that are kept and the weights are on the disk. */
void say_disk(Stage *s) {
    size_t state = list_bytes(s, collect_state), weights = list_bytes(s, collect_weights);
    char one[32], two[32], all[32], left[32];
    struct statvfs disk;
    fprintf(stderr, "disk: a state %s, weights %s twice: with --keep %zu at most %s in %s", bytes_text(one, state),
            bytes_text(two, weights), s->opt->keep, bytes_text(all, (s->opt->keep + 1) * state + 2 * weights),
            s->opt->run);
    if (statvfs(s->opt->run, &disk) == 0)
        fprintf(stderr, ", %s free", bytes_text(left, (size_t)disk.f_bavail * disk.f_frsize));
    fprintf(stderr, "\n");
}

Err load_state(Stage *s, const Checkpoint *ck) {
    size_t step = 0, updates = 0;
    TRY(params_load(s->params, ck, 'v', "value."));
    TRY(params_load(s->params, ck, '1', "adam.m."));
    TRY(params_load(s->params, ck, '2', "adam.v."));
    if (!s->opt->vqgan) TRY(params_load(s->params, ck, 'e', "ema."));
    TRY(gan_load_state(s, ck));
    if (s->usage) TRY(checkpoint_ints(ck, "usage", vqgan_config(s->vqgan)->n_embed, (int32_t *)s->usage));
    if (s->usage && rank() > 0) memset(s->usage, 0, vqgan_config(s->vqgan)->n_embed * sizeof *s->usage);
    TRY(config_size(&step, &ck->meta, "train.", "step", 0, UINT32_MAX, 0));
    TRY(config_size(&updates, &ck->meta, "train.", "ema_updates", 0, SIZE_MAX / 2, 0));
    s->step = s->saved = step, s->ema_updates = updates;
    return survive_load(s, ck);
}

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
