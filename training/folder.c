/* folder.c - the run's folder: paths in it, its list of damaged pictures, writing when its disk is full, what a killed
 * run left in it.
 *
 * One at a time. A run has a lock, so that no two ./train write into it.
 *
 * Full disks. Whatever is written is tried again until there is room (retry_when_full): a run of days should not end
 * because somebody else filled the disk for an hour. */
#include "training/stage.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

void say_once(const char *fmt, ...) {
    va_list args;
    if (rank() > 0) return;
    va_start(args, fmt);
    say_text_args(fmt, args);
    va_end(args);
}

void say_note(const Checkpoint *ck) {
    char note[ERR_MAX];
    if (checkpoint_note(note, ck)) say_once("%s\n", note);
}

const char *run_path(const Stage *s, char out[PATH_BYTES], const char *suffix) {
    snprintf(out, PATH_BYTES, "%s/%s%s", s->set.run, s->name, suffix);
    return out;
}

/* What cannot be looked at just now is there: opening it says what is wrong. */
int file_exists(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 || (errno != ENOENT && errno != ENOTDIR);
}

Err open_lines(FILE **f, const char *path) {
    *f = fopen(path, "re");
    return *f || errno == ENOENT ? OK : io_error(path, "read");
}

Err close_lines(FILE *f, const char *path, Err e) {
    if (f && e == OK && ferror(f)) e = io_error(path, "read");
    if (f) fclose(f);
    return e;
}

/* RUN/skipped.txt names the pictures that could not be read, and why. */
static const char *skipped_path(const Stage *s, char out[PATH_BYTES]) {
    snprintf(out, PATH_BYTES, "%s/skipped.txt", s->set.run);
    return out;
}

Err list_damaged(const Stage *s, const Dataset *d) {
    char path[PATH_BYTES];
    return dataset_damaged(d) ? dataset_write_damaged(d, skipped_path(s, path)) : OK;
}

/* What a line of the list calls a file of another kind, "is a GIF file; ..."; 0: it is a damaged picture */
static int other_kind(char kind[40], const char *line) {
    const char *why = strchr(line, '\t'), *end = why ? strstr(why, " file; ") : NULL;
    if (!end || strncmp(why, "\tis a", 5) != 0) return 0;
    why += why[5] == 'n' ? 7 : 6;
    return end > why && snprintf(kind, 40, "%.*s", (int)(end - why), why) > 0;
}

/* How many damaged pictures the list has, and what other files. Each of several processes knows only those that it met
 * itself. */
static size_t listed_damaged(const Stage *s, LeftOut *others) {
    char path[PATH_BYTES], kind[40], *line = NULL;
    size_t damaged = 0, room = 0;
    FILE *f = fopen(skipped_path(s, path), "r");
    while (f && getline(&line, &room, f) > 0) {
        const int other = other_kind(kind, line);
        damaged += !other;
        line[strcspn(line, "\t")] = 0;
        if (other) left_out_kind(others, OUT_OTHER, kind, line);
    }
    free(line);
    if (f) fclose(f);
    return damaged;
}

/* Of the pictures of one side, which are used in part */
static void say_parts(const Dataset *d) {
    char text[ERR_MAX];
    dataset_met(d, text, 0);
    if (text[0]) say_once("%s\n", text);
}

void say_damaged(const Stage *s) {
    char path[PATH_BYTES], text[ERR_MAX];
    LeftOut others = {0};
    size_t n = listed_damaged(s, &others);
    if (s->all_read && n + others.n[OUT_OTHER] < s->n_damaged) n = s->n_damaged - others.n[OUT_OTHER];
    if (n) say_text("damaged pictures skipped: %zu; %s lists them\n", n, skipped_path(s, path));
    left_out_text(text, &others);
    if (text[0]) say_text("left out: %s; %s lists them\n", text, skipped_path(s, path));
    say_parts(&s->train), say_parts(&s->val);
}

void say_pictures(const Stage *s, int has_class) {
    const Dataset *d = &s->train;
    const size_t n = d->n_classes;
    static int said; /* for a stage before */
    char text[ERR_MAX];
    size_t length = 0;
    if (said++) return;
    for (size_t i = 0; i < n && i < 5; i++)
        length += (size_t)snprintf(text + length, 128, "%s%.100s", i ? ", " : "", d->class_name[i]);
    if (n && has_class)
        say_once("%s: %zu class%s: %s%s\n", s->set.data, n, n == 1 ? "" : "es", text, n > 5 ? ", ..." : "");
    else if (n)
        say_once("%s: pictures of %zu sub-folder%s (%s%s), which are no classes to this recipe: it has none\n",
                 s->set.data, n, n == 1 ? "" : "s", text, n > 5 ? ", ..." : "");
    left_out_text(text, d->left_out);
    if (text[0]) say_once("%s: left out: %s\n", s->set.data, text);
}

Err data_is_there(const char *data) {
    struct stat st;
    if (stat(data, &st) == 0 || errno != ENOENT) return OK; /* another error is for who opens it */
    return err("%s: no such folder or file; --data PATH says where your pictures are%s", data,
               strcmp(data, "data/emoji") ? "" : "; \"make data/emoji\" makes those of the bundled model");
}

/* The first folder that this process made: its path, from made_from on of folders that were not there before */
static char made_path[PATH_BYTES];
static size_t made_from;

/* A start that failed leaves no folder: those that something lies in stay. */
static void remove_empty(void) {
    for (size_t n = strlen(made_path); n >= made_from; n--) {
        if (made_path[n] && made_path[n] != '/') continue;
        made_path[n] = 0;
        rmdir(made_path);
    }
}

static void remember_made(const char *path, size_t from) {
    if (made_from) return;
    snprintf(made_path, sizeof made_path, "%s", path);
    made_from = from;
    atexit(remove_empty);
}

/* With room in a path for what will lie in the folder */
Err make_folder(const char *path) {
    char part[PATH_BYTES - 128];
    if ((size_t)snprintf(part, sizeof part, "%s", path) >= sizeof part)
        return err("%.200s...: the path is too long", path);
    for (char *p = part + 1;; p++)
        if (!*p || *p == '/') {
            char keep = *p;
            *p = 0;
            if (mkdir(part, 0777) == 0)
                remember_made(path, (size_t)(p - part));
            else if (errno != EEXIST)
                return io_error(part, "make the folder");
            *p = keep;
            if (!keep) return OK;
        }
}

/* ------------------------------------------------------------------------------------------------------------
 * One ./train at a time
 * ---------------------------------------------------------------------------------------------------------- */

/* RUN/lock, "process host", is there as long as it is held; one that a kill left is not held. */
static int lock_fd = -1, lock_refused;
static char lock_path[PATH_BYTES];

/* Is that the file which has the lock's name? */
static int is_lock(int fd) {
    struct stat ours, theirs;
    return fstat(fd, &ours) == 0 && stat(lock_path, &theirs) == 0 && ours.st_ino == theirs.st_ino &&
           ours.st_dev == theirs.st_dev;
}

void unlock_run(void) {
    if (lock_fd < 0) return;
    if (is_lock(lock_fd)) unlink(lock_path);
    close(lock_fd);
    lock_fd = -1;
}

static Err in_use(const char *run, int fd) {
    char text[300] = "", host[256] = "", ours[256] = "", who[300] = "";
    long pid = 0;
    const ssize_t n = pread(fd, text, sizeof text - 1, 0);
    if (n > 0) text[n] = 0;
    gethostname(ours, sizeof ours - 1);
    if (sscanf(text, "%ld %255s", &pid, host) == 2) /* nobody, where its disk was full */
        snprintf(who, sizeof who, ", process %ld%s%s,", pid, strcmp(host, ours) ? " on " : "",
                 strcmp(host, ours) ? host : "");
    return err("%s: another ./train%s trains in this run; --run DIR starts another", run, who);
}

static Err cannot_lock(void) {
    lock_refused = 1;
    say_text("%s: cannot be locked: %s; nothing keeps another ./train out of this run\n", lock_path, strerror(errno));
    return OK;
}

static int open_lock(void) {
    int fd = open(lock_path, O_RDWR | O_CREAT | O_CLOEXEC | O_NONBLOCK, 0666);
    if (fd >= 0 || errno != EACCES) return fd;
    fd = open(lock_path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* another user's */
    if (fd < 0) errno = EACCES;
    return fd;
}

static void keep_lock(int fd) {
    char text[300], host[256] = "?";
    gethostname(host, sizeof host - 1);
    const int n = snprintf(text, sizeof text, "%ld %s\n", (long)getpid(), host);
    const int told = ftruncate(fd, 0) == 0 && pwrite(fd, text, (size_t)n, 0) == n;
    (void)told; /* on a full disk others learn only that somebody has it */
    lock_fd = fd;
    atexit(unlock_run);
}

/* A file that has lost its name when it is locked was that of a process that ended meanwhile. */
Err lock_run(const char *run) {
    if (lock_fd >= 0 || lock_refused || !file_exists(run)) return OK;
    TRY(path_make(lock_path, "%s/lock", run));
    for (;;) {
        const int fd = open_lock();
        if (fd < 0) return errno == ENOSPC || errno == EDQUOT ? cannot_lock() : io_error(lock_path, "open");
        const int got = file_lock(fd);
        if (got > 0 && is_lock(fd)) return keep_lock(fd), OK;
        const Err e = got == 0 ? in_use(run, fd) : got < 0 ? cannot_lock() : OK;
        close(fd);
        if (got <= 0) return e;
    }
}

Err make_run(const char *run) {
    TRY(make_folder(run));
    return lock_run(run);
}

/* ------------------------------------------------------------------------------------------------------------
 * Full disks
 * ---------------------------------------------------------------------------------------------------------- */

static double pause_seconds(void) {
    const char *text = getenv("IMAGEBART_TEST_PAUSE");
    return text ? strtod(text, NULL) : 30;
}

static void wait_a_little(double wanted) {
    const double end = seconds() + wanted;
    while (!interrupted() && seconds() < end) {
        struct timespec moment = {0, 50000000};
        nanosleep(&moment, NULL);
    }
}

/* err_text(), how much room is needed, and how much there is */
static Err no_room(const Stage *s, size_t bytes) {
    char needed[32], left[32] = "unknown";
    struct statvfs disk;
    if (statvfs(s->set.run, &disk) == 0) bytes_text(left, (size_t)disk.f_bavail * disk.f_frsize);
    return err("%s; %s needed in %s, free: %s", err_text(), bytes_text(needed, max_size(bytes, 1 << 20)), s->set.run,
               left);
}

Err retry_when_full(Stage *s, Err (*write)(Stage *s, void *argument), void *argument, size_t bytes) {
    const double between = pause_seconds();
    for (int tries = 0;; tries++) {
        if (write(s, argument) == OK) {
            if (tries) say_text("%s: there is room again; training goes on\n", s->set.run);
            return OK;
        }
        if (!disk_full()) return FAILED;
        no_room(s, bytes);
        if ((interrupted() || s->set.no_wait) && s->has_state)
            return err("%s; stopped; the checkpoint of step %llu is intact, --resume goes on from it", err_text(),
                       (unsigned long long)s->saved);
        if (interrupted() || s->set.no_wait) return err("%s; stopped; there is no checkpoint yet", err_text());
        progress_end();
        if (tries == 0)
            say_text("%s; trying again every %g s, Ctrl-C ends the run (--no-wait: at once)\n", err_text(), between);
        wait_a_little(between);
    }
}

/* ------------------------------------------------------------------------------------------------------------
 * What a killed run left
 * ---------------------------------------------------------------------------------------------------------- */

static int begins(const char *name, const char *with) {
    return !strncmp(name, with, strlen(with));
}

/* Is this the name of a file that ./train writes whole into a run, of whichever stage? */
static int is_ours(const char *name, size_t length) {
    static const char *const names[] = {"log.tsv",  "loss.svg",     "skipped.txt", "skipped_batches.tsv",
                                        "psim.txt", "train.tokens", "val.tokens"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (length == strlen(names[i]) && begins(name, names[i])) return 1;
    size_t n = strspn(name, "abcdefghijklmnopqrstuvwxyz");
    if (n == 5 && begins(name, "scale"))
        n += strspn(name + n, "0123456789");
    else if (!(n == 5 && begins(name, "vqgan")) && !(n == 5 && begins(name, "joint")))
        return 0;
    return n < length && (name[n] == '.' || name[n] == '-');
}

/* A state on its way to its place, which a kill kept from there. Those of other stages are none if nothing keeps other
 * processes out of the run. */
static int is_state_on_its_way(const Stage *s, const char *name) {
    static const char suffix[] = ".state-new.safetensors";
    const size_t n = strlen(name), m = strlen(suffix);
    if (n <= m || strcmp(name + n - m, suffix) || !is_ours(name, n)) return 0;
    return lock_fd >= 0 || (n - m == strlen(s->name) && begins(name, s->name));
}

void remove_leftovers(const Stage *s) {
    DIR *folder = opendir(s->set.run);
    char path[PATH_BYTES + 256];
    size_t removed = 0;
    for (const struct dirent *f; folder && (f = readdir(folder)) != NULL;) {
        const size_t length = temporary_left(s->set.run, f->d_name);
        if (!(length && is_ours(f->d_name, length)) && !is_state_on_its_way(s, f->d_name)) continue;
        snprintf(path, sizeof path, "%s/%s", s->set.run, f->d_name);
        removed += unlink(path) == 0;
    }
    if (folder) closedir(folder);
    if (removed) say_text("%s: temporary files of a killed run removed: %zu\n", s->set.run, removed);
}
