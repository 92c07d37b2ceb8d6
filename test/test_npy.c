/* test_npy.c - arrays of NumPy: every version, type and byte order; headers as NumPy writes them and as nobody does;
 * the codes that a file lists as tokens. */
#include "test.h"

#include <unistd.h>

static char folder[FOLDER_BYTES], path[FOLDER_BYTES + 32];

typedef struct {
    int version;        /* 1 to 3 */
    const char *descr;  /* "<i8" */
    const char *header; /* NULL: as NumPy writes it */
    size_t n, bytes;    /* numbers; bytes of them that are there, SIZE_MAX: all */
} Made;

static void put_number(FILE *f, int64_t x, const char *descr) {
    const int width = descr[2] - '0', big = descr[0] == '>';
    for (int i = 0; i < width; i++) fputc((int)((uint64_t)x >> 8 * (big ? width - 1 - i : i) & 255), f);
}

static void make(const Made *m, const int64_t *numbers) {
    char header[256];
    FILE *f = fopen(path, "wb");
    if (!CHECK(f)) return;
    if (m->header)
        snprintf(header, sizeof header, "%s", m->header);
    else
        snprintf(header, sizeof header, "{'descr': '%s', 'fortran_order': False, 'shape': (%zu,), }", m->descr, m->n);
    const int width = m->version > 1 ? 4 : 2;
    const size_t front = 8 + (size_t)width, length = strlen(header), padded = (front + length + 64) / 64 * 64 - front;
    fprintf(f, "\x93NUMPY%c%c", m->version, 0);
    for (int i = 0; i < width; i++) fputc((int)(padded >> 8 * i & 255), f);
    fprintf(f, "%s%*s\n", header, (int)(padded - length - 1), "");
    for (size_t i = 0; i < m->n; i++) put_number(f, numbers[i], m->descr);
    CHECK(fclose(f) == 0);
    if (m->bytes != SIZE_MAX) CHECK(truncate(path, (off_t)(front + padded + m->bytes)) == 0);
}

static const int64_t few[] = {0, 1, 258, 1023, -2, 32767, -32768};
enum { FEW = sizeof few / sizeof *few };

static void test_types(void) {
    static const char *const types[] = {"<i2", ">i2", "<i4", ">i4", "<i8", ">i8"};
    int64_t *x;
    size_t n;
    for (int version = 1; version <= 3; version++)
        for (int t = 0; t < 6; t++) {
            make(&(Made){version, types[t], NULL, FEW, SIZE_MAX}, few);
            CHECK_OK(npy_read(&x, &n, path, FEW));
            CHECK(n == FEW && memcmp(x, few, sizeof few) == 0);
            free(x);
            CHECK_ERR(npy_read(&x, &n, path, FEW - 1), "has 7 numbers, expected 1 to 6");
            CHECK(!x && strstr(err_text(), path) == err_text());
            make(&(Made){version, types[t], NULL, FEW, FEW * (size_t)(types[t][2] - '0') - 1}, few);
            CHECK(npy_read(&x, &n, path, FEW) == DAMAGED && strstr(err_text(), "bytes of numbers, expected 7 of"));
        }
    const int64_t far[] = {INT64_MAX, INT64_MIN, -1};
    make(&(Made){1, ">i8", NULL, 3, SIZE_MAX}, far);
    CHECK_OK(npy_read(&x, &n, path, 3));
    CHECK(n == 3 && memcmp(x, far, sizeof far) == 0);
    free(x);
}

static void test_headers(void) {
    static const char *const good[] = {"{'descr': '<i2', 'fortran_order': True, 'shape': (3,), }",
                                       "{'shape': (3L,), 'descr': '<i2', 'fortran_order': False}",
                                       "{\"descr\":\"<i2\",\"fortran_order\":False,\"shape\":(3,)}",
                                       " { 'descr' : '<i2' , 'fortran_order' : False , 'shape' : ( 3 , ) } "};
    static const struct {
        const char *header, *error;
    } bad[] = {
        {"{'descr': '<i2', 'fortran_order': False, 'shape': (3, 1), }", "has 2 dimensions, expected 1"},
        {"{'descr': '<i2', 'fortran_order': False, 'shape': (), }", "has 0 dimensions"},
        {"{'descr': '<i2', 'fortran_order': False, 'shape': (0,), }", "has 0 numbers"},
        {"{'descr': '<i2', 'fortran_order': False, 'shape': (4,), }", "has 6 bytes of numbers, expected 4 of 2"},
        {"{'descr': '<i2', 'fortran_order': False, 'shape': (2,), }", "has 6 bytes of numbers, expected 2 of 2"},
        {"{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }", "type '<f8', expected whole ones"},
        {"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }", "type '|O', expected whole ones"},
        {"{'descr': '<i1', 'fortran_order': False, 'shape': (3,), }", "type '<i1', expected whole ones"},
        {"{'descr': '<i22', 'fortran_order': False, 'shape': (3,), }", "type '<i22', expected whole ones"},
        {"{'descr': '<i', 'fortran_order': False, 'shape': (3,), }", "type '<i', expected whole ones"},
        {"{'descr': [('a', '<i2')], 'fortran_order': False, 'shape': (3,), }", "whose header is not"},
        {"{'descr': '<i2', 'fortran_order': False, 'shape': (3), }", "whose header is not"},
        {"{'descr': '<i2', 'fortran_order': False, 'shape': (-3,), }", "whose header is not"},
        {"{'descr': '<i2', 'fortran_order': False, 'shape': (99999999999999999999999,), }", "whose header is not"},
        {"{'descr': '<i2', 'fortran_order': 0, 'shape': (3,), }", "whose header is not"},
        {"{'descr': '<i2', 'fortran_order': False, }", "whose header is not"},
        {"{'descr': '<i2', 'descr': '<i2', 'fortran_order': False, 'shape': (3,), }", "whose header is not"},
        {"{'descr': '<i2', 'fortran_order': False, 'shape': (3,), 'x': True, }", "whose header is not"},
        {"{'descr': '<i2', 'fortran_order': False, 'shape': (3,), } x", "whose header is not"},
        {"{'descr': '<i2', 'fortran_order': False, 'shape': (3,", "whose header is not"},
        {"{'descr': '<i2'  'fortran_order': False, 'shape': (3,), }", "whose header is not"},
        {"{'descr': '0123456789abcdefghijkl', 'fortran_order': False, 'shape': (3,), }", "whose header is not"},
        {"{'descr: '<i2', 'fortran_order': False, 'shape': (3,), }", "whose header is not"},
        {"", "whose header is not"},
        {"{}", "whose header is not"},
    };
    int64_t *x;
    size_t n;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        make(&(Made){1, "<i2", good[i], 3, SIZE_MAX}, few);
        CHECK_OK(npy_read(&x, &n, path, FEW));
        CHECK(n == 3 && memcmp(x, few, 3 * sizeof *few) == 0);
        free(x);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        make(&(Made){1, "<i2", bad[i].header, 3, SIZE_MAX}, few);
        CHECK(npy_read(&x, &n, path, FEW) == DAMAGED && strstr(err_text(), bad[i].error));
        CHECK(!x && n == 0);
    }
}

/* What lies in front of the header; a file that ends anywhere */
static void test_fronts(void) {
    static const struct {
        const char *bytes;
        size_t n;
        const char *error;
    } front[] = {{"\x93NUMPX\1\0\2\0{}", 12, "is no .npy file"},
                 {"\x93NUMPY\0\0\2\0{}", 12, "of version 0, expected 1 to 3"},
                 {"\x93NUMPY\4\0\2\0\0\0{}", 14, "of version 4, expected 1 to 3"},
                 {"\x93NUMPY\1\0\377\377{}", 12, "ends in its header"},
                 {"\x93NUMPY\2\0\2\0", 10, "ends in its header"},
                 {"\x93NUMPY\2\0\377\377\377\377{}", 14, "ends in its header"}};
    char *long_one = calloc(1, 20100);
    int64_t *x;
    size_t n;
    for (size_t i = 0; i < sizeof front / sizeof *front; i++) {
        FILE *f = fopen(path, "wb");
        CHECK(f && fwrite(front[i].bytes, 1, front[i].n, f) == front[i].n && fclose(f) == 0);
        CHECK_ERR(npy_read(&x, &n, path, 2000), front[i].error);
    }
    memset(long_one, ' ', 20100);
    memcpy(long_one, "\x93NUMPY\1\0\x20\x4e", 10); /* 20000 bytes */
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(long_one, 1, 20100, f) == 20100 && fclose(f) == 0);
    CHECK_ERR(npy_read(&x, &n, path, 2000), "a header of 20000 bytes, expected at most 10000");
    CHECK_ERR(npy_read(&x, &n, path, 1000), "has 20100 bytes; at most"); /* more than there can be */
    for (off_t cut = 0; cut < 128; cut++) {
        make(&(Made){1, "<i8", NULL, FEW, SIZE_MAX}, few);
        CHECK(truncate(path, cut) == 0);
        CHECK_ERR(npy_read(&x, &n, path, FEW), path);
    }
    CHECK_ERR(npy_read(&x, &n, "/dev/zero", FEW), "is a device");
    free(long_one);
}

/* A first stage whose file has no quantize.used numbers the codes of the .npy that its configuration names. */
static void test_codes(void) {
    static const int64_t codes[] = {9, 3, 7, 3}, outside[] = {9, 16}, negative[] = {-1};
    VqganConfig c = {.n_embed = 16, .re_embed = 4};
    Remap r;
    int64_t *used;
    size_t n, repeated;
    snprintf(c.remap, sizeof c.remap, "%s", path);
    make(&(Made){1, "<i8", NULL, 4, SIZE_MAX}, codes);
    CHECK_OK(remap_file(&used, &n, path, 16));
    CHECK_OK(remap_repeated(&repeated, used, n, 16));
    CHECK(repeated == 1);
    CHECK_OK(remap_repeated(&repeated, used, 3, 16));
    CHECK(repeated == 0);
    free(used);
    CHECK_OK(remap_make(&r, &c));
    CHECK(remap_K(&r) == 4 && r.used[0] == 9 && r.used[3] == 3);
    CHECK(r.inverse[9] == 0 && r.inverse[3] == 1 && r.inverse[7] == 2 && r.inverse[0] == -1); /* the first of two */
    CHECK_OK(remap_load(&r, &(Checkpoint){0}, ""));
    CHECK(r.used[0] == 9);
    remap_free(&r);
    c.re_embed = 3;
    CHECK_ERR(remap_make(&r, &c), "has 4 codes");
    remap_free(&r);
    make(&(Made){1, "<i4", NULL, 2, SIZE_MAX}, outside);
    CHECK(remap_file(&used, &n, path, 16) == DAMAGED && strstr(err_text(), "number 1 is 16, expected a code, 0..15"));
    make(&(Made){1, "<i4", NULL, 1, SIZE_MAX}, negative);
    CHECK(remap_file(&used, &n, path, 16) == DAMAGED && strstr(err_text(), "number 0 is -1, expected a code"));
}

int main(void) {
    if (!CHECK(temporary_folder(folder))) return test_report();
    snprintf(path, sizeof path, "%s/x.npy", folder);
    test_types();
    test_headers();
    test_fronts();
    test_codes();
    CHECK(unlink(path) == 0 && rmdir(folder) == 0);
    return test_report();
}
