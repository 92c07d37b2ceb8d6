/* lmdb.c - pictures in an LMDB, the key-value file in which LSUN is distributed.
 *
 * Owns what liblmdb is used for: opening a database read-only, its keys in their order (the order in which the official
 * LSUN scripts visit them), and one value at a time, from any number of threads.
 *
 * Refuses: files that are not an LMDB, of another format version, or shorter than their header says; liblmdb maps a file
 * into memory and trusts it, so that this is looked at before. Whether the values are pictures, images.c finds out.
 *
 * How it is built: a key becomes a name, in which all but printable ASCII is written %XX, and a name a key again; with
 * the path of the file in front it looks like a file in a folder, and no real file can have that path. Nobody writes to
 * a data set that is trained on, so no lock file is made or needed. Without liblmdb every function says how to get it. */
#include "data.h"

#include <errno.h>
#include <fcntl.h>
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

/* One header page at `at`: *page_bytes (0: unknown yet), *pages and *transaction of the newer one so far. */
static Err check_header(int fd, const char *path, size_t at, uint32_t *page_bytes, uint64_t *pages,
                        uint64_t *transaction) {
    uint8_t head[META_END];
    uint32_t version, size;
    uint64_t last, number;
    if (pread(fd, head, sizeof head, (off_t)at) != (ssize_t)sizeof head || !lmdb_is(head, sizeof head))
        return err("%s: is not an LMDB, or a damaged one: its header %zu is not there", path, at ? (size_t)1 : 0);
    memcpy(&version, head + VERSION_AT, sizeof version);
    memcpy(&size, head + PAGE_BYTES_AT, sizeof size);
    memcpy(&last, head + LAST_PAGE_AT, sizeof last);
    memcpy(&number, head + TRANSACTION_AT, sizeof number);
    if (version != VERSION) return err("%s: is an LMDB of format %u, %d expected", path, version, VERSION);
    if (size < 512 || size > 65536 || (size & (size - 1)) != 0 || (*page_bytes && size != *page_bytes))
        return err("%s: damaged LMDB: pages of %u bytes", path, size);
    if (last >= UINT64_MAX / 65536) return err("%s: damaged LMDB: %ju pages", path, (uintmax_t)last);
    if (!*page_bytes || number > *transaction) *pages = last + 1, *transaction = number;
    *page_bytes = size;
    return OK;
}

static Err check_file(const char *path, size_t *file_bytes) {
    struct stat st;
    uint32_t page_bytes = 0;
    uint64_t pages = 0, transaction = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return err("%s: %s", path, strerror(errno));
    Err e = fstat(fd, &st) == 0 && S_ISREG(st.st_mode) ? OK : err("%s: is not a regular file", path);
    if (e == OK) e = check_header(fd, path, 0, &page_bytes, &pages, &transaction);
    if (e == OK) e = check_header(fd, path, page_bytes, &page_bytes, &pages, &transaction);
    close(fd);
    if (e != OK) return e;
    *file_bytes = (size_t)st.st_size;
    if (pages * page_bytes > (uint64_t)st.st_size)
        return err("%s: the LMDB is cut short: %jd bytes, its header says %ju; copy it again", path,
                   (intmax_t)st.st_size, (uintmax_t)(pages * page_bytes));
    return OK;
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
