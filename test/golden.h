/* golden.h - for golden.c: what a golden case holds, and comparisons of numbers, tokens and gradients with its
 * expectations. Each prints a line and counts; --selftest falsifies here what is expected. */
#ifndef GOLDEN_H
#define GOLDEN_H

#include "sampling/sampling.h"
#include "training/training.h"
#include "test/inside.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* ---- Tolerances (the golden cases' README) ---- */
#define TOL_OUTPUT 1e-4    /* of the tensor's largest magnitude */
#define TOL_GRAD 1e-3      /* likewise */
#define FLOOR_GRAD 1e-6    /* absolute, for gradients that are zero in exact arithmetic: they hold rounding noise ... */
#define NOISE_GRAD 1e-5    /* ... and are told by being smaller than this everywhere */
#define TOL_FINAL 1e-3     /* after training: of the parameter's largest movement */
#define TOL_KEY_BIAS 1e-2  /* absolute: Adam amplifies the rounding noise in gradients of the keys' biases */
#define FLOOR_FINAL 2.4e-7 /* two units in the last place of the parameter's largest value */
/* --precision bf16, as of a GPU's bf16; gradients by their norms, for roundings are many and of any sign */
#define BF16_OUTPUT 2e-2   /* of the tensor's largest magnitude; of the norm of all gradients together */
#define BF16_GRAD 5e-2     /* of one tensor's norm */
#define BF16_STAGE 2       /* times these in a first stage: in four of five, rounding the weights alone changes codes */
#define BF16_STAGE_GRAD 3  /* there times BF16_GRAD: levels round in another order; up to 2.2 was seen */
#define BF16_KINKS 4       /* times these where leaky ReLUs have another slope if rounding changes a sign */
enum { BF16_CODES = 100 }; /* one of so many codes may be another, and as chance has it three deviations more */
enum { GRADSUB_STRIDE = 61 }; /* gradsub.* holds every 61st element of a large gradient */

/* ---- Bookkeeping ---- */

typedef enum { HONEST, MOVED, MADE_NAN, RENAMED } Falsify; /* --selftest */

static size_t passed, failed, green; /* green: cases with tensors that failed nowhere */
static Falsify falsify;
static int on_cuda;         /* --device cuda */
static Precision precision; /* --precision bf16x3, bf16: of products on the CPU */

typedef struct {
    const char *name; /* folder */
    char dir[1024];
    Config config;
    Checkpoint model, io;
    char *seen; /* (io.n) 1: compared or an input in use */
    Vqgan *vqgan;
    Discriminator *disc;
    Transformer *net;
    void **block; /* (n_blocks) buffers, freed with the case */
    size_t n_blocks;
    size_t other_codes;       /* than the expected ones, in bf16 */
    double times;             /* 1, BF16_STAGE or BF16_KINKS */
    double off, norm, before; /* bf16: squares of the gradients so far, of their errors; the norm of the last one */
} Case;

static void report(const Case *c, const char *what, int ok, const char *detail) {
    if (ok)
        passed++;
    else
        failed++;
    printf("%-4s %s %s  %s\n", ok ? "ok" : "FAIL", c->name, what, detail);
}

static Err case_alloc(Case *c, void *out, size_t n, size_t size) {
    void **grown = (void **)realloc(c->block, (c->n_blocks + 1) * sizeof *grown);
    if (!grown) return err("no memory for a golden case");
    c->block = grown;
    TRY(mem_alloc(out, n, size, "a golden case"));
    memcpy(&c->block[c->n_blocks++], out, sizeof(void *));
    return OK;
}

static Err case_reals(Case *c, real **out, size_t n) {
    return case_alloc(c, out, n, sizeof **out);
}

static int has(const Case *c, const char *name) {
    return checkpoint_find(&c->io, name) != NULL;
}

static int has_prefix(const Case *c, const char *prefix) {
    for (size_t i = 0; i < c->io.n; i++)
        if (strncmp(c->io.tensor[i].name, prefix, strlen(prefix)) == 0) return 1;
    return 0;
}

static int file_in(const char *dir, const char *name) {
    char path[1300];
    struct stat st;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return stat(path, &st) == 0 && S_ISREG(st.st_mode);
}

/* The tensor, marked as accounted for. */
static Err io_tensor(Case *c, const char *name, const Tensor **x) {
    *x = checkpoint_find(&c->io, name);
    if (!*x) return err("io.safetensors has no tensor %s", name);
    c->seen[*x - c->io.tensor] = 1;
    return OK;
}

static Err io_reals(Case *c, const char *name, real **out, size_t *n) {
    const Tensor *x;
    TRY(io_tensor(c, name, &x));
    TRY(case_reals(c, out, x->size));
    tensor_to_reals(x, *out);
    *n = x->size;
    return OK;
}

static Err io_ints(Case *c, const char *name, int32_t **out, size_t *n) {
    const Tensor *x;
    TRY(io_tensor(c, name, &x));
    TRY(case_alloc(c, out, x->size, sizeof **out));
    *n = x->size;
    return checkpoint_ints(&c->io, name, x->size, *out);
}

static Err io_tokens(Case *c, const char *name, int32_t **out, size_t expected) {
    size_t n;
    TRY(io_ints(c, name, out, &n));
    return n == expected ? OK : err("%s has %zu elements, expected %zu", name, n, expected);
}

/* ---- Comparisons ---- */

static double largest(const real *x, size_t n) {
    double most = 0;
    for (size_t i = 0; i < n; i++)
        if (isfinite(x[i]) && fabs((double)x[i]) > most) most = fabs((double)x[i]);
    return most;
}

static double norm_of(const real *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sqrt(sum);
}

/* Of got and want (n): the largest difference, or with `norm` that of the differences */
static double distance(const real *got, const real *want, size_t n, int norm) {
    double worst = n ? 0 : NAN, sum = 0;
    for (size_t i = 0; i < n && worst == worst; i++) {
        double d = fabs((double)got[i] - (double)want[i]);
        if (isinf(want[i]) && got[i] == want[i]) d = 0;
        if (!(d <= worst)) worst = d; /* also taken when d is NaN */
        sum += d * d;
    }
    return norm ? sqrt(sum) : worst;
}

/* want (n) is the expectation; --selftest falsifies one element of it by two tolerances. */
static void compare_by(int norm, const Case *c, const char *what, const real *got, real *want, size_t n,
                       double tolerance) {
    char detail[80];
    if (falsify == MOVED && n) {
        double rounding = 4 * FLT_EPSILON * fabs((double)want[n / 2]) + 1e-30; /* else the move could round away */
        want[n / 2] = isfinite(want[n / 2]) ? want[n / 2] + (real)(2 * tolerance + rounding) : 0;
    }
    if (falsify == MADE_NAN && n) want[n / 2] = NAN;
    const double worst = distance(got, want, n, norm);
    snprintf(detail, sizeof detail, "%.2g of the tolerance %.2g", tolerance > 0 ? worst / tolerance : worst, tolerance);
    report(c, what, worst <= tolerance, detail);
}

static void compare(const Case *c, const char *what, const real *got, real *want, size_t n, double tolerance) {
    compare_by(0, c, what, got, want, n, tolerance);
}

static double output_tolerance(const Case *c, const real *want, size_t n) {
    const double in_bf16 = BF16_OUTPUT * fmin(c->times, BF16_STAGE);
    return (precision == PRECISION_BF16 ? in_bf16 : TOL_OUTPUT) * largest(want, n);
}

/* In bf16 the first stage's code of a latent may be another where two entries are nearly as near: of few tokens none may.
 * How many it is differs between processors, by chance: the deviation of a count is its root. */
static void compare_tokens(Case *c, const char *what, const int32_t *got, int32_t *want, size_t n) {
    size_t wrong = 0;
    const size_t mean = precision == PRECISION_BF16 ? n / BF16_CODES : 0,
                 other = mean + (size_t)(3 * sqrt((double)mean));
    char detail[80];
    for (size_t i = 0; i < n; i++) c->other_codes += got[i] != want[i];
    if (falsify != HONEST && falsify != RENAMED)
        for (size_t i = 0; i < n; i += n / (other + 1)) want[i]++;
    for (size_t i = 0; i < n; i++) wrong += got[i] != want[i];
    snprintf(detail, sizeof detail, "%zu of %zu differ", wrong, n);
    report(c, what, n > 0 && wrong <= other, detail);
}

/* What follows from other codes is of other pictures. */
static Err leave_out(Case *c) {
    size_t n = 0;
    for (size_t i = 0; i < c->io.n; i++) n += !c->seen[i];
    memset(c->seen, 1, c->io.n);
    printf("skipped: %s  %zu codes differ: %zu expectations follow from them\n", c->name, c->other_codes, n);
    return OK;
}

static Err io_expected(Case *c, const char *name, real **want, size_t n) {
    size_t size;
    TRY(io_reals(c, name, want, &size));
    return size == n ? OK : err("%s has %zu elements, computed were %zu", name, size, n);
}

/* An expectation that cannot be had is a failure; the case goes on. */
static Err absent(const Case *c, const char *label) {
    report(c, label, 0, err_text());
    return OK;
}

/* label: what to call it, when one expectation is met twice. */
static Err check_output(Case *c, const char *name, const char *label, const real *got, size_t n) {
    real *want;
    if (io_expected(c, name, &want, n) != OK) return absent(c, label);
    compare(c, label, got, want, n, output_tolerance(c, want, n));
    return OK;
}

static Err check_scalar(Case *c, const char *name, double got) {
    real value = (real)got;
    return check_output(c, name, name, &value, 1);
}

static Err check_tokens(Case *c, const char *name, const char *label, const int32_t *got, size_t n) {
    int32_t *want;
    if (io_tokens(c, name, &want, n) != OK) return absent(c, label);
    compare_tokens(c, label, got, want, n);
    return OK;
}

static double grad_tolerance(const real *want, size_t n) {
    double most = largest(want, n);
    return most < NOISE_GRAD ? FLOOR_GRAD : TOL_GRAD * most;
}

/* In bf16 a gradient that is zero in exact arithmetic, as that of a bias in front of a norm, may be off by what its
 * weight's may, which stands before it. */
static void compare_gradient(Case *c, const char *name, const real *got, real *want, size_t n) {
    if (precision != PRECISION_BF16) {
        compare(c, name, got, want, n, grad_tolerance(want, n));
        return;
    }
    if (largest(want, n) >= NOISE_GRAD) c->before = norm_of(want, n);
    const double times = c->times == BF16_STAGE ? BF16_STAGE_GRAD : c->times;
    compare_by(1, c, name, got, want, n, BF16_GRAD * times * c->before);
    c->off += pow(distance(got, want, n, 1), 2), c->norm += pow(norm_of(want, n), 2);
}

/* In bf16 all gradients since the last call, as one */
static void compare_gradients(Case *c, const char *what) {
    char detail[80];
    const double off = sqrt(c->off), norm = sqrt(c->norm);
    c->off = c->norm = c->before = 0;
    if (precision != PRECISION_BF16) return;
    snprintf(detail, sizeof detail, "as a whole off by %.2g of %.2g", off, norm);
    report(c, what, off <= BF16_OUTPUT * c->times * norm, detail);
}

/* A large gradient is kept as every 61st element and the norm of the whole. */
static Err check_sampled_gradient(Case *c, const Param *row, const char *prefix) {
    char name[NAME_MAX_BYTES + 40];
    size_t n = (row->size + GRADSUB_STRIDE - 1) / GRADSUB_STRIDE;
    real *got, *want;
    double sum = 0;
    TRY(case_reals(c, &got, n));
    for (size_t i = 0; i < n; i++) got[i] = row->grad[i * GRADSUB_STRIDE];
    for (size_t i = 0; i < row->size; i++) sum += (double)row->grad[i] * (double)row->grad[i];
    snprintf(name, sizeof name, "gradsub.%s%s", prefix, row->name);
    if (io_expected(c, name, &want, n) != OK) return absent(c, name);
    compare_gradient(c, name, got, want, n);
    snprintf(name, sizeof name, "gradnorm.%s%s", prefix, row->name);
    if (io_expected(c, name, &want, 1) != OK) return absent(c, name);
    real norm = (real)sqrt(sum);
    compare(c, name, &norm, want, 1,
            precision == PRECISION_BF16 ? BF16_GRAD * (double)want[0] : grad_tolerance(want, 1));
    return OK;
}

/* Every parameter that is trained must have its gradient among the expectations. */
static Err check_gradients(Case *c, Params *p, const char *prefix) {
    TRY(params_fetch(p));
    char name[NAME_MAX_BYTES + 40];
    for (size_t r = 0; r < p->n; r++) {
        const Param *row = &p->row[r];
        real *want;
        snprintf(name, sizeof name, "gradsub.%s%s", prefix, row->name);
        if (has(c, name)) {
            TRY(check_sampled_gradient(c, row, prefix));
            continue;
        }
        snprintf(name, sizeof name, "grad.%s%s", prefix, row->name);
        if (row->untrained && !has(c, name)) continue;
        if (io_expected(c, name, &want, row->size) == OK)
            compare_gradient(c, name, row->grad, want, row->size);
        else
            absent(c, name);
    }
    compare_gradients(c, "gradients");
    return OK;
}

#endif
