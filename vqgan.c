/* vqgan.c - the first stage: image <-> tokens (Esser et al. 2021, "Taming Transformers"; SPEC section 8).
 *
 * Owns: the encoder, the vector quantiser with its remap table, the decoder, each forward and backward, and the memory
 * they run in. Refuses: configurations that the official network cannot have (channels that 32 groups do not divide),
 * pictures that the levels do not divide, tokens outside the table.
 *
 * The network is a flat plan. vqgan_create lists every layer once, in execution order; a layer names the values
 * (activations) it reads and writes and its rows of the parameter table. Forward walks the list, backward walks it in
 * reverse, vqgan_plan walks it to find out how long every value is needed. From those lifetimes one allocation is laid
 * out: training keeps what backward needs, inference lets values take turns in the same memory.
 *
 *     image -> CONV3 -> [blocks, DOWN]* -> mid -> NORM, CONV3 -> CONV1 -> z          encode
 *     z -> QUANTIZE -> z_q -> CONV1 -> CONV3 -> mid -> [blocks, UP]* -> NORM, CONV3 -> image   decode
 *     block:     x + CONV3(NORM(CONV3(NORM(x))))      attention: x + CONV1(ATTEND(q, k, v))
 *
 * Every convolution, of any kind and in both directions, is one operation: gather patches of the source under a
 * stencil (a list of taps) and multiply them by a matrix of weights. That operation is cut into tiles whose patches
 * stay in the L2 cache; tiles are what threads share. See "Convolutions".
 *
 * Values are (B,C,h,w). Where the sum of two branches is formed, the last convolution of the branch adds the other one
 * (Layer.add); backward, the gradient of the sum *is* the gradient of the other branch, in the same memory.
 *
 * Read in this order: types; building the network; convolutions; norm, attention, quantiser; the walk; planning;
 * public functions. */

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "imagebart.h"

/* ---- Types ---- */

enum {
    GROUPS = 32,       /* of every GroupNorm */
    PARTS = 16,        /* partial sums of a weight gradient: fixed, so that threads do not change bits */
    CODES = 512,       /* codebook entries compared at a time */
    SPOTS = 256,       /* latents compared at a time */
    MAX_BLOCKS = 64,   /* num_res_blocks */
    MAX_WIDTH = 16384, /* channels */
    FEW_CHANNELS = 16, /* fewer: transforms cost more than they save */
    ALIGN = 16         /* reals between the starts of two areas: a cache line or more */
};
static const double NORM_EPS = 1e-6;
static const size_t PATCH_REALS = 64 * 1024; /* patches of a tile, unless that is less than MIN_COLUMNS */
static const size_t MIN_COLUMNS = 64;
static const size_t NONE = (size_t)-1;

typedef enum { CONV1, CONV3, DOWN, UP, NORM, ATTEND, QUANTIZE, TANH } Kind;

typedef struct {
    Kind kind;
    size_t in[3], out; /* values; in[1], in[2] only for ATTEND: q, k, v */
    size_t add;        /* convolutions: a value added to the result, or NONE */
    size_t weight;     /* row of the parameter table; the bias is the next row */
    int swish;         /* NORM: followed by x*sigmoid(x) */
    int more[3];       /* backward: in[i] already holds a gradient, add to it */
    size_t saved;      /* offset of what forward keeps: NORM (B,32,2), ATTEND (B,N,N) */
    size_t scratch;    /* offset of what backward needs: ATTEND (B,N,N) */
} Layer;

typedef struct {
    size_t C, level;  /* (B, C, H >> level, W >> level) */
    size_t act, grad; /* offsets in the arena; NONE: the caller's memory */
} Value;

struct Vqgan {
    VqganConfig c;
    Params params;
    Layer *layer;
    Value *value;
    size_t n_layers, n_values;
    size_t quantize, image, z, zq, xrec; /* layer; values */
    size_t codebook;                     /* row */
    int32_t *used, *inverse;             /* (re_embed), (n_embed): -1 = not in used */
    /* the plan */
    size_t B, H, W;
    int train;
    size_t threads, column_reals, stage_reals; /* per thread: patches, products */
    size_t columns, stages, weights, partials; /* offsets */
    size_t raw, code_norm, image_loss;         /* offsets */
    real *arena;
    /* the present run */
    size_t b, h, w; /* batch, picture */
    int ready;      /* vqgan_forward ran: backward may, once, for it reuses the activations' memory */
    int latents;    /* z, z_q and the codes of a forward stand */
    real **x, **dx; /* where every value and its gradient lie */
};

static size_t min_size(size_t a, size_t b) {
    return a < b ? a : b;
}

static size_t max_size(size_t a, size_t b) {
    return a > b ? a : b;
}

static size_t thread_index(void) {
#ifdef _OPENMP
    return (size_t)omp_get_thread_num();
#else
    return 0;
#endif
}

/* Threads of a loop that uses per-thread scratch: never more than were planned for. */
static int loop_threads(const Vqgan *v) {
    return (int)min_size((size_t)threads_get(), v->threads);
}

/* ---- Parameter table: names and order of the official state dict ---- */

typedef struct {
    char s[NAME_MAX_BYTES];
} Name;

PRINTF_LIKE(1, 2) static Name named(const char *fmt, ...) {
    Name name;
    va_list args;
    va_start(args, fmt);
    vsnprintf(name.s, sizeof name.s, fmt, args);
    va_end(args);
    return name;
}

static size_t width(const VqganConfig *c, size_t level) {
    return c->ch * c->ch_mult[level];
}

static int attends(const VqganConfig *c, size_t resolution) {
    for (size_t i = 0; i < c->n_attn; i++)
        if (c->attn_resolutions[i] == resolution) return 1;
    return 0;
}

/* The official encoder halves the configured resolution at every level, its decoder doubles what is left of it. */
static int encoder_attends(const VqganConfig *c, size_t level) {
    return attends(c, c->resolution >> level);
}

static int decoder_attends(const VqganConfig *c, size_t level) {
    const size_t top = c->levels - 1;
    return attends(c, c->resolution >> top << (top - level));
}

static Err conv_params(Params *p, const char *name, size_t in, size_t out, size_t kernel) {
    const size_t dim[4] = {out, in, kernel, kernel};
    const double bound = 1 / sqrt((double)(in * kernel * kernel));
    TRY(params_add(p, NULL, INIT_UNIFORM, bound, 0, 4, dim, "%s.weight", name));
    return params_add(p, NULL, INIT_UNIFORM, bound, 0, 1, dim, "%s.bias", name);
}

static Err norm_params(Params *p, const char *name, size_t C) {
    TRY(params_add(p, NULL, INIT_ONE, 0, 0, 1, &C, "%s.weight", name));
    return params_add(p, NULL, INIT_ZERO, 0, 0, 1, &C, "%s.bias", name);
}

/* One row pair `prefix.name`; kernel 0: a norm. */
static Err sub_params(Params *p, const char *prefix, const char *name, size_t in, size_t out, size_t kernel) {
    const Name full = named("%s.%s", prefix, name);
    return kernel ? conv_params(p, full.s, in, out, kernel) : norm_params(p, full.s, in);
}

static Err block_params(Params *p, const char *prefix, size_t in, size_t out) {
    TRY(sub_params(p, prefix, "norm1", in, in, 0));
    TRY(sub_params(p, prefix, "conv1", in, out, 3));
    TRY(sub_params(p, prefix, "norm2", out, out, 0));
    TRY(sub_params(p, prefix, "conv2", out, out, 3));
    return in == out ? OK : sub_params(p, prefix, "nin_shortcut", in, out, 1);
}

static Err attention_params(Params *p, const char *prefix, size_t C) {
    TRY(sub_params(p, prefix, "norm", C, C, 0));
    TRY(sub_params(p, prefix, "q", C, C, 1));
    TRY(sub_params(p, prefix, "k", C, C, 1));
    TRY(sub_params(p, prefix, "v", C, C, 1));
    return sub_params(p, prefix, "proj_out", C, C, 1);
}

static Err mid_params(Params *p, const char *side, size_t C) {
    TRY(block_params(p, named("%s.mid.block_1", side).s, C, C));
    TRY(attention_params(p, named("%s.mid.attn_1", side).s, C));
    return block_params(p, named("%s.mid.block_2", side).s, C, C);
}

/* The blocks of a level, then all of its attentions, as PyTorch lists the two module lists. */
static Err level_params(Params *p, const char *level, size_t n, size_t in, size_t out, int with_attention) {
    for (size_t i = 0; i < n; i++) TRY(block_params(p, named("%s.block.%zu", level, i).s, i ? out : in, out));
    for (size_t i = 0; with_attention && i < n; i++) TRY(attention_params(p, named("%s.attn.%zu", level, i).s, out));
    return OK;
}

static Err encoder_params(Params *p, const VqganConfig *c) {
    const size_t top = c->levels - 1;
    TRY(conv_params(p, "encoder.conv_in", c->in_channels, c->ch, 3));
    for (size_t i = 0; i <= top; i++) {
        const Name name = named("encoder.down.%zu", i);
        TRY(level_params(p, name.s, c->num_res_blocks, i ? width(c, i - 1) : c->ch, width(c, i),
                         encoder_attends(c, i)));
        if (i < top) TRY(sub_params(p, name.s, "downsample.conv", width(c, i), width(c, i), 3));
    }
    TRY(mid_params(p, "encoder", width(c, top)));
    TRY(norm_params(p, "encoder.norm_out", width(c, top)));
    return conv_params(p, "encoder.conv_out", width(c, top), c->z_channels, 3);
}

static Err decoder_params(Params *p, const VqganConfig *c) {
    const size_t top = c->levels - 1;
    TRY(conv_params(p, "decoder.conv_in", c->z_channels, width(c, top), 3));
    TRY(mid_params(p, "decoder", width(c, top)));
    for (size_t i = 0; i <= top; i++) {
        const Name name = named("decoder.up.%zu", i);
        TRY(level_params(p, name.s, c->num_res_blocks + 1, width(c, i < top ? i + 1 : top), width(c, i),
                         decoder_attends(c, i)));
        if (i > 0) TRY(sub_params(p, name.s, "upsample.conv", width(c, i), width(c, i), 3));
    }
    TRY(norm_params(p, "decoder.norm_out", width(c, 0)));
    return conv_params(p, "decoder.conv_out", width(c, 0), c->out_ch, 3);
}

static Err list_params(Vqgan *v) {
    const VqganConfig *c = &v->c;
    Params *p = &v->params;
    const size_t codes[2] = {c->n_embed, c->embed_dim};
    TRY(encoder_params(p, c));
    TRY(decoder_params(p, c));
    TRY(params_add(p, &v->codebook, INIT_UNIFORM, 1.0 / (double)c->n_embed, 0, 2, codes, "quantize.embedding.weight"));
    TRY(conv_params(p, "quant_conv", c->z_channels, c->embed_dim, 1));
    return conv_params(p, "post_quant_conv", c->embed_dim, c->z_channels, 1);
}

/* ---- Layers, in execution order. Each function appends to the list and returns the value it writes. ---- */

/* Row number of `prefix.name.weight`, or NONE. */
static size_t find_row(const Vqgan *v, const char *prefix, const char *name) {
    const Name full = named("%s%s%s.weight", prefix, *name ? "." : "", name);
    for (size_t i = 0; i < v->params.n; i++)
        if (strcmp(v->params.row[i].name, full.s) == 0) return i;
    return NONE;
}

static size_t add_value(Vqgan *v, size_t C, size_t level) {
    Value *x = &v->value[v->n_values];
    x->C = C;
    x->level = level;
    x->act = x->grad = NONE;
    return v->n_values++;
}

static Layer *add_layer(Vqgan *v, Kind kind, size_t in, size_t C, size_t level) {
    Layer *l = &v->layer[v->n_layers++];
    memset(l, 0, sizeof *l);
    l->kind = kind;
    l->in[0] = in;
    l->in[1] = l->in[2] = l->add = l->weight = NONE;
    l->out = add_value(v, C, level);
    return l;
}

static size_t conv(Vqgan *v, Kind kind, size_t in, size_t add, const char *prefix, const char *name) {
    const size_t row = find_row(v, prefix, name), level = v->value[in].level;
    Layer *l = add_layer(v, kind, in, v->params.row[row].dim[0],
                         kind == DOWN ? level + 1
                         : kind == UP ? level - 1
                                      : level);
    l->weight = row;
    l->add = add;
    return l->out;
}

static size_t norm(Vqgan *v, size_t in, int swish, const char *prefix, const char *name) {
    Layer *l = add_layer(v, NORM, in, v->value[in].C, v->value[in].level);
    l->weight = find_row(v, prefix, name);
    l->swish = swish;
    return l->out;
}

static size_t block(Vqgan *v, size_t x, const char *prefix) {
    size_t y = conv(v, CONV3, norm(v, x, 1, prefix, "norm1"), NONE, prefix, "conv1");
    y = norm(v, y, 1, prefix, "norm2");
    if (find_row(v, prefix, "nin_shortcut") != NONE) x = conv(v, CONV1, x, NONE, prefix, "nin_shortcut");
    return conv(v, CONV3, y, x, prefix, "conv2");
}

static size_t attention(Vqgan *v, size_t x, const char *prefix) {
    const size_t y = norm(v, x, 0, prefix, "norm");
    const size_t q = conv(v, CONV1, y, NONE, prefix, "q");
    const size_t k = conv(v, CONV1, y, NONE, prefix, "k");
    const size_t values = conv(v, CONV1, y, NONE, prefix, "v");
    Layer *l = add_layer(v, ATTEND, q, v->value[x].C, v->value[x].level);
    l->in[1] = k;
    l->in[2] = values;
    return conv(v, CONV1, l->out, x, prefix, "proj_out");
}

static size_t mid(Vqgan *v, size_t x, const char *side) {
    x = block(v, x, named("%s.mid.block_1", side).s);
    x = attention(v, x, named("%s.mid.attn_1", side).s);
    return block(v, x, named("%s.mid.block_2", side).s);
}

static size_t level_layers(Vqgan *v, size_t x, const char *level, size_t n, int with_attention) {
    for (size_t i = 0; i < n; i++) {
        x = block(v, x, named("%s.block.%zu", level, i).s);
        if (with_attention) x = attention(v, x, named("%s.attn.%zu", level, i).s);
    }
    return x;
}

static size_t encoder_layers(Vqgan *v, size_t x) {
    const VqganConfig *c = &v->c;
    x = conv(v, CONV3, x, NONE, "encoder.conv_in", "");
    for (size_t i = 0; i < c->levels; i++) {
        const Name name = named("encoder.down.%zu", i);
        x = level_layers(v, x, name.s, c->num_res_blocks, encoder_attends(c, i));
        if (i + 1 < c->levels) x = conv(v, DOWN, x, NONE, name.s, "downsample.conv");
    }
    x = norm(v, mid(v, x, "encoder"), 1, "encoder.norm_out", "");
    return conv(v, CONV3, x, NONE, "encoder.conv_out", "");
}

static size_t decoder_layers(Vqgan *v, size_t x) {
    const VqganConfig *c = &v->c;
    x = mid(v, conv(v, CONV3, x, NONE, "decoder.conv_in", ""), "decoder");
    for (size_t i = c->levels; i-- > 0;) {
        const Name name = named("decoder.up.%zu", i);
        x = level_layers(v, x, name.s, c->num_res_blocks + 1, decoder_attends(c, i));
        if (i > 0) x = conv(v, UP, x, NONE, name.s, "upsample.conv");
    }
    x = norm(v, x, 1, "decoder.norm_out", "");
    return conv(v, CONV3, x, NONE, "decoder.conv_out", "");
}

/* Which gradients a layer finds already begun when backward reaches it. */
static void mark_begun_gradients(Vqgan *v, char *begun) {
    for (size_t i = v->n_layers; i-- > 0;) {
        Layer *l = &v->layer[i];
        if (l->add != NONE) begun[l->add] = 1; /* in the memory of the gradient of l->out */
        for (int k = 0; k < 3 && l->in[k] != NONE; k++) {
            l->more[k] = begun[l->in[k]];
            begun[l->in[k]] = 1;
        }
    }
}

static Err build_layers(Vqgan *v, int with_tanh) {
    const VqganConfig *c = &v->c;
    const size_t most = 11 * ((2 * c->num_res_blocks + 1) * c->levels + 6) + 2 * c->levels + 16;
    TRY(mem_alloc(&v->layer, most, sizeof *v->layer, "vqgan: layers"));
    TRY(mem_alloc(&v->value, most + 1, sizeof *v->value, "vqgan: values"));
    v->image = add_value(v, c->in_channels, 0);
    v->z = conv(v, CONV1, encoder_layers(v, v->image), NONE, "quant_conv", "");
    v->quantize = v->n_layers;
    v->zq = add_layer(v, QUANTIZE, v->z, c->embed_dim, c->levels - 1)->out;
    v->xrec = decoder_layers(v, conv(v, CONV1, v->zq, NONE, "post_quant_conv", ""));
    if (with_tanh) v->xrec = add_layer(v, TANH, v->xrec, c->out_ch, 0)->out;
    TRY(mem_alloc(&v->x, 2 * v->n_values, sizeof *v->x, "vqgan: values"));
    v->dx = v->x + v->n_values;
    char *begun;
    TRY(mem_alloc(&begun, v->n_values, 1, "vqgan: gradients"));
    mark_begun_gradients(v, begun);
    free(begun);
    return OK;
}

/* ---- Arithmetic of the hot loops ---- */

/* e^x to about 1 ulp, in a form that compilers vectorise: e^x = 2^n e^r, |r| <= ln2/2. Adding 1.5*2^23 rounds to an
 * integer and leaves it in the low bits. Clamped where float ends; NaN stays NaN. */
static inline real exp_real(real x) {
#ifdef REAL_DOUBLE
    return exp(x);
#else
    x = x < -87.3f ? -87.3f : x;
    x = x > 88.3f ? 88.3f : x;
    const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000u;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
#endif
}

/* Sums run in LANES interleaved chains, so that they vectorise without leave to reorder, and are emptied into double
 * every RUN numbers. Order depends on n alone. */
enum { LANES = 32, RUN = 4096 };

static double empty_lanes(real lane[LANES]) {
    double s = 0;
    for (int l = 0; l < LANES; l++) {
        s += (double)lane[l];
        lane[l] = 0;
    }
    return s;
}

/* sum of x */
static double sum(const real *x, size_t n) {
    real lane[LANES] = {0};
    double s = 0;
    for (size_t i = 0; i < n; i += RUN) {
        const size_t end = min_size(n, i + RUN);
        size_t j = i;
        for (; j + LANES <= end; j += LANES)
            for (int l = 0; l < LANES; l++) lane[l] += x[j + (size_t)l];
        for (; j < end; j++) lane[0] += x[j];
        s += empty_lanes(lane);
    }
    return s;
}

/* sum of (x-mean)^2 */
static double sum_squares(const real *x, size_t n, real mean) {
    real lane[LANES] = {0};
    double s = 0;
    for (size_t i = 0; i < n; i += RUN) {
        const size_t end = min_size(n, i + RUN);
        size_t j = i;
        for (; j + LANES <= end; j += LANES)
            for (int l = 0; l < LANES; l++) lane[l] += (x[j + (size_t)l] - mean) * (x[j + (size_t)l] - mean);
        for (; j < end; j++) lane[0] += (x[j] - mean) * (x[j] - mean);
        s += empty_lanes(lane);
    }
    return s;
}

/* sum of x*y */
static double dot(const real *x, const real *y, size_t n) {
    real lane[LANES] = {0};
    double s = 0;
    for (size_t i = 0; i < n; i += RUN) {
        const size_t end = min_size(n, i + RUN);
        size_t j = i;
        for (; j + LANES <= end; j += LANES)
            for (int l = 0; l < LANES; l++) lane[l] += x[j + (size_t)l] * y[j + (size_t)l];
        for (; j < end; j++) lane[0] += x[j] * y[j];
        s += empty_lanes(lane);
    }
    return s;
}

/* ---- Convolutions ----
 *
 * All of them, in both directions, are matrix products of weights with patches of a source. The grid of results is cut
 * into tiles whose patches stay in the L2 cache; threads share tiles, and no sum crosses from one to another.
 *
 * Stencils serve 1x1 and strided convolutions, few channels and odd sizes. A stencil is a list of taps:
 *     result cell (spread*y + oy, spread*x + ox) = sum over taps of W[tap.cell] source(stride*y + dy, stride*x + dx)
 * with zeros outside the source. Backward, a convolution with stride 2 is four stencils, one for each parity of row and
 * column (SPEC section 8: its padding is right and below only).
 *
 * Winograd's F(2x2,3x3) (Lavin and Gray 2016) serves the other 3x3 convolutions: 16 multiplications instead of 36 for
 * 2x2 results. With the fixed matrices A, B, G below and U = G g G^T of a kernel g,
 *     2x2 results = A^T [U .* V] A,   V = B^T (4x4 source cells around them) B
 * so for each of the 16 elements k, V[k] (C, cells) is multiplied by U[k] (M, C). After nearest doubling (UP), the
 * third row and column of V vanish: 9 products remain.
 *
 * Backward, one gather of the gradient's patches serves both results:
 *     dX = W^T patches(dY)          dW^T = X patches(dY)^T
 * and Winograd's dX is the same algorithm with the kernel mirrored, which only exchanges rows 0 and 3 of U. */

enum { TAPS = 9, POINTS = 16 };

typedef struct {
    int dy, dx;
    size_t cell; /* of the kernel: ky*3 + kx */
} Tap;

typedef struct {
    size_t n, stride, spread, oy, ox;
    Tap tap[TAPS];
} Stencil;

/* One dimension of a stencil: offsets and kernel cells; the other dimension is alike. */
typedef struct {
    size_t n;
    int d[3];
    size_t cell[3];
} Axis;

static Stencil cross(const Axis *y, const Axis *x, size_t stride, size_t spread, size_t oy, size_t ox) {
    Stencil s;
    memset(&s, 0, sizeof s);
    s.stride = stride;
    s.spread = spread;
    s.oy = oy;
    s.ox = ox;
    for (size_t i = 0; i < y->n; i++)
        for (size_t j = 0; j < x->n; j++) {
            const Tap t = {y->d[i], x->d[j], 3 * y->cell[i] + x->cell[j]};
            s.tap[s.n++] = t;
        }
    return s;
}

/* Writes the stencils of a convolution; returns how many. */
static size_t stencils(Stencil s[4], Kind kind, int backward) {
    static const Axis one = {1, {0}, {0}}, down = {3, {0, 1, 2}, {0, 1, 2}};
    static const Axis conv3[2] = {{3, {-1, 0, 1}, {0, 1, 2}}, {3, {-1, 0, 1}, {2, 1, 0}}};
    static const Axis down_back[2] = {{2, {-1, 0}, {2, 0}}, {1, {0}, {1}}};
    if (kind == DOWN && backward) {
        for (size_t i = 0; i < 4; i++) s[i] = cross(&down_back[i / 2], &down_back[i % 2], 1, 2, i / 2, i % 2);
        return 4;
    }
    const Axis *axis = kind == CONV1 ? &one : kind == CONV3 ? &conv3[backward] : &down;
    s[0] = cross(axis, axis, kind == DOWN ? 2 : 1, 1, 0, 0);
    return 1;
}

/* One product: results (M, cells) = weights (M, C*n) x patches (C*n, cells); the cells of a stencil's grid, or 2x2
 * blocks of results for Winograd's algorithm, where n = POINTS. */
typedef struct {
    int winograd, up;
    Stencil s;
    size_t n, B, C, h, w;                  /* source (B,C,h,w) */
    size_t M, gh, gw;                      /* grid */
    size_t images, rows, row_tiles, tiles; /* a tile: `rows` grid rows of `images` pictures */
} Product;

typedef struct {
    size_t b, images, y, rows, cols; /* cols = images*rows*gw */
} Tile;

/* Columns of a tile's patches, if the grid is not wider. */
static size_t tile_columns(const Product *p) {
    return max_size(PATCH_REALS / (p->C * p->n), MIN_COLUMNS);
}

/* Cuts the grid: whole rows, several pictures where one is small. */
static void cut_tiles(Product *p) {
    const size_t rows = max_size(tile_columns(p) / p->gw, 1);
    p->images = p->row_tiles = 1;
    p->rows = p->gh;
    if (rows >= p->gh) {
        p->images = min_size(rows / p->gh, p->B);
    } else {
        p->row_tiles = (p->gh + rows - 1) / rows;
        p->rows = (p->gh + p->row_tiles - 1) / p->row_tiles; /* equal heights, not one thin rest */
        p->row_tiles = (p->gh + p->rows - 1) / p->rows;
    }
    p->tiles = (p->B + p->images - 1) / p->images * p->row_tiles;
}

static Tile tile_at(const Product *p, size_t i) {
    Tile t;
    t.b = i / p->row_tiles * p->images;
    t.images = min_size(p->images, p->B - t.b);
    t.y = i % p->row_tiles * p->rows;
    t.rows = min_size(p->rows, p->gh - t.y);
    t.cols = t.images * t.rows * p->gw;
    return t;
}

static size_t value_h(const Vqgan *v, size_t i) {
    return v->h >> v->value[i].level;
}

static size_t value_w(const Vqgan *v, size_t i) {
    return v->w >> v->value[i].level;
}

static size_t plane_size(const Vqgan *v, size_t i) {
    return value_h(v, i) * value_w(v, i);
}

static int wants_winograd(const Vqgan *v, const Layer *l) {
    const size_t C = v->value[l->in[0]].C, M = v->value[l->out].C;
    return l->kind == UP || (l->kind == CONV3 && min_size(C, M) >= FEW_CHANNELS && value_h(v, l->out) % 2 == 0 &&
                             value_w(v, l->out) % 2 == 0);
}

/* The products of a convolution, in the order in which they run; returns how many. */
static size_t products(Product p[4], const Vqgan *v, const Layer *l, int backward) {
    const size_t from = backward ? l->out : l->in[0], to = backward ? l->in[0] : l->out;
    const int winograd = wants_winograd(v, l);
    Stencil s[4];
    const size_t n = winograd ? 1 : stencils(s, l->kind, backward);
    for (size_t i = 0; i < n; i++) {
        memset(&p[i], 0, sizeof p[i]);
        p[i].winograd = winograd;
        p[i].up = l->kind == UP;
        if (!winograd) p[i].s = s[i];
        p[i].n = winograd ? (size_t)POINTS : s[i].n;
        p[i].B = v->b;
        p[i].C = v->value[from].C;
        p[i].h = value_h(v, from);
        p[i].w = value_w(v, from);
        p[i].M = v->value[to].C;
        p[i].gh = winograd ? value_h(v, l->out) / 2 : value_h(v, to) / s[i].spread;
        p[i].gw = winograd ? value_w(v, l->out) / 2 : value_w(v, to) / s[i].spread;
        cut_tiles(&p[i]);
    }
    return n;
}

/* -- Stencils -- */

/* to (rows,gw) = one tap of one plane, stride 1: a shifted copy with zeros where the shift leaves the plane */
static void gather_shifted(real *to, const real *plane, const Product *p, const Tile *t, Tap tap) {
    const size_t w = p->gw, above = tap.dy < 0 && t->y == 0, below = tap.dy > 0 && t->y + t->rows == p->gh;
    const size_t n = (t->rows - min_size(above + below, t->rows)) * w;
    memset(to, 0, above * w * sizeof(real));
    if (below) memset(to + (t->rows - 1) * w, 0, w * sizeof(real));
    if (n == 0) return;
    to += above * w;
    const real *from = plane + (t->y + above) * w;
    from = tap.dy < 0 ? from - w : tap.dy > 0 ? from + w : from;
    if (tap.dx == 0) {
        memcpy(to, from, n * sizeof(real));
    } else if (tap.dx < 0) {
        memcpy(to + 1, from, (n - 1) * sizeof(real));
        for (size_t i = 0; i < n; i += w) to[i] = 0;
    } else {
        memcpy(to, from + 1, (n - 1) * sizeof(real));
        for (size_t i = w - 1; i < n; i += w) to[i] = 0;
    }
}

/* The same for stride 2, where 0 <= dy, dx <= 2: what leaves the plane leaves it right or below. */
static void gather_strided(real *to, const real *plane, const Product *p, const Tile *t, Tap tap) {
    const size_t gw = p->gw, end = tap.dx == 2 ? gw - 1 : gw;
    for (size_t y = t->y; y < t->y + t->rows; y++, to += gw) {
        const size_t row = 2 * y + (size_t)tap.dy;
        const real *from = plane + row * p->w + tap.dx;
        const size_t inside = row < p->h ? end : 0;
        for (size_t x = 0; x < inside; x++) to[x] = from[2 * x];
        for (size_t x = inside; x < gw; x++) to[x] = 0;
    }
}

/* The patches of a tile: (C*n, cols) with row stride *ld, gathered into `to` unless they stand in the source already.
 */
static const real *gather(real *to, size_t *ld, const Product *p, const Tile *t, const real *in) {
    if (p->n == 1 && p->s.stride == 1 && t->images == 1) {
        *ld = p->h * p->w;
        return in + t->b * p->C * p->h * p->w + t->y * p->w;
    }
    *ld = t->cols;
    for (size_t c = 0; c < p->C; c++)
        for (size_t k = 0; k < p->n; k++)
            for (size_t b = 0; b < t->images; b++) {
                const real *plane = in + ((t->b + b) * p->C + c) * p->h * p->w;
                real *row = to + (c * p->n + k) * t->cols + b * t->rows * p->gw;
                if (p->s.stride == 1)
                    gather_shifted(row, plane, p, t, p->s.tap[k]);
                else
                    gather_strided(row, plane, p, t, p->s.tap[k]);
            }
    return to;
}

/* Where a tile's results stand in one picture and channel of out, and whether they are contiguous there. */
static size_t tile_offset(const Product *p, const Tile *t, size_t b, size_t m) {
    const size_t spread = p->s.spread, w = p->gw * spread;
    return ((b * p->M + m) * p->gh * spread + t->y * spread + p->s.oy) * w + p->s.ox;
}

static int tile_direct(const Product *p, const Tile *t) {
    return t->images == 1 && p->s.spread == 1;
}

/* out at the tile = stage (M, cols) + bias (M) + add (as out); bias and add may be NULL, add may be out itself */
static void store_tile(real *out, const Product *p, const Tile *t, const real *stage, size_t ld, const real *bias,
                       const real *add) {
    const size_t spread = p->s.spread, run = spread == 1 ? t->rows * p->gw : p->gw;
    for (size_t m = 0; m < p->M; m++)
        for (size_t b = 0; b < t->images; b++) {
            const real *from = stage + m * ld + b * t->rows * p->gw, shift = bias ? bias[m] : 0;
            size_t at = tile_offset(p, t, t->b + b, m);
            for (size_t y = 0; y < t->rows * p->gw; y += run, at += spread * spread * run, from += run) {
                if (spread == 1 && add)
                    for (size_t i = 0; i < run; i++) out[at + i] = from[i] + shift + add[at + i];
                else if (spread == 1)
                    for (size_t i = 0; i < run; i++) out[at + i] = from[i] + shift;
                else
                    for (size_t i = 0; i < run; i++) out[at + 2 * i] = from[i] + shift + (add ? add[at + 2 * i] : 0);
            }
        }
}

/* The tile's cells of x, shaped as out: (M, cols) with row stride *ld, copied to `stage` unless contiguous. */
static const real *load_tile(real *stage, size_t *ld, const Product *p, const Tile *t, const real *x) {
    const size_t spread = p->s.spread, run = p->gw;
    if (tile_direct(p, t)) {
        *ld = p->gh * p->gw;
        return x + tile_offset(p, t, t->b, 0);
    }
    *ld = t->cols;
    for (size_t m = 0; m < p->M; m++)
        for (size_t b = 0; b < t->images; b++) {
            real *to = stage + m * t->cols + b * t->rows * run;
            size_t at = tile_offset(p, t, t->b + b, m);
            for (size_t y = 0; y < t->rows; y++, at += spread * spread * run, to += run)
                for (size_t i = 0; i < run; i++) to[i] = x[at + spread * i];
        }
    return stage;
}

static size_t kernel_size(const Layer *l) {
    return l->kind == CONV1 ? 1 : 9;
}

/* Backward: weight (M, C*n) from w (C, M, kernel) */
static void transpose_weights(real *weight, const real *w, const Product *p, size_t kernel) {
#pragma omp parallel for
    for (size_t m = 0; m < p->M; m++)
        for (size_t c = 0; c < p->C; c++)
            for (size_t k = 0; k < p->n; k++)
                weight[(m * p->C + c) * p->n + k] = w[(c * p->M + m) * kernel + p->s.tap[k].cell];
}

/* dw (C, M, kernel) += total (C*n, M) */
static void add_stencil_gradient(real *dw, const real *total, const Product *p, size_t kernel) {
    for (size_t c = 0; c < p->C; c++)
        for (size_t k = 0; k < p->n; k++)
            for (size_t m = 0; m < p->M; m++)
                dw[(c * p->M + m) * kernel + p->s.tap[k].cell] += total[(c * p->n + k) * p->M + m];
}

static void stencil_forward(real *out, const Product *p, const Tile *t, const real *weight, const real *bias,
                            const real *in, const real *add, real *columns, real *stage) {
    const size_t K = p->C * p->n, hw = p->gh * p->gw;
    const int direct = tile_direct(p, t);
    real *to = direct ? out + tile_offset(p, t, t->b, 0) : stage;
    size_t ld, ld_to = direct ? hw : t->cols;
    const real *patch = gather(columns, &ld, p, t, in);
    gemm(0, 0, p->M, t->cols, K, weight, K, patch, ld, 0, to, ld_to);
    if (!direct || bias || add) store_tile(out, p, t, to, ld_to, bias, add);
}

/* partial (C*n, M) = or += patches(dy) x^T;  dx = or += weight patches(dy) unless NULL */
static void stencil_backward(real *dx, real *partial, const Product *p, const Tile *t, const real *weight,
                             const real *dy, const real *x, int begun, int more, real *columns, real *stage) {
    const size_t K = p->C * p->n;
    size_t ld, ldx;
    const real *patch = gather(columns, &ld, p, t, dy), *cells = load_tile(stage, &ldx, p, t, x);
    gemm(0, 1, K, p->M, t->cols, patch, ld, cells, ldx, begun, partial, p->M);
    if (!dx) return;
    const int direct = tile_direct(p, t);
    real *to = direct ? dx + tile_offset(p, t, t->b, 0) : stage;
    const size_t ld_to = direct ? p->gh * p->gw : t->cols;
    gemm(0, 0, p->M, t->cols, K, weight, K, patch, ld, direct && more, to, ld_to);
    if (!direct) store_tile(dx, p, t, stage, t->cols, NULL, more ? dx : NULL);
}

/* -- Winograd's algorithm. Elements of a 4x4 are numbered k = 4i + j; V and the products are (16, channels, cols), and
 *    every transform is two passes, along rows and along columns, over runs of n blocks.
 *
 *          1  0 -1  0           1   0   0             1  0
 *    B^T = 0  1  1  0     G =  1/2 1/2 1/2       A =  1  1
 *          0 -1  1  0          1/2 -1/2 1/2           1 -1
 *          0  1  0 -1           0   0   1             0 -1      -- */

#define NO_ALIAS __restrict /* of gcc, clang and nvcc, in C and C++ */

/* line (4,n) = one source row times B; row: 2n cells and one more on either side */
static void rows_times_b(real *NO_ALIAS line, const real *NO_ALIAS row, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const real a = row[2 * i], b = row[2 * i + 1], c = row[2 * i + 2], d = row[2 * i + 3];
        line[i] = a - c;
        line[n + i] = b + c;
        line[2 * n + i] = c - b;
        line[3 * n + i] = b - d;
    }
}

/* v[4 step i + x] = B^T times column x of four lines */
static void columns_times_b(real *NO_ALIAS v, size_t step, const real *NO_ALIAS a, const real *NO_ALIAS b,
                            const real *NO_ALIAS c, const real *NO_ALIAS d, size_t n) {
    for (size_t i = 0; i < n; i++) v[i] = a[i] - c[i];
    for (size_t i = 0; i < n; i++) v[4 * step + i] = b[i] + c[i];
    for (size_t i = 0; i < n; i++) v[8 * step + i] = c[i] - b[i];
    for (size_t i = 0; i < n; i++) v[12 * step + i] = b[i] - d[i];
}

/* The same two with A: a row of 2n cells; two lines. */
static void rows_times_a(real *NO_ALIAS line, const real *NO_ALIAS row, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const real a = row[2 * i], b = row[2 * i + 1];
        line[i] = a;
        line[n + i] = a + b;
        line[2 * n + i] = a - b;
        line[3 * n + i] = -b;
    }
}

static void columns_times_a(real *NO_ALIAS v, size_t step, const real *NO_ALIAS a, const real *NO_ALIAS b, size_t n) {
    for (size_t i = 0; i < n; i++) v[i] = a[i];
    for (size_t i = 0; i < n; i++) v[4 * step + i] = a[i] + b[i];
    for (size_t i = 0; i < n; i++) v[8 * step + i] = a[i] - b[i];
    for (size_t i = 0; i < n; i++) v[12 * step + i] = -b[i];
}

/* sum[r][j] = row r of A^T times column j of block i */
static inline void a_times_block(real sum[2][4], const real *m, size_t step, size_t i) {
    for (size_t j = 0; j < 4; j++) {
        const real a = m[j * step + i], b = m[(4 + j) * step + i], c = m[(8 + j) * step + i];
        sum[0][j] = a + b + c;
        sum[1][j] = b - c - m[(12 + j) * step + i];
    }
}

/* Two rows of 2n results, y0 and y1, = A^T m A + bias (+ add0, add1 unless NULL). */
static void blocks_to_rows(real *NO_ALIAS y0, real *NO_ALIAS y1, const real *NO_ALIAS m, size_t step, size_t n,
                           real bias) {
    for (size_t i = 0; i < n; i++) {
        real s[2][4];
        a_times_block(s, m, step, i);
        y0[2 * i] = s[0][0] + s[0][1] + s[0][2] + bias;
        y0[2 * i + 1] = s[0][1] - s[0][2] - s[0][3] + bias;
        y1[2 * i] = s[1][0] + s[1][1] + s[1][2] + bias;
        y1[2 * i + 1] = s[1][1] - s[1][2] - s[1][3] + bias;
    }
}

/* Backward of doubling: a result is the sum of its block, (1 1) A^T m A (1 1)^T with A (1 1)^T = (1 2 0 -1). */
static void blocks_to_sums(real *NO_ALIAS y, const real *NO_ALIAS m, size_t step, size_t n) {
    for (size_t i = 0; i < n; i++) {
        real s[2][4];
        a_times_block(s, m, step, i);
        for (size_t j = 0; j < 4; j++) s[0][j] += s[1][j];
        y[i] = s[0][0] + 2 * s[0][1] - s[0][3];
    }
}

/* Row `row` of a plane, doubled if `up`, at to[1..2*gw]. */
static void fetch_row(real *to, const real *plane, const Product *p, size_t row, int up) {
    if (!up) {
        memcpy(to + 1, plane + row * 2 * p->gw, 2 * p->gw * sizeof(real));
        return;
    }
    const real *from = plane + row / 2 * p->gw;
    for (size_t i = 0; i < p->gw; i++) to[1 + 2 * i] = to[2 + 2 * i] = from[i];
}

/* V (16, C, cols) = B^T d B of every block of a tile; lines: scratch of LINES(gw). Four lines go round: a row of blocks
 * shares two with the next. */
#define LINES(gw) (18 * (gw) + 2)
static void blocks_times_b(real *V, real *lines, const Product *p, const Tile *t, const real *in, int up) {
    const size_t gw = p->gw, step = p->C * t->cols, plane_size = p->h * p->w;
    real *row = lines + 16 * gw;
    row[0] = row[2 * gw + 1] = 0;
    for (size_t cb = 0; cb < p->C * t->images; cb++) {
        const size_t c = cb / t->images, b = cb % t->images;
        const real *plane = in + ((t->b + b) * p->C + c) * plane_size;
        real *v = V + c * t->cols + b * t->rows * gw, *line[4];
        for (size_t i = 0; i < 2 * t->rows + 2; i++) { /* source row 2y - 1 + i */
            for (size_t k = 0; k < 4; k++) line[k] = lines + (i + 1 + k) % 4 * 4 * gw;
            if (2 * t->y + i == 0 || 2 * t->y + i > 2 * p->gh) {
                memset(line[3], 0, 4 * gw * sizeof(real));
            } else {
                fetch_row(row, plane, p, 2 * t->y + i - 1, up);
                rows_times_b(line[3], row, gw);
            }
            if (i < 3 || i % 2 == 0) continue;
            for (size_t j = 0; j < 4; j++)
                columns_times_b(v + j * step, step, line[0] + j * gw, line[1] + j * gw, line[2] + j * gw,
                                line[3] + j * gw, gw);
            v += gw;
        }
    }
}

/* (16, M, cols) = A x A^T of every 2x2 block of x (B,M,2gh,2gw), or of x (B,M,gh,gw) doubled if up */
static void blocks_times_a(real *stage, real *lines, const Product *p, const Tile *t, const real *x) {
    const size_t gw = p->gw, step = p->M * t->cols, plane_size = p->gh * gw * (p->up ? 1 : 4);
    real *row = lines + 8 * gw;
    for (size_t mb = 0; mb < p->M * t->images; mb++) {
        const size_t m = mb / t->images, b = mb % t->images;
        const real *plane = x + ((t->b + b) * p->M + m) * plane_size;
        real *v = stage + m * t->cols + b * t->rows * gw;
        for (size_t y = t->y; y < t->y + t->rows; y++, v += gw) {
            for (size_t i = 0; i < 2; i++) {
                fetch_row(row, plane, p, 2 * y + i, p->up);
                rows_times_a(lines + 4 * i * gw, row + 1, gw);
            }
            for (size_t j = 0; j < 4; j++)
                columns_times_a(v + j * step, step, lines + j * gw, lines + (4 + j) * gw, gw);
        }
    }
}

/* out at the tile = the results of products stage (16, M, cols), + bias (M) + add (as out) unless NULL; sums: of 2x2 */
static void store_blocks(real *out, real *lines, const Product *p, const Tile *t, const real *stage, int sums,
                         const real *bias, const real *add) {
    const size_t gw = p->gw, step = p->M * t->cols, run = sums ? gw : 4 * gw;
    for (size_t m = 0; m < p->M; m++)
        for (size_t i = 0; i < t->images * t->rows; i++) {
            const size_t b = t->b + i / t->rows, y = t->y + i % t->rows, at = ((b * p->M + m) * p->gh + y) * run;
            const real *from = stage + m * t->cols + i * gw;
            real *to = add ? lines : out + at;
            if (sums)
                blocks_to_sums(to, from, step, gw);
            else
                blocks_to_rows(to, to + 2 * gw, from, step, gw, bias ? bias[m] : 0);
            for (size_t j = 0; add && j < run; j++) out[at + j] = to[j] + add[at + j];
        }
}

/* U (16, Cout, Cin) = G g G^T of every kernel g of w (Cout, Cin, 3, 3) */
static void winograd_weights(real *U, const real *w, size_t n) {
#pragma omp parallel for
    for (size_t i = 0; i < n; i++) {
        const real *g = w + 9 * i;
        for (size_t k = 0; k < 4; k++) {
            real h[3];
            for (size_t j = 0; j < 3; j++) {
                const real even = (g[j] + g[6 + j]) / 2, odd = g[3 + j] / 2;
                h[j] = k == 0 ? g[j] : k == 1 ? even + odd : k == 2 ? even - odd : g[6 + j];
            }
            real *u = U + 4 * k * n + i;
            u[0] = h[0];
            u[n] = (h[0] + h[2] + h[1]) / 2;
            u[2 * n] = (h[0] + h[2] - h[1]) / 2;
            u[3 * n] = h[2];
        }
    }
}

/* dw (Cout, Cin, 3, 3) += G^T dU G, total (16, Cout, Cin) */
static void add_winograd_gradient(real *dw, const real *total, size_t n) {
    for (size_t i = 0; i < n; i++) {
        real h[3][4], *g = dw + 9 * i;
        for (size_t j = 0; j < 4; j++) {
            const real *u = total + j * n + i;
            const real half_sum = (u[4 * n] + u[8 * n]) / 2, half_gap = (u[4 * n] - u[8 * n]) / 2;
            h[0][j] = u[0] + half_sum;
            h[1][j] = half_gap;
            h[2][j] = half_sum + u[12 * n];
        }
        for (size_t k = 0; k < 3; k++) {
            g[3 * k] += h[k][0] + (h[k][1] + h[k][2]) / 2;
            g[3 * k + 1] += (h[k][1] - h[k][2]) / 2;
            g[3 * k + 2] += (h[k][1] + h[k][2]) / 2 + h[k][3];
        }
    }
}

/* Element k of the mirrored kernel's U. */
static size_t mirrored(size_t k) {
    static const size_t mirror[4] = {3, 1, 2, 0};
    return 4 * mirror[k / 4] + mirror[k % 4];
}

static int vanishes(const Product *p, size_t k) {
    return p->up && (k / 4 == 2 || k % 4 == 2);
}

/* stage (16, M, cols) = U[k] V[k], backward with the mirrored kernel: U[mirrored(k)]^T V[k] */
static void winograd_products(real *stage, const Product *p, const Tile *t, const real *U, const real *V,
                              int backward) {
    const size_t n = p->M * t->cols, ldu = backward ? p->M : p->C;
    for (size_t k = 0; k < POINTS; k++) {
        const real *u = U + (backward ? mirrored(k) : k) * p->M * p->C;
        if (vanishes(p, k))
            memset(stage + k * n, 0, n * sizeof(real));
        else
            gemm(backward, 0, p->M, t->cols, p->C, u, ldu, V + k * p->C * t->cols, t->cols, 0, stage + k * n, t->cols);
    }
}

static void winograd_forward(real *out, const Product *p, const Tile *t, const real *U, const real *bias,
                             const real *in, const real *add, real *columns, real *stage) {
    real *lines = columns + POINTS * p->C * t->cols;
    blocks_times_b(columns, lines, p, t, in, p->up);
    winograd_products(stage, p, t, U, columns, 0);
    store_blocks(out, lines, p, t, stage, 0, bias, add);
}

/* partial (16, C, M) = or += dU;  dx = or += unless NULL */
static void winograd_backward(real *dx, real *partial, const Product *p, const Tile *t, const real *U, const real *dy,
                              const real *x, int begun, int more, real *columns, real *stage) {
    real *lines = columns + POINTS * p->C * t->cols;
    blocks_times_b(columns, lines, p, t, dy, 0);
    blocks_times_a(stage, lines, p, t, x);
    for (size_t k = 0; k < POINTS; k++)
        if (!vanishes(p, k))
            gemm(0, 1, p->C, p->M, t->cols, columns + k * p->C * t->cols, t->cols, stage + k * p->M * t->cols, t->cols,
                 begun, partial + mirrored(k) * p->C * p->M, p->M);
    if (!dx) return;
    winograd_products(stage, p, t, U, columns, 1);
    store_blocks(dx, lines, p, t, stage, p->up, NULL, more ? dx : NULL);
}

/* -- Both -- */

/* y = W * x + bias (+ add)     x (B,Cin,..)  y, add (B,Cout,..) */
static void conv_forward(Vqgan *v, const Layer *l) {
    const real *w = v->params.row[l->weight].value, *bias = v->params.row[l->weight + 1].value;
    const real *in = v->x[l->in[0]], *add = l->add == NONE ? NULL : v->x[l->add];
    real *out = v->x[l->out], *U = v->arena + v->weights;
    Product p[4];
    products(p, v, l, 0);
    if (p->winograd) winograd_weights(U, w, p->M * p->C);
#pragma omp parallel for schedule(dynamic) num_threads(loop_threads(v)) if (p->tiles >= (size_t)loop_threads(v))
    for (size_t j = 0; j < p->tiles; j++) {
        const Tile t = tile_at(p, j);
        real *columns = v->arena + v->columns + thread_index() * v->column_reals;
        real *stage = v->arena + v->stages + thread_index() * v->stage_reals;
        if (p->winograd)
            winograd_forward(out, p, &t, U, bias, in, add, columns, stage);
        else
            stencil_forward(out, p, &t, w, bias, in, add, columns, stage);
    }
}

/* dbias (C) += sums of dy (B,C,hw) over pictures and cells */
static void bias_backward(real *dbias, const real *dy, size_t B, size_t C, size_t hw) {
#pragma omp parallel for
    for (size_t c = 0; c < C; c++) {
        double s = 0;
        for (size_t b = 0; b < B; b++) s += sum(dy + (b * C + c) * hw, hw);
        dbias[c] += (real)s;
    }
}

/* partial[0] (n) += the others, in order */
static void add_parts(real *partial, size_t parts, size_t n) {
#pragma omp parallel for
    for (size_t at = 0; at < n; at += RUN) {
        const size_t end = min_size(n, at + RUN);
        for (size_t i = 1; i < parts; i++)
            for (size_t j = at; j < end; j++) partial[j] += partial[i * n + j];
    }
}

/* One product: dx, and partial sums of the weight gradient over runs of tiles, whose number no thread count changes. */
static void product_backward(Vqgan *v, const Layer *l, const Product *p) {
    const Param *w = &v->params.row[l->weight];
    const real *dy = v->dx[l->out], *x = v->x[l->in[0]];
    real *dx = v->dx[l->in[0]], *weight = v->arena + v->weights, *partial = v->arena + v->partials;
    const size_t n = p->C * p->n * p->M, parts = min_size(PARTS, p->tiles);
    if (p->winograd)
        winograd_weights(weight, w->value, p->M * p->C);
    else
        transpose_weights(weight, w->value, p, kernel_size(l));
#pragma omp parallel for schedule(dynamic) num_threads(loop_threads(v)) if (parts >= (size_t)loop_threads(v))
    for (size_t part = 0; part < parts; part++) {
        const size_t first = p->tiles * part / parts, end = p->tiles * (part + 1) / parts;
        real *columns = v->arena + v->columns + thread_index() * v->column_reals;
        real *stage = v->arena + v->stages + thread_index() * v->stage_reals;
        for (size_t k = 0; k < POINTS && p->up; k++)
            if (vanishes(p, k)) memset(partial + part * n + mirrored(k) * p->C * p->M, 0, p->C * p->M * sizeof(real));
        for (size_t j = first; j < end; j++) {
            const Tile t = tile_at(p, j);
            if (p->winograd)
                winograd_backward(dx, partial + part * n, p, &t, weight, dy, x, j > first, l->more[0], columns, stage);
            else
                stencil_backward(dx, partial + part * n, p, &t, weight, dy, x, j > first, l->more[0], columns, stage);
        }
    }
    add_parts(partial, parts, n);
    if (p->winograd)
        add_winograd_gradient(w->grad, partial, p->C * p->M);
    else
        add_stencil_gradient(w->grad, partial, p, kernel_size(l));
}

static void conv_backward(Vqgan *v, const Layer *l) {
    Product p[4];
    const size_t n = products(p, v, l, 1);
    for (size_t i = 0; i < n; i++) product_backward(v, l, &p[i]);
    bias_backward(v->params.row[l->weight + 1].grad, v->dx[l->out], v->b, v->value[l->out].C, plane_size(v, l->out));
}

/* ---- GroupNorm, with or without swish ---- */

/* y = swish(t), t = gamma (x - mean) rstd + beta     x, y (B,C,hw); saved (B,32,2) = mean, rstd of each group */
static void norm_forward(Vqgan *v, const Layer *l) {
    const real *gamma = v->params.row[l->weight].value, *beta = v->params.row[l->weight + 1].value;
    const size_t C = v->value[l->out].C, hw = plane_size(v, l->out), per = C / GROUPS, n = per * hw;
    real *saved = v->arena + l->saved;
#pragma omp parallel for
    for (size_t bg = 0; bg < v->b * GROUPS; bg++) {
        const real *x = v->x[l->in[0]] + bg * n;
        real *y = v->x[l->out] + bg * n;
        const real mean = (real)(sum(x, n) / (double)n);
        const real rstd = (real)(1 / sqrt(sum_squares(x, n, mean) / (double)n + NORM_EPS));
        saved[2 * bg] = mean;
        saved[2 * bg + 1] = rstd;
        for (size_t i = 0; i < per; i++, x += hw, y += hw) {
            const size_t c = bg % GROUPS * per + i;
            const real scale = rstd * gamma[c], shift = beta[c] - mean * scale;
            if (l->swish)
                for (size_t j = 0; j < hw; j++) {
                    const real t = x[j] * scale + shift, s = 1 / (1 + exp_real(-t));
                    y[j] = t * s;
                }
            else
                for (size_t j = 0; j < hw; j++) y[j] = x[j] * scale + shift;
        }
    }
}

/* dy (n) = dy swish'(t), in place; t = scale x + shift; swish' = s (1 + t (1-s)), s = sigmoid(t) */
static void swish_backward(real *dy, const real *x, size_t n, real scale, real shift) {
    for (size_t j = 0; j < n; j++) {
        const real t = x[j] * scale + shift, s = 1 / (1 + exp_real(-t));
        dy[j] *= s * (1 + t * (1 - s));
    }
}

/* With d = dL/dt and xhat = (x - mean) rstd, means over the group:
 *     dx = or += rstd (gamma d - mean(gamma d) - xhat mean(gamma d xhat))     dgamma += sum d xhat     dbeta += sum d
 * dy is overwritten with d; nothing reads it afterwards. channel (B,C,2): sums of d and d xhat of each plane. */
static void norm_backward(Vqgan *v, const Layer *l) {
    const real *gamma = v->params.row[l->weight].value, *beta = v->params.row[l->weight + 1].value;
    const size_t C = v->value[l->out].C, hw = plane_size(v, l->out), per = C / GROUPS, n = per * hw;
    const real *saved = v->arena + l->saved;
    real *channel = v->arena + v->partials;
#pragma omp parallel for
    for (size_t bg = 0; bg < v->b * GROUPS; bg++) {
        const real mean = saved[2 * bg], rstd = saved[2 * bg + 1];
        double d_mean = 0, dx_mean = 0;
        for (size_t i = 0; i < per; i++) {
            const size_t c = bg % GROUPS * per + i, at = bg * n + i * hw;
            const real *x = v->x[l->in[0]] + at, scale = rstd * gamma[c];
            real *d = v->dx[l->out] + at;
            if (l->swish) swish_backward(d, x, hw, scale, beta[c] - mean * scale);
            const double sum_d = sum(d, hw), sum_dx = (dot(d, x, hw) - (double)mean * sum_d) * (double)rstd;
            channel[2 * (bg * per + i)] = (real)sum_d;
            channel[2 * (bg * per + i) + 1] = (real)sum_dx;
            d_mean += (double)gamma[c] * sum_d / (double)n;
            dx_mean += (double)gamma[c] * sum_dx / (double)n;
        }
        const real slope = (real)(-dx_mean * (double)rstd * (double)rstd);
        const real offset = (real)(-d_mean * (double)rstd) - slope * mean;
        for (size_t i = 0; i < per; i++) {
            const size_t c = bg % GROUPS * per + i, at = bg * n + i * hw;
            const real *x = v->x[l->in[0]] + at, *d = v->dx[l->out] + at, scale = rstd * gamma[c];
            real *dx = v->dx[l->in[0]] + at;
            if (l->more[0])
                for (size_t j = 0; j < hw; j++) dx[j] += scale * d[j] + slope * x[j] + offset;
            else
                for (size_t j = 0; j < hw; j++) dx[j] = scale * d[j] + slope * x[j] + offset;
        }
    }
    real *dgamma = v->params.row[l->weight].grad, *dbeta = v->params.row[l->weight + 1].grad;
    for (size_t b = 0; b < v->b; b++)
        for (size_t c = 0; c < C; c++) {
            dbeta[c] += channel[2 * (b * C + c)];
            dgamma[c] += channel[2 * (b * C + c) + 1];
        }
}

/* ---- Attention over the cells of a picture, one head ---- */

/* p (n) = softmax of p */
static void softmax_row(real *p, size_t n) {
    real largest = p[0], total;
    for (size_t j = 1; j < n; j++) largest = p[j] > largest ? p[j] : largest;
    for (size_t j = 0; j < n; j++) p[j] = exp_real(p[j] - largest);
    total = (real)sum(p, n);
    for (size_t j = 0; j < n; j++) p[j] /= total;
}

/* y[:,i] = sum_j p[i,j] v[:,j],  p[i,:] = softmax(C^-0.5 q[:,i] . k[:,:])     q,k,v,y (B,C,N)  p (B,N,N) saved */
static void attend_forward(Vqgan *v, const Layer *l) {
    const size_t C = v->value[l->out].C, N = plane_size(v, l->out);
    const real scale = (real)(1 / sqrt((double)C));
#pragma omp parallel for schedule(dynamic) if (v->b > 1)
    for (size_t b = 0; b < v->b; b++) {
        const size_t at = b * C * N;
        real *p = v->arena + l->saved + b * N * N;
        gemm(1, 0, N, N, C, v->x[l->in[0]] + at, N, v->x[l->in[1]] + at, N, 0, p, N);
        for (size_t i = 0; i < N; i++) {
            for (size_t j = 0; j < N; j++) p[i * N + j] *= scale;
            softmax_row(p + i * N, N);
        }
        gemm(0, 1, C, N, N, v->x[l->in[2]] + at, N, p, N, 0, v->x[l->out] + at, N);
    }
}

/* dv = dy p,  dp = dy^T v,  ds = scale p (dp - sum_j dp p),  dq = k ds^T,  dk = q ds     ds (B,N,N) scratch */
static void attend_backward(Vqgan *v, const Layer *l) {
    const size_t C = v->value[l->out].C, N = plane_size(v, l->out);
    const real scale = (real)(1 / sqrt((double)C));
#pragma omp parallel for schedule(dynamic) if (v->b > 1)
    for (size_t b = 0; b < v->b; b++) {
        const size_t at = b * C * N;
        const real *dy = v->dx[l->out] + at, *p = v->arena + l->saved + b * N * N;
        real *ds = v->arena + l->scratch + b * N * N;
        gemm(0, 0, C, N, N, dy, N, p, N, l->more[2], v->dx[l->in[2]] + at, N);
        gemm(1, 0, N, N, C, dy, N, v->x[l->in[2]] + at, N, 0, ds, N);
        for (size_t i = 0; i < N; i++) {
            const real *row = p + i * N, mean = (real)dot(ds + i * N, row, N);
            for (size_t j = 0; j < N; j++) ds[i * N + j] = scale * row[j] * (ds[i * N + j] - mean);
        }
        gemm(0, 1, C, N, N, v->x[l->in[1]] + at, N, ds, N, l->more[0], v->dx[l->in[0]] + at, N);
        gemm(0, 0, C, N, N, v->x[l->in[0]] + at, N, ds, N, l->more[1], v->dx[l->in[1]] + at, N);
    }
}

/* ---- Vector quantiser ---- */

/* For n <= SPOTS latents, columns of z (D, row stride ld): the entry with the least |e|^2/2 - z.e, the first of equals.
 * That is half the squared distance less |z|^2/2, which all entries share. score (CODES, n) scratch. */
static void nearest_codes(const Vqgan *v, const real *z, size_t ld, size_t n, real *score, int32_t *code) {
    const size_t D = v->c.embed_dim;
    const real *book = v->params.row[v->codebook].value, *half_norm = v->arena + v->code_norm;
    real best[SPOTS];
    for (size_t k = 0; k < v->c.n_embed; k += CODES) {
        const size_t codes = min_size(CODES, v->c.n_embed - k);
        gemm(0, 0, codes, n, D, book + k * D, D, z, ld, 0, score, n);
        for (size_t i = 0; i < codes; i++) {
            const int32_t id = (int32_t)(k + i);
            const real half = half_norm[k + i];
            if (id == 0)
                for (size_t j = 0; j < n; j++) {
                    best[j] = half - score[j];
                    code[j] = 0;
                }
            for (size_t j = 0; j < n; j++) {
                const real d = half - score[i * n + j];
                code[j] = d < best[j] ? id : code[j];
                best[j] = d < best[j] ? d : best[j];
            }
        }
    }
}

/* raw (B,N) = nearest entries of z (B,D,N) */
static void nearest(Vqgan *v, const real *z, size_t B, size_t N, int32_t *raw) {
    const size_t D = v->c.embed_dim, per = (N + SPOTS - 1) / SPOTS;
    const real *book = v->params.row[v->codebook].value;
    real *half_norm = v->arena + v->code_norm;
#pragma omp parallel for num_threads(loop_threads(v))
    for (size_t k = 0; k < v->c.n_embed; k++) half_norm[k] = (real)(dot(book + k * D, book + k * D, D) / 2);
#pragma omp parallel for schedule(dynamic) num_threads(loop_threads(v)) if (B * per >= (size_t)loop_threads(v))
    for (size_t i = 0; i < B * per; i++) {
        const size_t b = i / per, at = i % per * SPOTS;
        real *score = v->arena + v->columns + thread_index() * v->column_reals;
        nearest_codes(v, z + b * D * N + at, N, min_size(SPOTS, N - at), score, raw + b * N + at);
    }
}

/* tokens (B,N) = raw remapped; a code that the table lacks becomes a random token (SPEC section 8: unknown_index) */
static void remap(const Vqgan *v, const int32_t *raw, size_t B, size_t N, uint64_t seed, int32_t *tokens) {
    const size_t K = vqgan_K(v);
    for (size_t b = 0; b < B; b++)
        for (size_t i = 0; i < N; i++) {
            int32_t token = v->inverse ? v->inverse[raw[b * N + i]] : raw[b * N + i];
            if (token < 0) token = (int32_t)rng_below(seed, rng_stream(RNG_UNKNOWN, 0, b), i, (uint32_t)K);
            tokens[b * N + i] = token;
        }
}

/* z_q = z + (e - z), e the nearest entry: straight through, rounding as the official code does */
static void quantize_forward(Vqgan *v, const Layer *l) {
    const size_t D = v->c.embed_dim, N = plane_size(v, l->out);
    const real *book = v->params.row[v->codebook].value;
    int32_t *raw = (int32_t *)(v->arena + v->raw);
    double *loss = (double *)(v->arena + v->image_loss);
    nearest(v, v->x[l->in[0]], v->b, N, raw);
#pragma omp parallel for
    for (size_t b = 0; b < v->b; b++) {
        const real *z = v->x[l->in[0]] + b * D * N;
        real *zq = v->x[l->out] + b * D * N;
        double s = 0;
        for (size_t d = 0; d < D; d++)
            for (size_t i = 0; i < N; i++) {
                const real e = book[(size_t)raw[b * N + i] * D + d], gap = e - z[d * N + i];
                zq[d * N + i] = z[d * N + i] + gap;
                s += (double)gap * (double)gap;
            }
        loss[b] = s;
    }
}

/* Both terms of the codebook loss have the value mse = mean (e-z)^2; one moves the encoder, one the codebook, and beta
 * weighs one of them. */
static double codebook_loss_value(const Vqgan *v, size_t elements) {
    const double *loss = (const double *)(v->arena + v->image_loss);
    double s = 0;
    for (size_t b = 0; b < v->b; b++) s += loss[b];
    return (1 + v->c.beta) * s / (double)elements;
}

/* dz = dz_q + weight w_z 2 (z-e)/n  (in place: dz is dz_q's memory)     de += weight w_e 2 (e-z)/n */
static void quantize_backward(Vqgan *v, const Layer *l, double loss_weight) {
    const size_t D = v->c.embed_dim, N = plane_size(v, l->out);
    const double unit = 2 * loss_weight / (double)(v->b * D * N);
    const real to_z = (real)(unit * (v->c.legacy ? 1 : v->c.beta)), to_e = (real)(unit * (v->c.legacy ? v->c.beta : 1));
    const real *book = v->params.row[v->codebook].value, *z = v->x[l->in[0]];
    const int32_t *raw = (const int32_t *)(v->arena + v->raw);
    real *dz = v->dx[l->in[0]], *dbook = v->params.row[v->codebook].grad;
    for (size_t b = 0; b < v->b; b++)
        for (size_t d = 0; d < D; d++)
            for (size_t i = 0; i < N; i++) {
                const size_t at = (b * D + d) * N + i, entry = (size_t)raw[b * N + i] * D + d;
                const real gap = z[at] - book[entry];
                dz[at] += to_z * gap;
                dbook[entry] -= to_e * gap;
            }
}

/* ---- tanh on the picture, where the configuration is taken at its word ---- */

static void tanh_forward(Vqgan *v, const Layer *l) {
    const size_t n = v->b * v->value[l->out].C * plane_size(v, l->out);
    const real *x = v->x[l->in[0]];
    real *y = v->x[l->out];
    for (size_t i = 0; i < n; i++) y[i] = (real)tanh((double)x[i]);
}

static void tanh_backward(Vqgan *v, const Layer *l) {
    const size_t n = v->b * v->value[l->out].C * plane_size(v, l->out);
    const real *y = v->x[l->out], *dy = v->dx[l->out];
    real *dx = v->dx[l->in[0]];
    for (size_t i = 0; i < n; i++) dx[i] = dy[i] * (1 - y[i] * y[i]);
}

/* ---- The walk ---- */

/* Points every value at its planned memory; the picture's size is that of this run, not of the plan. */
static void place_values(Vqgan *v, size_t B, size_t H, size_t W) {
    v->b = B;
    v->h = H;
    v->w = W;
    v->ready = v->latents = 0;
    for (size_t i = 0; i < v->n_values; i++) {
        v->x[i] = v->value[i].act == NONE ? NULL : v->arena + v->value[i].act;
        v->dx[i] = v->value[i].grad == NONE ? NULL : v->arena + v->value[i].grad;
    }
}

static void run_forward(Vqgan *v, size_t first, size_t end) {
    for (size_t i = first; i < end; i++) {
        const Layer *l = &v->layer[i];
        switch (l->kind) {
        case NORM: norm_forward(v, l); break;
        case ATTEND: attend_forward(v, l); break;
        case QUANTIZE: quantize_forward(v, l); break;
        case TANH: tanh_forward(v, l); break;
        default: conv_forward(v, l);
        }
    }
}

static void run_backward(Vqgan *v, double codebook_weight) {
    for (size_t i = v->n_layers; i-- > 0;) {
        const Layer *l = &v->layer[i];
        switch (l->kind) {
        case NORM: norm_backward(v, l); break;
        case ATTEND: attend_backward(v, l); break;
        case QUANTIZE: quantize_backward(v, l, codebook_weight); break;
        case TANH: tanh_backward(v, l); break;
        default: conv_backward(v, l);
        }
    }
}

/* ---- Planning ----
 *
 * Time is the number of the step that runs: forward of layer i is step i, its backward step 2n-1-i. An area is a piece
 * of memory needed during [from, to]; areas whose times overlap must not overlap in memory. */

typedef struct {
    size_t size, from, to, offset;
    size_t *target; /* where the offset is wanted */
} Area;

typedef struct {
    Area *area;
    size_t n, capacity;
} AreaList;

static Err add_area(AreaList *list, size_t *target, size_t size, size_t from, size_t to) {
    if (list->n == list->capacity) return err("vqgan: internal: %zu areas are not enough", list->capacity);
    Area *a = &list->area[list->n++];
    if (size > (size_t)-1 / sizeof(real) - ALIGN) return err("vqgan: an activation of %zu numbers is too large", size);
    a->size = (size + ALIGN - 1) / ALIGN * ALIGN;
    a->from = from;
    a->to = to;
    a->target = target;
    return OK;
}

/* B * C * h * w reals of a value at the planned size. */
static Err value_size(const Vqgan *v, size_t i, size_t *size) {
    const Value *x = &v->value[i];
    TRY(size_mul(size, v->B, x->C));
    TRY(size_mul(size, *size, v->H >> x->level));
    return size_mul(size, *size, v->W >> x->level);
}

static int needs_input(Kind kind) { /* backward reads what forward read */
    return kind != TANH;
}

/* Activations: from their making to their last use, which in training may be a backward. */
static Err value_areas(Vqgan *v, AreaList *list) {
    const size_t n = v->n_layers, last = 2 * n - 1;
    for (size_t i = 0; i < v->n_values; i++) {
        size_t from = 0, to = 0, size;
        if (!v->train && (i == v->image || i == v->xrec)) continue; /* the caller's */
        for (size_t j = 0; j < n; j++) {
            const Layer *l = &v->layer[j];
            if (l->out == i) from = to = j;
            const int reads = l->in[0] == i || l->in[1] == i || l->in[2] == i;
            if (reads || l->add == i) to = max_size(to, j);
            if (v->train && ((reads && needs_input(l->kind)) || (l->out == i && l->kind == TANH)))
                to = max_size(to, last - j);
        }
        if (v->train && (i == v->z || i == v->zq || i == v->xrec)) to = last + 1; /* shown to the caller */
        TRY(value_size(v, i, &size));
        TRY(add_area(list, &v->value[i].act, size, from, to));
    }
    return OK;
}

/* A value whose gradient lies in the memory of another one's: the addend of a sum, what the quantiser read. */
static size_t gradient_home(const Vqgan *v, size_t i) {
    for (size_t j = 0; j < v->n_layers; j++) {
        const Layer *l = &v->layer[j];
        if (l->add == i || (l->kind == QUANTIZE && l->in[0] == i)) return gradient_home(v, l->out);
    }
    return i;
}

/* Gradients: from the backward of the last layer that reads the value to the backward of the one that made it; a home
 * lives as long as all that share it. */
static Err gradient_areas(Vqgan *v, AreaList *list, size_t *home, size_t *from, size_t *to) {
    const size_t last = 2 * v->n_layers - 1;
    for (size_t i = 0; i < v->n_values; i++) {
        home[i] = gradient_home(v, i);
        from[i] = NONE;
        to[i] = 0;
    }
    for (size_t j = 0; j < v->n_layers; j++) {
        const Layer *l = &v->layer[j];
        const size_t out = home[l->out];
        to[out] = max_size(to[out], last - j);
        for (int k = 0; k < 3 && l->in[k] != NONE; k++) from[home[l->in[k]]] = min_size(from[home[l->in[k]]], last - j);
    }
    for (size_t i = 0; i < v->n_values; i++) {
        size_t size;
        if (home[i] != i || i == v->image || i == v->xrec) continue; /* those two are the caller's */
        TRY(value_size(v, i, &size));
        TRY(add_area(list, &v->value[i].grad, size, from[i], to[i]));
    }
    return OK;
}

static Err layer_areas(Vqgan *v, AreaList *list) {
    const size_t last = 2 * v->n_layers - 1;
    for (size_t j = 0; j < v->n_layers; j++) {
        Layer *l = &v->layer[j];
        const Value *x = &v->value[l->out];
        const size_t until = v->train ? last - j : j;
        size_t size, N;
        if (l->kind == NORM) TRY(add_area(list, &l->saved, v->B * GROUPS * 2, j, until));
        if (l->kind != ATTEND) continue;
        TRY(size_mul(&N, v->H >> x->level, v->W >> x->level));
        TRY(size_mul(&size, N, N));
        TRY(size_mul(&size, size, v->B));
        TRY(add_area(list, &l->saved, size, j, until));
        if (v->train) TRY(add_area(list, &l->scratch, size, last - j, last - j));
    }
    return OK;
}

/* What every step may use: patches and products of each thread, transformed weights, partial weight gradients. */
static Err scratch_areas(Vqgan *v, AreaList *list) {
    const size_t end = 2 * v->n_layers;
    size_t weights = 0, columns = CODES * SPOTS, stage = 0, partials = 0, size, N;
    v->b = v->B;
    v->h = v->H;
    v->w = v->W;
    for (size_t j = 0; j < v->n_layers; j++) {
        const Layer *l = &v->layer[j];
        if (l->kind == NORM) partials = max_size(partials, v->B * v->value[l->out].C * 2);
        for (int backward = 0; l->kind <= UP && backward <= v->train; backward++) {
            Product p[4];
            for (size_t i = products(p, v, l, backward); i-- > 0;) {
                const size_t cols = max_size(tile_columns(&p[i]), p[i].gw), K = p[i].C * p[i].n; /* smaller runs too */
                columns = max_size(columns, K * cols + LINES(p[i].gw));
                stage = max_size(stage, (p[i].winograd ? POINTS : 1) * p[i].M * cols);
                weights = max_size(weights, p[i].M * K);
                if (backward) partials = max_size(partials, PARTS * p[i].M * K);
            }
        }
    }
    v->column_reals = (columns + ALIGN - 1) / ALIGN * ALIGN;
    v->stage_reals = (stage + ALIGN - 1) / ALIGN * ALIGN;
    TRY(add_area(list, &v->columns, v->column_reals * v->threads, 0, end));
    TRY(add_area(list, &v->stages, v->stage_reals * v->threads, 0, end));
    TRY(add_area(list, &v->weights, weights, 0, end));
    TRY(add_area(list, &v->partials, partials, 0, end));
    TRY(value_size(v, v->z, &N));
    TRY(add_area(list, &v->raw, N / v->c.embed_dim, 0, end)); /* int32_t is no larger than real */
    TRY(add_area(list, &v->code_norm, v->c.n_embed, 0, end));
    TRY(size_mul(&size, v->B, sizeof(double) / sizeof(real)));
    return add_area(list, &v->image_loss, size, 0, end);
}

static int larger_first(const void *a, const void *b) {
    const Area *x = (const Area *)a, *y = (const Area *)b;
    if (x->size != y->size) return x->size > y->size ? -1 : 1;
    return x->from < y->from ? -1 : x->from > y->from;
}

/* Largest first, each to the lowest place that is free during its whole life. placed[] is kept sorted by offset. */
static Err lay_out(AreaList *list, size_t *total) {
    Area *placed;
    TRY(mem_alloc(&placed, list->n, sizeof *placed, "vqgan: plan"));
    qsort(list->area, list->n, sizeof *list->area, larger_first);
    *total = 0;
    for (size_t i = 0; i < list->n; i++) {
        Area a = list->area[i];
        size_t at = 0, k = i;
        for (size_t j = 0; j < i; j++) {
            const Area *o = &placed[j];
            if (o->from > a.to || a.from > o->to) continue;
            if (o->offset >= at + a.size) break;
            at = max_size(at, o->offset + o->size);
        }
        a.offset = *a.target = at;
        for (; k > 0 && placed[k - 1].offset > at; k--) placed[k] = placed[k - 1];
        placed[k] = a;
        *total = max_size(*total, at + a.size);
        if (*total > (size_t)-1 / sizeof(real) / 2) break;
    }
    free(placed);
    return OK;
}

static Err plan_areas(Vqgan *v, AreaList *list, size_t *lives) {
    for (size_t i = 0; i < v->n_values; i++) v->value[i].act = v->value[i].grad = NONE;
    TRY(value_areas(v, list));
    if (v->train) TRY(gradient_areas(v, list, lives, lives + v->n_values, lives + 2 * v->n_values));
    TRY(layer_areas(v, list));
    TRY(scratch_areas(v, list));
    size_t total;
    TRY(lay_out(list, &total));
    for (size_t i = 0; v->train && i < v->n_values; i++) v->value[i].grad = v->value[lives[i]].grad;
    return mem_alloc(&v->arena, total, sizeof(real), "vqgan: activations");
}

static Err check_picture(const Vqgan *v, size_t B, size_t H, size_t W, const char *where) {
    const size_t unit = (size_t)1 << (v->c.levels - 1);
    if (B == 0) return err("%s: an empty batch", where);
    if (H == 0 || W == 0 || H % unit || W % unit)
        return err("%s: a picture of %zux%zu; both sides must be multiples of %zu", where, H, W, unit);
    return OK;
}

Err vqgan_plan(Vqgan *v, size_t B, size_t H, size_t W, int train) {
    AreaList list = {NULL, 0, 3 * (v->n_values + v->n_layers) + 16};
    size_t *lives = NULL;
    free(v->arena);
    v->arena = NULL;
    v->ready = v->latents = 0;
    TRY(check_picture(v, B, H, W, "vqgan_plan"));
    if (B > 1 << 20 || H > 1 << 20 || W > 1 << 20)
        return err("vqgan_plan: %zu pictures of %zux%zu is too much", B, H, W);
    v->B = B;
    v->H = H;
    v->W = W;
    v->train = train != 0;
    v->threads = (size_t)threads_get();
    Err e = mem_alloc(&list.area, list.capacity, sizeof *list.area, "vqgan: plan");
    if (e == OK) e = mem_alloc(&lives, 3 * v->n_values, sizeof *lives, "vqgan: plan");
    if (e == OK) e = plan_areas(v, &list, lives);
    free(list.area);
    free(lives);
    return e;
}

static Err check_fits(const Vqgan *v, size_t B, size_t H, size_t W, const char *where) {
    if (!v->arena) return err("%s: call vqgan_plan first", where);
    TRY(check_picture(v, B, H, W, where));
    if (B > v->B || H > v->H || W > v->W)
        return err("%s: %zu pictures of %zux%zu; planned for %zu of %zux%zu", where, B, H, W, v->B, v->H, v->W);
    return OK;
}

/* The same for a grid of latents. */
static Err check_grid(const Vqgan *v, size_t B, size_t h, size_t w, const char *where) {
    const size_t shift = v->c.levels - 1, most = (size_t)1 << 20;
    return check_fits(v, B, min_size(h, most) << shift, min_size(w, most) << shift, where);
}

/* ---- Configuration ---- */

static Err refuse_flag(const Config *from, const char *prefix, const char *key, int wanted) {
    int flag = wanted;
    TRY(config_flag(&flag, from, prefix, key, 1));
    return flag == wanted ? OK : err("%s%s is not supported: must be %s", prefix, key, wanted ? "true" : "false");
}

Err vqgan_config_read(VqganConfig *c, const Config *from, const char *prefix) {
    enum { WIDE = MAX_WIDTH };
    const Name dd_name = named("%sddconfig.", prefix);
    const char *dd = dd_name.s;
    size_t *mult = c->ch_mult, *attn = c->attn_resolutions;
    memset(c, 0, sizeof *c);
    c->legacy = 1;
    c->beta = 0.25;
    TRY(config_size(&c->embed_dim, from, prefix, "embed_dim", 1, WIDE, 0));
    TRY(config_size(&c->n_embed, from, prefix, "n_embed", 1, 1 << 24, 0));
    TRY(config_size(&c->re_embed, from, prefix, "re_embed", 0, c->n_embed, 1));
    TRY(config_flag(&c->legacy, from, prefix, "legacy", 1));
    TRY(config_real(&c->beta, from, prefix, "beta", 0, 1e6, 1));
    TRY(config_size(&c->z_channels, from, dd, "z_channels", 1, WIDE, 0));
    TRY(config_size(&c->resolution, from, dd, "resolution", 1, 1 << 20, 0));
    TRY(config_size(&c->in_channels, from, dd, "in_channels", 1, WIDE, 0));
    TRY(config_size(&c->out_ch, from, dd, "out_ch", 1, WIDE, 0));
    TRY(config_size(&c->ch, from, dd, "ch", 1, WIDE, 0));
    TRY(config_list(mult, &c->levels, VQ_LEVELS, from, dd, "ch_mult", 0));
    TRY(config_size(&c->num_res_blocks, from, dd, "num_res_blocks", 1, MAX_BLOCKS, 0));
    TRY(config_list(attn, &c->n_attn, VQ_LEVELS, from, dd, "attn_resolutions", 0));
    TRY(config_flag(&c->tanh_out, from, dd, "tanh_out", 1));
    TRY(refuse_flag(from, dd, "double_z", 0));
    return refuse_flag(from, dd, "resamp_with_conv", 1);
}

static Err write_list(Config *to, const char *key, const size_t *x, size_t n) {
    char text[VQ_LEVELS * 24] = "-";
    for (size_t i = 0, at = 0; i < n; i++)
        at += (size_t)snprintf(text + at, sizeof text - at, "%s%zu", i ? "," : "", x[i]);
    return config_set(to, key, "%s", text);
}

Err vqgan_config_write(Config *to, const VqganConfig *c, const char *prefix) {
    const struct {
        const char *key;
        size_t value;
    } sizes[] = {{"embed_dim", c->embed_dim},
                 {"n_embed", c->n_embed},
                 {"re_embed", c->re_embed},
                 {"ddconfig.z_channels", c->z_channels},
                 {"ddconfig.resolution", c->resolution},
                 {"ddconfig.in_channels", c->in_channels},
                 {"ddconfig.out_ch", c->out_ch},
                 {"ddconfig.ch", c->ch},
                 {"ddconfig.num_res_blocks", c->num_res_blocks}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        TRY(config_set(to, named("%s%s", prefix, sizes[i].key).s, "%zu", sizes[i].value));
    TRY(write_list(to, named("%sddconfig.ch_mult", prefix).s, c->ch_mult, c->levels));
    TRY(write_list(to, named("%sddconfig.attn_resolutions", prefix).s, c->attn_resolutions, c->n_attn));
    TRY(config_set(to, named("%sddconfig.double_z", prefix).s, "false"));
    TRY(config_set(to, named("%sddconfig.tanh_out", prefix).s, "%s", c->tanh_out ? "true" : "false"));
    TRY(config_set(to, named("%slegacy", prefix).s, "%s", c->legacy ? "true" : "false"));
    return config_set(to, named("%sbeta", prefix).s, "%.17g", c->beta);
}

static Err check_range(const char *key, size_t x, size_t lo, size_t hi) {
    return x >= lo && x <= hi ? OK : err("vqgan: %s is %zu, expected %zu..%zu", key, x, lo, hi);
}

static Err check_config(const VqganConfig *c) {
    TRY(check_range("ch", c->ch, 1, MAX_WIDTH));
    TRY(check_range("number of levels (ch_mult)", c->levels, 1, VQ_LEVELS));
    TRY(check_range("number of attn_resolutions", c->n_attn, 0, VQ_LEVELS));
    TRY(check_range("num_res_blocks", c->num_res_blocks, 1, MAX_BLOCKS));
    TRY(check_range("resolution", c->resolution, 1, 1 << 20));
    TRY(check_range("in_channels", c->in_channels, 1, MAX_WIDTH));
    TRY(check_range("out_ch", c->out_ch, 1, MAX_WIDTH));
    TRY(check_range("z_channels", c->z_channels, 1, MAX_WIDTH));
    TRY(check_range("embed_dim", c->embed_dim, 1, MAX_WIDTH));
    TRY(check_range("n_embed", c->n_embed, 1, 1 << 24));
    TRY(check_range("re_embed", c->re_embed, 0, c->n_embed));
    if (c->ch % GROUPS) return err("vqgan: ch is %zu, expected a multiple of %d", c->ch, GROUPS);
    for (size_t i = 0; i < c->levels; i++) TRY(check_range("ch_mult", c->ch_mult[i], 1, MAX_WIDTH / c->ch));
    if (!(c->beta >= 0 && c->beta < 1e6)) return err("vqgan: beta is %g, expected 0..1e6", c->beta);
    return OK;
}

/* ---- Public functions: life of a first stage ---- */

static Err make_remap(Vqgan *v) {
    const size_t n = v->c.re_embed;
    if (n == 0) return OK;
    TRY(mem_alloc(&v->used, n, sizeof *v->used, "vqgan: used codes"));
    TRY(mem_alloc(&v->inverse, v->c.n_embed, sizeof *v->inverse, "vqgan: used codes"));
    for (size_t i = 0; i < v->c.n_embed; i++) v->inverse[i] = i < n ? (int32_t)i : -1;
    for (size_t i = 0; i < n; i++) v->used[i] = (int32_t)i;
    return OK;
}

Err vqgan_create(Vqgan **out, const VqganConfig *c, int honour_tanh) {
    Vqgan *v;
    *out = NULL;
    TRY(check_config(c));
    TRY(mem_alloc(&v, 1, sizeof *v, "vqgan"));
    v->c = *c;
    if (list_params(v) != OK || build_layers(v, c->tanh_out && honour_tanh) != OK || make_remap(v) != OK) {
        vqgan_free(v);
        return FAILED;
    }
    *out = v;
    return OK;
}

void vqgan_free(Vqgan *v) {
    if (!v) return;
    params_free(&v->params);
    free(v->layer);
    free(v->value);
    free(v->x);
    free(v->used);
    free(v->inverse);
    free(v->arena);
    free(v);
}

const VqganConfig *vqgan_config(const Vqgan *v) {
    return &v->c;
}

Params *vqgan_params(Vqgan *v) {
    return &v->params;
}

size_t vqgan_K(const Vqgan *v) {
    return v->c.re_embed ? v->c.re_embed : v->c.n_embed;
}

const int32_t *vqgan_used(const Vqgan *v) {
    return v->used;
}

/* The first position wins where a code is listed twice, as in the official search. */
static Err load_used(Vqgan *v, const Checkpoint *ck, const char *prefix) {
    const Name full = named("%squantize.used", prefix);
    const char *name = full.s;
    TRY(checkpoint_ints(ck, name, v->c.re_embed, v->used));
    for (size_t i = 0; i < v->c.n_embed; i++) v->inverse[i] = -1;
    for (size_t i = v->c.re_embed; i-- > 0;) {
        if (v->used[i] < 0 || (size_t)v->used[i] >= v->c.n_embed)
            return err("%s: %s[%zu] is %d, expected 0..%zu", ck->path, name, i, v->used[i], v->c.n_embed - 1);
        v->inverse[v->used[i]] = (int32_t)i;
    }
    return OK;
}

Err vqgan_load(Vqgan *v, const Checkpoint *ck, const char *prefix) {
    TRY(params_plan(&v->params, PLAN_VALUE));
    TRY(params_load(&v->params, ck, prefix));
    return v->c.re_embed ? load_used(v, ck, prefix) : OK;
}

/* ---- Public functions: inference ---- */

static Err check_values(const Vqgan *v, const char *where) {
    return v->params.n && v->params.row[0].value ? OK : err("%s: the parameters have no values yet", where);
}

static void copy_codes(Vqgan *v, size_t B, size_t N, uint64_t seed, int32_t *raw, int32_t *tokens) {
    const int32_t *found = (const int32_t *)(v->arena + v->raw);
    if (raw) memcpy(raw, found, B * N * sizeof *raw);
    if (tokens) remap(v, found, B, N, seed, tokens);
}

Err vqgan_encode(Vqgan *v, const real *images, size_t B, size_t H, size_t W, uint64_t seed, real *prequant,
                 int32_t *raw, int32_t *tokens) {
    TRY(check_values(v, "vqgan_encode"));
    TRY(check_fits(v, B, H, W, "vqgan_encode"));
    place_values(v, B, H, W);
    v->x[v->image] = (real *)images; /* only read */
    run_forward(v, 0, v->quantize);
    const size_t N = plane_size(v, v->z);
    if (prequant) memcpy(prequant, v->x[v->z], B * v->c.embed_dim * N * sizeof(real));
    if (raw || tokens) {
        nearest(v, v->x[v->z], B, N, (int32_t *)(v->arena + v->raw));
        copy_codes(v, B, N, seed, raw, tokens);
    }
    return OK;
}

Err vqgan_quantize(Vqgan *v, const real *z, size_t B, size_t h, size_t w, uint64_t seed, int32_t *raw,
                   int32_t *tokens) {
    TRY(check_values(v, "vqgan_quantize"));
    TRY(check_grid(v, B, h, w, "vqgan_quantize"));
    v->ready = v->latents = 0;
    nearest(v, z, B, h * w, (int32_t *)(v->arena + v->raw));
    copy_codes(v, B, h * w, seed, raw, tokens);
    return OK;
}

Err vqgan_lookup(Vqgan *v, const int32_t *tokens, size_t B, size_t h, size_t w, real *z) {
    TRY(check_values(v, "vqgan_lookup"));
    const size_t N = h * w, D = v->c.embed_dim, K = vqgan_K(v);
    const real *book = v->params.row[v->codebook].value;
    for (size_t i = 0; i < B * N; i++)
        if (tokens[i] < 0 || (size_t)tokens[i] >= K)
            return err("vqgan_lookup: token %d of picture %zu is %d, expected 0..%zu", (int)(i % N), i / N, tokens[i],
                       K - 1);
    for (size_t b = 0; b < B; b++)
        for (size_t i = 0; i < N; i++) {
            const size_t token = (size_t)tokens[b * N + i], code = v->used ? (size_t)v->used[token] : token;
            for (size_t d = 0; d < D; d++) z[(b * D + d) * N + i] = book[code * D + d];
        }
    return OK;
}

static void decode_placed(Vqgan *v, real *images) {
    v->x[v->xrec] = images;
    run_forward(v, v->quantize + 1, v->n_layers);
}

Err vqgan_decode(Vqgan *v, const real *z, size_t B, size_t h, size_t w, real *images) {
    const size_t shift = v->c.levels - 1;
    TRY(check_values(v, "vqgan_decode"));
    TRY(check_grid(v, B, h, w, "vqgan_decode"));
    place_values(v, B, h << shift, w << shift);
    v->x[v->zq] = (real *)z; /* only read */
    decode_placed(v, images);
    return OK;
}

Err vqgan_decode_tokens(Vqgan *v, const int32_t *tokens, size_t B, size_t h, size_t w, real *images) {
    const size_t shift = v->c.levels - 1;
    TRY(check_values(v, "vqgan_decode_tokens"));
    TRY(check_grid(v, B, h, w, "vqgan_decode_tokens"));
    place_values(v, B, h << shift, w << shift);
    TRY(vqgan_lookup(v, tokens, B, h, w, v->x[v->zq]));
    decode_placed(v, images);
    return OK;
}

/* ---- Public functions: training ---- */

Err vqgan_forward(Vqgan *v, const real *images, size_t B, size_t H, size_t W, const real **xrec,
                  double *codebook_loss) {
    TRY(check_values(v, "vqgan_forward"));
    TRY(check_fits(v, B, H, W, "vqgan_forward"));
    if (!v->train) return err("vqgan_forward: planned for inference");
    place_values(v, B, H, W);
    memcpy(v->x[v->image], images, B * v->c.in_channels * H * W * sizeof(real)); /* backward reads it again */
    run_forward(v, 0, v->n_layers);
    v->ready = v->latents = 1;
    *xrec = v->x[v->xrec];
    *codebook_loss = codebook_loss_value(v, B * v->c.embed_dim * plane_size(v, v->z));
    return OK;
}

Err vqgan_backward(Vqgan *v, const real *dxrec, double codebook_weight, real *dimage) {
    if (!v->ready) return err("vqgan_backward: must follow vqgan_forward");
    if (!v->params.row[0].grad) return err("vqgan_backward: the parameters have no gradients planned");
    v->dx[v->xrec] = (real *)dxrec; /* only read */
    v->dx[v->image] = dimage;
    run_backward(v, codebook_weight);
    v->ready = 0;
    return OK;
}

void vqgan_latents(const Vqgan *v, const real **z, const real **zq_st, const int32_t **raw) {
    if (z) *z = v->x[v->z];
    if (zq_st) *zq_st = v->x[v->zq];
    if (raw) *raw = (const int32_t *)(v->arena + v->raw);
}

void image_loss(const real *x, const real *xrec, size_t n, double w1, double w2, double *l1, double *l2, real *dxrec) {
    const real g1 = (real)(w1 / (double)n), g2 = (real)(2 * w2 / (double)n);
    double s1 = 0, s2 = 0;
    for (size_t i = 0; i < n; i++) {
        const real d = xrec[i] - x[i];
        s1 += fabs((double)d);
        s2 += (double)d * (double)d;
        if (dxrec) dxrec[i] = g1 * (real)((d > 0) - (d < 0)) + g2 * d;
    }
    *l1 = s1 / (double)n;
    *l2 = s2 / (double)n;
}

size_t vqgan_restart_codes(Vqgan *v, const uint32_t *usage, uint64_t seed, uint64_t step) {
    const size_t D = v->c.embed_dim, N = plane_size(v, v->z);
    const Param *book = &v->params.row[v->codebook];
    const real *z = v->x[v->z];
    const uint64_t stream = rng_stream(RNG_CODES, 0, step);
    size_t restarted = 0;
    for (size_t code = 0; code < v->c.n_embed; code++) {
        if (usage[code] || !v->latents) continue;
        const size_t pick = rng_below(seed, stream, code, (uint32_t)(v->b * N)), b = pick / N, i = pick % N;
        for (size_t d = 0; d < D; d++) {
            const size_t at = code * D + d;
            book->value[at] = z[(b * D + d) * N + i];
            if (book->m) book->m[at] = 0;
            if (book->v) book->v[at] = 0;
            if (book->ema) book->ema[at] = book->value[at];
        }
        restarted++;
    }
    return restarted;
}
