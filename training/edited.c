/* edited.c - what a recipe says to a run that goes on.
 *
 * A run goes on with the settings that its state has: otherwise it were another run. A recipe that was edited in between
 * is not obeyed, but what it would have changed is said, a line a key. What changes only which steps are taken, or only
 * what ./sample is recommended, is taken over, which is said too. A stage that is finished keeps its files as they are. */
#include "training/stage.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Are steps left to take, as the state, the recipe and the options say before they are settled? */
int goes_on(const Stage *s) {
    const Settings *o = &s->set;
    size_t step = 0, steps = 0, best = 0, early = 0;
    if (o->eval || config_size(&step, &s->recipe, "train.", "step", 0, SIZE_MAX / 2, 1) != OK ||
        config_size(&best, &s->recipe, "train.", "best_step", 0, SIZE_MAX / 2, 1) != OK ||
        config_size(&steps, &s->recipe, "train.", "steps", 0, SIZE_MAX / 2, 1) != OK ||
        config_size(&early, &s->recipe, "train.", "early_stop", 0, SIZE_MAX / 2, 1) != OK)
        return !o->eval; /* what is wrong is said where it is read */
    if (o->steps != NOT_GIVEN) steps = o->steps;
    if (o->early_stop != NOT_GIVEN) early = o->early_stop;
    return step < steps && !(early && best && best <= step && (step - best) / o->eval_every >= early);
}

static int begins(const char *key, const char *with) {
    return !strncmp(key, with, strlen(with));
}

static int ends(const char *key, const char *with) {
    const size_t n = strlen(key), m = strlen(with);
    return n >= m && !strcmp(key + n - m, with);
}

static int is_one_of(const char *key, const char *const *list) {
    for (; *list; list++)
        if (!strcmp(key, *list)) return 1;
    return 0;
}

/* Bits of a run that was not edited do not depend on these. */
static int is_taken_over(const char *key) {
    static const char *const keys[] = {"train.spike",
                                       "train.early_stop",
                                       "imagebart.temperature",
                                       "imagebart.top_k",
                                       "imagebart.guidance",
                                       "imagebart.chain_length",
                                       "imagebart.candidates",
                                       "imagebart.inpaint_chain_length",
                                       "imagebart.best_of",
                                       "imagebart.own_nats",
                                       "imagebart.familiar_nats",
                                       "imagebart.familiar_error",
                                       NULL};
    return is_one_of(key, keys);
}

/* Has the run's first stage fewer codes than its codebook, to which fit_to_codes fits a recipe's network? */
static int is_remapped(const Stage *s) {
    char path[PATH_BYTES];
    Checkpoint ck;
    memset(&ck, 0, sizeof ck);
    if (path_make(path, "%s/vqgan.safetensors", s->set.run) != OK || !file_exists(path)) return 0;
    if (checkpoint_open(&ck, path) != OK) return 0;
    const int remapped = config_get(&ck.meta, "model.params.", "re_embed") != NULL;
    checkpoint_close(&ck);
    return remapped;
}

/* --steps fits warm-up and decay to the run, so that they differ where the steps do. */
static int is_fitted(const Stage *s, const Config *recipe, const char *key) {
    static const char lr[] = "model.params.scheduler_config.params.";
    if (!begins(key, lr)) return 0;
    key += strlen(lr);
    if (strcmp(key, "max_decay_steps") && strcmp(key, "warm_up_steps")) return 0;
    const char *run = config_get(&s->recipe, "train.", "steps"), *there = config_get(recipe, "train.", "steps");
    return !run || !there || !same_config_value(run, there);
}

/* Does the run have another value of this key for a reason of its own, not because the recipe was edited? */
static int has_reason(const Stage *s, const Config *recipe, const char *key, const char *run) {
    if (!strcmp(key, "model.base_learning_rate") && run && !strcmp(run, "none")) return 1; /* --lr */
    if (!strcmp(key, "data.params.batch_size") && ranks() > 1) return 1; /* of a process there, of all here */
    if (begins(key, "imagebart.class") || begins(key, "imagebart.null_class")) return 1; /* the folders' */
    if (ends(key, "_num_tokens") || ends(key, "vocab_size")) return is_remapped(s);
    return is_fitted(s, recipe, key);
}

static Err compare(Stage *s, const Config *recipe, const Config *given, const char *key, const KeyValue *row) {
    const char *run = config_get(&s->recipe, "", key), *there = row ? row->value : NULL;
    if (config_get(given, "", key) || (run && there && same_config_value(run, there))) return OK;
    if (there && is_taken_over(key) && !goes_on(s)) {
        say_once("%s: recipe: %s is %s there, %s in the run, which is finished and keeps it\n", s->name, key, there,
                 run ? run : "not said");
        return OK;
    }
    if (there && is_taken_over(key)) {
        say_once("%s: recipe: %s is %s there, %s in the run, which takes it over\n", s->name, key, there,
                 run ? run : "not said");
        return config_copy(&s->recipe, key, row);
    }
    if (!has_reason(s, recipe, key, run))
        say_once("%s: recipe: %s is %s there, %s in the run, which stays\n", s->name, key, there ? there : "not said",
                 run ? run : "not said");
    return OK;
}

Err compare_recipe(Stage *s, const Config *recipe, const Config *given) {
    for (size_t i = 0; i < recipe->n; i++) TRY(compare(s, recipe, given, recipe->kv[i].key, &recipe->kv[i]));
    return OK;
}

Err compare_removed(Stage *s, const Config *recipe, const Config *given, const char *key) {
    const char *run = config_get(&s->recipe, "", key);
    if (config_get(recipe, "", key) || !run || is_taken_over(key)) return OK;
    if (!strcmp(key, "train.l2_weight") && !strcmp(run, "0")) return OK; /* as an official loss has it */
    return compare(s, recipe, given, key, NULL);
}
