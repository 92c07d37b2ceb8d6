/* events.c - what happens to a job, told to any number of listeners as server-sent events.
 *
 * A log keeps the events in order. Each has a number; a listener that comes back names the last one that it got, and is
 * told what followed. Of events that merely say how far the job is, only the newest is kept. A listener's thread waits
 * here. It looks at its socket now and then: a listener that has hung up is noticed within a second, for a job may depend
 * on being listened to. */
#include "serving/serving.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

typedef struct {
    uint64_t number;
    const char *type;
    char *data;
} Event;

struct EventLog {
    pthread_mutex_t lock;
    pthread_cond_t more;
    size_t holders, listeners;
    double left; /* when the last listener left, or the log began */
    Event *event;
    size_t n, capacity;
    uint64_t next; /* number of the next event; the first is 1 */
    int is_over;
};

Err events_new(EventLog **out) {
    EventLog *log = calloc(1, sizeof *log);
    if (!log) return err("no memory for a job's events");
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
#ifndef __APPLE__ /* which waits for a span, not until a time */
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
#endif
    pthread_cond_init(&log->more, &attributes);
    pthread_condattr_destroy(&attributes);
    pthread_mutex_init(&log->lock, NULL);
    log->holders = 1;
    log->next = 1;
    log->left = seconds();
    *out = log;
    return OK;
}

void events_release(EventLog *log) {
    pthread_mutex_lock(&log->lock);
    const int last = --log->holders == 0;
    pthread_mutex_unlock(&log->lock);
    if (!last) return;
    for (size_t i = 0; i < log->n; i++) free(log->event[i].data);
    free(log->event);
    pthread_mutex_destroy(&log->lock);
    pthread_cond_destroy(&log->more);
    free(log);
}

void events_put(EventLog *log, EventKind kind, const char *type, cJSON *json) {
    char *data = json ? cJSON_PrintUnformatted(json) : NULL;
    cJSON_Delete(json);
    if (!data) return;
    pthread_mutex_lock(&log->lock);
    for (size_t i = 0; i < log->n && kind == EVENT_PASSING; i++) {
        if (log->event[i].type != type) continue;
        free(log->event[i].data);
        memmove(log->event + i, log->event + i + 1, (--log->n - i) * sizeof *log->event);
        break;
    }
    if (mem_grow(&log->event, log->n, 1, &log->capacity, sizeof *log->event, "events") == OK)
        log->event[log->n++] = (Event){log->next++, type, data};
    else
        free(data);
    log->is_over |= kind == EVENT_LAST;
    pthread_cond_broadcast(&log->more);
    pthread_mutex_unlock(&log->lock);
}

double events_alone(EventLog *log) {
    pthread_mutex_lock(&log->lock);
    const double alone = log->listeners ? 0 : seconds() - log->left;
    pthread_mutex_unlock(&log->lock);
    return alone;
}

/* ---- A listener ---- */

enum { PATIENCE = 15, GLANCE_MS = 500 };

typedef struct {
    EventLog *log;
    uint64_t told; /* number of the last event */
    double since;  /* something was sent */
    char *text;    /* of the event that is being sent */
    size_t at, size;
} Listener;

/* The next event as text; 0: there is none. */
static int next_event(Listener *l) {
    EventLog *log = l->log;
    for (size_t i = 0; i < log->n; i++) {
        const Event *e = &log->event[i];
        if (e->number <= l->told) continue;
        const size_t room = strlen(e->type) + strlen(e->data) + 64;
        free(l->text);
        l->text = malloc(room);
        if (!l->text) return 0;
        l->size = (size_t)snprintf(l->text, room, "id: %llu\nevent: %s\ndata: %s\n\n", (unsigned long long)e->number,
                                   e->type, e->data);
        l->at = 0;
        l->told = e->number;
        return 1;
    }
    return 0;
}

/* How the client's end of the line is: gone, perhaps gone (it sends no more), there. */
typedef enum { GONE, SILENT, THERE } Line;
static Line look_at_line(int fd) {
#ifdef POLLRDHUP
    struct pollfd p = {fd, POLLRDHUP, 0};
    if (fd < 0 || poll(&p, 1, 0) <= 0) return THERE;
    return p.revents & (POLLERR | POLLHUP | POLLNVAL) ? GONE : SILENT;
#else
    struct pollfd p = {fd, POLLIN, 0};
    char byte;
    if (fd < 0 || poll(&p, 1, 0) <= 0) return THERE;
    if (p.revents & (POLLERR | POLLHUP | POLLNVAL)) return GONE;
    return recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0 ? SILENT : THERE;
#endif
}

static void wait_for_more(EventLog *log) {
#ifdef __APPLE__
    const struct timespec glance = {0, GLANCE_MS * 1000000L};
    pthread_cond_timedwait_relative_np(&log->more, &log->lock, &glance);
#else
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += GLANCE_MS * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_cond_timedwait(&log->more, &log->lock, &until);
#endif
}

/* A comment shows proxies that the line lives, and this server whether it does: to one that was closed it brings an error
 * back. */
static long comment(Listener *l, char *to) {
    l->since = seconds();
    memcpy(to, ":\n\n", 3);
    return 3;
}

static long listener_next(void *context, int fd, char *to, size_t most) {
    Listener *l = context;
    EventLog *log = l->log;
    long result = 0;
    pthread_mutex_lock(&log->lock);
    while (!result) {
        if (l->at < l->size || next_event(l)) {
            const size_t n = min_size(most, l->size - l->at);
            memcpy(to, l->text + l->at, n);
            l->at += n;
            l->since = seconds();
            result = (long)n;
        } else if (log->is_over) {
            result = -1;
        } else {
            const double quiet = seconds() - l->since;
            const Line line = look_at_line(fd);
            if (line == GONE)
                result = -1;
            else if (quiet > PATIENCE || (line == SILENT && quiet > 1))
                result = comment(l, to);
            else
                wait_for_more(log);
        }
    }
    pthread_mutex_unlock(&log->lock);
    return result;
}

static void listener_end(void *context) {
    Listener *l = context;
    pthread_mutex_lock(&l->log->lock);
    if (--l->log->listeners == 0) l->log->left = seconds();
    pthread_mutex_unlock(&l->log->lock);
    events_release(l->log);
    free(l->text);
    free(l);
}

/* The number of the last event that the client says it got; unknown ones are 0: from the beginning. */
static uint64_t last_told(const EventLog *log, const Request *r) {
    const char *text = request_header(r, "Last-Event-ID");
    size_t number = 0;
    if (!text || !text_digits(&number, &text) || *text || number >= log->next) return 0;
    return number;
}

Reply events_reply(EventLog *log, const Request *r) {
    Listener *l = calloc(1, sizeof *l);
    if (!l) return (Reply){500, NULL};
    pthread_mutex_lock(&log->lock);
    l->told = last_told(log, r);
    l->since = seconds();
    l->log = log;
    const int is_finished = log->is_over && l->told + 1 == log->next;
    if (!is_finished) log->holders++, log->listeners++;
    pthread_mutex_unlock(&log->lock);
    if (is_finished) {
        free(l);
        return reply_empty(204);
    }
    Reply reply = reply_stream(r, "text/event-stream", listener_next, listener_end, l);
    reply_header(&reply, "X-Accel-Buffering", "no");
    return reply;
}
