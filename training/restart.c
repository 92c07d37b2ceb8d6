/* restart.c - entries of the codebook that no latent chooses become latents.
 *
 * Without it most of a codebook that is trained from scratch stays unused: an entry that is far from all latents is
 * never the nearest, gets no gradient, and stays where it is. */
#include "training/training.h"

size_t restart_pick(uint64_t seed, uint64_t step, size_t code, size_t latents) {
    return rng_below(seed, rng_stream(RNG_CODES, 0, step), code, (uint32_t)latents);
}

void restart_code(Vqgan *v, size_t code, const real *latent, size_t stride) {
    const size_t D = vqgan_config(v)->embed_dim, row = vqgan_codebook(v);
    const Param *book = &vqgan_params(v)->row[row];
    for (size_t d = 0, at = code * D; d < D; d++, at++) {
        book->value[at] = latent[d * stride];
        if (book->m) book->m[at] = 0;
        if (book->v) book->v[at] = 0;
        if (book->m16) book->m16[at] = book->v16[at] = 0;
        if (book->ema) book->ema[at] = book->value[at];
    }
    params_send_part(vqgan_params(v), row, code * D, D);
}

size_t restart_codes(Vqgan *v, const uint32_t *usage, size_t B, size_t N, uint64_t seed, uint64_t step) {
    const size_t D = vqgan_config(v)->embed_dim;
    const real *z; /* (B,D,N) */
    size_t restarted = 0;
    vqgan_latents(v, &z, NULL, NULL);
    for (size_t code = 0; z && code < vqgan_config(v)->n_embed; code++) {
        if (usage[code]) continue;
        const size_t pick = restart_pick(seed, step, code, B * N);
        restart_code(v, code, z + pick / N * D * N + pick % N, N);
        restarted++;
    }
    return restarted;
}
