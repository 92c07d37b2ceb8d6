/* options.c - what the programs share: one table of options, one way to fail, progress.
 *
 * Only this file, version.c and the programs print or exit. Results go to stdout, everything else to stderr. */
#include "base/base.h"
#include "base/version.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

/* ---- failing ---- */

static const char *program_name = "imagebart";
static int line_open; /* 1: a progress line stands on the terminal; a newline must come before anything else */

static const char installed_name[] = "imagebart "; /* base/command.c calls an installed program "imagebart sample" */

/* How long the name of one of the programs is that a text gives as "./sample"; 0: another text is here. */
static size_t program_at(const char *text) {
    static const char *const names[] = {"./sample", "./train", "./inpaint", "./serve"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const size_t n = strlen(names[i]);
        if (strncmp(text, names[i], n) != 0) continue;
        const char next = text[n];
        if (isalnum((unsigned char)next) || (next && strchr("/._-", next) && text[n + 1] > ' ')) continue;
        return n;
    }
    return 0;
}

/* The text, in which programs are called as this one was: installed, "./sample" is "imagebart sample". */
static void put_text(FILE *to, const char *text) {
    const int installed = !strncmp(program_name, installed_name, strlen(installed_name));
    char before = ' ';
    for (const char *p = text; *p; before = p[-1]) {
        const size_t n = installed && strchr(" \n\"(", before) ? program_at(p) : 0;
        if (n) fprintf(to, "%s%.*s", installed_name, (int)n - 2, p + 2);
        if (!n) fputc(*p, to);
        p += n ? n : 1;
    }
}

enum { SAID_BYTES = 3 * ERR_MAX };

/* fmt and args, printable but for the line feed that ends fmt; what does not fit ends in "..." */
static const char *said(char text[SAID_BYTES], const char *fmt, va_list args) {
    const size_t length = strlen(fmt);
    const int line = length > 0 && fmt[length - 1] == '\n';
    if (vsnprintf(text, SAID_BYTES - 1, fmt, args) >= SAID_BYTES - 1)
        strcpy(text + SAID_BYTES - 6, line ? "...\n" : "...");
    const size_t n = strlen(text);
    if (line && n) text[n - 1] = 0;
    make_printable(text);
    return line ? strcat(text, "\n") : text;
}

void say_text_args(const char *fmt, va_list args) {
    char text[SAID_BYTES];
    fputs(said(text, fmt, args), stderr);
}

void say_text(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    say_text_args(fmt, args);
    va_end(args);
}

void say_result(const char *fmt, ...) {
    char text[SAID_BYTES];
    va_list args;
    va_start(args, fmt);
    fputs(said(text, fmt, args), stdout);
    va_end(args);
}

static void fail(int status, const char *fmt, va_list args) {
    char text[SAID_BYTES];
    progress_end();
    fprintf(stderr, "%s: ", program_name);
    put_text(stderr, said(text, fmt, args));
    fprintf(stderr, "\n");
    exit(status);
}

void die(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    fail(1, fmt, args);
    va_end(args);
}

void usage_error(const char *fmt, ...) {
    va_list args;
    va_start(args, fmt);
    fail(2, fmt, args);
    va_end(args);
}

void check(Err e) {
    if (e != OK) die("%s", err_text());
}

/* ---- the stack ----
 *
 * Paths and error texts lie on it: a few hundred KiB together. A small limit (ulimit -s) is raised as far as the system
 * allows before main takes its first step; where that is not far enough, a line says so, instead of a crash. Threads
 * have theirs from thread_start. */

enum { STACK_LEAST = 512 << 10 };

#ifdef __APPLE__
#define OWN_NAME getprogname()
#else
#define OWN_NAME program_invocation_short_name
#endif

#ifndef LIBRARY /* where the program is another's */
__attribute__((constructor)) static void need_stack(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_STACK, &limit) != 0 || limit.rlim_cur >= STACK_USUAL)
        return; /* RLIM_INFINITY is the largest */
    limit.rlim_cur = limit.rlim_max < STACK_USUAL ? limit.rlim_max : STACK_USUAL;
    if (setrlimit(RLIMIT_STACK, &limit) != 0) getrlimit(RLIMIT_STACK, &limit);
    if (limit.rlim_cur < STACK_LEAST) {
        fprintf(stderr, "%s: a stack of %zu KiB (ulimit -s), expected at least %d\n", OWN_NAME,
                (size_t)limit.rlim_cur >> 10, STACK_LEAST >> 10);
        _exit(1);
    }
}
#endif

/* ---- options ---- */

static void print_row(const Option *o) {
    char left[64];
    if (o->kind == OPT_HEADING) {
        printf("\n");
        put_text(stdout, o->name);
        printf("\n");
        return;
    }
    snprintf(left, sizeof left, "%s%s%s", o->name, o->value ? " " : "", o->value ? o->value : "");
    printf("  %-24s", left);
    if (strlen(left) > 23) printf("\n  %-24s", "");
    char help[1024], *at = help;
    for (const char *c = o->help; *c && at < help + sizeof help - 32; c++) {
        *at++ = *c;
        if (*c == '\n') at += sprintf(at, "  %-24s", "");
    }
    *at = 0;
    put_text(stdout, help);
    printf("\n");
}

static void print_help(const Option *table, const char *intro) {
    static const Option of_all[] = {{OPT_HEADING, "Of every program", NULL, NULL, 0, 0, NULL},
                                    {OPT_FLAG, "-h, --help", NULL, NULL, 0, 0, "this text"},
                                    {OPT_FLAG, "--version", NULL, NULL, 0, 0, "commit, compiler, processor, libraries"},
                                    {OPT_END, NULL, NULL, NULL, 0, 0, NULL}};
    put_text(stdout, intro);
    for (const Option *o = table; o->kind != OPT_END; o++) print_row(o);
    for (const Option *o = of_all; o->kind != OPT_END; o++) print_row(o);
}

static void set_number(const Option *o, const char *text) {
    char *end;
    errno = 0;
    if (o->kind == OPT_REAL) {
        double x = strtod(text, &end);
        if (!*text || *end || errno || !isfinite(x)) usage_error("%s %s: expected a number", o->name, text);
        if (x < o->lo || x > o->hi) usage_error("%s %s: expected %g to %g", o->name, text, o->lo, o->hi);
        *(double *)o->out = x;
        return;
    }
    unsigned long long n = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno) usage_error("%s %s: expected a whole number", o->name, text);
    if (o->kind == OPT_SIZE && ((double)n < o->lo || (double)n > o->hi))
        usage_error("%s %s: expected %.0f to %.0f", o->name, text, o->lo, o->hi);
    if (o->kind == OPT_SIZE)
        *(size_t *)o->out = (size_t)n;
    else
        *(uint64_t *)o->out = n;
}

static void add_to_list(const Option *o, const char *text) {
    OptionList *list = o->out;
    if (list->n == list->most) usage_error("%s: more than %zu", o->name, list->most);
    list->item[list->n++] = text;
}

static void set_argument(const Option *table, int nth, const char *text) {
    for (const Option *o = table; o->kind != OPT_END; o++) {
        if (o->kind == OPT_ARGUMENTS) {
            add_to_list(o, text);
            return;
        }
        if (o->kind == OPT_ARGUMENT && nth-- == 0) {
            *(const char **)o->out = text;
            return;
        }
    }
    usage_error("unexpected argument \"%s\"; -h explains", text);
}

static int is_option(const Option *o) {
    return o->kind != OPT_HEADING && o->kind != OPT_ARGUMENT && o->kind != OPT_ARGUMENTS;
}

size_t word_distance(const char *a, size_t n, const char *b) {
    enum { LONGEST = 160 };
    size_t row[LONGEST + 1];
    const size_t m = strlen(b);
    if (n > LONGEST || m > LONGEST) return LONGEST;
    for (size_t j = 0; j <= m; j++) row[j] = j;
    for (size_t i = 1; i <= n; i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= m; j++) {
            const size_t replaced = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = min_size(replaced, 1 + min_size(row[j], row[j - 1]));
        }
    }
    return row[m];
}

/* A third of the letters may be wrong; or the option goes on where the user stopped. */
static void unknown_option(const Option *table, const char *text, size_t length) {
    const char *best = NULL;
    size_t least = max_size(length / 3, 1) + 1;
    for (const Option *o = table; o->kind != OPT_END; o++) {
        if (!is_option(o) || o->name[1] != '-') continue;
        size_t d = word_distance(text, length, o->name);
        if (length > 3 && !strncmp(o->name, text, length)) d = 0;
        if (d < least) least = d, best = o->name;
    }
    if (best) usage_error("unknown option %.*s; did you mean %s? -h lists them", (int)length, text, best);
    usage_error("unknown option %.*s; -h lists them", (int)length, text);
}

/* The row named by argv[*i], either "--name value" or "--name=value"; sets it and moves on. */
static void set_option(const Option *table, int argc, char **argv, int *i) {
    const char *text = argv[*i], *equals = strchr(text, '=');
    size_t length = equals ? (size_t)(equals - text) : strlen(text);
    const Option *o = table;
    while (o->kind != OPT_END && (!is_option(o) || strlen(o->name) != length || strncmp(o->name, text, length))) o++;
    if (o->kind == OPT_END) {
        unknown_option(table, text, length);
        return;
    }
    if (o->kind == OPT_FLAG) {
        if (equals) usage_error("%s takes no value", o->name);
        *(int *)o->out = 1;
        return;
    }
    if (!equals && *i + 1 >= argc) usage_error("%s needs a value: %s %s", o->name, o->name, o->value);
    const char *value = equals ? equals + 1 : argv[++*i];
    if (o->kind == OPT_STRING || o->kind == OPT_STRINGS) {
        if (!*value) usage_error("%s: the value is empty", o->name);
        if (o->kind == OPT_STRINGS)
            add_to_list(o, value);
        else
            *(const char **)o->out = value;
    } else
        set_number(o, value);
}

void options_parse(int argc, char **argv, const Option *table, const char *intro) {
    const char *slash = strrchr(argv[0], '/');
    program_name = slash ? slash + 1 : argv[0];
    signal(SIGXFSZ, SIG_IGN);      /* beyond ulimit -f a write fails, which is said */
    if (getenv("IMAGEBART_LEVEL")) /* start.c, where there is one, has obeyed it and removed it */
        usage_error("IMAGEBART_LEVEL: this program was compiled for one kind of processor, %s; \"make\" without MARCH "
                    "makes one that chooses, on x86-64",
                    vector_instructions());
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], "-h") || !strcmp(argv[i], "--help")) {
            print_help(table, intro);
            exit(fflush(stdout) ? 1 : 0);
        } else if (!strcmp(argv[i], "--version")) {
            version_print(program_name);
            exit(fflush(stdout) ? 1 : 0);
        }
    for (int i = 1, arguments = 0; i < argc; i++) {
        if (argv[i][0] == '-' && argv[i][1])
            set_option(table, argc, argv, &i);
        else
            set_argument(table, arguments++, argv[i]);
    }
}

/* ---- progress ---- */

const char *program(void) {
    return program_name;
}

double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

const char *duration(char text[32], double s) {
    if (!(s >= 0 && s < 1e12))
        snprintf(text, 32, "unknown");
    else if (s >= 100 * 3600)
        snprintf(text, 32, "%.0f days", s / 86400);
    else if (s >= 3600)
        snprintf(text, 32, "%d h %02d min", (int)(s / 3600), (int)(s / 60) % 60);
    else if (s >= 60)
        snprintf(text, 32, "%d min %02d s", (int)(s / 60), (int)s % 60);
    else
        snprintf(text, 32, "%.1f s", s);
    return text;
}

static int silent;
static double last_line = -1e9; /* when a progress line was written */

void progress_off(void) {
    silent = 1;
}

void progress_patient(void) {
    if (!isatty(2)) last_line = seconds();
}

void progress_line(const char *fmt, ...) {
    int terminal = isatty(2);
    double now = seconds();
    if (silent || now - last_line < (terminal ? 0.1 : 10)) return;
    last_line = now;
    va_list args;
    va_start(args, fmt);
    if (terminal) fprintf(stderr, "\r\033[K");
    say_text_args(fmt, args);
    if (!terminal) fprintf(stderr, "\n");
    va_end(args);
    fflush(stderr);
    line_open = terminal;
}

void progress_end(void) {
    if (line_open) fprintf(stderr, "\n");
    line_open = 0;
}

static volatile sig_atomic_t interrupt_flag;

static const int interrupts[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1}; /* mpirun passes SIGUSR1 on to its processes */
enum { INTERRUPTS = sizeof interrupts / sizeof *interrupts };

static void on_interrupt(int number) {
    (void)number;
    interrupt_flag = 1;
    for (int i = 0; i < INTERRUPTS; i++) /* a second one, of any kind, ends the program as usual */
        signal(interrupts[i], SIG_DFL);
}

void catch_interrupts(void) {
    struct sigaction action, before;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_interrupt;
    action.sa_flags = SA_RESTART;
    sigfillset(&action.sa_mask); /* the second waits until the handler of the first has returned */
    for (int i = 0; i < INTERRUPTS && !interrupt_flag; i++) {
        sigaction(interrupts[i], NULL, &before);
        if (interrupts[i] == SIGHUP && before.sa_handler == SIG_IGN) continue; /* nohup */
        sigaction(interrupts[i], &action, NULL);
    }
}

int interrupted(void) {
    return interrupt_flag;
}
