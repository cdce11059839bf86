#pragma once

// Which grouped GEMM kernel runs a problem, and with which tiles: a pure function of sizes.

#include <algorithm>
#include <cstdint>
#include <string_view>

#include "moecore/error.hpp"
#include "moecore/kernels/grouped_gemm.hpp"

namespace moecore::cuda {

enum class GemmKernel : uint8_t {
    kSimple,  ///< any size, stride and dtype, no tensor cores
    kSlim,    ///< 64 weight rows x up to 32 rows: where that gives more multiprocessors a share
    kNarrow,  ///< 128 weight rows x up to 64 rows: reads weights at memory speed
    kWide,    ///< 256 weight rows x up to 192 rows: keeps the tensor cores busy
    kPair,    ///< two wide tiles with the same weights, read from L2 once
};

/// Which kernels a user allows.
enum class GemmChoice : uint8_t {
    kAuto,
    kSimple,  ///< the reference everywhere, to compare with
    kSm80,    ///< that of older GPUs on Hopper, too
};

/// Of MOECORE_CUDA_GEMM; empty is auto. Throws InvalidArgument.
inline GemmChoice gemm_choice(std::string_view name) {
    if (name.empty() || name == "auto") return GemmChoice::kAuto;
    if (name == "sm80") return GemmChoice::kSm80;
    require(name == "simple", "MOECORE_CUDA_GEMM must be auto, simple or sm80, got ", name);
    return GemmChoice::kSimple;
}

/// What choose_config knows. The sizes of the groups are on the device.
struct GemmProblem {
    int64_t num_rows;  ///< R, as far as anyone knows
    int64_t num_groups;
    int64_t n, k_dim;
    bool is_gated;
    int num_multiprocessors;
};

struct GemmConfig {
    GemmKernel kernel;
    int max_tokens;  ///< rows of the largest tile
    int num_stages;  ///< K blocks of 64 that fit into a block's shared memory
    int sharing;     ///< row tiles of a group that take a weight tile in turn
};

/// Shared memory of one block of `kernel` that its stages may fill.
constexpr int64_t ring_bytes(GemmKernel kernel) {
    return kernel == GemmKernel::kSlim || kernel == GemmKernel::kNarrow ? 113664 : 229376;
}

/// Weight rows of a tile.
constexpr int weight_rows(GemmKernel kernel) {
    if (kernel == GemmKernel::kSlim) return 64;
    return kernel == GemmKernel::kNarrow ? 128 : 256;
}

/// As many stages as fit, up to 12.
constexpr GemmConfig with_stages(GemmKernel kernel, int max_tokens, int sharing) {
    constexpr int kRowBytes = 128;  // of one K block
    const int64_t stage = int64_t{kRowBytes} * (weight_rows(kernel) + max_tokens);
    return {kernel, max_tokens, static_cast<int>(std::min<int64_t>(ring_bytes(kernel) / stage, 12)),
            sharing};
}

/// As many row tiles as stay in L2 between one weight tile and the next: every one is then read
/// from memory once, and weights once for so many tiles.
constexpr int row_tiles_in_cache(int max_tokens, int64_t k_dim, int64_t cache_bytes) {
    return static_cast<int>(std::clamp<int64_t>(cache_bytes / (2 * max_tokens * k_dim), 1, 16));
}

/// Rows of a group, and room for the usual spread of a random routing.
constexpr int64_t likely_rows(const GemmProblem& problem) {
    const int64_t mean = std::max<int64_t>(1, problem.num_rows / problem.num_groups);
    int64_t deviation = 0;
    while (deviation * deviation < mean) ++deviation;
    return std::min(problem.num_rows, mean + 3 * deviation);
}

/// Whether slim tiles of every group that may have rows run at the same time, two to a
/// multiprocessor. Then they spread the weights better than half as many tiles; else the second
/// wave costs more than that. One group has the thin kernel.
constexpr bool slim_is_better(const GemmProblem& problem) {
    const int64_t rows = weight_rows(GemmKernel::kSlim);
    const int64_t tiles =
        (problem.n + rows - 1) / rows * std::min(problem.num_rows, problem.num_groups);
    return problem.num_groups > 1 && tiles <= 2 * problem.num_multiprocessors;
}

/// Tiles for a problem that the sm_90a kernels can take. Rows are taken to be spread evenly: a
/// group with more rows than `max_tokens` costs time, not correctness.
constexpr GemmConfig choose_config(const GemmProblem& problem) {
    constexpr int64_t kCacheBytes = 16 << 20;  // of an H100's 50 MB, of which a half is near
    const int64_t likely = likely_rows(problem);
    if (likely <= 64) {
        const int max_tokens = std::max(static_cast<int>((likely + 7) / 8 * 8), 8);
        const bool is_slim = max_tokens <= 32 && slim_is_better(problem);
        return with_stages(is_slim ? GemmKernel::kSlim : GemmKernel::kNarrow, max_tokens, 16);
    }
    // Multiples of 32: the copy engine brings so many rows at a time.
    const int max_tokens = static_cast<int>(std::clamp<int64_t>((likely + 31) / 32 * 32, 96, 192));
    // A pair splits the rows of a group in two, or four, or six. That gains up to 4 percent where
    // it makes no more tiles, or one more of many; one more of three costs 7. Two tiles of a short
    // K lose 2 by it (all on an H200).
    constexpr int64_t kManyTiles = 16, kLongK = 2560;
    const int64_t tiles = (problem.num_rows / problem.num_groups + max_tokens - 1) / max_tokens;
    const bool splits_evenly = tiles % 2 == 0;
    const bool is_pair = tiles >= kManyTiles ||
                         (splits_evenly && (likely > 2 * max_tokens || problem.k_dim >= kLongK));
    const GemmKernel kernel = is_pair ? GemmKernel::kPair : GemmKernel::kWide;
    return with_stages(kernel, max_tokens,
                       row_tiles_in_cache(max_tokens, problem.k_dim, kCacheBytes));
}

}  // namespace moecore::cuda
