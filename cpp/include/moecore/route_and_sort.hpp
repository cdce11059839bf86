#pragma once

#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"
#include "moecore/topk_routing.hpp"

namespace moecore {

/// topk_routing and then sort_by_expert of its ids, with their outputs and their bits; on CUDA one
/// launch for few tokens, where two would take as long as the work itself.
///
/// Arguments as in topk_routing.hpp and sort_by_expert.hpp; the E_local experts from first_expert
/// on, E_local from expert_offsets, must be among the router's E.
/// Throws InvalidArgument as these two do.
void route_and_sort(const TensorView& router_logits, const TensorView& selection_bias,
                    const RoutingConfig& config, int64_t first_expert, const TensorView& topk_ids,
                    const TensorView& topk_weights, const TensorView& sorted_slots,
                    const TensorView& slot_to_row, const TensorView& expert_offsets,
                    Stream stream = {});

}  // namespace moecore
