#pragma once

#include "moecore/kernels/norm_and_rotate.hpp"
#include "moecore/kernels/rms_norm.hpp"
#include "moecore/kernels/rotary_embedding.hpp"
#include "ops/check.hpp"

namespace moecore {

/// The checks of rms_norm, whose arguments these are; the messages know input as `input_name` and
/// weight as `weight_name`.
RmsNormArgs checked_rms_norm(const Check& check, const char* input_name, const TensorView& input,
                             const char* weight_name, const TensorView& weight, float eps,
                             const TensorView& residual, const TensorView& output);

/// The checks of rotary_embedding.
RotaryEmbeddingArgs checked_rotary_embedding(const Check& check, const TensorView& x,
                                             const TensorView& positions, const TensorView& cos_sin,
                                             RotaryPairs pairs);

/// The checks of norm_and_rotate.
NormAndRotateArgs checked_norm_and_rotate(const Check& check, const TensorView& heads,
                                          int64_t num_query_heads, const TensorView& q_weight,
                                          const TensorView& k_weight, float eps,
                                          const TensorView& positions, const TensorView& cos_sin,
                                          RotaryPairs pairs);

}  // namespace moecore
