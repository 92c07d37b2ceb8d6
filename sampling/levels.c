/* levels.c - the library for any x86-64: every call goes to the copy of the code that is taken when the library is
 * loaded, as the programs take one (base/start.c). */
#include "base/level.h"
#include "sampling/calls.h"

extern const LibraryCalls library_x86_64;
extern const LibraryCalls library_x86_64_v3 __attribute__((weak));
extern const LibraryCalls library_x86_64_v4 __attribute__((weak));
extern const LibraryCalls library_x86_64_v4_bf16 __attribute__((weak));
extern const LibraryCalls library_x86_64_v4_amx __attribute__((weak));

/* Set once, before anything is called */
static const LibraryCalls *taken;
static char refusal[LEVEL_TEXT];

__attribute__((constructor)) static void take_level(void) {
    const LibraryCalls *const copy[LEVELS] = {&library_x86_64, &library_x86_64_v3, &library_x86_64_v4,
                                              &library_x86_64_v4_bf16, &library_x86_64_v4_amx};
    int there[LEVELS];
    for (int i = 0; i < LEVELS; i++) there[i] = copy[i] != 0;
    const int take = level_take(there, refusal);
    taken = copy[take < 0 ? 0 : take];
}

int imagebart_open_on(imagebart_model **model, const char *name_or_folder, const char *weights, const char *device) {
    if (model) *model = 0;
    return *refusal ? taken->refuse(refusal) : taken->open_on(model, name_or_folder, weights, device);
}

int imagebart_open(imagebart_model **model, const char *name_or_folder, const char *weights) {
    return imagebart_open_on(model, name_or_folder, weights, 0);
}

#define PASS_ON(type, name, parameters, arguments)                                                                     \
    type imagebart_##name parameters {                                                                                 \
        return taken->name arguments;                                                                                  \
    }
LIBRARY_CALLS(PASS_ON)
