#pragma once

#include <vector>

#include "moecore/buffer.hpp"
#include "moecore/dispatcher.hpp"
#include "moecore/kernels/device_queue.hpp"
#include "moecore/workspace.hpp"
#include "runtime/plan_tensors.hpp"

namespace moecore {

/// Memory of plans made on one device, kept between calls.
struct DevicePlanStorage {
    explicit DevicePlanStorage(Device device)
        : memory(device, 0), ids(device, 0), places(device, 0) {}

    Workspace memory;
    Workspace ids;     ///< this rank's routes, then every rank's; their weights likewise
    Workspace places;  ///< [E]: group * P + owner
    cuda::PinnedBuffer pinned;
    std::vector<ExpertRange> ranges;  ///< what `places` holds
    int num_groups = 0;
    TensorView places_view;
};

/// Whether plan_on_device can make the plan: its sorts have at most kMaxExperts bins.
bool can_plan_on_device(const ExpertPlaces& places);

/// The plan of make_dispatch_plan, in `tensors`, made on the device of `all_ids` [P, F, k], which
/// is padded with the id -1. With `all_weights` [P, F, k], those of FastReturn, too. The result has
/// its counts; its arrays stay empty. `transport` waits until the host has the counts: 4 * G * P
/// numbers are all that it reads. Views live until the next call with the same storage.
DispatchPlan plan_on_device(Transport& transport, const ExpertPlaces& places,
                            const TensorView& all_ids, const TensorView& all_weights,
                            int64_t num_tokens, DevicePlanStorage& storage, PlanTensors& tensors,
                            Stream stream);

}  // namespace moecore
