/* net_config.c - the settings of a transition network: the official keys under "transformer_config." (SPEC sections 1 and
 * 2), read, written and checked by one table of sizes.
 *
 * Refuses: options that transformer.cu does not implement, sizes out of range, sizes that do not fit each other. */
#include "base/compute.h"
#include "files/files.h"

#include <stdio.h>
#include <string.h>

typedef struct {
    const char *target;
    NetKind kind;
    XVariant variant;
} NetTarget;
static const NetTarget net_targets[] = {
    {"imagebart.modules.xtransformers.x_transformer.XTransformer", NET_X, X_PLAIN},
    {"imagebart.modules.xtransformers.x_transformer.ScaledXTransformer", NET_X, X_SCALED},
    {"imagebart.modules.xtransformers.x_transformer.FineScaledXTransformer", NET_X, X_FINE_SCALED},
    {"imagebart.modules.xtransformers.x_transformer.ResidualXTransformer", NET_X, X_RESIDUAL},
    {"imagebart.modules.xtransformers.x_transformer.ResidualScaledXTransformer", NET_X, X_RESIDUAL_SCALED},
    {"imagebart.modules.transformer.mingpt.GPT", NET_GPT, X_PLAIN},
    {NULL, NET_X, X_PLAIN},
};
static const char *const class_provider = "imagebart.util.ClassProvider";

/* A size under "transformer_config.params." and the field it fills: reading, writing and checking loop over these. */
typedef struct {
    const char *key;
    size_t field; /* offset of a size_t in NetConfig */
    size_t lo, hi;
    int optional;
} SizeOption;
enum { DIM_MAX = 1 << 16, DEPTH_MAX = 1024, HEADS_MAX = 1024, TOKENS_MAX = 1 << 24 };
static const SizeOption x_sizes[] = {
    {"dim", offsetof(NetConfig, dim), 1, DIM_MAX, 0},
    {"enc_num_tokens", offsetof(NetConfig, enc_num_tokens), 2, TOKENS_MAX, 0},
    {"enc_depth", offsetof(NetConfig, enc_depth), 1, DEPTH_MAX, 0},
    {"enc_heads", offsetof(NetConfig, enc_heads), 1, HEADS_MAX, 0},
    {"enc_max_seq_len", offsetof(NetConfig, enc_max_seq_len), 2, NET_LENGTH_MAX, 0},
    {"dec_num_tokens", offsetof(NetConfig, dec_num_tokens), 1, TOKENS_MAX, 0},
    {"dec_depth", offsetof(NetConfig, dec_depth), 1, DEPTH_MAX, 0},
    {"dec_heads", offsetof(NetConfig, dec_heads), 1, HEADS_MAX, 0},
    {"dec_max_seq_len", offsetof(NetConfig, dec_max_seq_len), 1, NET_LENGTH_MAX, 0},
    {NULL, 0, 0, 0, 0},
};
static const SizeOption gpt_sizes[] = {
    {"n_embd", offsetof(NetConfig, dim), 1, DIM_MAX, 0},
    {"vocab_size", offsetof(NetConfig, dec_num_tokens), 1, TOKENS_MAX, 0},
    {"input_vocab_size", offsetof(NetConfig, input_vocab_size), 2, TOKENS_MAX, 1},
    {"n_layer", offsetof(NetConfig, dec_depth), 1, DEPTH_MAX, 0},
    {"n_head", offsetof(NetConfig, dec_heads), 1, HEADS_MAX, 0},
    {"block_size", offsetof(NetConfig, dec_max_seq_len), 1, NET_LENGTH_MAX, 0},
    {"n_unmasked", offsetof(NetConfig, n_unmasked), 0, NET_LENGTH_MAX, 1},
    {NULL, 0, 0, 0, 0},
};

static const SizeOption *sizes_of(NetKind kind) {
    return kind == NET_X ? x_sizes : gpt_sizes;
}
static size_t *size_field(NetConfig *c, const SizeOption *o) {
    return (size_t *)((char *)c + o->field);
}

/* Every option under `params` must be one of this network's, with a value that can be had. */
static Err refuse_unknown_options(const Config *from, const char *params, NetKind kind) {
    const size_t skip = strlen(params);
    for (size_t i = 0; i < from->n; i++) {
        const char *key = from->kv[i].key;
        char name[160];
        if (strncmp(key, params, skip) != 0) continue;
        const int fits = snprintf(name, sizeof name, "model.params.transformer_config.params.%s", key + skip) < 160;
        const KnownKey *k = fits ? known_key(name, KEYS_TRANSITION) : NULL;
        if (!k || !(k->where & (kind == NET_X ? KEYS_X : KEYS_GPT)))
            return err("%.200s: not an option of %s", key, kind == NET_X ? "an XTransformer" : "mingpt.GPT");
        const char *typed = from->kv[i].place ? from->kv[i].typed : key;
        if (key_value_check(k, typed, from->kv[i].value, 0) != OK) return config_blame(from, "", key);
    }
    return OK;
}

/* What NET_X has besides sizes. The positions of t and x_t in the encoder's input have one possible value. */
static Err read_x_options(NetConfig *c, const Config *from, const char *params) {
    size_t scale_pos = 0, xt_start = prompt_length(c), n_scales = (size_t)c->n_scales;
    TRY(config_flag(&c->tie_token_emb, from, params, "tie_token_emb", 1));
    TRY(config_size(&scale_pos, from, params, "scale_pos", 0, 0, 1));
    TRY(config_size(&n_scales, from, params, "n_scales", n_scales, n_scales, 1));
    return config_size(&xt_start, from, params, "xt_start", xt_start, xt_start, 1);
}

/* The prompt of kept keys and values is never masked (SPEC section 2). Without them the official code draws as it
 * trained: the same if just the prompt, or one token, is unmasked. */
static Err check_past(const NetConfig *c, const Config *from, const char *prefix) {
    int past = 1;
    TRY(config_flag(&past, from, prefix, "use_past_for_sampling", 1));
    if (past || c->kind == NET_X || max_size(c->n_unmasked, 1) == prompt_length(c)) return OK;
    return config_err(
        from, prefix, "use_past_for_sampling",
        "%suse_past_for_sampling false: not implemented where n_unmasked (%zu) is not the prompt's length (%zu)",
        prefix, c->n_unmasked, prompt_length(c));
}

static Err read_net(NetConfig *c, const Config *from, const char *prefix) {
    char params[256];
    size_t n_scales = 0;
    const NetTarget *found = net_targets;
    memset(c, 0, sizeof *c);
    if (snprintf(params, sizeof params, "%stransformer_config.params.", prefix) >= (int)sizeof params)
        return err("transformer: configuration prefix of %zu bytes is too long", strlen(prefix));
    const char *target = config_get(from, prefix, "transformer_config.target");
    if (!target) return err("%stransformer_config.target is missing", prefix);
    while (found->target && strcmp(target, found->target) != 0) found++;
    if (!found->target) {
        err("%stransformer_config.target is \"%s\", expected an XTransformer or mingpt.GPT", prefix, target);
        return config_blame(from, prefix, "transformer_config.target");
    }
    c->kind = found->kind, c->variant = found->variant;
    const char *conditioner = config_get(from, prefix, "conditioner_config.target");
    if (conditioner && strcmp(conditioner, class_provider) != 0)
        return config_err(from, prefix, "conditioner_config.target",
                          "%sconditioner_config.target is \"%s\", expected %s", prefix, conditioner, class_provider);
    c->has_class = conditioner != NULL;
    TRY(config_size(&n_scales, from, prefix, "n_scales", 1, MAX_SCALES, 0));
    c->n_scales = (int)n_scales;
    TRY(refuse_unknown_options(from, params, c->kind));
    for (const SizeOption *o = sizes_of(c->kind); o->key; o++)
        TRY(config_size(size_field(c, o), from, params, o->key, o->lo, o->hi, o->optional));
    if (c->kind == NET_GPT && c->input_vocab_size == 0) c->input_vocab_size = c->dec_num_tokens;
    TRY(check_past(c, from, prefix));
    return c->kind == NET_X ? read_x_options(c, from, params) : OK;
}

Err net_config_read(NetConfig *c, const Config *from, const char *prefix) {
    return read_net(c, from, prefix) == OK ? OK : config_in_file(from);
}

static Err put(Config *to, const char *prefix, const char *key, const char *text, size_t number) {
    char full[512];
    if (snprintf(full, sizeof full, "%s%s", prefix, key) >= (int)sizeof full)
        return err("transformer: configuration key %s is too long", key);
    return text ? config_set(to, full, "%s", text) : config_set(to, full, "%zu", number);
}

Err net_config_write(Config *to, const NetConfig *c, const char *prefix) {
    char params[256];
    const NetTarget *found = net_targets;
    snprintf(params, sizeof params, "%stransformer_config.params.", prefix);
    while (found->target && (found->kind != c->kind || (c->kind == NET_X && found->variant != c->variant))) found++;
    if (!found->target) return err("transformer: kind %d, variant %d is unknown", (int)c->kind, (int)c->variant);
    TRY(put(to, prefix, "transformer_config.target", found->target, 0));
    TRY(put(to, prefix, "n_scales", NULL, (size_t)c->n_scales));
    if (c->has_class) TRY(put(to, prefix, "conditioner_config.target", class_provider, 0));
    NetConfig copy = *c;
    for (const SizeOption *o = sizes_of(c->kind); o->key; o++)
        TRY(put(to, params, o->key, NULL, *size_field(&copy, o)));
    if (c->kind == NET_GPT) return OK;
    TRY(put(to, params, "wrap_decoder", "false", 0));
    TRY(put(to, params, "tie_token_emb", c->tie_token_emb ? "true" : "false", 0));
    if (c->variant == X_PLAIN) return OK;
    TRY(put(to, params, "scale_pos", NULL, 0));
    TRY(put(to, params, "n_scales", NULL, (size_t)c->n_scales));
    if (!is_residual(c)) return OK;
    TRY(put(to, params, "xt_start", NULL, prompt_length(c)));
    return put(to, params, "xt_size", NULL, c->dec_max_seq_len);
}

Err net_config_check(const NetConfig *c) {
    NetConfig copy = *c;
    if (c->kind != NET_X && c->kind != NET_GPT) return err("transformer: kind %d is unknown", (int)c->kind);
    if ((int)c->variant < X_PLAIN || (int)c->variant > X_RESIDUAL_SCALED)
        return err("transformer: variant %d is unknown", (int)c->variant);
    if (c->n_scales < 1 || c->n_scales > MAX_SCALES)
        return err("transformer: n_scales is %d, expected 1..%d", c->n_scales, (int)MAX_SCALES);
    for (const SizeOption *o = sizes_of(c->kind); o->key; o++) {
        size_t value = *size_field(&copy, o);
        if (value < o->lo || value > o->hi)
            return err("transformer: %s is %zu, expected %zu..%zu", o->key, value, o->lo, o->hi);
    }
    if (c->kind == NET_GPT && c->dim % c->dec_heads != 0)
        return err("transformer: n_embd %zu is not a multiple of n_head %zu", c->dim, c->dec_heads);
    if (c->kind == NET_GPT && c->dim / c->dec_heads > HEAD_MAX)
        return err("transformer: heads of %zu channels, expected at most %d", c->dim / c->dec_heads, (int)HEAD_MAX);
    if (prompt_tokens(c) < c->dec_num_tokens || prompt_tokens(c) <= (size_t)c->n_scales)
        return err("transformer: an input table of %zu tokens is too small for %zu token values and %d scales",
                   prompt_tokens(c), c->dec_num_tokens, c->n_scales);
    return OK;
}

static int begins(const char *text, const char *with) {
    return strncmp(text, with, strlen(with)) == 0;
}

/* Buffers that the official classes keep beside their parameters, and the second name of a tied embedding */
static int is_buffer(const char *name, const NetConfig *c) {
    const char *end = strrchr(name, '.');
    if (c->kind == NET_GPT) return begins(name, "blocks.") && end && strcmp(end, ".mask") == 0;
    return c->tie_token_emb && strcmp(name, "decoder.token_emb.weight") == 0;
}

Err transition_known(const NetConfig *c, const Params *p, const Checkpoint *ck) {
    static const char own[] = "transformer.";
    for (size_t i = 0; i < ck->n; i++) {
        const char *name = ck->tensor[i].name, *rest = name + sizeof own - 1;
        if (begins(name, own) && !is_buffer(rest, c) && !params_has(p, rest))
            return err("unexpected tensor '%s': another network than its configuration says", name);
    }
    return OK;
}

const char *transition_note(char out[ERR_MAX], const Checkpoint *ck) {
    static const char *const known[] = {
        "transformer.", "first_stage_model.", "transformer_ema.", "sos_token", "alphats", "alphacum",
        "loss."}; /* the last one: a training loss's own, such as logvar */
    for (size_t i = 0; i < ck->n; i++) {
        int is_known = 0;
        for (size_t k = 0; k < sizeof known / sizeof *known && !is_known; k++)
            is_known = begins(ck->tensor[i].name, known[k]);
        if (is_known) continue;
        snprintf(out, ERR_MAX, "%.600s: '%.200s' is no part of a transition: such tensors are left out", ck->path,
                 ck->tensor[i].name);
        return make_printable(out);
    }
    return NULL;
}

/* 1 where query i sees key j: causal, and the first n_unmasked see each other (SPEC 2.3). One byte each: PyTorch
 * converts when it loads. */
static Err mask_tensors(TensorList *list, const NetConfig *c) {
    size_t L = c->dec_max_seq_len, dim[4] = {1, 1, L, L};
    uint8_t *mask;
    TRY(mem_alloc(&mask, L * L, 1, "the attention mask"));
    list->kept = mask;
    for (size_t i = 0; i < L; i++) memset(mask + i * L, 1, i < c->n_unmasked ? min_size(c->n_unmasked, L) : i + 1);
    for (size_t i = 0; i < c->dec_depth; i++) {
        char name[64];
        snprintf(name, sizeof name, "transformer.blocks.%zu.attn.mask", i);
        TRY(tensor_list_add(list, name, DT_U8, 4, dim, mask, 0));
    }
    return OK;
}

Err net_derived_tensors(TensorList *list, const NetConfig *c) {
    if (c->kind == NET_GPT) return mask_tensors(list, c);
    for (size_t i = 0; c->tie_token_emb && i < list->n; i++) {
        const Tensor x = list->tensor[i];
        if (strcmp(x.name, "transformer.encoder.token_emb.weight") == 0)
            return tensor_list_add(list, "transformer.decoder.token_emb.weight", x.dtype, x.ndim, x.dim, x.data, 1);
    }
    return OK;
}
