#pragma once

#include <memory>

#include "moecore/expert_parallel.hpp"
#include "runtime/agreement.hpp"
#include "runtime/comm_lane.hpp"
#include "runtime/plan_on_device.hpp"
#include "runtime/plan_tensors.hpp"
#include "runtime/timeline.hpp"

namespace moecore {

/// Memory and tools of one rank that calls share.
struct EpResources {
    Transport& transport;
    Timeline timeline;
    Workspace workspace;
    PlanStorage plan_storage;
    DevicePlanStorage device_plan;
    std::unique_ptr<CommLane> inline_lane = make_inline_lane();
    std::unique_ptr<CommLane> side_lane;  ///< made when a call first overlaps

    explicit EpResources(Transport& transport)
        : transport(transport), workspace(transport.device(), 0), device_plan(transport.device()) {}
};

/// Whether a call's routes must be in host memory: on the CPU, and for what a device cannot plan.
bool needs_host_routes(const Transport& transport, const Agreement& agreement, int num_groups);

/// One layer by Schedule::kAllToAll. `agreement` holds every rank's routes if they are needed.
void run_all_to_all(EpResources& resources, const ExpertParallel::Call& call,
                    const Agreement& agreement, int num_groups, Stream stream);

}  // namespace moecore
