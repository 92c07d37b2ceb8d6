/* bench.c - how fast, as fractions of what this machine can do.
 *
 *     test/bench            every section
 *     test/bench gemm       only the sections named
 *     test/bench -t 1 gemm  on one thread
 *     test/bench -o FILE    the rows as tab-separated values too
 *
 * Two ceilings are measured first: multiply-adds per second (independent chains in registers on every thread) and
 * bytes read per second (a block far larger than the caches). Then each row of each section runs for a while and
 * prints its best time, because anything else on the machine only ever makes it slower:
 *
 *     time   GFLOP/s   % of the multiply-add ceiling   GB/s it must move at least   % of the read ceiling
 *
 * Rows in bf16 have the ceiling of the unit that multiplies bf16, tiles or vectors, and rows in bf16x3 a third of
 * it, for each of their products is three; where there is no such unit, that of multiply-adds.
 *
 * A row near 100 % of either ceiling is done; data that fit in the caches can pass 100 % of the second.
 *
 * A convolution counts the operations of the direct way, 2*9*C*M for each 3x3 result, as everybody does. Winograd's
 * algorithm needs fewer, so its rows pass 100 %; the number in brackets behind a convolution's name is what it really
 * multiplies, as a fraction: times that, the per cent are what the multiply-add units do.
 *
 * A new section: a function that fills Rows and calls row() for each, and a line in the table `sections`. */
#include "test/first_stage.h"
#include "kernels/kernels.h"
#include "sampling/sampling.h"
#include "training/training.h"
#include "test/inside.h"
#include "test/peaks.h"
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Ends the program when a component fails: a benchmark has nobody to report to. */
static void must(Err e) {
    if (e == OK) return;
    fprintf(stderr, "bench: %s\n", err_text());
    exit(1);
}

static void *reals(size_t n, const char *what) {
    real *p;
    must(mem_alloc(&p, n, sizeof(real), what));
    for (size_t i = 0; i < n; i++) p[i] = (real)((double)(i * 2654435761u % 1000) / 1000 - 0.5);
    return p;
}

/* ---- Measuring ---- */

typedef void Work(void *context);

/* Best time of one call, out of as many as fit into `budget` seconds (at least 5). Calls shorter than 20 us are timed
 * in groups. */
static double best_time(Work *work, void *context, double budget) {
    work(context); /* caches, pages and threads are warm after this */
    double begin = now();
    work(context);
    const double once = now() - begin;
    const int group = once < 20e-6 ? (int)(20e-6 / (once + 1e-9)) + 1 : 1;
    const double end = now() + budget;
    double best = 1e30;
    for (int n = 0; n < 5 || now() < end; n++) {
        begin = now();
        for (int i = 0; i < group; i++) work(context);
        const double t = (now() - begin) / group;
        if (t < best) best = t;
    }
    return best;
}

/* ---- Ceilings ---- */

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
typedef real Vec __attribute__((vector_size(VECTOR_BYTES)));
enum { LANES = VECTOR_BYTES / (int)sizeof(real), CHAINS = 12, STEPS = 10000 };

static struct {
    double flops, bf16, int8, bytes; /* per second; bf16, int8: 0: there is no such unit */
    const char *unit;                /* that bf16 is of */
} ceiling;

/* Multiply-adds per second of this thread: CHAINS independent chains, more than the units have stages and few enough
 * for 16 registers. The best of many short runs; their numbers have many digits, because units that work hard may be
 * clocked lower. */
static double multiply_add_rate(real *sink, double budget) {
    Vec chain[CHAINS], factor, term, all = {0};
    for (int l = 0; l < LANES; l++) {
        factor[l] = (real)(0.99931 - 0.00123 * l);
        term[l] = (real)(0.71312 - 0.12301 * l);
    }
    for (int c = 0; c < CHAINS; c++) chain[c] = term * (real)(c + 0.1);
    double best = 0;
    for (const double end = now() + budget; now() < end;) {
        const double begin = now();
        for (int s = 0; s < STEPS; s++)
            for (int c = 0; c < CHAINS; c++) chain[c] = chain[c] * factor + term;
        const double rate = (double)STEPS * CHAINS * LANES / (now() - begin);
        if (rate > best) best = rate;
    }
    for (int c = 0; c < CHAINS; c++) all += chain[c];
    for (int l = 0; l < LANES; l++) *sink += all[l]; /* so that the work is not removed */
    return best;
}

/* All threads at once, so that they share what clock and power there is; the sum of what each can do. Each task begins when
 * all have: else one thread could measure twice, alone. */
enum { THREADS_MAX = 1024 };
static const double LONGEST_WAIT = 5; /* seconds */
typedef struct {
    double rate[THREADS_MAX];
    real kept[THREADS_MAX];
    atomic_int begun;
} Rates;

static void wait_for_all(Rates *r) {
    atomic_fetch_add(&r->begun, 1);
    for (const double end = now() + LONGEST_WAIT; atomic_load(&r->begun) < threads_get();)
        if (now() > end) {
            fprintf(stderr, "bench: the system gives %d of %d threads: no ceiling of all\n", atomic_load(&r->begun),
                    threads_get());
            exit(1);
        }
}

static void flops_task(void *context, size_t i) {
    Rates *r = (Rates *)context;
    wait_for_all(r);
    r->rate[i] = 2 * multiply_add_rate(&r->kept[i], 0.5);
}

static void bf16_task(void *context, size_t i) {
    Rates *r = (Rates *)context;
    const char *unit;
    wait_for_all(r);
    r->rate[i] = bf16_peak(0.5, &r->kept[i], &unit);
    if (i == 0) ceiling.unit = unit;
}

static void int8_task(void *context, size_t i) {
    Rates *r = (Rates *)context;
    wait_for_all(r);
    r->rate[i] = int8_peak(0.5);
}

static double all_threads(Task *task) {
    static Rates r;
    double sum = 0;
    memset(&r, 0, sizeof r);
    parallel_for(threads_get(), (size_t)threads_get(), task, &r);
    for (int i = 0; i < threads_get(); i++) {
        if (r.kept[i] != r.kept[i]) printf("(the chains overflowed)\n");
        sum += r.rate[i];
    }
    return sum;
}

typedef struct {
    const char *data;
    size_t bytes;
    real sink;
} Read;
enum { READ_UNIT = 64 * 1024 };

static void read_unit(void *context, size_t unit) {
    Read *r = (Read *)context;
    const Vec *v = (const Vec *)(const void *)(r->data + unit * READ_UNIT);
    Vec sum[4] = {{0}, {0}, {0}, {0}};
    for (size_t i = 0; i < READ_UNIT / VECTOR_BYTES; i += 4)
        for (size_t k = 0; k < 4; k++) sum[k] += v[i + k];
    const real total = (sum[0] + sum[1] + sum[2] + sum[3])[0];
    if (total == (real)0.123) r->sink = total; /* practically never: so that the work is not removed */
}

/* Adds up a block, shared among all threads. */
static void read_block(void *context) {
    Read *r = (Read *)context;
    parallel_for(threads_get(), r->bytes / READ_UNIT, read_unit, r);
}

static double read_rate(size_t bytes) {
    Read r = {NULL, bytes, 0};
    r.data = (const char *)reals(bytes / sizeof(real), "the block to read");
    const double rate = (double)bytes / best_time(read_block, &r, 0.5);
    free((void *)r.data);
    return rate;
}

static void measure_ceilings(void) {
    ceiling.flops = all_threads(flops_task), ceiling.bf16 = all_threads(bf16_task);
    ceiling.int8 = all_threads(int8_task), ceiling.bytes = read_rate((size_t)256 << 20);
    printf("ceilings with %d threads: %.0f GFLOP/s multiply-add (%d bytes wide), %.1f GB/s read from memory "
           "(%.1f GB/s of 4 MB in the caches)\n",
           threads_get(), ceiling.flops * 1e-9, VECTOR_BYTES, ceiling.bytes * 1e-9, read_rate((size_t)4 << 20) * 1e-9);
    if (ceiling.bf16 > 0) printf("bf16 by %s: %.0f GFLOP/s", ceiling.unit, ceiling.bf16 * 1e-9);
    if (ceiling.int8 > 0) printf(", int8: %.0f GOP/s", ceiling.int8 * 1e-9);
    printf("%s; processor: %s; products are in %s where nothing else is said\n",
           ceiling.bf16 > 0 ? "" : "no unit for bf16", vector_instructions(), precision_name(precision_usual()));
}

/* ---- Rows ---- */

typedef struct {
    const char *name;
    double flops, bytes; /* of one call: multiplications and additions; what it must at least read and write */
    Precision precision; /* of its products */
} Row;

static double peak_of(Precision p) {
    if (p == PRECISION_F32 || ceiling.bf16 == 0) return ceiling.flops;
    return p == PRECISION_BF16 ? ceiling.bf16 : ceiling.bf16 / 3;
}

/* "what", and of another precision than f32 ", bf16x3" */
static Name named(const char *what, Precision p) {
    return p == PRECISION_F32 ? name_of("%s", what) : name_of("%s, %s", what, precision_name(p));
}

static void section(const char *title) {
    printf("\n%-58s %11s %9s %5s %7s %5s\n", title, "time", "GFLOP/s", "%", "GB/s", "%");
}

static FILE *tsv; /* every row once more, for programs; NULL: not wanted */
static const char *section_name;

static void print_row(Row r, double t) {
    char time_text[32];
    snprintf(time_text, sizeof time_text, t < 1e-3 ? "%.2f us" : "%.2f ms", t < 1e-3 ? t * 1e6 : t * 1e3);
    printf("%-58s %11s %9.1f %5.1f %7.1f %5.1f\n", r.name, time_text, r.flops / t * 1e-9,
           100 * r.flops / t / peak_of(r.precision), r.bytes / t * 1e-9, 100 * r.bytes / t / ceiling.bytes);
    fflush(stdout);
    if (tsv)
        fprintf(tsv, "%s\t%s\t%.6g\t%.4g\t%.4g\t%.4g\t%.4g\n", section_name, r.name, t, r.flops / t * 1e-9,
                r.flops / t / peak_of(r.precision), r.bytes / t * 1e-9, r.bytes / t / ceiling.bytes);
}

static void row(Row r, Work *work, void *context) {
    print_row(r, best_time(work, context, 0.3));
}

/* ---- gemm ---- */

typedef struct {
    const char *what;
    int trans_a, trans_b;
    size_t M, N, K;
} Shape;

typedef struct {
    Shape s;
    real *A, *B, *C;
    Precision precision;
} Product;

static void run_product(void *context) {
    const Product *p = (const Product *)context;
    gemm(p->precision, p->s.trans_a, p->s.trans_b, p->s.M, p->s.N, p->s.K, p->A, p->s.trans_a ? p->s.M : p->s.K, p->B,
         p->s.trans_b ? p->s.K : p->s.N, 0, p->C, p->s.N);
}

static const Shape products[] = {
    {"square", 0, 0, 1024, 1024, 1024},
    {"square, B transposed", 0, 1, 1024, 1024, 1024},
    {"square, A transposed", 1, 0, 1024, 1024, 1024},
    {"square, both transposed", 1, 1, 1024, 1024, 1024},
    {"square", 0, 0, 2048, 2048, 2048},
    {"awkward", 0, 0, 1021, 1019, 1031},
    {"linear, forward", 0, 1, 64, 256, 256},
    {"linear, forward", 0, 1, 512, 128, 128},
    {"linear, forward", 0, 1, 4096, 256, 256},
    {"linear, forward", 0, 1, 4096, 768, 768},
    {"linear, forward", 0, 1, 4096, 1024, 256},
    {"linear, gradient of the input", 0, 0, 4096, 256, 1024},
    {"linear, gradient of the weight", 1, 0, 256, 256, 4096},
    {"linear, gradient of the weight", 1, 0, 768, 768, 4096},
    {"model, forward, batch 1", 0, 1, 257, 1024, 752},
    {"model, forward, batch 1", 0, 1, 256, 3008, 752},
    {"model, forward, batch 1", 0, 1, 256, 752, 3008},
    {"model, gradient of the input, batch 1", 0, 0, 256, 752, 3008},
    {"model, gradient of the input, batch 1", 0, 0, 256, 3008, 752},
    {"model, gradient of the weight, batch 1", 1, 0, 752, 1024, 257},
    {"model, gradient of the weight, batch 1", 1, 0, 752, 3008, 256},
    {"model, gradient of the weight, batch 1", 1, 0, 3008, 752, 256},
    {"model, forward, batch 4", 0, 1, 1028, 1024, 752},
    {"model, forward, batch 4", 0, 1, 1024, 3008, 752},
    {"model, forward, batch 4", 0, 1, 1024, 752, 3008},
    {"model, gradient of the input, batch 4", 0, 0, 1024, 752, 3008},
    {"model, gradient of the input, batch 4", 0, 0, 1024, 3008, 752},
    {"model, gradient of the weight, batch 4", 1, 0, 752, 1024, 1028},
    {"model, gradient of the weight, batch 4", 1, 0, 752, 3008, 1024},
    {"model, gradient of the weight, batch 4", 1, 0, 3008, 752, 1024},
    {"convolution 3x3, 32 channels", 0, 0, 32, 4096, 288},
    {"convolution 3x3, 64 channels", 0, 0, 64, 4096, 576},
    {"convolution 3x3, 128 channels", 0, 0, 128, 1024, 1152},
    {"convolution, gradient of the weight", 0, 1, 64, 576, 4096},
    {"convolution, gradient of the patches", 1, 0, 576, 4096, 64},
    {"attention, a block of a head: Q K^T", 0, 1, 129, 257, 64},
    {"attention, a block of a head: P V", 0, 0, 129, 64, 257},
    {"attention, a block of a head: P^T dO", 1, 0, 257, 64, 129},
    {"tiny", 0, 0, 8, 8, 8},
    {"decode 1 row", 0, 1, 1, 256, 256},
    {"decode 1 row", 0, 1, 1, 768, 768},
    {"decode 16 rows", 0, 1, 16, 768, 768},
    {"decode 1 row, weights from memory", 0, 1, 1, 8192, 8192},
    {"decode 16 rows, weights from memory", 0, 1, 16, 8192, 8192},
};

static void bench_products(Precision precision) {
    for (size_t i = 0; i < COUNT(products); i++) {
        const Shape s = products[i];
        Product p = {s, reals(s.M * s.K, "A"), reals(s.K * s.N, "B"), reals(s.M * s.N, "C"), precision};
        const double numbers = (double)s.M * (double)s.K + (double)s.K * (double)s.N + (double)s.M * (double)s.N;
        const Name name =
            name_of("%-38s %19s", named(s.what, precision).s, name_of("%zu x %zu x %zu", s.M, s.K, s.N).s);
        row((Row){name.s, 2.0 * (double)s.M * (double)s.N * (double)s.K, numbers * sizeof(real), precision},
            run_product, &p);
        free(p.A);
        free(p.B);
        free(p.C);
    }
}

static void bench_gemm(void) {
    section("gemm: op(A) (M,K) * op(B) (K,N)");
    for (int p = PRECISION_F32; p <= PRECISION_BF16; p++) bench_products((Precision)p);
}

/* ---- Few rows against weights from memory, as decoding does ---- */

typedef struct {
    size_t M, N, K, matrices;
    Weights w;
    real *A, *C;
    void *work;
} StreamJob;

static void run_stream(void *context) {
    const StreamJob *s = (const StreamJob *)context;
    const size_t bytes = weights_bytes(s->w.format, s->N, s->K);
    for (size_t i = 0; i < s->matrices; i++) {
        const Weights w = {s->w.format, (const char *)s->w.data + i * bytes, s->w.scale};
        gemm_stream(s->M, s->N, s->K, s->A, s->K, &w, 0, s->C, s->N, s->work);
    }
}

static const char *const format_names[] = {"f32", "bf16", "int8", "bf16x3"}; /* [WeightFormat] */

static void bench_stream(void) {
    static const size_t shapes[][2] = {{1024, 752}, {752, 1024}, {3008, 752}, {752, 3008}, {3200, 800}, {548, 752}};
    static const size_t rows[] = {1, 2, 4, 16};
    const size_t total = (size_t)128 << 20;
    section("gemm_stream: (M,K) * (N,K)^T, 128 MiB of matrices");
    for (int format = WEIGHTS_REAL; format <= WEIGHTS_BF16X3; format++)
        for (size_t m = 0; m < COUNT(rows); m++)
            for (size_t k = 0; k < COUNT(shapes); k++) {
                StreamJob s = {rows[m], shapes[k][0], shapes[k][1], 0, {(WeightFormat)format, NULL, NULL},
                               NULL,    NULL,         NULL};
                const size_t bytes = weights_bytes(s.w.format, s.N, s.K);
                s.matrices = total / bytes;
                s.w.data = reals(total / sizeof(real), "weights"), s.w.scale = (const float *)reals(s.N, "factors");
                must(mem_alloc(&s.work, gemm_stream_work(s.M, s.K), 1, "work space"));
                s.A = (real *)reals(s.M * s.K, "A"), s.C = (real *)reals(s.M * s.N, "C");
                char name[96];
                snprintf(name, sizeof name, "%s, %zu x %zu x %zu", format_names[format], s.M, s.K, s.N);
                row((Row){name, 2.0 * (double)(s.M * s.N * s.K * s.matrices), (double)(s.matrices * bytes)}, run_stream,
                    &s);
                free((void *)s.w.data);
                free((void *)s.w.scale);
                free(s.A);
                free(s.C);
                free(s.work);
            }
}

/* ---- A transition of the full-size FFHQ model, with made-up weights ---- */

enum { TOKENS = 256, EARLY = 40 };

static Transformer *full_size(int scale) {
    Config recipe = {0};
    NetConfig c;
    Transformer *m;
    must(recipe_read(&recipe, "models/ffhq.txt", scale));
    must(net_config_read(&c, &recipe, "model.params."));
    config_free(&recipe);
    must(transformer_create(&m, &c));
    Params *p = transformer_params(m);
    must(params_plan(p, PLAN_VALUE));
    for (size_t i = 0; i < p->n; i++) { /* params_init would take a while; only the size of the numbers matters */
        const Param *r = &p->row[i];
        for (size_t k = 0; k < r->size; k++)
            r->value[k] = r->init == INIT_ONE ? 1 : (real)((double)(k * 2654435761u % 1000) / 1000 - 0.5) * (real)0.05;
    }
    const float alpha[MAX_SCALES + 1] = {1, 0.5f, 0.5f, 0.5f, 0.5f};
    transformer_set_alphas(m, alpha);
    return m;
}

static void pack(Transformer *m, WeightFormat format) {
    Params *p = transformer_params(m);
    free(p->packed);
    p->packed = NULL;
    p->format = WEIGHTS_REAL, p->precision = weight_precision(format);
    for (size_t i = 0; i < p->n; i++) p->row[i].packed.data = NULL;
    if (format != WEIGHTS_REAL) must(params_pack(p, format));
}

/* Numbers in the matrices that a part of a network multiplies with: names that hold `part`, but neither of `not`. */
static double matrix_numbers(Transformer *m, const char *part, const char *not_this, const char *not_that) {
    const Params *p = transformer_params(m);
    double n = 0;
    for (size_t i = 0; i < p->n; i++) {
        const char *name = p->row[i].name;
        if (p->row[i].matrix && strstr(name, part) && !strstr(name, not_this) && !strstr(name, not_that))
            n += (double)p->row[i].size;
    }
    return n;
}

/* What a token reads of weights: every matrix of the decoder, but in cross-attention (each third layer's second) not
 * those of keys and values, which are the context's business. */
static double token_numbers(Transformer *m) {
    const NetConfig *c = transformer_config(m);
    const double inner = 64.0 * (double)c->dec_heads, depth = (double)c->dec_depth;
    const double all = matrix_numbers(m, c->kind == NET_X ? "decoder." : "", "encoder.", "token_emb");
    return all - (c->kind == NET_X ? 2 * inner * (double)c->dim * depth : 0);
}

/* Bytes of keys and values that position i of B samples reads: those so far, and those of the context. With packed
 * weights they are bf16, heads rounded up to 16 numbers. */
static double kept_bytes(const NetConfig *c, WeightFormat format, size_t B, size_t i) {
    const size_t D = c->kind == NET_X ? 64 : c->dim / c->dec_heads,
                 positions = i + 1 + (c->kind == NET_X ? TOKENS + 1 : 0);
    const size_t head =
        weight_precision(format) == PRECISION_BF16 ? round_up(D, 16) * sizeof(uint16_t) : D * sizeof(real);
    return 2.0 * (double)(B * positions * c->dec_depth * c->dec_heads * head);
}

typedef struct {
    Transformer *m;
    size_t B, next;
    int32_t *x_t, *t;
    const char *what;
} Decoding;

static void begin_decoding(void *context) {
    Decoding *d = (Decoding *)context;
    const real *logits;
    must(transformer_decode_begin(d->m, d->x_t, d->t, NULL, d->B, TOKENS));
    must(transformer_decode_step(d->m, NULL, 0, &logits)); /* a GPT did it with its prompt */
    d->next = 1;
}

/* All positions of an image, in order: their mean, and the best of the first, which have few keys. */
static void bench_steps(Decoding *d, WeightFormat format) {
    const NetConfig *c = transformer_config(d->m);
    const double weights = token_numbers(d->m);
    const double matrices = weights * (double)weight_bytes(format), flops = 2 * weights * (double)d->B;
    double all = 0, all_bytes = 0, early = 1e30, early_bytes = 0;
    const real *logits;
    char name[96];
    const size_t first = d->next;
    for (; d->next < TOKENS; d->next++) {
        const double begin = now();
        must(transformer_decode_step(d->m, d->x_t, d->next, &logits));
        const double t = now() - begin, bytes = matrices + kept_bytes(c, format, d->B, d->next);
        all += t, all_bytes += bytes;
        if (d->next < EARLY && t < early) early = t, early_bytes = bytes;
    }
    const double n = (double)(TOKENS - first);
    snprintf(name, sizeof name, "%s, a token, batch %zu, %s", d->what, d->B, format_names[format]);
    print_row((Row){name, flops, all_bytes / n}, all / n);
    snprintf(name, sizeof name, "%s, an early token, batch %zu, %s", d->what, d->B, format_names[format]);
    print_row((Row){name, flops, early_bytes}, early);
}

static void bench_transition(int scale, const char *what) {
    static const size_t batches[] = {1, 16};
    Decoding d = {full_size(scale), 0, 0, NULL, NULL, what};
    const int encodes = transformer_config(d.m)->kind == NET_X;
    must(mem_alloc(&d.x_t, 16 * TOKENS, sizeof *d.x_t, "tokens"));
    must(mem_alloc(&d.t, 16, sizeof *d.t, "scales"));
    for (size_t i = 0; i < 16 * TOKENS; i++) d.x_t[i] = (int32_t)(i * 37 % 548);
    for (size_t b = 0; b < 16; b++) d.t[b] = scale;
    for (size_t k = 0; k < COUNT(batches); k++) {
        d.B = batches[k];
        for (int format = WEIGHTS_REAL; format <= WEIGHTS_BF16X3; format++) {
            pack(d.m, (WeightFormat)format);
            must(transformer_plan(d.m, d.B, TOKENS, 0));
            begin_decoding(&d);
            if (encodes && d.B == 1) {
                const double numbers = matrix_numbers(d.m, "encoder.", "to_logits", "token_emb");
                char name[96];
                snprintf(name, sizeof name, "%s, encoder pass, batch 1, %s", what, format_names[format]);
                row((Row){name, 2 * numbers * (TOKENS + 1), numbers * (double)weight_bytes((WeightFormat)format),
                          weight_precision((WeightFormat)format)},
                    begin_decoding, &d);
            }
            bench_steps(&d, (WeightFormat)format);
        }
    }
    free(d.x_t);
    free(d.t);
    transformer_free(d.m);
}

static void bench_decode(void) {
    section("FFHQ at full size: 256 tokens, 548 codes");
    bench_transition(1, "encoder-decoder");
    bench_transition(4, "last scale (GPT)");
}

/* ---- A training step of the full-size FFHQ model: forward, losses, backward, AdamW ---- */

typedef struct {
    Transformer *m;
    size_t B, K;
    int32_t *x, *x_t, *t;
    real *posterior, *dlogits;
    const real *logits;
    uint64_t step;
} Training;

static void run_forward(void *context) {
    Training *a = (Training *)context;
    must(transformer_forward(a->m, a->x, a->x_t, a->t, NULL, a->B, TOKENS, &a->logits));
}

static void run_backward(void *context) {
    Training *a = (Training *)context;
    Loss loss;
    must(denoising_loss(&loss, a->logits, a->x, a->posterior, a->B * TOKENS, a->K, 0.5, 1, a->dlogits));
    must(transformer_backward(a->m, a->dlogits));
}

static void run_optimizer(void *context) {
    static const AdamW adam = {1e-5, 0.9, 0.95, 1e-8, 1};
    Training *a = (Training *)context;
    Params *p = transformer_params(a->m);
    adamw_step(p, &adam, ++a->step);
    ema_update(p, 0.9999, a->step);
    params_zero_grad(p);
}

/* Multiplications and additions of a forward pass: every matrix with its rows, and every pair of positions that see
 * each other, once with the keys and once with the values. */
static double forward_flops(Transformer *m, size_t B) {
    const NetConfig *c = transformer_config(m);
    const double inner = c->kind == NET_X ? 64.0 * (double)c->dec_heads : (double)c->dim, depth = (double)c->dec_depth;
    const double all = matrix_numbers(m, c->kind == NET_X ? "decoder." : "", "encoder.", "token_emb");
    const double encoder = c->kind == NET_X ? matrix_numbers(m, "encoder.", "to_logits", "token_emb") : 0;
    const double N = TOKENS, T = N + 1;
    double pairs = depth * N * N / 2;
    if (c->kind == NET_X) pairs += depth * N * T + (double)c->enc_depth * T * T;
    return 2 * (double)B * (all * N + encoder * T + 2 * inner * pairs);
}

/* The parts one after another, three times; the best of each. A step is their sum. */
static void bench_step(int scale, const char *what, size_t B, Precision precision) {
    Training a = {full_size(scale), B, 0, NULL, NULL, NULL, NULL, NULL, NULL, 0};
    static Work *const parts[] = {run_forward, run_backward, run_optimizer};
    static const char *const names[] = {"forward", "loss and backward", "AdamW, EMA, gradients to zero", "whole step"};
    Params *p = transformer_params(a.m);
    double best[4] = {1e30, 1e30, 1e30, 0};
    must(params_plan(p, PLAN_GRAD | PLAN_ADAM | PLAN_EMA));
    p->precision = precision;
    must(transformer_plan(a.m, B, TOKENS, 1));
    a.K = transformer_config(a.m)->dec_num_tokens;
    must(mem_alloc(&a.x, B * TOKENS, sizeof *a.x, "tokens"));
    must(mem_alloc(&a.x_t, B * TOKENS, sizeof *a.x_t, "tokens"));
    must(mem_alloc(&a.t, B, sizeof *a.t, "scales"));
    must(mem_alloc(&a.dlogits, B * TOKENS * a.K, sizeof *a.dlogits, "gradient"));
    must(mem_alloc(&a.posterior, B * TOKENS * a.K, sizeof *a.posterior, "posterior"));
    for (size_t i = 0; i < B * TOKENS; i++) a.x[i] = (int32_t)(i * 31 % a.K), a.x_t[i] = (int32_t)(i * 37 % a.K);
    for (size_t b = 0; b < B; b++) a.t[b] = scale;
    for (size_t i = 0; i < B * TOKENS * a.K; i++) a.posterior[i] = 1 / (real)a.K;
    for (int round = 0; round < 3; round++)
        for (size_t k = 0; k < COUNT(parts); k++) {
            const double begin = now();
            parts[k](&a);
            const double t = now() - begin;
            if (t < best[k]) best[k] = t;
        }
    best[3] = best[0] + best[1] + best[2];
    const double forward = forward_flops(a.m, B), floats = (double)params_count(p) * sizeof(real);
    const Row rows[] = {{NULL, forward, floats, precision},
                        {NULL, 2 * forward, 2 * floats, precision},
                        {NULL, 0, 11 * floats, precision},
                        {NULL, 3 * forward, 14 * floats, precision}};
    for (size_t k = 0; k < COUNT(rows); k++) {
        const Name name = name_of("%s, batch %zu, %s", named(what, precision).s, B, names[k]);
        print_row((Row){name.s, rows[k].flops, rows[k].bytes, precision}, best[k]);
    }
    free(a.x), free(a.x_t), free(a.t), free(a.dlogits), free(a.posterior);
    transformer_free(a.m);
}

static void bench_train(void) {
    section("training at full size: 256 tokens, 548 codes");
    for (int p = PRECISION_F32; p <= PRECISION_BF16; p++) {
        bench_step(1, "encoder-decoder", 4, (Precision)p);
        bench_step(4, "last scale (GPT)", 4, (Precision)p);
    }
}

/* ---- Blocks: n positions of every row in one pass, as guessed tokens are checked ---- */

static double pass_time(Decoding *d, size_t n) {
    DecodePosition cell[16 * DECODE_BLOCK];
    const real *logits;
    double best = 1e30;
    for (size_t r = 0; r < d->B * n; r++) cell[r].b = r / n, cell[r].i = TOKENS / 2 + r % n, cell[r].prev = d->x_t[r];
    for (int k = 0; k < 8; k++) {
        const double begin = now();
        must(transformer_decode_block(d->m, cell, d->B * n, &logits));
        const double t = now() - begin;
        if (k > 0 && t < best) best = t;
    }
    return best;
}

/* The least a for which 1 + a + ... + a^(n-1) tokens, what n positions give when each guess is right with probability
 * a, are worth more than single passes in the same time; above 1: never. */
static double break_even(double passes, size_t n) {
    for (double a = 0; a < 1; a += 0.01) {
        double tokens = 0, p = 1;
        for (size_t i = 0; i < n; i++, p *= a) tokens += p;
        if (tokens >= passes) return a;
    }
    return passes <= (double)n ? 1 : 9.99;
}

static void bench_block(void) {
    static const size_t batches[] = {1, 4, 16}, lengths[] = {1, 2, 4, 8, 16, 32, 64};
    Decoding d = {full_size(1), 0, 0, NULL, NULL, NULL};
    section("Blocks of an FFHQ scale, times a single pass, pays from a");
    must(mem_alloc(&d.x_t, 16 * TOKENS, sizeof *d.x_t, "tokens"));
    must(mem_alloc(&d.t, 16, sizeof *d.t, "scales"));
    for (size_t i = 0; i < 16 * TOKENS; i++) d.x_t[i] = (int32_t)(i * 37 % 548);
    for (size_t b = 0; b < 16; b++) d.t[b] = 1;
    const double weights = token_numbers(d.m);
    for (int format = WEIGHTS_REAL; format <= WEIGHTS_BF16X3; format++)
        for (size_t k = 0; k < COUNT(batches); k++) {
            double single = 0;
            d.B = batches[k];
            pack(d.m, (WeightFormat)format);
            must(transformer_plan(d.m, d.B, TOKENS, 0));
            begin_decoding(&d);
            const real *logits;
            for (; d.next < TOKENS / 2; d.next++) must(transformer_decode_step(d.m, d.x_t, d.next, &logits));
            for (size_t l = 0; l < COUNT(lengths) && d.B * lengths[l] <= 256; l++) {
                const size_t n = lengths[l];
                const double t = pass_time(&d, n), rows = (double)(d.B * n);
                char name[96];
                if (n == 1) single = t;
                snprintf(name, sizeof name, "%s, batch %zu, block %zu: %.2f passes, a >= %.2f", format_names[format],
                         d.B, n, t / single, break_even(t / single, n));
                const double kept = kept_bytes(transformer_config(d.m), (WeightFormat)format, d.B * n, TOKENS / 2);
                print_row((Row){name, 2 * weights * rows, weights * (double)weight_bytes((WeightFormat)format) + kept},
                          t);
            }
        }
    free(d.x_t);
    free(d.t);
    transformer_free(d.m);
}

/* ---- A whole scale with its draws: one by one, and with x_t for a guess ---- */

/* The network says little more than its residual, so that a token is x_t's with probability alpha, as it is on average
 * where a trained network of a scale with this alpha is right. */
static void quieten(Transformer *m, float alpha) {
    Params *p = transformer_params(m);
    const float alphas[MAX_SCALES + 1] = {1, alpha, alpha, alpha, alpha};
    for (size_t i = 0; i < p->n; i++)
        for (size_t k = 0; strstr(p->row[i].name, "log_scalors") && k < p->row[i].size; k++) p->row[i].value[k] = -9;
    transformer_set_alphas(m, alphas);
}

static double scale_time(Transformer *m, size_t B, size_t block, DraftCounts *counts) {
    static int32_t tokens[16 * TOKENS];
    DraftCounts all[MAX_SCALES + 1];
    memset(all, 0, sizeof all);
    SampleOptions o = {.n = B, .candidates = 1, .seed = 1, .block = block, .counts = all};
    o.temperature[1] = 1;
    for (size_t i = 0; i < 16 * TOKENS; i++) tokens[i] = (int32_t)(i * 37 % 548);
    const double begin = now();
    must(sample_scale(m, &o, 1, 0, TOKENS, tokens));
    *counts = all[1];
    return now() - begin;
}

static void bench_draft(void) {
    static const size_t batches[] = {1, 16};
    static const float alphas[] = {0.5f, 0.75f}; /* geometric of 4 scales: 0.75, 0.67, 0.5 and the last */
    Transformer *m = full_size(1);
    printf("\n%-30s %7s %9s %8s %8s %7s %7s %8s\n", "An FFHQ scale, 256 tokens", "right", "one by one", "guessing",
           "speed-up", "passes", "of", "positions");
    for (int format = WEIGHTS_REAL; format <= WEIGHTS_BF16X3; format++)
        for (size_t k = 0; k < COUNT(batches); k++)
            for (size_t a = 0; a < COUNT(alphas); a++) {
                DraftCounts single, guessed;
                if (batches[k] > 1 && (a == 0 || format != WEIGHTS_REAL)) continue; /* these take long */
                quieten(m, alphas[a]);
                pack(m, (WeightFormat)format);
                const double t1 = scale_time(m, batches[k], 1, &single), t = scale_time(m, batches[k], 0, &guessed);
                char name[96];
                snprintf(name, sizeof name, "%s, batch %zu, alpha %.2f", format_names[format], batches[k],
                         (double)alphas[a]);
                printf("%-30s %6.0f%% %8.2f s %6.2f s %8.2f %7zu %7zu %8zu\n", name,
                       100 * (double)guessed.right / (double)guessed.tried, t1, t, t1 / t, guessed.passes,
                       single.passes, guessed.positions);
                fflush(stdout);
                if (tsv) fprintf(tsv, "%s\t%s\t%.6g\t\t\t\t\n", section_name, name, t);
            }
    transformer_free(m);
}

/* ---- The first stage at full size; see the top for what the per cent of a convolution mean ---- */

typedef struct {
    Conv c;
    real *x, *w, *bias, *y, *dx, *dw, *db;
    Compute on;
} ConvJob;

static void run_conv_forward(void *context) {
    const ConvJob *j = (const ConvJob *)context;
    conv_forward(&j->on, j->y, j->x, j->w, j->bias, NULL, &j->c);
}

static void run_conv_backward(void *context) {
    const ConvJob *j = (const ConvJob *)context;
    conv_backward(&j->on, j->dx, j->dw, j->db, j->y, j->x, j->w, 0, &j->c);
}

static void bench_conv(Conv c, Precision precision) {
    static const char *const kind[] = {"1x1", "3x3", "down", "up"};
    const size_t results = c.h * c.w * (c.kind == CONV_UP ? 4 : 1) / (c.kind == CONV_DOWN ? 4 : 1);
    const size_t kernel = c.kind == CONV1 ? 1 : 9, nx = c.B * c.C * c.h * c.w, ny = c.B * c.M * results;
    const size_t nw = c.M * c.C * kernel;
    ConvJob j = {c,
                 reals(nx, "x"),
                 reals(nw, "w"),
                 reals(c.M, "bias"),
                 reals(ny, "y"),
                 reals(nx, "dx"),
                 reals(nw, "dw"),
                 reals(c.M, "db"),
                 compute_of(&(Params){.precision = precision})};
    for (int backward = 0; backward < 2; backward++) conv_needs(&j.on, &c, backward);
    j.on.scratch = reals(ceil_div(j.on.scratch_bytes, sizeof(real)), "scratch");
    for (int backward = 0; backward < 2; backward++) {
        const double times = backward ? 2 : 1, flops = 2 * (double)(nw * results * c.B);
        char name[96];
        const double multiplied = conv_multiplications(precision, &c, backward) / (times * flops / 2);
        snprintf(name, sizeof name, "%s %zu->%zu at %zux%zu, %s (%.2f)", kind[c.kind], c.C, c.M, c.h, c.w,
                 backward ? "backward" : "forward", multiplied);
        row((Row){named(name, precision).s, times * flops, times * (double)(nx + ny + nw) * sizeof(real), precision},
            backward ? run_conv_backward : run_conv_forward, &j);
    }
    real *all[] = {j.x, j.w, j.bias, j.y, j.dx, j.dw, j.db, j.on.scratch};
    for (size_t i = 0; i < COUNT(all); i++) free(all[i]);
}

typedef struct {
    Vqgan *v;
    size_t B;
    real *images, *z, *gradient;
    int32_t *raw;
} StageJob;

enum { SIDE = 256, GRID = 16 };

static void run_encode(void *context) {
    const StageJob *j = (const StageJob *)context;
    must(vqgan_encode(j->v, j->images, j->B, SIDE, SIDE, 0, NULL, j->raw, NULL));
}

static void run_decode(void *context) {
    const StageJob *j = (const StageJob *)context;
    must(vqgan_decode(j->v, j->z, j->B, GRID, GRID, j->images));
}

static void run_training_step(void *context) {
    const StageJob *j = (const StageJob *)context;
    const real *xrec;
    double loss;
    must(vqgan_forward(j->v, j->images, j->B, SIDE, SIDE, &xrec, &loss));
    must(vqgan_backward(j->v, j->gradient, 1, NULL));
}

static StageJob first_stage(size_t B) {
    Config recipe = {0};
    VqganConfig c;
    StageJob j = {NULL, B, NULL, NULL, NULL, NULL};
    must(config_read(&recipe, "models/ffhq.txt"));
    must(vqgan_config_read(&c, &recipe, "vqgan.model.params."));
    config_free(&recipe);
    must(vqgan_create(&j.v, &c, 0));
    must(params_plan(vqgan_params(j.v), PLAN_VALUE | PLAN_GRAD));
    params_init(vqgan_params(j.v), 1);
    j.images = (real *)reals(B * 3 * SIDE * SIDE, "images");
    j.gradient = (real *)reals(B * 3 * SIDE * SIDE, "gradient");
    j.z = (real *)reals(B * c.embed_dim * GRID * GRID, "latents");
    must(mem_alloc(&j.raw, B * GRID * GRID, sizeof *j.raw, "codes"));
    return j;
}

static void bench_stage(size_t B, Precision precision) {
    StageJob j = first_stage(B);
    vqgan_params(j.v)->precision = precision;
    const double weights = (double)params_count(vqgan_params(j.v)) * sizeof(real);
    const double encode = vqgan_flops(j.v, B, SIDE, SIDE, 1, 0), decode = vqgan_flops(j.v, B, SIDE, SIDE, 0, 1);
    size_t bytes;
    char name[96];
    must(vqgan_plan_bytes(j.v, B, SIDE, SIDE, 0, &bytes));
    must(vqgan_plan(j.v, B, SIDE, SIDE, 0));
    snprintf(name, sizeof name, "encode, batch %zu", B);
    row((Row){named(name, precision).s, encode, weights / 2, precision}, run_encode, &j);
    snprintf(name, sizeof name, "decode, batch %zu", B);
    row((Row){named(name, precision).s, decode, weights / 2, precision}, run_decode, &j);
    printf("    %zu MiB besides the weights\n", bytes >> 20);
    if (B == 1) {
        must(vqgan_plan_bytes(j.v, B, SIDE, SIDE, 1, &bytes));
        must(vqgan_plan(j.v, B, SIDE, SIDE, 1));
        snprintf(name, sizeof name, "training step, batch %zu", B);
        row((Row){named(name, precision).s, 3 * (encode + decode), 3 * weights, precision}, run_training_step, &j);
        printf("    %zu MiB besides the weights and their gradients\n", bytes >> 20);
    }
    vqgan_free(j.v);
    free(j.images), free(j.gradient), free(j.z), free(j.raw);
}

static void bench_layers(void) {
    static const Conv layers[] = {
        {CONV3, 1, 128, 128, 256, 256},   {CONV3, 1, 128, 128, 128, 128},     {CONV3, 1, 256, 128, 128, 128},
        {CONV3, 1, 256, 256, 64, 64},     {CONV3, 1, 512, 512, 16, 16},       {CONV3, 1, 3, 128, 256, 256},
        {CONV3, 1, 128, 3, 256, 256},     {CONV1, 1, 256, 128, 128, 128},     {CONV1, 1, 512, 512, 16, 16},
        {CONV_UP, 1, 128, 128, 128, 128}, {CONV_DOWN, 1, 128, 128, 256, 256}, {CONV_UP, 1, 512, 512, 16, 16}};
    section("convolutions (multiplications, of the direct way's)");
    for (int p = PRECISION_F32; p <= PRECISION_BF16; p++)
        for (size_t i = 0; i < COUNT(layers); i++) bench_conv(layers[i], (Precision)p);
}

static void bench_vqgan(void) {
    static const size_t batches[] = {1, 4};
    section("the first stage at full size, pictures of 256x256");
    for (int p = PRECISION_F32; p <= PRECISION_BF16; p++)
        for (size_t i = 0; i < COUNT(batches); i++) bench_stage(batches[i], (Precision)p);
}

/* ---- All of them ---- */

static const struct {
    const char *name;
    void (*run)(void);
} sections[] = {
    {"gemm", bench_gemm},   {"stream", bench_stream}, {"decode", bench_decode}, {"block", bench_block},
    {"draft", bench_draft}, {"train", bench_train},   {"conv", bench_layers},   {"vqgan", bench_vqgan},
};

static int usage(void) {
    fprintf(stderr, "usage: test/bench [-t THREADS] [-o FILE.tsv] [SECTION...]\nsections:");
    for (size_t s = 0; s < COUNT(sections); s++) fprintf(stderr, " %s", sections[s].name);
    fprintf(stderr, "\n");
    return 2;
}

int main(int argc, char **argv) {
    int first = 1, wanted[COUNT(sections)] = {0};
    for (; argc > first + 1 && argv[first][0] == '-'; first += 2) {
        char *end;
        const long threads = strtol(argv[first + 1], &end, 10);
        if (!strcmp(argv[first], "-t") && !*end && threads >= 1 && threads <= THREADS_MAX)
            threads_set((int)threads);
        else if (strcmp(argv[first], "-o") || !(tsv = fopen(argv[first + 1], "w")))
            return usage();
    }
    for (int a = first; a < argc; a++) {
        size_t s = 0;
        while (s < COUNT(sections) && strcmp(argv[a], sections[s].name)) s++;
        if (s == COUNT(sections)) return usage();
        wanted[s] = 1;
    }
    measure_ceilings();
    if (tsv) fprintf(tsv, "section\tname\tseconds\tGFLOP/s\tof peak\tGB/s\tof read rate\n");
    for (size_t s = 0; s < COUNT(sections); s++) {
        section_name = sections[s].name;
        if (argc == first || wanted[s]) sections[s].run();
    }
    return tsv && fclose(tsv) ? (perror("bench"), 1) : 0;
}
