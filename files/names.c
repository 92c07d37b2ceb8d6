/* names.c - a growing list of names: kept in one text, sorted, packed. */
#include "files/files.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

Err names_add(Names *s, const char *name, size_t length, uint64_t bytes, int mark) {
    TRY(mem_grow(&s->text, s->used, length + 1, &s->room, 1, "file names"));
    TRY(mem_grow(&s->item, s->n, 1, &s->capacity, sizeof *s->item, "file names"));
    memcpy(s->text + s->used, name, length);
    s->text[s->used + length] = 0;
    s->item[s->n++] = (Listed){s->used, NULL, bytes, mark};
    s->used += length + 1;
    return OK;
}

void names_free(Names *s) {
    free(s->text);
    free(s->item);
    *s = (Names){0};
}

int names_in_byte_order(const void *a, const void *b) {
    return strcmp(((const Listed *)a)->name, ((const Listed *)b)->name);
}

/* The last part of a name without its extension: what lists and files agree in. */
static const char *stem_of(size_t *length, const char *name) {
    const char *slash = strrchr(name, '/'), *stem = slash ? slash + 1 : name, *dot = strrchr(stem, '.');
    *length = dot && dot != stem ? (size_t)(dot - stem) : strlen(stem);
    return stem;
}

int names_by_stem(const void *a, const void *b) {
    size_t n, m;
    const char *p = stem_of(&n, ((const Listed *)a)->name), *q = stem_of(&m, ((const Listed *)b)->name);
    int order = memcmp(p, q, n < m ? n : m);
    return order ? order : (n > m) - (n < m);
}

void names_sort(Names *s, int (*compare)(const void *, const void *)) {
    for (size_t i = 0; i < s->n; i++) s->item[i].name = s->text + s->item[i].start;
    if (s->n) qsort(s->item, s->n, sizeof *s->item, compare);
}

Err names_pack(char ***out, const Names *s, const char *folder) {
    size_t prefix = folder ? strlen(folder) + 1 : 0, bytes;
    TRY(size_mul(&bytes, s->n, sizeof(char *) + prefix));
    TRY(mem_alloc(out, bytes + s->used, 1, "file names"));
    char *to = (char *)(*out + s->n);
    for (size_t i = 0; i < s->n; i++) {
        (*out)[i] = to;
        if (folder && s->item[i].name[0] != '/') to += sprintf(to, "%s/", folder);
        to = stpcpy(to, s->item[i].name) + 1;
    }
    return OK;
}
