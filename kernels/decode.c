/* decode.c - decoding, with the keys and values of earlier positions kept.
 *
 * Owns the order of the steps; each is a pass of transformer.cu's stack over a block of cells, new positions of any
 * batch rows, whose keys and values join those that earlier passes left behind. A pass over one position a row does two
 * operations for every number that it reads, so its speed is that of memory: linear layers stream their weights by
 * (gemm_stream), once for the whole block. Further cells are therefore cheap, and worth feeding whenever the tokens in
 * front of them are known or likely: a guess that turns out wrong is taken back by feeding its position once more.
 *
 * Promise on bits: the logits of a cell are those of feeding one position at a time, whatever is fed beside it. Every
 * layer works row by row; gemm_stream and attention keep the bits of a row alone. */
#include "kernels/transformer.h"

/* ---- A pass ---- */

/* The n cells of m->cell with the tokens in decoder.ids, through the decoder. Keys and values of all cells are there
 * before a layer's attention reads them, so a cell sees those before it in the same block. */
static void feed_cells(Transformer *m, size_t n) {
    Stack *d = &m->decoder;
    Pass pass;
    pass.B = 1, pass.n = n, pass.cell = m->cell, pass.stride = d->T, pass.causal = 0;
    pass.context = NULL, pass.T_context = m->config.kind == NET_X ? prompt_length(&m->config) + m->now_N : 0;
    stack_forward(m, d, d->ids, &pass, 0);
}

/* Keys and values of the context, for every cross-attention layer. */
static void cache_context(Transformer *m, size_t B, size_t positions) {
    Pass pass;
    memset(&pass, 0, sizeof pass);
    pass.B = B, pass.T_context = positions;
    for (size_t i = 0; i < m->decoder.n_layers; i++) {
        Layer *l = &m->decoder.layer[i];
        if (l->kind != BLOCK_CROSS) continue;
        const AttendShape shape = attend_shape(m, &m->decoder, l, &pass);
        project_keys(m, l, &shape, m->encoder.out, positions);
    }
}

/* The prompt of a GPT is fed without any mask, as the official sampler does: for a prompt (t, class) training must have
 * used n_unmasked = 2 to see the same (SPEC 2.6). */
static void feed_prompt(Transformer *m, const int32_t *t, const int32_t *label) {
    const size_t P = prompt_length(&m->config), n = m->now_B * P;
    prompted_ids(&m->config, m->decoder.ids, t, label, NULL, 0, m->now_B, 0);
    for (size_t r = 0; r < n; r++) {
        const Cell cell = {r / P, r % P, P};
        m->cell[r] = cell;
    }
    feed_cells(m, n);
}

/* ---- Decoding ---- */

Err transformer_decode_begin(Transformer *m, const int32_t *x_t, const int32_t *t, const int32_t *label, size_t B,
                             size_t N) {
    const NetConfig *c = &m->config;
    const size_t P = prompt_length(c);
    m->state = IDLE;
    if (m->B && m->train) return err("transformer: decoding under a training plan, which has no caches");
    TRY(check_batch(m, x_t, t, label, B, N));
    m->now_B = B, m->now_N = N;
    memset(m->fed, 0, B * sizeof *m->fed);
    if (m->params.device) {
        if (c->kind == NET_X)
            prompted_ids(c, m->encoder.ids, t, label, x_t, N, B, N);
        else
            prompted_ids(c, m->decoder.ids, t, label, NULL, 0, B, 0);
        TRY(m->params.ops->decode_begin(m));
        m->state = DECODING;
    } else if (c->kind == NET_X) {
        const Pass encode = whole_pass(&m->encoder, B, P + N, NULL, 0);
        prompted_ids(c, m->encoder.ids, t, label, x_t, N, B, N);
        stack_forward(m, &m->encoder, m->encoder.ids, &encode, 0);
        cache_context(m, B, P + N);
        memset(m->first, 0, B * sizeof *m->first); /* sos (SPEC 1.10) */
        m->state = DECODING;
    } else {
        memcpy(m->first, c->has_class ? label : t, B * sizeof *m->first);
        m->state = DECODING; /* what streams does so in the prompt, too */
        feed_prompt(m, t, label);
    }
    return OK;
}

/* Cell r of the next pass: position i of row b, behind the token prev. Position 0 of a GPT is the end of its prompt,
 * fed a second time to the same effect. */
static void set_cell(Transformer *m, size_t r, size_t b, size_t i, int32_t prev) {
    const size_t pos = m->config.kind == NET_X ? i : prompt_length(&m->config) - 1 + i;
    const Cell cell = {b, pos, pos + 1};
    m->cell[r] = cell;
    m->decoder.ids[r] = i > 0 ? prev : m->first[b];
    m->fed[b] = i + 1;
}

static Err check_cells(const Transformer *m, const DecodeCell *cell, size_t n) {
    if (m->state != DECODING) return err("transformer: a block of positions before decoding began");
    if (n < 1 || n > m->now_B * DECODE_BLOCK)
        return err("transformer: a block of %zu positions, expected 1..%zu", n, m->now_B * DECODE_BLOCK);
    for (size_t r = 0; r < n; r++) {
        const size_t b = cell[r].b, i = cell[r].i;
        const int same_row = r > 0 && cell[r - 1].b == b;
        if (b >= m->now_B || (r > 0 && b < cell[r - 1].b))
            return err("transformer: row %zu of a batch of %zu, expected rows that rise", b, m->now_B);
        if (i >= m->now_N || (same_row ? i != cell[r - 1].i + 1 : i > m->fed[b]))
            return err("transformer: decoding position %zu of row %zu, expected %s%zu of %zu", i, b,
                       same_row ? "" : "0..", same_row ? cell[r - 1].i + 1 : m->fed[b], m->now_N);
        if (i > 0) TRY(check_ids("previous token", &cell[r].prev, 1, 0, m->config.dec_num_tokens));
    }
    return OK;
}

Err transformer_decode_block(Transformer *m, const DecodeCell *cell, size_t n, const real **logits) {
    TRY(check_cells(m, cell, n));
    if (m->params.device) return err("transformer: a block of positions, which the GPU's decoding does not have");
    for (size_t r = 0; r < n; r++) set_cell(m, r, cell[r].b, cell[r].i, cell[r].prev);
    feed_cells(m, n);
    head_forward(m, 1, n, m->cell);
    *logits = m->logits;
    return OK;
}

/* On a GPU nothing is taken back: positions come in order. */
static Err step_on_device(Transformer *m, const int32_t *prev, size_t i) {
    if (i != m->fed[0]) return err("transformer: decoding step %zu on the GPU, expected %zu", i, m->fed[0]);
    for (size_t b = 0; b < m->now_B; b++) m->decoder.ids[b] = i > 0 ? prev[b] : 0, m->fed[b] = i + 1;
    return m->params.ops->decode_step(m, i);
}

Err transformer_decode_step(Transformer *m, const int32_t *prev, size_t i, const real **logits) {
    if (m->state != DECODING) return err("transformer: a decoding step before decoding began");
    for (size_t b = 0; b < m->now_B; b++)
        if (i > m->fed[b] || i >= m->now_N)
            return err("transformer: decoding step %zu, expected 0..%zu of %zu", i, m->fed[b], m->now_N);
    if (i > 0) TRY(check_ids("previous token", prev, m->now_B, 0, m->config.dec_num_tokens));
    *logits = m->logits;
    if (m->params.device) return step_on_device(m, prev, i);
    for (size_t b = 0; b < m->now_B; b++) set_cell(m, b, b, i, i > 0 ? prev[b] : 0);
    feed_cells(m, m->now_B);
    head_forward(m, 1, m->now_B, m->cell);
    return OK;
}

DecodeReads transformer_decode_reads(const Transformer *m, size_t N) {
    const double number = m->format == WEIGHTS_REAL ? sizeof(real) : sizeof(uint16_t); /* of keys and values */
    DecodeReads r = {0, 0, 0};
    for (size_t i = 0; i < m->decoder.n_layers; i++) {
        const Layer *l = &m->decoder.layer[i];
        const Linear *const linear[] = {&l->q, &l->out, &l->up, &l->down, &l->k, &l->v};
        const size_t used = l->kind == BLOCK_CROSS ? 4 : 6; /* the context's keys and values are there already */
        for (size_t k = 0; k < used; k++) {
            const double numbers = (double)linear[k]->in * (double)linear[k]->out;
            const Param *p = numbers > 0 ? &m->params.row[linear[k]->weight] : NULL;
            r.numbers += numbers;
            r.weight_bytes += p ? numbers * (double)weight_bytes(p->packed.data ? p->packed.format : WEIGHTS_REAL) : 0;
        }
        r.kept_bytes += 2 * (double)l->heads * (double)l->D * (double)N * number * (l->kind == BLOCK_CROSS ? 1 : 0.5);
    }
    return r;
}

Err transformer_draw_cuda(Transformer *m, const DrawOptions *o, int32_t *tokens) {
    if (!m->params.device) return err("transformer: it is not on the GPU");
    if (m->state != DECODING || m->fed[0] != 0) return err("transformer: drawing without decoding just begun");
    if (!(o->temperature >= 0)) return err("transformer: temperature %g, expected 0 or more", o->temperature);
    if (!o->known != !o->keep) return err("transformer: known tokens and their mask go together");
    if (o->guided && m->now_B % 2) return err("transformer: a batch of %zu rows, expected pairs", m->now_B);
    for (size_t i = 0; o->known && i < (o->guided ? m->now_B / 2 : m->now_B) * m->now_N; i++)
        if (o->keep[i % m->now_N]) TRY(check_ids("known token", o->known + i, 1, 0, m->config.dec_num_tokens));
    for (size_t b = 0; b < m->now_B; b++) m->fed[b] = m->now_N;
    return m->params.ops->draw(m, o, tokens);
}
