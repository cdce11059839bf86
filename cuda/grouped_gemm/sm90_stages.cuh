#pragma once

// What producers and consumers of an sm_90a block share: the shape of its tiles, and the ring of
// stages in shared memory through which K blocks travel.

#include <cstdint>

#include "common/ptx_sm90.cuh"
#include "grouped_gemm/tile_claims.cuh"
#include "grouped_gemm/tile_walker.cuh"
#include "moecore/kernels/grouped_gemm.hpp"

namespace moecore::cuda::sm90 {

constexpr int kWarpSize = 32;
constexpr int kGroupThreads = 128;      ///< a warpgroup
constexpr int BLOCK_K = 64;             ///< of one stage
constexpr int kRowBytes = 2 * BLOCK_K;  ///< of a stage: 128 bytes, the width of the swizzle
constexpr int kGatherWarps = 3;         ///< of the producers; the fourth loads weights
constexpr int kGatherThreads = kGatherWarps * kWarpSize;
constexpr int kMaxStages = 12;
constexpr int kRingAlignment = 1024;  ///< of the swizzle
constexpr int kBoxRows = 32;          ///< of input that the copy engine brings at a time

/// A tile's shape: kConsumers warpgroups, each with kBlocks times 64 weight rows, times up to
/// kMaxTokens rows in multiples of kRowStep. The kCluster blocks of a cluster have the same weights
/// at the same time, and each loads its part of them for all.
template <int kConsumers_, int kBlocks_, int kMaxTokens_, int kRowStep_, int kGroupsPerLane_,
          int kResidentBlocks_, int kCluster_>
struct TileShape {
    static constexpr int kConsumers = kConsumers_;
    static constexpr int kBlocks = kBlocks_;
    static constexpr int kMaxTokens = kMaxTokens_;
    static constexpr int kRowStep = kRowStep_;
    static constexpr int kGroupsPerLane = kGroupsPerLane_;    ///< of a TileWalker
    static constexpr int kResidentBlocks = kResidentBlocks_;  ///< on one multiprocessor
    static constexpr int kCluster = kCluster_;
    static constexpr int kWeightRows = 64 * kBlocks * kConsumers;
    static constexpr int kWeightBytes = kWeightRows * kRowBytes;  ///< of one stage
    static constexpr int kThreads = kGroupThreads * (kConsumers + 1);
    using Walker = TileWalker<kGroupsPerLane, kRowStep, kCluster>;
};

struct Params {
    GroupedGemmArgs args;
    TileGrid grid;
    int num_stages;
    int stage_bytes;  ///< kWeightBytes, then max_tokens rows of input
    int num_k_blocks;
    bool is_output_aligned;  ///< rows of output take 16-byte stores
    bool keeps_weights;      ///< in L2, as anything else: else they leave it first
    bool copies_rows;        ///< by the copy engine, kBoxRows at a time: they lie side by side
    bool frees_early;        ///< a stage before the next one's products are issued, not after
    bool asks_for_two;       ///< K blocks of weights together, as soon as there is room for both
    bool claims_tiles;       ///< through args.work_counters
    bool begins_early;       ///< weights and offsets may be read before the kernel ahead has ended
};

/// Barriers and tiles of the stages.
struct RingState {
    uint64_t full[kMaxStages];   ///< data has arrived: one arrival of copies, one a gather thread
    uint64_t empty[kMaxStages];  ///< data is used: one arrival a consumer warp
    uint64_t empty_there[kMaxStages];  ///< in the cluster's other blocks: one of each warp
    Tile tile[kMaxStages];             ///< of a stage that begins a tile
    ClaimQueue claims;
};

/// Warps that take a claim from the queue: all producers of the cluster but the one that claims.
template <typename Shape>
__device__ int num_claim_takers(const Params& params) {
    const int num_takers =
        Shape::kCluster - 1 + (params.copies_rows ? 0 : Shape::kCluster * kGatherWarps);
    return max(num_takers, 1);  // a barrier counts at least one
}

/// A place in the ring, and the parity of its next phase.
class Stage {
public:
    __device__ Stage(const Params& params, uint32_t ring, RingState& state)
        : params_(params), ring_(ring), state_(state) {}

    __device__ void advance() {
        if (++index_ == params_.num_stages) {
            index_ = 0;
            parity_ ^= 1u;
        }
    }
    __device__ void step_back() {
        if (index_ == 0) {
            index_ = params_.num_stages;
            parity_ ^= 1u;
        }
        --index_;
    }
    __device__ int index() const { return index_; }
    __device__ uint32_t weights() const { return ring_ + index_ * params_.stage_bytes; }
    __device__ Tile& tile() const { return state_.tile[index_]; }
    __device__ uint32_t full() const { return ptx::shared_address(&state_.full[index_]); }
    /// Consumers, one thread a warp: data of stage `index` is used. Whoever of the cluster loads
    /// weights waits for that of all its blocks.
    template <int kCluster>
    __device__ void release(int index) const {
        ptx::barrier_arrive(ptx::shared_address(&state_.empty[index]));
        if constexpr (kCluster > 1) {
            const uint32_t there = ptx::shared_address(&state_.empty_there[index]);
#pragma unroll
            for (unsigned other = 1; other < kCluster; ++other)
                ptx::cluster_barrier_arrive(
                    ptx::address_in(there, (cluster_rank() + other) % kCluster));
        }
    }
    __device__ void wait_full() const { ptx::barrier_wait(full(), parity_); }
    /// Producers: the first pass through the ring finds it empty.
    __device__ void wait_empty() const {
        ptx::barrier_wait(ptx::shared_address(&state_.empty[index_]), parity_ ^ 1u);
    }
    /// Who writes to every block of the cluster waits for all of them.
    template <int kCluster>
    __device__ void wait_all_empty() const {
        wait_empty();
        if constexpr (kCluster > 1)
            ptx::barrier_wait(ptx::shared_address(&state_.empty_there[index_]), parity_ ^ 1u);
    }

private:
    const Params& params_;
    uint32_t ring_;
    RingState& state_;
    int index_ = 0;
    uint32_t parity_ = 0;
};

}  // namespace moecore::cuda::sm90
