/* math.h - elementwise mathematics of the CPU's kernels, sums and largest numbers of a row: what layers.c, attention.c
 * and optimizer.c share. Nobody outside of kernels/ includes it. */
#ifndef MATH_KERNELS_H
#define MATH_KERNELS_H

#include "kernels/kernels.h"

#include <math.h>
#include <string.h>

enum { SMALL_WORK = 16384 }; /* elements below which a loop is not worth waking the other threads */

/* ---- Elementwise mathematics. In float: polynomials, good to 1e-7, that compilers turn into vector code ---- */

#ifdef REAL_DOUBLE
static inline real exp_negative(real x) {
    return exp(x);
}
static inline real log_positive(real x) {
    return log(x);
}

/* *cdf = P(z < x), *pdf = its derivative, for z ~ N(0,1) */
static inline void normal_distribution(real *cdf, real *pdf, real x) {
    *cdf = 0.5 * erfc(-x * 0.70710678118654752440);
    *pdf = 0.39894228040143267794 * exp(-0.5 * x * x);
}
#else
static inline uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}
static inline float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* e^x for x <= 0; 0 below -87. x = n ln 2 + r, |r| <= ln(2)/2; 2^n is added to the exponent bits of e^r. Adding
 * 1.5 * 2^23 rounds to the whole number n and leaves it in the low bits. */
static inline real exp_negative(real x) {
    const float round = 12582912.0f, ln2_high = 0.693145751953125f, ln2_low = 1.428606820e-6f;
    float y = x < -87.0f ? -87.0f : x;
    float shifted = y * 1.44269504f + round, n = shifted - round;
    float r = (y - n * ln2_high) - n * ln2_low;
    const float taylor[7] = {1, 1, 1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720};
    float e = 1.0f / 5040;
    for (int k = 6; k >= 0; k--) e = e * r + taylor[k];
    float result = float_of(bits_of(e) + (bits_of(shifted) << 23));
    return x < -87.0f ? 0.0f : result; /* NaN stays NaN */
}

/* ln x for normal x > 0: x = 2^e f with f in [sqrt(1/2), sqrt 2), ln f = 2 artanh((f-1)/(f+1)). */
static inline real log_positive(real x) {
    const uint32_t sqrt_half = 0x3f3504f3u;
    uint32_t u = bits_of(x) - sqrt_half + (127u << 23);
    float e = (float)((int32_t)(u >> 23) - 127), f = float_of((u & 0x7fffffu) + sqrt_half);
    float s = (f - 1) / (f + 1), s2 = s * s;
    float series = 1.0f + s2 * (1.0f / 3 + s2 * (1.0f / 5 + s2 * (1.0f / 7 + s2 * (1.0f / 9))));
    return e * 0.69314718f + 2 * s * series;
}

/* *cdf = P(z < x), *pdf = its derivative, for z ~ N(0,1) */
static inline void normal_distribution(real *cdf, real *pdf, real x) {
    float a = x < 0 ? -x : x, bell = exp_negative(-0.5f * a * a), tail = normal_tail(a, bell);
    *cdf = x < 0 ? tail : 1 - tail;
    *pdf = 0.398942280f * bell;
}
#endif

static inline real dot(const real *a, const real *b, size_t n) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static inline real max_of(const real *x, size_t n) {
    real largest = x[0];
#pragma omp simd reduction(max : largest)
    for (size_t i = 0; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

/* How many threads a loop over that many elements is worth. */
static inline int threads_for(size_t elements) {
    return elements > SMALL_WORK ? threads_free() : 1;
}

#endif
