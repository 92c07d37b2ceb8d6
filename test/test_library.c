/* test_library.c - libimagebart.h from C: models that are used by several threads at the same time give what each gives
 * alone, and each thread has its own error text (make threads: under the thread sanitizer). */
#include "sampling/libimagebart.h"
#include "test.h"

#include <pthread.h>

enum { SIDE = 64, N = 64, COUNT = 2, USERS = 3, PIXELS = 3 * SIDE * SIDE };

#ifdef PLAIN
#define OTHER_WEIGHTS "f32" /* without kernels/ there are no others */
#else
#define OTHER_WEIGHTS "bf16"
#endif

/* Where several wait until all are there */
static struct {
    pthread_mutex_t lock;
    pthread_cond_t all_there;
    int wanted, there; /* there: since the beginning; the n-th meeting needs n times those wanted */
} meeting = {.lock = PTHREAD_MUTEX_INITIALIZER, .all_there = PTHREAD_COND_INITIALIZER};

static void meet(int nth) {
    pthread_mutex_lock(&meeting.lock);
    if (++meeting.there == nth * meeting.wanted) pthread_cond_broadcast(&meeting.all_there);
    while (meeting.there < nth * meeting.wanted) pthread_cond_wait(&meeting.all_there, &meeting.lock);
    pthread_mutex_unlock(&meeting.lock);
}

/* What a thread does with a model of its own, and what came out */
typedef struct {
    const char *weights;
    uint64_t seed;
    imagebart_model *model;
    uint8_t rgb[COUNT * PIXELS], edited[PIXELS], decoded[PIXELS];
    int32_t tokens[COUNT * N], encoded[N];
    size_t steps, told; /* told: pictures */
    int status, is_right;
    char error[128];
} User;

static int on_step(void *context, size_t scale, size_t done, size_t of) {
    User *u = context;
    if (u->steps++ == 0) meet(1); /* from here on all draw at once */
    u->is_right &= scale >= 1 && scale <= 3 && done <= of;
    return 0;
}

static int on_picture(void *context, const imagebart_picture *p) {
    User *u = context;
    u->is_right &= p->width == SIDE && p->height == SIDE && !p->alpha && p->label >= 0 && p->label < 9;
    u->is_right &= (p->scale > 0) == (p->entropy == NULL);
    u->told++;
    return 0;
}

static void *use(void *context) {
    User *u = context;
    char nowhere[64];
    static const uint8_t keep[SIDE * SIDE]; /* nothing */
    const imagebart_options o = {.bytes = sizeof o,
                                 .count = COUNT,
                                 .seed = u->seed,
                                 .class_name = "food",
                                 .chain_length = "1",
                                 .best_of = 1,
                                 .step = on_step,
                                 .picture = on_picture,
                                 .previews = 1,
                                 .guesses = 1,
                                 .user = u};
    imagebart_options one = o;
    one.count = 1, one.guesses = one.previews = 0, one.step = NULL, one.picture = NULL;
    u->steps = u->told = 0, u->is_right = 1;
    u->status = imagebart_sample(u->model, &o, u->rgb, u->tokens);
    if (u->steps == 0) meet(1); /* it failed */
    u->status |= imagebart_inpaint(u->model, &one, u->rgb, keep, u->edited, NULL);
    u->status |= imagebart_encode(u->model, u->rgb, 1, u->encoded);
    u->status |= imagebart_decode(u->model, u->tokens, 1, u->decoded);
    imagebart_model *none;
    snprintf(nowhere, sizeof nowhere, "nowhere-%llu", (unsigned long long)u->seed);
    u->is_right &= imagebart_open(&none, nowhere, NULL) == IMAGEBART_FAILED && !none;
    meet(2);
    snprintf(u->error, sizeof u->error, "%s", imagebart_error());
    u->is_right &= strstr(u->error, nowhere) != NULL;
    return NULL;
}

static void check_user(const User *u) {
    if (!CHECK(u->status == IMAGEBART_OK)) printf("     %s\n", u->error);
    CHECK(u->is_right);
    CHECK(u->told == COUNT * 4 && u->steps > COUNT);
    CHECK(!memcmp(u->rgb, u->decoded, PIXELS));
}

static void test_at_once(void) {
    static User alone[USERS] = {
        {.weights = "f32", .seed = 1}, {.weights = OTHER_WEIGHTS, .seed = 2}, {.weights = "f32", .seed = 3}};
    static User at_once[USERS];
    pthread_t thread[USERS];
    memcpy(at_once, alone, sizeof alone);
    for (int i = 0; i < USERS; i++) {
        CHECK_OK(imagebart_open_on(&alone[i].model, "models/emoji", alone[i].weights, "cpu"));
        CHECK_OK(imagebart_open_on(&at_once[i].model, "models/emoji", alone[i].weights, "cpu"));
        meeting.there = 0, meeting.wanted = 1;
        use(&alone[i]);
        check_user(&alone[i]);
    }
    meeting.there = 0, meeting.wanted = USERS;
    for (int i = 0; i < USERS; i++) CHECK(!pthread_create(&thread[i], NULL, use, &at_once[i]));
    for (int i = 0; i < USERS; i++) {
        CHECK(!pthread_join(thread[i], NULL));
        check_user(&at_once[i]);
        CHECK(!memcmp(alone[i].rgb, at_once[i].rgb, sizeof alone[i].rgb));
        CHECK(!memcmp(alone[i].edited, at_once[i].edited, PIXELS));
        CHECK(!memcmp(alone[i].tokens, at_once[i].tokens, sizeof alone[i].tokens));
        CHECK(!memcmp(alone[i].encoded, at_once[i].encoded, sizeof alone[i].encoded));
        CHECK(memcmp(alone[i].rgb, alone[(i + 1) % USERS].rgb, sizeof alone[i].rgb) != 0);
        imagebart_close(alone[i].model);
        imagebart_close(at_once[i].model);
    }
}

static void test_details(void) {
    imagebart_model *m;
    imagebart_shape s;
    imagebart_advice a, none;
    CHECK(imagebart_api() == IMAGEBART_API);
    CHECK_ERR(imagebart_open_on(&m, "models/emoji", NULL, "gpu"), "device gpu: expected cpu or cuda");
    CHECK_ERR(imagebart_open_on(&m, "models/emoji", "f64", "cpu"), "expected f32");
    CHECK_ERR(imagebart_open(&m, NULL, NULL), "no model was named");
    CHECK_OK(imagebart_open_on(&m, "models/emoji", NULL, "cpu"));
    imagebart_get_shape(m, &s);
    CHECK(s.side == SIDE && s.h * s.w == N && s.scales == 3 && s.classes == 9);
    CHECK(imagebart_class_name(m, 8) && *imagebart_class_name(m, 8) && !imagebart_class_name(m, 9));
    CHECK(!strcmp(imagebart_device(m), "CPU") && imagebart_memory(m) > 1 << 20);
    for (size_t t = 1; t <= s.scales; t++) {
        imagebart_get_advice(m, 0, t, &a);
        CHECK(a.temperature > 0 && a.guidance >= 1 && a.chain_length >= 1 && a.best_of >= 1);
    }
    imagebart_get_advice(m, 1, 1, &a);
    CHECK(a.best_of == 16);
    imagebart_get_advice(m, 1, 4, &none);
    CHECK(none.chain_length == 0);
    imagebart_close(m);
}

/* ---- A caller that was compiled for API 1 ---- */

static int never(void *user, size_t scale, size_t done, size_t of) {
    (void)user, (void)scale, (void)done, (void)of;
    CHECK(!"called, though the caller's options end before it");
    return 1;
}

static size_t passes, previews;

static int on_progress(void *user, size_t scale, size_t done, size_t of) {
    (void)user;
    passes += scale >= 1 && done <= of && of == N;
    return passes == *(size_t *)user;
}

static void on_preview(void *user, size_t picture, size_t scale, const uint8_t *rgb) {
    (void)user;
    previews += picture < COUNT && scale >= 1 && rgb;
}

static void test_api_1(void) {
    static uint8_t old[COUNT * PIXELS], new[COUNT * PIXELS];
    size_t stop = 0;
    imagebart_model *m;
    imagebart_options o = {.bytes = offsetof(imagebart_options, step),
                           .count = COUNT,
                           .chain_length = "1",
                           .best_of = 1,
                           .progress = on_progress,
                           .preview = on_preview,
                           .user = &stop,
                           .step = never,
                           .guesses = 1};
    CHECK_OK(imagebart_open_on(&m, "models/emoji", NULL, "cpu"));
    CHECK_OK(imagebart_sample(m, &o, old, NULL));
    CHECK(passes > 3 && previews == COUNT * 3);
    stop = passes + 2;
    CHECK(imagebart_sample(m, &o, old, NULL) == IMAGEBART_CANCELLED && !strcmp(imagebart_error(), "cancelled"));
    stop = 0;
    o.bytes = 0;
    CHECK_ERR(imagebart_sample(m, &o, old, NULL), "bytes is 0");
    o.bytes = sizeof o, o.step = NULL, o.preview = NULL, o.guesses = 0;
    CHECK_OK(imagebart_sample(m, &o, new, NULL));
    CHECK(!memcmp(old, new, sizeof old));
    imagebart_close(m);
}

/* ---- What is refused ---- */

#define CHECK_REFUSED(call, part)                                                                                      \
    do {                                                                                                               \
        if (!CHECK((call) == IMAGEBART_FAILED && strstr(imagebart_error(), (part))))                                   \
            printf("     error text: \"%s\"\n", imagebart_error());                                                    \
    } while (0)

static void test_null(imagebart_model *m) {
    static uint8_t rgb[PIXELS], keep[SIDE * SIDE];
    int32_t tokens[N];
    imagebart_shape s = {.side = 1};
    imagebart_advice a = {.best_of = 1};
    CHECK_REFUSED(imagebart_open(NULL, "models/emoji", NULL), "model is NULL");
    CHECK_REFUSED(imagebart_sample(NULL, NULL, rgb, NULL), "model is NULL");
    CHECK_REFUSED(imagebart_inpaint(NULL, NULL, rgb, keep, rgb, NULL), "model is NULL");
    CHECK_REFUSED(imagebart_complete(NULL, NULL, NULL), "model is NULL");
    CHECK_REFUSED(imagebart_encode(NULL, rgb, 1, tokens), "model is NULL");
    CHECK_REFUSED(imagebart_decode(NULL, tokens, 1, rgb), "model is NULL");
    imagebart_get_shape(NULL, &s), imagebart_get_advice(NULL, 0, 1, &a);
    CHECK(s.side == 0 && a.best_of == 0 && !imagebart_class_name(NULL, 0) && !imagebart_device(NULL));
    CHECK(imagebart_memory(NULL) == 0 && strstr(imagebart_error(), "model is NULL"));
    CHECK_REFUSED(imagebart_inpaint(m, NULL, NULL, keep, rgb, NULL), "there is no picture");
    CHECK_REFUSED(imagebart_inpaint(m, NULL, rgb, NULL, rgb, NULL), "there is no mask");
    CHECK_REFUSED(imagebart_complete(m, NULL, NULL), "there is no picture");
    CHECK_REFUSED(imagebart_encode(m, NULL, 1, tokens), "rgb is NULL");
    CHECK_REFUSED(imagebart_encode(m, rgb, 1, NULL), "tokens is NULL");
    CHECK_REFUSED(imagebart_decode(m, NULL, 1, rgb), "tokens is NULL");
    CHECK_REFUSED(imagebart_decode(m, tokens, 1, NULL), "rgb is NULL");
}

/* Sizes at which a version's struct ended are taken, and all from today's on. */
static void test_struct_sizes(imagebart_model *m) {
    char expected[96];
    imagebart_options o = {.class_name = "no such class", .count = 1};
    imagebart_edit e = {.half = "no such half", .image = {"", 1, 0, 0}};
    const size_t api_1 = offsetof(imagebart_options, step);
    for (o.bytes = 0; o.bytes < sizeof o + 9; o.bytes++) {
        const int is_known = o.bytes == api_1 || o.bytes >= sizeof o;
        snprintf(expected, sizeof expected, "imagebart_options.bytes is %zu; expected sizeof(imagebart_options): %zu",
                 o.bytes, sizeof o);
        CHECK_REFUSED(imagebart_sample(m, &o, NULL, NULL), is_known ? "no such class" : expected);
    }
    for (e.bytes = 0; e.bytes < sizeof e + 9; e.bytes++) {
        snprintf(expected, sizeof expected, "imagebart_edit.bytes is %zu; expected sizeof(imagebart_edit): %zu",
                 e.bytes, sizeof e);
        CHECK_REFUSED(imagebart_complete(m, NULL, &e), e.bytes >= sizeof e ? "no such half" : expected);
    }
}

/* Errors name fields, limits, and which of two files it is. */
static void test_texts(imagebart_model *m) {
    static const uint8_t none[SIDE * SIDE], pixels[PIXELS];
    imagebart_options o = {.bytes = sizeof o, .temperature = "1,x"};
    imagebart_edit e = {.bytes = sizeof e, .image = {"no file", 7, 0, 0}, .half = "left"};
    CHECK_REFUSED(imagebart_sample(m, &o, NULL, NULL), "temperature 1,x: expected numbers");
    CHECK(!strstr(imagebart_error(), "--"));
    o.temperature = NULL, o.chain_length = "-1";
    CHECK_REFUSED(imagebart_sample(m, &o, NULL, NULL), "chain_length -1: ");
    o.chain_length = NULL, o.best_of = 65;
    CHECK_REFUSED(imagebart_sample(m, &o, NULL, NULL), "best_of 65: expected 1 to 64");
    CHECK_REFUSED(imagebart_inpaint(m, NULL, pixels, none, NULL, NULL), "class_name names the class");
    CHECK(!strstr(imagebart_error(), "--"));
    CHECK_REFUSED(imagebart_complete(m, NULL, &e), "the picture: ");
    e.image = (imagebart_image){pixels, 0, SIDE, SIDE}, e.mask = (imagebart_image){"no file", 7, 0, 0}, e.half = NULL;
    CHECK_REFUSED(imagebart_complete(m, NULL, &e), "the mask: ");
    e.mask.data = NULL, e.extend = SIDE;
    CHECK_REFUSED(imagebart_complete(m, NULL, &e), "extend 64: ");
    CHECK(!strstr(imagebart_error(), "--"));
}

static void test_refused(void) {
    imagebart_model *m;
    CHECK_OK(imagebart_open_on(&m, "models/emoji", NULL, "cpu"));
    test_null(m);
    test_struct_sizes(m);
    test_texts(m);
    imagebart_close(m);
}

/* ---- A model at work ---- */

typedef struct {
    imagebart_model *model;
    size_t steps, at; /* at: the step at which it is called again */
    int closes;
} Again;

static void *call_again(void *context) {
    static uint8_t rgb[PIXELS], keep[SIDE * SIDE];
    int32_t tokens[N] = {0};
    imagebart_model *m = ((Again *)context)->model;
    CHECK_REFUSED(imagebart_sample(m, NULL, rgb, NULL), "this model is at work");
    CHECK_REFUSED(imagebart_inpaint(m, NULL, rgb, keep, rgb, NULL), "this model is at work");
    CHECK_REFUSED(imagebart_complete(m, NULL, NULL), "this model is at work");
    CHECK_REFUSED(imagebart_encode(m, rgb, 1, tokens), "this model is at work");
    CHECK_REFUSED(imagebart_decode(m, tokens, 1, rgb), "this model is at work");
    CHECK(imagebart_memory(m) == 0 && imagebart_device(m) && imagebart_class_name(m, 0));
    return NULL;
}

static int step_again(void *user, size_t scale, size_t done, size_t of) {
    Again *a = user;
    pthread_t thread;
    (void)scale, (void)done, (void)of;
    if (a->steps++ != a->at) return 0;
    call_again(a);
    CHECK(!pthread_create(&thread, NULL, call_again, a) && !pthread_join(thread, NULL));
    if (a->closes) imagebart_close(a->model), imagebart_close(a->model), call_again(a);
    return 0;
}

/* Calls from its own callback and from another thread are refused and change nothing; closed, it is freed at the end. */
static void test_at_work(void) {
    static uint8_t alone[PIXELS], rgb[PIXELS];
    Again a = {.at = SIZE_MAX};
    imagebart_options o = {
        .bytes = sizeof o, .seed = 5, .best_of = 1, .chain_length = "1", .step = step_again, .user = &a};
    CHECK_OK(imagebart_open_on(&a.model, "models/emoji", NULL, "cpu"));
    CHECK_OK(imagebart_sample(a.model, &o, alone, NULL));
    const size_t late = a.steps * 3 / 4, at[] = {0, late / 2, late}; /* how many steps there are differs a little */
    for (size_t i = 0; i < 3; i++) {
        a.steps = 0, a.at = at[i], a.closes = i == 2;
        memset(rgb, 0, sizeof rgb);
        CHECK_OK(imagebart_sample(a.model, &o, rgb, NULL));
        CHECK(a.steps > a.at && !memcmp(rgb, alone, sizeof rgb));
    }
}

/* ---- A model that works while another does ---- */

typedef struct {
    imagebart_model *other; /* that draws, encodes and decodes inside one step; NULL: none does */
    size_t steps, at, end;  /* at: that step; end: the one that cancels */
} Within;

static int step_of_other(void *user, size_t scale, size_t done, size_t of) {
    (void)scale, (void)done, (void)of;
    ++*(size_t *)user;
    return 0;
}

static int step_within(void *user, size_t scale, size_t done, size_t of) {
    static uint8_t rgb[PIXELS];
    Within *w = user;
    size_t own = 0;
    int32_t tokens[N];
    const imagebart_options o = {
        .bytes = sizeof o, .best_of = 1, .chain_length = "1", .step = step_of_other, .user = &own};
    (void)scale, (void)done, (void)of;
    if (++w->steps != w->at || !w->other) return w->steps == w->end;
    CHECK_OK(imagebart_sample(w->other, &o, rgb, tokens));
    CHECK(own > 0 && w->steps == w->at);
    CHECK_OK(imagebart_encode(w->other, rgb, 1, tokens));
    CHECK_OK(imagebart_decode(w->other, tokens, 1, rgb));
    CHECK(w->steps == w->at); /* no work of these asks the first call's caller */
    return 0;
}

/* The first call is asked as often as without the second, and can be cancelled behind it. */
static void test_within(void) {
    static uint8_t alone[PIXELS], rgb[PIXELS];
    imagebart_model *m, *other;
    Within w = {.at = 0};
    imagebart_options o = {.bytes = sizeof o, .best_of = 1, .chain_length = "1", .step = step_within, .user = &w};
    CHECK_OK(imagebart_open_on(&m, "models/emoji", NULL, "cpu"));
    CHECK_OK(imagebart_open_on(&other, "models/emoji", NULL, "cpu"));
    imagebart_threads(1); /* with more, how often one is asked differs */
    CHECK_OK(imagebart_sample(m, &o, alone, NULL));
    const size_t steps = w.steps;
    w = (Within){other, 0, steps / 2, 0};
    CHECK_OK(imagebart_sample(m, &o, rgb, NULL));
    CHECK(w.steps == steps && !memcmp(rgb, alone, sizeof rgb));
    w = (Within){other, 0, steps / 2, steps / 2 + 1};
    CHECK(imagebart_sample(m, &o, rgb, NULL) == IMAGEBART_CANCELLED && w.steps == steps / 2 + 1);
    imagebart_threads(0);
    imagebart_close(m), imagebart_close(other);
}

int main(void) {
    test_refused();
    test_at_work();
    test_within();
    test_api_1();
    test_details();
    test_at_once();
    return test_report();
}
