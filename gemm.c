/* gemm.c - the one matrix product: C = op(A) op(B) (+ C), row-major, any leading dimension.
 *
 * Owns: the product and nothing else. Refuses: nothing; it cannot fail and it allocates nothing.
 *
 * A naive product reads two numbers from memory for every multiplication; a core can multiply twenty times faster
 * than it can read. So C is cut into pieces in three levels, each sized for one level of the memory hierarchy
 * (Goto and van de Geijn 2008; Van Zee and van de Geijn 2015 "BLIS"):
 *
 *     tile     MC x NC of C   one thread's unit of work; its MC x KC block of A stays in the L2 cache
 *     panel    KC x NR of B   packed to stand contiguous, zero-padded to NR columns, and to stay in the L1 cache
 *     micro    MR x NR of C   lives in registers while k runs through KC: the micro kernel
 *
 *                      NR                 for each tile of C                      gemm            (threads)
 *               +----+----+----+            for each KC-long piece of K           tile_product
 *            KC |    | B  |    |              pack A's block if that pays         pack_a
 *               +----+----+----+              for each panel of B                 block_product
 *          KC                                   pack it                           pack_b
 *        +----+ +----+----+----+                for each MR rows of A             micro_tile
 *     MR | A  | |    | C  |    |                  for k < KC                      micro_kernel
 *        +----+ +----+----+----+                    C[MR][NR] += A[MR][k] B[k][NR]
 *
 * The micro kernel loads NV vectors of B and MR scalars of A per k for MR*NV multiply-adds, enough independent
 * chains to keep the multiply-add units busy and few enough to stay in registers. It reads A through two strides,
 * so A and its transpose need no packing to be correct; pack_a only copies blocks that are read many times.
 * B is always read along its rows: pack_b transposes in registers when it has to.
 *
 * Weights may be stored in half or a quarter of the bits: gemm_weights unpacks them on the way into a panel.
 *
 * Decoding multiplies 1..16 rows with a weight matrix (N,K). Nothing is reused there but the few rows, so the work is
 * to read the weights as fast as memory gives them, and packing is in the way: gemm_stream multiplies rows of weights
 * with rows of A where they stand, LANES numbers at a time, both sides read along k.
 *
 * Promise on bits, gemm and gemm_weights: an element of C is the sum, in order, of the KC-long pieces of K; within a piece the products
 * are added in order of k with one fused multiply-add each (two roundings on machines without one). Nothing else -
 * threads, M, N, position, transposes, packing - changes the order, so a row computed alone equals bit for bit the
 * same row computed in a batch. gemm_stream makes the same promise for its own order: LANES sums, each over every
 * LANES-th k in order, then added as a tree.
 *
 * Buffers are thread-local, so calls may come from the pool's workers and from plain threads at the same time. They
 * take about 300 KB of each thread's memory (on glibc: of its stack). */

#include <string.h>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#include "imagebart.h"

/* ---- Sizes ---- */

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
enum { MR = 8, NV = 2 }; /* 32 registers: 16 sums */
#else
#if defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
enum { MR = 6, NV = 2 }; /* 16 registers: 12 sums */
#endif

#ifdef REAL_DOUBLE
#define LANES (VECTOR_BYTES / 8) /* numbers in a vector */
#else
#define LANES (VECTOR_BYTES / 4)
#endif

enum {
    NR = NV * LANES,                                                 /* columns of a panel */
    KC = 256,                                                        /* a panel is 32 KB; part of the promise on bits */
    MC = (256 * 1024 / (KC * (int)sizeof(real)) + MR - 1) / MR * MR, /* rows of a block of A: about 256 KB */
    NC = 1024,                                                       /* columns of a tile */
    PACK_A_COLS = 2 * NR, /* a tile as narrow as this reads A where it stands */
    TILES_PER_THREAD = 4  /* so that a delayed thread costs little */
};
static const size_t SMALL_WORK = (size_t)1 << 20; /* multiply-adds below which waking a thread does not pay */

typedef real Vec __attribute__((vector_size(VECTOR_BYTES)));
#define INLINE static inline __attribute__((always_inline))

static __thread real block_a[MC * KC] __attribute__((aligned(64)));
static __thread real panel_b[KC * NR] __attribute__((aligned(64)));

/* A matrix seen through two strides: element (i,j) is p[i * row + j * col]. Either row or col is 1. */
typedef struct {
    const real *p;
    size_t row, col;
} View;

INLINE View view_at(View v, size_t i, size_t j) {
    v.p += i * v.row + j * v.col;
    return v;
}

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

/* ---- Micro kernel ---- */

/* c[i,j] = or += sum_k a[i,k] b[k,j]    i < rows <= MR, j < vecs*LANES
 * rows, vecs and one of the strides of A are constants where this is expanded, so the loops over i and v unroll and
 * sum[][] becomes registers.
 *   a: (rows, kc) strides a_row, a_col    b: (kc, vecs*LANES) row stride ldb    c: (rows, vecs*LANES) row stride ldc */
INLINE void micro_kernel(int rows, int vecs, size_t kc, const real *a, size_t a_row, size_t a_col, const real *b,
                         size_t ldb, int add, real *c, size_t ldc) {
    Vec sum[MR][NV];
    for (int i = 0; i < rows; i++) {
        __builtin_prefetch(c + (size_t)i * ldc, 1);
        for (int v = 0; v < vecs; v++) sum[i][v] = (Vec){0};
    }
    for (size_t k = 0; k < kc; k++) {
        Vec bk[NV];
        for (int v = 0; v < vecs; v++) bk[v] = load(b + k * ldb + v * LANES);
        for (int i = 0; i < rows; i++) {
            const real aik = a[(size_t)i * a_row + k * a_col];
            for (int v = 0; v < vecs; v++) sum[i][v] = multiply_add(aik, bk[v], sum[i][v]);
        }
    }
    for (int i = 0; i < rows; i++) {
        for (int v = 0; v < vecs; v++) {
            real *cv = c + (size_t)i * ldc + v * LANES;
            store(cv, add ? load(cv) + sum[i][v] : sum[i][v]);
        }
    }
}

/* Chooses the expansion of micro_kernel for a number of rows; called with constant vecs and one constant stride. */
INLINE void micro_rows(int rows, int vecs, size_t kc, const real *a, size_t a_row, size_t a_col, const real *b,
                       size_t ldb, int add, real *c, size_t ldc) {
#define ROWS(n)                                                                                                        \
    case n: micro_kernel(n, vecs, kc, a, a_row, a_col, b, ldb, add, c, ldc); break
    switch (rows) {
        ROWS(1);
        ROWS(2);
        ROWS(3);
        ROWS(4);
        ROWS(5);
        ROWS(6);
#if defined(__AVX512F__)
        ROWS(7);
        ROWS(8);
#endif
    }
#undef ROWS
}

/* One micro tile of full width; a.row or a.col is 1, see View. */
static void micro_tile(int rows, int vecs, size_t kc, View a, const real *b, size_t ldb, int add, real *c, size_t ldc) {
    if (a.col == 1) {
        if (vecs == 1)
            micro_rows(rows, 1, kc, a.p, a.row, 1, b, ldb, add, c, ldc);
        else
            micro_rows(rows, NV, kc, a.p, a.row, 1, b, ldb, add, c, ldc);
    } else {
        if (vecs == 1)
            micro_rows(rows, 1, kc, a.p, 1, a.col, b, ldb, add, c, ldc);
        else
            micro_rows(rows, NV, kc, a.p, 1, a.col, b, ldb, add, c, ldc);
    }
}

/* ---- Packing ---- */

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
static void transpose_square(real *to, size_t to_stride, const real *from, size_t from_stride) {
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
static void transpose(real *to, size_t to_stride, const real *from, size_t from_stride, size_t rows, size_t cols) {
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

/* to[i,:] = from[i,:] of `width` numbers. Expanded with a constant width a row is a few moves, not a call. */
INLINE void copy_rows(real *to, size_t to_stride, const real *from, size_t from_stride, size_t rows, size_t width) {
    for (size_t i = 0; i < rows; i++) memcpy(to + i * to_stride, from + i * from_stride, width * sizeof(real));
}

/* panel_b (kc,NR) = op(B) (kc, cols <= NR), zeros in the columns behind */
static void pack_b(View b, size_t kc, size_t cols) {
    if (cols < NR) memset(panel_b, 0, kc * NR * sizeof(real));
    if (b.col != 1)
        transpose(panel_b, NR, b.p, b.col, cols, kc);
    else if (cols == NR)
        copy_rows(panel_b, NR, b.p, b.row, kc, NR);
    else
        copy_rows(panel_b, NR, b.p, b.row, kc, cols);
}

/* Copies a block of op(A), rows <= MC by kc, into block_a, so that the micro kernel walks through few pages and no two
 * rows fight for one place in the cache. Rows stay rows of stride KC; a transposed A becomes panels (kc, MR). */
static View pack_a(View a, size_t rows, size_t kc) {
    if (a.col == 1) {
        copy_rows(block_a, KC, a.p, a.row, rows, kc);
        const View packed = {block_a, KC, 1};
        return packed;
    }
    size_t i = 0;
    for (; i + MR <= rows; i += MR) copy_rows(block_a + i * KC, MR, a.p + i, a.col, kc, MR);
    if (i < rows) copy_rows(block_a + i * KC, MR, a.p + i, a.col, kc, rows - i);
    const View packed = {block_a, 1, MR};
    return packed;
}

/* ---- Weights in fewer bits ---- */

/* LANES numbers as they are stored, and on their way to real. */
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef float Floats __attribute__((vector_size(LANES * 4)));

/* bf16 is the upper half of a float. Spelt out where compilers take such conversions apart. */
INLINE Vec load_bf16(const uint16_t *p) {
#if defined(__AVX512F__) && !defined(REAL_DOUBLE)
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
#elif defined(__AVX2__) && !defined(REAL_DOUBLE)
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
#else
    Halves h;
    memcpy(&h, p, sizeof h);
    const Words bits = __builtin_convertvector(h, Words) << 16;
    return __builtin_convertvector((Floats)bits, Vec);
#endif
}

INLINE Vec load_int8(const int8_t *p) {
#if defined(__AVX512F__) && !defined(REAL_DOUBLE)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
#elif defined(__AVX2__) && !defined(REAL_DOUBLE)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)));
#else
    Bytes b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, Ints), Vec);
#endif
}

/* LANES weights at element i of data, int8 without its factor. format is a constant where this is expanded. */
INLINE Vec load_weights(WeightFormat format, const void *data, size_t i) {
    if (format == WEIGHTS_BF16) return load_bf16((const uint16_t *)data + i);
    if (format == WEIGHTS_INT8) return load_int8((const int8_t *)data + i);
    return load((const real *)data + i);
}

/* The same for the last n < LANES of a row, with zeros behind. */
INLINE Vec load_last_weights(WeightFormat format, const void *data, size_t i, size_t n) {
    const size_t size = weight_bytes(format);
    char last[LANES * sizeof(real)] = {0};
    memcpy(last, (const char *)data + i * size, n * size);
    return load_weights(format, last, 0);
}

INLINE Vec load_last(const real *p, size_t n) {
    Vec v = {0};
    memcpy(&v, p, n * sizeof *p);
    return v;
}

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

static __thread real unpacked[NR * KC] __attribute__((aligned(64)));

INLINE void unpack_row(WeightFormat format, real *to, const void *data, size_t i, size_t n, real scale) {
    for (size_t k = 0; k < n; k += LANES) {
        const Vec w = n - k < LANES ? load_last_weights(format, data, i + k, n - k) : load_weights(format, data, i + k);
        store(to + k, w * scale);
    }
}

/* Rows j..j+rows-1 <= NR of the weights (..,K), columns k..k+kc-1, as the view of a panel of op(B). */
static View unpack(const Weights *w, size_t K, size_t j, size_t rows, size_t k, size_t kc) {
    for (size_t r = 0; r < rows; r++) {
        const size_t i = (j + r) * K + k;
        if (w->format == WEIGHTS_BF16)
            unpack_row(WEIGHTS_BF16, unpacked + r * KC, w->data, i, kc, 1);
        else
            unpack_row(WEIGHTS_INT8, unpacked + r * KC, w->data, i, kc, w->scale[j + r]);
    }
    const View view = {unpacked, 1, KC};
    return view;
}

/* ---- Blocks and tiles ---- */

/* c (rows, cols) = or += tile (rows, NR) */
static void add_tile(int rows, size_t cols, const real *tile, int add, real *c, size_t ldc) {
    for (int i = 0; i < rows; i++, tile += NR) {
        real *to = c + (size_t)i * ldc;
        for (size_t j = 0; j < cols; j++) to[j] = add ? to[j] + tile[j] : tile[j];
    }
}

/* One panel: C (rows, cols <= NR) = or += A (rows,kc) b (kc, row stride ldb). a_step: from one MR rows of A to the
 * next. Where C is narrower than the vectors the sums take a way over the stack. */
static void panel_product(size_t rows, size_t cols, size_t kc, View a, size_t a_step, const real *b, size_t ldb,
                          int add, real *c, size_t ldc) {
    const int vecs = cols <= LANES ? 1 : NV;
    for (size_t i = 0; i < rows; i += MR) {
        const int high = (int)min_size(MR, rows - i);
        const View ai = {a.p + i / MR * a_step, a.row, a.col};
        real *ci = c + i * ldc;
        if (cols == (size_t)vecs * LANES) {
            micro_tile(high, vecs, kc, ai, b, ldb, add, ci, ldc);
        } else {
            real tile[MR * NR];
            micro_tile(high, vecs, kc, ai, b, ldb, 0, tile, NR);
            add_tile(high, cols, tile, add, ci, ldc);
        }
    }
}

typedef struct {
    size_t M, N, K;
    View a, b;        /* op(A), op(B) */
    const Weights *w; /* B is unpacked from these (N,K); NULL: b */
    int accumulate;
    real *c;
    size_t ldc;
    size_t rows, cols, down, tiles; /* of a tile; tiles in a column of tiles; tiles in all */
} Product;

/* C (rows <= MC, cols) = or += A (rows, kc <= KC) B (kc, cols), whose first element is (k0,j0) of the whole B */
static void block_product(const Product *p, size_t rows, size_t cols, size_t kc, View a, size_t k0, size_t j0, int add,
                          real *c) {
    const size_t ldc = p->ldc;
    size_t a_step = MR * a.row;
    if (cols > PACK_A_COLS && rows > MR) {
        a = pack_a(a, rows, kc);
        a_step = MR * KC; /* both kinds of packed panel are MR*KC long */
    }
    for (size_t j = 0; j < cols; j += NR) {
        const size_t width = min_size(NR, cols - j);
        const View bj = p->w ? unpack(p->w, p->K, j0 + j, width, k0, kc) : view_at(p->b, k0, j0 + j);
        if (bj.col == 1 && rows <= MR && (width == NR || width == LANES)) { /* read once: no use in packing */
            panel_product(rows, width, kc, a, a_step, bj.p, bj.row, add, c + j, ldc);
        } else {
            pack_b(bj, kc, width);
            panel_product(rows, width, kc, a, a_step, panel_b, NR, add, c + j, ldc);
        }
    }
}

/* ---- The product ---- */

static size_t ceil_div(size_t a, size_t b) {
    return (a + b - 1) / b;
}

/* The cost of a product in multiply-adds; + MR stands for reading and packing B. */
static double work(size_t M, size_t N, size_t K) {
    return (double)(M + MR) * (double)N * (double)K;
}

/* Tiles of MC x NC, halved along the longer side until every thread has several or they become too small. */
static void choose_tiles(Product *p, size_t threads) {
    p->rows = min_size(p->M, MC);
    p->cols = min_size(p->N, NC);
    for (;;) {
        const size_t across = ceil_div(p->N, p->cols);
        p->down = ceil_div(p->M, p->rows);
        p->tiles = p->down * across;
        p->rows = min_size(p->rows, round_up(ceil_div(p->M, p->down), MR)); /* equal heights, not one thin rest */
        p->cols = min_size(p->cols, round_up(ceil_div(p->N, across), NR));
        if (threads == 1 || p->tiles >= TILES_PER_THREAD * threads) return;
        if (work(p->rows, p->cols, p->K) < (double)SMALL_WORK) return;
        if (p->rows > p->cols && p->rows > MR)
            p->rows = round_up(p->rows / 2, MR);
        else if (p->cols > NR)
            p->cols = round_up(p->cols / 2, NR);
        else
            return;
    }
}

/* One tile of C, K in pieces of KC. Tiles that follow each other share their columns of B. */
static void tile_product(const Product *p, size_t tile) {
    const size_t i = tile % p->down * p->rows, j = tile / p->down * p->cols;
    const size_t rows = min_size(p->rows, p->M - i), cols = min_size(p->cols, p->N - j);
    for (size_t k = 0; k < p->K; k += KC)
        block_product(p, rows, cols, min_size(KC, p->K - k), view_at(p->a, i, k), k, j, p->accumulate || k > 0,
                      p->c + i * p->ldc + j);
}

static void clear(real *C, size_t M, size_t N, size_t ldc) {
    for (size_t i = 0; i < M; i++) memset(C + i * ldc, 0, N * sizeof(real));
}

/* How many threads a product is worth: 1 when it is small or when all threads are busy already. */
static int threads_for(size_t M, size_t N, size_t K) {
    return work(M, N, K) < (double)SMALL_WORK ? 1 : threads_free();
}

static void tile_task(void *context, size_t tile) {
    tile_product((const Product *)context, tile);
}

static void product(Product *p) {
    if (p->M == 0 || p->N == 0) return;
    if (p->K == 0) {
        if (!p->accumulate) clear(p->c, p->M, p->N, p->ldc);
        return;
    }
    const int threads = threads_for(p->M, p->N, p->K);
    choose_tiles(p, (size_t)threads);
    parallel_for(threads, p->tiles, tile_task, p);
}

void gemm(int trans_a, int trans_b, size_t M, size_t N, size_t K, const real *A, size_t lda, const real *B, size_t ldb,
          int accumulate, real *C, size_t ldc) {
    const View a = {A, trans_a ? 1 : lda, trans_a ? lda : 1}, b = {B, trans_b ? 1 : ldb, trans_b ? ldb : 1};
    Product p = {M, N, K, a, b, NULL, accumulate, C, ldc, 0, 0, 0, 0};
    product(&p);
}

void gemm_weights(size_t M, size_t N, size_t K, const real *A, size_t lda, const Weights *w, int accumulate, real *C,
                  size_t ldc) {
    const View a = {A, lda, 1}, b = {(const real *)w->data, 1, K};
    Product p = {M, N, K, a, b, w->format == WEIGHTS_REAL ? NULL : w, accumulate, C, ldc, 0, 0, 0, 0};
    product(&p);
}

/* ---- Few rows: the weights stream by ---- */

enum {
    STREAM_X = LANES < 4 ? LANES : 4,    /* rows of A at a time, at most; LANES sums in registers in all */
    STREAM_ROWS = LANES < 4 ? LANES : 4, /* rows of weights against one row of A */
    AHEAD = 8192                         /* bytes */
};
static const size_t STREAM_BYTES = 64 * 1024; /* weights of a task */

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
            const real t = total[x * rows + r] * (format == WEIGHTS_INT8 ? (real)s->w->scale[j + (size_t)r] : 1);
            real *c = s->C + (x0 + (size_t)x) * s->ldc + j + (size_t)r;
            *c = s->accumulate ? *c + t : t;
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
    if (K == 0) {
        if (!accumulate) clear(C, M, N, ldc);
        return;
    }
    Stream s = {M, N, K, A, lda, w, accumulate, C, ldc, 0};
    s.rows = round_up(STREAM_BYTES / (K * weight_bytes(w->format)) + 1, STREAM_ROWS);
    parallel_for(threads_for(M, N, K), ceil_div(N, s.rows), stream_task, &s);
}
