#pragma once

// Which tile a block takes next: every n-th of n blocks, or the next that nobody has taken.
//
// Blocks drift apart, since neither tiles nor multiprocessors are quite alike. With every n-th tile
// they end far apart in the list, and weights and rows that neighbouring tiles share have left L2
// before the last block reads them. Taken in the order in which blocks get free, neighbours run at
// about the same time.

#include <cstdint>

namespace moecore::cuda {

/// The next that nobody has taken, after the `num_first` that needed no claim. `counters`: zeros at
/// first.
__device__ inline int claim_tile(int32_t* counters, int num_first) {
    return num_first + atomicAdd(counters, 1);
}

/// Called once by every block, after its last claim: the last one sets the counters back.
__device__ inline void end_claims(int32_t* counters) {
    __threadfence();  // claims come before
    if (atomicAdd(counters + 1, 1) + 1 < static_cast<int>(gridDim.x)) return;
    counters[0] = 0;
    counters[1] = 0;
}

}  // namespace moecore::cuda
