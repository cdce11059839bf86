#pragma once

#include <cstdint>
#include <span>

#include "moecore/stream.hpp"

namespace moecore {

/// What every sort_by_expert kernel takes. Built and checked by ops/sort_by_expert.cpp.
struct SortByExpertArgs {
    const int32_t* topk_ids;  ///< [num_slots]
    int32_t* sorted_slots;    ///< [num_slots] out
    int32_t* slot_to_row;     ///< [num_slots] out
    int64_t* expert_offsets;  ///< [num_local_experts + 1] out
    int64_t num_slots;        ///< T * k, below 2^31
    int64_t first_expert;
    int num_local_experts;  ///< E_local >= 1
};

namespace cpu {
void sort_by_expert(const SortByExpertArgs& args);
}
namespace cuda {
/// Several at the same time, at most kMaxSorts.
void sort_by_expert(std::span<const SortByExpertArgs> sorts, Stream stream);
}  // namespace cuda

}  // namespace moecore
