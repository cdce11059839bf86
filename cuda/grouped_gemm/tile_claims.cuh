#pragma once

// Claimed tiles on their way between the producers of an sm_90a block or cluster.

#include <cstdint>

#include "common/cluster.cuh"
#include "common/ptx_sm90.cuh"
#include "grouped_gemm/work_counters.cuh"

namespace moecore::cuda::sm90 {

constexpr int kClaims = 4;  ///< on their way at a time

/// Claimed tiles on their way from the warp that claims them to the other producers of the cluster.
struct ClaimQueue {
    uint64_t full[kClaims];   ///< one arrival
    uint64_t empty[kClaims];  ///< of the cluster's first block: one arrival a taking warp
    int index[kClaims];
};

/// A place in the queue, and the parity of its next phase.
template <int kCluster>
class ClaimPlace {
public:
    __device__ explicit ClaimPlace(ClaimQueue& queue) : queue_(queue) {}

    /// One thread of the cluster's first block. Waits until the place is free.
    __device__ void put(int index) {
        if constexpr (kCluster == 1) {
            ptx::barrier_wait(ptx::shared_address(&queue_.empty[place_]), parity_ ^ 1u);
            *static_cast<volatile int*>(&queue_.index[place_]) = index;
            ptx::barrier_arrive(ptx::shared_address(&queue_.full[place_]));
        } else {
            ptx::cluster_barrier_wait(ptx::shared_address(&queue_.empty[place_]), parity_ ^ 1u);
#pragma unroll
            for (unsigned rank = 0; rank < kCluster; ++rank) {
                const auto there = [&](const auto& mine) {
                    return ptx::address_in(ptx::shared_address(&mine), rank);
                };
                ptx::cluster_store(there(queue_.index[place_]), index);
                ptx::cluster_barrier_release(there(queue_.full[place_]));
            }
        }
        advance();
    }
    /// All lanes of a warp.
    __device__ int take() {
        const uint32_t full = ptx::shared_address(&queue_.full[place_]);
        const uint32_t empty = ptx::shared_address(&queue_.empty[place_]);
        if constexpr (kCluster == 1)
            ptx::barrier_wait(full, parity_);
        else
            ptx::cluster_barrier_wait(full, parity_);
        const int index = *static_cast<const volatile int*>(&queue_.index[place_]);
        __syncwarp();  // all lanes have read it
        if (threadIdx.x % 32 == 0) {
            if constexpr (kCluster == 1)
                ptx::barrier_arrive(empty);
            else
                ptx::cluster_barrier_release(ptx::address_in(empty, 0));
        }
        advance();
        return index;
    }

private:
    __device__ void advance() {
        if (++place_ == kClaims) {
            place_ = 0;
            parity_ ^= 1u;
        }
    }

    ClaimQueue& queue_;
    int place_ = 0;
    uint32_t parity_ = 0;
};

}  // namespace moecore::cuda::sm90
