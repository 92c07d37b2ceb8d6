/* classes.c - what a model's classes are called, and which of them the user means.
 *
 * A class is a line of text: a plain name ("food"), or a WordNet synset and all of its names, commas between, as
 * models/imagenet-classes.txt has them ("n01440764 tench, Tinca tinca"). A recipe names such a file with the key
 * imagebart.class_list; from then on the file's text travels with the model as imagebart.classes, so that a converted
 * or trained model needs no second file. The label of a class is its place in the list (SPEC section 10).
 *
 * A model trained on folders has their names as they are, a line each behind the line FOLDERS; older ones have them
 * between commas, in one line.
 *
 * A class is found by its number, its synset, any of its names, or a part of one that no other class has. What looks
 * the same but for case is the same (letters.c). Words are not names: ImageNet has two cranes, a bird and a machine. What
 * fits several classes is an error that lists them with their numbers.
 *
 * Read: the list; one class's names; finding a class. */
#include "files/files.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- The list ---------------------------------------------------------------------------------------------- */

enum { LIST_BYTES = 1 << 24 };

/* The first line of a list of folders. What follows is neither comment nor cut at commas. */
static const char FOLDERS[] = "# folders, one a line\n";
typedef enum { COMMAS, LINES, VERBATIM } ListKind;

Err classes_from_recipe(Config *to, const char *recipe) {
    char path[PATH_BYTES], *text;
    const char *file = config_get(to, "imagebart.", "class_list"), *slash = strrchr(recipe, '/');
    if (!file) return OK;
    int folder = *file == '/' || !slash ? 0 : (int)(slash - recipe) + 1;
    if (path_make(path, "%.*s%s", folder, recipe, file) != OK || file_text(&text, path, LIST_BYTES) != OK) {
        err_in("imagebart.class_list");
        return config_blame(to, "imagebart.", "class_list");
    }
    Err e = config_set(to, "imagebart.classes", "%s", text);
    free(text);
    return e;
}

/* The next class of a list, *length bytes; *list moves on. NULL: no more. Lines (those after # are comments), lines as
 * they are or, in a list without line ends, what stands between commas. */
static const char *next_class(const char **list, size_t *length, ListKind kind) {
    const char *start = *list;
    while (kind == LINES && (*start == '#' || *start == '\n')) {
        start += *start == '#' ? strcspn(start, "\n") : 0;
        start += *start == '\n';
    }
    if (*start == 0) return NULL;
    *length = strcspn(start, kind == COMMAS ? "," : "\n");
    *list = start + *length + (start[*length] != 0);
    while (kind == LINES && *length && isspace((unsigned char)start[*length - 1])) --*length;
    return start;
}

static Err add_class(Classes *c, const char *text, size_t length) {
    TRY(mem_alloc(&c->name[c->n], length + 1, 1, "a class name"));
    memcpy(c->name[c->n++], text, length);
    return OK;
}

Err classes_open(Classes *c, const char *list, size_t most) {
    *c = (Classes){0};
    TRY(mem_alloc(&c->name, most, sizeof *c->name, "class names"));
    if (!list || !*list) {
        char number[24];
        for (size_t i = 0; i < most; i++) {
            snprintf(number, sizeof number, "%zu", i);
            TRY(add_class(c, number, strlen(number)));
        }
        return OK;
    }
    c->verbatim = strncmp(list, FOLDERS, sizeof FOLDERS - 1) == 0;
    if (c->verbatim) list += sizeof FOLDERS - 1;
    const ListKind kind = c->verbatim ? VERBATIM : strchr(list, '\n') ? LINES : COMMAS;
    const char *text;
    for (size_t length, n = 0; (text = next_class(&list, &length, kind)); n++) {
        if (n == most) return err("imagebart.classes names more than the %zu classes that the network knows", most);
        TRY(add_class(c, text, length));
    }
    return c->n ? OK : err("imagebart.classes names no class");
}

void classes_free(Classes *c) {
    for (size_t i = 0; i < c->n; i++) free(c->name[i]);
    free(c->name);
    *c = (Classes){0};
}

/* ---- One class's names ------------------------------------------------------------------------------------- */

/* The bytes of "n01440764" at the start of a class; 0: it has no synset. */
static size_t synset_length(const char *text) {
    return text[0] == 'n' && strspn(text + 1, "0123456789") == 8 && text[9] == ' ' ? 9 : 0;
}

/* The next of a class's names, *length bytes; *text moves on. NULL: no more. */
static const char *next_name(const char **text, size_t *length) {
    const char *start = *text + strspn(*text, " ,");
    if (*start == 0) return NULL;
    *length = strcspn(start, ",");
    *text = start + *length;
    return start;
}

static int same(const char *text, size_t length, const char *name) {
    return letters_begin(text, length, name, 1);
}

/* Is it exactly the class's line, its synset or one of its names? */
static int is_named(const char *text, const char *name) {
    size_t length = synset_length(text);
    if ((length && same(text, length, name)) || same(text, strlen(text), name)) return 1;
    text += length;
    for (const char *word; (word = next_name(&text, &length));)
        if (same(word, length, name)) return 1;
    return 0;
}

/* Case-insensitively: does one of the class's names hold `part`? */
static int holds(const char *text, const char *part) {
    size_t length;
    text += synset_length(text);
    for (const char *word; (word = next_name(&text, &length));)
        for (; length; word++, length--)
            if (letters_begin(word, length, part, 0)) return 1;
    return 0;
}

const char *class_title(char out[CLASS_TITLE_BYTES], const Classes *c, size_t label) {
    const char *text = c->name[label] + (c->verbatim ? 0 : synset_length(c->name[label]));
    size_t length = strlen(text);
    const char *first = c->verbatim ? text : next_name(&text, &length);
    snprintf(out, CLASS_TITLE_BYTES, "%.*s", (int)min_size(length, CLASS_TITLE_BYTES), first ? first : "");
    return make_printable(out);
}

/* Are the folders the classes of the list, one by one? */
static int folders_fit(const Classes *c, char *const *folder, size_t n) {
    size_t i = 0;
    while (i < n && n == c->n && is_named(c->name[i], folder[i])) i++;
    return i == n;
}

/* The name travels in metadata, which is UTF-8, as a line. */
static Err check_folder(const char *folder) {
    if (strchr(folder, '\n')) return err("the class folder '%s' has a line break in its name: rename it", folder);
    for (const char *at = folder; *at;) {
        const size_t n = utf8_length(at);
        if (!n) return err("the name of the class folder '%s' is not UTF-8: rename it", folder);
        at += n;
    }
    return OK;
}

Err classes_from_folders(Config *to, char *const *folder, size_t n) {
    const char *list = config_get(to, "imagebart.", "classes");
    Classes known = {0};
    int fits = 0;
    Err e;
    if (list && classes_open(&known, list, 65536) == OK) fits = folders_fit(&known, folder, n);
    classes_free(&known);
    if (fits) return OK;
    char *text, *at;
    size_t bytes = sizeof FOLDERS;
    for (size_t i = 0; i < n; i++) {
        TRY(check_folder(folder[i]));
        bytes += strlen(folder[i]) + 1;
    }
    TRY(mem_alloc(&text, bytes, 1, "class names"));
    at = stpcpy(text, FOLDERS);
    for (size_t i = 0; i < n; i++) {
        at = stpcpy(at, folder[i]);
        *at++ = '\n';
    }
    e = config_set(to, "imagebart.classes", "%s", text);
    free(text);
    return e;
}

/* ---- Finding a class --------------------------------------------------------------------------------------- */

size_t classes_named(const Classes *c, const char *name, int32_t *label) {
    size_t matches = 0;
    for (size_t i = c->n; i-- > 0;) {
        if (!is_named(c->name[i], name)) continue;
        matches++;
        *label = (int32_t)i;
    }
    for (size_t i = 0; matches > 1 && i < c->n; i++)
        if (strcmp(c->name[i], name) == 0) { /* names that differ by case alone, such as folders a and A */
            *label = (int32_t)i;
            return 1;
        }
    return matches;
}

static size_t classes_holding(const Classes *c, const char *part, int32_t *label) {
    size_t matches = 0;
    for (size_t i = 0; i < c->n; i++) {
        if (!holds(c->name[i], part)) continue;
        matches++;
        *label = (int32_t)i;
    }
    return matches;
}

/* The classes that pass, as far as the line has room: "food", or with its number "207 n02099601 golden retriever" */
static Err class_error(const Classes *c, const char *name, const char *why, int (*passes)(const char *, const char *)) {
    char list[640] = "", one[CLASS_TITLE_BYTES + 48], title[CLASS_TITLE_BYTES];
    size_t length = 0;
    for (size_t i = 0; i < c->n; i++) {
        if (passes && !passes(c->name[i], name)) continue;
        class_title(title, c, i);
        if (!c->verbatim && synset_length(c->name[i]))
            snprintf(one, sizeof one, "%zu %.9s %s", i, c->name[i], title);
        else
            snprintf(one, sizeof one, "%s", title);
        if (length + strlen(one) + 8 >= sizeof list) {
            snprintf(list + length, sizeof list - length, ", ...");
            break;
        }
        length += (size_t)snprintf(list + length, sizeof list - length, "%s%s", length ? ", " : "", one);
    }
    return err("class \"%.100s\": %s %s", name, why, list);
}

/* A name is kept by those who ask: what is found is no longer than this, or than the class's own line. */
enum { MOST_DIGITS = 10 };

Err classes_find(const Classes *c, const char *name, int32_t *label) {
    if (*name == 0) return class_error(c, name, "expected one of", NULL);
    size_t matches = classes_named(c, name, label);
    if (matches == 1) return OK;
    if (matches > 1) return class_error(c, name, "is the name of several; give a number or a synset:", is_named);
    if (name[strspn(name, "0123456789")] == 0) {
        unsigned long long number = strtoull(name, NULL, 10);
        if (number >= c->n || strlen(name) > MOST_DIGITS)
            return err("class %.100s: expected 0..%zu or a name", name, c->n - 1);
        *label = (int32_t)number;
        return OK;
    }
    matches = classes_holding(c, name, label);
    if (matches == 1) return OK;
    return matches ? class_error(c, name, "could be any of", holds) : class_error(c, name, "expected one of", NULL);
}
