/* device.cu - the GPU: finding it, its memory, matrix products on it, parameter tables there.
 *
 * device.h says how this file is compiled: what the GPU's layers stand on, then the layers themselves, included at the
 * end, and the table of functions that is all that C sees of them. Everything runs on one stream, in the order in which
 * it is asked for. Sums run in an order that depends on sizes alone, nothing is added by float atomics: the same seed gives
 * the same bits on the same kind of GPU.
 *
 * Refuses: no driver, no GPU, GPUs before compute capability 8.0 (no bf16), too little memory. */
#include "kernels/transformer.h"

#include <stdio.h>
#include <time.h>

/* ---- Errors and memory ---- */

static Err cuda_error(cudaError_t e, const char *what) {
    if (e == cudaSuccess) return OK;
    cudaGetLastError(); /* else the next launch would report it as its own */
    return err("CUDA: %s: %s", what, cudaGetErrorString(e));
}

/* A block may have more than 48 KB of dynamic shared memory only when asked for. */
static Err allow_shared(const void *kernel, size_t bytes, const char *what) {
    return cuda_error(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes), what);
}

static Err find_cuda(char *text, size_t *free_bytes, size_t *total_bytes) {
    int n = 0, driver = 0, chosen = 0;
    size_t unused, total;
    char memory[32];
    cudaDeviceProp p;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
        return err("--device cuda: no NVIDIA driver on this machine; use --device cpu");
    const cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess) return err("--device cuda: no usable GPU: %s; use --device cpu", cudaGetErrorString(e));
    if (n < 1) return err("--device cuda: no GPU on this machine; use --device cpu");
    TRY(cuda_error(cudaGetDevice(&chosen), "the GPU in use"));
    TRY(cuda_error(cudaGetDeviceProperties(&p, chosen), "properties of the GPU"));
    if (p.major < 8)
        return err("--device cuda: %s has compute capability %d.%d, expected 8.0 or more", p.name, p.major, p.minor);
    TRY(cuda_error(cudaMemGetInfo(free_bytes ? free_bytes : &unused, &total), "memory of the GPU"));
    if (total_bytes) *total_bytes = total;
    if (text)
        snprintf(text, CUDA_TEXT_BYTES, "%s, compute capability %d.%d, %s", p.name, p.major, p.minor,
                 bytes_text(memory, total));
    return OK;
}

static Err device_alloc(void *out_pointer, size_t bytes, const char *what) {
    void *p = NULL;
    size_t available = 0, total = 0;
    char need[32], there[32];
    const cudaError_t e = cudaMalloc(&p, bytes ? bytes : 1);
    if (e != cudaSuccess && e != cudaErrorMemoryAllocation) return cuda_error(e, what); /* of a kernel before, say */
    if (e != cudaSuccess) {
        cudaGetLastError();
        cudaMemGetInfo(&available, &total);
        return err("%s: %s of GPU memory needed, %s free; a smaller --batch takes less", what, bytes_text(need, bytes),
                   bytes_text(there, available));
    }
    memcpy(out_pointer, &p, sizeof p);
    return OK;
}

static void device_free(void *p) {
    cudaFree(p);
}

/* Arrays one after the other in one allocation: counted first, with base NULL, then placed. */
typedef struct {
    char *base;
    size_t used;
} DeviceArena;
static void carve(DeviceArena *a, void *out_pointer, size_t n, size_t size) {
    void *p = a->base ? a->base + a->used : NULL;
    memcpy(out_pointer, &p, sizeof p);
    a->used += round_up(n * size, 4 * ALIGNMENT);
}

/* Between the host's memory and the GPU's. Both wait until the data are there: of pageable memory, CUDA does not
 * promise that it may be reused when an asynchronous copy returns, and where GPUs read the host's page tables it may
 * not. */
static Err to_device(Device *d, void *to, const void *from, size_t bytes) {
    TRY(cuda_error(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, d->stream), "copying to the GPU"));
    return cuda_error(cudaStreamSynchronize(d->stream), "waiting for the GPU");
}
static Err to_host(Device *d, void *to, const void *from, size_t bytes) {
    TRY(cuda_error(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, d->stream), "copying from the GPU"));
    return cuda_error(cudaStreamSynchronize(d->stream), "waiting for the GPU");
}
static Err device_zero(Device *d, void *p, size_t bytes) {
    return cuda_error(cudaMemsetAsync(p, 0, bytes, d->stream), "zeroing");
}

static Err device_copy(Device *d, void *to, const void *from, size_t bytes) {
    return cuda_error(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, d->stream), "copying on the GPU");
}

static Err wait_for(Device *d) {
    return cuda_error(cudaStreamSynchronize(d->stream), "waiting for the GPU");
}

/* What a function that returns nothing could not say. */
static void keep_failure(Device *d, Err e) {
    if (e == OK || d->failed != OK) return;
    d->failed = e;
    snprintf(d->failure, sizeof d->failure, "%s", err_text());
}
static Err earlier_failure(const Device *d) {
    return d->failed == OK ? OK : err("%s", d->failure);
}

/* ---- Matrix products ---- */

/* D (M,N) = op(A) op(B) (+ add) (+ bias), row-major as gemm of imagebart.h. A and B are floatX; D, and add, which may
 * be D and has its row stride, are floatX or float; bias (N) is of D's type. add and bias may be NULL. */
typedef struct {
    int trans_a, trans_b, d_is_float;
    size_t M, N, K, lda, ldb, ldd;
    const floatX *A, *B;
    void *D;
    const void *add, *bias;
} Matmul;

static Err check_aligned(const Matmul *p) {
    const uintptr_t addresses = (uintptr_t)p->A | (uintptr_t)p->B | (uintptr_t)p->D | (uintptr_t)p->add;
    return addresses % ALIGNMENT ? err("a matrix on the GPU is not aligned to %d bytes", (int)ALIGNMENT) : OK;
}

#ifdef CUDA_ON_CPU
#include "test/matmul_on_cpu.h"
#else
#include "kernels/blas.cu"
#endif

/* ---- Other ranks' GPUs ---- */

#include "kernels/nccl.cu"

/* ---- The table's twin ---- */

static void free_rows(Device *d) {
    for (int k = 0; k < 6; k++) device_free(d->arena[k]), d->arena[k] = NULL;
    device_free(d->chunks), d->chunks = NULL;
    free(d->row);
    d->row = NULL, d->n_rows = 0;
}

static void close_device(Device *d) {
    if (!d) return;
    cudaStreamSynchronize(d->stream);
    leave(d);
    free_rows(d);
    device_free(d->sums);
    close_blas(d);
    if (d->stream) cudaStreamDestroy(d->stream);
    free(d);
}

static Err start_device(Device *d) {
    TRY(cuda_error(cudaStreamCreate(&d->stream), "a stream"));
    TRY(device_alloc(&d->sums, SUM_BLOCKS * sizeof *d->sums, "partial sums"));
    return open_blas(d);
}

static Err open_device(Device **out) {
    Device *d;
    *out = NULL;
    TRY(find_cuda(NULL, NULL, NULL));
    TRY(mem_alloc(&d, 1, sizeof *d, "a device"));
    if (start_device(d) != OK) {
        close_device(d);
        return FAILED;
    }
    *out = d;
    return OK;
}

/* ---- What this GPU can do at best, for benchmarks ---- */

typedef struct {
    Device *d;
    size_t n, bytes;
    floatX *A, *B, *D; /* (n,n) */
    void *from, *to;   /* `bytes` each */
} Ceiling;

static Err multiply_once(const Ceiling *c) {
    Matmul p;
    memset(&p, 0, sizeof p);
    p.M = p.N = p.K = p.lda = p.ldb = p.ldd = c->n;
    p.trans_b = 1, p.A = c->A, p.B = c->B, p.D = c->D;
    return matmul(c->d, &p);
}
static Err copy_once(const Ceiling *c) {
    return cuda_error(cudaMemcpyAsync(c->to, c->from, c->bytes, cudaMemcpyDeviceToDevice, c->d->stream), "copying");
}

static int by_size(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Seconds of one: the median of groups of EACH without a wait in between, after one group that warms up. */
static Err time_once(const Ceiling *c, Err (*once)(const Ceiling *), double *out) {
    enum { GROUPS = 7, EACH = 8 };
    double took[GROUPS];
    for (int g = -1; g < GROUPS; g++) {
        struct timespec begin, end;
        TRY(wait_for(c->d));
        clock_gettime(CLOCK_MONOTONIC, &begin);
        for (int k = 0; k < EACH; k++) TRY(once(c));
        TRY(wait_for(c->d));
        clock_gettime(CLOCK_MONOTONIC, &end);
        if (g >= 0) took[g] = (double)(end.tv_sec - begin.tv_sec) + 1e-9 * (double)(end.tv_nsec - begin.tv_nsec);
    }
    qsort(took, GROUPS, sizeof *took, by_size);
    *out = took[GROUPS / 2] / EACH;
    return OK;
}

/* Numbers of both signs in no order: zeros would be multiplied faster, for they need less power. */
static __global__ void scatter_kernel(floatX *x, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    unsigned u = (unsigned)i * 2654435761u;
    u = (u ^ u >> 15) * 2246822519u;
    if (i < n) x[i] = to_floatX((float)(u >> 8) * 0x1p-23f - 1);
}

static Err measure_with(Ceiling *c, double *product, double *copy) {
    enum { THREADS = 256 };
    floatX **const matrix[3] = {&c->A, &c->B, &c->D};
    for (int k = 0; k < 3; k++) {
        TRY(device_alloc(matrix[k], c->n * c->n * sizeof(floatX), "a matrix"));
        LAUNCH(c->d, scatter_kernel, blocks_for(c->n * c->n, THREADS), THREADS, 0, *matrix[k], c->n * c->n);
    }
    TRY(device_alloc(&c->from, c->bytes, "a copy"));
    TRY(device_alloc(&c->to, c->bytes, "a copy"));
    TRY(device_zero(c->d, c->from, c->bytes));
    TRY(time_once(c, multiply_once, product));
    return time_once(c, copy_once, copy);
}

static Err measure_ceilings(Device *d, size_t n, size_t bytes, double *product, double *copy) {
    Ceiling c;
    memset(&c, 0, sizeof c);
    c.d = d, c.n = n, c.bytes = bytes;
    const Err e = measure_with(&c, product, copy);
    void *const all[] = {c.A, c.B, c.D, c.from, c.to};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) device_free(all[i]);
    return e;
}

/* ---- The twins, from small to large, and the table ---- */

#include "kernels/layers.cu"

#include "kernels/attention.cu"

#include "kernels/transformer.cu"

#include "kernels/optimizer.cu"

#include "kernels/decode.cu"

#include "kernels/conv.cu"

#include "kernels/vqgan.cu"

#include "kernels/discriminator.cu"

#include "kernels/perceptual.cu"

static void put_bytes(Device *d, void *to, const void *from, size_t bytes) {
    keep_failure(d, to_device(d, to, from, bytes));
}
static void zero_bytes(Device *d, void *p, size_t bytes) {
    keep_failure(d, device_zero(d, p, bytes));
}
static uint64_t count_changes(const Device *d) {
    return d->changes;
}
static real *row_value(const Device *d, size_t row) {
    return d->row ? d->row[row].value : NULL;
}
static real *row_grad(const Device *d, size_t row) {
    return d->row ? d->row[row].grad : NULL;
}

/* ---- The fellows of the plain layers ---- */

static Layers make_layers() {
    Layers l = {};
    l.conv_needs = conv_needs_gpu, l.conv_prepared_bytes = conv_prepared_bytes, l.conv_prepare = conv_prepare_gpu;
    l.conv_forward = conv_forward_gpu, l.conv_backward = conv_backward_gpu;
    return l;
}
static const Layers cuda_layers = make_layers();

#ifdef FLOATX_BF16
#define CUDA_TABLE cuda_bf16
#else
#define CUDA_TABLE cuda_f32
#endif
extern "C" {
extern const DeviceOps CUDA_TABLE;
const DeviceOps CUDA_TABLE = {find_cuda,
                              open_device,
                              close_device,
                              measure_ceilings,
                              &cuda_layers,
                              sizeof(floatX),
                              device_alloc,
                              device_free,
                              put_bytes,
                              to_host,
                              zero_bytes,
                              earlier_failure,
                              count_changes,
                              row_value,
                              row_grad,
                              send_params,
                              fetch_params,
                              zero_grad_cuda,
                              grad_norm_cuda,
                              swap_ema_cuda,
                              update_params,
                              plan_cuda,
                              forward_cuda,
                              backward_cuda,
                              train_cuda,
                              decode_begin_cuda,
                              decode_step_cuda,
                              draw_cuda,
                              vqgan_plan_cuda,
                              vqgan_free_cuda,
                              vqgan_run_cuda,
                              vqgan_nearest_cuda,
                              vqgan_draw_cuda,
                              vqgan_forward_cuda,
                              vqgan_backward_cuda,
                              vqgan_last_cuda,
                              vqgan_restart_cuda,
                              disc_plan_cuda,
                              disc_free_cuda,
                              disc_forward_cuda,
                              disc_backward_cuda,
                              disc_keep_cuda,
                              disc_gap_cuda,
                              perceptual_plan_cuda,
                              perceptual_free_cuda,
                              perceptual_cuda,
                              choose_gpu,
                              joined,
                              join_id,
                              join,
                              grad_place,
                              grad_sum,
                              grad_wait};
}
