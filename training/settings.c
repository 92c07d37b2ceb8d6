/* settings.c - the options of ./train, and a stage's settings: the recipe's lines, then what the user said. */
#include "training/stage.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *recipe_path(const Options *o, char out[1100]) {
    if (o->config)
        snprintf(out, 1100, "%s", o->config);
    else if (strchr(o->model, '/'))
        snprintf(out, 1100, "%s/config.txt", o->model);
    else
        snprintf(out, 1100, "models/%s.txt", o->model);
    return out;
}

/* The part of the recipe that this stage is trained by */
Err read_recipe(Stage *s) {
    const Options *o = s->opt;
    char path[1100];
    recipe_path(o, path);
    if (!file_exists(path))
        return err("%s: no such recipe; --config FILE names one (models/emoji.txt is an example)", path);
    return recipe_read(&s->settings, path, o->vqgan ? RECIPE_VQGAN : o->joint ? 0 : (int)o->scale);
}

static const char LR[] = "model.params.scheduler_config.params.";

/* What the user gave goes over the recipe; --steps alone also fits warm-up and decay to the shorter run. */
Err apply_options(Stage *s) {
    const Options *o = s->opt;
    Config *c = &s->settings;
    if (o->steps != NOT_GIVEN) {
        size_t warm = o->steps;
        TRY(config_size(&warm, c, LR, "warm_up_steps", 0, SIZE_MAX / 2, 1));
        TRY(config_set(c, "train.steps", "%zu", o->steps));
        TRY(config_set(c, "model.params.scheduler_config.params.max_decay_steps", "%zu", o->steps));
        TRY(config_set(c, "model.params.scheduler_config.params.warm_up_steps", "%zu",
                       warm < o->steps / 10 ? warm : o->steps / 10));
    }
    if (o->lr > 0) {
        TRY(config_set(c, "model.params.scheduler_config.params.lr_max", "%.17g", o->lr));
        TRY(config_set(c, "model.base_learning_rate", "none"));
    }
    if (o->batch != NOT_GIVEN) TRY(config_set(c, "data.params.batch_size", "%zu", o->batch));
    if (o->accumulate != NOT_GIVEN)
        TRY(config_set(c, "lightning.trainer.accumulate_grad_batches", "%zu", o->accumulate));
    if (o->alpha >= 0) TRY(config_set(c, "model.params.alpha", "%.17g", o->alpha));
    if (o->label_dropout >= 0) TRY(config_set(c, "train.label_dropout", "%.17g", o->label_dropout));
    if (o->seed != NOT_GIVEN) TRY(config_set(c, "train.seed", "%zu", o->seed));
    if (o->bf16_states) TRY(config_set(c, "train.bf16_states", "true"));
    if (o->balance) TRY(config_set(c, "train.balance_classes", "true"));
    if (o->store) TRY(config_set(c, "imagebart.store", "%s", o->store));
    return OK;
}

/* `batch` of the settings is of a rank if the user or the recipe says it, of all ranks as a state file keeps it: so
 * that a run may go on with another number of ranks. given: of a rank. */
static Err share_batch(Stage *s, int given) {
    const size_t saved = s->batch;
    if (!given && saved % ranks())
        return err("%s: a micro batch of %zu pictures, as the run was trained, cannot be shared evenly by %zu "
                   "processes; --batch says how many each is to take",
                   s->name, saved, ranks());
    s->batch = given ? saved : saved / ranks();
    s->of = s->batch * ranks(), s->first = s->batch * rank(), s->shares = (double)(s->accumulate * ranks());
    return config_set(&s->settings, "data.params.batch_size", "%zu", s->of);
}

Err read_settings(Stage *s, int continuing) {
    const Config *c = &s->settings;
    const char *store = config_get(c, "imagebart.", "store");
    size_t seed = 23, huge = SIZE_MAX / 2; /* 23: the official default */
    double base = 0;
    const int is_vqgan = s->opt->vqgan;
    s->batch = 16, s->accumulate = 1, s->steps = 0;
    s->adam = (AdamW){0, is_vqgan ? 0.5 : 0.9, is_vqgan ? 0.9 : 0.95, 1e-8, 1};
    s->lr = (LrSchedule){2.5e-6, 1e-4, 1e-8, 0, 0};
    s->ema_decay = 0.9999;
    s->w_l1 = s->w_l2 = s->w_codebook = 1;
    survive_defaults(s);
    TRY(config_size(&s->batch, c, "data.params.", "batch_size", 1, 1 << 20, 1));
    TRY(config_size(&s->accumulate, c, "lightning.trainer.", "accumulate_grad_batches", 1, 65536, 1));
    TRY(share_batch(s, !continuing || s->opt->batch != NOT_GIVEN));
    TRY(config_size(&s->steps, c, "train.", "steps", 1, UINT32_MAX, 0));
    TRY(config_size(&seed, c, "train.", "seed", 0, huge, 1));
    TRY(config_flag(&s->flip, c, "train.", "flip", 1));
    TRY(config_flag(&s->balance, c, "train.", "balance_classes", 1));
    TRY(config_flag(&s->bf16_states, c, "train.", "bf16_states", 1));
    TRY(config_size(&s->restart_every, c, "train.", "restart_codes", 0, huge, 1));
    TRY(config_real(&s->w_l1, c, "train.", "l1_weight", 0, 1e6, 1));
    TRY(config_real(&s->w_l2, c, "train.", "l2_weight", 0, 1e6, 1));
    TRY(config_real(&s->w_codebook, c, "train.", "codebook_weight", 0, 1e6, 1));
    TRY(config_real(&s->ema_decay, c, "train.", "ema_decay", 0, 1, 1));
    TRY(config_real(&s->spike, c, "train.", "spike", 0, 1e6, 1));
    TRY(config_real(&s->adam.decay_scale, c, "train.", "weight_decay_scale", 0, 1e6, 1));
    TRY(config_real(&s->alpha, c, "model.params.", "alpha", 0, 1, 1));
    TRY(config_real(&s->label_dropout, c, "train.", "label_dropout", 0, 1, 1));
    TRY(config_real(&s->lr.lr_start, c, LR, "lr_start", 0, 10, 1));
    TRY(config_real(&s->lr.lr_max, c, LR, "lr_max", 0, 10, 1));
    TRY(config_real(&s->lr.lr_min, c, LR, "lr_min", 0, 10, 1));
    TRY(config_real(&s->lr.warm_up_steps, c, LR, "warm_up_steps", 0, 1e12, 1));
    s->lr.max_decay_steps = (double)s->steps;
    TRY(config_real(&s->lr.max_decay_steps, c, LR, "max_decay_steps", 1, 1e12, 1));
    const char *base_text = config_get(c, "model.", "base_learning_rate");
    s->lr_scale = 1;
    if (base_text && strcmp(base_text, "none")) {
        TRY(config_real(&base, c, "model.", "base_learning_rate", 0, 10, 0));
        s->lr_scale = base * (double)(s->of * s->accumulate);
    }
    TRY(config_flag(&s->compact, c, "imagebart.", "compact", 1));
    s->store = DT_F32, s->seed = seed;
    if (store && dtype_of_store(&s->store, store) != OK) return err_in("imagebart.store");
    return prep_read(&s->prep, c);
}

/* Pictures in a step as the settings have it */
size_t pictures_per_step(const Stage *s) {
    size_t batch = 16, accumulate = 1;
    if (config_size(&batch, &s->settings, "data.params.", "batch_size", 1, SIZE_MAX / 2, 1) != OK ||
        config_size(&accumulate, &s->settings, "lightning.trainer.", "accumulate_grad_batches", 1, 65536, 1) != OK)
        return 0;
    return batch * accumulate;
}

/* A run goes on where it was, unless the user says otherwise: bits differ from one device to another. */
static const char *device_name(const Options *o) {
    return !o->cuda ? "cpu" : strcmp(o->precision, "bf16") ? "cuda f32" : "cuda bf16";
}

Err settle_device(Stage *s, Options *o, int continuing) {
    const char *before = continuing ? config_get(&s->settings, "train.", "device") : NULL;
    if (before && !o->device) {
        o->cuda = strncmp(before, "cuda", 4) == 0;
        if (o->cuda && !o->precision) o->precision = strcmp(before, "cuda f32") ? "bf16" : "f32";
        if (o->cuda) TRY(cuda_find(NULL, NULL, NULL));
    }
    if (!o->precision) o->precision = "bf16";
    if (before && rank() == 0 && strcmp(before, device_name(o)))
        fprintf(stderr, "%s: trained on %s so far, from here on on %s: another run than without the change\n", s->name,
                before, device_name(o));
    return config_set(&s->settings, "train.device", "%s", device_name(o));
}

const char train_intro[] =
    "usage: ./train [MODEL] (--vqgan | --scale N | --joint | --all) [options]\n\n"
    "Trains one part of an ImageBART model. Three steps make a model:\n"
    "  1. ./train emoji --vqgan --data data/emoji    a VQGAN learns to write a picture as a grid of tokens and back\n"
    "  2. ./train emoji --scale N --data data/emoji  for N = 1..T: noise has replaced a part of the tokens, more at\n"
    "                                                each scale; a transformer learns to undo one step of it\n"
    "  3. ./sample runs/emoji                        starts from pure noise and runs the steps back, T to 1\n"
    "--all does all three; killed, it goes on where it was. Everything is kept in the run's folder: weights,\n"
    "checkpoints, log.tsv, loss.svg and, as training goes on, pictures of held-out examples.\n";

Options options = {.model = "emoji",
                   .steps = NOT_GIVEN,
                   .batch = NOT_GIVEN,
                   .accumulate = NOT_GIVEN,
                   .seed = NOT_GIVEN,
                   .save_every = 100,
                   .eval_every = 500,
                   .picture_every = 500,
                   .keep = 2,
                   .alpha = -1,
                   .label_dropout = -1};

const Option option_table[] = {
    {OPT_HEADING, "Arguments", NULL, NULL, 0, 0, NULL},
    {OPT_ARGUMENT, "MODEL", NULL, &options.model, 0, 0,
     "its recipe, models/MODEL.txt: emoji (default), photos, ffhq ...; or a folder with\nconfig.txt"},

    {OPT_HEADING, "What to train (one of)", NULL, NULL, 0, 0, NULL},
    {OPT_FLAG, "--vqgan", NULL, &options.vqgan, 0, 0, "the first stage: pictures to tokens and back"},
    {OPT_SIZE, "--scale", "N", &options.scale, 1, MAX_SCALES, "the transition x_N -> x_(N-1)"},
    {OPT_FLAG, "--joint", NULL, &options.joint, 0, 0, "all transitions in one network, a random scale each step"},
    {OPT_FLAG, "--all", NULL, &options.all, 0, 0, "the first stage, then every scale, then draw samples with ./sample"},
    {OPT_STRING, "--schedule", "psim", &options.schedule, 0, 0,
     "nothing yet: measure, with the run's VQGAN, how far scales must be apart to look\n"
     "equally far apart, and write RUN/psim.txt and the recipe's line"},

    {OPT_HEADING, "On what", NULL, NULL, 0, 0, NULL},
    {OPT_STRING, "--data", "PATH", &options.data, 0, 0,
     "a folder of PNG, JPEG and WebP pictures (sub-folders are classes; train/ and val/\n"
     "are the split if they exist, else 1 in 20 is held out), LSUN's LMDB, or a list\n"
     "file (default data/MODEL)"},
    {OPT_STRING, "--list", "FILE", &options.list, 0, 0,
     "of the folder --data only what this file names, a picture a line, such as the\n"
     "official ffhqtrain.txt"},
    {OPT_STRING, "--val-list", "FILE", &options.val_list, 0, 0,
     "and hold out what this one names (ffhqvalidation.txt)"},

    {OPT_HEADING, "Beginning and going on", NULL, NULL, 0, 0, NULL},
    {OPT_STRING, "--run", "DIR", &options.run, 0, 0, "the run's folder (default runs/MODEL)"},
    {OPT_FLAG, "--resume", NULL, &options.resume, 0, 0, "continue the run, bit for bit as if it had not stopped"},
    {OPT_STRING, "--init", "PATH", &options.init, 0, 0,
     "start from the weights in this folder (models/emoji, another run) or file (an\n"
     "official vqgan .ckpt; with --all it is the first stage's), not from noise"},
    {OPT_STRING, "--config", "FILE", &options.config, 0, 0, "the recipe, instead of models/MODEL.txt"},

    {OPT_HEADING, "How (over what the recipe says)", NULL, NULL, 0, 0, NULL},
    {OPT_SIZE, "--steps", "N", &options.steps, 1, UINT32_MAX,
     "optimizer steps in all; warm-up and cosine decay fit themselves to it"},
    {OPT_SIZE, "--batch", "N", &options.batch, 1, 65536, "pictures per micro batch"},
    {OPT_SIZE, "--accumulate", "N", &options.accumulate, 1, 65536, "micro batches per step"},
    {OPT_REAL, "--lr", "X", &options.lr, 1e-12, 10, "peak learning rate"},
    {OPT_SIZE, "--seed", "N", &options.seed, 0, 9e15, "of everything random (default 23)"},
    {OPT_FLAG, "--bf16-states", NULL, &options.bf16_states, 0, 0,
     "the optimizer's moments in bf16, rounded at random: half their memory"},

    {OPT_HEADING, "How: the first stage (whose discriminator is the recipe's: README)", NULL, NULL, 0, 0, NULL},
    {OPT_STRING, "--perceptual", "FILE[,FILE]", &options.perceptual, 0, 0,
     "weights of LPIPS, a part of the loss: a VQGAN's .ckpt, or torchvision's\n"
     "vgg16-397923af.pth and LPIPS's vgg.pth (default: what models/lpips has, where the\n"
     "recipe wants it); none: without"},
    {OPT_STRING, "--convert-perceptual", "OUT", &options.convert_perceptual, 0, 0,
     "write what --perceptual names as one safetensors file, and end"},
    {OPT_FLAG, "--remap", NULL, &options.remap, 0, 0,
     "then let tokens number only the codes that the training pictures use; at once\n"
     "where the run has a first stage, unless --resume trains it further"},

    {OPT_HEADING, "How: transitions", NULL, NULL, 0, 0, NULL},
    {OPT_REAL, "--alpha", "X", &options.alpha, 0, 1,
     "loss = X soft (KL to the posterior) + (1-X) hard (cross entropy)"},
    {OPT_REAL, "--label-dropout", "P", &options.label_dropout, 0, 1,
     "with classes: leave the class out this often, so that ./sample can guide\n(--guidance); 0.1 is usual"},
    {OPT_FLAG, "--balance", NULL, &options.balance, 0, 0, "draw every class equally often, however few its pictures"},

    {OPT_HEADING, "Keeping", NULL, NULL, 0, 0, NULL},
    {OPT_SIZE, "--save-every", "N", &options.save_every, 1, UINT32_MAX, "steps between checkpoints (default 100)"},
    {OPT_SIZE, "--keep", "N", &options.keep, 1, KEEP_MAX,
     "checkpoints that are kept, the newest and those before it (default 2)"},
    {OPT_FLAG, "--no-wait", NULL, &options.no_wait, 0, 0,
     "stop when the disk is full, instead of trying until it is not"},
    {OPT_STRING, "--store", "TYPE", &options.store, 0, 0, "f32, f16 or bf16: how the weights for sampling are stored"},

    {OPT_HEADING, "Seeing", NULL, NULL, 0, 0, NULL},
    {OPT_SIZE, "--eval-every", "N", &options.eval_every, 1, UINT32_MAX,
     "steps between evaluations on the held-out pictures (default 500)"},
    {OPT_SIZE, "--picture-every", "N", &options.picture_every, 1, UINT32_MAX, "steps between pictures (default 500)"},
    {OPT_FLAG, "--eval", NULL, &options.eval, 0, 0, "only evaluate what the run has"},

    {OPT_HEADING, "On which machine", NULL, NULL, 0, 0, NULL},
    {OPT_SIZE, "--threads", "N", &options.threads, 0, 4096, "0 (default): all; the result does not depend on it"},
    {OPT_STRING, "--device", "cpu|cuda", &options.device, 0, 0,
     "where to train (default: where the run began, else a GPU if there is one)"},
    {OPT_STRING, "--precision", "TYPE", &options.precision, 0, 0,
     "with --device cuda: bf16 (default), weights and sums still in float, or f32"},
    {OPT_HEADING,
     "Several processes: mpirun -np 2 --bind-to none ./train ... (needs MPI; README, \"More than one machine\").\n"
     "Each takes --batch pictures, and the gradients are added up.",
     NULL, NULL, 0, 0, NULL},
    {OPT_END, NULL, NULL, NULL, 0, 0, NULL}};

void check_options(const Options *o) {
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
    if (o->all && o->eval) usage_error("--eval evaluates one stage: --vqgan, --scale N or --joint");
    if (o->precision && strcmp(o->precision, "bf16") && strcmp(o->precision, "f32"))
        usage_error("--precision %s: expected bf16 or f32", o->precision);
}

/* Where nothing is said, run and data are called as the recipe is. */
void default_folders(Options *o) {
    static char run_folder[1100], data[1100];
    const char *slash = strrchr(o->model, '/'), *short_name = slash && slash[1] ? slash + 1 : o->model;
    snprintf(run_folder, sizeof run_folder, "runs/%s", short_name);
    snprintf(data, sizeof data, "data/%s", short_name);
    if (!o->run) o->run = run_folder;
    if (!o->data) o->data = data;
}
