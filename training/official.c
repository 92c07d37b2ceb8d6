/* official.c - what a recipe says in the official configuration's words and settings.c's table has in its own: soft_only,
 * use_ema, single_scale, ckpt_path, the flip of LSUN's pictures. */
#include "training/stage.h"

#include <stdio.h>
#include <string.h>

static const char PARAMS[] = "model.params.";

/* The official soft_only is alpha = 1, whatever alpha says. --alpha is the user's word, after the recipe's. */
static Err take_soft_only(Stage *s) {
    int soft_only = 0;
    TRY(config_flag(&soft_only, &s->recipe, PARAMS, "soft_only", 1));
    if (soft_only) s->set.alpha = 1;
    return OK;
}

/* Without a moving average: one that is the weights themselves */
static Err take_use_ema(Stage *s) {
    int use_ema = 1;
    TRY(config_flag(&use_ema, &s->recipe, PARAMS, "use_ema", 1));
    if (use_ema) return OK;
    if (config_get(&s->recipe, "train.", "ema_decay"))
        return config_err(&s->recipe, "train.", "ema_decay",
                          "train.ema_decay beside model.params.use_ema false: one says that there is a moving average, "
                          "one that there is none");
    s->without_ema = 1, s->set.ema_decay = 0;
    return OK;
}

static Err check_scale(const Stage *s) {
    size_t single = 0;
    TRY(config_size(&single, &s->recipe, PARAMS, "single_scale", 1, MAX_SCALES, 1));
    if (!single || single == s->set.scale) return OK;
    return config_err(&s->recipe, PARAMS, "single_scale", "model.params.single_scale is %zu, but %s is to be trained",
                      single, s->name);
}

/* The official weights to begin with are --init's: beside the recipe, or from here. */
static Err take_ckpt_path(Stage *s, const char *recipe) {
    const char *said = config_get(&s->recipe, PARAMS, "ckpt_path"), *slash = strrchr(recipe, '/');
    if (!said || is_one_of_values(said, "null") || s->set.init || state_exists(s)) return OK;
    const int folder = *said == '/' || !slash ? 0 : (int)(slash - recipe) + 1;
    if (path_make(s->init, "%.*s%s", folder, recipe, said) != OK ||
        (!file_exists(s->init) && path_make(s->init, "%s", said) != OK))
        return config_blame(&s->recipe, PARAMS, "ckpt_path");
    if (!file_exists(s->init))
        return config_err(
            &s->recipe, PARAMS, "ckpt_path",
            "model.params.ckpt_path %s: no such file beside %s or here; --init PATH names the weights to begin "
            "with, or leave the key out",
            said, recipe);
    s->set.init = s->init;
    return OK;
}

/* The official LSUN classes for training mirror half of the pictures. */
static void take_flip(Stage *s) {
    const char *target = config_get(&s->recipe, "data.params.", "train.target");
    if (target && strstr(target, ".LSUN") && !config_get(&s->recipe, "train.", "flip")) s->set.flip = 1;
}

Err official_settings(Stage *s, const char *recipe) {
    take_flip(s);
    if (recipe) TRY(take_ckpt_path(s, recipe));
    if (s->set.vqgan) return OK;
    TRY(take_soft_only(s));
    TRY(take_use_ema(s));
    return check_scale(s);
}
