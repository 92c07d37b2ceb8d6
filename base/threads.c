/* threads.c - loops shared among threads.
 *
 * One pool of workers, started when first needed and kept. A loop is a turn: the caller opens it, workers join while it
 * is open, everybody draws tasks from one counter, the caller closes it and waits for those who joined to leave. A
 * worker that comes too late finds the turn over and touches nothing, so a loop never waits for a thread that the
 * machine has no room to run. Between turns workers spin a little, because the next loop of a network is microseconds
 * away, and then sleep: on a busy machine they cost their neighbours at most that little. */
#include "base/base.h"
#include "base/tiles.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum {
    SPINS = 4000,         /* some 50 microseconds */
    CHUNKS_PER_THREAD = 8 /* short tasks are drawn several at a time */
};

static struct {
    atomic_int wanted;  /* number of threads, from threads_set; 0: as many as there are processors */
    atomic_int taken;   /* 1: some thread runs its loop on the workers */
    atomic_uint turn;   /* number of the turn; odd: it is open */
    atomic_int joined;  /* number of workers inside the turn */
    atomic_size_t next; /* first task that nobody has drawn */
    Task *task;         /* of the open turn, as are context, n, chunk and threads */
    void *context;
    size_t n, chunk;
    int threads;
    int workers, spins; /* belong to the thread that has taken the pool */
    pthread_mutex_t lock;
    pthread_cond_t opened, left;
    atomic_int sleeping; /* number of workers that sleep until a turn opens */
    atomic_int waiting;  /* 1: the caller sleeps until the workers have left */
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .opened = PTHREAD_COND_INITIALIZER, .left = PTHREAD_COND_INITIALIZER};

static _Thread_local size_t own_index;
static _Thread_local int in_loop;

/* ---- how many ---- */

/* Numbers in FOLDER/NAME, at most two; returns how many. A word ("max") is none. */
static int read_numbers(const char *folder, const char *name, double out[2]) {
    char path[PATH_BYTES];
    if (path_make(path, "%s/%s", folder, name) != OK) return 0;
    FILE *f = fopen(path, "r");
    const int n = f ? fscanf(f, "%lf %lf", &out[0], &out[1]) : 0;
    if (f) fclose(f);
    return n > 0 ? n : 0;
}

/* Processors that the control group of this folder grants, 0: no limit. Version 2 has quota and period (microseconds)
 * in one file, version 1 in two. */
static double group_quota(const char *folder) {
    double quota[2] = {0}, period[2] = {0};
    if (read_numbers(folder, "cpu.max", quota) == 2)
        period[0] = quota[1];
    else if (read_numbers(folder, "cpu.cfs_quota_us", quota) != 1 ||
             read_numbers(folder, "cpu.cfs_period_us", period) != 1)
        return 0;
    return quota[0] > 0 && period[0] > 0 ? quota[0] / period[0] : 0;
}

/* The least of the limits of `group` and of all groups above it, up to the mount point. A container may see its own
 * group as the mount point, under a name that only its host knows: what is not there limits nothing. */
static double least_quota(const char *mount, const char *group, double least) {
    char path[PATH_BYTES];
    const size_t top = strlen(mount);
    if (path_make(path, "%s%s", mount, group) != OK) return least;
    for (char *end = path + strlen(path); end; end = strrchr(path + top, '/')) {
        *end = 0;
        const double here = group_quota(path);
        if (here > 0 && (least == 0 || here < least)) least = here;
    }
    return least;
}

int cpu_quota(const char *root) {
    static const char *const mounts[] = {"", "/cpu", "/cpu,cpuacct", "/cpuacct,cpu", "/unified"};
    char line[PATH_BYTES], mount[PATH_BYTES];
    double least = 0;
    for (size_t i = 0; i < sizeof mounts / sizeof *mounts; i++) {
        if (path_make(mount, "%s/sys/fs/cgroup%s", root, mounts[i]) != OK) return 0;
        least = least_quota(mount, "", least);
        if (path_make(line, "%s/proc/self/cgroup", root) != OK) return 0;
        FILE *f = fopen(line, "r");
        while (f && fgets(line, sizeof line, f)) { /* "0::/group", "4:cpu,cpuacct:/group" */
            const char *controllers = strchr(line, ':'), *group = strchr(line, '/');
            line[strcspn(line, "\n")] = 0;
            if (controllers && group && (controllers[1] == ':' || strstr(controllers, "cpu")))
                least = least_quota(mount, group, least);
        }
        if (f) fclose(f);
    }
    if (!(least > 0 && least < 1e6)) return 0;
    const int whole = (int)least;
    return whole < least || whole < 1 ? whole + 1 : whole;
}

static int visible_processors(void) {
    long n = 0;
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) n = CPU_COUNT(&set);
#endif
    if (n < 1) n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : (int)n;
}

/* Number of processors that this process may run on, and has time on, asked once. */
static int processors(void) {
    static atomic_int known;
    int n = atomic_load(&known);
    if (n > 0) return n;
    const int quota = cpu_quota("");
    n = visible_processors();
    if (quota > 0 && quota < n) n = quota;
    atomic_store(&known, n);
    return n;
}

const char *threads_text(char text[96]) {
    const int n = threads_get(), visible = visible_processors();
    if (processors() < visible && n == processors())
        snprintf(text, 96, "%d thread%s (of %d processors, the CPU quota of this container or group)", n,
                 n == 1 ? "" : "s", visible);
    else
        snprintf(text, 96, "%d thread%s", n, n == 1 ? "" : "s");
    return text;
}

void threads_set(int n) {
    atomic_store(&pool.wanted, n > 0 ? n : 0);
}

int threads_get(void) {
    const int n = atomic_load(&pool.wanted);
    return n > 0 ? n : processors();
}

const char *vector_instructions(void) {
#if TILES_COMPILED
    if (tiles_here()) return "AVX-512 with bf16, AMX";
#endif
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
    return "AVX-512 with bf16";
#elif defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__SSE2__)
    return "SSE2";
#elif defined(__ARM_NEON)
    return "NEON";
#else
    return "no vector instructions";
#endif
}

int threads_free(void) {
    return in_loop ? 1 : threads_get();
}

size_t thread_index(void) {
    return own_index;
}

static void pause_a_little(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Draws tasks until none is left. */
static void run_tasks(int is_work) {
    for (;;) {
        if (is_work && work_stops()) atomic_store(&pool.next, pool.n);
        const size_t begin = atomic_fetch_add(&pool.next, pool.chunk);
        if (begin >= pool.n) return;
        for (size_t i = begin; i < min_size(begin + pool.chunk, pool.n); i++) pool.task(pool.context, i);
    }
}

/* Waits for a turn other than `seen`, and returns it. */
static unsigned next_turn(unsigned seen, int spins) {
    unsigned turn;
    for (int i = 0; i < spins; i++) {
        if ((turn = atomic_load(&pool.turn)) != seen) return turn;
        pause_a_little();
    }
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.sleeping, 1); /* before reading the turn: run_turn looks for sleepers after opening it */
    while ((turn = atomic_load(&pool.turn)) == seen) pthread_cond_wait(&pool.opened, &pool.lock);
    atomic_fetch_sub(&pool.sleeping, 1);
    pthread_mutex_unlock(&pool.lock);
    return turn;
}

static void *work(void *number) {
    unsigned seen = 0;
    int spins = 0;
    own_index = (size_t)number;
    in_loop = 1;
    for (;;) {
        seen = next_turn(seen, spins);
        if (seen % 2 == 0) continue;
        atomic_fetch_add(&pool.joined, 1);
        if (atomic_load(&pool.turn) == seen) { /* still open, and the caller will not leave before us */
            spins = pool.spins;
            if (own_index < (size_t)pool.threads) run_tasks(0);
        }
        if (atomic_fetch_sub(&pool.joined, 1) == 1 && atomic_load(&pool.waiting)) {
            pthread_mutex_lock(&pool.lock);
            pthread_cond_signal(&pool.left);
            pthread_mutex_unlock(&pool.lock);
        }
    }
    return NULL;
}

int thread_start(pthread_t *thread, int detached, void *(*run)(void *), void *context) {
    pthread_attr_t attr;
    int failure = pthread_attr_init(&attr);
    if (failure) return failure;
    pthread_attr_setdetachstate(&attr, detached ? PTHREAD_CREATE_DETACHED : PTHREAD_CREATE_JOINABLE);
    pthread_attr_setstacksize(&attr, STACK_USUAL);
    failure = pthread_create(thread, &attr, run, context);
    pthread_attr_destroy(&attr);
    return failure;
}

/* Starts workers 1..n-1, or fewer if the system gives no more threads. Workers take no signals. */
static void start_workers(int n) {
    sigset_t all, before;
    pthread_t thread;
    if (pool.workers + 1 >= n) return;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.workers + 1 < n && thread_start(&thread, 1, work, (void *)(size_t)(pool.workers + 1)) == 0)
        pool.workers++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Waits, after the turn is closed, until no worker is inside. */
static void wait_for_workers(void) {
    for (int i = 0; i < pool.spins; i++) {
        if (atomic_load(&pool.joined) == 0) return;
        pause_a_little();
    }
    pthread_mutex_lock(&pool.lock);
    atomic_store(&pool.waiting, 1);
    while (atomic_load(&pool.joined) != 0) pthread_cond_wait(&pool.left, &pool.lock);
    atomic_store(&pool.waiting, 0);
    pthread_mutex_unlock(&pool.lock);
}

static void run_turn(int threads, size_t n, Task *task, void *context, int is_work) {
    start_workers(threads);
    pool.task = task, pool.context = context, pool.n = n, pool.threads = threads;
    pool.chunk = max_size(1, n / ((size_t)threads * CHUNKS_PER_THREAD));
    pool.spins = threads <= processors() ? SPINS : 0;
    atomic_store(&pool.next, 0);
    atomic_fetch_add(&pool.turn, 1);
    if (atomic_load(&pool.sleeping)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.opened);
        pthread_mutex_unlock(&pool.lock);
    }
    in_loop = 1;
    run_tasks(is_work);
    in_loop = 0;
    atomic_fetch_add(&pool.turn, 1);
    wait_for_workers();
}

static void loop(int threads, size_t n, Task *task, void *context, int is_work) {
    const int useful = threads > 1 ? (int)min_size((size_t)threads, n) : 1;
    int nobody = 0;
    if (useful > 1 && !in_loop && atomic_compare_exchange_strong(&pool.taken, &nobody, 1)) {
        run_turn(useful, n, task, context, is_work);
        atomic_store(&pool.taken, 0);
        return;
    }
    for (size_t i = 0; i < n && !(is_work && work_stops()); i++) task(context, i);
}

void parallel_for(int threads, size_t n, Task *task, void *context) {
    loop(threads, n, task, context, 0);
}

void parallel_work(int threads, size_t n, Task *task, void *context) {
    loop(threads, n, task, context, 1);
}
