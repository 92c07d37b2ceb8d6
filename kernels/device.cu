/* device.cu - the GPU: what its layers stand on, parameter tables there, what it can do at best, and all that C sees
 * of it.
 *
 * transformer.cu includes this file, behind runtime.cu; device.h says how they are compiled. It includes the other
 * layers and ends with the table of functions that is all that C sees of them. Everything runs on one stream, in the
 * order in which it is asked for. Sums run in an order that depends on sizes alone, nothing is added by float
 * atomics: the same seed gives the same bits on the same kind of GPU. */
#include "kernels/device.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- What the layers stand on ---- */

#ifdef CUDA_ON_CPU
#include "test/matmul_on_cpu.h"
#else
#include "kernels/blas.cu"
#endif

#include "kernels/nccl.cu"

/* ---- Opening and closing ---- */

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

static Err find_groups(Device *d);

static Err start_device(Device *d) {
    cudaDeviceProp p;
    TRY(gpu_properties(&p));
    d->shared_most = p.sharedMemPerBlockOptin;
    TRY(cuda_error(cudaStreamCreate(&d->stream), "a stream"));
    TRY(device_alloc(&d->sums, SUM_BLOCKS * sizeof *d->sums, "partial sums"));
    TRY(find_groups(d));
    return open_blas(d);
}

static __global__ void scatter_kernel(floatX *x, size_t n);

/* A GPU, and code for it in this program: where there is none, any kernel says so. */
static Err find_device(char *text, size_t *free_bytes, size_t *total_bytes) {
    char gpu[CUDA_TEXT_BYTES];
    cudaFuncAttributes unused;
    TRY(find_cuda(gpu, free_bytes, total_bytes));
    if (text) snprintf(text, sizeof gpu, "%s", gpu);
    const cudaError_t e = cudaFuncGetAttributes(&unused, (const void *)scatter_kernel);
    if (e == cudaSuccess) return OK;
    cudaGetLastError();
    return err(
        "--device cuda: %s, has no kernels in this program, which was built for other GPUs (%s); make clean && make on "
        "this machine, or CUDA_ARCH=... names them",
        gpu, cudaGetErrorString(e));
}

static Err open_device(Device **out) {
    Device *d;
    *out = NULL;
    TRY(find_device(NULL, NULL, NULL));
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

/* ---- The layers, from small to large, and the table ---- */

#include "kernels/layers.cu"

#include "kernels/attention.cu"

#include "kernels/attention_90a.cu"

#include "kernels/optimizer.cu"

#include "kernels/decode.cu"

#include "kernels/window.cu"

#include "kernels/conv_tiles.cu"

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
static void copy_bytes(Device *d, void *to, const void *from, size_t bytes) {
    keep_failure(d, device_copy(d, to, from, bytes));
}
static uint64_t count_changes(const Device *d) {
    return d->changes;
}
static real *row_value(const Device *d, size_t row) {
    if (!d->row) return NULL;
    return d->row[row].value ? d->row[row].value : (real *)(void *)d->row[row].weight;
}
static real *row_grad(const Device *d, size_t row) {
    return d->row ? d->row[row].grad : NULL;
}

/* ---- Launches that are recorded: as a graph, which starts all kernels at once ---- */

typedef struct {
    size_t key[REPLAY_KEY];
    cudaGraph_t graph;
    cudaGraphExec_t ready; /* NULL: still to be recorded */
} Recording;

static void forget(void *recorded) {
    Recording *r = (Recording *)recorded;
    if (r->ready) cudaGraphExecDestroy(r->ready);
    if (r->graph) cudaGraphDestroy(r->graph);
    free(r);
}

static Err record(Device *d, Recording *r, void (*work)(void *), void *context) {
    TRY(cuda_error(cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeThreadLocal), "recording launches"));
    work(context);
    TRY(cuda_error(cudaStreamEndCapture(d->stream, &r->graph), "recording launches"));
    TRY(earlier_failure(d));
    if (work_stops()) return err("the work was stopped"); /* and is not whole */
    return cuda_error(cudaGraphInstantiate(&r->ready, r->graph, 0), "preparing what was recorded");
}

/* The first time work runs as it is: it loads what it needs, which must not happen while a graph is recorded. */
static Err replay(Device *d, void **recorded, const size_t *key, void (*work)(void *), void *context) {
    Recording *r = (Recording *)*recorded;
    Err e = OK;
    if (r && memcmp(r->key, key, sizeof r->key)) forget(r), r = NULL;
    *recorded = r;
    if (!r) {
        TRY(mem_alloc(&r, 1, sizeof *r, "recorded launches"));
        memcpy(r->key, key, sizeof r->key);
        *recorded = r;
        work(context);
        return earlier_failure(d);
    }
    if (!r->ready) e = record(d, r, work, context);
    if (e == OK) return cuda_error(cudaGraphLaunch(r->ready, d->stream), "recorded launches");
    forget(r);
    *recorded = NULL;
    return e;
}

/* ---- The fellows of the plain layers ---- */

/* F as Layers wants it: what F says went wrong sticks to the device. */
template <auto F> struct Sticky;
template <typename... A, Err (*F)(const Compute *, A...)> struct Sticky<F> {
    static void call(const Compute *on, A... a) { keep_failure(on->device, F(on, a...)); }
};

static Layers make_layers() {
    Layers l = {};
    l.embed_forward = Sticky<embed_forward_gpu>::call, l.embed_backward = Sticky<embed_backward_gpu>::call;
    l.norm_needs = norm_needs_gpu;
    l.norm_forward = Sticky<norm_forward_gpu>::call, l.norm_backward = Sticky<norm_backward_gpu>::call;
    l.linear_needs = linear_needs_gpu;
    l.linear_forward = Sticky<linear_forward_gpu>::call, l.linear_backward = Sticky<linear_backward_gpu>::call;
    l.gelu_forward = Sticky<gelu_forward_gpu>::call, l.gelu_backward = Sticky<gelu_backward_gpu>::call;
    l.attention_needs = attention_needs_gpu, l.attention_saved = attention_saved_gpu;
    l.attention_forward = Sticky<attention_forward_best_gpu>::call;
    l.attention_backward = Sticky<attention_backward_gpu>::call;
    l.variant_needs = variant_needs_gpu;
    l.variant_forward = Sticky<variant_forward_gpu>::call, l.variant_backward = Sticky<variant_backward_gpu>::call;
    l.kept_bytes = kept_bytes_gpu, l.keep_positions = Sticky<keep_positions_gpu>::call;
    l.conv_needs = conv_needs_gpu, l.conv_prepared_bytes = conv_prepared_bytes, l.conv_prepare = conv_prepare_gpu;
    l.conv_norms = conv_norms_gpu, l.conv_parts = conv_parts_gpu;
    l.conv_forward = conv_forward_gpu, l.conv_backward = conv_backward_gpu;
    l.group_norm_needs = group_norm_needs_gpu, l.group_norm_kept = group_norm_kept_gpu;
    l.group_norm_forward = group_norm_forward_gpu, l.group_norm_backward = group_norm_backward_gpu;
    l.picture_attention_needs = picture_attention_needs_gpu;
    l.picture_attention_forward = picture_attention_forward_gpu;
    l.picture_attention_backward = picture_attention_backward_gpu;
    l.nearest_needs = nearest_needs_gpu, l.nearest_codes = nearest_codes_gpu;
    l.straight_through = straight_through_gpu, l.quantize_backward = quantize_backward_gpu;
    l.lookup_codes = lookup_codes_gpu;
    l.tanh_forward = tanh_forward_gpu, l.tanh_backward = tanh_backward_gpu;
    l.put_planes = put_planes_gpu, l.get_planes = get_planes_gpu;
    add_discriminator_layers(&l);
    add_perceptual_layers(&l);
    return l;
}
static const Layers cuda_layers = make_layers();

static Err heads_fit_gpu(const Device *d, size_t D, int train) {
    Attention s;
    memset(&s, 0, sizeof s);
    s.D = D;
    TRY(check_head(&s));
    const size_t bytes = max_size(attend_bytes(D, 0), train ? attend_bytes(D, 1) : 0);
    if (bytes <= d->shared_most) return OK;
    return err(
        "transformer: attention in %s with heads of %zu channels takes %zu bytes of shared memory a block, this GPU "
        "has %zu; %s--device cpu does without",
        IS_BF16 ? "bf16" : "f32", D, bytes, d->shared_most,
        IS_BF16 ? ""
        : train ? "--precision bf16 takes less, "
                : "--weights bf16 takes less, ");
}

#ifdef FLOATX_BF16
#define CUDA_TABLE cuda_bf16
#else
#define CUDA_TABLE cuda_f32
#endif
extern "C" {
extern const DeviceOps CUDA_TABLE;
const DeviceOps CUDA_TABLE = {find_device,      open_device,      close_device,
                              measure_ceilings, &cuda_layers,     sizeof(floatX),
                              device_alloc,     device_free,      put_bytes,
                              to_host,          zero_bytes,       copy_bytes,
                              earlier_failure,  replay,           forget,
                              count_changes,    row_value,        row_grad,
                              send_params,      fetch_params,     send_part,
                              zero_grad_cuda,   grad_norm_cuda,   swap_ema_cuda,
                              update_params,    heads_fit_gpu,    fused_loss_needs_gpu,
                              fused_loss_gpu,   decode_needs_gpu, decode_prompt_gpu,
                              decode_step_gpu,  draw_gpu,         choose_gpu,
                              joined,           join_id,          join,
                              place_of,         grad_sum,         grad_wait};
}
