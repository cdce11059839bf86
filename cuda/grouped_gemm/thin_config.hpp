#pragma once

// Which products with one group get small tiles, so that every multiprocessor has one: a pure
// function of sizes.

#include <algorithm>
#include <cstdint>

#include "grouped_gemm/config.hpp"

namespace moecore::cuda {

/// The tiles of a thin product.
struct ThinConfig {
    int weight_rows;  ///< of a tile: 16, 32 or 64
    int max_tokens;   ///< rows of a tile: 8, 16, 24, 32, 48, 64, 96 or 128
    int stage_depth;  ///< K blocks of 64 that travel together
    int num_stages;   ///< that a block's shared memory holds
    bool is_better;   ///< than the tiles of choose_config
};

/// Shared memory of a block, of which a multiprocessor holds two: a block can then load weights
/// while the kernel before it still runs.
inline constexpr int64_t kThinRingBytes = 105472;
inline constexpr int kThinMaxStages = 12;

constexpr int64_t num_tiles(const GemmProblem& problem, int64_t weight_rows, int64_t max_tokens) {
    return (problem.n + weight_rows - 1) / weight_rows *
           ((problem.num_rows + max_tokens - 1) / max_tokens);
}

/// What the busiest multiprocessor reads along K, in rows: weights and input of each tile.
constexpr int64_t tile_cost(const GemmProblem& problem, int64_t weight_rows, int64_t max_tokens) {
    const int64_t tiles = num_tiles(problem, weight_rows, max_tokens);
    const int64_t rounds = (tiles + problem.num_multiprocessors - 1) / problem.num_multiprocessors;
    return rounds * (weight_rows + max_tokens);
}

/// Tiles for a product of one group whose rows lie side by side. Few weight rows make few tiles of
/// the other kernels, and a multiprocessor cannot read faster than its latency allows: a tile of
/// 128 weight rows and K = 4096 takes 16 us.
constexpr ThinConfig choose_thin(const GemmProblem& problem) {
    ThinConfig best{64, 8, 1, 1, false};
    int64_t least = 0;
    for (const int weight_rows : {64, 32, 16}) {
        for (const int max_tokens : {8, 16, 24, 32, 48, 64, 96, 128}) {
            const int64_t cost = tile_cost(problem, weight_rows, max_tokens);
            if (least == 0 || cost < least) {
                least = cost;
                best.weight_rows = weight_rows;
                best.max_tokens = max_tokens;
            }
            if (max_tokens >= problem.num_rows) break;
        }
    }
    const GemmConfig other = choose_config(problem);
    best.is_better = least < tile_cost(problem, weight_rows(other.kernel), other.max_tokens) &&
                     num_tiles(problem, best.weight_rows, best.max_tokens) <=
                         2 * problem.num_multiprocessors;  // all at once

    // Long stages need fewer barriers; four of them keep memory busy.
    const int64_t block_bytes = int64_t{128} * (best.weight_rows + best.max_tokens);
    best.stage_depth = 4;
    while (best.stage_depth > 1 && kThinRingBytes / (best.stage_depth * block_bytes) < 4)
        best.stage_depth /= 2;
    const int64_t needed = (problem.k_dim / 64 + best.stage_depth - 1) / best.stage_depth;
    best.num_stages = static_cast<int>(std::min<int64_t>(
        {kThinRingBytes / (best.stage_depth * block_bytes), needed, kThinMaxStages}));
    return best;
}

}  // namespace moecore::cuda
