/* version.h - what --version says. */
#ifndef VERSION_H
#define VERSION_H

/* The commit that the program was made from, in twelve digits, with -dirty behind if more was changed; or "unknown". */
const char *version_commit_text(void);
/* Commit, compiler, processor level and the libraries that the running program has, a line each, on stdout. */
void version_print(const char *program);

#endif
