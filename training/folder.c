/* folder.c - the run's folder: paths in it, its list of damaged pictures, writing when its disk is full, what a killed
 * run left in it.
 *
 * Full disks. Whatever is written is tried again until there is room (retry_when_full): a run of days should not end
 * because somebody else filled the disk for an hour. */
#include "training/stage.h"

#include <dirent.h>
#include <errno.h>
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
    vfprintf(stderr, fmt, args);
    va_end(args);
}

const char *run_path(const Stage *s, char out[PATH_BYTES], const char *suffix) {
    snprintf(out, PATH_BYTES, "%s/%s%s", s->set.run, s->name, suffix);
    return out;
}

int file_exists(const char *path) {
    struct stat st;
    return stat(path, &st) == 0;
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

/* How many damaged pictures the list has. Each of several processes knows only those that it met itself. */
static size_t listed_damaged(const Stage *s) {
    char path[PATH_BYTES];
    size_t lines = 0;
    FILE *f = fopen(skipped_path(s, path), "r");
    for (int c; f && (c = getc(f)) != EOF;) lines += c == '\n';
    if (f) fclose(f);
    return lines;
}

void say_damaged(const Stage *s) {
    char path[PATH_BYTES];
    size_t n = dataset_damaged(&s->train) + dataset_damaged(&s->val);
    if (ranks() > 1) n = listed_damaged(s);
    if (s->all_read) n = s->n_damaged;
    if (n) fprintf(stderr, "damaged pictures skipped: %zu; %s lists them\n", n, skipped_path(s, path));
}

void say_pictures(const Stage *s) {
    const Dataset *d = &s->train;
    char text[ERR_MAX];
    size_t length = 0;
    for (size_t i = 0; i < d->n_classes && i < 5; i++)
        length += (size_t)snprintf(text + length, 128, "%s%.100s", i ? ", " : "", d->class_name[i]);
    if (d->n_classes)
        say_once("%s: %zu class%s: %s%s\n", s->set.data, d->n_classes, d->n_classes == 1 ? "" : "es", text,
                 d->n_classes > 5 ? ", ..." : "");
    left_out_text(text, d->left_out);
    if (text[0]) say_once("%s: left out: %s\n", s->set.data, text);
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
            if (mkdir(part, 0777) && errno != EEXIST) return err("%s: %s", part, strerror(errno));
            *p = keep;
            if (!keep) return OK;
        }
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
            if (tries) fprintf(stderr, "%s: there is room again; training goes on\n", s->set.run);
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
            fprintf(stderr, "%s; trying again every %g s, Ctrl-C ends the run (--no-wait: at once)\n", err_text(),
                    between);
        wait_a_little(between);
    }
}

/* ------------------------------------------------------------------------------------------------------------
 * What a killed run left
 * ---------------------------------------------------------------------------------------------------------- */

/* The process that left this temporary file of the stage, NAME.tmpPID or NAME.tmpPID-TRY; 0: it is no such file. */
static long leaver(const Stage *s, const char *name) {
    const size_t n = strlen(s->name);
    const char *last = NULL;
    char *end;
    if (strncmp(name, s->name, n) != 0 || (name[n] != '.' && name[n] != '-')) return 0;
    for (const char *p = name; (p = strstr(p, ".tmp")) != NULL; p += 4) last = p + 4;
    if (!last || *last < '1' || *last > '9') return 0;
    long pid = strtol(last, &end, 10);
    if (*end == '-') end += 1 + strspn(end + 1, "0123456789");
    return *end ? 0 : pid;
}

/* A file of our own number was left by a process before us: in a container numbers are few. */
void remove_leftovers(const Stage *s) {
    DIR *folder = opendir(s->set.run);
    char path[PATH_BYTES + 256];
    size_t removed = 0;
    for (const struct dirent *f; folder && (f = readdir(folder)) != NULL;) {
        long pid = leaver(s, f->d_name);
        if (pid <= 0 || (pid != (long)getpid() && (kill((pid_t)pid, 0) == 0 || errno != ESRCH))) continue;
        snprintf(path, sizeof path, "%s/%s", s->set.run, f->d_name);
        removed += unlink(path) == 0;
    }
    if (folder) closedir(folder);
    run_path(s, path, ".state-new.safetensors"); /* one that a kill kept from its place */
    removed += unlink(path) == 0;
    if (removed) fprintf(stderr, "%s: temporary files of a killed run removed: %zu\n", s->set.run, removed);
}
