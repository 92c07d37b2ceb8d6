/* output.c - where a picture will go, looked at before the work begins. */
#include "sampling/sampling.h"

#include <stdio.h>
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

static Err outputs_differ(const char *option, const char *path, const char *other, const char *other_path) {
    struct stat a, b;
    const int same_file = stat(path, &a) == 0 && stat(other_path, &b) == 0 && S_ISREG(a.st_mode) &&
                          a.st_dev == b.st_dev && a.st_ino == b.st_ino;
    if (!same_file && strcmp(path, other_path) != 0) return OK;
    return err("%s and %s are the same file, %s: the second picture would replace the first", option, other, path);
}

Err outputs_check(const char *out, const char *chain) {
    TRY(output_check("-o", out));
    if (!chain) return OK;
    TRY(output_check("--chain", chain));
    return outputs_differ("-o", out, "--chain", chain);
}

Err output_grid_check(const char *option, size_t n, size_t side, size_t columns, size_t gap) {
    size_t H, W;
    if (image_grid_size(&H, &W, n, side, side, columns, gap) == OK) return OK;
    return err("%s: %s; a smaller -n", option, err_text());
}
