/* folder.c - the pictures and LMDBs in a folder, and what lies beside them and is left out.
 *
 * Folders of real disks hold more than pictures: thumbnails of a NAS, links that lead nowhere or in circles, halves of
 * downloads, what nobody may read. None of it ends a run, and none is passed over without being counted. An error of
 * the disk is no end of a folder: it stops the search. */
#include "files/files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    FOLDER_DEPTH = 64,
    SNIFF_BYTES = 160, /* enough to tell a picture or an LMDB */
    CHECKED = 20000    /* of more files, extensions are believed */
};

static const char IMAGENET_LEFT_OUT[] = "n06596364_9591.JPEG"; /* the official code leaves it out (SPEC section 10) */

void left_out_note(LeftOut *x, OutReason why, const char *name) {
    if (x->n[why]++ == 0) snprintf(x->first[why], sizeof x->first[why], "%.255s", name);
}

void left_out_kind(LeftOut *x, OutReason why, const char *kind, const char *name) {
    left_out_note(x, why, name);
    for (int k = 0; k < OUT_KINDS; k++) {
        if (x->kind[k].n && strcmp(x->kind[k].what, kind) != 0) continue;
        if (x->kind[k].n++ == 0) {
            snprintf(x->kind[k].what, sizeof x->kind[k].what, "%s", kind);
            snprintf(x->kind[k].first, sizeof x->kind[k].first, "%.255s", name);
        }
        return;
    }
}

/* *length += a part of text: how many, of what, an example */
static void add_text(char text[ERR_MAX], size_t *length, size_t n, const char *what, const char *more,
                     const char *first) {
    if (!n || *length >= ERR_MAX) return;
    *length += (size_t)snprintf(text + *length, ERR_MAX - *length, "%s%zu %s%s%s (such as %.200s)", *length ? ", " : "",
                                n, what, more, *more && n > 1 ? "s" : "", first);
}

void left_out_text(char text[ERR_MAX], const LeftOut *x) {
    static const char *const reason[OUT_REASONS] = {
        [OUT_SYSTEM] = "hidden or the system's",
        [OUT_TEMPORARY] = "temporary",
        [OUT_LINK] = "a link to nothing",
        [OUT_CIRCLE] = "a link in a circle",
        [OUT_CLOSED] = "without permission to read",
        [OUT_STRAY] = "beside the class folders",
        [OUT_BESIDE] = "beside the split's two folders",
        [OUT_OFFICIAL] = "left out by the official code",
    };
    size_t length = 0, of_kind = 0;
    text[0] = 0;
    for (int k = 0; k < OUT_KINDS; k++) {
        add_text(text, &length, x->kind[k].n, x->kind[k].what, " file", x->kind[k].first);
        of_kind += x->kind[k].n;
    }
    const size_t others = x->n[OUT_FOREIGN] + x->n[OUT_OTHER] - of_kind;
    add_text(text, &length, others, "no picture", "", x->first[x->n[OUT_OTHER] ? OUT_OTHER : OUT_FOREIGN]);
    for (int i = OUT_OTHER + 1; i < OUT_REASONS; i++) add_text(text, &length, x->n[i], reason[i], "", x->first[i]);
    make_printable(text);
}

Err file_start(uint8_t *bytes, size_t most, size_t *n, const char *path) {
    *n = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return err("%s: %s", path, strerror(errno));
    ssize_t got = read(fd, bytes, most);
    int code = errno;
    close(fd);
    if (got < 0) return err("%s: %s", path, strerror(code));
    *n = (size_t)got;
    return OK;
}

/* ---- What a name or the first bytes say ---- */

static int ends_in_one_of(const char *name, const char *const *end, size_t n) {
    const size_t length = strlen(name);
    for (size_t i = 0; i < n; i++) {
        const size_t m = strlen(end[i]);
        if (length > m && !strcasecmp(name + length - m, end[i])) return 1;
    }
    return 0;
}

static int is_temporary(const char *name) {
    static const char *const end[] = {"~", ".part", ".partial", ".tmp", ".temp", ".crdownload", ".download", ".swp"};
    return ends_in_one_of(name, end, sizeof end / sizeof *end);
}

static int is_of_system(const char *name) {
    static const char *const known[] = {
        "@eaDir",      "lost+found", "__MACOSX", "Thumbs.db",          "ehthumbs.db",
        "desktop.ini", "#recycle",   "@Recycle", "$RECYCLE.BIN",       "RECYCLER",
        "@__thumb",    "#snapshot",  "@tmp",     "@Recently-Snapshot", "System Volume Information"};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcasecmp(name, known[i])) return 1;
    return name[0] == '.';
}

/* One of a kind that is none of our pictures */
static void note_kind(LeftOut *out, FileKind kind, const char *what, const char *name) {
    const OutReason why = kind == FILE_FOREIGN ? OUT_FOREIGN : OUT_OTHER;
    if (kind == FILE_UNKNOWN)
        left_out_note(out, why, name);
    else
        left_out_kind(out, why, what, name);
}

/* ---- The walk ---- */

typedef struct {
    const char *root;
    LeftOut *out;
    FolderTake *take;
    void *context;
    dev_t dev[FOLDER_DEPTH]; /* the folders that we are in */
    ino_t ino[FOLDER_DEPTH];
} Walk;

/* Somebody's file that is not there or not ours to read is left out; any other error stops. */
static Err leave_out(Walk *w, const char *relative, const char *path, int code) {
    const int nowhere = code == ENOENT || code == ELOOP || code == ENOTDIR;
    if (!nowhere && code != EACCES && code != EPERM) return err("%s: %s", path, strerror(code));
    left_out_note(w->out, nowhere ? OUT_LINK : OUT_CLOSED, relative);
    return OK;
}

/* Extensions of pictures are believed, which spares opening a million files; else the content says. */
static Err walk_file(Walk *w, const char *relative, const char *path, const char *name, uint64_t size) {
    static const char *const extension[] = {".png", ".jpg", ".jpeg", ".webp"};
    const char *what;
    uint8_t bytes[SNIFF_BYTES];
    size_t n;
    if (!strcmp(name, DATA_MDB)) return w->take(w->context, relative, size, 1);
    if (!strcmp(name, IMAGENET_LEFT_OUT)) return left_out_note(w->out, OUT_OFFICIAL, relative), OK;
    if (is_temporary(name)) return left_out_note(w->out, OUT_TEMPORARY, relative), OK;
    if (ends_in_one_of(name, extension, sizeof extension / sizeof *extension))
        return w->take(w->context, relative, size, 0);
    errno = 0;
    if (file_start(bytes, sizeof bytes, &n, path) != OK) return leave_out(w, relative, path, errno);
    if (is_picture(bytes, n)) return w->take(w->context, relative, size, 0);
    const FileKind kind = file_kind(&what, bytes, n);
    return note_kind(w->out, kind, what, relative), OK;
}

static Err walk_folder(Walk *w, const char *below, const struct stat *st, int depth);

/* A sub-folder, a picture, an LMDB, or nothing to us. Symbolic links are followed. */
static Err walk_entry(Walk *w, const char *below, const char *name, int depth) {
    char relative[PATH_BYTES], path[PATH_BYTES];
    struct stat st;
    TRY(path_make(relative, "%s%s%s", below, *below ? "/" : "", name));
    TRY(path_make(path, "%s/%s", w->root, relative));
    if (is_of_system(name)) return left_out_note(w->out, OUT_SYSTEM, relative), OK;
    if (stat(path, &st) != 0) return leave_out(w, relative, path, errno);
    if (S_ISREG(st.st_mode)) return walk_file(w, relative, path, name, (uint64_t)st.st_size);
    if (!S_ISDIR(st.st_mode)) return left_out_note(w->out, OUT_OTHER, relative), OK;
    for (int i = 0; i <= depth; i++)
        if (w->dev[i] == st.st_dev && w->ino[i] == st.st_ino) return left_out_note(w->out, OUT_CIRCLE, relative), OK;
    return walk_folder(w, relative, &st, depth + 1);
}

static Err walk_folder(Walk *w, const char *below, const struct stat *st, int depth) {
    char path[PATH_BYTES];
    TRY(path_make(path, "%s%s%s", w->root, *below ? "/" : "", below));
    if (depth == FOLDER_DEPTH) return err("%s: folders nested deeper than %d", path, FOLDER_DEPTH);
    w->dev[depth] = st->st_dev, w->ino[depth] = st->st_ino;
    DIR *dir = opendir(path);
    if (!dir) return depth ? leave_out(w, below, path, errno) : err("%s: %s", path, strerror(errno));
    Err e = OK;
    while (e == OK) {
        errno = 0;
        const struct dirent *entry = readdir(dir);
        if (!entry) {
            if (errno) e = err("%s: cannot list it: %s", path, strerror(errno));
            break;
        }
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..")) e = walk_entry(w, below, entry->d_name, depth);
    }
    closedir(dir);
    return e;
}

Err folder_search(const char *root, LeftOut *out, FolderTake *take, void *context) {
    Walk w = {.root = root, .out = out, .take = take, .context = context};
    struct stat st;
    if (stat(root, &st) != 0) return err("%s: %s", root, strerror(errno));
    return walk_folder(&w, "", &st, 0);
}

Err folder_check(Names *all, const char *root, LeftOut *out) {
    Names kept = {0};
    Err e = OK;
    if (all->n > CHECKED) return OK;
    for (size_t i = 0; i < all->n && e == OK; i++) {
        const Listed *item = &all->item[i];
        const char *what;
        char path[PATH_BYTES];
        uint8_t bytes[SNIFF_BYTES];
        size_t n;
        FileKind kind = FILE_UNKNOWN;
        e = path_make(path, "%s%s%s", item->name[0] == '/' ? "" : root, item->name[0] == '/' ? "" : "/", item->name);
        if (e == OK && file_start(bytes, sizeof bytes, &n, path) == OK) kind = file_kind(&what, bytes, n);
        if (kind == FILE_FOREIGN || kind == FILE_OTHER)
            note_kind(out, kind, what, item->name);
        else if (e == OK)
            e = names_add(&kept, item->name, strlen(item->name), item->bytes, item->mark);
    }
    names_free(all);
    *all = kept;
    names_sort(all, names_in_byte_order);
    return e;
}
