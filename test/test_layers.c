/* test_layers.c [LAYER...]: every layer by name. Its plain loop is the definition: the gradients of that are compared with
 * central differences (in double), its faster fellows with it: the CPU's to 1e-5 (1e-12 in double), a GPU's to 1e-4, in
 * bf16 to 2e-2 of the largest number. Sizes differ from one another, so that one taken for another shows.
 *
 *     make check                    lists the layers
 *     make check LAYER=group_norm   checks those whose name begins so */
#include "imagebart.h"

#include "layers.h"

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

static const Layer layers[] = {
    {"conv", "kind B C M h w accumulate add", conv_describe, conv_scratch, conv_run, NULL,
     CASES({CONV1, 2, 5, 3, 7, 9, 0, 1}, {CONV3, 2, 3, 5, 7, 9, 1, 0}, {CONV3, 1, 1, 1, 1, 1, 0, 1},
           {CONV3, 1, 17, 19, 4, 6, 1, 1}, {CONV_DOWN, 2, 3, 5, 6, 4, 0, 0}, {CONV_UP, 2, 5, 3, 3, 4, 1, 0}),
     BY(conv_forward)},
};

/* ---- All of them ---- */

static void check_layer(const Layer *l) {
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

int main(int argc, char **argv) {
    const size_t n = sizeof layers / sizeof *layers;
    if (argc > 1 && !strcmp(argv[1], "--list")) {
        for (size_t i = 0; i < n; i++) printf("%s\n", layers[i].name);
        return 0;
    }
    for (size_t i = 0; i < n; i++) {
        int wanted = argc == 1;
        for (int k = 1; k < argc; k++) wanted |= !strncmp(layers[i].name, argv[k], strlen(argv[k]));
        if (wanted) check_layer(&layers[i]);
    }
    return test_report();
}
