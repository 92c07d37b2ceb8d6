/* test_data.c - datasets, the loader, token files. */
#include "files.h"

/* ---- datasets ---- */

static void test_dataset_folder(void) {
    Dataset d, train, val;
    make_folder("set"), make_folder("set/b"), make_folder("set/a"), make_folder("set/a-b"), make_folder("set/b/deep");
    make_folder("set/.hidden"), make_folder("set/nothing");
    CHECK_ERR(dataset_open(&d, in_folder("set"), SPLIT_ALL), "has no pictures");
    make_picture("set/b/x.PNG", 2, 1), make_picture("set/b/deep/y.jpg", 2, 2), make_picture("set/a/z.JpEg", 2, 3);
    make_picture("set/a-b/w.png", 2, 4), make_picture("set/.hidden/h.png", 2, 5), make_picture("set/a/.h.png", 2, 6);
    put_file(in_folder("set/a/notes.txt"), "x", 1);
    put_file(in_folder("set/a/png"), "x", 1);
    CHECK_OK(dataset_open(&d, in_folder("set///"), SPLIT_ALL));
    if (CHECK(d.n == 4 && d.n_classes == 3)) {
        CHECK(!strcmp(d.class_name[0], "a") && !strcmp(d.class_name[1], "a-b") && !strcmp(d.class_name[2], "b"));
        CHECK(strstr(d.path[0], "/set/a-b/w.png") && strstr(d.path[1], "/set/a/z.JpEg")); /* '-' sorts before '/' */
        CHECK(strstr(d.path[2], "/set/b/deep/y.jpg") && strstr(d.path[3], "/set/b/x.PNG"));
        CHECK(d.label[0] == 1 && d.label[1] == 0 && d.label[2] == 2 && d.label[3] == 2);
        CHECK(!strncmp(d.path[0], folder, strlen(folder)) && access(d.path[3], R_OK) == 0);
    }
    dataset_close(&d);
    make_picture("set/loose.png", 2, 7); /* a picture outside the classes: unlabelled */
    CHECK_OK(dataset_open(&d, in_folder("set"), SPLIT_ALL));
    CHECK(d.n == 5 && d.n_classes == 0 && d.label[0] == 0 && d.label[4] == 0);
    dataset_close(&d);
    CHECK(symlink(".", in_folder("set/loop")) == 0);
    CHECK_ERR(dataset_open(&d, in_folder("set"), SPLIT_ALL), "nested deeper");
    CHECK(unlink(in_folder("set/loop")) == 0);
    CHECK_ERR(dataset_open(&d, in_folder("nowhere"), SPLIT_ALL), "nowhere: No such file");

    make_folder("many");
    char name[64];
    for (int i = 0; i < 400; i++) {
        snprintf(name, sizeof name, "many/%d.png", i);
        put_file(in_folder(name), "x", 1);
    }
    CHECK_OK(dataset_open(&train, in_folder("many"), SPLIT_TRAIN));
    CHECK_OK(dataset_open(&val, in_folder("many"), SPLIT_VAL));
    CHECK(train.n + val.n == 400 && val.n >= 8 && val.n <= 36); /* 20 expected, 4.4 standard deviation */
    size_t shared = 0;
    for (size_t i = 0; i < train.n; i++)
        for (size_t k = 0; k < val.n; k++) shared += !strcmp(train.path[i], val.path[k]);
    CHECK(shared == 0);
    dataset_close(&train), dataset_close(&val);
}

static void test_dataset_split_folders(void) {
    Dataset d;
    make_folder("split"), make_folder("split/train"), make_folder("split/val");
    make_folder("split/train/cat"), make_folder("split/train/ant"), make_folder("split/val/cat"),
        make_folder("split/val/bee");
    make_picture("split/train/cat/1.png", 2, 1), make_picture("split/train/ant/2.png", 2, 2);
    CHECK_ERR(dataset_open(&d, in_folder("split"), SPLIT_VAL), "has no validation pictures");
    make_picture("split/val/cat/3.png", 2, 3), make_picture("split/val/bee/4.png", 2, 4);
    for (int split = SPLIT_ALL; split <= SPLIT_VAL; split++) {
        CHECK_OK(dataset_open(&d, in_folder("split"), (Split)split));
        CHECK(d.n == (split == SPLIT_ALL ? 4u : 2u));
        CHECK(d.n_classes == 3 && !strcmp(d.class_name[0], "ant") && !strcmp(d.class_name[1], "bee") &&
              !strcmp(d.class_name[2], "cat"));
        CHECK(d.label[d.n - 1] == 2); /* cat, in either split */
        CHECK(d.label[0] == (split == SPLIT_VAL ? 1 : 0));
        CHECK((strstr(d.path[0], "/val/") != NULL) == (split == SPLIT_VAL));
        dataset_close(&d);
    }
}

static void test_dataset_list(void) {
    Dataset d;
    make_folder("lists");
    make_picture("lists/one.png", 2, 1), make_picture("lists/two words.png", 2, 2);
    char text[1200];
    snprintf(text, sizeof text, "two words.png\r\n\n%s\none.png", in_folder("lists/one.png"));
    put_file(in_folder("lists/a.txt"), text, strlen(text));
    CHECK_OK(dataset_open(&d, in_folder("lists/a.txt"), SPLIT_ALL));
    if (CHECK(d.n == 3 && d.n_classes == 0)) {
        Image im;
        for (size_t i = 0; i < 3; i++) {
            CHECK_OK(image_read(&im, d.path[i]));
            CHECK(im.rgb[1] == (i == 2 ? 2 : 1));
            image_free(&im);
        }
    }
    dataset_close(&d);
    put_file(in_folder("lists/b.txt"), "one.png\n\nthree.png\n", 19);
    CHECK_ERR(dataset_open(&d, in_folder("lists/b.txt"), SPLIT_ALL), "b.txt: line 3: no picture at");
    CHECK(strstr(err_text(), "three.png") != NULL);
    put_file(in_folder("lists/c.txt"), "\n\r\n", 3);
    CHECK_ERR(dataset_open(&d, in_folder("lists/c.txt"), SPLIT_ALL), "has no pictures");
    put_file(in_folder("lists/d.txt"), "", 0);
    CHECK_ERR(dataset_open(&d, in_folder("lists/d.txt"), SPLIT_ALL), "is empty");
    CHECK_ERR(dataset_open(&d, in_folder("lists/one.png"), SPLIT_ALL), "neither a folder nor a text file");
    static char longest[6000];
    memset(longest, 'x', sizeof longest);
    put_file(in_folder("lists/e.txt"), longest, sizeof longest);
    CHECK_ERR(dataset_open(&d, in_folder("lists/e.txt"), SPLIT_ALL), "line 1: longer than");
}

static void test_epoch_order(void) {
    enum { N = 257 };
    uint32_t a[N], b[N];
    uint8_t seen[N] = {0};
    size_t same = 0, in_place = 0;
    epoch_order(a, N, 5, 3);
    for (size_t i = 0; i < N; i++) seen[a[i]]++, in_place += a[i] == i;
    CHECK(!memchr(seen, 0, N) && in_place < 10);
    epoch_order(b, N, 5, 3);
    CHECK(!memcmp(a, b, sizeof a));
    epoch_order(b, N, 5, 4);
    for (size_t i = 0; i < N; i++) same += a[i] == b[i];
    CHECK(same < 10);
    epoch_order(b, N, 6, 3);
    CHECK(memcmp(a, b, sizeof a) != 0);
    epoch_order(b, N, 5, 3 + (1 << 24));
    CHECK(!memcmp(a, b, sizeof a));
    epoch_order(b, 1, 5, 0);
    CHECK(b[0] == 0);
    epoch_order(b, 0, 5, 0);
}

/* ---- the loader ---- */

enum { LOADER_N = 7, LOADER_B = 3, LOADER_SIZE = 4, LOADER_REALS = LOADER_B * 3 * LOADER_SIZE * LOADER_SIZE };

static void make_loader_set(Dataset *d) {
    char name[64];
    make_folder("load"), make_folder("load/p"), make_folder("load/q");
    for (int i = 0; i < LOADER_N; i++) {
        snprintf(name, sizeof name, "load/%s/%d.png", i < 3 ? "p" : "q", i);
        make_picture(name, 9, (uint8_t)(30 * i));
    }
    CHECK_OK(dataset_open(d, in_folder("load"), SPLIT_ALL));
    CHECK(d->n == LOADER_N && d->n_classes == 2);
}

/* Stepping from 0 must give what a loader started at that step gives, and what image_prepare gives by hand. */
static void test_loader_steps(const Dataset *d, Prep prep, int flip) {
    enum { STEPS = 12 }; /* five epochs: the later ones come from memory */
    LoaderConfig c = {.prep = prep, .B = LOADER_B, .size = LOADER_SIZE, .seed = 9, .train = 1, .flip = flip};
    static real kept[STEPS][LOADER_REALS], want[3 * LOADER_SIZE * LOADER_SIZE];
    Loader *l;
    const real *images;
    const int32_t *labels;
    uint32_t order[LOADER_N];
    size_t wrong = 0, flipped = 0;
    CHECK_OK(loader_start(&l, d, &c));
    for (uint64_t s = 0; s < STEPS; s++) {
        CHECK_OK(loader_next(l, &images, &labels));
        memcpy(kept[s], images, sizeof kept[s]);
        for (size_t b = 0; b < LOADER_B; b++) {
            uint64_t epoch = (s * LOADER_B + b) / LOADER_N;
            epoch_order(order, LOADER_N, c.seed, epoch);
            uint32_t i = order[(s * LOADER_B + b) % LOADER_N];
            uint64_t stream = rng_stream(RNG_CROP, epoch, i);
            int random = prep == PREP_IMAGENET, f = flip && rng_uniform(c.seed, stream, 2) < 0.5;
            Image im;
            CHECK_OK(image_read(&im, d->path[i]));
            CHECK_OK(image_prepare(want, &im, prep, LOADER_SIZE, random ? rng_uniform(c.seed, stream, 0) : -1,
                                   random ? rng_uniform(c.seed, stream, 1) : -1, f));
            image_free(&im);
            wrong += memcmp(want, images + b * LOADER_REALS / LOADER_B, sizeof want) != 0 || labels[b] != d->label[i];
            flipped += (size_t)f;
        }
    }
    loader_stop(l);
    CHECK(wrong == 0 && (flip ? flipped > 5 && flipped < 31 : flipped == 0));
    for (c.step = 1; c.step < STEPS; c.step += 4) {
        CHECK_OK(loader_start(&l, d, &c));
        for (uint64_t s = c.step; s < STEPS; s++) {
            CHECK_OK(loader_next(l, &images, &labels));
            CHECK(!memcmp(images, kept[s], sizeof kept[s]));
            if (s > 0) CHECK(memcmp(images, kept[s - 1], sizeof kept[s]) != 0);
        }
        loader_stop(l);
    }
}

/* Without training: in order, unchanged, again and again. */
static void test_loader_eval(const Dataset *d) {
    LoaderConfig c = {.prep = PREP_LSUN, .B = 1, .size = LOADER_SIZE, .seed = 1, .flip = 1};
    Loader *l;
    const real *images;
    const int32_t *labels;
    real want[3 * LOADER_SIZE * LOADER_SIZE];
    CHECK_OK(loader_start(&l, d, &c));
    for (size_t s = 0; s < 2 * LOADER_N; s++) {
        Image im;
        CHECK_OK(loader_next(l, &images, &labels));
        CHECK_OK(image_read(&im, d->path[s % LOADER_N]));
        CHECK_OK(image_prepare(want, &im, PREP_LSUN, LOADER_SIZE, -1, -1, 0));
        CHECK(!memcmp(want, images, sizeof want) && labels[0] == d->label[s % LOADER_N]);
        image_free(&im);
    }
    loader_stop(l);
}

static void test_loader_errors(const Dataset *good) {
    LoaderConfig c = {.prep = PREP_FOLDER, .B = 2, .size = LOADER_SIZE};
    Loader *l;
    const real *images;
    const int32_t *labels;
    Dataset d, none = {0};
    make_folder("broken");
    make_picture("broken/1.png", 5, 1), make_picture("broken/2.png", 5, 2), make_picture("broken/3.png", 5, 3);
    put_file(in_folder("broken/4.png"), "\x89PNG\r\n\x1a\n", 8);
    CHECK_OK(dataset_open(&d, in_folder("broken"), SPLIT_ALL));
    CHECK_OK(loader_start(&l, &d, &c));
    CHECK_OK(loader_next(l, &images, &labels)); /* the batch in front of the broken picture still comes */
    CHECK_ERR(loader_next(l, &images, &labels), "broken/4.png: damaged PNG");
    CHECK_ERR(loader_next(l, &images, &labels), "broken/4.png");
    loader_stop(l);
    dataset_close(&d);
    CHECK_ERR(loader_start(&l, &none, &c), "0 pictures");
    CHECK(l == NULL);
    c.B = 0;
    CHECK_ERR(loader_start(&l, good, &c), "batch 0");
    c.B = 2, c.size = 0;
    CHECK_ERR(loader_start(&l, good, &c), "size 0");
    c.size = 4, c.step = UINT64_MAX / 2;
    CHECK_ERR(loader_start(&l, good, &c), "step");
    loader_stop(NULL);
}

static void test_loader(void) {
    Dataset d;
    make_loader_set(&d);
    test_loader_steps(&d, PREP_FOLDER, 0);
    test_loader_steps(&d, PREP_IMAGENET, 1);
    test_loader_steps(&d, PREP_LSUN, 1);
    test_loader_eval(&d);
    for (int i = 0; i < 40; i++) { /* stopping at any moment */
        LoaderConfig c = {.prep = PREP_FOLDER, .B = 5, .size = 32, .train = 1};
        Loader *l;
        const real *images;
        const int32_t *labels;
        CHECK_OK(loader_start(&l, &d, &c));
        if (i % 4 == 1) usleep((useconds_t)(i * 50));
        for (int k = 0; k < i % 4; k++) CHECK_OK(loader_next(l, &images, &labels));
        loader_stop(l);
    }
    test_loader_errors(&d);
    dataset_close(&d);
}

/* ---- token files ---- */

/* The written token file with `n` bytes at `at` replaced; whether reading it fails with `says`. */
static int tokens_refuse(size_t at, const void *patch, size_t n, const char *says) {
    size_t bytes;
    uint8_t *p = get_file(in_folder("good.tokens"), &bytes);
    Tokens x;
    memcpy(p + at, patch, n);
    put_file(in_folder("bad.tokens"), p, bytes);
    int refused = tokens_read(&x, in_folder("bad.tokens")) != OK && strstr(err_text(), says) && !x.token;
    tokens_free(&x);
    return refused;
}

static void test_tokens(void) {
    enum { N = 5, GRID_H = 3, GRID_W = 2, FLIPS = 2, COUNT = N * FLIPS * GRID_H * GRID_W, HEADER = 64 };
    int32_t label[N] = {0, 3, 1, 2, 1};
    uint16_t token[COUNT];
    for (size_t i = 0; i < COUNT; i++) token[i] = (uint16_t)(i * 997 % 40000);
    Tokens x = {N, GRID_H, GRID_W, 40000, FLIPS, 0x123456789abcdef0u, 77, label, token}, got;
    CHECK_OK(tokens_write(in_folder("good.tokens"), &x));
    CHECK_OK(tokens_read(&got, in_folder("good.tokens")));
    CHECK(got.n == N && got.h == GRID_H && got.w == GRID_W && got.K == 40000 && got.flips == FLIPS);
    CHECK(got.vqgan == x.vqgan && got.source == 77);
    CHECK(!memcmp(got.label, label, sizeof label) && !memcmp(got.token, token, sizeof token));
    tokens_free(&got);
    struct stat st;
    CHECK(stat(in_folder("good.tokens"), &st) == 0 && st.st_size == HEADER + N * 4 + COUNT * 2);

    CHECK(!tokens_refuse(0, "i", 1, "")); /* negative control: an unchanged byte */
    CHECK(tokens_refuse(0, "I", 1, "is not a token file"));
    for (size_t field = 0; field < 5; field++) { /* n h w K flips: nothing, and far too much */
        CHECK(tokens_refuse(8 + field * 8, &(uint64_t){0}, 8, "expected"));
        CHECK(tokens_refuse(8 + field * 8, &(uint64_t){UINT64_MAX}, 8, "expected"));
    }
    CHECK(tokens_refuse(8, &(uint64_t){N + 1}, 8, "its header says"));
    CHECK(tokens_refuse(8, &(uint64_t){1 << 30}, 8, "its header says")); /* before memory is asked for */
    CHECK(tokens_refuse(32, &(uint64_t){100}, 8, "0..99 expected"));     /* K below the tokens */
    CHECK(tokens_refuse(HEADER, &(int32_t){-1}, 4, "label 0 is -1"));
    CHECK(tokens_refuse(HEADER + N * 4 + 6, &(uint16_t){40000}, 2, "token 3 is 40000, 0..39999 expected"));

    size_t bytes;
    uint8_t *p = get_file(in_folder("good.tokens"), &bytes);
    p[bytes] = 0;
    int accepted = 0;
    for (size_t n = 0; n <= bytes + 1; n++) {
        if (n == bytes) continue;
        put_file(in_folder("cut.tokens"), p, n);
        accepted += tokens_read(&got, in_folder("cut.tokens")) == OK;
        tokens_free(&got);
    }
    CHECK(accepted == 0);
    CHECK_ERR(tokens_read(&got, in_folder("none.tokens")), "No such file");
    CHECK_ERR(tokens_read(&got, folder), "not a regular file");
    token[7] = 40000; /* what could not be read is not written */
    CHECK_ERR(tokens_write(in_folder("good.tokens"), &x), "token 7 is 40000");
    CHECK_OK(tokens_read(&got, in_folder("good.tokens")));
    tokens_free(&got);
    token[7] = 0;
    CHECK_ERR(tokens_write(in_folder("no/such.tokens"), &x), "no/such.tokens");
}

int main(void) {
    if (!temporary_folder(folder)) return 1;
    test_dataset_folder();
    test_dataset_split_folders();
    test_dataset_list();
    test_epoch_order();
    test_loader();
    test_tokens();
    nftw(folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    return test_report();
}
