#pragma once

#include <cstdint>

#include "moecore/stream.hpp"

namespace moecore {

/// Which bin, a pair of group and rank, each copy and each result of a dispatch belongs to; -1 for
/// none. P ranks, T tokens a rank, k choices; bin = group * P + rank. See DispatchPlan.
struct DispatchBinsArgs {
    const int32_t* all_ids;  ///< [P, T, k]: every rank's topk_ids; -1 where a rank has fewer tokens
    const int32_t* bin_of;   ///< [E]: the bin of each expert's owner
    int32_t* sent;           ///< [T, P] out: of this rank's token for each rank
    int32_t* received_back;  ///< [T, k] out: of each of this rank's slots
    int32_t* received;       ///< [P, T] out: of each rank's token, by its source, for this rank
    int32_t* sent_back;      ///< [P, T, k] out: of each rank's slot that has its expert here
    int64_t num_tokens;      ///< T
    int num_experts, num_ranks, top_k, rank;
};

/// The lists of a dispatch from bins that are sorted. N = P * T * k.
struct DispatchListsArgs {
    const int32_t* sorted_sent;       ///< [T * P]: token * P + rank by (bin, token), then -1
    const int32_t* sorted_rows;       ///< [N]: slots of the experts here by (expert, slot), then -1
    const int32_t* row_of_slot;       ///< [N]: its inverse
    const int32_t* copy_of_token;     ///< [P * T]: place of each rank's token among copies received
    const int32_t* sorted_sent_back;  ///< [N]: slots here by (bin, slot), then -1
    const int64_t* expert_offsets;    ///< [E_local + 1]
    int32_t* sent_tokens;             ///< [T * P] out, then -1
    int32_t* sorted_slots;            ///< [N] out: copy * k + choice of each row, then -1
    int32_t* back_rows;               ///< [N] out: row of each result sent back, then -1
    int64_t* group_offsets;           ///< [G, E_local + 1] out: those of other groups are empty
    int64_t num_tokens;
    int num_ranks, top_k, num_groups, num_local_experts;
};

namespace cuda {
void dispatch_bins(const DispatchBinsArgs& args, Stream stream);
void dispatch_lists(const DispatchListsArgs& args, Stream stream);
}  // namespace cuda

}  // namespace moecore
