/* device.h - the CUDA half of the program: what C sees of it, and what its kernels are written with.
 *
 * device.cu is compiled three times. As C, like every file here, it is what the rest of the program calls. As CUDA it
 * includes layers.cu, attention.cu, transformer.cu, optimizer.cu, decode.cu and, for the first stage, conv.c,
 * vqgan_layers.c, vqgan.c, discriminator.c and perceptual.c, whose #else halves are the CUDA twins of the C above them,
 * once with floatX = float and once with floatX = bf16: each time one object file that exports one table of functions.
 * A program linked without these objects lacks the tables, and so knows that it has no CUDA.
 *
 * The same CUDA code runs on the CPU: -DCUDA_ON_CPU puts test/cuda_on_cpu.h in the place of CUDA's headers. */
#ifndef DEVICE_H
#define DEVICE_H

#include "base/compute.h"
#include "kernels/kernels.h"
#include "training/training.h"

#if defined(__CUDACC__) || defined(CUDA_ON_CPU)
#define DEVICE_CODE 1
#endif

/* ---- What kernels are written with ---- */

#ifdef DEVICE_CODE

#ifdef CUDA_ON_CPU
#include "test/cuda_on_cpu.h"
typedef int cudaStream_t;
#else
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#endif

/* floatX is what activations and the operands of matrix products are kept in. Sums, statistics, the residual stream,
 * its gradient, logits and the gradients of parameters are float. */
#ifdef FLOATX_BF16
typedef __nv_bfloat16 floatX;
static __host__ __device__ inline float to_float(floatX x) {
    return __bfloat162float(x);
}
static __host__ __device__ inline floatX to_floatX(float x) {
    return __float2bfloat16(x);
}
static __host__ __device__ inline float to_float(float x) {
    return x;
}
enum { IS_BF16 = 1 };
#else
typedef float floatX;
static __host__ __device__ inline float to_float(float x) {
    return x;
}
static __host__ __device__ inline floatX to_floatX(float x) {
    return x;
}
enum { IS_BF16 = 0 };
#endif

/* 16 bytes, which a thread moves at once */
enum { PACK = 16 / sizeof(floatX) };
struct alignas(16) Pack {
    floatX at[PACK];
};
/* 16 bytes, to a multiple of 16 of the GPU's memory, at once: left to itself, nvcc stores some numbers one by one. */
template <typename T> static __device__ inline void store_whole(void *to, const T &from) {
    static_assert(sizeof(T) == 16, "one store");
#ifdef CUDA_ON_CPU
    check_aligned(to, 16, "stores 16 bytes at no multiple of 16");
    memcpy(to, &from, sizeof from);
#else
    unsigned word[4];
    memcpy(word, &from, sizeof word);
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(to)), "r"(word[0]),
                 "r"(word[1]), "r"(word[2]), "r"(word[3])
                 : "memory");
#endif
}
/* Elements i.. of x, whose n elements begin at a multiple of 16 bytes; i is a multiple of PACK. */
static __device__ inline Pack load_pack(const floatX *x, size_t i, size_t n) {
    Pack p;
    if (i + PACK <= n) return *(const Pack *)(x + i);
#pragma unroll
    for (int k = 0; k < PACK; k++) p.at[k] = i + k < n ? x[i + k] : to_floatX(0);
    return p;
}
static __device__ inline void store_pack(floatX *x, size_t i, size_t n, Pack p) {
    if (i + PACK <= n)
        *(Pack *)(x + i) = p;
    else
#pragma unroll
        for (int k = 0; k < PACK; k++)
            if (i + k < n) x[i + k] = p.at[k];
}

/* philox of base.c */
static __device__ inline void philox_device(uint32_t c[4], uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    c[0] = (uint32_t)index, c[1] = (uint32_t)(index >> 32), c[2] = (uint32_t)stream, c[3] = (uint32_t)(stream >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
        const uint32_t n0 = (uint32_t)(b >> 32) ^ c[1] ^ key0, n2 = (uint32_t)(a >> 32) ^ c[3] ^ key1;
        c[1] = (uint32_t)b, c[3] = (uint32_t)a, c[0] = n0, c[2] = n2;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
}

enum { WARP = 32 };

static __device__ inline float warp_sum(float x) {
    for (int k = WARP / 2; k; k /= 2) x += __shfl_xor_sync(0xffffffffu, x, k);
    return x;
}
static __device__ inline double warp_sum(double x) {
    for (int k = WARP / 2; k; k /= 2) x += __shfl_xor_sync(0xffffffffu, x, k);
    return x;
}
static __device__ inline float warp_max(float x) {
    for (int k = WARP / 2; k; k /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, k));
    return x;
}

/* Shared memory of a block, whose size is the launch's: SHARED(float, tile); */
#ifdef CUDA_ON_CPU
#define SHARED(type, name) type *name = (type *)(void *)on_cpu::shared_memory
#else
extern __shared__ __align__(16) unsigned char dynamic_shared[];
#define SHARED(type, name) type *name = (type *)(void *)dynamic_shared
static Err cuda_error(cudaError_t e, const char *what);
static Err allow_shared(const void *kernel, size_t bytes, const char *what);
#endif

/* LAUNCH(d, kernel, grid, block, shared bytes, arguments...) on the stream of d, in a function that returns an Err. */
#ifdef CUDA_ON_CPU
#define LAUNCH(d, kernel, grid, block, shared, ...)                                                                    \
    do {                                                                                                               \
        (void)(d);                                                                                                     \
        on_cpu::launch(#kernel, grid, block, shared, [=] { kernel(__VA_ARGS__); });                                    \
    } while (0)
#else
#define LAUNCH(d, kernel, grid, block, shared, ...)                                                                    \
    do {                                                                                                               \
        const size_t launch_bytes = (shared);                                                                          \
        if (launch_bytes > (48u << 10)) TRY(allow_shared((const void *)kernel, launch_bytes, #kernel));                \
        kernel<<<grid, block, launch_bytes, (d)->stream>>>(__VA_ARGS__);                                               \
        TRY(cuda_error(cudaGetLastError(), #kernel));                                                                  \
    } while (0)
#endif

/* Tensor cores, in PTX; cuda_on_cpu.h has the same for the CPU.
 *   copy_async<BYTES>  16, 8, 4 or 2 bytes from global to shared memory, both at a multiple of as many, or zeros, while
 *   the
 *                    thread goes on (with 2, for which there is no such instruction, it waits)
 *   copy_commit, copy_wait<N>   close a group of copies; wait until all but the last N groups are there
 *   load_matrices    four 8x8 matrices of bf16 from shared memory: lane i names row i % 8 of matrix i / 8, and gets of each
 *                    row lane / 4, columns lane % 4 * 2 and the next
 *   load_matrices_turned   the same of the matrices' transposes: a lane gets column lane / 4, rows lane % 4 * 2 and the next
 *   multiply_tiles   c (16,8) float += a (16,16) b (8,16)^T of bf16, spread over a warp: a in four 8x8 matrices as above
 *                    (rows 0..7 and 8..15 of columns 0..7, then of 8..15), b in two (columns 0..7, then 8..15), and of
 *                    c a lane has row lane / 4, columns lane % 4 * 2 and the next, then the same of row lane / 4 + 8
 *   bf16_pair        two floats as bf16 in a word, as matrices have them
 *   exp2_approx      2^x to 2 units in the last place, 0 below 2^-126: one instruction, where exp2f takes four */
#if defined(FLOATX_BF16) && !defined(CUDA_ON_CPU)
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
static __device__ inline unsigned bf16_pair(float first, float second) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}
#endif

/* A tensor of a parameter table on the GPU. */
typedef struct {
    float *value, *grad, *m, *v, *ema; /* each NULL if it was never sent */
    uint16_t *m16, *v16;               /* instead of m and v: in bf16 */
    floatX *weight;                    /* value as matrix products read it; the same memory when floatX is float */
} DeviceRow;

struct Device {
    cudaStream_t stream;
    Err failed; /* of a function that returns nothing; its text is kept */
    char failure[ERR_MAX];

    DeviceRow *row; /* (n_rows) of the parameter table */
    size_t n_rows;
    uint64_t changes; /* counts whatever changes values */
    void *arena[6];   /* value, grad, m, v, ema, weight */
    size_t arena_floats[5];
    void *chunks; /* (n_chunks) of optimizer.cu */
    size_t n_chunks;
    double *sums; /* (SUM_BLOCKS) partial sums, of the gradient's norm and of losses */

    struct Blas *blas; /* cuBLASLt and the matrix products seen so far */
    struct Nccl *nccl; /* the other ranks' GPUs; NULL: there is one */
};
enum { SUM_BLOCKS = 256, WORKSPACE_BYTES = 32 << 20, ALIGNMENT = 64 /* bytes, of everything in an arena */ };

static inline unsigned blocks_for(size_t n, size_t per_block) {
    return (unsigned)ceil_div(n, per_block);
}

#endif
#endif
