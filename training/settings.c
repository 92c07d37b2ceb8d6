/* settings.c - what a stage is trained with: one table of all options and recipe keys.
 *
 * A row of `table` is all there is to know of a setting: its option, its key in the recipe, its place in Settings,
 * its kind, what holds where nobody says anything, its range, its help. From the rows come the command line
 * (settings_parse), what the user gave written over the recipe (apply_given), and both read into Settings
 * (settings_read): so that the recipe, as a state file keeps it, is what the run is trained with. What is more than
 * one number stands behind the table: which options exclude each other, batch and processes, the learning-rate rule,
 * the device. */
#include "training/stage.h"

#include <dirent.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    OptionKind kind;
    const char *option, *value; /* as Option; NULL: the recipe alone says it */
    const char *prefix, *key;   /* in the recipe; NULL: the user alone says it */
    size_t place;               /* in Settings */
    double usual;               /* where nobody says anything; NEEDED: somebody must */
    double least, most;
    const char *help;
} Setting;

#define NEEDED (-1.0)
#define AT(field) offsetof(Settings, field)
enum { USUAL_SEED = 23 }; /* the official default */
#define HEADING(text)                                                                                                  \
    { OPT_HEADING, text }
/* The user alone says it: a flag, a text, a number */
#define FLAG(option, field, help)                                                                                      \
    { OPT_FLAG, option, NULL, NULL, NULL, AT(field), 0, 0, 1, help }
#define TEXT(option, value, field, help)                                                                               \
    { OPT_STRING, option, value, NULL, NULL, AT(field), 0, 0, 0, help }
#define COUNT(option, field, usual, least, most, help)                                                                 \
    { OPT_SIZE, option, "N", NULL, NULL, AT(field), usual, least, most, help }
/* The recipe alone says it */
#define RECIPE(kind, prefix, key, field, usual, least, most)                                                           \
    { kind, NULL, NULL, prefix, key, AT(field), usual, least, most, NULL }

#define LR "model.params.scheduler_config.params."
#define HUGE_NUMBER 9e15 /* whole numbers up to here are exact; in a recipe it stands for SIZE_MAX / 2 */

static const char intro[] =
    "usage: ./train [MODEL] (--vqgan | --scale N | --joint | --all) [options]\n\n"
    "Trains one part of an ImageBART model. Three steps make a model:\n"
    "  1. ./train emoji --vqgan --data data/emoji    a VQGAN learns to write a picture as a grid of tokens and back\n"
    "  2. ./train emoji --scale N --data data/emoji  for N = 1..T: noise has replaced a part of the tokens, more at\n"
    "                                                each scale; a transformer learns to undo one step of it\n"
    "  3. ./sample runs/emoji                        starts from pure noise and runs the steps back, T to 1\n"
    "--all does all three; killed, it goes on where it was. Everything is kept in the run's folder: weights,\n"
    "checkpoints, log.tsv, loss.svg and, as training goes on, pictures of held-out examples.\n";

static const Setting table[] = {
    HEADING("Arguments"),
    {OPT_ARGUMENT, "MODEL", NULL, NULL, NULL, AT(model), 0, 0, 0,
     "its recipe, models/MODEL.txt: emoji (default), photos, ffhq ...; or a folder with\nconfig.txt"},

    HEADING("What to train (one of)"),
    FLAG("--vqgan", vqgan, "the first stage: pictures to tokens and back"),
    COUNT("--scale", scale, 0, 1, MAX_SCALES, "the transition x_N -> x_(N-1)"),
    FLAG("--joint", joint, "all transitions in one network, a random scale each step"),
    FLAG("--all", all, "the first stage, then every scale, then draw samples with ./sample"),
    TEXT("--schedule", "psim", schedule,
         "nothing yet: measure, with the run's VQGAN, how far scales must be apart to look\n"
         "equally far apart, and write RUN/psim.txt and the recipe's line"),

    HEADING("On what"),
    TEXT("--data", "PATH", data,
         "a folder of PNG, JPEG and WebP pictures (sub-folders are classes; train/ and val/\n"
         "are the split if they exist, else 1 in 20 is held out), LSUN's LMDB, or a list\n"
         "file (default data/MODEL)"),
    TEXT("--list", "FILE", list,
         "of the folder --data only what this file names, a picture a line, such as the\n"
         "official ffhqtrain.txt"),
    TEXT("--val-list", "FILE", val_list, "and hold out what this one names (ffhqvalidation.txt)"),

    HEADING("Beginning and going on"),
    TEXT("--run", "DIR", run, "the run's folder (default runs/MODEL)"),
    FLAG("--resume", resume, "continue the run, bit for bit as if it had not stopped"),
    TEXT("--init", "PATH", init,
         "start from the weights in this folder (models/emoji, another run) or file (an\n"
         "official vqgan .ckpt; with --all it is the first stage's), not from noise"),
    TEXT("--config", "FILE", config, "the recipe, instead of models/MODEL.txt"),

    HEADING("How (over what the recipe says)"),
    {OPT_SIZE, "--steps", "N", "train.", "steps", AT(steps), NEEDED, 1, UINT32_MAX,
     "optimizer steps in all; warm-up and cosine decay fit themselves to it"},
    {OPT_SIZE, "--batch", "N", "data.params.", "batch_size", AT(batch), 16, 1, 1 << 20, "pictures per micro batch"},
    {OPT_SIZE, "--accumulate", "N", "lightning.trainer.", "accumulate_grad_batches", AT(accumulate), 1, 1, 65536,
     "micro batches per step"},
    {OPT_REAL, "--lr", "X", LR, "lr_max", AT(lr), 1e-4, 0, 10, "peak learning rate"},
    RECIPE(OPT_REAL, "train.", "weight_decay_scale", weight_decay_scale, 1, 0, 1e6),
    RECIPE(OPT_REAL, "train.", "ema_decay", ema_decay, 0.9999, 0, 1),
    {OPT_REAL, "--spike", "X", "train.", "spike", AT(spike), 10, 0, 1e6,
     "a step whose loss or gradient is X deviations above the last ones' is not taken\n(default 10; 0: all are)"},
    RECIPE(OPT_FLAG, "train.", "flip", flip, 0, 0, 1),

    HEADING("How: the first stage (whose discriminator is the recipe's: doc/training.md)"),
    TEXT("--perceptual", "FILE[,FILE]", perceptual,
         "weights of LPIPS, a part of the loss: a VQGAN's .ckpt, or torchvision's\n"
         "vgg16-397923af.pth and LPIPS's vgg.pth (default: what models/lpips has, where the\n"
         "recipe wants it); none: without"),
    TEXT("--convert-perceptual", "OUT", convert_perceptual,
         "write what --perceptual names as one safetensors file, and end"),
    FLAG("--remap", remap,
         "then let tokens number only the codes that the training pictures use; at once\n"
         "where the run has a first stage, unless --resume trains it further"),
    RECIPE(OPT_SIZE, "train.", "restart_codes", restart_codes, 0, 0, HUGE_NUMBER),
    RECIPE(OPT_REAL, "train.", "l1_weight", l1_weight, 1, 0, 1e6),
    RECIPE(OPT_REAL, "train.", "l2_weight", l2_weight, 1, 0, 1e6),
    RECIPE(OPT_REAL, "train.", "codebook_weight", codebook_weight, 1, 0, 1e6),

    HEADING("How: transitions"),
    {OPT_REAL, "--alpha", "X", "model.params.", "alpha", AT(alpha), 0, 0, 1,
     "loss = X soft (KL to the posterior) + (1-X) hard (cross entropy)"},
    {OPT_REAL, "--label-dropout", "P", "train.", "label_dropout", AT(label_dropout), 0, 0, 1,
     "with classes: leave the class out this often, so that ./sample can guide\n(--guidance); 0.1 is usual"},
    {OPT_FLAG, "--balance", NULL, "train.", "balance_classes", AT(balance), 0, 0, 1,
     "draw every class equally often, however few its pictures"},
    {OPT_SIZE, "--crops", "N", "train.", "crops", AT(crops), 0, 1, CROPS_MAX, /* usual: settle_crops */
     "with data.prep imagenet: N random crops of each picture, one of them each epoch\n(default 8; 1: the centre; disk "
     "and memory "
     "grow with it)"},

    HEADING("How: numbers"),
    {OPT_SIZE, "--seed", "N", "train.", "seed", AT(seed), USUAL_SEED, 0, HUGE_NUMBER,
     "of everything random (default 23)"},
    {OPT_FLAG, "--bf16-states", NULL, "train.", "bf16_states", AT(bf16_states), 0, 0, 1,
     "the optimizer's moments in bf16, rounded at random: half their memory"},

    HEADING("Keeping"),
    COUNT("--save-every", save_every, 100, 1, UINT32_MAX, "steps between checkpoints (default 100)"),
    COUNT("--keep", keep, 2, 1, KEEP_MAX, "checkpoints that are kept, the newest and those before it (default 2)"),
    FLAG("--no-wait", no_wait, "stop when the disk is full, instead of trying until it is not"),
    {OPT_STRING, "--store", "TYPE", "imagebart.", "store", AT(store), 0, 0, 0,
     "f32, f16 or bf16: how the weights for sampling are stored"},
    RECIPE(OPT_FLAG, "imagebart.", "compact", compact, 0, 0, 1),

    HEADING("Seeing"),
    COUNT("--eval-every", eval_every, 500, 1, UINT32_MAX,
          "steps between evaluations on the held-out pictures (default 500)"),
    COUNT("--picture-every", picture_every, 500, 1, UINT32_MAX, "steps between pictures (default 500)"),
    {OPT_SIZE, "--early-stop", "N", "train.", "early_stop", AT(early_stop), 0, 0, 1000000,
     "end a stage after N evaluations that were no better than the best, and use the best\nweights (default 0: never)"},
    FLAG("--eval", eval, "only evaluate what the run has"),

    HEADING("On which machine"),
    COUNT("--threads", threads, 0, 0, 4096, "0 (default): all; the result does not depend on it"),
    TEXT("--device", "cpu|cuda", device, "where to train (default: where the run began, else a GPU if there is one)"),
    TEXT("--precision", "TYPE", precision,
         "what products multiply: f32 (default on a CPU), bf16 (default on a GPU), or on a\n"
         "CPU bf16x3: three products of bf16 for one, within 3e-5 of f32 and faster with AMX.\n"
         "Sums, weights and losses are in f32"),
    HEADING("Several processes: mpirun -np 2 --bind-to none ./train ... (needs MPI; doc/training.md).\n"
            "Each takes --batch pictures, and the gradients are added up."),
};
enum { ROWS = sizeof table / sizeof *table };

/* ------------------------------------------------------------------------------------------------------------
 * The command line
 * ---------------------------------------------------------------------------------------------------------- */

/* Where the user says nothing: the usual, or, where the recipe may say something, a mark for that. */
static void put_unsaid(Settings *to, const Setting *r) {
    void *at = (char *)to + r->place;
    if (r->kind == OPT_SIZE) *(size_t *)at = r->key ? NOT_GIVEN : (size_t)r->usual;
    if (r->kind == OPT_REAL) *(double *)at = r->key ? -1 : r->usual;
}

static void check_given(const Settings *o) {
    if (o->vqgan + o->joint + o->all + (o->scale > 0) + (o->schedule != NULL) != 1)
        usage_error("give one of --vqgan, --scale N, --joint, --all, --schedule psim; -h explains");
    if (o->schedule && strcmp(o->schedule, "psim")) usage_error("--schedule %s: expected psim", o->schedule);
    if (o->schedule && (o->eval || o->resume)) usage_error("--schedule goes with neither --eval nor --resume");
    if (o->val_list && !o->list) usage_error("--val-list goes with --list, which names the training pictures");
    if (o->remap && (!(o->vqgan || o->all) || o->eval))
        usage_error("--remap goes with --vqgan or --all, without --eval");
    if (o->perceptual && !(o->vqgan || o->all)) usage_error("--perceptual goes with --vqgan or --all");
    if (o->vqgan && (o->alpha >= 0 || o->label_dropout >= 0 || o->balance))
        usage_error("--alpha, --label-dropout and --balance are of transitions, --vqgan trains none");
    if (o->vqgan && !o->remap && o->crops != NOT_GIVEN) usage_error("--crops is of transitions, --vqgan trains none");
    if (o->all && o->eval) usage_error("--eval evaluates one stage: --vqgan, --scale N or --joint");
    Precision p;
    if (o->precision && precision_read(&p, o->precision, "--precision") != OK) usage_error("%s", err_text());
}

/* Where nothing is said, run and data are called as the recipe is. */
static void default_folders(Settings *o) {
    static char run_folder[PATH_BYTES], data[PATH_BYTES];
    const char *slash = strrchr(o->model, '/'), *short_name = slash && slash[1] ? slash + 1 : o->model;
    snprintf(run_folder, sizeof run_folder, "runs/%s", short_name);
    snprintf(data, sizeof data, "data/%s", short_name);
    if (!o->run) o->run = run_folder;
    if (!o->data) o->data = data;
}

void settings_parse(Settings *given, int argc, char **argv) {
    Option rows[ROWS + 1];
    size_t n = 0;
    *given = (Settings){.program = argv[0], .model = "emoji"};
    for (const Setting *r = table; r < table + ROWS; r++) {
        put_unsaid(given, r);
        if (r->option)
            rows[n++] = (Option){r->kind, r->option, r->value, (char *)given + r->place, r->least, r->most, r->help};
    }
    rows[n] = (Option){OPT_END};
    options_parse(argc, argv, rows, intro);
    if (given->convert_perceptual && !given->perceptual)
        usage_error("--convert-perceptual goes with --perceptual, which names what to convert");
    if (!given->convert_perceptual) check_given(given);
    default_folders(given);
}

/* ------------------------------------------------------------------------------------------------------------
 * The recipe, and what the user gave over it
 * ---------------------------------------------------------------------------------------------------------- */

static const char *recipe_path(const Settings *o, char out[PATH_BYTES]) {
    if (o->config)
        snprintf(out, PATH_BYTES, "%s", o->config);
    else if (strchr(o->model, '/'))
        snprintf(out, PATH_BYTES, "%s/config.txt", o->model);
    else {
        char usual[PATH_BYTES];
        snprintf(usual, sizeof usual, "models/%.200s.txt", o->model);
        models_find(out, usual);
    }
    return out;
}

/* The recipes in a folder such as models/ */
static Err list_recipes(Names *found, const char *folder) {
    DIR *d = opendir(folder);
    Err e = OK;
    for (struct dirent *one = d ? readdir(d) : NULL; one && e == OK; one = readdir(d)) {
        const size_t length = strlen(one->d_name);
        if (length > 4 && !strcmp(one->d_name + length - 4, ".txt") && !strstr(one->d_name, "-classes"))
            e = names_add(found, one->d_name, length - 4, 0, 0);
    }
    if (d) closedir(d);
    return e;
}

/* "cats, emoji, ...": those that there are, in all places of models/ */
static const char *recipes_text(char *text, size_t bytes) {
    char folder[PATH_BYTES];
    Names found = {0};
    size_t at = 0;
    *text = 0;
    for (int i = 0; models_place(folder, i); i++)
        if (list_recipes(&found, folder) != OK) break;
    names_sort(&found, names_in_byte_order);
    for (size_t i = 0; i < found.n && at < bytes; i++)
        if (i == 0 || strcmp(found.item[i].name, found.item[i - 1].name) != 0)
            at += (size_t)snprintf(text + at, bytes - at, "%s%s", at ? ", " : "", found.item[i].name);
    names_free(&found);
    return at ? text : "none";
}

static Err no_recipe(const Settings *o, const char *path) {
    char text[1024], places[PLACES_BYTES];
    if (o->config || strchr(o->model, '/')) return err("%s: no such recipe (models/emoji.txt is an example)", path);
    TRY(models_check());
    return err("%s: no such recipe; recipes: %s (in %s); or --config FILE names another", path,
               recipes_text(text, sizeof text), models_places(places));
}

/* The part of the recipe that this stage is trained by */
static Err read_recipe(const Settings *o, Config *recipe) {
    char path[PATH_BYTES];
    recipe_path(o, path);
    if (!file_exists(path)) return no_recipe(o, path);
    return recipe_read(recipe, path, o->vqgan ? RECIPE_VQGAN : o->joint ? 0 : (int)o->scale);
}

/* How many scales the model has: as a transition's own recipe says, else (NULL, or a first stage's) the file's. */
Err count_scales(const Settings *given, const Config *own, size_t *T) {
    Config recipe = {0};
    char path[PATH_BYTES];
    if (own && config_get(own, "model.params.", "n_scales"))
        return config_size(T, own, "model.params.", "n_scales", 1, MAX_SCALES, 0);
    if (!file_exists(recipe_path(given, path))) return no_recipe(given, path);
    Err e = recipe_read(&recipe, path, 1);
    if (e == OK) e = config_size(T, &recipe, "model.params.", "n_scales", 1, MAX_SCALES, 0);
    config_free(&recipe);
    return e;
}

int has_classes(const Stage *s) {
    static const char prefix[] = "model.params.conditioner_config.", key[] = "target";
    Config recipe = {0};
    char path[PATH_BYTES];
    if (!s->set.vqgan) return config_get(&s->recipe, prefix, key) != NULL;
    const int there = recipe_read(&recipe, recipe_path(&s->set, path), 1) == OK && config_get(&recipe, prefix, key);
    config_free(&recipe);
    return there;
}

/* One row: what the user gave, into the recipe. */
static Err put_given(Config *recipe, const Setting *r, const Settings *given) {
    char key[128];
    const void *at = (const char *)given + r->place;
    if (!r->key || !r->option) return OK;
    snprintf(key, sizeof key, "%s%s", r->prefix, r->key);
    if (r->kind == OPT_FLAG && *(const int *)at) return config_set(recipe, key, "true");
    if (r->kind == OPT_SIZE && *(const size_t *)at != NOT_GIVEN)
        return config_set(recipe, key, "%zu", *(const size_t *)at);
    if (r->kind == OPT_REAL && *(const double *)at >= 0) return config_set(recipe, key, "%.17g", *(const double *)at);
    if (r->kind == OPT_STRING && *(const char *const *)at)
        return config_set(recipe, key, "%s", *(const char *const *)at);
    return OK;
}

/* --steps alone also fits warm-up and decay to the shorter run. */
static Err fit_to_steps(Config *recipe, RateKind kind, size_t steps) {
    size_t warm = steps;
    if (kind != RATE_COSINE) return OK;
    TRY(config_size(&warm, recipe, LR, "warm_up_steps", 0, SIZE_MAX / 2, 1));
    TRY(config_set(recipe, LR "max_decay_steps", "%zu", steps));
    return config_set(recipe, LR "warm_up_steps", "%zu", min_size(warm, steps / 10));
}

/* Does the recipe say one rate for all steps, as a schedule without a slope? */
static int is_flat(const Config *recipe) {
    const char *start = config_get(recipe, LR, "lr_start"), *top = config_get(recipe, LR, "lr_max"),
               *end = config_get(recipe, LR, "lr_min");
    return start && top && end && !strcmp(start, top) && !strcmp(top, end);
}

/* --lr: a constant rate stays one. */
static Err give_rate(Config *recipe, RateKind kind, double lr) {
    static const char *const ends[] = {LR "lr_start", LR "lr_min"};
    const int constant = kind == RATE_CONSTANT || is_flat(recipe);
    if (kind == RATE_COSINE_CYCLES || kind == RATE_LINEAR_CYCLES)
        return err("--lr: the recipe's schedule has cycles; its f_max say how high each goes");
    for (int i = 0; i < 2 && constant; i++) TRY(config_set(recipe, ends[i], "%.17g", lr));
    return config_set(recipe, "model.base_learning_rate", "none");
}

static Err apply_given(Config *recipe, const Settings *given) {
    RateKind kind;
    TRY(rate_kind(&kind, recipe));
    if (given->steps != NOT_GIVEN) TRY(fit_to_steps(recipe, kind, given->steps));
    if (given->lr >= 0) TRY(give_rate(recipe, kind, given->lr));
    if (given->alpha >= 0 && config_get(recipe, "model.params.", "soft_only"))
        TRY(config_set(recipe, "model.params.soft_only", "false"));
    for (const Setting *r = table; r < table + ROWS; r++) TRY(put_given(recipe, r, given));
    return OK;
}

/* ------------------------------------------------------------------------------------------------------------
 * What holds
 * ---------------------------------------------------------------------------------------------------------- */

/* One row, out of the recipe. Texts stay there. */
static Err take_setting(Settings *to, const Setting *r, const Config *recipe) {
    void *at = (char *)to + r->place;
    const int optional = r->usual != NEEDED;
    if (!r->key) return OK;
    switch (r->kind) {
    case OPT_FLAG: *(int *)at = r->usual != 0; return config_flag(at, recipe, r->prefix, r->key, optional);
    case OPT_SIZE:
        *(size_t *)at = optional ? (size_t)r->usual : 0;
        return config_size(at, recipe, r->prefix, r->key, (size_t)r->least,
                           r->most < HUGE_NUMBER ? (size_t)r->most : SIZE_MAX / 2, optional);
    case OPT_REAL:
        *(double *)at = r->usual;
        return config_real(at, recipe, r->prefix, r->key, r->least, r->most, optional);
    default: return OK;
    }
}

/* Pictures in a step as the recipe has them, of all ranks if it is a state's */
static size_t pictures_per_step(const Config *recipe) {
    size_t batch = 16, accumulate = 1;
    if (config_size(&batch, recipe, "data.params.", "batch_size", 1, SIZE_MAX / 2, 1) != OK ||
        config_size(&accumulate, recipe, "lightning.trainer.", "accumulate_grad_batches", 1, 65536, 1) != OK)
        return 0;
    return batch * accumulate;
}

/* The batch of the recipe is of a rank if the user or the recipe says it, of all ranks as a state file keeps it: so
 * that a run may go on with another number of ranks. */
static Err share_batch(Stage *s, int of_a_rank) {
    const size_t said = s->set.batch;
    if (!of_a_rank && said % ranks())
        return err("%s: a micro batch of %zu pictures, as the run was trained, cannot be shared evenly by %zu "
                   "processes; --batch says how many each is to take",
                   s->name, said, ranks());
    s->batch = of_a_rank ? said : said / ranks();
    s->global_batch = s->batch * ranks(), s->rank_first = s->batch * rank();
    s->shares = (double)(s->set.accumulate * ranks());
    return config_set(&s->recipe, "data.params.batch_size", "%zu", s->global_batch);
}

/* What rate.c's factor is multiplied with; "none": with 1 */
static Err scale_learning_rate(Stage *s) {
    const char *text = config_get(&s->recipe, "model.", "base_learning_rate");
    double base = 0;
    s->lr_scale = 1;
    if (!text || !strcmp(text, "none")) return OK;
    TRY(config_real(&base, &s->recipe, "model.", "base_learning_rate", 0, 10, 0));
    s->lr_scale = base * (double)(s->global_batch * s->set.accumulate);
    return OK;
}

/* train.device: "cpu" (in f32), "cpu bf16", "cuda f32" ... */
static Name device_name(const Stage *s) {
    if (!s->set.cuda && s->precision == PRECISION_F32) return name_of("cpu");
    return name_of("%s %s", s->set.cuda ? "cuda" : "cpu", precision_name(s->precision));
}

/* As people say it: "cpu in f32" */
static Name device_words(const char *device) {
    const size_t n = strcspn(device, " ");
    return name_of("%.*s in %s", (int)n, device, device[n] ? device + n + 1 : "f32");
}

/* What the user says; else what the run was trained in so far, on such a device; else the usual */
static Err settle_precision(Stage *s, const char *before) {
    const Settings *o = &s->set;
    const char *device = o->cuda ? "cuda" : "cpu";
    const size_t n = strlen(device);
    s->precision = s->usual_precision = o->cuda ? PRECISION_BF16 : precision_usual();
    if (o->precision)
        TRY(precision_read(&s->precision, o->precision, "--precision"));
    else if (before && !strncmp(before, device, n))
        TRY(precision_read(&s->precision, before[n] ? before + n + 1 : "f32", "train.device"));
    if (o->cuda && s->precision == PRECISION_BF16X3)
        return err("--precision bf16x3 is for --device cpu; on a GPU f32 or bf16");
    return o->cuda ? OK : precision_there(s->precision);
}

/* A run goes on where it was, unless the user says otherwise: bits differ from one device to another. */
static Err settle_device(Stage *s, int continuing) {
    Settings *o = &s->set;
    const char *before = continuing ? config_get(&s->recipe, "train.", "device") : NULL;
    if (before && !o->device) {
        o->cuda = strncmp(before, "cuda", 4) == 0;
        if (o->cuda) TRY(cuda_find(NULL, NULL, NULL));
    }
    TRY(settle_precision(s, before));
    const Name now = device_name(s);
    if (before && goes_on(s) && strcmp(before, now.s))
        say_once("%s: trained on %s so far, now on %s: another run than without the change\n", s->name,
                 device_words(before).s, device_words(now.s).s);
    return config_set(&s->recipe, "train.device", "%s", now.s);
}

/* The official ImageNet transitions see another random crop each time, so theirs are several; the other presets take the
 * centre. A run of an earlier version, which says nothing of crops, was trained on the centre. */
static Err settle_crops(Stage *s, int continuing) {
    enum { USUAL = 8 };
    const int random = s->prep == PREP_IMAGENET;
    if (s->set.crops > 1 && !random)
        return config_err(
            &s->recipe, "train.", "crops",
            "train.crops %zu: only data.prep imagenet crops at random, the others take the centre square; expected 1",
            s->set.crops);
    if (s->set.crops == 0) s->set.crops = random && !continuing ? USUAL : 1;
    return random && !s->set.vqgan ? config_set(&s->recipe, "train.crops", "%zu", s->set.crops) : OK;
}

/* On a CPU, sums come in another order where vectors are wider. */
static Err settle_processor(Stage *s, int continuing) {
#ifdef PLAIN
    const char *now = "plain loops";
#else
    const char *now = vector_instructions();
#endif
    const char *before = continuing ? config_get(&s->recipe, "train.", "processor") : NULL;
    if (s->set.cuda) return OK;
    if (before && goes_on(s) && strcmp(before, now))
        say_once("%s: trained with %s so far, from here on with %s: bits will differ from those of a run without the "
                 "change\n",
                 s->name, before, now);
    return config_set(&s->recipe, "train.processor", "%s", now);
}

/* A run that goes on, whose recipe may have been edited. One that is gone, and that nobody named, says nothing. */
static Err compare_with_recipe(Stage *s) {
    Config recipe = {0}, now = {0};
    char path[PATH_BYTES], key[128];
    if (!s->set.config && !file_exists(recipe_path(&s->set, path))) return OK;
    Err e = read_recipe(&s->set, &recipe);
    if (e == OK) e = apply_given(&now, &s->set);
    if (e == OK) e = compare_recipe(s, &recipe, &now);
    for (const Setting *r = table; r < table + ROWS && e == OK; r++) {
        if (!r->key || r->option || !strcmp(r->prefix, LR)) continue;
        snprintf(key, sizeof key, "%s%s", r->prefix, r->key);
        e = compare_removed(s, &recipe, &now, key);
    }
    config_free(&recipe);
    config_free(&now);
    return e;
}

/* A recipe that names none has the usual one. */
static size_t seed_of(const Config *recipe) {
    size_t seed = USUAL_SEED;
    return config_size(&seed, recipe, "train.", "seed", 0, SIZE_MAX / 2, 1) == OK ? seed : USUAL_SEED;
}

/* train.pictures: how many, and the hash of their names and sizes; a run of an earlier version does not say. */
Err settle_pictures(Stage *s, int continuing) {
    const char *before = continuing ? config_get(&s->recipe, "train.", "pictures") : NULL;
    const size_t n = s->train.n, had = before ? (size_t)strtoull(before, NULL, 10) : n;
    char now[48];
    snprintf(now, sizeof now, "%zu %016llx", n, (unsigned long long)s->train.identity);
    if (s->set.eval) return OK;
    if (!continuing || !goes_on(s)) return config_set(&s->recipe, "train.pictures", "%s", now);
    if (n != had)
        say_once("%s: trained on %zu pictures so far, now on %zu: another run than without the change\n", s->name, had,
                 n);
    else if (before && strcmp(before, now))
        say_once("%s: the %zu pictures are others than those it was trained on so far: another run than without the "
                 "change\n",
                 s->name, n);
    return config_set(&s->recipe, "train.pictures", "%s", now);
}

/* Earlier versions took a factor that nobody said as without a base_learning_rate, and never looked at
 * scheduler_config.target. A state of one, which says neither processor nor pictures, keeps such a rate if it can. */
static Err keep_old_rate(Stage *s) {
    static const char *const usual[][2] = {{LR "lr_start", "2.5e-06"}, {LR "lr_max", "0.0001"}, {LR "lr_min", "1e-08"}};
    const Config *c = &s->recipe;
    const char *base = config_get(c, "model.", "base_learning_rate");
    RateKind kind;
    int missing = 0;
    if (!base || !strcmp(base, "none") || config_get(c, "train.", "processor") || config_get(c, "train.", "pictures"))
        return OK;
    TRY(rate_kind(&kind, c));
    const int cycles = kind == RATE_COSINE_CYCLES || kind == RATE_LINEAR_CYCLES;
    for (int i = 0; i < 3 && !cycles; i++) {
        if (config_get(c, "", usual[i][0])) continue;
        missing = 1;
        TRY(config_set(&s->recipe, usual[i][0], "%s", usual[i][1]));
    }
    if (missing && goes_on(s))
        say_once("%s: begun by an earlier version, whose learning rate rose from lr_start 2.5e-06 to lr_max 0.0001 and "
                 "fell to lr_min 1e-08 where a recipe says none of them: it goes on so; a new run would have "
                 "model.base_learning_rate all along\n",
                 s->name);
    if (cycles && goes_on(s))
        say_once(
            "%s: begun by an earlier version, which did not look at scheduler_config.target: from here on its cycles "
            "are the learning rate's\n",
            s->name);
    return OK;
}

/* How far it goes may be what finished it; with --early-stop its best weights may yet be written. */
static int may_be_idle(const Settings *o, const Setting *r) {
    if (!r->key || !r->option || !strcmp(r->key, "steps") || !strcmp(r->key, "early_stop")) return 0;
    if (!strcmp(r->key, "batch_size")) return ranks() == 1; /* the run has that of all processes */
    return strcmp(r->key, "store") || o->early_stop == NOT_GIVEN;
}

/* Has the run, or where it does not say, the usual, this value of a row? */
static int is_so(const Config *run, const Setting *r, const char *key, const char *value) {
    const char *has = config_get(run, "", key);
    char usual[40];
    snprintf(usual, sizeof usual, "%.17g", r->usual);
    if (!has) has = r->kind == OPT_FLAG ? "false" : r->kind == OPT_STRING ? "f32" : usual; /* --store is the one text */
    return same_config_value(has, value);
}

/* s->idle: what the user gave of what a finished run has otherwise */
static Err list_idle(Stage *s) {
    size_t n = 0;
    for (const Setting *r = table; r < table + ROWS; r++) {
        Config one = {0};
        char value[40] = "";
        if (!may_be_idle(&s->set, r)) continue;
        const Err e = put_given(&one, r, &s->set);
        const int differs = one.n && !is_so(&s->recipe, r, one.kv[0].key, one.kv[0].value);
        if (differs && r->kind == OPT_REAL) snprintf(value, sizeof value, " %g", strtod(one.kv[0].value, NULL));
        if (differs && (r->kind == OPT_SIZE || r->kind == OPT_STRING))
            snprintf(value, sizeof value, " %s", one.kv[0].value);
        if (differs && n < sizeof s->idle)
            n += (size_t)snprintf(s->idle + n, sizeof s->idle - n, "%s%s%s", n ? ", " : "", r->option, value);
        config_free(&one);
        TRY(e);
    }
    return OK;
}

static Err read_store(Stage *s) {
    const char *store = config_get(&s->recipe, "imagebart.", "store");
    s->store = DT_F32;
    if (!store || dtype_of_store(&s->store, store) == OK) return OK;
    err_in("imagebart.store");
    return config_blame(&s->recipe, "imagebart.", "store");
}

/* What the recipe says must be right where an option comes instead, too. */
static Err check_recipe(Stage *s) {
    Settings read;
    RateKind kind;
    Rate rate;
    for (const Setting *r = table; r < table + ROWS; r++)
        if (r->key && config_get(&s->recipe, r->prefix, r->key)) TRY(take_setting(&read, r, &s->recipe));
    TRY(config_flag(&read.all, &s->recipe, "model.params.", "soft_only", 1));
    TRY(read_store(s));
    TRY(rate_kind(&kind, &s->recipe));
    const int cycles = kind == RATE_COSINE_CYCLES || kind == RATE_LINEAR_CYCLES; /* how many is for --steps to say */
    return cycles ? OK : rate_read(&rate, &s->recipe, 1);
}

Err settings_read(Stage *s, const Checkpoint *ck) {
    char path[PATH_BYTES];
    const int batch_given = s->set.batch != NOT_GIVEN;
    TRY(ck ? copy_settings(&s->recipe, &ck->meta) : read_recipe(&s->set, &s->recipe));
    if (ck) TRY(keep_old_rate(s));
    if (ck && !s->set.eval) TRY(compare_with_recipe(s));
    const size_t pictures = pictures_per_step(&s->recipe), seed = seed_of(&s->recipe);
    if (ck && !s->set.eval && !goes_on(s)) TRY(list_idle(s));
    if (!ck) TRY(check_recipe(s));
    TRY(apply_given(&s->recipe, &s->set));
    TRY(read_store(s));
    if (keys_check(&s->recipe, s->set.vqgan ? KEYS_FIRST : KEYS_TRANSITION, 1) != OK)
        return err_in(ck ? ck->path : recipe_path(&s->set, path));
    TRY(settle_device(s, ck != NULL));
    TRY(settle_processor(s, ck != NULL));
    for (const Setting *r = table; r < table + ROWS; r++) TRY(take_setting(&s->set, r, &s->recipe));
    TRY(official_settings(s, ck ? NULL : recipe_path(&s->set, path)));
    TRY(share_batch(s, !ck || batch_given));
    TRY(scale_learning_rate(s));
    TRY(rate_read(&s->rate, &s->recipe, s->set.steps));
    const double beta1 = s->set.vqgan ? 0.5 : 0.9, beta2 = s->set.vqgan ? 0.9 : 0.95;
    s->adam = (AdamW){0, beta1, beta2, 1e-8, s->set.weight_decay_scale};
    const int on = ck && goes_on(s);
    if (on && pictures != pictures_per_step(&s->recipe))
        say_once("%s: a step took %zu pictures, from here on it takes %zu: another run than without the change\n",
                 s->name, pictures, pictures_per_step(&s->recipe));
    if (on && seed != s->set.seed)
        say_once("%s: trained with seed %zu so far, from here on with %zu: another run than without the change\n",
                 s->name, seed, (size_t)s->set.seed);
    history_start(&s->history);
    TRY(prep_read(&s->prep, &s->recipe));
    return settle_crops(s, ck != NULL);
}
