/* vqgan_config.c - the settings of a first stage (vqgan.c), under their official names (SPEC section 8): read, written and
 * checked by one table.
 *
 * Refuses: sizes out of range; of what programs open, pictures other than of three channels. */
#include "base/compute.h"
#include "files/files.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_BLOCKS = 64,  /* num_res_blocks */
    MAX_WIDTH = 16384 /* channels */
};

static const ConfigField settings[] = {
    {"embed_dim", FIELD_SIZE, offsetof(VqganConfig, embed_dim), 1, MAX_WIDTH, 0},
    {"n_embed", FIELD_SIZE, offsetof(VqganConfig, n_embed), 1, 1 << 24, 0},
    {"re_embed", FIELD_SIZE, offsetof(VqganConfig, re_embed), 0, 1 << 24, 1},
    {"ddconfig.z_channels", FIELD_SIZE, offsetof(VqganConfig, z_channels), 1, MAX_WIDTH, 0},
    {"ddconfig.resolution", FIELD_SIZE, offsetof(VqganConfig, resolution), 1, 1 << 20, 0},
    {"ddconfig.in_channels", FIELD_SIZE, offsetof(VqganConfig, in_channels), 1, MAX_WIDTH, 0},
    {"ddconfig.out_ch", FIELD_SIZE, offsetof(VqganConfig, out_ch), 1, MAX_WIDTH, 0},
    {"ddconfig.ch", FIELD_SIZE, offsetof(VqganConfig, ch), 1, MAX_WIDTH, 0},
    {"ddconfig.num_res_blocks", FIELD_SIZE, offsetof(VqganConfig, num_res_blocks), 1, MAX_BLOCKS, 0},
    {"ddconfig.ch_mult", FIELD_LIST, offsetof(VqganConfig, ch_mult), 1, VQ_LEVELS, 0, offsetof(VqganConfig, levels)},
    {"ddconfig.attn_resolutions", FIELD_LIST, offsetof(VqganConfig, attn_resolutions), 0, VQ_LEVELS, 0,
     offsetof(VqganConfig, n_attn)},
    {"ddconfig.double_z", FIELD_FIXED, 0, 0, 0, 0},
    {"ddconfig.tanh_out", FIELD_FLAG, offsetof(VqganConfig, tanh_out), 0, 1, 1},
    {"legacy", FIELD_FLAG, offsetof(VqganConfig, legacy), 0, 1, 1},
    {"beta", FIELD_REAL, offsetof(VqganConfig, beta), 0, 1e6, 1},
    {"ddconfig.resamp_with_conv", FIELD_FLAG, offsetof(VqganConfig, resamp_with_conv), 0, 1, 1}};
enum { SETTINGS = sizeof settings / sizeof *settings };

Err vqgan_config_check(const VqganConfig *c) {
    TRY(config_table_check(c, settings, SETTINGS, "vqgan"));
    if (c->re_embed > c->n_embed) return err("vqgan: re_embed is %zu, expected 0..%zu", c->re_embed, c->n_embed);
    if (c->ch % NORM_GROUPS) return err("vqgan: ch is %zu, expected a multiple of %d", c->ch, NORM_GROUPS);
    for (size_t i = 0; i < c->levels; i++)
        if (c->ch_mult[i] < 1 || c->ch_mult[i] > MAX_WIDTH / c->ch)
            return err("vqgan: ch_mult is %zu, expected 1..%zu", c->ch_mult[i], MAX_WIDTH / c->ch);
    return OK;
}

Err vqgan_config_read(VqganConfig *c, const Config *from, const char *prefix) {
    *c = (VqganConfig){.legacy = 1, .beta = 0.25, .resamp_with_conv = 1};
    return config_table_read(c, settings, SETTINGS, from, prefix);
}

Err vqgan_config_write(Config *to, const VqganConfig *c, const char *prefix) {
    return config_table_write(to, c, settings, SETTINGS, prefix);
}

static const char prefix[] = "model.params.";

/* The codes that the .npy lists. A state says how many they were, and has them itself, so that its .npy may be gone. */
static Err read_remap_file(VqganConfig *c, const Config *from, const Checkpoint *ck, const char *tensor) {
    int64_t *used;
    size_t n;
    const int counted = c->re_embed != 0;
    if (!config_file(c->remap, from, prefix, "remap")) {
        char path[PATH_BYTES], besides[NAME_MAX_BYTES + 40] = "";
        memcpy(path, c->remap, sizeof path);
        c->remap[0] = 0;
        if (!ck && counted) return OK;
        if (ck) snprintf(besides, sizeof besides, ", and the weights have no tensor %s", tensor);
        return remap_missing(from, prefix, path, besides);
    }
    if (remap_file(&used, &n, c->remap, c->n_embed) != OK) return config_blame(from, prefix, "remap");
    free(used);
    if (counted && c->re_embed != n)
        return config_err(from, prefix, "re_embed", "%sre_embed is %zu, %s has %zu", prefix, c->re_embed, c->remap, n);
    c->re_embed = n;
    return OK;
}

/* Which codes are tokens, the file's quantize.used says, else the official remap; re_embed, if it is given, must be how
 * many. */
static Err read_remap(VqganConfig *c, const Config *from, const Checkpoint *ck, const char *tensors) {
    char name[NAME_MAX_BYTES];
    snprintf(name, sizeof name, "%squantize.used", ck ? tensors : "");
    const Tensor *used = ck ? checkpoint_find(ck, name) : NULL;
    const char *remap = config_get(from, prefix, "remap");
    if (used && used->size == 0) return err("%s is empty", name);
    if (!used && remap && !is_one_of_values(remap, "null")) return read_remap_file(c, from, ck, name);
    if (!ck) return OK;
    if (config_get(from, prefix, "re_embed") && c->re_embed != (used ? used->size : 0))
        return err("%sre_embed is %zu, %s has %zu", prefix, c->re_embed, name, used ? used->size : 0);
    c->re_embed = used ? used->size : 0;
    return OK;
}

Err first_stage_known(const Params *p, const Checkpoint *ck, const char *tensors) {
    /* besides: which codes are tokens; discriminator and LPIPS; for pictures of segments; a moving average that the
     * official code does not sample from */
    static const char *const others[] = {"quantize.used", "loss.", "colorize", "model_ema."};
    const size_t skip = strlen(tensors);
    for (size_t i = 0; i < ck->n; i++) {
        const char *name = ck->tensor[i].name;
        if (strncmp(name, tensors, skip) != 0) continue;
        int known = params_has(p, name + skip);
        for (size_t k = 0; k < sizeof others / sizeof *others && !known; k++)
            known = strncmp(name + skip, others[k], strlen(others[k])) == 0;
        if (!known)
            return err("%s: unexpected tensor '%s': another network than its configuration says", ck->path, name);
    }
    return OK;
}

static Err read_first_stage(VqganConfig *c, const Config *from, const Checkpoint *ck, const char *tensors) {
    TRY(keys_check(from, KEYS_FIRST, 0));
    TRY(vqgan_config_read(c, from, prefix));
    TRY(read_remap(c, from, ck, tensors));
    TRY(vqgan_config_check(c));
    if (c->in_channels != 3 || c->out_ch != 3)
        return err("%sddconfig: in_channels is %zu and out_ch %zu, expected 3 and 3: pictures are red, green and blue",
                   prefix, c->in_channels, c->out_ch);
    if (c->resolution > IMAGE_MAX_SIDE || c->resolution >> (c->levels - 1) == 0)
        return config_err(from, prefix, "ddconfig.resolution",
                          "%sddconfig.resolution is %zu, expected %zu..%d for %zu levels", prefix, c->resolution,
                          (size_t)1 << (c->levels - 1), IMAGE_MAX_SIDE, c->levels);
    return OK;
}

Err first_stage_config(VqganConfig *c, const Config *from, const Checkpoint *ck, const char *tensors) {
    return read_first_stage(c, from, ck, tensors) == OK ? OK : config_in_file(from);
}
