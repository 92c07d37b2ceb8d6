/* view.c - what a run looks like while it trains: RUN/loss.svg, which any browser shows, and TensorBoard's event
 * files.
 *
 * Both are drawn from log.tsv alone, by the names of its columns: what the log has, they have. TensorBoard's files lie
 * in RUN/events/STAGE, a folder for each stage, for TensorBoard takes a folder for one run with one count of steps:
 * curves of all stages then lie over each other, and starting one stage again does not purge the others.
 *
 * A picture of curves stays small however long the run: a line has at most a few hundred points, the smallest and the
 * largest of each stretch of steps.
 *
 * Read: the log; curves; the picture; protocol buffers; event files; what report.c calls. */
#include "training/stage.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* ------------------------------------------------------------------------------------------------------------
 * The log
 * ---------------------------------------------------------------------------------------------------------- */

enum { FIELDS = 48, NO_FIELD = -1 };
typedef struct {
    char text[2048];
    char *field[FIELDS];
    int n;
} Line;

/* The next whole line, cut at its tabs; 0: there is none. One that a kill cut short is none. */
static int read_line(Line *l, FILE *f) {
    if (!fgets(l->text, sizeof l->text, f)) return 0;
    char *end = strchr(l->text, '\n'), *p = l->text;
    if (!end) return 0;
    *end = 0;
    for (l->n = 0; p && l->n < FIELDS; l->n++) {
        l->field[l->n] = p;
        if ((p = strchr(p, '\t'))) *p++ = 0;
    }
    return 1;
}

static int find_field(const Line *header, const char *name) {
    for (int i = 0; i < header->n; i++)
        if (!strcmp(header->field[i], name)) return i;
    return NO_FIELD;
}

/* NAN where there is nothing */
static double number(const Line *l, int field) {
    return field >= 0 && field < l->n && *l->field[field] ? strtod(l->field[field], NULL) : (double)NAN;
}

/* *f, open at the line behind the header */
static Err open_log(FILE **f, Line *header, char path[PATH_BYTES], const Stage *s) {
    snprintf(path, PATH_BYTES, "%s/log.tsv", s->set.run);
    *f = fopen(path, "r");
    if (!*f) return err("%s: %s", path, strerror(errno));
    if (read_line(header, *f) && find_field(header, "stage") == 0 && find_field(header, "step") == 1) return OK;
    fclose(*f);
    return err("%s: the first line does not name the columns, expected stage, step, ...", path);
}

/* ------------------------------------------------------------------------------------------------------------
 * Curves
 * ---------------------------------------------------------------------------------------------------------- */

enum { LOSS, PART1, PART2, VAL, VAL_EMA, SERIES };
static const char *const column[SERIES] = {"loss", "hard_or_l1", "soft_or_l2", "val", "val_ema"};
static const char *const of_transition[SERIES] = {"loss", "hard", "soft", "validation", "validation, EMA"};
static const char *const of_vqgan[SERIES] = {"loss", "L1", "L2", "validation", "validation, EMA"};
static const char *const colour[SERIES] = {"#1f5fa8", "#2e8b57", "#d9822b", "#c0392b", "#c0392b"};

typedef struct {
    float step, y[SERIES]; /* NAN: not known at this step */
} Point;
typedef struct { /* a stage */
    char name[16];
    Point *point; /* (n), steps rise */
    size_t n, capacity;
    int drawn[SERIES];
} Curve;
enum { MAX_CURVES = MAX_SCALES + 2 };
typedef struct {
    Curve curve[MAX_CURVES];
    size_t n;
} Curves;

static Curve *find_curve(Curves *all, const char *name) {
    size_t i = 0;
    while (i < all->n && strcmp(all->curve[i].name, name)) i++;
    if (i == MAX_CURVES) return NULL;
    if (i == all->n) snprintf(all->curve[all->n++].name, sizeof all->curve->name, "%.15s", name);
    return &all->curve[i];
}

static Err add_line(Curves *all, const Line *l, const int field[SERIES]) {
    Curve *c = find_curve(all, l->field[0]);
    if (!c || l->n < 2) return OK;
    const float step = (float)number(l, 1);
    if (!(step >= 0 && step <= (float)UINT32_MAX)) return OK;   /* no step of ours */
    while (c->n > 0 && c->point[c->n - 1].step >= step) c->n--; /* these are repeated */
    TRY(mem_grow(&c->point, c->n, 1, &c->capacity, sizeof *c->point, "a curve"));
    Point *p = &c->point[c->n++];
    p->step = step;
    for (int k = 0; k < SERIES; k++) p->y[k] = (float)number(l, field[k]);
    return OK;
}

/* Is a series another one once more (loss = hard when alpha is 0; a VQGAN has no EMA)? */
static int same_series(const Curve *c, int k, int like) {
    size_t i = 0;
    while (i < c->n && !(fabsf(c->point[i].y[k] - c->point[i].y[like]) > 1e-5f * fabsf(c->point[i].y[like]))) i++;
    return i == c->n;
}

static int worth_drawing(const Curve *c, int k) {
    size_t i = 0;
    while (i < c->n && !isfinite(c->point[i].y[k])) i++;
    if (i == c->n || (k == PART2 && !strcmp(c->name, "vqgan"))) return 0;
    return k == LOSS || k == VAL || !same_series(c, k, k == VAL_EMA ? VAL : LOSS);
}

static Err read_curves(Curves *all, const Stage *s) {
    char path[PATH_BYTES];
    FILE *f;
    Line header, l;
    int field[SERIES];
    memset(all, 0, sizeof *all);
    TRY(open_log(&f, &header, path, s));
    for (int k = 0; k < SERIES; k++) field[k] = find_field(&header, column[k]);
    Err e = OK;
    while (e == OK && read_line(&l, f)) e = add_line(all, &l, field);
    e = close_lines(f, path, e);
    for (size_t i = 0; i < all->n; i++)
        for (int k = 0; k < SERIES; k++) all->curve[i].drawn[k] = worth_drawing(&all->curve[i], k);
    return e;
}

static void free_curves(Curves *all) {
    for (size_t i = 0; i < all->n; i++) free(all->curve[i].point);
}

/* ------------------------------------------------------------------------------------------------------------
 * The picture
 * ---------------------------------------------------------------------------------------------------------- */

enum { WIDTH = 900, LEFT = 62, RIGHT = 18, TOP = 44, PANEL = 300, PLOT = 220, HEAD = 40, STRETCHES = 300 };

typedef struct {
    AtomicFile file;
    Err e;
} Svg;

static void put(Svg *out, const char *fmt, ...) PRINTF_LIKE(2, 3);
static void put(Svg *out, const char *fmt, ...) {
    char text[512];
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    if (out->e == OK && n > 0) out->e = atomic_write(&out->file, text, min_size((size_t)n, sizeof text - 1));
}

static void put_escaped(Svg *out, const char *text) {
    for (; *text; text++)
        if (strchr("<>&\"", *text))
            put(out, "&#%d;", *text);
        else
            put(out, "%c", *text);
}

/* Where values lie on the paper */
typedef struct {
    double x0, x1, y0, y1; /* steps; values, their logarithms if log */
    int log;
    double top; /* of the plot */
} Axes;

static double x_of(const Axes *a, double step) {
    return LEFT + (step - a->x0) / (a->x1 - a->x0) * (WIDTH - LEFT - RIGHT);
}

static double y_of(const Axes *a, double value) {
    const double y = a->log ? log(value > 1e-30 ? value : 1e-30) : value;
    return a->top + (a->y1 - y) / (a->y1 - a->y0) * PLOT;
}

/* A mean that forgets: the last fiftieth of the run counts most; unbiased from its first value on. */
typedef struct {
    double sum, weight, keep;
} Smooth;

static double smooth(Smooth *m, float y) {
    if (!isfinite(y)) return m->weight > 0 ? m->sum / m->weight : (double)NAN;
    m->sum = m->keep * m->sum + (1 - m->keep) * (double)y;
    m->weight = m->keep * m->weight + (1 - m->keep);
    return m->sum / m->weight;
}

static Smooth smooth_of(const Curve *c) {
    const double span = (double)c->n / 50;
    return (Smooth){0, 0, span > 1 ? 1 - 1 / span : 0};
}

static void widen(Axes *a, double y) {
    if (!isfinite(y)) return;
    a->y0 = fmin(a->y0, y), a->y1 = fmax(a->y1, y);
}

/* Smoothed lines and validation fit in; single steps may leave the picture. Logarithmic from a factor of five on. */
static Axes axes_of(const Curve *c, double top) {
    Axes a = {(double)c->point[0].step - 1, (double)c->point[c->n - 1].step, HUGE_VAL, -HUGE_VAL, 0, top};
    for (int k = 0; k < SERIES; k++) {
        Smooth m = smooth_of(c);
        for (size_t i = 0; i < c->n && c->drawn[k]; i++)
            widen(&a, k < VAL ? smooth(&m, c->point[i].y[k]) : (double)c->point[i].y[k]);
    }
    if (!(a.y0 <= a.y1)) a.y0 = 0, a.y1 = 1; /* nothing finite */
    a.log = a.y0 > 0 && a.y1 > 5 * a.y0;
    if (a.log) a.y0 = log(a.y0), a.y1 = log(a.y1);
    const double range = a.y1 - a.y0, size = fmax(fabs(a.y0), fabs(a.y1));
    const double room = 0.05 * (range > 1e-5 * size ? range : size + 2e-5); /* what hardly moves is a line */
    a.y0 -= room, a.y1 += room;
    return a;
}

/* 1, 2 or 5 times a power of ten: about n of them in a range */
static double nice_step(double range, int n) {
    const double rough = range / n, power = pow(10, floor(log10(rough))), m = rough / power;
    return power * (m < 1.5 ? 1 : m < 3.5 ? 2 : m < 7.5 ? 5 : 10);
}

static void put_y_tick(Svg *out, const Axes *a, double value) {
    const double y = y_of(a, value);
    if (y < a->top - 0.5 || y > a->top + PLOT + 0.5) return;
    put(out, "<path class=\"grid\" d=\"M%d %.1fH%d\"/><text x=\"%d\" y=\"%.1f\" class=\"end\">%.6g</text>\n", LEFT, y,
        WIDTH - RIGHT, LEFT - 6, y + 4, value);
}

static void put_x_tick(Svg *out, const Axes *a, double x) {
    if (x > a->x1 + 1e-9) return;
    put(out, "<path class=\"grid\" d=\"M%.1f %.1fv%d\"/><text x=\"%.1f\" y=\"%.1f\" class=\"mid\">%.10g</text>\n",
        x_of(a, x), a->top, PLOT, x_of(a, x), a->top + PLOT + 16, x);
}

/* Ticks are counted in whole numbers, and there are few, whatever the values are. */
static void put_axes(Svg *out, const Axes *a) {
    enum { TICKS = 24, DECADES = 100 };
    const double step = fmax(nice_step(a->x1 - a->x0, 8), 1), lo = a->log ? exp(a->y0) : a->y0,
                 hi = a->log ? exp(a->y1) : a->y1, each = nice_step(hi - lo, 5);
    const double x = ceil(a->x0 / step), y = ceil(lo / each), power = a->log ? floor(log10(lo)) : 0;
    for (int i = 0; i < TICKS; i++) put_x_tick(out, a, (x + i) * step);
    for (int i = 0; i < TICKS && !a->log; i++) put_y_tick(out, a, (y + i) * each);
    for (int i = 0; i < DECADES && a->log; i++)
        for (int k = 1; k <= 5; k += k == 1 ? 1 : 3) put_y_tick(out, a, k * pow(10, power + i));
    put(out, "<rect class=\"frame\" x=\"%d\" y=\"%.1f\" width=\"%d\" height=\"%d\"/>\n", LEFT, a->top,
        WIDTH - LEFT - RIGHT, PLOT);
    put(out, "<text x=\"%d\" y=\"%.1f\" class=\"end\">step</text>\n", WIDTH - RIGHT, a->top + PLOT + 30);
}

/* Which stretch of the steps a point is in */
static int stretch(const Curve *c, size_t i) {
    const double first = (double)c->point[0].step, last = (double)c->point[c->n - 1].step;
    return (int)(((double)c->point[i].step - first) / (last - first + 1) * STRETCHES);
}

static void put_point(Svg *out, const Axes *a, double step, double y, int *started) {
    if (!isfinite(y)) return;
    const double at = fmin(fmax(y_of(a, y), -9999), 9999); /* what is outside is clipped */
    put(out, "%s%.1f %.1f", *started ? " " : "M", x_of(a, step), at);
    *started = 1;
}

/* The loss of single steps: the smallest and the largest of each stretch, in the order they came */
static void put_raw(Svg *out, const Curve *c, const Axes *a) {
    int started = 0;
    put(out, "<path class=\"raw\" d=\"");
    for (size_t i = 0, end; i < c->n; i = end) {
        size_t lo = i, hi = i;
        for (end = i; end < c->n && stretch(c, end) == stretch(c, i); end++) {
            if (c->point[end].y[LOSS] < c->point[lo].y[LOSS]) lo = end;
            if (c->point[end].y[LOSS] > c->point[hi].y[LOSS]) hi = end;
        }
        const Point *p = &c->point[lo < hi ? lo : hi], *q = &c->point[lo < hi ? hi : lo];
        put_point(out, a, (double)p->step, (double)p->y[LOSS], &started);
        if (p != q) put_point(out, a, (double)q->step, (double)q->y[LOSS], &started);
    }
    put(out, "\"/>\n");
}

static void put_smooth(Svg *out, const Curve *c, const Axes *a, int k) {
    Smooth m = smooth_of(c);
    int started = 0;
    put(out, "<path class=\"line\" stroke=\"%s\" d=\"", colour[k]);
    for (size_t i = 0; i < c->n; i++) {
        const double y = smooth(&m, c->point[i].y[k]);
        if (i == 0 || i + 1 == c->n || stretch(c, i) != stretch(c, i + 1))
            put_point(out, a, (double)c->point[i].step, y, &started);
    }
    put(out, "\"/>\n");
}

static void put_mark(Svg *out, double x, double y, int k, double radius) {
    put(out, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"%g\" stroke=\"%s\" fill=\"%s\"/>", x, y, radius, colour[k],
        k == VAL_EMA ? colour[k] : "#fff");
}

/* The last evaluation in a stretch */
static void put_validation(Svg *out, const Curve *c, const Axes *a, int k) {
    for (size_t i = 0, next; i < c->n; i = next) {
        for (next = i + 1; next < c->n && !isfinite(c->point[next].y[k]);) next++;
        if (!isfinite(c->point[i].y[k]) || (next < c->n && stretch(c, next) == stretch(c, i))) continue;
        put_mark(out, x_of(a, (double)c->point[i].step), y_of(a, (double)c->point[i].y[k]), k, 2.5);
    }
    put(out, "\n");
}

/* A transition's loss that is the hard or the soft one alone says so. */
static const char *series_name(const Curve *c, int k) {
    if (!strcmp(c->name, "vqgan")) return of_vqgan[k];
    if (k == LOSS && same_series(c, PART1, LOSS)) return "loss = hard";
    if (k == LOSS && same_series(c, PART2, LOSS)) return "loss = soft";
    return of_transition[k];
}

static void put_legend(Svg *out, const Curve *c, double y) {
    double x = WIDTH - RIGHT;
    if (strcmp(c->name, "vqgan")) put(out, "<text x=\"%d\" y=\"%.1f\">nats per token</text>\n", LEFT, y);
    for (int k = SERIES - 1; k >= 0; k--) {
        if (!c->drawn[k]) continue;
        const char *name = series_name(c, k);
        x -= 30 + 6.6 * (double)strlen(name);
        put(out, "<text x=\"%.1f\" y=\"%.1f\">%s</text>", x + 14, y, name);
        if (k >= VAL)
            put_mark(out, x + 5, y - 4, k, 3);
        else
            put(out, "<path class=\"line\" stroke=\"%s\" d=\"M%.1f %.1fh10\"/>", colour[k], x, y - 4);
        put(out, "\n");
    }
}

static void put_title(Svg *out, const Curve *c, double y) {
    const int k = c->drawn[VAL_EMA] ? VAL_EMA : VAL;
    const Point *best = NULL, *last = &c->point[c->n - 1];
    for (size_t i = 0; i < c->n; i++)
        if (isfinite(c->point[i].y[k]) && (!best || c->point[i].y[k] < best->y[k])) best = &c->point[i];
    put(out, "<text x=\"%d\" y=\"%.1f\"><tspan font-weight=\"bold\">", LEFT, y);
    put_escaped(out, c->name);
    put(out, "</tspan> step %.10g, loss %.4g", (double)last->step, (double)last->y[LOSS]);
    if (best) put(out, ", best validation %.4g at step %.10g", (double)best->y[k], (double)best->step);
    put(out, "</text>\n");
}

static void put_panel(Svg *out, const Curve *c, size_t number_of_panel) {
    const double top = HEAD + (double)number_of_panel * PANEL;
    const Axes a = axes_of(c, top + TOP);
    put_title(out, c, top + 18);
    put_legend(out, c, top + 36);
    put_axes(out, &a);
    put(out, "<clipPath id=\"p%zu\"><rect x=\"%d\" y=\"%.1f\" width=\"%d\" height=\"%d\"/></clipPath>", number_of_panel,
        LEFT, a.top, WIDTH - LEFT - RIGHT, PLOT);
    put(out, "<g clip-path=\"url(#p%zu)\">\n", number_of_panel);
    put_raw(out, c, &a);
    for (int k = VAL - 1; k >= LOSS; k--)
        if (c->drawn[k]) put_smooth(out, c, &a, k);
    for (int k = VAL; k < SERIES; k++)
        if (c->drawn[k]) put_validation(out, c, &a, k);
    put(out, "</g>\n");
}

static const char style[] =
    "<style>text{font:12px sans-serif;fill:#333}.end{text-anchor:end}.mid{text-anchor:middle}"
    "path,.frame{fill:none;stroke-width:1}.grid{stroke:#e6e6e6}.frame{stroke:#999}.raw{stroke:#bcd2ea;stroke-width:.7}"
    ".line{stroke-width:1.6;stroke-linejoin:round}circle{stroke-width:1.2}</style>\n";

static void put_picture(Svg *out, const Curves *all, const char *run) {
    const size_t height = HEAD + all->n * PANEL + 8;
    put(out, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%zu\" viewBox=\"0 0 %d %zu\">\n", WIDTH,
        height, WIDTH, height);
    put(out, "%s<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n", style);
    put(out, "<text x=\"%d\" y=\"26\" style=\"font-size:17px\">", LEFT);
    put_escaped(out, run);
    put(out, "</text>\n");
    for (size_t i = 0; i < all->n; i++)
        if (all->curve[i].n) put_panel(out, &all->curve[i], i);
    put(out, "</svg>\n");
}

static Err draw_losses(const Stage *s) {
    char path[PATH_BYTES];
    Curves all;
    Svg out = {.e = OK};
    snprintf(path, sizeof path, "%s/loss.svg", s->set.run);
    Err e = read_curves(&all, s);
    if (e == OK) e = atomic_open(&out.file, path);
    if (e == OK) {
        put_picture(&out, &all, s->set.run);
        e = atomic_close(&out.file, out.e);
    }
    free_curves(&all);
    return e;
}

/* ------------------------------------------------------------------------------------------------------------
 * Protocol buffers: a message is a list of fields, each a key (number and wire type), then the value
 * ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    uint8_t *data;
    size_t n, capacity;
} Message;
enum { VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5 };

static Err append(Message *m, const void *data, size_t n) {
    TRY(mem_grow(&m->data, m->n, n, &m->capacity, 1, "an event"));
    if (n) memcpy(m->data + m->n, data, n);
    m->n += n;
    return OK;
}

/* Seven bits a byte, the lowest first; the top bit says that more follow. */
static Err append_varint(Message *m, uint64_t x) {
    uint8_t digit[10];
    size_t n = 0;
    for (; x >= 128; x >>= 7) digit[n++] = (uint8_t)(x | 128);
    digit[n++] = (uint8_t)x;
    return append(m, digit, n);
}

static Err put_integer(Message *m, unsigned field, uint64_t x) {
    TRY(append_varint(m, field << 3 | VARINT));
    return append_varint(m, x);
}

static Err put_double(Message *m, unsigned field, double x) {
    TRY(append_varint(m, field << 3 | FIXED64));
    return append(m, &x, sizeof x);
}

static Err put_float(Message *m, unsigned field, float x) {
    TRY(append_varint(m, field << 3 | FIXED32));
    return append(m, &x, sizeof x);
}

/* Strings and messages within messages */
static Err put_bytes(Message *m, unsigned field, const void *data, size_t n) {
    TRY(append_varint(m, field << 3 | BYTES));
    TRY(append_varint(m, n));
    return append(m, data, n);
}

/* ------------------------------------------------------------------------------------------------------------
 * Event files: records of a length, its checksum, an Event, its checksum (TFRecord); little-endian
 *
 * Event {1 wall_time, 2 step, 3 file_version, 5 summary {1 value {1 tag, 2 simple_value, 4 image {1 height, 2 width,
 * 3 colorspace, 4 encoded_image_string}}}, 7 session_log {1 status}}
 * ---------------------------------------------------------------------------------------------------------- */

/* CRC-32C (Castagnoli; zlib's is another polynomial), bit by bit: an event is a few hundred bytes */
static uint32_t crc32c(const void *data, size_t n) {
    const uint8_t *p = data;
    uint32_t crc = 0xffffffff;
    for (size_t i = 0; i < n; i++) {
        crc ^= p[i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78 : 0);
    }
    return ~crc;
}

/* Turned and moved, so that a checksum of data that holds checksums is a good one too */
static uint32_t masked_crc(const void *data, size_t n) {
    const uint32_t crc = crc32c(data, n);
    return (crc >> 15 | crc << 17) + 0xa282ead8;
}

static Err write_record(const View *v, const Message *m) {
    const uint64_t length = m->n;
    const uint32_t of_length = masked_crc(&length, sizeof length), of_data = masked_crc(m->data, m->n);
    Message record = {0};
    Err e = append(&record, &length, sizeof length);
    if (e == OK) e = append(&record, &of_length, sizeof of_length);
    if (e == OK) e = append(&record, m->data, m->n);
    if (e == OK) e = append(&record, &of_data, sizeof of_data);
    if (e == OK) e = file_append(v->path, record.data, record.n);
    free(record.data);
    return e;
}

/* An Event with one field beside time and step: bytes of a message or a string */
static Err write_event(const View *v, uint64_t step, unsigned field, const void *data, size_t n) {
    struct timespec now;
    Message event = {0};
    clock_gettime(CLOCK_REALTIME, &now);
    Err e = put_double(&event, 1, (double)now.tv_sec + 1e-9 * (double)now.tv_nsec);
    if (e == OK) e = put_integer(&event, 2, step);
    if (e == OK) e = put_bytes(&event, field, data, n);
    if (e == OK) e = write_record(v, &event);
    free(event.data);
    return e;
}
enum { FILE_VERSION = 3, SUMMARY = 5, SESSION_LOG = 7 };

/* Appends a value to a summary; *value is used and emptied. */
static Err add_value(Message *summary, Message *value) {
    Err e = put_bytes(summary, 1, value->data, value->n);
    value->n = 0;
    return e;
}

/* A column's name as TensorBoard shows it: hard_or_l1 is one of the two */
static const char *tag_of(char tag[64], const char *name, int vqgan) {
    const char *either = strstr(name, "_or_");
    if (either && vqgan)
        snprintf(tag, 64, "%s", either + 4);
    else
        snprintf(tag, 64, "%.*s", either ? (int)min_size((size_t)(either - name), 63) : 63, name);
    return tag;
}

/* All that the log says about a step: a scalar for each column */
static Err write_scalars(const View *v, const Stage *s, const Line *header, const Line *l) {
    Message summary = {0}, value = {0};
    char tag[64];
    Err e = OK;
    for (int i = 2; e == OK && i < l->n && i < header->n; i++) {
        if (!*l->field[i]) continue;
        tag_of(tag, header->field[i], s->set.vqgan);
        e = put_bytes(&value, 1, tag, strlen(tag));
        if (e == OK) e = put_float(&value, 2, (float)number(l, i));
        if (e == OK) e = add_value(&summary, &value);
    }
    if (e == OK) e = write_event(v, s->step, SUMMARY, summary.data, summary.n);
    free(value.data);
    free(summary.data);
    return e;
}

/* The line of the present step, which is among the last of the log */
static Err log_to_events(const Stage *s, const View *v) {
    enum { TAIL = 16384 };
    char path[PATH_BYTES], step[24];
    FILE *f;
    Line header, l;
    Err e = OK;
    TRY(open_log(&f, &header, path, s));
    const long behind = ftell(f);
    fseek(f, 0, SEEK_END);
    if (ftell(f) - behind > TAIL)
        fseek(f, -TAIL, SEEK_END), read_line(&l, f); /* it begins within a line */
    else
        fseek(f, behind, SEEK_SET);
    snprintf(step, sizeof step, "%llu", (unsigned long long)s->step);
    while (e == OK && read_line(&l, f))
        if (l.n > 2 && !strcmp(l.field[0], s->name) && !strcmp(l.field[1], step)) e = write_scalars(v, s, &header, &l);
    fclose(f);
    return e;
}

static uint32_t big_endian(const uint8_t *p) {
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

/* PNG files go in as they are; height and width stand in their first chunk. */
static Err write_image(const View *v, uint64_t step, const Message *png) {
    Message image = {0}, value = {0}, summary = {0};
    enum { RGB = 3 };
    Err e = png->n < 24 ? err("a PNG of %zu bytes", png->n) : put_integer(&image, 1, big_endian(png->data + 20));
    if (e == OK) e = put_integer(&image, 2, big_endian(png->data + 16));
    if (e == OK) e = put_integer(&image, 3, RGB);
    if (e == OK) e = put_bytes(&image, 4, png->data, png->n);
    if (e == OK) e = put_bytes(&value, 1, "picture", 7);
    if (e == OK) e = put_bytes(&value, 4, image.data, image.n);
    if (e == OK) e = add_value(&summary, &value);
    if (e == OK) e = write_event(v, step, SUMMARY, summary.data, summary.n);
    free(image.data);
    free(value.data);
    free(summary.data);
    return e;
}

/* Files are read in the order of their names: a later start has a later time in its name, and a name of its own. */
static Err open_events(const Stage *s, View *v) {
    char folder[PATH_BYTES], host[256] = "host";
    int fd = -1;
    snprintf(folder, sizeof folder, "%s/events/%s", s->set.run, s->name);
    TRY(make_folder(folder));
    gethostname(host, sizeof host - 1);
    time_t now = time(NULL);
    do {
        int n = snprintf(v->path, sizeof v->path, "%s/events.out.tfevents.%lld.%s", folder, (long long)now++, host);
        if (n < 0 || (size_t)n >= sizeof v->path) return err("%s: the path is too long", folder);
        fd = open(v->path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    } while (fd < 0 && errno == EEXIST);
    if (fd >= 0) close(fd);
    return fd >= 0 ? OK : io_error(v->path, "write");
}

/* ------------------------------------------------------------------------------------------------------------
 * What report.c calls
 * ---------------------------------------------------------------------------------------------------------- */

/* A start of the session at a step tells TensorBoard to forget what earlier files say about that step and later ones,
 * which are about to be repeated. */
Err view_open(Stage *s, void *view) {
    enum { START = 1 };
    static const char version[] = "brain.Event:2";
    View *v = view;
    Message session = {0};
    memset(v, 0, sizeof *v);
    if (s->step >= s->set.steps) return OK; /* nothing will be repeated, nor anything new */
    TRY(open_events(s, v));
    Err e = write_event(v, 0, FILE_VERSION, version, strlen(version));
    if (e == OK) e = put_integer(&session, 1, START);
    if (e == OK) e = write_event(v, s->step + 1, SESSION_LOG, session.data, session.n);
    free(session.data);
    return e;
}

Err view_step(Stage *s, void *view) {
    enum { EVERY = 10 };
    const View *v = view;
    if (v->evaluated || s->step % EVERY == 0 || s->step == s->set.steps) TRY(log_to_events(s, v));
    return v->evaluated && s->step < s->set.steps ? draw_losses(s) : OK;
}

Err view_picture(const Stage *s, View *v, const char *path) {
    Message png = {0};
    Err e = file_bytes(&png.data, &png.n, path, IMAGE_FILE_BYTES, NULL);
    if (e == OK && write_image(v, s->step, &png) != OK) e = err_in(path);
    free(png.data);
    return e;
}

Err view_close(Stage *s, void *view) {
    (void)view;
    return draw_losses(s);
}
