/* remap.c - what an official first stage says beside its weights: which entries of the codebook are tokens (the tensor
 * quantize.used, or the .npy that it came from), and the order of the tensors. */
#include "files/files.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The first position wins where a code is listed twice, as in the official search. */
static void number_codes(Remap *r) {
    for (size_t i = 0; i < r->n_codes; i++) r->inverse[i] = -1;
    for (size_t i = r->n; i-- > 0;) r->inverse[r->used[i]] = (int32_t)i;
}

Err remap_file(int64_t **used, size_t *n, const char *path, size_t n_codes) {
    TRY(npy_read(used, n, path, n_codes));
    for (size_t i = 0; i < *n; i++) {
        const int64_t code = (*used)[i];
        if (code >= 0 && (uint64_t)code < n_codes) continue;
        free(*used);
        *used = NULL;
        return err_damaged("%s: number %zu is %lld, expected a code, 0..%zu", path, i, (long long)code, n_codes - 1);
    }
    return OK;
}

Err remap_missing(const Config *c, const char *prefix, const char *path, const char *besides) {
    int fd;
    size_t size;
    if (!*path)
        return config_err(c, prefix, "remap", "%sremap %.200s: no such file beside this one or from here%s", prefix,
                          config_get(c, prefix, "remap"), besides);
    if (file_open(&fd, &size, path) == OK) { /* it has come meanwhile */
        close(fd);
        err("%s: was no file a moment ago", path);
    }
    return config_blame(c, prefix, "remap");
}

Err remap_repeated(size_t *repeated, const int64_t *used, size_t n, size_t n_codes) {
    uint8_t *seen;
    *repeated = 0;
    TRY(mem_alloc(&seen, n_codes, 1, "codes of the remap"));
    for (size_t i = 0; i < n; i++) {
        *repeated += seen[used[i]];
        seen[used[i]] = 1;
    }
    free(seen);
    return OK;
}

static Err take_file(Remap *r, const char *path) {
    int64_t *used;
    size_t n;
    TRY(remap_file(&used, &n, path, r->n_codes));
    const Err e = n == r->n ? OK : err("%s: has %zu codes, %zu a moment ago", path, n, r->n);
    for (size_t i = 0; i < r->n && e == OK; i++) r->used[i] = (int32_t)used[i];
    free(used);
    r->from_file = 1;
    return e;
}

Err remap_make(Remap *r, const VqganConfig *c) {
    *r = (Remap){.n = c->re_embed, .n_codes = c->n_embed};
    if (r->n == 0) return OK;
    TRY(mem_alloc(&r->used, r->n, sizeof *r->used, "used codes"));
    TRY(mem_alloc(&r->inverse, r->n_codes, sizeof *r->inverse, "used codes"));
    for (size_t i = 0; i < r->n; i++) r->used[i] = (int32_t)i;
    if (c->remap[0]) TRY(take_file(r, c->remap));
    number_codes(r);
    return OK;
}

Err remap_load(Remap *r, const Checkpoint *ck, const char *prefix) {
    char name[NAME_MAX_BYTES];
    if (r->n == 0) return OK;
    snprintf(name, sizeof name, "%squantize.used", prefix);
    if (r->from_file && !checkpoint_find(ck, name)) return OK;
    TRY(checkpoint_ints(ck, name, r->n, r->used));
    for (size_t i = 0; i < r->n; i++)
        if (r->used[i] < 0 || (size_t)r->used[i] >= r->n_codes)
            return err("%s: %s[%zu] is %d, expected 0..%zu", ck->path, name, i, r->used[i], r->n_codes - 1);
    number_codes(r);
    return OK;
}

void remap_free(Remap *r) {
    free(r->used);
    free(r->inverse);
    *r = (Remap){0};
}

void remap_tokens(const Remap *r, int32_t *tokens, const int32_t *code, size_t B, size_t N, uint64_t seed) {
    for (size_t b = 0; b < B; b++)
        for (size_t i = 0; i < N; i++) {
            int32_t token = r->n ? r->inverse[code[b * N + i]] : code[b * N + i];
            if (token < 0) token = (int32_t)rng_below(seed, rng_stream(RNG_UNKNOWN, 0, b), i, (uint32_t)r->n);
            tokens[b * N + i] = token;
        }
}

Err remap_entries(const Remap *r, int32_t *code, const int32_t *tokens, size_t B, size_t N) {
    const size_t K = remap_K(r);
    for (size_t i = 0; i < B * N; i++) {
        if (tokens[i] < 0 || (size_t)tokens[i] >= K)
            return err("token %zu of picture %zu is %d, expected 0..%zu", i % N, i / N, tokens[i], K - 1);
        code[i] = r->n ? r->used[tokens[i]] : tokens[i];
    }
    return OK;
}

/* ---- The order of the parameter table is that of PyTorch's state dict: nearly that in which layers run. But a level's
 *      attention comes behind all its blocks, a block's shortcut last, up.0 before up.1, and what stands between
 *      encoder and decoder behind both. ---- */

/* How late a part of a name, which ends at a point, comes among its neighbours; equal: in the order of running. */
static size_t lateness(const char *part) {
    static const char *const late[] = {"attn.",     "downsample.", "upsample.",       "nin_shortcut.",
                                       "quantize.", "quant_conv.", "post_quant_conv."};
    if (part[0] >= '0' && part[0] <= '9') return strtoul(part, NULL, 10);
    for (size_t i = 0; i < sizeof late / sizeof *late; i++)
        if (!strncmp(late[i], part, strlen(late[i]))) return i + 1;
    return 0;
}

int vqgan_row_order(const char *a, const char *b) {
    for (;;) {
        const size_t n = strcspn(a, "."), la = lateness(a), lb = lateness(b);
        if (la != lb) return la < lb ? -1 : 1;
        if (!a[n] || strncmp(a, b, n + 1) != 0) return 0;
        a += n + 1, b += n + 1;
    }
}
