/* files.h - what files/ gives: configurations, named tensors, pictures, tokens, LMDBs and recipes, as they lie on the
 * disk. */
#ifndef FILES_H
#define FILES_H

#include "base/params.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Flat configurations: the official YAML files as "dotted.key value" strings; a file's __metadata__ ---- */
typedef struct {
    char *key, *value;
    char *place;       /* where it is written, "FILE: line 3", or "FILE"; NULL: in no file */
    const char *typed; /* the key as it is written there: behind place, in its memory */
} KeyValue;
typedef struct {
    KeyValue *kv;
    size_t n, capacity;
} Config;
Err config_set(Config *c, const char *key, const char *fmt, ...) PRINTF_LIKE(3, 4); /* replaces or appends */
const char *config_get(const Config *c, const char *prefix, const char *key);       /* prefix+key; NULL: absent */
/* A key's place; without such a key, nothing. */
Err config_place(Config *c, const char *key, const char *place, const char *typed);
Err config_copy(Config *to, const char *key, const KeyValue *from); /* as config_set, with its place */
/* The last error is about this key's value: err_in with the place of the key, if it has one. Returns FAILED. */
Err config_blame(const Config *c, const char *prefix, const char *key);
/* The error of a value that cannot be: place, key as written there, value, what was expected. Returns FAILED. */
Err config_bad(const Config *c, const char *prefix, const char *key, const char *expected);
/* An error about this key's value, in front of which its place stands. Returns FAILED. */
Err config_err(const Config *c, const char *prefix, const char *key, const char *fmt, ...) PRINTF_LIKE(4, 5);
/* path = the file that a key names: beside the file in which the key is written, or from here. 0: there is none, and
 * path = what else has that name, such as a folder, or "". */
int config_file(char path[PATH_BYTES], const Config *c, const char *prefix, const char *key);
/* The last error is about the configuration as a whole: err_in with its file, if it has one. Returns FAILED. */
Err config_in_file(const Config *c);
/* A value that cannot be is an error that names the place and the key as it is written there.
 * A whole number in lo..hi. Absent: *out is left alone when optional, an error that names the key when not. */
Err config_size(size_t *out, const Config *c, const char *prefix, const char *key, size_t lo, size_t hi, int optional);
Err config_real(double *out, const Config *c, const char *prefix, const char *key, double lo, double hi, int optional);
/* true | false, or Python's */
Err config_flag(int *out, const Config *c, const char *prefix, const char *key, int optional);
/* "1,1,2,4" or "[1, 1, 2, 4]" -> out[0..*n-1], at most max of them; "-" and "[]" are empty lists. */
Err config_list(size_t *out, size_t *n, size_t max, const Config *c, const char *prefix, const char *key, int optional);
/* "0.5, 1e-3" or "[0.5, 1e-3]": 1..max numbers in lo..hi; absent is an error. */
Err config_reals(double *out, size_t *n, size_t max, const Config *c, const char *prefix, const char *key, double lo,
                 double hi);
/* A struct's fields by their keys, for reading, writing and checking. */
typedef enum {
    FIELD_SIZE, /* size_t, lo..hi */
    FIELD_FLAG, /* int: true or false */
    FIELD_REAL, /* double, lo..hi */
    FIELD_LIST, /* size_t[hi], whose length, lo..hi, is the size_t at length_at */
    FIELD_FIXED /* no field: another flag than lo is refused. Unless optional, it is written. */
} FieldKind;
typedef struct {
    const char *key;
    FieldKind kind;
    size_t at; /* of the field in the struct */
    double lo, hi;
    int optional; /* absent: the field is left alone; else that is an error */
    size_t length_at;
} ConfigField;
Err config_table_read(void *to, const ConfigField *s, size_t n, const Config *from, const char *prefix);
Err config_table_write(Config *to, const void *from, const ConfigField *s, size_t n, const char *prefix);
Err config_table_check(const void *x, const ConfigField *s, size_t n, const char *whose);
/* A text file of "key value" lines, 1 MiB at most, which replace what is there; a key twice is an error, and so is one
 * that `refuse`, unless NULL, refuses. */
typedef Err ConfigKeyCheck(const char *key);
Err config_read_checked(Config *c, const char *path, ConfigKeyCheck *refuse);
Err config_read(Config *c, const char *path);
void config_free(Config *c);
/* Decimal digits at *s, nothing else; *s moves behind them. 0: there are none, or too many for a size_t. */
int text_digits(size_t *out, const char **s);
/* Bytes of the UTF-8 character at text, which ends in a zero byte; 0: it is none. */
size_t utf8_length(const char *text);

/* ---- keys.c: which keys there are ---- */
/* Of whose configuration: a first stage's, a transition's; of which network; refused in training alone */
enum { KEYS_FIRST = 1, KEYS_TRANSITION = 2, KEYS_X = 4, KEYS_GPT = 8, KEYS_TRAINING = 16 };
typedef enum {
    KEY_OBEYED,
    KEY_HARMLESS, /* whatever its value */
    KEY_ONLY,     /* harmless with some values, refused with others */
    KEY_OWN       /* ./train's own, in files alone */
} KeyKind;
typedef struct {
    const char *key; /* "lightning.callbacks.*": all that begin so */
    KeyKind kind;
    unsigned where;
    const char *only, *why; /* KEY_ONLY: "false|0" */
} KnownKey;
const KnownKey *known_keys(size_t *n);                      /* the table */
const KnownKey *known_key(const char *key, unsigned where); /* NULL: there is none */
/* What follows model.params.first_stage_config.params. in a transition's key, or NULL */
const char *first_stage_key(const char *key);
/* "part.key" of a recipe: an error that names the nearest if there is no such key */
Err recipe_key_check(const char *key);
/* As numbers, else as words whatever their case, lists whatever their blanks and brackets; is the value one of "a|b"? */
int same_config_value(const char *a, const char *b);
int is_one_of_values(const char *value, const char *values);
Err key_value_check(const KnownKey *k, const char *key, const char *value, int training);
/* A recipe's part, or metadata, in which other people's keys are harmless */
Err keys_check(const Config *c, unsigned where, int training);

/* ---- values.c: what the keys imagebart.* may say ---- */
enum { MAX_BEST_OF = 64, MAX_CANDIDATES = 4096 };
/* An error if one of them has a value that is none; keys_check calls it. */
Err own_values_check(const Config *c);
/* out[1..T] of a list per scale, which must be there */
Err own_per_scale(double *out, int T, const Config *c, const char *key);
/* range = one that was checked; 0: there is none */
int own_range(double range[2], const Config *c, const char *key);

/* ---- tensor.c, checkpoint.c, ckpt.c: named tensors ---- */
typedef enum {
    DT_F64,
    DT_F32,
    DT_F16,
    DT_BF16,
    DT_I64,
    DT_I32,
    DT_I16,
    DT_I8,
    DT_U8,
    DT_BOOL,
    DT_U64,
    DT_U32,
    DT_U16,
    DT_NUMBERS, /* all of these can be read; the following have a name and a size, and are passed over */
    DT_C64 = DT_NUMBERS,
    DT_F8_E5M2,
    DT_F8_E4M3,
    DT_F8_E5M2FNUZ,
    DT_F8_E4M3FNUZ,
    DT_F8_E8M0,
    DT_F6_E2M3,
    DT_F6_E3M2,
    DT_F4,
    DT_SAFETENSORS, /* what a safetensors file may have; PyTorch's alone: */
    DT_C32 = DT_SAFETENSORS,
    DT_C128,
    DT_OTHER, /* no tensor as we know them: without elements */
    DT_COUNT
} Dtype;
size_t dtype_bits(Dtype d);                       /* of an element */
size_t dtype_size(Dtype d);                       /* bytes; 0: less than one */
const char *dtype_name(Dtype d);                  /* "F32", ... as safetensors spells it */
Err dtype_of_store(Dtype *out, const char *name); /* f32, f16 or bf16: how weights for sampling are stored */

enum {
    TENSOR_DIMS = 8,
    CHECKPOINT_TENSORS = 1 << 16 /* the most of a file; the largest official one has some 3,000 */
};
typedef struct ZipEntry ZipEntry; /* of an archive: pickle.h */
typedef struct {
    char name[NAME_MAX_BYTES];
    Dtype dtype;
    int ndim;
    size_t dim[TENSOR_DIMS], size; /* size = product of dim, elements */
    const void *data;              /* reading: into the mapped file, maybe unaligned; writing: the caller's */
    ZipEntry *entry;               /* in which data lies: see checkpoint_whole; NULL: in none */
} Tensor;

size_t tensor_bytes(const Tensor *x);

typedef struct {
    Tensor *tensor; /* sorted by name */
    size_t n;
    Config meta; /* __metadata__ */
    void *map;
    size_t map_bytes;
    ZipEntry *entries; /* what tensors point at */
    void *copies; /* of tensors whose elements do not lie in row-major order in the file, or are compressed there */
    /* a name as the file has it, where parts of names were left out: "module." and "_orig_mod.", which wrappers of a
     * network (torch.compile, data-parallel training) put in front or inside; "": none was */
    char wrapped[NAME_MAX_BYTES];
    char path[PATH_BYTES];
} Checkpoint;

/* Maps a file, tells by its content what it is, and checks all of it before use: a safetensors file (header length,
 * JSON, names unique, dtypes known, shape product = byte length, no overlap, no gap, no tail) or a PyTorch .ckpt (zip
 * or older; SPEC section 11), whose meta then has "epoch" and "global_step". Errors name the file. What is there but is
 * of a kind that cannot be read is passed over until it is asked for. Checksums of a .ckpt are compared as its tensors
 * are read: what nobody reads costs no time. */
Err checkpoint_open(Checkpoint *ck, const char *path);
/* out = what is to be said about a file that was opened, in one line; NULL: nothing */
const char *checkpoint_note(char out[ERR_MAX], const Checkpoint *ck);
void checkpoint_close(Checkpoint *ck);                                 /* safe on a zeroed struct */
const Tensor *checkpoint_find(const Checkpoint *ck, const char *name); /* NULL: no such tensor */
/* *out = the tensor; an error names it if it is missing or its shape differs. ndim < 0: any shape with `size`
 * elements. */
Err checkpoint_shaped(const Checkpoint *ck, const char *name, int ndim, const size_t *dim, size_t size,
                      const Tensor **out);
/* The same, of a tensor whose numbers are about to be used. DAMAGED if its bytes are not those that its file has a checksum
 * of, which is compared once, by all threads. */
Err checkpoint_whole(const Checkpoint *ck, const char *name, int ndim, const size_t *dim, size_t size,
                     const Tensor **out);
/* As checkpoint_whole, then out[0..size-1] = its elements, converted. */
Err checkpoint_reals(const Checkpoint *ck, const char *name, int ndim, const size_t *dim, size_t size, real *out);
Err checkpoint_ints(const Checkpoint *ck, const char *name, size_t size,
                    int32_t *out); /* from I64 I32 I16 U8; range-checked */
/* out = n reals as elements of dtype d, one of F64 F32 F16 BF16 */
void tensor_from_reals(unsigned char *out, Dtype d, const real *x, size_t n);
void tensor_to_reals(const Tensor *x, real *out); /* any dtype -> real; x->size elements */
/* Writes a safetensors file atomically: temporary name, flush, rename. Source data is `real` where from_real[i],
 * converted to tensor[i].dtype (F32, F16 or BF16 round to nearest even); else raw bytes of that dtype. */
Err checkpoint_write(const char *path, const Tensor *tensor, const int *from_real, size_t n, const Config *meta);
/* ckpt.c: what checkpoint_open and checkpoint_close call for PyTorch's files. */
Err ckpt_read(Checkpoint *ck);
void ckpt_free_copies(void *copies);

/* ---- atomic.c: files read whole, files written whole or not at all ---- */
/* *fd = a regular file, open for reading, of *size bytes. Never blocks on a pipe or a terminal. */
Err file_open(int *fd, size_t *size, const char *path);
/* *bytes (*size) = a whole regular file of 1 to `most` bytes, a zero byte behind it; release with free(). empty,
 * unless NULL: 1 when the file is there but has no bytes, which is an error too. */
Err file_bytes(uint8_t **bytes, size_t *size, const char *path, size_t most, int *empty);
/* The same as a text; zero bytes in it are an error, a byte-order mark is left out. */
Err file_text(char **text, const char *path, size_t most);
/* Reads to the end of an open file into bytes (size). */
Err read_exactly(int fd, const char *path, uint8_t *bytes, size_t size);
/* 64-bit FNV-1a over a file's bytes: tells which VQGAN made a token cache. */
Err file_checksum(uint64_t *out, const char *path);
/* Sets the error "path: cannot DOING: " and what errno says. Returns FAILED. */
Err io_error(const char *path, const char *doing);
/* A file that is replaced whole or not at all: a temporary beside it is opened and written. */
typedef struct {
    void *output; /* NULL: not open */
    char path[PATH_BYTES], temporary[PATH_BYTES];
} AtomicFile;
Err atomic_open(AtomicFile *f, const char *path);
Err atomic_write(AtomicFile *f, const void *data, size_t bytes);
/* e: how writing it went. OK: the temporary is flushed and takes the file's place. Else it is removed, and e given
 * back; safe after any failure, and twice. */
Err atomic_close(AtomicFile *f, Err e);
/* Is `name`, in this folder, the temporary file of a process that is no more? Then how long the name is of the file
 * that it was to become, else 0. */
size_t temporary_left(const char *folder, const char *name);
/* Locks an open file for this process, until it is closed. 0: another process has it; -1: files cannot be locked there,
 * errno says why. */
int file_lock(int fd);
/* Writes behind a file's end: all of it, or none of it and an error. */
Err file_append(const char *path, const void *data, size_t bytes);
/* Writes at byte `at` of an open file. What failed can be written again. */
Err file_write_at(int fd, const char *path, const void *data, size_t bytes, uint64_t at);
/* Did the last of this thread's AtomicFiles, file_appends and file_write_ats fail for want of room (ENOSPC, EDQUOT,
 * EFBIG)? */
int disk_full(void);

/* ---- names.c: a growing list of names, such as those of files, each with two numbers that are the caller's ---- */
typedef struct {
    size_t start;     /* in the text, which moves */
    const char *name; /* once sorted */
    uint64_t bytes;   /* such as the file's size */
    int mark;
} Listed;
typedef struct {
    char *text;
    size_t used, room;
    Listed *item;
    size_t n, capacity;
} Names;
Err names_add(Names *s, const char *name, size_t length, uint64_t bytes, int mark);
void names_free(Names *s);
/* Sorts by one of the orders below; no name may be added afterwards. A stem is the last part of a name without its
 * extension. */
void names_sort(Names *s, int (*order)(const void *, const void *));
int names_in_byte_order(const void *a, const void *b);
int names_by_stem(const void *a, const void *b);
/* *out (n) = the names in their order, pointers and text in one allocation. Those that do not start with '/' get
 * `folder` + "/" in front; NULL: nothing in front. */
Err names_pack(char ***out, const Names *s, const char *folder);

/* ---- folder.c: the pictures in a folder, and what is left out ---- */
typedef enum {
    OUT_FOREIGN,
    OUT_OTHER,
    OUT_SYSTEM,
    OUT_TEMPORARY,
    OUT_LINK,
    OUT_CIRCLE,
    OUT_CLOSED,
    OUT_STRAY,
    OUT_BESIDE,
    OUT_OFFICIAL,
    OUT_REASONS
} OutReason;
enum { OUT_KINDS = 12 };
typedef struct {
    size_t n[OUT_REASONS];
    char first[OUT_REASONS][256]; /* an example */
    struct {
        char what[40]; /* "GIF" */
        size_t n;
        char first[256];
    } kind[OUT_KINDS]; /* of OUT_FOREIGN and OUT_OTHER, as far as there is room */
} LeftOut;
void left_out_note(LeftOut *x, OutReason why, const char *name);
/* The same for files of a kind that is known */
void left_out_kind(LeftOut *x, OutReason why, const char *kind, const char *name);
/* "1 GIF file (such as b.gif), 2 temporary (such as a/x.png~), ..."; "" if nothing was */
void left_out_text(char text[ERR_MAX], const LeftOut *x);
static const char DATA_MDB[] = "data.mdb"; /* what the file in every LMDB's folder is called */
/* Calls take for every picture and LMDB below root, whose names are relative to it, in no order. */
typedef Err FolderTake(void *context, const char *name, uint64_t bytes, int is_lmdb);
Err folder_search(const char *root, LeftOut *out, FolderTake *take, void *context);
/* Leaves out, of not too many names, the files that are no pictures, whatever they are called; a damaged picture stays. */
Err folder_check(Names *all, const char *root, LeftOut *out);
/* The first bytes of a file, n of at most `most` */
Err file_start(uint8_t *bytes, size_t most, size_t *n, const char *path);

/* ---- damage.c: pictures of a set of n that could not be decoded, and of which a part is used, as any number of threads
 *      meets them ---- */
typedef struct Damage Damage;
Err damage_create(Damage **out, size_t n);              /* after an error too it is damage_free's */
void damage_free(Damage *x);                            /* NULL is fine */
Err damage_note(Damage *x, size_t i, const char *path); /* picture i, for what err_text() says */
void damage_note_part(Damage *x, size_t i, const char *path, const char *note); /* note: Image.note */
int damage_known(Damage *x, size_t i);
size_t damage_count(Damage *x);
/* "2 animated WebP, of which the first picture is used (such as a/x.webp)"; damaged: in front of that "3 cannot be
 * read (such as a/y.png: is empty)"; "": there are none */
void damage_text(char text[ERR_MAX], Damage *x, int damaged);
/* Adds the damaged ones to the list in the file at path: path, tab, why, a line each, sorted, each once. */
Err damage_write(Damage *x, const char *path);

/* ---- layout.c: what the names of a set's pictures say ---- */
/* The side of the split that a name is on, its mark */
enum { TRAINING = 0, VALIDATION = 1, NOT_SAID = -1 };
enum { FOLDER_NAME_BYTES = 64 };
typedef struct {
    char train[FOLDER_NAME_BYTES], val[FOLDER_NAME_BYTES]; /* folders that are the split; "": there are none */
    char only[FOLDER_NAME_BYTES];                          /* the one folder, such as train, in which all is */
    int lmdbs;      /* LMDBs of both sides of LSUN's split are there: NAME_train_lmdb, NAME_val_lmdb */
    size_t outside; /* what names outside of the set's folder begin with */
    int flat;       /* nobody wants classes */
} Layout;
/* Keeps `flat`. */
void layout_find(Layout *layout, const Names *all, const char *root);
/* Takes out what lies beside the split's folders, and a few pictures beside class folders. stray: a picture for which
 * the set has no classes, or "". */
Err layout_filter(Names *all, const Layout *layout, LeftOut *out, char stray[256]);
/* Says of every picture which side it is on. Where a small set's names hash to none, the first is held out; one picture
 * is for training. */
void layout_sides(Names *all, const Layout *layout);
/* The class part of "[train/|val/]class/rest" and its length; length 0: the picture lies in no sub-folder. *side: what
 * the name says of the split. */
const char *class_part(size_t *length, int *side, const char *name, const Layout *layout);
/* What follows folder/ in a name, or NULL. */
const char *below_folder(const char *name, const char *folder);
/* A list's name as folder_search gives it: without root, "./" and double slashes. */
void list_name(char *name, const char *root);
/* The label behind a name, "x.png 3", or NULL */
const char *list_label(const char *name);

/* ---- weights.c: parameter tables from files and into them. A number that is NaN or infinite is an error. ---- */
/* What one letter names below: 'v' value, 'g' grad, '1' m, '2' v, 'e' ema; it must have been planned.
 * Every row's `which` = tensor prefix+name, which must be there with its exact shape. */
Err params_load(Params *p, const Checkpoint *ck, char which, const char *prefix);
/* The values of a table without memory are those of the file where they lie, if they lie there as aligned reals, else
 * copies. For sampling: nothing may be written to them, and the file must stay open. strip_dots: names without
 * their dots, as the official EMA calls its tensors (SPEC section 6).
 * p->format other than WEIGHTS_REAL: matrices have no value but are packed, row by row, so that a file's pages need not
 * stay in memory. */
Err params_map(Params *p, const Checkpoint *ck, const char *prefix, int strip_dots);
/* Whether the file has all of the table's tensors, in their shapes; their numbers are not looked at. */
Err params_fit(const Params *p, const Checkpoint *ck, const char *prefix, int strip_dots);
int params_has(const Params *p, const char *name);
/* Tensors for checkpoint_write: `which` of every row, named prefix+name. Appends to *list (capacity grows). */
typedef struct {
    Tensor *tensor;
    int *from_real;
    size_t n, capacity;
    void *kept; /* data made for this list, freed with it; or NULL */
} TensorList;
Err tensor_list_params(TensorList *list, const Params *p, char which, const char *prefix, Dtype dtype);
Err tensor_list_add(TensorList *list, const char *name, Dtype dtype, int ndim, const size_t *dim, const void *data,
                    int from_real);
void tensor_list_free(TensorList *list);

/* ---- profile.c: what the numbers of a picture mean as colours ---- */
enum { PROFILE_BYTES = 1 << 20 }; /* of a profile at most */
typedef struct {
    uint8_t *bytes;
    size_t size;      /* 0: none, the picture is sRGB or says nothing */
    const char *note; /* why the file's is left out, or NULL */
} Profile;
/* *p = the ICC profile of a file that image_decode takes; to be released with profile_free. */
Err profile_read(Profile *p, const uint8_t *bytes, size_t n);
void profile_free(Profile *p);

/* ---- images.c, pixels.c, png.c, resize.c, mask.c: pictures in and out ---- */
typedef struct {
    size_t H, W;
    uint8_t *rgb;     /* (H,W,3) */
    uint8_t *alpha;   /* (H,W) or NULL: opaque. PNGs are written with it; nothing else looks at it. */
    const char *note; /* what of the file is left out, such as the other pictures of an animation; NULL: nothing */
    const Profile *profile; /* another's, or NULL: PNGs are written with it; nothing else looks at it. */
} Image;
enum { IMAGE_MAX_SIDE = 32768 };
/* How a file becomes RGB: flags. */
enum {
    IMAGE_UPRIGHT = 1, /* as it was held (EXIF, XMP); else as it lies in the file */
    IMAGE_OFFICIAL =
        2, /* as Pillow's convert("RGB") does: alpha is dropped, of 16 bits the upper 8 stay, CMYK is always
                           inverted; else alpha is composited on white, 16 bits are rounded, and CMYK is inverted after an
                           Adobe marker */
    IMAGE_ON_BLACK =
        4, /* alpha is composited on black: masks, whose black parts and whose transparent ones are holes */
    IMAGE_STRAIGHT = 8, /* the colours as they are beside alpha */
    IMAGE_ALPHA = 16    /* of a PNG or a WebP: alpha as grey */
};
enum { DECODE_BYTES = 128 << 20 }; /* that all threads together take to decode pictures, but for a huge one */
/* PNG, JPEG or (where libwebp was found) WebP, told by content, as 8-bit RGB. Truncated or foreign content is DAMAGED;
 * no memory is FAILED. Errors name no file. */
Err image_decode(Image *im, const uint8_t *bytes, size_t size, int how);
/* The same of at most that many pixels (0: as image_decode); *too_many is set where there are more. */
Err image_decode_most(Image *im, const uint8_t *bytes, size_t size, int how, size_t pixels, int *too_many);
/* A file; errors name it. image_read: IMAGE_UPRIGHT. */
Err image_read_as(Image *im, const char *path, int how);
Err image_read(Image *im, const char *path);
/* Atomic. text: tEXt/iTXt chunks (seed, model, options). */
Err image_write_png(const char *path, const Image *im, const Config *text);
/* The same bytes in memory; release with free(). */
Err image_encode_png(uint8_t **bytes, size_t *size, const Image *im, const Config *text);
/* png_text.c. Adds the texts of a PNG, key by key; one that has a key twice gives the first. DAMAGED: no PNG, or one with
 * more texts than any picture needs. */
enum { MOST_TEXTS = 256 }; /* ours have about 20 */
Err png_read_texts(Config *to, const uint8_t *bytes, size_t n);
/* The same with every pixel as enlarge x enlarge of its colour. */
Err image_write_png_enlarged(const char *path, const Image *im, size_t enlarge, const Config *text);
/* apng.c. An animated PNG: make(context, i, &im) gives frame i of n, all of one size; im is freed here. They follow each
 * other every FRAME_MS, the last stays for LAST_FRAME_MS, over and over again. Viewers that know no animations show the
 * last. Atomic. */
typedef Err FrameMake(void *context, size_t i, Image *im);
Err image_write_apng(const char *path, size_t n, FrameMake *make, void *context, size_t enlarge, const Config *text);
enum { FRAME_MS = 700, LAST_FRAME_MS = 2500 };
void image_free(Image *im);
typedef enum {
    FILTER_NEAREST, /* source pixel floor(i*in/out) */
    FILTER_LINEAR,  /* OpenCV INTER_LINEAR: no antialias, exact 2:1 is a 2x2 mean */
    FILTER_BICUBIC  /* Pillow BICUBIC: antialiased, a = -0.5 */
} Filter;
Err image_resize(Image *out, const Image *in, size_t H, size_t W, Filter filter);

/* The official preprocessing of each dataset (SPEC section 10). */
typedef enum {
    PREP_FOLDER,   /* ours, for any folder: centre square, antialiased bicubic */
    PREP_FFHQ,     /* short side to size by FILTER_LINEAR, centre crop, no flip */
    PREP_IMAGENET, /* the same; training takes a random crop */
    PREP_LSUN      /* centre square, then FILTER_BICUBIC; training flips at random */
} Prep;
/* data.prep of a recipe or a file: folder (without one), ffhq, imagenet, lsun; or the official data.params.train.target
 * and validation.target. The sizes that stand with those must be this one. */
Err prep_read(Prep *out, const Config *c);
Err prep_size_check(const Config *c, size_t size);
/* out (3,size,size) = the picture in [-1,1] (u8/127.5 - 1). u_crop_y, u_crop_x in [0,1): where a random crop lies
 * (PREP_IMAGENET in training; pass -1 for a centre crop); flip: mirror left-right. */
Err image_prepare(real *out, const Image *im, Prep prep, size_t size, double u_crop_y, double u_crop_x, int flip);
/* prep_how: the flags with which pictures of a preset are decoded. */
int prep_how(Prep prep);
const char *prep_name(Prep prep); /* as data.prep has it */
/* im = the same (size,size) as pixels, from a centre crop. */
Err image_square(Image *im, Prep prep, size_t size);
/* keep (size,size) = 1 where the same square of a mask is light: the mean of red, green and blue is 128 or more in all
 * pixels that lie there, so that no thin stroke is lost. invert: where it is dark. */
Err mask_square(uint8_t *keep, const Image *mask, Prep prep, size_t size, int invert);
/* mask.c. Light parts of a mask stay, dark ones are holes: how it is seen, given what of it is transparent. *note: how that
 * was taken; NULL: nothing is. pixels, too_many: see image_decode_most. */
Err mask_decode(Image *mask, const char **note, const uint8_t *bytes, size_t size, int invert, size_t pixels,
                int *too_many);
int mask_keeps(const Image *mask, size_t y, size_t x, int invert);
/* keep (size,size) = 1 where the mask in a file keeps the picture of H x W pixels that it belongs to; its own
 * size is that or (size,size). Errors name the file. *note: how its transparent parts were taken; NULL: it has none. */
Err mask_read(uint8_t *keep, const char **note, const char *path, Prep prep, size_t size, size_t H, size_t W,
              int invert);
/* The error of a mask that has neither size. */
Err mask_size_error(const Image *mask, size_t H, size_t W, size_t size);
/* images (planes,side,side): left and right change places. */
void image_mirror(real *images, size_t planes, size_t side);
/* (n,3,H,W) in [-1,1] -> one picture, `columns` wide, `gap` white pixels between; official u8 truncation
 * (255*clip((x+1)/2,0,1)). */
Err image_grid(Image *out, const real *images, size_t n, size_t H, size_t W, size_t columns, size_t gap);
/* The sides of that picture; an error if it would be too large. */
Err image_grid_size(size_t *out_H, size_t *out_W, size_t n, size_t H, size_t W, size_t columns, size_t gap);

/* tokens.c. A dataset encoded once. File: magic, sizes, checksum of the VQGAN, labels, then 16-bit tokens (n, crops,
 * flips, N). */
enum { CROPS_MAX = 64 };
typedef struct {
    size_t n, h, w, K, flips; /* flips: 1 as they are, 2 also mirrored */
    size_t crops;             /* of each picture, 1..CROPS_MAX */
    uint64_t vqgan;           /* file_checksum of the first stage */
    uint64_t source;          /* hash of the dataset's identity and preprocessing */
    int32_t *label;           /* (n) */
    uint16_t *token;          /* (n, crops, flips, h*w) */
} Tokens;
Err tokens_read(Tokens *x, const char *path);
void tokens_free(Tokens *x);
/* Making one, so that a kill costs a batch at most. tokens_start: sizes says what `path` is to hold (n counts damaged
 * pictures too); what an earlier run left in path.part is continued if it is of the same first stage and dataset, from
 * picture `done`, a multiple of batch or all. Waits while another process makes the same file. */
typedef struct {
    Tokens sizes;
    size_t done, bytes; /* pictures; of a record */
    uint8_t *record;
    int fd;
    char path[PATH_BYTES], part[PATH_BYTES];
} TokensPart;
Err tokens_start(TokensPart *p, const char *path, const Tokens *sizes, size_t batch);
/* token (crops, flips, h*w); label -1: a damaged picture */
Err tokens_append(TokensPart *p, int32_t label, const int32_t *token);
/* Writes path from what was appended, without the damaged pictures; x is it. The part file is removed. */
Err tokens_finish(TokensPart *p, Tokens *x);
/* What a kill left between the two: path.part beside a whole path, unless another process has it. */
void tokens_drop_part(const char *path);
void tokens_stop(TokensPart *p); /* releases; what was appended stays for the next start */

/* ---- recipe.c: named models and recipes ---- */
typedef struct {
    const char *name, *folder, *vqgan, *zip, *schedule, *what; /* what: one line for --list */
    int T;
    const char *codes;    /* "548 / 1024" */
    const char *stand_in; /* the class of the bundled model that comes closest; NULL: any */
} NamedModel;
const NamedModel *named_models(size_t *n); /* the table */
/* A recipe (models/NAME.txt) is a list of "part.key value" lines; part is vqgan, scale (encoder-decoder scales and
 * joint), last (scale T), joint or scaleN (that alone, overrides). Keys are the official configuration's. *to gets the
 * keys of one scale, 0: joint, or of the first stage. */
enum { RECIPE_VQGAN = -1 };
Err recipe_read(Config *to, const char *path, int scale);
/* The folder of a named model, where models_find finds it; any other name is a folder already. */
const char *model_folder(char path[PATH_BYTES], const char *name_or_folder);
const NamedModel *find_named(const char *name); /* NULL: no model of that name */
/* ---- places.c: where models/ is: $IMAGEBART_MODELS, here, beside the program ---- */
/* path = the first of the three places' that is there; usual: its name as here, "models/emoji". 0: none is, and path =
 * usual. */
int models_find(char path[PATH_BYTES], const char *usual);
int is_folder(const char *path); /* or a link to one */
/* An error if IMAGEBART_MODELS names no folder. */
Err models_check(void);
/* folder = the i-th of the places that are there; 0: there are no more. */
int models_place(char folder[PATH_BYTES], int i);
enum { PLACES_BYTES = 1024, FETCH_BYTES = PATH_BYTES + 64 };
const char *models_places(char text[PLACES_BYTES]); /* where was looked, for messages */
/* The command that fetches an official model, from here: "make ffhq". */
const char *models_fetch(char text[FETCH_BYTES], const char *name);

/* betas.c. beta[1..T] as redraw_prob of a recipe names them: a number, "alphacum:a0,a1,...", "ffhq_bernoulli_PSIM"
 * (T = 2), "bernoulli_PSIM" (T = 3 or 5), or "curve:FILE": equal steps of a metric curve (two columns: alphacum,
 * metric). */
Err betas_read(float *beta, const char *redraw_prob, int T);

/* ---- letters.c: texts that look the same but for case ---- */
/* Do the first `length` bytes of a string begin as the name does, or with `whole`, are they that? */
int letters_begin(const char *text, size_t length, const char *name, int whole);

/* ---- classes.c: what a model's classes are called ---- */
typedef struct {
    char **name; /* (n) all names of a class, after its synset if it has one: "n01440764 tench, Tinca tinca" */
    size_t n;
    int verbatim; /* the names are those of folders, as they are: a comma in one is a comma */
} Classes;
/* From imagebart.classes: a class a line, or (older models) between commas; NULL: the numbers below `most`, which is
 * how many classes the network knows. */
Err classes_open(Classes *c, const char *list, size_t most);
void classes_free(Classes *c);
/* A class's first name, without its synset, for messages. */
enum { CLASS_TITLE_BYTES = 80 };
const char *class_title(char out[CLASS_TITLE_BYTES], const Classes *c, size_t label);
/* How many classes have exactly this name or synset, whatever its case; *label = the first of them. */
size_t classes_named(const Classes *c, const char *name, int32_t *label);
/* A number, a synset, a name or a part of one -> label; an ambiguous or unknown one is an error that lists what there
 * is. */
Err classes_find(const Classes *c, const char *name, int32_t *label);
/* A recipe's imagebart.class_list FILE (relative to the recipe) becomes imagebart.classes, the file's text. */
Err classes_from_recipe(Config *to, const char *recipe);
/* imagebart.classes for a model trained on pictures in these folders: what a recipe listed stays if the folders are
 * those classes one by one, such as ImageNet's synsets; else it is the folders' names, which must be UTF-8 of one line. */
Err classes_from_folders(Config *to, char *const *folder, size_t n);

/* ---- Pictures in files; LMDBs ---- */

enum { IMAGE_FILE_BYTES = 1 << 30 };
/* What a file is by its first bytes. *name, for messages: "GIF", "text", ... */
typedef enum {
    FILE_UNKNOWN,
    FILE_PNG,
    FILE_JPEG,
    FILE_WEBP,
    FILE_FOREIGN, /* a picture that image_decode does not know */
    FILE_OTHER
} FileKind;
FileKind file_kind(const char **name, const uint8_t *bytes, size_t n);
/* One that image_decode knows */
int is_picture(const uint8_t *bytes, size_t n);

/* image_prepare in its two steps. out = im with its short side resized to size, or its centre square for the presets
 * that cut first. A shape that gives too long a side is DAMAGED. */
Err prep_resize(Image *out, const Image *im, Prep prep, size_t size);
/* The same from a file's bytes, row by row as they are decoded, with the preset's flags. */
Err image_decode_prepared(Image *im, const uint8_t *bytes, size_t size, Prep prep, size_t side);
/* out (3,size,size) = a window of im (at least size x size), [0,255] to [-1,1]. */
void prep_crop(real *out, const Image *im, size_t size, double u_y, double u_x, int flip);

/* lmdb.c */
typedef struct Lmdb Lmdb;
enum { LMDB_KEY_BYTES = 1024, LMDB_NAME_BYTES = 3 * LMDB_KEY_BYTES + 1 };
int lmdb_is(const uint8_t *bytes, size_t n); /* bytes: the beginning of a file */
Err lmdb_open(Lmdb **out, const char *path); /* path of the file, FOLDER/data.mdb as a rule */
const char *lmdb_path(const Lmdb *x);
void lmdb_close(Lmdb *x); /* NULL is fine */
/* Calls take for every key in the database's order (bytes compared), with the size of its value. */
typedef Err LmdbTake(void *context, const char *name, size_t value_bytes);
Err lmdb_names(Lmdb *x, LmdbTake *take, void *context);
/* *bytes (*size) = a copy of the value of that name; release with free(). Any number of threads at a time. */
Err lmdb_value(Lmdb *x, const char *name, uint8_t **bytes, size_t *size);

/* ---- npy.c: *out (*n) = the whole numbers of a NumPy array of one dimension, 1 to `most` ---- */
Err npy_read(int64_t **out, size_t *n, const char *path, size_t most);

/* ---- remap.c: which n of n_codes codebook entries are tokens (the official quantize.used). n = 0: all, and used and
 *      inverse are NULL. ---- */
typedef struct {
    size_t n, n_codes;
    int32_t *used, *inverse; /* (n) entry of a token; (n_codes) token of an entry, -1: none */
    int from_file;           /* they are those of VqganConfig.remap */
} Remap;
Err remap_load(Remap *r, const Checkpoint *ck, const char *prefix); /* its tensor prefix + quantize.used */
/* The error of a remap of which config_file has found no file, but `path`; `besides` ends it. Returns FAILED. */
Err remap_missing(const Config *c, const char *prefix, const char *path, const char *besides);
/* How many of used (n), entries below n_codes, are listed further ahead already: tokens that no picture gets */
Err remap_repeated(size_t *repeated, const int64_t *used, size_t n, size_t n_codes);
/* *used (*n) = the entries that a .npy lists as tokens (the official remap), 1 to n_codes of them */
Err remap_file(int64_t **used, size_t *n, const char *path, size_t n_codes);
void remap_free(Remap *r);
static inline size_t remap_K(const Remap *r) { /* how many tokens there are */
    return r->n ? r->n : r->n_codes;
}
/* tokens (B,N) of entries; an entry that is none becomes a random token, drawn from RNG_UNKNOWN under seed (SPEC section
 * 8: unknown_index). Entries of tokens; a token outside 0..K-1 is an error. */
void remap_tokens(const Remap *r, int32_t *tokens, const int32_t *code, size_t B, size_t N, uint64_t seed);
Err remap_entries(const Remap *r, int32_t *code, const int32_t *tokens, size_t B, size_t N);
/* For params_sort: the order of a first stage's tensors in PyTorch's state dict, from that in which its layers run. */
int vqgan_row_order(const char *a, const char *b);

/* ---- vqgan_config.c: the settings of a first stage (vqgan.c), as the official files have them ---- */
enum { VQ_LEVELS = 8 };
typedef struct { /* the official ddconfig and quantiser settings, under their official names */
    size_t ch, levels, ch_mult[VQ_LEVELS], num_res_blocks;
    size_t n_attn, attn_resolutions[VQ_LEVELS], resolution; /* attention where resolution/2^level is listed */
    size_t in_channels, out_ch, z_channels, embed_dim, n_embed;
    size_t re_embed;        /* entries of the remap table `used`; 0: no remapping */
    char remap[PATH_BYTES]; /* the .npy that says them where the file of the weights does not; "": none */
    int tanh_out;           /* the official code ignores it: see vqgan_create */
    int legacy;             /* 1 (official default): beta multiplies the codebook term; 0: the commitment term */
    double beta;            /* 0.25 */
    int resamp_with_conv;   /* 1 (official default): convolutions halve and double; 0: means and copies of pixels */
} VqganConfig;
Err remap_make(Remap *r, const VqganConfig *c);                                /* without a .npy the first re_embed */
Err vqgan_config_read(VqganConfig *c, const Config *from, const char *prefix); /* prefix e.g. "model.params." */
Err vqgan_config_write(Config *to, const VqganConfig *c, const char *prefix);
/* An error if vqgan.c could not build that. */
Err vqgan_config_check(const VqganConfig *c);
/* Those of a first stage that a program opens or trains, from the keys "model.params.*": one for pictures of three
 * channels, whose grid has a token at least. ck: the file of its weights, whose names begin with `tensors`, and whose
 * quantize.used is what re_embed counts, or else the .npy that remap names; NULL: there is none yet. */
Err first_stage_config(VqganConfig *c, const Config *from, const Checkpoint *ck, const char *tensors);
/* An error if the file has a tensor of those that begin with `tensors` that nothing of a first stage with this table p
 * asks for, and that is not known to be harmless: then it is of another network. */
Err first_stage_known(const Params *p, const Checkpoint *ck, const char *tensors);

/* ---- net_config.c: the settings of a transition network (transformer.cu), as the official files have them ---- */
enum { NET_LENGTH_MAX = 1 << 20 };       /* tokens of a sequence */
typedef enum { NET_X, NET_GPT } NetKind; /* encoder-decoder; decoder-only */
typedef enum { X_PLAIN, X_SCALED, X_FINE_SCALED, X_RESIDUAL, X_RESIDUAL_SCALED } XVariant;
typedef struct {
    NetKind kind;
    XVariant variant;                                             /* NET_X only */
    int n_scales;                                                 /* T: rows of log_scalors */
    int has_class;                                                /* prompt is (t, class) rather than (t) */
    size_t dim;                                                   /* n_embd */
    size_t enc_num_tokens, enc_depth, enc_heads, enc_max_seq_len; /* NET_X */
    size_t dec_num_tokens, dec_depth, dec_heads,
        dec_max_seq_len;                 /* NET_GPT: vocab_size = K, n_layer, n_head, block_size */
    size_t input_vocab_size, n_unmasked; /* NET_GPT */
    int tie_token_emb;                   /* NET_X */
} NetConfig;
/* From the official keys under prefix + "transformer_config."; has_class from "conditioner_config.target". */
Err net_config_read(NetConfig *c, const Config *from, const char *prefix);
Err net_config_write(Config *to, const NetConfig *c, const char *prefix);
/* An error if the file has a tensor below "transformer." that nothing of a transition with this table p asks for: then it
 * is of another network. */
Err transition_known(const NetConfig *c, const Params *p, const Checkpoint *ck);
/* out: that the file has tensors beside those of a transition, which the official code passes over too. NULL: it has
 * none. */
const char *transition_note(char out[ERR_MAX], const Checkpoint *ck);
/* What the official classes have besides parameters: a GPT's masks, the second name of a tied embedding. */
Err net_derived_tensors(TensorList *list, const NetConfig *c);
/* An error if transformer.cu could not build that. */
Err net_config_check(const NetConfig *c);
/* Of the prompt in front of x_t or of a GPT's tokens: t, and the class if there is one. */
static inline size_t prompt_length(const NetConfig *c) {
    return c->has_class ? 2 : 1;
}
static inline int is_scaled(const NetConfig *c) {
    return c->variant == X_SCALED || c->variant == X_FINE_SCALED || c->variant == X_RESIDUAL_SCALED;
}
static inline int is_residual(const NetConfig *c) {
    return c->variant == X_RESIDUAL || c->variant == X_RESIDUAL_SCALED;
}

/* Rows of the table that embeds t and the class label */
static inline size_t prompt_tokens(const NetConfig *c) {
    return c->kind == NET_X ? c->enc_num_tokens : c->input_vocab_size;
}

#ifdef __cplusplus
}
#endif
#endif
