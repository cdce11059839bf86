#pragma once

#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

/// Adds each token's expert rows, and the shared expert's:
///
///     sum       = 0
///     sum       = fma(topk_weights[t, j], expert_rows[slot_to_row[t * k + j]], sum)   for each j
///     sum       = fma(shared_scale[t], shared_output[t], sum)        (scale 1 when absent)
///     output[t] = sum, rounded once
///
/// all in float32 and in this order, on every device. Dropped slots (-1) add nothing.
///
/// expert_rows    [>= R, H] float32 or bfloat16, rows contiguous
/// slot_to_row    [T * k] int32; values below -1 or beyond expert_rows are an error on the CPU, and
///                add nothing on CUDA, where the host never sees them
/// topk_weights   [T, k] float32
/// shared_output  [T, H] of expert_rows' dtype, or absent
/// shared_scale   [T] float32, or absent; needs shared_output
/// output         [T, H] float32 or bfloat16; may be shared_output itself, overlaps nothing else
/// Throws InvalidArgument if a shape, dtype, stride or device is not as above.
void combine(const TensorView& expert_rows, const TensorView& slot_to_row,
             const TensorView& topk_weights, const TensorView& shared_output,
             const TensorView& shared_scale, const TensorView& output, Stream stream = {});

}  // namespace moecore
