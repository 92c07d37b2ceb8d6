/* output.c - where a picture will go, looked at before the work begins. */
#include "sampling/sampling.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

/* The endings of picture formats that are not PNG: a PNG of such a name would be misread. */
static const char *const others[] = {"jpg",  "jpeg", "jpe",  "jfif", "webp", "gif", "bmp", "dib", "tif",
                                     "tiff", "avif", "heic", "heif", "jxl",  "jp2", "j2k", "ppm", "pgm",
                                     "pnm",  "pbm",  "pam",  "tga",  "ico",  "svg", "pdf", "ps",  "eps",
                                     "psd",  "xcf",  "exr",  "hdr",  "qoi",  "mp4", "webm"};

static Err is_png_name(const char *option, const char *path) {
    const char *slash = strrchr(path, '/'), *dot = strrchr(slash ? slash : path, '.');
    for (size_t i = 0; dot && i < sizeof others / sizeof *others; i++)
        if (!strcasecmp(dot + 1, others[i]))
            return err("%s %s: pictures are written as PNG; a name that ends in .png expected", option, path);
    return OK;
}

static Err output_check(const char *option, const char *path) {
    AtomicFile probe;
    struct stat st;
    TRY(is_png_name(option, path));
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode) && !S_ISDIR(st.st_mode)) /* a pipe must not be opened twice */
        return access(path, W_OK) == 0 ? OK : io_error(path, "write");
    if (atomic_open(&probe, path) != OK) return err_in(option);
    atomic_close(&probe, FAILED); /* the temporary is gone again, what was there is as it was */
    return OK;
}

Err single_path(char path[PATH_BYTES], const char *folder, size_t number) {
    return path_make(path, "%s%04zu.png", folder, number);
}

int is_out_folder(const char *path) {
    const size_t n = strlen(path);
    return n > 0 && path[n - 1] == '/';
}

/* A folder for single files, which is made if it is missing: that can be done, and was undone. */
static Err out_folder_check(const char *option, const char *folder) {
    char path[PATH_BYTES];
    struct stat st;
    TRY(path_make(path, "%s", folder));
    for (size_t n = strlen(path); n > 1 && path[n - 1] == '/'; n--) path[n - 1] = 0;
    const int there = stat(path, &st) == 0;
    if (there && !S_ISDIR(st.st_mode)) return err("%s %s: is a file, expected a folder", option, path);
    if (!there && mkdir(path, 0777) != 0) {
        io_error(path, "make");
        return err_in(option);
    }
    Err e = single_path(path, folder, 0);
    if (e == OK) e = output_check(option, path);
    if (!there) rmdir(folder);
    return e;
}

/* Do two paths name the same entry of the same folder? Neither need be there yet. */
static int same_entry(const char *path, const char *other) {
    const char *paths[2] = {path, other}, *base[2];
    struct stat folder[2];
    for (int i = 0; i < 2; i++) {
        char parent[PATH_BYTES];
        const char *slash = strrchr(paths[i], '/');
        base[i] = slash ? slash + 1 : paths[i];
        if (path_make(parent, "%.*s.", (int)(base[i] - paths[i]), paths[i]) != OK) return 0;
        if (stat(parent, &folder[i]) != 0) return 0;
    }
    if (folder[0].st_dev != folder[1].st_dev || folder[0].st_ino != folder[1].st_ino) return 0;
    const int numbered = strspn(base[1], "0123456789") >= 4 && !strcmp(base[1] + strspn(base[1], "0123456789"), ".png");
    return *base[0] ? strcmp(base[0], base[1]) == 0 : numbered; /* a folder of single files has 0001.png and so on */
}

static Err outputs_differ(const char *option, const char *path, const char *other, const char *other_path) {
    struct stat a, b;
    const int same_file = stat(path, &a) == 0 && stat(other_path, &b) == 0 && S_ISREG(a.st_mode) &&
                          a.st_dev == b.st_dev && a.st_ino == b.st_ino;
    if (!same_file && !same_entry(path, other_path)) return OK;
    return err("%s and %s are the same file, %s: the second picture would replace the first", option, other,
               other_path);
}

Err outputs_check(const char *out, const char *chain, const char *film) {
    const struct { const char *option, *path; } given[] = {{"-o", out}, {"--chain", chain}, {"--animate", film}};
    struct stat st;
    if (!is_out_folder(out) && stat(out, &st) == 0 && S_ISDIR(st.st_mode))
        return err("-o %s: is a folder; -o %s/ writes a file for each picture there", out, out);
    TRY(is_out_folder(out) ? out_folder_check("-o", out) : output_check("-o", out));
    for (size_t i = 1; i < 3; i++) {
        if (!given[i].path) continue;
        TRY(output_check(given[i].option, given[i].path));
        for (size_t k = 0; k < i; k++)
            if (given[k].path) TRY(outputs_differ(given[k].option, given[k].path, given[i].option, given[i].path));
    }
    return OK;
}

/* DIR/ is no danger: its files come behind those that are there. */
Err output_spares(const char *option, const char *path, const char *input, const char *input_path) {
    struct stat a, b;
    if (!path || !input_path || is_out_folder(path)) return OK;
    const int same_file = stat(path, &a) == 0 && stat(input_path, &b) == 0 && S_ISREG(a.st_mode) &&
                          a.st_dev == b.st_dev && a.st_ino == b.st_ino;
    if (!same_file && !same_entry(path, input_path)) return OK;
    return err("%s %s is the file that %s reads and would be replaced: %s another file", option, path, input, option);
}

/* Neither is what is drawn one of the pictures in this folder. */
Err output_spares_folder(const char *option, const char *path, const char *input, const char *folder) {
    char file[PATH_MAX], above[PATH_MAX];
    struct stat st;
    if (!path || !folder || is_out_folder(path)) return OK;
    TRY(output_spares(option, path, input, folder));
    if (stat(path, &st) != 0 || !S_ISREG(st.st_mode) || !realpath(path, file) || !realpath(folder, above)) return OK;
    const size_t n = strlen(above);
    if (strncmp(file, above, n) != 0 || (above[n - 1] != '/' && file[n] != '/')) return OK;
    return err("%s %s is a file of the folder that %s reads and would be replaced: %s another file", option, path,
               input, option);
}

Err output_grid_check(const char *option, size_t n, size_t side, size_t columns, size_t gap, size_t enlarge) {
    size_t H, W, large_H, large_W;
    if (image_grid_size(&H, &W, n, side, side, columns, gap) != OK)
        return err("%s: %s; a smaller -n", option, err_text());
    if (image_grid_size(&large_H, &large_W, 1, H * enlarge, W * enlarge, 1, 0) == OK) return OK;
    return err("%s: a picture of %zu x %zu pixels is too large; a smaller -n or --enlarge", option, W * enlarge,
               H * enlarge);
}
