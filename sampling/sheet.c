/* sheet.c - pictures from tokens, into files: a grid, a file for each, or an animation of the chain. What ./inpaint keeps
 * of a picture is put back exactly in all of them. */
#include "sampling/sampling.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

size_t sheet_columns(const Sheet *s, size_t n) {
    size_t columns = 1;
    if (s->original) return min_size(n, 8);
    while (columns * columns < n) columns++;
    return columns;
}

/* The kept pixels of the original into tiles first .. n-1 of a grid. */
static void paste(const Sheet *s, Image *im, size_t first, size_t n, size_t columns) {
    const size_t side = s->model->side, step = side + SHEET_GAP;
    for (size_t b = first; b < n; b++)
        for (size_t i = 0; i < side * side; i++) {
            if (!s->keep[i]) continue;
            const size_t y = b / columns * step + i / side, x = b % columns * step + i % side;
            memcpy(im->rgb + 3 * (y * im->W + x), s->original->rgb + 3 * i, 3);
        }
}

/* Two tiles (3,side,side): the original, and the original with grey where it is drawn anew. */
static Err comparison(const Sheet *s, real *tiles) {
    const size_t side = s->model->side, pixels = side * side;
    TRY(image_prepare(tiles, s->original, PREP_FOLDER, side, -1, -1, 0));
    for (size_t i = 0; i < 3 * pixels; i++) tiles[3 * pixels + i] = s->keep[i % pixels] ? tiles[i] : 0;
    return OK;
}

/* One picture into a grid, whose alpha comes with the first that has one. */
static Err put_tile(Image *grid, const Image *im, size_t y0, size_t x0) {
    if (im->alpha && !grid->alpha) {
        TRY(mem_alloc(&grid->alpha, grid->H, grid->W, "pictures"));
        memset(grid->alpha, 255, grid->H * grid->W);
    }
    for (size_t y = 0; y < im->H; y++) {
        memcpy(grid->rgb + 3 * ((y0 + y) * grid->W + x0), im->rgb + 3 * y * im->W, 3 * im->W);
        if (im->alpha) memcpy(grid->alpha + (y0 + y) * grid->W + x0, im->alpha + y * im->W, im->W);
    }
    return OK;
}

/* grid = these pictures, each pasted into the whole one. */
static Err pasted_picture(const Sheet *s, Image *grid, const real *images, size_t n, size_t columns) {
    const EditPicture *p = s->into;
    const size_t side = s->model->side;
    TRY(image_grid_size(&grid->H, &grid->W, n, p->H, p->W, columns, SHEET_GAP));
    TRY(mem_alloc(&grid->rgb, grid->H, 3 * grid->W, "pictures"));
    memset(grid->rgb, 255, 3 * grid->H * grid->W);
    for (size_t b = 0; b < n; b++) {
        Image drawn = {0}, whole = {0};
        Err e = image_grid(&drawn, images + b * 3 * side * side, 1, side, side, 1, 0);
        if (e == OK) e = paste_picture(&whole, p, s->model, &drawn);
        if (e == OK) e = put_tile(grid, &whole, b / columns * (p->H + SHEET_GAP), b % columns * (p->W + SHEET_GAP));
        image_free(&drawn);
        image_free(&whole);
        TRY(e);
    }
    return OK;
}

/* im = the pictures of tokens (n,N), behind two tiles for comparison if those are wanted. */
static Err sheet_picture(const Sheet *s, Image *im, const int32_t *tokens, size_t n, size_t columns, int compare) {
    const size_t side = s->model->side, first = compare ? 2 : 0, pixels = 3 * side * side;
    real *images;
    TRY(mem_alloc(&images, n + first, pixels * sizeof *images, "pictures"));
    Err e = compare ? comparison(s, images) : OK;
    if (e == OK) e = decode_pictures(s->model, tokens, n, images + first * pixels);
    if (e == OK && s->into)
        e = pasted_picture(s, im, images, n, columns);
    else if (e == OK)
        e = image_grid(im, images, n + first, side, side, columns, SHEET_GAP);
    if (e == OK && s->original && !s->no_paste && !s->into)
        paste(s, im, first, n + first, min_size(columns, n + first));
    free(images);
    return e;
}

/* What a file of n pictures from number `first` on says of itself: how they were drawn, and what the program adds. */
static Err sheet_text(Config *text, const Sheet *s, size_t n, uint64_t first, int of_several) {
    TRY(sampling_text(text, s->args, s->options, s->model));
    for (size_t i = 0; s->text && i < s->text->n; i++)
        TRY(config_set(text, s->text->kv[i].key, "%s", s->text->kv[i].value));
    return sampling_text_place(text, n, first, of_several || s->args->one_of_several);
}

static Err write_sheet(const Sheet *s, const int32_t *tokens, size_t tiles, size_t columns, const char *path,
                       uint64_t first, int of_several, const char *frames) {
    Image im = {0};
    Config text = {0};
    Err e = sheet_text(&text, s, of_several ? 1 : s->args->n, first, of_several);
    if (e == OK && frames) e = config_set(&text, "frames", "%s", frames);
    if (e == OK && s->compare) e = config_set(&text, "compare", "true");
    if (e == OK) e = sheet_picture(s, &im, tokens, tiles, columns, s->compare);
    im.profile = s->profile;
    if (e == OK) e = image_write_png_enlarged(path, &im, s->args->enlarge, &text);
    image_free(&im);
    config_free(&text);
    return e;
}

Err sheet_write(const Sheet *s, const int32_t *tokens, size_t n, size_t columns, const char *path) {
    return write_sheet(s, tokens, n, columns, path, s->args->first, 0, NULL);
}

Err sheet_chain(const Sheet *s, const int32_t *chain, size_t n, size_t steps, const char *path) {
    return write_sheet(s, chain, n * steps, steps, path, s->args->first, 0, "chain");
}

/* ---- A file for each ---- */

/* The highest number that a file NNNN.png of the folder has, 0: none. */
static size_t last_number(const char *folder) {
    DIR *d = opendir(folder);
    size_t last = 0;
    for (struct dirent *one = d ? readdir(d) : NULL; one; one = readdir(d)) {
        const char *end = one->d_name;
        size_t number;
        if (text_digits(&number, &end) && !strcmp(end, ".png") && number > last && number < 1000000000) last = number;
    }
    if (d) closedir(d);
    return last;
}

/* Picture b of all, with its number among those of the seed, and its class. */
static Err write_one(const Sheet *s, const int32_t *tokens, size_t b, const char *path) {
    char title[CLASS_TITLE_BYTES];
    SamplingArgs args = *s->args;
    Sheet one = *s;
    int32_t label;
    if (s->label) {
        args.class_name = class_title(title, &s->model->classes, (size_t)s->label[b]);
        if (classes_find(&s->model->classes, title, &label) != OK || label != s->label[b]) /* two have that name */
            snprintf(title, sizeof title, "%d", (int)s->label[b]);
    }
    one.args = &args, one.compare = 0;
    return write_sheet(&one, tokens, 1, 1, path, s->args->first + b, s->args->n > 1, NULL);
}

Err sheet_singles(const Sheet *s, const int32_t *tokens, size_t n, const char *folder, size_t *first) {
    const size_t N = s->model->h * s->model->w;
    char path[PATH_BYTES];
    struct stat st;
    if (mkdir(folder, 0777) != 0 && !(stat(folder, &st) == 0 && S_ISDIR(st.st_mode))) return io_error(folder, "make");
    *first = last_number(folder) + 1; /* nothing that is there is replaced */
    for (size_t b = 0; b < n; b++) {
        TRY(single_path(path, folder, *first + b));
        TRY(write_one(s, tokens + b * N, b, path));
    }
    return OK;
}

/* ---- The chain as an animation ---- */

typedef struct {
    const Sheet *sheet;
    const int32_t *chain; /* (n,steps,N) */
    size_t n, steps;
    int32_t *tokens; /* (n,N) of a frame */
} Film;

static Err film_frame(void *context, size_t i, Image *im) {
    const Film *f = (const Film *)context;
    const size_t N = f->sheet->model->h * f->sheet->model->w;
    for (size_t b = 0; b < f->n; b++)
        memcpy(f->tokens + b * N, f->chain + (b * f->steps + i) * N, N * sizeof *f->tokens);
    TRY(sheet_picture(f->sheet, im, f->tokens, f->n, sheet_columns(f->sheet, f->n), 0));
    im->profile = f->sheet->profile;
    return OK;
}

Err sheet_animate(const Sheet *s, const int32_t *chain, size_t n, size_t steps, const char *path) {
    Film f = {.sheet = s, .chain = chain, .n = n, .steps = steps};
    Config text = {0};
    TRY(mem_alloc(&f.tokens, n, s->model->h * s->model->w * sizeof *f.tokens, "tokens of a frame"));
    Err e = sheet_text(&text, s, s->args->n, s->args->first, 0);
    if (e == OK) e = config_set(&text, "frames", "animation");
    if (e == OK) e = image_write_apng(path, steps, film_frame, &f, s->args->enlarge, &text);
    free(f.tokens);
    config_free(&text);
    return e;
}

/* ---- All that was asked for ---- */

static Err say_file(const Sheet *s, const char *path) {
    if (!s->args->quiet) say_result("%s\n", path);
    return s->args->show ? show_png(path) : OK;
}

static Err singles(const Sheet *s, const int32_t *tokens, size_t n) {
    const char *folder = s->args->out;
    char path[PATH_BYTES];
    size_t first;
    TRY(sheet_singles(s, tokens, n, folder, &first));
    if (first > 1) say(s->args, "%s has pictures up to number %zu already; these follow\n", folder, first - 1);
    for (size_t b = 0; b < n; b++) {
        TRY(single_path(path, folder, first + b));
        TRY(say_file(s, path));
    }
    return OK;
}

Err sheet_files(const Sheet *s, const int32_t *tokens, const int32_t *chain, size_t n, size_t steps) {
    const SamplingArgs *a = s->args;
    if (is_out_folder(a->out))
        TRY(singles(s, tokens, n));
    else {
        TRY(sheet_write(s, tokens, n, sheet_columns(s, n + (s->compare ? 2 : 0)), a->out));
        TRY(say_file(s, a->out));
    }
    if (!a->animate) return OK;
    TRY(sheet_animate(s, chain, n, steps, a->animate));
    if (!a->quiet) say_result("%s\n", a->animate);
    return OK;
}
