/* cli.c - what the three programs share: one table of options, one way to fail, progress, pictures in a terminal.
 *
 * This is the only file besides the programs that prints or exits. Results go to stdout, everything else to stderr. */
#include "imagebart.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

/* ---- failing ---- */

static const char *program_name = "imagebart";
static int line_open; /* a progress line stands on the terminal and wants a newline first */

static void fail(int status, const char *fmt, va_list args) {
    progress_end();
    fprintf(stderr, "%s: ", program_name);
    vfprintf(stderr, fmt, args);
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

static int looked_for_gpu; /* and found none */

int check_device(const char *device) {
    if (!device) device = getenv("IMAGEBART_DEVICE");
    if (!device) {
        const int found = cuda_built() && cuda_find(NULL, NULL, NULL) == OK;
        looked_for_gpu = !found;
        return found;
    }
    if (!strcmp(device, "cpu")) return 0;
    if (strcmp(device, "cuda") != 0) usage_error("--device %s: expected cpu or cuda", device);
    check(cuda_find(NULL, NULL, NULL));
    return 1;
}

void say_cpu(void) {
    if (cuda_built())
        fprintf(stderr, "device: CPU%s\n",
                looked_for_gpu ? ", for no usable GPU was found (--device cuda says why)"
                               : " (--device cuda: the GPU)");
}

/* ---- options ---- */

static void print_help(const Option *table, const char *intro) {
    printf("%s", intro);
    for (const Option *o = table; o->kind != OPT_END; o++) {
        char left[64];
        if (o->kind == OPT_HEADING) {
            printf("\n%s\n", o->name);
            continue;
        }
        snprintf(left, sizeof left, "%s%s%s", o->name, o->value ? " " : "", o->value ? o->value : "");
        printf("  %-24s", left);
        if (strlen(left) > 23) printf("\n  %-24s", "");
        for (const char *c = o->help; *c; c++) {
            putchar(*c);
            if (*c == '\n') printf("  %-24s", "");
        }
        printf("\n");
    }
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

static void set_argument(const Option *table, int nth, const char *text) {
    for (const Option *o = table; o->kind != OPT_END; o++)
        if (o->kind == OPT_ARGUMENT && nth-- == 0) {
            *(const char **)o->out = text;
            return;
        }
    usage_error("unexpected argument \"%s\"; -h explains", text);
}

/* The row named by argv[*i], either "--name value" or "--name=value"; sets it and moves on. */
static void set_option(const Option *table, int argc, char **argv, int *i) {
    const char *text = argv[*i], *equals = strchr(text, '=');
    size_t length = equals ? (size_t)(equals - text) : strlen(text);
    const Option *o = table;
    while (o->kind != OPT_END && (o->kind == OPT_HEADING || o->kind == OPT_ARGUMENT || strlen(o->name) != length ||
                                  strncmp(o->name, text, length)))
        o++;
    if (o->kind == OPT_END) usage_error("unknown option %.*s; -h lists them", (int)length, text);
    if (o->kind == OPT_FLAG) {
        if (equals) usage_error("%s takes no value", o->name);
        *(int *)o->out = 1;
        return;
    }
    if (!equals && *i + 1 >= argc) usage_error("%s needs a value: %s %s", o->name, o->name, o->value);
    const char *value = equals ? equals + 1 : argv[++*i];
    if (o->kind == OPT_STRING) {
        if (!*value) usage_error("%s: the value is empty", o->name);
        *(const char **)o->out = value;
    } else
        set_number(o, value);
}

void options_parse(int argc, char **argv, const Option *table, const char *intro) {
    const char *slash = strrchr(argv[0], '/');
    program_name = slash ? slash + 1 : argv[0];
    if (getenv("IMAGEBART_LEVEL")) /* start.c takes it away */
        usage_error("IMAGEBART_LEVEL: this program was compiled for one kind of processor, %s; \"make\" without MARCH "
                    "makes one that chooses, on x86-64",
                    vector_instructions());
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], "-h") || !strcmp(argv[i], "--help")) {
            print_help(table, intro);
            exit(fflush(stdout) ? 1 : 0);
        }
    for (int i = 1, arguments = 0; i < argc; i++) {
        if (argv[i][0] == '-' && argv[i][1])
            set_option(table, argc, argv, &i);
        else
            set_argument(table, arguments++, argv[i]);
    }
}

Err parse_per_scale(double *out, int T, const char *list, double lo, double hi, const char *option) {
    double value[MAX_SCALES];
    int n = 0;
    for (const char *p = list;; p++) {
        char *end;
        if (n == MAX_SCALES) return err("%s %s: more than %d values", option, list, MAX_SCALES);
        errno = 0;
        value[n] = strtod(p, &end);
        if (end == p || (*end && *end != ',') || errno || !isfinite(value[n]))
            return err("%s %s: expected numbers with commas between", option, list);
        if (value[n] < lo || value[n] > hi) return err("%s %s: %g is not in %g..%g", option, list, value[n], lo, hi);
        n++;
        p = end;
        if (!*p) break;
    }
    if (n != 1 && n != T)
        return err("%s %s: %d values; expected 1, or %d (one per scale, noisiest first)", option, list, n, T);
    for (int t = 1; t <= T; t++) out[t] = value[n == 1 ? 0 : T - t];
    return OK;
}

/* ---- progress ---- */

double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

const char *duration(char text[32], double s) {
    if (!(s >= 0 && s < 1e8))
        snprintf(text, 32, "?");
    else if (s >= 3600)
        snprintf(text, 32, "%d h %02d min", (int)(s / 3600), (int)(s / 60) % 60);
    else if (s >= 60)
        snprintf(text, 32, "%d min %02d s", (int)(s / 60), (int)s % 60);
    else
        snprintf(text, 32, "%.1f s", s);
    return text;
}

void progress_line(const char *fmt, ...) {
    static double last = -1e9;
    int terminal = isatty(2);
    double now = seconds();
    if (now - last < (terminal ? 0.1 : 10)) return;
    last = now;
    va_list args;
    va_start(args, fmt);
    if (terminal) fprintf(stderr, "\r\033[K");
    vfprintf(stderr, fmt, args);
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

static const int interrupts[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1}; /* mpirun hands on SIGUSR1 to what it started */
enum { INTERRUPTS = sizeof interrupts / sizeof *interrupts };

static void on_interrupt(int number) {
    (void)number;
    interrupt_flag = 1;
    for (int i = 0; i < INTERRUPTS; i++) /* a second one, whichever, acts as usual: it ends the program */
        signal(interrupts[i], SIG_DFL);
}

void catch_interrupts(void) {
    struct sigaction action, before;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_interrupt;
    action.sa_flags = SA_RESTART;
    sigfillset(&action.sa_mask); /* the second comes after the handler of the first, never into it */
    for (int i = 0; i < INTERRUPTS && !interrupt_flag; i++) {
        sigaction(interrupts[i], NULL, &before);
        if (interrupts[i] == SIGHUP && before.sa_handler == SIG_IGN) continue; /* nohup */
        sigaction(interrupts[i], &action, NULL);
    }
}

int interrupted(void) {
    return interrupt_flag;
}

/* ---- pictures in a terminal ---- */

static int env_has(const char *name, const char *part) {
    const char *value = getenv(name);
    return value && strstr(value, part);
}

static Err read_file(const char *path, unsigned char **bytes, size_t *n) {
    FILE *f = fopen(path, "rb");
    if (!f) return err("%s: %s", path, strerror(errno));
    long size = fseek(f, 0, SEEK_END) ? -1 : ftell(f);
    Err e = size < 0 ? err("%s: not a plain file", path) : mem_alloc(bytes, (size_t)size, 1, path);
    if (e == OK && (fseek(f, 0, SEEK_SET) || fread(*bytes, 1, (size_t)size, f) != (size_t)size)) {
        free(*bytes);
        e = err("%s: could not be read", path);
    }
    fclose(f);
    *n = (size_t)size;
    return e;
}

static void put_base64(const unsigned char *p, size_t n) {
    static const char digit[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < n; i += 3) {
        unsigned v = (unsigned)p[i] << 16 | (i + 1 < n ? (unsigned)p[i + 1] << 8 : 0) | (i + 2 < n ? p[i + 2] : 0);
        putchar(digit[v >> 18]);
        putchar(digit[v >> 12 & 63]);
        putchar(i + 1 < n ? digit[v >> 6 & 63] : '=');
        putchar(i + 2 < n ? digit[v & 63] : '=');
    }
}

/* Kitty graphics protocol: PNG data (f=100) in chunks of at most 4096 base64 digits. */
static void show_kitty(const unsigned char *png, size_t n) {
    enum { CHUNK = 3072 };
    for (size_t at = 0; at < n; at += CHUNK) {
        size_t size = n - at < CHUNK ? n - at : CHUNK;
        printf("\033_G%sm=%d;", at ? "" : "f=100,a=T,", at + size < n);
        put_base64(png + at, size);
        printf("\033\\");
    }
    printf("\n");
}

static void show_iterm(const unsigned char *png, size_t n) {
    printf("\033]1337;File=inline=1;size=%zu:", n);
    put_base64(png, n);
    printf("\a\n");
}

/* Two pixels a character cell: the upper one in the foreground colour of a half block, the lower behind it. */
static Err show_blocks(const char *path) {
    Image full = {0}, small = {0};
    struct winsize window;
    size_t columns = ioctl(1, TIOCGWINSZ, &window) == 0 && window.ws_col ? window.ws_col : 80;
    TRY(image_read(&full, path));
    size_t W = full.W < columns ? full.W : columns, H = full.H * W / full.W;
    H += H < 2 ? 2 - H : H % 2;
    Err e = image_resize(&small, &full, H, W, FILTER_BICUBIC);
    for (size_t y = 0; e == OK && y < H; y += 2) {
        for (size_t x = 0; x < W; x++) {
            const unsigned char *a = small.rgb + 3 * (y * W + x), *b = a + 3 * W;
            printf("\033[38;2;%d;%d;%dm\033[48;2;%d;%d;%dm\xe2\x96\x80", a[0], a[1], a[2], b[0], b[1], b[2]);
        }
        printf("\033[0m\n");
    }
    image_free(&full);
    image_free(&small);
    return e;
}

Err show_png(const char *path) {
    int kitty = getenv("KITTY_WINDOW_ID") || env_has("TERM", "kitty") || env_has("TERM_PROGRAM", "ghostty");
    int iterm =
        env_has("TERM_PROGRAM", "iTerm") || env_has("LC_TERMINAL", "iTerm2") || env_has("TERM_PROGRAM", "WezTerm");
    if (!kitty && !iterm) return show_blocks(path);
    unsigned char *png = NULL;
    size_t n = 0;
    TRY(read_file(path, &png, &n));
    if (kitty)
        show_kitty(png, n);
    else
        show_iterm(png, n);
    free(png);
    fflush(stdout);
    return OK;
}

/* ---- sampling from the command line ---- */

void sampling_start(SamplingArgs *a, Model *m, const NamedModel **stand_in_for) {
    static const char *const formats[] = {"f32", "bf16", "int8"};
    size_t format = 0;
    while (a->weights && format < 3 && strcmp(a->weights, formats[format]) != 0) format++;
    if (format == 3) usage_error("--weights %s: expected f32, bf16 or int8", a->weights);
    const int cuda = check_device(a->device);
    if (cuda && format == WEIGHTS_INT8) usage_error("--weights int8 is for --device cpu; on a GPU f32 or bf16");
    threads_set((int)a->threads);
    check(model_open(m, a->model, stand_in_for));
    m->no_ema = a->no_ema;
    m->weights = (WeightFormat)format;
    if (cuda) check(model_use_cuda(m));
    if (a->seed == SEED_NOT_GIVEN) a->seed = (uint64_t)time(NULL);
    const NamedModel *missing = *stand_in_for;
    if (!missing) return;
    fprintf(stderr,
            "%s: the official weights of %s (%s) are not here; \"make %s\" fetches them.\n"
            "Going on with the bundled model, emoji%s%s.\n",
            program_name, missing->name, missing->what, missing->name,
            missing->stand_in && !a->class_name ? ", class " : "",
            missing->stand_in && !a->class_name ? missing->stand_in : "");
    if (!a->class_name) a->class_name = missing->stand_in;
}

/* One line: which GPU, how exact, what goes there; dies if that does not fit. */
static void say_gpu(const Model *m, const ModelMemory *need) {
    char text[CUDA_TEXT_BYTES], first[32], weights[32], plan[32], there[32], what[256];
    size_t available = 0;
    check(cuda_find(text, &available, NULL));
    available += need->gpu_first_stage; /* which is there already */
    bytes_text(first, need->gpu_first_stage), bytes_text(weights, need->gpu_scale),
        bytes_text(plan, need->gpu_activations);
    snprintf(what, sizeof what, "GPU: first stage %s, largest scale %s, activations %s", first, weights, plan);
    check(memory_fits(need->gpu_first_stage + need->gpu_scale + need->gpu_activations, available, what,
                      "a smaller --batch takes less"));
    fprintf(stderr, "device: %s; in %s\n", text,
            m->weights == WEIGHTS_BF16 ? "bf16 (--device cpu: the processor)"
                                       : "f32 (--weights bf16 is faster; --device cpu: the processor)");
    fprintf(stderr, "GPU memory: first stage %s, largest scale %s, activations %s; %s free\n", first, weights, plan,
            bytes_text(there, available));
}

void sampling_memory(Model *m, size_t batch, size_t pictures) {
    ModelMemory need;
    char first[32], scale[32], rest[32], there[32], what[2048];
    size_t available = memory_available();
    check(model_memory(m, batch, pictures, &need));
    bytes_text(first, need.first_stage), bytes_text(scale, need.scale), bytes_text(rest, need.activations);
    snprintf(what, sizeof what, "%s: first stage %s, largest scale %s, activations and pictures %s", m->folder, first,
             scale, rest);
    check(memory_fits(need.total, available, what, "a smaller --batch or -n takes less"));
    fprintf(stderr, "memory: first stage %s, largest scale %s, activations and pictures %s; ", first, scale, rest);
    fprintf(stderr, "%s available\n", available == SIZE_MAX ? "unknown how much is" : bytes_text(there, available));
    fprintf(stderr, "processor: %s, %d threads\n", vector_instructions(), threads_get());
    if (m->cuda)
        say_gpu(m, &need);
    else
        say_cpu();
}

/* The user's list, else what the model's file recommends, else `otherwise`. */
static void per_scale(double *out, const Model *m, const char *given, const char *key, const char *otherwise, double lo,
                      double hi, const char *option) {
    const char *recommended = config_get(&m->meta, "imagebart.", key);
    const char *list = given ? given : recommended ? recommended : otherwise;
    if (parse_per_scale(out, m->schedule.T, list, lo, hi, option) != OK) usage_error("%s", err_text());
}

static void per_scale_sizes(size_t *out, const Model *m, const char *given, const char *key, const char *otherwise,
                            double lo, double hi, const char *option) {
    double number[MAX_SCALES + 1] = {0};
    per_scale(number, m, given, key, otherwise, lo, hi, option);
    for (int t = 1; t <= m->schedule.T; t++) {
        if (number[t] != floor(number[t])) usage_error("%s: %g is not a whole number", option, number[t]);
        out[t] = (size_t)number[t];
    }
}

void sampling_options(SampleOptions *o, const SamplingArgs *a, const Model *m, const char *chain_key,
                      const char *chain_default, double least_chain) {
    sample_defaults(o, m);
    o->seed = a->seed;
    o->block = a->block;
    o->official_temperature = a->official_temperature;
    per_scale(o->temperature, m, a->temperature, "temperature", "1", 0, 1000, "--temperature");
    per_scale(o->guidance, m, a->guidance, "guidance", "1", 0, 1000, "--guidance");
    per_scale_sizes(o->top_k, m, a->top_k, "top_k", "0", 0, 1e9, "--top-k");
    per_scale_sizes(o->chain, m, a->chain_length, chain_key, chain_default, least_chain, 1000, "--chain-length");
}

int sampling_progress(void *context, int t, size_t repeat, size_t done, size_t of) {
    static double started;
    static int last_t;
    static size_t last_repeat, first, last;
    const SampleOptions *o = context;
    size_t M = o->candidates;
    if (t != last_t || repeat != last_repeat || done < last) started = seconds(), first = done;
    last_t = t, last_repeat = repeat, last = done;
    char left[32], pass[48] = "";
    double rate = done > first ? (double)(done - first) / (seconds() - started) : 0;
    if (o->chain[t] > 1) snprintf(pass, sizeof pass, ", pass %zu of %zu", repeat + 1, o->chain[t]);
    duration(left, rate > 0 ? (double)(of - done) / rate : NAN);
    progress_line("samples %llu to %llu: scale %d%s, token %zu of %zu, %.0f tokens/s, %s left in this scale",
                  (unsigned long long)(o->first / M + 1), (unsigned long long)((o->first + o->n) / M), t, pass, done,
                  of, rate * (double)o->n, left);
    return interrupted();
}

void say_drafts(const DraftCounts *counts, int T) {
    for (int t = T; t >= 1; t--) {
        const DraftCounts *n = &counts[t];
        if (n->passes == 0) continue;
        fprintf(stderr, "scale %d: %zu tokens in %zu passes, %.1f in each, over %zu positions", t, n->tokens, n->passes,
                (double)n->tokens / (double)n->passes, n->cells);
        if (n->tried > 0)
            fprintf(stderr, "; %.0f%% of the drawn ones were as guessed", 100 * (double)n->right / (double)n->tried);
        fprintf(stderr, "\n");
    }
}

/* "1,0.9,0.8", noisiest first. */
static Err text_per_scale(Config *text, const char *key, const SampleOptions *o, int T, int what) {
    char list[MAX_SCALES * 24];
    size_t at = 0;
    for (int t = T; t >= 1; t--) {
        double x = what == 0   ? o->temperature[t]
                   : what == 3 ? o->guidance[t]
                               : (double)(what == 1 ? o->top_k[t] : o->chain[t]);
        at += (size_t)snprintf(list + at, sizeof list - at, "%s%.9g", t < T ? "," : "", x);
    }
    return config_set(text, key, "%s", list);
}

Err sampling_text(Config *text, const SamplingArgs *a, const SampleOptions *o, const Model *m) {
    TRY(config_set(text, "Software", "imagebart.c"));
    TRY(config_set(text, "model", "%s", m->folder));
    TRY(config_set(text, "seed", "%llu", (unsigned long long)a->seed));
    if (a->class_name) TRY(config_set(text, "class", "%s", a->class_name));
    TRY(text_per_scale(text, "temperature", o, m->schedule.T, 0));
    TRY(text_per_scale(text, "top-k", o, m->schedule.T, 1));
    TRY(text_per_scale(text, "chain-length", o, m->schedule.T, 2));
    if (sample_rows(o, m, 1) > 1) TRY(text_per_scale(text, "guidance", o, m->schedule.T, 3));
    if (m->weights != WEIGHTS_REAL) TRY(config_set(text, "weights", "%s", a->weights));
    return a->official_temperature ? config_set(text, "official-temperature", "true") : OK;
}

Err decode_pictures(Model *m, const int32_t *tokens, size_t n, real *images) {
    size_t N = m->h * m->w, pixels = 3 * m->side * m->side;
    const size_t batch = decode_batch(m, n);
    TRY(vqgan_plan(m->vqgan, batch, m->side, m->side, 0));
    for (size_t b = 0; b < n; b += batch) {
        TRY(vqgan_decode_tokens(m->vqgan, tokens + b * N, min_size(batch, n - b), m->h, m->w, images + b * pixels));
        progress_line("decoding picture %zu of %zu", b + 1, n);
    }
    progress_end();
    return OK;
}
