/* fast.c - the table of the CPU's fast fellows of the plain layers. */
#include "kernels/kernels.h"

const Layers fast_layers = {
    .conv_needs = conv_needs_fast,
    .conv_forward = conv_forward_fast,
    .conv_backward = conv_backward_fast,
    .group_norm_needs = group_norm_needs_fast,
    .group_norm_kept = group_norm_kept_fast,
    .group_norm_forward = group_norm_forward_fast,
    .group_norm_backward = group_norm_backward_fast,
    .picture_attention_needs = picture_attention_needs_fast,
    .picture_attention_forward = picture_attention_forward_fast,
    .picture_attention_backward = picture_attention_backward_fast,
    .nearest_needs = nearest_needs_fast,
    .nearest_codes = nearest_codes_fast,
    .guess_block = guess_block,
    .weights_bytes = weights_bytes,
    .weights_pack = weights_pack,
    .conv4_needs = conv4_needs_fast,
    .conv4_forward = conv4_forward_fast,
    .conv4_backward = conv4_backward_fast,
    .activate_needs = activate_needs_fast,
    .activate_forward = activate_forward_fast,
    .activate_backward = activate_backward_fast,
};
