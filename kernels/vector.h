/* vector.h - vectors of LANES numbers, as wide as the processor of this build has them: what the matrix products share.
 * Nobody else includes it.
 *
 * gcc's and clang's vector types give the same code on x86-64, at any width, and on Arm; the few operations that
 * compilers do not find by themselves are spelt out with intrinsics. */
#ifndef VECTOR_H
#define VECTOR_H

#include <string.h>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif
#ifdef __ARM_NEON
#include <arm_neon.h>
#endif

#include "kernels/kernels.h"

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#ifdef REAL_DOUBLE
#define LANES (VECTOR_BYTES / 8) /* numbers in a vector */
#else
#define LANES (VECTOR_BYTES / 4)
#endif

typedef real Vec __attribute__((vector_size(VECTOR_BYTES)));
#define INLINE static inline __attribute__((always_inline))

enum { SMALL_PRODUCT = 1 << 20 }; /* multiply-adds below which waking a thread does not pay */

INLINE Vec load(const real *p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(real *p, Vec v) {
    memcpy(p, &v, sizeof v);
}

/* sum + a*b, rounded once. Spelt out, because whether a compiler fuses a*b + sum by itself depends on its options. */
INLINE Vec multiply_add_vec(Vec a, Vec b, Vec sum) {
#if defined(__AVX512F__) && defined(REAL_DOUBLE)
    return _mm512_fmadd_pd(a, b, sum);
#elif defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, sum);
#elif defined(__FMA__) && defined(REAL_DOUBLE)
    return _mm256_fmadd_pd(a, b, sum);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, sum);
#else
    return sum + a * b;
#endif
}

INLINE Vec multiply_add(real a, Vec b, Vec sum) {
#if defined(__AVX512F__) && defined(REAL_DOUBLE)
    return multiply_add_vec(_mm512_set1_pd(a), b, sum);
#elif defined(__AVX512F__)
    return multiply_add_vec(_mm512_set1_ps(a), b, sum);
#elif defined(__FMA__) && defined(REAL_DOUBLE)
    return multiply_add_vec(_mm256_set1_pd(a), b, sum);
#elif defined(__FMA__)
    return multiply_add_vec(_mm256_set1_ps(a), b, sum);
#else
    return sum + a * b;
#endif
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#ifdef REAL_DOUBLE
typedef long long Index __attribute__((vector_size(VECTOR_BYTES)));
#else
typedef int Index __attribute__((vector_size(VECTOR_BYTES)));
#endif
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Index){__VA_ARGS__})
#endif

/* The first halves of a and b, interleaved; the second halves. */
INLINE Vec interleave_low(Vec a, Vec b) {
#if LANES == 16
    return SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif LANES == 8
    return SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#elif LANES == 4
    return SHUFFLE(a, b, 0, 4, 1, 5);
#else
    return SHUFFLE(a, b, 0, 2);
#endif
}

INLINE Vec interleave_high(Vec a, Vec b) {
#if LANES == 16
    return SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif LANES == 8
    return SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#elif LANES == 4
    return SHUFFLE(a, b, 2, 6, 3, 7);
#else
    return SHUFFLE(a, b, 1, 3);
#endif
}

/* to[j,i] = from[i,j] for a square of LANES x LANES, in registers. Each round interleaves row i with row i+LANES/2;
 * that rotates the bits of (i,j) by one, so log2(LANES) rounds swap i and j. */
static inline void transpose_square(real *to, size_t to_stride, const real *from, size_t from_stride) {
    Vec row[LANES], next[LANES];
    for (int i = 0; i < LANES; i++) row[i] = load(from + (size_t)i * from_stride);
    for (int round = 1; round < LANES; round *= 2) {
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = interleave_low(row[i], row[i + LANES / 2]);
            next[2 * i + 1] = interleave_high(row[i], row[i + LANES / 2]);
        }
        for (int i = 0; i < LANES; i++) row[i] = next[i];
    }
    for (int i = 0; i < LANES; i++) store(to + (size_t)i * to_stride, row[i]);
}

/* to[j,i] = from[i,j] for i < rows, j < cols */
static inline void transpose(real *to, size_t to_stride, const real *from, size_t from_stride, size_t rows,
                             size_t cols) {
    for (size_t i = 0; i < rows; i += LANES) {
        const size_t high = min_size(LANES, rows - i);
        size_t j = 0;
        if (high == LANES)
            for (; j + LANES <= cols; j += LANES)
                transpose_square(to + j * to_stride + i, to_stride, from + i * from_stride + j, from_stride);
        for (; j < cols; j++)
            for (size_t r = 0; r < high; r++) to[j * to_stride + i + r] = from[(i + r) * from_stride + j];
    }
}

/* A matrix seen through two strides: element (i,j) is p[i * row + j * col]. Either row or col is 1. */
typedef struct {
    const real *p;
    size_t row, col;
} View;

INLINE View view_at(View v, size_t i, size_t j) {
    v.p += i * v.row + j * v.col;
    return v;
}

#ifndef REAL_DOUBLE

/* Within every 16 bytes: the first or second halves of a and b, interleaved by numbers or by pairs of numbers. Of a and
 * then b: every second 16 bytes. */
#if LANES == 16
#define LOW4(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HIGH4(a, b) SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define LOW2(a, b) SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HIGH2(a, b) SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define EVEN(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define ODD(a, b) SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#elif LANES == 8
#define LOW4(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define HIGH4(a, b) SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define LOW2(a, b) SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define HIGH2(a, b) SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define EVEN(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define ODD(a, b) SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#else
#define LOW4(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define HIGH4(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#define LOW2(a, b) SHUFFLE(a, b, 0, 1, 4, 5)
#define HIGH2(a, b) SHUFFLE(a, b, 2, 3, 6, 7)
#endif

/* The first n numbers at p and zeros behind; LANES at most. */
INLINE Vec load_first(const real *p, size_t n) {
    Vec v = {0};
    if (n >= LANES) return load(p);
#if defined(__AVX512F__)
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#endif
    memcpy(&v, p, n * sizeof *p);
    return v;
}

/* Number j of v[i] and number i of v[j] change places: squares of 4 x 4 numbers in themselves, within 16 bytes, where
 * processors shuffle fastest; then the squares, 16 bytes at a time. */
INLINE void transpose_vecs(Vec v[LANES]) {
    Vec t[LANES];
    for (int i = 0; i < LANES; i += 4) {
        const Vec low = LOW4(v[i], v[i + 1]), high = HIGH4(v[i], v[i + 1]);
        const Vec low2 = LOW4(v[i + 2], v[i + 3]), high2 = HIGH4(v[i + 2], v[i + 3]);
        t[i] = LOW2(low, low2), t[i + 1] = HIGH2(low, low2);
        t[i + 2] = LOW2(high, high2), t[i + 3] = HIGH2(high, high2);
    }
    for (int i = 0; i < 4; i++) {
#if LANES == 16
        const Vec a = EVEN(t[i], t[i + 4]), b = ODD(t[i], t[i + 4]);
        const Vec c = EVEN(t[i + 8], t[i + 12]), d = ODD(t[i + 8], t[i + 12]);
        v[i] = EVEN(a, c), v[i + 4] = EVEN(b, d), v[i + 8] = ODD(a, c), v[i + 12] = ODD(b, d);
#elif LANES == 8
        v[i] = EVEN(t[i], t[i + 4]), v[i + 4] = ODD(t[i], t[i + 4]);
#else
        v[i] = t[i];
#endif
    }
}

#endif

/* ---- Weights in fewer bits ---- */

typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef float Floats __attribute__((vector_size(LANES * 4)));

/* LANES numbers of bf16, the upper half of a float. Spelt out where compilers take such conversions apart. */
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
INLINE Vec load_bf16(const uint16_t *p) {
#if defined(__AVX512F__) && !defined(REAL_DOUBLE)
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
#elif defined(__AVX2__) && !defined(REAL_DOUBLE)
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
#elif defined(__ARM_NEON) && !defined(REAL_DOUBLE)
    return (Vec)vshll_n_u16(vld1_u16(p), 16);
#else
    Halves h;
    memcpy(&h, p, sizeof h);
    const Words bits = __builtin_convertvector(h, Words) << 16;
    return __builtin_convertvector((Floats)bits, Vec);
#endif
}

/* LANES factors */
INLINE Vec load_factors(const float *p) {
    Floats f;
    memcpy(&f, p, sizeof f);
    return __builtin_convertvector(f, Vec);
}

/* gemm.c: this thread's room for what is packed, where no product of floats is under way. */
enum { THREAD_ROOM = 512 * 1024 }; /* bytes */
uint16_t *thread_room(void);
/* bf16.c: gemm of operands in bf16, or each the sum of two; M, N, K > 0; room: the calling thread's. */
void gemm_bf16(int x3, size_t M, size_t N, size_t K, View a, View b, int accumulate, real *C, size_t ldc, int threads,
               uint16_t *room);

#endif
