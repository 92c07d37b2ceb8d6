/* zip.c - the archives that torch.save writes, and those that others made of them.
 *
 * All numbers are little-endian. From its end: a directory of entries, each with the place of a local header that the
 * data follow. Where 32 bits do not do, a field is all ones and an extra block has the number.
 *
 * PyTorch stores its entries, so that they can be used where they lie. Somebody who packs a file anew may have deflated
 * them. A checksum of 0 means that none was computed (torch's compute_crc32 = False).
 *
 * Refuses: whatever reaches outside the file or overlaps in it, encrypted entries, compression of more than weights can
 * be compressed. */
#include "files/pickle.h"

#include <stdlib.h>
#include <string.h>
#include <zlib.h>

enum {
    DEFLATED = 8,
    DEFLATE_MOST = 1033, /* times that deflate makes something smaller */
    INFLATE_MOST = 32,   /* a whole file of numbers, once it has some size */
    INFLATE_SLACK = 1 << 20
};

static uint64_t number_at(const unsigned char *p, size_t bytes) {
    uint64_t out = 0;
    for (size_t i = 0; i < bytes; i++) out |= (uint64_t)p[i] << 8 * i;
    return out;
}

enum { END_BYTES = 22, END64_BYTES = 56, LOCATOR_BYTES = 20, ENTRY_BYTES = 46, LOCAL_BYTES = 30, COMMENT_MAX = 65535 };

/* The directory's place, from the end record and, where there is one, its 64-bit companion */
static Err zip_directory(Zip *z) {
    size_t at = z->file_bytes < END_BYTES ? 0 : z->file_bytes - END_BYTES,
           lowest = at > COMMENT_MAX ? at - COMMENT_MAX : 0;
    while (at > lowest && memcmp(z->file + at, "PK\5\6", 4) != 0) at--;
    if (z->file_bytes < END_BYTES || memcmp(z->file + at, "PK\5\6", 4) != 0)
        return err_damaged("is a zip archive without an end: it is truncated; fetch it again");
    const unsigned char *end = z->file + at;
    uint64_t count = number_at(end + 10, 2), bytes = number_at(end + 12, 4), place = number_at(end + 16, 4);
    if (at >= LOCATOR_BYTES && memcmp(end - LOCATOR_BYTES, "PK\6\7", 4) == 0) {
        uint64_t at64 = number_at(end - LOCATOR_BYTES + 8, 8);
        if (at64 > at || at - at64 < END64_BYTES || memcmp(z->file + at64, "PK\6\6", 4) != 0)
            return err_damaged("is a zip archive whose 64-bit end record is not where it says");
        const unsigned char *end64 = z->file + at64;
        count = number_at(end64 + 32, 8), bytes = number_at(end64 + 40, 8), place = number_at(end64 + 48, 8);
        at = (size_t)at64;
    }
    if (place > at || bytes > at - place || count > bytes / ENTRY_BYTES)
        return err_damaged("is a zip archive whose directory of %llu entries does not fit in it",
                           (unsigned long long)count);
    z->directory = (size_t)place;
    z->directory_bytes = (size_t)bytes;
    z->count = (size_t)count;
    return OK;
}

/* Replaces the numbers that are all ones by those of the 64-bit extra block, which has them in this order. */
static Err zip_extra(const unsigned char *p, size_t bytes, uint64_t *number[3]) {
    while (bytes >= 4) {
        size_t id = (size_t)number_at(p, 2), length = (size_t)number_at(p + 2, 2), at = 4;
        if (length > bytes - 4) return err_damaged("has a zip entry with a broken extra field");
        for (int i = 0; id == 1 && i < 3; i++) {
            if (*number[i] != UINT32_MAX) continue;
            if (at + 8 > length + 4) return err_damaged("has a zip entry with a broken 64-bit field");
            *number[i] = number_at(p + at, 8);
            at += 8;
        }
        p += 4 + length, bytes -= 4 + length;
    }
    return OK;
}

/* The data behind the local header, whose name and extra field have lengths of their own */
static Err zip_data(const Zip *z, ZipEntry *e, uint64_t place, uint64_t stored) {
    if (place > z->directory || z->directory - place < LOCAL_BYTES)
        return err_damaged("has a zip entry outside of the file");
    const unsigned char *local = z->file + place;
    if (memcmp(local, "PK\3\4", 4) != 0) return err_damaged("has a zip entry that is not where the directory says");
    size_t skip_bytes = LOCAL_BYTES + (size_t)number_at(local + 26, 2) + (size_t)number_at(local + 28, 2);
    if (z->directory - place < skip_bytes || z->directory - place - skip_bytes < stored)
        return err_damaged("has a zip entry of %llu bytes that does not fit in the file", (unsigned long long)stored);
    e->begin = (size_t)place;
    e->data = local + skip_bytes;
    e->stored = (size_t)stored;
    e->end = e->begin + skip_bytes + e->stored;
    return OK;
}

static int ends_in(const unsigned char *text, size_t length, const char *end) {
    size_t n = strlen(end);
    return length >= n && memcmp(text + length - n, end, n) == 0;
}

static Err zip_entry(const Zip *z, ZipEntry *e, size_t *at) {
    const size_t stop = z->directory + z->directory_bytes;
    const unsigned char *p = z->file + *at;
    if (stop - *at < ENTRY_BYTES || memcmp(p, "PK\1\2", 4) != 0) return err_damaged("has a broken zip directory");
    size_t name = (size_t)number_at(p + 28, 2), extra = (size_t)number_at(p + 30, 2);
    size_t whole = ENTRY_BYTES + name + extra + (size_t)number_at(p + 32, 2);
    if (stop - *at < whole) return err_damaged("has a broken zip directory");
    uint64_t stored = number_at(p + 20, 4), bytes = number_at(p + 24, 4), place_ = number_at(p + 42, 4);
    uint64_t *wide[3] = {&bytes, &stored, &place_};
    TRY(zip_extra(p + ENTRY_BYTES + name, extra, wide));
    if (number_at(p + 8, 2) & 1) return err_damaged("has an encrypted zip entry");
    if (ends_in(p + ENTRY_BYTES, name, ".ckpt") || ends_in(p + ENTRY_BYTES, name, ".safetensors"))
        return err_damaged("is a zip archive that holds '%.*s': unzip it and use what comes out",
                           (int)min_size(name, 100), (const char *)p + ENTRY_BYTES);
    const int method = (int)number_at(p + 10, 2), shown = (int)min_size(name, 60);
    e->deflated = method == DEFLATED;
    if ((method && method != DEFLATED) || (!method && stored != bytes))
        return err_damaged("has a zip entry '%.*s' compressed by method %d, expected stored or deflated", shown,
                           (const char *)p + ENTRY_BYTES, method);
    if (e->deflated && bytes / DEFLATE_MOST > stored)
        return err_damaged("has a zip entry '%.*s' of %llu bytes out of %llu, which deflate cannot do", shown,
                           (const char *)p + ENTRY_BYTES, (unsigned long long)bytes, (unsigned long long)stored);
    e->name = p + ENTRY_BYTES;
    e->name_length = name;
    e->crc = (uint32_t)number_at(p + 16, 4);
    *at += whole;
    e->bytes = (size_t)bytes;
    return zip_data(z, e, place_, stored);
}

static int by_begin(const void *pa, const void *pb) {
    const ZipEntry *a = (const ZipEntry *)pa, *b = (const ZipEntry *)pb;
    return (a->begin > b->begin) - (a->begin < b->begin);
}

Err zip_open(Zip *z, const unsigned char *file, size_t bytes) {
    *z = (Zip){.file = file, .file_bytes = bytes};
    TRY(zip_directory(z));
    TRY(mem_alloc(&z->entry, z->count, sizeof *z->entry, "a zip directory"));
    size_t at = z->directory;
    for (size_t i = 0; i < z->count; i++) {
        TRY(zip_entry(z, &z->entry[i], &at));
        if (!z->entry[i].deflated) continue;
        z->inflated += z->entry[i].bytes; /* at most DEFLATE_MOST files of this size */
        if (z->inflated / INFLATE_MOST > bytes + INFLATE_SLACK)
            return err_damaged("is compressed more than %d times over, which weights cannot be", INFLATE_MOST);
    }
    if (z->count) qsort(z->entry, z->count, sizeof *z->entry, by_begin);
    for (size_t i = 1; i < z->count; i++) {
        if (z->entry[i].begin < z->entry[i - 1].end) return err_damaged("has zip entries that overlap");
    }
    return OK;
}

/* X/data.pkl, for the one X that has it: then *folder is the length of "X/" */
Err zip_pickle(const Zip *z, ZipEntry **pickle, size_t *folder) {
    static const char name[] = "/data.pkl";
    const size_t length = sizeof name - 1;
    *pickle = NULL;
    for (size_t i = 0; i < z->count; i++) {
        ZipEntry *e = &z->entry[i];
        if (e->name_length <= length || memcmp(e->name + e->name_length - length, name, length) != 0) continue;
        if (memchr(e->name, '/', e->name_length) != e->name + e->name_length - length) continue; /* deeper */
        if (*pickle) return err_damaged("is a zip archive with two data.pkl");
        *pickle = e;
        *folder = e->name_length - length + 1;
    }
    if (!*pickle) return err_damaged("is a zip archive without data.pkl: not from torch.save");
    return OK;
}

/* ---- Contents ---- */

static Err damaged_entry(const ZipEntry *e, const char *how) {
    return err_damaged("has a damaged '%.*s': %s; fetch it again", (int)min_size(e->name_length, 60),
                       (const char *)e->name, how);
}

typedef struct {
    const unsigned char *data;
    size_t bytes, part; /* of all parts; of one, but for the last */
    uint32_t crc[64];
} Parts;

static size_t part_bytes(const Parts *p, size_t i) {
    return min_size(p->bytes - i * p->part, p->part);
}

static void part_crc(void *context, size_t i) {
    Parts *p = (Parts *)context;
    p->crc[i] = (uint32_t)crc32_z(0, p->data + i * p->part, part_bytes(p, i));
}

/* Of parts, by all threads, joined */
static uint32_t crc_of(const unsigned char *data, size_t bytes) {
    enum { LEAST = 1 << 20 };
    Parts p = {.data = data, .bytes = bytes};
    const size_t n = max_size(min_size(bytes / LEAST, sizeof p.crc / sizeof *p.crc), 1);
    p.part = bytes / n + (bytes % n != 0);
    parallel_for(n > 1 ? threads_free() : 1, n, part_crc, &p);
    uLong crc = p.crc[0];
    for (size_t i = 1; i < n; i++) crc = crc32_combine(crc, p.crc[i], (z_off_t)part_bytes(&p, i));
    return (uint32_t)crc;
}

Err zip_check(ZipEntry *e) {
    if (e->crc == 0 || __atomic_load_n(&e->checked, __ATOMIC_RELAXED)) return OK;
    if (crc_of(e->data, e->bytes) != e->crc) return damaged_entry(e, "its checksum differs");
    __atomic_store_n(&e->checked, 1, __ATOMIC_RELAXED);
    return OK;
}

/* zlib counts in unsigned int, so that both sides go on in portions. */
Err zip_inflate(const ZipEntry *e, unsigned char *out) {
    enum { PORTION = 1 << 30 };
    z_stream s = {.next_in = (Bytef *)e->data, .next_out = out};
    size_t from = e->stored, to = e->bytes;
    if (inflateInit2(&s, -MAX_WBITS) != Z_OK) return err("inflating a zip entry: no memory");
    int code = Z_OK;
    while (code == Z_OK) {
        s.avail_in = (uInt)min_size(from, PORTION), s.avail_out = (uInt)min_size(to, PORTION);
        const size_t in = s.avail_in, room = s.avail_out;
        code = inflate(&s, Z_NO_FLUSH);
        from -= in - s.avail_in, to -= room - s.avail_out;
    }
    inflateEnd(&s);
    if (code == Z_MEM_ERROR) return err("inflating a zip entry: no memory");
    if (code != Z_STREAM_END || from || to) return damaged_entry(e, "it cannot be inflated");
    if (e->crc && crc32_z(0, out, e->bytes) != e->crc) return damaged_entry(e, "its checksum differs");
    return OK;
}
