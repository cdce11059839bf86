#pragma once

// Which grouped GEMM kernel runs a problem, and with which tiles: a pure function of sizes.

#include <algorithm>
#include <cstdint>

#include "moecore/kernels/grouped_gemm.hpp"

namespace moecore::cuda {

enum class GemmKernel : uint8_t {
    kSimple,  ///< any size, stride and dtype, no tensor cores
    kNarrow,  ///< 128 weight rows x up to 64 rows: reads weights at memory speed
    kWide,    ///< 256 weight rows x up to 192 rows: keeps the tensor cores busy
};

/// What choose_config knows. The sizes of the groups are on the device.
struct GemmProblem {
    int64_t num_rows;  ///< R, an upper bound
    int64_t num_groups;
    int64_t n, k_dim;
    bool is_gated;
    int num_multiprocessors;
};

struct GemmConfig {
    GemmKernel kernel;
    int max_tokens;  ///< rows of the largest tile
    int num_stages;  ///< K blocks of 64 that fit into a block's shared memory
};

/// Shared memory of one block of `kernel` that its stages may fill.
constexpr int64_t ring_bytes(GemmKernel kernel) {
    return kernel == GemmKernel::kWide ? 229376 : 113664;
}

/// Weight rows of a tile.
constexpr int weight_rows(GemmKernel kernel) { return kernel == GemmKernel::kWide ? 256 : 128; }

/// As many stages as fit, up to 12.
constexpr GemmConfig with_stages(GemmKernel kernel, int max_tokens) {
    constexpr int kRowBytes = 128;  // of one K block
    const int64_t stage = int64_t{kRowBytes} * (weight_rows(kernel) + max_tokens);
    return {kernel, max_tokens, static_cast<int>(std::min<int64_t>(ring_bytes(kernel) / stage, 12))};
}

/// Tiles for a problem that the sm_90a kernels can take. Rows are taken to be spread evenly: a
/// group with more rows than `max_tokens` costs time, not correctness.
constexpr GemmConfig choose_config(const GemmProblem& problem) {
    // Rows of a group, and room for the usual spread of a random routing.
    const int64_t mean = std::max<int64_t>(1, problem.num_rows / problem.num_groups);
    int64_t deviation = 0;
    while (deviation * deviation < mean) ++deviation;
    const int64_t likely = std::min(problem.num_rows, mean + 3 * deviation);
    if (likely <= 64) {
        const int max_tokens = static_cast<int>((likely + 7) / 8 * 8);
        return with_stages(GemmKernel::kNarrow, std::max(max_tokens, 8));
    }
    constexpr int kLargest = 192;
    const int max_tokens = static_cast<int>(std::min<int64_t>((likely + 15) / 16 * 16, kLargest));
    return with_stages(GemmKernel::kWide, max_tokens);
}

}  // namespace moecore::cuda
