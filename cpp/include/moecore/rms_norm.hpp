#pragma once

#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

/// Normalises each row x of N elements by its root mean square:
///
///     x      = input, or round(input + residual), which is also stored into residual
///     r      = 1 / sqrt(mean(x^2) + eps)                 in float32
///     output = round(weight * round(x * r))              round: to input's dtype
///
/// The squares add up in 64 float32 partial sums (element e in number e mod 64) and those in one
/// fixed tree, so a row has the same bits in every batch, on every instruction set and on CUDA.
///
/// input     [T, N], or [T, n, N] to normalise n heads of a token each; float32 or bfloat16, rows
///           contiguous
/// weight    [N] of input's dtype or float32, contiguous
/// residual  input's shape and dtype, rows contiguous, in and out; or absent
/// output    input's shape and dtype, rows contiguous; may be input itself, overlaps nothing else
/// Throws InvalidArgument if a shape, dtype, stride or device is not as above, or eps is not finite
/// and >= 0.
void rms_norm(const TensorView& input, const TensorView& weight, float eps,
              const TensorView& residual, const TensorView& output, Stream stream = {});

}  // namespace moecore
