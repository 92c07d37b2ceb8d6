/* stream.c - the product of rows with a matrix of weights that streams by, as decoding does it; weights in fewer bits.
 *
 * Owns: gemm_stream and the packing of weights (weights_pack). Refuses: nothing; it cannot fail and it allocates
 * nothing.
 *
 * Decoding multiplies 1..64 rows with a weight matrix (N,K). Each weight is used once per row, so the work is to read
 * the weights as fast as memory gives them and to multiply meanwhile. A task takes a few vectors of outputs
 * at a time, a piece of k after the other, and does two things in turn:
 *
 *     spread     brings the weights into `panel`, in the L1 cache, where a vector holds one k of LANES outputs: rows of
 *                numbers are transposed in registers, int8 widened. Once for all rows of A. Packed bf16 lies so
 *                already.
 *     multiply   GROUP rows of A at a time: loads a vector of the panel and adds its products with one number of each
 *                row of A, while the next weights are fetched from memory at a constant rate.
 *
 * Numerics, the same on every machine. WEIGHTS_REAL: products and sums in real. WEIGHTS_BF16 and WEIGHTS_INT8: the
 * rows of A are rounded to bf16 first, products of two bf16 are exact, sums are float (real); int8 is exact in bf16,
 * its factor multiplies the sum. Processors with avx512_bf16 have one instruction for two such products, which is twice
 * as fast as two multiply-adds (and takes numbers below 2^-126 for 0).
 *
 * Promise on bits: an element of C is one sum over k in a fixed order. Threads, M, N and position do not change it, so
 * a row computed alone equals bit for bit the same row in any batch. */

#include "kernels/bf16.h"

/* ---- Weights in fewer bits ---- */

void round_bf16(uint16_t *to, const real *x, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] = bf16_from_float((float)x[i]);
}

/* The factor of a row in int8: its largest magnitude becomes 127. NaN if a number is not finite. */
static float int8_factor(const real *x, size_t n) {
    float largest = 0;
    int finite = 1;
    for (size_t i = 0; i < n; i++) {
        const float size = (float)(x[i] < 0 ? -x[i] : x[i]);
        finite &= size <= 3e38f; /* false for NaN */
        largest = size > largest ? size : largest;
    }
    return finite ? largest / 127 : 0.0f / 0.0f;
}

static int8_t to_int8(float q) {
    if (!(q >= -127)) return q != q ? 0 : -127;
    return (int8_t)(q > 127 ? 127 : q + (q < 0 ? -0.5f : 0.5f));
}

/* A packed matrix (N,K) is cut into panels of PANEL_ROWS rows, each (words of K, PANEL_ROWS), zeros behind its ends:
 * a vector of it holds the same k of neighbouring rows. A word is two bf16 or four int8; panels are whole steps of
 * bf16.h, and those of bf16x3 have a tile of high parts and one of low parts in turn. */
enum { PANEL_ROWS = TILE, WORD = 4 };

/* Bytes from one panel to the next. Not whole pages: neighbouring panels, which are read side by side, would fight for the
 * same places in the L1 cache. */
static size_t panel_bytes(WeightFormat format, size_t K) {
    enum { PAGE = 4096, APART = 8 * LINE_BYTES };
    const size_t bytes = round_up(K, STEP) * weight_bytes(format) * PANEL_ROWS;
    return bytes % PAGE ? bytes : bytes + APART;
}

size_t weights_bytes(WeightFormat format, size_t N, size_t K) {
    return format == WEIGHTS_REAL ? N * K * sizeof(real) : ceil_div(N, PANEL_ROWS) * panel_bytes(format, K);
}

void weights_pack(WeightFormat format, void *out, float *scale, const real *x, size_t j, size_t K) {
    char *to = (char *)out + j / PANEL_ROWS * panel_bytes(format, K) + j % PANEL_ROWS * WORD;
    const float factor = format == WEIGHTS_INT8 ? int8_factor(x, K) : 0;
    const float inverse = factor > 0 ? 1 / factor : 0; /* NaN: all 0, and the factor says it */
    for (size_t k = 0; k < K; k++) {
        const uint16_t half = part_of(PART_WHOLE, x[k]), high = part_of(PART_HIGH, x[k]), low = part_of(PART_LOW, x[k]);
        const int8_t byte = to_int8((float)x[k] * inverse);
        char *pair = to + (format == WEIGHTS_BF16X3 ? k / STEP * STEP + k : k) / 2 * WORD * PANEL_ROWS + k % 2 * 2;
        if (format == WEIGHTS_BF16)
            memcpy(pair, &half, 2);
        else if (format == WEIGHTS_BF16X3)
            memcpy(pair, &high, 2), memcpy(pair + TILE_NUMBERS * sizeof low, &low, 2);
        else
            memcpy(to + k / 4 * WORD * PANEL_ROWS + k % 4, &byte, 1);
    }
    if (format == WEIGHTS_INT8) scale[j] = factor;
}

/* ---- By vectors ---- */

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && !defined(REAL_DOUBLE)
#define PAIRS 1 /* two neighbouring k of packed weights are one step */
#else
#define PAIRS 0
#endif

enum {
    GROUP = VECTOR_BYTES == 64 ? 8 : 6, /* rows of A at a time */
    VECS = 2,                           /* vectors of outputs at a time: GROUP*VECS sums stay in registers */
    STEPS = 128,                        /* of a panel: 16 KB */
    FEW = 4,                            /* rows, at most, that do without a panel */
    AHEAD = 8192,                       /* bytes fetched ahead then */
    AHEAD_NUMBERS = 4096,               /* of a panel of bf16, in blocks */
    BURST = 16,                         /* steps between two rounds of fetching */
    ROWS = 512,                         /* rows of A, at most, that share one reading of the weights */
    TASKS_PER_THREAD = 4                /* so that a delayed thread costs little */
};

/* A step of a row of A: one number, or with PAIRS two bf16, the even k in the lower half. */
typedef union {
    real number;
    uint32_t pair;
} Step;

typedef struct {
    size_t M, N, K;
    const Step *A; /* (M,lda) */
    size_t lda;    /* steps */
    const Weights *w;
    int accumulate;
    real *C;
    size_t ldc;
    size_t outputs; /* rows of weights in a task */
} Stream;

static __thread Vec panel[VECS][STEPS] __attribute__((aligned(64)));
static __thread Vec sums[ROWS * VECS] __attribute__((aligned(LINE_BYTES))); /* between two pieces of the same outputs */

/* The steps that a word holds. */
INLINE size_t word_steps(WeightFormat format) {
    return format == WEIGHTS_REAL ? 1 : (format == WEIGHTS_BF16 ? 2 : 4) / (PAIRS ? 2 : 1);
}

/* Steps of a row: those of whole words. */
INLINE size_t all_steps(WeightFormat format, size_t K) {
    return format == WEIGHTS_REAL ? K : ceil_div(K * weight_bytes(format), WORD) * word_steps(format);
}

/* ---- Spread: from rows of weights to a panel ---- */

/* Words of packed outputs from j on that hold a step. */
INLINE const char *words_at(WeightFormat format, const Stream *s, size_t j, size_t step) {
    return (const char *)s->w->data + j / PANEL_ROWS * panel_bytes(format, s->K) + j % PANEL_ROWS * WORD +
           step / word_steps(format) * WORD * PANEL_ROWS;
}

#ifndef REAL_DOUBLE

#if PAIRS
/* Two tables give the low and the high byte of the bf16 of an int8's magnitude, 0..127; its sign is the bf16's sign. */
typedef struct {
    __m512i low[2], high[2];
} Int8Tables;

INLINE Int8Tables int8_tables(void) {
    static const struct {
        uint8_t low[128], high[128];
    } bytes = {{0,   128, 0,   64,  128, 160, 192, 224, 0,   16,  32,  48,  64,  80,  96,  112, 128, 136, 144,
                152, 160, 168, 176, 184, 192, 200, 208, 216, 224, 232, 240, 248, 0,   4,   8,   12,  16,  20,
                24,  28,  32,  36,  40,  44,  48,  52,  56,  60,  64,  68,  72,  76,  80,  84,  88,  92,  96,
                100, 104, 108, 112, 116, 120, 124, 128, 130, 132, 134, 136, 138, 140, 142, 144, 146, 148, 150,
                152, 154, 156, 158, 160, 162, 164, 166, 168, 170, 172, 174, 176, 178, 180, 182, 184, 186, 188,
                190, 192, 194, 196, 198, 200, 202, 204, 206, 208, 210, 212, 214, 216, 218, 220, 222, 224, 226,
                228, 230, 232, 234, 236, 238, 240, 242, 244, 246, 248, 250, 252, 254},
               {0,  63, 64, 64, 64, 64, 64, 64, 65, 65, 65, 65, 65, 65, 65, 65, 65, 65, 65, 65, 65, 65, 65, 65, 65, 65,
                65, 65, 65, 65, 65, 65, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66,
                66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66,
                66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66,
                66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66, 66}};
    Int8Tables t;
    memcpy(&t, &bytes, sizeof t);
    return t;
}

/* to[0], to[1] = the steps (k0,k2), (k1,k3) of LANES words (k0 k1 k2 k3). */
INLINE void spread_int8(Vec *to, Vec packed, const Int8Tables *t) {
    const __m512i byte = (__m512i)packed, size = _mm512_abs_epi8(byte);
    const __m512i low = _mm512_permutex2var_epi8(t->low[0], size, t->low[1]);
    const __m512i high = _mm512_permutex2var_epi8(t->high[0], size, t->high[1]);
    const __m512i sign = _mm512_set1_epi8((char)0x80), odd = _mm512_set1_epi16((short)0xff00);
    const __m512i with_sign = _mm512_ternarylogic_epi32(high, byte, sign, 0xf8); /* high | (byte & sign) */
    to[0] = (Vec)_mm512_ternarylogic_epi32(odd, low, _mm512_slli_epi16(with_sign, 8), 0xac);
    to[1] = (Vec)_mm512_ternarylogic_epi32(odd, _mm512_srli_epi16(low, 8), with_sign, 0xac);
}
#endif

INLINE void spread_words(WeightFormat format, Vec *to, Vec packed) {
    const Words bits = (Words)packed;
    if (format == WEIGHTS_BF16 && PAIRS)
        to[0] = packed;
    else if (format == WEIGHTS_BF16)
        to[0] = (Vec)(bits << 16), to[1] = (Vec)(bits & 0xffff0000u);
    else {
#if PAIRS
        const Int8Tables tables = int8_tables();
        spread_int8(to, packed, &tables);
#else
        for (int i = 0; i < 4; i++) to[i] = __builtin_convertvector((Ints)(bits << (24 - 8 * i)) >> 24, Vec);
#endif
    }
}

/* The steps of a unit: as many numbers as fit a vector, of LANES rows; or a word of packed weights. */
INLINE size_t unit_steps(WeightFormat format) {
    return format == WEIGHTS_REAL ? LANES : word_steps(format);
}

/* to = n <= unit_steps steps, from `step` on, of LANES outputs from j on. Past the last row of weights the last row is
 * read again; what comes of it is not stored. */
INLINE void spread_unit(WeightFormat format, const Stream *s, size_t j, size_t step, size_t n, Vec *to) {
    if (format != WEIGHTS_REAL) {
        Vec packed;
        memcpy(&packed, words_at(format, s, j, step), sizeof packed);
        spread_words(format, to, packed);
        return;
    }
    const real *w = (const real *)s->w->data + j * s->K + step;
    const size_t rows = s->N - j;
    if (n == LANES && rows >= LANES)
        for (size_t i = 0; i < LANES; i++) to[i] = load(w + i * s->K);
    else
        for (size_t i = 0; i < LANES; i++) to[i] = load_first(w + min_size(i, rows - 1) * s->K, n);
    transpose_vecs(to);
}

#else /* doubles: for tests, one by one */

static real one_weight(const Stream *s, size_t j, size_t k) {
    const char *w = words_at(s->w->format, s, j, k);
    uint16_t half;
    if (s->w->format == WEIGHTS_INT8) return ((const int8_t *)w)[k % 4];
    memcpy(&half, w + k % 2 * 2, sizeof half);
    return (real)bf16_to_float(half);
}

INLINE size_t unit_steps(WeightFormat format) {
    (void)format;
    return 1;
}

INLINE void spread_unit(WeightFormat format, const Stream *s, size_t j, size_t step, size_t n, Vec *to) {
    for (size_t l = 0; l < LANES && n > 0; l++) {
        const size_t row = min_size(j + l, s->N - 1);
        to[0][l] = format == WEIGHTS_REAL ? ((const real *)s->w->data)[row * s->K + step] : one_weight(s, row, step);
    }
}

#endif

/* ---- Fetching ahead ---- */

/* Number of places in memory that VECS*LANES outputs are read from at once: rows of weights, or panels. */
INLINE size_t streams(WeightFormat format) {
    return format == WEIGHTS_REAL ? VECS * LANES : ceil_div(VECS * LANES, PANEL_ROWS);
}

/* Bytes from one of these places to the next, and of the steps of one unit. */
INLINE size_t stream_bytes(WeightFormat format, size_t K) {
    return format == WEIGHTS_REAL ? K * sizeof(real) : panel_bytes(format, K);
}
INLINE size_t unit_bytes(WeightFormat format) {
    return format == WEIGHTS_REAL ? VECTOR_BYTES : WORD * PANEL_ROWS;
}

/* Lines of weights that will be needed next, line by line of each stream in turn. */
typedef struct {
    const char *at;
    size_t stride, next, end;
} Ahead;

INLINE void fetch(WeightFormat format, Ahead *a, size_t lines) {
    const size_t end = min_size(a->end, a->next + lines), n = streams(format);
    for (size_t i = a->next; i < end; i++) __builtin_prefetch(a->at + i % n * a->stride + i / n * LINE_BYTES, 0, 2);
    a->next = end;
}

/* Where the steps of output j begin. */
INLINE const char *weights_at(WeightFormat format, const Stream *s, size_t j, size_t step) {
    return format == WEIGHTS_REAL ? (const char *)s->w->data + (j * s->K + step) * sizeof(real)
                                  : words_at(format, s, j, step);
}

/* The weights that are read after the piece at (j,step), in the task that ends before output `end`. None after the
 * task's last piece. */
INLINE Ahead ahead_of(WeightFormat format, const Stream *s, size_t j, size_t step, size_t end) {
    const size_t all = all_steps(format, s->K);
    Ahead a = {NULL, stream_bytes(format, s->K), 0, 0};
    step += STEPS;
    if (step >= all) step = 0, j += VECS * LANES;
    if (j >= end) return a;
    a.at = weights_at(format, s, j, step);
    a.end = streams(format) *
            ceil_div(ceil_div(min_size(STEPS, all - step), unit_steps(format)) * unit_bytes(format), LINE_BYTES);
    return a;
}

/* ---- Multiply ---- */

/* sum + the products of the weights w with a step of A. */
INLINE Vec add_products(WeightFormat format, const Step *a, Vec w, Vec sum) {
#if PAIRS
    if (format != WEIGHTS_REAL) return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)a->pair));
#endif
    (void)format;
    return multiply_add(a->number, w, sum);
}

/* C (rows, LANES from column j on) = or += sum, with int8's factors */
INLINE void put_sum(WeightFormat format, const Stream *s, size_t row, size_t j, Vec sum) {
    real *c = s->C + row * s->ldc + j;
    const size_t n = min_size(LANES, s->N - j);
    if (n == LANES) {
        if (format == WEIGHTS_INT8) sum *= load_factors(s->w->scale + j);
        store(c, s->accumulate ? load(c) + sum : sum);
    } else
        for (size_t i = 0; i < n; i++) {
            const real t = format == WEIGHTS_INT8 ? sum[i] * (real)s->w->scale[j + i] : sum[i];
            c[i] = s->accumulate ? c[i] + t : t;
        }
}

/* The panel at (j,step) times `rows` rows of A from x on. rows and format are constants where this is expanded. */
INLINE void multiply_group(WeightFormat format, int rows, const Stream *s, const Vec *const weights[VECS], size_t x,
                           size_t j, size_t step, size_t steps, Ahead *ahead, size_t lines) {
    const Step *a = s->A + x * s->lda + step;
    const size_t lda = s->lda;
    Vec sum[GROUP][VECS], *so_far = sums + x * VECS;
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < VECS; v++) sum[i][v] = step ? so_far[i * VECS + v] : (Vec){0};
    for (size_t begin = 0; begin < steps; begin += BURST) {
        fetch(format, ahead, lines);
        for (size_t k = begin; k < min_size(steps, begin + BURST); k++) {
            Vec w[VECS];
            for (int v = 0; v < VECS; v++) w[v] = weights[v][k];
            for (int i = 0; i < rows; i++)
                for (int v = 0; v < VECS; v++)
                    sum[i][v] = add_products(format, a + (size_t)i * lda + k, w[v], sum[i][v]);
        }
    }
    const int last = step + steps == all_steps(format, s->K);
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < VECS; v++)
            if (!last)
                so_far[i * VECS + v] = sum[i][v];
            else if (j + (size_t)v * LANES < s->N)
                put_sum(format, s, x + (size_t)i, j + (size_t)v * LANES, sum[i][v]);
}

/* Chooses the expansion for a number of rows. */
INLINE void multiply_rows(WeightFormat format, size_t rows, const Stream *s, const Vec *const weights[VECS], size_t x,
                          size_t j, size_t step, size_t steps, Ahead *ahead, size_t lines) {
#define EXPAND(n)                                                                                                      \
    case n: multiply_group(format, n, s, weights, x, j, step, steps, ahead, lines); break
    switch (rows) {
        EXPAND(1);
        EXPAND(2);
        EXPAND(3);
        EXPAND(4);
        EXPAND(5);
        EXPAND(6);
#if VECTOR_BYTES == 64
        EXPAND(7);
        EXPAND(8);
#endif
    }
#undef EXPAND
}

/* First output of vector v. Past the end: clamped to the last vector of outputs; what comes of it is not stored. */
INLINE size_t output_of(const Stream *s, size_t j, int v) {
    return min_size(j + (size_t)v * LANES, (s->N - 1) / LANES * LANES);
}

/* All rows of A with VECS*LANES outputs from j on, of a task that ends before output `end`. */
INLINE void stream_outputs(WeightFormat format, const Stream *s, size_t j, size_t end) {
    const size_t all = all_steps(format, s->K), groups = ceil_div(s->M, GROUP);
    const int in_place = PAIRS && format == WEIGHTS_BF16;
    for (size_t step = 0; step < all; step += STEPS) {
        const size_t steps = min_size(STEPS, all - step);
        const Vec *weights[VECS];
        Ahead ahead = ahead_of(format, s, j, step, end);
        const size_t units = VECS * ceil_div(steps, unit_steps(format)), parts = groups + !in_place;
        const size_t in_spread = ceil_div(ahead.end, parts * units);
        const size_t in_multiply = ceil_div(ahead.end, parts * ceil_div(steps, BURST));
        for (int v = 0; v < VECS; v++) {
            weights[v] =
                in_place ? (const Vec *)(const void *)weights_at(format, s, output_of(s, j, v), step) : panel[v];
            for (size_t k = 0; k < steps && !in_place; k += unit_steps(format)) {
                spread_unit(format, s, output_of(s, j, v), step + k, min_size(unit_steps(format), steps - k),
                            panel[v] + k);
                fetch(format, &ahead, in_spread);
            }
        }
        for (size_t x = 0; x < s->M; x += GROUP)
            multiply_rows(format, min_size(GROUP, s->M - x), s, weights, x, j, step, steps, &ahead, in_multiply);
    }
}

/* ---- Few rows: spread and multiply at once ---- */

/* `rows` rows of A, all of them, with VECS*LANES outputs from j on. more: outputs of the task follow. */
INLINE void few_outputs(WeightFormat format, int rows, const Stream *s, size_t j, int more) {
    const size_t all = all_steps(format, s->K), unit = unit_steps(format), bytes = stream_bytes(format, s->K);
    const size_t distance = AHEAD / streams(format), n_streams = streams(format);
    const char *at = weights_at(format, s, j, 0);
    Vec sum[FEW][VECS];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < VECS; v++) sum[i][v] = (Vec){0};
    for (size_t step = 0; step < all; step += unit) {
        const size_t n = min_size(unit, all - step), next = step / unit * unit_bytes(format) + distance;
        const size_t jump = next < bytes ? next : next + (n_streams - 1) * bytes; /* to the next outputs */
        for (size_t i = 0; i < n_streams && (next < bytes || more); i++)
            __builtin_prefetch(at + i * bytes + jump, 0, 2);
        for (int v = 0; v < VECS; v++) {
            Vec w[LANES];
            spread_unit(format, s, output_of(s, j, v), step, n, w);
            for (size_t k = 0; k < n; k++)
                for (int i = 0; i < rows; i++)
                    sum[i][v] = add_products(format, s->A + (size_t)i * s->lda + step + k, w[k], sum[i][v]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < VECS; v++)
            if (j + (size_t)v * LANES < s->N) put_sum(format, s, (size_t)i, j + (size_t)v * LANES, sum[i][v]);
}

INLINE void task_of(WeightFormat format, const Stream *s, size_t begin, size_t end) {
    for (size_t j = begin; j < end; j += VECS * LANES) {
        const int more = j + VECS * LANES < end;
        if (s->M == 1)
            few_outputs(format, 1, s, j, more);
        else if (s->M == 2)
            few_outputs(format, 2, s, j, more);
        else if (s->M == 3)
            few_outputs(format, 3, s, j, more);
        else if (s->M == FEW)
            few_outputs(format, FEW, s, j, more);
        else
            stream_outputs(format, s, j, end);
    }
}

static void stream_task(void *context, size_t task) {
    const Stream *s = (const Stream *)context;
    const size_t begin = task * s->outputs, end = min_size(s->N, begin + s->outputs);
    if (s->w->format == WEIGHTS_BF16)
        task_of(WEIGHTS_BF16, s, begin, end);
    else if (s->w->format == WEIGHTS_INT8)
        task_of(WEIGHTS_INT8, s, begin, end);
    else
        task_of(WEIGHTS_REAL, s, begin, end);
}

/* ---- Rows of A ---- */

typedef struct {
    const real *A;
    Step *to;
    size_t lda, K, steps;
    WeightFormat format;
} Round;

#if PAIRS
/* The place of number k in a rounded row, whose int8 partners come in the order of spread_int8: 0 2 1 3. */
INLINE size_t place_of(WeightFormat format, size_t k) {
    return format == WEIGHTS_INT8 ? k / 4 * 4 + (k % 4 * 2) % 3 + (k % 4 == 3 ? 3 : 0) : k;
}
#endif

/* A row rounded to bf16, zeros behind. */
static void round_row(void *context, size_t r) {
    const Round *a = (const Round *)context;
    const real *from = a->A + r * a->lda;
    Step *to = a->to + r * a->steps;
#if PAIRS
    uint16_t *half = (uint16_t *)(void *)to;
    size_t k = 0;
    for (; k + 32 <= a->K; k += 32) {
        const __m512i x = (__m512i)_mm512_cvtne2ps_pbh(load(from + k + 16), load(from + k));
        const __m512i swapped = _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(x, 0xd8), 0xd8); /* 0 2 1 3 */
        _mm512_storeu_si512(half + k, a->format == WEIGHTS_INT8 ? swapped : x);
    }
    for (; k < a->steps * 2; k++) half[place_of(a->format, k)] = k < a->K ? bf16_from_float(from[k]) : 0;
#else
    for (size_t k = 0; k < a->steps; k++)
        to[k].number = k < a->K ? (real)bf16_to_float(bf16_from_float((float)from[k])) : 0;
#endif
}

/* ---- Blocks: by tiles where there are tiles, for any number of rows; bf16x3 everywhere ---- */

enum { WIDENED = 4096 }; /* k of int8 that are widened at a time: part of the promise on bits */

typedef struct {
    size_t M, N, K;
    const real *A;
    size_t lda;
    const Weights *w;
    int accumulate;
    real *C;
    size_t ldc;
    uint16_t *panels; /* of A */
    size_t outputs;   /* of a task */
} Blocks;

static int in_blocks(WeightFormat format) {
    return format == WEIGHTS_BF16X3 || (format != WEIGHTS_REAL && HAVE_TILES && tiles_here());
}

/* Numbers of 16 rows of A */
static size_t a_panel_numbers(const Blocks *s) {
    return ceil_div(s->K, STEP) * (s->w->format == WEIGHTS_BF16X3 ? 2 : 1) * TILE_NUMBERS;
}

/* to = `steps` tiles of bf16 from words of int8 */
static void widen_int8(uint16_t *to, const int8_t *from, size_t steps) {
    const size_t words = steps * STEP / 4;
#if PAIRS
    static const uint8_t first[16] = {0, 64, 1, 65, 4, 68, 5, 69, 8, 72, 9, 73, 12, 76, 13, 77};
    const long long lane = 0x1010101010101010;
    const Int8Tables t = int8_tables();
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    __m512i even = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)first));
    even = _mm512_add_epi8(even, _mm512_set_epi64(lane * 3, lane * 3, lane * 2, lane * 2, lane, lane, 0, 0));
    const __m512i odd = _mm512_add_epi8(even, _mm512_set1_epi8(2));
    for (size_t i = 0; i < words; i++) {
        const __m512i byte = _mm512_loadu_si512(from + i * 64), size = _mm512_abs_epi8(byte);
        const __m512i low = _mm512_permutex2var_epi8(t.low[0], size, t.low[1]);
        const __m512i high = _mm512_permutex2var_epi8(t.high[0], size, t.high[1]);
        const __m512i with_sign = _mm512_ternarylogic_epi32(high, byte, sign, 0xf8); /* high | (byte & sign) */
        _mm512_store_si512(to + i * 64, _mm512_permutex2var_epi8(low, even, with_sign));
        _mm512_store_si512(to + i * 64 + 32, _mm512_permutex2var_epi8(low, odd, with_sign));
    }
#else
    for (size_t i = 0; i < words; i++)
        for (size_t j = 0; j < TILE; j++)
            for (size_t k = 0; k < 4; k++)
                to[i * 64 + k / 2 * STEP + j * 2 + k % 2] = bf16_from_float((float)from[i * 64 + j * 4 + k]);
#endif
}

/* C (rows, cols) = or += sum times the factors of the columns */
static void put_scaled(const Blocks *s, size_t i, size_t j, const real *sum, size_t rows, size_t cols, int add) {
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) {
            real *to = s->C + (i + r) * s->ldc + j + c;
            const real x = sum[r * BLOCK + c] * (real)s->w->scale[j + c];
            *to = add ? *to + x : x;
        }
}

/* All rows with outputs j ..., BLOCK at most, in k from k0 on. stride: numbers from a panel of b to the next. */
INLINE void rows_of_block(WeightFormat format, const Blocks *s, size_t j, size_t cols, size_t k0, size_t K,
                          const uint16_t *b, size_t stride) {
    const int x3 = format == WEIGHTS_BF16X3, add = s->accumulate || k0 > 0;
    const size_t tile = (x3 ? 2 : 1) * TILE_NUMBERS, a_panel = a_panel_numbers(s);
    const uint16_t *a = s->panels + k0 / STEP * tile;
    real sum[BLOCK * BLOCK] __attribute__((aligned(LINE_BYTES)));
    for (size_t i = 0; i < s->M; i += BLOCK, a += 2 * a_panel) {
        const size_t rows = min_size(BLOCK, s->M - i), ahead = i == 0 && format != WEIGHTS_INT8 ? AHEAD_NUMBERS : 0;
        const BlockSum p = {ceil_div(K, STEP), {a, a + a_panel}, NULL, tile, STEP,
                            TILE_NUMBERS,      {b, b + stride},  ahead};
        if (format == WEIGHTS_INT8) {
            block_sum(0, &p, rows, cols, 0, sum, BLOCK);
            put_scaled(s, i, j, sum, rows, cols, add);
        } else
            block_sum(x3, &p, rows, cols, add, s->C + i * s->ldc + j, s->ldc);
    }
}

/* int8: two panels at a time are widened for all rows. */
static void int8_block(const Blocks *s, size_t j, size_t cols) {
    const size_t stride = panel_bytes(WEIGHTS_INT8, s->K);
    uint16_t *wide = thread_room();
    for (size_t k = 0; k < s->K; k += WIDENED) {
        const size_t K = min_size(WIDENED, s->K - k), steps = ceil_div(K, STEP);
        for (size_t i = 0; i * TILE < cols; i++)
            widen_int8(wide + i * steps * TILE_NUMBERS,
                       (const int8_t *)s->w->data + (j / TILE + i) * stride + k * PANEL_ROWS, steps);
        tiles_see_stores();
        rows_of_block(WEIGHTS_INT8, s, j, cols, k, K, wide, steps * TILE_NUMBERS);
    }
}

/* All rows with outputs begin .. end-1 */
static void blocks_of_rows(const Blocks *s, size_t begin, size_t end) {
    const size_t stride = panel_bytes(s->w->format, s->K) / sizeof(uint16_t);
    for (size_t j = begin; j < end; j += BLOCK) {
        const size_t cols = min_size(BLOCK, end - j);
        const uint16_t *b = (const uint16_t *)s->w->data + j / TILE * stride;
        if (s->w->format == WEIGHTS_INT8)
            int8_block(s, j, cols);
        else if (s->w->format == WEIGHTS_BF16)
            rows_of_block(WEIGHTS_BF16, s, j, cols, 0, s->K, b, stride);
        else
            rows_of_block(WEIGHTS_BF16X3, s, j, cols, 0, s->K, b, stride);
    }
}

/* Rows of A at a time: with tiles as many as take half of the L2 cache. Vectors are slow enough to have A from behind it. */
static size_t rows_at_a_time(const Blocks *s) {
    const size_t bytes = ceil_div(s->M, TILE) * a_panel_numbers(s) * sizeof *s->panels;
    if (!HAVE_TILES || !tiles_here()) return s->M;
    return round_up(ceil_div(s->M, ceil_div(bytes, l2_bytes() / 2)), BLOCK);
}

static void blocks_task(void *context, size_t task) {
    const Blocks *s = (const Blocks *)context;
    const size_t begin = task * s->outputs, end = min_size(s->N, begin + s->outputs), most = rows_at_a_time(s);
    tiles_begin(s->M);
    for (size_t i = 0; i < s->M; i += most) {
        Blocks rows = *s;
        rows.M = min_size(most, s->M - i);
        rows.panels += i / TILE * a_panel_numbers(s);
        rows.C += i * s->ldc;
        blocks_of_rows(&rows, begin, end);
    }
    tiles_end();
}

static void pack_rows(void *context, size_t t) {
    const Blocks *s = (const Blocks *)context;
    const View rows = {s->A + t * TILE * s->lda, s->lda, 1};
    pack_panel(s->w->format == WEIGHTS_BF16X3, 0, s->panels + t * a_panel_numbers(s), rows,
               min_size(TILE, s->M - t * TILE), s->K);
}

static void stream_blocks(Blocks *s, int threads) {
    parallel_for(s->M * s->K < 65536 ? 1 : threads, ceil_div(s->M, TILE), pack_rows, s);
    s->outputs = round_up(ceil_div(s->N, (size_t)threads * TASKS_PER_THREAD), BLOCK);
    parallel_work(threads, ceil_div(s->N, s->outputs), blocks_task, s);
}

/* ---- The product ---- */

size_t gemm_stream_work(size_t M, size_t K) {
    return round_up(min_size(M, ROWS), TILE) * round_up(K, STEP) * sizeof(Step);
}

void gemm_stream(size_t M, size_t N, size_t K, const real *A, size_t lda, const Weights *w, int accumulate, real *C,
                 size_t ldc, void *work) {
    const int packed = w->format != WEIGHTS_REAL;
    for (size_t x = 0; x < M && K == 0 && !accumulate; x++) memset(C + x * ldc, 0, N * sizeof *C);
    if (N == 0 || K == 0) return;
    for (size_t x = 0; x < M; x += ROWS) {
        const size_t rows = min_size(ROWS, M - x);
        const Step *a = (const Step *)(const void *)(A + x * lda);
        Stream s = {rows, N, K, a, lda, w, accumulate, C + x * ldc, ldc, 0};
        const int threads = (double)(rows + 8) * (double)N * (double)K < SMALL_PRODUCT ? 1 : threads_free();
        if (in_blocks(w->format)) {
            Blocks b = {rows, N, K, A + x * lda, lda, w, accumulate, C + x * ldc, ldc, (uint16_t *)work, 0};
            stream_blocks(&b, threads);
            continue;
        }
        if (packed) {
            Round round = {A + x * lda, (Step *)work, lda, K, all_steps(w->format, K), w->format};
            parallel_for(rows * K < 65536 ? 1 : threads, rows, round_row, &round);
            s.A = (const Step *)work, s.lda = round.steps;
        }
        s.outputs = round_up(ceil_div(N, (size_t)threads * TASKS_PER_THREAD), VECS * LANES);
        parallel_work(threads, ceil_div(N, s.outputs), stream_task, &s);
    }
}

/* ---- Attention while decoding: the kept keys and values stream by too, as rows of real or of bf16 ---- */

/* Lane i of the result is the sum of all lanes of v[i], added as a tree, the same for every i. Each round adds the
 * halves of two vectors into one. */
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

/* LANES numbers from number `at` on */
INLINE Vec load_kept(int bf16, const void *x, size_t at) {
    return bf16 ? load_bf16((const uint16_t *)x + at) : load((const real *)x + at);
}

INLINE void dots(int bf16, real *p, const real *q, const void *k, size_t n, const size_t width) {
    for (size_t j = 0; j < n; j += LANES) {
        const size_t last = min_size(LANES, n - j) - 1;
        Vec sum[LANES];
        for (size_t i = 0; i < LANES; i++) {
            const size_t key = (j + min_size(i, last)) * width;
            sum[i] = (Vec){0};
            for (size_t c = 0; c < width; c += LANES)
                sum[i] = multiply_add_vec(load(q + c), load_kept(bf16, k, key + c), sum[i]);
        }
        const Vec total = sum_lanes(sum);
        if (last == LANES - 1)
            store(p + j, total);
        else
            for (size_t i = 0; i <= last; i++) p[j + i] = total[i];
    }
}

void kept_dots(int bf16, real *p, const real *q, const void *k, size_t n, size_t width) {
    if (bf16 && width == 64)
        dots(1, p, q, k, n, 64);
    else if (bf16)
        dots(1, p, q, k, n, width);
    else if (width == 64)
        dots(0, p, q, k, n, 64);
    else
        dots(0, p, q, k, n, width);
}

/* y (vecs*LANES) = sum_j p[j] v[j,c..] */
INLINE void weighted(int bf16, real *y, const real *p, const void *v, size_t c, size_t n, size_t width, int vecs) {
    Vec sum[64 / LANES];
    for (int i = 0; i < vecs; i++) sum[i] = (Vec){0};
    for (size_t j = 0; j < n; j++)
        for (int i = 0; i < vecs; i++)
            sum[i] = multiply_add(p[j], load_kept(bf16, v, j * width + c + (size_t)i * LANES), sum[i]);
    for (int i = 0; i < vecs; i++) store(y + c + i * LANES, sum[i]);
}

INLINE void all_weighted(int bf16, real *y, const real *p, const void *v, size_t n, size_t width) {
    size_t c = 0;
    for (; c + 64 <= width; c += 64) weighted(bf16, y, p, v, c, n, width, 64 / LANES);
    for (; c < width; c += 16) weighted(bf16, y, p, v, c, n, width, 16 / LANES);
}

void kept_weighted(int bf16, real *y, const real *p, const void *v, size_t n, size_t width) {
    if (bf16)
        all_weighted(1, y, p, v, n, width);
    else
        all_weighted(0, y, p, v, n, width);
}
