/* gan.c - the adversarial part of ./train --vqgan (SPEC section 9; Esser et al. 2021, section 3.1): what the
 * recipe says of a discriminator, the generator's share of a micro batch, the discriminator's own, its optimizer, its
 * state.
 *
 *     reconstruct -> d nll/d xrec -> gan_generator adds d_weight * d g/d xrec -> the first stage's backward
 *                 -> gan_discriminator: gradients from the pictures and their reconstructions
 *     after the first stage's update -> gan_after_step: the discriminator's update
 *
 * The official code reconstructs the batch anew, with the updated first stage, before the discriminator's pass. That
 * costs a third of a step and moves the reconstruction by one update, so it is an option, train.official_order;
 * otherwise the discriminator sees the reconstruction that the generator was judged by.
 *
 * A discriminator that has learnt nothing sends the generator noise. So it is trained train.disc_warm_up steps longer
 * than the generator sees it, which is from disc_start on; 0: both begin there, as in the official code, whose Adam takes
 * steps without a gradient until then: they count in its bias correction.
 *
 * On a GPU the first stage, the discriminator and LPIPS all compute there, but hand each other pictures and their
 * gradients through this file, in the host's memory: some ten copies of the batch a step.
 *
 * The mathematics is in discriminator.c. */
#include "training/stage.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char LOSS[] = "model.params.lossconfig.params.";

struct Gan {
    Discriminator *d;
    Params *params;
    AdamW adam;
    DiscLoss kind;
    size_t start, first; /* steps from which on the generator sees it, from which on it is trained */
    size_t adam_from;    /* the step that its Adam counts from */
    double weight, factor, feature_weight;
    int official_order;
    real *dxrec, *dlogits, *dw, *db; /* of the generator's loss; of the first stage's last layer */
    const real *images;              /* of the last micro batch */
    double disc, g, d_weight;        /* means over the present step's micro batches */
    real recent[2 * RECENT];         /* (2,RECENT) its loss and gradient norm, as History.recent */
};

/* ------------------------------------------------------------------------------------------------------------
 * Settings
 * ---------------------------------------------------------------------------------------------------------- */

/* Tokens stay as they are: only decoder and post_quant_conv are trained. */
static void freeze_encoder(Stage *s) {
    static const char *const frozen[] = {"encoder.", "quant_conv.", "quantize."};
    for (size_t i = 0; i < s->params->n; i++)
        for (int k = 0; k < 3; k++)
            if (!strncmp(s->params->row[i].name, frozen[k], strlen(frozen[k]))) s->params->row[i].untrained = 1;
    s->set.codebook_weight = 0;
    s->set.restart_codes = 0;
}

/* Where the perceptual network (LPIPS) is missing: in its place, the distance of the discriminator's features. */
static Err match_features(Gan *g, const Config *c) {
    TRY(config_real(&g->feature_weight, c, LOSS, "perceptual_weight", 0, 1e6, 1));
    if (g->feature_weight > 0)
        say_once("perceptual_weight %g without its network: the discriminator's features are matched instead "
                 "(train.feature_weight)\n",
                 g->feature_weight);
    return OK;
}

static Err read_gan(Gan *g, const Config *c) {
    const char *kind = config_get(c, LOSS, "disc_loss");
    size_t warm_up = 500;
    int conditional = 0;
    g->weight = g->factor = 1;
    TRY(config_size(&g->start, c, LOSS, "disc_start", 0, SIZE_MAX / 2, 1));
    TRY(config_size(&warm_up, c, "train.", "disc_warm_up", 0, SIZE_MAX / 2, 1));
    g->first = g->start - min_size(warm_up, g->start);
    g->adam_from = warm_up ? g->first : 0;
    TRY(config_real(&g->weight, c, LOSS, "disc_weight", 0, 1e6, 1));
    TRY(config_real(&g->factor, c, LOSS, "disc_factor", 0, 1e6, 1));
    TRY(config_flag(&conditional, c, LOSS, "disc_conditional", 1));
    if (conditional)
        return config_err(c, LOSS, "disc_conditional",
                          "%sdisc_conditional true: a discriminator that sees a condition is not supported", LOSS);
    if (kind && strcmp(kind, "hinge") && strcmp(kind, "vanilla"))
        return config_err(c, LOSS, "disc_loss", "%sdisc_loss %s: expected hinge or vanilla", LOSS, kind);
    g->kind = kind && !strcmp(kind, "vanilla") ? DISC_VANILLA : DISC_HINGE;
    TRY(config_flag(&g->official_order, c, "train.", "official_order", 1));
    return config_real(&g->feature_weight, c, "train.", "feature_weight", 0, 1e6, 1);
}

static Err create_discriminator(Stage *s, Gan *g) {
    DiscConfig c;
    const VqganConfig *v = vqgan_config(s->vqgan);
    TRY(disc_config_read(&c, &s->recipe, LOSS));
    if (c.in_channels != v->in_channels || c.in_channels != v->out_ch)
        return config_err(&s->recipe, LOSS, "disc_in_channels", "%sdisc_in_channels is %zu, expected the pictures' %zu",
                          LOSS, c.in_channels, v->out_ch);
    TRY(disc_create(&g->d, &c));
    disc_params(g->d)->precision = s->precision;
    if (s->set.cuda) TRY(disc_use_cuda(g->d, s->precision));
    g->params = disc_params(g->d);
    g->adam = (AdamW){0, 0.5, 0.9, 1e-8, 0};
    return OK;
}

static Err is_frozen(const Stage *s, int *frozen) {
    TRY(config_flag(frozen, &s->recipe, "train.", "freeze_encoder", 1));
    if (*frozen && !s->set.init && !state_exists(s))
        return config_err(&s->recipe, "train.", "freeze_encoder",
                          "train.freeze_encoder true: the encoder would stay at random; --init names a trained model");
    return OK;
}

/* What the recipe says of the discriminator must be right even where there is none. */
Err gan_check(const Stage *s) {
    Gan unused = {0};
    DiscConfig c;
    int frozen = 0;
    TRY(read_gan(&unused, &s->recipe));
    TRY(disc_config_read(&c, &s->recipe, LOSS));
    return is_frozen(s, &frozen);
}

Err gan_create(Stage *s) {
    const Config *c = &s->recipe;
    int wanted = config_get(c, LOSS, "disc_start") != NULL, frozen = 0;
    if (!config_get(c, "train.", "codebook_weight"))
        TRY(config_real(&s->set.codebook_weight, c, LOSS, "codebook_weight", 0, 1e6, 1));
    TRY(is_frozen(s, &frozen));
    if (frozen) freeze_encoder(s);
    TRY(config_flag(&wanted, c, "train.", "discriminator", 1));
    if (!wanted) return OK;
    TRY(mem_alloc(&s->first.gan, 1, sizeof *s->first.gan, "discriminator"));
    forget_recent(s->first.gan->recent);
    TRY(read_gan(s->first.gan, c));
    if (!s->first.perceptual && !config_get(c, "train.", "feature_weight")) TRY(match_features(s->first.gan, c));
    return create_discriminator(s, s->first.gan);
}

void gan_free(Stage *s) {
    Gan *g = s->first.gan;
    if (!g) return;
    disc_free(g->d);
    void *buffers[] = {g->dxrec, g->dlogits, g->dw, g->db, g};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
    s->first.gan = NULL;
}

Err gan_plan_bytes(const Stage *s, size_t *plan, size_t *tables) {
    size_t activations;
    if (!s->first.gan) return OK;
    TRY(disc_plan_bytes(s->first.gan->d, s->batch, s->size, s->size, s->first.gan->feature_weight > 0, &activations));
    *plan += activations;
    *tables += (4 * s->first.gan->params->total + s->batch * 3 * s->size * s->size) * sizeof(real);
    return OK;
}

Err gan_plan(Stage *s) {
    Gan *g = s->first.gan;
    if (!g) return OK;
    const Param *last = vqgan_last_layer(s->vqgan);
    say_once("discriminator: %.2f million parameters, trained from step %zu on, seen from step %zu on\n",
             (double)params_count(g->params) / 1e6, g->first + 1, g->start + 1);
    TRY(disc_plan(g->d, s->batch, s->size, s->size, g->feature_weight > 0));
    TRY(params_plan(g->params, PLAN_VALUE | PLAN_GRAD | PLAN_ADAM));
    params_init(g->params, s->set.seed + 1); /* other numbers than the first stage's */
    TRY(params_send(g->params));
    TRY(mem_alloc(&g->dxrec, s->batch * 3 * s->size * s->size, sizeof(real), "discriminator: gradient"));
    TRY(mem_alloc(&g->dlogits, disc_logits(g->d), sizeof(real), "discriminator: gradient"));
    TRY(mem_alloc(&g->dw, last->size, sizeof(real), "gradient of the last layer"));
    return mem_alloc(&g->db, last->dim[0], sizeof(real), "gradient of the last layer");
}

/* ------------------------------------------------------------------------------------------------------------
 * A micro batch
 * ---------------------------------------------------------------------------------------------------------- */

static void add_scaled(real *to, const real *x, double scale, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] += (real)scale * x[i];
}

/* |gradient of the weight of the decoder's last layer| */
static Err last_norm(Stage *s, const real *dxrec, double *norm) {
    Gan *g = s->first.gan;
    const size_t n = vqgan_last_layer(s->vqgan)->size;
    double sum = 0;
    TRY(vqgan_last_gradient(s->vqgan, dxrec, g->dw, g->db));
    for (size_t i = 0; i < n; i++) sum += (double)g->dw[i] * (double)g->dw[i];
    *norm = sqrt(sum);
    return OK;
}

/* The discriminator's logits. Feature matching counts as part of nll, as the perceptual loss does whose place it
 * takes. */
static Err see_reconstruction(Stage *s, double unit, const real *images, const real *xrec, const real **logits,
                              double *loss) {
    Gan *g = s->first.gan;
    if (g->feature_weight > 0) {
        TRY(disc_forward(g->d, images, 0, logits));
        TRY(disc_keep_features(g->d));
    }
    TRY(disc_forward(g->d, xrec, 1, logits));
    if (g->feature_weight <= 0) return OK;
    *loss += g->feature_weight * disc_feature_loss(g->d);
    TRY(disc_backward(g->d, NULL, g->feature_weight * unit, 0, g->dxrec));
    add_scaled(s->first.dxrec, g->dxrec, 1, s->batch * 3 * s->size * s->size);
    return OK;
}

/* dxrec holds the gradient of nll with weight 1/shares. To it and to loss is added what the discriminator says. */
Err gan_generator(Stage *s, const real *images, const real *xrec, double *loss) {
    Gan *g = s->first.gan;
    const double unit = 1 / s->shares;
    const real *logits;
    double nll_norm, g_norm;
    if (!g) return OK;
    if (s->micro_index == 0) {
        params_zero_grad(g->params);
        g->disc = g->g = g->d_weight = 0;
    }
    g->images = images;
    if (s->step < g->start) return OK;
    TRY(see_reconstruction(s, unit, images, xrec, &logits, loss));
    const double g_loss = generator_loss(logits, disc_logits(g->d), unit, g->dlogits);
    TRY(disc_backward(g->d, g->dlogits, 0, 0, g->dxrec));
    TRY(last_norm(s, s->first.dxrec, &nll_norm));
    TRY(last_norm(s, g->dxrec, &g_norm));
    const double d_weight = g->weight * adaptive_weight(nll_norm / unit, g_norm / unit);
    add_scaled(s->first.dxrec, g->dxrec, d_weight * g->factor, s->batch * 3 * s->size * s->size);
    *loss += d_weight * g->factor * g_loss;
    g->g += unit * g_loss, g->d_weight += unit * d_weight;
    return OK;
}

static Err judge(Stage *s, const real *pictures, int genuine) {
    Gan *g = s->first.gan;
    const double unit = 1 / s->shares;
    const real *logits;
    TRY(disc_forward(g->d, pictures, 1, &logits));
    g->disc += unit * g->factor * disc_loss(g->kind, logits, disc_logits(g->d), genuine, unit * g->factor, g->dlogits);
    return disc_backward(g->d, g->dlogits, 0, 1, NULL);
}

/* After the first stage's backward; in the official order, the last micro batch's waits for gan_after_step. */
Err gan_discriminator(Stage *s, const real *xrec) {
    Gan *g = s->first.gan;
    if (!g || s->step < g->first) return OK;
    if (g->official_order && s->micro_index + 1 == s->set.accumulate) return OK;
    TRY(judge(s, g->images, 1));
    TRY(judge(s, xrec, 0));
    return OK;
}

static Err judge_anew(Stage *s) {
    const real *images = s->first.gan->images, *xrec;
    double codebook;
    TRY(vqgan_forward(s->vqgan, images, s->batch, s->size, s->size, &xrec, &codebook));
    TRY(judge(s, images, 1));
    return judge(s, xrec, 0);
}

/* s->step counts the step that has just been made; the learning rate is the first stage's. A bad loss or gradient of the
 * discriminator says nothing against the first stage's step, which counts; its own is passed over. */
Err gan_after_step(Stage *s) {
    Gan *g = s->first.gan;
    if (g && s->step == g->start) forget_steps(&s->history);
    if (!g || s->step <= g->first) return OK;
    TRY(ranks_agree(g->official_order ? judge_anew(s) : OK));
    double sums[] = {g->disc, g->g, g->d_weight};
    TRY(gradients_begin(g->params));
    TRY(gradients_end(g->params));
    TRY(ranks_sum(sums, 3));
    g->disc = sums[0], g->g = sums[1], g->d_weight = sums[2];
    const double loss = test_discriminator_loss(s, g->disc),
                 norm = test_discriminator_norm(s, params_grad_norm(g->params));
    const char *bad = why_bad_discriminator(s, g->recent, loss, norm);
    if (bad) return pass_over_discriminator(s, bad, loss, norm);
    g->adam.lr = s->adam.lr;
    adamw_step(g->params, &g->adam, s->step - g->adam_from);
    return OK;
}

/* ------------------------------------------------------------------------------------------------------------
 * State and log
 * ---------------------------------------------------------------------------------------------------------- */

/* What all ranks should have the same of. Not its values: batch norm's buffers are each rank's own, of its pictures. */
Err gan_gather(const Stage *s) {
    Params *p = s->first.gan ? s->first.gan->params : NULL;
    if (!p) return OK;
    TRY(ranks_agree(params_fetch(p)));
    return ranks_same(p->arena[2], p->total * sizeof(real), "moments of the discriminator");
}

static const char recent_name[] = "recent_discriminator_loss_and_norm";
static const size_t recent_dim[] = {2, RECENT};

/* Batch norm's buffers are rows of the table: the first rank's, which nothing is computed from in training. */
Err gan_collect_state(const Stage *s, TensorList *list) {
    if (!s->first.gan) return OK;
    TRY(tensor_list_add(list, recent_name, DT_F32, 2, recent_dim, s->first.gan->recent, 1));
    TRY(tensor_list_params(list, s->first.gan->params, 'v', "value.", DT_F32));
    TRY(tensor_list_params(list, s->first.gan->params, '1', "adam.m.", DT_F32));
    return tensor_list_params(list, s->first.gan->params, '2', "adam.v.", DT_F32);
}

size_t gan_state_bytes(const Stage *s) {
    int wanted = config_get(&s->recipe, LOSS, "disc_start") != NULL;
    DiscConfig c;
    Discriminator *d = NULL;
    size_t bytes = 0;
    if (config_flag(&wanted, &s->recipe, "train.", "discriminator", 1) != OK || !wanted) return 0;
    if (disc_config_read(&c, &s->recipe, LOSS) == OK && disc_create(&d, &c) == OK)
        bytes = 3 * disc_params(d)->total * sizeof(float);
    disc_free(d);
    return bytes;
}

Err gan_load_state(Stage *s, const Checkpoint *ck) {
    if (!s->first.gan) return OK;
    TRY(params_load(s->first.gan->params, ck, 'v', "value."));
    TRY(params_load(s->first.gan->params, ck, '1', "adam.m."));
    TRY(params_load(s->first.gan->params, ck, '2', "adam.v."));
    forget_recent(s->first.gan->recent);
    if (checkpoint_find(ck, recent_name)) /* states of earlier versions have none */
        TRY(checkpoint_reals(ck, recent_name, 2, recent_dim, 2 * RECENT, s->first.gan->recent));
    return params_send(s->first.gan->params);
}

/* An official checkpoint of a first stage has its discriminator too. */
Err gan_start_from(Stage *s, const Checkpoint *ck) {
    if (!s->first.gan || !checkpoint_find(ck, s->first.gan->params->row[0].name)) return OK;
    TRY(params_load(s->first.gan->params, ck, 'v', ""));
    return params_send(s->first.gan->params);
}

int gan_log(const Stage *s, char *text, size_t size) {
    if (!s->first.gan) return snprintf(text, size, "\t\t\t");
    return snprintf(text, size, "\t%.6g\t%.6g\t%.6g", s->first.gan->disc, s->first.gan->g, s->first.gan->d_weight);
}

const char *gan_progress(const Stage *s, char text[96]) {
    text[0] = 0;
    if (s->first.gan)
        snprintf(text, 96, " | D %.4f | G %.4f x %.3f", s->first.gan->disc, s->first.gan->g, s->first.gan->d_weight);
    return text;
}
