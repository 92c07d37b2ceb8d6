/* test_images.c - pictures in and out, resizing against Pillow and OpenCV, the official preprocessing.
 *
 * Every picture file is made here, with libpng, libjpeg and libwebp, in a temporary folder that is removed at the end.
 * Damage is systematic: files are cut at every sixteenth (small ones at every byte) and every byte is flipped; run
 * under sanitizers this is the fuzz test of the readers. */
#include "files.h"

#include <setjmp.h>
#include <sys/resource.h>
#include <zlib.h>

#include <jpeglib.h>
#include <png.h>

#include "files/files.h"
#include "data_tables.h"

#ifdef HAVE_WEBP
#include <webp/encode.h>
#endif

/* ---- PNG files of every kind ---- */

typedef struct {
    size_t H, W;
    int type, depth, interlaced;
    const uint8_t *rows; /* packed as PNG stores them, (H, bytes per row) */
    int n_palette, n_trans;
    png_color palette[256];
    png_byte trans[256]; /* palette alphas */
    png_color_16 *key;   /* transparent colour of grey and RGB */
    const uint8_t *exif;
    size_t exif_bytes;
} PngSpec;

static void write_png(const char *path, const PngSpec *s) {
    FILE *f = fopen(path, "wb");
    png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, NULL, NULL, NULL);
    png_infop info = png_create_info_struct(png);
    if (!f || setjmp(png_jmpbuf(png))) exit(1);
    png_init_io(png, f);
    png_set_IHDR(png, info, (png_uint_32)s->W, (png_uint_32)s->H, s->depth, s->type,
                 s->interlaced ? PNG_INTERLACE_ADAM7 : PNG_INTERLACE_NONE, 0, 0);
    if (s->n_palette) png_set_PLTE(png, info, s->palette, s->n_palette);
    if (s->n_trans || s->key) png_set_tRNS(png, info, s->trans, s->n_trans, s->key);
    if (s->exif) png_set_eXIf_1(png, info, (png_uint_32)s->exif_bytes, (png_bytep)s->exif);
    png_write_info(png, info);
    size_t stride = png_get_rowbytes(png, info);
    png_bytep *row = malloc(s->H * sizeof *row);
    for (size_t y = 0; y < s->H; y++) row[y] = (png_bytep)s->rows + y * stride;
    png_write_image(png, row);
    png_write_end(png, info);
    png_destroy_write_struct(&png, &info);
    free(row);
    fclose(f);
}

/* Whether path reads as these (H,W,3) pixels. */
static int reads_as(const char *path, size_t H, size_t W, const uint8_t *rgb) {
    Image got, want = {H, W, (uint8_t *)rgb};
    if (image_read(&got, path) != OK) {
        printf("     %s\n", err_text());
        return 0;
    }
    int same = difference(&got, &want) == 0;
    image_free(&got);
    return same;
}

static void test_png_gray(void) {
    const char *path = in_folder("gray.png");
    static const uint8_t one[] = {0xa0}, two[] = {0x1b}, four[] = {0x0f, 0x70}, eight[] = {0, 1, 254, 255},
                         sixteen[] = {0, 0, 0, 0x80, 0x00, 0x81, 0xff, 0x7e, 0xff, 0x7f, 0xff, 0xff},
                         gray_alpha[] = {100, 255, 100, 0, 100, 128, 7, 3};
    PngSpec s = {.H = 1, .W = 3, .type = PNG_COLOR_TYPE_GRAY, .depth = 1, .rows = one};
    write_png(path, &s);
    CHECK(reads_as(path, 1, 3, (uint8_t[]){255, 255, 255, 0, 0, 0, 255, 255, 255}));
    CHECK(!reads_as(path, 1, 3, (uint8_t[]){255, 255, 255, 0, 1, 0, 255, 255, 255}));
    s.depth = 2, s.rows = two, s.W = 4;
    write_png(path, &s);
    CHECK(reads_as(path, 1, 4, (uint8_t[]){0, 0, 0, 85, 85, 85, 170, 170, 170, 255, 255, 255}));
    s.depth = 4, s.rows = four, s.W = 3;
    write_png(path, &s);
    CHECK(reads_as(path, 1, 3, (uint8_t[]){0, 0, 0, 255, 255, 255, 119, 119, 119}));
    s.depth = 8, s.rows = eight, s.W = 4;
    write_png(path, &s);
    CHECK(reads_as(path, 1, 4, (uint8_t[]){0, 0, 0, 1, 1, 1, 254, 254, 254, 255, 255, 255}));
    s.key = &(png_color_16){.gray = 1}; /* the transparent grey shows the white background */
    write_png(path, &s);
    CHECK(reads_as(path, 1, 4, (uint8_t[]){0, 0, 0, 255, 255, 255, 254, 254, 254, 255, 255, 255}));
    s.key = NULL, s.depth = 16, s.rows = sixteen, s.W = 6; /* 128/257 rounds to 0, 129/257 to 1 */
    write_png(path, &s);
    CHECK(reads_as(path, 1, 6, (uint8_t[]){0, 0, 0, 0, 0, 0, 1, 1, 1, 254, 254, 254, 255, 255, 255, 255, 255, 255}));
    s.type = PNG_COLOR_TYPE_GRAY_ALPHA, s.depth = 8, s.rows = gray_alpha, s.W = 4;
    write_png(path, &s);
    CHECK(reads_as(path, 1, 4, (uint8_t[]){100, 100, 100, 255, 255, 255, 177, 177, 177, 252, 252, 252}));
}

static void test_png_palette(void) {
    const char *path = in_folder("palette.png");
    static const uint8_t rows[] = {0x18, 0x40}, bytes[] = {0, 1, 2, 1};
    PngSpec s = {.H = 2, .W = 3, .type = PNG_COLOR_TYPE_PALETTE, .depth = 2, .rows = rows, .n_palette = 3};
    s.palette[0] = (png_color){10, 20, 30}, s.palette[1] = (png_color){200, 100, 0},
    s.palette[2] = (png_color){1, 2, 3};
    write_png(path, &s);
    CHECK(reads_as(path, 2, 3, (uint8_t[]){10, 20, 30, 200, 100, 0, 1, 2, 3, 200, 100, 0, 10, 20, 30, 10, 20, 30}));
    s.n_trans = 2, s.trans[0] = 0, s.trans[1] = 51, s.depth = 8, s.rows = bytes, s.H = 1, s.W = 4;
    write_png(path, &s); /* alpha 51 = 1/5 */
    CHECK(reads_as(path, 1, 4, (uint8_t[]){255, 255, 255, 244, 224, 204, 1, 2, 3, 244, 224, 204}));
    static const uint8_t outside[] = {3, 3, 3, 3}; /* beyond the palette: libpng's choice of colour, but no crash */
    s.rows = outside;
    write_png(path, &s);
    Image im;
    if (image_read(&im, path) == OK) image_free(&im);
}

/* All 65536 pairs of colour and alpha over white: nearest integer, no ties possible. The same in 16 bits, sampled. */
static void test_png_alpha(void) {
    static uint8_t rows[256 * 256 * 4], wide[256 * 256 * 8];
    for (size_t i = 0; i < 65536; i++) {
        rows[i * 4] = (uint8_t)i, rows[i * 4 + 1] = (uint8_t)(255 - i), rows[i * 4 + 2] = 0,
                 rows[i * 4 + 3] = (uint8_t)(i >> 8);
        for (size_t k = 0; k < 8; k++) wide[i * 8 + k] = (uint8_t)mix((uint32_t)(i * 8 + k));
    }
    PngSpec s = {.H = 256, .W = 256, .type = PNG_COLOR_TYPE_RGBA, .depth = 8, .rows = rows};
    write_png(in_folder("alpha.png"), &s);
    s.depth = 16, s.rows = wide;
    write_png(in_folder("alpha16.png"), &s);
    Image im, im16;
    CHECK_OK(image_read(&im, in_folder("alpha.png")));
    CHECK_OK(image_read(&im16, in_folder("alpha16.png")));
    size_t wrong = 0, wrong16 = 0;
    for (size_t i = 0; i < 65536; i++)
        for (size_t c = 0; c < 3; c++) {
            int want = rows[i * 4 + c] * rows[i * 4 + 3] + 255 * (255 - rows[i * 4 + 3]);
            wrong += 2 * abs(255 * im.rgb[i * 3 + c] - want) > 255;
            const uint8_t *p = wide + i * 8;
            double v = (p[c * 2] * 256 + p[c * 2 + 1]) / 65535.0, a = (p[6] * 256 + p[7]) / 65535.0;
            wrong16 += fabs(im16.rgb[i * 3 + c] - 255 * (v * a + 1 - a)) > 0.5 + 1e-9;
        }
    CHECK(wrong == 0 && wrong16 == 0);
    image_free(&im);
    image_free(&im16);
}

static void test_png_interlaced(void) {
    int wrong = 0;
    for (size_t H = 1; H <= 9; H++)
        for (size_t W = 1; W <= 9; W++) {
            Image im = picture(H, W);
            PngSpec s = {.H = H, .W = W, .type = PNG_COLOR_TYPE_RGB, .depth = 8, .interlaced = 1, .rows = im.rgb};
            write_png(in_folder("interlaced.png"), &s);
            wrong += !reads_as(in_folder("interlaced.png"), H, W, im.rgb);
            image_free(&im);
        }
    CHECK(wrong == 0);
}

/* ---- JPEG files of every kind ---- */

typedef struct {
    J_COLOR_SPACE in, stored; /* in: JCS_RGB, JCS_GRAYSCALE or JCS_CMYK */
    int progressive, no_adobe, restarts, quality;
    const uint8_t *exif;
    size_t exif_bytes;
} JpegSpec;

/* rows (H,W,channels of s->in) */
static void write_jpeg(const char *path, size_t H, size_t W, const uint8_t *rows, const JpegSpec *s) {
    struct jpeg_compress_struct c;
    struct jpeg_error_mgr manager;
    FILE *f = fopen(path, "wb");
    c.err = jpeg_std_error(&manager);
    jpeg_create_compress(&c);
    jpeg_stdio_dest(&c, f);
    c.image_width = (JDIMENSION)W, c.image_height = (JDIMENSION)H;
    c.in_color_space = s->in;
    c.input_components = s->in == JCS_GRAYSCALE ? 1 : s->in == JCS_RGB ? 3 : 4;
    jpeg_set_defaults(&c);
    jpeg_set_colorspace(&c, s->stored);
    for (int k = 0; k < c.num_components; k++) c.comp_info[k].h_samp_factor = c.comp_info[k].v_samp_factor = 1;
    jpeg_set_quality(&c, s->quality, TRUE);
    if (s->progressive) jpeg_simple_progression(&c);
    if (s->no_adobe) c.write_Adobe_marker = FALSE;
    c.restart_interval = s->restarts ? 2 : 0;
    jpeg_start_compress(&c, TRUE);
    if (s->exif) jpeg_write_marker(&c, JPEG_APP0 + 1, s->exif, (unsigned)s->exif_bytes);
    while (c.next_scanline < H) {
        JSAMPROW row = (JSAMPROW)rows + c.next_scanline * W * (size_t)c.input_components;
        jpeg_write_scanlines(&c, &row, 1);
    }
    jpeg_finish_compress(&c);
    jpeg_destroy_compress(&c);
    fclose(f);
}

/* Largest difference between what path reads as and the picture. */
static int jpeg_error(const char *path, const Image *want) {
    Image got;
    if (image_read(&got, path) != OK) {
        printf("     %s\n", err_text());
        return 999;
    }
    int worst = difference(&got, want);
    image_free(&got);
    return worst;
}

static void test_jpeg_colours(void) {
    enum { H = 21, W = 35 };
    const char *path = in_folder("a.jpg");
    Image im = gradient(H, W), gray = gradient(H, W);
    write_jpeg(path, H, W, im.rgb, &(JpegSpec){JCS_RGB, JCS_YCbCr, .quality = 100});
    CHECK(jpeg_error(path, &im) <= 3);
    write_jpeg(path, H, W, im.rgb, &(JpegSpec){JCS_RGB, JCS_RGB, .quality = 100});
    CHECK(jpeg_error(path, &im) <= 3);
    write_jpeg(path, H, W, im.rgb, &(JpegSpec){JCS_RGB, JCS_YCbCr, .progressive = 1, .quality = 100});
    CHECK(jpeg_error(path, &im) <= 3);
    static uint8_t luma[H * W], ink[H * W * 4];
    for (size_t i = 0; i < H * W; i++)
        gray.rgb[i * 3] = gray.rgb[i * 3 + 1] = gray.rgb[i * 3 + 2] = luma[i] = im.rgb[i * 3];
    write_jpeg(path, H, W, luma, &(JpegSpec){JCS_GRAYSCALE, JCS_GRAYSCALE, .quality = 100});
    CHECK(jpeg_error(path, &gray) <= 2);
    for (size_t i = 0; i < H * W; i++) { /* a third of black ink; Adobe's inverted numbers: 255 is no ink */
        ink[i * 4 + 3] = 170;
        for (size_t c = 0; c < 3; c++)
            ink[i * 4 + c] = im.rgb[i * 3 + c], im.rgb[i * 3 + c] = (uint8_t)(im.rgb[i * 3 + c] * 2 / 3);
    }
    write_jpeg(path, H, W, ink, &(JpegSpec){JCS_CMYK, JCS_CMYK, .quality = 100});
    CHECK(jpeg_error(path, &im) <= 3);
    write_jpeg(path, H, W, ink, &(JpegSpec){JCS_CMYK, JCS_YCCK, .quality = 100});
    CHECK(jpeg_error(path, &im) <= 4);
    for (size_t i = 0; i < sizeof ink; i++) ink[i] = 255 - ink[i];
    write_jpeg(path, H, W, ink, &(JpegSpec){JCS_CMYK, JCS_CMYK, .no_adobe = 1, .quality = 100});
    CHECK(jpeg_error(path, &im) <= 3);
    write_jpeg(path, H, W, ink,
               &(JpegSpec){JCS_CMYK, JCS_CMYK, .quality = 100}); /* inverted the wrong way: must show */
    CHECK(jpeg_error(path, &im) > 50);
    image_free(&im);
    image_free(&gray);
}

/* ---- JPEGs that are whole, but odd ---- */

/* bytes with `n` more at `at`, or some replaced by them, in odd.jpg. */
static const char *odd_jpeg(const uint8_t *bytes, size_t size, size_t at, const char *more, size_t n, size_t replaced) {
    static uint8_t out[1 << 16];
    memcpy(out, bytes, at);
    memcpy(out + at, more, n);
    memcpy(out + at + n, bytes + at + replaced, size - at - replaced);
    put_file(in_folder("odd.jpg"), out, size + n - replaced);
    return in_folder("odd.jpg");
}

/* What libjpeg warns of and harms no pixel: the same picture as without. Stray bytes in front of every marker of a
 * baseline, a progressive and a file with restarts; a baseline scan of other coefficients; a marker of Adobe's with an
 * unknown transform; JFIF 9. Damage stays damage. */
static void test_jpeg_warnings(void) {
    static const char sos[][4] = {"\0\0\0", "\1\77\0", "\0\77\1", "\0\77\20"},
                      adobe[] = "\xff\xee\0\16Adobe\0d\0\0\0\0\11";
    static uint8_t bytes[1 << 14];
    Image im = gradient(37, 53), plain;
    for (int kind = 0; kind < 3; kind++) {
        size_t size, markers = 0, at;
        write_jpeg(in_folder("odd.jpg"), 37, 53, im.rgb,
                   &(JpegSpec){JCS_RGB, JCS_YCbCr, .progressive = kind == 1, .restarts = kind == 2, .quality = 90});
        CHECK_OK(image_read(&plain, in_folder("odd.jpg")));
        memcpy(bytes, get_file(in_folder("odd.jpg"), &size), sizeof bytes);
        for (at = 3; at + 1 < size; at++) { /* behind the first three, by which a JPEG is told */
            if (bytes[at] != 0xff || bytes[at + 1] < 0xc0 || bytes[at + 1] == 0xff) continue;
            markers++;
            CHECK(jpeg_error(odd_jpeg(bytes, size, at, "\0", 1, 0), &plain) == 0);
            CHECK(jpeg_error(odd_jpeg(bytes, size, at, "\xff\0\x12\x34", 4, 0), &plain) == 0);
        }
        CHECK(markers > (kind ? 12 : 7));
        CHECK(jpeg_error(odd_jpeg(bytes, size, size, "more\xff\xd8\xff", 7, 0), &plain) == 0);
        CHECK(jpeg_error(odd_jpeg(bytes, size, 20, adobe, 16, 0), &plain) == 0); /* behind JFIF, which says YCbCr */
        CHECK(jpeg_error(odd_jpeg(bytes, size, 11, "\11", 1, 1), &plain) == 0);
        CHECK(jpeg_error(odd_jpeg(bytes, size, size - 2, "", 0, 2), &plain) == 999);
        CHECK(strstr(err_text(), "damaged JPEG: Premature end") != NULL);
        CHECK(jpeg_error(odd_jpeg(bytes, size, size - 40, "", 0, 40), &plain) == 999);
        for (at = 2; kind != 1 && !(bytes[at] == 0xff && bytes[at + 1] == 0xda);)
            at += 2 + (size_t)(bytes[at + 2] << 8 | bytes[at + 3]);
        for (size_t k = 0; kind != 1 && k < sizeof sos / sizeof *sos; k++)
            CHECK(jpeg_error(odd_jpeg(bytes, size, at + 11, sos[k], 3, 3), &plain) == 0);
        image_free(&plain);
    }
    image_free(&im);
}

/* ---- The official presets: Pillow's convert("RGB"), whose values stand here ---- */

/* Whether path reads as these pixels under the official presets, and otherwise under ours. */
static int official_reads_as(const char *path, size_t n, const uint8_t *rgb) {
    Image got, ours;
    if (image_read_as(&got, path, IMAGE_OFFICIAL) != OK || image_read_as(&ours, path, IMAGE_UPRIGHT) != OK) return 0;
    int same = got.H * got.W == n && !memcmp(got.rgb, rgb, 3 * n) && memcmp(got.rgb, ours.rgb, 3 * n) != 0;
    image_free(&got), image_free(&ours);
    return same;
}

static void test_official_png(void) {
    static const struct {
        int type, depth;
        uint8_t row[16], rgb[6]; /* of two pixels */
    } k[] = {
        {PNG_COLOR_TYPE_RGBA, 8, {9, 8, 7, 0, 200, 100, 50, 128}, {9, 8, 7, 200, 100, 50}},
        {PNG_COLOR_TYPE_GRAY_ALPHA, 8, {9, 0, 200, 128}, {9, 9, 9, 200, 200, 200}},
        {PNG_COLOR_TYPE_RGB, 16, {1, 0xff, 2, 0x80, 3, 0x81, 4, 200, 5, 0, 0, 255}, {1, 2, 3, 4, 5, 0}},
        {PNG_COLOR_TYPE_RGBA, 16, {1, 0xff, 2, 0x80, 3, 1, 0, 0, 9, 9, 8, 8, 7, 255, 128, 0}, {1, 2, 3, 9, 8, 7}},
        {PNG_COLOR_TYPE_GRAY_ALPHA, 16, {7, 255, 0, 0, 9, 9, 128, 0}, {7, 7, 7, 9, 9, 9}},
        {PNG_COLOR_TYPE_GRAY, 16, {0, 200, 1, 0}, {200, 200, 200, 255, 255, 255}}, /* clipped: Pillow's issue 3011 */
    };
    const char *path = in_folder("official.png");
    for (size_t i = 0; i < sizeof k / sizeof *k; i++)
        for (int interlaced = 0; interlaced < 2; interlaced++) {
            PngSpec s = {.H = 1, .W = 2, .type = k[i].type, .depth = k[i].depth, .rows = k[i].row};
            s.interlaced = interlaced;
            write_png(path, &s);
            if (!CHECK(official_reads_as(path, 2, k[i].rgb))) printf("     kind %zu\n", i);
        }
    PngSpec s = {.H = 1, .W = 2, .type = PNG_COLOR_TYPE_RGB, .depth = 8, .rows = (uint8_t[]){1, 2, 3, 4, 5, 6}};
    s.key = &(png_color_16){.red = 1, .green = 2, .blue = 3}; /* tRNS is not asked */
    write_png(path, &s);
    CHECK(official_reads_as(path, 2, s.rows));
    s.type = PNG_COLOR_TYPE_GRAY, s.depth = 16, s.rows = (uint8_t[]){0, 3, 3, 0}, s.key->gray = 3;
    write_png(path, &s);
    CHECK(official_reads_as(path, 2, (uint8_t[]){3, 3, 3, 255, 255, 255}));
    s.type = PNG_COLOR_TYPE_PALETTE, s.depth = 8, s.rows = (uint8_t[]){0, 1}, s.n_palette = s.n_trans = 2, s.key = NULL;
    s.palette[0] = (png_color){1, 2, 3}, s.palette[1] = (png_color){4, 5, 6}, s.trans[1] = 90;
    write_png(path, &s);
    CHECK(official_reads_as(path, 2, (uint8_t[]){1, 2, 3, 4, 5, 6}));
}

static void test_official_jpeg(void) {
    enum { H = 8, W = 16 };
    const char *path = in_folder("official.jpg");
    Image im = gradient(H, W), got;
    uint8_t ink[H * W * 4];
    for (size_t i = 0; i < H * W; i++) memcpy(ink + 4 * i, im.rgb + 3 * i, 3), ink[4 * i + 3] = 255;
    write_jpeg(path, H, W, ink, &(JpegSpec){JCS_CMYK, JCS_CMYK, .no_adobe = 1, .quality = 100});
    CHECK_OK(image_read_as(&got, path, IMAGE_OFFICIAL));
    CHECK(difference(&got, &im) <= 2); /* 255 is no ink with or without a marker */
    image_free(&got);
    CHECK(jpeg_error(path, &im) > 50);
    write_jpeg(path, H, W, ink, &(JpegSpec){JCS_CMYK, JCS_CMYK, .quality = 100});
    CHECK_OK(image_read_as(&got, path, IMAGE_OFFICIAL));
    CHECK(difference(&got, &im) <= 2 && jpeg_error(path, &im) <= 2);
    image_free(&got), image_free(&im);
}

/* ---- EXIF ---- */

/* "Exif\0\0" and a TIFF directory with one unrelated entry and the orientation. Returns the length. */
static size_t make_exif(uint8_t *p, int little, int orientation) {
    static const uint8_t big_endian[] = {'E', 'x', 'i', 'f', 0, 0, 'M', 'M', 0, 42, 0, 0, 0, 8, 0, 2, 1, 0, 0, 3, 0, 0,
                                         0,   1,   0,   9,   0, 0, 1,   18,  0, 3,  0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0};
    static const uint8_t little_endian[] = {'E', 'x', 'i', 'f', 0, 0, 'I', 'I', 42, 0, 8, 0, 0, 0,  2,
                                            0,   0,   1,   3,   0, 1, 0,   0,   0,  9, 0, 0, 0, 18, 1,
                                            3,   0,   1,   0,   0, 0, 0,   0,   0,  0, 0, 0, 0, 0};
    memcpy(p, little ? little_endian : big_endian, sizeof big_endian);
    p[little ? 36 : 37] = (uint8_t)orientation;
    return sizeof big_endian;
}

/* Where the viewer's pixel (y,x) of an upright HxW picture is stored, by the words of the EXIF standard: which sides of
 * the scene row 0 and column 0 of the file are. */
static void stored_at(size_t *sy, size_t *sx, int orientation, size_t y, size_t x, size_t H, size_t W) {
    size_t top = y, bottom = H - 1 - y, left = x, right = W - 1 - x; /* distances from the sides of the scene */
    size_t row[] = {0, top, top, bottom, bottom, left, right, right, left};
    size_t column[] = {0, left, right, right, left, top, top, bottom, bottom};
    *sy = row[orientation];
    *sx = column[orientation];
}

static void test_exif(void) {
    enum { H = 16, W = 24 };
    Image scene = gradient(H, W);
    uint8_t exif[64], stored[H * W * 3];
    for (int orientation = 0; orientation <= 9; orientation++)
        for (int little = 0; little < 2; little++) {
            int o = orientation >= 1 && orientation <= 8 ? orientation : 1; /* others mean nothing */
            size_t n = make_exif(exif, little, orientation), h = o >= 5 ? W : H, w = o >= 5 ? H : W, sy, sx;
            for (size_t y = 0; y < H; y++)
                for (size_t x = 0; x < W; x++) {
                    stored_at(&sy, &sx, o, y, x, H, W);
                    memcpy(stored + (sy * w + sx) * 3, scene.rgb + (y * W + x) * 3, 3);
                }
            JpegSpec s = {JCS_RGB, JCS_YCbCr, .quality = 100, .exif = exif, .exif_bytes = n};
            write_jpeg(in_folder("exif.jpg"), h, w, stored, &s);
            CHECK(jpeg_error(in_folder("exif.jpg"), &scene) <= 3);
            PngSpec p = {.H = h, .W = w, .type = PNG_COLOR_TYPE_RGB, .depth = 8, .rows = stored};
            p.exif = exif + 6, p.exif_bytes = n - 6;
            write_png(in_folder("exif.png"), &p);
            CHECK(reads_as(in_folder("exif.png"), H, W, scene.rgb));
        }
    image_free(&scene);
}

/* The official code ignores EXIF: the pixels as they are stored. */
static void test_exif_ignored(void) {
    enum { H = 8, W = 24 };
    uint8_t exif[64];
    Image im = gradient(H, W), got;
    size_t n = make_exif(exif, 0, 6), size;
    JpegSpec s = {JCS_RGB, JCS_YCbCr, .quality = 100, .exif = exif, .exif_bytes = n};
    write_jpeg(in_folder("exif.jpg"), H, W, im.rgb, &s);
    const uint8_t *bytes = get_file(in_folder("exif.jpg"), &size);
    CHECK_OK(image_decode(&got, bytes, size, 0));
    CHECK(difference(&got, &im) <= 3);
    image_free(&got);
    CHECK_OK(image_decode(&got, bytes, size, 1));
    CHECK(got.H == W && got.W == H);
    image_free(&got);
    PngSpec p = {.H = H, .W = W, .type = PNG_COLOR_TYPE_RGB, .depth = 8, .rows = im.rgb};
    p.exif = exif + 6, p.exif_bytes = n - 6;
    write_png(in_folder("exif.png"), &p);
    bytes = get_file(in_folder("exif.png"), &size);
    CHECK_OK(image_decode(&got, bytes, size, 0));
    CHECK(difference(&got, &im) == 0);
    image_free(&got);
    image_free(&im);
}

/* Metadata is not worth an error: any damage reads as some orientation, never past the end (sanitizers watch). */
static void test_exif_damage(void) {
    enum { H = 3, W = 2 };
    Image im = gradient(H, W), got;
    uint8_t exif[64];
    int failed = 0;
    for (int little = 0; little < 2; little++) {
        size_t n = make_exif(exif, little, 6);
        for (size_t cut = 1; cut <= n; cut++) {
            JpegSpec s = {JCS_RGB, JCS_YCbCr, .quality = 90, .exif = exif, .exif_bytes = cut};
            write_jpeg(in_folder("cut.jpg"), H, W, im.rgb, &s);
            failed += image_read(&got, in_folder("cut.jpg")) != OK;
            image_free(&got);
        }
        for (size_t i = 0; i < n; i++) {
            exif[i] ^= 0xff;
            JpegSpec s = {JCS_RGB, JCS_YCbCr, .quality = 90, .exif = exif, .exif_bytes = n};
            write_jpeg(in_folder("flip.jpg"), H, W, im.rgb, &s);
            failed += image_read(&got, in_folder("flip.jpg")) != OK;
            image_free(&got);
            exif[i] ^= 0xff;
        }
    }
    CHECK(failed == 0);
    image_free(&im);
}

/* ---- Orientation wherever files say it ---- */

/* EXIF whose orientation is a LONG. */
static size_t make_exif_long(uint8_t *p, int little, int orientation) {
    const size_t n = make_exif(p, little, 0);
    p[little ? 30 : 31] = 4;
    p[little ? 36 : 39] = (uint8_t)orientation;
    return n;
}

static const char *const xmp_texts[] = {
    "<x:xmpmeta><rdf:Description tiff:Orientation=\"6\" x='1'/></x:xmpmeta>",
    "<x:xmpmeta><rdf:Description\n tiff:Orientation = '6'></x:xmpmeta>",
    "<x:xmpmeta><rdf:Description><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>",
    "<x:xmpmeta><rdf:Description><tiff:Orientation>\n 6 </tiff:Orientation></x:xmpmeta>",
};

/* Is the picture in the file at path, 24 wide and 8 high, turned to the right, and by the official presets not? */
static int is_turned(const char *path) {
    Image got, as_it_is;
    if (image_read(&got, path) != OK || image_read_as(&as_it_is, path, IMAGE_OFFICIAL) != OK) return 0;
    int turned = got.H == 24 && got.W == 8 && as_it_is.H == 8 && as_it_is.W == 24;
    for (size_t y = 0; y < 24 && turned; y++)
        for (size_t x = 0; x < 8; x++)
            turned &= !memcmp(got.rgb + 3 * (y * 8 + x), as_it_is.rgb + 3 * ((7 - x) * 24 + y), 3);
    image_free(&got), image_free(&as_it_is);
    return turned;
}

/* The PNG at path with one more chunk, in front of its pixels or behind. */
static void add_chunk(const char *path, const char *name, const void *content, size_t n, int behind) {
    static uint8_t out[1 << 14];
    size_t size, at = 33; /* behind IHDR */
    const uint8_t *bytes = get_file(path, &size);
    if (behind) at = size - 12; /* in front of IEND */
    memcpy(out, bytes, size);
    memcpy(out + at + 12 + n, bytes + at, size - at);
    for (size_t k = 0; k < 4; k++) out[at + k] = (uint8_t)(n >> (24 - 8 * k));
    memcpy(out + at + 4, name, 4), memcpy(out + at + 8, content, n);
    const uint32_t crc = (uint32_t)crc32(0, out + at + 4, (uInt)n + 4);
    for (size_t k = 0; k < 4; k++) out[at + 8 + n + k] = (uint8_t)(crc >> (24 - 8 * k));
    put_file(path, out, size + 12 + n);
}

static void test_orientation_places(void) {
    enum { H = 8, W = 24 };
    static const char xmp[] = "http://ns.adobe.com/xap/1.0/";
    Image im = gradient(H, W);
    PngSpec p = {.H = H, .W = W, .type = PNG_COLOR_TYPE_RGB, .depth = 8, .rows = im.rgb};
    uint8_t bytes[512];
    for (int little = 0; little < 2; little++)
        for (int is_long = 0; is_long < 2; is_long++) {
            const size_t n = is_long ? make_exif_long(bytes, little, 6) : make_exif(bytes, little, 6);
            JpegSpec s = {JCS_RGB, JCS_YCbCr, .quality = 100, .exif = bytes, .exif_bytes = n};
            write_jpeg(in_folder("held.jpg"), H, W, im.rgb, &s);
            CHECK(is_turned(in_folder("held.jpg")));
            for (int behind = 0; behind < 2; behind++) {
                p.interlaced = behind;
                write_png(in_folder("held.png"), &p);
                CHECK(!is_turned(in_folder("held.png"))); /* negative control */
                add_chunk(in_folder("held.png"), "eXIf", bytes + 6, n - 6, behind);
                CHECK(is_turned(in_folder("held.png")));
                write_png(in_folder("held.png"), &p);
                add_chunk(in_folder("held.png"), "eXIf", bytes, n, behind); /* as in a JPEG */
                CHECK(is_turned(in_folder("held.png")));
            }
        }
    for (size_t k = 0; k < sizeof xmp_texts / sizeof *xmp_texts; k++) {
        const size_t n = strlen(xmp_texts[k]);
        memcpy(bytes, xmp, sizeof xmp), memcpy(bytes + sizeof xmp, xmp_texts[k], n);
        JpegSpec s = {JCS_RGB, JCS_YCbCr, .quality = 100, .exif = bytes, .exif_bytes = sizeof xmp + n};
        write_jpeg(in_folder("held.jpg"), H, W, im.rgb, &s);
        CHECK(is_turned(in_folder("held.jpg")));
        memcpy(bytes, "XML:com.adobe.xmp\0\0\0\0", 22), memcpy(bytes + 22, xmp_texts[k], n);
        for (int behind = 0; behind < 2; behind++) {
            write_png(in_folder("held.png"), &p);
            add_chunk(in_folder("held.png"), "iTXt", bytes, 22 + n, behind);
            CHECK(is_turned(in_folder("held.png")));
        }
    }
    image_free(&im);
}

/* ---- damage ---- */

/* Cuts the file at every `step` bytes; how many of the cut files were not refused under their own name. */
static int cuts_accepted(const char *path, size_t step) {
    static uint8_t bytes[1 << 20];
    size_t n;
    const char *cut = in_folder("cut");
    memcpy(bytes, get_file(path, &n), sizeof bytes);
    int accepted = n == 0;
    for (size_t i = 0; i < n; i += step) {
        put_file(cut, bytes, i);
        Image im;
        accepted += image_read(&im, cut) == OK || !strstr(err_text(), cut) || im.rgb;
        image_free(&im);
    }
    put_file(cut, bytes, n); /* negative control */
    Image im;
    accepted += image_read(&im, cut) != OK;
    image_free(&im);
    return accepted;
}

/* Flips random bits, one byte at a time and in groups; how many of the single flips were accepted. */
static int flips_accepted(const char *path, size_t groups) {
    static uint8_t bytes[1 << 20];
    size_t n;
    const char *flipped = in_folder("flipped");
    memcpy(bytes, get_file(path, &n), sizeof bytes);
    int accepted = 0;
    Image im;
    for (size_t i = 0; i < n; i++) {
        uint8_t bit = (uint8_t)(1 << (mix((uint32_t)i) >> 9 & 7));
        bytes[i] ^= bit;
        put_file(flipped, bytes, n);
        accepted += image_read(&im, flipped) == OK;
        image_free(&im);
        bytes[i] ^= bit;
    }
    for (uint32_t g = 0; g < groups; g++) {
        uint8_t kept[1 << 14];
        memcpy(kept, bytes, sizeof kept);
        for (uint32_t k = 0; k < 1 + g % 9; k++) bytes[mix(g * 16 + k) % n] = (uint8_t)mix(g * 16 + k + 77777);
        put_file(flipped, bytes, n);
        if (image_read(&im, flipped) == OK) image_free(&im);
        memcpy(bytes, kept, sizeof kept);
    }
    return accepted;
}

/* A JPEG whose data are all there but whose end marker is not. */
static void test_jpeg_end(void) {
    static uint8_t flat[8 * 200];
    int accepted = 0;
    for (size_t W = 1; W <= 200; W += 3) {
        size_t n;
        Image im;
        for (size_t i = 0; i < sizeof flat; i++) flat[i] = (uint8_t)(W + (i % W / 8) % 3 * 9);
        write_jpeg(in_folder("end.jpg"), 8, W, flat, &(JpegSpec){JCS_GRAYSCALE, JCS_GRAYSCALE, .quality = 75});
        const uint8_t *bytes = get_file(in_folder("end.jpg"), &n);
        put_file(in_folder("end.jpg"), bytes, n - 2);
        accepted += image_read(&im, in_folder("end.jpg")) == OK;
        image_free(&im);
    }
    CHECK(accepted == 0);
}

static void test_damage(void) {
    Image small = picture(9, 7), large = picture(64, 50), smooth = gradient(48, 40);
    PngSpec p = {.H = 9, .W = 7, .type = PNG_COLOR_TYPE_RGB, .depth = 8, .interlaced = 1, .rows = small.rgb};
    write_png(in_folder("small.png"), &p);
    CHECK(cuts_accepted(in_folder("small.png"), 1) == 0);
    CHECK(flips_accepted(in_folder("small.png"), 300) == 0); /* everything in a PNG is under a checksum */
    PngSpec t = {.H = 3, .W = 7, .type = PNG_COLOR_TYPE_PALETTE, .depth = 8, .rows = (uint8_t[21]){1, 0, 2}};
    t.n_palette = t.n_trans = 3, t.palette[1].red = 200, t.trans[1] = 90; /* alpha lies in an optional chunk */
    write_png(in_folder("trans.png"), &t);
    CHECK(flips_accepted(in_folder("trans.png"), 100) == 0);
    CHECK_OK(image_write_png(in_folder("large.png"), &large, NULL));
    CHECK(cuts_accepted(in_folder("large.png"), 64 * 50 * 3 / 16) == 0);
    for (int progressive = 0; progressive < 2; progressive++) {
        JpegSpec s = {JCS_RGB, JCS_YCbCr, .progressive = progressive, .quality = 90};
        write_jpeg(in_folder("damage.jpg"), 48, 40, smooth.rgb, &s);
        CHECK(cuts_accepted(in_folder("damage.jpg"), 1) == 0);
        flips_accepted(in_folder("damage.jpg"), 500);
        size_t n;
        get_file(in_folder("damage.jpg"), &n);
        CHECK(n > 500 && cuts_accepted(in_folder("damage.jpg"), n / 16) == 0);
    }
    image_free(&small);
    image_free(&large);
    image_free(&smooth);
}

/* Any first bytes: told for a picture or refused, never more. */
static void test_sniffing(void) {
    static const char *const magic[] = {"\x89PNG\r\n\x1a\n",
                                        "\xff\xd8\xff\xe0",
                                        "RIFF????WEBPVP8 ",
                                        "RIFF????WEBPVP8X",
                                        "RIFF????WEBPVP8L",
                                        "GIF89a",
                                        "II*",
                                        "????ftypavif",
                                        "<html>",
                                        "   ",
                                        "",
                                        "PK\3\4"};
    static const int is[] = {1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0};
    size_t wrong = 0, read = 0;
    for (uint32_t k = 0; k < sizeof magic / sizeof *magic; k++)
        for (uint32_t n = 0; n < 96; n++) {
            uint8_t *bytes = malloc(n + 1); /* its end is watched */
            size_t length = strlen(magic[k]);
            for (uint32_t i = 0; i < n; i++)
                bytes[i] = i < length ? (uint8_t)magic[k][i] : (uint8_t)mix(k * 1000 + n * 7 + i);
            Image im;
            wrong += n >= length && length && is_picture(bytes, n) != is[k];
            read += image_decode(&im, bytes, n, (int)n % 2) == OK || im.rgb || !err_text()[0];
            image_free(&im);
            free(bytes);
        }
    CHECK(wrong == 0 && read == 0);
    CHECK(is_picture((const uint8_t *)magic[0], 8) && !is_picture((const uint8_t *)magic[0], 7));
}

static void test_foreign(void) {
    Image im;
    const struct {
        const char *bytes;
        size_t n;
        const char *says;
    } f[] = {
        {"RIFF\x10\0\0\0WEBPVP8 ", 16, "WebP"},
        {"GIF89a\1\0\1\0", 10, "is a GIF file; PNG"},
        {"BM\x46\0\0\0", 6, "is a BMP file"},
        {"II*\0\10\0\0\0", 8, "is a TIFF file"},
        {"\0\0\0\x1c"
         "ftypavif",
         12, "is an AVIF file"},
        {" \n<!DOCTYPE html><html>", 22, "is an HTML file"},
        {"<HTML>", 6, "is an HTML file"},
        {"<?xml version='1.0'?><svg/>", 27, "is an XML or SVG file"},
        {"", 0, "is empty"},
        {"\x89PN", 3, "neither PNG nor JPEG nor WebP"},
        {"hello", 5, "is a text file; PNG"},
        {"\xef\xbb\xbf<svg/>", 9, "is an XML or SVG file"},
        {"\0\1\2\3\4", 5, "neither PNG nor JPEG nor WebP"},
        {"\xff\xd8\xff", 3, "damaged JPEG"},
        {"\x89PNG\r\n\x1a\n", 8, "damaged PNG: the file is cut short"},
    };
    for (size_t i = 0; i < sizeof f / sizeof *f; i++) {
        put_file(in_folder("foreign.png"), f[i].bytes, f[i].n);
        CHECK_ERR(image_read(&im, in_folder("foreign.png")), f[i].says);
        CHECK(strstr(err_text(), "foreign.png: ") != NULL && !im.rgb);
    }
    CHECK_ERR(image_read(&im, folder), "is a folder");
    CHECK_ERR(image_read(&im, "/dev/null"), "not a regular file");
    CHECK_ERR(image_read(&im, in_folder("nowhere.png")), "nowhere.png: No such file");
    CHECK(mkfifo(in_folder("pipe"), 0600) == 0);
    CHECK_ERR(image_read(&im, in_folder("pipe")), "not a regular file"); /* and does not wait for a writer */
}

/* Headers that promise too much: refused before memory is asked for. */
static long peak_memory(void) { /* KiB */
    struct rusage use;
    return getrusage(RUSAGE_SELF, &use) == 0 ? use.ru_maxrss : 0;
}

static void test_limits(void) {
    Image im = gradient(8, 8), got;
    PngSpec s = {.H = 8, .W = 8, .type = PNG_COLOR_TYPE_RGB, .depth = 8, .rows = im.rgb};
    const uint32_t side[][2] = {{40000, 8},      {8, 40000}, {32768, 32768}, {0x7fffffff, 0x7fffffff},
                                {0x10000009, 9}, {0, 8}};
    const long before = peak_memory();
    for (size_t i = 0; i < sizeof side / sizeof *side; i++) {
        size_t n;
        write_png(in_folder("huge.png"), &s);
        uint8_t *p = get_file(in_folder("huge.png"), &n);
        for (size_t k = 0; k < 8; k++) p[16 + k] = (uint8_t)(side[i][k / 4] >> (24 - 8 * (k % 4)));
        uint32_t crc = (uint32_t)crc32(0, p + 12, 17);
        for (size_t k = 0; k < 4; k++) p[29 + k] = (uint8_t)(crc >> (24 - 8 * k));
        put_file(in_folder("huge.png"), p, n);
        CHECK_ERR(image_read(&got, in_folder("huge.png")), "huge.png: ");
        if (i == 2) CHECK(strstr(err_text(), "32768 x 32768") != NULL);
    }
    CHECK(peak_memory() - before < 64 << 10); /* refused before libpng takes gigabytes for a row */
    write_jpeg(in_folder("huge.jpg"), 8, 8, im.rgb, &(JpegSpec){JCS_RGB, JCS_YCbCr, .quality = 90});
    size_t n, at = 0;
    uint8_t *p = get_file(in_folder("huge.jpg"), &n);
    while (at + 9 < n && !(p[at] == 0xff && p[at + 1] == 0xc0)) at++;
    p[at + 5] = 0xff; /* height */
    put_file(in_folder("huge.jpg"), p, n);
    CHECK_ERR(image_read(&got, in_folder("huge.jpg")), "sides of 1..32768");
    image_free(&im);
}

/* ---- WebP ---- */

#ifdef HAVE_WEBP
/* pixels (H,W,channels), lossless unless quality > 0 */
static void write_webp(const char *path, size_t H, size_t W, size_t channels, const uint8_t *pixels, float quality) {
    uint8_t *out = NULL;
    int w = (int)W, h = (int)H, stride = w * (int)channels;
    size_t n = quality > 0     ? WebPEncodeRGB(pixels, w, h, stride, quality, &out)
               : channels == 4 ? WebPEncodeLosslessRGBA(pixels, w, h, stride, &out)
                               : WebPEncodeLosslessRGB(pixels, w, h, stride, &out);
    put_file(path, out, n);
    WebPFree(out);
}

static size_t put_u32(uint8_t *p, size_t v) {
    for (size_t k = 0; k < 4; k++) p[k] = (uint8_t)(v >> 8 * k);
    return 4;
}

static size_t put_chunk(uint8_t *p, const char *name, const void *content, size_t n) {
    memcpy(p, name, 4), put_u32(p + 4, n), memcpy(p + 8, content, n), p[8 + n] = 0;
    return 8 + n + (n & 1);
}

/* An extended WebP of (H,W): its header with these flags, then the chunks of `rest`. */
static void put_webp(const char *path, size_t H, size_t W, int flags, const uint8_t *rest, size_t n) {
    static uint8_t out[1 << 14];
    uint8_t header[10] = {(uint8_t)flags, 0, 0, 0, (uint8_t)(W - 1), 0, 0, (uint8_t)(H - 1), 0, 0};
    size_t at = 12;
    at += put_chunk(out + at, "VP8X", header, sizeof header);
    memcpy(out + at, rest, n), at += n;
    memcpy(out, "RIFF", 4), put_u32(out + 4, at - 8), memcpy(out + 8, "WEBP", 4);
    put_file(path, out, at);
}

/* The chunk with the pixels of a picture, lossless. */
static size_t pixel_chunk(uint8_t *p, const Image *im) {
    size_t n;
    write_webp(in_folder("plain.webp"), im->H, im->W, 3, im->rgb, 0);
    const uint8_t *bytes = get_file(in_folder("plain.webp"), &n);
    memcpy(p, bytes + 12, n - 12);
    return n - 12;
}

static void test_webp_orientation(void) {
    enum { XMP = 4, EXIF = 8 };
    const char *path = in_folder("held.webp");
    uint8_t rest[4096], exif[64];
    Image im = gradient(8, 24);
    const size_t pixels = pixel_chunk(rest, &im);
    for (int little = 0; little < 2; little++)
        for (int is_long = 0; is_long < 2; is_long++)
            for (size_t skipped = 0; skipped <= 6; skipped += 6) { /* with "Exif\0\0" and without */
                const size_t n = is_long ? make_exif_long(exif, little, 6) : make_exif(exif, little, 6);
                const size_t more = put_chunk(rest + pixels, "EXIF", exif + skipped, n - skipped);
                put_webp(path, 8, 24, EXIF, rest, pixels + more);
                CHECK(is_turned(path));
            }
    for (size_t k = 0; k < sizeof xmp_texts / sizeof *xmp_texts; k++) {
        const size_t more = put_chunk(rest + pixels, "XMP ", xmp_texts[k], strlen(xmp_texts[k]));
        put_webp(path, 8, 24, XMP, rest, pixels + more);
        CHECK(is_turned(path));
    }
    put_webp(path, 8, 24, 0, rest, pixels);
    CHECK(!is_turned(path)); /* negative control */
    image_free(&im);
}

/* Of an animation the first picture, where it lies in its canvas; which is said. */
static void test_webp_animated(void) {
    enum { H = 9, W = 12, h = 5, w = 7, Y = 2, X = 4, ANIMATED = 2 };
    const char *path = in_folder("moving.webp");
    uint8_t rest[4096], frame[2048] = {X / 2, 0, 0, Y / 2, 0, 0, w - 1, 0, 0, h - 1, 0, 0, 100}, want[H * W * 3];
    Image first = picture(h, w), second = gradient(h, w), got;
    for (int official = 0; official < 2; official++) {
        size_t at = put_chunk(rest, "ANIM", "\0\0\0\0\0\0", 6);
        at += put_chunk(rest + at, "ANMF", frame, 16 + pixel_chunk(frame + 16, &first));
        at += put_chunk(rest + at, "ANMF", frame, 16 + pixel_chunk(frame + 16, &second));
        put_webp(path, H, W, ANIMATED, rest, at);
        memset(want, official ? 0 : 255, sizeof want);
        for (size_t y = 0; y < h; y++) memcpy(want + 3 * ((y + Y) * W + X), first.rgb + 3 * y * w, 3 * w);
        CHECK_OK(image_read_as(&got, path, official ? IMAGE_OFFICIAL : IMAGE_UPRIGHT));
        CHECK(difference(&got, &(Image){H, W, want, NULL}) == 0);
        CHECK(got.note && strstr(got.note, "animated WebP, of which the first picture is used"));
        image_free(&got);
    }
    put_webp(path, 6, 8, ANIMATED, rest, 4000); /* a canvas that is too small */
    CHECK_ERR(image_read(&got, path), "damaged WebP");
    image_free(&first), image_free(&second);
}

static void test_webp(void) {
    enum { H = 33, W = 50 };
    Image im = picture(H, W), smooth = gradient(H, W), got;
    write_webp(in_folder("a.webp"), H, W, 3, im.rgb, 0);
    CHECK(reads_as(in_folder("a.webp"), H, W, im.rgb));
    CHECK(cuts_accepted(in_folder("a.webp"), 7) == 0);
    flips_accepted(in_folder("a.webp"), 300);
    write_webp(in_folder("b.jpg"), H, W, 3, smooth.rgb, 95); /* told by content, whatever its name */
    CHECK(jpeg_error(in_folder("b.jpg"), &smooth) <= 6);
    CHECK(cuts_accepted(in_folder("b.jpg"), 1) == 0);
    flips_accepted(in_folder("b.jpg"), 300);
    uint8_t rgba[H * W * 4], over[H * W * 3];
    for (size_t i = 0; i < H * W; i++) {
        uint8_t a = (uint8_t)(i % 4 * 85);
        rgba[i * 4 + 3] = a;
        for (size_t c = 0; c < 3; c++) {
            uint8_t v = a ? im.rgb[i * 3 + c] : 0; /* what is invisible need not be kept */
            rgba[i * 4 + c] = v;
            over[i * 3 + c] = (uint8_t)rint((v * a + 255.0 * (255 - a)) / 255);
        }
    }
    write_webp(in_folder("alpha.webp"), H, W, 4, rgba, 0);
    CHECK(reads_as(in_folder("alpha.webp"), H, W, over));
    for (size_t i = 0; i < H * W; i++) memcpy(over + 3 * i, rgba + 4 * i, 3);
    CHECK(official_reads_as(in_folder("alpha.webp"), H * W, over));
    size_t n;
    uint8_t *p = get_file(in_folder("a.webp"), &n); /* VP8L: 14 bits of width-1 and of height-1 behind the signature */
    memset(p + 21, 0xff, 3), p[24] |= 0x0f;
    put_file(in_folder("huge.webp"), p, n);
    CHECK_ERR(image_read(&got, in_folder("huge.webp")), "16384 x 16384 pixels; at most");
    static const uint8_t moving[] = "RIFF\x22\0\0\0WEBPVP8X\x0a\0\0\0\2\0\0\0\7\0\0\7\0\0ANIM\6\0\0\0\0\0\0\0\0";
    put_file(in_folder("moving.webp"), moving, sizeof moving);
    CHECK_ERR(image_read(&got, in_folder("moving.webp")), "an animation without pictures");
    image_free(&im), image_free(&smooth);
}
#else
static void test_webp_orientation(void) {}
static void test_webp_animated(void) {}
static void test_webp(void) {
    Image im;
    put_file(in_folder("a.webp"), "RIFF\x10\0\0\0WEBPVP8 ", 16);
    CHECK_ERR(image_read(&im, in_folder("a.webp")), "a.webp: is a WebP file, and this build reads none");
    CHECK(strstr(err_text(), "apt-get install libwebp-dev") != NULL);
    puts("skipped: WebP, which this build was made without");
}
#endif

/* ---- writing ---- */

static void check_texts(const char *path) {
    png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, NULL, NULL, NULL);
    png_infop info = png_create_info_struct(png);
    FILE *f = fopen(path, "rb");
    if (!f || setjmp(png_jmpbuf(png))) exit(1);
    png_init_io(png, f);
    png_read_info(png, info);
    png_textp text;
    int n = png_get_text(png, info, &text, NULL);
    if (CHECK(n == 3)) {
        CHECK(!strcmp(text[0].key, "seed") && !strcmp(text[0].text, "42") &&
              text[0].compression == PNG_TEXT_COMPRESSION_NONE);
        CHECK(!strcmp(text[1].key, "model name") && !strcmp(text[1].text, "\xce\xb1\xe2\x82\xac\xf0\x9f\x98\x80"));
        CHECK(text[1].compression == PNG_ITXT_COMPRESSION_NONE);
        CHECK(!strcmp(text[2].text, "caf\xe9") && text[2].compression == PNG_TEXT_COMPRESSION_NONE);
    }
    png_destroy_read_struct(&png, &info, NULL);
    fclose(f);
}

/* Keys that a PNG cannot hold are shortened and escaped; nothing of them is lost. */
static void test_keys(void) {
    static char k79[80], k80[81], k5000[5001];
    memset(k79, 'k', 79), memset(k80, 'k', 80), memset(k5000, 'k', 5000);
    char *key[] = {"",        " ", "bad\nkey", "\x1b[31mred", "caf\xc3\xa9", "caf\xe9", " before", "behind ",
                   "two  of", k79, k80,        k5000,         "plain",       "\x7f",    "\t"};
    static const char *const fits[] = {"?",      "?", "bad?key", "?[31mred", "caf??", "caf?", "before", "behind",
                                       "two of", k79, k79,       k79,        "plain", "?",    "?"};
    enum { N = sizeof key / sizeof *key };
    KeyValue kv[N];
    Image im = picture(3, 4);
    for (size_t i = 0; i < N; i++) kv[i] = (KeyValue){.key = key[i], .value = i % 2 ? "" : "the value"};
    CHECK_OK(image_write_png(in_folder("keys.png"), &im, &(Config){kv, N, N}));
    CHECK(reads_as(in_folder("keys.png"), 3, 4, im.rgb));
    png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, NULL, NULL, NULL);
    png_infop info = png_create_info_struct(png);
    FILE *f = fopen(in_folder("keys.png"), "rb");
    if (!f || setjmp(png_jmpbuf(png))) exit(1);
    png_init_io(png, f);
    png_read_info(png, info);
    png_textp text;
    if (CHECK(png_get_text(png, info, &text, NULL) == N))
        for (size_t i = 0; i < N; i++) {
            char whole[6000];
            const int same = !strcmp(key[i], fits[i]);
            snprintf(whole, sizeof whole, "%s%s%s", same ? "" : key[i], same ? "" : " ", kv[i].value);
            if (!CHECK(!strcmp(text[i].key, fits[i]) && !strcmp(text[i].text, whole)))
                printf("     key %zu: '%s' '%.100s'\n", i, text[i].key, text[i].text);
        }
    png_destroy_read_struct(&png, &info, NULL);
    fclose(f);
    image_free(&im);
}

/* A picture has its own texts, few; one with more is refused before it takes time. */
static void test_many_texts(void) {
    enum { MOST = 256 };
    static char key[MOST + 1][8];
    KeyValue kv[MOST + 1];
    Image im = picture(3, 4);
    for (size_t n = MOST; n <= MOST + 1; n++) {
        uint8_t *bytes;
        size_t size;
        Config found = {0};
        for (size_t i = 0; i < n; i++) {
            snprintf(key[i], sizeof key[i], "k%zu", i);
            kv[i] = (KeyValue){.key = key[i], .value = (char *)"v"};
        }
        CHECK_OK(image_encode_png(&bytes, &size, &im, &(Config){kv, n, n}));
        if (n == MOST)
            CHECK_OK(png_read_texts(&found, bytes, size));
        else
            CHECK_ERR(png_read_texts(&found, bytes, size), "more than 256 texts");
        CHECK(found.n == MOST);
        config_free(&found);
        free(bytes);
    }
    image_free(&im);
}

static void test_write(void) {
    Image im = picture(17, 23);
    KeyValue kv[] = {{.key = (char *)"seed", .value = (char *)"42"},
                     {.key = (char *)"model name", .value = (char *)"\xce\xb1\xe2\x82\xac\xf0\x9f\x98\x80"}, /* UTF-8 */
                     {.key = (char *)"path", .value = (char *)"caf\xe9"}}; /* Latin-1 */
    Config text = {kv, 3, 3};
    CHECK_OK(image_write_png(in_folder("out.png"), &im, &text));
    CHECK(reads_as(in_folder("out.png"), 17, 23, im.rgb));
    check_texts(in_folder("out.png"));
    CHECK_ERR(image_write_png(in_folder("out.png"), &(Image){0, 3, im.rgb}, &text), "cannot be a PNG");
    CHECK(reads_as(in_folder("out.png"), 17, 23, im.rgb)); /* the file of before is untouched */
    CHECK_ERR(image_write_png(in_folder("no/such/out.png"), &im, NULL), "no/such/out.png");
    CHECK_ERR(image_write_png(in_folder("x.png"), &(Image){0, 3, im.rgb}, NULL), "cannot be a PNG");
    CHECK_ERR(image_write_png("/dev/full/x.png", &im, NULL), "/dev/full");
    image_free(&im);
}

/* ---- resizing and preprocessing ---- */

static void test_resize_tables(void) {
    size_t n = sizeof resize_cases / sizeof *resize_cases;
    for (size_t i = 0; i < n; i++) {
        Image in = picture(resize_cases[i].H, resize_cases[i].W), out;
        CHECK_OK(image_resize(&out, &in, resize_cases[i].h, resize_cases[i].w, resize_cases[i].filter));
        size_t bytes = out.H * out.W * 3;
        int same = resize_cases[i].at >= 0 ? !memcmp(out.rgb, resize_pixels + resize_cases[i].at, bytes)
                                           : fnv1a(FNV_START, out.rgb, bytes) == resize_cases[i].hash;
        if (!CHECK(same)) printf("     case %zu\n", i);
        out.rgb[bytes / 2] ^= 1; /* negative control */
        CHECK(resize_cases[i].at >= 0 ? memcmp(out.rgb, resize_pixels + resize_cases[i].at, bytes) != 0
                                      : fnv1a(FNV_START, out.rgb, bytes) != resize_cases[i].hash);
        image_free(&in);
        image_free(&out);
    }
}

static void test_resize_properties(void) {
    Image in = picture(5, 7), out, flat = {4, 6, malloc(4 * 6 * 3)};
    for (int filter = FILTER_NEAREST; filter <= FILTER_BICUBIC; filter++) {
        CHECK_OK(image_resize(&out, &in, 5, 7, (Filter)filter));
        CHECK(difference(&out, &in) == 0); /* the same size changes nothing */
        image_free(&out);
        memset(flat.rgb, 201, 4 * 6 * 3); /* one colour stays one colour */
        CHECK_OK(image_resize(&out, &flat, 9, 5, (Filter)filter));
        size_t other = 0;
        for (size_t i = 0; i < 9 * 5 * 3; i++) other += out.rgb[i] != 201;
        CHECK(other == 0);
        image_free(&out);
    }
    CHECK_OK(image_resize(&out, &in, 2, 16, FILTER_NEAREST));
    size_t wrong = 0;
    for (size_t y = 0; y < 2; y++)
        for (size_t x = 0; x < 16; x++)
            wrong += memcmp(out.rgb + (y * 16 + x) * 3, in.rgb + (y * 5 / 2 * 7 + x * 7 / 16) * 3, 3) != 0;
    CHECK(wrong == 0);
    image_free(&out);
    CHECK_ERR(image_resize(&out, &in, 0, 7, FILTER_LINEAR), "sides of 1..");
    CHECK_ERR(image_resize(&out, &in, 7, 40000, FILTER_BICUBIC), "sides of 1..");
    CHECK_ERR(image_resize(&out, &in, 32768, 32768, FILTER_BICUBIC), "pixels expected");
    CHECK_ERR(image_resize(&out, &(Image){0}, 3, 3, FILTER_BICUBIC), "empty");
    image_free(&in);
    image_free(&flat);
}

/* Whether out (3,size,size) is the window of `im` at (y0,x0), mirrored if flip. */
static int is_window(const real *out, const Image *im, size_t size, size_t y0, size_t x0, int flip) {
    size_t wrong = 0;
    for (size_t c = 0; c < 3; c++)
        for (size_t y = 0; y < size; y++)
            for (size_t x = 0; x < size; x++) {
                size_t sx = x0 + (flip ? size - 1 - x : x);
                real want = (real)(im->rgb[((y0 + y) * im->W + sx) * 3 + c] / 127.5 - 1.0);
                wrong += out[(c * size + y) * size + x] != want;
            }
    return wrong == 0;
}

static void test_prepare(void) {
    enum { SIZE = 6 };
    real out[3 * SIZE * SIZE];
    Image im = picture(9, 13), resized, square;
    /* 13*6/9 = 8.67 -> 9 columns; crop offset (9-6)/2 = 1 */
    CHECK_OK(image_resize(&resized, &im, 6, 9, FILTER_LINEAR));
    CHECK_OK(image_prepare(out, &im, PREP_FFHQ, SIZE, -1, -1, 0));
    CHECK(is_window(out, &resized, SIZE, 0, 1, 0));
    CHECK(!is_window(out, &resized, SIZE, 0, 2, 0) && !is_window(out, &resized, SIZE, 0, 1, 1));
    CHECK_OK(image_prepare(out, &im, PREP_IMAGENET, SIZE, 0.9, 0.99, 1)); /* 3*0.99 = 2.97 -> 2 */
    CHECK(is_window(out, &resized, SIZE, 0, 2, 1));
    CHECK_ERR(image_prepare(out, &im, PREP_IMAGENET, SIZE, 1, 0, 0), "below 1");
    CHECK_ERR(image_prepare(out, &im, PREP_IMAGENET, SIZE, NAN, 0, 0), "below 1");
    CHECK_ERR(image_prepare(out, &im, PREP_IMAGENET, 0, -1, -1, 0), "size 0");
    image_free(&resized);
    /* the centre square starts at (13-9)/2 = 2 */
    square = (Image){9, 9, malloc(9 * 9 * 3)};
    for (size_t y = 0; y < 9; y++) memcpy(square.rgb + y * 27, im.rgb + (y * 13 + 2) * 3, 27);
    CHECK_OK(image_resize(&resized, &square, SIZE, SIZE, FILTER_BICUBIC));
    CHECK_OK(image_prepare(out, &im, PREP_FOLDER, SIZE, -1, -1, 0));
    CHECK(is_window(out, &resized, SIZE, 0, 0, 0));
    CHECK_OK(image_prepare(out, &im, PREP_LSUN, SIZE, -1, -1, 1));
    CHECK(is_window(out, &resized, SIZE, 0, 0, 1));
    image_free(&im), image_free(&square), image_free(&resized);
    /* rounding half to even: 5*2/4 = 2.5 -> 2, 7*2/4 = 3.5 -> 4 (crop offsets 0 and 1) */
    for (size_t W = 5; W <= 7; W += 2) {
        im = picture(4, W);
        CHECK_OK(image_resize(&resized, &im, 2, W == 5 ? 2 : 4, FILTER_LINEAR));
        CHECK_OK(image_prepare(out, &im, PREP_FFHQ, 2, -1, -1, 0));
        CHECK(is_window(out, &resized, 2, 0, W == 5 ? 0 : 1, 0));
        image_free(&im), image_free(&resized);
    }
    im = picture(1, 2000); /* the long side would be too long */
    CHECK_ERR(image_prepare(out, &im, PREP_FFHQ, 64, -1, -1, 0), "sides of 1..");
    image_free(&im);
}

/* ---- masks ---- */

enum { MASK_SIDE = 16, MASK_FILE = 3 * MASK_SIDE };

/* A mask as an editor writes it, of pixels that colour(y, x) says. */
static void write_mask(const char *path, size_t side, void (*colour)(uint8_t *rgba, size_t y, size_t x)) {
    static uint8_t rows[MASK_FILE * MASK_FILE * 4];
    for (size_t i = 0; i < side * side; i++)
        colour(rows + 4 * i, i / side * MASK_FILE / side, i % side * MASK_FILE / side);
    write_png(path, &(PngSpec){.H = side, .W = side, .type = PNG_COLOR_TYPE_RGBA, .depth = 8, .rows = rows});
}

static int in_hole(size_t y, size_t x) {
    return y < MASK_FILE / 2 && x < MASK_FILE / 4;
}
static void set_rgba(uint8_t *p, int v, int a) {
    p[0] = p[1] = p[2] = (uint8_t)v, p[3] = (uint8_t)a;
}
static void black_hole(uint8_t *p, size_t y, size_t x) {
    set_rgba(p, in_hole(y, x) ? 0 : 255, 255);
}
static void clear_black_hole(uint8_t *p, size_t y, size_t x) {
    set_rgba(p, in_hole(y, x) ? 0 : 255, in_hole(y, x) ? 0 : 255);
}
static void clear_white_hole(uint8_t *p, size_t y, size_t x) {
    set_rgba(p, 255, in_hole(y, x) ? 0 : 255);
}
static void half_erased(uint8_t *p, size_t y, size_t x) { /* a part is black, a part transparent, a part nearly */
    set_rgba(p, in_hole(y, x) && x < 5 ? 0 : 255, !in_hole(y, x) || x < 5 ? 255 : y < 9 ? 0 : 100);
}
static void soft_eraser(uint8_t *p, size_t y, size_t x) { /* what is more there than not stays */
    set_rgba(p, 255, in_hole(y, x) ? 120 : 140);
}
static void black_paint(uint8_t *p, size_t y, size_t x) {
    set_rgba(p, 0, in_hole(y, x) ? 255 : 0);
}
static void red_paint(uint8_t *p, size_t y, size_t x) {
    set_rgba(p, 0, in_hole(y, x) ? 255 : 0);
    p[0] = 230;
}
static void soft_black_paint(uint8_t *p, size_t y, size_t x) {
    set_rgba(p, 0, in_hole(y, x) ? 200 : x < 30 ? 60 : 0);
}
static void white_paint(uint8_t *p, size_t y, size_t x) { /* outside of the hole */
    set_rgba(p, in_hole(y, x) ? 0 : 255, in_hole(y, x) ? 0 : 255);
}
static void erased_picture(uint8_t *p, size_t y, size_t x) { /* dark parts of a picture are no holes */
    for (int c = 0; c < 3; c++) p[c] = (uint8_t)((y * (size_t)(5 + c) + x * 7) % 256);
    p[3] = in_hole(y, x) ? 0 : 255;
}
static void all_white(uint8_t *p, size_t y, size_t x) {
    (void)y, (void)x, set_rgba(p, 255, 255);
}
static void all_clear(uint8_t *p, size_t y, size_t x) {
    (void)y, (void)x, set_rgba(p, 255, 0);
}
static void thin_stroke(uint8_t *p, size_t y, size_t x) { /* between the pixels that the nearest would be */
    set_rgba(p, y == 1 || x == 46 ? 0 : 255, 255);
}

/* How many pixels of the mask are other than wanted: 'h' only the hole is drawn anew, '1' nothing, '0' all, 't' the
 * stroke; the opposite with invert. */
static size_t mask_faults(const char *path, char wanted, int invert, const char **note) {
    uint8_t keep[MASK_SIDE * MASK_SIDE];
    size_t faults = 0;
    if (mask_read(keep, note, path, PREP_FOLDER, MASK_SIDE, MASK_FILE, MASK_FILE, invert) != OK) return 999;
    for (size_t i = 0; i < sizeof keep; i++) {
        const size_t y = i / MASK_SIDE, x = i % MASK_SIDE;
        const int want = wanted == 'h' ? !in_hole(3 * y, 3 * x) : wanted == 't' ? y != 0 && x != 15 : wanted == '1';
        faults += keep[i] != (want != invert);
    }
    return faults;
}

static void test_masks(void) {
    static const struct {
        void (*colour)(uint8_t *rgba, size_t y, size_t x);
        char keeps;
        const char *note;
    } m[] = {
        {black_hole, 'h', NULL},
        {clear_black_hole, 'h', "transparent parts are drawn anew, as dark"},
        {clear_white_hole, 'h', "transparent parts are drawn anew, as dark"},
        {half_erased, 'h', "transparent parts are drawn anew, as dark"},
        {soft_eraser, 'h', "transparent parts are drawn anew, as dark"},
        {white_paint, 'h', "transparent parts are drawn anew, as dark"},
        {black_paint, 'h', "the paint is drawn anew"},
        {red_paint, 'h', "the paint is drawn anew"},
        {soft_black_paint, 'h', "the paint is drawn anew"},
        {erased_picture, 'h', "is a picture with transparent parts: they are drawn anew"},
        {all_white, '1', NULL},
        {all_clear, '0', "transparent parts"},
        {thin_stroke, 't', NULL},
    };
    const char *path = in_folder("mask.png"), *note;
    for (size_t i = 0; i < sizeof m / sizeof *m; i++)
        for (size_t side = MASK_SIDE; side <= MASK_FILE; side += MASK_FILE - MASK_SIDE) {
            if (m[i].keeps == 't' && side == MASK_SIDE) continue;
            write_mask(path, side, m[i].colour);
            if (!CHECK(mask_faults(path, m[i].keeps, 0, &note) == 0)) printf("     mask %zu of side %zu\n", i, side);
            CHECK(m[i].note ? note && strstr(note, m[i].note) : !note);
            if (m[i].keeps != 't') CHECK(mask_faults(path, m[i].keeps, 1, &note) == 0);
            CHECK(mask_faults(path, 'x', 0, &note) > 0 || m[i].keeps == '0'); /* negative control */
        }
    static uint8_t la[MASK_FILE * MASK_FILE * 2], index[MASK_FILE * MASK_FILE];
    for (size_t i = 0; i < sizeof index; i++) {
        const int hole = in_hole(i / MASK_FILE, i % MASK_FILE);
        la[2 * i] = 255, la[2 * i + 1] = hole ? 0 : 255, index[i] = (uint8_t)hole;
    }
    PngSpec s = {.H = MASK_FILE, .W = MASK_FILE, .type = PNG_COLOR_TYPE_GRAY_ALPHA, .depth = 8, .rows = la};
    write_png(path, &s);
    CHECK(mask_faults(path, 'h', 0, &note) == 0 && note);
    s.type = PNG_COLOR_TYPE_PALETTE, s.rows = index, s.n_palette = s.n_trans = 2;
    s.palette[0] = s.palette[1] = (png_color){255, 255, 255}, s.trans[0] = 255;
    write_png(path, &s);
    CHECK(mask_faults(path, 'h', 0, &note) == 0 && note);
    uint8_t keep[MASK_SIDE * MASK_SIDE];
    CHECK_ERR(mask_read(keep, &note, path, PREP_FOLDER, MASK_SIDE, 20, 30, 0),
              "mask.png: the mask is 48x48; expected the picture's size, 30x20, or the model's, 16x16");
    CHECK_ERR(mask_read(keep, &note, path, PREP_FOLDER, MASK_SIDE, MASK_SIDE, MASK_SIDE, 0),
              "mask.png: the mask is 48x48; expected the picture's size, 16x16");
    CHECK_ERR(mask_read(keep, &note, in_folder("none.png"), PREP_FOLDER, MASK_SIDE, 20, 30, 0), "none.png");
}

static void test_grid(void) {
    enum { N = 3, H = 2, W = 1 };
    real x[N * 3 * H * W];
    for (size_t i = 0; i < N * 3 * H * W; i++) x[i] = (real)(-1 + 2 * (double)i / 17);
    x[0] = -5, x[1] = 5, x[2] = (real)NAN, x[3] = 0;
    Image g;
    CHECK_OK(image_grid(&g, x, N, H, W, 2, 1));
    CHECK(g.H == 5 && g.W == 3);
    CHECK(g.rgb[0] == 0 && g.rgb[9] == 255);                       /* clipped */
    CHECK(g.rgb[1] == 0 && g.rgb[10] == 127);                      /* NaN; 127.5 is cut, not rounded */
    CHECK(g.rgb[3] == 255 && g.rgb[4] == 255);                     /* the gap */
    CHECK(g.rgb[6] == (uint8_t)(255 * ((x[6] + 1) / 2)));          /* picture 1 at column 2 */
    CHECK(g.rgb[3 * 9 + 2] == (uint8_t)(255 * ((x[16] + 1) / 2))); /* picture 2, blue, on the second row */
    CHECK(g.rgb[3 * 9 + 6] == 255);                                /* no picture there */
    image_free(&g);
    CHECK_ERR(image_grid(&g, x, 0, H, W, 2, 1), "no pictures");
    CHECK_ERR(image_grid(&g, x, N, H, W, 0, 1), "no pictures");
    CHECK_ERR(image_grid(&g, x, N, 30000, 1, 1, 1), "sides of 1..");
}

/* ---- Enlarged PNGs, animated PNGs ---- */

static void test_enlarged(void) {
    Image im = picture(5, 7), back = {0};
    CHECK_OK(image_write_png_enlarged(in_folder("large.png"), &im, 3, NULL));
    CHECK_OK(image_read(&back, in_folder("large.png")));
    CHECK(back.H == 15 && back.W == 21);
    size_t wrong = 0;
    for (size_t y = 0; y < back.H; y++)
        for (size_t x = 0; x < back.W; x++)
            wrong += memcmp(back.rgb + 3 * (y * back.W + x), im.rgb + 3 * (y / 3 * im.W + x / 3), 3) != 0;
    CHECK(wrong == 0);
    CHECK_ERR(image_write_png_enlarged(in_folder("large.png"), &im, 0, NULL), "cannot be a PNG");
    image_free(&im);
    image_free(&back);
}

enum { FRAMES = 4 };
static Err make_frame(void *context, size_t i, Image *im) {
    *im = picture(6 + (context && i == 2), 9);
    memset(im->rgb, (int)(10 * i), 30);
    return OK;
}

static size_t be(const uint8_t *p, int n) {
    size_t v = 0;
    while (n--) v = v << 8 | *p++;
    return v;
}

/* A frame of (H,W) from zlib data whose rows are differences to the row above, is frame number i, enlarged. */
static int is_frame(const uint8_t *data, size_t bytes, size_t i, size_t H, size_t W, size_t enlarge) {
    enum { MOST = 100 * 400 };
    static uint8_t raw[MOST];
    Image im;
    uLongf n = MOST;
    if (uncompress(raw, &n, data, (uLong)bytes) != Z_OK || n != H * (3 * W + 1)) return 0;
    make_frame(NULL, i, &im);
    int same = 1;
    for (size_t y = 0; y < H; y++) {
        uint8_t *row = raw + y * (3 * W + 1);
        same &= row[0] == 2;
        for (size_t x = 1; x <= 3 * W; x++) {
            if (y) row[x] = (uint8_t)(row[x] + row[x - 3 * W - 1]);
            same &= row[x] == im.rgb[3 * (y / enlarge * im.W + (x - 1) / 3 / enlarge) + (x - 1) % 3];
        }
    }
    image_free(&im);
    return same;
}

/* Chunk by chunk: names in order, checksums, sequence numbers, times, and every frame's pixels. */
static void test_apng_of(size_t enlarge) {
    static const char *const order[] = {"IHDR", "acTL", "tEXt", "iTXt", "IDAT", "fcTL", "fdAT",
                                        "fcTL", "fdAT", "fcTL", "fdAT", "fcTL", "fdAT", "IEND"};
    const size_t H = 6 * enlarge, W = 9 * enlarge;
    Config text = {0};
    size_t n, at = 8, chunk = 0, sequence = 0, frame = 0;
    CHECK_OK(config_set(&text, "seed", "7"));
    CHECK_OK(config_set(&text, "class", "caf\xc3\xa9"));
    CHECK_OK(image_write_apng(in_folder("film.png"), FRAMES, make_frame, NULL, enlarge, &text));
    uint8_t *p = get_file(in_folder("film.png"), &n);
    for (; at + 12 <= n && chunk < 14; chunk++) {
        const size_t length = be(p + at, 4);
        const uint8_t *type = p + at + 4, *data = type + 4;
        if (!CHECK(length <= n - at - 12)) break;
        CHECK(!memcmp(type, order[chunk], 4));
        CHECK(crc32(crc32(0, NULL, 0), type, (uInt)length + 4) == be(data + length, 4));
        if (!memcmp(type, "IHDR", 4)) CHECK(be(data, 4) == W && be(data + 4, 4) == H);
        if (!memcmp(type, "acTL", 4)) CHECK(length == 8 && be(data, 4) == FRAMES && be(data + 4, 4) == 0);
        if (!memcmp(type, "IDAT", 4)) CHECK(is_frame(data, length, FRAMES - 1, H, W, enlarge)); /* viewers of old */
        if (!memcmp(type, "fcTL", 4)) {
            CHECK(length == 26 && be(data, 4) == sequence++ && be(data + 4, 4) == W && be(data + 8, 4) == H);
            CHECK(be(data + 20, 2) == (frame == FRAMES - 1 ? LAST_FRAME_MS : FRAME_MS) && be(data + 22, 2) == 1000);
        }
        if (!memcmp(type, "fdAT", 4))
            CHECK(be(data, 4) == sequence++ && is_frame(data + 4, length - 4, frame++, H, W, enlarge));
        at += 12 + length;
    }
    CHECK(at == n && chunk == 14 && frame == FRAMES);
    config_free(&text);
}

static void test_apng(void) {
    Image im = {0}, last;
    test_apng_of(1);
    test_apng_of(3);
    CHECK_OK(image_write_apng(in_folder("film.png"), FRAMES, make_frame, NULL, 1, NULL));
    CHECK_OK(image_read(&im, in_folder("film.png")));
    make_frame(NULL, FRAMES - 1, &last);
    CHECK(im.note && strstr(im.note, "animated PNG") && difference(&im, &last) == 0);
    image_free(&im);
    image_free(&last);
    CHECK_ERR(image_write_apng(in_folder("odd.png"), FRAMES, make_frame, "odd", 1, NULL), "several sizes");
    CHECK_ERR(image_write_apng(in_folder("odd.png"), 0, make_frame, NULL, 1, NULL), "no frames");
    CHECK_ERR(image_read(&im, in_folder("odd.png")), "No such file");
}

int main(void) {
    if (!temporary_folder(folder)) return 1;
    test_png_gray();
    test_png_palette();
    test_png_alpha();
    test_png_interlaced();
    test_jpeg_colours();
    test_jpeg_warnings();
    test_official_png();
    test_official_jpeg();
    test_exif();
    test_exif_ignored();
    test_orientation_places();
    test_exif_damage();
    test_damage();
    test_jpeg_end();
    test_foreign();
    test_sniffing();
    test_webp_orientation();
    test_webp_animated();
    test_webp();
    test_limits();
    test_write();
    test_keys();
    test_many_texts();
    test_resize_tables();
    test_resize_properties();
    test_prepare();
    test_masks();
    test_grid();
    test_enlarged();
    test_apng();
    nftw(folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    return test_report();
}
