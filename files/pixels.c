/* pixels.c - pictures in memory: room for them, turned upright, composited, put together in a grid. */
#include "files/decode.h"

#include <stdlib.h>
#include <string.h>

/* A picture that may be held. */
static Err size_fits(size_t H, size_t W) {
    if (H < 1 || W < 1 || H > IMAGE_MAX_SIDE || W > IMAGE_MAX_SIDE)
        return err("a picture of %zu x %zu pixels; sides of 1..%d expected", W, H, IMAGE_MAX_SIDE);
    if (H * W > IMAGE_MAX_PIXELS)
        return err("a picture of %zu x %zu pixels; at most %d pixels expected", W, H, IMAGE_MAX_PIXELS);
    return OK;
}

Err image_alloc(Image *im, size_t H, size_t W) {
    *im = (Image){0};
    TRY(size_fits(H, W));
    TRY(mem_alloc(&im->rgb, H * W, 3, "a picture"));
    im->H = H;
    im->W = W;
    return OK;
}

void image_free(Image *im) {
    free(im->rgb);
    *im = (Image){0};
}

Err image_orient(Image *im, int orientation) {
    if (orientation <= 1) return OK;
    int transposed = orientation >= 5;
    int from_bottom = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
    int from_right = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
    Image out;
    TRY(image_alloc(&out, transposed ? im->W : im->H, transposed ? im->H : im->W));
    for (size_t y = 0; y < out.H; y++)
        for (size_t x = 0; x < out.W; x++) {
            size_t sy = transposed ? x : y, sx = transposed ? y : x;
            if (from_bottom) sy = im->H - 1 - sy;
            if (from_right) sx = im->W - 1 - sx;
            memcpy(out.rgb + (y * out.W + x) * 3, im->rgb + (sy * im->W + sx) * 3, 3);
        }
    image_free(im);
    *im = out;
    return OK;
}

/* A colour on white: round(255 * (c*a + 1-a)) with c and a in units of 1/most. most^2 is odd: no ties. */
static uint8_t on_white(uint64_t c, uint64_t a, uint64_t most) {
    const uint64_t v = c * a + most * (most - a);
    return (uint8_t)((255 * v + most * most / 2) / (most * most));
}

void png_row_to_rgb(uint8_t *rgb, const uint8_t *row, size_t W, size_t channels, int depth) {
    uint64_t most = depth == 16 ? 65535 : 255;
    if (depth == 8 && channels == 3) {
        memcpy(rgb, row, W * 3);
        return;
    }
    for (size_t x = 0; x < W; x++, rgb += 3) {
        uint64_t v[4] = {0, 0, 0, most};
        for (size_t c = 0; c < channels; c++, row += depth / 8)
            v[c] = depth == 16 ? (uint64_t)row[0] << 8 | row[1] : row[0]; /* PNG is big-endian */
        for (size_t c = 0; c < 3; c++) rgb[c] = on_white(v[c], v[3], most);
    }
}

void image_mirror(real *images, size_t planes, size_t side) {
    for (size_t row = 0; row < planes * side; row++)
        for (size_t i = 0, j = side - 1; i < j; i++, j--) {
            const real keep = images[row * side + i];
            images[row * side + i] = images[row * side + j];
            images[row * side + j] = keep;
        }
}

/* Truncation, not rounding: what the official sampling script does. NaN becomes black. */
static uint8_t real_to_u8(real x) {
    x = (x + 1) / 2;
    x = x > 0 ? x < 1 ? x : 1 : 0;
    return (uint8_t)(255 * x);
}

Err image_grid_size(size_t *out_H, size_t *out_W, size_t n, size_t H, size_t W, size_t columns, size_t gap) {
    if (n < 1 || columns < 1 || H < 1 || W < 1) return err("a grid of no pictures");
    if (columns > n) columns = n;
    size_t rows = (n + columns - 1) / columns;
    if (H > IMAGE_MAX_SIDE || W > IMAGE_MAX_SIDE || gap > IMAGE_MAX_SIDE || rows > IMAGE_MAX_SIDE ||
        columns > IMAGE_MAX_SIDE)
        return err("a grid of %zu x %zu pictures of %zu x %zu is too large", columns, rows, W, H);
    *out_H = rows * (H + gap) - gap, *out_W = columns * (W + gap) - gap;
    return size_fits(*out_H, *out_W);
}

Err image_grid(Image *out, const real *images, size_t n, size_t H, size_t W, size_t columns, size_t gap) {
    size_t out_H, out_W;
    TRY(image_grid_size(&out_H, &out_W, n, H, W, columns, gap));
    TRY(image_alloc(out, out_H, out_W));
    columns = columns < n ? columns : n;
    memset(out->rgb, 255, out->H * out->W * 3);
    for (size_t i = 0; i < n; i++)
        for (size_t y = 0; y < H; y++) {
            uint8_t *to = out->rgb + ((i / columns * (H + gap) + y) * out->W + i % columns * (W + gap)) * 3;
            for (size_t x = 0; x < W; x++)
                for (size_t c = 0; c < 3; c++) *to++ = real_to_u8(images[((i * 3 + c) * H + y) * W + x]);
        }
    return OK;
}
