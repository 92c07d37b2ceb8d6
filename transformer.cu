/* transformer.cu - one reverse transition p(x_{t-1} | x_t) of the Markov chain over tokens.
 *
 * Owns both networks of the paper (section 3.2), forward and backward. Their layers are layers.cu and attention.cu;
 * decoding token by token with cached keys and values is decode.cu; losses on the logits, AdamW, EMA and learning rate
 * are optimizer.cu; transformer.h is what they share. It knows neither images nor files; noise and sampling are the
 * business of diffusion.c.
 *
 *     NET_X     encoder reads [t, (class,) x_t], all positions see each other -> context
 *               decoder reads [sos, x_{t-1} shifted right], causal, attends to the context -> logits of x_{t-1}
 *     NET_GPT   one causal stack reads [t, (class,) x_{t-1} shifted right] -> logits; for the last scale, whose x_t is
 *               pure noise and tells nothing
 *
 * Everything is built from one idea: a stack is a list of layers, each doing x = x + block(norm(x)), where a block is
 * self-attention, cross-attention or feed-forward. Encoder, decoder and GPT are three lists run by the same
 * stack_forward / stack_backward. Decoding runs it too: a pass over a list of cells, new positions of any batch
 * rows, whose keys and values join those that earlier passes left behind; training is the pass over all positions.
 *
 * Activations are (B,n,C), row-major: a linear layer is one gemm over all B*n rows.
 *
 * Refuses: tokens, t and labels outside their tables, sequences longer than the position tables, official options that
 * it does not implement. Dropout is not implemented (the official configurations use none).
 *
 * Reading order: transformer.h, layers.cu, attention.cu, then here configuration, parameter table, memory plan, then
 * the mathematics from small to large: blocks, stack, head; last, forward and backward of the whole. This file is
 * compiled as C; it is in the common subset with C++17. */
#include "kernels/transformer.h"

#include <stdio.h>

enum {
    X_HEAD = 64 /* size of a head in NET_X, whatever dim and heads are (SPEC 1.6) */
};

static const double WEIGHT_DECAY = 0.01; /* PyTorch's default (SPEC section 7) */
static const double EMBEDDING_STD = 0.02;

/* ---- Configuration: the official keys (SPEC sections 1 and 2) ---- */

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
enum { DIM_MAX = 1 << 16, DEPTH_MAX = 1024, HEADS_MAX = 1024, TOKENS_MAX = 1 << 24, LENGTH_MAX = 1 << 20 };
static const SizeOption x_sizes[] = {
    {"dim", offsetof(NetConfig, dim), 1, DIM_MAX, 0},
    {"enc_num_tokens", offsetof(NetConfig, enc_num_tokens), 2, TOKENS_MAX, 0},
    {"enc_depth", offsetof(NetConfig, enc_depth), 1, DEPTH_MAX, 0},
    {"enc_heads", offsetof(NetConfig, enc_heads), 1, HEADS_MAX, 0},
    {"enc_max_seq_len", offsetof(NetConfig, enc_max_seq_len), 2, LENGTH_MAX, 0},
    {"dec_num_tokens", offsetof(NetConfig, dec_num_tokens), 2, TOKENS_MAX, 0},
    {"dec_depth", offsetof(NetConfig, dec_depth), 1, DEPTH_MAX, 0},
    {"dec_heads", offsetof(NetConfig, dec_heads), 1, HEADS_MAX, 0},
    {"dec_max_seq_len", offsetof(NetConfig, dec_max_seq_len), 1, LENGTH_MAX, 0},
    {NULL, 0, 0, 0, 0},
};
static const SizeOption gpt_sizes[] = {
    {"n_embd", offsetof(NetConfig, dim), 1, DIM_MAX, 0},
    {"vocab_size", offsetof(NetConfig, dec_num_tokens), 2, TOKENS_MAX, 0},
    {"input_vocab_size", offsetof(NetConfig, input_vocab_size), 2, TOKENS_MAX, 1},
    {"n_layer", offsetof(NetConfig, dec_depth), 1, DEPTH_MAX, 0},
    {"n_head", offsetof(NetConfig, dec_heads), 1, HEADS_MAX, 0},
    {"block_size", offsetof(NetConfig, dec_max_seq_len), 1, LENGTH_MAX, 0},
    {"n_unmasked", offsetof(NetConfig, n_unmasked), 0, LENGTH_MAX, 1},
    {NULL, 0, 0, 0, 0},
};

static const SizeOption *sizes_of(NetKind kind) {
    return kind == NET_X ? x_sizes : gpt_sizes;
}
static size_t *size_field(NetConfig *c, const SizeOption *o) {
    return (size_t *)((char *)c + o->field);
}

/* Rows of the table that embeds t and the class label. */
static size_t prompt_tokens(const NetConfig *c) {
    return c->kind == NET_X ? c->enc_num_tokens : c->input_vocab_size;
}

/* Every option under `params` must be one that is read here, or be switched off. */
static Err refuse_unknown_options(const Config *from, const char *params, NetKind kind) {
    static const char *const others[] = {"tie_token_emb", "wrap_decoder", "scale_pos",
                                         "n_scales",      "xt_start",     "xt_size"};
    const size_t skip = strlen(params), n_others = kind == NET_X ? sizeof others / sizeof *others : 0;
    for (size_t i = 0; i < from->n; i++) {
        const char *key = from->kv[i].key, *value = from->kv[i].value;
        if (strncmp(key, params, skip) != 0) continue;
        int ok = !strcmp(value, "false") || !strcmp(value, "0") || !strcmp(value, "0.0");
        for (const SizeOption *o = sizes_of(kind); o->key && !ok; o++) ok = !strcmp(key + skip, o->key);
        for (size_t k = 0; k < n_others && !ok; k++) ok = !strcmp(key + skip, others[k]);
        if (!ok) return err("%s: \"%s\" is an option that this program does not implement", key, value);
    }
    return OK;
}

/* What NET_X has besides sizes. The positions of t and x_t in the encoder's input have one possible value. */
static Err read_x_options(NetConfig *c, const Config *from, const char *params) {
    size_t scale_pos = 0, xt_start = prompt_length(c), n_scales = (size_t)c->n_scales;
    int wrap = 0;
    TRY(config_flag(&c->tie_token_emb, from, params, "tie_token_emb", 1));
    TRY(config_flag(&wrap, from, params, "wrap_decoder", 1));
    if (wrap) return err("%swrap_decoder: true is broken in the official code and not implemented", params);
    TRY(config_size(&scale_pos, from, params, "scale_pos", 0, 0, 1));
    TRY(config_size(&n_scales, from, params, "n_scales", n_scales, n_scales, 1));
    return config_size(&xt_start, from, params, "xt_start", xt_start, xt_start, 1);
}

Err net_config_read(NetConfig *c, const Config *from, const char *prefix) {
    char params[256];
    size_t n_scales = 0;
    const NetTarget *found = net_targets;
    memset(c, 0, sizeof *c);
    if (snprintf(params, sizeof params, "%stransformer_config.params.", prefix) >= (int)sizeof params)
        return err("transformer: configuration prefix of %zu bytes is too long", strlen(prefix));
    const char *target = config_get(from, prefix, "transformer_config.target");
    if (!target) return err("%stransformer_config.target is missing", prefix);
    while (found->target && strcmp(target, found->target) != 0) found++;
    if (!found->target)
        return err("%stransformer_config.target is \"%s\", expected an XTransformer or mingpt.GPT", prefix, target);
    c->kind = found->kind, c->variant = found->variant;
    const char *conditioner = config_get(from, prefix, "conditioner_config.target");
    if (conditioner && strcmp(conditioner, class_provider) != 0)
        return err("%sconditioner_config.target is \"%s\", expected %s", prefix, conditioner, class_provider);
    c->has_class = conditioner != NULL;
    TRY(config_size(&n_scales, from, prefix, "n_scales", 1, MAX_SCALES, 0));
    c->n_scales = (int)n_scales;
    TRY(refuse_unknown_options(from, params, c->kind));
    for (const SizeOption *o = sizes_of(c->kind); o->key; o++)
        TRY(config_size(size_field(c, o), from, params, o->key, o->lo, o->hi, o->optional));
    if (c->kind == NET_X) return read_x_options(c, from, params);
    if (c->input_vocab_size == 0) c->input_vocab_size = c->dec_num_tokens;
    return OK;
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

static Err config_check(const NetConfig *c) {
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

/* ---- Parameter table, in the order of the official state dict; initial values: SPEC section 14 ---- */

static Err add_norm(Transformer *m, Norm *norm, size_t C, const char *name) {
    double decay = m->config.kind == NET_X ? WEIGHT_DECAY : 0;
    norm->C = C;
    TRY(params_add(&m->params, &norm->weight, INIT_ONE, 0, decay, 1, &C, "%s.weight", name));
    return params_add(&m->params, &norm->bias, INIT_ZERO, 0, decay, 1, &C, "%s.bias", name);
}

static Err add_linear(Transformer *m, Linear *l, size_t in, size_t out, int bias, const char *name) {
    int x = m->config.kind == NET_X;
    size_t dim[2] = {out, in};
    double half_width = 1 / sqrt((double)in);
    l->in = in, l->out = out, l->bias = NO_ROW;
    TRY(params_add(&m->params, &l->weight, x ? INIT_UNIFORM : INIT_NORMAL, x ? half_width : EMBEDDING_STD, WEIGHT_DECAY,
                   2, dim, "%s.weight", name));
    m->params.row[l->weight].matrix = 1;
    if (!bias) return OK;
    return params_add(&m->params, &l->bias, x ? INIT_UNIFORM : INIT_ZERO, x ? half_width : 0, x ? WEIGHT_DECAY : 0, 1,
                      dim, "%s.bias", name);
}

static Err add_feed_forward(Transformer *m, Layer *l, size_t C, const char *up, const char *down) {
    TRY(add_linear(m, &l->up, C, FEED_FACTOR * C, 1, up));
    return add_linear(m, &l->down, FEED_FACTOR * C, C, 1, down);
}

/* Layer i of attn_layers: .0 its norm, .1 its block. */
static Err add_x_layer(Transformer *m, Layer *l, size_t C, size_t heads, const char *side, size_t i) {
    char name[4][NAME_MAX_BYTES];
    size_t inner = heads * X_HEAD;
    snprintf(name[0], sizeof name[0], "%s.attn_layers.layers.%zu.0", side, i);
    TRY(add_norm(m, &l->norm, C, name[0]));
    if (l->kind == BLOCK_FEED) {
        snprintf(name[0], sizeof name[0], "%s.attn_layers.layers.%zu.1.net.0.0", side, i);
        snprintf(name[1], sizeof name[1], "%s.attn_layers.layers.%zu.1.net.2", side, i);
        return add_feed_forward(m, l, C, name[0], name[1]);
    }
    static const char *const part[4] = {"to_q", "to_k", "to_v", "to_out"};
    for (int k = 0; k < 4; k++) snprintf(name[k], sizeof name[k], "%s.attn_layers.layers.%zu.1.%s", side, i, part[k]);
    l->heads = heads, l->D = X_HEAD;
    TRY(add_linear(m, &l->q, C, inner, 0, name[0]));
    TRY(add_linear(m, &l->k, C, inner, 0, name[1]));
    TRY(add_linear(m, &l->v, C, inner, 0, name[2]));
    return add_linear(m, &l->out, inner, C, 1, name[3]);
}

/* shared_emb: a row to embed tokens with, or NO_ROW for an own table. logits: the Linear behind the final norm. */
static Err add_x_stack(Transformer *m, Stack *s, const char *side, size_t tokens, size_t length, size_t heads,
                       size_t shared_emb, Linear *logits) {
    char name[NAME_MAX_BYTES];
    size_t C = m->config.dim, dim[2] = {tokens, C}, pos_dim[2] = {length, C};
    s->C = C, s->max_T = length, s->token_emb = shared_emb;
    if (shared_emb == NO_ROW)
        TRY(params_add(&m->params, &s->token_emb, INIT_NORMAL, EMBEDDING_STD, WEIGHT_DECAY, 2, dim,
                       "%s.token_emb.weight", side));
    TRY(params_add(&m->params, &s->pos_emb, INIT_NORMAL, EMBEDDING_STD, WEIGHT_DECAY, 2, pos_dim,
                   "%s.pos_emb.emb.weight", side));
    for (size_t i = 0; i < s->n_layers; i++) TRY(add_x_layer(m, &s->layer[i], C, heads, side, i));
    snprintf(name, sizeof name, "%s.norm", side);
    TRY(add_norm(m, &s->norm, C, name));
    snprintf(name, sizeof name, "%s.to_logits", side);
    return add_linear(m, logits, C, tokens, 1, name);
}

static Err build_x(Transformer *m) {
    const NetConfig *c = &m->config;
    size_t dim[2] = {(size_t)c->n_scales, c->dec_max_seq_len};
    if (c->variant != X_PLAIN) {
        TRY(params_add(&m->params, &m->log_scalors, INIT_ZERO, 0, WEIGHT_DECAY, c->variant == X_FINE_SCALED ? 2 : 1,
                       dim, "log_scalors"));
        m->params.row[m->log_scalors].untrained = !is_scaled(c);
    }
    Linear unused; /* encoder.to_logits is in every official file and takes part in nothing */
    TRY(add_x_stack(m, &m->encoder, "encoder", c->enc_num_tokens, c->enc_max_seq_len, c->enc_heads, NO_ROW, &unused));
    m->params.row[unused.weight].untrained = m->params.row[unused.bias].untrained = 1;
    m->decoder.causal = 1;
    return add_x_stack(m, &m->decoder, "decoder", c->dec_num_tokens, c->dec_max_seq_len, c->dec_heads,
                       c->tie_token_emb ? m->encoder.token_emb : NO_ROW, &m->head);
}

static Err add_gpt_block(Transformer *m, Layer *attention, Layer *feed, size_t i) {
    static const char *const part[8] = {"ln1",        "ln2",       "attn.key", "attn.query",
                                        "attn.value", "attn.proj", "mlp.0",    "mlp.2"};
    char name[8][NAME_MAX_BYTES];
    size_t C = m->config.dim;
    for (int k = 0; k < 8; k++) snprintf(name[k], sizeof name[k], "blocks.%zu.%s", i, part[k]);
    attention->heads = m->config.dec_heads, attention->D = C / m->config.dec_heads;
    TRY(add_norm(m, &attention->norm, C, name[0]));
    TRY(add_norm(m, &feed->norm, C, name[1]));
    TRY(add_linear(m, &attention->k, C, C, 1, name[2]));
    TRY(add_linear(m, &attention->q, C, C, 1, name[3]));
    TRY(add_linear(m, &attention->v, C, C, 1, name[4]));
    TRY(add_linear(m, &attention->out, C, C, 1, name[5]));
    return add_feed_forward(m, feed, C, name[6], name[7]);
}

static Err build_gpt(Transformer *m) {
    const NetConfig *c = &m->config;
    Stack *s = &m->decoder;
    size_t pos_dim[3] = {1, c->dec_max_seq_len, c->dim}, dim[2] = {c->input_vocab_size, c->dim};
    s->C = c->dim, s->max_T = c->dec_max_seq_len, s->causal = 1, s->unmasked = c->n_unmasked;
    TRY(params_add(&m->params, &s->pos_emb, INIT_ZERO, 0, 0, 3, pos_dim, "pos_emb"));
    TRY(params_add(&m->params, &s->token_emb, INIT_NORMAL, EMBEDDING_STD, 0, 2, dim, "tok_emb.weight"));
    for (size_t i = 0; i < c->dec_depth; i++) TRY(add_gpt_block(m, &s->layer[2 * i], &s->layer[2 * i + 1], i));
    TRY(add_norm(m, &s->norm, c->dim, "ln_f"));
    return add_linear(m, &m->head, c->dim, c->dec_num_tokens, 0, "head");
}

/* depth times the blocks of `order`, e.g. self, cross, feed. */
static Err stack_create(Stack *s, size_t depth, const BlockKind *order, size_t per_depth) {
    s->n_layers = depth * per_depth;
    TRY(mem_alloc(&s->layer, s->n_layers, sizeof(Layer), "layers"));
    for (size_t i = 0; i < s->n_layers; i++) s->layer[i].kind = order[i % per_depth];
    return OK;
}

static Err build(Transformer *m) {
    static const BlockKind two[2] = {BLOCK_SELF, BLOCK_FEED}, three[3] = {BLOCK_SELF, BLOCK_CROSS, BLOCK_FEED};
    m->log_scalors = NO_ROW;
    if (m->config.kind == NET_GPT) {
        m->config.variant = X_PLAIN;
        TRY(stack_create(&m->decoder, m->config.dec_depth, two, 2));
        return build_gpt(m);
    }
    TRY(stack_create(&m->encoder, m->config.enc_depth, two, 2));
    TRY(stack_create(&m->decoder, m->config.dec_depth, three, 3));
    return build_x(m);
}

Err transformer_create(Transformer **out, const NetConfig *c) {
    *out = NULL;
    TRY(config_check(c));
    Transformer *m;
    TRY(mem_alloc(&m, 1, sizeof *m, "transformer"));
    m->config = *c;
    if (build(m) != OK) {
        transformer_free(m);
        return FAILED;
    }
    *out = m;
    return OK;
}

void transformer_free(Transformer *m) {
    if (!m) return;
    if (m->params.device) m->params.ops->plan(m, 0, NULL);
    params_free(&m->params);
    free(m->encoder.layer);
    free(m->decoder.layer);
    free(m->arena);
    free(m);
}

const NetConfig *transformer_config(const Transformer *m) {
    return &m->config;
}
Params *transformer_params(Transformer *m) {
    return &m->params;
}

void transformer_set_alphas(Transformer *m, const float *alpha) {
    memcpy(m->alpha, alpha, ((size_t)m->config.n_scales + 1) * sizeof *alpha);
}

static real *take(Arena *a, size_t n1, size_t n2, size_t n3) {
    return (real *)take_bytes(a, n1, n2, n3, sizeof(real));
}

/* The buffers of a layer: R = B*n rows of queries, B*Tk rows of keys. */
static void plan_input(Arena *a, Layer *l, size_t R, size_t C) {
    l->x = take(a, R, C, 1);
    l->mean = take(a, R, 1, 1);
    l->rstd = take(a, R, 1, 1);
    l->normed = take(a, R, C, 1);
}
static void plan_queries(Arena *a, Layer *l, size_t R, size_t inner) {
    l->query = take(a, R, inner, 1);
    l->y = take(a, R, inner, 1);
}
static void plan_keys(Arena *a, Layer *l, size_t B, size_t Tk, size_t inner) {
    l->key = take(a, B, Tk, inner);
    l->value = take(a, B, Tk, inner);
}

/* Training: each layer keeps what its backward needs. */
static void plan_layer_training(Arena *a, Layer *l, size_t B, size_t T, size_t Tk, size_t C) {
    l->kept_key = l->kept_value = NULL;
    plan_input(a, l, B * T, C);
    if (l->kind == BLOCK_FEED) {
        l->g = take(a, B * T, FEED_FACTOR * C, 1);
        l->dg = take(a, B * T, FEED_FACTOR * C, 1);
        return;
    }
    plan_queries(a, l, B * T, l->heads * l->D);
    plan_keys(a, l, B, Tk, l->heads * l->D);
    l->p = take(a, B * l->heads, T, Tk);
}

/* Else all layers share one set of buffers, but a decoder keeps the keys and values of each. */
static void plan_layer_inference(Arena *a, Layer *l, const Layer *shared, size_t B, size_t Tk, int cache, int packed) {
    l->x = shared->x, l->mean = shared->mean, l->rstd = shared->rstd, l->normed = shared->normed;
    l->query = shared->query, l->y = shared->y, l->key = shared->key, l->value = shared->value;
    l->g = shared->g;
    l->p = l->dg = NULL;
    l->kept_key = l->kept_value = NULL;
    if (!cache || l->kind == BLOCK_FEED) return;
    const size_t bytes = packed ? sizeof(uint16_t) : sizeof(real);
    l->kept_key = take_bytes(a, B * l->heads, Tk, kept_width(l->D), bytes);
    l->kept_value = take_bytes(a, B * l->heads, Tk, kept_width(l->D), bytes);
}

/* T_context: positions of the context of cross-attention. shared NULL: training. */
static void plan_stack(Arena *a, Stack *s, const Layer *shared, size_t B, size_t T_context, int packed) {
    size_t R = B * s->T;
    s->ids = (int32_t *)take_bytes(a, R, 1, 1, sizeof(int32_t));
    for (size_t i = 0; i < s->n_layers; i++) {
        Layer *l = &s->layer[i];
        size_t Tk = l->kind == BLOCK_CROSS ? T_context : s->T;
        if (shared)
            plan_layer_inference(a, l, shared, B, Tk, s->causal, packed);
        else
            plan_layer_training(a, l, B, s->T, Tk, s->C);
    }
    s->x_end = shared ? shared->x : take(a, R, s->C, 1);
    s->end_mean = shared ? shared->mean : take(a, R, 1, 1);
    s->end_rstd = shared ? shared->rstd : take(a, R, 1, 1);
    s->out = take(a, R, s->C, 1);
}

/* When the GPU computes: what goes there, and logits if somebody wants them back. */
static void plan_host_side(Transformer *m, Arena *a) {
    Stack *e = &m->encoder, *d = &m->decoder;
    e->ids = (int32_t *)take_bytes(a, m->B, e->T, 1, sizeof(int32_t));
    d->ids = (int32_t *)take_bytes(a, m->B, d->T, 1, sizeof(int32_t));
    m->logits = m->raw = take(a, m->B * m->N, m->config.dec_num_tokens, 1);
    m->fed = (size_t *)take_bytes(a, m->B, 1, 1, sizeof *m->fed);
}

static void plan_arena(Transformer *m, Arena *a) {
    const NetConfig *c = &m->config;
    Stack *e = &m->encoder, *d = &m->decoder;
    size_t B = m->B, C = c->dim, K = c->dec_num_tokens, T = max_size(e->T, d->T), R = B * T, inner = widest_inner(m);
    Layer shared;
    if (m->params.device) {
        plan_host_side(m, a);
        return;
    }
    memset(&shared, 0, sizeof shared);
    if (!m->train) {
        plan_input(a, &shared, R, C);
        plan_queries(a, &shared, R, inner);
        plan_keys(a, &shared, B, T, inner);
        shared.g = take(a, R, FEED_FACTOR * C, 1);
        m->fed = (size_t *)take_bytes(a, B, 1, 1, sizeof *m->fed);
        m->first = (int32_t *)take_bytes(a, B, 1, 1, sizeof *m->first);
        m->cell = (Cell *)take_bytes(a, B, DECODE_BLOCK, 1, sizeof *m->cell);
    }
    const int packed = m->format != WEIGHTS_REAL;
    if (c->kind == NET_X) plan_stack(a, e, m->train ? NULL : &shared, B, 0, packed);
    plan_stack(a, d, m->train ? NULL : &shared, B, e->T, packed);
    m->work = packed ? take_bytes(a, gemm_stream_work(R, max_size(FEED_FACTOR * C, inner)), 1, 1, 1) : NULL;
    m->scores = take(a, B * max_size(c->enc_heads, c->dec_heads), QUERY_BLOCK, T);
    m->logits = take(a, B * m->N, K, 1);
    m->raw = m->train && is_scaled(c) ? take(a, B * m->N, K, 1) : m->logits;
    if (!m->train) return;
    m->row_sum = take(a, B * m->N, 1, 1);
    m->dx = take(a, R, C, 1);
    m->dcontext = take(a, R, C, 1);
    m->dnormed = take(a, R, C, 1);
    m->dquery = take(a, R, inner, 1);
    m->dkey = take(a, R, inner, 1);
    m->dvalue = take(a, R, inner, 1);
    m->dy = take(a, R, inner, 1);
    m->dh = take(a, R, FEED_FACTOR * C, 1);
}

/* N tokens fit the position tables: the encoder reads the prompt and N, a decoder N, a GPT all but the last. */
static Err set_lengths(Transformer *m, size_t N) {
    Stack *e = &m->encoder, *d = &m->decoder;
    size_t P = prompt_length(&m->config);
    if (N < 1 || N > LENGTH_MAX) return err("transformer: %zu tokens, expected 1..%d", N, (int)LENGTH_MAX);
    e->T = m->config.kind == NET_X ? P + N : 0;
    d->T = m->config.kind == NET_X ? N : P + N - 1;
    if (e->T > e->max_T && e->T > 0)
        return err("transformer: %zu tokens need %zu encoder positions, the table has %zu", N, e->T, e->max_T);
    if (d->T > d->max_T)
        return err("transformer: %zu tokens need %zu decoder positions, the table has %zu", N, d->T, d->max_T);
    return OK;
}

Err transformer_plan_bytes(Transformer *m, size_t B, size_t N, int train, size_t *bytes) {
    enum { BATCH_MAX = 1 << 20 };
    Arena measure = {NULL, 0, 0};
    m->state = IDLE;
    m->B = 0;
    free(m->arena);
    m->arena = NULL;
    if (B < 1 || B > BATCH_MAX) return err("transformer: batch of %zu, expected 1..%d", B, (int)BATCH_MAX);
    TRY(set_lengths(m, N));
    m->B = B, m->N = N, m->train = train, m->format = m->params.format;
    plan_arena(m, &measure);
    const Err e = m->params.device ? m->params.ops->plan(m, 0, &measure.bytes) : OK;
    m->B = 0; /* until the memory is there */
    TRY(e);
    if (measure.overflow) return err("transformer: a batch of %zu x %zu tokens is too large", B, N);
    *bytes = measure.bytes;
    return OK;
}

Err transformer_plan(Transformer *m, size_t B, size_t N, int train) {
    Arena assign = {NULL, 0, 0};
    size_t bytes = 0;
    Err e = OK;
    TRY(transformer_plan_bytes(m, B, N, train, &bytes));
    if (m->params.device) { /* those bytes there; here what plan_host_side says */
        Arena host = {NULL, 0, 0};
        m->B = B;
        plan_arena(m, &host);
        e = m->params.ops->plan(m, 1, NULL);
        bytes = host.bytes, m->B = 0;
    }
    TRY(e);
    TRY(mem_alloc(&m->arena, bytes, 1, "transformer activations"));
    assign.base = (char *)m->arena;
    m->B = B;
    plan_arena(m, &assign);
    return OK;
}

/* The projections of source (B*n,C), positions of B batch rows or of cells; a decoder keeps them at their places. */
void project_keys(const Transformer *m, const Layer *l, const AttendShape *s, const real *source, size_t n) {
    linear_forward(m, &l->k, l->key, l->k.out, NULL, source, l->k.in, s->B * n);
    linear_forward(m, &l->v, l->value, l->v.out, NULL, source, l->v.in, s->B * n);
    if (!l->kept_key) return;
    keep_positions(s, l->kept_key, l->key, n);
    keep_positions(s, l->kept_value, l->value, n);
}

/* attention_forward    next (R,C) = x + to_out(attend(to_q normed, to_k source, to_v source))
 * attention_backward   m->dnormed overwritten, dcontext += (cross-attention), parameters +=, from dout (R,C)
 *   source: normed itself, or the context in cross-attention */
static void attention_forward(Transformer *m, const Stack *s, Layer *l, real *next, const Pass *pass) {
    const size_t R = pass->B * pass->n, C = s->C, inner = l->heads * l->D;
    const AttendShape shape = attend_shape(m, s, l, pass);
    linear_forward(m, &l->q, l->query, inner, NULL, l->normed, C, R);
    if (l->kind == BLOCK_SELF)
        project_keys(m, l, &shape, l->normed, pass->n);
    else if (pass->context)
        project_keys(m, l, &shape, pass->context, pass->T_context);
    if (l->kept_key && (pass->cell || shape.kept_bf16))
        attend_kept(&shape, l->y, m->scores, l->query, l->kept_key, l->kept_value);
    else
        attend_forward(&shape, l->y, l->p, m->scores, l->query, l->key, l->value);
    linear_forward(m, &l->out, next, C, l->x, l->y, inner, R);
}

static void attention_backward(Transformer *m, const Stack *s, const Layer *l, const real *dout, real *dcontext,
                               const Pass *pass) {
    const size_t R = pass->B * pass->n;
    const AttendShape shape = attend_shape(m, s, l, pass);
    linear_backward(m, &l->out, m->dy, 0, dout, l->y, R);
    attend_backward(&shape, m->dquery, m->dkey, m->dvalue, m->dy, l->p, m->scores, l->query, l->key, l->value);
    linear_backward(m, &l->q, m->dnormed, 0, m->dquery, l->normed, R);
    int cross = l->kind == BLOCK_CROSS;
    real *dsource = cross ? dcontext : m->dnormed;
    const real *source = cross ? pass->context : l->normed;
    linear_backward(m, &l->k, dsource, 1, m->dkey, source, shape.B * shape.Tk);
    linear_backward(m, &l->v, dsource, 1, m->dvalue, source, shape.B * shape.Tk);
}

/* feed_forward            next (R,C) = x + down(gelu(up normed))
 * feed_forward_backward   m->dnormed overwritten, parameters +=, from dout (R,C) */
static void feed_forward(Transformer *m, Layer *l, real *next, size_t R) {
    const size_t C = l->up.in, H = l->up.out;
    multiply(m, &l->up, l->g, H, 0, l->normed, C, R);
    gelu_forward(l->g, l->dg, value_of(m, l->up.bias), R, H);
    linear_forward(m, &l->down, next, C, l->x, l->g, H, R);
}

static void feed_forward_backward(Transformer *m, const Layer *l, const real *dout, size_t R) {
    linear_backward(m, &l->down, m->dh, 0, dout, l->g, R);
    gelu_backward(m->dh, l->dg, R, l->up.out);
    linear_backward(m, &l->up, m->dnormed, 0, m->dh, l->normed, R);
}

/* ---- Stack ---- */

/* stack_forward    s->out (B,n-skip,C) = final norm of the last layer's output, without the first `skip` positions
 * stack_backward   from dout (B,n-skip,C): parameters +=, dcontext +=, both embeddings +=. Overwrites m->dx. */
void stack_forward(Transformer *m, Stack *s, const int32_t *ids, const Pass *pass, size_t skip) {
    const size_t R = pass->B * pass->n, kept = pass->n - skip;
    embed_forward(m, s, s->layer[0].x, ids, pass->B, pass->n, pass->cell);
    for (size_t i = 0; i < s->n_layers; i++) {
        Layer *l = &s->layer[i];
        real *next = i + 1 < s->n_layers ? s->layer[i + 1].x : s->x_end;
        norm_forward(m, &l->norm, l->normed, l->mean, l->rstd, l->x, R);
        if (l->kind == BLOCK_FEED)
            feed_forward(m, l, next, R);
        else
            attention_forward(m, s, l, next, pass);
    }
    for (size_t b = 0; b < (skip ? pass->B : 1); b++)
        norm_forward(m, &s->norm, s->out + b * kept * s->C, s->end_mean + b * kept, s->end_rstd + b * kept,
                     s->x_end + (b * pass->n + skip) * s->C, skip ? kept : R);
}

static void stack_backward(Transformer *m, Stack *s, const real *dout, real *dcontext, const Pass *pass, size_t skip) {
    const size_t R = pass->B * pass->n, kept = pass->n - skip;
    memset(m->dx, 0, R * s->C * sizeof *m->dx);
    for (size_t b = 0; b < (skip ? pass->B : 1); b++) {
        const size_t at = (b * pass->n + skip) * s->C;
        norm_backward(m, &s->norm, m->dx + at, dout + b * kept * s->C, s->x_end + at, s->end_mean + b * kept,
                      s->end_rstd + b * kept, skip ? kept : R);
    }
    for (size_t i = s->n_layers; i-- > 0;) {
        Layer *l = &s->layer[i];
        if (l->kind == BLOCK_FEED)
            feed_forward_backward(m, l, m->dx, R);
        else
            attention_backward(m, s, l, m->dx, dcontext, pass);
        norm_backward(m, &l->norm, m->dx, m->dnormed, l->x, l->mean, l->rstd, R);
        params_ready(&m->params, first_row(l));
    }
    embed_backward(m, s, m->dx, s->ids, pass->B, pass->n);
}

/* ---- Head: what the variants do between the decoder and the logits (SPEC section 1, "Variants") ---- */

/* Scale t and noisy token x_t[i] of batch row b, as the encoder read them. */
static size_t scale_of_row(const Transformer *m, size_t b) {
    return (size_t)m->encoder.ids[b * (prompt_length(&m->config) + m->now_N)];
}
static int32_t noisy_token(const Transformer *m, size_t b, size_t i) {
    size_t P = prompt_length(&m->config);
    return m->encoder.ids[b * (P + m->now_N) + P + i];
}

/* Element of log_scalors that scales position i of batch row b. */
static size_t scalor_index(const Transformer *m, size_t b, size_t i) {
    size_t t = scale_of_row(m, b) - 1;
    return m->config.variant == X_FINE_SCALED ? t * m->config.dec_max_seq_len + i : t;
}

/* row[k] += log(alpha [k = x_t] + (1 - alpha)/K): the log probability of x_{t-1} = k given x_t before any learning */
static void add_residual(real *row, size_t K, double alpha, int32_t x_t) {
    const double other = (1 - alpha) / (double)K;
    const real same = (real)log(alpha + other), different = (real)log(other), kept = row[x_t] + same;
#pragma omp simd
    for (size_t k = 0; k < K; k++) row[k] += different;
    row[x_t] = kept;
}

/* variant_forward    logits = raw * exp(log_scalors) + residual, as the variant has them
 * variant_backward   raw becomes draw = dlogits * exp(log_scalors); dlog_scalors +=
 *   raw, logits, dlogits (B,n,K), or (n,K) of cells; raw may be logits */
typedef struct {
    Transformer *m;
    real *logits, *raw;
    const real *dlogits;
    size_t n;
    const Cell *cell; /* or NULL */
} VariantRows;

static void variant_forward_row(void *context, size_t r) {
    const VariantRows *a = (const VariantRows *)context;
    const NetConfig *c = &a->m->config;
    const size_t K = c->dec_num_tokens, b = a->cell ? a->cell[r].b : r / a->n, i = a->cell ? a->cell[r].pos : r % a->n;
    real *logits = a->logits + r * K, *raw = a->raw + r * K;
    if (is_scaled(c)) {
        const real scale = (real)exp((double)value_of(a->m, a->m->log_scalors)[scalor_index(a->m, b, i)]);
#pragma omp simd
        for (size_t k = 0; k < K; k++) logits[k] = raw[k] * scale;
    }
    if (is_residual(c)) add_residual(logits, K, (double)a->m->alpha[scale_of_row(a->m, b)], noisy_token(a->m, b, i));
}

static void variant_forward(Transformer *m, real *logits, real *raw, size_t B, size_t n, const Cell *cell) {
    VariantRows a = {m, logits, raw, NULL, n, cell};
    if (!is_scaled(&m->config) && !is_residual(&m->config)) return;
    parallel_for(threads_for(B * n * m->config.dec_num_tokens), B * n, variant_forward_row, &a);
}

static void variant_backward_row(void *context, size_t r) {
    const VariantRows *a = (const VariantRows *)context;
    const size_t K = a->m->config.dec_num_tokens, row = scalor_index(a->m, r / a->n, r % a->n);
    const real scale = (real)exp((double)value_of(a->m, a->m->log_scalors)[row]);
    const real *d = a->dlogits + r * K;
    real *raw = a->raw + r * K;
    a->m->row_sum[r] = scale * dot(d, raw, K);
#pragma omp simd
    for (size_t k = 0; k < K; k++) raw[k] = d[k] * scale;
}

static void variant_backward(Transformer *m, real *raw, const real *dlogits, size_t B, size_t n) {
    VariantRows a = {m, NULL, raw, dlogits, n, NULL};
    real *dlog_scalors = grad_of(m, m->log_scalors);
    parallel_for(threads_for(B * n * m->config.dec_num_tokens), B * n, variant_backward_row, &a);
    for (size_t r = 0; r < B * n; r++) dlog_scalors[scalor_index(m, r / n, r % n)] += m->row_sum[r];
}

/* The decoder's output (B,n,C) to m->logits (B,n,K); of cells, B = 1. */
void head_forward(Transformer *m, size_t B, size_t n, const Cell *cell) {
    linear_forward(m, &m->head, m->raw, m->head.out, NULL, m->decoder.out, m->head.in, B * n);
    variant_forward(m, m->logits, m->raw, B, n, cell);
}

/* ---- Forward and backward of the whole network; the twins of all of it from the blocks on ---- */

Err check_ids(const char *what, const int32_t *ids, size_t n, int32_t lo, size_t end) {
    if (!ids) return err("transformer: no %s given", what);
    for (size_t i = 0; i < n; i++)
        if (ids[i] < lo || (size_t)ids[i] >= end)
            return err("transformer: %s[%zu] is %d, expected %d..%zu", what, i, (int)ids[i], (int)lo, end - 1);
    return OK;
}

Err check_batch(const Transformer *m, const int32_t *x_t, const int32_t *t, const int32_t *label, size_t B, size_t N) {
    const NetConfig *c = &m->config;
    if (!m->B) return err("transformer: nothing is planned");
    if (m->format != m->params.format) return err("transformer: planned for matrices in another format");
    if (m->params.n == 0 || !m->params.row[0].value) return err("transformer: the parameters have no values yet");
    if (B < 1 || B > m->B || N < 1 || N > m->N)
        return err("transformer: a batch of %zu x %zu tokens, planned for up to %zu x %zu", B, N, m->B, m->N);
    TRY(check_ids("t", t, B, 1, (size_t)c->n_scales + 1));
    if (c->has_class) TRY(check_ids("label", label, B, 0, prompt_tokens(c)));
    if (c->kind == NET_X) TRY(check_ids("x_t", x_t, B * N, 0, c->dec_num_tokens));
    return OK;
}

/* ids (B,P+n) = [t, (label,) tokens[b,0..n-1]]; rows of tokens are `stride` apart. */
void prompted_ids(const NetConfig *c, int32_t *ids, const int32_t *t, const int32_t *label, const int32_t *tokens,
                  size_t stride, size_t B, size_t n) {
    size_t P = prompt_length(c);
    for (size_t b = 0; b < B; b++) {
        int32_t *row = ids + b * (P + n);
        row[0] = t[b];
        if (c->has_class) row[1] = label[b];
        if (n) memcpy(row + P, tokens + b * stride, n * sizeof *row);
    }
}

/* ids (B,N) = [sos, x[b,0..N-2]]; sos is token 0 (SPEC 1.10). */
static void shifted_ids(int32_t *ids, const int32_t *x, size_t B, size_t N) {
    for (size_t b = 0; b < B; b++) {
        ids[b * N] = 0;
        memcpy(ids + b * N + 1, x + b * N, (N - 1) * sizeof *ids);
    }
}

Pass whole_pass(const Stack *s, size_t B, size_t n, const real *context, size_t T_context) {
    Pass pass;
    pass.B = B, pass.n = pass.stride = n, pass.cell = NULL, pass.causal = s->causal;
    pass.context = context, pass.T_context = T_context;
    return pass;
}

/* Checks the batch and lays out what the networks read. */
Err take_batch(Transformer *m, const int32_t *x, const int32_t *x_t, const int32_t *t, const int32_t *label, size_t B,
               size_t N) {
    const NetConfig *c = &m->config;
    m->state = IDLE;
    TRY(check_batch(m, x_t, t, label, B, N));
    TRY(check_ids("x", x, B * N, 0, c->dec_num_tokens));
    m->now_B = B, m->now_N = N;
    if (c->kind == NET_X) {
        prompted_ids(c, m->encoder.ids, t, label, x_t, N, B, N);
        shifted_ids(m->decoder.ids, x, B, N);
    } else
        prompted_ids(c, m->decoder.ids, t, label, x, N, B, N - 1);
    return OK;
}

Err transformer_forward(Transformer *m, const int32_t *x, const int32_t *x_t, const int32_t *t, const int32_t *label,
                        size_t B, size_t N, const real **logits) {
    Stack *e = &m->encoder, *d = &m->decoder;
    const size_t P = prompt_length(&m->config);
    TRY(take_batch(m, x, x_t, t, label, B, N));
    if (m->params.device)
        TRY(m->params.ops->forward(m));
    else if (m->config.kind == NET_X) {
        const Pass encode = whole_pass(e, B, P + N, NULL, 0), decode = whole_pass(d, B, N, e->out, P + N);
        stack_forward(m, e, e->ids, &encode, 0);
        stack_forward(m, d, d->ids, &decode, 0);
    } else {
        const Pass pass = whole_pass(d, B, P + N - 1, NULL, 0);
        stack_forward(m, d, d->ids, &pass, P - 1);
    }
    if (!m->params.device) head_forward(m, B, N, NULL);
    m->state = FORWARD_DONE;
    *logits = m->logits;
    return OK;
}

Err transformer_backward(Transformer *m, const real *dlogits) {
    Stack *e = &m->encoder, *d = &m->decoder;
    const size_t B = m->now_B, N = m->now_N, P = prompt_length(&m->config);
    if (!m->train) return err("transformer: backward under a plan without training");
    if (m->state != FORWARD_DONE) return err("transformer: backward without a forward before it");
    if (!m->params.row[0].grad) return err("transformer: the parameters have no gradients planned");
    if (m->params.device) {
        m->state = IDLE;
        return m->params.ops->backward(m, dlogits);
    }
    const real *draw = dlogits;
    if (is_scaled(&m->config)) {
        variant_backward(m, m->raw, dlogits, B, N);
        draw = m->raw;
    }
    real *dout = m->dnormed; /* (B*N,C): the final norm reads it before the last block writes there */
    linear_backward(m, &m->head, dout, 0, draw, d->out, B * N);
    if (m->config.kind == NET_X) {
        const Pass encode = whole_pass(e, B, P + N, NULL, 0), decode = whole_pass(d, B, N, e->out, P + N);
        memset(m->dcontext, 0, B * (P + N) * e->C * sizeof *m->dcontext);
        stack_backward(m, d, dout, m->dcontext, &decode, 0);
        stack_backward(m, e, m->dcontext, NULL, &encode, 0);
    } else {
        const Pass pass = whole_pass(d, B, P + N - 1, NULL, 0);
        stack_backward(m, d, dout, NULL, &pass, P - 1);
    }
    m->state = IDLE; /* raw is spent: a second backward needs a new forward */
    return OK;
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

/* What the official classes have besides parameters: a GPT's masks, the second name of a tied embedding. */
static Err derived_tensors(TensorList *list, const NetConfig *c) {
    if (c->kind == NET_GPT) return mask_tensors(list, c);
    for (size_t i = 0; c->tie_token_emb && i < list->n; i++) {
        const Tensor x = list->tensor[i];
        if (strcmp(x.name, "transformer.encoder.token_emb.weight") == 0)
            return tensor_list_add(list, "transformer.decoder.token_emb.weight", x.dtype, x.ndim, x.dim, x.data, 1);
    }
    return OK;
}

Err transition_tensors(TensorList *list, Transformer *net, char which, const Schedule *s, Dtype store, int compact) {
    static const int64_t sos = 0;
    size_t one = 1, rows = (size_t)s->T + 1;
    TRY(tensor_list_params(list, transformer_params(net), which, "transformer.", store));
    TRY(tensor_list_add(list, "sos_token", DT_I64, 1, &one, &sos, 0));
    TRY(tensor_list_add(list, "alphats", DT_F32, 1, &rows, s->alpha, 0));
    TRY(tensor_list_add(list, "alphacum", DT_F32, 1, &rows, s->alphacum, 0));
    return compact ? OK : derived_tensors(list, transformer_config(net));
}

Err transformer_use_cuda(Transformer *m, Precision precision) {
    return use_cuda(&m->params, precision);
}

int transformer_on_cuda(const Transformer *m) {
    return m->params.device != NULL;
}
