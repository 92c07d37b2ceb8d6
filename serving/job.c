/* job.c - what a job asks for: a JSON object read field by field, with what the model recommends for those that are left
 * out; and back: as JSON, as the command line that draws the same, as the text in a picture. */
#include "serving/serving.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

/* ---- A number for every scale ---- */

typedef struct {
    const char *field;
    double lo, hi;
    int whole;
} ScaleField;

/* out[t] from a number for all, or from a list with the noisiest first */
static int read_scales(Fault *f, double *out, int T, const cJSON *x, const ScaleField *s) {
    char field[64], expected[160];
    double one;
    if (!cJSON_IsArray(x)) {
        if (cJSON_IsNumber(x)) {
            if (!json_number(f, &one, x, s->field, s->lo, s->hi, s->whole)) return 0;
            for (int t = 1; t <= T; t++) out[t] = one;
            return 1;
        }
        snprintf(expected, sizeof expected, "a %snumber of %.10g to %.10g, or a list of %d, the noisiest scale first",
                 s->whole ? "whole " : "", s->lo, s->hi, T);
        return wrong_value(f, 400, s->field, x, expected);
    }
    if (cJSON_GetArraySize(x) != T)
        return fault(f, 400, s->field, "%s: a list of %d: expected %d numbers, one for each scale", s->field,
                     cJSON_GetArraySize(x), T);
    int i = 0;
    for (const cJSON *item = x->child; item; item = item->next, i++) {
        snprintf(field, sizeof field, "%s[%d]", s->field, i);
        if (!json_number(f, &out[T - i], item, field, s->lo, s->hi, s->whole)) return 0;
    }
    return 1;
}

static int read_scale_sizes(Fault *f, size_t *out, int T, const cJSON *x, const ScaleField *s) {
    double number[MAX_SCALES + 1] = {0};
    if (!read_scales(f, number, T, x, s)) return 0;
    for (int t = 1; t <= T; t++) out[t] = (size_t)number[t];
    return 1;
}

/* One number is for the scales that have learnt "no class" too. */
static int read_guidance(Fault *f, Job *j, const cJSON *x) {
    static const ScaleField g = {"guidance", 0, 1000, 0};
    const Model *m = j->served->model;
    const int T = m->schedule.T;
    char field[64] = "guidance";
    int can = 0;
    if (!read_scales(f, j->options.guidance, T, x, &g)) return 0;
    for (int t = 1; t <= T; t++) can += m->null_class[t] >= 0;
    for (int t = T; t >= 1; t--) {
        if (m->null_class[t] >= 0 || j->options.guidance[t] == 1) continue;
        if (cJSON_IsNumber(x) && can) {
            j->options.guidance[t] = 1;
            continue;
        }
        if (cJSON_IsArray(x)) snprintf(field, sizeof field, "guidance[%d]", T - t);
        return fault(f, 422, field, "%s: %.15g: expected 1, for this scale was trained without \"no class\"", field,
                     j->options.guidance[t]);
    }
    return 1;
}

/* ---- The other fields ---- */

static int read_class(Fault *f, Job *j, const cJSON *x) {
    const Model *m = j->served->model;
    int32_t label;
    if (cJSON_IsNull(x)) return 1;
    if (!cJSON_IsString(x)) return wrong_value(f, 400, "class", x, "a name, a number in quotes, or null");
    if (!m->classes.n) return wrong_value(f, 422, "class", x, "none: this model has no classes");
    if (!*x->valuestring || classes_find(&m->classes, x->valuestring, &label) != OK) {
        if (*x->valuestring) return fault(f, 422, "class", "%.700s", err_text());
        return fault(f, 422, "class", "class: \"\": expected its name, number or synset");
    }
    j->class_name = strdup(x->valuestring);
    return j->class_name ? 1 : fault(f, 500, NULL, "no memory");
}

static int read_half(Fault *f, Job *j, const cJSON *x) {
    static const char *const halves[] = {"upper", "lower", "left", "right"};
    for (size_t i = 0; i < 4; i++)
        if (cJSON_IsString(x) && !strcmp(x->valuestring, halves[i])) {
            snprintf(j->half, sizeof j->half, "%s", halves[i]);
            return 1;
        }
    return wrong_value(f, 400, "half", x, "upper, lower, left or right");
}

static int read_size(Fault *f, size_t *out, const cJSON *x, const char *field, double lo, double hi) {
    double number;
    if (!json_number(f, &number, x, field, lo, hi, 1)) return 0;
    *out = (size_t)number;
    return 1;
}

static int read_count(Fault *f, Job *j, const cJSON *x, size_t most) {
    char field[96];
    if (cJSON_IsNumber(x) && x->valuedouble > (double)most) {
        snprintf(field, sizeof field, "a whole number of 1 to %zu (./serve --count-limit)", most);
        return wrong_value(f, 413, "count", x, field);
    }
    return read_size(f, &j->count, x, "count", 1, (double)most);
}

static int read_base64(Fault *f, Blob **out, const cJSON *x, const char *field) {
    uint8_t *bytes;
    size_t size;
    if (*out) return fault(f, 400, field, "%s: there is a part of this name too: expected one of them", field);
    if (!cJSON_IsString(x)) return wrong_value(f, 400, field, x, "a picture in base64");
    const Err e = base64_decode(&bytes, &size, x->valuestring);
    if (e != OK || blob_new(out, bytes, size) != OK)
        return fault(f, e == DAMAGED ? 400 : 500, field, "%s: %s", field, err_text());
    return 1;
}

/* A field of both kinds; -1: it is none. */
static int read_common(Fault *f, Job *j, const cJSON *x, const Offer *o) {
    const int edit = j->kind == DRAW_EDIT, T = j->served->model->schedule.T;
    const ScaleField temperature = {"temperature", 0, 1000, 0}, top_k = {"top_k", 0, 1e9, 1},
                     chain = {"chain_length", edit ? 0 : 1, 1000, 1};
    const char *name = x->string;
    double number;
    if (!strcmp(name, "kind") || !strcmp(name, "model")) return 1;
    if (!strcmp(name, "count")) return read_count(f, j, x, o->most);
    if (!strcmp(name, "first")) return read_size(f, &j->first, x, name, 0, 2147483647);
    if (!strcmp(name, "best_of")) return read_size(f, &j->best_of, x, name, 1, edit ? MAX_CANDIDATES : MAX_BEST_OF);
    if (!strcmp(name, "class")) return read_class(f, j, x);
    if (!strcmp(name, "temperature")) return read_scales(f, j->options.temperature, T, x, &temperature);
    if (!strcmp(name, "top_k")) return read_scale_sizes(f, j->options.top_k, T, x, &top_k);
    if (!strcmp(name, "chain_length")) return read_scale_sizes(f, j->options.chain, T, x, &chain);
    if (!strcmp(name, "guidance")) return read_guidance(f, j, x);
    if (!strcmp(name, "previews")) return json_flag(f, &j->previews, x, name);
    if (!strcmp(name, "owned")) return json_flag(f, &j->owned, x, name);
    if (strcmp(name, "seed") != 0) return -1;
    if (!json_number(f, &number, x, name, 0, 9007199254740991, 1)) return 0;
    j->seed = (uint64_t)number;
    return 1;
}

/* A field of edits alone; -1: it is none. */
static int read_edit(Fault *f, Job *j, const cJSON *x, int is_text) {
    const double side = (double)j->served->model->side;
    const char *name = x->string;
    if (j->kind != DRAW_EDIT) return -1;
    if (!strcmp(name, "half")) return read_half(f, j, x);
    if (!strcmp(name, "window")) return read_size(f, &j->window, x, name, 1, side - 1);
    if (!strcmp(name, "outside")) return read_size(f, &j->outside, x, name, 1, side - 1);
    if (!strcmp(name, "extend")) return read_size(f, &j->extend, x, name, 1, side - 1);
    if (!strcmp(name, "paste")) return json_flag(f, &j->paste, x, name);
    if (!strcmp(name, "image") && !is_text) return read_base64(f, &j->image, x, name);
    if (!strcmp(name, "mask") && !is_text) return read_base64(f, &j->mask, x, name);
    return -1;
}

/* ---- A job ---- */

static int read_kind(Fault *f, Job *j, const cJSON *json) {
    const cJSON *x = cJSON_GetObjectItemCaseSensitive(json, "kind");
    if (!x) return fault(f, 400, "kind", "kind: missing: expected sample or inpaint");
    j->kind = cJSON_IsString(x) && !strcmp(x->valuestring, "inpaint") ? DRAW_EDIT : DRAW_NEW;
    if (cJSON_IsString(x) && (j->kind == DRAW_EDIT || !strcmp(x->valuestring, "sample"))) return 1;
    return wrong_value(f, 400, "kind", x, "sample or inpaint");
}

static int read_model(Fault *f, Job *j, const cJSON *json, const Offer *o) {
    const cJSON *x = cJSON_GetObjectItemCaseSensitive(json, "model");
    j->served = &o->model[0];
    if (!x) return 1;
    if (!cJSON_IsString(x)) return wrong_value(f, 400, "model", x, "a model's name");
    for (size_t i = 0; i < o->models; i++) {
        if (strcmp(o->model[i].name, x->valuestring) != 0) continue;
        j->served = &o->model[i];
        if (j->served->here) return 1;
        return fault(f, 422, "model", "model: '%s' is not here: make %s fetches it", j->served->name, j->served->name);
    }
    return wrong_value(f, 422, "model", x, "one of those that api/models lists");
}

static int check_edit(Fault *f, const Job *j, int is_text) {
    const struct {
        const char *field;
        int is_there;
    } parts[] = {{"mask", j->mask != NULL},
                 {"half", *j->half != 0},
                 {"window", j->window > 0},
                 {"outside", j->outside > 0},
                 {"extend", j->extend > 0}};
    const char *found = NULL;
    size_t passes = 0;
    for (int t = 1; t <= j->served->model->schedule.T; t++) passes += j->options.chain[t];
    if (!passes)
        return fault(f, 400, "chain_length", "chain_length: 0 at every scale: expected a pass at one at least");
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        if (!parts[i].is_there) continue;
        if (found)
            return fault(f, 400, parts[i].field, "%s: %s is there too: expected one of them", parts[i].field, found);
        found = parts[i].field;
    }
    if (j->extend && j->paste)
        return fault(f, 400, "paste", "paste: true: expected false, for with extend the result is the model's picture");
    if (is_text) return 1;
    if (!j->image) return fault(f, 400, "image", "image: missing: expected a picture");
    if (!found) return fault(f, 400, "mask", "mask: missing: expected a mask, half, window, outside or extend");
    if (j->served->model->classes.n > 100 && !j->class_name)
        return fault(f, 422, "class", "class: missing: expected one, for this model has too many to try them all");
    return 1;
}

/* A seed that no other job has, short enough to be typed again */
static uint64_t fresh_seed(void) {
    char text[16];
    uint64_t seed = 0;
    if (random_text(text, 6) == OK)
        for (const char *p = text; *p; p++) seed = seed * 64 + (unsigned char)*p;
    return seed & UINT32_MAX;
}

int job_read(Job *j, const Offer *o, const cJSON *json, Blob *image, Blob *mask, int is_text, Fault *f) {
    char shown[SHOWN_BYTES];
    *j = (Job){.count = 1, .previews = 1, .paste = 1, .seed = fresh_seed(), .image_name = "image.png"};
    if (!cJSON_IsObject(json)) return fault(f, 400, NULL, "the body: expected a JSON object");
    if (!read_kind(f, j, json) || !read_model(f, j, json, o)) return 0;
    j->options = j->served->recommended[j->kind];
    j->best_of = j->served->many[j->kind];
    if (j->kind == DRAW_EDIT && image) j->image = blob_hold(image);
    if (j->kind == DRAW_EDIT && mask) j->mask = blob_hold(mask);
    if (j->kind != DRAW_EDIT && (image || mask))
        return fault(f, 400, image ? "image" : "mask", "%s: a part that this kind of job has not",
                     image ? "image" : "mask");
    for (const cJSON *x = json->child; x; x = x->next) {
        int known = read_common(f, j, x, o);
        if (known < 0) known = read_edit(f, j, x, is_text);
        if (known == 0) return 0;
        if (known < 0)
            return fault(f, 400, shown_text(shown, x->string), "%s: a job of this kind has no such field", shown);
    }
    j->options.seed = j->seed;
    if (j->extend && !cJSON_GetObjectItemCaseSensitive(json, "paste")) j->paste = 0;
    j->has_mask = j->mask != NULL;
    return j->kind == DRAW_EDIT ? check_edit(f, j, is_text) : 1;
}

/* ---- Its pictures ---- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t one_less = PTHREAD_COND_INITIALIZER;
static int decoding; /* threads that decode pictures: two at a time, for a large one takes much memory */

static void may_decode(int change) {
    pthread_mutex_lock(&lock);
    while (change > 0 && decoding == 2) pthread_cond_wait(&one_less, &lock);
    decoding += change;
    pthread_cond_signal(&one_less);
    pthread_mutex_unlock(&lock);
}

/* Can they be read, and do they fit each other and the model? */
static int check_pictures(Fault *f, Job *j) {
    static const struct {
        FileKind kind;
        const char *name;
    } names[] = {{FILE_PNG, "image.png"}, {FILE_JPEG, "image.jpg"}, {FILE_WEBP, "image.webp"}};
    const EditArgs a = job_edit_args(j);
    const char *kind;
    EditPicture p;
    j->image_name = names[0].name;
    for (size_t i = 0; i < 3; i++)
        if (file_kind(&kind, a.image, a.image_bytes) == names[i].kind) j->image_name = names[i].name;
    may_decode(1);
    const Err e = edit_read(&p, j->served->model, &a);
    const size_t classes = j->served->model->classes.n, tokens = j->served->model->h * j->served->model->w;
    const int tells_nothing = e == OK && p.redrawn == tokens && classes && !j->class_name;
    if (j->paste) j->paste_pixels = p.H * p.W;
    j->profile_bytes = p.profile.size;
    edit_free(&p);
    may_decode(-1);
    if (tells_nothing)
        return fault(f, 422, "class", "class: missing: expected one, for no token is kept, so that nothing tells it");
    if (e == OK) return 1;
    const char *field = p.unreadable ? p.unreadable : a.mask ? "mask" : "image";
    return fault(f, p.too_many ? 413 : p.unreadable ? 415 : 422, field, "%s: %s", field, err_text());
}

static int is_type(const Request *r, const char *type) {
    return !strncasecmp(r->type, type, strlen(type)) && strchr("; \t", r->type[strlen(type)]);
}

/* A form: the parts job, image and mask, each once at most */
static int job_of_form(Job *j, const Offer *o, const Request *r, Fault *f) {
    static const char *const names[] = {"job", "image", "mask"};
    FormPart part[FORM_PARTS];
    const FormPart *found[3] = {0};
    Blob *picture[2] = {0};
    size_t parts;
    char shown[SHOWN_BYTES];
    if (!form_read(f, part, &parts, r)) return 0;
    for (size_t i = 0; i < parts; i++) {
        size_t k = 0;
        while (k < 3 && strcmp(part[i].name, names[k]) != 0) k++;
        if (k == 3)
            return fault(f, 400, NULL, "part '%s': expected job, image and mask", shown_text(shown, part[i].name));
        if (found[k]) return fault(f, 400, names[k], "part %s: expected once", names[k]);
        found[k] = &part[i];
    }
    if (!found[0]) return fault(f, 400, "job", "part job: missing");
    cJSON *json = json_read(f, found[0]->bytes, found[0]->size);
    int ok = json != NULL;
    for (size_t k = 0; k < 2 && ok; k++) {
        if (!found[k + 1]) continue;
        ok = blob_new(&picture[k], NULL, found[k + 1]->size) == OK;
        if (ok) memcpy(picture[k]->bytes, found[k + 1]->bytes, found[k + 1]->size);
        if (!ok) fault(f, 500, NULL, "%s", err_text());
    }
    ok = ok && job_read(j, o, json, picture[0], picture[1], 0, f) && (j->kind == DRAW_NEW || check_pictures(f, j));
    blob_release(picture[0]), blob_release(picture[1]);
    cJSON_Delete(json);
    return ok;
}

int job_of_request(Job *j, const Offer *o, const Request *r, Fault *f) {
    if (is_type(r, "multipart/form-data")) return job_of_form(j, o, r, f);
    if (!is_type(r, "application/json"))
        return fault(f, 415, NULL, "Content-Type: expected application/json or multipart/form-data");
    cJSON *json = json_read(f, r->body, r->size);
    const int ok = json && job_read(j, o, json, NULL, NULL, 0, f) && (j->kind == DRAW_NEW || check_pictures(f, j));
    cJSON_Delete(json);
    return ok;
}

void job_free(Job *j) {
    free(j->class_name);
    blob_release(j->image);
    blob_release(j->mask);
    j->class_name = NULL;
    j->image = j->mask = NULL;
}

/* ---- And back ---- */

cJSON *job_json(const Job *j) {
    const SampleOptions *o = &j->options;
    const int T = j->served->model->schedule.T;
    cJSON *x = cJSON_CreateObject();
    cJSON_AddStringToObject(x, "kind", j->kind == DRAW_EDIT ? "inpaint" : "sample");
    cJSON_AddStringToObject(x, "model", j->served->name);
    cJSON_AddNumberToObject(x, "count", (double)j->count);
    cJSON_AddNumberToObject(x, "first", (double)j->first);
    cJSON_AddNumberToObject(x, "seed", (double)j->seed);
    if (j->class_name)
        cJSON_AddStringToObject(x, "class", j->class_name);
    else
        cJSON_AddNullToObject(x, "class");
    cJSON_AddItemToObject(x, "temperature", scales_json(o->temperature, T));
    cJSON_AddItemToObject(x, "top_k", scales_json_sizes(o->top_k, T));
    cJSON_AddItemToObject(x, "guidance", scales_json(o->guidance, T));
    cJSON_AddItemToObject(x, "chain_length", scales_json_sizes(o->chain, T));
    cJSON_AddNumberToObject(x, "best_of", (double)j->best_of);
    cJSON_AddBoolToObject(x, "previews", j->previews);
    cJSON_AddBoolToObject(x, "owned", j->owned);
    if (j->kind != DRAW_EDIT) return x;
    if (*j->half) cJSON_AddStringToObject(x, "half", j->half);
    if (j->window) cJSON_AddNumberToObject(x, "window", (double)j->window);
    if (j->outside) cJSON_AddNumberToObject(x, "outside", (double)j->outside);
    if (j->extend) cJSON_AddNumberToObject(x, "extend", (double)j->extend);
    cJSON_AddBoolToObject(x, "paste", j->paste);
    return x;
}

typedef struct {
    char *text;
    size_t n, room;
} Line;

/* A word as the shell reads it back */
static void add_word(Line *l, const char *word) {
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./,+=:@%";
    if (mem_grow(&l->text, l->n, 4 * strlen(word) + 4, &l->room, 1, "a command") != OK) return;
    char *to = l->text + l->n;
    const int quoted = !*word || word[strspn(word, plain)];
    if (l->n) *to++ = ' ';
    if (quoted) *to++ = '\'';
    for (const char *p = word; *p; p++)
        if (*p == '\'')
            to += sprintf(to, "'\\''");
        else
            *to++ = *p;
    if (quoted) *to++ = '\'';
    *to = 0;
    l->n = (size_t)(to - l->text);
}

static void add_number(Line *l, const char *option, uint64_t number) {
    char text[32];
    snprintf(text, sizeof text, "%llu", (unsigned long long)number);
    add_word(l, option);
    add_word(l, text);
}

/* An option with a number for each scale, unless the program takes the same by itself */
static void add_scales(Line *l, const char *option, const double *x, const double *recommended, int T) {
    char list[MAX_SCALES * 32];
    int same = 1;
    if (!memcmp(x + 1, recommended + 1, (size_t)T * sizeof *x)) return;
    for (int t = 2; t <= T; t++) same &= x[t] == x[1];
    add_word(l, option);
    add_word(l, scales_text(list, x, same ? 1 : T));
}

static void add_scale_sizes(Line *l, const char *option, const size_t *x, const size_t *recommended, int T) {
    double a[MAX_SCALES + 1], b[MAX_SCALES + 1];
    for (int t = 1; t <= T; t++) a[t] = (double)x[t], b[t] = (double)recommended[t];
    add_scales(l, option, a, b, T);
}

static void add_edit(Line *l, const Job *j) {
    if (j->has_mask) add_word(l, "--mask"), add_word(l, "mask.png");
    if (*j->half) add_word(l, "--half"), add_word(l, j->half);
    if (j->window) add_number(l, "--window", j->window);
    if (j->outside) add_number(l, "--outside", j->outside);
    if (j->extend) add_number(l, "--extend", j->extend);
}

cJSON *job_command(const Job *j, const Offer *o) {
    const SampleOptions *s = &j->options, *usual = &j->served->recommended[j->kind];
    const int T = j->served->model->schedule.T, edit = j->kind == DRAW_EDIT;
    Line l = {0};
    add_word(&l, edit ? "./inpaint" : "./sample");
    add_word(&l, j->served->given);
    if (edit) add_word(&l, j->image_name), add_edit(&l, j);
    add_number(&l, "-n", j->count);
    if (j->first) add_number(&l, "--first", j->first);
    add_number(&l, "--seed", j->seed);
    if (j->class_name) add_word(&l, "--class"), add_word(&l, j->class_name);
    add_scales(&l, "--temperature", s->temperature, usual->temperature, T);
    add_scale_sizes(&l, "--top-k", s->top_k, usual->top_k, T);
    add_scales(&l, "--guidance", s->guidance, usual->guidance, T);
    add_scale_sizes(&l, "--chain-length", s->chain, usual->chain, T);
    if (j->best_of != j->served->many[j->kind]) add_number(&l, edit ? "--candidates" : "--best-of", j->best_of);
    if (o->weights) add_word(&l, "--weights"), add_word(&l, o->weights);
    if (o->device) add_word(&l, "--device"), add_word(&l, o->device);
    if (edit && j->paste)
        add_word(&l, "--paste-into"), add_word(&l, j->image_name), add_word(&l, "-o"), add_word(&l, "out.png");
    cJSON *x = l.text ? cJSON_CreateString(l.text) : NULL;
    free(l.text);
    return x;
}

EditArgs job_edit_args(const Job *j) {
    EditArgs a = {.half = *j->half ? j->half : NULL,
                  .window = j->window,
                  .outside = j->outside,
                  .extend = j->extend,
                  .paste = j->paste};
    if (j->image) a.image = j->image->bytes, a.image_bytes = j->image->size;
    if (j->mask) a.mask = j->mask->bytes, a.mask_bytes = j->mask->size;
    a.most_pixels = MOST_PIXELS;
    return a;
}

Err job_text(Config *text, const Job *j, size_t k) {
    const Model *m = j->served->model;
    const SamplingArgs a = {.class_name = j->class_name, .seed = j->seed};
    TRY(sampling_text(text, &a, &j->options, m));
    const EditArgs edit = job_edit_args(j);
    if (j->kind == DRAW_EDIT)
        TRY(sampling_text_edit(text, j->image_name, j->best_of, &edit));
    else if (j->best_of > 1)
        TRY(config_set(text, "best-of", "%zu", j->best_of));
    return sampling_text_place(text, 1, j->first + k, j->count > 1);
}

/* ---- What a picture's text says ---- */

/* "1,0.9,0.8" as a list */
static void add_list(cJSON *json, const char *field, const char *list) {
    cJSON *x = cJSON_AddArrayToObject(json, field);
    for (const char *p = list;;) {
        char *end;
        const double number = strtod(p, &end);
        cJSON_AddItemToArray(x, end == p ? cJSON_CreateNull() : cJSON_CreateNumber(number));
        if (*end != ',') {
            if (*end) cJSON_AddItemToArray(x, cJSON_CreateNull());
            return;
        }
        p = end + 1;
    }
}

static void add_digits(cJSON *json, const char *field, const char *text) {
    if (*text && !text[strspn(text, "0123456789")])
        cJSON_AddNumberToObject(json, field, strtod(text, NULL));
    else
        cJSON_AddStringToObject(json, field, text);
}

static void add_model(cJSON *json, const Offer *o, const char *text) {
    const char *name = last_part(text);
    for (size_t i = 0; i < o->models; i++)
        if (o->model[i].here && !strcmp(last_part(o->model[i].model->folder), name)) name = o->model[i].name;
    cJSON_AddStringToObject(json, "model", name);
}

int job_of_text(Job *j, const Offer *o, const Config *text, Fault *f) {
    static const struct {
        const char *key, *field;
        enum { TEXT, NUMBER, LIST } type;
    } keys[] = {
        {"seed", "seed", NUMBER},       {"class", "class", TEXT},          {"temperature", "temperature", LIST},
        {"top-k", "top_k", LIST},       {"guidance", "guidance", LIST},    {"chain-length", "chain_length", LIST},
        {"best-of", "best_of", NUMBER}, {"candidates", "best_of", NUMBER}, {"count", "count", NUMBER},
        {"first", "first", NUMBER},     {"picture", "first", NUMBER},      {"half", "half", TEXT},
        {"window", "window", NUMBER},   {"outside", "outside", NUMBER},    {"extend", "extend", NUMBER}};
    const char *model = config_get(text, "", "model"), *paste = config_get(text, "", "paste");
    const int edit = config_get(text, "", "inpainted") != NULL;
    if (!model || !config_get(text, "", "seed"))
        return fault(f, 422, NULL, "the picture says nothing of how it was drawn: expected one of ours");
    cJSON *json = cJSON_CreateObject();
    cJSON_AddStringToObject(json, "kind", edit ? "inpaint" : "sample");
    add_model(json, o, model);
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        const char *value = config_get(text, "", keys[i].key);
        if (!value) continue;
        if (keys[i].type == TEXT) cJSON_AddStringToObject(json, keys[i].field, value);
        if (keys[i].type == NUMBER) add_digits(json, keys[i].field, value);
        if (keys[i].type == LIST) add_list(json, keys[i].field, value);
    }
    if (edit) cJSON_AddBoolToObject(json, "paste", paste && !strcmp(paste, "true"));
    if (!config_get(text, "", "best-of") && !config_get(text, "", "candidates"))
        cJSON_AddNumberToObject(json, "best_of", 1);
    if (!config_get(text, "", "guidance")) cJSON_AddNumberToObject(json, "guidance", 1);
    const int ok = job_read(j, o, json, NULL, NULL, 1, f);
    if (!ok) f->status = f->status == 500 ? 500 : 422;
    cJSON_Delete(json);
    return ok;
}
