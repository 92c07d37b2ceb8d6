/* gemm.c - the one matrix product: C = op(A) op(B) (+ C), row-major, any leading dimension.
 *
 * Owns: the product and nothing else. Refuses: nothing; it cannot fail and it allocates nothing.
 *
 * A naive product reads two numbers from memory for every multiplication; a core can multiply twenty times faster
 * than it can read. So C is cut into pieces in three levels, each sized for one level of the memory hierarchy
 * (Goto and van de Geijn 2008; Van Zee and van de Geijn 2015 "BLIS"):
 *
 *     tile     MC x NC of C   one thread's unit of work; its MC x KC block of A stays in the L2 cache, by whose size MC is chosen
 *     panel    KC x NR of B   packed to stand contiguous, zero-padded to NR columns
 *     micro    MR x NR of C   lives in registers while k runs through KC: the micro kernel
 *
 *                      NR                 for each tile of C                      gemm            (threads)
 *               +----+----+----+            for each KC-long piece of K           tile_product
 *            KC |    | B  |    |              for each panel of B                 block_product
 *               +----+----+----+                pack it                           pack_b
 *          KC                                   for each MR rows of A             panel_product
 *        +----+ +----+----+----+                  pack them, the first time       pack_a
 *     MR | A  | |    | C  |    |                  fetch what is packed next       fetch
 *        +----+ +----+----+----+                  for k < KC                      micro_kernel
 *                                                   C[MR][NR] += A[MR][k] B[k][NR]
 *
 * The micro kernel loads NV vectors of B and MR scalars of A per k for MR*NV multiply-adds, enough independent
 * chains to keep the multiply-add units busy and few enough to stay in registers. It reads A through two strides,
 * so A and its transpose need no packing to be correct; pack_a only copies rows that are read many times.
 * B is always read along its rows: pack_b transposes in registers when it has to. Packing waits for memory, multiplying
 * does not: so the kernel's time is used to fetch what will be packed next.
 *
 * Weights in half or a quarter of the bits, and products of few rows, which reuse nothing, are another file's business:
 * stream.c.
 *
 * Promise on bits: K is cut into as few equal pieces as are at most KC long (the last may be shorter). An element of C
 * is the sum of the pieces, in order; within a piece the products are added in order of k with one fused multiply-add
 * each (two roundings on machines without one). Nothing else - threads, M, N, position, transposes, packing - changes
 * the order, so a row computed alone equals bit for bit the same row computed in a batch.
 *
 * Buffers are thread-local, so calls may come from the pool's workers and from plain threads at the same time. They
 * take about 600 KB of each thread's memory (on glibc: of its stack). */

#include "kernels/vector.h"

/* ---- Sizes ---- */

#if defined(__AVX512F__) || defined(__aarch64__)
enum { MR = 8, NV = 2 }; /* 32 registers: 16 sums */
#else
enum { MR = 6, NV = 2 }; /* 16 registers: 12 sums */
#endif

enum {
    NR = NV * LANES,                                                 /* columns of a panel */
    KC = 384,                                                        /* part of the promise on bits */
    MC = (512 * 1024 / (KC * (int)sizeof(real)) + MR - 1) / MR * MR, /* most rows of a block of A: about 512 KB */
    NC = 1024,                                                       /* columns of a tile */
    PACK_A_COLS = 2 * NR, /* a tile as narrow as this reads A where it stands */
    TILES_PER_THREAD = 2, /* at least */
};

static __thread union {
    real block_a[MC * KC];
    uint16_t numbers[THREAD_ROOM / sizeof(uint16_t)]; /* of products in bf16 */
} room __attribute__((aligned(LINE_BYTES)));
static __thread real panel_b[KC * NR] __attribute__((aligned(LINE_BYTES)));

uint16_t *thread_room(void) {
    return room.numbers;
}

/* ---- Micro kernel ---- */

/* c[i,j] = or += sum_k a[i,k] b[k,j]    i < rows <= MR, j < vecs*LANES
 * rows, vecs and one of the strides of A are constants where this is expanded, so the loops over i and v unroll and
 * sum[][] becomes registers.
 *   a: (rows, kc) strides a_row, a_col    b: (kc, vecs*LANES) row stride ldb    c: (rows, vecs*LANES) row stride ldc */
INLINE void micro_kernel(int rows, int vecs, size_t kc, const real *a, size_t a_row, size_t a_col, const real *b,
                         size_t ldb, int add, real *c, size_t ldc) {
    Vec sum[MR][NV];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vecs; v++) {
            __builtin_prefetch(c + (size_t)i * ldc + v * LANES, 1);
            sum[i][v] = (Vec){0};
        }
    size_t k = 0;
    do { /* at least once, and gcc keeps the sums out of memory: for kc = 0 it would store them as zeros */
        Vec bk[NV];
        for (int v = 0; v < vecs; v++) bk[v] = load(b + k * ldb + v * LANES);
        for (int i = 0; i < rows; i++) {
            const real aik = a[(size_t)i * a_row + k * a_col];
            for (int v = 0; v < vecs; v++) sum[i][v] = multiply_add(aik, bk[v], sum[i][v]);
        }
    } while (++k < kc);
    if (add) /* all of C is read before any is written: a read that looks like a write before it (4 KB apart) waits */
        for (int i = 0; i < rows; i++)
            for (int v = 0; v < vecs; v++) sum[i][v] = load(c + (size_t)i * ldc + v * LANES) + sum[i][v];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vecs; v++) store(c + (size_t)i * ldc + v * LANES, sum[i][v]);
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
#if defined(__AVX512F__) || defined(__aarch64__)
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

/* MR rows of op(A), or fewer, by kc to their place in block_a, so that the micro kernel walks through few pages and no
 * two rows fight for one place in the cache. Rows stay rows of stride KC; a transposed A becomes panels (kc, MR). */
static void pack_a(real *to, View a, size_t rows, size_t kc) {
    if (a.col == 1)
        copy_rows(to, KC, a.p, a.row, rows, kc);
    else if (rows == MR)
        copy_rows(to, MR, a.p, a.col, kc, MR);
    else
        copy_rows(to, MR, a.p, a.col, kc, rows);
}

/* Asks the caches for part `part` of `parts` of a matrix (rows, cols): it will be read soon. */
static void fetch(View v, size_t rows, size_t cols, size_t part, size_t parts) {
    const size_t n = v.col == 1 ? rows : cols, length = v.col == 1 ? cols : rows, step = v.col == 1 ? v.row : v.col;
    const size_t share = ceil_div(n, parts), end = min_size(n, (part + 1) * share);
    for (size_t i = part * share; i < end; i++)
        for (size_t k = 0; k < length; k += LINE_BYTES / sizeof(real)) __builtin_prefetch(v.p + i * step + k, 0, 2);
}

/* ---- Blocks and tiles ---- */

/* c (rows, cols) = or += tile (rows, NR) */
static void add_tile(int rows, size_t cols, const real *tile, int add, real *c, size_t ldc) {
    for (int i = 0; i < rows; i++, tile += NR) {
        real *to = c + (size_t)i * ldc;
        for (size_t j = 0; j < cols; j++) to[j] = add ? to[j] + tile[j] : tile[j];
    }
}

/* What is prepared between two micro tiles, while the multiply-add units are busy. */
typedef struct {
    View a;                /* rows of A to pack into block_a on the way; p NULL: nothing to pack */
    View b;                /* the next panel of B, to fetch */
    size_t b_rows, b_cols; /* 0: there is none */
} Next;

static void prepare_next(const Next *to_do, size_t i, size_t rows, size_t kc) {
    if (to_do->a.p) {
        pack_a(room.block_a + i * KC, view_at(to_do->a, i, 0), min_size(MR, rows - i), kc);
        if (i + MR < rows) fetch(view_at(to_do->a, i + MR, 0), min_size(MR, rows - i - MR), kc, 0, 1);
    }
    if (to_do->b_rows) fetch(to_do->b, to_do->b_rows, to_do->b_cols, i / MR, ceil_div(rows, MR));
}

/* One panel: C (rows, cols <= NR) = or += A (rows,kc) b (kc, row stride ldb). a_step: from one MR rows of A to the
 * next. Where C is narrower than the vectors the sums take a way over the stack. */
static void panel_product(size_t rows, size_t cols, size_t kc, View a, size_t a_step, const real *b, size_t ldb,
                          int add, real *c, size_t ldc, const Next *to_do) {
    const int vecs = cols <= LANES ? 1 : NV;
    for (size_t i = 0; i < rows; i += MR) {
        const int high = (int)min_size(MR, rows - i);
        const View ai = {a.p + i / MR * a_step, a.row, a.col};
        real *ci = c + i * ldc;
        prepare_next(to_do, i, rows, kc);
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
    View a, b; /* op(A), op(B) */
    int accumulate;
    real *c;
    size_t ldc;
    size_t rows, cols, down, tiles; /* of a tile; tiles in a column of tiles; tiles in all */
} Product;

/* C (rows <= MC, cols) = or += A (rows, kc <= KC) B (kc, cols), whose first element is (k0,j0) of the whole B */
static void block_product(const Product *p, size_t rows, size_t cols, size_t kc, View a, size_t k0, size_t j0, int add,
                          real *c) {
    const int packs = cols > PACK_A_COLS && rows > MR;
    const View rows_of_a = {room.block_a, KC, 1}, panels_of_a = {room.block_a, 1, MR}, none = {NULL, 0, 0};
    const View packed = !packs ? a : a.col == 1 ? rows_of_a : panels_of_a;
    const size_t a_step = packs ? MR * KC : MR * a.row; /* both kinds of packed panel are MR*KC long */
    for (size_t j = 0; j < cols; j += NR) {
        const size_t width = min_size(NR, cols - j), next = j + NR < cols && rows > MR ? j + NR : 0;
        const Next to_do = {packs && j == 0 ? a : none, next ? view_at(p->b, k0, j0 + next) : none, next ? kc : 0,
                            min_size(NR, cols - next)};
        const View bj = view_at(p->b, k0, j0 + j);
        if (bj.col == 1 && rows <= MR && (width == NR || width == LANES)) { /* read once: no use in packing */
            panel_product(rows, width, kc, packed, a_step, bj.p, bj.row, add, c + j, p->ldc, &to_do);
        } else {
            pack_b(bj, kc, width);
            panel_product(rows, width, kc, packed, a_step, panel_b, NR, add, c + j, p->ldc, &to_do);
        }
    }
}

/* ---- The product ---- */

/* The cost of a product in multiply-adds; + MR stands for reading and packing B. */
static double cost(size_t M, size_t N, size_t K) {
    return (double)(M + MR) * (double)N * (double)K;
}

/* A block of A takes half of the L2 cache. */
static size_t block_rows(void) {
    return min_size(MC, round_up(l2_bytes() / 2 / (KC * sizeof(real)), MR));
}

/* Tiles as high as a block and NC wide, halved along the longer side until every thread has several, and all about
 * the same number, or they become too small. */
static void choose_tiles(Product *p, size_t threads) {
    p->rows = min_size(p->M, block_rows());
    p->cols = min_size(p->N, NC);
    for (;;) {
        const size_t across = ceil_div(p->N, p->cols);
        p->down = ceil_div(p->M, p->rows);
        p->tiles = p->down * across;
        p->rows = min_size(p->rows, round_up(ceil_div(p->M, p->down), MR)); /* equal heights, not one thin rest */
        p->cols = min_size(p->cols, round_up(ceil_div(p->N, across), NR));
        const size_t idle = round_up(p->tiles, threads) - p->tiles; /* threads without a tile in the last round */
        if (threads == 1 || (p->tiles >= TILES_PER_THREAD * threads && idle <= p->tiles / 16)) return;
        if (cost(p->rows, p->cols, p->K) < SMALL_PRODUCT) return;
        if (p->rows > p->cols && p->rows > MR)
            p->rows = round_up(p->rows / 2, MR);
        else if (p->cols > NR)
            p->cols = round_up(p->cols / 2, NR);
        else
            return;
    }
}

/* One tile of C, K in equal pieces of at most KC. Tiles that follow each other share their columns of B. */
static void tile_product(const Product *p, size_t tile) {
    const size_t i = tile % p->down * p->rows, j = tile / p->down * p->cols;
    const size_t rows = min_size(p->rows, p->M - i), cols = min_size(p->cols, p->N - j);
    const size_t kc = ceil_div(p->K, ceil_div(p->K, KC));
    for (size_t k = 0; k < p->K; k += kc)
        block_product(p, rows, cols, min_size(kc, p->K - k), view_at(p->a, i, k), k, j, p->accumulate || k > 0,
                      p->c + i * p->ldc + j);
}

static void clear(real *C, size_t M, size_t N, size_t ldc) {
    for (size_t i = 0; i < M; i++) memset(C + i * ldc, 0, N * sizeof(real));
}

/* How many threads a product is worth: 1 when it is small or when all threads are busy already. */
static int threads_for(size_t M, size_t N, size_t K) {
    return cost(M, N, K) < SMALL_PRODUCT ? 1 : threads_free();
}

static void tile_task(void *context, size_t tile) {
    tile_product((const Product *)context, tile);
}

void gemm(Precision precision, int trans_a, int trans_b, size_t M, size_t N, size_t K, const real *A, size_t lda,
          const real *B, size_t ldb, int accumulate, real *C, size_t ldc) {
    const View a = {A, trans_a ? 1 : lda, trans_a ? lda : 1}, b = {B, trans_b ? 1 : ldb, trans_b ? ldb : 1};
    Product p = {M, N, K, a, b, accumulate, C, ldc, 0, 0, 0, 0};
    if (M == 0 || N == 0) return;
    if (K == 0) {
        if (!accumulate) clear(C, M, N, ldc);
        return;
    }
    const int threads = threads_for(M, N, K);
    if (precision != PRECISION_F32) {
        gemm_bf16(precision == PRECISION_BF16X3, M, N, K, a, b, accumulate, C, ldc, threads, room.numbers);
        return;
    }
    choose_tiles(&p, (size_t)threads);
    parallel_work(threads, p.tiles, tile_task, &p);
}
