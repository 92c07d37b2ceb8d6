/* attention_90a.cu - attention by warpgroups, on GPUs of compute capability 9.0.
 *
 * The same as the kernels of attention.cu, for heads of up to 64 channels: wgmma takes its operands from shared
 * memory, and the tensor memory accelerator puts them there, without addresses in registers or turns of threads.
 * Code for 90a alone has these instructions (CUDA_ARCH="80 90a"); where it is not, or the GPU or the shape another,
 * attention.cu's kernels are used. device.cu includes this file.
 *
 * A box is BOX rows of a head. A block has GROUPS warpgroups. Each has boxes of its own; others pass, in pairs, through
 * stages of shared memory, the same for all groups. What is multiplied, and what is left of it in registers:
 *
 *     own          pass         products
 *     q            k, v         p = q k^T                         out += p v                       forward
 *     q, dy        k, v         p = q k^T       dp = dy v^T       dq += ds k                       backward of queries
 *     k, v         q, dy        p^T = k q^T     dp^T = v dy^T     dv += p^T dy     dk += ds^T q    backward of keys
 *
 * Each p is begun ahead of the sums of the box before, and each dp behind them: tensor cores add up and multiply while
 * threads make probabilities of p. No sum is in two groups: all bits are the same whoever comes first.
 *
 * A stage goes round: the block's first thread asks for a pair (ask_for_box), all wait until it is there
 * (wait_for_box), and each warp gives it back when its products have read it (give_back): that of a box while it is at
 * the next. The first thread asks again another box later, so that it does not wait for the slowest warp. */
#include "kernels/device.h"

#if defined(CUDA_ON_CPU) || !defined(FLOATX_BF16)
static Err find_groups(Device *) {
    return OK;
}
static Err attention_forward_best_gpu(const Compute *on, real *y, real *saved, const real *q, const real *k,
                                      const real *v, const Attention *s) {
    return attention_forward_gpu(on, y, saved, q, k, v, s);
}
static Err attend_backward_best(Device *d, const AttendBackward *x) {
    return attend_backward(d, x);
}
#else

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define GROUPS_HERE 1
#else
#define GROUPS_HERE 0
#endif

enum { BOX = 64, BOX_BYTES = BOX * BOX * sizeof(floatX), GROUP = 128, GROUPS = 2 };
enum { GROUPS_THREADS = GROUPS * GROUP, GROUPS_ALIGNMENT = 1024 };

/* Twelve boxes: OWN of each group, and stages of what passes; sums of the queries that pass in backward */
template <int OWN> struct GroupsShared {
    enum { STAGES = 6 - OWN };
    floatX own[GROUPS][OWN][BOX][BOX];
    struct {
        floatX first[BOX][BOX], second[BOX][BOX];
    } stage[STAGES];
    Sums sums[STAGES][BOX];
    uint64_t own_full, full[STAGES], empty[STAGES];
};
template <int OWN> static __device__ inline GroupsShared<OWN> *groups_shared() {
    SHARED(unsigned char, bytes);
    const unsigned past = shared_address(bytes) % GROUPS_ALIGNMENT;
    return (GroupsShared<OWN> *)(void *)(bytes + (GROUPS_ALIGNMENT - past) % GROUPS_ALIGNMENT);
}

/* The tensors of own boxes and of those that pass, as the accelerator sees them: (B,T,row), boxes of BOX x BOX */
typedef struct {
    CUtensorMap own[2], pass[2];
} GroupsMaps;

/* Where a thread's group is: its own rows begin at `mine`, those of the warp at `first`, and the thread has i and i + 8. */
typedef struct {
    HeadAt at;
    unsigned group, mine, first, i;
} GroupAt;
static __device__ inline GroupAt group_at(const Attention *s, size_t T) {
    GroupAt g = {head_at<1>(s, T, GROUPS * BOX), __shfl_sync(0xffffffffu, threadIdx.x / GROUP, 0), 0, 0, 0};
    g.mine = g.at.first + g.group * BOX, g.first = g.mine + threadIdx.x % GROUP / WARP * 16;
    g.i = g.first + threadIdx.x % WARP / 4;
    return g;
}

/* What the first thread asks for: `boxes` boxes of rows, from box `first` on, of head `column` / D of batch row b; with the
 * sums of these rows if there are any */
typedef struct {
    const GroupsMaps *maps;
    const Sums *sums;
    unsigned column, b, first, boxes;
} Wanted;

static __device__ inline Wanted wanted_boxes(const GroupsMaps *maps, const Sums *sums, const Attention *s,
                                             const HeadAt *at, unsigned first, unsigned end) {
    const unsigned heads = (unsigned)s->heads;
    return {maps, sums, at->head % heads * (unsigned)s->D, at->head / heads, first, first < end ? end - first : 0};
}

/* Box n, if there is one, in the place of box n - STAGES, which all warps have given back or soon will */
template <int OWN> static __device__ inline void ask_for_box(GroupsShared<OWN> *x, const Wanted *w, unsigned n) {
    const unsigned stage = n % x->STAGES, round = n / x->STAGES, row = (w->first + n) * BOX;
    if (threadIdx.x == 0 && n < w->boxes) {
        uint64_t *full = &x->full[stage];
        if (round) barrier_wait(&x->empty[stage], (round - 1) % 2);
        barrier_expect(full, 2 * BOX_BYTES + (w->sums ? sizeof x->sums[stage] : 0));
        copy_box(x->stage[stage].first, &w->maps->pass[0], w->column, row, w->b, full);
        copy_box(x->stage[stage].second, &w->maps->pass[1], w->column, row, w->b, full);
        if (w->sums) bulk_copy(x->sums[stage], w->sums + row, sizeof x->sums[stage], full);
    }
    __syncwarp();
}
template <int OWN> static __device__ inline void give_back(GroupsShared<OWN> *x, unsigned n) {
    __syncwarp(); /* all of the warp have read the sums */
    if (threadIdx.x % WARP == 0) barrier_arrive(&x->empty[n % x->STAGES]);
}
template <int OWN> static __device__ inline void wait_for_box(GroupsShared<OWN> *x, unsigned n) {
    barrier_wait(&x->full[n % x->STAGES], n / x->STAGES % 2);
}

/* Where a group is at box n, and no longer at what was before */
template <int OWN> static __device__ inline void ask_at_box(GroupsShared<OWN> *x, const Wanted *w, unsigned n) {
    if (n > 1) ask_for_box(x, w, n - 2 + x->STAGES);
}
/* Boxes n.. up to `end`, which are the other group's alone */
template <int OWN>
static __device__ inline void let_pass(GroupsShared<OWN> *x, const Wanted *w, unsigned n, unsigned end) {
    for (; n < end; n++) ask_at_box(x, w, n), wait_for_box(x, n), give_back(x, n);
}

/* Zeros for what the group's own boxes have of the next head, from column D on */
template <int OWN> static __device__ inline void clear_own(floatX (*own)[BOX][BOX], unsigned D, unsigned group) {
    for (unsigned i = threadIdx.x % GROUP; i < OWN * BOX * BOX / PACK; i += GROUP) {
        const unsigned row = i / (BOX / PACK), unit = i % (BOX / PACK);
        Pack *at = (Pack *)(void *)&own[row / BOX][row % BOX][(unit ^ row % 8) * PACK], pack = *at;
        if (unit * PACK + PACK <= D) continue;
#pragma unroll
        for (unsigned e = 0; e < PACK; e++)
            if (unit * PACK + e >= D) pack.at[e] = to_floatX(0);
        *at = pack;
    }
    see_stores();
    group ? group_meet<1>() : group_meet<0>();
}

/* A block begins: own boxes from row `own_row` on, and the first that pass, are on their way; returns with the own ones. */
template <int OWN>
static __device__ inline void begin_groups(GroupsShared<OWN> *x, const Wanted *w, unsigned own_row, unsigned D,
                                           unsigned group) {
    if (threadIdx.x == 0) {
        barrier_init(&x->own_full, 1);
        for (unsigned n = 0; n < x->STAGES; n++)
            barrier_init(&x->full[n], 1), barrier_init(&x->empty[n], GROUPS * GROUP / WARP);
        barrier_fence();
        barrier_expect(&x->own_full, GROUPS * OWN * BOX_BYTES);
        for (unsigned g = 0; g < GROUPS; g++)
            for (unsigned o = 0; o < OWN; o++)
                copy_box(x->own[g][o], &w->maps->own[o], w->column, own_row + g * BOX, w->b, &x->own_full);
    }
    __syncthreads();
    for (unsigned n = 0; n < x->STAGES; n++) ask_for_box(x, w, n);
    barrier_wait(&x->own_full, 0);
    if (D < BOX) clear_own<OWN>(x->own[group], D, group);
}

/* p = a b^T of two boxes; begun only */
static __device__ inline void begin_product(float (*p)[4], const floatX (*a)[BOX], const floatX (*b)[BOX]) {
#pragma unroll
    for (unsigned k = 0; k < BOX / 16; k++) multiply_boxes(p, a, b, k, k > 0);
    group_commit();
}
/* sum += p b, with p rounded to bf16 in a; begun only, and not committed */
static __device__ inline void begin_sum(float (*sum)[4], const unsigned (*a)[4], const floatX (*b)[BOX]) {
#pragma unroll
    for (unsigned k = 0; k < BOX / 16; k++) weigh_box(sum, a[k], b, k);
}
static __device__ inline void round_box(unsigned (*a)[4], const float (*p)[4]) {
#pragma unroll
    for (unsigned k = 0; k < BOX / 16; k++) round_pairs(a[k], p + 2 * k);
}

/* Rows i and i + 8 of x, if it has so many, stride apart, = factor[0 and 1] * sum */
static __device__ inline void store_sum(floatX *x, unsigned i, unsigned rows, unsigned stride, unsigned D,
                                        const float (*sum)[4], float factor, float factor_8) {
    const unsigned c = threadIdx.x % 4 * 2;
#pragma unroll
    for (unsigned r = 0; r < 2; r++) {
        const float by = r ? factor_8 : factor;
        if (i + 8 * r >= rows) continue;
        unsigned *row = (unsigned *)(void *)(x + (size_t)(i + 8 * r) * stride + c);
#pragma unroll
        for (unsigned n = 0; n < BOX / 8; n++)
            if (n * 8 + c < D) row[n * 4] = bf16_pair(by * sum[n][2 * r], by * sum[n][2 * r + 1]);
    }
}

/* ---- Forward ---- */

/* The group's queries see box n, whose scores are in p. While the tensor cores weigh its values they have the scores of
 * the next box to do, if there are MORE, and the threads the powers. */
template <bool MORE>
static __device__ inline void attend_box(GroupsShared<1> *x, const Wanted *w, const Attention *s, Softmax *soft,
                                         float (*p)[4], float (*out)[4], const floatX (*queries)[BOX], unsigned first,
                                         Sight sight, unsigned n, float scale) {
    float peak[2];
    unsigned a[BOX / 16][4];
    if (sight.all < n * BOX + BOX) hide<BOX>(s, p, first, n * BOX);
    const bool higher = find_peaks<BOX>(peak, soft, p);
    group_wait<0>();
    hold<BOX / 8>(out);
    if (n) give_back(x, n - 1);
    ask_at_box(x, w, n);
    if (higher) rise<BOX>(soft, peak, out, scale);
    take_powers<BOX>(soft, p, scale);
    round_box(a, p);
    if (MORE) wait_for_box(x, n + 1);
    hold<BOX / 8>(out), hold<BOX / 16>(a), hold<BOX / 8>(p);
    group_fence();
    if (MORE) begin_product(p, queries, x->stage[(n + 1) % x->STAGES].first);
    begin_sum(out, a, x->stage[n % x->STAGES].second);
    group_commit();
    group_wait<MORE ? 1 : 0>(); /* the scores of the next */
    hold<BOX / 8>(p);
}

/* Every box of keys that one of the group's queries sees: `mine`, of all that the block has */
static __device__ inline void attend_boxes(GroupsShared<1> *x, const Wanted *w, const Attention *s, Softmax *soft,
                                           float (*out)[4], const floatX (*queries)[BOX], unsigned first, unsigned mine,
                                           float scale) {
    const Sight sight = warp_sight(s, first);
    float p[BOX / 8][4];
    wait_for_box(x, 0);
    group_fence();
    begin_product(p, queries, x->stage[0].first);
    group_wait<0>();
    hold<BOX / 8>(p);
#pragma unroll 1
    for (unsigned n = 0; n + 1 < mine; n++) attend_box<true>(x, w, s, soft, p, out, queries, first, sight, n, scale);
    attend_box<false>(x, w, s, soft, p, out, queries, first, sight, mine - 1, scale);
    hold<BOX / 8>(out);
    give_back(x, mine - 1);
    let_pass(x, w, mine, w->boxes);
}

/* Boxes of keys that queries i.. see, up to a tile of them */
static __device__ inline unsigned boxes_seen(const Attention *s, unsigned i, unsigned tile) {
    return (visible_keys(s, last_query(s, i, tile)) + BOX - 1) / BOX;
}

static __global__ void __launch_bounds__(GROUPS_THREADS, 2)
    attend_groups_kernel(const __grid_constant__ GroupsMaps maps, Attention s, floatX *y, float *lse) {
#if GROUPS_HERE
    GroupsShared<1> *x = groups_shared<1>();
    const GroupAt g = group_at(&s, s.Tq);
    const unsigned D = (unsigned)s.D, Tq = (unsigned)s.Tq;
    const Wanted wanted = wanted_boxes(&maps, NULL, &s, &g.at, 0, boxes_seen(&s, g.at.first, GROUPS * BOX));
    const float scale = LOG2_E * rsqrtf((float)D);
    Softmax soft = {{-HUGE_VALF, -HUGE_VALF}, {0, 0}};
    float out[BOX / 8][4] = {};
    begin_groups(x, &wanted, g.at.first, D, g.group);
    attend_boxes(x, &wanted, &s, &soft, out, x->own[g.group][0], g.first, g.mine < Tq ? boxes_seen(&s, g.mine, BOX) : 1,
                 scale);
    const float sum[2] = {quad_sum(soft.sum[0]), quad_sum(soft.sum[1])};
    store_sum(y + g.at.outs, g.i, Tq, g.at.inner, D, out, 1 / sum[0], 1 / sum[1]);
#pragma unroll
    for (unsigned r = 0; r < 2; r++)
        if (lse && threadIdx.x % 4 == 0 && g.i + 8 * r < Tq)
            lse[g.at.row + g.i + 8 * r] = scale * soft.largest[r] + log2_approx(sum[r]);
#endif
}

/* ---- Backward: of queries, or of KEYS and values ---- */

/* A group's work: boxes `from` to `to` of those that the block has. */
template <bool KEYS> struct Back {
    const floatX (*own)[BOX][BOX];
    unsigned first, from, to; /* first: of the warp's own rows */
    Sums mine[2];             /* of the thread's queries, where these are its own */
    float scale, sum[2][BOX / 8][4];
};

/* Box n, whose p has come. While the tensor cores add up what the box before gave, and multiply dp, the threads take the
 * probabilities. */
template <bool KEYS, bool MORE>
static __device__ inline void back_box(GroupsShared<2> *x, const Wanted *w, const Attention *s, Back<KEYS> *g,
                                       float (*p)[4], float (*dp)[4], unsigned n) {
    const unsigned stage = n % x->STAGES, row = (w->first + n) * BOX;
    const Sums *sums = KEYS ? x->sums[stage] : g->mine;
    unsigned a[2][BOX / 16][4];
    group_fence();
    begin_product(dp, g->own[1], x->stage[stage].second);
    if (KEYS && hides_turned(s, g->first, row)) hide_turned<BOX>(s, p, g->first, row);
    if (!KEYS && visible_keys(s, g->first) < row + BOX) hide<BOX>(s, p, g->first, row);
    take_probabilities<BOX, KEYS>(p, sums, g->scale);
    group_wait<0>();
    hold<BOX / 8>(dp), hold<BOX / 8>(g->sum[0]);
    if (KEYS) hold<BOX / 8>(g->sum[1]);
    if (n > g->from) give_back(x, n - 1);
    ask_at_box(x, w, n);
    take_gradients<BOX, KEYS>(dp, p, sums);
    round_box(a[0], dp);
    if (KEYS) round_box(a[1], p);
    if (MORE) wait_for_box(x, n + 1);
    hold<BOX / 8>(p), hold<BOX / 8>(g->sum[0]), hold<BOX / 16>(a[0]);
    if (KEYS) hold<BOX / 8>(g->sum[1]), hold<BOX / 16>(a[1]);
    group_fence();
    if (MORE) begin_product(p, g->own[0], x->stage[(n + 1) % x->STAGES].first);
    begin_sum(g->sum[0], a[0], x->stage[stage].first);
    if (KEYS) begin_sum(g->sum[1], a[1], x->stage[stage].second);
    group_commit();
    group_wait<MORE && KEYS ? 1 : 0>(); /* the next p; and dq, for two blocks at a time leave no registers for `a` */
    hold<BOX / 8>(p);
}

/* All boxes of the block, of which the group's own rows have to do with some */
template <bool KEYS>
static __device__ inline void back_boxes(GroupsShared<2> *x, const Wanted *w, const Attention *s, Back<KEYS> *g) {
    float p[BOX / 8][4], dp[BOX / 8][4];
    let_pass(x, w, 0, g->from);
    if (g->from < g->to) {
        wait_for_box(x, g->from);
        group_fence();
        begin_product(p, g->own[0], x->stage[g->from % x->STAGES].first);
        group_wait<0>();
        hold<BOX / 8>(p);
#pragma unroll 1
        for (unsigned n = g->from; n + 1 < g->to; n++) back_box<KEYS, true>(x, w, s, g, p, dp, n);
        back_box<KEYS, false>(x, w, s, g, p, dp, g->to - 1);
        hold<BOX / 8>(g->sum[0]);
        if (KEYS) hold<BOX / 8>(g->sum[1]);
        give_back(x, g->to - 1);
    }
    let_pass(x, w, g->to, w->boxes);
}

template <bool KEYS>
static __global__ void __launch_bounds__(GROUPS_THREADS, KEYS ? 1 : 2)
    attend_back_groups_kernel(const __grid_constant__ GroupsMaps maps, AttendBackward a) {
#if GROUPS_HERE
    GroupsShared<2> *x = groups_shared<2>();
    const Attention *s = &a.s;
    const unsigned D = (unsigned)s->D, Tq = (unsigned)s->Tq, Tk = (unsigned)s->Tk;
    const GroupAt g = group_at(s, KEYS ? Tk : Tq);
    const unsigned begin = KEYS ? first_query(s, g.at.first) / BOX : 0,
                   end = KEYS ? (Tq + BOX - 1) / BOX : boxes_seen(s, g.at.first, GROUPS * BOX);
    const Wanted wanted = wanted_boxes(&maps, KEYS ? a.sums + g.at.sums : NULL, s, &g.at, begin, end);
    const float factor = rsqrtf((float)D);
    Back<KEYS> back = {x->own[g.group], g.first, 0, wanted.boxes, {}, LOG2_E * factor, {}};
    if (KEYS) back.from = g.mine < Tk ? min(first_query(s, g.mine) / BOX - begin, back.to) : back.to;
    if (!KEYS) back.to = g.mine < Tq ? boxes_seen(s, g.mine, BOX) : 0;
    if (!KEYS && g.mine < Tq) back.mine[0] = a.sums[g.at.sums + g.i], back.mine[1] = a.sums[g.at.sums + g.i + 8];
    begin_groups(x, &wanted, g.at.first, D, g.group);
    back_boxes(x, &wanted, s, &back);
    if (KEYS) {
        store_sum(a.dk + g.at.keys, g.i, Tk, g.at.kv_row, D, back.sum[0], factor, factor);
        store_sum(a.dv + g.at.keys, g.i, Tk, g.at.kv_row, D, back.sum[1], 1, 1);
    } else {
        store_sum(a.dq + g.at.queries, g.i, Tq, g.at.q_row, D, back.sum[0], factor, factor);
    }
#endif
}

/* ---- Launching ---- */

static __global__ void groups_here_kernel(int *here) {
    *here = GROUPS_HERE;
}

typedef CUresult (*EncodeMap)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                              const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* d->encode_map: the driver's function if the code that this GPU runs has warpgroups, else NULL */
static Err find_groups(Device *d) {
    int here = 0;
    cudaDriverEntryPointQueryResult found;
    LAUNCH(d, groups_here_kernel, 1, WARP, 0, (int *)(void *)d->sums);
    TRY(to_host(d, &here, d->sums, sizeof here));
    if (!here) return OK;
#if CUDART_VERSION >= 12050
    return cuda_error(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &d->encode_map, 12000, cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
#else
    return cuda_error(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &d->encode_map, cudaEnableDefault, &found),
                      "cuTensorMapEncodeTiled");
#endif
}

static bool attends_in_groups(const Device *d, const Attention *s) {
    return d->encode_map && s->D <= BOX && s->D % 2 == 0 && s->heads * s->D % PACK == 0 && s->q_row % PACK == 0 &&
           s->kv_row % PACK == 0;
}

/* x (B,T,inner), rows `row` apart, batch rows `apart` */
static Err map_boxes(const Device *d, CUtensorMap *map, const floatX *x, const Attention *s, size_t T, size_t row,
                     size_t apart) {
    const cuuint64_t size[3] = {s->heads * s->D, T, s->B}, stride[2] = {row * sizeof *x, apart * row * sizeof *x};
    const cuuint32_t box[3] = {BOX, BOX, 1}, step[3] = {1, 1, 1};
    const CUresult e = ((EncodeMap)d->encode_map)(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, (void *)x, size, stride,
                                                  box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                                  CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return e == CUDA_SUCCESS ? OK : err("CUDA: cuTensorMapEncodeTiled: error %d", (int)e);
}

/* Maps of queries (q, or dy of rows of y), and of keys and values */
static Err map_queries(const Device *d, CUtensorMap *map, const floatX *x, const Attention *s, size_t row) {
    return map_boxes(d, map, x, s, s->Tq, row ? row : s->heads * s->D, s->Tq);
}
static Err map_keys(const Device *d, CUtensorMap map[2], const floatX *k, const floatX *v, const Attention *s) {
    const size_t row = s->kv_row ? s->kv_row : s->heads * s->D;
    TRY(map_boxes(d, &map[0], k, s, s->Tk, row, s->key_stride));
    return map_boxes(d, &map[1], v, s, s->Tk, row, s->key_stride);
}

template <int OWN> static size_t groups_bytes() {
    return GROUPS_ALIGNMENT + sizeof(GroupsShared<OWN>);
}

static Err attend_in_groups(Device *d, floatX *y, float *lse, const floatX *q, const floatX *k, const floatX *v,
                            const Attention *s) {
    GroupsMaps maps;
    TRY(map_queries(d, &maps.own[0], q, s, s->q_row));
    TRY(map_keys(d, maps.pass, k, v, s));
    LAUNCH(d, attend_groups_kernel, head_blocks(s, s->Tq, GROUPS * BOX), GROUPS_THREADS, groups_bytes<1>(), maps, *s, y,
           lse);
    return OK;
}

static Err attend_back_in_groups(Device *d, const AttendBackward *x) {
    const Attention *s = &x->s;
    const size_t bytes = groups_bytes<2>();
    GroupsMaps queries, keys;
    TRY(map_queries(d, &queries.own[0], x->q, s, s->q_row));
    TRY(map_queries(d, &queries.own[1], x->dy, s, 0));
    TRY(map_keys(d, queries.pass, x->k, x->v, s));
    memcpy(keys.own, queries.pass, sizeof keys.own), memcpy(keys.pass, queries.own, sizeof keys.pass);
    TRY(FOR_WINDOWS(launch_sums, s, d, x));
    LAUNCH(d, attend_back_groups_kernel<false>, head_blocks(s, s->Tq, GROUPS * BOX), GROUPS_THREADS, bytes, queries,
           *x);
    LAUNCH(d, attend_back_groups_kernel<true>, head_blocks(s, s->Tk, GROUPS * BOX), GROUPS_THREADS, bytes, keys, *x);
    return OK;
}

static Err attention_forward_best_gpu(const Compute *on, real *y, real *saved, const real *q, const real *k,
                                      const real *v, const Attention *s) {
    if (!attends_in_groups(on->device, s)) return attention_forward_gpu(on, y, saved, q, k, v, s);
    return attend_in_groups(on->device, (floatX *)y, saved, (const floatX *)q, (const floatX *)k, (const floatX *)v, s);
}
static Err attend_backward_best(Device *d, const AttendBackward *x) {
    return attends_in_groups(d, &x->s) ? attend_back_in_groups(d, x) : attend_backward(d, x);
}
#endif
