#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "moecore/dispatcher.hpp"

namespace moecore {

/// The way back of CombineMode::kFast: a copy's routes are added where its experts are, and one row
/// a copy returns the way it came: what was received is sent, and what was sent is received.
struct FastReturn {
    std::vector<int32_t> copy_slot_to_row;  ///< [copies * k]: row of the experts, -1 elsewhere
    std::vector<float> copy_weights;        ///< [copies, k]
    std::vector<int32_t> slot_to_partial;   ///< [T * P]: a token's row from each rank, -1 for none
    std::vector<float> ones;                ///< [T, P]

    FastReturn(const DispatchPlan& plan, int top_k,
               std::span<const std::span<const float>> all_weights);
};

}  // namespace moecore
