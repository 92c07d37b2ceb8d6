/* settings.c - ./sample --settings PICTURE.png: what the text in a picture says of how it was drawn becomes options, put
 * in front of the user's own, which so come later and win. */
#include "sampling/sampling.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The picture that argv gives, or NULL */
static const char *settings_given(int argc, char **argv) {
    static const char option[] = "--settings";
    const char *path = NULL;
    for (int i = 1; i < argc; i++) {
        const size_t n = strlen(option);
        if (strncmp(argv[i], option, n) != 0) continue;
        if (argv[i][n] == '=') path = argv[i] + n + 1;
        if (!argv[i][n] && i + 1 < argc) path = argv[i + 1];
    }
    return path && *path ? path : NULL;
}

/* What every picture of ./sample says; one that lacks some was changed on its way. */
static Err settings_whole(const Config *text) {
    static const char *const needed[] = {"model", "seed", "temperature", "top-k", "chain-length"};
    const char *edited = config_get(text, "", "inpainted"), *software = config_get(text, "", "Software");
    char lacks[128] = "";
    size_t found = 0, at = 0;
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++) {
        if (config_get(text, "", needed[i])) {
            found++;
            continue;
        }
        at += (size_t)snprintf(lacks + at, sizeof lacks - at, "%s%s", at ? ", " : "", needed[i]);
    }
    if (edited) return err("./inpaint drew it from %s; --settings draws again what ./sample drew", edited);
    if (found == 0)
        return err("nothing in it says how it was drawn%s%s; expected a PNG as ./sample or ./serve wrote it: other "
                   "programs drop its text",
                   software ? ", Software " : "", software ? software : "");
    if (at) return err("its text lacks %s; expected all of what ./sample writes", lacks);
    if (config_get(text, "", "frames"))
        return err("it shows the steps of drawing (--chain, --animate); expected the file of -o");
    return OK;
}

/* The options of a text; those that are written only where they matter have their usual value else, whatever the model
 * recommends. */
static void settings_words(PictureSettings *s) {
    static const struct {
        const char *key, *option, *otherwise; /* NULL: left out */
    } values[] = {{"seed", "--seed", NULL},
                  {"class", "--class", NULL},
                  {"temperature", "--temperature", NULL},
                  {"top-k", "--top-k", NULL},
                  {"chain-length", "--chain-length", NULL},
                  {"guidance", "--guidance", "1"},
                  {"weights", "--weights", "f32"},
                  {"best-of", "--best-of", "1"},
                  {"count", "-n", "1"},
                  {"enlarge", "--enlarge", "1"},
                  {"first", "--first", NULL},
                  {"picture", "--first", NULL}},
      flags[] = {{"official-temperature", "--official-temperature", NULL}, {"no-ema", "--no-ema", NULL}};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        const char *value = config_get(&s->text, "", values[i].key);
        if (!value) value = values[i].otherwise;
        if (!value) continue;
        s->word[s->words++] = values[i].option;
        s->word[s->words++] = value;
    }
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++)
        if (config_get(&s->text, "", flags[i].key)) s->word[s->words++] = flags[i].option;
}

Err picture_settings_open(PictureSettings *s, int *argc, char ***argv) {
    uint8_t *bytes = NULL;
    size_t size;
    memset(s, 0, sizeof *s);
    s->path = settings_given(*argc, *argv);
    if (!s->path) return OK;
    TRY(file_bytes(&bytes, &size, s->path, IMAGE_FILE_BYTES, NULL));
    Err e = png_read_texts(&s->text, bytes, size);
    free(bytes);
    if (e == OK) e = settings_whole(&s->text);
    if (e != OK) return err_in(s->path);
    settings_words(s);
    s->one_of_several = config_get(&s->text, "", "picture") != NULL;
    TRY(mem_alloc(&s->argv, (size_t)*argc + s->words + 1, sizeof *s->argv, "options"));
    s->argv[0] = (*argv)[0];
    for (size_t i = 0; i < s->words; i++) s->argv[1 + i] = (char *)(uintptr_t)s->word[i];
    for (int i = 1; i <= *argc; i++) s->argv[s->words + (size_t)i] = (*argv)[i]; /* the null pointer, too */
    *argc += (int)s->words;
    *argv = s->argv;
    return OK;
}

Err picture_settings_model(const PictureSettings *s, const char **model) {
    const char *name = config_get(&s->text, "", "model");
    const NamedModel *named = find_named(name);
    char folder[PATH_BYTES], fetch[FETCH_BYTES];
    *model = name;
    if (named && (models_find(folder, named->folder) || !named->zip)) return OK;
    if (named)
        return err("%s: it was drawn with %s, whose weights are not here; \"%s\" fetches them", s->path, name,
                   models_fetch(fetch, named->name));
    if (is_folder(name)) return OK;
    return err("%s: it was drawn with a model \"%s\", and no folder of that name is here; its folder expected: "
               "./sample FOLDER --settings %s",
               s->path, name, s->path);
}

void picture_settings_close(PictureSettings *s) {
    config_free(&s->text);
    free(s->argv);
    memset(s, 0, sizeof *s);
}
