/* device.h - what CUDA kernels are written with, and what a GPU holds for a parameter table.
 *
 * The CUDA half of transformer.cu includes runtime.cu and device.cu, which includes all other .cu files of kernels/. It is
 * compiled twice, once with floatX = float, once with floatX = bf16: each time one object file that exports one table of
 * functions (DeviceOps). A program linked without these objects lacks the tables, and so knows that it has no CUDA.
 *
 * The same code runs on the CPU: with -DCUDA_ON_CPU test/cuda_on_cpu.h stands in for CUDA's headers and ptx.h. */
#ifndef DEVICE_H
#define DEVICE_H

#include "base/compute.h"
#include "kernels/kernels.h"

#if defined(__CUDACC__) || defined(CUDA_ON_CPU)
#define DEVICE_CODE 1
#endif

/* ---- What kernels are written with ---- */

#ifdef DEVICE_CODE

#ifdef CUDA_ON_CPU
#include "test/cuda_on_cpu.h"
#else
#include "kernels/ptx.h"
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

enum { WARP = 32 };

/* 16 bytes, which a thread moves at once */
enum { PACK = 16 / sizeof(floatX) };
struct alignas(16) Pack {
    floatX at[PACK];
};
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

/* The PACK columns from c on of a row of H floats, which begins at a multiple of 16 bytes; behind the last comes the
 * first. */
static __device__ inline void load_columns(float to[PACK], const float *row, size_t c, size_t H) {
    struct alignas(16) Four {
        float at[4];
    };
    const int whole = H % 4 == 0 && c % 4 == 0 && c + PACK <= H;
#pragma unroll
    for (int k = 0; k < PACK; k += 4) {
        Four f;
        if (whole)
            f = *(const Four *)(row + c + k);
        else
            for (int j = 0; j < 4; j++) f.at[j] = row[(c + k + j) % H];
        for (int j = 0; j < 4; j++) to[k + j] = f.at[j];
    }
}

/* add(r) for every row r of R whose id is `value`, in their order, by each thread of the block; returns whether there are
 * any. A turn looks at as many ids as there are threads; found (threads / WARP): those that it found, one bit each. */
template <typename Add>
static __device__ inline bool for_rows_of(size_t value, const int32_t *ids, size_t R, unsigned *found, Add add) {
    bool any = false;
    for (size_t r0 = 0; r0 < R; r0 += blockDim.x) {
        const size_t r = r0 + threadIdx.x;
        const unsigned bits = __ballot_sync(0xffffffffu, r < R && (size_t)ids[r] == value);
        __syncthreads(); /* whoever still reads those of the last turn */
        if (threadIdx.x % WARP == 0) found[threadIdx.x / WARP] = bits;
        __syncthreads();
        for (unsigned w = 0; w < blockDim.x / WARP; w++)
            for (unsigned left = found[w]; left; left &= left - 1, any = true)
                add(r0 + w * WARP + (unsigned)__ffs((int)left) - 1);
    }
    return any;
}

/* *cdf = P(z < x), *pdf = its derivative, for z ~ N(0,1), as math.h has it, from one exponential */
static __device__ inline void normal_distribution_gpu(float *cdf, float *pdf, float x) {
    const float bell = expf(-0.5f * x * x), tail = normal_tail(fabsf(x), bell);
    *cdf = x < 0 ? tail : 1 - tail;
    *pdf = 0.39894228f * bell;
}

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

/* LAUNCH(d, kernel, grid, block, shared bytes, arguments...) on the stream of d, in a function that returns an Err. */
static Err cuda_error(cudaError_t e, const char *what);
static Err allow_shared(const void *kernel, size_t bytes, const char *what);
#define LAUNCH(d, kernel, grid, block, shared, ...)                                                                    \
    do {                                                                                                               \
        const size_t launch_bytes = (shared);                                                                          \
        if (launch_bytes > (48u << 10)) TRY(allow_shared((const void *)kernel, launch_bytes, #kernel));                \
        START_KERNEL(kernel, grid, block, launch_bytes, (d)->stream, __VA_ARGS__);                                     \
        TRY(cuda_error(cudaGetLastError(), #kernel));                                                                  \
    } while (0)

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
    double *sums;       /* (SUM_BLOCKS) partial sums, of the gradient's norm and of losses */
    size_t shared_most; /* bytes of shared memory that a block can have */

    void *encode_map; /* attention_90a.cu: NULL where the GPU or its code has no warpgroups */

    struct Blas *blas; /* cuBLASLt and the matrix products seen so far */
    struct Nccl *nccl; /* the other ranks' GPUs; NULL: there is one */
};
enum { SUM_BLOCKS = 256, WORKSPACE_BYTES = 32 << 20, ALIGNMENT = 64 /* bytes, of everything in an arena */ };

/* ---- Matrix products ---- */

/* D (M,N) = op(A) op(B) (+ add) (+ bias), row-major as gemm of kernels.h. A and B are floatX; D, and add, which may
 * be D and has its row stride, are floatX or float; bias (N) is of D's type. add and bias may be NULL.
 * sums (M) = sum_k op(A)[m,k], beside a D in float and no bias, of multiply_and_sum alone; NULL: not wanted */
typedef struct {
    int trans_a, trans_b, d_is_float;
    size_t M, N, K, lda, ldb, ldd;
    const floatX *A, *B;
    void *D;
    const void *add, *bias;
    float *sums;
} Matmul;

static inline Err check_aligned(const Matmul *p) {
    const uintptr_t addresses = (uintptr_t)p->A | (uintptr_t)p->B | (uintptr_t)p->D | (uintptr_t)p->add;
    return addresses % ALIGNMENT ? err("a matrix on the GPU is not aligned to %d bytes", (int)ALIGNMENT) : OK;
}

static inline unsigned blocks_for(size_t n, size_t per_block) {
    return (unsigned)ceil_div(n, per_block);
}

#endif
#endif
