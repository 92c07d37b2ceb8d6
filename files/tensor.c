/* tensor.c - the formats of numbers in files. */
#include "files/files.h"

#include <string.h>

static const struct {
    const char *name;
    size_t bits;
} dtypes[DT_COUNT] = {[DT_F64] = {"F64", 64},
                      [DT_F32] = {"F32", 32},
                      [DT_F16] = {"F16", 16},
                      [DT_BF16] = {"BF16", 16},
                      [DT_I64] = {"I64", 64},
                      [DT_I32] = {"I32", 32},
                      [DT_I16] = {"I16", 16},
                      [DT_I8] = {"I8", 8},
                      [DT_U8] = {"U8", 8},
                      [DT_BOOL] = {"BOOL", 8},
                      [DT_U64] = {"U64", 64},
                      [DT_U32] = {"U32", 32},
                      [DT_U16] = {"U16", 16},
                      [DT_C64] = {"C64", 64},
                      [DT_F8_E5M2] = {"F8_E5M2", 8},
                      [DT_F8_E4M3] = {"F8_E4M3", 8},
                      [DT_F8_E5M2FNUZ] = {"F8_E5M2FNUZ", 8},
                      [DT_F8_E4M3FNUZ] = {"F8_E4M3FNUZ", 8},
                      [DT_F8_E8M0] = {"F8_E8M0", 8},
                      [DT_F6_E2M3] = {"F6_E2M3", 6},
                      [DT_F6_E3M2] = {"F6_E3M2", 6},
                      [DT_F4] = {"F4", 4},
                      [DT_C32] = {"C32", 32},
                      [DT_C128] = {"C128", 128},
                      [DT_OTHER] = {"an object other than a plain tensor", 8}};

size_t dtype_bits(Dtype d) {
    return (unsigned)d < DT_COUNT ? dtypes[d].bits : 0;
}
size_t dtype_size(Dtype d) {
    return dtype_bits(d) / 8;
}
const char *dtype_name(Dtype d) {
    return (unsigned)d < DT_COUNT ? dtypes[d].name : "?";
}
size_t tensor_bytes(const Tensor *x) {
    return x->size / 8 * dtype_bits(x->dtype) + x->size % 8 * dtype_bits(x->dtype) / 8;
}

Err dtype_of_store(Dtype *out, const char *name) {
    static const char *const names[] = {"f32", "f16", "bf16"};
    static const Dtype types[] = {DT_F32, DT_F16, DT_BF16};
    for (int k = 0; k < 3; k++)
        if (!strcmp(name, names[k])) return *out = types[k], OK;
    return err("%.200s: expected f32, f16 or bf16", name);
}

/* x in a 16-bit format of 1 sign bit, 15 - m exponent bits and m mantissa bits (F16: m = 10, BF16: m = 7), rounded to
 * nearest, ties to even. From double in one step: two roundings in a row can differ from one. */
static uint16_t narrow(double x, int m) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    const int top = (1 << (15 - m)) - 1; /* exponent field of infinity and NaN; bias = top / 2 */
    const uint64_t sign = bits >> 63 << 15, fraction = bits & ((UINT64_C(1) << 52) - 1), infinity = (uint64_t)top << m;
    const int field = (int)(bits >> 52 & 0x7ff), e = field - 1023 + top / 2;
    if (field == 0x7ff && fraction) return (uint16_t)(sign | infinity | UINT64_C(1) << (m - 1));
    if (e >= top) return (uint16_t)(sign | infinity);

    /* Below the smallest normal number (e < 1) the quantum stays the same and more bits go. The leading 1 of the
     * significand adds one to the exponent field, and so does a carry from rounding: up to infinity. */
    const int drop = 52 - m + (e < 1 ? 1 - e : 0);
    if (field == 0 || drop > 53) return (uint16_t)sign;
    const uint64_t significand = fraction | UINT64_C(1) << 52, kept = significand >> drop;
    const uint64_t rest = significand & ((UINT64_C(1) << drop) - 1), half = UINT64_C(1) << (drop - 1);
    const uint64_t rounded = kept + (rest > half || (rest == half && (kept & 1)));
    return (uint16_t)(sign | (((uint64_t)(e < 1 ? 0 : e - 1) << m) + rounded));
}

static float from_half(uint16_t h) {
    const uint32_t sign = (uint32_t)(h >> 15) << 31, e = h >> 10 & 31, fraction = h & 1023;
    float magnitude = (float)fraction * (1.0f / 16777216); /* e = 0: multiples of 2^-24 */
    uint32_t bits;
    memcpy(&bits, &magnitude, sizeof bits);
    if (e) bits = (e == 31 ? 255 : e - 15 + 127) << 23 | fraction << 13;
    bits |= sign;
    memcpy(&magnitude, &bits, sizeof bits);
    return magnitude;
}

/* out[i] = expression of v, the i-th element of `type` at p; memcpy because mapped data may be unaligned */
#define EACH(type, expression)                                                                                         \
    for (size_t i = 0; i < x->size; i++) {                                                                             \
        type v;                                                                                                        \
        memcpy(&v, p + i * sizeof v, sizeof v);                                                                        \
        out[i] = (real)(expression);                                                                                   \
    }                                                                                                                  \
    break

void tensor_to_reals(const Tensor *x, real *out) {
    const unsigned char *p = (const unsigned char *)x->data;
    switch (x->dtype) {
    case DT_F64: EACH(double, v);
    case DT_F32: EACH(float, v);
    case DT_F16: EACH(uint16_t, from_half(v));
    case DT_BF16: EACH(uint16_t, bf16_to_float(v));
    case DT_I64: EACH(int64_t, v);
    case DT_I32: EACH(int32_t, v);
    case DT_I16: EACH(int16_t, v);
    case DT_I8: EACH(int8_t, v);
    case DT_U8: EACH(uint8_t, v);
    case DT_BOOL: EACH(uint8_t, v != 0);
    case DT_U64: EACH(uint64_t, v);
    case DT_U32: EACH(uint32_t, v);
    case DT_U16: EACH(uint16_t, v);
    default: break; /* checkpoint_shaped refuses them */
    }
}
#undef EACH

/* out = n reals as elements of dtype d, one of F64 F32 F16 BF16 */
void tensor_from_reals(unsigned char *out, Dtype d, const real *x, size_t n) {
    const size_t width = dtype_size(d);
    for (size_t i = 0; i < n; i++) {
        double f64 = (double)x[i];
        float f32 = (float)f64;
        uint16_t u16 = width == 2 ? narrow(f64, d == DT_F16 ? 10 : 7) : 0;
        memcpy(out + i * width, width == 8 ? (void *)&f64 : width == 4 ? (void *)&f32 : (void *)&u16, width);
    }
}
