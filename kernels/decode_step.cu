/* decode_step.cu - a step of decoding as one kernel, which keeps the whole GPU for many tokens.
 *
 * For GPUs from capability 9 on, bf16, up to STEP_ROWS rows; decode.cu includes this file and has the kernels for
 * the others. Blocks stand in clusters of CLUSTER, of which each takes its parts of every layer: heads, or slices of
 * the hidden units.
 *
 *     a token:  x = token[id] + position[pos]
 *       a layer:  rows = norm(x)
 *         a part:   self, cross: q, k, v of the head = W rows;  y = attention
 *                   feed:        y = gelu(W rows + bias)        for the slice's units
 *                   partial[part] = columns of the head, or slice, of W times y
 *         -- all blocks of the GPU meet --
 *         x = x + partial[0] + partial[1] + ...
 *       logits = head(norm(x))      -- all meet --      draw      -- all meet --
 *
 * Within a cluster blocks share rows of W, keys, and columns of x, and write results into each other's shared
 * memory. So the GPU meets once a layer, and what it reads from memory, the weights, does not wait for that: each
 * block's share of all matrices lies in one stream (pack_kernel), in the order of use, and a ring in shared memory
 * runs ahead of it.
 *
 * A matrix comes in tiles of 8 rows, a tile in blocks of 32 columns, a block as tensor cores take it: of row g
 * numbers 8t to 8t+7 are lane 4g+t's. They are b of two products with k = 16, for the order of k does not matter as
 * long as x has the same. All sums run in an order that depends on sizes alone: not on the GPU, and for a row not on
 * what else is in the batch. */

enum {
    STEP_ROWS = 8,
    STEP_THREADS = DRAW_THREADS,
    STEP_WARPS = STEP_THREADS / WARP,
    CLUSTER = 8,
    FEED_PARTS = 16,
    STEP_TILE = 8,
    BLOCK_COLUMNS = 32,
    BLOCK = STEP_TILE * BLOCK_COLUMNS, /* numbers */
    BLOCK_BYTES = BLOCK * 2,
    CHUNK_BLOCKS = 8, /* what is copied at once */
    MOST_CHUNKS = 40, /* of the ring */
    SPLIT_TILES = 3   /* that all warps share, when rows are long; else each warp takes one */
};

/* A layer as the step reads it, and its matrices before they are packed */
typedef struct {
    BlockKind kind;
    const float *norm_weight, *norm_bias;
    floatX *key, *value;
} StepLayer;
typedef struct {
    const floatX *in[3], *back; /* q, k, v or up; out or down */
    const float *in_bias[3], *back_bias;
} StepMatrices;

typedef struct {
    unsigned R, C, K, heads, D, hidden, n_layers, T, T_context;
    unsigned clusters, chunks;    /* of the GPU; of the ring */
    unsigned width, feed_parts;   /* hidden units of a slice; slices */
    unsigned stride;              /* blocks between the streams of two blocks of the GPU */
    const StepLayer *layer;       /* (n_layers) and the final norm */
    const StepMatrices *matrices; /* (n_layers) and the head */
    floatX *packed;               /* the streams */
    unsigned *length;             /* (clusters*CLUSTER) of a stream, in chunks */
    float *partial;               /* (2,parts,R,C) by turns */
    unsigned *counter;            /* of who has come to where all meet */
    const float *token, *position;
    float *raw; /* (R,K) */
    Variant variant;
    int *pos; /* (R) */
    int prompt, draws;
    unsigned tokens; /* this launch */
    DrawStep draw;
} Step;

/* ---- Who has what ---- */

/* A block's tiles of a product (rows,columns): `of` blocks share its rows. */
typedef struct {
    unsigned rows, first, tiles, blocks; /* blocks of a tile */
} Piece;

static __host__ __device__ inline unsigned ceil_of(unsigned n, unsigned d) {
    return (n + d - 1) / d;
}
static __device__ inline Piece piece_of(unsigned rows, unsigned columns, unsigned who, unsigned of) {
    const unsigned tiles = ceil_of(rows, STEP_TILE), first = tiles * who / of;
    return {rows, first, tiles * (who + 1) / of - first, ceil_of(columns, BLOCK_COLUMNS)};
}

/* How many tiles are done between two barriers, and by how many warps each. In front of them comes a block of biases. */
static __host__ __device__ inline unsigned warps_of_tile(unsigned blocks) {
    return blocks >= STEP_WARPS ? STEP_WARPS : 1;
}
static __host__ __device__ inline unsigned tiles_at_once(unsigned blocks) {
    return blocks >= STEP_WARPS ? SPLIT_TILES : STEP_WARPS;
}
static __host__ __device__ inline unsigned blocks_of_tiles(unsigned tiles, unsigned blocks) {
    return ceil_of(tiles, tiles_at_once(blocks)) + tiles * blocks;
}

static __host__ __device__ inline unsigned parts_of(const Step *p, BlockKind kind) {
    return kind == BLOCK_FEED ? p->feed_parts : p->heads;
}
/* What a part puts into the product back to x: a head's channels, or a slice's hidden units */
static __host__ __device__ inline unsigned part_width(const Step *p, BlockKind kind, unsigned part) {
    if (kind != BLOCK_FEED) return p->D;
    return p->hidden - part * p->width < p->width ? p->hidden - part * p->width : p->width;
}
static __host__ __device__ inline unsigned part_rows(const Step *p, BlockKind kind, unsigned part) {
    return (kind == BLOCK_SELF ? 3 : 1) * part_width(p, kind, part);
}

/* ---- Packing, once before the first token ---- */

/* to = a piece of the product whose row r is at row(r), its columns from `column` on, and bias(r) its bias */
template <typename Row, typename Bias>
static __device__ inline unsigned pack_piece(floatX *to, Piece e, unsigned columns, Row row, Bias bias) {
    const unsigned group = tiles_at_once(e.blocks), all = blocks_of_tiles(e.tiles, e.blocks);
    for (unsigned u = threadIdx.x; u < all * WARP; u += STEP_THREADS) {
        const unsigned block = u / WARP, lane = u % WARP, whole = 1 + group * e.blocks;
        const unsigned first = (e.first + block / whole * group) * STEP_TILE, within = block % whole;
        Pack out;
        if (within == 0) { /* biases, as floats */
            float four[4];
            for (unsigned k = 0; k < 4; k++) {
                const unsigned r = first + lane * 4 + k;
                four[k] = lane * 4 + k < group * STEP_TILE && r < e.rows ? bias(r) : 0;
            }
            memcpy(&out, four, sizeof out);
        } else {
            const unsigned r = first + (within - 1) / e.blocks * STEP_TILE + lane / 4;
            const unsigned c = (within - 1) % e.blocks * BLOCK_COLUMNS + lane % 4 * PACK;
            for (unsigned k = 0; k < PACK; k++)
                out.at[k] = r < e.rows && c + k < columns ? row(r)[c + k] : to_floatX(0);
        }
        *(Pack *)(void *)(to + (size_t)u * PACK) = out;
    }
    return all;
}

static __device__ inline unsigned pack_part(floatX *to, const Step *p, const StepMatrices *m, BlockKind kind,
                                            unsigned part, unsigned rank) {
    const unsigned width = part_width(p, kind, part), begin = part * (kind == BLOCK_FEED ? p->width : p->D);
    const size_t inner = kind == BLOCK_FEED ? p->hidden : p->heads * p->D;
    const Piece in = piece_of(part_rows(p, kind, part), p->C, rank, CLUSTER),
                back = piece_of(p->C, width, rank, CLUSTER);
    const auto in_row = [=](unsigned r) { return m->in[r / width] + (size_t)(begin + r % width) * p->C; };
    const auto in_bias = [=](unsigned r) {
        return m->in_bias[r / width] ? m->in_bias[r / width][begin + r % width] : 0;
    };
    const auto back_row = [=](unsigned r) { return m->back + r * inner + begin; };
    const auto back_bias = [=](unsigned r) { return part == 0 && m->back_bias ? m->back_bias[r] : 0; };
    const unsigned used = pack_piece(to, in, p->C, in_row, in_bias);
    return used + pack_piece(to + (size_t)used * BLOCK, back, width, back_row, back_bias);
}

/* A block of this kernel for each of the step's: its stream. */
static __global__ void __launch_bounds__(STEP_THREADS) pack_kernel(Step p) {
    const unsigned cluster = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER;
    floatX *const stream = p.packed + (size_t)blockIdx.x * p.stride * BLOCK;
    unsigned at = 0;
    for (unsigned l = 0; l < p.n_layers; l++)
        for (unsigned part = cluster; part < parts_of(&p, p.layer[l].kind); part += p.clusters)
            at += pack_part(stream + (size_t)at * BLOCK, &p, &p.matrices[l], p.layer[l].kind, part, rank);
    const StepMatrices *head = &p.matrices[p.n_layers];
    const auto row = [=](unsigned r) { return head->back + (size_t)r * p.C; };
    const auto bias = [=](unsigned r) { return head->back_bias ? head->back_bias[r] : 0; };
    at += pack_piece(stream + (size_t)at * BLOCK, piece_of(p.K, p.C, blockIdx.x, gridDim.x), p.C, row, bias);
    const unsigned chunks = ceil_of(at, CHUNK_BLOCKS);
    for (unsigned i = at * BLOCK + threadIdx.x; i < chunks * CHUNK_BLOCKS * BLOCK; i += STEP_THREADS)
        stream[i] = to_floatX(0);
    if (threadIdx.x == 0) p.length[blockIdx.x] = chunks;
}

/* ---- A block's shared memory ---- */

typedef struct {
    unsigned char *ring; /* chunks */
    uint64_t *full;      /* (chunks) a chunk is there */
    float *x;            /* (R,C) */
    float *own;          /* (R,share) the columns of x that this block adds up */
    float *gain, *shift; /* (C) of the next norm */
    floatX *rows, *y;    /* what products read, in blocks: norm(x), and what goes back to x */
    floatX *qkv;         /* (3,R,D) of the present head */
    float *sums;         /* of products, before they are put together */
    float *teams, *seen; /* of attention: of the warps (R,STEP_WARPS,W+2), of the cluster's blocks (CLUSTER,R,D+2) */
    StepLayer *layer;
    DrawShared *draw;
} StepShared;

static __host__ __device__ inline unsigned head_room(unsigned D) {
    return D <= 64 ? 64 : 128;
}
static __host__ __device__ inline unsigned share_of(const Step *p) {
    return ceil_of(ceil_of(p->C, STEP_TILE), CLUSTER) * STEP_TILE;
}

/* The arrays one after the other from base on (NULL: none yet); returns how many bytes they take. */
static __host__ __device__ inline size_t place_shared(StepShared *s, const Step *p, unsigned char *base) {
    size_t used = 0;
#define PLACE(array, n)                                                                                                \
    (s->array = base ? (decltype(s->array))(void *)(base + used) : NULL,                                               \
     used += ((size_t)(n) * sizeof *s->array + 127) / 128 * 128)
    PLACE(ring, p->chunks * CHUNK_BLOCKS * BLOCK_BYTES);
    PLACE(full, p->chunks);
    PLACE(x, p->R * p->C), PLACE(own, p->R * share_of(p)), PLACE(gain, p->C), PLACE(shift, p->C);
    PLACE(rows, ceil_of(p->C, BLOCK_COLUMNS) * BLOCK);
    PLACE(y, ceil_of(p->width > p->D ? p->width : p->D, BLOCK_COLUMNS) * BLOCK);
    PLACE(qkv, 3 * p->R * p->D);
    PLACE(sums, SPLIT_TILES * STEP_WARPS * 64);
    PLACE(teams, p->R * STEP_WARPS * (head_room(p->D) + 2)), PLACE(seen, CLUSTER * p->R * (p->D + 2));
    PLACE(layer, p->n_layers + 1), PLACE(draw, 1);
#undef PLACE
    return used;
}

#if HAS_CLUSTERS && defined(FLOATX_BF16)

/* ---- The ring ---- */

/* What a thread knows of its block, and where it is. The ring's places and the stream's chunks are counted on, not
 * divided. */
typedef struct {
    const Step *p;
    StepShared s;
    unsigned cluster, rank, warp, lane;
    unsigned first, columns; /* of x, that this block adds up */
    const unsigned char *stream;
    unsigned length, left; /* chunks of a token; that this launch has not yet asked for */
    unsigned at, phase;    /* place of the next block in the ring; parity of the present turn around it */
    unsigned within;       /* blocks of the token before it */
    unsigned to, from;     /* where the next chunk that is asked for goes in the ring, and its number in the stream */
    unsigned room;         /* chunks that may be asked for */
    unsigned met;          /* blocks of the GPU that have come to the last meeting */
} Here;

/* Asks for as many chunks as there is room for. */
static __device__ inline void fill_ring(Here *h) {
    const unsigned n = h->room < h->left ? h->room : h->left, bytes = CHUNK_BLOCKS * BLOCK_BYTES, all = h->p->chunks;
    if (h->warp == STEP_WARPS - 1)
        for (unsigned c = h->lane; c < n; c += WARP) {
            const unsigned to = h->to + c < all ? h->to + c : h->to + c - all;
            unsigned from = h->from + c;
            while (from >= h->length) from -= h->length;
            barrier_expect(h->s.full + to, bytes);
            bulk_copy(h->s.ring + to * bytes, h->stream + (size_t)from * bytes, bytes, h->s.full + to);
        }
    h->to = h->to + n < all ? h->to + n : h->to + n - all;
    for (h->from += n; h->from >= h->length && h->length;) h->from -= h->length;
    h->left -= n, h->room -= n;
}

/* n blocks have been read by all. */
static __device__ inline void pass_blocks(Here *h, unsigned n) {
    const unsigned all = h->p->chunks * CHUNK_BLOCKS;
    h->room += (h->at % CHUNK_BLOCKS + n) / CHUNK_BLOCKS;
    h->at += n, h->within += n;
    if (h->at >= all) h->at -= all, h->phase ^= 1;
    fill_ring(h);
}

/* Until n blocks from the next one on are there, for the whole warp */
static __device__ inline void await_blocks(const Here *h, unsigned n) {
    const unsigned first = h->at / CHUNK_BLOCKS, end = (h->at + n + CHUNK_BLOCKS - 1) / CHUNK_BLOCKS,
                   all = h->p->chunks;
    for (unsigned c = first + h->lane; c < end; c += WARP)
        barrier_wait(h->s.full + (c < all ? c : c - all), c < all ? h->phase : h->phase ^ 1);
    __syncwarp();
}

/* Block i from the next one on */
static __device__ inline const unsigned char *block_at(const Here *h, unsigned i) {
    const unsigned all = h->p->chunks * CHUNK_BLOCKS, k = h->at + i;
    return h->s.ring + (k < all ? k : k - all) * BLOCK_BYTES;
}

/* ---- Products ---- */

struct alignas(16) Words {
    unsigned word[4];
};

/* sums (8 of x, 8 of the tile) of a tile, of every step-th of its blocks */
static __device__ inline void multiply_tile(float *sums, const Here *h, unsigned first, unsigned blocks,
                                            const floatX *in, unsigned begin, unsigned step) {
    float c[4] = {};
#pragma unroll 4
    for (unsigned k = begin; k < blocks; k += step) {
        const Words w = *(const Words *)(const void *)(block_at(h, first + k) + h->lane * sizeof(Words));
        const Words x = *(const Words *)(const void *)(in + k * BLOCK + h->lane * PACK);
        const unsigned low[4] = {x.word[0], 0, x.word[1], 0}, high[4] = {x.word[2], 0, x.word[3], 0};
        multiply_tiles(c, low, w.word);
        multiply_tiles(c, high, w.word + 2);
    }
    sums[h->lane * 2] = c[0], sums[h->lane * 2 + 1] = c[1];
}

/* use(b, r, y): y[b,r] = sum of in[b,:] W[r,:] + bias[r] for our rows r of W, whose piece is next in the stream */
template <typename Use> static __device__ inline void multiply(Here *h, Piece e, const floatX *in, Use use) {
    const unsigned warps = warps_of_tile(e.blocks), group = tiles_at_once(e.blocks);
    for (unsigned t = 0; t < e.tiles; t += group) {
        const unsigned tiles = e.tiles - t < group ? e.tiles - t : group, all = 1 + tiles * e.blocks;
        await_blocks(h, all);
        for (unsigned k = h->warp / warps; k < tiles; k += STEP_WARPS / warps)
            multiply_tile(h->s.sums + (k * warps + h->warp % warps) * 64, h, 1 + k * e.blocks, e.blocks, in,
                          h->warp % warps, warps);
        __syncthreads();
        for (unsigned i = threadIdx.x; i < tiles * 64; i += STEP_THREADS) {
            const unsigned b = i / STEP_TILE % STEP_ROWS, n = i / 64 * STEP_TILE + i % STEP_TILE;
            const unsigned r = (e.first + t) * STEP_TILE + n;
            if (b >= h->p->R || r >= e.rows) continue;
            float y = ((const float *)(const void *)block_at(h, 0))[n];
            for (unsigned w = 0; w < warps; w++) y += h->s.sums[(i / 64 * warps + w) * 64 + i % 64];
            use(b, r, y);
        }
        __syncthreads();
        pass_blocks(h, all);
    }
}

/* Where products find number c of row b */
static __device__ inline unsigned in_blocks(unsigned b, unsigned c) {
    return c / BLOCK_COLUMNS * BLOCK + b * BLOCK_COLUMNS + c % BLOCK_COLUMNS;
}

/* ---- All blocks of the GPU ---- */

static __device__ inline void grid_meet(Here *h) {
    h->met += gridDim.x;
    __syncthreads();
    if (threadIdx.x == 0) {
        count_up(h->p->counter);
        while (counted(h->p->counter) < h->met) {
        }
    }
    __syncthreads();
}

/* The norm's vectors are on their way while all meet. */
template <int FLOATS> static __device__ inline void ask_vectors(const Here *h, const StepLayer *l) {
    for (unsigned c = threadIdx.x * FLOATS; c < h->p->C; c += STEP_THREADS * FLOATS) {
        copy_async<FLOATS * 4>(h->s.gain + c, l->norm_weight + c, 1);
        copy_async<FLOATS * 4>(h->s.shift + c, l->norm_bias + c, 1);
    }
    copy_commit();
}
static __device__ inline void ask_norm(const Here *h, unsigned layer) {
    const StepLayer *l = &h->s.layer[layer];
    h->p->C % 4 ? ask_vectors<1>(h, l) : ask_vectors<4>(h, l);
}

/* own(x, b, c) is the next x of the columns that this block has; each block of the cluster gets all of x. */
template <typename Own> static __device__ inline void share_x(Here *h, Own own) {
    const Step *p = h->p;
    unsigned b = 0, j = threadIdx.x;
    for (; b < p->R; j += STEP_THREADS) {
        for (; j >= h->columns && b < p->R; b++) j -= h->columns;
        if (b == p->R) break;
        float *const mine = h->s.own + b * share_of(p) + j;
        *mine = own(*mine, b, h->first + j);
        for (unsigned k = 0; k < CLUSTER; k++) in_block(h->s.x, k)[b * p->C + h->first + j] = *mine;
    }
    copy_wait<0>(); /* ask_norm */
    cluster_sync();
}

static __device__ inline float *partial_of(const Step *p, unsigned layer, unsigned part) {
    const unsigned parts = p->feed_parts > p->heads ? p->feed_parts : p->heads;
    return p->partial + (size_t)(layer % 2 * parts + part) * p->R * p->C;
}

/* x += what the parts of this layer have given */
static __device__ inline void add_parts(Here *h, unsigned layer) {
    const Step *p = h->p;
    const unsigned parts = parts_of(p, h->s.layer[layer].kind);
    share_x(h, [=](float x, unsigned b, unsigned c) {
        const float *part = partial_of(p, layer, 0) + b * p->C + c;
#pragma unroll 16
        for (unsigned k = 0; k < parts; k++) x += part[(size_t)k * p->R * p->C];
        return x;
    });
}

/* What a row's sum is, of which each warp has a part */
static __device__ inline float whole_sum(const Here *h, float mine, float *warps) {
    mine = warp_sum(mine);
    if (h->lane == 0) warps[h->warp] = mine;
    __syncthreads();
    float sum = 0;
    for (unsigned w = 0; w < STEP_WARPS; w++) sum += warps[w];
    return sum;
}

/* rows = norm(x): all warps share each row */
static __device__ inline void norm_x(Here *h) {
    const unsigned C = h->p->C;
    float *warps = h->s.sums;
    for (unsigned b = 0; b < h->p->R; b++, warps += 2 * STEP_WARPS) {
        const float *x = h->s.x + b * C;
        float sum = 0, square = 0;
#pragma unroll 4
        for (unsigned c = threadIdx.x; c < C; c += STEP_THREADS) sum += x[c];
        const float mu = whole_sum(h, sum, warps) / (float)C;
#pragma unroll 4
        for (unsigned c = threadIdx.x; c < C; c += STEP_THREADS) square += (x[c] - mu) * (x[c] - mu);
        const float scale = 1 / sqrtf(whole_sum(h, square, warps + STEP_WARPS) / (float)C + (float)LAYER_NORM_EPS);
#pragma unroll 4
        for (unsigned c = threadIdx.x; c < C; c += STEP_THREADS)
            h->s.rows[in_blocks(b, c)] = to_floatX((x[c] - mu) * scale * h->s.gain[c] + h->s.shift[c]);
    }
    __syncthreads();
}

/* ---- A part of a layer ---- */

/* How much of what was seen under another peak counts */
static __device__ inline float fading(float peak, float highest) {
    return peak == -HUGE_VALF ? 0 : expf(peak - highest);
}

/* What CLUSTER or STEP_WARPS (8 of either) who saw keys have seen together: channel c of the output, largest score
 * and sum of exponentials. Their numbers lie `apart`; lane k of each eight fades those of number k. For whole warps. */
typedef struct {
    float out, peak, sum;
} SeenKeys;
static __device__ inline SeenKeys join_seen(const float *from, unsigned apart, unsigned D, unsigned c) {
    const float *const its = from + threadIdx.x % 8 * apart + D;
    SeenKeys s = {0, its[0], 0};
    for (int k = 4; k; k /= 2) s.peak = fmaxf(s.peak, __shfl_xor_sync(0xffffffffu, s.peak, k));
    const float weight = fading(its[0], s.peak);
    s.sum = weight * its[1];
    for (int k = 4; k; k /= 2) s.sum += __shfl_xor_sync(0xffffffffu, s.sum, k);
    for (unsigned k = 0; k < 8; k++) {
        const float its_weight = __shfl_sync(0xffffffffu, weight, k);
        if (c < D) s.out += its_weight * from[k * apart + c];
    }
    return s;
}

/* use(b, c) for all rows and channels, by whole warps: c may be D and more */
template <int W, typename Use> static __device__ inline void each_channel(const Here *h, Use use) {
    for (unsigned b = threadIdx.x / W; b < h->p->R; b += STEP_THREADS / W) use(b, threadIdx.x % W);
}

/* What a warp has seen of a row's keys: of channels 2 lane and the next, and the same W / 2 of 64 on, the output
 * relative to the largest score */
template <int W> struct WarpSight {
    enum { UNITS = W / 64 };
    float query[UNITS][2], out[UNITS][2], largest, sum;
};

/* Two numbers from row + c on, zeros beyond D, which is even */
static __device__ inline Unit<2> load_two(const floatX *row, unsigned c, unsigned D, bool there) {
    return there && c < D ? *(const Unit<2> *)(const void *)(row + c) : Unit<2>{};
}

/* SEES keys of a head, STEP_WARPS apart, from key j on, of rows inner apart */
enum { SEES = 4 };
template <int W>
static __device__ inline void see(WarpSight<W> *x, const floatX *k, const floatX *v, unsigned j, unsigned end,
                                  unsigned inner, unsigned D) {
    enum { UNITS = WarpSight<W>::UNITS };
    Unit<2> key[SEES][UNITS], value[SEES][UNITS];
    float score[SEES], peak = x->largest;
    const unsigned c = threadIdx.x % WARP * 2;
#pragma unroll
    for (int a = 0; a < SEES; a++)
        for (int u = 0; u < UNITS; u++) {
            const unsigned at = j + (unsigned)a * STEP_WARPS;
            key[a][u] = load_two(k + (size_t)at * inner, c + (unsigned)u * 64, D, at < end);
            value[a][u] = load_two(v + (size_t)at * inner, c + (unsigned)u * 64, D, at < end);
        }
#pragma unroll
    for (int a = 0; a < SEES; a++) {
        score[a] = 0;
        for (int u = 0; u < UNITS; u++)
            for (int e = 0; e < 2; e++) score[a] += x->query[u][e] * to_float(key[a][u].at[e]);
        score[a] = warp_sum(score[a]);
        if (j + (unsigned)a * STEP_WARPS < end) peak = fmaxf(peak, score[a]);
    }
    const float fade = fading(x->largest, peak);
    x->largest = peak, x->sum *= fade;
    for (int u = 0; u < UNITS; u++)
        for (int e = 0; e < 2; e++) x->out[u][e] *= fade;
#pragma unroll
    for (int a = 0; a < SEES; a++) {
        const float weight = j + (unsigned)a * STEP_WARPS < end ? expf(score[a] - peak) : 0;
        x->sum += weight;
        for (int u = 0; u < UNITS; u++)
            for (int e = 0; e < 2; e++) x->out[u][e] += weight * to_float(value[a][u].at[e]);
    }
}

/* y = attention of a head, whose q, k and v are in s.qkv of all blocks of the cluster, which have a share of its keys each;
 * warps see every STEP_WARPS-th of that. What a warp has seen is put together in its block, what the blocks have seen in
 * all of them. */
template <int W> static __device__ inline void attend_head(Here *h, const StepLayer *l, unsigned head, unsigned pos) {
    const Step *p = h->p;
    const unsigned D = p->D, self = l->kind == BLOCK_SELF, keys = self ? pos + 1 : p->T_context;
    const unsigned begin = keys * h->rank / CLUSTER, end = keys * (h->rank + 1) / CLUSTER, inner = p->heads * D;
    const size_t room = self ? p->T : p->T_context;
    if (self && h->rank == CLUSTER - 1) { /* who has the last keys puts the new one there */
        each_channel<W>(h, [=](unsigned b, unsigned c) {
            const size_t at = (b * room + pos) * inner + head * D + c;
            if (c < D) l->key[at] = h->s.qkv[(p->R + b) * D + c], l->value[at] = h->s.qkv[(2 * p->R + b) * D + c];
        });
        __syncthreads();
    }
    for (unsigned b = 0; b < p->R; b++) {
        WarpSight<W> x = {{}, {}, -HUGE_VALF, 0};
        const size_t at = b * room * inner + (size_t)head * D;
        for (unsigned u = 0; u < W / 64; u++) {
            const Unit<2> query = load_two(h->s.qkv + b * D, h->lane * 2 + u * 64, D, true);
            for (int e = 0; e < 2; e++) x.query[u][e] = to_float(query.at[e]) / sqrtf((float)D);
        }
        for (unsigned j = begin + h->warp; j < end; j += SEES * STEP_WARPS)
            see<W>(&x, l->key + at, l->value + at, j, end, inner, D);
        float *const mine = h->s.teams + (b * STEP_WARPS + h->warp) * (D + 2);
        for (unsigned u = 0; u < W / 64; u++)
            for (unsigned e = 0; e < 2; e++) {
                const unsigned c = u * 64 + h->lane * 2 + e;
                if (c < D) mine[c] = x.out[u][e];
            }
        if (h->lane == 0) mine[D] = x.largest, mine[D + 1] = x.sum;
    }
    __syncthreads();
    each_channel<W>(h, [=](unsigned b, unsigned c) {
        const SeenKeys s = join_seen(h->s.teams + b * STEP_WARPS * (D + 2), D + 2, D, c);
        for (unsigned k = 0; k < CLUSTER; k++) {
            float *const there = in_block(h->s.seen, k) + (h->rank * p->R + b) * (D + 2);
            if (c < D) there[c] = s.out;
            if (c == 0) there[D] = s.peak, there[D + 1] = s.sum;
        }
    });
    cluster_sync();
    each_channel<W>(h, [=](unsigned b, unsigned c) {
        const SeenKeys s = join_seen(h->s.seen + b * (D + 2), p->R * (D + 2), D, c);
        if (c < D) h->s.y[in_blocks(b, c)] = to_floatX(s.out / s.sum);
    });
    __syncthreads();
}

/* A number for all blocks of the cluster */
static __device__ inline void tell(floatX *mine, float x) {
    for (unsigned k = 0; k < CLUSTER; k++) *in_block(mine, k) = to_floatX(x);
}

static __device__ inline void take_part(Here *h, unsigned layer, unsigned part, unsigned pos) {
    const Step *p = h->p;
    const StepLayer *l = &h->s.layer[layer];
    const unsigned width = part_width(p, l->kind, part), D = p->D;
    const Piece in = piece_of(part_rows(p, l->kind, part), p->C, h->rank, CLUSTER);
    if (l->kind == BLOCK_FEED) {
        floatX *const y = h->s.y;
        multiply(h, in, h->s.rows, [=](unsigned b, unsigned r, float x) {
            tell(y + in_blocks(b, r), x * 0.5f * erfcf(-x * 0.70710678f));
        });
        cluster_sync();
    } else {
        floatX *const qkv = h->s.qkv;
        multiply(h, in, h->s.rows, [=](unsigned b, unsigned r, float x) {
            const unsigned which = (r >= D) + (r >= 2 * D);
            tell(qkv + (which * p->R + b) * D + r - which * D, x);
        });
        cluster_sync();
        D <= 64 ? attend_head<64>(h, l, part, pos) : attend_head<128>(h, l, part, pos);
    }
    float *const partial = partial_of(p, layer, part);
    multiply(h, piece_of(p->C, width, h->rank, CLUSTER), h->s.y,
             [=](unsigned b, unsigned r, float x) { partial[b * p->C + r] = x; });
}

/* ---- A token ---- */

/* The variant's logits of row b, from the raw ones, at position pos */
static __device__ inline void vary_row(const Step *p, unsigned b, unsigned pos) {
    const Variant *v = &p->variant;
    if (!v->log_scalors && !v->residual) return;
    const int32_t *ids = v->ids + (size_t)b * (v->prompt + v->N);
    const RowVariant x = with_residual(row_variant(v, ids[0], pos), v, ids[0], p->K);
    const unsigned kept = (unsigned)ids[v->prompt + pos];
    float *const logits = p->draw.logits + (size_t)b * p->K;
    for (unsigned k = threadIdx.x; k < p->K; k += STEP_THREADS)
        logits[k] = p->raw[(size_t)b * p->K + k] * x.scale + (k == kept ? x.same : x.different);
    __syncthreads();
}

/* Block b of the GPU draws for sample b. */
static __device__ inline void draw_tokens(const Here *h, unsigned pos) {
    const Step *p = h->p;
    const unsigned b = blockIdx.x, samples = p->draws ? (unsigned)p->draw.samples : p->R;
    if (b >= samples) return;
    for (unsigned r = b; r < p->R; r += samples) vary_row(p, r, pos); /* guided: two */
    if (p->draws) draw_one(h->s.draw, p->draw, b, pos - (unsigned)p->prompt);
}

static __device__ inline void feed_token(Here *h, unsigned pos) {
    const Step *p = h->p;
    share_x(h, [=](float, unsigned b, unsigned c) {
        return p->token[(size_t)p->draw.ids[b] * p->C + c] + p->position[(size_t)pos * p->C + c];
    });
    for (unsigned l = 0; l < p->n_layers; l++) {
        if (l > 0) add_parts(h, l - 1);
        norm_x(h);
        for (unsigned part = h->cluster; part < parts_of(p, h->s.layer[l].kind); part += p->clusters) {
            if (part != h->cluster) cluster_sync(); /* all have read y and qkv */
            take_part(h, l, part, pos);
        }
        ask_norm(h, l + 1);
        grid_meet(h);
    }
    add_parts(h, p->n_layers - 1);
    norm_x(h);
    multiply(h, piece_of(p->K, p->C, blockIdx.x, gridDim.x), h->s.rows,
             [=](unsigned b, unsigned r, float x) { p->raw[(size_t)b * p->K + r] = x; });
}

static __device__ inline Here arrive(const Step *p, unsigned char *shared) {
    Here h;
    h.p = p, h.cluster = blockIdx.x / CLUSTER, h.rank = cluster_rank();
    h.warp = threadIdx.x / WARP, h.lane = threadIdx.x % WARP;
    h.length = p->length[blockIdx.x], h.left = h.length * p->tokens, h.room = p->chunks;
    h.at = h.phase = h.within = h.to = h.from = h.met = 0;
    const Piece own = piece_of(p->C, 0, h.rank, CLUSTER);
    h.first = own.first * STEP_TILE;
    h.columns = h.first + own.tiles * STEP_TILE < p->C ? own.tiles * STEP_TILE : p->C - h.first;
    h.stream = (const unsigned char *)(p->packed + (size_t)blockIdx.x * p->stride * BLOCK);
    place_shared(&h.s, p, shared);
    for (unsigned i = threadIdx.x; i <= p->n_layers; i += STEP_THREADS) h.s.layer[i] = p->layer[i];
    for (unsigned i = threadIdx.x; i < ceil_of(p->C, BLOCK_COLUMNS) * BLOCK; i += STEP_THREADS)
        h.s.rows[i] = to_floatX(0);
    for (unsigned i = threadIdx.x; i < ceil_of(p->width > p->D ? p->width : p->D, BLOCK_COLUMNS) * BLOCK;
         i += STEP_THREADS)
        h.s.y[i] = to_floatX(0);
    for (unsigned i = threadIdx.x; i < p->R * share_of(p); i += STEP_THREADS) h.s.own[i] = 0;
    if (threadIdx.x == 0) {
        for (unsigned c = 0; c < p->chunks; c++) barrier_init(h.s.full + c);
        barrier_fence();
    }
    cluster_sync();
    fill_ring(&h);
    return h;
}

static __global__ void __launch_bounds__(STEP_THREADS, 1) step_kernel(Step p) {
    SHARED(unsigned char, shared);
    Here h = arrive(&p, shared);
    const unsigned pos = (unsigned)*p.pos;
    for (unsigned n = 0; n < p.tokens; n++) {
        ask_norm(&h, 0);
        feed_token(&h, pos + n);
        pass_blocks(&h, h.length * CHUNK_BLOCKS - h.within); /* of the last chunk */
        h.within = 0;
        grid_meet(&h);
        draw_tokens(&h, pos + n);
        if (n + 1 < p.tokens) grid_meet(&h);
    }
    if (p.draws && blockIdx.x == 0 && threadIdx.x < p.R) p.pos[threadIdx.x] = (int)(pos + p.tokens);
}

#else
static __global__ void __launch_bounds__(WARP) step_kernel(Step) {}
#endif

/* ---- On the host ---- */

static int decode_by_kernels; /* 1: the step kernel stays away, for tests */

/* Chunks of the ring that fit beside a block's other shared memory */
static unsigned chunks_beside(const Step *p, size_t most) {
    StepShared unused;
    const size_t without = place_shared(&unused, p, NULL) + 128, chunk = CHUNK_BLOCKS * BLOCK_BYTES + sizeof(uint64_t);
    const size_t n = most < without ? 0 : (most - without) / chunk;
    return n < MOST_CHUNKS ? (unsigned)n : (unsigned)MOST_CHUNKS;
}

/* Sizes, and whether this GPU can, with any number of rows: then what there is of it. What the memory of a plan depends on
 * is the same for any batch, for a batch may be smaller than what was planned. */
static int step_fits(Step *p, const Decoder *s) {
    memset(p, 0, sizeof *p);
    p->R = STEP_ROWS, p->C = (unsigned)s->C, p->K = (unsigned)s->K;
    p->heads = (unsigned)s->heads, p->D = (unsigned)s->D, p->hidden = 4 * p->C, p->n_layers = (unsigned)s->n_layers;
    p->T = (unsigned)s->T, p->T_context = (unsigned)s->T_context;
    p->width = ceil_of(ceil_of(p->hidden, FEED_PARTS), STEP_TILE) * STEP_TILE,
    p->feed_parts = ceil_of(p->hidden, p->width);
    if (!IS_BF16 || decode_by_kernels || p->D % 2 || p->D > GPU_HEAD_MAX) return 0;
    const size_t most = most_shared();
    const unsigned ready = most_clusters(step_kernel, CLUSTER, STEP_THREADS, most),
                   parts = max_size(p->heads, p->feed_parts);
    const unsigned blocks = ceil_of(p->C > p->width ? p->C : p->width, BLOCK_COLUMNS);
    const unsigned least = ceil_of(1 + tiles_at_once(blocks) * blocks, CHUNK_BLOCKS) + 1;
    p->clusters = ready < parts ? ready : parts;
    if (p->clusters == 0 || chunks_beside(p, most) < least) return 0;
    if (s->B < STEP_ROWS) p->R = (unsigned)s->B;
    p->chunks = chunks_beside(p, most);
    return 1;
}

/* Blocks of the longest stream: of each product the block with most tiles, in the cluster with most parts */
static unsigned longest_stream(const Step *p) {
    const unsigned in = ceil_of(p->C, BLOCK_COLUMNS), depth = p->T_context ? 3 : 2;
    unsigned all = blocks_of_tiles(ceil_of(ceil_of(p->K, STEP_TILE), p->clusters * CLUSTER), in);
    for (unsigned l = 0; l < p->n_layers; l++) {
        const BlockKind kind = l % depth == depth - 1 ? BLOCK_FEED : BLOCK_SELF;
        const unsigned tiles = ceil_of(ceil_of(part_rows(p, kind, 0), STEP_TILE), CLUSTER);
        all += ceil_of(parts_of(p, kind), p->clusters) *
               (blocks_of_tiles(tiles, in) +
                blocks_of_tiles(share_of(p) / STEP_TILE, ceil_of(part_width(p, kind, 0), BLOCK_COLUMNS)));
    }
    return ceil_of(all, CHUNK_BLOCKS) * CHUNK_BLOCKS;
}

/* The arrays of a plan's memory, through place(&array, n) */
template <typename Place> static void place_step(Step *p, Place place) {
    const unsigned parts = p->feed_parts > p->heads ? p->feed_parts : p->heads, blocks = p->clusters * CLUSTER;
    p->stride = longest_stream(p);
    place((StepLayer **)(void *)&p->layer, p->n_layers + 1);
    place((StepMatrices **)(void *)&p->matrices, p->n_layers + 1);
    place(&p->packed, (size_t)blocks * p->stride * BLOCK);
    place(&p->length, blocks), place(&p->counter, 1);
    place(&p->partial, (size_t)2 * parts * p->R * p->C);
}

static void describe_layers(const Device *d, const Decoder *s, StepLayer *layer, StepMatrices *m) {
    const auto matrix = [&](const floatX **weight, const float **bias, const Projection *p) {
        *weight = p->weight ? operand_of(d, p->weight) : NULL, *bias = p->bias;
    };
    for (size_t i = 0; i < s->n_layers; i++) {
        const DecoderLayer *l = &s->layer[i];
        const Projection *const in[3] = {l->kind == BLOCK_FEED ? &l->up : &l->q, &l->k, &l->v};
        layer[i] = {l->kind, l->norm_weight, l->norm_bias, (floatX *)l->key, (floatX *)l->value};
        for (int k = 0; k < 3; k++) matrix(&m[i].in[k], &m[i].in_bias[k], in[k]);
        matrix(&m[i].back, &m[i].back_bias, l->kind == BLOCK_FEED ? &l->down : &l->out);
    }
    layer[s->n_layers] = {BLOCK_FEED, s->norm_weight, s->norm_bias, NULL, NULL};
    matrix(&m[s->n_layers].back, &m[s->n_layers].back_bias, &s->head);
}

/* Once a pass: what the GPU reads of the layers, and the streams of weights */
static Err pack_weights(Device *d, const Decoder *s, const Step *p) {
    StepLayer *layer = NULL;
    StepMatrices *m = NULL;
    const size_t n = s->n_layers + 1;
    Err e = mem_alloc(&layer, n, sizeof *layer, "layers");
    if (e == OK) e = mem_alloc(&m, n, sizeof *m, "layers");
    if (e == OK) {
        describe_layers(d, s, layer, m);
        e = to_device(d, (void *)p->layer, layer, n * sizeof *layer);
    }
    if (e == OK) e = to_device(d, (void *)p->matrices, m, n * sizeof *m);
    free(layer), free(m);
    TRY(e);
    LAUNCH(d, pack_kernel, p->clusters * CLUSTER, STEP_THREADS, 0, *p);
    return OK;
}

/* `tokens` positions from *pos on; with draws, each draws the token that the next one reads. */
static Err run_steps(Device *d, const Step *p, size_t tokens, int draws) {
    StepShared unused;
    Step now = *p;
    now.tokens = (unsigned)tokens, now.draws = draws;
    const size_t bytes = place_shared(&unused, p, NULL);
    TRY(allow_shared((const void *)step_kernel, bytes, "step_kernel"));
    TRY(device_zero(d, now.counter, sizeof *now.counter));
    return cuda_error(start_clusters(step_kernel, p->clusters, CLUSTER, STEP_THREADS, bytes, d->stream, now),
                      "step_kernel");
}
