#include "moecore/kernels/locate_results.hpp"

#include <algorithm>

namespace moecore::cpu {

void locate_results(const LocateResultsArgs& args) {
    const int32_t* first = args.first_experts;
    const int32_t* last = first + args.num_ranks;
    for (int64_t slot = 0; slot < args.num_slots; ++slot) {
        const int32_t id = args.topk_ids[slot];
        const bool has_owner = id >= *first && id < *last;
        const auto owner = std::upper_bound(first, last, id) - first - 1;
        args.output[slot] = has_owner ? static_cast<int32_t>(owner * args.num_slots + slot) : -1;
    }
}

}  // namespace moecore::cpu
