/* options.c - what ./sample and ./inpaint ask and say alike.
 *
 * A value per scale is given as "a,b,c", for scale T first, which is drawn first; one value is for all. What the user
 * does not say, the model's file may recommend. */
#include "sampling/sampling.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* ---- Options ---- */

/* A seed that no other run has, even of the same second: from the system, else from clock and process. Short enough to
 * be typed again. */
static uint64_t fresh_seed(void) {
    uint32_t seed = 0;
    FILE *f = fopen("/dev/urandom", "rb");
    const int random = f && fread(&seed, sizeof seed, 1, f) == 1;
    if (f) fclose(f);
    if (random) return seed;
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return rng_below((uint64_t)t.tv_sec, (uint64_t)t.tv_nsec, (uint64_t)getpid(), UINT32_MAX);
}

void sampling_parse(int argc, char **argv, const Option *own, SamplingArgs *a, const char *intro) {
    enum { MOST = 64 };
    const Option shared[] = {
        {OPT_U64, "--seed", "N", &a->seed, 0, 0, "same seed, same pictures (default: a new one; always printed)"},
        {OPT_SIZE, "--first", "N", &a->first, 0, INT32_MAX,
         "number of the first picture (default 0): --first 5 -n 1 is the sixth that\n-n 6 gives"},
        {OPT_STRING, "--class", "NAME|ID", &a->class_name, 0, 0,
         "which class, for models that have classes; ImageNet's also by synset\n(n02099601) or any WordNet name "
         "(\"golden retriever\")"},
        {OPT_STRING, "--temperature", "T,..", &a->temperature, 0, 0,
         "per scale, noisiest first, or one for all; lower is safer (default: what the\nmodel recommends, else 1)"},
        {OPT_STRING, "--top-k", "K,..", &a->top_k, 0, 0,
         "draw among the K likeliest tokens only; per scale or one for all (default:\nwhat the model recommends, else "
         "0: all)"},
        {OPT_STRING, "--guidance", "G,..", &a->guidance, 0, 0,
         "more of the class: logits = uncond + G (cond - uncond); per scale or one\nfor all; needs ./train "
         "--label-dropout (default: what the model recommends,\nelse 1: none)"},
        {OPT_FLAG, "--official-temperature", NULL, &a->official_temperature, 0, 0,
         "as the official code: --temperature acts on the noisiest scale only"},
        {OPT_STRING, "--chain-length", "L,..", &a->chain_length, 0, 0,
         "passes of every scale, with some noise in between; per scale or one\nfor all (default: what the model "
         "recommends)"},
        {OPT_FLAG, "--no-ema", NULL, &a->no_ema, 0, 0,
         "the trained weights, not their moving average, where a file has both"},
        {OPT_STRING, "--weights", "TYPE", &a->weights, 0, 0,
         "the transformers' matrices as f32 (default), bf16 or int8: faster, less exact, and\n"
         "products of both networks are of bf16 then. bf16x3: three products of bf16 for one,\n"
         "within 3e-5 of f32, faster than f32 with AMX"},
        {OPT_SIZE, "--batch", "N", &a->batch, 1, 4096, "samples computed side by side (default 16)"},
        {OPT_SIZE, "--block", "N", &a->block, 0, DECODE_BLOCK,
         "guess ahead up to N positions: 1 none, 0 (default) as many as pay off;\nthe result does not depend on it"},
        {OPT_STRING, "--device", "cpu|cuda", &a->device, 0, 0,
         "where everything runs (default: a GPU if there is one)"},
        {OPT_SIZE, "--threads", "N", &a->threads, 0, 4096, "0 (default): all; the result does not depend on it"},
        {OPT_FLAG, "--show", NULL, &a->show, 0, 0, "draw the result in the terminal too"},
        {OPT_STRING, "--animate", "FILE.png", &a->animate, 0, 0,
         "also the way from noise to the pictures, as an animated PNG"},
        {OPT_SIZE, "--enlarge", "N", &a->enlarge, 1, MAX_ENLARGE,
         "every pixel becomes N x N of its colour, in all files (default 1)"},
        {OPT_FLAG, "-v", NULL, &a->verbose, 0, 0, "say more: memory, processor, each scale's passes and guesses"},
        {OPT_FLAG, "-q", NULL, &a->quiet, 0, 0, "say nothing but errors"},
        {OPT_END, NULL, NULL, NULL, 0, 0, NULL}};
    Option table[MOST];
    size_t n = 0;
    while (own[n].kind != OPT_END) n++;
    if (n + sizeof shared / sizeof *shared > MOST) die("%zu options, but room for %d", n, MOST);
    a->seed = fresh_seed();
    a->enlarge = 1;
    memcpy(table, own, n * sizeof *own);
    memcpy(table + n, shared, sizeof shared);
    options_parse(argc, argv, table, intro);
    if (a->quiet && a->verbose) usage_error("-q and -v: give one of them");
    if (a->quiet) progress_off();
    progress_patient();
}

void say(const SamplingArgs *a, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    progress_end();
    if (!a->quiet) say_text_args(fmt, args);
    va_end(args);
}

void detail(const SamplingArgs *a, const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    if (a->verbose) say_text_args(fmt, args);
    va_end(args);
}

/* out[t] for t = 1..T */
static Err parse_per_scale(double *out, int T, const char *list, double lo, double hi, const char *option) {
    double value[MAX_SCALES];
    int n = 0;
    for (const char *p = list;; p++) {
        char *end;
        if (n == MAX_SCALES) return err("%s %s: more than %d values", option, list, MAX_SCALES);
        errno = 0;
        value[n] = strtod(p, &end);
        if (end == p || (*end && *end != ',') || errno || !isfinite(value[n]))
            return err("%s %s: expected numbers with commas between", option, list);
        if (value[n] < lo || value[n] > hi) return err("%s %s: %g is not in %g..%g", option, list, value[n], lo, hi);
        n++;
        p = end;
        if (!*p) break;
    }
    if (n != 1 && n != T)
        return err("%s %s: %d values; expected 1, or %d (one per scale, noisiest first)", option, list, n, T);
    for (int t = 1; t <= T; t++) out[t] = value[n == 1 ? 0 : T - t];
    return OK;
}

/* The user's list, else what the model's file recommends, else `otherwise`. */
static Err per_scale(double *out, const Model *m, const char *given, const char *key, const char *otherwise, double lo,
                     double hi, const char *option) {
    const int T = m->schedule.T;
    if (!given && config_get(&m->meta, "imagebart.", key)) return own_per_scale(out, T, &m->meta, key);
    return parse_per_scale(out, T, given ? given : otherwise, lo, hi, option);
}

static Err per_scale_sizes(size_t *out, const Model *m, const char *given, const char *key, const char *otherwise,
                           double lo, double hi, const char *option) {
    double number[MAX_SCALES + 1] = {0};
    TRY(per_scale(number, m, given, key, otherwise, lo, hi, option));
    for (int t = 1; t <= m->schedule.T; t++) {
        if (number[t] != floor(number[t])) return err("%s: %g is not a whole number", option, number[t]);
        out[t] = (size_t)number[t];
    }
    return OK;
}

/* One number is for the scales that can: those that have learnt "no class" too. If none has, the chain refuses it. */
static void one_guidance(SampleOptions *o, const SamplingArgs *a, const Model *m) {
    const int T = m->schedule.T;
    int can = 0;
    for (int t = 1; t <= T; t++) can += m->null_class[t] >= 0;
    if (!a->guidance || strchr(a->guidance, ',') || can == 0) return;
    for (int t = T; t >= 1; t--) {
        if (m->null_class[t] >= 0 || o->guidance[t] == 1) continue;
        o->guidance[t] = 1;
        say(a, "scale %d: --guidance 1, not %s: it was trained without --label-dropout\n", t, a->guidance);
    }
}

/* Official: three passes per scale for geometric schedules, else five, and one for the noisiest. */
static const char *edit_chain_lengths(const Model *m, char list[MAX_SCALES * 2]) {
    const char *redraw = config_get(&m->meta, "model.params.", "redraw_prob");
    if (redraw && !strcmp(redraw, "geometric")) return "3";
    strcpy(list, "1");
    for (int t = 1; t < m->schedule.T; t++) strcat(list, ",5");
    return list;
}

Err sampling_choose(SampleOptions *o, const SamplingArgs *a, const Model *m, DrawKind kind) {
    char chains[MAX_SCALES * 2];
    const int edit = kind == DRAW_EDIT;
    sample_defaults(o);
    o->seed = a->seed;
    o->block = a->block;
    o->official_temperature = a->official_temperature;
    TRY(per_scale(o->temperature, m, a->temperature, "temperature", "1", 0, 1000, "--temperature"));
    TRY(per_scale(o->guidance, m, a->guidance, "guidance", "1", 0, 1000, "--guidance"));
    one_guidance(o, a, m);
    TRY(per_scale_sizes(o->top_k, m, a->top_k, "top_k", "0", 0, 1e9, "--top-k"));
    return per_scale_sizes(o->chain, m, a->chain_length, edit ? "inpaint_chain_length" : "chain_length",
                           edit ? edit_chain_lengths(m, chains) : "1", edit ? 0 : 1, 1000, "--chain-length");
}

void sampling_options(SampleOptions *o, const SamplingArgs *a, const Model *m, DrawKind kind) {
    const Chain chain = model_chain((Model *)(uintptr_t)m);
    if (sampling_choose(o, a, m, kind) != OK) usage_error("%s", err_text());
    for (int t = 1; t <= m->schedule.T; t++) check(check_guidance(&chain, o->guidance[t], t));
}

Err sampling_many(size_t *M, const Model *m, size_t given, DrawKind kind) {
    const int edit = kind == DRAW_EDIT;
    *M = given ? given : 1;
    if (given) return OK;
    return config_size(M, &m->meta, "imagebart.", edit ? "candidates" : "best_of", 1,
                       edit ? MAX_CANDIDATES : MAX_BEST_OF, 1);
}

size_t sampling_rows(const SampleOptions *o, int T, size_t n) {
    for (int t = 1; t <= T; t++)
        if (o->guidance[t] != 1) return 2 * n;
    return n;
}

/* ---- The beginning ---- */

/* The bundled model may stand in for a missing one, unless it lacks what was asked for. */
static Err bundled_honours(const SamplingArgs *a, const Model *m, const NamedModel *missing) {
    const struct {
        const char *option, *list;
    } given[] = {{"--temperature", a->temperature},
                 {"--top-k", a->top_k},
                 {"--guidance", a->guidance},
                 {"--chain-length", a->chain_length}};
    double value[MAX_SCALES + 1];
    int32_t label;
    Err e = a->class_name ? model_class(m, a->class_name, &label) : OK;
    for (size_t i = 0; e == OK && i < sizeof given / sizeof *given; i++)
        if (given[i].list) e = parse_per_scale(value, m->schedule.T, given[i].list, 0, 1e9, given[i].option);
    if (e == OK) return OK;
    char fetch[FETCH_BYTES];
    return err("the official weights of %s (%s) are not here; \"%s\" fetches them. The bundled model, emoji, cannot "
               "stand in for them: %s",
               missing->name, missing->what, models_fetch(fetch, missing->name), err_text());
}

void sampling_start(SamplingArgs *a, Model *m, const NamedModel **stand_in_for) {
    WeightFormat format;
    char fetch[FETCH_BYTES];
    const int cuda = check_device(a->device);
    if (weight_format(&format, a->weights, cuda, "--weights") != OK) usage_error("%s", err_text());
    threads_set((int)a->threads);
    check(model_open(m, a->model, stand_in_for));
    m->no_ema = a->no_ema;
    model_weights(m, format);
    if (*m->note) say_text("%s\n", m->note);
    if (cuda) check(model_use_cuda(m));
    const NamedModel *missing = *stand_in_for;
    if (!missing) return;
    check(bundled_honours(a, m, missing));
    say_text(/* with -q, too: nothing is replaced in silence */
             "%s: the official weights of %s (%s) are not here; \"%s\" fetches them. Going on with the bundled model, "
             "which draws emoji%s%s instead.\n",
             program(), missing->name, missing->what, models_fetch(fetch, missing->name),
             missing->stand_in && !a->class_name ? ", class " : "",
             missing->stand_in && !a->class_name ? missing->stand_in : "");
    if (!a->class_name) a->class_name = missing->stand_in;
}

/* One line: which GPU, how exact, what goes there; dies if that does not fit. */
static void say_gpu(const SamplingArgs *a, const Model *m, const ModelMemory *need) {
    char text[CUDA_TEXT_BYTES], first[32], weights[32], plan[32], there[32], what[256];
    size_t available = 0;
    check(cuda_find(text, &available, NULL));
    available += need->gpu_first_stage; /* which is there already */
    bytes_text(first, need->gpu_first_stage), bytes_text(weights, need->gpu_scale),
        bytes_text(plan, need->gpu_activations);
    snprintf(what, sizeof what, "GPU: first stage %s, largest scale %s, activations %s", first, weights, plan);
    check(memory_fits(need->gpu_first_stage + need->gpu_scale + need->gpu_activations, available, what,
                      "a smaller --batch takes less"));
    say(a, "device: %s; in %s\n", text,
        m->weights == WEIGHTS_BF16 ? "bf16 (--device cpu: the processor)"
                                   : "f32 (--weights bf16 is faster; --device cpu: the processor)");
    detail(a, "GPU memory: first stage %s, largest scale %s, activations %s; %s free\n", first, weights, plan,
           bytes_text(there, available));
}

void sampling_memory(const SamplingArgs *a, Model *m, size_t batch, size_t pictures) {
    ModelMemory need;
    char first[32], scale[32], rest[32], there[32], threads[96], precision[PRECISION_TEXT], what[PATH_BYTES + 256];
    size_t available = memory_available();
    check(model_memory(m, batch, pictures, &need));
    bytes_text(first, need.first_stage), bytes_text(scale, need.scale), bytes_text(rest, need.activations);
    snprintf(what, sizeof what, "%s: first stage %s, largest scale %s, activations and pictures %s", m->folder, first,
             scale, rest);
    check(memory_fits(need.total, available, what, "a smaller --batch or -n takes less"));
    const Precision p = weight_precision(m->weights);
    say(a, "processor: %s, %s; weights in %s, products in %s\n", vector_instructions(), threads_text(threads),
        weight_name(m->weights), m->cuda ? precision_name(p) : precision_text(precision, p));
    detail(a, "memory: first stage %s, largest scale %s, activations and pictures %s; ", first, scale, rest);
    detail(a, "%s available\n", available == SIZE_MAX ? "unknown how much is" : bytes_text(there, available));
    if (m->cuda)
        say_gpu(a, m, &need);
    else if (!a->quiet)
        say_cpu();
}

/* ---- On the way, and in the end ---- */

int sampling_progress(void *context, int t, size_t repeat, size_t done, size_t of) {
    static double started;
    static int last_t;
    static size_t last_repeat, first, last;
    const SampleOptions *o = context;
    size_t M = o->candidates;
    if (t != last_t || repeat != last_repeat || done < last) started = seconds(), first = done;
    last_t = t, last_repeat = repeat, last = done;
    char time[32], which[64], left[64] = "", pass[48] = "";
    double rate = done > first ? (double)(done - first) / (seconds() - started) : 0;
    if (o->chain[t] > 1) snprintf(pass, sizeof pass, ", pass %zu of %zu", repeat + 1, o->chain[t]);
    if (rate > 0) snprintf(left, sizeof left, ", %s left in this scale", duration(time, (double)(of - done) / rate));
    if (o->n == M)
        snprintf(which, sizeof which, "picture %llu", (unsigned long long)(o->first / M + 1));
    else
        snprintf(which, sizeof which, "pictures %llu to %llu", (unsigned long long)(o->first / M + 1),
                 (unsigned long long)((o->first + o->n) / M));
    progress_line("%s: scale %d%s, token %zu of %zu%s", which, t, pass, done, of, left);
    return interrupted();
}

void say_drafts(const SamplingArgs *a, const DraftCounts *counts, int T) {
    for (int t = T; t >= 1; t--) {
        const DraftCounts *n = &counts[t];
        if (n->passes == 0) continue;
        detail(a, "scale %d: %zu tokens in %zu passes, %.1f in each, over %zu positions", t, n->tokens, n->passes,
               (double)n->tokens / (double)n->passes, n->positions);
        if (n->tried > 0)
            detail(a, "; %.0f%% of the drawn ones were as guessed", 100 * (double)n->right / (double)n->tried);
        detail(a, "\n");
    }
}

const char *scales_text(char list[MAX_SCALES * 32], const double *x, int T) {
    size_t at = 0;
    for (int t = T; t >= 1; t--) {
        char number[32];
        for (int digits = 9; digits <= 17; digits++) {
            snprintf(number, sizeof number, "%.*g", digits, x[t]);
            if (strtod(number, NULL) == x[t]) break;
        }
        at += (size_t)snprintf(list + at, MAX_SCALES * 32 - at, "%s%s", t < T ? "," : "", number);
    }
    return list;
}

/* "1,0.9,0.8", noisiest first. */
static Err text_per_scale(Config *text, const char *key, const double *x, int T) {
    char list[MAX_SCALES * 32];
    return config_set(text, key, "%s", scales_text(list, x, T));
}

static Err text_per_scale_sizes(Config *text, const char *key, const size_t *x, int T) {
    double number[MAX_SCALES + 1];
    for (int t = 1; t <= T; t++) number[t] = (double)x[t];
    return text_per_scale(text, key, number, T);
}

const char *last_part(const char *path) {
    const char *part = path;
    for (const char *p = path; *p; p++)
        if (*p == '/' && p[1] && p[1] != '/') part = p + 1;
    return part;
}

/* The short name of a named model, else the last part of its folder */
static const char *model_name(const Model *m) {
    size_t n;
    const NamedModel *named = named_models(&n);
    const char *name = last_part(m->folder);
    for (size_t i = 0; i < n; i++)
        if (!strcmp(last_part(named[i].folder), name)) return named[i].name;
    return name;
}

Err sampling_text(Config *text, const SamplingArgs *a, const SampleOptions *o, const Model *m) {
    const int T = m->schedule.T;
    const char *name = model_name(m);
    TRY(config_set(text, "Software", "imagebart.c"));
    TRY(config_set(text, "model", "%.*s", (int)strcspn(name, "/"), name));
    TRY(config_set(text, "seed", "%llu", (unsigned long long)a->seed));
    if (a->class_name) TRY(config_set(text, "class", "%s", a->class_name));
    TRY(text_per_scale(text, "temperature", o->temperature, T));
    TRY(text_per_scale_sizes(text, "top-k", o->top_k, T));
    TRY(text_per_scale_sizes(text, "chain-length", o->chain, T));
    if (sampling_rows(o, T, 1) > 1) TRY(text_per_scale(text, "guidance", o->guidance, T));
    if (m->weights != WEIGHTS_REAL) TRY(config_set(text, "weights", "%s", weight_name(m->weights)));
    if (a->enlarge > 1) TRY(config_set(text, "enlarge", "%zu", a->enlarge));
    if (a->no_ema) TRY(config_set(text, "no-ema", "true"));
    return a->official_temperature ? config_set(text, "official-temperature", "true") : OK;
}

Err sampling_text_place(Config *text, size_t n, uint64_t first, int of_several) {
    if (n == 1) return first || of_several ? config_set(text, "picture", "%llu", (unsigned long long)first) : OK;
    TRY(config_set(text, "count", "%zu", n));
    return first ? config_set(text, "first", "%llu", (unsigned long long)first) : OK;
}

Err sampling_text_edit(Config *text, const char *image, size_t candidates, const EditArgs *a) {
    TRY(config_set(text, "inpainted", "%s", last_part(image)));
    TRY(config_set(text, "candidates", "%zu", candidates));
    if (a->half) TRY(config_set(text, "half", "%s", a->half));
    if (a->window) TRY(config_set(text, "window", "%zu", a->window));
    if (a->outside) TRY(config_set(text, "outside", "%zu", a->outside));
    if (a->extend) TRY(config_set(text, "extend", "%zu", a->extend));
    return a->paste ? config_set(text, "paste", "true") : OK;
}
