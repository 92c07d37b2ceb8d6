/* layout.c - what the names of a set's pictures say: the side of the split and the class.
 *
 * The class is the first folder, below the split's where there is one. Folders are the split if training and validation
 * are both there, or training and test and nothing else with pictures; a lone one is the folder of the pictures. A
 * folder `train` among others (bus, car, train) is a class. */
#include "files/files.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

enum { HELD_OUT = 20 }; /* 1 of 20 pictures is for validation */

static int ends_with(const char *text, size_t length, const char *end) {
    size_t n = strlen(end);
    return length > n && memcmp(text + length - n, end, n) == 0;
}

const char *below_folder(const char *name, const char *folder) {
    size_t n = strlen(folder);
    return n && strncmp(name, folder, n) == 0 && name[n] == '/' ? name + n + 1 : NULL;
}

/* A name without what all names outside of the set's folder begin with */
static const char *inner(const char *name, const Layout *layout) {
    return name[0] == '/' ? name + layout->outside : name;
}

const char *class_part(size_t *length, int *side, const char *name, const Layout *layout) {
    name = inner(name, layout);
    const char *rest = below_folder(name, layout->train);
    *side = rest ? TRAINING : NOT_SAID;
    if (!rest && (rest = below_folder(name, layout->val))) *side = VALIDATION;
    if (!rest && (rest = below_folder(name, layout->only))) *side = NOT_SAID;
    if (!rest) rest = name;
    const char *slash = strchr(rest, '/');
    *length = slash ? (size_t)(slash - rest) : 0;
    if (*length == strlen(DATA_MDB) && !memcmp(rest, DATA_MDB, *length))
        *length = 0; /* an LMDB's keys are no classes */
    int of_train = ends_with(rest, *length, "_train_lmdb"), of_val = ends_with(rest, *length, "_val_lmdb");
    if (layout->lmdbs && (of_train || of_val)) *side = of_val ? VALIDATION : TRAINING;
    if (of_train || of_val) *length -= strlen(of_val ? "_val_lmdb" : "_train_lmdb");
    return rest;
}

static void find_lmdbs(Layout *layout, const Names *all) {
    int sides = 0, side;
    Layout lmdbs = *layout;
    lmdbs.lmdbs = 1;
    for (size_t i = 0, length; i < all->n && sides != 3; i++) {
        class_part(&length, &side, all->item[i].name, &lmdbs);
        if (side != NOT_SAID) sides |= 1 << side;
    }
    layout->lmdbs = sides == 3;
}

/* The common folder of the names that start with '/', its slash included */
static size_t common_folder(const Names *all) {
    const char *first = NULL;
    size_t common = 0;
    for (size_t i = 0; i < all->n; i++) {
        const char *name = all->item[i].name;
        if (name[0] != '/') continue;
        if (!first) first = name, common = (size_t)(strrchr(name, '/') - name) + 1;
        size_t same = 0;
        while (same < common && name[same] == first[same]) same++;
        while (same && first[same - 1] != '/') same--;
        common = same;
    }
    return common;
}

/* ---- Which folders are the split ---- */

typedef enum { ROLE_TRAIN, ROLE_VAL, ROLE_TEST, ROLE_NONE } Role;

/* Also as train_set, test-images, valData */
static Role role_of(const char *folder, size_t length) {
    static const struct {
        const char *name;
        Role role;
    } known[] = {{"train", ROLE_TRAIN},    {"training", ROLE_TRAIN}, {"val", ROLE_VAL},     {"valid", ROLE_VAL},
                 {"validation", ROLE_VAL}, {"validate", ROLE_VAL},   {"dev", ROLE_VAL},     {"eval", ROLE_VAL},
                 {"evaluation", ROLE_VAL}, {"test", ROLE_TEST},      {"testing", ROLE_TEST}};
    static const char *const kinds[] = {"dataset", "set", "data", "images", "imgs", "pictures", "photos"};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        const size_t n = strlen(kinds[i]);
        if (length <= n || strncasecmp(folder + length - n, kinds[i], n) != 0) continue;
        length -= n;
        while (length && strchr("_- ", folder[length - 1])) length--;
        break;
    }
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strlen(known[i].name) == length && !strncasecmp(known[i].name, folder, length)) return known[i].role;
    return ROLE_NONE;
}

/* Is a validation folder in the set's folder, though without pictures? */
static int empty_val(const char *root) {
    static const char *const name[] = {"val", "valid", "validation"};
    char path[PATH_BYTES];
    struct stat st;
    for (size_t i = 0; i < sizeof name / sizeof *name; i++)
        if (path_make(path, "%s/%s", root, name[i]) == OK && stat(path, &st) == 0 && S_ISDIR(st.st_mode)) return 1;
    return 0;
}

static void set_folder(char to[FOLDER_NAME_BYTES], const char *name, size_t length) {
    snprintf(to, FOLDER_NAME_BYTES, "%.*s", (int)length, name);
}

void layout_find(Layout *layout, const Names *all, const char *root) {
    static const char official_train[] = "ILSVRC2012_train/data", official_val[] = "ILSVRC2012_validation/data";
    const char *first[ROLE_NONE] = {NULL};
    size_t others = 0, roles = 0;
    int official = 0;
    *layout = (Layout){.outside = common_folder(all), .flat = layout->flat};
    for (size_t i = 0; i < all->n; i++) {
        const char *name = inner(all->item[i].name, layout), *slash = strchr(name, '/');
        if (below_folder(name, official_train)) official |= 1;
        if (below_folder(name, official_val)) official |= 2;
        if (!slash) continue;
        const size_t length = (size_t)(slash - name);
        const Role role = role_of(name, length);
        if (role == ROLE_NONE)
            others++;
        else if (!first[role])
            first[role] = name, roles++;
    }
    const char *train = first[ROLE_TRAIN], *val = first[ROLE_VAL], *test = first[ROLE_TEST];
    if (official == 3) {
        strcpy(layout->train, official_train), strcpy(layout->val, official_val);
    } else if (train && (val || (test && !others))) {
        const char *held_out = val ? val : test;
        set_folder(layout->train, train, strcspn(train, "/"));
        set_folder(layout->val, held_out, strcspn(held_out, "/"));
    } else if (roles == 1 && !others) {
        const char *only = train ? train : val ? val : test;
        char *to = train && empty_val(root) ? layout->train : layout->only;
        set_folder(to, only, strcspn(only, "/"));
        if (to == layout->train) strcpy(layout->val, "val");
    }
    if (!layout->train[0]) find_lmdbs(layout, all);
}

/* ---- What belongs to the set ---- */

static int is_beside(const char *name, const Layout *layout) {
    const char *within = inner(name, layout);
    if (layout->train[0]) return !below_folder(within, layout->train) && !below_folder(within, layout->val);
    return layout->only[0] && !below_folder(within, layout->only);
}

Err layout_filter(Names *all, const Layout *layout, LeftOut *out, char stray[256]) {
    Names kept = {0};
    size_t length, strays = 0, classed = 0;
    int side;
    Err e = OK;
    stray[0] = 0;
    for (size_t i = 0; i < all->n; i++) {
        const char *name = all->item[i].name;
        if (is_beside(name, layout)) continue;
        class_part(&length, &side, name, layout);
        if (length)
            classed++;
        else if (strays++ == 0)
            snprintf(stray, 256, "%.255s", name);
    }
    const int drop = strays * 10 <= classed && !layout->flat; /* few beside many; else the set has no classes */
    for (size_t i = 0; i < all->n && e == OK; i++) {
        const Listed *item = &all->item[i];
        const int beside = is_beside(item->name, layout);
        class_part(&length, &side, item->name, layout);
        if (beside || (drop && !length))
            left_out_note(out, beside ? OUT_BESIDE : OUT_STRAY, item->name);
        else
            e = names_add(&kept, item->name, strlen(item->name), item->bytes, item->mark);
    }
    if (drop || !classed) stray[0] = 0;
    names_free(all);
    *all = kept;
    names_sort(all, names_in_byte_order);
    return e;
}

/* 1 of HELD_OUT names, chosen by the name alone: adding pictures moves no other picture to the other side. */
static int name_is_held_out(const char *name) {
    return (fnv1a(FNV_START, name, strlen(name)) >> 32) % HELD_OUT == 0;
}

void layout_sides(Names *all, const Layout *layout) {
    size_t said = 0, held_out = 0, length;
    for (size_t i = 0; i < all->n; i++) {
        Listed *item = &all->item[i];
        if (item->mark == NOT_SAID) class_part(&length, &item->mark, item->name, layout);
        said += item->mark != NOT_SAID;
        if (item->mark == NOT_SAID) item->mark = name_is_held_out(item->name) ? VALIDATION : TRAINING;
        held_out += item->mark == VALIDATION;
    }
    if (said || !all->n) return;
    if (all->n == 1)
        all->item[0].mark = TRAINING;
    else if (!held_out || held_out == all->n)
        for (size_t i = 0; i < all->n; i++) all->item[i].mark = i == 0 ? VALIDATION : TRAINING;
}

/* ---- Names in lists ---- */

/* Without double slashes, "." and, where a folder is in front of it, ".." */
static void plain_path(char *path) {
    const size_t first = path[0] == '/';
    const char *from = path + first;
    size_t n = first;
    for (size_t length; *from; from += length + (from[length] == '/')) {
        length = strcspn(from, "/");
        if (!length || (length == 1 && from[0] == '.')) continue;
        size_t last = n > first ? n - 1 : n; /* where the component in front begins */
        while (last > first && path[last - 1] != '/') last--;
        if (length == 2 && !strncmp(from, "..", 2) && n > first && strncmp(path + last, "../", 3) != 0) {
            n = last;
            continue;
        }
        memmove(path + n, from, length);
        n += length;
        if (from[length]) path[n++] = '/';
    }
    path[n - (n > first && path[n - 1] == '/')] = 0;
}

/* name = what is behind the folder in front of it, if it is there */
static void drop_folder(char *name, const char *folder) {
    const char *below = below_folder(name, folder);
    if (below) memmove(name, below, strlen(below) + 1);
}

void list_name(char *name, const char *root) {
    char folder[PATH_BYTES], path[PATH_BYTES], whole[PATH_MAX];
    snprintf(folder, sizeof folder, "%s", root);
    drop_folder(name, root);
    plain_path(name), plain_path(folder);
    drop_folder(name, folder);
    if (strncmp(name, "../", 3) != 0 || !realpath(root, whole)) return;
    snprintf(folder, sizeof folder, "%s", whole);
    if (path_make(path, "%s/%s", root, name) != OK || !realpath(path, whole)) return;
    if (strlen(whole) < PATH_BYTES) strcpy(name, whole);
    drop_folder(name, folder);
}

const char *list_label(const char *name) {
    size_t n = strlen(name), end = n;
    while (n && strchr("0123456789", name[n - 1])) n--;
    return n && n < end && strchr(" \t,;", name[n - 1]) && strchr(name, '.') ? name + n : NULL;
}
