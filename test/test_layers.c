/* test_layers.c [LAYER...]: every layer by name. Its plain loop is the definition: the gradients of that are compared with
 * central differences (in double), its faster fellows with it: the CPU's to 1e-5 (1e-12 in double), a GPU's to 1e-4, in
 * bf16 to 2e-2 of the largest number. Sizes differ from one another, so that one taken for another shows. Elsewhere are
 * adamw_bf16, which rounds by chance (test_transformer.c), and guess_block (test_diffusion.c).
 *
 *     make check                    lists the layers
 *     make check LAYER=group_norm   checks those whose name begins so */
#include "transformer.cu" /* whose layers are its own */

#include "layers.h"
#include "training/training.h"

extern const DeviceOps cuda_f32 __attribute__((weak)), cuda_bf16 __attribute__((weak));

#define P(i) ((real *)c->p[i])
#define CODE(i) ((int32_t *)c->p[i])
#define CASES(...)                                                                                                     \
    (const size_t[][SIZES]){__VA_ARGS__}, sizeof((const size_t[][SIZES]){__VA_ARGS__}) / sizeof(size_t[SIZES])
#define BY(entry) there_##entry
#define THERE(entry)                                                                                                   \
    static int there_##entry(const Layers *l) {                                                                        \
        return l->entry != NULL;                                                                                       \
    }

/* ---- vqgan.c ---- */

static Conv conv_of(const Case *c) {
    return (Conv){.kind = (ConvKind)c->s[0], .B = c->s[1], .C = c->s[2], .M = c->s[3], .h = c->s[4], .w = c->s[5]};
}
enum { CONV_X, CONV_WEIGHT, CONV_BIAS, CONV_Y, CONV_DY, CONV_DX, CONV_DW, CONV_DB, CONV_ADD };
static void conv_describe(Case *c, const Compute *on) {
    const Conv s = conv_of(c);
    const size_t HW = conv_height(&s) * conv_width(&s), accumulate = c->s[6];
    (void)on;
    picture(c, "x", GIVEN, s.B, s.C, s.h * s.w, NOTHING);
    array(c, "w", GIVEN | PARAM, s.M * s.C * (s.kind == CONV1 ? 1 : 9), NOTHING);
    array(c, "bias", GIVEN | PARAM, s.M, NOTHING);
    picture(c, "y", MADE, s.B, s.M, HW, NOTHING);
    picture(c, "dy", GIVEN, s.B, s.M, HW, CONV_Y);
    picture(c, "dx", accumulate ? GIVEN | MADE : MADE, s.B, s.C, s.h * s.w, CONV_X);
    array(c, "dw", GIVEN | MADE | GRAD, c->t[CONV_WEIGHT].n, CONV_WEIGHT);
    array(c, "db", GIVEN | MADE | GRAD, s.M, CONV_BIAS);
    if (c->s[7]) picture(c, "add", GIVEN, s.B, s.M, HW, NOTHING);
}
static void conv_scratch(Compute *on, const Case *c) {
    const Conv s = conv_of(c);
    conv_needs(on, &s, 0), conv_needs(on, &s, 1);
}
static void conv_run(const Compute *on, const Case *c) {
    const Conv s = conv_of(c);
    Conv forward = s;
    const size_t bytes = on->device ? on->fast->conv_prepared_bytes(&s) : 0;
    if (bytes) {
        MUST(compute_alloc(on, &forward.prepared, bytes, "a test"));
        on->fast->conv_prepare(on, forward.prepared, P(CONV_WEIGHT), &s);
        if (s.kind == CONV1) compute_free(on, forward.prepared), forward.prepared = NULL;
    }
    conv_forward(on, P(CONV_Y), P(CONV_X), P(CONV_WEIGHT), P(CONV_BIAS), c->s[7] ? P(CONV_ADD) : NULL, &forward);
    conv_backward(on, P(CONV_DX), P(CONV_DW), P(CONV_DB), P(CONV_DY), P(CONV_X), P(CONV_WEIGHT), (int)c->s[6], &s);
    if (forward.prepared) compute_free(on, forward.prepared);
}
THERE(conv_forward)

static GroupNorm group_norm_of(const Case *c) {
    return (GroupNorm){.B = c->s[0], .C = c->s[1], .hw = c->s[2], .swish = (int)c->s[3]};
}
enum { GN_X, GN_GAMMA, GN_BETA, GN_Y, GN_DY, GN_DX, GN_DGAMMA, GN_DBETA, GN_KEPT };
static void group_norm_describe(Case *c, const Compute *on) {
    const GroupNorm s = group_norm_of(c);
    picture(c, "x", GIVEN, s.B, s.C, s.hw, NOTHING);
    array(c, "gamma", GIVEN | PARAM, s.C, NOTHING), array(c, "beta", GIVEN | PARAM, s.C, NOTHING);
    picture(c, "y", MADE, s.B, s.C, s.hw, NOTHING);
    picture(c, "dy", GIVEN, s.B, s.C, s.hw, GN_Y);
    picture(c, "dx", c->s[4] ? GIVEN | MADE : MADE, s.B, s.C, s.hw, GN_X);
    array(c, "dgamma", GIVEN | MADE | GRAD, s.C, GN_GAMMA), array(c, "dbeta", GIVEN | MADE | GRAD, s.C, GN_BETA);
    array(c, "kept", SAVED, on->fast ? on->fast->group_norm_kept(&s) : s.B * NORM_GROUPS * 2 * sizeof(real), NOTHING);
}
static void group_norm_scratch(Compute *on, const Case *c) {
    const GroupNorm s = group_norm_of(c);
    for (int backward = 0; on->fast && backward < 2; backward++)
        compute_needs(on, on->fast->group_norm_needs(on, &s, backward));
}
static void group_norm_run(const Compute *on, const Case *c) {
    const GroupNorm s = group_norm_of(c);
    group_norm_forward(on, P(GN_Y), P(GN_KEPT), P(GN_X), P(GN_GAMMA), P(GN_BETA), &s);
    group_norm_backward(on, P(GN_DX), P(GN_DGAMMA), P(GN_DBETA), P(GN_DY), P(GN_X), P(GN_GAMMA), P(GN_BETA), P(GN_KEPT),
                        (int)c->s[4], &s);
}
THERE(group_norm_forward)

enum { PA_Q, PA_K, PA_V, PA_Y, PA_DY, PA_DQ, PA_DK, PA_DV, PA_P };
static void picture_attention_describe(Case *c, const Compute *on) {
    const size_t B = c->s[0], C = c->s[1], N = c->s[2];
    static const char *const input[] = {"q", "k", "v"}, *const gradient[] = {"dq", "dk", "dv"};
    for (int i = 0; i < 3; i++) picture(c, input[i], GIVEN, B, C, N, NOTHING);
    picture(c, "y", MADE, B, C, N, NOTHING), picture(c, "dy", GIVEN, B, C, N, PA_Y);
    for (int i = 0; i < 3; i++) picture(c, gradient[i], c->s[3 + i] ? GIVEN | MADE : MADE, B, C, N, PA_Q + i);
    array(c, "p", SAVED, B * N * round_up(N, 64) * on->unit, NOTHING);
}
static void picture_attention_scratch(Compute *on, const Case *c) {
    for (int backward = 0; on->fast && backward < 2; backward++)
        compute_needs(on, on->fast->picture_attention_needs(on, c->s[0], c->s[1], c->s[2], backward));
}
static void picture_attention_run(const Compute *on, const Case *c) {
    const int accumulate[3] = {(int)c->s[3], (int)c->s[4], (int)c->s[5]};
    const size_t B = c->s[0], C = c->s[1], N = c->s[2];
    picture_attention_forward(on, P(PA_Y), P(PA_P), P(PA_Q), P(PA_K), P(PA_V), B, C, N);
    picture_attention_backward(on, P(PA_DQ), P(PA_DK), P(PA_DV), P(PA_DY), P(PA_Q), P(PA_K), P(PA_V), P(PA_P),
                               accumulate, B, C, N);
}
THERE(picture_attention_forward)

static Codes codes_of(const Case *c) {
    return (Codes){.B = c->s[0], .D = c->s[1], .N = c->s[2], .K = c->s[3]};
}
enum { VQ_Z, VQ_BOOK, VQ_CODE, VQ_ZQ, VQ_GAP, VQ_DGAP, VQ_DZ, VQ_DBOOK };
static void nearest_describe(Case *c, const Compute *on) {
    const Codes s = codes_of(c);
    (void)on;
    picture(c, "z", GIVEN, s.B, s.D, s.N, NOTHING), array(c, "book", GIVEN | PARAM, s.K * s.D, NOTHING);
    whole(c, "code", MADE, s.B * s.N, s.K);
}
static void nearest_choose(const Case *c, real *x[TENSORS]) { /* close to an entry, so that it is clear which */
    const Codes s = codes_of(c);
    for (size_t i = 0; i < s.B * s.D * s.N; i++) {
        const size_t b = i / s.N / s.D, n = i % s.N, code = (7 * b + 3 * n) % s.K;
        x[VQ_Z][i] = x[VQ_BOOK][code * s.D + i / s.N % s.D] + (real)0.05 * x[VQ_Z][i];
    }
}
static void nearest_scratch(Compute *on, const Case *c) {
    const Codes s = codes_of(c);
    if (on->fast) compute_needs(on, on->fast->nearest_needs(on, &s));
}
static void nearest_run(const Compute *on, const Case *c) {
    const Codes s = codes_of(c);
    nearest_codes(on, CODE(VQ_CODE), P(VQ_Z), P(VQ_BOOK), &s);
}
THERE(nearest_codes)

/* The codebook loss alone: gap's gradient by z and by the book. zq passes its gradient straight through. */
static void quantize_describe(Case *c, const Compute *on) {
    const Codes s = codes_of(c);
    (void)on;
    picture(c, "z", GIVEN, s.B, s.D, s.N, NOTHING), array(c, "book", GIVEN | PARAM, s.K * s.D, NOTHING);
    whole(c, "code", GIVEN, s.B * s.N, s.K);
    picture(c, "zq", MADE, s.B, s.D, s.N, NOTHING);
    array(c, "gap", MADE | DOUBLE, 1, NOTHING), array(c, "dgap", GIVEN | ON_HOST | DOUBLE, 1, VQ_GAP);
    picture(c, "dz", GIVEN | MADE, s.B, s.D, s.N, VQ_Z);
    array(c, "dbook", GIVEN | MADE | GRAD, s.K * s.D, VQ_BOOK);
}
static void quantize_run(const Compute *on, const Case *c) {
    const Codes s = codes_of(c);
    const double weight = 2 * *(const double *)c->p[VQ_DGAP];
    straight_through(on, P(VQ_ZQ), (double *)c->p[VQ_GAP], P(VQ_Z), P(VQ_BOOK), CODE(VQ_CODE), &s);
    quantize_backward(on, P(VQ_DZ), P(VQ_DBOOK), P(VQ_Z), P(VQ_BOOK), CODE(VQ_CODE), weight, weight, &s);
}
THERE(quantize_backward)

static void lookup_describe(Case *c, const Compute *on) {
    const Codes s = codes_of(c);
    (void)on;
    array(c, "book", GIVEN | PARAM, s.K * s.D, NOTHING), whole(c, "code", GIVEN, s.B * s.N, s.K);
    picture(c, "zq", MADE, s.B, s.D, s.N, NOTHING);
}
static void lookup_run(const Compute *on, const Case *c) {
    const Codes s = codes_of(c);
    lookup_codes(on, P(2), P(0), CODE(1), &s);
}
THERE(lookup_codes)

enum { TANH_X, TANH_Y, TANH_DY, TANH_DX };
static void tanh_describe(Case *c, const Compute *on) {
    (void)on;
    array(c, "x", GIVEN, c->s[0], NOTHING), array(c, "y", MADE, c->s[0], NOTHING);
    array(c, "dy", GIVEN, c->s[0], TANH_Y), array(c, "dx", MADE, c->s[0], TANH_X);
}
static void tanh_run(const Compute *on, const Case *c) {
    tanh_forward(on, P(TANH_Y), P(TANH_X), c->s[0]);
    tanh_backward(on, P(TANH_DX), P(TANH_DY), P(TANH_Y), c->s[0]);
}
THERE(tanh_forward)

static void planes_describe(Case *c, const Compute *on) {
    (void)on;
    array(c, "planes", GIVEN | ON_HOST, c->s[0] * c->s[1] * c->s[2], NOTHING);
    picture(c, "value", MADE, c->s[0], c->s[1], c->s[2], NOTHING);
    array(c, "back", MADE | ON_HOST, c->s[0] * c->s[1] * c->s[2], NOTHING);
}
static void planes_scratch(Compute *on, const Case *c) {
    compute_needs(on, c->s[0] * c->s[1] * c->s[2] * sizeof(real));
}
static void planes_run(const Compute *on, const Case *c) {
    const size_t B = c->s[0], C = c->s[1], hw = c->s[2];
    if (on->device) {
        on->fast->put_planes(on, P(1), P(0), B, C, hw);
        MUST(on->fast->get_planes(on, P(2), P(1), B, C, hw));
    } else
        memcpy(P(1), P(0), B * C * hw * sizeof(real)), memcpy(P(2), P(0), B * C * hw * sizeof(real));
}
THERE(put_planes)

/* ---- transformer.cu ---- */

enum { EMBED_TOKEN, EMBED_POSITION, EMBED_IDS, EMBED_X, EMBED_DX, EMBED_DTOKEN, EMBED_DPOSITION };
static void embed_describe(Case *c, const Compute *on) {
    const size_t B = c->s[0], n = c->s[1], C = c->s[2], V = c->s[3];
    (void)on;
    array(c, "token", GIVEN | PARAM, V * C, NOTHING), array(c, "position", GIVEN | PARAM, n * C, NOTHING);
    whole(c, "ids", GIVEN, B * n, V);
    array(c, "x", MADE | F32, B * n * C, NOTHING), array(c, "dx", GIVEN | F32, B * n * C, EMBED_X);
    array(c, "dtoken", GIVEN | MADE | GRAD, V * C, EMBED_TOKEN);
    array(c, "dposition", GIVEN | MADE | GRAD, n * C, EMBED_POSITION);
}
static void embed_run(const Compute *on, const Case *c) {
    const size_t B = c->s[0], n = c->s[1], C = c->s[2], V = c->s[3];
    embed_forward(on, P(EMBED_X), CODE(EMBED_IDS), P(EMBED_TOKEN), P(EMBED_POSITION), NULL, B, n, C);
    embed_backward(on, P(EMBED_DTOKEN), P(EMBED_DPOSITION), P(EMBED_DX), CODE(EMBED_IDS), B, n, C, V);
}
THERE(embed_forward)

enum { LN_X, LN_WEIGHT, LN_BIAS, LN_Y, LN_MEAN, LN_RSTD, LN_DY, LN_DX, LN_DWEIGHT, LN_DBIAS, LN_OPERAND };
static void norm_describe(Case *c, const Compute *on) {
    const size_t B = c->s[0], n = c->s[1], skip = c->s[2], C = c->s[3], R = B * (n - skip);
    array(c, "x", GIVEN | F32, B * n * C, NOTHING);
    array(c, "weight", GIVEN | PARAM, C, NOTHING), array(c, "bias", GIVEN | PARAM, C, NOTHING);
    array(c, "y", MADE, R * C, NOTHING);
    array(c, "mean", MADE | F32, R, NOTHING), array(c, "rstd", MADE | F32, R, NOTHING);
    array(c, "dy", GIVEN | F32, R * C, LN_Y), array(c, "dx", GIVEN | MADE | F32, B * n * C, LN_X);
    array(c, "dweight", GIVEN | MADE | GRAD, C, LN_WEIGHT), array(c, "dbias", GIVEN | MADE | GRAD, C, LN_BIAS);
    if (on->device) array(c, "dx as an operand", SAVED, B * n * C * on->unit, NOTHING);
}
static void rows_scratch(Compute *on, const Case *c) {
    const size_t R = c->s[0] * c->s[1], C = c->s[3];
    if (on->fast && on->fast->norm_needs) compute_needs(on, on->fast->norm_needs(on, R, C));
}
static void norm_run(const Compute *on, const Case *c) {
    const size_t n = c->s[1], skip = c->s[2], C = c->s[3], R = c->s[0] * (n - skip);
    norm_forward(on, P(LN_Y), P(LN_MEAN), P(LN_RSTD), P(LN_X), P(LN_WEIGHT), P(LN_BIAS), R, C, n, skip);
    norm_backward(on, P(LN_DX), on->device ? P(LN_OPERAND) : P(LN_DX), P(LN_DWEIGHT), P(LN_DBIAS), P(LN_DY), P(LN_X),
                  P(LN_WEIGHT), P(LN_MEAN), P(LN_RSTD), 1, R, C, n, skip);
}
THERE(norm_forward)

enum { FC_X, FC_WEIGHT, FC_BIAS, FC_Y, FC_DY, FC_DX, FC_DW, FC_DB, FC_ADD };
static void linear_describe(Case *c, const Compute *on) {
    const size_t R = c->s[0], C = c->s[1], M = c->s[2], wide = c->s[3] ? F32 : 0;
    (void)on;
    array(c, "x", GIVEN, R * C, NOTHING);
    array(c, "w", GIVEN | PARAM, M * C, NOTHING), array(c, "bias", GIVEN | PARAM, M, NOTHING);
    array(c, "y", MADE | (int)wide, R * M, NOTHING), array(c, "dy", GIVEN, R * M, FC_Y);
    array(c, "dx", c->s[4] ? GIVEN | MADE : MADE, R * C, FC_X);
    array(c, "dw", GIVEN | MADE | GRAD, M * C, FC_WEIGHT), array(c, "db", GIVEN | MADE | GRAD, M, FC_BIAS);
    if (c->s[5]) array(c, "add", GIVEN | (int)wide, R * M, NOTHING);
}
static void linear_scratch(Compute *on, const Case *c) {
    if (on->fast && on->fast->linear_needs) compute_needs(on, on->fast->linear_needs(on, c->s[0], c->s[1], c->s[2]));
}
static void linear_run(const Compute *on, const Case *c) {
    const size_t R = c->s[0], C = c->s[1], M = c->s[2];
    const real *add = c->s[5] ? P(FC_ADD) : NULL;
    linear_forward(on, P(FC_Y), P(FC_X), P(FC_WEIGHT), P(FC_BIAS), add, (int)c->s[3], R, C, M);
    linear_backward(on, P(FC_DX), P(FC_DW), P(FC_DB), P(FC_DY), P(FC_X), P(FC_WEIGHT), (int)c->s[4], 0, R, C, M);
}
THERE(linear_forward)

enum { GELU_H, GELU_BIAS, GELU_G, GELU_DY, GELU_DH, GELU_SLOPE };
static void gelu_describe(Case *c, const Compute *on) {
    const size_t n = c->s[0] * c->s[1];
    array(c, "h", GIVEN, n, NOTHING), array(c, "bias", GIVEN | PARAM, c->s[1], NOTHING);
    array(c, "g", MADE, n, NOTHING), array(c, "dy", GIVEN, n, GELU_G), array(c, "dh", MADE, n, GELU_H);
    array(c, "slope", SAVED, n * on->unit, NOTHING);
}
static void gelu_run(const Compute *on, const Case *c) {
    copy_numbers(on, P(GELU_G), P(GELU_H), c->s[0] * c->s[1]);
    gelu_forward(on, P(GELU_G), P(GELU_SLOPE), P(GELU_BIAS), c->s[0], c->s[1]);
    copy_numbers(on, P(GELU_DH), P(GELU_DY), c->s[0] * c->s[1]);
    gelu_backward(on, P(GELU_DH), P(GELU_SLOPE), c->s[0], c->s[1]);
}
THERE(gelu_forward)

static Attention attention_case(const Case *c) {
    return (Attention){.B = c->s[0],
                       .heads = c->s[1],
                       .D = c->s[2],
                       .Tq = c->s[3],
                       .Tk = c->s[4],
                       .key_stride = c->s[4],
                       .causal = (int)c->s[5],
                       .unmasked = c->s[6]};
}
enum { AT_Q, AT_K, AT_V, AT_Y, AT_DY, AT_DQ, AT_DK, AT_DV, AT_SAVED };
static void attention_describe(Case *c, const Compute *on) {
    const Attention s = attention_case(c);
    const size_t queries = s.B * s.Tq * s.heads * s.D, keys = s.B * s.Tk * s.heads * s.D;
    array(c, "q", GIVEN, queries, NOTHING), array(c, "k", GIVEN, keys, NOTHING), array(c, "v", GIVEN, keys, NOTHING);
    array(c, "y", MADE, queries, NOTHING), array(c, "dy", GIVEN, queries, AT_Y);
    array(c, "dq", MADE, queries, AT_Q), array(c, "dk", MADE, keys, AT_K), array(c, "dv", MADE, keys, AT_V);
    array(c, "saved", SAVED, attention_saved(on, &s), NOTHING);
}
static void attention_scratch(Compute *on, const Case *c) {
    const Attention s = attention_case(c);
    compute_needs(on, attention_needs(on, &s, 0)), compute_needs(on, attention_needs(on, &s, 1));
}
static void attention_run(const Compute *on, const Case *c) {
    const Attention s = attention_case(c);
    attention_forward(on, P(AT_Y), P(AT_SAVED), P(AT_Q), P(AT_K), P(AT_V), &s);
    attention_backward(on, P(AT_DQ), P(AT_DK), P(AT_DV), P(AT_DY), P(AT_Y), P(AT_SAVED), P(AT_Q), P(AT_K), P(AT_V), &s);
}
THERE(attention_forward)

/* All positions are kept, then the last of every batch row looks back at them. */
enum { KEPT_Q, KEPT_K, KEPT_V, KEPT_Y, KEPT_KEYS, KEPT_VALUES };
static void kept_describe(Case *c, const Compute *on) {
    const Attention s = attention_case(c);
    const size_t inner = s.heads * s.D;
    array(c, "q", GIVEN, s.B * inner, NOTHING);
    array(c, "k", GIVEN, s.B * s.Tk * inner, NOTHING), array(c, "v", GIVEN, s.B * s.Tk * inner, NOTHING);
    array(c, "y", MADE, s.B * inner, NOTHING);
    array(c, "keys", SAVED, kept_bytes(on, &s), NOTHING), array(c, "values", SAVED, kept_bytes(on, &s), NOTHING);
}
static void kept_run(const Compute *on, const Case *c) {
    Attention s = attention_case(c);
    Position last[16];
    keep_positions(on, P(KEPT_KEYS), P(KEPT_K), s.Tk, &s), keep_positions(on, P(KEPT_VALUES), P(KEPT_V), s.Tk, &s);
    for (size_t b = 0; b < s.B; b++) last[b] = (Position){b, s.Tk - 1, s.Tk};
    s.position = last, s.Tq = s.B, s.Tk = 0, s.B = 1;
    attention_from_kept(on, P(KEPT_Y), P(KEPT_Q), P(KEPT_KEYS), P(KEPT_VALUES), &s);
}
static void kept_scratch(Compute *on, const Case *c) {
    Attention s = attention_case(c);
    static const Position any;
    s.position = &any, s.Tq = s.B, s.B = 1;
    compute_needs(on, attention_needs(on, &s, 0));
}
THERE(attention_from_kept)

enum { VAR_RAW, VAR_SCALORS, VAR_IDS, VAR_LOGITS, VAR_DLOGITS, VAR_DRAW, VAR_DSCALORS };
static void variant_describe(Case *c, const Compute *on) {
    const size_t B = c->s[0], n = c->s[1], K = c->s[2], scales = c->s[3];
    (void)on;
    array(c, "raw", GIVEN | F32, B * n * K, NOTHING);
    array(c, "log_scalors", GIVEN | PARAM, scales * (c->s[4] ? n : 1), NOTHING);
    whole(c, "ids", GIVEN, B * (1 + n), K);
    array(c, "logits", MADE | F32, B * n * K, NOTHING), array(c, "dlogits", GIVEN | F32, B * n * K, VAR_LOGITS);
    array(c, "draw", MADE, B * n * K, VAR_RAW);
    array(c, "dlog_scalors", GIVEN | MADE | GRAD, c->t[VAR_SCALORS].n, VAR_SCALORS);
}
static void variant_choose(const Case *c, real *x[TENSORS]) {
    for (size_t b = 0; b < c->s[0]; b++) x[VAR_IDS][b * (1 + c->s[1])] = (real)(1 + b % c->s[3]); /* t */
}
static void variant_scratch(Compute *on, const Case *c) {
    compute_needs(on, variant_needs(on, c->s[0] * c->s[1]));
}
static void variant_run(const Compute *on, const Case *c) {
    const size_t B = c->s[0], n = c->s[1], K = c->s[2];
    Variant v = {.log_scalors = P(VAR_SCALORS),
                 .fine = (int)c->s[4],
                 .residual = (int)c->s[5],
                 .scales = c->s[3],
                 .length = n,
                 .ids = CODE(VAR_IDS),
                 .prompt = 1,
                 .N = n};
    for (size_t t = 0; t <= c->s[3]; t++) v.alpha[t] = (float)(1 - 0.2 * (double)t);
    variant_forward(on, P(VAR_LOGITS), P(VAR_RAW), &v, NULL, B, n, K);
    variant_backward(on, P(VAR_DRAW), P(VAR_DSCALORS), P(VAR_DLOGITS), P(VAR_RAW), &v, B, n, K);
}
THERE(variant_forward)

/* sums (2): of the hard and the soft loss; their weights are what their sum is weighed with. */
enum { LOSS_LOGITS, LOSS_TARGET, LOSS_POSTERIOR, LOSS_SUMS, LOSS_WEIGHTS, LOSS_DLOGITS };
static void loss_describe(Case *c, const Compute *on) {
    const size_t R = c->s[0], K = c->s[1];
    (void)on;
    array(c, "logits", GIVEN, R * K, NOTHING), whole(c, "target", GIVEN, R, K);
    array(c, "posterior", GIVEN, R * K, NOTHING);
    array(c, "sums", MADE | ON_HOST | DOUBLE, 2, NOTHING), array(c, "weights", GIVEN | ON_HOST | DOUBLE, 2, LOSS_SUMS);
    array(c, "dlogits", MADE, R * K, LOSS_LOGITS);
}
static void loss_choose(const Case *c, real *x[TENSORS]) {
    const size_t K = c->s[1];
    for (size_t r = 0; r < c->s[0]; r++) {
        real *q = x[LOSS_POSTERIOR] + r * K, sum = 0;
        for (size_t k = 0; k < K; k++) q[k] = k % 5 == 4 ? 0 : q[k] * q[k], sum += q[k];
        for (size_t k = 0; k < K; k++) q[k] /= sum;
    }
}
static void loss_run(const Compute *on, const Case *c) {
    const double *weight = (const double *)c->p[LOSS_WEIGHTS];
    loss_rows(on, (double *)c->p[LOSS_SUMS], P(LOSS_DLOGITS), P(LOSS_LOGITS), CODE(LOSS_TARGET), P(LOSS_POSTERIOR),
              (real)weight[1], (real)weight[0], c->s[0], c->s[1]);
}
THERE(denoising_loss)

static void adamw_describe(Case *c, const Compute *on) {
    static const char *const name[] = {"w", "m", "v", "ema"};
    (void)on;
    for (int i = 0; i < 4; i++) array(c, name[i], GIVEN | MADE, c->s[0], NOTHING);
    array(c, "g", GIVEN, c->s[0], NOTHING);
}
static void adamw_choose(const Case *c, real *x[TENSORS]) {
    for (size_t i = 0; i < c->s[0]; i++) x[2][i] *= x[2][i]; /* v */
}
static void adamw_run(const Compute *on, const Case *c) {
    const AdamStep a = {.keep = (real)0.9,
                        .rate = (real)0.2,
                        .inverse = (real)1.5,
                        .eps = (real)1e-8,
                        .beta1 = (real)0.7,
                        .beta2 = (real)0.9,
                        .rest1 = (real)0.3,
                        .rest2 = (real)0.1};
    adamw(on, P(0), P(1), P(2), P(4), &a, c->s[0]);
    moving_average(on, P(3), P(0), (real)0.3, c->s[0]);
}
THERE(adamw)

/* Weights that their format holds exactly: the product is that of the plain loop. */
enum { STREAM_X, STREAM_W, STREAM_BIAS, STREAM_ADD, STREAM_Y };
static void stream_describe(Case *c, const Compute *on) {
    const size_t R = c->s[0], C = c->s[1], M = c->s[2];
    (void)on;
    array(c, "x", GIVEN, R * C, NOTHING), array(c, "w", GIVEN, M * C, NOTHING), array(c, "bias", GIVEN, M, NOTHING);
    array(c, "add", GIVEN, R * M, NOTHING), array(c, "y", MADE, R * M, NOTHING);
}
static void stream_choose(const Case *c, real *x[TENSORS]) {
    for (size_t i = 0; i < c->s[0] * c->s[1]; i++) x[STREAM_X][i] = to_bf16(x[STREAM_X][i]);
    for (size_t i = 0; i < c->s[2] * c->s[1]; i++)
        x[STREAM_W][i] =
            c->s[3] == WEIGHTS_INT8 ? (real)(i % c->s[1] ? (long)(i * 37 % 255) - 127 : 127) : to_bf16(x[STREAM_W][i]);
}
static void stream_scratch(Compute *on, const Case *c) {
    if (on->fast) compute_needs(on, on->fast->stream_needs(on, c->s[0], c->s[1]));
}
static void stream_run(const Compute *on, const Case *c) {
    const size_t R = c->s[0], C = c->s[1], M = c->s[2];
    Weights w = {.format = (WeightFormat)c->s[3], .data = P(STREAM_W)};
    void *data = NULL;
    float *scale = NULL;
    if (!on->fast) {
        linear_forward(on, P(STREAM_Y), P(STREAM_X), P(STREAM_W), P(STREAM_BIAS), P(STREAM_ADD), 0, R, C, M);
        return;
    }
    MUST(mem_alloc(&scale, M, sizeof *scale, "a test"));
    if (w.format != WEIGHTS_REAL) {
        MUST(mem_alloc(&data, on->fast->weights_bytes(w.format, M, C), 1, "a test"));
        for (size_t j = 0; j < M; j++) on->fast->weights_pack(w.format, data, scale, P(STREAM_W) + j * C, j, C);
        w.data = data, w.scale = scale;
    }
    on->fast->linear_stream(on, P(STREAM_Y), P(STREAM_X), &w, P(STREAM_BIAS), P(STREAM_ADD), R, C, M);
    free(data), free(scale);
}
THERE(linear_stream)

/* ---- training/discriminator.c: values (C,B,h,w), on a GPU (B,h,w,C) ---- */

static Conv4 conv4_of(const Case *c) {
    return (Conv4){.B = c->s[0], .C = c->s[1], .M = c->s[2], .H = c->s[3], .W = c->s[4], .stride = c->s[5]};
}
enum { C4_X, C4_WEIGHT, C4_Y, C4_DY, C4_DX, C4_DW };
static void conv4_describe(Case *c, const Compute *on) {
    const Conv4 s = conv4_of(c);
    const size_t n = s.B * conv4_side(s.H, s.stride) * conv4_side(s.W, s.stride);
    (void)on;
    picture(c, "x", GIVEN, 1, s.C, s.B * s.H * s.W, NOTHING);
    array(c, "w", GIVEN | PARAM, s.M * s.C * CONV4_TAPS, NOTHING);
    picture(c, "y", MADE, 1, s.M, n, NOTHING), picture(c, "dy", GIVEN, 1, s.M, n, C4_Y);
    picture(c, "dx", MADE, 1, s.C, s.B * s.H * s.W, C4_X);
    array(c, "dw", GIVEN | MADE | GRAD, c->t[C4_WEIGHT].n, C4_WEIGHT);
}
static void conv4_scratch(Compute *on, const Case *c) {
    const Conv4 s = conv4_of(c);
    if (on->fast) compute_needs(on, on->fast->conv4_needs(on, &s));
}
static void conv4_run(const Compute *on, const Case *c) {
    Conv4 s = conv4_of(c);
    if (on->device) {
        MUST(compute_alloc(on, &s.prepared, on->fast->conv4_prepared_bytes(&s), "a test"));
        on->fast->conv4_prepare(on, s.prepared, P(C4_WEIGHT), &s);
    }
    conv4_forward(on, P(C4_Y), P(C4_X), P(C4_WEIGHT), &s);
    conv4_backward(on, P(C4_DX), P(C4_DW), P(C4_DY), P(C4_X), P(C4_WEIGHT), &s);
    if (on->device) compute_free(on, s.prepared);
}
THERE(conv4_forward)

/* Feature matching adds its own loss, |a - other|, weighed with dgap. */
enum {
    ACT_Y,
    ACT_OTHER,
    ACT_BETA,
    ACT_A,
    ACT_DA,
    ACT_GAP,
    ACT_DGAP,
    ACT_DY,
    ACT_DBETA,
    ACT_MEAN,
    ACT_RSTD,
    ACT_GAMMA,
    ACT_DGAMMA
};
static void activate_describe(Case *c, const Compute *on) {
    const size_t M = c->s[0], n = c->s[1];
    (void)on;
    picture(c, "y", GIVEN, 1, M, n, NOTHING), picture(c, "other", GIVEN, 1, M, n, NOTHING);
    array(c, "beta", GIVEN | PARAM, M, NOTHING);
    picture(c, "a", MADE, 1, M, n, NOTHING), picture(c, "da", GIVEN, 1, M, n, ACT_A);
    array(c, "gap", MADE | ON_HOST, 1, NOTHING), array(c, "dgap", GIVEN | ON_HOST, 1, ACT_GAP);
    picture(c, "dy", MADE, 1, M, n, ACT_Y);
    array(c, "dbeta", GIVEN | MADE | GRAD, M, ACT_BETA);
    array(c, "mean", c->s[2] ? MADE | F32 : F32, M, NOTHING), array(c, "rstd", c->s[2] ? MADE | F32 : F32, M, NOTHING);
    if (!c->s[2]) return;
    array(c, "gamma", GIVEN | PARAM, M, NOTHING);
    array(c, "dgamma", GIVEN | MADE | GRAD, M, ACT_GAMMA);
}
static Activation activation_of(const Case *c) {
    return (Activation){.M = c->s[0],
                        .n = c->s[1],
                        .slope = (real)0.2,
                        .eps = 1e-5,
                        .momentum = 0.1,
                        .beta = P(ACT_BETA),
                        .gamma = c->s[2] ? P(ACT_GAMMA) : NULL,
                        .mean = P(ACT_MEAN),
                        .rstd = P(ACT_RSTD)};
}
static void activate_scratch(Compute *on, const Case *c) {
    Activation s = activation_of(c);
    static const real some = 1;
    s.gamma = c->s[2] ? &some : NULL, s.beta = &some;
    if (on->fast) compute_needs(on, on->fast->activate_needs(on, &s));
}
static void activate_run(const Compute *on, const Case *c) {
    const Activation s = activation_of(c);
    const double step = (double)*P(ACT_DGAP);
    activate_forward(on, P(ACT_A), P(ACT_Y), &s);
    *P(ACT_GAP) = (real)feature_gap(on, P(ACT_A), P(ACT_OTHER), s.M * s.n);
    copy_numbers(on, P(ACT_DY), P(ACT_DA), s.M * s.n);
    activate_backward(on, P(ACT_DY), c->s[2] ? P(ACT_DGAMMA) : NULL, P(ACT_DBETA), P(ACT_A), P(ACT_Y), P(ACT_OTHER),
                      step, &s);
}
THERE(activate_forward)

/* ---- training/perceptual.c ---- */

enum { RELU_X, RELU_Y, RELU_DY, RELU_DX };
static void relu_describe(Case *c, const Compute *on) {
    (void)on;
    array(c, "x", GIVEN, c->s[0], NOTHING), array(c, "y", MADE, c->s[0], NOTHING);
    array(c, "dy", GIVEN, c->s[0], RELU_Y), array(c, "dx", MADE, c->s[0], RELU_X);
}
static void relu_run(const Compute *on, const Case *c) {
    copy_numbers(on, P(RELU_Y), P(RELU_X), c->s[0]);
    relu_forward(on, P(RELU_Y), c->s[0]);
    copy_numbers(on, P(RELU_DX), P(RELU_DY), c->s[0]);
    relu_backward(on, P(RELU_DX), P(RELU_Y), c->s[0]);
}
THERE(relu_forward)

enum { POOL_X, POOL_Y, POOL_DY, POOL_DX };
static void pool_describe(Case *c, const Compute *on) {
    const size_t B = c->s[0], C = c->s[1], h = c->s[2], w = c->s[3];
    (void)on;
    picture(c, "x", GIVEN, B, C, h * w, NOTHING), picture(c, "y", MADE, B, C, (h / 2) * (w / 2), NOTHING);
    picture(c, "dy", GIVEN, B, C, (h / 2) * (w / 2), POOL_Y), picture(c, "dx", MADE, B, C, h * w, POOL_X);
}
static void pool_run(const Compute *on, const Case *c) {
    pool_forward(on, P(POOL_Y), P(POOL_X), c->s[0], c->s[1], c->s[2], c->s[3]);
    pool_backward(on, P(POOL_DX), P(POOL_DY), P(POOL_X), c->s[0], c->s[1], c->s[2], c->s[3]);
}
THERE(pool_forward)

enum { CMP_A, CMP_R, CMP_LIN, CMP_DISTANCE, CMP_WEIGHT, CMP_DR, CMP_SUMS };
static void compare_describe(Case *c, const Compute *on) {
    const size_t B = c->s[0], C = c->s[1], hw = c->s[2];
    picture(c, "a", GIVEN, B, C, hw, NOTHING), picture(c, "r", GIVEN, B, C, hw, NOTHING);
    array(c, "lin", GIVEN | PARAM, C, NOTHING);
    array(c, "distance", MADE | ON_HOST | DOUBLE, 1, NOTHING);
    array(c, "weight", GIVEN | ON_HOST | DOUBLE, 1, CMP_DISTANCE);
    picture(c, "dr", c->s[3] ? GIVEN | MADE : MADE, B, C, hw, CMP_R);
    array(c, "sums", SAVED, comparison_sums(on, B, hw) * sizeof(double), NOTHING);
}
static void compare_run(const Compute *on, const Case *c) {
    const size_t n = comparison_sums(on, c->s[0], c->s[2]);
    const TapShape s = {.B = c->s[0],
                        .C = c->s[1],
                        .hw = c->s[2],
                        .weight = *(const double *)c->p[CMP_WEIGHT],
                        .accumulate = (int)c->s[3]};
    double *sums = (double *)malloc(n * sizeof *sums), *distance = (double *)c->p[CMP_DISTANCE];
    compare_features(on, (double *)c->p[CMP_SUMS], P(CMP_DR), P(CMP_A), P(CMP_R), P(CMP_LIN), &s);
    MUST(compute_get(on, sums, c->p[CMP_SUMS], n * sizeof *sums));
    *distance = 0;
    for (size_t i = 0; i < n; i++) *distance += sums[i];
    free(sums);
}
THERE(compare_features)

static const Checked layers[] = {
    {"conv", "kind B C M h w accumulate add", conv_describe, conv_scratch, conv_run, NULL,
     CASES({CONV1, 2, 5, 3, 7, 9, 0, 1}, {CONV3, 2, 3, 5, 7, 9, 1, 0}, {CONV3, 1, 1, 1, 1, 1, 0, 1},
           {CONV3, 1, 17, 19, 4, 6, 1, 1}, {CONV_DOWN, 2, 3, 5, 6, 4, 0, 0}, {CONV_UP, 2, 5, 3, 3, 4, 1, 0}),
     BY(conv_forward)},
    {"group_norm", "B C hw swish accumulate", group_norm_describe, group_norm_scratch, group_norm_run, NULL,
     CASES({2, 64, 15, 1, 0}, {1, 32, 3, 0, 1}, {3, 96, 7, 1, 1}, {1, 64, 257, 0, 0}), BY(group_norm_forward)},
    {"picture_attention", "B C N accumulate_q _k _v", picture_attention_describe, picture_attention_scratch,
     picture_attention_run, NULL, CASES({2, 32, 9, 0, 0, 0}, {1, 64, 3, 1, 0, 1}, {3, 32, 33, 0, 1, 1}),
     BY(picture_attention_forward)},
    {"nearest", "B D N K", nearest_describe, nearest_scratch, nearest_run, nearest_choose,
     CASES({2, 8, 5, 11}, {1, 16, 257, 33}, {3, 32, 1, 257}), BY(nearest_codes)},
    {"quantize", "B D N K", quantize_describe, NULL, quantize_run, NULL,
     CASES({2, 3, 5, 7}, {1, 17, 1, 3}, {3, 4, 65, 9}), BY(quantize_backward)},
    {"lookup", "B D N K", lookup_describe, NULL, lookup_run, NULL, CASES({2, 3, 5, 7}, {1, 17, 1, 3}),
     BY(lookup_codes)},
    {"tanh", "n", tanh_describe, NULL, tanh_run, NULL, CASES({1}, {257}), BY(tanh_forward)},
    {"planes", "B C hw", planes_describe, planes_scratch, planes_run, NULL, CASES({2, 3, 5}, {1, 33, 70}),
     BY(put_planes)},
    {"embed", "B n C V", embed_describe, NULL, embed_run, NULL, CASES({2, 5, 3, 7}, {3, 1, 257, 2}, {1, 33, 50, 40}),
     BY(embed_forward)},
    {"norm", "B n skip C", norm_describe, rows_scratch, norm_run, NULL,
     CASES({2, 5, 0, 7}, {3, 4, 1, 257}, {1, 7, 2, 33}, {1, 1, 0, 50}), BY(norm_forward)},
    {"linear", "R C M y_f32 accumulate add", linear_describe, linear_scratch, linear_run, NULL,
     CASES({5, 7, 3, 0, 0, 0}, {1, 1, 1, 1, 1, 1}, {33, 50, 17, 1, 0, 1}, {3, 257, 20, 0, 1, 0}), BY(linear_forward)},
    {"gelu", "R H", gelu_describe, NULL, gelu_run, NULL, CASES({3, 5}, {1, 257}), BY(gelu_forward)},
    {"attention", "B heads D Tq Tk causal unmasked", attention_describe, attention_scratch, attention_run, NULL,
     CASES({2, 3, 5, 7, 7, 1, 0}, {1, 2, 16, 4, 9, 0, 0}, {1, 1, 50, 33, 33, 1, 3}, {3, 1, 64, 1, 70, 0, 0}),
     BY(attention_forward)},
    {"kept", "B heads D Tq Tk", kept_describe, kept_scratch, kept_run, NULL, CASES({2, 1, 16, 0, 7}, {3, 2, 16, 0, 33}),
     BY(attention_from_kept)},
    {"variant", "B n K scales fine residual", variant_describe, variant_scratch, variant_run, variant_choose,
     CASES({2, 3, 5, 3, 0, 1}, {3, 7, 33, 2, 1, 0}, {1, 4, 257, 3, 1, 1}), BY(variant_forward)},
    {"denoising_loss", "R K", loss_describe, NULL, loss_run, loss_choose, CASES({5, 7}, {1, 257}, {33, 3}),
     BY(denoising_loss)},
    {"adamw", "n", adamw_describe, NULL, adamw_run, adamw_choose, CASES({1}, {257}, {4099}), BY(adamw)},
    {"linear_stream", "R C M format", stream_describe, stream_scratch, stream_run, stream_choose,
     CASES({1, 50, 17, WEIGHTS_REAL}, {3, 257, 33, WEIGHTS_REAL}, {2, 96, 35, WEIGHTS_BF16}, {5, 64, 3, WEIGHTS_INT8}),
     BY(linear_stream)},
    {"conv4", "B C M H W stride", conv4_describe, conv4_scratch, conv4_run, NULL,
     CASES({2, 3, 5, 8, 6, 2}, {1, 5, 1, 7, 4, 1}, {3, 1, 17, 9, 11, 2}), BY(conv4_forward)},
    {"activate", "M n norm", activate_describe, activate_scratch, activate_run, NULL,
     CASES({3, 70, 1}, {5, 9, 0}, {17, 33, 1}), BY(activate_forward)},
    {"relu", "n", relu_describe, NULL, relu_run, NULL, CASES({1}, {257}), BY(relu_forward)},
    {"pool", "B C h w", pool_describe, NULL, pool_run, NULL, CASES({2, 3, 5, 8}, {1, 33, 2, 7}), BY(pool_forward)},
    {"compare_features", "B C hw accumulate", compare_describe, NULL, compare_run, NULL,
     CASES({2, 3, 5, 0}, {1, 64, 33, 1}, {3, 257, 1, 0}), BY(compare_features)},
};

/* ---- All of them ---- */

static void check_layer(const Checked *l) {
    for (size_t i = 0; i < l->n_cases; i++) {
        if (sizeof(real) == 8) check_gradients(l, l->cases[i], PLAIN_LOOPS);
        const Layers *fast = compute_of(&(Params){0}).fast;
        if (fast && l->there(fast)) {
            compare_case(l, l->cases[i], FAST_LAYERS);
            if (sizeof(real) == 8) check_gradients(l, l->cases[i], FAST_LAYERS);
        }
        if (sizeof(real) == 8) continue;
        if (&cuda_f32 && l->there(cuda_f32.layers)) compare_case(l, l->cases[i], GPU_F32);
        if (&cuda_bf16 && l->there(cuda_bf16.layers)) compare_case(l, l->cases[i], GPU_BF16);
    }
}

/* A name, or how it begins */
static int is_named(const Checked *l, const char *name) {
    return !strncmp(l->name, name, strlen(name));
}

static int is_layer(const char *name) {
    for (size_t i = 0; i < sizeof layers / sizeof *layers; i++)
        if (is_named(&layers[i], name)) return 1;
    return 0;
}

static int no_such_layer(const char *name) {
    printf("no such layer: %s; there are", name);
    for (size_t i = 0; i < sizeof layers / sizeof *layers; i++) printf("%s %s", i ? "," : "", layers[i].name);
    printf("\n");
    return 1;
}

int main(int argc, char **argv) {
    const size_t n = sizeof layers / sizeof *layers;
    if (argc > 1 && !strcmp(argv[1], "--list")) {
        for (size_t i = 0; i < n; i++) printf("%s\n", layers[i].name);
        return 0;
    }
    const int asks = argc > 1 && !strcmp(argv[1], "--has"); /* are these layers? */
    for (int k = 1 + asks; k < argc; k++)
        if (!is_layer(argv[k])) return no_such_layer(argv[k]);
    if (asks) return 0;
    for (size_t i = 0; i < n; i++) {
        int wanted = argc == 1;
        for (int k = 1; k < argc; k++) wanted |= is_named(&layers[i], argv[k]);
        if (wanted) check_layer(&layers[i]);
    }
    if (argc > 1 && test_passed + test_failed == 0) return printf("has no fellow here: nothing to compare\n"), 0;
    return test_report();
}
