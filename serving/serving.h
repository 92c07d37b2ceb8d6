/* serving.h - what serving/ gives to ./serve: HTTP over libmicrohttpd and who may call it, the page, JSON over cJSON,
 * forms, streams of events, and what a job asks for. The calls themselves, their queue and their worker are serve.c's;
 * doc/api.md is the contract.
 *
 * A thread serves each connection, so that every call here may be made from any thread unless it says otherwise. */
#ifndef SERVING_H
#define SERVING_H

#include "sampling/sampling.h"

#include <cjson/cJSON.h>
#include <pthread.h>

/* ---- bytes.c: bytes that several hold ---- */
typedef struct {
    uint8_t *bytes;
    size_t size;
    _Atomic size_t holders;
} Blob;
/* *out = a blob that the caller holds, with these bytes, which it frees one day; NULL: new ones, zero. */
Err blob_new(Blob **out, uint8_t *bytes, size_t size);
Blob *blob_hold(Blob *b);   /* one more holder */
void blob_release(Blob *b); /* the last one frees it; NULL is fine */

/* ---- reply.c: requests and replies ---- */
typedef struct {
    char path[256];    /* relative to GET /, decoded */
    char part[2][128]; /* what stands for the stars of the route */
    const uint8_t *body;
    size_t size;      /* of the body, behind which is a zero byte */
    const char *type; /* Content-Type, "" without one */
    void *connection;
    int fd; /* the client's socket */
} Request;
const char *request_header(const Request *r, const char *name); /* NULL: there is none */
/* *value = what is behind ?name=, "" where = is missing, NULL: there is none; how often the name is there. */
size_t request_query(const char **value, const Request *r, const char *name);

typedef struct {
    unsigned status;
    struct MHD_Response *response; /* NULL: no memory */
} Reply;
Reply reply_json(unsigned status, cJSON *json); /* takes json, NULL: no memory */
Reply reply_empty(unsigned status);
Reply reply_blob(const char *type, Blob *b);                                     /* 200; holds b until it is sent */
Reply reply_static(unsigned status, const char *type, const void *at, size_t n); /* what stays for ever */
/* The next bytes of a stream into to (most), waiting for them if need be; -1: it is over. fd: the request's. */
typedef long StreamNext(void *context, int fd, char *to, size_t most);
Reply reply_stream(const Request *r, const char *type, StreamNext *next, void (*end)(void *context), void *context);
/* {"error": text, "field": field}; field NULL: none */
Reply reply_error(unsigned status, const char *field, const char *fmt, ...) PRINTF_LIKE(3, 4);
void reply_header(Reply *r, const char *name, const char *value);

/* ---- gate.c: who may call ---- */
typedef struct {
    const char *token;         /* NULL: none is asked for */
    const char *const *origin; /* foreign pages that may call */
    size_t origins;
    unsigned port;
} Gate;
/* 0: the request may go on, else the status and *why. secret: whether the call needs the token, if there is one. */
unsigned gate_check(const Gate *g, const Request *r, int secret, const char **why);
/* origin is scheme://host, scheme://host:port, nothing else. */
int origin_is_whole(const char *origin);
Reply gate_sign_in(const Gate *g, const Request *r);
/* *token = what a file has, but for one line end; an empty one is an error. To be freed. */
Err token_read(char **token, const char *path);
/* The form that GET / answers with when the token is missing. */
Reply gate_form(void);
/* text = n random bytes in base64url. */
Err random_text(char *text, size_t n);

/* ---- http.c: connections, and which call a request is for ---- */
typedef struct {
    const char *method, *path; /* "api/jobs/?/events", where ? is any part */
    Reply (*call)(void *context, const Request *r);
    int open; /* needs no token */
} Route;

typedef struct Http Http;
typedef struct {
    Gate gate;
    const Route *route;
    size_t routes;
    void *context; /* of the calls */
} HttpConfig;
enum { BODY_BYTES = 32 << 20 }; /* the longest that is taken */
/* *fd = a socket that listens there; *port, which 0 leaves to the system, is the one that it got. *loopback: whether
 * only this machine can reach it. */
Err http_listen(int *fd, unsigned *port, int *loopback, const char *host);
Err http_start(Http **h, int fd, const HttpConfig *c);
void http_stop(Http *h); /* waits until every connection is closed */

/* ---- signals.c: SIGINT and SIGTERM ---- */

void signals_hold(void);           /* before any thread is started: they wait */
int signal_within(time_t seconds); /* waits for one as long as that; 1: one came */

/* ---- json.c ---- */
/* What is wrong with a request: the status, the field or "", and a sentence. */
typedef struct {
    unsigned status;
    char field[128], text[1024];
} Fault;
/* Sets it; 0, as all below that fail. */
int fault(Fault *f, unsigned status, const char *field, const char *fmt, ...) PRINTF_LIKE(4, 5);
Reply fault_reply(const Fault *f);
enum { SHOWN_BYTES = 300 };
/* A stranger's text as a message shows it: escaped, 60 letters at most */
const char *shown_text(char out[SHOWN_BYTES], const char *text);
int wrong_value(Fault *f, unsigned status, const char *field, const cJSON *found, const char *expected);
/* A body as JSON, to be released with cJSON_Delete; NULL: it is none. */
cJSON *json_read(Fault *f, const uint8_t *text, size_t size);
/* *out = a number of lo to hi, a whole one if it has to be; true or false. */
int json_number(Fault *f, double *out, const cJSON *x, const char *field, double lo, double hi, int whole);
int json_flag(Fault *f, int *out, const cJSON *x, const char *field);

/* ---- forms.c ---- */
/* *out (*size) = what a text is the base64 of, to be freed; DAMAGED: it is none. */
Err base64_decode(uint8_t **out, size_t *size, const char *text);
enum { FORM_PARTS = 16 };
typedef struct {
    char name[64];
    const uint8_t *bytes; /* in the body */
    size_t size;
} FormPart;
/* The parts of a multipart/form-data body. */
int form_read(Fault *f, FormPart part[FORM_PARTS], size_t *parts, const Request *r);

/* ---- models.c: the models that are served ---- */
typedef struct {
    const char *given; /* what ./sample calls it: emoji, runs/mine */
    const char *name;  /* its last part */
    const char *title;
    int here;
    struct imagebart_model *library; /* the same as sampling/libimagebart.h knows it */
    const Model *model;
    SampleOptions recommended[2]; /* [DrawKind] */
    size_t many[2];               /* [DrawKind] pictures drawn for one, candidates of an edit */
    size_t memory;                /* bytes, while it draws */
} Served;
/* What the server has. */
typedef struct Offer {
    Served *model;
    size_t models, most;          /* most: pictures of a job */
    const char *device, *weights; /* as given, or NULL */
    int twice;                    /* offer_open failed since a model was named twice */
} Offer;
/* Those that were given; else all named ones, of which those that are not here are only listed. */
Err offer_open(Offer *o, const OptionList *given, WeightFormat weights, int cuda);
void offer_close(Offer *o);
cJSON *served_json(const Served *s); /* MODEL */
/* A number for each scale as a list, the noisiest first */
cJSON *scales_json(const double *x, int T);
cJSON *scales_json_sizes(const size_t *x, int T);

/* ---- events.c: what happens to a job, told to its listeners ---- */
typedef struct EventLog EventLog;
typedef enum {
    EVENT_KEPT,    /* told to those who come later, too */
    EVENT_PASSING, /* of its type only the newest is */
    EVENT_LAST     /* the stream ends behind it */
} EventKind;
Err events_new(EventLog **out); /* the caller holds it */
void events_release(EventLog *log);
void events_put(EventLog *log, EventKind kind, const char *type, cJSON *json); /* takes json; type is a literal */
double events_alone(EventLog *log); /* seconds since the last listener left; 0: there is one */
Reply events_reply(EventLog *log, const Request *r);

/* ---- job.c: what a job asks for ---- */
typedef struct {
    DrawKind kind;
    Served *served;
    size_t count, first, best_of;
    uint64_t seed;
    char *class_name; /* NULL: none was given */
    SampleOptions options;
    int previews, owned;
    /* of edits */
    Blob *image, *mask; /* as they came; released when the job is over */
    int has_mask;
    size_t paste_pixels;  /* of the picture that comes back, if it is not the model's */
    size_t profile_bytes; /* of its colours */
    const char *image_name;
    char half[8]; /* "": not given; as the sizes are with 0 */
    size_t window, outside, extend;
    int paste;
} Job;
/* Reads JOB; image, mask: parts that came beside it, or NULL. is_text: it stands for what a picture's text says, so that
 * pictures are left out. To be released with job_free in any case. */
int job_read(Job *j, const Offer *o, const cJSON *json, Blob *image, Blob *mask, int is_text, Fault *f);
/* The same from a request's body: JSON, or a form. */
int job_of_request(Job *j, const Offer *o, const Request *r, Fault *f);
void job_free(Job *j);
enum { MOST_PIXELS = 64000000 }; /* of a picture */
EditArgs job_edit_args(const Job *j);
cJSON *job_json(const Job *j);
/* The command line that draws the same; NULL: no memory. */
cJSON *job_command(const Job *j, const Offer *o);
/* The text of picture k, as ./sample and ./inpaint write it. */
Err job_text(Config *text, const Job *j, size_t k);
/* The JOB that a picture's text says, validated. */
int job_of_text(Job *j, const Offer *o, const Config *text, Fault *f);

/* ---- chain.c: a step of a picture's chain ---- */
/* With as few digits as bring it back */
cJSON *float_json(float x);
/* K.json?scale=t. chain: (T+1,N) int32 x_T .. x_0 */
Reply chain_reply(const Model *m, const Blob *chain, int t);

/* ---- ticket.c: a job with its id, from its arrival to its pictures ---- */
typedef enum { TICKET_QUEUED, TICKET_RUNNING, TICKET_DONE, TICKET_FAILED, TICKET_CANCELLED } TicketState;
typedef struct Ticket {
    char id[24];
    Job job;
    const Offer *offer;
    EventLog *events;
    _Atomic size_t holders;
    _Atomic int cancel;   /* the worker stops at the next block of tokens */
    pthread_mutex_t lock; /* of all that follows */
    _Atomic TicketState state;
    int scale;                            /* at which it is */
    size_t done[MAX_SCALES + 1];          /* tokens, of all pictures, candidates and passes of a scale */
    double spent[MAX_SCALES + 1];         /* seconds */
    double began, ended;                  /* 0: not yet */
    Blob **picture, **details, **preview; /* (count), (count), (count,T+1); NULL: not there */
    Blob **chain;                         /* (count) see chain_reply */
    size_t width, height;                 /* of the pictures */
    int32_t *label;                       /* (count) classes; -1: none */
    double *bound;                        /* (count) */
    char error[ERR_MAX];
    char note[ERR_MAX];   /* of an edit, as imagebart_picture has it; "": nothing */
    _Atomic size_t bytes; /* that it holds; before it is over, that it may come to hold */
    /* the server's */
    struct Ticket *next;
    size_t told_place;
} Ticket;
size_t ticket_results(const Job *j); /* bytes of its results, at most */
size_t ticket_bytes(const Job *j);   /* of all that it holds: these, what came with it, itself */
/* Takes what the job has. The caller holds it. */
Err ticket_new(Ticket **t, Job *job, const Offer *offer);
void ticket_release(Ticket *t);
int ticket_is_over(const Ticket *t);
cJSON *ticket_json(Ticket *t, size_t place); /* STATE */
size_t ticket_tokens(const Ticket *t, int scale);
void ticket_add_progress(cJSON *x, const Ticket *t); /* what STATE and the event have; the lock is the caller's */
void ticket_tell_place(Ticket *t, size_t place);
Reply ticket_file(Ticket *t, const Request *r); /* K.png, K.json, both with ?scale=S too */
void ticket_start(Ticket *t);
void ticket_end(Ticket *t, TicketState state); /* the last event */

/* ---- work.c: what the worker does for a ticket ---- */
/* Runs it to its end, whatever that is. */
void ticket_run(Ticket *t);

/* ---- page.c: web/, embedded ---- */
Reply page_index(void *context, const Request *r);
Reply page_css(void *context, const Request *r);
Reply page_js(void *context, const Request *r);

#endif
