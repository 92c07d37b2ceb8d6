/* prep.c - which preprocessing a configuration asks for: by data.prep, our word, or by the official data sets' classes. */
#include "files/files.h"

#include <stdio.h>
#include <string.h>

static const char *const names[] = {"folder", "ffhq", "imagenet", "lsun"}; /* by Prep */

const char *prep_name(Prep prep) {
    return names[prep];
}

/* taming's faces and its custom lists are all prepared alike. */
static const char *const official[] = {
    [PREP_FOLDER] = "",
    [PREP_FFHQ] = "taming.data.faceshq.FFHQTrain|taming.data.faceshq.FFHQValidation|"
                  "taming.data.faceshq.CelebAHQTrain|taming.data.faceshq.CelebAHQValidation|"
                  "taming.data.faceshq.FacesHQTrain|taming.data.faceshq.FacesHQValidation|"
                  "taming.data.custom.CustomTrain|taming.data.custom.CustomTest",
    [PREP_IMAGENET] = "taming.data.imagenet.ImageNetTrain|taming.data.imagenet.ImageNetValidation",
    [PREP_LSUN] = "imagebart.data.lsun.LSUNChurchesTrain|imagebart.data.lsun.LSUNChurchesValidation|"
                  "imagebart.data.lsun.LSUNBedroomsTrain|imagebart.data.lsun.LSUNBedroomsValidation|"
                  "imagebart.data.lsun.LSUNCatsTrain|imagebart.data.lsun.LSUNCatsValidation",
};

/* What the official class named there does; *said is what was said before, and by what. */
static Err read_target(Prep *prep, const char **said, const Config *c, const char *key) {
    const char *target = config_get(c, "data.params.", key);
    int k = PREP_LSUN;
    if (!target || is_one_of_values(target, "null")) return OK;
    while (k > PREP_FOLDER && !is_one_of_values(target, official[k])) k--;
    if (k == PREP_FOLDER)
        return config_err(c, "data.params.", key,
                          "data.params.%s %.200s: no data set that is known; expected one of taming.data.faceshq, "
                          "taming.data.imagenet, taming.data.custom or imagebart.data.lsun, or data.prep in its place",
                          key, target);
    if (*said && *prep != (Prep)k)
        return config_err(c, "data.params.", key, "data.params.%s %s prepares pictures as %s, but %s says %s", key,
                          target, names[k], *said, names[*prep]);
    *prep = (Prep)k, *said = key;
    return OK;
}

Err prep_read(Prep *out, const Config *c) {
    const char *name = config_get(c, "data.", "prep"), *said = name ? "data.prep" : NULL;
    *out = PREP_FOLDER;
    int k = 0;
    while (name && k < 4 && strcmp(name, names[k])) k++;
    if (k == 4)
        return config_err(c, "data.", "prep", "data.prep %.200s: expected folder, ffhq, imagenet or lsun", name);
    *out = (Prep)k;
    TRY(read_target(out, &said, c, "train.target"));
    return read_target(out, &said, c, "validation.target");
}

Err prep_size_check(const Config *c, size_t size) {
    static const char *const sides[] = {"train", "validation"}, *const keys[] = {"size", "crop_size", "config.size"};
    char key[64];
    for (int i = 0; i < 6; i++) {
        snprintf(key, sizeof key, "%s.params.%s", sides[i / 3], keys[i % 3]);
        const char *value = config_get(c, "data.params.", key);
        if (!value || is_one_of_values(value, "null")) continue;
        size_t said = 0;
        TRY(config_size(&said, c, "data.params.", key, 1, IMAGE_MAX_SIDE, 0));
        if (said != size)
            return config_err(c, "data.params.", key,
                              "data.params.%s is %zu, the first stage's resolution %zu: expected the same", key, said,
                              size);
    }
    return OK;
}
