/* fullsize.c - checks the official models at their full size against test/fullsize.py.
 *
 *     fullsize MODEL                   the logits of every scale, and a decoded picture, against PyTorch's
 *     fullsize --peak MIB COMMAND...   runs a command, whose peak memory must stay below MIB
 *
 * MODEL is opened as ./sample opens it. Beside each scaleN.ckpt lies scaleN.logits.safetensors, which says what goes in
 * and what must come out, within 1e-4 of the largest magnitude. One line per comparison; exit status 1 if any failed.
 *
 * Peak memory is the kernel's ru_maxrss: the most pages that the process had at a time, its own memory and those pages
 * of mapped files that it had touched. Pages of a file that it never touched do not count. */
#include "test.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const double TOLERANCE = 1e-4; /* of the largest magnitude */

static double clock_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* What goes into one transition, and how many rows of it. */
typedef struct {
    size_t B;
    int32_t *x, *x_t, *t, *label;
} Input;

static void input_free(Input *in) {
    free(in->x);
    free(in->x_t);
    free(in->t);
    free(in->label);
}

static Err take_ints(int32_t **x, const Checkpoint *ck, const char *name, size_t n) {
    TRY(mem_alloc(x, n, sizeof **x, name));
    return checkpoint_ints(ck, name, n, *x);
}

static Err input_read(Input *in, const Checkpoint *ck, size_t N) {
    const Tensor *t = checkpoint_find(ck, "in.t");
    memset(in, 0, sizeof *in);
    if (!t || t->size > 64) return err("in.t is missing or too long");
    in->B = t->size;
    TRY(take_ints(&in->x, ck, "in.x", in->B * N));
    TRY(take_ints(&in->x_t, ck, "in.x_t", in->B * N));
    TRY(take_ints(&in->t, ck, "in.t", in->B));
    return checkpoint_find(ck, "in.label") ? take_ints(&in->label, ck, "in.label", in->B) : OK;
}

static Err compare(const char *what, const Checkpoint *ck, const char *name, const real *got, size_t n, double took) {
    real *expected;
    double largest = 0, error = 0;
    TRY(mem_alloc(&expected, n, sizeof *expected, name));
    Err e = checkpoint_reals(ck, name, -1, NULL, n, expected);
    for (size_t i = 0; e == OK && i < n && error == error; i++) {
        double d = fabs((double)got[i] - (double)expected[i]);
        if (!(d <= error)) error = d; /* also taken when d is NaN */
        largest = fmax(largest, fabs((double)expected[i]));
    }
    free(expected);
    TRY(e);
    const int ok = test_note(error <= TOLERANCE * largest, __FILE__, __LINE__, what);
    printf("%-4s %-8s %8zu numbers up to %6.2f, largest error %.1e of that, %.1f s\n", ok ? "ok" : "FAIL", what, n,
           largest, error / largest, took);
    return OK;
}

/* t: 0 for all scales of a joint model */
static Err compare_logits(Model *m, const Checkpoint *ck, const Input *in, int t) {
    const real *logits;
    char what[32] = "joint";
    const size_t N = m->h * m->w;
    const double began = clock_seconds();
    if (t) snprintf(what, sizeof what, "scale %d", t);
    TRY(model_scale(m, t ? t : 1));
    TRY(transformer_plan(m->net, in->B, N, 0));
    TRY(transformer_forward(m->net, in->x, in->x_t, in->t, in->label, in->B, N, &logits));
    return compare(what, ck, "out.logits", logits, in->B * N * m->K, clock_seconds() - began);
}

static Err compare_picture(Model *m, const Checkpoint *ck, const Input *in) {
    real *image;
    const size_t pixels = 3 * m->side * m->side;
    const double began = clock_seconds();
    TRY(mem_alloc(&image, pixels, sizeof *image, "a picture"));
    Err e = vqgan_plan(m->vqgan, 1, m->side, m->side, 0);
    if (e == OK) e = vqgan_decode_tokens(m->vqgan, in->x, 1, m->h, m->w, image);
    if (e == OK) e = compare("picture", ck, "out.image", image, pixels, clock_seconds() - began);
    free(image);
    return e;
}

static Err compare_scale(Model *m, int t) {
    char path[PATH_BYTES], name[32] = "joint";
    Checkpoint ck = {0};
    Input in;
    if (t) snprintf(name, sizeof name, "scale%d", t);
    TRY(path_make(path, "%s/%s.logits.safetensors", m->folder, name));
    TRY(checkpoint_open(&ck, path));
    Err e = input_read(&in, &ck, m->h * m->w);
    if (e == OK) e = compare_logits(m, &ck, &in, t);
    if (e == OK && checkpoint_find(&ck, "out.image")) e = compare_picture(m, &ck, &in);
    input_free(&in);
    checkpoint_close(&ck);
    return e == OK ? OK : err_in(path);
}

static int compare_model(const char *name) {
    Model m;
    const double began = clock_seconds();
    CHECK_OK(model_open(&m, name, NULL));
    if (test_failed) return test_report();
    printf("%s opened in %.2f s\n", name, clock_seconds() - began);
    if (m.joint) CHECK_OK(compare_scale(&m, 0));
    for (int t = 1; !m.joint && t <= m.schedule.T; t++) CHECK_OK(compare_scale(&m, t));
    model_close(&m);
    return test_report();
}

static int run_below(double mib, char **command) {
    int status = 0;
    struct rusage use;
    const double began = clock_seconds();
    const pid_t child = fork();
    if (child == 0) {
        execvp(command[0], command);
        perror(command[0]);
        _exit(127);
    }
    if (!CHECK(child > 0 && wait4(child, &status, 0, &use) == child)) return test_report();
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    const double peak = (double)use.ru_maxrss / 1024;
    const int ok = CHECK(peak < mib);
    printf("%-4s %s: peak memory %.0f MiB, limit %.0f MiB; %.1f s\n", ok ? "ok" : "FAIL", command[0], peak, mib,
           clock_seconds() - began);
    return test_report();
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc == 2 && argv[1][0] != '-') return compare_model(argv[1]);
    if (argc >= 4 && !strcmp(argv[1], "--peak") && atof(argv[2]) > 0) return run_below(atof(argv[2]), argv + 3);
    fprintf(stderr, "usage: fullsize MODEL | fullsize --peak MIB COMMAND...\n");
    return 2;
}
