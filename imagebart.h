/* imagebart.h - the map of the code, in the order in which data flows through it.
 *
 *     image -> images.c, data.c -> vqgan.c -> tokens -> diffusion.c (noise)
 *           -> transformer.cu (denoise) -> tokens -> vqgan.c -> image
 *
 * One section per file. Read them in this order; each file's top comment says what it owns:
 *
 *     1. base.c          error values, memory, random streams, threads
 *     2. gemm.c, conv.c  the one matrix product everything stands on; convolutions made of it
 *        winograd.c      most of those with fewer multiplications
 *     3. checkpoint.c    named tensors in files: safetensors in and out, flat configurations
 *        ckpt.c          named tensors out of PyTorch's .ckpt files
 *        digest.c        SHA-256 and MD5: are weights the published ones?
 *        params.c        named tensors in memory: the parameter table of a model
 *     4. images.c        pictures in and out, the official preprocessing
 *        data.c          datasets, batches read ahead; lmdb.c: those in LMDBs
 *        tokens.c        the token cache
 *     5. vqgan.c         first stage: image <-> tokens
 *        vqgan_layers.c  what its layers do
 *        discriminator.c its adversary in training
 *        perceptual.c    how different its reconstructions look
 *     6. transformer.cu  one reverse transition p(x_{t-1} | x_t)
 *        decode.cu       the same, token by token
 *        optimizer.cu    its losses, AdamW, EMA
 *        device.cu       all of it on a GPU
 *     7. diffusion.c     the Markov chain: schedules, noise, posterior, sampling over scales
 *        model.c         named models, recipes, what a model's folder holds
 *        classes.c       what the classes of a model are called
 *     8. cli.c           what the three programs share: options, progress, pictures in a terminal
 *     9. parallel.c      ./train in more than one process
 *
 * Names: B batch, N = h*w tokens of a grid (row-major), T number of scales, t in 1..T a scale, K token values,
 * C channels, H W image height and width in pixels, h w grid height and width in tokens. x_0 are the data tokens,
 * x_t the t times noised ones. Arrays are row-major, shapes are written (outer,...,inner).
 *
 * Rules that hold for every function here:
 *   - Err is OK or FAILED; after FAILED err_text() says what, where, what was found and what was expected.
 *   - Nothing below the programs prints or exits. Nothing allocates between a plan call and the next.
 *   - x_backward accumulates (+=) into parameter gradients and overwrites gradients of activations.
 *   - Results do not depend on the number of threads.
 *
 * Paper: Esser, Rombach, Blattmann, Ommer, "ImageBART", NeurIPS 2021, arXiv 2108.08827. */
#ifndef IMAGEBART_H
#define IMAGEBART_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------------------------------------------------
 * 1. base.c: error values, memory, random streams, threads
 * ---------------------------------------------------------------------------------------------------------- */

/* The arithmetic type. Component files compile with float (default) or with -DREAL_DOUBLE for gradient checks. */
#ifdef REAL_DOUBLE
typedef double real;
#else
typedef float real;
#endif

typedef int Err;
enum { OK = 0, FAILED = 1 };

#if defined(__GNUC__)
#define PRINTF_LIKE(f, a) __attribute__((format(printf, f, a)))
#else
#define PRINTF_LIKE(f, a)
#endif

/* Set this thread's error text (one line, at most ERR_MAX-1 bytes, control characters are replaced); FAILED. */
enum { ERR_MAX = 1024 };
Err err(const char *fmt, ...) PRINTF_LIKE(1, 2);
/* Put "where: " in front of the present text, to say in which file or option it happened; FAILED. */
Err err_in(const char *where);
/* The text of the last error in this thread; "" if none. */
const char *err_text(void);
#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        if ((call) != OK) return FAILED;                                                                               \
    } while (0)

/* *out = zeroed memory for count elements of size bytes, 64-byte aligned; release with free(). Overflow of the
 * product and lack of memory are errors that name what it was for and how much was asked. count = 0 gives a valid
 * pointer. */
Err mem_alloc(void *out_pointer, size_t count, size_t size, const char *what);
/* Makes room for `more` elements behind the n of *array (capacity elements of size bytes); it grows by half at
 * least. */
Err mem_grow(void *array_pointer, size_t n, size_t more, size_t *capacity, size_t size, const char *what);
/* *out = a*b or an error */
Err size_mul(size_t *out, size_t a, size_t b);
/* Bytes that this process can still take: the least of what the machine, its control groups (containers) and the
 * process's own limits (ulimit -v, -d) leave. File caches count as free, for the kernel gives them up. SIZE_MAX:
 * unknown. */
size_t memory_available(void);
/* OK if `needed` bytes are available, else an error that begins with `what` and ends with `advice`. */
Err memory_fits(size_t needed, size_t available, const char *what, const char *advice);
/* "2.3 GiB", "5.6 MiB" */
const char *bytes_text(char text[32], size_t bytes);
static inline size_t min_size(size_t a, size_t b) {
    return a < b ? a : b;
}
static inline size_t max_size(size_t a, size_t b) {
    return a > b ? a : b;
}
static inline size_t ceil_div(size_t a, size_t b) {
    return (a + b - 1) / b;
}
static inline size_t round_up(size_t n, size_t unit) {
    return (n + unit - 1) / unit * unit;
}

/* Philox4x32-10 (Salmon et al. 2011): out = f(key = seed, counter = (stream, index)). Stateless: any number of a
 * stream can be asked for in any order, so results depend neither on threads nor on batch order. */
void philox(uint32_t out[4], uint64_t seed, uint64_t stream, uint64_t index);

/* Purposes of streams. rng_stream(purpose, a, b) names one: a < 2^24 and b < 2^32 (e.g. scale and sample). */
typedef enum {
    RNG_INIT = 1, /* a = row of the parameter table */
    RNG_ORDER,    /* a = epoch: order of the training examples */
    RNG_CROP,     /* a = epoch, b = example: random crop and flip */
    RNG_NOISE,    /* training noise: a = t, b = step */
    RNG_SCALE,    /* joint training: which t at a step */
    RNG_START,    /* sampling: x_T, b = sample */
    RNG_SAMPLE,   /* sampling: a = t and repeat, b = sample; index = position */
    RNG_RENOISE,  /* chains: noise between repeats, a = t and repeat, b = sample */
    RNG_UNKNOWN,  /* tokens of codes outside the remap table, b = image */
    RNG_CODES,    /* which latents replace dead codes, a = 0, b = step */
    RNG_CHOOSE,   /* inpainting: which candidates stay, a = t and repeat, b = sample */
    RNG_TEST,     /* tests */
    RNG_LABEL,    /* label dropout: a = 0, b = row of the micro batch, index = micro batch */
    RNG_ROUND     /* moments in bf16: a = row of the parameter table, b = step, index = element / 4 */
} RngPurpose;
uint64_t rng_stream(RngPurpose purpose, uint64_t a, uint64_t b);
double rng_uniform(uint64_t seed, uint64_t stream, uint64_t index);                 /* [0,1), 53 bits */
double rng_normal(uint64_t seed, uint64_t stream, uint64_t index);                  /* N(0,1), Box-Muller */
uint32_t rng_below(uint64_t seed, uint64_t stream, uint64_t index, uint32_t below); /* 0..below-1, below >= 1 */

/* task(context, i) for every i < n, shared among at most `threads` threads, of which the caller is one; returns when
 * all are done. Which thread takes which i varies, so a task must depend on i alone. Runs on the caller alone when
 * threads <= 1, inside another parallel_for, and while another thread of the program uses the workers. Cannot fail. */
typedef void Task(void *context, size_t i);
void parallel_for(int threads, size_t n, Task *task, void *context);
void threads_set(int n); /* how many a program uses; 0 (default): as many as there are processors for it */
int threads_get(void);
const char *vector_instructions(void); /* that this copy of the program was compiled for: "AVX2" */
int threads_free(void);    /* what a loop that starts here can use: 1 inside a parallel_for, else threads_get() */
size_t thread_index(void); /* of the calling thread in its loop: 0..threads-1 */

/* ------------------------------------------------------------------------------------------------------------
 * 2. gemm.c: the one matrix product; conv.c, winograd.c: convolutions made of it
 * ---------------------------------------------------------------------------------------------------------- */

/* C = op(A) op(B) (+ C if accumulate).  Row-major; ld* are row strides in elements.
 *   op(A) (M,K): A is (M,K), or (K,M) when trans_a;   op(B) (K,N): B is (K,N), or (N,K) when trans_b
 *   C     (M,N) overwritten, or added to when accumulate != 0
 * Empty M or N does nothing; K = 0 zeroes C (or leaves it, when accumulating). No aliasing of C with A or B.
 * The order of additions for an element of C is fixed by K alone: any thread count gives the same bits. Called
 * from inside a parallel region it runs on the calling thread alone, with the same bits. Cannot fail. */
void gemm(int trans_a, int trans_b, size_t M, size_t N, size_t K, const real *A, size_t lda, const real *B, size_t ldb,
          int accumulate, real *C, size_t ldc);

/* stream.c. A weight matrix (N,K) as it is stored: row-major without gaps; or packed in stream.c's panels, as the upper
 * halves of floats, or as whole numbers -127..127 and a factor for each row. */
typedef enum { WEIGHTS_REAL, WEIGHTS_BF16, WEIGHTS_INT8 } WeightFormat;
typedef struct {
    WeightFormat format;
    const void *data;
    const float *scale; /* (N), WEIGHTS_INT8 only */
} Weights;
static inline size_t weight_bytes(WeightFormat f) { /* of one number */
    return f == WEIGHTS_BF16 ? 2 : f == WEIGHTS_INT8 ? 1 : sizeof(real);
}
size_t weights_bytes(WeightFormat format, size_t N, size_t K); /* of data */
/* Row j of a matrix of row length K, x (K), goes to its place in `data`, zero before; format not WEIGHTS_REAL. bf16
 * rounds to the nearest, ties to even: off by 2^-8 of a number at most. int8: scale[j] = largest/127, off by half of
 * that; numbers that are not finite make it NaN. */
void weights_pack(WeightFormat format, void *data, float *scale, const real *x, size_t j, size_t K);
/* to (n) = x (n) rounded to bf16. */
void round_bf16(uint16_t *to, const real *x, size_t n);
/* C (M,N) = A (M,K) W^T (+ C if accumulate): any M, but made for the few rows of decoding, as fast as memory hands over
 * the weights. Cannot fail. With packed weights the numbers of A are rounded to bf16 first; sums are real. The order
 * of additions is fixed by K and the format alone: a row alone equals the row in a batch, for any thread count.
 *   work: gemm_stream_work(M, K) bytes; NULL for WEIGHTS_REAL */
void gemm_stream(size_t M, size_t N, size_t K, const real *A, size_t lda, const Weights *w, int accumulate, real *C,
                 size_t ldc, void *work);
size_t gemm_stream_work(size_t M, size_t K);
/* Attention to n keys or values (n,width), in bf16 or real; width is a multiple of 16.
 *   kept_dots       p (n) = k q, q (width)
 *   kept_weighted   y (width) = sum over j of p[j] v[j,:] */
void kept_dots(int bf16, real *p, const real *q, const void *k, size_t n, size_t width);
void kept_weighted(int bf16, real *y, const real *p, const void *v, size_t n, size_t width);

/* conv.c: convolutions, with bias, of (B,C,h,w) arrays. CONV1 is 1x1, the others 3x3 with zeros around: CONV3 at every
 * cell; CONV_DOWN at every second, padded right and below only (h and w even); CONV_UP after nearest doubling. */
typedef enum { CONV1, CONV3, CONV_DOWN, CONV_UP } ConvKind;
typedef struct {
    ConvKind kind;
    size_t B, C, M, h, w; /* x (B,C,h,w) -> y (B,M, ..): h x w, half of it, or double */
} Conv;
/* Memory that convolutions share, one after the other. */
typedef struct {
    size_t threads, column_reals, stage_reals, line_reals, weight_reals, partial_reals;
    real *columns, *stages, *lines; /* for each thread: patches, products, rows in transformation */
    real *weights, *partials;       /* transformed weights, partial sums of their gradient */
} ConvScratch;
/* Raises what scratch (threads set, else zeroed) must hold so that it is enough for c and for the same convolution of
 * fewer or smaller pictures; then: how much that is, and where it lies. backward: 0 no, 1 yes, 2 of dx alone. */
void conv_needs(ConvScratch *s, const Conv *c, int backward);
size_t conv_scratch_reals(const ConvScratch *s);
void conv_scratch_place(ConvScratch *s, real *memory);
/* Threads for a loop over n tasks that each use the scratch of their thread; 1 when there are fewer tasks. */
int conv_threads(const ConvScratch *s, size_t n);
/* y = w * x + bias (+ add unless NULL)     w (M,C,3,3) or (M,C,1,1)   bias (M)   add (as y) */
void conv_forward(real *y, const Conv *c, const real *x, const real *w, const real *bias, const real *add,
                  const ConvScratch *s);
/* dx (as x) overwritten, or added to if `more`; NULL: not wanted. dw, db +=; both NULL: not wanted, and x is not
 * read. */
void conv_backward(real *dx, real *dw, real *db, const Conv *c, const real *dy, const real *x, const real *w, int more,
                   const ConvScratch *s);
/* How many multiplications that takes; the direct way takes C*M*9 (1x1: C*M) for each cell of y, and twice that
 * backward. */
double conv_multiplications(const Conv *c, int backward);
/* Sum of n numbers, in an order that depends on n alone, emptied from short chains into double. */
double sum_reals(const real *x, size_t n);

/* ------------------------------------------------------------------------------------------------------------
 * 3. checkpoint.c, ckpt.c: named tensors in files; params.c: in memory
 * ---------------------------------------------------------------------------------------------------------- */

/* ---- Flat configurations: the official YAML files as "dotted.key value" strings; a file's __metadata__ ---- */
typedef struct {
    char *key, *value;
} KeyValue;
typedef struct {
    KeyValue *kv;
    size_t n, capacity;
} Config;
Err config_set(Config *c, const char *key, const char *fmt, ...) PRINTF_LIKE(3, 4); /* replaces or appends */
const char *config_get(const Config *c, const char *prefix, const char *key);       /* prefix+key; NULL: absent */
/* A whole number in lo..hi. Absent: *out is left alone when optional, an error that names the key when not. */
Err config_size(size_t *out, const Config *c, const char *prefix, const char *key, size_t lo, size_t hi, int optional);
Err config_real(double *out, const Config *c, const char *prefix, const char *key, double lo, double hi, int optional);
Err config_flag(int *out, const Config *c, const char *prefix, const char *key, int optional); /* true | false */
/* "1,1,2,4" -> out[0..*n-1], at most max of them; "-" is an empty list. */
Err config_list(size_t *out, size_t *n, size_t max, const Config *c, const char *prefix, const char *key, int optional);
Err config_read(Config *c, const char *path); /* a text file of "key value" lines */
void config_free(Config *c);

/* ---- Files ---- */
typedef enum { DT_F64, DT_F32, DT_F16, DT_BF16, DT_I64, DT_I32, DT_I16, DT_I8, DT_U8, DT_BOOL, DT_COUNT } Dtype;
size_t dtype_size(Dtype d);
const char *dtype_name(Dtype d);                  /* "F32", ... as safetensors spells it */
Err dtype_of_store(Dtype *out, const char *name); /* f32, f16 or bf16: how weights for sampling are stored */

enum { TENSOR_DIMS = 8, NAME_MAX_BYTES = 160 };
typedef struct {
    char name[NAME_MAX_BYTES];
    Dtype dtype;
    int ndim;
    size_t dim[TENSOR_DIMS], size; /* size = product of dim, elements */
    const void *data;              /* reading: into the mapped file, maybe unaligned; writing: the caller's */
} Tensor;

typedef struct {
    Tensor *tensor; /* sorted by name */
    size_t n;
    Config meta; /* __metadata__ */
    void *map;
    size_t map_bytes;
    void *copies; /* of tensors whose elements do not lie in row-major order in the file */
    char path[1024];
} Checkpoint;

/* Maps a file, tells by its content what it is, and checks all of it before use: a safetensors file (header length,
 * JSON, names unique, dtypes known, shape product = byte length, no overlap, no gap, no tail) or a PyTorch .ckpt (zip
 * or older; SPEC section 11), whose meta then has "epoch" and "global_step". Errors name the file. */
Err checkpoint_open(Checkpoint *ck, const char *path);
void checkpoint_close(Checkpoint *ck);                                 /* safe on a zeroed struct */
const Tensor *checkpoint_find(const Checkpoint *ck, const char *name); /* NULL: no such tensor */
/* *out = the tensor; an error names it if it is missing or its shape differs. ndim < 0: any shape with `size`
 * elements. */
Err checkpoint_shaped(const Checkpoint *ck, const char *name, int ndim, const size_t *dim, size_t size,
                      const Tensor **out);
/* The same, then out[0..size-1] = its elements, converted. */
Err checkpoint_reals(const Checkpoint *ck, const char *name, int ndim, const size_t *dim, size_t size, real *out);
Err checkpoint_ints(const Checkpoint *ck, const char *name, size_t size,
                    int32_t *out);                /* from I64 I32 I16 U8; range-checked */
void tensor_to_reals(const Tensor *x, real *out); /* any dtype -> real; x->size elements */
/* Writes a safetensors file atomically: temporary name, flush, rename. Source data is `real` where from_real[i],
 * converted to tensor[i].dtype (F32, F16 or BF16 round to nearest even); else raw bytes of that dtype. */
Err checkpoint_write(const char *path, const Tensor *tensor, const int *from_real, size_t n, const Config *meta);
/* ckpt.c: what checkpoint_open and checkpoint_close call for PyTorch's files. */
Err ckpt_read(Checkpoint *ck);
void ckpt_free_copies(void *copies);
/* 64-bit FNV-1a over a file's bytes: tells which VQGAN made a token cache. */
Err file_checksum(uint64_t *out, const char *path);
/* digest.c. out = the digest of a file's bytes in small hexadecimal digits, as sha256sum and md5sum print it. */
typedef enum { DIGEST_SHA256, DIGEST_MD5 } DigestKind;
enum { DIGEST_TEXT_BYTES = 65 };
Err file_digest(char out[DIGEST_TEXT_BYTES], const char *path, DigestKind kind);
/* Atomic writing for any file: open a temporary beside path, write, then commit (flush, fsync, rename) or abandon
 * (remove). */
typedef struct {
    void *file; /* FILE* */
    char path[1024], temporary[1040];
} AtomicFile;
Err atomic_open(AtomicFile *f, const char *path);
Err atomic_write(AtomicFile *f, const void *data, size_t bytes);
Err atomic_commit(AtomicFile *f);
void atomic_abandon(AtomicFile *f);     /* safe after a failure or twice */
Err atomic_close(AtomicFile *f, Err e); /* commits if e, of writing it, is OK; else abandons it and gives e back */
/* Writes behind a file's end: all of it, or none of it and an error. */
Err file_append(const char *path, const void *data, size_t bytes);
/* Did the last of this thread's AtomicFiles and file_appends fail for want of room (ENOSPC, EDQUOT, EFBIG)? */
int disk_full(void);

/* ---- params.c: parameter tables. One row per tensor of a model; allocation, init, load, save, decay, optimizer, EMA
 * and gradient checks loop over the rows and nothing else knows names or order. ---- */
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
    size_t total;          /* elements of one arena, padding included */
    real *arena[5];        /* value, grad, m, v, ema: one allocation each */
    int bf16_moments;      /* set before the plan: m and v are kept in bf16, in half the memory */
    void *packed;          /* of all matrices */
    WeightFormat format;   /* how params_map keeps matrices; set before */
    struct Device *device; /* NULL, or the table's twin on a GPU, where everything then happens (device.h) */
    const struct DeviceOps *ops;
    void (*ready)(Params *p, size_t row); /* whom params_ready tells; NULL: nobody */
};
enum { PLAN_VALUE = 1, PLAN_GRAD = 2, PLAN_ADAM = 4, PLAN_EMA = 8 };
/* Appends a row; *index = its number (rows may move while the table grows: keep numbers, not pointers). */
Err params_add(Params *p, size_t *index, Init init, double scale, double decay, int ndim, const size_t *dim,
               const char *fmt, ...) PRINTF_LIKE(8, 9);
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
/* What one letter names below: 'v' value, 'g' grad, '1' m, '2' v, 'e' ema; it must have been planned.
 * Every row's `which` = tensor prefix+name, which must be there with its exact shape. _ema: ema_prefix + the name
 * without its dots, as the official EMA calls it (SPEC section 6). */
Err params_load(Params *p, const Checkpoint *ck, char which, const char *prefix);
Err params_load_ema(Params *p, const Checkpoint *ck, char which, const char *ema_prefix);
/* The values of a table without memory are those of the file where they lie, if they lie there as aligned reals, else
 * copies. For sampling: nothing may be written to them, and the file must stay open. strip_dots: EMA names.
 * p->format other than WEIGHTS_REAL: matrices have no value but are packed, row by row, so that a file's pages need not
 * stay in memory. */
Err params_map(Params *p, const Checkpoint *ck, const char *prefix, int strip_dots);
/* Packs the matrices of a table that has values, which stay, and sets p->format: for tests and benchmarks. */
Err params_pack(Params *p, WeightFormat format);
/* Tensors for checkpoint_write: `which` of every row, named prefix+name. Appends to *list (capacity grows). */
typedef struct {
    Tensor *tensor;
    int *from_real;
    size_t n, capacity;
    void *kept; /* data made for this list, freed with it; or NULL */
} TensorList;
Err tensor_list_params(TensorList *list, const Params *p, char which, const char *prefix, Dtype dtype);
Err tensor_list_add(TensorList *list, const char *name, Dtype dtype, int ndim, const size_t *dim, const void *data,
                    int from_real);
void tensor_list_free(TensorList *list);
void params_free(Params *p);

/* ------------------------------------------------------------------------------------------------------------
 * 4. images.c: pictures in and out
 * ---------------------------------------------------------------------------------------------------------- */
typedef struct {
    size_t H, W;
    uint8_t *rgb; /* (H,W,3) */
} Image;
enum { IMAGE_MAX_SIDE = 32768 };
/* PNG, JPEG or (where libwebp was found) WebP, told by content. Grey, palette, 16-bit, CMYK/YCCK become 8-bit RGB;
 * alpha is composited on white; EXIF orientation is applied. Truncated or foreign content is an error that names the
 * file. */
Err image_read(Image *im, const char *path);
/* The same from memory; errors name no file. upright = 0: EXIF orientation is ignored, as the official pipelines do. */
Err image_decode(Image *im, const uint8_t *bytes, size_t size, int upright);
Err image_read_gray(Image *im, const char *path); /* masks: rgb holds (H,W) grey values; alpha over black */
/* Atomic. text: tEXt/iTXt chunks (seed, model, options). */
Err image_write_png(const char *path, const Image *im, const Config *text);
void image_free(Image *im);
typedef enum {
    FILTER_NEAREST, /* source pixel floor(i*in/out) */
    FILTER_LINEAR,  /* OpenCV INTER_LINEAR: no antialias, exact 2:1 is a 2x2 mean */
    FILTER_BICUBIC  /* Pillow BICUBIC: antialiased, a = -0.5 */
} Filter;
Err image_resize(Image *out, const Image *in, size_t H, size_t W, Filter filter);

/* The official preprocessing of each dataset (SPEC section 10). */
typedef enum {
    PREP_FOLDER,   /* ours, for any folder: centre square, antialiased bicubic */
    PREP_FFHQ,     /* short side to size by FILTER_LINEAR, centre crop, no flip */
    PREP_IMAGENET, /* the same; training takes a random crop */
    PREP_LSUN      /* centre square, then FILTER_BICUBIC; training flips at random */
} Prep;
Err prep_read(Prep *out,
              const Config *c); /* data.prep of a recipe or a file: folder (without one), ffhq, imagenet, lsun */
/* out (3,size,size) = the picture in [-1,1] (u8/127.5 - 1). u_crop_y, u_crop_x in [0,1): where a random crop lies
 * (PREP_IMAGENET in training; pass -1 for a centre crop); flip: mirror left-right. */
Err image_prepare(real *out, const Image *im, Prep prep, size_t size, double u_crop_y, double u_crop_x, int flip);
/* images (planes,side,side): left and right change places. */
void image_mirror(real *images, size_t planes, size_t side);
/* (n,3,H,W) in [-1,1] -> one picture, `columns` wide, `gap` white pixels between; official u8 truncation
 * (255*clip((x+1)/2,0,1)). */
Err image_grid(Image *out, const real *images, size_t n, size_t H, size_t W, size_t columns, size_t gap);

/* data.c. A set of labelled pictures: files, or values in LMDBs (whose path is the LMDB's, a slash and the key). */
typedef struct {
    size_t n, n_classes;
    char **path;        /* sorted by name */
    int32_t *label;     /* index into class_name; 0 everywhere if there are no sub-folders */
    char **class_name;  /* sub-folder names, sorted; n_classes = 0: unlabelled */
    uint64_t identity;  /* hash of the names below the folder and of the sizes of the files */
    struct Lmdb **lmdb; /* (n_lmdb) open ones */
    size_t n_lmdb;
    struct Damage *damage; /* pictures that could not be decoded, as they are met */
} Dataset;
typedef enum { SPLIT_ALL, SPLIT_TRAIN, SPLIT_VAL } Split;
/* path: a folder (searched recursively; its sub-folders are the classes; a data.mdb is an LMDB of pictures), an LMDB's
 * file, or a text file with one picture path a line (relative to the list's folder). If the folder holds train/ and
 * val/ (or validation/, or ILSVRC2012_train/data/ and ILSVRC2012_validation/data/), or LSUN's NAME_train_lmdb and
 * NAME_val_lmdb, these are the split; else every picture whose name hashes into 1 of 20 is held out, the first if none
 * does. An empty set is an error. */
Err dataset_open(Dataset *d, const char *path, Split split);
/* The same, but of the folder `path` only what list files name (the official lists of FFHQ and LSUN; list NULL: all of
 * it). A name is a file below the folder, or the one picture or key anywhere in it that is called so but for the
 * extension; a missing one is an error. val_list, unless NULL: the validation pictures; then `list` is for training. */
Err dataset_open_lists(Dataset *d, const char *path, const char *list, const char *val_list, Split split);
void dataset_close(Dataset *d);
/* *im = picture i, decoded; *damaged: it cannot be, which is noted and no error; *im is empty then. An error is what
 * lies not in the picture, such as a disk that fails. Any number of threads at a time. */
Err dataset_picture(const Dataset *d, size_t i, int upright, Image *im, int *damaged);
size_t dataset_damaged(const Dataset *d); /* how many have been met so far */
/* Adds those to the list in the file at path: path, tab, why, a line each, sorted, each once. */
Err dataset_write_damaged(const Dataset *d, const char *path);
/* order[0..n-1] = the permutation of epoch `epoch` under `seed`. */
void epoch_order(uint32_t *order, size_t n, uint64_t seed, uint64_t epoch);
/* Label dropout: does row b of this micro batch lose its label, as it does with probability p? */
int label_dropped(double p, uint64_t seed, uint64_t micro, uint64_t b);

/* Batches read ahead by threads. Step s takes examples s*B .. s*B+B-1 of the endless sequence of epochs, whatever the
 * number of threads. For a damaged picture stands the next whole one in the order of the set. */
typedef struct Loader Loader;
typedef struct {
    Prep prep;           /* all but PREP_FOLDER ignore EXIF orientation, as the official code does */
    size_t B, size;      /* batch, pixels a side */
    size_t of, first;    /* of batches of `of` (0: B) the rows first..first+B-1: what other ranks take is left out */
    uint64_t seed, step; /* first step to deliver: resuming needs no other state */
    int train;           /* shuffle, random crop of the preset */
    int flip;            /* mirror half of the training pictures */
    int mark;            /* damaged pictures keep their place, with label -1 */
} LoaderConfig;
Err loader_start(Loader **l, const Dataset *d, const LoaderConfig *c);
/* The next batch: images (B,3,size,size), labels (B); valid until the next call. */
Err loader_next(Loader *l, const real **images, const int32_t **labels);
void loader_stop(Loader *l); /* NULL is fine */

/* tokens.c. A dataset encoded once. File: magic, sizes, checksum of the VQGAN, labels, then 16-bit tokens (n, flips,
 * N). */
typedef struct {
    size_t n, h, w, K, flips; /* flips: 1 as they are, 2 also mirrored */
    uint64_t vqgan;           /* file_checksum of the first stage */
    uint64_t source;          /* hash of the dataset's identity and preprocessing */
    int32_t *label;           /* (n) */
    uint16_t *token;          /* (n, flips, h*w) */
} Tokens;
Err tokens_write(const char *path, const Tokens *x);
Err tokens_read(Tokens *x, const char *path);
void tokens_free(Tokens *x);
/* Making one, so that a kill costs a batch at most. tokens_start: sizes says what `path` is to hold (n counts damaged
 * pictures too); what an earlier run left in path.part is continued if it is of the same first stage and dataset, from
 * picture `done`, a multiple of batch or all. Waits while another process makes the same file. */
typedef struct {
    Tokens sizes;
    size_t done, bytes; /* pictures; of a record */
    uint8_t *record;
    int fd;
    char path[1100], part[1110];
} TokensPart;
Err tokens_start(TokensPart *p, const char *path, const Tokens *sizes, size_t batch);
Err tokens_append(TokensPart *p, int32_t label, const int32_t *token); /* (flips, h*w); label -1: a damaged picture */
/* Writes path from what was appended, without the damaged pictures; x is it. The part file is removed. */
Err tokens_finish(TokensPart *p, Tokens *x);
void tokens_stop(TokensPart *p); /* releases; what was appended stays for the next start */

/* ------------------------------------------------------------------------------------------------------------
 * 5. vqgan.c, vqgan_layers.c: first stage, image <-> tokens (SPEC section 8; Esser et al. 2021, "Taming Transformers")
 * ---------------------------------------------------------------------------------------------------------- */
enum { VQ_LEVELS = 8 };
typedef struct { /* the official ddconfig and quantiser settings, under their official names */
    size_t ch, levels, ch_mult[VQ_LEVELS], num_res_blocks;
    size_t n_attn, attn_resolutions[VQ_LEVELS], resolution; /* attention where resolution/2^level is listed */
    size_t in_channels, out_ch, z_channels, embed_dim, n_embed;
    size_t re_embed; /* entries of the remap table `used`; 0: no remapping */
    int tanh_out;    /* the official code ignores it: see vqgan_create */
    int legacy;      /* 1 (official default): beta multiplies the codebook term; 0: the commitment term */
    double beta;     /* 0.25 */
} VqganConfig;
Err vqgan_config_read(VqganConfig *c, const Config *from, const char *prefix); /* prefix e.g. "model.params." */
Err vqgan_config_write(Config *to, const VqganConfig *c, const char *prefix);

typedef struct Vqgan Vqgan;
/* Builds the network and its parameter table (values are not allocated: params_plan). honour_tanh: apply tanh_out,
 * which the official decoder swallows silently. */
Err vqgan_create(Vqgan **v, const VqganConfig *c, int honour_tanh);
void vqgan_free(Vqgan *v);
const VqganConfig *vqgan_config(const Vqgan *v);
Params *vqgan_params(Vqgan *v);
size_t vqgan_K(const Vqgan *v); /* token values: re_embed or n_embed */
/* Parameters and, with re_embed, quantize.used from a checkpoint, names prefixed ("" or "first_stage_model."). */
Err vqgan_load(Vqgan *v, const Checkpoint *ck, const char *prefix);
/* The same, but the parameters are used where they lie in the file, which must stay open: see params_map. */
Err vqgan_map(Vqgan *v, const Checkpoint *ck, const char *prefix);
const int32_t *vqgan_used(const Vqgan *v); /* (re_embed) or NULL */
/* Sizes activations for batches up to B of pictures up to HxW (multiples of 2^(levels-1)); train: keep what backward
 * needs. One allocation; call again to change. */
Err vqgan_plan(Vqgan *v, size_t B, size_t H, size_t W, int train);
/* How much that allocates. Allocates nothing itself; there is no plan afterwards. */
Err vqgan_plan_bytes(Vqgan *v, size_t B, size_t H, size_t W, int train, size_t *bytes);

/* Additions and multiplications of a pass over encoder, decoder or both, convolutions done the direct way. */
double vqgan_flops(const Vqgan *v, size_t B, size_t H, size_t W, int encode, int decode);

/* images (B,in_channels,H,W) -> prequant (B,embed_dim,h,w) or NULL, raw (B,h*w) codebook entries or NULL, tokens
 * (B,h*w) remapped or NULL. A code outside `used` becomes a random token drawn from RNG_UNKNOWN under seed. */
Err vqgan_encode(Vqgan *v, const real *images, size_t B, size_t H, size_t W, uint64_t seed, real *prequant,
                 int32_t *raw, int32_t *tokens);
/* z (B,embed_dim,h,w): nearest codebook entries of given latents, then as above. */
Err vqgan_quantize(Vqgan *v, const real *z, size_t B, size_t h, size_t w, uint64_t seed, int32_t *raw, int32_t *tokens);
/* tokens (B,h*w) -> z (B,embed_dim,h,w), the codebook entries; a token outside 0..K-1 is an error. */
Err vqgan_lookup(Vqgan *v, const int32_t *tokens, size_t B, size_t h, size_t w, real *z);
/* z (B,embed_dim,h,w) -> images (B,out_ch,H,W), not clamped. */
Err vqgan_decode(Vqgan *v, const real *z, size_t B, size_t h, size_t w, real *images);
Err vqgan_decode_tokens(Vqgan *v, const int32_t *tokens, size_t B, size_t h, size_t w, real *images);

/* Training. forward: image -> quantise straight through -> reconstruction. *xrec (B,out_ch,H,W) points into the
 * activations; *codebook_loss as the official quantiser (mean over all elements).
 * backward: from dxrec (B,out_ch,H,W) and the weight of the codebook loss to every parameter's grad (+=) and to dimage
 * (B,in_channels,H,W; overwritten; may be NULL). */
Err vqgan_forward(Vqgan *v, const real *images, size_t B, size_t H, size_t W, const real **xrec, double *codebook_loss);
Err vqgan_backward(Vqgan *v, const real *dxrec, double codebook_weight, real *dimage);
/* Between the two, and changing nothing but dw (out_ch,C,3,3) and db (out_ch), overwritten: the gradient of the
 * decoder's last layer alone, whose weight's row vqgan_last_layer is. */
Err vqgan_last_gradient(Vqgan *v, const real *dxrec, real *dw, real *db);
const Param *vqgan_last_layer(const Vqgan *v);
/* What the last forward saw: latents z and straight-through z_q (B,embed_dim,h,w), raw codes (B,h*w). */
void vqgan_latents(const Vqgan *v, const real **z, const real **zq_st, const int32_t **raw);
/* l1 = mean|x-xrec|, l2 = mean (x-xrec)^2; dxrec (n) = w1 dl1 + w2 dl2 (overwritten; may be NULL). */
void image_loss(const real *x, const real *xrec, size_t n, double w1, double w2, double *l1, double *l2, real *dxrec);
/* Every codebook entry with usage[code] = 0 becomes a latent of the last forward, picked by RNG_CODES; its Adam moments
 * and EMA follow. Returns how many. Without it most of a codebook trained from scratch stays unused. */
size_t vqgan_restart_codes(Vqgan *v, const uint32_t *usage, uint64_t seed, uint64_t step);
/* The same in parts, where several processes share the latents: which of so many is picked for a code; the code becomes
 * latent (embed_dim), in the table here (params_send: on a GPU too). */
size_t vqgan_restart_pick(uint64_t seed, uint64_t step, size_t code, size_t latents);
void vqgan_restart_code(Vqgan *v, size_t code, const real *latent);

/* perceptual.c: LPIPS, how different two pictures look (Zhang et al. 2018; SPEC section 9). Its network is VGG16, with
 * frozen weights; tests take a smaller one. */
enum { PERCEPTUAL_STAGES = 5, PERCEPTUAL_DEPTH = 4 };
typedef struct {
    size_t width[PERCEPTUAL_STAGES], depth[PERCEPTUAL_STAGES]; /* channels and number of convolutions of each stage */
} PerceptualConfig;
PerceptualConfig perceptual_vgg16(void);
typedef struct Perceptual Perceptual;
/* Builds the table of weights, under the names of taming-transformers' LPIPS (values are not allocated). */
Err perceptual_create(Perceptual **p, const PerceptualConfig *c);
void perceptual_free(Perceptual *p);
Params *perceptual_params(Perceptual *p);
/* Every weight from the first of n open files that has it: as here, as "loss.perceptual_loss.*" of a VQGAN's
 * checkpoint, or as "features.*" of torchvision's VGG16. An error names the tensor that is missing, misshapen or not
 * finite. */
Err perceptual_load(Perceptual *p, const Checkpoint *ck, size_t n);
/* Memory for pictures of HxW, 16 or more along each side, in batches of about B; backward: also for the gradient. */
Err perceptual_plan(Perceptual *p, size_t B, size_t H, size_t W, int backward);
/* How much that allocates. Allocates nothing itself; there is no plan afterwards. */
Err perceptual_plan_bytes(Perceptual *p, size_t B, size_t H, size_t W, int backward, size_t *bytes);
/* *loss = mean over pictures of LPIPS(x, xrec), both (B,3,H,W) in [-1,1]. dxrec (as xrec) += weight * its gradient;
 * NULL: not wanted. */
Err perceptual_loss(Perceptual *p, const real *x, const real *xrec, size_t B, size_t H, size_t W, double weight,
                    double *loss, real *dxrec);

/* ------------------------------------------------------------------------------------------------------------
 * 5b. discriminator.c: tells pictures from reconstructions while a first stage is trained (SPEC section 9; the official
 *     NLayerDiscriminator).
 * ---------------------------------------------------------------------------------------------------------- */
typedef struct { /* the official disc_in_channels, disc_ndf, disc_num_layers */
    size_t in_channels, ndf, n_layers;
} DiscConfig;
/* prefix e.g. "model.params.lossconfig.params."; official defaults 3, 64, 3. */
Err disc_config_read(DiscConfig *c, const Config *from, const char *prefix);

typedef struct Discriminator Discriminator;
/* Rows have their official names, loss.discriminator.main.N.*, batch norm's buffers included, which are untrained. */
Err disc_create(Discriminator **d, const DiscConfig *c);
void disc_free(Discriminator *d);
Params *disc_params(Discriminator *d);
/* Sizes activations for B pictures of HxW, which every forward then has. features: room for disc_keep_features. One
 * allocation; call again to change. Pictures of which the layers leave nothing are an error. bytes: how much that is;
 * allocates nothing itself, and there is no plan afterwards. */
Err disc_plan(Discriminator *d, size_t B, size_t H, size_t W, int features);
Err disc_plan_bytes(Discriminator *d, size_t B, size_t H, size_t W, int features, size_t *bytes);
size_t disc_logits(const Discriminator *d); /* how many logits a forward gives: B*h*w */
/* images (B,in_channels,H,W), which must stay for backward -> *logits (B,1,h,w), in the activations. As in training:
 * batch norm takes the batch's own mean and variance; update: its buffers follow (momentum 0.1, unbiased variance). */
Err disc_forward(Discriminator *d, const real *images, int update, const real **logits);
/* From dlogits (B,1,h,w; NULL: zeros) and feature_weight times the gradient of disc_feature_loss to every parameter's
 * grad (+=) if `trained`, and to dimages (B,in_channels,H,W; overwritten; may be NULL). Any number of times after a
 * forward. */
Err disc_backward(Discriminator *d, const real *dlogits, double feature_weight, int trained, real *dimages);
/* Feature matching: the activations of the last forward stay for comparison; how far those of a later forward are from
 * them: the mean over the layers of mean |a - kept| after each leaky ReLU. Only the later forward gets a gradient. */
Err disc_keep_features(Discriminator *d);
double disc_feature_loss(const Discriminator *d);
/* Losses, means over n logits D(x); dlogits (n) = weight * gradient, overwritten.
 *   disc_loss       half of relu(1 - D) for genuine pictures, of relu(1 + D) for reconstructions; DISC_VANILLA: of
 *                   softplus(-D) and softplus(D). The discriminator's loss is the sum of both halves.
 *   generator_loss  -D
 *   adaptive_weight what the generator's loss is multiplied with, times disc_weight: |d nll/d W| / (|d g/d W| + 1e-4),
 *   at
 *                   most 1e4, W the weight of the decoder's last layer */
typedef enum { DISC_HINGE, DISC_VANILLA } DiscLoss;
double disc_loss(DiscLoss kind, const real *logits, size_t n, int genuine, double weight, real *dlogits);
double generator_loss(const real *logits, size_t n, double weight, real *dlogits);
double adaptive_weight(double nll_norm, double g_norm);

/* ------------------------------------------------------------------------------------------------------------
 * 6. transformer.cu, decode.cu, optimizer.cu: one reverse transition p(x_{t-1} | x_t) (paper section 3.2; SPEC
 *    sections 1, 2, 4, 6, 7, 14)
 * ---------------------------------------------------------------------------------------------------------- */
enum { MAX_SCALES = 64 };
typedef struct { /* of the Markov chain: section 7 */
    int T;
    float beta[MAX_SCALES + 1], alpha[MAX_SCALES + 1], alphacum[MAX_SCALES + 1]; /* index t; beta[0] = 0 */
} Schedule;
typedef enum { NET_X, NET_GPT } NetKind; /* encoder-decoder; decoder-only */
typedef enum { X_PLAIN, X_SCALED, X_FINE_SCALED, X_RESIDUAL, X_RESIDUAL_SCALED } XVariant;
typedef struct {
    NetKind kind;
    XVariant variant;                                             /* NET_X only */
    int n_scales;                                                 /* T: rows of log_scalors */
    int has_class;                                                /* prompt is (t, class) rather than (t) */
    size_t dim;                                                   /* n_embd */
    size_t enc_num_tokens, enc_depth, enc_heads, enc_max_seq_len; /* NET_X */
    size_t dec_num_tokens, dec_depth, dec_heads,
        dec_max_seq_len;                 /* NET_GPT: vocab_size = K, n_layer, n_head, block_size */
    size_t input_vocab_size, n_unmasked; /* NET_GPT */
    int tie_token_emb;                   /* NET_X */
} NetConfig;
/* From the official keys under prefix + "transformer_config."; has_class from "conditioner_config.target". */
Err net_config_read(NetConfig *c, const Config *from, const char *prefix);
Err net_config_write(Config *to, const NetConfig *c, const char *prefix);

typedef struct Transformer Transformer;
Err transformer_create(Transformer **m, const NetConfig *c);
void transformer_free(Transformer *m);
const NetConfig *transformer_config(const Transformer *m);
Params *transformer_params(Transformer *m);
/* Per-step alphas alpha[1..T] of the schedule, read by the residual variants (SPEC section 1). */
void transformer_set_alphas(Transformer *m, const float *alpha);
/* Sizes activations for batches up to B of N tokens. train: keep what backward needs; else: the KV caches of decoding
 * and a forward without backward. One allocation; call again to change. */
Err transformer_plan(Transformer *m, size_t B, size_t N, int train);
/* How much that allocates. Allocates nothing itself; there is no plan afterwards. */
Err transformer_plan_bytes(Transformer *m, size_t B, size_t N, int train, size_t *bytes);

/* logits[b,i,:] of p(x_{t-1}[i] | x_{t-1}[<i], x_t). Teacher forcing.
 *   x (B,N) x_{t-1}; x_t (B,N) (ignored by NET_GPT, may be NULL); t (B) 1..T; label (B) (has_class, else NULL)
 *   *logits (B,N,K) points into the activations. Tokens, t and labels out of range are errors. */
Err transformer_forward(Transformer *m, const int32_t *x, const int32_t *x_t, const int32_t *t, const int32_t *label,
                        size_t B, size_t N, const real **logits);
/* dlogits (B,N,K) -> grad of every parameter (+=); after transformer_forward under a training plan. */
Err transformer_backward(Transformer *m, const real *dlogits);

/* optimizer.cu. The losses (SPEC section 4), each a mean over B*N rows, in nats per token:
 *   hard = cross entropy of target (R); soft = KL(posterior (R,K) || softmax(logits)); loss = alpha soft + (1-alpha)
 * hard dlogits (R,K) = weight * dloss/dlogits, overwritten; may be NULL, may be the logits' own memory posterior may be
 * NULL when alpha = 0; then soft is reported as NAN.   R = B*N rows */
typedef struct {
    double loss, hard, soft;
} Loss;
Err denoising_loss(Loss *out, const real *logits, const int32_t *target, const real *posterior, size_t R, size_t K,
                   double alpha, double weight, real *dlogits);

/* decode.cu: KV-cached decoding. begin: runs the encoder and the cross-attention keys and values once (NET_X), or feeds
 * the prompt (NET_GPT: prompt tokens see each other). block: n <= B*DECODE_BLOCK cells in one pass: position i of batch
 * row b, fed the token in front of it, prev = x_{t-1}[b,i-1] (ignored at i = 0). Rows rise; a row's positions follow
 * each other and begin anywhere up to what it was fed before, what lay behind is forgotten: so guessed tokens are taken
 * back. *logits (n,K) points into the activations; each cell sees its row's earlier positions, those of this block
 * included. step: the block of position i of all rows, logits (B,K). Equal to transformer_forward up to rounding, and
 * to each other to the bit however positions are cut into blocks. */
enum { DECODE_BLOCK = 64 };
typedef struct {
    size_t b, i;
    int32_t prev;
} DecodeCell;
Err transformer_decode_begin(Transformer *m, const int32_t *x_t, const int32_t *t, const int32_t *label, size_t B,
                             size_t N);
Err transformer_decode_block(Transformer *m, const DecodeCell *cell, size_t n, const real **logits);
Err transformer_decode_step(Transformer *m, const int32_t *prev, size_t i, const real **logits);
/* What a block of decoding costs beside its cells, in cells: *pass for the block, *sample for every batch row in it. A
 * model, not a measurement (which would make programs depend on the clock); test/bench block shows what is true. */
void transformer_pass_cost(const Transformer *m, size_t N, double *pass, double *sample);

/* AdamW as PyTorch: p *= 1-lr*decay; m,v moments; bias correction with step = 1,2,...; rows marked untrained are left
 * alone. grad is read, not cleared. decay comes from each row times `decay_scale`. */
typedef struct {
    double lr, beta1, beta2, eps, decay_scale;
} AdamW;
void adamw_step(Params *p, const AdamW *o, uint64_t step);
/* x as one of the two bf16 beside it (itself if it is one), by 16 random bits: the mean over all of them is x. NaN and
 * infinity stay. Moments in bf16 are rounded so after every step, by random numbers of row, element and step alone;
 * values move by the moments before rounding. */
uint16_t round_at_random(float x, uint32_t random);
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

/* device.cu: the transformers on a GPU, if the program was built with nvcc (device.h says how).
 * Is there one? text (CUDA_TEXT_BYTES): its name, compute capability and memory; free, total: bytes of it. Each may be
 * NULL. FAILED says why not: a program without CUDA, no driver, no GPU, too old a GPU. */
enum { CUDA_TEXT_BYTES = 320 };
int cuda_built(void);                                     /* was this program made with CUDA? */
typedef enum { PRECISION_F32, PRECISION_BF16 } Precision; /* of activations and matrix products; sums are float */
Err cuda_find(char *text, size_t *free_bytes, size_t *total_bytes);
/* Of several processes on a machine each takes one GPU: before anything else, the one of this number. */
Err cuda_choose(size_t local);
/* What the GPU can do at best, for test/bench_cuda.c: seconds (medians) that a product of two n x n matrices takes, as
 * the networks multiply them, and a copy of `bytes` from one place in its memory to another, which reads and writes
 * them. */
Err cuda_measure(Precision precision, size_t n, size_t bytes, double *product, double *copy);
/* From here on this network is planned, run and updated on the GPU. Call it before transformer_plan; when the
 * parameters have their values, params_send. */
Err transformer_use_cuda(Transformer *m, Precision precision);
int transformer_on_cuda(const Transformer *m);
/* The same for a first stage, also before vqgan_plan: afterwards everything in section 5 computes there. */
Err vqgan_use_cuda(Vqgan *v, Precision precision);
int vqgan_on_cuda(Vqgan *v);
/* The same for what trains it, before disc_plan and perceptual_plan. Pictures, logits and gradients of pictures are the
 * host's in every call. */
Err disc_use_cuda(Discriminator *d, Precision precision);
Err perceptual_use_cuda(Perceptual *p, Precision precision);
/* A training pass that leaves logits where they are: transformer_forward, then denoising_loss against the posterior of
 * x_0 and x_t, then, if backward, transformer_backward. x0, x (= x_{t-1}), x_t (B,N), t, label (B). On the GPU only. */
Err transformer_loss_cuda(Transformer *m, const Schedule *s, const int32_t *x0, const int32_t *x, const int32_t *x_t,
                          const int32_t *t, const int32_t *label, size_t B, size_t N, double alpha, double weight,
                          int backward, Loss *out);
/* After transformer_decode_begin: draws all N positions of the n = B rows, which is what N steps of
 * transformer_decode_step, sample_probs and sample_pick give, without a word to the host in between. tokens (n,N).
 * Guided: the batch is n = B/2 samples with their class, then the same with none. On the GPU only. */
typedef struct {
    uint64_t seed;
    const uint64_t *stream; /* (n) of random numbers; index = position */
    double temperature;
    size_t top_k;
    const int32_t *known; /* (n,N) tokens that are forced where keep (N) is 1; both or neither */
    const uint8_t *keep;
    double *fit;                                 /* (n) += log probability of what is forced; NULL: not wanted */
    int (*progress)(void *context, size_t done); /* now and then; nonzero return stops with an error; or NULL */
    void *context;
    int guided;
    double guidance; /* then: logits = uncond + guidance (cond - uncond) */
} DrawOptions;
Err transformer_draw_cuda(Transformer *m, const DrawOptions *o, int32_t *tokens);

/* ------------------------------------------------------------------------------------------------------------
 * 7. diffusion.c: the Markov chain over tokens (paper section 3.1; SPEC sections 3 and 5); model.c, classes.c
 * ---------------------------------------------------------------------------------------------------------- */
/* redraw_prob as in the official configs: "geometric", a number, "alphacum:a0,a1,...", "ffhq_bernoulli_PSIM" (T = 2),
 * "bernoulli_PSIM" (T = 3 or 5), or "curve:FILE": equal steps of a metric curve (two columns: alphacum, metric). */
Err schedule_make(Schedule *s, const char *redraw_prob, int T);
/* The metric-spaced rule on n points (alphacum[i], metric[i]), in file order. */
Err schedule_from_curve(Schedule *s, const double *alphacum, const double *metric, size_t n, int T);
/* A transition's file: its alphats and alphacum buffers; without them, redraw_prob of its metadata. */
Err schedule_read(Schedule *s, const Checkpoint *ck, int T);

/* x (n) = one forward step: each token, with probability beta, becomes a uniform draw from 0..K-1. Token i uses index
 * first+i of the stream. */
void noise_step(int32_t *x, size_t n, size_t K, double beta, uint64_t seed, uint64_t stream, uint64_t first);
/* q (R,K) = q(x_{t-1} | x_t, x_0), rows sum to 1 (SPEC section 3, paper eq. 7). */
void posterior(real *q, const int32_t *x0, const int32_t *xt, size_t R, size_t K, const Schedule *s, int t);
/* Official order: (logits + guide)/temperature, top_k (ties with the k-th are all kept; 0 or >= K: no cut), softmax.
 * guide: -1 free, else the one token that is allowed. prob (K) is overwritten; temperature 0 puts all of it on the
 * first of the largest logits; logits with NaN (or nothing but -inf) make it all NaN. */
void sample_probs(real *prob, const real *logits, size_t K, int32_t guide, double temperature, size_t top_k);
/* Index of the first cumulative probability above u; skips zeros. -1 if nothing is above 0. */
int32_t sample_pick(const real *prob, size_t K, double u);

/* ---- model.c: a model as it lies on the disk: a VQGAN, a schedule and T transitions in one folder ---- */
typedef struct {
    const char *name, *folder, *vqgan, *zip, *schedule, *what; /* what: one line for --list */
    int T;
    const char *codes;    /* "548 / 1024" */
    const char *stand_in; /* the class of the bundled model that comes closest; NULL: any */
} NamedModel;
const NamedModel *named_models(size_t *n); /* the table */

typedef struct {
    char folder[1024], recipe[1100]; /* recipe: official files' configuration */
    Config meta;                     /* of scale 1 */
    Schedule schedule;
    Vqgan *vqgan;
    Checkpoint vqgan_file; /* its weights stay there */
    size_t h, w, K, side;  /* token grid, token values, picture side in pixels */
    size_t n_classes;
    char **class_name; /* all names of a class, after its synset if it has one: "n01440764 tench, Tinca tinca" */
    int loaded;        /* scale whose transition is in memory, 0: none. One at a time. */
    Transformer *net;
    Checkpoint file;                    /* its file: the weights stay there */
    NetConfig config[MAX_SCALES + 1];   /* [t] of scale t, [0] of all scales of a joint model */
    int32_t null_class[MAX_SCALES + 1]; /* [t] the label "no class" that scale t was trained with too; -1: none */
    int joint;                          /* one file for all scales */
    int official;                       /* the files are PyTorch's */
    int no_ema;           /* set after model_open: sample with the trained weights rather than their moving average */
    WeightFormat weights; /* set after model_open: how the transitions' matrices are kept */
    int cuda; /* set after model_open: the transitions run on the GPU, in f32 or, with bf16 weights, in bf16 */
} Model;
/* A recipe (models/NAME.txt) is a list of "part.key value" lines; part is vqgan, scale (encoder-decoder scales and
 * joint), last (scale T), joint or scaleN (that alone, overrides). Keys are the official configuration's. *to gets the
 * keys of one scale, 0: joint, or of the first stage. */
enum { RECIPE_VQGAN = -1 };
Err recipe_read(Config *to, const char *path, int scale);
/* name_or_folder: a named model, or a folder with vqgan.safetensors and scale1..scaleT.safetensors, or one with the
 * official scale1..scaleT.ckpt and, unless their tensors are a named model's, a recipe config.txt. *substituted is set
 * to the named entry when its weights are not installed and the bundled model was opened instead (the caller must say
 * so); NULL forbids that. */
Err model_open(Model *m, const char *name_or_folder, const NamedModel **substituted);
/* How many of a named model's files are here; missing: the first that is not, "" if all are. */
size_t model_files(char missing[32], const NamedModel *named);
/* The folder of a named model ("models/..."); any other name is a folder already. */
const char *model_folder(const char *name_or_folder);
Err model_scale(Model *m, int t); /* loads scale t's transition (EMA weights), releases the other */
void model_close(Model *m);
/* Bytes that sampling `batch` at a time holds; they are all needed throughout, weights in mapped files too: if the
 * kernel drops their pages, every token reads them from the disk again. */
typedef struct {
    size_t first_stage, scale; /* weights: of the VQGAN; of the largest transition, as one is loaded at a time */
    size_t activations;        /* what both plan, the caches of decoding among it, and `pictures` decoded pictures */
    size_t total;              /* of the host */
    size_t gpu_first_stage, gpu_scale, gpu_activations; /* with Model.cuda: the same on the GPU */
} ModelMemory;
Err model_memory(Model *m, size_t batch, size_t pictures, ModelMemory *out);
/* Once m->weights are chosen: everything computes on the GPU from now on. */
Err model_use_cuda(Model *m);
/* Of n pictures, how many decode_pictures decodes at a time. */
size_t decode_batch(const Model *m, size_t n);
/* What a transition's file holds: `which` ('v' or 'e') of every parameter as transformer.*, the schedule's buffers and,
 * unless compact, what follows from the rest and the official classes expect (masks, the second name of a tied
 * embedding): every name of the official state dict but first_stage_model.* and transformer_ema.* (SPEC sections 11 and
 * 12). */
Err transition_tensors(TensorList *list, Transformer *net, char which, const Schedule *s, Dtype store, int compact);
/* Writes the model as safetensors, weights as F32, F16 or BF16, into a folder that has no model. */
Err model_convert(Model *m, const char *folder, Dtype store);

/* ---- classes.c: what the classes are called ---- */
/* A recipe's imagebart.class_list FILE (relative to the recipe) becomes imagebart.classes, the file's text. */
Err classes_from_recipe(Config *to, const char *recipe);
/* imagebart.classes for a model trained on pictures in these folders: what a recipe listed stays if the folders are
 * those classes one by one, such as ImageNet's synsets; else it is the folders' names. */
Err classes_from_folders(Config *to, char *const *folder, size_t n);
/* m->class_name, n_classes from imagebart.classes: a class a line, or between commas; NULL: the numbers below rows,
 * which is how many classes the network knows. */
Err classes_open(Model *m, const char *list, size_t rows);
/* A class's first name, without its synset, for messages. */
enum { CLASS_TITLE_BYTES = 80 };
const char *class_title(char out[CLASS_TITLE_BYTES], const Model *m, size_t label);
/* How many classes have exactly this name or synset, whatever its case; *label = the first of them. */
size_t classes_named(const Model *m, const char *name, int32_t *label);
/* A number, a synset, a name or a part of one -> label; an ambiguous or unknown one is an error that lists what there
 * is. */
Err model_class(const Model *m, const char *name, int32_t *label);

/* ---- diffusion.c: drawing from a model ---- */
/* How blocks of several positions went at a scale: see SampleOptions.block. */
typedef struct {
    size_t passes;       /* of the decoder, over a block of every sample in a batch */
    size_t cells;        /* positions fed */
    size_t tokens;       /* positions done, known ones too */
    size_t tried, right; /* tokens drawn; of those, as guessed */
} DraftCounts;

typedef struct {
    size_t n;                           /* samples */
    uint64_t seed, first;               /* sample b uses the streams of number first+b */
    double temperature[MAX_SCALES + 1]; /* [t] */
    size_t top_k[MAX_SCALES + 1];       /* [t]; 0: all */
    size_t chain[MAX_SCALES + 1];       /* [t] forward-backward repeats, >= 1; 0 with known tokens: x_{t-1} = x_t */
    double guidance[MAX_SCALES + 1];    /* [t] classifier-free: logits = uncond + g (cond - uncond); 1: none */
    int official_temperature;           /* encoder-decoder scales ignore it, as the official code does */
    int uncached;                       /* tests: the whole prefix again for every token, no KV cache */
    const int32_t *label;               /* (n) or NULL */
    const int32_t *known;               /* (n,N) tokens to keep, or NULL */
    const uint8_t *keep;                /* (N) 1 = keep */
    size_t candidates;                  /* > 1: samples are candidates in groups of so many (n a multiple), see below */
    size_t block;        /* positions of a sample in a pass of the decoder: 0: as many as pay off; 1: one by one. All
                            give the same tokens: guesses only decide how much work that takes (diffusion.c) */
    DraftCounts *counts; /* [MAX_SCALES + 1], [t] is added to; or NULL */
    /* called after every pass of the decoder, with the positions that all samples have, and every scale; nonzero return
     * stops with an error */
    int (*progress)(void *context, int t, size_t repeat, size_t done, size_t of);
    void (*scale_done)(void *context, int t,
                       const int32_t *tokens); /* tokens (n,N) = x_{t-1}; t = T+1: the start x_T */
    void *context;
} SampleOptions;
void sample_defaults(SampleOptions *o, const Model *m);
/* Rows of the decoder's batch for n samples: with guidance at any scale two for each, with its class and with none. */
size_t sample_rows(const SampleOptions *o, const Model *m, size_t n);
/* One reverse step for o->n samples: tokens (n,N) x_t in, x_{t-1} out. repeat numbers the passes of a chain. Plans the
 * network for decoding. No guidance, which needs a Model. */
Err sample_scale(Transformer *net, const SampleOptions *o, int t, size_t repeat, size_t N, int32_t *tokens);
enum { BOUND_ROWS = 8 }; /* rows in a batch of the following two */
/* bound (n_classes) = what tells the class of a picture of which only some tokens of x_0 (N) are kept, the least being
 * the best: the variational bound (paper section 3.1) on them under each class, in nats per token, a mean over a few
 * draws of the chain of sum_t KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t, class)). What is not kept is noise at every
 * scale, which the networks of t >= 2 have learnt to expect; scale 1, whose decoder has read nothing but clean
 * pictures, has no say unless it is the only one. n_classes forward passes per scale. */
Err model_class_bounds(Model *m, const int32_t *tokens, const uint8_t *keep, uint64_t seed, double *bound);
/* bound (n) = how unlikely the model finds each picture (n,N) of class label (n; NULL: a model without classes): the
 * variational bound as above, of all tokens and over all scales. Two draws of the chain for each. */
Err model_picture_bounds(Model *m, const int32_t *tokens, const int32_t *label, size_t n, uint64_t seed, double *bound);
/* tokens (n,N) = x_0, by ancestral sampling t = T..1 (SPEC section 5), with the guide and chains of inpainting.
 * The guide forces known tokens without asking whether what was drawn before them agrees. Candidates ask: after every
 * pass each group is drawn anew from itself, a candidate's weight being the probability its pass gave the known tokens
 * (importance resampling); the first of each group is the result. */
Err model_sample(Model *m, const SampleOptions *o, int32_t *tokens);

/* nearest.c: how near drawn pictures, tokens (n,N), come to the training pictures of the dataset at path, mirrored ones
 * included: a line on stdout for each, a sum on stderr. Ends the first stage's plan. */
Err nearest_report(Model *m, const int32_t *tokens, size_t n, const char *path);

/* ------------------------------------------------------------------------------------------------------------
 * 8. cli.c: what the three programs share
 * ---------------------------------------------------------------------------------------------------------- */
/* One row per option: parsing and --help both read this table. */
typedef enum { OPT_END, OPT_HEADING, OPT_ARGUMENT, OPT_FLAG, OPT_STRING, OPT_SIZE, OPT_REAL, OPT_U64 } OptionKind;
typedef struct {
    OptionKind kind;
    const char *name;  /* "--steps", "-n"; for OPT_ARGUMENT what the help calls it; for OPT_HEADING its text */
    const char *value; /* how the help calls the value: "N" */
    void *out;     /* int (flag), const char * (argument, string), size_t, double, uint64_t; left alone if not given */
    double lo, hi; /* range of numbers */
    const char *help;
} Option;
/* Fills every *out. Numbers must parse whole and lie in range. -h and --help print intro and table, exit 0; wrong usage
 * prints one line and exits 2. */
void options_parse(int argc, char **argv, const Option *table, const char *intro);
void die(const char *fmt, ...) PRINTF_LIKE(1, 2);         /* "program: text" on stderr, exit 1 */
void usage_error(const char *fmt, ...) PRINTF_LIKE(1, 2); /* the same, exit 2 */
void check(Err e);                                        /* die(err_text()) on FAILED */
/* Is it the GPU? "cpu": no. "cuda": yes where it is built in and there is one, else dies. NULL: what IMAGEBART_DEVICE
 * in the environment says, else a GPU if there is one. say_cpu: a line on stderr, where there was a choice. */
int check_device(const char *device);
void say_cpu(void);
/* "a,b,c": the first value is for scale T, which is sampled first, and so on down; one value is for all. out[t]. */
Err parse_per_scale(double *out, int T, const char *list, double lo, double hi, const char *option);
/* stderr: a line that overwrites itself on a terminal, plain lines elsewhere, one every 10 s at most. */
void progress_line(const char *fmt, ...) PRINTF_LIKE(1, 2);
void progress_end(void);                       /* leaves the last progress line standing */
double seconds(void);                          /* monotonic clock */
const char *duration(char text[32], double s); /* "1 h 02 min", "3 min 05 s", "4.2 s" */
/* What ./sample and ./inpaint ask alike, and how both draw. SAMPLING_OPTIONS(a, ...) are the rows of an Option table.
 */
typedef struct {
    const char *model, *out, *class_name, *temperature, *top_k, *guidance, *chain_length, *device, *weights;
    size_t n, batch, block, threads;
    uint64_t seed; /* SEED_NOT_GIVEN: take one from the clock; it is printed and kept in the PNG */
    int official_temperature, no_ema, show;
} SamplingArgs;
#define SEED_NOT_GIVEN UINT64_MAX
#define SAMPLING_OPTIONS(a)                                                                                            \
    {OPT_U64, "--seed", "N", &(a).seed, 0, 0, "same seed, same pictures (default: from the clock; always printed)"},   \
        {OPT_STRING,                                                                                                   \
         "--class",                                                                                                    \
         "NAME|ID",                                                                                                    \
         &(a).class_name,                                                                                              \
         0,                                                                                                            \
         0,                                                                                                            \
         "which class, for models that have classes; ImageNet's also by synset\n(n02099601) or any WordNet name "      \
         "(\"golden retriever\")"},                                                                                    \
        {OPT_STRING,                                                                                                   \
         "--temperature",                                                                                              \
         "T,..",                                                                                                       \
         &(a).temperature,                                                                                             \
         0,                                                                                                            \
         0,                                                                                                            \
         "per scale, noisiest first, or one for all (default 1; lower is safer)"},                                     \
        {OPT_STRING,                                                                                                   \
         "--top-k",                                                                                                    \
         "K,..",                                                                                                       \
         &(a).top_k,                                                                                                   \
         0,                                                                                                            \
         0,                                                                                                            \
         "draw among the K likeliest tokens only; per scale or one for all\n(default 0: all)"},                        \
        {OPT_STRING,                                                                                                   \
         "--guidance",                                                                                                 \
         "G,..",                                                                                                       \
         &(a).guidance,                                                                                                \
         0,                                                                                                            \
         0,                                                                                                            \
         "more of the class: logits = uncond + G (cond - uncond); per scale or one\nfor all (default 1: none; "        \
         "needs ./train --label-dropout)"},                                                                            \
        {OPT_FLAG,                                                                                                     \
         "--official-temperature",                                                                                     \
         NULL,                                                                                                         \
         &(a).official_temperature,                                                                                    \
         0,                                                                                                            \
         0,                                                                                                            \
         "as the official code: --temperature acts on the noisiest scale only"},                                       \
        {OPT_STRING,                                                                                                   \
         "--chain-length",                                                                                             \
         "L,..",                                                                                                       \
         &(a).chain_length,                                                                                            \
         0,                                                                                                            \
         0,                                                                                                            \
         "passes of every scale, with some noise in between; per scale or one\nfor all"},                              \
        {OPT_FLAG,                                                                                                     \
         "--no-ema",                                                                                                   \
         NULL,                                                                                                         \
         &(a).no_ema,                                                                                                  \
         0,                                                                                                            \
         0,                                                                                                            \
         "the trained weights, not their moving average, where a file has both"},                                      \
        {OPT_STRING,                                                                                                   \
         "--weights",                                                                                                  \
         "TYPE",                                                                                                       \
         &(a).weights,                                                                                                 \
         0,                                                                                                            \
         0,                                                                                                            \
         "the transformers' matrices as f32 (default), bf16 or int8: faster,\nless exact"},                            \
        {OPT_SIZE, "--batch", "N", &(a).batch, 1, 4096, "samples computed side by side (default 16)"},                 \
        {OPT_SIZE,                                                                                                     \
         "--block",                                                                                                    \
         "N",                                                                                                          \
         &(a).block,                                                                                                   \
         0,                                                                                                            \
         DECODE_BLOCK,                                                                                                 \
         "guess ahead up to N positions: 1 none, 0 (default) as many as pay off;\nthe result does not depend on it"},  \
        {OPT_STRING,                                                                                                   \
         "--device",                                                                                                   \
         "cpu|cuda",                                                                                                   \
         &(a).device,                                                                                                  \
         0,                                                                                                            \
         0,                                                                                                            \
         "where everything runs (default: a GPU if there is one)"},                                                    \
        {OPT_SIZE, "--threads", "N", &(a).threads, 0, 4096, "0 (default): all; the result does not depend on it"}, {   \
        OPT_FLAG, "--show", NULL, &(a).show, 0, 0, "draw the result in the terminal too"                               \
    }
void sampling_start(SamplingArgs *a, Model *m,
                    const NamedModel **stand_in_for); /* threads, seed, model; dies on error */
/* What the user gave, else what the model's file recommends (imagebart.temperature, .top_k, .guidance,
 * imagebart.CHAIN_KEY), else 1, all, 1 and chain_default. Chains may have least_chain passes or more. */
void sampling_options(SampleOptions *o, const SamplingArgs *a, const Model *m, const char *chain_key,
                      const char *chain_default, double least_chain);
/* A line on stderr per scale: how many passes of the decoder it took, and how good the guesses were. */
void say_drafts(const DraftCounts *counts, int T);
int sampling_progress(void *context, int t, size_t repeat, size_t done, size_t of); /* SampleOptions.progress */
/* On stderr: how much memory this takes (see model_memory) and how much there is, and which vectors and how many
 * threads compute; dies if memory does not suffice. */
void sampling_memory(Model *m, size_t batch, size_t pictures);
/* The options as PNG text, for image_write_png. */
Err sampling_text(Config *text, const SamplingArgs *a, const SampleOptions *o, const Model *m);
/* images (n,3,side,side) decoded from tokens (n,N), a picture at a time. */
Err decode_pictures(Model *m, const int32_t *tokens, size_t n, real *images);
/* Draws a PNG file on stdout: Kitty or iTerm2 graphics where the terminal says it has them, else 24-bit half blocks. */
Err show_png(const char *path);
/* SIGINT, SIGTERM, SIGUSR1 and, without nohup, SIGHUP set a flag; a second one ends the program at once. */
void catch_interrupts(void);
int interrupted(void);

/* ------------------------------------------------------------------------------------------------------------
 * 9. parallel.c: ./train in more than one process, each with the whole model and a share of every batch
 * ---------------------------------------------------------------------------------------------------------- */
/* Joins the processes that mpirun or srun started together; without them there is one, and MPI is not touched. waiting,
 * unless NULL: called again and again while this process waits for others, with how long it has. Then exiting without
 * ranks_end ends the other processes too. Refuses: several processes without MPI in this build, or with another. */
Err ranks_start(void (*waiting)(double seconds));
void ranks_end(void);
size_t rank(void), ranks(void);             /* this process is number 0..ranks-1 */
size_t rank_local(void), ranks_local(void); /* the same among those on its machine */
int rank_threads(void); /* the processors of its machine, shared out; 0: all of them, there is one process */
/* Every rank calls these at the same time; they return when all have. x (n) = the sum over ranks; *flag = 1 if any has
 * it; bytes (n) are those of rank `from`. */
Err ranks_sum(double *x, size_t n);
Err ranks_sum_counts(uint32_t *x, size_t n);
Err ranks_any(int *flag);
Err ranks_broadcast(size_t from, void *bytes, size_t n);
/* OK if e is OK on every rank; else FAILED, with the text of the first rank that failed, on all of them. */
Err ranks_agree(Err e);
/* An error unless all ranks have the same bytes; what: how it calls them */
Err ranks_same(const void *bytes, size_t n, const char *what);
/* begin, then a backward pass, then end: every row's gradient is the sum over ranks. What params_ready says is complete
 * is on its way meanwhile. One table at a time; a rank whose backward failed calls end all the same. */
Err gradients_begin(Params *p);
Err gradients_end(Params *p);

#ifdef __cplusplus
}
#endif
#endif
