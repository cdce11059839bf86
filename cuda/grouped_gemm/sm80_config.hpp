#pragma once

// Which tiles the sm_80 grouped GEMM has for a problem: a pure function of sizes.

#include <algorithm>
#include <cstdint>

#include "grouped_gemm/config.hpp"

namespace moecore::cuda::sm80 {

/// A tile's shape: warps along weight rows and along rows of input, each with so many times 16 of
/// both, and the ring of K blocks in shared memory.
template <int kWeightWarps_, int kTokenWarps_, int kWeightTiles_, int kTokenTiles_, int BLOCK_K_,
          int kStages_, int kResidentBlocks_>
struct TileShape {
    static constexpr int kWeightWarps = kWeightWarps_, kTokenWarps = kTokenWarps_;
    static constexpr int kWeightTiles = kWeightTiles_, kTokenTiles = kTokenTiles_;
    static constexpr int BLOCK_K = BLOCK_K_;
    static constexpr int kStages = kStages_;
    static constexpr int kResidentBlocks = kResidentBlocks_;  ///< if a multiprocessor holds so many
    static constexpr int kThreads = 32 * kWeightWarps * kTokenWarps;
    static constexpr int kWeightRows = 16 * kWeightWarps * kWeightTiles;
    static constexpr int kTokenStep = 16 * kTokenWarps;  ///< all warps have as many tiles
    static constexpr int kMaxTokens = kTokenStep * kTokenTiles;

    static constexpr int stage_bytes(int max_tokens) {
        return 2 * BLOCK_K * (kWeightRows + max_tokens);
    }
    static constexpr int ring_bytes(int max_tokens) { return kStages * stage_bytes(max_tokens); }
};

/// Weights at memory speed, for a few rows a group: 56 KiB of them on their way to each block,
/// since few tiles may give a multiprocessor one block only.
using Narrow = TileShape<4, 1, 1, 2, 64, 8, 2>;
/// The same for up to 64 rows: fewer fragments of rows are loaded for each of weights.
using Medium = TileShape<4, 1, 2, 4, 64, 4, 2>;
/// Keeps the tensor cores busy: a warp's tile of 64 x 64 loads least from shared memory, a block's
/// of 256 x 128 from L2.
using Wide = TileShape<4, 2, 4, 4, 32, 4, 1>;

/// What a block may have on every GPU since Ampere: 99 KiB, of which 2 KiB are not the ring's.
inline constexpr int kMostRingBytes = 97 << 10;

enum class Tiles : uint8_t { kNarrow, kMedium, kWide };

struct Config {
    Tiles tiles;
    int max_tokens;  ///< rows of the largest tile
    int sharing;     ///< row tiles of a group that take a weight tile in turn
};

/// Tiles for a problem on a GPU with so much L2. Rows are taken to be spread evenly: a group with
/// more rows than `max_tokens` costs time, not correctness.
constexpr Config choose(const GemmProblem& problem, int64_t cache_bytes) {
    const int64_t likely = likely_rows(problem);
    const auto with = [&]<typename Shape>(Tiles tiles, Shape) {
        constexpr int kStep = Shape::kTokenStep;
        const int max_tokens = static_cast<int>(
            std::min<int64_t>((likely + kStep - 1) / kStep * kStep, Shape::kMaxTokens));
        return Config{tiles, max_tokens,
                      row_tiles_in_cache(max_tokens, problem.k_dim, cache_bytes / 3)};
    };
    if (likely <= Narrow::kMaxTokens) return with(Tiles::kNarrow, Narrow{});
    if (likely <= Medium::kMaxTokens) return with(Tiles::kMedium, Medium{});
    // Of few weight rows, small tiles reach more multiprocessors.
    const int64_t num_wide = (problem.num_rows + Wide::kMaxTokens - 1) / Wide::kMaxTokens *
                             ((problem.n + Wide::kWeightRows - 1) / Wide::kWeightRows);
    if (2 * num_wide < problem.num_multiprocessors) return with(Tiles::kMedium, Medium{});
    return with(Tiles::kWide, Wide{});
}

}  // namespace moecore::cuda::sm80
