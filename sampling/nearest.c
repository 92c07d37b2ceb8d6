/* nearest.c - how near drawn pictures come to those of a folder: ./sample --nearest, for whoever wants to know what a
 * model has learnt by heart.
 *
 * Two distances, each to the closest training picture, as it is or mirrored: how many of the N tokens are the same, and
 * the root mean square difference of the pixels, counted in 0..1. Every picture of the folder is read, prepared and
 * encoded once; the drawn ones are compared with it side by side. Nothing is drawn or learnt here. */
#include "sampling/sampling.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { AT_ONCE = 16 }; /* pictures of the folder that are encoded together */

typedef struct {
    size_t shared, by_tokens; /* most tokens that agree; with which picture */
    double square;            /* least sum of squared differences, of pixels in -1..1 */
    size_t by_pixels;         /* with which picture */
} Nearest;

typedef struct {
    const int32_t *tokens; /* (n,N) drawn */
    const real *drawn;     /* (n,pixels) in -1..1 */
    Nearest *near;         /* (n) */
    size_t n, N, pixels;
    /* the present pictures of the folder, the first of them number `first` */
    const real *images;
    const int32_t *codes, *labels; /* label -1: a damaged one */
    size_t rows, first;
} Search;

static size_t same_tokens(const int32_t *a, const int32_t *b, size_t n) {
    size_t same = 0;
    for (size_t i = 0; i < n; i++) same += a[i] == b[i];
    return same;
}

static real square_distance(const real *a, const real *b, size_t n) {
    real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; i++) sum += (a[i] - b[i]) * (a[i] - b[i]);
    return sum;
}

/* Compares drawn picture i with the present ones. The first of equals stays. */
static void compare_one(void *context, size_t i) {
    const Search *s = (const Search *)context;
    Nearest *near = s->near + i;
    for (size_t r = 0; r < s->rows; r++) {
        if (s->labels[r] < 0) continue;
        const size_t shared = same_tokens(s->tokens + i * s->N, s->codes + r * s->N, s->N);
        const double square = square_distance(s->drawn + i * s->pixels, s->images + r * s->pixels, s->pixels);
        if (shared > near->shared) near->shared = shared, near->by_tokens = s->first + r;
        if (square < near->square) near->square = square, near->by_pixels = s->first + r;
    }
}

/* The folder's pictures from number `first` on, as they are and mirrored. */
static Err compare_batch(Search *s, Model *m, real *images, int32_t *codes) {
    for (int mirrored = 0; mirrored < 2; mirrored++) {
        if (mirrored) image_mirror(images, s->rows * 3, m->side);
        TRY(vqgan_encode(m->vqgan, images, s->rows, m->side, m->side, 0, NULL, NULL, codes));
        s->images = images, s->codes = codes;
        parallel_for(threads_free(), s->n, compare_one, s);
    }
    return OK;
}

static Err compare_all(Search *s, Model *m, const Dataset *d, Loader *l, real *images, int32_t *codes) {
    for (s->first = 0; s->first < d->n; s->first += AT_ONCE) {
        const real *read;
        s->rows = min_size(AT_ONCE, d->n - s->first);
        TRY(loader_next(l, &read, &s->labels));
        memcpy(images, read, s->rows * s->pixels * sizeof *images);
        TRY(compare_batch(s, m, images, codes));
        if (interrupted()) return err("interrupted; the pictures are drawn, --nearest was not done with them");
        progress_line("comparing with %zu of %zu pictures", s->first + s->rows, d->n);
    }
    progress_end();
    return OK;
}

static double rms(const Search *s, const Nearest *near) {
    return sqrt(near->square / (double)s->pixels) / 2; /* pixels span 2 */
}

static void report(const Search *s, const Dataset *d, const char *path) {
    size_t all = 0, most = 0, close = 0;
    char text[ERR_MAX];
    printf("picture\tsame tokens of %zu\tas in\trms of pixels\tnearest in pixels\n", s->N);
    for (size_t i = 0; i < s->n; i++) {
        const Nearest *near = s->near + i;
        char by_tokens[PATH_BYTES], by_pixels[PATH_BYTES];
        printf("%zu\t%zu\t%s\t%.4f\t%s\n", i, near->shared,
               near->shared ? printable(by_tokens, d->path[near->by_tokens]) : "-", rms(s, near),
               printable(by_pixels, d->path[near->by_pixels]));
        all += near->shared == s->N, most += near->shared * 10 >= s->N * 9, close += rms(s, near) < 0.05;
    }
    say_text(
        "nearest of the %zu pictures in %s: %zu of %zu have all tokens of one of them, %zu nine in ten or more; %zu "
        "are within 0.05 (rms, pixels in 0..1) of one\n",
        d->n - dataset_damaged(d), path, all, s->n, most, close);
    left_out_text(text, d->left_out);
    if (text[0]) say_text("%s: left out: %s\n", path, text);
    dataset_met(d, text, 1);
    if (text[0]) say_text("%s: %s\n", path, text);
}

Err nearest_check(const char *path) {
    Dataset d;
    struct stat st;
    const size_t n = strlen(path) - (strlen(path) > 1 && path[strlen(path) - 1] == '/');
    const int bundled = n == strlen("data/emoji") && !strncmp(path, "data/emoji", n);
    if (stat(path, &st) && errno == ENOENT)
        return err("--nearest: %s: No such file or directory%s", path,
                   bundled ? "; \"make data/emoji\" makes the pictures of the bundled model" : "");
    if (dataset_open(&d, path, SPLIT_TRAIN) != OK) return err_in("--nearest");
    dataset_close(&d);
    return OK;
}

Err nearest_report(Model *m, const int32_t *tokens, size_t n, const char *path) {
    const size_t N = m->h * m->w, pixels = 3 * m->side * m->side;
    Search s = {.tokens = tokens, .n = n, .N = N, .pixels = pixels};
    Dataset d = {0};
    Loader *l = NULL;
    real *drawn = NULL, *images = NULL;
    int32_t *codes = NULL;
    LoaderConfig c = {.B = AT_ONCE, .size = m->side, .mark = 1};
    Err e = prep_read(&c.prep, &m->meta);
    if (e == OK) e = dataset_open(&d, path, SPLIT_TRAIN | (m->classes.n ? 0 : SPLIT_FLAT));
    if (e == OK) e = mem_alloc(&drawn, n, pixels * sizeof *drawn, "drawn pictures");
    if (e == OK) e = mem_alloc(&images, AT_ONCE, pixels * sizeof *images, "pictures to compare with");
    if (e == OK) e = mem_alloc(&codes, AT_ONCE * N, sizeof *codes, "their tokens");
    if (e == OK) e = mem_alloc(&s.near, n, sizeof *s.near, "what is nearest");
    if (e == OK) e = decode_pictures(m, tokens, n, drawn);
    for (size_t i = 0; i < n * pixels && e == OK; i++) drawn[i] = drawn[i] < -1 ? -1 : drawn[i] > 1 ? 1 : drawn[i];
    for (size_t i = 0; i < n && e == OK; i++) s.near[i].square = HUGE_VAL;
    if (e == OK) e = vqgan_plan(m->vqgan, AT_ONCE, m->side, m->side, 0);
    if (e == OK) e = loader_start(&l, &d, &c);
    s.drawn = drawn;
    if (e == OK) e = compare_all(&s, m, &d, l, images, codes);
    if (e == OK) report(&s, &d, path);
    loader_stop(l);
    dataset_close(&d);
    free(drawn), free(images), free(codes), free(s.near);
    return e;
}
