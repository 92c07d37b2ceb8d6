/* betas.c - the noise schedule that a recipe names: redraw_prob of the official configurations.
 *
 * A schedule is beta_1 .. beta_T, the probabilities with which a token is drawn anew at each step (diffusion.c). It is
 * given as a number for all steps; as the products A_t = (1 - beta_1) ... (1 - beta_t); as the name of a released
 * model's; or as a file with a curve of some metric over A, such as how much a picture changes, of which every step
 * takes an equal part. SPEC section 3. */
#include "files/files.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int sign(double y) {
    return (y > 0) - (y < 0);
}

/* Where a curve first takes a value, in file order: linear interpolation at the first change of sign of y = metric -
 * value. Changes from and to zero count; y_i = 0 then gives alphacum_i itself, the quotient being infinite. */
static Err curve_crossing(double *out, const double *alphacum, const double *metric, size_t n, double value) {
    for (size_t i = 0; i + 1 < n; i++) {
        double a = metric[i] - value, b = metric[i + 1] - value;
        if (sign(a) == sign(b)) continue;
        double ratio = a == 0 ? HUGE_VAL : fabs(b / a);
        *out = alphacum[i] + (alphacum[i + 1] - alphacum[i]) / (ratio + 1);
        return OK;
    }
    return err("schedule: the metric curve never crosses %g", value);
}

/* beta (T+1) such that every step changes the metric equally much. */
static Err betas_of_curve(float *beta, const double *alphacum, const double *metric, size_t n, int T) {
    if (n < 2) return err("schedule: a metric curve of %zu points, expected at least 2", n);
    double lo = HUGE_VAL, hi = -HUGE_VAL;
    for (size_t i = 0; i < n; i++) {
        if (!(alphacum[i] >= 0 && alphacum[i] <= 1) || !isfinite(metric[i]))
            return err("schedule: point %zu of the metric curve is (%g, %g), expected alphacum in 0..1 and a number",
                       i + 1, alphacum[i], metric[i]);
        lo = metric[i] < lo ? metric[i] : lo;
        hi = metric[i] > hi ? metric[i] : hi;
    }
    double step = (hi - lo) / T, before = 0;
    for (int t = 0; t <= T; t++) {
        double a = 0;
        TRY(curve_crossing(&a, alphacum, metric, n, t == T ? hi : t * step + lo));
        if (t > 0 && !(before > 0 && a <= before))
            return err("schedule: the metric curve gives alphacum %g after %g, expected falling values", a, before);
        if (t > 0) beta[t] = (float)(1 - a / before);
        before = a;
    }
    return OK;
}

/* A text file of two columns, alphacum and metric; empty lines and lines after # are skipped. */
static Err curve_read(double *alphacum, double *metric, size_t *n, size_t max, const char *path) {
    char *text, tail;
    Err e = OK;
    *n = 0;
    TRY(file_text(&text, path, 1 << 20));
    size_t number = 1;
    for (char *line = text, *end; e == OK && *line; line = end, number++) {
        end = line + strcspn(line, "\n");
        if (*end) *end++ = 0;
        const size_t start = strspn(line, " \t\r");
        if (line[start] == 0 || line[start] == '#') continue;
        if (*n == max)
            e = err("%s: more than %zu points", path, max);
        else if (sscanf(line, "%lf %lf %c", &alphacum[*n], &metric[*n], &tail) != 2)
            e = err("%s: line %zu is not two numbers", path, number);
        else
            ++*n;
    }
    free(text);
    return e;
}

static Err betas_of_curve_file(float *beta, const char *path, int T) {
    enum { POINTS = 4096 };
    double *points;
    size_t n;
    TRY(mem_alloc(&points, 2 * POINTS, sizeof *points, "a metric curve"));
    Err e = curve_read(points, points + POINTS, &n, POINTS, path);
    if (e == OK && betas_of_curve(beta, points, points + POINTS, n, T) != OK) e = err_in(path);
    free(points);
    return e;
}

/* "alphacum:a0,a1,...,aT": alpha_t = a_t / a_{t-1}. */
static Err betas_of_alphacum(float *beta, const char *list, int T) {
    double before = 0;
    const char *p = list;
    for (int t = 0; t <= T; t++) {
        char *end;
        double a = strtod(p, &end);
        if (end == p || *end != (t < T ? ',' : 0))
            return err("schedule alphacum:%s: expected %d numbers for %d scales", list, T + 1, T);
        if (!(a >= 0 && a <= 1) || (t > 0 && !(before > 0 && a <= before)))
            return err("schedule alphacum:%s: value %d is %g, expected numbers that fall from 1 to 0", list, t + 1, a);
        if (t > 0) beta[t] = (float)(1 - a / before);
        before = a;
        p = end + 1;
    }
    return OK;
}

/* The metric-spaced schedules of the released models, betas as their checkpoints hold them. */
static const struct {
    const char *name;
    int T;
    float beta[5];
} released[] = {
    {"ffhq_bernoulli_PSIM", 2, {0.3639524579048157f, 1}},
    {"bernoulli_PSIM", 3, {0.1517287641763687f, 0.23063573241233826f, 1}},
    {"bernoulli_PSIM", 5, {0.0901111289858818f, 0.1041797399520874f, 0.13920249044895172f, 0.2660215497016907f, 1}},
};

static Err betas_released(float *beta, const char *name, int T) {
    int known = 0;
    for (size_t i = 0; i < sizeof released / sizeof *released; i++) {
        if (strcmp(name, released[i].name) != 0) continue;
        known = 1;
        if (released[i].T != T) continue;
        memcpy(beta + 1, released[i].beta, (size_t)T * sizeof *beta);
        return OK;
    }
    if (known)
        return err("schedule %s with %d scales is not one of the released models; give its metric as curve:FILE", name,
                   T);
    return err("schedule \"%.200s\": expected geometric, a probability, alphacum:a0,a1,..., curve:FILE, "
               "ffhq_bernoulli_PSIM or bernoulli_PSIM",
               name);
}

Err betas_read(float *beta, const char *redraw_prob, int T) {
    if (strncmp(redraw_prob, "alphacum:", 9) == 0) return betas_of_alphacum(beta, redraw_prob + 9, T);
    if (strncmp(redraw_prob, "curve:", 6) == 0) return betas_of_curve_file(beta, redraw_prob + 6, T);
    char *end;
    const double p = strtod(redraw_prob, &end);
    if (end == redraw_prob || *end != 0) return betas_released(beta, redraw_prob, T);
    for (int t = 1; t <= T; t++) beta[t] = (float)p;
    return OK;
}
