/* edit.c - the picture of which a part is drawn anew, as the model sees it, and which part that is.
 *
 * The model sees a square of the picture at its own size: the centre, prepared as the pictures that it was trained on; or,
 * where the result is pasted back into the whole picture, a square around the hole of the mask with as much around it as
 * in it. A token stays if all its pixels do. */
#include "sampling/sampling.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void edit_free(EditPicture *p) {
    image_free(&p->whole);
    image_free(&p->picture);
    profile_free(&p->profile);
    free(p->hole), free(p->keep), free(p->keep_token);
    p->hole = p->keep = p->keep_token = NULL;
}

/* ---- The picture ---- */

static Err copy_pixels(Image *to, const Image *from) {
    to->H = from->H, to->W = from->W;
    TRY(mem_alloc(&to->rgb, to->H * to->W, 3, "a picture"));
    memcpy(to->rgb, from->rgb, 3 * to->H * to->W);
    return OK;
}

/* p->whole, decoded in this way */
static Err decode_whole(EditPicture *p, const EditArgs *a, int how) {
    const Err e = a->pixels ? copy_pixels(&p->whole, a->pixels)
                            : image_decode_most(&p->whole, a->image, a->image_bytes, IMAGE_UPRIGHT | how,
                                                a->most_pixels, &p->too_many);
    if (e == DAMAGED || p->too_many) p->unreadable = "image";
    p->H = p->whole.H, p->W = p->whole.W;
    return e;
}

/* whole (H,W): its colours and, where something is transparent, its alpha. */
static Err read_whole(EditPicture *p, const EditArgs *a) {
    const char *kind;
    Image alpha = {0};
    TRY(decode_whole(p, a, IMAGE_STRAIGHT));
    if (a->pixels || file_kind(&kind, a->image, a->image_bytes) == FILE_JPEG) return OK;
    TRY(image_decode(&alpha, a->image, a->image_bytes, IMAGE_UPRIGHT | IMAGE_ALPHA));
    const size_t n = alpha.H * alpha.W;
    int is_opaque = 1;
    for (size_t i = 0; i < n; i++) {
        alpha.rgb[i] = alpha.rgb[3 * i];
        is_opaque &= alpha.rgb[i] == 255;
    }
    if (is_opaque)
        image_free(&alpha);
    else
        p->whole.alpha = alpha.rgb;
    return OK;
}

Err edit_into(EditPicture *p, const uint8_t *image, size_t bytes) {
    const size_t H = p->H, W = p->W;
    image_free(&p->whole);
    profile_free(&p->profile);
    TRY(read_whole(p, &(EditArgs){.image = image, .image_bytes = bytes}));
    TRY(profile_read(&p->profile, image, bytes));
    if (p->H == H && p->W == W) return OK;
    return err("the picture is %zux%zu; expected %zux%zu, as the one that is completed", p->W, p->H, W, H);
}

/* The square at y0, x0 as it looks on white, at the model's size. */
static Err take_square(EditPicture *p, const Model *m) {
    const size_t S = p->square, W = p->whole.W;
    Image *im = &p->picture;
    TRY(mem_alloc(&im->rgb, S * S, 3, "a part of the picture"));
    im->H = im->W = S;
    for (size_t i = 0; i < S * S; i++) {
        const size_t at = (p->y0 + i / S) * W + p->x0 + i % S;
        const unsigned a = p->whole.alpha ? p->whole.alpha[at] : 255;
        for (size_t c = 0; c < 3; c++)
            im->rgb[3 * i + c] = (uint8_t)((p->whole.rgb[3 * at + c] * a + 255 * (255 - a) + 127) / 255);
    }
    return image_square(im, p->prep, m->side);
}

/* ---- What is drawn anew ---- */

/* The rectangle y0..y1, x0..x1 in which the mask's hole lies; 0: there is none. */
static int hole_box(const Image *mask, int invert, size_t box[4]) {
    box[0] = mask->H, box[1] = 0, box[2] = mask->W, box[3] = 0;
    for (size_t y = 0; y < mask->H; y++)
        for (size_t x = 0; x < mask->W; x++) {
            if (mask_keeps(mask, y, x, invert)) continue;
            box[0] = min_size(box[0], y), box[1] = max_size(box[1], y + 1);
            box[2] = min_size(box[2], x), box[3] = max_size(box[3], x + 1);
        }
    return box[1] > 0;
}

/* Where a square of S pixels around from..to begins, in a picture of n pixels. */
static size_t place(size_t from, size_t to, size_t S, size_t n) {
    const size_t middle = (from + to) / 2;
    return min_size(middle > S / 2 ? middle - S / 2 : 0, n - S);
}

static Err keeps_everything(int invert) {
    return err("the mask keeps everything: nothing to draw (%s are redrawn)",
               invert ? "with --invert light parts" : "black and transparent parts; with --invert light ones");
}

/* The square around the hole of a mask of the picture's size: twice the hole, the model's size at least. */
static Err choose_square(EditPicture *p, const Model *m, const Image *mask, int invert) {
    size_t box[4];
    const size_t most = min_size(p->H, p->W);
    if (!hole_box(mask, invert, box)) return keeps_everything(invert);
    const size_t size = max_size(box[1] - box[0], box[3] - box[2]);
    if (size > most)
        return err("the hole of the mask, %zux%zu pixels, fits no square of the picture, which has %zux%zu",
                   box[3] - box[2], box[1] - box[0], p->W, p->H);
    p->square = min_size(max_size(2 * size, m->side), most);
    p->y0 = place(box[0], box[1], p->square, p->H);
    p->x0 = place(box[2], box[3], p->square, p->W);
    return OK;
}

/* A mask as a file: of the picture's size, or of the model's, which is then about the centred square. */
static Err read_mask(EditPicture *p, const Model *m, const EditArgs *a) {
    Image mask = {0}, part = {0};
    Err e = a->mask_pixels
                ? copy_pixels(&mask, a->mask_pixels)
                : mask_decode(&mask, &p->note, a->mask, a->mask_bytes, a->invert, a->most_pixels, &p->too_many);
    const int whole = mask.H == p->H && mask.W == p->W;
    if (e == OK && !whole && (mask.H != m->side || mask.W != m->side))
        e = mask_size_error(&mask, p->H, p->W, m->side);
    else if (e == DAMAGED || p->too_many)
        p->unreadable = "mask";
    if (e == OK && whole && a->paste) e = choose_square(p, m, &mask, a->invert);
    if (e == OK && whole && a->paste) {
        const size_t S = p->square;
        e = mem_alloc(&part.rgb, S * S, 3, "a part of the mask");
        for (size_t y = 0; y < S && e == OK; y++)
            memcpy(part.rgb + 3 * y * S, mask.rgb + 3 * ((p->y0 + y) * mask.W + p->x0), 3 * S);
        part.H = part.W = S;
        for (size_t i = 0; i < S * S && e == OK; i++) p->hole[i] = !mask_keeps(&part, i / S, i % S, a->invert);
        if (e == OK) e = mask_square(p->keep, &part, p->prep, m->side, a->invert);
    } else if (e == OK)
        e = mask_square(p->keep, &mask, p->prep, m->side, a->invert);
    p->hole_is_exact = whole && a->paste;
    image_free(&mask);
    image_free(&part);
    return e;
}

/* hole (square,square) of what is said at the model's size */
static void enlarge_hole(EditPicture *p, const Model *m) {
    const size_t S = p->square;
    for (size_t i = 0; i < S * S; i++) p->hole[i] = !p->keep[i / S * m->side / S * m->side + i % S * m->side / S];
}

/* keep_token (N): a token stays if all its pixels do. The official code asks only its first (nearest neighbour, SPEC
 * section 5). */
static Err token_mask(EditPicture *p, const Model *m, const EditArgs *a) {
    const size_t patch = m->side / m->h, N = m->h * m->w;
    for (size_t i = 0; i < m->side * m->side; i++) p->kept += p->keep[i];
    if (p->kept == m->side * m->side) return keeps_everything(a->invert);
    TRY(mem_alloc(&p->keep_token, N, 1, "token mask"));
    for (size_t i = 0; i < N; i++) {
        const uint8_t *corner = p->keep + i / m->w * patch * m->side + i % m->w * patch;
        p->keep_token[i] = corner[0];
        for (size_t k = 0; k < patch * patch && !a->official; k++)
            p->keep_token[i] &= corner[k / patch * m->side + k % patch];
        p->redrawn += !p->keep_token[i];
    }
    if (p->redrawn) return OK;
    return err("the mask redraws no token (each is %zux%zu pixels); without --official-mask it would", patch, patch);
}

Err edit_read(EditPicture *p, const Model *m, const EditArgs *a) {
    memset(p, 0, sizeof *p);
    const size_t extend = a->extend;
    if (extend >= m->side) return err("--extend %zu: the model's pictures have %zu pixels", extend, m->side);
    if (a->window >= m->side || a->outside >= m->side)
        return err("a window of %zu pixels: the picture has %zu", a->window ? a->window : a->outside, m->side);
    TRY(prep_read(&p->prep, &m->meta));
    TRY(a->paste ? read_whole(p, a) : decode_whole(p, a, prep_how(p->prep)));
    if (!a->pixels) TRY(profile_read(&p->profile, a->image, a->image_bytes));
    p->square = min_size(p->H, p->W);
    p->y0 = (p->H - p->square) / 2, p->x0 = (p->W - p->square) / 2;
    TRY(mem_alloc(&p->hole, p->square * p->square, 1, "mask"));
    TRY(mem_alloc(&p->keep, m->side * m->side, 1, "mask"));
    if (a->mask || a->mask_pixels)
        TRY(read_mask(p, m, a));
    else if (a->half)
        half_mask(p->keep, m->side, a->half);
    else
        window_mask(p->keep, m->side, a->window ? a->window : a->outside ? a->outside : extend, !a->window);
    if (!p->hole_is_exact) enlarge_hole(p, m);
    TRY(token_mask(p, m, a));
    if (a->paste) return take_square(p, m);
    p->picture = p->whole;
    p->whole = (Image){0};
    TRY(image_square(&p->picture, p->prep, extend ? extend : m->side));
    return extend ? put_into_middle(&p->picture, m->side) : OK;
}

/* ---- Its tokens, and its class ---- */

Err edit_encode(const EditPicture *p, Model *m, uint64_t seed, int32_t *known) {
    real *image;
    const size_t side = m->side;
    TRY(mem_alloc(&image, 3 * side, side * sizeof *image, "picture"));
    Err e = image_prepare(image, &p->picture, PREP_FOLDER, side, -1, -1, 0);
    if (e == OK) e = vqgan_plan(m->vqgan, 1, side, side, 0);
    if (e == OK) e = vqgan_encode(m->vqgan, image, 1, side, side, seed, NULL, NULL, known);
    free(image);
    return e;
}

Err edit_keeps_some(const EditPicture *p, const Model *m, const EditArgs *a) {
    const size_t N = m->h * m->w, side = m->side / m->h;
    if (p->redrawn < N) return OK;
    if (a->half || a->window || a->outside || a->extend)
        return err("no token is kept, so nothing tells the class: a token is %zux%zu pixels here and kept only if all "
                   "of it is; keep more, or name the class: --class",
                   side, side);
    return err("the mask keeps no token, so nothing tells the class: a token is %zux%zu pixels here and kept only if "
               "%s is %s; %s keeps the other parts, --class names the class",
               side, side, a->official ? "its first pixel" : "all of it", a->invert ? "dark or transparent" : "light",
               a->invert ? "leaving out --invert" : "--invert");
}

Err edit_class(int32_t *label, const Chain *chain, const int32_t *known, const uint8_t *keep_token, uint64_t seed) {
    enum { MOST = 100 };
    double bound[MOST];
    if (chain->n_classes > MOST)
        return err("%s has %zu classes, too many to try them all; name one: --class", chain->name, chain->n_classes);
    TRY(class_bounds(chain, known, keep_token, seed, bound));
    *label = 0;
    for (size_t k = 1; k < chain->n_classes; k++)
        if (bound[k] < bound[*label]) *label = (int32_t)k;
    return OK;
}

Err edit_unlike(char text[ERR_MAX], const EditPicture *p, Model *m, const int32_t *known, int32_t label,
                uint64_t seed) {
    real *image;
    Familiar f;
    const size_t side = m->side;
    *text = '\0';
    if (p->redrawn == m->h * m->w) return OK;
    TRY(mem_alloc(&image, 3 * side, side * sizeof *image, "picture"));
    Err e = image_prepare(image, &p->picture, PREP_FOLDER, side, -1, -1, 0);
    if (e == OK) e = familiar(&f, m, image, known, p->keep_token, label, seed);
    if (e == OK && f.unlike) familiar_text(text, m, &f);
    free(image);
    return e;
}
