/* spike.c - which loss, or norm of a gradient, stands out of those of the last steps. */
#include "training/training.h"

#include <math.h>
#include <stdlib.h>

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x, size_t n) {
    qsort(x, n, sizeof *x, by_value);
    return x[n / 2];
}

/* A few outliers do not move medians: the deviation is their median (times 1.4826, that of a normal distribution). Half
 * a window is the least to judge by. */
int is_spike(const real recent[RECENT], double spike, double least, double small, double x) {
    double sorted[RECENT];
    size_t n = 0;
    for (size_t i = 0; i < RECENT; i++)
        if (!isnan(recent[i])) sorted[n++] = (double)recent[i];
    if (spike <= 0 || n < RECENT / 2) return 0;
    const double middle = median(sorted, n);
    for (size_t i = 0; i < n; i++) sorted[i] = fabs(sorted[i] - middle);
    return x > middle + spike * fmax(1.4826 * median(sorted, n), fmax(least * fabs(middle), small));
}
