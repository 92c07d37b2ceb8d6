/* test_base.c - errors, memory, paths, hashes, bf16, random streams, threads. */
#include "test.h"
#include "base/plan.h"
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#include <sys/resource.h>
#include <sys/stat.h>

static Err passed_on(void) {
    TRY(err_in("b"));
    return OK;
}

static void test_errors(void) {
    CHECK(err("%s is %d, expected %d", "side", 3, 4) == FAILED);
    CHECK(!strcmp(err_text(), "side is 3, expected 4"));
    CHECK(err_in("a.png") == FAILED && !strcmp(err_text(), "a.png: side is 3, expected 4"));
    CHECK(err_damaged("%s is cut short", "it") == DAMAGED && !strcmp(err_text(), "it is cut short"));
    CHECK(err_in("a.png") == DAMAGED && !strcmp(err_text(), "a.png: it is cut short"));
    CHECK(passed_on() == DAMAGED);
    err("two\nlines\033[2J");
    CHECK(!strpbrk(err_text(), "\n\033"));
    err("%s again", err_text());
    CHECK(strstr(err_text(), "lines") && strstr(err_text(), "again"));
}

/* What is shown of names that come from files */
static void test_printable(void) {
    static const char *const cases[][2] = {
        {"golden retriever", "golden retriever"},
        {"\033]0;pwned\a\033[2J", "?]0;pwned??[2J"},
        {"a\tb\nc\r\177", "a?b?c??"},
        {"\302\2332J", "?2J"},                      /* U+009B, which is ESC [ */
        {"\302\200\302\237\302\240", "??\302\240"}, /* U+0080, U+009F; U+00A0 is a space */
        {"\2332J", "?2J"},                          /* the same byte where nobody reads UTF-8 */
        {"caf\303\251 \346\227\245 \360\237\230\200", "caf\303\251 \346\227\245 \360\237\230\200"},
        {"\303\233\320\233\346\233\233", "\303\233\320\233\346\233\233"}, /* bytes 9B that belong to letters */
        {"gnp.\342\200\256exe", "gnp.?exe"},                              /* U+202E: right to left */
        {"\342\200\216\342\200\217\342\200\252\342\201\246\342\201\251\330\234", "??????"},
        {"\342\200\250\342\200\251", "??"}, /* line and paragraph ends */
        {"\342\200\223 \342\200\246 \342\201\260", "\342\200\223 \342\200\246 \342\201\260"},
        {"cut \342\200", "cut \342?"},
        {"caf\351", "caf\351"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char out[PATH_BYTES];
        if (!CHECK(!strcmp(printable(out, cases[i][0]), cases[i][1]))) printf("     case %zu: %s\n", i, out);
        err("%s", cases[i][0]);
        CHECK(!strcmp(err_text(), cases[i][1]));
    }
}

static void test_memory(void) {
    size_t product;
    CHECK_OK(size_mul(&product, 3, 5));
    CHECK(product == 15);
    CHECK_ERR(size_mul(&product, SIZE_MAX / 2, 3), "too large");
    unsigned char *p = NULL;
    CHECK_OK(mem_alloc(&p, 1000, 3, "test"));
    int zero = 1;
    for (int i = 0; i < 3000; i++) zero &= p[i] == 0;
    CHECK(zero && (uintptr_t)p % 64 == 0);
    free(p);
    CHECK_OK(mem_alloc(&p, 0, 8, "nothing"));
    free(p);
    CHECK_ERR(mem_alloc(&p, SIZE_MAX, 8, "too much"), "too much");
    CHECK_ERR(mem_alloc(&p, SIZE_MAX / 64, 8, "activations"), "activations");
}

static void test_paths(void) {
    static char path[PATH_BYTES], name[PATH_BYTES + 1];
    CHECK_OK(path_make(path, "%s/%s.%d", "runs", "scale", 3));
    CHECK(!strcmp(path, "runs/scale.3"));
    memset(name, 'n', PATH_BYTES);
    CHECK_ERR(path_make(path, "%s", name), "a path of 4096 bytes is too long, at most 4095");
    CHECK(strstr(err_text(), "nnn..."));
    name[PATH_BYTES - 1] = 0;
    CHECK_OK(path_make(path, "%s", name));
    CHECK(!strcmp(path, name));
}

/* The vectors that FNV's authors publish; a text in pieces. */
static void test_fnv(void) {
    CHECK(fnv1a(FNV_START, "", 0) == UINT64_C(0xcbf29ce484222325));
    CHECK(fnv1a(FNV_START, "a", 1) == UINT64_C(0xaf63dc4c8601ec8c));
    CHECK(fnv1a(FNV_START, "foobar", 6) == UINT64_C(0x85944171f73967e8));
    CHECK(fnv1a(fnv1a(FNV_START, "foo", 3), "bar", 3) == UINT64_C(0x85944171f73967e8));
}

/* bf16 keeps 8 bits of the significand: 1 + 2^-8 lies between two of them, and goes to the even one. */
static void test_bf16(void) {
    for (uint32_t x = 0; x < 0x10000; x++) {
        const float number = bf16_to_float((uint16_t)x);
        const uint16_t again = bf16_from_float(number);
        if (number == number ? again != x : !(bf16_to_float(again) != bf16_to_float(again))) CHECK(0);
    }
    CHECK(bf16_from_float(1.0f) == 0x3f80 && bf16_to_float(0xc000) == -2);
    CHECK(bf16_from_float(1 + 0x1p-8f) == 0x3f80 && bf16_from_float(1 + 3 * 0x1p-8f) == 0x3f82);
    CHECK(bf16_from_float(1 + 0x1.01p-8f) == 0x3f81);
    CHECK(bf16_from_float(3.4e38f) == 0x7f80 && bf16_from_float(-INFINITY) == 0xff80);
}

/* The known-answer vectors published with the algorithm (Random123, kat_vectors, philox4x32 10). */
static void test_philox(void) {
    uint32_t r[4];
    philox(r, 0, 0, 0);
    CHECK(r[0] == 0x6627e8d5 && r[1] == 0xe169c58d && r[2] == 0xbc57ac4c && r[3] == 0x9b00dbd8);
    philox(r, UINT64_MAX, UINT64_MAX, UINT64_MAX);
    CHECK(r[0] == 0x408f276d && r[1] == 0x41c83b0e && r[2] == 0xa20bc7c6 && r[3] == 0x6d5451fd);
    philox(r, 0x299f31d0a4093822u, 0x0370734413198a2eu, 0x85a308d3243f6a88u);
    CHECK(r[0] == 0xd16cfe09 && r[1] == 0x94fdcceb && r[2] == 0x5001e420 && r[3] == 0x24126ea1);
}

static void test_streams(void) {
    enum { N = 100000, BINS = 7 };
    uint64_t s = rng_stream(RNG_TEST, 1, 2);
    CHECK(s != rng_stream(RNG_TEST, 2, 1) && s != rng_stream(RNG_NOISE, 1, 2));
    double sum = 0, sum2 = 0, normal = 0, normal2 = 0;
    size_t count[BINS] = {0};
    for (uint64_t i = 0; i < N; i++) {
        double u = rng_uniform(7, s, i), g = rng_normal(7, s, i);
        if (u < 0 || u >= 1) CHECK(0);
        sum += u, sum2 += u * u, normal += g, normal2 += g * g;
        uint32_t k = rng_below(7, s, i, BINS);
        if (k < BINS) count[k]++;
    }
    CHECK(fabs(sum / N - 0.5) < 4 * sqrt(1.0 / 12 / N));
    CHECK(fabs(sum2 / N - 1.0 / 3) < 0.005);
    CHECK(fabs(normal / N) < 4 / sqrt(N) && fabs(normal2 / N - 1) < 0.02);
    double chi = 0;
    for (int k = 0; k < BINS; k++) chi += pow((double)count[k] - (double)N / BINS, 2) / ((double)N / BINS);
    CHECK(chi < 25); /* 6 degrees of freedom: p < 0.0004 above */
    CHECK(rng_below(7, s, 3, 1) == 0);
}

static size_t own_address_space(void) {
    char line[128];
    size_t kib = 0;
    FILE *f = fopen("/proc/self/status", "r");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "VmSize: %zu kB", &kib) == 1) break;
    if (f) fclose(f);
    return kib * 1024;
}

static void test_available(void) {
    char text[32];
    struct rlimit old, limit;
    const size_t some = 64 << 20, before = memory_available();
    CHECK(!strcmp(bytes_text(text, 5 << 20), "5.0 MiB") && !strcmp(bytes_text(text, some), "64 MiB"));
    CHECK(!strcmp(bytes_text(text, (size_t)2560 << 20), "2.5 GiB"));
    CHECK_OK(memory_fits(some, some, "what", "advice"));
    CHECK_OK(memory_fits(some, SIZE_MAX, "what", "advice"));
    CHECK_ERR(memory_fits(2 * some, some, "what", "advice"),
              "what: 128 MiB of memory needed, 64 MiB available; advice");
    CHECK(before > some);
    if (!CHECK(getrlimit(RLIMIT_AS, &old) == 0 && own_address_space() > 0)) return;
    limit = old, limit.rlim_cur = own_address_space() + some;
    CHECK(setrlimit(RLIMIT_AS, &limit) == 0);
    const size_t within = memory_available();
    CHECK(setrlimit(RLIMIT_AS, &old) == 0);
    CHECK(within <= some && within > some / 2);
    CHECK(memory_available() > some);
}

/* ---- parallel_for ---- */

enum { TASKS = 1000, INNER = 7 };
typedef struct {
    unsigned char done[TASKS][INNER]; /* how often each task ran: anything but once is wrong */
    size_t index[TASKS], free[TASKS];
    pthread_t inner_thread[TASKS][INNER], thread[TASKS];
    int right;
    size_t pause; /* nanoseconds */
} Loop;

static void inner_task(void *context, size_t i) {
    Loop *l = (Loop *)context;
    l->done[i / INNER][i % INNER]++;
    l->inner_thread[i / INNER][i % INNER] = pthread_self();
}

typedef struct {
    Loop *l;
    size_t i;
} Inner;

static void nested_task(void *context, size_t k) {
    const Inner *in = (const Inner *)context;
    inner_task(in->l, in->i * INNER + k);
}

static void outer_task(void *context, size_t i) {
    Loop *l = (Loop *)context;
    Inner in = {l, i};
    const struct timespec pause = {0, (long)l->pause};
    l->index[i] = thread_index(), l->free[i] = (size_t)threads_free(), l->thread[i] = pthread_self();
    if (l->pause) nanosleep(&pause, NULL);
    parallel_for(4, INNER, nested_task, &in);
    if (thread_index() != l->index[i]) l->done[i][0] = 99;
}

/* Every task and every nested one once, on at most `threads` threads. */
static int ran_once(const Loop *l, int threads, size_t n) {
    int ok = thread_index() == 0;
    for (size_t i = 0; i < TASKS; i++)
        for (size_t k = 0; k < INNER; k++) ok &= l->done[i][k] == (i < n);
    for (size_t i = 0; i < n; i++) ok &= l->index[i] < (size_t)(threads < 1 ? 1 : threads);
    return ok;
}

/* What was nested ran where its task ran. */
static int stayed_inside(const Loop *l, size_t n) {
    int ok = 1;
    for (size_t i = 0; i < n; i++) {
        ok &= l->free[i] == 1;
        for (size_t k = 0; k < INNER; k++) ok &= pthread_equal(l->inner_thread[i][k], l->thread[i]) != 0;
    }
    return ok;
}

static int loop_is_right(Loop *l, int threads, size_t n) {
    memset(l->done, 0, sizeof l->done);
    parallel_for(threads, n, outer_task, l);
    return ran_once(l, threads, n) && (threads <= 1 || n <= 1 || stayed_inside(l, n));
}

static void test_loops(void) {
    static Loop l;
    static const size_t counts[] = {0, 1, 2, 3, 8, 31, TASKS};
    for (int threads = 0; threads <= 4; threads++)
        for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
            int ok = 1;
            for (int repeat = 0; repeat < 50; repeat++) ok &= loop_is_right(&l, threads, counts[k]);
            CHECK(ok);
        }
    l.pause = 2000000; /* long enough for the workers to wake: more than one thread takes part */
    CHECK(loop_is_right(&l, 3, 30));
    int others = 0;
    for (size_t i = 0; i < 30; i++) others += l.index[i] > 0;
    CHECK(others > 0);
    l.pause = 0;
    CHECK(loop_is_right(&l, 64, TASKS)); /* far more threads than processors */
    l.done[5][3]++;                      /* the check can fail */
    CHECK(!ran_once(&l, 64, TASKS));
}

/* Work that is to stop after some questions leaves the rest undone; other loops and small memory know nothing of it. */
typedef struct {
    size_t asked, until;
} Patience;
static int ask_patience(void *context) {
    Patience *p = (Patience *)context;
    return ++p->asked > p->until;
}
static void count_task(void *context, size_t i) {
    (void)i;
    atomic_fetch_add((atomic_size_t *)context, 1);
}
static void slow_task(void *context, size_t i) {
    const struct timespec pause = {0, 1000000};
    nanosleep(&pause, NULL);
    count_task(context, i);
}
static void test_stopped(void) {
    for (int threads = 1; threads <= 3; threads++) {
        atomic_size_t ran = 0;
        Patience p = {0, 1};
        void *memory;
        parallel_work(threads, TASKS, count_task, &ran);
        CHECK(ran == TASKS && !work_stops());
        work_ask(ask_patience, &p);
        ran = 0;
        parallel_work(threads, TASKS, slow_task, &ran);
        CHECK(ran > 0 && ran < TASKS && work_stops() && p.asked == 2);
        ran = 0;
        parallel_for(threads, TASKS, count_task, &ran);
        CHECK(ran == TASKS);
        CHECK_ERR(mem_alloc(&memory, 64 << 20, 1, "much"), "stopped");
        CHECK_OK(mem_alloc(&memory, 1 << 20, 1, "little"));
        free(memory);
        work_ask(NULL, NULL);
        parallel_work(threads, TASKS, count_task, &ran);
        CHECK(ran == 2 * TASKS && !work_stops());
    }
}

static void *loop_many(void *context) {
    Loop *l = (Loop *)context;
    for (int repeat = 0; repeat < 300; repeat++) {
        memset(l->done, 0, sizeof l->done);
        parallel_for(3, 40, outer_task, l);
        l->right &= ran_once(l, 3, 40);
    }
    return NULL;
}

/* Two threads of a program want the workers at once: one gets them, the other works alone. */
static void test_two_callers(void) {
    static Loop mine, theirs;
    pthread_t thread;
    mine.right = theirs.right = 1;
    CHECK(pthread_create(&thread, NULL, loop_many, &theirs) == 0);
    loop_many(&mine);
    pthread_join(thread, NULL);
    CHECK(mine.right && theirs.right);
}

static double processor_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Idle workers sleep: what they spin after a loop is bounded, whatever else the machine does. */
static void test_idle(void) {
    static Loop l;
    const struct timespec pause = {0, 300000000};
    CHECK(loop_is_right(&l, 4, TASKS));
    const double before = processor_seconds();
    nanosleep(&pause, NULL);
    const double used = processor_seconds() - before;
    if (!CHECK(used < 0.03)) printf("     idle workers used %.3f s of 0.3 s\n", used);
}

/* ---- the quota of control groups, in a /proc and /sys of our own ---- */

static void put(const char *root, const char *name, const char *text) {
    char path[PATH_BYTES];
    CHECK_OK(path_make(path, "%s/%s", root, name));
    for (char *p = path + strlen(root) + 1; (p = strchr(p, '/')); *p++ = '/') *p = 0, mkdir(path, 0777);
    FILE *f = fopen(path, "w");
    CHECK(f && fputs(text, f) >= 0 && fclose(f) == 0);
}

#define GROUP "proc/self/cgroup"
#define MOUNT "sys/fs/cgroup"

static void test_quota(void) {
    static const struct {
        const char *what, *name[4], *text[4];
        int threads;
    } cases[] = {
        {"no groups", {NULL}, {NULL}, 0},
        {"no limit", {GROUP, MOUNT "/a/cpu.max"}, {"0::/a\n", "max 100000\n"}, 0},
        {"whole", {GROUP, MOUNT "/a/cpu.max"}, {"0::/a\n", "200000 100000\n"}, 2},
        {"rounded up", {GROUP, MOUNT "/a/cpu.max"}, {"0::/a\n", "150000 100000\n"}, 2},
        {"at least one", {GROUP, MOUNT "/a/cpu.max"}, {"0::/a\n", "1000 100000\n"}, 1},
        {"the group above",
         {GROUP, MOUNT "/a/cpu.max", MOUNT "/a/b/c/cpu.max"},
         {"0::/a/b/c\n", "300000 100000\n", "500000 100000\n"},
         3},
        {"a group in between",
         {GROUP, MOUNT "/a/cpu.max", MOUNT "/a/b/cpu.max", MOUNT "/a/b/c/cpu.max"},
         {"0::/a/b/c\n", "900000 100000\n", "50000 25000\n", "max 100000\n"},
         2},
        {"a container: its host's name, its own mount",
         {GROUP, MOUNT "/cpu.max"},
         {"0::/docker/0123\n", "400000 100000\n"},
         4},
        {"a name that leads out", {GROUP, MOUNT "/cpu.max"}, {"0::/../other\n", "400000 100000\n"}, 4},
        {"no /proc", {MOUNT "/cpu.max"}, {"400000 100000\n"}, 4},
        {"version 1",
         {GROUP, MOUNT "/cpu,cpuacct/a/cpu.cfs_quota_us", MOUNT "/cpu,cpuacct/a/cpu.cfs_period_us"},
         {"7:memory:/m\n4:cpu,cpuacct:/a\n0::/\n", "250000\n", "100000\n"},
         3},
        {"version 1 without a limit",
         {GROUP, MOUNT "/cpu/a/cpu.cfs_quota_us", MOUNT "/cpu/a/cpu.cfs_period_us"},
         {"4:cpu:/a\n", "-1\n", "100000\n"},
         0},
        {"both",
         {GROUP, MOUNT "/cpu/cpu.cfs_quota_us", MOUNT "/cpu/cpu.cfs_period_us", MOUNT "/cpu.max"},
         {"4:cpu:/a\n0::/\n", "100000\n", "50000\n", "600000 100000\n"},
         2},
        {"nonsense", {GROUP, MOUNT "/cpu.max"}, {"0::/\n", "many 0\n"}, 0},
        {"a period of nothing", {GROUP, MOUNT "/cpu.max"}, {"0::/\n", "100000 0\n"}, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char root[] = "/tmp/test_base-XXXXXX", command[64];
        CHECK(mkdtemp(root) != NULL);
        for (int k = 0; k < 4 && cases[i].name[k]; k++) put(root, cases[i].name[k], cases[i].text[k]);
        const int got = cpu_quota(root);
        if (!CHECK(got == cases[i].threads)) printf("     %s: %d, expected %d\n", cases[i].what, got, cases[i].threads);
        snprintf(command, sizeof command, "rm -r %s", root);
        CHECK(system(command) == 0);
    }
}

/* Whatever processor this thread is on: of those that share its L2 cache, as many as it may run on. */
static void test_l2_sharers(void) {
#ifdef __linux__
    static const char *const lists[] = {"0-1023\n", "5000-5001\n", "none\n"};
    char root[] = "/tmp/test_base-XXXXXX", path[128], command[64];
    cpu_set_t ours;
    CHECK(mkdtemp(root) && sched_getaffinity(0, sizeof ours, &ours) == 0);
    CHECK(l2_sharers(root) == 1);
    for (int i = 0; i < 3; i++) {
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
            if (CPU_ISSET((size_t)cpu, &ours)) {
                snprintf(path, sizeof path, "sys/devices/system/cpu/cpu%d/cache/index2/shared_cpu_list", cpu);
                put(root, path, lists[i]);
            }
        CHECK(l2_sharers(root) == (i == 0 ? (size_t)CPU_COUNT(&ours) : 1));
    }
    snprintf(command, sizeof command, "rm -r %s", root);
    CHECK(system(command) == 0);
#endif
}

/* x -> A -> a -> B -> b -> C (+ x) -> c; A's result is B's to compute, if B can, and nobody else's reader. */
static void test_deferred(void) {
    PlanStep step[3] = {{.in = {0, NONE, NONE}, .add = NONE, .out = 1, .defers = 1},
                        {.in = {1, NONE, NONE}, .add = NONE, .out = 2, .takes_over = 1},
                        {.in = {2, NONE, NONE}, .add = NONE, .out = 3}};
    Life life[8];
    for (int train = 0; train < 2; train++) {
        plan_lives(step, 3, train, life, life + 4, 4);
        CHECK(step[0].deferred && !step[1].deferred && !step[2].deferred);
        CHECK(life[0].from == 0 && life[0].to == (train ? 5 : 1)); /* until B has read it, or A's backward */
        CHECK(life[1].to == (train ? 4 : 1));
    }
    step[1].takes_over = 0;
    plan_lives(step, 3, 0, life, life + 4, 4);
    CHECK(!step[0].deferred && life[0].to == 0);
    step[1].takes_over = 1, step[2].add = 1; /* C adds what A made: it must be there */
    plan_lives(step, 3, 0, life, life + 4, 4);
    CHECK(!step[0].deferred && life[0].to == 0 && life[1].to == 2);
}

int main(void) {
    test_errors();
    test_printable();
    test_memory();
    test_available();
    test_paths();
    test_fnv();
    test_bf16();
    test_philox();
    test_streams();
    test_quota();
    test_l2_sharers();
    CHECK(threads_get() >= 1);
    threads_set(1);
    CHECK(threads_get() == 1 && threads_free() == 1);
    threads_set(3);
    CHECK(threads_get() == 3 && threads_free() == 3 && thread_index() == 0);
    test_loops();
    test_stopped();
    test_two_callers();
    test_idle();
    test_deferred();
    return test_report();
}
