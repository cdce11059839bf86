#pragma once

#include <vector>

#include "moecore/dispatcher.hpp"
#include "moecore/kernels/device_queue.hpp"
#include "moecore/tensor_view.hpp"
#include "moecore/workspace.hpp"
#include "runtime/fast_return.hpp"

namespace moecore {

/// A plan as ops read it: on the CPU views of the plan itself, on CUDA copies made by one transfer.
struct PlanTensors {
    TensorView sent_tokens;                 ///< as in DispatchPlan
    TensorView sorted_slots;                ///<
    TensorView back_rows;                   ///<
    TensorView slot_to_back;                ///<
    std::vector<TensorView> group_offsets;  ///< expert_offsets of each group: others have no rows
    TensorView copy_slot_to_row, copy_weights;  ///< as in FastReturn, if it is used
    TensorView slot_to_partial, ones;           ///<
};

/// Where a plan's arrays live: host memory of both kinds, and device memory, kept between calls.
struct PlanStorage {
    Workspace device_memory{Device{}, 0};
    cuda::PinnedBuffer pinned;
    std::vector<int64_t> group_offsets;  ///< [num_groups, E_local + 1]
};

/// `fast` may be nullptr. Views live until the next call with the same storage. On CUDA the
/// transfer is ordered on `stream`; the one before must be over.
PlanTensors place_plan(DispatchPlan& plan, FastReturn* fast, const ExpertPlaces& places, int rank,
                       PlanStorage& storage, Device device, Stream stream);

}  // namespace moecore
