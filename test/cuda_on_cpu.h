/* cuda_on_cpu.h - runs CUDA kernels on the CPU, so that they can be tested and stepped through without a GPU.
 *
 * Compiled with a C++ compiler and -DCUDA_ON_CPU, device.cu includes this file where it would include CUDA's headers.
 * It gives meaning to the words of CUDA that our kernels use:
 *
 *     __global__ __device__ __shared__   functions are functions; static shared memory is a static variable
 *     threadIdx blockIdx blockDim gridDim
 *     __syncthreads __syncwarp __shfl_xor_sync __shfl_up_sync __shfl_sync __ballot_sync   threads meet and exchange
 *     atomicAdd, __nv_bfloat16, expf and its kin
 *     copy_async load_matrices multiply_tiles...   what kernels/ptx.h has of tensor cores and what feeds them
 *     cluster_sync in_block bulk_copy barrier_wait...   and of blocks that know each other
 *     cudaMalloc cudaMemcpyAsync cudaGraphLaunch...   the calls of CUDA's runtime that device.cu and decode.cu make
 *
 * The blocks of a launch run one after the other, those of start_clusters together, each as far as it can by turns.
 * The threads of a block are fibers: each has a stack of its own, and runs until it must wait for others; then the
 * next one goes on. So a kernel without barriers is a plain loop, and a debugger that stops in one shows the
 * thread's own variables. A warp runs until all of its lanes wait at a barrier of the block, then the next one, so
 * that a warp gets as far ahead of others as a missing barrier lets it. Warps run in order, or, with
 * cuda_on_cpu_reverse set, backwards, lanes and blocks too: a kernel whose result then changes lacks a barrier or
 * depends on the order of its blocks.
 *
 * What a GPU would answer with wrong numbers or a hang ends the program with one line: threads of a block that wait
 * at different barriers, or that have left while others wait; a block that is not whole warps; writing beyond the
 * dynamic shared memory (which is full of NaN when a block begins); copy_async and load_matrices at addresses that
 * are not multiples of what they move. copy_async copies no sooner than the thread waits for it; backwards, at once.
 * Not looked for: accesses out of bounds of global memory, which the address sanitizer finds, and races that neither
 * order shows.
 *
 * Read: fibers; a block; the stream; warps; the words; the runtime's calls. */
#ifndef CUDA_ON_CPU_H
#define CUDA_ON_CPU_H

#include "base/base.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <tuple>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define FIBERS_UNDER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FIBERS_UNDER_ASAN 1
#endif
#endif
#ifdef FIBERS_UNDER_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;
static int cuda_on_cpu_reverse;               /* 1: threads and blocks in the opposite order */
static size_t cuda_on_cpu_shared = 227 << 10; /* bytes of shared memory that a block can have */

/* ---- Fibers ---- */

namespace on_cpu {

enum { WARP = 32, MAX_THREADS = 1024, MAX_FIBERS = 4096, STACK_BYTES = 128 << 10, GUARD_BYTES = 256 };
typedef enum { READY, AT_BARRIER, AT_WARP, AT_CLUSTER, SPINNING, LEFT } State;

struct Fiber {
    State state;
    int line;   /* of the barrier where it waits */
    int parity; /* which of its warp's two sets of slots the next exchange uses */
    char *stack;
    size_t stack_bytes;
    void *sp; /* where its stack ends while others run */
    void *asan;
};
static Fiber fiber[MAX_FIBERS], scheduler;
static unsigned running;                        /* index of the fiber that runs */
static unsigned per_block = 1, per_cluster = 1; /* threads of a block, blocks of a cluster; of the present launch */

struct Kernel { /* a launch's function and arguments */
    virtual void run() const = 0;
    virtual ~Kernel() {}
};
static const Kernel *kernel;
static const char *kernel_name;

static void fail(const char *what, int line) {
    fprintf(stderr, "%s, block (%u,%u,%u), thread %u, line %d: %s\n", kernel_name, blockIdx.x, blockIdx.y, blockIdx.z,
            running % per_block, line, what);
    abort();
}

/* stack_switch(&a, b) keeps on the present stack the registers that a function must preserve, a = where it ends, and
 * goes on where stack b ends. (swapcontext of the C library would do, but asks the kernel about signals each time, and
 * the address sanitizer tidies up after longjmp for longer than most kernels run.) */
extern "C" void stack_switch(void **from, void *to) __asm__("on_cpu_stack_switch");
#if defined(__x86_64__)
enum {
    SAVED = 7,
    RETURN_AT = 6,
    ABOVE = 1
}; /* words on a new stack: registers and where to go on; above: to align it */
__asm__(".text\n"
        "on_cpu_stack_switch:\n"
        "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n    pushq %r13\n    pushq %r14\n    pushq %r15\n"
        "    movq %rsp, (%rdi)\n    movq %rsi, %rsp\n"
        "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbx\n    popq %rbp\n"
        "    ret\n");
#elif defined(__aarch64__)
enum { SAVED = 20, RETURN_AT = 11, ABOVE = 0 };
__asm__(".text\n"
        "on_cpu_stack_switch:\n"
        "    sub sp, sp, #160\n"
        "    stp x19, x20, [sp]\n    stp x21, x22, [sp, #16]\n    stp x23, x24, [sp, #32]\n"
        "    stp x25, x26, [sp, #48]\n    stp x27, x28, [sp, #64]\n    stp x29, x30, [sp, #80]\n"
        "    stp d8, d9, [sp, #96]\n    stp d10, d11, [sp, #112]\n"
        "    stp d12, d13, [sp, #128]\n    stp d14, d15, [sp, #144]\n"
        "    mov x2, sp\n    str x2, [x0]\n    mov sp, x1\n"
        "    ldp x19, x20, [sp]\n    ldp x21, x22, [sp, #16]\n    ldp x23, x24, [sp, #32]\n"
        "    ldp x25, x26, [sp, #48]\n    ldp x27, x28, [sp, #64]\n    ldp x29, x30, [sp, #80]\n"
        "    ldp d8, d9, [sp, #96]\n    ldp d10, d11, [sp, #112]\n"
        "    ldp d12, d13, [sp, #128]\n    ldp d14, d15, [sp, #144]\n"
        "    add sp, sp, #160\n    ret\n");
#else
#error "fibers need to know how this processor keeps its registers: x86-64 and aarch64 are here"
#endif

static void switch_to(Fiber *from, Fiber *to) {
#ifdef FIBERS_UNDER_ASAN
    __sanitizer_start_switch_fiber(&from->asan, to->stack, to->stack_bytes);
#endif
    stack_switch(&from->sp, to->sp);
#ifdef FIBERS_UNDER_ASAN
    __sanitizer_finish_switch_fiber(from->asan, NULL, NULL);
#endif
}

/* A fiber lives as long as the program and runs thread after thread. */
static void fiber_main() {
#ifdef FIBERS_UNDER_ASAN
    const void *bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(NULL, &bottom, &size);
    scheduler.stack = (char *)bottom,
    scheduler.stack_bytes = size; /* every launch comes from the same thread's stack */
#endif
    for (;;) {
        kernel->run();
        fiber[running].state = LEFT;
        switch_to(&fiber[running], &scheduler);
    }
}

static void make_fiber(Fiber *f) {
    if (f->stack) return;
    f->stack = (char *)mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (f->stack == (char *)MAP_FAILED) fail("no memory for another thread", 0);
    f->stack_bytes = STACK_BYTES;
    void **end = (void **)(void *)(f->stack + STACK_BYTES) - ABOVE - SAVED;
    end[RETURN_AT] = (void *)fiber_main;
    f->sp = end;
}

static void resume(unsigned i) {
    running = i;
    const unsigned t = i % per_block;
    threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
    switch_to(&scheduler, &fiber[i]);
}

static void wait(State why, int line) {
    Fiber *f = &fiber[running];
    f->state = why, f->line = line;
    switch_to(f, &scheduler);
}

/* ---- Blocks: their threads run until all have left ---- */

enum { MAX_BLOCKS = MAX_FIBERS / WARP };
static char
    *shared_of[MAX_BLOCKS]; /* dynamic, of the blocks that run together; behind it GUARD_BYTES that nobody may touch */
static char *shared_memory; /* of the block that runs */
static size_t shared_bytes;

/* When nobody of a block can go on, all must be at one barrier, or some wait for other blocks. Returns whether they
 * go on. */
static bool release_barrier(unsigned first) {
    unsigned left = 0;
    for (unsigned i = first; i < first + per_block; i++) {
        if (fiber[i].state == AT_CLUSTER || fiber[i].state == SPINNING) return false;
        left += fiber[i].state == LEFT;
    }
    if (left == per_block) return false;
    for (unsigned i = first; i < first + per_block; i++) {
        running = i;
        if (fiber[i].state == LEFT) fail("a thread has left while others wait at __syncthreads or for its warp", 0);
        if (fiber[i].state == AT_WARP) fail("waits for lanes of its warp that never come", fiber[i].line);
        if (fiber[i].line != fiber[first].line) fail("waits at another __syncthreads than thread 0", fiber[i].line);
    }
    for (unsigned i = first; i < first + per_block; i++) fiber[i].state = READY;
    return true;
}

static unsigned arrived[MAX_FIBERS / WARP]; /* lanes of each warp that wait for the others */

/* Copies that a thread has begun: queue[done..closed-1] in whole groups, up to queued - 1 in one that is still open. */
struct Copies {
    enum { MOST = 512 };
    struct {
        void *to;
        const void *from;
        int bytes, there, group;
    } queue[MOST];
    int done, queued, groups;
};
static Copies copies[MAX_FIBERS];

/* The lanes of a warp, thread `first` and those behind it, until none can go on. Returns how often one went on. */
static unsigned run_warp(unsigned first) {
    unsigned all = 0, ran = 1;
    for (; ran; all += ran) {
        ran = 0;
        for (unsigned k = 0; k < WARP; k++) {
            const unsigned i = first + (cuda_on_cpu_reverse ? WARP - 1 - k : k);
            if (fiber[i].state == READY) resume(i), ran++;
        }
    }
    return all;
}

/* Block q of those that run together, number k of the grid, until it is done or waits for others */
static void run_block(unsigned q, size_t k) {
    const unsigned first = q * per_block;
    unsigned ran;
    blockIdx =
        dim3((unsigned)(k % gridDim.x), (unsigned)(k / gridDim.x % gridDim.y), (unsigned)(k / gridDim.x / gridDim.y));
    shared_memory = shared_of[q];
    do {
        ran = 0;
        for (unsigned w = 0; w < per_block; w += WARP)
            ran += run_warp(first + (cuda_on_cpu_reverse ? per_block - WARP - w : w));
    } while (ran || release_barrier(first));
}

/* Lets those go on who wait for other blocks: the threads of a cluster that have all come, and whoever looks again and
 * again for what another block writes. Returns how many threads have still to go on. */
static unsigned wake_blocks(unsigned blocks) {
    enum { PATIENCE = 1000 };
    static unsigned looked; /* rounds in which there was nothing but looking */
    const unsigned n = blocks * per_block, team = per_cluster * per_block;
    unsigned left = 0, met = 0;
    for (unsigned first = 0; first < n; first += team) {
        unsigned there = 0;
        for (unsigned i = first; i < first + team; i++) there += fiber[i].state == AT_CLUSTER;
        for (unsigned i = first; i < first + team && there == team; i++) fiber[i].state = READY, met = 1;
    }
    for (unsigned i = 0; i < n; i++) {
        if (fiber[i].state == SPINNING) fiber[i].state = READY;
        left += fiber[i].state == LEFT;
        running = i;
        if (looked > PATIENCE && fiber[i].state != LEFT) fail("waits for what never comes", fiber[i].line);
    }
    looked = met || left == n ? 0 : looked + 1;
    return n - left;
}

/* Blocks k.. of the grid at once */
static void run_blocks(unsigned blocks, size_t k) {
    const unsigned n = blocks * per_block;
    for (unsigned i = 0; i < n; i++) copies[i].done = copies[i].queued = copies[i].groups = 0;
    for (unsigned q = 0; q < blocks && shared_bytes; q++) memset(shared_of[q], 0xff, shared_bytes);
    memset(arrived, 0, sizeof arrived);
    for (unsigned i = 0; i < n; i++) fiber[i].state = READY, fiber[i].parity = 0;
    do {
        for (unsigned c = 0; c < blocks; c++) {
            const unsigned q = cuda_on_cpu_reverse ? blocks - 1 - c : c;
            run_block(q, k + q);
        }
    } while (wake_blocks(blocks));
    for (unsigned q = 0; q < blocks && shared_bytes; q++)
        for (size_t i = 0; i < GUARD_BYTES; i++)
            if (shared_of[q][shared_bytes + i] != 0x55) fail("the block wrote beyond its shared memory", 0);
}

/* A kernel's launch, or anything else that the stream does, with its arguments as they were when it was asked for */
template <typename... P> struct Call : Kernel {
    void (*function)(P...);
    std::tuple<P...> arguments;
    Call(void (*f)(P...), P... p) : function(f), arguments(p...) {}
    void run() const override { std::apply(function, arguments); }
};
template <typename... P> struct CallOf {
    void (*function)(P...);
    Call<P...> operator()(P... p) const { return Call<P...>(function, p...); }
};
template <typename... P> static CallOf<P...> call_of(void (*f)(P...)) {
    return CallOf<P...>{f};
}

/* cluster: blocks of a cluster of a grid whose blocks all run at once; 0: they run one after the other. */
static void run_grid(const char *name, dim3 grid, dim3 block, size_t shared, const Kernel &call, unsigned cluster = 0) {
    const unsigned n = block.x * block.y * block.z;
    const size_t blocks = (size_t)grid.x * grid.y * grid.z;
    const unsigned together = cluster ? (unsigned)blocks : 1;
    kernel = &call, kernel_name = name;
    blockDim = block, gridDim = grid, running = 0, per_block = n, per_cluster = cluster ? cluster : 1;
    if (n == 0 || n % WARP || n > MAX_THREADS || blocks == 0)
        fail("an empty grid, or a block that is not 1 to 32 whole warps", 0);
    if (together > MAX_BLOCKS || together * n > MAX_FIBERS || together % per_cluster)
        fail("more blocks at once than the emulation has room for, or no whole clusters", 0);
    if (shared > cuda_on_cpu_shared) fail("more shared memory than a block can have", 0);
    for (unsigned i = 0; i < together * n; i++) make_fiber(&fiber[i]);
    shared_bytes = shared;
    for (unsigned q = 0; q < together && shared; q++) {
        shared_of[q] = (char *)aligned_alloc(256, (shared + GUARD_BYTES + 255) / 256 * 256);
        memset(shared_of[q] + shared, 0x55, GUARD_BYTES);
    }
    for (size_t k = 0; k < blocks; k += together) run_blocks(together, cuda_on_cpu_reverse ? blocks - together - k : k);
    for (unsigned q = 0; q < together && shared; q++) free(shared_of[q]), shared_of[q] = NULL;
}

/* ---- The stream: what is asked for happens at once, or while a graph is captured, when that is launched ---- */

struct Work {
    const char *name; /* of a kernel; NULL: an ordinary call */
    dim3 grid, block;
    size_t shared;
    Kernel *call;
};
struct Graph {
    std::vector<Work> work;
};
static Graph *capturing;

template <typename C> static void launch(const char *name, dim3 grid, dim3 block, size_t shared, const C &call) {
    if (capturing)
        capturing->work.push_back(Work{name, grid, block, shared, new C(call)});
    else
        run_grid(name, grid, block, shared, call);
}
template <typename C> static void submit(const C &call) {
    if (capturing)
        capturing->work.push_back(Work{NULL, 1, 1, 0, new C(call)});
    else
        call.run();
}
static void run_graph(const Graph *g) {
    for (const Work &w : g->work)
        if (w.name)
            run_grid(w.name, w.grid, w.block, w.shared, *w.call);
        else
            w.call->run();
}
static void free_graph(Graph *g) {
    for (const Work &w : g->work) delete w.call;
    delete g;
}

static void copy(void *to, const void *from, size_t bytes) {
    if (bytes) memcpy(to, from, bytes);
}
static void fill(void *to, int byte, size_t bytes) {
    if (bytes) memset(to, byte, bytes);
}

/* ---- Warps: 32 threads that exchange values through slots ---- */

static uint64_t slot[2][MAX_FIBERS];

static void meet_warp(int line) {
    const unsigned first = running / WARP * WARP;
    if (++arrived[running / WARP] < WARP) return wait(AT_WARP, line);
    for (unsigned i = first; i < first + WARP; i++) {
        if (i != running && fiber[i].line != line) fail("lanes of a warp meet at different lines", line);
        fiber[i].state = READY;
    }
    arrived[running / WARP] = 0;
}

/* The values that all lanes of the warp bring. Two sets of slots take turns, so that nobody overwrites what a slower
 * lane has still to read: they are there until the exchange after the next begins. */
template <typename T> static const uint64_t *gather(T value, int line) {
    const unsigned me = running;
    const int set = fiber[me].parity;
    fiber[me].parity = !set;
    slot[set][me] = 0;
    memcpy(&slot[set][me], &value, sizeof value);
    meet_warp(line);
    return &slot[set][me / WARP * WARP];
}

template <typename T> static T exchange(unsigned mask, T value, unsigned from, int line) {
    if (mask != 0xffffffffu) fail("an exchange among a part of a warp", line);
    memcpy(&value, gather(value, line) + from % WARP, sizeof value);
    return value;
}

static inline unsigned lane() {
    return running % WARP;
}

static inline unsigned ballot(unsigned mask, int predicate, int line) {
    unsigned bits = 0;
    if (mask != 0xffffffffu) fail("an exchange among a part of a warp", line);
    const uint64_t *lanes = gather(predicate ? 1 : 0, line);
    for (unsigned i = 0; i < WARP; i++) bits |= (unsigned)(lanes[i] & 1) << i;
    return bits;
}

} // namespace on_cpu

/* ---- The words ---- */

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __syncthreads() on_cpu::wait(on_cpu::AT_BARRIER, __LINE__)
#define __syncwarp() on_cpu::exchange(0xffffffffu, 0, 0, __LINE__)
#define __shfl_sync(mask, value, from) on_cpu::exchange(mask, value, from, __LINE__)
#define __shfl_xor_sync(mask, value, bits) on_cpu::exchange(mask, value, on_cpu::lane() ^ (bits), __LINE__)
#define __shfl_up_sync(mask, value, by)                                                                                \
    on_cpu::exchange(mask, value, on_cpu::lane() >= (unsigned)(by) ? on_cpu::lane() - (by) : on_cpu::lane(), __LINE__)
#define __ballot_sync(mask, predicate) on_cpu::ballot(mask, predicate, __LINE__)

template <typename T> static inline T atomicAdd(T *at, T more) {
    T before = *at;
    *at += more;
    return before;
}
static inline int atomicMin(int *at, int x) {
    const int before = *at;
    *at = x < before ? x : before;
    return before;
}
static inline int atomicMax(int *at, int x) {
    const int before = *at;
    *at = x > before ? x : before;
    return before;
}
static inline int __ffs(int x) {
    return __builtin_ffs(x);
}
static inline float rsqrtf(float x) {
    return 1 / sqrtf(x);
}

/* What tensor cores and their helpers do, by PTX's tables of which lane has what. A word has two bf16. */
static inline void check_aligned(const void *at, int bytes, const char *what) {
    if ((uintptr_t)at % (unsigned)bytes) on_cpu::fail(what, 0);
}
template <int BYTES = 16> static inline void copy_async(void *shared, const void *global, int there) {
    on_cpu::Copies *c = &on_cpu::copies[on_cpu::running];
    check_aligned(shared, BYTES, "copies to a place in shared memory that is no multiple of the bytes copied");
    check_aligned(global, BYTES, "copies from a place in global memory that is no multiple of the bytes copied");
    if (cuda_on_cpu_reverse) return there ? (void)memcpy(shared, global, BYTES) : (void)memset(shared, 0, BYTES);
    if (c->done == c->queued) c->done = c->queued = 0;
    if (c->queued == c->MOST) on_cpu::fail("begins more copies than the emulation has room for", 0);
    c->queue[c->queued++] = {shared, global, BYTES, there, c->groups};
}
static inline void copy_commit() {
    on_cpu::copies[on_cpu::running].groups++;
}
template <int N> static inline void copy_wait() {
    on_cpu::Copies *c = &on_cpu::copies[on_cpu::running];
    for (; c->done < c->queued && c->queue[c->done].group < c->groups - N; c->done++) {
        const auto *one = &c->queue[c->done];
        if (one->there)
            memcpy(one->to, one->from, (size_t)one->bytes);
        else
            memset(one->to, 0, (size_t)one->bytes);
    }
}
/* The rows of matrices that the lanes of the warp name, as the lane's own registers would get them */
static inline const uint64_t *named_rows(const void *row, int line) {
    check_aligned(row, 16, "names a row of a matrix at no multiple of 16 bytes");
    return on_cpu::gather((uintptr_t)row, line);
}
static inline void load_matrices(unsigned word[4], const void *row, int line) {
    const uint64_t *rows = named_rows(row, line);
    const unsigned g = on_cpu::lane() / 4, t = on_cpu::lane() % 4;
    for (unsigned j = 0; j < 4; j++) word[j] = ((const unsigned *)rows[8 * j + g])[t];
}
static inline void load_matrices_turned(unsigned word[4], const void *row, int line) {
    const uint64_t *rows = named_rows(row, line);
    const unsigned g = on_cpu::lane() / 4, t = on_cpu::lane() % 4;
    for (unsigned j = 0; j < 4; j++)
        word[j] = ((const uint16_t *)rows[8 * j + 2 * t])[g] | (unsigned)((const uint16_t *)rows[8 * j + 2 * t + 1])[g]
                                                                   << 16;
}
#define load_matrices(word, row) load_matrices(word, row, __LINE__)
#define load_matrices_turned(word, row) load_matrices_turned(word, row, __LINE__)
static inline float bf16_of(unsigned word, unsigned half) {
    const unsigned bits = (word >> 16 * half) << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
static float mma_a[on_cpu::MAX_FIBERS / 32][16][16], mma_b[on_cpu::MAX_FIBERS / 32][8][16]; /* of each warp */
static inline void multiply_tiles(float c[4], const unsigned a[4], const unsigned b[2], int line) {
    const unsigned g = on_cpu::lane() / 4, t = on_cpu::lane() % 4, warp = on_cpu::running / on_cpu::WARP;
    for (unsigned i = 0; i < 8; i++)
        mma_a[warp][g + i / 2 % 2 * 8][i / 4 * 8 + 2 * t + i % 2] = bf16_of(a[i / 2], i % 2);
    for (unsigned i = 0; i < 4; i++) mma_b[warp][g][i / 2 * 8 + 2 * t + i % 2] = bf16_of(b[i / 2], i % 2);
    on_cpu::gather(0, line);
    for (unsigned i = 0; i < 4; i++)
        for (unsigned k = 0; k < 16; k++) c[i] += mma_a[warp][g + i / 2 * 8][k] * mma_b[warp][2 * t + i % 2][k];
    on_cpu::gather(0, line);
}
#define multiply_tiles(c, a, b) multiply_tiles(c, a, b, __LINE__)

/* The upper half of a float, rounded to the nearest, ties to even. */
struct __nv_bfloat16 {
    uint16_t bits;
};
static inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t u = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}
static inline __nv_bfloat16 __float2bfloat16(float f) {
    uint32_t u;
    __nv_bfloat16 x;
    memcpy(&u, &f, sizeof u);
    x.bits = (uint16_t)(f != f ? 0x7fc0u : (u + 0x7fffu + (u >> 16 & 1)) >> 16);
    return x;
}

template <typename T> static inline void store_whole(void *to, const T &from) {
    static_assert(sizeof(T) == 16, "one store");
    check_aligned(to, 16, "stores 16 bytes at no multiple of 16");
    memcpy(to, &from, sizeof from);
}

static inline float exp2_approx(float x) {
    return exp2f(x);
}
static inline float reciprocal_approx(float x) {
    return 1 / x;
}
static inline float log2_approx(float x) {
    return log2f(x);
}

/* Blocks that know each other. A barrier's word: how many bytes it still awaits, and the phase, which ends when there are
 * none. Bulk copies land when somebody waits for them; backwards, at once. */
static unsigned cuda_on_cpu_clusters = 2; /* that there is room for at once */
static inline unsigned cluster_rank() {
    return on_cpu::running / on_cpu::per_block % on_cpu::per_cluster;
}
static inline void cluster_sync() {
    on_cpu::wait(on_cpu::AT_CLUSTER, 0);
}
template <typename T> static inline T *in_block(T *mine, unsigned rank) {
    const size_t at = (size_t)((char *)mine - on_cpu::shared_memory);
    if (at >= on_cpu::shared_bytes || rank >= on_cpu::per_cluster)
        on_cpu::fail("no place in the cluster's shared memory", 0);
    const unsigned q = on_cpu::running / on_cpu::per_block;
    return (T *)(void *)(on_cpu::shared_of[q / on_cpu::per_cluster * on_cpu::per_cluster + rank] + at);
}
struct BulkCopy {
    void *to;
    const void *from;
    unsigned bytes;
    int32_t *barrier;
};
static std::vector<BulkCopy> bulk_copies;
static inline void land(const BulkCopy &c) {
    memcpy(c.to, c.from, c.bytes);
    c.barrier[0] -= (int32_t)c.bytes;
    if (c.barrier[0] == 0) c.barrier[1]++;
}
static inline void barrier_init(uint64_t *barrier) {
    *barrier = 0;
}
static inline void barrier_fence() {}
static inline void barrier_expect(uint64_t *barrier, unsigned bytes) {
    int32_t *const awaited = (int32_t *)(void *)barrier;
    if (awaited[0]) on_cpu::fail("a second copy under way to one barrier", 0);
    *awaited = (int32_t)bytes;
}
static inline void bulk_copy(void *shared, const void *global, unsigned bytes, uint64_t *barrier) {
    const BulkCopy c = {shared, global, bytes, (int32_t *)(void *)barrier};
    check_aligned(shared, 16, "copies in bulk to no multiple of 16 bytes");
    check_aligned(global, 16, "copies in bulk from no multiple of 16 bytes");
    if (bytes % 16) on_cpu::fail("copies no multiple of 16 bytes in bulk", 0);
    if (cuda_on_cpu_reverse) return land(c);
    bulk_copies.push_back(c);
}
static inline void barrier_wait(uint64_t *barrier, unsigned parity) {
    int32_t *const awaited = (int32_t *)(void *)barrier;
    while ((unsigned)awaited[1] % 2 == parity) {
        size_t k = 0;
        while (k < bulk_copies.size() && bulk_copies[k].barrier != awaited) k++;
        if (k == bulk_copies.size())
            on_cpu::wait(on_cpu::SPINNING, 0);
        else
            land(bulk_copies[k]), bulk_copies.erase(bulk_copies.begin() + (long)k);
    }
}
static inline void count_up(unsigned *counter) {
    ++*counter;
}
static inline unsigned counted(const unsigned *counter) {
    return on_cpu::wait(on_cpu::SPINNING, 0), *counter;
}
static inline unsigned bf16_pair(float first, float second) {
    return __float2bfloat16(first).bits | (unsigned)__float2bfloat16(second).bits << 16;
}

#define SHARED(type, name) type *name = (type *)(void *)on_cpu::shared_memory
#define START_KERNEL(kernel, grid, block, bytes, stream, ...)                                                          \
    do {                                                                                                               \
        (void)(stream);                                                                                                \
        on_cpu::launch(#kernel, grid, block, bytes, on_cpu::call_of(kernel)(__VA_ARGS__));                             \
    } while (0)

/* ---- The runtime's calls ---- */

#define HAS_CLUSTERS 1
typedef enum { cudaSuccess, cudaErrorMemoryAllocation = 2, cudaErrorStreamCaptureUnsupported = 900 } cudaError_t;
typedef enum { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice } cudaMemcpyKind;
enum { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaStreamCaptureModeThreadLocal = 1 };
typedef int cudaStream_t;
typedef on_cpu::Graph *cudaGraph_t, *cudaGraphExec_t;
struct cudaDeviceProp {
    char name[256];
    int major, minor;
    size_t sharedMemPerBlockOptin;
    unsigned char uuid[16];
};

static inline const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaSuccess                 ? "no error"
           : e == cudaErrorMemoryAllocation ? "out of memory"
                                            : "operation not permitted when stream is capturing";
}
static inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
static inline cudaError_t cudaDriverGetVersion(int *version) {
    return *version = 12000, cudaSuccess;
}
static inline cudaError_t cudaGetDeviceCount(int *n) {
    return *n = 1, cudaSuccess;
}
static inline cudaError_t cudaGetDevice(int *chosen) {
    return *chosen = 0, cudaSuccess;
}
static inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    *p = {"no GPU: CUDA kernels run on the CPU, for tests", 8, 0, cuda_on_cpu_shared};
    return cudaSuccess;
}
static inline cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    return *available = *total = memory_available(), cudaSuccess;
}
static inline cudaError_t cudaFuncSetAttribute(const void *, int, int) {
    return cudaSuccess;
}
struct cudaFuncAttributes {
    size_t sharedSizeBytes;
};
static inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, const void *) {
    return a->sharedSizeBytes = 0, cudaSuccess;
}
static inline size_t most_shared() {
    return cuda_on_cpu_shared;
}
template <typename... P> static inline unsigned most_clusters(void (*)(P...), unsigned, unsigned, size_t) {
    return cuda_on_cpu_clusters;
}
/* Begins in the graph that is captured, too, on a GPU; here nobody asks for it. */
template <typename... P, typename... A>
static inline cudaError_t start_clusters(void (*kernel)(P...), unsigned clusters, unsigned size, unsigned threads,
                                         size_t bytes, cudaStream_t, A... a) {
    if (on_cpu::capturing) return cudaErrorStreamCaptureUnsupported;
    on_cpu::run_grid("a kernel of clusters", clusters * size, threads, bytes, on_cpu::call_of(kernel)(a...), size);
    return cudaSuccess;
}

/* What waits for the stream, or takes memory, must not happen while a graph is captured. Memory is full of NaN: whoever
 * reads what nobody wrote shall notice. */
static inline cudaError_t not_captured() {
    return on_cpu::capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
static inline cudaError_t cudaMalloc(void **out, size_t bytes) {
    if (not_captured() != cudaSuccess) return not_captured();
    if (mem_alloc(out, bytes, 1, "the GPU's memory") != OK) return cudaErrorMemoryAllocation;
    memset(*out, 0xff, bytes);
    return cudaSuccess;
}
static inline cudaError_t cudaFree(void *p) {
    return free(p), cudaSuccess;
}
static inline cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    return *stream = 1, cudaSuccess;
}
static inline cudaError_t cudaStreamDestroy(cudaStream_t) {
    return cudaSuccess;
}
static inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return not_captured();
}
static inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    return on_cpu::submit(on_cpu::call_of(on_cpu::copy)(to, from, bytes)), cudaSuccess;
}
static inline cudaError_t cudaMemsetAsync(void *to, int byte, size_t bytes, cudaStream_t) {
    return on_cpu::submit(on_cpu::call_of(on_cpu::fill)(to, byte, bytes)), cudaSuccess;
}

static inline cudaError_t cudaStreamBeginCapture(cudaStream_t, int) {
    if (not_captured() != cudaSuccess) return not_captured();
    return on_cpu::capturing = new on_cpu::Graph, cudaSuccess;
}
static inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *out) {
    return *out = on_cpu::capturing, on_cpu::capturing = NULL, cudaSuccess;
}
static inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned) {
    return *out = graph, cudaSuccess;
}
static inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
    return on_cpu::run_graph(graph), cudaSuccess;
}
static inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) {
    return cudaSuccess; /* it is the graph itself */
}
static inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    return on_cpu::free_graph(graph), cudaSuccess;
}

#endif
