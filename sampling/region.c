/* region.c - which part of a picture ./inpaint keeps, where no mask says it, and a picture in the middle of a larger
 * one. */
#include "sampling/sampling.h"

#include <string.h>

void window_mask(uint8_t *keep, size_t side, size_t size, int inside) {
    size_t from = (side - size) / 2, to = (side + size) / 2;
    for (size_t y = 0; y < side; y++)
        for (size_t x = 0; x < side; x++)
            keep[y * side + x] = (y >= from && y < to && x >= from && x < to) == (inside != 0);
}

void half_mask(uint8_t *keep, size_t side, const char *half) {
    int upper = !strcmp(half, "upper"), lower = !strcmp(half, "lower"), left = !strcmp(half, "left");
    size_t middle = side / 2;
    for (size_t y = 0; y < side; y++)
        for (size_t x = 0; x < side; x++)
            keep[y * side + x] = upper ? y >= middle : lower ? y < middle : left ? x >= middle : x < middle;
}

Err put_into_middle(Image *im, size_t side) {
    const size_t size = im->H, from = (side - size) / 2;
    Image wide = {.H = side, .W = side};
    TRY(mem_alloc(&wide.rgb, side * side, 3, "a picture"));
    for (size_t i = 0; i < side * side; i++) {
        const size_t y = min_size(max_size(i / side, from) - from, size - 1);
        const size_t x = min_size(max_size(i % side, from) - from, size - 1);
        memcpy(wide.rgb + 3 * i, im->rgb + 3 * (y * size + x), 3);
    }
    image_free(im);
    *im = wide;
    return OK;
}
