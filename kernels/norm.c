/* norm.c - sums of numbers side by side. */
#include "kernels/kernels.h"

/* Sums run in LANES interleaved chains, so that they vectorise without leave to reorder, and are emptied into double
 * every RUN numbers. Order depends on n alone. */
enum { LANES = 32, RUN = 4096 };

double sum_reals(const real *x, size_t n) {
    real lane[LANES] = {0};
    double s = 0;
    for (size_t i = 0; i < n; i += RUN) {
        const size_t end = min_size(n, i + RUN);
        size_t j = i;
        for (; j + LANES <= end; j += LANES)
            for (int l = 0; l < LANES; l++) lane[l] += x[j + (size_t)l];
        for (; j < end; j++) lane[0] += x[j];
        for (int l = 0; l < LANES; l++) {
            s += (double)lane[l];
            lane[l] = 0;
        }
    }
    return s;
}
