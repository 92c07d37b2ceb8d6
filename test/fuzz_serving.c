/* fuzz_serving.c - a fuzzer of what strangers send to ./serve: jobs as JSON and as forms, and the texts of pictures, from
 * which jobs are made. Byte 0: which of these. */
#include "fuzz.h"

#ifdef HAVE_SERVE
#include "serving/serving.h"

static const char boundary[] = "multipart/form-data; boundary=\"b-1\"";

const Offer *fuzz_offer(void) {
    static Offer o;
    static const char *emoji = "models/emoji";
    const OptionList given = {&emoji, 1, 1};
    if (!o.models) {
        o.most = 16;
        if (offer_open(&o, &given, WEIGHTS_REAL, 0) != OK) fprintf(stderr, "%s\n", err_text()), abort();
    }
    return &o;
}

/* A job that was understood says itself again, and what it says is understood. */
static void use_job(const Job *j) {
    Config text = {0};
    Job again = {0};
    Fault f = {0};
    cJSON *command = job_command(j, fuzz_offer()), *json = job_json(j);
    MUST(command && json);
    if (answered(job_text(&text, j, 0)) == OK) {
        if (!job_of_text(&again, fuzz_offer(), &text, &f)) MUST(f.status >= 400 && f.text[0]);
        job_free(&again);
    }
    config_free(&text);
    cJSON_Delete(command);
    cJSON_Delete(json);
}

static void read_job(const uint8_t *bytes, size_t n) {
    Job j = {0};
    Fault f = {0};
    if (n < 1) return;
    uint8_t *body = malloc(n); /* a zero byte is behind it */
    MUST(body);
    memcpy(body, bytes + 1, n - 1), body[n - 1] = 0;
    const Request r = {.body = body, .size = n - 1, .type = bytes[0] & 1 ? boundary : "application/json"};
    if (job_of_request(&j, fuzz_offer(), &r, &f))
        fuzz_accepted++, use_job(&j);
    else
        MUST(f.status >= 400 && f.status < 600 && f.text[0] && !strchr(f.text, '\n'));
    job_free(&j);
    free(body);
}

#define TAKE(name, text) take(name, text, sizeof(text) - 1)
static void job_seeds(FuzzSeed *take) {
    static const char picture[] = /* 1x1, grey */
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg==";
    char edit[1024];
    TAKE("new", "\2{\"kind\":\"sample\",\"model\":\"emoji\",\"count\":4,\"first\":0,\"seed\":7,\"class\":\"food\","
                "\"temperature\":"
                "0.8,\"top_k\":[0,1,2],\"guidance\":1,\"chain_length\":[1,8,8],\"best_of\":4,\"previews\":true,"
                "\"owned\":false}");
    TAKE("form", "\1--b-1\r\nContent-Disposition: form-data; "
                 "name=\"job\"\r\n\r\n{\"kind\":\"sample\",\"seed\":7}"
                 "\r\n--b-1--\r\n");
    snprintf(edit, sizeof edit, "\2{\"kind\":\"inpaint\",\"image\":\"%s\",\"half\":\"upper\",\"count\":2}", picture);
    take("edit", edit, strlen(edit));
    snprintf(edit, sizeof edit, "\2{\"kind\":\"inpaint\",\"image\":\"%s\",\"window\":4,\"class\":\"1\"}", picture);
    take("window", edit, strlen(edit));
}

/* The texts of a picture, lines of "key value": a job, or why not. */
static void read_settings(const uint8_t *bytes, size_t n) {
    Config text = {0};
    Job j = {0};
    Fault f = {0};
    for (size_t at = 0; at < n;) {
        char key[64], value[512];
        const uint8_t *end = memchr(bytes + at, '\n', n - at);
        const size_t length = (end ? (size_t)(end - bytes) : n) - at;
        const uint8_t *blank = memchr(bytes + at, ' ', length);
        const size_t name = blank ? (size_t)(blank - bytes) - at : length;
        snprintf(key, sizeof key, "%.*s", (int)min_size(name, 63), (const char *)bytes + at);
        snprintf(value, sizeof value, "%.*s", blank ? (int)min_size(length - name - 1, 511) : 0,
                 (const char *)bytes + at + name + (blank != NULL));
        if (*key) answered(config_set(&text, key, "%s", value));
        at += length + 1;
    }
    if (job_of_text(&j, fuzz_offer(), &text, &f))
        fuzz_accepted++, use_job(&j);
    else
        MUST(f.status >= 400 && f.status < 600 && f.text[0] && !strchr(f.text, '\n'));
    job_free(&j);
    config_free(&text);
}

static void settings_seeds(FuzzSeed *take) {
    TAKE("new", "model models/emoji\nseed 7\nclass food\ntemperature 1,0.9,0.8\ntop-k 0\nguidance 2,2,1\n"
                "chain-length 1,8,8\nbest-of 4\npicture 3\n");
    TAKE("edit", "inpainted a.png\nmodel emoji\nseed 9007199254740991\ncandidates 4\nwindow 24\npaste true\ncount 2\n"
                 "first 5\n");
}

const FuzzTarget fuzz_serving_targets[] = {
    {"jobs", read_job, job_seeds, NULL}, {"settings", read_settings, settings_seeds, NULL}, {NULL, NULL, NULL, NULL}};
#else
const FuzzTarget fuzz_serving_targets[] = {{NULL, NULL, NULL, NULL}};
#endif
