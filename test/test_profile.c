/* test_profile.c - colour profiles: read out of PNG, JPEG and WebP, written into PNGs, and what hostile ones do. Files are
 * made by libpng and libjpeg where those write profiles, else by hand; every one is cut everywhere. */
#include "files.h"

#include <jpeglib.h>
#include <png.h>
#include <zlib.h>
#ifdef HAVE_WEBP
#include <webp/encode.h>
#endif

#include "files/files.h"
#include "profiles.h"

static uint8_t p3[P3_BYTES], large[LONG_PROFILE_BYTES];

/* ---- Files with a profile ---- */

typedef struct {
    uint8_t bytes[1 << 19];
    size_t n;
} File;
static File file;

static void put(const void *bytes, size_t n) {
    if (n > sizeof file.bytes - file.n) abort();
    if (n) memcpy(file.bytes + file.n, bytes, n);
    file.n += n;
}

static void put_png_chunk(const char *type, const uint8_t *data, size_t n) {
    uint8_t number[4];
    put_u32be(number, n);
    put(number, 4), put(type, 4), put(data, n);
    put_u32be(number, crc32(crc32(0, NULL, 0), file.bytes + file.n - n - 4, (uInt)(n + 4)));
    put(number, 4);
}

/* How a PNG is made: grey (else RGB), its profile behind the pixels */
static int grey_png, late_profile;

/* A PNG of a pixel, with this as chunk iCCP */
static void make_png(const void *chunk, size_t n) {
    const uint8_t head[] = {0, 0, 0, 1, 0, 0, 0, 1, 8, grey_png ? 0 : 2, 0, 0, 0};
    uint8_t packed[64];
    uLongf size = sizeof packed;
    compress(packed, &size, (const uint8_t *)"\0\1\2\3", grey_png ? 2 : 4);
    file.n = 0;
    put("\x89PNG\r\n\x1a\n", 8);
    put_png_chunk("IHDR", head, sizeof head);
    if (!late_profile) put_png_chunk("iCCP", chunk, n);
    put_png_chunk("IDAT", packed, size);
    if (late_profile) put_png_chunk("iCCP", chunk, n);
    put_png_chunk("IEND", NULL, 0);
}

/* The same with a profile, as libpng would write it */
static void make_png_with(const uint8_t *profile, size_t n) {
    static uint8_t chunk[1 << 20];
    uLongf size = sizeof chunk - 16;
    memcpy(chunk, "any name\0", 10);
    compress(chunk + 10, &size, profile, (uLong)n);
    make_png(chunk, 10 + size);
}

typedef struct {
    const uint8_t *bytes;
    size_t n;
    int number, of;
} Segment;

static void make_jpeg(const Segment *s, size_t segments) {
    struct jpeg_compress_struct c;
    struct jpeg_error_mgr manager;
    static uint8_t content[65536];
    uint8_t *out = NULL, row[3] = {200, 100, 50};
    unsigned long n = 0;
    JSAMPROW at = row;
    c.err = jpeg_std_error(&manager);
    jpeg_create_compress(&c);
    jpeg_mem_dest(&c, &out, &n);
    c.image_width = c.image_height = 1;
    c.in_color_space = JCS_RGB, c.input_components = 3;
    jpeg_set_defaults(&c);
    jpeg_start_compress(&c, TRUE);
    for (size_t i = 0; i < segments; i++) {
        memcpy(content, "ICC_PROFILE", 12);
        content[12] = (uint8_t)s[i].number, content[13] = (uint8_t)s[i].of;
        memcpy(content + 14, s[i].bytes, s[i].n);
        jpeg_write_marker(&c, JPEG_APP0 + 2, content, (unsigned)(14 + s[i].n));
    }
    jpeg_write_scanlines(&c, &at, 1);
    jpeg_finish_compress(&c);
    jpeg_destroy_compress(&c);
    file.n = 0;
    put(out, n);
    free(out);
}

static void put_webp_chunk(const char *name, const void *data, size_t n) {
    uint8_t size[4] = {(uint8_t)n, (uint8_t)(n >> 8), (uint8_t)(n >> 16), (uint8_t)(n >> 24)};
    put(name, 4), put(size, 4), put(data, n);
    if (n & 1) put("", 1);
}

static void make_webp(const uint8_t *profile, size_t n, int flags) {
    uint8_t head[10] = {(uint8_t)flags};
    file.n = 0;
    put("RIFF\0\0\0\0WEBP", 12);
    put_webp_chunk("VP8X", head, sizeof head);
    put_webp_chunk("ICCP", profile, n);
#ifdef HAVE_WEBP
    uint8_t *out, pixel[3] = {1, 2, 3};
    const size_t size = WebPEncodeLosslessRGB(pixel, 1, 1, 3, &out);
    put(out + 12, size - 12);
    WebPFree(out);
#endif
    const size_t all = file.n - 8;
    for (int k = 0; k < 4; k++) file.bytes[4 + k] = (uint8_t)(all >> 8 * k);
}

/* ---- What is read ---- */

/* The file's profile is these bytes. */
static int gives(const uint8_t *profile, size_t n) {
    Profile p;
    if (profile_read(&p, file.bytes, file.n) != OK) return 0;
    const int same = p.size == n && !p.note && (n == 0 || !memcmp(p.bytes, profile, n));
    if (!same) printf("     %zu bytes, expected %zu; %s\n", p.size, n, p.note ? p.note : "");
    profile_free(&p);
    return same;
}

/* It has one that is left out, and a word says why. */
static int leaves_out(const char *why) {
    Profile p;
    if (profile_read(&p, file.bytes, file.n) != OK) return 0;
    const int right = p.size == 0 && p.bytes == NULL && p.note && strstr(p.note, why);
    if (!right) printf("     %zu bytes; %s, expected %s\n", p.size, p.note ? p.note : "nothing is said", why);
    profile_free(&p);
    return right;
}

static int is_picture_still(void) {
    Image im;
    const int ok = image_decode(&im, file.bytes, file.n, IMAGE_UPRIGHT) == OK;
    if (!ok) printf("     %s\n", err_text());
    image_free(&im);
    return ok;
}

static void test_read(void) {
    make_png_with(p3, P3_BYTES);
    CHECK(is_picture_still() && gives(p3, P3_BYTES));
    make_png_with(large, LONG_PROFILE_BYTES);
    CHECK(is_picture_still() && gives(large, LONG_PROFILE_BYTES));
    file.bytes[8 + 25 + 8 + 9] = 1; /* another way of packing */
    CHECK(leaves_out("damaged"));
    make_jpeg(&(Segment){p3, P3_BYTES, 1, 1}, 1);
    CHECK(is_picture_still() && gives(p3, P3_BYTES));
    make_jpeg(NULL, 0);
    CHECK(is_picture_still() && gives(NULL, 0));
    make_webp(p3, P3_BYTES, 0x20);
#ifdef HAVE_WEBP
    CHECK(is_picture_still());
#endif
    CHECK(gives(p3, P3_BYTES));
    make_webp(p3, P3_BYTES, 0); /* the header does not say that there is one */
    CHECK(gives(NULL, 0));
    make_webp(large, LONG_PROFILE_BYTES, 0x20);
    CHECK(gives(large, LONG_PROFILE_BYTES));
}

/* A profile that no segment can hold, in several */
static void test_jpeg_parts(void) {
    enum { FIRST = 65000, SECOND = 65519, THIRD = LONG_PROFILE_BYTES - FIRST - SECOND };
    const Segment one = {large, FIRST, 1, 3}, two = {large + FIRST, SECOND, 2, 3},
                  three = {large + FIRST + SECOND, THIRD, 3, 3};
    make_jpeg((Segment[]){one, two, three}, 3);
    CHECK(is_picture_still() && gives(large, LONG_PROFILE_BYTES));
    make_jpeg((Segment[]){three, one, two}, 3);
    CHECK(gives(large, LONG_PROFILE_BYTES));
    make_jpeg((Segment[]){{p3, 300, 1, 2}, {p3 + 300, P3_BYTES - 300, 2, 2}}, 2);
    CHECK(gives(p3, P3_BYTES));
    make_jpeg((Segment[]){one, three}, 2);
    CHECK(is_picture_still() && leaves_out("damaged"));
    make_jpeg((Segment[]){one, two, two, three}, 4);
    CHECK(leaves_out("damaged"));
    make_jpeg((Segment[]){one, {two.bytes, two.n, 2, 4}, three}, 3);
    CHECK(leaves_out("damaged"));
    make_jpeg((Segment[]){{p3, P3_BYTES, 0, 1}}, 1);
    CHECK(leaves_out("damaged"));
    make_jpeg((Segment[]){{p3, P3_BYTES, 2, 1}}, 1);
    CHECK(leaves_out("damaged"));
    make_jpeg((Segment[]){{p3, 0, 1, 1}}, 1);
    CHECK(leaves_out("damaged"));
}

/* sRGB says what files say by saying nothing. */
static void test_srgb(void) {
    static uint8_t profile[4096];
    make_profile(profile, sizeof profile, srgb_primaries, CURVE_PARAMETRIC);
    make_png_with(profile, sizeof profile);
    CHECK(gives(NULL, 0));
    make_profile(profile, sizeof profile, srgb_primaries, CURVE_TABLE);
    make_webp(profile, sizeof profile, 0x20);
    CHECK(gives(NULL, 0));
    make_profile(profile, sizeof profile, srgb_primaries, CURVE_GAMMA); /* darker shadows */
    make_png_with(profile, sizeof profile);
    CHECK(gives(profile, sizeof profile));
    make_profile(profile, sizeof profile, p3_primaries, CURVE_TABLE);
    make_png_with(profile, sizeof profile);
    CHECK(gives(profile, sizeof profile));
    make_profile(profile, sizeof profile, srgb_primaries, CURVE_PARAMETRIC);
    memcpy(profile + 132 + 12 * 6, "A2B0", 4); /* tables come before primaries */
    make_png_with(profile, sizeof profile);
    CHECK(gives(profile, sizeof profile));
}

/* ---- What is left out ---- */

/* A profile that is not the picture's, or not where one is looked for */
static void test_misplaced(void) {
    static uint8_t srgb[4096], grey[P3_BYTES];
    make_profile(srgb, sizeof srgb, srgb_primaries, CURVE_PARAMETRIC);
    memcpy(grey, p3, P3_BYTES);
    memcpy(grey + 16, "GRAY", 4);
    grey_png = 1;
    make_png_with(p3, P3_BYTES);
    CHECK(is_picture_still() && leaves_out("the picture is grey"));
    make_png_with(srgb, sizeof srgb); /* which changes nothing */
    CHECK(is_picture_still() && gives(NULL, 0));
    make_png_with(grey, P3_BYTES);
    CHECK(is_picture_still() && leaves_out("not for RGB"));
    grey_png = 0, late_profile = 1;
    make_png_with(p3, P3_BYTES);
    CHECK(is_picture_still() && leaves_out("behind the pixels"));
    late_profile = 0;
}

static void test_hostile(void) {
    static const struct {
        size_t at, value;
        const char *why;
    } changes[] = {{0, P3_BYTES + 1, "damaged"}, /* it promises more than there is */
                   {0, 4, "damaged"},
                   {0, 0xffffffff, "damaged"},
                   {16, 0x47524159, "not for RGB"}, /* GRAY */
                   {16, 0x434d594b, "not for RGB"}, /* CMYK */
                   {20, 0x52474220, "damaged"},
                   {36, 0, "damaged"},
                   {128, 1000, "damaged"}, /* tags */
                   {128, 0xffffffff, "damaged"},
                   {136, P3_BYTES, "damaged"}, /* the first one's place, ... */
                   {136, 0xfffffff0, "damaged"},
                   {140, 0xffffffff, "damaged"}}; /* ... and size */
    static uint8_t more[MOST_PROFILE_BYTES];
    uint8_t bad[P3_BYTES];
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        memcpy(bad, p3, P3_BYTES);
        put_u32be(bad + changes[i].at, changes[i].value);
        make_png_with(bad, P3_BYTES);
        CHECK(is_picture_still() && leaves_out(changes[i].why));
        make_jpeg(&(Segment){bad, P3_BYTES, 1, 1}, 1);
        CHECK(leaves_out(changes[i].why));
        make_webp(bad, P3_BYTES, 0x20);
        CHECK(leaves_out(changes[i].why));
    }
    make_png_with(more, sizeof more); /* a small file */
    CHECK(is_picture_still() && leaves_out("1 MiB"));
    make_png_with(more, PROFILE_BYTES + 1);
    CHECK(leaves_out("1 MiB"));
    make_png("name\0\0nonsense", 14);
    CHECK(is_picture_still() && leaves_out("damaged"));
    make_png("name", 4);
    CHECK(leaves_out("damaged"));
    make_png("name", 5);
    CHECK(leaves_out("damaged"));
    make_png("", 0);
    CHECK(leaves_out("damaged"));
    file.n = 0;
    put("GIF89a", 6);
    CHECK(gives(NULL, 0));
}

/* Every beginning of a file, in memory that ends there */
static void test_cut(void) {
    for (int kind = 0; kind < 3; kind++) {
        if (kind == 0) make_png_with(p3, P3_BYTES);
        if (kind == 1) make_jpeg((Segment[]){{p3, 200, 1, 2}, {p3 + 200, P3_BYTES - 200, 2, 2}}, 2);
        if (kind == 2) make_webp(p3, P3_BYTES, 0x20);
        size_t whole = 0, none = 0;
        for (size_t n = 0; n <= file.n; n++) {
            uint8_t *cut = malloc(n + !n);
            Profile p;
            memcpy(cut, file.bytes, n);
            if (profile_read(&p, cut, n) != OK) break;
            whole += p.size == P3_BYTES, none += p.size == 0;
            profile_free(&p);
            free(cut);
        }
        CHECK(whole + none == file.n + 1 && whole > 0 && none > P3_BYTES / 2);
    }
}

/* ---- What is written ---- */

static Err frame(void *context, size_t i, Image *im) {
    *im = picture(5, 7);
    im->rgb[0] = (uint8_t)i;
    im->profile = context;
    return OK;
}

/* libpng finds the profile in what we write, and takes it. */
static int libpng_finds(const uint8_t *profile, size_t n) {
    png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, NULL, NULL, NULL);
    png_infop info = png_create_info_struct(png);
    png_charp name;
    png_bytep found = NULL;
    png_uint_32 bytes = 0;
    int packing;
    FILE *f = fopen(in_folder("profile.png"), "rb");
    png_init_io(png, f);
    png_read_info(png, info);
    const int ok = png_get_iCCP(png, info, &name, &packing, &found, &bytes) && bytes == n && !memcmp(found, profile, n);
    png_destroy_read_struct(&png, &info, NULL);
    fclose(f);
    return ok;
}

static void test_write(void) {
    uint8_t *plain, *none, *with;
    size_t plain_n, none_n, with_n;
    Profile p = {p3, P3_BYTES, NULL}, empty = {0};
    Image im = picture(9, 13);
    CHECK_OK(image_encode_png(&plain, &plain_n, &im, NULL));
    im.profile = &empty;
    CHECK_OK(image_encode_png(&none, &none_n, &im, NULL));
    CHECK(plain_n == none_n && !memcmp(plain, none, plain_n));
    im.profile = &p;
    CHECK_OK(image_encode_png(&with, &with_n, &im, NULL));
    file.n = 0, put(with, with_n);
    CHECK(is_picture_still() && gives(p3, P3_BYTES));
    CHECK_OK(image_write_png_enlarged(in_folder("profile.png"), &im, 3, NULL));
    CHECK(libpng_finds(p3, P3_BYTES));
    CHECK_OK(image_write_apng(in_folder("profile.png"), 3, frame, &p, 1, NULL));
    CHECK(libpng_finds(p3, P3_BYTES));
    CHECK_OK(image_write_apng(in_folder("profile.png"), 3, frame, NULL, 1, NULL));
    CHECK(!libpng_finds(p3, P3_BYTES));
    image_free(&im);
    free(plain), free(none), free(with);
}

int main(void) {
    if (!temporary_folder(folder)) return 1;
    make_profile(p3, P3_BYTES, p3_primaries, CURVE_PARAMETRIC);
    make_profile(large, LONG_PROFILE_BYTES, p3_primaries, CURVE_TABLE);
    test_read();
    test_jpeg_parts();
    test_srgb();
    test_misplaced();
    test_hostile();
    test_cut();
    test_write();
    nftw(folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    return test_report();
}
