#pragma once

#include <cstdint>
#include <span>

#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

/// Sorts slots (slot = token * k + choice) by expert, and within an expert by slot: the order does
/// not depend on timing. Ids outside [first_expert, first_expert + E_local) are dropped, negative
/// ones included. R is the number of slots kept.
///
/// topk_ids        [T, k] int32, contiguous
/// sorted_slots    [T * k] int32, out: row -> slot for rows 0 .. R - 1, then -1
/// slot_to_row     [T * k] int32, out: slot -> row, -1 if dropped
/// expert_offsets  [E_local + 1] int64, out: exclusive prefix sum; local expert e owns the rows
///                 expert_offsets[e] .. expert_offsets[e + 1] - 1; first 0, last R
/// Throws InvalidArgument if a shape, dtype, stride or device is not as above, first_expert is
/// negative, T * k exceeds 2^31 - 1, or two of the tensors overlap.
void sort_by_expert(const TensorView& topk_ids, int64_t first_expert,
                    const TensorView& sorted_slots, const TensorView& slot_to_row,
                    const TensorView& expert_offsets, Stream stream = {});

/// The arguments of one sort_by_expert.
struct SortProblem {
    TensorView topk_ids;
    int64_t first_expert;
    TensorView sorted_slots, slot_to_row, expert_offsets;
};
inline constexpr int kMaxSorts = 8;

/// At most kMaxSorts that do not depend on each other, on CUDA at the same time. Throws
/// InvalidArgument as above, and if their devices differ.
void sort_by_expert(std::span<const SortProblem> problems, Stream stream = {});

}  // namespace moecore
