/* tiny.h - tiny random models in a folder, for the tests of the chain and of whole models, and a batch of samples of
 * one. */
#ifndef TINY_H
#define TINY_H

#include "test.h"

#include <sys/stat.h>

typedef struct {
    int T, joint, classes; /* classes: class-conditional, names a, bee, bicycle */
    int ema;               /* add transformer_ema.* (others than transformer.*) */
    int flip;              /* 1: scale 2 says another number of scales; 2: another schedule; 3: another scale number;
                              4: a grid that does not fit; 5: no classes; 6: other token values; 7: NaN weights */
    XVariant variant;
    int null_class; /* the label that means none; 0: the model was trained without */
} Tiny;
enum { SIDE = 3, N = SIDE * SIDE, CODES = 13, USED = 7 };

static inline void tiny_path(char out[600], const char *dir, const char *name) {
    CHECK(snprintf(out, 600, "%s/%s", dir, name) < 600);
}

static inline void write_vqgan(const char *dir) {
    char path[600];
    VqganConfig c;
    Vqgan *v = NULL;
    Config meta = {0};
    TensorList list = {0};
    int64_t used[USED] = {1, 2, 4, 5, 8, 11, 12};
    size_t dim = USED;
    memset(&c, 0, sizeof c);
    c.ch = 32, c.levels = 2, c.ch_mult[0] = c.ch_mult[1] = 1, c.num_res_blocks = 1, c.resolution = 2 * SIDE;
    c.in_channels = c.out_ch = 3, c.z_channels = 4, c.embed_dim = 3, c.n_embed = CODES, c.re_embed = USED;
    c.legacy = 1, c.beta = 0.25, c.resamp_with_conv = 1;
    CHECK_OK(vqgan_create(&v, &c, 0));
    CHECK_OK(params_plan(vqgan_params(v), PLAN_VALUE));
    params_init(vqgan_params(v), 5);
    CHECK_OK(vqgan_config_write(&meta, &c, "model.params."));
    CHECK_OK(tensor_list_params(&list, vqgan_params(v), 'v', "", DT_F32));
    CHECK_OK(tensor_list_add(&list, "quantize.used", DT_I64, 1, &dim, used, 0));
    tiny_path(path, dir, "vqgan.safetensors");
    CHECK_OK(checkpoint_write(path, list.tensor, list.from_real, list.n, &meta));
    tensor_list_free(&list);
    config_free(&meta);
    vqgan_free(v);
}

static inline void tiny_net(NetConfig *c, const Tiny *x, int t) {
    memset(c, 0, sizeof *c);
    size_t values = x->flip == 6 && t == 2 ? USED + 1 : USED;
    size_t room = x->flip == 4 && t == 2 ? N - 1 : N;
    int has_class = x->classes && !(x->flip == 5 && t == 2);
    c->kind = !x->joint && t == x->T ? NET_GPT : NET_X;
    c->variant = x->variant;
    c->n_scales = x->T;
    c->has_class = has_class;
    c->dim = 8;
    c->dec_num_tokens = values;
    c->dec_depth = c->dec_heads = 1;
    c->dec_max_seq_len = c->kind == NET_X ? room : room + (size_t)has_class;
    c->enc_num_tokens = values + 1, c->enc_depth = c->enc_heads = 1, c->enc_max_seq_len = room + 1 + (size_t)has_class;
    c->input_vocab_size = USED + 1, c->n_unmasked = has_class ? 2 : 0;
}

/* Random weights, large enough that the network has opinions. */
static inline void opinionated(Params *p, uint64_t seed) {
    params_init(p, seed);
    for (size_t r = 0; r < p->n; r++)
        for (size_t i = 0; i < p->row[r].size; i++)
            if (p->row[r].ndim > 1) p->row[r].value[i] = (real)(0.7 * rng_normal(seed, rng_stream(RNG_TEST, r, 1), i));
}

static inline void tiny_meta(Config *meta, const Tiny *x, const NetConfig *c, int t) {
    int second = t == 2;
    CHECK_OK(net_config_write(meta, c, "model.params."));
    CHECK_OK(config_set(meta, "model.params.n_scales", "%d", x->T + (second && x->flip == 1)));
    if (!x->joint) CHECK_OK(config_set(meta, "model.params.single_scale", "%d", second && x->flip == 3 ? 1 : t));
    CHECK_OK(config_set(meta, "model.params.redraw_prob", "geometric"));
    CHECK_OK(config_set(meta, "imagebart.h", "%d", SIDE));
    CHECK_OK(config_set(meta, "imagebart.w", "%d", SIDE));
    if (x->classes) CHECK_OK(config_set(meta, "imagebart.classes", "a,bee,bicycle"));
    if (x->null_class) CHECK_OK(config_set(meta, "imagebart.null_class", "%d", x->null_class));
}

/* One transition's file; seed: other weights. */
static inline void write_scale(const char *dir, const char *name, const Tiny *x, int t, uint64_t seed) {
    char path[600];
    NetConfig c;
    Transformer *net = NULL;
    Config meta = {0};
    TensorList list = {0};
    Schedule s;
    int64_t sos = 0;
    size_t rows = (size_t)x->T + 1 + (x->flip == 1 && t == 2), one = 1;
    tiny_net(&c, x, t);
    tiny_meta(&meta, x, &c, t);
    CHECK_OK(transformer_create(&net, &c));
    Params *p = transformer_params(net);
    CHECK_OK(params_plan(p, PLAN_VALUE | PLAN_EMA));
    opinionated(p, seed);
    if (x->flip == 7 && t == 2) p->row[p->n - 1].value[0] = NAN;
    for (size_t r = 0; r < p->n; r++)
        for (size_t i = 0; i < p->row[r].size; i++) p->row[r].ema[i] = -p->row[r].value[i];
    CHECK_OK(schedule_make(&s, x->flip == 2 && t == 2 ? "0.3" : "geometric", (int)rows - 1));
    CHECK_OK(tensor_list_params(&list, p, x->ema ? 'e' : 'v', "transformer.", DT_F32));
    CHECK_OK(tensor_list_add(&list, "alphats", DT_F32, 1, &rows, s.alpha, 0));
    CHECK_OK(tensor_list_add(&list, "alphacum", DT_F32, 1, &rows, s.alphacum, 0));
    CHECK_OK(tensor_list_add(&list, "sos_token", DT_I64, 1, &one, &sos, 0));
    tiny_path(path, dir, name);
    CHECK_OK(checkpoint_write(path, list.tensor, list.from_real, list.n, &meta));
    tensor_list_free(&list);
    config_free(&meta);
    transformer_free(net);
}

static const char *scratch; /* the test's temporary folder */

static inline const char *tiny_folder(char dir[512], const char *name, const Tiny *x) {
    char file[64];
    snprintf(dir, 512, "%s/%s", scratch, name);
    if (!CHECK(mkdir(dir, 0777) == 0)) return dir;
    write_vqgan(dir);
    if (x->joint) write_scale(dir, "joint.safetensors", x, 1, 100);
    for (int t = 1; !x->joint && t <= x->T; t++) {
        snprintf(file, sizeof file, "scale%d.safetensors", t);
        write_scale(dir, file, x, t, 100 + (uint64_t)t);
    }
    return dir;
}

/* ---- a batch of samples ---- */

enum { BATCH = 4 };

static inline Err model_sample(Model *m, const SampleOptions *o, int32_t *tokens) {
    const Chain c = model_chain(m);
    return sample_chain(&c, o, tokens);
}

static const int32_t batch_label[BATCH] = {2, 0, 1, 2};

static inline void batch_options(SampleOptions *o, const Model *m, size_t n, uint64_t first,
                                 void (*change)(SampleOptions *)) {
    sample_defaults(o);
    o->n = n, o->first = first, o->seed = 42;
    o->label = m->classes.n ? batch_label + first : NULL;
    if (change) change(o);
}

static inline void sample_into(Model *m, int32_t *tokens, size_t n, uint64_t first, void (*change)(SampleOptions *)) {
    SampleOptions o;
    batch_options(&o, m, n, first, change);
    CHECK_OK(model_sample(m, &o, tokens));
}

#endif
