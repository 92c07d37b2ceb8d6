/* optimizer.cu - what training does on a GPU with logits and gradients: the fused loss, AdamW, the moving average; and
 * parameter tables there. device.cu includes this file. */
#include "kernels/device.h"

/* ---- From raw logits to both losses and the gradient of the raw logits, in one kernel ----
 *
 * The posterior of x_{t-1} given x_t and x_0 takes at most three values in a row, at x_0, at x_t and elsewhere, so that
 * neither it nor the probabilities need be written down: with L_k the logits, lse their log-sum-exp and "rest" the
 * value elsewhere, sum_k q_k log(q_k/p_k) = rest (K log rest - sum_k L_k + K lse), corrected at x_0 and x_t. */

typedef struct {
    const float *raw;
    floatX *draw;                 /* NULL: no gradient */
    float *row_sum, *hard, *soft; /* (R) */
    const int32_t *x0, *target, *x_t, *t;
    Variant variant;
    float alpha[MAX_SCALES + 1], alphacum[MAX_SCALES + 1]; /* of the schedule */
    size_t R, N, K;
    float soft_weight, hard_weight; /* of a row's gradient */
} LossRows;

/* The three values of the posterior: those of posterior_row in diffusion.c */
typedef struct {
    float at_x0, at_xt, rest;
} RowPosterior;
static __device__ inline RowPosterior row_posterior(const LossRows *s, int t, int same, size_t K) {
    const double A = (double)s->alphacum[t - 1], a = (double)s->alpha[t], far0 = (1 - A) / (double)K,
                 fart = (1 - a) / (double)K;
    double rest = far0 * fart, at0 = (A + far0) * fart, att = far0 * (a + fart);
    if (same) at0 = att = (A + far0) * (a + fart);
    double sum = same ? (double)(K - 1) * rest + at0 : (double)(K - 2) * rest + at0 + att;
    if (!(sum > 0)) rest = att = 0, at0 = sum = 1;
    if (same) att = at0;
    const RowPosterior q = {(float)(at0 / sum), (float)(att / sum), (float)(rest / sum)};
    return q;
}

/* q log(q/p) for log p */
static __device__ inline double divergence(float q, double log_p) {
    return q > 1e-37f ? (double)q * (log((double)q) - log_p) : 0;
}

/* A warp per row: its logits are read three times, from cache after the first. */
static __global__ void loss_kernel(LossRows a) {
    const size_t r = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP, K = a.K;
    if (r >= a.R) return;
    const int t = a.t[r / a.N];
    const size_t x0 = (size_t)a.x0[r], xt = (size_t)a.x_t[r], target = (size_t)a.target[r];
    const RowVariant v = with_residual(row_variant(&a.variant, t, r % a.N), &a.variant, t, K);
    const RowPosterior q = row_posterior(&a, t, x0 == xt, K);
    const float *raw = a.raw + r * K;
    float largest = -HUGE_VALF, sum = 0, all = 0;
#define LOGIT(k) (raw[k] * v.scale + (a.variant.residual && (k) == xt ? v.same : v.different))
    for (size_t k = lane; k < K; k += WARP) largest = fmaxf(largest, LOGIT(k));
    largest = warp_max(largest);
    for (size_t k = lane; k < K; k += WARP) sum += expf(LOGIT(k) - largest), all += LOGIT(k) - largest;
    sum = warp_sum(sum), all = warp_sum(all);
    const double log_sum = log((double)sum);
    if (lane == 0) {
        const double log_x0 = (double)(LOGIT(x0) - largest) - log_sum, log_xt = (double)(LOGIT(xt) - largest) - log_sum;
        double soft =
            q.rest > 1e-37f ? (double)q.rest * ((double)K * (log((double)q.rest) + log_sum) - (double)all) : 0;
        soft += divergence(q.at_x0, log_x0) - divergence(q.rest, log_x0);
        if (x0 != xt) soft += divergence(q.at_xt, log_xt) - divergence(q.rest, log_xt);
        a.hard[r] = (float)(log_sum - (double)(LOGIT(target) - largest));
        a.soft[r] = (float)soft;
    }
    if (!a.draw) return;
    const float total = a.soft_weight + a.hard_weight, inverse = 1 / sum;
    float slope = 0;
    for (size_t k = lane; k < K; k += WARP) {
        const float posterior = k == x0 ? q.at_x0 : k == xt ? q.at_xt : q.rest;
        const float g =
            total * inverse * expf(LOGIT(k) - largest) - a.soft_weight * posterior - (k == target ? a.hard_weight : 0);
        slope += g * raw[k];
        a.draw[r * K + k] = to_floatX(g * v.scale);
    }
    slope = warp_sum(slope);
    if (lane == 0) a.row_sum[r] = slope * v.scale;
#undef LOGIT
}

/* sums[0], sums[1] = of hard and soft (R); one block, each thread in steps of the block, then in the order of
 * threads. */
enum { LOSS_THREADS = 256 };
static __global__ void add_losses_kernel(double *sums, const float *hard, const float *soft, size_t R) {
    SHARED(double, part);
    double h = 0, s = 0;
    for (size_t r = threadIdx.x; r < R; r += LOSS_THREADS) h += (double)hard[r], s += (double)soft[r];
    part[threadIdx.x] = h, part[LOSS_THREADS + threadIdx.x] = s;
    __syncthreads();
    if (threadIdx.x > 1) return;
    double sum = 0;
    for (unsigned k = 0; k < LOSS_THREADS; k++) sum += part[threadIdx.x * LOSS_THREADS + k];
    sums[threadIdx.x] = sum;
}

static size_t fused_loss_needs_gpu(size_t R) {
    return 3 * R * sizeof(float);
}

static Err fused_loss_gpu(const Compute *on, const FusedLoss *l) {
    Device *d = on->device;
    const size_t R = l->B * l->N;
    float *const scratch = (float *)on->scratch;
    LossRows a;
    memset(&a, 0, sizeof a);
    a.raw = l->raw, a.draw = (floatX *)l->draw, a.row_sum = scratch, a.hard = scratch + R, a.soft = scratch + 2 * R;
    a.x0 = l->x0, a.target = l->target, a.x_t = l->x_t, a.t = l->t, a.variant = l->variant;
    memcpy(a.alpha, l->alpha, ((size_t)l->T + 1) * sizeof *a.alpha);
    memcpy(a.alphacum, l->alphacum, ((size_t)l->T + 1) * sizeof *a.alphacum);
    a.R = R, a.N = l->N, a.K = l->K, a.soft_weight = l->soft_weight, a.hard_weight = l->hard_weight;
    TRY(earlier_failure(d));
    LAUNCH(d, loss_kernel, blocks_for(R, ROW_WARPS), ROW_WARPS * WARP, 0, a);
    LAUNCH(d, add_losses_kernel, 1, LOSS_THREADS, 2 * LOSS_THREADS * sizeof(double), l->sums, a.hard, a.soft, R);
    return l->draw && a.variant.log_scalors ? scalors_backward(d, l->dlog_scalors, a.row_sum, &a.variant, R) : OK;
}

/* ---- A parameter table on the GPU, and its updates ---- */

/* One kernel goes through all tensors: a block has a chunk, at most CHUNK elements of one tensor. */
enum { CHUNK = 2048, UPDATE_THREADS = 256 };
typedef struct {
    size_t start, offset; /* in every arena of a table that is trained; in the tensor */
    unsigned n, row;
    double decay;
    int untrained;
} Chunk;

static float *arena(const Device *d, int k) {
    return (float *)d->arena[k];
}

/* Where a tensor lies: at the same place of every arena, but for matrices of a table that only samples in bf16. They
 * have no value in float, and lie behind the others in the arena of bf16. So operand_of finds a tensor's bf16. */
static int keeps_value(const Params *p, const Param *row) {
    return !IS_BF16 || p->arena[1] || !row->matrix;
}

/* Of arena k: Adam's moments may be in bf16 */
static int in_bf16(const Params *p, int k) {
    return p->bf16_moments && (k == 2 || k == 3);
}
static size_t number_bytes(const Params *p, int k) {
    return in_bf16(p, k) ? sizeof(uint16_t) : sizeof(float);
}

/* Numbers between the beginnings of a row and of the next */
static size_t spacing(const Param *row) {
    return round_up(row->size, ALIGNMENT / sizeof(uint16_t));
}

/* How many linear layers of one shape begin with row i, each a weight and its bias */
static size_t alike_from(const Params *p, size_t i) {
    const Param *first = &p->row[i];
    size_t n = 0;
    for (; i + 1 < p->n; i += 2, n++) {
        const Param *weight = &p->row[i];
        if (!weight->matrix || weight->size != first->size) break;
        if (weight[1].matrix || weight[1].size != first[1].size) break;
    }
    return n;
}

/* Where a row lies in every arena of a table that is trained: in the table's order, but of linear layers alike first the
 * weights, then the biases. So GPT's key, query and value are one matrix, as those of the encoder-decoder are, which have
 * no bias. */
static size_t place_of(const Params *p, size_t row) {
    size_t place = 0;
    for (size_t i = 0; i < p->n;) {
        const size_t n = alike_from(p, i), weight = spacing(&p->row[i]), bias = n ? spacing(&p->row[i + 1]) : 0;
        if (n && row < i + 2 * n)
            return place + (row - i) / 2 * ((row - i) % 2 ? bias : weight) + (row - i) % 2 * n * weight;
        if (row == i) break;
        place += n ? n * (weight + bias) : weight;
        i += n ? 2 * n : 1;
    }
    return place;
}

static Err plan_rows(Device *d, const Params *p) {
    size_t values = 0, all = 0;
    TRY(mem_alloc(&d->row, p->n, sizeof *d->row, "a parameter table"));
    d->n_rows = p->n;
    for (size_t i = 0; i < p->n; i++) {
        all += spacing(&p->row[i]);
        if (keeps_value(p, &p->row[i])) values += spacing(&p->row[i]);
    }
    d->arena_floats[0] = values;
    TRY(device_alloc(&d->arena[0], values * sizeof(float), "parameters"));
    TRY(device_zero(d, d->arena[0], values * sizeof(float))); /* between tensors, too, where swap_kernel reads */
    static const char *const what[5] = {"", "gradients", "first moments", "second moments", "the moving average"};
    for (int k = 1; k < 5; k++) {
        if (!p->arena[k]) continue;
        d->arena_floats[k] = all;
        TRY(device_alloc(&d->arena[k], all * number_bytes(p, k), what[k]));
        TRY(device_zero(d, d->arena[k], all * number_bytes(p, k)));
    }
    if (IS_BF16) TRY(device_alloc(&d->arena[5], all * sizeof(floatX), "parameters in bf16"));
    for (size_t i = 0, v = 0, low = values; i < p->n; i++) {
        DeviceRow *r = &d->row[i];
        const int keeps = keeps_value(p, &p->row[i]);
        const size_t at = values == all ? place_of(p, i) : keeps ? v : low;
        *(keeps ? &v : &low) += spacing(&p->row[i]);
        if (keeps) r->value = arena(d, 0) + at;
        float **const slot[4] = {&r->grad, &r->m, &r->v, &r->ema};
        for (int k = 1; k < 5; k++) *slot[k - 1] = d->arena[k] && !in_bf16(p, k) ? arena(d, k) + at : NULL;
        r->m16 = p->bf16_moments && d->arena[2] ? (uint16_t *)d->arena[2] + at : NULL;
        r->v16 = p->bf16_moments && d->arena[3] ? (uint16_t *)d->arena[3] + at : NULL;
        r->weight = IS_BF16 ? (floatX *)d->arena[5] + at : (floatX *)(void *)r->value;
    }
    return OK;
}

static Err plan_chunks(Device *d, const Params *p) {
    Chunk *list;
    size_t n = 0;
    for (size_t i = 0; i < p->n; i++) n += ceil_div(p->row[i].size, CHUNK);
    TRY(mem_alloc(&list, n, sizeof *list, "chunks of parameters"));
    d->n_chunks = 0;
    for (size_t i = 0; i < p->n; i++)
        for (size_t at = 0; at < p->row[i].size; at += CHUNK) {
            Chunk *c = &list[d->n_chunks++];
            c->start = (size_t)(d->row[i].value - arena(d, 0)) + at;
            c->n = (unsigned)min_size(CHUNK, p->row[i].size - at);
            c->offset = at, c->row = (unsigned)i;
            c->decay = p->row[i].decay, c->untrained = p->row[i].untrained;
        }
    Err e = device_alloc(&d->chunks, n * sizeof *list, "chunks of parameters");
    if (e == OK) e = to_device(d, d->chunks, list, n * sizeof *list);
    if (e == OK) e = wait_for(d);
    free(list);
    return e;
}

/* Host numbers as floatX, a piece at a time. */
static Err send_low(Device *d, floatX *to, const float *from, size_t n) {
    enum { PIECE = 1 << 18 };
    floatX *piece;
    TRY(mem_alloc(&piece, min_size(n, PIECE), sizeof *piece, "a piece of a matrix"));
    Err e = OK;
    for (size_t at = 0; e == OK && at < n; at += PIECE) {
        const size_t length = min_size(n - at, PIECE);
        for (size_t k = 0; k < length; k++) piece[k] = to_floatX(from[at + k]);
        e = to_device(d, to + at, piece, length * sizeof *piece);
        if (e == OK) e = wait_for(d);
    }
    free(piece);
    return e;
}

static Err send_row(Device *d, const Param *row, DeviceRow *to) {
    const size_t bytes = row->size * sizeof(float);
    const float *const from[4] = {row->m, row->v, row->ema, row->value};
    float *const there[4] = {to->m, to->v, to->ema, to->value};
    for (int k = 0; k < 4; k++)
        if (from[k] && there[k]) TRY(to_device(d, there[k], from[k], bytes));
    if (row->m16 && to->m16) TRY(to_device(d, to->m16, row->m16, row->size * sizeof *to->m16));
    if (row->v16 && to->v16) TRY(to_device(d, to->v16, row->v16, row->size * sizeof *to->v16));
    if (row->value) return IS_BF16 ? send_low(d, to->weight, row->value, row->size) : OK;
    if (!IS_BF16 || row->packed.format != WEIGHTS_BF16)
        return err("'%s' is packed for the CPU; on the GPU matrices are f32 or bf16", row->name);
    return to_device(d, to->weight, row->packed.data, row->size * sizeof(floatX));
}

static Err send_params(Device *d, const Params *p) {
    int changed = !d->row;
    for (int k = 1; k < 5; k++) changed |= (p->arena[k] != NULL) != (d->arena[k] != NULL);
    if (changed) {
        free_rows(d);
        TRY(plan_rows(d, p));
        if (p->arena[1]) TRY(plan_chunks(d, p));
    }
    d->changes++;
    for (size_t i = 0; i < p->n; i++) TRY(send_row(d, &p->row[i], &d->row[i]));
    return wait_for(d);
}

static void send_part(Device *d, const Params *p, size_t row, size_t at, size_t n) {
    const DeviceRow *r = &d->row[row];
    const Param *from = &p->row[row];
    float *const to[] = {r->value, r->m, r->v, r->ema};
    const real *const part[] = {from->value, from->m, from->v, from->ema};
    for (int k = 0; k < 4; k++)
        if (to[k] && part[k]) keep_failure(d, to_device(d, to[k] + at, part[k] + at, n * sizeof(float)));
    if (r->m16 && from->m16) keep_failure(d, to_device(d, r->m16 + at, from->m16 + at, n * sizeof *r->m16));
    if (r->v16 && from->v16) keep_failure(d, to_device(d, r->v16 + at, from->v16 + at, n * sizeof *r->v16));
    if (IS_BF16) keep_failure(d, send_low(d, r->weight + at, from->value + at, n));
    d->changes++;
}

static Err fetch_params(Device *d, Params *p) {
    TRY(earlier_failure(d));
    if (!d->row) return err("parameters were never sent to the GPU");
    for (size_t i = 0; i < p->n; i++) {
        const DeviceRow *r = &d->row[i];
        real *const to[5] = {p->row[i].value, p->row[i].grad, p->row[i].m, p->row[i].v, p->row[i].ema};
        const float *const from[5] = {r->value, r->grad, r->m, r->v, r->ema};
        for (int k = 0; k < 5; k++)
            if (to[k] && from[k] && p->arena[k]) TRY(to_host(d, to[k], from[k], p->row[i].size * sizeof(float)));
        if (p->row[i].m16 && r->m16) TRY(to_host(d, p->row[i].m16, r->m16, p->row[i].size * sizeof *r->m16));
        if (p->row[i].v16 && r->v16) TRY(to_host(d, p->row[i].v16, r->v16, p->row[i].size * sizeof *r->v16));
    }
    return OK;
}

/* ---- Updates ---- */

typedef struct {
    float *value, *grad, *m, *v, *ema;
    uint16_t *m16, *v16; /* instead of m and v; NULL: those */
    floatX *weight;
    int adam;                                             /* else only the moving average */
    float rate, inverse, eps, beta1, beta2, rest1, rest2; /* as in Update */
    double lr, decay_scale;                               /* of the weights' decay, beside the tensor's own */
    float step;                                           /* of the moving average; 0: none */
    uint64_t stream;                                      /* of row 0, for moments in bf16 */
} TableUpdate;

static __device__ inline float bf16_value(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* round_at_random of optimizer.c */
static __device__ inline uint16_t rounded_at_random(float x, uint32_t random) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7f800000u) != 0x7f800000u)
        bits += random & 0xffffu;
    else if (bits & 0x7fffffu)
        bits |= 0x400000u;
    return (uint16_t)(bits >> 16);
}

static __device__ inline float adamw_element(const TableUpdate *a, float keep, float w, size_t i) {
    const float g = a->grad[i], m = a->beta1 * a->m[i] + a->rest1 * g, v = a->beta2 * a->v[i] + a->rest2 * g * g;
    a->m[i] = m, a->v[i] = v;
    return keep * w - a->rate * m / (sqrtf(v) * a->inverse + a->eps);
}

/* The bits of adamw_bf16_piece; random: a number of the element's. */
static __device__ inline float adamw_bf16_element(const TableUpdate *a, float keep, float w, size_t i,
                                                  uint32_t random) {
    const float g = a->grad[i], m = fmaf(a->rest1, g, a->beta1 * bf16_value(a->m16[i]));
    const float v = fmaf(a->rest2 * g, g, a->beta2 * bf16_value(a->v16[i]));
    const float change = a->rate * m / fmaf(sqrtf(v), a->inverse, a->eps);
    a->m16[i] = rounded_at_random(m, random), a->v16[i] = rounded_at_random(v, random >> 16);
    return fmaf(keep, w, -change);
}

/* AdamW, then the moving average of what it left, then the copy in floatX, reading and writing everything once. */
static __global__ void update_kernel(TableUpdate a, const Chunk *chunks) {
    const Chunk c = chunks[blockIdx.x];
    const int adam = a.adam && !c.untrained;
    const float keep = (float)(1 - a.lr * c.decay * a.decay_scale);
    for (unsigned k = threadIdx.x; k < c.n; k += UPDATE_THREADS) {
        const size_t i = c.start + k;
        float w = a.value[i];
        if (adam) {
            uint32_t random[4];
            if (a.m16) philox(random, 0, a.stream + ((uint64_t)c.row << 32), (c.offset + k) / 4);
            w = a.m16 ? adamw_bf16_element(&a, keep, w, i, random[(c.offset + k) % 4]) : adamw_element(&a, keep, w, i);
            a.value[i] = w;
            if (IS_BF16) a.weight[i] = to_floatX(w);
        }
        if (a.step != 0) a.ema[i] -= a.step * (a.ema[i] - w);
    }
}

static Err update(Device *d, const Params *p, const AdamW *o, uint64_t step, float ema_step) {
    TableUpdate a;
    memset(&a, 0, sizeof a);
    if (!d->row || (o && !d->arena[2]) || (ema_step != 0 && !d->arena[4]))
        return err("an update of what was never sent");
    a.value = arena(d, 0), a.grad = arena(d, 1), a.ema = arena(d, 4);
    if (p->bf16_moments)
        a.m16 = (uint16_t *)d->arena[2], a.v16 = (uint16_t *)d->arena[3];
    else
        a.m = arena(d, 2), a.v = arena(d, 3);
    a.weight = (floatX *)d->arena[5], a.adam = o != NULL, a.step = ema_step;
    if (o) {
        const double correction1 = 1 - pow(o->beta1, (double)step), correction2 = 1 - pow(o->beta2, (double)step);
        a.beta1 = (float)o->beta1, a.beta2 = (float)o->beta2, a.eps = (float)o->eps;
        a.rest1 = (float)(1 - o->beta1), a.rest2 = (float)(1 - o->beta2);
        a.rate = (float)(o->lr / correction1), a.inverse = (float)(1 / sqrt(correction2));
        a.lr = o->lr, a.decay_scale = o->decay_scale, a.stream = rng_stream(RNG_ROUND, 0, step & 0xffffffffu);
    }
    LAUNCH(d, update_kernel, (unsigned)d->n_chunks, UPDATE_THREADS, 0, a, (const Chunk *)d->chunks);
    return OK;
}

static void update_params(Device *d, const Params *p, const AdamW *o, uint64_t step, float ema_step) {
    d->changes++;
    keep_failure(d, update(d, p, o, step, ema_step));
}

static void zero_grad_cuda(Device *d) {
    if (d->arena[1]) keep_failure(d, device_zero(d, d->arena[1], d->arena_floats[1] * sizeof(float)));
}

/* sums[block] = sum of squares of its elements, in steps of the grid; the order of a warp's lanes is fixed too. */
static __global__ void squares_kernel(double *sums, const float *x, size_t n) {
    SHARED(double, part);
    double sum = 0;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        sum += (double)x[i] * (double)x[i];
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (unsigned k = 1; k < blockDim.x / WARP; k++) sum += part[k];
    sums[blockIdx.x] = sum;
}

static Err squares(Device *d, double *sum) {
    double part[SUM_BLOCKS];
    LAUNCH(d, squares_kernel, SUM_BLOCKS, UPDATE_THREADS, UPDATE_THREADS / WARP * sizeof(double), d->sums, arena(d, 1),
           d->arena_floats[1]);
    TRY(to_host(d, part, d->sums, sizeof part));
    for (int k = 0; k < SUM_BLOCKS; k++) *sum += part[k];
    return OK;
}

static double grad_norm_cuda(Device *d) {
    double sum = 0;
    if (!d->arena[1]) return 0;
    const Err e = squares(d, &sum);
    keep_failure(d, e);
    return e == OK && d->failed == OK ? sqrt(sum) : (double)NAN;
}

static __global__ void swap_kernel(float *value, float *ema, floatX *weight, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float w = ema[i];
    ema[i] = value[i], value[i] = w;
    if (IS_BF16) weight[i] = to_floatX(w);
}

static Err swap_arenas(Device *d) {
    const size_t n = d->arena_floats[4];
    LAUNCH(d, swap_kernel, blocks_for(n, UPDATE_THREADS), UPDATE_THREADS, 0, arena(d, 0), arena(d, 4),
           (floatX *)d->arena[5], n);
    return OK;
}

static void swap_ema_cuda(Device *d) {
    d->changes++;
    if (d->arena[0] && d->arena[4]) keep_failure(d, swap_arenas(d));
}
