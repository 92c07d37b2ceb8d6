/* levels.c - the library for any x86-64: every call goes to the copy of the code that the first of them takes, as the
 * programs take one (base/start.c). Loading the library asks nothing of processor or system. */
#include "base/level.h"
#include "sampling/calls.h"

#include <pthread.h>

extern const LibraryCalls library_x86_64;
extern const LibraryCalls library_x86_64_v3 __attribute__((weak));
extern const LibraryCalls library_x86_64_v4 __attribute__((weak));
extern const LibraryCalls library_x86_64_v4_bf16 __attribute__((weak));
extern const LibraryCalls library_x86_64_v4_amx __attribute__((weak));

static pthread_once_t once = PTHREAD_ONCE_INIT;
static const LibraryCalls *taken;
static char refusal[LEVEL_TEXT];

static void take_level(void) {
    const LibraryCalls *const copy[LEVELS] = {&library_x86_64, &library_x86_64_v3, &library_x86_64_v4,
                                              &library_x86_64_v4_bf16, &library_x86_64_v4_amx};
    int there[LEVELS];
    for (int i = 0; i < LEVELS; i++) there[i] = copy[i] != 0;
    const int take = level_take(there, refusal);
    taken = copy[take < 0 ? 0 : take];
}

static const LibraryCalls *calls(void) {
    pthread_once(&once, take_level);
    return taken;
}

int imagebart_api(void) {
    return IMAGEBART_API;
}

int imagebart_open_on(imagebart_model **model, const char *name_or_folder, const char *weights, const char *device) {
    const LibraryCalls *const to = calls();
    if (model) *model = 0;
    return *refusal ? to->refuse(refusal) : to->open_on(model, name_or_folder, weights, device);
}

int imagebart_open(imagebart_model **model, const char *name_or_folder, const char *weights) {
    return imagebart_open_on(model, name_or_folder, weights, 0);
}

#define PASS_ON(type, name, parameters, arguments)                                                                     \
    type imagebart_##name parameters {                                                                                 \
        return calls()->name arguments;                                                                                \
    }
LIBRARY_CALLS(PASS_ON)
