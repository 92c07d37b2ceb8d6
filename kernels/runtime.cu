/* runtime.cu - the calls of CUDA's runtime: finding the GPU, its memory, errors.
 *
 * device.cu includes it. Refuses: no driver, no GPU, GPUs before compute capability 8.0 (no bf16), too little memory. */
#include "kernels/device.h"

#include <stdio.h>

static Err cuda_error(cudaError_t e, const char *what) {
    if (e == cudaSuccess) return OK;
    cudaGetLastError(); /* else the next launch would report it as its own */
    return err("CUDA: %s: %s", what, cudaGetErrorString(e));
}

/* A block may have more than 48 KB of dynamic shared memory only when asked for. The limit is the kernel's, whoever starts it:
 * it is set to all that there is, so that no thread lowers what another is about to use. */
static Err allow_shared(const void *kernel, size_t bytes, const char *what) {
    cudaFuncAttributes a;
    TRY(cuda_error(cudaFuncGetAttributes(&a, kernel), what));
    const size_t most = most_shared();
    if (bytes + a.sharedSizeBytes > most)
        return err("CUDA: %s: a block takes %zu bytes of shared memory, this GPU has %zu", what,
                   bytes + a.sharedSizeBytes, most);
    return cuda_error(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(most - a.sharedSizeBytes)),
        what);
}

/* Of the GPU in use */
static Err gpu_properties(cudaDeviceProp *p) {
    int chosen = 0;
    TRY(cuda_error(cudaGetDevice(&chosen), "the GPU in use"));
    return cuda_error(cudaGetDeviceProperties(p, chosen), "properties of the GPU");
}

static Err find_cuda(char *text, size_t *free_bytes, size_t *total_bytes) {
    int n = 0, driver = 0;
    size_t unused, total;
    char memory[32];
    cudaDeviceProp p;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
        return err("--device cuda: no NVIDIA driver on this machine; use --device cpu");
    const cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess) return err("--device cuda: no usable GPU: %s; use --device cpu", cudaGetErrorString(e));
    if (n < 1) return err("--device cuda: no GPU on this machine; use --device cpu");
    TRY(gpu_properties(&p));
    if (p.major < 8)
        return err("--device cuda: %s has compute capability %d.%d, expected 8.0 or more", p.name, p.major, p.minor);
    TRY(cuda_error(cudaMemGetInfo(free_bytes ? free_bytes : &unused, &total), "memory of the GPU"));
    if (total_bytes) *total_bytes = total;
    if (text)
        snprintf(text, CUDA_TEXT_BYTES, "%s, compute capability %d.%d, %s", p.name, p.major, p.minor,
                 bytes_text(memory, total));
    return OK;
}

static Err gpu_id(unsigned char id[GPU_ID_BYTES]) {
    cudaDeviceProp p;
    TRY(gpu_properties(&p));
    memcpy(id, &p.uuid, GPU_ID_BYTES);
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

/* Where products find a parameter: its copy in bf16 stands at the same place of another arena (optimizer.cu). A matrix
 * that has no value in float is known by its copy. */
static const floatX *operand_of(const Device *d, const real *value) {
    const float *const values = (const float *)d->arena[0];
    if (!IS_BF16 || value < values || value >= values + d->arena_floats[0]) return (const floatX *)value;
    return (const floatX *)d->arena[5] + (value - values);
}

/* The parameter table's tensors */
static void free_rows(Device *d) {
    for (int k = 0; k < 6; k++) device_free(d->arena[k]), d->arena[k] = NULL;
    device_free(d->chunks), d->chunks = NULL;
    free(d->row);
    d->row = NULL, d->n_rows = 0;
}
