/* base.h - what base/ gives: error values, memory, paths, random streams, threads, options. Parameter tables are
 * params.h's, places where networks compute compute.h's, memory that areas share plan.h's. */
#ifndef BASE_H
#define BASE_H

#include "base/bits.h"

#include <pthread.h>
#include <stdarg.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The arithmetic type. Component files compile with float (default) or with -DREAL_DOUBLE for gradient checks. */
#ifdef REAL_DOUBLE
typedef double real;
#else
typedef float real;
#endif

/* How a call went. DAMAGED: the bytes of a file are not what they have to be, which reading them again would not change;
 * what can do without the file may go on. FAILED: everything else, such as no memory, a failing disk, a wrong option. */
typedef int Err;
enum { OK = 0, FAILED = 1, DAMAGED = 2 };

#if defined(__GNUC__)
#define PRINTF_LIKE(f, a) __attribute__((format(printf, f, a)))
#else
#define PRINTF_LIKE(f, a)
#endif

/* The longest path that is worked with, its zero byte included, and the longest error text, which may begin with it. */
enum { PATH_BYTES = 4096, ERR_MAX = PATH_BYTES + 1024 };
/* Sets this thread's error text: one line of at most ERR_MAX-1 bytes, control characters replaced. Returns FAILED. */
Err err(const char *fmt, ...) PRINTF_LIKE(1, 2);
/* The same; returns DAMAGED. */
Err err_damaged(const char *fmt, ...) PRINTF_LIKE(1, 2);
/* Puts "where: " in front of the present text, to say in which file or option it happened, unless it begins so.
 * Returns what the text's own err or err_damaged returned. */
Err err_in(const char *where);
/* s, with what a terminal would take for an order, or for another direction, made '?': control characters, those of
 * U+0080..U+009F, marks of direction. For names and paths that come from files. */
char *make_printable(char *s);
/* The same in a copy, of its beginning if it is longer. */
const char *printable(char out[PATH_BYTES], const char *s);
/* The text of the last error in this thread; "" if none. */
const char *err_text(void);
#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        const Err try_err = (call);                                                                                    \
        if (try_err != OK) return try_err;                                                                             \
    } while (0)

enum { LINE_BYTES = 64 }; /* a cache line, and the widest vector */
#define NONE ((size_t)-1) /* an index or a number of something that is not there */
/* *out = zeroed memory for count elements of size bytes, at a multiple of LINE_BYTES; release with free(). Overflow of
 * the product and lack of memory are errors that name what it was for and how much was asked. count = 0 gives a valid
 * pointer. */
Err mem_alloc(void *out_pointer, size_t count, size_t size, const char *what);
/* Makes room for `more` elements behind the n of *array (capacity elements of size bytes); it grows by half at
 * least. */
Err mem_grow(void *array_pointer, size_t n, size_t more, size_t *capacity, size_t size, const char *what);
/* For programs that run for long: arrays of 4 MiB and more go back to the system when they are freed. By itself glibc keeps
 * what one job took for the next, for each of its threads, and there is ever less of it in one piece. */
void mem_give_back(void);
/* *out = a*b; an error if that overflows. */
Err size_mul(size_t *out, size_t a, size_t b);
/* Bytes that this process can still take: the least of what the machine, its control groups (containers) and the
 * process's own limits (ulimit -v, -d) leave. File caches count as free, for the kernel gives them up. SIZE_MAX:
 * unknown. */
size_t memory_available(void);
/* OK if `needed` bytes are available, else an error that begins with `what` and ends with `advice`. */
Err memory_fits(size_t needed, size_t available, const char *what, const char *advice);
/* path = the words; an error that shows their beginning if they are longer than that. */
Err path_make(char path[PATH_BYTES], const char *fmt, ...) PRINTF_LIKE(2, 3);
/* "2.3 GiB", "5.6 MiB" */
const char *bytes_text(char text[32], size_t bytes);
static inline size_t min_size(size_t a, size_t b) {
    return a < b ? a : b;
}
static inline size_t max_size(size_t a, size_t b) {
    return a > b ? a : b;
}
static inline size_t ceil_div(size_t a, size_t b) {
    return (a + b - 1) / b;
}
static inline size_t round_up(size_t n, size_t unit) {
    return (n + unit - 1) / unit * unit;
}

/* Purposes of random streams; philox of bits.h makes their numbers. rng_stream(purpose, a, b) names one: a < 2^24 and
 * b < 2^32 (e.g. scale and sample). */
typedef enum {
    RNG_INIT = 1, /* a = row of the parameter table */
    RNG_ORDER,    /* a = epoch: order of the training examples */
    RNG_CROP,     /* a = epoch, b = example: random crop and flip */
    RNG_NOISE,    /* training noise: a = t, b = step */
    RNG_SCALE,    /* joint training: which t at a step */
    RNG_START,    /* sampling: x_T, b = sample */
    RNG_SAMPLE,   /* sampling: a = t and repeat, b = sample; index = position */
    RNG_RENOISE,  /* chains: noise between repeats, a = t and repeat, b = sample */
    RNG_UNKNOWN,  /* tokens of codes outside the remap table, b = image */
    RNG_CODES,    /* which latents replace dead codes, a = 0, b = step */
    RNG_CHOOSE,   /* inpainting: which candidates stay, a = t and repeat, b = sample */
    RNG_TEST,     /* tests */
    RNG_LABEL,    /* label dropout: a = 0, b = row of the micro batch, index = micro batch */
    RNG_ROUND,    /* moments in bf16: a = row of the parameter table, b = step, index = element / 4 */
    RNG_CROPS     /* the crops of a picture that are encoded once: a = which, b = picture */
} RngPurpose;
uint64_t rng_stream(RngPurpose purpose, uint64_t a, uint64_t b);
double rng_uniform(uint64_t seed, uint64_t stream, uint64_t index);                 /* [0,1), 53 bits */
double rng_normal(uint64_t seed, uint64_t stream, uint64_t index);                  /* N(0,1), Box-Muller */
uint32_t rng_below(uint64_t seed, uint64_t stream, uint64_t index, uint32_t below); /* 0..below-1, below >= 1 */

/* stop(context) is asked, on this thread and by what it calls, whether long work should end early: between the layers of
 * networks, in loops within (parallel_work), while much memory is set to zero. NULL: nobody is asked any more. Returned is
 * who was asked before, which work_ask_again takes: what is asked may itself do long work. */
typedef struct {
    int (*stop)(void *context);
    void *context;
    int said; /* that the work is to stop */
} WorkAsker;
WorkAsker work_ask(int (*stop)(void *context), void *context);
void work_ask_again(WorkAsker before);
int work_stops(void); /* has it said so? It is asked again, until it has. */

/* The rank-th largest (rank >= 1) of z (n), which is reordered. No NaN in z. */
real select_largest(real *z, size_t n, size_t rank);

/* task(context, i) for every i < n, shared among at most `threads` threads, of which the caller is one; returns when
 * all are done. Which thread takes which i varies, so a task must depend on i alone. Runs on the caller alone when
 * threads <= 1, inside another parallel_for, and while another thread of the program uses the workers. Cannot fail. */
typedef void Task(void *context, size_t i);
void parallel_for(int threads, size_t n, Task *task, void *context);
/* The same, but what is not begun when the work is to stop (work_stops) stays undone: for networks, whose
 * compute_status then is an error. */
void parallel_work(int threads, size_t n, Task *task, void *context);
void threads_set(int n); /* how many a program uses; 0 (default): as many as there are processors for it */
int threads_get(void);
/* Threads that the quotas of this process's control groups allow (docker --cpus), rounded up; 0: no quota. root: "", or
 * where a test keeps its /proc and /sys. */
int cpu_quota(const char *root);
const char *threads_text(char text[96]); /* "2 threads", and why so few if a quota says so */
const char *vector_instructions(void);   /* that this copy of the program was compiled for: "AVX2" */
int threads_free(void);    /* what a loop that starts here can use: 1 inside a parallel_for, else threads_get() */
size_t thread_index(void); /* of the calling thread in its loop: 0..threads-1 */

/* Bytes of an L2 cache that a thread has, by which kernels choose their blocks; L2_USUAL where nobody knows. What is less or
 * more than these is not believed: virtual machines make sizes up, and a larger one serves several cores. Results do not
 * depend on it, scratch memory does. */
enum { L2_LEAST = 128 << 10, L2_USUAL = 1 << 20, L2_MOST = 2 << 20 };
size_t l2_bytes(void);
size_t l2_sharers(const char *root); /* logical processors that share this thread's; root as above */
void l2_set(size_t bytes); /* tests: another size, for what is planned from now on; 0: the processor's again */
/* pthread_create, detached or not, with the usual stack whatever "ulimit -s" and the system's own size are: paths and error
 * texts lie on it, a few hundred KiB together. Returns what that returns. */
enum { STACK_USUAL = 8 << 20 };
int thread_start(pthread_t *thread, int detached, void *(*run)(void *), void *context);

/* ---- options.c: one table of options, one way to fail, progress. Only this file and the programs print or exit. ---- */

/* One row per option: parsing and --help both read this table. */
typedef enum {
    OPT_END,
    OPT_HEADING,
    OPT_ARGUMENT,
    OPT_ARGUMENTS, /* all that are left: a list */
    OPT_FLAG,
    OPT_STRING,
    OPT_STRINGS, /* may be given several times: a list */
    OPT_SIZE,
    OPT_REAL,
    OPT_U64
} OptionKind;
typedef struct {
    const char **item;
    size_t n, most; /* item has room for `most` */
} OptionList;
typedef struct {
    OptionKind kind;
    const char *name;  /* "--steps", "-n"; for OPT_ARGUMENT what the help calls it; for OPT_HEADING its text */
    const char *value; /* how the help calls the value: "N" */
    void *out; /* int (flag), const char * (argument, string), OptionList (of either), size_t, double, uint64_t; left
                      alone if not given */
    double lo, hi; /* range of numbers */
    const char *help;
} Option;
/* Fills every *out. Numbers must parse whole and lie in range. -h and --help print intro and table, exit 0; wrong usage
 * prints one line and exits 2. */
void options_parse(int argc, char **argv, const Option *table, const char *intro);
/* How many letters must be put in, taken out or replaced to make one word, of n letters, of the other; words of more than
 * 160 letters are as far apart */
size_t word_distance(const char *a, size_t n, const char *b);
void die(const char *fmt, ...) PRINTF_LIKE(1, 2);         /* "program: text" on stderr, exit 1 */
void usage_error(const char *fmt, ...) PRINTF_LIKE(1, 2); /* the same, exit 2 */
const char *program(void);                                /* the program's name, for messages */
/* A line, or a part of one, on stderr or as a result on stdout, made printable but for the line feed that ends fmt: it may
 * hold names of files and classes */
void say_text(const char *fmt, ...) PRINTF_LIKE(1, 2);
void say_text_args(const char *fmt, va_list args);
void say_result(const char *fmt, ...) PRINTF_LIKE(1, 2);
void check(Err e); /* die(err_text()) unless OK */
/* stderr: a line that overwrites itself on a terminal, plain lines elsewhere, one every 10 s at most. */
void progress_line(const char *fmt, ...) PRINTF_LIKE(1, 2);
void progress_off(void);                       /* no progress lines from here on */
void progress_patient(void);                   /* elsewhere than on a terminal none before 10 s from here */
void progress_end(void);                       /* leaves the last progress line standing */
double seconds(void);                          /* monotonic clock */
const char *duration(char text[32], double s); /* "1 h 02 min", "3 min 05 s", "4.2 s" */
/* SIGINT, SIGTERM, SIGUSR1 and, without nohup, SIGHUP set a flag; a second one ends the program at once. */
void catch_interrupts(void);
int interrupted(void);

#ifdef __cplusplus
}
#endif
#endif
