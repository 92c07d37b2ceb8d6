/* fast.c - the table of the CPU's fast fellows of the plain layers. */
#include "kernels/kernels.h"

const Layers fast_layers = {
    .weights_bytes = weights_bytes,
    .weights_pack = weights_pack,
};
