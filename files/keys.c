/* keys.c - every key of a configuration that is known: the official ones and ours, in one table.
 *
 * A recipe has a key behind its part's name, a file's metadata as it is. What the table has is obeyed; harmless, which
 * nothing that we do depends on; or harmless with the values that say what we do anyway, and refused with others. What
 * it does not have is a mistake, which is said with the known key that is nearest.
 *
 * Read: the table; finding a key; checking. */
#include "files/files.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- The table ---- */

enum {
    F = KEYS_FIRST,
    T = KEYS_TRANSITION,
    B = F | T, /* of both */
    X = T | KEYS_X,
    G = T | KEYS_GPT,
};
#define P "model.params."
#define DD P "ddconfig."
#define LOSS P "lossconfig."
#define LP LOSS "params."
#define LR P "scheduler_config.params."
#define NET P "transformer_config.params."
#define DATA "data.params."
#define TRAINER "lightning.trainer."

#define OBEYED(key, where)                                                                                             \
    { key, KEY_OBEYED, where, NULL, NULL }
#define HARMLESS(key, where)                                                                                           \
    { key, KEY_HARMLESS, where, NULL, NULL }
#define ONLY(key, where, values, why)                                                                                  \
    { key, KEY_ONLY, where, values, why }
#define TRAINING_ONLY(key, where, values, why)                                                                         \
    { key, KEY_ONLY, (where) | KEYS_TRAINING, values, why }
#define OWN(key, where)                                                                                                \
    { key, KEY_OWN, where, NULL, NULL }
/* Of the encoder's layers and of the decoder's */
#define LAYERS(row, key, ...) row(NET "enc_" key, X, __VA_ARGS__), row(NET "dec_" key, X, __VA_ARGS__)
#define OFF "false|null|0"
#define NOT_HERE "is not implemented"
#define NO_DROPOUT "training here has no dropout"

static const KnownKey table[] = {
    OBEYED("model.base_learning_rate", B),
    HARMLESS("model.project", B),
    ONLY("model.target", F, "taming.models.vqgan.VQModel|imagebart.models.vqgan.VQGANWrapper",
         "is another first stage"),
    ONLY("model.target", T,
         "imagebart.models.diffusion.DenoisingXTransformer|imagebart.models.diffusion.DecoderOnlyDenoiser",
         "is another network"),

    /* the first stage */
    OBEYED(P "embed_dim", F),
    OBEYED(P "n_embed", F),
    OBEYED(P "re_embed", F),
    OBEYED(P "legacy", F),
    OBEYED(P "beta", F),
    OBEYED(P "remap", F),
    HARMLESS(P "sane_index_shape", F),
    ONLY(P "image_key", F, "image", "pictures are all there is"),
    ONLY(P "colorize_nlabels", F, "null", NOT_HERE),
    OBEYED(DD "ch", F),
    OBEYED(DD "out_ch", F),
    OBEYED(DD "ch_mult", F),
    OBEYED(DD "num_res_blocks", F),
    OBEYED(DD "attn_resolutions", F),
    OBEYED(DD "in_channels", F),
    OBEYED(DD "resolution", F),
    OBEYED(DD "z_channels", F),
    OBEYED(DD "double_z", F),
    OBEYED(DD "resamp_with_conv", F),
    HARMLESS(DD "tanh_out", F), /* the official decoder ignores it */
    TRAINING_ONLY(DD "dropout", F, "0", NO_DROPOUT),
    ONLY(DD "give_pre_end", F, "false", NOT_HERE),
    ONLY(LOSS "target", F,
         "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator|taming.modules.losses.vqperceptual.DummyLoss",
         "is another loss"),
    OBEYED(LP "disc_start", F),
    OBEYED(LP "disc_weight", F),
    OBEYED(LP "disc_factor", F),
    OBEYED(LP "disc_in_channels", F),
    OBEYED(LP "disc_ndf", F),
    OBEYED(LP "disc_num_layers", F),
    OBEYED(LP "disc_loss", F),
    OBEYED(LP "codebook_weight", F),
    OBEYED(LP "perceptual_weight", F),
    HARMLESS(LP "pixelloss_weight", F), /* the official loss ignores it */
    TRAINING_ONLY(LP "disc_conditional", F, "false", "a discriminator that sees a condition is not supported"),
    TRAINING_ONLY(LP "use_actnorm", F, "false", "the discriminator has batch norm alone"),

    /* a transition */
    OBEYED(P "n_scales", T),
    OBEYED(P "single_scale", T),
    OBEYED(P "redraw_prob", T),
    OBEYED(P "alpha", T),
    OBEYED(P "soft_only", T),
    OBEYED(P "use_ema", T),
    OBEYED(P "use_past_for_sampling", T),
    ONLY(P "regression", T, "false", "a decoder that reads zeros is not implemented"),
    ONLY(P "rescale_transformer_logits", T, "false", NOT_HERE),
    ONLY(P "sos_token", T, "0", "sequences begin with token 0"),
    ONLY(P "first_stage_key", T, "image", "pictures are all there is"),
    ONLY(P "conditioner_key", T, "null", NOT_HERE),
    ONLY(P "conditioner_config", T, "null", "expected its target, or nothing"),
    OBEYED(P "conditioner_config.target", T),
    ONLY(P "conditioner_config.params.key", T, "class_label", "classes are the only condition"),
    HARMLESS(P "top_k", T), /* of the pictures that the official training draws */
    ONLY(P "first_stage_config.target", T, "taming.models.vqgan.VQModel|imagebart.models.vqgan.VQGANWrapper",
         "is another first stage"),
    OBEYED(P "transformer_config.target", T),

    /* either */
    OBEYED(P "ckpt_path", B),
    ONLY(P "ignore_keys", B, "-|[]|null", "all tensors of ckpt_path are taken"),
    HARMLESS(P "monitor", B),
    OBEYED(P "scheduler_config.target", B),
    OBEYED(LR "lr_start", B),
    OBEYED(LR "lr_max", B),
    OBEYED(LR "lr_min", B),
    OBEYED(LR "warm_up_steps", B),
    OBEYED(LR "max_decay_steps", B),
    OBEYED(LR "f_start", B),
    OBEYED(LR "f_max", B),
    OBEYED(LR "f_min", B),
    OBEYED(LR "cycle_lengths", B),
    HARMLESS(LR "verbosity_interval", B),

    /* mingpt.GPT */
    OBEYED(NET "vocab_size", G),
    OBEYED(NET "input_vocab_size", G),
    OBEYED(NET "block_size", G),
    OBEYED(NET "n_layer", G),
    OBEYED(NET "n_head", G),
    OBEYED(NET "n_embd", G),
    OBEYED(NET "n_unmasked", G),
    TRAINING_ONLY(NET "embd_pdrop", G, "0", NO_DROPOUT),
    TRAINING_ONLY(NET "resid_pdrop", G, "0", NO_DROPOUT),
    TRAINING_ONLY(NET "attn_pdrop", G, "0", NO_DROPOUT),
    ONLY(NET "autoset_layers", G, "false", "n_layer says how many"),

    /* XTransformer */
    OBEYED(NET "dim", X),
    OBEYED(NET "tie_token_emb", X),
    OBEYED(NET "scale_pos", X),
    OBEYED(NET "n_scales", X),
    OBEYED(NET "xt_start", X),
    HARMLESS(NET "xt_size", X), /* all of x_t, or the official code stops */
    ONLY(NET "wrap_decoder", X, "false", "is broken in the official code and not implemented"),
    ONLY(NET "causal_decoder", X, "true", "a decoder that sees what it has to predict is not implemented"),
    ONLY(NET "split_dim", X, "null", NOT_HERE),
    ONLY(NET "use_effective_seq_len", X, "false", NOT_HERE),
    ONLY(NET "pre_norm", X, "true",
         "layers are normalised in front; the official option is enc_pre_norm, dec_pre_norm"),
    OBEYED(NET "enc_num_tokens", X),
    OBEYED(NET "dec_num_tokens", X),
    OBEYED(NET "enc_depth", X),
    OBEYED(NET "dec_depth", X),
    OBEYED(NET "enc_heads", X),
    OBEYED(NET "dec_heads", X),
    OBEYED(NET "enc_max_seq_len", X),
    OBEYED(NET "dec_max_seq_len", X),
    ONLY(NET "enc_causal", X, "false", NOT_HERE),
    ONLY(NET "dec_causal", X, "true", NOT_HERE),
    ONLY(NET "enc_cross_attend", X, "false", NOT_HERE),
    ONLY(NET "dec_cross_attend", X, "true", NOT_HERE),
    HARMLESS(NET "enc_emb_dropout", X), /* the official code ignores it */
    HARMLESS(NET "dec_emb_dropout", X),
    TRAINING_ONLY(NET "enc_attn_dropout", X, "0", NO_DROPOUT),
    TRAINING_ONLY(NET "dec_attn_dropout", X, "0", NO_DROPOUT),
    TRAINING_ONLY(NET "enc_ff_dropout", X, "0", NO_DROPOUT),
    TRAINING_ONLY(NET "dec_ff_dropout", X, "0", NO_DROPOUT),
    LAYERS(ONLY, "pre_norm", "true", "layers are normalised in front"),
    LAYERS(ONLY, "use_pos_emb", "true", NOT_HERE),
    LAYERS(ONLY, "num_memory_tokens", OFF, NOT_HERE),
    LAYERS(ONLY, "emb_dim", "null", NOT_HERE),
    LAYERS(ONLY, "max_mem_len", OFF, NOT_HERE),
    LAYERS(ONLY, "tie_embedding", OFF, NOT_HERE),
    LAYERS(ONLY, "only_cross", OFF, NOT_HERE),
    LAYERS(ONLY, "use_scalenorm", OFF, NOT_HERE),
    LAYERS(ONLY, "use_rmsnorm", OFF, NOT_HERE),
    LAYERS(ONLY, "use_rezero", OFF, NOT_HERE),
    LAYERS(ONLY, "rel_pos_bias", OFF, NOT_HERE),
    LAYERS(ONLY, "rel_pos_num_buckets", "32|" OFF, NOT_HERE),
    LAYERS(ONLY, "rel_pos_max_distance", "128|" OFF, NOT_HERE),
    LAYERS(ONLY, "position_infused_attn", OFF, NOT_HERE),
    LAYERS(ONLY, "rotary_pos_emb", OFF, NOT_HERE),
    LAYERS(ONLY, "rotary_emb_dim", OFF, NOT_HERE),
    LAYERS(ONLY, "custom_layers", "null", NOT_HERE),
    LAYERS(ONLY, "sandwich_coef", "null", NOT_HERE),
    LAYERS(ONLY, "par_ratio", "null", NOT_HERE),
    LAYERS(ONLY, "residual_attn", OFF, NOT_HERE),
    LAYERS(ONLY, "cross_residual_attn", OFF, NOT_HERE),
    LAYERS(ONLY, "macaron", OFF, NOT_HERE),
    LAYERS(ONLY, "gate_residual", OFF, NOT_HERE),
    LAYERS(ONLY, "ff_mult", "4", NOT_HERE),
    LAYERS(ONLY, "ff_glu", OFF, NOT_HERE),
    LAYERS(ONLY, "ff_dim_out", "null", NOT_HERE),
    LAYERS(ONLY, "attn_dim_head", "64", NOT_HERE),
    LAYERS(ONLY, "attn_talking_heads", OFF, NOT_HERE),
    LAYERS(ONLY, "attn_sparse_topk", "null", NOT_HERE),
    LAYERS(ONLY, "attn_use_entmax15", OFF, NOT_HERE),
    LAYERS(ONLY, "attn_num_mem_kv", OFF, NOT_HERE),
    LAYERS(ONLY, "attn_on_attn", OFF, NOT_HERE),
    LAYERS(ONLY, "attn_mask", "null", NOT_HERE),

    /* data and the official trainer */
    OBEYED("data.prep", B),
    HARMLESS("data.target", B),
    OBEYED(DATA "batch_size", B),
    HARMLESS(DATA "num_workers", B),
    HARMLESS(DATA "wrap", B),
    OBEYED(DATA "train.target", B),
    OBEYED(DATA "train.params.size", B),
    OBEYED(DATA "train.params.crop_size", B),
    OBEYED(DATA "train.params.config.size", B),
    ONLY(DATA "train.params.coord", B, "false|null", NOT_HERE),
    ONLY(DATA "train.params.keys", B, "null", NOT_HERE),
    HARMLESS(DATA "train.params.training_images_list_file", B), /* --data says which pictures */
    OBEYED(DATA "validation.target", B),
    OBEYED(DATA "validation.params.size", B),
    OBEYED(DATA "validation.params.crop_size", B),
    OBEYED(DATA "validation.params.config.size", B),
    ONLY(DATA "validation.params.coord", B, "false|null", NOT_HERE),
    ONLY(DATA "validation.params.keys", B, "null", NOT_HERE),
    HARMLESS(DATA "validation.params.test_images_list_file", B),
    OBEYED(TRAINER "accumulate_grad_batches", B),
    HARMLESS(TRAINER "benchmark", B),
    HARMLESS(TRAINER "deterministic", B),
    HARMLESS(TRAINER "gpus", B),
    HARMLESS(TRAINER "num_nodes", B),
    HARMLESS(TRAINER "accelerator", B),
    HARMLESS(TRAINER "distributed_backend", B),
    HARMLESS(TRAINER "log_every_n_steps", B),
    HARMLESS(TRAINER "check_val_every_n_epoch", B),
    HARMLESS(TRAINER "val_check_interval", B),
    HARMLESS(TRAINER "num_sanity_val_steps", B),
    HARMLESS(TRAINER "progress_bar_refresh_rate", B),
    HARMLESS(TRAINER "weights_summary", B),
    TRAINING_ONLY(TRAINER "precision", B, "32", "--precision says it"),
    TRAINING_ONLY(TRAINER "gradient_clip_val", B, "0|null", "gradients are not clipped"),
    TRAINING_ONLY(TRAINER "max_steps", B, "null|-1", "train.steps says how long"),
    TRAINING_ONLY(TRAINER "max_epochs", B, "null", "train.steps says how long"),
    HARMLESS("lightning.callbacks.*", B),
    HARMLESS("lightning.logger.*", B),
    HARMLESS("lightning.modelcheckpoint.*", B),

    /* ours */
    OBEYED("train.steps", B),
    OBEYED("train.seed", B),
    OBEYED("train.spike", B),
    OBEYED("train.flip", B),
    OBEYED("train.early_stop", B),
    OBEYED("train.bf16_states", B),
    OBEYED("train.weight_decay_scale", B),
    OBEYED("train.ema_decay", T),
    OBEYED("train.crops", T),
    OBEYED("train.label_dropout", T),
    OBEYED("train.balance_classes", T),
    OBEYED("train.l1_weight", F),
    OBEYED("train.l2_weight", F),
    OBEYED("train.codebook_weight", F),
    OBEYED("train.restart_codes", F),
    OBEYED("train.freeze_encoder", F),
    OBEYED("train.discriminator", F),
    OBEYED("train.disc_warm_up", F),
    OBEYED("train.official_order", F),
    OBEYED("train.feature_weight", F),
    OBEYED("imagebart.store", B),
    OBEYED("imagebart.compact", B),
    OBEYED("imagebart.class_list", T),
    OBEYED("imagebart.classes", T),
    OBEYED("imagebart.null_class", T),
    OBEYED("imagebart.h", T),
    OBEYED("imagebart.w", T),
    OBEYED("imagebart.temperature", T),
    OBEYED("imagebart.top_k", T),
    OBEYED("imagebart.guidance", T),
    OBEYED("imagebart.chain_length", T),
    OBEYED("imagebart.inpaint_chain_length", T),
    OBEYED("imagebart.candidates", T),
    OBEYED("imagebart.best_of", T),
    OBEYED("imagebart.own_nats", T),
    OBEYED("imagebart.familiar_nats", T),
    OBEYED("imagebart.familiar_error", T),

    /* what ./train writes into files */
    OWN("train.step", B),
    OWN("train.ema_updates", B),
    OWN("train.checksum", B),
    OWN("train.device", B),
    OWN("train.processor", B),
    OWN("train.pictures", B),
    OWN("train.skipped", B),
    OWN("train.best_step", B),
    OWN("train.best_validation_loss", B),
    OWN("train.stopped_early", B),
    OWN("train.perceptual", F),
};
enum { KEYS = sizeof table / sizeof *table };

const KnownKey *known_keys(size_t *n) {
    *n = KEYS;
    return table;
}

/* ---- Finding a key ---- */

static const char FIRST_STAGE[] = P "first_stage_config.params.";

const char *first_stage_key(const char *key) {
    const size_t n = sizeof FIRST_STAGE - 1;
    return strncmp(key, FIRST_STAGE, n) ? NULL : key + n;
}

static int is_key(const KnownKey *k, const char *key) {
    const size_t n = strlen(k->key);
    return k->key[n - 1] == '*' ? !strncmp(k->key, key, n - 1) && key[n - 1] : !strcmp(k->key, key);
}

static const KnownKey *find(const char *key, unsigned where) {
    for (const KnownKey *k = table; k < table + KEYS; k++)
        if ((k->where & where & B) && is_key(k, key)) return k;
    return NULL;
}

/* Of a first stage inside a transition's configuration, which is not trained there, too */
const KnownKey *known_key(const char *key, unsigned where) {
    const char *inner = where & KEYS_TRANSITION ? first_stage_key(key) : NULL;
    char name[128];
    if (!inner) return find(key, where);
    if ((size_t)snprintf(name, sizeof name, P "%s", inner) >= sizeof name) return NULL;
    return find(name, KEYS_FIRST);
}

/* What is nearest to a key of n letters so far, and how many letters are others */
typedef struct {
    const char *key;
    size_t n, least;
    char best[160];
} Nearest;

/* A third of the letters may be wrong. The colon of YAML is no part of a key. */
static Nearest nearest_to(const char *key) {
    Nearest x = {.key = key, .n = strlen(key)};
    x.n -= x.n > 0 && (key[x.n - 1] == ':' || key[x.n - 1] == '=');
    x.least = max_size(x.n / 3, 1) + 1;
    return x;
}

/* Is a name with d other letters near? They are few beside those that follow the words which both begin with. */
static int is_near(const Nearest *x, const char *name, size_t d) {
    size_t same = 0, words = 0;
    for (; same < x->n && x->key[same] == name[same]; same++)
        if (name[same] == '.') words = same + 1;
    return d <= max_size((x->n - words) / 3, 2);
}

/* Of the table's keys, without their `skip` letters of P behind `front`: one that ends so, or else the one with the fewest
 * other letters */
static void search(Nearest *x, const char *front, unsigned where, size_t skip) {
    char name[160];
    for (const KnownKey *k = table; k < table + KEYS; k++) {
        if (!(k->where & where & B) || k->kind == KEY_OWN || strchr(k->key, '*') || strncmp(k->key, P, skip)) continue;
        const size_t n = (size_t)snprintf(name, sizeof name, "%s%s", front, k->key + skip);
        const size_t longer = n > x->n ? n - x->n : x->n - n; /* letters that are other at least */
        size_t d = longer < x->least ? word_distance(x->key, x->n, name) : longer;
        if (n > x->n && n < sizeof name && name[n - x->n - 1] == '.' && !strncmp(name + n - x->n, x->key, x->n)) d = 0;
        if (d < x->least && is_near(x, name, d)) x->least = d, memcpy(x->best, name, sizeof name);
    }
}

static Err unknown(const Nearest *x) {
    return *x->best ? err("unknown key '%.200s'; did you mean %s?", x->key, x->best)
                    : err("unknown key '%.200s'", x->key);
}

/* ---- A recipe's key ---- */

/* What a part of a recipe holds; 0: there is no such part. *key: behind its name */
static unsigned part_of(const char **key) {
    static const char *const parts[] = {"vqgan", "scale", "last", "joint"};
    const char *dot = strchr(*key, '.');
    const size_t n = dot ? (size_t)(dot - *key) : 0;
    if (!n) return 0;
    int known = 0, first = 0;
    for (int i = 0; i < 4 && !known; i++) known = strlen(parts[i]) == n && !strncmp(*key, parts[i], n), first = i == 0;
    if (!known && !strncmp(*key, "scale", 5)) {
        const char *s = *key + 5;
        size_t t;
        known = text_digits(&t, &s) && s == dot && t >= 1 && t <= MAX_SCALES && (*key)[5] != '0';
        first = 0;
    }
    *key += known ? n + 1 : 0;
    return !known ? 0 : first ? KEYS_FIRST : KEYS_TRANSITION;
}

static Err unknown_in_recipe(const char *key) {
    static const char *const fronts[] = {"vqgan.", "scale.", "last.", "joint."};
    char own[32 + sizeof FIRST_STAGE];
    Nearest x = nearest_to(key);
    const char *inner = key;
    const unsigned where = part_of(&inner);
    snprintf(own, sizeof own, "%.*s%s", (int)min_size((size_t)(inner - key), 31), key, FIRST_STAGE);
    if (where && first_stage_key(inner)) search(&x, own, F, sizeof P - 1);
    own[inner - key] = 0;
    if (where) search(&x, own, where, 0);
    for (int i = 0; i < 4 && !(where && *x.best); i++) search(&x, fronts[i], i ? T : F, 0);
    const char *without = x.best + strcspn(x.best, ".");
    if (where || x.least || !*without || !find(without + 1, F) || !find(without + 1, T)) return unknown(&x);
    return err("unknown key '%.200s'; did you mean vqgan%s or scale%s?", key, without, without);
}

Err recipe_key_check(const char *key) {
    const char *inner = key;
    const unsigned where = part_of(&inner);
    const KnownKey *k = where ? known_key(inner, where) : NULL;
    if (!k) return unknown_in_recipe(key);
    return k->kind == KEY_OWN ? err("%s: ./train writes it; it does not belong into a recipe", key) : OK;
}

/* ---- A configuration: of a recipe's part, or a file's metadata ---- */

/* Lists with brackets and blanks, too */
static const char *next_letter(const char *s) {
    return s + strspn(s, " []");
}
static int same_letters(const char *a, const char *b) {
    for (a = next_letter(a), b = next_letter(b); *a && tolower((unsigned char)*a) == tolower((unsigned char)*b);)
        a = next_letter(a + 1), b = next_letter(b + 1);
    return !*a && !*b;
}

int same_config_value(const char *a, const char *b) {
    char *end_a, *end_b;
    const double x = strtod(a, &end_a), y = strtod(b, &end_b);
    if (end_a > a && end_b > b && !*end_a && !*end_b) return x == y;
    return same_letters(a, b);
}

int is_one_of_values(const char *value, const char *values) {
    char one[160];
    if (!strcmp(value, "None") || !strcmp(value, "~")) value = "null"; /* Python's, and YAML's other */
    for (size_t n; *values; values += n + (values[n] != 0)) {
        n = strcspn(values, "|");
        snprintf(one, sizeof one, "%.*s", (int)n, values);
        if (same_config_value(value, one)) return 1;
    }
    return 0;
}

Err key_value_check(const KnownKey *k, const char *key, const char *value, int training) {
    char values[240] = "";
    if (k->kind != KEY_ONLY || ((k->where & KEYS_TRAINING) && !training) || is_one_of_values(value, k->only)) return OK;
    size_t at = 0;
    for (const char *s = k->only; *s && at + 5 < sizeof values; s++)
        at += (size_t)snprintf(values + at, sizeof values - at, *s == '|' ? " or " : "%c", *s);
    return err("%s %.200s: %s; expected %s", key, value, k->why, values);
}

/* Metadata may be of other people, who have keys of their own: those that begin as ours, or nearly, and are nearly ours are
 * not. */
static Err unknown_in_file(const char *key, unsigned where) {
    static const char *const ours[] = {"model", "data", "train", "lightning", "imagebart"};
    const size_t n = strcspn(key, ".");
    size_t least = 3;
    for (int i = 0; i < 5 && key[n]; i++) least = min_size(least, word_distance(key, n, ours[i]));
    if (least == 3) return OK;
    Nearest x = nearest_to(key);
    search(&x, "", where, 0);
    return least == 0 || (*x.best && x.least && x.least < 3) ? unknown(&x) : OK;
}

/* The official class of the whole model must be the one that has such a network. */
static Err check_class(const Config *c) {
    const char *target = config_get(c, "model.", "target"), *net = config_get(c, P, "transformer_config.target");
    if (!target || !net) return OK;
    const int gpt = strstr(net, "GPT") != NULL, decoder_only = strstr(target, "DecoderOnlyDenoiser") != NULL;
    if (gpt == decoder_only) return OK;
    return config_err(
        c, "model.", "target", "model.target %s: expected %s, for transformer_config.target is %s", target,
        gpt ? "imagebart.models.diffusion.DecoderOnlyDenoiser" : "imagebart.models.diffusion.DenoisingXTransformer",
        net);
}

Err keys_check(const Config *c, unsigned where, int training) {
    for (size_t i = 0; i < c->n; i++) {
        const char *key = c->kv[i].key;
        const KnownKey *k = known_key(key, where);
        const char *typed = c->kv[i].place ? c->kv[i].typed : key;
        if (k && key_value_check(k, typed, c->kv[i].value, training && !first_stage_key(key)) != OK)
            return config_blame(c, "", key);
        else if (!k && !known_key(key, B)) /* --all gives its options to every stage */
            TRY(unknown_in_file(key, where));
    }
    TRY(own_values_check(c));
    return where & KEYS_TRANSITION ? check_class(c) : OK;
}
