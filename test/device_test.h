/* device_test.h - what the tests of CUDA code share: arrays that exist on both sides, and comparing them. It is
 * included after device.cu. */
#ifndef DEVICE_TEST_H
#define DEVICE_TEST_H

#include "test.h"

static const double TOLERANCE = IS_BF16 ? 2e-2 : 1e-4;
static Device *device;

/* ---- The bits that the device computed: the same in any order of threads and blocks ---- */

static uint64_t digest;   /* of what was looked at since the order began */
static uint64_t all_bits; /* of everything: what test programs say at their end */
static inline void add_bits(const void *p, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) {
        digest = (digest ^ ((const unsigned char *)p)[i]) * 1099511628211u;
        all_bits = (all_bits ^ ((const unsigned char *)p)[i]) * 1099511628211u;
    }
}

static void reverse(int on) {
#ifdef CUDA_ON_CPU
    cuda_on_cpu_reverse = on;
#else
    (void)on;
#endif
}

/* An interpreter of PTX (PTXSIM) is told its order for the whole program, and would do the same a second time. */
static inline int orders(void) {
    return getenv("PTXSIM") ? 1 : 2;
}

/* for (int order = first_order(); order < 2; order = next_order(order)): the second time, where kernels are
 * emulated, threads and blocks run in the opposite order, and the bits must be the same. */
static inline int first_order(void) {
    return digest = 0;
}
static inline int next_order(int order) {
    static uint64_t first;
    if (order) CHECK(digest == first);
    first = digest, digest = 0;
    reverse(!order);
    return order + 1 < orders() ? order + 1 : 2;
}

/* ---- Arrays that exist on both sides ---- */

enum { ARRAYS = 128 };
static void *array[ARRAYS];
static size_t arrays;

static void free_arrays(void) {
    while (arrays > 0) device_free(array[--arrays]);
}

static void *on_device(size_t bytes) {
    void *p = NULL;
    if (device_alloc(&p, bytes, "a test") != OK || arrays == ARRAYS) printf("%s\n", err_text()), exit(1);
    return array[arrays++] = p;
}

/* n normally distributed numbers; in bf16 those that bf16 has. */
static real *random_reals(size_t n, uint64_t stream, double size) {
    real *x = (real *)malloc((n + 1) * sizeof *x);
    for (size_t i = 0; i < n; i++) {
        x[i] = (real)(size * rng_normal(7, rng_stream(RNG_TEST, 9, stream), i));
        if (IS_BF16) x[i] = to_float(to_floatX(x[i]));
    }
    return x;
}

static floatX *send_x(const real *x, size_t n) {
    floatX *low = (floatX *)malloc((n + 1) * sizeof *low), *p = (floatX *)on_device(n * sizeof *p);
    for (size_t i = 0; i < n; i++) low[i] = to_floatX(x[i]);
    CHECK_OK(to_device(device, p, low, n * sizeof *p));
    cudaStreamSynchronize(device->stream);
    free(low);
    return p;
}

static inline float *send(const real *x, size_t n) {
    float *p = (float *)on_device(n * sizeof *p);
    CHECK_OK(to_device(device, p, x, n * sizeof *p));
    return p;
}

static void near_f(const char *name, const float *got, const real *want, size_t n) {
    real *x = (real *)malloc((n + 1) * sizeof *x);
    CHECK_OK(to_host(device, x, got, n * sizeof *x));
    add_bits(x, n * sizeof *x);
    CHECK_NEAR(name, x, want, n, 1e-30, TOLERANCE);
    free(x);
}

static void near_x(const char *name, const floatX *got, const real *want, size_t n) {
    floatX *low = (floatX *)malloc((n + 1) * sizeof *low);
    real *x = (real *)malloc((n + 1) * sizeof *x);
    CHECK_OK(to_host(device, low, got, n * sizeof *low));
    add_bits(low, n * sizeof *low);
    for (size_t i = 0; i < n; i++) x[i] = to_float(low[i]);
    CHECK_NEAR(name, x, want, n, 1e-30, TOLERANCE);
    free(low), free(x);
}

/* ---- Pictures on both sides: here (B,C,cells), on the device (B,cells,C) ---- */

static inline real *as_cells(const real *x, size_t B, size_t C, size_t cells) {
    real *y = (real *)calloc(B * C * cells + 1, sizeof *y);
    for (size_t b = 0; b < B; b++)
        for (size_t c = 0; c < C; c++)
            for (size_t i = 0; i < cells; i++) y[(b * cells + i) * C + c] = x[(b * C + c) * cells + i];
    return y;
}

static inline floatX *send_picture(const real *x, size_t B, size_t C, size_t cells) {
    real *y = as_cells(x, B, C, cells);
    floatX *p = send_x(y, B * C * cells);
    free(y);
    return p;
}

static inline void near_picture(const char *name, const floatX *got, const real *want, size_t B, size_t C,
                                size_t cells) {
    real *y = as_cells(want, B, C, cells);
    near_x(name, got, y, B * C * cells);
    free(y);
}

static inline void add_digest(const void *p, size_t bytes) {
    unsigned char *here = (unsigned char *)malloc(bytes + 1);
    CHECK_OK(to_host(device, here, p, bytes));
    add_bits(here, bytes);
    free(here);
}

/* ---- A test program: its sections, or those of them that its arguments name ---- */

typedef struct {
    const char *name;
    void (*run)(void);
} Section;

static int run_sections(int argc, char **argv, const Section *section, size_t n) {
    char text[CUDA_TEXT_BYTES];
    if (find_cuda(text, NULL, NULL) != OK || open_device(&device) != OK) {
        printf("FAIL %s\n0 passed, 1 failed\n", err_text());
        return 1;
    }
    printf("%s, %s\n", text, IS_BF16 ? "bf16" : "f32");
    for (int i = 1; i < argc; i++) {
        size_t known = 0;
        while (known < n && strcmp(argv[i], section[known].name) != 0) known++;
        if (!CHECK(known < n)) printf("     there is no section %s\n", argv[i]);
    }
    for (size_t s = 0; s < n; s++) {
        int wanted = argc < 2;
        for (int i = 1; i < argc; i++) wanted |= strcmp(argv[i], section[s].name) == 0;
        if (wanted) section[s].run();
    }
    close_device(device);
    printf("bits of what was computed: %016llx\n", (unsigned long long)all_bits);
    return test_report();
}

/* ---- Root mean squares ---- */

static inline real *copy_of(const real *x, size_t n) {
    real *y = (real *)malloc((n + 1) * sizeof *y);
    memcpy(y, x, n * sizeof *y);
    return y;
}

static inline double rms_of(const real *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sqrt(sum / (double)n);
}

/* The difference of got and want (n), relative to want, or to `least` where that is more */
static inline double rms_error(const real *got, const real *want, size_t n, double least) {
    real *gap = copy_of(got, n);
    for (size_t i = 0; i < n; i++) gap[i] -= want[i];
    const double error = rms_of(gap, n) / fmax(rms_of(want, n), least);
    free(gap);
    return error;
}

/* Root mean squares: of the error at most `limit` times that of what is wanted, or `least` times if that is larger. */
static inline void near_rms(const char *name, const real *got, const real *want, size_t n, double least, double limit) {
    const double error = rms_error(got, want, n, least);
    add_bits(got, n * sizeof *got);
    if (!test_note(n > 0 && error <= limit, __FILE__, __LINE__, name))
        printf("     an error of %.3g, at most %.3g\n", error, limit);
}

#endif
