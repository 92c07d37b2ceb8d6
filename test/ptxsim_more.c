/* ptxsim_more.c - a call of CUDA's runtime that the interpreter of PTX does not have: how many clusters the GPU
 * holds at once, as if any blocks could stand in one. test/ptx.sh links it. */
#include <cuda_runtime.h>

cudaError_t cudaOccupancyMaxActiveClusters(int *n, const void *kernel, const cudaLaunchConfig_t *c) {
    int per_sm = 0, sms = 0;
    unsigned size = 1;
    cudaError_t e =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, (int)c->blockDim.x, c->dynamicSmemBytes);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0);
    for (unsigned k = 0; k < c->numAttrs; k++)
        if (c->attrs[k].id == cudaLaunchAttributeClusterDimension) size = c->attrs[k].val.clusterDim.x;
    *n = e == cudaSuccess ? per_sm * sms / (int)size : 0;
    return e;
}
