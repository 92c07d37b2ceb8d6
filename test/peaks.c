/* peaks.c - for bench.c: what the units for products of bf16 and of int8 can do at most, on registers alone. */
#include "test/peaks.h"
#include "kernels/tiles.h"

#include <time.h>

#if HAVE_TILES && !defined(TILES_IN_C)
#define TILES 1
#endif

#if TILES || defined(__AVX512BF16__)
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

enum { STEPS = 10000 };
#endif

#if TILES
enum { TILE_NUMBERS = 1024 }; /* its bytes */

/* Two tiles of A with two of B, four sums, as kernels/bf16.h multiplies. Both kinds take as long whatever the numbers are,
 * but for zeros, with which clocks may be higher. */
static double tile_rate(int int8, double seconds) {
    static const uint16_t ones[TILE_NUMBERS / 2] __attribute__((aligned(64))) = {[0 ... TILE_NUMBERS / 2 - 1] = 0x3f81};
    const double products = 4.0 * 16 * 16 * (int8 ? 64 : 32);
    double best = 0;
    tiles_begin(16);
    tile_load(4, ones, 64);
    tile_load(5, ones, 64);
    tile_load(6, ones, 64);
    tile_load(7, ones, 64);
    for (const double end = now() + seconds; now() < end;) {
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
        const double begin = now();
        for (int s = 0; s < STEPS; s++)
            if (int8) {
                _tile_dpbssd(0, 6, 4);
                _tile_dpbssd(1, 6, 5);
                _tile_dpbssd(2, 7, 4);
                _tile_dpbssd(3, 7, 5);
            } else {
                tile_add_product(0, 6, 4);
                tile_add_product(1, 6, 5);
                tile_add_product(2, 7, 4);
                tile_add_product(3, 7, 5);
            }
        const double rate = STEPS * products / (now() - begin);
        if (rate > best) best = rate;
    }
    tiles_end();
    return 2 * best;
}
#endif

#if defined(__AVX512BF16__)
/* As many independent chains as there are registers for, and more than the unit has stages. */
static double vector_rate(double seconds, float *sink) {
    enum { CHAINS = 16 };
    const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f813f7f), b = (__m512bh)_mm512_set1_epi32(0x3f7e3f83);
    __m512 sum[CHAINS];
    double best = 0;
    for (int c = 0; c < CHAINS; c++) sum[c] = _mm512_set1_ps(0.1f * (float)c);
    for (const double end = now() + seconds; now() < end;) {
        const double begin = now();
        for (int s = 0; s < STEPS; s++)
            for (int c = 0; c < CHAINS; c++) {
                sum[c] = _mm512_dpbf16_ps(sum[c], a, b);
                __asm__("" : "+v"(sum[c])); /* one by one: nothing is known of them */
            }
        const double rate = 2.0 * STEPS * CHAINS * 32 / (now() - begin);
        if (rate > best) best = rate;
    }
    for (int c = 0; c < CHAINS; c++) *sink += _mm512_reduce_add_ps(sum[c]);
    return best;
}
#endif

double bf16_peak(double seconds, float *sink, const char **unit) {
    (void)seconds, (void)sink;
    *unit = "";
#if TILES
    *unit = "AMX";
    if (tiles_here()) return tile_rate(0, seconds);
#endif
#if defined(__AVX512BF16__)
    *unit = "vdpbf16ps";
    return vector_rate(seconds, sink);
#else
    return 0;
#endif
}

double int8_peak(double seconds) {
    (void)seconds;
#if TILES
    if (tiles_here()) return tile_rate(1, seconds);
#endif
    return 0;
}
