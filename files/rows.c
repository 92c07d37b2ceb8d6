/* rows.c - where a decoder's rows go: into a Resizer as they come, so that a picture of any size takes little memory; or
 * into a whole picture, where that is asked for.
 *
 * What all threads decode at a time takes DECODE_BYTES together. A picture that takes more by itself, such as a huge
 * progressive JPEG, which libjpeg holds whole, waits until it is alone, and is an error where the machine has less. */
#include "files/decode.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t given_back = PTHREAD_COND_INITIALIZER;
static size_t taken; /* bytes of the pictures that are being decoded */

static Err take(Rows *r, size_t bytes) {
    char what[120];
    pthread_mutex_lock(&lock);
    while (taken && taken + bytes > DECODE_BYTES) pthread_cond_wait(&given_back, &lock);
    taken += r->bytes = bytes;
    pthread_mutex_unlock(&lock);
    if (bytes <= DECODE_BYTES) return OK;
    snprintf(what, sizeof what, "reading a picture of %zu x %zu pixels", r->W, r->H);
    return memory_fits(bytes, memory_available(), what, "a smaller copy of it takes less");
}

static void rows_release(Rows *r) {
    resizer_free(r->resizer);
    image_free(&r->whole);
    free(r->row);
    r->resizer = NULL;
    r->row = NULL;
    if (!r->bytes) return;
    pthread_mutex_lock(&lock);
    taken -= r->bytes;
    r->bytes = 0;
    pthread_cond_broadcast(&given_back);
    pthread_mutex_unlock(&lock);
}

Err rows_size(Rows *r, size_t H, size_t W) {
    r->H = H, r->W = W;
    if (image_size_check(H, W) != OK) {
        r->too_many = 1;
        return err_damaged("%s", err_text());
    }
    r->too_many = r->most && H * W > r->most;
    if (r->too_many) return err("a picture of %zu x %zu pixels; at most %zu million expected", W, H, r->most / 1000000);
    return OK;
}

Err rows_begin(Rows *r, size_t H, size_t W, int orientation, int parts, size_t bytes) {
    Fit f = {0};
    rows_release(r);
    r->orientation = orientation && r->how & IMAGE_UPRIGHT ? orientation : 1;
    TRY(rows_size(r, H, W));
    const size_t h = r->orientation >= 5 ? W : H, w = r->orientation >= 5 ? H : W;
    if (r->size) TRY(prep_fit(&f, r->prep, r->size, h, w));
    TRY(take(r, bytes + (r->size ? resizer_bytes(&f, parts, r->orientation) : 3 * H * W)));
    if (parts) TRY(mem_alloc(&r->row, W, 3, "a row of a picture"));
    return r->size ? resizer_start(&r->resizer, &f, H, W, parts, r->orientation) : image_alloc(&r->whole, h, w);
}

void rows_put(Rows *r, size_t y, const uint8_t *rgb) {
    if (r->resizer)
        resizer_row(r->resizer, y, rgb);
    else if (r->orientation == 1)
        memcpy(r->whole.rgb + 3 * y * r->W, rgb, 3 * r->W);
    else
        rows_put_part(r, y, rgb, r->W, 0, 1);
}

void rows_put_part(Rows *r, size_t y, const uint8_t *rgb, size_t n, size_t from, size_t step) {
    if (r->resizer) {
        memset(r->row, 0, 3 * r->W);
        for (size_t i = 0; i < n; i++) memcpy(r->row + 3 * (from + i * step), rgb + 3 * i, 3);
        resizer_row(r->resizer, y, r->row);
    } else
        for (size_t i = 0; i < n; i++)
            memcpy(image_place(&r->whole, r->orientation, y, from + i * step), rgb + 3 * i, 3);
}

Err rows_end(Rows *r, Err e) {
    Image *out = r->out;
    *out = (Image){0};
    if (e == OK && r->resizer)
        e = resizer_finish(r->resizer, out);
    else if (e == OK)
        *out = r->whole, r->whole = (Image){0};
    if (e == OK) out->note = r->note;
    rows_release(r);
    return e;
}
