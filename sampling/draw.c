/* draw.c - new pictures, a batch at a time: the tokens of each are the chain's (diffusion.c). Of the M that are drawn for
 * a picture, one is kept that the model itself finds likely. Whoever watches is told of every pass, scale and batch, and
 * may end the work at any pass; what is drawn does not depend on it. */
#include "sampling/sampling.h"

#include <stdlib.h>
#include <string.h>

static const double NEARLY = 0.5; /* nats per token: bounds of good pictures differ by less, of bad ones by more */

size_t draw_rows(size_t n, size_t batch, size_t M) {
    return max_size(1, min_size(n, batch / M)) * M;
}

/* One class for all, or every picture its own drawn at random. */
Err draw_classes(int32_t **label, const Model *m, const char *name, uint64_t seed, uint64_t first, size_t n) {
    int32_t one = -1;
    *label = NULL;
    if (name) TRY(model_class(m, name, &one));
    if (m->classes.n == 0) return OK;
    TRY(mem_alloc(label, n, sizeof **label, "classes"));
    for (size_t b = 0; b < n; b++)
        (*label)[b] =
            one >= 0 ? one : (int32_t)rng_below(seed, rng_stream(RNG_START, 1, first + b), 0, (uint32_t)m->classes.n);
    return OK;
}

/* ---- The chain of a batch ---- */

static int on_pass(void *context, int t, size_t repeat, size_t done, size_t of) {
    const Draw *d = (const Draw *)context;
    return d->watch.progress ? d->watch.progress(d->watch.context, &d->batch, t, repeat, done, of) : 0;
}

/* tokens = x_{t-1} of a batch, when scale t is done: a column of the picture of the chain. */
static void on_scale(void *context, int t, const int32_t *tokens) {
    Draw *d = (Draw *)context;
    const size_t steps = (size_t)d->model->schedule.T + 1;
    const size_t column = steps - (size_t)t; /* t = T+1: x_T, column 0 */
    for (size_t b = 0; d->chain && b < d->options.n; b++)
        memcpy(d->drawn_chain + (b * steps + column) * d->N, tokens + b * d->N, d->N * sizeof *tokens);
    if (d->watch.scale_done) d->watch.scale_done(d->watch.context, &d->batch, t, tokens);
}

/* The model's network of scale t, unless the work is to stop. */
static Err network(void *context, int t, Transformer **net) {
    const Draw *d = (const Draw *)context;
    if (d->watch.stopped && d->watch.stopped(d->watch.context)) return err("drawing was stopped");
    return d->chain_of_model.network(d->chain_of_model.context, t, net);
}

Chain draw_chain(Draw *d) {
    Chain chain = d->chain_of_model = model_chain(d->model);
    chain.network = network;
    chain.context = d;
    return chain;
}

/* Draws M times the pictures of the batch. */
static Err draw_batch(Draw *d) {
    const Chain chain = draw_chain(d);
    for (size_t b = 0; d->label && b < d->batch.count * d->M; b++) d->drawn_label[b] = d->label[d->batch.at + b / d->M];
    d->options.first = (d->first + d->batch.at) * d->M;
    d->options.n = d->batch.count * d->M;
    d->options.label = d->label ? d->drawn_label : NULL;
    if (d->known) d->options.known = d->known_rows, d->options.keep = d->keep, d->options.candidates = d->M;
    return sample_chain(&chain, &d->options, d->drawn);
}

/* ---- The best of M ---- */

/* Of the M bounds of a picture, the first that is nearly the least: among good pictures the least would be the
 * simplest, and the same again and again. */
static size_t first_good(const double *bound, size_t M) {
    size_t least = 0, first = 0;
    for (size_t j = 1; j < M; j++)
        if (bound[j] < bound[least]) least = j;
    while (bound[first] > bound[least] + NEARLY) first++;
    return first;
}

/* Of the M that are drawn for each picture of the batch, one becomes it. */
static Err keep_best(Draw *d) {
    const size_t M = d->M, N = d->N, chain_N = ((size_t)d->model->schedule.T + 1) * N;
    const Chain chain = draw_chain(d);
    if (M > 1 || d->with_bounds)
        TRY(picture_guesses(&chain, d->drawn, d->options.label, d->batch.count * M, d->options.seed, d->drawn_bound,
                            d->drawn_entropy));
    for (size_t b = 0; b < d->batch.count; b++) {
        const size_t to = d->batch.at + b, from = b * M + (M > 1 ? first_good(d->drawn_bound + b * M, M) : 0);
        memcpy(d->tokens + to * N, d->drawn + from * N, N * sizeof *d->tokens);
        if (d->chain) memcpy(d->chain + to * chain_N, d->drawn_chain + from * chain_N, chain_N * sizeof *d->chain);
        if (!d->with_bounds) continue;
        d->bound[to] = d->drawn_bound[from];
        memcpy(d->entropy + to * N, d->drawn_entropy + from * N, N * sizeof *d->entropy);
    }
    return OK;
}

/* Of the candidates for each picture of the batch, the first is the one that sample_chain chose. */
static Err take_chosen(Draw *d) {
    const size_t M = d->M, N = d->N, chain_N = ((size_t)d->model->schedule.T + 1) * N;
    const Chain chain = draw_chain(d);
    const size_t at = d->batch.at, count = d->batch.count;
    for (size_t b = 0; b < count; b++) {
        memcpy(d->tokens + (at + b) * N, d->drawn + b * M * N, N * sizeof *d->tokens);
        if (d->chain)
            memcpy(d->chain + (at + b) * chain_N, d->drawn_chain + b * M * chain_N, chain_N * sizeof *d->chain);
    }
    if (!d->with_bounds) return OK;
    TRY(picture_guesses(&chain, d->tokens + at * N, d->label ? d->label + at : NULL, count, d->options.seed,
                        d->bound + at, d->entropy + at * N));
    for (size_t i = 0; i < count * N; i++)
        if (d->keep[i % N]) d->entropy[at * N + i] = 0;
    return OK;
}

/* ---- The whole ---- */

static Err draw_buffers(Draw *d) {
    const size_t bytes = d->N * sizeof *d->tokens, steps = (size_t)d->model->schedule.T + 1;
    TRY(mem_alloc(&d->tokens, d->n, bytes, "tokens"));
    TRY(mem_alloc(&d->drawn, d->rows, bytes, "tokens of a batch"));
    TRY(mem_alloc(&d->drawn_label, d->rows, sizeof *d->drawn_label, "classes of a batch"));
    TRY(mem_alloc(&d->drawn_bound, d->rows, sizeof *d->drawn_bound, "bounds of a batch"));
    if (d->known) {
        TRY(mem_alloc(&d->known_rows, d->rows, bytes, "known tokens"));
        for (size_t b = 0; b < d->rows; b++) memcpy(d->known_rows + b * d->N, d->known, bytes);
    }
    if (d->with_chain) TRY(mem_alloc(&d->chain, d->n, steps * bytes, "tokens of every scale"));
    if (d->with_chain) TRY(mem_alloc(&d->drawn_chain, d->rows, steps * bytes, "tokens of every scale"));
    if (!d->with_bounds) return OK;
    TRY(mem_alloc(&d->bound, d->n, sizeof *d->bound, "bounds"));
    TRY(mem_alloc(&d->entropy, d->n, d->N * sizeof *d->entropy, "entropies"));
    return mem_alloc(&d->drawn_entropy, d->rows, d->N * sizeof *d->drawn_entropy, "entropies of a batch");
}

Err draw_pictures(Draw *d) {
    const size_t at_once = d->rows / d->M;
    d->N = d->model->h * d->model->w;
    TRY(draw_buffers(d));
    d->options.progress = on_pass;
    d->options.scale_done = on_scale;
    d->options.context = d;
    for (size_t at = 0; at < d->n; at += at_once) {
        d->batch = (DrawBatch){at, min_size(at_once, d->n - at), d->M, &d->options};
        TRY(draw_batch(d));
        TRY(d->known ? take_chosen(d) : keep_best(d));
        if (d->watch.drawn) TRY(d->watch.drawn(d->watch.context, &d->batch));
    }
    return OK;
}

void draw_free(Draw *d) {
    void *buffers[] = {d->tokens,      d->chain,       d->bound,       d->entropy,       d->drawn,     d->label,
                       d->drawn_label, d->drawn_chain, d->drawn_bound, d->drawn_entropy, d->known_rows};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
}
