/* guess.c - which tokens to guess, so that a pass of the decoder yields more than one token of a sample.
 *
 * A pass over several positions of a sample costs little more than a pass over one, but every position needs the token
 * before it. Some of these tokens are known (inpainting). The others can be guessed, for there are two drafts of them:
 * x_t, because neighbouring scales differ by little noise; and, in a chain of passes, what the pass before made of the
 * same picture. Where the two drafts differ, the one that has been right more often is taken.
 *
 * This is speculative decoding (Leviathan et al. 2023; Chen et al. 2023). It accepts a draft d of distribution q with
 * probability min(1, p(d)/q(d)), else it draws from max(0, p - q), normalised; the result has the distribution p. Our
 * q is all on one token, so the rule is: keep d with probability p(d), else draw from p without d. That is the same as
 * to draw from p and to see whether the result is d. So every token is drawn exactly as without guesses, with the same
 * temperature, top-k, guide and random number. If the token is the guess, the logits of the next position are there
 * already. Else the rest of the block is thrown away, and its positions are fed again. The logits have the bits of
 * single steps, so that every token is the same however positions are cut into blocks. Each sample goes on at its own
 * pace.
 *
 * Owns: the guesses, how often they are right, how many positions pay off. The chain is diffusion.c's.
 * Read: costs; guesses; lengths; guess_block. */
#include "kernels/kernels.h"

#include <math.h>

/* ---- Costs: a model, not a measurement, which would make results depend on the clock ---- */

/* A pass must read all weights, and each sample's keys and values, from memory. While one byte arrives, 3 positions
 * could be multiplied with one weight (measured on two AVX-512 cores). So reading costs as much as POSITIONS_PER_BYTE
 * positions for every byte of a weight. If all weights fit the caches, only the positions count. */
void guess_costs(const Guesses *g, double *pass, double *each) {
    const double POSITIONS_PER_BYTE = 3, CACHES = 16 << 20;
    const int from_memory = g->reads.weight_bytes > CACHES;
    *pass = from_memory ? POSITIONS_PER_BYTE * g->reads.weight_bytes / g->reads.numbers : 1;
    *each = from_memory ? POSITIONS_PER_BYTE * g->reads.kept_bytes / g->reads.numbers : 0;
    *pass *= 1.0 / (double)g->rows; /* under guidance a position is fed twice, which is the unit then */
}

/* ---- Guesses ---- */

/* Prior of the hit rate: as if 4 guesses had been made, 3 of them right. */
static const double TRIED_BEFORE = 4, RIGHT_BEFORE = 0.75;

static int is_known(const Guesses *g, size_t i) {
    return g->keep && g->keep[i];
}

/* The token expected at position i. */
static int32_t guess_of(const Sample *s, const Guesses *g, size_t b, size_t i) {
    if (is_known(g, i)) return g->known[b * g->N + i];
    return s->before_right > s->x_t_right ? g->before[b * g->N + i] : g->x_t[b * g->N + i];
}

/* Probability that the guess for position i is right. */
static double chance_of(const Sample *s, const Guesses *g, size_t b, size_t i) {
    if (is_known(g, i)) return 1;
    if (!g->has_drafts) return 0;
    if (g->x_t[b * g->N + i] == g->before[b * g->N + i]) return s->same_right / s->same_tried;
    return fmax(s->x_t_right, s->before_right) / s->differ_tried;
}

/* A pass begins. The hit rates of the pass before stay, but weigh no more than the prior. */
static void start_counts(Sample *s) {
    const double same = s->same_tried > 0 ? s->same_right / s->same_tried : RIGHT_BEFORE;
    const double differ = s->differ_tried > 0 ? TRIED_BEFORE / s->differ_tried : 0;
    s->judged = s->tried = s->right = 0;
    s->same_tried = TRIED_BEFORE, s->same_right = same * TRIED_BEFORE;
    s->x_t_right = differ > 0 ? s->x_t_right * differ : TRIED_BEFORE / 2;
    s->before_right = differ > 0 ? s->before_right * differ : TRIED_BEFORE / 2;
    s->differ_tried = TRIED_BEFORE;
}

/* What the token drawn at position i says about the drafts. */
static void judge(Sample *s, const Guesses *g, size_t b, size_t i) {
    const size_t at = b * g->N + i;
    const int32_t token = g->tokens[at];
    if (is_known(g, i) || !g->has_drafts) return;
    s->tried++, s->right += token == guess_of(s, g, b, i);
    if (g->x_t[at] == g->before[at])
        s->same_tried++, s->same_right += token == g->x_t[at];
    else
        s->differ_tried++, s->x_t_right += token == g->x_t[at], s->before_right += token == g->before[at];
}

/* ---- Lengths ---- */

/* One more position for sample b, if there is room and a chance that it is of use. s->chance: probability that the last
 * position of the block is of use; s->gain: tokens that the block gives, on average. */
static int extend(Sample *s, const Guesses *g, size_t b) {
    const size_t next = s->at + s->length;
    if (s->length == 0 || next == g->end || s->length >= g->most) return 0;
    const double chance = s->chance * chance_of(s, g, b, next - 1);
    if (!(chance > 0.01)) return 0;
    s->chance = chance, s->gain += chance;
    s->length++;
    return 1;
}

/* Passes that a sample takes to its end, if all go as this one is expected to. */
static double passes_left(const Sample *s, const Guesses *g) {
    return s->length > 0 ? (double)(g->end - s->at) / s->gain : 0;
}

/* Cost of all that is left to do, in positions; *longest = passes of the sample that takes most. */
static double cost_left(const Sample *sample, const Guesses *g, double *longest) {
    double cost = 0, pass, each;
    guess_costs(g, &pass, &each);
    *longest = 0;
    for (size_t b = 0; b < g->n; b++) {
        const double passes = passes_left(&sample[b], g);
        cost += passes * (each + (double)sample[b].length);
        *longest = fmax(*longest, passes);
    }
    return cost + pass * *longest;
}

/* Lengthens the blocks of the slowest samples, or of all, by one position. 0: none can be. */
static int extend_slowest(Sample *sample, const Guesses *g, double longest) {
    int any = 0;
    for (size_t b = 0; b < g->n; b++)
        if (g->always || passes_left(&sample[b], g) > 0.9 * longest) any |= extend(&sample[b], g, b);
    return any;
}

/* Greedy: repeatedly lengthens the blocks of the slowest samples, and keeps the cheapest assignment seen, or the
 * longest if g->always. Deterministic (no timing). */
static void choose_lengths(Sample *sample, const Guesses *g) {
    enum { ROUNDS_WITHOUT_GAIN = 4 };
    double longest, least = cost_left(sample, g, &longest);
    for (size_t b = 0; b < g->n; b++) sample[b].best = sample[b].length;
    for (int rounds = 0, any = 1; any && rounds < ROUNDS_WITHOUT_GAIN; rounds++) {
        any = extend_slowest(sample, g, longest);
        const double cost = cost_left(sample, g, &longest);
        if (cost >= least && !g->always) continue;
        least = cost, rounds = -1;
        for (size_t b = 0; b < g->n; b++) sample[b].best = sample[b].length;
    }
    for (size_t b = 0; b < g->n; b++) sample[b].length = sample[b].best;
}

/* ---- A block ---- */

/* The sample's next position and, as far as its tokens are known, those behind it. */
static void start_block(Sample *s, const Guesses *g, size_t b) {
    s->length = s->at < g->end;
    s->chance = s->gain = 1;
    for (int any = s->length > 0; any;) any = is_known(g, s->at + s->length - 1) && extend(s, g, b);
}

void guess_block(Sample *sample, Guesses *g) {
    for (size_t b = 0; b < g->n; b++) {
        Sample *s = &sample[b];
        if (!g->begun) start_counts(s);
        for (; s->judged < s->at; s->judged++) judge(s, g, b, s->judged);
        start_block(s, g, b);
    }
    g->begun = 1;
    if (g->most > 1) choose_lengths(sample, g);
    for (size_t b = 0; b < g->n; b++)
        for (size_t i = sample[b].at; i + 1 < sample[b].at + sample[b].length; i++)
            g->tokens[b * g->N + i] = guess_of(&sample[b], g, b, i);
}
