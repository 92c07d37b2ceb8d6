/* recipe.c - named models, and recipes: the official configuration's keys, part by part.
 *
 * A recipe is a text file, models/NAME.txt, of lines "part.key value". Parts: vqgan, the first stage; scale, what the
 * encoder-decoder scales and the joint model share; last, scale T, which is another network; joint; scaleN, what scale
 * N alone has, which wins. recipe_read gives the keys of one network under their official names. */
#include "files/files.h"

#include <stdio.h>
#include <string.h>

static const NamedModel named[] = {
    {"emoji", "models/emoji", NULL, NULL, "geometric", "bundled: emoji in nine classes, 64x64, 3 scales", 3,
     "1024 / 1024", NULL},
    {"ffhq", "models/ffhq_4_scales_geometric", "vqgan/vqgan-ffhq.ckpt", "ffhq_4_scales_geometric.zip", "geometric",
     "faces, 256x256, 4 scales, residual-scaled", 4, "548 / 1024", "smileys"},
    {"ffhq2", "models/ffhq_2_scales_custom", "vqgan/vqgan-ffhq.ckpt", "ffhq_2_scales_custom.zip", "ffhq_bernoulli_PSIM",
     "faces, 256x256, 2 scales", 2, "548 / 1024", "smileys"},
    {"churches", "models/churches_3_scales", "vqgan/vqgan-churches.ckpt", "churches_3_scales.zip", "bernoulli_PSIM",
     "LSUN churches, 256x256, 3 scales", 3, "1022 / 16384", "travel"},
    {"bedrooms", "models/bedrooms_3_scales", "vqgan/vqgan-bedrooms.ckpt", "bedrooms_3_scales.zip", "bernoulli_PSIM",
     "LSUN bedrooms, 256x256, 3 scales", 3, "1017 / 16384", "objects"},
    {"cats", "models/cats_3_scales", "vqgan/vqgan-cats.ckpt", "cats_3_scales.zip", "bernoulli_PSIM",
     "LSUN cats, 256x256, 3 scales", 3, "1014 / 16384", "animals"},
    {"imagenet", "models/cin_5_scales_custom", "vqgan/vqgan-imagenet.ckpt", "cin_5_scales_custom.zip", "bernoulli_PSIM",
     "ImageNet by class, 256x256, 5 scales", 5, "973 / 16384", NULL},
    {"imagenet4", "models/cin_4_scales_geometric", "vqgan/vqgan-imagenet.ckpt", "cin_4_scales_geometric.zip",
     "geometric", "ImageNet by class, 256x256, 4 scales, residual-scaled", 4, "973 / 16384", NULL},
};

const NamedModel *named_models(size_t *n) {
    *n = sizeof named / sizeof *named;
    return named;
}

const NamedModel *find_named(const char *name) {
    for (size_t i = 0; i < sizeof named / sizeof *named; i++)
        if (strcmp(named[i].name, name) == 0) return &named[i];
    return NULL;
}

const char *model_folder(char path[PATH_BYTES], const char *name_or_folder) {
    const NamedModel *n = find_named(name_or_folder);
    if (!n)
        snprintf(path, PATH_BYTES, "%s", name_or_folder);
    else
        models_find(path, n->folder);
    return path;
}

static int is_of_network(const char *key) {
    return strstr(key, ".transformer_config.") || !strcmp(key, "model.target");
}

/* The official trainer's callbacks, of which there may be any number */
static int is_of_nobody(const char *key) {
    const KnownKey *k = known_key(key, KEYS_FIRST | KEYS_TRANSITION);
    return k && strchr(k->key, '*');
}

/* All keys of a part that somebody reads; of_any: but for those of one network alone */
static Err take_part(Config *to, const Config *recipe, const char *part, int of_any) {
    size_t n = strlen(part);
    for (size_t i = 0; i < recipe->n; i++) {
        const char *key = recipe->kv[i].key;
        if (strncmp(key, part, n) != 0 || key[n] != '.' || (of_any && is_of_network(key + n + 1))) continue;
        if (is_of_nobody(key + n + 1)) continue;
        TRY(config_copy(to, key + n + 1, &recipe->kv[i]));
    }
    return OK;
}

static Err take_scale(Config *to, const Config *recipe, int scale) {
    size_t T = 0;
    char name[32];
    TRY(config_size(&T, recipe, "scale.model.params.", "n_scales", 1, MAX_SCALES, 0));
    if (scale > (int)T) return err("scale %d: this model has scales 1 to %zu", scale, T);
    const int last = scale == (int)T; /* another network: only the settings are shared */
    snprintf(name, sizeof name, "scale%d", scale);
    TRY(take_part(to, recipe, "scale", last));
    if (last) TRY(take_part(to, recipe, "last", 0));
    return take_part(to, recipe, scale ? name : "joint", 0);
}

/* What the transitions' parts say of the first stage's sizes and of its codes, as the official files do */
static Err take_first_stage(Config *to, const Config *recipe) {
    TRY(take_part(to, recipe, "vqgan", 0));
    for (size_t i = 0; i < recipe->n; i++) {
        const char *part = recipe->kv[i].key, *value = recipe->kv[i].value, *dot = strchr(part, '.');
        const char *key = dot ? first_stage_key(dot + 1) : NULL;
        char name[128];
        if (!key || (strncmp(key, "ddconfig.", 9) && strcmp(key, "embed_dim") && strcmp(key, "n_embed") &&
                     strcmp(key, "remap")))
            continue;
        if (!strcmp(key, "ddconfig.dropout")) continue; /* it is not trained there */
        snprintf(name, sizeof name, "model.params.%s", key);
        const char *said = config_get(to, "", name);
        if (said && !same_config_value(said, value)) {
            err("%s is %s, but the first stage's %s is %s", part, value, name, said);
            return config_blame(recipe, "", part);
        }
        if (!said) TRY(config_copy(to, name, &recipe->kv[i]));
    }
    return OK;
}

/* Parts of scales that the model does not have would be read by nobody. */
static Err check_scales(const Config *recipe) {
    size_t T, t;
    if (!config_get(recipe, "scale.model.params.", "n_scales")) return OK;
    TRY(config_size(&T, recipe, "scale.model.params.", "n_scales", 1, MAX_SCALES, 0));
    for (size_t i = 0; i < recipe->n; i++) {
        const char *key = recipe->kv[i].key, *s = key + strlen("scale");
        if (strncmp(key, "scale", strlen("scale")) == 0 && text_digits(&t, &s) && t > T)
            return err("%s: this model has scales 1 to %zu", key, T);
    }
    return OK;
}

Err recipe_read(Config *to, const char *path, int scale) {
    Config recipe = {0};
    Err e = config_read_checked(&recipe, path, recipe_key_check);
    if (e == OK && check_scales(&recipe) != OK) e = err_in(path);
    if (e == OK && (scale == RECIPE_VQGAN ? take_first_stage(to, &recipe) : take_scale(to, &recipe, scale)) != OK)
        e = err_in(path);
    if (e == OK && classes_from_recipe(to, path) != OK) e = err_in(path);
    config_free(&recipe);
    return e;
}
