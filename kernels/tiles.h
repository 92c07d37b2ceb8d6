/* tiles.h - the tile registers of Intel's processors, AMX: eight of at most 16 rows of 64 bytes.
 *
 * A thread that uses them configures them first, which says how many rows and bytes each has, and releases them in the
 * end: a thread that keeps tiles makes every change of tasks save 8 KB more. Without such a processor at compile time all
 * of this is nothing; TILES_IN_C puts plain C in its place (test/tiles_in_c.h).
 *
 * The compiler does not know that a tile is read from memory: between stores to it and tile_load there must be
 * tiles_begin, or tiles_see_stores(). */
#ifndef KERNELS_TILES_H
#define KERNELS_TILES_H

#include "base/tiles.h"
#include "kernels/vector.h"

#if defined(REAL_DOUBLE)
#define HAVE_TILES 0
#elif defined(TILES_IN_C)
#define HAVE_TILES 1
#include "test/tiles_in_c.h"
#elif TILES_COMPILED && defined(__AVX512F__)
#define HAVE_TILES 1
#define tile_configure(shape) _tile_loadconfig(shape)
#define tile_release() _tile_release()
#define tile_zero(t) _tile_zero(t)
#define tile_load(t, p, bytes) _tile_loadd(t, p, bytes) /* rows are `bytes` apart */
#define tile_store(t, p, bytes) _tile_stored(t, p, bytes)
#define tile_add_product(sum, a, b) _tile_dpbf16ps(sum, a, b)
#else
#define HAVE_TILES 0
#endif

#define tiles_see_stores() __asm__ volatile("" ::: "memory")

#if HAVE_TILES

/* What ldtilecfg reads. It stays in memory: gcc believes that only the first 8 bytes are read, and leaves out the rest
 * of a shape that was written before. */
typedef struct {
    uint8_t palette, start_row, zeros[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} TileShape;
_Static_assert(sizeof(TileShape) == 64, "the shape that ldtilecfg reads");

/* Tiles 0..3 are sums of r rows, 4 and 5 of B, 6 and 7 of A with r rows. */
#define SHAPE_OF(r)                                                                                                    \
    {                                                                                                                  \
        1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {                                                                 \
            r, r, r, r, 16, 16, r, r                                                                                   \
        }                                                                                                              \
    }
static const TileShape tile_shapes[16] __attribute__((aligned(64))) = {
    SHAPE_OF(1), SHAPE_OF(2),  SHAPE_OF(3),  SHAPE_OF(4),  SHAPE_OF(5),  SHAPE_OF(6),  SHAPE_OF(7),  SHAPE_OF(8),
    SHAPE_OF(9), SHAPE_OF(10), SHAPE_OF(11), SHAPE_OF(12), SHAPE_OF(13), SHAPE_OF(14), SHAPE_OF(15), SHAPE_OF(16)};
#undef SHAPE_OF

#endif

/* Before a thread's blocks, of `rows` rows if that is less than 16; and after them. */
INLINE void tiles_begin(size_t rows) {
#if HAVE_TILES
    if (tiles_here()) tile_configure(&tile_shapes[min_size(rows, 16) - 1]);
#endif
    tiles_see_stores();
    (void)rows;
}

INLINE void tiles_end(void) {
#if HAVE_TILES
    if (tiles_here()) tile_release();
#endif
}

#endif
