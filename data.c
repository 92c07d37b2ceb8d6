/* data.c - datasets: which pictures there are, what their labels are, and batches of them ahead of time.
 *
 * Owns finding the pictures of a dataset (a folder, an LMDB, folders of LMDBs, list files) and their labels, the split
 * into training and validation, the list of damaged pictures, the order of an epoch, and the threads that read batches
 * ahead. What a picture is, images.c knows; what an LMDB is, lmdb.c.
 *
 * How it is built: a picture is a name below the dataset's folder ("cat/1.png"); one in an LMDB is the LMDB's name and
 * the key ("church_outdoor_train_lmdb/data.mdb/f7c8..."). Finding fills Names, a growing list whose marks are sides of
 * the split; a Layout tells from a name on which side and in which class its picture is; Dataset keeps what is chosen.
 * Batches are functions of their number: which picture, crop and flip an example is depends on no thread, and what
 * stands in for a damaged picture only on the files.
 *
 * Read in this order: dataset_open, dataset_picture, loader_start; next vqgan.c, which makes tokens of the batches. */
#include "imagebart.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    LIST_FILE_BYTES = 1 << 30,
    RING = 4,                /* batches read ahead, the one in use included */
    READERS = 16,            /* threads of a loader at most */
    CACHE_BYTES = 512 << 20, /* resized pictures kept in memory by a loader */
    SNIFF_BYTES = 160        /* enough to tell a picture or an LMDB */
};

#ifdef HAVE_WEBP
#define EXTENSIONS ".png, .jpg, .jpeg or .webp"
#else
#define EXTENSIONS ".png, .jpg or .jpeg"
#endif

/* The next line of a text from *at to end, without its end; 0: there is none. */
static int next_line(const char **line, size_t *length, const char **at, const char *end) {
    if (*at >= end) return 0;
    const char *stop = *at;
    while (stop < end && *stop != '\n' && *stop != '\r') stop++; /* old lists have CR alone */
    *line = *at;
    *length = (size_t)(stop - *at);
    *at = stop + 1 + (stop + 1 < end && stop[0] == '\r' && stop[1] == '\n');
    return 1;
}

/* ------------------------------------------------------------------------------------------------------------
 * Finding pictures
 * ---------------------------------------------------------------------------------------------------------- */

/* out = a/b, or b alone when a is empty */
static Err join(char out[PATH_BYTES], const char *a, const char *b) {
    return path_make(out, "%s%s%s", a, *a ? "/" : "", b);
}

/* Where names go while a set is being searched. */
typedef struct {
    Dataset *set; /* owns the LMDBs that are met */
    Names *names;
    const char *root;
    char below[PATH_BYTES]; /* of the LMDB being read */
} Search;

static Err take_key(void *context, const char *key, size_t value_bytes) {
    Search *s = context;
    char name[PATH_BYTES];
    TRY(join(name, s->below, key));
    return names_add(s->names, name, strlen(name), value_bytes, NOT_SAID);
}

/* Adds the keys of the LMDB at root/below, which stays open. */
static Err search_lmdb(Search *s, const char *below) {
    char path[PATH_BYTES];
    Lmdb *x, **larger;
    TRY(join(path, s->root, below));
    TRY(lmdb_open(&x, path));
    Dataset *d = s->set;
    if (mem_alloc(&larger, d->n_lmdb + 1, sizeof *larger, "LMDBs") != OK) {
        lmdb_close(x);
        return FAILED;
    }
    if (d->n_lmdb) memcpy(larger, d->lmdb, d->n_lmdb * sizeof *larger);
    free(d->lmdb);
    d->lmdb = larger;
    d->lmdb[d->n_lmdb++] = x;
    snprintf(s->below, sizeof s->below, "%s", below);
    return lmdb_names(x, take_key, s);
}

static Err take_file(void *context, const char *name, uint64_t bytes, int is_lmdb) {
    Search *s = context;
    return is_lmdb ? search_lmdb(s, name) : names_add(s->names, name, strlen(name), bytes, NOT_SAID);
}

/* Adds the pictures in root, named relative to it. */
static Err search_root(Search *s) {
    return folder_search(s->root, s->set->left_out, take_file, s);
}

/* ---- list files ---- */

/* What a list's folder holds, by stem; searched when the first line names no file as it stands: FFHQ comes in folders
 * of a thousand, LSUN as an LMDB or in nested folders, and the official lists name the pictures alone. */
typedef struct {
    Names found;
    int searched;
    size_t missing;
    char first[ERR_MAX]; /* the complaint about the first missing one */
} Index;

/* *out = the one picture whose stem is that of `name`; NULL: none. Two are an error. */
static Err index_find(Index *x, Search *s, const char *name, const Listed **out) {
    if (!x->searched) {
        Names *theirs = s->names;
        s->names = &x->found;
        Err e = search_root(s);
        s->names = theirs;
        if (e != OK) return e;
        names_sort(&x->found, names_by_stem);
        x->searched = 1;
    }
    Listed key = {0, name, 0, 0};
    const Listed *all = x->found.item,
                 *at = x->found.n ? bsearch(&key, all, x->found.n, sizeof *all, names_by_stem) : NULL;
    *out = at;
    if (!at) return OK;
    const Listed *other = at > all && !names_by_stem(at - 1, at)                    ? at - 1
                          : at + 1 < all + x->found.n && !names_by_stem(at, at + 1) ? at + 1
                                                                                    : NULL;
    return other ? err("'%s' could be %s or %s", name, at->name, other->name) : OK;
}

static int is_file_of_set(const Search *s, const char *name, struct stat *st) {
    char path[PATH_BYTES];
    return join(path, name[0] == '/' ? "" : s->root, name) == OK && stat(path, st) == 0 && S_ISREG(st->st_mode);
}

/* One line of a list: the file of that path, else the picture of that stem. Missing ones are counted. Lists of other
 * programs: blanks behind a name, backslashes in it. */
static Err list_line(Search *s, Index *x, const char *list, size_t line, char *name, int side) {
    struct stat st;
    const Listed *found;
    size_t n = strlen(name);
    int there = is_file_of_set(s, name, &st);
    if (!there) {
        while (n && strchr(" \t", name[n - 1])) name[--n] = 0;
        if (!n) return OK;
        there = is_file_of_set(s, name, &st);
    }
    if (!there) {
        if (list_label(name))
            return err("%s: line %zu: a label stands behind the picture, '%s'; folders are the classes, a path alone "
                       "expected",
                       list, line, list_label(name));
        for (char *p = name; *p; p++)
            if (*p == '\\') *p = '/';
        there = is_file_of_set(s, name, &st);
    }
    list_name(name, s->root);
    if (there) return names_add(s->names, name, strlen(name), (uint64_t)st.st_size, side);
    if (index_find(x, s, name, &found) != OK) return err("%s: line %zu: %s", list, line, err_text());
    if (found) return names_add(s->names, found->name, strlen(found->name), found->bytes, side);
    if (x->missing++ == 0) {
        err("%s: line %zu: no picture at %s%s%s", list, line, name[0] == '/' ? "" : s->root, name[0] == '/' ? "" : "/",
            name);
        snprintf(x->first, sizeof x->first, "%s", err_text());
    }
    return OK;
}

/* Adds the pictures that a list file names, a path a line; each must be there. */
static Err search_list(Search *s, Index *x, const char *list, int side) {
    uint8_t *bytes;
    size_t size, length;
    TRY(file_bytes(&bytes, &size, list, LIST_FILE_BYTES, NULL));
    const char *at = (const char *)bytes, *end = at + size, *line;
    if (size >= 3 && !memcmp(at, "\357\273\277", 3)) at += 3; /* a byte order mark */
    Err e = memchr(bytes, 0, size) ? err("%s: is neither a folder nor a text file with one path a line", list) : OK;
    for (size_t number = 1; e == OK && next_line(&line, &length, &at, end); number++) {
        char name[PATH_BYTES];
        if (length >= PATH_BYTES) e = err("%s: line %zu: longer than %d bytes", list, number, PATH_BYTES - 1);
        if (!length || e != OK) continue;
        snprintf(name, sizeof name, "%.*s", (int)length, line);
        e = list_line(s, x, list, number, name, side);
    }
    free(bytes);
    if (e == OK && x->missing > 1) return err("%s, and %zu more are missing", x->first, x->missing - 1);
    return e == OK && x->missing ? err("%s", x->first) : e;
}

/* ------------------------------------------------------------------------------------------------------------
 * Classes
 * ---------------------------------------------------------------------------------------------------------- */

/* Class names of the whole set, both splits, so that ids agree between them. Pictures outside sub-folders make the
 * set unlabelled. all is sorted. */
static Err find_classes(Dataset *d, const Names *all, const Layout *layout) {
    Names found = {0};
    Err e = OK;
    const char *last = NULL;
    size_t last_length = 0;
    int side;
    for (size_t i = 0, length; i < all->n && e == OK; i++) {
        const char *part = class_part(&length, &side, all->item[i].name, layout);
        if (!length) {
            names_free(&found);
            return OK;
        }
        if (!last || length != last_length || memcmp(last, part, length) != 0)
            e = names_add(&found, part, length, 0, 0);
        last = part, last_length = length;
    }
    names_sort(&found, names_in_byte_order);
    if (e == OK) e = names_pack(&d->class_name, &found, NULL);
    for (size_t i = 0; i < found.n && e == OK; i++) /* a class occurs once per split folder */
        if (i == 0 || strcmp(d->class_name[i], d->class_name[d->n_classes - 1]) != 0)
            d->class_name[d->n_classes++] = d->class_name[i];
    names_free(&found);
    return e;
}

static int compare_strings(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static int32_t class_of(const Dataset *d, const char *name, const Layout *layout) {
    char class_name[PATH_BYTES], *key = class_name;
    size_t length;
    int side;
    const char *part = class_part(&length, &side, name, layout);
    snprintf(class_name, sizeof class_name, "%.*s", (int)length, part);
    char **at = bsearch(&key, d->class_name, d->n_classes, sizeof *d->class_name, compare_strings);
    return at ? (int32_t)(at - d->class_name) : 0;
}

/* ------------------------------------------------------------------------------------------------------------
 * Datasets
 * ---------------------------------------------------------------------------------------------------------- */

/* folder, *name = the two parts of a path. */
static Err split_path(char folder[PATH_BYTES], const char **name, const char *path) {
    TRY(join(folder, "", path));
    char *slash = strrchr(folder, '/');
    *name = slash ? path + (slash - folder) + 1 : path;
    if (slash)
        slash[slash == folder] = 0;
    else
        strcpy(folder, ".");
    return OK;
}

/* May the file not be read, or is it gone, though its folder is there? A disk that went away takes the folder too. */
static int is_closed_or_gone(const char *path) {
    char folder[PATH_BYTES];
    const char *name;
    struct stat st;
    if (access(path, R_OK) == 0 || (errno != EACCES && errno != ENOENT)) return 0;
    return split_path(folder, &name, path) == OK && stat(folder, &st) == 0;
}

/* The bytes of the picture at path. *lost: there are none, or none for us, which counts as damage; everything else that
 * fails here does not. */
static Err picture_bytes(const Dataset *d, const char *path, uint8_t **bytes, size_t *size, int *lost) {
    for (size_t k = 0; k < d->n_lmdb; k++) {
        const char *key = below_folder(path, lmdb_path(d->lmdb[k]));
        if (!key) continue;
        TRY(lmdb_value(d->lmdb[k], key, bytes, size));
        *lost = *size == 0;
        return *lost ? err("%s: is empty", path) : OK;
    }
    const Err e = file_bytes(bytes, size, path, IMAGE_FILE_BYTES, lost);
    if (e != OK && is_closed_or_gone(path)) *lost = 1;
    return e;
}

/* *whole: the picture at path can be decoded. */
static Err picture_whole(const Dataset *d, const char *path, int *whole) {
    uint8_t *bytes = NULL;
    size_t size = 0;
    int lost = 0;
    Image im = {0};
    *whole = 0;
    Err e = picture_bytes(d, path, &bytes, &size, &lost);
    if (e == OK) {
        e = image_decode_prepared(&im, bytes, size, PREP_LSUN, 1); /* takes least memory */
        *whole = e == OK;
        lost = e == DAMAGED;
    }
    image_free(&im);
    free(bytes);
    return lost ? OK : e;
}

/* If no picture that is held out can be read, the first of the others that can be is held out too, unless it is the last
 * one to train on. all: marked and sorted. */
static Err hold_out_whole(const Dataset *d, Names *all, const Layout *layout, const char *folder) {
    char path[PATH_BYTES];
    size_t first = NONE, training = 0, held_out = 0;
    int whole;
    for (size_t i = 0; i < all->n; i++) held_out += all->item[i].mark == VALIDATION;
    if (!held_out && !(layout->val[0] && d->left_out->n[OUT_FOREIGN] + d->left_out->n[OUT_OTHER])) return OK;
    for (int side = VALIDATION; side >= TRAINING; side--)
        for (size_t i = 0; i < all->n; i++) {
            if (all->item[i].mark != side) continue;
            TRY(join(path, all->item[i].name[0] == '/' ? "" : folder, all->item[i].name));
            TRY(picture_whole(d, path, &whole));
            if (!whole) continue;
            if (side == VALIDATION) return OK;
            if (first == NONE) first = i;
            if (++training == 2) {
                all->item[first].mark = VALIDATION;
                return OK;
            }
        }
    return OK;
}

/* No pictures of that kind, among n others; what was left out may say why. */
static Err err_none(const Dataset *d, const char *kind, size_t n) {
    char text[ERR_MAX], among[32] = "";
    left_out_text(text, d->left_out);
    if (n) snprintf(among, sizeof among, " among %zu", n);
    return err("has no %spictures (" EXTENSIONS ")%s%s%.600s", kind, among, text[0] ? "; left out: " : "", text);
}

/* d = those of `all` that belong to the split; paths and labels. */
static Err dataset_select(Dataset *d, const Names *all, const char *folder, Split split, const Layout *layout) {
    static const char *const what[] = {"", "training ", "validation "};
    Names chosen = {0};
    Err e = OK;
    d->identity = FNV_START;
    for (size_t i = 0; i < all->n && e == OK; i++) {
        const Listed *item = &all->item[i];
        if (split != SPLIT_ALL && item->mark != (split == SPLIT_VAL)) continue;
        d->identity = fnv1a(d->identity, item->name, strlen(item->name) + 1);
        d->identity = fnv1a(d->identity, &item->bytes, sizeof item->bytes);
        e = names_add(&chosen, item->name, strlen(item->name), item->bytes, item->mark);
    }
    const int alone = split == SPLIT_VAL && all->n == 1 && all->item[0].mark == TRAINING; /* none is held out */
    if (e == OK && !chosen.n && !alone) e = err_none(d, what[split], all->n);
    names_sort(&chosen, names_in_byte_order);
    if (e == OK) e = names_pack(&d->path, &chosen, folder);
    if (e == OK) e = mem_alloc(&d->label, chosen.n, sizeof *d->label, "labels");
    if (e == OK) d->n = chosen.n;
    for (size_t i = 0; i < d->n && d->n_classes; i++) d->label[i] = class_of(d, chosen.item[i].name, layout);
    names_free(&chosen);
    return e == OK ? damage_create(&d->damage, d->n) : e;
}

/* Everything the sources name, sorted, and what the split follows from. */
static Err dataset_find(Dataset *d, Names *all, Layout *layout, const char *folder, const char *list,
                        const char *val_list) {
    Search s = {.set = d, .names = all, .root = folder};
    Index index = {0};
    Err e;
    if (list) {
        e = search_list(&s, &index, list, val_list ? TRAINING : NOT_SAID);
        if (e == OK && val_list) e = search_list(&s, &index, val_list, VALIDATION);
    } else
        e = search_root(&s);
    names_free(&index.found);
    if (e != OK) return e;
    names_sort(all, names_in_byte_order);
    TRY(folder_check(all, folder, d->left_out));
    layout_find(layout, all, folder);
    return layout_filter(all, layout, d->left_out, d->stray);
}

static Err dataset_scan(Dataset *d, const char *path, const char *folder, const char *list, const char *val_list,
                        Split split) {
    Names all = {0};
    Layout layout = {.flat = split & SPLIT_FLAT};
    Err e = dataset_find(d, &all, &layout, folder, list, val_list);
    if (e == OK && all.n > INT32_MAX) e = err("%s: has %zu pictures; fewer than 2^31 expected", path, all.n);
    if (e == OK && !all.n && err_none(d, "", 0) != OK) e = err_in(path);
    if (e == OK) layout_sides(&all, &layout);
    if (e == OK) e = hold_out_whole(d, &all, &layout, folder);
    if (e == OK) e = find_classes(d, &all, &layout);
    if (e == OK && dataset_select(d, &all, folder, split & ~SPLIT_FLAT, &layout) != OK) e = err_in(path);
    names_free(&all);
    return e;
}

/* The set that is one file: an LMDB under any name. */
static Err dataset_scan_lmdb(Dataset *d, const char *path, const char *folder, const char *name, Split split) {
    Names all = {0};
    Search s = {.set = d, .names = &all, .root = folder};
    Layout none = {0};
    Err e = search_lmdb(&s, name);
    if (e == OK && !all.n) e = err("%s: has no pictures", path);
    if (e == OK) names_sort(&all, names_in_byte_order);
    if (e == OK) layout_sides(&all, &none);
    if (e == OK) e = hold_out_whole(d, &all, &none, folder);
    if (e == OK && dataset_select(d, &all, folder, split & ~SPLIT_FLAT, &none) != OK) e = err_in(path);
    names_free(&all);
    return e;
}

Err dataset_open(Dataset *d, const char *path, Split split) {
    return dataset_open_lists(d, path, NULL, NULL, split);
}

Err dataset_open_lists(Dataset *d, const char *path, const char *list, const char *val_list, Split split) {
    *d = (Dataset){0};
    struct stat st;
    if (stat(path, &st) != 0) return err("%s: %s", path, strerror(errno));
    TRY(mem_alloc(&d->left_out, 1, sizeof *d->left_out, "what is left out"));
    char folder[PATH_BYTES];
    uint8_t start[SNIFF_BYTES];
    size_t read;
    Err e = join(folder, "", path);
    if (e != OK) {
        dataset_close(d);
        return e;
    }
    if (S_ISDIR(st.st_mode)) {
        for (size_t n = strlen(folder); n > 1 && folder[n - 1] == '/'; n--) folder[n - 1] = 0;
        e = dataset_scan(d, path, folder, list, val_list, split);
    } else if (list)
        e = err("%s: is a file; with lists, the folder expected that their names are in", path);
    else {
        const char *name;
        e = split_path(folder, &name, path);
        if (e == OK) e = file_start(start, sizeof start, &read, path);
        if (e == OK && lmdb_is(start, read))
            e = dataset_scan_lmdb(d, path, folder, name, split);
        else if (e == OK)
            e = dataset_scan(d, path, folder, path, NULL, split);
    }
    if (e != OK) dataset_close(d);
    return e;
}

void dataset_close(Dataset *d) {
    for (size_t i = 0; i < d->n_lmdb; i++) lmdb_close(d->lmdb[i]);
    damage_free(d->damage);
    free(d->left_out);
    free(d->lmdb);
    free(d->path);
    free(d->label);
    free(d->class_name);
    *d = (Dataset){0};
}

/* ------------------------------------------------------------------------------------------------------------
 * One picture, whole or damaged
 * ---------------------------------------------------------------------------------------------------------- */

Err dataset_picture(const Dataset *d, size_t i, Prep prep, size_t side, Image *im, int *damaged) {
    uint8_t *bytes = NULL;
    size_t size = 0;
    *im = (Image){0};
    if ((*damaged = damage_known(d->damage, i))) return OK;
    Err e = picture_bytes(d, d->path[i], &bytes, &size, damaged);
    if (e == OK && (e = image_decode_prepared(im, bytes, size, prep, side)) != OK) {
        *damaged = e == DAMAGED;
        if (!*damaged) e = err_in(d->path[i]);
    }
    free(bytes);
    if (e == OK && im->note) damage_note_part(d->damage, i, d->path[i], im->note);
    return *damaged ? damage_note(d->damage, i, d->path[i]) : e;
}

size_t dataset_damaged(const Dataset *d) {
    return d->damage ? damage_count(d->damage) : 0;
}

void dataset_met(const Dataset *d, char text[ERR_MAX], int damaged) {
    text[0] = 0;
    if (d->damage) damage_text(text, d->damage, damaged);
}

Err dataset_write_damaged(const Dataset *d, const char *path) {
    return damage_write(d->damage, path);
}

void epoch_order(uint32_t *order, size_t n, uint64_t seed, uint64_t epoch) {
    uint64_t stream = rng_stream(RNG_ORDER, epoch & 0xffffff, 0);
    for (size_t i = 0; i < n; i++) order[i] = (uint32_t)i;
    for (size_t i = n; i-- > 1;) { /* Fisher-Yates */
        uint32_t j = rng_below(seed, stream, i, (uint32_t)i + 1), swap = order[i];
        order[i] = order[j];
        order[j] = swap;
    }
}

int label_dropped(double p, uint64_t seed, uint64_t micro, uint64_t b) {
    return p > 0 && rng_uniform(seed, rng_stream(RNG_LABEL, 0, b), micro) < p;
}

void choose_crop(size_t *crop, size_t *flip, const Tokens *x, uint64_t seed, uint64_t at, uint64_t epoch,
                 size_t picture, int balanced) {
    const uint64_t stream = rng_stream(RNG_CROP, epoch, picture);
    *flip = rng_below(seed, stream, 0, (uint32_t)x->flips);
    *crop = balanced ? rng_below(seed, rng_stream(RNG_ORDER, 0, at), 2, (uint32_t)x->crops)
                     : rng_below(seed, stream, 1, (uint32_t)x->crops);
}

/* ------------------------------------------------------------------------------------------------------------
 * Batches ahead of time
 * ---------------------------------------------------------------------------------------------------------- */

/* Batch k lives in slot k % RING, example p = k*B + b (counted from the start) is row b of it. Readers claim examples
 * in order as long as the slot is free, and fill them side by side; the consumer holds batch taken-1 until it asks for
 * the next. lock guards everything below it up to cached_bytes; a row's contents belong to the reader that claimed it,
 * then to the consumer. */
struct Loader {
    const Dataset *set; /* the caller's; must outlive the loader */
    LoaderConfig c;
    pthread_t thread[READERS];
    size_t readers;
    real *images;    /* (RING, B, crops, 3, size, size) */
    int32_t *labels; /* (RING, B) */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint64_t claimed, taken; /* examples, batches since the start */
    size_t filled[RING];     /* rows of the slot that are ready */
    size_t busy;             /* readers that hold a claim */
    int stop, failed;
    char message[ERR_MAX]; /* why a reader gave up */
    uint32_t *order;       /* (n) of epoch order_epoch */
    uint64_t order_epoch;
    Image *cache; /* (n) resized pictures; empty: not kept */
    size_t cached_bytes;
};

typedef struct {
    uint64_t row, epoch; /* since the start */
    size_t i;            /* which picture */
} Claim;

/* Picture i resized, from memory if it was kept; *fresh: the caller must free it. Damage leaves *im empty. */
static Err loader_picture(Loader *l, size_t i, Image *im, int *fresh) {
    *fresh = 0;
    pthread_mutex_lock(&l->lock);
    *im = l->cache[i];
    pthread_mutex_unlock(&l->lock);
    if (im->rgb) return OK;
    int damaged;
    TRY(dataset_picture(l->set, i, l->c.prep, l->c.size, im, &damaged));
    if (damaged) return OK;
    size_t bytes = im->H * im->W * 3;
    pthread_mutex_lock(&l->lock);
    *fresh = bytes > CACHE_BYTES - l->cached_bytes || l->cache[i].rgb;
    if (!*fresh) {
        l->cache[i] = *im;
        l->cached_bytes += bytes;
    }
    pthread_mutex_unlock(&l->lock);
    return OK;
}

/* Of a picture, into row: a crop for the epoch, or (c.crops) all that there are, the same in every epoch. */
static void put_crops(Loader *l, const Claim *claim, uint64_t row, const Image *im) {
    const LoaderConfig *c = &l->c;
    const size_t pixels = 3 * c->size * c->size, n = max_size(c->crops, 1);
    const int crop = (c->train || c->crops) && c->prep == PREP_IMAGENET;
    const int may_flip = c->train && (c->flip || c->prep == PREP_LSUN);
    for (size_t k = 0; k < n; k++) {
        const uint64_t stream =
            c->crops ? rng_stream(RNG_CROPS, k, claim->i) : rng_stream(RNG_CROP, claim->epoch & 0xffffff, claim->i);
        prep_crop(l->images + (row * n + k) * pixels, im, c->size, crop ? rng_uniform(c->seed, stream, 0) : -1,
                  crop ? rng_uniform(c->seed, stream, 1) : -1, may_flip && rng_uniform(c->seed, stream, 2) < 0.5);
    }
}

static Err none_whole(const Dataset *d) {
    char text[ERR_MAX];
    damage_text(text, d->damage, 1);
    return err("none of the %zu pictures can be read: %.1800s", d->n, text);
}

/* Into the claimed row. For a damaged picture stands the next whole one of the set (c.mark: a label of -1). */
static Err loader_example(Loader *l, const Claim *claim) {
    size_t n = l->set->n, i = claim->i, row = claim->row % (l->c.B * RING);
    Image im;
    int fresh;
    TRY(loader_picture(l, i, &im, &fresh));
    for (size_t tries = 1; !im.rgb && !l->c.mark && tries < n; tries++) {
        i = i + 1 < n ? i + 1 : 0;
        TRY(loader_picture(l, i, &im, &fresh));
    }
    l->labels[row] = im.rgb ? l->set->label[i] : -1;
    if (!im.rgb) return l->c.mark ? OK : none_whole(l->set);
    put_crops(l, claim, row, &im);
    if (fresh) image_free(&im);
    return OK;
}

/* With the lock held: the next example, if its slot is free. 1: there is one. */
static int loader_claim(Loader *l, Claim *claim) {
    uint64_t released = l->taken ? l->taken - 1 : 0, row = l->claimed;
    if (row / l->c.B - released >= RING) return 0;
    uint64_t position = (l->c.step + row / l->c.B) * l->c.global_batch + l->c.rank_first + row % l->c.B, n = l->set->n;
    *claim = (Claim){row, position / n, position % n};
    if (l->c.train && claim->epoch != l->order_epoch) {
        epoch_order(l->order, l->set->n, l->c.seed, claim->epoch);
        l->order_epoch = claim->epoch;
    }
    if (l->c.train) claim->i = l->order[claim->i];
    l->claimed++;
    l->busy++;
    return 1;
}

static void *loader_thread(void *argument) {
    Loader *l = argument;
    Claim claim;
    pthread_mutex_lock(&l->lock);
    while (!l->stop && !l->failed) {
        if (!loader_claim(l, &claim)) {
            pthread_cond_wait(&l->changed, &l->lock);
            continue;
        }
        pthread_mutex_unlock(&l->lock);
        Err e = loader_example(l, &claim);
        pthread_mutex_lock(&l->lock);
        l->busy--;
        if (e == OK)
            l->filled[claim.row / l->c.B % RING]++;
        else if (!l->failed) {
            l->failed = 1;
            snprintf(l->message, sizeof l->message, "%s", err_text());
        }
        pthread_cond_broadcast(&l->changed);
    }
    pthread_mutex_unlock(&l->lock);
    return NULL;
}

static Err loader_alloc(Loader *l) {
    size_t n = l->set->n, reals;
    TRY(size_mul(&reals, 3 * l->c.size * l->c.size, RING * max_size(l->c.crops, 1)));
    TRY(size_mul(&reals, reals, l->c.B));
    TRY(mem_alloc(&l->images, reals, sizeof *l->images, "prefetched batches"));
    TRY(mem_alloc(&l->labels, l->c.B * RING, sizeof *l->labels, "prefetched labels"));
    TRY(mem_alloc(&l->order, n, sizeof *l->order, "the order of an epoch"));
    TRY(mem_alloc(&l->cache, n, sizeof *l->cache, "the picture cache"));
    l->order_epoch = UINT64_MAX; /* none yet */
    return OK;
}

size_t loader_bytes(size_t n, size_t B, size_t size) {
    const double row = 3.0 * (double)size * (double)size, kept = (double)n * row;
    const double all = RING * (double)B * row * sizeof(real) + (kept < CACHE_BYTES ? kept : CACHE_BYTES) + DECODE_BYTES;
    return all < (double)(SIZE_MAX / 2) ? (size_t)all : SIZE_MAX / 2;
}

/* As many readers as the program has threads; fewer if the system has no more, but one. */
static Err loader_readers(Loader *l) {
    size_t wanted = min_size(min_size((size_t)threads_get(), READERS), l->c.B * RING);
    int failure = 0;
    while (l->readers < wanted && !failure)
        if (!(failure = thread_start(&l->thread[l->readers], 0, loader_thread, l))) l->readers++;
    return l->readers ? OK : err("starting a reader thread: %s", strerror(failure));
}

Err loader_start(Loader **out, const Dataset *d, const LoaderConfig *c) {
    *out = NULL;
    if (d->n < 1 || d->n > INT32_MAX) return err("a loader over %zu pictures", d->n);
    if (c->B < 1 || c->B > 1 << 20) return err("batch %zu: 1..%d expected", c->B, 1 << 20);
    if (c->size < 1 || c->size > IMAGE_MAX_SIDE) return err("size %zu: 1..%d expected", c->size, IMAGE_MAX_SIDE);
    if (c->crops > CROPS_MAX) return err("%zu crops: 0..%d expected", c->crops, CROPS_MAX);
    if (c->global_batch > 1 << 30 || c->rank_first > 1 << 30)
        return err("rows %zu.. of a batch of %zu", c->rank_first, c->global_batch);
    if (c->step > UINT64_MAX / 4 / max_size(c->B, c->global_batch))
        return err("step %ju is out of range", (uintmax_t)c->step);
    Loader *l;
    TRY(mem_alloc(&l, 1, sizeof *l, "a loader"));
    l->set = d;
    l->c = *c;
    if (!c->global_batch) l->c.global_batch = c->B;
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->changed, NULL);
    Err e = loader_alloc(l);
    if (e == OK) e = loader_readers(l);
    if (e == OK)
        *out = l;
    else
        loader_stop(l);
    return e;
}

/* The batches in front of one that failed still come: claims are made in order, and those made are finished. */
Err loader_next(Loader *l, const real **images, const int32_t **labels) {
    size_t B = l->c.B;
    pthread_mutex_lock(&l->lock);
    uint64_t k = l->taken;
    size_t slot = k % RING;
    if (k > 0) l->filled[(k - 1) % RING] = 0; /* releases the batch handed out before */
    l->taken++;
    pthread_cond_broadcast(&l->changed);
    while (l->filled[slot] < B && !(l->failed && !l->busy)) pthread_cond_wait(&l->changed, &l->lock);
    int there = l->filled[slot] == B;
    if (!there) l->taken = k;
    pthread_mutex_unlock(&l->lock);
    if (!there) return err("%s", l->message);
    *images = l->images + slot * B * max_size(l->c.crops, 1) * 3 * l->c.size * l->c.size;
    *labels = l->labels + slot * B;
    return OK;
}

void loader_stop(Loader *l) {
    if (!l) return;
    pthread_mutex_lock(&l->lock);
    l->stop = 1;
    pthread_cond_broadcast(&l->changed);
    pthread_mutex_unlock(&l->lock);
    for (size_t i = 0; i < l->readers; i++) pthread_join(l->thread[i], NULL);
    for (size_t i = 0; l->cache && i < l->set->n; i++) image_free(&l->cache[i]);
    pthread_cond_destroy(&l->changed);
    pthread_mutex_destroy(&l->lock);
    free(l->images);
    free(l->labels);
    free(l->order);
    free(l->cache);
    free(l);
}
