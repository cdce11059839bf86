#include "moecore/sort_by_expert.hpp"

#include <limits>

#include "moecore/kernels/memory.hpp"
#include "moecore/topk_routing.hpp"
#include "ops/routing.hpp"

namespace moecore {

SortByExpertArgs checked_sort_by_expert(const Check& check, const TensorView& topk_ids,
                                        int64_t first_expert, const TensorView& sorted_slots,
                                        const TensorView& slot_to_row,
                                        const TensorView& expert_offsets) {
    check.dtype("topk_ids", topk_ids, {DType::kInt32});
    check.shape("topk_ids", topk_ids, {Check::kAny, Check::kAny});
    check.contiguous("topk_ids", topk_ids);
    const int64_t num_slots = topk_ids.num_elements();
    check.that(num_slots <= std::numeric_limits<int32_t>::max(),
               "topk_ids must have at most 2^31 - 1 entries, got ", num_slots);
    check.that(first_expert >= 0, "first_expert must be >= 0, got ", first_expert);
    check.dtype("sorted_slots", sorted_slots, {DType::kInt32});
    check.shape("sorted_slots", sorted_slots, {num_slots});
    check.dtype("slot_to_row", slot_to_row, {DType::kInt32});
    check.shape("slot_to_row", slot_to_row, {num_slots});
    check.dtype("expert_offsets", expert_offsets, {DType::kInt64});
    check.shape("expert_offsets", expert_offsets, {Check::kAny});
    const int64_t num_local_experts = expert_offsets.shape[0] - 1;
    check.that(num_local_experts >= 1 && num_local_experts <= kMaxExperts,
               "num_local_experts must be in [1, ", kMaxExperts, "], got ", num_local_experts);
    const std::pair<const char*, const TensorView*> outputs[] = {
        {"sorted_slots", &sorted_slots},
        {"slot_to_row", &slot_to_row},
        {"expert_offsets", &expert_offsets},
    };
    for (const auto& [name, view] : outputs) {
        check.contiguous(name, *view);
        check.device(name, *view, topk_ids.device);
        check.no_overlap(name, *view, "topk_ids", topk_ids);
        for (const auto& [other_name, other] : outputs)
            if (other != view) check.no_overlap(name, *view, other_name, *other);
    }

    return {
        .topk_ids = topk_ids.as<int32_t>(),
        .sorted_slots = sorted_slots.as<int32_t>(),
        .slot_to_row = slot_to_row.as<int32_t>(),
        .expert_offsets = expert_offsets.as<int64_t>(),
        .num_slots = num_slots,
        .first_expert = first_expert,
        .num_local_experts = static_cast<int>(num_local_experts),
    };
}

void sort_by_expert(const TensorView& topk_ids, int64_t first_expert,
                    const TensorView& sorted_slots, const TensorView& slot_to_row,
                    const TensorView& expert_offsets, Stream stream) {
    const SortByExpertArgs args = checked_sort_by_expert(
        Check("sort_by_expert"), topk_ids, first_expert, sorted_slots, slot_to_row, expert_offsets);
    switch (topk_ids.device.type) {
        case DeviceType::kCpu:
            return cpu::sort_by_expert(args);
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(topk_ids.device.index);
            return cuda::sort_by_expert(args, stream);
        }
    }
}

}  // namespace moecore
