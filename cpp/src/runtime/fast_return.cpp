#include "runtime/fast_return.hpp"

namespace moecore {

FastReturn::FastReturn(const DispatchPlan& plan, int top_k,
                       std::span<const std::span<const float>> all_weights)
    : copy_slot_to_row(plan.copy_token.size() * static_cast<size_t>(top_k), -1),
      copy_weights(copy_slot_to_row.size()),
      slot_to_partial(static_cast<size_t>(plan.num_tokens) * plan.sent.num_ranks, -1),
      ones(slot_to_partial.size(), 1.0f) {
    for (size_t row = 0; row < plan.sorted_slots.size(); ++row)
        copy_slot_to_row[static_cast<size_t>(plan.sorted_slots[row])] = static_cast<int32_t>(row);
    const auto k = static_cast<size_t>(top_k);
    for (size_t copy = 0; copy < plan.copy_token.size(); ++copy) {
        const auto weights = all_weights[static_cast<size_t>(plan.copy_source[copy])];
        const size_t first = static_cast<size_t>(plan.copy_token[copy]) * k;
        for (size_t j = 0; j < k; ++j) copy_weights[copy * k + j] = weights[first + j];
    }
    size_t next = 0;
    for (size_t bin = 0; bin < plan.sent.counts.size(); ++bin) {  // (group, rank)
        const size_t rank = bin % plan.sent.num_ranks;
        for (int64_t i = 0; i < plan.sent.counts[bin]; ++i, ++next) {
            const auto token = static_cast<size_t>(plan.sent_tokens[next]);
            slot_to_partial[token * plan.sent.num_ranks + rank] = static_cast<int32_t>(next);
        }
    }
}

}  // namespace moecore
