/* test.h - what every test program shares. A test is a main() that calls CHECK, near or gradcheck and returns
 * test_report(): a last line "N passed, N failed", exit status 1 if anything failed or nothing was checked. */
#ifndef TEST_H
#define TEST_H

#ifndef PLAIN
#include "kernels/kernels.h"
#endif
#include "sampling/sampling.h"
#include "training/training.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static size_t test_passed, test_failed;

static inline int test_note(int ok, const char *file, int line, const char *what) {
    if (ok)
        test_passed++;
    else {
        test_failed++;
        printf("FAIL %s:%d: %s\n", file, line, what);
    }
    return ok;
}

#define CHECK(condition) test_note(!!(condition), __FILE__, __LINE__, #condition)
/* An Err that must be OK; prints the error text otherwise. */
#define CHECK_OK(call)                                                                                                 \
    do {                                                                                                               \
        if (!CHECK((call) == OK)) printf("     %s\n", err_text());                                                     \
    } while (0)
/* An Err that must fail with a text that contains `part`. */
#define CHECK_ERR(call, part)                                                                                          \
    do {                                                                                                               \
        if (!CHECK((call) != OK && strstr(err_text(), (part)))) printf("     error text: \"%s\"\n", err_text());       \
    } while (0)

/* max |got-ref| <= atol + rtol*max|ref|. Comparing nothing fails, NaN fails. *worst = fraction of the tolerance. */
static inline int near_reals(const real *got, const real *ref, size_t n, double atol, double rtol, double *worst) {
    double largest = 0, error = n ? 0 : NAN;
    for (size_t i = 0; i < n; i++)
        if (fabs((double)ref[i]) > largest) largest = fabs((double)ref[i]);
    for (size_t i = 0; i < n && error == error; i++) {
        double d = fabs((double)got[i] - (double)ref[i]);
        if (!(d <= error)) error = d; /* also taken when d is NaN */
    }
    error /= atol + rtol * largest;
    if (worst) *worst = error;
    return error <= 1; /* false for NaN */
}
#define CHECK_NEAR(name, got, ref, n, atol, rtol)                                                                      \
    do {                                                                                                               \
        double worst_;                                                                                                 \
        if (!test_note(near_reals(got, ref, n, atol, rtol, &worst_), __FILE__, __LINE__, name))                        \
            printf("     %.3g of the tolerance\n", worst_);                                                            \
    } while (0)

/* What a backward pass between the two says is complete (params_ready) must not change any more; all but few rows must
 * have been said to be. */
static struct {
    real *grad; /* (total) when it was said */
    size_t from;
} test_ready;
static inline void test_on_ready(Params *p, size_t row) {
    for (size_t i = row; i < test_ready.from; i++)
        memcpy(test_ready.grad + (p->row[i].grad - p->arena[1]), p->row[i].grad, p->row[i].size * sizeof(real));
    if (row < test_ready.from) test_ready.from = row;
}
static inline void ready_begin(Params *p) {
    test_ready.from = p->n;
    test_ready.grad = (real *)calloc(p->total, sizeof(real));
    p->ready = test_on_ready;
}
static inline void ready_end(Params *p) {
    CHECK(test_ready.from <= 4);
    for (size_t i = test_ready.from; i < p->n; i++) {
        const real *then = test_ready.grad + (p->row[i].grad - p->arena[1]);
        test_note(!memcmp(then, p->row[i].grad, p->row[i].size * sizeof(real)), __FILE__, __LINE__, p->row[i].name);
    }
    free(test_ready.grad);
    p->ready = NULL;
}

/* Central differences of f at x[0..n-1] against grad (for REAL_DOUBLE builds). Checks at most `most` elements, spread
 * over the tensor. Error of an element is relative to the tensor's largest gradient, or `floor_` if that is smaller.
 * Returns the largest error; NAN when there was nothing to check. */
static inline double gradient_error(double (*f)(void *), void *context, real *x, const real *grad, size_t n,
                                    size_t most, double step, double floor_) {
    double largest = floor_, worst = n ? 0 : NAN;
    for (size_t i = 0; i < n; i++)
        if (fabs((double)grad[i]) > largest) largest = fabs((double)grad[i]);
    size_t stride = n > most ? n / most : 1;
    for (size_t i = 0; i < n && worst == worst; i += stride) { /* NaN stays */
        real keep = x[i];
        x[i] = (real)((double)keep + step);
        double up = f(context);
        x[i] = (real)((double)keep - step);
        double down = f(context);
        x[i] = keep;
        double d = fabs((up - down) / (2 * step) - (double)grad[i]) / largest;
        if (!(d <= worst)) worst = d; /* also taken when d is NaN */
    }
    return worst;
}

/* A new folder for what a test writes, under TMPDIR or, because tests write thousands of small files, in memory. 1:
 * made. */
enum { FOLDER_BYTES = 128 };
static inline int temporary_folder(char out[FOLDER_BYTES]) {
    const char *parent = getenv("TMPDIR");
    if (!parent || !*parent) parent = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    int n = snprintf(out, FOLDER_BYTES, "%s/imagebart.XXXXXX", parent);
    if (n < FOLDER_BYTES && mkdtemp(out)) return 1;
    printf("cannot make the temporary folder %s\n", out);
    return 0;
}

static inline void write_text(const char *path, const char *text) {
    FILE *f = fopen(path, "w");
    if (!CHECK(f != NULL)) return;
    fputs(text, f);
    fclose(f);
}

static inline int remove_folder(const char *folder) {
    char command[FOLDER_BYTES + 8];
    snprintf(command, sizeof command, "rm -r %s", folder);
    return system(command);
}

/* Whatever opens as a checkpoint must be readable to the last byte (the sanitizers watch). 1: it opened. */
static inline int open_and_read(const char *path) {
    Checkpoint ck;
    if (checkpoint_open(&ck, path) != OK) {
        CHECK(err_text()[0] && !ck.map);
        return 0;
    }
    double sum = 0;
    for (size_t i = 0; i < ck.n; i++) {
        real *out = (real *)malloc((ck.tensor[i].size + 1) * sizeof(real));
        tensor_to_reals(&ck.tensor[i], out);
        for (size_t k = 0; k < ck.tensor[i].size; k++) sum += (double)out[k];
        free(out);
    }
    checkpoint_close(&ck);
    return sum == sum || 1;
}

static inline int test_report(void) {
    if (test_passed + test_failed == 0) test_failed = 1; /* a test that checks nothing fails */
    printf("%zu passed, %zu failed\n", test_passed, test_failed);
    return test_failed != 0;
}

#endif
