/* memory.c - what training a stage takes: memory of the host and of the GPU, before anything large is allocated. */
#include "training/stage.h"

#include <stdio.h>
#include <string.h>

/* Before anything large is allocated: `arenas` arrays as large as all parameters, the network's plan (bytes), other
 * buffers (rows x columns). */
Err check_memory(Stage *s, size_t arenas, size_t plan, size_t rows, size_t columns) {
    TRY(size_mul(&s->memory.state, s->params->total, arenas * sizeof(real)));
    if (s->set.bf16_states) s->memory.state -= s->params->total * 2 * (sizeof(real) - sizeof(uint16_t));
    TRY(size_mul(&s->memory.activations, rows, columns));
    TRY(size_mul(&s->memory.activations, s->memory.activations, sizeof(real)));
    s->memory.activations += plan;
    s->memory.available = memory_available();
    if (s->memory.available != SIZE_MAX) s->memory.available /= ranks_local();
    const int crops = s->memory.tokens && s->set.crops > 1;
    const size_t pictures = s->memory.pictures + s->memory.tokens;
    char what[200], state[32], activations[32], size[32];
    snprintf(what, sizeof what, "%s: parameters, gradients and optimizer %s, activations %s, %s %s", s->name,
             bytes_text(state, s->memory.state), bytes_text(activations, s->memory.activations),
             s->memory.tokens ? "tokens of the pictures" : "pictures read ahead", bytes_text(size, pictures));
    return memory_fits(s->memory.state + s->memory.activations + pictures, s->memory.available, what,
                       crops ? "a smaller --batch or fewer --crops take less" : "a smaller --batch takes less");
}

/* Values, gradients, moments (or in bf16) and moving average in float, and in bf16 the values again; the network's
 * plan. */
Err check_gpu_memory(Stage *s, size_t plan) {
    const int bf16 = s->precision == PRECISION_BF16;
    char what[160], state[32], activations[32];
    const size_t moment = s->set.bf16_states ? sizeof(uint16_t) : sizeof(float);
    s->gpu_memory.state = s->params->total * (3 * sizeof(float) + 2 * moment + (bf16 ? 2 : 0)),
    s->gpu_memory.activations = plan;
    TRY(cuda_find(NULL, &s->gpu_memory.available, NULL));
    snprintf(what, sizeof what, "%s on the GPU: parameters, gradients and optimizer %s, activations %s", s->name,
             bytes_text(state, s->gpu_memory.state), bytes_text(activations, plan));
    return memory_fits(s->gpu_memory.state + plan, s->gpu_memory.available, what, "a smaller --batch takes less");
}
