#pragma once

#include <cstdint>

#include "moecore/stream.hpp"

namespace moecore {

/// What every key_routes kernel takes. Built and checked by ops/plan_routes.cpp. P ranks of F
/// tokens with k choices; T tokens are this rank's.
struct KeyRoutesArgs {
    const int32_t* all_ids;       ///< [P, F, k]
    const int32_t* places;        ///< [E] group * P + owner of each expert
    int32_t* sent_keys;           ///< [T, P], out
    int32_t* received_back_keys;  ///< [T, k], out
    int32_t* received_keys;       ///< [P, F], out
    int32_t* sent_back_keys;      ///< [P, F, k], out
    int64_t tokens_per_rank;      ///< F
    int64_t num_tokens;           ///< T <= F
    int num_ranks, rank;          ///< P, and who this is
    int num_experts, top_k;
};

/// What every place_rows kernel takes, likewise. S = P * F * k slots.
struct PlaceRowsArgs {
    const int32_t* row_slots;       ///< [S] slot of each row of the experts, -1 past the last
    const int32_t* slot_rows;       ///< [S] its inverse
    const int32_t* token_copies;    ///< [P * F] copy of each token, -1 for none
    const int32_t* back_slots;      ///< [S] slot of each result sent back, -1 past the last
    const int32_t* sent_items;      ///< [T * P] token * P + rank of each copy sent, likewise
    const int64_t* expert_offsets;  ///< [E_local + 1]
    const float* all_weights;       ///< [S], or nullptr
    int32_t* sorted_slots;          ///< [S], out
    int32_t* back_rows;             ///< [S], out
    int32_t* sent_tokens;           ///< [T * P], out
    int64_t* group_offsets;         ///< [G, E_local + 1], out
    int32_t* copy_rows;             ///< [S], out, with all_weights
    float* copy_weights;            ///< [S], out, likewise
    float* ones;                    ///< [T * P], out, likewise
    int64_t num_slots, num_items;   ///< S and T * P
    int top_k, num_ranks, num_groups, num_local_experts;
};

namespace cpu {
void key_routes(const KeyRoutesArgs& args);
void place_rows(const PlaceRowsArgs& args);
}  // namespace cpu
namespace cuda {
void key_routes(const KeyRoutesArgs& args, Stream stream);
void place_rows(const PlaceRowsArgs& args, Stream stream);
}  // namespace cuda

}  // namespace moecore
