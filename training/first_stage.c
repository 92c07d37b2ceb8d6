/* first_stage.c - ./train --vqgan: pictures -> tokens -> pictures. All but the micro batch, which train.c shows; the
 * mathematics is in vqgan.c, perceptual.c and discriminator.c.
 *
 * LPIPS is part of the loss where the recipe says so, in the official words: model.params.lossconfig.params.
 * perceptual_weight above 0, or a lossconfig.target that speaks of LPIPS (then 1), or --perceptual. The weights are
 * files of other people's: those of --perceptual, else those in models/lpips; without any, the run says so and goes on
 * without. Whatever a run begins with is kept in its settings (that weight, train.perceptual), so that --resume cannot
 * change the loss unnoticed.
 *
 * Read in this order: LPIPS; pictures and codes of a step; evaluation and picture; building; state and log. */
#include "training/stage.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------------------------------------------------------
 * LPIPS
 * ---------------------------------------------------------------------------------------------------------- */

#define BOTH "models/lpips/lpips.safetensors"
#define VGG16 "models/lpips/vgg16-397923af.pth"
#define LINS "models/lpips/vgg.pth"

/* "none" says that none are wanted. */
static int given(const char *files) {
    return files && strcmp(files, "none") != 0;
}

/* files = what the user named; else what the run or the recipe did; else what is there. */
static Err choose_files(char files[2 * PATH_BYTES], const Stage *s) {
    char a[PATH_BYTES], b[PATH_BYTES];
    const char *recorded = config_get(&s->recipe, "train.", "perceptual");
    int n;
    if (s->set.perceptual || recorded)
        n = snprintf(files, 2 * PATH_BYTES, "%s", s->set.perceptual ? s->set.perceptual : recorded);
    else if (models_find(a, BOTH))
        n = snprintf(files, 2 * PATH_BYTES, "%s", a);
    else if (models_find(a, VGG16) && models_find(b, LINS))
        n = snprintf(files, 2 * PATH_BYTES, "%s,%s", a, b);
    else
        n = snprintf(files, 2 * PATH_BYTES, "none");
    return n >= 0 && n < 2 * PATH_BYTES ? OK : err("--perceptual: a path is too long");
}

static void say_without(const Stage *s) {
    if (config_get(&s->recipe, "train.", "step")) {
        say_once("perceptual loss: trained without it, as the run began\n");
        return;
    }
    char path[PATH_BYTES];
    const int vgg16 = models_find(path, VGG16), lins = models_find(path, LINS);
    say_once(
        "perceptual loss: trained without it: %s; make lpips fetches them (torchvision's vgg16-397923af.pth, LPIPS's "
        "vgg.pth), or --perceptual FILE[,FILE]\n",
        vgg16  ? "there is no " LINS
        : lins ? "there is no " VGG16
               : "there are no weights in models/lpips");
}

/* files: one path, or two between which is a comma */
static Err open_files(Checkpoint ck[2], size_t *n, const char *files) {
    char path[2][PATH_BYTES];
    const char *comma = strchr(files, ',');
    const size_t length = comma ? (size_t)(comma - files) : strlen(files);
    if (length >= sizeof path[0] || (comma && strlen(comma + 1) >= sizeof path[1]))
        return err("--perceptual: a path is too long");
    if (comma && strchr(comma + 1, ',')) return err("--perceptual %.200s: expected one or two files", files);
    snprintf(path[0], sizeof path[0], "%.*s", (int)length, files);
    if (comma) snprintf(path[1], sizeof path[1], "%s", comma + 1);
    for (*n = 0; *n < (comma ? 2u : 1u); ++*n) TRY(checkpoint_open(&ck[*n], path[*n]));
    return OK;
}

static Err load_perceptual(Perceptual **p, const char *files) {
    const PerceptualConfig c = perceptual_vgg16();
    Checkpoint ck[2];
    size_t n = 0;
    memset(ck, 0, sizeof ck);
    TRY(perceptual_create(p, &c));
    Err e = open_files(ck, &n, files);
    if (e == OK) e = perceptual_load(*p, ck, n);
    for (size_t i = 0; i < n && e == OK; i++) say_once("%s: weights of LPIPS\n", ck[i].path);
    for (size_t i = 0; i < n; i++) checkpoint_close(&ck[i]);
    return e;
}

/* Does the recipe have the official loss, which is L1 and LPIPS? The official transitions name a dummy. */
static int has_official_loss(const Config *c) {
    static const char loss[] = "model.params.lossconfig.";
    const char *target = config_get(c, loss, "target");
    if (target) return !strstr(target, "DummyLoss");
    for (size_t i = 0; i < c->n; i++)
        if (!strncmp(c->kv[i].key, loss, sizeof loss - 1)) return 1;
    return 0;
}

static Err read_weight(Stage *s) {
    const char *target = config_get(&s->recipe, "model.params.lossconfig.", "target");
    const int begun =
        config_get(&s->recipe, "train.", "step") != NULL; /* then perceptual_weight may be the run's own */
    if (!begun && has_official_loss(&s->recipe) && !config_get(&s->recipe, "train.", "l2_weight")) {
        s->set.l2_weight = 0;
        TRY(config_set(&s->recipe, "train.l2_weight", "0"));
    }
    s->first.perceptual_weight = given(s->set.perceptual) || (target && strstr(target, "LPIPS"));
    return config_real(&s->first.perceptual_weight, &s->recipe, "model.params.lossconfig.params.", "perceptual_weight",
                       0, 1e6, 1);
}

static Err open_perceptual(Stage *s, size_t *plan, size_t *tables) {
    size_t features = 0;
    TRY(read_weight(s));
    if (s->first.perceptual_weight == 0)
        return given(s->set.perceptual) ? err("--perceptual: the recipe's perceptual_weight is 0") : OK;
    char files[2 * PATH_BYTES];
    TRY(choose_files(files, s));
    TRY(config_set(&s->recipe, "train.perceptual", "%s", files));
    if (!given(files)) {
        s->first.perceptual_weight = 0;
        if (!s->set.perceptual) say_without(s);
        return OK;
    }
    TRY(config_set(&s->recipe, "model.params.lossconfig.params.perceptual_weight", "%.17g",
                   s->first.perceptual_weight));
    TRY(load_perceptual(&s->first.perceptual, files));
    say_once("perceptual loss: LPIPS, weight %g\n", s->first.perceptual_weight);
    perceptual_params(s->first.perceptual)->precision = s->precision;
    if (s->set.cuda) TRY(perceptual_use_cuda(s->first.perceptual, s->precision));
    TRY(perceptual_plan_bytes(s->first.perceptual, s->batch, s->size, s->size, 1, &features));
    *plan += features;
    *tables += perceptual_params(s->first.perceptual)->total * sizeof(real);
    return OK;
}

static Err plan_perceptual(Stage *s) {
    if (!s->first.perceptual) return OK;
    TRY(perceptual_plan(s->first.perceptual, s->batch, s->size, s->size, 1));
    return params_send(perceptual_params(s->first.perceptual));
}

Err add_perceptual(Stage *s, const real *images, const real *xrec, size_t B, double weight, double *mean, real *dxrec) {
    *mean = 0;
    if (!s->first.perceptual) return OK;
    return perceptual_loss(s->first.perceptual, images, xrec, B, s->size, s->size, weight * s->first.perceptual_weight,
                           mean, dxrec);
}

Err convert_perceptual(const char *files, const char *out) {
    Perceptual *p = NULL;
    TensorList list = {0};
    Err e = load_perceptual(&p, files);
    if (e == OK) e = tensor_list_params(&list, perceptual_params(p), 'v', "", DT_F32);
    if (e == OK) e = checkpoint_write(out, list.tensor, list.from_real, list.n, NULL);
    tensor_list_free(&list);
    perceptual_free(p);
    return e;
}

/* ------------------------------------------------------------------------------------------------------------
 * The pictures of a step; its codes
 * ---------------------------------------------------------------------------------------------------------- */

/* The loader counts for itself; it starts anew where the next micro batch is not the one after the last: at first,
 * after one that is left out, after going back to a checkpoint. */
Err next_pictures(Stage *s, uint64_t micro, const real **images) {
    FirstStage *f = &s->first;
    const int32_t *labels;
    LoaderConfig c = {
        .prep = s->prep, .B = s->batch, .size = s->size, .seed = s->set.seed, .train = 1, .flip = s->set.flip};
    if (!f->loader || f->loader_at != micro) {
        loader_stop(f->loader);
        f->loader = NULL;
        c.step = micro, c.global_batch = s->global_batch, c.rank_first = s->rank_first;
        TRY(loader_start(&f->loader, &s->train, &c));
    }
    f->loader_at = micro + 1;
    return loader_next(f->loader, images, &labels);
}

/* restart_codes where the latents of the last forward are spread over ranks: the one that has the latent which is picked
 * hands it to the others. */
static Err restart_everywhere(Stage *s) {
    const VqganConfig *c = vqgan_config(s->vqgan);
    const size_t latents = s->batch * s->N;
    const real *z;
    real *latent;
    if (ranks() == 1) return restart_codes(s->vqgan, s->first.usage, s->batch, s->N, s->set.seed, s->step), OK;
    TRY(ranks_agree(mem_alloc(&latent, c->embed_dim, sizeof *latent, "a latent")));
    vqgan_latents(s->vqgan, &z, NULL, NULL);
    Err e = OK;
    for (size_t code = 0; e == OK && code < c->n_embed; code++) {
        if (s->first.usage[code]) continue;
        const size_t pick = restart_pick(s->set.seed, s->step, code, s->global_batch * s->N), owner = pick / latents;
        const size_t b = pick % latents / s->N, i = pick % s->N;
        for (size_t d = 0; d < c->embed_dim && owner == rank(); d++) latent[d] = z[(b * c->embed_dim + d) * s->N + i];
        e = ranks_broadcast(owner, latent, c->embed_dim * sizeof *latent);
        if (e == OK) restart_code(s->vqgan, code, latent, 1);
    }
    free(latent);
    return e;
}

/* Codes that no latent chose for a while are put where latents are, until the last fifth of the run settles them. */
Err first_after_step(Stage *s) {
    TRY(gan_after_step(s));
    if (!s->set.restart_codes || s->step % s->set.restart_codes) return OK;
    if (s->step >= s->set.steps - s->set.steps / 5) return OK;
    if (ranks() > 1) TRY(ranks_sum_counts(s->first.usage, vqgan_config(s->vqgan)->n_embed));
    TRY(restart_everywhere(s));
    if (rank() > 0) memset(s->first.usage, 0, vqgan_config(s->vqgan)->n_embed * sizeof *s->first.usage);
    return OK;
}

/* ------------------------------------------------------------------------------------------------------------
 * Evaluation and picture
 * ---------------------------------------------------------------------------------------------------------- */

Err first_evaluate(Stage *s, Metrics *out) {
    LoaderConfig c = {.prep = s->prep, .B = s->batch < s->val.n ? s->batch : s->val.n, .size = s->size};
    Loader *l = NULL;
    Err e = loader_start(&l, &s->val, &c);
    size_t batches = s->val.n / c.B < 32 ? s->val.n / c.B : 32;
    const size_t n_embed = vqgan_config(s->vqgan)->n_embed;
    memset(out, 0, sizeof *out);
    memset(s->first.val_usage, 0, n_embed * sizeof *s->first.val_usage);
    for (size_t i = 0; e == OK && i < batches; i++) {
        const real *images, *xrec;
        const int32_t *labels, *raw;
        double l1, l2, codebook, perceptual = 0;
        e = loader_next(l, &images, &labels);
        if (e == OK) e = vqgan_forward(s->vqgan, images, c.B, s->size, s->size, &xrec, &codebook);
        if (e == OK) e = add_perceptual(s, images, xrec, c.B, 0, &perceptual, NULL);
        if (e != OK) break;
        image_loss(images, xrec, c.B * 3 * s->size * s->size, 0, 0, &l1, &l2, NULL);
        vqgan_latents(s->vqgan, NULL, NULL, &raw);
        for (size_t k = 0; k < c.B * s->N; k++) s->first.val_usage[raw[k]]++;
        out->part[0] += l1 / (double)batches;
        out->part[1] += l2 / (double)batches;
        out->perceptual += perceptual / (double)batches;
        out->loss += (s->set.l1_weight * l1 + s->set.l2_weight * l2 + s->set.codebook_weight * codebook +
                      s->first.perceptual_weight * perceptual) /
                     (double)batches;
    }
    out->codes = code_use(s->first.val_usage, n_embed);
    loader_stop(l);
    return e;
}

/* Held-out pictures above their reconstructions. */
Err first_picture(Stage *s, const char *path) {
    enum { COLUMNS = 8 };
    const Dataset *from = s->val.n ? &s->val : &s->train; /* a small set holds nothing out */
    size_t n = min_size(from->n, COLUMNS), pixels = 3 * s->size * s->size;
    if (n > s->batch) n = s->batch;
    real *rows = NULL;
    Loader *l = NULL;
    Image im = {0};
    LoaderConfig c = {.prep = s->prep, .B = n, .size = s->size};
    const real *images, *xrec;
    const int32_t *labels;
    double codebook;
    TRY(mem_alloc(&rows, 2 * n * pixels, sizeof *rows, "picture"));
    Err e = loader_start(&l, from, &c);
    if (e == OK) e = loader_next(l, &images, &labels);
    if (e == OK) e = vqgan_forward(s->vqgan, images, n, s->size, s->size, &xrec, &codebook);
    if (e == OK) {
        memcpy(rows, images, n * pixels * sizeof *rows);
        memcpy(rows + n * pixels, xrec, n * pixels * sizeof *rows);
        e = image_grid(&im, rows, 2 * n, s->size, s->size, n, 2);
    }
    if (e == OK) e = image_write_png(path, &im, &s->recipe);
    loader_stop(l);
    image_free(&im);
    free(rows);
    return e;
}

/* ------------------------------------------------------------------------------------------------------------
 * Building
 * ---------------------------------------------------------------------------------------------------------- */

static Err first_plan(Stage *s) {
    const size_t pixels = 3 * s->size * s->size, n_embed = vqgan_config(s->vqgan)->n_embed;
    FirstStage *f = &s->first;
    TRY(vqgan_plan(s->vqgan, s->batch, s->size, s->size, 1));
    TRY(plan_perceptual(s));
    TRY(gan_plan(s));
    TRY(mem_alloc(&f->dxrec, s->batch, pixels * sizeof *f->dxrec, "reconstruction gradient"));
    TRY(mem_alloc(&f->usage, n_embed, sizeof *f->usage, "code usage"));
    return mem_alloc(&f->val_usage, n_embed, sizeof *f->val_usage, "code usage");
}

/* The codes that are tokens: from the recipe's remap, once; a run that goes on has them in its state. They are not trained,
 * but written beside the weights. */
static Err read_codes(Stage *s, const VqganConfig *c) {
    FirstStage *f = &s->first;
    if (c->re_embed && !c->remap[0] && !config_get(&s->recipe, "train.", "step"))
        return config_err(
            &s->recipe, "model.params.", "re_embed",
            "model.params.re_embed %zu: is how many codes model.params.remap FILE.npy lists; --remap counts "
            "those that the pictures use",
            c->re_embed);
    if (!c->remap[0]) return OK;
    if (s->set.remap)
        return config_err(&s->recipe, "model.params.", "remap",
                          "--remap beside model.params.remap %s: both say which codes are tokens", c->remap);
    TRY(remap_file(&f->used, &f->n_used, c->remap, c->n_embed));
    return config_set(&s->recipe, "model.params.re_embed", "%zu", f->n_used);
}

Err first_check(Stage *s, VqganConfig *c) {
    TRY(first_stage_config(c, &s->recipe, NULL, NULL));
    TRY(read_codes(s, c));
    if (c->resolution % ((size_t)1 << (c->levels - 1)))
        return config_err(
            &s->recipe, "model.params.", "ddconfig.resolution",
            "model.params.ddconfig.resolution is %zu, expected a multiple of %zu: with %zu levels it would be "
            "reconstructed smaller than it is, which can be drawn from, but not be trained",
            c->resolution, (size_t)1 << (c->levels - 1), c->levels);
    VqganConfig all = *c; /* codes are trained, whether they are tokens or not */
    all.re_embed = 0, all.remap[0] = 0;
    TRY(vqgan_create(&s->vqgan, &all, 0));
    s->params = vqgan_params(s->vqgan);
    s->size = c->resolution;
    TRY(prep_size_check(&s->recipe, s->size));
    s->h = s->w = s->size >> (c->levels - 1);
    s->N = s->h * s->w;
    return gan_check(s);
}

Err first_build(Stage *s) {
    VqganConfig c;
    size_t plan = 0, tables = 0; /* bytes where it computes; of other networks' parameters, which the host has too */
    TRY(first_check(s, &c));
    if (s->first.used && !s->has_state) TRY(say_repeated(s, c.remap, s->first.used, s->first.n_used));
    s->params->precision = s->precision;
    if (s->set.cuda) TRY(vqgan_use_cuda(s->vqgan, s->precision));
    TRY(vqgan_plan_bytes(s->vqgan, s->batch, s->size, s->size, 1, &plan));
    TRY(open_perceptual(s, &plan, &tables));
    TRY(gan_create(s));
    TRY(gan_plan_bytes(s, &plan, &tables));
    if (s->set.cuda) TRY(check_gpu_memory(s, plan + tables));
    s->memory.pictures = loader_bytes(s->train.n + s->val.n, 2 * s->batch, s->size); /* of both sides */
    TRY(check_memory(s, 4, s->set.cuda ? tables : plan + tables, s->batch, 3 * s->size * s->size));
    return first_plan(s);
}

void first_free(Stage *s) {
    FirstStage *f = &s->first;
    loader_stop(f->loader);
    gan_free(s);
    perceptual_free(f->perceptual);
    void *buffers[] = {f->dxrec, f->usage, f->val_usage, f->used};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
}

/* ------------------------------------------------------------------------------------------------------------
 * State and log
 * ---------------------------------------------------------------------------------------------------------- */

/* An official checkpoint has the discriminator too. */
Err first_start_from(Stage *s, const Checkpoint *ck) {
    TRY(params_load(s->params, ck, 'v', ""));
    TRY(first_stage_known(s->params, ck, ""));
    return gan_start_from(s, ck);
}

static void clear_usage(Stage *s) {
    memset(s->first.usage, 0, vqgan_config(s->vqgan)->n_embed * sizeof *s->first.usage);
}

/* The counts of all ranks become the first's. */
Err first_gather(Stage *s, int counts_alone) {
    if (!counts_alone) TRY(gan_gather(s));
    if (ranks() == 1) return OK;
    TRY(ranks_sum_counts(s->first.usage, vqgan_config(s->vqgan)->n_embed));
    if (rank() > 0) clear_usage(s);
    return OK;
}

static const char CODES[] = "quantize.used";

static Err add_codes(const Stage *s, TensorList *list) {
    const FirstStage *f = &s->first;
    return f->used ? tensor_list_add(list, CODES, DT_I64, 1, &f->n_used, f->used, 0) : OK;
}

/* From a state, whether or not the recipe's file is still there */
static Err load_codes(Stage *s, const Checkpoint *ck) {
    FirstStage *f = &s->first;
    const Tensor *x = checkpoint_find(ck, CODES);
    if (!x) return OK;
    free(f->used);
    f->used = NULL;
    TRY(mem_alloc(&f->used, x->size, sizeof *f->used, "codes that are tokens"));
    f->n_used = x->size;
    if (x->dtype != DT_I64) return err("%s: %s is %s, expected I64", ck->path, CODES, dtype_name(x->dtype));
    memcpy(f->used, x->data, x->size * sizeof *f->used);
    return OK;
}

Err first_collect(Stage *s, TensorList *list) {
    const size_t n = vqgan_config(s->vqgan)->n_embed;
    TRY(gan_collect_state(s, list));
    TRY(add_codes(s, list));
    return tensor_list_add(list, "usage", DT_I32, 1, &n, s->first.usage, 0);
}

Err first_load(Stage *s, const Checkpoint *ck) {
    TRY(gan_load_state(s, ck));
    TRY(load_codes(s, ck));
    TRY(checkpoint_ints(ck, "usage", vqgan_config(s->vqgan)->n_embed, (int32_t *)s->first.usage));
    if (rank() > 0) clear_usage(s);
    return OK;
}

Err first_collect_weights(Stage *s, TensorList *list) {
    TRY(add_codes(s, list));
    return tensor_list_params(list, s->params, 'v', "", s->store);
}

/* Pixels span 2, so PSNR = 10 log10(4 / mean square error). */
static double psnr(const Metrics *m) {
    return 10 * log10(4 / m->part[1]);
}

/* disc_loss, g_loss, d_weight, lpips, val_lpips, codes, perplexity, val_codes, val_perplexity, val_psnr */
int first_log(const Stage *s, char *text, size_t size, const Metrics *m, const Metrics *val) {
    char gan[128], lpips[32] = "", val_lpips[32] = "", codes[128], quality[32] = "";
    gan_log(s, gan, sizeof gan);
    if (s->first.perceptual) snprintf(lpips, sizeof lpips, "%.6g", m->perceptual);
    if (s->first.perceptual && val) snprintf(val_lpips, sizeof val_lpips, "%.6g", val->perceptual);
    log_codes(s, codes, sizeof codes, val);
    if (val) snprintf(quality, sizeof quality, "%.4f", psnr(val));
    return snprintf(text, size, "%s\t%s\t%s%s\t%s", gan, lpips, val_lpips, codes, quality);
}

void first_print_evaluation(const Stage *s, FILE *to, const Metrics *val, const Metrics *ema) {
    (void)ema;
    fprintf(to, "%s step %llu: validation loss %.4f, L1 %.4f, PSNR %.2f dB (20: blurred, 25: fair, 30: good)", s->name,
            (unsigned long long)s->step, val->loss, val->part[0], psnr(val));
    if (s->first.perceptual) fprintf(to, ", LPIPS %.4f", val->perceptual);
    print_codes(s, to, &val->codes);
    fprintf(to, "\n");
}
