/* test_ckpt.c - PyTorch's .ckpt files, made here byte by byte: zip, zip64 and the old format, every kind of tensor,
 * and the files that an attacker would make. The golden cases have files that PyTorch itself wrote. */
#include "test.h"

#include <sys/resource.h>
#include <unistd.h>
#include <zlib.h>

static char path[64];

/* ---- A growing file, and the pickles, archives and old files made of it ---- */

typedef struct {
    unsigned char *b;
    size_t n, capacity;
} Bytes;

static void add(Bytes *to, const void *data, size_t n) {
    if (mem_grow(&to->b, to->n, n, &to->capacity, 1, "a test file") != OK) exit(1);
    memcpy(to->b + to->n, data, n);
    to->n += n;
}

static void number(Bytes *to, uint64_t v, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) add(to, &(unsigned char){i < 8 ? (unsigned char)(v >> 8 * i) : 0}, 1);
}

static void op(Bytes *to, const char *codes) {
    add(to, codes, strlen(codes));
}

static void text(Bytes *to, const char *s) {
    op(to, "X");
    number(to, strlen(s), 4);
    op(to, s);
}

static void integer(Bytes *to, int64_t v) {
    op(to, "\x8a\x08"); /* LONG1 */
    number(to, (uint64_t)v, 8);
}

static void global(Bytes *to, const char *module, const char *name) {
    op(to, "c");
    op(to, module);
    op(to, "\n");
    op(to, name);
    op(to, "\n");
}

typedef struct {
    const char *name, *storage, *key;
    int64_t elements, offset, ndim, dim[4], stride[4];
} Made;

static void tuple(Bytes *to, const int64_t *v, int64_t n) {
    op(to, "(");
    for (int64_t i = 0; i < n; i++) integer(to, v[i]);
    op(to, "t");
}

/* _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks) */
static void tensor(Bytes *to, const Made *m) {
    global(to, "torch._utils", "_rebuild_tensor_v2");
    op(to, "((");
    text(to, "storage");
    global(to, "torch", m->storage);
    text(to, m->key);
    text(to, "cuda:0");
    integer(to, m->elements);
    op(to, "tQ"); /* BINPERSID */
    integer(to, m->offset);
    tuple(to, m->dim, m->ndim);
    tuple(to, m->stride, m->ndim);
    op(to, "\x89");
    global(to, "collections", "OrderedDict");
    op(to, ")RtR");
}

/* {'epoch': 7, 'callbacks': {...}, 'state_dict': OrderedDict(name: tensor, ...)}; evil: what callbacks hold */
static void lightning(Bytes *to, const Made *m, size_t n, const char *evil, size_t evil_bytes) {
    op(to, "\x80\x02}(");
    text(to, "epoch");
    integer(to, 7);
    text(to, "callbacks");
    add(to, evil, evil_bytes);
    text(to, "state_dict");
    global(to, "collections", "OrderedDict");
    op(to, ")R(");
    for (size_t i = 0; i < n; i++) {
        text(to, m[i].name);
        tensor(to, &m[i]);
    }
    op(to, "u}");
    text(to, "_metadata");
    op(to, "}sbu.");
}

enum { FILES = 1024 };
typedef struct {
    Bytes *out;
    int wide;              /* zip64 */
    int deflated, without; /* entries are compressed; have no checksum */
    size_t n, place[FILES], bytes[FILES], stored[FILES];
    char name[FILES][32];
    uint32_t crc[FILES];
} Archive;

/* Adds data as deflate writes them, without zlib's own header. Returns how many bytes they became. */
static size_t add_deflated(Bytes *to, const void *data, size_t bytes) {
    z_stream s = {.next_in = (Bytef *)data, .avail_in = (uInt)bytes};
    unsigned char *out = (unsigned char *)malloc(bytes + bytes / 100 + 64);
    if (!out || deflateInit2(&s, 9, Z_DEFLATED, -MAX_WBITS, 8, Z_DEFAULT_STRATEGY) != Z_OK) exit(1);
    s.next_out = out, s.avail_out = (uInt)(bytes + bytes / 100 + 64);
    CHECK(deflate(&s, Z_FINISH) == Z_STREAM_END);
    const size_t n = (size_t)(s.next_out - out);
    deflateEnd(&s);
    add(to, out, n);
    free(out);
    return n;
}

static void local_file(Archive *z, const char *name, const void *data, size_t bytes) {
    Bytes *to = z->out;
    if (z->n == FILES) exit(1);
    snprintf(z->name[z->n], sizeof z->name[0], "%s", name);
    z->place[z->n] = to->n, z->bytes[z->n] = z->stored[z->n] = bytes;
    z->crc[z->n++] = z->without ? 0 : (uint32_t)crc32_z(0, data, bytes);
    op(to, "PK\3\4");
    number(to, 45, 2);
    number(to, 0, 20); /* sizes come in the directory, as PyTorch writes it */
    number(to, strlen(name), 2);
    number(to, 5, 2);
    op(to, name);
    add(to, "FB\1\0Z", 5); /* padding for alignment */
    if (z->deflated)
        z->stored[z->n - 1] = add_deflated(to, data, bytes);
    else
        add(to, data, bytes);
}

static void directory(Archive *z) {
    Bytes *to = z->out;
    const size_t place = to->n;
    for (size_t i = 0; i < z->n; i++) {
        op(to, "PK\1\2");
        number(to, 0, 6);
        number(to, z->deflated ? 8 : 0, 6); /* method, time */
        number(to, z->crc[i], 4);
        number(to, z->wide ? UINT32_MAX : z->stored[i], 4);
        number(to, z->wide ? UINT32_MAX : z->bytes[i], 4);
        number(to, strlen(z->name[i]), 2);
        number(to, z->wide ? 28 : 0, 2);
        number(to, 0, 10);
        number(to, z->wide ? UINT32_MAX : z->place[i], 4);
        op(to, z->name[i]);
        if (!z->wide) continue;
        number(to, 1, 2);
        number(to, 24, 2);
        number(to, z->bytes[i], 8);
        number(to, z->stored[i], 8);
        number(to, z->place[i], 8);
    }
    const size_t bytes = to->n - place, end = to->n;
    if (z->wide) {
        op(to, "PK\6\6");
        number(to, 44, 8);
        number(to, 0, 12);
        number(to, z->n, 8);
        number(to, z->n, 8);
        number(to, bytes, 8);
        number(to, place, 8);
        op(to, "PK\6\7");
        number(to, 0, 4);
        number(to, end, 8);
        number(to, 1, 4);
    }
    op(to, "PK\5\6");
    number(to, 0, 4);
    number(to, z->wide ? UINT16_MAX : z->n, 2);
    number(to, z->wide ? UINT16_MAX : z->n, 2);
    number(to, z->wide ? UINT32_MAX : bytes, 4);
    number(to, z->wide ? UINT32_MAX : place, 4);
    number(to, 0, 2);
}

/* ---- A model with one of everything ---- */

static const float floats[6] = {0, 1, 2, 3, 4, 5};
static const int64_t longs[3] = {-1, 1 << 20, 7};
static const uint16_t halves[2] = {0x3c00, 0xc000};
static const unsigned char bools[2] = {0, 1};
static const float complexes[2] = {1, 2};

static const Made model[] = {
    {"net.weight", "FloatStorage", "0", 6, 0, 2, {2, 3}, {3, 1}},
    {"net.turned", "FloatStorage", "0", 6, 0, 2, {3, 2}, {1, 3}},
    {"net.column", "FloatStorage", "0", 6, 1, 1, {2}, {3}},
    {"net.repeated", "FloatStorage", "0", 6, 5, 2, {4, 2}, {0, 0}},
    {"net.scalar", "FloatStorage", "0", 6, 4, 0, {0}, {0}},
    {"net.empty", "FloatStorage", "0", 6, 6, 2, {0, 3}, {3, 1}},
    {"net.odd_strides", "FloatStorage", "0", 6, 0, 3, {1, 6, 1}, {77, 1, 99}}, /* of one element: of no meaning */
    {"used", "LongStorage", "1", 3, 0, 1, {3}, {1}},
    {"half", "HalfStorage", "2", 2, 0, 1, {2}, {1}},
    {"mask", "BoolStorage", "3", 2, 0, 1, {2}, {1}},
    {"complex", "ComplexFloatStorage", "4", 1, 0, 1, {1}, {1}},
};
enum { MODEL = sizeof model / sizeof *model };

/* os.system("touch /tmp/pwned"), an object with a state, a numpy scalar */
static const char evil[] =
    "(cos\nsystem\nX\x10\0\0\0touch /tmp/pwned\x85Rcmodule\nClass\n)\x81}bcnumpy.core.multiarray\n"
    "scalar\nK\1K\2\x86Rt";

static Bytes pickle, file;

static Archive archive;

static Archive *new_archive(int wide) {
    memset(&archive, 0, sizeof archive);
    archive.out = &file;
    archive.wide = wide;
    return &archive;
}

enum { PLAIN_ZIP, ZIP64, DEFLATED, WITHOUT_CRC, BOTH };

static void make_archive(int kind) {
    Archive *z = new_archive(kind == ZIP64);
    z->deflated = kind == DEFLATED || kind == BOTH, z->without = kind == WITHOUT_CRC || kind == BOTH;
    file.n = pickle.n = 0;
    lightning(&pickle, model, MODEL, evil, sizeof evil - 1);
    local_file(z, "scale 1/data.pkl", pickle.b, pickle.n);
    local_file(z, "scale 1/byteorder", "little", 6);
    local_file(z, "scale 1/data/0", floats, sizeof floats);
    local_file(z, "scale 1/data/1", longs, sizeof longs);
    local_file(z, "scale 1/data/2", halves, sizeof halves);
    local_file(z, "scale 1/data/3", bools, sizeof bools);
    local_file(z, "scale 1/data/4", complexes, sizeof complexes);
    local_file(z, "scale 1/version", "3\n", 2);
    local_file(z, "scale 1/.data/serialization_id", "1", 1);
    directory(z);
}

static void make_old(void) {
    file.n = 0;
    add(&file, "\x80\2\x8a\nl\xfc\x9c\x46\xf9 j\xa8P\x19.", 15);
    add(&file, "\x80\2M\xe9\3.", 6);
    op(&file, "\x80\2}(");
    text(&file, "little_endian");
    op(&file, "\x88u.");
    lightning(&file, model, MODEL, evil, sizeof evil - 1);
    op(&file, "\x80\2](");
    for (int i = 4; i >= 0; i--) text(&file, (const char[2]){(char)('0' + i), 0});
    op(&file, "e.");
    number(&file, 1, 8);
    add(&file, complexes, sizeof complexes);
    number(&file, 2, 8);
    add(&file, bools, sizeof bools);
    number(&file, 2, 8);
    add(&file, halves, sizeof halves);
    number(&file, 3, 8);
    add(&file, longs, sizeof longs);
    number(&file, 6, 8);
    add(&file, floats, sizeof floats);
}

static void put_file(const void *data, size_t n) {
    unlink(path);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, n, f) != n || fclose(f) != 0) CHECK(!"a test file can be written");
}

static Err open_file(Checkpoint *ck) {
    put_file(file.b, file.n);
    return checkpoint_open(ck, path);
}

static void check_numbers(const Checkpoint *ck, const char *name, const double *want, size_t n) {
    const Tensor *x = checkpoint_find(ck, name);
    real got[16];
    if (!CHECK(x && x->size == n && n <= 16)) return;
    tensor_to_reals(x, got);
    for (size_t i = 0; i < n; i++) CHECK((double)got[i] == want[i]);
}

static void check_model(const char *what, int mapped) {
    Checkpoint ck;
    printf("%s\n", what);
    CHECK_OK(open_file(&ck));
    CHECK(ck.n == MODEL);
    real number;
    CHECK_ERR(checkpoint_reals(&ck, "complex", -1, NULL, 1, &number), "'complex' is C64, expected numbers");
    check_numbers(&ck, "net.weight", (const double[]){0, 1, 2, 3, 4, 5}, 6);
    check_numbers(&ck, "net.turned", (const double[]){0, 3, 1, 4, 2, 5}, 6);
    check_numbers(&ck, "net.column", (const double[]){1, 4}, 2);
    check_numbers(&ck, "net.repeated", (const double[]){5, 5, 5, 5, 5, 5, 5, 5}, 8);
    check_numbers(&ck, "net.scalar", (const double[]){4}, 1);
    check_numbers(&ck, "net.empty", NULL, 0);
    check_numbers(&ck, "net.odd_strides", (const double[]){0, 1, 2, 3, 4, 5}, 6);
    check_numbers(&ck, "used", (const double[]){-1, 1 << 20, 7}, 3);
    check_numbers(&ck, "half", (const double[]){1, -2}, 2);
    check_numbers(&ck, "mask", (const double[]){0, 1}, 2);
    const Tensor *turned = checkpoint_find(&ck, "net.turned"), *weight = checkpoint_find(&ck, "net.weight");
    CHECK(turned && turned->ndim == 2 && turned->dim[0] == 3 && turned->dim[1] == 2);
    const unsigned char *map = (const unsigned char *)ck.map,
                        *data = weight ? (const unsigned char *)weight->data : NULL;
    CHECK((data >= map && data < map + ck.map_bytes) == mapped); /* in the file, not copied */
    CHECK(config_get(&ck.meta, "", "epoch") && strcmp(config_get(&ck.meta, "", "epoch"), "7") == 0);
    CHECK(access("/tmp/pwned", F_OK) != 0);
    checkpoint_close(&ck);
    CHECK(!ck.copies && !ck.tensor);
}

/* ---- Pickles of other protocols, and what is not a state_dict ---- */

static void put_archive(const Bytes *pkl) {
    Archive *z = new_archive(0);
    file.n = 0;
    local_file(z, "a/data.pkl", pkl->b, pkl->n);
    local_file(z, "a/data/0", floats, sizeof floats);
    directory(z);
}

static void test_protocols(void) {
    Checkpoint ck;
    Bytes *p = &pickle;
    p->n = 0; /* protocol 4: frames, memo, STACK_GLOBAL, short texts; a plain dictionary, keys and storage recalled */
    op(p, "\x80\4\x95");
    number(p, 1000, 8);
    op(p, "}\x94(\x8c\1w\x8c\x0ctorch._utils\x8c\x12_rebuild_tensor_v2\x93\x94((\x8c\7storage\x8c\5torch\x8c\x0c"
          "FloatStorage\x93\x8c\1");
    op(p, "0\x8c\3cpu");
    op(p, "K\6tQ\x94K");
    number(p, 0, 1);
    op(p, "K\2K\3\x86K\3K\1\x86\x89NtR\x8c\1vh\1(h\2K\1K\1\x85K\1\x85\x89NtRu.");
    put_archive(p);
    CHECK_OK(open_file(&ck));
    check_numbers(&ck, "w", (const double[]){0, 1, 2, 3, 4, 5}, 6);
    check_numbers(&ck, "v", (const double[]){1}, 1);
    checkpoint_close(&ck);

    p->n = 0; /* protocol 0, in lines, as a Parameter */
    op(p, "(dp0\nVw\np1\nctorch._utils\n_rebuild_parameter\n(ctorch._utils\n_rebuild_tensor\n((Vstorage\nctorch\n"
          "FloatStorage\nV0\nVcpu\nI6\ntQL2L\n(I2\ntp2\n(I1\ntp3\ntRI01\nNtRs.");
    put_archive(p);
    CHECK_OK(open_file(&ck));
    check_numbers(&ck, "w", (const double[]){2, 3}, 2);
    checkpoint_close(&ck);
}

static void test_bad_pickles(void) {
    Checkpoint ck;
    Bytes *p = &pickle;
    static const struct {
        const char *pickle, *error;
    } others[] = {
        {"\x80\2N.", "holds no dictionary of tensors"},
        {"\x80\2}.", "holds no tensors"},
        {"\x80\2cos\nsystem\nU\1x\x85R.", "holds no dictionary of tensors"},
        {"\x80\6N.", "pickle protocol 6, expected 0 to 5"},
        {"\x80\2\xff.", "instruction 0xff"},
        {"\x80\2", "ends in the middle of an instruction"},
        {"\x80\2.", "takes a value that is not there"},
        {"\x80\2"
         "0.",
         "takes a value that is not there"},
        {"\x80\2t.", "a mark that is not there"},
        {"\x80\2(R.", "takes a value that is not there"},
        {"\x80\2s.", "adds a value that is not there"},
        {"\x80\2(u.", "adds to a container that is not there"},
        {"\x80\2}(Nu.", "sets 1 keys and values"},
        {"\x80\2(Nd.", "a dictionary of 1 keys and values"},
        {"\x80\2h\5.", "recalls value number 5"},
        {"\x80\2Nr\xff\xff\xff\x7f.", "remembers value number 2147483647"},
        {"\x80\2X\xff\xff\xff\xff.", "ends in the middle of an instruction"},
        {"\x80\2\x8d\xff\xff\xff\xff\xff\xff\xff\xff.", "ends in the middle of an instruction"},
        {"\x80\2Vno newline", "ends in the middle of a line"},
        {"\x80\2I9999999999999999999\n.", "a number that is none"},
        {"\x80\2ctorch._utils\n_rebuild_tensor_v2\nN\x85R.", "rebuilds a tensor from 1 arguments"},
    };
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        p->n = 0;
        op(p, others[i].pickle);
        put_archive(p);
        CHECK_ERR(open_file(&ck), others[i].error);
        CHECK(strstr(err_text(), path) == err_text() && !ck.map && !ck.tensor);
    }
    p->n = 0; /* sixty thousand lists on the stack: no stack of ours grows with them */
    op(p, "\x80\2");
    for (int i = 0; i < 60000; i++) op(p, "]");
    op(p, ".");
    put_archive(p);
    CHECK_ERR(open_file(&ck), "holds no dictionary of tensors");
}

/* Five pickles of protocol 4, each of which numbers what it remembers from 0 on */
static void test_old_memo(void) {
    Checkpoint ck;
    file.n = 0;
    op(&file, "\x80\4\x8a\nl\xfc\x9c\x46\xf9 j\xa8P\x19\x94.\x80\4M\xe9\3\x94.");
    op(&file, "\x80\4}\x94(\x8c\rlittle_endian\x94\x88u.");
    op(&file, "\x80\4}\x94(\x8c\1w\x94\x8c\x0ctorch._utils\x94\x8c\x12_rebuild_tensor_v2\x94\x93\x94((\x8c\7storage\x94"
              "\x8c\5torch\x94\x8c\x0c"
              "FloatStorage\x94\x93\x94\x8c\1");
    op(&file, "0\x94\x8c\3cpu\x94K\6Nt\x94QK");
    number(&file, 0, 1);
    op(&file, "K\6\x85K\1\x85\x89NtR\x8c\1vh\4(h");
    number(&file, 11, 1); /* the storage's name once more */
    op(&file, "QK\1K\2\x85K\2\x85\x89NtRu.\x80\4]\x94\x8c\1");
    op(&file, "0\x94");
    op(&file, "a.");
    number(&file, 6, 8);
    add(&file, floats, sizeof floats);
    CHECK_OK(open_file(&ck));
    check_numbers(&ck, "w", (const double[]){0, 1, 2, 3, 4, 5}, 6);
    check_numbers(&ck, "v", (const double[]){1, 3}, 2);
    checkpoint_close(&ck);
}

/* The function that rebuilds a tensor with attributes `depth` times over, and its arguments: the tensor's own, or
 * (function, class, arguments, attributes) */
static void rebuilder(Bytes *p, int depth) {
    if (depth)
        global(p, "torch._tensor", depth == 2 ? "_rebuild_from_type" : "_rebuild_from_type_v2");
    else
        global(p, "torch._utils", "_rebuild_tensor_v2");
}
static void arguments(Bytes *p, int depth) {
    op(p, "(");
    if (depth) {
        rebuilder(p, depth - 1);
        global(p, "my.own", "Tensor");
        arguments(p, depth - 1);
        op(p, "}t");
        return;
    }
    op(p, "(");
    text(p, "storage");
    global(p, "torch", "FloatStorage");
    text(p, "0");
    text(p, "cpu");
    integer(p, 6);
    op(p, "tQ");
    integer(p, 0);
    tuple(p, model[0].dim, 2);
    tuple(p, model[0].stride, 2);
    op(p, "\x89Nt");
}

static void check_weight(const char *parameter, int depth, int opens) {
    Checkpoint ck;
    Bytes *p = &pickle;
    p->n = 0;
    op(p, "\x80\2}");
    text(p, "w");
    if (parameter) global(p, "torch._utils", parameter), op(p, "(");
    rebuilder(p, depth);
    arguments(p, depth);
    op(p, "R");
    if (parameter) op(p, "\x88N}tR");
    op(p, "s.");
    put_archive(p);
    if (!opens) {
        CHECK_ERR(open_file(&ck), "holds no tensors");
        return;
    }
    CHECK_OK(open_file(&ck));
    check_numbers(&ck, "w", (const double[]){0, 1, 2, 3, 4, 5}, 6);
    checkpoint_close(&ck);
}

/* Parameters; tensors with attributes or of a class of their own */
static void test_wraps(void) {
    check_weight("_rebuild_parameter", 0, 1);
    check_weight("_rebuild_parameter_with_state", 0, 1);
    check_weight("_rebuild_parameter_with_state", 1, 1);
    for (int depth = 0; depth <= 3; depth++) check_weight(NULL, depth, 1);
    check_weight(NULL, 20, 0); /* nobody does that */
}

/* Numbers in a storage without a type: _rebuild_tensor_v3(storage, offset, size, stride, grad, hooks, type, metadata) */
static void test_untyped(void) {
    static const struct {
        const char *type;
        double first;
        const char *says;
    } types[] = {{"float32", 1, NULL},
                 {"uint16", 0, NULL},
                 {"float8_e4m3fn", 0, "'w' is F8_E4M3"},
                 {"complex64", 0, "'w' is C64"},
                 {"bits1x8", 0, "'w' is an object other than a plain tensor"}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        Checkpoint ck;
        Bytes *p = &pickle;
        real out[2];
        p->n = 0;
        op(p, "\x80\2}(");
        text(p, "x");
        tensor(p, &model[0]);
        text(p, "w");
        global(p, "torch._utils", "_rebuild_tensor_v3");
        op(p, "((");
        text(p, "storage");
        global(p, "torch.storage", "UntypedStorage");
        text(p, "0");
        text(p, "cpu");
        integer(p, sizeof floats);
        op(p, "tQ");
        integer(p, 1);
        op(p, "K\1\x85K\1\x85\x89N");
        global(p, "torch", types[i].type);
        op(p, "NtRu.");
        put_archive(p);
        CHECK_OK(open_file(&ck));
        if (types[i].says)
            CHECK_ERR(checkpoint_reals(&ck, "w", -1, NULL, 1, out), types[i].says);
        else
            check_numbers(&ck, "w", &types[i].first, 1);
        checkpoint_close(&ck);
    }
}

/* An object in a tensor's place is not lost: who asks for it is told. */
static void test_objects(void) {
    Checkpoint ck;
    Bytes *p = &pickle;
    real out;
    p->n = 0;
    op(p, "\x80\2}");
    text(p, "state_dict");
    op(p, "}(");
    text(p, "x");
    tensor(p, &model[0]);
    text(p, "layer.scale");
    global(p, "torch._utils", "_rebuild_qtensor");
    op(p, "NN\x86R");
    text(p, "sos_token");
    global(p, "numpy.core.multiarray", "_reconstruct");
    op(p, "NN\x86R");
    text(p, "number");
    add(p, "G\0\0\0\0\0\0\0", 8);
    add(p, "\0us.", 4);
    put_archive(p);
    CHECK_OK(open_file(&ck));
    CHECK(ck.n == 3 && checkpoint_find(&ck, "layer.scale") && !checkpoint_find(&ck, "number"));
    CHECK_ERR(checkpoint_reals(&ck, "layer.scale", -1, NULL, 1, &out), "an object other than a plain tensor");
    CHECK_ERR(checkpoint_ints(&ck, "sos_token", 0, NULL), "an object other than a plain tensor");
    checkpoint_close(&ck);
}

static size_t peak(void) { /* bytes of this process's largest size so far */
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (size_t)u.ru_maxrss << 10;
}

/* A file is answered in memory that its honest content could need, whatever it repeats. */
static void test_bounds(void) {
    enum { TIMES = 3000000 };
    Checkpoint ck;
    Bytes *p = &pickle;
    const size_t before = peak();
    p->n = 0; /* three million times the same name and tensor */
    op(p, "\x80\2}");
    text(p, "w");
    op(p, "q\1");
    tensor(p, &model[0]);
    op(p, "q\2s");
    for (int i = 0; i < TIMES; i++) {
        op(p, i % 1000 ? "" : i ? "u(" : "(");
        op(p, "h\1h\2");
    }
    op(p, "u.");
    put_archive(p);
    CHECK_ERR(open_file(&ck), "over 65536 tensors: not a file of weights");
    p->n = 0; /* values of a byte each */
    op(p, "\x80\2](");
    for (int i = 0; i < 2 * TIMES; i++) op(p, ")");
    op(p, "e.");
    put_archive(p);
    CHECK_ERR(open_file(&ck), "over 2097152 values: not a file of weights");
    p->n = 0; /* and lists of them */
    op(p, "\x80\2]");
    for (int i = 0; i < 2 * TIMES; i++) op(p, "\x85");
    op(p, ".");
    put_archive(p);
    CHECK_ERR(open_file(&ck), "over 2097152 values: not a file of weights");
    printf("bounds: %zu MiB more at the most\n", (peak() - before) >> 20);
#ifdef __SANITIZE_ADDRESS__ /* it keeps 256 MiB of what was freed, and more around each block */
    const size_t most = 800;
#else
    const size_t most = 400;
#endif
    CHECK(peak() - before < most << 20);
}

/* ---- Tensors that reach where they must not ---- */

static void test_hostile_tensors(void) {
    static const struct {
        Made m;
        const char *error;
    } hostile[] = {
        {{"t", "FloatStorage", "9", 6, 0, 1, {6}, {1}}, "storage '9', which is not in the file"},
        {{"t", "FloatStorage", "0", 7, 0, 1, {6}, {1}}, "storage of 24 bytes, expected 7 elements of F32"},
        {{"t", "DoubleStorage", "0", 6, 0, 1, {6}, {1}}, "storage of 24 bytes, expected 6 elements of F64"},
        {{"t", "FloatStorage", "0", INT64_MAX, 0, 1, {6}, {1}}, "storage of 24 bytes"},
        {{"t", "FloatStorage", "0", 6, 1, 1, {6}, {1}}, "reaches element 6 beyond offset 1 of a storage of 6"},
        {{"t", "FloatStorage", "0", 6, 7, 1, {0}, {1}}, "beyond offset 7"},
        {{"t", "FloatStorage", "0", 6, -1, 1, {6}, {1}}, "beyond offset -1"},
        {{"t", "FloatStorage", "0", 6, 0, 1, {7}, {1}}, "reaches element 7"},
        {{"t", "FloatStorage", "0", 6, 0, 1, {2}, {6}}, "reaches element 7"},
        {{"t", "FloatStorage", "0", 6, 0, 1, {2}, {-1}}, "has no shape"},
        {{"t", "FloatStorage", "0", 6, 0, 1, {-1}, {1}}, "has no shape"},
        {{"t", "FloatStorage", "0", 6, 0, 1, {INT64_MAX}, {INT64_MAX}}, "too large"},
        {{"t", "FloatStorage", "0", 6, 0, 4, {INT64_MAX, INT64_MAX, 4, 4}, {0, 0, 0, 0}}, "too large"},
        {{"t", "FloatStorage", "0", 6, 0, 1, {1 << 30}, {0}}, "repeats its elements until they exceed the file"},
        {{"t\0", "FloatStorage", "0", 6, 0, 2, {1 << 10, 1 << 9}, {0, 0}}, "repeats its elements"},
    };
    Checkpoint ck;
    for (size_t i = 0; i < sizeof hostile / sizeof *hostile; i++) {
        pickle.n = 0;
        lightning(&pickle, &hostile[i].m, 1, "N", 1);
        put_archive(&pickle);
        CHECK_ERR(open_file(&ck), hostile[i].error);
        CHECK(strstr(err_text(), "tensor 't'") && !ck.map && !ck.copies);
    }
    const Made twice[2] = {model[0], model[0]};
    pickle.n = 0;
    lightning(&pickle, twice, 2, "N", 1);
    put_archive(&pickle);
    CHECK_ERR(open_file(&ck), "two tensors 'net.weight'");
    static char name[NAME_MAX_BYTES + 1];
    Made named = model[0];
    memset(name, 'n', NAME_MAX_BYTES);
    named.name = name;
    pickle.n = 0;
    lightning(&pickle, &named, 1, "N", 1);
    put_archive(&pickle);
    CHECK_ERR(open_file(&ck), "name of 160 bytes");
}

/* ---- Archives that lie ---- */

/* Where the n-th entry stands in the directory */
static unsigned char *entry(int n) {
    for (unsigned char *p = file.b; p + 4 <= file.b + file.n; p++)
        if (memcmp(p, "PK\1\2", 4) == 0 && n-- == 0) return p;
    CHECK(!"the entry is there");
    return file.b;
}

static void set(unsigned char *at, uint64_t v, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) at[i] = (unsigned char)(v >> 8 * i);
}

static void lie(size_t at, uint64_t v, size_t bytes, const char *error) {
    Checkpoint ck;
    make_archive(0);
    set(entry(2) + at, v, bytes);
    CHECK_ERR(open_file(&ck), error);
    CHECK(!ck.map && !ck.tensor && !ck.copies);
}

static void lie_at_end(int wide, size_t from_end, uint64_t v, size_t bytes, const char *error) {
    Checkpoint ck;
    make_archive(wide);
    set(file.b + file.n - from_end, v, bytes);
    CHECK_ERR(open_file(&ck), error);
}

static void test_hostile_archives(void) {
    Checkpoint ck;
    lie(8, 1, 2, "encrypted");
    lie(10, 8, 2, "tensor 'net.weight': has a damaged 'scale 1/data/0': it cannot be inflated");
    lie(10, 9, 2, "zip entry 'scale 1/data/0' compressed by method 9, expected stored or deflated");
    lie(20, 23, 4, "compressed by method 0");
    for (int i = 0; i < 4; i++) {
        static const uint64_t sizes[] = {23, 25, 1 << 20,
                                         1 << 30}; /* inflated: too few, too many, a bomb by its sizes */
        make_archive(DEFLATED);
        set(entry(2) + 24, sizes[i], 4);
        CHECK_ERR(open_file(&ck), i == 0   ? "lies in a storage of 23 bytes"
                                  : i == 1 ? "cannot be inflated"
                                           : "which deflate cannot do");
    }
    make_archive(DEFLATED);
    set(entry(2) + 16, 1, 4);
    CHECK_ERR(open_file(&ck), "damaged 'scale 1/data/0': its checksum differs");
    make_archive(DEFLATED);
    set(entry(0) + 16, 1, 4);
    CHECK_ERR(open_file(&ck), "damaged 'scale 1/data.pkl': its checksum differs");
    make_archive(0);
    set(entry(2) + 20, 1 << 30, 4), set(entry(2) + 24, 1 << 30, 4); /* a bomb by its size fields */
    CHECK_ERR(open_file(&ck), "zip entry of 1073741824 bytes that does not fit");
    make_archive(0);
    set(entry(2) + 20, 300, 4), set(entry(2) + 24, 300, 4);
    CHECK_ERR(open_file(&ck), "overlap");
    lie(42, 0, 4, "overlap");
    lie(42, 1, 4, "not where the directory says");
    lie(42, UINT32_MAX - 1, 4, "outside of the file");
    lie(28, 60000, 2, "broken zip directory");
    lie(30, 60000, 2, "broken zip directory");
    lie(0, 0, 4, "broken zip directory");
    lie_at_end(0, 12, 60000, 2, "directory of 60000 entries does not fit");
    lie_at_end(0, 6, 1 << 20, 4, "does not fit in it");
    lie_at_end(0, 10, 1 << 20, 4, "does not fit in it");
    lie_at_end(0, 22, 0, 4, "without an end: it is truncated");
    lie_at_end(1, 22 + 12, UINT64_MAX, 8, "not where it says");
    lie_at_end(1, 22 + 20 + 8, UINT64_MAX - 7, 8, "does not fit in it");
    lie_at_end(1, 22 + 20 + 24, UINT64_MAX / 8, 8, "does not fit in it");
}

/* Archives that are others than torch.save writes */
static void test_foreign_archives(void) {
    Checkpoint ck;
    make_archive(0);
    set(file.b + 60, 0, 1); /* inside data.pkl */
    CHECK_ERR(open_file(&ck), "damaged 'scale 1/data.pkl': its checksum differs");

    Archive *z = new_archive(0);
    file.n = 0;
    local_file(z, "models/readme.txt", "x", 1);
    directory(z);
    CHECK_ERR(open_file(&ck), "without data.pkl");
    for (int compressed = 0; compressed < 2; compressed++) { /* a whole model's zip, as it was downloaded */
        z = new_archive(0);
        file.n = 0;
        local_file(z, "ffhq/scale1.ckpt", "x", 1);
        directory(z);
        if (compressed) set(entry(0) + 10, 8, 2);
        CHECK_ERR(open_file(&ck), "is a zip archive that holds 'ffhq/scale1.ckpt': unzip it");
    }
    z = new_archive(0);
    file.n = 0;
    local_file(z, "a/data.pkl", "N.", 2);
    local_file(z, "b/data.pkl", "N.", 2);
    directory(z);
    CHECK_ERR(open_file(&ck), "two data.pkl");
    z = new_archive(0);
    file.n = pickle.n = 0;
    lightning(&pickle, model, 1, "N", 1);
    local_file(z, "a/data.pkl", pickle.b, pickle.n);
    local_file(z, "a/data/0", floats, sizeof floats);
    local_file(z, "a/data/0", floats, sizeof floats);
    directory(z);
    CHECK_ERR(open_file(&ck), "two zip entries of one name");
    z = new_archive(0);
    file.n = 0;
    local_file(z, "a/data.pkl", pickle.b, pickle.n);
    local_file(z, "a/byteorder", "big", 3);
    directory(z);
    CHECK_ERR(open_file(&ck), "big-endian");
}

static void test_hostile_old(void) {
    Checkpoint ck;
    make_old();
    file.n -= 1;
    CHECK_ERR(open_file(&ck), "truncated");
    make_old();
    set(file.b + file.n - sizeof floats - 8, UINT64_MAX, 8);
    CHECK_ERR(open_file(&ck), "ends behind the file");
    make_old();
    file.b[5] ^= 1;
    CHECK_ERR(open_file(&ck), "not one of torch.save");
    make_old();
    file.b[18] ^= 1;
    CHECK_ERR(open_file(&ck), "not of torch.save protocol 1001");
    make_old();
    for (size_t i = 0; i < 60; i++)
        if (file.b[i] == 0x88) file.b[i] = 0x89;
    CHECK_ERR(open_file(&ck), "big-endian");
}

/* ---- Every truncation and thousands of damaged copies: an error or a model, never a crash ---- */

static void test_damaged(const char *what) {
    static const unsigned char spice[] = "\0\1\377\200QRbtu(.0Nh\x85\x86PK";
    unsigned char *copy = (unsigned char *)malloc(file.n);
    size_t cut = 0, opened = 0, damaged = 3000;
    for (size_t n = 0; n < file.n; n++) {
        put_file(file.b, n);
        cut += (size_t)open_and_read(path);
    }
    CHECK(cut == 0);
    for (size_t i = 0; i < damaged; i++) {
        uint32_t r[4];
        philox(r, 2, rng_stream(RNG_TEST, 0, 0), i);
        memcpy(copy, file.b, file.n);
        copy[r[0] % file.n] = r[1] % 2 ? spice[r[2] % (sizeof spice - 1)] : (unsigned char)(r[2] >> 8);
        if (r[1] % 4 == 0) copy[r[3] % file.n] = spice[r[3] / 7 % (sizeof spice - 1)];
        put_file(copy, file.n);
        opened += (size_t)open_and_read(path);
    }
    CHECK(opened > 0 && opened < damaged);
    free(copy);
    printf("%s: %zu of %zu damaged files opened\n", what, opened, damaged);
}

/* ---- test_ckpt --official RUN DIR: a trained run as the official code would have left it, for test_programs.sh */

static const char *storage_of(Dtype d) {
    return d == DT_F32    ? "FloatStorage"
           : d == DT_F16  ? "HalfStorage"
           : d == DT_BF16 ? "BFloat16Storage"
           : d == DT_U8   ? "ByteStorage"
                          : "LongStorage";
}

/* Adds the tensors of a file of ours, renamed, to the list, and their numbers to the archive. */
static size_t adopt(Archive *z, Made *m, char (*name)[2][NAME_MAX_BYTES], size_t n, const Checkpoint *ck,
                    const char *prefix) {
    for (size_t i = 0; i < ck->n; i++, n++) {
        const Tensor *x = &ck->tensor[i];
        char path_in_zip[64];
        int64_t stride = 1;
        snprintf(name[n][0], NAME_MAX_BYTES, "%.40s%.100s", prefix, x->name);
        snprintf(name[n][1], NAME_MAX_BYTES, "%zu", n);
        m[n] = (Made){name[n][0], storage_of(x->dtype), name[n][1], (int64_t)x->size, 0, x->ndim, {0}, {0}};
        for (int d = x->ndim; d-- > 0; stride *= m[n].dim[d]) m[n].dim[d] = (int64_t)x->dim[d], m[n].stride[d] = stride;
        snprintf(path_in_zip, sizeof path_in_zip, "archive/data/%zu", n);
        local_file(z, path_in_zip, x->data, x->size * dtype_size(x->dtype));
    }
    return n;
}

static int make_official(const char *run, const char *dir) {
    static Made m[FILES];
    static char name[FILES][2][NAME_MAX_BYTES];
    Checkpoint vqgan, scale;
    char from[600];
    snprintf(from, sizeof from, "%s/vqgan.safetensors", run);
    CHECK_OK(checkpoint_open(&vqgan, from));
    for (int t = 1; !test_failed; t++) {
        snprintf(from, sizeof from, "%s/scale%d.safetensors", run, t);
        if (t > 1 && access(from, F_OK) != 0) break;
        CHECK_OK(checkpoint_open(&scale, from));
        Archive *z = new_archive(t == 2);
        file.n = pickle.n = 0;
        size_t n = adopt(z, m, name, 0, &vqgan, "first_stage_model.");
        n = adopt(z, m, name, n, &scale, "");
        lightning(&pickle, m, n, "N", 1);
        local_file(z, "archive/data.pkl", pickle.b, pickle.n);
        directory(z);
        snprintf(path, sizeof path, "%.40s/scale%d.ckpt", dir, t);
        put_file(file.b, file.n);
        checkpoint_close(&scale);
    }
    checkpoint_close(&vqgan);
    return test_failed != 0;
}

/* ---- test_ckpt --plain RUN DIR WRAP: the same as a converter to safetensors leaves it, without metadata, and with
 *      numbers that nobody reads beside it; WRAP: what a wrapper put in front of names or, "+...", behind their first
 *      part ---- */

static void plain_tensors(TensorList *list, const Checkpoint *ck, const char *prefix, const char *wrap) {
    for (size_t i = 0; i < ck->n; i++) {
        const Tensor *x = &ck->tensor[i];
        char whole[2 * NAME_MAX_BYTES], name[3 * NAME_MAX_BYTES];
        snprintf(whole, sizeof whole, "%s%s", prefix, x->name);
        const size_t first = *wrap == '+' && strchr(whole, '.') ? strcspn(whole, ".") + 1 : 0;
        snprintf(name, sizeof name, "%.*s%s%s", (int)first, whole, *wrap == '+' && !first ? "" : wrap + (*wrap == '+'),
                 whole + first);
        CHECK_OK(tensor_list_add(list, name, x->dtype, x->ndim, x->dim, x->data, 0));
    }
}

static int make_plain(const char *run, const char *dir, const char *wrap) {
    static const unsigned char numbers[16];
    const size_t two = 2;
    Checkpoint vqgan, scale;
    char file_path[600];
    snprintf(file_path, sizeof file_path, "%s/vqgan.safetensors", run);
    CHECK_OK(checkpoint_open(&vqgan, file_path));
    for (int t = 1; !test_failed; t++) {
        TensorList list = {0};
        snprintf(file_path, sizeof file_path, "%s/scale%d.safetensors", run, t);
        if (t > 1 && access(file_path, F_OK) != 0) break;
        CHECK_OK(checkpoint_open(&scale, file_path));
        plain_tensors(&list, &vqgan, "first_stage_model.", wrap);
        plain_tensors(&list, &scale, "", wrap);
        CHECK_OK(tensor_list_add(&list, "loss.logvar", DT_F8_E4M3, 1, &two, numbers, 0));
        CHECK_OK(tensor_list_add(&list, "first_stage_model.loss.phase", DT_C64, 1, &two, numbers, 0));
        snprintf(file_path, sizeof file_path, "%s/scale%d.safetensors", dir, t);
        CHECK_OK(checkpoint_write(file_path, list.tensor, NULL, list.n, NULL));
        tensor_list_free(&list);
        checkpoint_close(&scale);
    }
    checkpoint_close(&vqgan);
    return test_failed != 0;
}

/* ---- test_ckpt --seeds DIR: small files of every kind for the fuzzers to start from ---- */

static void put_seed(const char *dir, const char *name, const Bytes *data) {
    snprintf(path, sizeof path, "%.30s/%s", dir, name);
    put_file(data->b, data->n);
}

static int make_seeds(const char *dir) {
    make_archive(0);
    put_seed(dir, "zip/plain", &file);
    make_archive(1);
    put_seed(dir, "zip/zip64", &file);
    make_archive(WITHOUT_CRC); /* what is changed in it is no damage: fuzzers come to what is behind the checksums */
    put_seed(dir, "zip/without", &file);
    put_seed(dir, "pickle/object", &pickle);
    make_old();
    put_seed(dir, "legacy/old", &file);
    return test_failed != 0;
}

/* Opened, and every number read */
static Err read_all(Checkpoint *ck) {
    real numbers[16];
    Err e = open_file(ck);
    for (size_t i = 0; e == OK && i < ck->n; i++)
        if (ck->tensor[i].dtype < DT_NUMBERS)
            e = checkpoint_reals(ck, ck->tensor[i].name, -1, NULL, ck->tensor[i].size, numbers);
    return e;
}

static size_t data_of(const char *name) { /* the last byte of an entry */
    size_t k = 0;
    while (k < archive.n && strcmp(archive.name[k], name) != 0) k++;
    return archive.place[k] + 30 + strlen(name) + 5 + archive.stored[k] - 1;
}

/* Who reads no tensor of a damaged entry has no use for its checksum: it is opened, its shapes are looked at, all others
 * are read. Who reads it is told, each time, before there is a number. */
static void test_read_late(void) {
    Checkpoint ck;
    Params p = {0};
    const size_t two = 2;
    int32_t used[3];
    real half[2] = {7, 7};
    make_archive(PLAIN_ZIP);
    file.b[data_of("scale 1/data/2")] ^= 1;
    CHECK_OK(open_file(&ck));
    CHECK_OK(checkpoint_ints(&ck, "used", 3, used));
    CHECK_OK(params_add(&p, NULL, INIT_ZERO, 0, 0, 1, &two, "half"));
    CHECK_OK(params_fit(&p, &ck, "", 0));
    for (int i = 0; i < 2; i++) {
        CHECK(checkpoint_reals(&ck, "half", 1, &two, 2, half) == DAMAGED && half[0] == 7);
        CHECK(strstr(err_text(), "tensor 'half': has a damaged 'scale 1/data/2': its checksum differs"));
        CHECK(strstr(err_text(), path) == err_text());
        CHECK(params_map(&p, &ck, "", 0) == DAMAGED);
        params_free(&p);
        p = (Params){0};
        CHECK_OK(params_add(&p, NULL, INIT_ZERO, 0, 0, 1, &two, "half"));
        CHECK_OK(params_plan(&p, PLAN_VALUE));
        CHECK(params_load(&p, &ck, 'v', "") == DAMAGED);
        params_free(&p);
        p = (Params){0};
        CHECK_OK(params_add(&p, NULL, INIT_ZERO, 0, 0, 1, &two, "half"));
    }
    params_free(&p);
    checkpoint_close(&ck);
    make_archive(PLAIN_ZIP);
    file.b[data_of("scale 1/data/1")] ^= 1;
    CHECK_OK(open_file(&ck));
    CHECK(checkpoint_ints(&ck, "used", 3, used) == DAMAGED);
    checkpoint_close(&ck);
}

/* One tensor of more than a thread's part, in which a bit of each part turns over */
static void test_large(void) {
    enum { N = 5 * (1 << 20) / 4 + 7 };
    const Made large = {"large", "FloatStorage", "0", N, 0, 1, {N}, {1}};
    float *x = (float *)malloc(N * sizeof *x);
    real *out = (real *)malloc(N * sizeof *out);
    const size_t n = N;
    Checkpoint ck;
    for (size_t i = 0; i < N; i++) x[i] = (float)(i % 1000);
    Archive *z = new_archive(0);
    file.n = pickle.n = 0;
    lightning(&pickle, &large, 1, evil, sizeof evil - 1);
    local_file(z, "scale 1/data.pkl", pickle.b, pickle.n);
    local_file(z, "scale 1/data/0", x, N * sizeof *x);
    directory(z);
    CHECK_OK(open_file(&ck));
    CHECK_OK(checkpoint_reals(&ck, "large", 1, &n, n, out));
    CHECK(out[N - 1] == (real)x[N - 1]);
    checkpoint_close(&ck);
    for (size_t part = 0; part < 5; part++) {
        const size_t at = data_of("scale 1/data/0") - part * (1 << 20);
        file.b[at] ^= 1;
        CHECK_OK(open_file(&ck));
        CHECK(checkpoint_reals(&ck, "large", 1, &n, n, out) == DAMAGED);
        checkpoint_close(&ck);
        file.b[at] ^= 1;
    }
    free(x);
    free(out);
}

/* A bit of an entry's data that has turned over; `accepted` where there is no checksum to tell it */
static void test_flipped(int kind, int accepted) {
    static const char *const name[] = {"data.pkl", "data/0", "data/1", "data/2", "data/3", "data/4"};
    make_archive(kind);
    for (size_t i = 0; i < sizeof name / sizeof *name; i++) {
        Checkpoint ck;
        char whole[32];
        snprintf(whole, sizeof whole, "scale 1/%s", name[i]);
        const size_t at = data_of(whole);
        if (accepted && i == 0) continue; /* a program */
        file.b[at] ^= 1;
        if (accepted || i == 5) /* complex numbers, which nobody reads */
            CHECK_OK(read_all(&ck));
        else
            CHECK_ERR(read_all(&ck), name[i]);
        checkpoint_close(&ck);
        file.b[at] ^= 1;
    }
}

static int test_all(void) {
    snprintf(path, sizeof path, "/tmp/test_ckpt.%ld", (long)getpid());
    make_archive(PLAIN_ZIP);
    check_model("zip", 1);
    test_damaged("zip");
    make_archive(ZIP64);
    check_model("zip64", 1);
    test_damaged("zip64");
    make_archive(DEFLATED);
    check_model("deflated", 0);
    test_damaged("deflated");
    make_archive(WITHOUT_CRC);
    check_model("without checksums", 1);
    make_archive(BOTH);
    check_model("deflated, without checksums", 0);
    test_flipped(PLAIN_ZIP, 0);
    test_flipped(ZIP64, 0);
    test_flipped(WITHOUT_CRC, 1);
    test_read_late();
    test_large();
    make_old();
    check_model("old format", 1);
    test_damaged("old format");
    test_old_memo();
    test_wraps();
    test_untyped();
    test_objects();
    test_bounds();
    test_protocols();
    test_bad_pickles();
    test_hostile_tensors();
    test_hostile_archives();
    test_foreign_archives();
    test_hostile_old();
    unlink(path);
    return test_report();
}

int main(int argc, char **argv) {
    int status;
    if (argc == 3 && strcmp(argv[1], "--seeds") == 0)
        status = make_seeds(argv[2]);
    else if (argc == 4 && strcmp(argv[1], "--official") == 0)
        status = make_official(argv[2], argv[3]);
    else if (argc == 5 && strcmp(argv[1], "--plain") == 0)
        status = make_plain(argv[2], argv[3], argv[4]);
    else
        status = test_all();
    free(file.b);
    free(pickle.b);
    return status;
}
