/* test_data.c - datasets, LMDBs, the loader, damaged pictures, token files.
 *
 * test/test_lsun.py asks this program what it makes of pictures: --prepare PRESET SIZE PATH writes the prepared
 * pictures of a dataset as raw bytes to standard output. */
#include "files.h"
#include "test/inside.h"

#include <sys/wait.h>

#include "files/files.h"

#include <math.h>

#ifdef HAVE_LMDB
#include <lmdb.h>
#endif

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
    CHECK_OK(dataset_open(&d, in_folder("set"), SPLIT_ALL)); /* a circle is left out */
    CHECK(d.n == 5 && d.left_out->n[OUT_CIRCLE] == 1);
    dataset_close(&d);
    CHECK(unlink(in_folder("set/loop")) == 0);
    CHECK_ERR(dataset_open(&d, in_folder("nowhere"), SPLIT_ALL), "nowhere: No such file");

    make_folder("many");
    char name[64];
    for (int i = 0; i < 400; i++) {
        snprintf(name, sizeof name, "many/%d.png", i);
        put_file(in_folder(name), "\1", 1);
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
    put_file(in_folder("lists/f.txt"), "one.png\nthree.png\nfour.png\nfive.png\n", 36);
    CHECK_ERR(dataset_open(&d, in_folder("lists/f.txt"), SPLIT_ALL), "line 2: no picture at");
    CHECK(strstr(err_text(), "three.png, and 2 more are missing") != NULL);
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

/* The official lists name pictures; FFHQ lies in folders of a thousand, exported LSUN in nested ones. */
static void test_dataset_lists(void) {
    Dataset d;
    make_folder("ffhq"), make_folder("ffhq/00000"), make_folder("ffhq/01000"), make_folder("ffhq/a"),
        make_folder("ffhq/a/b");
    make_picture("ffhq/00000/00003.png", 2, 3), make_picture("ffhq/00000/00007.png", 2, 7);
    make_picture("ffhq/01000/01001.png", 2, 9), make_picture("ffhq/a/b/ab12.webp", 2, 11);
    put_file(in_folder("train.txt"), "01001.png\n00003.png\nab12.jpg\n", 29);
    put_file(in_folder("val.txt"), "00007.png\n", 10);
    const char *root = in_folder("ffhq"), *list = in_folder("train.txt"), *val = in_folder("val.txt");
    CHECK_OK(dataset_open_lists(&d, root, list, val, SPLIT_TRAIN));
    if (CHECK(d.n == 3)) {
        CHECK(strstr(d.path[0], "/ffhq/00000/00003.png") && strstr(d.path[1], "/ffhq/01000/01001.png"));
        CHECK(strstr(d.path[2], "/ffhq/a/b/ab12.webp") != NULL); /* another extension: told by content */
    }
    dataset_close(&d);
    CHECK_OK(dataset_open_lists(&d, root, list, val, SPLIT_VAL));
    CHECK(d.n == 1 && strstr(d.path[0], "/ffhq/00000/00007.png"));
    dataset_close(&d);
    CHECK_OK(dataset_open_lists(&d, root, list, NULL, SPLIT_ALL)); /* one list: 1 in 20 of it is held out */
    CHECK(d.n == 3);
    dataset_close(&d);
    make_picture("ffhq/00000/01001.png", 2, 4);
    CHECK_ERR(dataset_open_lists(&d, root, list, val, SPLIT_ALL), "train.txt: line 1: '01001.png' could be ");
    CHECK(!d.path && !d.n);
    CHECK(unlink(in_folder("ffhq/00000/01001.png")) == 0);
    put_file(in_folder("val.txt"), "00008.png\n", 10);
    CHECK_ERR(dataset_open_lists(&d, root, list, val, SPLIT_TRAIN), "val.txt: line 1: no picture at");
    CHECK_ERR(dataset_open_lists(&d, in_folder("train.txt"), val, NULL, SPLIT_TRAIN), "is a file; with lists");
}

/* ImageNet as the official code lays it out: classes are synsets in byte order, one file is left out. */
static void test_dataset_imagenet(void) {
    static const char *const folders[] = {"in",
                                          "in/ILSVRC2012_train",
                                          "in/ILSVRC2012_train/data",
                                          "in/ILSVRC2012_train/data/n02085620",
                                          "in/ILSVRC2012_train/data/n01440764",
                                          "in/ILSVRC2012_train/data/n06596364",
                                          "in/ILSVRC2012_validation",
                                          "in/ILSVRC2012_validation/data",
                                          "in/ILSVRC2012_validation/data/n02085620"};
    Dataset d;
    for (size_t i = 0; i < sizeof folders / sizeof *folders; i++) make_folder(folders[i]);
    make_picture("in/ILSVRC2012_train/data/n02085620/a.JPEG", 2, 1);
    make_picture("in/ILSVRC2012_train/data/n01440764/b.JPEG", 2, 2);
    make_picture("in/ILSVRC2012_train/data/n06596364/c.JPEG", 2, 3);
    make_picture("in/ILSVRC2012_train/data/n06596364/n06596364_9591.JPEG", 2, 4);
    make_picture("in/ILSVRC2012_validation/data/n02085620/d.JPEG", 2, 5);
    make_picture("in/readme.png", 2, 6); /* beside the split: not of the set */
    CHECK_OK(dataset_open(&d, in_folder("in"), SPLIT_TRAIN));
    CHECK(d.n == 3 && d.n_classes == 3 && !strcmp(d.class_name[1], "n02085620"));
    if (d.n == 3) CHECK(d.label[0] == 0 && d.label[1] == 1 && d.label[2] == 2 && strstr(d.path[0], "/b.JPEG"));
    dataset_close(&d);
    CHECK_OK(dataset_open(&d, in_folder("in"), SPLIT_VAL));
    CHECK(d.n == 1 && d.n_classes == 3 && d.label[0] == 1);
    dataset_close(&d);
}

/* What is in a set, not where it lies, makes its identity. */
static void test_dataset_identity(void) {
    Dataset d;
    make_folder("id"), make_picture("id/a.png", 2, 1), make_picture("id/b.png", 2, 2);
    CHECK_OK(dataset_open(&d, in_folder("id"), SPLIT_ALL));
    uint64_t before = d.identity;
    dataset_close(&d);
    char path[1100];
    snprintf(path, sizeof path, "%s/./id/", folder);
    CHECK_OK(dataset_open(&d, path, SPLIT_ALL));
    CHECK(d.identity == before);
    dataset_close(&d);
    make_picture("id/b.png", 3, 2); /* another size */
    CHECK_OK(dataset_open(&d, in_folder("id"), SPLIT_ALL));
    CHECK(d.identity != before);
    dataset_close(&d);
}

/* An extension that is no picture's: the content tells. */
static void test_dataset_sniffed(void) {
    Dataset d;
    make_folder("bare"), make_picture("bare/f00ba4", 2, 1);
    put_file(in_folder("bare/README"), "hello\n", 6), put_file(in_folder("bare/x.txt"), "\xff\xd8\xff", 3);
    put_file(in_folder("bare/a.gif"), "GIF89a..........", 16), put_file(in_folder("bare/b.png~"), "x", 1);
    make_picture("bare/sunset 21.07.2019", 2, 2), make_picture("bare/1.jfif", 2, 3), make_folder("bare/@eaDir");
    make_picture("bare/@eaDir/1.png", 2, 2);
    CHECK(symlink("nowhere", in_folder("bare/link.png")) == 0);
    CHECK_OK(dataset_open(&d, in_folder("bare"), SPLIT_ALL));
    CHECK(d.n == 4 && strstr(d.path[0], "/bare/1.jfif") && strstr(d.path[1], "/bare/f00ba4"));
    CHECK(d.left_out->n[OUT_FOREIGN] == 1 && d.left_out->n[OUT_TEMPORARY] == 1 && d.left_out->n[OUT_OTHER] == 1);
    CHECK(d.left_out->n[OUT_SYSTEM] == 1 && d.left_out->n[OUT_LINK] == 1 && d.n_classes == 0);
    dataset_close(&d);
}

/* Which folders are the split: two pictures in each of the names; the classes and how many pictures each side has. */
static void test_dataset_layouts(void) {
    static const struct {
        const char *folder[5];
        size_t classes, train, val;
    } sets[] = {{{"train/a", "train/b", "valid/a"}, 2, 4, 2},
                {{"Train/a", "Val/b"}, 2, 2, 2},
                {{"train/a", "test/a", "test/b"}, 2, 2, 4},
                {{"train/a", "validation/a", "test/c"}, 1, 2, 2},
                {{"train/a", "train/b"}, 2, 3, 1},
                {{"TRAIN"}, 0, 1, 1},
                {{"bus/x", "car", "train"}, 3, 5, 1},
                {{"d", "da", "data", "data.", "e"}, 5, 0, 0},
                {{"train/a", "dev/a", "dev/b"}, 2, 2, 4},
                {{"training_set/a", "training_set/b", "test_set/a"}, 2, 4, 2},
                {{"Train-Images", "valImages"}, 0, 2, 2},
                {{"trainset/a", "eval set/a", "other"}, 1, 2, 2},
                {{"dev", "prod", "eval"}, 3, 0, 0},
                {{"set", "images", "trains"}, 3, 0, 0},
                {{"letters", "test", "train"}, 3, 0, 0},
                {{"train", "val"}, 0, 2, 2}};
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++) {
        char root[32], name[96];
        Dataset train, val;
        snprintf(root, sizeof root, "layout%zu", i);
        make_folder(root);
        for (size_t k = 0; k < 5 && sets[i].folder[k]; k++) {
            const char *slash = strchr(sets[i].folder[k], '/');
            if (slash)
                snprintf(name, sizeof name, "%s/%.*s", root, (int)(slash - sets[i].folder[k]), sets[i].folder[k]);
            if (slash && access(in_folder(name), F_OK)) make_folder(name);
            snprintf(name, sizeof name, "%s/%s", root, sets[i].folder[k]);
            make_folder(name);
            for (int picture = 0; picture < 2; picture++) {
                snprintf(name, sizeof name, "%s/%s/%d.png", root, sets[i].folder[k], picture);
                make_picture(name, 2, picture);
            }
        }
        CHECK_OK(dataset_open(&train, in_folder(root), SPLIT_TRAIN));
        CHECK_OK(dataset_open(&val, in_folder(root), SPLIT_VAL));
        if (!CHECK(train.n_classes == sets[i].classes) ||
            (sets[i].train && !CHECK(train.n == sets[i].train && val.n == sets[i].val)))
            printf("     %s: %zu classes, %zu + %zu\n", root, train.n_classes, train.n, val.n);
        dataset_close(&train), dataset_close(&val);
    }
}

/* A few pictures beside many in class folders are left out where classes are wanted, and belong to the set elsewhere. */
static void test_beside_classes(void) {
    char name[96];
    Dataset d;
    make_folder("beside"), make_folder("beside/cat"), make_folder("beside/dog");
    for (int i = 0; i < 30; i++) {
        snprintf(name, sizeof name, "beside/%s/%d.png", i % 2 ? "cat" : "dog", i), make_picture(name, 2, i);
    }
    make_picture("beside/cover.png", 2, 40), make_picture("beside/zebra.png", 2, 41);
    CHECK_OK(dataset_open(&d, in_folder("beside"), SPLIT_ALL));
    CHECK(d.n == 30 && d.n_classes == 2 && d.left_out->n[OUT_STRAY] == 2);
    dataset_close(&d);
    size_t n = 0;
    for (int split = SPLIT_TRAIN; split <= SPLIT_VAL; split++) {
        CHECK_OK(dataset_open(&d, in_folder("beside"), (Split)(split | SPLIT_FLAT)));
        CHECK(d.left_out->n[OUT_STRAY] == 0 && d.n_classes == 0);
        n += d.n;
        dataset_close(&d);
    }
    CHECK(n == 32);
    make_folder("lost"), make_folder("lost/train"), make_folder("lost/val"), make_picture("lost/train/0.png", 2, 1),
        make_picture("lost/train/1.png", 2, 2);
    CHECK(symlink("nowhere", in_folder("lost/val/0.png")) == 0 && symlink("nowhere", in_folder("lost/val/1.png")) == 0);
    CHECK_ERR(dataset_open(&d, in_folder("lost"), SPLIT_VAL), "has no validation pictures");
    CHECK(strstr(err_text(), "among 2; left out: 2 a link to nothing (such as val/"));
    unlink(in_folder("beside/cover.png")), unlink(in_folder("beside/zebra.png"));
    CHECK_OK(dataset_open(&d, in_folder("beside"), (Split)(SPLIT_ALL | SPLIT_FLAT)));
    CHECK(d.n == 30 && d.n_classes == 2); /* they are there all the same */
    dataset_close(&d);
}

/* However a list names the pictures, the classes are theirs. */
static void test_list_forms(void) {
    static const char *const form[] = {
        "./%s/%d.png\n",       "%s/%d.png\r\n",           "%s/%d.png  \n",
        "train/%s/%d.png\n",   "\357\273\277%s/%d.png\n", "%s\\%d.png\n",
        "%s//%d.png\n",        ".//%s/./%d.png\n",        "%s/%d.png\r",
        "../form/%s/%d.png\n", "train/../%s/%d.png\n",    "../form/train/../%s/.//%d.png\n"};
    char text[4096], line[512];
    Dataset d;
    make_folder("form"), make_folder("form/cat"), make_folder("form/dog"), make_folder("form/train");
    make_folder("form/train/cat"), make_folder("form/train/dog");
    for (int k = 0; k < 2; k++)
        for (int i = 0; i < 3; i++) {
            snprintf(line, sizeof line, "form/%s/%d.png", k ? "dog" : "cat", i), make_picture(line, 2, i);
            snprintf(line, sizeof line, "form/train/%s/%d.png", k ? "dog" : "cat", i), make_picture(line, 2, i);
        }
    for (size_t f = 0; f < sizeof form / sizeof *form + 2; f++) {
        const size_t forms = sizeof form / sizeof *form;
        text[0] = 0;
        for (int k = 0; k < 2; k++)
            for (int i = 0; i < 3; i++) {
                const char *class_name = k ? "dog" : "cat";
                const char *pattern = f < forms ? form[f] : "/%s/%d.png\n";
                if (f < forms && !strncmp(pattern, "\357", 1) && strlen(text)) pattern += 3;
                if (f >= forms) strcat(text, in_folder("form"));
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
                snprintf(line, sizeof line, pattern, class_name, i);
#pragma GCC diagnostic pop
                strcat(text, line);
            }
        put_file(in_folder("form.txt"), text, strlen(text));
        CHECK_OK(dataset_open_lists(&d, in_folder(f == forms + 1 ? "bare" : "form"), in_folder("form.txt"), NULL,
                                    SPLIT_ALL));
        if (!CHECK(d.n == 6 && d.n_classes == 2 && !strcmp(d.class_name[0], "cat") && d.label[0] == 0 &&
                   d.label[5] == 1))
            printf("     form %zu: %zu pictures, %zu classes\n", f, d.n, d.n_classes);
        dataset_close(&d);
    }
    put_file(in_folder("form.txt"), "cat/0.png 3\n", 12);
    CHECK_ERR(dataset_open_lists(&d, in_folder("form"), in_folder("form.txt"), NULL, SPLIT_ALL),
              "a label stands behind");
}

/* What is called a picture and is another kind of file is left out, by kind; a damaged picture and a picture under
 * another format's name are not. */
static void test_foreign_files(void) {
    static const struct {
        const char *name, *bytes, *kind;
    } f[] = {
        {"a.png", "GIF89a....", "3 GIF files (such as a.png)"},
        {"b.jpg", "GIF87a....", NULL},
        {"c.webp", "GIF89a....", NULL},
        {"d.jpg", "BM......", "1 BMP file (such as d.jpg)"},
        {"e.jpeg", "II*\0....", "1 TIFF file (such as e.jpeg)"},
        {"f.png", "<!DOCTYPE html>", "1 HTML file (such as f.png)"},
        {"g.jpg", "not found", "1 text file (such as g.jpg)"},
        {"h.png", "....ftypheic", "1 HEIC file (such as h.png)"},
        {"i.jpg", "%PDF-1.4", "1 PDF file (such as i.jpg)"},
        {"j.png", "", NULL},
        {"k.png", "\x89PNG\r\n", NULL},
    };
    char text[ERR_MAX];
    Dataset d;
    make_folder("kinds");
    for (size_t i = 0; i < sizeof f / sizeof *f; i++) {
        char name[64], bytes[16] = "";
        snprintf(name, sizeof name, "kinds/%s", f[i].name);
        memcpy(bytes, f[i].bytes, strncmp(f[i].bytes, "II*", 3) ? strlen(f[i].bytes) : 8);
        put_file(in_folder(name), bytes,
                 f[i].bytes[0] ? 16 - (f[i].kind != NULL && strstr(f[i].kind, "text") ? 7 : 0) : 0);
    }
    CHECK_OK(dataset_open(&d, in_folder("kinds"), SPLIT_ALL));
    CHECK(d.n == 2 && strstr(d.path[0], "j.png") && strstr(d.path[1], "k.png"));
    left_out_text(text, d.left_out);
    for (size_t i = 0; i < sizeof f / sizeof *f; i++)
        if (f[i].kind && !CHECK(strstr(text, f[i].kind) != NULL)) printf("     %s\n", text);
    dataset_close(&d);
    CHECK(unlink(in_folder("kinds/j.png")) == 0 && unlink(in_folder("kinds/k.png")) == 0);
    CHECK_ERR(dataset_open(&d, in_folder("kinds"), SPLIT_ALL), "left out: 3 GIF files (such as a.png), 1 BMP file");
    make_picture("kinds/l.png", 2, 1), make_picture("kinds/m.png", 2, 1);
    CHECK(rename(in_folder("kinds/l.png"), in_folder("kinds/l.jpg")) == 0);
    CHECK_OK(dataset_open(&d, in_folder("kinds"), SPLIT_ALL));
    CHECK(d.n == 2);
    dataset_close(&d);
    make_folder("sides"), make_folder("sides/train"), make_folder("sides/val");
    make_picture("sides/train/a.png", 2, 1), make_picture("sides/train/b.png", 2, 2);
    put_file(in_folder("sides/val/c.png"), "GIF89a", 6);
    CHECK_OK(dataset_open(&d, in_folder("sides"), SPLIT_VAL)); /* another stands in */
    CHECK(d.n == 1 && strstr(d.path[0], "train/a.png"));
    dataset_close(&d);
}

/* Of an animated PNG the first picture is used, which is said once, however often it is read. */
/* What is said of names is one line without control characters, whatever they hold. */
static void test_names_said(void) {
    static const char name[] = "a\nb\x1b[2J\xc2\x9b\x80.gif";
    char text[ERR_MAX];
    LeftOut out = {0};
    Damage *damage = NULL;
    left_out_note(&out, OUT_STRAY, name);
    left_out_kind(&out, OUT_FOREIGN, "GIF", name);
    left_out_text(text, &out);
    CHECK(strstr(text, "1 GIF file (such as a?b?[2J") && strstr(text, "beside the class folders"));
    CHECK(!strpbrk(text, "\n\x1b\x80\x9b"));
    CHECK_OK(damage_create(&damage, 2));
    damage_note_part(damage, 0, name, "animated");
    (void)err("%s: is empty", name);
    CHECK_OK(damage_note(damage, 1, name));
    damage_text(text, damage, 1);
    CHECK(strstr(text, "1 cannot be read (such as a?b?[2J") && strstr(text, "1 animated (such as a?b?[2J"));
    CHECK(!strpbrk(text, "\n\x1b\x80\x9b"));
    damage_free(damage);
}

static void test_animated_png(void) {
    static const uint8_t animation[] = {0, 0, 0, 8, 'a', 'c', 'T', 'L', 0, 0, 0, 2, 0, 0, 0, 0, 0xf3, 0x8d, 0x93, 0x70};
    enum { HEADER = 33 };
    uint8_t bytes[1024];
    char text[ERR_MAX];
    size_t n;
    Dataset d;
    Image im;
    int damaged;
    make_folder("moving");
    for (int i = 0; i < 3; i++) {
        char name[64];
        snprintf(name, sizeof name, "moving/%d.png", i);
        make_picture(name, 4, (uint8_t)i);
        const uint8_t *p = get_file(in_folder(name), &n);
        memcpy(bytes, p, HEADER), memcpy(bytes + HEADER, animation, sizeof animation);
        memcpy(bytes + HEADER + sizeof animation, p + HEADER, n - HEADER);
        if (i) put_file(in_folder(name), bytes, n + sizeof animation);
    }
    CHECK_OK(dataset_open(&d, in_folder("moving"), SPLIT_ALL));
    for (size_t i = 0; i < 6; i++) {
        CHECK_OK(dataset_picture(&d, i % 3, PREP_FOLDER, 4, &im, &damaged));
        image_free(&im);
    }
    dataset_met(&d, text, 1);
    if (!CHECK(strstr(text, "2 animated PNG, of which the first picture is used (such as ") == text)) puts(text);
    CHECK(strstr(text, "moving/1.png)") != NULL);
    dataset_close(&d);
}

/* Whole ones stand in for those held out that are all damaged; never the last to train on. */
static void test_held_out_damaged(void) {
    Dataset train, val;
    make_folder("held"), make_folder("held/train"), make_folder("held/val");
    make_picture("held/train/a.png", 2, 1), make_picture("held/train/b.png", 2, 2);
    put_file(in_folder("held/val/x.png"), "\1", 1), put_file(in_folder("held/val/y.png"), "", 0);
    CHECK_OK(dataset_open(&train, in_folder("held"), SPLIT_TRAIN));
    CHECK_OK(dataset_open(&val, in_folder("held"), SPLIT_VAL));
    CHECK(train.n == 1 && strstr(train.path[0], "train/b.png"));
    CHECK(val.n == 3 && strstr(val.path[0], "train/a.png"));
    dataset_close(&train), dataset_close(&val);
    make_picture("held/val/z.png", 2, 1);
    CHECK_OK(dataset_open(&train, in_folder("held"), SPLIT_TRAIN));
    CHECK(train.n == 2);
    dataset_close(&train);
}

static void test_one_picture(void) {
    Dataset d;
    make_folder("single"), make_picture("single/a.png", 2, 1);
    CHECK_OK(dataset_open(&d, in_folder("single"), SPLIT_TRAIN));
    CHECK(d.n == 1);
    dataset_close(&d);
    CHECK_OK(dataset_open(&d, in_folder("single"), SPLIT_VAL));
    CHECK(d.n == 0);
    dataset_close(&d);
}

/* ---- LMDBs ---- */

#ifdef HAVE_LMDB
typedef struct {
    const void *key;
    size_t key_bytes;
    const char *file; /* whose bytes are the value */
} Record;

static void write_lmdb(const char *path, unsigned flags, const Record *r, size_t n) {
    MDB_env *env;
    MDB_txn *txn;
    MDB_dbi dbi;
    int code = mdb_env_create(&env);
    if (!code) code = mdb_env_set_mapsize(env, 1 << 24);
    if (!code) code = mdb_env_open(env, path, flags | MDB_NOSYNC | MDB_NOLOCK, 0600);
    if (!code) code = mdb_txn_begin(env, NULL, 0, &txn);
    if (!code) code = mdb_dbi_open(txn, NULL, 0, &dbi);
    for (size_t i = 0; i < n && !code; i++) {
        size_t size;
        uint8_t *bytes = get_file(r[i].file, &size);
        MDB_val key = {r[i].key_bytes, (void *)r[i].key}, value = {size, bytes};
        code = mdb_put(txn, dbi, &key, &value, 0);
    }
    if (!code) code = mdb_txn_commit(txn);
    CHECK(code == 0);
    mdb_env_close(env);
}

/* Keys in their order, odd ones too; values read back whole, by several threads. */
static void test_lmdb_keys(void) {
    Dataset d;
    char path[3][1100];
    make_folder("church_outdoor_train_lmdb");
    for (int i = 0; i < 3; i++) {
        snprintf(path[i], sizeof path[i], "%s/value%d.png", folder, i);
        make_picture(strrchr(path[i], '/') + 1, 40, (uint8_t)(10 + i));
    }
    const Record r[] = {{"zz", 2, path[0]}, {"0a/b.webp", 9, path[1]}, {"\0\1 %\xff", 5, path[2]}};
    write_lmdb(in_folder("church_outdoor_train_lmdb"), 0, r, 3);
    CHECK_OK(dataset_open(&d, in_folder("church_outdoor_train_lmdb"), SPLIT_ALL));
    if (CHECK(d.n == 3 && d.n_classes == 0)) {
        CHECK(strstr(d.path[0], "_train_lmdb/data.mdb/%00%01%20%25%FF") && strstr(d.path[1], "/data.mdb/0a/b.webp"));
        CHECK(strstr(d.path[2], "/data.mdb/zz") != NULL);
        for (size_t i = 0; i < 3; i++) {
            Image im;
            int damaged;
            CHECK_OK(dataset_picture(&d, i, PREP_LSUN, 40, &im, &damaged));
            CHECK(!damaged && im.H == 40 && im.rgb[1] == 12 - i);
            image_free(&im);
        }
    }
    dataset_close(&d);
    make_folder("other"); /* the same file under any name, and by a list that says .jpg */
    write_lmdb(in_folder("other/any.name"), MDB_NOSUBDIR, r, 3);
    CHECK_OK(dataset_open(&d, in_folder("other/any.name"), SPLIT_ALL));
    CHECK(d.n == 3 && strstr(d.path[2], "/any.name/zz"));
    dataset_close(&d);
    put_file(in_folder("keys.txt"), "zz.jpg\n", 7);
    CHECK_OK(dataset_open_lists(&d, in_folder("church_outdoor_train_lmdb"), in_folder("keys.txt"), NULL, SPLIT_ALL));
    CHECK(d.n == 1 && strstr(d.path[0], "/data.mdb/zz"));
    dataset_close(&d);
}

/* Both sides of LSUN's split, two scenes: classes. */
static void test_lmdb_split(void) {
    static const char *const name[] = {"lsun/cat_train_lmdb", "lsun/cat_val_lmdb", "lsun/bed_train_lmdb"};
    Dataset d;
    char path[1100];
    snprintf(path, sizeof path, "%s/one.png", folder);
    make_picture("one.png", 3, 1);
    make_folder("lsun");
    for (int i = 0; i < 3; i++) {
        char key = (char)('a' + i);
        make_folder(name[i]);
        write_lmdb(in_folder(name[i]), 0, &(Record){&key, 1, path}, 1);
    }
    CHECK_OK(dataset_open(&d, in_folder("lsun"), SPLIT_TRAIN));
    CHECK(d.n == 2 && d.n_classes == 2 && !strcmp(d.class_name[0], "bed") && !strcmp(d.class_name[1], "cat"));
    if (d.n == 2) CHECK(d.label[0] == 0 && d.label[1] == 1 && strstr(d.path[1], "cat_train_lmdb/data.mdb/a"));
    dataset_close(&d);
    CHECK_OK(dataset_open(&d, in_folder("lsun"), SPLIT_VAL));
    CHECK(d.n == 1 && d.label[0] == 1);
    dataset_close(&d);
}

/* Every cut, and every byte of the headers that is looked at; liblmdb would crash on most of these. */
static void test_lmdb_damage(void) {
    static uint8_t good[1 << 20];
    Dataset d;
    size_t n, accepted = 0;
    make_folder("bad");
    write_lmdb(in_folder("bad/good.mdb"), MDB_NOSUBDIR, &(Record){"key", 3, in_folder("value0.png")}, 1);
    memcpy(good, get_file(in_folder("bad/good.mdb"), &n), sizeof good);
    CHECK(n >= 3 * 4096 && n < sizeof good);
    const char *path = in_folder("bad/data.mdb"), *set = in_folder("bad");
    CHECK(unlink(in_folder("bad/good.mdb")) == 0);
    for (size_t cut = 0; cut < n; cut += cut < 8300 ? 61 : 1024) {
        put_file(path, good, cut);
        accepted += dataset_open(&d, set, SPLIT_ALL) == OK || !strstr(err_text(), "data.mdb");
        dataset_close(&d);
    }
    CHECK(accepted == 0);
    put_file(path, good, n - 4096);
    CHECK_ERR(dataset_open(&d, set, SPLIT_ALL), "data.mdb: the LMDB is cut short: ");
    put_file(path, "hello", 5);
    CHECK_ERR(dataset_open(&d, set, SPLIT_ALL), "data.mdb: is not an LMDB");
    const struct {
        size_t at;
        uint32_t value;
        const char *says;
    } lies[] = {{16, 0, "is not an LMDB"},          {20, 2, "is an LMDB of format 2"},
                {40, 0, "pages of 0 bytes"},        {40, 3000, "pages of 3000"},
                {4096 + 16, 1, "is not an LMDB"},   {4096 + 40, 8192, "pages of 8192"},
                {4096 + 136, 1 << 20, "cut short"}, {4096 + 140, ~0u, "damaged LMDB"}};
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        uint8_t keep[4];
        memcpy(keep, good + lies[i].at, 4);
        memcpy(good + lies[i].at, &lies[i].value, 4);
        put_file(path, good, n);
        CHECK_ERR(dataset_open(&d, set, SPLIT_ALL), lies[i].says);
        memcpy(good + lies[i].at, keep, 4);
    }
    put_file(path, good, n); /* negative control */
    CHECK_OK(dataset_open(&d, set, SPLIT_ALL));
    CHECK(d.n == 1);
    dataset_close(&d);
    CHECK(unlink(path) == 0);
    write_lmdb(path, MDB_NOSUBDIR, NULL, 0);
    CHECK_ERR(dataset_open(&d, set, SPLIT_ALL), "has no pictures");
}

static unsigned page_word(const uint8_t *file, size_t page, size_t at) {
    return file[page * 4096 + at] | (unsigned)file[page * 4096 + at + 1] << 8;
}

/* A tree of branches and leaves: every key found at its place, or refused; what liblmdb would stop the program at. */
static void test_lmdb_tree(void) {
    enum { KEYS = 300 };
    static uint8_t good[1 << 20];
    static char key[KEYS][200];
    Record record[KEYS];
    Dataset d;
    size_t n, root = 0, leaf = 0;
    for (size_t i = 0; i < KEYS; i++) {
        snprintf(key[i], sizeof key[i], "%0190zu", i);
        record[i] = (Record){key[i], strlen(key[i]), in_folder("value0.png")};
    }
    make_folder("tree");
    const char *path = in_folder("tree/data.mdb"), *set = in_folder("tree");
    write_lmdb(path, MDB_NOSUBDIR, record, KEYS);
    memcpy(good, get_file(path, &n), sizeof good);
    CHECK(n < sizeof good);
    CHECK_OK(dataset_open(&d, set, SPLIT_ALL));
    CHECK(d.n == KEYS);
    dataset_close(&d);
    for (size_t page = 2; page < n / 4096; page++) {
        if (page_word(good, page, 10) == 1 && page_word(good, page, 12) > 16 + 2 * 3) root = page;
        if (page_word(good, page, 10) == 2) leaf = page;
    }
    if (!CHECK(root && leaf)) return;
    uint8_t *offsets = good + leaf * 4096 + 16, keep[2];
    memcpy(keep, offsets, 2), memcpy(offsets, offsets + 2, 2); /* a key twice */
    put_file(path, good, n);
    CHECK_ERR(dataset_open(&d, set, SPLIT_ALL), "out of order");
    memcpy(offsets, keep, 2);
    uint8_t *child = good + root * 4096 + page_word(good, root, 16 + 2 * 2), page[6];
    memcpy(page, child, 6); /* the third page below the root is the first leaf of all once more, or a page of values */
    memcpy(child, good + root * 4096 + page_word(good, root, 16), 6);
    put_file(path, good, n);
    CHECK_ERR(dataset_open(&d, set, SPLIT_ALL), "damaged LMDB: page ");
    memcpy(child, page, 6);
    put_file(path, good, n);
    CHECK_OK(dataset_open(&d, set, SPLIT_ALL));
    dataset_close(&d);
}
/* Pages of keys whose words are anything: an error, or pictures that are there; never a crash. Branches, leaves, values
 * in their page and in pages of their own. */
static void test_lmdb_pages(void) {
    enum { N = 300, PAGE = 4096 };
    static char key[N][8];
    static Record r[N];
    static uint8_t good[1 << 21], bad[1 << 21];
    size_t n, refused = 0, read_all = 0, tried = 0;
    put_file(in_folder("few"), "forty bytes are no picture, but a value.", 40);
    for (size_t i = 0; i < N; i++) {
        snprintf(key[i], sizeof key[i], "%05zu", i * 7);
        r[i] = (Record){key[i], 5, in_folder(i % 3 ? "few" : "value0.png")};
    }
    make_folder("pages");
    const char *path = in_folder("pages/data.mdb"), *set = in_folder("pages");
    write_lmdb(path, MDB_NOSUBDIR, r, N);
    memcpy(good, get_file(path, &n), sizeof good < (1 << 20) ? sizeof good : 1 << 20);
    CHECK(n < 1 << 20);
    for (size_t page = 2; page < n / PAGE; page++) {
        uint16_t flags;
        memcpy(&flags, good + page * PAGE + 10, sizeof flags);
        if (flags != 1 && flags != 2) continue;
        for (size_t k = 0; k < 160; k++, tried++) {
            const uint64_t stream = page << 32 | k;
            const size_t at = page * PAGE + (k < 40 ? k : 2 * rng_below(1, stream, 0, PAGE / 2));
            const uint16_t value = k % 2 ? (uint16_t)rng_below(1, stream, 1, 65536) : (uint16_t)(0xffff << k % 16);
            Dataset d;
            memcpy(bad, good, n);
            memcpy(bad + at, &value, sizeof value);
            put_file(path, bad, n);
            refused += dataset_open(&d, set, SPLIT_ALL) != OK;
            for (size_t i = 0; i < d.n; i++) {
                Image im;
                int damaged = 0;
                read_all += dataset_picture(&d, i, PREP_LSUN, 8, &im, &damaged) == OK;
                image_free(&im);
            }
            dataset_close(&d);
        }
    }
    CHECK(tried > 500 && refused > tried / 8 && read_all > 0);
    put_file(path, good, n); /* negative control */
    Dataset d;
    CHECK_OK(dataset_open(&d, set, SPLIT_ALL));
    CHECK(d.n == N);
    dataset_close(&d);
}

#else
static void test_lmdb_keys(void) {
    Dataset d;
    make_folder("x_lmdb");
    put_file(in_folder("x_lmdb/data.mdb"), "hello", 5);
    CHECK_ERR(dataset_open(&d, in_folder("x_lmdb"), SPLIT_ALL), "data.mdb: is an LMDB, and this build reads none");
    CHECK(strstr(err_text(), "apt-get install liblmdb-dev") != NULL);
    puts("skipped: LMDBs, which this build was made without");
}
static void test_lmdb_split(void) {}
static void test_lmdb_damage(void) {}
static void test_lmdb_tree(void) {}
static void test_lmdb_pages(void) {}
#endif

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

/* As often as the stream says and no other, for any batch; with probability p. */
static void test_label_dropped(void) {
    enum { MICRO = 500, ROWS = 40 };
    size_t dropped = 0, other_seed = 0, wrong = 0;
    for (uint64_t micro = 0; micro < MICRO; micro++)
        for (uint64_t b = 0; b < ROWS; b++) {
            uint32_t r[4];
            philox(r, 5, rng_stream(RNG_LABEL, 0, b), micro);
            const double u = (double)(((uint64_t)r[0] << 32 | r[1]) >> 11) * 0x1p-53;
            const int is = label_dropped(0.1, 5, micro, b);
            wrong += is != (u < 0.1);
            wrong += label_dropped(0, 5, micro, b) + !label_dropped(1, 5, micro, b);
            dropped += (size_t)is, other_seed += is != label_dropped(0.1, 6, micro, b);
        }
    CHECK(wrong == 0);
    CHECK(fabs((double)dropped - 2000) < 4 * sqrt(20000 * 0.1 * 0.9));
    CHECK(other_seed > 3000); /* 3600 are expected of independent ones */
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

enum { WIDE_N = 3, WIDE_CROPS = 5 };

/* Crops to be encoded: in order, each as image_prepare gives it, of a place that is a function of seed, picture and crop;
 * not the same for all, and the same in every epoch, whatever the batch. d: a set of the pictures wide/0.png ... */
static void check_crops(const Dataset *d) {
    enum { PIXELS = 3 * LOADER_SIZE * LOADER_SIZE };
    static real want[PIXELS], first[WIDE_N][WIDE_CROPS * PIXELS];
    for (size_t B = 1; B <= 4; B++) {
        LoaderConfig c = {
            .prep = PREP_IMAGENET, .B = B, .size = LOADER_SIZE, .seed = 9, .mark = 1, .crops = WIDE_CROPS};
        Loader *l;
        size_t wrong = 0, same = 0, at = 0;
        CHECK_OK(loader_start(&l, d, &c));
        while (at < 2 * WIDE_N) {
            const real *images;
            const int32_t *labels;
            CHECK_OK(loader_next(l, &images, &labels));
            for (size_t b = 0; b < B; b++, at++) {
                const size_t i = at % WIDE_N;
                const real *got = images + b * WIDE_CROPS * PIXELS;
                char name[32];
                Image im;
                snprintf(name, sizeof name, "wide/%zu.png", i);
                CHECK_OK(image_read(&im, in_folder(name)));
                for (size_t k = 0; k < WIDE_CROPS; k++) {
                    const uint64_t stream = rng_stream(RNG_CROPS, k, i);
                    CHECK_OK(image_prepare(want, &im, c.prep, LOADER_SIZE, rng_uniform(9, stream, 0),
                                           rng_uniform(9, stream, 1), 0));
                    wrong += memcmp(want, got + k * PIXELS, sizeof want) != 0;
                    same += k > 0 && !memcmp(got, got + k * PIXELS, sizeof want);
                }
                image_free(&im);
                if (B == 1 && at < WIDE_N) memcpy(first[i], got, sizeof first[i]);
                wrong += memcmp(first[i], got, sizeof first[i]) != 0;
            }
        }
        CHECK(wrong == 0 && same < WIDE_N * WIDE_CROPS / 2);
        loader_stop(l);
    }
}

static void make_wide(const char *name, size_t W, int number) {
    Image im = {4, W, NULL};
    CHECK_OK(mem_alloc(&im.rgb, im.H * im.W, 3, "a picture"));
    for (size_t k = 0; k < im.H * im.W * 3; k++) im.rgb[k] = (uint8_t)(k * 7 + (size_t)number);
    CHECK_OK(image_write_png(in_folder(name), &im, NULL));
    image_free(&im);
}

/* Of a folder, and of an LMDB */
static void test_loader_crops(void) {
    Dataset d;
    Loader *l;
    char name[WIDE_N][32];
    make_folder("wide");
    for (int i = 0; i < WIDE_N; i++) {
        snprintf(name[i], sizeof name[i], "wide/%d.png", i);
        make_wide(name[i], 20, i);
    }
    CHECK_OK(dataset_open(&d, in_folder("wide"), SPLIT_ALL));
    check_crops(&d);
    LoaderConfig many = {.prep = PREP_IMAGENET, .B = 1, .size = LOADER_SIZE, .crops = CROPS_MAX + 1};
    CHECK_ERR(loader_start(&l, &d, &many), "65 crops: 0..64 expected");
    dataset_close(&d);
#ifdef HAVE_LMDB
    Record record[WIDE_N];
    for (int i = 0; i < WIDE_N; i++) record[i] = (Record){name[i] + 5, 1, in_folder(name[i])};
    make_folder("wide_lmdb");
    write_lmdb(in_folder("wide_lmdb"), 0, record, WIDE_N);
    CHECK_OK(dataset_open(&d, in_folder("wide_lmdb"), SPLIT_ALL));
    CHECK(d.n == WIDE_N && d.n_lmdb == 1);
    check_crops(&d);
    dataset_close(&d);
#endif
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
    char first[1000];
    Dataset d, none = {0};
    make_folder("gone");
    make_picture("gone/1.png", 5, 1), make_picture("gone/2.png", 5, 2), make_picture("gone/3.png", 5, 3);
    make_picture("gone/4.png", 5, 4);
    CHECK_OK(dataset_open(&d, in_folder("gone"), SPLIT_ALL));
    CHECK(unlink(in_folder("gone/4.png")) == 0); /* a picture that goes away is skipped and counted */
    CHECK_OK(loader_start(&l, &d, &c));
    CHECK_OK(loader_next(l, &images, &labels));
    CHECK_OK(loader_next(l, &images, &labels));
    loader_stop(l);
    CHECK(dataset_damaged(&d) == 1);
    CHECK(rename(in_folder("gone"), in_folder("went")) == 0); /* a disk that goes away is no damaged picture */
    CHECK_OK(loader_start(&l, &d, &c));
    CHECK_ERR(loader_next(l, &images, &labels), ".png: No such file"); /* whose, threads decide */
    snprintf(first, sizeof first, "%s", err_text());
    CHECK_ERR(loader_next(l, &images, &labels), first);
    loader_stop(l);
    CHECK(dataset_damaged(&d) == 1);
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

/* Six pictures, of which 1 (empty), 3 (cut short), 4 (foreign) and 5 (too long for its preset) are damaged. */
static void make_damaged_set(void) {
    size_t n;
    if (access(in_folder("broken"), F_OK) != 0) make_folder("broken");
    for (int i = 0; i < 6; i++) {
        char name[64];
        snprintf(name, sizeof name, "broken/%d.png", i);
        make_picture(name, 9, (uint8_t)(30 * i));
    }
    put_file(in_folder("broken/1.png"), "", 0);
    uint8_t *bytes = get_file(in_folder("broken/3.png"), &n);
    put_file(in_folder("broken/3.png"), bytes, n - 9);
    put_file(in_folder("broken/4.png"), "\1\2\3\4", 4);
    Image im = picture(1, 20000);
    CHECK_OK(image_write_png(in_folder("broken/5.png"), &im, NULL));
    image_free(&im);
}

/* Whether a batch row is picture i of the set, prepared. */
static int is_picture_of(const real *row, const Dataset *d, size_t i) {
    static real want[3 * LOADER_SIZE * LOADER_SIZE];
    Image im;
    CHECK_OK(image_read(&im, d->path[i]));
    CHECK_OK(image_prepare(want, &im, PREP_FFHQ, LOADER_SIZE, -1, -1, 0));
    image_free(&im);
    return memcmp(row, want, sizeof want) == 0;
}

static void test_damaged_pictures(void) {
    LoaderConfig c = {.prep = PREP_FFHQ, .B = 6, .size = LOADER_SIZE};
    enum { ROW = 3 * LOADER_SIZE * LOADER_SIZE };
    static const size_t stands_in[6] = {0, 2, 2, 0, 0, 0};
    Loader *l;
    const real *images;
    const int32_t *labels;
    Dataset d;
    size_t n;
    make_damaged_set();
    CHECK_OK(dataset_open(&d, in_folder("broken"), SPLIT_ALL));
    CHECK_OK(loader_start(&l, &d, &c));
    for (int epoch = 0; epoch < 3; epoch++) {
        CHECK_OK(loader_next(l, &images, &labels));
        for (size_t b = 0; b < 6; b++) CHECK(is_picture_of(images + b * ROW, &d, stands_in[b]));
    }
    CHECK(!is_picture_of(images + ROW, &d, 0)); /* negative control */
    loader_stop(l);
    CHECK(dataset_damaged(&d) == 4);
    c.mark = 1;
    CHECK_OK(loader_start(&l, &d, &c));
    CHECK_OK(loader_next(l, &images, &labels));
    for (size_t b = 0; b < 6; b++) CHECK(labels[b] == (b == 0 || b == 2 ? 0 : -1));
    CHECK(is_picture_of(images + 2 * ROW, &d, 2));
    loader_stop(l);
    CHECK(dataset_damaged(&d) == 4);

    const char *list = in_folder("skipped.txt"), *other = "/else/where.png\tis empty\n";
    put_file(list, other, strlen(other));
    CHECK_OK(dataset_write_damaged(&d, list));
    CHECK_OK(dataset_write_damaged(&d, list)); /* twice is once */
    char *text = (char *)get_file(list, &n), want[4096];
    text[n] = 0;
    snprintf(want, sizeof want,
             "%s/broken/1.png\tis empty\n%s/broken/3.png\tdamaged PNG: the file is cut short\n%s/broken/4.png\tis "
             "neither PNG",
             folder, folder, folder);
    CHECK((strncmp(folder, other, 5) > 0 ? strstr(text, other) == text : strstr(text, other) != NULL));
    if (!CHECK(strstr(text, want) != NULL)) printf("     %s", text);
    CHECK(strstr(text, "/broken/5.png\ta picture of ") != NULL);
    size_t lines = 0;
    for (size_t i = 0; i < n; i++) lines += text[i] == '\n';
    CHECK(lines == 5);
    dataset_close(&d);
    put_file(in_folder("broken/0.png"), "\1", 1), put_file(in_folder("broken/2.png"), "\1", 1);
    CHECK_OK(dataset_open(&d, in_folder("broken"), SPLIT_ALL));
    c.mark = 0;
    CHECK_OK(loader_start(&l, &d, &c));
    CHECK_ERR(loader_next(l, &images, &labels), "none of the 6 pictures can be read: 6 cannot be read (such as ");
    CHECK(strstr(err_text(), "broken/") != NULL);
    loader_stop(l);
    dataset_close(&d);
}

#ifdef HAVE_WEBP
static void test_webp_left_out(void) {}
#else
/* A WebP is no damaged picture where the library for it is missing: training stops and says so. */
static void test_webp_left_out(void) {
    LoaderConfig c = {.B = 1, .size = 4};
    Loader *l;
    const real *images;
    const int32_t *labels;
    Dataset d;
    make_folder("webp");
    put_file(in_folder("webp/a.webp"), "RIFF\x10\0\0\0WEBPVP8 ", 16);
    CHECK_OK(dataset_open(&d, in_folder("webp"), SPLIT_ALL));
    CHECK_OK(loader_start(&l, &d, &c));
    CHECK_ERR(loader_next(l, &images, &labels), "webp/a.webp: is a WebP file, and this build reads none");
    CHECK(dataset_damaged(&d) == 0);
    loader_stop(l);
    dataset_close(&d);
}
#endif

/* The same batches for any number of readers and from any step, damaged pictures among them. */
static void test_damaged_order(void) {
    enum { STEPS = 9, B = 4, ROW = 3 * LOADER_SIZE * LOADER_SIZE };
    static real kept[STEPS][B * ROW];
    LoaderConfig c = {.prep = PREP_LSUN, .B = B, .size = LOADER_SIZE, .seed = 3, .train = 1};
    Dataset d;
    Loader *l;
    const real *images;
    const int32_t *labels;
    make_damaged_set();
    for (int threads = 1; threads <= 5; threads += 2)
        for (c.step = 0; c.step < STEPS; c.step += threads == 1 ? STEPS : 4) {
            threads_set(threads);
            CHECK_OK(dataset_open(&d, in_folder("broken"), SPLIT_ALL));
            CHECK_OK(loader_start(&l, &d, &c));
            for (uint64_t s = c.step; s < STEPS; s++) {
                CHECK_OK(loader_next(l, &images, &labels));
                if (threads == 1) memcpy(kept[s], images, sizeof kept[s]);
                CHECK(memcmp(kept[s], images, sizeof kept[s]) == 0);
            }
            loader_stop(l);
            dataset_close(&d);
        }
    threads_set(0);
    CHECK(memcmp(kept[0], kept[1], sizeof kept[0]) != 0);
}

static void test_loader(void) {
    Dataset d;
    make_loader_set(&d);
    test_loader_steps(&d, PREP_FOLDER, 0);
    test_loader_steps(&d, PREP_IMAGENET, 1);
    test_loader_steps(&d, PREP_LSUN, 1);
    test_loader_eval(&d);
    test_loader_crops();
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
    Tokens x = {N, GRID_H, GRID_W, 40000, FLIPS, 1, 0x123456789abcdef0u, 77, label, token}, got;
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

/* Several crops a picture: another version of the header, which every byte of is checked. One crop has the first. */
static void test_tokens_crops(void) {
    enum { N = 2, CROPS = 3, COUNT = N * CROPS * 2 * 4, HEADER = 72 };
    int32_t label[N] = {1, 0};
    uint16_t token[COUNT];
    for (size_t i = 0; i < COUNT; i++) token[i] = (uint16_t)(i * 7);
    Tokens x = {N, 2, 2, 1000, 2, CROPS, 5, 6, label, token}, got;
    CHECK_OK(tokens_write(in_folder("good.tokens"), &x));
    CHECK_OK(tokens_read(&got, in_folder("good.tokens")));
    CHECK(got.n == N && got.flips == 2 && got.crops == CROPS && got.vqgan == 5 && got.source == 6);
    CHECK(!memcmp(got.label, label, sizeof label) && !memcmp(got.token, token, sizeof token));
    tokens_free(&got);
    struct stat st;
    CHECK(stat(in_folder("good.tokens"), &st) == 0 && st.st_size == HEADER + N * 4 + COUNT * 2);
    CHECK(!tokens_refuse(0, "ibtokns2", 8, ""));
    CHECK(tokens_refuse(0, "ibtokns3", 8, "is not a token file"));
    CHECK(tokens_refuse(0, "ibtokens", 8, "its header says")); /* which has no crops */
    for (size_t field = 0; field < 5; field++) CHECK(tokens_refuse(8 + field * 8, &(uint64_t){0}, 8, "expected"));
    for (uint64_t crops = 0; crops < 2; crops++) CHECK(tokens_refuse(64, &crops, 8, "crops, 2..64 expected"));
    CHECK(tokens_refuse(64, &(uint64_t){2}, 8, "its header says"));
    CHECK(tokens_refuse(64, &(uint64_t){65}, 8, "65 crops, 1..64 expected"));
    CHECK(tokens_refuse(64, &(uint64_t){UINT64_MAX}, 8, "expected"));
    CHECK(tokens_refuse(HEADER + N * 4 + 6, &(uint16_t){1000}, 2, "token 3 is 1000, 0..999 expected"));
    size_t bytes, accepted = 0;
    uint8_t *p = get_file(in_folder("good.tokens"), &bytes);
    for (size_t n = 0; n < bytes; n++) {
        put_file(in_folder("cut.tokens"), p, n);
        accepted += tokens_read(&got, in_folder("cut.tokens")) == OK;
        tokens_free(&got);
    }
    CHECK(accepted == 0);
    x.crops = CROPS_MAX + 1;
    CHECK_ERR(tokens_write(in_folder("good.tokens"), &x), "65 crops");
}

enum { PART_N = 10, PART_EACH = 2 * 3 * 2 };

/* Picture i's label (2 and 5 are damaged) and tokens, appended. */
static void append(TokensPart *p, size_t upto) {
    while (p->done < upto) {
        int32_t token[PART_EACH];
        size_t i = p->done;
        for (size_t k = 0; k < PART_EACH; k++) token[k] = (int32_t)(i * 31 + k);
        CHECK_OK(tokens_append(p, i == 2 || i == 5 ? -1 : (int32_t)i, token));
    }
}

/* An encoding that stops, again and again, and the file at its end. */
static void test_tokens_part(void) {
    Tokens sizes = {PART_N, 3, 2, 1000, 2, 1, 11, 22, NULL, NULL}, x, back;
    TokensPart p;
    size_t n;
    const char *path = in_folder("enc.tokens"), *part = in_folder("enc.tokens.part");
    CHECK_OK(tokens_start(&p, path, &sizes, 4));
    CHECK(p.done == 0);
    append(&p, 7);
    CHECK_ERR(tokens_finish(&p, &x), "7 of 10 pictures are encoded");
    tokens_stop(&p);
    CHECK(access(path, F_OK) != 0);
    CHECK_OK(tokens_start(&p, path, &sizes, 4)); /* whole batches only */
    CHECK(p.done == 4);
    append(&p, 9);
    tokens_stop(&p);
    uint8_t *bytes = get_file(part, &n);
    bytes[64 + 8 * (8 + 4 + PART_EACH * 2) + 20] ^= 1; /* record 8 */
    put_file(part, bytes, n - 1);                      /* and 9 is torn */
    CHECK_OK(tokens_start(&p, path, &sizes, 2));
    CHECK(p.done == 8);
    tokens_stop(&p);
    bytes = get_file(part, &n);
    bytes[64 + 3 * (8 + 4 + PART_EACH * 2) + 3] ^= 1; /* a checksum */
    put_file(part, bytes, n);
    CHECK_OK(tokens_start(&p, path, &sizes, 1));
    CHECK(p.done == 3);
    append(&p, PART_N);
    tokens_stop(&p);
    CHECK_OK(tokens_start(&p, path, &sizes, 4)); /* all of them, though no multiple of 4 */
    CHECK(p.done == PART_N);
    CHECK_OK(tokens_finish(&p, &x));
    tokens_stop(&p);
    CHECK(access(part, F_OK) != 0);
    CHECK_OK(tokens_read(&back, path));
    CHECK(x.n == 8 && back.n == 8 && back.vqgan == 11 && back.source == 22);
    CHECK(!memcmp(x.label, back.label, 8 * sizeof *x.label) && !memcmp(x.token, back.token, 8 * PART_EACH * 2));
    CHECK(back.label[1] == 1 && back.label[2] == 3 && back.label[4] == 6 &&
          back.token[2 * PART_EACH + 5] == 3 * 31 + 5);
    tokens_free(&x), tokens_free(&back);
    for (int what = 0; what < 5; what++) { /* another first stage, dataset, number of pictures, flips, crops: afresh */
        Tokens other = sizes;
        CHECK_OK(tokens_start(&p, path, &sizes, 1));
        append(&p, 5);
        tokens_stop(&p);
        other.vqgan += what == 0, other.source += what == 1, other.n -= what == 2, other.flips -= what == 3;
        other.crops += what == 4;
        CHECK_OK(tokens_start(&p, path, &other, 1));
        CHECK(p.done == 0);
        tokens_stop(&p);
    }
    sizes.n = 1;
    CHECK_OK(tokens_start(&p, path, &sizes, 1));
    CHECK_OK(tokens_append(&p, -1, (int32_t[PART_EACH]){0}));
    CHECK_ERR(tokens_finish(&p, &x), "none of the 1 pictures can be read");
    tokens_stop(&p);
    CHECK_ERR(tokens_start(&p, in_folder("no/such.tokens"), &sizes, 1), "no/such.tokens.part");
}

/* The same with crops: what was encoded goes on, and not as one crop */
static void test_tokens_part_crops(void) {
    Tokens sizes = {PART_N, 3, 1, 1000, 1, 4, 11, 22, NULL, NULL}, x; /* as many tokens a picture */
    TokensPart p;
    const char *path = in_folder("crops.tokens");
    CHECK_OK(tokens_start(&p, path, &sizes, 2));
    append(&p, 7);
    tokens_stop(&p);
    CHECK_OK(tokens_start(&p, path, &sizes, 2));
    CHECK(p.done == 6);
    append(&p, PART_N);
    CHECK_OK(tokens_finish(&p, &x));
    tokens_stop(&p);
    CHECK(x.n == 8 && x.crops == 4 && x.token[2 * PART_EACH + 5] == 3 * 31 + 5);
    tokens_free(&x);
    CHECK_OK(tokens_read(&x, path));
    CHECK(x.n == 8 && x.crops == 4 && x.token[7 * PART_EACH + 11] == 9 * 31 + 11);
    tokens_free(&x);
}

/* ---- which crop a step sees ---- */

/* Anew each epoch: all crops and mirrorings equally often, one as often after itself as after another; of the mirroring
 * what it was before there were several crops. Where classes are balanced, within an epoch too. */
static void test_choose_crop(void) {
    enum { N = 7, CROPS_OF = 4, EPOCHS = 600, ALL = N * EPOCHS };
    const Tokens x = {.n = N, .flips = 2, .crops = CROPS_OF}, one = {.n = N, .flips = 2, .crops = 1};
    size_t often[CROPS_OF][2] = {{0}}, again = 0, wrong = 0, last[N] = {0}, balanced[CROPS_OF] = {0}, crop, flip, f, c;
    for (uint64_t at = 0; at < ALL; at++) {
        const uint64_t epoch = at / N;
        const size_t i = at % N;
        choose_crop(&crop, &flip, &x, 5, at, epoch, i, 0);
        often[crop][flip]++;
        again += epoch > 0 && crop == last[i];
        last[i] = crop;
        choose_crop(&c, &f, &x, 5, at + 3, epoch, i, 0); /* not of the number */
        wrong += c != crop || f != flip;
        choose_crop(&c, &f, &one, 5, at, epoch, i, 0);
        wrong += c != 0 || f != flip || f != rng_below(5, rng_stream(RNG_CROP, epoch, i), 0, 2);
        choose_crop(&c, &f, &x, 5, at, 0, 3, 1); /* the same picture again and again */
        balanced[c]++;
        wrong += f != rng_below(5, rng_stream(RNG_CROP, 0, 3), 0, 2);
    }
    const double each = ALL / (2.0 * CROPS_OF), p = 1.0 / CROPS_OF, repeats = (ALL - N) * p;
    for (size_t k = 0; k < 2 * CROPS_OF; k++) CHECK(fabs((double)often[k / 2][k % 2] - each) < 4 * sqrt(each));
    for (size_t k = 0; k < CROPS_OF; k++) CHECK(fabs((double)balanced[k] - 2 * each) < 4 * sqrt(2 * each));
    CHECK(fabs((double)again - repeats) < 4 * sqrt(repeats * (1 - p)));
    CHECK(wrong == 0);
}

/* Two processes: the second waits, and finds nothing of its own to go on with. */
static void test_tokens_wait(void) {
    Tokens sizes = {PART_N, 3, 2, 1000, 2, 1, 11, 22, NULL, NULL}, x;
    TokensPart p;
    int status = 1, ready[2];
    char byte;
    const char *path = in_folder("wait.tokens");
    CHECK(pipe(ready) == 0);
    pid_t child = fork();
    if (child == 0) {
        int bad = tokens_start(&p, path, &sizes, 1) != OK;
        bad |= write(ready[1], "x", 1) != 1;
        usleep(100000);
        append(&p, PART_N);
        _exit(bad || tokens_finish(&p, &x) != OK);
    }
    CHECK(read(ready[0], &byte, 1) == 1);
    CHECK_OK(tokens_start(&p, path, &sizes, 1));
    CHECK(p.done == 0 && access(path, F_OK) == 0); /* the other one's file is there before we have the lock */
    tokens_stop(&p);
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    close(ready[0]), close(ready[1]);
}

/* What test_lsun.py compares with Pillow and OpenCV: every picture of a set, (size,size,3) bytes. */
static int prepare(const char *preset, size_t size, const char *path) {
    static const char *const presets[] = {"folder", "ffhq", "imagenet", "lsun"};
    LoaderConfig c = {.B = 1, .size = size};
    int prep = 0;
    Dataset d;
    Loader *l = NULL;
    const real *x;
    const int32_t *label;
    while (prep < 4 && strcmp(preset, presets[prep]) != 0) prep++;
    c.prep = (Prep)prep;
    Err e = dataset_open(&d, path, SPLIT_ALL);
    if (e == OK) e = loader_start(&l, &d, &c);
    for (size_t i = 0; e == OK && i < d.n; i++) {
        e = loader_next(l, &x, &label);
        for (size_t k = 0; k < 3 * size * size && e == OK; k++)
            putchar((int)lrint(((double)x[k % 3 * size * size + k / 3] + 1) * 127.5));
    }
    loader_stop(l);
    if (e != OK) fprintf(stderr, "%s\n", err_text());
    dataset_close(&d);
    return e != OK || fflush(stdout) != 0;
}

int main(int argc, char **argv) {
    if (argc == 5 && !strcmp(argv[1], "--prepare")) return prepare(argv[2], (size_t)atol(argv[3]), argv[4]);
    if (!temporary_folder(folder)) return 1;
    test_dataset_folder();
    test_dataset_split_folders();
    test_dataset_list();
    test_dataset_lists();
    test_dataset_imagenet();
    test_dataset_identity();
    test_dataset_sniffed();
    test_dataset_layouts();
    test_list_forms();
    test_beside_classes();
    test_one_picture();
    test_foreign_files();
    test_names_said();
    test_animated_png();
    test_held_out_damaged();
    test_lmdb_keys();
    test_lmdb_split();
    test_lmdb_damage();
    test_lmdb_tree();
    test_lmdb_pages();
    test_epoch_order();
    test_label_dropped();
    test_loader();
    test_damaged_pictures();
    test_damaged_order();
    test_webp_left_out();
    test_tokens();
    test_tokens_crops();
    test_tokens_part();
    test_tokens_part_crops();
    test_choose_crop();
    test_tokens_wait();
    nftw(folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    return test_report();
}
