/* test_fuzz.c - every target of the fuzzers (make fuzz) once with its corpus, and with what is nearly right: each file cut
 * short, with a byte changed, with a part twice. Whatever it is, it is read or refused in one line. */
#include "fuzz.h"
#include "test.h"

#include <time.h>

enum { DAMAGES = 60 };

static const FuzzTarget *target;
static uint32_t chance;

static size_t below(size_t n) {
    chance = chance * 1664525u + 1013904223u;
    return n ? (chance >> 8) % n : 0;
}

static void damaged(const uint8_t *bytes, size_t n) {
    uint8_t *x = malloc(2 * n + 2);
    for (int i = 0; i < DAMAGES && n > 2; i++) {
        size_t m = n;
        memcpy(x, bytes, n);
        const size_t at = below(n), length = below(n - at);
        if (i % 4 == 0) m = at;
        if (i % 4 == 1) x[at] ^= (uint8_t)(1u << below(8));
        if (i % 4 == 2) x[at] = (uint8_t)below(256);
        if (i % 4 == 3) memmove(x + at + length, x + at, n - at), m = n + length;
        if (target->mend && i % 8) m = target->mend(x, m, 2 * n, (unsigned)below(1 << 24));
        target->read(x, m);
        CHECK(m <= 2 * n);
    }
    free(x);
}

static void seed(const char *name, const void *bytes, size_t n) {
    const size_t before = fuzz_accepted;
    target->read(bytes, n);
    if (!test_note(fuzz_accepted > before, target->name, 0, name)) printf("     error text: \"%s\"\n", err_text());
    damaged(bytes, n);
}

int main(void) {
    threads_set(1);
    for (size_t i = 0; i < FUZZ_TABLES; i++)
        for (const FuzzTarget *t = fuzz_targets[i]; t->name; t++) {
            const clock_t started = clock();
            target = t, chance = 1;
            t->seeds(seed);
            CHECK(fuzz_target(t->name) == t);
            printf("%s: %.2f s\n", t->name, (double)(clock() - started) / CLOCKS_PER_SEC);
        }
    return test_report();
}
