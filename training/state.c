/* state.c - checkpoints: written, checked, found again.
 *
 * STAGE.state.safetensors holds everything that continuing needs (weights, EMA, optimizer, counters, settings; all
 * random numbers are functions of the step), STAGE.safetensors what sampling needs, STAGE.best.safetensors the same as
 * it was when the validation loss was least. They are replaced atomically, so a kill at any instant loses at most the
 * steps since the last checkpoint, and resuming repeats them bit for bit.
 *
 * STAGE.state.safetensors is the newest state, STAGE.state-1.safetensors the one before, and so on, --keep in all. A
 * new one is written whole under another name first; then the older ones move on and it takes its place. Each carries a
 * checksum of its tensors and settings; one that does not match, or is cut short, is passed over.
 *
 * Read in this order: the checksum; the files of a run; what a state holds; saving; loading. */
#include "training/stage.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <zlib.h>

/* ------------------------------------------------------------------------------------------------------------
 * The checksum
 * ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    const Tensor *tensor;
    uint64_t *sum;
} Hashing;

static void hash_tensor(void *context, size_t i) {
    const Hashing *a = context;
    const Tensor *x = &a->tensor[i];
    uLong c = crc32_z(0, (const Bytef *)x->name, strlen(x->name));
    if (x->size) c = crc32_z(c, x->data, tensor_bytes(x));
    a->sum[i] = c;
}

_Static_assert(sizeof(real) == sizeof(float), "a state in memory has the bytes that it has in its file");

/* CRC-32 of every tensor and of every setting, each with its name, added up: in whatever order they come. */
static Err state_checksum(char out[24], const Tensor *tensor, size_t n, const Config *meta) {
    uint64_t sum = 0;
    Hashing a = {tensor, NULL};
    TRY(mem_alloc(&a.sum, n, sizeof *a.sum, "checksums"));
    parallel_for(threads_free(), n, hash_tensor, &a);
    for (size_t i = 0; i < n; i++) sum += a.sum[i];
    free(a.sum);
    for (size_t i = 0; i < meta->n; i++) {
        const char *key = meta->kv[i].key, *value = meta->kv[i].value;
        if (!strcmp(key, "train.checksum")) continue;
        sum += crc32_z(crc32_z(0, (const Bytef *)key, strlen(key) + 1), (const Bytef *)value, strlen(value));
    }
    snprintf(out, 24, "%016llx", (unsigned long long)sum);
    return OK;
}

static Err add_checksum(Config *meta, const Tensor *tensor, size_t n) {
    char sum[24];
    TRY(state_checksum(sum, tensor, n, meta));
    return config_set(meta, "train.checksum", "%s", sum);
}

static Err open_checked(Checkpoint *ck, const char *path) {
    char sum[24];
    TRY(checkpoint_open(ck, path));
    const char *said = config_get(&ck->meta, "train.", "checksum"); /* earlier versions did not say */
    Err e = said ? state_checksum(sum, ck->tensor, ck->n, &ck->meta) : OK;
    if (e == OK && said && strcmp(said, sum))
        e = err_damaged("%s: is damaged: its checksum is %s, expected %s", path, sum, said);
    if (e != OK) checkpoint_close(ck);
    return e;
}

/* ------------------------------------------------------------------------------------------------------------
 * The files of a run
 * ---------------------------------------------------------------------------------------------------------- */

int transitions_path(const Stage *s, char path[PATH_BYTES]) {
    for (size_t t = 0; t <= MAX_SCALES; t++) {
        if (t)
            snprintf(path, PATH_BYTES, "%s/scale%zu.state.safetensors", s->set.run, t);
        else
            snprintf(path, PATH_BYTES, "%s/joint.state.safetensors", s->set.run);
        if (file_exists(path)) return 1;
    }
    return 0;
}

/* The newest is number 0. */
static void state_suffix(char suffix[40], size_t number) {
    snprintf(suffix, 40, number ? ".state-%zu.safetensors" : ".state.safetensors", number);
}

static const char *state_path(const Stage *s, char out[PATH_BYTES], size_t number) {
    char suffix[40];
    state_suffix(suffix, number);
    return run_path(s, out, suffix);
}

/* The first from `number` on that is there; KEEP_MAX: none. A kill between two renames may leave a gap. */
static size_t next_state(const Stage *s, size_t number) {
    char path[PATH_BYTES];
    while (number < KEEP_MAX && !file_exists(state_path(s, path, number))) number++;
    return number;
}

int state_exists(const Stage *s) {
    return next_state(s, 0) < KEEP_MAX;
}

int first_stage_trained(const Stage *s, char path[PATH_BYTES]) {
    char suffix[40];
    for (size_t i = 0; i < KEEP_MAX; i++) {
        state_suffix(suffix, i);
        snprintf(path, PATH_BYTES, "%s/vqgan%s", s->set.run, suffix);
        if (file_exists(path)) return 1;
    }
    return 0;
}

static void move_aside(const Stage *s, size_t end) {
    char path[PATH_BYTES], aside[PATH_BYTES];
    run_path(s, aside, ".state-damaged.safetensors");
    for (size_t i = 0; i < end; i++) rename(state_path(s, path, i), aside);
}

/* Only what was read and is wrong gives way to the one before. What cannot be read just now may be whole. */
static Err open_newest(const Stage *s, Checkpoint *ck, int tidy) {
    char path[PATH_BYTES], other[PATH_BYTES];
    for (size_t i = next_state(s, 0), next; i < KEEP_MAX; i = next) {
        const Err e = open_checked(ck, state_path(s, path, i));
        if (e == OK && tidy) move_aside(s, i);
        if (e != DAMAGED) return e;
        next = next_state(s, i + 1);
        if (next == KEEP_MAX) return FAILED;
        progress_end();
        say_once("%s; going on from the one before, %s\n", err_text(), state_path(s, other, next));
    }
    return err("%s: no such file", state_path(s, path, 0));
}

/* Gives the newest a second name, so that its own is never without a file; where there are no links, renames it. */
static void link_newest(const char *newest, const char *before) {
    char temporary[PATH_BYTES + 32];
    snprintf(temporary, sizeof temporary, "%s.tmp%ld", before, (long)getpid());
    unlink(temporary);
    int linked = link(newest, temporary) == 0 && rename(temporary, before) == 0;
    unlink(temporary); /* rename leaves two names of one file as they are */
    if (!linked) rename(newest, before);
}

/* The state that was written as `written` becomes the newest; with `beside`, the newest becomes the one before. */
static Err state_put(const Stage *s, const char *written, int beside) {
    char newest[PATH_BYTES], path[PATH_BYTES], older[PATH_BYTES];
    const size_t keep = s->set.keep;
    state_path(s, newest, 0);
    if (beside) {
        for (size_t i = keep; i-- > 2;) rename(state_path(s, path, i - 1), state_path(s, older, i));
        if (keep > 1 && file_exists(newest)) link_newest(newest, state_path(s, path, 1));
    }
    if (rename(written, newest)) {
        const Err e = io_error(newest, "replace");
        unlink(written);
        return e;
    }
    for (size_t i = keep; (i = next_state(s, i)) < KEEP_MAX; i++) unlink(state_path(s, path, i));
    return OK;
}

Err state_open(const Stage *s, Checkpoint *ck, int tidy) {
    TRY(ranks_agree(rank() == 0 ? open_newest(s, ck, tidy) : OK));
    return ranks_agree(rank() > 0 ? open_newest(s, ck, 0) : OK);
}

/* ------------------------------------------------------------------------------------------------------------
 * What a state holds, and saving it
 * ---------------------------------------------------------------------------------------------------------- */

static Err collect_state(Stage *s, TensorList *list) {
    const size_t dim[2] = {2, RECENT};
    TRY(tensor_list_params(list, s->params, 'v', "value.", DT_F32));
    TRY(tensor_list_params(list, s->params, '1', "adam.m.", DT_F32));
    TRY(tensor_list_params(list, s->params, '2', "adam.v.", DT_F32));
    if (s->kind->ema) TRY(tensor_list_params(list, s->params, 'e', "ema.", DT_F32));
    if (s->kind->collect) TRY(s->kind->collect(s, list));
    return tensor_list_add(list, "recent_loss_and_norm", DT_F32, 2, dim, s->history.recent, 1);
}

Err copy_settings(Config *to, const Config *from) {
    for (size_t i = 0; i < from->n; i++)
        if (strcmp(from->kv[i].key, "train.checksum")) TRY(config_copy(to, from->kv[i].key, &from->kv[i]));
    return OK;
}

typedef Err Collect(Stage *s, TensorList *list);

static Err write_list(Stage *s, Collect *collect, const char *path) {
    TensorList list = {0};
    Config meta = {0};
    Err e = collect(s, &list);
    if (e == OK) e = copy_settings(&meta, &s->recipe);
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
        for (size_t i = 0; i < list.n; i++) bytes += tensor_bytes(&list.tensor[i]);
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
        if (r == rank()) e = retry_when_full(s, write_damaged, NULL, 0);
        TRY(ranks_agree(e));
    }
    return OK;
}

/* What only all ranks together know, and whether they agree on what all should: then the first can write it down. */
static Err gather_state(Stage *s) {
    int damaged = dataset_damaged(&s->train) + dataset_damaged(&s->val) > 0;
    TRY(ranks_agree(params_fetch(s->params)));
    TRY(ranks_same(s->params->arena[0], s->params->total * sizeof(real), "weights after a step"));
    if (s->kind->gather) TRY(s->kind->gather(s, 0));
    TRY(ranks_any(&damaged));
    return damaged ? list_all_damaged(s) : OK;
}

static Err write_state(Stage *s, void *beside) {
    char path[PATH_BYTES];
    TRY(write_list(s, collect_state, run_path(s, path, ".state-new.safetensors")));
    return state_put(s, path, beside != NULL);
}

static Err write_weights(Stage *s, void *suffix) {
    char path[PATH_BYTES];
    return write_list(s, s->kind->collect_weights, run_path(s, path, suffix));
}

static Err set_counters(Stage *s) {
    TRY(config_set(&s->recipe, "train.step", "%llu", (unsigned long long)s->step));
    return config_set(&s->recipe, "train.ema_updates", "%llu", (unsigned long long)s->ema_updates);
}

Err save_state(Stage *s, int beside) {
    TRY(gather_state(s));
    TRY(set_counters(s));
    TRY(ranks_agree(rank() ? OK : retry_when_full(s, write_state, beside ? s : NULL, list_bytes(s, collect_state))));
    s->saved = s->step, s->has_state = 1;
    return OK;
}

Err save(Stage *s) {
    static char suffix[] = ".safetensors";
    TRY(save_state(s, 1));
    s->rollbacks = 0;
    return ranks_agree(rank() ? OK
                              : retry_when_full(s, write_weights, suffix, list_bytes(s, s->kind->collect_weights)));
}

/* Of which step is a file of weights, and are they the best of a stage that ended early? NONE: it does not say. */
static Err step_of(size_t *step, int *early, const char *path) {
    Checkpoint ck;
    *step = NONE;
    TRY(checkpoint_open(&ck, path));
    Err e = config_size(step, &ck.meta, "train.", "step", 0, UINT32_MAX, 1);
    *early = config_get(&ck.meta, "train.", "stopped_early") != NULL;
    checkpoint_close(&ck);
    return e;
}

Err save_missing_weights(Stage *s) {
    static char suffix[] = ".safetensors";
    char path[PATH_BYTES];
    size_t step = 0;
    int early = 0;
    if (s->step == 0) return OK; /* a network that was not trained yet */
    run_path(s, path, suffix);
    const Err e = file_exists(path) ? step_of(&step, &early, path) : OK;
    if (e == FAILED) return e;
    if (e == OK && (early || step >= s->step)) return OK;
    TRY(set_counters(s));
    TRY(retry_when_full(s, write_weights, suffix, list_bytes(s, s->kind->collect_weights)));
    const char *was = e == DAMAGED ? "damaged" : step ? "older than the state" : "missing";
    say_text("%s: was %s; now it has the weights of step %llu\n", path, was, (unsigned long long)s->step);
    return OK;
}

Err check_first_stage(const Stage *s, const char *path) {
    char state[PATH_BYTES];
    size_t trained, written;
    int early;
    if (s->has_state || !first_stage_trained(s, state)) return OK;
    if (!file_exists(path)) return err("%s: is missing; --vqgan --resume writes it from %s", path, state);
    const Err e = step_of(&trained, &early, state);
    if (e != OK) return e == DAMAGED ? OK : e; /* its own --resume will say so */
    TRY(step_of(&written, &early, path));
    if (early || trained == NONE || written == NONE || written >= trained) return OK;
    return err("%s: is of step %zu, %s of step %zu; --vqgan --resume brings it up to date", path, written, state,
               trained);
}

/* The first rank's work, which evaluates */
Err save_best(Stage *s, const Metrics *val) {
    static char suffix[] = ".best.safetensors";
    if (!(val->loss < s->history.best)) return OK;
    s->history.best = val->loss, s->history.best_step = s->step;
    TRY(params_fetch(s->params));
    TRY(set_counters(s));
    TRY(config_set(&s->recipe, "train.best_step", "%llu", (unsigned long long)s->step));
    TRY(config_set(&s->recipe, "train.best_validation_loss", "%.17g", s->history.best));
    return retry_when_full(s, write_weights, suffix, list_bytes(s, s->kind->collect_weights));
}

int ended_early(const Stage *s) {
    const History *h = &s->history;
    return s->set.early_stop && isfinite(h->best) && s->step >= h->best_step + s->set.early_stop * s->set.eval_every;
}

static Err copy_best(Stage *s, void *unused) {
    char best[PATH_BYTES], path[PATH_BYTES];
    Checkpoint ck;
    TensorList list = {0};
    Config meta = {0};
    (void)unused;
    memset(&ck, 0, sizeof ck);
    TRY(checkpoint_open(&ck, run_path(s, best, ".best.safetensors")));
    Err e = copy_settings(&meta, &ck.meta);
    for (size_t i = 0; i < ck.n && e == OK; i++) {
        const Tensor *x = &ck.tensor[i];
        e = tensor_list_add(&list, x->name, x->dtype, x->ndim, x->dim, x->data, 0);
    }
    if (e == OK) e = config_set(&meta, "train.stopped_early", "%llu", (unsigned long long)s->step);
    if (e == OK) e = checkpoint_write(run_path(s, path, ".safetensors"), list.tensor, list.from_real, list.n, &meta);
    tensor_list_free(&list);
    config_free(&meta);
    checkpoint_close(&ck);
    return e;
}

Err use_best(Stage *s) {
    char path[PATH_BYTES];
    size_t step = 0;
    int early;
    if (!ended_early(s) || !file_exists(run_path(s, path, ".best.safetensors"))) return OK;
    TRY(step_of(&step, &early, run_path(s, path, ".safetensors")));
    if (step == s->history.best_step) return OK; /* done; it may have been remapped since */
    if (s->set.vqgan && transitions_path(s, path)) {
        say_text("%s: its last weights stay, not the best: %s is trained on their tokens\n", s->name, path);
        return OK;
    }
    TRY(retry_when_full(s, copy_best, NULL, list_bytes(s, s->kind->collect_weights)));
    say_text("%s: ended after step %llu, for validation was best at step %zu: %s has the weights of that step\n",
             s->name, (unsigned long long)s->step, s->history.best_step, run_path(s, path, ".safetensors"));
    return OK;
}

/* While a state is written, it, the N that are kept and the weights are on the disk. */
void say_disk(Stage *s) {
    size_t state = list_bytes(s, collect_state), weights = list_bytes(s, s->kind->collect_weights);
    char one[32], two[32], all[32], left[32];
    struct statvfs disk;
    say_text("disk: a state %s, weights %s twice: with --keep %zu at most %s in %s", bytes_text(one, state),
             bytes_text(two, weights), s->set.keep, bytes_text(all, (s->set.keep + 1) * state + 2 * weights),
             s->set.run);
    if (statvfs(s->set.run, &disk) == 0) say_text(", %s free", bytes_text(left, (size_t)disk.f_bavail * disk.f_frsize));
    say_text("\n");
}

static size_t file_size(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 ? (size_t)st.st_size : 0;
}

size_t planned_bytes(const Stage *s, size_t others, size_t *state, size_t *there) {
    const size_t n = s->params->total, weights = n * dtype_size(s->store);
    char path[PATH_BYTES];
    *state = n * (3 + (s->kind->ema != 0)) * sizeof(float) + others;
    *there = file_size(run_path(s, path, ".safetensors")) + file_size(run_path(s, path, ".best.safetensors"));
    for (size_t i = 0; i < s->set.keep; i++) *there += file_size(state_path(s, path, i));
    return s->set.keep * *state + 2 * weights;
}

size_t trained_steps(const Stage *s) {
    char path[PATH_BYTES];
    size_t step;
    int early = 0;
    if (!state_exists(s) || !file_exists(run_path(s, path, ".safetensors"))) return 0; /* not trained, or copied here */
    if (step_of(&step, &early, path) != OK) return 0;
    return early ? s->set.steps : step == NONE ? 0 : step;
}

/* ------------------------------------------------------------------------------------------------------------
 * Loading
 * ---------------------------------------------------------------------------------------------------------- */

void forget_recent(real recent[2 * RECENT]) {
    for (size_t i = 0; i < 2 * RECENT; i++) recent[i] = NAN;
}

void forget_steps(History *h) {
    forget_recent(h->recent);
}

void history_start(History *h) {
    h->best = INFINITY, h->best_step = 0, h->n_skipped = 0;
    forget_steps(h);
}

static Err load_history(History *h, const Checkpoint *ck) {
    const size_t dim[2] = {2, RECENT};
    history_start(h);
    if (checkpoint_find(ck, "recent_loss_and_norm")) /* states of earlier versions have none of this */
        TRY(checkpoint_reals(ck, "recent_loss_and_norm", 2, dim, 2 * RECENT, h->recent));
    TRY(config_real(&h->best, &ck->meta, "train.", "best_validation_loss", -1e300, 1e300, 1));
    TRY(config_size(&h->best_step, &ck->meta, "train.", "best_step", 0, UINT32_MAX, 1));
    TRY(config_list(h->skipped, &h->n_skipped, SKIPPED_MAX, &ck->meta, "train.", "skipped", 1));
    for (size_t k = 1; k < h->n_skipped; k++)
        if (h->skipped[k] <= h->skipped[k - 1]) return err("%s: train.skipped is not ascending", ck->path);
    return OK;
}

Err load_state(Stage *s, const Checkpoint *ck) {
    size_t step = 0, updates = 0;
    TRY(params_load(s->params, ck, 'v', "value."));
    TRY(params_load(s->params, ck, '1', "adam.m."));
    TRY(params_load(s->params, ck, '2', "adam.v."));
    if (s->kind->ema) TRY(params_load(s->params, ck, 'e', "ema."));
    if (s->kind->load) TRY(s->kind->load(s, ck));
    TRY(config_size(&step, &ck->meta, "train.", "step", 0, UINT32_MAX, 0));
    TRY(config_size(&updates, &ck->meta, "train.", "ema_updates", 0, SIZE_MAX / 2, 0));
    s->step = s->saved = step, s->ema_updates = updates;
    return load_history(&s->history, ck);
}
