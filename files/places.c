/* places.c - where models/ is, with its folders of weights, recipes and lists of classes.
 *
 * Three places are looked at, one name at a time, so that a folder models/ of somebody else's hides nothing:
 * $IMAGEBART_MODELS, which the user chose; models/ in the present folder; models/ beside the program, wherever it was
 * called from and by whatever symbolic link. The models of an installed program, PREFIX/libexec/imagebart/NAME, are in
 * PREFIX/share/imagebart, as are those of the library in PREFIX/lib. */
#include "files/places.h"
#include "base/own_path.h"
#include "files/files.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* $IMAGEBART_MODELS, or NULL */
static const char *chosen_place(void) {
    const char *place = getenv("IMAGEBART_MODELS");
    return place && *place ? place : NULL;
}

/* The folder of the program that is running, or of the library; 0: the system does not say. */
static int program_folder(char out[PATH_BYTES]) {
    char *slash = own_path(out) ? strrchr(out, '/') : NULL;
    if (slash) slash[slash == out] = 0;
    return slash != NULL;
}

int program_beside(char path[PATH_BYTES], const char *name) {
    char folder[PATH_BYTES];
    return program_folder(folder) && path_make(path, "%s/%s", folder, name) == OK;
}

/* folder = models/ beside the program, or what stands for it where that is installed; *installed: it is. 0: unknown. */
static int own_models(char folder[PATH_BYTES], int *installed) {
#ifdef LIBRARY
    static const char installed_in[] = "/lib";
#else
    static const char installed_in[] = "/libexec/imagebart";
#endif
    char own[PATH_BYTES];
    if (!program_folder(own)) return 0;
    const size_t n = strlen(own), tail = strlen(installed_in);
    *installed = n >= tail && !strcmp(own + n - tail, installed_in);
    if (*installed) own[n - tail] = 0;
    return path_make(folder, *installed ? "%s/share/imagebart" : "%s/models", own) == OK;
}

/* The i-th place of all, whether it is there or not; 0: there are no more. */
static int place(char folder[PATH_BYTES], int i) {
    int installed;
    const char *chosen = chosen_place();
    if (chosen && i-- == 0) return path_make(folder, "%s", chosen) == OK;
    if (i-- == 0) return path_make(folder, "models") == OK;
    return i == 0 && own_models(folder, &installed);
}

int is_folder(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

/* Whether place i is one of those before it under another name. */
static int seen_before(const char *folder, int i) {
    char other[PATH_BYTES];
    struct stat a, b;
    for (int k = 0; k < i && stat(folder, &a) == 0; k++)
        if (place(other, k) && stat(other, &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino) return 1;
    return 0;
}

Err models_check(void) {
    const char *chosen = chosen_place();
    if (!chosen || is_folder(chosen)) return OK;
    return err("IMAGEBART_MODELS=%s: no such folder; one like models/ expected", chosen);
}

int models_find(char path[PATH_BYTES], const char *usual) {
    char folder[PATH_BYTES];
    struct stat st;
    for (int i = 0; place(folder, i); i++)
        if (path_make(path, "%s%s", folder, usual + strlen("models")) == OK && stat(path, &st) == 0) return 1;
    if (path_make(path, "%s", usual) != OK) *path = 0;
    return 0;
}

int models_place(char folder[PATH_BYTES], int i) {
    for (int k = 0; place(folder, k); k++)
        if (is_folder(folder) && !seen_before(folder, k) && i-- == 0) return 1;
    return 0;
}

const char *models_places(char text[PLACES_BYTES]) {
    char folder[PATH_BYTES];
    size_t at = 0;
    *text = 0;
    for (int i = 0; place(folder, i) && at < PLACES_BYTES; i++)
        if (!seen_before(folder, i))
            at += (size_t)snprintf(text + at, PLACES_BYTES - at, "%s%s", at ? ", " : "",
                                   strcmp(folder, "models") ? folder : "models/ here");
    return text;
}

const char *models_fetch(char text[FETCH_BYTES], const char *name) {
    char folder[PATH_BYTES], script[PATH_BYTES];
    struct stat st;
    int installed;
    snprintf(text, FETCH_BYTES, "make %s", name);
    if (stat("models/fetch.sh", &st) == 0 || !own_models(folder, &installed)) return text;
    if (path_make(script, "%s/fetch.sh", folder) != OK || stat(script, &st) != 0) return text;
    const char *quote = strchr(folder, ' ') ? "'" : "";
    if (installed) { /* into the folder of the script */
        snprintf(text, FETCH_BYTES, "sh %s%s%s %s", quote, script, quote, name);
        return text;
    }
    folder[strlen(folder) - strlen("/models")] = 0;
    snprintf(text, FETCH_BYTES, "make -C %s%s%s %s", quote, folder, quote, name);
    return text;
}
