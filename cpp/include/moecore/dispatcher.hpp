#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "moecore/topk_routing.hpp"
#include "moecore/transport.hpp"

namespace moecore {

/// Who owns which expert, and in which group of its rank's pipeline it is. Every rank cuts its
/// experts into `num_groups` contiguous groups; a rank with fewer experts has empty ones.
class ExpertPlaces {
public:
    /// ranges[r]: rank r's experts. REQUIRES: they follow each other and cover 0 .. E - 1.
    ExpertPlaces(std::span<const ExpertRange> ranges, int num_groups);

    struct Place {
        int owner = -1;  ///< -1 for an id that no expert has
        int group = 0;
        int local = 0;  ///< among the owner's experts
    };
    Place of(int64_t expert) const {
        return expert >= 0 && expert < static_cast<int64_t>(places_.size())
                   ? places_[static_cast<size_t>(expert)]
                   : Place{};
    }
    int num_ranks() const { return static_cast<int>(ranges_.size()); }
    int num_groups() const { return num_groups_; }
    int num_local(int rank) const { return ranges_[static_cast<size_t>(rank)].count; }
    /// First local expert of a group of `rank`; for group = num_groups, the number of its experts.
    int group_begin(int rank, int group) const {
        return static_cast<int>(int64_t{num_local(rank)} * group / num_groups_);
    }

private:
    std::vector<ExpertRange> ranges_;
    int num_groups_;
    std::vector<Place> places_;
};

/// Rows from or to every rank in one phase of every group.
struct RowCounts {
    RowCounts(int num_groups, int num_ranks)
        : num_ranks(static_cast<size_t>(num_ranks)),
          counts(static_cast<size_t>(num_groups) * this->num_ranks) {}

    int64_t& at(int group, int rank) {
        return counts[static_cast<size_t>(group) * num_ranks + static_cast<size_t>(rank)];
    }
    std::span<const int64_t> of_group(int group) const {
        return std::span(counts).subspan(static_cast<size_t>(group) * num_ranks, num_ranks);
    }
    int64_t before(int group) const;  ///< rows of the groups before `group`
    int64_t total() const;

    size_t num_ranks;
    std::vector<int64_t> counts;
};

/// Which row goes where. A pure function of every rank's topk_ids, so that all ranks agree without
/// exchanging counts, and no order depends on timing.
///
/// One copy of a token goes to each rank that owns one of its experts, with the first group that
/// needs it; copies arrive by (group, source rank, token). Within an expert, rows come by (source
/// rank, token). Each route's result goes back to the token's owner with its expert's group, by
/// (group, rank, token, choice).
struct DispatchPlan {
    int64_t num_tokens = 0;               ///< T, of this rank
    RowCounts sent, received;             ///< copies of tokens, dispatch
    RowCounts sent_back, received_back;   ///< results, on the way back
    std::vector<int32_t> sent_tokens;     ///< token of each copy sent, by (group, rank, token)
    std::vector<int32_t> copy_source;     ///< source rank and
    std::vector<int32_t> copy_token;      ///< token there, of each copy received
    std::vector<int32_t> sorted_slots;    ///< [R]: copy * k + choice of each row of the experts
    std::vector<int64_t> expert_offsets;  ///< [E_local + 1]: rows of each local expert
    std::vector<int32_t> back_rows;       ///< [R]: row of the experts of each result sent back
    std::vector<int32_t> slot_to_back;    ///< [T * k]: result of each slot, -1 for a dropped one

    DispatchPlan(int num_groups, int num_ranks)
        : sent(num_groups, num_ranks),
          received(num_groups, num_ranks),
          sent_back(num_groups, num_ranks),
          received_back(num_groups, num_ranks) {}
};

/// all_ids[r]: rank r's topk_ids [T_r, k], host memory. REQUIRES: 1 <= top_k <= kMaxTopK. Uses
/// moecore::num_threads() threads; the plan does not depend on how many.
DispatchPlan make_dispatch_plan(const ExpertPlaces& places, int rank, int top_k,
                                std::span<const std::span<const int32_t>> all_ids);

}  // namespace moecore
