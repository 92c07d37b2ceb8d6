/* model.c - a model as it lies on the disk: what its folder holds, opened for drawing; the way back, too.
 *
 * A model is a VQGAN, a schedule and T transitions in one folder: safetensors of ours, each of which says what it is,
 * or the official .ckpt files, whose configuration is a recipe (models/NAME.txt). Opening one checks that its files fit
 * together. Transitions are read one at a time, when the chain comes to their scale (model_chain). Drawing with it is
 * diffusion.c's.
 *
 * It refuses: folders with a missing, foreign or contradicting file, tensors that the network does not have.
 *
 * Read: files; a model's folder; drawing with it; writing a model. SPEC sections 3, 11 and 12. */
#include "sampling/sampling.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- Files -------------------------------------------------------------------------------------------------- */

static const char *const weight_names[] = {"f32", "bf16", "int8", "bf16x3"}; /* [WeightFormat] */

const char *weight_name(WeightFormat format) {
    return weight_names[format];
}

Err weight_format(WeightFormat *format, const char *name, int cuda, const char *option) {
    int i = WEIGHTS_REAL;
    *format = cuda || precision_usual() == PRECISION_F32 ? WEIGHTS_REAL : WEIGHTS_BF16X3;
    if (!name) return OK;
    while (i <= WEIGHTS_BF16X3 && strcmp(name, weight_names[i])) i++;
    if (i > WEIGHTS_BF16X3) return err("%s %s: expected f32, bf16x3, bf16 or int8", option, name);
    *format = (WeightFormat)i;
    if (cuda && i != WEIGHTS_REAL && i != WEIGHTS_BF16)
        return err("%s %s is for --device cpu; on a GPU f32 or bf16", option, name);
    return cuda ? OK : precision_there(weight_precision(*format));
}

void model_weights(Model *m, WeightFormat format) {
    m->weights = format;
    vqgan_params(m->vqgan)->precision = weight_precision(format);
}

/* A transition as m->weights have it */
static void set_weights(const Model *m, Params *p) {
    p->format = m->weights;
    p->precision = weight_precision(m->weights);
}

static int has_file(const char *folder, const char *name) {
    char path[PATH_BYTES];
    struct stat st;
    return path_make(path, "%s/%s", folder, name) == OK && stat(path, &st) == 0 && S_ISREG(st.st_mode);
}

/* The file of scale t, 0: of all scales together */
static const char *scale_file(char name[32], int t, int ckpt) {
    const char *ending = ckpt ? "ckpt" : "safetensors";
    if (t)
        snprintf(name, 32, "scale%d.%s", t, ending);
    else
        snprintf(name, 32, "joint.%s", ending);
    return name;
}

static int has_scale(const char *folder, int t, int ckpt) {
    char name[32];
    return has_file(folder, scale_file(name, t, ckpt));
}

static void count_file(size_t *here, char missing[32], const char *folder, const char *name) {
    if (has_file(folder, name))
        ++*here;
    else if (!*missing)
        snprintf(missing, 32, "%s", name);
}

size_t model_files(char missing[32], const NamedModel *model) {
    char folder[PATH_BYTES];
    models_find(folder, model->folder);
    const int apart =
        !model->zip || has_file(folder, "vqgan.safetensors"); /* official files hold the first stage too */
    const int ckpt = !apart && !has_scale(folder, 1, 0);
    size_t here = 0;
    char name[32];
    *missing = 0;
    if (apart) count_file(&here, missing, folder, "vqgan.safetensors");
    if (has_scale(folder, 0, ckpt)) return here + 1;
    for (int t = 1; t <= model->T; t++) count_file(&here, missing, folder, scale_file(name, t, ckpt));
    return here;
}

/* ---- A model's folder -------------------------------------------------------------------------------------- */

static const char prefix[] = "model.params."; /* of the official configuration in each file's metadata */

/* How far a number in 0..1 may be off for being kept in this format */
static double rounding(const Checkpoint *ck, const char *name) {
    const Tensor *x = checkpoint_find(ck, name);
    return x && x->dtype == DT_F16 ? 1.0 / 2048 : x && x->dtype == DT_BF16 ? 1.0 / 256 : 0;
}

/* The file's buffers are what the network was trained with, so they come first. */
Err schedule_read(Schedule *s, const Checkpoint *ck, int T) {
    if (!checkpoint_find(ck, "alphats")) {
        const char *redraw = config_get(&ck->meta, "model.params.", "redraw_prob");
        if (!redraw) return err("neither a tensor alphats nor model.params.redraw_prob says the schedule");
        return schedule_make(s, redraw, T);
    }
    real alpha[MAX_SCALES + 1], alphacum[MAX_SCALES + 1];
    const double factor = rounding(ck, "alphats"), sum = rounding(ck, "alphacum"); /* off, of alphas and of products */
    size_t rows = (size_t)T + 1;
    memset(s, 0, sizeof *s);
    TRY(checkpoint_reals(ck, "alphats", 1, &rows, rows, alpha));
    TRY(checkpoint_reals(ck, "alphacum", 1, &rows, rows, alphacum));
    for (int t = 1; t <= T; t++) s->beta[t] = 1 - (float)alpha[t];
    TRY(schedule_from_betas(s, T));
    for (int t = 0; t <= T; t++) {
        if (!(fabs((double)alphacum[t] - s->alphacum[t]) < 1e-4 + t * factor + sum))
            return err("alphacum[%d] is %g, the product of alphats is %g", t, (double)alphacum[t], s->alphacum[t]);
        s->alpha[t] = (float)alpha[t];
        s->alphacum[t] = (float)alphacum[t];
    }
    return OK;
}

/* What one transition's file says about itself. */
typedef struct {
    int T;
    NetConfig net;
    Schedule schedule;
    size_t h, w;
    int32_t null_class;
} ScaleFacts;

/* The label "no class", which a network trained with label dropout knows beside its classes; -1: there is none. */
static Err read_null_class(int32_t *label, const Config *meta, const NetConfig *net) {
    const size_t rows = net->kind == NET_X ? net->enc_num_tokens : net->input_vocab_size;
    size_t value = SIZE_MAX;
    *label = -1;
    if (!net->has_class || !config_get(meta, "", "imagebart.null_class")) return OK;
    TRY(config_size(&value, meta, "", "imagebart.null_class", 0, rows - 1, 0));
    *label = (int32_t)value;
    return OK;
}

/* scale: the number in the file's name, 0 for joint.safetensors. */
static Err read_facts(ScaleFacts *f, const Checkpoint *ck, int scale) {
    size_t T = 0, single = 0;
    memset(f, 0, sizeof *f);
    TRY(keys_check(&ck->meta, KEYS_TRANSITION, 0));
    TRY(config_size(&T, &ck->meta, prefix, "n_scales", 1, MAX_SCALES, 0));
    TRY(config_size(&single, &ck->meta, prefix, "single_scale", 1, T, 1));
    if (scale && single && single != (size_t)scale) return err("it holds scale %zu, its name says %d", single, scale);
    if (!scale && single) return err("it holds scale %zu alone, expected all scales", single);
    TRY(net_config_read(&f->net, &ck->meta, prefix));
    TRY(read_null_class(&f->null_class, &ck->meta, &f->net));
    TRY(config_size(&f->h, &ck->meta, "", "imagebart.h", 1, IMAGE_MAX_SIDE, 1));
    TRY(config_size(&f->w, &ck->meta, "", "imagebart.w", 1, IMAGE_MAX_SIDE, 1));
    f->T = (int)T;
    return schedule_read(&f->schedule, ck, f->T);
}

static Err check_same(const char *what, size_t found, size_t expected, const char *where) {
    return found == expected ? OK : err("%s is %zu, expected %zu as %s has it", what, found, expected, where);
}

/* The transition fits the first stage: token values, grid, room for the sequence (SPEC 1.10, 2.5). */
static Err check_fit(const Model *m, const ScaleFacts *f) {
    const NetConfig *net = &f->net;
    size_t N = m->h * m->w, prompt = net->has_class ? 2 : 1;
    TRY(check_same("the number of token values", net->dec_num_tokens, m->K, "the first stage"));
    if (f->h || f->w) {
        TRY(check_same("imagebart.h", f->h, m->h, "the first stage"));
        TRY(check_same("imagebart.w", f->w, m->w, "the first stage"));
    }
    size_t input = net->kind == NET_X ? net->enc_max_seq_len : net->dec_max_seq_len;
    size_t need = net->kind == NET_X ? prompt + N : prompt + N - 1;
    if (input < need)
        return err("the network takes %zu positions, a grid of %zu x %zu needs %zu", input, m->h, m->w, need);
    if (net->kind == NET_X && net->dec_max_seq_len < N)
        return err("the decoder takes %zu positions, a grid of %zu x %zu needs %zu", net->dec_max_seq_len, m->h, m->w,
                   N);
    return OK;
}

static Err check_schedule(const Schedule *s, const Schedule *expected) {
    for (int t = 0; t <= expected->T; t++)
        if (fabsf(s->alpha[t] - expected->alpha[t]) > 1e-6f)
            return err("alpha_%d of its schedule is %g, expected %g as scale 1 has it", t, s->alpha[t],
                       expected->alpha[t]);
    return OK;
}

/* Scale 1 (or the joint file) gives the model its meta, schedule and classes. */
static Err adopt_facts(Model *m, const Checkpoint *ck, const ScaleFacts *f) {
    m->schedule = f->schedule;
    for (size_t i = 0; i < ck->meta.n; i++) TRY(config_copy(&m->meta, ck->meta.kv[i].key, &ck->meta.kv[i]));
    if (!f->net.has_class) return OK;
    size_t rows = f->net.kind == NET_X ? f->net.enc_num_tokens : f->net.input_vocab_size;
    return classes_open(&m->classes, config_get(&m->meta, "", "imagebart.classes"), rows);
}

/* The file has the tensors of a network of these settings, and none of another one. */
static Err check_tensors(const NetConfig *c, const Checkpoint *ck) {
    Transformer *net = NULL;
    Err e = transformer_create(&net, c);
    if (e == OK) e = transition_known(c, transformer_params(net), ck);
    if (e == OK) e = params_fit(transformer_params(net), ck, "transformer.", 0);
    transformer_free(net);
    return e;
}

static Err check_facts(Model *m, const Checkpoint *ck, int scale) {
    ScaleFacts f;
    TRY(read_facts(&f, ck, scale));
    TRY(check_fit(m, &f));
    TRY(check_tensors(&f.net, ck));
    m->config[scale] = f.net;
    for (int t = scale ? scale : 1; t <= (scale ? scale : f.T); t++) m->null_class[t] = f.null_class;
    if (scale <= 1) return adopt_facts(m, ck, &f);
    TRY(check_same("n_scales", (size_t)f.T, (size_t)m->schedule.T, "scale 1"));
    TRY(check_schedule(&f.schedule, &m->schedule));
    if (f.net.has_class != (m->classes.n > 0))
        return err("it is %sclass-conditional, scale 1 is%s", f.net.has_class ? "" : "not ",
                   m->classes.n ? "" : " not");
    return OK;
}

/* FAILED, with the file named once. */
static Err err_file(const char *path) {
    return strstr(err_text(), path) ? FAILED : err_in(path);
}

static Err open_file(Checkpoint *ck, char path[PATH_BYTES], const Model *m, const char *name) {
    TRY(path_make(path, "%s/%s", m->folder, name));
    if (has_file(m->folder, name)) return checkpoint_open(ck, path);
    if (!has_file(m->folder, "log.tsv") || has_file(m->folder, "joint.state.safetensors"))
        return err("%s is missing", path);
    return err("%s is missing: an unfinished run; ./train RECIPE --all --data DIR --run %s goes on with it", path,
               m->folder);
}

/* What is said of a file once: only the first one's note is kept. */
static void keep_note(Model *m, const Checkpoint *ck) {
    char note[ERR_MAX];
    if (!*m->note && checkpoint_note(note, ck)) memcpy(m->note, note, sizeof note);
}

/* Is this recipe's network the one whose tensors these are? */
static int recipe_fits(const char *path, const Checkpoint *ck, int scale) {
    NetConfig c;
    Schedule s;
    Config recipe = {0};
    Err e = recipe_read(&recipe, path, scale);
    if (e == OK) e = net_config_read(&c, &recipe, prefix);
    if (e == OK) e = schedule_read(&s, ck, c.n_scales);
    if (e == OK) e = check_tensors(&c, ck);
    config_free(&recipe);
    return e == OK;
}

static Err named_recipe(Model *m, const char *name) {
    char usual[PATH_BYTES];
    TRY(path_make(usual, "models/%s.txt", name));
    models_find(m->recipe, usual); /* without one, reading it says so */
    return OK;
}

/* The configuration that official files do not carry: config.txt in their folder; else the recipe of the model whose
 * folder this is; else, wherever the files were put, the one recipe that has just these tensors. */
static Err find_recipe(Model *m) {
    char path[PATH_BYTES], name[32];
    const int scale = m->joint ? 0 : 1;
    Checkpoint ck = {0};
    size_t n;
    const NamedModel *named = named_models(&n);
    TRY(path_make(m->recipe, "%s/config.txt", m->folder));
    if (has_file(m->folder, "config.txt")) return OK;
    for (size_t i = 0; i < n; i++)
        if (models_find(path, named[i].folder) && !strcmp(path, m->folder)) return named_recipe(m, named[i].name);
    TRY(open_file(&ck, path, m, scale_file(name, scale, m->ckpt)));
    size_t i = 0;
    for (; i < n; i++) {
        if (named_recipe(m, named[i].name) != OK) continue;
        if (recipe_fits(m->recipe, &ck, scale)) break;
    }
    checkpoint_close(&ck);
    if (i < n) return OK;
    return err("%s: its files do not say their architecture and no recipe models/*.txt has their tensors, expected a "
               "config.txt beside them (models/ffhq.txt is an example)",
               m->folder);
}

/* t: the scale, 0: all of them. */
static Err open_scale(Checkpoint *ck, char path[PATH_BYTES], const Model *m, int t) {
    char name[32];
    TRY(open_file(ck, path, m, scale_file(name, t, m->ckpt)));
    if (!m->official || recipe_read(&ck->meta, m->recipe, t) == OK) return OK;
    checkpoint_close(ck);
    return FAILED;
}

static Err check_file(Model *m, int scale) {
    char path[PATH_BYTES];
    Checkpoint ck = {0};
    Err e = open_scale(&ck, path, m, scale);
    if (e == OK && check_facts(m, &ck, scale) != OK) e = err_file(path);
    if (e == OK) keep_note(m, &ck);
    if (e == OK && !*m->note) transition_note(m->note, &ck);
    checkpoint_close(&ck);
    return e;
}

static Err build_vqgan(Model *m, const Checkpoint *ck, const Config *recipe) {
    VqganConfig c;
    const char *tensors = recipe ? "first_stage_model." : "";
    const Err e = first_stage_config(&c, recipe ? recipe : &ck->meta, ck, tensors);
    if (e != OK) return recipe ? err_in(m->recipe) : e;
    TRY(vqgan_create(&m->vqgan, &c, 0));
    TRY(vqgan_map(m->vqgan, ck, tensors));
    size_t factor = (size_t)1 << (c.levels - 1);
    m->h = m->w = c.resolution / factor;
    m->side = m->h * factor;
    m->K = vqgan_K(m->vqgan);
    return OK;
}

/* Ours is a file of its own; the official first stage is a part of every transition's file. */
static Err open_vqgan(Model *m) {
    char path[PATH_BYTES], name[32];
    Checkpoint *ck = &m->vqgan_file; /* model_close closes it */
    Config recipe = {0};
    const char *file = m->official ? scale_file(name, m->joint ? 0 : 1, m->ckpt) : "vqgan.safetensors";
    Err e = open_file(ck, path, m, file);
    if (e == OK) keep_note(m, ck);
    if (e == OK && m->official) e = recipe_read(&recipe, m->recipe, RECIPE_VQGAN);
    if (e == OK && build_vqgan(m, ck, m->official ? &recipe : NULL) != OK) e = err_file(path);
    config_free(&recipe);
    return e;
}

/* Whose files are these? Ours say what they are; PyTorch's, and what a converter made of them, do not. */
static Err tell_official(Model *m) {
    char path[PATH_BYTES], name[32];
    Checkpoint ck = {0};
    const int ours = has_scale(m->folder, 1, 0) || has_scale(m->folder, 0, 0);
    m->ckpt = m->official = !ours && (has_scale(m->folder, 1, 1) || has_scale(m->folder, 0, 1));
    m->joint = !has_scale(m->folder, 1, m->ckpt) && has_scale(m->folder, 0, m->ckpt);
    if (!ours) return OK;
    TRY(open_file(&ck, path, m, scale_file(name, m->joint ? 0 : 1, 0)));
    m->official = !config_get(&ck.meta, prefix, "n_scales");
    checkpoint_close(&ck);
    return OK;
}

static Err open_folder(Model *m) {
    TRY(tell_official(m));
    if (m->official) TRY(find_recipe(m));
    TRY(open_vqgan(m));
    if (m->joint) return check_file(m, 0);
    TRY(check_file(m, 1));
    for (int t = 2; t <= m->schedule.T; t++) TRY(check_file(m, t));
    return OK;
}

/* A folder that has a part of an official model, such as one that was unpacked by hand */
static Err check_complete(const NamedModel *found, const char *folder) {
    char missing[32], fetch[FETCH_BYTES];
    model_files(missing, found);
    if (!*missing || !found->zip) return OK;
    return err("model %s: %s/%s is missing; \"%s\" fetches it", found->name, folder, missing,
               models_fetch(fetch, found->name));
}

/* No folder has these weights. With *substituted wanted, folder = the bundled model's. */
static Err no_weights(char folder[PATH_BYTES], const NamedModel *found, const NamedModel **substituted) {
    char places[PLACES_BYTES], fetch[FETCH_BYTES];
    size_t n;
    const NamedModel *bundled = named_models(&n);
    models_places(places);
    if (found == bundled) return err("the bundled model is missing: no folder %s (looked in %s)", folder, places);
    if (substituted && models_find(folder, bundled->folder)) {
        *substituted = found;
        return OK;
    }
    return err("model %s is not installed: no folder %s; \"%s\" fetches it%s (looked in %s)", found->name,
               found->folder, models_fetch(fetch, found->name),
               substituted ? ", and the bundled model is missing too" : "", places);
}

static int is_recipe(const char *name) {
    char usual[PATH_BYTES], path[PATH_BYTES];
    Config vqgan = {0};
    if (strchr(name, '/') || path_make(usual, "models/%s.txt", name) != OK || !models_find(path, usual)) return 0;
    const Err e = recipe_read(&vqgan, path, RECIPE_VQGAN);
    config_free(&vqgan);
    return e == OK;
}

/* folder = where to look; *substituted as model_open. */
static Err find_folder(char folder[PATH_BYTES], const char *name_or_folder, const NamedModel **substituted) {
    const NamedModel *found = find_named(name_or_folder);
    struct stat st;
    TRY(models_check());
    if (!found) TRY(path_make(folder, "%s", name_or_folder));
    if (found && !models_find(folder, found->folder)) return no_weights(folder, found, substituted);
    if (is_folder(folder)) return found ? check_complete(found, folder) : OK;
    if (stat(folder, &st) == 0)
        return err("model \"%.200s\": is a file, expected a folder of weights; zip files have to be unpacked first",
                   folder);
    if (is_recipe(name_or_folder))
        return err("model \"%.200s\": is a recipe without weights; \"./train %.200s --all --data DIR\" first, then "
                   "runs/%.200s is a model",
                   name_or_folder, name_or_folder, name_or_folder);
    return err("model \"%.200s\": no such folder, and not one of emoji, ffhq, ffhq2, churches, bedrooms, cats, "
               "imagenet, imagenet4",
               name_or_folder);
}

Err model_open(Model *m, const char *name_or_folder, const NamedModel **substituted) {
    char folder[PATH_BYTES];
    memset(m, 0, sizeof *m);
    if (substituted) *substituted = NULL;
    TRY(find_folder(folder, name_or_folder, substituted));
    memcpy(m->folder, folder, sizeof m->folder);
    if (open_folder(m) == OK) return OK;
    model_close(m);
    return FAILED;
}

void model_unload(Model *m) {
    transformer_free(m->net);
    checkpoint_close(&m->file);
    m->net = NULL;
    m->loaded = 0;
}

void model_close(Model *m) {
    classes_free(&m->classes);
    model_unload(m);
    vqgan_free(m->vqgan);
    checkpoint_close(&m->vqgan_file);
    config_free(&m->meta);
    memset(m, 0, sizeof *m);
}

static Precision cuda_precision(const Model *m) {
    return m->weights == WEIGHTS_BF16 ? PRECISION_BF16 : PRECISION_F32;
}

Err model_use_cuda(Model *m) {
    m->cuda = 1;
    TRY(vqgan_use_cuda(m->vqgan, cuda_precision(m)));
    return params_send(vqgan_params(m->vqgan));
}

/* The weights to sample with: transformer_ema.* where the file has them and they are wanted, else transformer.* */
static Err build_net(Model *m, const Checkpoint *ck) {
    NetConfig c;
    int use_ema = !m->no_ema;
    memset(&c, 0, sizeof c);
    TRY(net_config_read(&c, &ck->meta, prefix));
    TRY(transformer_create(&m->net, &c));
    if (m->cuda) TRY(transformer_use_cuda(m->net, cuda_precision(m)));
    Params *p = transformer_params(m->net);
    transformer_set_alphas(m->net, m->schedule.alpha);
    if (checkpoint_find(ck, "sos_token")) {
        int32_t sos = 0;
        TRY(checkpoint_ints(ck, "sos_token", 1, &sos));
        if (sos != 0) return err("sos_token is %d, expected 0", (int)sos);
    }
    if (use_ema) TRY(config_flag(&use_ema, &ck->meta, prefix, "use_ema", 1));
    const int ema = use_ema && checkpoint_find(ck, "transformer_ema.num_updates");
    set_weights(m, p);
    TRY(params_map(p, ck, ema ? "transformer_ema." : "transformer.", ema));
    return params_send(p);
}

Err model_scale(Model *m, int t) {
    if (t < 1 || t > m->schedule.T) return err("%s: scale %d, expected 1..%d", m->folder, t, m->schedule.T);
    if (m->loaded && (m->joint || m->loaded == t)) {
        m->loaded = t;
        return OK;
    }
    char path[PATH_BYTES];
    model_unload(m);
    Err e = open_scale(&m->file, path, m, m->joint ? 0 : t);
    if (e == OK && build_net(m, &m->file) != OK) e = err_file(path);
    if (e == OK)
        m->loaded = t;
    else
        model_unload(m);
    return e;
}

/* ---- Drawing with it ---------------------------------------------------------------------------------------- */

static Err chain_network(void *context, int t, Transformer **net) {
    Model *m = (Model *)context;
    TRY(model_scale(m, t));
    *net = m->net;
    return OK;
}

Chain model_chain(Model *m) {
    return (Chain){&m->schedule, m->h, m->w, m->K, m->classes.n, m->null_class, m->folder, chain_network, m};
}

size_t decode_batch(const Model *m, size_t n) {
    enum { PICTURES = 8 }; /* enough to fill a GPU */
    return m->cuda ? max_size(min_size(n, PICTURES), 1) : 1;
}

/* Weights so large that sums are no numbers any more draw black pictures. */
static Err check_pixels(const Model *m, const real *x, size_t n) {
    int bad = 0;
    for (size_t i = 0; i < n; i++) bad |= isnan(x[i]);
    return !bad ? OK
                : err("%s: its first stage draws pixels that are no numbers (NaN): the weights are of a training that "
                      "failed, or too large for floats",
                      m->folder);
}

Err decode_planned(Model *m, const int32_t *tokens, size_t n, real *images) {
    TRY(vqgan_decode_tokens(m->vqgan, tokens, n, m->h, m->w, images));
    return check_pixels(m, images, n * 3 * m->side * m->side);
}

Err decode_pictures(Model *m, const int32_t *tokens, size_t n, real *images) {
    size_t N = m->h * m->w, pixels = 3 * m->side * m->side;
    const size_t batch = decode_batch(m, n);
    TRY(vqgan_plan(m->vqgan, batch, m->side, m->side, 0));
    for (size_t b = 0; b < n; b += batch) {
        TRY(decode_planned(m, tokens + b * N, min_size(batch, n - b), images + b * pixels));
        if (n > batch) progress_line("decoding picture %zu of %zu", b + 1, n);
    }
    progress_end();
    return OK;
}

Err model_class(const Model *m, const char *name, int32_t *label) {
    if (m->classes.n == 0) return err("class \"%.100s\": %s is not a model with classes", name, m->folder);
    return classes_find(&m->classes, name, label);
}

/* Raises what the weights and the plan of scale t need: the host's, or the GPU's plan. */
static Err scale_memory(const Model *m, int t, size_t batch, ModelMemory *need, size_t *plan) {
    Transformer *net;
    size_t bytes = 0;
    TRY(transformer_create(&net, &m->config[t]));
    set_weights(m, transformer_params(net));
    Err e = m->cuda ? transformer_use_cuda(net, cuda_precision(m)) : OK;
    if (e == OK) e = transformer_plan_bytes(net, batch, m->h * m->w, 0, &bytes);
    need->scale = max_size(need->scale, params_bytes(transformer_params(net), transformer_params(net)->format));
    if (m->cuda)
        need->gpu_activations = max_size(need->gpu_activations, bytes);
    else
        *plan = max_size(*plan, bytes);
    transformer_free(net);
    return e;
}

Err model_memory(Model *m, size_t batch, size_t pictures, ModelMemory *out) {
    size_t plan = 0, vqgan_plan_size = 0, pixels = 3 * m->side * m->side;
    memset(out, 0, sizeof *out);
    out->first_stage = params_count(vqgan_params(m->vqgan)) * sizeof(real);
    for (int t = m->joint ? 0 : 1; t <= (m->joint ? 0 : m->schedule.T); t++) TRY(scale_memory(m, t, batch, out, &plan));
    out->gpu_scale = m->cuda ? out->scale : 0;
    TRY(vqgan_plan_bytes(m->vqgan, decode_batch(m, pictures), m->side, m->side, 0, &vqgan_plan_size));
    if (m->cuda) {
        out->gpu_first_stage =
            out->first_stage / sizeof(real) * (sizeof(float) + (cuda_precision(m) == PRECISION_BF16 ? 2 : 0));
        out->gpu_activations += vqgan_plan_size, vqgan_plan_size = 0;
    }
    TRY(size_mul(&out->activations, pictures, pixels * (sizeof(real) + 1))); /* numbers, then bytes of the PNG */
    out->activations += plan + vqgan_plan_size;
    out->total = out->first_stage + out->scale + out->activations;
    return OK;
}

/* ---- Writing a model --------------------------------------------------------------------------------------- */

/* As int64, which the official code indexes with */
static Err used_tensor(TensorList *list, const Vqgan *v) {
    const size_t n = vqgan_config(v)->re_embed;
    int64_t *used;
    TRY(mem_alloc(&used, n, sizeof *used, "codes in use"));
    list->kept = used;
    for (size_t i = 0; i < n; i++) used[i] = vqgan_used(v)[i];
    return tensor_list_add(list, "quantize.used", DT_I64, 1, &n, used, 0);
}

static Err vqgan_tensors(TensorList *list, Config *meta, Vqgan *v, Dtype store) {
    TRY(vqgan_config_write(meta, vqgan_config(v), prefix));
    if (vqgan_used(v)) TRY(used_tensor(list, v));
    return tensor_list_params(list, vqgan_params(v), 'v', "", store);
}

static Err scale_tensors(TensorList *list, Config *meta, Model *m, int t, Dtype store) {
    TRY(model_scale(m, t));
    for (size_t i = 0; i < m->file.meta.n; i++)
        TRY(config_set(meta, m->file.meta.kv[i].key, "%s", m->file.meta.kv[i].value));
    TRY(config_set(meta, "imagebart.h", "%zu", m->h));
    TRY(config_set(meta, "imagebart.w", "%zu", m->w));
    if (!m->joint) TRY(config_set(meta, "model.params.single_scale", "%d", t));
    return transition_tensors(list, m->net, 'v', &m->schedule, store, 0);
}

/* t: the scale, 0: the first stage. */
static Err part_path(char path[PATH_BYTES], const Model *m, const char *folder, int t) {
    char name[32];
    return path_make(path, "%s/%s", folder, t ? scale_file(name, m->joint ? 0 : t, 0) : "vqgan.safetensors");
}

static Err convert_part(Model *m, const char *folder, int t, Dtype store) {
    char path[PATH_BYTES];
    TensorList list = {0};
    Config meta = {0};
    Err e = t ? scale_tensors(&list, &meta, m, t, store) : vqgan_tensors(&list, &meta, m->vqgan, store);
    if (e == OK) e = part_path(path, m, folder, t);
    if (e == OK) e = checkpoint_write(path, list.tensor, list.from_real, list.n, &meta);
    tensor_list_free(&list);
    config_free(&meta);
    return e;
}

static void remove_part(const Model *m, const char *folder, int t) {
    char path[PATH_BYTES];
    if (part_path(path, m, folder, t) == OK) unlink(path);
}

Err model_convert(Model *m, const char *folder, Dtype store) {
    struct stat st;
    const int there = stat(folder, &st) == 0;
    if (there && !S_ISDIR(st.st_mode)) return err("%s: is a file, expected a folder", folder);
    if (!there && mkdir(folder, 0777) != 0) return io_error(folder, "make");
    if (has_scale(folder, 1, 0) || has_scale(folder, 0, 0))
        return err("%s: has a model already, expected an empty folder", folder);
    const int parts = 1 + (m->joint ? 1 : m->schedule.T);
    Err e = OK;
    int done = 0; /* the first stage, then scales down to the first, with which it is a model */
    while (e == OK && done < parts) {
        e = convert_part(m, folder, done ? parts - done : 0, store);
        done += e == OK;
    }
    while (e != OK && done-- > 0) remove_part(m, folder, done ? parts - done : 0);
    if (e != OK && !there) rmdir(folder);
    return e;
}
