/* codes.c - which entries of a first stage's codebook are in use: counted as it trains and shown beside its
 * evaluations; and --remap, after which tokens number only those that the training pictures use.
 *
 * Few codes, or many of which a handful does all the work (a low perplexity), mean that latents and codebook have
 * drifted apart: train.restart_codes is the cure. The transitions then predict one of K codes at every position; those
 * that no picture ever uses only make that harder, so the official models leave them out (quantize.used, SPEC section
 * 8). */
#include "training/stage.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- Counting ---- */

/* Steps over which usage is counted: those between two restarts of dead codes. */
static uint64_t period(const Stage *s) {
    return s->set.restart_codes ? s->set.restart_codes : 100;
}

/* Counts start anew with the first batch of a period, not with the last of the one before: so they are there to be
 * shown and saved in between. */
void count_codes(Stage *s) {
    const int32_t *raw;
    uint32_t *usage = s->first.usage;
    vqgan_latents(s->vqgan, NULL, NULL, &raw);
    if (s->micro_index == 0 && s->step % period(s) == 0)
        memset(usage, 0, vqgan_config(s->vqgan)->n_embed * sizeof *usage);
    for (size_t i = 0; i < s->batch * s->N; i++) usage[raw[i]]++;
}

CodeUse code_use(const uint32_t *usage, size_t n_embed) {
    CodeUse use = {0, 0};
    double sum = 0, entropy = 0;
    for (size_t k = 0; k < n_embed; k++) sum += usage[k];
    for (size_t k = 0; k < n_embed; k++) {
        const double p = usage[k] / sum;
        use.used += usage[k] != 0;
        if (usage[k]) entropy -= p * log(p);
    }
    if (use.used) use.perplexity = exp(entropy);
    return use;
}

void print_codes(const Stage *s, FILE *to, const CodeUse *val) {
    const size_t n = vqgan_config(s->vqgan)->n_embed;
    const CodeUse train = code_use(s->first.usage, n);
    if (train.used) fprintf(to, ", %zu of %zu codes in use, perplexity %.1f", train.used, n, train.perplexity);
    fprintf(to, "%s on validation %zu, perplexity %.1f", train.used ? ";" : ", codes in use", val->used,
            val->perplexity);
}

/* codes, perplexity, val_codes, val_perplexity */
int log_codes(const Stage *s, char *text, size_t size, const Metrics *val) {
    if (!val) return snprintf(text, size, "\t\t\t\t");
    const CodeUse train = code_use(s->first.usage, vqgan_config(s->vqgan)->n_embed);
    return snprintf(text, size, "\t%zu\t%.6g\t%zu\t%.6g", train.used, train.perplexity, val->codes.used,
                    val->codes.perplexity);
}

/* ---- A transition on a remapped first stage ---- */

/* A recipe's transformer has as many tokens as the codebook has entries; a new one gets as many as there are in use.
 * What it reads includes the scale and the class. */
Err fit_to_codes(Stage *s, NetConfig *c) {
    static const char prefix[] = "model.params.transformer_config.params.";
    const VqganConfig *v = vqgan_config(s->vqgan);
    if (!v->re_embed || v->re_embed == v->n_embed || c->dec_num_tokens != v->n_embed) return OK;
    if (config_get(&s->recipe, "train.", "step")) return OK; /* it is trained already: left as it is, to be refused */
    const int x = c->kind == NET_X;
    size_t reads = max_size(v->re_embed, (size_t)s->second.schedule.T + 1);
    char key[128];
    if (c->has_class) reads = max_size(reads, s->train.n_classes + (s->set.label_dropout > 0)); /* "no class" too */
    snprintf(key, sizeof key, "%s%s", prefix, x ? "dec_num_tokens" : "vocab_size");
    TRY(config_set(&s->recipe, key, "%zu", v->re_embed));
    snprintf(key, sizeof key, "%s%s", prefix, x ? "enc_num_tokens" : "input_vocab_size");
    if ((x ? c->enc_num_tokens : c->input_vocab_size) == v->n_embed) TRY(config_set(&s->recipe, key, "%zu", reads));
    say_once("%s: %zu token values, the codes of %zu that are in use\n", s->name, v->re_embed, v->n_embed);
    return net_config_read(c, &s->recipe, "model.params.");
}

/* ---- --remap ---- */

enum { REMAP_BATCH = 16 };

/* usage += the codes of images (pictures,crops,...), as they are and, where transitions train on both, mirrored. A label
 * of -1: a damaged picture. */
static Err count_crops(Stage *s, const real *images, const int32_t *label, size_t pictures, real *batch, int32_t *raw,
                       uint32_t *usage) {
    const size_t pixels = 3 * s->size * s->size, crops = s->set.crops, n = pictures * crops;
    for (size_t at = 0, B; at < n; at += B) {
        B = min_size(n - at, REMAP_BATCH);
        memcpy(batch, images + at * pixels, B * pixels * sizeof *batch);
        for (int flip = 0; flip <= s->set.flip; flip++) {
            if (flip) image_mirror(batch, B * 3, s->size);
            TRY(vqgan_encode(s->vqgan, batch, B, s->size, s->size, s->set.seed, NULL, raw, NULL));
            for (size_t i = 0; i < B * s->N; i++) usage[raw[i]] += label[(at + i / s->N) / crops] >= 0;
        }
    }
    return OK;
}

/* usage (n_embed) of every training picture: of all the crops that transitions train on. */
static Err count_pictures(Stage *s, uint32_t *usage) {
    const size_t n = s->train.n, pixels = 3 * s->size * s->size, crops = s->set.crops;
    const size_t B = max_size(REMAP_BATCH / crops, 1);
    real *batch = NULL;
    int32_t *raw = NULL;
    Loader *l = NULL;
    LoaderConfig c = {.prep = s->prep, .B = B, .size = s->size, .mark = 1};
    if (crops > 1) c.crops = crops, c.seed = s->set.seed;
    Err e = loader_start(&l, &s->train, &c);
    if (e == OK) e = mem_alloc(&batch, REMAP_BATCH * pixels, sizeof *batch, "batch");
    if (e == OK) e = mem_alloc(&raw, REMAP_BATCH * s->N, sizeof *raw, "batch of codes");
    for (size_t done = 0; done < n && e == OK; done += B) {
        const real *images;
        const int32_t *labels;
        e = loader_next(l, &images, &labels);
        if (e == OK) e = count_crops(s, images, labels, min_size(n - done, B), batch, raw, usage);
        progress_line("encoding %zu of %zu pictures", min_size(done + B, n), n);
        if (e == OK && interrupted()) e = err("interrupted; the first stage is as it was");
    }
    progress_end();
    loader_stop(l);
    free(batch);
    free(raw);
    return e;
}

/* Transitions that were trained on other numbers would say nonsense afterwards. */
static Err check_untrained(const Stage *s) {
    char path[PATH_BYTES];
    if (transitions_path(s, path))
        return err("%s: trained on the tokens as they are; --remap comes before the transitions", path);
    return OK;
}

typedef struct {
    const char *path;
    const int64_t *used; /* (K) */
    size_t K;
} Remapped;

/* The file again, every tensor as it is, with quantize.used (K), as the official models have it. */
static Err write_remapped(Stage *s, void *remapped) {
    const Remapped *x = remapped;
    Checkpoint ck;
    TensorList list = {0};
    Config meta = {0};
    (void)s;
    memset(&ck, 0, sizeof ck);
    TRY(checkpoint_open(&ck, x->path));
    Err e = tensor_list_add(&list, "quantize.used", DT_I64, 1, &x->K, x->used, 0);
    for (size_t i = 0; i < ck.n && e == OK; i++) {
        const Tensor *t = &ck.tensor[i];
        if (strcmp(t->name, "quantize.used") != 0)
            e = tensor_list_add(&list, t->name, t->dtype, t->ndim, t->dim, t->data, 0);
    }
    for (size_t i = 0; i < ck.meta.n && e == OK; i++)
        e = config_set(&meta, ck.meta.kv[i].key, "%s", ck.meta.kv[i].value);
    if (e == OK) e = config_set(&meta, "model.params.re_embed", "%zu", x->K);
    if (e == OK) e = checkpoint_write(x->path, list.tensor, list.from_real, list.n, &meta);
    tensor_list_free(&list);
    config_free(&meta);
    checkpoint_close(&ck);
    return e;
}

/* ---- The official remap ---- */

/* Are the codes of the first stage's file these? */
static int same_codes(const Vqgan *v, const int64_t *codes, size_t n) {
    const int32_t *used = vqgan_used(v);
    size_t i = 0;
    if (vqgan_config(v)->re_embed != n) return 0;
    while (i < n && used[i] == codes[i]) i++;
    return i == n;
}

/* The official code, too, takes a list with a code twice. */
Err say_repeated(const Stage *s, const char *file, const int64_t *codes, size_t n) {
    size_t repeated;
    TRY(remap_repeated(&repeated, codes, n, vqgan_config(s->vqgan)->n_embed));
    if (repeated)
        say_once("%s: %zu of its %zu entries repeat a code further ahead, whose token counts: no picture has theirs\n",
                 file, repeated, n);
    return OK;
}

/* The first stage's file gets the codes, unless it has them. */
static Err put_codes(Stage *s, const char *path, const char *file) {
    static const char *const prefix = "model.params.first_stage_config.params.";
    int64_t *codes;
    size_t n;
    if (remap_file(&codes, &n, file, vqgan_config(s->vqgan)->n_embed) != OK)
        return config_blame(&s->recipe, prefix, "remap");
    const int same = same_codes(s->vqgan, codes, n);
    Err e = OK;
    if (!same && vqgan_used(s->vqgan))
        e = config_err(&s->recipe, prefix, "remap", "%sremap %s: lists %zu codes, and %s has other ones, %zu", prefix,
                       file, n, path, s->K);
    if (!same && e == OK) e = check_untrained(s);
    if (!same && e == OK) e = retry_when_full(s, write_remapped, &(Remapped){path, codes, n}, 0);
    if (!same && e == OK)
        say_once("%s: tokens number %zu of %zu codes now, as %s lists them\n", path, n, vqgan_config(s->vqgan)->n_embed,
                 file);
    if (!same && e == OK) e = say_repeated(s, file, codes, n);
    free(codes);
    return e;
}

Err adopt_codes(Stage *s) {
    static const char *const prefix = "model.params.first_stage_config.params.";
    char path[PATH_BYTES], file[PATH_BYTES], besides[PATH_BYTES + 40];
    const char *said = config_get(&s->recipe, prefix, "remap");
    if (!said || is_one_of_values(said, "null") || s->has_state) return OK;
    TRY(open_first_stage(s, path));
    Err e = OK;
    snprintf(besides, sizeof besides, ", and %s does not say its codes", path);
    if (config_file(file, &s->recipe, prefix, "remap"))
        e = put_codes(s, path, file);
    else if (!vqgan_used(s->vqgan))
        e = remap_missing(&s->recipe, prefix, file, besides);
    vqgan_free(s->vqgan);
    s->vqgan = NULL;
    return e;
}

/* ---- --remap: what the pictures use ---- */

/* used (n_embed) = the codes that occur, rising; *K of them; *same: the first stage is numbered so already */
static void list_used(const Stage *s, const uint32_t *usage, int64_t *used, size_t *K, int *same) {
    const size_t n = vqgan_config(s->vqgan)->n_embed;
    const int32_t *now = vqgan_used(s->vqgan);
    *K = 0;
    for (size_t k = 0; k < n; k++)
        if (usage[k]) used[(*K)++] = (int64_t)k;
    *same = now && vqgan_config(s->vqgan)->re_embed == *K;
    for (size_t i = 0; *same && i < *K; i++) *same = now[i] == used[i];
}

static Err put_damaged(Stage *s, void *unused) {
    (void)unused;
    return list_damaged(s, &s->train);
}

Err remap_first_stage(Stage *s) {
    char path[PATH_BYTES];
    uint32_t *usage = NULL;
    int64_t *used = NULL;
    size_t K = 0;
    int same = 0;
    TRY(copy_first_stage(s));
    TRY(open_first_stage(s, path));
    const size_t n = vqgan_config(s->vqgan)->n_embed;
    if (vqgan_used(s->vqgan) && check_untrained(s) != OK) { /* --all goes on */
        say_text("%s: tokens number %zu of %zu codes already, and transitions are trained on them\n", path, s->K, n);
        return OK;
    }
    Err e = mem_alloc(&usage, n, sizeof *usage, "code usage");
    if (e == OK) e = mem_alloc(&used, n, sizeof *used, "codes in use");
    if (e == OK) e = count_pictures(s, usage);
    if (e == OK) e = retry_when_full(s, put_damaged, NULL, 0);
    if (e == OK) list_used(s, usage, used, &K, &same);
    if (e == OK && K < 2) e = err("%s: the pictures use %zu of %zu codes; train the first stage", path, K, n);
    if (e == OK && !same) e = check_untrained(s);
    if (e == OK && !same) e = retry_when_full(s, write_remapped, &(Remapped){path, used, K}, 0);
    if (e == OK)
        say_text("%s: %zu of %zu codes are in use, perplexity %.1f; tokens number those%s\n", path, K, n,
                 code_use(usage, n).perplexity, same ? " already" : " now");
    free(usage);
    free(used);
    return e;
}
