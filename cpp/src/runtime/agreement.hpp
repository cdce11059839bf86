#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "moecore/expert_parallel.hpp"

namespace moecore {

/// This rank's routes in host memory.
struct HostRoutes {
    const int32_t* topk_ids = nullptr;    ///< [T, k]
    const float* topk_weights = nullptr;  ///< [T, k]; with CombineMode::kFast only
};

/// What all ranks know of one layer's call. Spans view `bytes`.
struct Agreement {
    std::vector<ExpertRange> ranges;
    std::vector<int64_t> num_tokens;              ///< T of each rank
    std::vector<std::span<const int32_t>> ids;    ///< topk_ids [T, k] of each rank, once exchanged
    std::vector<std::span<const float>> weights;  ///< topk_weights likewise; with kFast only
    std::vector<char> bytes;

    bool has_routes() const { return !ids.empty(); }
};

/// Exchanges sizes and, if `routes` are given and few, routes. `call` counts this rank's layers.
/// Throws TransportError that names a rank whose model, sizes or place differ.
Agreement agree(Transport& transport, const MoEConfig& config, const ExpertParallelConfig& how,
                int64_t call, int64_t num_tokens, const HostRoutes* routes);

/// Exchanges the routes, unless agree() has.
void exchange_routes(Transport& transport, const MoEConfig& config, const ExpertParallelConfig& how,
                     const HostRoutes& routes, Agreement& agreement);

}  // namespace moecore
