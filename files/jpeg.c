/* jpeg.c - JPEG in. libjpeg reports errors by longjmp: its state is one struct, so that nothing lives in registers across
 * the jump, and the jump becomes an Err at one place. */
#include "files/decode.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jerror.h>
#include <jpeglib.h>

enum { JPEG_MAX_SCANS = 500 }; /* real progressive files have about 10; thousands are an attack on our time */

typedef struct {
    struct jpeg_decompress_struct cinfo;
    struct jpeg_error_mgr manager;
    struct jpeg_progress_mgr progress;
    jmp_buf jump;
    char message[JMSG_LENGTH_MAX];
    const uint8_t *bytes;
    size_t size;
    Image *im;
    uint8_t *raw; /* one CMYK row */
    int orientation;
} JpegIn;

static void jpeg_in_error(j_common_ptr cinfo) {
    JpegIn *j = cinfo->client_data;
    cinfo->err->format_message(cinfo, j->message);
    longjmp(j->jump, 1);
}

/* Warnings (level < 0) mean damage that libjpeg papers over, such as a file cut short: here they are errors. Two are
 * harmless and common in real datasets: padding in front of the end marker, and a JFIF version from the future. */
static void jpeg_in_warning(j_common_ptr cinfo, int level) {
    const struct jpeg_error_mgr *m = cinfo->err;
    int padding = m->msg_code == JWRN_EXTRANEOUS_DATA && m->msg_parm.i[1] == 0xd9;
    if (level < 0 && !padding && m->msg_code != JWRN_JFIF_MAJOR) jpeg_in_error(cinfo);
}

static void jpeg_in_progress(j_common_ptr cinfo) {
    JpegIn *j = cinfo->client_data;
    if (cinfo->is_decompressor && j->cinfo.input_scan_number > JPEG_MAX_SCANS) {
        snprintf(j->message, sizeof j->message, "more than %d scans", JPEG_MAX_SCANS);
        longjmp(j->jump, 1);
    }
}

/* rgb (W,3) from a row of CMYK (W,4). Files with an Adobe marker store inks inverted: 255 is no ink. */
static void cmyk_to_rgb(uint8_t *rgb, const uint8_t *cmyk, size_t W, int inverted) {
    unsigned flip = inverted ? 0 : 255;
    for (size_t x = 0; x < W; x++, cmyk += 4, rgb += 3)
        for (size_t c = 0; c < 3; c++) rgb[c] = (uint8_t)(((cmyk[c] ^ flip) * (cmyk[3] ^ flip) + 127) / 255);
}

static int jpeg_orientation(const struct jpeg_decompress_struct *cinfo) {
    enum { PREFIX = 6 };
    for (jpeg_saved_marker_ptr m = cinfo->marker_list; m; m = m->next)
        if (m->data_length > PREFIX && memcmp(m->data, "Exif\0\0", PREFIX) == 0)
            return exif_orientation(m->data + PREFIX, m->data_length - PREFIX);
    return 1;
}

/* Everything that may jump. */
static Err jpeg_in_body(JpegIn *j) {
    struct jpeg_decompress_struct *cinfo = &j->cinfo;
    jpeg_create_decompress(cinfo);
    cinfo->progress = &j->progress;
    j->progress.progress_monitor = jpeg_in_progress;
    jpeg_mem_src(cinfo, j->bytes, (unsigned long)j->size);
    jpeg_save_markers(cinfo, JPEG_APP0 + 1, 0xffff);
    jpeg_read_header(cinfo, TRUE);
    size_t W = cinfo->image_width;
    TRY(image_alloc(j->im, cinfo->image_height, W)); /* before libjpeg allocates anything of that size */
    int cmyk = cinfo->num_components == 4;
    j->orientation = jpeg_orientation(cinfo);
    cinfo->out_color_space = cmyk ? JCS_CMYK : JCS_RGB;
    if (cmyk) TRY(mem_alloc(&j->raw, W, 4, "a CMYK row"));
    jpeg_start_decompress(cinfo);
    while (cinfo->output_scanline < cinfo->output_height) {
        uint8_t *rgb = j->im->rgb + (size_t)cinfo->output_scanline * W * 3;
        JSAMPROW row = cmyk ? j->raw : rgb;
        jpeg_read_scanlines(cinfo, &row, 1);
        if (cmyk) cmyk_to_rgb(rgb, row, W, cinfo->saw_Adobe_marker);
    }
    jpeg_finish_decompress(cinfo); /* reads up to the end marker: finds files cut right before it */
    return OK;
}

Err jpeg_decode(Image *im, const uint8_t *bytes, size_t size, int upright) {
    JpegIn j = {.bytes = bytes, .size = size, .im = im};
    j.cinfo.err = jpeg_std_error(&j.manager);
    j.manager.error_exit = jpeg_in_error;
    j.manager.emit_message = jpeg_in_warning;
    j.cinfo.client_data = &j;
    Err e;
    if (setjmp(j.jump))
        e = err("damaged JPEG: %s", j.message);
    else
        e = jpeg_in_body(&j);
    jpeg_destroy_decompress(&j.cinfo);
    free(j.raw);
    return e == OK ? image_orient(im, upright ? j.orientation : 1) : FAILED;
}
