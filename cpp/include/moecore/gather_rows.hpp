#pragma once

#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

/// output[i] = input[index[i]], bit for bit. Rows whose index is -1 are left as they are.
///
/// input   [N, K] float32 or bfloat16, rows contiguous
/// index   [M] int32, contiguous, in [-1, N); another value is an error on the CPU and leaves the
///         row as it is on CUDA
/// output  [M, K] of input's dtype, rows contiguous; overlaps no input
/// Throws InvalidArgument if a shape, dtype, stride or device is not as above.
void gather_rows(const TensorView& input, const TensorView& index, const TensorView& output,
                 Stream stream = {});

}  // namespace moecore
