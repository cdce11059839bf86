#include "moecore/sort_by_expert.hpp"

#include <array>
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

void sort_by_expert(std::span<const SortProblem> problems, Stream stream) {
    const Check check("sort_by_expert");
    check.that(problems.size() <= kMaxSorts, "problems must be at most ", kMaxSorts, ", got ",
               problems.size());
    if (problems.empty()) return;
    const Device device = problems[0].topk_ids.device;
    std::array<SortByExpertArgs, kMaxSorts> sorts;
    for (size_t i = 0; i < problems.size(); ++i) {
        const SortProblem& one = problems[i];
        check.device("topk_ids", one.topk_ids, device);
        sorts[i] = checked_sort_by_expert(check, one.topk_ids, one.first_expert, one.sorted_slots,
                                          one.slot_to_row, one.expert_offsets);
    }
    const std::span used(sorts.data(), problems.size());
    switch (device.type) {
        case DeviceType::kCpu:
            for (const SortByExpertArgs& args : used) cpu::sort_by_expert(args);
            return;
        case DeviceType::kCuda: {
            const cuda::DeviceScope scope(device.index);
            return cuda::sort_by_expert(used, stream);
        }
    }
}

void sort_by_expert(const TensorView& topk_ids, int64_t first_expert,
                    const TensorView& sorted_slots, const TensorView& slot_to_row,
                    const TensorView& expert_offsets, Stream stream) {
    const SortProblem one{topk_ids, first_expert, sorted_slots, slot_to_row, expert_offsets};
    sort_by_expert(std::span(&one, 1), stream);
}

}  // namespace moecore
