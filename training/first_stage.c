/* first_stage.c - ./train --vqgan: images -> codes -> reconstructions. One micro batch, an evaluation, a picture; the
 * mathematics is in vqgan.c. */
#include "training/stage.h"

#include <stdlib.h>
#include <string.h>

#define BOTH "models/lpips/lpips.safetensors"
#define VGG16 "models/lpips/vgg16-397923af.pth"
#define LINS "models/lpips/vgg.pth"

static int given(const char *files) { /* "none" says that none are wanted */
    return files && strcmp(files, "none") != 0;
}

/* What the user named; else what the run or the recipe did; else what is there. */
static const char *choose_files(const Stage *s) {
    const char *recorded = config_get(&s->settings, "train.", "perceptual");
    if (s->opt->perceptual) return s->opt->perceptual;
    if (recorded) return recorded;
    if (file_exists(BOTH)) return BOTH;
    return file_exists(VGG16) && file_exists(LINS) ? VGG16 "," LINS : "none";
}

static void say_without(const Stage *s) {
    if (config_get(&s->settings, "train.", "step")) {
        note("perceptual loss: trained without it, as the run began\n");
        return;
    }
    const int vgg16 = file_exists(VGG16), lins = file_exists(LINS);
    note("perceptual loss: trained without it: %s; make lpips fetches them (torchvision's vgg16-397923af.pth, LPIPS's "
         "vgg.pth), or --perceptual FILE[,FILE]\n",
         vgg16  ? "there is no " LINS
         : lins ? "there is no " VGG16
                : "there are no weights in models/lpips");
}

/* files: one path, or two between which is a comma */
static Err open_files(Checkpoint ck[2], size_t *n, const char *files) {
    char path[2][1024];
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

static Err load(Perceptual **p, const char *files) {
    const PerceptualConfig c = perceptual_vgg16();
    Checkpoint ck[2];
    size_t n = 0;
    memset(ck, 0, sizeof ck);
    TRY(perceptual_create(p, &c));
    Err e = open_files(ck, &n, files);
    if (e == OK) e = perceptual_load(*p, ck, n);
    for (size_t i = 0; i < n && e == OK; i++) note("%s: weights of LPIPS\n", ck[i].path);
    for (size_t i = 0; i < n; i++) checkpoint_close(&ck[i]);
    return e;
}

static Err read_weight(Stage *s) {
    const char *target = config_get(&s->settings, "model.params.lossconfig.", "target");
    s->w_perceptual = given(s->opt->perceptual) || (target && strstr(target, "LPIPS"));
    return config_real(&s->w_perceptual, &s->settings, "model.params.lossconfig.params.", "perceptual_weight", 0, 1e6,
                       1);
}

Err open_perceptual(Stage *s, size_t *plan, size_t *tables) {
    size_t features = 0;
    TRY(read_weight(s));
    if (s->w_perceptual == 0)
        return given(s->opt->perceptual) ? err("--perceptual: the recipe's perceptual_weight is 0") : OK;
    char files[2 * 1024 + 2];
    if ((size_t)snprintf(files, sizeof files, "%s", choose_files(s)) >= sizeof files)
        return err("--perceptual: a path is too long");
    TRY(config_set(&s->settings, "train.perceptual", "%s", files));
    if (!given(files)) {
        s->w_perceptual = 0;
        if (!s->opt->perceptual) say_without(s);
        return OK;
    }
    TRY(config_set(&s->settings, "model.params.lossconfig.params.perceptual_weight", "%.17g", s->w_perceptual));
    TRY(load(&s->perceptual, files));
    note("perceptual loss: LPIPS, weight %g\n", s->w_perceptual);
    if (s->opt->cuda) TRY(perceptual_use_cuda(s->perceptual, gpu_precision(s)));
    TRY(perceptual_plan_bytes(s->perceptual, s->batch, s->size, s->size, 1, &features));
    *plan += features;
    *tables += perceptual_params(s->perceptual)->total * sizeof(real);
    return OK;
}

Err plan_perceptual(Stage *s) {
    if (!s->perceptual) return OK;
    TRY(perceptual_plan(s->perceptual, s->batch, s->size, s->size, 1));
    return params_send(perceptual_params(s->perceptual));
}

Err add_perceptual(Stage *s, const real *images, const real *xrec, size_t B, double weight, double *mean, real *dxrec) {
    *mean = 0;
    if (!s->perceptual) return OK;
    return perceptual_loss(s->perceptual, images, xrec, B, s->size, s->size, weight * s->w_perceptual, mean, dxrec);
}

Err convert_perceptual(const char *files, const char *out) {
    Perceptual *p = NULL;
    TensorList list = {0};
    Err e = load(&p, files);
    if (e == OK) e = tensor_list_params(&list, perceptual_params(p), 'v', "", DT_F32);
    if (e == OK) e = checkpoint_write(out, list.tensor, list.from_real, list.n, NULL);
    tensor_list_free(&list);
    perceptual_free(p);
    return e;
}

/* The loader counts for itself; it starts anew where the next micro batch is not the one after the last: at first,
 * after one that is left out, after going back to a checkpoint. */
static Err next_pictures(Stage *s, uint64_t micro, const real **images, const int32_t **labels) {
    LoaderConfig c = {.prep = s->prep, .B = s->batch, .size = s->size, .seed = s->seed, .train = 1, .flip = s->flip};
    if (!s->loader || s->loader_at != micro) {
        loader_stop(s->loader);
        s->loader = NULL;
        c.step = micro, c.of = s->of, c.first = s->first;
        TRY(loader_start(&s->loader, &s->train, &c));
    }
    s->loader_at = micro + 1;
    return loader_next(s->loader, images, labels);
}

static Err vqgan_micro_batch(Stage *s, uint64_t micro, Metrics *out) {
    const real *images, *xrec;
    const int32_t *labels, *raw;
    double codebook;
    size_t n = s->batch * 3 * s->size * s->size, codes = s->batch * s->N;
    TRY(next_pictures(s, micro, &images, &labels));
    TRY(vqgan_forward(s->vqgan, images, s->batch, s->size, s->size, &xrec, &codebook));
    image_loss(images, xrec, n, s->w_l1 / s->shares, s->w_l2 / s->shares, &out->part[0], &out->part[1], s->dxrec);
    TRY(add_perceptual(s, images, xrec, s->batch, 1 / s->shares, &out->perceptual, s->dxrec));
    out->loss = s->w_l1 * out->part[0] + s->w_l2 * out->part[1] + s->w_perceptual * out->perceptual;
    TRY(gan_generator(s, images, xrec, &out->loss));
    out->loss += s->w_codebook * codebook;
    vqgan_latents(s->vqgan, NULL, NULL, &raw);
    count_codes(s, raw, codes);
    TRY(vqgan_backward(s->vqgan, s->dxrec, s->w_codebook / s->shares, NULL));
    return gan_discriminator(s, xrec, &out->loss);
}

/* vqgan_restart_codes where the latents of the last forward are spread over ranks: the one that has the latent which is
 * picked hands it to the others. */
static Err restart_codes(Stage *s) {
    const VqganConfig *c = vqgan_config(s->vqgan);
    const size_t latents = s->batch * s->N;
    const real *z;
    real *latent;
    if (ranks() == 1) return vqgan_restart_codes(s->vqgan, s->usage, s->seed, s->step), OK;
    TRY(ranks_agree(params_fetch(s->params)));
    TRY(ranks_agree(mem_alloc(&latent, c->embed_dim, sizeof *latent, "a latent")));
    vqgan_latents(s->vqgan, &z, NULL, NULL);
    Err e = OK;
    for (size_t code = 0; e == OK && code < c->n_embed; code++) {
        if (s->usage[code]) continue;
        const size_t pick = vqgan_restart_pick(s->seed, s->step, code, s->of * s->N), owner = pick / latents;
        const size_t b = pick % latents / s->N, i = pick % s->N;
        for (size_t d = 0; d < c->embed_dim && owner == rank(); d++) latent[d] = z[(b * c->embed_dim + d) * s->N + i];
        e = ranks_broadcast(owner, latent, c->embed_dim * sizeof *latent);
        if (e == OK) vqgan_restart_code(s->vqgan, code, latent);
    }
    free(latent);
    return e == OK ? ranks_agree(params_send(s->params)) : e;
}

/* Codes that no latent chose for a while are put where latents are, until the last fifth of the run settles them. */
static Err vqgan_after_step(Stage *s, const char **bad) {
    TRY(gan_after_step(s, bad));
    if (*bad) return OK;
    if (!s->restart_every || s->step % s->restart_every) return OK;
    if (s->step >= s->steps - s->steps / 5) return OK;
    if (ranks() > 1) TRY(ranks_sum_counts(s->usage, vqgan_config(s->vqgan)->n_embed));
    TRY(restart_codes(s));
    if (rank() > 0) memset(s->usage, 0, vqgan_config(s->vqgan)->n_embed * sizeof *s->usage);
    return OK;
}

static Err vqgan_evaluate(Stage *s, Metrics *out) {
    LoaderConfig c = {.prep = s->prep, .B = s->batch < s->val.n ? s->batch : s->val.n, .size = s->size};
    Loader *l = NULL;
    Err e = loader_start(&l, &s->val, &c);
    size_t batches = s->val.n / c.B < 32 ? s->val.n / c.B : 32;
    const size_t n_embed = vqgan_config(s->vqgan)->n_embed;
    memset(out, 0, sizeof *out);
    memset(s->val_usage, 0, n_embed * sizeof *s->val_usage);
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
        for (size_t k = 0; k < c.B * s->N; k++) s->val_usage[raw[k]]++;
        out->part[0] += l1 / (double)batches;
        out->part[1] += l2 / (double)batches;
        out->perceptual += perceptual / (double)batches;
        out->loss +=
            (s->w_l1 * l1 + s->w_l2 * l2 + s->w_codebook * codebook + s->w_perceptual * perceptual) / (double)batches;
    }
    out->codes = code_use(s->val_usage, n_embed);
    loader_stop(l);
    return e;
}

/* Held-out pictures above their reconstructions. */
static Err vqgan_picture(Stage *s, const char *path) {
    enum { COLUMNS = 8 };
    size_t n = s->val.n < COLUMNS ? s->val.n : COLUMNS, pixels = 3 * s->size * s->size;
    if (n > s->batch) n = s->batch;
    real *rows = NULL;
    Loader *l = NULL;
    Image im = {0};
    LoaderConfig c = {.prep = s->prep, .B = n, .size = s->size};
    const real *images, *xrec;
    const int32_t *labels;
    double codebook;
    TRY(mem_alloc(&rows, 2 * n * pixels, sizeof *rows, "picture"));
    Err e = loader_start(&l, &s->val, &c);
    if (e == OK) e = loader_next(l, &images, &labels);
    if (e == OK) e = vqgan_forward(s->vqgan, images, n, s->size, s->size, &xrec, &codebook);
    if (e == OK) {
        memcpy(rows, images, n * pixels * sizeof *rows);
        memcpy(rows + n * pixels, xrec, n * pixels * sizeof *rows);
        e = image_grid(&im, rows, 2 * n, s->size, s->size, n, 2);
    }
    if (e == OK) e = image_write_png(path, &im, &s->settings);
    loader_stop(l);
    image_free(&im);
    free(rows);
    return e;
}

Err vqgan_stage(Stage *s) {
    VqganConfig c;
    TRY(vqgan_config_read(&c, &s->settings, "model.params."));
    TRY(vqgan_create(&s->vqgan, &c, 0));
    s->params = vqgan_params(s->vqgan);
    s->size = c.resolution;
    s->h = s->w = s->size >> (c.levels - 1);
    s->N = s->h * s->w;
    if (s->train.n == 0) return OK;
    size_t plan = 0,
           tables = 0; /* bytes where it computes; of tables beside the first stage's, which the host has too */
    if (s->opt->cuda) TRY(vqgan_use_cuda(s->vqgan, gpu_precision(s)));
    TRY(vqgan_plan_bytes(s->vqgan, s->batch, s->size, s->size, 1, &plan));
    TRY(open_perceptual(s, &plan, &tables));
    TRY(gan_create(s));
    TRY(gan_plan_bytes(s, &plan, &tables));
    if (s->opt->cuda) TRY(check_gpu_memory(s, plan + tables));
    TRY(check_memory(s, 4, s->opt->cuda ? tables : plan + tables, s->batch, 3 * s->size * s->size));
    TRY(vqgan_plan(s->vqgan, s->batch, s->size, s->size, 1));
    TRY(plan_perceptual(s));
    TRY(gan_plan(s));
    TRY(mem_alloc(&s->dxrec, s->batch * 3 * s->size, s->size * sizeof *s->dxrec, "reconstruction gradient"));
    TRY(mem_alloc(&s->usage, c.n_embed, sizeof *s->usage, "code usage"));
    TRY(mem_alloc(&s->val_usage, c.n_embed, sizeof *s->val_usage, "code usage"));
    s->micro_batch = vqgan_micro_batch;
    s->evaluate = vqgan_evaluate;
    s->picture = vqgan_picture;
    s->after_step = vqgan_after_step;
    return OK;
}
