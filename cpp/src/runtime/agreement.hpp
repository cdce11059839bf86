#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "moecore/expert_parallel.hpp"

namespace moecore {

/// What all ranks know of one layer's call after its first exchange. Spans view `bytes`.
struct Agreement {
    std::vector<ExpertRange> ranges;
    std::vector<int64_t> num_tokens;              ///< T of each rank
    std::vector<std::span<const int32_t>> ids;    ///< topk_ids [T, k] of each rank
    std::vector<std::span<const float>> weights;  ///< topk_weights likewise; with kFast only
    std::vector<char> bytes;
};

/// Exchanges sizes and routes. Small calls take one exchange, larger ones two.
/// topk_ids, topk_weights: this rank's [T, k], host memory. `call` counts this rank's layers.
/// Throws TransportError that names a rank whose model, sizes or place differ.
Agreement agree(Transport& transport, const MoEConfig& config, const ExpertParallelConfig& how,
                int64_t call, const int32_t* topk_ids, const float* topk_weights,
                int64_t num_tokens);

}  // namespace moecore
