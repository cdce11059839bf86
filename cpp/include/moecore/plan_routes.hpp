#pragma once

#include <cstdint>

#include "moecore/stream.hpp"
#include "moecore/tensor_view.hpp"

namespace moecore {

/// The plan of expert parallelism (DispatchPlan) as stable sorts, so that a device can make it from
/// every rank's routes: key_routes gives what is sorted, sort_by_expert sorts it, place_rows turns
/// the orders into rows. P ranks of F tokens with k choices, padded with the id -1; T tokens are
/// this rank's; G groups of local experts.

/// The bin of everything that travels, group * P + peer, or -1 for what does not:
///
/// all_ids             [P, F, k] int32: every rank's routes
/// places              [E] int32: group * P + owner of each expert
/// sent_keys           [T, P] int32, out: a token's copy to each rank, with the first group there
/// received_back_keys  [T, k] int32, out: the result of each own slot
/// received_keys       [P, F] int32, out: a token's copy to this rank
/// sent_back_keys      [P, F, k] int32, out: the result of each slot that this rank computes
/// All are contiguous. Throws InvalidArgument if a shape, dtype or device is not as above, or rank
/// is not in [0, P).
struct RouteKeys {
    TensorView sent, received_back, received, sent_back;
};
void key_routes(const TensorView& all_ids, const TensorView& places, int rank,
                const RouteKeys& keys, Stream stream = {});

/// Rows from orders. S = P * F * k; outputs past the last row of each are -1:
///
///     sorted_slots[r] = token_copies[s / k] * k + s % k   with s = row_slots[r]
///     back_rows[b]    = slot_rows[back_slots[b]]
///     sent_tokens[i]  = sent_items[i] / P
///     group_offsets[g, e] = expert_offsets[e], held between the ends of group g
///
/// and with all_weights, for the slots s whose token has a copy c = token_copies[s / k]; rows of
/// copies that do not exist are not written:
///
///     copy_rows[c * k + s % k]    = slot_rows[s]
///     copy_weights[c * k + s % k] = all_weights[s]
///     ones[i]                     = 1
///
/// row_slots, slot_rows  [S] int32: rows of this rank's experts to slots, and back
/// token_copies          [P, F] int32: place of each token's copy among those received, or -1
/// back_slots            [S] int32: slots in the order of their way back
/// sent_items            [T, P] int32: token * P + rank in the order of copies sent
/// expert_offsets        [E_local + 1] int64
/// all_weights           [P, F, k] float32: the weight of every route; or absent
/// All are contiguous. Throws InvalidArgument if a shape, dtype or device is not as above.
struct RowOrders {
    TensorView row_slots, slot_rows, token_copies, back_slots, sent_items, expert_offsets;
    TensorView all_weights;
};
struct PlacedRows {
    TensorView sorted_slots;   ///< [S] int32, out
    TensorView back_rows;      ///< [S] int32, out
    TensorView sent_tokens;    ///< [T, P] int32, out
    TensorView group_offsets;  ///< [G, E_local + 1] int64, out
    TensorView copy_rows;      ///< [S] int32, out, with all_weights
    TensorView copy_weights;   ///< [S] float32, out, likewise
    TensorView ones;           ///< [T, P] float32, out, likewise
};
void place_rows(const RowOrders& orders, const PlacedRows& rows, Stream stream = {});

}  // namespace moecore
