#pragma once

#include "moecore/rotary_embedding.hpp"
#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

/// Normalises query and key heads one by one and turns them, in place: rms_norm with q_weight, of
/// the first num_query_heads heads, rms_norm with k_weight of the others, rotary_embedding of all,
/// with their bits. On CUDA one launch.
///
/// heads     [T, n, D] float32 or bfloat16, rows contiguous, in and out
/// q_weight  [D] of heads' dtype or float32, contiguous; k_weight likewise, of the same dtype
/// positions, cos_sin, pairs   as rotary_embedding takes them
/// Throws InvalidArgument as these two do, or if num_query_heads is not in [0, n].
void norm_and_rotate(const TensorView& heads, int64_t num_query_heads, const TensorView& q_weight,
                     const TensorView& k_weight, float eps, const TensorView& positions,
                     const TensorView& cos_sin, RotaryPairs pairs, Stream stream = {});

}  // namespace moecore
