/* ptx.h - the words of our kernels that CUDA C++ has no words for, in PTX, the GPU's assembler.
 *
 * device.h includes it with CUDA's headers; where CUDA kernels run on the CPU, test/cuda_on_cpu.h stands in for all of
 * them. */
#ifndef PTX_H
#define PTX_H

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <string.h>

/* Shared memory of a block, whose size is the launch's: SHARED(float, tile); */
extern __shared__ __align__(16) unsigned char dynamic_shared[];
#define SHARED(type, name) type *name = (type *)(void *)dynamic_shared

/* START_KERNEL(kernel, grid, block, shared bytes, stream, arguments...); LAUNCH of device.h is what is used. */
#define START_KERNEL(kernel, grid, block, bytes, stream, ...) kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__)

/* 16 bytes, to a multiple of 16 of the GPU's memory, at once: left to itself, nvcc stores some numbers one by one. */
template <typename T> static __device__ inline void store_whole(void *to, const T &from) {
    static_assert(sizeof(T) == 16, "one store");
    unsigned word[4];
    memcpy(word, &from, sizeof word);
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(to)), "r"(word[0]),
                 "r"(word[1]), "r"(word[2]), "r"(word[3])
                 : "memory");
}

/* Tensor cores and what feeds them:
 *   copy_async<BYTES>  16, 8, 4 or 2 bytes from global to shared memory, both at a multiple of as many, or zeros, while
 *                    the thread goes on (with 2, for which there is no such instruction, it waits)
 *   copy_commit, copy_wait<N>   close a group of copies; wait until all but the last N groups are there
 *   load_matrices    four 8x8 matrices of bf16 from shared memory: lane i names row i % 8 of matrix i / 8, and gets of each
 *                    row lane / 4, columns lane % 4 * 2 and the next
 *   load_matrices_turned   the same of the matrices' transposes: a lane gets column lane / 4, rows lane % 4 * 2 and the next
 *   multiply_tiles   c (16,8) float += a (16,16) b (8,16)^T of bf16, spread over a warp: a in four 8x8 matrices as above
 *                    (rows 0..7 and 8..15 of columns 0..7, then of 8..15), b in two (columns 0..7, then 8..15), and of
 *                    c a lane has row lane / 4, columns lane % 4 * 2 and the next, then the same of row lane / 4 + 8
 *   bf16_pair        two floats as bf16 in a word, as matrices have them
 *   exp2_approx      2^x to 2 units in the last place, 0 below 2^-126: one instruction, where exp2f takes four
 *   reciprocal_approx   1 / x to a unit in the last place, 0 beyond 2^126: one instruction
 *   log2_approx      the logarithm, to 2^-22 between 1/2 and 2, else to 2 units in the last place */
template <int BYTES = 16> static __device__ inline void copy_async(void *shared, const void *global, int there) {
    const unsigned to = (unsigned)__cvta_generic_to_shared(shared), bytes = there ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
    else if constexpr (BYTES > 2)
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(BYTES), "r"(bytes)
                     : "memory");
    else
        *(unsigned short *)shared = there ? *(const unsigned short *)global : (unsigned short)0;
}
static __device__ inline void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N> static __device__ inline void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
static __device__ inline void load_matrices(unsigned word[4], const void *row) {
    const unsigned from = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(from)
                 : "memory");
}
static __device__ inline void load_matrices_turned(unsigned word[4], const void *row) {
    const unsigned from = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(from)
                 : "memory");
}
static __device__ inline void multiply_tiles(float c[4], const unsigned a[4], const unsigned b[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
static __device__ inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
static __device__ inline float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
static __device__ inline float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
static __device__ inline unsigned bf16_pair(float first, float second) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}

/* Blocks that know each other, from capability 9 on. HAS_CLUSTERS: code for such a GPU is compiled.
 *   cluster_rank     a block's number in its cluster
 *   cluster_sync     all threads of a cluster meet; what they wrote to each other's shared memory is there
 *   in_block         where block `rank` of the cluster has what this one has at an address of shared memory
 *   barrier_init     a barrier in shared memory where copies are awaited; barrier_fence: before the first copy
 *   barrier_expect   the next copies to this barrier have so many bytes
 *   bulk_copy        a multiple of 16 bytes from global to shared memory, both at a multiple of 16, while all go on
 *   barrier_wait     until the copies are there: parity 0 the first time, then by turns
 *   count_up, counted   one more at a counter in global memory, after all that this thread knows to be written; how many,
 *                    before all that it will read */
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define HAS_CLUSTERS 1
#else
#define HAS_CLUSTERS 0
#endif
static __device__ inline unsigned shared_address(const void *shared) {
    return (unsigned)__cvta_generic_to_shared(shared);
}
static __device__ inline unsigned cluster_rank() {
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
static __device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
template <typename T> static __device__ inline T *in_block(T *mine, unsigned rank) {
    T *there;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(mine), "r"(rank));
    return there;
}
static __device__ inline void barrier_init(uint64_t *barrier, unsigned arrivals = 1) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
static __device__ inline void barrier_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
static __device__ inline void barrier_expect(uint64_t *barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
static __device__ inline void bulk_copy(void *shared, const void *global, unsigned bytes, uint64_t *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
static __device__ inline void barrier_wait(uint64_t *barrier, unsigned parity) {
    unsigned done = 0;
    while (!done)
        asm volatile("{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
                     "selp.u32 %0, 1, 0, p;\n\t}"
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
}
static __device__ inline void count_up(unsigned *counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter)) : "memory");
}
static __device__ inline unsigned counted(const unsigned *counter) {
    unsigned n;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(n) : "l"(__cvta_generic_to_global(counter)) : "memory");
    return n;
}

/* The shared memory that a block can have; how many clusters of so many blocks the GPU holds at once; starting them, all or
 * none. A kernel compiled for GPUs before capability 9 allows fewer threads, so that none fit. */
static size_t most_shared() {
    int device = 0, bytes = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return (size_t)bytes;
}
static cudaLaunchConfig_t cluster_launch(cudaLaunchAttribute how[2], unsigned clusters, unsigned size, unsigned threads,
                                         size_t bytes) {
    cudaLaunchConfig_t c = {};
    how[0] = how[1] = {};
    how[0].id = cudaLaunchAttributeClusterDimension, how[1].id = cudaLaunchAttributeCooperative;
    how[0].val.clusterDim.x = size, how[0].val.clusterDim.y = how[0].val.clusterDim.z = 1;
    how[1].val.cooperative = 1;
    c.gridDim = clusters * size, c.blockDim = threads, c.dynamicSmemBytes = bytes, c.attrs = how, c.numAttrs = 2;
    return c;
}
template <typename... P>
static unsigned most_clusters(void (*kernel)(P...), unsigned size, unsigned threads, size_t bytes) {
    cudaLaunchAttribute how[2];
    const cudaLaunchConfig_t c = cluster_launch(how, 1, size, threads, bytes);
    cudaFuncAttributes a;
    int device = 0, major = 0, n = 0;
    cudaGetDevice(&device);
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess || major < 9 ||
        cudaFuncGetAttributes(&a, kernel) != cudaSuccess || a.maxThreadsPerBlock < (int)threads ||
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes) != cudaSuccess ||
        cudaOccupancyMaxActiveClusters(&n, kernel, &c) != cudaSuccess) {
        cudaGetLastError();
        return 0;
    }
    return (unsigned)n;
}
template <typename... P, typename... A>
static cudaError_t start_clusters(void (*kernel)(P...), unsigned clusters, unsigned size, unsigned threads,
                                  size_t bytes, cudaStream_t stream, A... a) {
    cudaLaunchAttribute how[2];
    cudaLaunchConfig_t c = cluster_launch(how, clusters, size, threads, bytes);
    c.stream = stream;
    return cudaLaunchKernelEx(&c, kernel, a...);
}
/* Compute capability 9.0 alone, compiled as 90a. Boxes come by the tensor memory accelerator: 64 rows of 64 bf16, of
 * which the units of 16 bytes lie swizzled: unit c of row r where unit c ^ r % 8 would be. They begin at multiples
 * of 1024 bytes.
 *   barrier_arrive   one of the arrivals that a barrier waits for besides bytes
 *   copy_box         a box from column x, row y, picture z on to shared memory; zeros beyond the map; tells the barrier
 *   see_stores       what this thread stored is seen by products and boxes that come after a barrier
 *   group_fence, group_commit, group_wait<N>, hold   a warpgroup, 128 threads, multiplies while it goes on. Before it begins:
 *                    fence. Products between two commits are a group; wait until all but the last N are done. What is
 *                    being read or written must not be touched before: hold says so to the compiler.
 *   multiply_boxes   c (64,64) float (+)= columns 16k.. of a (64,64) times those of b (64,64)^T; 16 rows of c to a warp, as
 *                    multiply_tiles has them
 *   weigh_box        c (64,64) += a (64,16), which is in registers, times rows 16k.. of b (64,64) */
static __device__ inline void barrier_arrive(uint64_t *b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
static __device__ inline void copy_box(void *to, const CUtensorMap *map, unsigned x, unsigned y, unsigned z,
                                       uint64_t *b) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, "
                 "%4}], [%5];" ::"r"(shared_address(to)),
                 "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_address(b))
                 : "memory");
}
static __device__ inline void see_stores() {
    asm volatile("fence.proxy.async;" ::: "memory");
}
template <int WHICH> static __device__ inline void group_meet() {
    asm volatile("bar.sync %0, 128;" ::"n"(WHICH + 1) : "memory");
}
static __device__ inline void group_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
static __device__ inline void group_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> static __device__ inline void group_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
template <int N> static __device__ inline void hold(float (*c)[4]) {
#pragma unroll
    for (int n = 0; n < N; n++) asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])::"memory");
}
template <int N> static __device__ inline void hold(unsigned (*a)[4]) {
#pragma unroll
    for (int n = 0; n < N; n++) asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1]), "+r"(a[n][2]), "+r"(a[n][3])::"memory");
}
static __device__ inline unsigned long long box_at(const void *box, unsigned bytes) {
    const unsigned long long leading = 8192 >> 4, rows_8 = 1024 >> 4, swizzled_128 = 1;
    return ((shared_address(box) >> 4 & 0x3fff) | leading << 16 | rows_8 << 32 | swizzled_128 << 62) + (bytes >> 4);
}
/* clang-format off */
#define ALL_OF(c) \
        "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]),\
        "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]),\
        "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),\
        "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]),\
        "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]),\
        "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),\
        "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]),\
        "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
static __device__ inline void multiply_boxes(float (*c)[4], const void *a, const void *b, unsigned k, int add) {
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %34, 0;\n wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0;\n}"
                 : ALL_OF(c) : "l"(box_at(a, 32 * k)), "l"(box_at(b, 32 * k)), "r"(add));
}
static __device__ inline void weigh_box(float (*c)[4], const unsigned a[4], const void *b, unsigned k) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : ALL_OF(c) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(box_at(b, 2048 * k)));
}
#undef ALL_OF
/* clang-format on */

#endif
