/* files.h - files and pictures that test_images.c and test_data.c make, in a temporary folder. */
#ifndef TEST_FILES_H
#define TEST_FILES_H

#include "test.h"

#include <ftw.h>
#include <sys/stat.h>

static char folder[FOLDER_BYTES];

/* A path in the temporary folder, in one of eight buffers used in turn. */
static inline const char *in_folder(const char *name) {
    static char path[8][1024];
    static int turn;
    turn = (turn + 1) % 8;
    snprintf(path[turn], sizeof path[turn], "%s/%s", folder, name);
    return path[turn];
}

static inline void put_file(const char *path, const void *bytes, size_t n) {
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, n, f) != n || fclose(f) != 0) {
        printf("cannot write %s\n", path);
        exit(1);
    }
}

static inline uint8_t *get_file(const char *path, size_t *n) {
    static uint8_t bytes[1 << 20];
    FILE *f = fopen(path, "rb");
    *n = f ? fread(bytes, 1, sizeof bytes, f) : 0;
    if (f) fclose(f);
    return bytes;
}

static inline int remove_entry(const char *path, const struct stat *st, int flag, struct FTW *ftw) {
    (void)st, (void)flag, (void)ftw;
    return remove(path);
}

static inline uint32_t mix(uint32_t v) {
    v *= 2654435761u;
    v ^= v >> 15;
    v *= 2246822519u;
    return v ^ v >> 13;
}

/* The picture of data_tables.py. */
static inline Image picture(size_t H, size_t W) {
    Image im = {H, W, malloc(H * W * 3)};
    for (size_t y = 0; y < H; y++)
        for (size_t x = 0; x < W; x++)
            for (size_t c = 0; c < 3; c++) {
                uint32_t v = mix((uint32_t)(y * 7919 + x * 104729 + c * 1299709 + 12345)) >> 8 & 255;
                im.rgb[(y * W + x) * 3 + c] = (uint8_t)((x + y) % 5 < 2 ? (v < 128 ? 0 : 255) : v);
            }
    return im;
}

/* A smooth one, for JPEG. */
static inline Image gradient(size_t H, size_t W) {
    Image im = {H, W, malloc(H * W * 3)};
    for (size_t y = 0; y < H; y++)
        for (size_t x = 0; x < W; x++) {
            uint8_t *p = im.rgb + (y * W + x) * 3;
            p[0] = (uint8_t)(40 + 200 * x / W), p[1] = (uint8_t)(20 + 180 * y / H), p[2] = (uint8_t)(90 + 100 * x / W);
        }
    return im;
}

/* Largest difference of two pictures; 999 if their sizes differ. */
static inline int difference(const Image *a, const Image *b) {
    if (a->H != b->H || a->W != b->W) return 999;
    int worst = 0;
    for (size_t i = 0; i < a->H * a->W * 3; i++)
        if (abs(a->rgb[i] - b->rgb[i]) > worst) worst = abs(a->rgb[i] - b->rgb[i]);
    return worst;
}

static inline void make_folder(const char *name) {
    if (mkdir(in_folder(name), 0700) != 0) printf("mkdir %s failed\n", name);
}

/* A picture whose colour tells which one it is. */
static inline void make_picture(const char *name, size_t side, uint8_t tag) {
    Image im = {side, side + 1, malloc(side * (side + 1) * 3)};
    for (size_t i = 0; i < side * (side + 1) * 3; i++) im.rgb[i] = (uint8_t)(tag + (i % 3 == 0 ? i / 3 % side : 0));
    CHECK_OK(image_write_png(in_folder(name), &im, NULL));
    image_free(&im);
}

#endif
