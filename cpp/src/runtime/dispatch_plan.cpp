#include <numeric>

#include "moecore/dispatcher.hpp"

namespace moecore {
namespace {

constexpr int kNone = -1;

/// Turns counts by (group, rank) into the first position of each.
std::vector<int64_t> first_positions(const RowCounts& rows) {
    std::vector<int64_t> next(rows.counts.size());
    std::exclusive_scan(rows.counts.begin(), rows.counts.end(), next.begin(), int64_t{0});
    return next;
}

/// What one rank hosts for the tokens of another: fn(token, first_group) for each token that needs
/// `host`, in order.
template <typename Fn>
void for_each_copy(const ExpertPlaces& places, int host, int top_k, std::span<const int32_t> ids,
                   Fn&& fn) {
    const auto num_tokens = static_cast<int64_t>(ids.size()) / top_k;
    for (int64_t token = 0; token < num_tokens; ++token) {
        int first_group = places.num_groups();
        for (int j = 0; j < top_k; ++j) {
            const auto place = places.of(ids[static_cast<size_t>(token * top_k + j)]);
            if (place.owner == host && place.group < first_group) first_group = place.group;
        }
        if (first_group < places.num_groups()) fn(token, first_group);
    }
}

/// The side of a token's owner: copies to send, and where each slot's result arrives.
void plan_own_tokens(const ExpertPlaces& places, int top_k, std::span<const int32_t> ids,
                     DispatchPlan& plan) {
    const size_t ranks = plan.sent.num_ranks;
    for (int host = 0; host < places.num_ranks(); ++host)
        for_each_copy(places, host, top_k, ids,
                      [&](int64_t, int group) { ++plan.sent.at(group, host); });
    std::vector<int64_t> next = first_positions(plan.sent);
    plan.sent_tokens.resize(static_cast<size_t>(plan.sent.total()));
    for (int host = 0; host < places.num_ranks(); ++host)
        for_each_copy(places, host, top_k, ids, [&](int64_t token, int group) {
            const auto at = next[static_cast<size_t>(group) * ranks + static_cast<size_t>(host)]++;
            plan.sent_tokens[static_cast<size_t>(at)] = static_cast<int32_t>(token);
        });

    for (const int32_t id : ids)
        if (const auto place = places.of(id); place.owner != kNone)
            ++plan.received_back.at(place.group, place.owner);
    next = first_positions(plan.received_back);
    plan.slot_to_back.assign(ids.size(), kNone);
    for (size_t slot = 0; slot < ids.size(); ++slot) {
        const auto place = places.of(ids[slot]);
        if (place.owner == kNone) continue;
        const auto cell =
            static_cast<size_t>(place.group) * ranks + static_cast<size_t>(place.owner);
        plan.slot_to_back[slot] = static_cast<int32_t>(next[cell]++);
    }
}

/// The side of the experts' host: copies that arrive, rows of each expert, and where they go back.
void plan_hosted_rows(const ExpertPlaces& places, int rank, int top_k,
                      std::span<const std::span<const int32_t>> all_ids, DispatchPlan& plan) {
    const size_t ranks = plan.received.num_ranks;
    const auto num_local = static_cast<size_t>(places.num_local(rank));
    plan.expert_offsets.assign(num_local + 1, 0);
    for (int source = 0; source < places.num_ranks(); ++source) {
        const auto ids = all_ids[static_cast<size_t>(source)];
        for_each_copy(places, rank, top_k, ids, [&](int64_t token, int first_group) {
            ++plan.received.at(first_group, source);
            for (int j = 0; j < top_k; ++j) {
                const auto place = places.of(ids[static_cast<size_t>(token * top_k + j)]);
                if (place.owner != rank) continue;
                ++plan.sent_back.at(place.group, source);
                ++plan.expert_offsets[static_cast<size_t>(place.local) + 1];
            }
        });
    }
    std::inclusive_scan(plan.expert_offsets.begin(), plan.expert_offsets.end(),
                        plan.expert_offsets.begin());

    std::vector<int64_t> next_copy = first_positions(plan.received);
    std::vector<int64_t> next_back = first_positions(plan.sent_back);
    std::vector<int64_t> next_row(plan.expert_offsets.begin(), plan.expert_offsets.end() - 1);
    const auto num_copies = static_cast<size_t>(plan.received.total());
    const auto num_rows = static_cast<size_t>(plan.sent_back.total());
    plan.copy_source.resize(num_copies);
    plan.copy_token.resize(num_copies);
    plan.sorted_slots.resize(num_rows);
    plan.back_rows.resize(num_rows);
    for (int source = 0; source < places.num_ranks(); ++source) {
        const auto ids = all_ids[static_cast<size_t>(source)];
        const auto cell = [&](int group) {
            return static_cast<size_t>(group) * ranks + static_cast<size_t>(source);
        };
        for_each_copy(places, rank, top_k, ids, [&](int64_t token, int first_group) {
            const int64_t copy = next_copy[cell(first_group)]++;
            plan.copy_source[static_cast<size_t>(copy)] = source;
            plan.copy_token[static_cast<size_t>(copy)] = static_cast<int32_t>(token);
            for (int j = 0; j < top_k; ++j) {
                const auto place = places.of(ids[static_cast<size_t>(token * top_k + j)]);
                if (place.owner != rank) continue;
                const int64_t row = next_row[static_cast<size_t>(place.local)]++;
                plan.sorted_slots[static_cast<size_t>(row)] =
                    static_cast<int32_t>(copy * top_k + j);
                plan.back_rows[static_cast<size_t>(next_back[cell(place.group)]++)] =
                    static_cast<int32_t>(row);
            }
        });
    }
}

}  // namespace

ExpertPlaces::ExpertPlaces(std::span<const ExpertRange> ranges, int num_groups)
    : ranges_(ranges.begin(), ranges.end()), num_groups_(num_groups) {
    for (int owner = 0; owner < num_ranks(); ++owner) {
        int group = 0;
        for (int local = 0; local < num_local(owner); ++local) {
            while (local >= group_begin(owner, group + 1)) ++group;
            places_.push_back({owner, group, local});
        }
    }
}

int64_t RowCounts::before(int group) const {
    const auto end = counts.begin() + static_cast<int64_t>(num_ranks) * group;
    return std::accumulate(counts.begin(), end, int64_t{0});
}

int64_t RowCounts::total() const {
    return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

DispatchPlan make_dispatch_plan(const ExpertPlaces& places, int rank, int top_k,
                                std::span<const std::span<const int32_t>> all_ids) {
    DispatchPlan plan(places.num_groups(), places.num_ranks());
    const auto own = all_ids[static_cast<size_t>(rank)];
    plan.num_tokens = static_cast<int64_t>(own.size()) / top_k;
    plan_own_tokens(places, top_k, own, plan);
    plan_hosted_rows(places, rank, top_k, all_ids, plan);
    return plan;
}

}  // namespace moecore
