/* values.c - what our own keys of a configuration, imagebart.*, may say: a table of kinds and ranges, checked where a
 * configuration is taken over, so that no value is passed over. A list per scale has one value for all scales, or one
 * for each, scale T first. */
#include "files/files.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

typedef enum { OWN_FLAG, OWN_SIZE, OWN_NUMBERS, OWN_SIZES, OWN_RANGE, OWN_STORE } OwnKind; /* the lists: per scale */

static const char PREFIX[] = "imagebart.";

static const struct {
    const char *key;
    OwnKind kind;
    double lo, hi;
} table[] = {
    {"store", OWN_STORE, 0, 0},
    {"compact", OWN_FLAG, 0, 0},
    {"null_class", OWN_SIZE, 0, INT32_MAX},
    {"h", OWN_SIZE, 1, IMAGE_MAX_SIDE},
    {"w", OWN_SIZE, 1, IMAGE_MAX_SIDE},
    {"temperature", OWN_NUMBERS, 0, 1000},
    {"guidance", OWN_NUMBERS, 0, 1000},
    {"top_k", OWN_SIZES, 0, 1e9},
    {"chain_length", OWN_SIZES, 1, 1000},
    {"inpaint_chain_length", OWN_SIZES, 0, 1000},
    {"candidates", OWN_SIZE, 1, MAX_CANDIDATES},
    {"best_of", OWN_SIZE, 1, MAX_BEST_OF},
    {"own_nats", OWN_RANGE, 0, 1e9},
    {"familiar_nats", OWN_RANGE, 0, 1e9},
    {"familiar_error", OWN_RANGE, 0, 1e9},
};
enum { KEYS = sizeof table / sizeof *table };

Err own_per_scale(double *out, int T, const Config *c, const char *key) {
    double value[MAX_SCALES];
    char expected[64];
    size_t i = 0, n;
    while (i < KEYS && strcmp(table[i].key, key)) i++;
    if (i == KEYS) return err("%s%s is no list", PREFIX, key);
    TRY(config_reals(value, &n, MAX_SCALES, c, PREFIX, key, table[i].lo, table[i].hi));
    for (size_t t = 0; t < n && table[i].kind == OWN_SIZES; t++)
        if (value[t] != floor(value[t])) return config_bad(c, PREFIX, key, "whole numbers with commas between them");
    snprintf(expected, sizeof expected, "1 number, or %d: one per scale, noisiest first", T);
    if (n != 1 && n != (size_t)T) return config_bad(c, PREFIX, key, expected);
    for (int t = 1; t <= T; t++) out[t] = value[n == 1 ? 0 : T - t];
    return OK;
}

static Err read_range(double range[2], const Config *c, const char *key) {
    double value[2];
    size_t n;
    if (config_reals(value, &n, 2, c, PREFIX, key, 0, 1e9) != OK || n != 2 || value[0] > value[1])
        return config_bad(c, PREFIX, key, "two numbers from 0 on, the lesser first, such as 0.8,2.2");
    range[0] = value[0], range[1] = value[1];
    return OK;
}

int own_range(double range[2], const Config *c, const char *key) {
    return config_get(c, PREFIX, key) && read_range(range, c, key) == OK;
}

static Err check_store(const Config *c, const char *key) {
    Dtype d;
    return dtype_of_store(&d, config_get(c, PREFIX, key)) == OK ? OK : config_bad(c, PREFIX, key, "f32, f16 or bf16");
}

Err own_values_check(const Config *c) {
    size_t T = 1, size;
    double list[MAX_SCALES + 1], range[2];
    int flag;
    TRY(config_size(&T, c, "model.params.", "n_scales", 1, MAX_SCALES, 1));
    for (size_t i = 0; i < KEYS; i++) {
        const char *key = table[i].key;
        if (!config_get(c, PREFIX, key)) continue;
        switch (table[i].kind) {
        case OWN_FLAG: TRY(config_flag(&flag, c, PREFIX, key, 0)); break;
        case OWN_SIZE: TRY(config_size(&size, c, PREFIX, key, (size_t)table[i].lo, (size_t)table[i].hi, 0)); break;
        case OWN_RANGE: TRY(read_range(range, c, key)); break;
        case OWN_STORE: TRY(check_store(c, key)); break;
        default: TRY(own_per_scale(list, (int)T, c, key));
        }
    }
    return OK;
}
