/* test_checkpoint.c - configurations, safetensors in and out, hostile files, atomic writes, parameter tables.
 *
 *     test_checkpoint [FOLDER]   opens every safetensors file and config.txt of the golden cases (test/golden-cases)
 *
 * Allocations can be made to fail: aligned_alloc, which mem_alloc stands on, is replaced below. */
#include "test.h"
#include "test/inside.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static char folder[FOLDER_BYTES]; /* everything is written below it */
static size_t skipped;

/* Root could replace a device by a file, if the code under test were wrong, and write into any folder. So those tests
 * run as nobody. 0: that cannot be done here. */
static int as_nobody(void) {
    return geteuid() != 0 || seteuid(65534) == 0;
}
static void as_before(void) {
    CHECK(geteuid() == getuid() || seteuid(getuid()) == 0);
}

/* The fail_at-th allocation from now on fails; 0: none. */
static size_t fail_at;
void *aligned_alloc(size_t alignment, size_t size) {
    void *p = NULL;
    if (fail_at && --fail_at == 0) return NULL;
    return posix_memalign(&p, alignment, size) == 0 ? p : NULL;
}

static const char *in_folder(const char *name) {
    static char path[8][256];
    static int next;
    char *p = path[next++ % 8];
    snprintf(p, sizeof path[0], "%s/%s", folder, name);
    return p;
}

static void put_file(const char *path, const void *data, size_t n) {
    unlink(path); /* much faster than truncating what was there */
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, n, f) != n || fclose(f) != 0) CHECK(!"a test file can be written");
}

static char *get_file(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    char *data = (char *)malloc(1 << 22);
    *n = f && data ? fread(data, 1, 1 << 22, f) : 0;
    if (f) fclose(f);
    return data;
}

static int same_files(const char *a, const char *b) {
    size_t na, nb;
    char *da = get_file(a, &na), *db = get_file(b, &nb);
    int same = na > 0 && na == nb && memcmp(da, db, na) == 0;
    free(da);
    free(db);
    return same;
}

/* Files in a folder: no temporary may stay behind. */
static size_t count_files(const char *path) {
    size_t n = 0;
    DIR *d = opendir(path);
    for (struct dirent *e; d && (e = readdir(d));) n += e->d_name[0] != '.';
    if (d) closedir(d);
    return n;
}

static void remove_all(const char *path) {
    DIR *d = opendir(path);
    char name[600];
    for (struct dirent *e; d && (e = readdir(d));) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        snprintf(name, sizeof name, "%s/%s", path, e->d_name);
        if (unlink(name) != 0) remove_all(name);
    }
    if (d) closedir(d);
    rmdir(path);
}

/* A safetensors file with this header, `extra` added to its true length, and n bytes of data 0,1,2,... */
static const char *put_safetensors(const char *header, uint64_t extra, size_t n) {
    static char file[1 << 22];
    uint64_t length = strlen(header), written = length + extra;
    memcpy(file, &written, 8);
    memcpy(file + 8, header, length);
    for (size_t i = 0; i < n; i++) file[8 + length + i] = (char)i;
    put_file(in_folder("hostile.safetensors"), file, 8 + length + n);
    return in_folder("hostile.safetensors");
}

/* ---- configurations ---- */

/* A value that cannot be is told by its file, its line and its key as it is written there; so is one of a recipe's part,
 * and one of metadata by its file. */
static void test_config_places(void) {
    static const char recipe[] = "# one\nscale.model.params.n_scales 2\nvqgan.model.params.embed_dim sixteen\r\n"
                                 "vqgan.model.params.ddconfig.double_z yes\nscale.model.params.use_ema 7\n"
                                 "vqgan.train.steps many\nscale.data.prep no\nvqgan.model.params.ddconfig.ch_mult 1,x\n"
                                 "scale.model.params.alpha 2\nscale.train.flip maybe\n";
    Config c = {0}, d = {0};
    size_t n;
    double x;
    int flag;
    Prep prep;
    put_file(in_folder("r.txt"), recipe, strlen(recipe));
    CHECK_OK(recipe_read(&c, in_folder("r.txt"), 1));
    CHECK_ERR(config_real(&x, &c, "model.params.", "alpha", 0, 1, 0),
              "r.txt: line 9: configuration key 'scale.model.params.alpha' is '2', expected a number from 0 to 1");
    CHECK_ERR(config_flag(&flag, &c, "model.params.", "use_ema", 0),
              "r.txt: line 5: configuration key 'scale.model.params.use_ema' is '7', expected true or false");
    CHECK_ERR(config_flag(&flag, &c, "", "train.flip", 0), "r.txt: line 10: configuration key 'scale.train.flip'");
    CHECK_ERR(prep_read(&prep, &c), "r.txt: line 7: data.prep no: expected");
    CHECK_ERR(config_size(&n, &c, "model.", "nothing", 0, 1, 0), "r.txt: no configuration key 'model.nothing'");
    CHECK_ERR(recipe_read(&d, in_folder("r.txt"), 5), "r.txt: scale 5: this model has");
    config_free(&c);
    config_free(&d);
    CHECK(strncmp(err_text(), in_folder("r.txt"), strlen(in_folder("r.txt"))) == 0);
}

static void test_config_places_copied(void) {
    static const char header[] = "{\"__metadata__\":{\"model.params.embed_dim\":\"sixteen\"}}";
    static const char lines[] = "a.size 1\na.size2 x\nlist 1,x\n";
    Config c = {0}, d = {0};
    Checkpoint ck;
    size_t n, list[4];
    double x[4];
    put_file(in_folder("l.txt"), lines, strlen(lines));
    CHECK_OK(config_read(&c, in_folder("l.txt")));
    CHECK_ERR(config_size(&n, &c, "a.", "size2", 0, 1, 0), "l.txt: line 2: configuration key 'a.size2' is 'x'");
    CHECK_ERR(config_list(list, &n, 4, &c, "", "list", 0), "l.txt: line 3: configuration key 'list' is '1,x'");
    CHECK_ERR(config_reals(x, &n, 4, &c, "", "list", 0, 1), "l.txt: line 3: configuration key 'list' is '1,x'");
    for (size_t i = 0; i < c.n; i++) CHECK_OK(config_copy(&d, c.kv[i].key, &c.kv[i]));
    CHECK_OK(config_set(&c, "a.size2", "y")); /* by an option: in no file */
    CHECK_ERR(config_size(&n, &c, "a.", "size2", 0, 1, 0), "configuration key 'a.size2' is 'y'");
    CHECK(!strstr(err_text(), "l.txt"));
    config_free(&c);
    CHECK_ERR(config_size(&n, &d, "a.", "size2", 0, 1, 0), "l.txt: line 2: configuration key 'a.size2' is 'x'");
    config_free(&d);
    CHECK_OK(checkpoint_open(&ck, put_safetensors(header, 0, 0)));
    CHECK_ERR(config_size(&n, &ck.meta, "model.params.", "embed_dim", 1, 9, 0),
              "hostile.safetensors: configuration key 'model.params.embed_dim' is 'sixteen'");
    checkpoint_close(&ck);
}

static void test_config_values(void) {
    Config c = {0};
    size_t n = 77, list[4];
    double x = 7;
    int flag = 7;
    CHECK_OK(config_set(&c, "model.dim", "%d", 32));
    CHECK_OK(config_set(&c, "model.mult", "1,1, 2,4"));
    CHECK_OK(config_set(&c, "model.none", "-"));
    CHECK_OK(config_set(&c, "model.lr", "%s", "2.5e-06"));
    CHECK_OK(config_set(&c, "model.on", "true"));
    CHECK_OK(config_set(&c, "model.text", "a b, c"));
    CHECK(c.n == 6 && config_get(&c, "model.", "dim") && !strcmp(config_get(&c, "", "model.text"), "a b, c"));
    CHECK(!config_get(&c, "model.", "di") && !config_get(&c, "model", "dim") && !config_get(&c, "", "dim"));
    CHECK_OK(config_set(&c, "model.dim", "%s%s", config_get(&c, NULL, "model.dim"), "1")); /* from its own old value */
    CHECK_OK(config_size(&n, &c, "model.", "dim", 1, 321, 0));
    CHECK(n == 321 && c.n == 6);
    CHECK_ERR(config_size(&n, &c, "model.", "dim", 1, 320, 0), "'model.dim' is '321', expected a whole number from 1");
    CHECK_ERR(config_size(&n, &c, "model.", "dim", 322, 400, 0), "model.dim");
    CHECK_ERR(config_size(&n, &c, "model.", "text", 0, 400, 1), "model.text");
    CHECK_ERR(config_size(&n, &c, "model.", "lr", 0, 400, 1), "2.5e-06");
    CHECK_ERR(config_size(&n, &c, "model.", "depth", 0, 400, 0), "no configuration key 'model.depth'");
    CHECK_OK(config_size(&n, &c, "model.", "depth", 0, 400, 1));
    CHECK(n == 321);
    CHECK_OK(config_real(&x, &c, "model.", "lr", 0, 1, 0));
    CHECK(x == 2.5e-6);
    CHECK_ERR(config_real(&x, &c, "model.", "lr", 1, 2, 0), "expected a number from 1 to 2");
    CHECK_ERR(config_real(&x, &c, "model.", "text", 0, 1, 0), "model.text");
    CHECK_OK(config_set(&c, "nan", "nan"));
    CHECK_ERR(config_real(&x, &c, "", "nan", -1e300, 1e300, 0), "nan");
    CHECK_OK(config_flag(&flag, &c, "model.", "on", 0));
    CHECK(flag == 1);
    CHECK_ERR(config_flag(&flag, &c, "model.", "dim", 0), "true or false");
    CHECK_OK(config_list(list, &n, 4, &c, "model.", "mult", 0));
    CHECK(n == 4 && list[0] == 1 && list[2] == 2 && list[3] == 4);
    CHECK_ERR(config_list(list, &n, 3, &c, "model.", "mult", 0), "at most 3");
    CHECK_OK(config_list(list, &n, 4, &c, "model.", "none", 0));
    CHECK(n == 0);
    CHECK_OK(config_set(&c, "model.mult", "[ 1, 2,3 ]"));
    CHECK_OK(config_list(list, &n, 4, &c, "model.", "mult", 0));
    CHECK(n == 3 && list[0] == 1 && list[2] == 3);
    CHECK_OK(config_set(&c, "model.none", "[]"));
    CHECK_OK(config_list(list, &n, 4, &c, "model.", "none", 0));
    CHECK(n == 0);
    CHECK_OK(config_set(&c, "model.on", "False"));
    CHECK_OK(config_flag(&flag, &c, "model.", "on", 0));
    CHECK(flag == 0);
    static const char *const bad[] = {"",   "1,", ",1", "1,,2", "1 2",  "-1",   "0x1", "1.5", "18446744073709551616",
                                      "[1", "1]", "[",  "]",    "[1,]", "[1]2", "--",  "[-]"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        CHECK_OK(config_set(&c, "bad", "%s", bad[i]));
        CHECK_ERR(config_list(list, &n, 4, &c, "", "bad", 0), "expected at most 4 whole numbers");
        CHECK_ERR(config_size(&n, &c, "", "bad", 0, SIZE_MAX, 0), "expected a whole number");
    }
    CHECK_OK(config_set(&c, "bad", "%s", "18446744073709551615"));
    CHECK_OK(config_size(&n, &c, "", "bad", 0, SIZE_MAX, 0));
    CHECK(n == UINT64_MAX);
    config_free(&c);
    CHECK(c.n == 0 && c.kv == NULL);
}

/* A byte-order mark is left out; many keys take no long time, too many bytes are refused. */
static void test_config_bounds(void) {
    enum { KEYS = 40000 };
    Config c = {0};
    const char *path = in_folder("many.txt");
    put_file(path,
             "\xEF\xBB\xBF"
             "a 1\n",
             7);
    CHECK_OK(config_read(&c, path));
    CHECK(c.n == 1 && config_get(&c, "", "a"));
    FILE *f = fopen(path, "w");
    for (int i = 0; f && i < KEYS; i++) fprintf(f, "key.number.%d %d\n", i, i);
    CHECK(f && fclose(f) == 0);
    config_free(&c);
    const double started = seconds();
    CHECK_OK(config_read(&c, path));
    CHECK(c.n == KEYS && !strcmp(c.kv[KEYS - 1].value, "39999"));
    CHECK(seconds() - started < 1);
    config_free(&c);
    CHECK(truncate(path, 2 << 20) == 0);
    CHECK_ERR(config_read(&c, path), "at most 1048576 are read");
}

static void test_config_file(void) {
    static const struct {
        const char *text;
        size_t bytes;
        const char *error;
    } bad[] = {{"a 1\nb\n", 6, "line 2: 'b' has no value"},
               {"a 1\nb 2\na 3", 11, "line 3: second value for 'a'"},
               {"a 1\0\nb 2\n", 9, "holds zero bytes"},
               {"a 1\n\n# x\n  b  \n", 15, "line 4: 'b' has no value"}};
    Config c = {0};
    const char *path = in_folder("config.txt"),
               *text = "# comment\nmodel.ch_mult 1,1,2\r\n\n  x.y \t two words, and more  \nlast -";
    put_file(path, text, strlen(text));
    CHECK_OK(config_set(&c, "last", "old"));
    CHECK_OK(config_read(&c, path));
    CHECK(c.n == 3 && !strcmp(config_get(&c, "model.", "ch_mult"), "1,1,2"));
    CHECK(!strcmp(config_get(&c, "", "x.y"), "two words, and more") && !strcmp(config_get(&c, "", "last"), "-"));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        Config d = {0};
        put_file(path, bad[i].text, bad[i].bytes);
        CHECK_ERR(config_read(&d, path), bad[i].error);
        CHECK(strstr(err_text(), path) == err_text());
        config_free(&d);
    }
    CHECK_ERR(config_read(&c, in_folder("nothing.txt")), "No such file");
    CHECK_ERR(config_read(&c, folder), "is a folder");
    CHECK_ERR(config_read(&c, "/dev/zero"), "/dev/zero: is a device or a pipe");
    CHECK(mkfifo(in_folder("pipe"), 0600) == 0);
    CHECK_ERR(config_read(&c, in_folder("pipe")), "is a device or a pipe");
    test_config_bounds();
    config_free(&c);
}

/* ---- round trips ---- */

enum { ELEMENTS = 6 };
static const double f64[] = {0.1, -2, 1e300, 3, 4, 5};
static const float f32[] = {0.1f, -2, 1e30f, 3, 4, 5};
static const uint16_t f16[] = {0x3c00, 0xc000, 0x7bff, 0x0001, 0x8000, 0x3555};  /* 1 -2 65504 2^-24 -0 0.333 */
static const uint16_t bf16[] = {0x3f80, 0xc000, 0x7f7f, 0x0001, 0x8000, 0x3eab}; /* 1 -2 3.39e38 2^-133 -0 0.334 */
static const int64_t i64[] = {1, -2, INT32_MAX, INT32_MIN, 0, 1 << 20};
static const int32_t i32[] = {1, -2, INT32_MAX, INT32_MIN, 0, 1 << 20};
static const int16_t i16[] = {1, -2, INT16_MAX, INT16_MIN, 0, 300};
static const int8_t i8[] = {1, -2, 127, -128, 0, 30};
static const uint8_t u8[] = {1, 2, 255, 128, 0, 30}, boolean[] = {0, 1, 1, 0, 0, 1};
static const uint64_t u64[] = {1, 2, UINT64_C(1) << 63, 0, 5, 6};
static const uint32_t u32[] = {1, 2, UINT32_MAX, 0, 5, 6};
static const uint16_t u16[] = {1, 2, UINT16_MAX, 0, 5, 6};
static const struct {
    Dtype dtype;
    const void *data;
} kinds[DT_NUMBERS] = {{DT_BOOL, boolean}, {DT_F16, f16}, {DT_F64, f64}, {DT_I8, i8},   {DT_F32, f32},
                       {DT_U8, u8},        {DT_I16, i16}, {DT_I64, i64}, {DT_I32, i32}, {DT_BF16, bf16},
                       {DT_U16, u16},      {DT_U64, u64}, {DT_U32, u32}};

/* Every dtype as (2,3), a scalar, an empty tensor and one of eight dimensions */
static void make_list(TensorList *list) {
    static const size_t two[] = {2, 3}, eight[] = {1, 1, 2, 1, 3, 1, 1, 1}, empty[] = {3, 0, 2};
    for (int k = 0; k < DT_NUMBERS; k++)
        CHECK_OK(tensor_list_add(list, dtype_name(kinds[k].dtype), kinds[k].dtype, 2, two, kinds[k].data, 0));
    CHECK_OK(tensor_list_add(list, "scalar", DT_I16, 0, NULL, i16, 0));
    CHECK_OK(tensor_list_add(list, "empty", DT_F64, 3, empty, NULL, 0));
    CHECK_OK(tensor_list_add(list, "eight \"\\\t\303\251", DT_U8, 8, eight, u8, 0));
}

static void check_values(const Checkpoint *ck) {
    static const double expected[DT_NUMBERS][ELEMENTS] = {
        {0.1, -2, 1e300, 3, 4, 5},
        {0.1f, -2, 1e30f, 3, 4, 5},
        {1, -2, 65504, 1.0 / 16777216, -0.0, 1365.0 / 4096},
        {1, -2, 3.3895313892515355e38, 9.183549615799121e-41, -0.0, 171.0 / 512},
        {1, -2, INT32_MAX, INT32_MIN, 0, 1 << 20},
        {1, -2, INT32_MAX, INT32_MIN, 0, 1 << 20},
        {1, -2, INT16_MAX, INT16_MIN, 0, 300},
        {1, -2, 127, -128, 0, 30},
        {1, 2, 255, 128, 0, 30},
        {0, 1, 1, 0, 0, 1},
        {1, 2, 9223372036854775808.0, 0, 5, 6},
        {1, 2, UINT32_MAX, 0, 5, 6},
        {1, 2, UINT16_MAX, 0, 5, 6}};
    const size_t dim[] = {2, 3};
    for (int d = 0; d < DT_NUMBERS; d++) {
        real out[ELEMENTS];
        CHECK_OK(checkpoint_reals(ck, dtype_name((Dtype)d), 2, dim, ELEMENTS, out));
        for (int i = 0; i < ELEMENTS; i++)
            CHECK(out[i] == (real)expected[d][i] && !signbit(out[i]) == !signbit(expected[d][i]));
    }
}

/* What is of a kind that nobody can read is passed over until it is asked for, and kept by whoever copies a file. */
static void test_other_kinds(void) {
    TensorList list = {0};
    Checkpoint ck;
    static const uint8_t bytes[64] = {7};
    const size_t eight = 8, three = 3;
    const char *path = in_folder("other.safetensors");
    CHECK_OK(tensor_list_add(&list, "numbers", DT_F32, 1, &three, f32, 0));
    for (int d = DT_NUMBERS; d < DT_SAFETENSORS; d++)
        CHECK_OK(tensor_list_add(&list, dtype_name((Dtype)d), (Dtype)d, 1, &eight, bytes, 0));
    CHECK_OK(checkpoint_write(path, list.tensor, NULL, list.n, NULL));
    CHECK_OK(checkpoint_open(&ck, path));
    CHECK(ck.n == list.n);
    for (int d = DT_NUMBERS; d < DT_SAFETENSORS; d++) {
        real out[8];
        int32_t whole[8];
        char says[64];
        const Tensor *x = checkpoint_find(&ck, dtype_name((Dtype)d));
        CHECK(x && x->dtype == (Dtype)d && tensor_bytes(x) == dtype_bits((Dtype)d));
        snprintf(says, sizeof says, "is %s, expected numbers", dtype_name((Dtype)d));
        CHECK_ERR(checkpoint_reals(&ck, dtype_name((Dtype)d), 1, &eight, 8, out), says);
        CHECK_ERR(checkpoint_ints(&ck, dtype_name((Dtype)d), 8, whole), "expected I64");
    }
    real numbers[3];
    CHECK_OK(checkpoint_reals(&ck, "numbers", 1, &three, 3, numbers));
    CHECK(numbers[1] == -2);
    checkpoint_close(&ck);
    tensor_list_free(&list);
    CHECK(tensor_bytes(&(Tensor){.dtype = DT_F4, .size = 6}) == 3);
    CHECK(tensor_bytes(&(Tensor){.dtype = DT_F6_E2M3, .size = 20}) == 15);
}

/* What wrappers of a network leave in the names */
static void test_wrapped_names(void) {
    static const char *const names[][2] = {{"module.transformer.a.weight", "transformer.a.weight"},
                                           {"_orig_mod.transformer.b.weight", "transformer.b.weight"},
                                           {"module._orig_mod.transformer.c", "transformer.c"},
                                           {"transformer._orig_mod.blocks.0.d", "transformer.blocks.0.d"},
                                           {"transformer.module.e", "transformer.e"},
                                           {"transformer_ema._orig_modblocks0f", "transformer_ema.blocks0f"},
                                           {"transformer_ema.modulepos_emb", "transformer_ema.pos_emb"},
                                           {"transformer_ema.module_orig_modk", "transformer_ema.k"},
                                           {"transformer_ema._orig_modmodulel", "transformer_ema.l"},
                                           {"first_stage_model._orig_mod.encoder.g", "first_stage_model.encoder.g"},
                                           {"transformer.modules.h", "transformer.modules.h"},
                                           {"transformer.my_module.i", "transformer.my_module.i"},
                                           {"module", "module"}};
    enum { NAMES = sizeof names / sizeof *names };
    TensorList list = {0};
    Checkpoint ck;
    const char *path = in_folder("wrapped.safetensors");
    for (int i = 0; i < NAMES; i++) CHECK_OK(tensor_list_add(&list, names[i][0], DT_F32, 0, NULL, f32, 0));
    CHECK_OK(checkpoint_write(path, list.tensor, NULL, NAMES, NULL));
    CHECK_OK(checkpoint_open(&ck, path));
    for (int i = 0; i < NAMES; i++) CHECK(checkpoint_find(&ck, names[i][1]) != NULL);
    CHECK(strcmp(ck.wrapped, "_orig_mod.transformer.b.weight") == 0 || strcmp(ck.wrapped, names[0][0]) == 0);
    checkpoint_close(&ck);
    CHECK_OK(checkpoint_write(path, list.tensor + NAMES - 3, NULL, 3, NULL));
    CHECK_OK(checkpoint_open(&ck, path));
    CHECK(!*ck.wrapped);
    checkpoint_close(&ck);
    strcpy(list.tensor[1].name, "transformer.module.a.weight");
    CHECK_OK(checkpoint_write(path, list.tensor, NULL, 2, NULL));
    CHECK_ERR(checkpoint_open(&ck, path), "two tensors 'transformer.a.weight'");
    tensor_list_free(&list);
}

static void test_round_trip(void) {
    TensorList list = {0};
    Config meta = {0};
    Checkpoint ck;
    make_list(&list);
    const char *text = "quote \" backslash \\ newline \n bell \a e-acute \303\251 grin \360\237\230\200";
    CHECK_OK(config_set(&meta, "z.text", "%s", text));
    CHECK_OK(config_set(&meta, "a.empty", "%s", ""));
    const char *a = in_folder("a.safetensors"), *b = in_folder("b.safetensors");
    CHECK_OK(checkpoint_write(a, list.tensor, list.from_real, list.n, &meta));
    CHECK_OK(checkpoint_write(b, list.tensor, NULL, list.n, &meta));
    CHECK(same_files(a, b));
    CHECK_OK(config_set(&meta, "a.empty", " "));
    CHECK_OK(checkpoint_write(b, list.tensor, NULL, list.n, &meta));
    CHECK(!same_files(a, b)); /* the comparison can fail */

    CHECK_OK(checkpoint_open(&ck, a));
    CHECK(ck.n == list.n && ck.meta.n == 2 && !strcmp(config_get(&ck.meta, "z.", "text"), text));
    check_values(&ck);
    const Tensor *scalar = checkpoint_find(&ck, "scalar"), *empty = checkpoint_find(&ck, "empty");
    const Tensor *eight = checkpoint_find(&ck, "eight \"\\\t\303\251");
    CHECK(scalar && scalar->ndim == 0 && scalar->size == 1);
    CHECK(empty && empty->ndim == 3 && empty->dim[1] == 0 && empty->size == 0);
    CHECK(eight && eight->ndim == 8 && eight->dim[4] == 3 && eight->size == 6);
    for (size_t i = 0; i < ck.n; i++) {
        const Tensor *x = &ck.tensor[i];
        CHECK(checkpoint_find(&ck, x->name) == x && (uintptr_t)x->data % dtype_size(x->dtype) == 0);
    }
    CHECK(!checkpoint_find(&ck, "") && !checkpoint_find(&ck, "zz") && !checkpoint_find(&ck, "F3"));
    checkpoint_close(&ck);
    checkpoint_close(&ck);
    tensor_list_free(&list);
    config_free(&meta);
}

/* The bytes themselves: what other readers see does not change by accident. */
static void test_exact_bytes(void) {
    static const char expected[] =
        "length.." /* checked apart */
        "{\"__metadata__\":{\"k\":\"v\"},\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
        "\"a\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[4,5]}}"
        "\0\0\200\77\7";
    size_t one = 1, n;
    float f = 1;
    uint8_t u = 7;
    TensorList list = {0};
    Config meta = {0};
    CHECK_OK(config_set(&meta, "k", "v"));
    CHECK_OK(tensor_list_add(&list, "a", DT_U8, 0, NULL, &u, 0));
    CHECK_OK(tensor_list_add(&list, "b", DT_F32, 1, &one, &f, 0));
    CHECK_OK(checkpoint_write(in_folder("exact"), list.tensor, list.from_real, list.n, &meta));
    char *file = get_file(in_folder("exact"), &n);
    uint64_t length;
    memcpy(&length, file, 8);
    CHECK(length % 8 == 0 && n == 8 + length + 5);
    const char *brace = (const char *)memmem(file, n, "}}", 2);
    size_t end = brace ? (size_t)(brace + 2 - file) : 0;
    CHECK(end > 8 && end == sizeof expected - 6 && !memcmp(file + 8, expected + 8, end - 8));
    for (size_t i = end; i < 8 + length; i++) CHECK(file[i] == ' ');
    CHECK(n > 5 && !memcmp(file + n - 5, expected + sizeof expected - 6, 5));
    free(file);

    uint64_t checksum;
    put_file(in_folder("foobar"), "foobar", 6); /* a published FNV-1a test vector */
    CHECK_OK(file_checksum(&checksum, in_folder("foobar")));
    CHECK(checksum == UINT64_C(0x85944171f73967e8));
    put_file(in_folder("foobar"), "", 0);
    CHECK_OK(file_checksum(&checksum, in_folder("foobar")));
    CHECK(checksum == UINT64_C(0xcbf29ce484222325));
    CHECK_ERR(file_checksum(&checksum, in_folder("nothing")), "No such file");
    CHECK_ERR(file_checksum(&checksum, folder), "Is a directory");
    tensor_list_free(&list);
    config_free(&meta);
}

static void test_asking(void) {
    Checkpoint ck;
    TensorList list = {0};
    size_t two[] = {2, 3}, swapped[] = {3, 2};
    real out[ELEMENTS];
    int32_t ints[ELEMENTS];
    int64_t large[] = {0, INT64_C(1) << 31};
    make_list(&list);
    CHECK_OK(tensor_list_add(&list, "net.encoder.w", DT_F32, 2, two, f32, 0));
    CHECK_OK(tensor_list_add(&list, "large", DT_I64, 1, two, large, 0));
    CHECK_OK(checkpoint_write(in_folder("ask"), list.tensor, list.from_real, list.n, NULL));
    CHECK_OK(checkpoint_open(&ck, in_folder("ask")));
    CHECK_ERR(checkpoint_reals(&ck, "F32", 2, swapped, 6, out), "tensor 'F32' has shape (2,3), expected (3,2)");
    CHECK(strstr(err_text(), in_folder("ask")) == err_text());
    CHECK_ERR(checkpoint_reals(&ck, "F32", 1, (size_t[]){6}, 6, out), "expected (6)");
    CHECK_ERR(checkpoint_reals(&ck, "F32", 0, NULL, 1, out), "expected ()");
    CHECK_ERR(checkpoint_reals(&ck, "F32", -1, NULL, 5, out), "has shape (2,3), expected 5 elements");
    CHECK_OK(checkpoint_reals(&ck, "F32", -1, NULL, 6, out));
    CHECK_OK(checkpoint_reals(&ck, "scalar", 0, NULL, 1, out));
    CHECK_ERR(checkpoint_reals(&ck, "F33", 2, two, 6, out), "no tensor 'F33' among its 18");
    CHECK_ERR(checkpoint_reals(&ck, "encoder.w", 2, two, 6, out), "(there is 'net.encoder.w')");
    CHECK_ERR(checkpoint_reals(&ck, "ema.net.encoder.w", 2, two, 6, out), "(there is 'net.encoder.w')");
    static const Dtype integer[] = {DT_I64, DT_I32, DT_I16, DT_U8};
    for (int k = 0; k < 4; k++) {
        CHECK_OK(checkpoint_ints(&ck, dtype_name(integer[k]), ELEMENTS, ints));
        CHECK_OK(checkpoint_reals(&ck, dtype_name(integer[k]), -1, NULL, ELEMENTS, out));
        for (int i = 0; i < ELEMENTS; i++) CHECK((real)ints[i] == out[i]);
    }
    CHECK_ERR(checkpoint_ints(&ck, "F32", ELEMENTS, ints), "is F32, expected I64");
    CHECK_ERR(checkpoint_ints(&ck, "I32", 5, ints), "expected 5 elements");
    CHECK_ERR(checkpoint_ints(&ck, "I33", 5, ints), "no tensor 'I33'");
    CHECK_ERR(checkpoint_ints(&ck, "large", 2, ints), "'large' element 1 is 2147483648");
    checkpoint_close(&ck);
    tensor_list_free(&list);
}

/* What checkpoint_write does not write. */
static void test_write_refusals(void) {
    size_t dim[] = {2, 3}, huge[] = {SIZE_MAX / 2, 3};
    real x[6] = {0};
    Config meta = {0};
    Tensor t[2];
    int from_real[2] = {0, 0};
    const char *path = in_folder("refused");
    memset(t, 0, sizeof t);
    for (int i = 0; i < 2; i++) {
        snprintf(t[i].name, sizeof t[i].name, "t%d", i);
        t[i].dtype = DT_F32, t[i].ndim = 2, t[i].size = 6, t[i].data = f32;
        memcpy(t[i].dim, dim, sizeof dim);
    }
    CHECK_OK(checkpoint_write(path, t, from_real, 2, NULL)); /* the control: nothing wrong yet */
    unlink(path);
    t[1].name[1] = '0';
    CHECK_ERR(checkpoint_write(path, t, from_real, 2, NULL), "two tensors 't0'");
    strcpy(t[1].name, "__metadata__");
    CHECK_ERR(checkpoint_write(path, t, from_real, 2, NULL), "__metadata__");
    strcpy(t[1].name, "\377");
    CHECK_ERR(checkpoint_write(path, t, from_real, 2, NULL), "not UTF-8");
    strcpy(t[1].name, "t1");
    t[1].size = 5;
    CHECK_ERR(checkpoint_write(path, t, from_real, 2, NULL), "'t1' has 5 elements, its shape 6");
    t[1].size = 6, t[1].data = NULL;
    CHECK_ERR(checkpoint_write(path, t, from_real, 2, NULL), "no data");
    t[1].data = x, t[1].dtype = DT_I32, from_real[1] = 1;
    CHECK_ERR(checkpoint_write(path, t, from_real, 2, NULL), "reals as I32");
    t[1].dtype = DT_OTHER;
    CHECK_ERR(checkpoint_write(path, t, from_real, 2, NULL), "which a safetensors file cannot have");
    t[1].dtype = DT_F16;
    CHECK_OK(config_set(&meta, "key", "\300\200"));
    CHECK_ERR(checkpoint_write(path, t, from_real, 2, &meta), "not UTF-8");
    CHECK(strstr(err_text(), path) == err_text());
    CHECK(access(path, F_OK) != 0);
    config_free(&meta);

    TensorList list = {0};
    char name[NAME_MAX_BYTES + 1];
    memset(name, 'n', NAME_MAX_BYTES);
    name[NAME_MAX_BYTES] = 0;
    CHECK_ERR(tensor_list_add(&list, name, DT_F32, 2, dim, x, 0), "too long");
    CHECK_ERR(tensor_list_add(&list, "x", DT_F32, 9, dim, x, 0), "9 dimensions");
    CHECK_ERR(tensor_list_add(&list, "x", DT_F32, 2, huge, x, 0), "x: ");
    CHECK_OK(tensor_list_add(&list, name + 1, DT_F32, 2, dim, x, 0));
    tensor_list_free(&list);
}

/* ---- 16-bit formats: every value, and every rounding decision ---- */

static double value_of(unsigned bits, int m) { /* finite or infinite, positive */
    int bias = (1 << (14 - m)) - 1, e = (int)(bits >> m), fraction = (int)(bits & ((1u << m) - 1));
    return e ? ldexp((1 << m) + fraction, e - bias - m) : ldexp(fraction, 1 - bias - m); /* infinity: the next power */
}

static real next_real(real x, double towards) {
    return sizeof(real) == 4 ? (real)nextafterf((float)x, (float)towards) : (real)nextafter((double)x, towards);
}

/* Between value k and k+1: the tie goes to the even one, everything else to the nearer one. */
static void check_rounding(Dtype dtype, int m) {
    const size_t infinity = (size_t)((1 << (15 - m)) - 1) << m, n = infinity * 4 + 3;
    real *x = (real *)calloc(n, sizeof(real));
    uint16_t *expected = (uint16_t *)calloc(n, 2);
    for (unsigned k = 0; k < infinity; k++) {
        double middle = (value_of(k, m) + value_of(k + 1, m)) / 2;
        uint16_t e[4] = {(uint16_t)k, (uint16_t)(k + (k & 1)), (uint16_t)k, (uint16_t)(k + 1)};
        real v[4] = {(real)value_of(k, m), (real)middle, next_real((real)middle, 0), next_real((real)middle, 1e39)};
        for (int i = 0; i < 4; i++) {
            int negative = k % 3 == 0; /* both signs, in one go */
            x[4 * k + (unsigned)i] = negative ? -v[i] : v[i];
            expected[4 * k + (unsigned)i] = (uint16_t)(e[i] | (negative ? 0x8000 : 0));
        }
    }
    x[n - 3] = (real)INFINITY, expected[n - 3] = (uint16_t)infinity;
    x[n - 2] = (real)-INFINITY, expected[n - 2] = (uint16_t)(0x8000 | infinity);
    x[n - 1] = (real)NAN;
    TensorList list = {0};
    Checkpoint ck;
    CHECK_OK(tensor_list_add(&list, "x", dtype, 1, &n, x, 1));
    CHECK_OK(checkpoint_write(in_folder("half"), list.tensor, list.from_real, 1, NULL));
    CHECK_OK(checkpoint_open(&ck, in_folder("half")));
    const uint16_t *bits = (const uint16_t *)ck.tensor[0].data;
    size_t wrong = 0;
    for (size_t i = 0; i + 1 < n; i++) wrong += bits[i] != expected[i];
    CHECK(wrong == 0);
    CHECK((bits[n - 1] & 0x7fff) > infinity);
    tensor_to_reals(&ck.tensor[0], x);
    for (size_t i = 0; i + 3 < n; i++) {
        double sign = bits[i] & 0x8000 ? -1 : 1,
               v = (bits[i] & 0x7fff) == infinity ? INFINITY : value_of(bits[i] & 0x7fff, m);
        wrong += x[i] != (real)(sign * v) || !signbit(x[i]) != (sign > 0);
    }
    CHECK(wrong == 0 && isinf(x[n - 3]) && isinf(x[n - 2]) && x[n - 2] < 0 && isnan(x[n - 1]));
    checkpoint_close(&ck);
    tensor_list_free(&list);
    free(x);
    free(expected);
}

/* ---- hostile files ---- */

#define GOOD "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}"
#define ENTRY(fields) "{\"a\":{" fields "}}"
static const struct {
    const char *header;
    uint64_t extra; /* added to the length in the file */
    size_t data;
    const char *error;
} hostile[] = {
    {GOOD, 1, 5, "found byte 0x00"},
    {GOOD, 5, 4, "header of 58 bytes in a file of 65"},
    {GOOD, 99999999, 4, "expected at most 100000000"},
    {GOOD, UINT64_C(1) << 40, 4, "is neither a .ckpt nor a safetensors file"},
    {GOOD, UINT64_MAX - 100, 4, "is neither a .ckpt nor a safetensors file"},
    {GOOD, UINT64_MAX, 4, "expected ',', found the end"}, /* one byte short */
    {GOOD, 0, 3, "truncated"},
    {GOOD, 0, 0, "truncated"},
    {GOOD, 0, 5, "5 bytes of data, the tensors cover 4"},
    {GOOD "x", 0, 4, "nothing behind the closing brace, found 'x'"},
    {"{}", 0, 3, "3 bytes of data, the tensors cover 0"},
    {"{", 0, 0, "has only 9 bytes"},
    {"{ ", 0, 0, "expected '\"', found the end"},
    {"{\"a\":4}", 0, 4, "expected '{', found '4'"},
    {"{\"a\":null}", 0, 4, "expected '{'"},
    {"{a:{}}", 0, 4, "expected '\"', found 'a'"},
    {"{\"a\" {}}", 0, 4, "expected ':'"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":[4]"), 0, 4, "tensor 'a' has no data_offsets"},
    {ENTRY("\"dtype\":\"U8\",\"data_offsets\":[0,4]"), 0, 4, "no shape"},
    {ENTRY("\"shape\":[4],\"data_offsets\":[0,4]"), 0, 4, "no dtype"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4],\"x\":1"), 0, 4, "unknown field 'x'"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":[4],\"shape\":[4],\"data_offsets\":[0,4]"), 0, 4, "second 'shape'"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4],"), 0, 4, "expected '\"'"},
    {ENTRY("\"dtype\":\"F9\",\"shape\":[4],\"data_offsets\":[0,4]"), 0, 4, "dtype 'F9', expected F64"},
    {ENTRY("\"dtype\":\"C128\",\"shape\":[4],\"data_offsets\":[0,4]"), 0, 4, "dtype 'C128', expected F64"},
    {ENTRY("\"dtype\":\"F4\",\"shape\":[7],\"data_offsets\":[0,4]"), 0, 4, "expected 7 of F4 with 4 bits"},
    {ENTRY("\"dtype\":\"F6_E2M3\",\"shape\":[5],\"data_offsets\":[0,4]"), 0, 4, "expected 5 of F6_E2M3 with 6 bits"},
    {ENTRY("\"dtype\":8,\"shape\":[4],\"data_offsets\":[0,4]"), 0, 4, "expected '\"', found '8'"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":4,\"data_offsets\":[0,4]"), 0, 4, "expected '['"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":[4.0],\"data_offsets\":[0,4]"), 0, 4, "a whole number"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":[4e0],\"data_offsets\":[0,4]"), 0, 4, "a whole number"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":[-4],\"data_offsets\":[0,4]"), 0, 4, "a whole number of 64 bits, found '-'"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":[04],\"data_offsets\":[0,4]"), 0, 4, "a whole number"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":[\"4\"],\"data_offsets\":[0,4]"), 0, 4, "a whole number"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":[4,],\"data_offsets\":[0,4]"), 0, 4, "a whole number"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":[[4]],\"data_offsets\":[0,4]"), 0, 4, "found '['"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":[18446744073709551616],\"data_offsets\":[0,4]"), 0, 4, "64 bits"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":[4294967296,4294967296,4],\"data_offsets\":[0,4]"), 0, 4, "too large"},
    {ENTRY("\"dtype\":\"F64\",\"shape\":[2305843009213693952],\"data_offsets\":[0,0]"), 0, 0, "0 bytes of data"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1,4],\"data_offsets\":[0,4]"), 0, 4, "over 8 dimensions"},
    {ENTRY("\"dtype\":\"F16\",\"shape\":[4],\"data_offsets\":[0,4]"), 0, 4,
     "4 bytes of data, expected 4 of F16 with 16 bits"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,4]"), 0, 4, "expected 1 of U8"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[4,0]"), 0, 4, "from byte 4 to 0"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4,4]"), 0, 4, "expected ']'"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0]"), 0, 4, "expected ','"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[2,4]"), 0, 4, "a gap"},
    {ENTRY("\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[18446744073709551612,18446744073709551615]"), 0, 4,
     "truncated"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[0,3]},\"b\":{\"dtype\":\"U8\",\"shape\":[2],"
     "\"data_offsets\":[2,4]}}",
     0, 4, "tensor 'b' begins at byte 2 of the data, the one before it ends at 3: an overlap"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\",\"shape\":[4],"
     "\"data_offsets\":[0,4]}}",
     0, 4, "an overlap"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"b\":{\"dtype\":\"U8\",\"shape\":[1],"
     "\"data_offsets\":[3,4]}}",
     0, 4, "a gap"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},\"\\u0061\":{\"dtype\":\"U8\",\"shape\":[2],"
     "\"data_offsets\":[2,4]}}",
     0, 4, "two tensors 'a'"},
    {"{\"a\\u0000\":{}}", 0, 4, "is no character"},
    {"{\"a\\ud83d\":{}}", 0, 4, "\\ud83d is no character"},
    {"{\"a\\ud83d\\u0041\":{}}", 0, 4, "is no character"},
    {"{\"a\\u12g4\":{}}", 0, 4, "four hexadecimal digits"},
    {"{\"a\\x\":{}}", 0, 4, "an escape sequence"},
    {"{\"a\\", 0, 0, "an escape sequence"},
    {"{\"a", 0, 0, "found the end"},
    {"{\"a\n\":{}}", 0, 4, "a string of UTF-8, found byte 0x0a"},
    {"{\"a\377\":{}}", 0, 4, "a string of UTF-8"},
    {"{\"a\303", 0, 0, "a string of UTF-8"},
    {"{\"a\355\240\200\":{}}", 0, 4, "a string of UTF-8"},
    {"{\"a\300\257\":{}}", 0, 4, "a string of UTF-8"},
    {"{\"a\340\200\257\":{}}", 0, 4, "a string of UTF-8"},
    {"{\"a\360\200\200\257\":{}}", 0, 4, "a string of UTF-8"},
    {"{\"a\364\220\200\200\":{}}", 0, 4, "a string of UTF-8"},
    {"{\"__metadata__\":{\"a\":1}}", 0, 0, "expected '\"', found '1'"},
    {"{\"__metadata__\":{\"a\":{\"b\":\"c\"}}}", 0, 0, "expected '\"', found '{'"},
    {"{\"__metadata__\":{\"a\":\"1\",\"a\":\"2\"}}", 0, 0, "second 'a' in __metadata__"},
    {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, 0, "second __metadata__"},
};

static void test_hostile_headers(void) {
    Checkpoint ck;
    CHECK_OK(checkpoint_open(&ck, put_safetensors(GOOD, 0, 4))); /* the control */
    checkpoint_close(&ck);
    CHECK_OK(checkpoint_open(&ck, put_safetensors("{}", 0, 0)));
    CHECK(ck.n == 0);
    checkpoint_close(&ck);
    CHECK_OK(checkpoint_open(
        &ck, put_safetensors("{\"\\u00e9\\ud83d\\ude00\\n\\/\" : {\"shape\":[ 2 , 2 ]\n,\"data_offsets\""
                             ":[0,4],\"dtype\":\"\\u0055\\u0038\"} , \"e\":{\"dtype\":\"F64\",\"shape\""
                             ":[0],\"data_offsets\":[4,4]}}   ",
                             0, 4)));
    CHECK(checkpoint_find(&ck, "\303\251\360\237\230\200\n/") && checkpoint_find(&ck, "e") && ck.n == 2);
    checkpoint_close(&ck);
    for (size_t i = 0; i < sizeof hostile / sizeof *hostile; i++) {
        const char *path = put_safetensors(hostile[i].header, hostile[i].extra, hostile[i].data);
        CHECK_ERR(checkpoint_open(&ck, path), hostile[i].error);
        if (!CHECK(strstr(err_text(), path) == err_text() && !strchr(err_text(), '\n')))
            printf("     hostile[%zu]: %s\n", i, err_text());
        CHECK(err_in("kind") == DAMAGED);
        CHECK(!ck.map && !ck.tensor && !ck.meta.kv);
    }
    enum { MANY = CHECKPOINT_TENSORS + 1, EACH = 64 }; /* empty ones, which cost a file next to nothing */
    char *many = (char *)malloc((size_t)MANY * EACH + 2), *end = many;
    for (int i = 0; many && i < MANY; i++)
        end += sprintf(end, "%c\"%x\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}", i ? ',' : '{',
                       (unsigned)i);
    if (CHECK(many != NULL)) strcpy(end, "}");
    CHECK_ERR(checkpoint_open(&ck, put_safetensors(many, 0, 0)), "over 65536 tensors");
    free(many);
    static char header[100000];
    char *p = header;
    memset(header, 0, sizeof header);
    p += sprintf(p, "{\"");
    memset(p, 'n', NAME_MAX_BYTES);
    strcpy(p + NAME_MAX_BYTES, "\":{}}");
    CHECK_ERR(checkpoint_open(&ck, put_safetensors(header, 0, 0)), "name of 160 bytes");
    memset(header, '{', 7000);
    header[7000] = 0;
    CHECK_ERR(checkpoint_open(&ck, put_safetensors(header, 0, 0)), "expected '\"', found '{'");
    p = header + sprintf(header, "{\"__metadata__\":{");
    for (int i = 0; i < 4097; i++) p += sprintf(p, "%s\"%d\":\"\"", i ? "," : "", i);
    strcpy(p, "}}");
    CHECK_ERR(checkpoint_open(&ck, put_safetensors(header, 0, 0)), "over 4096 entries");
}

static void test_foreign_files(void) {
    static const struct {
        const char *bytes;
        size_t n;
        const char *error;
    } foreign[] = {
        {"", 0, "is empty"},
        {"\10\0\0\0\0\0\0\0", 8, "has only 8 bytes"},
        {"{}", 2, "looks like JSON"},
        {"  \n<!DOCTYPE html><html>", 24, "looks like an HTML"},
        {"\357\273\277<html>not found</html>", 25, "looks like an HTML"},
        {"version https://git-lfs.github.com/spec/v1\noid sha256:", 54, "git-lfs pointer"},
        {"\x1f\x8b\10\0\0\0\0\0\0\0\0", 11, "gzip"},
        {"\x89PNG\r\n\x1a\n\0\0\0\0", 12, "a PNG"},
        {"just some text, long enough", 27, "is neither a .ckpt nor a safetensors file"},
        {"\0\0\0\0\0\0\0\0\0\0\0\0", 12, "is neither a .ckpt nor a safetensors file"},
    };
    Checkpoint ck;
    for (size_t i = 0; i < sizeof foreign / sizeof *foreign; i++) {
        put_file(in_folder("foreign"), foreign[i].bytes, foreign[i].n);
        CHECK_ERR(checkpoint_open(&ck, in_folder("foreign")), foreign[i].error);
        CHECK(strstr(err_text(), "safetensors") && err_in("kind") == DAMAGED);
    }
    CHECK_ERR(checkpoint_open(&ck, folder), "is a folder");
    CHECK_ERR(checkpoint_open(&ck, "/dev/zero"), "is a device");
    CHECK_ERR(checkpoint_open(&ck, in_folder("nothing")), "No such file");
    CHECK(err_in("kind") == FAILED); /* nothing was read, so nothing is damaged */
    CHECK(mkfifo(in_folder("fifo"), 0600) == 0);
    CHECK_ERR(checkpoint_open(&ck, in_folder("fifo")), "a pipe"); /* and does not wait for a writer */
    char path[PATH_BYTES + 1];
    memset(path, 'p', sizeof path);
    path[PATH_BYTES] = 0;
    CHECK_ERR(checkpoint_open(&ck, path), "4096 bytes is too long");
    path[PATH_BYTES - 1] = 0; /* this one is not; nor is there such a file */
    CHECK_ERR(checkpoint_open(&ck, path), "ile name too long");
}

/* Every truncation, and thousands of damaged copies, of a file with all that the format has. */
static void test_damaged_files(void) {
    TensorList list = {0};
    Config meta = {0};
    size_t n, opened = 0, damaged = 4000;
    make_list(&list);
    CHECK_OK(config_set(&meta, "key \"", "value \n"));
    CHECK_OK(checkpoint_write(in_folder("whole"), list.tensor, list.from_real, list.n, &meta));
    CHECK(open_and_read(in_folder("whole"))); /* the control */
    char *file = get_file(in_folder("whole"), &n), *copy = (char *)malloc(n);
    for (size_t i = 0; i < n; i++) {
        put_file(in_folder("cut"), file, i);
        opened += (size_t)open_and_read(in_folder("cut"));
        opened += err_in("kind") != DAMAGED;
    }
    CHECK(opened == 0);
    static const char spice[] = "\"{}[],:\\ 0918-.eu\n\0\377\303";
    for (size_t i = 0; i < damaged; i++) {
        uint32_t r[4];
        philox(r, 1, rng_stream(RNG_TEST, 0, 0), i);
        memcpy(copy, file, n);
        copy[r[0] % n] = r[1] % 2 ? spice[r[2] % (sizeof spice - 1)] : (char)(copy[r[0] % n] ^ 1 << r[2] % 8);
        if (r[1] % 4 == 0) copy[r[3] % n] = spice[r[3] / 7 % (sizeof spice - 1)];
        put_file(in_folder("cut"), copy, n);
        opened += (size_t)open_and_read(in_folder("cut"));
    }
    CHECK(opened > 0 && opened < damaged); /* damage in the data itself is not the reader's business */
    printf("damaged files: %zu of %zu opened\n", opened, damaged);
    free(file);
    free(copy);
    tensor_list_free(&list);
    config_free(&meta);
}

/* ---- atomic files ---- */

static void test_atomic(void) {
    AtomicFile f;
    struct stat st;
    size_t n;
    CHECK(mkdir(in_folder("atomic"), 0755) == 0);
    const char *path = in_folder("atomic/file"), *link = in_folder("atomic/link");
    CHECK_OK(atomic_open(&f, path));
    CHECK_OK(atomic_write(&f, "new", 3));
    CHECK(access(path, F_OK) != 0 && count_files(in_folder("atomic")) == 1); /* not there before the commit */
    CHECK_OK(atomic_close(&f, OK));
    CHECK(atomic_close(&f, FAILED) == FAILED);
    char *text = get_file(path, &n);
    CHECK(n == 3 && !memcmp(text, "new", 3) && count_files(in_folder("atomic")) == 1);
    free(text);

    CHECK(chmod(path, 0640) == 0 && symlink("file", link) == 0);
    CHECK_OK(atomic_open(&f, link));
    CHECK_OK(atomic_write(&f, "newer", 5));
    CHECK_OK(atomic_close(&f, OK));
    CHECK(lstat(link, &st) == 0 && S_ISLNK(st.st_mode));
    CHECK(stat(path, &st) == 0 && st.st_size == 5 && (st.st_mode & 0777) == 0640);

    CHECK_OK(atomic_open(&f, path));
    CHECK_OK(atomic_write(&f, "lost", 4));
    CHECK(!disk_full());
    CHECK(atomic_close(&f, FAILED) == FAILED);
    CHECK(atomic_close(&f, FAILED) == FAILED);
    CHECK_ERR(atomic_write(&f, "x", 1), "not open");
    CHECK_ERR(atomic_close(&f, OK), "not open");
    CHECK(stat(path, &st) == 0 && st.st_size == 5 && count_files(in_folder("atomic")) == 2);

    CHECK_ERR(atomic_open(&f, in_folder("atomic/no/file")), "No such file");
    CHECK_ERR(atomic_open(&f, in_folder("atomic/file/x")), "Not a directory");
    CHECK_ERR(atomic_open(&f, in_folder("atomic")), "is a directory");
}

static void write_x(const char *path) {
    AtomicFile f;
    CHECK_OK(atomic_open(&f, path));
    CHECK_OK(atomic_close(&f, atomic_write(&f, "x", 1)));
}

/* What killed processes left goes with the first write of its name. The folder is listed once, however many files are
 * written: what comes later stays. */
static void test_left(void) {
    static const char *const names[] = {"a", "b", "ab"};
    char left[3][40], later[40];
    const pid_t dead = fork();
    if (dead == 0) _exit(0);
    CHECK(dead > 0 && waitpid(dead, NULL, 0) == dead);
    CHECK(mkdir(in_folder("left"), 0755) == 0);
    for (int i = 0; i < 3; i++) {
        snprintf(left[i], sizeof left[i], "left/%s.tmp%ld-0", names[i], (long)dead);
        put_file(in_folder(left[i]), "half", 4);
    }
    write_x(in_folder("left/a"));
    CHECK(access(in_folder(left[0]), F_OK) != 0);
    CHECK(access(in_folder(left[1]), F_OK) == 0 && access(in_folder(left[2]), F_OK) == 0);
    snprintf(later, sizeof later, "left/a.tmp%ld-1", (long)dead);
    put_file(in_folder(later), "half", 4);
    write_x(in_folder("left/a"));
    CHECK(access(in_folder(later), F_OK) == 0);
    write_x(in_folder("left/b"));
    CHECK(access(in_folder(left[1]), F_OK) != 0 && access(in_folder(left[2]), F_OK) == 0);
    CHECK(unlink(in_folder(later)) == 0);
    for (int i = 0; i < 40; i++) { /* more folders than are remembered, one after the other */
        snprintf(later, sizeof later, "left/%d", i);
        CHECK(mkdir(in_folder(later), 0755) == 0);
        snprintf(later, sizeof later, "left/%d/a.tmp%ld-0", i, (long)dead);
        put_file(in_folder(later), "half", 4);
        snprintf(later, sizeof later, "left/%d/a", i);
        write_x(in_folder(later));
        snprintf(later, sizeof later, "left/%d", i);
        CHECK(count_files(in_folder(later)) == 1);
    }
}

/* Writing into `path`, which holds something already, fails with `error`; nothing changes. */
static void check_full(const char *path, const char *error) {
    enum { N = 60000 };
    static const size_t n = N;
    struct stat before, after;
    TensorList list = {0};
    real *x = (real *)calloc(N, sizeof(real));
    CHECK_OK(tensor_list_add(&list, "x", DT_F16, 1, &n, x, 1));
    CHECK(stat(path, &before) == 0);
    CHECK_ERR(checkpoint_write(path, list.tensor, list.from_real, 1, NULL), error);
    CHECK(disk_full());
    CHECK(strstr(err_text(), path) == err_text());
    CHECK(stat(path, &after) == 0 && before.st_size == after.st_size && before.st_ino == after.st_ino);
    tensor_list_free(&list);
    free(x);
}

/* Writing directly to a device, and not at all into a folder that is not ours */
static void test_not_permitted(void) {
    AtomicFile f;
    struct stat st;
    CHECK(mkdir(in_folder("closed"), 0555) == 0);
    if (!as_nobody()) {
        printf("SKIP: root cannot become nobody\n");
        skipped++;
        return;
    }
    CHECK_ERR(atomic_open(&f, in_folder("closed/file")), "Permission denied");
    CHECK_OK(atomic_open(&f, "/dev/null"));
    CHECK_OK(atomic_write(&f, "x", 1));
    CHECK_OK(atomic_close(&f, OK));
    CHECK(stat("/dev/null", &st) == 0 && S_ISCHR(st.st_mode));
    check_full("/dev/full", "No space left on device");
    CHECK(stat("/dev/full", &st) == 0 && S_ISCHR(st.st_mode));
    as_before();
}

/* Lines up to the limit of 50000 bytes; the one that does not fit leaves nothing of itself. */
static void check_append(const char *path) {
    static const char line[] = "a line of thirty-one bytes here\n";
    struct stat st;
    for (size_t i = 0; i < 50000 / strlen(line); i++) CHECK_OK(file_append(path, line, strlen(line)));
    CHECK_ERR(file_append(path, line, strlen(line)), "File too large");
    CHECK(disk_full());
    CHECK(stat(path, &st) == 0 && st.st_size == (off_t)(50000 / strlen(line) * strlen(line)));
    CHECK_ERR(file_append(in_folder("full/no/log"), line, strlen(line)), "No such file");
    CHECK(!disk_full());
    CHECK_OK(file_append(path, "", 0));
    CHECK(!disk_full());
}

static void test_full_disk(void) {
    CHECK(mkdir(in_folder("full"), 0755) == 0);
    put_file(in_folder("full/old"), "old", 3);
    struct rlimit limit, small;
    signal(SIGXFSZ, SIG_IGN); /* then a write beyond the limit fails with EFBIG */
    CHECK(getrlimit(RLIMIT_FSIZE, &limit) == 0);
    small = limit;
    small.rlim_cur = 50000;
    CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
    check_full(in_folder("full/old"), "File too large");
    check_append(in_folder("full/log"));
    CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
    CHECK(unlink(in_folder("full/log")) == 0);
    CHECK(count_files(in_folder("full")) == 1);

    /* our own view of the mounts, which ends with this process */
    int own = unshare(CLONE_NEWNS) == 0 && mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0;
    if (!own || mount("none", in_folder("full"), "tmpfs", 0, "size=64k") != 0) {
        printf("SKIP: no small file system to fill: %s\n", strerror(errno));
        skipped++;
        return;
    }
    put_file(in_folder("full/old"), "old", 3);
    check_full(in_folder("full/old"), "No space left on device");
    CHECK(count_files(in_folder("full")) == 1);
    CHECK(umount(in_folder("full")) == 0);
}

/* ---- parameter tables ---- */

static void make_params(Params *p) {
    static const size_t wide[] = {3, 5, 7, 1}, matrix[] = {257, 100}, vector[] = {33}, none[] = {0};
    size_t i[5];
    CHECK_OK(params_add(p, &i[0], INIT_NORMAL, 0.02, 0.01, 2, matrix, "encoder.layers.%d.weight", 0));
    CHECK_OK(params_add(p, &i[1], INIT_UNIFORM, 0.5, 0.01, 4, wide, "conv.weight"));
    CHECK_OK(params_add(p, &i[2], INIT_ONE, 0, 0, 1, vector, "norm.weight"));
    CHECK_OK(params_add(p, &i[3], INIT_ZERO, 0, 0, 0, NULL, "scalar"));
    CHECK_OK(params_add(p, &i[4], INIT_NORMAL, 1, 0, 1, none, "empty"));
    for (size_t k = 0; k < 5; k++) CHECK(i[k] == k);
}

static void test_params_table(void) {
    Params p = {0};
    size_t dim[] = {2, 3, 1, 1, 1}, huge[] = {SIZE_MAX / 2, 3}, large[] = {SIZE_MAX / 2 - 100};
    char name[NAME_MAX_BYTES + 1];
    make_params(&p);
    memset(name, 'n', NAME_MAX_BYTES);
    name[NAME_MAX_BYTES] = 0;
    CHECK_ERR(params_add(&p, NULL, INIT_ZERO, 0, 0, 1, dim, "scalar"), "two parameters 'scalar'");
    CHECK_ERR(params_add(&p, NULL, INIT_ZERO, 0, 0, 5, dim, "x"), "5 dimensions");
    CHECK_ERR(params_add(&p, NULL, INIT_ZERO, 0, 0, 2, huge, "x"), "too large");
    CHECK_ERR(params_add(&p, NULL, INIT_ZERO, 0, 0, 1, large, "x"), "too large");
    CHECK_ERR(params_add(&p, NULL, INIT_ZERO, 0, 0, 1, dim, "%s", name), "too long");
    CHECK(p.n == 5 && params_count(&p) == 25700 + 105 + 33 + 1);
    CHECK_OK(params_plan(&p, PLAN_VALUE));
    CHECK(p.row[0].value && !p.row[0].grad && !p.row[0].m && !p.row[0].ema);
    real *value = p.row[1].value;
    CHECK_OK(params_plan(&p, PLAN_VALUE | PLAN_GRAD | PLAN_ADAM | PLAN_EMA));
    CHECK(p.row[1].value == value && p.row[1].grad && p.row[1].m && p.row[1].v && p.row[1].ema);
    CHECK_ERR(params_add(&p, NULL, INIT_ZERO, 0, 0, 1, dim, "late"), "after the table was planned");
    size_t line = 64 / sizeof(real);
    for (size_t i = 0; i < p.n; i++) {
        const Param *row = &p.row[i];
        real *const all[] = {row->value, row->grad, row->m, row->v, row->ema};
        for (int k = 0; k < 5; k++) {
            CHECK((uintptr_t)all[k] % 64 == 0);
            CHECK(all[k] + row->size <=
                  (i + 1 < p.n ? all[k] + (row->size + line - 1) / line * line : p.arena[k] + p.total));
            for (size_t e = 0; e < row->size; e++) all[k][e] = (real)k; /* overlaps would show below */
        }
    }
    for (size_t i = 0; i < p.n; i++)
        for (size_t e = 0; e < p.row[i].size; e++)
            CHECK(p.row[i].value[e] == 0 && p.row[i].v[e] == 3 && p.row[i].ema[e] == 4);
    params_free(&p);
    CHECK(!p.row && !p.n && !p.total);
}

static void test_params_init(void) {
    Params a = {0}, b = {0};
    make_params(&a);
    make_params(&b);
    CHECK_OK(params_plan(&a, PLAN_VALUE | PLAN_EMA));
    CHECK_OK(params_plan(&b, PLAN_VALUE));
    threads_set(1);
    params_init(&a, 5);
    threads_set(3);
    params_init(&b, 5);
    threads_set(0);
    CHECK(!memcmp(a.arena[0], b.arena[0], a.total * sizeof(real)) &&
          !memcmp(a.arena[0], a.arena[4], a.total * sizeof(real)));
    params_init(&b, 6);
    CHECK(memcmp(a.arena[0], b.arena[0], a.total * sizeof(real)) != 0);
    double sum = 0, square = 0, largest = 0;
    for (size_t i = 0; i < a.row[0].size; i++)
        sum += (double)a.row[0].value[i], square += pow((double)a.row[0].value[i], 2);
    CHECK(fabs(sum / 25700) < 4 * 0.02 / sqrt(25700) && fabs(sqrt(square / 25700) - 0.02) < 4e-4);
    for (size_t i = 0; i < 105; i++) largest = fmax(largest, fabs((double)a.row[1].value[i]));
    CHECK(largest <= 0.5 && largest > 0.45 && a.row[2].value[32] == 1 && a.row[3].value[0] == 0);
    CHECK(a.row[0].value[7] == (real)(0.02 * rng_normal(5, rng_stream(RNG_INIT, 0, 0), 7)));
    CHECK(a.row[1].value[7] == (real)(0.5 * (2 * rng_uniform(5, rng_stream(RNG_INIT, 1, 0), 7) - 1)));
    params_free(&a);
    params_free(&b);
}

static void test_params_arithmetic(void) {
    Params p = {0};
    make_params(&p);
    CHECK(params_grad_norm(&p) == 0);
    CHECK_OK(params_plan(&p, PLAN_VALUE | PLAN_GRAD | PLAN_EMA));
    params_init(&p, 1);
    double square = 0;
    for (size_t i = 0; i < p.n; i++) {
        for (size_t e = 0; e < p.row[i].size; e++) {
            p.row[i].grad[e] = (real)rng_normal(2, i, e);
            p.row[i].ema[e] = (real)(1 + i);
            square += pow((double)p.row[i].grad[e], 2);
        }
    }
    CHECK(fabs(params_grad_norm(&p) - sqrt(square)) < 1e-12 * sqrt(square));
    real *value = p.row[0].value, before = value[3];
    params_swap_ema(&p);
    CHECK(p.row[0].value == value && value[3] == 1 && p.row[0].ema[3] == before && p.row[2].value[32] == 3);
    params_swap_ema(&p);
    CHECK(value[3] == before && p.row[2].ema[32] == 3);
    params_zero_grad(&p);
    CHECK(params_grad_norm(&p) == 0);
    params_free(&p);
}

/* A table's values, moments and averages, in a file: in the exact type, in two of 16 bits, under the official names of the
 * moving average, without dots */
static void write_params(Params *a, TensorList *list) {
    CHECK_ERR(tensor_list_params(list, a, 'v', "net.", DT_F32), "never planned");
    CHECK_OK(params_plan(a, PLAN_VALUE | PLAN_ADAM | PLAN_EMA));
    params_init(a, 3);
    for (int k = 2; k < 5; k++)
        for (size_t i = 0; i < a->total; i++) a->arena[k][i] = (real)(k + (double)(i % 64) / 64);
    Dtype exact = sizeof(real) == 8 ? DT_F64 : DT_F32;
    CHECK_OK(tensor_list_params(list, a, 'v', "net.", exact));
    CHECK_OK(tensor_list_params(list, a, '1', "m.", DT_F16));
    CHECK_OK(tensor_list_params(list, a, '2', "v.", DT_BF16));
    CHECK_OK(tensor_list_params(list, a, 'e', "ema.", exact));
    CHECK_ERR(tensor_list_params(list, a, 'x', "net.", DT_F32), "kind 'x'");
    CHECK_OK(tensor_list_add(list, "net_ema.encoderlayers0weight", exact, 2, a->row[0].dim, a->row[0].ema, 1));
    for (size_t i = 1; i < a->n; i++) {
        char name[64], *dot;
        snprintf(name, sizeof name, "net_ema/%.40s", a->row[i].name);
        while ((dot = strchr(name, '.'))) memmove(dot, dot + 1, strlen(dot));
        name[7] = '.';
        CHECK_OK(tensor_list_add(list, name, exact, a->row[i].ndim, a->row[i].dim, a->row[i].ema, 1));
    }
    CHECK_OK(checkpoint_write(in_folder("params"), list->tensor, list->from_real, list->n, NULL));
}

/* b: planned, from what a wrote */
static void test_params_loaded(const Params *a, Params *b, const Checkpoint *ck) {
    const size_t bytes = a->total * sizeof(real);
    CHECK_OK(params_load(b, ck, 'v', "net."));
    CHECK(!memcmp(a->arena[0], b->arena[0], bytes));
    CHECK_OK(params_load_ema(b, ck, 'e', "net_ema."));
    for (size_t i = 0; i < b->n; i++) CHECK(!memcmp(a->row[i].ema, b->row[i].ema, b->row[i].size * sizeof(real)));
    CHECK(!memcmp(a->arena[0], b->arena[0], bytes));
    CHECK_OK(params_load_ema(b, ck, 'v', "net_ema."));
    CHECK(!memcmp(a->row[1].ema, b->row[1].value, b->row[1].size * sizeof(real)));
    CHECK_OK(params_load(b, ck, 'v', "m."));
    CHECK_NEAR("moments as F16", b->row[0].value, a->row[0].m, b->row[0].size, 0, 1.0 / 2048);
    CHECK_OK(params_load(b, ck, 'v', "v."));
    CHECK_NEAR("moments as BF16", b->row[0].value, a->row[0].v, b->row[0].size, 0, 1.0 / 256);
}

static void drop_values(Params *p) {
    free(p->arena[0]);
    p->arena[0] = NULL;
}

/* As they lie in the file, or copied; b has no memory then */
static void test_params_mapped(const Params *a, Params *b, const Checkpoint *ck) {
    const char *map = (const char *)ck->map;
    CHECK_ERR(params_map(b, ck, "net.", 0), "cannot be mapped"); /* it has memory */
    for (int k = 0; k < 5; k++) {
        free(b->arena[k]);
        b->arena[k] = NULL;
    }
    CHECK_OK(params_map(b, ck, "net.", 0));
    for (size_t i = 0; i < b->n; i++) {
        const char *value = (const char *)b->row[i].value;
        CHECK(value >= map && value < map + ck->map_bytes);
        CHECK(!memcmp(a->row[i].value, value, b->row[i].size * sizeof(real)));
    }
    drop_values(b);
    CHECK_OK(params_map(b, ck, "m.", 0));
    for (size_t i = 0; i < b->n; i++)
        CHECK((const char *)b->row[i].value < map || (const char *)b->row[i].value >= map + ck->map_bytes);
    CHECK_NEAR("moments as F16, copied", b->row[1].value, a->row[1].m, b->row[1].size, 0, 1.0 / 2048);
    drop_values(b);
    CHECK_OK(params_map(b, ck, "net_ema.", 1));
    CHECK(!memcmp(a->row[1].ema, b->row[1].value, b->row[1].size * sizeof(real)));
    drop_values(b);
}

static void test_params_files(void) {
    Params a = {0}, b = {0};
    TensorList list = {0};
    Checkpoint ck;
    make_params(&a);
    make_params(&b);
    write_params(&a, &list);
    CHECK_OK(params_plan(&b, PLAN_VALUE | PLAN_EMA));
    CHECK_OK(checkpoint_open(&ck, in_folder("params")));
    CHECK(ck.n == 5 * a.n);
    test_params_loaded(&a, &b, &ck);
    test_params_mapped(&a, &b, &ck);
    CHECK_OK(params_plan(&b, PLAN_VALUE | PLAN_EMA));
    CHECK_ERR(params_load(&b, &ck, 'v', "nets."), "no tensor 'nets.encoder.layers.0.weight'");
    CHECK_ERR(params_load(&b, &ck, 'v', ""), "(there is '"); /* the prefix was forgotten */
    CHECK_ERR(params_load_ema(&b, &ck, 'e', "net."), "no tensor 'net.encoderlayers0weight'");
    b.row[1].dim[0] = 5, b.row[1].dim[1] = 3;
    CHECK_ERR(params_load(&b, &ck, 'v', "net."), "tensor 'net.conv.weight' has shape (3,5,7,1), expected (5,3,7,1)");
    checkpoint_close(&ck);
    tensor_list_free(&list);
    params_free(&a);
    params_free(&b);
}

/* ---- lack of memory: every allocation fails once ---- */

static Err everything(void) {
    Config c = {0};
    Checkpoint ck = {0};
    Params p = {0};
    TensorList list = {0};
    size_t dim[] = {3, 5};
    Err e = config_read(&c, in_folder("config.txt"));
    if (e == OK) e = config_set(&c, "new", "%d", 1);
    for (int i = 0; i < 20 && e == OK; i++) e = params_add(&p, NULL, INIT_NORMAL, 1, 0, 2, dim, "w.%d", i);
    if (e == OK) e = params_plan(&p, PLAN_VALUE | PLAN_GRAD | PLAN_ADAM | PLAN_EMA);
    if (e == OK) params_init(&p, 1);
    if (e == OK) e = tensor_list_params(&list, &p, 'v', "", DT_F16);
    if (e == OK) e = checkpoint_write(in_folder("memory/file"), list.tensor, list.from_real, list.n, &c);
    if (e == OK) e = checkpoint_open(&ck, in_folder("memory/file"));
    if (e == OK) e = params_load(&p, &ck, 'v', "");
    config_free(&c);
    checkpoint_close(&ck);
    params_free(&p);
    tensor_list_free(&list);
    return e;
}

/* Weights that are no numbers are refused however they are kept: in the file, as copies, packed, as moments. */
static void test_not_finite(void) {
    enum { ROWS = 4, COLUMNS = 8, SIZE = ROWS * COLUMNS };
    static const struct {
        Dtype dtype;
        size_t at;
        double value;
        const char *says;
    } cases[] = {{DT_F32, 13, NAN, "element 13 is nan"},
                 {DT_F64, SIZE - 1, INFINITY, "element 31 is inf"},
                 {DT_F16, 0, 1e6, "element 0 is inf"}, /* too large for it */
                 {DT_BF16, 8, -INFINITY, "element 8 is -inf"}};
    const size_t dim[2] = {ROWS, COLUMNS};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int bad = 0; bad < 2; bad++) {
            real x[SIZE];
            Checkpoint ck;
            TensorList list = {0};
            for (int k = 0; k < SIZE; k++) x[k] = (real)k;
            if (bad) x[cases[i].at] = (real)cases[i].value;
            CHECK_OK(tensor_list_add(&list, "w", cases[i].dtype, 2, dim, x, 1));
            CHECK_OK(checkpoint_write(in_folder("finite"), list.tensor, list.from_real, 1, NULL));
            CHECK_OK(checkpoint_open(&ck, in_folder("finite")));
            for (int way = 0; way < 5; way++) { /* mapped, packed as bf16 and int8, loaded, as moments in bf16 */
                Params p = {0};
                if ((way == 1 || way == 2 || way == 4) && !layers_here()) continue;
                CHECK_OK(params_add(&p, NULL, INIT_ZERO, 0, 0, 2, dim, "w"));
                p.row[0].matrix = 1;
                p.format = way == 1 ? WEIGHTS_BF16 : way == 2 ? WEIGHTS_INT8 : WEIGHTS_REAL;
                p.bf16_moments = way == 4;
                if (way > 2) CHECK_OK(params_plan(&p, PLAN_VALUE | PLAN_ADAM));
                const Err e = way < 3 ? params_map(&p, &ck, "", 0) : params_load(&p, &ck, way == 3 ? 'v' : '1', "");
                if (!CHECK(bad ? e != OK && strstr(err_text(), cases[i].says) && strstr(err_text(), "tensor 'w'")
                               : e == OK))
                    printf("     case %zu, way %d: %s\n", i, way, e == OK ? "taken" : err_text());
                params_free(&p);
            }
            checkpoint_close(&ck);
            tensor_list_free(&list);
        }
}

static void test_no_memory(void) {
    size_t failures = 0;
    CHECK(mkdir(in_folder("memory"), 0755) == 0);
    put_file(in_folder("config.txt"), "a 1\nb 2\n", 8);
    for (size_t n = 1; n < 1000; n++) {
        fail_at = n;
        Err e = everything();
        int reached = fail_at == 0;
        fail_at = 0;
        if (!reached) {
            CHECK(e == OK); /* no allocation was left to fail */
            break;
        }
        failures++;
        CHECK(e == FAILED && strstr(err_text(), "no memory for"));
    }
    CHECK(failures > 20 && failures < 999);
    CHECK(count_files(in_folder("memory")) == 1);
    printf("failing allocator: %zu allocations, each failed once\n", failures);
}

/* ---- golden files ---- */

static void check_golden_weights(const char *path) {
    Checkpoint ck;
    if (access(path, F_OK) != 0) return;
    CHECK_OK(checkpoint_open(&ck, path));
    CHECK(ck.n > 0 && ck.meta.n > 0);
    for (size_t i = 0; i < ck.n; i++) {
        const Tensor *x = &ck.tensor[i];
        CHECK(checkpoint_find(&ck, x->name) == x);
        real *out = (real *)malloc((x->size + 1) * sizeof(real));
        CHECK_OK(checkpoint_reals(&ck, x->name, x->ndim, x->dim, x->size, out));
        size_t bad = 0;
        for (size_t k = 0; k < x->size; k++) bad += isnan((double)out[k]) != 0;
        CHECK(bad == 0);
        free(out);
    }
    checkpoint_close(&ck);
}

static void test_golden(const char *golden) {
    DIR *d = golden ? opendir(golden) : NULL;
    size_t cases = 0;
    if (!d) {
        printf("SKIP: no folder of golden cases\n");
        skipped++;
        return;
    }
    for (struct dirent *e; (e = readdir(d));) {
        char path[1000];
        if (e->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "%.600s/%s/config.txt", golden, e->d_name);
        if (access(path, F_OK) != 0) continue;
        Config c = {0};
        CHECK_OK(config_read(&c, path));
        CHECK(c.n > 10 && config_get(&c, "model.", "target"));
        config_free(&c);
        static const char *const weights[] = {"model", "io"};
        for (int k = 0; k < 2; k++) {
            snprintf(path, sizeof path, "%.600s/%s/%s.safetensors", golden, e->d_name, weights[k]);
            check_golden_weights(path);
        }
        cases++;
    }
    closedir(d);
    CHECK(cases > 0);
    printf("golden cases: %zu\n", cases);
}

int main(int argc, char **argv) {
    if (!temporary_folder(folder)) return 1;
    chmod(folder, 0755);
    test_config_values();
    test_config_places();
    test_config_places_copied();
    test_config_file();
    test_round_trip();
    test_other_kinds();
    test_wrapped_names();
    test_exact_bytes();
    test_asking();
    test_write_refusals();
    check_rounding(DT_F16, 10);
    check_rounding(DT_BF16, 7);
    test_hostile_headers();
    test_foreign_files();
    test_damaged_files();
    test_atomic();
    test_left();
    test_not_permitted();
    test_full_disk();
    test_params_table();
    test_params_init();
    test_params_arithmetic();
    test_params_files();
    test_not_finite();
    test_no_memory();
    test_golden(argc > 1 ? argv[1] : "test/golden-cases");
    remove_all(folder);
    if (skipped) printf("%zu skipped\n", skipped);
    return test_report();
}
