/* test_base.c - errors, memory, random streams. */
#include "test.h"

#include <sys/resource.h>

static void test_errors(void) {
    CHECK(err("%s is %d, expected %d", "side", 3, 4) == FAILED);
    CHECK(!strcmp(err_text(), "side is 3, expected 4"));
    CHECK(err_in("a.png") == FAILED && !strcmp(err_text(), "a.png: side is 3, expected 4"));
    err("two\nlines\033[2J");
    CHECK(!strpbrk(err_text(), "\n\033"));
    err("%s again", err_text());
    CHECK(strstr(err_text(), "lines") && strstr(err_text(), "again"));
}

static void test_memory(void) {
    size_t product;
    CHECK_OK(size_mul(&product, 3, 5));
    CHECK(product == 15);
    CHECK_ERR(size_mul(&product, SIZE_MAX / 2, 3), "too large");
    unsigned char *p = NULL;
    CHECK_OK(mem_alloc(&p, 1000, 3, "test"));
    int zero = 1;
    for (int i = 0; i < 3000; i++) zero &= p[i] == 0;
    CHECK(zero && (uintptr_t)p % 64 == 0);
    free(p);
    CHECK_OK(mem_alloc(&p, 0, 8, "nothing"));
    free(p);
    CHECK_ERR(mem_alloc(&p, SIZE_MAX, 8, "too much"), "too much");
    CHECK_ERR(mem_alloc(&p, SIZE_MAX / 64, 8, "activations"), "activations");
}

/* The known-answer vectors published with the algorithm (Random123, kat_vectors, philox4x32 10). */
static void test_philox(void) {
    uint32_t r[4];
    philox(r, 0, 0, 0);
    CHECK(r[0] == 0x6627e8d5 && r[1] == 0xe169c58d && r[2] == 0xbc57ac4c && r[3] == 0x9b00dbd8);
    philox(r, UINT64_MAX, UINT64_MAX, UINT64_MAX);
    CHECK(r[0] == 0x408f276d && r[1] == 0x41c83b0e && r[2] == 0xa20bc7c6 && r[3] == 0x6d5451fd);
    philox(r, 0x299f31d0a4093822u, 0x0370734413198a2eu, 0x85a308d3243f6a88u);
    CHECK(r[0] == 0xd16cfe09 && r[1] == 0x94fdcceb && r[2] == 0x5001e420 && r[3] == 0x24126ea1);
}

static void test_streams(void) {
    enum { N = 100000, BINS = 7 };
    uint64_t s = rng_stream(RNG_TEST, 1, 2);
    CHECK(s != rng_stream(RNG_TEST, 2, 1) && s != rng_stream(RNG_NOISE, 1, 2));
    double sum = 0, sum2 = 0, normal = 0, normal2 = 0;
    size_t count[BINS] = {0};
    for (uint64_t i = 0; i < N; i++) {
        double u = rng_uniform(7, s, i), g = rng_normal(7, s, i);
        if (u < 0 || u >= 1) CHECK(0);
        sum += u, sum2 += u * u, normal += g, normal2 += g * g;
        uint32_t k = rng_below(7, s, i, BINS);
        if (k < BINS) count[k]++;
    }
    CHECK(fabs(sum / N - 0.5) < 4 * sqrt(1.0 / 12 / N));
    CHECK(fabs(sum2 / N - 1.0 / 3) < 0.005);
    CHECK(fabs(normal / N) < 4 / sqrt(N) && fabs(normal2 / N - 1) < 0.02);
    double chi = 0;
    for (int k = 0; k < BINS; k++) chi += pow((double)count[k] - (double)N / BINS, 2) / ((double)N / BINS);
    CHECK(chi < 25); /* 6 degrees of freedom: p < 0.0004 above */
    CHECK(rng_below(7, s, 3, 1) == 0);
}

static size_t own_address_space(void) {
    char line[128];
    size_t kib = 0;
    FILE *f = fopen("/proc/self/status", "r");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "VmSize: %zu kB", &kib) == 1) break;
    if (f) fclose(f);
    return kib * 1024;
}

static void test_available(void) {
    char text[32];
    struct rlimit old, limit;
    const size_t some = 64 << 20, before = memory_available();
    CHECK(!strcmp(bytes_text(text, 5 << 20), "5.0 MiB") && !strcmp(bytes_text(text, some), "64 MiB"));
    CHECK(!strcmp(bytes_text(text, (size_t)2560 << 20), "2.5 GiB"));
    CHECK_OK(memory_fits(some, some, "what", "advice"));
    CHECK_OK(memory_fits(some, SIZE_MAX, "what", "advice"));
    CHECK_ERR(memory_fits(2 * some, some, "what", "advice"),
              "what: 128 MiB of memory needed, 64 MiB available; advice");
    CHECK(before > some);
    if (!CHECK(getrlimit(RLIMIT_AS, &old) == 0 && own_address_space() > 0)) return;
    limit = old, limit.rlim_cur = own_address_space() + some;
    CHECK(setrlimit(RLIMIT_AS, &limit) == 0);
    const size_t within = memory_available();
    CHECK(setrlimit(RLIMIT_AS, &old) == 0);
    CHECK(within <= some && within > some / 2);
    CHECK(memory_available() > some);
}

int main(void) {
    test_errors();
    test_memory();
    test_available();
    test_philox();
    test_streams();
    threads_set(1);
    CHECK(threads_get() == 1);
    return test_report();
}
