/* decode.cu - decoding token by token, with the keys and values of earlier positions kept.
 *
 * Owns the order of the steps; each step is a pass of transformer.cu's stack over one new position, whose keys and
 * values join those that earlier passes left behind. Such a pass does two operations for every number that it reads, so
 * its speed is that of memory: linear layers stream their weights by (gemm_stream), once for the whole batch. */
#include "transformer.h"

/* ---- Decoding, one position at a time ---- */

/* n new positions of the decoder from pos on, for ids (B,n): logits of the last one, (B,K) in m->logits. Every new
 * position sees all that is there, itself and the other new ones included. */
static void decode_positions(Transformer *m, const int32_t *ids, size_t n, size_t pos, size_t i) {
    Stack *d = &m->decoder;
    Pass pass;
    pass.B = m->now_B, pass.n = n, pass.pos = pos, pass.stride = d->T, pass.causal = 0;
    pass.context = NULL, pass.T_context = m->config.kind == NET_X ? prompt_length(&m->config) + m->now_N : 0;
    stack_forward(m, d, ids, &pass, n - 1);
    head_forward(m, m->now_B, 1, i);
}

/* Keys and values of the context, for every cross-attention layer. */
static void cache_context(Transformer *m, size_t B, size_t positions) {
    for (size_t i = 0; i < m->decoder.n_layers; i++) {
        Layer *l = &m->decoder.layer[i];
        if (l->kind != BLOCK_CROSS) continue;
        project_keys(m, l, m->encoder.out, B, positions, 0, positions);
    }
}

/* The prompt of a GPT is fed without any mask, as the official sampler does: for a prompt (t, class) training must have
 * used n_unmasked = 2 to see the same (SPEC 2.6). */
Err transformer_decode_begin(Transformer *m, const int32_t *x_t, const int32_t *t, const int32_t *label, size_t B,
                             size_t N) {
    const NetConfig *c = &m->config;
    const size_t P = prompt_length(c);
    m->state = IDLE;
    if (m->B && m->train) return err("transformer: decoding under a training plan, which has no caches");
    TRY(check_batch(m, x_t, t, label, B, N));
    m->now_B = B, m->now_N = N, m->next = 0;
    if (c->kind == NET_X) {
        const Pass encode = whole_pass(&m->encoder, B, P + N, NULL, 0);
        prompted_ids(c, m->encoder.ids, t, label, x_t, N, B, N);
        stack_forward(m, &m->encoder, m->encoder.ids, &encode, 0);
        cache_context(m, B, P + N);
    } else {
        prompted_ids(c, m->decoder.ids, t, label, NULL, 0, B, 0);
        decode_positions(m, m->decoder.ids, P, 0, 0);
    }
    m->state = DECODING;
    return OK;
}

Err transformer_decode_step(Transformer *m, const int32_t *prev, size_t i, const real **logits) {
    const NetConfig *c = &m->config;
    if (m->state != DECODING) return err("transformer: a decoding step before decoding began");
    if (i != m->next || i >= m->now_N)
        return err("transformer: decoding step %zu, expected %zu of %zu", i, m->next, m->now_N);
    if (i > 0) TRY(check_ids("previous token", prev, m->now_B, 0, c->dec_num_tokens));
    int32_t *ids = m->decoder.ids;
    for (size_t b = 0; b < m->now_B; b++) ids[b] = i > 0 ? prev[b] : 0;
    if (c->kind == NET_X)
        decode_positions(m, ids, 1, i, i);
    else if (i > 0)
        decode_positions(m, ids, 1, prompt_length(c) - 1 + i, i); /* i = 0: begin has done it */
    m->next = i + 1;
    *logits = m->logits;
    return OK;
}
