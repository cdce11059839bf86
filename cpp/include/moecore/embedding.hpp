#pragma once

#include "moecore/grouped_gemm.hpp"
#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

/// output[t] = row ids[t] of weight, bit for bit. Packed weights give their rows back, so that an
/// embedding tied to the output layer needs no second copy.
///
/// ids     [T] int32 or int64, contiguous; one outside [0, N) is an error on the CPU and makes a
///         row of NaN on CUDA
/// weight  [N, K] float32 or bfloat16, rows contiguous; or packed, one group, not gated
/// output  [T, K] of weight's dtype, rows contiguous; overlaps no input
/// Throws InvalidArgument if a shape, dtype, stride or device is not as above.
void embedding(const TensorView& ids, const GroupedGemmWeights& weight, const TensorView& output,
               Stream stream = {});

}  // namespace moecore
