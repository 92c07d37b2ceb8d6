/* nccl.cu - several GPUs, one for each rank of parallel.c: their gradients are added up by NVIDIA's NCCL.
 *
 * device.cu includes it. NCCL's header is needed to compile it, its library is opened when the ranks join. Messages run
 * on a stream of their own, each behind the part of backward that made it and beside the rest. No GPU has run this
 * yet. */
#include "kernels/device.h"

#ifndef HAVE_NCCL

static Err no_nccl(void) {
    return err("--device cuda in several processes needs NCCL, which this program was built without; libnccl-dev "
               "(NVIDIA's package) brings it, then: make clean && make");
}
static Err choose_gpu(size_t local, unsigned char id[GPU_ID_BYTES]) {
    if (local) return no_nccl();
    TRY(find_cuda(NULL, NULL, NULL));
    return gpu_id(id);
}
static int joined(const Device *d) {
    (void)d;
    return 0;
}
static Err join_id(unsigned char id[DEVICE_ID_BYTES]) {
    (void)id;
    return no_nccl();
}
static Err join(Device *d, const unsigned char id[DEVICE_ID_BYTES], int n, int own) {
    (void)d, (void)id, (void)n, (void)own;
    return no_nccl();
}
static Err grad_sum(Device *d, size_t from, size_t n) {
    (void)d, (void)from, (void)n;
    return no_nccl();
}
static Err grad_wait(Device *d) {
    (void)d;
    return no_nccl();
}
static void leave(Device *d) {
    (void)d;
}

#else

#include <dlfcn.h>
#include <nccl.h>

#define NCCL_FUNCTIONS(F)                                                                                              \
    F(ncclGetUniqueId) F(ncclCommInitRank) F(ncclCommDestroy) F(ncclAllReduce) F(ncclGetErrorString)

struct Nccl {
    ncclComm_t comm;
    cudaStream_t stream; /* of messages */
    cudaEvent_t made, summed;
#define F(name) decltype(&::name) name;
    NCCL_FUNCTIONS(F)
#undef F
};

static Err nccl_error(const Nccl *nccl, ncclResult_t e, const char *what) {
    return e == ncclSuccess ? OK : err("NCCL: %s: %s", what, nccl->ncclGetErrorString(e));
}

static Err find_nccl(Nccl *nccl) {
    void *library = dlopen("libnccl.so.2", RTLD_NOW);
    if (!library)
        return err(
            "--device cuda in several processes: libnccl.so.2, NVIDIA's NCCL, is not where libraries are; install "
            "it (NVIDIA's package libnccl2) or name its folder in LD_LIBRARY_PATH");
#define F(function)                                                                                                    \
    nccl->function = (decltype(&::function))dlsym(library, #function);                                                 \
    if (!nccl->function) return err("--device cuda: libnccl.so.2 has no function " #function);
    NCCL_FUNCTIONS(F)
#undef F
    return OK;
}

static Err choose_gpu(size_t local, unsigned char id[GPU_ID_BYTES]) {
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n < 1) return find_cuda(NULL, NULL, NULL); /* says why */
    TRY(cuda_error(cudaSetDevice((int)(local % (size_t)n)), "choosing a GPU"));
    TRY(find_cuda(NULL, NULL, NULL)); /* only now: what asks a GPU for its memory takes some of it */
    return gpu_id(id);
}

static int joined(const Device *d) {
    return d->nccl != NULL;
}

static Err join_id(unsigned char id[DEVICE_ID_BYTES]) {
    Nccl nccl;
    ncclUniqueId unique;
    static_assert(sizeof unique == DEVICE_ID_BYTES, "NCCL's identifier has another size");
    TRY(find_nccl(&nccl));
    TRY(nccl_error(&nccl, nccl.ncclGetUniqueId(&unique), "an identifier"));
    memcpy(id, &unique, sizeof unique);
    return OK;
}

static Err join(Device *d, const unsigned char id[DEVICE_ID_BYTES], int n, int own) {
    ncclUniqueId unique;
    memcpy(&unique, id, sizeof unique);
    TRY(mem_alloc(&d->nccl, 1, sizeof *d->nccl, "NCCL"));
    TRY(find_nccl(d->nccl));
    TRY(cuda_error(cudaStreamCreateWithFlags(&d->nccl->stream, cudaStreamNonBlocking), "a stream"));
    TRY(cuda_error(cudaEventCreateWithFlags(&d->nccl->made, cudaEventDisableTiming), "an event"));
    TRY(cuda_error(cudaEventCreateWithFlags(&d->nccl->summed, cudaEventDisableTiming), "an event"));
    return nccl_error(d->nccl, d->nccl->ncclCommInitRank(&d->nccl->comm, n, unique, own), "joining the other GPUs");
}

static Err grad_sum(Device *d, size_t from, size_t n) {
    Nccl *nccl = d->nccl;
    float *x = (float *)d->arena[1] + from;
    TRY(cuda_error(cudaEventRecord(nccl->made, d->stream), "an event"));
    TRY(cuda_error(cudaStreamWaitEvent(nccl->stream, nccl->made, 0), "an event"));
    return nccl_error(nccl, nccl->ncclAllReduce(x, x, n, ncclFloat, ncclSum, nccl->comm, nccl->stream), "a gradient");
}

static Err grad_wait(Device *d) {
    TRY(cuda_error(cudaEventRecord(d->nccl->summed, d->nccl->stream), "an event"));
    return cuda_error(cudaStreamWaitEvent(d->stream, d->nccl->summed, 0), "an event");
}

static void leave(Device *d) {
    if (!d->nccl) return;
    if (d->nccl->comm) d->nccl->ncclCommDestroy(d->nccl->comm);
    if (d->nccl->made) cudaEventDestroy(d->nccl->made);
    if (d->nccl->summed) cudaEventDestroy(d->nccl->summed);
    if (d->nccl->stream) cudaStreamDestroy(d->nccl->stream);
    free(d->nccl);
}
#endif
