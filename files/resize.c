/* resize.c - pictures of another size, pixel by pixel those of Pillow and OpenCV, and the official preprocessing of each
 * dataset, which turns a picture into a batch row in two steps: prep_resize depends on the picture alone (its result is
 * worth keeping in memory), prep_crop on the random draw.
 *
 * Every filter is a weighted sum across, then one down, in whole numbers. So a Resizer takes a picture row by row, as a
 * decoder gives it, in any order, and a row in parts, as interlaced files have them: a pixel that is not there yet is 0,
 * and adds nothing. What it keeps is as wide as the result, so that the whole picture is never in memory. */
#include "files/decode.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------------------------------------------------------
 * Across: which source pixels an output pixel is the sum of
 * ---------------------------------------------------------------------------------------------------------- */

typedef enum {
    MODE_PICK,   /* one source pixel: the nearest, or the same where the size stays */
    MODE_HALF,   /* OpenCV answers INTER_LINEAR for exactly half with the mean of 2x2 pixels */
    MODE_LINEAR, /* of two */
    MODE_BICUBIC /* of all that the filter reaches */
} Mode;

static Mode mode_of(const Fit *f) {
    if (f->filter == FILTER_NEAREST || (f->H == f->h && f->W == f->w)) return MODE_PICK;
    if (f->filter == FILTER_BICUBIC) return MODE_BICUBIC;
    return f->h == 2 * f->H && f->w == 2 * f->W ? MODE_HALF : MODE_LINEAR;
}

/* Output i is the weighted sum of n[i] source pixels from first[i]. */
typedef struct {
    size_t *first, *n; /* (out) */
    size_t most;       /* row stride of weight */
    int32_t *weight;   /* (out, most); fractional bits by Mode, rows sum to about 1 */
} Taps;

static void taps_free(Taps *t) {
    free(t->first);
    free(t->n);
    free(t->weight);
    *t = (Taps){0};
}

static Err taps_alloc(Taps *t, size_t out, size_t most) {
    size_t weights;
    t->most = most;
    TRY(size_mul(&weights, out, most));
    TRY(mem_alloc(&t->first, out, sizeof *t->first, "resize taps"));
    TRY(mem_alloc(&t->n, out, sizeof *t->n, "resize taps"));
    return mem_alloc(&t->weight, weights, sizeof *t->weight, "resize weights");
}

static size_t clamp_index(ptrdiff_t i, size_t n) {
    return i < 0 ? 0 : (size_t)i >= n ? n - 1 : (size_t)i;
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

static void taps_fill_linear(Taps *t, size_t i, size_t in, size_t out) {
    const LinearTap tap = linear_tap(i, in, out);
    const int inside = tap.at >= 0 && (size_t)tap.at < in - 1; /* else the edge pixel alone */
    t->first[i] = clamp_index(tap.at, in);
    t->n[i] = inside ? 2 : 1;
    t->weight[i * t->most] = inside ? tap.w0 : 1 << LINEAR_BITS;
    if (inside) t->weight[i * t->most + 1] = tap.w1;
}

/* Antialiased: the filter is as much wider as the picture becomes smaller. */
enum { BICUBIC_BITS = 22 };

/* Keys' cubic with a = -0.5. */
static double cubic(double x) {
    const double a = -0.5;
    x = fabs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/* One row of weights around source position `centre`; w is scratch (most). */
static void taps_fill_bicubic(Taps *t, double *w, size_t i, size_t in, double scale) {
    double wide = scale < 1 ? 1 : scale, centre = ((double)i + 0.5) * scale, sum = 0;
    double from = centre - 2 * wide + 0.5, to = centre + 2 * wide + 0.5;
    size_t first = from < 0 ? 0 : (size_t)from, end = to > (double)in ? in : (size_t)to;
    for (size_t k = 0; k < end - first; k++) sum += w[k] = cubic(((double)(first + k) - centre + 0.5) / wide);
    t->first[i] = first;
    t->n[i] = end - first;
    for (size_t k = 0; k < end - first; k++)
        t->weight[i * t->most + k] = (int32_t)round(w[k] / sum * (1 << BICUBIC_BITS));
}

static Err taps_bicubic(Taps *t, size_t in, size_t out) {
    double scale = (double)in / (double)out, *w = NULL;
    TRY(taps_alloc(t, out, (size_t)ceil(2 * (scale < 1 ? 1 : scale)) * 2 + 1));
    TRY(mem_alloc(&w, t->most, sizeof *w, "resize weights"));
    for (size_t i = 0; i < out; i++) taps_fill_bicubic(t, w, i, in, scale);
    free(w);
    return OK;
}

/* *t is zero before; after an error too it is taps_free's. */
static Err taps_make(Taps *t, Mode mode, size_t in, size_t out) {
    if (mode == MODE_BICUBIC && in != out) return taps_bicubic(t, in, out);
    TRY(taps_alloc(t, out, 2));
    for (size_t i = 0; i < out; i++) {
        if (mode == MODE_LINEAR) {
            taps_fill_linear(t, i, in, out);
            continue;
        }
        t->first[i] = i * in / out;
        t->n[i] = mode == MODE_HALF ? 2 : 1;
        t->weight[2 * i] = mode == MODE_BICUBIC ? 1 << BICUBIC_BITS : 1;
        t->weight[2 * i + 1] = 1;
    }
    return OK;
}

/* sum (out,3) += the taps of a row (in,3) */
static void add_across(int32_t *sum, const uint8_t *row, const Taps *t, size_t out) {
    for (size_t x = 0; x < out; x++, sum += 3) {
        const uint8_t *from = row + t->first[x] * 3;
        const int32_t *w = t->weight + x * t->most;
        int32_t s[3] = {0, 0, 0};
        for (size_t k = 0; k < t->n[x]; k++, from += 3)
            for (size_t c = 0; c < 3; c++) s[c] += from[c] * w[k];
        for (size_t c = 0; c < 3; c++) sum[c] += s[c];
    }
}

/* ------------------------------------------------------------------------------------------------------------
 * Row by row
 * ---------------------------------------------------------------------------------------------------------- */

struct Resizer {
    Fit fit; /* of the upright picture */
    Mode mode;
    int orientation;
    size_t file_H, file_W;
    uint8_t *mirrored; /* (file_W,3) */
    Taps across;
    size_t *slot; /* (h) which of the kept rows a source row is; NONE: no output row needs it */
    size_t slots;
    int32_t *sum;  /* (slots, 3 W) what lies across, or one row of it where `wide` keeps them; sideways (W, 3 h) */
    uint8_t *wide; /* (slots, 3 W) the same rounded to 8 bits, as Pillow does between the two directions */
};

/* Columns of the file are rows of the picture: a row of the file adds to all rows, so that all are kept. */
static int is_sideways(int orientation) {
    return orientation >= 5;
}

/* Which source rows are kept. */
static void choose_slots(Resizer *r) {
    const Fit *f = &r->fit;
    const int all = r->mode == MODE_HALF || r->mode == MODE_BICUBIC || is_sideways(r->orientation);
    for (size_t y = 0; y < f->h; y++) r->slot[y] = all ? 0 : NONE;
    for (size_t y = 0; y < f->H; y++) {
        if (r->mode == MODE_PICK) r->slot[y * f->h / f->H] = 0;
        if (r->mode != MODE_LINEAR) continue;
        const LinearTap tap = linear_tap(y, f->h, f->H);
        r->slot[clamp_index(tap.at, f->h)] = r->slot[clamp_index(tap.at + 1, f->h)] = 0;
    }
    for (size_t y = 0; y < f->h; y++)
        if (r->slot[y] != NONE) r->slot[y] = r->slots++;
}

/* Whether a row is complete when it comes, and can be rounded. */
static int rounds_at_once(Mode mode, int parts, int orientation) {
    return mode == MODE_BICUBIC && !parts && !is_sideways(orientation);
}

size_t resizer_bytes(const Fit *f, int parts, int orientation) {
    const Mode mode = mode_of(f);
    const size_t rows = mode == MODE_PICK ? f->H : mode == MODE_LINEAR ? min_size(f->h, 2 * f->H) : f->h;
    const size_t row = f->W * 3 * (rounds_at_once(mode, parts, orientation) ? 1 : sizeof(int32_t));
    return rows * row * (is_sideways(orientation) ? 2 : 1) + f->H * f->W * 3;
}

Err resizer_start(Resizer **out, const Fit *f, size_t file_H, size_t file_W, int parts, int orientation) {
    Resizer *r;
    TRY(mem_alloc(&r, 1, sizeof *r, "a resizer"));
    *r = (Resizer){.fit = *f, .mode = mode_of(f), .orientation = orientation, .file_H = file_H, .file_W = file_W};
    const int rounded = rounds_at_once(r->mode, parts, orientation);
    Err e = mem_alloc(&r->slot, f->h, sizeof *r->slot, "rows to resize");
    if (e == OK) choose_slots(r);
    if (e == OK) e = taps_make(&r->across, r->mode, f->w, f->W);
    if (e == OK) e = mem_alloc(&r->sum, (rounded ? 1 : r->slots) * f->W, 3 * sizeof *r->sum, "rows to resize");
    if (e == OK && rounded) e = mem_alloc(&r->wide, r->slots * f->W, 3, "rows to resize");
    if (e == OK && orientation > 1) e = mem_alloc(&r->mirrored, file_W, 3, "a row of a picture");
    if (e == OK)
        *out = r;
    else
        resizer_free(r);
    return e;
}

void resizer_free(Resizer *r) {
    if (!r) return;
    taps_free(&r->across);
    free(r->mirrored);
    free(r->slot);
    free(r->sum);
    free(r->wide);
    free(r);
}

static uint8_t clip_bicubic(int32_t v) {
    v = (v + (1 << (BICUBIC_BITS - 1))) >> BICUBIC_BITS;
    return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
}

/* A row of the upright picture. */
static void add_row(Resizer *r, size_t y, const uint8_t *rgb) {
    const Fit *f = &r->fit;
    const size_t width = 3 * f->W;
    if (y < f->y0 || y - f->y0 >= f->h || r->slot[y - f->y0] == NONE) return;
    const size_t slot = r->slot[y - f->y0];
    int32_t *sum = r->wide ? r->sum : r->sum + slot * width;
    if (r->wide) memset(sum, 0, width * sizeof *sum);
    add_across(sum, rgb + 3 * f->x0, &r->across, f->W);
    for (size_t i = 0; r->wide && i < width; i++) r->wide[slot * width + i] = clip_bicubic(sum[i]);
}

/* A column of it. */
static void add_column(Resizer *r, size_t x, const uint8_t *rgb) {
    const Fit *f = &r->fit;
    const Taps *t = &r->across;
    if (x < f->x0 || x - f->x0 >= f->w) return;
    x -= f->x0, rgb += 3 * f->y0;
    for (size_t i = 0; i < f->W; i++) {
        if (x < t->first[i] || x - t->first[i] >= t->n[i]) continue;
        const int32_t w = t->weight[i * t->most + x - t->first[i]];
        int32_t *sum = r->sum + i * 3 * f->h;
        for (size_t k = 0; k < 3 * f->h; k++) sum[k] += w * rgb[k];
    }
}

void resizer_row(Resizer *r, size_t y, const uint8_t *rgb) {
    const int o = r->orientation;
    if (o == 3 || o == 4 || o == 6 || o == 7) y = r->file_H - 1 - y; /* as is image_place of pixels.c */
    if (o == 2 || o == 3 || o == 7 || o == 8) {
        for (size_t x = 0; x < r->file_W; x++) memcpy(r->mirrored + 3 * x, rgb + 3 * (r->file_W - 1 - x), 3);
        rgb = r->mirrored;
    }
    if (is_sideways(o))
        add_column(r, y, rgb);
    else
        add_row(r, y, rgb);
}

/* sum (W, 3 h) becomes (h, 3 W) */
static Err lay_down(Resizer *r) {
    const size_t W = r->fit.W, h = r->fit.h;
    int32_t *sum;
    TRY(mem_alloc(&sum, h * W, 3 * sizeof *sum, "rows to resize"));
    for (size_t y = 0; y < h; y++)
        for (size_t x = 0; x < W; x++) memcpy(sum + 3 * (y * W + x), r->sum + 3 * (x * h + y), 3 * sizeof *sum);
    free(r->sum);
    r->sum = sum;
    return OK;
}

/* Down: the second pass drops bits in the steps in which OpenCV drops them, so that every pixel comes out the same. */
static void down_linear(Image *out, const Resizer *r) {
    const size_t width = 3 * out->W, h = r->fit.h;
    for (size_t y = 0; y < out->H; y++) {
        const LinearTap v = linear_tap(y, h, out->H);
        const int32_t *a = r->sum + r->slot[clamp_index(v.at, h)] * width;
        const int32_t *b = r->sum + r->slot[clamp_index(v.at + 1, h)] * width;
        uint8_t *to = out->rgb + y * width;
        for (size_t i = 0; i < width; i++)
            to[i] = (uint8_t)((((v.w0 * (a[i] >> 4)) >> 16) + ((v.w1 * (b[i] >> 4)) >> 16) + 2) >> 2);
    }
}

static void down_pick(Image *out, const Resizer *r) {
    const size_t width = 3 * out->W;
    for (size_t y = 0; y < out->H; y++) {
        const int32_t *a = r->sum + r->slot[y * r->fit.h / out->H] * width;
        for (size_t i = 0; i < width; i++) out->rgb[y * width + i] = (uint8_t)a[i];
    }
}

static void down_half(Image *out, const Resizer *r) {
    const size_t width = 3 * out->W;
    for (size_t y = 0; y < out->H; y++) {
        const int32_t *a = r->sum + 2 * y * width, *b = a + width;
        for (size_t i = 0; i < width; i++) out->rgb[y * width + i] = (uint8_t)((a[i] + b[i] + 2) >> 2);
    }
}

/* All source rows are kept, in their order. */
static Err down_bicubic(Image *out, const Resizer *r) {
    const size_t width = 3 * out->W, h = r->fit.h;
    const uint8_t *wide = r->wide ? r->wide : (const uint8_t *)r->sum;
    Taps down = {0};
    int32_t *sum = NULL;
    for (size_t i = 0; !r->wide && i < h * width; i++) ((uint8_t *)r->sum)[i] = clip_bicubic(r->sum[i]);
    Err e = taps_make(&down, MODE_BICUBIC, h, out->H);
    if (e == OK) e = mem_alloc(&sum, width, sizeof *sum, "a resized row");
    for (size_t y = 0; e == OK && y < out->H; y++) {
        memset(sum, 0, width * sizeof *sum);
        for (size_t k = 0; k < down.n[y]; k++) {
            const uint8_t *from = wide + (down.first[y] + k) * width;
            const int32_t w = down.weight[y * down.most + k];
            for (size_t i = 0; i < width; i++) sum[i] += from[i] * w;
        }
        for (size_t i = 0; i < width; i++) out->rgb[y * width + i] = clip_bicubic(sum[i]);
    }
    taps_free(&down);
    free(sum);
    return e;
}

Err resizer_finish(Resizer *r, Image *out) {
    Err e = OK;
    if (is_sideways(r->orientation)) TRY(lay_down(r));
    TRY(image_alloc(out, r->fit.H, r->fit.W));
    switch (r->mode) {
    case MODE_PICK: down_pick(out, r); break;
    case MODE_HALF: down_half(out, r); break;
    case MODE_LINEAR: down_linear(out, r); break;
    case MODE_BICUBIC: e = down_bicubic(out, r); break;
    }
    if (e != OK) image_free(out);
    return e;
}

Err image_fit(Image *out, const Image *im, const Fit *f) {
    Resizer *r;
    TRY(image_size_check(f->H, f->W));
    TRY(resizer_start(&r, f, im->H, im->W, 0, 1));
    for (size_t y = 0; y < f->h; y++) resizer_row(r, f->y0 + y, im->rgb + 3 * (f->y0 + y) * im->W);
    Err e = resizer_finish(r, out);
    resizer_free(r);
    if (e == OK) out->note = im->note;
    return e;
}

Err image_resize(Image *out, const Image *in, size_t H, size_t W, Filter filter) {
    *out = (Image){0};
    if (in->H < 1 || in->W < 1) return err("resizing an empty picture");
    return image_fit(out, in, &(Fit){0, 0, in->H, in->W, H, W, filter});
}

/* ------------------------------------------------------------------------------------------------------------
 * Preprocessing (SPEC section 10)
 * ---------------------------------------------------------------------------------------------------------- */

int prep_how(Prep prep) {
    return prep == PREP_FOLDER ? IMAGE_UPRIGHT : IMAGE_OFFICIAL;
}

Err prep_fit(Fit *f, Prep prep, size_t size, size_t H, size_t W) {
    const size_t side = min_size(H, W);
    if (side < 1) return err("preparing an empty picture");
    if (prep == PREP_FFHQ || prep == PREP_IMAGENET) {
        const double scale = (double)size / (double)side; /* rint: half to even, as Python's round */
        *f = (Fit){0, 0, H, W, (size_t)rint((double)H * scale), (size_t)rint((double)W * scale), FILTER_LINEAR};
    } else /* the centre square; odd remainders leave the larger part below and on the right */
        *f = (Fit){(H - side) / 2, (W - side) / 2, side, side, size, size, FILTER_BICUBIC};
    /* a long side that would be too long is the picture's fault */
    return image_size_check(f->H, f->W) == OK ? OK : err_damaged("%s", err_text());
}

Err prep_resize(Image *out, const Image *im, Prep prep, size_t size) {
    Fit f;
    *out = (Image){0};
    TRY(prep_fit(&f, prep, size, im->H, im->W));
    return image_fit(out, im, &f);
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
    Image resized;
    TRY(prep_resize(&resized, im, prep, size));
    prep_crop(out, &resized, size, u_crop_y, u_crop_x, flip);
    image_free(&resized);
    return OK;
}

Err image_square(Image *im, Prep prep, size_t size) {
    Image resized = {0}, square = {0};
    TRY(prep_resize(&resized, im, prep, size));
    Err e = image_fit(&square, &resized,
                      &(Fit){crop_offset(resized.H - size, -1), crop_offset(resized.W - size, -1), size, size, size,
                             size, FILTER_NEAREST});
    image_free(&resized);
    if (e != OK) return e;
    image_free(im);
    *im = square;
    return OK;
}

/* *from, *to: the pixels of `in`, from `first` on, that lie, if only in part, in pixel i of the middle `size` of out. */
static void covered(size_t *from, size_t *to, size_t i, size_t first, size_t in, size_t out, size_t size) {
    const size_t at = i + crop_offset(out - size, -1);
    *from = first + at * in / out;
    *to = first + ((at + 1) * in + out - 1) / out;
}

Err mask_square(uint8_t *keep, const Image *mask, Prep prep, size_t size, int invert) {
    Fit f;
    TRY(prep_fit(&f, prep, size, mask->H, mask->W));
    for (size_t y = 0; y < size; y++)
        for (size_t x = 0; x < size; x++) {
            size_t y0, y1, x0, x1;
            covered(&y0, &y1, y, f.y0, f.h, f.H, size);
            covered(&x0, &x1, x, f.x0, f.w, f.W, size);
            int all = 1;
            for (size_t v = y0; v < y1 && all; v++)
                for (size_t u = x0; u < x1 && all; u++) {
                    const uint8_t *p = mask->rgb + 3 * (v * mask->W + u);
                    all = (p[0] + p[1] + p[2] >= 3 * 128) == !invert;
                }
            *keep++ = (uint8_t)all;
        }
    return OK;
}
