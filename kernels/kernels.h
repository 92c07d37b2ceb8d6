/* kernels.h - what kernels/ gives on a CPU: matrix products, products for few rows, convolutions. */
#ifndef KERNELS_H
#define KERNELS_H

#include "base/compute.h"

#ifdef __cplusplus
extern "C" {
#endif

extern const Layers fast_layers; /* fast.c */
#ifndef __cplusplus
/* The fellows of plain layers that fast.c has: each as Layers declares it, under its name and _fast. */
#define FAST(layer) extern __typeof__(*((const Layers *)0)->layer) layer##_fast
/* layers.c */
FAST(embed_forward);
FAST(embed_backward);
FAST(norm_forward);
FAST(norm_backward);
FAST(linear_forward);
FAST(linear_backward);
FAST(gelu_forward);
FAST(gelu_backward);
FAST(variant_needs);
FAST(variant_forward);
FAST(variant_backward);
FAST(stream_needs);
FAST(linear_stream);
/* attention.c */
FAST(attention_needs);
FAST(attention_saved);
FAST(attention_forward);
FAST(attention_backward);
FAST(kept_bytes);
FAST(keep_positions);
FAST(attention_from_kept);
/* optimizer.c */
FAST(denoising_loss);
FAST(adamw);
FAST(adamw_bf16);
FAST(ema);
#endif
/* optimizer.c. x as one of the two bf16 beside it (itself if it is one), by 16 random bits: the mean over all of them
 * is x. NaN and infinity stay. Moments in bf16 are rounded so after every step, by random numbers of row, element and
 * step alone; values move by the moments before rounding. */
uint16_t round_at_random(float x, uint32_t random);

/* C = op(A) op(B) (+ C if accumulate).  Row-major; ld* are row strides in elements.
 *   op(A) (M,K): A is (M,K), or (K,M) when trans_a;   op(B) (K,N): B is (K,N), or (N,K) when trans_b
 *   C     (M,N) overwritten, or added to when accumulate != 0
 * Empty M or N does nothing; K = 0 zeroes C (or leaves it, when accumulating). No aliasing of C with A or B.
 * The order of additions for an element of C is fixed by K alone: any thread count gives the same bits. Called
 * from inside a parallel region it runs on the calling thread alone, with the same bits. Cannot fail. */
void gemm(Precision precision, int trans_a, int trans_b, size_t M, size_t N, size_t K, const real *A, size_t lda,
          const real *B, size_t ldb, int accumulate, real *C, size_t ldc);

size_t weights_bytes(WeightFormat format, size_t N, size_t K); /* of data */
/* Row j of a matrix of row length K, x (K), goes to its place in `data`, zero before; format not WEIGHTS_REAL. bf16
 * rounds to the nearest, ties to even: off by 2^-8 of a number at most. int8: scale[j] = largest/127, off by half of
 * that; numbers that are not finite make it NaN. */
void weights_pack(WeightFormat format, void *data, float *scale, const real *x, size_t j, size_t K);
/* to (n) = x (n) rounded to bf16. */
void round_bf16(uint16_t *to, const real *x, size_t n);
/* C (M,N) = A (M,K) W^T (+ C if accumulate): any M, but made for the few rows of decoding, as fast as memory hands over
 * the weights. Cannot fail. With packed weights the numbers of A are rounded to bf16 first; sums are real. The order
 * of additions is fixed by K and the format alone: a row alone equals the row in a batch, for any thread count.
 *   work: gemm_stream_work(M, K) bytes; NULL for WEIGHTS_REAL */
void gemm_stream(size_t M, size_t N, size_t K, const real *A, size_t lda, const Weights *w, int accumulate, real *C,
                 size_t ldc, void *work);
size_t gemm_stream_work(size_t M, size_t K);
/* Attention to n keys or values (n,width), in bf16 or real; width is a multiple of 16.
 *   kept_dots       p (n) = k q, q (width)
 *   kept_weighted   y (width) = sum over j of p[j] v[j,:] */
void kept_dots(int bf16, real *p, const real *q, const void *k, size_t n, size_t width);
void kept_weighted(int bf16, real *y, const real *p, const void *v, size_t n, size_t width);

/* ---- conv.c: the fellows of vqgan.c's convolutions. backward: 0 no, 1 yes, 2 of dx alone. ---- */
size_t conv_needs_fast(const Compute *on, const Conv *c, int backward);
void conv_forward_fast(const Compute *on, real *y, const real *x, const real *w, const real *bias, const real *add,
                       const Conv *c);
void conv_backward_fast(const Compute *on, real *dx, real *dw, real *db, const real *dy, const real *x, const real *w,
                        int accumulate, const Conv *c);
/* How many multiplications that takes, one of bf16x3 counted once; the direct way takes C*M*9 (1x1: C*M) for each pixel
 * of y, and twice that backward. */
double conv_multiplications(Precision precision, const Conv *c, int backward);

/* ---- conv_bf16.c: what conv.c leaves to it, in bf16 and bf16x3. dx and dw may be NULL. ---- */
size_t conv_bf16_needs(const Compute *on, const Conv *c, int backward);
void conv_bf16_forward(const Compute *on, real *y, const real *x, const real *w, const real *bias, const real *add,
                       const Conv *c);
void conv_bf16_backward(const Compute *on, real *dx, real *dw, const real *dy, const real *x, const real *w,
                        int accumulate, const Conv *c);

/* ---- guess.c ---- */
/* The next block: sample[b].length positions of each sample from sample[b].at on, 0 for one that is done. tokens gets
 * the guesses that all but the last of them are fed to the next one as. */
void guess_block(Sample *sample, Guesses *g);
/* What a pass costs beside its positions, in positions: *pass for the block, *each for every sample in it. */
void guess_costs(const Guesses *g, double *pass, double *each);

/* ---- norm.c: the fellows of vqgan.c's other layers ---- */
size_t group_norm_needs_fast(const Compute *on, const GroupNorm *n, int backward);
size_t group_norm_kept_fast(const GroupNorm *n);
void group_norm_forward_fast(const Compute *on, real *y, real *kept, const real *x, const real *gamma, const real *beta,
                             const GroupNorm *n);
void group_norm_backward_fast(const Compute *on, real *dx, real *dgamma, real *dbeta, real *dy, const real *x,
                              const real *gamma, const real *beta, const real *kept, int accumulate,
                              const GroupNorm *n);
size_t picture_attention_needs_fast(const Compute *on, size_t B, size_t C, size_t N, int backward);
void picture_attention_forward_fast(const Compute *on, real *y, real *p, const real *q, const real *k, const real *v,
                                    size_t B, size_t C, size_t N);
void picture_attention_backward_fast(const Compute *on, real *dq, real *dk, real *dv, const real *dy, const real *q,
                                     const real *k, const real *v, const real *p, const int accumulate[3], size_t B,
                                     size_t C, size_t N);
size_t nearest_needs_fast(const Compute *on, const Codes *s);
void nearest_codes_fast(const Compute *on, int32_t *code, const real *z, const real *book, const Codes *s);
/* Sum of n numbers, in an order that depends on n alone, emptied from short chains into double. */
double sum_reals(const real *x, size_t n);

/* ---- discriminator.c: fellows of the layers in training/discriminator.c ---- */
size_t conv4_needs_fast(const Compute *on, const Conv4 *c);
void conv4_forward_fast(const Compute *on, real *y, const real *x, const real *w, const Conv4 *c);
void conv4_backward_fast(const Compute *on, real *dx, real *dw, const real *dy, const real *x, const real *w,
                         const Conv4 *c);
size_t activate_needs_fast(const Compute *on, const Activation *s);
void activate_forward_fast(const Compute *on, real *a, const real *y, const Activation *s);
void activate_backward_fast(const Compute *on, real *g, real *dgamma, real *dbeta, const real *a, const real *y,
                            const real *other, double step, const Activation *s);

/* ---- perceptual.c: fellows of the layers in training/perceptual.c ---- */
void relu_forward_fast(const Compute *on, real *y, size_t n);
void relu_backward_fast(const Compute *on, real *dy, const real *y, size_t n);
void pool_forward_fast(const Compute *on, real *y, const real *x, size_t B, size_t C, size_t h, size_t w);
void pool_backward_fast(const Compute *on, real *dx, const real *dy, const real *x, size_t B, size_t C, size_t h,
                        size_t w);
size_t comparison_sums_fast(size_t B, size_t hw);
void compare_features_fast(const Compute *on, double *sums, real *dr, const real *a, const real *r, const real *lin,
                           const TapShape *c);

#ifdef __cplusplus
}
#endif
#endif
