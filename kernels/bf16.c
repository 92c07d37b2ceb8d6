/* bf16.c - gemm in bf16 and bf16x3: C = op(A) op(B) (+ C) of operands rounded to bf16, or each the sum of two bf16.
 *
 * Owns: the rounding and packing of operands and the walk over blocks of C; bf16.h has the sum of a block. Refuses:
 * nothing; it cannot fail and it allocates nothing.
 *
 *     for each KC-long piece of k                                                   gemm_bf16
 *       for each piece of B, of A, as large as the buffers                          piece_product
 *         round and pack it: 16 rows of A, or columns of B, to a panel of tiles     pack_panel   (threads)
 *         for each task of C                                                        multiply     (threads)
 *           for each 32 columns: B's two panels stay in the L2 cache, in L1 if K < 500
 *             for each 32 rows: A walks through L2                                  block_sum
 *
 * What is packed is packed once for all threads, so the buffers belong to the program: they serve one product at a time.
 * A small product on one thread, and one that finds them in use, has the small ones of its own thread.
 *
 * Promise on bits: as gemm's, of K alone, for each kind of processor. K is cut into as few equal pieces, of whole steps, as
 * are at most KC long. */

#include "kernels/bf16.h"

#include <stdatomic.h>

enum {
    KC = 2048,                  /* part of the promise on bits */
    ROOM = 2 << 20,             /* numbers of each operand in the program's buffers */
    OWN_ROOM = THREAD_ROOM / 4, /* in a thread's: 32 rows of KC in bf16x3 */
    TASKS_PER_THREAD = 2        /* at least */
};

static uint16_t shared_a[ROOM] __attribute__((aligned(LINE_BYTES)));
static uint16_t shared_b[ROOM] __attribute__((aligned(LINE_BYTES)));
static atomic_flag shared_taken = ATOMIC_FLAG_INIT;

/* ---- Packing ---- */

/* to (steps) tiles: `rows` <= TILE rows of v, K long. */
INLINE void pack_part(Part part, int by_pairs, uint16_t *to, size_t to_step, View v, size_t rows, size_t K) {
    for (size_t k = 0; k < K; k += STEP, to += to_step) {
        const View vk = view_at(v, 0, k);
        if (rows == TILE && K - k >= STEP)
            pack_tile(part, by_pairs, to, STEP, vk, TILE, STEP);
        else
            pack_tile(part, by_pairs, to, STEP, vk, rows, min_size(STEP, K - k));
    }
}

void pack_panel(int x3, int by_pairs, uint16_t *to, View v, size_t rows, size_t K) {
    if (!x3 && by_pairs)
        pack_part(PART_WHOLE, 1, to, TILE_NUMBERS, v, rows, K);
    else if (!x3)
        pack_part(PART_WHOLE, 0, to, TILE_NUMBERS, v, rows, K);
    else if (by_pairs) {
        pack_part(PART_HIGH, 1, to, 2 * TILE_NUMBERS, v, rows, K);
        pack_part(PART_LOW, 1, to + TILE_NUMBERS, 2 * TILE_NUMBERS, v, rows, K);
    } else {
        pack_part(PART_HIGH, 0, to, 2 * TILE_NUMBERS, v, rows, K);
        pack_part(PART_LOW, 0, to + TILE_NUMBERS, 2 * TILE_NUMBERS, v, rows, K);
    }
}

/* ---- A piece ---- */

typedef struct {
    int x3, add, threads;
    size_t M, N, K; /* of the piece */
    View a, b;      /* op(A); op(B) transposed: a row is a column of op(B) */
    real *c;
    size_t ldc;
    uint16_t *to_a, *to_b; /* packed */
    size_t panel;          /* numbers of a panel */
    size_t packed;         /* panels of A to be packed: 0 if they are */
    size_t rows, cols;     /* of a task */
} Piece;

static void pack_task(void *context, size_t t) {
    const Piece *p = (const Piece *)context;
    const size_t i = t * TILE, j = (t - p->packed) * TILE;
    if (t < p->packed)
        pack_panel(p->x3, 0, p->to_a + t * p->panel, view_at(p->a, i, 0), min_size(TILE, p->M - i), p->K);
    else
        pack_panel(p->x3, 1, p->to_b + j / TILE * p->panel, view_at(p->b, j, 0), min_size(TILE, p->N - j), p->K);
}

INLINE void multiply(int x3, const Piece *p, size_t i0, size_t i1, size_t j0, size_t j1) {
    const size_t tile = (x3 ? 2 : 1) * TILE_NUMBERS;
    for (size_t j = j0; j < j1; j += BLOCK)
        for (size_t i = i0; i < i1; i += BLOCK) {
            const uint16_t *a = p->to_a + i / TILE * p->panel, *b = p->to_b + j / TILE * p->panel;
            const BlockSum sum = {ceil_div(p->K, STEP), {a, a + p->panel}, NULL, tile, STEP,
                                  TILE_NUMBERS,         {b, b + p->panel}};
            block_sum(x3, &sum, min_size(BLOCK, i1 - i), min_size(BLOCK, j1 - j), p->add, p->c + i * p->ldc + j,
                      p->ldc);
        }
}

static void multiply_task(void *context, size_t t) {
    const Piece *p = (const Piece *)context;
    const size_t down = ceil_div(p->M, p->rows), i = t % down * p->rows, j = t / down * p->cols;
    const size_t i1 = min_size(p->M, i + p->rows), j1 = min_size(p->N, j + p->cols);
    tiles_begin(p->M);
    if (p->x3)
        multiply(1, p, i, i1, j, j1);
    else
        multiply(0, p, i, i1, j, j1);
    tiles_end();
}

/* Tasks whose A takes half of the L2 cache, halved along the longer side until every thread has several. */
static void choose_tasks(Piece *p) {
    const size_t numbers = l2_bytes() / 2 / sizeof *p->to_a;
    p->rows = min_size(round_up(p->M, BLOCK), max_size(BLOCK, numbers * TILE / p->panel / BLOCK * BLOCK));
    p->cols = round_up(p->N, BLOCK);
    for (;;) {
        const size_t tasks = ceil_div(p->M, p->rows) * ceil_div(p->N, p->cols);
        if (p->threads == 1 || tasks >= TASKS_PER_THREAD * (size_t)p->threads) return;
        if (p->rows > p->cols)
            p->rows = round_up(p->rows / 2, BLOCK);
        else if (p->cols > BLOCK)
            p->cols = round_up(p->cols / 2, BLOCK);
        else
            return;
    }
}

static void piece_product(Piece *p, int pack_b) {
    p->packed = ceil_div(p->M, TILE);
    parallel_for(p->threads, p->packed + (pack_b ? ceil_div(p->N, TILE) : 0), pack_task, p);
    choose_tasks(p);
    parallel_work(p->threads, ceil_div(p->M, p->rows) * ceil_div(p->N, p->cols), multiply_task, p);
}

/* ---- The product ---- */

void gemm_bf16(int x3, size_t M, size_t N, size_t K, View a, View b, int accumulate, real *C, size_t ldc, int threads,
               uint16_t *room) {
    const size_t pieces = ceil_div(K, KC), kc = round_up(ceil_div(K, pieces), STEP), panel = kc * TILE * (x3 ? 2 : 1);
    const int large = threads > 1 || ceil_div(max_size(M, N), TILE) * panel > OWN_ROOM;
    const int shared = large && !atomic_flag_test_and_set(&shared_taken);
    const size_t most = (shared ? ROOM : OWN_ROOM) / panel * TILE / BLOCK * BLOCK;
    const View columns = {b.p, b.col, b.row};
    Piece p = {.x3 = x3, .threads = threads, .ldc = ldc, .panel = panel};
    p.to_a = shared ? shared_a : room, p.to_b = shared ? shared_b : room + OWN_ROOM;
    for (size_t k = 0; k < K; k += kc)
        for (size_t j = 0; j < N; j += most)
            for (size_t i = 0; i < M; i += most) {
                p.M = min_size(most, M - i), p.N = min_size(most, N - j), p.K = min_size(kc, K - k);
                p.a = view_at(a, i, k), p.b = view_at(columns, j, k);
                p.c = C + i * ldc + j, p.add = accumulate || k > 0;
                piece_product(&p, i == 0);
            }
    if (shared) atomic_flag_clear(&shared_taken);
}
