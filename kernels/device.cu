/* device.cu - the GPU: finding it, its memory, matrix products on it, parameter tables there.
 *
 * device.h says how this file is compiled. The first half is C, for the rest of the program; the second half is CUDA:
 * what the twins of the layers stand on, then the twins themselves, included at the end, and the table of functions
 * that is all that C sees of them. Everything runs on one stream, in the order in which it is asked for.
 *
 * Matrix products are cuBLASLt's, which is opened when first needed: a program built here starts where there is no
 * CUDA. Sums run in an order that depends on sizes alone, nothing is added by float atomics, and split products that
 * add up in whatever order they finish are excluded: the same seed gives the same bits on the same kind of GPU.
 *
 * Refuses: no driver, no GPU, GPUs before compute capability 8.0 (no bf16), too little memory. */
#include "kernels/transformer.h"

#include <stdio.h>
#include <time.h>
#if defined(DEVICE_CODE) && !defined(CUDA_ON_CPU)
#include <dlfcn.h>
#endif

/* ---- Errors and memory ---- */

#ifndef CUDA_ON_CPU
static Err cuda_error(cudaError_t e, const char *what) {
    if (e == cudaSuccess) return OK;
    cudaGetLastError(); /* else the next launch would report it as its own */
    return err("CUDA: %s: %s", what, cudaGetErrorString(e));
}

/* A block may have more than 48 KB of dynamic shared memory only when asked for. */
static Err allow_shared(const void *kernel, size_t bytes, const char *what) {
    return cuda_error(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes), what);
}
#endif

#ifdef CUDA_ON_CPU
static Err find_cuda(char *text, size_t *free_bytes, size_t *total_bytes) {
    if (text) snprintf(text, CUDA_TEXT_BYTES, "CUDA kernels run on the CPU, for tests");
    if (free_bytes) *free_bytes = memory_available();
    if (total_bytes) *total_bytes = memory_available();
    return OK;
}
#else
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
#endif

static Err device_alloc(void *out_pointer, size_t bytes, const char *what) {
    void *p = NULL;
#ifdef CUDA_ON_CPU
    TRY(mem_alloc(&p, bytes, 1, what));
    memset(p, 0xff, bytes); /* NaN: whoever reads what nobody wrote shall notice */
#else
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
#endif
    memcpy(out_pointer, &p, sizeof p);
    return OK;
}

static void device_free(void *p) {
#ifdef CUDA_ON_CPU
    free(p);
#else
    cudaFree(p);
#endif
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
#ifdef CUDA_ON_CPU
    (void)d;
    memcpy(to, from, bytes);
    return OK;
#else
    TRY(cuda_error(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, d->stream), "copying to the GPU"));
    return cuda_error(cudaStreamSynchronize(d->stream), "waiting for the GPU");
#endif
}
static Err to_host(Device *d, void *to, const void *from, size_t bytes) {
#ifdef CUDA_ON_CPU
    (void)d;
    memcpy(to, from, bytes);
    return OK;
#else
    TRY(cuda_error(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, d->stream), "copying from the GPU"));
    return cuda_error(cudaStreamSynchronize(d->stream), "waiting for the GPU");
#endif
}
static Err device_zero(Device *d, void *p, size_t bytes) {
#ifdef CUDA_ON_CPU
    (void)d;
    memset(p, 0, bytes);
    return OK;
#else
    return cuda_error(cudaMemsetAsync(p, 0, bytes, d->stream), "zeroing");
#endif
}

static Err device_copy(Device *d, void *to, const void *from, size_t bytes) {
#ifdef CUDA_ON_CPU
    (void)d;
    memcpy(to, from, bytes);
    return OK;
#else
    return cuda_error(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, d->stream), "copying on the GPU");
#endif
}

static Err wait_for(Device *d) {
#ifdef CUDA_ON_CPU
    (void)d;
    return OK;
#else
    return cuda_error(cudaStreamSynchronize(d->stream), "waiting for the GPU");
#endif
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
static Err open_blas(Device *d) {
    (void)d;
    return OK;
}
static void close_blas(Device *d) {
    (void)d;
}

static float element(const void *x, int is_float, size_t i) {
    return is_float ? ((const float *)x)[i] : to_float(((const floatX *)x)[i]);
}

/* rows x columns of x as floats without gaps */
static Err as_floats(float **out, const floatX *x, size_t rows, size_t columns, size_t ld) {
    TRY(mem_alloc(out, rows * columns, sizeof(float), "a matrix"));
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < columns; c++) (*out)[r * columns + c] = to_float(x[r * ld + c]);
    return OK;
}

static Err matmul(Device *d, const Matmul *p) {
    float *A, *B, *C;
    (void)d;
    TRY(check_aligned(p));
    TRY(as_floats(&A, p->A, p->trans_a ? p->K : p->M, p->trans_a ? p->M : p->K, p->lda));
    TRY(as_floats(&B, p->B, p->trans_b ? p->N : p->K, p->trans_b ? p->K : p->N, p->ldb));
    TRY(mem_alloc(&C, p->M * p->N, sizeof *C, "a matrix"));
    gemm(p->trans_a, p->trans_b, p->M, p->N, p->K, A, p->trans_a ? p->M : p->K, B, p->trans_b ? p->K : p->N, 0, C,
         p->N);
    for (size_t r = 0; r < p->M; r++)
        for (size_t c = 0; c < p->N; c++) {
            const size_t at = r * p->ldd + c;
            float x = C[r * p->N + c];
            if (p->add) x += element(p->add, p->d_is_float, at);
            if (p->bias) x += element(p->bias, p->d_is_float, c);
            if (p->d_is_float)
                ((float *)p->D)[at] = x;
            else
                ((floatX *)p->D)[at] = to_floatX(x);
        }
    free(A), free(B), free(C);
    return OK;
}
#else
/* cuBLASLt's functions, found in its library when a device is opened. */
#define BLAS_FUNCTIONS(F)                                                                                              \
    F(cublasLtCreate)                                                                                                  \
    F(cublasLtDestroy)                                                                                                 \
    F(cublasLtMatmul)                                                                                                  \
    F(cublasLtMatmulDescCreate)                                                                                        \
    F(cublasLtMatmulDescDestroy)                                                                                       \
    F(cublasLtMatmulDescSetAttribute)                                                                                  \
    F(cublasLtMatrixLayoutCreate)                                                                                      \
    F(cublasLtMatrixLayoutDestroy)                                                                                     \
    F(cublasLtMatmulPreferenceCreate)                                                                                  \
    F(cublasLtMatmulPreferenceDestroy)                                                                                 \
    F(cublasLtMatmulPreferenceSetAttribute)                                                                            \
    F(cublasLtMatmulAlgoGetHeuristic)

/* A product of one kind and size: how cuBLASLt does it is decided when it is first seen. */
typedef struct {
    int trans_a, trans_b, d_is_float, add, bias;
    size_t M, N, K, lda, ldb, ldd;
} MatmulKey;
typedef struct {
    MatmulKey key;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t a, b, d;
    int possible;
    cublasLtMatmulAlgo_t algo;
} MatmulPlan;

struct Blas {
    void *library;
    cublasLtHandle_t handle;
    void *workspace;
    MatmulPlan *plan; /* (n) */
    size_t n, capacity;
#define F(name) decltype(&::name) name;
    BLAS_FUNCTIONS(F)
#undef F
};

static Err blas_error(cublasStatus_t e, const char *what) {
    return e == CUBLAS_STATUS_SUCCESS ? OK : err("cuBLASLt: %s: status %d", what, (int)e);
}

static Err find_blas(Blas *blas) {
    char name[64], path[96];
    snprintf(name, sizeof name, "libcublasLt.so.%d", CUBLAS_VER_MAJOR);
    snprintf(path, sizeof path, "/usr/local/cuda/lib64/%s", name);
    blas->library = dlopen(name, RTLD_NOW);
    if (!blas->library) blas->library = dlopen(path, RTLD_NOW);
    if (!blas->library)
        return err("--device cuda: %s, NVIDIA's cuBLAS, is neither where libraries are nor at %s; install it (NVIDIA's "
                   "package libcublas-%d-0) or name its folder in LD_LIBRARY_PATH",
                   name, path, CUBLAS_VER_MAJOR);
#define F(function)                                                                                                    \
    blas->function = (decltype(&::function))dlsym(blas->library, #function);                                           \
    if (!blas->function) return err("--device cuda: %s has no function " #function, name);
    BLAS_FUNCTIONS(F)
#undef F
    return OK;
}

static Err open_blas(Device *d) {
    TRY(mem_alloc(&d->blas, 1, sizeof *d->blas, "cuBLASLt"));
    TRY(find_blas(d->blas));
    TRY(blas_error(d->blas->cublasLtCreate(&d->blas->handle), "starting"));
    return device_alloc(&d->blas->workspace, WORKSPACE_BYTES, "work space of matrix products");
}

static void close_blas(Device *d) {
    Blas *blas = d->blas;
    if (!blas) return;
    for (size_t i = 0; i < blas->n; i++) {
        MatmulPlan *p = &blas->plan[i];
        blas->cublasLtMatmulDescDestroy(p->desc);
        blas->cublasLtMatrixLayoutDestroy(p->a), blas->cublasLtMatrixLayoutDestroy(p->b);
        blas->cublasLtMatrixLayoutDestroy(p->d);
    }
    free(blas->plan);
    if (blas->workspace) device_free(blas->workspace);
    if (blas->handle) blas->cublasLtDestroy(blas->handle);
    free(blas); /* the library stays: another device may use it */
}

/* cuBLASLt's matrices are column by column, ours row by row: what it sees is D^T = op(B)^T op(A)^T. */
static Err describe(Blas *blas, MatmulPlan *p) {
    const MatmulKey *k = &p->key;
    const cudaDataType_t type = IS_BF16 ? CUDA_R_16BF : CUDA_R_32F, type_d = k->d_is_float ? CUDA_R_32F : type;
    const cublasOperation_t op_first = k->trans_b ? CUBLAS_OP_T : CUBLAS_OP_N,
                            op_second = k->trans_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasLtEpilogue_t epilogue = k->bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    TRY(blas_error(blas->cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "a product"));
#define SET(attribute, value)                                                                                          \
    TRY(blas_error(blas->cublasLtMatmulDescSetAttribute(p->desc, attribute, &value, sizeof value), #attribute))
    SET(CUBLASLT_MATMUL_DESC_TRANSA, op_first);
    SET(CUBLASLT_MATMUL_DESC_TRANSB, op_second);
    SET(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
    if (k->bias) SET(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, type_d);
    if (k->bias)
        SET(CUBLASLT_MATMUL_DESC_BIAS_POINTER, blas->workspace); /* aligned as any; each product sets its own */
#undef SET
    TRY(blas_error(blas->cublasLtMatrixLayoutCreate(&p->a, type, k->trans_b ? k->K : k->N, k->trans_b ? k->N : k->K,
                                                    (int64_t)k->ldb),
                   "a matrix"));
    TRY(blas_error(blas->cublasLtMatrixLayoutCreate(&p->b, type, k->trans_a ? k->M : k->K, k->trans_a ? k->K : k->M,
                                                    (int64_t)k->lda),
                   "a matrix"));
    return blas_error(blas->cublasLtMatrixLayoutCreate(&p->d, type_d, k->N, k->M, (int64_t)k->ldd), "a matrix");
}

/* The fastest way by cuBLASLt's own estimate, but for those that add up in an order that varies. */
static Err choose_algorithm(Blas *blas, MatmulPlan *p) {
    const uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE | CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE,
                   align = ALIGNMENT;
    const size_t workspace = WORKSPACE_BYTES;
    cublasLtMatmulPreference_t wish;
    cublasLtMatmulHeuristicResult_t found;
    int n = 0;
    memset(&found, 0, sizeof found);
    TRY(blas_error(blas->cublasLtMatmulPreferenceCreate(&wish), "a preference"));
#define WISH(attribute, value) blas->cublasLtMatmulPreferenceSetAttribute(wish, attribute, &value, sizeof value)
    WISH(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace);
    WISH(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, schemes);
    WISH(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, align);
    WISH(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, align);
    WISH(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, align);
    WISH(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, align);
#undef WISH
    const cublasStatus_t e =
        blas->cublasLtMatmulAlgoGetHeuristic(blas->handle, p->desc, p->a, p->b, p->d, p->d, wish, 1, &found, &n);
    blas->cublasLtMatmulPreferenceDestroy(wish);
    p->possible = e == CUBLAS_STATUS_SUCCESS && n > 0;
    p->algo = found.algo;
    return OK;
}

static Err find_plan(Blas *blas, const MatmulKey *key, MatmulPlan **out) {
    for (size_t i = 0; i < blas->n; i++)
        if (memcmp(&blas->plan[i].key, key, sizeof *key) == 0) return *out = &blas->plan[i], OK;
    TRY(mem_grow(&blas->plan, blas->n, 1, &blas->capacity, sizeof *blas->plan, "matrix products"));
    MatmulPlan *p = *out = &blas->plan[blas->n];
    memset(p, 0, sizeof *p);
    p->key = *key;
    TRY(describe(blas, p));
    TRY(choose_algorithm(blas, p));
    blas->n++;
    return OK;
}

/* D += bias, where cuBLASLt cannot add it itself. */
static __global__ void add_bias_kernel(Matmul p) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.M * p.N) return;
    const size_t at = i / p.N * p.ldd + i % p.N;
    if (p.d_is_float)
        ((float *)p.D)[at] += ((const float *)p.bias)[i % p.N];
    else
        ((floatX *)p.D)[at] = to_floatX(to_float(((floatX *)p.D)[at]) + to_float(((const floatX *)p.bias)[i % p.N]));
}

static Err matmul(Device *d, const Matmul *p);
static Err matmul_then_bias(Device *d, const Matmul *p) {
    enum { THREADS = 256 };
    Matmul product = *p;
    product.bias = NULL;
    TRY(matmul(d, &product));
    LAUNCH(d, add_bias_kernel, blocks_for(p->M * p->N, THREADS), THREADS, 0, *p);
    return OK;
}

static Err matmul(Device *d, const Matmul *p) {
    const float one = 1, beta = p->add ? 1 : 0;
    MatmulKey key;
    MatmulPlan *plan;
    TRY(check_aligned(p));
    memset(&key, 0, sizeof key); /* gaps too: keys are compared byte by byte */
    key.trans_a = p->trans_a, key.trans_b = p->trans_b, key.d_is_float = p->d_is_float, key.add = p->add != NULL;
    key.bias = p->bias != NULL, key.M = p->M, key.N = p->N, key.K = p->K;
    key.lda = p->lda, key.ldb = p->ldb, key.ldd = p->ldd;
    TRY(find_plan(d->blas, &key, &plan));
    if (!plan->possible && p->bias) return matmul_then_bias(d, p);
    if (!plan->possible) return err("cuBLASLt cannot multiply %zu x %zu by %zu x %zu", p->M, p->K, p->K, p->N);
    if (p->bias)
        TRY(blas_error(d->blas->cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p->bias,
                                                               sizeof p->bias),
                       "a bias"));
    return blas_error(d->blas->cublasLtMatmul(d->blas->handle, plan->desc, &one, p->B, plan->a, p->A, plan->b, &beta,
                                              p->add ? p->add : p->D, plan->d, p->D, plan->d, &plan->algo,
                                              d->blas->workspace, WORKSPACE_BYTES, d->stream),
                      "a product");
}
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
#ifndef CUDA_ON_CPU
    cudaStreamSynchronize(d->stream);
#endif
    leave(d);
    free_rows(d);
    device_free(d->sums);
    close_blas(d);
#ifndef CUDA_ON_CPU
    if (d->stream) cudaStreamDestroy(d->stream);
#endif
    free(d);
}

static Err start_device(Device *d) {
#ifndef CUDA_ON_CPU
    TRY(cuda_error(cudaStreamCreate(&d->stream), "a stream"));
#endif
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
#ifdef CUDA_ON_CPU
    memcpy(c->to, c->from, c->bytes);
    return OK;
#else
    return cuda_error(cudaMemcpyAsync(c->to, c->from, c->bytes, cudaMemcpyDeviceToDevice, c->d->stream), "copying");
#endif
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
static real *row_value(const Device *d, size_t row) {
    return d->row ? d->row[row].value : NULL;
}
static real *row_grad(const Device *d, size_t row) {
    return d->row ? d->row[row].grad : NULL;
}

/* ---- The fellows of the plain layers ---- */

static Layers make_layers() {
    Layers l = {};
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
