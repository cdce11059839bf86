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

/// The lanes whose `x` is this lane's; values are in [0, 2^num_bits). Ballots, because the
/// instruction for it takes a step for every distinct value.
__device__ inline unsigned equal_lanes(int x, int num_bits) {
    unsigned equal = kFullMask;
    for (int bit = 0; bit < num_bits; ++bit) {
        const unsigned set = __ballot_sync(kFullMask, x >> bit & 1);
        equal &= x >> bit & 1 ? set : ~set;
    }
    return equal;
}

}  // namespace moecore::cuda
