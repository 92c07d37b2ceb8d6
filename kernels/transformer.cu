/* transformer.cu - the transformers on a GPU: what they keep there, and their walk. */
#include "kernels/transformer.h"

/* ---- The twins: what the network keeps on the GPU ---- */

/* As Layer and Stack. float: the residual stream, statistics, gradients that several readers add to. */
typedef struct {
    float *x, *mean, *rstd;
    floatX *normed, *query, *y, *key, *value;
    float *lse; /* (B,heads,n) of attention; NULL: not kept */
    floatX *g, *dg;
} LayerTwin;

typedef struct {
    LayerTwin *layer;
    int32_t *ids;
    float *x_end, *end_mean, *end_rstd;
    floatX *out;
} StackTwin;

/* What a pass draws by, in memory of the GPU, where the steps that a graph repeats find it */
typedef struct {
    uint64_t seed;
    double temperature;
    size_t top_k;
    int forced, fitted, guided;
    float guidance;
} DrawTwin;

struct NetTwin {
    Device *d;
    void *arena;
    StackTwin encoder, decoder;
    float *raw, *logits; /* (B,N,K), may be one */
    float *dx, *dnormed, *dcontext, *partial, *delta, *row_sum;
    floatX *dx_copy; /* dx as matrix products read it; the same memory when floatX is float */
    floatX *draw, *dquery, *dkey, *dvalue, *dy, *dh;
    int32_t *x0, *x, *x_t, *t; /* (B,N) x3, (B): what the loss reads */
    float *hard, *soft;        /* (B,N) */
    /* decoding: decode.cu */
    int streaming;               /* few rows: the kernels of decode.cu */
    int *pos;                    /* of the next position */
    floatX *new_key, *new_value; /* (B*prompt,inner) */
    DrawTwin *how;
    size_t samples;   /* rows of the batch, or half of them if guided */
    uint64_t *stream; /* (B) */
    double *fit;      /* (B) */
    int32_t *known, *tokens;
    uint8_t *keep;
};

static float *take_floats(Arena *a, size_t n1, size_t n2) {
    return (float *)take_bytes(a, n1, n2, 1, sizeof(float));
}
static floatX *take_x(Arena *a, size_t n1, size_t n2) {
    return (floatX *)take_bytes(a, n1, n2, 1, sizeof(floatX));
}
static int32_t *take_ids(Arena *a, size_t n1, size_t n2) {
    return (int32_t *)take_bytes(a, n1, n2, 1, sizeof(int32_t));
}

/* As plan_layer_training: R = B*T rows of queries, keys of Tk positions. With `shared`, buffers that all layers take
 * turns in, only the caches of decoding are the layer's own. */
static void plan_layer_twin(Arena *a, LayerTwin *w, const Layer *l, const LayerTwin *shared, size_t B, size_t T,
                            size_t Tk, size_t C, int cache) {
    const size_t R = B * T, inner = l->heads * l->D;
    if (shared)
        *w = *shared;
    else {
        w->x = take_floats(a, R, C), w->mean = take_floats(a, R, 1), w->rstd = take_floats(a, R, 1);
        w->normed = take_x(a, R, C);
    }
    if (l->kind == BLOCK_FEED) {
        if (!shared) w->g = take_x(a, R, FEED_FACTOR * C), w->dg = take_x(a, R, FEED_FACTOR * C);
        return;
    }
    if (!shared) w->query = take_x(a, R, inner), w->y = take_x(a, R, inner), w->lse = take_floats(a, R, l->heads);
    if (!shared || cache) w->key = take_x(a, B * Tk, inner), w->value = take_x(a, B * Tk, inner);
}

static void plan_stack_twin(Arena *a, StackTwin *w, const Stack *s, const LayerTwin *shared, size_t B,
                            size_t T_context) {
    const size_t R = B * s->T;
    w->ids = take_ids(a, R, 1);
    for (size_t i = 0; i < s->n_layers; i++)
        plan_layer_twin(a, &w->layer[i], &s->layer[i], shared, B, s->T,
                        s->layer[i].kind == BLOCK_CROSS ? T_context : s->T, s->C, s->causal);
    w->x_end = shared ? shared->x : take_floats(a, R, s->C);
    w->end_mean = shared ? shared->mean : take_floats(a, R, 1);
    w->end_rstd = shared ? shared->rstd : take_floats(a, R, 1);
    w->out = take_x(a, R, s->C);
}

static void plan_training_twin(Arena *a, NetTwin *w, const Transformer *m, size_t R, size_t inner) {
    const NetConfig *c = &m->config;
    const size_t C = c->dim, K = c->dec_num_tokens, rows = m->B * m->N;
    w->dx = take_floats(a, R, C), w->dnormed = take_floats(a, R, C), w->dcontext = take_floats(a, R, C);
    w->dx_copy = IS_BF16 ? take_x(a, R, C) : (floatX *)(void *)w->dx;
    w->draw = take_x(a, rows, K), w->row_sum = take_floats(a, rows, 1);
    w->dquery = take_x(a, R, inner), w->dkey = take_x(a, R, inner), w->dvalue = take_x(a, R, inner);
    w->dy = take_x(a, R, inner), w->dh = take_x(a, R, FEED_FACTOR * C);
    w->delta = take_floats(a, R, max_size(c->enc_heads, c->dec_heads));
    w->partial = take_floats(a, partial_floats(R, max_size(FEED_FACTOR * C, max_size(K, inner)), 1), 1);
}

static void plan_decoding_twin(Arena *a, NetTwin *w, const Transformer *m, size_t inner);

static void plan_twin(Arena *a, NetTwin *w, const Transformer *m) {
    const NetConfig *c = &m->config;
    const Stack *e = &m->encoder, *d = &m->decoder;
    const size_t B = m->B, C = c->dim, T = max_size(e->T, d->T), R = B * T, inner = widest_inner(m), rows = B * m->N;
    LayerTwin shared;
    memset(&shared, 0, sizeof shared);
    if (!m->train) {
        shared.x = take_floats(a, R, C), shared.mean = take_floats(a, R, 1), shared.rstd = take_floats(a, R, 1);
        shared.normed = take_x(a, R, C), shared.query = take_x(a, R, inner), shared.y = take_x(a, R, inner);
        shared.key = take_x(a, R, inner), shared.value = take_x(a, R, inner), shared.g = take_x(a, R, FEED_FACTOR * C);
    }
    if (c->kind == NET_X) plan_stack_twin(a, &w->encoder, e, m->train ? NULL : &shared, B, 0);
    plan_stack_twin(a, &w->decoder, d, m->train ? NULL : &shared, B, e->T);
    w->raw = take_floats(a, rows, c->dec_num_tokens);
    w->logits = is_scaled(c) || is_residual(c) ? take_floats(a, rows, c->dec_num_tokens) : w->raw;
    w->x0 = take_ids(a, rows, 1), w->x = take_ids(a, rows, 1), w->x_t = take_ids(a, rows, 1), w->t = take_ids(a, B, 1);
    w->hard = take_floats(a, rows, 1), w->soft = take_floats(a, rows, 1);
    if (m->train)
        plan_training_twin(a, w, m, R, inner);
    else
        plan_decoding_twin(a, w, m, inner);
}

static void free_twin(Transformer *m) {
    NetTwin *w = m->twin;
    if (!w) return;
    device_free(w->arena);
    free(w->encoder.layer);
    free(w->decoder.layer);
    free(w);
    m->twin = NULL;
}

/* Frees what there is; then `bytes` gets what a plan of m->B x m->N takes, or it is made. Neither: only frees. */
static Err plan_cuda(Transformer *m, int allocate, size_t *bytes) {
    Arena a = {NULL, 0, 0};
    NetTwin *w;
    free_twin(m);
    if (!allocate && !bytes) return OK;
    TRY(mem_alloc(&m->twin, 1, sizeof *m->twin, "the network's twin"));
    w = m->twin;
    w->d = m->params.device;
    TRY(mem_alloc(&w->encoder.layer, m->encoder.n_layers, sizeof(LayerTwin), "layers"));
    TRY(mem_alloc(&w->decoder.layer, m->decoder.n_layers, sizeof(LayerTwin), "layers"));
    plan_twin(&a, w, m);
    if (a.overflow) return err("transformer: a batch of %zu x %zu tokens is too large", m->B, m->N);
    if (bytes) *bytes = a.bytes;
    if (!allocate) return free_twin(m), OK;
    TRY(device_alloc(&w->arena, a.bytes, "activations of the transformer"));
    a.base = (char *)w->arena, a.bytes = 0;
    plan_twin(&a, w, m);
    return OK;
}

/* ---- The twins of blocks and stacks ---- */

/* decode.cu: the same blocks, norm included, for the few rows of a decoding step */
static Err attention_stream(Transformer *m, const Layer *l, LayerTwin *w, float *next, const AttendShape *shape);
static Err feed_stream(Transformer *m, const Layer *l, LayerTwin *w, float *next, size_t R);
static Err head_stream(Transformer *m, size_t R);

/* context: of cross-attention, NULL when its keys and values are in place */
static Err attention_forward_cuda(Transformer *m, const Stack *s, const Layer *l, LayerTwin *w, float *next,
                                  const Pass *pass, const floatX *context) {
    Device *d = m->twin->d;
    const size_t R = pass->B * pass->n;
    const AttendShape shape = attend_shape(m, s, l, pass);
    const floatX *source = l->kind == BLOCK_SELF ? w->normed : context;
    const size_t rows = l->kind == BLOCK_SELF ? R : pass->B * pass->T_context;
    if (m->twin->streaming) return attention_stream(m, l, w, next, &shape);
    const int decoding = m->state == DECODING, cached = decoding && l->kind == BLOCK_SELF;
    TRY(linear_forward_cuda(d, &l->q, w->query, 0, NULL, w->normed, R));
    if (source) {
        TRY(linear_forward_cuda(d, &l->k, cached ? m->twin->new_key : w->key, 0, NULL, source, rows));
        TRY(linear_forward_cuda(d, &l->v, cached ? m->twin->new_value : w->value, 0, NULL, source, rows));
    }
    if (decoding)
        TRY(attend_decode_cuda(d, &shape, cached ? m->twin->pos : NULL, w->y, w->query, w->key, w->value,
                               m->twin->new_key, m->twin->new_value));
    else
        TRY(attend_forward_cuda(d, &shape, w->y, w->lse, w->query, w->key, w->value));
    return linear_forward_cuda(d, &l->out, next, 1, w->x, w->y, R);
}

static Err attention_backward_cuda(Transformer *m, const Stack *s, const Layer *l, const LayerTwin *w, float *dcontext,
                                   const Pass *pass, const floatX *context) {
    NetTwin *n = m->twin;
    Device *d = n->d;
    const size_t R = pass->B * pass->n;
    const AttendShape shape = attend_shape(m, s, l, pass);
    const int cross = l->kind == BLOCK_CROSS;
    float *dsource = cross ? dcontext : n->dnormed;
    const floatX *source = cross ? context : w->normed;
    TRY(linear_backward_cuda(d, &l->out, n->dy, 0, 0, n->dx_copy, w->y, n->partial, R));
    TRY(attend_backward_cuda(d, &shape, n->dquery, n->dkey, n->dvalue, n->dy, w->y, w->lse, n->delta, w->query, w->key,
                             w->value));
    TRY(linear_backward_cuda(d, &l->q, n->dnormed, 1, 0, n->dquery, w->normed, n->partial, R));
    TRY(linear_backward_cuda(d, &l->k, dsource, 1, 1, n->dkey, source, n->partial, shape.B * shape.Tk));
    return linear_backward_cuda(d, &l->v, dsource, 1, 1, n->dvalue, source, n->partial, shape.B * shape.Tk);
}

static Err feed_forward_cuda(Transformer *m, const Layer *l, LayerTwin *w, float *next, size_t R) {
    Device *d = m->twin->d;
    Linear up = l->up;
    up.bias = NO_ROW; /* GELU adds it */
    if (m->twin->streaming) return feed_stream(m, l, w, next, R);
    TRY(linear_forward_cuda(d, &up, w->g, 0, NULL, w->normed, R));
    TRY(gelu_forward_cuda(d, w->g, w->dg, d->row[l->up.bias].value, R, l->up.out));
    return linear_forward_cuda(d, &l->down, next, 1, w->x, w->g, R);
}

static Err feed_forward_backward_cuda(Transformer *m, const Layer *l, const LayerTwin *w, size_t R) {
    NetTwin *n = m->twin;
    TRY(linear_backward_cuda(n->d, &l->down, n->dh, 0, 0, n->dx_copy, w->g, n->partial, R));
    TRY(gelu_backward_cuda(n->d, n->dh, w->dg, R, l->up.out));
    return linear_backward_cuda(n->d, &l->up, n->dnormed, 1, 0, n->dh, w->normed, n->partial, R);
}

/* As stack_forward; while decoding, positions begin at *at. */
static Err stack_forward_cuda(Transformer *m, const Stack *s, StackTwin *w, const Pass *pass, const floatX *context,
                              size_t skip, const int *at) {
    Device *d = m->twin->d;
    const size_t R = pass->B * pass->n;
    TRY(embed_forward_cuda(d, s, w->layer[0].x, w->ids, pass->B, pass->n, at));
    for (size_t i = 0; i < s->n_layers; i++) {
        const Layer *l = &s->layer[i];
        LayerTwin *k = &w->layer[i];
        float *next = i + 1 < s->n_layers ? w->layer[i + 1].x : w->x_end;
        if (!m->twin->streaming) TRY(norm_forward_cuda(d, &l->norm, k->normed, k->mean, k->rstd, k->x, R, pass->n, 0));
        if (l->kind == BLOCK_FEED)
            TRY(feed_forward_cuda(m, l, k, next, R));
        else
            TRY(attention_forward_cuda(m, s, l, k, next, pass, context));
    }
    if (m->twin->streaming) return OK; /* the head's kernel begins with the norm */
    return norm_forward_cuda(d, &s->norm, w->out, w->end_mean, w->end_rstd, w->x_end, pass->B * (pass->n - skip),
                             pass->n, skip);
}

/* values: rows of the table that embeds the stack's tokens */
static Err stack_backward_cuda(Transformer *m, const Stack *s, const StackTwin *w, const float *dout, float *dcontext,
                               const Pass *pass, const floatX *context, size_t skip) {
    NetTwin *n = m->twin;
    Device *d = n->d;
    const size_t R = pass->B * pass->n;
    TRY(device_zero(d, n->dx, R * s->C * sizeof *n->dx));
    if (IS_BF16) TRY(device_zero(d, n->dx_copy, R * s->C * sizeof *n->dx_copy));
    TRY(norm_backward_cuda(d, &s->norm, n->dx, n->dx_copy, dout, w->x_end, w->end_mean, w->end_rstd, n->partial,
                           pass->B * (pass->n - skip), pass->n, skip));
    for (size_t i = s->n_layers; i-- > 0;) {
        const Layer *l = &s->layer[i];
        const LayerTwin *k = &w->layer[i];
        if (l->kind == BLOCK_FEED)
            TRY(feed_forward_backward_cuda(m, l, k, R));
        else
            TRY(attention_backward_cuda(m, s, l, k, dcontext, pass, context));
        TRY(norm_backward_cuda(d, &l->norm, n->dx, n->dx_copy, n->dnormed, k->x, k->mean, k->rstd, n->partial, R,
                               pass->n, 0));
        params_ready(&m->params, first_row(l));
    }
    return embed_backward_cuda(d, s, n->dx, w->ids, pass->B, pass->n, m->params.row[s->token_emb].dim[0]);
}

/* ---- The twin of the head's variants ---- */

/* What they do to a row of raw logits: l = raw * scale + different, and `same` where the token is x_t's. */
typedef struct {
    const float *log_scalors; /* NULL: unscaled */
    int fine, residual;
    size_t length; /* positions in a row of log_scalors when fine */
    float alpha[MAX_SCALES + 1];
} Variant;

static Variant variant_of(const Transformer *m) {
    const NetConfig *c = &m->config;
    Variant v;
    memset(&v, 0, sizeof v);
    if (is_scaled(c)) v.log_scalors = m->params.device->row[m->log_scalors].value;
    v.fine = c->variant == X_FINE_SCALED, v.residual = is_residual(c), v.length = c->dec_max_seq_len;
    memcpy(v.alpha, m->alpha, sizeof v.alpha);
    return v;
}

typedef struct {
    float scale, same, different;
} RowVariant;

/* For position i under scale t */
static __device__ inline RowVariant row_variant(const Variant *v, int t, size_t i) {
    RowVariant r = {1, 0, 0};
    if (v->log_scalors)
        r.scale = (float)exp((double)v->log_scalors[v->fine ? (t - 1) * v->length + i : (size_t)(t - 1)]);
    return r;
}
static __device__ inline RowVariant with_residual(RowVariant r, const Variant *v, int t, size_t K) {
    if (!v->residual) return r;
    const double alpha = (double)v->alpha[t], other = (1 - alpha) / (double)K;
    r.same = (float)log(alpha + other), r.different = (float)log(other);
    return r;
}

/* logits (B,n,K) from raw; a warp per row. ids (B,P+N): what the encoder read; positions begin at *at (NULL: 0). */
static __global__ void variant_forward_kernel(float *logits, const float *raw, Variant v, const int32_t *ids, size_t P,
                                              size_t N, const int *at, size_t R, size_t n, size_t K) {
    const size_t r = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (r >= R) return;
    const size_t i = (at ? (size_t)*at : 0) + r % n;
    const int32_t *row = ids + r / n * (P + N);
    const RowVariant x = with_residual(row_variant(&v, row[0], i), &v, row[0], K);
    const size_t kept = (size_t)row[P + i];
    for (size_t k = lane; k < K; k += WARP)
        logits[r * K + k] = raw[r * K + k] * x.scale + (k == kept ? x.same : x.different);
}

/* draw (B,N,K) = dlogits * scale; row_sum[r] = scale * sum_k dlogits raw, the gradient of the row's log_scalor */
static __global__ void variant_backward_kernel(floatX *draw, float *row_sum, const float *dlogits, const float *raw,
                                               Variant v, const int32_t *ids, size_t P, size_t R, size_t N, size_t K) {
    const size_t r = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (r >= R) return;
    const float scale = row_variant(&v, v.log_scalors ? ids[r / N * (P + N)] : 0, r % N).scale;
    float sum = 0;
    for (size_t k = lane; k < K; k += WARP) {
        const float g = dlogits[r * K + k];
        sum += g * raw[r * K + k];
        draw[r * K + k] = to_floatX(g * scale);
    }
    sum = warp_sum(sum);
    if (lane == 0) row_sum[r] = sum * scale;
}

/* A warp per element of log_scalors looks for its rows, lane by lane in the same order always. */
static __global__ void scalors_backward_kernel(float *dlog_scalors, const float *row_sum, const int32_t *ids,
                                               size_t stride, size_t R, size_t N, size_t length, int fine) {
    const size_t t = fine ? blockIdx.x / length : blockIdx.x, i = blockIdx.x % length;
    float sum = 0;
    for (size_t r = threadIdx.x; r < R; r += WARP)
        if ((size_t)ids[r / N * stride] == t + 1 && (!fine || r % N == i)) sum += row_sum[r];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) dlog_scalors[blockIdx.x] += sum;
}

static Err scalors_backward_cuda(Transformer *m, const Variant *v) {
    NetTwin *n = m->twin;
    if (!v->log_scalors) return OK;
    LAUNCH(n->d, scalors_backward_kernel, (unsigned)m->params.row[m->log_scalors].size, WARP, 0,
           n->d->row[m->log_scalors].grad, n->row_sum, n->encoder.ids, prompt_length(&m->config) + m->now_N,
           m->now_B * m->now_N, m->now_N, v->length, v->fine);
    return OK;
}

/* n positions of the decoder's output to logits; the position of the first is *at. */
static Err head_forward_cuda(Transformer *m, size_t B, size_t n, const int *at) {
    NetTwin *w = m->twin;
    const Variant v = variant_of(m);
    const size_t K = m->config.dec_num_tokens, R = B * n;
    if (w->streaming)
        TRY(head_stream(m, R));
    else
        TRY(linear_forward_cuda(w->d, &m->head, w->raw, 1, NULL, w->decoder.out, R));
    if (w->logits == w->raw) return OK;
    LAUNCH(w->d, variant_forward_kernel, blocks_for(R, ROW_WARPS), ROW_WARPS * WARP, 0, w->logits, w->raw, v,
           w->encoder.ids, prompt_length(&m->config), m->now_N, at, R, n, K);
    return OK;
}

/* ---- The twin of the whole network ---- */

/* Pass over all positions: up to the decoder's output, or back from w->draw. */
static Err network_forward_cuda(Transformer *m) {
    NetTwin *w = m->twin;
    const Stack *e = &m->encoder, *d = &m->decoder;
    const size_t B = m->now_B, N = m->now_N, P = prompt_length(&m->config);
    if (m->config.kind == NET_GPT) {
        const Pass pass = whole_pass(d, B, P + N - 1, NULL, 0);
        TRY(to_device(w->d, w->decoder.ids, d->ids, B * pass.n * sizeof *d->ids));
        return stack_forward_cuda(m, d, &w->decoder, &pass, NULL, P - 1, NULL);
    }
    const Pass encode = whole_pass(e, B, P + N, NULL, 0), decode = whole_pass(d, B, N, NULL, P + N);
    TRY(to_device(w->d, w->encoder.ids, e->ids, B * encode.n * sizeof *e->ids));
    TRY(to_device(w->d, w->decoder.ids, d->ids, B * N * sizeof *d->ids));
    TRY(stack_forward_cuda(m, e, &w->encoder, &encode, NULL, 0, NULL));
    return stack_forward_cuda(m, d, &w->decoder, &decode, w->encoder.out, 0, NULL);
}

static Err network_backward_cuda(Transformer *m) {
    NetTwin *w = m->twin;
    const Stack *e = &m->encoder, *d = &m->decoder;
    const size_t B = m->now_B, N = m->now_N, P = prompt_length(&m->config);
    float *dout = w->dnormed; /* (B*N,C): the final norm reads it before the last block writes there */
    TRY(linear_backward_cuda(w->d, &m->head, dout, 1, 0, w->draw, w->decoder.out, w->partial, B * N));
    if (m->config.kind == NET_GPT) {
        const Pass pass = whole_pass(d, B, P + N - 1, NULL, 0);
        return stack_backward_cuda(m, d, &w->decoder, dout, NULL, &pass, NULL, P - 1);
    }
    const Pass encode = whole_pass(e, B, P + N, NULL, 0), decode = whole_pass(d, B, N, NULL, P + N);
    TRY(device_zero(w->d, w->dcontext, B * encode.n * e->C * sizeof *w->dcontext));
    TRY(stack_backward_cuda(m, d, &w->decoder, dout, w->dcontext, &decode, w->encoder.out, 0));
    return stack_backward_cuda(m, e, &w->encoder, w->dcontext, NULL, &encode, NULL, 0);
}

static Err forward_cuda(Transformer *m) {
    NetTwin *w = m->twin;
    TRY(earlier_failure(w->d));
    TRY(network_forward_cuda(m));
    TRY(head_forward_cuda(m, m->now_B, m->now_N, NULL));
    return to_host(w->d, m->logits, w->logits, m->now_B * m->now_N * m->config.dec_num_tokens * sizeof *w->logits);
}

/* dlogits (B,N,K) on the host. They take the place of logits, or, when these are raw logits too, of nothing that is
 * read. */
static Err backward_cuda(Transformer *m, const real *dlogits) {
    NetTwin *w = m->twin;
    const Variant v = variant_of(m);
    const size_t K = m->config.dec_num_tokens, R = m->now_B * m->now_N;
    TRY(to_device(w->d, w->logits, dlogits, R * K * sizeof *dlogits));
    LAUNCH(w->d, variant_backward_kernel, blocks_for(R, ROW_WARPS), ROW_WARPS * WARP, 0, w->draw, w->row_sum, w->logits,
           w->raw, v, w->encoder.ids, prompt_length(&m->config), R, m->now_N, K);
    TRY(scalors_backward_cuda(m, &v));
    return network_backward_cuda(m);
}
