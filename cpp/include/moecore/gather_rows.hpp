#pragma once

#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

/// output[i] = input[index[i] / slots_per_row], bit for bit. Rows whose index is -1 are left as
/// they are.
///
/// input   [N, K] float32 or bfloat16, rows contiguous
/// index   [M] int32, contiguous, in [-1, N * slots_per_row); another value is an error on the CPU
///         and leaves the row as it is on CUDA
/// output  [M, K] of input's dtype, rows contiguous; overlaps no input
/// slots_per_row  >= 1
/// Throws InvalidArgument if a shape, dtype, stride or device is not as above.
void gather_rows(const TensorView& input, const TensorView& index, const TensorView& output,
                 Stream stream = {}, int slots_per_row = 1);

/// Copies input[index[i]] to addresses[i], bit for bit: to memory of other ranks, or anywhere else
/// that the device reaches. Rows whose index is -1 go nowhere.
///
/// input      [N, K] float32 or bfloat16, rows contiguous
/// index      [M] int32, as above; or absent: row i
/// addresses  [M] int64, contiguous, M <= N without index: where K elements have room, a multiple
/// of
///            16 if K elements take one
/// Throws InvalidArgument if a shape, dtype, stride or device is not as above.
void scatter_rows(const TensorView& input, const TensorView& index, const TensorView& addresses,
                  Stream stream = {});

}  // namespace moecore
