/* pictures.c - makes and compares pictures, and compares tensors, for the tests of the programs.
 *
 *   pictures make DIR COUNT SIDE [WIDTH]
 *                                    COUNT pictures of coloured discs and bars in DIR/disc and DIR/bar, WIDTH (SIDE) x SIDE
 *   pictures same A B X0 Y0 X1 Y1    exit status 0 if the two pictures agree in that rectangle, 1 if not
 *   pictures near A B MOST           exit status 0 if no two colours are farther apart than MOST (of 255), 1 if some are
 *   pictures colour A B              B = A with a colour profile of Display P3's primaries
 *   pictures colours A B             exit status 0 if both files have the same colour profile, 1 if one has none
 *   pictures tensors A P B Q         exit status 0 if every tensor of file A whose name begins with P, and there are some, has
 *                                    the same values in B, where Q stands for P; 1 if not
 *   pictures moved A B P             prints how far apart the numbers of tensors whose names begin with P are at most
 *   pictures weights A B MOST        exit status 0 if two safetensors files have the same tensors and no number is farther
 *                                    from the other's than MOST times the largest of its tensor; but for those of one
 *                                    dimension: a bias in front of a norm has no gradient but rounding, which Adam
 *                                    enlarges */
#include "profiles.h"
#include "sampling/sampling.h"
#include "training/training.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static int complain(void) {
    fprintf(stderr, "pictures: %s\n", err_text());
    return 2;
}

static void draw(Image *im, uint32_t number, int disc) {
    long side = (long)im->H, W = (long)im->W;
    long x0 = rng_below(1, rng_stream(RNG_TEST, 0, number), 0, (uint32_t)W / 2) + W / 4;
    for (long y = 0; y < side; y++)
        for (long x = 0; x < W; x++) {
            long dx = x - x0, dy = y - side / 2;
            int inside = disc ? dx * dx + dy * dy < side * side / 9 : dx * dx < side * side / 64;
            for (uint32_t c = 0; c < 3; c++)
                im->rgb[3 * (y * W + x) + c] =
                    (uint8_t)(inside ? rng_below(1, rng_stream(RNG_TEST, 1, number), c, 120) : 255);
        }
}

static int make(const char *dir, int count, size_t side, size_t width) {
    Image im = {side, width, NULL};
    char path[1100];
    if (mem_alloc(&im.rgb, side * width, 3, "picture") != OK) return complain();
    for (int i = 0; i < count; i++) {
        const char *kind = i % 2 ? "bar" : "disc";
        draw(&im, (uint32_t)i, i % 2 == 0);
        snprintf(path, sizeof path, "%s/%s", dir, kind);
        mkdir(dir, 0777);
        mkdir(path, 0777);
        snprintf(path, sizeof path, "%s/%s/%03d.png", dir, kind, i);
        if (image_write_png(path, &im, NULL) != OK) return complain();
    }
    image_free(&im);
    return 0;
}

static int same(char **argv) {
    Image a = {0}, b = {0};
    size_t x0 = strtoul(argv[4], NULL, 10), y0 = strtoul(argv[5], NULL, 10);
    size_t x1 = strtoul(argv[6], NULL, 10), y1 = strtoul(argv[7], NULL, 10);
    int differ = 0;
    if (image_read(&a, argv[2]) != OK || image_read(&b, argv[3]) != OK) return complain();
    if (a.H != b.H || a.W != b.W || x1 > a.W || y1 > a.H || x0 >= x1 || y0 >= y1) {
        fprintf(stderr, "pictures: sizes %zux%zu and %zux%zu do not fit the rectangle\n", a.W, a.H, b.W, b.H);
        return 2;
    }
    for (size_t y = y0; y < y1; y++)
        differ |= memcmp(a.rgb + 3 * (y * a.W + x0), b.rgb + 3 * (y * a.W + x0), 3 * (x1 - x0));
    image_free(&a);
    image_free(&b);
    return differ != 0;
}

static int near(char **argv) {
    Image a = {0}, b = {0};
    int farthest = 0;
    if (image_read(&a, argv[2]) != OK || image_read(&b, argv[3]) != OK) return complain();
    if (a.H != b.H || a.W != b.W || a.H * a.W == 0) {
        fprintf(stderr, "pictures: sizes %zux%zu and %zux%zu\n", a.W, a.H, b.W, b.H);
        return 2;
    }
    for (size_t i = 0; i < 3 * a.H * a.W; i++)
        if (abs(a.rgb[i] - b.rgb[i]) > farthest) farthest = abs(a.rgb[i] - b.rgb[i]);
    if (farthest > atoi(argv[4])) fprintf(stderr, "pictures: %d apart\n", farthest);
    image_free(&a);
    image_free(&b);
    return farthest > atoi(argv[4]);
}

static int colour(char **argv) {
    Image im;
    uint8_t p3[P3_BYTES];
    const Profile profile = {p3, P3_BYTES, NULL};
    make_profile(p3, P3_BYTES, p3_primaries, CURVE_PARAMETRIC);
    if (image_read(&im, argv[2]) != OK) return complain();
    im.profile = &profile;
    if (image_write_png(argv[3], &im, NULL) != OK) return complain();
    image_free(&im);
    return 0;
}

static int colours(char **argv) {
    Profile p[2];
    for (int i = 0; i < 2; i++) {
        uint8_t *bytes;
        size_t n;
        if (file_bytes(&bytes, &n, argv[2 + i], IMAGE_FILE_BYTES, NULL) != OK || profile_read(&p[i], bytes, n) != OK)
            return complain();
        free(bytes);
    }
    const int same = p[0].size && p[0].size == p[1].size && !memcmp(p[0].bytes, p[1].bytes, p[0].size);
    profile_free(&p[0]), profile_free(&p[1]);
    return !same;
}

static int same_values(const Tensor *x, const Tensor *y) {
    real *a = NULL, *b = NULL;
    if (!y || x->size != y->size) return 0;
    int same_size =
        mem_alloc(&a, x->size, sizeof *a, "a tensor") == OK && mem_alloc(&b, y->size, sizeof *b, "a tensor") == OK;
    if (same_size) tensor_to_reals(x, a), tensor_to_reals(y, b);
    int is_same = same_size && memcmp(a, b, x->size * sizeof *a) == 0;
    free(a);
    free(b);
    return is_same;
}

static int tensors(char **argv) {
    Checkpoint a, b;
    size_t same_ones = 0, others = 0, n = strlen(argv[3]);
    if (checkpoint_open(&a, argv[2]) != OK || checkpoint_open(&b, argv[4]) != OK) return complain();
    for (size_t i = 0; i < a.n; i++) {
        char name[2 * NAME_MAX_BYTES];
        if (strncmp(a.tensor[i].name, argv[3], n) != 0) continue;
        snprintf(name, sizeof name, "%.100s%s", argv[5], a.tensor[i].name + n);
        if (same_values(&a.tensor[i], checkpoint_find(&b, name)))
            same_ones++;
        else
            others++;
    }
    fprintf(stderr, "pictures: %zu tensors the same, %zu not\n", same_ones, others);
    checkpoint_close(&a);
    checkpoint_close(&b);
    return !same_ones || others;
}

/* How far apart, if `relative` in units of the largest of a; NAN is far. */
static double apart(const Tensor *a, const Tensor *b, int relative) {
    real *x, *y;
    double largest = 0, farthest = 0;
    if (mem_alloc(&x, a->size, sizeof *x, "a") != OK || mem_alloc(&y, a->size, sizeof *y, "b") != OK) return INFINITY;
    tensor_to_reals(a, x), tensor_to_reals(b, y);
    for (size_t i = 0; i < a->size; i++) {
        const double d = fabs((double)x[i] - (double)y[i]);
        largest = fmax(largest, fabs((double)x[i]));
        farthest = d <= farthest ? farthest : isnan(d) ? INFINITY : d;
    }
    free(x), free(y);
    return farthest == 0 || !relative ? farthest : farthest / largest;
}

static int moved(char **argv) {
    Checkpoint a = {0}, b = {0};
    double farthest = 0;
    if (checkpoint_open(&a, argv[2]) != OK || checkpoint_open(&b, argv[3]) != OK) return complain();
    for (size_t i = 0; i < a.n; i++) {
        const Tensor *other = checkpoint_find(&b, a.tensor[i].name);
        if (strncmp(a.tensor[i].name, argv[4], strlen(argv[4]))) continue;
        farthest = fmax(farthest, other && other->size == a.tensor[i].size ? apart(&a.tensor[i], other, 0) : INFINITY);
    }
    printf("%.9g\n", farthest);
    checkpoint_close(&a);
    checkpoint_close(&b);
    return 0;
}

static int weights(char **argv) {
    Checkpoint a = {0}, b = {0};
    double farthest = 0;
    if (checkpoint_open(&a, argv[2]) != OK || checkpoint_open(&b, argv[3]) != OK) return complain();
    for (size_t i = 0; i < a.n; i++) {
        const Tensor *other = checkpoint_find(&b, a.tensor[i].name);
        if (a.tensor[i].ndim < 2) continue;
        const double d = other && other->size == a.tensor[i].size ? apart(&a.tensor[i], other, 1) : INFINITY;
        if (d > atof(argv[4])) fprintf(stderr, "pictures: %s: %g apart\n", a.tensor[i].name, d);
        farthest = fmax(farthest, d);
    }
    const int differ = a.n == 0 || a.n != b.n || farthest > atof(argv[4]);
    checkpoint_close(&a);
    checkpoint_close(&b);
    return differ;
}

int main(int argc, char **argv) {
    if ((argc == 5 || argc == 6) && !strcmp(argv[1], "make"))
        return make(argv[2], atoi(argv[3]), strtoul(argv[4], NULL, 10), strtoul(argv[argc - 1], NULL, 10));
    if (argc == 8 && !strcmp(argv[1], "same")) return same(argv);
    if (argc == 5 && !strcmp(argv[1], "near")) return near(argv);
    if (argc == 4 && !strcmp(argv[1], "colour")) return colour(argv);
    if (argc == 4 && !strcmp(argv[1], "colours")) return colours(argv);
    if (argc == 6 && !strcmp(argv[1], "tensors")) return tensors(argv);
    if (argc == 5 && !strcmp(argv[1], "moved")) return moved(argv);
    if (argc == 5 && !strcmp(argv[1], "weights")) return weights(argv);
    fprintf(stderr, "usage: pictures make DIR COUNT SIDE | same A B X0 Y0 X1 Y1 | near A B MOST | colour A B | colours "
                    "A B | tensors A P B Q | "
                    "moved A B P | weights A B MOST\n");
    return 2;
}
