/* places.h - what ./train asks of places.c beside what files.h has. */
#ifndef PLACES_H
#define PLACES_H

#include "base/base.h"

/* path = that of a program beside the one that is running, links solved; 0: the system does not say. */
int program_beside(char path[PATH_BYTES], const char *name);

#endif
