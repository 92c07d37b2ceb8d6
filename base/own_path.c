/* own_path.c - where the running program lies: what belongs to it, its models and its fellows, is looked for from there. */
#include "base/own_path.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef LIBRARY
#include <dlfcn.h>
#elif defined(__APPLE__)
#include <mach-o/dyld.h>
#endif

#if defined(LIBRARY) || defined(__APPLE__)
/* path = name, links solved */
static int solved(char path[PATH_BYTES], const char *name) {
    char *real_name = realpath(name, NULL);
    const size_t n = real_name ? strlen(real_name) : PATH_BYTES;
    if (n < PATH_BYTES) memcpy(path, real_name, n + 1);
    free(real_name);
    return n < PATH_BYTES;
}
#endif

int own_path(char path[PATH_BYTES]) {
#ifdef LIBRARY
    static const char inside; /* linked into a program, the library lies where that does */
    Dl_info info;
    return dladdr(&inside, &info) && info.dli_fname && solved(path, info.dli_fname);
#elif defined(__APPLE__)
    char name[PATH_BYTES];
    uint32_t size = sizeof name;
    return _NSGetExecutablePath(name, &size) == 0 && solved(path, name);
#else
    const ssize_t n = readlink("/proc/self/exe", path, PATH_BYTES - 1);
    path[n > 0 && n < PATH_BYTES - 1 ? n : 0] = 0;
    return *path != 0;
#endif
}
