/* atomic.c - files written whole or not at all, and read whole. */
#include "files/files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static _Thread_local int io_errno; /* of the last file written; 0: it went well so far */

/* What is written next is tried for the first time. */
static void io_begin(void) {
    io_errno = 0;
}

Err io_error(const char *path, const char *doing) {
    io_errno = errno;
    return err("%s: cannot %s: %s", path, doing, strerror(errno));
}

/* ---- Temporary files: NAME.tmpPID-TRY beside NAME, locked by the process that writes ---- */

int file_lock(int fd) {
    int code;
    while ((code = flock(fd, LOCK_EX | LOCK_NB)) != 0 && errno == EINTR) continue;
    return code == 0 ? 1 : errno == EWOULDBLOCK ? 0 : -1;
}

/* The process whose temporary file this is, and *length of NAME; 0: it is no such file. */
static long temporary_of(size_t *length, const char *name) {
    const char *last = NULL;
    char *end;
    for (const char *p = name; (p = strstr(p, ".tmp")) != NULL; p += 4) last = p;
    if (!last || last[4] < '1' || last[4] > '9') return 0;
    *length = (size_t)(last - name);
    const long pid = strtol(last + 4, &end, 10);
    if (*end == '-') end += 1 + strspn(end + 1, "0123456789");
    return *end ? 0 : pid;
}

/* A file of our own number that nobody has locked was left by a process before us: in a container numbers are few. */
size_t temporary_left(const char *folder, const char *name) {
    char path[PATH_BYTES];
    size_t length = 0;
    struct stat st;
    const long pid = temporary_of(&length, name);
    if (pid <= 0 || (pid != (long)getpid() && (kill((pid_t)pid, 0) == 0 || errno != ESRCH))) return 0;
    if (path_make(path, "%s/%s", folder, name) != OK) return 0;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0) return 0;
    const int held = fstat(fd, &st) != 0 || !S_ISREG(st.st_mode) || file_lock(fd) == 0;
    close(fd);
    return held ? 0 : length;
}

/* The folder that a path lies in */
static void folder_of(char folder[PATH_BYTES], const char *path) {
    const char *slash = strrchr(path, '/');
    const int length = slash ? (int)(slash - path) + 1 : 0;
    snprintf(folder, PATH_BYTES, "%.*s", length ? length : 1, length ? path : ".");
}

/* What lay in a folder, among thousands of pictures maybe, when this process first wrote there: names that temporary files
 * have. Whatever a process leaves behind later, the next one finds. */
typedef struct {
    dev_t device;
    ino_t inode;
    int known;
    Names name;
} Looked;
enum { LOOKED_MAX = 16 }; /* folders; with more, one is looked at again */
static Looked looked[LOOKED_MAX];
static size_t looked_next;
static pthread_mutex_t looked_lock = PTHREAD_MUTEX_INITIALIZER;

static void look(Looked *x, const char *folder, const struct stat *st) {
    size_t length;
    DIR *list = opendir(folder);
    Err e = list ? OK : FAILED;
    names_free(&x->name);
    for (const struct dirent *f; e == OK && (f = readdir(list)) != NULL;)
        if (temporary_of(&length, f->d_name) > 0) e = names_add(&x->name, f->d_name, strlen(f->d_name), length, 0);
    if (list) closedir(list);
    x->device = st->st_dev, x->inode = st->st_ino, x->known = e == OK;
}

static Looked *looked_at(const char *folder) {
    struct stat st;
    if (stat(folder, &st) != 0) return NULL;
    for (size_t i = 0; i < LOOKED_MAX; i++)
        if (looked[i].known && looked[i].device == st.st_dev && looked[i].inode == st.st_ino) return &looked[i];
    Looked *x = &looked[looked_next++ % LOOKED_MAX];
    look(x, folder, &st);
    return x;
}

/* Removes the temporary files of this path that killed processes left. */
static void remove_left(const char *path) {
    char folder[PATH_BYTES], whole[PATH_BYTES];
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    const size_t length = strlen(name);
    folder_of(folder, path);
    pthread_mutex_lock(&looked_lock);
    const Looked *x = looked_at(folder);
    for (size_t i = 0; x && i < x->name.n; i++) {
        const Listed *one = &x->name.item[i];
        const char *left = x->name.text + one->start;
        if (one->bytes == length && !strncmp(left, name, length) && temporary_left(folder, left) == length &&
            path_make(whole, "%s/%s", folder, left) == OK)
            unlink(whole);
    }
    pthread_mutex_unlock(&looked_lock);
}

/* A new file beside f->path, on the same file system, so that rename can replace one by the other. One that was taken
 * for a leaving before it was locked is gone: another try. */
static int open_temporary(AtomicFile *f) {
    struct stat st;
    for (int try = 0; try < 100; try++) {
        int n = snprintf(f->temporary, sizeof f->temporary, "%s.tmp%ld-%d", f->path, (long)getpid(), try);
        if (n < 0 || (size_t)n >= sizeof f->temporary) {
            errno = ENAMETOOLONG;
            return -1;
        }
        int fd = open(f->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (fd < 0 && errno == EEXIST) continue;
        if (fd < 0 || (file_lock(fd) != 0 && fstat(fd, &st) == 0 && st.st_nlink > 0)) return fd;
        close(fd);
    }
    errno = EEXIST;
    return -1;
}

/* ---- Writing ---- */

typedef struct { /* an AtomicFile's; a call that a signal interrupts is made again, which stdio cannot do */
    int fd;
    size_t n;
    uint8_t bytes[1 << 16];
} Output;

static int write_all(int fd, const uint8_t *bytes, size_t size) {
    while (size) {
        const ssize_t put = write(fd, bytes, size);
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) return -1;
        bytes += put, size -= (size_t)put;
    }
    return 0;
}

static int flush(Output *o) {
    const size_t n = o->n;
    o->n = 0;
    return write_all(o->fd, o->bytes, n);
}

static int sync_disk(int fd) {
    int code;
    while ((code = fsync(fd)) != 0 && errno == EINTR) continue;
    return code;
}

/* An interrupted close has closed. */
static int close_file(int fd) {
    return close(fd) == 0 || errno == EINTR ? 0 : -1;
}

/* Removes the temporary; safe after a failure or twice. */
static void atomic_abandon(AtomicFile *f) {
    Output *o = f->output;
    if (o) close(o->fd);
    free(o);
    if (f->temporary[0]) unlink(f->temporary);
    f->output = NULL;
    f->temporary[0] = 0;
}

/* Devices and pipes (/dev/stdout, /dev/full) are written directly: there is nothing to replace. A symbolic link stays,
 * the file behind it is replaced. */
Err atomic_open(AtomicFile *f, const char *path) {
    *f = (AtomicFile){0};
    io_begin();
    struct stat st;
    int exists = stat(path, &st) == 0, direct = exists && !S_ISREG(st.st_mode);
    if (!exists && errno != ENOENT && errno != ENOTDIR) return io_error(path, "write");
    if (exists && S_ISDIR(st.st_mode)) return err("%s: is a directory, expected a file to write", path);

    char *behind = exists && !direct ? realpath(path, NULL) : NULL;
    const Err fits = path_make(f->path, "%s", behind ? behind : path);
    free(behind);
    TRY(fits);

    Output *o = malloc(sizeof *o);
    if (!o) return err("%s: no memory for writing it", path);
    if (!direct) remove_left(f->path);
    o->n = 0;
    o->fd = direct ? open(path, O_WRONLY | O_CLOEXEC) : open_temporary(f);
    if (o->fd < 0) {
        f->temporary[0] = 0; /* whatever has that name, we did not make it */
        io_error(path, "write");
        free(o);
        return FAILED;
    }
    if (exists && !direct) fchmod(o->fd, st.st_mode & 0777); /* who may read the file stays as it was */
    f->output = o;
    return OK;
}

Err atomic_write(AtomicFile *f, const void *data, size_t bytes) {
    Output *o = f->output;
    if (!o) return err("%s: is not open for writing", f->path);
    int code = 0;
    if (bytes > sizeof o->bytes - o->n) code = flush(o);
    if (bytes > sizeof o->bytes) {
        if (code == 0) code = write_all(o->fd, data, bytes);
    } else if (bytes) {
        memcpy(o->bytes + o->n, data, bytes);
        o->n += bytes;
    }
    if (code == 0) return OK;
    io_error(f->path, "write");
    atomic_abandon(f);
    return FAILED;
}

/* Makes a rename last through a power cut. Not every file system can; the file is whole either way. */
static void sync_folder(const char *path) {
    char folder[PATH_BYTES];
    folder_of(folder, path);
    int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return;
    fsync(fd);
    close(fd);
}

/* The temporary takes the file's place. */
static Err atomic_commit(AtomicFile *f) {
    Output *o = f->output;
    if (!o) return err("%s: is not open for writing", f->path);
    const int direct = f->temporary[0] == 0;
    Err e = OK;
    if (flush(o) != 0) e = io_error(f->path, "write");
    if (e == OK && !direct && sync_disk(o->fd) != 0) e = io_error(f->path, "write to the disk");
    if (close_file(o->fd) != 0 && e == OK) e = io_error(f->path, "close");
    free(o);
    f->output = NULL;
    if (e == OK && !direct && rename(f->temporary, f->path) != 0) e = io_error(f->path, "replace");
    if (e != OK) {
        atomic_abandon(f);
        return e;
    }
    if (!direct) sync_folder(f->path);
    f->temporary[0] = 0;
    return OK;
}

Err atomic_close(AtomicFile *f, Err e) {
    if (e == OK) return atomic_commit(f);
    atomic_abandon(f);
    return e;
}

int disk_full(void) {
    return io_errno == ENOSPC || io_errno == EDQUOT || io_errno == EFBIG;
}

Err file_append(const char *path, const void *data, size_t bytes) {
    struct stat before;
    io_begin();
    int fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0) return io_error(path, "open");
    Err e = fstat(fd, &before) == 0 ? OK : io_error(path, "read");
    if (e == OK && write_all(fd, data, bytes) != 0) {
        e = io_error(path, "write");
        if (ftruncate(fd, before.st_size) != 0) err("%s; and the beginning of it stays there", err_text());
    }
    if (close_file(fd) != 0 && e == OK) e = io_error(path, "close");
    return e;
}

Err file_write_at(int fd, const char *path, const void *data, size_t bytes, uint64_t at) {
    io_begin();
    for (const uint8_t *p = data; bytes;) {
        const ssize_t put = pwrite(fd, p, bytes, (off_t)at);
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) return io_error(path, "write");
        p += put, at += (uint64_t)put, bytes -= (size_t)put;
    }
    return OK;
}

Err file_checksum(uint64_t *out, const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f) return io_error(path, "open");
    unsigned char block[16384];
    uint64_t h = FNV_START;
    for (size_t n; (n = fread(block, 1, sizeof block, f)) > 0;) h = fnv1a(h, block, n);
    Err e = ferror(f) ? io_error(path, "read") : OK;
    fclose(f);
    *out = h;
    return e;
}

/* ---- Reading ---- */

Err read_exactly(int fd, const char *path, uint8_t *bytes, size_t size) {
    for (size_t at = 0; at < size;) {
        ssize_t got = read(fd, bytes + at, size - at);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return err("%s: %s", path, strerror(errno));
        if (got == 0) return err("%s: ends after %zu bytes, expected %zu", path, at, size);
        at += (size_t)got;
    }
    return OK;
}

Err file_open(int *fd, size_t *size, const char *path) {
    struct stat st;
    *size = 0;
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe that nobody writes would hold us for ever */
    if (*fd < 0) return err("%s: %s", path, strerror(errno));
    Err e = OK;
    if (fstat(*fd, &st) != 0)
        e = err("%s: cannot read: %s", path, strerror(errno));
    else if (S_ISDIR(st.st_mode))
        e = err("%s: is a folder, not a regular file", path);
    else if (!S_ISREG(st.st_mode))
        e = err("%s: is a device or a pipe, not a regular file", path);
    else if ((uintmax_t)st.st_size > SIZE_MAX - 1)
        e = err("%s: is too large for this machine", path);
    if (e != OK) close(*fd);
    *size = e == OK ? (size_t)st.st_size : 0;
    return e;
}

Err file_bytes(uint8_t **bytes, size_t *size, const char *path, size_t most, int *empty) {
    int fd;
    *bytes = NULL;
    if (empty) *empty = 0;
    TRY(file_open(&fd, size, path));
    if (empty) *empty = *size == 0;
    Err e = *size == 0     ? err("%s: is empty", path)
            : *size > most ? err("%s: has %zu bytes; at most %zu are read", path, *size, most)
                           : mem_alloc(bytes, *size + 1, 1, path);
    if (e == OK) e = read_exactly(fd, path, *bytes, *size);
    close(fd);
    if (e == OK) return OK;
    free(*bytes);
    *bytes = NULL;
    return e;
}

static const char BYTE_ORDER_MARK[] = "\xEF\xBB\xBF";

Err file_text(char **text, const char *path, size_t most) {
    uint8_t *bytes;
    size_t size;
    TRY(file_bytes(&bytes, &size, path, most, NULL));
    *text = (char *)bytes;
    if (strlen(*text) == size) {
        if (!strncmp(*text, BYTE_ORDER_MARK, 3)) memmove(*text, *text + 3, size - 2);
        return OK;
    }
    free(*text);
    *text = NULL;
    return err("%s: holds zero bytes, a text expected", path);
}
