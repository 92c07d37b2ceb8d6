/* params.h - parameter tables: named tensors in memory. */
#ifndef PARAMS_H
#define PARAMS_H

#include "base/base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How the numbers of a weight matrix (N,K) are kept: as reals, row-major without gaps; as bf16, the upper halves of
 * floats; as whole numbers -127..127 and a factor for each row; as the sums of two bf16. All but the first lie in panels
 * (kernels/stream.c). */
typedef enum { WEIGHTS_REAL, WEIGHTS_BF16, WEIGHTS_INT8, WEIGHTS_BF16X3 } WeightFormat;
typedef struct {
    WeightFormat format;
    const void *data;
    const float *scale; /* (N), WEIGHTS_INT8 only */
} Weights;
static inline size_t weight_bytes(WeightFormat f) { /* of one number */
    return f == WEIGHTS_BF16 ? 2 : f == WEIGHTS_INT8 ? 1 : f == WEIGHTS_BF16X3 ? 4 : sizeof(real);
}

/* What matrix products multiply: floats; each float as the sum of two bf16, three products of the four; bf16. Sums are
 * float. On a GPU activations are kept in it, too, and there is no bf16x3. */
typedef enum { PRECISION_F32, PRECISION_BF16X3, PRECISION_BF16 } Precision;
/* Of everything else in a network whose matrices are kept in this format */
static inline Precision weight_precision(WeightFormat f) {
    return f == WEIGHTS_REAL ? PRECISION_F32 : f == WEIGHTS_BF16X3 ? PRECISION_BF16X3 : PRECISION_BF16;
}

enum { NAME_MAX_BYTES = 160 };
enum { MAX_SCALES = 64 }; /* of a model */
/* A table has one row per tensor of a model. Allocation, init, load, save, decay, optimizer, EMA and gradient checks
 * loop over the rows, and nothing else knows names or order. */
typedef enum { INIT_ZERO, INIT_ONE, INIT_NORMAL, INIT_UNIFORM } Init;
typedef struct {
    char name[NAME_MAX_BYTES]; /* official state-dict name, without the model's prefix */
    int ndim;
    size_t dim[4], size;
    Init init;
    double scale;   /* standard deviation of INIT_NORMAL and around INIT_ONE, half width of INIT_UNIFORM */
    double decay;   /* AdamW weight decay of this tensor */
    int untrained;  /* never receives a gradient: the optimizer skips it altogether, as PyTorch does */
    int matrix;     /* the weight (out,in) of a linear layer: may be kept in fewer bits for sampling */
    Weights packed; /* then; data NULL: not packed */
    real *value, *grad, *m, *v, *ema; /* each NULL until planned */
    uint16_t *m16, *v16;              /* instead of m and v: in bf16 */
} Param;
struct Device;
struct DeviceOps;
typedef struct Params Params;
struct Params {
    Param *row;
    size_t n, capacity;
    size_t total;                /* elements of one arena, padding included */
    real *arena[5];              /* value, grad, m, v, ema: one allocation each */
    int bf16_moments;            /* set before the plan: m and v are kept in bf16, in half the memory */
    void *packed;                /* of all matrices */
    WeightFormat format;         /* how params_map keeps matrices; set before */
    Precision precision;         /* of products on this processor; set before the network is planned */
    struct Device *device;       /* the table's copy on a GPU, where everything then happens; NULL: here (compute.h) */
    const struct DeviceOps *ops; /* of that GPU */
    void (*ready)(Params *p, size_t row); /* whom params_ready tells; NULL: nobody */
};
enum { PLAN_VALUE = 1, PLAN_GRAD = 2, PLAN_ADAM = 4, PLAN_EMA = 8 };
/* A name made as printf does: name_of("%s.weight", layer).s */
typedef struct {
    char s[NAME_MAX_BYTES];
} Name;
Name name_of(const char *fmt, ...) PRINTF_LIKE(1, 2);
/* Appends a row; *index = its number (rows may move while the table grows: keep numbers, not pointers). */
Err params_add(Params *p, size_t *index, Init init, double scale, double decay, int ndim, const size_t *dim,
               const char *fmt, ...) PRINTF_LIKE(8, 9);
/* Puts the rows in an order of names, before the plan; what order calls equal (0) stays as it was added. moved (n): where
 * each row went. */
void params_sort(Params *p, int (*order)(const char *, const char *), size_t *moved);
Err params_plan(Params *p, int what);       /* allocates what is asked for and not yet there */
void params_init(Params *p, uint64_t seed); /* values from their Init rule, stream RNG_INIT; EMA = values */
void params_zero_grad(Params *p);
size_t params_count(const Params *p);                      /* elements without padding */
size_t params_bytes(const Params *p, WeightFormat format); /* of all values, matrices kept in this format */
double params_grad_norm(const Params *p);                  /* L2 norm over all rows, summed in fixed order in double */
/* A network's backward pass says that no row from this one on will get more of its gradient. */
static inline void params_ready(Params *p, size_t row) {
    if (p->ready) p->ready(p, row);
}
void params_swap_ema(Params *p); /* exchanges value and ema: twice is nothing */
/* Of a table whose network is on the GPU (transformer_use_cuda) everything planned is copied there, or back; on the CPU
 * there is nothing to do. Sent: values, moments, EMA. Fetched: gradients too. Zeroing, norms, updates and exchanges
 * happen where the table is. */
Err params_send(Params *p);
Err params_fetch(Params *p);
/* n numbers of a row, from `at` on, and all of their moments and average, to a GPU. */
void params_send_part(Params *p, size_t row, size_t at, size_t n);
void params_free(Params *p);

/* ---- Updates: what training does with gradients (SPEC sections 6 and 7) ---- */
/* AdamW as PyTorch: p *= 1-lr*decay; m,v moments; bias correction with step = 1,2,...; rows marked untrained are left
 * alone. grad is read, not cleared. decay comes from each row times `decay_scale`. */
typedef struct AdamW {
    double lr, beta1, beta2, eps, decay_scale;
} AdamW;
void adamw_step(Params *p, const AdamW *o, uint64_t step);
/* EMA (SPEC section 6): d = min(decay, (1+n)/(10+n)) in float32 with n = num_updates (already incremented);
 * ema -= (1-d)(ema - value). */
void ema_update(Params *p, double decay, uint64_t num_updates);
/* Both, one after the other, in one pass over memory where that is faster. */
void adamw_ema_step(Params *p, const AdamW *o, uint64_t step, double decay, uint64_t num_updates);
/* Learning-rate factor at optimizer step n = 0,1,... : linear warm-up, then cosine (SPEC section 7). */
typedef struct {
    double lr_start, lr_max, lr_min, warm_up_steps, max_decay_steps;
} LrSchedule;
double lr_at(const LrSchedule *s, uint64_t n);

/* For files/weights.c: one of a row's pointers, in the order of Params.arena; those to moments in bf16; the arena of a
 * letter (v value, g gradient, 1 and 2 Adam moments, e EMA), or -1: an error, already set. */
enum {
    ARENAS = 5,
    ROW_REALS = LINE_BYTES / sizeof(real) /* rows begin at a cache line */
};
real **params_slot(Param *row, int arena);
int params_in_bf16(const Params *p, int arena);
uint16_t **params_slot16(Param *row, int arena);
int params_arena(const Params *p, char which);

#ifdef __cplusplus
}
#endif
#endif
