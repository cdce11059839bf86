#pragma once

#include <cstdint>

#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

/// Which two elements of a head turn together, i in 0 .. rotary_dim / 2 - 1.
enum class RotaryPairs : uint8_t {
    kHalves,       ///< i and i + rotary_dim / 2   (GPT-NeoX, Llama)
    kInterleaved,  ///< 2 i and 2 i + 1            (GPT-J)
};

/// Rotates the pairs (a, b) of each head by its token's angles, in place:
///
///     a, b = a * cos - b * sin, b * cos + a * sin        in float32, rounded once
///
/// where cos = cos_sin[positions[t], i] and sin = cos_sin[positions[t], i + rotary_dim / 2].
/// Elements from rotary_dim on stay as they are. The bits are the same on every device.
///
/// x          [T, n, D] float32 or bfloat16, rows contiguous, in and out
/// positions  [T] int32 in [0, P); one outside is an error on the CPU and makes NaN on CUDA
/// cos_sin    [P, rotary_dim] float32, rows contiguous; rotary_dim even, <= D
/// Throws InvalidArgument if a shape, dtype, stride or device is not as above.
void rotary_embedding(const TensorView& x, const TensorView& positions, const TensorView& cos_sin,
                      RotaryPairs pairs, Stream stream = {});

}  // namespace moecore
