/* decode.cu - decoding, with the keys and values of earlier positions kept.
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

/* ---- The twins ----
 *
 * For few rows (a batch of up to STREAM_ROWS) a step is bound by reading weights and by starting kernels: stream_kernel
 * does norm, product and what follows it in one go, so that a block of the network takes two or three kernels. Larger
 * batches go through the matrix products of training. Tokens are drawn where the logits are; a step is captured in a
 * graph once per pass and started N times, without the host having a say in between. */

enum { STREAM_ROWS = 8, STREAM_WARPS = 4, STREAM_BYTES = 96 << 10, DRAW_THREADS = 256 /* values of a byte, too */ };

static void plan_decoding_twin(Arena *a, NetTwin *w, const Transformer *m, size_t inner) {
    const size_t rows = m->B * prompt_length(&m->config);
    w->pos = (int *)take_bytes(a, 1, 1, 1, sizeof *w->pos);
    w->new_key = take_x(a, rows, inner), w->new_value = take_x(a, rows, inner);
    w->how = (DrawTwin *)take_bytes(a, 1, 1, 1, sizeof *w->how);
    w->stream = (uint64_t *)take_bytes(a, m->B, 1, 1, sizeof *w->stream);
    w->fit = (double *)take_bytes(a, m->B, 1, 1, sizeof *w->fit);
    w->known = take_ids(a, m->B, m->N), w->tokens = take_ids(a, m->B, m->N);
    w->keep = (uint8_t *)take_bytes(a, m->N, 1, 1, 1);
}

/* ---- Products for few rows ---- */

/* out (R,N) of up to three matrices (N,K) that read the same rows (R,K): in, or the norm of x. */
typedef struct {
    const floatX *weight;
    const float *bias; /* NULL: none */
    void *out;         /* float with `residual` or is_float, else floatX */
} StreamPart;
typedef struct {
    const floatX *in; /* NULL: norm of x */
    const float *x, *norm_weight, *norm_bias;
    float eps;
    StreamPart part[3];
    const float *residual;
    int gelu, is_float;
    size_t R, N, K;
} Stream;

/* rows (R,K) in shared memory. Every block does the norm for itself, and its weights wait for it: so x is read with
 * many loads under way at a time. */
static __device__ inline void load_rows(floatX *rows, const Stream *s) {
    const size_t lane = threadIdx.x % WARP, K = s->K;
    if (s->in) {
        for (size_t i = threadIdx.x * PACK; i < s->R * K; i += STREAM_WARPS * WARP * PACK)
            store_pack(rows, i, s->R * K, load_pack(s->in, i, s->R * K));
        return;
    }
    for (size_t r = threadIdx.x / WARP; r < s->R; r += STREAM_WARPS) {
        const float *x = s->x + r * K;
        float sum = 0, square = 0;
#pragma unroll 16
        for (size_t c = lane; c < K; c += WARP) sum += x[c];
        const float mu = warp_sum(sum) / (float)K;
#pragma unroll 8
        for (size_t c = lane; c < K; c += WARP) square += (x[c] - mu) * (x[c] - mu);
        const float scale = 1 / sqrtf(warp_sum(square) / (float)K + s->eps);
#pragma unroll 8
        for (size_t c = lane; c < K; c += WARP)
            rows[r * K + c] = to_floatX((x[c] - mu) * scale * s->norm_weight[c] + s->norm_bias[c]);
    }
}

enum { STREAM_AHEAD = 4 };

/* The next packs of a lane from k on, of those that lie in a row of K numbers */
static __device__ inline void load_ahead(Pack w[STREAM_AHEAD], const floatX *row, size_t k, size_t K) {
#pragma unroll
    for (int a = 0; a < STREAM_AHEAD; a++)
        if (k + a * WARP * PACK < K) w[a] = *(const Pack *)(row + k + a * WARP * PACK);
}

/* sum[r] += w times as much of row r, which is at rows + r K */
static __device__ inline void stream_pack(float sum[STREAM_ROWS], const Stream *s, Pack w, const floatX *rows) {
#pragma unroll
    for (size_t r = 0; r < STREAM_ROWS; r++) {
        if (r >= s->R) continue;
        const Pack x = *(const Pack *)(rows + r * s->K);
#pragma unroll
        for (int e = 0; e < PACK; e++) sum[r] += to_float(w.at[e]) * to_float(x.at[e]);
    }
}

/* A warp per row of a matrix, that is, per column of out: it reads that row once, 16 bytes a lane, for all R rows.
 * Weights are asked for STREAM_AHEAD packs ahead, the first of them before the rows that they meet are there. */
static __global__ void __launch_bounds__(STREAM_WARPS *WARP) stream_kernel(Stream s) {
    SHARED(floatX, rows);
    const size_t column = (size_t)blockIdx.x * STREAM_WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP, K = s.K;
    const size_t n = column % s.N, which = column / s.N;
    const bool there = which <= 2 && s.part[which].weight;
    const floatX *weight = there ? s.part[which].weight + n * K : NULL;
    const size_t whole = there && K % PACK == 0 ? K : 0; /* else rows do not begin at 16 bytes */
    float sum[STREAM_ROWS] = {};
    Pack ahead[STREAM_AHEAD] = {};
    load_ahead(ahead, weight, lane * PACK, whole);
    load_rows(rows, &s);
    __syncthreads();
    if (!there) return;
    for (size_t k0 = lane * PACK; k0 < whole; k0 += STREAM_AHEAD * WARP * PACK) {
        Pack now[STREAM_AHEAD];
#pragma unroll
        for (int a = 0; a < STREAM_AHEAD; a++) now[a] = ahead[a];
        load_ahead(ahead, weight, k0 + STREAM_AHEAD * WARP * PACK, whole);
#pragma unroll
        for (int a = 0; a < STREAM_AHEAD; a++)
            if (k0 + a * WARP * PACK < whole) stream_pack(sum, &s, now[a], rows + k0 + a * WARP * PACK);
    }
    for (size_t k = whole + lane; k < K; k += WARP)
#pragma unroll
        for (size_t r = 0; r < STREAM_ROWS; r++)
            if (r < s.R) sum[r] += to_float(weight[k]) * to_float(rows[r * K + k]);
#pragma unroll
    for (size_t r = 0; r < STREAM_ROWS; r++) {
        if (r >= s.R) continue;
        float y = warp_sum(sum[r]) + (s.part[which].bias ? s.part[which].bias[n] : 0);
        if (lane != 0) continue;
        if (s.gelu) y *= 0.5f * erfcf(-y * 0.70710678f);
        if (s.residual) y += s.residual[r * s.N + n];
        if (s.is_float)
            ((float *)s.part[which].out)[r * s.N + n] = y;
        else
            ((floatX *)s.part[which].out)[r * s.N + n] = to_floatX(y);
    }
}

static Stream stream_of(const Device *d, const Norm *norm, const float *x, const floatX *in, size_t R) {
    Stream s;
    memset(&s, 0, sizeof s);
    s.in = in, s.R = R, s.eps = (float)NORM_EPS;
    if (norm) s.x = x, s.norm_weight = d->row[norm->weight].value, s.norm_bias = d->row[norm->bias].value;
    return s;
}

static void add_part(const Device *d, Stream *s, int which, const Linear *l, void *out) {
    s->part[which].weight = d->row[l->weight].weight, s->part[which].out = out;
    s->part[which].bias = l->bias == NO_ROW ? NULL : d->row[l->bias].value;
    s->N = l->out, s->K = l->in;
}

static Err stream_cuda(Device *d, const Stream *s) {
    const size_t parts = s->part[2].weight ? 3 : 1;
    LAUNCH(d, stream_kernel, blocks_for(parts * s->N, STREAM_WARPS), STREAM_WARPS * WARP, s->R * s->K * sizeof(floatX),
           *s);
    return OK;
}

/* next = x + projection of in */
static Err stream_back(Device *d, const Linear *l, float *next, const float *x, const floatX *in, size_t R) {
    Stream s = stream_of(d, NULL, NULL, in, R);
    add_part(d, &s, 0, l, next);
    s.residual = x, s.is_float = 1;
    return stream_cuda(d, &s);
}

static Err attention_stream(Transformer *m, const Layer *l, LayerTwin *w, float *next, const AttendShape *shape) {
    NetTwin *n = m->twin;
    const int self = l->kind == BLOCK_SELF;
    Stream s = stream_of(n->d, &l->norm, w->x, NULL, shape->B);
    add_part(n->d, &s, 0, &l->q, w->query);
    if (self) add_part(n->d, &s, 1, &l->k, n->new_key), add_part(n->d, &s, 2, &l->v, n->new_value);
    TRY(stream_cuda(n->d, &s));
    TRY(attend_decode_cuda(n->d, shape, self ? n->pos : NULL, w->y, w->query, w->key, w->value, n->new_key,
                           n->new_value));
    return stream_back(n->d, &l->out, next, w->x, w->y, shape->B);
}

static Err feed_stream(Transformer *m, const Layer *l, LayerTwin *w, float *next, size_t R) {
    Device *d = m->twin->d;
    Stream s = stream_of(d, &l->norm, w->x, NULL, R);
    add_part(d, &s, 0, &l->up, w->g);
    s.gelu = 1;
    TRY(stream_cuda(d, &s));
    return stream_back(d, &l->down, next, w->x, w->g, R);
}

static Err head_stream(Transformer *m, size_t R) {
    NetTwin *n = m->twin;
    Stream s = stream_of(n->d, &m->decoder.norm, n->decoder.x_end, NULL, R);
    add_part(n->d, &s, 0, &m->head, n->raw);
    s.is_float = 1;
    return stream_cuda(n->d, &s);
}

/* ---- One token ---- */

static __device__ inline double uniform(uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t c[4];
    philox(c, seed, stream, index);
    return unit_of_bits(c[0], c[1]);
}

/* What the warps of a block tell each other */
enum { DRAW_WARPS = DRAW_THREADS / WARP };
typedef struct {
    double part[DRAW_WARPS];
    float value[DRAW_WARPS];
    int index[DRAW_WARPS], bad[DRAW_WARPS];
    int count[DRAW_THREADS];
    unsigned prefix, rank; /* of the search for the k-th largest */
    int first, last;       /* tokens: at which u is exceeded; with any probability */
} DrawShared;

/* Sum over the threads before this one and, in *total, over all: within a warp each step doubles the span. */
static __device__ inline double sum_before(DrawShared *s, double x, double *total) {
    const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    double sum = x, before = 0, all = 0;
    for (unsigned span = 1; span < WARP; span *= 2) {
        const double more = __shfl_up_sync(0xffffffffu, sum, span);
        if (lane >= span) sum += more;
    }
    __syncthreads();
    if (lane == WARP - 1) s->part[warp] = sum;
    __syncthreads();
    for (unsigned k = 0; k < DRAW_WARPS; k++) {
        if (k == warp) before = all;
        all += s->part[k];
    }
    *total = all;
    return before + (sum - x);
}

/* The first of the largest numbers of row (K), 0 if none is above -inf; *nan: there is a NaN. */
static __device__ inline int find_largest(DrawShared *s, const float *row, int K, float *largest, int *nan) {
    float best = -HUGE_VALF;
    int at = K, bad = 0;
    for (int k = threadIdx.x; k < K; k += DRAW_THREADS) {
        bad |= row[k] != row[k];
        if (row[k] > best) best = row[k], at = k;
    }
    for (int span = WARP / 2; span; span /= 2) {
        const float value = __shfl_xor_sync(0xffffffffu, best, span);
        const int index = __shfl_xor_sync(0xffffffffu, at, span);
        if (value > best || (value == best && index < at)) best = value, at = index;
    }
    bad = __ballot_sync(0xffffffffu, bad) != 0;
    __syncthreads();
    if (threadIdx.x % WARP == 0) {
        const unsigned warp = threadIdx.x / WARP;
        s->value[warp] = best, s->index[warp] = at, s->bad[warp] = bad;
    }
    __syncthreads();
    best = s->value[0], at = s->index[0], bad = s->bad[0];
    for (unsigned k = 1; k < DRAW_WARPS; k++) {
        if (s->value[k] > best || (s->value[k] == best && s->index[k] < at)) best = s->value[k], at = s->index[k];
        bad |= s->bad[k];
    }
    *largest = best, *nan = bad;
    return at < K ? at : 0;
}

/* Whole numbers in the order of the floats, and back */
static __device__ inline unsigned order_of(float x) {
    unsigned u;
    memcpy(&u, &x, sizeof u);
    return u >> 31 ? ~u : u | 0x80000000u;
}
static __device__ inline float float_at(unsigned order) {
    const unsigned u = order >> 31 ? order & 0x7fffffffu : ~order;
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* The rank-th largest of row[k]/heat, byte by byte from the top: count who shares the bytes found so far, by the next,
 * of which a thread has one value. */
static __device__ inline float kth_largest(DrawShared *s, const float *row, int K, float heat, unsigned rank) {
    if (threadIdx.x == 0) s->prefix = 0, s->rank = rank;
    for (int shift = 24; shift >= 0; shift -= 8) {
        s->count[threadIdx.x] = 0;
        __syncthreads();
        const unsigned prefix = s->prefix, left = s->rank;
        for (int k = threadIdx.x; k < K; k += DRAW_THREADS) {
            const unsigned u = order_of(row[k] / heat);
            if (shift == 24 || u >> (shift + 8) == prefix) atomicAdd(&s->count[u >> shift & 255], 1);
        }
        __syncthreads();
        const unsigned byte = DRAW_THREADS - 1 - threadIdx.x, here = (unsigned)s->count[byte];
        double all;
        const unsigned above = (unsigned)sum_before(s, (double)here, &all);
        if (above < left && left <= above + here) s->prefix = prefix << 8 | byte, s->rank = left - above;
        __syncthreads();
    }
    return float_at(s->prefix);
}

/* sample_probs and sample_pick of diffusion.c: the token at which the sum of probabilities first exceeds u. A thread
 * has `each` neighbouring tokens. */
static __device__ inline int pick(DrawShared *s, const float *row, int K, float heat, float largest, float least,
                                  double u) {
    const int each = (K + DRAW_THREADS - 1) / DRAW_THREADS, begin = (int)threadIdx.x * each;
    const int end = begin + each < K ? begin + each : K;
    double sum = 0, total, all;
    for (int k = begin; k < end; k++) {
        const float z = row[k] / heat;
        if (!(z < least)) sum += (double)(float)exp((double)(z - largest));
    }
    sum_before(s, sum, &total);
    double mass = 0;
#define PROBABILITY(k)                                                                                                 \
    (row[k] / heat < least ? 0 : (float)((double)(float)exp((double)(row[k] / heat - largest)) / total))
    for (int k = begin; k < end; k++) {
        const float p = PROBABILITY(k);
        if (p > 0) mass += (double)p;
    }
    double below = sum_before(s, mass, &all);
    int hit = K, last = -1;
    for (int k = begin; k < end; k++) {
        const float p = PROBABILITY(k);
        if (!(p > 0)) continue;
        below += (double)p, last = k;
        if (below > u) {
            hit = k;
            break;
        }
    }
#undef PROBABILITY
    if (threadIdx.x == 0) s->first = K, s->last = -1;
    __syncthreads();
    if (hit < K) atomicMin(&s->first, hit);
    if (last >= 0) atomicMax(&s->last, last);
    __syncthreads();
    return s->first < K ? s->first : s->last;
}

/* fit += log softmax(row)[guide] */
static __device__ inline void add_fit(DrawShared *s, double *fit, const float *row, int K, float largest, int guide) {
    double sum = 0, total;
    for (int k = threadIdx.x; k < K; k += DRAW_THREADS) sum += exp((double)row[k] - (double)largest);
    sum_before(s, sum, &total);
    if (threadIdx.x == 0) *fit += (double)row[guide] - (double)largest - log(total);
}

/* cond (K) = uncond + g (cond - uncond) */
static __device__ inline void mix_rows(float *cond, const float *uncond, float g, int K) {
    for (int k = threadIdx.x; k < K; k += DRAW_THREADS) cond[k] = uncond[k] + g * (cond[k] - uncond[k]);
    __syncthreads();
}

typedef struct {
    float *logits; /* (B,K) */
    const DrawTwin *how;
    const uint64_t *stream;
    const int32_t *known;
    const uint8_t *keep;
    double *fit;
    int32_t *tokens, *ids; /* (samples,N) and what the next step reads (B) */
    const int *pos;
    int prompt; /* positions in front of the tokens' */
    size_t N;
    int K;
} DrawStep;

/* A block per sample: draws its token i, -1 if there are no probabilities. Guided, its other row is gridDim.x rows
 * on. */
static __global__ void __launch_bounds__(DRAW_THREADS) draw_kernel(DrawStep a) {
    SHARED(DrawShared, s);
    const size_t b = blockIdx.x, i = (size_t)(*a.pos - a.prompt);
    float *row = a.logits + b * (size_t)a.K;
    if (a.how->guided) mix_rows(row, row + gridDim.x * (size_t)a.K, a.how->guidance, a.K);
    const float heat = (float)a.how->temperature;
    const int guide = a.how->forced && a.keep[i] ? a.known[b * a.N + i] : -1;
    float largest, least = -HUGE_VALF;
    int nan, token = find_largest(s, row, a.K, &largest, &nan);
    if (a.how->fitted && guide >= 0) add_fit(s, &a.fit[b], row, a.K, largest, guide);
    if (nan)
        token = -1;
    else if (guide >= 0)
        token = guide;
    else if (heat > 0) {
        if (a.how->top_k > 0 && a.how->top_k < (size_t)a.K)
            least = kth_largest(s, row, a.K, heat, (unsigned)a.how->top_k);
        token = pick(s, row, a.K, heat, largest / heat, least, uniform(a.how->seed, a.stream[b], i));
    }
    if (threadIdx.x > 0) return;
    a.tokens[b * a.N + i] = token, a.ids[b] = token < 0 ? 0 : token;
    if (a.how->guided) a.ids[gridDim.x + b] = a.ids[b];
}

static __global__ void advance_kernel(int *pos) {
    if (threadIdx.x == 0) ++*pos;
}

/* ---- A pass ---- */

static Err set_position(NetTwin *w, size_t pos) {
    const int value = (int)pos;
    TRY(to_device(w->d, w->pos, &value, sizeof value));
    return wait_for(w->d);
}

/* One position of the decoder, whose ids and place are on the GPU, to logits (B,K). */
static Err step_cuda(Transformer *m) {
    NetTwin *w = m->twin;
    const Stack *d = &m->decoder;
    const size_t widest = max_size(FEED_FACTOR * d->C, d->layer[0].heads * d->layer[0].D);
    Pass pass = whole_pass(d, m->now_B, 1, NULL, 0);
    pass.stride = d->T, pass.causal = 0;
    if (m->config.kind == NET_X) pass.T_context = prompt_length(&m->config) + m->now_N;
    w->streaming = m->now_B <= STREAM_ROWS && m->now_B * widest * sizeof(floatX) <= STREAM_BYTES;
    Err e = stack_forward_cuda(m, d, &w->decoder, &pass, NULL, 0, w->pos);
    if (e == OK) e = head_forward_cuda(m, m->now_B, 1, w->pos);
    w->streaming = 0;
    return e;
}

/* As the CPU's: the context's keys and values, or the prompt of a GPT, whose last position gives the first logits. */
static Err decode_begin_cuda(Transformer *m) {
    NetTwin *w = m->twin;
    const Stack *e = &m->encoder, *d = &m->decoder;
    const size_t B = m->now_B, P = prompt_length(&m->config), n = P + m->now_N;
    TRY(earlier_failure(w->d));
    TRY(set_position(w, 0));
    if (m->config.kind == NET_X) {
        const Pass encode = whole_pass(e, B, n, NULL, 0);
        TRY(to_device(w->d, w->encoder.ids, e->ids, B * n * sizeof *e->ids));
        TRY(stack_forward_cuda(m, e, &w->encoder, &encode, NULL, 0, NULL));
        for (size_t i = 0; i < d->n_layers; i++) {
            const Layer *l = &d->layer[i];
            if (l->kind != BLOCK_CROSS) continue;
            TRY(linear_forward_cuda(w->d, &l->k, w->decoder.layer[i].key, 0, NULL, w->encoder.out, B * n));
            TRY(linear_forward_cuda(w->d, &l->v, w->decoder.layer[i].value, 0, NULL, w->encoder.out, B * n));
        }
        return OK;
    }
    Pass pass = whole_pass(d, B, P, NULL, 0);
    pass.stride = d->T, pass.causal = 0;
    TRY(to_device(w->d, w->decoder.ids, d->ids, B * P * sizeof *d->ids));
    m->state = DECODING; /* new keys go into the caches */
    TRY(stack_forward_cuda(m, d, &w->decoder, &pass, NULL, P - 1, w->pos));
    return head_forward_cuda(m, B, 1, w->pos);
}

static size_t prompt_positions(const Transformer *m) {
    return m->config.kind == NET_X ? 0 : prompt_length(&m->config) - 1;
}

static Err decode_step_cuda(Transformer *m, size_t i) {
    NetTwin *w = m->twin;
    if (m->config.kind == NET_X || i > 0) { /* else begin has done it */
        TRY(to_device(w->d, w->decoder.ids, m->decoder.ids, m->now_B * sizeof *m->decoder.ids));
        TRY(set_position(w, prompt_positions(m) + i));
        TRY(step_cuda(m));
    }
    return to_host(w->d, m->logits, w->logits, m->now_B * m->config.dec_num_tokens * sizeof *w->logits);
}

static Err launch_draw(Device *d, const DrawStep *a, size_t samples) {
    LAUNCH(d, draw_kernel, (unsigned)samples, DRAW_THREADS, sizeof(DrawShared), *a);
    return OK;
}

static Err draw_token(Transformer *m) {
    NetTwin *w = m->twin;
    const DrawStep a = {w->logits, w->how,
                        w->stream, w->known,
                        w->keep,   w->fit,
                        w->tokens, w->decoder.ids,
                        w->pos,    (int)prompt_positions(m),
                        m->now_N,  (int)m->config.dec_num_tokens};
    TRY(launch_draw(w->d, &a, w->samples));
    LAUNCH(w->d, advance_kernel, 1, WARP, 0, w->pos);
    return OK;
}

static Err draw_step(Transformer *m) {
    TRY(step_cuda(m));
    return draw_token(m);
}

/* A step as a graph, which starts all its kernels at once */
typedef struct {
    cudaGraph_t graph;
    cudaGraphExec_t ready;
} StepGraph;

static Err graph_make(StepGraph *g, Transformer *m) {
    cudaStream_t stream = m->twin->d->stream;
    g->graph = NULL, g->ready = NULL;
    TRY(cuda_error(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capturing a step"));
    const Err e = draw_step(m);
    const cudaError_t end = cudaStreamEndCapture(stream, &g->graph);
    TRY(e);
    TRY(cuda_error(end, "capturing a step"));
    return cuda_error(cudaGraphInstantiate(&g->ready, g->graph, 0), "preparing a step");
}
static Err graph_run(StepGraph *g, Transformer *m) {
    return cuda_error(cudaGraphLaunch(g->ready, m->twin->d->stream), "a step");
}
static void graph_free(StepGraph *g) {
    if (g->ready) cudaGraphExecDestroy(g->ready);
    if (g->graph) cudaGraphDestroy(g->graph);
}

static Err send_options(Transformer *m, const DrawOptions *o) {
    NetTwin *w = m->twin;
    const size_t N = m->now_N, n = w->samples = o->guided ? m->now_B / 2 : m->now_B;
    const DrawTwin how = {o->seed,        o->temperature, o->top_k,          o->known != NULL,
                          o->fit != NULL, o->guided,      (float)o->guidance};
    TRY(to_device(w->d, w->how, &how, sizeof how));
    TRY(to_device(w->d, w->stream, o->stream, n * sizeof *o->stream));
    TRY(device_zero(w->d, w->fit, n * sizeof *w->fit));
    if (o->known) TRY(to_device(w->d, w->known, o->known, n * N * sizeof *o->known));
    if (o->keep) TRY(to_device(w->d, w->keep, o->keep, N));
    TRY(device_zero(w->d, w->decoder.ids, m->now_B * sizeof *w->decoder.ids)); /* sos */
    return set_position(w, prompt_positions(m));
}

static Err draw_all(Transformer *m, const DrawOptions *o, StepGraph *g) {
    enum { BETWEEN_REPORTS = 32 };
    NetTwin *w = m->twin;
    size_t done = 0;
    if (m->config.kind == NET_GPT) {
        TRY(draw_token(m)); /* from the prompt's logits */
        done++;
    }
    /* The first step runs as it is: it loads what it needs, which must not happen while a graph is captured. */
    if (done < m->now_N) {
        TRY(draw_step(m));
        done++;
    }
    if (done < m->now_N) TRY(graph_make(g, m));
    while (done < m->now_N) {
        for (size_t k = 0; k < BETWEEN_REPORTS && done < m->now_N; k++, done++) TRY(graph_run(g, m));
        TRY(wait_for(w->d));
        if (o->progress && o->progress(o->context, done)) return err("sampling was stopped");
    }
    return wait_for(w->d);
}

static Err draw_cuda(Transformer *m, const DrawOptions *o, int32_t *tokens) {
    NetTwin *w = m->twin;
    StepGraph g;
    memset(&g, 0, sizeof g);
    TRY(send_options(m, o));
    const Err e = draw_all(m, o, &g);
    graph_free(&g);
    TRY(e);
    TRY(to_host(w->d, tokens, w->tokens, w->samples * m->now_N * sizeof *tokens));
    if (!o->fit) return OK;
    double *fit;
    TRY(mem_alloc(&fit, w->samples, sizeof *fit, "weights of candidates"));
    const Err f = to_host(w->d, fit, w->fit, w->samples * sizeof *fit);
    for (size_t b = 0; f == OK && b < w->samples; b++) o->fit[b] += fit[b];
    free(fit);
    return f;
}
