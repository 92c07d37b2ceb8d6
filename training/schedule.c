/* schedule.c - ./train --schedule psim: scales that are equally far apart to look at (SPEC section 3; the
 * released models' *_PSIM schedules are of this kind).
 *
 * The tokens of held-out pictures (training pictures, where fewer than PICTURES are held out) are noised until a share
 * alphacum of them is left, for a grid of such shares, and decoded; how far that takes a picture from its clean
 * reconstruction is the metric. RUN/psim.txt holds the curve; the schedule curve:RUN/psim.txt takes equal steps of it
 * (files/betas.c).
 *
 * The metric is a plain feature distance, not a trained perceptual one: both pictures go through the first stage's own
 * encoder; at each position, features are scaled to length one; mean over positions of the squared distance, 0..4. */
#include "training/stage.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { POINTS = 21, PICTURES = 32, AT_ONCE = 16 };

typedef struct {
    Stage *s;
    size_t B, C, feature_reals; /* pictures at once, channels of a feature, (B,C,h,w) */
    int32_t *clean, *noisy;     /* (B,N) */
    real *images;               /* (B,3,size,size) */
    real *wanted, *got;         /* (B,C,h,w) features of clean and noisy pictures */
    double metric[POINTS];
    const char *what; /* "held-out" or "training" */
} Measure;

static double alphacum_at(int point) {
    return 1 - (double)point / (POINTS - 1);
}

static Err measure_buffers(Measure *m) {
    const Stage *s = m->s;
    m->feature_reals = m->B * m->C * s->N;
    TRY(mem_alloc(&m->clean, m->B * s->N, sizeof *m->clean, "tokens"));
    TRY(mem_alloc(&m->noisy, m->B * s->N, sizeof *m->noisy, "tokens"));
    TRY(mem_alloc(&m->images, m->B * 3 * s->size, s->size * sizeof *m->images, "pictures"));
    TRY(mem_alloc(&m->wanted, m->feature_reals, sizeof *m->wanted, "features"));
    return mem_alloc(&m->got, m->feature_reals, sizeof *m->got, "features");
}

static void free_measure(Measure *m) {
    void *buffers[] = {m->clean, m->noisy, m->images, m->wanted, m->got};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
}

/* Features (B,C,h,w) of the pictures that tokens (B,N) stand for */
static Err features_of(Measure *m, const int32_t *tokens, real *features) {
    Stage *s = m->s;
    const size_t side = drawn_size(s);
    TRY(vqgan_decode_tokens(s->vqgan, tokens, m->B, s->h, s->w, m->images));
    return vqgan_encode(s->vqgan, m->images, m->B, side, side, s->set.seed, features, NULL, NULL);
}

/* Of picture b: mean over positions of |f/|f| - g/|g||^2 */
static double distance(const Measure *m, size_t b) {
    const size_t N = m->s->N;
    const real *f = m->wanted + b * m->C * N, *g = m->got + b * m->C * N;
    double sum = 0;
    for (size_t i = 0; i < N; i++) {
        double ff = 1e-20, gg = 1e-20, square = 0;
        for (size_t c = 0; c < m->C; c++)
            ff += (double)f[c * N + i] * (double)f[c * N + i], gg += (double)g[c * N + i] * (double)g[c * N + i];
        ff = 1 / sqrt(ff), gg = 1 / sqrt(gg);
        for (size_t c = 0; c < m->C; c++) {
            const double d = (double)f[c * N + i] * ff - (double)g[c * N + i] * gg;
            square += d * d;
        }
        sum += square;
    }
    return sum / (double)N;
}

/* All shares of a batch whose first `rows` pictures count, number `first` and on. The random numbers of a picture are
 * the same for every share, so that what is noise at one is noise at all smaller ones. */
static Err measure_batch(Measure *m, size_t first, size_t rows, size_t n) {
    const Stage *s = m->s;
    TRY(features_of(m, m->clean, m->wanted));
    for (int p = 1; p < POINTS && !interrupted(); p++) { /* at 0 nothing is noise */
        memcpy(m->noisy, m->clean, m->B * s->N * sizeof *m->noisy);
        for (size_t b = 0; b < m->B; b++)
            noise_step(m->noisy + b * s->N, s->N, s->K, 1 - alphacum_at(p), s->set.seed,
                       rng_stream(RNG_NOISE, 0, first + b), 0);
        TRY(features_of(m, m->noisy, m->got));
        for (size_t b = 0; b < rows; b++) m->metric[p] += distance(m, b) / (double)n;
        progress_line("pictures %zu to %zu of %zu: %.0f%% of the tokens left", first + 1, first + rows, n,
                      100 * alphacum_at(p));
    }
    return interrupted() ? err("stopped; nothing was written") : OK;
}

static Err measure_pictures(Measure *m, const Dataset *d, size_t n) {
    const Stage *s = m->s;
    const LoaderConfig c = {.prep = s->prep, .B = m->B, .size = s->size};
    Loader *l = NULL;
    Err e = loader_start(&l, d, &c);
    for (size_t first = 0; e == OK && first < n; first += m->B) {
        const real *images;
        const int32_t *labels;
        e = loader_next(l, &images, &labels);
        if (e == OK) e = vqgan_encode(s->vqgan, images, m->B, s->size, s->size, s->set.seed, NULL, NULL, m->clean);
        if (e == OK) e = measure_batch(m, first, min_size(m->B, n - first), n);
    }
    progress_end();
    loader_stop(l);
    return e;
}

/* The curve must rise to its end, where nothing is left of the picture. A point that chance put no higher than one
 * before it, or higher than the end, says nothing and is left out. */
static size_t rising_points(int keep[POINTS], const double metric[POINTS]) {
    double highest = -1;
    size_t n = 0;
    for (int p = 0; p < POINTS; p++) {
        keep[p] = p == POINTS - 1 || (metric[p] > highest && metric[p] < metric[POINTS - 1]);
        if (keep[p]) highest = metric[p], n++;
    }
    return n;
}

typedef struct {
    const char *path, *text;
    size_t bytes;
} Curve;

static Err put_curve(Stage *s, void *curve) {
    const Curve *x = curve;
    AtomicFile f;
    (void)s;
    TRY(atomic_open(&f, x->path));
    return atomic_close(&f, atomic_write(&f, x->text, x->bytes));
}

static Err write_curve(const Measure *m, size_t n, const char *path) {
    char text[4096];
    Curve curve = {path, text, 0};
    int keep[POINTS];
    const size_t rising = rising_points(keep, m->metric);
    if (rising < 2 || !(m->metric[POINTS - 1] > 0))
        return err("noise in the tokens does not change the pictures: is the first stage trained?");
    int at = snprintf(text, sizeof text,
                      "# alphacum, metric: feature distance (the first stage's encoder, unit features) of noised and "
                      "clean\n# reconstructions, mean over %zu %s pictures of %.1000s, seed %llu; %zu of %d points\n",
                      n, m->what, m->s->set.data, (unsigned long long)m->s->set.seed, rising, POINTS);
    for (int p = 0; p < POINTS; p++)
        if (keep[p]) at += snprintf(text + at, sizeof text - (size_t)at, "%.9g %.9g\n", alphacum_at(p), m->metric[p]);
    curve.bytes = (size_t)at;
    return retry_when_full(m->s, put_curve, &curve, 0);
}

/* Read back as training will read it */
static Err say_schedule(const Stage *s, const char *path) {
    char redraw[PATH_BYTES + 16];
    Schedule made;
    size_t T = 0;
    TRY(config_size(&T, &s->recipe, "model.params.", "n_scales", 1, MAX_SCALES, 0));
    snprintf(redraw, sizeof redraw, "curve:%s", path);
    TRY(schedule_make(&made, redraw, (int)T));
    printf("scale\tbeta\talphacum\n");
    for (int t = 1; t <= made.T; t++) printf("%d\t%.6f\t%.6f\n", t, (double)made.beta[t], (double)made.alphacum[t]);
    say_result("scale.model.params.redraw_prob %s\n", redraw);
    say_text("the last line belongs into the recipe, for all scales\n");
    return OK;
}

Err metric_schedule(Stage *s) {
    char vqgan_path[PATH_BYTES], path[PATH_BYTES];
    TRY(data_is_there(s->set.data));
    TRY(dataset_open_lists(&s->val, s->set.data, s->set.list, s->set.val_list, SPLIT_VAL | SPLIT_FLAT));
    TRY(dataset_open_lists(&s->train, s->set.data, s->set.list, s->set.val_list, SPLIT_TRAIN | SPLIT_FLAT));
    const int enough = s->val.n >= PICTURES;
    TRY(make_run(s->set.run));
    TRY(copy_first_stage(s));
    TRY(open_first_stage(s, vqgan_path));
    const size_t n = min_size(enough ? s->val.n : s->train.n, PICTURES);
    Measure m = {.s = s, .B = min_size(n, AT_ONCE), .C = vqgan_config(s->vqgan)->embed_dim};
    m.what = enough ? "held-out" : "training";
    snprintf(path, sizeof path, "%s/psim.txt", s->set.run);
    catch_interrupts();
    Err e = measure_buffers(&m);
    if (e == OK) e = measure_pictures(&m, enough ? &s->val : &s->train, n);
    if (e == OK) e = write_curve(&m, n, path);
    free_measure(&m);
    return e == OK ? say_schedule(s, path) : e;
}
