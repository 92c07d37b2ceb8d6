/* golden.c - runs the golden cases: tiny models with what the official implementation computes with them.
 *
 *     test/golden DIR...                every case folder under DIR
 *     test/golden --selftest DIR...     the same with falsified expectations: nothing may pass
 *     test/golden --device cuda DIR...  all of it on the GPU, in float
 *     test/golden --precision P DIR...  products of bf16x3, with the same tolerances, or of bf16
 *
 * A case is a folder with config.txt (the official configuration), model.ckpt (a checkpoint of the official training)
 * or else model.safetensors (its state dict), io.safetensors (inputs in.*, expectations everything else), or with
 * schedules.json. Which kind it is tell model.target and the tensors that are there:
 *
 *     first stage    VQGANWrapper: latents, codes, reconstructions, losses, gradients; pictures of further sizes
 *     adversarial    the same with grad_g.* and grad_d.*: a generator's and a discriminator's pass, with the losses,
 *                    weights and first step of the configuration, at the global_step that the case states
 *     transition     DenoisingXTransformer, DecoderOnlyDenoiser: posterior, logits, losses, gradients, decoding
 *     training       the same with final.*: losses, learning rates, parameters and EMA after some optimizer steps
 *     encodings      one transition as several checkpoints: logits, EMA's logits, a decoded latent of each
 *     schedules      betas, alphats, alphacum
 *
 * One line per comparison, with its largest error as a fraction of the tolerance. What fails: an error beyond its
 * tolerance, NaN, an expectation that is not there, an expectation that nobody looked at, a case of an unknown kind,
 * having compared nothing. The last line counts comparisons: "N passed, N failed"; exit status 1 if any failed.
 *
 * Read from the bottom: main, run_folder, run_case, then the kind you are interested in; golden.h compares. */
#include "test/first_stage.h"
#include "test/golden.h"

#include <dirent.h>

/* ---- First stage ---- */

/* Opens the VQGAN whose tensors are prefixed `tensors` and whose configuration is under `keys`. */
static Err open_vqgan(Case *c, Vqgan **v, const char *tensors, const char *keys, int honour_tanh) {
    VqganConfig config;
    char used[NAME_MAX_BYTES];
    TRY(vqgan_config_read(&config, &c->config, keys));
    snprintf(used, sizeof used, "%squantize.used", tensors);
    const Tensor *table = checkpoint_find(&c->model, used);
    if (!table && config_get(&c->config, keys, "remap")) return err("%s has no tensor %s", c->model.path, used);
    config.re_embed = table ? table->size : 0;
    TRY(vqgan_create(v, &config, honour_tanh));
    vqgan_params(*v)->precision = precision;
    TRY(params_plan(vqgan_params(*v), PLAN_VALUE | PLAN_GRAD));
    TRY(vqgan_load(*v, &c->model, tensors));
    if (on_cuda) TRY(vqgan_use_cuda(*v, PRECISION_F32));
    return params_send(vqgan_params(*v));
}

typedef struct {
    const char *suffix; /* of the names: "" for in.image and what is computed from it, "_x0" for in.image_x0 ... */
    size_t B, H, W, h, w, N, pixels, latents; /* pixels, latents: elements of the whole batch */
    size_t out_H, out_W, out;                 /* of what the decoder makes; out: elements of the whole batch */
    real *image;
} Pictures;

typedef struct {
    char s[NAME_MAX_BYTES + 40];
} FullName;

static FullName of_pictures(const char *name, const Pictures *p) {
    FullName full;
    snprintf(full.s, sizeof full.s, "%s%s", name, p->suffix);
    return full;
}

/* in.image<suffix>; sides that the levels do not divide lose their last row or column at each halving. */
static Err open_pictures(Case *c, Pictures *p, const Vqgan *v, const char *suffix) {
    const VqganConfig *config = vqgan_config(v);
    const size_t halvings = config->levels - 1;
    const Tensor *x;
    p->suffix = suffix;
    const FullName name = of_pictures("in.image", p);
    TRY(io_tensor(c, name.s, &x));
    if (x->ndim != 4 || x->dim[1] != config->in_channels)
        return err("%s is not (B,%zu,H,W)", name.s, config->in_channels);
    p->B = x->dim[0], p->H = x->dim[2], p->W = x->dim[3];
    p->h = p->H >> halvings, p->w = p->W >> halvings, p->N = p->h * p->w;
    p->latents = p->B * p->N * config->embed_dim;
    p->out_H = p->h << halvings, p->out_W = p->w << halvings;
    p->out = p->B * config->out_ch * p->out_H * p->out_W;
    return io_reals(c, name.s, &p->image, &p->pixels);
}

/* The tokens against the expectation `name`. A code outside the remap table is any token there: the official code draws
 * one. */
static Err check_codes(Case *c, const Vqgan *v, const char *name, const char *label, const int32_t *raw,
                       int32_t *tokens, size_t n) {
    const int32_t *used = vqgan_used(v);
    int32_t K = (int32_t)vqgan_K(v), *want;
    TRY(io_tokens(c, name, &want, n));
    for (size_t i = 0; used && i < n; i++) {
        int known = 0;
        for (int32_t k = 0; k < K; k++) known |= used[k] == raw[i];
        int both_drawn = tokens[i] >= 0 && tokens[i] < K && want[i] >= 0 && want[i] < K;
        if (!known && both_drawn) tokens[i] = want[i];
    }
    compare_tokens(c, label, tokens, want, n);
    return OK;
}

/* A batch's latents, codes and the picture made from the expected codes. Of a further batch what the case names. */
static Err vqgan_encoding(Case *c, Vqgan *v, const Pictures *p) {
    const FullName indices = of_pictures("out.indices", p), raw_indices = of_pictures("out.raw_indices", p);
    const FullName latents = of_pictures("out.prequant", p), looked_up = of_pictures("out.zq", p);
    const FullName drawn = of_pictures("out.dec_from_indices", p);
    const int all = !*p->suffix;
    real *prequant, *zq, *image;
    int32_t *raw, *tokens, *given;
    size_t n = p->B * p->N;
    TRY(case_reals(c, &prequant, p->latents));
    TRY(case_reals(c, &zq, p->latents));
    TRY(case_reals(c, &image, p->out));
    TRY(case_alloc(c, &raw, n, sizeof *raw));
    TRY(case_alloc(c, &tokens, n, sizeof *tokens));
    TRY(vqgan_encode(v, p->image, p->B, p->H, p->W, 1, prequant, raw, tokens));
    TRY(check_output(c, latents.s, latents.s, prequant, p->latents));
    if (all || has(c, raw_indices.s)) TRY(check_tokens(c, raw_indices.s, raw_indices.s, raw, n));
    if (!all && !has(c, indices.s)) return OK;
    TRY(check_codes(c, v, indices.s, indices.s, raw, tokens, n));
    TRY(io_tokens(c, indices.s, &given, n));
    TRY(first_stage_lookup(v, given, p->B, p->h * p->w, zq));
    if (all || has(c, looked_up.s)) TRY(check_output(c, looked_up.s, looked_up.s, zq, p->latents));
    if (!all && !has(c, drawn.s)) return OK;
    TRY(vqgan_decode_tokens(v, given, p->B, p->h, p->w, image));
    return check_output(c, drawn.s, drawn.s, image, p->out);
}

/* in.image_NAME, pictures of another size: out.prequant_NAME, and out.dec_NAME, the picture made from just that. */
static Err vqgan_other_sizes(Case *c, Vqgan *v) {
    static const char prefix[] = "in.image_";
    for (size_t i = 0; i < c->io.n; i++) {
        const char *name = c->io.tensor[i].name;
        Pictures p;
        real *given, *image;
        size_t n;
        if (strncmp(name, prefix, sizeof prefix - 1) != 0) continue;
        TRY(open_pictures(c, &p, v, name + sizeof prefix - 2));
        TRY(vqgan_plan(v, p.B, p.H, p.W, 0));
        TRY(vqgan_encoding(c, v, &p));
        const FullName latents = of_pictures("out.prequant", &p), drawn = of_pictures("out.dec", &p);
        TRY(io_reals(c, latents.s, &given, &n));
        if (n != p.latents) return err("%s has %zu elements, expected %zu", latents.s, n, p.latents);
        TRY(case_reals(c, &image, p.out));
        TRY(vqgan_decode(v, given, p.B, p.h, p.w, image));
        TRY(check_output(c, drawn.s, drawn.s, image, p.out));
    }
    return OK;
}

/* in.z and in.rand_indices through the decoder. */
static Err vqgan_decoding(Case *c, Vqgan *v, const Pictures *p) {
    const Tensor *x;
    int32_t *tokens;
    real *z, *image;
    size_t n;
    TRY(case_reals(c, &image, p->out));
    TRY(io_tokens(c, "in.rand_indices", &tokens, p->B * p->N));
    TRY(vqgan_decode_tokens(v, tokens, p->B, p->h, p->w, image));
    TRY(check_output(c, "out.dec_rand", "out.dec_rand", image, p->out));
    TRY(io_reals(c, "in.z", &z, &n));
    if (n != p->latents) return err("in.z has %zu elements, expected %zu", n, p->latents);
    TRY(vqgan_decode(v, z, p->B, p->h, p->w, image));
    TRY(check_output(c, "out.dec_z", "out.dec_z", image, p->out));
    x = checkpoint_find(&c->io, "out.dec_z_if_tanh");
    if (!x && !vqgan_config(v)->tanh_out) return OK;
    Vqgan *honest = NULL; /* a second one, which applies its tanh */
    Err e = open_vqgan(c, &honest, "", "model.params.", 1);
    if (e == OK) e = vqgan_plan(honest, p->B, p->H, p->W, 0);
    if (e == OK) e = vqgan_decode(honest, z, p->B, p->h, p->w, image);
    if (e == OK) e = check_output(c, "out.dec_z_if_tanh", "out.dec_z_if_tanh", image, p->out);
    vqgan_free(honest);
    return e;
}

/* In bf16: dxrec = L1's gradient at the expected reconstruction. It is a sign, which is another where picture and
 * reconstruction nearly meet. */
static Err at_expected(Case *c, const Pictures *p, real *dxrec) {
    real *xrec;
    double l1, l2;
    if (precision != PRECISION_BF16) return OK;
    TRY(io_expected(c, "out.xrec", &xrec, p->pixels));
    image_loss(p->image, xrec, p->pixels, 1, 0, &l1, &l2, dxrec);
    return OK;
}

static Err vqgan_training(Case *c, Vqgan *v, const Pictures *p) {
    const real *xrec, *z, *zq_st;
    const int32_t *raw;
    real *dxrec, *image;
    double codebook, l1, l2;
    TRY(vqgan_forward(v, p->image, p->B, p->H, p->W, &xrec, &codebook));
    vqgan_latents(v, &z, &zq_st, &raw);
    TRY(check_output(c, "out.prequant", "out.prequant (training)", z, p->latents));
    TRY(check_tokens(c, "out.raw_indices", "out.raw_indices (training)", raw, p->B * p->N));
    if (c->other_codes && falsify != RENAMED) return leave_out(c);
    TRY(check_output(c, "out.xrec", "out.xrec", xrec, p->pixels));
    TRY(check_output(c, "out.zq_st", "out.zq_st", zq_st, p->latents));
    TRY(check_scalar(c, "out.codebook_loss", codebook));
    TRY(case_reals(c, &dxrec, p->pixels));
    image_loss(p->image, xrec, p->pixels, 1, 0, &l1, &l2, dxrec);
    TRY(check_scalar(c, "out.loss_l1", l1));
    TRY(check_scalar(c, "out.loss", l1 + codebook));
    params_zero_grad(vqgan_params(v));
    TRY(at_expected(c, p, dxrec));
    TRY(vqgan_backward(v, dxrec, 1, NULL));
    TRY(check_gradients(c, vqgan_params(v), ""));
    real *given; /* the straight-through latents, as the official forward decodes them */
    size_t n;
    TRY(io_reals(c, "out.zq_st", &given, &n));
    TRY(case_reals(c, &image, p->pixels));
    TRY(vqgan_decode(v, given, p->B, p->h, p->w, image));
    return check_output(c, "out.xrec", "out.xrec (decoded from out.zq_st)", image, p->pixels);
}

static Err run_vqgan(Case *c) {
    Pictures p;
    c->times = BF16_STAGE;
    TRY(open_vqgan(c, &c->vqgan, "", "model.params.", 0));
    TRY(open_pictures(c, &p, c->vqgan, ""));
    /* Between a picture and a reconstruction of another shape there is no loss: the official code has none either. */
    const int trained = p.out == p.pixels && p.out_H == p.H;
    TRY(vqgan_plan(c->vqgan, p.B, p.H, p.W, trained));
    TRY(vqgan_encoding(c, c->vqgan, &p));
    TRY(vqgan_decoding(c, c->vqgan, &p));
    if (trained) TRY(vqgan_training(c, c->vqgan, &p));
    return vqgan_other_sizes(c, c->vqgan);
}

/* ---- First stage with a discriminator: a generator pass, then a discriminator pass, no update in between ---- */

static Err check_gradient(Case *c, const char *name, const real *got, size_t n) {
    real *want;
    if (io_expected(c, name, &want, n) != OK) return absent(c, name);
    compare_gradient(c, name, got, want, n);
    return OK;
}

/* Of the rows that are trained the gradients, `buffers`: of the others the values. */
static Err check_rows(Case *c, Params *p, const char *prefix, int buffers) {
    char name[NAME_MAX_BYTES + 40];
    TRY(params_fetch(p));
    for (size_t r = 0; r < p->n; r++) {
        const Param *row = &p->row[r];
        snprintf(name, sizeof name, "%s%s", prefix, row->name);
        if (row->untrained != buffers) continue;
        TRY(buffers ? check_output(c, name, name, row->value, row->size)
                    : check_gradient(c, name, row->grad, row->size));
    }
    if (!buffers) compare_gradients(c, prefix);
    return OK;
}

static const char loss_keys[] = "model.params.lossconfig.params.";

typedef struct {
    DiscLoss kind;
    double factor; /* disc_factor, or 0 before disc_start */
    double disc_weight, codebook_weight;
} AdversarialLoss;

/* The step whose losses the case holds: io.safetensors says it, else the checkpoint, else it must not matter. */
static Err case_step(const Case *c, double start, double *step) {
    const Config *from = config_get(&c->io.meta, "", "global_step") ? &c->io.meta : &c->model.meta;
    *step = 0;
    if (start > 0 && !config_get(from, "", "global_step"))
        return err("disc_start is %g, but the case does not say at which global_step it is", start);
    return config_real(step, from, "", "global_step", 0, 1e15, 1);
}

/* What this program computes without: a case that needs it must not pass for lack of it. */
static Err refuse_loss_options(const Config *c) {
    double perceptual = 1;
    int conditional = 0, actnorm = 0;
    TRY(config_real(&perceptual, c, loss_keys, "perceptual_weight", 0, 1e6, 1));
    TRY(config_flag(&conditional, c, loss_keys, "disc_conditional", 1));
    TRY(config_flag(&actnorm, c, loss_keys, "use_actnorm", 1));
    if (perceptual != 0) return err("perceptual_weight is %g: cases with LPIPS are not known here", perceptual);
    return conditional || actnorm ? err("disc_conditional and use_actnorm are not known here") : OK;
}

static Err read_loss(const Case *c, AdversarialLoss *l) {
    const char *kind = config_get(&c->config, loss_keys, "disc_loss");
    double start = 0, step;
    *l = (AdversarialLoss){DISC_HINGE, 1, 1, 1};
    TRY(refuse_loss_options(&c->config));
    if (kind && strcmp(kind, "hinge") && strcmp(kind, "vanilla"))
        return err("disc_loss %s: expected hinge or vanilla", kind);
    if (kind && !strcmp(kind, "vanilla")) l->kind = DISC_VANILLA;
    TRY(config_real(&start, &c->config, loss_keys, "disc_start", 0, 1e15, 0));
    TRY(config_real(&l->factor, &c->config, loss_keys, "disc_factor", 0, 1e6, 1));
    TRY(config_real(&l->disc_weight, &c->config, loss_keys, "disc_weight", 0, 1e6, 1));
    TRY(config_real(&l->codebook_weight, &c->config, loss_keys, "codebook_weight", 0, 1e6, 1));
    TRY(case_step(c, start, &step));
    if (step < start) l->factor = 0;
    return OK;
}

static Err open_discriminator(Case *c, const Pictures *p) {
    DiscConfig config;
    TRY(disc_config_read(&config, &c->config, loss_keys));
    TRY(disc_create(&c->disc, &config));
    disc_params(c->disc)->precision = precision;
    TRY(params_plan(disc_params(c->disc), PLAN_VALUE | PLAN_GRAD));
    TRY(params_load(disc_params(c->disc), &c->model, 'v', ""));
    if (on_cuda) TRY(disc_use_cuda(c->disc, PRECISION_F32));
    TRY(params_send(disc_params(c->disc)));
    return disc_plan(c->disc, p->B, p->H, p->W, 0);
}

/* The share of the pictures' loss and of the generator's in the gradient of the decoder's last layer -> d_weight; dxrec,
 * dg: what each gives to the reconstruction. */
static Err generator_weight(Case *c, const AdversarialLoss *loss, const real *dxrec, const real *dg, double *weight) {
    const size_t last = vqgan_last_layer(c->vqgan)->size;
    real *dw, *db;
    TRY(case_reals(c, &dw, last));
    TRY(case_reals(c, &db, vqgan_config(c->vqgan)->out_ch));
    TRY(vqgan_last_gradient(c->vqgan, dxrec, dw, db));
    TRY(check_gradient(c, "out.nll_grad_last", dw, last));
    const double nll_norm = norm_of(dw, last);
    TRY(vqgan_last_gradient(c->vqgan, dg, dw, db));
    TRY(check_gradient(c, "out.g_grad_last", dw, last));
    *weight = adaptive_weight(nll_norm, norm_of(dw, last)) * loss->disc_weight;
    return check_scalar(c, "out.d_weight", *weight);
}

/* The autoencoder's loss on its reconstructions, and every gradient of it */
static Err generator_pass(Case *c, const AdversarialLoss *loss, const Pictures *p, const real *xrec, double codebook) {
    const size_t n = disc_logits(c->disc);
    const real *logits;
    real *dxrec, *dg, *dlogits;
    double l1, l2, weight;
    TRY(case_reals(c, &dxrec, p->pixels));
    TRY(case_reals(c, &dg, p->pixels));
    TRY(case_reals(c, &dlogits, n));
    TRY(disc_forward(c->disc, xrec, 1, &logits));
    TRY(check_output(c, "out.logits_fake_g", "out.logits_fake_g", logits, n));
    const double g = generator_loss(logits, n, 1, dlogits);
    TRY(check_scalar(c, "out.g_loss", g));
    image_loss(p->image, xrec, p->pixels, 1, 0, &l1, &l2, dxrec);
    TRY(check_scalar(c, "out.nll_loss", l1));
    TRY(at_expected(c, p, dxrec));
    TRY(disc_backward(c->disc, dlogits, 0, 0, dg));
    TRY(generator_weight(c, loss, dxrec, dg, &weight));
    TRY(check_scalar(c, "out.disc_factor", loss->factor));
    TRY(check_scalar(c, "out.aeloss", l1 + weight * loss->factor * g + loss->codebook_weight * codebook));
    generator_loss(logits, n, weight * loss->factor, dlogits);
    TRY(disc_backward(c->disc, dlogits, 0, 1, dg));
    for (size_t i = 0; i < p->pixels; i++) dxrec[i] += dg[i];
    TRY(vqgan_backward(c->vqgan, dxrec, loss->codebook_weight, NULL));
    TRY(check_rows(c, vqgan_params(c->vqgan), "grad_g.", 0));
    return check_rows(c, disc_params(c->disc), "grad_g.", 0);
}

static Err discriminator_pass(Case *c, const AdversarialLoss *l, const Pictures *p, const real *xrec) {
    const size_t n = disc_logits(c->disc);
    const real *logits;
    real *dlogits;
    TRY(case_reals(c, &dlogits, n));
    params_zero_grad(disc_params(c->disc));
    TRY(disc_forward(c->disc, p->image, 1, &logits));
    TRY(check_output(c, "out.logits_real_d", "out.logits_real_d", logits, n));
    double loss = disc_loss(l->kind, logits, n, 1, l->factor, dlogits);
    TRY(disc_backward(c->disc, dlogits, 0, 1, NULL));
    TRY(disc_forward(c->disc, xrec, 1, &logits));
    TRY(check_output(c, "out.logits_fake_d", "out.logits_fake_d", logits, n));
    loss += disc_loss(l->kind, logits, n, 0, l->factor, dlogits);
    TRY(disc_backward(c->disc, dlogits, 0, 1, NULL));
    TRY(check_scalar(c, "out.disc_loss", l->factor * loss));
    TRY(check_rows(c, disc_params(c->disc), "grad_d.", 0));
    return check_rows(c, disc_params(c->disc), "bn_after.", 1);
}

/* out.indices, as the model gives them: remapped where it has a table; out.raw_indices: before that. */
static Err check_adversarial_codes(Case *c, const Pictures *p) {
    const int32_t *raw, *used = vqgan_used(c->vqgan);
    const size_t n = p->B * p->N, K = vqgan_K(c->vqgan);
    int32_t *codes, *tokens;
    vqgan_latents(c->vqgan, NULL, NULL, &raw);
    TRY(case_alloc(c, &codes, n, sizeof *codes));
    TRY(case_alloc(c, &tokens, n, sizeof *tokens));
    for (size_t i = 0; i < n; i++) {
        codes[i] = raw[i];
        tokens[i] = used ? 0 : raw[i]; /* outside the table: any token */
        for (size_t k = K; used && k-- > 0;)
            if (used[k] == raw[i]) tokens[i] = (int32_t)k;
    }
    if (has(c, "out.raw_indices")) TRY(check_tokens(c, "out.raw_indices", "out.raw_indices", codes, n));
    return check_codes(c, c->vqgan, "out.indices", "out.indices", codes, tokens, n);
}

static Err run_adversarial(Case *c) {
    Pictures p;
    AdversarialLoss loss;
    const real *xrec;
    double codebook;
    c->times = BF16_KINKS;
    TRY(read_loss(c, &loss));
    TRY(open_vqgan(c, &c->vqgan, "", "model.params.", 0));
    TRY(open_pictures(c, &p, c->vqgan, ""));
    TRY(open_discriminator(c, &p));
    TRY(vqgan_plan(c->vqgan, p.B, p.H, p.W, 1));
    TRY(vqgan_forward(c->vqgan, p.image, p.B, p.H, p.W, &xrec, &codebook));
    TRY(check_adversarial_codes(c, &p));
    if (c->other_codes && falsify != RENAMED) return leave_out(c);
    TRY(check_output(c, "out.xrec", "out.xrec", xrec, p.pixels));
    TRY(check_scalar(c, "out.codebook_loss", codebook));
    TRY(generator_pass(c, &loss, &p, xrec, codebook));
    return discriminator_pass(c, &loss, &p, xrec);
}

/* ---- Transition ---- */

static const char keys[] = "model.params.";

typedef struct {
    Schedule schedule;
    size_t B, N, K;
    int32_t *x0, *x, *x_t, *t, *label; /* (B,N) x3, (B) x2; label NULL without classes */
} Tokenized;

static Err open_net(Case *c, Schedule *s) {
    NetConfig config;
    TRY(net_config_read(&config, &c->config, keys));
    TRY(transformer_create(&c->net, &config));
    if (on_cuda) TRY(transformer_use_cuda(c->net, PRECISION_F32));
    Params *p = transformer_params(c->net);
    p->precision = precision;
    TRY(params_plan(p, PLAN_VALUE | PLAN_GRAD));
    TRY(params_load(p, &c->model, 'v', "transformer."));
    TRY(params_send(p));
    TRY(schedule_read(s, &c->model, config.n_scales));
    transformer_set_alphas(c->net, s->alpha);
    return OK;
}

/* The schedule that the configuration names is the one in the buffers (curves of other T have no name). */
static Err check_schedule(Case *c, const Schedule *s) {
    Schedule named;
    const char *redraw = config_get(&c->config, keys, "redraw_prob");
    real got[MAX_SCALES + 1], want[MAX_SCALES + 1];
    size_t rows = (size_t)s->T + 1;
    if (!redraw || schedule_make(&named, redraw, s->T) != OK) return OK;
    TRY(checkpoint_reals(&c->model, "alphacum", 1, &rows, rows, want));
    for (size_t t = 0; t < rows; t++) got[t] = named.alphacum[t];
    compare(c, "alphacum of the schedule's name", got, want, rows, FLT_EPSILON);
    return OK;
}

/* The batch's tokens; with `steps` > 1 of a training run, all of it: B counts every row. */
static Err open_tokens(Case *c, Tokenized *b) {
    const NetConfig *config = transformer_config(c->net);
    const Tensor *x;
    TRY(io_tensor(c, "in.x", &x));
    if (x->ndim < 2 || x->size == 0) return err("in.x is not (B,N) tokens");
    b->N = x->dim[x->ndim - 1];
    b->B = x->size / b->N;
    b->K = config->dec_num_tokens;
    TRY(io_tokens(c, "in.x", &b->x, b->B * b->N));
    TRY(io_tokens(c, "in.c", &b->x_t, b->B * b->N));
    TRY(io_tokens(c, "in.x0", &b->x0, b->B * b->N));
    TRY(io_tokens(c, "in.scale", &b->t, b->B));
    if (config->has_class) TRY(io_tokens(c, "in.class", &b->label, b->B));
    for (size_t i = 0; i < b->B * b->N; i++)
        if ((size_t)b->x0[i] >= b->K || (size_t)b->x_t[i] >= b->K || b->x0[i] < 0 || b->x_t[i] < 0)
            return err("token %zu is %d or %d, expected 0..%zu", i, (int)b->x0[i], (int)b->x_t[i], b->K - 1);
    for (size_t i = 0; i < b->B; i++)
        if (b->t[i] < 1 || b->t[i] > b->schedule.T)
            return err("in.scale %d, expected 1..%d", (int)b->t[i], b->schedule.T);
    return OK;
}

/* The official posterior is (B,K,h,w), ours (B,N,K). */
static void transpose_posterior(real *out, const real *in, size_t B, size_t K, size_t N) {
    for (size_t b = 0; b < B; b++)
        for (size_t i = 0; i < N; i++)
            for (size_t k = 0; k < K; k++) out[(b * N + i) * K + k] = in[(b * K + k) * N + i];
}

/* *q (B*N,K) = our posterior, compared with the expectation `name`. */
static Err check_posterior(Case *c, const Tokenized *b, const char *name, real **q) {
    size_t n = b->B * b->N * b->K, size;
    real *want, *turned;
    TRY(case_reals(c, q, n));
    for (size_t i = 0; i < b->B; i++)
        posterior(*q + i * b->N * b->K, b->x0 + i * b->N, b->x_t + i * b->N, b->N, b->K, &b->schedule, b->t[i]);
    TRY(io_reals(c, name, &want, &size));
    if (size != n) return err("%s has %zu elements, computed were %zu", name, size, n);
    TRY(case_reals(c, &turned, n));
    transpose_posterior(turned, want, b->B, b->K, b->N);
    compare(c, name, *q, turned, n, TOL_OUTPUT * largest(turned, n));
    return OK;
}

static Err check_first_stage(Case *c, const Tokenized *b) {
    Pictures p;
    int32_t *raw, *tokens;
    TRY(open_vqgan(c, &c->vqgan, "first_stage_model.", "model.params.first_stage_config.params.", 0));
    TRY(open_pictures(c, &p, c->vqgan, ""));
    if (p.B != b->B || p.N != b->N)
        return err("in.image gives %zu x %zu tokens, in.x0 has %zu x %zu", p.B, p.N, b->B, b->N);
    TRY(vqgan_plan(c->vqgan, p.B, p.H, p.W, 0));
    TRY(case_alloc(c, &tokens, b->B * b->N, sizeof *tokens));
    TRY(case_alloc(c, &raw, b->B * b->N, sizeof *raw));
    TRY(vqgan_encode(c->vqgan, p.image, p.B, p.H, p.W, 1, NULL, raw, tokens));
    return check_codes(c, c->vqgan, "in.x0", "in.x0 (from in.image)", raw, tokens, b->B * b->N);
}

/* out.loss_a0, out.loss_a05, out.loss_a1: the loss at alpha 0, 0.5, 1; and at any other that the case has. */
static Err check_alphas(Case *c, const Tokenized *b, const real *logits, const real *q) {
    static const char prefix[] = "out.loss_a", *const usual[] = {"out.loss_a0", "out.loss_a05", "out.loss_a1"};
    for (int i = 0; i < 3; i++)
        if (!has(c, usual[i])) report(c, usual[i], 0, "io.safetensors has no such tensor");
    for (size_t i = 0; i < c->io.n; i++) {
        const char *name = c->io.tensor[i].name, *digits = name + sizeof prefix - 1;
        char alpha[NAME_MAX_BYTES + 1];
        Loss loss;
        if (strncmp(name, prefix, sizeof prefix - 1) != 0) continue;
        if (strspn(digits, "0123456789") != strlen(digits) || !*digits) continue;
        snprintf(alpha, sizeof alpha, "%c.%s", digits[0], digits + 1);
        TRY(denoising_loss(&loss, logits, b->x, q, b->B * b->N, b->K, strtod(alpha, NULL), 1, NULL));
        TRY(check_scalar(c, name, loss.loss));
    }
    return OK;
}

/* Teacher forcing: the losses, and the gradients of the one at alpha 0.5. */
static Err check_losses(Case *c, const Tokenized *b, const real *q) {
    const real *logits;
    real *dlogits;
    Loss loss;
    size_t R = b->B * b->N;
    TRY(transformer_plan(c->net, b->B, b->N, 1));
    TRY(transformer_forward(c->net, b->x, b->x_t, b->t, b->label, b->B, b->N, &logits));
    TRY(check_output(c, "out.logits", "out.logits", logits, R * b->K));
    TRY(check_alphas(c, b, logits, q));
    TRY(case_reals(c, &dlogits, R * b->K));
    TRY(denoising_loss(&loss, logits, b->x, q, R, b->K, 0.5, 1, dlogits));
    TRY(check_scalar(c, "out.loss_hard", loss.hard));
    TRY(check_scalar(c, "out.loss_soft", loss.soft));
    params_zero_grad(transformer_params(c->net));
    TRY(transformer_backward(c->net, dlogits));
    return check_gradients(c, transformer_params(c->net), "transformer.");
}

/* The teacher-forced logits again, position by position through the KV cache. */
static Err check_cached_logits(Case *c, const Tokenized *b, const char *name, const char *label) {
    real *all;
    int32_t *prev;
    TRY(case_reals(c, &all, b->B * b->N * b->K));
    TRY(case_alloc(c, &prev, b->B, sizeof *prev));
    TRY(transformer_plan(c->net, b->B, b->N, 0));
    TRY(transformer_decode_begin(c->net, b->x_t, b->t, b->label, b->B, b->N));
    for (size_t i = 0; i < b->N; i++) {
        const real *logits;
        for (size_t r = 0; i > 0 && r < b->B; r++) prev[r] = b->x[r * b->N + i - 1];
        TRY(transformer_decode_step(c->net, prev, i, &logits));
        for (size_t r = 0; r < b->B; r++) memcpy(all + (r * b->N + i) * b->K, logits + r * b->K, b->K * sizeof *all);
    }
    return check_output(c, name, label, all, b->B * b->N * b->K);
}

/* One greedy decoding: x_t and the guide (-1: free) in, tokens (and prob (B,N,K) or NULL) out. */
typedef struct {
    const Tokenized *b;
    size_t B; /* the first rows of b */
    const int32_t *x_t, *guide;
    double temperature;
    size_t top_k;
    int uncached;
    int32_t *tokens;
    real *prob;
} Greedy;

static Err greedy_position(Case *c, const Greedy *g, size_t i, const real **logits, size_t *stride, int32_t *prev) {
    const Tokenized *b = g->b;
    if (g->uncached) {
        TRY(transformer_forward(c->net, g->tokens, g->x_t, b->t, b->label, g->B, b->N, logits));
        *logits += i * b->K;
        *stride = b->N * b->K;
        return OK;
    }
    for (size_t r = 0; i > 0 && r < g->B; r++) prev[r] = g->tokens[r * b->N + i - 1];
    *stride = b->K;
    return transformer_decode_step(c->net, prev, i, logits);
}

static Err greedy_decode(Case *c, Greedy *g) {
    const Tokenized *b = g->b;
    int32_t *prev;
    real *prob;
    TRY(case_alloc(c, &prev, g->B, sizeof *prev));
    TRY(case_reals(c, &prob, b->K));
    TRY(case_alloc(c, &g->tokens, g->B * b->N, sizeof *g->tokens));
    TRY(transformer_plan(c->net, g->B, b->N, 0));
    if (!g->uncached) TRY(transformer_decode_begin(c->net, g->x_t, b->t, b->label, g->B, b->N));
    for (size_t i = 0; i < b->N; i++) {
        const real *logits;
        size_t stride;
        TRY(greedy_position(c, g, i, &logits, &stride, prev));
        for (size_t r = 0; r < g->B; r++) {
            size_t at = r * b->N + i, best = 0;
            sample_probs(prob, logits + r * stride, b->K, g->guide ? g->guide[at] : -1, g->temperature, g->top_k);
            for (size_t k = 1; k < b->K; k++)
                if (prob[k] > prob[best]) best = k;
            g->tokens[at] = (int32_t)best;
            if (g->prob) memcpy(g->prob + at * b->K, prob, b->K * sizeof *prob);
        }
    }
    return OK;
}

static Err check_greedy(Case *c, const Greedy *like, const char *name) {
    char label[100];
    Greedy g = *like;
    TRY(greedy_decode(c, &g));
    TRY(check_tokens(c, name, name, g.tokens, g.B * g.b->N));
    g.uncached = 1;
    TRY(greedy_decode(c, &g));
    snprintf(label, sizeof label, "%s (uncached)", name);
    return check_tokens(c, name, label, g.tokens, g.B * g.b->N);
}

/* Guided decoding, as inpainting: tokens under the mask are known. Its inputs are recomputed from mask and x_clean. */
static Err check_guided(Case *c, const Greedy *free_run) {
    size_t n = free_run->B * free_run->b->N, K = free_run->b->K, size;
    real *mask, *guide;
    int32_t *clean, *x_t, *known;
    Greedy g = *free_run;
    TRY(io_reals(c, "greedy.mask", &mask, &size));
    if (size != n) return err("greedy.mask has %zu elements, expected %zu", size, n);
    TRY(io_tokens(c, "greedy.x_clean", &clean, n));
    TRY(case_alloc(c, &x_t, n, sizeof *x_t));
    TRY(case_alloc(c, &known, n, sizeof *known));
    TRY(case_reals(c, &guide, n * K));
    for (size_t i = 0; i < n; i++) {
        x_t[i] = mask[i] < (real)0.5 ? free_run->x_t[i] : clean[i];
        known[i] = mask[i] < (real)0.5 ? -1 : clean[i];
        for (size_t k = 0; k < K; k++) guide[i * K + k] = known[i] < 0 || k == (size_t)known[i] ? 0 : -INFINITY;
    }
    TRY(check_tokens(c, "greedy.xt_masked", "greedy.xt_masked", x_t, n));
    TRY(check_output(c, "greedy.guide", "greedy.guide", guide, n * K));
    g.x_t = x_t;
    g.guide = known;
    return check_greedy(c, &g, "greedy.tokens_guided");
}

/* In bf16 another token may be the last of the likeliest: prob (R,K) is cut where the expectation is. */
static Err cut_as_expected(Case *c, real *prob, size_t R, size_t K) {
    real *want;
    TRY(io_expected(c, "sample.probs", &want, R * K));
    for (size_t r = 0; r < R; r++, prob += K, want += K) {
        real sum = 0;
        for (size_t k = 0; k < K; k++) sum += want[k] > 0 ? prob[k] : 0;
        for (size_t k = 0; k < K; k++) prob[k] = want[k] > 0 ? prob[k] / sum : 0;
    }
    return OK;
}

/* sample_single_scale with temperature and top-k, the draw replaced by the argmax. The official encoder-decoder ignores
 * the temperature (SPEC 1.11). */
static Err check_sample(Case *c, const Greedy *free_run) {
    Greedy g = *free_run;
    size_t n = g.B * g.b->N;
    g.temperature = 0.7, g.top_k = 5;
    TRY(config_real(&g.temperature, &c->io.meta, "", "temp", 1e-3, 1e3, 1));
    TRY(config_size(&g.top_k, &c->io.meta, "", "top_k", 1, 1 << 20, 1));
    if (transformer_config(c->net)->kind == NET_X) g.temperature = 1;
    if (precision == PRECISION_BF16) g.top_k = 0;
    TRY(case_reals(c, &g.prob, n * g.b->K));
    TRY(greedy_decode(c, &g));
    TRY(check_tokens(c, "sample.tokens", "sample.tokens", g.tokens, n));
    if (precision == PRECISION_BF16) TRY(cut_as_expected(c, g.prob, n, g.b->K));
    return check_output(c, "sample.probs", "sample.probs", g.prob, n * g.b->K);
}

/* topk.out_kN = the official top_k_logits(topk.in, N): we see it through the probabilities. */
static Err check_top_k(Case *c, size_t K) {
    real *in, *want, *got;
    size_t n, found = 0;
    TRY(io_reals(c, "topk.in", &in, &n));
    TRY(case_reals(c, &got, n));
    for (size_t i = 0; i < c->io.n; i++) {
        const char *name = c->io.tensor[i].name;
        if (strncmp(name, "topk.out_k", 10) != 0) continue;
        size_t top = strtoull(name + 10, NULL, 10);
        TRY(io_expected(c, name, &want, n));
        if (n % K != 0) return err("topk.in is not (R,%zu)", K);
        for (size_t r = 0; r < n; r += K) sample_probs(got + r, in + r, K, -1, 1, top);
        for (size_t k = 0; k < n; k++) got[k] = got[k] > 0 ? in[k] : -INFINITY;
        compare(c, name, got, want, n, TOL_OUTPUT * largest(want, n));
        found++;
    }
    return found ? OK : err("topk.in has no topk.out_k...");
}

static Err check_ema(Case *c, const Tokenized *b, const Greedy *free_run) {
    const real *logits;
    TRY(params_load_ema(transformer_params(c->net), &c->model, 'v', "transformer_ema."));
    TRY(params_send(transformer_params(c->net)));
    TRY(transformer_plan(c->net, b->B, b->N, 0));
    TRY(transformer_forward(c->net, b->x, b->x_t, b->t, b->label, b->B, b->N, &logits));
    TRY(check_output(c, "ema.logits", "ema.logits", logits, b->B * b->N * b->K));
    return check_greedy(c, free_run, "ema.greedy_tokens");
}

/* ---- Encodings: out.logits_NAME, ema.logits_NAME and out.dec_NAME belong to one of several files. `variants` of the
 *      metadata says which, {"model.ckpt": "zip", ...}; without it model_NAME.ckpt, and model.ckpt for "zip" ---- */

static const char encoded[] = "out.logits_";

/* The text between the next two quotation marks of *at, which moves behind them; 0: there are none, or it is long. */
static int next_quoted(const char **at, char *out, size_t bytes) {
    const char *begin = strchr(*at, '"'), *end = begin ? strchr(begin + 1, '"') : NULL;
    if (!end || (size_t)(end - begin) > bytes) return 0;
    memcpy(out, begin + 1, (size_t)(end - begin - 1));
    out[end - begin - 1] = 0;
    *at = end + 1;
    return 1;
}

/* file = the one of encoding `name`. */
static Err encoding_file(const Case *c, const char *name, char file[NAME_MAX_BYTES]) {
    const char *at = config_get(&c->io.meta, "", "variants");
    char of[NAME_MAX_BYTES];
    if (!at) {
        const int first = strcmp(name, "zip") == 0;
        snprintf(file, NAME_MAX_BYTES, "model%s%.100s.ckpt", first ? "" : "_", first ? "" : name);
        return OK;
    }
    while (next_quoted(&at, file, NAME_MAX_BYTES) && next_quoted(&at, of, sizeof of))
        if (strcmp(of, name) == 0 && !strchr(file, '/')) return OK;
    return err("the metadata's variants have no file for \"%.100s\"", name);
}

/* A file that the case lists and has must have its expectations. */
static void check_variants(const Case *c) {
    const char *at = config_get(&c->io.meta, "", "variants");
    char file[NAME_MAX_BYTES], of[NAME_MAX_BYTES], name[NAME_MAX_BYTES + 40];
    while (at && next_quoted(&at, file, sizeof file) && next_quoted(&at, of, sizeof of)) {
        snprintf(name, sizeof name, "%s%s", encoded, of);
        if (file_in(c->dir, file) && !has(c, name))
            report(c, name, 0, "its file is here, io.safetensors has no such tensor");
    }
}

static Err open_encoding(Case *c, const char *name) {
    char path[1300], file[NAME_MAX_BYTES];
    checkpoint_close(&c->model);
    transformer_free(c->net);
    vqgan_free(c->vqgan);
    c->net = NULL, c->vqgan = NULL;
    TRY(encoding_file(c, name, file));
    snprintf(path, sizeof path, "%s/%s", c->dir, file);
    return checkpoint_open(&c->model, path);
}

static Err encoding_logits(Case *c, const char *expectation) {
    const NetConfig *config = transformer_config(c->net);
    const Tensor *x;
    int32_t *tokens, *scale, *x_t = NULL, *label = NULL;
    const real *logits;
    TRY(io_tensor(c, "in.x", &x));
    if (x->ndim != 2) return err("in.x is not (B,N) tokens");
    const size_t B = x->dim[0], N = x->dim[1];
    TRY(io_tokens(c, "in.x", &tokens, B * N));
    TRY(io_tokens(c, "in.scale", &scale, B));
    if (config->kind == NET_X) TRY(io_tokens(c, "in.c", &x_t, B * N));
    if (config->has_class) TRY(io_tokens(c, "in.class", &label, B));
    TRY(transformer_plan(c->net, B, N, 0));
    TRY(transformer_forward(c->net, tokens, x_t, scale, label, B, N, &logits));
    return check_output(c, expectation, expectation, logits, B * N * config->dec_num_tokens);
}

static Err encoding_picture(Case *c, const char *expectation) {
    const Tensor *z;
    real *latents, *image;
    size_t n;
    TRY(open_vqgan(c, &c->vqgan, "first_stage_model.", "model.params.first_stage_config.params.", 0));
    const VqganConfig *v = vqgan_config(c->vqgan);
    TRY(io_tensor(c, "in.z", &z));
    TRY(io_reals(c, "in.z", &latents, &n));
    if (z->ndim != 4 || z->dim[1] != v->embed_dim || v->levels < 1) return err("in.z is not (B,%zu,h,w)", v->embed_dim);
    const size_t B = z->dim[0], H = z->dim[2] << (v->levels - 1), W = z->dim[3] << (v->levels - 1);
    TRY(vqgan_plan(c->vqgan, B, H, W, 0));
    TRY(case_reals(c, &image, B * v->out_ch * H * W));
    TRY(vqgan_decode(c->vqgan, latents, B, z->dim[2], z->dim[3], image));
    return check_output(c, expectation, expectation, image, B * v->out_ch * H * W);
}

/* A file without EMA has no EMA's logits, and must not be expected to. */
static Err run_encoding(Case *c, const char *name) {
    Schedule s;
    char logits[NAME_MAX_BYTES], ema[NAME_MAX_BYTES], picture[NAME_MAX_BYTES];
    snprintf(logits, sizeof logits, "%s%s", encoded, name);
    snprintf(ema, sizeof ema, "ema.logits_%s", name);
    snprintf(picture, sizeof picture, "out.dec_%s", name);
    TRY(open_encoding(c, name));
    TRY(open_net(c, &s));
    TRY(encoding_logits(c, logits));
    if (checkpoint_find(&c->model, "transformer_ema.num_updates") || has(c, ema)) {
        TRY(params_load_ema(transformer_params(c->net), &c->model, 'v', "transformer_ema."));
        TRY(params_send(transformer_params(c->net)));
        TRY(encoding_logits(c, ema));
    }
    return encoding_picture(c, picture);
}

static Err run_encodings(Case *c) {
    check_variants(c);
    for (size_t i = 0; i < c->io.n; i++) {
        const char *name = c->io.tensor[i].name;
        if (strncmp(name, encoded, sizeof encoded - 1) != 0) continue;
        if (run_encoding(c, name + sizeof encoded - 1) != OK) report(c, name, 0, err_text());
    }
    return OK;
}

static Err run_transition(Case *c) {
    Tokenized b = {0};
    const Tensor *x;
    real *q;
    int32_t *x_t;
    TRY(open_net(c, &b.schedule));
    TRY(open_tokens(c, &b));
    TRY(check_schedule(c, &b.schedule));
    TRY(check_first_stage(c, &b));
    TRY(check_posterior(c, &b, "out.posterior", &q));
    TRY(check_losses(c, &b, q));
    TRY(check_cached_logits(c, &b, "out.logits", "out.logits (cached)"));
    TRY(io_tensor(c, "greedy.xt", &x));
    Greedy g = {.b = &b, .B = x->size / b.N, .temperature = 1};
    if (g.B < 1 || g.B > b.B) return err("greedy.xt has %zu rows, in.x has %zu", g.B, b.B);
    TRY(io_tokens(c, "greedy.xt", &x_t, g.B * b.N));
    g.x_t = x_t;
    TRY(check_greedy(c, &g, "greedy.tokens"));
    TRY(check_guided(c, &g));
    TRY(check_sample(c, &g));
    if (has(c, "topk.in")) TRY(check_top_k(c, b.K));
    if (checkpoint_find(&c->model, "transformer_ema.num_updates")) TRY(check_ema(c, &b, &g));
    return OK;
}

/* ---- Training ---- */

typedef struct {
    size_t micro, accumulate, B; /* micro batches, per optimizer step, rows of each */
    double base_lr, alpha;
    LrSchedule lr;
    int ema;
    double ema_decay;
    int32_t ema_updates;
    real *loss, *hard, *soft, *rate, *grad_l2, *param_l2; /* (micro) x3, (steps) x3 */
    real *q;
} Training;

static Err open_training(Case *c, Training *r, const Tokenized *b) {
    static const char lr[] = "model.params.scheduler_config.params.";
    const Tensor *x;
    int soft_only = 0;
    TRY(io_tensor(c, "in.x", &x));
    if (x->ndim != 3) return err("in.x is not (micro batches,B,N)");
    r->micro = x->dim[0], r->B = x->dim[1], r->accumulate = 1, r->base_lr = 1;
    TRY(config_size(&r->accumulate, &c->io.meta, "", "accumulate", 1, r->micro, 1));
    TRY(config_real(&r->base_lr, &c->io.meta, "", "base_lr", 0, 1e6, 1));
    TRY(config_real(&r->alpha, &c->config, keys, "alpha", 0, 1, 1));
    TRY(config_flag(&soft_only, &c->config, keys, "soft_only", 1));
    if (soft_only) r->alpha = 1;
    TRY(config_real(&r->lr.lr_start, &c->config, lr, "lr_start", 0, 1, 0));
    TRY(config_real(&r->lr.lr_max, &c->config, lr, "lr_max", 0, 1, 0));
    TRY(config_real(&r->lr.lr_min, &c->config, lr, "lr_min", 0, 1, 0));
    TRY(config_real(&r->lr.warm_up_steps, &c->config, lr, "warm_up_steps", 0, 1e12, 0));
    TRY(config_real(&r->lr.max_decay_steps, &c->config, lr, "max_decay_steps", 0, 1e12, 0));
    real **series[6] = {&r->loss, &r->hard, &r->soft, &r->rate, &r->grad_l2, &r->param_l2};
    for (int i = 0; i < 6; i++) TRY(case_reals(c, series[i], r->micro));
    TRY(check_posterior(c, b, "in.posterior", &r->q));
    Params *p = transformer_params(c->net);
    r->ema = checkpoint_find(&c->model, "transformer_ema.num_updates") != NULL;
    TRY(params_plan(p, PLAN_ADAM | (r->ema ? PLAN_EMA : 0)));
    if (!r->ema) return OK;
    real decay;
    TRY(params_load_ema(p, &c->model, 'e', "transformer_ema."));
    TRY(checkpoint_reals(&c->model, "transformer_ema.decay", -1, NULL, 1, &decay));
    r->ema_decay = (double)decay;
    return checkpoint_ints(&c->model, "transformer_ema.num_updates", 1, &r->ema_updates);
}

static double params_norm(Params *p) {
    double sum = 0;
    if (params_fetch(p) != OK) return NAN;
    for (size_t r = 0; r < p->n; r++)
        for (size_t i = 0; i < p->row[r].size; i++) sum += (double)p->row[r].value[i] * (double)p->row[r].value[i];
    return sqrt(sum);
}

static Err micro_batch(Case *c, Training *r, const Tokenized *b, size_t i, real *dlogits) {
    size_t first = i * r->B, R = r->B * b->N;
    const real *logits;
    Loss loss;
    TRY(transformer_forward(c->net, b->x + first * b->N, b->x_t + first * b->N, b->t + first,
                            b->label ? b->label + first : NULL, r->B, b->N, &logits));
    TRY(denoising_loss(&loss, logits, b->x + first * b->N, r->q + i * R * b->K, R, b->K, r->alpha,
                       1.0 / (double)r->accumulate, dlogits));
    r->loss[i] = (real)loss.loss;
    r->hard[i] = (real)loss.hard;
    r->soft[i] = (real)loss.soft;
    return transformer_backward(c->net, dlogits);
}

/* Lightning's order: the loss over the number of micro batches, a step after the last of a group (or of all), the EMA
 * after every micro batch (SPEC 6, 7). */
static Err train(Case *c, Training *r, const Tokenized *b) {
    Params *p = transformer_params(c->net);
    real *dlogits;
    size_t step = 0;
    TRY(transformer_plan(c->net, r->B, b->N, 1));
    TRY(params_send(p));
    TRY(case_reals(c, &dlogits, r->B * b->N * b->K));
    for (size_t i = 0; i < r->micro; i++) {
        if (i % r->accumulate == 0) params_zero_grad(p);
        TRY(micro_batch(c, r, b, i, dlogits));
        if ((i + 1) % r->accumulate == 0 || i + 1 == r->micro) {
            AdamW o = {lr_at(&r->lr, step) * r->base_lr, 0.9, 0.95, 1e-8, 1};
            r->rate[step] = (real)o.lr;
            r->grad_l2[step] = (real)params_grad_norm(p);
            adamw_step(p, &o, step + 1);
            r->param_l2[step++] = (real)params_norm(p);
        }
        if (r->ema) ema_update(p, r->ema_decay, (uint64_t)++r->ema_updates);
    }
    size_t steps = step;
    TRY(params_fetch(p));
    TRY(check_output(c, "out.loss", "out.loss", r->loss, r->micro));
    TRY(check_output(c, "out.loss_hard", "out.loss_hard", r->hard, r->micro));
    TRY(check_output(c, "out.loss_soft", "out.loss_soft", r->soft, r->micro));
    TRY(check_output(c, "out.lr", "out.lr", r->rate, steps));
    TRY(check_output(c, "out.grad_l2", "out.grad_l2", r->grad_l2, steps));
    return check_output(c, "out.param_l2", "out.param_l2", r->param_l2, steps);
}

/* dst = src without its dots: how the EMA spells a parameter. */
static void strip_dots(char *dst, const char *src) {
    for (; *src; src++)
        if (*src != '.') *dst++ = *src;
    *dst = 0;
}

/* final.<name> after training, against the tolerance of how far it moved from the checkpoint's <name>. In bf16 and
 * bf16x3 by norms: Adam moves an element by its gradient over that gradient's own size, so that one whose gradient
 * is small in its tensor may move anyhow. */
static Err check_final(Case *c, const char *name, const real *got, size_t n, int key_bias) {
    char final[NAME_MAX_BYTES + 40];
    real *want, *before;
    const int by_norm = precision != PRECISION_F32 && !key_bias;
    const double of_way = precision == PRECISION_BF16 ? BF16_GRAD : TOL_FINAL;
    snprintf(final, sizeof final, "final.%s", name);
    TRY(case_reals(c, &before, n));
    TRY(checkpoint_reals(&c->model, name, -1, NULL, n, before));
    if (io_expected(c, final, &want, n) != OK) return absent(c, final);
    const double floor = FLOOR_FINAL * largest(want, n), tolerance = of_way * distance(want, before, n, by_norm);
    compare_by(by_norm, c, final, got, want, n, key_bias ? TOL_KEY_BIAS : fmax(tolerance, floor));
    return OK;
}

static Err check_finals(Case *c, const Training *r) {
    const Params *p = transformer_params(c->net);
    char name[NAME_MAX_BYTES + 20];
    for (size_t i = 0; i < p->n; i++) {
        const Param *row = &p->row[i];
        size_t length = strlen(row->name);
        int key_bias = length >= 13 && strcmp(row->name + length - 13, "attn.key.bias") == 0;
        snprintf(name, sizeof name, "transformer.%s", row->name);
        TRY(check_final(c, name, row->value, row->size, key_bias));
        if (!r->ema) continue;
        strcpy(name, "transformer_ema.");
        strip_dots(name + strlen(name), row->name);
        TRY(check_final(c, name, row->ema, row->size, key_bias));
    }
    if (!r->ema) return OK;
    TRY(check_tokens(c, "final.transformer_ema.num_updates", "final.transformer_ema.num_updates", &r->ema_updates, 1));
    return check_scalar(c, "final.transformer_ema.decay", r->ema_decay);
}

static Err run_training(Case *c) {
    Tokenized b = {0};
    Training r = {0};
    TRY(open_net(c, &b.schedule));
    TRY(open_tokens(c, &b));
    TRY(check_schedule(c, &b.schedule));
    TRY(open_training(c, &r, &b));
    TRY(train(c, &r, &b));
    return check_finals(c, &r);
}

/* ---- Schedules ---- */

/* The text after "key": in the object that starts at `object`; NULL if it ends before. */
static const char *json_value(const char *object, const char *key) {
    char quoted[40];
    snprintf(quoted, sizeof quoted, "\"%s\"", key);
    const char *end = strchr(object, '}'), *at = strstr(object, quoted);
    if (!at || (end && at > end)) return NULL;
    at += strlen(quoted);
    return at + strspn(at, " \t\r\n:");
}

static Err json_reals(const char *object, const char *key, real *out, size_t n) {
    const char *p = json_value(object, key);
    if (!p || *p != '[') return err("schedules.json: no list \"%s\"", key);
    for (size_t i = 0; i < n; i++) {
        char *end;
        out[i] = (real)strtod(p + 1, &end);
        p = end + strspn(end, " \t\r\n");
        if (end == p + 1 || *p != (i + 1 < n ? ',' : ']'))
            return err("schedules.json: \"%s\" has not %zu numbers", key, n);
    }
    return OK;
}

/* To the last place of the smallest value in float32. */
static void compare_schedule(const Case *c, const char *redraw, const char *key, const float *ours, real *want,
                             size_t n) {
    char label[400];
    real got[MAX_SCALES + 1];
    double least = 1;
    for (size_t i = 0; i < n; i++) {
        got[i] = (real)ours[i];
        if (want[i] > 0 && (double)want[i] < least) least = (double)want[i];
    }
    snprintf(label, sizeof label, "%s, %zu scales: %s", redraw, n - 1, key);
    compare(c, label, got, want, n, FLT_EPSILON * least);
}

static Err run_schedule(Case *c, const char *object) {
    char redraw[300];
    real beta[MAX_SCALES + 1], alpha[MAX_SCALES + 1], alphacum[MAX_SCALES + 1];
    Schedule s;
    const char *p = json_value(object, "redraw_prob"), *T = json_value(object, "n_scales");
    if (!p || !T) return err("schedules.json: an entry without redraw_prob or n_scales");
    size_t quote = *p == '"', length = strcspn(p + quote, quote ? "\"" : ",\r\n }");
    int scales = atoi(T);
    if (length >= sizeof redraw || scales < 1 || scales > MAX_SCALES) return err("schedules.json: an impossible entry");
    memcpy(redraw, p + quote, length);
    redraw[length] = 0;
    size_t n = (size_t)scales + 1;
    TRY(json_reals(object, "betas", beta, n));
    TRY(json_reals(object, "alphats", alpha, n));
    TRY(json_reals(object, "alphacum", alphacum, n));
    TRY(schedule_make(&s, redraw, scales));
    compare_schedule(c, redraw, "betas", s.beta, beta, n);
    compare_schedule(c, redraw, "alphats", s.alpha, alpha, n);
    compare_schedule(c, redraw, "alphacum", s.alphacum, alphacum, n);
    return OK;
}

static Err run_schedules(Case *c) {
    char path[1100], *text;
    snprintf(path, sizeof path, "%s/schedules.json", c->dir);
    TRY(file_text(&text, path, 1 << 20));
    const char *object = strchr(text, '{');
    Err e = object ? OK : err("schedules.json has no entries");
    for (; object; object = strchr(object + 1, '{'))
        if (run_schedule(c, object) != OK) report(c, "schedule", 0, err_text());
    free(text);
    return e;
}

/* ---- Cases ---- */

/* --selftest: an expectation under another name is one missing and one unknown. */
static void rename_one(Case *c) {
    for (size_t i = 0; i < c->io.n; i++) {
        Tensor *x = &c->io.tensor[i];
        if (strncmp(x->name, "out.l", 5) != 0 && strncmp(x->name, "out.x", 5) != 0) continue;
        x->name[strlen(x->name) - 1]++;
        return;
    }
}

static Err open_case(Case *c) {
    char path[1100];
    snprintf(path, sizeof path, "%s/config.txt", c->dir);
    TRY(config_read(&c->config, path));
    snprintf(path, sizeof path, "%s/io.safetensors", c->dir);
    TRY(checkpoint_open(&c->io, path));
    snprintf(path, sizeof path, "%s/model.%s", c->dir, file_in(c->dir, "model.ckpt") ? "ckpt" : "safetensors");
    if (!has(c, "in.scale") || !has_prefix(c, encoded))
        TRY(checkpoint_open(&c->model, path)); /* encodings have files of their own */
    if (falsify == RENAMED) rename_one(c);
    return case_alloc(c, &c->seen, c->io.n, 1);
}

/* An expectation that no code above looked at is one that this program does not know. */
static void check_all_seen(const Case *c) {
    for (size_t i = 0; i < c->io.n; i++)
        if (!c->seen[i] && strncmp(c->io.tensor[i].name, "in.", 3) != 0)
            report(c, c->io.tensor[i].name, 0, "an expectation that is not known here");
}

static int ends_in(const char *text, const char *end) {
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

static Err run_kind(Case *c) {
    const char *target = config_get(&c->config, "", "model.target");
    if (!target) return err("config.txt has no model.target");
    if (ends_in(target, ".VQGANWrapper") || ends_in(target, ".VQModel")) {
        const int adversarial = has_prefix(c, "grad_g.") || has_prefix(c, "grad_d.") || has(c, "out.aeloss");
        TRY(adversarial ? run_adversarial(c) : run_vqgan(c));
    } else if (ends_in(target, ".DenoisingXTransformer") || ends_in(target, ".DecoderOnlyDenoiser")) {
        if (has_prefix(c, encoded))
            TRY(run_encodings(c));
        else
            TRY(has_prefix(c, "final.") ? run_training(c) : run_transition(c));
    } else
        return err("model.target %s: not a kind of case known here", target);
    check_all_seen(c);
    return OK;
}

static void close_case(Case *c) {
    for (size_t i = 0; i < c->n_blocks; i++) free(c->block[i]);
    free(c->block);
    vqgan_free(c->vqgan);
    disc_free(c->disc);
    transformer_free(c->net);
    checkpoint_close(&c->model);
    checkpoint_close(&c->io);
    config_free(&c->config);
}

static void run_case(const char *dir) {
    Case c = {.times = 1};
    size_t before = passed + failed, failures = failed;
    snprintf(c.dir, sizeof c.dir, "%s", dir);
    c.name = strrchr(c.dir, '/') ? strrchr(c.dir, '/') + 1 : c.dir;
    Err e;
    if (file_in(dir, "schedules.json"))
        e = run_schedules(&c);
    else if ((e = open_case(&c)) == OK)
        e = run_kind(&c);
    if (e != OK) report(&c, "case", 0, err_text());
    if (passed + failed == before) report(&c, "case", 0, "compared nothing");
    green += c.io.n > 0 && failed == failures;
    printf("---- %s: %s, %zu comparisons, %zu failed\n", c.name, failed == failures ? "pass" : "FAIL",
           passed + failed - before, failed - failures);
    close_case(&c);
}

static int is_case(const char *dir) {
    return file_in(dir, "config.txt") || file_in(dir, "io.safetensors") || file_in(dir, "schedules.json") ||
           file_in(dir, "model.safetensors") || file_in(dir, "model.ckpt");
}

static int by_folder(const struct dirent *entry) {
    return entry->d_name[0] != '.';
}

/* A case, or a folder of cases; any other folder counts as an unknown case. */
static void run_folder(const char *dir) {
    struct dirent **entry;
    size_t before = passed + failed;
    if (is_case(dir)) {
        run_case(dir);
        return;
    }
    int n = scandir(dir, &entry, by_folder, alphasort);
    for (int i = 0; i < n; i++) {
        char path[1024];
        struct stat st;
        int length = snprintf(path, sizeof path, "%s/%s", dir, entry[i]->d_name);
        if (length > 0 && (size_t)length < sizeof path && stat(path, &st) == 0 && S_ISDIR(st.st_mode)) run_folder(path);
        free(entry[i]);
    }
    if (n >= 0) free(entry);
    if (passed + failed > before) return;
    Case none = {.name = dir};
    report(&none, "case", 0, n < 0 ? "the folder cannot be read" : "no case is in this folder");
}

/* With one element of every expectation moved by two tolerances, or NaN, or tokens off by one, every comparison must
 * fail; with one expectation misnamed, every case must. */
static int selftest(size_t n, const char *const *dirs) {
    size_t red = 0, wrong = 0;
    static const char *const what[] = {"", "moved by two tolerances", "made NaN", "one misnamed per case"};
    for (falsify = MOVED; falsify <= RENAMED; falsify++) {
        passed = failed = green = 0;
        for (size_t i = 0; i < n; i++) run_folder(dirs[i]);
        int ok = failed > 0 && (falsify == RENAMED ? green == 0 : passed == 0);
        printf("selftest: expectations %s: %zu passed, %zu failed: %s\n", what[falsify], passed, failed,
               ok ? "as it must" : "FAIL");
        red += (size_t)ok, wrong += (size_t)!ok;
    }
    printf("%zu passed, %zu failed\n", red, wrong);
    return wrong != 0;
}

static const char intro[] =
    "usage: test/golden [options] DIR...\n\n"
    "Compares with the golden cases in these folders. The last line is \"N passed, N failed\".\n";

int main(int argc, char **argv) {
    enum { FOLDERS = 64 };
    const char *folder[FOLDERS], *device = "cpu", *type = "f32";
    OptionList folders = {folder, 0, FOLDERS};
    int test_itself = 0;
    const Option table[] = {
        {OPT_ARGUMENTS, "DIR...", NULL, &folders, 0, 0, "a case, or a folder of cases"},
        {OPT_STRING, "--device", "cpu|cuda", &device, 0, 0, "where it is computed (default cpu)"},
        {OPT_STRING, "--precision", "TYPE", &type, 0, 0, "products on the CPU: f32 (default), bf16x3 or bf16"},
        {OPT_FLAG, "--selftest", NULL, &test_itself, 0, 0, "falsifies what is expected: all must fail"},
        {OPT_END, NULL, NULL, NULL, 0, 0, NULL}};
    options_parse(argc, argv, table, intro);
    on_cuda = strcmp(device, "cuda") == 0;
    if (!on_cuda && strcmp(device, "cpu")) usage_error("--device %s: expected cpu or cuda", device);
    if (precision_read(&precision, type, "--precision") != OK) usage_error("%s", err_text());
    if (on_cuda && precision != PRECISION_F32) usage_error("--precision %s is for --device cpu", type);
    if (folders.n == 0) usage_error("expected a folder of cases; -h explains");
    if (precision_there(precision) != OK) {
        printf("skipped: %s\n", err_text());
        return 0;
    }
    if (test_itself) return selftest(folders.n, folder);
    for (size_t i = 0; i < folders.n; i++) run_folder(folder[i]);
    if (passed + failed == 0) failed = 1;
    printf("%zu passed, %zu failed\n", passed, failed);
    return failed != 0;
}
