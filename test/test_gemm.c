/* test_gemm.c - the matrix product against three independent truths:
 *   exact     small whole numbers, whose products and sums are exact in any order: equality, every shape and transpose
 *   bound     random numbers against long double, within the a-priori bound of the promised order of additions
 *   bits      equality with that order written out as a plain loop, for 1, 2 and 3 threads, inside a parallel region,
 *             from two plain threads at once, and for single rows
 * Weights in fewer bits and the product for few rows: against a bound, and bits in any company and on any thread.
 * Everything around the matrices (strides wider than the rows, memory behind the last row) must stay unread and
 * untouched: inputs are padded with NaN, outputs with a mark, and nothing is allocated behind the last element. */
#include "test.h"
#include <float.h>
#include <pthread.h>

#ifdef REAL_DOUBLE
static const double UNIT = DBL_EPSILON / 2;
#else
static const double UNIT = FLT_EPSILON / 2;
#endif
enum { KC = 384 }; /* as in gemm.c: part of its promise on bits */
static const real MARK = 12345;

typedef struct {
    Precision precision;
    int trans_a, trans_b, accumulate;
    size_t M, N, K, lda, ldb, ldc;
    real *A, *B, *C, *before; /* before: C before the product */
    size_t c_size;
} Case;

static uint64_t seed;
static Precision precision; /* of the cases that are made */

static real from_bf16(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return (real)f;
}

static real random_real(int whole) {
    seed++;
    return whole ? (real)rng_below(seed, 0, 0, 9) - 4 : (real)(2 * rng_uniform(seed, 0, 0) - 1);
}

/* (rows,cols) numbers of row stride ld, NaN between them, nothing behind the last */
static real *matrix(size_t rows, size_t cols, size_t ld, int whole, size_t *size) {
    *size = rows && cols ? (rows - 1) * ld + cols : 0;
    real *m = (real *)malloc(*size * sizeof(real) + 1);
    for (size_t i = 0; i < *size; i++) m[i] = i % ld < cols ? random_real(whole) : (real)NAN;
    return m;
}

static Case make_case(int trans, size_t M, size_t N, size_t K, size_t pad, int whole) {
    Case c = {.precision = precision,
              .trans_a = trans & 1,
              .trans_b = trans >> 1 & 1,
              .accumulate = trans >> 2 & 1,
              .M = M,
              .N = N,
              .K = K};
    size_t size;
    c.lda = (c.trans_a ? M : K) + pad;
    c.ldb = (c.trans_b ? K : N) + 2 * pad;
    c.ldc = N + 3 * pad;
    c.A = matrix(c.trans_a ? K : M, c.trans_a ? M : K, c.lda, whole, &size);
    c.B = matrix(c.trans_b ? N : K, c.trans_b ? K : N, c.ldb, whole, &size);
    c.C = matrix(M, N, c.ldc, whole, &c.c_size);
    c.before = (real *)malloc(c.c_size * sizeof(real) + 1);
    for (size_t i = 0; i < c.c_size; i++) {
        if (i % c.ldc >= N)
            c.C[i] = MARK;
        else if (!c.accumulate)
            c.C[i] = (real)NAN; /* must be overwritten without being read */
        c.before[i] = c.C[i];
    }
    return c;
}

static void free_case(Case *c) {
    free(c->A);
    free(c->B);
    free(c->C);
    free(c->before);
}

static void run(const Case *c, real *C) {
    memcpy(C, c->before, c->c_size * sizeof(real));
    gemm(c->precision, c->trans_a, c->trans_b, c->M, c->N, c->K, c->A, c->lda, c->B, c->ldb, c->accumulate, C, c->ldc);
}

static real a_at(const Case *c, size_t i, size_t k) {
    return c->trans_a ? c->A[k * c->lda + i] : c->A[i * c->lda + k];
}

static real b_at(const Case *c, size_t k, size_t j) {
    return c->trans_b ? c->B[j * c->ldb + k] : c->B[k * c->ldb + j];
}

/* The length of the pieces that K is cut into: the longest is at most KC, all but the last are equal. */
static size_t piece(size_t K) {
    const size_t pieces = (K + KC - 1) / KC;
    return pieces ? (K + pieces - 1) / pieces : 1;
}

/* What the product takes a number for. */
static long double operand(const Case *c, real x) {
    uint16_t half;
    if (c->precision != PRECISION_BF16) return (long double)x;
    round_bf16(&half, &x, 1);
    return (long double)from_bf16(half);
}

/* Of the sum of |terms|. Adding n terms in sequence with unit roundoff u errs by at most n*u/(1-n*u) of it (Higham,
 * Accuracy and Stability, 2002, sec. 3.1); n = a product, a piece, the pieces, the old C. bf16: the products are exact,
 * both ways of adding pairs take at most one addition more. bf16x3: three products, two of them with a low part, 2^-8 of a
 * number at most; the low part is rounded, 2^-16 of a number for each of the two, and low times low is left out, another
 * 2^-16. Whole numbers that bf16 holds, with sums below 2^24, allow no error at all. */
static double error_bound(const Case *c, int whole) {
    const double terms = c->precision == PRECISION_F32
                             ? (double)(piece(c->K) + (c->K + KC - 1) / KC + 3)
                             : (double)(c->K + c->K / 32 + 6) * (c->precision == PRECISION_BF16X3 ? 1.01 * 3 : 1);
    const double n = terms * UNIT;
    return whole ? 0 : n / (1 - n) + (c->precision == PRECISION_BF16X3 ? 3.03 * 0x1p-16 : 0);
}

/* Every element of c->C within the a-priori bound, every element beside them untouched. */
static int correct(const Case *c, int whole) {
    const double bound = error_bound(c, whole);
    for (size_t e = 0; e < c->c_size; e++) {
        const size_t i = e / c->ldc, j = e % c->ldc;
        if (j >= c->N) {
            if (c->C[e] != MARK) return 0;
            continue;
        }
        long double sum = c->accumulate ? (long double)c->before[e] : 0, size = c->accumulate ? fabsl(sum) : 0;
        for (size_t k = 0; k < c->K; k++) {
            const long double product = operand(c, a_at(c, i, k)) * operand(c, b_at(c, k, j));
            sum += product;
            size += fabsl(product);
        }
        if (!(fabsl((long double)c->C[e] - sum) <= (long double)bound * size)) return 0; /* also taken when NaN */
    }
    return 1;
}

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define HAVE_FMA 1
#else
#define HAVE_FMA 0
#endif

/* sum + a*b as the micro kernel rounds it on this machine */
static real multiply_add(real a, real b, real sum) {
#if HAVE_FMA && defined(REAL_DOUBLE)
    return fma(a, b, sum);
#elif HAVE_FMA
    return fmaf(a, b, sum);
#else
    volatile real product = a * b; /* volatile: must be rounded */
    return sum + product;
#endif
}

/* C in the promised order: pieces of equal length, one after the other */
static void promised_order(const Case *c, real *C) {
    const size_t length = piece(c->K);
    memcpy(C, c->before, c->c_size * sizeof(real));
    for (size_t i = 0; i < c->M; i++)
        for (size_t j = 0; j < c->N; j++)
            for (size_t start = 0; start < c->K; start += length) {
                real sum = 0, *to = C + i * c->ldc + j;
                for (size_t k = start; k < c->K && k < start + length; k++)
                    sum = multiply_add(a_at(c, i, k), b_at(c, k, j), sum);
                *to = start || c->accumulate ? *to + sum : sum;
            }
}

static int same_bits(const Case *c, const real *x, const real *y) {
    return c->c_size && memcmp(x, y, c->c_size * sizeof(real)) == 0;
}

static int product_is(int trans, size_t M, size_t N, size_t K, size_t pad, int whole) {
    Case c = make_case(trans, M, N, K, pad, whole);
    run(&c, c.C);
    const int ok = correct(&c, whole);
    if (!ok)
        printf("     precision %d trans_a %d trans_b %d accumulate %d M %zu N %zu K %zu pad %zu\n", c.precision,
               c.trans_a, c.trans_b, c.accumulate, M, N, K, pad);
    free_case(&c);
    return ok;
}

/* Sizes around every boundary: vectors of 2..16, micro tiles of 6 and 8 rows, panels of 4..32, pieces of at most
 * 384. */
static void test_shapes(void) {
    static const size_t small[] = {1, 2, 3, 5, 6, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 47, 64, 65};
    enum { SMALL = sizeof small / sizeof *small };
    int ok = 1, bound = 1;
    for (int trans = 0; trans < 8; trans++)
        for (size_t m = 0; m < SMALL; m++)
            for (size_t n = 0; n < SMALL; n++)
                for (size_t k = (m + n) % 3; k < SMALL; k += 3)
                    ok &= product_is(trans, small[m], small[n], small[k], (m + n + k) % 4, 1);
    CHECK(ok);
    CHECK(ok);
    static const size_t large[][3] = {{257, 17, 3},  {3, 257, 17},   {17, 3, 257},    {257, 129, 511}, {1, 1031, 300},
                                      {9, 515, 384}, {530, 97, 385}, {100, 1030, 40}, {19, 23, 1025},  {355, 1, 769}};
    for (int trans = 0; trans < 8; trans++)
        for (size_t s = precision == PRECISION_F32 ? 0 : 4; s < sizeof large / sizeof *large; s++) {
            if (precision != PRECISION_F32 && s == 6) continue; /* slow; blocks of bf16 are smaller */
            ok &= product_is(trans, large[s][0], large[s][1], large[s][2], s % 3, 1);
            bound &= product_is(trans, large[s][0], large[s][1], large[s][2], (s + 1) % 3, 0);
        }
    CHECK(ok);
    CHECK(bound);
}

/* In bf16: more than one piece of k, and more rows and columns than fit the buffers of a thread, and of the program. */
static void test_pieces(void) {
    int ok = 1;
    threads_set(2);
    for (int trans = 0; trans < 8; trans++) {
        ok &= product_is(trans, 70, 90, 2049, 1, trans % 3 != 0);
        ok &= product_is(trans, 19, 5, 4200, 0, trans % 3 == 0);
    }
    ok &= product_is(0, 1040, 5, 2049, 0, 1) && product_is(3, 5, 1040, 2049, 0, 1);
    CHECK(ok);
    threads_set(1);
    ok = product_is(1, 70, 90, 2049, 1, 1) && product_is(2, 70, 90, 2049, 1, 1);
    CHECK(ok);
    threads_set(0);
}

static void test_empty(void) {
    real C[6] = {1, 2, 3, 4, 5, 6};
    const real one = 1;
    gemm(PRECISION_F32, 0, 0, 0, 3, 2, &one, 2, &one, 3, 0, C, 3);
    gemm(PRECISION_F32, 0, 0, 3, 0, 2, &one, 2, &one, 3, 0, C, 3);
    gemm(PRECISION_F32, 0, 0, 0, 0, 0, NULL, 0, NULL, 0, 0, NULL, 0);
    gemm(PRECISION_F32, 1, 1, 2, 2, 0, NULL, 0, NULL, 0, 1, C, 3); /* K = 0 adds nothing */
    CHECK(C[0] == 1 && C[1] == 2 && C[2] == 3 && C[3] == 4 && C[4] == 5 && C[5] == 6);
    gemm(PRECISION_F32, 0, 0, 2, 2, 0, NULL, 0, NULL, 0, 0, C, 3); /* K = 0 is a sum of nothing */
    CHECK(C[0] == 0 && C[1] == 0 && C[2] == 3 && C[3] == 0 && C[4] == 0 && C[5] == 6);
}

typedef struct {
    const Case *c;
    real *C;
    int rounds;
} Job;

static void *run_many(void *job_pointer) {
    const Job *job = (const Job *)job_pointer;
    for (int i = 0; i < job->rounds; i++) run(job->c, job->C);
    return NULL;
}

/* Two threads that the pool knows nothing of call gemm at the same time, each on its own matrices. */
static int plain_threads_agree(const Case *c, const real *expected, const Case *other) {
    real *C = (real *)malloc(c->c_size * sizeof(real));
    Job mine = {c, C, 4}, theirs = {other, other->C, 6};
    pthread_t thread;
    if (pthread_create(&thread, NULL, run_many, &theirs)) return 0;
    run_many(&mine);
    pthread_join(thread, NULL);
    const int ok = same_bits(c, C, expected) && correct(other, 0);
    free(C);
    return ok;
}

typedef struct {
    const Case *c;
    const real *expected;
    int ok[4];
} Inside;

static void inside_task(void *context, size_t i) {
    Inside *a = (Inside *)context;
    real *C = (real *)malloc(a->c->c_size * sizeof(real));
    run(a->c, C);
    a->ok[i] = same_bits(a->c, C, a->expected);
    free(C);
}

static int inside_parallel_agrees(const Case *c, const real *expected) {
    Inside a = {c, expected, {0}};
    parallel_for(2, 4, inside_task, &a);
    return a.ok[0] && a.ok[1] && a.ok[2] && a.ok[3];
}

/* Rows computed alone, as in decoding, equal rows of the whole product. */
static int single_rows_agree(const Case *c, const real *expected) {
    real *row = (real *)malloc(c->N * sizeof(real));
    int ok = 1;
    for (size_t i = 0; i < c->M; i += c->M / 5 + 1) {
        const real *A = c->trans_a ? c->A + i : c->A + i * c->lda;
        memcpy(row, c->before + i * c->ldc, c->N * sizeof(real));
        gemm(c->precision, c->trans_a, c->trans_b, 1, c->N, c->K, A, c->lda, c->B, c->ldb, c->accumulate, row, c->ldc);
        ok &= memcmp(row, expected + i * c->ldc, c->N * sizeof(real)) == 0;
    }
    free(row);
    return ok;
}

/* With one thread; in bf16 each kind of processor has its own order of additions. */
static void run_alone(const Case *c, real *C) {
    threads_set(1);
    run(c, C);
}

/* Blocks are chosen by the size of the L2 cache. */
static int other_caches_agree(const Case *c, const real *expected) {
    static const size_t sizes[] = {L2_LEAST, L2_MOST};
    int ok = 1;
    threads_set(3);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        l2_set(sizes[i]);
        run(c, c->C);
        ok &= same_bits(c, c->C, expected);
    }
    l2_set(0);
    return ok;
}

static void test_bits(void) {
    Case other = make_case(2, 150, 140, 300, 1, 0);
    for (int trans = 0; trans < 8; trans++) {
        Case c = make_case(trans, 131, 173, 601, 3, 0); /* large enough to be shared among threads */
        real *expected = (real *)malloc(c.c_size * sizeof(real));
        if (precision == PRECISION_F32)
            promised_order(&c, expected);
        else
            run_alone(&c, expected);
        for (int threads = 1; threads <= 3; threads++) {
            threads_set(threads);
            run(&c, c.C);
            CHECK(same_bits(&c, c.C, expected));
        }
        CHECK(other_caches_agree(&c, expected));
        CHECK(inside_parallel_agrees(&c, expected));
        CHECK(plain_threads_agree(&c, expected, &other));
        CHECK(single_rows_agree(&c, expected));
        free(expected);
        free_case(&c);
    }
    free_case(&other);
    threads_set(0);
}

/* The checkers above must be able to say no. */
static void test_negative_control(void) {
    Case c = make_case(6, 37, 41, 300, 2, 0);
    run(&c, c.C);
    CHECK(correct(&c, 0));
    real *right = (real *)malloc(c.c_size * sizeof(real)), *const element = c.C + 5 * c.ldc + 40, keep = *element;
    memcpy(right, c.C, c.c_size * sizeof(real));
    *element = keep + a_at(&c, 5, 299) * b_at(&c, 299, 40); /* one product twice */
    CHECK(!correct(&c, 0));
    *element = (real)NAN;
    CHECK(!correct(&c, 0));
    *element = keep + (real)(4 * UNIT); /* one bit or a few */
    CHECK(!same_bits(&c, c.C, right));
    *element = keep;
    CHECK(same_bits(&c, c.C, right) && correct(&c, 0));
    c.C[5 * c.ldc + 41] = 0; /* between two rows */
    CHECK(!correct(&c, 0));
    free(right);
    free_case(&c);

    c = make_case(0, 9, 10, 11, 0, 1);
    run(&c, c.C);
    CHECK(correct(&c, 1));
    c.trans_b = 1; /* swapped indices */
    c.ldb = 11;
    c.B = (real *)realloc(c.B, 110 * sizeof(real));
    CHECK(!correct(&c, 1));
    free_case(&c);
}

/* ---- Weights in fewer bits, and few rows ---- */

enum { FEW = 21, COLS = 147, LONG = 603, MANY = 530 }; /* no multiples of anything */
typedef struct {
    real A[FEW * LONG], rounded[FEW * LONG], plain[COLS * LONG]; /* plain: the weights, unpacked */
    Weights w;
    float scale[COLS];
    void *data, *work;
} Packed;

static real number(size_t i) {
    return (real)(2 * rng_uniform(5, rng_stream(RNG_TEST, 0, 0), i) - 1);
}

static void round_all(real *to, const real *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint16_t half;
        round_bf16(&half, x + i, 1);
        to[i] = from_bf16(half);
    }
}

static void packed_free(Packed *p) {
    free(p->data);
    free(p->work);
}

/* Packs p->plain as the weights. */
static void pack_plain(Packed *p, WeightFormat format) {
    CHECK_OK(mem_alloc(&p->data, weights_bytes(format, COLS, LONG), 1, "weights"));
    CHECK_OK(mem_alloc(&p->work, gemm_stream_work(MANY, LONG), 1, "work space"));
    for (size_t j = 0; j < COLS && format != WEIGHTS_REAL; j++)
        weights_pack(format, p->data, p->scale, p->plain + j * LONG, j, LONG);
    if (format == WEIGHTS_REAL) memcpy(p->data, p->plain, sizeof p->plain);
    p->w.format = format, p->w.scale = p->scale, p->w.data = p->data;
}

/* Weights that packing does not change: bf16 numbers; whole numbers times a factor, the largest of them 127. */
static void make_packed(Packed *p, WeightFormat format) {
    for (size_t i = 0; i < FEW * LONG; i++) p->A[i] = number(3 * i + 1);
    for (size_t i = 0; i < COLS * LONG; i++) p->plain[i] = number(i);
    if (format == WEIGHTS_BF16) round_all(p->plain, p->plain, COLS * LONG);
    for (size_t i = 0; i < COLS * LONG && format == WEIGHTS_INT8; i++)
        p->plain[i] = (real)((int)(i % LONG * 37 % 255) - 127) * (real)ldexp((double)(i / LONG % 11 + 1), -12);
    memcpy(p->rounded, p->A, sizeof p->A);
    if (weight_precision(format) == PRECISION_BF16) round_all(p->rounded, p->A, FEW * LONG);
    pack_plain(p, format);
}

/* What a sum of K products may be off by, of the sum of magnitudes: each is rounded at most twice. bf16x3: error_bound. */
static double stream_bound(const Packed *p, size_t K) {
    const int x3 = p->w.format == WEIGHTS_BF16X3;
    return 2 * (double)(K + 2) * UNIT * (x3 ? 3.03 : 1) + (x3 ? 3.03 * 0x1p-16 : 0);
}

static int stream_is_right(const Packed *p, size_t M, size_t N, size_t K, const real *C, size_t ldc, real before) {
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++) {
            double sum = (double)before, size = fabs((double)before);
            for (size_t k = 0; k < K; k++) {
                const double x = (double)p->rounded[i * LONG + k] * (double)p->plain[j * LONG + k];
                sum += x, size += fabs(x);
            }
            if (!(fabs((double)C[i * ldc + j] - sum) <= stream_bound(p, K) * size)) return 0;
        }
    return 1;
}

/* More rows than share one reading of the weights: row i of them is row i % FEW of A. */
static void test_stream_many(const Packed *p, const real *all) {
    real *a, *c;
    int same = 1;
    CHECK_OK(mem_alloc(&a, MANY * LONG, sizeof *a, "rows"));
    CHECK_OK(mem_alloc(&c, MANY * COLS, sizeof *c, "products"));
    for (size_t i = 0; i < MANY; i++) memcpy(a + i * LONG, p->A + i % FEW * LONG, LONG * sizeof *a);
    for (size_t cache = L2_LEAST; cache <= L2_MOST; cache *= L2_MOST / L2_LEAST) { /* which chooses groups of rows */
        l2_set(cache);
        gemm_stream(MANY, COLS, LONG, a, LONG, &p->w, 0, c, COLS, p->work);
        for (size_t i = 0; i < MANY; i++) same &= !memcmp(c + i * COLS, all + i % FEW * COLS, COLS * sizeof *c);
    }
    l2_set(0);
    CHECK(same);
    free(a);
    free(c);
}

static void test_stream(void) {
    static Packed p;
    static real all[FEW * COLS], other[FEW * COLS];
    static const size_t rows[] = {1, 2, 3, 4, 7, 16, FEW};
    for (int format = WEIGHTS_REAL; format <= WEIGHTS_BF16X3; format++) {
        make_packed(&p, (WeightFormat)format);
        threads_set(1);
        gemm_stream(FEW, COLS, LONG, p.A, LONG, &p.w, 0, all, COLS, p.work);
        CHECK(stream_is_right(&p, FEW, COLS, LONG, all, COLS, 0));
        for (size_t k = 0; k < sizeof rows / sizeof *rows; k++) /* the same bits in any company, on any thread */
            for (int threads = 1; threads <= 3; threads++) {
                const size_t M = rows[k], first = FEW - M;
                threads_set(threads);
                gemm_stream(M, COLS, LONG, p.A + first * LONG, LONG, &p.w, 0, other, COLS, p.work);
                CHECK(!memcmp(other, all + first * COLS, M * COLS * sizeof(real)));
            }
        test_stream_many(&p, all);
        for (size_t n = 1; n <= COLS; n += 13) { /* fewer outputs: the others stay */
            for (size_t i = 0; i < FEW * COLS; i++) other[i] = (real)0.5;
            gemm_stream(2, n, LONG, p.A, LONG, &p.w, 0, other, COLS, p.work);
            CHECK(!memcmp(other, all, n * sizeof(real)) && (n == COLS || other[n] == (real)0.5));
        }
        for (size_t i = 0; i < FEW * COLS; i++) other[i] = (real)0.5;
        gemm_stream(FEW, COLS, LONG, p.A, LONG, &p.w, 1, other, COLS, p.work); /* whole vectors accumulate */
        CHECK(stream_is_right(&p, FEW, COLS, LONG, other, COLS, (real)0.5));
        for (size_t i = 0; i < FEW * COLS; i++) other[i] = (real)0.5;
        gemm_stream(3, 1, LONG, p.A, LONG, &p.w, 1, other, COLS, p.work); /* accumulates; touches nothing beside it */
        CHECK(stream_is_right(&p, 3, 1, LONG, other, COLS, (real)0.5) && other[1] == (real)0.5);
        other[0] += 1; /* the check can fail */
        CHECK(!stream_is_right(&p, 3, 1, LONG, other, COLS, (real)0.5));
        gemm_stream(2, 2, 0, p.A, LONG, &p.w, 0, other, COLS, p.work);
        CHECK(other[0] == 0 && other[COLS + 1] == 0 && other[2] == (real)0.5);
        packed_free(&p);
    }
    threads_set(0);
}

/* Any K: the ends of words, vectors and panels. */
static void test_stream_lengths(void) {
    static const size_t lengths[] = {1, 2, 3, 5, 15, 17, 31, 64, 66, 127, 129, 255, 257, 513};
    static real a[FEW * LONG], w[37 * LONG], c[FEW * 37], one[37];
    for (int format = WEIGHTS_REAL; format <= WEIGHTS_BF16X3; format++)
        for (size_t n = 0; n < sizeof lengths / sizeof *lengths; n++) {
            const size_t K = lengths[n];
            void *data, *work;
            float scale[37];
            int ok = 1;
            CHECK_OK(mem_alloc(&data, weights_bytes((WeightFormat)format, 37, K), 1, "weights"));
            CHECK_OK(mem_alloc(&work, gemm_stream_work(FEW, K), 1, "work space"));
            for (size_t i = 0; i < FEW * K; i++) a[i] = (real)((double)(i * 7 % 31) - 15);
            for (size_t i = 0; i < 37 * K; i++) w[i] = i % K ? (real)((int)(i * 11 % 255) - 127) : 127;
            for (size_t j = 0; j < 37 && format; j++) weights_pack((WeightFormat)format, data, scale, w + j * K, j, K);
            if (format == WEIGHTS_REAL) memcpy(data, w, 37 * K * sizeof *w);
            const Weights weights = {(WeightFormat)format, data, scale};
            gemm_stream(FEW, 37, K, a, K, &weights, 0, c, 37, work);
            gemm_stream(1, 37, K, a + 20 * K, K, &weights, 0, one, 37, work);
            for (size_t i = 0; i < FEW * 37; i++) { /* whole numbers: exact */
                double sum = 0;
                for (size_t k = 0; k < K; k++) sum += (double)a[i / 37 * K + k] * (double)w[i % 37 * K + k];
                ok &= (double)c[i] == sum;
            }
            CHECK(ok && !memcmp(one, c + 20 * 37, sizeof one));
            free(data);
            free(work);
        }
}

/* The packed form of x (n), unpacked again: its product with rows that are 1 at one k. */
static void pack_and_unpack(WeightFormat format, real *out, const real *x, size_t n) {
    static real ones[LONG];
    void *data, *work;
    float scale = 0;
    CHECK_OK(mem_alloc(&data, weights_bytes(format, 1, n), 1, "weights"));
    CHECK_OK(mem_alloc(&work, gemm_stream_work(1, n), 1, "work space"));
    weights_pack(format, data, &scale, x, 0, n);
    const Weights w = {format, data, &scale};
    for (size_t k = 0; k < n; k++) {
        ones[k] = 1;
        gemm_stream(1, 1, n, ones, n, &w, 0, out + k, 1, work);
        ones[k] = 0;
    }
    free(data);
    free(work);
}

static double largest_of(const real *x, size_t n) {
    double largest = 0;
    for (size_t i = 0; i < n; i++)
        if (fabs((double)x[i]) > largest) largest = fabs((double)x[i]);
    return largest;
}

/* Of one weight: 2^-8 of itself in bf16 (8 bits, half of the last), 2^-8 of that with a low part, half of largest/127 in
 * int8, and the rounding of that arithmetic. */
static double pack_bound(WeightFormat format, double x, double largest) {
    if (format == WEIGHTS_INT8) return (0.5 + 1e-4) * largest / 127;
    return (format == WEIGHTS_BF16 ? 0x1p-8 : 0x1.01p-16) * fabs(x);
}

static void test_pack(void) {
    static real x[LONG], y[LONG];
    for (int format = WEIGHTS_BF16; format <= WEIGHTS_BF16X3; format++)
        for (size_t n = 1; n <= LONG; n += 43) {
            int ok = 1;
            for (size_t i = 0; i < n; i++) x[i] = number(7 * i + n) * (real)(n % 3 ? 0.02 : 300);
            pack_and_unpack((WeightFormat)format, y, x, n);
            const double largest = largest_of(x, n);
            for (size_t i = 0; i < n; i++)
                ok &= fabs((double)y[i] - (double)x[i]) <= pack_bound((WeightFormat)format, (double)x[i], largest);
            CHECK(ok);
        }
    const real ties[] = {1, (real)1.00390625, (real)1.01171875, -2, 0}; /* 1 + 2^-8: to even, down; 1 + 3 2^-8: up */
    pack_and_unpack(WEIGHTS_BF16, y, ties, 5);
    CHECK(y[0] == 1 && y[1] == 1 && y[2] == (real)1.015625 && y[3] == -2 && y[4] == 0);
    const real zeros[3] = {0, 0, 0}, bad[3] = {1, (real)NAN, 2}, endless[2] = {1, (real)INFINITY};
    pack_and_unpack(WEIGHTS_INT8, y, zeros, 3);
    CHECK(y[0] == 0 && y[2] == 0);
    pack_and_unpack(WEIGHTS_INT8, y, bad, 3);
    CHECK(y[0] != y[0]);
    pack_and_unpack(WEIGHTS_INT8, y, endless, 2);
    CHECK(y[0] != y[0]);
    uint16_t half[3];
    round_bf16(half, bad, 3);
    CHECK(from_bf16(half[0]) == 1 && from_bf16(half[1]) != from_bf16(half[1]) && from_bf16(half[2]) == 2);
}

/* What packing does to a product: off by at most the sum of the bounds of each weight and of each number of A, which is
 * rounded to bf16 too. */
static void test_pack_error(void) {
    static Packed p;
    static real exact[FEW * COLS], got[FEW * COLS];
    for (int format = WEIGHTS_BF16; format <= WEIGHTS_BF16X3; format++) {
        int ok = 1;
        double worst = 0, error = 0, size = 0;
        const double of_a = format == WEIGHTS_BF16X3 ? 2.02 * 0x1p-16 : 0x1p-8; /* and low times low */
        make_packed(&p, WEIGHTS_REAL);
        gemm_stream(FEW, COLS, LONG, p.A, LONG, &p.w, 0, exact, COLS, NULL);
        packed_free(&p);
        pack_plain(&p, (WeightFormat)format);
        gemm_stream(FEW, COLS, LONG, p.A, LONG, &p.w, 0, got, COLS, p.work);
        packed_free(&p);
        for (size_t r = 0; r < FEW * COLS; r++) {
            const real *a = p.A + r / COLS * LONG, *w = p.plain + r % COLS * LONG;
            const double largest = largest_of(w, LONG), d = fabs((double)got[r] - (double)exact[r]);
            double bound = 0;
            for (size_t k = 0; k < LONG; k++) {
                const double x = fabs((double)a[k]), y = fabs((double)w[k]);
                const double one = pack_bound((WeightFormat)format, y, largest);
                bound += x * one + of_a * x * (y + one) + 12 * (LONG + 2) * UNIT * x * (y + one);
            }
            ok &= d <= bound;
            worst = fmax(worst, d / bound);
            error += d * d, size += (double)exact[r] * (double)exact[r];
        }
        CHECK(ok);
        CHECK(worst > 1e-3); /* it is not the same product */
        CHECK(sqrt(error / size) <
              (format == WEIGHTS_BF16X3 ? 1e-5 : 0.02)); /* random signs: far better than the bound */
        static const char *const names[] = {"real", "bf16", "int8", "bf16x3"};
        printf("%s weights: a product of %d is off by %.2g of its size (root mean square), at most %.2f of the bound\n",
               names[format], LONG, sqrt(error / size), worst);
    }
}

/* ---- Operands in bf16 ---- */

static real one_product(Precision p, real a, real b) {
    real c = 7;
    gemm(p, 0, 0, 1, 1, 1, &a, 1, &b, 1, 0, &c, 1);
    return c;
}

/* A number that is not finite stays one, infinity times a number is infinity of the right sign, as in f32, but infinity
 * times infinity is NaN in bf16x3. */
static void test_not_finite(void) {
    const real inf = (real)INFINITY, odd = (real)1.00390625, below = (real)1.0039; /* low parts 0, above and below 0 */
    for (int p = PRECISION_F32; p <= PRECISION_BF16; p++) {
        const Precision how = (Precision)p;
        const real numbers[] = {1, odd, below, (real)-1.0039, (real)-3e-5};
        for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
            const real x = numbers[i], expected = x > 0 ? inf : -inf;
            CHECK(one_product(how, inf, x) == expected && one_product(how, x, inf) == expected);
            CHECK(one_product(how, -inf, x) == -expected && one_product(how, x, -inf) == -expected);
            CHECK(isnan((double)one_product(how, x, (real)NAN)) && isnan((double)one_product(how, (real)NAN, x)));
        }
        CHECK(isnan((double)one_product(how, inf, 0)) && isnan((double)one_product(how, 0, inf)));
        CHECK(!isfinite((double)one_product(how, inf, inf)));
        CHECK(one_product(how, (real)3e38, 1) > (real)2.9e38 && one_product(how, 0, (real)3e38) == 0);
    }
    CHECK(one_product(PRECISION_BF16, odd, 1) == 1); /* a tie: to even */
    CHECK(one_product(PRECISION_BF16X3, odd, 1) == odd && one_product(PRECISION_BF16X3, 1, odd) == odd);
}

/* bf16x3 is off by a few millionths of the largest result, and bf16 by far more: it is another product. */
static void test_split_error(void) {
    double worst[3] = {0}, largest = 0;
    for (int p = PRECISION_F32; p <= PRECISION_BF16; p++) {
        precision = (Precision)p;
        seed = 1; /* the same numbers each time */
        Case c = make_case(0, 96, 160, 1024, 0, 0);
        run(&c, c.C);
        for (size_t i = 0; i < c.M; i++)
            for (size_t j = 0; j < c.N; j++) {
                double sum = 0;
                for (size_t k = 0; k < c.K; k++) sum += (double)a_at(&c, i, k) * (double)b_at(&c, k, j);
                worst[p] = fmax(worst[p], fabs((double)c.C[i * c.ldc + j] - sum)), largest = fmax(largest, fabs(sum));
            }
        free_case(&c);
    }
    printf("a product of 1024, off by at most, of the largest: f32 %.1e, bf16x3 %.1e, bf16 %.1e\n", worst[0] / largest,
           worst[1] / largest, worst[2] / largest);
    CHECK(worst[PRECISION_BF16X3] < 5e-6 * largest);
    CHECK(worst[PRECISION_BF16] > 1e-4 * largest && worst[PRECISION_BF16] < 5e-3 * largest);
}

static void test_bf16(void) {
    for (int p = PRECISION_BF16X3; p <= PRECISION_BF16; p++) {
        precision = (Precision)p;
        test_shapes();
        test_pieces();
        test_bits();
    }
    test_not_finite();
    test_split_error();
    precision = PRECISION_F32;
}

#ifdef TILES_IN_C
#include <errno.h>
#include <sys/wait.h>
#include "base/tiles.h"
extern int tiles_in_c_refused;

/* Where the system refuses tiles, vectors go on, and the reason is there; in a process of its own, for it is asked once. */
static int works_refused(int error, const char *reason) {
    char text[TILES_TEXT];
    int status = 1;
    fflush(NULL);
    const pid_t child = fork();
    if (child == 0) {
        tiles_in_c_refused = error;
        int ok = !*tiles_refusal(text) && !tiles_here() && strstr(tiles_refusal(text), reason);
        for (int p = PRECISION_BF16X3; p <= PRECISION_BF16; p++) {
            precision = (Precision)p;
            ok &= product_is(5, 37, 41, 300, 1, 1);
        }
        _exit(!ok);
    }
    return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

static void test_refused(void) {
    char text[TILES_TEXT];
    CHECK(works_refused(EINVAL, "Linux grants it from 5.16 on"));
    CHECK(works_refused(ENOSPC, "a thread's alternate signal stack"));
    CHECK(!works_refused(0, "")); /* the check can fail */
    CHECK(tiles_here() && !*tiles_refusal(text));
}

#if defined(__x86_64__)
#include "base/level.h"

/* The list of levels holds the one with tiles where there are tiles. */
static void test_levels_listed(void) {
    const int there[LEVELS] = {1, 1, 1, 1, 1};
    char refusal[LEVEL_TEXT];
    setenv("IMAGEBART_LEVEL", "x86-64-v9", 1);
    CHECK(level_take(there, refusal) == -1);
    CHECK(!strstr(refusal, " x86-64-v4-bf16") == !strstr(refusal, " x86-64-v4-amx"));
    unsetenv("IMAGEBART_LEVEL");
}
#else
static void test_levels_listed(void) {}
#endif
#else
static void test_refused(void) {}
static void test_levels_listed(void) {}
#endif

int main(void) {
    test_refused(); /* before threads are started */
    test_levels_listed();
    test_shapes();
    test_empty();
    test_bits();
    test_bf16();
    test_negative_control();
    test_stream();
    test_stream_lengths();
    test_pack();
    test_pack_error();
    return test_report();
}
