/* train_perceptual.c - LPIPS in the training of a first stage: is it wanted, where are its weights, what is its part of
 * the loss. The mathematics is in perceptual.c.
 *
 * It is wanted where the recipe says so, in the official words: model.params.lossconfig.params.perceptual_weight above
 * 0, or a lossconfig.target that speaks of LPIPS (then 1), or --perceptual. The weights are files of other people's:
 * those of --perceptual, else those in models/lpips; without any, the run says so and goes on without. Whatever a run
 * begins with is kept in its settings (that weight, train.perceptual), so that --resume cannot change the loss
 * unnoticed. */
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
    note("perceptual loss: trained without it: %s; torchvision's vgg16-397923af.pth and LPIPS's vgg.pth go to "
         "models/lpips, or --perceptual FILE[,FILE]\n",
         vgg16  ? "there is no " LINS
         : lins ? "there is no " VGG16
                : "there are no weights in models/lpips");
}

/* The published files are known by their numbers; others may be right too, so they are only shown. */
static Err say_file(const Checkpoint *ck) {
    static const char vgg16_sha256[] = "397923af", lins_md5[] = "d507d7349b931f0638a25a48a722f98a";
    char text[DIGEST_TEXT_BYTES];
    const int vgg16 = checkpoint_find(ck, "features.0.weight") != NULL;
    const int lins = checkpoint_find(ck, "lin0.model.1.weight") && !checkpoint_find(ck, "net.slice1.0.weight");
    TRY(file_digest(text, ck->path, lins ? DIGEST_MD5 : DIGEST_SHA256));
    note("%s: %s %s", ck->path, lins ? "MD5" : "SHA-256", text);
    if (vgg16 && strncmp(text, vgg16_sha256, 8))
        note(", not torchvision's VGG16, which is %s...", vgg16_sha256);
    else if (lins && strcmp(text, lins_md5))
        note(", not LPIPS's vgg.pth, which is %s", lins_md5);
    else if (vgg16 || lins)
        note(vgg16 ? ", torchvision's VGG16" : ", LPIPS's vgg.pth");
    note("\n");
    return OK;
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
    for (size_t i = 0; i < n && e == OK; i++) e = say_file(&ck[i]);
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
