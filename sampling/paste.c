/* paste.c - a completed square goes back into the whole picture, at the picture's own size.
 *
 * What the mask keeps is not touched, not by a single bit. In the hole the new picture fades in from its edge, over a
 * quarter of a token, so that no seam shows; what is drawn is opaque. */
#include "sampling/sampling.h"

#include <stdlib.h>
#include <string.h>

enum { STEP = 3, DIAGONAL = 4, FAR = 60000 }; /* a chamfer distance: thirds of a pixel (Borgefors 1986) */

/* Of a pixel outside of the square: kept, 0, if it is in the picture; else no edge is there. */
static unsigned outside(const EditPicture *p, long y, long x) {
    const long at_y = (long)p->y0 + y, at_x = (long)p->x0 + x;
    return at_y >= 0 && at_x >= 0 && at_y < (long)p->H && at_x < (long)p->W ? 0 : FAR;
}

static void lower_by(uint16_t *d, const EditPicture *p, const uint16_t *all, long y, long x, unsigned step) {
    const long S = (long)p->square;
    const unsigned there = y >= 0 && x >= 0 && y < S && x < S ? all[y * S + x] : outside(p, y, x);
    if (there + step < *d) *d = (uint16_t)(there + step);
}

/* d (square,square) = how far a pixel of the hole is from what is kept. */
static void distances(uint16_t *d, const EditPicture *p) {
    const long S = (long)p->square;
    for (long i = 0; i < S * S; i++) d[i] = p->hole[i] ? FAR : 0;
    for (int back = 0; back < 2; back++) {
        const long by = back ? -1 : 1;
        for (long i = 0; i < S * S; i++) {
            const long at = back ? S * S - 1 - i : i, y = at / S, x = at % S;
            lower_by(&d[at], p, d, y, x - by, STEP);
            lower_by(&d[at], p, d, y - by, x, STEP);
            lower_by(&d[at], p, d, y - by, x - by, DIAGONAL);
            lower_by(&d[at], p, d, y - by, x + by, DIAGONAL);
        }
    }
}

/* The pixel of the whole picture fades to the new one: share of feather. */
static void blend(Image *out, size_t at, const uint8_t *drawn, unsigned share, unsigned feather) {
    const unsigned alpha = out->alpha ? out->alpha[at] : 255;
    const unsigned old = (feather - share) * alpha,
                   all = feather * 255; /* what is transparent does not shine through */
    for (size_t c = 0; c < 3; c++) {
        uint8_t *to = out->rgb + 3 * at + c;
        *to = (uint8_t)((old * *to + (all - old) * drawn[c] + all / 2) / all);
    }
    if (out->alpha) out->alpha[at] = 255;
}

Err paste_picture(Image *out, const EditPicture *p, const Model *m, const Image *drawn) {
    const size_t S = p->square, n = p->H * p->W;
    const unsigned feather = (unsigned)(STEP * (S / m->h / 4 + 1));
    Image large = {0};
    uint16_t *d = NULL;
    *out = (Image){.H = p->H, .W = p->W};
    Err e = mem_alloc(&out->rgb, n, 3, "a picture");
    if (e == OK && p->whole.alpha) e = mem_alloc(&out->alpha, n, 1, "a picture");
    if (e == OK) e = mem_alloc(&d, S * S, sizeof *d, "a picture's seam");
    if (e == OK) e = image_resize(&large, drawn, S, S, FILTER_BICUBIC);
    if (e == OK) {
        memcpy(out->rgb, p->whole.rgb, 3 * n);
        if (out->alpha) memcpy(out->alpha, p->whole.alpha, n);
        distances(d, p);
        for (size_t i = 0; i < S * S; i++)
            if (p->hole[i])
                blend(out, (p->y0 + i / S) * p->W + p->x0 + i % S, large.rgb + 3 * i, d[i] < feather ? d[i] : feather,
                      feather);
    }
    if (e != OK) image_free(out);
    image_free(&large);
    free(d);
    return e;
}
