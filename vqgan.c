/* vqgan.c - the first stage: image <-> tokens (Esser et al. 2021, "Taming Transformers"; SPEC section 8).
 *
 * Owns: the network of encoder, vector quantiser and decoder, running it forward and backward, and the memory it runs
 * in; what a layer does is vqgan_layers.c's. Refuses: configurations that the official network cannot have (channels
 * that 32 groups do not divide), training on pictures that the levels do not divide, tokens outside the table.
 *
 * The network is a flat plan. vqgan_create lists every layer once, in execution order; a layer names the values
 * (activations) it reads and writes and its rows of the parameter table. Forward walks the list, backward walks it in
 * reverse, vqgan_plan walks it to find out how long every value is needed. From those lifetimes one allocation is laid
 * out: training keeps what backward needs, inference lets values take turns in the same memory.
 *
 *     image -> CONV3 -> [blocks, CONV_DOWN]* -> mid -> NORM, CONV3 -> CONV1 -> z          encode
 *     z -> QUANTIZE -> z_q -> CONV1 -> CONV3 -> mid -> [blocks, CONV_UP]* -> NORM, CONV3 -> image   decode
 *     block:     x + CONV3(NORM(CONV3(NORM(x))))      attention: x + CONV1(ATTEND(q, k, v))
 *
 * Values are (B,C,h,w). Where the sum of two branches is formed, the last convolution of the branch adds the other one
 * (Layer.add); backward, the gradient of the sum *is* the gradient of the other branch, in the same memory.
 *
 * Read in this order: types (vqgan.h); building the network; the walk; planning; public functions; after #else the same
 * walk on a GPU, in memory laid out by the same plan. */

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vqgan.h"

enum {
    MAX_BLOCKS = 64,   /* num_res_blocks */
    MAX_WIDTH = 16384, /* channels */
    ALIGN = 64         /* units between the starts of two areas: a cache line or more */
};

/* ---- Layers: convolution, with bias
 *
 *     y[b,m,i,j] = bias[m] + add[b,m,i,j] + sum over c,k,l of w[m,c,k,l] x[b,c,seen(i,k),seen(j,l)]
 *
 *     x    (B,C,h,w)   w (M,C,3,3), CONV1 (M,C,1,1)   bias (M)
 *     y    (B,M,h,w), CONV_DOWN (B,M,h/2,w/2), CONV_UP (B,M,2h,2w)
 *     add  as y, or NULL
 *
 * Where a pixel lies outside the picture, x counts as 0. ---- */

size_t conv_height(const Conv *c) {
    return c->kind == CONV_UP ? 2 * c->h : c->kind == CONV_DOWN ? c->h / 2 : c->h;
}

size_t conv_width(const Conv *c) {
    return c->kind == CONV_UP ? 2 * c->w : c->kind == CONV_DOWN ? c->w / 2 : c->w;
}

/* The row of x, of n rows, that row i of y sees through row k of the kernel; -1: there is none. Columns do the same. */
static long seen(ConvKind kind, size_t i, size_t k, size_t n) {
    const long at = (long)k - (kind == CONV3 || kind == CONV_UP) + (long)(kind == CONV_DOWN ? 2 * i : i);
    const long rows = (long)(kind == CONV_UP ? 2 * n : n);
    return at < 0 || at >= rows ? -1 : kind == CONV_UP ? at / 2 : at;
}

/* One walk for both directions: y[b,m,i,j] and x[b,c,u,v] meet through w[m,c,k,l]. Forward, dy is NULL. */
static void meet(const Conv *c, real *y, const real *x, const real *w, const real *dy, real *dx, real *dw) {
    const size_t side = c->kind == CONV1 ? 1 : 3, H = conv_height(c), W = conv_width(c);
    for (size_t bm = 0; bm < c->B * c->M; bm++)
        for (size_t ci = 0; ci < c->C; ci++)
            for (size_t kl = 0; kl < side * side; kl++) {
                const size_t wi = (bm % c->M * c->C + ci) * side * side + kl;
                for (size_t i = 0; i < H; i++)
                    for (size_t j = 0; j < W; j++) {
                        const long u = seen(c->kind, i, kl / side, c->h), v = seen(c->kind, j, kl % side, c->w);
                        if (u < 0 || v < 0) continue;
                        const size_t yi = (bm * H + i) * W + j;
                        const size_t xi = ((bm / c->M * c->C + ci) * c->h + (size_t)u) * c->w + (size_t)v;
                        if (!dy) y[yi] += w[wi] * x[xi];
                        if (dw) dw[wi] += dy[yi] * x[xi];
                        if (dx) dx[xi] += dy[yi] * w[wi];
                    }
            }
}

void conv_needs(Compute *on, const Conv *c, int backward) {
    if (on->fast) compute_needs(on, on->fast->conv_needs(on, c, backward));
}

void conv_forward(const Compute *on, real *y, const real *x, const real *w, const real *bias, const real *add,
                  const Conv *c) {
    if (on->fast) return on->fast->conv_forward(on, y, x, w, bias, add, c);
    const size_t HW = conv_height(c) * conv_width(c);
    for (size_t i = 0; i < c->B * c->M * HW; i++) y[i] = bias[i / HW % c->M] + (add ? add[i] : 0);
    meet(c, y, x, w, NULL, NULL, NULL);
}

/* dx = or += dL/dx, as `accumulate` says; NULL: not wanted. dw, db += ; both NULL: not wanted, and x is not read.
 *
 *     dx[b,c,u,v] = sum of w[m,c,k,l] dy[b,m,i,j]      over all m,i,j,k,l with seen(i,k) = u and seen(j,l) = v
 *     dw[m,c,k,l] += sum over b,i,j of dy[b,m,i,j] x[b,c,seen(i,k),seen(j,l)]      db[m] += sum over b,i,j of dy */
void conv_backward(const Compute *on, real *dx, real *dw, real *db, const real *dy, const real *x, const real *w,
                   int accumulate, const Conv *c) {
    if (on->fast) return on->fast->conv_backward(on, dx, dw, db, dy, x, w, accumulate, c);
    const size_t HW = conv_height(c) * conv_width(c);
    if (dx && !accumulate) memset(dx, 0, c->B * c->C * c->h * c->w * sizeof *dx);
    for (size_t i = 0; db && i < c->B * c->M * HW; i++) db[i / HW % c->M] += dy[i];
    meet(c, NULL, x, w, dy, dx, dw);
}

/* ---- Building the network: layers in execution order, each with its rows of the parameter table. Every function
 *      appends to the lists and returns the value it writes. The first error sticks in v->broken. ---- */

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

static size_t add_value(Vqgan *v, size_t C, size_t level) {
    VqValue *x = &v->value[v->n_values];
    x->C = C;
    x->level = level;
    x->act = x->grad = NO_VALUE;
    return v->n_values++;
}

static VqLayer *add_layer(Vqgan *v, VqKind kind, size_t in, size_t C, size_t level) {
    VqLayer *l = &v->layer[v->n_layers++];
    memset(l, 0, sizeof *l);
    l->kind = kind;
    l->in[0] = in;
    l->in[1] = l->in[2] = l->add = l->weight = l->bias = NO_VALUE;
    l->out = add_value(v, C, level);
    return l;
}

static void add_row(Vqgan *v, size_t *index, Init init, double scale, int ndim, const size_t *dim, const char *name) {
    if (v->broken == OK) v->broken = params_add(&v->params, index, init, scale, 0, ndim, dim, "%s", name);
}

/* A convolution of C results, plus the value `add` unless NO_VALUE; rows `name`.weight and .bias */
static size_t conv(Vqgan *v, ConvKind kind, size_t in, size_t C, size_t add, Name name) {
    const size_t level = v->value[in].level, kernel = kind == CONV1 ? 1 : 3;
    const size_t dim[4] = {C, v->value[in].C, kernel, kernel};
    const double bound = 1 / sqrt((double)(dim[1] * kernel * kernel));
    VqLayer *l = add_layer(v, VQ_CONV, in, C, kind == CONV_DOWN ? level + 1 : kind == CONV_UP ? level - 1 : level);
    add_row(v, &l->weight, INIT_UNIFORM, bound, 4, dim, named("%s.weight", name.s).s);
    add_row(v, &l->bias, INIT_UNIFORM, bound, 1, dim, named("%s.bias", name.s).s);
    l->conv = kind;
    l->add = add;
    return l->out;
}

static size_t norm(Vqgan *v, size_t in, int swish, Name name) {
    VqLayer *l = add_layer(v, VQ_NORM, in, v->value[in].C, v->value[in].level);
    add_row(v, &l->weight, INIT_ONE, 0, 1, &v->value[in].C, named("%s.weight", name.s).s);
    add_row(v, &l->bias, INIT_ZERO, 0, 1, &v->value[in].C, named("%s.bias", name.s).s);
    l->swish = swish;
    return l->out;
}

static size_t block(Vqgan *v, size_t x, size_t C, Name name) {
    size_t y = norm(v, x, 1, named("%s.norm1", name.s));
    y = conv(v, CONV3, y, C, NO_VALUE, named("%s.conv1", name.s));
    y = norm(v, y, 1, named("%s.norm2", name.s));
    if (v->value[x].C != C) x = conv(v, CONV1, x, C, NO_VALUE, named("%s.nin_shortcut", name.s));
    return conv(v, CONV3, y, C, x, named("%s.conv2", name.s));
}

static size_t attention(Vqgan *v, size_t x, Name name) {
    const size_t C = v->value[x].C, y = norm(v, x, 0, named("%s.norm", name.s));
    const size_t q = conv(v, CONV1, y, C, NO_VALUE, named("%s.q", name.s));
    const size_t k = conv(v, CONV1, y, C, NO_VALUE, named("%s.k", name.s));
    const size_t values = conv(v, CONV1, y, C, NO_VALUE, named("%s.v", name.s));
    VqLayer *l = add_layer(v, VQ_ATTEND, q, C, v->value[x].level);
    l->in[1] = k;
    l->in[2] = values;
    return conv(v, CONV1, l->out, C, x, named("%s.proj_out", name.s));
}

static size_t mid(Vqgan *v, size_t x, const char *side) {
    x = block(v, x, v->value[x].C, named("%s.mid.block_1", side));
    x = attention(v, x, named("%s.mid.attn_1", side));
    return block(v, x, v->value[x].C, named("%s.mid.block_2", side));
}

/* The blocks of a level, each followed by attention where the configuration lists `resolution`. */
static size_t level_blocks(Vqgan *v, size_t x, size_t n, size_t C, size_t resolution, Name level) {
    int attends = 0;
    for (size_t i = 0; i < v->c.n_attn; i++) attends |= v->c.attn_resolutions[i] == resolution;
    for (size_t i = 0; i < n; i++) {
        x = block(v, x, C, named("%s.block.%zu", level.s, i));
        if (attends) x = attention(v, x, named("%s.attn.%zu", level.s, i));
    }
    return x;
}

static size_t encoder(Vqgan *v, size_t x) {
    const VqganConfig *c = &v->c;
    x = conv(v, CONV3, x, c->ch, NO_VALUE, named("encoder.conv_in"));
    for (size_t i = 0; i < c->levels; i++) {
        const size_t C = c->ch * c->ch_mult[i];
        x = level_blocks(v, x, c->num_res_blocks, C, c->resolution >> i, named("encoder.down.%zu", i));
        if (i + 1 < c->levels) x = conv(v, CONV_DOWN, x, C, NO_VALUE, named("encoder.down.%zu.downsample.conv", i));
    }
    x = norm(v, mid(v, x, "encoder"), 1, named("encoder.norm_out"));
    return conv(v, CONV3, x, c->z_channels, NO_VALUE, named("encoder.conv_out"));
}

/* The official decoder starts from the resolution that halving left and doubles it, which matters for odd ones. */
static size_t decoder(Vqgan *v, size_t x) {
    const VqganConfig *c = &v->c;
    const size_t top = c->levels - 1;
    x = conv(v, CONV3, x, c->ch * c->ch_mult[top], NO_VALUE, named("decoder.conv_in"));
    x = mid(v, x, "decoder");
    for (size_t i = c->levels; i-- > 0;) {
        const size_t C = c->ch * c->ch_mult[i], resolution = c->resolution >> top << (top - i);
        x = level_blocks(v, x, c->num_res_blocks + 1, C, resolution, named("decoder.up.%zu", i));
        if (i > 0) x = conv(v, CONV_UP, x, C, NO_VALUE, named("decoder.up.%zu.upsample.conv", i));
    }
    x = norm(v, x, 1, named("decoder.norm_out"));
    return conv(v, CONV3, x, c->out_ch, NO_VALUE, named("decoder.conv_out"));
}

static size_t quantizer(Vqgan *v, size_t z) {
    const size_t dim[2] = {v->c.n_embed, v->c.embed_dim};
    VqLayer *l = add_layer(v, VQ_QUANTIZE, z, v->c.embed_dim, v->value[z].level);
    add_row(v, &l->weight, INIT_UNIFORM, 1.0 / (double)v->c.n_embed, 2, dim, "quantize.embedding.weight");
    return l->out;
}

/* The words of official names in the order in which PyTorch lists them. */
static size_t word_rank(const char *name, size_t length) {
    static const char *const word[] = {"encoder",  "decoder", "quantize",     "quant_conv", "post_quant_conv",
                                       "conv_in",  "down",    "mid",          "up",         "norm_out",
                                       "conv_out", "block",   "attn",         "downsample", "upsample",
                                       "block_1",  "attn_1",  "block_2",      "norm1",      "conv1",
                                       "norm2",    "conv2",   "nin_shortcut", "norm",       "q",
                                       "k",        "v",       "proj_out",     "conv",       "embedding",
                                       "weight",   "bias"};
    enum { WORDS = sizeof word / sizeof *word };
    size_t i = 0;
    while (i < WORDS && (strlen(word[i]) != length || strncmp(word[i], name, length) != 0)) i++;
    return i < WORDS ? i : WORDS + strtoul(name, NULL, 10);
}

typedef struct {
    Param row;
    size_t number; /* as it was added */
} NumberedRow;

static int official_order(const void *a, const void *b) {
    const char *x = ((const NumberedRow *)a)->row.name, *y = ((const NumberedRow *)b)->row.name;
    for (;;) {
        const size_t nx = strcspn(x, "."), ny = strcspn(y, "."), rx = word_rank(x, nx), ry = word_rank(y, ny);
        if (rx != ry) return rx < ry ? -1 : 1;
        if (!x[nx] || !y[ny]) return 0;
        x += nx + 1;
        y += ny + 1;
    }
}

/* Rows were added in execution order. */
static Err sort_rows(Vqgan *v) {
    Params *p = &v->params;
    NumberedRow *sorted;
    size_t *moved;
    TRY(mem_alloc(&sorted, p->n, sizeof *sorted + sizeof *moved, "vqgan: rows"));
    moved = (size_t *)(sorted + p->n);
    for (size_t i = 0; i < p->n; i++) {
        sorted[i].row = p->row[i];
        sorted[i].number = i;
    }
    qsort(sorted, p->n, sizeof *sorted, official_order);
    for (size_t i = 0; i < p->n; i++) {
        p->row[i] = sorted[i].row;
        moved[sorted[i].number] = i;
    }
    for (size_t i = 0; i < v->n_layers; i++) {
        VqLayer *l = &v->layer[i];
        if (l->weight != NO_VALUE) l->weight = moved[l->weight];
        if (l->bias != NO_VALUE) l->bias = moved[l->bias];
        l->complete = i ? v->layer[i - 1].complete : 0; /* behind the rows of all layers before it */
        if (i && v->layer[i - 1].weight != NO_VALUE) l->complete = max_size(l->complete, v->layer[i - 1].weight + 1);
        if (i && v->layer[i - 1].bias != NO_VALUE) l->complete = max_size(l->complete, v->layer[i - 1].bias + 1);
    }
    free(sorted);
    return OK;
}

/* Which gradients a layer finds already begun when backward reaches it. */
static Err mark_begun_gradients(Vqgan *v) {
    char *begun;
    TRY(mem_alloc(&begun, v->n_values, 1, "vqgan: gradients"));
    for (size_t i = v->n_layers; i-- > 0;) {
        VqLayer *l = &v->layer[i];
        if (l->add != NO_VALUE) begun[l->add] = 1; /* in the memory of the gradient of l->out */
        for (int k = 0; k < 3 && l->in[k] != NO_VALUE; k++) {
            l->more[k] = begun[l->in[k]];
            begun[l->in[k]] = 1;
        }
    }
    free(begun);
    return OK;
}

static Err build(Vqgan *v, int with_tanh) {
    const VqganConfig *c = &v->c;
    const size_t most = 11 * ((2 * c->num_res_blocks + 1) * c->levels + 6) + 2 * c->levels + 16;
    TRY(mem_alloc(&v->layer, most, sizeof *v->layer, "vqgan: layers"));
    TRY(mem_alloc(&v->value, most + 1, sizeof *v->value, "vqgan: values"));
    v->image = add_value(v, c->in_channels, 0);
    v->z = conv(v, CONV1, encoder(v, v->image), c->embed_dim, NO_VALUE, named("quant_conv"));
    v->quantize = v->n_layers;
    v->zq = quantizer(v, v->z);
    v->xrec = decoder(v, conv(v, CONV1, v->zq, c->z_channels, NO_VALUE, named("post_quant_conv")));
    if (with_tanh) v->xrec = add_layer(v, VQ_TANH, v->xrec, c->out_ch, 0)->out;
    TRY(v->broken);
    TRY(sort_rows(v));
    v->codebook = v->layer[v->quantize].weight;
    TRY(mem_alloc(&v->x, 2 * v->n_values, sizeof *v->x, "vqgan: values"));
    v->dx = v->x + v->n_values;
    return mark_begun_gradients(v);
}

/* ---- The walk ---- */

/* Points every value at its planned memory; the picture's size is that of this run, not of the plan. */
static void place_values(Vqgan *v, size_t B, size_t H, size_t W) {
    v->b = B;
    v->h = H;
    v->w = W;
    v->ready = v->latents = 0;
    for (size_t i = 0; i < v->n_values; i++) {
        const int here = !v->twin;
        v->x[i] = here && v->value[i].act != NO_VALUE ? v->arena + v->value[i].act : NULL;
        v->dx[i] = here && v->value[i].grad != NO_VALUE ? v->arena + v->value[i].grad : NULL;
    }
    if (!v->twin) return;
    v->x[v->z] = v->arena + v->shown[0];
    v->x[v->zq] = v->arena + v->shown[1];
    v->x[v->xrec] = v->arena + v->shown[2];
}

static void run_forward(Vqgan *v, size_t first, size_t end) {
    for (size_t i = first; i < end; i++) {
        const VqLayer *l = &v->layer[i];
        switch (l->kind) {
        case VQ_NORM: group_norm_forward(v, l); break;
        case VQ_ATTEND: spatial_attention_forward(v, l); break;
        case VQ_QUANTIZE: quantize_forward(v, l); break;
        case VQ_TANH: tanh_forward(v, l); break;
        default: conv_layer_forward(v, l);
        }
    }
}

static void run_backward(Vqgan *v, double codebook_weight, int image_wanted) {
    for (size_t i = v->n_layers; i-- > backward_end(v, image_wanted);) {
        const VqLayer *l = &v->layer[i];
        switch (l->kind) {
        case VQ_NORM: group_norm_backward(v, l); break;
        case VQ_ATTEND: spatial_attention_backward(v, l); break;
        case VQ_QUANTIZE: quantize_backward(v, l, codebook_weight); break;
        case VQ_TANH: tanh_backward(v, l); break;
        default: conv_layer_backward(v, l);
        }
        params_ready(&v->params, l->complete);
    }
}

double vqgan_flops(const Vqgan *v, size_t B, size_t H, size_t W, int encode, int decode) {
    double sum = 0;
    for (size_t i = encode ? 0 : v->quantize + 1; i < (decode ? v->n_layers : v->quantize); i++) {
        const VqLayer *l = &v->layer[i];
        const VqValue *y = &v->value[l->out];
        const double cells = (double)(H >> y->level) * (double)(W >> y->level), C = (double)y->C;
        if (l->kind == VQ_CONV) sum += cells * (double)v->params.row[l->weight].size;
        if (l->kind == VQ_ATTEND) sum += 2 * cells * cells * C;
    }
    return 2 * (double)B * sum;
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
    a->size = round_up(size, ALIGN);
    a->from = from;
    a->to = to;
    a->target = target;
    return OK;
}

/* B * C * h * w reals of a value at the planned size. */
static Err value_size(const Vqgan *v, size_t i, size_t *size) {
    const VqValue *x = &v->value[i];
    TRY(size_mul(size, v->B, x->C));
    TRY(size_mul(size, *size, v->H >> x->level));
    return size_mul(size, *size, v->W >> x->level);
}

static int needs_input(VqKind kind) { /* backward reads what forward read */
    return kind != VQ_TANH;
}

/* Activations: from their making to their last use, which in training may be a backward. */
static Err value_areas(Vqgan *v, AreaList *list) {
    const size_t n = v->n_layers, last = 2 * n - 1;
    for (size_t i = 0; i < v->n_values; i++) {
        size_t from = 0, to = 0, size;
        if (!v->train && !v->params.ops && (i == v->image || i == v->xrec)) continue; /* the caller's */
        for (size_t j = 0; j < n; j++) {
            const VqLayer *l = &v->layer[j];
            if (l->out == i) from = to = j;
            const int reads = l->in[0] == i || l->in[1] == i || l->in[2] == i;
            if (reads || l->add == i) to = max_size(to, j);
            if (v->train && ((reads && needs_input(l->kind)) || (l->out == i && l->kind == VQ_TANH)))
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
        const VqLayer *l = &v->layer[j];
        if (l->add == i || (l->kind == VQ_QUANTIZE && l->in[0] == i)) return gradient_home(v, l->out);
    }
    return i;
}

/* Gradients: from the backward of the last layer that reads the value to the backward of the one that made it; a home
 * lives as long as all that share it. */
static Err gradient_areas(Vqgan *v, AreaList *list, size_t *home, size_t *from, size_t *to) {
    const size_t last = 2 * v->n_layers - 1;
    for (size_t i = 0; i < v->n_values; i++) {
        home[i] = gradient_home(v, i);
        from[i] = NO_VALUE;
        to[i] = 0;
    }
    for (size_t j = 0; j < v->n_layers; j++) {
        const VqLayer *l = &v->layer[j];
        const size_t out = home[l->out];
        to[out] = max_size(to[out], last - j);
        for (int k = 0; k < 3 && l->in[k] != NO_VALUE; k++)
            from[home[l->in[k]]] = min_size(from[home[l->in[k]]], last - j);
    }
    for (size_t i = 0; i < v->n_values; i++) {
        size_t size;
        const int callers = i == v->image || i == v->xrec;
        if (home[i] != i || (callers && !v->params.ops)) continue;
        if (i == v->xrec) from[i] = v->n_layers; /* the caller's gradient comes first */
        if (i == v->image) to[i] = last;
        TRY(value_size(v, i, &size));
        TRY(add_area(list, &v->value[i].grad, size, from[i], to[i]));
    }
    return OK;
}

static size_t norm_kept_units(const Vqgan *v, size_t C) {
    if (!v->params.ops) return v->B * NORM_GROUPS * 2;
    return norm_kept_floats(v->B, C) * sizeof(float) / v->params.ops->unit;
}

static Err layer_areas(Vqgan *v, AreaList *list) {
    const size_t last = 2 * v->n_layers - 1;
    for (size_t j = 0; j < v->n_layers; j++) {
        VqLayer *l = &v->layer[j];
        const VqValue *x = &v->value[l->out];
        const size_t until = v->train ? last - j : j;
        size_t size, N;
        if (l->kind == VQ_NORM) TRY(add_area(list, &l->saved, norm_kept_units(v, x->C), j, until));
        if (l->kind != VQ_ATTEND) continue;
        TRY(size_mul(&N, v->H >> x->level, v->W >> x->level));
        TRY(size_mul(&size, N, N));
        TRY(size_mul(&size, round_up(size, ALIGN), v->B)); /* ATTEND saved: pictures begin at whole areas on a GPU */
        TRY(add_area(list, &l->saved, size, j, until));
        if (v->train && !v->params.ops) TRY(add_area(list, &l->scratch, size, last - j, last - j));
    }
    return OK;
}

/* What every step may use. */
static Err scratch_areas(Vqgan *v, AreaList *list) {
    const size_t end = 2 * v->n_layers;
    v->on = compute_of(&v->params);
    compute_needs(&v->on, (size_t)v->on.threads * CODES * SPOTS * sizeof(real));
    v->b = v->B;
    v->h = v->H;
    v->w = v->W;
    for (size_t j = 0; j < v->n_layers; j++) {
        const VqLayer *l = &v->layer[j];
        const Conv c = layer_conv(v, l);
        if (l->kind == VQ_NORM) compute_needs(&v->on, v->B * c.M * 2 * sizeof(real));
        for (int backward = 0; l->kind == VQ_CONV && backward <= v->train; backward++) conv_needs(&v->on, &c, backward);
    }
    TRY(add_area(list, &v->scratch_at, ceil_div(v->on.scratch_bytes, sizeof(real)), 0, end));
    TRY(add_area(list, &v->raw, v->B * plane_size(v, v->z), 0, end)); /* int32_t is no larger than real */
    TRY(add_area(list, &v->code_norm, v->c.n_embed, 0, end));
    return add_area(list, &v->image_loss, v->B * (sizeof(double) / sizeof(real)), 0, end);
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

/* *total: units of the arena */
static Err plan_areas(Vqgan *v, AreaList *list, size_t *lives, size_t *total) {
    for (size_t i = 0; i < v->n_values; i++) v->value[i].act = v->value[i].grad = NO_VALUE;
    TRY(value_areas(v, list));
    if (v->train) TRY(gradient_areas(v, list, lives, lives + v->n_values, lives + 2 * v->n_values));
    TRY(layer_areas(v, list));
    if (!v->params.ops) TRY(scratch_areas(v, list));
    TRY(lay_out(list, total));
    for (size_t i = 0; v->train && i < v->n_values; i++) v->value[i].grad = v->value[lives[i]].grad;
    return OK;
}

/* Odd sides lose their last row or column at a CONV_DOWN; training needs a reconstruction as large as the picture. */
static Err check_picture(const Vqgan *v, size_t B, size_t H, size_t W, const char *where) {
    const size_t unit = (size_t)1 << (v->c.levels - 1);
    if (B == 0) return err("%s: an empty batch", where);
    if (v->train && (H == 0 || W == 0 || H % unit || W % unit))
        return err("%s: a picture of %zux%zu; both sides must be multiples of %zu", where, H, W, unit);
    if (H < unit || W < unit)
        return err("%s: a picture of %zux%zu; both sides must be at least %zu", where, H, W, unit);
    return OK;
}

static void drop_plan(Vqgan *v) {
    if (v->twin) v->params.ops->vqgan_free(v);
    free(v->arena);
    v->arena = NULL, v->twin = NULL;
    v->ready = v->latents = 0;
}

Err vqgan_plan_bytes(Vqgan *v, size_t B, size_t H, size_t W, int train, size_t *bytes) {
    AreaList list = {NULL, 0, 3 * (v->n_values + v->n_layers) + 16};
    size_t *lives = NULL, total = 0;
    drop_plan(v);
    v->train = train != 0;
    TRY(check_picture(v, B, H, W, "vqgan_plan"));
    if (B > 1 << 20 || H > 1 << 20 || W > 1 << 20)
        return err("vqgan_plan: %zu pictures of %zux%zu is too much", B, H, W);
    v->B = B;
    v->H = H;
    v->W = W;
    Err e = mem_alloc(&list.area, list.capacity, sizeof *list.area, "vqgan: plan");
    if (e == OK) e = mem_alloc(&lives, 3 * v->n_values, sizeof *lives, "vqgan: plan");
    if (e == OK) e = plan_areas(v, &list, lives, &total);
    if (e == OK)
        e = v->params.ops ? v->params.ops->vqgan_plan(v, total, 0, bytes) : size_mul(bytes, total, sizeof(real));
    v->units = total;
    free(list.area);
    free(lives);
    return e;
}

/* Activations there; here what callers see: z, z_q, the reconstruction, codes. */
static Err plan_on_gpu(Vqgan *v, size_t *bytes) {
    const size_t shown[3] = {v->z, v->zq, v->xrec};
    size_t total = v->B * (v->H >> v->value[v->z].level) * (v->W >> v->value[v->z].level);
    v->raw = 0;
    for (int k = 0; k < 3; k++) {
        size_t size;
        v->shown[k] = round_up(total, ALIGN);
        TRY(value_size(v, shown[k], &size));
        total = v->shown[k] + size;
    }
    TRY(mem_alloc(&v->arena, total, sizeof(real), "vqgan: what the GPU gives back"));
    return v->params.ops->vqgan_plan(v, v->units, 1, bytes);
}

Err vqgan_plan(Vqgan *v, size_t B, size_t H, size_t W, int train) {
    size_t bytes = 0;
    TRY(vqgan_plan_bytes(v, B, H, W, train, &bytes));
    if (v->params.ops) return plan_on_gpu(v, &bytes);
    TRY(mem_alloc(&v->arena, bytes, 1, "vqgan: activations"));
    v->on.scratch = v->arena + v->scratch_at;
    return OK;
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
    if (c->ch % NORM_GROUPS) return err("vqgan: ch is %zu, expected a multiple of %d", c->ch, NORM_GROUPS);
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
    if (build(v, c->tanh_out && honour_tanh) != OK || make_remap(v) != OK) {
        vqgan_free(v);
        return FAILED;
    }
    *out = v;
    return OK;
}

void vqgan_free(Vqgan *v) {
    if (!v) return;
    drop_plan(v);
    params_free(&v->params);
    free(v->layer);
    free(v->value);
    free(v->x);
    free(v->used);
    free(v->inverse);
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

Err vqgan_map(Vqgan *v, const Checkpoint *ck, const char *prefix) {
    TRY(params_map(&v->params, ck, prefix, 0));
    return v->c.re_embed ? load_used(v, ck, prefix) : OK;
}

Err vqgan_load(Vqgan *v, const Checkpoint *ck, const char *prefix) {
    TRY(params_plan(&v->params, PLAN_VALUE));
    TRY(params_load(&v->params, ck, 'v', prefix));
    return v->c.re_embed ? load_used(v, ck, prefix) : OK;
}

/* ---- Public functions: inference ---- */

static Err check_values(const Vqgan *v, const char *where) {
    return v->params.n && v->params.row[0].value ? OK : err("%s: the parameters have no values yet", where);
}

static void copy_codes(Vqgan *v, size_t B, size_t N, uint64_t seed, int32_t *raw, int32_t *tokens) {
    const int32_t *found = (const int32_t *)(v->arena + v->raw);
    if (raw) memcpy(raw, found, B * N * sizeof *raw);
    if (tokens) remap_codes(v, found, B, N, seed, tokens);
}

/* The codes of z (B,D,N), or, on a GPU, of the latents that are there if z is NULL. */
static Err find_nearest(Vqgan *v, const real *z, size_t B, size_t N) {
    int32_t *raw = (int32_t *)(v->arena + v->raw);
    if (v->twin) return v->params.ops->vqgan_nearest(v, z, raw);
    nearest_codes(v, z, B, N, raw);
    return OK;
}

Err vqgan_encode(Vqgan *v, const real *images, size_t B, size_t H, size_t W, uint64_t seed, real *prequant,
                 int32_t *raw, int32_t *tokens) {
    TRY(check_values(v, "vqgan_encode"));
    TRY(check_fits(v, B, H, W, "vqgan_encode"));
    place_values(v, B, H, W);
    if (v->twin)
        TRY(v->params.ops->vqgan_run(v, v->image, images, 0, v->quantize, v->z, prequant ? v->x[v->z] : NULL));
    else {
        v->x[v->image] = (real *)images; /* only read */
        run_forward(v, 0, v->quantize);
    }
    const size_t N = plane_size(v, v->z);
    if (prequant) memcpy(prequant, v->x[v->z], B * v->c.embed_dim * N * sizeof(real));
    if (raw || tokens) {
        TRY(find_nearest(v, v->twin ? NULL : v->x[v->z], B, N));
        copy_codes(v, B, N, seed, raw, tokens);
    }
    return OK;
}

Err vqgan_quantize(Vqgan *v, const real *z, size_t B, size_t h, size_t w, uint64_t seed, int32_t *raw,
                   int32_t *tokens) {
    const size_t shift = v->c.levels - 1;
    TRY(check_values(v, "vqgan_quantize"));
    TRY(check_grid(v, B, h, w, "vqgan_quantize"));
    place_values(v, B, h << shift, w << shift);
    TRY(find_nearest(v, z, B, h * w));
    copy_codes(v, B, h * w, seed, raw, tokens);
    return OK;
}

static Err check_tokens(const Vqgan *v, const int32_t *tokens, size_t B, size_t N, const char *where) {
    const size_t K = vqgan_K(v);
    for (size_t i = 0; i < B * N; i++)
        if (tokens[i] < 0 || (size_t)tokens[i] >= K)
            return err("%s: token %d of picture %zu is %d, expected 0..%zu", where, (int)(i % N), i / N, tokens[i],
                       K - 1);
    return OK;
}

static int32_t entry_of(const Vqgan *v, int32_t token) {
    return v->used ? v->used[token] : token;
}

static void look_up(const Vqgan *v, const int32_t *tokens, size_t B, size_t N, real *z) {
    const size_t D = v->c.embed_dim;
    for (size_t b = 0; b < B; b++)
        for (size_t i = 0; i < N; i++) {
            const real *e = v->params.row[v->codebook].value + (size_t)entry_of(v, tokens[b * N + i]) * D;
            for (size_t d = 0; d < D; d++) z[(b * D + d) * N + i] = e[d];
        }
}

Err vqgan_lookup(Vqgan *v, const int32_t *tokens, size_t B, size_t h, size_t w, real *z) {
    TRY(check_values(v, "vqgan_lookup"));
    TRY(check_tokens(v, tokens, B, h * w, "vqgan_lookup"));
    look_up(v, tokens, B, h * w, z);
    return OK;
}

static Err decode_placed(Vqgan *v, const real *z, real *images) {
    if (v->twin) return v->params.ops->vqgan_run(v, v->zq, z, v->quantize + 1, v->n_layers, v->xrec, images);
    v->x[v->xrec] = images;
    run_forward(v, v->quantize + 1, v->n_layers);
    return OK;
}

Err vqgan_decode(Vqgan *v, const real *z, size_t B, size_t h, size_t w, real *images) {
    const size_t shift = v->c.levels - 1;
    TRY(check_values(v, "vqgan_decode"));
    TRY(check_grid(v, B, h, w, "vqgan_decode"));
    place_values(v, B, h << shift, w << shift);
    v->x[v->zq] = (real *)z; /* only read */
    return decode_placed(v, z, images);
}

Err vqgan_decode_tokens(Vqgan *v, const int32_t *tokens, size_t B, size_t h, size_t w, real *images) {
    const size_t shift = v->c.levels - 1;
    TRY(check_values(v, "vqgan_decode_tokens"));
    TRY(check_grid(v, B, h, w, "vqgan_decode_tokens"));
    place_values(v, B, h << shift, w << shift);
    TRY(check_tokens(v, tokens, B, h * w, "vqgan_decode_tokens"));
    if (v->twin) {
        int32_t *raw = (int32_t *)(v->arena + v->raw);
        for (size_t i = 0; i < B * h * w; i++) raw[i] = entry_of(v, tokens[i]);
        return v->params.ops->vqgan_draw(v, raw, images);
    }
    look_up(v, tokens, B, h * w, v->x[v->zq]);
    return decode_placed(v, NULL, images);
}

/* ---- Public functions: training ---- */

Err vqgan_forward(Vqgan *v, const real *images, size_t B, size_t H, size_t W, const real **xrec,
                  double *codebook_loss) {
    TRY(check_values(v, "vqgan_forward"));
    TRY(check_fits(v, B, H, W, "vqgan_forward"));
    if (!v->train) return err("vqgan_forward: planned for inference");
    place_values(v, B, H, W);
    const size_t elements = B * v->c.embed_dim * plane_size(v, v->z);
    if (v->twin) {
        double sum = 0;
        TRY(v->params.ops->vqgan_forward(v, images, (int32_t *)(v->arena + v->raw), &sum));
        *codebook_loss = codebook_loss_of(&v->c, sum, elements);
    } else {
        memcpy(v->x[v->image], images, B * v->c.in_channels * H * W * sizeof(real)); /* backward reads it again */
        run_forward(v, 0, v->n_layers);
        *codebook_loss = codebook_loss_value(v, elements);
    }
    v->ready = v->latents = 1;
    *xrec = v->x[v->xrec];
    return OK;
}

Err vqgan_backward(Vqgan *v, const real *dxrec, double codebook_weight, real *dimage) {
    if (!v->ready) return err("vqgan_backward: must follow vqgan_forward");
    if (!v->params.row[0].grad) return err("vqgan_backward: the parameters have no gradients planned");
    v->ready = 0;
    if (v->twin) return v->params.ops->vqgan_backward(v, dxrec, codebook_weight, dimage);
    v->dx[v->xrec] = (real *)dxrec; /* only read */
    v->dx[v->image] = dimage;
    run_backward(v, codebook_weight, dimage != NULL);
    return OK;
}

const Param *vqgan_last_layer(const Vqgan *v) {
    const VqLayer *l = &v->layer[v->n_layers - 1];
    return &v->params.row[(l->kind == VQ_TANH ? l - 1 : l)->weight];
}

Err vqgan_last_gradient(Vqgan *v, const real *dxrec, real *dw, real *db) {
    const VqLayer *l = &v->layer[v->n_layers - 1];
    if (!v->ready) return err("vqgan_last_gradient: must follow vqgan_forward");
    if (l->kind == VQ_TANH) return err("vqgan_last_gradient: not behind a tanh");
    if (v->twin) return v->params.ops->vqgan_last(v, dxrec, dw, db);
    const Param *w = vqgan_last_layer(v);
    const Conv c = layer_conv(v, l);
    memset(dw, 0, w->size * sizeof *dw);
    memset(db, 0, w->dim[0] * sizeof *db);
    conv_backward(&v->on, NULL, dw, db, dxrec, v->x[l->in[0]], w->value, 0, &c);
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

size_t vqgan_restart_pick(uint64_t seed, uint64_t step, size_t code, size_t latents) {
    return rng_below(seed, rng_stream(RNG_CODES, 0, step), code, (uint32_t)latents);
}

/* Latent d of the one that is picked is latent[d * stride]. */
static void restart_code(const Vqgan *v, size_t code, const real *latent, size_t stride) {
    const size_t D = v->c.embed_dim;
    const Param *book = &v->params.row[v->codebook];
    for (size_t d = 0; d < D; d++) {
        const size_t at = code * D + d;
        book->value[at] = latent[d * stride];
        if (book->m) book->m[at] = 0;
        if (book->v) book->v[at] = 0;
        if (book->m16) book->m16[at] = book->v16[at] = 0;
        if (book->ema) book->ema[at] = book->value[at];
    }
}

void vqgan_restart_code(Vqgan *v, size_t code, const real *latent) {
    restart_code(v, code, latent, 1);
}

size_t vqgan_restart_codes(Vqgan *v, const uint32_t *usage, uint64_t seed, uint64_t step) {
    const size_t N = plane_size(v, v->z);
    size_t restarted = 0;
    for (size_t code = 0; code < v->c.n_embed; code++) {
        if (usage[code] || !v->latents) continue;
        const size_t pick = vqgan_restart_pick(seed, step, code, v->b * N);
        if (v->twin)
            v->params.ops->vqgan_restart(v, code, pick);
        else
            restart_code(v, code, v->x[v->z] + pick / N * v->c.embed_dim * N + pick % N, N);
        restarted++;
    }
    return restarted;
}

Err vqgan_use_cuda(Vqgan *v, Precision precision) {
    return use_cuda(&v->params, precision);
}
