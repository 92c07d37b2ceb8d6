/* test_classes.c - classes by number, synset and name; the list of ImageNet's classes is what it should be. */
#include "test.h"

#include <unistd.h>

/* 1000 lines "n01440764 tench, Tinca tinca", sorted, each once, as every ImageNet recipe of the repository gets
 * them. */
static void open_imagenet(Classes *m, const char *recipe) {
    Config c = {0};
    CHECK_OK(recipe_read(&c, recipe, 1));
    CHECK_OK(classes_open(m, config_get(&c, "", "imagebart.classes"), 1000));
    CHECK(m->n == 1000);
    int sorted = 1, whole = 1;
    for (size_t i = 0; i < m->n; i++) {
        const char *text = m->name[i];
        whole &= text[0] == 'n' && strspn(text + 1, "0123456789") == 8 && text[9] == ' ' && strlen(text) > 11;
        sorted &= i == 0 || strncmp(m->name[i - 1], text, 9) < 0;
    }
    CHECK(whole);
    CHECK(sorted);
    config_free(&c);
}

static int label_of(const Classes *m, const char *name) {
    int32_t label = -1;
    CHECK_OK(classes_find(m, name, &label));
    return (int)label;
}

static void test_imagenet(void) {
    Classes m = {0};
    int32_t label;
    char title[CLASS_TITLE_BYTES];
    open_imagenet(&m, "models/imagenet.txt");
    CHECK(label_of(&m, "0") == 0 && label_of(&m, "207") == 207 && label_of(&m, "999") == 999);
    CHECK(label_of(&m, "n01440764") == 0 && label_of(&m, "n02099601") == 207 && label_of(&m, "n15075141") == 999);
    CHECK(label_of(&m, "golden retriever") == 207 && label_of(&m, "Golden Retriever") == 207);
    CHECK(label_of(&m, "GOLDEN RET") == 207);
    CHECK(label_of(&m, "tinca tinca") == 0);
    CHECK(label_of(&m, "man-eater") == 2);        /* the third of five names */
    CHECK(label_of(&m, "N02012849") == 134);      /* crane, the bird */
    CHECK(label_of(&m, "tank suit") == 639);      /* the second maillot */
    CHECK(label_of(&m, "projectile") == 744);     /* the first missile of two */
    CHECK(label_of(&m, "Cardigan Welsh") == 264); /* a part of one name */
    Classes hostile;
    CHECK_OK(classes_open(&hostile, "a\033]0;pwned\a,\302\2332J\342\200\256b", 2));
    CHECK(!strcmp(class_title(title, &hostile, 0), "a?]0;pwned?") && !strcmp(class_title(title, &hostile, 1), "?2J?b"));
    classes_free(&hostile);
    CHECK(!strcmp(class_title(title, &m, 207), "golden retriever") && !strcmp(class_title(title, &m, 0), "tench"));
    CHECK_ERR(classes_find(&m, "crane", &label),
              "several; give a number or a synset: 134 n02012849 crane, 517 n03126707");
    CHECK_ERR(classes_find(&m, "maillot", &label), "638 n03710637 maillot, 639 n03710721 maillot");
    CHECK_ERR(classes_find(&m, "cardigan", &label), "264 n02113186 Cardigan, 474 n02963159 cardigan");
    CHECK_ERR(classes_find(&m, "Missile", &label), "657 n03773504 missile, 744 n04008634 projectile");
    CHECK_ERR(classes_find(&m, "retriever", &label), "could be any of 205 n02099267 flat-coated retriever, 206 ");
    CHECK_ERR(classes_find(&m, "tench, Tinca", &label), "expected one of 0 n01440764 tench, 1 "); /* no one name */
    CHECK_ERR(classes_find(&m, "dragon slayer", &label), "expected one of");
    CHECK_ERR(classes_find(&m, "n99999999", &label), "expected one of");
    CHECK_ERR(classes_find(&m, "1000", &label), "0..999");
    CHECK_OK(classes_find(&m, "0000000001", &label));
    CHECK_ERR(classes_find(&m, "00000000001", &label), "0..999");
    CHECK_ERR(classes_find(&m, "", &label), "expected one of");
    CHECK(classes_named(&m, "crane", &label) == 2 && label == 134);
    CHECK(classes_named(&m, "retriever", &label) == 0);
    classes_free(&m);
    open_imagenet(&m, "models/imagenet4.txt");
    classes_free(&m);
    CHECK_ERR(classes_open(&m, NULL, SIZE_MAX), "class names");
    classes_free(&m);
}

/* Training keeps the names if the folders are the synsets; else the folders name the classes. */
static void test_folders(void) {
    Classes m = {0};
    Config c = {0};
    char *folder[1000], *few[] = {(char[]){"cat"}, (char[]){"dog"}};
    open_imagenet(&m, "models/imagenet.txt");
    for (size_t i = 0; i < 1000; i++) {
        CHECK_OK(mem_alloc(&folder[i], 10, 1, "a folder"));
        memcpy(folder[i], m.name[i], 9);
    }
    CHECK_OK(recipe_read(&c, "models/imagenet.txt", 1));
    CHECK_OK(classes_from_folders(&c, folder, 1000));
    CHECK(strstr(config_get(&c, "", "imagebart.classes"), "n02099601 golden retriever\n") != NULL);
    CHECK_OK(classes_from_folders(&c, folder, 999)); /* another set of pictures */
    CHECK(strstr(config_get(&c, "", "imagebart.classes"), "golden") == NULL);
    CHECK(strlen(config_get(&c, "", "imagebart.classes")) == 22 + 999 * 10);
    CHECK_OK(classes_from_folders(&c, few, 2));
    CHECK(!strcmp(config_get(&c, "", "imagebart.classes"), "# folders, one a line\ncat\ndog\n"));
    for (size_t i = 0; i < 1000; i++) free(folder[i]);
    config_free(&c);
    classes_free(&m);
}

/* Whatever a folder is called is one class, found by that name under its own label. Old models: between commas. */
static void test_folder_names(void) {
    char *folder[] = {(char[]){" blank"},
                      (char[]){"#1"},
                      (char[]){"'q' \"d\""},
                      (char[]){"a,b"},
                      (char[]){"b"},
                      (char[]){"back\\"},
                      (char[]){"blank "},
                      (char[]){"c=d, e"},
                      (char[]){"caf\303\251"},
                      (char[]){"hot dog, mustard"},
                      (char[]){"n01440764 tench, Tinca"}};
    enum { N = sizeof folder / sizeof *folder };
    static const char *const bad[] = {"a\nb", "caf\351", "\355\240\200", "\300\257"};
    char title[CLASS_TITLE_BYTES], *one[1];
    Classes m = {0};
    Config c = {0};
    CHECK_OK(classes_from_folders(&c, folder, N));
    CHECK_OK(classes_open(&m, config_get(&c, "", "imagebart.classes"), N));
    CHECK(m.n == N);
    for (size_t i = 0; i < m.n; i++) {
        CHECK(label_of(&m, folder[i]) == (int)i);
        CHECK(!strcmp(class_title(title, &m, i), folder[i]));
    }
    CHECK(label_of(&m, "mustard") == 9); /* a part that no other has */
    classes_free(&m);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        one[0] = strdup(bad[i]);
        CHECK_ERR(classes_from_folders(&c, one, 1), "rename it");
        free(one[0]);
    }
    CHECK_OK(classes_open(&m, "animals and plants,faces,x", 3));
    CHECK(m.n == 3 && label_of(&m, "faces") == 1 && label_of(&m, "x") == 2);
    classes_free(&m);
    config_free(&c);
}

/* Names that look the same, in both of Unicode's forms, as folders and as what is typed */
static void test_unicode(void) {
    static const char *const form[][2] = {{"caf\u00e9", "cafe\u0301"},
                                          {"\u00c5ngstr\u00f6m", "A\u030angstro\u0308m"},
                                          {"gar\u00e7on", "garc\u0327on"},
                                          {"\u0141\u00f3d\u017a", "\u0141o\u0301dz\u0301"},
                                          {"\u010de\u0161tina", "c\u030ces\u030ctina"},
                                          {"\u0151z", "o\u030bz"},
                                          {"\u0119\u0101\u0103\u0117", "e\u0328a\u0304a\u0306e\u0307"},
                                          {"\u00f1u\u00ee\u00e0", "n\u0303ui\u0302a\u0300"},
                                          {"\u00df\u00f8\u00e6", "\u00df\u00f8\u00e6"}};
    for (size_t i = 0; i < sizeof form / sizeof *form; i++)
        for (int k = 0; k < 2; k++) {
            Classes m = {0};
            char list[128];
            snprintf(list, sizeof list, "# folders, one a line\nother\n%s\ncafx", form[i][k]);
            CHECK_OK(classes_open(&m, list, 3));
            CHECK(label_of(&m, form[i][0]) == 1 && label_of(&m, form[i][1]) == 1);
            snprintf(list, sizeof list, "%s", form[i][!k]);
            CHECK(label_of(&m, list) == 1);
            classes_free(&m);
        }
    Classes m = {0};
    int32_t label;
    CHECK_OK(classes_open(&m, "# folders, one a line\ncaf\u00e9\ncafe\u0301\ncafe\ncaf\u00e8\n\xc3\nb\xc5", 6));
    CHECK(label_of(&m, "caf\u00e9") == 0 && label_of(&m, "cafe\u0301") == 1); /* as it is, where both are there */
    CHECK(label_of(&m, "cafe") == 2 && label_of(&m, "cafe\u0300") == 3 && label_of(&m, "CAF\u00c8") == 3);
    CHECK(label_of(&m, "\xc3") == 4 && label_of(&m, "b\xc5") == 5);
    CHECK_ERR(classes_find(&m, "caf\u00ea", &label), "expected one of");
    classes_free(&m);
}

/* Capital and small letters of Latin, Greek, Cyrillic and Armenian are the same, also with their marks as two. */
static void test_case(void) {
    static const char *const word[][3] = {
        {"\u00c6\u00d8\u00c5\u00de\u0141\u0110\u0147", "\u00e6\u00f8\u00e5\u00fe\u0142\u0111\u0148",
         "\u00e6\u00f8a\u030a\u00fe\u0142\u0111n\u030c"},
        {"\u0393\u0391\u03a4\u0391", "\u03b3\u03b1\u03c4\u03b1", "\u0393\u03b1\u03c4\u03b1"}, /* cat */
        {"\u03a3\u039a\u038e\u039b\u039f\u03a3", "\u03c3\u03ba\u03cd\u03bb\u03bf\u03c2",
         "\u03c3\u03ba\u03c5\u0301\u03bb\u03bf\u03c2"}, /* dog */
        {"\u0386\u0388\u0389\u038a\u038c\u038f\u03aa\u03ab", "\u03ac\u03ad\u03ae\u03af\u03cc\u03ce\u03ca\u03cb",
         "\u03b1\u0301\u0395\u0301\u03b7\u0301\u03b9\u0301\u03bf\u0301\u03c9\u0301\u03b9\u0308\u03c5\u0308"},
        {"\u041a\u041e\u0428\u041a\u0410", "\u043a\u043e\u0448\u043a\u0430",
         "\u041a\u043e\u0448\u043a\u0430"},                                                         /* cat */
        {"\u0401\u0416\u0418\u041a", "\u0451\u0436\u0438\u043a", "\u0435\u0308\u0436\u0438\u043a"}, /* hedgehog */
        {"\u0427\u0410\u0419", "\u0447\u0430\u0439", "\u0447\u0430\u0438\u0306"},                   /* tea */
        {"\u0407\u0416\u0410\u040e\u0402\u0403\u040c", "\u0457\u0436\u0430\u045e\u0452\u0453\u045c",
         "\u0456\u0308\u0436\u0430\u0443\u0306\u0402\u0433\u0301\u043a\u0301"},
        {"\u0490\u0410\u041d\u041e\u041a", "\u0491\u0430\u043d\u043e\u043a",
         "\u0490\u0430\u043d\u043e\u043a"},                                                         /* porch */
        {"\u0218ARPE\u021a", "\u0219arpe\u021b", "S\u0326arpeT\u0326"},                             /* snake */
        {"\u03aa\u0301\u038c\u03a3", "\u0390\u03cc\u03c2", "\u03b9\u0308\u0301\u03bf\u0301\u03c3"}, /* virus */
        {"\u03ab\u0301\u0393", "\u03b0\u03b3", "\u03c5\u0344\u03b3"},
        {"\u0186\u0181\u0187\u01c7\u01d5\u023a\u0243", "\u0254\u0253\u0188\u01c9\u01d6\u2c65\u0180",
         "\u0254\u0181\u0188\u01c8u\u0308\u0304\u2c65\u0243"},
        {"\u0460\u0480\u048a\u04c0\u04c1\u04cd\u04d0\u052e", "\u0461\u0481\u048b\u04cf\u04c2\u04ce\u04d1\u052f",
         "\u0460\u0480\u048b\u04cf\u0436\u0306\u04cd\u0430\u0306\u052f"},
        {"CH\u00da V\u1eb8T \u1edem", "ch\u00fa v\u1eb9t \u1edfm", "chu\u0301 ve\u0323t o\u031b\u0309m"},
        {"TI\u1ebeNG VI\u1ec6T", "ti\u1ebfng vi\u1ec7t", "tie\u0302\u0301ng vie\u0323\u0302t"},
        {"\u053f\u0531\u054f\u0548\u0552", "\u056f\u0561\u057f\u0578\u0582", "\u053f\u0561\u057f\u0578\u0582"}};
    static const char *const other[] = {"\u0397\u0302", "\u0219",       "\u0308",
                                        "\u0491\u0460", "\u20ac\u2c66", "\U0001f600"};
    char list[160];
    for (size_t i = 0; i < sizeof word / sizeof *word; i++)
        for (int k = 0; k < 3; k++) {
            Classes m = {0};
            int32_t label;
            snprintf(list, sizeof list, "# folders, one a line\nother\n%s\n\u03b3\u0430", word[i][k]);
            CHECK_OK(classes_open(&m, list, 3));
            for (int of = 0; of < 3; of++) CHECK(label_of(&m, word[i][of]) == 1);
            CHECK_ERR(classes_find(&m, "\u03b3\u0430x", &label), "expected one of");
            CHECK(label_of(&m, "\u0393\u0410") == 2);
            classes_free(&m);
        }
    for (size_t i = 0; i < sizeof other / sizeof *other; i++) { /* none of these is another */
        Classes m = {0};
        int32_t label;
        snprintf(list, sizeof list, "# folders, one a line\n\u03b7\u0301\n\u015f\n%s\nx", other[i]);
        CHECK_OK(classes_open(&m, list, 4));
        for (size_t k = 0; k < sizeof other / sizeof *other; k++)
            CHECK(classes_named(&m, other[k], &label) == (k == i) && (k != i || label == 2));
        classes_free(&m);
    }
}

static void test_lists(const char *dir) {
    Classes m = {0};
    Config c = {0};
    int32_t label;
    char recipe[256], path[256];
    CHECK_OK(classes_open(&m, "a,A,b", 3)); /* folders that differ by case alone */
    CHECK(label_of(&m, "a") == 0 && label_of(&m, "A") == 1 && label_of(&m, "B") == 2);
    classes_free(&m);
    CHECK_ERR(classes_open(&m, "a,b,c", 2), "more than the 2 classes");
    classes_free(&m);
    CHECK_ERR(classes_open(&m, "# nothing\n", 2), "no class");
    classes_free(&m);
    CHECK_OK(classes_open(&m, "# three\r\nred, crimson\r\n\ngreen", 9));
    CHECK(m.n == 2 && label_of(&m, "crimson") == 0 && label_of(&m, "green") == 1);
    classes_free(&m);
    CHECK_OK(classes_open(&m, NULL, 12));
    CHECK(m.n == 12 && label_of(&m, "11") == 11);
    CHECK_ERR(classes_find(&m, "12", &label), "0..11");
    classes_free(&m);

    snprintf(recipe, sizeof recipe, "%s/recipe.txt", dir);
    snprintf(path, sizeof path, "%s/names.txt", dir);
    CHECK_OK(config_set(&c, "imagebart.class_list", "names.txt"));
    CHECK_ERR(classes_from_recipe(&c, recipe), path); /* beside the recipe, where nothing is yet */
    FILE *f = fopen(path, "wb");
    if (CHECK(f != NULL)) {
        fwrite("one\ntwo\0\n", 1, 9, f);
        fclose(f);
    }
    CHECK_ERR(classes_from_recipe(&c, recipe), "zero bytes");
    if ((f = fopen(path, "wb"))) fputs("one\ntwo\n", f), fclose(f);
    CHECK_OK(classes_from_recipe(&c, recipe));
    CHECK(!strcmp(config_get(&c, "", "imagebart.classes"), "one\ntwo\n"));
    config_free(&c);
    remove(path);
}

int main(void) {
    char dir[FOLDER_BYTES];
    if (!temporary_folder(dir)) return 1;
    test_imagenet();
    test_folders();
    test_folder_names();
    test_unicode();
    test_case();
    test_lists(dir);
    rmdir(dir);
    return test_report();
}
