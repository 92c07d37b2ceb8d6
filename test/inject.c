/* inject.c - a disk that fails, for test_faults.sh: a program's Nth call for a file fails, or the program is killed
 * there.
 *
 *     inject AREA CALL N FAULT COMMAND ...    the Nth CALL for a file below the folder AREA; exit status: the program's,
 *                                             128 and the signal's number if one ended it
 *     inject AREA list FILE COMMAND ...       nothing fails; FILE gets a line "N CALL PATH" for each call
 *
 * CALL is open, read, write, fsync, rename, link, unlink, mkdir, ftruncate, mmap, readdir, stat, flock or close; or
 * change: N then counts all that may change something, which are those but read, mmap, readdir, stat and close.
 * FAULT is the name of an error (EIO, ENOSPC, ...), which the call ends with instead of being made; SHORT: it is
 * asked for half of its bytes; KILL: SIGKILL before it. N+: that call and all after it.
 *
 * A filter of the kernel (seccomp) stops the program at these calls alone, and this process, its tracer, decides. Where
 * that cannot be done (another processor, no permission), the exit status is 77. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CANNOT = 77, USAGE = 2 };

#if defined(__x86_64__)

/* Where a call says which file it is for, and how much: -1: nowhere */
static const struct {
    const char *name;
    int number, fd, path, bytes;
} calls[] = {
    {"open", SYS_open, -1, 0, -1},        {"open", SYS_openat, -1, 1, -1},
    {"open", SYS_creat, -1, 0, -1},       {"read", SYS_read, 0, -1, 2},
    {"read", SYS_pread64, 0, -1, 2},      {"write", SYS_write, 0, -1, 2},
    {"write", SYS_pwrite64, 0, -1, 2},    {"write", SYS_writev, 0, -1, -1},
    {"fsync", SYS_fsync, 0, -1, -1},      {"fsync", SYS_fdatasync, 0, -1, -1},
    {"rename", SYS_rename, -1, 1, -1},    {"rename", SYS_renameat, -1, 3, -1},
    {"rename", SYS_renameat2, -1, 3, -1}, {"link", SYS_link, -1, 1, -1},
    {"link", SYS_linkat, -1, 3, -1},      {"unlink", SYS_unlink, -1, 0, -1},
    {"unlink", SYS_unlinkat, -1, 1, -1},  {"mkdir", SYS_mkdir, -1, 0, -1},
    {"mkdir", SYS_mkdirat, -1, 1, -1},    {"ftruncate", SYS_ftruncate, 0, -1, -1},
    {"mmap", SYS_mmap, 4, -1, -1},        {"readdir", SYS_getdents64, 0, -1, -1},
    {"stat", SYS_stat, -1, 0, -1},        {"stat", SYS_lstat, -1, 0, -1},
    {"stat", SYS_newfstatat, -1, 1, -1},  {"stat", SYS_fstat, 0, -1, -1},
    {"stat", SYS_statx, -1, 1, -1},       {"flock", SYS_flock, 0, -1, -1},
    {"close", SYS_close, 0, -1, -1},
};
enum { CALLS = sizeof calls / sizeof *calls };

static const struct {
    const char *name;
    int number;
} faults[] = {{"EIO", EIO},       {"ENOSPC", ENOSPC}, {"EINTR", EINTR}, {"EDQUOT", EDQUOT},
              {"EMFILE", EMFILE}, {"EACCES", EACCES}, {"EROFS", EROFS}, {"ENOMEM", ENOMEM},
              {"EAGAIN", EAGAIN}, {"ESTALE", ESTALE}, {"EPERM", EPERM}, {"ENOLCK", ENOLCK},
              {"ENOENT", ENOENT}, {"EFBIG", EFBIG},   {"SHORT", -1},    {"KILL", -2}};

typedef struct {
    const char *area, *call;
    long n, seen;
    int on, fault; /* N+; an error, or -1, -2 as above; 0: the calls are listed */
    FILE *list;
} Plan;

/* ---- the program: stopped at these calls alone ---- */

static void filter_calls(void) {
    enum { LOAD = BPF_LD | BPF_W | BPF_ABS, EQUAL = BPF_JMP | BPF_JEQ | BPF_K, RETURN = BPF_RET | BPF_K };
    struct sock_filter code[CALLS + 5];
    size_t n = 0;
    code[n++] = (struct sock_filter)BPF_STMT(LOAD, offsetof(struct seccomp_data, arch));
    code[n++] = (struct sock_filter)BPF_JUMP(EQUAL, AUDIT_ARCH_X86_64, 0, CALLS + 1);
    code[n++] = (struct sock_filter)BPF_STMT(LOAD, offsetof(struct seccomp_data, nr));
    for (size_t i = 0; i < CALLS; i++)
        code[n++] = (struct sock_filter)BPF_JUMP(EQUAL, (unsigned)calls[i].number, (uint8_t)(CALLS - i), 0);
    code[n++] = (struct sock_filter)BPF_STMT(RETURN, SECCOMP_RET_ALLOW);
    code[n++] = (struct sock_filter)BPF_STMT(RETURN, SECCOMP_RET_TRACE);
    struct sock_fprog program = {(unsigned short)n, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) _exit(CANNOT);
}

static pid_t start(char **command) {
    const pid_t child = fork();
    if (child) return child;
    if (ptrace(PTRACE_TRACEME, 0, 0, 0)) _exit(CANNOT);
    raise(SIGSTOP);
    filter_calls();
    execvp(command[0], command);
    _exit(127);
}

/* ---- one call ---- */

static int below(const char *area, const char *path) {
    const size_t n = strlen(area);
    return !strncmp(path, area, n) && (path[n] == '/' || path[n] == 0);
}

static unsigned long long argument(const struct user_regs_struct *r, int i) {
    const unsigned long long all[6] = {r->rdi, r->rsi, r->rdx, r->r10, r->r8, r->r9};
    return all[i];
}

/* The path of the file that a call is for; "" if it cannot be told */
static void path_of(char path[4096], pid_t pid, const struct user_regs_struct *r, size_t i) {
    char link[64];
    path[0] = 0;
    if (calls[i].path >= 0) {
        const unsigned long long at = argument(r, calls[i].path),
                                 page = 4096 - at % 4096; /* the next may not be there */
        const struct iovec here = {path, 4095},
                           there[2] = {{(void *)at, page}, {(void *)(at + page), 4095 - page < 4095 ? 4095 - page : 0}};
        ssize_t n = process_vm_readv(pid, &here, 1, there, 2, 0);
        path[n > 0 ? n : 0] = 0;
        if (path[0] || calls[i].number != SYS_newfstatat) return;
        snprintf(link, sizeof link, "/proc/%ld/fd/%llu", (long)pid, argument(r, 0)); /* fstat */
    } else
        snprintf(link, sizeof link, "/proc/%ld/fd/%d", (long)pid, (int)argument(r, calls[i].fd));
    const ssize_t n = readlink(link, path, 4095);
    path[n > 0 ? n : 0] = 0;
}

static int counts(const char *wanted, const char *call) {
    static const char *const looking[] = {"read", "mmap", "readdir", "stat", "close"};
    if (!strcmp(wanted, "all") || !strcmp(wanted, call)) return 1;
    size_t i = 0;
    while (i < 5 && strcmp(looking[i], call)) i++;
    return i == 5 && !strcmp(wanted, "change");
}

static void decide(Plan *p, pid_t pid, pid_t program) {
    struct user_regs_struct r;
    char path[4096];
    size_t i = 0;
    if (ptrace(PTRACE_GETREGS, pid, 0, &r)) return;
    while (i < CALLS && calls[i].number != (int)r.orig_rax) i++;
    if (i == CALLS || !counts(p->call, calls[i].name)) return;
    path_of(path, pid, &r, i);
    if (!below(p->area, path)) return;
    p->seen++;
    if (p->list) fprintf(p->list, "%ld %s %s\n", p->seen, calls[i].name, path);
    if (!p->fault || (p->on ? p->seen < p->n : p->seen != p->n)) return;
    if (p->fault == -2)
        kill(program, SIGKILL);
    else if (p->fault == -1 && calls[i].bytes == 2 && r.rdx > 1)
        r.rdx /= 2, ptrace(PTRACE_SETREGS, pid, 0, &r);
    else if (p->fault > 0)
        r.orig_rax = (unsigned long long)-1, r.rax = (unsigned long long)-p->fault, ptrace(PTRACE_SETREGS, pid, 0, &r);
}

/* ---- all of them ---- */

static int watch(Plan *p, pid_t program) {
    int status;
    if (waitpid(program, &status, 0) < 0 || !WIFSTOPPED(status)) return CANNOT;
    const long options = PTRACE_O_TRACESECCOMP | PTRACE_O_TRACECLONE | PTRACE_O_EXITKILL;
    if (ptrace(PTRACE_SETOPTIONS, program, 0, options)) return CANNOT;
    ptrace(PTRACE_CONT, program, 0, 0);
    for (;;) {
        const pid_t pid = waitpid(-1, &status, __WALL);
        if (pid < 0) return CANNOT;
        if (!WIFSTOPPED(status)) {
            if (pid != program) continue; /* a thread */
            return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        }
        int signal = WSTOPSIG(status);
        if (status >> 8 == (SIGTRAP | PTRACE_EVENT_SECCOMP << 8)) decide(p, pid, program);
        if (status >> 16 || signal == SIGTRAP || signal == SIGSTOP) signal = 0;
        ptrace(PTRACE_CONT, pid, 0, signal);
    }
}

static int fault_named(const char *name) {
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        if (!strcmp(faults[i].name, name)) return faults[i].number;
    fprintf(stderr, "inject: %s: no such fault\n", name);
    exit(USAGE);
}

int main(int argc, char **argv) {
    Plan p = {0};
    const int list = argc > 4 && !strcmp(argv[2], "list");
    if (argc < (list ? 5 : 6)) return USAGE;
    p.area = argv[1];
    p.call = list ? "all" : argv[2];
    if (list && !(p.list = fopen(argv[3], "w"))) return USAGE;
    if (!list) p.n = atol(argv[3]), p.on = strchr(argv[3], '+') != NULL, p.fault = fault_named(argv[4]);
    const int status = watch(&p, start(argv + (list ? 4 : 5)));
    if (p.list) fclose(p.list);
    return status;
}

#else
int main(void) {
    return CANNOT;
}
#endif
