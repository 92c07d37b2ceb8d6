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
    Rows *rows;
    uint8_t *raw, *rgb; /* a row: CMYK; RGB */
} JpegIn;

static void jpeg_in_error(j_common_ptr cinfo) {
    JpegIn *j = cinfo->client_data;
    cinfo->err->format_message(cinfo, j->message);
    longjmp(j->jump, 1);
}

/* Warnings (level < 0) mean damage that libjpeg papers over, such as a file cut short: here they are errors. Those
 * that tell nothing of pixels are not: an unknown Adobe transform or JFIF version, a bad colour profile, a baseline
 * scan that names another range of coefficients (Samsung's cameras), scans in an unusual order, and bytes in front
 * of a marker that belong to nothing: what is in front of them was decoded whole, and a marker other than the
 * expected is another warning. */
static void jpeg_in_warning(j_common_ptr cinfo, int level) {
    if (level >= 0) return;
    switch (cinfo->err->msg_code) {
    case JWRN_JFIF_MAJOR:
    case JWRN_ADOBE_XFORM:
    case JWRN_BOGUS_ICC:
    case JWRN_NOT_SEQUENTIAL:
    case JWRN_BOGUS_PROGRESSION:
    case JWRN_EXTRANEOUS_DATA: return;
    default: jpeg_in_error(cinfo);
    }
}

static void jpeg_in_progress(j_common_ptr cinfo) {
    JpegIn *j = cinfo->client_data;
    if (cinfo->is_decompressor && j->cinfo.input_scan_number > JPEG_MAX_SCANS) {
        snprintf(j->message, sizeof j->message, "more than %d scans", JPEG_MAX_SCANS);
        longjmp(j->jump, 1);
    }
}

/* rgb (W,3) from a row of CMYK (W,4). inverted: 255 is no ink, as in files with an Adobe marker; for Pillow always. */
static void cmyk_to_rgb(uint8_t *rgb, const uint8_t *cmyk, size_t W, int inverted) {
    unsigned flip = inverted ? 0 : 255;
    for (size_t x = 0; x < W; x++, cmyk += 4, rgb += 3)
        for (size_t c = 0; c < 3; c++) rgb[c] = (uint8_t)(((cmyk[c] ^ flip) * (cmyk[3] ^ flip) + 127) / 255);
}

/* Of the first APP1 marker with EXIF that says it, else of one with XMP. */
static int jpeg_orientation(const struct jpeg_decompress_struct *cinfo) {
    static const char exif[] = "Exif\0", xmp[] = "http://ns.adobe.com/xap/1.0/"; /* and a zero byte */
    int found = 0;
    for (jpeg_saved_marker_ptr m = cinfo->marker_list; m && !found; m = m->next)
        if (m->data_length > sizeof exif && memcmp(m->data, exif, sizeof exif) == 0)
            found = exif_orientation(m->data + sizeof exif, m->data_length - sizeof exif);
    for (jpeg_saved_marker_ptr m = cinfo->marker_list; m && !found; m = m->next)
        if (m->data_length > sizeof xmp && memcmp(m->data, xmp, sizeof xmp) == 0)
            found = xmp_orientation(m->data + sizeof xmp, m->data_length - sizeof xmp);
    return found;
}

/* What libjpeg keeps: a few rows; all coefficients where a row comes in several scans. */
static size_t jpeg_bytes(j_decompress_ptr cinfo) {
    size_t bytes = (size_t)cinfo->image_width * 64 * (size_t)cinfo->num_components;
    for (int c = 0; jpeg_has_multiple_scans(cinfo) && c < cinfo->num_components; c++)
        bytes += (size_t)cinfo->comp_info[c].width_in_blocks * cinfo->comp_info[c].height_in_blocks * sizeof(JBLOCK);
    return bytes;
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
    const size_t W = cinfo->image_width;
    const int cmyk = cinfo->num_components == 4, inverted = cinfo->saw_Adobe_marker || j->rows->how & IMAGE_OFFICIAL;
    /* before libjpeg allocates anything of that size */
    TRY(rows_begin(j->rows, cinfo->image_height, W, jpeg_orientation(cinfo), 0, jpeg_bytes(cinfo)));
    TRY(mem_alloc(&j->rgb, W, 3, "a row of a picture"));
    if (cmyk) TRY(mem_alloc(&j->raw, W, 4, "a CMYK row"));
    cinfo->out_color_space = cmyk ? JCS_CMYK : JCS_RGB;
    jpeg_start_decompress(cinfo);
    while (cinfo->output_scanline < cinfo->output_height) {
        const size_t y = cinfo->output_scanline;
        JSAMPROW row = cmyk ? j->raw : j->rgb;
        jpeg_read_scanlines(cinfo, &row, 1);
        if (cmyk) cmyk_to_rgb(j->rgb, row, W, inverted);
        rows_put(j->rows, y, j->rgb);
    }
    jpeg_finish_decompress(cinfo); /* reads up to the end marker: finds files cut right before it */
    return OK;
}

Err jpeg_decode(Rows *r, const uint8_t *bytes, size_t size) {
    JpegIn j = {.bytes = bytes, .size = size, .rows = r};
    j.cinfo.err = jpeg_std_error(&j.manager);
    j.manager.error_exit = jpeg_in_error;
    j.manager.emit_message = jpeg_in_warning;
    j.cinfo.client_data = &j;
    Err e;
    if (!setjmp(j.jump))
        e = jpeg_in_body(&j);
    else if (j.manager.msg_code == JERR_OUT_OF_MEMORY)
        e = err("no memory to read a JPEG");
    else
        e = err_damaged("damaged JPEG: %s", j.message);
    jpeg_destroy_decompress(&j.cinfo);
    free(j.raw);
    free(j.rgb);
    return e;
}
