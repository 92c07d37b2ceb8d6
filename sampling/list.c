/* list.c - the models that there are: ./sample --list. */
#include "sampling/sampling.h"

#include <stdio.h>

/* Of its weights: what is here. A folder that is not there lacks everything; it is not damaged. */
static void state_text(char *text, size_t bytes, const NamedModel *m) {
    char missing[32], folder[PATH_BYTES];
    const size_t here = model_files(missing, m);
    if (!*missing)
        snprintf(text, bytes, "here");
    else if (here && m->zip)
        snprintf(text, bytes, "partly here, no %s", missing);
    else if (!m->zip && models_find(folder, m->folder))
        snprintf(text, bytes, "damaged: no %s", missing);
    else
        snprintf(text, bytes, "not here");
}

Err list_models(void) {
    size_t n;
    char state[96], places[PLACES_BYTES], fetch[FETCH_BYTES];
    const NamedModel *m = named_models(&n);
    TRY(models_check());
    printf("%-10s %-30s %s\n", "model", "weights", "what");
    for (size_t i = 0; i < n; i++) {
        state_text(state, sizeof state, &m[i]);
        printf("%-10s %-30s %s\n", m[i].name, state, m[i].what);
    }
    printf(
        "\nLooked for in %s.\n"
        "\"%s\" and so on fetch the official files into models/; their .ckpt files are read as they are.\n"
        "Any folder with vqgan.safetensors and scale1.safetensors ... is a model too, such as a run of ./train; so is\n"
        "one with scale1.ckpt ... of the official code and a recipe config.txt (models/ffhq.txt is an example).\n",
        models_places(places), models_fetch(fetch, "ffhq"));
    return OK;
}
