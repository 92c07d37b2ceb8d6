/* draw.cu - drawing one token from logits on a GPU, as sample_probs and sample_pick of diffusion.c do it, by a block.
 *
 * decode.cu includes this file. */
#include "kernels/device.h"

enum { DRAW_THREADS = 256 /* values of a byte, too */ };

/* What a pass draws by, in memory of the GPU, where the steps that a graph repeats find it */
typedef struct {
    uint64_t seed;
    double temperature;
    size_t top_k;
    int forced, fitted, guided;
    float guidance;
} DrawHow;

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
    const DrawHow *how;
    const uint64_t *stream;
    const int32_t *known;
    const uint8_t *keep;
    double *fit;
    int32_t *tokens, *ids; /* (samples,N) and what the next step reads (B) */
    size_t samples, N;
    int K;
} DrawStep;

/* A block draws token i of sample b, -1 if there are no probabilities. Guided, the sample's other row is `samples`
 * rows on. */
static __device__ inline int draw_one(DrawShared *s, const DrawStep &a, size_t b, size_t i) {
    float *row = a.logits + b * (size_t)a.K;
    if (a.how->guided) mix_rows(row, row + a.samples * (size_t)a.K, a.how->guidance, a.K);
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
    if (threadIdx.x == 0) a.tokens[b * a.N + i] = token;
    token = token < 0 ? 0 : token;
    if (threadIdx.x == 0) a.ids[b] = token;
    if (threadIdx.x == 0 && a.how->guided) a.ids[a.samples + b] = token;
    return token;
}
