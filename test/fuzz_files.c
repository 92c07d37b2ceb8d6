/* fuzz_files.c - fuzzers of single files: checkpoints, pictures and masks, tokens, recipes, class lists, schedules,
 * LMDBs. */
#include "fuzz.h"
#include "profiles.h"

#include <jpeglib.h>
#include <math.h>
#include <zlib.h>
#ifdef HAVE_LMDB
#include <lmdb.h>
#endif
#ifdef HAVE_WEBP
#include <webp/encode.h>
#endif

static uint32_t big_endian(const uint8_t *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static void put_big_endian(uint8_t *p, uint32_t x) {
    for (int i = 0; i < 4; i++) p[i] = (uint8_t)(x >> (24 - 8 * i));
}

/* ------------------------------------------------------------------------------------------------------------
 * Checkpoints: opened, and every number in them read
 * ---------------------------------------------------------------------------------------------------------- */

static void read_checkpoint(const void *first, size_t n_first, const uint8_t *bytes, size_t n) {
    char note[ERR_MAX];
    Checkpoint ck;
    memset(&ck, 0, sizeof ck);
    if (answered(checkpoint_open(&ck, fuzz_put("checkpoint", first, n_first, bytes, n))) != OK) return;
    checkpoint_note(note, &ck);
    for (size_t i = 0; i < ck.n; i++) {
        const Tensor *x = &ck.tensor[i];
        real *out = malloc((x->size + 1) * sizeof *out);
        MUST(out);
        answered(checkpoint_reals(&ck, x->name, x->ndim, x->dim, x->size, out)); /* some dtypes have no numbers */
        free(out);
    }
    checkpoint_close(&ck);
}

static void read_whole(const uint8_t *bytes, size_t n) {
    read_checkpoint("", 0, bytes, n);
}

/* The object of a file of torch.save before version 1.6, whose preamble is right: no checksum stands between the fuzzer
 * and the machine that runs pickles. */
static void read_pickle(const uint8_t *bytes, size_t n) {
    static const char preamble[] = "\x80\2\x8a\nl\xfc\x9c\x46\xf9 j\xa8P\x19.\x80\2M\xe9\3."
                                   "\x80\2}U\rlittle_endian\x88s.";
    read_checkpoint(preamble, sizeof preamble - 1, bytes, n);
}

/* Also without checksums, as torch.save writes where compute_crc32 is False: what is changed in it is no damage, so that
 * changes come to what is behind the checksums. */
static void zip_seeds(FuzzSeed *take) {
    static const char half[] = "test/golden-cases/ckpt_formats/model_half.ckpt";
    uint8_t *bytes;
    size_t n, entries = 0;
    fuzz_take_file(take, "half", half);
    MUST(file_bytes(&bytes, &n, half, 1 << 20, NULL) == OK);
    for (size_t i = 0; i + 20 <= n; i++)
        if (!memcmp(bytes + i, "PK\1\2", 4)) memset(bytes + i + 16, 0, 4), entries++;
    MUST(entries > 2);
    take("without", bytes, n);
    free(bytes);
}

static void legacy_seeds(FuzzSeed *take) {
    fuzz_take_file(take, "half", "test/golden-cases/ckpt_formats/model_half_legacy.ckpt");
}

/* The third pickle of the old format is what it is all about: {"w": tensor (2,) of a storage of two floats}. */
static void pickle_seeds(FuzzSeed *take) {
    static const char object[] = "\x80\2}q\0X\1\0\0\0wq\1ctorch._utils\n_rebuild_tensor_v2\nq\2("
                                 "(X\7\0\0\0storageq\3ctorch\nFloatStorage\nq\4X\1\0\0\0000q\5X\3\0\0\0cpuq\6K\2Ntq\7Q"
                                 "K\0K\2\x85q\bK\1\x85q\t\x89}q\ntq\vRq\fs.\x80\2]q\0X\1\0\0\0000q\1a."
                                 "\2\0\0\0\0\0\0\0\0\0\x80?\0\0\0@";
    take("object", object, sizeof object - 1);
}

static void safetensors_seeds(FuzzSeed *take) {
    fuzz_take_file(take, "io", "test/golden-cases/ckpt_formats/io.safetensors");
}

/* ------------------------------------------------------------------------------------------------------------
 * Arrays of NumPy: as numbers, and as the codes of a first stage
 * ---------------------------------------------------------------------------------------------------------- */

static void read_npy(const uint8_t *bytes, size_t n) {
    enum { CODES = 1024 };
    VqganConfig c = {.n_embed = CODES};
    const char *path = fuzz_put("x.npy", "", 0, bytes, n);
    int64_t *x;
    size_t many;
    if (answered(npy_read(&x, &many, path, 1 << 24)) == OK) MUST(many && many <= n / 2);
    free(x);
    if (answered(remap_file(&x, &c.re_embed, path, CODES)) != OK) return;
    Remap r;
    snprintf(c.remap, sizeof c.remap, "%s", path);
    MUST(remap_make(&r, &c) == OK && remap_K(&r) == c.re_embed && c.re_embed <= CODES);
    for (size_t i = 0; i < c.re_embed; i++) {
        MUST(r.used[i] == x[i]);
        MUST(r.used[r.inverse[x[i]]] == x[i] && (size_t)r.inverse[x[i]] <= i);
    }
    remap_free(&r);
    free(x);
}

static void npy_seeds(FuzzSeed *take) {
    static const char one[] = "\x93NUMPY\1\0\x38\0{'descr': '<i8', 'fortran_order': False, 'shape': (2,)}\n"
                              "\3\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0",
                      two[] =
                          "\x93NUMPY\2\0\x3f\0\0\0{'shape': (3L,), 'fortran_order': True, 'descr': \">i4\", }     \n"
                          "\0\0\0\1\0\0\2\0\0\0\0\1",
                      three[] = "\x93NUMPY\3\0\x3a\0\0\0{'descr': '<i2', 'fortran_order': False, 'shape': (3,), }\n"
                                "\7\0\xff\3\0\0";
    take("one", one, sizeof one - 1);
    take("two", two, sizeof two - 1);
    take("three", three, sizeof three - 1);
}

/* ------------------------------------------------------------------------------------------------------------
 * Pictures. Byte 0: how they are decoded; byte 1: to which side; the rest is the file.
 * ---------------------------------------------------------------------------------------------------------- */

static void prepare(const Image *im, unsigned how, size_t side) {
    real *out = malloc(3 * side * side * sizeof *out);
    MUST(out);
    const Prep prep = (Prep)(how >> 3 & 3);
    if (answered(image_prepare(out, im, prep, side, how & 32 ? 0.99999999 : -1, how & 32 ? 0.5 : -1, how & 64)) == OK)
        for (size_t i = 0; i < 3 * side * side; i++) MUST(out[i] >= -1 && out[i] <= 1);
    free(out);
}

static void read_picture(const uint8_t *bytes, size_t n) {
    Image im = {0};
    Config texts = {0};
    Profile profile;
    if (n < 3) return;
    const unsigned how = bytes[0];
    const size_t side = 1 + bytes[1] % 40;
    uint8_t *file = malloc(n - 2); /* its end is guarded */
    MUST(file);
    memcpy(file, bytes + 2, n - 2), n -= 2;
    if (answered(image_decode(&im, file, n, (int)(how & 7))) == OK) {
        MUST(im.H && im.W && im.rgb);
        if (im.H * im.W <= 1 << 20) prepare(&im, how, side);
    } else
        MUST(!im.rgb);
    image_free(&im);
    if (answered(image_decode_prepared(&im, file, n, (Prep)(how >> 3 & 3), side)) == OK)
        MUST(im.H >= side && im.W >= side);
    image_free(&im);
    answered(png_read_texts(&texts, file, n));
    config_free(&texts);
    if (profile_read(&profile, file, n) == OK) MUST(profile.size <= PROFILE_BYTES && !profile.size == !profile.bytes);
    profile_free(&profile);
    free(file);
}

/* Chunks of a PNG have right lengths and checksums again. */
static size_t mend_png(uint8_t *bytes, size_t n, size_t start) {
    enum { SIGNATURE = 8, AROUND = 12 };
    if (n < start + SIGNATURE || memcmp(bytes + start, "\x89PNG\r\n\x1a\n", SIGNATURE) != 0) return n;
    for (size_t at = start + SIGNATURE; at + AROUND <= n;) {
        uint8_t *p = bytes + at;
        const size_t room = n - at - AROUND;
        if (big_endian(p) > room) put_big_endian(p, (uint32_t)room);
        const size_t length = big_endian(p);
        put_big_endian(p + 8 + length, (uint32_t)crc32(0, p + 4, (uInt)length + 4));
        at += AROUND + length;
    }
    return n;
}

/* Huge pictures take seconds of the sanitizers; test_images.c has some. */
static size_t mend_picture(uint8_t *bytes, size_t n, size_t most, unsigned seed) {
    enum { WIDTH = 2 + 16, HEIGHT = WIDTH + 4 };
    (void)most, (void)seed;
    if (n > HEIGHT + 4 && bytes[3] == 'P') bytes[WIDTH] = bytes[WIDTH + 1] = bytes[HEIGHT] = bytes[HEIGHT + 1] = 0;
    return mend_png(bytes, n, 2);
}

static const uint8_t exif[] = "MM\0*\0\0\0\10\0\1\1\22\0\3\0\0\0\1\0\6\0\0\0\0\0"; /* orientation 6 */
enum { EXIF_BYTES = sizeof exif - 1 };

/* 9x17; baseline or progressive, with EXIF and XMP; release with free() */
static uint8_t *make_jpeg(size_t *n, J_COLOR_SPACE space, int components, int progressive) {
    struct jpeg_compress_struct c;
    struct jpeg_error_mgr errors;
    static const char xmp[] = "http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation=\"8\"/>";
    uint8_t marker[6 + EXIF_BYTES] = "Exif\0", row[9 * 4], *rows[] = {row}, *out = NULL;
    unsigned long bytes = 0;
    memcpy(marker + 6, exif, EXIF_BYTES);
    c.err = jpeg_std_error(&errors);
    jpeg_create_compress(&c);
    jpeg_mem_dest(&c, &out, &bytes);
    c.image_width = 9, c.image_height = 17, c.input_components = components, c.in_color_space = space;
    jpeg_set_defaults(&c);
    if (progressive) jpeg_simple_progression(&c);
    jpeg_start_compress(&c, TRUE);
    jpeg_write_marker(&c, JPEG_APP0 + 1, marker, sizeof marker);
    jpeg_write_marker(&c, JPEG_APP0 + 1, (const JOCTET *)xmp, sizeof xmp - 1);
    for (unsigned y = 0; y < c.image_height; y++) {
        for (size_t x = 0; x < sizeof row; x++) row[x] = (uint8_t)(x * y * 5);
        jpeg_write_scanlines(&c, rows, 1);
    }
    jpeg_finish_compress(&c);
    jpeg_destroy_compress(&c);
    *n = bytes;
    return out;
}

static void take_picture(FuzzSeed *take, const char *name, unsigned how, const uint8_t *file, size_t n) {
    uint8_t *all = malloc(n + 2);
    MUST(all);
    all[0] = (uint8_t)how, all[1] = 16;
    memcpy(all + 2, file, n);
    take(name, all, n + 2);
    free(all);
}

/* A PNG of that colour type and depth whose rows are all the same byte; palette, tRNS and eXIf where the type has them */
static size_t make_png(uint8_t *out, unsigned type, unsigned depth, int interlaced) {
    static const uint8_t channels[] = {1, 0, 3, 1, 2, 0, 4};
    uint8_t rows[4096], packed[4096];
    const size_t side = 9, row = 1 + (side * channels[type] * depth + 7) / 8;
    size_t n = 8, length = 0;
    memcpy(out, "\x89PNG\r\n\x1a\n", 8);
#define CHUNK(name, data, bytes)                                                                                       \
    (put_big_endian(out + n, (uint32_t)(bytes)), memcpy(out + n + 4, name, 4), memcpy(out + n + 8, data, bytes),       \
     n += 12 + (bytes))
    uint8_t header[13] = {0, 0, 0, 9, 0, 0, 0, 9, (uint8_t)depth, (uint8_t)type, 0, 0, (uint8_t)interlaced};
    CHUNK("IHDR", header, 13);
    if (type == 3) CHUNK("PLTE", "\0\0\0\xff\0\0\0\xff\0\0\0\xff", 12), CHUNK("tRNS", "\0\x80", 2);
    if (type == 0) CHUNK("tRNS", "\0\1", 2);
    CHUNK("eXIf", exif, EXIF_BYTES);
    CHUNK("tEXt", "seed\0007", 6);
    if (interlaced) /* seven passes, each a picture */
        for (size_t pass = 0; pass < 7; pass++) {
            static const uint8_t x0[] = {0, 4, 0, 2, 0, 1, 0}, dx[] = {8, 8, 4, 4, 2, 2, 1},
                                 y0[] = {0, 0, 4, 0, 2, 0, 1}, dy[] = {8, 8, 8, 4, 4, 2, 2};
            const size_t w = (side - x0[pass] + dx[pass] - 1) / dx[pass],
                         h = (side - y0[pass] + dy[pass] - 1) / dy[pass];
            for (size_t y = 0; y < h; y++) {
                rows[length++] = (uint8_t)(y % 5);
                for (size_t k = 0; k < (w * channels[type] * depth + 7) / 8; k++) rows[length++] = (uint8_t)(17 * k);
            }
        }
    else
        for (; length < side * row; length++) rows[length] = (uint8_t)(length % row ? length & 0x55 : length / row % 5);
    uLongf bytes = sizeof packed;
    MUST(compress(packed, &bytes, rows, (uLong)length) == Z_OK);
    CHUNK("IDAT", packed, bytes);
    CHUNK("IEND", "", 0);
#undef CHUNK
    return mend_png(out, n, 0);
}

#ifdef HAVE_WEBP
/* A WebP of 9x7 with this profile */
static void take_webp(FuzzSeed *take, const char *name, const uint8_t *p3, const uint8_t *plain, size_t n) {
    uint8_t bytes[8192] = "RIFF\0\0\0\0WEBPVP8X\12\0\0\0\40\0\0\0\10\0\0\6\0\0ICCP\xf4\1\0\0";
    enum { BEFORE = 38, HEADER = 12 };
    const size_t all = BEFORE + P3_BYTES + n - HEADER;
    MUST(all <= sizeof bytes && P3_BYTES == 0x1f4);
    memcpy(bytes + BEFORE, p3, P3_BYTES), memcpy(bytes + BEFORE + P3_BYTES, plain + HEADER, n - HEADER);
    bytes[4] = (uint8_t)(all - 8), bytes[5] = (uint8_t)((all - 8) >> 8);
    take_picture(take, name, 1, bytes, all);
}
#endif

/* With a colour profile: a PNG as we write it, a JPEG */
static void profile_seeds(FuzzSeed *take, const uint8_t *p3) {
    static const uint8_t segment[] = "\xff\xe2\2\4ICC_PROFILE\0\1\1"; /* 16 + P3_BYTES */
    enum { SEGMENT = sizeof segment - 1 };
    uint8_t rgb[3] = {1, 2, 3}, *bytes, *jpeg;
    size_t n;
    const Profile profile = {(uint8_t *)(uintptr_t)p3, P3_BYTES, NULL};
    const Image im = {.H = 1, .W = 1, .rgb = rgb, .profile = &profile};
    MUST(image_encode_png(&bytes, &n, &im, NULL) == OK);
    take_picture(take, "png_profile", 1, bytes, n);
    free(bytes);
    jpeg = make_jpeg(&n, JCS_RGB, 3, 0);
    bytes = malloc(n + SEGMENT + P3_BYTES);
    MUST(bytes);
    memcpy(bytes, jpeg, 2), memcpy(bytes + 2, segment, SEGMENT), memcpy(bytes + 2 + SEGMENT, p3, P3_BYTES);
    memcpy(bytes + 2 + SEGMENT + P3_BYTES, jpeg + 2, n - 2);
    take_picture(take, "jpeg_profile", 1, bytes, n + SEGMENT + P3_BYTES);
    free(bytes), free(jpeg);
}

static void picture_seeds(FuzzSeed *take) {
    static const uint8_t png[][3] = {{2, 8, 0}, {6, 8, 0},  {3, 2, 0},  {0, 1, 0},
                                     {4, 8, 1}, {2, 16, 1}, {6, 16, 0}, {3, 8, 1}};
    static const struct {
        J_COLOR_SPACE space;
        int components, progressive;
    } jpeg[] = {{JCS_RGB, 3, 0}, {JCS_RGB, 3, 1}, {JCS_GRAYSCALE, 1, 0}, {JCS_CMYK, 4, 0}};
    char name[16];
    uint8_t p3[P3_BYTES];
    size_t n;
    make_profile(p3, P3_BYTES, p3_primaries, CURVE_PARAMETRIC);
    profile_seeds(take, p3);
    for (size_t i = 0; i < sizeof png / sizeof *png; i++) {
        uint8_t bytes[8192];
        n = make_png(bytes, png[i][0], png[i][1], png[i][2]);
        snprintf(name, sizeof name, "png%zu", i);
        take_picture(take, name, (unsigned)i * 37, bytes, n);
    }
    for (size_t i = 0; i < sizeof jpeg / sizeof *jpeg; i++) {
        uint8_t *bytes = make_jpeg(&n, jpeg[i].space, jpeg[i].components, jpeg[i].progressive);
        snprintf(name, sizeof name, "jpeg%zu", i);
        take_picture(take, name, 9 * (unsigned)i, bytes, n);
        free(bytes);
    }
#ifdef HAVE_WEBP
    uint8_t rgba[9 * 7 * 4], *out = NULL;
    for (size_t i = 0; i < sizeof rgba; i++) rgba[i] = (uint8_t)(i * 29);
    n = WebPEncodeLosslessRGBA(rgba, 9, 7, 9 * 4, &out);
    take_picture(take, "webp0", 1, out, n);
    take_webp(take, "webp_profile", p3, out, n);
    WebPFree(out);
    n = WebPEncodeRGBA(rgba, 9, 7, 9 * 4, 50, &out);
    take_picture(take, "webp1", 9, out, n);
    WebPFree(out);
#endif
}

/* Byte 0: side and inversion; byte 1: the picture's own sides, if they are not the mask's; the rest: the mask's file. */
static void read_mask(const uint8_t *bytes, size_t n) {
    if (n < 3) return;
    const size_t side = 1 + bytes[0] % 32;
    size_t H = 1 + bytes[1] % 16, W = 1 + bytes[1] / 16;
    uint8_t *keep = malloc(side * side);
    const char *note = NULL;
    Image im = {0};
    MUST(keep);
    memset(keep, 7, side * side);
    const char *path = fuzz_put("mask", "", 0, bytes + 2, n - 2);
    if (bytes[1] < 128 && image_read(&im, path) == OK) H = im.H, W = im.W;
    image_free(&im);
    if (answered(mask_read(keep, &note, path, (Prep)(bytes[0] >> 5 & 3), side, H, W, bytes[0] >> 7)) == OK)
        for (size_t i = 0; i < side * side; i++) MUST(keep[i] <= 1);
    free(keep);
}

static void mask_seeds(FuzzSeed *take) {
    picture_seeds(take);
}

/* ------------------------------------------------------------------------------------------------------------
 * Tokens. Byte 0 odd: a whole file; even: a part file, from which an encoding goes on.
 * ---------------------------------------------------------------------------------------------------------- */

static const Tokens sizes = {.n = 5, .h = 2, .w = 2, .K = 16, .flips = 2, .crops = 1, .vqgan = 7, .source = 9};

static void append_tokens(TokensPart *p, size_t end) {
    const int32_t token[8] = {1, 2, 3, 4, 5, 15, 7, 8};
    for (size_t i = p->done; i < end; i++) MUST(tokens_append(p, i == 2 ? -1 : (int32_t)i, token) == OK);
}

static void read_tokens(const uint8_t *bytes, size_t n) {
    Tokens x = {0};
    if (n < 1) return;
    if (bytes[0] & 1) {
        if (answered(tokens_read(&x, fuzz_put("tokens", "", 0, bytes + 1, n - 1))) != OK) return;
        for (size_t i = 0; i < x.n * x.crops * x.flips * x.h * x.w; i++) MUST(x.token[i] < x.K);
        tokens_free(&x);
        return;
    }
    TokensPart p = {0};
    remove(fuzz_path("going-on"));
    fuzz_put("going-on.part", "", 0, bytes + 1, n - 1);
    if (answered(tokens_start(&p, fuzz_path("going-on"), &sizes, 2)) == OK) {
        MUST(p.done == sizes.n || (p.done < sizes.n && p.done % 2 == 0));
        append_tokens(&p, sizes.n);
        if (answered(tokens_finish(&p, &x)) == OK) tokens_free(&x);
    }
    tokens_stop(&p);
}

static void take_tokens(FuzzSeed *take, const char *name, uint8_t first, const char *path) {
    uint8_t *bytes, all[1024];
    size_t n;
    MUST(file_bytes(&bytes, &n, path, sizeof all - 1, NULL) == OK);
    all[0] = first;
    memcpy(all + 1, bytes, n);
    take(name, all, n + 1);
    free(bytes);
}

static void token_seeds(FuzzSeed *take) {
    TokensPart p = {0};
    Tokens x = {0};
    remove(fuzz_path("made")), remove(fuzz_path("made.part"));
    MUST(tokens_start(&p, fuzz_path("made"), &sizes, 2) == OK);
    append_tokens(&p, 2);
    p.done = 2;
    take_tokens(take, "part", 0, fuzz_path("made.part"));
    append_tokens(&p, sizes.n);
    MUST(tokens_finish(&p, &x) == OK);
    tokens_stop(&p), tokens_free(&x);
    take_tokens(take, "whole", 1, fuzz_path("made"));
}

/* ------------------------------------------------------------------------------------------------------------
 * Recipes, and the networks that they describe
 * ---------------------------------------------------------------------------------------------------------- */

static void describe(const Config *c) {
    VqganConfig first;
    NetConfig net;
    DiscConfig disc;
    Prep prep;
    Rate rate;
    Config again = {0};
    float beta[MAX_SCALES + 1];
    if (answered(first_stage_config(&first, c, NULL, NULL)) == OK) {
        Vqgan *v = NULL;
        size_t bytes;
        MUST(vqgan_config_write(&again, &first, "model.params.") == OK);
        if (answered(vqgan_create(&v, &first, 0)) == OK)
            answered(vqgan_plan_bytes(v, 2, first.resolution, first.resolution, 1, &bytes));
        vqgan_free(v);
    }
    if (answered(net_config_read(&net, c, "model.params.")) == OK && net.enc_depth < 64 && net.dec_depth < 64) {
        Transformer *t = NULL;
        size_t bytes;
        MUST(net_config_write(&again, &net, "model.params.") == OK);
        if (answered(transformer_create(&t, &net)) == OK) answered(transformer_plan_bytes(t, 2, 4, 1, &bytes));
        transformer_free(t);
    }
    config_free(&again);
    answered(disc_config_read(&disc, c, "model.params.lossconfig.params."));
    answered(prep_read(&prep, c));
    if (answered(rate_read(&rate, c, 1000)) == OK)
        for (uint64_t step = 0; step < 1200; step += 100) (void)rate_at(&rate, step), (void)rate_peak(&rate);
    const char *redraw = config_get(c, "model.params.", "redraw_prob");
    if (redraw && strncmp(redraw, "curve:", 6) != 0) answered(betas_read(beta, redraw, 3));
    answered(keys_check(c, KEYS_FIRST | KEYS_TRANSITION, 1));
}

static void read_recipe(const uint8_t *bytes, size_t n) {
    const char *path = fuzz_put("recipe.txt", "", 0, bytes, n);
    const int scales[] = {RECIPE_VQGAN, (int)(n % 4)}; /* joint or one of three */
    for (size_t i = 0; i < 2; i++) {
        Config c = {0};
        if (answered(recipe_read(&c, path, scales[i])) == OK) describe(&c);
        config_free(&c);
    }
}

static void recipe_seeds(FuzzSeed *take) {
    static const char *const name[] = {"emoji",    "photos", "ffhq",     "ffhq2",    "churches",
                                       "bedrooms", "cats",   "imagenet", "imagenet4"};
    fuzz_take_file(take, "tiny", "test/tiny.txt");
    for (size_t i = 0; i < sizeof name / sizeof *name; i++) {
        char path[64];
        snprintf(path, sizeof path, "models/%s.txt", name[i]);
        fuzz_take_file(take, name[i], path);
    }
}

/* ------------------------------------------------------------------------------------------------------------
 * Classes. Byte 0: length of a name that is looked for; byte 1: how many rows; the name; a list.
 * ---------------------------------------------------------------------------------------------------------- */

static void read_classes(const uint8_t *bytes, size_t n) {
    char wanted[64], title[CLASS_TITLE_BYTES];
    Config c = {0};
    Classes x = {0};
    int32_t label = -7;
    if (n < 3) return;
    size_t length = bytes[0] % 40;
    if (length > n - 2) length = n - 2;
    memcpy(wanted, bytes + 2, length), wanted[length] = 0;
    fuzz_put("classes.txt", "", 0, bytes + 2 + length, n - 2 - length);
    MUST(config_set(&c, "imagebart.class_list", "%s", "classes.txt") == OK);
    answered(classes_from_recipe(&c, fuzz_path("recipe.txt")));
    if (answered(classes_open(&x, config_get(&c, "imagebart.", "classes"), 1 + bytes[1] * 4u)) == OK) {
        if (answered(classes_find(&x, wanted, &label)) == OK) MUST(label >= 0 && (size_t)label < x.n);
        classes_named(&x, wanted, &label);
        for (size_t i = 0; i < x.n; i++) class_title(title, &x, i);
        answered(classes_from_folders(&c, x.name, x.n));
    }
    classes_free(&x);
    config_free(&c);
}

static void class_seeds(FuzzSeed *take) {
    static const char list[] = "\4\1fishn01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n"
                               "hot dog, mustard\n\xc3\xa9t\xc3\xa9\nfish\n";
    static const char commas[] = "\3\1catcat,dog, a bird\n";
    take("lines", list, sizeof list - 1);
    take("commas", commas, sizeof commas - 1);
}

/* ------------------------------------------------------------------------------------------------------------
 * Schedules. Byte 0: T; byte 1: what the rest is: a metric curve's file, or a redraw_prob.
 * ---------------------------------------------------------------------------------------------------------- */

static void read_schedule(const uint8_t *bytes, size_t n) {
    Schedule s;
    if (n < 2) return;
    const int T = 1 + bytes[0] % MAX_SCALES;
    char *text = malloc(n + 600);
    MUST(text);
    if (bytes[1] & 1)
        snprintf(text, n + 600, "curve:%s", fuzz_put("curve", "", 0, bytes + 2, n - 2));
    else
        snprintf(text, n + 600, "%s%.*s", bytes[1] & 2 ? "alphacum:" : "", (int)n - 2, (const char *)bytes + 2);
    if (answered(schedule_make(&s, text, T)) == OK)
        for (int t = 1; t <= T; t++) MUST(s.beta[t] >= 0 && s.beta[t] <= 1 && isfinite(s.alphacum[t]));
    free(text);
}

#define TAKE(name, text) take(name, text, sizeof(text) - 1)
static void schedule_seeds(FuzzSeed *take) {
    TAKE("number", "\2\0.3");
    TAKE("geometric", "\2\0geometric");
    TAKE("psim", "\2\0bernoulli_PSIM");
    TAKE("alphacum", "\2\0021,0.7,0.2,0");
    TAKE("curve", "\3\0010 1\n0.25 0.9\n0.5 0.6\n0.75 0.2\n1 0\n");
}

/* ------------------------------------------------------------------------------------------------------------
 * LMDBs: names, and every value
 * ---------------------------------------------------------------------------------------------------------- */

#ifdef HAVE_LMDB
typedef struct {
    char name[32][LMDB_NAME_BYTES];
    size_t n;
} Keys;

static Err take_key(void *context, const char *name, size_t bytes) {
    Keys *k = context;
    (void)bytes;
    if (k->n < 32) snprintf(k->name[k->n++], LMDB_NAME_BYTES, "%s", name);
    return OK;
}

static void read_lmdb(const uint8_t *bytes, size_t n) {
    static Keys keys;
    Lmdb *x = NULL;
    keys.n = 0;
    if (answered(lmdb_open(&x, fuzz_put("data.mdb", "", 0, bytes, n))) != OK) return;
    answered(lmdb_names(x, take_key, &keys));
    for (size_t i = 0; i < keys.n; i++) {
        uint8_t *value;
        size_t size, sum = 0;
        if (answered(lmdb_value(x, keys.name[i], &value, &size)) != OK) continue;
        for (size_t k = 0; k < size; k++) sum += value[k];
        MUST(sum <= 255 * size);
        free(value);
    }
    lmdb_close(x);
}

/* The fixed parts of the two pages at the beginning are right again, mostly: else no tree is looked at. */
static size_t mend_lmdb(uint8_t *bytes, size_t n, size_t most, unsigned seed) {
    enum { PAGE = 4096, NUMBER = 2 };
    (void)most;
    if (n < 3 * PAGE) return n;
    for (size_t page = 0; page < 2; page++) {
        uint8_t *p = bytes + page * PAGE;
        const uint32_t magic = 0xBEEFC0DE, version = 1;
        memset(p, 0, 16), p[0] = (uint8_t)page, p[10] = 8; /* number, the flag of such a page */
        memcpy(p + 16, &magic, 4), memcpy(p + 20, &version, 4);
    }
    if (seed & 64) { /* a word of a tree's page is a small number, as most are */
        const size_t at = 2 * PAGE + (seed >> 8) % (n - 2 * PAGE - NUMBER) / 2 * 2;
        bytes[at] = (uint8_t)(seed >> 20) % 64, bytes[at + 1] = 0;
    }
    return n;
}

static void make_lmdb(FuzzSeed *take, const char *name, int n, size_t bytes) {
    MDB_env *env;
    MDB_txn *txn;
    MDB_dbi dbi;
    static uint8_t value[8192];
    char key[32];
    remove(fuzz_path("made.mdb"));
    MUST(!mdb_env_create(&env) && !mdb_env_set_mapsize(env, 1 << 22));
    MUST(!mdb_env_open(env, fuzz_path("made.mdb"), MDB_NOSUBDIR | MDB_NOSYNC | MDB_NOLOCK, 0600));
    MUST(!mdb_txn_begin(env, NULL, 0, &txn) && !mdb_dbi_open(txn, NULL, 0, &dbi));
    for (int i = 0; i < n; i++) {
        snprintf(key, sizeof key, "%05d", i * 7919 % 100000);
        MDB_val k = {strlen(key), key}, v = {i % 5 ? 20 : bytes, value};
        MUST(!mdb_put(txn, dbi, &k, &v, 0));
    }
    MUST(!mdb_txn_commit(txn));
    mdb_env_close(env);
    fuzz_take_file(take, name, fuzz_path("made.mdb"));
}

static void lmdb_seeds(FuzzSeed *take) {
    make_lmdb(take, "empty", 0, 0);
    make_lmdb(take, "three", 3, 100);
    make_lmdb(take, "large", 3, 6000);
    make_lmdb(take, "tree", 300, 40);
}
#endif

const FuzzTarget fuzz_file_targets[] = {
    {"zip", read_whole, zip_seeds, NULL},
    {"npy", read_npy, npy_seeds, NULL},
    {"pickle", read_pickle, pickle_seeds, NULL},
    {"legacy", read_whole, legacy_seeds, NULL},
    {"safetensors", read_whole, safetensors_seeds, NULL},
    {"pictures", read_picture, picture_seeds, mend_picture},
    {"masks", read_mask, mask_seeds, mend_picture},
    {"tokens", read_tokens, token_seeds, NULL},
    {"recipes", read_recipe, recipe_seeds, NULL},
    {"classes", read_classes, class_seeds, NULL},
    {"schedules", read_schedule, schedule_seeds, NULL},
#ifdef HAVE_LMDB
    {"lmdb", read_lmdb, lmdb_seeds, mend_lmdb},
#endif
    {NULL, NULL, NULL, NULL},
};
