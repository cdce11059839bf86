#include "runtime/fast_return.hpp"

namespace moecore {
namespace {

/// fn(rank, first, count) for the rows of every (rank, group), which lie by (group, rank).
template <typename Fn>
void for_each_by_rank(const RowCounts& rows, Fn&& fn) {
    const size_t ranks = rows.num_ranks;
    std::vector<int64_t> first(rows.counts.size());
    for (size_t i = 1; i < first.size(); ++i) first[i] = first[i - 1] + rows.counts[i - 1];
    for (size_t rank = 0; rank < ranks; ++rank)
        for (size_t i = rank; i < rows.counts.size(); i += ranks)
            fn(rank, first[i], rows.counts[i]);
}

}  // namespace

FastReturn::FastReturn(const DispatchPlan& plan, int top_k,
                       std::span<const std::span<const float>> all_weights)
    : copy_slot_to_row(plan.copy_token.size() * static_cast<size_t>(top_k), -1),
      copy_weights(copy_slot_to_row.size()),
      sent_back(plan.sent.num_ranks),
      received_back(plan.sent.num_ranks),
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
    for_each_by_rank(plan.received, [&](size_t rank, int64_t first, int64_t count) {
        sent_back[rank] += count;
        for (int64_t i = 0; i < count; ++i) back_copies.push_back(static_cast<int32_t>(first + i));
    });
    int32_t next = 0;
    for_each_by_rank(plan.sent, [&](size_t rank, int64_t first, int64_t count) {
        received_back[rank] += count;
        for (int64_t i = 0; i < count; ++i) {
            const auto token =
                static_cast<size_t>(plan.sent_tokens[static_cast<size_t>(first + i)]);
            slot_to_partial[token * plan.sent.num_ranks + rank] = next++;
        }
    });
}

}  // namespace moecore
