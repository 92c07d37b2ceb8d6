/* bf16.h - products of bf16 with sums of float, in blocks of 32 x 32: what bf16.c and convolutions share.
 *
 *     C (rows, cols) = (+ C) sum over steps s of A_s (rows, 32) B_s (32, cols)        rows, cols <= 32
 *
 * A step is a tile of A times a tile of B, each 16 rows of 64 bytes, as the tile instructions of Intel's processors
 * (AMX) take them:
 *
 *     A   16 rows of C by 32 k: a row is 32 neighbouring bf16 at a + offset[s] + row * a_row. So A may be rows, or tiles
 *         that were packed, or a picture, channels last, seen through the window of a convolution: then a step is 32
 *         channels under one tap.
 *     B   32 k by 16 columns of C, packed: word (p,j) of the 16 x 16 holds k = 2p (lower half) and 2p+1 of column j. The
 *         tiles of all steps lie one behind the other: a panel. Weights in bf16 are such panels (stream.c).
 *
 * bf16x3: an operand is the sum of two, x = high + low, high = bf16(x), low = bf16(x - high), and
 * A B = high high + high low + low high. A tile of low stands a_low numbers behind its tile of high; in a panel of B it
 * follows it. A number that is not finite, and one that bf16 rounds to infinity, is high = 0, low = x: in low it meets no
 * low, whose sign may be the other one, and so infinity times a number stays infinity. Infinity times infinity is NaN.
 *
 * Promise on bits: an element of C is one sum over the steps, in order, begun with 0; rows, cols and position do not
 * change it. On each kind of processor the order within a step is its own. Tile instructions and avx512_bf16 take
 * numbers below 2^-126 for 0. */
#ifndef BF16_H
#define BF16_H

#include "kernels/tiles.h"

enum {
    TILE = 16,                  /* rows of C in a tile of A, columns in a tile of B */
    STEP = 32,                  /* k of a tile */
    TILE_NUMBERS = TILE * STEP, /* 1 KB */
    BLOCK = 2 * TILE            /* rows and columns of a block of C */
};

/* The sum of a block. All 16 rows of a tile of A are read, if any is. */
typedef struct {
    size_t steps;
    const uint16_t *a[2];   /* of rows 0..15 and 16..31; the second is not read if rows <= 16 */
    const uint32_t *offset; /* (steps); NULL: s * a_step */
    size_t a_step, a_row, a_low;
    const uint16_t *b[2]; /* panels of columns 0..15 and 16..31; the second is not read if cols <= 16 */
    size_t ahead; /* so many numbers of the panels are fetched ahead from memory; 0: none. Blocks lie side by side */
} BlockSum;

/* to (ceil(K/32)) tiles, bf16x3: of high and low in turn: `rows` <= 16 rows of v, zeros behind. by_pairs: as a panel of B,
 * whose columns those rows are. bf16.c */
void pack_panel(int x3, int by_pairs, uint16_t *to, View v, size_t rows, size_t K);

/* Asks for what will be the next but some tiles: behind the end of a panel, those of the next block, one panel further. */
INLINE void fetch_b(int x3, int across, const BlockSum *p, size_t s) {
    if (!p->ahead) return;
    const size_t step = (x3 ? 2 : 1) * TILE_NUMBERS, panel = (size_t)(p->b[1] - p->b[0]), at = s * step + p->ahead;
    for (int i = 0; i <= across; i++)
        for (size_t n = 0; n < step; n += LINE_BYTES / sizeof(uint16_t))
            __builtin_prefetch(p->b[i] + (at < panel ? at : at + panel) + n, 0, 2);
}

INLINE size_t a_of_step(const BlockSum *p, size_t s) {
    return p->offset ? p->offset[s] : s * p->a_step;
}

/* ---- Operands ---- */

#if defined(__AVX512BF16__) && !defined(REAL_DOUBLE)
#define HAVE_DPBF16 1
#else
#define HAVE_DPBF16 0
#endif

/* What of a number an operand holds. */
typedef enum { PART_WHOLE, PART_HIGH, PART_LOW } Part;

INLINE uint16_t part_of(Part part, real x) {
    const uint16_t whole = bf16_from_float((float)x);
    const float near = bf16_to_float(whole), high = near - near == 0 ? near : 0;
    return part == PART_WHOLE ? whole : bf16_from_float(part == PART_HIGH ? high : (float)(x - (real)high));
}

#if HAVE_DPBF16

INLINE Vec split_off(Part part, Vec x) {
    const __m512i whole = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
    const Vec near = (Vec)_mm512_slli_epi32(whole, 16);
    const Vec high = _mm512_maskz_mov_ps(_knot_mask16(_mm512_fpclass_ps_mask(near, 0x99)), near); /* NaN, infinity: 0 */
    return part == PART_HIGH ? high : x - high;
}

INLINE __m512i parts_of(Part part, Vec first, Vec second) {
    if (part != PART_WHOLE) first = split_off(part, first), second = split_off(part, second);
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

/* A tile, its rows to_row numbers apart: k < n <= STEP of the rows of v, zeros behind. by_pairs: as a tile of B, whose
 * columns those rows are. */
INLINE void pack_tile(Part part, int by_pairs, uint16_t *to, size_t to_row, View v, size_t rows, size_t n) {
    static const uint16_t pairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_loadu_si512(pairs);
    Vec word[TILE];
    for (size_t i = 0; i < TILE; i++) {
        Vec first = {0}, second = {0};
        if (v.col == 1 && i < rows) {
            first = load_first(v.p + i * v.row, n);
            second = load_first(v.p + i * v.row + LANES, n > LANES ? n - LANES : 0);
        } else if (v.col != 1) {
            if (2 * i < n) first = load_first(v.p + 2 * i * v.col, rows);
            if (2 * i + 1 < n) second = load_first(v.p + (2 * i + 1) * v.col, rows);
        }
        const __m512i both = parts_of(part, first, second);
        word[i] = (Vec)(v.col == 1 ? both : _mm512_permutexvar_epi16(order, both));
    }
    if ((v.col == 1) == by_pairs) transpose_vecs(word);
#pragma GCC unroll 16 /* else gcc makes it a call of memcpy */
    for (size_t i = 0; i < TILE; i++) memcpy(to + i * to_row, &word[i], sizeof word[i]);
}

#else

INLINE void pack_tile(Part part, int by_pairs, uint16_t *to, size_t to_row, View v, size_t rows, size_t n) {
    for (size_t i = 0; i < TILE; i++)
        for (size_t k = 0; k < STEP; k++) {
            const uint16_t x = i < rows && k < n ? part_of(part, v.p[i * v.row + k * v.col]) : 0;
            to[by_pairs ? k / 2 * to_row + i * 2 + k % 2 : i * to_row + k] = x;
        }
}

#endif

/* ---- Vectors ---- */

enum {
    BLOCK_VECS = BLOCK < 2 * LANES ? 1 : 2, /* vectors of columns at a time */
    BLOCK_ROWS = VECTOR_BYTES == 64 ? 8 : 4 /* rows at a time: the sums stay in registers */
};

/* Unrolled whole, the 16 pairs of a step fill the cache of instructions. */
#if defined(__clang__)
#define UNROLL_LITTLE _Pragma("clang loop unroll(disable)")
#else
#define UNROLL_LITTLE _Pragma("GCC unroll 2")
#endif

INLINE Words load_words(const uint16_t *p) {
    Words w;
    memcpy(&w, p, sizeof w);
    return w;
}

INLINE real number_of_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return (real)f;
}

/* sum + the products of two k of a row of A and of LANES columns of B */
INLINE Vec add_pair(const uint16_t *a, Words b, Vec sum) {
    uint32_t pair;
    memcpy(&pair, a, sizeof pair);
#if HAVE_DPBF16
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32((int)pair), (__m512bh)b);
#else
    const Floats even = (Floats)(b << 16), odd = (Floats)(b & 0xffff0000u);
    sum = multiply_add(number_of_bits(pair << 16), __builtin_convertvector(even, Vec), sum);
    return multiply_add(number_of_bits(pair & 0xffff0000u), __builtin_convertvector(odd, Vec), sum);
#endif
}

/* C (rows, LANES or the first n columns) = or += sum */
INLINE void put_vector(real *c, Vec sum, size_t n, int add) {
    if (n >= LANES)
        store(c, add ? load(c) + sum : sum);
    else
        for (size_t i = 0; i < n; i++) c[i] = add ? c[i] + sum[i] : sum[i];
}

/* `rows` rows of C from row i of the block on, `vecs` vectors from column j on. rows, vecs and x3 are constants where this
 * is expanded. */
INLINE void vector_rows(int rows, int vecs, int x3, const BlockSum *p, size_t i, size_t j, size_t cols, int add,
                        real *c, size_t ldc) {
    const size_t a_row = p->a_row, b_step = (x3 ? 2 : 1) * TILE_NUMBERS;
    const uint16_t *from = p->a[i / TILE] + i % TILE * a_row;
    const uint16_t *panel[BLOCK_VECS];
    Vec sum[BLOCK_ROWS][BLOCK_VECS];
    for (int v = 0; v < vecs; v++) {
        const size_t column = j + (size_t)v * LANES;
        panel[v] = p->b[column / TILE] + column % TILE * 2;
        for (int r = 0; r < rows; r++) sum[r][v] = (Vec){0};
    }
    for (size_t s = 0; s < p->steps; s++) {
        const uint16_t *a = from + a_of_step(p, s);
        if (i == 0) fetch_b(x3, cols > TILE, p, s);
        UNROLL_LITTLE
        for (size_t k = 0; k < STEP; k += 2) {
            Words high[BLOCK_VECS], low[BLOCK_VECS];
            for (int v = 0; v < vecs; v++) {
                high[v] = load_words(panel[v] + s * b_step + k * TILE);
                if (x3) low[v] = load_words(panel[v] + s * b_step + TILE_NUMBERS + k * TILE);
            }
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < vecs; v++) {
                    const uint16_t *ak = a + (size_t)r * a_row + k;
                    if (x3) sum[r][v] = add_pair(ak, low[v], sum[r][v]);
                    sum[r][v] = add_pair(ak, high[v], sum[r][v]);
                    if (x3) sum[r][v] = add_pair(ak + p->a_low, high[v], sum[r][v]);
                }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++) {
            const size_t column = j + (size_t)v * LANES;
            put_vector(c + (i + (size_t)r) * ldc + column, sum[r][v], cols - column, add);
        }
}

/* All rows from column j on, as many at a time as a power of two; vecs and x3 are constants. */
INLINE void vector_columns(int vecs, int x3, const BlockSum *p, size_t rows, size_t j, size_t cols, int add, real *c,
                           size_t ldc) {
    size_t i = 0;
    for (; i + BLOCK_ROWS <= rows; i += BLOCK_ROWS) vector_rows(BLOCK_ROWS, vecs, x3, p, i, j, cols, add, c, ldc);
    for (; i + 4 <= rows; i += 4) vector_rows(4, vecs, x3, p, i, j, cols, add, c, ldc);
    for (; i < rows; i++) vector_rows(1, vecs, x3, p, i, j, cols, add, c, ldc);
}

INLINE void vector_block(int x3, const BlockSum *p, size_t rows, size_t cols, int add, real *c, size_t ldc) {
    for (size_t j = 0; j < cols; j += BLOCK_VECS * LANES)
        if (cols - j <= LANES)
            vector_columns(1, x3, p, rows, j, cols, add, c, ldc);
        else
            vector_columns(BLOCK_VECS, x3, p, rows, j, cols, add, c, ldc);
}

/* ---- Tiles ---- */

#if HAVE_TILES

/* C in tiles 0..3, of B in 4 and 5, of A in 6 and 7. down, across: has the block rows, columns from 16 on? Constants
 * where these are expanded. */
INLINE void load_tiles_a(int down, const BlockSum *p, size_t at) {
    tile_load(6, p->a[0] + at, p->a_row * sizeof(uint16_t));
    if (down) tile_load(7, p->a[1] + at, p->a_row * sizeof(uint16_t));
}

INLINE void load_tiles_b(int across, const BlockSum *p, size_t at) {
    tile_load(4, p->b[0] + at, STEP * sizeof(uint16_t));
    if (across) tile_load(5, p->b[1] + at, STEP * sizeof(uint16_t));
}

INLINE void add_tile_products(int down, int across) {
    tile_add_product(0, 6, 4);
    if (across) tile_add_product(1, 6, 5);
    if (down) tile_add_product(2, 7, 4);
    if (down && across) tile_add_product(3, 7, 5);
}

/* x3: eight tiles are loaded for twelve products. */
INLINE void tile_steps(int x3, int down, int across, const BlockSum *p) {
    for (size_t s = 0; s < p->steps; s++) {
        const size_t a = a_of_step(p, s), b = s * (x3 ? 2 : 1) * TILE_NUMBERS;
        fetch_b(x3, across, p, s);
        load_tiles_a(down, p, a);
        if (x3) {
            load_tiles_b(across, p, b + TILE_NUMBERS);
            add_tile_products(down, across);
        }
        load_tiles_b(across, p, b);
        add_tile_products(down, across);
        if (x3) {
            load_tiles_a(down, p, a + p->a_low);
            add_tile_products(down, across);
        }
    }
}

/* C (rows, cols) = or += sum (rows, row stride BLOCK) */
INLINE void put_rows(const real *sum, size_t rows, size_t cols, int add, real *c, size_t ldc) {
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j += LANES) put_vector(c + i * ldc + j, load(sum + i * BLOCK + j), cols - j, add);
}

/* The sums take a way over the stack: C itself may be narrower than a tile, and its rows fight for places in the cache. */
INLINE void tile_block(int x3, int down, int across, const BlockSum *p, size_t rows, size_t cols, int add, real *c,
                       size_t ldc) {
    real sum[BLOCK * BLOCK] __attribute__((aligned(LINE_BYTES)));
    const size_t row = BLOCK * sizeof(real);
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    tile_steps(x3, down, across, p);
    tile_store(0, sum, row);
    if (across) tile_store(1, sum + TILE, row);
    if (down) tile_store(2, sum + TILE * BLOCK, row);
    if (down && across) tile_store(3, sum + TILE * BLOCK + TILE, row);
    if (rows == BLOCK && cols == BLOCK)
        put_rows(sum, BLOCK, BLOCK, add, c, ldc);
    else
        put_rows(sum, rows, cols, add, c, ldc);
}

INLINE void tiles_block_sum(int x3, const BlockSum *p, size_t rows, size_t cols, int add, real *c, size_t ldc) {
    if (rows > TILE && cols > TILE)
        tile_block(x3, 1, 1, p, rows, cols, add, c, ldc);
    else if (rows > TILE)
        tile_block(x3, 1, 0, p, rows, cols, add, c, ldc);
    else if (cols > TILE)
        tile_block(x3, 0, 1, p, rows, cols, add, c, ldc);
    else
        tile_block(x3, 0, 0, p, rows, cols, add, c, ldc);
}

#endif

/* ---- The block ---- */

/* C (rows, cols) = or += the sum; rows, cols: 1..32. Between tiles_begin and tiles_end (tiles.h). */
INLINE void block_sum(int x3, const BlockSum *p, size_t rows, size_t cols, int add, real *c, size_t ldc) {
#if HAVE_TILES
    if (tiles_here()) {
        tiles_block_sum(x3, p, rows, cols, add, c, ldc);
        return;
    }
#endif
    vector_block(x3, p, rows, cols, add, c, ldc);
}

#endif
