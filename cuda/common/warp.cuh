#pragma once

// What the kernels share about warps.

namespace moecore::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

/// Sum over the lanes up to and including this one.
__device__ inline int inclusive_sum(int x, int lane) {
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const int below = __shfl_up_sync(kFullMask, x, distance);
        if (lane >= distance) x += below;
    }
    return x;
}

}  // namespace moecore::cuda
