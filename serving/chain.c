/* chain.c - a step of a picture's chain, told to those who want to see how it came about: the tokens before and after it,
 * and what the chain itself would have said of each, had it known the picture: q(x_{t-1} | x_t, x_0), by diffusion.c. */
#include "serving/serving.h"

#include <stdio.h>
#include <stdlib.h>

cJSON *float_json(float x) {
    char text[32];
    for (int digits = 6; digits <= 9; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, (double)x);
        if (strtof(text, NULL) == x) break;
    }
    return cJSON_CreateNumber(strtod(text, NULL));
}

static cJSON *tokens_json(const int32_t *tokens, size_t N) {
    cJSON *list = cJSON_CreateArray();
    for (size_t i = 0; i < N; i++) cJSON_AddItemToArray(list, cJSON_CreateNumber(tokens[i]));
    return list;
}

/* Of each token the posterior at x_t, at x_0 and everywhere else. Where x_t is x_0 the first two are the same number. */
static Err add_posterior(cJSON *x, const Model *m, const int32_t *x0, const int32_t *xt, int t) {
    const size_t K = m->K, N = m->h * m->w;
    real *q;
    TRY(mem_alloc(&q, K, sizeof *q, "a token's posterior"));
    cJSON *at_xt = cJSON_AddArrayToObject(x, "at_xt"), *at_x0 = cJSON_AddArrayToObject(x, "at_x0"),
          *elsewhere = cJSON_AddArrayToObject(x, "elsewhere");
    for (size_t i = 0; i < N; i++) {
        double others = 0;
        posterior(q, x0 + i, xt + i, 1, K, &m->schedule, t);
        for (size_t k = 0; k < K; k++)
            if (k != (size_t)x0[i] && k != (size_t)xt[i]) others += (double)q[k];
        cJSON_AddItemToArray(at_xt, float_json((float)q[xt[i]]));
        cJSON_AddItemToArray(at_x0, float_json((float)q[x0[i]]));
        cJSON_AddItemToArray(elsewhere, float_json((float)others));
    }
    free(q);
    return OK;
}

Reply chain_reply(const Model *m, const Blob *chain, int t) {
    const size_t N = m->h * m->w, column = (size_t)(m->schedule.T - t); /* of x_t: x_T comes first */
    const int32_t *tokens = (const int32_t *)(const void *)chain->bytes;
    const int32_t *xt = tokens + column * N, *next = xt + N, *x0 = tokens + (size_t)m->schedule.T * N;
    size_t changed = 0;
    for (size_t i = 0; i < N; i++) changed += xt[i] != next[i];
    cJSON *x = cJSON_CreateObject();
    cJSON_AddNumberToObject(x, "scale", t);
    cJSON_AddItemToObject(x, "beta", float_json(m->schedule.beta[t]));
    cJSON *grid = cJSON_AddArrayToObject(x, "grid");
    cJSON_AddItemToArray(grid, cJSON_CreateNumber((double)m->h));
    cJSON_AddItemToArray(grid, cJSON_CreateNumber((double)m->w));
    cJSON_AddItemToObject(x, "before", tokens_json(xt, N));
    cJSON_AddItemToObject(x, "tokens", tokens_json(next, N));
    cJSON_AddNumberToObject(x, "changed", (double)changed);
    if (add_posterior(x, m, x0, xt, t) == OK) return reply_json(200, x);
    cJSON_Delete(x);
    return reply_error(500, NULL, "%s", err_text());
}
