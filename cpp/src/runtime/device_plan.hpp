#pragma once

#include "moecore/expert_parallel.hpp"
#include "runtime/plan_tensors.hpp"

namespace moecore {

/// Whether plan_on_device takes this call: kExact, and sizes that its sorts take. Alike on every
/// rank.
bool can_plan_on_device(const ExpertParallel::Call& call, int num_ranks, int num_groups,
                        int64_t max_tokens);

/// make_dispatch_plan and place_plan on a GPU: the same numbers, of which the host sees the counts
/// only. Exchanges the routes among the ranks, and waits for its counts. Fills the counts of
/// `plan`, and leaves its lists empty. Collective. `max_tokens`: the most of any rank.
PlanTensors plan_on_device(Transport& transport, const ExpertParallel::Call& call,
                           const ExpertPlaces& places, int64_t max_tokens, PlanStorage& storage,
                           DispatchPlan& plan, Stream stream);

}  // namespace moecore
