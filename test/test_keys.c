/* test_keys.c - the official configuration is obeyed, or refused: every key of the table, in recipes and in metadata; all
 * keys of the official files; misspelt ones; schedules of the learning rate; spikes. */
#include "test.h"
#include "training/training.h"

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#define LR "model.params.scheduler_config."

/* key, value, key, value ...: a recipe */
static Config recipe(const char *const *said) {
    Config c = {0};
    for (; *said; said += 2) CHECK_OK(config_set(&c, said[0], "%s", said[1]));
    return c;
}
#define RECIPE(...) recipe((const char *const[]){__VA_ARGS__, NULL})

static Err rate_of(Rate *r, Config c, size_t steps) {
    Err e = rate_read(r, &c, steps);
    config_free(&c);
    return e;
}

static int close_to(double a, double b) {
    return fabs(a - b) <= 1e-12 * fabs(b);
}

/* A first stage of taming has a rate and nothing else: a constant one. Ours begins without a rate. */
static void test_constant(void) {
    Rate r;
    CHECK_OK(rate_of(&r, RECIPE("model.base_learning_rate", "4.5e-6", "train.steps", "10"), 10));
    CHECK(r.kind == RATE_CONSTANT && rate_peak(&r) == 1);
    for (uint64_t n = 0; n < 1000000; n = 3 * n + 1) CHECK(rate_at(&r, n) == 1);
    CHECK_OK(rate_of(&r, RECIPE("model.base_learning_rate", "none"), 10));
    CHECK(r.kind == RATE_COSINE && rate_at(&r, 0) == 1e-4 && rate_peak(&r) == 1e-4);
    CHECK_OK(rate_of(&r, RECIPE("train.steps", "10"), 10));
    CHECK(r.kind == RATE_COSINE && rate_at(&r, 10) == 1e-8);
    CHECK_OK(rate_of(&r, RECIPE(LR "params.lr_max", "1e-3", LR "params.warm_up_steps", "4"), 10));
    CHECK(rate_at(&r, 0) == 2.5e-6 && rate_at(&r, 4) == 1e-3);
    CHECK_OK(rate_of(
        &r, RECIPE("model.base_learning_rate", "1", LR "params.lr_start", "0", LR "params.warm_up_steps", "4"), 10));
    CHECK(rate_at(&r, 0) == 0 && rate_at(&r, 1) == 0.25 && rate_at(&r, 4) == 1 && rate_at(&r, 10) == 1);
    CHECK_OK(rate_of(&r, RECIPE("model.base_learning_rate", "1", LR "params.lr_max", "0.5"), 10));
    CHECK(rate_at(&r, 0) == 0.5 && rate_at(&r, 10) == 0.5);
    static const char *const factors[] = {"lr_start", "lr_max", "lr_min"};
    for (int i = 0; i < 3; i++) { /* the official class has no usual values */
        Config c = RECIPE(LR "target", "imagebart.lr_scheduler.LambdaWarmUpCosineScheduler", "model.base_learning_rate",
                          "0.0625", LR "params.lr_start", "0", LR "params.lr_max", "1e-4", LR "params.lr_min", "1e-8",
                          LR "params.max_decay_steps", "7");
        for (size_t k = 0; k < c.n; k++)
            if (strstr(c.kv[k].key, factors[i])) c.kv[k].key[0] = 'x';
        CHECK_ERR(rate_of(&r, c, 10), factors[i]);
    }
}

/* The formulas of SPEC section 7 and of rate.c, at the points where they change */
static void test_cycles(void) {
    static const char module[] = "imagebart.lr_scheduler.";
    const double pi = 3.14159265358979323846;
    for (int linear = 0; linear < 2; linear++) {
        char target[96];
        Rate r;
        snprintf(target, sizeof target, "%s%s", module,
                 linear ? "LambdaLinearScheduler" : "LambdaWarmUpCosineScheduler2");
        CHECK_OK(rate_of(&r,
                         RECIPE(LR "target", target, LR "params.warm_up_steps", "[10, 0]", LR "params.f_start",
                                "[0.1, 0.5]", LR "params.f_max", "1,2", LR "params.f_min", "0.25, 1.0e-2",
                                LR "params.cycle_lengths", "[100, 50]", "model.base_learning_rate", "1"),
                         151));
        CHECK(r.n_cycles == 2 && rate_peak(&r) == 2);
        CHECK(close_to(rate_at(&r, 0), 0.1) && close_to(rate_at(&r, 5), 0.55));
        CHECK(close_to(rate_at(&r, 10), linear ? 0.25 + 0.75 * 90 / 100 : 1));
        CHECK(close_to(rate_at(&r, 40), linear ? 0.25 + 0.75 * 60 / 100 : 0.25 + 0.375 * (1 + cos(pi / 3))));
        CHECK(close_to(rate_at(&r, 100), 0.25)); /* the first cycle's last */
        CHECK(close_to(rate_at(&r, 101), linear ? 0.01 + 1.99 * 49 / 50 : 0.01 + 0.995 * (1 + cos(pi / 50))));
        CHECK(close_to(rate_at(&r, 150), 0.01));
    }
}

static void test_rate_refusals(void) {
    static const char *const cycle[] = {"cycle_lengths", "warm_up_steps", "f_start", "f_max", "f_min"};
    static const struct {
        const char *target, *key, *value, *error;
    } wrong[] = {
        {"torch.optim.lr_scheduler.StepLR", "lr_max", "1", "target is torch.optim.lr_scheduler.StepLR"},
        {"LambdaLinearScheduler", "f_max", "1", "target is LambdaLinearScheduler"},
        {"imagebart.lr_scheduler.LambdaWarmUpCosineScheduler", "f_max", "1", "f_max: is not a key of"},
        {"imagebart.lr_scheduler.LambdaLinearScheduler", "lr_max", "1", "lr_max: is not a key of"},
        {"imagebart.lr_scheduler.LambdaLinearScheduler", "f_min", "0,0", "f_min has 2 numbers, cycle_lengths 1"},
        {"imagebart.lr_scheduler.LambdaLinearScheduler", "f_min", "x", "1 to 64 numbers"},
        {"imagebart.lr_scheduler.LambdaLinearScheduler", "f_min", "[0", "1 to 64 numbers"},
        {"imagebart.lr_scheduler.LambdaLinearScheduler", "f_min", "0,", "1 to 64 numbers"},
        {"imagebart.lr_scheduler.LambdaLinearScheduler", "f_min", "-", "1 to 64 numbers"},
        {"imagebart.lr_scheduler.LambdaLinearScheduler", "cycle_lengths", "8", "end at step 8, train.steps is 10"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        char key[96];
        Rate r;
        Config c = RECIPE(LR "target", wrong[i].target);
        for (int k = 0; k < 5 && strstr(wrong[i].target, ".LambdaLinear"); k++) {
            snprintf(key, sizeof key, LR "params.%s", cycle[k]);
            CHECK_OK(config_set(&c, key, "%s", "10"));
        }
        snprintf(key, sizeof key, LR "params.%s", wrong[i].key);
        CHECK_OK(config_set(&c, key, "%s", wrong[i].value));
        CHECK_ERR(rate_of(&r, c, 10), wrong[i].error);
    }
}

/* ---- The table ---- */

static const char *part_name(unsigned where) {
    return where & KEYS_FIRST ? "vqgan" : "scale";
}

/* One key and its value, as a part's configuration */
static Err check_one(const char *key, const char *value, unsigned where, int training) {
    Config c = {0};
    CHECK_OK(config_set(&c, key, "%s", value));
    Err e = keys_check(&c, where, training);
    config_free(&c);
    return e;
}

/* A key with one letter too few, too many, or other */
static void misspell(char out[200], const char *key, int how) {
    const size_t n = strlen(key), at = n - 1 - (key[n - 2] != '.');
    snprintf(out, 200, "%s", key);
    if (how == 0) memmove(out + at, out + at + 1, n - at);
    if (how == 1) memmove(out + at + 1, out + at, n - at + 1);
    if (how == 2) out[at] = out[at] == 'q' ? 'x' : 'q';
}

/* Misspelt, it is an error that names it, or another key that is as near. */
static void check_misspelt(const KnownKey *k, unsigned where) {
    char wrong[200], key[200], expected[256];
    snprintf(key, sizeof key, "%s.%s", part_name(where), k->key);
    for (int how = 0; how < 3; how++) {
        misspell(wrong, key, how);
        if (recipe_key_check(wrong) == OK) continue; /* f_min and f_max */
        CHECK(recipe_key_check(wrong) == FAILED);
        snprintf(expected, sizeof expected, "did you mean %s?", key);
        const char *named = strstr(err_text(), "did you mean ");
        CHECK(named && strstr(err_text(), wrong));
        if (!named || strstr(named, expected)) continue;
        char other[200];
        snprintf(other, sizeof other, "%.*s", (int)strcspn(named + 13, "?"), named + 13);
        CHECK(word_distance(wrong, strlen(wrong), other) <= word_distance(wrong, strlen(wrong), key));
        CHECK(recipe_key_check(other) == OK);
    }
    misspell(wrong, k->key, 2);
    if (!known_key(wrong, KEYS_FIRST | KEYS_TRANSITION)) CHECK_ERR(check_one(wrong, "1", where, 0), "did you mean ");
}

static void check_key(const KnownKey *k, unsigned where) {
    char key[200], value[200];
    if (!(k->where & where)) return;
    snprintf(key, sizeof key, "%s.%s", part_name(where), k->key);
    CHECK(strlen(key) < 128 && known_key(k->key, where));
    if (k->kind == KEY_OWN) {
        CHECK_ERR(recipe_key_check(key), key);
        CHECK_OK(check_one(k->key, "1", where, 1));
        return;
    }
    CHECK_OK(recipe_key_check(key));
    if (!strchr(k->key, '*')) check_misspelt(k, where);
    if (k->kind == KEY_HARMLESS) CHECK_OK(check_one(k->key, "anything", where, 1));
    if (k->kind != KEY_ONLY) return;
    for (const char *s = k->only; *s; s += strcspn(s, "|") + (s[strcspn(s, "|")] != 0)) {
        snprintf(value, sizeof value, "%.*s", (int)strcspn(s, "|"), s);
        const int a_class = strcmp(k->key, "model.target") == 0;
        if (!a_class) CHECK_OK(check_one(k->key, value, where, 1));
    }
    CHECK_ERR(check_one(k->key, "0.123", where, 1), k->key);
    CHECK(strstr(err_text(), k->why));
    CHECK((check_one(k->key, "0.123", where, 0) == OK) == ((k->where & KEYS_TRAINING) != 0));
}

/* ---- What the keys imagebart.* say ---- */

/* Key and value of a model with three scales, as a file's metadata, and in a recipe */
static Err check_own(const char *key, const char *value, char said[ERR_MAX]) {
    char folder[FOLDER_BYTES], path[FOLDER_BYTES + 32];
    Config c = RECIPE("model.params.n_scales", "3", key, value), read = {0};
    CHECK_OK(config_place(&c, key, "m/scale1.safetensors", key));
    const Err e = keys_check(&c, KEYS_TRANSITION, 0);
    snprintf(said, ERR_MAX, "%s", e == OK ? "" : err_text());
    config_free(&c);
    CHECK(temporary_folder(folder));
    snprintf(path, sizeof path, "%s/recipe.txt", folder);
    FILE *f = fopen(path, "w");
    CHECK(f && fprintf(f, "scale.model.params.n_scales 3\nscale.%s %s\n", key, value) > 0 && fclose(f) == 0);
    CHECK_OK(recipe_read(&read, path, 1));
    CHECK((keys_check(&read, KEYS_TRANSITION, 1) == OK) == (e == OK));
    if (e != OK) CHECK(strstr(err_text(), "recipe.txt: line 2: ") && strstr(err_text(), value));
    config_free(&read);
    CHECK(unlink(path) == 0 && rmdir(folder) == 0);
    return e;
}

/* No value of a wrong kind is passed over: the error names file, key and value. */
static void test_own_values(void) {
    static const struct {
        const char *key, *good, *bad[5];
    } own[] = {
        {"store", "bf16", {"foo", "BF16", "f64", "1", "f32,"}},
        {"compact", "true", {"foo", "1", "yes", "TRUE", "false,"}},
        {"null_class", "9", {"foo", "-1", "1.5", "4294967296", "9 classes"}},
        {"h", "16", {"foo", "0", "-16", "40000", "16x16"}},
        {"w", "16", {"foo", "0", "1e1", "40000", "16,16"}},
        {"temperature", "1,0.9,0.8", {"foo", "1,0.9", "1,,1", "-1", "nan"}},
        {"guidance", "[2, 1, 1]", {"foo", "2,1,1,1", "1,", "1001", "inf"}},
        {"top_k", "100", {"foo", "1.5", "1,2", "-1", "1e10"}},
        {"chain_length", "3,2,1", {"foo", "0", "1,1", "1.5", "1001"}},
        {"inpaint_chain_length", "0,5,5", {"foo", "-1", "5,5", "0.5", "-"}},
        {"candidates", "16", {"foo", "0", "4097", "1.5", "16,16"}},
        {"best_of", "4", {"foo", "0", "65", "-4", "four"}},
        {"own_nats", "0.8,2.2", {"foo", "1", "2,1", "1,2,3", "0.8;2.2"}},
        {"familiar_nats", "[1, 3]", {"foo", "1", "3,1", "-1,1", "1,x"}},
        {"familiar_error", "0.05,0.2", {"foo", "0.1", "0.2,0.1", "nan,1", "0.1-0.2"}},
    };
    char key[64], said[ERR_MAX], expected[128];
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) {
        snprintf(key, sizeof key, "imagebart.%s", own[i].key);
        CHECK_OK(check_own(key, own[i].good, said));
        for (int k = 0; k < 5; k++) {
            snprintf(expected, sizeof expected, "m/scale1.safetensors: configuration key '%s' is '%s', expected ", key,
                     own[i].bad[k]);
            CHECK(check_own(key, own[i].bad[k], said) == FAILED && strstr(said, expected));
        }
    }
    size_t n, texts = 0; /* every key is one of these, or a text */
    const KnownKey *table = known_keys(&n);
    for (size_t i = 0; i < n; i++) {
        if (strncmp(table[i].key, "imagebart.", 10)) continue;
        size_t k = 0;
        while (k < sizeof own / sizeof *own && strcmp(own[k].key, table[i].key + 10)) k++;
        texts += k == sizeof own / sizeof *own;
    }
    CHECK(texts == 2); /* class_list, classes */
}

static void test_table(void) {
    size_t n;
    const KnownKey *table = known_keys(&n);
    for (size_t i = 0; i < n; i++) {
        check_key(&table[i], KEYS_FIRST), check_key(&table[i], KEYS_TRANSITION);
        for (size_t k = 0; k < i; k++)
            CHECK(strcmp(table[i].key, table[k].key) || !(table[i].where & table[k].where & 3));
    }
    CHECK(n > 200);
    /* options of --all come to every stage; other people's metadata is theirs, unless it is ours misspelt */
    CHECK_OK(check_one("train.label_dropout", "0.1", KEYS_FIRST, 1));
    static const char *const foreign[] = {"format", "epoch", "license", "modelspec.architecture", "ss_output_name"};
    for (size_t i = 0; i < sizeof foreign / sizeof *foreign; i++)
        for (unsigned where = KEYS_FIRST; where <= KEYS_TRANSITION; where++)
            CHECK_OK(check_one(foreign[i], "pt", where, 1));
    CHECK_ERR(check_one("modle.params.alpha", "1", KEYS_TRANSITION, 0), "did you mean model.params.alpha?");
    CHECK_ERR(check_one("model.params.alhpa", "1", KEYS_TRANSITION, 0), "did you mean model.params.alpha?");
    CHECK(recipe_key_check("vqgan.train.precision") == FAILED &&
          !strstr(err_text(), "did you mean")); /* none is near */
    static const char *const wrong[][2] = {{"vqgn.train.seed", "did you mean vqgan.train.seed?"},
                                           {"sclae.train.steps", "did you mean scale.train.steps?"},
                                           {"scale0.train.steps", "did you mean scale.train.steps?"},
                                           {"scale65.train.steps", "did you mean scale.train.steps?"},
                                           {"scale12.train.stesp", "did you mean scale12.train.steps?"},
                                           {"train.seed", "did you mean vqgan.train.seed or scale.train.seed?"},
                                           {"seed:", "did you mean vqgan.train.seed or scale.train.seed?"},
                                           {"alpha", "did you mean scale.model.params.alpha?"},
                                           {"vqgan.train.Flip", "did you mean vqgan.train.flip?"},
                                           {"vqgan.train.alpha", "unknown key"},
                                           {"vqgan", "unknown key 'vqgan'"},
                                           {"x", "unknown key 'x'"}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) CHECK_ERR(recipe_key_check(wrong[i][0]), wrong[i][1]);
    Config many = {0}; /* hostile: as many as a header may have, none of which is known */
    char key[160];
    for (int i = 0; i < 400; i++) {
        snprintf(key, sizeof key, "modle.a%.*d", i % 100 + 1, i);
        CHECK_OK(config_set(&many, key, "1"));
    }
    const double started = seconds();
    CHECK_OK(keys_check(&many, KEYS_TRANSITION, 0));
    CHECK(seconds() - started < 2);
    config_free(&many);
}

/* ---- The official files: their keys, with values as they have them. None may be unknown, or refused. ---- */

typedef struct {
    const char *part, *key, *value;
} Said;

#define SIZES(part, at)                                                                                                \
    {part, at "embed_dim", "256"}, {part, at "n_embed", "16384"}, {part, at "ddconfig.double_z", "False"},             \
        {part, at "ddconfig.z_channels", "256"}, {part, at "ddconfig.resolution", "256"},                              \
        {part, at "ddconfig.in_channels", "3"}, {part, at "ddconfig.out_ch", "3"}, {part, at "ddconfig.ch", "128"},    \
        {part, at "ddconfig.ch_mult", "[1, 1, 2, 2, 4]"}, {part, at "ddconfig.num_res_blocks", "2"},                   \
        {part, at "ddconfig.attn_resolutions", "[16]"}, {                                                              \
        part, at "ddconfig.dropout", "0.0"                                                                             \
    }

/* The 24 files of the released models, and of the joint one */
static const Said official[] = {
    {"scale", "model.base_learning_rate", "0.0625"},
    {"scale", "model.target", "imagebart.models.diffusion.DenoisingXTransformer"},
    {"last", "model.target", "imagebart.models.diffusion.DecoderOnlyDenoiser"},
    {"scale", "model.params.first_stage_key", "image"},
    {"scale", "model.params.monitor", "val/loss"},
    {"scale", "model.params.n_scales", "4"},
    {"scale2", "model.params.single_scale", "2"},
    {"last", "model.params.single_scale", "4"},
    {"scale", "model.params.top_k", "973"},
    {"scale", "model.params.alpha", "1.0"},
    {"scale", "model.params.redraw_prob", "geometric"},
    {"scale", "model.params.use_ema", "True"},
    {"scale", "model.params.conditioner_config.target", "imagebart.util.ClassProvider"},
    {"scale", "model.params.conditioner_config.params.key", "class_label"},
    {"scale", "model.params.scheduler_config.target", "imagebart.lr_scheduler.LambdaWarmUpCosineScheduler"},
    {"scale", "model.params.scheduler_config.params.verbosity_interval", "0"},
    {"scale", "model.params.scheduler_config.params.warm_up_steps", "10000"},
    {"scale", "model.params.scheduler_config.params.max_decay_steps", "10000000"},
    {"scale", "model.params.scheduler_config.params.lr_start", "2.5e-06"},
    {"scale", "model.params.scheduler_config.params.lr_max", "0.0001"},
    {"scale", "model.params.scheduler_config.params.lr_min", "1.0e-08"},
    {"scale", "model.params.transformer_config.target",
     "imagebart.modules.xtransformers.x_transformer.ResidualScaledXTransformer"},
    {"scale", "model.params.transformer_config.params.scale_pos", "0"},
    {"scale", "model.params.transformer_config.params.n_scales", "4"},
    {"scale", "model.params.transformer_config.params.xt_start", "2"},
    {"scale", "model.params.transformer_config.params.xt_size", "256"},
    {"scale", "model.params.transformer_config.params.wrap_decoder", "False"},
    {"scale", "model.params.transformer_config.params.dim", "1152"},
    {"scale", "model.params.transformer_config.params.enc_num_tokens", "1000"},
    {"scale", "model.params.transformer_config.params.enc_depth", "32"},
    {"scale", "model.params.transformer_config.params.enc_heads", "16"},
    {"scale", "model.params.transformer_config.params.enc_max_seq_len", "258"},
    {"scale", "model.params.transformer_config.params.dec_num_tokens", "973"},
    {"scale", "model.params.transformer_config.params.dec_depth", "6"},
    {"scale", "model.params.transformer_config.params.dec_heads", "16"},
    {"scale", "model.params.transformer_config.params.tie_token_emb", "False"},
    {"scale", "model.params.transformer_config.params.dec_max_seq_len", "256"},
    {"last", "model.params.transformer_config.target", "imagebart.modules.transformer.mingpt.GPT"},
    {"last", "model.params.transformer_config.params.input_vocab_size", "1000"},
    {"last", "model.params.transformer_config.params.vocab_size", "973"},
    {"last", "model.params.transformer_config.params.block_size", "258"},
    {"last", "model.params.transformer_config.params.n_layer", "36"},
    {"last", "model.params.transformer_config.params.n_head", "16"},
    {"last", "model.params.transformer_config.params.n_embd", "1216"},
    {"last", "model.params.transformer_config.params.n_unmasked", "2"},
    {"scale", "model.params.first_stage_config.target", "imagebart.models.vqgan.VQGANWrapper"},
    {"scale", "model.params.first_stage_config.params.ckpt_path", "vqgan/vqgan-imagenet.ckpt"},
    {"scale", "model.params.first_stage_config.params.remap", "data/vqgan_indices/imagenet_indices.npy"},
    {"scale", "model.params.first_stage_config.params.sane_index_shape", "True"},
    SIZES("scale", "model.params.first_stage_config.params."),
    {"scale", "model.params.first_stage_config.params.ddconfig.tanh_out", "True"},
    {"scale", "model.params.first_stage_config.params.lossconfig.target",
     "taming.modules.losses.vqperceptual.DummyLoss"},
    {"scale", "data.target", "main.DataModuleFromConfig"},
    {"scale", "data.params.batch_size", "16"},
    {"scale", "data.params.num_workers", "32"},
    {"scale", "data.params.wrap", "False"},
    {"scale", "data.params.train.target", "taming.data.imagenet.ImageNetTrain"},
    {"scale", "data.params.train.params.config.size", "256"},
    {"scale", "data.params.validation.target", "taming.data.imagenet.ImageNetValidation"},
    {"scale", "data.params.validation.params.config.size", "256"},
    {"scale", "data.params.train.params.size", "256"},
    {"scale", "data.params.validation.params.size", "256"},
    {"scale", "lightning.callbacks.image_logger.target", "main.ImageLogger"},
    {"scale", "lightning.callbacks.image_logger.params.batch_frequency", "1000"},
    {"scale", "lightning.callbacks.image_logger.params.max_images", "4"},
    {"scale", "lightning.callbacks.image_logger.params.increase_log_steps", "False"},
    {"scale", "lightning.callbacks.image_logger.params.log_images_kwargs.sample_full", "True"},
    {"scale", "lightning.callbacks.image_logger.params.log_images_kwargs.sample_half", "True"},
    {"scale", "lightning.trainer.benchmark", "True"},
    {"scale", "lightning.trainer.accumulate_grad_batches", "2"},
    {"scale", "train.steps", "10000000"},

    /* taming's faceshq_vqgan, imagenet_vqgan, custom_vqgan */
    {"vqgan", "model.base_learning_rate", "4.5e-6"},
    {"vqgan", "model.project", "8k_8f_celebA-hq"},
    {"vqgan", "model.target", "taming.models.vqgan.VQModel"},
    SIZES("vqgan", "model.params."),
    {"vqgan", "model.params.lossconfig.target", "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"},
    {"vqgan", "model.params.lossconfig.params.disc_conditional", "False"},
    {"vqgan", "model.params.lossconfig.params.disc_in_channels", "3"},
    {"vqgan", "model.params.lossconfig.params.disc_start", "250001"},
    {"vqgan", "model.params.lossconfig.params.disc_weight", "0.8"},
    {"vqgan", "model.params.lossconfig.params.codebook_weight", "1.0"},
    {"vqgan", "data.target", "main.DataModuleFromConfig"},
    {"vqgan", "data.params.batch_size", "3"},
    {"vqgan", "data.params.num_workers", "8"},
    {"vqgan", "data.params.train.target", "taming.data.faceshq.FacesHQTrain"},
    {"vqgan", "data.params.train.params.size", "256"},
    {"vqgan", "data.params.train.params.crop_size", "256"},
    {"vqgan", "data.params.train.params.config.size", "256"},
    {"vqgan", "data.params.train.params.training_images_list_file", "data/customCelebAHQ_train.txt"},
    {"vqgan", "data.params.validation.target", "taming.data.faceshq.FacesHQValidation"},
    {"vqgan", "data.params.validation.params.size", "256"},
    {"vqgan", "data.params.validation.params.crop_size", "256"},
    {"vqgan", "data.params.validation.params.config.size", "256"},
    {"vqgan", "data.params.validation.params.test_images_list_file", "data/customCelebAHQ_test.txt"},
    {"vqgan", "train.steps", "800000"},
};
enum { OFFICIAL = sizeof official / sizeof *official };

/* Keys that files have together, by a letter; without what they begin with in every file */
#define P "model.params."
#define NET P "transformer_config.params."
#define STAGE P "first_stage_config.params."
#define LOGGER "lightning.callbacks.image_logger."
#define DDCONFIG(at)                                                                                                   \
    at "ddconfig.double_z", at "ddconfig.z_channels", at "ddconfig.resolution", at "ddconfig.in_channels",             \
        at "ddconfig.out_ch", at "ddconfig.ch", at "ddconfig.ch_mult", at "ddconfig.num_res_blocks",                   \
        at "ddconfig.attn_resolutions", at "ddconfig.dropout"
static const struct {
    char letter;
    const char *key[40];
} groups[] = {
    {'T', /* every transition */
     {"model.base_learning_rate",
      "model.target",
      P "first_stage_key",
      P "monitor",
      P "n_scales",
      P "top_k",
      P "alpha",
      P "redraw_prob",
      P "use_ema",
      LR "target",
      LR "params.verbosity_interval",
      LR "params.warm_up_steps",
      LR "params.max_decay_steps",
      LR "params.lr_start",
      LR "params.lr_max",
      LR "params.lr_min",
      P "transformer_config.target",
      P "first_stage_config.target",
      STAGE "ckpt_path",
      STAGE "remap",
      STAGE "sane_index_shape",
      STAGE "embed_dim",
      STAGE "n_embed",
      DDCONFIG(STAGE),
      STAGE "lossconfig.target",
      "data.target",
      "data.params.batch_size",
      "data.params.wrap",
      "data.params.train.target",
      "data.params.validation.target"}},
    {'1', {P "single_scale"}},
    {'C', {P "conditioner_config.target", P "conditioner_config.params.key"}},
    {'X',
     {NET "wrap_decoder", NET "dim", NET "enc_num_tokens", NET "enc_depth", NET "enc_heads", NET "enc_max_seq_len",
      NET "dec_num_tokens", NET "dec_depth", NET "dec_heads", NET "tie_token_emb", NET "dec_max_seq_len"}},
    {'R', {NET "scale_pos", NET "n_scales", NET "xt_start", NET "xt_size"}},
    {'G', {NET "vocab_size", NET "block_size", NET "n_layer", NET "n_head", NET "n_embd"}},
    {'I', {NET "input_vocab_size"}},
    {'U', {NET "n_unmasked"}},
    {'t', {STAGE "ddconfig.tanh_out"}},
    {'w', {"data.params.num_workers"}},
    {'s', {"data.params.train.params.size", "data.params.validation.params.size"}},
    {'c', {"data.params.train.params.config.size", "data.params.validation.params.config.size"}},
    {'L',
     {LOGGER "target", LOGGER "params.batch_frequency", LOGGER "params.max_images", LOGGER "params.increase_log_steps",
      "lightning.trainer.benchmark"}},
    {'A', {"lightning.trainer.accumulate_grad_batches"}},
    {'J', {LOGGER "params.log_images_kwargs.sample_full", LOGGER "params.log_images_kwargs.sample_half"}},
    {'V', /* every first stage */
     {"model.base_learning_rate", "model.target", P "embed_dim", P "n_embed", DDCONFIG(P), P "lossconfig.target",
      P "lossconfig.params.disc_conditional", P "lossconfig.params.disc_in_channels", P "lossconfig.params.disc_start",
      P "lossconfig.params.disc_weight", P "lossconfig.params.codebook_weight", "data.target", "data.params.batch_size",
      "data.params.train.target", "data.params.validation.target"}},
    {'k', {"data.params.train.params.crop_size", "data.params.validation.params.crop_size"}},
    {'p',
     {"model.project", "data.params.train.params.training_images_list_file",
      "data.params.validation.params.test_images_list_file"}},
};
enum { GROUPS = sizeof groups / sizeof *groups };

/* configs/NAME.yaml of the official repository, a file for each of the scales; the last three are taming's */
static const struct {
    const char *name, *scales, *groups;
} files[] = {
    {"ffhq/2_scales/ffhq-custom-scale", "1", "T1Xws"},
    {"ffhq/2_scales/ffhq-custom-scale", "2", "T1Gs"},
    {"ffhq/4_scales/ffhq-geometric-scale", "123", "T1XRwsL"},
    {"ffhq/4_scales/ffhq-geometric-scale", "4", "T1GsL"},
    {"ffhq/ffhq_4-scales_joint-training", "", "TXRwsLJ"},
    {"imagenet/4_scales/imagenet_geometric_scale", "123", "T1CXRtcLA"},
    {"imagenet/4_scales/imagenet_geometric_scale", "4", "T1CGIUcLA"},
    {"imagenet/5_scales/imagenet-custom-scale", "1234", "T1CXcLA"},
    {"imagenet/5_scales/imagenet-custom-scale", "5", "T1CGIUcLA"},
    {"lsun-beds/lsun-beds-scale", "12", "T1XtsLA"},
    {"lsun-beds/lsun-beds-scale", "3", "T1GItsLA"},
    {"lsun-cats/lsun-cats-scale", "12", "T1XtsLA"},
    {"lsun-cats/lsun-cats-scale", "3", "T1GItsLA"},
    {"lsun-churches/lsun-churches-scale", "12", "T1XtsLA"},
    {"lsun-churches/lsun-churches-scale", "3", "T1GItsLA"},
    {"faceshq_vqgan", "", "Vwsk"},
    {"imagenet_vqgan", "", "Vwc"},
    {"custom_vqgan", "", "Vwsp"},
};

/* As the list above has it: for a decoder-only network what is said of the last scale, if anything is */
static const char *value_of(const char *key, const char *of, int used[OFFICIAL]) {
    const char *const part[] = {strchr(of, 'V') ? "vqgan" : strchr(of, 'G') ? "last" : "scale", "scale"};
    if (!strcmp(key, NET "xt_start")) return strchr(of, 'C') ? "2" : "1"; /* behind scale and class */
    if (!strcmp(key, P "single_scale")) return "1";
    if (!strcmp(key, P "transformer_config.target") && strchr(of, 'X') && !strchr(of, 'R'))
        return "imagebart.modules.xtransformers.x_transformer.XTransformer";
    for (int k = 0; k < 2; k++)
        for (size_t i = 0; i < OFFICIAL; i++)
            if (!strcmp(official[i].part, part[k]) && !strcmp(official[i].key, key)) {
                used[i] = 1;
                return official[i].value;
            }
    printf("%s is in no list\n", key);
    CHECK(!"a key of a file has a value");
    return "";
}

/* All of it is understood: the network, the data, the schedule. */
static void check_file(const Config *c, int first) {
    NetConfig net;
    VqganConfig stage;
    Rate rate;
    Prep prep;
    CHECK_OK(keys_check(c, first ? KEYS_FIRST : KEYS_TRANSITION, 1));
    CHECK_OK(rate_read(&rate, c, 1));
    CHECK_OK(prep_read(&prep, c));
    CHECK_OK(prep_size_check(c, 256));
    if (first)
        CHECK_OK(first_stage_config(&stage, c, NULL, NULL));
    else
        CHECK_OK(net_config_read(&net, c, P));
}

/* Every key of every official file is in the table and not refused with the value that stands there; every key of the list
 * above is in a file, but for ours. */
static void test_official_files(void) {
    int used[OFFICIAL] = {0};
    size_t n = 0, keys;
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        const char *of = files[i].groups;
        const int first = strchr(of, 'V') != NULL;
        Config c = {0};
        keys = 0;
        for (size_t g = 0; g < GROUPS; g++)
            for (const char *const *key = groups[g].key; strchr(of, groups[g].letter) && *key; key++, keys++) {
                const KnownKey *k = known_key(*key, first ? KEYS_FIRST : KEYS_TRANSITION);
                if (!k) printf("%s%s: %s\n", files[i].name, files[i].scales, *key);
                CHECK(k && k->kind != KEY_OWN);
                CHECK_OK(config_set(&c, *key, "%s", value_of(*key, of, used)));
            }
        CHECK(c.n == keys);
        check_file(&c, first);
        config_free(&c);
        n += max_size(strlen(files[i].scales), 1);
    }
    CHECK(n == 25 + 3);
    for (size_t i = 0; i < OFFICIAL; i++) {
        const int other = strcmp(official[i].key, "train.steps") == 0 || strstr(official[i].key, "xt_start") ||
                          !strcmp(official[i].key, P "single_scale");
        if (!used[i] && !other) printf("%s.%s: in no file\n", official[i].part, official[i].key);
        CHECK(used[i] || other);
    }
}

static void write_official(const char *path) {
    FILE *f = fopen(path, "w");
    CHECK(f);
    for (size_t i = 0; f && i < OFFICIAL; i++)
        fprintf(f, "%s.%s %s\n", official[i].part, official[i].key, official[i].value);
    CHECK(f && fclose(f) == 0);
}

static void check_recipe(const char *path, int scales) {
    NetConfig net;
    VqganConfig first;
    Rate rate;
    for (int t = RECIPE_VQGAN; t <= scales; t++) {
        Config c = {0};
        if (scales == 0 && t > RECIPE_VQGAN) break;
        CHECK_OK(recipe_read(&c, path, t));
        CHECK_OK(keys_check(&c, t == RECIPE_VQGAN ? KEYS_FIRST : KEYS_TRANSITION, 1));
        CHECK_OK(rate_read(&rate, &c, 1));
        if (t == RECIPE_VQGAN)
            CHECK_OK(first_stage_config(&first, &c, NULL, ""));
        else
            CHECK_OK(net_config_read(&net, &c, "model.params."));
        config_free(&c);
    }
}

/* The codes that the official file lists, as many */
static const char *const codes_in[] = {"data", "data/vqgan_indices", "data/vqgan_indices/imagenet_indices.npy"};

static void make_codes(const char *folder) {
    char path[3][FOLDER_BYTES + 64];
    for (int i = 0; i < 3; i++) snprintf(path[i], sizeof path[i], "%s/%s", folder, codes_in[i]);
    CHECK(mkdir(path[0], 0700) == 0 && mkdir(path[1], 0700) == 0);
    FILE *f = fopen(path[2], "wb");
    CHECK(f);
    fprintf(f, "\x93NUMPY\1%c\x76%c%-117s\n", 0, 0, "{'descr': '<i8', 'fortran_order': False, 'shape': (973,), }");
    for (int64_t i = 0; f && i < 973; i++) CHECK(fwrite(&(int64_t){16 * i}, sizeof i, 1, f) == 1);
    CHECK(f && fclose(f) == 0);
}

static void remove_codes(const char *folder) {
    char path[FOLDER_BYTES + 64];
    for (int i = 2; i >= 0; i--) {
        snprintf(path, sizeof path, "%s/%s", folder, codes_in[i]);
        CHECK(remove(path) == 0);
    }
}

static void test_official(void) {
    char folder[FOLDER_BYTES], path[FOLDER_BYTES + 32];
    static const struct {
        const char *name;
        int scales;
    } bundled[] = {{"emoji", 3}, {"emoji-sharp", 0}, {"photos", 3},   {"ffhq", 4},     {"ffhq2", 2},
                   {"cats", 3},  {"bedrooms", 3},    {"churches", 3}, {"imagenet", 5}, {"imagenet4", 4}};
    CHECK(temporary_folder(folder));
    make_codes(folder);
    snprintf(path, sizeof path, "%s/recipe.txt", folder);
    write_official(path);
    check_recipe(path, 4);
    remove_codes(folder);
    for (size_t i = 0; i < sizeof bundled / sizeof *bundled; i++) {
        snprintf(path, sizeof path, "models/%s.txt", bundled[i].name);
        check_recipe(path, bundled[i].scales);
    }
    check_recipe("test/tiny.txt", 3);
    snprintf(path, sizeof path, "%s/recipe.txt", folder);
    CHECK(unlink(path) == 0 && rmdir(folder) == 0);
}

/* ---- What programs ask for must be in the table: "train.", "key" and the like in their sources ---- */

static void check_source(const char *path) {
    static const char *const sections[] = {"\"train.", "\"imagebart."};
    char *text, key[128];
    if (file_text(&text, path, 1 << 20) != OK) {
        CHECK(!"a source can be read");
        return;
    }
    for (int i = 0; i < 2; i++)
        for (const char *s = text; (s = strstr(s, sections[i])) != NULL; s++) {
            const char *section = s + 1, *name = section + strlen(sections[i]) - 1;
            if (!strncmp(name, "\", \"", 4)) name += 4;
            const size_t n = strspn(name, "abcdefghijklmnopqrstuvwxyz_0123456789");
            if (n == 0 || name[n] != '"') continue;
            snprintf(key, sizeof key, "%.*s%.*s", (int)strlen(sections[i]) - 1, section, (int)n, name);
            const int found = known_key(key, KEYS_FIRST) || known_key(key, KEYS_TRANSITION);
            if (!found &&
                !is_one_of_values(key, "imagebart.class|imagebart.c|train.tokens|train.target")) { /* other names */
                printf("%s: %s is not in the table of files/keys.c\n", path, key);
                CHECK(found);
            }
        }
    free(text);
}

static void test_sources(void) {
    static const char *const folders[] = {"training", "sampling", "files"};
    char path[512];
    size_t n = 0;
    for (int i = 0; i < 3; i++) {
        DIR *d = opendir(folders[i]);
        CHECK(d);
        for (struct dirent *e; d && (e = readdir(d));) {
            const size_t length = strlen(e->d_name);
            if (length < 3 || strcmp(e->d_name + length - 2, ".c") || !strcmp(e->d_name, "keys.c")) continue;
            snprintf(path, sizeof path, "%s/%s", folders[i], e->d_name);
            check_source(path), n++;
        }
        if (d) closedir(d);
    }
    check_source("train.c"), check_source("sample.c"), check_source("inpaint.c");
    CHECK(n > 30);
}

/* Which steps stand out: among usual losses, among those of a network that knows its pictures by heart */
static void test_spike(void) {
    real usual[RECENT], known[RECENT], few[RECENT];
    for (int i = 0; i < RECENT; i++) {
        usual[i] = (real)(2 + 0.25 * ((i % 3) - 1));
        known[i] = (real)(0.001 * (1 + i % 3));
        few[i] = i < RECENT / 2 - 1 ? usual[i] : (real)NAN;
    }
    CHECK(is_spike(usual, 10, 0.1, 0.01, 6) && !is_spike(usual, 10, 0.1, 0.01, 5));
    CHECK(!is_spike(usual, 0, 0.1, 0.01, 100) && !is_spike(few, 10, 0.1, 0.01, 100));
    CHECK(!is_spike(known, 10, 0.1, 0.01, 0.03) && is_spike(known, 10, 0.1, 0, 0.03));
    CHECK(is_spike(known, 10, 0.1, 0.01, 0.12));
    usual[3] = usual[9] = 1000; /* outliers move nothing */
    CHECK(is_spike(usual, 10, 0.1, 0.01, 6));
}

int main(void) {
    test_table();
    test_own_values();
    test_official();
    test_official_files();
    test_sources();
    test_spike();
    test_constant();
    test_cycles();
    test_rate_refusals();
    return test_report();
}
