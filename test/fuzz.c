/* fuzz.c - the targets by name, their folder, and what libFuzzer calls: FUZZ_TARGET=images fuzz CORPUS. With
 * FUZZ_SEEDS=DIR it writes the target's corpus there, and ends. */
#include "fuzz.h"

#include <ftw.h>
#include <sys/stat.h>
#include <unistd.h>

size_t fuzz_accepted;

/* ---- A folder of the process's own, in memory where that can be ---- */

static char folder[64];

static int remove_entry(const char *path, const struct stat *st, int flag, struct FTW *ftw) {
    (void)st, (void)flag, (void)ftw;
    return remove(path);
}

static void remove_folder(void) {
    nftw(folder, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
}

const char *fuzz_path(const char *name) {
    static char path[8][512];
    static int turn;
    if (!folder[0]) {
        snprintf(folder, sizeof folder, "%s/fuzz.XXXXXX", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
        MUST(mkdtemp(folder));
        atexit(remove_folder);
    }
    if (!name) return folder;
    turn = (turn + 1) % 8;
    snprintf(path[turn], sizeof path[turn], "%s/%s", folder, name);
    return path[turn];
}

const char *fuzz_put(const char *name, const void *first, size_t n_first, const void *bytes, size_t n) {
    const char *path = fuzz_path(name);
    FILE *f = fopen(path, "wb");
    MUST(f && fwrite(first, 1, n_first, f) == n_first && fwrite(bytes, 1, n, f) == n);
    MUST(fclose(f) == 0);
    return path;
}

void fuzz_take_file(FuzzSeed *take, const char *name, const char *path) {
    uint8_t *bytes;
    size_t n;
    if (file_bytes(&bytes, &n, path, 1 << 20, NULL) != OK) fprintf(stderr, "%s\n", err_text()), abort();
    take(name, bytes, n);
    free(bytes);
}

/* ---- The targets ---- */

const FuzzTarget *const fuzz_targets[] = {fuzz_file_targets, fuzz_set_targets, fuzz_serving_targets,
                                          fuzz_request_targets};

const FuzzTarget *fuzz_target(const char *name) {
    for (size_t i = 0; i < FUZZ_TABLES; i++)
        for (const FuzzTarget *t = fuzz_targets[i]; t->name; t++)
            if (strcmp(t->name, name) == 0) return t;
    return NULL;
}

#ifdef FUZZ
static const FuzzTarget *target;

static void write_seed(const char *name, const void *bytes, size_t n) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", getenv("FUZZ_SEEDS"), name);
    FILE *f = fopen(path, "wb");
    MUST(f && fwrite(bytes, 1, n, f) == n && fclose(f) == 0);
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n);
size_t LLVMFuzzerMutate(uint8_t *bytes, size_t n, size_t most);
size_t LLVMFuzzerCustomMutator(uint8_t *bytes, size_t n, size_t most, unsigned seed);

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    const char *name = getenv("FUZZ_TARGET");
    target = name ? fuzz_target(name) : NULL;
    if (!target) fprintf(stderr, "FUZZ_TARGET=%s: no such target\n", name ? name : ""), exit(1);
    threads_set(1);
    if (getenv("FUZZ_SEEDS")) target->seeds(write_seed), exit(0);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n) {
    target->read(bytes, n);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *bytes, size_t n, size_t most, unsigned seed) {
    n = LLVMFuzzerMutate(bytes, n, most);
    return target->mend && seed % 8 ? target->mend(bytes, n, most, seed) : n; /* some stay damaged */
}
#endif
