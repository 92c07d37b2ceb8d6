/* own_path.h - for files that look for what lies beside the program. */
#ifndef OWN_PATH_H
#define OWN_PATH_H

#include "base/base.h"

/* path = that of the running program, links solved; in the library: of that. 0: the system does not say. */
int own_path(char path[PATH_BYTES]);

#endif
