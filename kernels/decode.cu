/* decode.cu - the loop that draws tokens on a GPU, with the keys and values of earlier positions kept.
 *
 * It knows a decoder as a list of layers with the addresses of their parameters and kept keys and values (Decoder in
 * base/compute.h), and feeds it one position of all batch rows after the other: the stack of transformer.cu, without
 * its backward pass.
 *
 * For few rows (a batch of up to STREAM_ROWS) a step is bound by reading weights and by starting kernels. On GPUs from
 * capability 9 on the step kernel (decode_step.cu) is all there is. On others stream_kernel does norm, product and what
 * follows it in one go, so that a block of the network takes two or three kernels. Larger batches go through the matrix
 * products of training. Tokens are drawn where the logits are (draw.cu); a step of many kernels is captured in a graph once
 * per pass and started N times, without the host having a say in between. device.cu includes this file. */
#include "kernels/device.h"

#include "kernels/draw.cu"

#include "kernels/decode_step.cu"

enum { STREAM_ROWS = 8, STREAM_WARPS = 4, STREAM_BYTES = 96 << 10, BETWEEN_REPORTS = 32 /* tokens */ };

/* A pass through the decoder: what Decoder.work holds, and where it runs */
typedef struct {
    const Decoder *s;
    Device *d;
    Compute on;
    size_t samples; /* rows of the batch, or half of them if guided */
    /* in s->work */
    int *pos;                    /* (B) of the next position, each the same */
    floatX *new_key, *new_value; /* (B*(prompt+1),inner) */
    DrawHow *how;
    uint64_t *stream;        /* (B) */
    double *fit;             /* (B) */
    int32_t *known, *tokens; /* (B,N) */
    uint8_t *keep;           /* (N) */
    int by_steps;            /* the step kernel serves this batch */
    Step step;
} Decoding;

/* The arrays in work one after the other; returns how many bytes they take. */
static size_t place_work(Decoding *x, const Decoder *s) {
    char *const base = (char *)s->work;
    size_t used = 0;
    const auto place = [&](auto **array, size_t n) {
        *array = base ? (decltype(*array + 0))(void *)(base + used) : NULL;
        used += round_up(n * sizeof **array, 4 * ALIGNMENT);
    };
    const size_t rows = s->B * (s->prompt + 1), inner = s->heads * s->D;
    place(&x->pos, s->B), place(&x->new_key, rows * inner), place(&x->new_value, rows * inner);
    place(&x->how, 1), place(&x->stream, s->B), place(&x->fit, s->B);
    place(&x->known, s->B * s->N), place(&x->tokens, s->B * s->N), place(&x->keep, s->N);
    const int fits = step_fits(&x->step, s);
    if (fits) place_step(&x->step, place);
    x->by_steps = fits && s->B <= STEP_ROWS;
    return used;
}

static size_t decode_needs_gpu(const Decoder *s) {
    Decoding x;
    Decoder without = *s;
    without.work = NULL;
    return place_work(&x, &without);
}

static DrawStep draw_of(const Decoding *x) {
    const Decoder *s = x->s;
    return {s->logits, x->how, x->stream, x->known, x->keep, x->fit, x->tokens, s->ids, x->samples, s->N, (int)s->K};
}

static Decoding decoding_of(Device *d, const Decoder *s) {
    Decoding x;
    memset(&x, 0, sizeof x);
    x.s = s, x.d = d, x.on.device = d, x.samples = s->B;
    place_work(&x, s);
    Step *const p = &x.step;
    p->token = s->token, p->position = s->position, p->raw = s->raw, p->variant = s->variant;
    p->pos = x.pos, p->prompt = (int)s->prompt, p->draw = draw_of(&x);
    return x;
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

/* What a block shares: sums of its warps, and the rows that its products read, (R,K) */
typedef float WarpSums[STREAM_WARPS][STREAM_ROWS];
static size_t stream_bytes(size_t R, size_t K) {
    return sizeof(WarpSums) + R * K * sizeof(floatX);
}

/* Sum over the block of each of R numbers that a thread brings, added in the order of the warps. */
static __device__ inline void block_sums(float sum[STREAM_ROWS], WarpSums part, size_t R) {
    __syncthreads();
#pragma unroll
    for (size_t r = 0; r < STREAM_ROWS; r++) {
        if (r >= R) continue;
        sum[r] = warp_sum(sum[r]);
        if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP][r] = sum[r];
    }
    __syncthreads();
#pragma unroll
    for (size_t r = 0; r < STREAM_ROWS; r++) {
        if (r >= R) continue;
        sum[r] = 0;
        for (int w = 0; w < STREAM_WARPS; w++) sum[r] += part[w][r];
    }
}

/* rows (R,K) in shared memory = norm of x. Every block does it for itself, and its weights wait for it: so all warps share
 * each row, also of one row alone, and x is read with many loads under way at a time. */
static __device__ inline void norm_rows(floatX *rows, WarpSums part, const Stream *s) {
    enum { THREADS = STREAM_WARPS * WARP };
    const size_t K = s->K;
    float mu[STREAM_ROWS] = {}, scale[STREAM_ROWS] = {};
#pragma unroll
    for (size_t r = 0; r < STREAM_ROWS; r++)
#pragma unroll 8
        for (size_t c = threadIdx.x; r < s->R && c < K; c += THREADS) mu[r] += s->x[r * K + c];
    block_sums(mu, part, s->R);
#pragma unroll
    for (size_t r = 0; r < STREAM_ROWS; r++) {
        mu[r] /= (float)K;
#pragma unroll 8
        for (size_t c = threadIdx.x; r < s->R && c < K; c += THREADS)
            scale[r] += (s->x[r * K + c] - mu[r]) * (s->x[r * K + c] - mu[r]);
    }
    block_sums(scale, part, s->R);
#pragma unroll
    for (size_t r = 0; r < STREAM_ROWS; r++) {
        scale[r] = 1 / sqrtf(scale[r] / (float)K + s->eps);
#pragma unroll 8
        for (size_t c = threadIdx.x; r < s->R && c < K; c += THREADS)
            rows[r * K + c] = to_floatX((s->x[r * K + c] - mu[r]) * scale[r] * s->norm_weight[c] + s->norm_bias[c]);
    }
}

static __device__ inline void load_rows(floatX *rows, WarpSums part, const Stream *s) {
    if (!s->in) return norm_rows(rows, part, s);
    for (size_t i = threadIdx.x * PACK; i < s->R * s->K; i += STREAM_WARPS * WARP * PACK)
        store_pack(rows, i, s->R * s->K, load_pack(s->in, i, s->R * s->K));
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
    SHARED(WarpSums, part);
    floatX *const rows = (floatX *)(void *)(part + 1);
    const size_t column = (size_t)blockIdx.x * STREAM_WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP, K = s.K;
    const size_t n = column % s.N, which = column / s.N;
    const bool there = which <= 2 && s.part[which].weight;
    const floatX *weight = there ? s.part[which].weight + n * K : NULL;
    const size_t whole = there && K % PACK == 0 ? K : 0; /* else rows do not begin at 16 bytes */
    float sum[STREAM_ROWS] = {};
    Pack ahead[STREAM_AHEAD] = {};
    load_ahead(ahead, weight, lane * PACK, whole);
    load_rows(rows, *part, &s);
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

static Stream stream_of(const Decoder *s, const real *norm_weight, const real *norm_bias, const real *in) {
    Stream a;
    memset(&a, 0, sizeof a);
    a.R = s->B, a.eps = (float)LAYER_NORM_EPS, a.in = (const floatX *)in;
    if (!in) a.x = s->x, a.norm_weight = norm_weight, a.norm_bias = norm_bias;
    return a;
}

static void add_part(const Decoding *x, Stream *a, int which, const Projection *p, void *out) {
    a->part[which].weight = operand_of(x->d, p->weight), a->part[which].out = out, a->part[which].bias = p->bias;
    a->N = p->out, a->K = p->in;
}

static Err stream_gpu(Device *d, const Stream *s) {
    const size_t parts = s->part[2].weight ? 3 : 1;
    LAUNCH(d, stream_kernel, blocks_for(parts * s->N, STREAM_WARPS), STREAM_WARPS * WARP, stream_bytes(s->R, s->K), *s);
    return OK;
}

/* x = x + projection of in */
static Err stream_back(const Decoding *x, const Projection *p, const real *in) {
    Stream a = stream_of(x->s, NULL, NULL, in);
    add_part(x, &a, 0, p, x->s->x);
    a.residual = x->s->x, a.is_float = 1;
    return stream_gpu(x->d, &a);
}

/* ---- Blocks: x = x + block(norm(x)), n positions of every row ---- */

static Err project_gpu(const Decoding *x, const Projection *p, void *y, const real *in, const real *add, int y_f32,
                       size_t R) {
    return linear_forward_gpu(&x->on, (real *)y, in, p->weight, p->bias, add, y_f32, R, p->in, p->out);
}

static Err attend_gpu(const Decoding *x, const DecoderLayer *l, size_t n) {
    const Decoder *s = x->s;
    const int self = l->kind == BLOCK_SELF;
    Attention a;
    memset(&a, 0, sizeof a);
    a.B = s->B, a.heads = s->heads, a.D = s->D, a.Tq = n;
    a.Tk = self ? n : s->T_context, a.key_stride = self ? s->T : s->T_context;
    return attend_decode_gpu(x->d, &a, self ? x->pos : NULL, (floatX *)s->y, (const floatX *)s->query, (floatX *)l->key,
                             (floatX *)l->value, x->new_key, x->new_value);
}

static Err attention_stream(const Decoding *x, const DecoderLayer *l) {
    Stream a = stream_of(x->s, l->norm_weight, l->norm_bias, NULL);
    add_part(x, &a, 0, &l->q, x->s->query);
    if (l->kind == BLOCK_SELF) add_part(x, &a, 1, &l->k, x->new_key), add_part(x, &a, 2, &l->v, x->new_value);
    TRY(stream_gpu(x->d, &a));
    TRY(attend_gpu(x, l, 1));
    return stream_back(x, &l->out, x->s->y);
}

static Err feed_stream(const Decoding *x, const DecoderLayer *l) {
    Stream a = stream_of(x->s, l->norm_weight, l->norm_bias, NULL);
    add_part(x, &a, 0, &l->up, x->s->g);
    a.gelu = 1;
    TRY(stream_gpu(x->d, &a));
    return stream_back(x, &l->down, x->s->g);
}

static Err norm_block(const Decoding *x, const DecoderLayer *l, size_t n) {
    const Decoder *s = x->s;
    return norm_forward_gpu(&x->on, s->normed, s->mean, s->rstd, s->x, l->norm_weight, l->norm_bias, s->B * n, s->C, n,
                            0);
}

static Err attention_block(const Decoding *x, const DecoderLayer *l, size_t n) {
    const Decoder *s = x->s;
    const size_t R = s->B * n;
    TRY(norm_block(x, l, n));
    TRY(project_gpu(x, &l->q, s->query, s->normed, NULL, 0, R));
    if (l->kind == BLOCK_SELF) {
        TRY(project_gpu(x, &l->k, x->new_key, s->normed, NULL, 0, R));
        TRY(project_gpu(x, &l->v, x->new_value, s->normed, NULL, 0, R));
    }
    TRY(attend_gpu(x, l, n));
    return project_gpu(x, &l->out, s->x, s->y, s->x, 1, R);
}

static Err feed_block(const Decoding *x, const DecoderLayer *l, size_t n) {
    const Decoder *s = x->s;
    const size_t R = s->B * n;
    Projection up = l->up;
    up.bias = NULL; /* GELU adds it */
    TRY(norm_block(x, l, n));
    TRY(project_gpu(x, &up, s->g, s->normed, NULL, 0, R));
    TRY(gelu_forward_gpu(&x->on, s->g, NULL, l->up.bias, R, l->up.out));
    return project_gpu(x, &l->down, s->x, s->g, s->x, 1, R);
}

/* n positions of every row from *pos on, embedded in x; the last gives logits (B,K). */
static Err feed_embedded(const Decoding *x, size_t n) {
    const Decoder *s = x->s;
    const DecoderLayer *feed = &s->layer[s->n_layers - 1];
    const size_t widest = max_size(feed->up.out, s->heads * s->D);
    const int streams = n == 1 && s->B <= STREAM_ROWS && stream_bytes(s->B, widest) <= STREAM_BYTES;
    for (size_t i = 0; i < s->n_layers; i++) {
        const DecoderLayer *l = &s->layer[i];
        if (streams)
            TRY(l->kind == BLOCK_FEED ? feed_stream(x, l) : attention_stream(x, l));
        else
            TRY(l->kind == BLOCK_FEED ? feed_block(x, l, n) : attention_block(x, l, n));
    }
    if (streams) { /* the head's kernel begins with the norm */
        Stream a = stream_of(s, s->norm_weight, s->norm_bias, NULL);
        add_part(x, &a, 0, &s->head, s->raw);
        a.is_float = 1;
        TRY(stream_gpu(x->d, &a));
    } else {
        TRY(norm_forward_gpu(&x->on, s->last, s->mean, s->rstd, s->x, s->norm_weight, s->norm_bias, s->B, s->C, n,
                             n - 1));
        TRY(project_gpu(x, &s->head, s->raw, s->last, NULL, 1, s->B));
    }
    if (!s->variant.log_scalors && !s->variant.residual) return OK;
    return variant_from(x->d, s->logits, s->raw, &s->variant, x->pos, s->B, 1, s->K);
}

/* The same, of which the ids are in place */
static Err embed_positions(const Decoding *x, size_t n) {
    const Decoder *s = x->s;
    return embed_from(x->d, s->x, s->ids, s->token, s->position, x->pos, s->B, n, s->C);
}
static Err feed_decoder(const Decoding *x, size_t n) {
    TRY(embed_positions(x, n));
    return feed_embedded(x, n);
}

/* ---- Drawing, and what comes next ---- */

/* What the step after a draw begins with: position i of sample b, whose token was `token` */
typedef struct {
    int *pos;   /* (samples) */
    int prompt; /* positions in front of the tokens' */
    float *x;   /* (B,C) */
    const float *token, *position;
    size_t C;
} NextStep;

/* A block per sample: draws a token, goes on to the next position and embeds the token there. */
static __global__ void __launch_bounds__(DRAW_THREADS) draw_kernel(DrawStep a, NextStep n) {
    SHARED(DrawShared, s);
    const size_t b = blockIdx.x, pos = (size_t)n.pos[b], i = pos - (size_t)n.prompt;
    const float *token = n.token + (size_t)draw_one(s, a, b, i) * n.C, *position = n.position + (pos + 1) * n.C;
    __syncthreads();
    if (threadIdx.x == 0) n.pos[b] = (int)pos + 1;
    for (size_t c = threadIdx.x; i + 1 < a.N && c < n.C; c += DRAW_THREADS) {
        n.x[b * n.C + c] = token[c] + position[c];
        if (a.how->guided) n.x[(a.samples + b) * n.C + c] = token[c] + position[c];
    }
}

/* ---- A pass ---- */

static Err set_position(const Decoding *x, size_t pos) {
    int *all;
    TRY(mem_alloc(&all, x->s->B, sizeof *all, "positions"));
    for (size_t b = 0; b < x->s->B; b++) all[b] = (int)pos;
    const Err e = to_device(x->d, x->pos, all, x->s->B * sizeof *all);
    free(all);
    return e;
}

static Err decode_prompt_gpu(Device *d, const Decoder *s, size_t n) {
    const Decoding x = decoding_of(d, s);
    TRY(earlier_failure(d));
    TRY(set_position(&x, 0));
    if (x.by_steps) TRY(pack_weights(d, s, &x.step));
    return feed_decoder(&x, n);
}

static Err decode_step_gpu(Device *d, const Decoder *s, size_t pos) {
    const Decoding x = decoding_of(d, s);
    TRY(set_position(&x, pos));
    if (!x.by_steps) return feed_decoder(&x, 1);
    if (pos == 0) TRY(pack_weights(d, s, &x.step)); /* else before */
    return run_steps(d, &x.step, 1, 0);
}

static Err launch_draw(Device *d, const DrawStep *a, const NextStep *n) {
    LAUNCH(d, draw_kernel, (unsigned)a->samples, DRAW_THREADS, sizeof(DrawShared), *a, *n);
    return OK;
}

static Err draw_token(const Decoding *x) {
    const Decoder *s = x->s;
    const DrawStep a = draw_of(x);
    const NextStep n = {x->pos, (int)s->prompt, s->x, s->token, s->position, s->C};
    return launch_draw(x->d, &a, &n);
}

/* The token before is embedded already. */
static Err draw_step(const Decoding *x) {
    TRY(feed_embedded(x, 1));
    return draw_token(x);
}

/* A step as a graph, which starts all its kernels at once */
typedef struct {
    cudaGraph_t graph;
    cudaGraphExec_t ready;
} StepGraph;

static Err graph_make(StepGraph *g, const Decoding *x) {
    cudaStream_t stream = x->d->stream;
    g->graph = NULL, g->ready = NULL;
    TRY(cuda_error(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capturing a step"));
    const Err e = draw_step(x);
    const cudaError_t end = cudaStreamEndCapture(stream, &g->graph);
    TRY(e);
    TRY(cuda_error(end, "capturing a step"));
    return cuda_error(cudaGraphInstantiate(&g->ready, g->graph, 0), "preparing a step");
}
static Err graph_run(StepGraph *g, const Decoding *x) {
    return cuda_error(cudaGraphLaunch(g->ready, x->d->stream), "a step");
}
static void graph_free(StepGraph *g) {
    if (g->ready) cudaGraphExecDestroy(g->ready);
    if (g->graph) cudaGraphDestroy(g->graph);
}

static Err send_options(Decoding *x, const DrawOptions *o) {
    const Decoder *s = x->s;
    const size_t n = x->samples = x->step.draw.samples = o->guided ? s->B / 2 : s->B;
    const DrawHow how = {o->seed,        o->temperature, o->top_k,          o->known != NULL,
                         o->fit != NULL, o->guided,      (float)o->guidance};
    TRY(to_device(x->d, x->how, &how, sizeof how));
    TRY(to_device(x->d, x->stream, o->stream, n * sizeof *o->stream));
    TRY(device_zero(x->d, x->fit, n * sizeof *x->fit));
    if (o->known) TRY(to_device(x->d, x->known, o->known, n * s->N * sizeof *o->known));
    if (o->keep) TRY(to_device(x->d, x->keep, o->keep, s->N));
    TRY(device_zero(x->d, s->ids, s->B * sizeof *s->ids)); /* sos */
    return set_position(x, s->prompt);
}

/* Lets the caller know, between steps. */
static Err report(const Decoding *x, const DrawOptions *o, size_t done) {
    TRY(wait_for(x->d));
    return o->progress && o->progress(o->context, done) ? err("sampling was stopped") : OK;
}

static Err draw_by_steps(const Decoding *x, const DrawOptions *o, size_t done) {
    const size_t N = x->s->N;
    if (done == 0) TRY(pack_weights(x->d, x->s, &x->step)); /* else before the prompt */
    while (done < N) {
        const size_t left = N - done, n = left < BETWEEN_REPORTS ? left : (size_t)BETWEEN_REPORTS;
        TRY(run_steps(x->d, &x->step, n, 1));
        done += n;
        TRY(report(x, o, done));
    }
    return OK;
}

/* The first step runs as it is: it loads what it needs, which must not happen while a graph is captured. */
static Err draw_by_graph(const Decoding *x, const DrawOptions *o, size_t done, StepGraph *g) {
    const size_t N = x->s->N;
    if (done == 0) TRY(embed_positions(x, 1));
    if (done < N) {
        TRY(draw_step(x));
        done++;
    }
    if (done < N) TRY(graph_make(g, x));
    while (done < N) {
        for (size_t k = 0; k < BETWEEN_REPORTS && done < N; k++, done++) TRY(graph_run(g, x));
        TRY(report(x, o, done));
    }
    return OK;
}

static Err draw_all(const Decoding *x, const DrawOptions *o, StepGraph *g) {
    const size_t done = x->s->prompted ? 1 : 0;
    if (done) TRY(draw_token(x)); /* from the prompt's logits */
    TRY(x->by_steps ? draw_by_steps(x, o, done) : draw_by_graph(x, o, done, g));
    return wait_for(x->d);
}

static Err draw_gpu(Device *d, const Decoder *s, const DrawOptions *o, int32_t *tokens) {
    Decoding x = decoding_of(d, s);
    StepGraph g;
    memset(&g, 0, sizeof g);
    TRY(send_options(&x, o));
    const Err e = draw_all(&x, o, &g);
    graph_free(&g);
    TRY(e);
    TRY(to_host(d, tokens, x.tokens, x.samples * s->N * sizeof *tokens));
    if (!o->fit) return OK;
    double *fit;
    TRY(mem_alloc(&fit, x.samples, sizeof *fit, "weights of candidates"));
    const Err f = to_host(d, fit, x.fit, x.samples * sizeof *fit);
    for (size_t b = 0; f == OK && b < x.samples; b++) o->fit[b] += fit[b];
    free(fit);
    return f;
}
