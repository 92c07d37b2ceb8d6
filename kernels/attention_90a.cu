/* attention_90a.cu - attention forward by warpgroups, on GPUs of compute capability 9.0.
 *
 * The same as attend_forward_kernel, for heads of up to 64 channels: wgmma takes its operands from shared memory, and the
 * tensor memory accelerator puts them there, without addresses in registers or turns of threads. Code for 90a alone has
 * these instructions (CUDA_ARCH="80 90a"); where it is not, or the GPU another, attention.cu's kernel is used. device.cu
 * includes this file. */
#include "kernels/device.h"

#if defined(CUDA_ON_CPU) || !defined(FLOATX_BF16)
static Err find_groups(Device *) {
    return OK;
}
static Err attention_forward_best_gpu(const Compute *on, real *y, real *saved, const real *q, const real *k,
                                      const real *v, const Attention *s) {
    return attention_forward_gpu(on, y, saved, q, k, v, s);
}
#else

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define GROUPS_HERE 1
#else
#define GROUPS_HERE 0
#endif

/* A block: GROUPS warpgroups, of BOX queries each. Its first thread asks for keys and values, boxes ahead. */
enum { BOX = 64, BOX_BYTES = BOX * BOX * sizeof(floatX), GROUP = 128, GROUPS = 2, STAGES_90A = 5 };
enum { GROUPS_THREADS = GROUPS * GROUP, GROUPS_ALIGNMENT = 1024 };

typedef struct {
    floatX queries[GROUPS][BOX][BOX];
    struct {
        floatX keys[BOX][BOX], values[BOX][BOX];
    } stage[STAGES_90A];
    uint64_t queries_full, full[STAGES_90A], empty[STAGES_90A];
} GroupsShared;

/* q, k, v as the accelerator sees them: (B,T,row), boxes of BOX x BOX */
typedef struct {
    CUtensorMap q, k, v;
} GroupsMaps;

/* What the first thread asks for: `boxes` of the keys that head `column` / D of batch row b sees */
typedef struct {
    const GroupsMaps *maps;
    unsigned column, b, boxes;
} Wanted;

/* Box n, if there is one, in the place of box n - STAGES, which all warps have given back or soon will */
static __device__ inline void ask_for_box(GroupsShared *x, const Wanted *w, unsigned n) {
    const unsigned stage = n % STAGES_90A, round = n / STAGES_90A;
    if (threadIdx.x == 0 && n < w->boxes) {
        if (round) barrier_wait(&x->empty[stage], (round - 1) % 2);
        barrier_expect(&x->full[stage], 2 * BOX_BYTES);
        copy_box(x->stage[stage].keys, &w->maps->k, w->column, n * BOX, w->b, &x->full[stage]);
        copy_box(x->stage[stage].values, &w->maps->v, w->column, n * BOX, w->b, &x->full[stage]);
    }
    __syncwarp();
}

/* Zeros for what a box of the group's queries has of the next head, from column D on */
static __device__ inline void clear_box(floatX (*box)[BOX], unsigned D, unsigned group) {
    for (unsigned i = threadIdx.x % GROUP; i < BOX * BOX / PACK; i += GROUP) {
        const unsigned row = i / (BOX / PACK), unit = i % (BOX / PACK);
        Pack *at = (Pack *)(void *)&box[row][(unit ^ row % 8) * PACK], pack = *at;
        if (unit * PACK + PACK <= D) continue;
#pragma unroll
        for (unsigned e = 0; e < PACK; e++)
            if (unit * PACK + e >= D) pack.at[e] = to_floatX(0);
        *at = pack;
    }
    see_stores();
    group ? group_meet<1>() : group_meet<0>();
}

static __device__ inline void give_back(GroupsShared *x, unsigned n) {
    if (threadIdx.x % WARP == 0) barrier_arrive(&x->empty[n % STAGES_90A]);
}
static __device__ inline void wait_for_box(GroupsShared *x, unsigned n) {
    barrier_wait(&x->full[n % STAGES_90A], n / STAGES_90A % 2);
}

/* p = q k^T of the group's queries and box n of keys; begun only */
static __device__ inline void begin_scores(float (*p)[4], const floatX (*queries)[BOX], GroupsShared *x, unsigned n) {
#pragma unroll
    for (unsigned k = 0; k < BOX / 16; k++) multiply_boxes(p, queries, x->stage[n % STAGES_90A].keys, k, k > 0);
    group_commit();
}

/* The group's queries see box n, whose scores are in p. While the tensor cores weigh its values they have the scores of
 * the next box to do, if there are MORE, and the threads the powers. */
template <bool MORE>
static __device__ inline void attend_box(GroupsShared *x, const Wanted *w, const Attention *s, Softmax *soft,
                                         float (*p)[4], float (*out)[4], const floatX (*queries)[BOX], unsigned first,
                                         Sight sight, unsigned n, float scale) {
    float peak[2];
    unsigned a[BOX / 16][4];
    if (sight.all < n * BOX + BOX) hide<BOX>(s, p, first, n * BOX);
    const bool higher = find_peaks<BOX>(peak, soft, p);
    group_wait<0>();
    hold<BOX / 8>(out);
    if (n) give_back(x, n - 1);
    if (n > 1) ask_for_box(x, w, n - 2 + STAGES_90A);
    if (higher) rise<BOX>(soft, peak, out, scale);
    take_powers<BOX>(soft, p, scale);
#pragma unroll
    for (unsigned k = 0; k < BOX / 16; k++) round_pairs(a[k], p + 2 * k);
    if (MORE) wait_for_box(x, n + 1);
    hold<BOX / 8>(out), hold<BOX / 16>(a), hold<BOX / 8>(p);
    group_fence();
    if (MORE) begin_scores(p, queries, x, n + 1);
#pragma unroll
    for (unsigned k = 0; k < BOX / 16; k++) weigh_box(out, a[k], x->stage[n % STAGES_90A].values, k);
    group_commit();
    group_wait<MORE ? 1 : 0>(); /* the scores of the next */
    hold<BOX / 8>(p);
}

/* Every box of keys that one of the group's queries sees: `mine`, of all that the block has */
static __device__ inline void attend_boxes(GroupsShared *x, const Wanted *w, const Attention *s, Softmax *soft,
                                           float (*out)[4], const floatX (*queries)[BOX], unsigned first, unsigned mine,
                                           float scale) {
    const Sight sight = warp_sight(s, first);
    float p[BOX / 8][4];
    wait_for_box(x, 0);
    group_fence();
    begin_scores(p, queries, x, 0);
    group_wait<0>();
    hold<BOX / 8>(p);
#pragma unroll 1
    for (unsigned n = 0; n + 1 < mine; n++) attend_box<true>(x, w, s, soft, p, out, queries, first, sight, n, scale);
    attend_box<false>(x, w, s, soft, p, out, queries, first, sight, mine - 1, scale);
    hold<BOX / 8>(out);
    give_back(x, mine - 1);
    for (unsigned n = mine; n < w->boxes; n++) { /* the other group's */
        if (n > 1) ask_for_box(x, w, n - 2 + STAGES_90A);
        wait_for_box(x, n), give_back(x, n);
    }
}

static __global__ void __launch_bounds__(GROUPS_THREADS, 2)
    attend_groups_kernel(const __grid_constant__ GroupsMaps maps, Attention s, floatX *y, float *lse) {
#if GROUPS_HERE
    SHARED(unsigned char, bytes);
    GroupsShared *x = (GroupsShared *)(void *)(bytes + (GROUPS_ALIGNMENT - shared_address(bytes) % GROUPS_ALIGNMENT) %
                                                           GROUPS_ALIGNMENT);
    const HeadAt at = head_at<1>(&s, s.Tq, GROUPS * BOX);
    const unsigned head = (unsigned)(at.row / s.Tq), D = (unsigned)s.D, Tq = (unsigned)s.Tq,
                   group = __shfl_sync(0xffffffffu, threadIdx.x / GROUP, 0), mine = at.first + group * BOX,
                   first = mine + threadIdx.x % GROUP / WARP * 16;
    const unsigned boxes = (visible_keys(&s, last_query(&s, at.first, GROUPS * BOX)) + BOX - 1) / BOX;
    if (threadIdx.x == 0) {
        barrier_init(&x->queries_full, 1);
        for (unsigned n = 0; n < STAGES_90A; n++)
            barrier_init(&x->full[n], 1), barrier_init(&x->empty[n], GROUPS * GROUP / WARP);
        barrier_fence();
    }
    __syncthreads();
    const Wanted wanted = {&maps, head % (unsigned)s.heads * D, head / (unsigned)s.heads, boxes};
    if (threadIdx.x == 0) {
        barrier_expect(&x->queries_full, GROUPS * BOX_BYTES);
        for (unsigned g = 0; g < GROUPS; g++)
            copy_box(x->queries[g], &maps.q, wanted.column, at.first + g * BOX, wanted.b, &x->queries_full);
    }
    for (unsigned n = 0; n < STAGES_90A; n++) ask_for_box(x, &wanted, n);
    const float scale = LOG2_E * rsqrtf((float)D);
    const unsigned seen = mine < Tq ? visible_keys(&s, last_query(&s, mine, BOX)) : 1;
    Softmax soft = {{-HUGE_VALF, -HUGE_VALF}, {0, 0}};
    float out[BOX / 8][4] = {};
    barrier_wait(&x->queries_full, 0);
    if (D < BOX) clear_box(x->queries[group], D, group);
    attend_boxes(x, &wanted, &s, &soft, out, x->queries[group], first, (seen + BOX - 1) / BOX, scale);
    const unsigned i = first + threadIdx.x % WARP / 4, c = threadIdx.x % 4 * 2;
#pragma unroll
    for (unsigned r = 0; r < 2; r++) {
        const float sum = quad_sum(soft.sum[r]), factor = 1 / sum;
        if (i + 8 * r >= Tq) continue;
        unsigned *row = (unsigned *)(void *)(y + at.outs + (size_t)(i + 8 * r) * at.inner + c);
#pragma unroll
        for (unsigned n = 0; n < BOX / 8; n++)
            if (n * 8 + c < D) row[n * 4] = bf16_pair(factor * out[n][2 * r], factor * out[n][2 * r + 1]);
        if (lse && c == 0) lse[at.row + i + 8 * r] = scale * soft.largest[r] + log2_approx(sum);
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

static Err attend_in_groups(Device *d, floatX *y, float *lse, const floatX *q, const floatX *k, const floatX *v,
                            const Attention *s) {
    const size_t inner = s->heads * s->D, q_row = s->q_row ? s->q_row : inner, kv_row = s->kv_row ? s->kv_row : inner;
    const unsigned grid = (unsigned)(s->B * s->heads * ceil_div(s->Tq, GROUPS * BOX));
    GroupsMaps maps;
    TRY(map_boxes(d, &maps.q, q, s, s->Tq, q_row, s->Tq));
    TRY(map_boxes(d, &maps.k, k, s, s->Tk, kv_row, s->key_stride));
    TRY(map_boxes(d, &maps.v, v, s, s->Tk, kv_row, s->key_stride));
    LAUNCH(d, attend_groups_kernel, grid, GROUPS_THREADS, GROUPS_ALIGNMENT + sizeof(GroupsShared), maps, *s, y, lse);
    return OK;
}

static Err attention_forward_best_gpu(const Compute *on, real *y, real *saved, const real *q, const real *k,
                                      const real *v, const Attention *s) {
    if (!attends_in_groups(on->device, s)) return attention_forward_gpu(on, y, saved, q, k, v, s);
    return attend_in_groups(on->device, (floatX *)y, saved, (const floatX *)q, (const floatX *)k, (const floatX *)v, s);
}
#endif
