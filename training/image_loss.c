/* image_loss.c - the loss of a reconstruction: what train.c minimises, beside LPIPS and the discriminator. */
#include <math.h>

#include "training/training.h"

/* l1 = mean |xrec - x|      l2 = mean (xrec - x)^2      dxrec (n) = w1 dl1/dxrec + w2 dl2/dxrec, or NULL */
void image_loss(const real *x, const real *xrec, size_t n, double w1, double w2, double *l1, double *l2, real *dxrec) {
    const real g1 = (real)(w1 / (double)n), g2 = (real)(2 * w2 / (double)n);
    double s1 = 0, s2 = 0;
    for (size_t i = 0; i < n; i++) {
        const real d = xrec[i] - x[i];
        s1 += fabs((double)d);
        s2 += (double)d * (double)d;
        if (dxrec) dxrec[i] = g1 * (real)((d > 0) - (d < 0)) + g2 * d;
    }
    *l1 = s1 / (double)n;
    *l2 = s2 / (double)n;
}
