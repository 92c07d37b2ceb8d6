/* resize.c - pictures of another size, pixel by pixel those of Pillow and OpenCV, and the official preprocessing of each
 * dataset, which turns a picture into a batch row in two steps: prep_resize depends on the picture alone (its result is
 * worth keeping in memory), prep_crop on the random draw. */
#include "files/decode.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static void resize_nearest(Image *out, const Image *in) {
    for (size_t y = 0; y < out->H; y++)
        for (size_t x = 0; x < out->W; x++) {
            size_t from = y * in->H / out->H * in->W + x * in->W / out->W;
            memcpy(out->rgb + (y * out->W + x) * 3, in->rgb + from * 3, 3);
        }
}

/* Exact halving: OpenCV answers INTER_LINEAR with the mean of 2x2 pixels. */
static void resize_half(Image *out, const Image *in) {
    for (size_t y = 0; y < out->H; y++)
        for (size_t x = 0; x < out->W; x++)
            for (size_t c = 0; c < 3; c++) {
                const uint8_t *a = in->rgb + (2 * y * in->W + 2 * x) * 3 + c, *b = a + in->W * 3;
                out->rgb[(y * out->W + x) * 3 + c] = (uint8_t)((a[0] + a[3] + b[0] + b[3] + 2) >> 2);
            }
}

/* Where output pixel i of `out` lies among `in` source pixels, half-pixel centres: pixels at and at+1, weights with
 * LINEAR_BITS fractional bits rounded half to even. Computed in float, as OpenCV does. */
enum { LINEAR_BITS = 11 };
typedef struct {
    ptrdiff_t at; /* -1 and in-1 are possible: clamp */
    int w0, w1;
} LinearTap;
static LinearTap linear_tap(size_t i, size_t in, size_t out) {
    double scale = 1 / ((double)out / (double)in);
    float f = (float)(((double)i + 0.5) * scale - 0.5);
    float whole = floorf(f);
    f -= whole;
    return (LinearTap){(ptrdiff_t)whole, (int)lrintf((1 - f) * (1 << LINEAR_BITS)),
                       (int)lrintf(f * (1 << LINEAR_BITS))};
}

static size_t clamp_index(ptrdiff_t i, size_t n) {
    return i < 0 ? 0 : (size_t)i >= n ? n - 1 : (size_t)i;
}

/* to (out,3) = a source row (in,3) at the column taps, LINEAR_BITS fractional bits. */
static void linear_row(int32_t *to, const uint8_t *row, const LinearTap *tap, size_t in, size_t out) {
    for (size_t x = 0; x < out; x++) {
        const uint8_t *a = row + clamp_index(tap[x].at, in) * 3;
        int inside = tap[x].at >= 0 && (size_t)tap[x].at < in - 1; /* else the edge pixel alone */
        for (size_t c = 0; c < 3; c++)
            to[x * 3 + c] = inside ? a[c] * tap[x].w0 + a[c + 3] * tap[x].w1 : a[c] << LINEAR_BITS;
    }
}

/* Rows first, then columns; the second pass drops bits in the steps in which OpenCV drops them, so that every
 * pixel comes out the same. row[k] holds the horizontal pass of source row have[k]. */
static Err resize_linear(Image *out, const Image *in) {
    LinearTap *tap = NULL;
    int32_t *row[2] = {NULL, NULL};
    Err e = mem_alloc(&tap, out->W, sizeof *tap, "column weights");
    for (int k = 0; k < 2 && e == OK; k++) e = mem_alloc(&row[k], out->W * 3, sizeof *row[k], "a resized row");
    size_t have[2] = {SIZE_MAX, SIZE_MAX};
    for (size_t x = 0; x < out->W && e == OK; x++) tap[x] = linear_tap(x, in->W, out->W);
    for (size_t y = 0; y < out->H && e == OK; y++) {
        LinearTap v = linear_tap(y, in->H, out->H);
        size_t want[2] = {clamp_index(v.at, in->H), clamp_index(v.at + 1, in->H)};
        if (want[0] == have[1]) { /* the lower row of the last line is the upper one of this */
            int32_t *swap = row[0];
            row[0] = row[1], row[1] = swap;
            have[1] = have[0], have[0] = want[0];
        }
        for (int k = 0; k < 2; k++)
            if (have[k] != want[k]) {
                linear_row(row[k], in->rgb + want[k] * in->W * 3, tap, in->W, out->W);
                have[k] = want[k];
            }
        uint8_t *to = out->rgb + y * out->W * 3;
        for (size_t i = 0; i < out->W * 3; i++)
            to[i] = (uint8_t)((((v.w0 * (row[0][i] >> 4)) >> 16) + ((v.w1 * (row[1][i] >> 4)) >> 16) + 2) >> 2);
    }
    free(tap);
    free(row[0]);
    free(row[1]);
    return e;
}

/* Antialiased bicubic along one axis: output i is the weighted sum of n[i] source pixels from first[i]. */
enum { BICUBIC_BITS = 22 };
typedef struct {
    size_t *first, *n; /* (out) */
    size_t most;       /* row stride of weight */
    int32_t *weight;   /* (out, most), BICUBIC_BITS fractional bits, rows sum to about 1 */
} Taps;

/* Keys' cubic with a = -0.5. */
static double cubic(double x) {
    const double a = -0.5;
    x = fabs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

static void taps_free(Taps *t) {
    free(t->first);
    free(t->n);
    free(t->weight);
}

/* One row of weights around source position `centre`; w is scratch (most). */
static void taps_fill(Taps *t, double *w, size_t i, size_t in, double scale) {
    double wide = scale < 1 ? 1 : scale, centre = ((double)i + 0.5) * scale, sum = 0;
    double from = centre - 2 * wide + 0.5, to = centre + 2 * wide + 0.5;
    size_t first = from < 0 ? 0 : (size_t)from, end = to > (double)in ? in : (size_t)to;
    for (size_t k = 0; k < end - first; k++) sum += w[k] = cubic(((double)(first + k) - centre + 0.5) / wide);
    t->first[i] = first;
    t->n[i] = end - first;
    for (size_t k = 0; k < end - first; k++)
        t->weight[i * t->most + k] = (int32_t)round(w[k] / sum * (1 << BICUBIC_BITS));
}

static Err taps_make(Taps *t, size_t in, size_t out) {
    double scale = (double)in / (double)out, *w = NULL;
    *t = (Taps){.most = (size_t)ceil(2 * (scale < 1 ? 1 : scale)) * 2 + 1};
    size_t weights;
    Err e = size_mul(&weights, out, t->most);
    if (e == OK) e = mem_alloc(&t->first, out, sizeof *t->first, "resize taps");
    if (e == OK) e = mem_alloc(&t->n, out, sizeof *t->n, "resize taps");
    if (e == OK) e = mem_alloc(&t->weight, weights, sizeof *t->weight, "resize weights");
    if (e == OK) e = mem_alloc(&w, t->most, sizeof *w, "resize weights");
    for (size_t i = 0; i < out && e == OK; i++) taps_fill(t, w, i, in, scale);
    free(w);
    if (e != OK) taps_free(t);
    return e;
}

static uint8_t clip_bicubic(int32_t v) {
    v >>= BICUBIC_BITS;
    return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
}

/* out (H,out,3) = the rows of in (H,in,3) */
static void bicubic_columns(Image *out, const Image *in, const Taps *t) {
    for (size_t y = 0; y < in->H; y++)
        for (size_t x = 0; x < out->W; x++) {
            const uint8_t *from = in->rgb + (y * in->W + t->first[x]) * 3;
            const int32_t *w = t->weight + x * t->most;
            int32_t sum[3] = {1 << (BICUBIC_BITS - 1), 1 << (BICUBIC_BITS - 1), 1 << (BICUBIC_BITS - 1)};
            for (size_t k = 0; k < t->n[x]; k++, from += 3)
                for (size_t c = 0; c < 3; c++) sum[c] += from[c] * w[k];
            for (size_t c = 0; c < 3; c++) out->rgb[(y * out->W + x) * 3 + c] = clip_bicubic(sum[c]);
        }
}

/* out (out,W,3) = the columns of in (in,W,3); sum (W*3) is scratch */
static void bicubic_rows(Image *out, const Image *in, const Taps *t, int32_t *sum) {
    size_t row = in->W * 3;
    for (size_t y = 0; y < out->H; y++) {
        for (size_t i = 0; i < row; i++) sum[i] = 1 << (BICUBIC_BITS - 1);
        for (size_t k = 0; k < t->n[y]; k++) {
            const uint8_t *from = in->rgb + (t->first[y] + k) * row;
            int32_t w = t->weight[y * t->most + k];
            for (size_t i = 0; i < row; i++) sum[i] += from[i] * w;
        }
        for (size_t i = 0; i < row; i++) out->rgb[y * row + i] = clip_bicubic(sum[i]);
    }
}

/* Columns, then rows, rounded to 8 bits between, each only where the size changes: as Pillow. */
static Err resize_bicubic(Image *out, const Image *in) {
    Taps across = {0}, down = {0};
    Image wide = {0};
    int32_t *sum = NULL;
    Err e = OK;
    if (out->W != in->W) {
        e = taps_make(&across, in->W, out->W);
        if (e == OK && out->H != in->H) e = image_alloc(&wide, in->H, out->W);
        if (e == OK) bicubic_columns(out->H != in->H ? &wide : out, in, &across);
    }
    if (e == OK && out->H != in->H) {
        e = taps_make(&down, in->H, out->H);
        if (e == OK) e = mem_alloc(&sum, out->W * 3, sizeof *sum, "a resized row");
        if (e == OK) bicubic_rows(out, out->W != in->W ? &wide : in, &down, sum);
    }
    if (across.weight) taps_free(&across);
    if (down.weight) taps_free(&down);
    image_free(&wide);
    free(sum);
    return e;
}

Err image_resize(Image *out, const Image *in, size_t H, size_t W, Filter filter) {
    if (in->H < 1 || in->W < 1) return err("resizing an empty picture");
    TRY(image_alloc(out, H, W));
    Err e = OK;
    if (H == in->H && W == in->W)
        memcpy(out->rgb, in->rgb, H * W * 3);
    else if (filter == FILTER_NEAREST)
        resize_nearest(out, in);
    else if (filter == FILTER_LINEAR && in->H == 2 * H && in->W == 2 * W)
        resize_half(out, in);
    else
        e = filter == FILTER_LINEAR ? resize_linear(out, in) : resize_bicubic(out, in);
    if (e != OK) image_free(out);
    return e;
}

/* ------------------------------------------------------------------------------------------------------------
 * Preprocessing (SPEC section 10)
 * ---------------------------------------------------------------------------------------------------------- */

/* out = the centre square of im; odd remainders leave the larger part below and on the right. */
static Err centre_square(Image *out, const Image *im) {
    size_t side = im->H < im->W ? im->H : im->W;
    size_t y0 = (im->H - side) / 2, x0 = (im->W - side) / 2;
    TRY(image_alloc(out, side, side));
    for (size_t y = 0; y < side; y++) memcpy(out->rgb + y * side * 3, im->rgb + ((y0 + y) * im->W + x0) * 3, side * 3);
    return OK;
}

Err prep_read(Prep *out, const Config *c) {
    static const char *const names[] = {"folder", "ffhq", "imagenet", "lsun"};
    const char *name = config_get(c, "data.", "prep");
    *out = PREP_FOLDER;
    for (int k = 0; name && k < 4; k++)
        if (!strcmp(name, names[k])) return *out = (Prep)k, OK;
    return name ? err("data.prep %.200s: expected folder, ffhq, imagenet or lsun", name) : OK;
}

Err prep_resize(Image *out, const Image *im, Prep prep, size_t size) {
    if (prep == PREP_FFHQ || prep == PREP_IMAGENET) {
        double scale = (double)size / (double)(im->H < im->W ? im->H : im->W);
        return image_resize(out, im, (size_t)rint((double)im->H * scale), (size_t)rint((double)im->W * scale),
                            FILTER_LINEAR); /* rint: half to even, as Python's round */
    }
    Image square;
    TRY(centre_square(&square, im));
    Err e = image_resize(out, &square, size, size, FILTER_BICUBIC);
    image_free(&square);
    return e;
}

static size_t crop_offset(size_t spare, double u) {
    return u < 0 ? spare / 2 : (size_t)((double)spare * u);
}

void prep_crop(real *out, const Image *im, size_t size, double u_y, double u_x, int flip) {
    real value[256];
    for (int i = 0; i < 256; i++) value[i] = (real)(i / 127.5 - 1);
    size_t y0 = crop_offset(im->H - size, u_y), x0 = crop_offset(im->W - size, u_x);
    for (size_t c = 0; c < 3; c++)
        for (size_t y = 0; y < size; y++) {
            const uint8_t *row = im->rgb + ((y0 + y) * im->W + x0) * 3 + c;
            for (size_t x = 0; x < size; x++) *out++ = value[row[(flip ? size - 1 - x : x) * 3]];
        }
}

Err image_prepare(real *out, const Image *im, Prep prep, size_t size, double u_crop_y, double u_crop_x, int flip) {
    if (!(u_crop_y < 1 && u_crop_x < 1)) return err("crop position %g, %g: below 1 expected", u_crop_y, u_crop_x);
    if (size < 1 || size > IMAGE_MAX_SIDE) return err("size %zu: 1..%d expected", size, IMAGE_MAX_SIDE);
    if (im->H < 1 || im->W < 1) return err("preparing an empty picture");
    Image resized;
    TRY(prep_resize(&resized, im, prep, size));
    prep_crop(out, &resized, size, u_crop_y, u_crop_x, flip);
    image_free(&resized);
    return OK;
}
