/* encoded.c - the data set as tokens: encoded once by the run's first stage, kept in the run.
 *
 * RUN/train.tokens and RUN/val.tokens belong to one VQGAN file, one set of pictures and one preprocessing; for any
 * other, they are made afresh. A kill while they are made loses a batch. */
#include "training/stage.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- the first stage ---- */

/* paths: to, from */
static Err copy_file(Stage *s, void *paths) {
    const char *const *path = paths;
    Checkpoint ck;
    AtomicFile f;
    (void)s;
    memset(&ck, 0, sizeof ck);
    TRY(checkpoint_open(&ck, path[1]));
    Err e = atomic_open(&f, path[0]);
    if (e == OK) e = atomic_close(&f, atomic_write(&f, ck.map, ck.map_bytes));
    checkpoint_close(&ck);
    return e;
}

/* theirs was looked for in all places of models/ if the model has a name, else there alone. */
static Err no_first_stage(const Stage *s, const char *ours, const char *theirs) {
    char places[PLACES_BYTES];
    if (find_named(s->set.model))
        return err("%s: no first stage there, nor of the model %s (looked in %s); train it first: --vqgan", ours,
                   s->set.model, models_places(places));
    return err("%s: no first stage there, nor in %s here; a recipe alone has none; train it first: --vqgan", ours,
               theirs);
}

/* A run without a VQGAN, and that trained none, gets the model's, so that it can be sampled as it stands. It is said, for
 * the run's name may have been mistyped. */
Err copy_first_stage(Stage *s) {
    char ours[PATH_BYTES], theirs[PATH_BYTES], folder[PATH_BYTES];
    snprintf(ours, sizeof ours, "%s/vqgan.safetensors", s->set.run);
    TRY(path_make(theirs, "%s/vqgan.safetensors", model_folder(folder, s->set.model)));
    TRY(check_first_stage(s, ours));
    if (file_exists(ours)) return OK;
    if (!file_exists(theirs)) return no_first_stage(s, ours, theirs);
    say_once("first stage: %s, %s; %s had none\n",
             strcmp(s->set.model, "emoji") ? "the model's" : "the bundled model's", theirs, s->set.run);
    const char *paths[2] = {ours, theirs};
    return retry_when_full(s, copy_file, paths, 0);
}

/* The run's own VQGAN */
Err open_first_stage(Stage *s, char path[PATH_BYTES]) {
    Checkpoint ck;
    VqganConfig c;
    snprintf(path, PATH_BYTES, "%s/vqgan.safetensors", s->set.run);
    memset(&ck, 0, sizeof ck);
    TRY(checkpoint_open(&ck, path));
    Err e = first_stage_config(&c, &ck.meta, &ck, "");
    if (e == OK) e = vqgan_create(&s->vqgan, &c, 0);
    if (e == OK) e = params_plan(vqgan_params(s->vqgan), PLAN_VALUE);
    if (e == OK) e = vqgan_load(s->vqgan, &ck, "");
    /* in f32: whoever continues the run elsewhere must get the same tokens */
    if (e == OK && s->set.cuda) e = vqgan_use_cuda(s->vqgan, PRECISION_F32);
    if (e == OK) e = params_send(vqgan_params(s->vqgan));
    if (e == OK) say_note(&ck);
    checkpoint_close(&ck);
    if (e != OK) return err_in(path);
    s->size = c.resolution;
    s->h = s->w = s->size >> (c.levels - 1);
    s->N = s->h * s->w;
    s->K = vqgan_K(s->vqgan);
    return vqgan_plan(s->vqgan, 16, s->size, s->size, 0);
}

/* ---- the data set as its tokens ---- */

/* Where crops are is the seed's business. */
static uint64_t dataset_hash(const Stage *s, const Dataset *d, size_t crops) {
    uint64_t h = fnv1a(FNV_START, &s->prep, sizeof s->prep);
    h = fnv1a(h, &d->identity, sizeof d->identity);
    return crops > 1 ? fnv1a(h, &s->set.seed, sizeof s->set.seed) : h;
}

/* images (B,...) as they are and, with flips, mirrored: token (B, flips, N). */
static Err encode_batch(Stage *s, size_t flips, const real *images, size_t B, real *mirrored, int32_t *once,
                        int32_t *token) {
    size_t pixels = 3 * s->size * s->size;
    memcpy(mirrored, images, B * pixels * sizeof *mirrored);
    for (size_t flip = 0; flip < flips; flip++) {
        if (flip) image_mirror(mirrored, B * 3, s->size);
        TRY(vqgan_encode(s->vqgan, mirrored, B, s->size, s->size, s->set.seed, NULL, NULL, once));
        for (size_t b = 0; b < B; b++) memcpy(token + (b * flips + flip) * s->N, once + b * s->N, s->N * sizeof *token);
    }
    return OK;
}

enum { ENCODED_AT_ONCE = 16 }; /* crops */

/* The same of crops (pictures * crops,...), as many at once as there is room for */
static Err encode_crops(Stage *s, const Tokens *sizes, const real *images, size_t pictures, real *mirrored,
                        int32_t *once, int32_t *token) {
    const size_t pixels = 3 * s->size * s->size, n = pictures * sizes->crops;
    for (size_t i = 0, B; i < n; i += B) {
        B = min_size(n - i, ENCODED_AT_ONCE);
        TRY(encode_batch(s, sizes->flips, images + i * pixels, B, mirrored, once, token + i * sizes->flips * s->N));
    }
    return OK;
}

/* Pictures of a batch: with crops, fewer */
static size_t pictures_at_once(const Tokens *sizes) {
    return max_size(ENCODED_AT_ONCE / sizes->crops, 1);
}

typedef struct {
    TokensPart *part;
    int32_t label;
    const int32_t *token; /* (crops, flips, N) */
} Encoded;

static Err put_encoded(Stage *s, void *encoded) {
    (void)s;
    const Encoded *x = encoded;
    return tokens_append(x->part, x->label, x->token);
}

static Err put_damaged(Stage *s, void *dataset) {
    const Dataset *const *d = dataset;
    return list_damaged(s, *d);
}

/* Pictures are read and prepared by the loader's threads, ahead, while all threads encode. Damaged pictures are listed
 * before their place is taken, so that a kill in between forgets none. */
static Err encode_dataset(Stage *s, TokensPart *p, const Dataset *d) {
    const Tokens *sizes = &p->sizes;
    const size_t n = d->n, B = pictures_at_once(sizes), each = sizes->crops * sizes->flips * s->N;
    Loader *l = NULL;
    real *mirrored = NULL;
    int32_t *once = NULL, *token = NULL;
    LoaderConfig c = {.prep = s->prep, .B = B, .size = s->size, .step = p->done / B, .mark = 1};
    if (sizes->crops > 1) c.crops = sizes->crops, c.seed = s->set.seed;
    Err e = p->done < n ? loader_start(&l, d, &c) : OK;
    if (e == OK) e = mem_alloc(&mirrored, ENCODED_AT_ONCE * 3 * s->size, s->size * sizeof *mirrored, "batch");
    if (e == OK) e = mem_alloc(&once, ENCODED_AT_ONCE * s->N, sizeof *once, "batch of tokens");
    if (e == OK) e = mem_alloc(&token, B * each, sizeof *token, "batch of tokens");
    while (e == OK && p->done < n) {
        const real *images;
        const int32_t *labels;
        size_t rows = min_size(n - p->done, B); /* the last batch wraps around: its tail is not used */
        e = loader_next(l, &images, &labels);
        if (e == OK) e = encode_crops(s, sizes, images, rows, mirrored, once, token);
        if (e == OK) e = retry_when_full(s, put_damaged, &d, 0);
        for (size_t b = 0; b < rows && e == OK; b++) {
            Encoded one = {p, labels[b], token + b * each};
            e = retry_when_full(s, put_encoded, &one, 0);
        }
        progress_line("encoding %zu of %zu pictures", p->done, n);
        if (e == OK && interrupted() && p->done < n)
            e = err("%s: stopped after %zu of %zu pictures; the same command goes on from there", p->part, p->done, n);
    }
    progress_end();
    loader_stop(l);
    free(mirrored);
    free(once);
    free(token);
    return e;
}

/* x = the file, if it is there and of this first stage, dataset and preprocessing; else x->n = 0. */
static Err cached_tokens(Tokens *x, const char *path, const Tokens *wanted, size_t n_classes) {
    memset(x, 0, sizeof *x);
    if (!file_exists(path)) return OK;
    if (tokens_read(x, path) != OK) return err("%s; without this file it is made anew", err_text());
    const int ours = x->vqgan == wanted->vqgan && x->source == wanted->source && x->flips == wanted->flips;
    if (!ours || x->crops != wanted->crops || x->h != wanted->h || x->w != wanted->w || x->K != wanted->K ||
        x->n > wanted->n)
        tokens_free(x);
    for (size_t i = 0; i < x->n; i++)
        if ((size_t)x->label[i] >= max_size(n_classes, 1)) {
            const int32_t label = x->label[i];
            tokens_free(x);
            return err("%s: label %zu is %d, the pictures have %zu classes; without this file it is made anew", path, i,
                       (int)label, n_classes);
        }
    return OK;
}

typedef struct {
    TokensPart *part;
    Tokens *out;
    const char *path;
    const Tokens *wanted;
} Encoding;

static Err start_encoding(Stage *s, void *encoding) {
    (void)s;
    const Encoding *x = encoding;
    return tokens_start(x->part, x->path, x->wanted, pictures_at_once(x->wanted));
}

static Err finish_encoding(Stage *s, void *encoding) {
    (void)s;
    const Encoding *x = encoding;
    return tokens_finish(x->part, x->out);
}

/* The cache belongs to one VQGAN file and one set of pictures; any other is encoded afresh. */
static Err load_split(Stage *s, Tokens *x, const Dataset *d, const char *what, const char *vqgan_path) {
    char path[PATH_BYTES];
    TokensPart p;
    if (d->n == 0) return *x = (Tokens){0}, OK; /* none is held out */
    Tokens wanted = {.n = d->n, .h = s->h, .w = s->w, .K = s->K, .flips = s->set.flip ? 2 : 1};
    wanted.crops = d == &s->train ? s->set.crops : 1; /* held-out pictures: the centre, as in the official code */
    wanted.source = dataset_hash(s, d, wanted.crops);
    snprintf(path, sizeof path, "%s/%s.tokens", s->set.run, what);
    TRY(file_checksum(&wanted.vqgan, vqgan_path));
    TRY(cached_tokens(x, path, &wanted, d->n_classes));
    if (x->n) return tokens_drop_part(path), OK;
    Encoding encoding = {&p, x, path, &wanted};
    TRY(retry_when_full(s, start_encoding, &encoding, 0));
    Err e = cached_tokens(x, path, &wanted, d->n_classes); /* another process may have made it while this one waited */
    if (e == OK && x->n) {
        unlink(p.part);
    } else if (e == OK) {
        if (p.done) say_text("%s: continuing after %zu pictures\n", p.part, p.done);
        e = encode_dataset(s, &p, d);
        if (e == OK) e = retry_when_full(s, finish_encoding, &encoding, d->n * p.bytes);
    }
    tokens_stop(&p);
    return e;
}

/* Damaged pictures are not known yet. */
Err token_bytes(const Stage *s, size_t *bytes) {
    size_t n, each = s->N * (s->set.flip ? 2 : 1) * sizeof(uint16_t);
    TRY(size_mul(&each, each, s->set.crops));
    TRY(size_mul(bytes, s->train.n, each + sizeof(int32_t)));
    TRY(size_mul(&n, s->val.n, s->N * (s->set.flip ? 2 : 1) * sizeof(uint16_t) + sizeof(int32_t)));
    *bytes += n;
    return OK;
}

static Err load_both(Stage *s, const char *vqgan_path) {
    TRY(load_split(s, &s->second.train, &s->train, "train", vqgan_path));
    return s->val.n == 0 ? OK : load_split(s, &s->second.val, &s->val, "val", vqgan_path);
}

/* The first rank makes them, for the others to read. */
Err load_tokens(Stage *s, const char *vqgan_path) {
    const SecondStage *x = &s->second;
    TRY(ranks_agree(rank() == 0 ? load_both(s, vqgan_path) : OK));
    if (rank() > 0) TRY(load_both(s, vqgan_path));
    s->all_read = 1;
    s->n_damaged = s->train.n - x->train.n + s->val.n - x->val.n;
    return OK;
}
