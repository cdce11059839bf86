#pragma once

#include <memory>

#include "moecore/expert_parallel.hpp"
#include "runtime/agreement.hpp"
#include "runtime/comm_lane.hpp"
#include "runtime/plan_tensors.hpp"
#include "runtime/timeline.hpp"

namespace moecore {

/// Memory and tools of one rank that calls share.
struct EpResources {
    Transport& transport;
    Timeline timeline;
    Workspace workspace;
    PlanStorage plan_storage;
    std::unique_ptr<CommLane> inline_lane = make_inline_lane();
    std::unique_ptr<CommLane> side_lane;  ///< made when a call first overlaps

    explicit EpResources(Transport& transport)
        : transport(transport), workspace(transport.device(), 0) {}
};

/// One layer by Schedule::kAllToAll. `agreement` holds every rank's routes.
void run_all_to_all(EpResources& resources, const ExpertParallel::Call& call,
                    const Agreement& agreement, int num_groups, Stream stream);

}  // namespace moecore
