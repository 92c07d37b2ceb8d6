/* command.c - the one program of an installation: "imagebart sample ..." goes on as PREFIX/libexec/imagebart/sample, which
 * is ./sample as it was built. The prefix is where this program lies, through links: an installation may be moved.
 *
 * It is no part of the other programs, and knows nothing of them but their names. */
#include "base/own_path.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct {
    const char *name, *what;
} commands[] = {{"sample", "draws pictures, and says how likely the model finds others"},
                {"inpaint", "completes a picture of which a part is drawn anew"},
                {"train", "trains a model on a folder of pictures"},
                {"serve", "shows a page to draw and to edit on, and answers HTTP calls"}};
enum { COMMANDS = sizeof commands / sizeof *commands };

static int help(FILE *to) {
    fprintf(to,
            "usage: imagebart COMMAND [options]\n\nDraws, edits and trains with ImageBART models, without Python.\n\n"
            "Commands\n");
    for (int i = 0; i < COMMANDS; i++) fprintf(to, "  %-24s%s\n", commands[i].name, commands[i].what);
    fprintf(to, "\nOptions\n  %-24s%s\n  %-24s%s\n", "-h, --help",
            "this text; imagebart COMMAND -h: a command's options", "--version",
            "commit, compiler, processor, libraries");
    return fflush(to) ? 1 : 0;
}

/* path = PREFIX/libexec/imagebart/NAME, the prefix being the folder above that of this program */
static int program_path(char path[PATH_BYTES], const char *called, const char *name) {
    char own[PATH_BYTES];
    if (!own_path(own)) { /* no /proc here */
        char *solved = strchr(called, '/') ? realpath(called, NULL) : NULL;
        if (!solved || snprintf(own, sizeof own, "%s", solved) >= PATH_BYTES) *own = 0;
        free(solved);
    }
    for (int up = 0; up < 2; up++) {
        char *slash = strrchr(own, '/');
        if (!slash) return 0;
        *slash = 0;
    }
    const int n = snprintf(path, PATH_BYTES, "%s/libexec/imagebart/%s", own, name);
    return n > 0 && n < PATH_BYTES;
}

int main(int argc, char **argv) {
    char path[PATH_BYTES], name[64];
    int i = 0;
    if (argc < 2) {
        help(stderr);
        return 2;
    }
    if (!strcmp(argv[1], "-h") || !strcmp(argv[1], "--help") || (!strcmp(argv[1], "help") && argc == 2))
        return help(stdout);
    const int version = !strcmp(argv[1], "--version"), helps = !strcmp(argv[1], "help");
    const char *wanted = version ? commands[0].name : argv[helps ? 2 : 1];
    while (i < COMMANDS && strcmp(commands[i].name, wanted) != 0) i++;
    if (i == COMMANDS) {
        fprintf(stderr, "imagebart: no command \"%s\"; expected sample, inpaint, train or serve; -h explains\n",
                printable(path, wanted));
        return 2;
    }
    if (!program_path(path, argv[0], wanted)) {
        fprintf(stderr, "imagebart: the system does not say where this program lies: call it by its path\n");
        return 1;
    }
    if (helps) argv[2] = "-h";
    snprintf(name, sizeof name, "imagebart%s%s", version ? "" : " ", version ? "" : wanted);
    char **rest = version ? argv : argv + 1; /* its first word becomes the name */
    rest[0] = name;
    execv(path, rest);
    fprintf(stderr, "imagebart: %s: %s%s\n", make_printable(path), strerror(errno),
            errno == ENOENT ? "; this installation was made without it (\"make install\" says what is missing)" : "");
    return 1;
}
