/* damage.c - what became of a set's pictures as they were read: which could not be, and of which only a part is used. */
#include "files/files.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MET_DAMAGED = 1, MET_NOTED = 2, NOTES = 4, LIST_FILE_BYTES = 1 << 30 };

struct Damage {
    pthread_mutex_t lock;
    uint8_t *met; /* (n) MET_* */
    Names lines;  /* path, tab, why */
    struct {
        const char *note; /* Image.note */
        size_t n;
        char first[PATH_BYTES];
    } noted[NOTES];
};

Err damage_create(Damage **out, size_t n) {
    Damage *x;
    TRY(mem_alloc(&x, 1, sizeof *x, "the list of damaged pictures"));
    *out = x;
    pthread_mutex_init(&x->lock, NULL);
    return mem_alloc(&x->met, n, 1, "the list of damaged pictures");
}

void damage_free(Damage *x) {
    if (!x) return;
    pthread_mutex_destroy(&x->lock);
    free(x->met);
    names_free(&x->lines);
    free(x);
}

Err damage_note(Damage *x, size_t i, const char *path) {
    char line[PATH_BYTES + ERR_MAX];
    const char *why = err_text();
    if (!strncmp(why, path, strlen(path)) && !strncmp(why + strlen(path), ": ", 2)) why += strlen(path) + 2;
    int n = snprintf(line, sizeof line, "%s\t%s", path, why);
    for (int k = 0; k < n; k++)
        if (line[k] == '\n') line[k] = '?';
    pthread_mutex_lock(&x->lock);
    Err e = x->met[i] & MET_DAMAGED ? OK : names_add(&x->lines, line, (size_t)n, 0, 0);
    x->met[i] |= MET_DAMAGED;
    pthread_mutex_unlock(&x->lock);
    return e;
}

void damage_note_part(Damage *x, size_t i, const char *path, const char *note) {
    pthread_mutex_lock(&x->lock);
    for (size_t k = 0; k < NOTES && !(x->met[i] & MET_NOTED); k++) {
        if (x->noted[k].note && x->noted[k].note != note) continue;
        x->noted[k].note = note;
        if (x->noted[k].n++ == 0) snprintf(x->noted[k].first, PATH_BYTES, "%s", path);
        x->met[i] |= MET_NOTED;
    }
    pthread_mutex_unlock(&x->lock);
}

int damage_known(Damage *x, size_t i) {
    pthread_mutex_lock(&x->lock);
    int met = x->met[i] & MET_DAMAGED;
    pthread_mutex_unlock(&x->lock);
    return met;
}

size_t damage_count(Damage *x) {
    pthread_mutex_lock(&x->lock);
    size_t n = x->lines.n;
    pthread_mutex_unlock(&x->lock);
    return n;
}

void damage_text(char text[ERR_MAX], Damage *x, int damaged) {
    size_t length = 0;
    text[0] = 0;
    pthread_mutex_lock(&x->lock);
    const char *line = x->lines.n ? x->lines.text + x->lines.item[0].start : "", *tab = strchr(line, '\t');
    if (tab && damaged)
        length = (size_t)snprintf(text, 900, "%zu cannot be read (such as %.*s: %.300s)", x->lines.n,
                                  (int)min_size((size_t)(tab - line), 500), line, tab + 1);
    for (size_t k = 0; k < NOTES && x->noted[k].n; k++)
        length += (size_t)snprintf(text + length, 900, "%s%zu %s (such as %.500s)", length ? ", " : "", x->noted[k].n,
                                   x->noted[k].note, x->noted[k].first);
    pthread_mutex_unlock(&x->lock);
    make_printable(text);
}

/* s += the lines of a file, if it is there */
static Err add_lines(Names *s, const char *path) {
    uint8_t *bytes;
    size_t size;
    int empty = 0;
    if (access(path, F_OK) != 0) return OK;
    if (file_bytes(&bytes, &size, path, LIST_FILE_BYTES, &empty) != OK) return empty ? OK : FAILED;
    const char *at = (const char *)bytes, *end = at + size;
    Err e = OK;
    for (size_t n; at < end && e == OK; at += n + 1) {
        const char *stop = memchr(at, '\n', (size_t)(end - at));
        n = (size_t)((stop ? stop : end) - at);
        if (n) e = names_add(s, at, n, 0, 0);
    }
    free(bytes);
    return e;
}

Err damage_write(Damage *x, const char *path) {
    Names all = {0};
    AtomicFile f;
    Err e = add_lines(&all, path);
    size_t before = all.n;
    pthread_mutex_lock(&x->lock);
    for (size_t i = 0; i < x->lines.n && e == OK; i++) {
        const char *line = x->lines.text + x->lines.item[i].start;
        e = names_add(&all, line, strlen(line), 0, 0);
    }
    pthread_mutex_unlock(&x->lock);
    if (e == OK && all.n > before && (e = atomic_open(&f, path)) == OK) {
        names_sort(&all, names_in_byte_order);
        for (size_t i = 0; i < all.n && e == OK; i++) {
            if (i > 0 && !strcmp(all.item[i].name, all.item[i - 1].name)) continue;
            e = atomic_write(&f, all.item[i].name, strlen(all.item[i].name));
            if (e == OK) e = atomic_write(&f, "\n", 1);
        }
        e = atomic_close(&f, e);
    }
    names_free(&all);
    return e;
}
