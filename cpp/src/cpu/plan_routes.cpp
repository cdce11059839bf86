#include "moecore/kernels/plan_routes.hpp"

#include <algorithm>

namespace moecore::cpu {
namespace {

int32_t smaller_key(int32_t known, int32_t key) { return known < 0 ? key : std::min(known, key); }

}  // namespace

void key_routes(const KeyRoutesArgs& args) {
    const int64_t ranks = args.num_ranks, k = args.top_k;
    std::fill_n(args.sent_keys, args.num_tokens * ranks, -1);
    for (int64_t at = 0; at < ranks * args.tokens_per_rank; ++at) {
        const auto source = static_cast<int32_t>(at / args.tokens_per_rank);
        const int64_t token = at % args.tokens_per_rank;
        const bool is_own = source == args.rank && token < args.num_tokens;
        int32_t copy = -1;
        for (int64_t j = 0; j < k; ++j) {
            const int32_t id = args.all_ids[at * k + j];
            const int32_t place = id >= 0 && id < args.num_experts ? args.places[id] : -1;
            const int32_t owner = place < 0 ? -1 : place % args.num_ranks;
            const int32_t back = owner == args.rank ? place - owner + source : -1;
            args.sent_back_keys[at * k + j] = back;
            if (back >= 0) copy = smaller_key(copy, back);
            if (!is_own) continue;
            args.received_back_keys[token * k + j] = place;
            if (owner < 0) continue;
            int32_t& sent = args.sent_keys[token * ranks + owner];
            sent = smaller_key(sent, place);
        }
        args.received_keys[at] = copy;
    }
}

void place_rows(const PlaceRowsArgs& args) {
    const int64_t k = args.top_k;
    for (int64_t i = 0; i < args.num_slots; ++i) {
        const int32_t slot = args.row_slots[i], back = args.back_slots[i];
        args.sorted_slots[i] =
            slot < 0 ? -1 : static_cast<int32_t>(args.token_copies[slot / k] * k + slot % k);
        args.back_rows[i] = back < 0 ? -1 : args.slot_rows[back];
        const int64_t copy = args.token_copies[i / k];
        if (args.all_weights == nullptr || copy < 0) continue;
        args.copy_rows[copy * k + i % k] = args.slot_rows[i];
        args.copy_weights[copy * k + i % k] = args.all_weights[i];
    }
    if (args.all_weights != nullptr) std::fill_n(args.ones, args.num_items, 1.0f);
    for (int64_t i = 0; i < args.num_items; ++i) {
        const int32_t item = args.sent_items[i];
        args.sent_tokens[i] = item < 0 ? -1 : item / args.num_ranks;
    }
    const int64_t experts = args.num_local_experts, groups = args.num_groups;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = args.expert_offsets[experts * g / groups];
        const int64_t last = args.expert_offsets[experts * (g + 1) / groups];
        for (int64_t e = 0; e <= experts; ++e)
            args.group_offsets[g * (experts + 1) + e] =
                std::clamp(args.expert_offsets[e], first, last);
    }
}

}  // namespace moecore::cpu
