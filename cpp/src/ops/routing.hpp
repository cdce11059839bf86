#pragma once

#include "moecore/kernels/sort_by_expert.hpp"
#include "moecore/kernels/topk_routing.hpp"
#include "moecore/tensor_view.hpp"
#include "ops/check.hpp"

namespace moecore {

/// The checks of topk_routing, whose arguments these are.
TopkRoutingArgs checked_topk_routing(const Check& check, const char* op,
                                     const TensorView& router_logits,
                                     const TensorView& selection_bias, const RoutingConfig& config,
                                     const TensorView& topk_ids, const TensorView& topk_weights);

/// The checks of sort_by_expert.
SortByExpertArgs checked_sort_by_expert(const Check& check, const TensorView& topk_ids,
                                        int64_t first_expert, const TensorView& sorted_slots,
                                        const TensorView& slot_to_row,
                                        const TensorView& expert_offsets);

}  // namespace moecore
