/* tiles_in_c.c - each thread's tiles in plain C, and what base/tiles.c asks of processor and system. */
#include "test/tiles_in_c.h"

_Thread_local TilesInC tiles_in_c;
int tiles_in_c_refused; /* by the system */

int processor_has_tiles(void);
int processor_has_tiles(void) {
    return 1;
}

int system_grants_tiles(void);
int system_grants_tiles(void) {
    return !tiles_in_c_refused;
}
