/* version.h - what --version says. */
#ifndef VERSION_H
#define VERSION_H

/* Commit, compiler, processor level and the libraries that the running program has, a line each, on stdout. */
void version_print(const char *program);

#endif
