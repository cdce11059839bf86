#pragma once

#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

/// Where the result of each slot arrives when every rank sends one row for every slot:
///
///     output[s] = owner(topk_ids[s]) * S + s,  or -1 where no rank owns that id
///
/// topk_ids       [T, k] int32, contiguous; S = T * k
/// first_experts  [P + 1] int32, non-decreasing: rank r owns first_experts[r] .. [r + 1] - 1
/// output         [S] int32, contiguous
/// Throws InvalidArgument if a shape, dtype, stride or device is not as above, or P * S is 2^31 or
/// more.
void locate_results(const TensorView& topk_ids, const TensorView& first_experts,
                    const TensorView& output, Stream stream = {});

}  // namespace moecore
