/* models.c - the models that are served, and what a client is told of them. */
#include "sampling/libimagebart.h"
#include "serving/serving.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What it recommends for new pictures or edits */
static void recommended_of(Served *s, DrawKind kind) {
    SampleOptions *o = &s->recommended[kind];
    sample_defaults(o);
    for (int t = 1; t <= s->model->schedule.T; t++) {
        imagebart_advice a;
        imagebart_get_advice(s->library, kind == DRAW_EDIT, (size_t)t, &a);
        o->temperature[t] = a.temperature, o->guidance[t] = a.guidance;
        o->top_k[t] = a.top_k, o->chain[t] = a.chain_length;
        s->many[kind] = a.best_of;
    }
}

static Err served_open(Served *s, const char *given, WeightFormat weights, int cuda) {
    const NamedModel *named = find_named(given);
    memset(s, 0, sizeof *s);
    s->given = given;
    s->name = last_part(given);
    s->title = named ? named->what : s->name;
    if (imagebart_open_on(&s->library, given, weight_name(weights), cuda ? "cuda" : "cpu") != IMAGEBART_OK)
        return FAILED;
    s->here = 1;
    s->model = library_model(s->library);
    recommended_of(s, DRAW_NEW);
    recommended_of(s, DRAW_EDIT);
    s->memory = imagebart_memory(s->library);
    return s->memory ? OK : FAILED;
}

static void served_absent(Served *s, const NamedModel *named) {
    imagebart_close(s->library);
    memset(s, 0, sizeof *s);
    s->given = s->name = named->name;
    s->title = named->what;
}

/* A list with the noisiest scale first */
cJSON *scales_json(const double *x, int T) {
    cJSON *list = cJSON_CreateArray();
    for (int t = T; t >= 1; t--) cJSON_AddItemToArray(list, cJSON_CreateNumber(x[t]));
    return list;
}

cJSON *scales_json_sizes(const size_t *x, int T) {
    double number[MAX_SCALES + 1];
    for (int t = 1; t <= T; t++) number[t] = (double)x[t];
    return scales_json(number, T);
}

static cJSON *recommended_json(const Served *s, DrawKind kind) {
    const SampleOptions *o = &s->recommended[kind];
    const int T = s->model->schedule.T;
    cJSON *x = cJSON_CreateObject();
    cJSON_AddItemToObject(x, "temperature", scales_json(o->temperature, T));
    cJSON_AddItemToObject(x, "top_k", scales_json_sizes(o->top_k, T));
    cJSON_AddItemToObject(x, "guidance", scales_json(o->guidance, T));
    cJSON_AddItemToObject(x, "chain_length", scales_json_sizes(o->chain, T));
    cJSON_AddNumberToObject(x, "best_of", (double)s->many[kind]);
    return x;
}

static cJSON *absent_json(const Served *s) {
    static const char *const unknown[] = {"width",           "height", "grid",      "codebook", "scales",  "classes",
                                          "guidance_scales", "betas",  "alpha_bar", "defaults", "editing", "memory"};
    char how[64];
    cJSON *x = cJSON_CreateObject();
    cJSON_AddStringToObject(x, "name", s->name);
    cJSON_AddStringToObject(x, "title", s->title);
    cJSON_AddBoolToObject(x, "here", 0);
    snprintf(how, sizeof how, "make %.50s", s->name);
    cJSON_AddStringToObject(x, "how", how);
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++) cJSON_AddNullToObject(x, unknown[i]);
    cJSON_AddBoolToObject(x, "text", 0);
    return x;
}

/* beta_t, and alpha_bar_t = alpha_1 ... alpha_t */
static void add_schedule(cJSON *x, const Schedule *s) {
    cJSON *betas = cJSON_AddArrayToObject(x, "betas"), *alpha_bar = cJSON_AddArrayToObject(x, "alpha_bar");
    for (int t = s->T; t >= 1; t--) {
        cJSON_AddItemToArray(betas, float_json(s->beta[t]));
        cJSON_AddItemToArray(alpha_bar, float_json(s->alphacum[t]));
    }
}

cJSON *served_json(const Served *s) {
    const Model *m = s->model;
    if (!s->here) return absent_json(s);
    cJSON *x = cJSON_CreateObject(), *list;
    cJSON_AddStringToObject(x, "name", s->name);
    cJSON_AddStringToObject(x, "title", s->title);
    cJSON_AddBoolToObject(x, "here", 1);
    cJSON_AddNullToObject(x, "how");
    cJSON_AddNumberToObject(x, "width", (double)m->side);
    cJSON_AddNumberToObject(x, "height", (double)m->side);
    list = cJSON_AddArrayToObject(x, "grid");
    cJSON_AddItemToArray(list, cJSON_CreateNumber((double)m->h));
    cJSON_AddItemToArray(list, cJSON_CreateNumber((double)m->w));
    cJSON_AddNumberToObject(x, "codebook", (double)m->K);
    cJSON_AddNumberToObject(x, "scales", m->schedule.T);
    list = cJSON_AddArrayToObject(x, "classes");
    for (size_t i = 0; i < m->classes.n; i++) cJSON_AddItemToArray(list, cJSON_CreateString(m->classes.name[i]));
    list = cJSON_AddArrayToObject(x, "guidance_scales");
    for (int t = m->schedule.T; t >= 1; t--) cJSON_AddItemToArray(list, cJSON_CreateBool(m->null_class[t] >= 0));
    add_schedule(x, &m->schedule);
    cJSON_AddItemToObject(x, "defaults", recommended_json(s, DRAW_NEW));
    cJSON_AddItemToObject(x, "editing", recommended_json(s, DRAW_EDIT));
    cJSON_AddNumberToObject(x, "memory", (double)s->memory);
    cJSON_AddBoolToObject(x, "text", 0);
    return x;
}

static Err is_new(Offer *o, const Served *s) {
    for (const Served *other = o->model; other < s; other++) {
        o->twice = !strcmp(other->name, s->name) || !strcmp(other->model->folder, s->model->folder);
        if (o->twice) return err("%s and %s: a model of this name twice", other->given, s->given);
    }
    return OK;
}

/* Those that are here; the others are listed. */
static Err open_named(Offer *o, const NamedModel *named, size_t n, WeightFormat weights, int cuda) {
    for (size_t i = 0; i < n; i++, o->models++) {
        char missing[32];
        const size_t files = model_files(missing, &named[i]);
        if (!*missing && served_open(&o->model[i], named[i].name, weights, cuda) == OK) continue;
        if (*missing && files) say_text("%s is left out: %s is missing\n", named[i].name, missing);
        if (!*missing) say_text("%s is left out: %s\n", named[i].name, err_text());
        served_absent(&o->model[i], &named[i]);
    }
    return o->model[0].here ? OK : err("the bundled model is missing; ./serve FOLDER serves another");
}

Err offer_open(Offer *o, const OptionList *given, WeightFormat weights, int cuda) {
    size_t n;
    const NamedModel *named = named_models(&n);
    TRY(mem_alloc(&o->model, given->n ? given->n : n, sizeof *o->model, "models"));
    if (!given->n) return open_named(o, named, n, weights, cuda);
    for (; o->models < given->n; o->models++) {
        TRY(served_open(&o->model[o->models], given->item[o->models], weights, cuda));
        TRY(is_new(o, &o->model[o->models]));
    }
    return OK;
}

void offer_close(Offer *o) {
    for (size_t i = 0; i < o->models; i++) imagebart_close(o->model[i].library);
    free(o->model);
}
