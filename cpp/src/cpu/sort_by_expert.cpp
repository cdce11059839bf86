#include "moecore/kernels/sort_by_expert.hpp"

#include <vector>

namespace moecore::cpu {

// A counting sort: one pass to count, one to place. At 2 ns a slot it is a thousandth of the GEMMs
// that follow, so it stays on one thread.
void sort_by_expert(const SortByExpertArgs& args) {
    const int64_t num_experts = args.num_local_experts;
    int64_t* offsets = args.expert_offsets;
    const auto local_expert = [&](int64_t slot) -> int64_t {
        const int64_t expert = args.topk_ids[slot] - args.first_expert;
        return expert >= 0 && expert < num_experts ? expert : -1;
    };
    for (int64_t e = 0; e <= num_experts; ++e) offsets[e] = 0;
    for (int64_t slot = 0; slot < args.num_slots; ++slot)
        if (const int64_t e = local_expert(slot); e >= 0) ++offsets[e + 1];
    for (int64_t e = 0; e < num_experts; ++e) offsets[e + 1] += offsets[e];

    std::vector<int64_t> next(offsets, offsets + num_experts);
    for (int64_t slot = 0; slot < args.num_slots; ++slot) {
        const int64_t e = local_expert(slot);
        if (e < 0) {
            args.slot_to_row[slot] = -1;
            continue;
        }
        const int64_t row = next[e]++;
        args.slot_to_row[slot] = static_cast<int32_t>(row);
        args.sorted_slots[row] = static_cast<int32_t>(slot);
    }
    for (int64_t row = offsets[num_experts]; row < args.num_slots; ++row)
        args.sorted_slots[row] = -1;
}

}  // namespace moecore::cpu
