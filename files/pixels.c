/* pixels.c - pictures in memory: room for them, held upright, samples to RGB, put together in a grid. */
#include "files/decode.h"

#include <stdlib.h>
#include <string.h>

enum { IMAGE_MAX_PIXELS = 1 << 27 }; /* 400 MB of RGB: above any dataset, below what a hostile header could ask for */

Err image_size_check(size_t H, size_t W) {
    if (H < 1 || W < 1 || H > IMAGE_MAX_SIDE || W > IMAGE_MAX_SIDE)
        return err("a picture of %zu x %zu pixels; sides of 1..%d expected", W, H, IMAGE_MAX_SIDE);
    if (H * W > IMAGE_MAX_PIXELS)
        return err("a picture of %zu x %zu pixels; at most %d pixels expected", W, H, IMAGE_MAX_PIXELS);
    return OK;
}

Err image_alloc(Image *im, size_t H, size_t W) {
    *im = (Image){0};
    TRY(image_size_check(H, W));
    TRY(mem_alloc(&im->rgb, H * W, 3, "a picture"));
    im->H = H;
    im->W = W;
    return OK;
}

void image_free(Image *im) {
    free(im->rgb);
    free(im->alpha);
    *im = (Image){0};
}

/* Orientations 5..8 exchange rows and columns. */
uint8_t *image_place(const Image *im, int orientation, size_t y, size_t x) {
    const int o = orientation, sideways = o >= 5;
    size_t to_y = sideways ? x : y, to_x = sideways ? y : x;
    if (o == 3 || o == 4 || o == 7 || o == 8) to_y = im->H - 1 - to_y;
    if (o == 2 || o == 3 || o == 6 || o == 7) to_x = im->W - 1 - to_x;
    return im->rgb + 3 * (to_y * im->W + to_x);
}

/* A colour on white or black: round(255 * (c*a + background * (1-a))) with c and a in units of 1/most. most^2 is odd: no
 * ties. */
static uint8_t composite(uint64_t c, uint64_t a, uint64_t most, int black) {
    const uint64_t v = c * a + (black ? 0 : most * (most - a));
    return (uint8_t)((255 * v + most * most / 2) / (most * most));
}

void samples_to_rgb(uint8_t *rgb, const uint8_t *row, size_t W, size_t channels, int depth, int how) {
    const uint64_t most = depth == 16 ? 65535 : 255;
    const size_t bytes = (size_t)depth / 8;
    if (channels == 3 && how & IMAGE_ALPHA) {
        memset(rgb, 255, W * 3);
        return;
    }
    if (channels == 3 && depth == 8) {
        memcpy(rgb, row, W * 3);
        return;
    }
    for (size_t x = 0; x < W; x++, rgb += 3, row += channels * bytes) {
        uint64_t v[4] = {0, 0, 0, most};
        for (size_t c = 0; c < channels; c++) v[c] = depth == 16 ? (uint64_t)row[2 * c] << 8 | row[2 * c + 1] : row[c];
        if (how & IMAGE_ALPHA) v[0] = v[1] = v[2] = v[3];
        if (how & (IMAGE_ALPHA | IMAGE_STRAIGHT)) v[3] = most;
        for (size_t c = 0; c < 3; c++)
            rgb[c] = how & SAMPLES_CLIP     ? (uint8_t)min_size(v[c], 255)
                     : how & IMAGE_OFFICIAL ? row[c * bytes]
                                            : composite(v[c], v[3], most, how & IMAGE_ON_BLACK);
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
    return image_size_check(*out_H, *out_W);
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

void image_row_enlarged(uint8_t *row, const Image *im, size_t y, size_t N) {
    const uint8_t *from = im->rgb + 3 * y * im->W;
    for (size_t x = 0; x < im->W * N; x++) memcpy(row + 3 * x, from + 3 * (x / N), 3);
}
