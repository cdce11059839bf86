#pragma once

#include <cstdint>

#include "moecore/packed_weights.hpp"
#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

/// What happens to a product before it is stored. The gated ones take gate g and up u of a feature
/// and halve the output's width.
enum class Activation : uint8_t {
    kNone,
    kSwiglu,         ///< g * sigmoid(g) * u
    kClampedSwiglu,  ///< g' = min(g, limit), u' = clamp(u, -limit, limit):
                     ///< g' * sigmoid(alpha * g') * (u' + up_offset)   (gpt-oss)
    kGeluTanh,       ///< gelu_tanh(g) * u   (Gemma 4)
};

constexpr bool is_gated(Activation activation) { return activation != Activation::kNone; }

/// How the 2 I rows of a gated weight are ordered in a plain tensor.
enum class GateOrder : uint8_t {
    kConcatenated,  ///< rows 0 .. I - 1 are gate, the rest up
    kInterleaved,   ///< row 2 f is gate f, row 2 f + 1 is up f (gpt-oss)
};

struct GroupedGemmConfig {
    Activation activation = Activation::kNone;
    GateOrder gate_order = GateOrder::kConcatenated;  ///< of plain weights, and of the bias
    float alpha = 1.702f;                             ///< the next three: kClampedSwiglu only
    float limit = 7.0f;
    float up_offset = 1.0f;
};

/// What no operation of the stream that may still run writes. On CUDA those are moecore's own since
/// the last that waits for all before it, as other libraries' and embedding do; a kernel then loads
/// it while they run. Elsewhere it means nothing.
enum class Settled : uint8_t { kNothing, kWeights };

/// Weights of a grouped_gemm: a plain tensor or a packed one. Borrows either.
struct GroupedGemmWeights {
    TensorView plain;                       ///< [G, N, K], K or N contiguous
    const PackedWeights* packed = nullptr;  ///< used if not nullptr

    GroupedGemmWeights() = default;
    GroupedGemmWeights(const TensorView& plain) : plain(plain) {}
    GroupedGemmWeights(const PackedWeights& packed) : packed(&packed) {}
    bool defined() const { return packed != nullptr || plain.defined(); }
};

/// output[r] = activation(input_row(r) @ weights[g].T + bias[g]) for the rows r of each group g,
/// expert_offsets[g] <= r < expert_offsets[g + 1]. Rows outside every group are not written.
///
/// input_row(r) is input[r], or input[sorted_slots[r] / slots_per_token] when sorted_slots is
/// given: the gather happens inside. Accumulates in float32 along K in one fixed order, so a row's
/// bits depend on that row and its weights only: not on T, the other rows, the thread count or the
/// weights' layout.
///
/// input           [X, K] float32 or bfloat16, rows contiguous
/// weights         G matrices [N, K] of input's dtype
/// bias            [G, N] of float32 or input's dtype, rows contiguous, or absent
/// expert_offsets  [G + 1] int64, non-decreasing, first >= 0
/// sorted_slots    [>= R] int32, or absent
/// output          [>= R, N], or [>= R, N / 2] if gated; float32 or bfloat16, rows contiguous
/// work_counters   [>= 2] int32 zeros, or absent. On CUDA they let blocks take tiles in the order
///                 they get free in, instead of every n-th: the same bits, and less memory traffic
///                 where there are many rows. They are zeros again afterwards, so that one call at
///                 a time may use them.
/// settled         kWeights: weights and expert_offsets both are
/// expected_rows   how many rows the groups likely have together, if far fewer than R; 0 if not.
///                 It chooses the size of tiles on CUDA and changes no bit
/// Throws InvalidArgument if a shape, dtype, stride or device is not as above, an offset or slot
/// points outside its tensor (checked on the CPU), or output overlaps an input. On CUDA, where the
/// host never sees them, offsets are kept within the rows of the tensors and a slot outside the
/// input reads zeros or another row: the rows in question hold unspecified values, and nothing else
/// is touched.
void grouped_gemm(const TensorView& input, const GroupedGemmWeights& weights,
                  const TensorView& bias, const TensorView& expert_offsets,
                  const TensorView& sorted_slots, int slots_per_token,
                  const GroupedGemmConfig& config, const TensorView& output, Stream stream = {},
                  const TensorView& work_counters = {}, Settled settled = Settled::kNothing,
                  int64_t expected_rows = 0);

/// The same without slots and activation, but row r of the output, N elements of `dtype`, goes to
/// row_addresses[r]: to memory of other ranks, or anywhere else that the device reaches.
///
/// row_addresses  [R] int64, contiguous, multiples of 16 where N elements take one; those of rows
///                outside every group are not read
void grouped_gemm_to_rows(const TensorView& input, const GroupedGemmWeights& weights,
                          const TensorView& bias, const TensorView& expert_offsets, DType dtype,
                          const TensorView& row_addresses, Stream stream = {},
                          const TensorView& work_counters = {}, Settled settled = Settled::kNothing,
                          int64_t expected_rows = 0);

/// output = input @ weight.T + bias: grouped_gemm with one group over every row of `input`. Use it
/// where a row's bits must not depend on the batch.
/// input [T, K], weight [N, K] (or packed with one group), bias [N] or absent, output [T, N].
void linear(const TensorView& input, const GroupedGemmWeights& weight, const TensorView& bias,
            const GroupedGemmConfig& config, const TensorView& output, Stream stream = {},
            Settled settled = Settled::kNothing);

}  // namespace moecore
