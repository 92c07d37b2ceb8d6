/* score.c - what a model's bound says of a picture: is it like what the model has learnt? */
#include "sampling/sampling.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

const char *score_anchors(char text[SCORE_BYTES], const Chain *chain, const Config *meta) {
    double own[2], blind = blind_bound(chain, 1);
    if (own_range(own, meta, "own_nats"))
        snprintf(text, SCORE_BYTES, "its good ones have %.1f to %.1f, blind guessing %.1f; less is likelier", own[0],
                 own[1], blind);
    else
        snprintf(text, SCORE_BYTES, "blind guessing has %.1f; less is likelier", blind);
    return text;
}

/* ---- Is the kept part of a picture like what the model has learnt? ---- */

static Err check_nats(const Model *m, double nats) {
    return isfinite(nats) ? OK : err("%s: it gives no usable probabilities (NaN or infinite logits)", m->folder);
}

/* How far the first stage's picture of these tokens is off: root mean square difference of pixels, counted in 0..1, a
 * mean over those of the kept tokens. */
static Err first_stage_error(double *error, Model *m, const real *image, const int32_t *tokens, const uint8_t *keep) {
    const size_t side = m->side, patch = side / m->h;
    size_t n = 0;
    double sum = 0;
    real *drawn;
    TRY(mem_alloc(&drawn, 3 * side, side * sizeof *drawn, "picture"));
    const Err e = decode_pictures(m, tokens, 1, drawn);
    for (size_t i = 0; i < 3 * side * side && e == OK; i++) {
        const size_t y = i / side % side / patch, x = i % side / patch;
        if (keep && !keep[y * m->w + x]) continue;
        const double d = ((double)image[i] - fmin(fmax((double)drawn[i], -1), 1)) / 2;
        sum += d * d, n++;
    }
    *error = n ? sqrt(sum / (double)n) : 0;
    free(drawn);
    return e;
}

Err familiar(Familiar *f, Model *m, const real *image, const int32_t *tokens, const uint8_t *keep, int32_t label,
             uint64_t seed) {
    const Chain chain = model_chain(m);
    *f = (Familiar){.blind = blind_bound(&chain, m->schedule.T > 1 ? 2 : 1), .error_known = {0, 0.15}};
    f->nats_known[1] = 0.75 * f->blind;
    own_range(f->nats_known, &m->meta, "familiar_nats");
    own_range(f->error_known, &m->meta, "familiar_error");
    TRY(kept_bound(&chain, tokens, keep, label, seed, &f->nats));
    TRY(check_nats(m, f->nats));
    TRY(first_stage_error(&f->error, m, image, tokens, keep));
    f->unlike = f->nats > 1.35 * f->nats_known[1] || f->error > 1.65 * f->error_known[1];
    return OK;
}

void familiar_text(char text[ERR_MAX], const Model *m, const Familiar *f) {
    char nats[48] = "", error[48] = "";
    if (f->nats_known[0] > 0)
        snprintf(nats, sizeof nats, "what it knows has %.1f to %.1f, ", f->nats_known[0], f->nats_known[1]);
    if (f->error_known[0] > 0)
        snprintf(error, sizeof error, " (what it knows %.2f to %.2f)", f->error_known[0], f->error_known[1]);
    snprintf(text, ERR_MAX,
             "the kept part is unlike all that %.80s has learnt, so expect nonsense: %.1f nats per kept token (%sblind "
             "guessing %.1f), and its first stage draws it %.2f off%s",
             last_part(m->folder), f->nats, nats, f->blind, f->error, error);
}

/* ---- ./sample --score ---- */

typedef struct {
    Model *model;
    const SamplingArgs *args;
    Prep prep;
    real *image;     /* (3,side,side) */
    int32_t *tokens; /* (N) */
    uint8_t *all;    /* (N) ones */
    int32_t *label;  /* (cases), or NULL: a model without classes */
    size_t cases;
} Score;

/* The classes to try: the user's, else all. */
static Err score_classes(Score *s) {
    enum { MOST = 100 };
    const size_t n = s->model->classes.n;
    int32_t one = -1;
    if (s->args->class_name) TRY(model_class(s->model, s->args->class_name, &one));
    s->cases = n && one < 0 ? n : 1;
    if (s->cases > MOST)
        return err("%s has %zu classes, too many to try them all; name one: --class", s->model->folder, n);
    if (!n) return OK;
    TRY(mem_alloc(&s->label, s->cases, sizeof *s->label, "classes"));
    for (size_t c = 0; c < s->cases; c++) s->label[c] = one < 0 ? (int32_t)c : one;
    return OK;
}

static Err score_room(Score *s) {
    const size_t side = s->model->side, N = s->model->h * s->model->w;
    TRY(score_classes(s));
    TRY(mem_alloc(&s->image, 3 * side, side * sizeof *s->image, "picture"));
    TRY(mem_alloc(&s->tokens, N, sizeof *s->tokens, "its tokens"));
    TRY(mem_alloc(&s->all, N, 1, "its tokens"));
    memset(s->all, 1, N);
    return prep_read(&s->prep, &s->model->meta);
}

/* Not one of our own files that show several pictures */
static Err single_check(const char *path) {
    Config text = {0};
    uint8_t *bytes = NULL;
    size_t size;
    TRY(file_bytes(&bytes, &size, path, IMAGE_FILE_BYTES, NULL));
    Err e = OK;
    if (png_read_texts(&text, bytes, size) == OK) { /* else it is no PNG */
        const char *software = config_get(&text, "", "Software"), *what = config_get(&text, "", "count");
        if (config_get(&text, "", "compare")) what = "several";
        if (config_get(&text, "", "frames")) what = "the way to";
        if (what && software && !strcmp(software, "imagebart.c"))
            e = err("%s: %s pictures, as ./sample or ./inpaint drew them side by side; --score takes single ones, "
                    "which -o DIR/ writes",
                    path, what);
    }
    free(bytes);
    config_free(&text);
    return e;
}

/* All of them can be read: looked at before the work, so that no row is printed if one cannot. */
static Err pictures_check(const Score *s, const OptionList *pictures) {
    for (size_t i = 0; i < pictures->n; i++) {
        Image im = {0};
        const Err e = image_read_as(&im, pictures->item[i], prep_how(s->prep) | IMAGE_UPRIGHT);
        image_free(&im);
        if (e != OK) return e;
        TRY(single_check(pictures->item[i]));
    }
    return OK;
}

enum { SCORE_SEED = 1 }; /* the same numbers whenever it is asked */

static Err score_picture(Score *s, const char *path) {
    Model *m = s->model;
    const Chain chain = model_chain(m);
    char title[CLASS_TITLE_BYTES] = "-";
    double error, nats, least = 0;
    size_t best = 0;
    Image im = {0};
    Err e = image_read_as(&im, path, prep_how(s->prep) | IMAGE_UPRIGHT);
    if (e == OK) e = image_prepare(s->image, &im, s->prep, m->side, -1, -1, 0);
    image_free(&im);
    if (e == OK) e = vqgan_plan(m->vqgan, 1, m->side, m->side, 0);
    if (e == OK) e = vqgan_encode(m->vqgan, s->image, 1, m->side, m->side, SCORE_SEED, NULL, NULL, s->tokens);
    for (size_t c = 0; c < s->cases && e == OK; c++) {
        e = kept_bound(&chain, s->tokens, s->all, s->label ? s->label[c] : -1, SCORE_SEED, &nats);
        if (c == 0 || nats < least) least = nats, best = c;
    }
    if (e == OK) e = picture_bounds(&chain, s->tokens, s->label ? s->label + best : NULL, 1, SCORE_SEED, &nats);
    if (e == OK) e = check_nats(m, nats + least);
    if (e == OK) e = first_stage_error(&error, m, s->image, s->tokens, NULL);
    if (e != OK) return e;
    if (s->label) class_title(title, &m->classes, (size_t)s->label[best]);
    char name[PATH_BYTES];
    printf("%s\t%.2f\t%.2f\t%.3f\t%s\n", printable(name, path), least, nats, error, title);
    return OK;
}

/* What the numbers are to be held against */
static void score_end(const SamplingArgs *a, Model *m) {
    const Chain chain = model_chain(m);
    const int T = m->schedule.T;
    double known[2], off[2];
    say(a, "nats per token: blind guessing has %.1f, with scale 1 %.1f; less is likelier",
        blind_bound(&chain, T > 1 ? 2 : 1), blind_bound(&chain, 1));
    if (own_range(known, &m->meta, "familiar_nats")) say(a, "; what it knows has %.1f to %.1f", known[0], known[1]);
    if (own_range(off, &m->meta, "familiar_error"))
        say(a, ", drawn by its first stage %.2f to %.2f off", off[0], off[1]);
    say(a, "\n");
    if (T > 1)
        say(a, "compare by the first number: with scale 1 is for pictures known by heart and for the tokens that "
               "./sample drew; encoding a picture again changes many of them, which scale 1 may find very unlikely\n");
}

Err score_pictures(SamplingArgs *a, OptionList *pictures) {
    const NamedModel *missing;
    struct stat st;
    Model m;
    Score s = {.model = &m, .args = a};
    if (stat(a->model, &st) == 0 && S_ISREG(st.st_mode)) { /* no MODEL was given: all are pictures */
        if (pictures->n == pictures->most) usage_error("--score: more than %zu pictures", pictures->most);
        memmove(pictures->item + 1, pictures->item, pictures->n++ * sizeof *pictures->item);
        pictures->item[0] = a->model, a->model = "emoji";
    }
    if (pictures->n == 0) usage_error("--score which pictures? ./sample [MODEL] --score PICTURE...");
    sampling_start(a, &m, &missing);
    sampling_memory(a, &m, BOUND_ROWS, 1);
    Err e = score_room(&s);
    if (e == OK) e = pictures_check(&s, pictures);
    if (e == OK) printf("picture\tnats per token\twith scale 1\tfirst stage off by\tlikeliest class\n");
    for (size_t i = 0; i < pictures->n && e == OK; i++) e = score_picture(&s, pictures->item[i]);
    if (e == OK) score_end(a, &m);
    free(s.image), free(s.tokens), free(s.all), free(s.label);
    model_close(&m);
    return e;
}
