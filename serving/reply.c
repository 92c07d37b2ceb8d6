/* reply.c - what a request says, and replies: JSON, pictures, streams, errors. */
#include "serving/serving.h"

#include <microhttpd.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *request_header(const Request *r, const char *name) {
    return MHD_lookup_connection_value(r->connection, MHD_HEADER_KIND, name);
}

typedef struct {
    const char *name, *value;
    size_t times;
} Query;

static enum MHD_Result query_one(void *context, enum MHD_ValueKind kind, const char *name, const char *value) {
    Query *q = context;
    (void)kind;
    if (!strcmp(name, q->name)) q->times++, q->value = value ? value : "";
    return MHD_YES;
}

size_t request_query(const char **value, const Request *r, const char *name) {
    Query q = {.name = name};
    MHD_get_connection_values(r->connection, MHD_GET_ARGUMENT_KIND, query_one, &q);
    *value = q.value;
    return q.times;
}

/* ---- Replies ---- */

static Reply reply_of(unsigned status, const char *type, struct MHD_Response *response) {
    Reply r = {status, response};
    if (type) reply_header(&r, "Content-Type", type);
    reply_header(&r, "X-Content-Type-Options", "nosniff");
    return r;
}

void reply_header(Reply *r, const char *name, const char *value) {
    if (r->response) MHD_add_response_header(r->response, name, value);
}

Reply reply_static(unsigned status, const char *type, const void *at, size_t n) {
    void *bytes = (void *)(uintptr_t)at;
    return reply_of(status, type, MHD_create_response_from_buffer(n, bytes, MHD_RESPMEM_PERSISTENT));
}

Reply reply_empty(unsigned status) {
    return reply_static(status, NULL, "", 0);
}

Reply reply_json(unsigned status, cJSON *json) {
    char *text = json ? cJSON_PrintUnformatted(json) : NULL;
    cJSON_Delete(json);
    if (!text) return (Reply){500, NULL};
    return reply_of(status, "application/json",
                    MHD_create_response_from_buffer(strlen(text), text, MHD_RESPMEM_MUST_FREE));
}

Reply reply_error(unsigned status, const char *field, const char *fmt, ...) {
    char text[ERR_MAX];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    cJSON *json = cJSON_CreateObject();
    cJSON_AddStringToObject(json, "error", text);
    if (field) cJSON_AddStringToObject(json, "field", field);
    return reply_json(status, json);
}

static ssize_t blob_read(void *context, uint64_t at, char *to, size_t most) {
    const Blob *b = context;
    const size_t n = min_size(most, b->size - at);
    memcpy(to, b->bytes + at, n);
    return n ? (ssize_t)n : MHD_CONTENT_READER_END_OF_STREAM;
}

static void blob_sent(void *context) {
    blob_release(context);
}

Reply reply_blob(const char *type, Blob *b) {
    struct MHD_Response *response =
        MHD_create_response_from_callback(b->size, 65536, blob_read, blob_hold(b), blob_sent);
    if (!response) blob_release(b);
    return reply_of(200, type, response);
}

typedef struct {
    StreamNext *next;
    void (*end)(void *context);
    void *context;
    int fd;
} Stream;

static ssize_t stream_read(void *context, uint64_t at, char *to, size_t most) {
    const Stream *s = context;
    (void)at;
    const long n = s->next(s->context, s->fd, to, most);
    return n > 0 ? n : MHD_CONTENT_READER_END_OF_STREAM;
}

static void stream_end(void *context) {
    Stream *s = context;
    s->end(s->context);
    free(s);
}

Reply reply_stream(const Request *r, const char *type, StreamNext *next, void (*end)(void *context), void *context) {
    Stream *s = malloc(sizeof *s);
    struct MHD_Response *response = NULL;
    if (s) {
        *s = (Stream){next, end, context, r->fd};
        response = MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 16384, stream_read, s, stream_end);
    }
    if (!response) {
        end(context);
        free(s);
    }
    return reply_of(200, type, response);
}
