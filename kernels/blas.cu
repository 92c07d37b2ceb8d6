/* blas.cu - matrix products on a GPU by NVIDIA's cuBLASLt.
 *
 * device.cu includes it. cuBLASLt is opened when a device is: a program built here starts where there is no CUDA. How it
 * does a product of one kind and size is decided when that is first seen. Split products that add up in whatever order
 * they finish are excluded: the same seed gives the same bits on the same kind of GPU. */
#include "kernels/device.h"

#include <cublasLt.h>
#include <dlfcn.h>

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
    int trans_a, trans_b, d_is_float, add, bias, sums;
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
    int has_sums;
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
    blas->has_sums = dlsym(blas->library, "cublasLtGetVersion") != NULL; /* stand-ins have no version, and no sums */
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
    const cublasLtEpilogue_t epilogue = k->bias   ? CUBLASLT_EPILOGUE_BIAS
                                        : k->sums ? CUBLASLT_EPILOGUE_BGRADB
                                                  : CUBLASLT_EPILOGUE_DEFAULT;
    TRY(blas_error(blas->cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "a product"));
#define SET(attribute, value)                                                                                          \
    TRY(blas_error(blas->cublasLtMatmulDescSetAttribute(p->desc, attribute, &value, sizeof value), #attribute))
    SET(CUBLASLT_MATMUL_DESC_TRANSA, op_first);
    SET(CUBLASLT_MATMUL_DESC_TRANSB, op_second);
    SET(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
    if (k->bias || k->sums) SET(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, type_d);
    const void *const vector = (char *)blas->workspace + ALIGNMENT; /* aligned as the one that each product sets */
    if (k->bias || k->sums) SET(CUBLASLT_MATMUL_DESC_BIAS_POINTER, vector);
#undef SET
    TRY(blas_error(blas->cublasLtMatrixLayoutCreate(&p->a, type, k->trans_b ? k->K : k->N, k->trans_b ? k->N : k->K,
                                                    (int64_t)k->ldb),
                   "a matrix"));
    TRY(blas_error(blas->cublasLtMatrixLayoutCreate(&p->b, type, k->trans_a ? k->M : k->K, k->trans_a ? k->K : k->M,
                                                    (int64_t)k->lda),
                   "a matrix"));
    return blas_error(blas->cublasLtMatrixLayoutCreate(&p->d, type_d, k->N, k->M, (int64_t)k->ldd), "a matrix");
}

/* The fastest way by cuBLASLt's own estimate, but for those that add up in an order that varies, or add up in bf16. */
static Err choose_algorithm(Blas *blas, MatmulPlan *p) {
    const uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE, align = ALIGNMENT;
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

static Err plan_of(Device *d, const Matmul *p, MatmulPlan **plan) {
    MatmulKey key;
    memset(&key, 0, sizeof key); /* gaps too: keys are compared byte by byte */
    key.trans_a = p->trans_a, key.trans_b = p->trans_b, key.d_is_float = p->d_is_float, key.add = p->add != NULL;
    key.bias = p->bias != NULL, key.sums = p->sums != NULL, key.M = p->M, key.N = p->N, key.K = p->K;
    key.lda = p->lda, key.ldb = p->ldb, key.ldd = p->ldd;
    return find_plan(d->blas, &key, plan);
}

static cublasStatus_t multiply(Device *d, const Matmul *p, const MatmulPlan *plan) {
    const float one = 1, beta = p->add ? 1 : 0;
    const void *const vector =
        p->bias ? p->bias : p->sums; /* as long as D^T, what cuBLASLt sees, has rows, or columns */
    if (vector) {
        const cublasStatus_t e = d->blas->cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                                                                         &vector, sizeof vector);
        if (e != CUBLAS_STATUS_SUCCESS) return e;
    }
    return d->blas->cublasLtMatmul(d->blas->handle, plan->desc, &one, p->B, plan->a, p->A, plan->b, &beta,
                                   p->add ? p->add : p->D, plan->d, p->D, plan->d, &plan->algo, d->blas->workspace,
                                   WORKSPACE_BYTES, d->stream);
}

static Err matmul(Device *d, const Matmul *p) {
    MatmulPlan *plan;
    TRY(check_aligned(p));
    TRY(plan_of(d, p, &plan));
    if (!plan->possible && p->bias) return matmul_then_bias(d, p);
    if (!plan->possible) return err("cuBLASLt cannot multiply %zu x %zu by %zu x %zu", p->M, p->K, p->K, p->N);
    return blas_error(multiply(d, p, plan), "a product");
}

/* The product and its sums, if cuBLASLt has a way (done): else nothing, and the sums are somebody else's. */
static Err multiply_and_sum(Device *d, const Matmul *p, int *done) {
    MatmulPlan *plan;
    *done = 0;
    if (!d->blas->has_sums) return OK;
    TRY(check_aligned(p));
    TRY(plan_of(d, p, &plan));
    if (plan->possible && multiply(d, p, plan) != CUBLAS_STATUS_SUCCESS) plan->possible = 0; /* it never has one */
    *done = plan->possible;
    return OK;
}
