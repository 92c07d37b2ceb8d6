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

enum { FOLDER_DEPTH = 64, SNIFF_BYTES = 160 /* enough to tell a picture or an LMDB */ };

static const char IMAGENET_LEFT_OUT[] = "n06596364_9591.JPEG"; /* the official code leaves it out (SPEC section 10) */

void left_out_note(LeftOut *x, OutReason why, const char *name) {
    if (x->n[why]++ == 0) snprintf(x->first[why], sizeof x->first[why], "%.255s", name);
}

void left_out_text(char text[ERR_MAX], const LeftOut *x) {
    static const char *const reason[OUT_REASONS] = {
        [OUT_FOREIGN] = "BMP, TIFF, GIF, HEIC or AVIF",
        [OUT_OTHER] = "no picture",
        [OUT_SYSTEM] = "hidden or the system's",
        [OUT_TEMPORARY] = "temporary",
        [OUT_LINK] = "a link to nothing",
        [OUT_CIRCLE] = "a link in a circle",
        [OUT_CLOSED] = "without permission to read",
        [OUT_STRAY] = "beside the class folders",
        [OUT_BESIDE] = "beside the split's two folders",
        [OUT_OFFICIAL] = "left out by the official code",
    };
    size_t length = 0;
    text[0] = 0;
    for (int i = 0; i < OUT_REASONS && length < ERR_MAX; i++)
        if (x->n[i])
            length += (size_t)snprintf(text + length, ERR_MAX - length, "%s%zu %s (such as %.200s)", length ? ", " : "",
                                       x->n[i], reason[i], x->first[i]);
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

/* A picture that we do not read */
static int is_foreign(const uint8_t *b, size_t n) {
    static const char *const brand[] = {"heic", "heix", "hevc", "mif1", "msf1", "avif", "avis"};
    if (n >= 14 && !memcmp(b, "BM", 2) && !memcmp(b + 6, "\0\0\0\0", 4)) return 1;
    if (n >= 8 && (!memcmp(b, "II*\0", 4) || !memcmp(b, "MM\0*", 4) || !memcmp(b, "GIF8", 4))) return 1;
    for (size_t i = 0; n >= 12 && !memcmp(b + 4, "ftyp", 4) && i < sizeof brand / sizeof *brand; i++)
        if (!memcmp(b + 8, brand[i], 4)) return 1;
    return 0;
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
    left_out_note(w->out, is_foreign(bytes, n) ? OUT_FOREIGN : OUT_OTHER, relative);
    return OK;
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
