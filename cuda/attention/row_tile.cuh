#pragma once

// Which rows of which sequence a cluster of blocks computes.

#include <cstdint>

#include "common/launch.cuh"
#include "common/warp.cuh"
#include "moecore/kernels/kv_cache.hpp"

namespace moecore::cuda {

/// The rows that a cluster computes: rows first .. first + kRows - 1 of a sequence, where row q is
/// head q % group of its token q / group.
struct RowTile {
    int64_t sequence;    ///< -1: no such tile
    int first;           ///< row
    int num_rows;        ///< of the sequence
    int first_token;     ///< of the sequence, in the batch
    int first_position;  ///< of that token
};

/// The index-th tile over all sequences, found by the whole warp.
__device__ inline RowTile find_tile(const KvCacheArgs& cache, int64_t num_tokens, int group,
                                    int rows_per_tile, int index, int lane) {
    for (int64_t base = 0; base < cache.num_sequences; base += kWarpSize) {
        const int64_t s = base + lane;
        int first_token = 0, length = 0;
        if (s < cache.num_sequences) {
            first_token = max(cache.query_offsets[s], 0);
            length = static_cast<int>(min(int64_t{cache.query_offsets[s + 1]}, num_tokens)) -
                     first_token;
            length = min(max(length, 0), cache.context_lens[s]);
        }
        const int num_tiles = ceil_div(max(length, 0) * group, rows_per_tile);
        const int end = inclusive_sum(num_tiles, lane);
        const unsigned found = __ballot_sync(kFullMask, index < end);
        if (found != 0) {
            const int owner = __ffs(static_cast<int>(found)) - 1;
            const int from_owner = index - __shfl_sync(kFullMask, end - num_tiles, owner);
            const int context = s < cache.num_sequences ? cache.context_lens[s] : 0;
            return {base + owner, from_owner * rows_per_tile,
                    __shfl_sync(kFullMask, length * group, owner),
                    __shfl_sync(kFullMask, first_token, owner),
                    __shfl_sync(kFullMask, context - length, owner)};
        }
        index -= __shfl_sync(kFullMask, end, kWarpSize - 1);
    }
    return {-1, 0, 0, 0, 0};
}

}  // namespace moecore::cuda
