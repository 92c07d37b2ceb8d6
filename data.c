/* data.c - datasets: which pictures there are, what their labels are, and batches of them ahead of time.
 *
 * Owns finding the pictures of a dataset (a folder, a list file) and their labels, the split into training and
 * validation, the order of an epoch, and the thread that reads batches ahead. What a picture is, images.c knows.
 *
 * Read in this order: dataset_open, loader_start. */
#include "data.h"

#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

enum {
    LIST_FILE_BYTES = 1 << 30,
    FOLDER_DEPTH = 16, /* also ends loops of symbolic links */
    PATH_BYTES = 4096,
    HELD_OUT = 20,          /* 1 of 20 pictures is for validation */
    RING = 4,               /* batches read ahead, the one in use included */
    CACHE_BYTES = 512 << 20 /* resized pictures kept in memory by a loader */
};

/* ------------------------------------------------------------------------------------------------------------
 * Datasets
 * ---------------------------------------------------------------------------------------------------------- */

/* A growing list of strings; start[] are offsets because text moves. */
typedef struct {
    char *text;
    size_t used, room;
    size_t *start;
    size_t n, capacity;
} Names;

static Err names_add(Names *s, const char *name, size_t length) {
    TRY(mem_grow(&s->text, s->used, length + 1, &s->room, 1, "file names"));
    TRY(mem_grow(&s->start, s->n, 1, &s->capacity, sizeof *s->start, "file names"));
    memcpy(s->text + s->used, name, length);
    s->text[s->used + length] = 0;
    s->start[s->n++] = s->used;
    s->used += length + 1;
    return OK;
}

static void names_free(Names *s) {
    free(s->text);
    free(s->start);
    *s = (Names){0};
}

static int compare_strings(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* *out (n) = the strings in byte order, pointers and text in one allocation. Strings that do not start with '/' get
 * `folder` + "/" in front, after sorting; NULL: nothing in front. */
static Err names_pack(char ***out, const Names *s, const char *folder) {
    size_t prefix = folder ? strlen(folder) + 1 : 0, bytes;
    TRY(size_mul(&bytes, s->n, sizeof(char *) + prefix));
    TRY(mem_alloc(out, bytes + s->used, 1, "file names"));
    char **item = *out, *to = (char *)(item + s->n);
    for (size_t i = 0; i < s->n; i++) item[i] = s->text + s->start[i];
    qsort(item, s->n, sizeof *item, compare_strings);
    for (size_t i = 0; i < s->n; i++) {
        const char *from = item[i];
        item[i] = to;
        if (folder && from[0] != '/') to += sprintf(to, "%s/", folder);
        to = stpcpy(to, from) + 1;
    }
    return OK;
}

static int is_picture_name(const char *name) {
    const char *dot = strrchr(name, '.');
    return dot && (!strcasecmp(dot, ".png") || !strcasecmp(dot, ".jpg") || !strcasecmp(dot, ".jpeg"));
}

static int is_folder(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

/* out = a/b, or b alone when a is empty */
static Err join(char out[PATH_BYTES], const char *a, const char *b) {
    int n = snprintf(out, PATH_BYTES, "%s%s%s", a, *a ? "/" : "", b);
    return n < PATH_BYTES ? OK : err("%.100s...: a path longer than %d bytes", a, PATH_BYTES - 1);
}

static Err scan_folder(Names *s, const char *root, const char *below, int depth);

/* One folder entry: a sub-folder, a picture, or nothing to us. Symbolic links are followed. */
static Err scan_entry(Names *s, const char *root, const char *below, const char *name, int depth) {
    char relative[PATH_BYTES], path[PATH_BYTES];
    struct stat st;
    TRY(join(relative, below, name));
    TRY(join(path, root, relative));
    if (stat(path, &st) != 0) return is_picture_name(name) ? err("%s: %s", path, strerror(errno)) : OK;
    if (S_ISDIR(st.st_mode)) return scan_folder(s, root, relative, depth + 1);
    return S_ISREG(st.st_mode) && is_picture_name(name) ? names_add(s, relative, strlen(relative)) : OK;
}

/* Adds the pictures in root/below, named relative to root. Hidden files and folders are skipped. */
static Err scan_folder(Names *s, const char *root, const char *below, int depth) {
    char path[PATH_BYTES];
    TRY(join(path, root, below));
    if (depth > FOLDER_DEPTH) return err("%s: folders nested deeper than %d", path, FOLDER_DEPTH);
    DIR *dir = opendir(*below ? path : root);
    if (!dir) return err("%s: %s", path, strerror(errno));
    Err e = OK;
    for (struct dirent *entry; e == OK && (entry = readdir(dir));)
        if (entry->d_name[0] != '.') e = scan_entry(s, root, below, entry->d_name, depth);
    closedir(dir);
    return e;
}

/* Adds the paths in a list file; each must be there. `folder`: what relative ones are relative to. */
static Err scan_list(Names *s, const char *list, const char *folder) {
    uint8_t *bytes;
    size_t size;
    TRY(file_bytes(&bytes, &size, list, LIST_FILE_BYTES));
    Err e = memchr(bytes, 0, size) ? err("%s: is neither a folder nor a text file with one path a line", list) : OK;
    for (size_t at = 0, line = 1, end; at < size && e == OK; at = end + 1, line++) {
        for (end = at; end < size && bytes[end] != '\n';) end++;
        size_t length = end - at;
        if (length && bytes[end - 1] == '\r') length--;
        if (!length) continue;
        char name[PATH_BYTES], path[PATH_BYTES];
        struct stat st;
        if (length >= PATH_BYTES) {
            e = err("%s: line %zu: longer than %d bytes", list, line, PATH_BYTES - 1);
            break;
        }
        snprintf(name, sizeof name, "%.*s", (int)length, (const char *)bytes + at);
        e = join(path, name[0] == '/' ? "" : folder, name);
        if (e == OK && (stat(path, &st) != 0 || !S_ISREG(st.st_mode)))
            e = err("%s: line %zu: no picture at %s", list, line, path);
        if (e == OK) e = names_add(s, name, length);
    }
    free(bytes);
    return e;
}

/* 1 of HELD_OUT names, chosen by the name alone: adding pictures moves no other picture to the other side. */
static int name_is_held_out(const char *name) {
    uint64_t h = 0xcbf29ce484222325u; /* FNV-1a */
    for (; *name; name++) h = (h ^ (unsigned char)*name) * 0x100000001b3u;
    return (h >> 32) % HELD_OUT == 0;
}

/* The class part of "[train/|val/]class/rest" and its length; length 0: the picture lies in no sub-folder. */
static const char *class_part(size_t *length, const char *name, int split_folders) {
    if (split_folders) name = strchr(name, '/') + 1;
    const char *slash = strchr(name, '/');
    *length = slash ? (size_t)(slash - name) : 0;
    return name;
}

/* Class names of the whole set, both splits, so that ids agree between them. Pictures outside sub-folders make the
 * set unlabelled. name (n) is sorted. */
static Err find_classes(Dataset *d, char **name, size_t n, int split_folders) {
    Names found = {0};
    Err e = OK;
    const char *last = NULL;
    for (size_t i = 0, length; i < n && e == OK; i++) {
        const char *part = class_part(&length, name[i], split_folders);
        if (!length) {
            names_free(&found);
            return OK;
        }
        if (!last || strncmp(last, part, length + 1) != 0) e = names_add(&found, part, length);
        last = part;
    }
    if (e == OK) e = names_pack(&d->class_name, &found, NULL);
    for (size_t i = 0; i < found.n && e == OK; i++) /* a class occurs once per split folder */
        if (i == 0 || strcmp(d->class_name[i], d->class_name[d->n_classes - 1]) != 0)
            d->class_name[d->n_classes++] = d->class_name[i];
    names_free(&found);
    return e;
}

static int32_t class_of(const Dataset *d, const char *name, int split_folders) {
    char class_name[PATH_BYTES], *key = class_name;
    size_t length;
    const char *part = class_part(&length, name, split_folders);
    snprintf(class_name, sizeof class_name, "%.*s", (int)length, part);
    char **at = bsearch(&key, d->class_name, d->n_classes, sizeof *d->class_name, compare_strings);
    return at ? (int32_t)(at - d->class_name) : 0;
}

/* Is picture i of all n held out? Where a small set's names hash to none, the first is. */
static int is_held_out(char **all, size_t n, size_t i, int split_folders) {
    if (split_folders) return strncmp(all[i], "val/", 4) == 0;
    if (i > 0) return name_is_held_out(all[i]);
    for (size_t k = 1; k < n; k++)
        if (name_is_held_out(all[k])) return name_is_held_out(all[0]);
    return 1;
}

/* d = those of `all` that belong to the split; paths and labels. */
static Err dataset_select(Dataset *d, char **all, size_t n, const char *folder, Split split, int split_folders) {
    static const char *const what[] = {"", "training ", "validation "};
    Names chosen = {0};
    Err e = OK;
    for (size_t i = 0; i < n && e == OK; i++)
        if (split == SPLIT_ALL || is_held_out(all, n, i, split_folders) == (split == SPLIT_VAL))
            e = names_add(&chosen, all[i], strlen(all[i]));
    if (e == OK && !chosen.n) e = err("has no %spictures (.png, .jpg or .jpeg) among %zu", what[split], n);
    if (e == OK) e = names_pack(&d->path, &chosen, folder);
    if (e == OK) e = mem_alloc(&d->label, chosen.n, sizeof *d->label, "labels");
    if (e == OK) d->n = chosen.n;
    for (size_t i = 0; i < d->n && d->n_classes; i++)
        d->label[i] = class_of(d, chosen.text + chosen.start[i], split_folders); /* chosen is sorted as path is */
    names_free(&chosen);
    return e;
}

static Err dataset_scan(Dataset *d, const char *path, const char *folder, int is_list, Split split) {
    char train[PATH_BYTES], val[PATH_BYTES];
    TRY(join(train, folder, "train"));
    TRY(join(val, folder, "val"));
    int split_folders = !is_list && is_folder(train) && is_folder(val);
    Names found = {0};
    char **all = NULL;
    Err e;
    if (is_list)
        e = scan_list(&found, path, folder);
    else if (split_folders) {
        e = scan_folder(&found, folder, "train", 1);
        if (e == OK) e = scan_folder(&found, folder, "val", 1);
    } else
        e = scan_folder(&found, folder, "", 0);
    if (e == OK && found.n > INT32_MAX) e = err("%s: has %zu pictures; fewer than 2^31 expected", path, found.n);
    if (e == OK && !found.n) e = err("%s: has no pictures (.png, .jpg or .jpeg)", path);
    if (e == OK) e = names_pack(&all, &found, NULL);
    if (e == OK && !is_list) e = find_classes(d, all, found.n, split_folders);
    if (e == OK && dataset_select(d, all, found.n, folder, split, split_folders) != OK) e = err_in(path);
    free(all);
    names_free(&found);
    return e;
}

Err dataset_open(Dataset *d, const char *path, Split split) {
    *d = (Dataset){0};
    struct stat st;
    if (stat(path, &st) != 0) return err("%s: %s", path, strerror(errno));
    char folder[PATH_BYTES];
    TRY(join(folder, "", path));
    int is_list = !S_ISDIR(st.st_mode);
    char *slash = strrchr(folder, '/');
    if (is_list && slash)
        slash[slash == folder] = 0;
    else if (is_list)
        strcpy(folder, ".");
    else
        for (size_t n = strlen(folder); n > 1 && folder[n - 1] == '/'; n--) folder[n - 1] = 0;
    Err e = dataset_scan(d, path, folder, is_list, split);
    if (e != OK) dataset_close(d);
    return e;
}

void dataset_close(Dataset *d) {
    free(d->path);
    free(d->label);
    free(d->class_name);
    *d = (Dataset){0};
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

/* ------------------------------------------------------------------------------------------------------------
 * Batches ahead of time
 * ---------------------------------------------------------------------------------------------------------- */

/* Batch k lives in slot k % RING. The reader thread makes batches `made`, `made`+1, ... as long as their slot is
 * free; the consumer holds batch taken-1 until it asks for the next. lock guards the counters and flags; a slot's
 * contents belong to whichever side the counters say. Everything below `order` belongs to the reader alone. */
struct Loader {
    const Dataset *set; /* the caller's; must outlive the loader */
    LoaderConfig c;
    pthread_t thread;
    int started;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    uint64_t made, taken; /* batches since the start */
    int stop, failed;
    char message[ERR_MAX]; /* why the reader gave up */
    real *images;          /* (RING, B, 3, size, size) */
    int32_t *labels;       /* (RING, B) */
    uint32_t *order;       /* (n) of epoch order_epoch */
    uint64_t order_epoch;
    Image *cache; /* (n) resized pictures; empty: not kept */
    size_t cached_bytes;
};

/* *im = picture i resized, from memory if it was kept; *fresh: the caller must free it */
static Err loader_picture(Loader *l, size_t i, Image *im, int *fresh) {
    *fresh = 0;
    *im = l->cache[i];
    if (im->rgb) return OK;
    Image whole;
    TRY(image_read(&whole, l->set->path[i]));
    Err e = prep_resize(im, &whole, l->c.prep, l->c.size);
    image_free(&whole);
    if (e != OK) return err_in(l->set->path[i]);
    size_t bytes = im->H * im->W * 3;
    *fresh = bytes > CACHE_BYTES - l->cached_bytes;
    if (*fresh) return OK;
    l->cache[i] = *im;
    l->cached_bytes += bytes;
    return OK;
}

/* out (3,size,size), *label = example `position` of the endless sequence of epochs. */
static Err loader_example(Loader *l, uint64_t position, real *out, int32_t *label) {
    uint64_t epoch = position / l->set->n;
    size_t i = position % l->set->n;
    if (l->c.train && epoch != l->order_epoch) {
        epoch_order(l->order, l->set->n, l->c.seed, epoch);
        l->order_epoch = epoch;
    }
    if (l->c.train) i = l->order[i];
    uint64_t stream = rng_stream(RNG_CROP, epoch & 0xffffff, i);
    int crop = l->c.train && l->c.prep == PREP_IMAGENET;
    int may_flip = l->c.train && (l->c.flip || l->c.prep == PREP_LSUN);
    Image im;
    int fresh;
    TRY(loader_picture(l, i, &im, &fresh));
    prep_crop(out, &im, l->c.size, crop ? rng_uniform(l->c.seed, stream, 0) : -1,
              crop ? rng_uniform(l->c.seed, stream, 1) : -1, may_flip && rng_uniform(l->c.seed, stream, 2) < 0.5);
    if (fresh) image_free(&im);
    *label = l->set->label[i];
    return OK;
}

/* Batch k since the start into its slot. Looks at `stop` between pictures, so that stopping never waits long. */
static Err loader_batch(Loader *l, uint64_t k) {
    size_t B = l->c.B, image = 3 * l->c.size * l->c.size, slot = k % RING;
    for (size_t b = 0; b < B; b++) {
        pthread_mutex_lock(&l->lock);
        int stop = l->stop;
        pthread_mutex_unlock(&l->lock);
        if (stop) return OK;
        uint64_t position = (l->c.step + k) * B + b;
        TRY(loader_example(l, position, l->images + (slot * B + b) * image, l->labels + slot * B + b));
    }
    return OK;
}

static void *loader_thread(void *argument) {
    Loader *l = argument;
    pthread_mutex_lock(&l->lock);
    while (!l->stop && !l->failed) {
        uint64_t released = l->taken ? l->taken - 1 : 0;
        if (l->made - released == RING) {
            pthread_cond_wait(&l->changed, &l->lock);
            continue;
        }
        pthread_mutex_unlock(&l->lock);
        Err e = loader_batch(l, l->made); /* only this thread changes made */
        pthread_mutex_lock(&l->lock);
        if (e == OK)
            l->made++;
        else {
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
    TRY(size_mul(&reals, 3 * l->c.size * l->c.size, RING));
    TRY(size_mul(&reals, reals, l->c.B));
    TRY(mem_alloc(&l->images, reals, sizeof *l->images, "prefetched batches"));
    TRY(mem_alloc(&l->labels, l->c.B * RING, sizeof *l->labels, "prefetched labels"));
    TRY(mem_alloc(&l->order, n, sizeof *l->order, "the order of an epoch"));
    TRY(mem_alloc(&l->cache, n, sizeof *l->cache, "the picture cache"));
    l->order_epoch = UINT64_MAX; /* none yet */
    return OK;
}

Err loader_start(Loader **out, const Dataset *d, const LoaderConfig *c) {
    *out = NULL;
    if (d->n < 1 || d->n > INT32_MAX) return err("a loader over %zu pictures", d->n);
    if (c->B < 1 || c->B > 1 << 20) return err("batch %zu: 1..%d expected", c->B, 1 << 20);
    if (c->size < 1 || c->size > IMAGE_MAX_SIDE) return err("size %zu: 1..%d expected", c->size, IMAGE_MAX_SIDE);
    if (c->step > UINT64_MAX / 4 / c->B) return err("step %ju is out of range", (uintmax_t)c->step);
    Loader *l;
    TRY(mem_alloc(&l, 1, sizeof *l, "a loader"));
    l->set = d;
    l->c = *c;
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->changed, NULL);
    Err e = loader_alloc(l);
    if (e == OK) {
        int failure = pthread_create(&l->thread, NULL, loader_thread, l);
        if (failure) e = err("starting the reader thread: %s", strerror(failure));
        l->started = !failure;
    }
    if (e == OK)
        *out = l;
    else
        loader_stop(l);
    return e;
}

Err loader_next(Loader *l, const real **images, const int32_t **labels) {
    pthread_mutex_lock(&l->lock);
    uint64_t k = l->taken;
    int there;
    l->taken++; /* releases the batch handed out before */
    pthread_cond_broadcast(&l->changed);
    while (!(there = l->made > k) && !l->failed) pthread_cond_wait(&l->changed, &l->lock);
    if (!there) l->taken = k;
    pthread_mutex_unlock(&l->lock);
    if (!there) return err("%s", l->message);
    size_t B = l->c.B, slot = k % RING;
    *images = l->images + slot * B * 3 * l->c.size * l->c.size;
    *labels = l->labels + slot * B;
    return OK;
}

void loader_stop(Loader *l) {
    if (!l) return;
    pthread_mutex_lock(&l->lock);
    l->stop = 1;
    pthread_cond_broadcast(&l->changed);
    pthread_mutex_unlock(&l->lock);
    if (l->started) pthread_join(l->thread, NULL);
    for (size_t i = 0; l->cache && i < l->set->n; i++) image_free(&l->cache[i]);
    pthread_cond_destroy(&l->changed);
    pthread_mutex_destroy(&l->lock);
    free(l->images);
    free(l->labels);
    free(l->order);
    free(l->cache);
    free(l);
}
