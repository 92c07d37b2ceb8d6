/* sizes.c - the sizes in README.md's table of models, computed from their recipes; no weights are needed.
 *
 *   sizes      a line for each named model:
 *
 * name, picture side, scales, parameters of the first stage and of all scales (millions), the files' weights and their
 * moving average (GB), memory that drawing one picture takes with the scales' matrices as f32, bf16 and int8 (GiB), and
 * how long that takes (seconds), at the rates that doc/speed.md has for ffhq. */
#include "sampling/sampling.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    double vqgan, scales; /* parameters */
    double memory[3];     /* bytes, of the largest scale: weights and plan */
    double read;          /* numbers that are read for a picture: the decoders' matrices for every token */
    double once;          /* multiply-adds of what is done once: the encoders, their output's keys and values */
    size_t side, T;
} Sizes;

static Err measure_vqgan(Sizes *s, const char *recipe, size_t *grid) {
    Config config = {0};
    VqganConfig c;
    Vqgan *v;
    size_t plan;
    TRY(recipe_read(&config, recipe, RECIPE_VQGAN));
    TRY(vqgan_config_read(&c, &config, "model.params."));
    TRY(vqgan_create(&v, &c, 0));
    TRY(vqgan_plan_bytes(v, 1, c.resolution, c.resolution, 0, &plan));
    s->side = c.resolution, s->vqgan = (double)params_count(vqgan_params(v));
    for (int f = 0; f < 3; f++) s->memory[f] = s->vqgan * sizeof(real) + (double)plan;
    *grid = c.resolution >> (c.levels - 1);
    vqgan_free(v);
    config_free(&config);
    return OK;
}

/* A matrix is read for every token, or used once: the encoder's, and those for the keys and values of its output. */
static void count_work(Sizes *s, const Params *p, size_t tokens) {
    for (size_t i = 0; i < p->n; i++) {
        const char *name = p->row[i].name, *layer = strstr(name, "layers.layers.");
        const int cross = layer && atoi(layer + 14) % 3 == 1 && (strstr(name, "to_k") || strstr(name, "to_v"));
        const double n = (double)(p->row[i].matrix ? p->row[i].size : 0) * (double)tokens;
        if (strstr(name, "encoder.to_logits")) continue;
        if (cross || strncmp(name, "encoder.", 8) == 0)
            s->once += n;
        else
            s->read += n;
    }
}

/* *T: how many scales there are. most[f]: bytes of the largest scale in format f. */
static Err measure_scale(Sizes *s, const char *recipe, int t, size_t tokens, double most[3]) {
    static const WeightFormat formats[3] = {WEIGHTS_REAL, WEIGHTS_BF16, WEIGHTS_INT8};
    Config config = {0};
    NetConfig c;
    Transformer *net;
    TRY(recipe_read(&config, recipe, t));
    TRY(net_config_read(&c, &config, "model.params."));
    TRY(transformer_create(&net, &c));
    s->T = (size_t)c.n_scales, s->scales += (double)params_count(transformer_params(net));
    count_work(s, transformer_params(net), tokens);
    for (int f = 0; f < 3; f++) {
        size_t plan;
        transformer_params(net)->format = formats[f];
        TRY(transformer_plan_bytes(net, 1, tokens, 0, &plan));
        const double bytes = (double)(params_bytes(transformer_params(net), formats[f]) + plan);
        if (bytes > most[f]) most[f] = bytes;
    }
    transformer_free(net);
    config_free(&config);
    return OK;
}

static Err measure(const char *name) {
    static const double bytes[3] = {4, 2, 1}, read_rate[3] = {23e9, 26e9, 22e9}; /* bytes a second */
    static const double arithmetic[3] = {178e9, 132e9, 128e9};                   /* operations a second */
    static const double decoding = 0.75;                                         /* seconds of the first stage */
    Sizes s = {0};
    double most[3] = {0};
    char recipe[256];
    size_t grid;
    snprintf(recipe, sizeof recipe, "models/%s.txt", name);
    TRY(measure_vqgan(&s, recipe, &grid));
    s.T = 1;
    for (size_t t = 1; t <= s.T; t++) TRY(measure_scale(&s, recipe, (int)t, grid * grid, most));
    const double disk = 4 * ((double)s.T * s.vqgan + 2 * s.scales);
    printf("%s %zu %zu %.1f %.1f %.1f", name, s.side, s.T, s.vqgan / 1e6, s.scales / 1e6, disk / 1e9);
    for (int f = 0; f < 3; f++) printf(" %.2f", (s.memory[f] + most[f]) / (1 << 30));
    for (int f = 0; f < 3; f++)
        printf(" %.1f", bytes[f] * s.read / read_rate[f] + 2 * s.once / arithmetic[f] + decoding);
    printf("\n");
    return OK;
}

int main(void) {
    size_t n;
    const NamedModel *m = named_models(&n);
    for (size_t i = 0; i < n; i++)
        if (measure(m[i].name) != OK) return fprintf(stderr, "sizes: %s\n", err_text()), 1;
    return 0;
}
