/* parallel.c - more than one process: `mpirun -np 4 ./train ...` trains one model together.
 *
 * Every rank (process) holds the whole model and computes the gradient of its share of every batch. The shares are
 * added up, and since each rank then holds the same bits, each takes the same optimizer step: what is trained is what
 * one process would train from the same batches, but for the order in which floats are added. On CPUs MPI adds, on GPUs
 * (one for each rank) NCCL, with MPI to start it.
 *
 * A gradient is complete from the last row of the parameter table down, as backward comes to it; networks say how far
 * they are (params_ready). Each message of numbers that is complete is on its way while backward goes on below it.
 *
 * A failure is everybody's: every rank calls the same functions in the same order, whatever happens to it, until
 * ranks_agree tells all of them that one has failed. Whoever exits without having agreed takes the others along, and so
 * does the launcher when a process is lost.
 *
 * Without mpirun or srun, or with a single process, none of this asks MPI for anything. MPI is called by the program's
 * first thread only.
 *
 * Read in this order: the launcher; MPI; what the ranks share; gradients. */
#include "base/bits.h"
#include "training/training.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef HAVE_MPI
#include <mpi.h>
#endif

static struct {
    size_t rank, ranks;
    size_t local, locals; /* number of this rank among those of its machine, how many these are */
    size_t threads;
    int running, broken;             /* MPI is */
    int failed;                      /* all ranks know that one has: there is nothing left to agree on */
    void (*waiting)(double seconds); /* told while this process waits for others */
} world = {.ranks = 1, .locals = 1};

/* ---- The launcher ---- */

/* How many processes were started together, as the launcher tells each of them. *by: the variable that says so. */
static size_t launched(const char **by) {
    static const char *const variable[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE",
                                           "SLURM_STEP_NUM_TASKS"};
    for (size_t i = 0; i < sizeof variable / sizeof *variable; i++) {
        const char *text = getenv(*by = variable[i]);
        if (text) return strtoul(text, NULL, 10);
    }
    return 1;
}

/* ---- MPI ---- */

typedef enum { SUM_REALS, SUM_DOUBLES, SUM_COUNTS, MAX_WORDS, UNION_BYTES } Combining;
enum { MESSAGE = 4 << 20, MESSAGES = 8 }; /* numbers of a gradient in one message at most, 16 MiB; messages at least */

#ifdef HAVE_MPI

static MPI_Request *message; /* (messages) of the gradient on its way */
static size_t messages, message_capacity;

static Err mpi_error(int code, const char *what) {
    char text[MPI_MAX_ERROR_STRING];
    int length = 0;
    if (code == MPI_SUCCESS) return OK;
    world.broken = 1;
    MPI_Error_string(code, text, &length);
    return err("MPI: %s: %.*s; was another process lost? The last checkpoint is intact, --resume continues from it",
               what, length, text);
}

/* Between two tests other processes get the processor: they may be the ones that this one waits for. */
static Err wait_for_all(MPI_Request *request, size_t n, const char *what) {
    double begun = MPI_Wtime();
    for (int done = 0;;) {
        TRY(mpi_error(MPI_Testall((int)n, request, &done, MPI_STATUSES_IGNORE), what));
        if (done) return OK;
        if (world.waiting) world.waiting(MPI_Wtime() - begun);
        sched_yield();
    }
}

static Err start_combining(void *x, size_t n, Combining kind, MPI_Comm among, MPI_Request *request) {
    const MPI_Datatype type[] = {sizeof(real) == sizeof(double) ? MPI_DOUBLE : MPI_FLOAT, MPI_DOUBLE, MPI_UINT32_T,
                                 MPI_UINT64_T, MPI_UNSIGNED_CHAR};
    const MPI_Op op[] = {MPI_SUM, MPI_SUM, MPI_SUM, MPI_MAX, MPI_BOR};
    return mpi_error(MPI_Iallreduce(MPI_IN_PLACE, x, (int)n, type[kind], op[kind], among, request),
                     "adding up over processes");
}

/* x (n) = what all ranks' x come to, on every rank */
static Err combine(void *x, size_t n, Combining kind) {
    MPI_Request request;
    TRY(start_combining(x, n, kind, MPI_COMM_WORLD, &request));
    return wait_for_all(&request, 1, "adding up over processes");
}

static Err broadcast(size_t from, void *bytes, size_t n) {
    MPI_Request request;
    TRY(mpi_error(MPI_Ibcast(bytes, (int)n, MPI_BYTE, (int)from, MPI_COMM_WORLD, &request), "sending to processes"));
    return wait_for_all(&request, 1, "sending to processes");
}

static Err send_message(real *x, size_t n) {
    TRY(mem_grow(&message, messages, 1, &message_capacity, sizeof *message, "messages"));
    return start_combining(x, n, SUM_REALS, MPI_COMM_WORLD, &message[messages++]);
}

/* MPI moves data while it is asked. */
static Err move_messages(void) {
    int done;
    return mpi_error(MPI_Testall((int)messages, message, &done, MPI_STATUSES_IGNORE), "adding up gradients");
}

static Err wait_for_messages(void) {
    Err e = wait_for_all(message, messages, "adding up gradients");
    messages = 0;
    return e;
}

/* Shares out the processors of this machine: its ranks take equal parts of all that any of them may run on. */
static Err share_machine(void) {
    MPI_Comm here;
    MPI_Request request;
    cpu_set_t set;
    int local, locals;
    CPU_ZERO(&set);
    TRY(mpi_error(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &here), "this machine"));
    MPI_Comm_rank(here, &local);
    MPI_Comm_size(here, &locals);
    if (sched_getaffinity(0, sizeof set, &set) != 0) CPU_SET(0, &set);
    TRY(start_combining(&set, sizeof set, UNION_BYTES, here, &request));
    TRY(wait_for_all(&request, 1, "this machine"));
    world.local = (size_t)local, world.locals = (size_t)locals;
    world.threads = max_size(1, (size_t)CPU_COUNT(&set) / (size_t)locals);
    return mpi_error(MPI_Comm_free(&here), "this machine");
}

/* Called by exit without ranks_end. If all ranks have agreed that one failed, all of them come here, and MPI_Finalize
 * waits until the rank that prints the reason has printed it. If this rank fails alone, it aborts the others. */
static void leave_at_exit(void) {
    if (!world.running) return;
    if (!world.failed || world.broken) MPI_Abort(MPI_COMM_WORLD, EXIT_FAILURE);
    MPI_Finalize();
}

static Err mpi_start(size_t expected, const char *by) {
    int support, rank_here, size;
    TRY(mpi_error(MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &support), "starting"));
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank_here);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if ((size_t)size != expected)
        return err("%s says %zu processes, MPI finds %d: the program was built with another MPI than the one that "
                   "started it (Slurm: srun --mpi=pmix)",
                   by, expected, size);
    if (support < MPI_THREAD_FUNNELED) return err("this MPI cannot be used by a program that has threads");
    world.rank = (size_t)rank_here, world.ranks = (size_t)size, world.running = 1;
    atexit(leave_at_exit);
    return share_machine();
}

static void mpi_end(void) {
    free(message);
    message = NULL, messages = message_capacity = 0;
    MPI_Finalize();
}

#else

static Err mpi_start(size_t expected, const char *by) {
    return err("%s says that %zu processes were started together, but this program was built without MPI, so that each "
               "would train the same alone; libopenmpi-dev brings it (Debian: apt-get install libopenmpi-dev "
               "openmpi-bin), then: make",
               by, expected);
}
static void mpi_end(void) {}

/* A single process never comes to these. */
static Err no_mpi(void) {
    return err("built without MPI");
}
static Err combine(void *x, size_t n, Combining kind) {
    (void)x, (void)n, (void)kind;
    return no_mpi();
}
static Err broadcast(size_t from, void *bytes, size_t n) {
    (void)from, (void)bytes, (void)n;
    return no_mpi();
}
static Err send_message(real *x, size_t n) {
    (void)x, (void)n;
    return no_mpi();
}
static Err move_messages(void) {
    return no_mpi();
}
static Err wait_for_messages(void) {
    return no_mpi();
}
#endif

/* ---- What the ranks share ---- */

Err ranks_start(void (*waiting)(double seconds)) {
    const char *by;
    const size_t n = launched(&by);
    world.waiting = waiting;
    return n > 1 ? mpi_start(n, by) : OK;
}

void ranks_end(void) {
    if (world.running) mpi_end();
    world.running = 0;
}

size_t rank(void) {
    return world.rank;
}

size_t ranks(void) {
    return world.ranks;
}

size_t rank_local(void) {
    return world.local;
}

size_t ranks_local(void) {
    return world.locals;
}

int rank_threads(void) {
    return (int)world.threads;
}

Err ranks_sum(double *x, size_t n) {
    return world.ranks == 1 ? OK : combine(x, n, SUM_DOUBLES);
}

Err ranks_sum_counts(uint32_t *x, size_t n) {
    return world.ranks == 1 ? OK : combine(x, n, SUM_COUNTS);
}

Err ranks_any(int *flag) {
    uint64_t word = (uint64_t)(*flag != 0);
    if (world.ranks == 1) return OK;
    TRY(combine(&word, 1, MAX_WORDS));
    *flag = word != 0;
    return OK;
}

Err ranks_broadcast(size_t from, void *bytes, size_t n) {
    return world.ranks == 1 ? OK : broadcast(from, bytes, n);
}

Err ranks_agree(Err e) {
    char text[ERR_MAX], host[64] = "";
    uint64_t failed = e == OK ? 0 : world.ranks - world.rank; /* the largest is that of the first that failed */
    if (world.ranks == 1 || world.failed) return world.failed ? FAILED : e;
    gethostname(host, sizeof host - 1);
    if (e == OK || world.rank == 0)
        snprintf(text, sizeof text, "%s", err_text());
    else
        snprintf(text, sizeof text, "process %zu on %s: %.800s", world.rank, host, err_text());
    TRY(combine(&failed, 1, MAX_WORDS));
    if (!failed) return OK;
    world.failed = 1;
    TRY(broadcast(world.ranks - (size_t)failed, text, sizeof text));
    return err("%s", text);
}

Err ranks_same(const void *bytes, size_t n, const char *what) {
    uint64_t hash = FNV_START, word = 0; /* FNV-1a, eight bytes at a time */
    if (world.ranks == 1) return OK;
    for (size_t at = 0; at < n; at += sizeof word) {
        word = 0;
        memcpy(&word, (const char *)bytes + at, min_size(sizeof word, n - at));
        hash = (hash ^ word) * FNV_PRIME;
    }
    uint64_t ends[2] = {hash, ~hash}; /* the largest, and the least */
    TRY(combine(ends, 2, MAX_WORDS));
    return ends[0] == ~ends[1] ? OK
                               : err("the processes hold different %s, which should be the same to the bit (memory or "
                                     "network errors? processors of different kinds? different builds?); the last "
                                     "checkpoint is intact",
                                     what);
}

Err ranks_differ(const void *bytes, size_t n, const char *what) {
    unsigned char other[64];
    int alike = 0;
    for (size_t r = 0; r < world.ranks; r++) {
        memcpy(other, bytes, n);
        TRY(ranks_broadcast(r, other, n));
        alike |= r != world.rank && memcmp(other, bytes, n) == 0;
    }
    TRY(ranks_any(&alike));
    return alike ? err("two processes have the same %s; expected one of its own for each", what) : OK;
}

/* ---- Gradients ---- */

/* The gradient that is being added up. Numbers `sent` and on of its arena are on their way. */
static struct {
    Params *params;
    size_t sent, size; /* of a message */
    Err failed;        /* in the midst of backward, which has nobody to tell; the text waits for gradients_end */
    char failure[ERR_MAX];
} sum;

/* Where a row lies in the gradient; behind the last one: how long it is. */
static size_t gradient_place(const Params *p, size_t row) {
    if (p->device) return p->ops->place(p, row);
    return row < p->n ? (size_t)(p->row[row].grad - p->arena[1]) : p->total;
}

static Err send_down_to(size_t place) {
    Params *p = sum.params;
    while (sum.sent > place && (sum.sent - place >= sum.size || place == 0)) {
        const size_t n = min_size(sum.sent, sum.size);
        sum.sent -= n;
        TRY(p->device ? p->ops->grad_sum(p->device, sum.sent, n) : send_message(p->arena[1] + sum.sent, n));
    }
    return p->device ? OK : move_messages();
}

static void note_failure(Err e) {
    if (e == OK || sum.failed != OK) return;
    sum.failed = e;
    snprintf(sum.failure, sizeof sum.failure, "%s", err_text());
}

static void rows_ready(Params *p, size_t row) {
    const size_t place = max_size(gradient_place(p, row), 1); /* the last message is gradients_end's */
    if (sum.failed == OK) note_failure(send_down_to(place));
}

/* Joins the ranks' GPUs, once for each table: the first rank draws an id, by which NCCL lets the others find it. */
static Err join_gpus(Params *p) {
    unsigned char id[DEVICE_ID_BYTES] = {0};
    if (p->ops->joined(p->device)) return OK;
    TRY(ranks_agree(world.rank == 0 ? p->ops->join_id(id) : OK));
    TRY(broadcast(0, id, sizeof id));
    return p->ops->join(p->device, id, (int)world.ranks, (int)world.rank);
}

Err gradients_begin(Params *p) {
    if (world.ranks == 1) return OK;
    if (p->device) TRY(join_gpus(p));
    sum.params = p, sum.sent = gradient_place(p, p->n), sum.failed = OK;
    sum.size = min_size(MESSAGE, ceil_div(sum.sent, MESSAGES));
    p->ready = rows_ready;
    return OK;
}

Err gradients_end(Params *p) {
    if (world.ranks == 1 || !p->ready) return OK;
    p->ready = NULL;
    if (sum.failed == OK) note_failure(send_down_to(0));
    if (sum.failed == OK) note_failure(p->device ? p->ops->grad_wait(p->device) : wait_for_messages());
    return sum.failed == OK ? OK : err("%s", sum.failure);
}
