/* fast.c - the table of the CPU's fast fellows of the plain layers. */
#include "base/tiles.h"
#include "kernels/kernels.h"

static int multiplies_fast(Precision p) {
#if TILES_COMPILED
    if (tiles_here()) return 1;
#endif
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
    if (p == PRECISION_BF16) return 1;
#endif
    return p == PRECISION_F32;
}

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
    .embed_forward = embed_forward_fast,
    .embed_backward = embed_backward_fast,
    .norm_forward = norm_forward_fast,
    .norm_backward = norm_backward_fast,
    .linear_forward = linear_forward_fast,
    .linear_backward = linear_backward_fast,
    .gelu_forward = gelu_forward_fast,
    .gelu_backward = gelu_backward_fast,
    .attention_needs = attention_needs_fast,
    .attention_saved = attention_saved_fast,
    .attention_forward = attention_forward_fast,
    .attention_backward = attention_backward_fast,
    .variant_needs = variant_needs_fast,
    .variant_forward = variant_forward_fast,
    .variant_backward = variant_backward_fast,
    .denoising_loss = denoising_loss_fast,
    .adamw = adamw_fast,
    .adamw_bf16 = adamw_bf16_fast,
    .ema = ema_fast,
    .kept_bytes = kept_bytes_fast,
    .keep_positions = keep_positions_fast,
    .attention_from_kept = attention_from_kept_fast,
    .stream_needs = stream_needs_fast,
    .linear_stream = linear_stream_fast,
    .guess_block = guess_block,
    .weights_bytes = weights_bytes,
    .weights_pack = weights_pack,
    .multiplies_fast = multiplies_fast,
    .conv4_needs = conv4_needs_fast,
    .conv4_forward = conv4_forward_fast,
    .conv4_backward = conv4_backward_fast,
    .activate_needs = activate_needs_fast,
    .activate_forward = activate_forward_fast,
    .activate_backward = activate_backward_fast,
    .relu_forward = relu_forward_fast,
    .relu_backward = relu_backward_fast,
    .pool_forward = pool_forward_fast,
    .pool_backward = pool_backward_fast,
    .comparison_sums = comparison_sums_fast,
    .compare_features = compare_features_fast,
};
