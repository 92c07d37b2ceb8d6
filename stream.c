/* stream.c - the product of few rows with a matrix of weights, as decoding does it; weights in fewer bits.
 *
 * Owns: gemm_stream and the packing of weights (weights_pack). Refuses: nothing; it cannot fail and it allocates
 * nothing.
 *
 * Decoding multiplies 1..16 rows with a weight matrix (N,K). Nothing is reused there but the few rows, so the work is
 * to read the weights as fast as memory gives them, and gemm's packing would be in the way: gemm_stream multiplies rows
 * of weights with rows of A where they stand, LANES numbers at a time, both sides read along k.
 *
 * Promise on bits: an element of C is the sum of LANES sums, each over every LANES-th k in order, added as a tree.
 * Threads, M, N and position do not change the order, so a row computed alone equals bit for bit the same row computed
 * in a batch. (gemm has another order: the two agree to rounding only.) */

#include "vector.h"

/* ---- Weights in fewer bits ---- */

static uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1);
    return (uint16_t)((x == x ? rounded : bits | 0x400000u) >> 16);
}

static float pack_int8(int8_t *out, const real *x, size_t n) {
    float largest = 0;
    int finite = 1;
    for (size_t i = 0; i < n; i++) {
        const float size = (float)(x[i] < 0 ? -x[i] : x[i]);
        finite &= size <= 3e38f; /* false for NaN */
        largest = size > largest ? size : largest;
    }
    const float scale = largest / 127, inverse = scale > 0 ? 1 / scale : 0;
    for (size_t i = 0; i < n; i++) {
        const float q = finite ? (float)x[i] * inverse : 0;
        out[i] = (int8_t)(q < -127 ? -127 : q > 127 ? 127 : q + (q < 0 ? -0.5f : 0.5f));
    }
    return finite ? scale : 0.0f / 0.0f;
}

void weights_pack(WeightFormat format, void *out, float *scale, const real *x, size_t n) {
    if (format == WEIGHTS_INT8) {
        *scale = pack_int8((int8_t *)out, x, n);
        return;
    }
    for (size_t i = 0; i < n; i++) ((uint16_t *)out)[i] = to_bf16((float)x[i]);
}

/* ---- Few rows: the weights stream by ---- */

enum {
    STREAM_X = LANES < 4 ? LANES : 4,    /* rows of A at a time, at most; LANES sums in registers in all */
    STREAM_ROWS = LANES < 4 ? LANES : 4, /* rows of weights against one row of A */
    AHEAD = 8192                         /* bytes */
};
static const size_t STREAM_BYTES = 64 * 1024; /* weights of a task */
static const double SMALL_WORK = 1 << 20;     /* multiply-adds below which waking a thread does not pay */

typedef struct {
    size_t M, N, K;
    const real *A;
    size_t lda;
    const Weights *w;
    int accumulate;
    real *C;
    size_t ldc;
    size_t rows; /* of weights in a task */
} Stream;

/* Lane i of the result is the sum of all lanes of v[i], added as a tree, the same for every i. Each round adds the
 * halves of two vectors into one (compare transpose_square). */
INLINE Vec sum_lanes(Vec v[LANES]) {
#define ROUND(half)                                                                                                    \
    for (int i = 0; i < half && half < LANES; i++)                                                                     \
    v[i] = interleave_low(v[i], v[(i + half) % LANES]) + interleave_high(v[i], v[(i + half) % LANES])
    ROUND(8);
    ROUND(4);
    ROUND(2);
    ROUND(1);
#undef ROUND
    return v[0];
}

/* In a register from here on: gcc would rather read it from memory again for every use. */
INLINE Vec in_register(Vec v) {
#if defined(__AVX512F__) && !defined(__clang__)
    __asm__("" : "+v"(v));
#elif defined(__AVX__) && !defined(__clang__)
    __asm__("" : "+x"(v));
#endif
    return v;
}

/* before + t scale. Spelled out, for else the compiler may round once in one expansion of the kernel and twice in another,
 * and a row alone would differ from the row in a batch. */
INLINE real scaled_add(real t, real scale, real before) {
#if !defined(__FMA__) && !defined(__ARM_FEATURE_FMA)
    return before + t * scale;
#elif defined(REAL_DOUBLE)
    return __builtin_fma(t, scale, before);
#else
    return __builtin_fmaf(t, scale, before);
#endif
}

/* C[x,j] = or += A[x,:] . W[j,:] for xs rows of A and `rows` rows of weights. xs, rows, format and ahead are constants
 * where this is expanded. ahead: fetch the next rows of weights into the cache meanwhile. */
INLINE void stream_kernel(WeightFormat format, int xs, int rows, int ahead, const Stream *s, size_t x0, size_t j) {
    const size_t K = s->K, lda = s->lda, whole = K / LANES * LANES, step = K * weight_bytes(format);
    const char *w = (const char *)s->w->data + j * step;
    const real *a = s->A + x0 * lda;
    Vec sum[LANES];
    for (int i = 0; i < LANES; i++) sum[i] = (Vec){0};
    for (size_t k = 0; k < whole; k += LANES) {
        Vec ak[STREAM_X];
        for (int x = 0; x < xs; x++) ak[x] = in_register(load(a + (size_t)x * lda + k));
        for (int r = 0; r < rows; r++) {
            const char *row = w + (size_t)r * step;
            const Vec wk = in_register(load_weights(format, row, k));
            if (ahead) __builtin_prefetch(row + k * weight_bytes(format) + AHEAD, 0, 2);
            for (int x = 0; x < xs; x++) sum[x * rows + r] = multiply_add_vec(ak[x], wk, sum[x * rows + r]);
        }
    }
    if (whole < K)
        for (int x = 0; x < xs; x++) {
            const Vec ak = load_last(a + (size_t)x * lda + whole, K - whole);
            for (int r = 0; r < rows; r++) {
                const Vec wk = load_last_weights(format, w + (size_t)r * step, whole, K - whole);
                sum[x * rows + r] = multiply_add_vec(ak, wk, sum[x * rows + r]);
            }
        }
    const Vec total = sum_lanes(sum);
    for (int x = 0; x < xs; x++)
        for (int r = 0; r < rows; r++) {
            real *c = s->C + (x0 + (size_t)x) * s->ldc + j + (size_t)r;
            const real t = total[x * rows + r], before = s->accumulate ? *c : 0;
            *c = format == WEIGHTS_INT8 ? scaled_add(t, (real)s->w->scale[j + (size_t)r], before) : before + t;
        }
}

/* xs rows of A against the rows begin..end-1 of the weights. */
INLINE void stream_block(WeightFormat format, int xs, int rows, int ahead, const Stream *s, size_t x, size_t begin,
                         size_t end) {
    size_t j = begin;
    for (; j + (size_t)rows <= end; j += (size_t)rows) stream_kernel(format, xs, rows, ahead, s, x, j);
    for (; j < end; j++) stream_kernel(format, xs, 1, 0, s, x, j);
}

/* All rows of A against the rows begin..end-1 of the weights, which stay in the cache meanwhile. */
INLINE void stream_rows(WeightFormat format, const Stream *s, size_t begin, size_t end) {
    size_t x = 0;
    for (; x + STREAM_X <= s->M; x += STREAM_X) {
        if (x == 0)
            stream_block(format, STREAM_X, LANES / STREAM_X, 1, s, x, begin, end);
        else
            stream_block(format, STREAM_X, LANES / STREAM_X, 0, s, x, begin, end);
    }
    for (; x < s->M; x++) stream_block(format, 1, STREAM_ROWS, 1, s, x, begin, end);
}

static void stream_task(void *context, size_t task) {
    const Stream *s = (const Stream *)context;
    const size_t begin = task * s->rows, end = min_size(s->N, begin + s->rows);
    if (s->w->format == WEIGHTS_BF16)
        stream_rows(WEIGHTS_BF16, s, begin, end);
    else if (s->w->format == WEIGHTS_INT8)
        stream_rows(WEIGHTS_INT8, s, begin, end);
    else
        stream_rows(WEIGHTS_REAL, s, begin, end);
}

void gemm_stream(size_t M, size_t N, size_t K, const real *A, size_t lda, const Weights *w, int accumulate, real *C,
                 size_t ldc) {
    if (M == 0 || N == 0) return;
    Stream s = {M, N, K, A, lda, w, accumulate, C, ldc, 0};
    s.rows = round_up(STREAM_BYTES / max_size(K * weight_bytes(w->format), 1) + 1, STREAM_ROWS);
    const int threads = (double)(M + 8) * (double)N * (double)K < SMALL_WORK ? 1 : threads_free();
    parallel_for(threads, ceil_div(N, s.rows), stream_task, &s);
}
