/* profiles.h - ICC profiles made by hand: a header, tags, what they hold. */
#ifndef TEST_PROFILES_H
#define TEST_PROFILES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { P3_BYTES = 500, LONG_PROFILE_BYTES = 150000, MOST_PROFILE_BYTES = 1 << 21 };

static inline void put_u32be(uint8_t *p, size_t v) {
    for (int i = 0; i < 4; i++) p[i] = (uint8_t)(v >> (24 - 8 * i));
}

static inline void put_fixed(uint8_t *p, double v) {
    put_u32be(p, (size_t)(uint32_t)(int32_t)floor(v * 65536 + 0.5));
}

typedef enum { CURVE_PARAMETRIC, CURVE_TABLE, CURVE_GAMMA } CurveKind;

/* p (n bytes, 4096 at least unless the curve is parametric) = a profile of these primaries, as D50 sees them, with sRGB's
 * curve or a gamma of 2.2. The rest is filled with what no packer makes smaller. */
static inline void make_profile(uint8_t *p, size_t n, const double xyz[9], CurveKind curve) {
    enum { TAGS = 7, FIRST = 132 + 12 * TAGS, CURVE = FIRST + 60, TABLE = 1024 };
    static const char names[TAGS][5] = {"rXYZ", "gXYZ", "bXYZ", "rTRC", "gTRC", "bTRC", "rest"};
    static const double srgb[5] = {2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045};
    const size_t curve_bytes = curve == CURVE_TABLE ? 12 + 2 * TABLE : curve == CURVE_GAMMA ? 14 : 32;
    const size_t rest = (CURVE + curve_bytes + 3) & ~(size_t)3;
    uint32_t random = 1;
    memset(p, 0, n);
    put_u32be(p, n);
    memcpy(p + 8, "\4\0\0\0mntrRGB XYZ ", 16);
    memcpy(p + 36, "acsp", 4);
    memcpy(p + 68, "\0\0\xf6\xd6\0\1\0\0\0\0\xd3\x2d", 12);
    put_u32be(p + 128, TAGS);
    for (size_t i = 0; i < TAGS; i++) {
        memcpy(p + 132 + 12 * i, names[i], 4);
        put_u32be(p + 136 + 12 * i, i < 3 ? FIRST + 20 * i : i < 6 ? CURVE : rest);
        put_u32be(p + 140 + 12 * i, i < 3 ? 20 : i < 6 ? curve_bytes : n - rest);
    }
    for (size_t i = 0; i < 9; i++) {
        memcpy(p + FIRST + 20 * (i / 3), "XYZ ", 4);
        put_fixed(p + FIRST + 20 * (i / 3) + 8 + 4 * (i % 3), xyz[i]);
    }
    memcpy(p + CURVE, curve == CURVE_PARAMETRIC ? "para\0\0\0\0\0\3\0\0" : "curv\0\0\0\0\0\0\0\1", 12);
    for (size_t i = 0; i < 5 && curve == CURVE_PARAMETRIC; i++) put_fixed(p + CURVE + 12 + 4 * i, srgb[i]);
    if (curve == CURVE_GAMMA) p[CURVE + 12] = 2, p[CURVE + 13] = 51; /* 2 + 51/256 */
    if (curve == CURVE_TABLE) put_u32be(p + CURVE + 8, TABLE);
    for (size_t i = 0; i < TABLE && curve == CURVE_TABLE; i++) {
        const double x = (double)i / (TABLE - 1), y = x <= 0.04045 ? x / 12.92 : pow((x + 0.055) / 1.055, 2.4);
        const size_t v = (size_t)(65535 * y + 0.5);
        p[CURVE + 12 + 2 * i] = (uint8_t)(v >> 8), p[CURVE + 13 + 2 * i] = (uint8_t)v;
    }
    for (size_t i = rest; i < n; i++) p[i] = (uint8_t)((random = random * 1664525 + 1013904223) >> 24);
}

static const double p3_primaries[9] = {0.5151, 0.2412, -0.0011, 0.2920, 0.6922, 0.0419, 0.1571, 0.0666, 0.7841};
static const double srgb_primaries[9] = {0.4360, 0.2225, 0.0139, 0.3851, 0.7169, 0.0971, 0.1431, 0.0606, 0.7141};

#endif
