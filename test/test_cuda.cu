/* test_cuda.cu - every kernel against its C twin, then whole networks, decoding and training.
 *
 * Compiled twice, with floatX = float and = bf16: by a C++ compiler for the emulation on the CPU (make
 * test-cuda-emulated), by nvcc for a GPU (make test-cuda). It includes device.cu, so it sees every function there.
 * Tolerances are relative to the largest number of a tensor: 1e-4 in float, 2e-2 in bf16; inputs of a bf16 kernel are
 * rounded to bf16 first. Every kernel runs twice, the second time in the opposite order of threads and blocks when it is
 * emulated, and must give the same bits. */
#include "../device.cu"

#include "test.h"

static const double TOLERANCE = IS_BF16 ? 2e-2 : 1e-4;
static Device *device;

/* ---- Arrays that exist on both sides ---- */

enum { ARRAYS = 64 };
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
#ifndef CUDA_ON_CPU
    cudaStreamSynchronize(device->stream);
#endif
    free(low);
    return p;
}

static float *send(const real *x, size_t n) {
    float *p = (float *)on_device(n * sizeof *p);
    CHECK_OK(to_device(device, p, x, n * sizeof *p));
    return p;
}

static void near_x(const char *name, const floatX *got, const real *want, size_t n) {
    floatX *low = (floatX *)malloc((n + 1) * sizeof *low);
    real *x = (real *)malloc((n + 1) * sizeof *x);
    CHECK_OK(to_host(device, low, got, n * sizeof *low));
    for (size_t i = 0; i < n; i++) x[i] = to_float(low[i]);
    CHECK_NEAR(name, x, want, n, 1e-30, TOLERANCE);
    free(low), free(x);
}

static void reverse(int on) {
#ifdef CUDA_ON_CPU
    cuda_on_cpu_reverse = on;
#else
    (void)on;
#endif
}

/* ---- Layers ---- */

static void test_gelu(size_t R, size_t H, int backward) {
    const size_t n = R * H;
    real *h = random_reals(n, 1, 2), *bias = random_reals(H, 2, 1), *slope = random_reals(n, 3, 1), *dh = random_reals(n, 4, 1);
    for (int order = 0; order < 2; order++) {
        floatX *g = send_x(h, n), *dg = send_x(slope, n), *d = send_x(dh, n);
        reverse(order);
        CHECK_OK(gelu_forward_cuda(device, g, backward ? dg : NULL, send(bias, H), R, H));
        if (backward) CHECK_OK(gelu_backward_cuda(device, d, dg, R, H));
        reverse(0);
        real *want_g = random_reals(n, 1, 2), *want_dg = random_reals(n, 3, 1), *want_d = random_reals(n, 4, 1);
        gelu_forward(want_g, backward ? want_dg : NULL, bias, R, H);
        if (backward) gelu_backward(want_d, want_dg, R, H);
        near_x("gelu", g, want_g, n);
        near_x("slope of gelu", dg, want_dg, n);
        near_x("gradient of gelu", d, want_d, n);
        free(want_g), free(want_dg), free(want_d);
        free_arrays();
    }
    free(h), free(bias), free(slope), free(dh);
}

int main(void) {
    char text[CUDA_TEXT_BYTES];
    if (find_cuda(text, NULL, NULL) != OK || open_device(&device) != OK) {
        printf("FAIL %s\n0 passed, 1 failed\n", err_text());
        return 1;
    }
    printf("%s, %s\n", text, IS_BF16 ? "bf16" : "f32");
    test_gelu(3, 5, 1);
    test_gelu(1, 1, 0);
    test_gelu(7, 300, 1);
    test_gelu(1, 4097, 0);
    close_device(device);
    return test_report();
}
