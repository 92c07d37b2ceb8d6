/* lmdb.c - pictures in an LMDB, the key-value file in which LSUN is distributed.
 *
 * Owns what liblmdb is used for: opening a database read-only, its keys in their order (the order in which the official
 * LSUN scripts visit them), and one value at a time, from any number of threads.
 *
 * Refuses: files that are not an LMDB, of another format version, shorter than their header says, or whose pages point
 * anywhere but into the file; liblmdb maps a file into memory and trusts it, so that every page of keys is looked at
 * before. Whether the values are pictures, images.c finds out.
 *
 * How it is built: a key becomes a name, in which all but printable ASCII is written %XX, and a name a key again; with
 * the path of the file in front it looks like a file in a folder, and no real file can have that path. Nobody writes to
 * a data set that is trained on, so no lock file is made or needed. Without liblmdb every function says how to get
 * it. */
#include "files/files.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* The two header pages (mdb.c's MDB_page, then MDB_meta, on 64-bit machines); the newer one counts. */
enum {
    META_AT = 16,
    MAGIC_AT = META_AT,
    VERSION_AT = META_AT + 4,
    PAGE_BYTES_AT = META_AT + 24,
    META_END = META_AT + 136
};
enum { FLAGS_AT = META_AT + 76, ROOT_AT = META_AT + 112 }; /* of the database without a name */
enum { LAST_PAGE_AT = META_AT + 120, TRANSACTION_AT = META_AT + 128, VERSION = 1 };
static const uint32_t LMDB_MAGIC = 0xBEEFC0DE;

int lmdb_is(const uint8_t *bytes, size_t n) {
    return n >= META_END && memcmp(bytes + MAGIC_AT, &LMDB_MAGIC, sizeof LMDB_MAGIC) == 0;
}

#ifdef HAVE_LMDB
#include <lmdb.h>

struct Lmdb {
    MDB_env *env;
    MDB_dbi dbi;
    size_t file_bytes;
    size_t path_bytes;
    char path[];
};

const char *lmdb_path(const Lmdb *x) {
    return x->path;
}

void lmdb_close(Lmdb *x) {
    if (x && x->env) mdb_env_close(x->env);
    free(x);
}

/* The newer header's numbers, how many pages were looked at, and what the pages still to come are held to. */
typedef struct {
    const char *path;
    int fd;
    uint32_t page_bytes; /* 0: unknown yet */
    uint16_t flags;
    uint64_t pages, transaction, root, visited;
    int leaf_depth;               /* of the first leaf, which all others share; -1: none was met */
    uint8_t last[LMDB_KEY_BYTES]; /* the last key, of a leaf or of a branch */
    size_t last_bytes;
    int last_of_branch; /* then the next leaf's first key may be the same */
} Tree;

static Err check_header(Tree *t, size_t at) {
    uint8_t head[META_END];
    uint32_t version, size;
    uint64_t last, number;
    if (pread(t->fd, head, sizeof head, (off_t)at) != (ssize_t)sizeof head || !lmdb_is(head, sizeof head))
        return err("%s: is not an LMDB, or a damaged one: its header %zu is not there", t->path, at ? (size_t)1 : 0);
    memcpy(&version, head + VERSION_AT, sizeof version);
    memcpy(&size, head + PAGE_BYTES_AT, sizeof size);
    memcpy(&last, head + LAST_PAGE_AT, sizeof last);
    memcpy(&number, head + TRANSACTION_AT, sizeof number);
    if (version != VERSION) return err("%s: is an LMDB of format %u, %d expected", t->path, version, VERSION);
    if (size < 512 || size > 65536 || (size & (size - 1)) != 0 || (t->page_bytes && size != t->page_bytes))
        return err("%s: damaged LMDB: pages of %u bytes", t->path, size);
    if (last >= UINT64_MAX / 65536) return err("%s: damaged LMDB: %ju pages", t->path, (uintmax_t)last);
    if (!t->page_bytes || number > t->transaction) {
        t->pages = last + 1, t->transaction = number;
        memcpy(&t->flags, head + FLAGS_AT, sizeof t->flags);
        memcpy(&t->root, head + ROOT_AT, sizeof t->root);
    }
    t->page_bytes = size;
    return OK;
}

/* A page: its number (8 bytes), 2 unused, flags, where free space begins and ends (2 each), then where each node lies
 * (2 each). A node: three 16-bit words (a value's size, or a page's number), the key's size, the key, the value; a
 * large value lies in pages of its own, whose first one's number stands here. */
enum { PAGE_HEAD = 16, NODE_HEAD = 8, BRANCH = 1, LEAF = 2, BIG_VALUE = 1, DEEPEST = 32 };

static Err damaged(const Tree *t, uint64_t page, const char *what) {
    return err("%s: damaged LMDB: page %ju: %s", t->path, (uintmax_t)page, what);
}

static unsigned word(const uint8_t *p) {
    uint16_t x;
    memcpy(&x, p, sizeof x);
    return x;
}

/* The node at `at` of a leaf: its value lies in the page, or in the file. */
static Err check_value(const Tree *t, uint64_t number, const uint8_t *page, size_t at) {
    const unsigned flags = word(page + at + 4);
    const uint64_t size = word(page + at) | (uint64_t)word(page + at + 2) << 16, file = t->pages * t->page_bytes;
    const size_t value = at + NODE_HEAD + word(page + at + 6);
    uint64_t first;
    if (flags & ~(unsigned)BIG_VALUE)
        return damaged(t, number, "a value that is no picture: a database or several values");
    if (!flags) return value + size <= t->page_bytes ? OK : damaged(t, number, "a value is longer than the page");
    if (value + sizeof first > t->page_bytes) return damaged(t, number, "a value lies behind the page");
    memcpy(&first, page + value, sizeof first);
    return first > 1 && first < t->pages && size <= file - first * t->page_bytes - PAGE_HEAD
               ? OK
               : damaged(t, number, "a value lies behind the file");
}

/* Keys are in ascending order over the whole tree: a branch's key stands between the keys on its two sides. */
static Err check_key(Tree *t, uint64_t number, const uint8_t *node, unsigned page_kind) {
    const size_t n = word(node + 6), common = min_size(n, t->last_bytes);
    if (n == 0 || n > LMDB_KEY_BYTES) return damaged(t, number, "a key's length is nonsense");
    int order = memcmp(node + NODE_HEAD, t->last, common);
    if (order == 0) order = (n > t->last_bytes) - (n < t->last_bytes);
    if (order < 0 || (order == 0 && !(t->last_of_branch && page_kind == LEAF)))
        return damaged(t, number, "its keys are out of order");
    memcpy(t->last, node + NODE_HEAD, n);
    t->last_bytes = n;
    t->last_of_branch = page_kind == BRANCH;
    return OK;
}

/* The pages from page `number` down; branches hold two or more. */
static Err check_page(Tree *t, uint64_t number, int depth) {
    uint8_t *page;
    if (number < 2 || number >= t->pages) return damaged(t, number, "is not there");
    if (depth == DEEPEST || t->visited++ == t->pages) return damaged(t, number, "is met in circles");
    TRY(mem_alloc(&page, t->page_bytes, 1, "a page"));
    uint64_t self = 0;
    Err e = OK;
    if (pread(t->fd, page, t->page_bytes, (off_t)(number * t->page_bytes)) != (ssize_t)t->page_bytes)
        e = damaged(t, number, "cannot be read");
    memcpy(&self, page, sizeof self);
    const unsigned flags = word(page + 10), lower = word(page + 12), upper = word(page + 14);
    const size_t n = lower < PAGE_HEAD ? 0 : (lower - PAGE_HEAD) / 2;
    if (e == OK && (self != number || (flags != BRANCH && flags != LEAF) || lower % 2 || upper > t->page_bytes ||
                    lower > upper || n < (flags == BRANCH ? 2 : 1)))
        e = damaged(t, number, "its head is nonsense");
    if (e == OK && flags == LEAF && t->leaf_depth < 0) t->leaf_depth = depth;
    if (e == OK && (flags == LEAF ? depth != t->leaf_depth : t->leaf_depth >= 0 && depth >= t->leaf_depth))
        e = damaged(t, number, "lies deeper or less deep than others of its kind");
    for (size_t i = 0; i < n && e == OK; i++) {
        const size_t at = word(page + PAGE_HEAD + 2 * i);
        if (at < upper || at % 2 || at + NODE_HEAD > t->page_bytes ||
            at + NODE_HEAD + word(page + at + 6) > t->page_bytes)
            e = damaged(t, number, "a key lies behind the page");
        else if (flags == LEAF || i > 0) /* the first key of a branch is none */
            e = check_key(t, number, page + at, flags);
        if (e != OK) break;
        if (flags == LEAF)
            e = check_value(t, number, page, at);
        else
            e = check_page(t,
                           word(page + at) | (uint64_t)word(page + at + 2) << 16 | (uint64_t)word(page + at + 4) << 32,
                           depth + 1);
    }
    free(page);
    return e;
}

static Err check_tree(Tree *t, size_t file_bytes) {
    TRY(check_header(t, 0));
    TRY(check_header(t, t->page_bytes));
    if (t->pages * t->page_bytes > (uint64_t)file_bytes)
        return err("%s: the LMDB is cut short: %zu bytes, its header says %ju; copy it again", t->path, file_bytes,
                   (uintmax_t)(t->pages * t->page_bytes));
    if (t->flags) return err("%s: an LMDB of flags %#x, which no data set of pictures has", t->path, t->flags);
    return t->root == UINT64_MAX ? OK : check_page(t, t->root, 0); /* no root: nothing in it */
}

static Err check_file(const char *path, size_t *file_bytes) {
    Tree t = {.path = path, .leaf_depth = -1};
    TRY(file_open(&t.fd, file_bytes, path));
    Err e = check_tree(&t, *file_bytes);
    close(t.fd);
    return e;
}

static Err failed(const char *path, int code) {
    return err("%s: LMDB: %s", path, mdb_strerror(code));
}

Err lmdb_open(Lmdb **out, const char *path) {
    enum { ROUND = 65536 };
    size_t file_bytes = 0, length = strlen(path);
    Lmdb *x;
    MDB_txn *txn = NULL;
    *out = NULL;
    TRY(check_file(path, &file_bytes));
    TRY(mem_alloc(&x, 1, sizeof *x + length + 1, "an LMDB"));
    memcpy(x->path, path, length + 1);
    x->path_bytes = length;
    x->file_bytes = file_bytes;
    int code = mdb_env_create(&x->env);
    /* no more is mapped than there is; NORDAHEAD: pictures are read in random order */
    if (!code) code = mdb_env_set_mapsize(x->env, (file_bytes + ROUND - 1) / ROUND * ROUND);
    if (!code) code = mdb_env_open(x->env, path, MDB_RDONLY | MDB_NOLOCK | MDB_NOSUBDIR | MDB_NOTLS | MDB_NORDAHEAD, 0);
    if (!code) code = mdb_txn_begin(x->env, NULL, MDB_RDONLY, &txn);
    if (!code) code = mdb_dbi_open(txn, NULL, 0, &x->dbi);
    if (!code)
        code = mdb_txn_commit(txn);
    else if (txn)
        mdb_txn_abort(txn);
    if (code) {
        lmdb_close(x);
        return failed(path, code);
    }
    *out = x;
    return OK;
}

/* name (LMDB_NAME_BYTES) = key, reversibly */
static void name_of_key(char *name, const MDB_val *key) {
    const uint8_t *p = key->mv_data;
    for (size_t i = 0; i < key->mv_size && i < LMDB_KEY_BYTES; i++)
        name += p[i] > ' ' && p[i] <= '~' && p[i] != '%' ? (*name = (char)p[i], 1) : sprintf(name, "%%%02X", p[i]);
    *name = 0;
}

/* key (LMDB_KEY_BYTES) = name back; its length */
static size_t key_of_name(uint8_t *key, const char *name) {
    size_t n = 0;
    for (unsigned code; *name && n < LMDB_KEY_BYTES; n++)
        if (*name == '%' && sscanf(name, "%%%2X", &code) == 1)
            key[n] = (uint8_t)code, name += 3;
        else
            key[n] = (uint8_t)*name++;
    return n;
}

Err lmdb_names(Lmdb *x, LmdbTake *take, void *context) {
    char name[LMDB_NAME_BYTES];
    MDB_txn *txn = NULL;
    MDB_cursor *cursor = NULL;
    MDB_val key, value;
    Err e = OK;
    int code = mdb_txn_begin(x->env, NULL, MDB_RDONLY, &txn);
    if (!code) code = mdb_cursor_open(txn, x->dbi, &cursor);
    while (e == OK && !code && !(code = mdb_cursor_get(cursor, &key, &value, MDB_NEXT_NODUP))) {
        if (key.mv_size > LMDB_KEY_BYTES)
            e = err("%s: a key of %zu bytes; at most %d expected", x->path, key.mv_size, LMDB_KEY_BYTES);
        if (e == OK) name_of_key(name, &key);
        if (e == OK) e = take(context, name, value.mv_size);
    }
    if (cursor) mdb_cursor_close(cursor);
    if (txn) mdb_txn_abort(txn);
    return e != OK || code == MDB_NOTFOUND ? e : failed(x->path, code);
}

Err lmdb_value(Lmdb *x, const char *name, uint8_t **bytes, size_t *size) {
    uint8_t text[LMDB_KEY_BYTES];
    MDB_val key = {key_of_name(text, name), text}, value;
    MDB_txn *txn = NULL;
    *bytes = NULL, *size = 0;
    int code = mdb_txn_begin(x->env, NULL, MDB_RDONLY, &txn);
    if (code) return failed(x->path, code);
    code = mdb_get(txn, x->dbi, &key, &value);
    Err e = code ? failed(x->path, code) : OK;
    if (e == OK && value.mv_size > x->file_bytes)
        e = err("%s: damaged LMDB: a value of %zu bytes", x->path, value.mv_size);
    if (e == OK) e = mem_alloc(bytes, value.mv_size, 1, "a picture's bytes");
    if (e == OK) memcpy(*bytes, value.mv_data, *size = value.mv_size);
    mdb_txn_abort(txn);
    return e;
}

#else

static Err left_out(const char *path) {
    return err(
        "%s: is an LMDB, and this build reads none: install liblmdb (Debian: apt-get install liblmdb-dev) and run "
        "make again",
        path);
}
Err lmdb_open(Lmdb **out, const char *path) {
    *out = NULL;
    return left_out(path);
}
const char *lmdb_path(const Lmdb *x) {
    (void)x;
    return "";
}
void lmdb_close(Lmdb *x) {
    (void)x;
}
Err lmdb_names(Lmdb *x, LmdbTake *take, void *context) {
    (void)x, (void)take, (void)context;
    return left_out("it");
}
Err lmdb_value(Lmdb *x, const char *name, uint8_t **bytes, size_t *size) {
    (void)x, (void)bytes, (void)size;
    return left_out(name);
}
#endif
