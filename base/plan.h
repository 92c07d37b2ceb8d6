/* plan.h - one planner for all networks (plan.c). */
#ifndef PLAN_H
#define PLAN_H

#include "base/base.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    size_t bytes, from, to, offset; /* needed during steps from..to */
    void *target;                   /* the pointer to set */
} Area;

typedef struct Plan {
    const char *what; /* whose memory it is, for messages; set by the caller */
    Area *area;
    size_t n, capacity;
    Err broken; /* the first error of plan_add, which plan_lay_out gives */
} Plan;

#define PLAN_END ((size_t)-1) /* a step after all others */

/* Another area: count elements of size bytes, needed during steps from..to. target: the pointer to set. */
void plan_add(Plan *p, void *target, size_t count, size_t size, size_t from, size_t to);
/* Lays all areas out; *bytes: how much memory that takes. */
Err plan_lay_out(Plan *p, size_t *bytes);
/* After plan_lay_out: every target points into memory, which has as many bytes, where the network computes. */
void plan_place(const Plan *p, void *memory);
void plan_free(Plan *p);

/* A network as a list of layers over numbered values. Layer i runs forward in step i, backward in step 2n-1-i. */
typedef struct {
    size_t in[3], add, out; /* it reads `in`, adds `add` to its result, and writes `out`; NONE: there is none */
    int rereads_out;        /* backward reads `out` again, else `in` */
    int in_place;      /* backward, the gradient of in[0] lies where that of `out` does, as that of `add` always does */
    int defers;        /* it may leave its result to the one layer that reads it, if that one takes it over */
    int takes_over;    /* it can compute the layer in front of it, reading that one's in[0] instead of in[0] */
    int deferred;      /* plan_lives says: `out` is never written, and in[0] lives until `out` has been read */
    int accumulate[3]; /* plan_lives says: backward finds the gradient of in[i] already begun */
} PlanStep;
typedef struct {
    size_t from, to; /* needed during these steps */
    size_t home;     /* a gradient's: the value in whose gradient's memory it lies */
} Life;
/* When each of the values (n_values), and in training its gradient, is needed. */
void plan_lives(PlanStep *step, size_t n_layers, int train, Life *value, Life *grad, size_t n_values);

#ifdef __cplusplus
}
#endif
#endif
