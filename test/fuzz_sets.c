/* fuzz_sets.c - fuzzers of what lies in folders: lists of pictures and trees of them, what a run keeps there (state,
 * log). */
#include "fuzz.h"

#include <fcntl.h>
#include <ftw.h>
#include <sys/stat.h>
#include <unistd.h>

/* ------------------------------------------------------------------------------------------------------------
 * Lists. Byte 0: where the list ends and that of the held-out pictures begins.
 * ---------------------------------------------------------------------------------------------------------- */

static const uint8_t tiny_png[] = {/* 1x1, grey */
                                   0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a, 0x00, 0x00, 0x00, 0x0d, 0x49, 0x48,
                                   0x44, 0x52, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x01, 0x08, 0x00, 0x00, 0x00,
                                   0x00, 0x3a, 0x7e, 0x9b, 0x55, 0x00, 0x00, 0x00, 0x0a, 0x49, 0x44, 0x41, 0x54, 0x78,
                                   0x9c, 0x63, 0x68, 0x00, 0x00, 0x00, 0x82, 0x00, 0x81, 0x77, 0xcd, 0x72, 0xb6, 0x00,
                                   0x00, 0x00, 0x00, 0x49, 0x45, 0x4e, 0x44, 0xae, 0x42, 0x60, 0x82};

static void make_folder_here(const char *name) {
    mkdir(fuzz_path(name), 0777);
}

static void make_pictures(void) {
    static const char *const names[] = {"set/1.png",    "set/a/2.jpg", "set/a/b/3.png",
                                        "set/c/4.webp", "set/c/2.png", "set/5 x.png"};
    static int made;
    if (made) return;
    made = 1;
    make_folder_here("set"), make_folder_here("set/a"), make_folder_here("set/a/b"), make_folder_here("set/c");
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        fuzz_put(names[i], "", 0, tiny_png, sizeof tiny_png - i % 2);
    MUST(symlink(".", fuzz_path("set/loop")) == 0 && mkfifo(fuzz_path("set/p.png"), 0666) == 0);
}

/* Every label has a class; every picture can be asked for, and what is met is said. */
static void use_set(Dataset *d) {
    char text[ERR_MAX];
    for (size_t i = 0; i < d->n; i++) MUST(d->label[i] >= 0 && (!d->n_classes || (size_t)d->label[i] < d->n_classes));
    for (size_t i = 0; i < d->n && i < 4; i++) {
        Image im = {0};
        int damaged = 0;
        const Err e = answered(dataset_picture(d, i, (Prep)(i & 3), 3, &im, &damaged));
        MUST(e != OK || damaged == !im.rgb);
        image_free(&im);
    }
    dataset_met(d, text, 0), dataset_met(d, text, 1);
    left_out_text(text, d->left_out);
    MUST(!strchr(text, '\n'));
    answered(dataset_write_damaged(d, fuzz_path("skipped.txt")));
}

/* A list of damaged pictures is added to. */
static void add_damage(const char *path) {
    Damage *x;
    MUST(damage_create(&x, 1) == OK);
    (void)err("is empty");
    MUST(damage_note(x, 0, "set/1.png") == OK);
    answered(damage_write(x, path));
    damage_free(x);
}

static void read_list(const uint8_t *bytes, size_t n) {
    Dataset d;
    if (n < 2) return;
    make_pictures();
    const size_t cut = 1 + bytes[0] % n;
    add_damage(fuzz_put("skipped.txt", "", 0, bytes + 1, n - 1));
    fuzz_put("set/list.txt", "", 0, bytes + 1, n - 1);
    for (Split s = SPLIT_ALL; s <= SPLIT_VAL; s++)
        if (answered(dataset_open(&d, fuzz_path("set/list.txt"), s)) == OK) use_set(&d), dataset_close(&d);
    remove(fuzz_path("set/list.txt"));
    fuzz_put("train.txt", "", 0, bytes + 1, cut - 1);
    fuzz_put("val.txt", "", 0, bytes + cut, n - cut);
    if (answered(dataset_open_lists(&d, fuzz_path("set"), fuzz_path("train.txt"), fuzz_path("val.txt"), SPLIT_TRAIN)) ==
        OK)
        use_set(&d), dataset_close(&d);
}

static void list_seeds(FuzzSeed *take) {
    static const char list[] = "\22./1.png\na/2.jpg\r\n\na/b/3\n  c/4.webp\n";
    static const char skipped[] = "\1set/1.png\tis empty\nset/2.png\tdamaged PNG: IDAT: CRC error\n";
    take("list", list, sizeof list - 1);
    take("skipped", skipped, sizeof skipped - 1);
}

/* ------------------------------------------------------------------------------------------------------------
 * Trees. Two bytes are an instruction: what is made, and its name.
 * ---------------------------------------------------------------------------------------------------------- */

static int remove_entry(const char *path, const struct stat *st, int flag, struct FTW *ftw) {
    (void)st, (void)flag, (void)ftw;
    return remove(path);
}

static const char *const words[] = {"train",
                                    "val",
                                    "validation",
                                    "valid",
                                    "test",
                                    "Train",
                                    "ILSVRC2012_train",
                                    "ILSVRC2012_validation",
                                    "data",
                                    "a",
                                    "B",
                                    "d",
                                    "@eaDir",
                                    "lost+found",
                                    "x_train_lmdb",
                                    "x_val_lmdb",
                                    "data.mdb",
                                    ".hidden",
                                    "e, f",
                                    "1.png",
                                    "\x1b[31mred",
                                    "new\nline",
                                    "\xff\xfe",
                                    "a.png",
                                    "b.PNG",
                                    "c.jfif",
                                    "d.webp",
                                    "x.png~",
                                    "loop",
                                    "p.png",
                                    "n06596364_9591.JPEG",
                                    "noend"};

static void put_at(const char *path, size_t n) {
    const int fd = open(path, O_CREAT | O_WRONLY | O_NONBLOCK, 0666);
    if (fd < 0) return; /* a folder of that name */
    MUST(write(fd, tiny_png, n) == (ssize_t)n || n == 0);
    close(fd);
}

/* at: the present folder, which instructions change */
static void make_entry(char at[2048], size_t root, unsigned what, const char *name) {
    char path[2048 + 256];
    snprintf(path, sizeof path, "%s/%s", at, name);
    if (what % 8 == 1 && strlen(at) > root) *strrchr(at, '/') = 0;
    if ((what % 8 == 0 || what % 8 == 7) && strlen(path) < 1500 && mkdir(path, 0777) == 0)
        snprintf(at, 2048, "%.2000s", path);
    if (what % 8 == 2 || what % 8 == 3) put_at(path, sizeof tiny_png);
    if (what % 8 == 4) put_at(path, what >> 3);
    if (what % 8 == 5 && symlink(what & 64 ? ".." : what & 128 ? "nowhere.png" : "a.png", path)) return;
    if (what % 8 == 6 && mkfifo(path, 0666)) return;
}

static void load(Dataset *d, unsigned how) {
    Loader *l = NULL;
    const LoaderConfig c = {
        .B = 2, .size = 4, .train = 1, .mark = how & 1, .prep = (Prep)(how >> 1 & 3), .crops = how >> 3 & 1 ? 2 : 0};
    const real *images;
    const int32_t *labels;
    Err e = answered(loader_start(&l, d, &c));
    for (int i = 0; e == OK && i < 3; i++) e = answered(loader_next(l, &images, &labels));
    loader_stop(l);
}

static void read_tree(const uint8_t *bytes, size_t n) {
    char at[2048];
    Dataset d;
    if (n > 120) return;
    nftw(fuzz_path("tree"), remove_entry, 32, FTW_DEPTH | FTW_PHYS);
    make_folder_here("tree");
    snprintf(at, sizeof at, "%s", fuzz_path("tree"));
    const size_t root = strlen(at);
    for (size_t i = 0; i + 1 < n; i += 2)
        make_entry(at, root, bytes[i], words[bytes[i + 1] % (sizeof words / sizeof *words)]);
    for (Split s = SPLIT_ALL; s <= SPLIT_VAL; s++)
        if (answered(dataset_open(&d, fuzz_path("tree"), s)) == OK) {
            use_set(&d);
            if (s == SPLIT_TRAIN && d.n) load(&d, (unsigned)n);
            dataset_close(&d);
        }
}

static void tree_seeds(FuzzSeed *take) {
    static const uint8_t classes[] = {0, 9, 2, 23, 2, 24, 1, 0, 0, 10, 2, 25, 2, 19, 1, 0, 2, 29};
    static const uint8_t split[] = {0, 0, 0, 9, 2, 23, 1, 0, 1, 0, 0, 1, 0, 9, 2, 24, 1, 0, 0, 12, 2, 26};
    take("classes", classes, sizeof classes);
    take("split", split, sizeof split);
}

/* ------------------------------------------------------------------------------------------------------------
 * What a run has: log.tsv, from which loss.svg and the events are drawn; skipped_batches.tsv
 * ---------------------------------------------------------------------------------------------------------- */

static Stage stage_of(const char *run) {
    Stage s = {.name = "vqgan", .step = 17};
    s.set.run = run, s.set.vqgan = 1, s.set.keep = 2, s.set.steps = 40, s.set.no_wait = 1;
    return s;
}

static void read_log(const uint8_t *bytes, size_t n) {
    static char run[512];
    static View v;
    static Log log;
    if (!run[0]) make_folder_here("run"), snprintf(run, sizeof run, "%s", fuzz_path("run"));
    Stage s = stage_of(run);
    history_start(&s.history);
    fuzz_put("run/log.tsv", "", 0, bytes, n);
    fuzz_put("run/skipped_batches.tsv", "", 0, bytes, n);
    memset(&v, 0, sizeof v);
    answered(view_close(&s, &v));
    answered(log_open(&s, &log));
    answered(view_close(&s, &v));
    v.evaluated = 1;
    snprintf(v.path, sizeof v.path, "%s", fuzz_put("run/events", "", 0, "", 0));
    answered(view_step(&s, &v));
}

static void log_seeds(FuzzSeed *take) {
    static const char header[] =
        "stage\tstep\tloss\thard_or_l1\tsoft_or_l2\tlr\tgrad_norm\timages_per_s\tval\tval_ema\t"
        "val_part1_ema\tval_part2_ema\tdisc_loss\tg_loss\td_weight\tlpips\tval_lpips\tcodes\t"
        "perplexity\tval_codes\tval_perplexity\tval_psnr\n";
    char text[8192];
    size_t n = (size_t)snprintf(text, sizeof text, "%s", header);
    for (int i = 1; i < 20; i++)
        n += (size_t)snprintf(text + n, sizeof text - n,
                              "%s\t%d\t%g\t0.5\t0.25\t1e-4\t%g\t12.5\t%s\t\t\t\t\t\t\t\t\t9\t4.5\t\t\t\n",
                              i < 15 ? "vqgan" : "scale1", i, 3.0 / i, 1.0 / i, i % 5 ? "" : "0.7");
    take("log", text, n);
    n = (size_t)snprintf(text, sizeof text, "%s", header);
    for (int i = 1; i < 9; i++)
        n += (size_t)snprintf(text + n, sizeof text - n,
                              "vqgan\t%d\t0.1\t0.1\t0.1\t0\t0\t1.0\t\t\t\t\t\t\t\t\t\t\t\t\t\t\n", i);
    take("constant", text, n);
}

/* ------------------------------------------------------------------------------------------------------------
 * A run's state, as --resume meets it: the header of STAGE.state.safetensors, in front of tensors that are right
 * ---------------------------------------------------------------------------------------------------------- */

static const StageKind kind = {.part_name = {"L1", "L2"}};

static void put_recipe(void) {
    static int made;
    uint8_t *text;
    size_t n;
    if (made) return;
    made = 1;
    make_folder_here("resumed");
    MUST(file_bytes(&text, &n, "test/tiny.txt", 1 << 20, NULL) == OK);
    fuzz_put("tiny.txt", "vqgan.train.spike 7\n", 20, text, n);
    free(text);
}

static Settings given_settings(void) {
    static char run[512], config[512];
    char *argv[] = {"train",    "--vqgan",  "--run", run,      "--config", config,
                    "--resume", "--device", "cpu",   "--data", "data",     NULL};
    Settings given;
    memset(&given, 0, sizeof given);
    put_recipe();
    if (!run[0])
        snprintf(run, sizeof run, "%s", fuzz_path("resumed")),
            snprintf(config, sizeof config, "%s", fuzz_path("tiny.txt"));
    settings_parse(&given, sizeof argv / sizeof *argv - 1, argv);
    return given;
}

/* The network that the settings describe, if it is a small one, with all that a state has of it. */
static Err build(Stage *s) {
    VqganConfig c;
    size_t bytes = 0;
    TRY(first_stage_config(&c, &s->recipe, NULL, NULL));
    TRY(vqgan_create(&s->vqgan, &c, 0));
    s->params = vqgan_params(s->vqgan);
    TRY(vqgan_plan_bytes(s->vqgan, s->batch, c.resolution, c.resolution, 1, &bytes));
    if (s->params->total > 1 << 22) return err("a network of %zu numbers", s->params->total);
    return params_plan(s->params, PLAN_VALUE | PLAN_GRAD | PLAN_ADAM);
}

static void release(Stage *s) {
    vqgan_free(s->vqgan);
    config_free(&s->recipe);
}

static Err collect(Stage *s, TensorList *list) {
    static size_t two = 2;
    static const float usage[2];
    (void)s;
    return tensor_list_add(list, "of_the_kind", DT_F32, 1, &two, usage, 0);
}

typedef struct {
    uint8_t *file;
    size_t n, header; /* of the file; of it, from byte 8 on, the header */
} State;

/* A state as ./train writes it, but that its header has no checksum */
static const State *make_state(void) {
    static State x;
    static const StageKind writes = {.part_name = {"L1", "L2"}, .collect = collect};
    if (x.file) return &x;
    const Settings given = given_settings();
    Stage s = {.name = "vqgan", .kind = &writes, .set = given};
    if (settings_read(&s, NULL) != OK || build(&s) != OK) fprintf(stderr, "%s\n", err_text()), abort();
    params_init(s.params, 1);
    history_start(&s.history);
    MUST(config_set(&s.recipe, "train.skipped", "3,4,9") == OK);
    if (save_state(&s, 0) != OK) fprintf(stderr, "%s\n", err_text()), abort();
    release(&s);
    MUST(file_bytes(&x.file, &x.n, fuzz_path("resumed/vqgan.state.safetensors"), 1 << 30, NULL) == OK);
    uint64_t header;
    memcpy(&header, x.file, 8);
    x.header = (size_t)header;
    char *sum = memmem(x.file, x.n, "train.checksum", 14);
    MUST(sum);
    memcpy(sum, "train.checkxxx", 14);
    return &x;
}

static void read_state(const uint8_t *bytes, size_t n) {
    const State *right = make_state();
    const uint64_t header = n;
    uint8_t *all = malloc(8 + n);
    MUST(all);
    memcpy(all, &header, 8), memcpy(all + 8, bytes, n);
    fuzz_put("resumed/vqgan.state.safetensors", all, 8 + n, right->file + 8 + right->header,
             right->n - 8 - right->header);
    free(all);
    const Settings given = given_settings();
    Stage s = {.name = "vqgan", .kind = &kind, .set = given};
    Checkpoint ck;
    memset(&ck, 0, sizeof ck);
    if (answered(state_open(&s, &ck, 0)) == OK) {
        s.has_state = 1;
        if (answered(settings_read(&s, &ck)) == OK && answered(build(&s)) == OK &&
            answered(load_state(&s, &ck)) == OK) {
            (void)rate_at(&s.rate, s.step);
            (void)micro_number(&s, 0);
            answered(list_skipped(&s, NULL));
        }
    }
    checkpoint_close(&ck);
    release(&s);
}

static void state_seeds(FuzzSeed *take) {
    const State *x = make_state();
    take("state", x->file + 8, x->header);
}

const FuzzTarget fuzz_set_targets[] = {
    {"lists", read_list, list_seeds, NULL},
    {"trees", read_tree, tree_seeds, NULL},
    {"logs", read_log, log_seeds, NULL},
    {"states", read_state, state_seeds, NULL},
    {NULL, NULL, NULL, NULL},
};
