/* digest.c - SHA-256 (FIPS 180-4) and MD5 (RFC 1321) of a file, to tell whether weights are the ones that others
 * publish under such a number. Nothing here is about secrets.
 *
 * Both read blocks of 64 bytes, the last one ending with a 1 bit, zeros and the length; they differ in the order of
 * bytes in a word and in what a block does to the state. */
#include "files/files.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    DigestKind kind;
    uint32_t state[8], constant[64];
} Digest;

static uint32_t rotated_left(uint32_t x, unsigned n) {
    return x << n | x >> (32 - n);
}

static uint32_t fraction_bits(double x) { /* the first 32 after the point */
    return (uint32_t)((x - floor(x)) * 4294967296.0);
}

static void digest_start(Digest *d, DigestKind kind) {
    static const uint32_t md5_state[4] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476};
    d->kind = kind;
    if (kind == DIGEST_MD5) memcpy(d->state, md5_state, sizeof md5_state);
    for (int i = 0; i < 64 && kind == DIGEST_MD5; i++) d->constant[i] = (uint32_t)(fabs(sin(i + 1)) * 4294967296.0);
    if (kind == DIGEST_MD5) return;
    for (int i = 0, prime = 2; i < 64; prime++) { /* of the roots of the first 64 primes */
        int divisor = 2;
        while (divisor < prime && prime % divisor) divisor++;
        if (divisor < prime) continue;
        if (i < 8) d->state[i] = fraction_bits(sqrt(prime));
        d->constant[i++] = fraction_bits(cbrt(prime));
    }
}

static void sha256_block(Digest *d, const uint8_t *block) {
    uint32_t w[64];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)block[4 * i] << 24 | (uint32_t)block[4 * i + 1] << 16 | (uint32_t)block[4 * i + 2] << 8 |
               block[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        const uint32_t x = w[i - 15], y = w[i - 2];
        w[i] = w[i - 16] + w[i - 7] + (rotated_left(x, 25) ^ rotated_left(x, 14) ^ x >> 3) +
               (rotated_left(y, 15) ^ rotated_left(y, 13) ^ y >> 10);
    }
    uint32_t a = d->state[0], b = d->state[1], c = d->state[2], e = d->state[3]; /* a, b, c, d of the standard */
    uint32_t f = d->state[4], g = d->state[5], h = d->state[6], last = d->state[7];
    for (int i = 0; i < 64; i++) {
        const uint32_t t = last + (rotated_left(f, 26) ^ rotated_left(f, 21) ^ rotated_left(f, 7)) +
                           ((f & g) ^ (~f & h)) + d->constant[i] + w[i];
        const uint32_t u =
            (rotated_left(a, 30) ^ rotated_left(a, 19) ^ rotated_left(a, 10)) + ((a & b) ^ (a & c) ^ (b & c));
        last = h, h = g, g = f, f = e + t, e = c, c = b, b = a, a = t + u;
    }
    const uint32_t s[8] = {a, b, c, e, f, g, h, last};
    for (int i = 0; i < 8; i++) d->state[i] += s[i];
}

static void md5_block(Digest *d, const uint8_t *block) {
    static const unsigned turn[4][4] = {{7, 12, 17, 22}, {5, 9, 14, 20}, {4, 11, 16, 23}, {6, 10, 15, 21}};
    uint32_t s[4];
    memcpy(s, d->state, sizeof s);
    for (int i = 0; i < 64; i++) {
        const uint32_t b = s[1], c = s[2], e = s[3];
        const int round = i / 16, at = 4 * ((round == 0   ? i
                                             : round == 1 ? 5 * i + 1
                                             : round == 2 ? 3 * i + 5
                                                          : 7 * i) %
                                            16);
        const uint32_t word = (uint32_t)block[at] | (uint32_t)block[at + 1] << 8 | (uint32_t)block[at + 2] << 16 |
                              (uint32_t)block[at + 3] << 24;
        const uint32_t mixed = round == 0   ? (b & c) | (~b & e)
                               : round == 1 ? (e & b) | (~e & c)
                               : round == 2 ? b ^ c ^ e
                                            : c ^ (b | ~e);
        const uint32_t next = b + rotated_left(s[0] + mixed + d->constant[i] + word, turn[round][i % 4]);
        s[0] = e, s[3] = c, s[2] = b, s[1] = next;
    }
    for (int i = 0; i < 4; i++) d->state[i] += s[i];
}

static void digest_block(Digest *d, const uint8_t *block) {
    if (d->kind == DIGEST_MD5)
        md5_block(d, block);
    else
        sha256_block(d, block);
}

/* The rest of the file, n < 64 bytes, and the padding; bytes: of the whole file. */
static void digest_end(Digest *d, const uint8_t *rest, size_t n, uint64_t bytes) {
    uint8_t last[128] = {0};
    const size_t size = n < 56 ? 64 : 128;
    memcpy(last, rest, n);
    last[n] = 0x80;
    for (int i = 0; i < 8; i++)
        last[size - 8 + (size_t)i] = (uint8_t)(bytes * 8 >> 8 * (d->kind == DIGEST_MD5 ? i : 7 - i));
    for (size_t i = 0; i < size; i += 64) digest_block(d, last + i);
}

static void digest_text(char out[DIGEST_TEXT_BYTES], const Digest *d) {
    for (int i = 0; i < (d->kind == DIGEST_MD5 ? 16 : 32); i++) {
        const int shift = 8 * (d->kind == DIGEST_MD5 ? i % 4 : 3 - i % 4);
        snprintf(out + 2 * i, 3, "%02x", (unsigned)(d->state[i / 4] >> shift & 255));
    }
}

Err file_digest(char out[DIGEST_TEXT_BYTES], const char *path, DigestKind kind) {
    enum { AT_ONCE = 1 << 16 };
    uint8_t *buffer;
    uint64_t bytes = 0;
    size_t n;
    Digest d;
    FILE *f = fopen(path, "rb");
    if (!f) return err("%s: %s", path, strerror(errno));
    if (mem_alloc(&buffer, AT_ONCE, 1, "a part of a file") != OK) return fclose(f), FAILED;
    digest_start(&d, kind);
    while ((n = fread(buffer, 1, AT_ONCE, f)) == AT_ONCE) {
        for (size_t i = 0; i < n; i += 64) digest_block(&d, buffer + i);
        bytes += n;
    }
    Err e = ferror(f) ? err("%s: %s", path, strerror(errno)) : OK;
    for (size_t i = 0; i + 64 <= n; i += 64) digest_block(&d, buffer + i);
    digest_end(&d, buffer + n / 64 * 64, n % 64, bytes + n);
    digest_text(out, &d);
    fclose(f);
    free(buffer);
    return e;
}
