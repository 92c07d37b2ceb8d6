/* bits.h - short functions of single numbers, written once for C and CUDA: random bits, hashes, bf16, the tail of N(0,1).
 *
 * They are inline because their callers are inner loops. base.h includes this file. */
#ifndef BITS_H
#define BITS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define BITS_FUNCTION static __host__ __device__ inline
#else
#define BITS_FUNCTION static inline
#endif

/* Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a keyed bijection
 * of a 128-bit counter, out = f(key = seed, counter = (stream, index)). Any number of a stream can be asked for in any
 * order, so results depend neither on threads nor on batch order. */
BITS_FUNCTION void philox(uint32_t out[4], uint64_t seed, uint64_t stream, uint64_t index) {
    uint32_t c[4] = {(uint32_t)index, (uint32_t)(index >> 32), (uint32_t)stream, (uint32_t)(stream >> 32)};
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
        const uint32_t n0 = (uint32_t)(b >> 32) ^ c[1] ^ key0, n2 = (uint32_t)(a >> 32) ^ c[3] ^ key1;
        c[1] = (uint32_t)b, c[3] = (uint32_t)a, c[0] = n0, c[2] = n2;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u; /* golden ratio and sqrt(3)-1: the published Weyl constants */
    }
    for (int k = 0; k < 4; k++) out[k] = c[k];
}

/* 64 random bits as a number in [0,1): the upper 53 of them. */
BITS_FUNCTION double unit_of_bits(uint32_t high, uint32_t low) {
    return (double)(((uint64_t)high << 32 | low) >> 11) * 0x1p-53;
}

/* P(z > a) for z ~ N(0,1), a >= 0, from bell = exp(-a^2/2): bell u w(u) with u = 1/(1+0.26a), and w a polynomial fitted
 * to 6e-9 relative by Chebyshev interpolation on 0 <= a <= 9. */
BITS_FUNCTION float normal_tail(float a, float bell) {
    const float w[9] = {0.10379182f,  0.10251124f, 0.10634528f,  0.038958745f, 0.18764427f,
                        -0.18772396f, 0.28233662f, -0.16725112f, 0.033387092f};
    float u = 1 / (1 + 0.26f * a), sum = w[8];
    for (int k = 7; k >= 0; k--) sum = sum * u + w[k];
    return bell * u * sum;
}

/* 64 random bits as a whole number in 0..below-1: the high word of their product with `below` (Lemire). Biased by less
 * than below/2^64. */
static inline uint64_t below_of_bits(uint32_t high, uint32_t low, uint64_t below) {
    return (uint64_t)((unsigned __int128)((uint64_t)high << 32 | low) * below >> 64);
}

/* FNV-1a: h = (h ^ byte) * prime for every byte, from FNV_START on. Bytes can come in pieces. */
#define FNV_START UINT64_C(0xcbf29ce484222325)
#define FNV_PRIME UINT64_C(0x100000001b3)
static inline uint64_t fnv1a(uint64_t h, const void *bytes, size_t n) {
    const unsigned char *p = (const unsigned char *)bytes;
    for (size_t i = 0; i < n; i++) h = (h ^ p[i]) * FNV_PRIME;
    return h;
}

/* bf16 is the upper half of a float. Rounded to the nearest, ties to even; a NaN stays one. */
static inline uint16_t bf16_from_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1);
    return (uint16_t)((x == x ? rounded : bits | 0x400000u) >> 16);
}

static inline float bf16_to_float(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

#endif
