/* matmul_on_cpu.h - matrix products of CUDA code that runs on the CPU: device.cu includes this file where it would include
 * blas.cu. */
#ifndef MATMUL_ON_CPU_H
#define MATMUL_ON_CPU_H

static Err open_blas(Device *d) {
    (void)d;
    return OK;
}
static void close_blas(Device *d) {
    (void)d;
}

static float element(const void *x, int is_float, size_t i) {
    return is_float ? ((const float *)x)[i] : to_float(((const floatX *)x)[i]);
}

/* rows x columns of x as floats without gaps */
static Err as_floats(float **out, const floatX *x, size_t rows, size_t columns, size_t ld) {
    TRY(mem_alloc(out, rows * columns, sizeof(float), "a matrix"));
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < columns; c++) (*out)[r * columns + c] = to_float(x[r * ld + c]);
    return OK;
}

static Err matmul_now(const Matmul *p) {
    float *A, *B, *C;
    TRY(as_floats(&A, p->A, p->trans_a ? p->K : p->M, p->trans_a ? p->M : p->K, p->lda));
    TRY(as_floats(&B, p->B, p->trans_b ? p->N : p->K, p->trans_b ? p->K : p->N, p->ldb));
    TRY(mem_alloc(&C, p->M * p->N, sizeof *C, "a matrix"));
    gemm(PRECISION_F32, p->trans_a, p->trans_b, p->M, p->N, p->K, A, p->trans_a ? p->M : p->K, B,
         p->trans_b ? p->K : p->N, 0, C, p->N);
    for (size_t r = 0; p->sums && r < p->M; r++) {
        p->sums[r] = 0;
        for (size_t k = 0; k < p->K; k++) p->sums[r] += A[p->trans_a ? k * p->M + r : r * p->K + k];
    }
    for (size_t r = 0; r < p->M; r++)
        for (size_t c = 0; c < p->N; c++) {
            const size_t at = r * p->ldd + c;
            float x = C[r * p->N + c];
            if (p->add) x += element(p->add, p->d_is_float, at);
            if (p->bias) x += element(p->bias, p->d_is_float, c);
            if (p->d_is_float)
                ((float *)p->D)[at] = x;
            else
                ((floatX *)p->D)[at] = to_floatX(x);
        }
    free(A), free(B), free(C);
    return OK;
}

static void matmul_or_end(Matmul p) {
    if (matmul_now(&p) == OK) return;
    fprintf(stderr, "a matrix product: %s\n", err_text());
    abort();
}
static Err matmul(Device *d, const Matmul *p) {
    (void)d;
    TRY(check_aligned(p));
    on_cpu::submit(on_cpu::call_of(matmul_or_end)(*p));
    return OK;
}
/* Odd sizes stand for those that cuBLASLt has no way for. */
static Err multiply_and_sum(Device *d, const Matmul *p, int *done) {
    return (*done = p->M % 2 == 0) ? matmul(d, p) : OK;
}

#endif
